"""Scores, rows and pictures of the super-resolution benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sparse_superresolution_masks import Task
from torch import Tensor

from monai_memeff.apps.skull.metrics import compute_pooled_hausdorff


def dice(found: Tensor, truth: Tensor) -> float:
    """Of two masks."""
    both = (found & (truth > 0)).sum()
    return float(2 * both / (found.sum() + (truth > 0).sum()).clamp(min=1))


def distance(found: Tensor, truth: Tensor, spacing: Sequence[float]) -> float:
    """95 % Hausdorff distance in mm, within the box that holds both."""
    where = (found | (truth > 0)).nonzero()[:, 1:]
    low, high = (where.amin(0) - 1).clamp(min=0).tolist(), (where.amax(0) + 2).tolist()
    part = (slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))
    return float(compute_pooled_hausdorff(found[part][None], (truth > 0)[part][None], spacing))


def row(label: str, found: dict[str, Tensor], task: Task, note: str) -> str:
    """One line of the table."""
    scores = [dice(found[name], fine) for name, fine in task.test.items()]
    far = [distance(found[name], fine, task.spacing) for name, fine in task.test.items()]
    cells = [label, *(f"{s:.3f}" for s in scores), f"{np.mean(scores):.3f}", f"{np.mean(far):.1f}", note]
    return f"| {' | '.join(cells)} |"


def picture(path: Path, task: Task, shown: dict[str, dict[str, Tensor]]) -> None:
    """Two slices of the first test masks: the peers, ours, the truth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = {k: v for k, v in shown.items() if "best" not in k} | {"truth": {k: v > 0 for k, v in task.test.items()}}
    views = [(name, axis) for name in list(task.test)[:2] for axis in (0, 2)]
    figure, axes = pyplot.subplots(
        len(views), len(columns), figsize=(2.6 * len(columns), 2.8 * len(views)), squeeze=False
    )
    for line, (name, axis) in zip(axes, views, strict=True):
        where = (task.test[name][0] > 0).nonzero()
        low, high = where.amin(0).sub(6).clamp(min=0).tolist(), where.amax(0).add(7).tolist()
        middle = int(where[:, axis].float().median())
        for place, (label, found) in zip(line, columns.items(), strict=True):
            volume = found[name][0].numpy()
            part = [slice(a, b) for a, b in zip(low, high, strict=True)]
            part[axis] = middle
            place.imshow(
                volume[tuple(part)].T,
                cmap="gray",
                origin="lower",
                interpolation="nearest",
                aspect=_aspect(task.spacing, axis),
            )
            place.set_title(f"{label}\n{name}", fontsize=6)
            place.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _aspect(spacing: Sequence[float], axis: int) -> float:
    across, up = (s for a, s in enumerate(spacing) if a != axis)
    return up / across
