"""What a step of the widest completion network cannot take less than, on a CPU: its weights, its pairs, its calls.

    python tests/benchmarks/sparse_bound.py --image vhf_head_ct.nii.gz

CPU milliseconds, the least of several: the step; reading all weights once; writing their gradients once, over memory
that is there and over memory that the system gives first, as it does for each step where the allocator has handed that
of the last step back; the multiplications of all pairs of voxels at the speed of a large product; and the same step of
the narrowest network, which has as many calls and next to no arithmetic. Training reads the weights twice, multiplies
three times and writes gradients once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from sparse_scale_networks import Case, SparseStep, generated, head

from monai_memeff.sparse.backends import native

REPEATS = 20
PRODUCT = 1024
"""Rows and columns of the large product."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="CT, 512 x 512 x at most 256; default a generated skull")
    parser.add_argument("--cells", nargs="+", default=["64x1", "64x2", "128x1"], help="resolution x batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    speed = multiplications_per_ms()
    print("| cell | mode | step | weights read | gradients written | in new memory | pairs | calls | least |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cell in options.cells:
        resolution, batch = map(int, cell.split("x"))
        case = Case(head(options.image, resolution) if options.image else generated(resolution), batch)
        for mode in ("train", "test"):
            print(row(case, mode, speed, cell), flush=True)


def row(case: Case, mode: str, speed: float, cell: str) -> str:
    """One line of the table."""
    wide, narrow = (made(case, channels, mode) for channels in ("ch2", "ch512"))
    weights = sum(parameter.numel() for parameter in wide.net.parameters())
    place, values = torch.zeros(weights), torch.ones(weights)
    read, write, new = least(values.sum), least(lambda: place.copy_(values)), least(lambda: torch.zeros(weights))
    pairs = multiplications(wide) / speed
    calls = least(lambda: step_of(narrow))
    training = mode == "train"
    bound = calls + (2 * read + write + 3 * pairs if training else read + pairs)
    found = [least(lambda: step_of(wide)), read, write if training else 0.0, new if training else 0.0, pairs]
    numbers = [f"{number:.1f}" for number in (*found, calls, bound)]
    return f"| {cell} | {mode} | " + " | ".join(numbers) + " |"


def made(case: Case, channels: str, mode: str) -> SparseStep:
    """A step, run often enough to have loaded what it loads once."""
    torch.manual_seed(0)
    step = SparseStep(case, channels, mode, {"amp": False, "use_checkpoint": False})
    for _ in range(3):
        step_of(step)
    return step


def step_of(step: SparseStep) -> None:
    """A step as in a training: gradients are dropped first."""
    step.net.zero_grad(set_to_none=True)
    step()


def multiplications(step: SparseStep) -> int:
    """Of all pairs of voxels in the convolutions of a forward pass."""
    found, convolve = [0], native.convolve

    def counted(features: Any, weight: Any, bias: Any, geometry: Any) -> Any:
        found[0] += geometry.kernel_map.num_pairs * weight.shape[1] * weight.shape[2]
        return convolve(features, weight, bias, geometry)

    native.convolve = counted
    try:
        step_of(step)
    finally:
        native.convolve = convolve
    return found[0]


def multiplications_per_ms() -> float:
    """Of a large product, by oneDNN where torch has it."""
    a = torch.randn(PRODUCT, PRODUCT)
    with torch.no_grad():
        if native.product.has_onednn():
            return PRODUCT**3 / least(lambda: native.product._onednn(a, a, None))
        return PRODUCT**3 / least(lambda: a @ a)


def least(work: Callable[[], object]) -> float:
    """Milliseconds of CPU time."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
