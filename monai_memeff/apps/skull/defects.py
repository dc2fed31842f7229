"""Random defects of the published kinds, cut into a complete skull to make a defective one and its implant."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import TransformBackends

from monai_memeff.apps.skull.vault import vault_mask
from monai_memeff.arguments import numbers_checked
from monai_memeff.sparse.transforms.masks import as_volume, foreground_mask

__all__ = ["RandSkullDefect", "RandSkullDefectD", "RandSkullDefectDict", "RandSkullDefectd"]

REGIONS = ("vault", "anywhere")
INSIDE = 0.8  # fraction of the removed bone that must come from the region
TRIES = 20


def _sphere(x: np.ndarray, y: np.ndarray, z: np.ndarray, radius: float, random: np.random.RandomState) -> np.ndarray:
    return x**2 + y**2 + z**2 <= radius**2


def _cube(x: np.ndarray, y: np.ndarray, z: np.ndarray, radius: float, random: np.random.RandomState) -> np.ndarray:
    return (np.abs(x) <= radius) & (np.abs(y) <= radius) & (np.abs(z) <= radius)


def _freeform(x: np.ndarray, y: np.ndarray, z: np.ndarray, radius: float, random: np.random.RandomState) -> np.ndarray:
    """A union of a middle ball and two to four smaller ones on its surface, its outline bent by plane waves."""
    waves = random.normal(size=(4, 3)) * (2.0 / radius)
    phases = random.uniform(0, 2 * np.pi, size=4)
    bend = sum(np.sin(w[0] * x + w[1] * y + w[2] * z + p) for w, p in zip(waves, phases, strict=True))
    depth = 0.85 * radius - np.sqrt(x**2 + y**2 + z**2)
    for _ in range(random.randint(2, 5)):
        direction = random.normal(size=3)
        at = direction / np.linalg.norm(direction) * radius * random.uniform(0.5, 0.9)
        small = radius * random.uniform(0.4, 0.6)
        depth = np.maximum(depth, small - np.sqrt((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2))
    return depth + 0.04 * radius * bend > 0


SHAPES: dict[str, tuple[Callable[..., np.ndarray], float]] = {
    "sphere": (_sphere, 1.0),
    "cube": (_cube, 1.0),
    "freeform": (_freeform, 1.6),
}
"""Kind -> which voxels, given from the center, belong to the defect, and how far it reaches, in radii."""

KINDS = tuple(SHAPES)


@dataclass(frozen=True)
class _Cut:
    """A box of the volume and what is taken out of it."""

    box: tuple[slice, slice, slice]
    shape: torch.Tensor  # bool, as large as the box


class RandSkullDefect(RandomizableTransform):
    """Cut a random defect into a complete skull.

    The published kinds: spherical and cubic defects (Kroviakov, Li and Egger 2021; Li et al. 2023, Data), and free-form
    ones, here a union of overlapping balls whose surface is bent by smooth noise. A defect is centered on a bone voxel
    of the region; it must remove a patch of bone at least a quarter as large as its own cross-section, at least 80 % of
    which lies in the region, and less than half of all bone, or another one is drawn, at most 20 times.

    Args:
        kind: one of, or a sequence of, ``"sphere"``, ``"cube"``, ``"freeform"``; one is drawn each time.
        size: range of the radius (of a cube: half its edge), as a fraction of the longest edge of the volume.
        region: ``"vault"`` (see :func:`vault_mask`) or ``"anywhere"``.
        prob: probability of a defect; without one the skull comes back whole and the implant empty.

    Raises:
        ValueError: on an unknown kind or region, or a range of sizes that is empty or outside (0, 0.5].

    Examples:
        >>> skull = torch.ones(1, 32, 32, 32)
        >>> defective, implant = RandSkullDefect(kind="cube", region="anywhere").set_random_state(0)(skull)
        >>> torch.equal(defective + implant, skull)
        True
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(
        self,
        kind: str | Sequence[str] = KINDS,
        size: tuple[float, float] = (0.10, 0.20),
        region: str = "vault",
        prob: float = 1.0,
    ) -> None:
        super().__init__(prob)
        self.kinds = (kind,) if isinstance(kind, str) else tuple(kind)
        unknown = [k for k in self.kinds if k not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"kind must be of {', '.join(KINDS)}, got {unknown or 'none'}")
        if region not in REGIONS:
            raise ValueError(f"region must be one of {', '.join(REGIONS)}, got {region!r}")
        if not 0 < size[0] <= size[1] <= 0.5:
            raise ValueError(f"size must be two fractions of the edge with 0 < low <= high <= 0.5, got {tuple(size)}")
        self.size, self.region = (float(size[0]), float(size[1])), region
        self._cut: _Cut | None = None

    def randomize(self, data: torch.Tensor) -> None:
        """Draw whether there is a defect and, if so, one that fits the skull.

        Args:
            data: binary (C, H, W, D).

        Raises:
            ValueError: when the skull is empty or too small for a defect of the wanted size.
        """
        super().randomize(None)
        self._cut = None
        if not self._do_transform:
            return
        bone = foreground_mask(data).any(dim=0)
        if not bone.any():
            raise ValueError("the skull is empty: no voxel of it is set, and a defect needs bone; check the threshold")
        inside = vault_mask(data) if self.region == "vault" else bone
        centers = torch.nonzero(inside)
        for _ in range(TRIES):
            kind = self.kinds[self.R.randint(len(self.kinds))]
            radius = self.R.uniform(*self.size) * max(bone.shape)
            center = centers[self.R.randint(len(centers))].cpu().numpy()
            cut = self._draw(kind, radius, center, tuple(bone.shape))
            removed = bone[cut.box] & cut.shape.to(bone.device)
            count, within = int(removed.sum()), int((removed & inside[cut.box]).sum())
            if count >= max(4.0, np.pi * radius**2 / 4) and within >= INSIDE * count and count < int(bone.sum()) / 2:
                self._cut = cut
                return
        raise ValueError(
            f"no defect of {self.size[0]:g} to {self.size[1]:g} of the edge ({max(bone.shape)} voxels) fits a skull of"
            f" {int(bone.sum())} voxels in {TRIES} tries: the skull is too small, give a smaller size or a larger skull"
        )

    def _draw(self, kind: str, radius: float, center: np.ndarray, shape: tuple[int, ...]) -> _Cut:
        shape_of, reach = SHAPES[kind]
        reach *= radius
        low = np.maximum(np.ceil(center - reach), 0).astype(int)
        high = np.minimum(np.floor(center + reach) + 1, shape).astype(int)
        axes = [np.arange(a, b, dtype=np.float64) - c for a, b, c in zip(low, high, center, strict=True)]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        hit = shape_of(x, y, z, radius, self.R)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return _Cut((box[0], box[1], box[2]), torch.from_numpy(np.ascontiguousarray(hit)))

    def __call__(self, img: torch.Tensor, randomize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut a defect.

        Args:
            img: complete binary skull (C, H, W, D); any dtype, background 0. It is left as it is.
            randomize: whether to draw a new defect, or cut the last one again (the shape must be the same).

        Returns:
            The defective skull and the implant: disjoint, their union is the skull; type and metadata of ``img``.

        Raises:
            TypeError: when ``img`` is not a tensor or array.
            ValueError: when ``img`` is not (C, H, W, D), is empty or too small for the wanted size, or holds NaN or
                negative numbers.
        """
        img = as_volume(img)
        if randomize:
            self.randomize(img)
        defective, implant = img.clone(), torch.zeros_like(img)
        if self._cut is not None:
            where = (slice(None), *self._cut.box)
            hit = self._cut.shape.to(img.device)
            implant[where] = torch.where(hit, img[where], torch.zeros_like(img[where]))
            defective[where] = torch.where(hit, torch.zeros_like(img[where]), img[where])
        return defective, implant


class RandSkullDefectd(RandomizableTransform, MapTransform):
    """Dictionary version of :class:`RandSkullDefect`: one skull in, two new keys out.

    Args:
        keys: the key of the complete skull; it keeps its value.
        defective_key: where the defective skull goes.
        implant_key: where the implant goes.
        kind: see :class:`RandSkullDefect`.
        size: see :class:`RandSkullDefect`.
        region: see :class:`RandSkullDefect`.
        prob: see :class:`RandSkullDefect`.
        allow_missing_keys: whether a dictionary without the key passes through.

    Raises:
        ValueError: when more than one key is given, or a new key begins with the skull's key and an underscore, which
            MONAI's ``Spacingd`` takes for metadata.

    Examples:
        >>> cut = RandSkullDefectd("skull", region="anywhere").set_random_state(0)
        >>> out = cut({"skull": torch.ones(1, 32, 32, 32)})
        >>> torch.equal(out["defective"] + out["implant"], out["skull"])
        True
    """

    backend = RandSkullDefect.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        defective_key: str = "defective",
        implant_key: str = "implant",
        kind: str | Sequence[str] = KINDS,
        size: tuple[float, float] = (0.10, 0.20),
        region: str = "vault",
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        if len(self.keys) != 1:
            raise ValueError(f"keys must name one complete skull, got {len(self.keys)}: use one transform per skull")
        clash = [k for k in (defective_key, implant_key) if k.startswith(f"{self.keys[0]}_")]
        if clash or defective_key == implant_key:
            raise ValueError(
                f"defective_key and implant_key must differ and not begin with '{self.keys[0]}_' (Spacingd would take"
                f" them for metadata), got {defective_key!r} and {implant_key!r}"
            )
        self.defective_key, self.implant_key = defective_key, implant_key
        self.defect = RandSkullDefect(kind=kind, size=size, region=region, prob=prob)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandSkullDefectd:
        """Set the random state of this transform and of the defect it draws."""
        super().set_random_state(seed, state)
        self.defect.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add a defective skull and its implant.

        Args:
            data: holds a complete binary skull (C, H, W, D) under the key.

        Returns:
            A copy of ``data`` with the two new keys.

        Raises:
            KeyError: when the key is missing and must not be.
            ValueError: see :class:`RandSkullDefect`.
        """
        out = dict(data)
        for key in self.key_iterator(out):
            out[self.defective_key], out[self.implant_key] = self.defect(out[key])
        return out


RandSkullDefectD = RandSkullDefectDict = RandSkullDefectd
