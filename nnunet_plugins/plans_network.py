"""CoarseToSparseUNet as nnU-Net builds networks from plans: with the stock trainer, or from SparseTrainer's plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_memeff.sparse.networks.coarse_to_sparse import CoarseToSparseUNet
from nnunet_plugins.networks import mark_class_layers

ACTIVATION = ("leakyrelu", {"negative_slope": 0.01, "inplace": True})  # nnU-Net's
NORM = ("instance", {"affine": True, "eps": 1e-5})


class CoarseToSparsePlansUNet(CoarseToSparseUNet):
    """nnU-Net's pyramid with a sparse first stage: the first down-sampling makes the cells of CoarseToSparseUNet.

    Stage 0 of the plan (full resolution) is the sparse network; the stages below are the dense one. So a stock plan
    keeps its ``strides`` and ``features_per_stage``, and a patch of many more voxels fits into the same memory.

    The output is a list of logits at full resolution and at that of the cells while ``deep_supervision`` is on (the
    stock trainer's loss then weighs them 1 : 0.5, when there are four stages or more), else the logits alone. It is
    never compiled: the number of active voxels changes with every patch, which would compile it anew each time.

    Args:
        input_channels: modalities (and labels of the previous stage of a cascade).
        num_classes: segmentation heads: labels without the ignore label, or regions.
        strides: Strides of every stage as in the plan, the first one 1.
        features_per_stage: Features of the dense network, from the cells down, one per stage.
        num_res_units: convolutions per level and direction, in residual units; 0 is one plain convolution.
        refine_channels: see :class:`~monai_memeff.sparse.CoarseToSparseUNet`, also for what follows.
        context_channels: features handed from the dense to the sparse network.
        max_active: largest fraction of the patch's voxels to compute at full resolution.
        certainty: background probability from which a cell is left out.
        dilation: neighbors computed too, in cells.
        sigmoid: regions (overlapping labels) instead of exclusive labels.
        use_checkpoint: recompute instead of keep.
        deep_supervision: set by nnU-Net.

    Raises:
        ValueError: fewer than two stages, a first stride other than 1, or lists of different length.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        num_res_units: int = 2,
        refine_channels: Sequence[int] = (16, 32, 32),
        context_channels: int = 16,
        max_active: float = 0.06,
        certainty: float = 0.95,
        dilation: int = 1,
        sigmoid: bool = False,
        use_checkpoint: bool = True,
        deep_supervision: bool = True,
    ) -> None:
        stages = [tuple(stride) for stride in strides]
        if len(stages) < 2 or stages[0] != (1, 1, 1) or len(stages) != len(features_per_stage):
            raise ValueError(
                "strides must name two or more 3D stages, the first one [1, 1, 1], and features_per_stage one number "
                f"for each; got {[list(stage) for stage in stages]} and {list(features_per_stage)}."
            )
        options: dict[str, Any] = {
            "channels": tuple(features_per_stage),
            "strides": ((1, 1, 1), *stages[2:]),
            "num_res_units": num_res_units,
            "act": ACTIVATION,
            "norm": NORM,
            "coarse_factor": stages[1],
            "refine_channels": tuple(refine_channels),
            "refine_strides": ((1, 1, 1), stages[1]),
            "context_channels": context_channels,
            "max_active": max_active,
            "certainty": certainty,
            "dilation": dilation,
            "sigmoid": sigmoid,
            "deep_supervision": deep_supervision,
            "use_checkpoint": use_checkpoint,
        }
        super().__init__(3, input_channels, num_classes, **options)
        mark_class_layers(self, lambda: CoarseToSparseUNet(3, input_channels, num_classes + 1, **options))

    @property
    def decoder(self) -> CoarseToSparsePlansUNet:
        """The module whose ``deep_supervision`` nnU-Net switches: this one."""
        return self

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of a patch, (B, C, H, W, D) -> (B, K, H, W, D), or both logits (see the class)."""
        logits, coarse_logits = self.both_logits(x)
        return [logits, coarse_logits] if self.deep_supervision else logits
