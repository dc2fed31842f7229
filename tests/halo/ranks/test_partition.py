"""The module stays what it was; what is ambiguous or differs between ranks is refused on all of them."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import monai.networks.nets as nets
import pytest
import torch
from torch import nn

from monai_memeff.halo import (
    NotPartitionableError,
    SpatialLoss,
    gather,
    init_mesh,
    parallelize,
    plan,
    scatter,
    spatial_partition,
    unpartition,
)
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from tests.halo.networks import unet
from tests.halo.ranks.compare import captured_once, distance, worst
from tests.halo.ranks.threads import run_ranks


def small(*more: nn.Module) -> nn.Module:
    """Two convolutions around a norm."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Conv3d(4, 2, 3, padding=1), *more]
    return nn.Sequential(*layers).double()


def volume(*shape: int) -> torch.Tensor:
    """Random values."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_keys_references_class_and_copies_survive_and_it_can_be_undone() -> None:
    network, mesh, x = unet(), init_mesh(spatial=(1,)), torch.randn(1, 1, 8, 8, 8)
    keys, parameters, kind = list(network.state_dict()), list(network.parameters()), type(network)
    attributes = [set(m.__dict__) for m in network.modules()]
    expected = network(x)
    assert spatial_partition(network, mesh) is network
    assert (type(network), list(network.state_dict())) == (kind, keys)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    copied = copy.deepcopy(network)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    for found in (network(scatter(x, mesh)), network.forward(scatter(x, mesh)), network(x)):
        torch.testing.assert_close(found, expected)
    other = copied(scatter(x, mesh))
    assert distance(other.detach(), expected.detach()) > 1e-3
    torch.testing.assert_close(unpartition(copied)(x), other)
    with pytest.raises(ValueError, match="partitioned already"):
        spatial_partition(network, mesh)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(network)
    with pytest.raises(NotPartitionableError, match=r"'model\.0' of a partitioned network was called by itself"):
        network.model[0](x)
    unpartition(network)
    assert [set(m.__dict__) for m in network.modules()] == attributes
    torch.testing.assert_close(network(x), expected)
    pickle.dumps(network)


def test_a_network_that_cannot_be_parallelized_stays_as_it_was() -> None:
    network, x = small(), volume(1, 1, 8, 8, 8)
    attributes, expected = [set(m.__dict__) for m in network.modules()], network(x)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        parallelize(network, init_mesh(spatial=(1,)))
    assert [set(m.__dict__) for m in network.modules()] == attributes
    torch.testing.assert_close(network(x), expected)


def test_a_partitioned_network_is_not_planned_or_streamed() -> None:
    network = spatial_partition(small(), init_mesh(spatial=(1,)))
    with pytest.raises(NotPartitionableError, match=r"partitioned already .* unpartition\(network\) before plan"):
        plan(network, (1, 1, 8, 8, 8))


def test_a_call_in_another_thread_is_refused_while_a_plan_is_made() -> None:
    refusals, x = list[str](), volume(1, 1, 6, 5, 4)

    def meanwhile(*_: Any) -> None:
        if not refusals:
            with ThreadPoolExecutor(1) as other:
                refusals.append(str(other.submit(network, x).exception()))

    network = small()
    expected = network(x).detach()
    network[1].register_forward_hook(meanwhile)
    network = spatial_partition(network, init_mesh(spatial=(1,)))
    torch.testing.assert_close(network(x).detach(), expected)
    assert "while another one makes its plan: call it in one thread" in refusals[0]
    torch.testing.assert_close(network(x).detach(), expected)


def test_hooks_see_the_whole() -> None:
    network = small()
    network.register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(),))
    network.register_forward_hook(lambda m, args, out: out.flip(2) / out.shape[2])
    network[1].register_forward_hook(lambda m, args, out: out + args[0].amax())
    assert worst(network, [volume(2, 1, 11, 5, 4)], (3,)) < 1e-10

    def direct(mesh: HaloMesh) -> Any:
        return spatial_partition(copy.deepcopy(network), mesh).forward(scatter(volume(1, 1, 8, 4, 4), mesh))

    with pytest.raises(NotPartitionableError, match=r"call network\(...\)"):
        run_ranks(direct)


class Two(nn.Module):
    """A volume, a thumbnail and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv3d(1, 3, 3, padding=1), nn.Conv3d(1, 3, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, small: torch.Tensor, vector: torch.Tensor, scale: float = 1.0) -> Any:
        y = nn.functional.interpolate(self.b(small), x.shape[2:], mode="trilinear") + self.a(x) * scale
        return {"out": [y + self.c(vector)[:, :, None, None, None]], "none": None, "small": (self.b(small), 3)}


def test_inputs_of_other_sizes_and_nested_outputs() -> None:
    torch.manual_seed(0)
    inputs = [volume(2, 1, 12, 6, 6), volume(2, 1, 5, 3, 3), volume(2, 4)]
    assert worst(Two().double(), inputs, (3,)) < 1e-10


def test_what_may_be_a_part_or_a_whole_is_refused_on_every_rank() -> None:
    network, x, thumb, vector = Two().double(), volume(1, 1, 12, 6, 6), volume(1, 1, 6, 6, 6), volume(1, 4)

    def ambiguous(mesh: HaloMesh) -> None:
        with pytest.raises(NotPartitionableError, match="may be a part or a whole"):
            spatial_partition(copy.deepcopy(network), mesh)(scatter(x, mesh), thumb, vector)

    def stale(mesh: HaloMesh) -> None:
        part = scatter(x, mesh)
        part.resize_(1, 1, 2, 6, 6)
        with pytest.raises(NotPartitionableError, match="scatter it again"):
            spatial_partition(copy.deepcopy(network), mesh)(part, scatter(thumb, mesh), vector)

    def different(mesh: HaloMesh) -> None:
        parts = scatter(x, mesh), scatter(thumb, mesh)
        with pytest.raises(NotPartitionableError, match="differ in inputs"):
            spatial_partition(copy.deepcopy(network), mesh)(*parts, vector + mesh.comm.rank)

    def one_sided(mesh: HaloMesh) -> None:
        second = thumb if mesh.comm.rank else scatter(thumb, mesh)
        with pytest.raises(NotPartitionableError, match=r"may be a part|Spatial ranks \[1\] refused"):
            spatial_partition(copy.deepcopy(network), mesh)(scatter(x, mesh), second, vector)

    for case in (ambiguous, stale, different, one_sided):
        run_ranks(case)


def test_ranks_in_different_modes_are_refused_on_every_rank() -> None:
    start = small(nn.Dropout(0.5))

    def mixed(mesh: HaloMesh, what: str) -> None:
        network = spatial_partition(copy.deepcopy(start), mesh)
        first = mesh.comm.rank == 0
        network.train(first or what != "training mode")
        network[0].weight.requires_grad_(first or what != "parameters that want gradients")
        with (
            torch.set_grad_enabled(first or what != "gradient mode"),
            torch.autocast("cpu", torch.bfloat16, enabled=first and what == "autocast"),
            pytest.raises(NotPartitionableError, match=f"ranks differ in .*{what}"),
        ):
            network(scatter(volume(1, 1, 8, 4, 4), mesh))

    for what in ("training mode", "parameters that want gradients", "gradient mode", "autocast"):
        run_ranks(lambda mesh, what=what: mixed(mesh, what))


def test_unmarked_parts_of_a_first_volume_may_have_any_size() -> None:
    network, x, bounds = small(), volume(1, 1, 9, 4, 4), (0, 1, 7, 9)

    def work(mesh: HaloMesh) -> torch.Tensor:
        part = x[:, :, slice(*bounds[mesh.comm.rank : mesh.comm.rank + 2])]
        return gather(spatial_partition(copy.deepcopy(network), mesh)(part), mesh)

    with captured_once():
        for found in run_ranks(work, (3,)):
            torch.testing.assert_close(found, network(x), atol=1e-12, rtol=0)
    with pytest.raises(NotPartitionableError, match="not split"):
        run_ranks(lambda mesh: spatial_partition(copy.deepcopy(network), mesh)(x[..., : 3 + mesh.comm.rank]))


@pytest.mark.slow
def test_a_setting_that_changes_is_noticed() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep = nn.Conv3d(1, 2, 3, padding=1), True

        def forward(self, x: torch.Tensor) -> Any:
            y = self.conv(x)
            return (y, y[:, :, ::2]) if self.deep else y

    network, mesh, x = Switched(), init_mesh(spatial=(1,)), torch.randn(1, 1, 6, 4, 4)
    spatial_partition(network, mesh)
    assert len(network(x)) == 2
    network.deep = False
    assert network(x).shape == (1, 2, 6, 4, 4)
    hook = network.register_forward_hook(lambda m, args, out: out * 0)
    assert not network(x).any()
    hook.remove()
    assert network(x).any()


@pytest.mark.slow
def test_a_cached_tensor_that_changes_is_noticed() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.grid, self.many = nn.Conv3d(1, 1, 1), torch.ones(6, 1, 1), [torch.ones(6, 1, 1)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.grid + self.many[0]

    network, x = Cached(), torch.randn(1, 1, 6, 4, 4)
    parts = spatial_partition(copy.deepcopy(network), init_mesh(spatial=(1,)))
    torch.testing.assert_close(parts(x), network(x))
    for model in (network, parts):
        model.grid = torch.arange(6.0).view(6, 1, 1)
    torch.testing.assert_close(parts(x), network(x))
    for model in (network, parts):
        model.many[0].mul_(3)
    torch.testing.assert_close(parts(x), network(x))


def test_a_network_that_cannot_be_captured_is_refused_before_it_runs() -> None:
    class Peeks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if float(x.mean()) > 0 else x

    def work(mesh: HaloMesh) -> None:
        with pytest.raises(NotPartitionableError):
            spatial_partition(nn.Sequential(nn.Conv3d(1, 1, 3), Peeks()), mesh)(
                scatter(torch.ones(1, 1, 8, 4, 4), mesh)
            )

    run_ranks(work)


def test_layers_shared_and_parametrized() -> None:
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 2, 3, padding=1))
    network = nn.Sequential(nn.Conv3d(1, 2, 3), conv, nn.PReLU(), conv).double()
    assert worst(network, [volume(1, 1, 9, 5, 5)], (2,)) < 1e-10


@pytest.mark.slow
def test_an_output_that_is_not_spread_is_the_same_on_every_rank() -> None:
    network = nets.DenseNet(3, 1, 3, init_features=4, growth_rate=2, block_config=(1, 1), norm="instance").double()
    x = volume(2, 1, 20, 16, 16)

    def work(mesh: HaloMesh) -> torch.Tensor:
        return gather(spatial_partition(copy.deepcopy(network), mesh)(scatter(x, mesh)), mesh)

    with captured_once():
        for found in run_ranks(work):
            torch.testing.assert_close(found, network(x))


class WithTerm(nn.Module):
    """A segmentation and a term of the loss, as SegResNetVAE returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        return y, y.square().mean()


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.slow
def test_a_term_that_every_rank_has_counts_once(averaged: bool) -> None:
    torch.manual_seed(0)
    network, x, target = WithTerm().double(), volume(1, 1, 7, 4, 4), volume(1, 2, 7, 4, 4)
    y, term = network(x)
    (nn.functional.mse_loss(y, target) + 0.1 * term).backward()

    def work(mesh: HaloMesh) -> dict[str, torch.Tensor]:
        mine = spatial_partition(copy.deepcopy(network), mesh)
        mine.zero_grad()
        y, term = mine(scatter(x, mesh))
        with pytest.raises(NotPartitionableError, match="same on every rank"):
            term.backward(retain_graph=True)
        mine.zero_grad()
        loss = SpatialLoss(nn.MSELoss(), mesh, averaged=averaged)
        (loss(y, scatter(target, mesh)) + 0.1 * loss.replicated(term, term)).backward()
        return {n: p.grad / (mesh.size if averaged else 1) for n, p in mine.named_parameters()}

    with captured_once():
        results = run_ranks(work, (3,))
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(sum(r[name] for r in results), parameter.grad)


def test_an_outer_checkpoint_recomputes_the_same_on_ranks_with_and_without_rows() -> None:
    from torch.utils.checkpoint import checkpoint

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    whole = Outer()

    def work(mesh: HaloMesh) -> dict[str, torch.Tensor]:
        outer = copy.deepcopy(whole)
        spatial_partition(outer.inner, mesh)
        outer(scatter(volume(1, 1, 3, 4, 4), mesh)).square().sum().backward()
        return {n: p.grad for n, p in outer.named_parameters()}

    whole(volume(1, 1, 3, 4, 4)).square().sum().backward()
    with captured_once():
        results = run_ranks(work, (4,))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(sum(r[name] for r in results), parameter.grad)
