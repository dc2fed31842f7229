"""Tests of what hosts do with the overlays: MONAI's bundle command, MONAI Label, MONAI Deploy."""
