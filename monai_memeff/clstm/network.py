"""CLSTMUNet: a 2D U-Net inside a convolutional LSTM that walks over the slices of a whole volume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_network_input, plain
from monai_memeff.clstm.cell import GatedConvLSTMCell, State
from monai_memeff.clstm.recompute import checkpoint_keeping, kept_from
from monai_memeff.clstm.unet import SliceUNet

Checkpoint = Literal["slice", "sqrt"] | int | None


class CLSTMUNet(nn.Module):
    """Segments a whole volume slice by slice, with a memory of the slices before.

    Van de Leemput, Patel, Manniesing: "Full Volumetric Brain Tissue Segmentation in Non-Contrast CT using Memory
    Efficient Convolutional LSTMs", Med-NeurIPS 2018. A 2D U-Net computes the gates' inputs of every slice, a
    convolutional LSTM carries hidden and cell state from slice to slice (figure 1). In training the activations of
    a few slices at most are alive: the rest is recomputed from the states between them (section 2.2).

    Left open by the paper and chosen here: 3x3 hidden-to-hidden kernels; ``hidden_channels=1``, the reading that fits
    "h is the output" and the published memory; a 1x1 head that turns h, which lies in (-1, 1), into logits
    (``head=False`` gives h itself).

    Args:
        spatial_dims: 3.
        in_channels: Number of channels of the volume.
        out_channels: Number of classes.
        channels: Number of features per level of the U-Net; the default has 31.39 million parameters, 31.04 with
            ``up_conv``.
        hidden_channels: Number of channels of the states.
        bidirectional: a second cell walks from the last slice to the first. It has states and gates of its own (the
            U-Net then computes 8 maps per hidden channel); the head sees both, ``head=False`` averages them.
        checkpoint: what a training step keeps. None: every activation. "slice": the states after every slice. n: the
            states after every n slices, which pass the U-Net together. "sqrt": n is the root of the depth.
        head: logits by a 1x1 convolution; False: the hidden state itself, hidden_channels must equal out_channels.
        axis: the spatial axis to walk along, 0 to 2 for H, W, D, or negative.
        norm: Norm of the U-Net, as in MONAI; batch norm is taken slice by slice (:class:`~monai_memeff.clstm.unet.
            SliceBatchNorm2d`), so results depend neither on ``checkpoint`` nor on ``unet_batch``.
        act: Activation of the U-Net, as in MONAI.
        up_conv: the U-Net's second reading, see :class:`~monai_memeff.clstm.unet.SliceUNet`.
        kernel_size: Kernel size of the hidden-to-hidden convolutions.
        recompute: Largest fraction of the U-Net's multiplications that the backward pass may repeat. 1 repeats all of
            them; 0.5 keeps the outputs of the convolutions that cost most per byte, 84 MB per slice of 512 x 512 with
            the default channels in float32.
        offload_to_cpu: keep what waits for the backward pass (states, gates of the backward direction, kept outputs) in
            host memory. A volume on the host stays there too, a slice at a time is copied, and the logits are on the
            host.
        unet_batch: slices that pass the U-Net together where ``checkpoint`` does not say it (inference, None).

    Shape: (B, in_channels, H, W, D) -> (B, out_channels, H, W, D), any extents from 1 on. In-plane extents that the
    U-Net cannot halve are padded inside.

    Frozen U-Net (``freeze_unet()``): its gates are computed once and kept, and nothing of it is recomputed.

    Raises:
        ValueError: an argument out of range.

    Examples:
        >>> network = CLSTMUNet(in_channels=1, out_channels=2, channels=(4, 8))
        >>> network(torch.rand(1, 1, 16, 16, 5)).shape
        torch.Size([1, 2, 16, 16, 5])
    """

    why_not_in_parts: ClassVar[str] = "it walks through the volume itself: use SlabInferer"

    @numbers_checked
    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        hidden_channels: int = 1,
        bidirectional: bool = False,
        checkpoint: Checkpoint = "slice",
        head: bool = True,
        axis: int = 2,
        norm: str | tuple | None = "batch",
        act: str | tuple = "relu",
        up_conv: bool = False,
        kernel_size: int = 3,
        recompute: float = 1.0,
        offload_to_cpu: bool = False,
        unet_batch: int = 1,
    ) -> None:
        super().__init__()
        _check(spatial_dims, out_channels, hidden_channels, checkpoint, head, axis, recompute, unet_batch)
        directions = 2 if bidirectional else 1
        self.in_channels, self.out_channels, self.bidirectional = in_channels, out_channels, bidirectional
        self.checkpoint, self.axis, self.offload_to_cpu, self.unet_batch = (
            checkpoint,
            axis % 3,
            offload_to_cpu,
            unet_batch,
        )
        self.unet_frozen = False
        self.unet = SliceUNet(in_channels, 4 * hidden_channels * directions, channels, norm, act, up_conv)
        self.cell = GatedConvLSTMCell(hidden_channels, kernel_size)
        self.cell_back = GatedConvLSTMCell(hidden_channels, kernel_size) if bidirectional else None
        self.head = nn.Conv2d(hidden_channels * directions, out_channels, 1) if head else None
        self.kept_from = None if recompute >= 1 else kept_from(self.unet.costs(), recompute)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a volume (see the class).

        Raises:
            ValueError: the volume is not (B, in_channels, H, W, D), is empty, or holds NaN or infinity.
        """
        return self.sweep(x)[0]

    @torch.compiler.disable  # segments are recomputed, with the running statistics held back: not to be traced
    def sweep(self, x: Tensor, start: State | None = None, end: State | None = None) -> tuple[Tensor, State]:
        """Logits of a slab of slices within a volume, and the state to go on with.

        Args:
            x: (B, in_channels, H, W, D), the slab.
            start: state after the slice before the slab; None: the slab begins the volume.
            end: Bidirectional only: the backward direction's state after the slice behind the slab; None: the slab ends
                the volume.

        Returns:
            Logits of the slab, and the state after its last slice.
        """
        slices = self._slices_of(x)
        state = self._begin(slices, start)
        outputs, gates_back = [], []
        for part in slices.split(self._segment_length(slices.shape[1]), dim=1):
            *state, output, back = self._forward_direction(part, *state)
            outputs.append(output)
            gates_back.append(back)
        if self.cell_back is not None:
            outputs = self._backward_direction(outputs, gates_back, self._begin(slices, end), x.device)
        walk = 2 + self.axis
        logits = torch.cat([output.movedim(1, walk) for output in outputs], dim=walk)  # contiguous: no copy follows
        return convert_to_dst_type(logits, x, dtype=logits.dtype, device=logits.device)[0], (state[0], state[1])

    @torch.compiler.disable
    def state_before(self, x: Tensor, end: State | None = None) -> State:
        """The backward direction's state after a slab's first slice, to hand to the slab before it; bidirectional only.

        Args:
            x: (B, in_channels, H, W, D), the slab.
            end: see :meth:`sweep`.

        Raises:
            ValueError: the network is not bidirectional.
        """
        if self.cell_back is None:
            raise ValueError("state_before is for bidirectional=True: the network has no backward direction.")
        slices = self._slices_of(x)
        h, c = self._begin(slices, end)
        for part in reversed(slices.split(self._segment_length(slices.shape[1]), dim=1)):
            _, h, c = self.cell_back(self._gates(part).chunk(2, dim=2)[1], h, c, True)
        return h, c

    def freeze_unet(self, frozen: bool = True) -> None:
        """Freeze the U-Net, its running statistics too, or unfreeze it (the paper's second stage, section 3.1)."""
        self.unet_frozen = frozen
        self.unet.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> CLSTMUNet:
        """Switch to training or evaluation; a frozen U-Net stays in evaluation."""
        super().train(mode)
        self.unet.train(mode and not self.unet_frozen)
        return self

    # One segment of slices

    def _forward_direction(self, part: Tensor, h: Tensor, c: Tensor) -> tuple[Any, ...]:
        walk = partial(self._walk, part.device)
        if part.requires_grad or any(p.requires_grad for p in self.unet.parameters()):
            return self._run(lambda slices, h, c: walk(self._gates(slices), h, c), part, h, c)
        with torch.no_grad():
            gates = self._put(self._gates(part))
        return self._run(walk, gates, h, c)

    def _walk(self, where: torch.device, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Any, ...]:
        gates, h, c = self._get(gates, h, c)
        forward, back = gates.chunk(2, dim=2) if self.bidirectional else (gates, None)
        hidden, h, c = self.cell(forward, h, c)
        output = self._put(hidden) if self.bidirectional else self._logits(hidden).to(where)
        return self._put(h), self._put(c), output, None if back is None else self._put(back)

    def _backward_direction(
        self, hidden: list[Tensor], gates: list[Tensor], state: Sequence[Tensor], where: torch.device
    ) -> list[Tensor]:
        outputs = []
        while hidden:
            *state, output = self._run(partial(self._walk_back, where), gates.pop(), hidden.pop(), *state)
            outputs.append(output)
        return outputs[::-1]

    def _walk_back(
        self, where: torch.device, gates: Tensor, forward: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, ...]:
        gates, forward, h, c = self._get(gates, forward, h, c)
        assert self.cell_back is not None
        back, h, c = self.cell_back(gates, h, c, True)
        both = torch.cat((forward, back), dim=2) if self.head is not None else (forward + back) / 2
        return self._put(h), self._put(c), self._logits(both).to(where)

    def _gates(self, slices: Tensor) -> Tensor:
        (slices,) = self._get(slices)
        gates = self.unet(slices.flatten(0, 1), slices.shape[1])
        return gates.unflatten(0, slices.shape[:2])

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            return hidden
        return self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    # Memory

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.checkpoint is None:
            return function(*args)
        return checkpoint_keeping(function, *args, kept_from=self.kept_from, store=self._put)

    def _segment_length(self, depth: int) -> int:
        if self.checkpoint is None or not torch.is_grad_enabled():
            return self.unet_batch
        if isinstance(self.checkpoint, int):
            return self.checkpoint
        return 1 if self.checkpoint == "slice" else math.ceil(math.sqrt(depth))

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self.offload_to_cpu else tensor

    def _get(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.cell.conv.weight.device) for tensor in tensors]

    def _begin(self, slices: Tensor, state: State | None) -> Sequence[Tensor]:
        weight = self.cell.conv.weight
        shape = (slices.shape[0], self.cell.hidden_channels, *slices.shape[3:])
        if state is None:
            return [self._put(torch.zeros(shape, dtype=weight.dtype, device=weight.device))] * 2
        if any(part.shape != shape for part in state):
            raise ValueError(f"the state of slices {tuple(state[0].shape)} does not fit a slab that needs {shape}.")
        return state

    def _slices_of(self, x: Tensor) -> Tensor:
        """(B, C, H, W, D) as (B, slices, C, rows, columns)."""
        x = as_network_input(x, self.cell.conv.weight.dtype, "CLSTMUNet")
        if x.ndim != 5 or x.shape[1] != self.in_channels or x.numel() == 0:
            raise ValueError(
                f"CLSTMUNet takes (B, {self.in_channels}, H, W, D) with at least one voxel, got {tuple(x.shape)}; "
                "a single slice (B, C, H, W) is the volume image[..., None]."
            )
        return plain(x).movedim(2 + self.axis, 1)


def _check(
    spatial_dims: int,
    out_channels: int,
    hidden_channels: int,
    checkpoint: Checkpoint,
    head: bool,
    axis: int,
    recompute: float,
    unet_batch: int,
) -> None:
    if spatial_dims != 3:
        raise ValueError(f"CLSTMUNet works on volumes: spatial_dims must be 3, got {spatial_dims}.")
    if hidden_channels < 1:
        raise ValueError(f"hidden_channels must be at least 1, got {hidden_channels}.")
    if not head and hidden_channels != out_channels:
        raise ValueError(
            f"without a head the hidden state is the output: hidden_channels ({hidden_channels}) must equal "
            f"out_channels ({out_channels}), or set head=True."
        )
    if checkpoint not in ("slice", "sqrt", None) and (not isinstance(checkpoint, int) or checkpoint < 1):
        raise ValueError(f"checkpoint must be 'slice', 'sqrt', a number of slices or None, got {checkpoint!r}.")
    if not -3 <= axis <= 2 or not 0 <= recompute <= 1 or unet_batch < 1:
        raise ValueError(
            f"axis must lie in -3 ... 2, recompute in 0 ... 1, unet_batch be at least 1; got {axis}, {recompute}, "
            f"{unet_batch}."
        )
    if recompute < 1 and checkpoint is None:
        raise ValueError("recompute says what checkpoint repeats: set checkpoint, or leave recompute at 1.")
