"""Tests of the nnU-Net plugins."""
