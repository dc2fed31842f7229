"""Our Triton kernels compiled for GPUs, which takes none: they fit on the cards, use tensor cores and wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with the extra [triton], on Linux")

import triton

from monai_memeff.sparse.backends import triton as engine

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sparse_triton_compile.py"

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

CARDS = {"T4": 75, "A100": 80, "RTX 3090, A40": 86, "H100": 90}

Rows = list[dict[str, Any]]

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not all((TOOLS / tool).is_file() for tool in ("ptxas", "cuobjdump")),
        reason="this build of Triton comes without ptxas or cuobjdump",
    ),
]


@pytest.fixture(scope="module")
def compiled() -> Callable[..., Rows]:
    """Rows of the script's table, from a process without the interpreter."""

    def run(capability: int, *arguments: str) -> Rows:
        command = [sys.executable, str(SCRIPT), "--json", "--capabilities", str(capability), *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "UserWarning" not in done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("card", ["RTX 3090, A40", "H100"])
def test_every_dtype_on_tensor_cores(card: str, compiled: Callable[..., Rows]) -> None:
    """The default, the largest and the smallest choice of block sizes."""
    found = compiled(CARDS[card], "--channels", "32", "--choices", "extremes")
    assert len(found) == 24, "two kernels, four dtypes, three choices"
    for row in found:
        assert row["fits"] or row["choice"] > 0, f"the default does not fit: {row}"
        assert row["spills"] == 0, row
        exact = row["dtype"] == "float32"
        assert bool(row["tensor_cores"]) is not exact, row
        assert bool(row["fma"]) is exact, row
        asynchronous = {int(size): number for size, number in row["bytes_copied"].items()}
        assert asynchronous.get(16, 0) > 0, f"features and weights are not copied 16 bytes at a time: {row}"


def test_float32_on_an_a100_has_choices_that_do_not_spill(compiled: Callable[..., Rows]) -> None:
    """Triton 3.9 leaves out a pass for this card: large tiles of the weight gradient spill, and lose when timed."""
    found = compiled(CARDS["A100"], "--channels", "128", "--choices", "extremes", "--dtypes", "float32")
    for kernel in ("gather_multiply", "weight_gradient"):
        assert min(row["spills"] for row in found if row["kernel"] == kernel and row["fits"]) == 0


def test_odd_channels_and_64_bit_addresses(compiled: Callable[..., Rows]) -> None:
    for row in compiled(86, "--channels", "1", "20", "--choices", "default", "--dtypes", "float16", "--wide"):
        assert row["fits"]
        assert row["spills"] == 0
        assert row["tensor_cores"]


def test_what_exceeds_shared_memory_is_refused(compiled: Callable[..., Rows]) -> None:
    """As Triton does on the card, so that the choice of block sizes passes over it; the default is never refused."""
    found = compiled(CARDS["T4"], "--channels", "128", "--choices", "extremes", "--dtypes", "float32")
    assert {row["fits"] for row in found} == {True, False}
    for row in found:
        assert row["fits"] is (row["shared"] <= 64 * 1024)
        assert not row["tensor_cores"]
        if row["choice"] == 0:
            assert row["fits"]
            assert row["spills"] == 0


@pytest.mark.parametrize(("capability", "ours"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)])
def test_half_precisions_need_ampere(capability: tuple[int, int], ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    device = torch.device("cuda")
    assert engine._computes(torch.float32, device)
    assert not engine._computes(torch.float64, device)
    for dtype in engine.HALVES:
        assert engine._computes(dtype, device) is ours
        assert engine._computes(dtype, torch.device("cpu")), "the interpreter"
