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
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import nn

F6, F3, S2 = (2, 2, 4, 4, 4, 2), (2, 4, 8), (2, 2)


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
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    more: Sequence[Any] = field(default_factory=tuple)
    convolutional: bool = True
    dtype: torch.dtype = torch.float64
    fast: bool = False

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


class LinkNet(nn.Module):
    """A residual LinkNet whose stem has stride 4, as published brain-extraction networks have."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv3d(1, w, 7, 4, 3, bias=False), nn.BatchNorm3d(w), nn.ReLU(inplace=True))
        self.down = nn.ModuleList(_Residual(w * 2**i, w * 2 ** (i + 1)) for i in range(2))
        self.up = nn.ModuleList(_Decode(w * 2 ** (i + 1), w * 2**i) for i in range(2))
        self.head = nn.Sequential(nn.ConvTranspose3d(w, w, 4, 4), nn.ReLU(inplace=True), nn.Conv3d(w, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = levels.pop()
        for up in reversed(self.up):
            skip = levels.pop()
            y = up(y)[..., : skip.shape[2], : skip.shape[3], : skip.shape[4]] + skip
        return self.head(y)


class _Residual(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv3d(a, b, 3, 2, 1, bias=False), nn.BatchNorm3d(b), nn.ReLU(inplace=True),
            nn.Conv3d(b, b, 3, 1, 1, bias=False), nn.BatchNorm3d(b),
        )  # fmt: skip
        self.short = nn.Conv3d(a, b, 1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.main(x) + self.short(x))


class _Decode(nn.Sequential):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(
            nn.Conv3d(a, a // 2, 1), nn.BatchNorm3d(a // 2), nn.ReLU(inplace=True),
            nn.ConvTranspose3d(a // 2, a // 2, 3, 2, 1, 1), nn.BatchNorm3d(a // 2), nn.ReLU(inplace=True),
            nn.Conv3d(a // 2, b, 1),
        )  # fmt: skip


class Nested(nn.Module):
    """A network that returns a nest of volumes, numbers and None."""

    def __init__(self) -> None:
        super().__init__()
        self.body = unet()

    def forward(self, x: torch.Tensor, weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
        y = self.body(x)
        return {"logits": y, "more": (y.sigmoid(), [None, y.mean()]), "name": "nest", "input": x}


def unet(n: int = 3, **extra: Any) -> nn.Module:
    """MONAI's UNet of three levels."""
    return nets.UNet(**{"spatial_dims": n, "in_channels": 1, "out_channels": 2, "channels": F3, "strides": S2, **extra})


def nnunet(kind: type[nn.Module], **extra: Any) -> nn.Module:
    """An nnU-Net network of three stages with deep supervision."""
    blocks = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    options: dict[str, Any] = {
        "input_channels": 1, "n_stages": 3, "features_per_stage": list(F3), "conv_op": nn.Conv3d, "kernel_sizes": 3,
        "strides": [1, 2, 2], blocks: 1, "num_classes": 2, "n_conv_per_stage_decoder": 1, "conv_bias": True,
        "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True}, "deep_supervision": True,
    }  # fmt: skip
    return kind(**{**options, **extra})


def residual(**extra: Any) -> nn.Module:
    """A ResidualEncoderUNet whose encoder has options that its own constructor does not pass on."""
    network = nnunet(ResidualEncoderUNet)
    network.encoder = ResidualEncoder(
        1, 3, list(F3), nn.Conv3d, 3, [1, 2, 2], 1, True, nn.InstanceNorm3d, {"affine": True}, nonlin=nn.LeakyReLU,
        return_skips=True, **extra,
    )  # fmt: skip
    return network


def swin(n: int = 3, **extra: Any) -> nn.Module:
    """SwinUNETR."""
    return nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=n, **extra)


def dints() -> nn.Module:
    """DiNTS with a searched topology."""
    space = nets.TopologyInstance(
        channel_mul=0.2, num_blocks=4, num_depths=3, use_downsample=True,
        arch_code=[np.ones((4, 7)), np.ones((4, 7, 5))], device="cpu",
    )  # fmt: skip
    return nets.DiNTS(space, 1, 2, use_downsample=True, node_a=torch.ones(5, 3))


DIFFUSION = dict(
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
        lambda: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[2, 4, 8], deep_supervision=True), EVEN, fast=True
    ),
    "DynUNet residual anisotropic": Entry(
        lambda: nets.DynUNet(3, 1, 2, [[1, 3, 3], 3, 3], [1, [1, 2, 2], 2], [[1, 2, 2], 2], filters=[2, 4, 8], res_block=True), EVEN
    ),
    "AttentionUnet": Entry(lambda: nets.AttentionUnet(3, 1, 2, F3, S2), EVEN),
    "SegResNet": Entry(lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)), EVEN),
    "SegResNet deconv, instance": Entry(
        lambda: nets.SegResNet(init_filters=4, blocks_down=(1, 1), blocks_up=(1,), norm="instance", upsample_mode="deconv"), EVEN
    ),
    "SegResNet pixelshuffle": Entry(
        lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), upsample_mode="pixelshuffle"), EVEN
    ),
    "SegResNetDS": Entry(lambda: nets.SegResNetDS(init_filters=4, blocks_down=(1, 1, 1), dsdepth=2), EVEN),
    "SegResNetDS2 (VISTA3D's encoder)": Entry(lambda: nets.SegResNetDS2(init_filters=4, blocks_down=(1, 1, 1), dsdepth=2), EVEN),
    "SegResNetVAE": Entry(
        lambda: nets.SegResNetVAE((16, 16, 16), vae_nz=4, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)), (1, 1, 16, 16, 16)
    ),
    "VNet": Entry(lambda: nets.VNet(), (1, 1, 32, 16, 16)),
    "HighResNet": Entry(
        lambda: nets.HighResNet(layer_params=(
            {"name": "conv_0", "n_features": 4, "kernel_size": 3},
            {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
            {"name": "res_2", "n_features": 4, "kernels": (3, 3), "repeat": 1},
            {"name": "conv_1", "n_features": 4, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        )), ODD, fast=True,
    ),
    "MedNeXt": Entry(lambda: nets.MedNeXt(init_filters=2, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1)), UP),
    "MedNeXt with GRN, 5^3, deep supervision": Entry(
        lambda: nets.MedNeXt(init_filters=2, kernel_size=5, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1),
                             global_resp_norm=True, deep_supervision=True, use_residual_connection=True), UP
    ),
    "FlexibleUNet": Entry(lambda: nets.FlexibleUNet(1, 2, "resnet10", spatial_dims=3, decoder_channels=(8, 8, 4, 4, 4)), UP),
    "RegUNet": Entry(lambda: nets.RegUNet(3, 1, 2, 2, extract_levels=[0, 1, 2]), EVEN),
    "LocalNet": Entry(lambda: nets.LocalNet(3, 1, 2, (0, 1, 2)), EVEN),
    "GlobalNet": Entry(lambda: nets.GlobalNet([24, 16, 16], 3, 1, 2, 2), EVEN, convolutional=False, dtype=torch.float32),
    "VoxelMorphUNet": Entry(lambda: nets.VoxelMorphUNet(3, 2, 3, (2, 2, 2, 2), (2, 2)), (1, 2, 24, 16, 16)),
    "VoxelMorph": Entry(
        lambda: nets.VoxelMorph(nets.VoxelMorphUNet(3, 2, 3, (2, 2, 2, 2), (2, 2)), integration_steps=2), EVEN, [EVEN], convolutional=False
    ),
    "Quicknat 2D": Entry(lambda: nets.Quicknat(2, 1, 4, se_block="None"), (1, 1, 32, 32)),
    "AHNet": Entry(lambda: nets.AHNet(layers=(1, 1, 1, 1), psp_block_num=2), (1, 1, 32, 32, 32)),
    "AutoEncoder": Entry(lambda: nets.AutoEncoder(3, 1, 1, (2, 4), S2, num_res_units=1), EVEN),
    "VQVAE": Entry(
        lambda: nets.VQVAE(3, 1, 1, (4, 4), 1, (4, 4), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, 8, 4, ddp_sync=False), EVEN,
        convolutional=False, dtype=torch.float32,
    ),
    "AutoencoderKL's decoder": Entry(
        lambda: nets.AutoencoderKL(3, 1, 1, (1, 1), (4, 4), (False, False), 2, 2, with_encoder_nonlocal_attn=False,
                                   with_decoder_nonlocal_attn=False).decoder, (1, 2, 12, 8, 8)
    ),
    "AutoencoderKL's encoder": Entry(
        lambda: nets.AutoencoderKL(3, 1, 1, (1, 1), (4, 4), (False, False), 2, 2, with_encoder_nonlocal_attn=False,
                                   with_decoder_nonlocal_attn=False).encoder, EVEN
    ),
    "DiffusionModelUNet": Entry(lambda: nets.DiffusionModelUNet(out_channels=1, attention_levels=(False, False), **DIFFUSION), EVEN, [TIME]),
    "DiffusionModelUNet attention": Entry(
        lambda: nets.DiffusionModelUNet(out_channels=1, attention_levels=(False, True), **DIFFUSION), (1, 1, 16, 8, 8), [TIME], convolutional=False
    ),
    "ControlNet": Entry(
        lambda: nets.ControlNet(attention_levels=(False, False), conditioning_embedding_num_channels=(4,), **DIFFUSION), EVEN, [TIME, EVEN]
    ),
    "SPADEDiffusionModelUNet": Entry(
        lambda: nets.SPADEDiffusionModelUNet(out_channels=1, label_nc=2, spade_intermediate_channels=4, attention_levels=(False, False), **DIFFUSION),
        EVEN, [TIME, (1, 2, 24, 16, 16)],
    ),
    "SPADENet": Entry(lambda: nets.SPADENet(3, 1, 1, 2, [16, 16, 16], [8, 4], is_vae=False, spade_intermediate_channels=4), (1, 2, 16, 16, 16)),
    "DiNTS": Entry(dints, (1, 1, 32, 32, 32)),
    "DAF3D": Entry(lambda: nets.DAF3D(1, 2), (1, 1, 32, 32, 32)),
    "PlainConvUNet": Entry(lambda: nnunet(PlainConvUNet), EVEN, fast=True),
    "PlainConvUNet 2D, batch norm": Entry(
        lambda: nnunet(PlainConvUNet, conv_op=nn.Conv2d, norm_op=nn.BatchNorm2d), (1, 1, 24, 16)
    ),
    "ResidualEncoderUNet": Entry(lambda: nnunet(ResidualEncoderUNet), EVEN),
    "ResidualEncoderUNet anisotropic": Entry(
        lambda: nnunet(ResidualEncoderUNet, kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]], strides=[1, [1, 2, 2], 2]), EVEN
    ),
    "ResidualEncoderUNet stochastic depth": Entry(lambda: residual(stochastic_depth_p=0.3), EVEN),
    "ResidualEncoderUNet squeeze-excite": Entry(
        lambda: residual(squeeze_excitation=True, squeeze_excitation_reduction_ratio=1 / 2), EVEN
    ),
    "LinkNet, stem of stride 4": Entry(LinkNet, (1, 1, 48, 32, 32), fast=True),
    "LinkNet, odd": Entry(LinkNet, (1, 1, 61, 32, 32)),
    "nested outputs": Entry(Nested, EVEN, fast=True),
    "SwinUNETR": Entry(lambda: swin(), (1, 1, 64, 32, 32), convolutional=False),
    "SwinUNETR v2": Entry(lambda: swin(use_v2=True), (1, 1, 64, 32, 32), convolutional=False),
    "SwinUNETR 2D": Entry(lambda: swin(2), (1, 1, 64, 64), convolutional=False),
    "UNETR": Entry(lambda: nets.UNETR(1, 2, (32, 16, 16), 4, 8, 16, 2), (1, 1, 32, 16, 16), convolutional=False),
    "ViTAutoEnc": Entry(lambda: nets.ViTAutoEnc(1, (32, 16, 16), (16, 16, 16), hidden_size=8, mlp_dim=16, num_layers=2, num_heads=2), (1, 1, 32, 16, 16), convolutional=False),
    "Primus": Entry(lambda: Primus(1, 12, (8, 8, 8), 2, 2, 2, (32, 16, 16)), (1, 1, 32, 16, 16), convolutional=False),
}  # fmt: skip
