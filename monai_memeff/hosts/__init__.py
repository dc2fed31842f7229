"""What a MONAI bundle runs of this package besides networks and inferers: switches, checks, and merged files."""

from monai_memeff.hosts.in_use import require_exclusive_classes, require_in_use, require_partitionable
from monai_memeff.hosts.merge import merge_bundle_configs
from monai_memeff.hosts.networks import replace_network, switch_unet
from monai_memeff.hosts.weights import require_weights

__all__ = [
    "merge_bundle_configs",
    "replace_network",
    "require_exclusive_classes",
    "require_in_use",
    "require_partitionable",
    "require_weights",
    "switch_unet",
]
