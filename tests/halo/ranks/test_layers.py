"""Layers over ranks against torch's own on the whole: forward and gradients, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from monai_memeff.halo.planning.rules.windowed.kernels import convolve_backward
from monai_memeff.halo.run.ranks import schedule
from tests.halo.ranks.compare import worst


def error(
    network: nn.Module, shape: tuple[int, ...], spatial: tuple[int, ...], axes: tuple[int, ...] | None = None
) -> float:
    """The largest relative error of forward and gradients, in float64."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return worst(network.double(), [x], spatial, axes)


def after_conv(*layers: nn.Module) -> nn.Sequential:
    """The layers between two convolutions, so that their input and output are looked past the edge."""
    return nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), *layers, nn.Conv3d(2, 2, 1))


def averaged() -> nn.BatchNorm3d:
    """A batch norm that has averaged over three steps."""
    norm = nn.BatchNorm3d(2, momentum=None)
    norm.num_batches_tracked.fill_(3)
    norm.running_var.fill_(2.5)
    return norm


LAYERS = {
    "conv k5": nn.Conv3d(2, 2, 5, padding=2),
    "conv k5 dilated": nn.Conv3d(2, 2, 5, padding=4, dilation=2),
    "conv k3 dilated by 3": nn.Conv3d(2, 2, 3, padding=3, dilation=3),
    "conv even kernel": nn.Conv3d(2, 2, 4, stride=2, padding=1),
    "conv k2 without padding": nn.Conv3d(2, 2, 2),
    "conv k3 without padding": nn.Conv3d(2, 2, 3),
    "conv same even": nn.Conv3d(2, 2, 4, padding="same"),
    "conv groups": nn.Conv3d(2, 2, 3, padding=1, groups=2),
    "conv anisotropic": nn.Conv3d(2, 2, (1, 3, 5), (1, 2, 1), (0, 1, 2)),
    "conv stride 2": nn.Conv3d(2, 2, 3, 2, 1),
    "conv stride 3": nn.Conv3d(2, 2, 3, 3, 1),
    "conv reflect": nn.Conv3d(2, 2, 5, padding=2, padding_mode="reflect"),
    "conv replicate": nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"),
    "conv circular": nn.Conv3d(2, 2, 5, padding=2, padding_mode="circular"),
    "transposed k2s2": nn.ConvTranspose3d(2, 2, 2, 2),
    "transposed k3s2": nn.ConvTranspose3d(2, 2, 3, 2, 1, 1),
    "transposed k4s2": nn.ConvTranspose3d(2, 2, 4, 2, 1),
    "transposed k3s1": nn.ConvTranspose3d(2, 2, 3, 1, 1),
    "transposed k5s2": nn.ConvTranspose3d(2, 2, 5, 2, 2, 1),
    "max k2": nn.MaxPool3d(2),
    "max k3s2": nn.MaxPool3d(3, 2, 1),
    "max ceil": nn.MaxPool3d(3, 2, ceil_mode=True),
    "max dilated": nn.MaxPool3d(3, 1, 1, dilation=2),
    "average k3s2": nn.AvgPool3d(3, 2, 1),
    "average without padding in the count": nn.AvgPool3d(3, 2, 1, count_include_pad=False),
    "average ceil": nn.AvgPool3d(3, 2, 1, ceil_mode=True),
    "average divisor": nn.AvgPool3d(2, 2, divisor_override=3),
    "instance": nn.InstanceNorm3d(2, affine=True),
    "batch": nn.BatchNorm3d(2),
    "batch averaged": averaged(),
    "group": nn.GroupNorm(1, 2),
    "nearest": nn.Upsample(scale_factor=2),
    "nearest-exact": nn.Upsample(scale_factor=(2, 1, 2), mode="nearest-exact"),
    "trilinear": nn.Upsample(scale_factor=2, mode="trilinear"),
    "trilinear corners": nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True),
    "trilinear by 1.5": nn.Upsample(scale_factor=1.5, mode="trilinear"),
    "to a size": nn.Upsample(size=(30, 7, 9), mode="trilinear"),
    "adaptive average": nn.AdaptiveAvgPool3d((6, 3, 2)),
    "adaptive maximum": nn.AdaptiveMaxPool3d((6, 3, 2)),
    "prelu": nn.PReLU(),
    "softmax": nn.Softmax(dim=1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mesh", [((2,), (0,)), ((3, 2), (0, 1))], ids=["1D", "2D"])
@pytest.mark.long
def test_layer_equals_the_whole(name: str, mesh: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), LAYERS[name])
    shape = (2, 1, 18, 12, 7) if "circular" not in name else (2, 1, 18, 12, 8)
    assert error(network, shape, *mesh) < 1e-10


WINDOWS = [
    *[(3, 1, 1, 1), (5, 1, 1, 2), (7, 1, 1, 1), (3, 2, 1, 1), (5, 2, 1, 1), (5, 3, 1, 1), (3, 1, 2, 2), (5, 1, 3, 1)],
    *[(3, 2, 2, 1), (7, 3, 2, 1), (3, 3, 3, 1)],
]


@pytest.mark.parametrize(("kernel", "stride", "dilation", "groups"), WINDOWS)
@pytest.mark.long
def test_rims_add_what_the_window_would_hold(
    kernel: int, stride: int, dilation: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions whose parts are aligned: own rows are convolved while the neighbors' rows travel."""
    taken: list[Any] = []
    plain = schedule.rim_convolution
    monkeypatch.setattr(schedule, "rim_convolution", lambda *args: (taken.append(plain(*args)), taken[-1])[1])
    pad = dilation * (kernel - 1) // 2
    layers = [nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, kernel, stride, pad, dilation, groups, bias=groups == 1)]
    assert error(nn.Sequential(*layers), (2, 1, 48, 7), (4,)) < 1e-10
    assert sum(found is not None for found in taken) == 4
    assert error(nn.Sequential(*layers), (1, 1, 7, 36), (3,), (1,)) < 1e-10
    for parameter in layers[0].parameters():
        parameter.requires_grad_(False)
    assert error(nn.Sequential(*layers), (1, 1, 31, 6), (3,)) < 1e-10


@pytest.mark.parametrize(("kernel", "dilation", "size"), [(3, 3, 2), (3, 4, 5), (5, 2, 3), (5, 3, 7)])
@pytest.mark.slow
def test_a_dilated_kernel_steps_over_a_rim(kernel: int, dilation: int, size: int) -> None:
    layer = nn.Conv2d(2, 2, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation)
    assert error(nn.Sequential(nn.Conv2d(1, 2, 1), layer), (2, 1, size, 5), (2,)) < 1e-10


@pytest.mark.parametrize("size", [(8, 9, 7), (8, 60, 60)])
@pytest.mark.slow
def test_gradients_by_onednn_are_torchs_own(size: tuple[int, ...]) -> None:
    """Of a volume for which torch takes its slow kernel, and of one for which it takes oneDNN itself."""
    x, weight, gradient = torch.randn(1, 6, *size), torch.randn(4, 3, 3, 3, 3), torch.randn(1, 4, *size)
    rest = ([1, 1, 1], [1, 1, 1], [1, 1, 1], 2)
    wide = torch.ops.aten.convolution_backward(
        *(t.double() for t in (gradient, x, weight)), [4], *rest[:3], False, [0, 0, 0], 2, (True, True, True)
    )
    found = convolve_backward(gradient, x, weight, (True, True, True), *rest)
    for a, b in zip(found, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    assert convolve_backward(gradient, x, weight, (False, True, False), *rest)[0] is None


@pytest.mark.slow
def test_small_volumes_in_single_precision() -> None:
    layers = [nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 3, 2, 1)]
    assert worst(nn.Sequential(*layers), [torch.randn(1, 1, 16, 9, 7)], (2,)) < 1e-5


@pytest.mark.parametrize("maximum", [False, True])
def test_squeeze_and_excitation_by_global_pooling(maximum: bool) -> None:
    class Excite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveMaxPool3d(1) if maximum else nn.AdaptiveAvgPool3d(1)
            self.fc, self.conv = nn.Linear(2, 2), nn.Conv3d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = self.pool(x)
            weights = torch.sigmoid(self.fc(pooled.flatten(1))).view(x.shape[0], 2, 1, 1, 1)
            return x * weights + self.conv(pooled)

    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), Excite(), nn.Conv3d(2, 2, 3, padding=1))
    assert error(network, (1, 1, 12, 6, 5), (3,)) < 1e-10


@pytest.mark.slow
def test_a_kernel_wider_than_the_neighbor_is_served_by_the_one_behind() -> None:
    assert (
        error(nn.Sequential(nn.Conv3d(1, 2, 9, padding=4), nn.Conv3d(2, 1, 7, padding=3)), (1, 1, 8, 6, 6), (4,))
        < 1e-10
    )
    assert error(nn.Sequential(nn.Conv3d(1, 1, 7, padding=3)), (1, 1, 6, 9, 6), (3, 3)) < 1e-10


@pytest.mark.slow
def test_two_dimensional_networks() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.InstanceNorm2d(2), nn.ConvTranspose2d(2, 1, 3, 2, 1, 1))
    assert error(network, (1, 1, 16, 12), (2, 2)) < 1e-10
