"""How nnU-Net's predictor runs a network that wants the whole volume: no tiles, no stitching."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_plugins.networks import unwrapped

STOCK_STEP = 0.5
"""nnU-Net's own step between tiles."""


def install() -> None:
    """Let nnUNetPredictor hand whole images to networks that have ``predict_volume``; others run as ever.

    Such a network gets the preprocessed image (1, C, X, Y, Z) on the host and gives logits (1, K, X, Y, Z), on the host
    too and in half precision as nnU-Net's. It wraps one public method, once; called by the modules of trainers whose
    networks need it.
    """
    stock = nnUNetPredictor.predict_sliding_window_return_logits
    if hasattr(stock, "whole_volume"):
        return

    @functools.wraps(stock)
    def predict(self: Any, input_image: Tensor) -> Any:
        network = unwrapped(self.network)
        if not hasattr(network, "predict_volume"):
            return predict.__wrapped__(self, input_image)  # stock, or lean prediction
        if self.tile_step_size != STOCK_STEP:
            print(f"-step_size {self.tile_step_size} has no effect: {type(network).__name__} predicts whole images.")
        network.to(self.device).eval()
        axes = self.allowed_mirroring_axes if self.use_mirroring else None
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            return mirrored(network.predict_volume, input_image[None], axes)[0]

    predict.whole_volume = True  # type: ignore[attr-defined]
    nnUNetPredictor.predict_sliding_window_return_logits = predict


def mirrored(predict: Any, image: Tensor, axes: Any) -> Tensor:
    """The mean over all mirrorings of the spatial axes that nnU-Net allows; without any, the prediction itself."""
    logits: Tensor = predict(image)
    ways = [c for n in range(len(axes or ())) for c in itertools.combinations([a + 2 for a in axes], n + 1)]
    for way in ways:
        logits += predict(image.flip(way)).flip(way)
    return logits / (len(ways) + 1) if ways else logits
