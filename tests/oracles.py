"""The oracles: same as dense, same as whole, adjoint, less memory; and the inputs and tolerances they are used with.

They compare outputs and every gradient, of inputs and of parameters, and say which tensor is off, by how much and
where.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_memeff.memory import measure_peak

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (3e-2, 1e-2),
}
"""Floating-point type: (rtol, atol). The allowed error is ``atol + rtol * max |reference|`` over the whole tensor."""

Modules = tuple[nn.Module, nn.Module]


# Comparing


def assert_tensors_agree(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Compare tensors by name: type, shape, and values within :data:`TOLERANCES`; exactly if they are not floats.

    NaN and infinity never agree with anything. ``None`` (no gradient) agrees with ``None`` only.

    Raises:
        AssertionError: names every tensor that is off, the largest error, its place and both values.
    """
    faults = [f"only ours has {name}" for name in ours.keys() - reference.keys()]
    faults += [f"only the reference has {name}" for name in reference.keys() - ours.keys()]
    for name in reference.keys() & ours.keys():
        fault = _fault(ours[name], reference[name])
        if fault:
            faults.append(f"{name}: {fault}")
    if faults:
        raise AssertionError("\n".join(sorted(faults)))


def _fault(ours: Tensor | None, reference: Tensor | None) -> str:
    if ours is None or reference is None:
        return "" if ours is reference else f"ours is {_kind(ours)}, the reference {_kind(reference)}"
    if (ours.dtype, ours.shape) != (reference.dtype, reference.shape):
        return f"ours is {_kind(ours)}, the reference {_kind(reference)}"
    if not ours.is_floating_point():
        wrong, allowed, error = ours != reference, 0.0, (ours.double() - reference.double()).abs()
    else:
        for owner, tensor in (("ours", ours), ("the reference", reference)):
            if not bool(tensor.isfinite().all()):
                return f"{owner} has {int((~tensor.isfinite()).sum())} values that are NaN or infinite"
        rtol, atol = TOLERANCES[ours.dtype]
        allowed = atol + rtol * float(reference.abs().max()) if reference.numel() else atol
        error = (ours.double() - reference.double()).abs()
        wrong = error > allowed
    if not bool(wrong.any()):
        return ""
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return (
        f"off by {float(error.max()):.3g} at {list(place)} (ours {ours[place].item():.6g}, reference "
        f"{reference[place].item():.6g}, allowed {allowed:.3g}); {int(wrong.sum())} of {wrong.numel()} values are off"
    )


def _kind(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# Same as dense, same as whole


def assert_same_as_dense(
    ours: Callable[..., Any],
    dense: Callable[..., Any],
    *inputs: Any,
    modules: Modules | None = None,
    where: Tensor | None = None,
) -> None:
    """Whether a sparse (or otherwise thrifty) computation gives the dense one's outputs and gradients.

    Both are called with copies of the same inputs and the same random state. If they own modules, the dense weights are
    loaded strictly into ours first, and gradients of all parameters and the buffers afterwards are compared by name.

    Args:
        ours: takes the inputs, returns a tensor or a sequence of tensors (dense, to be comparable).
        dense: the reference, called likewise.
        *inputs: dense tensors; those with floating point get gradients. Other objects are passed as they are.
        modules: (ours, dense) modules whose parameters are compared; not needed if the callables are modules.
        where: boolean, broadcastable to the outputs: the places that are compared. Elsewhere ours must be zero.

    Raises:
        AssertionError: see :func:`assert_tensors_agree`.
    """
    pair = modules or (_as_module(ours), _as_module(dense))
    if pair[0] is not None and pair[1] is not None and pair[0] is not pair[1]:
        pair[0].load_state_dict(pair[1].state_dict(), strict=True)
    start = [copy.deepcopy(module.state_dict()) if module is not None else {} for module in pair]
    found = []
    for call, module, state in zip((ours, dense), pair, start, strict=True):
        if module is not None:
            module.load_state_dict(state)
        found.append(_observe(call, module, inputs, where))
    if where is not None:
        for name in [name for name in found[0] if name.startswith("output")]:
            outside = found[0][name].masked_select(~where.expand_as(found[0][name]))
            assert not bool(outside.any()), f"{name}: ours is not zero outside the places that are compared"
            found[1][name] = found[1][name] * where
    assert_tensors_agree(*found)


def assert_same_as_whole(
    parts: Callable[..., Any], whole: Callable[..., Any], *inputs: Any, modules: Modules | None = None
) -> None:
    """Whether a computation in parts (slabs, boxes, segments) gives the outputs and gradients of the whole at once.

    The network may be one and the same on both sides: pass it twice in ``modules``. See :func:`assert_same_as_dense`.
    """
    assert_same_as_dense(parts, whole, *inputs, modules=modules)


def _as_module(call: Any) -> nn.Module | None:
    return call if isinstance(call, nn.Module) else None


def _observe(
    call: Callable[..., Any], module: nn.Module | None, inputs: Sequence[Any], where: Tensor | None
) -> dict[str, Any]:
    """Outputs, gradients under a fixed cotangent, and buffers after one forward and backward pass."""
    copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    leaves = {f"gradient of input {n}": x for n, x in enumerate(copies) if _is_differentiable(x)}
    parameters = dict(module.named_parameters()) if module is not None else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(0)
    result = call(*copies)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    weighed = [(y * asymmetric(y.shape, y.dtype).to(y.device) * (1 if where is None else where)).sum() for y in outputs]
    if any(term.requires_grad for term in weighed):
        sum(term for term in weighed if term.requires_grad).backward()
    found: dict[str, Any] = {f"output {n}": y.detach() for n, y in enumerate(outputs)}
    found |= {name: leaf.grad for name, leaf in leaves.items()}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    buffers = module.named_buffers() if module is not None else ()
    return found | {f"buffer {name}": buffer.clone() for name, buffer in buffers}


def _is_differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


# Adjoint


def assert_adjoint(
    forward: Callable[..., Any],
    adjoint: Callable[..., Any] | None,
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
) -> None:
    """Whether ``<F x, y> == <x, F* y>``: forward and backward of a linear map prove each other.

    Args:
        forward: the linear map F; takes x (a tensor, or one argument per tensor), returns what y looks like.
        adjoint: its claimed adjoint F*, called likewise with y. ``None``: autograd's gradient of F is the claim.
        x: a point of F's domain, nowhere special (not zero).
        y: a point of its range; shapes must be those of ``F x``.

    Raises:
        AssertionError: the products differ, are NaN, or all vanish, so that nothing is shown.
    """
    xs, ys = _as_list(x), _as_list(y)
    leaves = [tensor.detach().clone().requires_grad_(adjoint is None) for tensor in xs]
    images = _as_list(forward(*leaves))
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (images, ys)]
    assert shapes[0] == shapes[1], f"F x has shapes {shapes[0]}, y {shapes[1]}"
    if adjoint is None:
        backs = list(torch.autograd.grad(images, leaves, ys, allow_unused=True, materialize_grads=True))
    else:
        backs = _as_list(adjoint(*ys))
    there, here = _product(images, ys), _product(xs, backs)
    scale = _norm(images) * _norm(ys) + _norm(xs) * _norm(backs)
    assert math.isfinite(scale), "F x or F* y has values that are NaN or infinite"
    assert scale > 0, "F x and F* y, or x and y, vanish: this shows nothing"
    rtol, _ = TOLERANCES[xs[0].dtype]
    error = abs(there - here)
    assert error <= rtol * scale, f"<F x, y> = {there:.12g} but <x, F* y> = {here:.12g}: off by {error:.3g}"


def _as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _product(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in zip(ours, theirs, strict=True))


def _norm(tensors: Sequence[Tensor]) -> float:
    return _product(tensors, tensors) ** 0.5


# Less memory


def assert_less_memory(
    cheap: Callable[[], Any],
    reference: Callable[[], Any],
    ratio: float,
    device: str | torch.device | None = None,
) -> tuple[int, int]:
    """Whether ``cheap()`` peaks at no more than ``ratio`` times the bytes of ``reference()``; returns both peaks."""
    peaks = []
    gc.collect()
    for call in (cheap, reference):
        with measure_peak(device) as meter:
            result = call()
        peaks.append(meter.peak_bytes)
        del result
    assert peaks[1] > 0, "the reference takes no memory: this shows nothing"
    share = peaks[0] / peaks[1]
    assert share <= ratio, f"{peaks[0]:,} bytes are {share:.3g} of the reference's {peaks[1]:,}, allowed {ratio:.3g}"
    return peaks[0], peaks[1]


# Inputs that hide nothing


def asymmetric(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Values in (-1, 1) all different, without any symmetry: no flip or swap of axes leaves them in place."""
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return ((steps * 0.6180339887498949).remainder(1) * 2 - 1).view(*shape).to(dtype)


def impulse(shape: Sequence[int], at: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """A volume (1, 1, ...) of zeros with a single one at ``at``: a layer answers with its kernel, right way round."""
    volume = torch.zeros(1, 1, *shape, dtype=dtype)
    volume[(0, 0, *at)] = 1
    return volume


def impulses(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Impulses at every corner and at one place off the middle of every axis, with their places."""
    ends = torch.cartesian_prod(*(torch.tensor([0, extent - 1]) for extent in shape)).view(-1, len(shape)).tolist()
    for at in [*ends, [extent // 3 for extent in shape]]:
        yield tuple(at), impulse(shape, at, dtype)


def fill_asymmetric(module: nn.Module) -> nn.Module:
    """Give every parameter of a module asymmetric values, so that a flipped or transposed kernel cannot hide."""
    for parameter in module.parameters():
        parameter.data.copy_(asymmetric(parameter.shape, parameter.dtype))
    return module
