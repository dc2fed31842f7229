"""Predicted against measured peaks: twelve networks at three sizes, inference and training, and budgets that are kept.

Run: python tests/benchmarks/estimate.py            (about five CPU-minutes; prints the table of docs/benchmarks)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.networks.nets as nets
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from monai_memeff.clstm import CLSTMUNet
from monai_memeff.memory import estimate_network, measure_peak
from monai_memeff.memory.step import run_step
from monai_memeff.occupancy import OccupancyNet
from monai_memeff.sparse import SparseUNet
from tests.halo.networks import nnunet

SIZES = ((64, 32, 32), (64, 64, 32), (64, 64, 64))
FEATURES = (8, 8, 16, 32, 32, 8)
LEVELS = ((8, 16, 32), (2, 2))
PLAIN = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": LEVELS[0], "strides": LEVELS[1]}

NETWORKS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "UNet, instance norm": lambda _: nets.UNet(**PLAIN, num_res_units=2),
    "UNet, batch norm, dropout": lambda _: nets.UNet(**PLAIN, num_res_units=2, norm="batch", dropout=0.1),
    "BasicUNet": lambda _: nets.BasicUNet(features=FEATURES),
    "BasicUNetPlusPlus": lambda _: nets.BasicUNetPlusPlus(features=FEATURES),
    "AttentionUnet": lambda _: nets.AttentionUnet(3, 1, 2, *LEVELS),
    "SegResNet": lambda _: nets.SegResNet(init_filters=8, dropout_prob=0.2),
    "DynUNet": lambda _: nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]),
    "VNet": lambda _: nets.VNet(),
    "PlainConvUNet": lambda _: nnunet(_architecture("PlainConvUNet"), n_conv_per_stage=2),
    "ResidualEncoderUNet": lambda _: nnunet(_architecture("ResidualEncoderUNet"), n_blocks_per_stage=2),
    "UNETR": lambda size: nets.UNETR(1, 2, size, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4),
    "SwinUNETR": lambda _: nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12),
}


def _architecture(name: str) -> type[nn.Module]:
    import dynamic_network_architectures.architectures.unet as unet

    return getattr(unet, name)


def measured(network: nn.Module, volume: torch.Tensor, training: bool) -> int:
    """Peak bytes of a real step."""
    network.zero_grad(set_to_none=True)
    with measure_peak() as meter:
        run_step(network, volume, training)
    network.zero_grad(set_to_none=True)
    return meter.peak_bytes


def kept_budgets(network: nn.Module, volume: torch.Tensor, whole: int) -> tuple[int, int]:
    """Budgets that the proposed setting kept when it was run, and those that were tried."""
    kept = tried = 0
    for share in (1.2, 0.6, 0.4):
        budget = int(share * whole)
        try:
            found = estimate_network(network, tuple(volume.shape), system="halo", memory_budget=budget)
        except ValueError as refusal:
            print(f"    refused: {refusal}", file=sys.stderr)
            continue
        with torch.no_grad(), measure_peak() as meter:
            found.inferer(volume, network)
        tried, kept = tried + 1, kept + (meter.peak_bytes <= budget)
    return kept, tried


def row(name: str) -> str:
    """One network at all sizes: MiB predicted / measured at the largest, and the ratios at all."""
    cells, kept, tried = [name], 0, 0
    for training in (False, True):
        pairs = []
        for size in SIZES:
            torch.manual_seed(0)
            network = NETWORKS[name](size).train(training)
            volume = torch.rand(1, 1, *size)
            found = estimate_network(network, tuple(volume.shape), training=training)
            pairs.append((found.peak_bytes, measured(network, volume, training)))
            if not training and size == SIZES[1]:
                kept, tried = kept_budgets(network.eval(), volume, found.peak_bytes)
        cells += cells_of(pairs)
    return "| " + " | ".join([*cells, f"{kept} of {tried}"]) + " |"


def head(size: tuple[int, ...]) -> torch.Tensor:
    """A shell of random values, the rest 0."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    radius = sum(axis**2 for axis in axes) ** 0.5
    return ((radius - 0.8).abs() < 0.1)[None, None] * (0.5 + torch.rand(1, 1, *size))


class Labeled(OccupancyNet):
    """An OccupancyNet that computes as always, and then answers with a head's shell: an implicit shape."""

    shown = False

    def query(self, latent: Any, points: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        """Logits of two classes."""
        logits = super().query(latent, points, volume)
        if not self.shown:
            return logits
        last = torch.tensor(volume.shape[2:]) - 1.0
        inside = 0.1 - ((2 * points / last - 1).norm(dim=-1) - 0.8).abs()
        return torch.stack([-inside, inside], -1)


def points_of_a_shape() -> str:
    """Occupancy: its octree along the border of the image's active voxels, 16384 points in a pass."""
    cells = []
    for training in (False, True):
        pairs = []
        for size in ((64, 64, 64), (96, 104, 88), (128, 144, 120)):
            torch.manual_seed(0)
            network, image = Labeled(1, 2, channels=(8, 16, 32)).train(training), head(size)
            found = estimate_network(network, tuple(image.shape), training, "occupancy", image=image)
            if training:
                pairs.append((found.peak_bytes, training_with_points(network, image)))
                continue
            network.shown = True
            with torch.no_grad(), measure_peak() as meter:
                found.inferer(image, network)
            pairs.append((found.peak_bytes, meter.peak_bytes))
        cells += cells_of(pairs)
    kept, tried = kept_points(network.eval())
    return "| " + " | ".join(["OccupancyNet", *cells, f"{kept} of {tried}"]) + " |"


def training_with_points(network: nn.Module, image: torch.Tensor) -> int:
    """Peak bytes of a real step on as many points as the overlay draws, with cross-entropy of both outputs."""
    network.zero_grad(set_to_none=True)
    with measure_peak() as meter:
        logits, coarse = network(image, torch.zeros(1, 2**14, 3))
        loss = F.cross_entropy(logits.transpose(1, 2), torch.zeros(1, 2**14, dtype=torch.long))
        (loss + F.cross_entropy(coarse, torch.zeros(1, *coarse.shape[2:], dtype=torch.long))).backward()
    network.zero_grad(set_to_none=True)
    return meter.peak_bytes


def kept_points(network: Labeled) -> tuple[int, int]:
    """Budgets that the proposed passes kept, with the image and without, and those that were tried."""
    size = (96, 104, 88)
    image, kept, tried = head(size), 0, 0
    network.shown = False
    for given in (image, None):
        whole = estimate_network(network, (1, 1, *size), system="occupancy", image=given).peak_bytes
        for share in (1.0, 0.6, 0.4):
            budget = int(share * whole)
            network.shown = False
            found = estimate_network(network, (1, 1, *size), system="occupancy", image=given, memory_budget=budget)
            network.shown = True
            with torch.no_grad(), measure_peak() as meter:
                found.inferer(image, network)
            tried, kept = tried + 1, kept + (meter.peak_bytes <= budget)
    return kept, tried


def cells_of(pairs: list[tuple[int, int]]) -> list[str]:
    """MiB predicted / measured at the largest size, and the ratios at all."""
    return [
        f"{pairs[-1][0] / 2**20:.1f} / {pairs[-1][1] / 2**20:.1f}",
        ", ".join(f"{predicted / real:.4f}" for predicted, real in pairs),
    ]


def own_systems() -> list[str]:
    """Our own networks: sparse at the occupancy of an image, recurrent slabs."""
    lines = []
    for name, system, build, sizes in (
        (
            "SparseUNet",
            "sparse",
            lambda: SparseUNet(**PLAIN, num_res_units=1),
            ((96,) * 3, (128, 144, 120), (160,) * 3),
        ),
        (
            "CLSTMUNet",
            "clstm",
            lambda: CLSTMUNet(channels=(8, 16), hidden_channels=4, out_channels=2, norm="instance"),
            ((24, 24, 40), (24, 24, 67), (32, 24, 100)),
        ),
    ):
        cells = [name]
        for training in (False, True):
            pairs = []
            for size in sizes:
                torch.manual_seed(0)
                network, image = build().train(training), head(size)
                found = estimate_network(network, tuple(image.shape), training=training, system=system, image=image)
                if training or system == "sparse":
                    real = measured(network, image, training)
                else:
                    with torch.no_grad(), measure_peak() as meter:
                        found.inferer(image, network)
                    real = meter.peak_bytes
                pairs.append((found.peak_bytes, real))
            cells += cells_of(pairs)
        lines.append("| " + " | ".join([*cells, ""]) + " |")
    return lines


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| network | inference, MiB | ratios | training, MiB | ratios | budgets kept |\n|---|---|---|---|---|---|")
    for name in NETWORKS:
        print(row(name), flush=True)
    for line in own_systems():
        print(line, flush=True)
    print(points_of_a_shape(), flush=True)


if __name__ == "__main__":
    main()
