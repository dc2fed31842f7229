"""The octree against dense evaluation, voxel for voxel: shapes, sizes, what is queried, and what may be missed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from monai_memeff.occupancy import OctreeInferer
from monai_memeff.occupancy.octree import default_stride, node_counts
from tests.occupancy.shapes import Points, Shape, box, dense, ellipsoid, helix, painted, shell, stored, union

ODD = (45, 61, 38)


def labels_of(shape: Shape, extents: tuple[int, ...], channels: int = 1, **settings: object) -> tuple[Tensor, Points]:
    """The octree's labels (H, W, D), started from a grid, and the network with what it was queried."""
    network = Points(shape, channels)
    inferer = OctreeInferer(initial="grid", labels=True, **settings)  # type: ignore[arg-type]
    return inferer(torch.zeros(1, 1, *extents), network)[0, 0], network


def holds_a_node(piece: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether a boolean (H, W, D) is True at a node of the coarsest grid: then the grid finds it."""
    nodes = [torch.tensor(sorted({*range(0, n, s), n - 1})) for n, s in zip(piece.shape, stride, strict=True)]
    return bool(piece[torch.meshgrid(*nodes, indexing="ij")].any())


def pieces(mask: Tensor) -> list[Tensor]:
    """26-connected components."""
    numbered, count = ndimage.label(mask.numpy(), structure=torch.ones(3, 3, 3).numpy())
    return [torch.from_numpy(numbered == number) for number in range(1, count + 1)]


SHAPES: dict[str, tuple[Shape, int]] = {
    "ball": (ellipsoid((20, 31, 18), 14), 1),
    "oblique": (ellipsoid((21.3, 27.8, 17.1), (17, 24, 9)), 1),
    "thin shell": (shell((22, 30, 19), 16.2, 1.8), 1),
    "nested": (painted(ellipsoid((22, 30, 19), 18), ellipsoid((23, 28, 19), 12), ellipsoid((21, 30, 20), 6)), 4),
    "nested shells": (union(shell((22, 30, 19), 17, 3), shell((22, 30, 19), 9, 3)), 1),
    "several": (union(ellipsoid((10, 10, 10), 6), ellipsoid((33, 48, 27), 8), box((5, 40, 5), (9, 44, 30))), 1),
    "touching classes": (painted(box((8, 8, 8), (24, 40, 30)), box((25, 8, 8), (38, 40, 30))), 3),
    "touching borders": (union(box((0, 0, 0), (7, 60, 9)), box((30, 50, 20), (44, 60, 37))), 1),
    "last corner": (box((40, 56, 33), (44, 60, 37)), 1),
    "hole at the border": (lambda *at: 1 - ellipsoid((44, 30, 0), 12)(*at), 1),
    "spiral": (helix((22, 30, 19), 12, 38.0, 4.5), 1),
    "plate": (box((0, 0, 16), (44, 60, 16)), 1),
    "empty": (lambda i, j, k: (i + j + k).byte() * 0, 1),
    "full": (lambda i, j, k: (i + j + k).byte() * 0 + 1, 1),
    "full class": (lambda i, j, k: (i + j + k).byte() * 0 + 2, 3),
}


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 4, 2)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_same_as_dense(name: str, stride: tuple[int, ...]) -> None:
    shape, channels = SHAPES[name]
    expected = dense(shape, ODD)
    for label in expected.unique():
        assert all(holds_a_node(piece, stride) for piece in pieces(expected == label)), "not what this test is about"
    labels, _ = labels_of(shape, ODD, channels, stride=stride)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("extents", list(itertools.product((1, 2, 8), (5, 9), (16, 19))), ids=str)
@pytest.mark.parametrize("stride", [2, 8, 64])
def test_any_extents(extents: tuple[int, ...], stride: int) -> None:
    """A volume smaller than a cell, of one slice, or not divisible: the last voxel of an axis is always a node."""
    ball = ellipsoid((0, 4, 15), (3, 5, 9.5))
    labels, network = labels_of(ball, extents, stride=stride)
    assert torch.equal(labels, dense(ball, extents))
    assert 0 < int(labels.sum()) < labels.numel()
    assert (network.queried.amax(0) <= torch.tensor(extents) - 1).all()


# What is queried


@pytest.mark.parametrize("points_per_pass", [7, 1000, 2**14])
@pytest.mark.slow
def test_no_point_twice_and_no_pass_too_large(points_per_pass: int) -> None:
    shape, channels = SHAPES["nested"]
    labels, network = labels_of(shape, ODD, channels, points_per_pass=points_per_pass)
    assert torch.equal(labels, dense(shape, ODD))
    assert max(map(len, network.passes)) <= points_per_pass
    assert len(network.queried.unique(dim=0)) == len(network.queried)
    assert torch.equal(network.queried, network.queried.floor())


def test_every_boundary_is_queried_and_little_else() -> None:
    """All eight voxels of every boundary cell; the next coarser level has a quarter of them: the others are a third."""
    shape, _ = SHAPES["oblique"]
    labels, network = labels_of(shape, ODD, stride=4)
    volume = labels[None, None].float()
    mixed = torch.nn.functional.max_pool3d(volume, 2, 1) != -torch.nn.functional.max_pool3d(-volume, 2, 1)
    corner = torch.nn.functional.conv_transpose3d(mixed.float(), torch.ones(1, 1, 2, 2, 2))[0, 0] > 0
    queried = network.queried_mask(ODD)
    assert bool(queried[corner].all())
    assert int(queried.sum()) < 1.35 * int(corner.sum()) + math.prod(node_counts(ODD, (4, 4, 4)))


def test_a_front_is_followed_to_its_end() -> None:
    """A long spiral of which the coarsest grid meets little: most of its length is found by propagation."""
    extents, shape = (40, 40, 150), helix((20, 20, 70), 13, 60.0, 3.0)
    expected = dense(shape, extents)
    assert len(pieces(expected > 0)) == 1
    nodes = int(expected[::16, ::16, ::16].sum())
    labels, network = labels_of(shape, extents, stride=16)
    assert torch.equal(labels, expected)
    assert 0 < nodes < 10
    assert len(network.passes) > 20


# What may be missed


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("smooth", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.slow
def test_what_is_missed(stride: int, smooth: float, channels: int) -> None:
    """Random volumes: an error is always a whole piece, never queried, all of whose surroundings have one label."""
    noise = torch.from_numpy(ndimage.gaussian_filter(torch.randn(41, 30, 35).numpy(), smooth))
    levels = noise.quantile(torch.tensor([0.9] if channels == 1 else [0.5, 0.8, 0.95]))
    truth = torch.bucketize(noise, levels).byte()
    labels, network = labels_of(stored(truth), (41, 30, 35), channels, stride=stride)
    queried = network.queried_mask(truth.shape)
    assert torch.equal(labels[queried], truth[queried])
    wrong = pieces(labels != truth)
    for piece in wrong:
        assumed = labels[piece].unique()
        around = torch.from_numpy(ndimage.binary_dilation(piece.numpy(), torch.ones(3, 3, 3).numpy())) & ~piece
        assert len(assumed) == 1
        assert not queried[piece].any()
        assert (labels[around] == assumed).all()
        assert (truth[around] == assumed).all()
        assert not holds_a_node(piece, (stride,) * 3)
    if smooth == 0:
        assert channels == 4 or wrong, "isolated voxels are missed, or this shows nothing"


def test_a_cube_as_large_as_the_stride_is_found_wherever_it_is() -> None:
    for corner in itertools.product((1, 5, 9, 12), (2, 6, 11), (3, 7, 12)):
        cube = box(corner, [c + 3 for c in corner])
        labels, _ = labels_of(cube, (16, 17, 19), stride=4)
        assert int(labels.sum()) == 64
        assert torch.equal(labels, dense(cube, (16, 17, 19)))


# How much is queried


def organs(n: int) -> Shape:
    """A liver-sized, two kidney-sized and a stomach-sized body, as they lie in a field of view of n voxels."""
    liver = ellipsoid((0.33 * n, 0.55 * n, 0.52 * n), (0.2 * n, 0.17 * n, 0.15 * n))
    kidneys = [ellipsoid((x * n, 0.36 * n, 0.4 * n), (0.07 * n, 0.06 * n, 0.13 * n)) for x in (0.3, 0.7)]
    stomach = ellipsoid((0.66 * n, 0.6 * n, 0.55 * n), (0.1 * n, 0.08 * n, 0.14 * n))
    return painted(liver, *kidneys, stomach)


@pytest.mark.parametrize(("n", "fraction"), [(256, 0.10), pytest.param(512, 0.03, marks=pytest.mark.exhaustive)])
def test_share_of_points(n: int, fraction: float) -> None:
    network = Points(organs(n), channels=5)
    inferer = OctreeInferer(2**18, initial="grid", labels=True)
    labels = inferer(torch.zeros(1, 1, 1, 1, 1).expand(1, 1, n, n, n), network)
    report = inferer.last_report
    assert report is not None
    assert report.voxels == n**3
    assert report.fraction <= fraction, f"{report.fraction:.2%}"
    assert torch.equal(labels[0, 0], dense(organs(n), (n, n, n)))


def test_default_stride() -> None:
    assert default_stride((512, 256, 128)) == (8, 8, 8)
    assert default_stride((64, 40, 16)) == (4, 2, 1)
    assert default_stride((127, 31, 1)) == (4, 1, 1)
    for extents in ((512,) * 3, (256,) * 3, (64,) * 3):
        assert math.prod(node_counts(extents, default_stride(extents))) < 0.03 * math.prod(extents)
