"""Transforms that turn a dense volume into active voxels, and the collate function that batches them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import list_data_collate
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple
from torch import Tensor

from monai_memeff.arguments import check_number, numbers_checked
from monai_memeff.checks import as_network_input, check_finite
from monai_memeff.sparse.core.activity import active_voxels


class SparseCoordinates(Transform):
    """List the active voxels of a volume.

    Args:
        threshold: a voxel is active where any channel is larger than this value; None: where any channel differs from
            ``background``.
        background: the value of inactive voxels, used when ``threshold`` is None.
        constant: give every active voxel this one feature instead of the intensities; 1.0 for binary structures.

    Raises:
        ValueError: an argument is NaN or infinite.

    Examples:
        >>> coordinates, features = SparseCoordinates()(torch.eye(4)[None, None])
        >>> coordinates.shape, features.shape
        (torch.Size([4, 3]), torch.Size([4, 1]))
    """

    backend = [TransformBackends.TORCH]

    @numbers_checked
    def __init__(self, threshold: float | None = None, background: float = 0.0, constant: float | None = None) -> None:
        for name, value in (("threshold", threshold), ("background", background), ("constant", constant)):
            if value is not None:
                check_number(name, value)
        self.threshold = threshold
        self.background = background
        self.constant = constant

    def __call__(self, img: NdarrayOrTensor) -> tuple[Tensor, Tensor]:
        """List the active voxels.

        Args:
            img: (C, H, W, D), finite.

        Returns:
            Coordinates (N, 3) int64 [i, j, k] in lexicographic order, and features (N, C) floating point, or (N, 1)
            with ``constant``.

        Raises:
            ValueError: the volume is not (C, H, W, D), holds NaN or infinity, or integers beyond 2^24.
            TypeError: ``img`` is not a tensor or an array.
        """
        volume = convert_to_tensor(img, track_meta=False)
        if not isinstance(volume, Tensor):
            raise TypeError(f"SparseCoordinates takes a tensor or an array, got {type(img).__name__}; load it first.")
        if volume.ndim != 4:
            raise ValueError(f"SparseCoordinates takes (C, H, W, D), got {tuple(volume.shape)}; add a channel first.")
        check_finite(volume, "SparseCoordinates")
        active = active_voxels(volume[None], self.threshold, self.background)[0, 0]
        features = volume[:, active].t().contiguous()
        if self.constant is not None:
            dtype = features.dtype if features.is_floating_point() else torch.float32
            features = features.new_full((len(features), 1), self.constant, dtype=dtype)
        elif not features.is_floating_point():
            features = as_network_input(features, torch.float32, "SparseCoordinates")
        return active.nonzero(), features


class SparseCoordinatesd(MapTransform):
    """Dictionary version of :class:`SparseCoordinates`: writes new keys and leaves the volume as it is.

    Place it last: the new keys do not follow later spatial transforms.

    Args:
        keys: volumes (C, H, W, D).
        coords_key: where coordinates go, one name per key. MONAI's ``Spacingd`` treats names that start with a volume's
            key and an underscore as metadata; such names are refused.
        features_key: where features go, one name per key.
        extent_key: where (H, W, D) goes, as an int64 tensor of three; one name, the volumes share a grid.
        threshold: see :class:`SparseCoordinates`.
        background: see :class:`SparseCoordinates`.
        constant: see :class:`SparseCoordinates`.
        drop: remove the dense volumes, so that only active voxels travel to the device.
        allow_missing_keys: pass over volumes that are not there.

    Raises:
        ValueError: the numbers of names differ, a name would be taken for metadata, or the grids differ.

    Examples:
        >>> transform = SparseCoordinatesd("image", coords_key="coords", features_key="features")
        >>> transform({"image": torch.eye(4)[None, None]})["coords"].shape
        torch.Size([4, 3])
    """

    backend = SparseCoordinates.backend

    @numbers_checked
    def __init__(
        self,
        keys: KeysCollection,
        coords_key: str | Sequence[str] = "coords",
        features_key: str | Sequence[str] = "features",
        extent_key: str = "extent",
        threshold: float | None = None,
        background: float = 0.0,
        constant: float | None = None,
        drop: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.coords_keys = ensure_tuple(coords_key)
        self.features_keys = ensure_tuple(features_key)
        self.extent_key = extent_key
        self.drop = drop
        self.list_voxels = SparseCoordinates(threshold, background, constant)
        self._check_names()

    def _check_names(self) -> None:
        if not len(self.keys) == len(self.coords_keys) == len(self.features_keys):
            raise ValueError(
                f"SparseCoordinatesd needs one coords_key and one features_key per key, got {len(self.coords_keys)} "
                f"and {len(self.features_keys)} for {len(self.keys)} keys."
            )
        for key in self.keys:
            for name in (*self.coords_keys, *self.features_keys, self.extent_key):
                if name.startswith(f"{key}_"):
                    raise ValueError(
                        f"{name!r} starts with {key!r} and '_', which MONAI takes for metadata; rename it."
                    )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add coordinates, features and extent of every key to a copy of ``data``."""
        result = dict(data)
        names = zip(self.coords_keys, self.features_keys, strict=True)
        for key, (coords_key, features_key) in self.key_iterator(result, list(names)):
            extent = torch.tensor(tuple(result[key].shape[1:]))
            known = result.setdefault(self.extent_key, extent)
            if not torch.equal(known, extent):
                raise ValueError(f"volumes must share one grid, got {known.tolist()} and {extent.tolist()} ({key}).")
            result[coords_key], result[features_key] = self.list_voxels(result[key])
        if self.drop:
            for key in self.keys:
                result.pop(key, None)
        return result


SparseCoordinatesD = SparseCoordinatesDict = SparseCoordinatesd


class SparseCollate:
    """Batch samples whose volumes have different numbers of active voxels.

    Coordinates (N, 3) become (sum of N, 4) with the batch index first, features (N, C) become (sum of N, C), everything
    else goes through MONAI's ``list_data_collate``: the extents (3,) become (B, 3).

    Args:
        coords_keys: keys that hold coordinates; a key that any sample lacks is left out of the batch.
        features_keys: keys that hold features; left out likewise.

    Examples:
        >>> samples = [SparseCoordinatesd("image", drop=True)({"image": torch.eye(4)[None, None]}) for _ in range(2)]
        >>> SparseCollate()(samples)["coords"].shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        coords_keys: str | Sequence[str] = ("coords", "target_coords"),
        features_keys: str | Sequence[str] = ("features", "target_features"),
    ) -> None:
        self.coords_keys = ensure_tuple(coords_keys)
        self.features_keys = ensure_tuple(features_keys)

    def __call__(self, batch: Sequence[Any]) -> dict[Hashable, Any]:
        """Collate a list of samples, or of lists of samples as MONAI's crop transforms give."""
        samples = [s for entry in batch for s in (entry if isinstance(entry, list) else [entry])]
        ragged = {*self.coords_keys, *self.features_keys}
        collated = list_data_collate([{k: v for k, v in s.items() if k not in ragged} for s in samples])
        for keys, join in ((self.coords_keys, _with_batch_index), (self.features_keys, torch.cat)):
            collated.update(self._joined(samples, keys, join))
        return collated

    @staticmethod
    def _joined(
        samples: list[dict[Hashable, Any]], keys: Sequence[str], join: Callable[[list[Tensor]], Tensor]
    ) -> dict[Hashable, Tensor]:
        return {key: join([s[key] for s in samples]) for key in keys if all(key in s for s in samples)}


def _with_batch_index(coordinates: list[Tensor]) -> Tensor:
    rows = [torch.nn.functional.pad(c, (1, 0), value=number) for number, c in enumerate(coordinates)]
    return torch.cat(rows)


def sparse_collate(batch: Sequence[Any]) -> dict[Hashable, Any]:
    """:class:`SparseCollate` with its default keys, for ``collate_fn`` in a configuration.

    Examples:
        >>> samples = [SparseCoordinatesd("image", drop=True)({"image": torch.eye(4)[None, None]}) for _ in range(2)]
        >>> sparse_collate(samples)["extent"].shape
        torch.Size([2, 3])
    """
    return SparseCollate()(batch)
