"""HaloTrainer against the stock trainer: losses, gradients, weights after steps, and checkpoints both ways."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_plugins import HaloTrainer
from nnunet_plugins.lean.trial import TrialModel

ROOT = Path(__file__).parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "labels": {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}, "patch": (16, 20, 12)},
    "regions": {"labels": {"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": (1, 2)},
    "flat": {"labels": {"background": 0, "a": 1, "b": 2}, "patch": (16, 24)},
}


def trainer_of(kind: str, which: type, folder: Path) -> Any:
    """A trainer, initialized, whose weights depend on the seed alone."""
    (folder / "Dataset999_Trial" / "trial").mkdir(parents=True, exist_ok=True)
    (folder / "Dataset999_Trial" / "trial" / "a.b2nd").touch()
    model = TrialModel(**{"patch": (16, 20, 12), "features": (4, 6, 6), **KINDS[kind]})
    plans = model.plans() | {"continue_training": False}
    configuration = plans["configurations"][model.configuration]
    configuration |= {"data_identifier": "trial", "batch_size": 2, "batch_dice": kind == "flat"}
    torch.manual_seed(0)
    trainer = which(plans, model.configuration, 0, model.dataset(), torch.device("cpu"))
    trainer.initialize()
    trainer.network.double()
    return trainer


def batch_of(trainer: Any, kind: str, seed: int = 0) -> dict[str, Any]:
    """A batch as nnU-Net's loaders make it."""
    rng = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    data = torch.randn(2, 1, *patch, generator=rng, dtype=torch.float64)
    targets = []
    for scale in trainer._get_deep_supervision_scales():
        size = [round(extent * factor) for extent, factor in zip(patch, scale, strict=True)]
        if kind == "regions":
            targets.append(torch.randint(0, 2, (2, 3, *size), generator=rng).bool())
        else:
            labels = 3 if kind == "flat" else 4
            targets.append(torch.randint(0, labels, (2, 1, *size), generator=rng).to(torch.int16))
    return {"data": data, "target": targets, "keys": ["a", "b"]}


def steps(trainer: Any, kind: str, count: int = 2) -> dict[str, Any]:
    """Losses, the gradients of the last step, and a validation step's result."""
    losses = [float(trainer.train_step(batch_of(trainer, kind, seed))["loss"]) for seed in range(count)]
    gradients = {n: p.grad.numpy().copy() for n, p in trainer.network.named_parameters() if p.grad is not None}
    trainer.network.eval()
    with torch.no_grad():
        validation = trainer.validation_step(batch_of(trainer, kind, 9))
    trainer.network.train()
    return {"losses": losses, "gradients": gradients, "validation": validation}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses and gradients within 1e-6, the same voxels counted."""
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        np.testing.assert_allclose(found["gradients"][name], gradient, rtol=0, atol=1e-6, err_msg=name)
    for name, value in expected["validation"].items():
        np.testing.assert_allclose(found["validation"][name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.slow
def test_one_process_trains_as_stock(kind: str, folder: Path) -> None:
    stock = steps(trainer_of(kind, nnUNetTrainer, folder), kind)
    assert_same(steps(trainer_of(kind, HaloTrainer, folder), kind), stock)
    assert max(abs(gradient).max() for gradient in stock["gradients"].values()) > 1e-3


@pytest.mark.slow
def test_a_checkpoint_travels_from_stock_to_halo_and_back(folder: Path) -> None:
    kind = "labels"
    first = trainer_of(kind, nnUNetTrainer, folder)
    first.train_step(batch_of(first, kind, 3))
    first.save_checkpoint(str(folder / "stock.pth"))
    halo = trainer_of(kind, HaloTrainer, folder)
    halo.load_checkpoint(str(folder / "stock.pth"))
    halo.train_step(batch_of(halo, kind, 4))
    halo.save_checkpoint(str(folder / "halo.pth"))
    assert torch.load(folder / "halo.pth", weights_only=False)["trainer_name"] == "nnUNetTrainer"
    again = trainer_of(kind, nnUNetTrainer, folder)
    again.load_checkpoint(str(folder / "halo.pth"))
    first.train_step(batch_of(first, kind, 4))  # what stock alone would have done
    for name, value in first.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, rtol=0, atol=1e-7)
    momentum = again.optimizer.state_dict()["state"][0]["momentum_buffer"]
    torch.testing.assert_close(momentum, first.optimizer.state_dict()["state"][0]["momentum_buffer"], rtol=0, atol=1e-6)


def test_settings_that_are_refused(folder: Path) -> None:
    for settings, words in (({"segment": 2}, "unknown setting 'segment'"), ({"segments": 0}, "must be a positive")):
        plans = TrialModel({"background": 0, "a": 1}).plans() | {"continue_training": False}
        plans["configurations"]["3d_fullres"]["halo_trainer"] = settings
        with pytest.raises(ValueError, match=words):
            HaloTrainer(plans, "3d_fullres", 0, {}, torch.device("cpu"))


WORKER = """
import pickle, sys, torch
import torch.distributed as dist
from pathlib import Path
from nnunet_plugins import HaloTrainer
from tests.nnunet_plugins import test_halo_trainer as shared

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
build = shared.batch_of
shared.batch_of = lambda *all: build(*all) if rank == 0 else None
for kind in shared.KINDS:
    trainer = shared.trainer_of(kind, HaloTrainer, folder)
    assert trainer.is_ddp and trainer.mesh.size == 2
    (folder / f"{kind}{rank}.pkl").write_bytes(pickle.dumps(shared.steps(trainer, kind)))
    trainer.save_checkpoint(str(folder / f"{kind}{rank}.pth"))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.long
def test_two_processes_share_a_patch(folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", WORKER, str(folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], env=env, cwd=ROOT, **pipes) for rank in range(2)]
    try:
        printed = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-2500:] for text in printed)
    for kind in KINDS:
        stock = steps(trainer_of(kind, nnUNetTrainer, folder), kind)
        for rank in range(2):
            assert_same(pickle.loads((folder / f"{kind}{rank}.pkl").read_bytes()), stock)
        assert (folder / f"{kind}0.pth").exists()
        assert not (folder / f"{kind}1.pth").exists()  # the first process writes
