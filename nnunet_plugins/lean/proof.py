"""The proof on this machine: a small model predicted by stock nnU-Net and our way, and the voxels that differ."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from nnunet_plugins.lean.switch import chosen, lean_prediction, stock_prediction
from nnunet_plugins.lean.trial import TrialModel, predictor_of

SHAPE, SPACING = (18, 24, 21), (2.0, 0.9, 1.1)


def differing_voxels() -> tuple[int, int]:
    """Predict an image of noise both ways; for whole volumes stock nnU-Net is given one tile that is the whole image.

    Returns:
        Number of voxels whose labels differ, and number of all voxels.
    """
    labels = {"background": 0, **{f"label{number}": number for number in range(1, 6)}}
    model = TrialModel(labels, patch=(16, 16, 16), folds=2, mirroring=(0,), transpose=(1, 0, 2))
    image = np.random.default_rng(0).normal(0, 100, (1, *SHAPE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        predictor = predictor_of(model.write(Path(folder)))
        results = []
        reference = plain_whole(predictor) if chosen() == "whole" else contextlib.nullcontext()
        for way, oracle in ((stock_prediction, reference), (lean_prediction, contextlib.nullcontext())):
            with way(), oracle:
                results.append(predictor.predict_single_npy_array(image, {"spacing": list(SPACING)}))
    return int((results[0] != results[1]).sum()), results[0].size


@contextlib.contextmanager
def plain_whole(predictor: Any) -> Iterator[None]:
    """Let a stock predictor run its network plainly on the whole image, mirrored by nnU-Net's own method.

    The image is padded with zeros, as nnU-Net pads, to multiples of the network's strides.
    """

    @torch.inference_mode()
    def logits(image: Tensor) -> Tensor:
        configuration = predictor.configuration_manager
        strides = np.prod(configuration.pool_op_kernel_sizes, axis=0)
        size = [-(-extent // step) * step for extent, step in zip(image.shape[-len(strides) :], strides, strict=True)]
        padded, inside = pad_nd_image(image, size, "constant", {"value": 0}, True, None)
        predictor.network.eval()
        if len(strides) == 2:
            slices = [
                predictor._internal_maybe_mirror_and_predict(padded[None, :, row])[0] for row in range(len(padded[0]))
            ]
            whole = torch.stack(slices, 1)
        else:
            whole = predictor._internal_maybe_mirror_and_predict(padded[None])[0]
        cropped = (slice(None), *inside[1:])
        return whole[cropped].half()

    predictor.predict_sliding_window_return_logits = logits
    try:
        yield
    finally:
        del predictor.predict_sliding_window_return_logits
