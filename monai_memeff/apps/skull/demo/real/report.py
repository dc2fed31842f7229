"""What filled a real hole: the report as text and JSON, the implants of the network and of the mirror, the figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.apps.skull.demo import implant as shapes
from monai_memeff.apps.skull.demo.methods import Training
from monai_memeff.apps.skull.demo.real.holes import SkullHole, in_cm2
from monai_memeff.apps.skull.demo.render import FigureNames, render_png
from monai_memeff.apps.skull.demo.report import finite
from monai_memeff.apps.skull.demo.volume import HeadVolume
from monai_memeff.data.atomic import atomic_write
from monai_memeff.geometry import voxel_volume

NO_TRUTH = (
    "Nobody knows what bone was there, so the implants themselves have no score. The scores below are those of"
    " synthetic defects in the healthy bone of the same head, which no training saw; a hole of another size or place"
    " may do worse."
)
NAMES = FigureNames(
    "mirror of the other side",
    "network's implant",
    "The hole",
    "With the mirror's implant",
    "With the network's implant",
)
Shape = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Fill:
    """What one method put into the hole.

    Attributes:
        name: what to call it.
        implant: bool (S, S, S).
        scores: Scores of synthetic defects in healthy bone, see :func:`monai_memeff.apps.skull.metrics.implant_scores`.
        training: what training it had in this run.
    """

    name: str
    implant: np.ndarray
    scores: Sequence[Mapping[str, float]] = ()
    training: Training | None = None

    @property
    def mean_dice(self) -> float | None:
        """Mean implant Dice of the synthetic defects; None without any."""
        return float(np.mean([s["implant_dice"] for s in self.scores])) if self.scores else None


@dataclass(frozen=True)
class RealReport:
    """One run on a head with a hole.

    Attributes:
        head: the head.
        hole: the hole.
        fills: the mirror first, the trained network last.
        side: "right", "left" or "both sides".
        warnings: sentences.
        seed: seed of the run.
    """

    head: HeadVolume
    hole: SkullHole
    fills: Sequence[Fill]
    side: str
    warnings: Sequence[str]
    seed: int


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Dice of two implants, 0 where both are empty."""
    return 2 * float((first & second).sum()) / max(1, int(first.sum()) + int(second.sum()))


def text(report: RealReport) -> str:
    """The report in sentences."""
    head, hole, last = report.head, report.hole, report.fills[-1]
    where = {"both sides": "across the midline"}.get(report.side, f"on the {report.side}")
    lines = [
        f"{head.name}: a hole of {in_cm2(hole.area_cm2)} {where}; grid {head.size}^3 of {head.cell_mm:.2f} mm cells,"
        f" bone above {head.threshold:g} HU.",
        *(f"Warning: {warning}." for warning in report.warnings),
        NO_TRUTH,
    ]
    for fill in report.fills:
        words = [f"{fill.name}: {_cell_ml(head, fill.implant):.2g} ml of cells in the hole"]
        if fill is not last:
            words.append(f"Dice {agreement(fill.implant, last.implant):.2f} with the trained network's")
        if fill.mean_dice is not None:
            words.append(f"implant DSC {fill.mean_dice:.3f} for {len(fill.scores)} synthetic defects of healthy bone")
        if fill.training is not None:
            words.append(f"trained {fill.training.seconds:.0f} s, {fill.training.iterations} steps")
        lines.append("; ".join(words) + ".")
    return "\n".join([*lines, *(f"Note: {note}." for note in head.notes), ""])


def _cell_ml(head: HeadVolume, implant: np.ndarray) -> float:
    return float(implant.sum()) * head.cell_mm**3 / 1000


def to_json(report: RealReport, numbers: Mapping[str, Any]) -> str:
    """Everything as JSON; numbers that are not finite become null."""
    from monai_memeff import __version__

    head, hole, last = report.head, report.hole, report.fills[-1]
    content = {
        "version": __version__, "head": head.name, "size": head.size, "cell_mm": head.cell_mm,
        "threshold": head.threshold, "seed": report.seed, "side": report.side, "area_cm2": hole.area_cm2,
        "other_holes_cm2": hole.others_cm2, "middle_mm": hole.surface.mean(axis=0).tolist(),
        "warnings": list(report.warnings), "notes": list(head.notes), "no_truth": NO_TRUTH,
        "methods": [
            {
                "name": fill.name, "cells": int(fill.implant.sum()), "scores": list(fill.scores),
                "mean_implant_dice": fill.mean_dice, "agreement": agreement(fill.implant, last.implant),
                "training": None if fill.training is None else vars(fill.training),
            }
            for fill in report.fills
        ],
        **numbers,
    }  # fmt: skip
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def write(folder: Path, report: RealReport) -> None:
    """Write all files of the report into a folder."""
    head, fills = report.head, {"implant": report.fills[-1], "mirror_implant": report.fills[0]}
    drawn = {name: _shape(head, fill.implant) for name, fill in fills.items()}
    numbers = {}
    for name, shape in drawn.items():
        mask = np.zeros_like(head.bone) if shape is None else shapes.implant_in_ct(head, *shape, head.bone)
        shapes.write_mask(folder / f"{name}.nii.gz", mask, head.ct_affine)
        numbers[f"{name}_volume_ml"] = voxel_volume(head.ct_affine) * int(mask.sum()) / 1000
        _write_surface(folder / f"{name}.stl", shape)
    shapes.write_mask(folder / "defective_skull.nii.gz", head.bone, head.ct_affine)
    title = f"A real hole, filled: {head.name}"
    render_png(
        folder / "figure.png", head, head.skull, drawn["mirror_implant"], drawn["implant"], title, _caption(report),
        names=NAMES, points=report.hole.surface,
    )  # fmt: skip
    for name, content in (("report.txt", text(report)), ("report.json", to_json(report, numbers))):
        with atomic_write(folder / name) as work:
            work.write_text(content, encoding="utf-8")


def _shape(head: HeadVolume, implant: np.ndarray) -> Shape | None:
    shape = shapes.implant_field(head, head.skull, implant) if implant.any() else None
    return shape if shape is not None and (shape[0] > 0).any() else None


def _write_surface(path: Path, shape: Shape | None) -> None:
    from monai_memeff.occupancy import write_mesh

    if shape is not None:
        write_mesh(path, shapes.implant_mesh(*shape))


def _caption(report: RealReport) -> str:
    words = [f"hole of {in_cm2(report.hole.area_cm2)}", "no one knows the bone that was there"]
    return "; ".join([*words, *report.warnings[:2]])
