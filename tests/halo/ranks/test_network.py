"""Networks of both hosts in parts: outputs, gradients and running statistics are those of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import monai.networks.nets as nets
import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch import nn

from tests.halo.networks import NETWORKS, unet
from tests.halo.ranks.compare import worst


def without_dropout(network: nn.Module) -> nn.Module:
    """The network with all rates at zero: its parts draw other masks than the whole."""
    for module in network.modules():
        if isinstance(module, nn.Dropout3d):
            module.p = 0.0
    return network


def squeezed() -> nn.Module:
    """A residual encoder with squeeze-excitation and anisotropic kernels."""
    channels, kernels, strides = [4, 8, 8], [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    common: dict[str, Any] = {
        "conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    network = ResidualEncoderUNet(1, 3, channels, nn.Conv3d, kernels, strides, 1, 2, 1, deep_supervision=True, **common)
    network.encoder = ResidualEncoder(
        1, 3, channels, nn.Conv3d, kernels, strides, 1, return_skips=True, squeeze_excitation=True,
        squeeze_excitation_reduction_ratio=0.5, **common,
    )  # fmt: skip
    return network


RESIDUAL = (
    {"name": "conv_0", "n_features": 4, "kernel_size": 3},
    {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
    {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
    {"name": "conv_1", "n_features": 8, "kernel_size": 1},
    {"name": "conv_2", "kernel_size": 1},
)
MORE: dict[str, Callable[[], nn.Module]] = {
    "UNet kernel 5": lambda: unet(kernel_size=5),
    "MedNeXt": lambda: nets.MedNeXt(3, 4, 1, 2, blocks_down=(1,), blocks_bottleneck=1, blocks_up=(1,)),
    "HighResNet": lambda: nets.HighResNet(3, 1, 2, layer_params=RESIDUAL),
    "VNet": lambda: without_dropout(nets.VNet(3, 1, 2)),
    "ResidualEncoderUNet, squeeze-excite, anisotropic": lambda: squeezed(),
}  # fmt: skip
SIZES = {"BasicUNet": (32, 16, 16), "MedNeXt": (32, 16, 16), "SegResNetDS": (32, 16, 16), "VNet": (32, 16, 16)}


def volume(*shape: int) -> torch.Tensor:
    """Random values that are the same in every test."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in float64, with the same weights each time."""
    torch.manual_seed(3)
    return make().double()


@pytest.mark.parametrize("name", [*NETWORKS, *MORE])
@pytest.mark.long
def test_two_parts_equal_the_whole(name: str) -> None:
    space = next((s for prefix, s in SIZES.items() if name.startswith(prefix)), (20, 8, 8))
    assert worst(made({**NETWORKS, **MORE}[name]), [volume(2, 1, *space)]) < 1e-10


@pytest.mark.parametrize("name", ["UNet instance", "DynUNet", "ResidualEncoderUNet"])
@pytest.mark.slow
def test_a_mesh_of_two_by_two(name: str) -> None:
    assert worst(made(NETWORKS[name]), [volume(2, 1, 16, 12, 8)], (2, 2)) < 1e-10


@pytest.mark.parametrize("name", ["UNet group", "UNet batch", "PlainConvUNet"])
@pytest.mark.parametrize(("space", "spatial", "axes"), [
    ((16, 8, 8), (4,), None),  # one row per part at the bottom
    ((8, 8, 20), (3,), (2,)),  # uneven
    ((8, 8, 8), (7,), None),  # empty parts at every level but the first
])  # fmt: skip
@pytest.mark.long
def test_few_rows_per_part(name: str, space: Sequence[int], spatial: Sequence[int], axes: Any) -> None:
    assert worst(made(NETWORKS[name]), [volume(1, 1, *space)], spatial, axes) < 1e-10


def test_three_axes_at_once() -> None:
    assert worst(made(unet), [volume(1, 1, 8, 12, 8)], (2, 3, 2)) < 1e-10


@pytest.mark.slow
def test_a_size_that_no_stride_divides() -> None:
    network = made(lambda: nets.BasicUNet(features=(2, 2, 4, 4, 4, 2)))
    assert worst(network, [volume(1, 1, 35, 19, 18)], (3,)) < 1e-10


class Calls(nn.Module):
    """A function between two convolutions."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.call = nn.Conv3d(1, 4, 3, padding=1), nn.LazyConv3d(2, 3, padding=1), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.call(self.first(x)))


def edited(x: torch.Tensor) -> torch.Tensor:
    """In-place work on views of a normalized tensor."""
    y = F.instance_norm(x)
    torch.relu_(y[:, :2])
    return y


def coordinates(x: torch.Tensor) -> torch.Tensor:
    """The position along the first spatial axis as a channel."""
    line = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype, device=x.device)
    return torch.cat([x, line.view(1, 1, -1, 1, 1).expand(x.shape[0], 1, *x.shape[2:])], 1)


def spread_out(x: torch.Tensor) -> torch.Tensor:
    """A pooled vector next to the volume."""
    return x + F.adaptive_avg_pool3d(x, 1).expand_as(x) * x.mean((2, 3, 4), keepdim=True)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "in place": edited,
    "coordinates": coordinates,
    "size": lambda x: x / x.size(2) if x.shape[2] > 12 else x,
    "resize to a number": lambda x: F.interpolate(x, size=(16, 8, 8), mode="trilinear"),
    "nearest by a factor": lambda x: F.interpolate(x, scale_factor=1.3),
    "pooled": spread_out,
    "std": lambda x: x / x.std(True) + x.amax(()),
    "mean over no dimension": lambda x: x - x.mean(dim=()),
    "flip": lambda x: x.flip(2),
    "roll": lambda x: torch.roll(x, 3, 2),
    "slice": lambda x: x[:, :, 3:11],
    "softmax over rows": lambda x: x.softmax(2),
    "cumulative sum": lambda x: x.cumsum(2),
    "flatten": lambda x: x.flatten(2).mean(-1)[:, :, None, None, None] * x,
    "local constant": lambda x: x + torch.arange(x.numel(), dtype=x.dtype).view(x.shape) / x.numel(),
    "max of each channel": lambda x: x * x.amax((2, 3, 4), keepdim=True),
    "circular padding": lambda x: F.pad(x, (1, 1, 2, 2, 3, 2), mode="circular"),
    "reflection": lambda x: F.pad(x, (1, 1, 2, 2, 4, 2), mode="reflect"),
    "max-pooling with ceil": lambda x: F.max_pool3d(x, 3, 2, 1, ceil_mode=True),
    "average pooling": lambda x: F.avg_pool3d(x, 3, 2, 1, count_include_pad=False),
    "adaptive pooling": lambda x: F.adaptive_avg_pool3d(x, (5, 4, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_what_python_code_sees_is_the_whole(kind: str) -> None:
    network = Calls(KINDS[kind]).double()
    x = volume(1, 1, 14, 6, 5)
    network(x)
    assert worst(network, [x], (3,)) < 1e-10


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "padding beyond the kernel": lambda: [nn.Conv3d(1, 2, (1, 3, 3), padding=1), nn.Conv3d(2, 2, 3, padding=1)],
    "stride 3": lambda: [nn.Conv3d(1, 2, 1, stride=3)],
    "half-affine": lambda: [nn.Conv3d(1, 4, 3), nn.GroupNorm(2, 4, bias=False) if _HALF else nn.GroupNorm(2, 4)],
    "kernel 5, stride 2": lambda: [nn.InstanceNorm3d(1), nn.Conv3d(1, 4, 5, 2, 2)],
    "kernel 7, stride 4": lambda: [nn.InstanceNorm3d(1), nn.Conv3d(1, 4, 7, 4, 3)],
    "circular": lambda: [nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular"), nn.Conv3d(2, 2, 3)],
    "transposed": lambda: [nn.ConvTranspose3d(1, 3, 4, 2, 1), nn.InstanceNorm3d(3), nn.Conv3d(3, 2, 3, padding=2)],
    "transposed, output padding": lambda: [nn.ConvTranspose3d(1, 2, 3, 2, 1, 1), nn.Conv3d(2, 2, 2)],
    "dilated": lambda: [nn.Conv3d(1, 2, 3, padding=4, dilation=4), nn.PReLU()],
    "running statistics": lambda: [nn.BatchNorm3d(1), nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2, affine=False)],
}
_HALF = "bias" in nn.GroupNorm.__init__.__code__.co_varnames


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.slow
def test_layers_whose_cuts_do_not_align(name: str, parts: int) -> None:
    assert worst(made(lambda: nn.Sequential(*LAYERS[name]())), [volume(2, 1, 18, 9, 9)], (parts,)) < 1e-10


class OfTwoNames(nn.Module):
    """An encoder that its decoder holds too, as in nnU-Net's networks; each of its tensors has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2))
        self.decoder = nn.ModuleDict({"encoder": self.encoder, "last": nn.Conv3d(2, 2, 3, padding=1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Called by either name."""
        return self.decoder["last"](self.encoder(x)) + self.decoder["encoder"](x)


@pytest.mark.slow
def test_a_batch_norm_of_two_names() -> None:
    assert worst(made(OfTwoNames), [volume(2, 1, 9, 4, 5)], (2,)) < 1e-10


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.slow
def test_fewer_dimensions(ndim: int) -> None:
    network = nets.UNet(ndim, 1, 2, (2, 4, 8), (2, 2), num_res_units=1)
    assert worst(copy.deepcopy(network).double(), [volume(2, 1, *(20, 12)[:ndim])]) < 1e-10


@pytest.mark.parametrize("segments", [2, 4])
@pytest.mark.slow
def test_segments_are_recomputed(segments: int) -> None:
    for name in ("UNet batch", "ResidualEncoderUNet"):
        assert worst(made(NETWORKS[name]), [volume(2, 1, 12, 8, 8)], (3,), checkpoint_segments=segments) < 1e-10
