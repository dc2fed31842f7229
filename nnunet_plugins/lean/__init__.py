"""Lean prediction: stock nnU-Net models, the same labels voxel for voxel, in memory that classes do not add to.

nnU-Net is never edited. While lean prediction is on, some functions of its inference modules are replaced by those of
this package (:mod:`nnunet_plugins.lean.switch`); they do the same arithmetic in the same order, piece by piece.
"""
