"""Networks that ask tensors for their exact type are refused with the line; other questions are answered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer
from tests.halo.kinds import small_conv


class Asks(nn.Module):
    """Doubles what a question says."""

    def __init__(self, question: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.question = small_conv(3).double(), question

    def forward(self, x: Tensor) -> Tensor:
        """Twice as much where the answer is yes."""
        y: Tensor = self.conv(x)
        return 2 * y if self.question(y) else y


def is_exactly(x: Tensor) -> bool:
    return type(x) is torch.Tensor


def is_called(x: Tensor) -> bool:
    return type(x).__name__ == "Tensor"


def is_among(x: Tensor) -> bool:
    return x.__class__ in (Tensor, nn.Parameter)


def is_kept(x: Tensor) -> bool:
    kind = type(x)
    return x.dim() > 9 or kind is torch.Tensor


def is_kept_with_others(x: Tensor) -> bool:
    n, kind = 3, x.__class__
    name = kind.__name__
    return n > 4 or name == "Tensor"


def is_kept_on_the_way(x: Tensor) -> bool:
    return (kind := type(x)) in (nn.Parameter, Tensor) and kind is not None


Renamed = torch.Tensor
FACTORS = {nn.Parameter: 1, torch.Tensor: 2}


def is_renamed(x: Tensor) -> bool:
    return type(x) == Renamed  # noqa: E721 somebody's code


def is_in_a_table(x: Tensor) -> bool:
    return type(x) in FACTORS


def is_got_from_a_table(x: Tensor) -> bool:
    return FACTORS.get(type(x), 1) == 2


def is_looked_up(x: Tensor) -> bool:
    kind = type(x)
    return kind.__name__ != "FakeTensor" or {Tensor: True}[kind]


KNOWN: dict[type, bool] = {Tensor: True}


def is_known(x: Tensor) -> bool:
    """Keeps its answers by type, as einops does, and finds those that it lacks by isinstance."""
    kind = type(x)
    if kind not in KNOWN:
        KNOWN[kind] = isinstance(x, Tensor)
    return KNOWN[kind]


def is_tensor(x: Tensor) -> bool:
    kind, known = type(x.shape), {int: 1, float: 2}
    return (
        isinstance(x, Tensor)
        and type(x.shape[0]) is int
        and type(x) is not list
        and kind is torch.Size
        and known[type(x.shape[0])] == 1
    )


class Asked(Asks):
    """Asks in a hook's way: through another function."""

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return super().forward(-x if is_among(x) else x)


KEPT = [is_kept, is_kept_with_others, is_kept_on_the_way]
TABLES = [is_renamed, is_in_a_table, is_got_from_a_table, is_looked_up]


@pytest.mark.parametrize("question", [is_exactly, is_called, is_among, *KEPT, *TABLES])
def test_a_question_that_a_capture_answers_otherwise_is_refused(question: Callable[[Tensor], bool]) -> None:
    x = torch.randn(1, 2, 9, 4, 4, dtype=torch.float64)
    with pytest.raises(
        NotPartitionableError, match=rf"^Asks: {question.__name__} \(.*test_compared_types\.py:\d+\) compares"
    ):
        SpatialPartitionInferer(2)(x, Asks(question))


def test_functions_that_functions_call_are_read() -> None:
    with pytest.raises(NotPartitionableError, match=r"^Asked: is_among"):
        SpatialPartitionInferer(2)(torch.randn(1, 2, 9, 4, 4, dtype=torch.float64), Asked(is_tensor))


def test_hooks_are_read() -> None:
    network = small_conv(3).double()
    network.register_forward_hook(lambda module, args, y: y + 1 if type(y) is torch.Tensor else y)
    with pytest.raises(NotPartitionableError, match="compares the type of a tensor"):
        SpatialPartitionInferer(2)(torch.randn(1, 2, 9, 4, 4, dtype=torch.float64), network)


@pytest.mark.parametrize("question", [is_tensor, is_known])
def test_other_questions_are_answered(question: Callable[[Tensor], bool]) -> None:
    x, network = torch.randn(1, 2, 9, 4, 4, dtype=torch.float64), Asks(question)
    with torch.no_grad():
        torch.testing.assert_close(SpatialPartitionInferer(2)(x, network), network(x))
