"""Aligned models for TamperBench: an export, a defense of its registry, and an attack."""
