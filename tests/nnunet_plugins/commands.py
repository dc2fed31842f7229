"""nnU-Net's console scripts one after the other in this process: ``python -m tests.nnunet_plugins.commands JSON``.

The JSON is a list of commands, each a list of words. Those with ``-device cuda`` get a fake CUDA device. A word
``env:NAME=VALUE`` sets a variable from then on; the word ``fails`` says that the command must raise an error, which is
printed; ``python FILE`` runs a script; ``ranks:N`` runs the command in N forked processes that meet as torchrun's do.
Our start-up file runs as when Python starts. nnU-Net's worker processes are forked, unless there is a GPU, so that they
need not import everything again; and a fingerprint draws ten thousand intensities, not a hundred million whatever the
size of the images.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch

from tests.fake_cuda import fake_cuda_device


def run(command: list[str], scripts: dict[str, Any]) -> None:
    """Run one command's entry point."""
    os.environ.update(word[4:].split("=", 1) for word in command if word.startswith("env:"))
    fails = "fails" in command
    sys.argv = [word for word in command if word != "fails" and not word.startswith(("env:", "ranks:"))]
    for word in command:
        if word.startswith("ranks:"):
            return run_ranks([other for other in command if other != word], int(word[6:]), scripts)
    try:
        with fake_cuda_device() if "cuda" in command else contextlib.nullcontext():
            if sys.argv[0] == "python":
                del sys.argv[0]
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                scripts[sys.argv[0]].load()()
    except Exception as error:
        if not fails:
            raise
        print("FAILED WITH", type(error).__name__, error)
    else:
        assert not fails, command


def run_ranks(command: list[str], count: int, scripts: dict[str, Any]) -> None:
    """Run one command in forked processes that torch.distributed lets meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}

    def begin(rank: int) -> None:
        torch.set_num_threads(1)  # as in halo_ranks
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
        run(command, scripts)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=begin, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes), command


def draw_few_intensities() -> None:
    """For statistics of images of a few thousand voxels."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    start = DatasetFingerprintExtractor.__init__

    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        self.num_foreground_voxels_for_intensitystats = 10_000

    DatasetFingerprintExtractor.__init__ = begin


if __name__ == "__main__":
    import_module("nnunet_plugins._startup._monai_memeff_nnunet").register()
    draw_few_intensities()
    torch.set_num_interop_threads = lambda _: None  # can be set once in a process
    if not torch.cuda.is_available():
        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.cpu_count = lambda: 1  # nnU-Net's number of threads; a forked process waits for lost ones
        get_context = multiprocessing.get_context
        multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
    for words in json.loads(sys.argv[1]):
        run(words, {script.name: script for script in entry_points(group="console_scripts")})
