"""Attacks register where they are imported."""
