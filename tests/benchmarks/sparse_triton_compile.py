"""What Triton's compiler makes of our kernels for GPUs that need not be there: registers, spills, shared memory, PTX.

    python tests/benchmarks/sparse_triton_compile.py                               # every choice of block sizes
    python tests/benchmarks/sparse_triton_compile.py --capabilities 86 --channels 20 --dtypes tf32 --choices default
    python tests/benchmarks/sparse_triton_compile.py --json                        # one object per line

The kernels are launched by our own code with tensors on the CPU, so arguments are specialized as on a GPU; a stand-in
for the driver names a target, receives the binary and starts nothing. What exceeds the shared memory of the card is
refused by Triton as it is there, which makes the choice of block sizes pass it over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from monai_memeff.sparse.backends.triton import kernels, launch, tuning
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from monai_memeff.sparse.core.neighbors import KernelShape
from monai_memeff.sparse.core.voxel_set import VoxelSet

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability, ten times -> KiB of shared memory that one program may have (CUDA C++ Programming Guide)."""

DTYPES = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
}
KERNELS = ("gather_multiply", "weight_gradient")
CHOICES = ("all", "extremes", "default")


class Card(DriverBase):
    """A GPU of some compute capability, as far as Triton's launcher asks: it is its own ``utils`` and its launcher."""

    def __init__(self, capability: int) -> None:
        self.capability, self.utils = capability, self
        self.launcher_cls = lambda _source, _metadata: lambda *_arguments: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.capability] * 1024}

    def load_binary(self, *_binary: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, the most threads

    def unload_module(self, _module: int) -> None: ...

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def main() -> None:
    """Parse the command line, compile, print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, default=[75, 80, 86, 90], choices=list(SHARED_MEMORY))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--channels", nargs="+", type=int, default=[3, 20, 32, 64, 128])
    parser.add_argument("--choices", default="all", choices=CHOICES, help="extremes: the default, largest and smallest")
    parser.add_argument("--wide", action="store_true", help="64-bit addresses")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    options = parser.parse_args()
    launch.INT32_ELEMENTS = -1 if options.wide else launch.INT32_ELEMENTS
    cases = itertools.product(options.capabilities, options.dtypes, options.channels, KERNELS)
    with tempfile.TemporaryDirectory() as cache:  # nothing compiled before is found again
        os.environ["TRITON_CACHE_DIR"] = cache
        for capability, dtype, channels, kernel in cases:
            for number, blocks in _chosen(options.choices, channels, DTYPES[dtype][0]):
                row = {"capability": capability, "dtype": dtype, "channels": channels, "kernel": kernel}
                row |= {"choice": number, "blocks": list(vars(blocks).values())}
                row |= _compile(kernel, Card(capability), channels, *DTYPES[dtype], blocks)
                text = json.dumps(row) if options.json else "  ".join(f"{name} {value}" for name, value in row.items())
                print(text, flush=True)


def _chosen(choices: str, channels: int, dtype: torch.dtype) -> list[tuple[int, tuning.Blocks]]:
    """The candidates to compile, with their numbers; the first is the default."""
    found = list(enumerate(tuning.candidates(channels, channels, dtype)))
    if choices == "all":
        return found
    by_size = sorted(found[1:], key=lambda one: math.prod(vars(one[1]).values()))
    return found[:1] if choices == "default" else [found[0], by_size[-1], by_size[0]]


def _geometry() -> ConvolutionGeometry:
    every_third = VoxelSet(torch.arange(0, 8**3, 3), (8, 8, 8), 1)
    return ConvolutionGeometry(every_third, every_third, KernelShape((3, 3, 3), padding=(1, 1, 1)))


GEOMETRY = _geometry()


def _compile(
    name: str, card: Card, channels: int, dtype: torch.dtype, precision: str, blocks: tuning.Blocks
) -> dict[str, Any]:
    """Launch one kernel on a card, with weights as our layers hold them, and look at what was compiled."""
    triton.runtime.driver.set_active(card)
    launch._precision = lambda _dtype: precision
    tuning.choose = lambda *_arguments, **_named: blocks
    kernel_map = GEOMETRY.kernel_map
    features = torch.zeros(kernel_map.num_in, channels, dtype=dtype)
    weight = torch.zeros(channels, channels, kernel_map.num_offsets, dtype=dtype).permute(2, 1, 0)
    fits = True
    try:
        if name == "weight_gradient":
            launch.weight_gradient(features, features, kernel_map)
        else:
            launch.multiply(features, weight, features[0], kernel_map)
    except triton.runtime.errors.OutOfResources:
        fits = False
    compiled = list(getattr(kernels, name).device_caches[card.capability][0].values())[-1]
    return {"fits": fits, "shared": compiled.metadata.shared} | _instructions(compiled.asm)


def _instructions(asm: dict[str, Any]) -> dict[str, Any]:
    """Registers and stack from the binary; products, loads and asynchronous copies from the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    tensor_cores = re.findall(r"\b((?:wgmma\.mma_async|tcgen05\.mma|mma)\.[\w.:]+)", asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\],\s*\[.*?\],\s*(\w+)", asm["ptx"])
    loads = re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", asm["ptx"])
    return {
        "registers": int(registers),
        "spills": int(stack),
        "tensor_cores": ",".join(sorted(set(tensor_cores))),
        "fma": len(re.findall(r"fma\.rn\.f32", asm["ptx"])),
        "bytes_copied": _counts(int(size, 0) for size in copies),
        "bytes_loaded": _counts(int(lanes or 1) * int(bits) // 8 for lanes, bits in loads),
    }


def _counts(sizes: Any) -> dict[int, int]:
    """Bytes of one thread's access -> how many such instructions."""
    found: dict[int, int] = {}
    for size in sizes:
        found[size] = found.get(size, 0) + 1
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
