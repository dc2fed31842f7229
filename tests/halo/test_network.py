"""Networks of both hosts, in virtual ranks: output and every parameter gradient equal those of the whole."""

from __future__ import annotations

import copy

import monai.networks.nets as nets
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from monai_memeff.halo import (
    Hub,
    NotPartitionable,
    gather,
    no_mesh,
    scatter,
    spatial_partition,
    unpartition,
    virtual_mesh,
)  # fmt: skip
from monai_memeff.halo.proof import verify
from tests.halo.networks import NETWORKS, unet


@pytest.mark.parametrize("name", NETWORKS)
def test_two_parts_equal_the_whole(name: str) -> None:
    assert verify(NETWORKS[name](), (1, 1, 32, 16, 16)) < 1e-10


@pytest.mark.parametrize("name", ["UNet instance", "BasicUNet nontrainable", "DynUNet", "ResidualEncoderUNet"])
def test_a_mesh_of_two_by_two(name: str) -> None:
    assert verify(NETWORKS[name](), (2, 1, 32, 32, 16), spatial=(2, 2)) < 1e-10


@pytest.mark.parametrize("name", ["UNet group", "PlainConvUNet"])
def test_one_row_per_part_at_the_bottom_and_an_uneven_last_part(name: str) -> None:
    assert verify(NETWORKS[name](), (1, 1, 16, 8, 8), spatial=(4,)) < 1e-10
    assert verify(NETWORKS[name](), (1, 1, 28, 8, 8), spatial=(4,)) < 1e-10
    assert verify(NETWORKS[name](), (1, 1, 8, 8, 20), spatial=(3,), axes=(2,)) < 1e-10


def test_three_axes_at_once() -> None:
    assert verify(unet(), (1, 1, 8, 12, 8), spatial=(2, 3, 2)) < 1e-10


def test_strict_reference_mode_equals_the_overlapped_one() -> None:
    network, x = unet().double(), torch.randn(1, 1, 16, 8, 8, dtype=torch.float64)
    outputs = []
    for overlap in (True, False):
        hub = Hub(2)
        mesh = virtual_mesh(hub, (2,))
        parts = spatial_partition(copy.deepcopy(network), mesh, overlap=overlap)
        outputs.append(hub.run(lambda _, parts=parts, mesh=mesh: gather(parts(scatter(x, mesh)), mesh))[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=0)


def test_keys_references_and_copies_survive_and_it_can_be_undone() -> None:
    network = unet()
    keys, parameters, kinds = (
        list(network.state_dict()),
        list(network.parameters()),
        [type(m) for m in network.modules()],
    )
    assert spatial_partition(network, no_mesh()) is network
    assert list(network.state_dict()) == keys
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert isinstance(copy.deepcopy(network)(torch.zeros(1, 1, 8, 8, 8)), torch.Tensor)
    unpartition(network)
    assert [type(m) for m in network.modules()] == kinds
    assert "halo_key" not in vars(network)


def test_running_statistics_are_those_of_the_whole_volume() -> None:
    whole = unet("batch").double()
    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))
    parts = spatial_partition(copy.deepcopy(whole), mesh)
    ranks = [copy.deepcopy(parts) for _ in range(2)]
    x = torch.randn(2, 1, 12, 8, 8, dtype=torch.float64)
    whole(x)
    hub.run(lambda r: ranks[r](scatter(x, mesh)))
    for rank in ranks:
        for (name, a), b in zip(whole.named_buffers(), rank.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_checkpointing_inside_the_network_recomputes_the_same() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.up = nn.Conv3d(1, 2, 3, 2, 1), Block(), nn.Conv3d(2, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(checkpoint(self.b, self.a(x), use_reentrant=False))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv3d(2, 2, 3, padding=1), nn.InstanceNorm3d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.leaky_relu(self.norm(self.conv(x)))
            return nn.functional.interpolate(y + x, scale_factor=2, mode="trilinear", align_corners=True)

    assert verify(Net(), (1, 1, 16, 8, 8)) < 1e-10


def test_a_layer_outside_the_table_is_refused_by_name_and_the_network_left_alone() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.LocalResponseNorm(2))
    with pytest.raises(NotPartitionable, match="Layer '1' \\(LocalResponseNorm\\)"):
        spatial_partition(network, no_mesh())
    assert type(network[0]) is nn.Conv3d
    with pytest.raises(NotPartitionable, match="LayerNorm"):
        spatial_partition(nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12), no_mesh())


@pytest.mark.parametrize(
    "call",
    [lambda x: x.flip(2), lambda x: torch.roll(x, 1, 2), lambda x: x.mean(), lambda x: x.flatten(2),
     lambda x: x[..., :2],
     lambda x: nn.functional.group_norm(x, 1), lambda x: nn.functional.conv3d(x, x[:1]), lambda x: x.softmax(2),
     lambda x: x + torch.ones(x.shape)],
    ids=["flip", "roll", "mean", "flatten", "slice", "group_norm", "conv3d", "softmax over rows", "local constant"],
)  # fmt: skip
def test_a_call_outside_the_list_is_refused_with_the_module_name(call: object) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x)  # type: ignore[operator]

    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), Odd())
    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))
    spatial_partition(network, mesh, multiple=1)
    with pytest.raises(NotPartitionable, match="Layer '1'"):
        hub.run(lambda _: network(scatter(torch.zeros(1, 1, 8, 4, 4), mesh)))


def test_bad_input_is_refused_on_every_rank() -> None:
    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))
    network = spatial_partition(unet(), mesh)
    with pytest.raises(ValueError, match="at most 1 parts, got 2"):
        scatter(torch.zeros(1, 1, 6, 8, 8), mesh)
    errors: list[str] = []

    def uneven(rank: int) -> None:
        try:
            network(torch.zeros(1, 1, 6 if rank == 0 else 8, 8, 8))
        except NotPartitionable as error:
            errors.append(str(error))

    hub.run(uneven)
    assert len(errors) == 2
    assert "multiples of 4" in errors[0]
    with pytest.raises(ValueError, match="partitioned already"):
        spatial_partition(network, mesh)
    with pytest.raises(ValueError, match="only 3 spatial axes"):
        spatial_partition(unet(), no_mesh((3,)))


def test_ranks_in_different_modes_are_refused_on_every_rank() -> None:
    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))
    network, errors = spatial_partition(unet(), mesh), []

    def mixed(rank: int) -> None:
        with torch.set_grad_enabled(rank == 0):
            try:
                network(torch.zeros(1, 1, 8, 8, 8))
            except NotPartitionable as error:
                errors.append(str(error))

    hub.run(mixed)
    assert len(errors) == 2
    assert "ranks differ" in errors[0]


def test_dropout_masks_are_shared_by_channel_and_distinct_by_voxel() -> None:
    for layer, same in ((nn.Dropout3d(0.5), True), (nn.Dropout(0.5), False)):
        network = nn.Sequential(nn.Conv3d(1, 32, 1), layer)
        nn.init.ones_(network[0].weight)
        nn.init.zeros_(network[0].bias)
        hub = Hub(2)
        mesh = virtual_mesh(hub, (2,))
        spatial_partition(network, mesh)
        a, b = hub.run(lambda _, n=network, m=mesh: n(scatter(torch.ones(1, 1, 8, 4, 4), m)))
        assert torch.equal(a, b) is same
        assert set(a.unique().tolist()) == {0.0, 2.0}
