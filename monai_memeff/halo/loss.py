"""Any MONAI loss on parts of a volume: its sums and means over voxels become those of the whole volume."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from monai_memeff.halo.arithmetic import rank_at
from monai_memeff.halo.exchange import sum_loss
from monai_memeff.halo.guard import PER_CHANNEL, QUESTIONS, VOXELWISE, name_of, tensors_in
from monai_memeff.halo.mesh import HaloMesh
from monai_memeff.halo.region import NotPartitionable
from monai_memeff.halo.volume import gather as gather_parts

_ELEMENTWISE_LOSSES = frozenset(
    {
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "smooth_l1_loss",
        "huber_loss", "soft_margin_loss",
    }
)  # fmt: skip
_CLASS_LOSSES = frozenset({"cross_entropy", "nll_loss"})
_SHAPES = frozenset({"squeeze", "unsqueeze", "scatter", "gather", "getitem", "expand_as", "reshape_as", "view_as"})


class _Scaled(torch.autograd.Function):
    """The same value, with the gradient multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class _WholeSums(TorchFunctionMode):
    """Follows tensors that are parts of the volume through the loss and completes their sums."""

    def __init__(self, mesh: HaloMesh, spatial_dims: int) -> None:
        super().__init__()
        self._mesh, self._n = mesh, spatial_dims
        self._axes = [a - spatial_dims for a in mesh.axes]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        parts = [t for t in tensors_in((args, kwargs)) if getattr(t, "_halo_part", False)]
        if name in QUESTIONS or not parts:
            return func(*args, **kwargs)
        if name in ("sum", "mean", "nansum"):
            return self._reduce(func, name, args, kwargs)
        if name == "linalg_vector_norm":
            return self._norm(*args, **kwargs)
        if name in _ELEMENTWISE_LOSSES or name in _CLASS_LOSSES:
            return self._loss(func, name, args, kwargs)
        if name not in VOXELWISE and name not in PER_CHANNEL and name not in _SHAPES and name != "one_hot":
            raise NotPartitionable(
                f"SpatialLoss: the loss calls '{name}' on parts of the volume, which is not a sum over voxels; "
                f"use SpatialLoss(..., gather=True)."
            )
        return self._followed(func(*args, **kwargs), parts[0])

    def _followed(self, out: Any, part: torch.Tensor) -> Any:
        space = part.shape[-self._n :]
        for t in tensors_in(out):
            if t.dim() >= self._n and t.shape[-self._n :] == space:
                t._halo_part = True
            elif t.dim() >= self._n and any(t.shape[a] == part.shape[a] for a in self._axes):
                raise NotPartitionable("SpatialLoss: the loss moves or removes spatial axes; use gather=True.")
        return out

    def _reduce(self, func: Any, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        x = args[0] if args else kwargs["input"]
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        dims = range(x.dim()) if dims is None or dims == [] or dims == () else dims
        chosen = {d - x.dim() if d >= 0 else d for d in ([dims] if isinstance(dims, int) else dims)}
        inside = [a in chosen for a in self._axes]
        y = func(*args, **kwargs)
        if not any(inside):
            return self._followed(y, x)
        if not all(inside):
            raise NotPartitionable("SpatialLoss: the loss sums over some split axes only; use gather=True.")
        if name == "mean":
            rows = math.prod(x.shape[a] for a in self._axes)
            y = y * (rows / self._total(rows, y))
        return sum_loss(self._mesh.comm, y)

    def _norm(self, x: torch.Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
        if ord not in (1, 2):
            raise NotPartitionable(f"SpatialLoss: the loss takes a norm of order {ord}; use gather=True.")
        powers = x.abs() if ord == 1 else x.square()
        powers._halo_part = True
        total = self._reduce(torch.sum, "sum", (powers,), {"dim": dim, "keepdim": keepdim})
        return total if ord == 1 else total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()

    def _total(self, count: float, like: torch.Tensor) -> float:
        counted = torch.tensor([float(count)], dtype=torch.float64, device=like.device)
        return float(self._mesh.comm.all_reduce(counted))

    def _loss(self, func: Any, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        """torch's own losses: sum here, divide by the whole's weight."""
        reduction = kwargs.get("reduction", "mean")
        if len(args) > (3 if name in _CLASS_LOSSES else 2) or reduction not in ("mean", "sum", "none"):
            raise NotPartitionable(f"SpatialLoss: '{name}' must get its options by keyword; use gather=True.")
        if reduction == "none":
            return self._followed(func(*args, **kwargs), args[0])
        y = sum_loss(self._mesh.comm, func(*args, **{**kwargs, "reduction": "sum"}))
        if reduction == "sum":
            return y
        x, target = args[0], args[1] if len(args) > 1 else kwargs["target"]
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        count = _class_weight(x, target, weight, kwargs) if name in _CLASS_LOSSES else float(x.numel())
        return y / self._total(count, y)


def _class_weight(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, options: Any) -> float:
    """What cross entropy divides by: the number of voxels, or the weights of their classes."""
    if target.is_floating_point():
        return target.numel() / x.shape[1]
    valid = target[target != options.get("ignore_index", -100)]
    return float(valid.numel() if weight is None else weight[valid].sum())


class SpatialLoss(nn.Module):
    """A loss over the whole volume, computed on parts of it.

    Sums and means over voxels inside the loss (Dice intersections, cross entropy, focal means) are completed over the
    spatial ranks, so the value is that of the whole volume on every rank and gradients are right for uneven parts.

    Args:
        loss: any loss called as `loss(prediction, target)`.
        mesh: where the parts live.
        averaged: gradients are averaged over all ranks afterwards (DDP, FSDP2), so they are multiplied by the number
            of parts here; False if they are summed over the spatial ranks.
        gather: give up on memory and collect the whole prediction on every rank: right for any loss.
    """

    def __init__(self, loss: nn.Module, mesh: HaloMesh, averaged: bool = True, gather: bool = False) -> None:
        super().__init__()
        self.loss, self.mesh, self.averaged, self.gather = loss, mesh, averaged, gather

    def forward(self, prediction: Any, target: torch.Tensor) -> torch.Tensor:
        """Loss of the whole volume.

        Args:
            prediction: this rank's part (B, C, spatial...), or a list of them (deep supervision).
            target: this rank's part of the target, (B, 1 or C, spatial...).

        Raises:
            NotPartitionable: if the loss is not a function of sums over voxels and `gather` is False.
        """
        factor = float(self.mesh.size) if self.averaged else 1.0
        if self.gather:
            prediction, target = (_collect(v, self.mesh) for v in (prediction, target))
            return _Scaled.apply(self.loss(prediction, target), factor)
        prediction, target = _marked(prediction), _marked(target)
        dims = self.mesh.spatial_dims or next(iter(tensors_in(prediction))).dim() - 2
        with _WholeSums(self.mesh, dims):
            value = self.loss(prediction, target)
        if value.dim() > 0 and getattr(value, "_halo_part", False):
            raise NotPartitionable("SpatialLoss: the loss returns one value per voxel; give it a reduction.")
        return _Scaled.apply(value, factor)


def _marked(values: Any) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_marked(v) for v in values)
    view = values.as_subclass(torch.Tensor).view(values.shape)
    view._halo_part = True
    return view


class _Collect(torch.autograd.Function):
    """The whole on every rank; backward keeps this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: HaloMesh) -> torch.Tensor:
        mine = torch.tensor(x.shape, device=x.device)
        ctx.shapes = [s.tolist() for s in mesh.comm.all_gather(mine)]
        ctx.mesh = mesh
        return gather_parts(x, mesh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        mesh = ctx.mesh
        offset_dims = gradient.dim() - (mesh.spatial_dims or gradient.dim() - 2)
        for i, (axis, here) in enumerate(zip(mesh.axes, mesh.position, strict=True)):
            rows = []
            for p in range(mesh.spatial[i]):
                position = (*mesh.position[:i], p, *mesh.position[i + 1 :])
                rows.append(ctx.shapes[rank_at(position, mesh.spatial)][offset_dims + axis])
            gradient = gradient.narrow(offset_dims + axis, sum(rows[:here]), rows[here])
        return gradient.contiguous(), None


def _collect(values: Any, mesh: HaloMesh) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_collect(v, mesh) for v in values)
    return _Collect.apply(values.as_subclass(torch.Tensor), mesh)
