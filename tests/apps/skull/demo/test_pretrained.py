"""The shipped model: read with its grid, never guessed, refused when it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.apps.skull.demo.pretrained import ModelGrid, shipped_model
from monai_memeff.apps.skull.demo.run import model_grid
from monai_memeff.apps.skull.demo.volume import prepare_head
from monai_memeff.errors import InputError

STATE = {"stem.0.weight": torch.ones(2)}


def test_a_model_says_its_grid_or_is_not_used(tmp_path: Path) -> None:
    assert shipped_model(tmp_path) is None
    torch.save(STATE, tmp_path / "model.pt")
    found = shipped_model(tmp_path)
    assert found is not None
    assert found.grid is None
    assert model_grid(found, 64) is None
    (tmp_path / "model.json").write_text(json.dumps({"grid": 64, "cell_mm": 4, "pool": 4, "headroom_mm": 24}))
    found = shipped_model(tmp_path)
    assert found is not None
    assert found.grid == ModelGrid(64, 4.0, 24.0, 4)
    assert model_grid(found, 64) == found.grid
    assert model_grid(found, 128) is None
    assert list(found.weights) == list(STATE)


def test_the_grid_may_stand_in_the_weights_file(tmp_path: Path) -> None:
    torch.save({"model": STATE, "grid": 64, "cell_mm": 4.0}, tmp_path / "model.pt")
    found = shipped_model(tmp_path)
    assert found is not None
    assert found.grid == ModelGrid(64, 4.0)
    assert list(found.weights) == list(STATE)


@pytest.mark.parametrize("text", ["{", "[1]", '{"grid": "x", "cell_mm": 4}', '{"grid": 0, "cell_mm": 4}'])
def test_a_damaged_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.pt").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot read the shipped model"):
        shipped_model(tmp_path)
    torch.save(STATE, tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError):
        shipped_model(tmp_path)


@pytest.mark.slow
def test_a_head_comes_onto_the_grid_of_the_model(ct: MetaTensor) -> None:
    head = prepare_head(ct, 64, model=ModelGrid(64, 4.0, 24.0, 2))
    assert head.cell_mm == pytest.approx(4.0)
    assert head.model is not None
    top = int(head.skull.any(axis=(0, 1)).nonzero()[0].max())
    assert (63 - top) * 4 == pytest.approx(24, abs=6)
    small = prepare_head(ct, 64, model=ModelGrid(64, 2.0))
    assert small.model is None
    assert any("larger than the shipped model's grid" in note for note in small.notes)


@pytest.mark.slow
def test_a_mask_is_shown_as_bone(ct: MetaTensor) -> None:
    mask = MetaTensor((ct.as_tensor() > 300).float(), affine=ct.affine)
    head, same = prepare_head(mask, 64, threshold=0.5), prepare_head(ct, 64)
    assert head.threshold == 500
    assert head.gray.max() > 900
    assert any("the image is a mask" in note for note in head.notes)
    assert (head.skull != same.skull).mean() < 0.05


def test_the_model_that_ships_is_used_on_its_grid() -> None:
    model = shipped_model()
    assert model is not None
    assert model.grid == ModelGrid(64, 4.0, 24.0, 4)
