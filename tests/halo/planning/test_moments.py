"""Mean and variance by torch's batch norm kernel: as exact as `var_mean`, in every form in which norms ask for them."""

from __future__ import annotations

import pytest
import torch

from monai_memeff.halo.planning.rules.moments import _channels, mean_var

CASES = [
    ((2, 3, 5, 6, 7), (2, 3, 4), True),  # instance norm
    ((2, 3, 5, 6, 7), (0, 2, 3, 4), True),  # batch norm
    ((2, 3, 2, 5, 6, 7), (2, 3, 4, 5), True),  # group norm
    ((2, 5, 6, 16), (3,), False),  # layer norm: short rows
    ((2, 3, 5, 6, 7), (3, 4), False),
    ((2, 3, 5, 6, 7), (2, 4), False),
    ((1, 2, 70), (2,), True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(("shape", "dims", "fast"), CASES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_moments_are_those_of_var_mean(
    shape: tuple[int, ...], dims: tuple[int, ...], fast: bool, dtype: torch.dtype, contiguous: bool
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3 + 100).to(dtype)  # far from zero: a sum of squares would lose the variance
    x = x if contiguous else x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert (_channels(x, dims) is not None) == (fast and dtype != torch.float16 and x.is_contiguous())
    mean, var = mean_var(x, dims)
    true_var, true_mean = torch.var_mean(x.double(), dims, correction=0, keepdim=True)
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
    assert mean.shape == true_mean.shape
    assert var.shape == true_var.shape
    torch.testing.assert_close(mean.double(), true_mean, rtol=exact, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=exact, atol=0)


def test_moments_have_gradients_where_asked() -> None:
    x = torch.randn(1, 2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_var(x, (2, 3, 4)), (x,))
