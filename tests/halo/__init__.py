"""Tests of the halo wing."""
