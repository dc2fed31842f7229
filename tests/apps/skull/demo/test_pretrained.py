"""The shipped model: read with its grid, never guessed, refused when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_memeff.apps.skull.demo.pretrained import ModelGrid, shipped_model
from monai_memeff.apps.skull.demo.run import model_grid
from monai_memeff.apps.skull.demo.volume import prepare_head
from monai_memeff.bundles import WeightsRecord
from monai_memeff.errors import InputError
from monai_memeff.sparse import SparseCompletionNet

GRID = {"grid": 64, "cell_mm": 4, "headroom_mm": 24, "pool": 4}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return SparseCompletionNet().state_dict()


@pytest.fixture
def weights(state: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_a_model_is_used_where_a_record_says_its_grid(weights: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    assert shipped_model(tmp_path / "none") is None
    assert shipped_model(tmp_path) is None, "no record"
    WeightsRecord(weights, GRID).write()
    found = shipped_model(tmp_path)
    assert found is not None
    assert found.grid == ModelGrid(64, 4.0, 24.0, 4)
    assert model_grid(found, 64) == found.grid
    assert model_grid(found, 128) is None
    assert model_grid(None, 64) is None
    assert list(found.weights) == list(state)
    torch.save({name: value + 1 for name, value in state.items()}, weights)
    assert shipped_model(tmp_path) is None, "the record is that of other weights"


def test_weights_that_are_damaged_or_of_another_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot read the shipped model"):
        shipped_model(tmp_path)
    for content in ({"stem.0.weight": torch.ones(2)}, [1], torch.ones(2)):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(InputError, match="bring the file that shipped") as caught:
            shipped_model(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"grid": "x"}, {"grid": 0}, {"grid": 64.0}, {"grid": True}, {"cell_mm": -4}, {"cell_mm": None}, {"pool": [4]}],
    ids=str,
)
def test_a_record_that_makes_no_grid_is_refused(weights: Path, tmp_path: Path, change: dict[str, object]) -> None:
    WeightsRecord(weights, GRID | change).write()
    with pytest.raises(InputError, match="must give grid and pool as whole numbers"):
        shipped_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"grid": 64, "cell_mm": 4}', '{"sha256": 1, "settings": {}}', "\xff"])
def test_what_is_no_record_is_refused(weights: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"must be the record of model\.pt"):
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
