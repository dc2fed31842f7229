"""What stands in the place of a bundle's readers and writers of files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection, PathLike
from monai.transforms import MapTransform

from monai_memeff.data import VolumeReader

RESULTS = "memeff_results"
"""Key of what a bundle would have saved."""


class StudyReader(VolumeReader):
    """A VolumeReader that remembers the grid of the first image it read, on which results must lie."""

    def __init__(self, resample: bool = False) -> None:
        super().__init__(resample=resample)
        self.begin()

    def begin(self, series: str | None = None, resample: bool | None = None) -> None:
        """Forget what was read: another study begins."""
        self.series = series
        self.resample = self.resample if resample is None else resample
        self.shape: tuple[int, ...] | None = None
        self.affine: np.ndarray | None = None
        self.notes: list[str] = []

    def get_data(self, img: Sequence[PathLike]) -> tuple[np.ndarray, dict]:
        """See :meth:`VolumeReader.get_data`."""
        values, meta = super().get_data(img)
        if self.shape is None:
            self.shape, self.affine = values.shape[-3:], np.array(meta["affine"], dtype=np.float64)
        elif values.shape[-3:] != self.shape or not np.allclose(meta["affine"], self.affine, atol=1e-3):
            self.notes.append(f"{img[0]} has another grid than the first image; it is for the bundle to join them")
        self.notes += [note for note in [str(meta["notes"])] if note]
        return values, meta


class CollectResultd(MapTransform):
    """Keep what ``SaveImaged`` would have written, as it is at this place of the postprocessing.

    Args:
        keys: Keys of the results.
        name: ``SaveImaged``'s ``output_postfix``.
        allow_missing_keys: as everywhere in MONAI.
    """

    def __init__(self, keys: KeysCollection, name: str = "", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.name = name

    def __call__(self, data: Any) -> dict[Any, Any]:
        """Add the results to the list in the dictionary."""
        found = dict(data)
        kept = [(str(key), self.name, found[key]) for key in self.key_iterator(found)]
        found[RESULTS] = [*found.get(RESULTS, []), *kept]
        return found
