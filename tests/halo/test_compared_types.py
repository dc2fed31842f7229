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


def is_tensor(x: Tensor) -> bool:
    return isinstance(x, Tensor) and type(x.shape[0]) is int and type(x) is not list


class Asked(Asks):
    """Asks in a hook's way: through another function."""

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return super().forward(-x if is_among(x) else x)


@pytest.mark.parametrize("question", [is_exactly, is_called, is_among])
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


def test_other_questions_are_answered() -> None:
    x, network = torch.randn(1, 2, 9, 4, 4, dtype=torch.float64), Asks(is_tensor)
    with torch.no_grad():
        torch.testing.assert_close(SpatialPartitionInferer(2)(x, network), network(x))
