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
PIXELS = 330  # longer side of a panel
PLANES = {2: "axial", 1: "coronal", 0: "sagittal"}


def panels(scan: Scan, results: Sequence[SystemResult]) -> list[tuple[str, np.ndarray]]:
    """Name and picture (rows, columns, 3), 0 to 1, of the hidden slice: the scan, its labels, every answer.

    The patient's right is on the left of the picture, up or front is at the top, and the scale is that of the body.
    """
    at, colors = best_slice(scan), class_colors(len(scan.names))
    gray = _plane(scan.shown, scan.axis, at)
    named = [("the scan", None), ("to be found", scan.target), *((r.name, r.labels) for r in results)]
    return [(name, _to_scale(_blend(gray, labels, scan.axis, at, colors), scan)) for name, labels in named]


def _plane(volume: torch.Tensor, axis: int, at: int) -> np.ndarray:
    return volume.select(axis, at).numpy().T[::-1, ::-1]


def _blend(gray: np.ndarray, labels: torch.Tensor | None, axis: int, at: int, colors: np.ndarray) -> np.ndarray:
    picture = np.repeat(gray[..., None], 3, axis=-1)
    if labels is None:
        return picture
    over = colors[_plane(labels, axis, at)]
    return picture * (1 - over[..., 3:]) + over[..., :3] * over[..., 3:]


def _to_scale(picture: np.ndarray, scan: Scan) -> np.ndarray:
    """Enlarged to some hundred pixels, as many in each direction as the millimeters say; labels keep their corners."""
    across, up = (mm for axis, mm in enumerate(scan.step_mm) if axis != scan.axis)
    size = (picture.shape[0] * up, picture.shape[1] * across)
    pixels = [max(1, round(mm * PIXELS / max(size))) for mm in size]
    return picture[np.ix_(*(np.arange(n) * count // n for n, count in zip(pixels, picture.shape[:2], strict=True)))]


def as_png(picture: np.ndarray) -> bytes:
    """A picture (rows, columns, 3), 0 to 1, as the content of a PNG."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, picture.clip(0, 1), format="png", metadata={"Software": "monai-memeff"})
    return buffer.getvalue()


def legend(scan: Scan) -> bytes:
    """A PNG of the colors of the classes."""
    figure = _figure(3, 3)
    _legend(figure.add_axes((0, 0, 1, 1)), scan)
    return _content(figure)


def montage(scan: Scan, results: Sequence[SystemResult]) -> bytes:
    """A PNG of the hidden slice with most classes: the scan, what is to be found, and what every system found."""
    shown = panels(scan, results)
    rows, tall = math.ceil((len(shown) + 1) / COLUMNS), shown[0][1].shape[0] / shown[0][1].shape[1]
    height = rows * (2.95 * tall + 0.4)
    figure = _figure(12, height)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    figure.subplots_adjust(left=0.005, right=0.995, top=1 - 0.35 / height, bottom=0.005, wspace=0.02)
    for draw, (name, picture) in zip(axes, shown, strict=False):
        draw.imshow(picture, interpolation="nearest")
        draw.set_title(name, fontsize=13, pad=3)
    for draw in axes:
        draw.set_axis_off()
    _legend(axes[len(shown)], scan)
    return _content(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _content(figure: Any) -> bytes:
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


def _legend(draw: Any, scan: Scan) -> None:
    from matplotlib.patches import Patch

    draw.set_axis_off()
    shown = list(zip(scan.names, class_colors(len(scan.names))[1:], strict=True))[:LEGEND_MOST]
    entries = [Patch(facecolor=color[:3], label=name) for name, color in shown]
    if len(scan.names) > LEGEND_MOST:
        entries.append(Patch(facecolor="white", label=f"and {len(scan.names) - LEGEND_MOST} more"))
    draw.legend(handles=entries, loc="center", frameon=False, fontsize=12 if len(entries) < 9 else 10)
