"""What every test may rely on: fixed seeds, exact float32, a chosen number of threads, and the folder of real data."""

from __future__ import annotations

import os

# One thread in every process, also those that tests start: several processes with several threads each wait for each
# other. Set before torch is loaded; the fixture `threads` asks for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import gc
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.fake_cuda import fake_cuda_device

# Property-based tests try the same examples every time, and keep none of them on disk.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# Triton's interpreter stands in for a GPU. It is chosen when Triton is loaded, which many a test causes.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long and exhaustive tests are slow too. Files with slow tests come first, so that no process waits for a last."""
    for item in items:
        if item.get_closest_marker("exhaustive") or item.get_closest_marker("long"):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    random.seed(0)
    np.random.seed(0)  # libraries under test draw from numpy's global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Float32 means float32 on a GPU too. Setting the flags does not start CUDA."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(2)`` sets torch's number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Memory that only the garbage collector would free counts, and nothing of earlier tests dies during this one."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A GPU: the machine's, else a fake one."""
    with contextlib.nullcontext() if torch.cuda.is_available() else fake_cuda_device():
        yield torch.device("cuda")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images: ``MEMEFF_DATA``, or ``shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MEMEFF_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MEMEFF_DATA to the folder that holds it")
    return folder
