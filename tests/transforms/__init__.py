"""Tests of the transforms that belong to no engine."""
