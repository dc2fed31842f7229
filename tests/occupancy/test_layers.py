"""Pade activation, conditional batch norm and patches against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from monai_memeff.occupancy import ConditionalBatchNorm, PadeActivation
from monai_memeff.occupancy.nn.patches import PatchConv, gather_patches, halved, voxels_of
from tests.occupancy.reference import all_patches, plain_batch_norm
from tests.oracles import assert_same_as_dense, asymmetric, fill_asymmetric

# Activation


def plain_pade(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    above = sum(a[power] * x**power for power in range(6))
    return above / (1 + sum((b[power] * x ** (power + 1)).abs() for power in range(4)))


def test_pade_is_its_formula_forwards_and_backwards() -> None:
    ours = PadeActivation().double()
    ours.denominator.data[1] *= -1  # the sign of a coefficient of Q does not matter, but its gradient's does
    plain = PadeActivation().double()
    plain.forward = lambda x: plain_pade(x, plain.numerator, plain.denominator)  # type: ignore[method-assign]
    plain.load_state_dict(ours.state_dict())
    assert_same_as_dense(ours, plain, 6 * asymmetric((5, 3, 7)))
    assert sum(p.numel() for p in ours.parameters()) == 10


def test_pade_starts_as_a_leaky_relu() -> None:
    x = torch.linspace(-5, 5, 1001)
    assert float((PadeActivation()(x) - F.leaky_relu(x, 0.01)).detach().abs().max()) < 0.06


def test_pade_survives_half_precision() -> None:
    x = torch.tensor([-3e4, -1.0, 0.0, 2.0, 3e4], dtype=torch.float16)
    y = PadeActivation()(x)
    assert y.dtype == torch.float16
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y.float(), PadeActivation()(x.float()), rtol=1e-3, atol=1e-3)


# Norm


@pytest.mark.parametrize(("statistics", "axes"), [("scalar", (0, 1, 2)), ("feature", (0, 1))])
@pytest.mark.parametrize("training", [True, False])
def test_both_readings_of_conditional_batch_norm(statistics: str, axes: tuple[int, ...], training: bool) -> None:
    ours = fill_asymmetric(ConditionalBatchNorm(4, 3, statistics).double()).train(training)

    def plain(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        scale, shift = (code @ layer.weight.T + layer.bias for layer in (ours.scale, ours.shift))
        return scale[:, None] * plain_batch_norm(x, axes, training) + shift[:, None]

    x, code = asymmetric((2, 9, 4)) + torch.arange(4), asymmetric((2, 3))
    assert_same_as_dense(lambda *inputs: ours(*inputs), plain, x, code)
    if training:
        fresh = ConditionalBatchNorm(4, 3, statistics).double()
        fresh(x, code)
        torch.testing.assert_close(fresh.norm.running_mean, 0.1 * x.mean(axes).reshape(-1))


def test_the_two_readings_differ_and_start_without_a_condition() -> None:
    x, code = asymmetric((2, 9, 4)) * torch.arange(1, 5), asymmetric((2, 3))
    scalar, feature = (ConditionalBatchNorm(4, 3, kind).double()(x, code) for kind in ("scalar", "feature"))
    assert float((scalar - feature).detach().abs().max()) > 0.1
    torch.testing.assert_close(feature, plain_batch_norm(x, (0, 1), True))
    with pytest.raises(ValueError, match="'scalar' or 'feature', got 'batch'"):
        ConditionalBatchNorm(4, 3, "batch")  # type: ignore[arg-type]


# Patches


@pytest.mark.parametrize("shape", [(9, 8, 11), (3, 1, 5)])
def test_gathered_patches_are_those_cut_out_of_the_padded_volume(shape: tuple[int, int, int]) -> None:
    """Local ones, and the mid-range ones through the halved volume; at corners, and in volumes below their size."""
    volume = asymmetric((2, 3, *shape))
    places = torch.cartesian_prod(*(torch.arange(extent) for extent in shape)).expand(2, -1, -1)
    torch.testing.assert_close(gather_patches(volume, places), all_patches(volume, 7).flatten(3), rtol=0, atol=0)
    wide = all_patches(volume, 14)
    pooled = F.avg_pool3d(wide.flatten(0, 1), 2).unflatten(0, wide.shape[:2]).flatten(3)
    torch.testing.assert_close(gather_patches(halved(volume), places, step=2), pooled)


def test_patches_carry_gradients_to_the_volume() -> None:
    places = torch.tensor([[[0, 4, 2], [3, 3, 3], [3, 3, 3]]])
    numbers = torch.tensor([(0 * 6 + 4) * 7 + 2, (3 * 6 + 3) * 7 + 3, (3 * 6 + 3) * 7 + 3])
    assert_same_as_dense(
        lambda volume: gather_patches(volume, places),
        lambda volume: all_patches(volume, 7)[:, numbers].flatten(3),
        asymmetric((1, 2, 5, 6, 7)),
    )


def test_the_patch_convolution_is_a_convolution() -> None:
    ours = PatchConv(3, 2).double()
    plain = torch.nn.Conv3d(3, 2, 7, padding=3).double()
    fill_asymmetric(plain)
    patches = asymmetric((4, 5, 3 * 343))

    class Plain(torch.nn.Conv3d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(-1, 3, 7, 7, 7)).reshape(4, 5, -1)

    reference = Plain(3, 2, 7, padding=3).double()
    reference.load_state_dict(plain.state_dict())
    assert_same_as_dense(ours, reference, patches)


def test_points_between_voxels_belong_to_the_nearest() -> None:
    points = torch.tensor([[-0.5, -0.2, 0.49], [0.5, 1.5, 2.5], [1.51, 0.999, 2.49]])
    assert voxels_of(points, (3, 2, 3)).tolist() == [[0, 0, 0], [1, 1, 2], [2, 1, 2]]
