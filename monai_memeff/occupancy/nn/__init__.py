"""Layers of occupancy networks."""
