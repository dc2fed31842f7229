"""The page for torch-points3d's users: its example runs, and its tables name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import monai_memeff.sparse.points as points

PAGE = (Path(__file__).parents[3] / "docs" / "howto" / "torch_points3d.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs_and_finds_the_bones() -> None:
    pytest.importorskip("scipy", reason="filling a mask from its nearest points needs scipy")
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    found, bone, labels, ct = (names[name] for name in ("found", "bone", "labels", "ct"))
    assert found.shape == ct.shape
    assert torch.equal(found.affine, ct.affine)
    where = bone.as_tensor()
    right = (found.as_tensor() == labels.as_tensor() - 4)[where].float().mean()
    assert set(found.as_tensor()[where].tolist()) == {0, 1, 2}
    assert float(right) > 0.9


def test_the_tables_name_what_exists() -> None:
    rows = PAGE.partition("## What takes the place")[2].partition("## What is not here")[0]
    for name in points.__all__:
        assert name in rows or name in ("nn", "origin_of"), f"{name} is on offer and not on the page"
    for name in re.findall(r"`snn\.(\w+)", rows):
        assert hasattr(points.nn, name)
