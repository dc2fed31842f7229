"""Losses on uneven parts: value and gradients of the whole volume."""

from __future__ import annotations

import math

import monai.losses as losses
import pytest
import torch
from torch import nn

from monai_memeff.halo import Hub, NotPartitionable, SpatialLoss, scatter, virtual_mesh

LOSSES = {
    "Dice": losses.DiceLoss(to_onehot_y=True, softmax=True, squared_pred=True, jaccard=True),
    "Dice over the batch": losses.DiceLoss(to_onehot_y=True, softmax=True, batch=True, include_background=False),
    "DiceCE": losses.DiceCELoss(to_onehot_y=True, softmax=True, weight=torch.tensor([1.0, 2.0, 5.0]).double()),
    "DiceFocal": losses.DiceFocalLoss(to_onehot_y=True, sigmoid=True),
    "generalized Dice": losses.GeneralizedDiceLoss(to_onehot_y=True, softmax=True),
    "Tversky": losses.TverskyLoss(to_onehot_y=True, softmax=True),
    "focal": losses.FocalLoss(to_onehot_y=True),
    "deep supervision": losses.DeepSupervisionLoss(losses.DiceCELoss(to_onehot_y=True, softmax=True)),
}


IN_FLOAT32 = ("DiceFocal", "focal", "deep supervision")  # MONAI computes these, or their weights, in single precision


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gather", [False, True])
def test_equal_to_the_whole(name: str, gather: bool) -> None:
    loss, spatial = LOSSES[name], (2, 2)
    target = torch.randint(0, 3, (2, 1, 8, 6, 5)).double()
    whole = torch.randn(2, 3, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    many = (lambda t: [t]) if name == "deep supervision" else (lambda t: t)
    expected = loss(many(whole), target)
    expected.backward()
    hub = Hub(math.prod(spatial))
    mesh = virtual_mesh(hub, spatial)
    mesh.multiple = (3, 2)  # parts of 3 and 5, 2 and 4 rows

    def work(_rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = scatter(whole.detach(), mesh).requires_grad_()
        value = SpatialLoss(loss, mesh, averaged=False, gather=gather)(many(part), scatter(target, mesh))
        value.backward()
        return value.detach(), part.grad, scatter(whole.grad, mesh)

    atol = 1e-7 if name in IN_FLOAT32 else 1e-12
    for value, got, gradient in hub.run(work):
        torch.testing.assert_close(value, expected.detach(), atol=atol, rtol=1e-12)
        torch.testing.assert_close(got, gradient, atol=atol, rtol=1e-10)


def test_averaged_gradients_are_scaled_by_the_number_of_parts() -> None:
    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))

    def work(_rank: int) -> torch.Tensor:
        part = torch.ones(1, 1, 2, 2, 2, requires_grad=True)
        SpatialLoss(nn.MSELoss(), mesh)(part, torch.zeros(1, 1, 2, 2, 2)).backward()
        return part.grad

    assert all(torch.allclose(g, torch.full((1, 1, 2, 2, 2), 2 * 2 / 16)) for g in hub.run(work))


def test_a_loss_that_is_not_a_sum_is_refused_by_name() -> None:
    class Blurred(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (nn.functional.avg_pool3d(x, 3, 1, 1) - y).square().mean()

    hub = Hub(2)
    mesh = virtual_mesh(hub, (2,))
    x = torch.zeros(1, 1, 4, 4, 4)
    with pytest.raises(NotPartitionable, match="'avg_pool3d'"):
        hub.run(lambda _: SpatialLoss(Blurred(), mesh)(x, x))
    assert float(Hub(1).run(lambda _: SpatialLoss(Blurred(), virtual_mesh(Hub(1), (1,)), gather=True)(x, x))[0]) == 0.0
