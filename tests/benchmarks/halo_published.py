"""Bytes of a training step of the published network of the halo engine on whole volumes, counted without memory.

    python tests/benchmarks/halo_published.py                # edges 256, 384 and 512, activations kept and recomputed

The step of `gpu_day.py --sections hou` in bfloat16, by the rules of the CPU, where a mask of dropout is as large as its
input. Workspace of convolutions is not counted.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from monai_memeff.halo import VolumeUNet
from monai_memeff.memory.dry import DryRun, dry_run


def counted(edge: int, again: bool) -> DryRun:
    """A step at one edge."""
    network = VolumeUNet(use_checkpoint=again)

    def step(volume: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(volume)
        logits.float().mean().backward()

    return dry_run(network, (1, 1, edge, edge, edge), torch.float32, step, True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", nargs="+", type=int, default=[256, 384, 512])
    print("| edge | kept, GiB | recomputed, GiB | multiplications, recomputed to kept |\n|---|---|---|---|")
    for edge in parser.parse_args().edges:
        kept, again = (counted(edge, again) for again in (False, True))
        ratio = again.multiplications / kept.multiplications
        print(f"| {edge} | {kept.peak_bytes / 2**30:.1f} | {again.peak_bytes / 2**30:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
