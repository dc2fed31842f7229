"""`memeff demo --defective` against known truth: bone cut out of real heads, filled by the command, scored in voxels.

Run: python tests/benchmarks/skull_defective.py ct.nii.gz [mask.nii.gz:0.5 ...] [--iterations 300] [--seed 0]
(about three CPU-minutes for each hole; prints the table of docs/howto/demo.md)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from nibabel.affines import apply_affine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from monai.data import MetaTensor

from monai_memeff.apps.skull.demo.io import read_ct
from monai_memeff.apps.skull.demo.options import SkullOptions
from monai_memeff.apps.skull.demo.real.run import run_defective
from monai_memeff.apps.skull.demo.volume import HeadVolume, prepare_head
from monai_memeff.data import save_nifti
from monai_memeff.geometry import ras_affine

RADIUS_MM = 30.0
SOFT_HU = 40.0
PLACES = {"left": (-1.0, 0.2, 0.9), "right, behind": (0.7, -0.9, 0.8), "midline": (0.05, 0.3, 1.0)}
"""Directions from the middle of the head, right-anterior-superior, in which a ball of bone is cut out."""


def removed_bone(head: HeadVolume, direction: tuple[float, float, float]) -> np.ndarray:
    """Bone of the CT within 30 mm of the vault in one direction: bool (H, W, D)."""
    points = apply_affine(head.ct_affine, np.argwhere(head.bone))
    top = points[:, 2].max()
    vault = points[points[:, 2] > top - 75]
    middle = np.array([*(vault.min(0) + vault.max(0))[:2] / 2, top - 75])
    away = vault - middle
    aim = np.array(direction) / np.linalg.norm(direction)
    met = away[away @ aim > np.cos(np.radians(3)) * np.linalg.norm(away, axis=1)]
    place = middle + np.median(met, axis=0)
    ball = np.zeros_like(head.bone)
    near = np.linalg.norm(points - place, axis=1) < RADIUS_MM
    ball[tuple(np.argwhere(head.bone)[near].T)] = True
    return ball


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks."""
    return 2 * float((found & truth).sum()) / float(found.sum() + truth.sum())


def row(
    name: str, place: str, file: Path, threshold: float | None, truth: np.ndarray, given: argparse.Namespace
) -> str:
    """Run the command on a head with a hole; Dice of the network's implant and of the mirror's in the CT's voxels."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        options = SkullOptions(out, file, threshold=threshold, defects=2, seed=given.seed)
        run_defective(options, iterations=given.iterations)
        found = {n: np.asarray(nibabel.load(out / f"{n}.nii.gz").dataobj) > 0 for n in ("implant", "mirror_implant")}
        report = json.loads((out / "report.json").read_text())
    warned = "midline" if any("midline" in warning for warning in report["warnings"]) else "-"
    scores = [dice(found[n], truth) for n in ("implant", "mirror_implant")]
    return f"| {name}, {place} | {report['area_cm2']:.0f} cm2 | {scores[0]:.2f} | {scores[1]:.2f} | {warned} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", help="heads without a hole; after a colon the threshold of bone")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", nargs="+", default=list(PLACES), choices=list(PLACES))
    given = parser.parse_args()
    print("| head, place | hole found | network | mirror | warning |\n|---|---|---|---|---|", flush=True)
    for text in given.images:
        name, _, said = text.partition(":")
        threshold = float(said) if said else None
        image = read_ct(name)
        values, affine = image[0].as_tensor().numpy(), ras_affine(image).numpy()
        head = prepare_head(MetaTensor(image.as_tensor(), affine=image.affine), 64, threshold, Path(name).name)
        for place in given.places:
            truth = removed_bone(head, PLACES[place])
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"holed_{Path(name).name}"
                soft = 0.0 if threshold is not None else SOFT_HU
                save_nifti(file, np.where(truth, np.float32(soft), values), affine)
                print(row(Path(name).name, place, file, threshold, truth, given), flush=True)


if __name__ == "__main__":
    main()
