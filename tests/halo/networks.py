"""Small networks of both hosts, and the scripts that the how-tos show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import monai.networks.nets as nets
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

HOWTOS = Path(__file__).parents[2] / "docs" / "howto"
FEATURES = (2, 2, 4, 4, 4, 2)


def unet(norm: str | tuple = "instance", **extra: object) -> nn.Module:
    """MONAI UNet with three levels."""
    return nets.UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(2, 4, 8),
        strides=(2, 2),
        num_res_units=1,
        norm=norm,
        **extra,
    )


def nnunet(kind: type[nn.Module], **blocks: int) -> nn.Module:
    """An nnU-Net network with deep supervision, three stages."""
    return kind(
        1, 3, [2, 4, 8], nn.Conv3d, 3, [1, 2, 2], num_classes=2, n_conv_per_stage_decoder=1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True, **blocks,
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet instance": unet,
    "UNet batch": lambda: unet("batch"),
    "UNet group": lambda: unet(("group", {"num_groups": 2})),
    "BasicUNet deconv": lambda: nets.BasicUNet(features=FEATURES),
    "BasicUNet nontrainable": lambda: nets.BasicUNet(features=FEATURES, upsample="nontrainable"),
    "SegResNet": lambda: nets.SegResNet(init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    "SegResNetDS": lambda: nets.SegResNetDS(init_filters=4, blocks_down=(1, 1, 1)),
    "DynUNet": lambda: nets.DynUNet(
        3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[2, 4, 8], deep_supervision=True, deep_supr_num=1
    ),
    "AttentionUnet": lambda: nets.AttentionUnet(3, 1, 2, (2, 4, 8), (2, 2)),
    "BasicUNetPlusPlus": lambda: nets.BasicUNetPlusPlus(features=FEATURES),
    "PlainConvUNet": lambda: nnunet(PlainConvUNet, n_conv_per_stage=1),
    "ResidualEncoderUNet": lambda: nnunet(ResidualEncoderUNet, n_blocks_per_stage=1),
}


def snippets(page: str) -> list[str]:
    """The Python scripts on a page of the how-tos."""
    return re.findall(r"```python\n(.*?)```", (HOWTOS / page).read_text(encoding="utf-8"), re.DOTALL)
