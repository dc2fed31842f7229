"""What a run found, as a table, as text and as JSON; and the implant's files, all of them written or none."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from monai_memeff.apps.skull.demo.volume import HeadVolume
from monai_memeff.data.atomic import atomic_write
from monai_memeff.geometry import voxel_volume

if TYPE_CHECKING:
    from rich.table import Table

ONE_HEAD = (
    "Training and test defects were cut into one and the same head, so these numbers compare the methods on this head"
    " and say nothing about unseen skulls."
)
REPORTS = ("report.txt", "report.json")
WRITTEN = (
    *REPORTS, "implant.stl", "implant.nii.gz", "removed_bone.nii.gz", "defective_skull.nii.gz", "mirror_implant.nii.gz",
    "mirror_implant.stl", "figure.png",
)  # fmt: skip
"""Files of a run, also of one on a real hole: what an earlier run of either kind wrote goes away."""
COLUMNS = (
    ("implant\nDSC", "implant_dice", "{:.3f}"),
    ("border\nDSC", "border_dice", "{:.3f}"),
    ("HD95\nmm", "hd95_mm", "{:.1f}"),
    ("skull\nDSC", "skull_dice", "{:.4f}"),
)


@dataclass(frozen=True)
class MethodResult:
    """One method on every test defect.

    Attributes:
        name: what to call it.
        scores: one :func:`monai_memeff.apps.skull.metrics.implant_scores` per defect.
        train_seconds: time spent on training; None for a method that does not learn.
        iterations: training steps in that time.
        parameters: number of trained numbers.
        train_peak_bytes: peak of live tensor bytes in one training step.
        test_peak_bytes: peak of live bytes in the completion of one skull.
        test_seconds: mean time to complete one skull.
    """

    name: str
    scores: Sequence[Mapping[str, float]]
    train_seconds: float | None = None
    iterations: int | None = None
    parameters: int | None = None
    train_peak_bytes: int | None = None
    test_peak_bytes: int | None = None
    test_seconds: float | None = None

    @property
    def empty(self) -> int:
        """Number of defects for which one implant, predicted or true, was empty."""
        return sum(not math.isfinite(s["hd95_mm"]) for s in self.scores)

    def mean(self, key: str) -> float:
        """Mean of a score over the defects; distances to an empty implant are left out and counted in ``empty``."""
        values = [s[key] for s in self.scores if math.isfinite(s[key])]
        return float(np.mean(values)) if values else math.nan


@dataclass(frozen=True)
class DemoReport:
    """One run of the demo.

    Attributes:
        head: what the head is called.
        size: edge of the grid in cells.
        cell_mm: edge of a cell in millimeters.
        cells: cells that hold bone.
        occupancy: Fraction of the cells that hold bone.
        threshold: Hounsfield units above which a voxel counted as bone.
        methods: what was compared.
        notes: plain sentences about the image and the run.
        seed: Seed of the defects and the networks.
        shown: which test defect the picture and the implant belong to.
        extra: further numbers for the JSON.
    """

    head: str
    size: int
    cell_mm: float
    cells: int
    occupancy: float
    threshold: float
    methods: Sequence[MethodResult]
    notes: Sequence[str] = ()
    seed: int = 0
    shown: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def make_report(
    head: HeadVolume, methods: Sequence[MethodResult], seed: int = 0, shown: int = 0, **extra: Any
) -> DemoReport:
    """Gather a report from a head and its methods; ``extra`` goes to the JSON as it is."""
    return DemoReport(
        head=head.name, size=head.size, cell_mm=head.cell_mm, cells=int(head.skull.sum()), occupancy=head.occupancy,
        threshold=head.threshold, methods=tuple(methods), notes=head.notes, seed=seed, shown=shown, extra=extra,
    )  # fmt: skip


def report_table(report: DemoReport) -> Table:
    """The comparison as a table for the terminal: one row per method, means over the test defects."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    count = len(report.methods[0].scores) if report.methods else 0
    table = Table(
        title=f"{report.head}: {count} unseen defects, mean", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("method", no_wrap=True)
    for name in (*(c[0] for c in COLUMNS), "train\nMB", "test\nMB", "train\nsteps"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in report.methods:
        values = [_number(method.mean(key), form) for _, key, form in COLUMNS]
        values += [_megabytes(method.train_peak_bytes), _megabytes(method.test_peak_bytes)]
        values.append(_number(method.iterations, "{:d}"))
        table.add_row(method.name, *values)
    if report.methods:
        copied = _number(report.methods[0].mean("copy_dice"), "{:.4f}")
        table.add_row("copying the input", "0.000", "0.000", "-", copied, "-", "-", "-")
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"


def report_lines(report: DemoReport) -> list[str]:
    """What the table does not say, one sentence each."""
    lines = [
        f"Grid {report.size}^3 of {report.cell_mm:.2f} mm cells; {report.cells} hold bone (> {report.threshold:g} HU):"
        f" occupancy {report.occupancy:.1%}.",
        ONE_HEAD,
        "MB: peak of live tensors in one training step, and in the completion of one skull.",
    ]
    seconds = [method.train_seconds for method in report.methods if method.train_seconds is not None]
    if seconds:
        lines.append(f"Each network was trained for {max(seconds):.0f} s.")
    for method in report.methods:
        if method.empty:
            lines.append(
                f"{method.name}: no implant for {method.empty} of {len(method.scores)} defects; HD95 leaves them out."
            )
    return lines + [f"Note: {note}." for note in report.notes]


def report_text(report: DemoReport) -> str:
    """Table and sentences as plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=96, color_system=None, legacy_windows=False)
    console.print(report_table(report))
    stream = console.file
    assert isinstance(stream, io.StringIO)
    return "\n".join([stream.getvalue().rstrip(), "", *report_lines(report), ""])


def report_json(report: DemoReport) -> str:
    """Everything as JSON; numbers that are not finite become null."""
    from monai_memeff import __version__

    content = asdict(report)
    for method, entry in zip(report.methods, content["methods"], strict=True):
        entry["mean"] = {key: method.mean(key) for key in (method.scores[0] if method.scores else {})}
        entry["empty"] = method.empty
    content |= {"one_head": ONE_HEAD, "version": __version__}
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A value for JSON: plain numbers, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(folder: Path, report: DemoReport) -> None:
    """Write ``report.txt`` and ``report.json``."""
    for name, text in (("report.txt", report_text(report)), ("report.json", report_json(report))):
        with atomic_write(folder / name) as work:
            work.write_text(text, encoding="utf-8")


def write_case(
    folder: Path, head: HeadVolume, defective: np.ndarray, truth: np.ndarray, prediction: np.ndarray, caption: str
) -> dict[str, float]:
    """Write one completed defect: NIfTI in the CT's own geometry, a printable STL, and the figure.

    ``implant.nii.gz`` is the predicted implant, ``removed_bone.nii.gz`` the CT's bone that the defect took,
    ``defective_skull.nii.gz`` the bone that was left; ``implant.stl`` in millimeters (LPS); ``figure.png``. An empty
    prediction has an empty NIfTI and no STL.

    Args:
        folder: where to write.
        head: the head.
        defective: bool (S, S, S), the skull without its defect.
        truth: bool (S, S, S), the true implant, not empty.
        prediction: bool (S, S, S), the predicted implant.
        caption: last line of the figure.

    Returns:
        ``{"ct_implant_dice", "implant_volume_ml"}``: Dice of the implant with the removed bone on the CT's own voxels,
        and its volume.
    """
    from monai_memeff.apps.skull.demo import implant as shapes
    from monai_memeff.apps.skull.demo.render import render_png
    from monai_memeff.occupancy import write_mesh

    remaining = shapes.defective_bone(head, defective)
    removed = head.bone & ~remaining
    shape = None
    drawn = np.zeros_like(removed)
    if prediction.any():
        shape = shapes.implant_field(head, defective, prediction)
        drawn = shapes.implant_in_ct(head, *shape, remaining)
    if shape is not None and (shape[0] > 0).any():
        write_mesh(folder / "implant.stl", shapes.implant_mesh(*shape))
    for name, mask in (("implant", drawn), ("removed_bone", removed), ("defective_skull", remaining)):
        shapes.write_mask(folder / f"{name}.nii.gz", mask, head.ct_affine)
    true_shape = shapes.implant_field(head, defective, truth)
    render_png(folder / "figure.png", head, defective, true_shape, shape, f"Skull completion: {head.name}", caption)
    both = int(drawn.sum()) + int(removed.sum())
    volume = voxel_volume(head.ct_affine) * int(drawn.sum()) / 1000
    return {"ct_implant_dice": 2 * int((drawn & removed).sum()) / max(both, 1), "implant_volume_ml": volume}
