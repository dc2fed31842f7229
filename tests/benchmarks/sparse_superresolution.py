"""Sparse super-resolution of real masks beside nearest and trilinear up-sampling: Dice, distance, memory, a picture.

Skulls: bone of head CTs at 1 mm. Trained on two heads (the Philips phantom and the segmented skull of the MRI head),
tested on a third, the Visible Human head, of which nothing is seen in training. One test head is a demonstration.
`skull128` and `skull256` take a cube of 256 mm around the head: 64^3 cells of 4 mm to 2 mm or to 1 mm; `skull512` takes
the CT's own grid, 512 x 512 x 234 at 1 mm: 64^3 cells of 8 x 8 x 3.66 mm.

Organs: `organs` is TotalSegmentator's example at 3 mm made coarse to 12 mm. Trained on the organs of TRAINED and on
OpenKBP's, tested on vessels and other thin organs of the same body that training never sees. `organs512` is the example
CT of 512 x 512 x 20 voxels (0.98 x 0.98 x 2 mm) with cells of 4 x 4 x 2 voxels, with the same organs held out. Neither
holds an oesophagus. All of these labels are a model's, not a person's, and those of the second are its 3 mm voxels
repeated on the fine grid: they have the size of a clinical segmentation, not its detail.

Peers, all from the same coarse grid: nearest, trilinear of the same binary coarse mask (at 0.5, and at the level that
is best on the test itself, which no one knows beforehand), and trilinear of the share of each cell, which needs more
than a binary mask. Seconds are CPU-seconds of this process.

    OMP_NUM_THREADS=1 python tests/benchmarks/sparse_superresolution.py skull128 organs --seconds 150
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from monai_memeff.memory import measure_peak
from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet
from monai_memeff.sparse.metrics import compute_pooled_hausdorff
from monai_memeff.sparse.superresolution import CoarsenMask, PlaceCoarse

RATE, BATCH = 1e-2, 2
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TRAINED = {1: "spleen", 2: "right kidney", 3: "left kidney", 5: "liver", 6: "stomach", 20: "colon", 25: "sacrum"} | {
    27: "L5",
    29: "L3",
    31: "L1",
    77: "left hip",
    78: "right hip",
    86: "left autochthon",
    100: "rib",
    112: "rib",
}
HELD_OUT = {52: "aorta", 63: "inferior vena cava", 64: "portal and splenic vein", 65: "left iliac artery"} | {
    66: "right iliac artery",
    67: "left iliac vein",
    68: "right iliac vein",
    79: "spinal cord",
    19: "duodenum",
}


@dataclass
class Task:
    """Fine masks (1, H, W, D) uint8 to train on and to test on, and how they are made coarse."""

    train: list[Tensor]
    test: dict[str, Tensor]
    cells: dict[str, Sequence[float]]  # of the test volumes
    crop: tuple[int, int, int]  # fine voxels of a training sample
    crop_cells: tuple[int, int, int]
    spacing: tuple[float, float, float]


def main() -> None:
    """Run the named tasks and print one table each."""
    options = arguments()
    for name in options.tasks:
        task = TASKS[name](options.data)
        print(f"\n{name}: {len(task.train)} masks to train on, {len(task.test)} to test, {options.seconds:g} s each\n")
        print("| method | " + " | ".join(task.test) + " | mean Dice | mean HD95 mm | note |", flush=True)
        print("|---" * (len(task.test) + 4) + "|", flush=True)
        shown = {}
        for coarse_mode in options.coarse:
            for method, found in peers(task, coarse_mode):
                print(row(f"{method}, {coarse_mode}", found, task, ""), flush=True)
                shown[f"{method}, {coarse_mode}"] = found
            for place_mode in options.place:
                network, note = trained(task, coarse_mode, place_mode, options.seconds)
                found, spent = infer(network, task, coarse_mode, place_mode)
                label = f"ours, {coarse_mode}, {place_mode}"
                print(row(label, found, task, f"{note}; {spent}"), flush=True)
                shown[label] = found
        if options.output:
            picture(options.output / f"{name}.png", task, shown)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEMEFF_DATA", beside)))
    parser.add_argument("--seconds", type=float, default=150, help="CPU-seconds of training of each network")
    parser.add_argument("--coarse", nargs="+", default=["any"], choices=["any", "majority"])
    parser.add_argument("--place", nargs="+", default=["repeat"], choices=["repeat", "centre", "corner"])
    parser.add_argument("--output", type=Path, help="folder for pictures")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"no data at {options.data}: set MEMEFF_DATA, or name the folder with --data.")
    return options


# Data


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values as stored, and millimetres per voxel."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj), np.asarray(image.header.get_zooms()[:3], dtype=float)


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest 26-connected piece."""
    pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces == sizes.argmax()


def box(mask: np.ndarray, margin: int = 4) -> np.ndarray:
    """Cut to what is occupied, with a margin."""
    return np.pad(mask[ndimage.find_objects(mask.astype(np.uint8))[0]], margin)


def tensor(mask: np.ndarray) -> Tensor:
    """(1, H, W, D) uint8."""
    return torch.from_numpy(np.ascontiguousarray(mask).astype(np.uint8))[None]


def skulls(data: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """The test head on its own grid, and the training heads at 1 mm."""
    test, _ = read(data / "head_ct" / "vhf_head_ct.nii.gz")
    phantom, phantom_mm = read(data / "head_ct" / "philips_skull_phantom_bone1mm.nii.gz")
    mri, mri_mm = read(data / "head_mr_seg3d" / "skull.nii.gz")
    heads = [(largest(phantom > 300), phantom_mm), (largest(mri > 0), mri_mm)]
    return largest(test > 300), [box(ndimage.zoom(m.astype(np.float32), mm, order=1) >= 0.5) for m, mm in heads]


def cube_task(data: Path, factor: int) -> Task:
    """64^3 cells of 4 mm to ``factor`` voxels per cell, in a cube of 256 mm."""
    test, heads = skulls(data)
    cut = box(test, 0)
    cube = np.zeros((256, 256, 256), dtype=bool)
    start = [(256 - n) // 2 for n in cut.shape]
    cube[tuple(slice(s, s + n) for s, n in zip(start, cut.shape, strict=True))] = cut
    pool = CoarsenMask(factor=4 // factor, mode="majority")
    edge = 24 * factor
    return Task(
        [pool(tensor(np.pad(head, [(0, -n % 4) for n in head.shape]))) for head in heads],
        {"skull": pool(tensor(cube))},
        {"skull": (64, 64, 64)},
        (edge, edge, edge),
        (24, 24, 24),
        (4.0 / factor,) * 3,
    )


def skull512(data: Path) -> Task:
    """64^3 cells to the CT's own grid; a training sample has 8 x 8 x 32 cells of the same size."""
    test, heads = skulls(data)
    train = [tensor(head) for head in heads]
    return Task(train, {"skull": tensor(test)}, {"skull": (64, 64, 64)}, (64, 64, 117), (8, 8, 32), (1.0, 1.0, 1.0))


def organs(data: Path) -> Task:
    """12 mm to 3 mm."""
    labels, mm = read(data / "totalseg" / "example_seg_fast_force_split.nii.gz")
    labels = np.pad(labels, [(0, -n % 4) for n in labels.shape])
    train = [tensor(box(labels == value)) for value in TRAINED if (labels == value).any()]
    for file in sorted((data / "openkbp").glob("*_oar.nii.gz")):
        found, steps = read(file)
        for value in range(1, 6):
            if (found == value).any():
                zoomed = ndimage.zoom(box(found == value).astype(np.float32), steps / 3.0, order=1) >= 0.5
                train += [tensor(zoomed)] if zoomed.sum() > 50 else []
    test = {name: tensor(labels == value) for value, name in HELD_OUT.items() if (labels == value).any()}
    cells = tuple(n // 4 for n in labels.shape)
    return Task(train, test, dict.fromkeys(test, cells), (64, 64, 64), (16, 16, 16), tuple(mm))


def organs512(data: Path) -> Task:
    """512 x 512 x 20 from 128 x 128 x 10."""
    labels, mm = read(data / "totalseg" / "example_seg_dicom.nii.gz")
    train = [tensor(labels == value) for value in TRAINED if (labels == value).any()]
    test = {name: tensor(labels == value) for value, name in HELD_OUT.items() if (labels == value).any()}
    return Task(train, test, dict.fromkeys(test, (128, 128, 10)), (96, 96, 20), (24, 24, 10), tuple(mm))


TASKS = {
    "skull128": lambda data: cube_task(data, 2),
    "skull256": lambda data: cube_task(data, 4),
    "skull512": skull512,
    "organs": organs,
    "organs512": organs512,
}


# Training and inference


def samples(task: Task, coarse_mode: str, place_mode: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops around a voxel of a random mask, mirrored at random: placed coarse mask and truth."""
    random = np.random.default_rng(0)
    where = [mask.nonzero()[:, 1:] for mask in task.train]
    coarsen, place = CoarsenMask(spatial_size=task.crop_cells, mode=coarse_mode), PlaceCoarse(place_mode)
    while True:
        number = random.integers(len(where))
        centre = where[number][random.integers(len(where[number]))].tolist()
        start = [c - int(random.integers(0, n)) for c, n in zip(centre, task.crop, strict=True)]
        start[2] = 0 if task.crop[2] == task.train[number].shape[3] else start[2]
        fine = cut(task.train[number], start, task.crop)
        fine = fine.flip([a + 1 for a in range(3) if random.random() < 0.5])
        coarse = coarsen(fine)
        if coarse.any():
            yield place(coarse, fine), fine


def cut(mask: Tensor, start: Sequence[int], extent: Sequence[int]) -> Tensor:
    """A part of a mask, 0 beyond its border."""
    part = mask.new_zeros((1, *extent))
    spans = [(max(s, 0), min(s + n, m)) for s, n, m in zip(start, extent, mask.shape[1:], strict=True)]
    here = tuple(slice(low, high) for low, high in spans)
    there = tuple(slice(low - s, high - s) for (low, high), s in zip(spans, start, strict=True))
    part[(slice(None), *there)] = mask[(slice(None), *here)]
    return part


def trained(task: Task, coarse_mode: str, place_mode: str, seconds: float) -> tuple[SparseCompletionNet, str]:
    """Train until the time is up; the rate falls to 0 over the second half."""
    torch.manual_seed(0)
    network, loss_of = SparseCompletionNet().train(), SparseCompletionLoss()
    optimizer = torch.optim.Adam(network.parameters(), RATE, amsgrad=True)
    source, steps, peak, start = samples(task, coarse_mode, place_mode), 0, 0, time.process_time()

    def step() -> None:
        pairs = [next(source) for _ in range(BATCH)]
        coarse, fine = (torch.stack(volumes) for volumes in zip(*pairs, strict=True))
        optimizer.zero_grad()
        loss_of(network(coarse, fine), fine).backward()
        optimizer.step()

    while (share := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, max(0.0, 2 * (0.95 - share)))
        if steps == 2:
            with measure_peak() as meter:
                step()
            peak = meter.peak_bytes
        else:
            step()
        steps += 1
    return network.eval(), f"{steps} steps, {peak / 2**20:.0f} MiB a step"


def infer(network: SparseCompletionNet, task: Task, coarse_mode: str, place_mode: str) -> tuple[dict[str, Tensor], str]:
    """Every test mask in one pass."""
    found, start, peak = {}, time.process_time(), 0
    for name, fine in task.test.items():
        coarse = CoarsenMask(spatial_size=task.cells[name], mode=coarse_mode)(fine)
        placed = network.sparsify(PlaceCoarse(place_mode)(coarse, fine)[None])
        with torch.no_grad(), measure_peak() as meter:
            logits = network(placed)
        found[name] = network.densify(logits)[0] > 0
        peak = max(peak, meter.peak_bytes)
    seconds = (time.process_time() - start) / len(found)
    return found, f"{seconds:.1f} s and at most {peak / 2**20:.0f} MiB a volume"


def peers(task: Task, coarse_mode: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What needs no training."""
    kinds = {"nearest": ("repeat", coarse_mode), "trilinear": ("trilinear", coarse_mode)}
    kinds["trilinear of shares"] = ("trilinear", "fraction")
    for kind, (place_mode, mode) in kinds.items():
        values = {}
        for name, fine in task.test.items():
            values[name] = PlaceCoarse(place_mode)(CoarsenMask(spatial_size=task.cells[name], mode=mode)(fine), fine)
        yield kind, {name: value >= 0.5 for name, value in values.items()}
        if kind != "nearest":
            mean = {
                level: np.mean([dice(values[name] >= level, fine) for name, fine in task.test.items()])
                for level in LEVELS
            }
            level = max(mean, key=lambda key: mean[key])
            yield f"{kind}, best level {level}", {name: value >= level for name, value in values.items()}


# Scores and pictures


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


if __name__ == "__main__":
    main()
