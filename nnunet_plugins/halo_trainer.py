"""HaloTrainer: the stock network and loss of the user's plan, one patch in parts over processes or over time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from itertools import repeat
from typing import Any

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from monai_memeff.halo import GatheredNetwork, HaloMesh, SpatialLoss, scatter, spatial_partition, unpartition
from monai_memeff.halo.run.ranks.parts import part_of
from nnunet_plugins.lean import switch
from nnunet_plugins.training.halo_processes import (
    local_device,
    mesh_of_launch,
    share_weights,
    shared_batch,
    sum_gradients,
)
from nnunet_plugins.training.trainer_mixin import TrainerMixin

KEY = "halo_trainer"
"""Key of a configuration in the plans: settings to change beforehand."""


class HaloTrainer(TrainerMixin, nnUNetTrainer):
    """``nnUNetv2_train DATASET 3d_fullres 0 -tr HaloTrainer``: stock training of the stock network in less memory.

    Network, loss, deep supervision, augmentation, optimizer and schedule are those of the user's plan; loss and
    gradients are those of stock for the same batch, up to rounding. In one process most activations are computed a
    second time in backward and not kept. Under ``torchrun --nproc_per_node N --no-python nnUNetv2_train ...`` (or
    ``-num_gpus N``) the N processes share every patch, each with a part along the patch's longest axis; the first
    process loads the batches. Checkpoints are stock's, under the name of nnU-Net's trainer: stock continues them
    and predicts with them without this package, and the other way round.

    To train larger patches, set ``patch_size`` in the plans. All processes share one patch: data-parallel groups of
    such processes are not offered.

    - Compile: off. Batch size, oversampling, 2D, regions, ignore label, cascade: as in stock.
    - Validation: whole images or tiles as ``MEMEFF_NNUNET`` says, leanly; the cases are dealt out to the processes.

    Attributes:
        segments: Number of pieces of the network whose inputs are kept; the rest is computed again. 1 keeps everything.
            Also ``{"halo_trainer": {"segments": 8}}`` in the configuration of the plans, which goes first.

    Raises:
        ValueError: an unknown setting in the plans, or more processes than the patch has voxels along its longest axis.

    Examples:
        >>> class LeanerHaloTrainer(HaloTrainer):  # in a folder of nnUNet_extTrainer, for -tr LeanerHaloTrainer
        ...     segments = 8
    """

    settings_key = KEY
    segments = 4
    network: Any
    grad_scaler: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which it inspects
    ) -> None:
        manager = PlansManager(deepcopy(plans)).get_configuration(configuration)
        self.segments = _segments(manager.configuration.get(KEY, {}), self.segments)
        patch = list(manager.patch_size)
        self.mesh: HaloMesh = mesh_of_launch(device, patch.index(max(patch)))
        if self.mesh.size > max(patch):
            raise ValueError(f"{self.mesh.size} processes cannot share a patch of {patch}: start at most {max(patch)}.")
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            self.device = local_device(device)
            self.grad_scaler = self.grad_scaler if self.device.type == "cuda" else None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let nnU-Net's code see one process: neither DDP nor its split of the batch is wanted."""
        self.is_ddp, before = False, self.is_ddp
        try:
            yield
        finally:
            self.is_ddp = before

    def initialize(self) -> None:
        """As stock in one process, with the network in parts; every process starts from the first one's weights."""
        with self._alone():
            super().initialize()
        share_weights(self.network, self.mesh)
        spatial_partition(self.network, self.mesh, self.segments)
        self.spatial_loss = _spatial(self.loss, self.mesh)

    def _do_i_compile(self) -> bool:
        return False

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As stock in one process."""
        with self._alone():
            super().set_deep_supervision_enabled(enabled)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Stock's on the first process; the others get its batches."""
        if self.mesh.comm.rank == 0:
            loaders: tuple[Any, Any] = super().get_dataloaders()
            return loaders
        self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # sets what prediction may mirror
        return repeat(None), repeat(None)

    def train_step(self, batch: dict | None) -> dict:
        """A step of stock on this process's part of the batch; gradients are summed before they are clipped."""
        shared = shared_batch(batch, self.mesh, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext():
            output = self.network(scatter(shared["data"], self.mesh))
            loss = self.spatial_loss(output, _cut_like(output, shared["target"], self.mesh))
        return self.learn_from(loss, lambda: sum_gradients(self.network.parameters(), self.mesh))

    def validation_step(self, batch: dict | None) -> dict:
        """Stock's, on the gathered outputs."""
        network = self.network
        self.network = GatheredNetwork(network, self.mesh)
        try:
            result: dict = super().validation_step(shared_batch(batch, self.mesh, self.device))
        finally:
            self.network = network
        return result

    def save_checkpoint(self, filename: str) -> None:
        """Write stock's checkpoint, under the name of stock's trainer unless a derived class builds another network."""
        own = type(self)
        if own.build_network_architecture is not nnUNetTrainer.build_network_architecture:
            with self._alone():
                super().save_checkpoint(filename)
            return
        self.__class__ = type(nnUNetTrainer.__name__, (own,), {})  # nnU-Net writes the name of the class
        try:
            with self._alone():
                nnUNetTrainer.save_checkpoint(self, filename)
        finally:
            self.__class__ = own

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Continue from a checkpoint of this trainer or of stock's."""
        if not self.was_initialized:
            self.initialize()
        with self._alone():
            super().load_checkpoint(filename_or_checkpoint)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Stock's with lean prediction, or whole volumes when ``MEMEFF_NNUNET=whole``; the network runs undivided."""
        unpartition(self.network)
        reason = switch.refusal()
        if reason is not None:
            self.print_to_log_file(f"stock prediction in the validation: {reason}")
        try:
            with switch.lean_prediction() if reason is None else contextlib.nullcontext():
                super().perform_actual_validation(save_probabilities)
        finally:
            spatial_partition(self.network, self.mesh, self.segments)


def _segments(settings: dict[str, Any], default: int) -> int:
    unknown = sorted(set(settings) - {"segments"})
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} under {KEY!r} in the plans; known is segments.")
    segments = settings.get("segments", default)
    if not isinstance(segments, int) or segments < 1:
        raise ValueError(f"segments under {KEY!r} in the plans must be a positive number but is {segments!r}.")
    return segments


def _spatial(loss: nn.Module, mesh: HaloMesh) -> nn.Module:
    """The loss on parts; each output of deep supervision has its own."""
    if isinstance(loss, DeepSupervisionWrapper):
        return DeepSupervisionWrapper(SpatialLoss(loss.loss, mesh, averaged=False), loss.weight_factors)
    return SpatialLoss(loss, mesh, averaged=False)


def _cut_like(outputs: Any, targets: Any, mesh: HaloMesh) -> Any:
    """This process's part of each target (B, C, spatial...), cut where the output of its size is cut."""
    if isinstance(outputs, (list, tuple)):
        return [_cut_like(output, target, mesh) for output, target in zip(outputs, targets, strict=True)]
    part = part_of(outputs)
    result: Tensor = targets
    if part is None:
        return result
    for dim, bounds, here in zip(part.dims, part.cuts, mesh.position, strict=True):
        if bounds is not None:
            result = result.narrow(dim, bounds[here], bounds[here + 1] - bounds[here])
    return result
