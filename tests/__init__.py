"""Tests: the subpackages mirrored, with the oracles and phantoms they share."""
