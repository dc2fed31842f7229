"""The step that the benchmark of sizes times is one that a network of ours takes, with gradients for every weight."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.sparse_scale_networks import Case, DenseStep, SparseStep, generated

OPTIONS = {"amp": False, "use_checkpoint": False}


@pytest.mark.slow
def test_ours_and_the_dense_step_run() -> None:
    case = Case(generated(64), 2)
    step = SparseStep(case, "ch512", "train", OPTIONS)
    assert step() > 0
    assert all(p.grad is not None for name, p in step.net.named_parameters() if not name.startswith("final"))
    assert SparseStep(case, "ch512", "test", OPTIONS)() > len(case.complete)
    assert DenseStep(Case(generated(64)[:, :, :16], 1), "ch512", "test", OPTIONS)() == torch.Size((64, 64, 64)).numel()
