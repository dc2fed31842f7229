"""Lean prediction that is killed, or has an unreadable image, a worker that dies or a full disk: others are written."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunet_plugins import lean_prediction
from nnunet_plugins.__main__ import main
from nnunet_plugins.lean.cases.failures import Failures, PredictionError
from nnunet_plugins.lean.cases.workers import WorkerDiedError, Workers, sendable
from nnunet_plugins.lean.export.output import PREFIX, complete_files
from nnunet_plugins.lean.predict.files import FOLDER_VARIABLE, NoRoomError, folders, reserve, roomiest
from nnunet_plugins.lean.trial import predictor_of
from tests.nnunet_plugins.host import ROOT
from tests.nnunet_plugins.lean_world import COMMAND, World, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """See :class:`World`."""
    return World(tmp_path_factory.mktemp("lean"))


def last_line(done: subprocess.CompletedProcess) -> str:
    """What the command said in the end; it is all that looks like an error."""
    *others, last = done.stderr.strip().splitlines()
    assert "Traceback" not in "".join(others), done.stderr
    return last


@pytest.mark.long
def test_a_kill_then_a_dying_worker_and_then_the_rest(world: World, capsys: Any) -> None:
    options = ["-i", world.images, "-o", world.new("out"), "-m", world.model, "-f", 0, 1, "-device", "cpu"]
    options += ["--save_probabilities", "--continue_prediction"]
    command = ["-c", COMMAND, *options, "-npp", 0, "-nps", 1]
    done = run(world, *command, MEMEFF_NNUNET="lean", KILL_COMMAND_AT="c.nii.gz")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (world.folder / "out" / "a.nii.gz").exists()
    assert_no_process_names(world.folder)
    done = run(world, *command, MEMEFF_NNUNET="lean", KILL_WORKER_AT="c.nii.gz")
    assert done.returncode == 1, done.stderr
    assert "That's 4 cases" in done.stdout  # a is done
    assert last_line(done).startswith("2 of 4 cases failed, the others are done. b: ")
    assert "c: WorkerDiedError: a worker process for export died twice" in last_line(done)
    world.check("out", "ade", True)
    (world.images / "b_0000.nii.gz").write_bytes(world.whole)
    assert main(["predict", *map(str, options), "-npp", "0", "-nps", "0"]) == 0
    (world.images / "b_0000.nii.gz").write_text("this is not an image")
    assert "That's 2 cases" in capsys.readouterr().out
    world.check("out", "abcde", True)


def assert_no_process_names(folder: Path, seconds: float = 60) -> None:
    """No process works on a folder any more: its environment does not name it."""
    end = time.time() + seconds
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and str(folder) in environment_of(pid)]:
        assert time.time() < end, left
        time.sleep(0.2)


def environment_of(pid: str) -> str:
    """The variables that a process started with; empty when it ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


SMALL_DISK = """
out=$1; kept=$2; shift 2
mount -t tmpfs -o size=96k none "$out"
"$@"; status=$?
cp -a "$out/." "$kept"
exit $status
"""


@pytest.mark.long
def test_a_disk_that_is_full(world: World) -> None:
    """The results of two cases fit."""
    out, kept = world.new("small"), world.new("kept")
    private = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("nobody may mount a small disk here (unshare --map-root-user --mount)")
    options = ["-i", world.images, "-m", world.model, "-f", 0, 1, "-device", "cpu", "-npp", 0, "-nps", 0]
    options += ["--save_probabilities", "--continue_prediction", "-o"]
    command = ["-m", "nnunet_plugins", "predict", *options, out]
    done = run(world, *command, before=[*private, "sh", "-c", SMALL_DISK, "sh", out, kept])
    assert done.returncode == 1, done.stderr
    assert last_line(done).startswith("3 of 5 cases failed, the others are done. b: ")
    assert last_line(done).count("No space left on device") == 2
    world.check("kept", "ac", True)
    assert main(["predict", *map(str, options), kept]) == 1  # b still cannot be read
    world.check("kept", "acde", True)


@pytest.mark.slow
def test_no_room_for_one_case_or_for_logits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    write = NibabelIO.write_seg

    def full_at_a(self: Any, labels: Any, name: str, properties: Any) -> None:
        write(self, labels, name, properties)
        if os.path.basename(name) == "a.nii.gz":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NibabelIO, "write_seg", full_at_a)
    predictor = predictor_of(world.model)
    with lean_prediction(), pytest.raises(PredictionError, match=r"2 of 5 .* a: OSError: .*No space left") as failed:
        predictor.predict_from_files_sequential(str(world.images), world.new("full"), True)
    assert "\n" not in str(failed.value)
    assert sorted(failed.value.failures) == ["a", "b"]
    world.check("full", "cde", True)
    monkeypatch.setenv(FOLDER_VARIABLE, str(world.folder / "missing"))
    with lean_prediction(), pytest.raises(PredictionError, match=rf"5 of 5 .* set {FOLDER_VARIABLE}"):
        predictor.predict_from_files_sequential(str(world.images), world.new("full"))


def test_folders_that_cannot_be_used_end_in_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.inference import predict_from_raw_data

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(
        sys, "argv", ["predict", *map(str, ("-i", world.images, "-o", file / "out", "-m", world.model))]
    )
    with lean_prediction(), pytest.raises(SystemExit, match=r"^NotADirectoryError: [^\n]*/out'$"):
        predict_from_raw_data.predict_entry_point_modelfolder()
    with pytest.raises(FileNotFoundError, match=r"/gone'$"), complete_files(str(tmp_path / "gone" / "a")):
        pass
    monkeypatch.setattr("nnunet_plugins.lean.predict.files.folders", lambda: [str(tmp_path / "gone"), str(file)])
    with pytest.raises(
        NoRoomError, match=r"needs 2\.0 KiB of disk .*/gone: No such file or directory; .*/file: Not a "
    ):
        reserve(2048)


def test_scratch_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert {str(tmp_path), tempfile.gettempdir()} <= set(folders())

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert str(tmp_path) in folders()  # without the one that Python knows
    room = {str(tmp_path): 3, str(tmp_path / "more"): 4}
    monkeypatch.setattr("nnunet_plugins.lean.predict.files.folders", lambda: list(room))
    monkeypatch.setattr(shutil, "disk_usage", lambda name: SimpleNamespace(free=room[name]))
    assert roomiest() == str(tmp_path)  # the other one is not there
    (tmp_path / "more").mkdir()
    assert roomiest() == str(tmp_path / "more")


def test_a_worker_that_dies_does_not_stop_the_others() -> None:
    with Workers(1, "export") as workers:
        jobs = [(abs, (-1,)), (os._exit, (3,)), (abs, (-2,)), (int, ("x",)), (abs, (-3,))]
        results = list(workers.in_order(iter(jobs)))
    assert [results[0], results[2], results[4]] == [1, 2, 3]
    assert isinstance(results[1], WorkerDiedError)
    assert "use fewer workers" in str(results[1])
    assert isinstance(results[3], ValueError)


def test_errors_come_back_from_worker_processes() -> None:
    class OfTwoWordsError(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} {second}")

    def fail() -> None:
        raise OfTwoWordsError("not", "here")

    with pytest.raises(RuntimeError, match=r"^OfTwoWordsError: not here$"):  # pickle could not make it anew
        sendable(fail)
    with pytest.raises(ZeroDivisionError):
        sendable(divmod, 1, 0)
    error = PredictionError({"a": "x"}, 3)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.failures) == (PredictionError, str(error), error.failures)


def test_failed_cases_of_one_name_in_two_folders_are_two() -> None:
    failures = Failures()
    failures.total = 3
    for name in ("one/a", "two/a", None):
        failures.add(name, "x")
    with pytest.raises(
        PredictionError, match=r"^3 of 3 cases failed, the others are done\. a: x; two/a: x; case 3: x$"
    ):
        failures.check()


def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom nnunet_plugins.lean.export.output import complete_files\n"
        "with complete_files(sys.argv[1]) as name:\n"
        "    open(name + '.nii.gz', 'w').close()\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.nii.gz").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(PREFIX)
    with complete_files(str(tmp_path / "b"), ".nii.gz") as name, complete_files(str(tmp_path / "c")) as other:
        for written in (name, other):
            Path(written + ".nii.gz").touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.nii.gz", "c.nii.gz"]


def test_results_go_where_links_lead(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "elsewhere")
    with complete_files(str(tmp_path / "a"), ".nii.gz") as name:
        Path(name + ".nii.gz").write_text("labels")
    assert (tmp_path / "elsewhere").read_text() == "labels"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii.gz", "elsewhere"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with complete_files(str(tmp_path / "a")) as name:
            Path(name + ".nii.gz").touch()
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert not list(tmp_path.iterdir())
