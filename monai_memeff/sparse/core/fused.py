"""Norm and activation in one step that keeps its input only, and features that are computed again, not kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Recompute = Callable[[], Tensor]

BLOCK_ELEMENTS = 2**18
"""Elements that the backward pass works on at a time on the CPU: a megabyte in float32 stays in the cache."""


@torch.compiler.disable  # what the backward pass reads of its own graph node does not exist in a traced one
def norm_act(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
    slope: float | Tensor = 0.0,
) -> tuple[Tensor, Recompute | None]:
    """``leaky_relu(batch_norm(features), slope)``, and how to compute it again from ``features`` without statistics.

    The graph keeps ``features`` (N, C) and per-channel numbers; what the backward pass of the activation needs is
    computed again. A layer that follows and would keep the result may keep the second value instead; then norm,
    activation and convolution together keep one tensor where two or three are usual.

    Args:
        features: (N, C), N at least 2 in training.
        weight: (C,) or None.
        bias: (C,) or None.
        running: mean and variance (C,), or None for both; updated in training.
        training: normalize with the statistics of ``features``.
        momentum: Weight of the new statistics in the running ones.
        eps: added to the variance.
        slope: Slope of the activation below zero: 0 is ReLU, another number leaky ReLU, learned (1,) or (C,) PReLU.

    Returns:
        (N, C) features, and a function without arguments that returns them again (None where no graph is built); it
        works until the backward pass has gone through the norm.
    """
    learned, fixed = (slope, 0.0) if isinstance(slope, Tensor) else (None, slope)
    result = _NormAct.apply(features, weight, bias, learned, *running, training, momentum, eps, fixed)
    return result, None if result.grad_fn is None else partial(_result_of, result.grad_fn)


def saved_for_recompute(features: Tensor, recompute: Recompute | None) -> AbstractContextManager[object]:
    """While it is entered, graphs that would keep ``features`` keep ``recompute`` instead."""
    if recompute is None or features.numel() == 0 or not torch.is_grad_enabled():
        return nullcontext()
    place, shape, dtype = features.data_ptr(), features.shape, features.dtype

    def pack(kept: Tensor) -> Tensor | Recompute:
        return recompute if kept.data_ptr() == place and kept.shape == shape else kept

    def unpack(kept: Tensor | Recompute) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept().to(dtype)

    return saved_tensors_hooks(pack, unpack)


class _NormAct(torch.autograd.Function):
    """Keeps the features, and the mean and the inverse standard deviation that were applied."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        learned: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        fixed: float,
    ) -> Tensor:
        result, mean, inverse = torch.native_batch_norm(
            features, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if not training:
            assert running_mean is not None
            assert running_var is not None
            mean, inverse = running_mean.clone(), (running_var + eps).rsqrt()
        ctx.save_for_backward(features, weight, bias, learned, mean, inverse)
        ctx.training, ctx.eps, ctx.fixed, ctx.kept, ctx.found = training, eps, fixed, None, None
        return _activate(result, fixed if learned is None else learned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, learned, mean, inverse = _kept_by(ctx)
        result, ctx.kept, ctx.found = ctx.found, None, None
        slope = ctx.fixed if learned is None else learned
        if torch.is_grad_enabled() or features.is_cuda or features.numel() <= BLOCK_ELEMENTS:
            before = _normalized(features, *_affine(mean, inverse, weight, bias)) if result is None else result
            bent = _activation_gradient(grad, before.to(grad.dtype), slope)
            found = _gradients(bent, features, weight, (mean, inverse), ctx.training, ctx.eps)
        else:
            affine = _affine(mean, inverse, weight, bias)
            found = _gradients_in_blocks(grad, features, affine, (mean, inverse), slope, ctx.training)
        given = (g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False))
        return *given, None, None, None, None, None, None


Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Of features, weight, bias and slope."""


def _gradients(
    bent: tuple[Tensor, Tensor | None],
    features: Tensor,
    weight: Tensor | None,
    moments: Pair,
    training: bool,
    eps: float,
) -> Gradients:
    """By torch's own operations, which can be differentiated once more; ``bent`` is the activation's gradient."""
    grad, of_slope = bent
    running = (None, None) if training else (moments[0], moments[1] ** -2 - eps)
    learns = weight is not None
    of_norm = torch.ops.aten.native_batch_norm_backward(
        grad, features, weight, *running, *moments, training, eps, [True, learns, learns]
    )
    return *of_norm, of_slope


def _gradients_in_blocks(
    grad: Tensor, features: Tensor, affine: Pair, moments: Pair, slope: float | Tensor, training: bool
) -> Gradients:
    """The same in blocks of rows, for large features: no other tensor of their size than the result."""
    (scale, shift), (mean, inverse) = affine, moments
    result = torch.empty_like(features, memory_format=torch.contiguous_format)
    of_shift, of_scale = torch.zeros_like(mean), torch.zeros_like(mean)
    of_slope = torch.zeros_like(slope) if isinstance(slope, Tensor) else None
    blocks = [part.split(max(BLOCK_ELEMENTS // features.shape[1], 1)) for part in (features, grad, result)]
    for x, g, out in zip(*blocks, strict=True):
        before, bent = _activation_gradient(g, torch.addcmul(shift, x, scale).to(g.dtype), slope)
        out.copy_(before)
        of_shift += out.sum(0, dtype=mean.dtype)
        of_scale += (out * (x - mean)).sum(0)
        if of_slope is not None:
            of_slope += bent
    of_scale *= inverse
    if not training:
        return result.mul_(scale), of_scale, of_shift, of_slope
    slant, offset = -inverse * of_scale / len(features), -of_shift / len(features)
    offset = offset - mean * slant
    for x, _, out in zip(*blocks, strict=True):
        out += torch.addcmul(offset, x, slant)
        out *= scale
    return result, of_scale, of_shift, of_slope


def _activate(features: Tensor, slope: float | Tensor) -> Tensor:
    """In place, but for a learned slope."""
    if isinstance(slope, Tensor):
        return torch.prelu(features, slope.to(features.dtype))
    return features.relu_() if slope == 0 else torch.nn.functional.leaky_relu_(features, slope)


def _activation_gradient(grad: Tensor, before: Tensor, slope: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of what the activation saw, (N, C) ``before``, and of a learned slope."""
    if not isinstance(slope, Tensor):
        if slope == 0:
            return torch.ops.aten.threshold_backward(grad, before, 0), None
        return torch.ops.aten.leaky_relu_backward(grad, before, slope, False), None
    of_before, of_slope = torch.ops.aten._prelu_kernel_backward(grad, before, slope.to(grad.dtype).expand(1, -1))
    wide = torch.promote_types(slope.dtype, torch.float32)  # many rows: their sum may be beyond half precision
    summed = of_slope.sum(0, dtype=wide) if len(slope) > 1 else of_slope.sum(dtype=wide)[None]
    return of_before, summed.to(slope.dtype)


def _affine(mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Pair:
    scale = inverse if weight is None else inverse * weight.detach()
    if bias is None:
        return scale, -mean * scale
    return scale, torch.addcmul(bias.detach(), mean, scale, value=-1)


def _normalized(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, features, scale)


def _result_of(node: Any) -> Tensor:
    """What a :class:`_NormAct` returned, from what it kept.

    Of small features the node keeps the result until its own backward pass, which follows: where it is above zero, so
    was what ReLU saw.
    """
    features, weight, bias, learned, mean, inverse = node.kept = _kept_by(node)
    before = _normalized(features.detach(), *_affine(mean, inverse, weight, bias))
    result = _activate(before, node.fixed if learned is None else learned.detach()).to(features.dtype)
    if learned is None and node.fixed == 0 and features.numel() <= BLOCK_ELEMENTS:
        node.found = result
    return result


def _kept_by(node: Any) -> tuple[Tensor, ...]:
    """Its saved tensors, which inside a checkpoint may be read only once."""
    return node.saved_tensors if node.kept is None else node.kept
