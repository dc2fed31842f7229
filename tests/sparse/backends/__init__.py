"""Tests of the convolution engines."""
