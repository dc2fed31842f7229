"""SparseTrainer: nnU-Net with a coarse-to-sparse network and the larger patch that its memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_plugins.sparse_plans import KEY, NETWORK_SETTINGS, edit_plans, why_not_larger
from nnunet_plugins.training.trainer_mixin import TrainerMixin

SETTINGS = ("memory_share", "patch_size", *NETWORK_SETTINGS)


class SparseTrainer(TrainerMixin, nnUNetTrainer):
    """``nnUNetv2_train DATASET 3d_fullres 0 -tr SparseTrainer``: any dataset, 3d_fullres and 3d_lowres.

    The plan's U-Net is replaced by :class:`nnunet_plugins.plans_network.CoarseToSparsePlansUNet`: its first stage, at
    full resolution, is computed on the voxels that are worth it only. The memory this frees goes into the patch, which
    grows by the rule of :func:`nnunet_plugins.sparse_plans.largest_patch`. The plans so edited are saved with the
    results, where nnU-Net's predict, export and import find them; the plans in ``nnUNet_preprocessed`` stay as they
    are, and so does the preprocessed data. Everything else (sampling, augmentation, schedule) is stock.

    The loss is stock's but for one weight. Cross entropy is a mean over the patch, so in a larger patch a voxel counts
    for less, and small organs may not be learned at all. Here it is multiplied by the number of voxels over the stock
    patch's: a voxel counts for as much as in stock.

    Settings are the class attributes below. To change one, derive a class (in a folder of ``nnUNet_extTrainer``), or
    write it into the plans, under ``"sparse_trainer"`` in the configuration, for example
    ``"sparse_trainer": {"max_active": 0.1, "memory_share": 0.5}``; the plans go first.

    - Deep supervision: on, with two outputs: full resolution and the cells, weighted 2/3 and 1/3.
    - Compile: off; the number of active voxels changes with every patch, and each would be compiled anew.
    - DDP: works as in stock; every parameter takes part in every step, also when no voxel is active.
    - Activation checkpointing: on (``use_checkpoint``).
    - Mirroring: as in stock, in training and prediction.
    - Ignore label and region-based labels: work; regions are judged one by one (``sigmoid`` in the plans).
    - 2D configurations are refused.
    - The cascade (3d_cascade_fullres): its plans are edited likewise; a whole training was not tried yet.

    Attributes:
        memory_share: memory a training step may need, as a fraction of what the stock plan's needs.
        patch_size: the patch in voxels, instead of the rule; None follows the rule.
        max_active: largest fraction of the patch's voxels to compute at full resolution.
        certainty: background probability from which a cell is left out.
        dilation: neighbors computed too, in cells.
        num_res_units: convolutions per level and direction, in residual units.
        refine_channels: features per level of the sparse network.
        context_channels: features handed from the dense to the sparse network.
        use_checkpoint: recompute activations in the backward pass instead of keeping them.

    Raises:
        ValueError: a 2D configuration, an unknown setting in the plans, or a network without nnU-Net's own pyramid.

    Examples:
        >>> class HalfMemoryTrainer(SparseTrainer):  # in a folder of nnUNet_extTrainer, for -tr HalfMemoryTrainer
        ...     memory_share = 0.5
    """

    settings_key = KEY
    memory_share: float = 1.0
    patch_size: Sequence[int] | None = None
    max_active: float = 0.06
    certainty: float = 0.95
    dilation: int = 1
    num_res_units: int = 2
    refine_channels: Sequence[int] = (16, 32, 32)
    context_channels: int = 16
    use_checkpoint: bool = True

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which it inspects
    ) -> None:
        edit_plans(plans, configuration, dataset_json, {name: getattr(self, name) for name in SETTINGS})
        super().__init__(plans, configuration, fold, dataset_json, device)
        stock = self.configuration_manager.configuration[KEY]["stock"]["patch_size"]
        patch = self.configuration_manager.patch_size
        name = type(self).__name__
        if list(patch) == list(stock):
            reason = why_not_larger(self.configuration_manager.configuration)
            self.print_to_log_file(f"{name}: patch size {list(patch)}, as in the stock plan: {reason}")
        else:
            self.print_to_log_file(f"{name}: patch size {list(patch)} instead of {list(stock)}")

    def _do_i_compile(self) -> bool:
        return False

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision:
            return None
        return [[1.0, 1.0, 1.0], [1 / step for step in self.configuration_manager.pool_op_kernel_sizes[1]]]

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        stock = self.configuration_manager.configuration[KEY]["stock"]["patch_size"]
        single = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
        single.weight_ce *= math.prod(self.configuration_manager.patch_size) / math.prod(stock)
        if isinstance(loss, DeepSupervisionWrapper):
            loss.weight_factors = (2 / 3, 1 / 3)
        return loss
