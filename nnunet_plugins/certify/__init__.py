"""Trained nnU-Net models for `memeff certify`."""

from nnunet_plugins.certify.subject import nnunet_subject

__all__ = ["nnunet_subject"]
