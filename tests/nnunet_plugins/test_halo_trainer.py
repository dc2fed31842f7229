"""HaloTrainer against the stock trainer: losses, gradients, weights after steps, and checkpoints both ways."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerTopkLoss import nnUNetTrainerDiceTopK10Loss
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN

from nnunet_plugins import HaloTrainer
from nnunet_plugins.lean.trial import TrialModel
from nnunet_plugins.training.halo_groups import as_processes, refuse_batch, refuse_batch_norm
from tests.processes import run_module

ROOT = Path(__file__).parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "labels": {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}, "patch": (16, 20, 12)},
    "regions": {"labels": {"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": (1, 2)},
    "flat": {"labels": {"background": 0, "a": 1, "b": 2}, "patch": (16, 24)},
    "top-k and batch norm": {"labels": {"background": 0, "a": 1, "b": 2}, "patch": (16, 24)},
}
VARIANTS = {"top-k and batch norm": (nnUNetTrainerDiceTopK10Loss, nnUNetTrainerBN)}
"""Trainers of nnU-Net that a kind is trained with: a loss that is no sum over voxels, and another norm."""
LAUNCHES = {
    "halo:2:2": KINDS,
    "stock:2": ["labels", "regions", "flat"],
    "halo:4:2": ["labels", "flat"],
    "halo:2:1": ["regions"],
}
"""Kinds that a launch of processes trains; see :mod:`tests.nnunet_plugins.halo_ranks`."""


def trainer_of(kind: str, which: type, folder: Path) -> Any:
    """A trainer, initialized, whose weights depend on the seed alone."""
    (folder / "Dataset999_Trial" / "trial").mkdir(parents=True, exist_ok=True)
    (folder / "Dataset999_Trial" / "trial" / "a.b2nd").touch()
    model = TrialModel(**{"patch": (16, 20, 12), "features": (4, 6, 6), **KINDS[kind]})
    plans = model.plans() | {"continue_training": False}
    configuration = plans["configurations"][model.configuration]
    configuration |= {"data_identifier": "trial"}
    configuration |= (
        {"batch_size": 3, "batch_dice": False} if kind == "labels" else {"batch_size": 2, "batch_dice": True}
    )
    torch.manual_seed(0)
    if kind in VARIANTS:
        own = () if which is nnUNetTrainer else (which,)
        which = type(which.__name__, (*own, *VARIANTS[kind]), {})
    trainer = which(plans, model.configuration, 0, model.dataset(), torch.device("cpu"))
    trainer.initialize()
    trainer.network.double()
    return trainer


def batch_of(trainer: Any, kind: str, seed: int = 0, group: int = 0) -> dict[str, Any]:
    """A batch as nnU-Net's loaders make it, of a data-parallel group."""
    rng = torch.Generator().manual_seed(100 * group + seed)
    patch, samples = trainer.configuration_manager.patch_size, trainer.batch_size
    data = torch.randn(samples, 1, *patch, generator=rng, dtype=torch.float64)
    targets = []
    for scale in trainer._get_deep_supervision_scales():
        size = [round(extent * factor) for extent, factor in zip(patch, scale, strict=True)]
        if kind == "regions":
            targets.append(torch.randint(0, 2, (samples, 3, *size), generator=rng).bool())
        else:
            labels = len(KINDS[kind]["labels"])
            targets.append(torch.randint(0, labels, (samples, 1, *size), generator=rng).to(torch.int16))
    return {"data": data, "target": targets, "keys": ["a", "b"]}


def steps(trainer: Any, kind: str, count: int = 2, batch: Callable[..., Any] = batch_of) -> dict[str, Any]:
    """Losses, the gradients of the last step, and a validation step's result."""
    losses = [float(trainer.train_step(batch(trainer, kind, seed))["loss"]) for seed in range(count)]
    network = getattr(trainer.network, "module", trainer.network)  # in DDP
    gradients = {n: p.grad.numpy().copy() for n, p in network.named_parameters() if p.grad is not None}
    trainer.network.eval()
    with torch.no_grad():
        validation = trainer.validation_step(batch(trainer, kind, 9))
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


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What :func:`steps` gave in every process, by launch and kind; see :mod:`tests.nnunet_plugins.halo_ranks`."""
    folder = tmp_path_factory.mktemp("ranks")
    folders = {f"nnUNet_{name}": str(folder) for name in ("raw", "preprocessed", "results")}
    env = os.environ | folders | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run_module("tests.nnunet_plugins.halo_ranks", str(folder), *LAUNCHES, folder=folder, variables=env)
    assert done.returncode == 0, (
        done.stderr[:6000] + done.stdout[-2500:] + done.stderr[-3000:]
    )  # what failed first, and last
    pairs = [(launch, kind) for launch, kinds in LAUNCHES.items() for kind in kinds]
    files = {(launch, kind): sorted(folder.glob(f"{launch}-{kind}-?.pkl")) for launch, kind in pairs}
    return {key: [pickle.loads(file.read_bytes()) for file in found] for key, found in files.items()}


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_share_a_patch(kind: str, folder: Path, launched: Any) -> None:
    stock = steps(trainer_of(kind, nnUNetTrainer, folder), kind)
    assert len(launched["halo:2:2", kind]) == 2
    for found in launched["halo:2:2", kind]:
        assert_same(found, stock)
        assert found["wrote"] == (found is launched["halo:2:2", kind][0])  # the first process writes


@pytest.mark.long
@pytest.mark.parametrize(("launch", "kind"), [("halo:4:2", "labels"), ("halo:4:2", "flat"), ("halo:2:1", "regions")])
def test_groups_of_processes_train_as_the_processes_of_stock(launch: str, kind: str, launched: Any) -> None:
    """Four processes are two groups here, and two are two."""
    stock, found = launched["stock:2", kind], launched[launch, kind]
    assert [one["batch_size"] for one in stock] == ([2, 1] if kind == "labels" else [1, 1])
    assert abs(stock[0]["losses"][0] - stock[1]["losses"][0]) > 1e-3
    parts = len(found) // 2
    assert parts == int(launch[-1])
    for rank, one in enumerate(found):
        expected = stock[rank // parts]
        assert_same(one, expected)
        assert (one["batch_size"], one["oversample"]) == (expected["batch_size"], expected["oversample"])
        assert one["wrote"] == (rank == 0)


class FewProcesses:
    """Parts of nnU-Net's configuration and of a mesh that say how a batch is divided."""

    def __init__(self, batch: int, groups: int, batch_dice: bool = False) -> None:
        self.batch_size, self.batch_dice, self.data, self.data_rank = batch, batch_dice, groups, 0


def test_batches_and_networks_that_groups_cannot_train() -> None:
    one = FewProcesses(1, 1, True)
    refuse_batch(one, one)  # type: ignore[arg-type]
    for few, words in (
        (FewProcesses(1, 2), "a batch of 1 cannot be divided among 2 .* a multiple of 2"),
        (FewProcesses(3, 2, True), "batch Dice wants as many samples in each of 2"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_batch(few, few)  # type: ignore[arg-type]
    network = torch.nn.Sequential(torch.nn.InstanceNorm3d(2), torch.nn.BatchNorm3d(2))
    refuse_batch_norm(network, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch norm \(1\) cannot be trained in 2"):
        refuse_batch_norm(network, FewProcesses(2, 2))  # type: ignore[arg-type]


def test_the_code_of_a_trainer_and_its_bases_sees_groups_in_the_place_of_processes() -> None:
    from nnunetv2.training.nnUNetTrainer.variants.sampling.nnUNetTrainer_probabilisticOversampling import (
        nnUNetTrainer_probabilisticOversampling as Sampling,
    )

    before = torch.distributed.get_world_size
    places = [vars(sys.modules[one.__module__]) for one in (nnUNetTrainer, Sampling)]  # each calls dist
    with as_processes(FewProcesses(2, 3), type("Both", (HaloTrainer, Sampling), {})):  # type: ignore[arg-type]
        assert [place["dist"].get_world_size() for place in places] == [3, 3]
    assert all(place["dist"].get_world_size is before for place in places)
