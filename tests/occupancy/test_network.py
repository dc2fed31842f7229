"""OccupancyNet: published sizes, the plain reference, passes, any encoder, any extents, and what is refused."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets.resnet import ResNetFeatures
from torch import nn

from monai_memeff.geometry import index_to_unit
from monai_memeff.occupancy import OccupancyNet
from monai_memeff.occupancy.network import grid_points
from tests.occupancy.reference import PlainOccupancy
from tests.oracles import assert_same_as_dense, assert_same_as_whole, asymmetric

BRATS = {"in_channels": 4, "volume_shape": (256, 256, 160), "channels": (16, 32, 64, 128)}
LITS = {"in_channels": 1, "volume_shape": (512, 512, 512), "channels": (8, 16, 32, 64, 128)}
PUBLISHED = {
    "o-net": (6_890_753, 9_057_237),
    "a": (7_245_438, 9_409_177),
    "b": (7_254_358, 9_409_520),
    "c": (8_695_733, 10_866_490),
    "d": (8_704_653, 10_866_833),
}
SHAPE = (4, 8, 4)


def small(variant: str, **changes: object) -> OccupancyNet:
    """A network of the paper for two channels and small asymmetric volumes, in float64."""
    settings = {"in_channels": 2, "volume_shape": SHAPE, "channels": (3,), "width": 10, **changes}
    return OccupancyNet(variant=variant, **settings).double()  # type: ignore[arg-type]


def shaken(network: OccupancyNet) -> OccupancyNet:
    """Weights off their start, so that conditions matter; coordinates (voxel indices) are damped."""
    for number, parameter in enumerate(network.parameters()):
        parameter.data += 0.1 * asymmetric((number + 1, *parameter.shape))[-1]
    return network


# Published sizes


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize(("settings", "column"), [(BRATS, 0), (LITS, 1)], ids=["brats", "lits"])
def test_published_parameter_counts(variant: str, settings: dict, column: int) -> None:
    with torch.device("meta"):
        network = OccupancyNet(variant=variant, **settings)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == PUBLISHED[variant][column]


@pytest.mark.parametrize(("settings", "count"), [(BRATS, 3_309_313), (LITS, 4_394_453)], ids=["brats", "lits"])
def test_the_narrow_occupancy_network(settings: dict, count: int) -> None:
    with torch.device("meta"):
        network = OccupancyNet(variant="o-net", width=256, **settings)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(("variant", "codes", "coarse"), [("o-net", 1, None), ("b", 1, None), ("c", 6, (2, 1, 3))])
def test_what_is_remembered_of_a_volume(variant: str, codes: int, coarse: tuple[int, ...] | None) -> None:
    network = shaken(small(variant, out_channels=3, channels=(3, 4), volume_shape=(16, 8, 24))).eval()
    latent = network.encode(asymmetric((2, 2, 16, 8, 24)))
    assert [tuple(c.shape) for c in latent.conditions] == [(2, 6)] * 6
    assert len({tuple(c.flatten().tolist()) for c in latent.conditions}) == codes
    logits = network.coarse_logits(latent)
    assert (None if logits is None else tuple(logits.shape)) == (coarse if coarse is None else (2, 3, *coarse))


# Against the plain reference


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.long
def test_same_as_cutting_out_all_patches(variant: str, training: bool) -> None:
    network = shaken(small(variant)).train(training)
    points = torch.cat(list(grid_points(SHAPE, 10**6))).expand(2, -1, -1)

    def ours(volume: torch.Tensor) -> torch.Tensor:
        logits, _ = network(volume, points)
        return logits.transpose(1, 2).unflatten(2, SHAPE)

    assert_same_as_dense(ours, PlainOccupancy(network), asymmetric((2, 2, *SHAPE)), modules=None)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("patch_encoder", "decoder.blocks.0", "code")))
    checked = {name: p for name, p in network.named_parameters() if p.requires_grad}
    found = [
        torch.autograd.grad((call(asymmetric((2, 2, *SHAPE))) ** 2).mean(), list(checked.values()))
        for call in (ours, PlainOccupancy(network))
    ]
    for name, mine, plain in zip(checked, *found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_feature_statistics_in_a_published_variant() -> None:
    network = shaken(small("d", statistics="feature", out_channels=3)).train()
    points = torch.cat(list(grid_points(SHAPE, 10**6))).expand(2, -1, -1)
    assert_same_as_dense(
        lambda volume: network(volume, points)[0].transpose(1, 2).unflatten(2, SHAPE),
        PlainOccupancy(network),
        asymmetric((2, 2, *SHAPE)),
    )


# In passes


@pytest.mark.parametrize("variant", ["d", "interpolated"])
@pytest.mark.slow
def test_passes_give_what_one_pass_gives(variant: str) -> None:
    network = shaken(small(variant)).eval()

    def in_passes_of(number: int):
        def call(volume: torch.Tensor) -> torch.Tensor:
            network.points_per_pass = number
            return network(volume)

        return call

    volume = asymmetric((2, 2, *SHAPE))
    assert_same_as_whole(in_passes_of(100), in_passes_of(10**6), volume, modules=(network, network))
    with torch.no_grad():
        torch.testing.assert_close(in_passes_of(77)(volume), in_passes_of(10**6)(volume))


@pytest.mark.slow
def test_the_volume_is_never_cut_into_all_patches() -> None:
    """The patches of all voxels would take 343 times the volume; a dense answer in passes stays far below."""
    from monai_memeff.memory import measure_peak

    network = OccupancyNet(1, 1, variant="interpolated", channels=(8, 8), width=16, points_per_pass=512).eval()
    volume = torch.rand(1, 1, 40, 44, 48)
    with torch.no_grad(), measure_peak() as meter:
        network(volume)
    assert meter.peak_bytes < 50 * volume.numel() * 4


# Our own default


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (5, 9, 2), (33, 18, 21)])
def test_the_default_takes_any_extents(shape: tuple[int, int, int]) -> None:
    network = OccupancyNet(2, 4, variant="interpolated", channels=(4, 8)).train()
    volume = torch.rand(2, 2, *shape)
    points = torch.rand(2, 7, 3) * (torch.tensor(shape) - 1)
    logits, coarse = network(volume, points)
    assert logits.shape == (2, 7, 4)
    assert coarse is not None
    (logits.sum() + coarse.sum()).backward()
    assert all(p.grad is not None for p in network.parameters())
    dense = network.eval()(volume)
    assert dense.shape == (2, 4, *shape)
    assert bool(dense.isfinite().all())


def test_the_default_reads_features_where_the_point_is() -> None:
    """Features that hold their own place in the unit cube come back as the place of the point, away from the faces."""
    shape = (24, 16, 32)
    network = OccupancyNet(3, 1, variant="interpolated", channels=(3, 3), encoder=Pooled(), width=4).double()
    seen: list[torch.Tensor] = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    points = torch.tensor([[[11.0, 4.0, 25.0], [4.0, 11.0, 4.0], [9.3, 6.1, 20.7]]], dtype=torch.float64)
    axes = torch.meshgrid(*(torch.arange(extent, dtype=torch.float64) for extent in shape), indexing="ij")
    volume = index_to_unit(torch.stack(axes, dim=-1), shape).permute(3, 0, 1, 2)[None]
    latent = network.encode(volume)
    network.query(latent, points, volume)
    unit = index_to_unit(points, shape)
    torch.testing.assert_close(seen[0][..., :3], unit)
    torch.testing.assert_close(seen[0][..., -6:], torch.cat([unit, unit], 2))


class Pooled(nn.Module):
    """An encoder that only averages."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.avg_pool3d(x, 2), nn.functional.avg_pool3d(x, 4)]


class OneMap(nn.Module):
    """An encoder that returns one tensor, not a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 5, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("encoder", "channels"),
    [
        (lambda: ResNetFeatures("resnet10", pretrained=False, in_channels=1), (64, 64, 128, 256, 512)),
        (OneMap, (5,)),
    ],
    ids=["monai", "one map"],
)
def test_any_encoder(encoder, channels: tuple[int, ...]) -> None:
    network = OccupancyNet(1, 3, variant="interpolated", channels=channels, encoder=encoder(), width=16)
    volume = torch.rand(2, 1, 48, 40, 36)
    logits, coarse = network(volume, torch.rand(2, 11, 3) * 35)
    (logits.sum() + coarse.sum()).backward()
    assert logits.shape == (2, 11, 3)
    assert all(p.grad is not None for p in network.encoder.parameters() if p.requires_grad)


def test_metadata_follows_the_answer() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    volume = MetaTensor(torch.rand(1, 2, 6, 5, 4), affine=affine)
    with torch.no_grad():
        answer = OccupancyNet(2, 1, variant="interpolated", channels=(4, 8)).eval()(volume)
    assert isinstance(answer, MetaTensor)
    torch.testing.assert_close(answer.affine, affine.double())


def test_points_between_voxels_and_no_points() -> None:
    network = small("c").eval()
    volume = asymmetric((1, 2, *SHAPE))
    latent = network.encode(volume)
    assert network.query(latent, torch.empty(1, 0, 3), volume).shape == (1, 0, 1)
    corners = torch.tensor([[[-0.5, -0.5, -0.5], [3.5, 7.5, 3.5], [3.25, 2.5, 1.75]]])
    assert bool(network.query(latent, corners, volume).isfinite().all())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_volumes_are_answered(value: float) -> None:
    for variant in ("c", "interpolated"):
        network = small(variant).eval()
        assert bool(network(torch.full((1, 2, *SHAPE), value).double()).isfinite().all())


# Refusals


def test_bad_input_is_refused_in_one_line() -> None:
    network = small("c").eval()
    volume = asymmetric((1, 2, *SHAPE))
    latent = network.encode(volume)
    spoilt = volume.clone()
    spoilt[0, 1, 3, 2, 1] = torch.nan
    for refused, words in (
        (lambda: network(spoilt), "needs finite values, got 1 NaN"),
        (lambda: network(volume[:, :1]), r"must be \(B, 2, H, W, D\)"),
        (lambda: network(volume[..., :2]), r"made for volumes of \(4, 8, 4\) voxels, got \(4, 8, 2\).*interpolated"),
        (lambda: network(volume[0]), "a volume must be"),
        (lambda: network.query(latent, torch.tensor([[[0.0, 8.0, 0.0]]]), volume), r"1 outside, the first \[0.0, 8.0"),
        (lambda: network.query(latent, torch.tensor([[[-0.6, 0.0, 0.0]]]), volume), "must lie in the volume"),
        (lambda: network.query(latent, torch.tensor([[[torch.nan, 0.0, 0.0]]]), volume), "must lie in the volume"),
        (lambda: network.query(latent, torch.zeros(1, 3), volume), r"points must be \(1, N, 3\)"),
        (lambda: network.query(latent, torch.zeros(2, 5, 3), volume), r"points must be \(1, N, 3\)"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            refused()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"variant": "e"}, "variant must be one of o-net, a, b, c, d, interpolated, got 'e'"),
        ({"variant": "C"}, "got 'C'"),
        ({"volume_shape": (256, 250, 160)}, "three multiples of 32"),
        ({"volume_shape": (16, 16, 16)}, "three multiples of 32.*interpolated"),
        ({"volume_shape": None}, "three multiples of 32"),
        ({"encoder": nn.Identity()}, "has its own encoder"),
        ({"points_per_pass": 0}, "points_per_pass must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OccupancyNet(**{"variant": "c", **BRATS, **settings})
