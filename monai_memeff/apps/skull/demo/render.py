"""One figure of a completed skull: three slices through the defect, and the skull in space before and after."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from monai.transforms.utils import generate_spatial_bounding_box
from nibabel.affines import apply_affine

from monai_memeff.apps.skull.demo.raycast import View, look_at, raycast
from monai_memeff.apps.skull.demo.volume import HeadVolume, resample_to_grid
from monai_memeff.data.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shape = tuple[np.ndarray, np.ndarray]
"""A field that is positive inside, and its affine: see :func:`monai_memeff.apps.skull.demo.implant.implant_field`."""

BONE, TRUE, PREDICTED = (0.90, 0.87, 0.80), (0.13, 0.62, 0.42), (0.93, 0.45, 0.13)


@dataclass(frozen=True)
class FigureNames:
    """Names in the figure: of the two shapes in the legend, and of the three scenes."""

    truth: str = "bone that was removed (truth)"
    prediction: str = "predicted implant"
    before: str = "Skull with the defect"
    with_truth: str = "With the bone that was removed"
    with_prediction: str = "With the predicted implant"


CAPTION_LETTERS = 170  # of a line of the caption
SOFT_HU = 20
WINDOW = (-250, 1650)


def render_png(
    path: Path,
    head: HeadVolume,
    defective: np.ndarray,
    truth: Shape | None,
    prediction: Shape | None,
    title: str,
    caption: str,
    names: FigureNames | None = None,
    points: np.ndarray | None = None,
) -> None:
    """Draw the figure.

    Slices are in radiological convention (the patient's right is on the left of the picture), the CT's bone taken out
    where the defect is.

    Args:
        path: the PNG.
        head: the head.
        defective: bool (S, S, S), the skull without its defect.
        truth: shape of the true implant, or of one to compare with; None when there is none.
        prediction: shape of the predicted implant; None when there is none.
        title: first line.
        caption: last line.
        names: names of the two shapes and the three scenes; None: those of a defect that was cut.
        points: float (N, 3), where to look, in millimeters; None: at the truth.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    factor = head.gray.shape[0] // head.size
    cut = (head.skull & ~defective).repeat(factor, 0).repeat(factor, 1).repeat(factor, 2)
    gray = np.where(cut & (head.gray > head.threshold), SOFT_HU, head.gray).astype(np.float32)
    names = names or FigureNames()
    true_field, predicted = (None if shape is None else _on_gray(head, shape) for shape in (truth, prediction))
    if points is None:
        assert true_field is not None
        points = apply_affine(head.gray_affine, np.argwhere(true_field > 0))
    figure = Figure(figsize=(13.2, 10.2), dpi=125, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, gridspec_kw={"height_ratios": [1.12, 1]})
    figure.subplots_adjust(left=0.012, right=0.988, top=0.895, bottom=0.045, wspace=0.03, hspace=0.075)
    _slices(axes[0], head, gray, true_field, predicted, points)
    _views(axes[1], head, gray, true_field, predicted, points, names)
    figure.text(0.5, 0.965, title, ha="center", fontsize=15, weight="bold")
    _legend(figure, true_field is not None, predicted is not None, names)
    lines = textwrap.fill(caption, CAPTION_LETTERS, max_lines=2, placeholder=" ...")
    figure.text(0.5, 0.022, lines, ha="center", va="center", fontsize=9.5, color="0.3")
    with atomic_write(path) as work:
        figure.savefig(work, format="png", metadata={"Software": "monai-memeff"})


def _on_gray(head: HeadVolume, shape: Shape) -> np.ndarray:
    return resample_to_grid(shape[0], shape[1], head.gray_affine, head.gray.shape, outside=-1.0)


def _legend(figure: Any, truth: bool, predicted: bool, names: FigureNames) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = [Line2D([], [], color=TRUE, lw=2.2, label=names.truth if truth else f"{names.truth} (none)")]
    label = names.prediction if predicted else f"{names.prediction} (none)"
    entries.append(Patch(facecolor=(*PREDICTED, 0.6), edgecolor=PREDICTED, label=label))
    figure.legend(handles=entries, loc="upper center", bbox_to_anchor=(0.5, 0.962), ncol=2, frameon=False, fontsize=11)


def _slices(
    axes: np.ndarray,
    head: HeadVolume,
    gray: np.ndarray,
    truth: np.ndarray | None,
    predicted: np.ndarray | None,
    points: np.ndarray,
) -> None:
    """Axial, coronal and sagittal slices through the middle of the defect."""
    step = float(head.gray_affine[0, 0])
    where = np.rint(apply_affine(np.linalg.inv(head.gray_affine), points)).astype(int)
    where = where.clip(0, np.array(head.gray.shape) - 1)
    middle = where.mean(axis=0)
    at = where[((where - middle) ** 2).sum(axis=1).argmin()]
    box = _square(head.gray > -300)
    marks = {2: ("Axial", "RLAP"), 1: ("Coronal", "RLSI"), 0: ("Sagittal", "APSI")}
    for axis, draw in zip((2, 1, 0), axes, strict=True):
        name, sides = marks[axis]

        def plane(volume: np.ndarray, axis: int = axis) -> np.ndarray:
            part = volume[box].take(int(at[axis]) - box[axis].start, axis=axis)
            return part.T[:, ::-1]

        _slice(draw, plane(gray), *(None if field is None else plane(field) for field in (truth, predicted)))
        millimeters = float(head.gray_affine[axis, axis] * at[axis] + head.gray_affine[axis, 3])
        draw.set_title(f"{name}, {'xyz'[axis]} = {millimeters:.0f} mm", fontsize=11, pad=4)
        _marks(draw, sides)
        _bar(draw, 50.0 / step, "50 mm")


def _square(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest cube in a cubic volume around a mask, so that the three pictures are equally large."""
    edge = mask.shape[0]
    box = generate_spatial_bounding_box(mask[None], margin=3, allow_smaller=True)
    longest = max(stop - start for start, stop in zip(*box, strict=True)) or edge
    starts = [min(max((start + stop - longest) // 2, 0), edge - longest) for start, stop in zip(*box, strict=True)]
    return tuple(slice(start, start + longest) for start in starts)


def _slice(draw: Axes, gray: np.ndarray, truth: np.ndarray | None, predicted: np.ndarray | None) -> None:
    draw.imshow(gray, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], origin="lower", interpolation="bilinear")
    if predicted is not None and (predicted > 0).any():
        top = max(float(predicted.max()), 1e-3) + 1
        draw.contourf(predicted, levels=[0, top], colors=[PREDICTED], alpha=0.5)
        draw.contour(predicted, levels=[0], colors=[PREDICTED], linewidths=1.2)
    if truth is not None and (truth > 0).any():
        draw.contour(truth, levels=[0], colors=[TRUE], linewidths=1.7)
    draw.set_facecolor("black")
    draw.set_xticks([])
    draw.set_yticks([])


def _marks(draw: Axes, sides: str) -> None:
    """Letters of the patient's sides: left, right, top and bottom of the picture."""
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2, foreground="black")]
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"))
    for letter, (x, y, ha, va) in zip(sides, (*places, (0.5, 0.02, "center", "bottom")), strict=True):
        text = draw.text(x, y, letter, transform=draw.transAxes, color="#ffd24a", fontsize=12, ha=ha, va=va)
        text.set(weight="bold", path_effects=edge)


def _bar(draw: Axes, length: float, text: str) -> None:
    """A scale bar in the lower left corner."""
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=2, foreground="black")]
    low, high = draw.get_xlim()
    bottom, top = draw.get_ylim()
    x, y = low + 0.04 * (high - low), bottom + 0.045 * (top - bottom)
    draw.plot([x, x + length], [y, y], color="white", lw=3, solid_capstyle="butt", path_effects=edge)
    draw.text(x, y + 0.015 * (top - bottom), text, color="white", fontsize=9, va="bottom", path_effects=edge)


def _views(
    axes: np.ndarray,
    head: HeadVolume,
    gray: np.ndarray,
    truth: np.ndarray | None,
    predicted: np.ndarray | None,
    points: np.ndarray,
    names: FigureNames,
) -> None:
    """The skull in space: with its defect, with the bone that was there, with the predicted implant."""
    from scipy import ndimage

    bone = ndimage.gaussian_filter(np.clip((gray - head.threshold) / 350, -1, 1), 0.7)
    affine = head.gray_affine
    half = head.cell_mm * head.size / 2
    middle = head.affine[:3] @ [*(np.full(3, (head.size - 1) / 2)), 1.0]
    view = look_at(points.mean(axis=0), middle, 1.02 * half)
    empty = np.full_like(bone, -1.0)
    scenes = (
        (names.before, empty, BONE),
        (names.with_truth if truth is not None else f"No {names.truth}", truth, TRUE),
        (names.with_prediction if predicted is not None else "No implant was predicted", predicted, PREDICTED),
    )
    for draw, (name, field, color) in zip(axes, scenes, strict=True):
        piece = empty if field is None else field.astype(np.float32) + 0.02
        draw.imshow(raycast([bone.astype(np.float32), piece], [BONE, color], affine, view), interpolation="bilinear")
        draw.set_title(name, fontsize=11, pad=4)
        draw.set_axis_off()
        _compass(draw, view)


def _compass(draw: Axes, view: View) -> None:
    """Arrows to the patient's right, front and top, in the lower left corner."""
    drawn: list[tuple[float, float]] = []
    for letter, direction in zip("SAR", np.eye(3)[::-1], strict=True):
        x, y = 0.075 * float(direction @ view.right), 0.075 * float(direction @ view.up)
        if np.hypot(x, y) < 0.03 or any(np.hypot(x - u, y - v) < 0.035 for u, v in drawn):
            continue  # it points at the camera, or would hide another
        drawn.append((x, y))
        arrow = {"arrowstyle": "-|>", "color": "0.35", "lw": 1.2}
        start = (0.11, 0.10)
        draw.annotate("", (start[0] + x, start[1] + y), start, xycoords="axes fraction", arrowprops=arrow)
        place = (start[0] + 1.35 * x, start[1] + 1.35 * y)
        draw.text(*place, letter, transform=draw.transAxes, ha="center", va="center", fontsize=9, color="0.2")
