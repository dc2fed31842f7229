"""The first stage of the super-resolution benchmark: a dense U-Net on a coarse grid, as the bundle's."""

from __future__ import annotations

import time

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor

RATE = 5e-3


def first_stage(image: Tensor, truth: Tensor, seconds: float) -> tuple[Tensor, str]:
    """Train on one scan for so many CPU-seconds; its coarse logits (1, h, w, d) of that scan, and a note."""
    torch.manual_seed(0)
    network = UNet(3, 1, 1, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2)
    optimizer, loss_of = torch.optim.Adam(network.parameters(), RATE), DiceCELoss(sigmoid=True)
    steps, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        scaled = (image * (0.9 + 0.2 * torch.rand(1)) + 0.2 * torch.rand(1) - 0.1)[None]
        optimizer.zero_grad()
        loss_of(network(scaled), truth[None].float()).backward()
        optimizer.step()
        steps += 1
    with torch.no_grad():
        return network.eval()(image[None])[0], f"{steps} steps"


def levels(logits: Tensor, truth: Tensor) -> tuple[float, ...]:
    """0, and the level above which there are as many cells as in the truth, as one would choose it on validation."""
    return 0.0, float(logits.flatten().topk(int(truth.sum()) + 1).values[-1])
