"""From logits to label maps and files: in the place of nnU-Net's functions of the same names, a class at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from batchgenerators.utilities.file_and_folder_operations import load_json, save_pickle
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.helpers import softmax_helper_dim0
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_plugins.lean.export import output, probabilities
from nnunet_plugins.lean.export.labels import RegionsInOrder, RunningArgmax, label_type, labels_of
from nnunet_plugins.lean.export.npz import CropAndTranspose, save_probabilities_npz
from nnunet_plugins.lean.export.probabilities import ProbabilityFile
from nnunet_plugins.lean.export.resample import class_by_class, function_of, resampled
from nnunet_plugins.lean.predict.logits import class_volumes
from nnunet_plugins.lean.stock import EXPORT, LABELS, stock, unchanged

Logits: TypeAlias = Tensor | np.ndarray

OF_LABELS = (
    "LabelManager.apply_inference_nonlin",
    "LabelManager.convert_logits_to_segmentation",
    "LabelManager.convert_probabilities_to_segmentation",
    "LabelManager.revert_cropping_on_probabilities",
)
"""nnU-Net's methods that are done here a class at a time."""


def convert_predicted_logits_to_segmentation_with_correct_shape(
    predicted_logits: Logits,
    plans_manager: Any,
    configuration_manager: Any,
    label_manager: Any,
    properties_dict: dict,
    return_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
) -> Any:
    """The label map on the grid of the image, and the probabilities when they are wanted (then all in memory)."""
    case = Case(predicted_logits, plans_manager, configuration_manager, label_manager, properties_dict)
    if not case.by_class(return_probabilities, num_threads_torch):
        function = stock(EXPORT, "convert_predicted_logits_to_segmentation_with_correct_shape")
        return function(
            predicted_logits,
            plans_manager,
            configuration_manager,
            label_manager,
            properties_dict,
            return_probabilities,
            num_threads_torch,
        )
    with threads(num_threads_torch):
        if not return_probabilities:
            return case.placed(labels_of(case.volumes(), label_manager))
        file, labels = case.probabilities(num_threads_torch)
    placement = case.placement()
    return case.placed(labels), np.stack([placement(file.read_class(n), n) for n in range(file.classes)])


def export_prediction_from_logits(
    predicted_array_or_file: Logits,
    properties_dict: dict,
    configuration_manager: Any,
    plans_manager: Any,
    dataset_json_dict_or_file: dict | str,
    output_file_truncated: str,
    save_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
) -> None:
    """Write the label map, and the probabilities when they are wanted, under names that appear when complete."""
    dataset = dataset_json_dict_or_file
    if isinstance(dataset, str):
        dataset = load_json(dataset)
    label_manager = plans_manager.get_label_manager(dataset)
    case = Case(predicted_array_or_file, plans_manager, configuration_manager, label_manager, properties_dict)
    with output.complete_files(output_file_truncated, dataset["file_ending"]) as truncated:
        if not case.by_class(save_probabilities, num_threads_torch):
            function = stock(EXPORT, "export_prediction_from_logits")
            common = (properties_dict, configuration_manager, plans_manager, dataset, truncated)
            function(predicted_array_or_file, *common, save_probabilities, num_threads_torch)
            return
        with threads(num_threads_torch):
            if save_probabilities:
                file, labels = case.probabilities(num_threads_torch)
                save_probabilities_npz(truncated + ".npz", file, case.placement())
                del file
                save_pickle(properties_dict, truncated + ".pkl")
            else:
                labels = labels_of(case.volumes(), label_manager)
        writer = plans_manager.image_reader_writer_class()
        writer.write_seg(case.placed(labels), truncated + dataset["file_ending"], properties_dict)


def resample_and_save(
    predicted: Logits,
    target_shape: list[int],
    output_file: str,
    plans_manager: Any,
    configuration_manager: Any,
    properties_dict: dict,
    dataset_json_dict_or_file: dict | str,
    num_threads_torch: int = default_num_processes,
    dataset_class: Any = None,
) -> None:
    """Write the label map on the grid of a cascade's next stage."""
    dataset = dataset_json_dict_or_file
    if isinstance(dataset, str):
        dataset = load_json(dataset)
    label_manager = plans_manager.get_label_manager(dataset)
    case = Case(predicted, plans_manager, configuration_manager, label_manager, properties_dict)
    case.shape, case.new_spacing = tuple(target_shape), case.spacing
    with output.complete_files(output_file) as truncated:
        function = stock(EXPORT, "resample_and_save")
        settings = (plans_manager, configuration_manager, properties_dict, dataset, num_threads_torch, dataset_class)
        if not case.by_class(False, num_threads_torch):
            function(predicted, target_shape, truncated, *settings)
            return
        with threads(num_threads_torch):
            labels = labels_of(case.volumes(), label_manager)
        save_next_stage(labels, truncated, configuration_manager, dataset_class)


def save_next_stage(labels: np.ndarray, truncated: str, configuration_manager: Any, dataset_class: Any) -> None:
    """Write labels as training data of the next stage, in nnU-Net's format for them."""
    if dataset_class is not None and dataset_class is not nnUNetDatasetBlosc2:
        dataset_class.save_seg(labels, truncated)
        return
    block, chunk = comp_blosc2_params(
        (1, *labels.shape), tuple(configuration_manager.patch_size), bytes_per_pixel=labels.dtype.itemsize
    )
    sizes = {"chunks_seg": [int(i) for i in chunk[1:]], "blocks_seg": [int(i) for i in block[1:]]}
    nnUNetDatasetBlosc2.save_seg(labels, truncated, **sizes)


class Case:
    """One image's logits, and what nnU-Net's plans say about the return to its grid."""

    def __init__(self, logits: Logits, plans: Any, configuration: Any, label_manager: Any, properties: dict) -> None:
        self.logits, self.plans, self.properties, self.label_manager = logits, plans, properties, label_manager
        self.function = function_of(configuration)
        self.shape = tuple(int(e) for e in properties["shape_after_cropping_and_before_resampling"])
        self.new_spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
        three = len(configuration.spacing) == len(self.shape)
        self.spacing = configuration.spacing if three else [self.new_spacing[0], *configuration.spacing]

    def by_class(self, with_probabilities: bool, threads: int) -> bool:
        """Whether nnU-Net's result can be had a class at a time; else its own functions do the case."""
        manager, half = self.label_manager, str(self.logits.dtype).endswith("float16")
        nonlin = torch.sigmoid if manager.has_regions else softmax_helper_dim0
        known = type(manager) is LabelManager and manager.inference_nonlin is nonlin and unchanged(LABELS, *OF_LABELS)
        fits = self.logits.ndim == 4 and len(self.logits) == manager.num_segmentation_heads
        if not (half and known and fits and class_by_class(self.function)):
            return False
        return not with_probabilities or probabilities.reproduces(manager.has_regions, threads)

    def volumes(self) -> Iterator[np.ndarray]:
        """Logits (1, X, Y, Z) on the grid of the cropped image, class after class."""
        for number in range(len(self.logits)):
            volume = class_volumes(self.logits, number, number + 1)
            yield resampled(volume, self.shape, self.spacing, self.new_spacing, self.function)

    def probabilities(self, threads: int) -> tuple[ProbabilityFile, np.ndarray]:
        """Probabilities on disk, and the labels that nnU-Net takes from them."""
        file = None
        for number, volume in enumerate(self.volumes()):
            file = file or ProbabilityFile(len(self.logits), volume.shape[1:])
            file.write_class(number, volume[0])
        assert file is not None
        probabilities.apply(file, self.label_manager, threads)
        dtype = label_type(self.label_manager)
        labeler: RunningArgmax | RegionsInOrder = RunningArgmax(file.shape, dtype)
        if self.label_manager.has_regions:
            order = self.label_manager.regions_class_order
            labeler = RegionsInOrder(file.shape, dtype, order, lambda probability: probability)
        for number in range(file.classes):
            labeler.add(number, file.read_class(number))
        return file, labeler.labels

    def placed(self, labels: np.ndarray) -> np.ndarray:
        """Labels in the whole image and in the order of its axes."""
        whole = np.zeros(self.properties["shape_before_cropping"], dtype=label_type(self.label_manager))
        whole = insert_crop_into_image(whole, labels, self.properties["bbox_used_for_cropping"])
        return whole.transpose(self.plans.transpose_backward)

    def placement(self) -> CropAndTranspose:
        """How probabilities come into the whole image."""
        shape, box = self.properties["shape_before_cropping"], self.properties["bbox_used_for_cropping"]
        return CropAndTranspose(shape, box, self.plans.transpose_backward, not self.label_manager.has_regions)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
