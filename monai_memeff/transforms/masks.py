"""Binary masks: of one label, of a network's logits, dilated, opened."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import Transform
from monai.transforms.utils_morphological_ops import dilate, erode
from monai.utils import TransformBackends
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_network_input, check_finite, check_labels, check_mask, computable
from monai_memeff.errors import InputError
from monai_memeff.transforms.each_key import EachKey, name_of
from monai_memeff.transforms.evaluation import evaluated

__all__ = [
    "DilateMask",
    "DilateMaskD",
    "DilateMaskDict",
    "DilateMaskd",
    "OpenMask",
    "OpenMaskD",
    "OpenMaskDict",
    "OpenMaskd",
    "PredictMask",
    "PredictMaskD",
    "PredictMaskDict",
    "PredictMaskd",
    "SelectLabel",
    "SelectLabelD",
    "SelectLabelDict",
    "SelectLabeld",
]


UNANNOTATED = 255
"""The value that many datasets give to voxels without annotation; a mask of 0 and 255 alone is a mask."""


class SelectLabel(Transform):
    """Make the binary mask of one label, or of all labels but 0, of a tensor of any shape; see ``__call__``.

    Args:
        label: Value of the structure; None takes everything that is not zero.
        allow_empty: Whether a volume without the structure passes.
        unannotated: The value that means "not annotated" where it lies beside labels. Such a volume is refused, as its
            mask would call these voxels background; None: every value is a label.

    Examples:
        >>> SelectLabel(2)(torch.tensor([[[[0, 1, 2, 2]]]]))
        tensor([[[[0, 0, 1, 1]]]], dtype=torch.uint8)
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self, label: float | None = None, allow_empty: bool = True, unannotated: int | None = UNANNOTATED
    ) -> None:
        self.label, self.allow_empty, self.unannotated = label, allow_empty, unannotated

    def __call__(self, img: NdarrayOrTensor) -> Tensor:
        """Return the mask, uint8 of 0 and 1, with the shape and the metadata of ``img``.

        Raises:
            InputError: the values are not labels, some are not annotated, or the mask is empty and must not be.
            TypeError: ``img`` is not a tensor or an array.
        """
        values = _volume(img, "SelectLabel")
        check_labels(values, name_of(img))
        self._check_annotated(values, name_of(img))
        mask = (values != 0 if self.label is None else values == self.label).to(torch.uint8)
        if not self.allow_empty and not bool(mask.any()):
            wanted = "all are 0" if self.label is None else f"label {self.label:g}"
            raise InputError(
                f"{name_of(img)} holds no voxel of the structure: {wanted}; set --label, or leave the file out"
            )
        return mask

    def _check_annotated(self, values: Tensor, name: str) -> None:
        if self.unannotated in (None, self.label):
            return
        unknown = values == self.unannotated
        count = int(unknown.sum())
        if count and (self.label is not None or bool(((values != 0) & ~unknown).any())):
            raise InputError(
                f"{name} holds {count} voxels of the value {self.unannotated}, which marks those without "
                "annotation: leave the file out, or say unannotated=None (--unannotated None) where it is a label"
            )


class PredictMask(Transform):
    """Make a binary mask with a network, one volume at a time, in evaluation mode and without gradients.

    The network sees the whole volume at once; for windows use MONAI's inferers.

    Args:
        network: Maps (1, C, H, W, D) to logits (1, C', H, W, D).
        threshold: Logits above it are 1; 0 is a probability of one half.
        device: Where the network is; None: the device of the volume.

    Examples:
        >>> PredictMask(torch.nn.Conv3d(1, 2, 3, padding=1))(torch.zeros(1, 8, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, network: nn.Module, threshold: float = 0.0, device: torch.device | str | None = None) -> None:
        self.network, self.threshold, self.device = network, threshold, device

    def __call__(self, img: Tensor) -> Tensor:
        """Return the mask (C', H, W, D) of (C, H, W, D): uint8 of 0 and 1, on the device of ``img``.

        Raises:
            InputError: a logit is NaN or infinite.
        """
        with evaluated(self.network):
            logits = self.network(img[None].to(img.device if self.device is None else self.device))[0]
        check_finite(logits, "PredictMask")
        return (logits > self.threshold).to(torch.uint8).to(img.device)


class DilateMask(Transform):
    """Grow a mask (C, H, W, D) by a cube, every channel on its own.

    Args:
        size: Edge of the cube in voxels, odd; 1 changes nothing.

    Raises:
        ValueError: ``size`` is even or less than 1.

    Examples:
        >>> DilateMask(3)(torch.tensor([[[[0, 0, 1, 0, 0]]]]))
        tensor([[[[0, 1, 1, 1, 0]]]])
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, size: int = 3) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and at least 1, got {size}.")
        self.size = size

    def __call__(self, img: NdarrayOrTensor) -> Tensor:
        """Return the mask (C, H, W, D) with the dtype and the metadata of ``img``: the largest value in the cube.

        Raises:
            InputError: ``img`` holds NaN, infinity or negative numbers, or integers beyond 2^24.
            TypeError: ``img`` is not a tensor or an array.
        """
        mask = _volume(img, "DilateMask")
        check_mask(mask, "DilateMask")
        wide = torch.float64 if mask.dtype == torch.float64 else torch.float32
        values = mask.to(wide) if mask.is_floating_point() else as_network_input(mask, wide, "DilateMask")
        return torch.nn.functional.max_pool3d(values, self.size, 1, self.size // 2).to(_dtype_of(img, mask))


class OpenMask(Transform):
    """Open a mask (C, H, W, D) by a cube: remove what the cube does not fit into, and keep the rest as it is.

    Args:
        size: Edge of the cube in voxels, odd; 1 changes nothing.

    Raises:
        ValueError: ``size`` is even or less than 1.

    Examples:
        >>> OpenMask(3)(torch.tensor([[[[0, 1, 0, 1, 1, 1, 0]]]]))
        tensor([[[[0, 0, 0, 1, 1, 1, 0]]]])
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, size: int = 3) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and at least 1, got {size}.")
        self.size = size

    def __call__(self, img: NdarrayOrTensor) -> Tensor:
        """Return the opened mask (C, H, W, D), dtype and metadata of ``img``; beyond its edges counts as mask.

        Raises:
            InputError: ``img`` holds NaN, infinity or negative numbers.
            TypeError: ``img`` is not a tensor or an array.
        """
        mask = _volume(img, "OpenMask")
        check_mask(mask, "OpenMask")
        apart = (mask != 0).to(torch.uint8)[:, None]  # MONAI's operations mix channels, so channels become a batch
        return dilate(erode(apart, self.size), self.size)[:, 0].to(_dtype_of(img, mask))


def _volume(img: Any, owner: str) -> Tensor:
    """The numbers as a tensor that torch computes with; metadata stay."""
    if not isinstance(img, Tensor | np.ndarray):
        raise TypeError(f"{owner} takes a tensor or an array, got {type(img).__name__}; load it first.")
    return computable(img if isinstance(img, Tensor) else torch.as_tensor(img))


def _dtype_of(img: NdarrayOrTensor, volume: Tensor) -> torch.dtype:
    return img.dtype if isinstance(img, Tensor) else volume.dtype


class SelectLabeld(EachKey):
    """Dictionary version of :class:`SelectLabel`.

    Args:
        keys: Label volumes that become masks.
        label: See :class:`SelectLabel`.
        allow_empty: See :class:`SelectLabel`.
        unannotated: See :class:`SelectLabel`.
        allow_missing_keys: Whether a dictionary without a key passes.

    Examples:
        >>> SelectLabeld("label", 2)({"label": torch.tensor([[[[0, 1, 2]]]])})["label"]
        tensor([[[[0, 0, 1]]]], dtype=torch.uint8)
    """

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        label: float | None = None,
        allow_empty: bool = True,
        unannotated: int | None = UNANNOTATED,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, SelectLabel(label, allow_empty, unannotated), allow_missing_keys)


class PredictMaskd(EachKey):
    """Dictionary version of :class:`PredictMask`, which has an example; in a copy, each key gets its own result.

    Args:
        keys: Volumes that become masks.
        network: See :class:`PredictMask`.
        threshold: See :class:`PredictMask`.
        device: See :class:`PredictMask`.
        allow_missing_keys: Whether a dictionary without a key passes.
    """

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        threshold: float = 0.0,
        device: torch.device | str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, PredictMask(network, threshold, device), allow_missing_keys)


class DilateMaskd(EachKey):
    """Dictionary version of :class:`DilateMask`, which has an example; in a copy, each key gets its own result.

    Args:
        keys: Masks to grow.
        size: See :class:`DilateMask`.
        allow_missing_keys: Whether a dictionary without a key passes.
    """

    @numbers_checked
    def __init__(self, keys: KeysCollection, size: int = 3, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, DilateMask(size), allow_missing_keys)


class OpenMaskd(EachKey):
    """Dictionary version of :class:`OpenMask`, which has an example; in a copy, each key gets its own result.

    Args:
        keys: Masks to open.
        size: See :class:`OpenMask`.
        allow_missing_keys: Whether a dictionary without a key passes.
    """

    @numbers_checked
    def __init__(self, keys: KeysCollection, size: int = 3, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, OpenMask(size), allow_missing_keys)


SelectLabelD = SelectLabelDict = SelectLabeld
PredictMaskD = PredictMaskDict = PredictMaskd
DilateMaskD = DilateMaskDict = DilateMaskd
OpenMaskD = OpenMaskDict = OpenMaskd
