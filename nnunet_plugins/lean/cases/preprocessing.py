"""Preprocessing of images before prediction, where one that cannot be read does not stop the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nnunet_plugins.lean.cases.failures import FailedCase, one_line
from nnunet_plugins.lean.cases.images import lean_configuration
from nnunet_plugins.lean.cases.workers import Workers
from nnunet_plugins.lean.predict.previous_stage import WithPreviousStage


def preprocess(
    files: list[str], previous: str | None, plans: Any, configuration: Any, dataset: dict, verbose: bool
) -> tuple[Any, dict]:
    """Image (C, X, Y, Z) and properties of a case, by nnU-Net's preprocessor; runs in a worker process."""
    preprocessor = configuration.preprocessor_class(verbose=verbose)
    chosen = lean_configuration(configuration) if previous is None else configuration
    image, labels, properties = preprocessor.run_case(files, previous, plans, chosen, dataset)
    data = torch.from_numpy(image).to(dtype=torch.float32, memory_format=torch.contiguous_format)
    if previous is None:
        return data, properties
    known = plans.get_label_manager(dataset).foreground_labels
    return WithPreviousStage(data, torch.from_numpy(labels[0]), known), properties


def cases(
    files: list[list[str]],
    previous: list[str | None] | None,
    outputs: list[str] | None,
    plans: Any,
    dataset: dict,
    configuration: Any,
    processes: int,
    verbose: bool,
) -> Iterator[dict]:
    """Yield cases as nnU-Net's iterator does, in order; a case that fails is a :class:`FailedCase`.

    Args:
        files: Per case.
        previous: Labels of the previous stage of a cascade, per case.
        outputs: Names without file ending, per case.
        plans: nnU-Net's PlansManager.
        dataset: dataset.json.
        configuration: nnU-Net's ConfigurationManager.
        processes: Number of workers, 0 to work in this process.
        verbose: Passed to the preprocessor.
    """
    befores: list[str | None] = previous or [None for _ in files]
    names: list[str | None] = list(outputs) if outputs else [None for _ in files]
    common = (plans, configuration, dataset, verbose)
    with Workers(min(processes, len(files)), "preprocessing") as workers:
        jobs = ((preprocess, (case, before, *common)) for case, before in zip(files, befores, strict=True))
        for name, result in zip(names, workers.in_order(jobs), strict=True):
            if isinstance(result, BaseException):
                yield FailedCase(name, one_line(result))
            else:
                yield {"data": result[0], "data_properties": result[1], "ofile": name}


def _internal_get_data_iterator_from_lists_of_filenames(
    self: Any,
    input_list_of_lists: Any,
    seg_from_prev_stage_files: Any,
    output_filenames_truncated: Any,
    num_processes: int,
) -> Iterator[dict]:
    """Yield preprocessed cases; in the place of nnU-Net's method of this name."""
    managers = (self.plans_manager, self.dataset_json, self.configuration_manager)
    inputs = (input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated)
    return cases(*inputs, *managers, num_processes, self.verbose_preprocessing)
