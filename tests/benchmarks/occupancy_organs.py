"""OccupancyNet beside a dense U-Net given the same time, on real organs: dense Dice and the paper's sampled Dice.

OpenKBP: five organs at risk of the head and neck, 24 patients. Validation: every sixth of the sorted case names from
the first (4 patients); training: the other 20. The volumes are cut to their middle 64 x 72 x 128 voxels, which hold all
organs. TotalSegmentator: five abdominal organs of its one example CT at 3 mm, trained and scored on the same volume:
what is learned there is that volume, not the organs. Its labels are a model's, not a person's.

Both networks train without augmentation, with Adam at the same rate and the same loss, until their time is up: CPU
seconds of this process, so that other work on the machine does not count, or wall time on a GPU. The U-Net (MONAI,
residual) sees random 64^3 crops, half of them around an organ, and is run by MONAI's sliding window; OccupancyNet sees
whole volumes and answers 2^12 points of each, and is run by OctreeInferer from a grid; on the first case of each set
the octree is compared with querying every voxel. Sampled Dice is the paper's for LiTS: 2^14 points, 40 % of them near a
border, so it is not the dense one.

    OMP_NUM_THREADS=1 python tests/benchmarks/occupancy_organs.py --seconds 100
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.inferers import Inferer, SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.networks.nets import UNet
from monai.transforms import RandCropByPosNegLabel
from torch import Tensor, nn

from monai_memeff.memory import measure_peak
from monai_memeff.occupancy import OccupancyLoss, OccupancyNet, OctreeInferer, SampledDiceMetric
from monai_memeff.occupancy.engine import draw_batch

ORGANS = {"spleen": 1, "right kidney": 2, "left kidney": 3, "liver": 5, "stomach": 6}
CROP = 64
POINTS = 2**12
RATE = 2e-3
SAMPLING = {"uniform": 0.3, "border": 0.3, "balanced": 0.4}
BAND = 5  # voxels; the organs of OpenKBP are a few voxels wide

Case = tuple[Tensor, Tensor]  # image (1, H, W, D) in [0, 1], label (1, H, W, D)


def main() -> None:
    """Train, score and print the tables."""
    options = arguments()
    torch.manual_seed(0)
    for name, (organs, train, test) in {
        "OpenKBP": openkbp(options.data),
        "TotalSegmentator": totalseg(options.data),
    }.items():
        seconds = options.seconds * (1 if name == "OpenKBP" else 0.6)
        print(f"\n{name}: {len(train)} to train on, {len(test)} to score, {seconds:g} s of training each\n")
        print("| network | parameters | steps | peak MiB of a step | dense Dice | per organ | sampled Dice | note |")
        print("|---|---|---|---|---|---|---|---|")
        for run in (occupancy_network, dense_network):
            print(run(organs, train, test, seconds, options.device), flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEMEFF_DATA", beside)))
    parser.add_argument("--seconds", type=float, default=100, help="training time of each network on OpenKBP")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"no data at {options.data}: set MEMEFF_DATA, or name the folder with --data.")
    return options


def openkbp(data: Path) -> tuple[list[str], list[Case], list[Case]]:
    """Names of the organs, training and validation cases."""
    names = sorted(file.name.removesuffix("_ct.nii.gz") for file in (data / "openkbp").glob("*_ct.nii.gz"))
    middle = (slice(32, 96), slice(30, 102), slice(None))
    cases = [
        (
            scaled(read(data / "openkbp" / f"{name}_ct.nii.gz")[middle]),
            read(data / "openkbp" / f"{name}_oar.nii.gz")[middle],
        )
        for name in names
    ]
    pairs = [(image[None], label[None]) for image, label in cases]
    organs = json.loads((data / "openkbp" / "labels.json").read_text())
    return [organs[key] for key in sorted(organs, key=int)], [c for n, c in enumerate(pairs) if n % 6], pairs[::6]


def totalseg(data: Path) -> tuple[list[str], list[Case], list[Case]]:
    """The one volume, to train and to score."""
    found = read(data / "totalseg" / "example_seg_fast_force_split.nii.gz")
    label = torch.zeros_like(found)
    for number, value in enumerate(ORGANS.values(), 1):
        label[found == value] = number
    case = (scaled(read(data / "totalseg" / "example_ct.nii.gz"))[None], label[None])
    return list(ORGANS), [case], [case]


def read(path: Path) -> Tensor:
    """A volume (H, W, D) as float32."""
    return torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float32))


def scaled(image: Tensor) -> Tensor:
    """-200 to 500 Hounsfield units to [0, 1]."""
    return ((image + 200) / 700).clamp(0, 1)


def timed(step: Callable[[], None], seconds: float, device: str) -> tuple[int, int]:
    """Run a training step until the time is up; returns how often, and the peak bytes of the second one."""
    step()
    with measure_peak(device) as meter:
        step()
    clock = time.process_time if device == "cpu" else time.monotonic
    start, count = clock(), 2
    while clock() - start < seconds:
        step()
        count += 1
    return count, meter.peak_bytes


def shuffled(cases: list[Case]) -> Iterator[Case]:
    """The cases in random order, again and again."""
    while True:
        for number in torch.randperm(len(cases)).tolist():
            yield cases[number]


def occupancy_network(organs: list[str], train: list[Case], test: list[Case], seconds: float, device: str) -> str:
    """Train on points, infer by the octree; a row of the table."""
    network = OccupancyNet(1, len(organs) + 1, variant="interpolated", channels=(16, 32, 64, 128)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    loss_of = OccupancyLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    cases = shuffled(train)

    def step() -> None:
        image, label = (tensor[None].to(device) for tensor in next(cases))
        points, values = draw_batch(label, POINTS, SAMPLING, BAND)
        optimizer.zero_grad()
        loss_of(network(image, points), (values, label)).backward()
        optimizer.step()

    steps, peak = timed(step, seconds, device)
    inferer = OctreeInferer(initial="grid", stride=4, compare_dense=True)
    reports = []

    def after() -> None:
        reports.append(inferer.last_report)
        inferer.compare_dense = False  # querying every voxel takes its time: the first case only

    scores = score(network, inferer, organs, test, device, after)
    fraction = sum(report.fraction for report in reports) / len(reports)
    note = f"{fraction:.1%} queried; first case: {reports[0].disagreement} of {reports[0].voxels:,} voxels not as dense"
    return row("OccupancyNet", network, steps, peak, scores, note)


def dense_network(organs: list[str], train: list[Case], test: list[Case], seconds: float, device: str) -> str:
    """Train and infer as usual; a row of the table."""
    network = UNet(3, 1, len(organs) + 1, (16, 32, 64, 128), (2, 2, 2), num_res_units=2).to(device)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    crop = RandCropByPosNegLabel([CROP] * 3, num_samples=1, allow_smaller=True).set_random_state(0)
    cases = shuffled(train)

    def step() -> None:
        image, label = next(cases)
        both = torch.as_tensor(crop(torch.cat([image, label]), label)[0]).to(device)
        optimizer.zero_grad()
        loss_of(network(both[None, :1]), both[None, 1:]).backward()
        optimizer.step()

    steps, peak = timed(step, seconds, device)
    inferer = SlidingWindowInferer([CROP] * 3, sw_batch_size=1, overlap=0.5, mode="gaussian")
    return row("U-Net", network, steps, peak, score(network, inferer, organs, test, device), "all queried")


def score(
    network: nn.Module,
    inferer: Inferer,
    organs: list[str],
    test: list[Case],
    device: str,
    after: Callable[[], None] = lambda: None,
) -> tuple[Tensor, float]:
    """Dense Dice of every organ, and mean sampled Dice."""
    dense = DiceMetric(include_background=False, reduction="mean_batch")
    sampled = SampledDiceMetric(classes=len(organs))
    network.eval()
    for image, label in test:
        with torch.no_grad():
            found = inferer(image[None].to(device), network).argmax(1, keepdim=True).cpu()
        after()
        dense(one_hot(found, len(organs) + 1), one_hot(label[None], len(organs) + 1))
        sampled(found, label[None])
    return dense.aggregate(), float(sampled.aggregate())


def row(name: str, network: nn.Module, steps: int, peak: int, scores: tuple[Tensor, float], note: str) -> str:
    """One line of the table."""
    per_organ, sampled = scores
    numbers = " ".join(f"{value:.2f}" for value in per_organ.tolist())
    count = sum(p.numel() for p in network.parameters())
    cells = [
        name,
        f"{count:,}",
        str(steps),
        f"{peak / 2**20:.0f}",
        f"{per_organ.mean():.3f}",
        numbers,
        f"{sampled:.3f}",
    ]
    return f"| {' | '.join([*cells, note])} |"


if __name__ == "__main__":
    main()
