"""Checks between other transforms: what passes is unchanged, what does not ends in one line that names the file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Transform
from monai.utils import TransformBackends

from monai_memeff.arguments import numbers_checked
from monai_memeff.errors import InputError
from monai_memeff.transforms.each_key import EachKey, name_of

__all__ = [
    "CheckForeground",
    "CheckForegroundD",
    "CheckForegroundDict",
    "CheckForegroundd",
    "CheckLabels",
    "CheckLabelsD",
    "CheckLabelsDict",
    "CheckLabelsd",
    "CheckVolume",
    "CheckVolumeD",
    "CheckVolumeDict",
    "CheckVolumed",
]


class CheckVolume(Transform):
    """Pass one finite 3D volume (1, H, W, D), and refuse everything else.

    Examples:
        >>> CheckVolume()(torch.zeros(1, 4, 4, 4)).shape
        torch.Size([1, 4, 4, 4])
    """

    backend = [TransformBackends.TORCH]

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return ``img`` itself.

        Raises:
            InputError: it is not (1, H, W, D), or holds NaN or an infinity.
        """
        bad = int((~torch.isfinite(torch.as_tensor(img))).sum())
        if bad or img.ndim != 4 or img.shape[0] != 1:
            raise InputError(
                f"{name_of(img)} has the shape {tuple(img.shape)} with {bad} values that are not finite;"
                " one finite 3D volume is needed"
            )
        return img


class CheckForeground(Transform):
    """Pass a volume in which a part of the voxels is not zero, and refuse nothing and too much.

    Args:
        max_fraction: Fraction of foreground voxels that is too much, in (0, 1]; 1 takes a full volume too.
        name: What the foreground is called in the message.
        threshold: The threshold that made the foreground, for the message.
        option: What the user may change, for the message.

    Raises:
        ValueError: ``max_fraction`` is out of range.

    Examples:
        >>> check = CheckForeground(0.5, name="bone", threshold=300, option="--bone_threshold")
        >>> check(torch.zeros(1, 4, 4, 4))
        Traceback (most recent call last):
        monai_memeff.errors.InputError: the volume: 0.0% of the voxels are bone at the threshold 300, more than 0 ...
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self,
        max_fraction: float = 1.0,
        name: str = "foreground",
        threshold: float | None = None,
        option: str | None = None,
    ) -> None:
        if not 0 < max_fraction <= 1:
            raise ValueError(f"max_fraction must be in (0, 1], got {max_fraction}.")
        self.max_fraction, self.name, self.threshold, self.option = max_fraction, name, threshold, option

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return ``img`` itself, of any shape.

        Raises:
            InputError: no voxel is foreground, or ``max_fraction`` of them or more.
        """
        mask = torch.as_tensor(img) != 0
        count = int(mask.sum())
        most = self.max_fraction * mask.numel() if self.max_fraction < 1 else mask.numel() + 1
        if not 0 < count < most:
            made = "" if self.threshold is None else f" at the threshold {self.threshold}"
            limit = "" if self.max_fraction == 1 else f" and less than {self.max_fraction:.0%}"
            way_out = "leave the file out" if self.option is None else f"change {self.option}"
            raise InputError(
                f"{name_of(img)}: {count / max(mask.numel(), 1):.1%} of the voxels are {self.name}{made},"
                f" more than 0{limit} must be; {way_out}"
            )
        return img


class CheckLabels(Transform):
    """Pass a label volume whose values all have a name.

    Args:
        names: Names of the labels 1, 2, ...; 0 is background.
        option: What the user may set, for the message.

    Raises:
        ValueError: there is no name.

    Examples:
        >>> CheckLabels(["liver", "tumor"])(torch.tensor([0, 1, 2]))
        tensor([0, 1, 2])
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, names: Sequence[str], option: str | None = None) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(f"names must list at least one label, got {names!r}.")
        self.names, self.option = list(names), option

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Return ``img`` itself, of any shape.

        Raises:
            InputError: a value is not a whole number from 0 to the number of names.
        """
        values = torch.as_tensor(img)
        if not values.numel():
            return img
        low, high, last = float(values.min()), float(values.max()), len(self.names)
        if not (low >= 0 and high <= last):
            way_out = "name them all" if self.option is None else f"set {self.option}"
            raise InputError(f"{name_of(img)} has labels from {low:g} to {high:g}, 0 to {last} are named; {way_out}")
        if values.is_floating_point() and bool((values != values.round()).any()):
            raise InputError(f"{name_of(img)} has values that are not labels, such as fractions; give a label file")
        return img


class CheckVolumed(EachKey):
    """Dictionary version of :class:`CheckVolume`.

    Args:
        keys: Volumes to check.
        allow_missing_keys: Whether a dictionary without a key passes.

    Examples:
        >>> CheckVolumed("image")({"image": torch.full((1, 4, 4, 4), torch.nan)})
        Traceback (most recent call last):
        monai_memeff.errors.InputError: the volume has the shape (1, 4, 4, 4) with 64 values that are not finite; ...
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, CheckVolume(), allow_missing_keys)


class CheckForegroundd(EachKey):
    """Dictionary version of :class:`CheckForeground`, which has an example; in a copy, each key gets its own result.

    Args:
        keys: Volumes to check.
        max_fraction: See :class:`CheckForeground`.
        name: See :class:`CheckForeground`.
        threshold: See :class:`CheckForeground`.
        option: See :class:`CheckForeground`.
        allow_missing_keys: Whether a dictionary without a key passes.
    """

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        max_fraction: float = 1.0,
        name: str = "foreground",
        threshold: float | None = None,
        option: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, CheckForeground(max_fraction, name, threshold, option), allow_missing_keys)


class CheckLabelsd(EachKey):
    """Dictionary version of :class:`CheckLabels`, which has an example; in a copy, each key gets its own result.

    Args:
        keys: Label volumes to check.
        names: See :class:`CheckLabels`.
        option: See :class:`CheckLabels`.
        allow_missing_keys: Whether a dictionary without a key passes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        names: Sequence[str],
        option: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, CheckLabels(names, option), allow_missing_keys)


CheckVolumeD = CheckVolumeDict = CheckVolumed
CheckForegroundD = CheckForegroundDict = CheckForegroundd
CheckLabelsD = CheckLabelsDict = CheckLabelsd
