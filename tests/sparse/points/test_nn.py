"""The six names of torch-points3d: signatures, results of the underlying layers, negative coordinates, training."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import Tensor, nn

import monai_memeff.sparse as engine
from monai_memeff.sparse import backends
from monai_memeff.sparse.points import GridSampling3D, data_from_sparse, origin_of, placed_coordinates, to_sparse_tensor
from monai_memeff.sparse.points import nn as snn
from monai_memeff.sparse.points.data import Data, with_attributes
from tests.sparse.points.clouds import cloud


def scattered(seed: int = 0, clouds: int = 2, channels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Features, coordinates of both signs and batch indices; about 150 voxels in random order."""
    generator = torch.Generator().manual_seed(seed)
    lattice = torch.cartesian_prod(torch.arange(clouds), torch.arange(-5, 4), torch.arange(-3, 5), torch.arange(-9, -4))
    rows = lattice[torch.randperm(len(lattice), generator=generator)[:150]]
    features = torch.randn(len(rows), channels, generator=generator, dtype=torch.float64)
    return features, rows[:, 1:], rows[:, 0]


# The names


def test_the_names_and_their_arguments() -> None:
    assert set(snn.__all__) == {"cat", "Conv3d", "Conv3dTranspose", "ReLU", "SparseTensor", "BatchNorm", "set_backend"}
    arguments = {name: list(inspect.signature(getattr(snn, name)).parameters) for name in snn.__all__}
    convolution = ["in_channels", "out_channels", "kernel_size", "stride", "dilation", "bias"]
    assert arguments["Conv3d"] == convolution
    assert arguments["Conv3dTranspose"] == [*convolution, "transpose"]
    assert arguments["BatchNorm"] == ["num_features", "eps", "momentum"]
    assert arguments["ReLU"] == ["inplace"]
    assert arguments["SparseTensor"] == ["feats", "coordinates", "batch", "device"]
    for layer in (snn.Conv3d(1, 2), snn.Conv3dTranspose(1, 2)):
        assert (layer.kernel_size, layer.stride, layer.dilation, layer.bias) == ((3,) * 3, (1,) * 3, (1,) * 3, None)
    assert (snn.BatchNorm(3).eps, snn.BatchNorm(3).momentum) == (1e-5, 0.1)


def test_layers_are_those_of_the_wing() -> None:
    """The same state_dict, and the same results on the same voxels."""
    x = snn.SparseTensor(*scattered())
    for ours, theirs in (
        (snn.Conv3d(2, 3, 3, bias=True), engine.SparseConv3d(2, 3, 3)),
        (snn.Conv3d(2, 3, 2, stride=2), engine.SparseConv3d(2, 3, 2, 2, bias=False)),
        (snn.Conv3dTranspose(2, 3, 3), engine.SparseConvTranspose3d(2, 3, 3, 1, bias=False)),
        (snn.BatchNorm(2), engine.SparseBatchNorm3d(2)),
    ):
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours.double()(x).features, theirs.double()(x).features)


def test_relu_leaves_what_a_skip_connection_shares() -> None:
    x = snn.SparseTensor(*scattered())
    before = x.features.clone()
    assert torch.equal(snn.ReLU(inplace=True)(x).features, before.relu())
    assert torch.equal(x.features, before)


def test_cat_and_sums() -> None:
    x = snn.SparseTensor(*scattered())
    assert torch.equal(snn.cat(x, x, x).features, torch.cat([x.features] * 3, dim=1))
    total = x
    total += x
    assert torch.equal(total.features, 2 * x.features)


# Coordinates of either sign


def test_coordinates_come_back() -> None:
    features, coordinates, batch = scattered()
    x = snn.SparseTensor(features, coordinates, batch[:, None].int())
    assert origin_of(x) == (-64, -64, -64)
    rows = torch.cat((batch[:, None], coordinates), dim=1)
    given = {tuple(row): f for row, f in zip(rows.tolist(), features.tolist(), strict=True)}
    back = {tuple(row): f for row, f in zip(placed_coordinates(x).tolist(), x.features.tolist(), strict=True)}
    assert back == given


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_cells_are_those_of_the_unshifted_lattice(halvings: int) -> None:
    """floor(c / stride) * stride, with floor towards minus infinity, as MinkowskiEngine and torchsparse."""
    features, coordinates, batch = scattered()
    x = snn.SparseTensor(features, coordinates, batch)
    for _ in range(halvings):
        x = snn.Conv3d(2, 2, 2, stride=2).double()(x)
    stride = 2**halvings
    cells = coordinates.div(stride, rounding_mode="floor") * stride
    expected = torch.unique(torch.cat((batch[:, None], cells), dim=1), dim=0)
    assert torch.equal(placed_coordinates(x), expected)


def test_results_do_not_depend_on_where_the_points_are() -> None:
    features, coordinates, batch = scattered()
    torch.manual_seed(0)
    down, up = snn.Conv3d(2, 4, 3, stride=2).double(), snn.Conv3dTranspose(4, 3, 2, stride=2).double()
    results = []
    for shift in ((0, 0, 0), (6, -1000, 2**20)):
        x = snn.SparseTensor(features, coordinates + torch.tensor(shift), batch)
        y = up(down(x))
        assert torch.equal(placed_coordinates(y), placed_coordinates(x))
        results.append(y.features)
    torch.testing.assert_close(*results)


def test_the_way_back_ends_on_the_voxels_it_began_with() -> None:
    x = snn.SparseTensor(*scattered())
    down = snn.Conv3d(2, 2, 3, stride=2).double()
    up = snn.Conv3dTranspose(2, 2, 3, stride=2).double()
    coarser = down(down(x))
    assert up(up(coarser)).voxels is x.voxels
    with pytest.raises(ValueError, match="knows no finer voxels"):
        up(x)


def test_pruned_and_united_tensors_know_where_they_are() -> None:
    x = snn.SparseTensor(*scattered())
    keep = x.features[:, 0] > 0
    pruned = x.prune(keep)
    assert torch.equal(placed_coordinates(pruned), placed_coordinates(x)[keep])
    united = pruned + x.prune(~keep)
    assert torch.equal(placed_coordinates(united), placed_coordinates(x))
    coarse = snn.Conv3d(2, 2, 2, stride=2).double()(pruned)
    few = coarse.prune(torch.arange(len(coarse)) < 3)
    assert torch.equal(placed_coordinates(few), placed_coordinates(coarse)[:3])


def test_empty_tensors_and_devices() -> None:
    x = snn.SparseTensor(torch.zeros(0, 2), torch.zeros(0, 3).long(), torch.zeros(0).long())
    y = snn.Conv3dTranspose(2, 3, 2, stride=2)(snn.Conv3d(2, 2, 2, stride=2)(x))
    assert y.features.shape == (0, 3)
    assert snn.SparseTensor(torch.ones(1, 1), torch.ones(1, 3).long(), device="cpu").device.type == "cpu"


def test_a_tensor_from_elsewhere_has_no_origin() -> None:
    x = engine.SparseTensor(torch.ones(1, 1), torch.zeros(1, 4).long(), (2, 2, 2))
    with pytest.raises(ValueError, match=r"no origin: .*build it with points.nn.SparseTensor"):
        placed_coordinates(x)


def test_bad_rows_are_refused() -> None:
    features, coordinates, batch = scattered()
    with pytest.raises(ValueError, match=r"integers of shape \(N, 3\), got torch.float32.*GridSampling3D"):
        snn.SparseTensor(features, coordinates.float(), batch)
    with pytest.raises(ValueError, match="one entry per row, got 3 for 150"):
        snn.SparseTensor(features, coordinates, batch[:3])
    with pytest.raises(ValueError, match="must be unique, got at least two rows for one voxel; merge them first"):
        snn.SparseTensor(features, coordinates * 0, batch)
    with pytest.raises(ValueError, match="between 1 and 262144"):
        snn.SparseTensor(features, coordinates * 2**20, batch)


# Engines


@pytest.fixture
def _engine_restored() -> None:
    yield
    backends.use(None)


@pytest.mark.usefixtures("_engine_restored")
def test_set_backend() -> None:
    snn.set_backend("native")
    with pytest.raises(ValueError, match=r"torchsparse is not supported: .*set_backend\('native'\)"):
        snn.set_backend("torchsparse")
    with pytest.raises(ValueError, match=r"must be one of native.*got 'nonsense'"):
        snn.set_backend("nonsense")


@pytest.mark.parametrize(
    ("old", "ours", "used", "said"),
    [
        (None, None, None, ""),
        ("native", None, "native", ""),
        ("native", "other", "other", ""),
        ("torchsparse", None, None, "SPARSE_BACKEND=torchsparse is passed over: torchsparse is not supported"),
        ("nonsense", None, None, "SPARSE_BACKEND=nonsense is passed over: no engine has this name"),
    ],
)
def test_the_old_variable_counts_where_ours_is_not_set(
    monkeypatch: pytest.MonkeyPatch, old: str | None, ours: str | None, used: str | None, said: str
) -> None:
    for name, value in (("SPARSE_BACKEND", old), ("MEMEFF_SPARSE_BACKEND", ours)):
        monkeypatch.setenv(name, value or "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        snn._take_old_variable()
    assert snn.os.environ["MEMEFF_SPARSE_BACKEND"] == (used or "")
    assert [said in str(w.message) for w in caught] == ([True] if said else [])


# A network as torch-points3d's users write it


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, input_nc: int, output_nc: int, convolution: type[nn.Module]) -> None:
        super().__init__()
        self.block = nn.Sequential(
            convolution(input_nc, output_nc, kernel_size=3, stride=1),
            snn.BatchNorm(output_nc),
            snn.ReLU(True),
            convolution(output_nc, output_nc, kernel_size=3, stride=1),
            snn.BatchNorm(output_nc),
            snn.ReLU(True),
        )
        self.shortcut = None
        if input_nc != output_nc:
            self.shortcut = nn.Sequential(
                snn.Conv3d(input_nc, output_nc, kernel_size=1, stride=1), snn.BatchNorm(output_nc)
            )

    def forward(self, x: engine.SparseTensor) -> engine.SparseTensor:
        out = self.block(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return out


class Stage(nn.Module):
    """A strided convolution, down or up, and residual blocks."""

    def __init__(self, channels: tuple[int, int, int], convolution: type[nn.Module], stride: int = 2) -> None:
        super().__init__()
        into, middle, out = channels
        self.conv_in = nn.Sequential(
            convolution(into, middle, kernel_size=2, stride=stride, dilation=1), snn.BatchNorm(middle), snn.ReLU(True)
        )
        self.blocks = Residual(middle, out, convolution)

    def forward(self, x: engine.SparseTensor, skip: engine.SparseTensor | None = None) -> engine.SparseTensor:
        return self.blocks(self.conv_in(x if skip is None else snn.cat(x, skip)))


class ResidualUNet(nn.Module):
    """Two levels down, two up, linear head."""

    def __init__(self, input_nc: int, output_nc: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(snn.Conv3d(input_nc, 8), snn.BatchNorm(8), snn.ReLU(True))
        self.down = nn.ModuleList([Stage((8, 8, 12), snn.Conv3d), Stage((12, 12, 16), snn.Conv3d)])
        self.up = nn.ModuleList([Stage((16, 12, 12), snn.Conv3dTranspose), Stage((24, 12, 8), snn.Conv3dTranspose)])
        self.head = nn.Linear(16, output_nc)

    def forward(self, data: Data) -> Data:
        x = self.stem(snn.SparseTensor(data.x, data.coords, data.batch, data.x.device))
        skips = [x]
        for stage in self.down:
            skips.append(stage(skips[-1]))
        y = self.up[1](self.up[0](skips[2]), skips[1])
        y = snn.cat(y, skips[0])
        return data_from_sparse(y.replace(self.head(y.features)), like=data)


def labeled(seed: int) -> Data:
    """Two clouds of points on balls of two sizes about random centers of either sign; the label says which size."""
    generator = torch.Generator().manual_seed(seed)
    parts, labels, batch = [], [], []
    for number in range(6):
        center = (torch.rand(3, generator=generator) - 0.5) * 120
        direction = nn.functional.normalize(torch.randn(400, 3, generator=generator), dim=1)
        parts.append(center + direction * (6.0 if number % 2 else 14.0))
        labels += [number % 2] * 400
        batch += [number // 3] * 400
    data = Data(torch.cat(parts), y=torch.tensor(labels), batch=torch.tensor(batch))
    data = GridSampling3D(2.0, quantize_coords=True)(data)
    data.x = torch.ones(len(data.pos), 1)
    return data


@pytest.mark.slow
def test_a_residual_unet_in_their_style_trains() -> None:
    torch.manual_seed(0)
    network = ResidualUNet(1, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        data = labeled(step % 3)
        loss = nn.functional.cross_entropy(network(data).x, data.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    network.eval()
    with torch.no_grad():
        unseen = labeled(100)
        accuracy = float((network(unseen).x.argmax(1) == unseen.y).float().mean())
    assert losses[-1] < 0.3 * losses[0], losses
    assert accuracy > 0.9


def test_gradients_of_the_network_in_float64() -> None:
    data = cloud(20, clouds=2, spread=3.0)
    data = GridSampling3D(1.0, quantize_coords=True)(data)
    down, up = snn.Conv3d(2, 3, 2, 2).double(), snn.Conv3dTranspose(3, 2, 2, 2).double()

    def through(features: Tensor) -> Tensor:
        x = to_sparse_tensor(with_attributes(data, {"x": features}))
        return data_from_sparse(snn.cat(up(down(x)), x), like=data).x

    assert torch.autograd.gradcheck(through, data.x.clone().requires_grad_())
