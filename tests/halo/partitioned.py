"""Runs a network whole and in parts, by the inferer that users call: the parts are exact, or refused with a reason."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from monai_memeff.halo.planning import plan as planning
from monai_memeff.halo.planning.capture import capture

Setting = tuple[int, int]  # axis, parts


@dataclass
class Tally:
    """How many cases were exact, and what was refused."""

    exact: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """Number of cases."""
        return self.exact + len(self.refused)


@contextlib.contextmanager
def one_capture() -> Iterator[None]:
    """Every network is captured once for all settings tried in the block; the rest of the path is the users'."""
    known: dict[Any, Any] = {}

    def remembered(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        shapes = [
            (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x for x in pytree.tree_leaves((args, kwargs))
        ]
        key = (id(network), network.training, str(shapes))
        if key not in known:
            try:
                known[key] = (network, capture(network, args, kwargs))
            except NotPartitionableError as refusal:
                known[key] = (network, refusal)
        if isinstance(known[key][1], NotPartitionableError):
            raise known[key][1]
        return known[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "capture", remembered)
        yield


def plain(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """What the network itself returns; its buffers and random numbers stay as they were."""
    kept = {k: v.clone() for k, v in network.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        result = network(*args, **(kwargs or {}))
    for name, value in network.named_buffers():
        value.copy_(kept[name])
    return result


def difference(actual: Any, expected: Any) -> float:
    """The largest difference over the largest value; inf where structure, shape, type or NaN differ."""
    found, found_spec = pytree.tree_flatten(actual)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    if found_spec != wanted_spec:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if not isinstance(b, torch.Tensor):
            worst = worst if a == b else float("inf")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        a, b = (t.cpu().to(torch.complex128 if t.is_complex() else torch.float64) for t in (a.detach(), b.detach()))
        same = (a == b) | (torch.isnan(a) & torch.isnan(b))
        scale = b[torch.isfinite(b)].abs().max().clamp(min=1e-6) if torch.isfinite(b).any() else torch.ones(())
        apart = torch.where(same, torch.zeros((), dtype=a.dtype), a - b).abs()
        if apart.numel():
            worst = max(worst, float((torch.nan_to_num(apart, nan=float("inf")) / scale).max()))
    return worst


def clones(tree: Any) -> Any:
    """Copies of the tensors of an argument, so that a call cannot change them."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else copy.copy(x), tree)


def try_settings(
    network: nn.Module,
    args: tuple[Any, ...],
    settings: Sequence[Setting],
    kwargs: dict[str, Any] | None = None,
    tolerance: float = 1e-9,
    tally: Tally | None = None,
    **options: Any,
) -> Tally:
    """Compare parts with the whole in several settings.

    Raises:
        AssertionError: for a wrong result, for arguments or buffers left different, or for an exception other than a
            refusal that gives a reason.
    """
    tally = Tally() if tally is None else tally
    kwargs = kwargs or {}
    plain_args = clones(args)
    expected = clones(plain(network, plain_args, clones(kwargs)))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with one_capture():
        for axis, parts in settings:
            what = f"{network}\n{[tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]} {axis=} {parts=}"
            mine = clones(args)
            try:
                got = SpatialPartitionInferer(parts, axis=axis, **options)(
                    mine[0], network, *mine[1:], **clones(kwargs)
                )
            except NotPartitionableError as refusal:
                tally.refused.append(str(refusal))
                continue
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}\n{what}") from error
            error = difference(got, expected)
            assert error <= tolerance, f"off by {error:.2e}\n{what}"
            assert difference(mine, plain_args) == 0, f"arguments differ afterwards\n{what}"
            for name, value in network.state_dict().items():
                assert torch.equal(value, before[name]) or value.isnan().any(), f"{name} changed\n{what}"
            tally.exact += 1
    return tally
