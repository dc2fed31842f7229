"""CLSTMUNet as nnU-Net builds networks from plans, with the prediction of whole volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_memeff.clstm import CLSTMUNet
from nnunet_plugins.networks import mark_class_layers

NORM = ("instance", {"affine": True, "eps": 1e-5})  # nnU-Net's; the same in training and prediction


class CLSTMPlansUNet(CLSTMUNet):
    """A 2D U-Net in a convolutional LSTM that walks along the first axis, which nnU-Net makes the coarsest.

    Args:
        input_channels: modalities (and labels of the previous stage of a cascade).
        num_classes: segmentation heads: labels without the ignore label, or regions.
        channels: features per level of the U-Net.
        hidden_channels: Number of channels of the states.
        bidirectional: also from the last slice to the first.
        checkpoint: see :class:`~monai_memeff.clstm.CLSTMUNet`, also for what follows.
        recompute: Fraction of the U-Net that the backward pass may repeat.
        offload_to_cpu: keep the states of a training step in host memory; the logits are where the image is.
        norm: Norm of the U-Net.
        deep_supervision: set by nnU-Net; there is one output, so it changes nothing.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        hidden_channels: int = 8,
        bidirectional: bool = False,
        checkpoint: Any = "slice",
        recompute: float = 1.0,
        offload_to_cpu: bool = False,
        norm: str | tuple | list | None = NORM,
        deep_supervision: bool = False,
    ) -> None:
        options = (
            channels,
            hidden_channels,
            bidirectional,
            checkpoint,
            True,
            0,
            tuple(norm) if isinstance(norm, list) else norm,
            "relu",
            False,
            3,
            recompute,
            offload_to_cpu,
        )
        super().__init__(3, input_channels, num_classes, *options)
        mark_class_layers(self, lambda: CLSTMUNet(3, input_channels, num_classes + 1, *options))
        self.sink: LogitsSink | None = None

    def predict_volume(self, image: Tensor) -> Tensor:
        """Logits (1, K, X, Y, Z) of a whole image in half precision on the host; a slice at a time is on the device.

        Raises:
            RuntimeError: logits beyond half precision, as in nnU-Net.
        """
        offload, self.offload_to_cpu = self.offload_to_cpu, True
        self.sink = LogitsSink((image.shape[0], self.out_channels, *image.shape[2:]), self.bidirectional)
        try:
            self(image.float().cpu())
            return self.sink.logits
        finally:
            self.offload_to_cpu, self.sink = offload, None

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, slices, K, rows, columns) of some slices; in prediction they go to the sink and are not kept."""
        logits = super()._logits(hidden)
        if self.sink is None:
            return logits
        self.sink.put(logits)
        return logits.new_empty((*logits.shape[:2], 0, 1, 1))


class LogitsSink:
    """One half-precision array (B, K, X, Y, Z) on the host that is filled slice by slice, from either end.

    Args:
        shape: (B, K, X, Y, Z).
        from_the_end: The last slices come first.
    """

    def __init__(self, shape: tuple[int, ...], from_the_end: bool) -> None:
        self.logits = torch.empty(shape, dtype=torch.half)
        self.from_the_end, self.filled = from_the_end, 0

    def put(self, logits: Tensor) -> None:
        """Take logits (B, slices, K, Y, Z) of the next slices."""
        count, depth = logits.shape[1], self.logits.shape[2]
        first = depth - self.filled - count if self.from_the_end else self.filled
        part = logits.movedim(1, 2).to(device="cpu", dtype=torch.half)
        if not torch.isfinite(part).all():  # NaN counts as the largest
            raise RuntimeError(
                "Encountered inf or NaN in predicted array: the logits are too large for half precision, or weights "
                "are broken."
            )
        self.logits[:, :, first : first + count] = part
        self.filled += count
