"""The table of engines: what is listed, what is usable where, the self-test before use, and how one is chosen."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from monai_memeff.sparse import SparseConv3d, SparseTensor, backends
from monai_memeff.sparse.backends import native, registry
from monai_memeff.sparse.backends.native import gather, product
from monai_memeff.sparse.core.kernel_map import ConvolutionGeometry
from tests.sparse.reference import random_mask

SHAPE = (5, 4, 6)
CPU = torch.device("cpu")

Distort = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKENDS", {"native": registry.BACKENDS["native"]})
    monkeypatch.setattr(registry, "PREFERRED", {})
    monkeypatch.setattr(registry, "_chosen", None)
    monkeypatch.setattr(registry, "_engines", {})
    monkeypatch.setattr(registry, "_verdicts", {})
    monkeypatch.setattr(registry, "_devices", lambda: [CPU])
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)


def add_engine(
    monkeypatch: pytest.MonkeyPatch, name: str, reason: str | None = None, distort: Distort = lambda tensor: tensor
) -> types.ModuleType:
    """Register a made-up engine that counts its calls and computes with the native one, distorted if wanted."""
    module = types.ModuleType(f"made_up_{name}")
    module.calls = module.asked = 0

    def convolve(features: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor:
        module.calls += 1
        return distort(native.convolve(features, weight, bias, geometry))

    def unavailable(device: torch.device) -> str | None:
        module.asked += 1
        return reason

    module.convolve, module.unavailable = convolve, unavailable
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backends.register(name, module.__name__)
    return module


def example() -> tuple[SparseConv3d, SparseTensor]:
    """A layer and an input."""
    return SparseConv3d(2, 3), SparseTensor.from_dense(torch.randn(1, 2, *SHAPE), random_mask(1, SHAPE, 0.5))


def test_status_lists_every_engine_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(monkeypatch, "good")
    add_engine(monkeypatch, "bad", "needs a quantum computer")
    backends.register("missing", "no_such_module_anywhere")
    status = backends.status()
    assert status["native"] is None
    assert status["good"] is None
    assert status["bad"] == "needs a quantum computer"
    assert "no_such_module_anywhere" in status["missing"]
    assert list(status) == list(registry.BACKENDS)


def test_a_library_may_fail_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for another CUDA or numpy raises more than ImportError when it is asked for."""
    engine = add_engine(monkeypatch, "broken")

    def unavailable(device: torch.device) -> str | None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    engine.unavailable = unavailable
    monkeypatch.setattr(registry, "PREFERRED", {"cpu": ("broken",)})
    assert "OSError: libcudart" in str(backends.status("cpu")["broken"])
    assert backends.current(CPU) is native


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, features: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


def _raise(features: Tensor) -> Tensor:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("distort", "reason"),
    [
        (lambda out: out + 1, "the output of a submanifold convolution differs from native's by 1"),
        (lambda out: out.flip(0), "the output of a submanifold convolution differs"),
        (lambda out: out * float("nan"), "differs from native's by nan"),
        (lambda out: out.double(), r"is torch\.float64 .* where native's is torch\.float32"),
        (lambda out: out[:, :2], "the self-test ended in RuntimeError: Mismatch in shape"),
        (lambda out: _WrongGradient.apply(out), "the gradient of the features of a submanifold convolution differs"),
        (lambda out: out.detach(), "the self-test ended in RuntimeError"),
        (_raise, "the self-test ended in RuntimeError: no kernel image"),
    ],
    ids=["offset", "order", "nan", "dtype", "shape", "gradient", "no gradient", "error"],
)
def test_an_engine_that_is_wrong_is_not_used(distort: Distort, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(monkeypatch, "wrong", distort=distort)
    with pytest.raises(ValueError, match=reason):
        backends.use("wrong")
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "wrong")
    with pytest.raises(ValueError, match=reason):
        backends.current(CPU)


def test_the_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = add_engine(monkeypatch, "wrong", distort=lambda out: out + 1)
    for _ in range(3):
        assert backends.status("cpu")["wrong"]
    assert (engine.calls, engine.asked) == (1, 1)


def test_the_self_test_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come in the middle of an inference, under autocast, and must not move the random numbers."""
    add_engine(monkeypatch, "good")
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert backends.status("cpu")["good"] is None
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trial_of_onednn_draws_no_random_numbers() -> None:
    """It comes with the first step of a process; a training in two processes sees what one process sees."""
    before = torch.get_rng_state()
    product.has_onednn.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_chosen_engine_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = add_engine(monkeypatch, "good")
    layer, x = example()
    assert backends.current(CPU) is native
    expected = layer(x).features
    backends.use("good")
    assert backends.current(CPU) is engine
    before = engine.calls
    assert torch.equal(layer(x).features, expected)
    assert engine.calls == before + 1
    backends.use(None)
    assert backends.current(CPU) is native


def test_the_environment_chooses_too_and_use_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = add_engine(monkeypatch, "good")
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "good")
    assert backends.current(CPU) is engine
    assert backends.chosen("cpu") == "good"
    backends.use("auto")
    assert backends.current(CPU) is native
    backends.use("native")
    assert backends.current(CPU) is native


def test_auto_takes_the_first_usable_engine_that_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(monkeypatch, "bad", "needs a quantum computer")
    engine = add_engine(monkeypatch, "good")
    add_engine(monkeypatch, "spare")
    assert backends.chosen("cpu") == "native", "nothing is preferred for this device"
    monkeypatch.setattr(registry, "PREFERRED", {"cpu": ("bad", "good", "spare")})
    monkeypatch.setattr(registry, "_engines", {})
    assert backends.current(CPU) is engine
    monkeypatch.setattr(registry, "PREFERRED", {"cpu": ("bad",)})
    assert backends.chosen("cpu") == "native"


def test_an_engine_may_serve_one_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen where it can be used, refused with tensors of the other device."""
    engine = add_engine(monkeypatch, "good")
    engine.unavailable = lambda device: None if device.type == "meta" else "for meta tensors only"
    monkeypatch.setattr(registry, "self_test_error", lambda engine, device: None)
    with pytest.raises(ValueError, match="cannot be used here: for meta tensors only"):
        backends.use("good")
    monkeypatch.setattr(registry, "_devices", lambda: [torch.device("meta"), CPU])
    backends.use("good")
    assert backends.current(torch.device("meta")) is engine
    with pytest.raises(ValueError, match=r"cannot be used on cpu tensors: for meta tensors only\. Use 'native'"):
        backends.current(CPU)


def test_unknown_unusable_and_doubled_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(monkeypatch, "bad", "needs a quantum computer")
    with pytest.raises(ValueError, match=r"must be one of native, bad, auto, got 'nativ'"):
        backends.use("nativ")
    with pytest.raises(ValueError, match=r"'bad' cannot be used here: needs a quantum computer\. Use 'native'"):
        backends.use("bad")
    assert backends.current(CPU) is native
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "bad")
    with pytest.raises(ValueError, match="quantum"):
        backends.current(CPU)
    for name in ("native", "auto"):
        with pytest.raises(ValueError, match=rf"'{name}' is registered already.*another name"):
            backends.register(name, "anything")


@pytest.mark.parametrize("elements", [1, 2**30], ids=["many blocks", "one block"])
def test_block_size_does_not_change_the_result(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Sequential(SparseConv3d(2, 3), SparseConv3d(3, 4, 2, 2)).double()
    x = SparseTensor.from_dense(torch.randn(2, 2, 11, 9, 8).double(), random_mask(2, (11, 9, 8), 0.5))

    def run() -> list[Tensor]:
        features = x.features.clone().requires_grad_()
        y = layer(x.replace(features)).features
        return [y, *torch.autograd.grad(y.square().sum(), [features, *layer.parameters()])]

    expected = run()
    monkeypatch.setattr(product, "MIN_BLOCK_ROWS", 7)
    monkeypatch.setitem(product.BLOCK_ELEMENTS, "cpu", elements)
    for ours, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not product.has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("occupancy", [0.3, 1.0])
@pytest.mark.parametrize("few", [0, 2**18], ids=["blocks", "at once"])
@pytest.mark.slow
def test_onednn_and_torch_multiply_alike(occupancy: float, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Sequential(SparseConv3d(2, 5), SparseConv3d(5, 4, 3, 2), SparseConv3d(4, 3))
    shape = (11, 9, 8)
    x = SparseTensor.from_dense(torch.randn(2, 2, *shape), random_mask(2, shape, occupancy))
    monkeypatch.setattr(product, "MIN_BLOCK_ROWS", 50)
    monkeypatch.setattr(product, "PLANNED_ROWS", 4)
    monkeypatch.setitem(product.BLOCK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(product, "PLANNED_WORK", 0)
    monkeypatch.setattr(gather, "FEW_ELEMENTS", few)
    asked = []

    def run() -> list[Tensor]:
        features = x.features.clone().requires_grad_()
        y = layer(x.replace(features)).features
        return [y, *torch.autograd.grad(y.square().sum(), [features, *layer.parameters()])]

    monkeypatch.setattr(product, "has_onednn", lambda: asked.append(True) or True)
    found = run()
    assert asked
    monkeypatch.setattr(product, "has_onednn", lambda: False)
    for ours, reference in zip(found, run(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [4, 60], ids=["blocks", "few rows"])
def test_second_derivatives_in_float32_are_those_of_float64(channels: int) -> None:
    x = SparseTensor.from_dense(torch.randn(1, 4, 12, 12, 12), random_mask(1, (12, 12, 12), 240 / channels / 120))
    layer = SparseConv3d(4, channels)

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        layer.to(dtype)
        features = x.features.to(dtype).requires_grad_()
        y = layer(x.replace(features)).features
        (first,) = torch.autograd.grad(y.pow(3).sum(), features, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [features, layer.weight])

    for ours, reference in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(ours, reference.float(), rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


@pytest.mark.parametrize("rows", [1, 5, 63, 64, 100, 255, 256, 700, 1595, 6376, 70001])
@pytest.mark.parametrize("elements", [1, 216, 600, 5000])
def test_blocks_cover_every_row_once(rows: int, elements: int) -> None:
    blocks = product.row_blocks(rows, elements, torch.device("cpu"))
    assert [n for block in blocks for n in range(rows)[block]] == list(range(rows))
    sizes = [block.stop - block.start for block in blocks[:-1]]
    assert all(size & (size - 1) == 0 for size in sizes), "shapes that oneDNN plans are few"


@pytest.mark.skipif(not product.has_onednn(), reason="this torch has no oneDNN")
def test_rows_are_rounded_to_few_numbers_where_that_is_worth_a_plan() -> None:
    like, work = torch.zeros(1), product.PLANNED_WORK
    with torch.no_grad():
        found = {rows: product.rounded_rows(rows, work, like) for rows in range(2, 600)}
        assert product.rounded_rows(77, work // 77 - 1, like) == 77
        wide = {rows: product.rounded_rows(rows, product.WIDE_ELEMENTS, like) for rows in (1, 2, 5)}
        assert wide == {1: 1, 2: 4, 5: 8}, "one row is read and written as fast by torch"
        assert product.rounded_rows(5, product.WIDE_ELEMENTS - 1, like) == 5
        assert product.rounded_rows(77, work, like.double()) == 77
    assert sorted(set(found.values())) == [4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768]
    assert all(rows <= to < max(1.5 * rows, 9) for rows, to in found.items())
    assert product.rounded_rows(77, work, like) == 77, "while a graph of the backward pass is built"


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), ((1, 2, 5), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_few_rows_at_once_are_the_same_as_blocks(
    kernel: int, stride: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = SparseTensor.from_dense(torch.randn(2, 3, 7, 6, 9).to(dtype), random_mask(2, (7, 6, 9), 0.3))
    layer = SparseConv3d(3, 4, kernel, stride).to(dtype)
    found = []
    for most in (gather.FEW_ELEMENTS, 0):
        monkeypatch.setattr(gather, "FEW_ELEMENTS", most)
        features = x.features.clone().requires_grad_()
        y = layer(x.replace(features)).features
        for wanted in ([features, *layer.parameters()], [features], [layer.weight]):
            found.append(torch.autograd.grad(y.float().square().sum(), wanted, retain_graph=True))
        found.append((y,))
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 5e-2, "atol": 5e-2}
    for once, blocks in zip(found[:4], found[4:], strict=True):
        for ours, reference in zip(once, blocks, strict=True):
            torch.testing.assert_close(ours, reference, **exact)
