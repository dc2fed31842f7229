"""WeightsRecord: weights are refused on a grid that they were not trained for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine

from monai_memeff.bundles import WeightsRecord, bundle_path
from monai_memeff.bundles.record import recorded_settings
from tests.bundles.conftest import run_here


def test_only_the_recorded_weights_are_bound_to_their_settings(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    ours = WeightsRecord(weights, {"grid": 64, "cell_mm": 4.0})
    theirs = WeightsRecord(weights, {"grid": 128, "cell_mm": 2.0})
    ours.write()
    assert not list(tmp_path.iterdir()), "no weights, no record"
    theirs.check()
    weights.write_bytes(b"one")
    ours.write()
    ours.check()
    with pytest.raises(SystemExit, match=r"was trained with --grid 64 --cell_mm 4.0, got --grid 128 --cell_mm 2.0; "):
        theirs.check()
    theirs.write()  # the same weights: what is known of them stays
    ours.check()
    weights.write_bytes(b"two")
    theirs.check()
    theirs.write()
    with pytest.raises(SystemExit, match=r"was trained with --grid 128 --cell_mm 2.0, got --grid 64 --cell_mm 4.0; "):
        ours.check()


def test_the_shipped_weights_are_refused_on_another_grid(heads: Path, tmp_path: Path) -> None:
    bundle = bundle_path("skull_completion_sparse")
    folders = {"dataset_dir": str(heads), "output_dir": str(tmp_path), "ckpt_dir": str(bundle / "models")}
    said = r"model.pt was trained with --grid 64 --cell_mm 4.0 --pool 4, got --grid 128 "
    with pytest.raises(SystemExit, match=said):
        run_here(
            [bundle / "configs" / "inference.json"], "infer", **folders, grid=128, cell_mm=2.0, pool=2, inferer=None
        )


def test_the_shipped_record_is_of_the_shipped_weights() -> None:
    models = bundle_path("skull_completion_sparse") / "models"
    record = WeightsRecord(models / "model.pt", {})
    assert record._recorded() == json.loads((models / "model.json").read_text())["settings"]
    assert (models / "model.pt").stat().st_size < 2_000_000
    state = torch.load(models / "model.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_settings_are_compared_as_the_file_holds_them(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"one")
    record = WeightsRecord(weights, {"roi": (96, 96, 64), "cell_mm": 4.0})
    record.write()
    record.check()
    assert recorded_settings(weights) == {"roi": [96, 96, 64], "cell_mm": 4.0}
    WeightsRecord(weights, {"cell_mm": 4}).check()
    with pytest.raises(SystemExit, match=r"no record can keep .*give finite numbers and words"):
        WeightsRecord(weights, {"cell_mm": float("nan")})
    with pytest.raises(SystemExit, match="no record can keep"):
        WeightsRecord(weights, {"cell_mm": torch.ones(1)})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"settings": {}}', b'{"sha256": "a", "settings": 1}', b"[" * 9999],
)
def test_what_is_no_record_ends_in_one_line_before_a_training(tmp_path: Path, content: bytes) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"one")
    (tmp_path / "model.json").write_bytes(content)
    ours = WeightsRecord(weights, {"grid": 64})
    for call in (ours.check, ours.write, lambda: ours.attach(Engine(lambda *_: None))):
        with pytest.raises(SystemExit, match=r"must be the record of model\.pt") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "model.json").read_bytes() == content
