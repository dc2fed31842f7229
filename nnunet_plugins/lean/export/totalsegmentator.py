"""TotalSegmentator's forms of nnU-Net's export, which it puts into nnU-Net: a class at a time where they do the same.

They have one more argument, which chooses its approximation of the resampling. Then TotalSegmentator's own run.
"""

from __future__ import annotations

from typing import Any

from nnunetv2.configuration import default_num_processes

from nnunet_plugins.lean.export import functions
from nnunet_plugins.lean.stock import TOTALSEGMENTATOR, stock


def convert_predicted_logits_to_segmentation_with_correct_shape(
    predicted_logits: functions.Logits,
    plans_manager: Any,
    configuration_manager: Any,
    label_manager: Any,
    properties_dict: dict,
    return_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
    use_cropped_logits_resampling: bool = False,
) -> Any:
    """The label map on the grid of the image, and the probabilities when they are wanted."""
    name = "convert_predicted_logits_to_segmentation_with_correct_shape"
    managers = (plans_manager, configuration_manager, label_manager, properties_dict)
    settings = (return_probabilities, num_threads_torch)
    if use_cropped_logits_resampling:
        return stock(TOTALSEGMENTATOR, name)(predicted_logits, *managers, *settings, True)
    return functions.convert_predicted_logits_to_segmentation_with_correct_shape(predicted_logits, *managers, *settings)


def export_prediction_from_logits(
    predicted_array_or_file: functions.Logits,
    properties_dict: dict,
    configuration_manager: Any,
    plans_manager: Any,
    dataset_json_dict_or_file: dict | str,
    output_file_truncated: str,
    save_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
    use_cropped_logits_resampling: bool = False,
) -> None:
    """Write the label map, and the probabilities when they are wanted."""
    managers = (properties_dict, configuration_manager, plans_manager, dataset_json_dict_or_file)
    settings = (output_file_truncated, save_probabilities, num_threads_torch)
    if use_cropped_logits_resampling:
        stock(TOTALSEGMENTATOR, "export_prediction_from_logits")(predicted_array_or_file, *managers, *settings, True)
    else:
        functions.export_prediction_from_logits(predicted_array_or_file, *managers, *settings)
