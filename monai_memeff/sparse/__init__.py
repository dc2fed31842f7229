"""Sparse wing: compute only where there is something."""

from monai_memeff.sparse import backends
from monai_memeff.sparse.tensor import SparseTensor, concatenate, union_add

__all__ = ["SparseTensor", "backends", "concatenate", "union_add"]
