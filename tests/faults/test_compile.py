"""Training under torch.compile: the loss and every gradient are those without it, for every network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from monai_memeff.clstm import CLSTMUNet
from monai_memeff.occupancy import OccupancyNet
from monai_memeff.sparse import (
    CoarseToSparseUNet,
    SparseBatchNorm3d,
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseConv3d,
    SparseReLU,
    SparseTensor,
    SparseUNet,
)

Loss = Callable[[nn.Module, Tensor], Tensor]


def square(net: nn.Module, volume: Tensor) -> Tensor:
    """A loss of dense logits."""
    return (net(volume) ** 2).mean()


def completion(net: nn.Module, volume: Tensor) -> Tensor:
    """The completion network's own loss."""
    mask = (volume != 0).float()
    return SparseCompletionLoss()(net(mask, mask), mask)


def points(net: nn.Module, volume: Tensor) -> Tensor:
    """A loss of points."""
    logits, coarse = net(volume, torch.tensor([[[0.0, 1, 2], [3, 4, 5], [7, 7, 7]]]))
    return (logits**2).mean() + (coarse**2).mean()


class OwnLayers(nn.Module):
    """Sparse layers in a module of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SparseConv3d(1, 3), SparseConv3d(3, 2)
        self.norm, self.act = SparseBatchNorm3d(3), SparseReLU()

    def forward(self, volume: Tensor) -> Tensor:
        """Two convolutions, the norm and activation between them fused."""
        x = SparseTensor.from_dense(volume, volume != 0)
        return self.second(self.norm(self.first(x), self.act)).dense()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "SparseUNet": (lambda: SparseUNet(3, 1, 2, (4, 8), (2,), norm="instance"), square),
    "SparseUNet, batch norm": (lambda: SparseUNet(3, 1, 2, (4, 8), (2,), norm="batch", num_res_units=2), square),
    "SparseCompletionNet": (lambda: SparseCompletionNet((2,) * 7), completion),
    "SparseCompletionNet, recomputed": (lambda: SparseCompletionNet((2,) * 7, use_checkpoint=True), completion),
    "CoarseToSparseUNet": (
        lambda: CoarseToSparseUNet(3, 1, 2, (4, 8), (2,), refine_channels=(4, 8), refine_strides=(2,)),
        square,
    ),
    "OccupancyNet": (lambda: OccupancyNet(1, 2, None, (4, 8), "interpolated", width=8, blocks=1), points),
    "CLSTMUNet": (lambda: CLSTMUNet(3, 1, 2, (4, 8), 2), square),
    "CLSTMUNet, both ways": (lambda: CLSTMUNet(3, 1, 2, (4, 8), 2, bidirectional=True, checkpoint="sqrt"), square),
    "layers": (OwnLayers, square),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_training_steps_are_those_without_compilation(name: str) -> None:
    make, loss = NETWORKS[name]
    torch.compiler.reset()
    plain, inner = make().train(), make().train()
    inner.load_state_dict(plain.state_dict())
    compiled = torch.compile(inner, backend="eager")  # traced as by any backend, without a compiler
    volumes = [torch.randn(1, 1, 8, 9, 10) * (torch.rand(1, 1, 8, 9, 10) < fill) for fill in (0.4, 0.6)]
    for volume in volumes:
        values = [loss(net, volume) for net in (compiled, plain)]
        for value in values:
            value.backward()
        torch.testing.assert_close(*values)
    for (key, ours), expected in zip(inner.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (expected.grad is None), key
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, msg=key)
    for (key, ours), expected in zip(inner.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, msg=key)
