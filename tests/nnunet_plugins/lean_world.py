"""Five images of which the second cannot be read, a model, stock's labels, and commands that end in odd ways."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_plugins.lean.trial import TrialModel, predictor_of, write_image
from tests.nnunet_plugins.host import ROOT, labels_of

STARTUP = ROOT / "nnunet_plugins" / "_startup"

SITE = f'''"""Runs when Python starts: our start-up file, as after pip install, and a kill at the opening of a file."""
import os
import signal
import site
import sys

site.addsitedir({str(STARTUP)!r})


def kill(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & os.O_WRONLY:
        for variable, processes in (("KILL_WORKER_AT", [0]), ("KILL_COMMAND_AT", [os.getppid(), 0])):
            if os.path.basename(arguments[0]) == os.environ.get(variable):
                for process in processes:
                    os.kill(process or os.getpid(), signal.SIGKILL)


sys.addaudithook(kill)
'''


CASES = "abcde"


class World:
    """A model, five images of which the second cannot be read, and the labels that stock nnU-Net gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        labels = {"background": 0, **{f"label{n}": n for n in range(1, 5)}}
        model = TrialModel(labels, patch=(8, 8, 8), folds=2, mirroring=(0,), transpose=(1, 0, 2))
        self.model = model.write(folder / "model")
        for case in CASES:
            write_image(self.images / f"{case}_0000.nii.gz", (13, 11, 12), (1.0, 1.2, 0.8), 1, ord(case))
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # as in nnU-Net's commands; the network's bits depend on it
        predictor_of(self.model).predict_from_files_sequential(str(self.images), self.new("stock"), True)
        torch.set_num_threads(threads)
        self.stock = labels_of(folder / "stock")
        self.whole = (self.images / "b_0000.nii.gz").read_bytes()
        (self.images / "b_0000.nii.gz").write_text("this is not an image")

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


def run(world: World, *arguments: Any, before: Sequence[str] = (), **variables: str) -> subprocess.CompletedProcess:
    """Run Python where our start-up file runs, as after pip install; ``before`` are words of a command to start it."""
    site = world.folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    paths = os.pathsep.join([str(site), str(STARTUP), str(ROOT)])
    threads = {"OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "2"}
    environment = {**os.environ, "PYTHONPATH": paths, **threads, **variables}
    command = [*before, sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


COMMAND = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as e; e()"
