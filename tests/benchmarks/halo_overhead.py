"""What partitioning costs: a training step in parts against DDP at equal local volume, and the streaming table.

    torchrun --nproc_per_node 2 tests/benchmarks/halo_overhead.py step [--sides 64 96 128] [--repeats 10]
        [--kernels own torch]
    python tests/benchmarks/halo_overhead.py stream [--side 128] [--partitions 2 4 8 16]

`step`: each process holds a cube of the given side; "ddp" trains two independent cubes with gradient averaging,
"halo" one volume of twice the length. Steps alternate in the same processes; medians of paired ratios of CPU-seconds
and of wall time, the time spent waiting in communication, and the bytes one rank sends are printed. With
`--kernels torch` convolutions in parts leave the choice of the kernel to torch, as DDP does: partitioning alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from monai_memeff.halo import HaloMesh, SpatialPartitionInferer, destroy_mesh, init_from_torchrun, parallelize
from monai_memeff.halo.inferer import whole_peak_bytes
from monai_memeff.halo.planning.rules.windowed import kernels
from monai_memeff.halo.run.ranks.comm import process_group


def network(width: int, deep: bool) -> nn.Module:
    """An nnU-Net network of four stages."""
    return PlainConvUNet(
        1, 4, [width * 2**i for i in range(4)], nn.Conv3d, 3, [1, 2, 2, 2], 2, num_classes=3,
        n_conv_per_stage_decoder=2, conv_bias=True, norm_op=nn.InstanceNorm3d, nonlin=nn.LeakyReLU,
        norm_op_kwargs={"affine": True, "eps": 1e-5}, nonlin_kwargs={"inplace": True}, deep_supervision=deep,
    )  # fmt: skip


class Waiting:
    """Adds up the wall time spent in the communicator's blocking calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        kind = process_group.ProcessGroupCommunicator
        kind.all_reduce = self._timed(kind.all_reduce)  # type: ignore[method-assign]
        kind.all_gather = self._timed(kind.all_gather)  # type: ignore[method-assign]
        process_group._Works.wait = self._timed(process_group._Works.wait)  # type: ignore[method-assign]

    def _timed(self, call: Any) -> Any:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            result = call(*args)
            self.seconds += time.perf_counter() - began
            return result

        return run


def one_step(model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """CPU-seconds and wall seconds of forward and backward."""
    cpu, wall = time.process_time(), time.perf_counter()
    model.zero_grad()
    sum(o.square().mean() for o in model(x)).backward()
    return time.process_time() - cpu, time.perf_counter() - wall


@contextlib.contextmanager
def choosing(kernel: str) -> Iterator[None]:
    """Convolutions in parts take the package's kernels ("own") or leave the choice to torch."""
    own = kernels._direct
    kernels._direct = own if kernel == "own" else lambda x, weight: False
    try:
        yield
    finally:
        kernels._direct = own


def steps(sides: list[int], repeats: int, width: int, chosen: list[str]) -> None:
    """Print one line per side and choice of kernels."""
    mesh = init_from_torchrun(1, (2,))
    waiting = Waiting()
    for side in sides:
        plain = network(width, True)
        models = {"ddp": DistributedDataParallel(copy.deepcopy(plain)), "halo": parallelize(plain, mesh)}
        for kernel in chosen:
            with choosing(kernel):
                found = compare(models, torch.randn(1, 1, side, side, side), mesh, waiting, repeats)
            if dist.get_rank() == 0:
                print(f"side {side}, {kernel} kernels: {found}", flush=True)
    destroy_mesh()


def compare(models: dict[str, nn.Module], x: torch.Tensor, mesh: HaloMesh, waiting: Waiting, repeats: int) -> str:
    """The ratios of this rank's alternating steps, in words."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    sent, waited = 0, 0.0
    for repeat in range(repeats + 1):
        for name in sorted(models, reverse=bool(repeat % 2)):
            dist.barrier()
            before = mesh.comm.sent_bytes, waiting.seconds
            result = one_step(models[name], x)
            if name == "halo":
                sent = mesh.comm.sent_bytes - before[0]
            if repeat:
                times[name].append(result)
                waited += waiting.seconds - before[1] if name == "halo" else 0.0
    pairs = list(zip(times["halo"], times["ddp"], strict=True))
    cpu, wall = (statistics.median(h[i] / d[i] for h, d in pairs) for i in (0, 1))
    alone = statistics.median(d[1] for _, d in pairs)
    return (
        f"CPU x{cpu:.3f}, wall x{wall:.3f} (ddp {alone:.2f} s), "
        f"exposed wait {waited / repeats:.3f} s/step, sent {sent / 2**20:.2f} MiB"
    )


def stream(side: int, partitions: list[int], width: int, store: str, repeats: int) -> None:
    """Print peak, traffic and time of whole-volume inference by number of partitions, each paired with the whole."""
    model, x = network(width, False).eval(), torch.randn(1, 1, side, side, side)
    print(f"whole: {whole_peak_bytes(model, x.shape, x.dtype) / 2**20:.0f} MiB")
    for parts in partitions:
        inferer = SpatialPartitionInferer(parts, store=store)
        pairs = []
        for _ in range(repeats):
            whole, *alone = timed(model, x)
            streamed, *inside = timed(lambda v: inferer(v, model), x)  # noqa: B023
            pairs.append([*alone, *inside])
        error = float((streamed - whole).abs().max())
        cpu, wall = (statistics.median(p[i + 2] / p[i] for p in pairs) for i in (0, 1))
        r = inferer.last_report
        assert r is not None
        print(
            f"{parts:>3} partitions: {r.device_peak_bytes / 2**20:.0f} MiB, moved {r.moved_bytes / 1e9:.2f} GB, "
            f"CPU x{cpu:.2f}, wall x{wall:.2f} ({r.seconds:.2f} s), largest difference {error:.1e}",
            flush=True,
        )


@torch.no_grad()
def timed(call: Any, x: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Output, CPU-seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    y = call(x)
    return y, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Run one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["step", "stream"])
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--kernels", choices=["own", "torch"], nargs="+", default=["own"])
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--partitions", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--store", default="host")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.table == "step":
        torch.set_num_threads(1)
        steps(options.sides, options.repeats, options.width, options.kernels)
    else:
        stream(options.side, options.partitions, options.width, options.store, options.repeats)


if __name__ == "__main__":
    main()
