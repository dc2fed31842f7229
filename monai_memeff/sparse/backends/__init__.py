"""Convolution engines, one file or folder per library with the same two functions; see ``registry`` for the table."""

from monai_memeff.sparse.backends.registry import chosen, current, register, status, use

__all__ = ["chosen", "current", "register", "status", "use"]
