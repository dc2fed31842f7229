"""OccupancyTrainer: nnU-Net with an occupancy network, trained on points and queried near boundaries only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from monai_memeff.occupancy import Lookahead, OccupancyLoss, occupancy_optimizer
from monai_memeff.occupancy.engine import draw_batch
from nnunet_plugins.training.trainer_mixin import TrainerMixin

KEY = "occupancy_trainer"
"""Key of a configuration in the plans: settings to change beforehand, and afterwards what was used."""

NETWORK = "nnunet_plugins.occupancy_network.OccupancyPlansNet"
NETWORK_SETTINGS = ("channels", "width", "blocks", "points_per_pass", "inference", "initial")
SETTINGS = (*NETWORK_SETTINGS, "patch_size", "points", "sampling", "coarse_weight", "learning_rate")


class OccupancyTrainer(TrainerMixin, nnUNetTrainer):
    """``nnUNetv2_train DATASET 3d_fullres 0 -tr OccupancyTrainer``: any dataset with exclusive labels, 3D.

    The network is the default :class:`~monai_memeff.occupancy.OccupancyNet`. A training step answers random points of
    each patch, with nnU-Net's own Dice and cross-entropy on them; validation and prediction give dense logits by the
    octree, tile by tile as nnU-Net does. The plans so edited are saved with the results, where predict, export and
    import find them; the plans in ``nnUNet_preprocessed`` and the preprocessed data stay as they are.

    Settings are the class attributes below. To change one, derive a class (in a folder of ``nnUNet_extTrainer``), or
    write it into the plans, under ``"occupancy_trainer"`` in the configuration, for example
    ``"occupancy_trainer": {"points": 32768, "patch_size": [160, 160, 160]}``; the plans go first.

    - Optimizer: Lookahead around RAdam, as in the paper; learning rate by nnU-Net's polynomial schedule.
    - Deep supervision and compile: off. There is one output, and the number of queries changes with every patch.
    - Mirroring, augmentation, patches, oversampling and the ignore label: as in stock.
    - Region-based labels and 2D configurations are refused.
    - DDP and the cascade: not tried.

    Attributes:
        channels: features of the encoder's levels, at strides 4, 8, 16, ...
        width: features in the decoder.
        blocks: residual blocks of the decoder.
        points_per_pass: most points answered at once outside training; memory grows with it, results do not change.
        inference: ``"octree"``, or ``"dense"`` to query every voxel.
        initial: where the octree starts: ``"grid"`` of points, or ``"network"``, its coarse prediction: fewer points,
            but what it misses is lost.
        patch_size: Patch size in voxels, instead of the plan's; None keeps that.
        points: drawn per patch and training step.
        sampling: Sampling of the points, see :class:`~monai_memeff.occupancy.RandOccupancyPoints`.
        coarse_weight: Weight of the auxiliary low-resolution loss.
        learning_rate: at the start.

    Raises:
        ValueError: a 2D configuration, region-based labels, or an unknown setting in the plans.

    Examples:
        >>> class MorePointsTrainer(OccupancyTrainer):  # in a folder of nnUNet_extTrainer, for -tr MorePointsTrainer
        ...     points = 2**15
    """

    settings_key = KEY
    channels: Sequence[int] = (32, 64, 128, 128)
    width: int = 128
    blocks: int = 3
    points_per_pass: int = 2**16
    inference: str = "octree"
    initial: str = "grid"
    patch_size: Sequence[int] | None = None
    points: int = 2**14
    sampling: str | Mapping[str, float] = {"uniform": 0.5, "border": 0.25, "balanced": 0.25}
    coarse_weight: float = 0.1
    learning_rate: float = 1e-3

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which it inspects
    ) -> None:
        settings = edit_plans(plans, configuration, dataset_json, {name: getattr(self, name) for name in SETTINGS})
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = settings
        self.enable_deep_supervision = False
        self.initial_lr = settings["learning_rate"]

    def _do_i_compile(self) -> bool:
        return False

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch: there is one output."""

    def _build_loss(self) -> nn.Module:
        """The stock loss, for dense validation; training takes it for points, with the auxiliary term."""
        stock = super()._build_loss()
        self.loss_of_points = OccupancyLoss(stock, self.settings["coarse_weight"], self.label_manager.ignore_label)
        return stock

    def configure_optimizers(self) -> tuple[Lookahead, PolyLRScheduler]:
        """Lookahead around RAdam, and nnU-Net's schedule."""
        optimizer = occupancy_optimizer(self.network, self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def train_step(self, batch: dict) -> dict:
        """One step on random points of every patch."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        points, values = draw_batch(
            target,
            self.settings["points"],
            self.settings["sampling"],
            ignore_index=self.label_manager.ignore_label,
        )
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
            loss = self.loss_of_points(self.network(data, points), (values, target))
        return self.learn_from(loss)


def edit_plans(plans: dict, configuration: str, dataset_json: dict, defaults: dict[str, Any]) -> dict[str, Any]:
    """Replace the network of one configuration, in place; doing it again changes nothing.

    Args:
        plans: Plans as nnU-Net loads them.
        configuration: a 3D configuration, such as 3d_fullres or 3d_lowres.
        dataset_json: Description of the dataset.
        defaults: value of every setting; the configuration's own under :data:`KEY` go first.

    Returns:
        The settings that hold.

    Raises:
        ValueError: a 2D configuration, region-based labels, or an unknown setting.
    """
    manager = PlansManager(deepcopy(plans))
    resolved = manager.get_configuration(configuration).configuration  # with what it inherits
    if len(resolved["patch_size"]) != 3:
        raise ValueError(
            f"OccupancyTrainer works on volumes, configuration {configuration} has the patch size "
            f"{list(resolved['patch_size'])}: train 3d_fullres or 3d_lowres."
        )
    if manager.get_label_manager(dataset_json).has_regions:
        raise ValueError(
            "OccupancyTrainer needs exclusive labels, the dataset has regions: write them as plain labels."
        )
    chosen = resolved.get(KEY, {})
    unknown = sorted(set(chosen) - set(defaults))
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} under {KEY!r} in the plans; known are {', '.join(defaults)}.")
    settings = {**defaults, **deepcopy(chosen)}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    edited = plans["configurations"][configuration]
    edited["patch_size"] = list(settings["patch_size"] or resolved["patch_size"])
    edited["architecture"] = {
        "network_class_name": NETWORK,
        "arch_kwargs": {name: settings[name] for name in NETWORK_SETTINGS},
        "_kw_requires_import": [],
    }
    edited[KEY] = settings
    return settings
