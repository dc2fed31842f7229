"""Tests of the sparse wing."""
