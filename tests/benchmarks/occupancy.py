"""What querying only near boundaries costs: points, time and memory at 64^3 to 512^3, against a dense U-Net.

    OMP_NUM_THREADS=1 python tests/benchmarks/occupancy.py [--sizes 64 128 256 512] [--budget 30] [--memory 8]

The network is an OccupancyNet with random weights, encoded and queried in full; then its logits are replaced by those
of five analytic organs, and its coarse prediction by the organs at the centers of the network's own coarse cells. So
every way queries the same shape at every size, and time and memory are the network's. Ways to label a volume:

- dense: every voxel.
- dilation: our reading of the paper's standard inference (Reich et al. 2021, arXiv 2110.10640): every fourth voxel,
  then at strides 2 and 1 what a dilation of the inside by 9^3 and 3^3 voxels adds. It queries the insides too.
- boundary cells: multi-resolution isosurface extraction (Mescheder et al. 2019, arXiv 1812.03828): the octree's
  coarsest grid, then all corners of the halves of boundary cells; no boundary is followed.
- octree, grid and octree, network: OctreeInferer from its default grid, and from the coarse prediction.

Seconds are CPU-seconds, encoding included; the peak is of live tensors above the volume, without the workspace inside
an operation. What would take more than the budgets is not run, and the table says so: points by the rate of one pass,
encoder and U-Net by the size before, times the ratio of voxels; its points are then counted without the network's work.
The last table is the paper's table 2 as a shape: the peak of one pass by its points and the variant.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from monai_memeff.memory import measure_peak
from monai_memeff.occupancy import OccupancyNet, OctreeInferer
from monai_memeff.occupancy.octree import NodeGrid, default_stride, node_counts

ORGANS = (
    ((0.33, 0.55, 0.52), (0.2, 0.17, 0.15)), ((0.8, 0.45, 0.6), (0.06, 0.1, 0.1)),
    ((0.3, 0.3, 0.35), (0.07, 0.06, 0.13)), ((0.7, 0.3, 0.35), (0.07, 0.06, 0.13)),
    ((0.64, 0.62, 0.55), (0.1, 0.08, 0.14)),
)  # fmt: skip
"""Centers and radii of liver, spleen, kidneys and stomach, as parts of the field of view."""

COARSE = 8  # voxels per coarse cell where there is no network: as in the default variant


def organs(i: Tensor, j: Tensor, k: Tensor, n: int) -> Tensor:
    """Positive inside the organs in a field of view of n voxels."""
    result = torch.full((), -torch.inf)
    for center, radii in ORGANS:
        a, b, c = (((x / n - m) / r) ** 2 for x, m, r in zip((i, j, k), center, radii, strict=True))
        result = torch.maximum(result, 1 - (a + b + c))
    return result


class AnalyticOrgans(nn.Module):
    """Answers with the organs, after the work of a network if there is one; counts its points."""

    def __init__(self, n: int, network: OccupancyNet | None = None) -> None:
        super().__init__()
        self.n, self.network, self.points = n, network, 0

    def encode(self, volume: Tensor) -> Any:
        """The network's own latent."""
        return self.network.encode(volume) if self.network else None

    def query(self, latent: Any, points: Tensor, volume: Tensor) -> Tensor:
        """(B, N, 1): the network's work, the organs' answer."""
        self.points += points.shape[1]
        answer = organs(*points.unbind(-1), self.n)[..., None]
        return answer + 0 * self.network.query(latent, points, volume) if self.network else answer

    def coarse_logits(self, latent: Any) -> Tensor:
        """The organs at the centers of coarse cells."""
        own = self.network.coarse_logits(latent) if self.network else None
        grid = (self.n // COARSE,) * 3 if own is None else own.shape[2:]
        at = [(torch.arange(extent) + 0.5) * self.n / extent - 0.5 for extent in grid]
        return organs(*torch.meshgrid(*at, indexing="ij"), self.n)[None, None]


def truth(n: int) -> Tensor:
    """The organs, bool (n, n, n)."""
    at, result = torch.arange(n, dtype=torch.float32), torch.empty(n, n, n, dtype=torch.bool)
    for start in range(0, n, 16):
        result[start : start + 16] = organs(at[start : start + 16, None, None], at[:, None], at, n) > 0
    return result


# Ways to label a volume: (network, volume, points per pass) -> labels


def answers(network: AnalyticOrgans, volume: Tensor, budget: int) -> Callable[[Tensor], Tensor]:
    """A function (N, 3) voxels -> (N,) bool."""
    latent = network.encode(volume)

    def evaluate(voxels: Tensor) -> Tensor:
        return torch.cat([network.query(latent, v[None].float(), volume)[0, :, 0] > 0 for v in voxels.split(budget)])

    return evaluate


def by_querying_all(network: AnalyticOrgans, volume: Tensor, budget: int) -> Tensor:
    """Every voxel."""
    evaluate, labels = answers(network, volume, budget), torch.zeros(volume.shape[2:], dtype=torch.bool)
    for start in range(0, labels.numel(), budget):
        keys = torch.arange(start, min(start + budget, labels.numel()))
        labels.view(-1)[keys] = evaluate(torch.stack(torch.unravel_index(keys, labels.shape), -1))
    return labels


def by_dilation(network: AnalyticOrgans, volume: Tensor, budget: int) -> Tensor:
    """Every fourth voxel, then what dilations by 9^3 and 3^3 add on the grids of stride 2 and 1."""
    evaluate, labels = answers(network, volume, budget), torch.zeros(volume.shape[2:], dtype=torch.bool)
    queried = torch.zeros_like(labels)
    for radius, stride in ((None, 4), (4, 2), (1, 1)):
        grid = (slice(None, None, stride),) * 3
        wanted = ~queried[grid] if radius is None else dilated(labels, radius)[grid] & ~queried[grid]
        voxels = wanted.nonzero() * stride
        labels[voxels.unbind(-1)] = evaluate(voxels)
        queried[grid] |= wanted
    return labels


def dilated(mask: Tensor, radius: int) -> Tensor:
    """By a cube, axis after axis."""
    for axis in range(3):
        grown, extent = mask.clone(), mask.shape[axis]
        for step in range(1, radius + 1):
            grown.narrow(axis, step, extent - step).logical_or_(mask.narrow(axis, 0, extent - step))
            grown.narrow(axis, 0, extent - step).logical_or_(mask.narrow(axis, step, extent - step))
        mask = grown
    return mask


def by_boundary_cells(network: AnalyticOrgans, volume: Tensor, budget: int) -> Tensor:
    """All corners of the halves of boundary cells."""
    evaluate, shape = answers(network, volume, budget), tuple(volume.shape[2:])
    counts = node_counts(shape, default_stride(shape))
    grid = NodeGrid(shape, default_stride(shape), *(torch.zeros(counts, dtype=torch.bool) for _ in range(2)))
    grid.query(torch.arange(grid.labels.numel()), evaluate, budget)
    cells = grid.all_boundary_cells()
    while max(grid.stride) > 1:
        finer = grid.refined()
        halves = grid.children(cells, finer)
        finer.query(finer.unqueried(halves), evaluate, budget)
        grid, cells = finer, finer.boundary_cells(halves)
    return grid.labels


def by_octree(initial: str) -> Callable[[AnalyticOrgans, Tensor, int], Tensor]:
    """OctreeInferer."""

    def run(network: AnalyticOrgans, volume: Tensor, budget: int) -> Tensor:
        return OctreeInferer(budget, initial, labels=True)(volume, network)[0, 0] > 0

    return run


WAYS = {
    "dense": by_querying_all,
    "dilation": by_dilation,
    "boundary cells": by_boundary_cells,
    "octree, grid": by_octree("grid"),
    "octree, network": by_octree("network"),
}


# Tables


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, CPU-seconds and peak MiB."""
    with measure_peak() as meter:
        began = time.process_time()
        result = work()
        seconds = time.process_time() - began
    return result, seconds, meter.peak_bytes / 2**20


def ways_table(options: argparse.Namespace) -> None:
    """Every way at every size."""
    print("| size | way | points | fraction | wrong voxels | seconds | peak MiB |\n|---|---|---|---|---|---|---|")
    encoding = 0.0
    network = OccupancyNet(1, 1, channels=(8, 16, 32, 64), variant="interpolated").eval()
    for n in options.sizes:
        volume, expected = torch.rand(1, 1, n, n, n), truth(n)
        estimate = encoding * 8
        if estimate > options.budget:
            print(f"| {n}^3 | all | | | | not run: encoding alone about {estimate:.0f} | |", flush=True)
            encoding = estimate
            continue
        latent, encoding, _ = timed(lambda volume=volume: network.encode(volume))
        points = torch.rand(1, 2**14, 3) * (n - 1)
        network.query(latent, points, volume)
        rate = 2**14 / timed(lambda latent=latent, p=points, v=volume: network.query(latent, p, v))[1]
        del latent
        for name, way in WAYS.items():
            counter = AnalyticOrgans(n)
            wrong = 0 if name == "dense" else int((way(counter, volume, 2**18) != expected).sum())
            queried = n**3 if name == "dense" else counter.points
            expectation = encoding + queried / rate
            cost = f"not run: about {expectation:.0f} | "
            if expectation <= options.budget:
                worker = AnalyticOrgans(n, network)
                _, seconds, peak = timed(lambda w=way, k=worker, v=volume: w(k, v, options.points_per_pass))
                queried, cost = worker.points, f"{seconds:.1f} | {peak:.0f}"
            print(f"| {n}^3 | {name} | {queried:,} | {queried / n**3:.2%} | {wrong:,} | {cost} |", flush=True)


def dense_table(options: argparse.Namespace) -> None:
    """The U-Net at every size."""
    network = UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2).eval()
    print("\n| size | U-Net: seconds | peak MiB |\n|---|---|---|")
    before: tuple[int, float, float] | None = None
    for n in options.sizes:
        if before is not None:
            seconds, peak = (cost * (n / before[0]) ** 3 for cost in before[1:])
            if seconds > options.budget or peak > options.memory * 1024:
                print(f"| {n}^3 | not run: about {seconds:.0f} | about {peak:.0f} |", flush=True)
                continue
        volume = torch.rand(1, 1, n, n, n)
        _, seconds, peak = timed(lambda v=volume: network(v))
        before = n, seconds, peak
        print(f"| {n}^3 | {seconds:.1f} | {peak:.0f} |", flush=True)


def passes_table(options: argparse.Namespace) -> None:
    """The peak of one pass by its number of points."""
    sizes = [2**14, 2**16, 2**18, 2**20]
    print("\n| peak MiB of one pass, 128^3 | " + " | ".join(f"2^{size.bit_length() - 1}" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    volume = torch.rand(1, 1, 128, 128, 128)
    for variant in options.variants:
        network = OccupancyNet(1, 1, (128,) * 3, (8, 16, 32, 64), variant).eval()
        latent, cells, seconds = network.encode(volume), [], 0.0
        for size in sizes:
            if 4 * seconds > options.budget:
                cells.append("not run")
                continue
            points = (torch.rand(1, size, 3) * 127).round()
            _, seconds, peak = timed(lambda net=network, z=latent, p=points: net.query(z, p, volume))
            cells.append(f"{peak:.0f} ({seconds:.1f} s)")
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--budget", type=float, default=30.0, help="CPU-seconds of one row")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of one row")
    parser.add_argument("--points-per-pass", type=int, default=2**14)
    parser.add_argument("--variants", nargs="+", default=["interpolated", "o-net", "c"], help="of the last table")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ways_table(options)
    dense_table(options)
    passes_table(options)


if __name__ == "__main__":
    main()
