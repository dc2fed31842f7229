"""Pieces for MONAI's training engines: batches of active voxels become sparse tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor

from monai_memeff.sparse.core.tensor import SparseTensor


class PrepareBatchSparse(PrepareBatch):
    """Make sparse tensors of a batch from :class:`SparseCollate`, for ``prepare_batch`` of MONAI's trainers.

    A call returns ``(inputs, target, (), {})``: the input as a :class:`SparseTensor`, the target as one, as a dense
    label, or None. With ``pass_target`` the last is ``{"target": target}``: the network is called with the target too,
    as :class:`SparseCompletionNet` needs in training.

    Args:
        coords_key: key of the coordinates (N, 4).
        features_key: key of the features (N, C).
        target_coords_key: key of the target's coordinates; None: the target is ``batchdata[label_key]`` as it is.
        target_features_key: key of the target's features.
        extent_key: key of the grid (B, 3).
        label_key: key of a dense label, used when ``target_coords_key`` is None and left out when the batch lacks it.
        pass_target: whether the network takes the target too, as the argument ``target``.

    Examples:
        >>> sample = SparseCoordinatesd("image", drop=True)({"image": torch.eye(4)[None, None]})
        >>> inputs, *_ = PrepareBatchSparse(target_coords_key=None)(sparse_collate([sample, sample]))
        >>> inputs.batch_size, inputs.features.shape
        (2, torch.Size([8, 1]))
    """

    def __init__(
        self,
        coords_key: str = "coords",
        features_key: str = "features",
        target_coords_key: str | None = "target_coords",
        target_features_key: str = "target_features",
        extent_key: str = "extent",
        label_key: str = "label",
        pass_target: bool = True,
    ) -> None:
        self.inputs = (coords_key, features_key)
        self.target = None if target_coords_key is None else (target_coords_key, target_features_key)
        self.extent_key = extent_key
        self.label_key = label_key
        self.pass_target = pass_target

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[SparseTensor, SparseTensor | Tensor | None, tuple[Any, ...], dict[str, Any]]:
        """Build the sparse tensors on ``device``.

        Raises:
            ValueError: the volumes of the batch have different extents.
            KeyError: the batch lacks a key.
        """
        extents = batchdata[self.extent_key]
        if not bool((extents == extents[0]).all()):
            raise ValueError(f"volumes of a batch must share one grid, got {extents.tolist()}; crop or pad them first.")
        shape = extents[0].tolist()
        inputs = _build(batchdata, self.inputs, shape, len(extents), device, non_blocking)
        target: SparseTensor | Tensor | None
        if self.target is None:
            label = batchdata.get(self.label_key)
            target = None if label is None else label.to(device=device, non_blocking=non_blocking)
        else:
            target = _build(batchdata, self.target, shape, len(extents), device, non_blocking)
        return inputs, target, (), {"target": target} if self.pass_target else {}


def _build(
    batchdata: dict[str, Any],
    keys: tuple[str, str],
    shape: Sequence[int],
    batch_size: int,
    device: str | torch.device | None,
    non_blocking: bool,
) -> SparseTensor:
    coordinates, features = (batchdata[key].to(device=device, non_blocking=non_blocking) for key in keys)
    return SparseTensor(features, coordinates, shape, batch_size=batch_size)
