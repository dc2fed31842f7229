"""How calls of a partitioned network are led to its plan while the module itself stays as it is.

`nn.Module.__call__` hands over to the instance's `_compiled_call_impl` if there is one, before any hook runs (read in
torch 2.6 to 2.14). Hooks of the root and of inner modules are part of the captured network, so they see whole tensors
and must not run on parts. Hooks of torch.distributed (FSDP2) gather and free parameters; they run around the plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from monai_memeff.halo.planning.errors import NotPartitionableError

ROUTED = ("_compiled_call_impl", "forward")


def lead(network: nn.Module, call: Callable[..., Any], forward: Callable[..., Any]) -> None:
    """Lead calls of the network to `call` and of its `forward` to `forward`, and refuse calls of inner modules."""
    network.__dict__.update(_compiled_call_impl=call, forward=forward)
    for name, module in network.named_modules():
        if module is not network and not isinstance(module.__dict__.get("_compiled_call_impl"), _Refusal):
            module.__dict__["_compiled_call_impl"] = _Refusal(name, module.__dict__.get("_compiled_call_impl"))


class _Refusal:
    """Stands where an inner module is called: outside the network it would see a part and take it for the whole."""

    def __init__(self, name: str, before: Callable[..., Any] | None) -> None:
        self.name, self.before = name, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotPartitionableError(
            f"Module '{self.name}' of a partitioned network was called by itself; call the whole network, or "
            f"unpartition it first."
        )


class _InOneThread:
    """Stands where a network is called while this thread makes its plan."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.thread = network, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            raise NotPartitionableError(
                "A partitioned network was called in a thread while another one makes its plan: call it in one thread."
            )
        return self.network._call_impl(*args, **kwargs)


def release(network: nn.Module) -> None:
    """Undo `lead`."""
    for name in ROUTED:
        network.__dict__.pop(name, None)
    for module in network.modules():
        found = module.__dict__.get("_compiled_call_impl")
        if isinstance(found, _Refusal):
            module.__dict__.pop("_compiled_call_impl")
            if found.before is not None:
                module.__dict__["_compiled_call_impl"] = found.before


@contextmanager
def plain(network: nn.Module) -> Iterator[None]:
    """The network as its author wrote it, for capture: nothing led elsewhere, hooks of torch.distributed set aside.

    Calls of other threads are refused: they would take their part for the whole.
    """
    kept = [(m, {k: m.__dict__.pop(k) for k in ROUTED if k in m.__dict__ and _ours(m, k)}) for m in network.modules()]
    network.__dict__["_compiled_call_impl"] = _InOneThread(network)
    hooks = [(table, dict(table)) for table in (network._forward_pre_hooks, network._forward_hooks)]
    for table, entries in hooks:
        for key, hook in entries.items():
            if _of_distributed(hook):
                del table[key]
    try:
        yield
    finally:
        for table, entries in hooks:
            table.clear()
            table.update(entries)
        network.__dict__.pop("_compiled_call_impl", None)
        for module, attributes in kept:
            module.__dict__.update(attributes)


@contextmanager
def with_parameters(network: nn.Module) -> Iterator[None]:
    """Parameters in the place of tensors that `torch.func.functional_call` put there: torch.export takes no others."""
    tables = [(m._parameters, name, t) for m in network.modules() for name, t in m._parameters.items()]
    others = [(table, name, t) for table, name, t in tables if t is not None and not isinstance(t, nn.Parameter)]
    made = {id(t): nn.Parameter(t.detach(), t.requires_grad) for _, _, t in others}
    try:
        for table, name, tensor in others:
            table[name] = made[id(tensor)]
        yield
    finally:
        for table, name, tensor in others:
            table[name] = tensor


def refuse_transforms(network: nn.Module, values: Iterable[Any]) -> None:
    """Refuse calls under `torch.func.grad`, `vmap` and forward-mode differentiation, whose values are of other kinds.

    Raises:
        NotPartitionableError: on every rank that runs the transform.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # read in torch 2.6 to 2.14
    if not transformed and forward_ad._current_level >= 0:
        tensors = (t for t in (*values, *network.parameters()) if isinstance(t, torch.Tensor))
        transformed = any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if transformed:
        raise NotPartitionableError(
            "A partitioned network was called under a transform of torch.func (grad, vjp, vmap) or forward-mode "
            "differentiation; use backward() or torch.autograd.grad, or a copy that is not partitioned."
        )


def _ours(module: nn.Module, name: str) -> bool:
    """Whether an attribute leads calls elsewhere: ours, or `module.compile()`, which computes what the module does."""
    return name == "_compiled_call_impl" or "_memeff_partition" in module.__dict__


def _of_distributed(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed")


def sharded_inside(network: nn.Module) -> str | None:
    """Name of an inner module to which `fully_shard` was applied, if any."""
    for name, module in network.named_modules():
        if name and any(_of_distributed(hook) for hook in module._forward_pre_hooks.values()):
            return name
    return None


def before(network: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Run torch.distributed's hooks that precede the root's forward."""
    for key, hook in list(network._forward_pre_hooks.items()):
        if not _of_distributed(hook):
            continue
        if key in network._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(network, args, kwargs) or (args, kwargs)
        else:
            found = hook(network, args)
            args = args if found is None else found if isinstance(found, tuple) else (found,)
    return args, kwargs


def after(network: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Run torch.distributed's hooks that follow the root's forward."""
    for key, hook in list(network._forward_hooks.items()):
        if not _of_distributed(hook):
            continue
        found = (
            hook(network, args, kwargs, output)
            if key in network._forward_hooks_with_kwargs
            else hook(network, args, output)
        )
        output = output if found is None else found
    return output


def has_root_hooks(network: nn.Module) -> bool:
    """Whether somebody's hooks surround the root's forward."""
    tables = (network._forward_pre_hooks, network._forward_hooks)
    return any(not _of_distributed(hook) for table in tables for hook in table.values())
