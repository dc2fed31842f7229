"""Any MONAI loss on parts of a volume: its sums and means over voxels become those of the whole volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.run.ranks.comm.exchange import redistribute
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.comm.routes import route
from monai_memeff.halo.run.ranks.first_order import first_order
from monai_memeff.halo.run.ranks.parts import count_once, part_of
from monai_memeff.halo.run.ranks.sums import WholeSums, is_part, tensors_in
from monai_memeff.halo.run.ranks.volume import unmarked_part


class _Scaled(torch.autograd.Function):
    """The same value, with the gradient multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


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

    Examples:
        >>> mesh = init_mesh(spatial=(1,))  # (2,) under torchrun
        >>> prediction, target = scatter(torch.ones(1, 1, 9, 8, 8), mesh), scatter(torch.zeros(1, 1, 9, 8, 8), mesh)
        >>> float(SpatialLoss(torch.nn.MSELoss(), mesh)(prediction, target))
        1.0
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
            NotPartitionableError: if the loss is not a function of sums over voxels and `gather` is False.
        """
        factor = float(self.mesh.size) if self.averaged else 1.0
        if all((part := part_of(t)) is not None and not part.spread for t in tensors_in(prediction)):
            return self.replicated(self.loss(prediction, target), prediction)
        if self.gather:
            prediction, target = (_collect(v, self.mesh) for v in (prediction, target))
            return _Scaled.apply(self.loss(prediction, target), factor)
        given = list(tensors_in((prediction, target)))
        prediction, target = _marked(prediction), _marked(target)
        dims = next(tensors_in(prediction)).dim() - 2
        if dims <= max(self.mesh.axes) or not all(map(_is_volume, given)):
            shape = tuple(next(tensors_in(prediction)).shape)
            raise NotPartitionableError(
                f"SpatialLoss: the prediction or target, of shape {shape} on this rank, is no "
                "volume (B, C, spatial...) that is split behind its channels, so sums over voxels are not told from "
                "others; move the channels there in the network, or take SpatialLoss(..., gather=True)."
            )
        with WholeSums(self.mesh, dims):
            value = self.loss(prediction, target)
        if value.dim() > 0 and is_part(value):
            raise NotPartitionableError("SpatialLoss: the loss returns one value per voxel; give it a reduction.")
        return _Scaled.apply(value, factor)

    def replicated(self, term: torch.Tensor, outputs: Any) -> torch.Tensor:
        """A term of the loss that every rank computes alike from outputs that are the same on every rank.

        Args:
            term: the term, such as the variational part that a network returns beside its segmentation.
            outputs: the network's outputs it is made of (or the term itself, if the network returned it).
        """
        for output in tensors_in(outputs):
            count_once(output)
        return _Scaled.apply(term, 1.0 if self.averaged else 1.0 / self.mesh.size)


def _is_volume(tensor: torch.Tensor) -> bool:
    """Whether the rows of a part lie behind batch and channels, as far as its mark tells."""
    part = part_of(tensor)
    return part is None or all(d >= 2 for d, cut in zip(part.dims, part.cuts, strict=True) if cut is not None)


def _marked(values: Any) -> Any:
    def marked(tensor: torch.Tensor) -> torch.Tensor:
        view = tensor.as_subclass(torch.Tensor).view(tensor.shape)
        view._memeff_loss_part = True
        return view

    return tree_map_only(torch.Tensor, marked, values)


class _Whole(torch.autograd.Function):
    """The whole on every rank; backward keeps this rank's part, because all ranks compute one and the same loss."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mesh: HaloMesh, dims: tuple[int, ...], sizes: Sequence[int], cuts: Any
    ) -> Any:
        wants = [tuple(((0, n),) for n in sizes)] * mesh.size
        found = route(mesh.comm.rank, mesh.spatial, sizes, cuts, wants)
        ctx.dims, ctx.own = dims, found.own
        return redistribute(mesh.comm, x, dims, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for dim, (low, high) in zip(ctx.dims, ctx.own, strict=True):
            gradient = gradient.narrow(dim, low, high - low)
        return gradient.contiguous(), None, None, None, None


def _collect(values: Any, mesh: HaloMesh) -> Any:
    def whole(tensor: torch.Tensor) -> torch.Tensor:
        part = part_of(tensor) or unmarked_part(tensor, mesh)
        rows, dims = part.exposed(tensor.as_subclass(torch.Tensor), mesh.position)
        return _Whole.apply(rows, mesh, dims, part.rows, part.cuts).reshape(part.shape)

    return tree_map_only(torch.Tensor, whole, values)
