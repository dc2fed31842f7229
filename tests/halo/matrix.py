"""The networks of both hosts at tiny widths: what the matrix of networks and settings runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import monai.networks.nets as nets
import numpy as np
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from tests.halo.builders import F3, F6, S2, LinkNet, Nested, dints, nnunet, residual, swin, unet


@dataclass
class Entry:
    """One network of the matrix.

    Attributes:
        make: builds it.
        shape: of the volume (B, C, spatial...).
        more: shapes of further arguments, or the arguments.
        convolutional: whether it has no global attention, no flattening of the volume and no sampling.
        dtype: of the network and its volume; some networks of MONAI know float32 alone.
        fast: whether it is tried in every run of the tests.
        big: whether one forward takes seconds, so that few settings are tried.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    more: Sequence[Any] = field(default_factory=tuple)
    convolutional: bool = True
    dtype: torch.dtype = torch.float64
    fast: bool = False
    big: bool = False

    @property
    def slow(self) -> bool:
        """Whether it is tried in the slow part of the tests."""
        return not self.fast and not self.big

    def network(self) -> nn.Module:
        """The network, the same in every call, in evaluation mode."""
        torch.manual_seed(0)
        return self.make().to(self.dtype).eval()

    def arguments(self, batch: int = 1) -> tuple[Any, ...]:
        """Random arguments."""
        torch.manual_seed(1)

        def one(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                return item.expand(batch, *item.shape[1:]).clone() if item.shape[:1] == (1,) else item.clone()
            shape = (batch, *item[1:])
            return torch.randn(shape, dtype=self.dtype)

        return tuple(one(item) for item in (self.shape, *self.more))


DIFFUSION = dict(  # noqa: C408
    spatial_dims=3, in_channels=1, channels=(4, 4), num_res_blocks=1, norm_num_groups=2, num_head_channels=4
)
TIME = torch.tensor([3.0], dtype=torch.float64)
ODD, EVEN, UP = (1, 1, 37, 17, 19), (1, 1, 24, 16, 16), (1, 1, 32, 32, 32)

ENTRIES: dict[str, Entry] = {
    "UNet instance": Entry(lambda: unet(num_res_units=1), EVEN, fast=True),
    "UNet batch": Entry(lambda: unet(norm="batch"), EVEN),
    "UNet group": Entry(lambda: unet(norm=("group", {"num_groups": 2}), num_res_units=2), EVEN),
    "UNet layer norm": Entry(lambda: unet(norm=("localresponse", {"size": 2})), EVEN),
    "UNet 5^3 kernels, GELU": Entry(lambda: unet(kernel_size=5, act="gelu"), EVEN, fast=True),
    "UNet dropout, Mish": Entry(lambda: unet(dropout=0.2, act="mish"), EVEN),
    "UNet swish, stride 3": Entry(lambda: unet(strides=(3, 2), act="swish"), EVEN),
    "UNet 2D": Entry(lambda: unet(2, num_res_units=1), (1, 1, 24, 16), fast=True),
    "UNet 1D": Entry(lambda: unet(1), (1, 1, 48), fast=True),
    "BasicUNet": Entry(lambda: nets.BasicUNet(features=F6), ODD, fast=True),
    "BasicUNet nontrainable": Entry(lambda: nets.BasicUNet(features=F6, upsample="nontrainable"), ODD),
    "BasicUNet pixelshuffle": Entry(lambda: nets.BasicUNet(features=F6, upsample="pixelshuffle"), ODD),
    "BasicUNet 2D batch": Entry(lambda: nets.BasicUNet(2, features=F6, norm="batch"), (1, 1, 37, 19)),
    "BasicUNetPlusPlus": Entry(lambda: nets.BasicUNetPlusPlus(features=F6, deep_supervision=True), UP),
    "DynUNet": Entry(
        lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[2, 4, 8], deep_supervision=True),
        EVEN,
        fast=True,
    ),
    "DynUNet residual anisotropic": Entry(
        lambda: nets.DynUNet(
            3, 1, 2, [[1, 3, 3], 3, 3], [1, [1, 2, 2], 2], [[1, 2, 2], 2], filters=[2, 4, 8], res_block=True
        ),
        EVEN,
    ),
    "AttentionUnet": Entry(lambda: nets.AttentionUnet(3, 1, 2, F3, S2), EVEN),
    "SegResNet": Entry(lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)), EVEN),
    "SegResNet deconv, instance": Entry(
        lambda: nets.SegResNet(
            init_filters=4, blocks_down=(1, 1), blocks_up=(1,), norm="instance", upsample_mode="deconv"
        ),
        EVEN,
    ),
    "SegResNet pixelshuffle": Entry(
        lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), upsample_mode="pixelshuffle"), EVEN
    ),
    "SegResNetDS": Entry(lambda: nets.SegResNetDS(init_filters=4, blocks_down=(1, 1, 1), dsdepth=2), EVEN),
    "SegResNetDS2 (VISTA3D's encoder)": Entry(
        lambda: nets.SegResNetDS2(init_filters=4, blocks_down=(1, 1, 1), dsdepth=2), EVEN
    ),
    "SegResNetVAE": Entry(
        lambda: nets.SegResNetVAE((16, 16, 16), vae_nz=4, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
        (1, 1, 16, 16, 16),
    ),
    "VNet": Entry(lambda: nets.VNet(), (1, 1, 32, 16, 16), big=True),
    "HighResNet": Entry(
        lambda: nets.HighResNet(
            layer_params=(
                {"name": "conv_0", "n_features": 4, "kernel_size": 3},
                {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
                {"name": "res_2", "n_features": 4, "kernels": (3, 3), "repeat": 1},
                {"name": "conv_1", "n_features": 4, "kernel_size": 1},
                {"name": "conv_2", "kernel_size": 1},
            )
        ),
        ODD,
        fast=True,
    ),
    "MedNeXt": Entry(
        lambda: nets.MedNeXt(
            init_filters=2, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1)
        ),
        UP,
    ),
    "MedNeXt with GRN, 5^3, deep supervision": Entry(
        lambda: nets.MedNeXt(
            init_filters=2,
            kernel_size=5,
            blocks_down=(1, 1, 1, 1),
            blocks_bottleneck=1,
            blocks_up=(1, 1, 1, 1),
            global_resp_norm=True,
            deep_supervision=True,
            use_residual_connection=True,
        ),
        UP,
    ),
    "FlexibleUNet": Entry(
        lambda: nets.FlexibleUNet(1, 2, "resnet10", spatial_dims=3, decoder_channels=(8, 8, 4, 4, 4)), UP, big=True
    ),
    "RegUNet": Entry(lambda: nets.RegUNet(3, 1, 2, 2, extract_levels=[0, 1, 2]), EVEN),
    "LocalNet": Entry(lambda: nets.LocalNet(3, 1, 2, (0, 1, 2)), EVEN),
    "GlobalNet": Entry(
        lambda: nets.GlobalNet([24, 16, 16], 3, 1, 2, 2), EVEN, convolutional=False, dtype=torch.float32
    ),
    "VoxelMorphUNet": Entry(lambda: nets.VoxelMorphUNet(3, 2, 3, (2, 2, 2, 2), (2, 2)), (1, 2, 24, 16, 16)),
    "VoxelMorph": Entry(
        lambda: nets.VoxelMorph(nets.VoxelMorphUNet(3, 2, 3, (2, 2, 2, 2), (2, 2)), integration_steps=2),
        EVEN,
        [EVEN],
        convolutional=False,
    ),
    "Quicknat 2D": Entry(lambda: nets.Quicknat(2, 1, 4, se_block="None"), (1, 1, 32, 32)),
    "AHNet": Entry(lambda: nets.AHNet(layers=(1, 1, 1, 1), psp_block_num=2), (1, 1, 32, 32, 32), big=True),
    "AutoEncoder": Entry(lambda: nets.AutoEncoder(3, 1, 1, (2, 4), S2, num_res_units=1), EVEN),
    "VQVAE": Entry(
        lambda: nets.VQVAE(
            3, 1, 1, (4, 4), 1, (4, 4), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, 8, 4, ddp_sync=False
        ),
        EVEN,
        convolutional=False,
        dtype=torch.float32,
    ),
    "AutoencoderKL's decoder": Entry(
        lambda: (
            nets.AutoencoderKL(
                3,
                1,
                1,
                (1, 1),
                (4, 4),
                (False, False),
                2,
                2,
                with_encoder_nonlocal_attn=False,
                with_decoder_nonlocal_attn=False,
            ).decoder
        ),
        (1, 2, 12, 8, 8),
    ),
    "AutoencoderKL's encoder": Entry(
        lambda: (
            nets.AutoencoderKL(
                3,
                1,
                1,
                (1, 1),
                (4, 4),
                (False, False),
                2,
                2,
                with_encoder_nonlocal_attn=False,
                with_decoder_nonlocal_attn=False,
            ).encoder
        ),
        EVEN,
    ),
    "DiffusionModelUNet": Entry(
        lambda: nets.DiffusionModelUNet(out_channels=1, attention_levels=(False, False), **DIFFUSION), EVEN, [TIME]
    ),
    "DiffusionModelUNet attention": Entry(
        lambda: nets.DiffusionModelUNet(out_channels=1, attention_levels=(False, True), **DIFFUSION),
        (1, 1, 16, 8, 8),
        [TIME],
        convolutional=False,
    ),
    "ControlNet": Entry(
        lambda: nets.ControlNet(attention_levels=(False, False), conditioning_embedding_num_channels=(4,), **DIFFUSION),
        EVEN,
        [TIME, EVEN],
    ),
    "SPADEDiffusionModelUNet": Entry(
        lambda: nets.SPADEDiffusionModelUNet(
            out_channels=1, label_nc=2, spade_intermediate_channels=4, attention_levels=(False, False), **DIFFUSION
        ),
        EVEN,
        [TIME, (1, 2, 24, 16, 16)],
    ),
    "SPADENet": Entry(
        lambda: nets.SPADENet(3, 1, 1, 2, [16, 16, 16], [8, 4], is_vae=False, spade_intermediate_channels=4),
        (1, 2, 16, 16, 16),
    ),
    "DiNTS": Entry(lambda: dints(np.ones((5, 3))), (1, 1, 32, 32, 32)),
    "DAF3D": Entry(lambda: nets.DAF3D(1, 2), (1, 1, 32, 32, 32), big=True),
    "PlainConvUNet": Entry(lambda: nnunet(PlainConvUNet), EVEN, fast=True),
    "PlainConvUNet 2D, batch norm": Entry(
        lambda: nnunet(PlainConvUNet, conv_op=nn.Conv2d, norm_op=nn.BatchNorm2d), (1, 1, 24, 16)
    ),
    "ResidualEncoderUNet": Entry(lambda: nnunet(ResidualEncoderUNet), EVEN),
    "ResidualEncoderUNet anisotropic": Entry(
        lambda: nnunet(ResidualEncoderUNet, kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]], strides=[1, [1, 2, 2], 2]),
        EVEN,
    ),
    "ResidualEncoderUNet stochastic depth": Entry(lambda: residual(stochastic_depth_p=0.3), EVEN),
    "ResidualEncoderUNet squeeze-excite": Entry(
        lambda: residual(squeeze_excitation=True, squeeze_excitation_reduction_ratio=1 / 2), EVEN
    ),
    "LinkNet, stem of stride 4": Entry(LinkNet, (1, 1, 48, 32, 32), fast=True),
    "LinkNet, odd": Entry(LinkNet, (1, 1, 61, 32, 32)),
    "nested outputs": Entry(Nested, EVEN, fast=True),
    "SwinUNETR": Entry(lambda: swin(), (1, 1, 64, 32, 32), convolutional=False, big=True),
    "SwinUNETR v2": Entry(lambda: swin(use_v2=True), (1, 1, 64, 32, 32), convolutional=False, big=True),
    "SwinUNETR 2D": Entry(lambda: swin(2), (1, 1, 64, 64), convolutional=False),
    "UNETR": Entry(lambda: nets.UNETR(1, 2, (32, 16, 16), 4, 8, 16, 2), (1, 1, 32, 16, 16), convolutional=False),
    "ViTAutoEnc": Entry(
        lambda: nets.ViTAutoEnc(1, (32, 16, 16), (16, 16, 16), hidden_size=8, mlp_dim=16, num_layers=2, num_heads=2),
        (1, 1, 32, 16, 16),
        convolutional=False,
    ),
    "Primus": Entry(lambda: Primus(1, 12, (8, 8, 8), 2, 2, 2, (32, 16, 16)), (1, 1, 32, 16, 16), convolutional=False),
}
