"""Attributes of points as network features: choose them by name, a constant one, positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_network_input
from monai_memeff.sparse.points.data import PointTransform, attributes, with_attributes


class AddOnes(PointTransform):
    """Add the attribute ``ones``, (N, 1) float32 ones: the feature of points that have none.

    Examples:
        >>> AddOnes()(Data(torch.rand(100, 3)))
        Data(pos=[100, 3], ones=[100, 1])
    """

    def _process(self, data: Any) -> Any:
        return with_attributes(data, {"ones": torch.ones(len(data.pos), 1, device=data.pos.device)})


class XYZFeature(PointTransform):
    """Add positions along single axes as the attributes ``pos_x``, ``pos_y``, ``pos_z``, each (N,).

    Args:
        add_x: whether to add ``pos_x``.
        add_y: whether to add ``pos_y``.
        add_z: whether to add ``pos_z``; the only one by default.

    Examples:
        >>> XYZFeature()(Data(torch.rand(100, 3)))
        Data(pos=[100, 3], pos_z=[100])
    """

    def __init__(self, add_x: bool = False, add_y: bool = False, add_z: bool = True) -> None:
        wanted = zip(("pos_x", "pos_y", "pos_z"), range(3), (add_x, add_y, add_z), strict=True)
        self.axes = {name: axis for name, axis, add in wanted if add}

    def _process(self, data: Any) -> Any:
        return with_attributes(data, {name: data.pos[:, axis].clone() for name, axis in self.axes.items()})


class AddFeatsByKeys(PointTransform):
    """Append attributes to the features ``x``, in the given order; ``x`` is created where there is none.

    Args:
        list_add_to_x: for every name, whether to append it.
        feat_names: names of attributes (N,) or (N, C).
        input_nc_feats: for every name, the number of columns it must have; default any.
        stricts: for every name, whether to refuse an attribute that is missing or has other columns; default all.
            Where not, a missing one is passed over and other columns are accepted.
        delete_feats: for every name, whether to remove the attribute afterwards; default none.

    Raises:
        ValueError: no name is given, or the lists differ in length; in the call, an attribute is missing or has other
            columns than it must have, not one row per point, or integers that float32 lacks (beyond 2^24).

    Examples:
        >>> AddFeatsByKeys([True, True], ["pos", "pos_z"])(XYZFeature()(Data(torch.rand(100, 3)))).x.shape
        torch.Size([100, 4])
    """

    @numbers_checked
    def __init__(
        self,
        list_add_to_x: Sequence[bool],
        feat_names: Sequence[str],
        input_nc_feats: Sequence[int | None] | None = None,
        stricts: Sequence[bool] | None = None,
        delete_feats: Sequence[bool] | None = None,
    ) -> None:
        self.names, count = tuple(feat_names), len(feat_names)
        self.add = tuple(list_add_to_x)
        self.columns = tuple(input_nc_feats or (None,) * count)
        self.stricts = tuple(stricts or (True,) * count)
        self.delete = tuple(delete_feats or (False,) * count)
        lengths = {len(self.add), len(self.columns), len(self.stricts), len(self.delete)}
        if count == 0 or lengths != {count}:
            raise ValueError(
                f"AddFeatsByKeys needs at least one name and one entry per name in every list, got {count} names and "
                f"lists of {sorted(lengths)}."
            )

    def _process(self, data: Any) -> Any:
        parts = [] if getattr(data, "x", None) is None else [_as_columns(data.x)]
        for name, add, columns, strict in zip(self.names, self.add, self.columns, self.stricts, strict=True):
            part = self._column_of(data, name, columns, strict) if add else None
            parts += [] if part is None else [part]
        added = with_attributes(data, {"x": torch.cat(parts, dim=1)} if parts else {})
        for name, delete in zip(self.names, self.delete, strict=True):
            if delete and name in attributes(added):
                delattr(added, name)
        return added

    def _column_of(self, data: Any, name: str, columns: int | None, strict: bool) -> Tensor | None:
        found = attributes(data)
        if name not in found:
            if not strict:
                return None
            raise ValueError(
                f"the points have no attribute {name!r}, only {', '.join(found)}; add it, or strict=False."
            )
        part = _as_columns(found[name])
        if len(part) != len(data.pos):
            raise ValueError(
                f"attribute {name!r} has {len(part)} rows for {len(data.pos)} points; it must have as many."
            )
        if strict and columns is not None and part.shape[1] != columns:
            raise ValueError(
                f"attribute {name!r} has {part.shape[1]} columns, input_nc_feats says {columns}; correct it."
            )
        return part


def _as_columns(values: Tensor) -> Tensor:
    values = values if values.is_floating_point() else as_network_input(values, torch.float32, "AddFeatsByKeys")
    return values[:, None] if values.ndim == 1 else values
