"""Streaming a volume through one device: equal to the whole, peak bounded by the parts, host memory by a folder."""

from __future__ import annotations

from pathlib import Path

import monai.networks.nets as nets
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from monai_memeff.halo.inferer import whole_peak_bytes
from monai_memeff.memory.meter import measure_peak
from tests.halo.networks import NETWORKS, snippets, unet


def whole(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Ordinary inference."""
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize("name", ["UNet instance", "UNet batch", "UNet group", "BasicUNet nontrainable", "SegResNet"])
@pytest.mark.parametrize("partitions", [2, 4])
@pytest.mark.slow
def test_equal_to_the_whole_volume(name: str, partitions: int) -> None:
    network, x = NETWORKS[name]().double().eval(), torch.randn(1, 1, 64, 16, 16, dtype=torch.float64)
    inferer = SpatialPartitionInferer(partitions)
    expected = whole(network, x)
    torch.testing.assert_close(inferer(x, network), expected, atol=1e-11, rtol=0)
    report = inferer.last_report
    assert report is not None
    assert report.partitions == partitions
    assert 0.9 * report.planned_peak_bytes <= report.device_peak_bytes <= report.planned_peak_bytes


@pytest.mark.slow
def test_float32_and_uneven_parts_along_another_axis() -> None:
    network, x = NETWORKS["PlainConvUNet"]().eval(), torch.randn(2, 1, 8, 12, 44)
    got = SpatialPartitionInferer(5, axis=2)(x, network)
    for a, b in zip(got, whole(network, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_peak_falls_with_the_parts() -> None:
    network, x = unet().eval(), torch.randn(1, 1, 64, 48, 48)
    total = whole_peak_bytes(network, x.shape, x.dtype)
    peaks = {}
    for partitions in (1, 8):
        inferer = SpatialPartitionInferer(partitions)
        inferer(x, network)
        assert inferer.last_report is not None
        peaks[partitions] = inferer.last_report.device_peak_bytes
    assert peaks[1] <= total * 1.3
    assert peaks[8] < total / 6


@pytest.mark.slow
def test_a_folder_bounds_the_memory_of_the_process(tmp_path: Path) -> None:
    network, x = nets.BasicUNet(features=(8, 8, 16, 16, 16, 8)).eval(), torch.randn(1, 1, 128, 32, 32)
    with measure_peak("cpu") as ordinary:
        expected = whole(network, x)
    peaks = {}
    for store in ("host", tmp_path):
        inferer = SpatialPartitionInferer(8, store=store)
        with measure_peak("cpu") as streamed:
            got = inferer(x, network)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        assert inferer.last_report is not None
        peaks[store] = streamed.peak_bytes
    assert peaks["host"] > ordinary.peak_bytes / 3  # the meter sees what waits in memory
    assert peaks[tmp_path] < ordinary.peak_bytes / 6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.slow
def test_odd_sizes_run_as_they_are(axis: int) -> None:
    network, x = nets.BasicUNet(features=(2, 2, 4, 4, 4, 2)).eval().double(), torch.randn(1, 1, 45, 19, 18).double()
    got = SpatialPartitionInferer(3, axis=axis)(x, network)
    torch.testing.assert_close(got, whole(network, x), atol=1e-11, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
def test_a_network_of_multiples_only_runs_with_zeros_around_where_that_is_set(
    labels: bool, caplog: pytest.LogCaptureFixture
) -> None:
    network = nets.UNet(3, 1, 2, (4, 8, 16), (2, 2), norm="batch").double().eval()
    x = MetaTensor(torch.randn(1, 1, 17, 16, 14, dtype=torch.float64), affine=torch.diag(torch.tensor([2.0, 1, 1, 1])))
    with pytest.raises((RuntimeError, NotPartitionableError), match="Sizes of tensors"):
        SpatialPartitionInferer(3, labels=labels)(x, network)
    inferer = SpatialPartitionInferer(3, labels=labels, pad=True)
    planned = inferer.prepare(x.as_tensor(), network)
    logits = whole(network, torch.nn.functional.pad(x.as_tensor(), (1, 1, 0, 0, 1, 2)))[:, :, 1:18, :, 1:15]
    for _ in range(2):
        got = inferer(x, network)
        assert torch.equal(got.affine, x.affine)
        if labels:
            assert torch.equal(got.as_tensor(), logits.argmax(1, keepdim=True).to(torch.uint8))
        else:
            torch.testing.assert_close(got.as_tensor(), logits, atol=1e-11, rtol=0)
    assert inferer.last_report is not None
    assert inferer.last_report.padded_to == (20, 16, 16)
    assert inferer.last_report.planned_peak_bytes == planned.peak_bytes
    said = [r.getMessage() for r in caplog.records if "zeros" in r.getMessage()]
    assert len(said) == 1
    assert "17 x 16 x 14" in said[0]
    assert "20 x 16 x 16" in said[0]


def test_what_a_network_takes_is_not_padded_and_what_cannot_be_cropped_is_refused() -> None:
    class Two(nn.Module):
        """Joins levels, so that odd extents do not fit, and returns the coarse one as well."""

        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv3d(1, 2, 2, 2), nn.ConvTranspose3d(2, 1, 2, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            coarse = self.down(x)
            return self.up(coarse) + x, coarse

    odd, convolution = torch.randn(1, 1, 7, 5, 6), nn.Conv3d(1, 1, 3, padding=1)
    got = SpatialPartitionInferer(2, pad=True)(odd, convolution)
    torch.testing.assert_close(got, whole(convolution, odd), atol=1e-6, rtol=0)
    with pytest.raises(NotPartitionableError, match=r"\(7, 5, 6\) voxels only with zeros around.*\(8, 6, 6\)"):
        SpatialPartitionInferer(2, pad=True)(odd, Two())
    fine, coarse = SpatialPartitionInferer(2, pad=True)(odd[:, :, :6, :4], network := Two())
    torch.testing.assert_close(fine, whole(network, odd[:, :, :6, :4])[0], atol=1e-6, rtol=0)
    assert coarse.shape[2:] == (3, 2, 3)
    smaller = nn.Conv3d(1, 1, 3)
    torch.testing.assert_close(
        SpatialPartitionInferer(2, pad=True)(odd, smaller), whole(smaller, odd), atol=1e-6, rtol=0
    )


def test_labels_are_the_argmax(tmp_path: Path) -> None:
    network, x = unet().eval(), torch.randn(1, 1, 16, 8, 8)
    for store in ("host", tmp_path):
        labels = SpatialPartitionInferer(2, store=store, labels=True)(x, network)
        assert labels.dtype == torch.uint8
        assert torch.equal(labels, whole(network, x).argmax(1, keepdim=True).to(torch.uint8))


@pytest.mark.parametrize("classes", [104, 300])
@pytest.mark.slow
def test_labels_of_many_classes_need_no_float_for_each(classes: int, tmp_path: Path) -> None:
    network = nets.BasicUNet(out_channels=classes, features=(2, 2, 2, 2, 2, 2)).eval()
    x = torch.randn(1, 1, 128, 16, 16)
    inferer = SpatialPartitionInferer(8, store=tmp_path, labels=True)
    with measure_peak("cpu") as meter:
        labels = inferer(x, network)
    logits = whole(network, x)
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int16)
    assert torch.equal(labels, logits.argmax(1, keepdim=True).to(labels.dtype))
    assert meter.peak_bytes < logits.nbytes / 6
    assert inferer.last_report is not None
    assert inferer.last_report.device_peak_bytes < logits.nbytes / 6


@pytest.mark.slow
def test_auto_takes_as_few_parts_as_fit() -> None:
    network, x = unet().eval(), torch.randn(1, 1, 64, 32, 32)
    total = whole_peak_bytes(network, x.shape, x.dtype)
    inferer = SpatialPartitionInferer("auto", memory_budget=total // 3)
    inferer(x, network)
    assert inferer.last_report is not None
    assert 1 < inferer.last_report.partitions <= 5
    assert inferer.last_report.device_peak_bytes <= total // 3
    with pytest.raises(NotPartitionableError, match=r"needs .* bytes even in .* tiles but the memory budget is 1000"):
        SpatialPartitionInferer("auto", memory_budget=1000)(x, network)


@pytest.mark.slow
def test_networks_that_keep_tensors_on_themselves_stay_apart() -> None:
    network, x = NETWORKS["DynUNet"]().train().double(), torch.randn(1, 1, 16, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(SpatialPartitionInferer(2)(x, network), whole(network, x), atol=1e-11, rtol=0)


@pytest.mark.slow
def test_metatensors_progress_and_refusals(capfd: pytest.CaptureFixture[str]) -> None:
    network, x = unet().eval(), torch.randn(1, 1, 16, 8, 8)
    got = SpatialPartitionInferer(2, progress=True)(MetaTensor(x), network)
    assert isinstance(got, MetaTensor)
    torch.testing.assert_close(got.as_tensor(), whole(network, x), atol=1e-5, rtol=0)
    assert "tiles" in capfd.readouterr().err
    with pytest.raises(ValueError, match="positive number"):
        SpatialPartitionInferer(0)
    with pytest.raises(ValueError, match="regions"):
        SpatialPartitionInferer(labels="all")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        SpatialPartitionInferer(2)(x, lambda t: t)


@pytest.mark.slow
def test_the_how_to_runs_as_it_stands() -> None:
    (script,) = snippets("halo_inference.md")
    names = {"network": unet().eval(), "volume": torch.randn(1, 1, 64, 16, 16)}
    exec(script, names)
    torch.testing.assert_close(names["logits"], whole(names["network"], names["volume"]), atol=1e-5, rtol=0)
