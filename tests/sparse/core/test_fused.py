"""Norm and activation fused: values, gradients and running statistics of the two layers, in less memory."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import ADN
from torch import Tensor, nn

from monai_memeff.memory import checkpoint
from monai_memeff.sparse import (
    SparseBatchNorm3d,
    SparseConv3d,
    SparseInstanceNorm3d,
    SparseLeakyReLU,
    SparsePReLU,
    SparseReLU,
    SparseTensor,
    SparseUNet,
    to_sparse,
)
from monai_memeff.sparse.core import fused
from monai_memeff.sparse.nn.activations import SparseELU
from tests.oracles import assert_less_memory
from tests.sparse.reference import random_mask

SHAPE = (7, 6, 9)
OPTIONS = (
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"eps": 0.1, "momentum": 0.3},
)


def sample(channels: int, dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = SHAPE) -> SparseTensor:
    """Features whose mean and spread differ by channel."""
    mask = random_mask(2, shape, 0.4)
    image = torch.randn(2, channels, *shape, dtype=dtype) * torch.linspace(0.5, 3, channels)[:, None, None, None]
    return SparseTensor.from_dense((image + torch.linspace(-2, 2, channels)[:, None, None, None]).to(dtype), mask)


def norms(channels: int, options: dict, training: bool) -> tuple[SparseBatchNorm3d, SparseBatchNorm3d]:
    """Two equal norms with weights and statistics of their own."""
    first = SparseBatchNorm3d(channels, **options).double()
    for name, value in first.state_dict().items():
        if name != "num_batches_tracked":
            value.uniform_(0.5, 1.5)
    second = SparseBatchNorm3d(channels, **options).double()
    second.load_state_dict(first.state_dict())
    return first.train(training), second.train(training)


@pytest.fixture(
    params=[
        SparseReLU(),
        SparseLeakyReLU(0.2),
        SparseLeakyReLU(0.2, inplace=True),
        SparsePReLU(),
        SparsePReLU(3),
        SparseELU(),
    ],
    ids=str,
)
def act(request: pytest.FixtureRequest) -> nn.Module:
    """Every activation that is fused, and one that is not."""
    return request.param.double()


@pytest.fixture(params=[1, 2**18])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass row by row, and at once."""
    monkeypatch.setattr(fused, "BLOCK_ELEMENTS", request.param)


def assert_fused_is_apart(norms: tuple[nn.Module, nn.Module], act: nn.Module, x: SparseTensor) -> None:
    """Values and gradients of one norm that is given the activation, and of its twin that is not."""
    results = []
    for norm, run in zip(norms, (lambda n, t: n(t, act), lambda n, t: act(n(t))), strict=True):
        features = x.features.clone().requires_grad_()
        y = run(norm, x.replace(features)).features
        slopes = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        inputs = [features, *norm.parameters(), *act.parameters()]
        results.append([y, *torch.autograd.grad((y * slopes).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("blocks")
def test_fused_is_batch_norm_then_activation(act: nn.Module, options: dict, training: bool) -> None:
    together, apart = norms(3, options, training)
    assert_fused_is_apart((together, apart), act, sample(3))
    for name, value in together.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name], msg=name)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("fewest", [0, 1, 2])
@pytest.mark.usefixtures("blocks")
def test_fused_is_instance_norm_then_activation(act: nn.Module, affine: bool, fewest: int) -> None:
    norm = SparseInstanceNorm3d(3, affine=affine).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    image = sample(3).dense()
    image[1].flatten(1)[:, fewest:] = 0  # an item of so many voxels
    assert_fused_is_apart((norm, norm), act, SparseTensor.from_dense(image, (image != 0).any(1, keepdim=True)))


@pytest.mark.parametrize(("ordering", "fuses"), [("NDA", True), ("NA", True), ("ADN", False), ("DNA", True)])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.4])
def test_monai_blocks_fuse_what_stands_together(ordering: str, fuses: bool, dropout: float | None) -> None:
    dense = ADN(ordering, 3, "PRELU", "INSTANCE", 3, dropout_dim=1, dropout=dropout).double()
    layers = to_sparse(dense)
    x = sample(3)
    for training in (True, False):
        layers.train(training)
        torch.manual_seed(3)
        found = layers(x)
        torch.manual_seed(3)
        expected = x
        for layer in layers:
            expected = layer(expected)
        torch.testing.assert_close(found.features, expected.features, rtol=1e-12, atol=1e-12)
        between = ordering == "NDA" and dropout and training
        assert (found.recompute is not None) == bool(fuses and not between)


@pytest.mark.parametrize("norm", [SparseBatchNorm3d(2), SparseInstanceNorm3d(2, affine=True)], ids=str)
@pytest.mark.parametrize("act", [SparseReLU(), SparseLeakyReLU(0.2), SparsePReLU()], ids=str)
def test_a_chain_with_second_derivatives(norm: nn.Module, act: nn.Module) -> None:
    """Through norm, activation and a convolution that keeps nothing but the norm's input."""
    torch.manual_seed(2)
    x = sample(2)
    norm, act, layer = norm.double(), act.double(), SparseConv3d(2, 2).double()
    weights = torch.randn(len(x), 2, dtype=torch.float64)

    def run(features: Tensor, weight: Tensor) -> Tensor:
        y = norm(x.replace(features), act)
        return torch.func.functional_call(layer, {"weight": weight}, (y,)).features * weights

    inputs = (x.features.clone().requires_grad_(), layer.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("act", [SparseReLU(), SparseLeakyReLU(0.2), SparsePReLU(4)], ids=str)
def test_low_precision_keeps_its_dtype_and_is_near(act: nn.Module) -> None:
    exact = sample(4, torch.float32)
    norm = SparseBatchNorm3d(4)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        features = exact.features.detach().clone().to(dtype).requires_grad_()
        y = norm(exact.replace(features), act)
        assert y.features.dtype == dtype
        assert y.recompute is not None
        torch.testing.assert_close(y.recompute(), y.features, rtol=2e-2, atol=2e-2)
        y.features.float().square().sum().backward()
        assert features.grad.dtype == dtype
        found.append(features.grad.float())
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.1)


def chain(again: bool) -> nn.Module:
    """Six times convolution, norm and ReLU; without ``again`` every result is kept as usual."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = SparseConv3d(8, 8, bias=False), SparseBatchNorm3d(8)

        def forward(self, x: SparseTensor) -> SparseTensor:
            y = self.convolution(x)
            return self.norm(y, SparseReLU()) if again else SparseReLU()(self.norm(y))

    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(6)])


@pytest.mark.slow
def test_the_chain_needs_less_memory() -> None:
    x = sample(8, torch.float64, (30, 31, 32))
    x.features.requires_grad_()
    lean, usual = chain(True).double(), chain(False).double()
    gradients = []
    for net in (lean, usual):
        net(x).features.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert_less_memory(
        lambda: lean(x).features.square().sum().backward(), lambda: usual(x).features.square().sum().backward(), 0.85
    )


def test_inside_a_checkpoint() -> None:
    x = sample(8, torch.float64)
    net = chain(True).double()
    found = []
    for run in (net, lambda t: checkpoint(net, t)):
        features = x.features.clone().requires_grad_()
        y = run(x.replace(features)).features
        found.append([y, *torch.autograd.grad(y.square().sum(), [features, *net.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_hooks_see_every_layer() -> None:
    layers = to_sparse(ADN("NDA", 3, "PRELU", "INSTANCE", 3, dropout_dim=3, dropout=0.0)).double()
    x, seen = sample(3), []
    assert layers(x).recompute is not None
    hook = layers.A.register_forward_hook(lambda layer, args, result: seen.append((args[0], result)))
    result = layers(x)
    assert result.recompute is None
    torch.testing.assert_close(seen[0][0].features, layers.N(x).features)
    assert seen[0][1] is result
    hook.remove()
    assert layers(x).recompute is not None


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.slow
def test_a_unet_keeps_one_tensor_per_layer(batch_size: int) -> None:
    """As many bytes as its convolutions' results and inputs of the joins; unfused it keeps half as much again."""
    torch.manual_seed(0)
    net = SparseUNet(3, 1, 2, (8, 16, 16), (1, 2)).double()
    mask = torch.zeros(batch_size, 1, 30, 31, 32, dtype=torch.bool)
    mask[:, :, 5:25, 4:26] = True
    x = SparseTensor.from_dense(torch.randn(batch_size, 1, 30, 31, 32).double(), mask)

    def step(fuse: bool) -> list[Tensor]:
        classes = [type(module) for module in net.modules()]
        for module in net.modules():
            module.__class__ = ADN if isinstance(module, ADN) and not fuse else type(module)
        loss = net(x).features.square().sum()
        for module, known in zip(net.modules(), classes, strict=True):
            module.__class__ = known
        return list(torch.autograd.grad(loss, list(net.parameters())))

    for ours, theirs in zip(step(True), step(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert_less_memory(lambda: step(True), lambda: step(False), 0.85)


@pytest.mark.parametrize("slopes", [1, 3])
def test_the_gradient_of_a_slope_is_summed_in_single_precision(slopes: int) -> None:
    before, grad = torch.full((4000, 3), -8.0).half(), torch.full((4000, 3), 8.0).half()
    _, found = fused._activation_gradient(grad, before, torch.full((slopes,), 0.25))
    assert found.tolist() == [-64.0 * 12000 / slopes] * slopes  # beyond the largest half, 65504
