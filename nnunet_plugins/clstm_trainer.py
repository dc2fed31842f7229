"""CLSTMTrainer: nnU-Net on whole volumes, with a 2D U-Net in a convolutional LSTM over slices."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_plugins.training import whole_volume
from nnunet_plugins.training.trainer_mixin import TrainerMixin

KEY = "clstm_trainer"
"""Key of a configuration in the plans: settings to change beforehand, and afterwards what was used."""

NETWORK = "nnunet_plugins.clstm_network.CLSTMPlansUNet"

SETTINGS = ("channels", "hidden_channels", "bidirectional", "checkpoint", "recompute", "offload_to_cpu", "norm")

whole_volume.install()


class CLSTMTrainer(TrainerMixin, nnUNetTrainer):
    """``nnUNetv2_train DATASET 3d_fullres 0 -tr CLSTMTrainer``: one whole image per iteration, any dataset.

    No patches and no stitching: every training and validation iteration sees one preprocessed image as a whole,
    whatever its shape, and so does prediction. The network is :class:`nnunet_plugins.clstm_network.CLSTMPlansUNet`;
    its memory hardly grows with the number of slices. Loss, optimizer and schedule are stock; so is the augmentation,
    but for rotations within 10 degrees as published (van de Leemput et al. 2018, section 3) and no mirroring, because
    the network walks in one direction. The edited plans are saved with the results, where predict, export and import
    find them; those in ``nnUNet_preprocessed`` stay as they are.

    Settings are the class attributes below. To change one, derive a class, or write it into the plans, under
    ``"clstm_trainer"`` in the configuration; the plans go first.

    - Deep supervision: off, there is one output. Compile: off.
    - Batch size: 1; with DDP each process takes a volume of its own.
    - Patch size: not used. A U-Net level is a halving within the slice, so nothing need be divisible.
    - Ignore label, regions and the cascade's input: as in stock. 2D configurations are refused.

    Attributes:
        channels: Features of the U-Net's levels, full resolution first; the published ones have 31 million parameters.
        hidden_channels: Number of channels of the states.
        bidirectional: also from the last slice to the first.
        checkpoint: "slice", "sqrt", or slices per checkpoint.
        recompute: Fraction of the U-Net that the backward pass may repeat; less keeps more.
        offload_to_cpu: keep the states of a training step in host memory, and the outputs that ``recompute`` keeps;
            image and logits are where nnU-Net puts them, on the device.
        norm: Norm of the U-Net; None or a list as in MONAI, such as ["instance", {"affine": true}] or "batch".

    Raises:
        ValueError: a 2D configuration, or an unknown setting in the plans.

    Examples:
        >>> class SmallCLSTMTrainer(CLSTMTrainer):  # in a folder of nnUNet_extTrainer, for -tr SmallCLSTMTrainer
        ...     channels = (32, 64, 128, 256)
    """

    settings_key = KEY
    channels = (64, 128, 256, 512, 1024)
    hidden_channels = 8
    bidirectional = False
    checkpoint: Any = "slice"
    recompute = 1.0
    offload_to_cpu = False
    norm: Any = ("instance", {"affine": True, "eps": 1e-5})

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's own signature, which it inspects
    ) -> None:
        edit_plans(plans, configuration, {name: getattr(self, name) for name in SETTINGS})
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False

    def _do_i_compile(self) -> bool:
        return False

    def _set_batch_size_and_oversample(self) -> None:
        self.batch_size = 1  # per process

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is one output."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:  # noqa: N802 - nnU-Net's name
        """Rotations within 10 degrees, no mirroring, and no larger patch: there are no patches."""
        self.inference_allowed_mirroring_axes = None
        angle = 10 / 180 * np.pi
        return (-angle, angle), False, self.configuration_manager.patch_size, None

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Loaders of whole volumes."""
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        rotation, dummy, _, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        regions = self.label_manager.foreground_regions if self.label_manager.has_regions else None
        common = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": regions,
            "ignore_label": self.label_manager.ignore_label,
        }
        masked = self.configuration_manager.use_mask_for_norm
        train = partial(
            self.get_training_transforms,
            rotation_for_DA=rotation,
            deep_supervision_scales=None,
            mirror_axes=mirror_axes,
            do_dummy_2d_data_aug=dummy,
            use_mask_for_norm=masked,
            **common,
        )
        validation = self.get_validation_transforms(None, **common)
        datasets = self.get_tr_and_val_datasets()
        loaders = [
            WholeVolumeLoader(data, 1, (1, 1, 1), (1, 1, 1), self.label_manager, transforms=transforms)
            for data, transforms in zip(datasets, (train, validation), strict=True)
        ]
        for_training, for_validation = (self._in_background(loader) for loader in loaders)
        next(for_training), next(for_validation)  # as in stock: workers fail here, not in the first epoch
        return for_training, for_validation

    def _in_background(self, loader: nnUNetDataLoader) -> Any:
        workers = get_allowed_n_proc_DA()
        if workers == 0:
            return SingleThreadedAugmenter(loader, None)
        workers = min(workers, 4)  # each holds whole volumes
        return NonDetMultiThreadedAugmenter(
            loader, None, workers, num_cached=workers, pin_memory=self.device.type == "cuda", wait_time=0.002
        )


class WholeVolumeLoader(nnUNetDataLoader):
    """One whole preprocessed image per batch, whatever its shape.

    ``transforms`` is a transform for images of any shape, or a function that makes one for a shape.
    """

    def generate_train_batch(self) -> dict[str, Any]:
        """Load, augment, and add the batch axis."""
        (key,) = self.get_indices()
        data, labels, previous, _ = self._data.load_case(key)
        image = torch.from_numpy(np.array(data[:], dtype=np.float32))
        target = torch.from_numpy(np.array(labels[:], dtype=np.int16))
        if previous is not None:
            target = torch.cat((target, torch.from_numpy(np.array(previous[:], dtype=np.int16))[None]))
        transform = self.transforms
        if isinstance(transform, partial):
            transform = transform(tuple(image.shape[1:]))
        with torch.no_grad():
            sample = transform(image=image, segmentation=target)
        return {"data": sample["image"][None], "target": sample["segmentation"][None], "keys": [key]}


def edit_plans(plans: dict, configuration: str, defaults: dict[str, Any]) -> None:
    """Replace the network of one configuration, in place; doing it again changes nothing.

    Args:
        plans: Plans as nnU-Net loads them.
        configuration: a 3D configuration, such as 3d_fullres or 3d_lowres.
        defaults: value of every setting; the configuration's own under :data:`KEY` go first.

    Raises:
        ValueError: a 2D configuration or an unknown setting.
    """
    resolved = PlansManager(deepcopy(plans)).get_configuration(configuration).configuration  # with what it inherits
    edited = plans["configurations"][configuration]
    if len(resolved["patch_size"]) != 3:
        raise ValueError(
            f"CLSTMTrainer works on volumes, configuration {configuration} has the patch size "
            f"{list(resolved['patch_size'])}: train 3d_fullres or 3d_lowres."
        )
    chosen = deepcopy(resolved.get(KEY, {}))
    unknown = sorted(set(chosen) - set(defaults))
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} under {KEY!r} in the plans; known are {', '.join(defaults)}.")
    used = {name: list(value) if isinstance(value, tuple) else value for name, value in {**defaults, **chosen}.items()}
    edited[KEY] = used
    edited["batch_size"] = 1
    edited["architecture"] = {"network_class_name": NETWORK, "arch_kwargs": deepcopy(used), "_kw_requires_import": []}
