"""The script for the day a GPU is there runs through on a fake CUDA device."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from monai_memeff.sparse import backends
from tests.benchmarks.gpu_day import SECTIONS, Day, run_sections
from tests.benchmarks.gpu_day_sections import lines_until, run_for
from tests.benchmarks.sparse_gpu import processes
from tests.benchmarks.supervised import supervise

LONG = ("lean",)


def marked(section: str) -> object:
    """The section as a parameter with its mark."""
    return pytest.param(section, marks=pytest.mark.long if section in LONG else pytest.mark.slow)


@pytest.mark.parametrize("section", [marked(name) for name in SECTIONS if name != "convolutions"])
def test_a_section_runs_dry(section: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    failed = run_sections(Day(torch.device("cuda"), True), [section], 5, rows)
    found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    assert not failed, found
    assert {row["section"] for row in found} == {section}
    assert not [row for row in found if "error" in row or "reason" in row]
    if section == "ocnn" and backends.status("cpu")["ocnn"] is None:
        assert found[0]["differences"]["ocnn"] < 1e-4


def test_a_failing_section_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Day) -> None:
        raise RuntimeError("no such card")

    monkeypatch.setitem(SECTIONS, "broken", (broken, 1))
    rows = tmp_path / "rows.jsonl"
    assert run_sections(Day(torch.device("cpu"), True), ["broken"], 1, rows) == 1
    assert "no such card" in json.loads(rows.read_text("utf-8"))["error"]


SCRIPT = """
import os, sys, time
for name in sys.argv[1:]:
    print(f"# begins {name}", flush=True)
    print(f"{name} runs", flush=True)
    if name == "crashes":
        os.abort()
    if name == "hangs":
        time.sleep(100)
    if name == "poisons":
        sys.exit(3)
"""


def supervised(names: list[str], seconds: float = 60.0) -> tuple[int, list[tuple[str, str]]]:
    reports: list[tuple[str, str]] = []
    limits = {name: 1.0 if name == "hangs" else 30.0 for name in names}

    def command(left: list[str], _: float) -> list[str]:
        return [sys.executable, "-S", "-c", SCRIPT, *left]

    return supervise(command, limits, seconds, lambda *found: reports.append(found)), reports


def test_sections_after_a_crash_a_hang_and_an_error_of_the_device_run(capfd: pytest.CaptureFixture[str]) -> None:
    failed, reports = supervised(["first", "crashes", "second", "hangs", "third", "poisons", "last"])
    assert capfd.readouterr().out.splitlines() == [
        f"{name} runs" for name in ("first", "crashes", "second", "hangs", "third", "poisons", "last")
    ]
    assert failed == 3
    assert reports == [("crashes", "its process ended with status -6"), ("hangs", "stopped: its time was over")]


def test_what_no_time_is_left_for_is_said() -> None:
    assert supervised(["hangs", "last"], 0.5) == (
        1,
        [("hangs", "stopped: its time was over"), ("last", "no time was left")],
    )


def test_a_command_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    assert run_for([sys.executable, "-S", "-c", "raise SystemExit(5)"], 30) == 5
    started = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', sys.argv[1]]); time.sleep(50)"
    )
    late = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    assert run_for([sys.executable, "-S", "-c", started, late], 1.0) is None
    time.sleep(1.6)
    assert not (tmp_path / "late").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent")
def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    late = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    started = (
        "import sys, time; from tests.benchmarks.supervised import supervise;"
        f"supervise(lambda *_: [sys.executable, '-S', '-c', {late!r}], {{'late': 60.0}}, 60.0, print)"
    )
    assert run_for([sys.executable, "-S", "-c", started], 1.2) is None
    time.sleep(1.6)
    assert not (tmp_path / "late").exists()


def test_lines_come_while_a_process_writes_them(tmp_path: Path) -> None:
    end: Future[None] = Future()
    path = tmp_path / "rows.jsonl"
    path.touch()
    with path.open("a") as file, path.open() as written:
        lines = lines_until(end, written)
        file.write("one\ntw")
        file.flush()
        assert next(lines) == "one"
        file.write("o\n")
        file.flush()
        assert next(lines) == "two"
        file.write("last\nunfinished")
        file.flush()
        end.set_result(None)
        assert list(lines) == ["last"]


def test_engines_that_may_hang_have_processes_of_their_own() -> None:
    assert processes(["native", "triton", "spconv", "ocnn"]) == [
        (["native", "triton"], 2),
        (["triton", "spconv"], 1),
        (["triton", "ocnn"], 1),
    ]
    assert processes(["native", "triton"]) == [(["native", "triton"], 1)]
    assert processes(["native"]) == [(["native"], 1)]
    assert processes(["native", "ocnn"]) == [(["native", "ocnn"], 1)]
    assert processes(["ocnn"]) == [(["ocnn"], 1)]
