"""Batches for the ranks of a spatial group: one and the same volume, for a network that is partitioned."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointSaver, StatsHandler
from torch import nn

from monai_memeff.halo import HaloMesh, NotPartitionableError, PrepareBatchPartition, on_rank_zero, spatial_partition
from monai_memeff.handlers import EpochSeed
from tests.halo.ranks.threads import run_ranks


def batch(seed: int = 0, rows: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 1, rows, 8, 7, generator=generator)
    return {"image": image, "label": (image > 0.5).long()}


def test_the_ranks_parts_are_the_batch() -> None:
    parts = run_ranks(lambda mesh: PrepareBatchPartition(mesh)(batch(), "cpu"))
    for number, name in enumerate(("image", "label")):
        assert torch.equal(torch.cat([part[number] for part in parts], 2), batch()[name])


@pytest.mark.parametrize("other", [batch(1), batch(rows=11), {**batch(), "label": batch(1)["label"]}])
def test_different_batches_are_refused(other: dict[str, torch.Tensor]) -> None:
    """As a DistributedSampler gives them; parts of different volumes of one shape would fit together."""

    def work(mesh: HaloMesh) -> object:
        return PrepareBatchPartition(mesh)(other if mesh.comm.rank else batch(), "cpu")

    with pytest.raises(NotPartitionableError, match=r"have loaded different batches.*no DistributedSampler"):
        run_ranks(work)


def test_only_the_first_rank_writes_files() -> None:
    class Saver(CheckpointSaver):
        """One with ways of its own."""

    def work(mesh: HaloMesh) -> list[str]:
        network = nn.Conv3d(1, 2, 1)
        handlers = on_rank_zero([StatsHandler(), Saver("models", {"model": network}), EpochSeed()], mesh)
        return [type(handler).__name__ for handler in handlers[1:]]

    assert run_ranks(work) == [["StatsHandler", "Saver", "EpochSeed"], ["EpochSeed"]]


@pytest.mark.parametrize("update", [None, lambda engine, batch: {}])
def test_a_trainer_with_iterations_of_its_own_is_refused(update: Any) -> None:
    network = nn.Conv3d(1, 2, 1)
    trainer = partial(
        SupervisedTrainer,
        "cpu",
        1,
        [],
        network,
        torch.optim.SGD(network.parameters()),
        nn.L1Loss(),
        iteration_update=update,
    )

    def work(mesh: HaloMesh) -> None:
        handlers = on_rank_zero([StatsHandler()], mesh)
        evaluator = SupervisedEvaluator("cpu", [], network, iteration_update=update, val_handlers=handlers)
        assert type(evaluator) is SupervisedEvaluator  # validation sees whole volumes
        if update is None:
            trainer(train_handlers=handlers)
        else:
            with pytest.raises(NotPartitionableError, match=r"has an iteration_update of its own \(function"):
                trainer(train_handlers=handlers)

    run_ranks(work, spatial=(1,))


def test_a_network_that_is_not_partitioned_is_refused() -> None:
    network = nn.Conv3d(1, 2, 3, padding=1)

    def work(mesh: HaloMesh) -> None:
        with pytest.raises(NotPartitionableError, match=r"The network \(DataParallel\) is not partitioned"):
            PrepareBatchPartition(mesh, network=nn.DataParallel(network))
        PrepareBatchPartition(mesh, network=nn.DataParallel(spatial_partition(network, mesh)))

    run_ranks(work, spatial=(1,))
