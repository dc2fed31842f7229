"""The ground truth first: oracles fail on what is wrong, and torch's convolutions are what we take them for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles import (
    TOLERANCES,
    assert_adjoint,
    assert_less_memory,
    assert_same_as_dense,
    assert_same_as_whole,
    assert_tensors_agree,
    asymmetric,
    fill_asymmetric,
    impulses,
)

Call = Callable[..., Tensor]
Triple = tuple[int, int, int]

IMAGE = asymmetric((2, 2, 4, 5, 6))


# What we take torch's convolutions for, voxel by voxel


def conv3d_by_loops(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """out[o] = bias + sum over t of weight[t] * in[o * stride - padding + dilation * t], zero outside."""
    sizes = zip(x.shape[2:], weight.shape[2:], strict=True)
    shape = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in sizes]
    out = bias.view(1, -1, 1, 1, 1).repeat(x.shape[0], 1, *shape)
    for place in product(*map(range, shape)):
        for tap in product(*map(range, weight.shape[2:])):
            source = [o * stride - padding + dilation * t for o, t in zip(place, tap, strict=True)]
            if all(0 <= s < n for s, n in zip(source, x.shape[2:], strict=True)):
                out[(..., *place)] += x[(..., *source)] @ weight[(..., *tap)].T
    return out


def conv_transpose3d_by_loops(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int, output_padding: int
) -> Tensor:
    """out[i * stride - padding + dilation * t] += in[i] * weight[t], where that lies inside; bias everywhere."""
    sizes = zip(x.shape[2:], weight.shape[2:], strict=True)
    shape = [(n - 1) * stride - 2 * padding + dilation * (k - 1) + output_padding + 1 for n, k in sizes]
    out = bias.view(1, -1, 1, 1, 1).repeat(x.shape[0], 1, *shape)
    for place in product(*map(range, x.shape[2:])):
        for tap in product(*map(range, weight.shape[2:])):
            target = [i * stride - padding + dilation * t for i, t in zip(place, tap, strict=True)]
            if all(0 <= s < n for s, n in zip(target, shape, strict=True)):
                out[(..., *target)] += x[(..., *place)] @ weight[(..., *tap)]
    return out


@pytest.mark.parametrize("kernel", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 3, 1), (4, 1, 2)], ids=str)
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (1, 1, 1), (2, 1, 1), (3, 0, 1), (2, 2, 2)])
def test_torchs_convolution_is_the_loop(kernel: Triple, stride: int, padding: int, dilation: int) -> None:
    weight, bias = asymmetric((3, 2, *kernel)), asymmetric((3,))
    ours = conv3d_by_loops(IMAGE, weight, bias, stride, padding, dilation)
    theirs = F.conv3d(IMAGE, weight, bias, stride, padding, dilation)
    assert_tensors_agree({"output": theirs}, {"output": ours})


@pytest.mark.parametrize("kernel", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 3, 1), (4, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "output_padding"),
    [(1, 0, 1, 0), (1, 1, 1, 0), (2, 1, 1, 1), (2, 0, 1, 0), (3, 1, 2, 2)],
)
def test_torchs_transposed_convolution_is_the_loop(
    kernel: Triple, stride: int, padding: int, dilation: int, output_padding: int
) -> None:
    x, weight, bias = asymmetric((1, 3, 3, 4, 3)), asymmetric((3, 2, *kernel)), asymmetric((2,))
    ours = conv_transpose3d_by_loops(x, weight, bias, stride, padding, dilation, output_padding)
    theirs = F.conv_transpose3d(x, weight, bias, stride, padding, output_padding, dilation=dilation)
    assert_tensors_agree({"output": theirs}, {"output": ours})


def test_an_impulse_is_answered_by_the_kernel() -> None:
    kernel = asymmetric((1, 1, 3, 2, 4))
    for at, x in impulses((3, 4, 5)):
        shown = F.conv_transpose3d(x, kernel)[0, 0]
        cut = tuple(slice(a, a + k) for a, k in zip(at, kernel.shape[2:], strict=True))
        assert torch.equal(shown[cut], kernel[0, 0])
        assert int((shown != 0).sum()) == kernel.numel()


# Inputs without symmetry


@pytest.mark.parametrize("shape", [(3, 3, 3), (2, 2), (4, 4, 4), (1, 1, 5, 5, 5)], ids=str)
def test_asymmetric_values_have_no_symmetry(shape: tuple[int, ...]) -> None:
    values = asymmetric(shape)
    axes = [axis for axis, extent in enumerate(shape) if extent > 1]
    for order in permutations(axes):
        for count in range(2 ** len(axes)):
            flips = [axis for bit, axis in enumerate(axes) if count >> bit & 1]
            moved = values.permute(*range(len(shape) - len(axes)), *order).flip(flips)
            assert torch.equal(moved, values) == (not flips and list(order) == axes)
    assert values.unique().numel() == values.numel()


# Same as dense, same as whole: what is right passes


def conv() -> nn.Conv3d:
    """A small convolution in float64 whose kernel has no symmetry."""
    return fill_asymmetric(nn.Conv3d(2, 2, 3, padding=1).double())


def test_the_same_computation_agrees() -> None:
    assert_same_as_dense(nn.Conv3d(2, 2, 3, padding=1).double(), conv(), IMAGE)


def test_a_network_agrees_with_itself_in_parts() -> None:
    """The batch in two parts, and one network with dropout and running statistics on both sides."""
    net = nn.Sequential(conv(), nn.Dropout(0.5), nn.BatchNorm3d(2)).double()
    assert_same_as_whole(net, net, IMAGE)
    net.eval()
    assert_same_as_whole(lambda x: torch.cat([net(part) for part in x.split(1)]), net, IMAGE, modules=(net, net))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_places_that_do_not_count_are_left_out() -> None:
    mask = asymmetric((2, 1, 4, 5, 6)) > 0
    dense = conv()
    assert_same_as_dense(lambda x: dense(x) * mask, dense, IMAGE, modules=(dense, dense), where=mask)
    with pytest.raises(AssertionError, match="ours is not zero outside"):
        assert_same_as_dense(dense, dense, IMAGE, where=mask)


def test_several_outputs_and_other_arguments() -> None:
    def call(x: Tensor, power: int, index: Tensor) -> list[Tensor]:
        return [x**power, x.detach(), index]

    assert_same_as_dense(call, call, IMAGE, 3, torch.arange(4))


# ... and what is wrong fails


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_a_flipped_kernel_fails(axis: int) -> None:
    dense = conv()

    def flipped(x: Tensor) -> Tensor:
        return F.conv3d(x, dense.weight.flip(axis), dense.bias, padding=1)

    with pytest.raises(AssertionError, match=r"(?s)gradient of weight: off by .*output 0: off by .* at \[\d"):
        assert_same_as_dense(flipped, dense, IMAGE, modules=(dense, dense))


def test_swapped_axes_fail() -> None:
    dense, x = conv(), asymmetric((1, 2, 4, 4, 4))

    def swapped(x: Tensor) -> Tensor:
        return F.conv3d(x, dense.weight.transpose(2, 4), dense.bias, padding=1)

    with pytest.raises(AssertionError, match="output 0: off by"):
        assert_same_as_dense(swapped, dense, x, modules=(dense, dense))


class HalvedGradient(torch.autograd.Function):
    """The identity, with half its gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient / 2


def test_a_halved_gradient_fails() -> None:
    dense = conv()
    with pytest.raises(AssertionError) as caught:
        assert_same_as_dense(lambda x: dense(HalvedGradient.apply(x)), dense, IMAGE, modules=(dense, dense))
    assert str(caught.value).startswith("gradient of input 0: off by")
    assert "weight" not in str(caught.value), "the parameters' gradients are right"
    with pytest.raises(AssertionError, match="gradient of bias"):
        assert_same_as_dense(lambda x: HalvedGradient.apply(dense(x)), dense, IMAGE, modules=(dense, dense))


def test_a_missing_gradient_fails() -> None:
    with pytest.raises(AssertionError, match="gradient of input 0: ours is absent, the reference float64"):
        assert_same_as_dense(lambda x: x.detach() * 2, lambda x: x * 2, IMAGE)


def test_different_running_statistics_fail() -> None:
    net = nn.BatchNorm3d(2).double()

    def twice(x: Tensor) -> Tensor:
        net(x)
        return net(x)

    with pytest.raises(AssertionError, match=r"buffer num_batches_tracked: off by 1.*\n.*buffer running_mean"):
        assert_same_as_dense(twice, net, IMAGE, modules=(net, net))


def test_weights_that_do_not_load_strictly_fail() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        assert_same_as_dense(nn.Conv3d(2, 2, 1).double(), conv(), IMAGE)


@pytest.mark.parametrize(
    ("ours", "reference", "message"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), "ours has 1 values that are NaN"),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")]), "NaN or infinite"),
        (torch.tensor([1.0]), torch.tensor([float("nan")]), "the reference has 1 values"),
        (torch.zeros(2), torch.zeros(2, 1), r"ours is float32 \[2\], the reference float32 \[2, 1\]"),
        (torch.zeros(2), torch.zeros(2).double(), "ours is float32"),
        (torch.tensor([3, 4]), torch.tensor([3, 5]), r"off by 1 at \[1\] \(ours 4, reference 5, allowed 0\)"),
        (torch.tensor([True]), torch.tensor([False]), "1 of 1 values are off"),
        (None, torch.zeros(1), "ours is absent"),
    ],
    ids=["NaN both", "infinity both", "NaN one", "shape", "type", "integer", "boolean", "absent"],
)
def test_unequal_tensors_fail(ours: Tensor | None, reference: Tensor | None, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_tensors_agree({"it": ours}, {"it": reference})


def test_missing_names_fail() -> None:
    with pytest.raises(AssertionError, match=r"only ours has a\nonly the reference has b"):
        assert_tensors_agree({"a": None}, {"b": None})


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_tolerances_pass_rounding_and_stop_errors(dtype: torch.dtype) -> None:
    exact = asymmetric((50,)) * 10
    rounded = (exact.to(dtype) / 3 * 3).to(dtype)
    assert_tensors_agree({"it": rounded}, {"it": exact.to(dtype)})
    rtol, atol = TOLERANCES[dtype]
    with pytest.raises(AssertionError, match="off by"):
        assert_tensors_agree({"it": (exact + 3 * (atol + 10 * rtol)).to(dtype)}, {"it": exact.to(dtype)})


def test_empty_tensors_agree() -> None:
    assert_tensors_agree({"it": torch.zeros(0, 3)}, {"it": torch.zeros(0, 3)})


# Adjoint


def test_right_adjoints_pass() -> None:
    x, weight = asymmetric((1, 2, 5, 6, 4)), asymmetric((3, 2, 3, 3, 3))
    y = asymmetric((1, 3, 3, 3, 2)) + 0.3

    def forward(x: Tensor) -> Tensor:
        return F.conv3d(x, weight, stride=2, padding=1)

    assert_adjoint(forward, None, x, y)
    assert_adjoint(forward, lambda y: F.conv_transpose3d(y, weight, None, 2, 1, (0, 1, 1)), x, y)
    assert_adjoint(lambda a, b: (a + b, b), lambda u, v: (u, u + v), [x, 2 * x - 1], [x - 0.5, x * x])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y, w: F.conv_transpose3d(y, w.flip(2), padding=1),
        lambda y, w: F.conv_transpose3d(y, w, padding=1) / 2,
        lambda y, w: F.conv_transpose3d(y, w, padding=1).roll(1, 3),
        lambda y, w: F.conv_transpose3d(y, w, padding=1) * float("nan"),
    ],
    ids=["flipped", "halved", "shifted", "NaN"],
)
def test_wrong_adjoints_fail(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, weight = asymmetric((1, 2, 5, 6, 4)), asymmetric((3, 2, 3, 3, 3))
    with pytest.raises(AssertionError, match=r"off by|NaN"):
        assert_adjoint(
            lambda x: F.conv3d(x, weight, padding=1), lambda y: wrong(y, weight), x, asymmetric((1, 3, 5, 6, 4))
        )


def test_a_wrong_gradient_or_a_map_that_is_not_linear_is_no_adjoint() -> None:
    x = asymmetric((3, 4))
    with pytest.raises(AssertionError, match="off by"):
        assert_adjoint(HalvedGradient.apply, None, x, x + 0.4)
    with pytest.raises(AssertionError, match="off by"):
        assert_adjoint(lambda x: x + 1, None, x, x + 0.4)


def test_adjoints_that_show_nothing_fail() -> None:
    x = asymmetric((3, 4))
    with pytest.raises(AssertionError, match="shows nothing"):
        assert_adjoint(lambda x: x * 2, None, x * 0, x * 0)
    with pytest.raises(AssertionError, match="F x has shapes"):
        assert_adjoint(lambda x: x[1:], None, x, x)


# Less memory


@pytest.mark.slow
def test_less_memory_passes_and_fails() -> None:
    def peak(count: int) -> Callable[[], object]:
        return lambda: [torch.zeros(count, dtype=torch.uint8).sum().item() for _ in range(3)]

    assert_less_memory(peak(1000), peak(4000), 0.3)
    with pytest.raises(AssertionError, match=r"1,008 bytes are 0.25\d of the reference's 4,008, allowed 0.2"):
        assert_less_memory(peak(1000), peak(4000), 0.2)
    with pytest.raises(AssertionError, match="shows nothing"):
        assert_less_memory(peak(1000), lambda: None, 1.0)
