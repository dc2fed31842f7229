"""The subject of a trained nnU-Net model for ``memeff certify``: its own preprocessing, network and export."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from monai_memeff.data import read_volume
from monai_memeff.data.json_object import read_json_object
from monai_memeff.errors import InputError
from monai_memeff.hosts.certify.sources.subject import Options, Subject, file_sha256
from nnunet_plugins.certify.checkpoint import find_checkpoint, load_checkpoint


def nnunet_subject(folder: Path, images: Sequence[Path], options: Options) -> Subject:
    """A fold of a trained model on one case.

    Args:
        folder: with ``plans.json``, ``dataset.json`` and ``fold_*/checkpoint_final.pth``.
        images: one for each channel, in their order.
        options: the fold, and the size of the window.

    Raises:
        InputError: the model cannot be loaded, is 2D or the second of a cascade, or does not take these images.

    Examples:
        >>> from nnunet_plugins.lean.trial import TrialModel, write_image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = TrialModel({"background": 0, "organ": 1}).write(Path(folder, "model"))
        ...     nnunet_subject(model, [write_image(Path(folder, "ct.nii.gz"), (16, 16, 16))], Options()).inputs.shape
        torch.Size([1, 1, 16, 16, 16])
    """
    plans, dataset = PlansManager(read_json_object(folder / "plans.json")), read_json_object(folder / "dataset.json")
    file, others = find_checkpoint(folder, options.fold)
    checkpoint = load_checkpoint(file)
    configuration = plans.get_configuration(checkpoint["init_args"]["configuration"])
    if len(configuration.patch_size) != 3 or configuration.previous_stage_name is not None:
        raise InputError(f"{folder} is 2D or the second stage of a cascade, and certify takes 3D models of one stage")
    channels = determine_num_input_channels(plans, configuration, dataset)
    if len(images) != channels:
        names = ", ".join(map(str, (dataset.get("channel_names") or dataset["modality"]).values()))
        raise InputError(f"{folder} reads {names}, and --image was given {len(images)} times: once for each of them")
    network = _network(checkpoint, plans, configuration, channels, dataset, file)
    case = _Case(plans, configuration, dataset, images)
    mirrored = checkpoint.get("inference_allowed_mirroring_axes") is not None
    return Subject(
        name=f"{plans.dataset_name} {checkpoint['init_args']['configuration']}, {file.parent.name}",
        kind=f"trained nnU-Net model, {checkpoint['trainer_name']}",
        network=network,
        inputs=case.inputs,
        labels=case.labels,
        rule="nnU-Net's own export, on the grid of the image",
        image=read_volume(images[0]).image,
        window=SlidingWindowInferer(
            options.window or tuple(configuration.patch_size), overlap=0.5, mode="gaussian", padding_mode="constant"
        ),
        weights={str(path): file_sha256(path) for path in (file, folder / "plans.json", folder / "dataset.json")},
        classes=_classes(dataset, plans),
        notes=[
            *([f"One fold of {others + 1} is certified; nnU-Net averages the folds it is given."] if others else []),
            *(["Mirroring is left out (nnU-Net: --disable_tta)."] if mirrored else []),
        ],
    )


class _Case:
    """One case: the preprocessed image, and labels on its grid from logits."""

    def __init__(self, plans: Any, configuration: Any, dataset: dict[str, Any], images: Sequence[Path]) -> None:
        self.plans, self.configuration, self.dataset = plans, configuration, dataset
        files = [str(image) for image in images]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                preprocessor = configuration.preprocessor_class(verbose=False)
                data, _, self.properties = preprocessor.run_case(files, None, plans, configuration, dataset)
        except Exception as error:  # of readers and of nnU-Net, of any kind
            text = " ".join(str(error).split())[:200]
            raise InputError(f"nnU-Net cannot read or preprocess {files[0]}: {type(error).__name__}: {text}") from error
        self.inputs = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))[None]

    def labels(self, answer: Any) -> np.ndarray:
        """nnU-Net's segmentation, written as it writes it and read as everybody reads it: (H, W, D)."""
        logits = answer[0].as_subclass(Tensor).float()
        manager = self.plans.get_label_manager(self.dataset)
        threads = torch.get_num_threads()
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans, self.configuration, manager, self.properties, num_threads_torch=threads
        )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"labels{self.dataset['file_ending']}"
            self.plans.image_reader_writer_class().write_seg(found, str(file), self.properties)
            return read_volume(file).image.as_tensor()[0].numpy().astype(np.int32)


def _network(
    checkpoint: dict[str, Any], plans: Any, configuration: Any, channels: int, dataset: dict[str, Any], file: Path
) -> nn.Module:
    name, heads = checkpoint["trainer_name"], plans.get_label_manager(dataset).num_segmentation_heads
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = recursive_find_trainer_class_by_name(name)
            network: nn.Module = trainer.build_network_architecture(
                plans, configuration, channels, heads, enable_deep_supervision=False
            )
    except Exception as error:  # of nnU-Net and of trainers, of any kind
        text = " ".join(str(error).split())[:160]
        raise InputError(f"nnU-Net cannot build the network of {name}: {type(error).__name__}: {text}") from error
    try:
        network.load_state_dict(checkpoint["network_weights"])
    except Exception as error:  # torch says it in many lines
        raise InputError(f"{file} does not fit the network of its plans ({type(network).__name__})") from error
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _classes(dataset: dict[str, Any], plans: Any) -> dict[str, tuple[int, ...]]:
    """Name -> numbers of its voxels, for labels and for regions."""
    ignored = plans.get_label_manager(dataset).ignore_label
    found = {}
    for name, numbers in dataset["labels"].items():
        kept = tuple(int(n) for n in (numbers if isinstance(numbers, list | tuple) else [numbers]))
        if kept not in ((0,), (ignored,)):
            found[name] = kept
    return found
