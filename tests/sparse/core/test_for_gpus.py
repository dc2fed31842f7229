"""What a GPU does otherwise, shown on the CPU: torch keeps the random state of the devices it sees, no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from monai_memeff.memory import checkpoint
from monai_memeff.sparse import CoarseToSparseUNet
from monai_memeff.sparse.networks import coarse_to_sparse


def test_checkpoints_with_dropout_see_the_device_of_its_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []

    def spy(function: Any, *args: Any) -> Any:
        given.append(args)
        return checkpoint(function, *args)

    monkeypatch.setattr(coarse_to_sparse, "checkpoint", spy)
    network = CoarseToSparseUNet(3, 2, 2, (4, 8), (2,), dropout=0.5, use_checkpoint=True)
    network(torch.randn(1, 2, 8, 8, 8)).square().sum().backward()
    assert len(given) == 3  # down and up of the coarse level, the sparse stage
    assert all(any(isinstance(value, torch.Tensor) for value in args) for args in given)
