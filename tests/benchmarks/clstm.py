"""Peak bytes and seconds of a C-LSTM training step and of its inference, against depth and the plain network."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.memory import measure_peak

MODES: dict[str, dict[str, Any]] = {
    "plain": {"checkpoint": None},
    "slice": {"checkpoint": "slice"},
    "sqrt": {"checkpoint": "sqrt"},
    "8 slices": {"checkpoint": 8},
    "slice, half, kept here": {"checkpoint": "slice", "recompute": 0.5},
    "slice, host": {"checkpoint": "slice", "offload_to_cpu": True},
    "slice, half, host": {"checkpoint": "slice", "recompute": 0.5, "offload_to_cpu": True},
}
MIB = 2**20


class _Elsewhere(torch.autograd.Function):
    """A copy in memory that the meter does not count, as host memory is none of the device's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.from_numpy(tensor.detach().numpy().copy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def build(mode: str, channels: list[int]) -> CLSTMUNet:
    """The network; on the CPU, what ``offload_to_cpu=True`` puts away goes where the meter does not look."""
    torch.manual_seed(0)
    net = CLSTMUNet(channels=channels, **MODES[mode])
    if net.offload_to_cpu:
        net._put = _Elsewhere.apply  # type: ignore[method-assign]
        get = net._get
        net._get = lambda *tensors: [t.clone() for t in get(*tensors)]  # type: ignore[method-assign]
    return net


def step(net: CLSTMUNet, x: Tensor, target: Tensor) -> None:
    """Forward, the paper's loss, backward."""
    torch.nn.functional.binary_cross_entropy_with_logits(net(x), target).backward()


def training(mode: str, channels: list[int], size: int, depth: int) -> tuple[int, float]:
    """Peak bytes of a step (the gradients exist already), and CPU-seconds of another."""
    net = build(mode, channels)
    x = torch.rand(1, 1, size, size, depth)
    target = (x > 0.5).float()
    step(net, x[..., :1], target[..., :1])
    gc.collect()
    with measure_peak() as meter:
        step(net, x, target)
    began = time.process_time()
    step(net, x, target)
    return meter.peak_bytes, time.process_time() - began


def slabs(count: int, size: int) -> Iterator[Tensor]:
    """Slabs that are made as they are asked for."""
    return (torch.zeros(1, 1, size, size, 8) for _ in range(count))


def inference(channels: list[int], size: int, depth: int) -> int:
    """Peak bytes of inference over slabs of 8 slices."""
    net = build("slice", channels).eval()
    with measure_peak() as meter:
        for _ in SlabInferer(labels=True, prefetch=0)(slabs(depth // 8, size), net):
            pass
    return meter.peak_bytes


def depth_table(choice: argparse.Namespace) -> None:
    """Rows: modes; columns: depths."""
    size, maps = choice.size, choice.size**2 * 4
    print(f"training step, {size} x {size}, channels {choice.channels}, one state channel; peak in MiB")
    print(f"{'mode':24}" + "".join(f"{d:>9}" for d in choice.depths) + "  maps/slice   s/slice  x plain")
    plain = None
    for mode in choice.modes:
        found = [training(mode, choice.channels, size, d) for d in choice.depths]
        peaks = [p for p, _ in found]
        slope = (peaks[-1] - peaks[0]) / (choice.depths[-1] - choice.depths[0]) / maps
        seconds = found[-1][1] / choice.depths[-1]
        plain = plain or seconds
        row = "".join(f"{p / MIB:9.1f}" for p in peaks)
        print(f"{mode:24}{row}  {slope:10.2f}  {seconds:8.4f}  {seconds / plain:7.2f}", flush=True)
    print("states are 2 maps per slice; logits, their gradient and the loss's own come on top")
    row = "".join(f"{inference(choice.channels, size, d) / MIB:9.1f}" for d in choice.depths)
    print(f"{'inference, slabs of 8':24}{row}", flush=True)


def paper_size(choice: argparse.Namespace) -> None:
    """The published network at small sizes, and the line through them at 512 x 512 x 320."""
    channels = [64, 128, 256, 512, 1024]
    weights = sum(p.numel() for p in CLSTMUNet().parameters()) * 4
    _, plain = training("plain", channels, 192, 2)
    print(f"plain 192 x 192 x 2: {plain:.1f} s", flush=True)
    for mode in ("slice", "slice, half, host", "slice, host"):
        rows, peaks = [], []
        for size, depth in ((192, 2), (192, 4), (256, 2)):  # gradients of two slices are summed beside the old
            peak, seconds = training(mode, channels, size, depth)
            rows.append((1, size**2, size**2 * depth))
            peaks.append(peak)
            print(f"{mode:20} {size} x {size} x {depth}: {peak / MIB:8.1f} MiB, {seconds:6.1f} s", flush=True)
        line, _, _, _ = np.linalg.lstsq(np.array(rows, float), np.array(peaks, float), rcond=None)
        step_bytes = line @ (1, 512**2, 512**2 * 320)
        volume = 2 * 512**2 * 320 * 4
        print(
            f"{mode}: {line[0] / MIB:.1f} MiB + {line[1]:.0f} B per pixel + {line[2]:.2f} B per voxel, from three "
            f"sizes; 512 x 512 x 320: {step_bytes / 1e9:.2f} GB in the step, {3 * weights / 1e9:.2f} GB of "
            f"weights, gradients and RMSprop, {volume / 1e9:.2f} GB of image and target: "
            f"{(step_bytes + 3 * weights + volume) / 1e9:.2f} GB"
        )


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """The best processor time of several runs after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def ways_of(net: torch.nn.Module, compiled: bool) -> dict[str, Callable[[Tensor], Any]]:
    """Ways to run the U-Net on one slice."""
    last = torch.channels_last

    def plain(x: Tensor) -> Tensor:
        return net.to(memory_format=torch.contiguous_format)(x)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(x)

    ways: dict[str, Callable[[Tensor], Any]] = {
        "as it is": plain,
        "channels_last": lambda x: net.to(memory_format=last)(x.to(memory_format=last)),
        "autocast to bfloat16": autocast,
        "both": lambda x: autocast_last(net, x),
    }
    if compiled:
        ways["compiled"] = torch.compile(net)
    return ways


def autocast_last(net: torch.nn.Module, x: Tensor) -> Tensor:
    """bfloat16 and channels_last."""
    with torch.autocast("cpu", torch.bfloat16):
        return net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))


def variants(choice: argparse.Namespace) -> None:
    """Memory format, autocast, compilation and batching of the U-Net alone."""
    for channels in (choice.channels, [64, 128, 256, 512, 1024]):
        net, x = CLSTMUNet(channels=channels).unet.eval(), torch.rand(1, 1, 128, 128)
        several = x.expand(4, -1, -1, -1).contiguous()
        with torch.no_grad():
            for name, way in ways_of(net, choice.compile).items():
                print(f"{channels[0]:3} channels, {name}: {seconds(partial(way, x)):.4f} s", flush=True)
            net.to(memory_format=torch.contiguous_format)
            print(f"{channels[0]:3} channels, of four together: {seconds(partial(net, several)) / 4:.4f} s", flush=True)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=["depth"], help="depth, paper, variants")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 80, 320])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    choice = parser.parse_args()
    torch.set_num_threads(choice.threads)
    for table in choice.tables:
        {"depth": depth_table, "paper": paper_size, "variants": variants}[table](choice)


if __name__ == "__main__":
    main()
