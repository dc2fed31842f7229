"""CPU-seconds of streaming over the whole network's, and its peaks: three networks in 8 and 16 tiles, as JSON lines.

    OMP_NUM_THREADS=1 python tests/benchmarks/halo_plan.py [--networks plain unet linknet] [--tiles 8 16] [--repeats 3]

Each line holds the whole network's CPU-seconds (median), those of the first call (the plan is made) and of later ones
(median) over it, the whole network's peak of activations by a dry run, the plan's peak and the measured one, and the
largest difference. Whole and streamed calls alternate. float32, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import monai.networks.nets as nets
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.halo.inferer import whole_peak_bytes


class Block(nn.Module):
    """Two convolutions with instance norm and a shortcut."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(inside, out, 3, stride, 1, bias=False), nn.InstanceNorm3d(out, affine=True), nn.ReLU(True),
            nn.Conv3d(out, out, 3, 1, 1, bias=False), nn.InstanceNorm3d(out, affine=True),
        )  # fmt: skip
        self.way = nn.Identity() if stride == 1 else nn.Conv3d(inside, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Body plus shortcut."""
        return torch.relu(self.body(x) + self.way(x))


def up(inside: int, out: int) -> nn.Module:
    """LinkNet's decoder block: narrow, double the size, widen."""
    narrow = inside // 4
    layers: list[nn.Module] = []
    for layer, width in (
        (nn.Conv3d(inside, narrow, 1, bias=False), narrow),
        (nn.ConvTranspose3d(narrow, narrow, 3, 2, 1, 1, bias=False), narrow),
        (nn.Conv3d(narrow, out, 1, bias=False), out),
    ):
        layers += [layer, nn.InstanceNorm3d(width, affine=True), nn.ReLU(True)]
    return nn.Sequential(*layers)


class LinkNet(nn.Module):
    """Chaurasia and Culurciello 2017 (https://arxiv.org/abs/1707.03718) in 3D: stem of stride 4, sums as skips."""

    def __init__(self, width: int = 16, stages: int = 4) -> None:
        super().__init__()
        widths = [width, *(width * 2**i for i in range(stages))]
        self.stem = nn.Sequential(
            nn.Conv3d(1, width, 7, 2, 3, bias=False), nn.InstanceNorm3d(width, affine=True), nn.ReLU(True),
            nn.MaxPool3d(3, 2, 1),
        )  # fmt: skip
        self.down = nn.ModuleList(
            nn.Sequential(Block(a, b, 1 if i == 0 else 2), Block(b, b, 1))
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.up = nn.ModuleList(up(b, a) for a, b in itertools.pairwise(widths[1:]))
        self.head = nn.Sequential(
            nn.ConvTranspose3d(width, width, 3, 2, 1, 1, bias=False), nn.InstanceNorm3d(width, affine=True),
            nn.ReLU(True), nn.Conv3d(width, width, 3, 1, 1, bias=False), nn.InstanceNorm3d(width, affine=True),
            nn.ReLU(True), nn.ConvTranspose3d(width, 1, 2, 2),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the input's size, which is a multiple of 32."""
        x = self.stem(x)
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        for i in range(len(self.up) - 1, -1, -1):
            x = self.up[i](x) + skips[i]
        result: torch.Tensor = self.head(x)
        return result


def plain() -> nn.Module:
    """nnU-Net's network of four stages from 16 channels."""
    return PlainConvUNet(
        1, 4, (16, 32, 64, 128), nn.Conv3d, 3, [1, 2, 2, 2], [2] * 4, 3, [2] * 3, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (plain, 128),
    "unet": (lambda: nets.UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), 160),
    "linknet": (LinkNet, 256),
}


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and CPU-seconds."""
    began = time.process_time()
    result = function()
    return result, time.process_time() - began


def measure(name: str, tiles: int, repeats: int, side: int | None) -> dict[str, Any]:
    """One line."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network, x = make().eval(), torch.randn(1, 1, *[side or size] * 3)
    inferer = SpatialPartitionInferer(partitions=tiles)
    whole, cpu = timed(lambda: network(x))
    streamed, first = timed(lambda: inferer(x, network))
    error = float((streamed - whole).abs().max())
    del whole, streamed
    alone, later = [cpu], []
    for _ in range(repeats):
        alone.append(timed(lambda: network(x))[1])
        later.append(timed(lambda: inferer(x, network))[1])
    report = inferer.last_report
    assert report is not None
    cpu = statistics.median(alone)
    peak = whole_peak_bytes(network, tuple(x.shape), x.dtype)
    return {
        "network": name, "side": side or size, "tiles": tiles, "whole_cpu_seconds": round(cpu, 3),
        "first_ratio": round(first / cpu, 3), "later_ratio": round(statistics.median(later) / cpu, 3),
        "whole_peak_bytes": peak, "planned_peak_bytes": report.planned_peak_bytes,
        "measured_peak_bytes": report.device_peak_bytes, "peak_share": round(report.device_peak_bytes / peak, 4),
        "store_bytes": report.store_bytes, "moved_bytes": report.moved_bytes, "largest_difference": error,
        "parameters": sum(p.numel() for p in network.parameters()), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    """Print one JSON line for each network and number of tiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--tiles", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=None, help="of the volume, instead of each network's own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for name in options.networks:
            for tiles in options.tiles:
                print(json.dumps(measure(name, tiles, options.repeats, options.side)), flush=True)


if __name__ == "__main__":
    main()
