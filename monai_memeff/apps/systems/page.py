"""What the comparison found, as one HTML page, as JSON and as a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from monai_memeff.apps.systems.compare import SystemResult
from monai_memeff.apps.systems.montage import PLANES, as_png, best_slice, legend, panels
from monai_memeff.apps.systems.scan import Scan
from monai_memeff.apps.systems.systems import PARTS
from monai_memeff.data.html_page import HtmlPage

if TYPE_CHECKING:
    from rich.table import Table

HEAD = ("system", "mean Dice", "training peak", "peak of one scan", "steps", "training", "one scan")
LITTLE = (
    "Quality after minutes of training on one scan says little: every network still learns, and the hidden slices lie"
    " between slices that were learned. Memory, and the ratio of the times, say more."
)
MEASURED = (
    "Dice: in slices whose labels no training saw (a quarter of the scan, two bands); 1 is perfect, a dash means that"
    " the class is not there. Peak: most bytes of live tensors at once, without weights, in one training step on the"
    " whole scan and while the whole scan is labeled. Seconds: wall time on this machine, other work included.",
    "halo runs the trained dense network in {parts} parts: its peak is what the device holds; {store} of whole tensors"
    " wait in host memory meanwhile.",
)
SUITS = (
    (
        "dense",
        "volumes that fit into memory whole, or patches where context beyond the patch does not matter",
        "volumes whose activations do not fit: halo runs and trains the same network on them",
    ),
    (
        "sparse",
        "structures in few voxels that a threshold finds: bone, vessels, lung walls; below about a tenth active",
        "whole bodies or brains, where most voxels are active and a dense network is as fast",
    ),
    (
        "occupancy",
        "compact structures with smooth surfaces at high resolution; training on points, queries at surfaces only",
        "thin, branched or speckled structures, and many tiny ones",
    ),
    (
        "clstm",
        "training on whole deep volumes whose anatomy goes on from slice to slice; memory does not grow with depth",
        "short training: it computes slice after slice and takes longest",
    ),
    (
        "halo",
        "a network that you have, on volumes it cannot take whole: same labels, less memory; training on many GPUs",
        "networks that need the whole volume at once in one layer, such as global attention; they are refused",
    ),
)


def megabytes(count: int | None) -> str:
    """Bytes as megabytes, a dash for None."""
    return "-" if count is None else f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def number(value: float | None) -> str:
    """A score with three digits, a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def row(result: SystemResult) -> tuple[str, ...]:
    """The cells of one system, in the order of ``HEAD``."""
    steps = (str(result.iterations), f"{result.train_seconds:.0f} s") if result.iterations else ("-", "as dense")
    return (
        result.name, number(result.mean_dice), megabytes(result.train_peak_bytes), megabytes(result.test_peak_bytes),
        *steps, f"{result.test_seconds:.2f} s",
    )  # fmt: skip


def sentences(scan: Scan, results: Sequence[SystemResult], seed: int) -> list[str]:
    """What the tables do not say, one sentence each."""
    by_name = {result.name: result for result in results}
    dense, sparse, halo = by_name["dense"], by_name["sparse"], by_name["halo"]
    shape, step = " x ".join(map(str, scan.target.shape)), " x ".join(f"{mm:.2f}" for mm in scan.step_mm)
    lines = [
        f"{scan.name}: the box around the body on {shape} voxels of {step} mm. {scan.task}",
        f"halo gives {halo.different} labels that differ from those of the dense network, of {scan.target.numel()}, at"
        f" {halo.test_peak_bytes / max(1, dense.test_peak_bytes):.2f} of its peak ({megabytes(halo.test_peak_bytes)}"
        f" instead of {megabytes(dense.test_peak_bytes)} on the device).",
        f"sparse computes {scan.occupancy:.1%} of the voxels: its training step takes"
        f" {(sparse.train_peak_bytes or 0) / max(1, dense.train_peak_bytes or 0):.2f} of dense's peak and"
        f" {_step_seconds(sparse) / max(1e-9, _step_seconds(dense)):.2f} of its time.",
        f"Seed {seed}. {_repeatable(results)}",
    ]
    return lines + [f"Note: {note}." for note in scan.notes]


def _step_seconds(result: SystemResult) -> float:
    return result.train_seconds / max(1, result.iterations)


def _repeatable(results: Sequence[SystemResult]) -> str:
    short = [r.name for r in results if r.iterations < r.planned]
    if not short:
        return "The same seed gives the same training on the same machine."
    return (
        f"The time was up before all planned steps were made ({', '.join(short)}): another run may make more or fewer,"
        " and give other numbers. Give more --seconds."
    )


def make_page(scan: Scan, results: Sequence[SystemResult], seed: int) -> str:
    """The page."""
    from monai_memeff import __version__

    page = HtmlPage(f"One scan, five ways: {scan.name}")
    page.sentences(*sentences(scan, results, seed), LITTLE)
    page.heading("Measured")
    page.table(HEAD, [row(result) for result in results])
    halo = results[-1]
    for text in MEASURED:
        page.sentences(text.format(parts=PARTS, store=megabytes(halo.store_bytes)))
    page.heading("A hidden slice")
    at = best_slice(scan)
    shown = [(as_png(picture), name) for name, picture in panels(scan, results)] + [(legend(scan), "classes")]
    page.pictures([(png, f"{name}, one slice", name) for png, name in shown])
    page.sentences(f"{PLANES[scan.axis].capitalize()} slice {at} of {scan.target.shape[scan.axis]}.")
    if len(scan.names) > 1:
        page.heading("Dice of each class in the hidden slices")
        rows = [(name, *(number(r.dice[k]) for r in results)) for k, name in enumerate(scan.names)]
        page.table(("class", *(r.name for r in results)), rows)
    page.heading("Which system suits which data")
    page.table(("system", "suits", "does not suit"), SUITS, words=True)
    page.sentences(f"monai-memeff {__version__}. A demonstration, not for diagnosis.")
    return page.render()


def make_json(scan: Scan, results: Sequence[SystemResult], seed: int) -> str:
    """Everything that was measured."""
    from monai_memeff import __version__

    content: dict[str, Any] = {
        "version": __version__, "scan": scan.name, "task": scan.task, "seed": seed,
        "shape": list(scan.target.shape), "step_mm": list(scan.step_mm), "occupancy": scan.occupancy,
        "classes": list(scan.names), "notes": list(scan.notes),
        "systems": [
            {name: value for name, value in vars(result).items() if name != "labels"} | {"mean_dice": result.mean_dice}
            for result in results
        ],
    }  # fmt: skip
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def make_table(scan: Scan, results: Sequence[SystemResult]) -> Table:
    """The comparison for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=scan.name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(HEAD[0], no_wrap=True)
    for name in HEAD[1:]:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*row(result))
    return table
