"""Tests of the geometry room."""
