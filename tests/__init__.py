"""Tests: the rooms of the package mirrored, with the oracles and phantoms they share."""
