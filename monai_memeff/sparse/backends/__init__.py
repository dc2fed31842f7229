"""Convolution engines, one file per library with the same two functions; see ``registry`` for the table."""

from monai_memeff.sparse.backends.registry import current, register, status, use

__all__ = ["current", "register", "status", "use"]
