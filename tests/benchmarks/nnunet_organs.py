"""Stock nnUNetTrainer against SparseTrainer on OpenKBP: Dice, peak memory of a training step, seconds per iteration.

Five organs at risk of the head and neck, 24 patients. Validation: every sixth of the sorted case names from the first
(4 patients); training: the other 20. Both trainers get the same number of iterations and the same batch size; both
train and predict without mirroring, since two of the organs are a left and a right one. Everything goes through
nnU-Net's own commands. The plan's memory target is lowered so that a larger patch exists: the images are 128^3 voxels,
and the stock patch at the usual 8 GB would cover them.

    python tests/benchmarks/nnunet_organs.py --device cpu --minutes 60     # 96^3 crops around the organs
    python tests/benchmarks/nnunet_organs.py --device cuda --iterations 25000
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np

NAME = "Dataset910_OpenKBP"
STOCK, OURS = "OrgansStockTrainer", "OrgansSparseTrainer"
CROP = 96  # voxels, for --device cpu
ITERATIONS_PER_EPOCH = 10

TRAINERS = '''"""The two trainers of the comparison, with a given number of iterations and without mirroring."""
import json
import os
import time

import torch
from monai_memeff.memory import measure_peak
from nnunet_plugins import SparseTrainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Organs:
    """What both have in common."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = {per_epoch}, 1
        self.num_epochs = int(os.environ["ORGANS_EPOCHS"])
        self.seconds, self.peaks = [], []
        if device.type == "cpu":  # nnU-Net takes every core, which stalls as soon as another process wants one
            torch.set_num_threads(int(os.environ["ORGANS_THREADS"]))

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None

    def train_step(self, batch):
        if len(self.seconds) in (1, 2):  # the first step also makes the optimizer's buffers
            with measure_peak(self.device) as meter:
                result = super().train_step(batch)
            self.peaks.append(meter.peak_bytes)
            self.seconds.append(None)
            return result
        start = time.perf_counter()
        result = super().train_step(batch)  # its last line reads the loss, so it waits for the GPU
        self.seconds.append(time.perf_counter() - start)
        return result

    def on_train_end(self):
        super().on_train_end()
        steps = dict(seconds=[s for s in self.seconds[3:] if s is not None], peaks=self.peaks)
        steps["patch_size"] = [int(extent) for extent in self.configuration_manager.patch_size]
        steps["batch_size"] = self.batch_size
        with open(os.path.join(self.output_folder, "steps.json"), "w") as file:
            json.dump(steps, file)


class OrgansStockTrainer(Organs, nnUNetTrainer):
    """Stock."""


class OrgansSparseTrainer(Organs, SparseTrainer):
    """Ours."""
    memory_share = float(os.environ["ORGANS_SHARE"])
'''


def main() -> None:
    """Run the comparison and print the table."""
    options = arguments()
    folder = options.output
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: name a new folder with --output, or remove it.")
    started = time.monotonic()
    write_dataset(folder / "raw" / NAME, options.data, CROP if options.device == "cpu" else None)
    write_trainers(folder)
    prepare(folder, options)
    epochs = number_of_epochs(folder, options, started)
    rows = [train(folder, trainer, epochs, options) for trainer in (STOCK, OURS)]
    report = {"iterations": epochs * ITERATIONS_PER_EPOCH, "device": options.device, "rows": rows}
    report["minutes"] = (time.monotonic() - started) / 60
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(table(report))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    data = Path(os.environ.get("MEMEFF_DATA", beside)) / "openkbp"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--iterations", type=int, help="of each trainer; default: as many as fit into --minutes")
    parser.add_argument("--minutes", type=float, default=60, help="time for everything, when --iterations is not given")
    parser.add_argument("--memory-target", type=float, help="GB the stock plan is made for; default 0.35, 1.5 on a GPU")
    parser.add_argument("--memory-share", type=float, default=0.7, help="SparseTrainer's memory_share")
    parser.add_argument("--workers", type=int, help="augmentation processes; default 0 on the CPU, 12 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--cases", type=int, default=24, help="patients to use (fewer for a smoke run)")
    parser.add_argument("--data", type=Path, default=data, help="the OpenKBP folder")
    parser.add_argument("--output", type=Path, default=Path("runs/nnunet_organs"))
    options = parser.parse_args()
    if options.workers is None:
        options.workers = 0 if options.device == "cpu" else 12
    if options.memory_target is None:
        options.memory_target = 0.35 if options.device == "cpu" else 1.5
    options.output = options.output.resolve()
    return options


def write_dataset(folder: Path, data: Path, crop: int | None) -> None:
    """Write OpenKBP as a raw nnU-Net dataset, cropped around the organs if a size is given."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    names = sorted(file.name.removesuffix("_ct.nii.gz") for file in data.glob("*_ct.nii.gz"))
    if not names:
        raise SystemExit(f"no *_ct.nii.gz in {data}: set MEMEFF_DATA, or name the OpenKBP folder with --data.")
    for name in names:
        image, labels = (nibabel.load(data / f"{name}_{kind}.nii.gz") for kind in ("ct", "oar"))
        if crop is not None:
            box = around(np.asarray(labels.dataobj) > 0, crop)
            image, labels = image.slicer[box], labels.slicer[box]
        nibabel.save(image, folder / "imagesTr" / f"{name}_0000.nii.gz")
        nibabel.save(labels, folder / "labelsTr" / f"{name}.nii.gz")
    organs = json.loads((data / "labels.json").read_text())
    labels = {"background": 0, **{organ: int(number) for number, organ in organs.items()}}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(names), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))


def around(mask: np.ndarray, size: int) -> tuple[slice, ...]:
    """A box of a given size around the middle of a mask, moved to lie inside the volume."""
    where = np.argwhere(mask)
    middle = (where.min(0) + where.max(0)) // 2
    starts = [max(0, min(int(m) - size // 2, extent - size)) for m, extent in zip(middle, mask.shape, strict=True)]
    return tuple(slice(start, start + size) for start in starts)


def write_trainers(folder: Path) -> None:
    """Write the file that nnU-Net finds the two trainers in."""
    (folder / "trainers").mkdir()
    text = TRAINERS.replace("{per_epoch}", str(ITERATIONS_PER_EPOCH))
    (folder / "trainers" / "organs_trainers.py").write_text(text)


def run(folder: Path, command: str, *words: object, **extra: str) -> None:
    """Run one of nnU-Net's commands with its folders below ours."""
    script = shutil.which(command, path=os.path.dirname(sys.executable)) or command
    own = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    own |= {"nnUNet_extTrainer": str(folder / "trainers"), "nnUNet_def_n_proc": "2", "MPLBACKEND": "Agg"}
    line = subprocess.run([sys.executable, "-m", "nnunet_plugins", "env"], capture_output=True, text=True, check=True)
    ours = line.stdout.strip().rpartition("=")[2].strip("'").split(os.pathsep)[-1]
    own["nnUNet_extTrainer"] += os.pathsep + ours
    for part in ("preprocessed", "results"):
        (folder / part).mkdir(exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run([script, *map(str, words)], env={**os.environ, **own, **extra}, stdout=log, stderr=log)
    if done.returncode != 0:
        raise SystemExit(f"{command} failed with status {done.returncode}: see {folder / 'log.txt'}.")


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Plan, preprocess and write the split."""
    words = ["-d", 910, "-c", "3d_fullres", "-np", 2, "-gpu_memory_target", options.memory_target]
    run(folder, "nnUNetv2_plan_and_preprocess", *words, nnUNet_n_proc_DA="2")
    images = sorted((folder / "raw" / NAME / "labelsTr").glob("*.nii.gz"))
    names = [file.name.removesuffix(".nii.gz") for file in images][: options.cases]
    split = {"train": [name for number, name in enumerate(names) if number % 6], "val": names[::6]}
    (folder / "preprocessed" / NAME / "splits_final.json").write_text(json.dumps([split]))


def number_of_epochs(folder: Path, options: argparse.Namespace, started: float) -> int:
    """Epochs for the iterations asked for, or for what the remaining time allows after one epoch of each trainer."""
    if options.iterations:
        return max(1, round(options.iterations / ITERATIONS_PER_EPOCH))
    start = time.monotonic()
    for trainer in (STOCK, OURS):
        train(folder, trainer, 1, options)
    trial = time.monotonic() - start  # one epoch and one validation of each
    steps = [json.loads((fold(folder, trainer) / "steps.json").read_text())["seconds"] for trainer in (STOCK, OURS)]
    epoch = (
        1.25 * ITERATIONS_PER_EPOCH * sum(map(statistics.median, steps))
    )  # a quarter for loading and validation steps
    left = 60 * options.minutes - (time.monotonic() - started) - trial
    if left < epoch:
        raise SystemExit(
            f"{options.minutes:g} minutes are not enough: one epoch of both takes {epoch / 60:.1f} minutes."
        )
    return int(left / epoch)


def fold(folder: Path, trainer: str) -> Path:
    """Where nnU-Net keeps the results of a trainer."""
    return folder / "results" / NAME / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"


def train(folder: Path, trainer: str, epochs: int, options: argparse.Namespace) -> dict:
    """Train and validate; returns one row of the table."""
    settings = {
        "ORGANS_EPOCHS": str(epochs),
        "ORGANS_SHARE": str(options.memory_share),
        "ORGANS_THREADS": str(options.threads),
    }
    workers = {"nnUNet_n_proc_DA": str(options.workers)}
    words = [910, "3d_fullres", 0, "-tr", trainer, "-device", options.device]
    run(folder, "nnUNetv2_train", *words, **settings, **workers)
    steps = json.loads((fold(folder, trainer) / "steps.json").read_text())
    summary = json.loads((fold(folder, trainer) / "validation" / "summary.json").read_text())
    return {
        "trainer": trainer,
        "patch_size": steps["patch_size"],
        "batch_size": steps["batch_size"],
        "dice": summary["foreground_mean"]["Dice"],
        "dice_per_organ": {label: scores["Dice"] for label, scores in summary["mean"].items()},
        "peak_bytes": max(steps["peaks"]),
        "seconds": statistics.median(steps["seconds"]),
    }


def table(report: dict) -> str:
    """The comparison in Markdown."""
    rows = report["rows"]
    lines = [
        f"{report['iterations']} iterations each on {report['device']}, {report['minutes']:.0f} minutes in all",
        "",
        "| trainer | patch | voxels | mean Dice | per organ | peak MiB of a step | s / iteration |",
        "|---|---|---|---|---|---|---|",
    ]
    voxels = [float(np.prod(row["patch_size"])) for row in rows]
    for row, size in zip(rows, voxels, strict=True):
        patch = " x ".join(map(str, row["patch_size"])) + f", batch {row['batch_size']}"
        organs = " ".join(f"{dice:.2f}" for dice in row["dice_per_organ"].values())
        memory = f"{row['peak_bytes'] / 2**20:.0f} ({row['peak_bytes'] / rows[0]['peak_bytes']:.2f}x)"
        cells = [row["trainer"], patch, f"{size / voxels[0]:.1f}x", f"{row['dice']:.3f}", organs, memory]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
