"""From a completed skull to its implant, cleaned as the paper of 2021 does."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import KeepLargestConnectedComponent, MapTransform, Transform
from monai.utils import TransformBackends
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.sparse.transforms.masks import as_volume, foreground_mask, morphology


class ImplantFromCompletion(Transform):
    """What a completed skull has beyond the defective one: opened, and of that the largest 26-connected piece.

    Kroviakov, Li and Egger 2021. The opening (six neighbors) removes sheets and threads of up to two voxels, with them
    the rim where the completed surface is a voxel beside the defective one; an implant must be thicker to remain.

    Args:
        opening: steps of the opening; 0 leaves it out.
        largest: keep the largest piece only.

    Raises:
        ValueError: ``opening`` is negative.

    Examples:
        >>> skull = torch.ones(1, 16, 16, 16)
        >>> defective = skull.index_fill(1, torch.arange(4), 0)
        >>> int(ImplantFromCompletion(opening=0)(skull, defective).sum())
        1024
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, opening: int = 1, largest: bool = True) -> None:
        if opening < 0:
            raise ValueError(f"opening must not be negative, got {opening}.")
        self.opening = opening
        self.largest = KeepLargestConnectedComponent(is_onehot=False, connectivity=3) if largest else None

    def __call__(self, img: Tensor, defective: Tensor) -> Tensor:
        """Take the implant.

        Args:
            img: (1, H, W, D), the completed skull, not zero where bone is; logits must be compared with 0 before.
            defective: (1, H, W, D) on the same grid, the network's input.

        Returns:
            (1, H, W, D), ones in the implant; type, dtype and metadata of ``img``.

        Raises:
            ValueError: shapes do not fit, or a mask holds NaN, infinity or negative numbers.
        """
        img, defective = as_volume(img), as_volume(defective)
        if img.shape != defective.shape or img.shape[0] != 1:
            raise ValueError(
                f"completed and defective skull must both be (1, H, W, D) on one grid, got {tuple(img.shape)} and "
                f"{tuple(defective.shape)}."
            )
        implant = foreground_mask(img) & ~foreground_mask(defective)
        if self.opening:
            implant = morphology("binary_opening", implant, self.opening)
        if self.largest is not None and bool(implant.any()):
            implant = foreground_mask(self.largest(implant.int()))
        return img.masked_fill(~implant, 0).masked_fill(implant, 1)


class ImplantFromCompletiond(MapTransform):
    """Dictionary version of :class:`ImplantFromCompletion`: replaces completed skulls by their implants.

    Args:
        keys: completed skulls, ``"pred"`` say.
        defective_key: the defective skull they complete.
        opening: see :class:`ImplantFromCompletion`.
        largest: see :class:`ImplantFromCompletion`.
        allow_missing_keys: whether a dictionary without a key passes through.

    Examples:
        >>> skull = torch.ones(1, 16, 16, 16)
        >>> defective = skull.index_fill(1, torch.arange(4), 0)
        >>> out = ImplantFromCompletiond("skull", opening=0)({"skull": skull, "defective": defective})
        >>> torch.equal(out["skull"], skull - defective)
        True
    """

    backend = ImplantFromCompletion.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        defective_key: str = "defective",
        opening: int = 1,
        largest: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.defective_key = defective_key
        self.implant = ImplantFromCompletion(opening, largest)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Take the implants in a copy of ``data``."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.implant(result[key], result[self.defective_key])
        return result


ImplantFromCompletionD = ImplantFromCompletionDict = ImplantFromCompletiond
