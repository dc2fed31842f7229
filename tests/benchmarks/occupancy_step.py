"""Peak memory and CPU time of one training step: OccupancyTrainer's network and a stock U-Net, by patch size.

One patch of one channel, six classes, single precision, nnU-Net's Dice and cross-entropy: on 2^14 drawn points for the
occupancy network, on all voxels for the U-Net (five stages, 32 to 320 features, no deep supervision). The second of two
steps is measured.

    OMP_NUM_THREADS=1 python tests/benchmarks/occupancy_step.py --sides 64 96
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from monai_memeff.memory import measure_peak
from monai_memeff.occupancy import OccupancyLoss
from monai_memeff.occupancy.engine import draw_batch
from nnunet_plugins.occupancy_network import OccupancyPlansNet
from nnunet_plugins.occupancy_trainer import OccupancyTrainer

CLASSES = 6


def main() -> None:
    """Print one row per patch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96], help="multiples of 16")
    parser.add_argument("--alone", type=int, nargs="*", default=[128], help="sides for the occupancy network only")
    options = parser.parse_args()
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    ours, of_points, stock = OccupancyPlansNet(1, CLASSES), OccupancyLoss(loss), unet()
    print("| patch | occupancy, MiB | U-Net, MiB | occupancy, CPU s | U-Net, CPU s |\n|---|---|---|---|---|")
    for side in [*options.sides, *options.alone]:
        image = torch.randn(1, 1, side, side, side)
        label = (torch.rand(1, 1, *[side // 16] * 3) * CLASSES).floor()
        for axis in (2, 3, 4):
            label = label.repeat_interleave(16, axis)

        def points_step(image: torch.Tensor = image, label: torch.Tensor = label) -> None:
            points, values = draw_batch(label, OccupancyTrainer.points, OccupancyTrainer.sampling)
            of_points(ours(image, points), (values, label)).backward()

        def voxels_step(image: torch.Tensor = image, label: torch.Tensor = label) -> None:
            loss(stock(image), label).backward()

        found = [measured(points_step, ours), measured(voxels_step, stock) if side in options.sides else ("-", "-")]
        print(f"| {side}^3 | {found[0][0]} | {found[1][0]} | {found[0][1]} | {found[1][1]} |", flush=True)


def unet() -> nn.Module:
    """A stock architecture as nnU-Net plans it for patches of about 96^3."""
    norm, act = nn.InstanceNorm3d, nn.LeakyReLU
    return PlainConvUNet(
        1, 5, [32, 64, 128, 256, 320], nn.Conv3d, 3, [1, 2, 2, 2, 2], [2] * 5, CLASSES, [2] * 4, conv_bias=True,
        norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=act, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def measured(step: Callable[[], None], network: nn.Module) -> tuple[str, str]:
    """Peak MiB and CPU seconds of the second step."""
    for _ in range(2):
        start = time.process_time()
        with measure_peak("cpu") as meter:
            step()
        seconds = time.process_time() - start
        network.zero_grad()
    return f"{meter.peak_bytes / 2**20:.0f}", f"{seconds:.1f}"


if __name__ == "__main__":
    main()
