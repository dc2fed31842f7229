"""Preprocessing of images before prediction, where one that cannot be read does not stop the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nnunet_plugins.lean.cases.failures import FailedCase, one_line
from nnunet_plugins.lean.cases.images import lean_configuration
from nnunet_plugins.lean.cases.workers import Workers
from nnunet_plugins.lean.predict.previous_stage import WithPreviousStage
from nnunet_plugins.lean.stock import ITERATORS, PREDICTOR, stock_method, unchanged


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


class Cases(Iterator[dict]):
    """Preprocessed cases, each with a whole tensor of its channels, as nnU-Net's iterator yields them.

    Attributes:
        lazily: The same cases; those of a cascade are :class:`WithPreviousStage`, for who can predict them so.
    """

    def __init__(self, lazily: Iterator[dict]) -> None:
        self.lazily = lazily

    def __next__(self) -> dict:
        case = next(self.lazily)
        data = None if isinstance(case, FailedCase) else case["data"]
        return {**case, "data": data.whole()} if isinstance(data, WithPreviousStage) else case


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

    Raises:
        ValueError: some cases have no output file, or no segmentation of the previous stage.
    """
    befores = _for_each(files, previous, "segmentations of the previous stage")
    names = _for_each(files, outputs, "output files")
    common = (plans, configuration, dataset, verbose)
    with Workers(min(processes, len(files)), "preprocessing") as workers:
        jobs = ((preprocess, (case, before, *common)) for case, before in zip(files, befores, strict=True))
        for name, result in zip(names, workers.in_order(jobs), strict=True):
            if isinstance(result, BaseException):
                yield FailedCase(name, one_line(result))
            else:
                yield {"data": result[0], "data_properties": result[1], "ofile": name}


def _for_each(files: list[list[str]], values: Sequence[str | None] | None, what: str) -> list[str | None]:
    """A value for every case, None when there are none; as in stock those that are left over do not matter."""
    if not values:
        return [None for _ in files]
    if len(values) < len(files):
        raise ValueError(f"{len(files)} cases need as many {what}, got {len(values)}.")
    return list(values[: len(files)])


def _internal_get_data_iterator_from_lists_of_filenames(
    self: Any,
    input_list_of_lists: Any,
    seg_from_prev_stage_files: Any,
    output_filenames_truncated: Any,
    num_processes: int,
) -> Iterator[dict]:
    """Yield preprocessed cases; in the place of nnU-Net's method of this name."""
    own = unchanged(ITERATORS, "preprocessing_iterator_fromfiles", here=PREDICTOR)
    if not (own and unchanged(ITERATORS, "preprocess_fromfiles_save_to_queue")):
        stocks: Iterator[dict] = stock_method("_internal_get_data_iterator_from_lists_of_filenames")(
            self, input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, num_processes
        )
        return stocks
    managers = (self.plans_manager, self.dataset_json, self.configuration_manager)
    inputs = (input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated)
    return Cases(cases(*inputs, *managers, num_processes, self.verbose_preprocessing))
