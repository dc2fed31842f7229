"""Transforms between dense volumes, coarse masks and active voxels."""
