"""Applications on top of the engines."""

from monai_memeff.apps import skull

__all__ = ["skull"]
