"""Applications on top of the engines."""

from monai_memeff.apps import liver, skull

__all__ = ["liver", "skull"]
