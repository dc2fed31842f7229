"""Stand-ins for the transforms of renalStructures_CECT_segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.transforms import MapTransform, Transform


class ConcatImages(Transform):
    """Phases of contrast as channels of one image."""

    def __init__(self, keys_merge: Sequence[str], keys_out: str) -> None:
        self.keys_merge, self.keys_out = keys_merge, keys_out

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, self.keys_out: torch.cat([data[key] for key in self.keys_merge])}


class MergeClassesd(MapTransform):
    """Overlapping masks as one map of labels."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        merged = dict(data)
        for key in self.keys:
            merged[key] = (data[key] * torch.arange(len(data[key])).view(-1, 1, 1, 1)).amax(0, keepdim=True)
        return merged
