"""Launches of several gloo processes: ``python -m tests.nnunet_plugins.halo_ranks FOLDER LAUNCH...``.

A launch is ``stock:2``, stock's DDP in two processes, or ``halo:4:2``, HaloTrainer in four of which two share a patch.
The processes are forked, so that the libraries are loaded once. Each writes a file LAUNCH-KIND-RANK.pkl of what
:func:`tests.nnunet_plugins.test_halo_trainer.steps` gives.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module  # noqa: N813 - the module, whose DDP is replaced
from torch.nn.parallel import DistributedDataParallel

from nnunet_plugins import HaloTrainer
from tests.nnunet_plugins import test_halo_trainer as shared


class StockOnCPU(module.nnUNetTrainer):
    """Stock's trainer with its DDP, which wants GPUs only in that it names them."""

    def initialize(self) -> None:
        """As stock, on the CPU."""
        self.device, self.grad_scaler = torch.device("cpu"), None
        super().initialize()


def trainer_class(launch: str) -> tuple[type, int]:
    """The trainer of a launch, and how many processes share a patch."""
    if launch.startswith("stock"):
        return StockOnCPU, 1
    parts = int(launch.split(":")[2])
    return type("PartsTrainer", (HaloTrainer,), {"processes_per_patch": parts}), parts


def trained(launch: str, rank: int, world: int, folder: Path) -> None:
    """What one process does."""
    torch.set_num_threads(1)  # the first thread of a fork makes torch's pool anew; two at once may find none and abort
    dist.init_process_group("gloo", init_method=f"file://{folder}/{launch}", rank=rank, world_size=world)
    module.DDP = lambda network, device_ids: DistributedDataParallel(network.double())
    which, parts = trainer_class(launch)

    def batch(*all: Any) -> Any:
        return shared.batch_of(*all, group=rank // parts) if rank % parts == 0 else None  # a group's first loads

    for kind in shared.LAUNCHES[launch]:
        trainer = shared.trainer_of(kind, which, folder)
        found = shared.steps(trainer, kind, batch=batch)
        found |= {"batch_size": trainer.batch_size, "oversample": trainer.oversample_foreground_percent}
        name = folder / f"{launch}-{kind}-{rank}"
        trainer.save_checkpoint(f"{name}.pth")
        name.with_suffix(".pkl").write_bytes(pickle.dumps(found | {"wrote": name.with_suffix(".pth").exists()}))
        if launch.startswith("halo"):  # stock's loading wants a GPU for each process
            dist.barrier()
            load_pretrained_weights(trainer.network, f"{folder / launch}-{kind}-0.pth")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for launch in sys.argv[2:]:
        world = int(launch.split(":")[1])
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=trained, args=(launch, r, world, Path(sys.argv[1]))) for r in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(200)
        for process in processes:
            process.kill()
        assert all(process.exitcode == 0 for process in processes), launch
