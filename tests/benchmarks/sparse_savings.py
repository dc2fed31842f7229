"""What two savings of sparse networks are worth, each beside the plain way in the same run.

    python tests/benchmarks/sparse_savings.py              # a generated skull; a minute

1. Norm and activation fused: a training step of SparseUNet beside the same network with its layers one by one.
2. Border Dice measured around the implants: beside distances in the whole volume.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from monai.networks.blocks import ADN
from monai.transforms.utils import distance_transform_edt
from process_memory import peak_resident_bytes
from sparse_scale_networks import generated
from torch import Tensor

from monai_memeff.apps.skull.metrics import compute_border_dice, compute_implant_dice
from monai_memeff.memory import measure_peak
from monai_memeff.sparse import SparseTensor, SparseUNet


def main() -> None:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256, help="of the skull, r x r x r / 2")
    parser.add_argument("--occupancy", type=float, default=0.02)
    options = parser.parse_args()
    torch.manual_seed(0)
    skull = generated(options.resolution, options.occupancy)
    print("| what | ours | plain | ratio |\n|---|---|---|---|")
    unet_step(skull)
    border(skull)


def unet_step(skull: Tensor) -> None:
    """Live tensors and CPU time of a training step, MONAI's blocks fused and layer by layer."""
    x = SparseTensor.from_dense(torch.randn(1, 1, *skull.shape), skull[None, None])
    net = SparseUNet(3, 1, 2, (16, 32, 64, 64), (1, 2, 2))

    def step() -> None:
        net.zero_grad(set_to_none=True)
        net(x).features.square().mean().backward()

    blocks = [module for module in net.modules() if isinstance(module, ADN)]
    peaks, times = [], []
    for kind in (type(blocks[0]), ADN):
        for block in blocks:
            block.__class__ = kind
        step()
        with measure_peak() as meter:
            step()
        peaks.append(meter.peak_bytes)
        times.append(min(cpu_seconds(step) for _ in range(3)))
    show(f"SparseUNet, training step of {len(x)} voxels, live tensors in MB", [peak / 1e6 for peak in peaks])
    show("the same, CPU-seconds", times)


def border(skull: Tensor) -> None:
    """CPU time and process memory of border Dice; the implant is an eighth of the skull along every axis."""
    truth = torch.zeros_like(skull)
    corner = tuple(slice(extent // 2, extent // 2 + extent // 8) for extent in skull.shape[:2])
    truth[corner] = skull[corner]
    defective = skull & ~truth
    masks = [mask[None, None] for mask in (truth.roll(1, 0) & ~defective, truth, defective)]
    ways: list[Callable[..., Tensor]] = [compute_border_dice, in_the_whole_volume]
    found: list[float] = []
    times: list[float] = []
    peaks = [
        peak_resident_bytes(lambda way=way: times.append(cpu_seconds(lambda: found.append(float(way(*masks))))))
        for way in ways
    ]
    assert found[0] == found[1], found
    show(f"border Dice {found[0]:.3f} at {tuple(skull.shape)}, CPU-seconds", times)
    show("the same, MB by which the process grew", [peak / 1e6 for peak in peaks])


def in_the_whole_volume(pred: Tensor, truth: Tensor, skull: Tensor) -> Tensor:
    """Border Dice by its definition, 1 mm voxels and 10 mm."""
    near = torch.as_tensor(distance_transform_edt(~skull[0]))[None] <= 10
    return compute_implant_dice(pred & near, truth & near)


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def show(what: str, values: list[float]) -> None:
    """One row of the table."""
    print(f"| {what} | {values[0]:.2f} | {values[1]:.2f} | {values[0] / values[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
