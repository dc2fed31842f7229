"""Prediction of many cases: in the place of nnU-Net's loops, with the others written when one fails."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from importlib import import_module
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_plugins.lean.cases.failures import FailedCase, Failures, PredictionError, case_name, one_line
from nnunet_plugins.lean.cases.preprocessing import Cases, cases
from nnunet_plugins.lean.cases.workers import Job, Workers
from nnunet_plugins.lean.predict.folds import predict_logits_from_preprocessed_data
from nnunet_plugins.lean.stock import PREDICTOR, stock


def predict_from_data_iterator(
    self: Any,
    data_iterator: Any,
    save_probabilities: bool = False,
    num_processes_segmentation_export: int = default_num_processes,
) -> list[Any]:
    """Predict what the iterator yields, and export it beside; in the place of nnU-Net's method of this name.

    Returns:
        None for every written case, its labels (and probabilities) for every other.

    Raises:
        PredictionError: after all cases, when some failed.
    """
    results: list[Any] = []
    failures = Failures()
    with Workers(num_processes_segmentation_export, "export") as workers:
        exports = Exports(workers, results, failures)
        for case in _lazily(self, data_iterator):
            failures.total += 1
            if isinstance(case, FailedCase):
                failures.add(case["ofile"], case.reason)
                continue
            try:
                data = _loaded(case)
                title = case_name(case["ofile"]) if case["ofile"] else f"image of shape {tuple(data.shape)}"
                print(f"\nPredicting {title}:")
                logits = self.predict_logits_from_preprocessed_data(data).cpu().detach().numpy()
            except Exception as error:
                failures.add(case["ofile"], error)
                continue
            exports.add(case["ofile"], _export_job(self, logits, case, save_probabilities))
            del logits
            print(f"done with {title}")
        exports.finish()
    if isinstance(data_iterator, MultiThreadedAugmenter):
        data_iterator._finish()
    compute_gaussian.cache_clear()
    empty_cache(self.device)
    failures.check()
    return results


class Exports:
    """Exports under way: at most one per process and one more, so that few logits wait on the disk."""

    def __init__(self, workers: Workers, results: list[Any], failures: Failures) -> None:
        self.workers, self.results, self.failures = workers, results, failures
        self.waiting: deque[tuple[str | None, Job, Future[Any] | None]] = deque()

    def add(self, name: str | None, job: Job) -> None:
        """Start an export."""
        self.waiting.append((name, job, self.workers.submit(job)))
        while len(self.waiting) > self.workers.count:
            self._collect()

    def finish(self) -> None:
        """Wait for all."""
        while self.waiting:
            self._collect()

    def _collect(self) -> None:
        name, job, future = self.waiting.popleft()
        result = self.workers.result(job, future)
        if isinstance(result, BaseException):
            self.failures.add(name, result)
        else:
            self.results.append(result)


def _lazily(predictor: Any, data_iterator: Any) -> Any:
    """The cases in the form that needs least memory, if it is our method that gets them."""
    method = predictor.predict_logits_from_preprocessed_data
    own = getattr(method, "__func__", method) is predict_logits_from_preprocessed_data
    return data_iterator.lazily if own and isinstance(data_iterator, Cases) else data_iterator


def _loaded(case: dict) -> Any:
    data = case["data"]
    if isinstance(data, str):
        file, data = data, torch.from_numpy(np.load(data))
        os.remove(file)
    return data


def _export_job(predictor: Any, logits: Any, case: dict, probabilities: bool) -> Job:
    properties, plans, configuration = case["data_properties"], predictor.plans_manager, predictor.configuration_manager
    module = import_module(PREDICTOR)  # has ours, or what somebody else put there
    if case["ofile"] is not None:
        arguments = (logits, properties, configuration, plans, predictor.dataset_json, case["ofile"], probabilities)
        return module.export_prediction_from_logits, arguments
    function = module.convert_predicted_logits_to_segmentation_with_correct_shape
    return function, (logits, plans, configuration, predictor.label_manager, properties, probabilities)


def predict_from_files_sequential(
    self: Any,
    list_of_lists_or_source_folder: Any,
    output_folder_or_list_of_truncated_output_files: Any,
    save_probabilities: bool = False,
    overwrite: bool = True,
    folder_with_segs_from_prev_stage: str | None = None,
) -> list[Any] | None:
    """Predict case after case in this process; in the place of nnU-Net's method of this name.

    Raises:
        PredictionError: after all cases, when some failed.
    """
    arguments = deepcopy({name: value for name, value in locals().items() if name != "self"})
    folder = _output_folder(output_folder_or_list_of_truncated_output_files)
    if folder is not None:
        recursive_fix_for_json_export(arguments)
        save_json(arguments, os.path.join(folder, "predict_from_raw_data_args.json"))
        save_json(self.dataset_json, os.path.join(folder, "dataset.json"), sort_keys=False)
        save_json(self.plans_manager.plans, os.path.join(folder, "plans.json"), sort_keys=False)
    if self.configuration_manager.previous_stage_name is not None:
        assert folder_with_segs_from_prev_stage is not None, (
            f"The requested configuration is a cascaded network. It requires the segmentations of the previous stage "
            f"({self.configuration_manager.previous_stage_name}) as input. Please provide the folder where they are "
            "located via folder_with_segs_from_prev_stage"
        )
    listed = self._manage_input_and_output_lists(
        list_of_lists_or_source_folder,
        output_folder_or_list_of_truncated_output_files,
        folder_with_segs_from_prev_stage,
        overwrite,
        0,
        1,
        save_probabilities,
    )
    files, outputs, previous = listed
    if not files:
        return None
    managers = (self.plans_manager, self.dataset_json, self.configuration_manager)
    iterator = Cases(cases(files, previous, outputs, *managers, 0, self.verbose))
    return [
        result for result in predict_from_data_iterator(self, iterator, save_probabilities, 0) if result is not None
    ]


def _output_folder(outputs: Any) -> str | None:
    """Where records go; as in nnU-Net nowhere for what is neither a string nor a list, and the labels are returned."""
    if isinstance(outputs, list):
        return os.path.dirname(outputs[0]) or os.path.curdir
    return outputs if isinstance(outputs, str) else None


def predict_entry_point() -> None:
    """Run ``nnUNetv2_predict``; failed cases and folders without use end in one line and status 1."""
    _one_line(stock(PREDICTOR, "predict_entry_point"))


def predict_entry_point_modelfolder() -> None:
    """Run ``nnUNetv2_predict_from_modelfolder``; failed cases and folders without use end in one line and status 1."""
    _one_line(stock(PREDICTOR, "predict_entry_point_modelfolder"))


def _one_line(entry: Callable[[], None]) -> None:
    try:
        entry()
    except PredictionError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:  # a folder or file that cannot be used
        raise SystemExit(one_line(error)) from None
