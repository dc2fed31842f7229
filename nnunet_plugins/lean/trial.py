"""Stock nnU-Net models with random weights, and images for them: what doctor, tests and benchmarks compare on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


@dataclass
class TrialModel:
    """Describes a model that nnU-Net could have trained.

    Attributes:
        labels: As in dataset.json.
        regions_class_order: As in dataset.json.
        patch: In voxels; two numbers make a 2D configuration.
        spacing: Of the network's grid, in mm, after the transpose.
        folds: Number of folds.
        mirroring: Axes that may be mirrored, None for none.
        transpose: Order of the axes.
        resampling: Settings of ``resample_data_or_seg_to_shape`` for logits.
        features: Of the network's stages; one stage halves nothing.
        resampling_function: nnU-Net's function for logits.
        cascade: The network also sees the labels of a previous stage.
        channels: Names of the image's channels.
        reader: nnU-Net's class for image files.
        file_ending: Of image files.
    """

    labels: dict[str, Any]
    regions_class_order: Sequence[int] | None = None
    patch: Sequence[int] = (16, 16, 16)
    spacing: Sequence[float] = (1.0, 1.0, 1.0)
    folds: int = 1
    mirroring: tuple[int, ...] | None = None
    transpose: Sequence[int] = (0, 1, 2)
    resampling: dict[str, Any] = field(default_factory=lambda: dict(RESAMPLING))
    features: Sequence[int] = (4, 6)
    resampling_function: str = "resample_data_or_seg_to_shape"
    cascade: bool = False
    channels: Sequence[str] = ("CT",)
    reader: str = "NibabelIO"
    file_ending: str = ".nii.gz"

    @property
    def configuration(self) -> str:
        """Its name in nnU-Net."""
        if len(self.patch) == 2:
            return "2d"
        return "3d_cascade_fullres" if self.cascade else "3d_fullres"

    def dataset(self) -> dict[str, Any]:
        """Its dataset.json."""
        channels = {str(number): name for number, name in enumerate(self.channels)}
        described = {
            "channel_names": channels,
            "labels": self.labels,
            "numTraining": 1,
            "file_ending": self.file_ending,
        }
        if self.regions_class_order is not None:
            described["regions_class_order"] = list(self.regions_class_order)
        return described

    def plans(self) -> dict[str, Any]:
        """Its plans.json."""
        axes = len(self.patch)
        stages = len(self.features)
        network = {
            "n_stages": stages,
            "features_per_stage": list(self.features),
            "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": [[3] * axes] * stages,
            "strides": [[1] * axes, *[[2] * axes] * (stages - 1)],
            "n_conv_per_stage": [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        }
        labels = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
        configuration = {
            "data_identifier": "trial",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 1,
            "patch_size": list(self.patch),
            "median_image_size_in_voxels": [float(extent) for extent in self.patch],
            "spacing": list(self.spacing),
            "normalization_schemes": ["ZScoreNormalization"] * len(self.channels),
            "use_mask_for_norm": [False] * len(self.channels),
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": labels,
            "resampling_fn_probabilities": self.resampling_function,
            "resampling_fn_probabilities_kwargs": self.resampling,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": network,
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
            "batch_dice": False,
        }
        if self.cascade:
            configuration["previous_stage"] = "3d_lowres"
        return {
            "dataset_name": "Dataset999_Trial",
            "plans_name": "nnUNetPlans",
            "original_median_spacing_after_transp": [1.0] * 3,
            "original_median_shape_after_transp": [16] * 3,
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose),
            "transpose_backward": [int(axis) for axis in np.argsort(self.transpose)],
            "configurations": {self.configuration: configuration, "3d_lowres": {**configuration, "next_stage": []}},
            "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {str(number): {} for number in range(len(self.channels))},
        }

    def write(self, folder: Path, seed: int = 0) -> Path:
        """Write the folder of a trained model, with random weights; returns it."""
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plans.json").write_text(json.dumps(self.plans()))
        (folder / "dataset.json").write_text(json.dumps(self.dataset()))
        manager = PlansManager(self.plans())
        configuration = manager.get_configuration(self.configuration)
        heads = manager.get_label_manager(self.dataset()).num_segmentation_heads
        channels = determine_num_input_channels(manager, configuration, self.dataset())
        for fold in range(self.folds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + fold)
                network = nnUNetTrainer.build_network_architecture(manager, configuration, channels, heads, False)
            checkpoint = {
                "network_weights": network.state_dict(),
                "trainer_name": "nnUNetTrainer",
                "init_args": {"configuration": self.configuration},
                "inference_allowed_mirroring_axes": self.mirroring,
            }
            (folder / f"fold_{fold}").mkdir(exist_ok=True)
            torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
        return folder


def write_image(
    file: Path, shape: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0), margin: int = 0, seed: int = 0
) -> Path:
    """Write smooth noise as an image.

    Args:
        file: NIfTI file to write.
        shape: In voxels.
        spacing: In mm.
        margin: Voxels of zeros at the lower end of every axis, which nnU-Net crops.
        seed: Of the noise.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 100, [max(1, extent // 4) for extent in shape])
    image = coarse[
        np.ix_(*[np.arange(extent) * len_ // extent for extent, len_ in zip(shape, coarse.shape, strict=True)])
    ]
    image = (image + rng.normal(0, 10, shape)).astype(np.float32)
    for axis in range(len(shape)):
        image[(slice(None),) * axis + (slice(0, margin),)] = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([*spacing, 1.0])), file)
    return file


def predictor_of(folder: Path, **settings: Any) -> Any:
    """nnU-Net's predictor of a model folder, all folds, on the CPU without a progress bar."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    settings = {"device": torch.device("cpu"), "allow_tqdm": False, **settings}
    predictor = nnUNetPredictor(**settings)
    names = sorted(fold.name.removeprefix("fold_") for fold in folder.glob("fold_*"))
    folds = tuple(name if name == "all" else int(name) for name in names)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor
