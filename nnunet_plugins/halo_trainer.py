"""HaloTrainer: the stock network and loss of the user's plan, one patch in parts over processes or over time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from itertools import repeat
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from monai_memeff.halo import GatheredNetwork, HaloMesh, scatter, spatial_partition, unpartition
from nnunet_plugins.lean import switch
from nnunet_plugins.training.halo_groups import as_processes, dice_over_groups, refuse_batch, refuse_batch_norm
from nnunet_plugins.training.halo_loss import cut_like, loss_on_parts, why_gathered
from nnunet_plugins.training.halo_processes import (
    local_device,
    mesh_of_launch,
    share_buffers,
    share_weights,
    shared_batch,
    sum_gradients,
    take_weights_on_the_host,
)
from nnunet_plugins.training.trainer_mixin import TrainerMixin

KEY = "halo_trainer"
"""Key of a configuration in the plans: settings to change beforehand."""
LOWEST = {"segments": 1, "processes_per_patch": 0}
WHOLE = {0: "a number from 0 on", 1: "a positive number"}


class HaloTrainer(TrainerMixin, nnUNetTrainer):
    """``nnUNetv2_train DATASET 3d_fullres 0 -tr HaloTrainer``: stock training of the stock network in less memory.

    Network, loss, deep supervision, augmentation, optimizer and schedule are those of the user's plan; loss and
    gradients are those of stock for the same batch, up to rounding. In one process most activations are computed a
    second time in backward and not kept. Under ``torchrun --nproc_per_node N --no-python nnUNetv2_train ...`` (or
    ``-num_gpus N``) the N processes share every patch, each with a part along the patch's longest axis; the first
    process loads the batches. With ``processes_per_patch`` P they are N / P data-parallel groups: each draws its share
    of the batch as the processes of stock's DDP do, and loss and gradients are those of stock in N / P processes.
    Checkpoints are stock's, under the name of nnU-Net's trainer: stock continues them and predicts with them without
    this package, and the other way round.

    To train larger patches, set ``patch_size`` in the plans.

    - Loss: of derived trainers, too; where it is more than sums over voxels, as top-k, every process gathers the
      logits of its whole patch, and the log says so.
    - Compile: off. Batch size, oversampling, 2D, regions, ignore label, cascade: as in stock.
    - Validation: whole images or tiles as ``MEMEFF_NNUNET`` says, leanly; the cases are dealt out to the processes.

    Attributes:
        segments: Number of pieces of the network whose inputs are kept; the rest is computed again. 1 keeps everything.
            Also ``{"halo_trainer": {"segments": 8}}`` in the configuration of the plans, which goes first.
        processes_per_patch: Number of processes of a launch that share a patch; 0: all. Also in the plans, as segments.

    Raises:
        ValueError: an unknown setting in the plans; processes that ``processes_per_patch`` does not divide, or more
            that share a patch than it has voxels along its longest axis; a batch that cannot be divided among the
            groups; batch norm in several groups.

    Examples:
        >>> class LeanerHaloTrainer(HaloTrainer):  # in a folder of nnUNet_extTrainer, for -tr LeanerHaloTrainer
        ...     segments = 8
    """

    settings_key = KEY
    segments = 4
    processes_per_patch = 0
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
        settings = _settings(manager.configuration.get(KEY, {}))
        self.segments = settings.get("segments", self.segments)
        self.processes_per_patch = settings.get("processes_per_patch", self.processes_per_patch)
        patch = list(manager.patch_size)
        self.mesh: HaloMesh = mesh_of_launch(device, patch.index(max(patch)), self.processes_per_patch)
        if self.mesh.size > max(patch):
            raise ValueError(f"{self.mesh.size} processes cannot share a patch of {patch}: start at most {max(patch)}.")
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:
            self.device = local_device(device)
            if self.device.type != "cuda":
                self.grad_scaler = None
                take_weights_on_the_host()

    @contextlib.contextmanager
    def _seen(self, processes: int) -> Iterator[None]:
        """Let nnU-Net's code see a number of processes: the groups, or one, where DDP's own network is not wanted."""
        self.is_ddp, before = processes > 1, self.is_ddp
        try:
            with as_processes(self.mesh, type(self)) if processes > 1 else contextlib.nullcontext():
                yield
        finally:
            self.is_ddp = before

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return self._seen(1)

    def _set_batch_size_and_oversample(self) -> None:
        """As stock, in as many processes as there are groups."""
        refuse_batch(self.configuration_manager, self.mesh)
        with self._seen(self.mesh.data):
            super()._set_batch_size_and_oversample()

    def _build_loss(self) -> Any:
        with self._seen(self.mesh.data):
            return super()._build_loss()

    def initialize(self) -> None:
        """As stock in one process, with the network in parts; every process starts from the first one's weights."""
        with self._alone():
            super().initialize()
        refuse_batch_norm(self.network, self.mesh)
        share_weights(self.network)
        spatial_partition(self.network, self.mesh, self.segments)
        dims = len(self.configuration_manager.patch_size)
        reason = why_gathered(self.loss, self.label_manager, dims, self.mesh, self.device)
        if reason is not None:
            self.print_to_log_file(f"every process gathers the logits of its whole patch for the loss: {reason}")
        self.loss_on_parts = loss_on_parts(self.loss, self.mesh, gather=reason is not None)

    def _do_i_compile(self) -> bool:
        return False

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """As stock in one process."""
        with self._alone():
            super().set_deep_supervision_enabled(enabled)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Stock's on the first process of a group; the others get its batches."""
        if self.mesh.comm.rank == 0:
            loaders: tuple[Any, Any] = super().get_dataloaders()
            return loaders
        self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # sets what prediction may mirror
        return repeat(None), repeat(None)

    def train_step(self, batch: dict | None) -> dict:
        """A step of stock on this process's part of the batch; gradients meet before they are clipped."""
        shared = shared_batch(batch, self.mesh, self.device)
        share_buffers(self.network, self.mesh)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext():
            output = self.network(scatter(shared["data"], self.mesh))
            with dice_over_groups(self.mesh):
                loss = self.loss_on_parts(output, cut_like(output, shared["target"], self.mesh))
        return self.learn_from(loss, lambda: sum_gradients(self.network.parameters(), self.mesh))

    def validation_step(self, batch: dict | None) -> dict:
        """Stock's, on the gathered outputs."""
        network = self.network
        share_buffers(network, self.mesh)
        self.network = GatheredNetwork(network, self.mesh)
        try:
            with dice_over_groups(self.mesh):
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
        share_buffers(self.network, self.mesh)
        reason = switch.refusal()
        if reason is not None:
            self.print_to_log_file(f"stock prediction in the validation: {reason}")
        try:
            with switch.lean_prediction() if reason is None else contextlib.nullcontext():
                super().perform_actual_validation(save_probabilities)
        finally:
            spatial_partition(self.network, self.mesh, self.segments)


def _settings(settings: dict[str, Any]) -> dict[str, int]:
    """The settings of the plans, of which each must be a whole number from its lowest on."""
    if not isinstance(settings, dict):
        raise ValueError(f"{KEY!r} in the plans must hold settings by name but is {settings!r}.")
    for name, value in settings.items():
        if name not in LOWEST:
            raise ValueError(f"unknown setting {name!r} under {KEY!r} in the plans; known are {', '.join(LOWEST)}.")
        if not isinstance(value, int) or isinstance(value, bool) or value < LOWEST[name]:
            raise ValueError(f"{name} under {KEY!r} in the plans must be {WHOLE[LOWEST[name]]} but is {value!r}.")
    return settings
