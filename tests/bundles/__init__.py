"""Tests of the bundles and of the overlays for other bundles."""
