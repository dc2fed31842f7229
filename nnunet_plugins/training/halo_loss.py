"""HaloTrainer's loss on parts of a patch: sums that all processes complete, or the gathered patch for other losses."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from monai_memeff.halo import HaloMesh, NotPartitionableError, SpatialLoss
from monai_memeff.halo.run.ranks.comm.mesh import single_rank_mesh
from monai_memeff.halo.run.ranks.parts import part_of
from nnunet_plugins.training.halo_groups import dice_over_groups


def loss_on_parts(loss: nn.Module, mesh: HaloMesh, gather: bool) -> nn.Module:
    """The loss on parts; each output of deep supervision has its own."""
    if isinstance(loss, DeepSupervisionWrapper):
        return DeepSupervisionWrapper(loss_on_parts(loss.loss, mesh, gather), loss.weight_factors)
    return (_Gathering if gather else SpatialLoss)(loss, mesh, averaged=False, gather=gather)


class _Gathering(SpatialLoss):
    def forward(self, prediction: Any, target: Tensor) -> Tensor:
        """The loss of gathered patches; labels travel in a type that NCCL sends."""
        return super().forward(prediction, target.int() if target.dtype == torch.int16 else target)


def why_gathered(loss: nn.Module, labels: Any, dims: int, mesh: HaloMesh, device: torch.device) -> str | None:
    """Say why a loss needs whole patches; None when it is made of sums over voxels, as nnU-Net's own.

    Args:
        loss: Of nnU-Net or of a derived trainer.
        labels: nnU-Net's label manager.
        dims: Number of spatial axes.
        mesh: Of the processes, which all call this.
        device: Where the loss is tried, on a few voxels.
    """
    output = torch.zeros(2, labels.num_segmentation_heads, *[4] * dims, device=device)
    target = torch.zeros(2, 1, *[4] * dims, dtype=torch.int16, device=device)
    if labels.has_regions:
        regions = len(labels.foreground_regions) + labels.has_ignore_label
        target = target.bool().expand(-1, regions, *[-1] * dims).contiguous()
    inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    try:
        with dice_over_groups(mesh):
            SpatialLoss(inner, single_rank_mesh(), averaged=False)(output, target)
    except NotPartitionableError as error:
        return str(error).split(";")[0]
    return None


def cut_like(outputs: Any, targets: Any, mesh: HaloMesh) -> Any:
    """This process's part of each target (B, C, spatial...), cut where the output of its size is cut."""
    if isinstance(outputs, (list, tuple)):
        return [cut_like(output, target, mesh) for output, target in zip(outputs, targets, strict=True)]
    part = part_of(outputs)
    result: Tensor = targets
    if part is None:
        return result
    for dim, bounds, here in zip(part.dims, part.cuts, mesh.position, strict=True):
        if bounds is not None:
            result = result.narrow(dim, bounds[here], bounds[here + 1] - bounds[here])
    return result
