"""The surface of a skull, as the networks of the paper of 2021 see it.

Kroviakov, Li and Egger 2021 (AutoImplant challenge, third task). Masks are binary volumes (C, H, W, D), any voxel that
is not zero being bone; z is the last axis and grows upwards, as in MONAI's RAS.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.sparse.transforms.masks import as_volume, foreground_mask, morphology


class SkullShell(Transform):
    """Keep the surface of bone: the mask without its erosion, as the paper's networks see skulls.

    The erosion looks at the six neighbors of a voxel, and what lies outside the volume counts as empty; that would
    leave the cut through the neck as a filled slice, so the lowest slices are emptied.

    Args:
        steps: thickness of the shell in voxels; the paper's is 1.
        first_slices: lowest slices (z) to empty; default as many as ``steps``.

    Raises:
        ValueError: ``steps`` is less than 1 or ``first_slices`` negative.

    Examples:
        >>> shell = SkullShell()(torch.ones(1, 16, 16, 16))
        >>> int(shell.sum()), int(shell[0, 1:-1, 1:-1, :-1].sum())
        (1096, 0)
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, steps: int = 1, first_slices: int | None = None) -> None:
        self.steps = steps
        self.first_slices = steps if first_slices is None else first_slices

    def __call__(self, img: Tensor) -> Tensor:
        """Take the shell of every channel.

        Args:
            img: (C, H, W, D); it is left as it is.

        Returns:
            The same with zeros away from the shell; type, dtype and metadata of ``img``.

        Raises:
            ValueError: ``img`` is not (C, H, W, D), or holds NaN, infinity or negative numbers.
        """
        img = as_volume(img)
        inside = morphology("binary_erosion", foreground_mask(img), self.steps)
        inside[..., : self.first_slices] = True
        return img.masked_fill(inside, 0)


class SkullShelld(MapTransform):
    """Dictionary version of :class:`SkullShell`; on request the target with a dense implant is written too.

    The paper's target is the shell of the defective skull together with the whole implant, no shell of it.

    Args:
        keys: skulls that become shells; with ``implant_key`` one, the defective skull.
        implant_key: the implant on the same grid; it stays as it is.
        target_key: where shell and implant together go.
        steps: see :class:`SkullShell`.
        first_slices: see :class:`SkullShell`.
        allow_missing_keys: whether a dictionary without a key passes through.

    Raises:
        ValueError: several keys with an implant, or the target's name begins with another key and an underscore, which
            MONAI's ``Spacingd`` takes for metadata.

    Examples:
        >>> shell = SkullShelld("skull")({"skull": torch.ones(1, 16, 16, 16)})["skull"]
        >>> int(shell.sum()), int(shell[0, 1:-1, 1:-1, 1:-1].sum())
        (1096, 0)
    """

    backend = SkullShell.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        implant_key: str | None = None,
        target_key: str = "target",
        steps: int = 1,
        first_slices: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if implant_key is not None and len(self.keys) != 1:
            raise ValueError(f"with implant_key, keys must name one defective skull, got {len(self.keys)}.")
        clash = [key for key in (*self.keys, implant_key) if key is not None and target_key.startswith(f"{key}_")]
        if clash:
            raise ValueError(
                f"{target_key!r} begins with {clash[0]!r} and '_', which MONAI takes for metadata; rename it."
            )
        self.implant_key, self.target_key = implant_key, target_key
        self.shell = SkullShell(steps, first_slices)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace skulls by shells in a copy of ``data``, and add the target."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.shell(result[key])
            if self.implant_key is not None:
                implant = foreground_mask(as_volume(result[self.implant_key]))
                result[self.target_key] = result[key].masked_fill(implant, 1)
        return result


SkullShellD = SkullShellDict = SkullShelld
