"""CLSTMUNet as nnU-Net builds networks from plans, with the prediction of whole volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from monai_memeff.clstm import CLSTMUNet

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
        super().__init__(
            3,
            input_channels,
            num_classes,
            channels,
            hidden_channels,
            bidirectional,
            checkpoint,
            axis=0,
            norm=tuple(norm) if isinstance(norm, list) else norm,
            recompute=recompute,
            offload_to_cpu=offload_to_cpu,
        )

    def predict_volume(self, image: Tensor) -> Tensor:
        """Logits (1, K, X, Y, Z) of a whole image on the host; a slice at a time is on the network's device."""
        chosen, self.offload_to_cpu = self.offload_to_cpu, True
        try:
            return self(image.float().cpu()).float()
        finally:
            self.offload_to_cpu = chosen
