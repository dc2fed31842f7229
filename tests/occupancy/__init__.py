"""Tests of the occupancy wing."""
