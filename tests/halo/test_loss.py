"""Losses on uneven parts: value and gradients of the whole volume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import monai.losses as losses
import pytest
import torch
from torch import nn

from monai_memeff.apps.liver import LiverTumorLoss
from monai_memeff.halo import NotPartitionableError, SpatialLoss, scatter, spatial_partition
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.parts import mark, part_of
from tests.halo.ordinary_code import Call
from tests.halo.ranks.compare import worst
from tests.halo.ranks.threads import run_ranks

LOSSES = {
    "Dice": losses.DiceLoss(to_onehot_y=True, softmax=True, squared_pred=True, jaccard=True),
    "Dice over the batch": losses.DiceLoss(to_onehot_y=True, softmax=True, batch=True, include_background=False),
    "DiceCE": losses.DiceCELoss(to_onehot_y=True, softmax=True, weight=torch.tensor([1.0, 2.0, 5.0]).double()),
    "DiceFocal": losses.DiceFocalLoss(to_onehot_y=True, sigmoid=True),
    "generalized Dice": losses.GeneralizedDiceLoss(to_onehot_y=True, softmax=True),
    "Tversky": losses.TverskyLoss(to_onehot_y=True, softmax=True),
    "focal": losses.FocalLoss(to_onehot_y=True),
    "liver": LiverTumorLoss(),
    "deep supervision": losses.DeepSupervisionLoss(losses.DiceCELoss(to_onehot_y=True, softmax=True)),
}
IN_FLOAT32 = ("DiceFocal", "focal", "deep supervision")  # MONAI computes these, or their weights, in single precision
ROWS, COLUMNS = ((0, 3), (3, 8)), ((0, 2), (2, 6))  # uneven parts, (2, 2)


def own(tensor: torch.Tensor, mesh: HaloMesh) -> torch.Tensor:
    """This rank's uneven box, unmarked."""
    a, b = mesh.position
    return tensor[:, :, slice(*ROWS[a]), slice(*COLUMNS[b])].contiguous()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gather", [False, True])
def test_equal_to_the_whole(name: str, gather: bool) -> None:
    loss = LOSSES[name]
    target = torch.randint(0, 3, (2, 1, 8, 6, 5)).double()
    whole = torch.randn(2, 3, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    many = (lambda t: [t]) if name == "deep supervision" else (lambda t: t)
    expected = loss(many(whole), target)
    expected.backward()

    def work(mesh: HaloMesh) -> tuple[torch.Tensor, ...]:
        part = own(whole.detach(), mesh).requires_grad_()
        value = SpatialLoss(loss, mesh, averaged=False, gather=gather)(many(part), own(target, mesh))
        value.backward()
        return value.detach(), part.grad, own(whole.grad, mesh)

    atol = 1e-7 if name in IN_FLOAT32 else 1e-12
    for value, got, gradient in run_ranks(work, (2, 2)):
        torch.testing.assert_close(value, expected.detach(), atol=atol, rtol=1e-12)
        torch.testing.assert_close(got, gradient, atol=atol, rtol=1e-10)


def test_averaged_gradients_are_scaled_by_the_number_of_parts() -> None:
    def work(mesh: HaloMesh) -> torch.Tensor:
        part = torch.ones(1, 1, 2, 2, 2, requires_grad=True)
        SpatialLoss(nn.MSELoss(), mesh)(part, torch.zeros(1, 1, 2, 2, 2)).backward()
        return part.grad

    assert all(torch.allclose(g, torch.full((1, 1, 2, 2, 2), 2 * 2 / 16)) for g in run_ranks(work))


def test_an_empty_part_counts_for_nothing() -> None:
    x, y = torch.randn(1, 3, 2, 4, 4).double(), torch.randint(0, 3, (1, 1, 2, 4, 4))
    for loss in (
        losses.DiceCELoss(to_onehot_y=True, softmax=True),
        losses.FocalLoss(to_onehot_y=True, use_softmax=True),
    ):
        expected = loss(x, y)

        def work(mesh: HaloMesh, loss: nn.Module = loss) -> torch.Tensor:
            rows = slice(*((0, 2), (2, 2))[mesh.comm.rank])
            return SpatialLoss(loss, mesh)(x[:, :, rows], y[:, :, rows])

        assert all(torch.allclose(v, expected, atol=1e-7) for v in run_ranks(work))


class Function(nn.Module):
    """A loss written as a function."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.call(x, y)


REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "avg_pool3d": lambda x, y: (nn.functional.avg_pool3d(x, 3, 1, 1) - y).square().mean(),
    "max": lambda x, y: (x - y).abs().max(),
    "std": lambda x, y: (x - y).std(True),
    "amax": lambda x, y: (x - y).amax((2, 3, 4)).mean(),
    "softmax": lambda x, y: (x.softmax(2) - y).square().mean(),
    "cumsum": lambda x, y: (x.cumsum(2) - y).square().mean(),
    "getitem": lambda x, y: (x[:, :, 1:] - y[:, :, :-1]).abs().mean(),
    "unsqueeze": lambda x, y: (x.unsqueeze(-1) - y.unsqueeze(-1)).abs().mean(),
    "flip": lambda x, y: (x.flip(2) - y).abs().mean(),
    "sum": lambda x, y: (x.sum(3, keepdim=True) - y).abs().mean(),
    "select": lambda x, y: x.select(2, 0).mean(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_is_not_a_sum_is_refused_by_name(name: str) -> None:
    x = torch.randn(4, 4, 4, 4, 4)
    with pytest.raises(NotPartitionableError, match=f"'{name}'|sums over some spatial axes"):
        run_ranks(lambda mesh: SpatialLoss(Function(REFUSED[name]), mesh)(x, x))
    whole = torch.cat([x, x], 2)
    values = run_ranks(lambda mesh: SpatialLoss(Function(REFUSED[name]), mesh, gather=True)(x, x))
    torch.testing.assert_close(values[0], REFUSED[name](whole, whole))


FOLDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a list of voxels": lambda x: x.permute(0, 2, 3, 4, 1).reshape(-1, 2),
    "flattened": lambda x: x.flatten(1),
    "slices in the batch": lambda x: x.permute(0, 2, 1, 3, 4).flatten(0, 1),
    "slices in the place of channels": lambda x: x.transpose(1, 2),
    "slices among channels": lambda x: x.flatten(1, 2),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.slow
def test_outputs_that_are_no_volumes_are_gathered_and_want_a_loss_of_the_whole(name: str) -> None:
    fold = FOLDED[name]
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), Call(name, fold)).double()
    x, target = torch.randn(2, 1, 7, 4, 3, dtype=torch.float64), torch.rand(2, 2, 7, 4, 3, dtype=torch.float64)
    assert worst(network, [x]) < 1e-10
    loss, whole = losses.DiceLoss(sigmoid=True), copy.deepcopy(network)
    expected = loss(whole(x), fold(target))
    expected.backward()

    def work(mesh: HaloMesh) -> tuple[torch.Tensor, torch.Tensor]:
        parts = spatial_partition(copy.deepcopy(network), mesh)
        output, wanted = parts(scatter(x, mesh)), scatter(target, mesh)
        part = part_of(output)
        assert part is not None
        labels = mark(fold(wanted).contiguous(), part)
        with pytest.raises(NotPartitionableError, match=r"no volume \(B, C, spatial...\) .* gather=True"):
            SpatialLoss(loss, mesh)(output, labels)
        value = SpatialLoss(loss, mesh, averaged=False, gather=True)(output, labels)
        value.backward()
        return value.detach(), parts[0].weight.grad

    results = run_ranks(work, (2,))
    torch.testing.assert_close(results[0][0], expected.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sum(r[1] for r in results), whole[0].weight.grad, atol=1e-12, rtol=1e-10)
