"""Sparse networks."""
