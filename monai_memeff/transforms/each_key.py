"""What the dictionary transforms here share: one array transform for every key, and a file's name for messages."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import TransformBackends


class EachKey(MapTransform):
    """Apply one array transform to every key of a copy of the dictionary."""

    backend = [TransformBackends.TORCH]

    def __init__(self, keys: KeysCollection, transform: Callable[[Any], Any], allow_missing_keys: bool) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = transform

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the value of every key."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform(result[key])
        return result


def name_of(img: Any) -> str:
    """The file that a volume was read from, as far as it knows."""
    name = img.meta.get("filename_or_obj") if isinstance(img, MetaTensor) else None
    return "the volume" if name is None else str(name)
