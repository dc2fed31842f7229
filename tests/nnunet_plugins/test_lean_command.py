"""Lean prediction by commands: the variable, worker processes, and failures of a case, a disk or a worker."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunet_plugins import lean_prediction
from nnunet_plugins.__main__ import main
from nnunet_plugins.lean import fingerprint, switch
from nnunet_plugins.lean.cases.failures import PredictionError
from nnunet_plugins.lean.cases.workers import WorkerDiedError, Workers
from nnunet_plugins.lean.export.output import PREFIX, complete_files
from nnunet_plugins.lean.predict.files import FOLDER_VARIABLE
from nnunet_plugins.lean.trial import TrialModel, predictor_of, write_image
from tests.nnunet_plugins.host import ROOT, labels_of

STARTUP = ROOT / "nnunet_plugins" / "_startup"


class World:
    """A model, three images of which the second cannot be read, and the labels that stock nnU-Net gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        labels = {"background": 0, **{f"label{n}": n for n in range(1, 5)}}
        model = TrialModel(labels, patch=(8, 8, 8), folds=2, mirroring=(0,), transpose=(1, 0, 2))
        self.model = model.write(folder / "model")
        for case in "abc":
            write_image(self.images / f"{case}_0000.nii.gz", (13, 11, 12), (1.0, 1.2, 0.8), 1, ord(case))
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # as in nnU-Net's commands; the network's bits depend on it
        predictor_of(self.model).predict_from_files_sequential(str(self.images), self.new("stock"), True)
        torch.set_num_threads(threads)
        self.stock = labels_of(folder / "stock")
        self.whole = (self.images / "b_0000.nii.gz").read_bytes()
        (self.images / "b_0000.nii.gz").write_text("this is no image")

    def new(self, name: str) -> str:
        """An empty folder for results."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return str(self.folder / name)

    def check(self, name: str, cases: str, probabilities: bool = False) -> None:
        """Results are there for these cases and no others, nothing else is, and they are stock's in every voxel."""
        found = labels_of(self.folder / name)
        assert sorted(found) == [f"{case}.nii.gz" for case in cases]
        for file, labels in found.items():
            np.testing.assert_array_equal(labels, self.stock[file])
            assert labels.dtype == self.stock[file].dtype
        known = {"dataset.json", "plans.json", "predict_from_raw_data_args.json", *found}
        if probabilities:
            for case in cases:
                known |= {f"{case}.npz", f"{case}.pkl"}
                stock, lean = (np.load(self.folder / f / f"{case}.npz")["probabilities"] for f in ("stock", name))
                np.testing.assert_array_equal(stock, lean)
        assert {file.name for file in (self.folder / name).iterdir()} == known


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """See :class:`World`."""
    return World(tmp_path_factory.mktemp("lean"))


def run(world: World, *arguments: Any, **variables: str) -> subprocess.CompletedProcess:
    """Run a command in an environment in which our start-up file runs, as after pip install."""
    site = world.folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(STARTUP)!r})\n")
    paths = os.pathsep.join([str(site), str(STARTUP), str(ROOT)])
    threads = {"OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "2"}
    environment = {**os.environ, "PYTHONPATH": paths, **threads, **variables}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


COMMAND = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as e; e()"


@pytest.mark.exhaustive
def test_one_variable_and_the_same_command_with_worker_processes(world: World, capsys: Any) -> None:
    options = ["-i", world.images, "-o", world.new("out"), "-m", world.model, "-f", 0, 1, "-device", "cpu"]
    command = ["-c", COMMAND, *options, "-npp", 1, "-nps", 1, "--save_probabilities", "--continue_prediction"]
    done = run(world, *command, MEMEFF_NNUNET="lean")
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("1 of 3 cases failed, the others are done. b: ")
    assert "Traceback" not in done.stderr.split("Error: ")[-1].split("1 of 3")[0]
    world.check("out", "ac", True)
    (world.images / "b_0000.nii.gz").write_bytes(world.whole)
    more = [*map(str, options), "-npp", "0", "-nps", "0", "--save_probabilities", "--continue_prediction"]
    assert main(["predict", *more]) == 0
    (world.images / "b_0000.nii.gz").write_text("this is no image")
    assert "That's 1 cases" in capsys.readouterr().out
    world.check("out", "abc", True)


@pytest.mark.parametrize("value", ["", "0", "off", "OFF"])
def test_the_variable_that_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_NNUNET", value)
    switch.on_import(switch.PREDICTOR)
    assert not switch.is_on()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("wholly", "MEMEFF_NNUNET must be lean, whole or off, got 'wholly'.\n"),
        ("leen", "MEMEFF_NNUNET must be lean, whole or off, got 'leen'.\n"),
    ],
)
def test_values_that_are_refused(value: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("MEMEFF_NNUNET", value)
    with pytest.raises(SystemExit) as ended:
        switch.on_import(switch.EXPORT)
    assert ended.value.code == 2
    assert capsys.readouterr().err == words


def test_an_unknown_nnunet_keeps_its_functions(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(fingerprint, "KNOWN", {"2.8.1": "another digest"})
    monkeypatch.setenv("MEMEFF_NNUNET", "lean")
    fingerprint.refusal.cache_clear()
    try:
        switch.on_import(switch.PREDICTOR)
        assert not switch.is_on()
        assert "WARNING: MEMEFF_NNUNET=lean has no effect: the inference functions" in capsys.readouterr().err
        with pytest.raises(RuntimeError, match=r"are not those of 2\.8\.1"), lean_prediction():
            pass
        assert main(["predict"]) == 2
    finally:
        fingerprint.refusal.cache_clear()


@pytest.mark.slow
def test_the_command_of_our_own(world: World, capsys: Any) -> None:
    options = ["-i", world.images, "-o", world.new("own"), "-m", world.model, "-f", 0, 1, "-device", "cpu"]
    assert main(["predict", *map(str, options), "-npp", "0", "-nps", "0", "--disable_progress_bar"]) == 1
    assert capsys.readouterr().err.startswith("1 of 3 cases failed, the others are done. b: ")
    world.check("own", "ac")
    assert main(["predict", "-i", "x", "-o", world.new("own"), "-m", "nowhere", "-f", "0", "-device", "cpu"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not switch.is_on()


# Failures


@pytest.mark.slow
def test_a_disk_that_is_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    write = NibabelIO.write_seg

    def full_at_a(self: Any, labels: Any, name: str, properties: Any) -> None:
        write(self, labels, name, properties)
        if os.path.basename(name) == "a.nii.gz":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NibabelIO, "write_seg", full_at_a)
    predictor = predictor_of(world.model)
    with lean_prediction(), pytest.raises(PredictionError, match=r"2 of 3 .* a: OSError: .*No space left") as failed:
        predictor.predict_from_files_sequential(str(world.images), world.new("full"), True)
    assert "\n" not in str(failed.value)
    assert sorted(failed.value.failures) == ["a", "b"]
    world.check("full", "c", True)
    monkeypatch.setenv(FOLDER_VARIABLE, str(world.folder / "missing"))
    with lean_prediction(), pytest.raises(PredictionError, match=rf"3 of 3 .* set {FOLDER_VARIABLE}"):
        predictor.predict_from_files_sequential(str(world.images), world.new("full"))


def test_a_worker_that_dies_does_not_stop_the_others() -> None:
    with Workers(1, "export") as workers:
        jobs = [(abs, (-1,)), (os._exit, (3,)), (abs, (-2,)), (int, ("x",)), (abs, (-3,))]
        results = list(workers.in_order(iter(jobs)))
    assert [results[0], results[2], results[4]] == [1, 2, 3]
    assert isinstance(results[1], WorkerDiedError)
    assert "use fewer workers" in str(results[1])
    assert isinstance(results[3], ValueError)


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


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with complete_files(str(tmp_path / "a")) as name:
            Path(name + ".nii.gz").touch()
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_files_are_readable_as_nibabel_wrote_them(world: World) -> None:
    with lean_prediction(), pytest.raises(PredictionError):
        predictor_of(world.model).predict_from_files_sequential(str(world.images), world.new("files"))
    stock, lean = (nibabel.load(world.folder / folder / "a.nii.gz") for folder in ("stock", "files"))
    np.testing.assert_array_equal(stock.affine, lean.affine)
    assert stock.get_data_dtype() == lean.get_data_dtype()
