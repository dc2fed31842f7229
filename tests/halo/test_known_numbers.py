"""Tensors that forward makes from numbers: code may read them, until something of the data is written into them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_memeff.halo import explain
from monai_memeff.memory import estimate_network
from tests.halo.kinds import small_conv
from tests.halo.ordinary_code import Call
from tests.halo.partitioned import try_settings
from tests.halo.ranks.compare import worst


def cropped(x: Tensor) -> Tensor:
    half = (torch.tensor(x.shape)[2:] - torch.tensor([9, 5, 4])) // 2
    return F.pad(x, (-torch.stack((half, half)).t().flatten().flip(0)).tolist())


def padded(x: Tensor) -> Tensor:
    missing = torch.as_tensor((14, 8, 6)) - torch.tensor(x.shape[2:])
    return F.pad(x, [missing[2] // 2, 0, 0, missing[1], missing[0] - missing[0] // 2, missing[0] // 2])


def written(x: Tensor) -> Tensor:
    scale = torch.zeros(3)
    tail = scale[1:]
    scale[0], scale[1:] = 2, torch.arange(2) + 1
    tail.mul_(3)
    scale.add_(1.0)
    return x * scale.tolist()[0] - tail.tolist()[1]


def stepped(x: Tensor) -> Tensor:
    for weight in torch.linspace(0, 1, 3):
        x = x * (1 + float(weight)) if weight > 0 else x
    return x


def masked(x: Tensor) -> Tensor:
    even, odd = torch.arange(x.shape[2]) % 2 == 0, torch.zeros(x.shape[2])
    odd[~even] = 1
    y = x * 1
    y[:, torch.tensor([True, False]), 1:, :] = 2
    for row in odd.nonzero().flatten():
        y = y + row
    return y[:, :, even] * torch.unique(odd).sum()


def into_a_statistic(x: Tensor) -> Tensor:
    mean = torch.zeros(2, dtype=x.dtype)
    F.batch_norm(x, mean, torch.ones_like(mean), training=True)
    return x * mean.tolist()[0]


def into_a_view(x: Tensor) -> Tensor:
    numbers = torch.zeros(3)
    first = numbers.view(3)[0]
    numbers[0] = x.sum()
    return x * first.item()


def into_a_detached_view(x: Tensor) -> Tensor:
    numbers = torch.zeros(3, dtype=x.dtype)
    numbers.detach().add_(x.sum())
    return x * numbers.tolist()[1]


def as_out(x: Tensor) -> Tensor:
    numbers = torch.zeros(5, dtype=x.dtype)
    torch.mul(x[0, 0, 0, 0], 2, out=numbers)
    return x * numbers.tolist()[0]


def into_a_list(x: Tensor) -> Tensor:
    """torch counts no such write."""
    numbers = torch.zeros(3, dtype=x.dtype)
    torch._foreach_add_([numbers[:1]], [x[0, 0, 0, 0, :1]])
    return x * numbers.tolist()[0]


def uncounted(x: Tensor) -> Tensor:
    numbers = torch.zeros(3, dtype=x.dtype)
    with torch.autograd._unsafe_preserve_version_counter(numbers):
        torch.ops.aten.add_.Tensor(numbers, x.sum())
    return x * numbers.tolist()[0]


KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": cropped,
    "pad": padded,
    "write": written,
    "mask": masked,
    "loop": stepped,
    "slice": lambda x: x[:, :, : torch.tensor(x.shape)[2] - 2],
    "size": lambda x: F.interpolate(x, size=tuple(torch.tensor(x.shape[2:]) + 1)),
    "product": lambda x: x.reshape(*x.shape[:2], torch.tensor(x.shape[2:]).prod()).unflatten(2, x.shape[2:]),
    "text": lambda x: {"[1, 2]": x}[f"{torch.tensor([1, 2]).tolist()}"],
}

OF_THE_DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "statistic": into_a_statistic,
    "view": into_a_view,
    "detached view": into_a_detached_view,
    "out": as_out,
    "list": into_a_list,
    "uncounted": uncounted,
    "drawn": lambda x: x * torch.randn(3).tolist()[0],
    "drawn in place": lambda x: x * torch.zeros(3).uniform_().tolist()[0],
    "nothing written": lambda x: x * torch.empty(3).tolist()[0],
}


def network(*code: Callable[[Tensor], Tensor]) -> nn.Sequential:
    return nn.Sequential(small_conv(3), *[Call("code", one) for one in code], small_conv(3)).double()


@pytest.mark.slow
def test_numbers_are_read_as_in_a_plain_call() -> None:
    x, whole = torch.randn(2, 2, 11, 6, 5, dtype=torch.float64), network(*KNOWN.values())
    assert try_settings(whole, (x,), [(0, 3), (2, 2)]).exact == 2
    assert worst(whole, [x]) < 1e-10
    assert estimate_network(whole, tuple(x.shape)).basis == "a dry run of every operation"


@pytest.mark.parametrize("name", OF_THE_DATA)
@pytest.mark.slow
def test_what_is_written_from_the_data_or_drawn_is_refused(name: str) -> None:
    (reason,) = explain(network(OF_THE_DATA[name]), (1, 2, 8, 6, 5))
    assert "depends on the data" in reason
