"""The comparison of trainers on organs: parts without a patient in common, pieces that add up, rows and their table."""

from __future__ import annotations

import itertools
import json
import shutil
from argparse import Namespace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.benchmarks import nnunet_organs, nnunet_organs_table
from tests.benchmarks.nnunet_organs_data import SPLITS
from tests.benchmarks.nnunet_organs_rows import RECIPES, folder_of, is_done, key_of, read

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/benchmarks/nnunet_organs.py"


def test_every_patient_is_in_one_part() -> None:
    assert len(set(itertools.chain(*SPLITS.values()))) == sum(map(len, SPLITS.values())) == 24


def write_patients(folder: Path) -> Path:
    """Small images under the names of all patients: noise with a bright box for each of two organs."""
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps({"1": "One", "2": "Two"}))
    for patient in itertools.chain(*SPLITS.values()):
        labels = np.zeros((20, 18, 28), np.uint8)
        labels[4:9, 5:12, 6:12], labels[10:16, 5:12, 14:20] = 1, 2
        image = 300.0 * labels + np.random.default_rng(patient).normal(0, 50, labels.shape)
        for kind, volume in (("ct", image.astype(np.float32)), ("oar", labels)):
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"pt_{patient}_{kind}.nii.gz")
    return folder


@pytest.mark.slow
def test_pieces_give_what_one_piece_gives(tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    from tests.nnunet_plugins.host import Host

    host, data, work = Host(tmp_path / "host"), write_patients(tmp_path / "data"), tmp_path / "work"
    prepare = ["--data", data, "--work", work, "--crop", 16, 16, 24, "--plan-gb", 0.02]
    train = ["train", "--work", work, "--trainer", "SparseTrainer", "--iterations", 2]
    small = ["--settings", '{"sparse_trainer": {"num_res_units": 0, "refine_channels": [4, 4, 4]}}']
    pieces, whole = tmp_path / "pieces.jsonl", tmp_path / "whole.jsonl"
    piece = ["python", SCRIPT, *train, *small, "--jsonl", pieces, "--seconds-this-time", 1e-6]
    moved = ["python", tmp_path / "move.py"]
    (tmp_path / "move.py").write_text(f"import os; os.rename({str(work / 'results')!r}, {str(work / 'pieces')!r})")
    once = ["python", SCRIPT, *train, *small, "--jsonl", whole]
    host.run_in_one_process(["python", SCRIPT, "prepare", *prepare], piece, piece, moved, once)
    (first,), (second,) = read(pieces), read(whole)
    took = {"used", "predict_seconds", "step_peak_mib", "predict_peak_mib"}
    assert {name: first[name] for name in first if name not in took} == {
        name: second[name] for name in second if name not in took
    }
    assert first["iterations"] == 2
    assert set(first["test"]) == {f"pt_{number}" for number in SPLITS["test"]}
    assert set(first["test"]["pt_1"]) == {"One", "Two"}
    assert min(first[name] for name in took) > 0
    names = [file.name for file in (work / "raw/Dataset910_OpenKBP/imagesTr").iterdir()]
    assert len(names) == 18
    assert not [name for name in names for number in SPLITS["test"] if name.startswith(f"pt_{number}_")]
    shutil.rmtree(work)


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    """A prepared folder and no rows."""
    (tmp_path / "setting.json").write_text(json.dumps({"plan_gb": 0.25, "crop": [64, 64, 96]}))
    budget = {"seconds": 500.0, "iterations": None, "seconds_this_time": 700.0}
    where = {"work": tmp_path, "jsonl": tmp_path / "rows.jsonl", "device": "cpu"}
    return Namespace(trainers=list(RECIPES), seeds=[0, 1], settings={}, **budget, **where)


def test_a_run_goes_on_where_rows_are_missing(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def piece(options: Namespace, left: float) -> float:
        used = min(left, options.seconds)
        trained.append((options.trainer, options.seed, used))
        if used == options.seconds:
            with options.jsonl.open("a") as rows:
                rows.write(json.dumps(key_of(options)) + "\n")
        return used

    monkeypatch.setattr(nnunet_organs, "piece", piece)
    nnunet_organs.run(options)
    assert trained == [("nnUNetTrainer", 0, 500.0), ("ResEncM", 0, 200.0)]
    nnunet_organs.run(options)
    assert trained[2:] == [("ResEncM", 0, 500.0), ("SparseTrainer", 0, 200.0)]


def test_other_settings_are_another_training(options: Namespace) -> None:
    options.trainer, options.seed = "OccupancyTrainer", 0
    options.jsonl.write_text(json.dumps(key_of(options)) + "\n")
    assert is_done(options)
    before = folder_of(options)
    options.settings = {"occupancy_trainer": {"points": 100}}
    assert not is_done(options)
    assert folder_of(options) != before
    assert key_of(options)["settings"]["occupancy_trainer"] == {"patch_size": [64, 96, 64], "points": 100}


def row(name: str, seed: int, dice: list[float | None]) -> dict:
    """A row of one test patient."""
    scores = {"pt_1": dict(zip(("One", "Two"), dice, strict=True)), "pt_2": {"One": 0.5, "Two": None}}
    setting = {"device": "cpu", "plan_gb": 0.25, "crop": None, "seconds": 9.0, "iterations_asked": None}
    took = {"step_peak_mib": 100.4, "predict_seconds": 1.25, "predict_peak_mib": 7.0, "iterations": 10 + seed}
    run = {"name": name, "seed": seed, "settings": {}, "patch": [8, 8, 16], "batch": 2}
    return {**setting, **run, **took, "test": scores, "validation": scores}


def test_the_table_is_of_mean_and_spread_over_seeds() -> None:
    rows = [row("A", 0, [0.5, 0.7]), row("B", 0, [0.0, 1.0]), row("A", 1, [0.7, 0.9])]
    lines = nnunet_organs_table.table(rows).splitlines()
    assert lines[0] == "9 seconds each on cpu, plans for 0.25 GB, whole images"
    assert lines[4].startswith("| A | 2 | 8 x 8 x 16, 2 | 10 ± 1 | 0.675 ± 0.106 | 0.55 ± 0.07 | 0.80 ± 0.14 |")
    assert lines[5].startswith("| B | 1 | 8 x 8 x 16, 2 | 10 | 0.625 | 0.25 | 1.00 |")
    assert "10 iterations" in nnunet_organs_table.table([{**rows[0], "iterations_asked": 10}])
