"""Recompute instead of remember: activation checkpointing whose second forward pass leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from monai_memeff.memory.views import View, close_view, open_view


def checkpoint(
    function: Callable[..., Any], *args: Any, batch_norm_once: bool = True, preserve_rng: bool = True
) -> Any:
    """Run ``function(*args)`` without keeping its activations; the backward pass runs it once more to get them back.

    The result and all gradients are those of the plain call. Memory falls from everything ``function`` would save to
    its inputs and outputs; the price is one more forward pass. This is ``torch.utils.checkpoint`` in its non-reentrant
    form, so inputs may be any Python objects, nested checkpoints and ``torch.autograd.grad`` work, and autocast is
    restored for the second pass.

    A second forward pass would also update the running statistics of batch normalization twice. It does not here: in
    the recomputation every normalization layer called as a module works on copies of its running buffers. Inside
    ``torch.compile`` the compiler does the same by itself, in torch releases that trace checkpoints with buffer updates
    (2.13 does; 2.6 runs them uncompiled and updates twice).

    Method: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, section 3.

    Args:
        function: what to run; a module, or any callable that does the same work when it is called again.
        *args: its arguments; only tensors among them receive gradients.
        batch_norm_once: keep running statistics as one forward pass leaves them. ``False`` is torch's own behavior.
        preserve_rng: restore the random state for the second pass, so that dropout draws the same mask. ``False`` saves
            a little time where nothing is random.

    Returns:
        What ``function(*args)`` returns.

    Raises:
        torch.utils.checkpoint.CheckpointError: in the backward pass, if the second pass saved other tensors than the
            first.

    Examples:
        >>> x = torch.rand(4, requires_grad=True)
        >>> checkpoint(torch.exp, x).sum().backward()
        >>> torch.equal(x.grad, x.exp())
        True
    """
    if not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng}
    # The compiler accepts no Python context here.
    if batch_norm_once and not torch.compiler.is_compiling():
        options["context_fn"] = _plain_then_recompute
    return torch_checkpoint(function, *args, **options)


def _plain_then_recompute() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _RunningStatisticsUntouched()


def moves_statistics_once(frame: Any) -> bool:
    """Whether a frame of torch's checkpoints belongs to :func:`checkpoint` with ``batch_norm_once``.

    The context of the second pass is in the closure of what the frame runs then (read in torch 2.6 to 2.14); where a
    release keeps it elsewhere, the answer is no.
    """
    for cell in getattr(getattr(frame, "recompute_fn", None), "__closure__", None) or ():
        with suppress(ValueError):  # a cell without content
            if isinstance(cell.cell_contents, _RunningStatisticsUntouched):
                return True
    return False


class _RunningStatisticsUntouched(AbstractContextManager[None]):
    """While it is entered, normalization layers of this thread update copies of their running buffers.

    The copies are put in place rather than left out, because the second pass must save as many tensors as the first.
    torch enters one instance again for every backward pass through the same graph, and nests it for nested
    checkpoints; so what is in place is kept on a stack.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Any, View, list[_NormBase]]] = []

    def __enter__(self) -> None:
        view, changed = View(), list[_NormBase]()

        def put_copies_in_place(module: nn.Module, _inputs: Any) -> None:
            if not view.is_mine() or not isinstance(module, _NormBase) or module in changed:
                return
            if module.training and module.track_running_stats:
                changed.append(module)
                open_view(module, view)
                module._buffers.update({k: own.clone() for k, own in module._buffers.items() if own is not None})

        self._entries.append((register_module_forward_pre_hook(put_copies_in_place), view, changed))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        handle, view, changed = self._entries.pop()
        handle.remove()
        for module in changed:
            close_view(module, view)
