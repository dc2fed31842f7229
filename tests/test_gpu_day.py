"""The script for the day a GPU is there runs through on a fake CUDA device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.gpu_day import SECTIONS, Day, run_sections


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "convolutions"])
@pytest.mark.slow
def test_a_section_runs_dry(section: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    failed = run_sections(Day(torch.device("cuda"), True), [section], 5, rows)
    found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    assert not failed, found
    assert {row["section"] for row in found} == {section}
    assert not [row for row in found if "error" in row or "reason" in row]


def test_a_failing_section_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Day) -> None:
        raise RuntimeError("no such card")

    monkeypatch.setitem(SECTIONS, "broken", (broken, 1))
    rows = tmp_path / "rows.jsonl"
    assert run_sections(Day(torch.device("cpu"), True), ["broken"], 1, rows) == 1
    assert "no such card" in json.loads(rows.read_text("utf-8"))["error"]
