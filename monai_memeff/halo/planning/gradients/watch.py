"""What a network's own code does with gradients while it is captured, and the autograd graph of its plain call."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint  # its CheckpointFunction was read in torch 2.6 to 2.14

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.reasons import place_of_frame, theirs
from monai_memeff.memory.checkpoint import moves_statistics_once

_HOOKS = {
    torch.Tensor.register_hook: "puts a hook on a tensor's gradient",
    torch.Tensor.retain_grad: "keeps the gradient of a tensor",
    torch.Tensor.register_post_accumulate_grad_hook: "puts a hook on a parameter's gradient",
}
_READ = {
    torch.Tensor.grad_fn.__get__: "grad_fn",
    torch.Tensor.is_leaf.__get__: "is_leaf",
    torch.Tensor.grad.__get__: "grad",
    torch.Tensor.retains_grad.__get__: "retains_grad",
}
_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


class Watch(TorchFunctionMode):
    """Keeps the autograd graph that one call of a network makes, and refuses what no graph shows.

    Args:
        network: about to be captured, with gradients enabled.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.outputs = network, list[Any]()
        self.leaves = dict[int, tuple[torch.Tensor, set[Any]]]()
        self._seen, self._thread = False, threading.get_ident()

    def __enter__(self) -> Watch:
        _refuse_hooks(self.network)
        self._handles = [
            self.network.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            self.network.register_forward_hook(self._end),
        ]
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_stand_ins(self.network))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Name the tensors that gradients are for: `torch.export` has put its own in their place."""
        if self._seen or threading.get_ident() != self._thread:
            return
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        for label, tensor in (*enumerate(pytree.tree_leaves((args, kwargs))), *named):
            if isinstance(tensor, torch.Tensor):
                self.leaves.setdefault(id(tensor), (tensor, set()))[1].add(label)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        if not torch.is_grad_enabled():
            raise NotPartitionableError(
                f"{type(module).__name__}: forward leaves gradients disabled when it returns; use "
                "`with torch.no_grad():`"
            )
        if not self._seen:
            self._seen, self.outputs = True, pytree.tree_leaves(output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result; refused if it looks at, or steps into, the way that gradients take."""
        if func in _HOOKS and args[0].requires_grad:
            raise NotPartitionableError(
                f"{place_of_frame(sys._getframe(1), self.network)}: forward {_HOOKS[func]}, which a run in parts "
                "computes part by part; do it outside of the network"
            )
        if func in _READ and _users(sys._getframe(1)):
            raise NotPartitionableError(
                f"{place_of_frame(sys._getframe(1), self.network)}: forward reads `{_READ[func]}` of a tensor, which a "
                "run in parts does not have; `requires_grad` and torch.is_grad_enabled() can be read"
            )
        return func(*args, **(kwargs or {}))


def _users(frame: types.FrameType | None) -> bool:
    """Whether somebody else's code than torch's reads, however many modes it passes through."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and theirs(frame.f_code.co_filename)


def _refuse_hooks(network: nn.Module) -> None:
    for path, module in network.named_modules():
        hooks = (hook for name in _MODULE_HOOKS for hook in getattr(module, name).values())
        if any(not (getattr(hook, "__module__", None) or "").startswith("torch.distributed") for hook in hooks):
            raise NotPartitionableError(
                f"{path or 'the network'} ({type(module).__name__}) has a backward hook, which would see the gradients "
                "of a part and take them for those of the whole; remove it"
            )
    for path, parameter in network.named_parameters():
        if parameter._backward_hooks:
            raise NotPartitionableError(
                f"parameter '{path}' has a hook on its gradient, which would see this rank's share of it; change "
                "gradients after backward, when they are summed"
            )


@contextlib.contextmanager
def _stand_ins(network: nn.Module) -> Iterator[None]:
    """Functions with a backward that is the derivative of their forward run as their forward, in this thread."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(checkpoint, "CheckpointFunction", lambda *given: _Checkpoint(network, *given)))
        stack.enter_context(_replaced(checkpoint, "_checkpoint_hook", lambda *given: _hook_of(network, *given)))
        swish = sys.modules.get("monai.networks.blocks.activation")
        if hasattr(swish, "SwishImplementation"):
            stack.enter_context(_replaced(swish, "SwishImplementation", _Swish))
        entered = "enters torch.inference_mode(), whose tensors no gradient goes through"
        enter = _refusing(network, entered, lambda thing: not thing.mode)  # as torch does
        stack.enter_context(_replaced(torch.inference_mode, "__enter__", enter))
        hooks = torch.autograd.graph.saved_tensors_hooks
        enter = _refusing(network, "changes what autograd saves by saved_tensors_hooks", _of_torch)
        stack.enter_context(_replaced(hooks, "__enter__", enter))
        yield


@contextlib.contextmanager
def nothing_saved() -> Iterator[None]:
    """A checkpoint, inside of a network that is captured or around it, keeps nothing of the capture."""
    set_tracing = torch._C._autograd._saved_tensors_hooks_set_tracing  # read in torch 2.11 and 2.14
    before = set_tracing(True)
    try:
        yield
    finally:
        set_tracing(before)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any, int], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original, threading.get_ident()))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _of_torch(hooks: Any) -> bool:
    """Whether hooks give back what was saved: torch's own for checkpoints and for keeping it in host memory."""
    return (getattr(hooks.pack_hook, "__module__", None) or "").startswith("torch.")


def _refusing(network: nn.Module, what: str, allowed: Callable[[Any], bool]) -> Callable[[Any, int], Any]:
    """A method that refuses where the network's code calls it."""

    def make(original: Any, thread: int) -> Any:
        def method(thing: Any, *args: Any) -> Any:
            if threading.get_ident() == thread and not allowed(thing):
                place = place_of_frame(sys._getframe(1), network)
                raise NotPartitionableError(f"{place}: forward {what}; leave it out")
            return original(thing, *args)

        return method

    return make


class _Checkpoint:
    """In the place of a reentrant checkpoint: it gives gradients only if an argument wants one."""

    def __init__(self, network: nn.Module, original: Any, thread: int) -> None:
        self.network, self.original, self.thread = network, original, thread

    def apply(self, run: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """What `run` returns."""
        if threading.get_ident() != self.thread:
            return self.original.apply(run, preserve, *args)
        wanted = any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        again = contextlib.nullcontext() if not wanted else _writing_no_buffers(self.network)
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()), again:
            return run(*args)


def _hook_of(network: nn.Module, original: Any, thread: int) -> Callable[..., Any]:
    """In the place of what keeps the values of a checkpoint that is not reentrant."""

    @contextlib.contextmanager
    def hook(*args: Any) -> Iterator[None]:
        here = threading.get_ident() == thread and torch.is_grad_enabled()
        once = _statistics(network) if any(map(moves_statistics_once, args)) else frozenset()
        with original(*args), _writing_no_buffers(network, once) if here else contextlib.nullcontext():
            yield

    return hook


@contextlib.contextmanager
def _writing_no_buffers(network: nn.Module, but: frozenset[str] = frozenset()) -> Iterator[None]:
    """Torch runs what is under a checkpoint a second time in backward, and so moves running statistics twice."""
    before = {name: (buffer, buffer._version) for name, buffer in network.named_buffers()}
    yield
    for name, buffer in ((name, buffer) for name, buffer in network.named_buffers() if name not in but):
        if name not in before or before[name][0] is not buffer or before[name][1] != buffer._version:
            raise NotPartitionableError(
                f"{place_of_frame(sys._getframe(), network)}: forward writes the buffer '{name}' under "
                "torch.utils.checkpoint, which writes it once more in backward where a run in parts does not; leave "
                "the checkpoint out (spatial_partition has checkpoint_segments), or put that layer in eval mode"
            )


def _statistics(network: nn.Module) -> frozenset[str]:
    """Names of the buffers that our own checkpoint lets move once."""
    norms = ((path, module) for path, module in network.named_modules() if isinstance(module, _NormBase))
    return frozenset(f"{path}.{name}".lstrip(".") for path, module in norms for name in module._buffers)


class _Swish:
    """In the place of MONAI's swish that saves memory."""

    def __init__(self, original: Any, thread: int) -> None:
        self.original, self.thread = original, thread

    def apply(self, x: torch.Tensor) -> Any:
        """The activation."""
        return x * torch.sigmoid(x) if threading.get_ident() == self.thread else self.original.apply(x)
