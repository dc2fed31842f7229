"""A fake CUDA device: tensors that say they lie on cuda:0, and the errors of a real one where devices are mixed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_has_compatible_shallow_copy_type")
_INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_HEALTH_CHECK = next(name for name in vars(torch.optim.Optimizer) if name.endswith("_graph_capture_health_check"))
_FACTORIES = frozenset(_device_constructors()) | {torch.from_numpy}


class _Storages:
    """A set of storages that forgets those that are freed."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known[key] = weakref.ref(storage, partial(self._freed, key))

    def _freed(self, key: int, reference: weakref.ref[torch.UntypedStorage]) -> None:
        if self._known.get(key) is reference:
            del self._known[key]

    def discard(self, tensor: Tensor) -> None:
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, tensor: Tensor) -> bool:
        return bool(self._known) and tensor.untyped_storage()._cdata in self._known


class PretendedGPU(TorchDispatchMode):
    """Knows which storages are "on the GPU" and watches every operation.

    All numbers are in host memory and all arithmetic is the CPU's. What is checked is what a first run on a GPU trips
    over: tensors made on the wrong device, devices mixed in one operation, an index on the GPU into a tensor on the
    host, numpy asked for a tensor on the GPU.

    Torch's own C++ makes helpers "on the device of its input", which it believes to be the CPU. Such tensors belong to
    whom they meet first; what Python makes belongs where Python said.
    """

    def __init__(self, of_another_thread: PretendedGPU | None = None) -> None:
        super().__init__()
        self.on_gpu = of_another_thread.on_gpu if of_another_thread else _Storages()
        self.undecided = of_another_thread.undecided if of_another_thread else _Storages()

    def put(self, value: Any, on_gpu: bool = True) -> Any:
        """Say where a tensor is; other values pass."""
        if isinstance(value, Tensor):
            self.undecided.discard(value)
            (self.on_gpu.add if on_gpu else self.on_gpu.discard)(value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        device, to_gpu = kwargs.get("device"), any(tensor in self.on_gpu for tensor in tensors)
        if to_gpu:
            self._refuse_mixtures(func.name(), args, tensors)
        if device is not None and device.type == "cuda":
            to_gpu, kwargs["device"] = True, CPU
        elif device is not None and device.type != "cpu":
            to_gpu = False
        result = func(*args, **kwargs)
        if to_gpu and func.name() != "aten::copy_":
            tree_map(self.put, result)
        elif device is not None and not tensors:
            self.undecided.add(result)
        return result

    def _refuse_mixtures(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor in self.undecided:
                self.put(tensor)
        on_host = [tuple(tensor.shape) for tensor in tensors if tensor.ndim > 0 and tensor not in self.on_gpu]
        if name in _INDEXING:
            if args[0] not in self.on_gpu:
                raise RuntimeError(f"{name}: indices must be on the CPU or on the device of the indexed tensor (cpu).")
        elif on_host and name not in _COPIES:
            raise RuntimeError(
                f"{name}: expected all tensors on one device, but those of shape {on_host} are on the CPU."
            )


class _WhatPythonMakes(TorchFunctionMode):
    """Decides where the results of Python's factories are: what they were told, else the CPU."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FACTORIES and isinstance(result, Tensor):
            self._gpu.undecided.discard(result)
        return result


class _Crossing(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gpu: PretendedGPU, to_gpu: bool) -> Tensor:
        ctx.gpu, ctx.to_gpu = gpu, to_gpu
        return gpu.put(tensor.clone(), to_gpu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gpu.put(grad.clone(), not ctx.to_gpu), None, None


class _StandIns:
    """What takes the place of torch's own functions; the originals are looked up when it is made."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self.gpu = gpu
        self.here = threading.local()
        self.load, self.prepare_autocast, self.run_thread = torch.load, torch.autocast.__init__, threading.Thread.run
        self.enabled, self.autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        self.device_of = Tensor.device.__get__  # type: ignore[attr-defined]
        self.to, self.deepcopy = Tensor.to, Tensor.__deepcopy__

    def table(self) -> list[tuple[Any, str, Any]]:
        """(owner, name, replacement)."""
        card = SimpleNamespace(name="fake", major=8, minor=6)
        return [
            (Tensor, "device", property(self.where)),
            (Tensor, "is_cuda", property(lambda tensor: tensor in self.gpu.on_gpu)),
            (Tensor, "to", lambda tensor, *args, **kwargs: self.moved(tensor, *args, **kwargs)),
            (Tensor, "cpu", lambda tensor, **_: self.moved(tensor, CPU)),
            (Tensor, "cuda", lambda tensor, *_, **__: self.moved(tensor, CUDA)),
            (Tensor, "new_tensor", lambda tensor, data, **kwargs: self.new_tensor(tensor, data, **kwargs)),
            (Tensor, "__deepcopy__", lambda tensor, memo: self.copied(tensor, memo)),
            (Tensor, "numpy", self.as_array(Tensor.numpy)),
            (Tensor, "__array__", self.as_array(Tensor.__array__)),
            (torch, "tensor", self.made(torch.tensor)),
            (torch, "as_tensor", self.made(torch.as_tensor)),
            (torch, "load", lambda file, map_location=None, **kwargs: self.load(file, map_location=CPU, **kwargs)),
            (torch, "is_autocast_enabled", lambda *kind: self.enabled(*(["cpu"] if kind else []))),
            (torch, "get_autocast_dtype", lambda _: self.autocast_dtype("cpu")),
            (torch.autocast, "__init__", lambda context, *args, **kwargs: self.autocast(context, *args, **kwargs)),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_properties", lambda *_: card),
            (torch.optim.Optimizer, _HEALTH_CHECK, lambda _: None),
            (threading.Thread, "run", lambda thread: self.watched(thread)),
        ]

    def where(self, tensor: Tensor) -> torch.device:
        return CUDA if tensor in self.gpu.on_gpu else self.device_of(tensor)

    def moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wanted = [a.device if isinstance(a, Tensor) else a for a in (*args, *kwargs.values())]
        device = next((torch.device(w) for w in wanted if isinstance(w, (str, torch.device))), self.where(tensor))
        # torch's hooks look the method up again by its name
        if getattr(self.here, "moves", False) or device.type not in ("cpu", "cuda"):
            return self.to(tensor, *args, **kwargs)
        crosses = device.type != self.where(tensor).type
        rest = [CPU if isinstance(a, (str, torch.device)) else a.dtype if isinstance(a, Tensor) else a for a in args]
        named = {key: CPU if key == "device" else value for key, value in kwargs.items()}
        self.here.moves = True
        try:
            result = self.to(tensor, *rest, **named)
        finally:
            self.here.moves = False
        return _Crossing.apply(result, self.gpu, device.type == "cuda") if crosses else result

    def new_tensor(self, tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": tensor.dtype, "device": self.where(tensor), **kwargs})

    def copied(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        result = self.deepcopy(tensor, memo)
        return self.gpu.put(result) if tensor in self.gpu.on_gpu else result

    def as_array(self, original: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def convert(tensor: Tensor, *args: Any, **kwargs: Any) -> np.ndarray:
            if tensor in self.gpu.on_gpu:
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu().")
            return original(tensor, *args, **kwargs)

        return convert

    def made(self, factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if device is None:
                return factory(data, *args, **kwargs)
            home = {} if isinstance(data, Tensor) else {"device": CPU}
            return self.moved(factory(data, *args, **home, **kwargs), device)

        return make

    def autocast(self, context: Any, device_type: str, dtype: Any = None, **kwargs: Any) -> None:
        """Mixed precision on the fake CUDA device is the CPU's, in bfloat16."""
        halves = {"device_type": "cpu", "dtype": torch.bfloat16} if device_type == "cuda" else {}
        self.prepare_autocast(context, **{"device_type": device_type, "dtype": dtype, **kwargs, **halves})

    def watched(self, thread: threading.Thread) -> None:
        with PretendedGPU(self.gpu):
            self.run_thread(thread)


@contextlib.contextmanager
def fake_cuda_device() -> Iterator[PretendedGPU]:
    """While it is entered, "cuda" can be used, and :class:`PretendedGPU` watches."""
    gpu = PretendedGPU()
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in _StandIns(gpu).table():
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(gpu)
        stack.enter_context(_WhatPythonMakes(gpu))
        yield gpu
