"""Plans the paper's network on 2 ... 256 ranks without owning them: real exchange code counts, a stated model times.

    python tests/benchmarks/halo_scale.py [--side 512] [--latency 5e-6] [--bandwidth 2e11] [--flops 2e14]

The network is captured once at the whole shape; the plan of one rank in the middle of the mesh then runs on the meta
device with a communicator that owns no neighbor and counts messages and bytes. Peak is that rank's activation bytes in
inference. The time is a MODEL: compute = 2 x multiply-adds / flops, communication = messages x latency + bytes /
bandwidth, reductions at 2 log2(ranks) x latency each, nothing overlapped. It is not a measurement.
"""

from __future__ import annotations

import argparse
import math
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from monai_memeff.halo import HaloMesh, VolumeUNet
from monai_memeff.halo.planning.capture import capture
from monai_memeff.halo.planning.program import Program
from monai_memeff.halo.run.ranks.comm.transport import Counters, Message
from monai_memeff.halo.run.ranks.schedule import RankPlan
from monai_memeff.halo.run.ranks.volume import part_of_volume

MESHES = ((2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16))


class Live(TorchDispatchMode):
    """Bytes of the tensors alive on the meta device, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                self._hold(storage._cdata, storage.nbytes(), 1)
                weakref.finalize(tensor, self._hold, storage._cdata, storage.nbytes(), -1)
        return found

    def _hold(self, key: int, size: int, change: int) -> None:
        before = self._holders[key] > 0
        self._holders[key] += change
        self._now += size * ((self._holders[key] > 0) - before)
        self.peak = max(self.peak, self._now)


class CountingCommunicator(Counters):
    """One rank of a mesh whose other ranks do not exist: counts what would be sent, receives nothing in particular."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Any:
        """Count the messages; the buffers come back as they are."""
        self.count(sends)
        buffers = [b for _, b in receives]
        return type("Arrived", (), {"wait": lambda _: buffers})()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the reduction."""
        self.reductions += 1
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Count the gathering."""
        self.reductions += 1
        return [tensor] * self.size


def plan_rank(program: Program, network: torch.nn.Module, mesh_shape: tuple[int, int], side: int) -> dict[str, Any]:
    """Messages, bytes, peak and multiply-adds of the rank in the middle of a mesh."""
    middle = (mesh_shape[0] // 2) * mesh_shape[1] + mesh_shape[1] // 2
    comm = CountingCommunicator(middle, math.prod(mesh_shape))
    mesh = HaloMesh(mesh_shape, (0, 1), comm)
    part = part_of_volume((1, 1, side, side, side), mesh)
    plan = RankPlan(program, mesh, [part])
    x = torch.empty(part.local(mesh.position), dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Live() as live:
        plan.run(network, [x], 1)
    return {
        "messages": comm.messages,
        "bytes": comm.sent_bytes,
        "reductions": comm.reductions,
        "peak": live.peak,
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
    with torch.device("meta"):
        network = VolumeUNet(dropout=0.0).to(torch.bfloat16).train()
    side = options.side
    program = capture(network, (torch.empty(1, 1, side, side, side, dtype=torch.bfloat16, device="meta"),))
    for shape in MESHES:
        if min(shape) and options.side // 32 < max(shape):
            continue
        r, ranks = plan_rank(program, network, shape, side), math.prod(shape)
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
