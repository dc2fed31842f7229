"""`estimate_network` for the systems: the prediction is what a real call takes, and budgets are kept when run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet, SegResNet, UNet
from torch import Tensor, nn

from monai_memeff.clstm import CLSTMUNet
from monai_memeff.errors import InputError
from monai_memeff.memory import estimate_network, measure_peak
from monai_memeff.memory.step import run_step
from monai_memeff.occupancy import OccupancyNet
from monai_memeff.occupancy.estimate import _loss
from monai_memeff.sparse import SparseUNet

SHAPE = (1, 1, 40, 24, 32)


def unet() -> UNet:
    return UNet(3, 1, 2, (4, 8, 8), (2, 2), num_res_units=1).eval()


class Balls(OccupancyNet):
    """Answers as a trained network would: few boundaries."""

    def query(self, latent: Any, points: Tensor, volume: Tensor) -> Tensor:
        last = torch.tensor([n - 1.0 for n in volume.shape[2:]])
        radius = (2 * points / last - 1).norm(dim=-1, keepdim=True)
        wanted = (self.out_channels * (1 - 2 * radius)).clamp(0, self.out_channels - 1)
        balls = -(torch.arange(self.out_channels) - wanted).abs()
        return super().query(latent, points, volume) * 1e-6 + balls


def head(extents: tuple[int, ...]) -> Tensor:
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in extents), indexing="ij")
    radius = sum(axis**2 for axis in axes) ** 0.5
    return ((radius - 0.8).abs() < 0.1)[None, None] * (0.5 + torch.rand(1, 1, *extents))


def peak_of(call: Any) -> int:
    with torch.no_grad(), measure_peak() as meter:
        call()
    return meter.peak_bytes


@pytest.mark.slow
def test_halos_plan_is_the_one_that_is_executed() -> None:
    network = unet()
    found = estimate_network(network, SHAPE, system="halo")
    result = found.inferer(torch.rand(SHAPE), network)
    assert result.shape == found.output_shape
    assert [plan for _, plan in found.inferer._plans.values()] == [found.plan]
    assert found.inferer.last_report.device_peak_bytes == pytest.approx(found.peak_bytes, rel=0.02)
    assert found.host_bytes == found.plan.store_bytes == found.inferer.last_report.store_bytes
    assert found.setting["partitions"] == 8
    assert 1 <= found.relative_time < 2


def padded() -> BasicUNet:
    return BasicUNet(features=(4, 4, 8, 8, 8, 4)).eval()  # pads its skips


@pytest.mark.long
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("build", [unet, padded], ids=["UNet", "BasicUNet"])
def test_halo_keeps_every_budget(build: Any) -> None:
    network, volume = build(), torch.rand(SHAPE)
    whole = estimate_network(network, SHAPE).peak_bytes
    places = set()
    for share in (1.5, 1.0, 0.6, 0.3):
        found = estimate_network(network, SHAPE, system="halo", memory_budget=int(share * whole))
        assert peak_of(lambda f=found: f.inferer(volume, network)) <= share * whole
        assert found.peak_bytes + found.host_bytes <= share * whole
        places.add(found.disk_bytes > 0)
    assert places == {False, True}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.long
def test_a_recurrent_network_is_predicted(training: bool) -> None:
    network = CLSTMUNet(channels=(4, 8), hidden_channels=2, out_channels=3, norm="instance").train(training)
    shape = (1, 1, 12, 16, 49)
    found = estimate_network(network, shape, training=training, system="clstm")
    volume = torch.rand(shape)
    if training:
        with measure_peak() as meter:
            run_step(network, volume, True)
        peak = meter.peak_bytes
    else:
        peak = peak_of(lambda: found.inferer(volume, network))
        assert found.setting == {"slab": 16}
    assert found.peak_bytes == pytest.approx(peak, rel=0.05)


@pytest.mark.long
def test_slabs_shrink_to_a_budget() -> None:
    network = CLSTMUNet(channels=(4, 8), hidden_channels=2, out_channels=3, norm="instance").eval()
    shape = (1, 1, 12, 16, 24)
    free = estimate_network(network, shape, system="clstm").peak_bytes
    found = estimate_network(network, shape, system="clstm", memory_budget=int(0.97 * free))
    assert found.setting["slab"] < 16
    volume = torch.rand(shape)
    assert peak_of(lambda: found.inferer(volume, network)) <= 0.97 * free


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_a_network_of_points_is_predicted_or_bounded(training: bool) -> None:
    network = Balls(1, 3, channels=(4, 8)).train(training)
    found = estimate_network(network, SHAPE, training=training, system="occupancy")
    volume = torch.rand(SHAPE)
    if training:
        points = torch.rand(1, 2**14, 3) * 20
        with measure_peak() as meter:
            _loss(network(volume, points)).backward()
        peak = meter.peak_bytes
    else:
        peak = peak_of(lambda: found.inferer(volume, network))
    if training:
        assert found.peak_bytes == pytest.approx(peak, rel=0.1)
    else:  # a bound where no image says where the border is
        assert peak <= found.peak_bytes


@pytest.mark.long
def test_points_shrink_to_a_budget() -> None:
    network = Balls(1, 3, channels=(4, 8)).eval()
    free = estimate_network(network, SHAPE, system="occupancy").peak_bytes
    found = estimate_network(network, SHAPE, system="occupancy", memory_budget=free // 2)
    assert found.setting["points_per_pass"] < 2**14
    volume = torch.rand(SHAPE)
    assert peak_of(lambda: found.inferer(volume, network)) <= free // 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.long
def test_a_sparse_network_is_predicted_at_the_images_occupancy(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_memeff.sparse.estimate.ENOUGH", 2**18)
    torch.manual_seed(0)
    image = head((96, 80, 64))
    network = SparseUNet(3, 1, 2, (4, 8, 8), (2, 2), num_res_units=1)
    found = estimate_network(network, tuple(image.shape), training=training, system="sparse", image=image)
    with measure_peak() as meter:
        run_step(network, image, training)
    assert found.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.1)
    assert "and a line" in found.basis


@pytest.mark.slow
def test_twins_have_the_channels_and_classes_of_the_dense_network() -> None:
    dense = UNet(3, 2, 5, (4, 8), (2,)).eval()
    for system, name in (("sparse", "SparseUNet"), ("occupancy", "OccupancyNet")):
        found = estimate_network(dense, (1, 2, 16, 16, 12), system=system)
        assert found.network == name
        assert found.output_shape == (1, 5, 16, 16, 12)
        assert found.relative_time > 0
        assert found.notes


class Squares(nn.Module):
    """Gives one number for a volume."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("network", "arguments", "words"),
    [
        (unet(), {"system": "halo", "training": True}, "streams inference through one"),
        (unet(), {"system": "halo", "memory_budget": 1024}, "conv3d.* needs .* bytes even in .* tiles"),
        (unet(), {"system": "sparse", "memory_budget": 1024}, "memory_budget is 1024: crop"),
        (unet(), {"system": "sparse", "image": torch.ones(1, 1, 8, 8, 8)}, "the image .* has the shape"),
        (SegResNet(), {"system": "sparse"}, "switches MONAI's UNet for volumes and no other network, got SegResNet"),
        (UNet(3, 1, 2, (4, 8), (2,), act="celu"), {"system": "sparse"}, "sparse has no twin of this UNet"),
        (Squares(), {"system": "occupancy"}, "number of classes is not known"),
    ],
)
@pytest.mark.slow
def test_what_does_not_suit_is_refused_in_one_line(network: nn.Module, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        estimate_network(network, SHAPE, **arguments)
    assert "\n" not in str(caught.value)
