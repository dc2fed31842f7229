"""Plans the paper's network on 2 ... 256 ranks without owning them: real exchange code counts, a stated model times.

    python tests/benchmarks/halo_scale.py [--side 512] [--latency 5e-6] [--bandwidth 2e11] [--flops 2e14]

Every layer runs on the meta device through the same plans and layouts as on real ranks; a communicator that owns no
neighbor counts messages and bytes of one rank in the middle of the mesh. Peak is that rank's activation bytes in
inference. The time is a MODEL: compute = 2 x multiply-adds / flops, communication = messages x latency + bytes /
bandwidth, reductions at 2 log2(ranks) x latency each, nothing overlapped. It is not a measurement.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from monai_memeff.halo import HaloMesh, VolumeUNet, spatial_partition
from monai_memeff.halo.arithmetic import coordinates, cut
from monai_memeff.halo.pager import Pager, Watch
from monai_memeff.halo.transport import Message, NoCommunicator, Pending

MESHES = ((2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16))


class CountingCommunicator(NoCommunicator):
    """One rank of a mesh whose other ranks do not exist: counts what would be sent, receives nothing in particular."""

    def __init__(self, rank: int, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__(rank, len(shapes))
        self.shapes = shapes

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Count the messages; the buffers asked for come back as they are."""
        self.count(sends)
        buffers = [b for _, b in receives]
        return type("Arrived", (), {"wait": lambda _: buffers})()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the reduction."""
        self.reductions += 1
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The header of every rank: its shape, and this rank's other fields."""
        rest = [1, 1, 1, 0, 0, 0, 0, 0]
        return [torch.tensor([*shape, *rest]) for shape in self.shapes]


def plan_rank(mesh_shape: tuple[int, int], side: int) -> dict[str, Any]:
    """Messages, bytes, peak and multiply-adds of the rank in the middle of a mesh."""
    parts = [cut(side, n, 32) for n in mesh_shape]
    shapes = []
    for rank in range(math.prod(mesh_shape)):
        position = coordinates(rank, mesh_shape)
        shapes.append([*(b[p + 1] - b[p] for b, p in zip(parts, position, strict=True)), side])
    middle = (mesh_shape[0] // 2) * mesh_shape[1] + mesh_shape[1] // 2
    comm = CountingCommunicator(middle, shapes)
    mesh = HaloMesh(mesh_shape, (0, 1), _comms=[comm])
    with torch.device("meta"):
        network = VolumeUNet(dropout=0.0).to(torch.bfloat16).train()
    spatial_partition(network, mesh, multiple=32)
    pager = Pager(None, torch.device("meta"), network.parameters())
    x = torch.empty(1, 1, *shapes[middle], dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Watch(pager):
        network(x)
    return {
        "messages": comm.messages,
        "bytes": comm.sent_bytes,
        "reductions": comm.reductions,
        "peak": pager.peak,
        "flops": flops.get_total_flops(),
    }


def main() -> None:
    """Print one line per mesh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--latency", type=float, default=5e-6, help="seconds per message")
    parser.add_argument("--bandwidth", type=float, default=2e11, help="bytes per second and link")
    parser.add_argument("--flops", type=float, default=2e14, help="operations per second and device")
    options = parser.parse_args()
    print(f"forward pass at {options.side}^3, bfloat16; the last two columns are a model, not a measurement")
    print("mesh     ranks  messages  sent MiB  reductions  peak GiB  TFLOP  compute ms  comm/compute")
    for shape in MESHES:
        if min(shape) and options.side // 32 < max(shape):
            continue
        r, ranks = plan_rank(shape, options.side), math.prod(shape)
        compute = r["flops"] / options.flops
        hops = 2 * math.log2(ranks)
        comm = (r["messages"] + hops * r["reductions"]) * options.latency + r["bytes"] / options.bandwidth
        print(
            f"{shape[0]:>2} x {shape[1]:<3} {ranks:>5} {r['messages']:>9} {r['bytes'] / 2**20:>9.1f} "
            f"{r['reductions']:>11} "
            f"{r['peak'] / 2**30:>9.2f} {r['flops'] / 1e12:>6.2f} {1e3 * compute:>11.2f} {comm / compute:>13.1%}"
        )


if __name__ == "__main__":
    main()
