"""Tests of the comparison of the systems."""
