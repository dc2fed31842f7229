"""Sparse super-resolution of real masks beside nearest and trilinear up-sampling: Dice, distance, memory, a picture.

Skulls: bone of head CTs at 1 mm. Trained on two heads (the Philips phantom and the segmented skull of the MRI head),
tested on a third, the Visible Human head, of which nothing is seen in training. One test head is a demonstration.
`skull128` and `skull256` take a cube of 256 mm around the head: 64^3 cells of 4 mm to 2 mm or to 1 mm; `skull512` takes
the CT's own grid, 512 x 512 x 234 at 1 mm: 64^3 cells of 8 x 8 x 3.66 mm.

Organs: `organs` is TotalSegmentator's example at 3 mm made coarse to 12 mm. Trained on the organs of TRAINED and on
OpenKBP's, tested on vessels and other thin organs of the same body that training never sees. `organs512` is the example
CT of 512 x 512 x 20 voxels (0.98 x 0.98 x 2 mm) with cells of 4 x 4 x 2 voxels, with the same organs held out. Neither
holds an esophagus. All of these labels are a model's, not a person's, and those of the second are its 3 mm voxels
repeated on the fine grid: they have the size of a clinical segmentation, not its detail.

Two stages: `stages512` is the aorta of that CT, from 128 x 128 x 16 cells. A dense U-Net makes the coarse mask; it is
trained on this very scan, so it errs less than on a new patient. The sparse network is trained on TRAINED's organs. Its
table has perfect coarse masks, those of the first stage, and those of the first stage at another level, above
which it marks as many cells as the truth has: a level to choose on validation, here chosen on the test itself.

Peers, all from the same coarse grid: nearest, trilinear of the same binary coarse mask (at 0.5, and at the level that
is best on the test itself, which no one knows beforehand), and trilinear of the share of each cell, which needs more
than a binary mask (of the first stage: its probabilities). Seconds are CPU-seconds of this process.

    OMP_NUM_THREADS=1 python tests/benchmarks/sparse_superresolution.py skull128 organs --seconds 150
    OMP_NUM_THREADS=1 python tests/benchmarks/sparse_superresolution.py stages512 --seconds 200 --noise 0 0.5
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sparse_superresolution_masks import TASKS, Coarse, Task
from sparse_superresolution_scores import dice, picture, row
from torch import Tensor

from monai_memeff.memory import measure_peak
from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet
from monai_memeff.sparse.transforms.downsample_mask import DownsampleMask
from monai_memeff.sparse.transforms.resample_to_grid import ResampleToGrid
from monai_memeff.sparse.transforms.segmentation_errors import RandSegmentationErrors

RATE, BATCH = 1e-2, 2
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def main() -> None:
    """Run the named tasks and print one table each."""
    options = arguments()
    for name in options.tasks:
        task = TASKS[name](options.data)
        print(f"\n{name}: {len(task.train)} masks to train on, {len(task.test)} to test, {options.seconds:g} s each\n")
        print("| method | " + " | ".join(task.test) + " | mean Dice | mean HD95 mm | note |", flush=True)
        print("|---" * (len(task.test) + 4) + "|", flush=True)
        for coarse_mode in options.coarse:
            for number, shown in enumerate(run(task, coarse_mode, options).values()):
                if options.output:
                    picture(options.output / f"{name}_{coarse_mode}_{number}.png", task, shown)


def run(task: Task, coarse_mode: str, options: argparse.Namespace) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Print the rows of one way to make masks coarse; what was found, by coarse input, method and test mask."""
    inputs = coarse_inputs(task, coarse_mode, options.first_seconds)
    shown: dict[str, dict[str, dict[str, Tensor]]] = {source: {} for source in inputs}
    for source, coarse in inputs.items():
        for method, found in peers(task, coarse):
            print(row(f"{method}, {source}", found, task, ""), flush=True)
            shown[source][f"{method}, {source}"] = found
    for place_mode in options.place:
        for noise in options.noise:
            network, note = trained(task, coarse_mode, place_mode, noise, options.seconds)
            for source, coarse in inputs.items():
                found, spent = infer(network, task, coarse, place_mode)
                label = f"ours, {source}, {place_mode}" + (f", noise {noise:g}" if noise else "")
                print(row(label, found, task, f"{note}; {spent}"), flush=True)
                shown[source][label] = found
    return shown


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEMEFF_DATA", beside)))
    parser.add_argument("--seconds", type=float, default=150, help="CPU-seconds of training of each network")
    parser.add_argument("--first-seconds", type=float, default=60, help="the same of the first stage of stages512")
    parser.add_argument("--coarse", nargs="+", default=["any"], choices=["any", "majority"])
    parser.add_argument("--place", nargs="+", default=["repeat"], choices=["repeat", "center", "corner"])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0], help="probabilities of RandSegmentationErrors")
    parser.add_argument("--output", type=Path, help="folder for pictures, one for each coarse input")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"no data at {options.data}: set MEMEFF_DATA, or name the folder with --data.")
    return options


def coarse_inputs(task: Task, coarse_mode: str, first_seconds: float) -> dict[str, Coarse]:
    """Perfect coarse masks, and what a first stage makes of the image where there is one."""
    truth, shares = (
        {name: DownsampleMask(spatial_size=task.cells[name], mode=mode)(fine) for name, fine in task.test.items()}
        for mode in (coarse_mode, "fraction")
    )
    found = {coarse_mode: Coarse(truth, shares)}
    if task.image is not None:
        from sparse_superresolution_first import first_stage, levels

        (name,) = task.test
        logits, note = first_stage(task.image, truth[name], first_seconds)
        for level in levels(logits, truth[name]):
            mask = (logits > level).to(torch.uint8)
            label = f"{coarse_mode} of stage 1" + (f" above {level:.2f}" if level else "")
            print(f"| {label} | coarse Dice {dice(mask > 0, truth[name]):.3f}, {int(mask.sum())} cells | {note} |")
            found[label] = Coarse({name: mask}, {name: (logits - level).sigmoid()})
    return found


def samples(task: Task, coarse_mode: str, place_mode: str, noise: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops around a voxel of a random mask, mirrored at random: placed coarse mask and truth."""
    random = np.random.default_rng(0)
    where = [mask.nonzero()[:, 1:] for mask in task.train]
    coarsen, place = DownsampleMask(spatial_size=task.crop_cells, mode=coarse_mode), ResampleToGrid(place_mode)
    spoil = RandSegmentationErrors(prob=noise).set_random_state(0)
    while True:
        number = random.integers(len(where))
        center = where[number][random.integers(len(where[number]))].tolist()
        start = [c - int(random.integers(0, n)) for c, n in zip(center, task.crop, strict=True)]
        start[2] = 0 if task.crop[2] == task.train[number].shape[3] else start[2]
        fine = cut(task.train[number], start, task.crop)
        fine = fine.flip([a + 1 for a in range(3) if random.random() < 0.5])
        coarse = spoil(coarsen(fine))
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


def trained(
    task: Task, coarse_mode: str, place_mode: str, noise: float, seconds: float
) -> tuple[SparseCompletionNet, str]:
    """Train until the time is up; the rate falls to 0 over the second half."""
    torch.manual_seed(0)
    network, loss_of = SparseCompletionNet().train(), SparseCompletionLoss()
    optimizer = torch.optim.Adam(network.parameters(), RATE, amsgrad=True)
    source, steps, peak, start = samples(task, coarse_mode, place_mode, noise), 0, 0, time.process_time()

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


def infer(network: SparseCompletionNet, task: Task, coarse: Coarse, place_mode: str) -> tuple[dict[str, Tensor], str]:
    """Every test mask in one pass."""
    found, start, peak = {}, time.process_time(), 0
    for name, fine in task.test.items():
        placed = network.sparsify(ResampleToGrid(place_mode)(coarse.masks[name], fine)[None])
        with torch.no_grad(), measure_peak() as meter:
            logits = network(placed)
        found[name] = network.densify(logits)[0] > 0
        peak = max(peak, meter.peak_bytes)
    seconds = (time.process_time() - start) / len(found)
    return found, f"{seconds:.1f} s and at most {peak / 2**20:.0f} MiB a volume"


def peers(task: Task, coarse: Coarse) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What needs no training."""
    kinds = {"nearest": ("repeat", coarse.masks), "trilinear": ("trilinear", coarse.masks)}
    kinds["trilinear of shares"] = ("trilinear", coarse.shares)
    for kind, (place_mode, cells) in kinds.items():
        values = {name: ResampleToGrid(place_mode)(cells[name], fine) for name, fine in task.test.items()}
        yield kind, {name: value >= 0.5 for name, value in values.items()}
        if kind != "nearest":
            mean = {
                level: np.mean([dice(values[name] >= level, fine) for name, fine in task.test.items()])
                for level in LEVELS
            }
            level = max(mean, key=lambda key: mean[key])
            yield f"{kind}, best level {level}", {name: value >= level for name, value in values.items()}


if __name__ == "__main__":
    main()
