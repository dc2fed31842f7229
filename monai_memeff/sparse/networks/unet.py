"""SparseUNet: MONAI's UNet computed on active voxels only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from monai.networks.layers.factories import Act, Norm
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from monai.networks.nets.unet import UNet
from monai.utils import convert_to_dst_type
from torch import Tensor

from monai_memeff.arguments import check_number, check_odd, numbers_checked
from monai_memeff.checks import as_network_input, check_dtype, check_layer
from monai_memeff.sparse.core.activity import ABSENT_LOGIT, active_voxels
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.nn.convert import to_sparse


class SparseUNet(UNet):
    """MONAI's UNet computed on active voxels only.

    Arguments, layers and ``state_dict`` are those of ``monai.networks.nets.UNet`` with ``spatial_dims=3``, so a dense
    checkpoint loads strictly, and with every voxel active the outputs are equal. Where voxels are inactive,
    convolutions are submanifold (Graham et al. 2018, arXiv 1711.10275), and norms see active voxels only. Extents
    need not be divisible by the strides.

    Args:
        spatial_dims: 3.
        in_channels: input channels.
        out_channels: output channels.
        channels: features per level.
        strides: per level.
        kernel_size: Kernel size of convolutions, odd.
        up_kernel_size: Kernel size of transposed convolutions, odd.
        num_res_units: residual sub-units per level.
        act: activation, as in MONAI.
        norm: "instance", "batch" or "group", as in MONAI.
        dropout: probability.
        bias: whether convolutions have one.
        adn_ordering: order of activation, dropout and norm.
        threshold: a voxel of a dense input is active where any channel is larger than this value; None: where any
            channel differs from ``background``.
        background: the value of inactive voxels, used when ``threshold`` is None.
        inactive_logits: output of inactive voxels, one value per output channel; default 10 in channel 0 and 0
            elsewhere (background in channel 0), or -10 for a single channel.

    Shape: dense (B, in_channels, H, W, D) -> dense (B, out_channels, H, W, D); SparseTensor -> SparseTensor.

    Raises:
        ValueError: another number of dimensions than 3, an even kernel, an unknown norm or activation, or
            ``inactive_logits`` not as many as channels; in the call NaN, infinity, or another dtype than the weights'.

    Examples:
        >>> network = SparseUNet(3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,))
        >>> network(torch.eye(16).expand(1, 1, 16, 16, 16)).shape
        torch.Size([1, 2, 16, 16, 16])
    """

    why_not_in_parts: ClassVar[str] = "it computes active voxels only, wherever they are: use SparseInferer"

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
        threshold: float | None = None,
        background: float = 0.0,
        inactive_logits: Sequence[float] | None = None,
    ) -> None:
        if spatial_dims != 3:
            raise ValueError(f"SparseUNet works on volumes: spatial_dims must be 3, got {spatial_dims}.")
        check_odd("kernel_size", kernel_size)
        check_odd("up_kernel_size", up_kernel_size)
        check_layer("norm", norm, lambda: norm is None or get_norm_layer(norm, 3, channels[0]))
        check_layer("act", act, lambda: act is None or get_act_layer(act))
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            channels,
            strides,
            kernel_size,
            up_kernel_size,
            num_res_units,
            act,
            norm,
            dropout,
            bias,
            adn_ordering,
        )
        if inactive_logits is None:
            inactive_logits = (ABSENT_LOGIT, *[0.0] * (out_channels - 1)) if out_channels > 1 else (-ABSENT_LOGIT,)
        if len(inactive_logits) != out_channels:
            raise ValueError(f"inactive_logits must have {out_channels} values (out_channels), got {inactive_logits}.")
        for name, value in (("threshold", threshold), ("background", background)):
            if value is not None:
                check_number(name, value)
        for value in inactive_logits:
            check_number("inactive_logits", value)
        self.threshold = threshold
        self.background = background
        self.inactive_logits = tuple(float(value) for value in inactive_logits)
        to_sparse(self.model)

    @torch.compiler.disable  # every number of active voxels would be compiled anew
    def forward(self, x: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Segment (see the class).

        Raises:
            InputError: NaN or infinity, or another floating-point dtype than that of the weights.
        """
        if isinstance(x, SparseTensor):
            check_dtype(x.features, next(self.parameters()).dtype, type(self).__name__)
            return self.model(x)
        logits = self.densify(self.model(self.sparsify(x)))
        return convert_to_dst_type(logits, x, dtype=logits.dtype, device=logits.device)[0]

    def sparsify(self, image: Tensor) -> SparseTensor:
        """The active voxels of (B, in_channels, H, W, D) by this network's rule."""
        values = as_network_input(image, next(self.parameters()).dtype, type(self).__name__)
        return SparseTensor.from_dense(values, active_voxels(image, self.threshold, self.background))

    def densify(self, logits: SparseTensor) -> Tensor:
        """Logits (B, out_channels, H, W, D) with ``inactive_logits`` where nothing was computed."""
        return logits.dense(self.inactive_logits)
