"""Stand-ins for the transforms of spleen_deepedit_annotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.transforms import Transform


class OrientationGuidanceMultipleLabelDeepEditd(Transform):
    """One click in the middle for each label, where a viewer would put the user's."""

    def __init__(self, ref_image: str, label_names: Mapping[str, int]) -> None:
        self.ref_image, self.label_names = ref_image, label_names

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        middle = [extent // 2 for extent in data[self.ref_image].shape[1:]]
        return {**data, **{name: [middle] for name in self.label_names}}
