"""Batches of active voxels in MONAI's engines: the right tensors, a loss that falls, and scores by an evaluator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import IgniteMetricHandler, from_engine
from monai.inferers import SimpleInferer
from monai.transforms import AsDiscreted, Compose

from monai_memeff.apps.skull import ImplantMetric
from monai_memeff.sparse import (
    PrepareBatchSparse,
    SparseCollate,
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseCoordinatesd,
    SparseInferer,
    SparseTensor,
    sparse_collate,
)

CHANNELS = (2, 2, 2, 2, 2, 2, 2)
PAIR = SparseCoordinatesd(
    ("defective", "skull"), ("coords", "target_coords"), ("features", "target_features"), constant=1.0
)


def pair(number: int = 0, edge: int = 16) -> dict[str, torch.Tensor]:
    """A hollow box, and the same with a corner missing; asymmetric."""
    skull = torch.zeros(1, edge, edge, edge)
    skull[:, 2:12, 1:13, 3:14] = 1
    skull[:, 4:10, 3:11, 5:12] = 0
    defective = skull.clone()
    defective[:, : 6 + number, :6, :7] = 0
    return {"defective": defective, "skull": skull}


def batch(*numbers: int) -> dict[str, Any]:
    """A collated batch."""
    return sparse_collate([PAIR(pair(n)) for n in numbers])


def test_input_and_target_are_the_volumes_of_the_batch() -> None:
    data = batch(0, 3)
    inputs, target, args, kwargs = PrepareBatchSparse()(data, torch.device("cpu"))
    assert isinstance(inputs, SparseTensor)
    assert isinstance(target, SparseTensor)
    assert torch.equal(inputs.dense(), data["defective"])
    assert torch.equal(target.dense(), data["skull"])
    assert args == ()
    assert kwargs == {"target": target}


def test_an_empty_item_at_the_end_counts() -> None:
    empty = {"defective": torch.zeros(1, 16, 16, 16), "skull": pair()["skull"]}
    inputs = PrepareBatchSparse()(sparse_collate([PAIR(pair()), PAIR(empty)]))[0]
    assert inputs.batch_size == 2


def test_the_network_need_not_take_the_target() -> None:
    assert PrepareBatchSparse(pass_target=False)(batch(0))[3] == {}


def test_a_dense_label_or_none() -> None:
    data = batch(0)
    prepare = PrepareBatchSparse(target_coords_key=None, label_key="skull", pass_target=False)
    assert torch.equal(prepare(data, "cpu")[1], data["skull"])
    del data["skull"]
    assert prepare(data, "cpu")[1] is None


def test_other_names() -> None:
    data = SparseCoordinatesd("skull", "where", "what", "grid")(pair())
    data = SparseCollate("where", "what")([data])
    prepare = PrepareBatchSparse("where", "what", None, extent_key="grid", label_key="skull")
    inputs, label, _, _ = prepare(data)
    assert torch.equal(inputs.dense(), label)


def test_volumes_on_different_grids_are_refused() -> None:
    parts = [SparseCoordinatesd("skull")({"skull": torch.ones(1, n, 4, 4)}) for n in (4, 5)]
    for part in parts:
        del part["skull"]
    with pytest.raises(ValueError, match=r"share one grid, got \[\[4, 4, 4\], \[5, 4, 4\]\]; crop or pad them first"):
        PrepareBatchSparse(target_coords_key=None)(sparse_collate(parts))


def dice() -> IgniteMetricHandler:
    """The implant's Dice as an engine takes it."""
    return IgniteMetricHandler(metric_fn=ImplantMetric("dice"), output_transform=from_engine(["pred", "label"]))


@pytest.mark.slow
def test_a_trainer_lowers_the_loss_and_an_evaluator_scores() -> None:
    """MONAI's own engines, as the bundle builds them: sparse in training, dense in validation."""
    network = SparseCompletionNet(CHANNELS)
    loader = DataLoader(Dataset([pair(0), pair(1)], PAIR), batch_size=2, collate_fn=SparseCollate())
    losses: list[float] = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=12,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 0.01, amsgrad=True),
        loss_function=SparseCompletionLoss(),
        prepare_batch=PrepareBatchSparse(),
        inferer=SimpleInferer(),
        decollate=False,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda run: losses.append(run.state.output["loss"].item()))
    trainer.run()
    assert losses[-1] < 0.8 * losses[0]

    samples = [{"image": pair(n)["defective"], "label": pair(n)["skull"]} for n in range(3)]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(samples), batch_size=1),
        network=network,
        inferer=SparseInferer(),
        postprocessing=Compose([AsDiscreted("pred", threshold=0.0)]),
        key_val_metric={"dice": dice()},
    )
    evaluator.run()
    assert len(evaluator.state.metric_details["dice"]) == 3
    assert 0 <= evaluator.state.metrics["dice"] <= 1
