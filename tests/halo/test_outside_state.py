"""What forward depends on, or leaves, outside of the network's parameters: exact, planned anew, or refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer, explain
from monai_memeff.halo.planning.state.fingerprint import fingerprint
from tests.halo.kinds import small_conv
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import difference, plain, try_settings

SCALE = 2.0
GRIDS: dict[Any, Any] = {}


def volume(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (1, 2, 11, 6, 5), dtype=torch.float64)


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


class Configured(nn.Module):
    """Reads a number from everywhere that Python keeps numbers."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.options = SimpleNamespace(by=2.0, inner={"list": [1.0]})
        self.array, self.table = np.ones(3), torch.ones(4, dtype=torch.float64)
        self.conv = small_conv(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Their product with a convolution."""
        numbers = self.options.by * self.options.inner["list"][0] * float(self.array.sum()) * self.factor
        return scaled(self.conv(x)) * numbers * (2 if self.table.sum() > 4 else 1) * torch.linspace(0, 1, x.shape[-1])


CHANGES: dict[str, Callable[[Configured, pytest.MonkeyPatch], object]] = {
    "attribute of an object": lambda n, patch: patch.setattr(n.options, "by", 3.0),
    "nested container": lambda n, patch: n.options.inner["list"].append(n.options.inner["list"].pop() + 1),
    "array": lambda n, patch: n.array.fill(5),
    "class attribute": lambda n, patch: patch.setattr(Configured, "factor", 7.0),
    "global of a function that is called": lambda n, patch: patch.setitem(globals(), "SCALE", 11.0),
    "content of a small tensor": lambda n, patch: n.table.data.add_(1),
    "hook": lambda n, patch: n.conv.register_forward_hook(lambda m, i, o: o + 1),
    "method": lambda n, patch: patch.setattr(nn.Conv3d, "forward", lambda self, x: x * 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.slow
def test_a_plan_is_made_again_when_what_code_sees_has_changed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, inferer = Configured().double().eval(), volume(), SpatialPartitionInferer(3)
    before = inferer(x, network)
    CHANGES[change](network, monkeypatch)
    expected = plain(network, (x,))
    assert difference(before, expected) > 1e-3
    assert difference(inferer(x, network), expected) < 1e-12


def test_the_default_type_counts() -> None:
    network, x, inferer = Call("line", lambda x: x + torch.arange(5) / 3), volume(), SpatialPartitionInferer(3)
    kept = torch.get_default_dtype()
    inferer(x, network)
    try:
        torch.set_default_dtype(torch.float64)
        assert difference(inferer(x, network), plain(network, (x,))) < 1e-15
    finally:
        torch.set_default_dtype(kept)


def test_nothing_changed_is_nothing_changed() -> None:
    network = Configured()
    first = fingerprint(network)
    assert first == fingerprint(network)
    network.conv.weight.data.add_(1)  # a plan holds no content of parameters
    assert first == fingerprint(network)
    network.table = network.table.clone()
    assert first != fingerprint(network)


@functools.lru_cache(maxsize=8)
def line(n: int) -> torch.Tensor:
    """A cached constant."""
    return torch.arange(n).view(-1, 1, 1)


class Caching(nn.Module):
    """Keeps constants outside of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = SimpleNamespace(grid=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds coordinates of three caches."""
        if x.shape[2:] not in GRIDS:
            GRIDS[x.shape[2:]] = (torch.arange(x.shape[3]).view(-1, 1) * 2, "a tuple")
        if self.helper.grid is None:
            self.helper.grid = torch.linspace(0, 1, x.shape[4], dtype=torch.float64)
        return x + line(x.shape[2]) + GRIDS[x.shape[2:]][0] + self.helper.grid


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.slow
def test_caches_of_constants_work_before_and_after(filled: bool) -> None:
    GRIDS.clear()
    line.cache_clear()
    network, x = Caching(), volume()
    expected = plain(Caching(), (x,)) if filled else None
    got = SpatialPartitionInferer(3)(x, network)
    if not filled:
        assert not GRIDS
        assert line.cache_info().currsize == 0
        assert network.helper.grid is None
        expected = plain(network, (x,))
    assert difference(got, expected) == 0
    assert difference(plain(network, (x,)), expected) == 0


@pytest.mark.parametrize("keep", ["list", "dictionary", "cell"])
@pytest.mark.slow
def test_a_hook_that_keeps_activations_is_refused(keep: str) -> None:
    network, kept, found = nn.Sequential(small_conv(3), nn.ReLU()).double(), [], {}
    cell = None

    def store(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        nonlocal cell
        if keep == "list":
            kept.append(output.detach())
        elif keep == "dictionary":
            found["at"] = (output, 1)
        else:
            cell = output * 2

    network[0].register_forward_hook(store)
    with pytest.raises(NotPartitionableError, match=r"test_outside_state\.py:\d+.*keeps a tensor outside"):
        SpatialPartitionInferer(3)(volume(), network)
    assert not kept
    assert not found
    assert cell is None


class Adds(nn.Module):
    """Changes its first argument, then reads the second."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The sum."""
        x.mul_(2)
        return x + y


@pytest.mark.slow
def test_arguments_that_share_memory() -> None:
    x = volume(1, 3, 11, 6, 5)
    for args in ((x, x), (x[:, :2], x[:, 1:])):
        with pytest.raises(NotPartitionableError, match="shares its memory; pass a copy"):
            SpatialPartitionInferer(3)(args[0], Adds(), args[1])
    assert try_settings(Adds(), (volume(), volume()), [(0, 3)]).exact == 1
    both = Call("both", lambda x, y: x + y.flip(2))
    assert difference(SpatialPartitionInferer(3)(x, both, x), plain(both, (x, x))) == 0


MEMORY: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "its own elements": (True, lambda x: x.contiguous().as_strided((11, 6), (30, 5)).view(-1, 6, 1) * x),
    "written": (True, lambda x: (y := x.clone(), y.as_strided((5,), (31,)).zero_(), y)[-1]),
    "a permuted tensor": (False, lambda x: x.transpose(2, 3).as_strided((1, 2, 11, 6, 5), (660, 330, 30, 5, 1))),
    "beyond a view": (False, lambda x: x[:, :, 2:].as_strided((1, 2, 11, 6, 5), (660, 330, 30, 5, 1), 0)),
}


def test_writes_into_windows_are_refused() -> None:
    network = Call("windows", lambda x: (y := x.clone(), y.unfold(2, 3, 3).mul_(2), y)[-1])
    with pytest.raises(NotPartitionableError, match="windows of unfold"):
        SpatialPartitionInferer(3)(volume(), network)


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.slow
def test_strides_read_memory(name: str) -> None:
    exact, fn = MEMORY[name]
    network = nn.Sequential(small_conv(3), Call(name, fn)).double()
    tally = try_settings(network, (volume(),), [(0, 3), (1, 2)])
    assert tally.exact == (2 if exact else 0)
    assert all("memory by strides" in reason for reason in tally.refused)


def test_branches_on_strides_are_those_of_the_argument() -> None:
    network = Call("strides", lambda x: x * 2 if x.is_contiguous() else x * x.stride(4))
    inferer = SpatialPartitionInferer(3)
    for x in (volume(), volume(1, 2, 5, 6, 11).transpose(2, 4)):
        assert difference(inferer(x, network), plain(network, (x,))) == 0


def test_autocast_inside_stays_as_the_network_has_it() -> None:
    conv = small_conv(3)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return conv(x)

    network, x = Call("float32 inside", forward, conv=conv), volume().float()
    network.fn = lambda x, conv: forward(x)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = SpatialPartitionInferer(3)(x, network), plain(network, (x,))
    assert got.dtype == torch.float32
    assert difference(got, expected) < 1e-6


def test_a_refusal_of_the_capture_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    (reason,) = explain(
        nn.Sequential(nn.Conv3d(1, 1, 3), Call("if", lambda x: x if x.sum() > 0 else -x)), (1, 1, 9, 9, 9)
    )
    assert "\n" not in reason
    assert "depends on the data" in reason
    shown = capfd.readouterr()
    assert not shown.err
    assert not shown.out


DATA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "read": lambda x: (x * 2).data + 1,
    "written": lambda x: (y := x * 2, y.data.mul_(3), y + 1)[-1],
    "rows written": lambda x: (y := x * 2, y.data[:, :, 2:4].zero_(), y + 1)[-1],
    "the argument's": lambda x: (x.data.mul_(2), x + 1)[-1],
}


@pytest.mark.parametrize("name", DATA)
def test_the_data_of_a_tensor_is_the_tensor(name: str) -> None:
    assert try_settings(nn.Sequential(Call(name, DATA[name]), small_conv(3)).double(), (volume(),), [(0, 3)]).exact == 1


class Kept(nn.Module):
    """Writes into a tensor that is not a buffer."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part, self.total = part, torch.zeros(5, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Counts."""
        total = self.total[1:] if self.part else self.total
        total += 1
        return x * self.total.sum()


@pytest.mark.parametrize("part", [False, True])
def test_writing_into_an_attribute_is_refused(part: bool) -> None:
    with pytest.raises(NotPartitionableError, match="register it as a buffer"):
        SpatialPartitionInferer(3)(volume(), Kept(part))


class Passes(nn.Module):
    """A network that is built like a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = small_conv(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """More than what is wrapped."""
        return self._orig_mod(x) * 2 - x.mean()


@pytest.mark.slow
def test_wrappers_are_taken_off_only_where_nothing_is_lost() -> None:
    assert try_settings(Passes().double(), (volume(),), [(0, 3)]).exact == 1
    compiled = torch.compile(small_conv(3).double(), backend="eager")
    compiled.register_forward_hook(lambda module, args, output: output * 2)
    x = volume()
    assert difference(SpatialPartitionInferer(3)(x, compiled), plain(compiled, (x,))) < 1e-12


def test_a_generator_of_its_own_is_refused() -> None:
    own = Call("own", lambda x: x + torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=x.dtype))
    with pytest.raises(NotPartitionableError):
        SpatialPartitionInferer(3)(volume(), own)
