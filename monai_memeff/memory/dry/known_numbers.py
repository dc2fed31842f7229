"""Tensors that code makes from numbers alone: their content is known where a network runs on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor  # read in torch 2.6 to 2.14
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FEW = 4096
"""Elements up to which such a tensor's content is computed."""
_GIVING = frozenset(  # numbers, copied out of the tensor
    (
        *("item", "tolist", "equal", "is_nonzero", "allclose", "__bool__", "__int__", "__float__", "__complex__"),
        *("__index__", "__contains__", "__format__", "__repr__"),
    )
)
_SIZED = frozenset(  # what stands behind the first tensor are sizes, counts, places or a value
    (
        *("pad", "view", "reshape", "expand", "repeat", "tile", "interpolate", "narrow", "roll", "select", "unfold"),
        *("split", "chunk", "tensor_split", "new_zeros", "new_ones", "new_full", "unflatten", "broadcast_to"),
        *("__getitem__", "__setitem__"),
    )
)
_MAKING = frozenset(("zeros", "ones", "full", "rand", "randn", "arange", "linspace", "eye"))
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)


_COUNTING = frozenset(  # whose result's size depends on the content
    ("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "repeat_interleave", "bincount")
)


class _UnknownError(Exception):
    """Content that another run would not have."""


class _Repeatable(TorchDispatchMode):
    """Refuses random numbers, and memory that nothing was written into."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        if torch.Tag.nondeterministic_seeded in func.tags or func.__name__.startswith(("empty", "new_empty", "resize")):
            raise _UnknownError
        return func(*args, **(kwargs or {}))


class KnownNumbers(TorchFunctionMode):
    """Computes the content of such tensors beside the tensors without memory, so that code may read it.

    ``torch.tensor(x.shape)`` depends on no value of an input. What is computed from it is known too, until something
    that is not known is written into it. Torch's count of writes to a tensor and its views tells, and, as it
    counts none to lists, what the function may write into.
    """

    def __init__(self) -> None:
        super().__init__()
        self._contents: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._writes: dict[int, int] = {}  # of the contents' memory: how often it was written to when it was last known

    def content(self, x: torch.Tensor) -> torch.Tensor | None:
        """The content of a tensor, None if it is not known."""
        ref, real = self._contents.get(id(x), (None, None))
        if ref is None or real is None or ref() is not x:
            return None
        return real if self._writes[_memory(real)] == _version(x) else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's result; numbers where it gives the content of such a tensor."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = [(x, self.content(x)) for x in tensors_in((args, kwargs))]
        known = {id(x): real for x, real in given if real is not None}
        all_known = all(real is not None for _, real in given)
        if given and all_known and (name in _GIVING or _is_counting(name, args, known)):
            return self._as_made(_real(func, args, kwargs, known))
        if known and name in _SIZED | _MAKING:
            first = int(name in _SIZED)
            args, kwargs = (*args[:first], *_as_numbers(args[first:], known)), _as_numbers(kwargs, known)
            args = args if all_known else self._without_masks(name, args, known)
        result = func(*args, **kwargs)
        result = list(result) if name == "__iter__" else result
        made = args[0] if name == "__setitem__" else result
        if all_known:
            self._follow(func, args, kwargs, known, made)
        followed = set(map(id, tensors_in(made))) if all_known else set()
        self._forget(
            known[id(x)] for x in tensors_in(_written(func, name, args, kwargs)) if id(x) in known.keys() - followed
        )
        return iter(result) if name == "__iter__" else result

    def _forget(self, contents: Iterable[torch.Tensor]) -> None:
        self._writes.update((_memory(real), -1) for real in contents)

    def _as_made(self, results: Any) -> Any:
        """Tensors among results as code makes them from numbers, so that they are in what is captured."""

        def made(real: torch.Tensor) -> torch.Tensor:
            with _python_dispatch._disable_current_modes():
                numbers = real.tolist()
            flat = self.__torch_function__(torch.tensor, (), (numbers,), {"dtype": real.dtype})
            shaped: torch.Tensor = self.__torch_function__(torch.Tensor.reshape, (), (flat, tuple(real.shape)))
            return shaped

        return tree_map_only(torch.Tensor, made, results)

    def _without_masks(self, name: str, args: tuple[Any, ...], known: dict[int, torch.Tensor]) -> tuple[Any, ...]:
        """Known masks in an index as the places where they are true, which is what torch makes of them."""
        if name not in ("__getitem__", "__setitem__"):
            return args
        index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
        if not any(_is_mask(i, known) for i in index):
            return args
        found: list[Any] = []
        for i in index:
            found += self._as_made(_places(known[id(i)])) if _is_mask(i, known) else [i]
        return (args[0], tuple(found), *args[2:])

    def _follow(self, func: Any, args: Any, kwargs: Any, known: dict[int, torch.Tensor], result: Any) -> None:
        """Compute what a function made, or wrote, from known tensors."""
        made = list(tensors_in(result))
        with torch._C.DisableTorchFunction():
            if not made or not all(map(_is_small, made)):
                return
        try:
            content = _real(func, args, kwargs, known)
        except _UnknownError:
            return
        reals = list(tensors_in(known[id(result)] if content is None else content))
        with torch._C.DisableTorchFunction():
            for x, real in zip(made, reals, strict=True):
                if x.shape == real.shape and x.dtype == real.dtype:
                    self._contents[id(x)] = (weakref.ref(x), real)
                    self._writes[_memory(real)] = _version(x)


def _written(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function may write into: of lists, and of running statistics, torch counts no writes."""
    if "norm" in name or name.startswith("_fused"):
        return args, kwargs
    schema = getattr(func, "_schema", None)
    if schema is not None:
        places = [
            (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        return [args[i] if i < len(args) else kwargs.get(key) for i, key in places]
    in_place = name.endswith("_") and not name.endswith("__")
    return [args[:1] if in_place else None, kwargs.get("self") if in_place else None, kwargs.get("out")]


def _is_small(x: torch.Tensor) -> bool:
    plain = isinstance(x, FakeTensor) and x.layout == torch.strided and x.device.type == "cpu" and not x.is_inference()
    return plain and all(isinstance(n, int) for n in x.shape) and x.numel() <= FEW


def _real(func: Any, args: Any, kwargs: Any, known: dict[int, torch.Tensor]) -> Any:
    """The function's result on the contents."""
    args, kwargs = tree_map_only(torch.Tensor, lambda x: known[id(x)], (args, kwargs))
    with _python_dispatch._disable_current_modes(), torch.no_grad(), _Repeatable():
        result = func(*args, **kwargs)
        return list(result) if hasattr(result, "__next__") else result


def _is_mask(index: Any, known: dict[int, torch.Tensor]) -> bool:
    real = known.get(id(index)) if isinstance(index, torch.Tensor) else None
    return real is not None and real.dtype == torch.bool and real.dim() > 0


def _places(mask: torch.Tensor) -> list[torch.Tensor]:
    with _python_dispatch._disable_current_modes():
        return list(mask.nonzero(as_tuple=True))


def _is_counting(name: str, args: tuple[Any, ...], known: dict[int, torch.Tensor]) -> bool:
    """Whether a function of known tensors has a result whose size depends on their content."""
    if name == "where":
        return len(args) == 1
    indices = args[1] if name == "__getitem__" and isinstance(args[1], tuple) else args[1:2]
    return name in _COUNTING or (name == "__getitem__" and any(_is_mask(i, known) for i in indices))


def _as_numbers(tree: Any, known: dict[int, torch.Tensor]) -> Any:
    """Whole numbers in the place of known tensors of one, also in slices."""
    if isinstance(tree, torch.Tensor):
        real = known.get(id(tree))
        if real is None or real.dim() or real.dtype not in _WHOLE:
            return tree
        with _python_dispatch._disable_current_modes():
            return int(real)
    if isinstance(tree, slice):
        return slice(*(_as_numbers(end, known) for end in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, dict):
        return {key: _as_numbers(value, known) for key, value in tree.items()}
    return type(tree)(_as_numbers(item, known) for item in tree) if type(tree) in (list, tuple) else tree


def _version(x: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return x._version


def _memory(real: torch.Tensor) -> int:
    return real.untyped_storage()._cdata


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested lists, tuples and dictionaries, and of slices."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))
    elif isinstance(tree, slice):
        yield from tensors_in([tree.start, tree.stop, tree.step])
