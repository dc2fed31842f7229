"""RandVoxelDropout: empty random voxels of a mask, as the paper of 2021 provides for and leaves off."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import TransformBackends
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.sparse.transforms.masks import as_volume, foreground_mask


class RandVoxelDropout(RandomizableTransform):
    """Empty random voxels of a mask (Kroviakov et al. 2021, Methods); off in the paper, so ``p`` has no default.

    Args:
        p: fraction of the occupied voxels to empty, in [0, 1]; of n voxels int(n * (1 - p)) stay.
        prob: probability that it happens.

    Raises:
        ValueError: ``p`` or ``prob`` is outside [0, 1].

    Examples:
        >>> RandVoxelDropout(p=0.25)(torch.ones(1, 4, 4, 4)).sum()
        tensor(48.)
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, p: float, prob: float = 1.0) -> None:
        super().__init__(prob)
        self.p = p
        self._dropped = np.zeros(0, dtype=np.int64)

    def randomize(self, data: int) -> None:
        """Draw which of ``data`` occupied voxels to empty."""
        super().randomize(None)
        drop = data - int(data * (1 - self.p)) if self._do_transform else 0
        self._dropped = self.R.permutation(data)[:drop]

    def __call__(self, img: Tensor, randomize: bool = True) -> Tensor:
        """Empty voxels, in all channels at once.

        Args:
            img: (C, H, W, D); it is left as it is.
            randomize: whether to draw, or empty the same voxels of the same mask again.

        Returns:
            (C, H, W, D), dtype and metadata of ``img``.

        Raises:
            ValueError: ``img`` is not (C, H, W, D), or holds NaN, infinity or negative numbers.
            TypeError: ``img`` is not a tensor or an array.
        """
        img = as_volume(img)
        where = foreground_mask(img).any(0).flatten().nonzero()[:, 0]
        if randomize:
            self.randomize(len(where))
        hit = torch.zeros(img[0].numel(), dtype=torch.bool, device=img.device)
        hit[where[torch.from_numpy(self._dropped).to(where.device)]] = True
        return img.masked_fill(hit.view(1, *img.shape[1:]), 0)


class RandVoxelDropoutd(RandomizableTransform, MapTransform):
    """Dictionary version of :class:`RandVoxelDropout`, which has an example; every mask gets a draw of its own.

    In the authors' code what is dropped from the defective skull stays in the target: use it once the target is made.

    Args:
        keys: masks.
        p: see :class:`RandVoxelDropout`.
        prob: see :class:`RandVoxelDropout`.
        allow_missing_keys: whether a dictionary without a key passes through.
    """

    backend = RandVoxelDropout.backend

    @numbers_checked
    def __init__(self, keys: KeysCollection, p: float, prob: float = 1.0, allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.pepper = RandVoxelDropout(p, prob)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandVoxelDropoutd:
        """Set the random state of this transform and of the one that draws."""
        super().set_random_state(seed, state)
        self.pepper.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Empty voxels of the masks in a copy of ``data``."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.pepper(result[key])
        return result


RandVoxelDropoutD = RandVoxelDropoutDict = RandVoxelDropoutd
