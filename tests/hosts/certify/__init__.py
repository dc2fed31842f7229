"""Tests of `memeff certify`."""
