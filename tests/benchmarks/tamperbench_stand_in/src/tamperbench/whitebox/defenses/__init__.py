"""Defenses register where they are imported."""
