"""Trains the cranial cavity bundle on one real head CT and predicts another: Dice, picture, seconds."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from skimage.measure import block_reduce

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "cranial_cavity_clstm"


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values in the orientation RAS, and the affine."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj, dtype=np.float32), image.affine


def save(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def cavity_of(hounsfield: np.ndarray, spacing: np.ndarray, closing: float = 10.0, bone: float = 250.0) -> np.ndarray:
    """What a closed skull encloses: bone closed by ``closing`` mm on a 2 mm grid, the largest free piece inside."""
    step = tuple(max(1, round(2.0 / s)) for s in spacing)
    coarse = spacing * step
    pad = [(int(np.ceil(1.5 * closing / s)),) * 2 for s in coarse]
    skull = np.pad(block_reduce(hounsfield > bone, step, np.max), pad)
    wall = ndimage.distance_transform_edt(~skull, sampling=coarse) <= closing
    pieces, _ = ndimage.label(~wall)
    sizes = np.bincount(pieces.ravel())
    sizes[[0, pieces[0, 0, 0]]] = 0
    inside = ndimage.distance_transform_edt(pieces != sizes.argmax(), sampling=coarse) <= closing
    inside = inside[tuple(slice(p, -p) for p, _ in pad)]
    for axis, times in enumerate(step):
        inside = inside.repeat(times, axis)
    return inside[tuple(map(slice, hounsfield.shape))] & (hounsfield <= bone)


def visible_human(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Visible Human head, cut out of its wide field of view; cavity derived from its skull; affine."""
    image, affine = load(data / "head_ct" / "vhf_head_ct.nii.gz")
    cavity = cavity_of(image, np.linalg.norm(affine[:3, :3], axis=0))
    body, _ = ndimage.label(image[::2, ::2, ::2] > -300)
    body = body == np.bincount(body.ravel())[1:].argmax() + 1
    first, last = (2 * f(np.argwhere(body[:, :, body.shape[2] // 2 :]), axis=0) for f in (np.min, np.max))
    box = tuple(slice(max(0, a - 10), b + 10) for a, b in zip(first[:2], last[:2], strict=True))
    affine = affine @ np.array([[1, 0, 0, box[0].start], [0, 1, 0, box[1].start], [0, 0, 1, 0], [0, 0, 0, 1]])
    return image[box], cavity[box], affine


def template(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The CT template in Hounsfield units, and its stripped brain with fluid."""
    image, affine = load(data / "head_ct_template" / "scct.nii")
    brain, _ = load(data / "head_ct_template" / "scct_stripped.nii")
    # its authors' scale, which spreads -100 ... 100 HU
    image = np.where(image <= 900, image - 1000, np.where(image <= 3100, (image - 911) / 11 - 99, image - 3000))
    return image.astype(np.float32), brain > 1300, affine


HEADS = {"visible_human": visible_human, "template": template}


def run(folder: Path, *arguments: str) -> tuple[float, str]:
    """A bundle's program; gives its CPU-seconds and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "monai.bundle", "run", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    (folder / "log.txt").open("a").write(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main() -> None:
    """Prepare, train in two stages, predict, score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("MEMEFF_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--work", type=Path, required=True, help="a folder for data, models and results")
    parser.add_argument("--train", choices=HEADS, default="visible_human", help="the other one is predicted")
    parser.add_argument("--pixdim", type=float, default=4.0, help="millimeters")
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--norm", default="instance", help="batch, as published, or instance")
    parser.add_argument("--slices", type=int, default=1000, help="iterations of stage 1")
    parser.add_argument("--frozen", type=int, default=25, help="iterations of stage 2 with the U-Net fixed")
    parser.add_argument("--volumes", type=int, default=75, help="iterations of stage 2")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of stage 2")
    choice = parser.parse_args()
    bundle = Path(shutil.copytree(BUNDLE, choice.work / "bundle", dirs_exist_ok=True))
    (unseen,) = set(HEADS) - {choice.train}
    for name in HEADS:
        image, cavity, affine = HEADS[name](choice.data)
        print(f"{name}: {image.shape}, cavity {cavity.sum() * abs(np.linalg.det(affine)) / 1e3:.0f} ml", flush=True)
        part = "Tr" if name == choice.train else "Ts"
        save(choice.work / "heads" / f"images{part}" / f"{name}.nii.gz", image.astype(np.int16), affine)
        save(choice.work / "heads" / f"labels{part}" / f"{name}.nii.gz", cavity.astype(np.uint8), affine)
    shift = round(20 / choice.pixdim)
    options = [f"--dataset_dir={choice.work / 'heads'}", f"--pixdim={[choice.pixdim] * 3}"]
    options += [f"--network_def#channels={choice.channels}", f"--network_def#norm={choice.norm}"]
    spell = "['configs/train.json', 'configs/{}.json']"
    train = [*options, f"--shift={shift}"]
    _, printed = run(bundle, "--config_file", spell.format("statistics"), *options)
    words = next(line for line in printed.splitlines() if line.startswith("--mean")).split()
    print(" ".join(words), flush=True)
    scale = [f"{words[0]}={words[1]}", f"{words[2]}={words[3]}"]
    began = time.perf_counter()
    first, _ = run(bundle, "--config_file", spell.format("pretrain"), *train, *scale, f"--iterations={choice.slices}")
    print(f"stage 1: {choice.slices} slices, {first:.0f} CPU-seconds", flush=True)
    stage = [f"--iterations={choice.volumes}", f"--frozen_iterations={choice.frozen}", f"--learning_rate={choice.rate}"]
    second, _ = run(bundle, "--config_file", "configs/train.json", *train, *scale, *stage)
    print(f"stage 2: {choice.volumes} volumes, {second:.0f} CPU-seconds", flush=True)
    test = choice.work / "test"
    for part in ("images", "labels"):
        shutil.copytree(choice.work / "heads" / f"{part}Ts", test / f"{part}Tr", dirs_exist_ok=True)
    shutil.copytree(choice.work / "heads" / "imagesTs", test / "imagesTs", dirs_exist_ok=True)
    options[0] = f"--dataset_dir={test}"
    third, _ = run(bundle, "--config_file", spell.format("evaluate"), *options, *scale)
    fourth, _ = run(bundle, "--config_file", "configs/inference.json", *options, *scale)
    truth, _ = load(test / "labelsTr" / f"{unseen}.nii.gz")
    found, _ = load(bundle / "eval" / unseen / f"{unseen}_cavity.nii.gz")
    dice = 2 * (found * truth).sum() / (found.sum() + truth.sum())
    score = (bundle / "eval" / "metrics.csv").read_text().strip().split(",")[-1]
    print(f"trained on {choice.train}, Dice of {unseen}: {score} at {choice.pixdim} mm, {dice:.4f} on its own grid")
    print(f"prediction twice: {third + fourth:.0f} CPU-seconds")
    print(f"all stages: {time.perf_counter() - began:.0f} s on the wall")
    print(f"picture: {bundle / 'eval' / unseen}_pred.png")


if __name__ == "__main__":
    main()
