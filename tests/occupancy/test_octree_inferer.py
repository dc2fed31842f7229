"""OctreeInferer: batches, metadata, logits, the coarse start and its trap, the report, and refusals in one line."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor, decollate_batch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_memeff.memory import measure_peak
from monai_memeff.occupancy import OctreeInferer
from tests.occupancy.shapes import Points, Shape, box, dense, ellipsoid, painted, shell, union

EXTENTS = (45, 61, 38)
BALL = ellipsoid((22, 30, 19), 13)
CLASSES = painted(ellipsoid((22, 30, 19), 16), ellipsoid((25, 28, 17), 9))
VOLUME = torch.zeros(1, 1, *EXTENTS)


def coarse(
    shape: Shape, channels: int, grid: tuple[int, ...] = (6, 8, 5), extents: tuple[int, ...] = EXTENTS
) -> Tensor:
    """A coarse prediction (1, K, h, w, d): the shape at the centers of coarse cells."""
    at = [(torch.arange(n) + 0.5) * extent / n - 0.5 for n, extent in zip(grid, extents, strict=True)]
    labels = shape(*torch.meshgrid(*at, indexing="ij")).long()
    logits = 4.0 * nn.functional.one_hot(labels, max(channels, 2)).movedim(-1, 0)
    return (logits[1:] - 2 if channels == 1 else logits)[None]


def test_it_is_monais_kind() -> None:
    assert isinstance(OctreeInferer(), Inferer)


# Starting from the network's coarse prediction


@pytest.mark.parametrize(("shape", "channels"), [(BALL, 1), (CLASSES, 3)], ids=["binary", "classes"])
def test_coarse_start(shape: Shape, channels: int) -> None:
    network = Points(shape, channels, coarse(shape, channels))
    inferer = OctreeInferer(initial="network", labels=True, stride=4, compare_dense=True)
    labels = inferer(VOLUME, network)
    report = inferer.last_report
    assert report is not None
    assert report.initial == "network"
    assert report.disagreement == 0
    assert torch.equal(labels[0, 0], dense(shape, EXTENTS))
    grid = OctreeInferer(labels=True, stride=4, initial="grid")
    assert torch.equal(grid(VOLUME, network), labels)
    assert grid.last_report is not None
    assert grid.last_report.initial == "grid"
    assert report.points_per_level[0] < 0.5 * grid.last_report.points_per_level[0]


@pytest.mark.parametrize(
    "guess",
    [
        ellipsoid((18, 34, 16), 13),
        ellipsoid((22, 30, 19), 20),
        ellipsoid((22, 30, 19), 8),
        union(BALL, box((0, 0, 0), (9, 60, 9))),
        lambda *at: 1 - BALL(*at),
    ],
    ids=["shifted", "too large", "too small", "a false piece", "inside out"],
)
def test_a_wrong_coarse_prediction_is_put_right(guess: Shape) -> None:
    network = Points(BALL, 1, coarse(guess, 1))
    assert torch.equal(OctreeInferer(labels=True, stride=4)(VOLUME, network)[0, 0], dense(BALL, EXTENTS))


def test_what_the_coarse_prediction_misses_is_missed_and_reported() -> None:
    """The known trap: no boundary of the second piece is ever touched. The grid finds it."""
    both = union(ellipsoid((12, 15, 19), 8), ellipsoid((33, 45, 19), 8))
    network = Points(both, 1, coarse(ellipsoid((12, 15, 19), 8), 1))
    inferer = OctreeInferer(initial="network", labels=True, stride=4, compare_dense=True)
    labels = inferer(VOLUME, network)
    missed = int(dense(ellipsoid((33, 45, 19), 8), EXTENTS).sum())
    assert torch.equal(labels[0, 0], dense(ellipsoid((12, 15, 19), 8), EXTENTS))
    assert inferer.last_report is not None
    assert inferer.last_report.disagreement == missed > 1000
    grid = OctreeInferer(labels=True, stride=4, initial="grid", compare_dense=True)
    assert torch.equal(grid(VOLUME, network)[0, 0], dense(both, EXTENTS))
    assert grid.last_report is not None
    assert grid.last_report.disagreement == 0


@pytest.mark.parametrize("labels", [True, False])
def test_where_a_coarse_prediction_is_one_label_the_grid_is_queried_and_a_warning_says_so(labels: bool) -> None:
    network = Points(BALL, 1, torch.full((1, 1, 3, 4, 2), -1.0))
    inferer = OctreeInferer(initial="network", labels=labels, compare_dense=True)
    with pytest.warns(UserWarning, match=r"the coarse prediction is label 0 everywhere .* the grid"):
        found = inferer(VOLUME, network)
    assert torch.equal(found[0, 0] > 0, dense(BALL, EXTENTS) > 0)
    assert inferer.last_report is not None
    assert inferer.last_report.initial == "grid"
    assert inferer.last_report.num_queries > 0
    assert inferer.last_report.disagreement == 0


def test_the_grid_where_the_network_has_no_coarse_prediction() -> None:
    inferer = OctreeInferer(labels=True)
    assert torch.equal(inferer(VOLUME, Points(BALL))[0, 0], dense(BALL, EXTENTS))
    assert inferer.last_report is not None
    assert inferer.last_report.initial == "grid"


def test_a_plain_function() -> None:
    def distance(points: Tensor) -> Tensor:
        return 13.001 - (points - torch.tensor([22.0, 30.0, 19.0])).norm(dim=-1, keepdim=True)

    assert torch.equal(OctreeInferer(labels=True)(VOLUME, distance)[0, 0], dense(BALL, EXTENTS))


# Logits


@pytest.mark.parametrize(("shape", "channels"), [(BALL, 1), (CLASSES, 3)], ids=["binary", "classes"])
def test_logits(shape: Shape, channels: int) -> None:
    """The network's own where it was queried, 10 for the label elsewhere; their labels are the labels."""
    network = Points(shape, channels)
    logits = OctreeInferer()(VOLUME, network)
    queried, expected = network.queried_mask(EXTENTS), dense(shape, EXTENTS)
    assert logits.shape == (1, channels, *EXTENTS)
    assert logits.dtype == torch.float32
    voxels = queried.nonzero().float()[None]
    assert torch.equal(logits[0][:, queried].T, network.query(0.0, voxels, VOLUME)[0])
    stand_in = 10.0 * nn.functional.one_hot(expected.long(), max(channels, 2)).movedim(-1, 0)
    stand_in = 2 * stand_in[1:] - 10 if channels == 1 else stand_in
    assert torch.equal(logits[0][:, ~queried], stand_in[:, ~queried])
    labels = logits[0].argmax(0) if channels > 1 else (logits[0, 0] > 0).long()
    assert torch.equal(labels, expected.long())


def test_many_classes_are_int16() -> None:
    labels = OctreeInferer(labels=True, stride=4)(VOLUME, Points(lambda *at: 300 * BALL(*at).long(), 301))
    assert labels.dtype == torch.int16
    assert torch.equal(labels[0, 0], 300 * dense(BALL, EXTENTS).short())


# Batches and hosts


class ByMean(nn.Module):
    """A ball whose radius is the volume's mean: a network with weights that answers differently for each item."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def encode(self, volume: Tensor) -> Tensor:
        """(B,)."""
        assert len(volume) == 1
        return volume.mean((1, 2, 3, 4)) * self.scale

    def query(self, latent: Tensor, points: Tensor, volume: Tensor) -> Tensor:
        """(B, N, 1)."""
        return latent[:, None, None] - (points - points.new_tensor([22.0, 30.0, 19.0])).norm(dim=-1, keepdim=True)


class Wrapper(nn.Module):
    """What DistributedDataParallel does to a network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("labels", [True, False])
def test_batches_metadata_and_wrappers(labels: bool) -> None:
    radii = (5.0, 12.0, 0.0)
    volume = torch.stack([torch.full((2, *EXTENTS), radius) for radius in radii])
    image = MetaTensor(volume, affine=torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0])))
    image.is_batch = True
    inferer = OctreeInferer(labels=labels, stride=4, compare_dense=True)
    result = inferer(image, Wrapper(ByMean()))
    assert isinstance(result, MetaTensor)
    assert torch.equal(result.affine, image.affine)
    assert [item.shape for item in decollate_batch(result)] == [(1, *EXTENTS)] * 3
    assert not result.requires_grad
    for item, radius in zip(result.as_tensor(), radii, strict=True):
        ball = lambda *at, r=radius: r > torch.stack([x - c for x, c in zip(at, (22, 30, 19), strict=True)]).norm(dim=0)  # noqa: E731
        expected = ball(*torch.meshgrid(*(torch.arange(float(n)) for n in EXTENTS), indexing="ij"))
        assert torch.equal(item[0] > 0, expected)
    report = inferer.last_report
    assert report is not None
    assert report.voxels == 3 * math.prod(EXTENTS)
    assert report.num_queries == sum(report.points_per_level)
    assert report.disagreement == 0
    plain = inferer(volume, ByMean())
    assert not isinstance(plain, MetaTensor)
    assert torch.equal(plain, result.as_tensor())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_the_labels_stay_where_the_volume_is(home: str) -> None:
    volume = torch.full((1, 1, *EXTENTS), 12.0)
    logits = OctreeInferer(stride=4)(volume.to(home), ByMean().cuda())
    assert logits.device.type == home
    assert torch.equal(logits.cpu() > 0, OctreeInferer(stride=4)(volume, ByMean()) > 0)


def test_report() -> None:
    network = Points(shell((22, 30, 19), 14, 4))
    inferer = OctreeInferer(labels=True, stride=(8, 4, 1))
    inferer(VOLUME, network)
    report = inferer.last_report
    assert report is not None
    assert report.num_queries == len(network.queried)
    assert report.fraction == len(network.queried) / math.prod(EXTENTS)
    assert report.levels == ((8, 4, 1), (4, 2, 1), (2, 1, 1), (1, 1, 1))
    assert report.points_per_level[0] == 7 * 16 * 38
    assert len(report.rounds) == 4
    assert report.rounds[0] == 0
    assert min(report.rounds[1:]) >= 1
    assert report.disagreement is None
    assert report.seconds > 0


def test_the_comparison_asks_every_voxel_once_and_changes_nothing() -> None:
    network = Points(BALL)
    plain = OctreeInferer()(VOLUME, Points(BALL))
    assert torch.equal(OctreeInferer(compare_dense=True)(VOLUME, network), plain)
    assert len(network.queried) == math.prod(EXTENTS)
    assert bool(network.queried_mask(EXTENTS).all())


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    OctreeInferer(progress=True, compare_dense=True)(VOLUME, Points(BALL))
    shown = capsys.readouterr().err
    assert "octree" in shown
    assert "dense" in shown


@pytest.mark.slow
def test_labels_take_no_float_buffer() -> None:
    """Two bytes a voxel, as many again while a level is refined, and the boundary; never four bytes a voxel."""
    n = 128
    ball = ellipsoid((60, 65, 61), 20)
    volume = torch.zeros(1, 1, n, n, n)
    with measure_peak() as meter:
        OctreeInferer(2**12, "grid", labels=True)(volume, Points(ball))
    kept_by_the_test = 12 * 2 * 60_000
    assert meter.peak_bytes < 4 * n**3 + kept_by_the_test


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points_per_pass": 0}, "points_per_pass must be a whole number of at least 1, got 0"),
        ({"initial": "coarse"}, "initial must be 'network' or 'grid', got 'coarse'"),
        ({"stride": 3}, "stride must be a power of two, or three of them, got 3"),
        ({"stride": (4, 4)}, "stride must be a power of two"),
        ({"stride": (4, 4, 0)}, "stride must be a power of two"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OctreeInferer(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (torch.zeros(1, 1, 9, 9), r"volumes \(B, C, H, W, D\) with voxels, got shape \(1, 1, 9, 9\)"),
        (torch.zeros(1, 1, 9, 0, 9), "with voxels"),
        (torch.zeros(0, 1, 9, 9, 9), "with voxels"),
        (torch.tensor([0.0, math.nan]).expand(1, 1, 3, 4, 2), "NaN or infinite"),
        (torch.tensor([0.0, -math.inf]).expand(1, 1, 3, 4, 2), "NaN or infinite"),
    ],
)
def test_bad_volumes(volume: Tensor, message: str) -> None:
    network = Points(BALL)
    with pytest.raises(ValueError, match=message) as caught:
        OctreeInferer()(volume, network)
    assert "\n" not in str(caught.value)
    assert not network.passes


def answering(logits: Tensor, coarse_logits: Tensor | None = None) -> Points:
    """A network that gives these logits to anybody."""
    network = Points(BALL, coarse=coarse_logits)
    network.query = lambda latent, points, volume: logits.expand(1, points.shape[1], -1) if logits.dim() else points  # type: ignore[method-assign]
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (answering(torch.zeros(1, 1, 0)), r"query must give logits \(1, \d+, K\)"),
        (answering(torch.full((1, 1, 2), math.nan)), "query gave logits that are NaN"),
        (
            answering(torch.zeros(1, 1, 3), coarse(BALL, 1)),
            r"query must give logits \(1, \d+, 1\), got \(1, \d+, 3\)",
        ),
        (answering(torch.zeros(1, 1, 1), torch.zeros(1, 1, 4, 4)), r"coarse_logits must be \(1, K, h, w, d\)"),
        (
            answering(torch.zeros(1, 1, 1), torch.full((1, 1, 2, 2, 2), math.nan)),
            "coarse_logits gave logits that are NaN",
        ),
    ],
)
def test_bad_answers(network: Points, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OctreeInferer()(VOLUME, network)
    assert "\n" not in str(caught.value)


def test_a_dense_network_and_further_arguments_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"^OctreeInferer needs a network with the methods encode and query, got Conv3d"
    ):
        OctreeInferer()(VOLUME, nn.Conv3d(1, 1, 1))
    with pytest.raises(TypeError, match="passes no further arguments"):
        OctreeInferer()(VOLUME, Points(BALL), condition=1)
