"""The sum of the folds' logits as nnU-Net takes it, made in the file that holds them."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.configuration import default_num_processes
from torch import Tensor
from torch._dynamo import OptimizedModule

from nnunet_plugins.lean.predict.logits import LogitsFile, StoredLogits
from nnunet_plugins.lean.predict.previous_stage import WithPreviousStage
from nnunet_plugins.lean.predict.sliding import (
    check_image,
    has_stock_window,
    predict_sliding_window_return_logits,
    stream,
)
from nnunet_plugins.networks import unwrapped

METHOD = "predict_sliding_window_return_logits"


@torch.inference_mode()
def predict_logits_from_preprocessed_data(self: Any, data: Any) -> Tensor | None:
    """The mean logits (C, X, Y, Z) over the folds, on disk; in the place of nnU-Net's method of this name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(default_num_processes, threads))
    try:
        return _mean(self, data)
    finally:
        torch.set_num_threads(threads)


def _mean(predictor: Any, data: Any) -> Tensor | None:
    if not by_tiles(predictor):
        return _mean_of_others(predictor, data.whole() if isinstance(data, WithPreviousStage) else data)
    folds = predictor.list_of_parameters
    if folds is not None and len(folds) == 0:
        return None  # as nnU-Net does, whose callers then fail
    check_image(data)
    logits = LogitsFile((predictor.label_manager.num_segmentation_heads, *data.shape[1:]))
    for number, parameters in enumerate(folds):
        _load(predictor, parameters)
        stream(predictor, data, FoldSink(logits, number, len(folds)))
    return logits.tensor()


def _mean_of_others(predictor: Any, data: Tensor) -> Tensor:
    """The mean of what another method than ours predicts: in its own type, on disk if that is half precision."""
    folds = predictor.list_of_parameters
    mean: Any = None
    for number, parameters in enumerate(folds):
        _load(predictor, parameters)
        whole = predictor.predict_sliding_window_return_logits(data).to("cpu")
        if mean is None:
            mean = on_disk(whole)
        elif isinstance(mean, StoredLogits) and whole.shape == mean.shape and whole.dtype == torch.half:
            sink = FoldSink(mean.file, number, len(folds))
            for row in range(whole.shape[1]):
                sink(row, 0, whole[:, row])
        else:
            mean += whole
            if number == len(folds) - 1:
                mean /= len(folds)
    return mean


def on_disk(whole: Tensor) -> Tensor:
    """The same logits in a scratch file; in memory if they are not (C, X, Y, Z) in half precision."""
    if isinstance(whole, StoredLogits) or whole.dtype != torch.half or whole.ndim != 4:
        return whole
    logits = LogitsFile(whole.shape)
    for row in range(whole.shape[1]):
        logits.write(row, 0, whole[:, row])
    return logits.tensor()


class FoldSink:
    """Adds the logits of a fold to those of the folds before it, and divides by their number after the last."""

    def __init__(self, logits: LogitsFile, number: int, folds: int) -> None:
        self.logits, self.number, self.folds = logits, number, folds

    def __call__(self, row: int, first_class: int, planes: Tensor) -> None:
        """Take planes (classes, Y, Z) of a row."""
        if self.number:
            sums = self.logits.read(row, first_class, len(planes))
            sums += planes
            planes = sums
            if self.number == self.folds - 1:
                planes /= self.folds
        self.logits.write(row, first_class, planes.to(torch.half))


def by_tiles(predictor: Any) -> bool:
    """Whether this predictor runs our sliding window: neither it, nor its class, nor its network has an own way."""
    method = getattr(predictor, METHOD)
    method = getattr(method, "__func__", method)
    if getattr(method, "whole_volume", False) and not hasattr(unwrapped(predictor.network), "predict_volume"):
        method = method.__wrapped__
    return method is predict_sliding_window_return_logits and has_stock_window(predictor)


def _load(predictor: Any, parameters: dict) -> None:
    network = predictor.network
    (network._orig_mod if isinstance(network, OptimizedModule) else network).load_state_dict(parameters)
