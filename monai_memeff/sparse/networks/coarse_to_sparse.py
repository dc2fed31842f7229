"""Coarse to sparse: a dense U-Net at low resolution chooses the voxels that a sparse U-Net computes in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from monai.networks.layers.factories import Act, Norm
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from monai.networks.nets.unet import UNet
from torch import Tensor, nn
from torch.nn import functional

from monai_memeff.arguments import check_odd, numbers_checked
from monai_memeff.checks import as_network_input, check_layer
from monai_memeff.memory import checkpoint
from monai_memeff.norms import accept_single_values
from monai_memeff.pooling import average_pool
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.networks.cells import (
    cell_sizes,
    cells_to_voxels,
    choose_cells,
    interpolated_at,
    scatter_add_rows,
    upsample,
)
from monai_memeff.sparse.networks.unet import SparseUNet


class CoarseToSparseUNet(nn.Module):
    """Segment a volume densely at low resolution, and again at full resolution only where that is worth computing.

    1. ``coarse``, MONAI's UNet, sees the volume averaged over cells of ``coarse_factor`` voxels and gives one logit per
       class and ``context_channels`` features for every cell.
    2. Cells are chosen (:func:`~monai_memeff.sparse.networks.cells.choose_cells`): foreground and uncertain ones and
       their neighbors, the most uncertain first, never more than ``max_active`` of the volume's voxels. The choice is
       made without gradient.
    3. ``refine``, a :class:`~monai_memeff.sparse.SparseUNet`, sees the voxels of these cells: their intensities at full
       resolution with the coarse logits and features interpolated there. Its result is added to the interpolated
       coarse logits, which stand as they are everywhere else. So one loss trains both stages.

    It is the published workflow of the sparse skull networks (a dense network at low resolution, then sparse super
    resolution; Li et al., Sci Rep 13:20229, 2023, doi 10.1038/s41598-023-47437-6), here trained end to end and for any
    number of classes. Memory does not grow with what is in the volume: ``max_active`` bounds it.

    The same weights and input give the same result; ties in the choice go to the first cell in memory order. On CUDA
    the backward pass of torch's interpolation adds in no fixed order, so gradients may differ in their last bits.

    Args:
        spatial_dims: 3.
        in_channels: channels of the volume.
        out_channels: classes, background in channel 0; with ``sigmoid``, overlapping classes without a background.
        channels: features per level of the coarse UNet.
        strides: strides of the coarse UNet; a leading 1 gives it a level at the resolution of the cells. One number or
            one per axis for each level.
        kernel_size: Kernel size of convolutions in both networks, odd.
        up_kernel_size: Kernel size of transposed convolutions in both networks, odd.
        num_res_units: residual sub-units per level, in both networks.
        act: activation, as in MONAI.
        norm: "instance", "batch" or "group", as in MONAI.
        dropout: probability.
        bias: whether convolutions have one.
        adn_ordering: order of activation, dropout and norm.
        coarse_factor: extent of a cell in voxels, one number or one per axis.
        refine_channels: features per level of the sparse UNet.
        refine_strides: its strides; the leading 1 gives it a level at full resolution.
        context_channels: features that the coarse UNet hands to the sparse one beside its logits; may be 0.
        max_active: largest fraction of a volume's voxels to compute at full resolution, above 0 and at most 1.
        certainty: a cell is left out when it is background with at least this probability.
        dilation: neighbors that are computed too, in cells.
        sigmoid: classes overlap, each logit stands for itself; always so with one class.
        deep_supervision: In training, return ``[logits, coarse_logits]`` for a loss on both, as
            ``monai.losses.DeepSupervisionLoss`` takes them (its default weights are 1 and 0.5).
        use_checkpoint: recompute in the backward pass, instead of keeping, the inside of every coarse level and the
            whole sparse network.

    Shape: (B, in_channels, H, W, D), any extents, -> (B, out_channels, H, W, D); ``coarse_logits`` is (B, out_channels,
    h, w, d) with h = ceil(H / coarse_factor).

    Raises:
        ValueError: an argument is out of range; in the call another shape, NaN, infinity, or another dtype.

    Examples:
        >>> network = CoarseToSparseUNet(3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,))
        >>> network(torch.rand(1, 1, 16, 16, 16)).shape
        torch.Size([1, 2, 16, 16, 16])
    """

    why_not_in_parts: ClassVar[str] = "it chooses voxels by the whole volume, and max_active bounds its memory"

    @numbers_checked
    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernel_size: Sequence[int] | int = 3,
        up_kernel_size: Sequence[int] | int = 3,
        num_res_units: int = 0,
        act: tuple | str = Act.PRELU,
        norm: tuple | str = Norm.INSTANCE,
        dropout: float = 0.0,
        bias: bool = True,
        adn_ordering: str = "NDA",
        coarse_factor: Sequence[int] | int = 2,
        refine_channels: Sequence[int] = (16, 32, 32),
        refine_strides: Sequence[int | Sequence[int]] = (1, 2),
        context_channels: int = 16,
        max_active: float = 0.1,
        certainty: float = 0.95,
        dilation: int = 1,
        sigmoid: bool = False,
        deep_supervision: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims != 3:
            raise ValueError(f"CoarseToSparseUNet works on volumes: spatial_dims must be 3, got {spatial_dims}.")
        check_odd("kernel_size", kernel_size)
        check_odd("up_kernel_size", up_kernel_size)
        check_layer("norm", norm, lambda: norm is None or get_norm_layer(norm, 3, channels[0]))
        check_layer("act", act, lambda: act is None or get_act_layer(act))
        self.coarse_factor = _per_axis("coarse_factor", coarse_factor)
        _check_range("max_active", max_active, 0 < max_active <= 1, "above 0 and at most 1")
        _check_range("certainty", certainty, 0 < certainty <= 1, "above 0 and at most 1")
        _check_range("dilation", dilation, dilation >= 0, "0 or more cells")
        _check_range("context_channels", context_channels, context_channels >= 0, "0 or more")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.max_active, self.certainty, self.dilation = max_active, certainty, dilation
        self.sigmoid = sigmoid or out_channels == 1
        self.deep_supervision = deep_supervision
        self.divisor = _total_stride(strides)
        shared = (kernel_size, up_kernel_size, num_res_units, act, norm, dropout, bias, adn_ordering)
        given = out_channels + context_channels
        self.coarse = accept_single_values(UNet(3, in_channels, given, channels, strides, *shared))
        self.refine = SparseUNet(3, in_channels + given, out_channels, refine_channels, refine_strides, *shared)
        self.use_checkpoint = use_checkpoint
        if use_checkpoint:
            recompute_levels(self.coarse)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment (see the class)."""
        logits, coarse_logits = self.both_logits(x)
        return [logits, coarse_logits] if self.training and self.deep_supervision else logits

    @torch.compiler.disable  # every number of active voxels would be compiled anew
    def both_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Segment a volume at both resolutions.

        Args:
            x: (B, in_channels, H, W, D).

        Returns:
            logits (B, out_channels, H, W, D) and coarse logits (B, out_channels, h, w, d).
        """
        x = as_network_input(x, next(self.parameters()).dtype, type(self).__name__)
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"the input must have shape (B, {self.in_channels}, H, W, D), got {tuple(x.shape)}.")
        given = self._coarse_features(x)
        coarse_logits = given[:, : self.out_channels]
        shape = x.shape[2:]
        cells = self.active_cells(coarse_logits, shape)
        refined = self._refined(x, given, cells_to_voxels(cells, self.coarse_factor, shape))
        return scatter_add_rows(upsample(coarse_logits, self.coarse_factor, shape), refined), coarse_logits

    def active_cells(self, coarse_logits: Tensor, shape: Sequence[int]) -> Tensor:
        """Mark the cells that are computed at full resolution.

        Args:
            coarse_logits: (B, out_channels, h, w, d).
            shape: (H, W, D) of the volume.

        Returns:
            (B, 1, h, w, d) boolean.
        """
        sizes = cell_sizes(shape, self.coarse_factor, coarse_logits.device)
        limit = int(self.max_active * shape[0] * shape[1] * shape[2])
        return choose_cells(coarse_logits, sizes, limit, self.certainty, self.dilation, self.sigmoid)

    def _coarse_features(self, x: Tensor) -> Tensor:
        """Coarse logits and context (B, out_channels + context_channels, h, w, d)."""
        window = [min(step, extent) for step, extent in zip(self.coarse_factor, x.shape[2:], strict=True)]
        small = average_pool(x, window, self.coarse_factor, ceil_mode=True)
        extents = small.shape[2:]
        missing = [-extent % step for extent, step in zip(extents, self.divisor, strict=True)]
        padding = [pad for last in reversed(missing) for pad in (0, last)]
        if any(missing):
            small = functional.pad(small, padding, mode="replicate")
        return self.coarse(small)[:, :, : extents[0], : extents[1], : extents[2]]

    def _refined(self, x: Tensor, given: Tensor, active: Tensor) -> SparseTensor:
        """What the sparse network adds on the active voxels."""
        intensities = SparseTensor.from_dense(x, active)
        context = interpolated_at(given, intensities, self.coarse_factor)
        features = intensities.replace(torch.cat((intensities.features, context.to(x.dtype)), dim=1))
        if not self.use_checkpoint:
            return self.refine(features)
        # given the rows, torch sees the GPU whose random state dropout needs again
        return checkpoint(lambda rows: self.refine(features.replace(rows)), features.features)


class RecomputedLevel(nn.Sequential):
    """One level of a U-Net (way down, everything below, way up) that keeps only what passes between the three."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the level."""
        down, below, up = self
        kept = checkpoint(down, x)
        return checkpoint(_join_and_run, up, kept, below.submodule(kept))


def _join_and_run(up: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """What MONAI's skip connection does before the way up, so that the joined channels need not be kept."""
    return up(torch.cat((first, second), dim=1))


def recompute_levels(network: UNet) -> None:
    """Let every level of a dense MONAI UNet recompute its inside in the backward pass, in place; keys stay the same."""
    for module in network.modules():
        if type(module) is nn.Sequential and len(module) == 3 and isinstance(module[1], SkipConnection):
            module.__class__ = RecomputedLevel


def _total_stride(strides: Sequence[int | Sequence[int]]) -> tuple[int, int, int]:
    i = j = k = 1
    for stride in strides:
        a, b, c = (stride,) * 3 if isinstance(stride, int) else stride
        i, j, k = i * a, j * b, k * c
    return i, j, k


def _per_axis(name: str, value: Sequence[int] | int) -> tuple[int, int, int]:
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{name} must be a positive number or three of them, got {value}.")
    return values[0], values[1], values[2]


def _check_range(name: str, value: float, fits: bool, limits: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {limits}, got {value}.")
