"""`memeff certify`: a model on a volume whole, streamed and by sliding window, and a page of what differs."""

from monai_memeff.hosts.certify.command import certify

__all__ = ["certify"]
