"""One picture of a hidden slice: the scan, what is to be found, and what every system found."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from monai_memeff.apps.systems.compare import SystemResult
from monai_memeff.apps.systems.scan import Scan

COLUMNS = 4
LEGEND_MOST = 12
SIDES = {2: "RLAP", 1: "RLSI", 0: "APSI"}
PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}


def montage(scan: Scan, results: Sequence[SystemResult]) -> bytes:
    """A PNG of the hidden slice that holds most classes; the patient's right is on the left of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at = best_slice(scan)
    panels = [("the scan", None), ("to be found", scan.target), *((r.name, r.labels) for r in results)]
    rows = math.ceil(len(panels) / COLUMNS)
    step = [mm for axis, mm in enumerate(scan.step_mm) if axis != scan.axis]
    sides = [n for axis, n in enumerate(scan.shown.shape) if axis != scan.axis]
    tall = min(2.0, max(0.5, sides[1] * step[1] / (sides[0] * step[0])))
    figure = Figure(figsize=(12, rows * (3.0 * tall + 0.35) + 0.5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.96, bottom=0.01, wspace=0.03, hspace=0.1)
    gray, colors = _plane(scan.shown, scan.axis, at), class_colors(len(scan.names))
    for draw, (name, labels) in zip(axes, panels, strict=False):
        overlay = None if labels is None else colors[_plane(labels, scan.axis, at)]
        _panel(draw, gray, overlay, name, step[1] / step[0])
    for draw in axes[len(panels) :]:
        _legend(draw, scan, colors)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "monai-memeff"})
    return buffer.getvalue()


def best_slice(scan: Scan) -> int:
    """The hidden slice with most classes, of these the one with most labeled voxels."""
    hidden = scan.hidden.movedim(scan.axis, 0).flatten(1)[:, 0]
    slices = scan.target.movedim(scan.axis, 0)
    order = [(len(part.unique()), int((part > 0).sum())) if hidden[i] else (0, 0) for i, part in enumerate(slices)]
    return max(range(len(order)), key=order.__getitem__)


def class_colors(count: int) -> np.ndarray:
    """Colors (count + 1, 4) with opacity; the background is clear."""
    from matplotlib import colormaps

    names = colormaps["tab10" if count <= 10 else "gist_rainbow"]
    colors = np.array([names(k if count <= 10 else k / count) for k in range(count)])
    return np.concatenate([np.zeros((1, 4)), np.column_stack([colors[:, :3], np.full(count, 0.6)])])


def _plane(volume: torch.Tensor, axis: int, at: int) -> np.ndarray:
    return volume.select(axis, at).numpy().T[:, ::-1]


def _panel(draw: Any, gray: np.ndarray, overlay: np.ndarray | None, name: str, aspect: float) -> None:
    draw.imshow(gray, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="bilinear", aspect=aspect)
    if overlay is not None:
        draw.imshow(overlay, origin="lower", interpolation="nearest", aspect=aspect)
    draw.set_title(name, fontsize=13, pad=3)
    draw.set_axis_off()


def _legend(draw: Any, scan: Scan, colors: np.ndarray) -> None:
    from matplotlib.patches import Patch

    draw.set_axis_off()
    shown = list(zip(scan.names, colors[1:], strict=True))[:LEGEND_MOST]
    entries = [Patch(facecolor=color[:3], label=name) for name, color in shown]
    if len(scan.names) > LEGEND_MOST:
        entries.append(Patch(facecolor="white", label=f"and {len(scan.names) - LEGEND_MOST} more"))
    draw.legend(handles=entries, loc="center", frameon=False, fontsize=12 if len(entries) < 9 else 10)
