"""Names of layers and devices that are none: refused by the argument's name, in one line, when the network is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from monai_memeff.apps.liver import LiverTumorLoss
from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.occupancy import OccupancyNet, PrepareBatchOccupancy, RandOccupancyPoints, SampledDiceMetric
from monai_memeff.sparse import CoarseToSparseUNet, SparseInferer, SparseMaxPool3d, SparseTensor, SparseUNet
from monai_memeff.sparse.networks.minkowski_weights import convert_file

NETWORKS: dict[str, Callable[..., Any]] = {
    "SparseUNet": lambda **k: SparseUNet(3, 1, 2, (2, 4), (2,), **k),
    "CoarseToSparseUNet": lambda **k: CoarseToSparseUNet(
        3, 1, 2, (2, 4), (2,), refine_channels=(2, 4), refine_strides=(2,), **k
    ),
    "CLSTMUNet": lambda **k: CLSTMUNet(channels=(2, 4), **k),
    "OccupancyNet": lambda **k: OccupancyNet(channels=(2, 4), **k),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", ["layer", "nope", 5, ("group", {"num_groups": 3}), ("batch", {"nope": 1})], ids=str)
def test_a_norm_that_is_none_is_refused(network: str, spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^norm .* makes no layer: ") as refusal:
        NETWORKS[network](norm=spec)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spec", ["nope", 5, ("relu", {"nope": 1})], ids=str)
def test_an_activation_that_is_none_is_refused(network: str, spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^act .* makes no layer: "):
        NETWORKS[network](act=spec)


@pytest.mark.parametrize("name", ["kernel_size", "up_kernel_size"])
@pytest.mark.parametrize("value", [2, 4, (3, 2, 3)], ids=str)
def test_an_even_kernel_is_refused_where_extents_must_stay(name: str, value: Any) -> None:
    for network in ("SparseUNet", "CoarseToSparseUNet"):
        with pytest.raises(ValueError, match=f"^{name} must be odd, .* got "):
            NETWORKS[network](**{name: value})


@pytest.mark.parametrize("inferer", [SlabInferer, SparseInferer, SpatialPartitionInferer])
@pytest.mark.parametrize("device", ["nope", "cuda:x", 1.5])
def test_a_device_that_is_none_is_refused(inferer: Callable[..., Any], device: Any) -> None:
    with pytest.raises(ValueError, match=r"^device must be a name such as cpu or cuda:0, got "):
        inferer(device=device)


@pytest.mark.parametrize("maker", [RandOccupancyPoints, PrepareBatchOccupancy, SampledDiceMetric])
def test_fractions_of_points_are_numbers_and_bands_odd(maker: Callable[..., Any]) -> None:
    for value in (float("nan"), -0.5, "half", None):
        with pytest.raises(ValueError, match=r"^sampling\['border'\] must be finite and at least 0, got "):
            maker(sampling={"border": value, "uniform": 0.5})
    with pytest.raises(ValueError, match="band_width must be odd, got 4"):
        maker(band_width=4)


def test_a_class_beyond_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="lesion must be one of the 3 classes, got 3"):
        LiverTumorLoss(lesion=3)


def test_channels_that_no_memory_holds_are_refused_by_the_checkpoint(tmp_path: Any) -> None:
    torch.save({"conv.kernel": torch.zeros(27, 1, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="does not fit SparseCompletionNet"):
        convert_file(str(tmp_path / "x.pth"), (300_000,) * 7)  # 10 terabytes


@pytest.mark.parametrize(("kernel", "stride"), [(2, 1), (3, 1), (3, 2), (4, 2), (4, 3), (5, 2)])
@pytest.mark.parametrize("extent", [4, 5, 6, 7])
def test_a_window_past_the_end_counts_what_is_in_it(kernel: int, stride: int, extent: int) -> None:
    """What the pools' docstring says: ceil(n / stride) results, padded at the end with nothing."""
    dense = torch.rand(1, 1, extent, extent, extent)
    pooled = SparseMaxPool3d(kernel, stride)(SparseTensor.from_dense(dense, dense > 0)).dense()
    padding = (kernel - 1) // 2 if kernel > stride else 0
    front = torch.nn.functional.pad(dense, (padding, kernel) * 3, value=-torch.inf)
    expected = torch.nn.functional.max_pool3d(front, kernel, stride)
    cells = -(-extent // stride)
    assert torch.equal(pooled, expected[..., :cells, :cells, :cells])
