"""Points with attributes: what every transform of this module may rely on, and a class for those without one."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from monai.transforms import Transform
from torch import Tensor

from monai_memeff.checks import check_finite

WHOLE_CLOUD = ("grid_size", "ptr")
"""Attributes that belong to the cloud, whatever their length."""


class Data:
    """Points in space with attributes; a small stand-in for torch_geometric's class of the same name.

    Every transform here takes any object with ``pos``: this one, torch_geometric's, or one of your own. A tensor
    attribute whose first axis has one entry per point is an attribute of the points and follows them; others belong to
    the cloud. Set further attributes as on any object: ``data.intensity = ...``.

    Args:
        pos: (N, 3) floating point positions, for medical images in millimeters.
        x: (N, C) or (N,) features.
        y: (N,) labels.
        batch: (N,) integers, which cloud of a batch each point belongs to.

    Nothing is checked here; the transforms refuse a ``pos`` that is not floating point (N, 3) or not finite.

    Examples:
        >>> Data(torch.rand(100, 3), y=torch.zeros(100))
        Data(pos=[100, 3], y=[100])
    """

    def __init__(
        self, pos: Tensor, x: Tensor | None = None, y: Tensor | None = None, batch: Tensor | None = None
    ) -> None:
        self.pos, self.x, self.y, self.batch = pos, x, y, batch

    @property
    def num_nodes(self) -> int:
        """Number of points."""
        return len(self.pos)

    def clone(self) -> Data:
        """A copy with tensors of its own."""
        return copy.deepcopy(self)

    def to(self, device: torch.device | str) -> Data:
        """A copy with all tensors on another device."""
        moved = {name: value.to(device) for name, value in attributes(self).items() if isinstance(value, Tensor)}
        return with_attributes(self, moved)

    def __repr__(self) -> str:
        return f"Data({', '.join(f'{name}={_short(value)}' for name, value in attributes(self).items())})"


class PointTransform(Transform, ABC):
    """A transform of points; a list of clouds gives a list. The input is left as it is."""

    def __call__(self, data: Any) -> Any:
        """Transform one object with ``pos``, or a list of them.

        Raises:
            TypeError: the object has no tensor ``pos``.
            ValueError: ``pos`` is not floating point (N, 3) or not finite, or the object has edges or faces.
        """
        if isinstance(data, list):
            return [self(one) for one in data]
        check_points(data)
        return self._process(data)

    @abstractmethod
    def _process(self, data: Any) -> Any:
        """Transform one cloud; each transform has its own."""


def attributes(data: Any) -> dict[str, Any]:
    """All attributes that are set, by name: from ``to_dict()`` where there is one, else from the object itself."""
    to_dict = getattr(data, "to_dict", None)
    found = to_dict() if callable(to_dict) else vars(data)
    return {name: value for name, value in found.items() if value is not None and not name.startswith("_")}


def point_attributes(data: Any) -> dict[str, Tensor]:
    """The tensors that have one entry per point."""
    count = len(data.pos)
    return {
        name: value
        for name, value in attributes(data).items()
        if isinstance(value, Tensor) and value.ndim and len(value) == count and name not in WHOLE_CLOUD
    }


def with_attributes(data: Any, changes: Mapping[str, Any]) -> Any:
    """A shallow copy of the same type with other attributes.

    ``ptr``, where torch_geometric's batches keep the first row of every cloud, follows a changed ``batch``.
    """
    changed = copy.copy(data)
    for name, value in changes.items():
        setattr(changed, name, value)
    ptr = attributes(changed).get("ptr")
    if isinstance(ptr, Tensor) and "batch" in changes:
        counts = torch.bincount(changes["batch"], minlength=len(ptr) - 1)
        changed.ptr = torch.cat((ptr.new_zeros(1), counts.cumsum(0).to(ptr.dtype)))
    return changed


def select_points(data: Any, rows: Tensor) -> Any:
    """The points with the given rows, (M,) integers or (N,) boolean, with all their attributes."""
    return with_attributes(data, {name: value[rows] for name, value in point_attributes(data).items()})


def batch_of(data: Any) -> Tensor:
    """(N,) int64, which cloud each point belongs to; zeros where the object has no ``batch``."""
    batch = getattr(data, "batch", None)
    if batch is None:
        return torch.zeros(len(data.pos), dtype=torch.int64, device=data.pos.device)
    return batch.reshape(-1).to(torch.int64)


def check_points(data: Any) -> None:
    """Refuse anything but a set of points in space.

    Raises:
        TypeError: the object has no tensor ``pos``.
        ValueError: ``pos`` is not floating point (N, 3) or not finite, or the object has edges or faces.
    """
    pos = getattr(data, "pos", None)
    if not isinstance(pos, Tensor):
        raise TypeError(
            f"points need a tensor pos of shape (N, 3), got {type(data).__name__} with pos of {type(pos).__name__}; "
            "use monai_memeff.sparse.points.Data or any object with pos."
        )
    if pos.ndim != 2 or pos.shape[1] != 3 or not pos.is_floating_point():
        raise ValueError(f"pos must be floating point (N, 3), got {pos.dtype} of {tuple(pos.shape)}; convert it.")
    check_finite(pos, "pos")
    edges = [name for name in attributes(data) if "edge" in name or name == "face"]
    if edges:
        raise ValueError(f"points with edges or faces are not supported, got {', '.join(edges)}; remove them first.")


def _short(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)
