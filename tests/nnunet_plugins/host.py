"""A small generated nnU-Net world for tests: datasets, folders, short trainers, and the stock commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np

from nnunet_plugins.environment import VARIABLE, ext_folder
from tests.processes import run_module

ROOT = Path(__file__).resolve().parents[2]

SHORT_TRAINERS = '''"""Trainers of a user's own folder: as ours and as stock, but short."""
import os

from nnunet_plugins import SparseTrainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Short:
    """A few iterations; the number of epochs comes from the environment."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get("SHORT_EPOCHS", "1"))
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 1


class ShortSparseTrainer(Short, SparseTrainer):
    """Fewer features too."""
    num_res_units, refine_channels, context_channels, max_active = 1, (8, 8, 8), 4, 0.2


class ShortStockTrainer(Short, nnUNetTrainer):
    """The stock trainer."""
'''


def organs(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (two channels first) and its labels 0, 1, 2: a large and a small ellipsoid with noise."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, extent) for extent in shape), indexing="ij"))
    labels = np.zeros(shape, np.uint8)
    for label, radius in ((1, 0.6), (2, 0.3)):
        center = rng.uniform(-0.3, 0.3, 3)[:, None, None, None]
        labels[(((grid - center) / radius) ** 2).sum(0) < 1] = label
    image = np.stack([labels == 1, labels == 2]).astype(np.float32) * 100 + rng.normal(0, 20, (2, *shape))
    return image.astype(np.float32), labels


def write_dataset(raw: Path, name: str, cases: int, shape: tuple[int, int, int], **changes: object) -> Path:
    """Write a dataset in nnU-Net's raw format.

    Args:
        raw: the folder nnUNet_raw.
        name: DatasetXXX_Name.
        cases: training cases; one more is written to imagesTs.
        shape: of every image, in voxels.
        changes: entries of dataset.json; "spacing" is taken out and used, "ignored" marks a slab with that label.
    """
    folder = raw / name
    spacing = changes.pop("spacing", (1.0, 1.0, 1.0))
    ignored = changes.pop("ignored", None)
    affine = np.diag([*spacing, 1.0])
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    for case in range(cases + 1):
        image, labels = organs(shape, case)
        if ignored is not None:
            labels[: shape[0] // 4] = ignored
        part = "imagesTs" if case == cases else "imagesTr"
        for channel in range(2):
            nibabel.save(
                nibabel.Nifti1Image(image[channel], affine), folder / part / f"c_{case:03}_{channel:04}.nii.gz"
            )
        if case < cases:
            nibabel.save(nibabel.Nifti1Image(labels, affine), folder / "labelsTr" / f"c_{case:03}.nii.gz")
    description = {
        "channel_names": {"0": "MRI", "1": "PET"},
        "labels": {"background": 0, "large": 1, "small": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **changes,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


class Host:
    """nnU-Net's three folders below one, and its commands in an environment that knows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.preprocessed, self.results = (folder / part for part in ("raw", "preprocessed", "results"))
        for part in (self.raw, self.preprocessed, self.results, folder / "own_trainers"):
            part.mkdir(parents=True)
        (folder / "own_trainers" / "short_trainers.py").write_text(SHORT_TRAINERS)

    def environment(self, **extra: str) -> dict[str, str]:
        """The variables of nnU-Net; a user lists a folder of his own, ours is added at start-up if it is installed."""
        own = str(self.folder / "own_trainers")
        if find_spec("_monai_memeff_nnunet") is None:  # run from the source tree, not installed
            own = os.pathsep.join([own, ext_folder()])
        few_workers = {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        folders = {f"nnUNet_{part}": str(self.folder / part) for part in ("raw", "preprocessed", "results")}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, **few_workers, **folders, VARIABLE: own, "PYTHONPATH": paths, **extra}

    def run(self, command: str, *arguments: object, seconds: float = 600, **extra: str) -> str:
        """Run a console script as a user does; returns what it printed, and fails with it or after some seconds."""
        script = shutil.which(command, path=os.path.dirname(sys.executable)) or command
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        words = [script, *map(str, arguments)]
        process = subprocess.Popen(words, env=self.environment(**extra), cwd=self.folder, **pipes)
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes
            printed, _ = process.communicate(timeout=60)
            raise AssertionError(f"{words} hung for {seconds} s\n{printed[-5000:]}") from None
        return self._checked(subprocess.CompletedProcess(words, process.returncode, printed, ""))

    def run_in_one_process(self, *commands: list[object], **extra: str) -> str:
        """Run several commands one after the other in one forked process; see :mod:`tests.nnunet_plugins.commands`."""
        listed = json.dumps([[str(word) for word in command] for command in commands])
        where = {"folder": self.folder, "variables": self.environment(**extra)}
        return self._checked(run_module("tests.nnunet_plugins.commands", listed, **where))

    def _checked(self, done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        return done.stdout + done.stderr

    def prepare(self, dataset: Path, number: int, *options: object) -> Path:
        """Plan and preprocess 3d_fullres; returns the preprocessed folder."""
        arguments = ["-d", number, "-c", "3d_fullres", "-np", 1, "-npfp", 1, *options]
        self.run_in_one_process(["nnUNetv2_plan_and_preprocess", *arguments], nnUNet_n_proc_DA="1")
        return self.preprocessed / dataset.name

    def adopt(self, other: Host, dataset: str, name: str, **changes: object) -> Path:
        """Copy a preprocessed dataset of another host under a name; returns its raw folder.

        Args:
            other: who has it.
            dataset: its name there.
            name: its name here.
            changes: entries of dataset.json.
        """
        for part in ("raw", "preprocessed"):
            folder = self.folder / part / name
            shutil.copytree(other.folder / part / dataset, folder)
            for file in (folder / "nnUNetPlans.json", folder / "dataset.json"):
                if file.exists():
                    described = json.loads(file.read_text().replace(dataset, name))
                    file.write_text(json.dumps(described | (changes if file.name == "dataset.json" else {})))
        return self.raw / name

    def split(self, dataset: str, train: list[str], val: list[str]) -> None:
        """Write the only fold."""
        (self.preprocessed / dataset / "splits_final.json").write_text(json.dumps([{"train": train, "val": val}]))


def labels_of(folder: Path) -> dict[str, np.ndarray]:
    """The label volumes that a prediction wrote."""
    return {file.name: np.asarray(nibabel.load(file).dataobj) for file in sorted(folder.glob("*.nii.gz"))}
