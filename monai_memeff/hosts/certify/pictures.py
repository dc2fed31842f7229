"""Three sections of a volume as PNG, with labels as a tint and voxels that differ in red."""

from __future__ import annotations

import io

import numpy as np
from monai.data import MetaTensor

EDGE = 480
"""Pixels of a picture's longer side, at least."""

COARSE = 128
"""Voxels along an axis among which the densest region is looked for."""

TINT, RED = np.array([0.15, 0.75, 0.65]), np.array([1.0, 0.1, 0.1])
SECTIONS = ("sagittal", "coronal", "axial")
Pictures = list[tuple[bytes, str, str]]


def sections(image: MetaTensor, labels: np.ndarray, different: np.ndarray | None, words: str) -> Pictures:
    """A sagittal, a coronal and an axial section: PNG, description and caption of each.

    They go through the region with most voxels that differ; without any, with most voxels of a label.

    Args:
        image: (1, H, W, D), with its affine.
        labels: (H, W, D) or (S, H, W, D); above 0 is tinted.
        different: (H, W, D); None where nothing is compared.
        words: what is seen, for the descriptions.
    """
    inside = (labels > 0).any(0) if labels.ndim == 4 else labels > 0
    marked = np.zeros_like(inside) if different is None else different
    spacing = np.sqrt((np.asarray(image.affine, dtype=float)[:3, :3] ** 2).sum(0))
    volumes, steps = _to_ras([image.as_tensor()[0].cpu().numpy(), inside, marked], np.asarray(image.affine), spacing)
    gray, inside, marked = _gray(volumes[0]), volumes[1], volumes[2]
    place = _densest(marked if marked.any() else inside)
    found: Pictures = []
    for axis, name in enumerate(SECTIONS):
        others = [other for other in range(3) if other != axis]
        index = place[axis]
        here = [np.take(volume, index, axis) for volume in (gray, inside, marked)]
        png = _png(_colored(*here), (steps[others[0]], steps[others[1]]))
        here_is = f"{name}, slice {index + 1} of {gray.shape[axis]}"
        caption = f"{here_is}: {int(here[2].sum()):,} voxels differ here"
        caption = caption if different is not None else here_is
        found.append((png, f"{words}, {here_is}", caption))
    return found


def _to_ras(volumes: list[np.ndarray], affine: np.ndarray, spacing: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Volumes turned so that the axes run to the right, front and top, and the spacing in this order."""
    from nibabel.orientations import apply_orientation, io_orientation

    turn = io_orientation(affine)
    steps = np.empty(3)
    steps[turn[:, 0].astype(int)] = spacing
    return [np.asarray(apply_orientation(volume, turn)) for volume in volumes], steps


def _densest(mask: np.ndarray) -> list[int]:
    """Index of the voxel with most voxels of a mask around it, in a box of an eighth of the extents."""
    from scipy.ndimage import uniform_filter

    strides = [-(-extent // COARSE) for extent in mask.shape]
    coarse = mask[tuple(slice(step // 2, None, step) for step in strides)].astype(np.float32)
    if not coarse.any():
        return [int(part.mean().round()) for part in np.nonzero(mask)] if mask.any() else [n // 2 for n in mask.shape]
    dense = uniform_filter(coarse, [max(3, extent // 8) for extent in coarse.shape], mode="constant")
    index = np.unravel_index(int(np.where(coarse > 0, dense, -1).argmax()), dense.shape)
    return [min(int(i) * step + step // 2, n - 1) for i, step, n in zip(index, strides, mask.shape, strict=True)]


def _gray(values: np.ndarray) -> np.ndarray:
    sample = values[:: max(1, values.shape[0] // 64), :: max(1, values.shape[1] // 64)]
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, [1, 99]) if sample.size else (0.0, 1.0)
    if not high > low:  # more than 98 % of one value
        low, high = (float(sample.min()), float(sample.max())) if sample.size else (0.0, 1.0)
    return np.clip((np.nan_to_num(values, posinf=high, neginf=low) - low) / max(high - low, 1e-6), 0, 1)


def _colored(gray: np.ndarray, inside: np.ndarray, marked: np.ndarray) -> np.ndarray:
    colors = np.repeat(gray[..., None], 3, axis=-1)
    colors[inside] = 0.6 * colors[inside] + 0.4 * TINT
    colors[marked] = 0.45 * colors[marked] + 0.55 * RED
    return colors


def _png(colors: np.ndarray, steps: tuple[float, float]) -> bytes:
    """PNG of a section (across, up, 3), top at the top, in the proportions of the body."""
    from matplotlib.image import imsave

    upright = colors.transpose(1, 0, 2)[::-1]
    size = np.array(upright.shape[:2]) * [steps[1], steps[0]]
    pixels = np.maximum(1, np.rint(size * max(EDGE, *upright.shape[:2]) / size.max())).astype(int)
    rows, columns = (np.arange(n) * old // n for n, old in zip(pixels, upright.shape[:2], strict=True))
    file = io.BytesIO()
    imsave(file, np.clip(upright[rows][:, columns], 0, 1), format="png")
    return file.getvalue()
