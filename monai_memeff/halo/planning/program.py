"""What a captured network is: values in order, each an input, a state tensor or one operator's result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree  # read in torch 2.6 to 2.14

from monai_memeff.halo.planning.errors import NotPartitionableError


@dataclass(frozen=True)
class Ref:
    """Stands for the value of that index in the arguments of a call."""

    index: int


@dataclass(frozen=True)
class Where:
    """Where a call comes from: the module's path, its class, and the user's line."""

    module: str = ""
    kind: str = ""
    line: str = ""

    def __str__(self) -> str:
        path = f"{self.module} ({self.kind})" if self.module else self.kind or "the network"
        return f"{path}, {self.line}" if self.line else path


@dataclass
class Value:
    """One tensor of the network at its whole size.

    Attributes:
        name: the graph's name.
        shape: whole shape.
        dtype: as in the plain network.
        target: the operator (an aten overload, or a word of a rule family such as "halo.moments"); None for inputs
            and state.
        args: positional arguments, tensors as `Ref`.
        kwargs: keyword arguments, tensors as `Ref`.
        pick: which of the operator's results this is, None if it has one.
        where: the module and line that made it.
        dependent: whether it depends on an input (else it is the same in every call).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    pick: int | None = None
    where: Where = Where()
    dependent: bool = False

    @property
    def operator(self) -> str:
        """The operator's name as a reader knows it."""
        return str(self.target).removeprefix("aten.") if self.target is not None else self.name

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n

    def refs(self) -> list[int]:
        """Indices of the tensors it is made from, in order, repeated if used twice."""
        return [leaf.index for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Ref)]


@dataclass
class Program:
    """A captured network.

    Attributes:
        values: in an order in which each follows what it is made from.
        inputs: value index of every tensor among the flattened call arguments, by its position there.
        state: value index -> name of the parameter, buffer or constant tensor in the module.
        constants: tensors captured that no name of the module reaches, by name.
        outputs: value index (`Ref`) or plain object for every leaf of what the network returns.
        output_spec: how the leaves are put together.
        mutations: buffer name -> value index of its new content (training); streaming leaves buffers as they are.
        input_mutations: position of the argument -> value index of its new content.
        call_spec: the structure of the arguments the program was captured with.
    """

    values: list[Value] = field(default_factory=list)
    inputs: dict[int, int] = field(default_factory=dict)
    state: dict[int, str] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    output_spec: Any = None
    mutations: dict[str, int] = field(default_factory=dict)
    input_mutations: dict[int, int] = field(default_factory=dict)
    call_spec: Any = None

    def add(self, value: Value) -> Ref:
        """Append a value and return its reference."""
        self.values.append(value)
        return Ref(len(self.values) - 1)

    def __getitem__(self, ref: Ref | int) -> Value:
        return self.values[ref.index if isinstance(ref, Ref) else ref]

    def wanted(self) -> list[int]:
        """Indices of the values the network returns or writes into its inputs."""
        found = [r.index for r in self.outputs if isinstance(r, Ref)] + list(self.input_mutations.values())
        return list(dict.fromkeys(found))


def check_memory(program: Program, flat: Sequence[Any], state: Iterable[torch.Tensor]) -> None:
    """Refuse arguments that the network changes if other arguments, or its own tensors, lie in the same memory.

    Raises:
        NotPartitionableError: the change would be seen in a plain call, but not in parts.
    """
    for position in program.input_mutations:
        mine = _storage(flat[position])
        others = [x for i, x in enumerate(flat) if i != position and isinstance(x, torch.Tensor)]
        if any(_storage(x) == mine for x in (*others, *state)):
            raise NotPartitionableError(
                f"{program[program.input_mutations[position]].where}: the network changes its argument {position} in "
                "place, and another argument or a tensor of the network shares its memory; pass a copy"
            )


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def leaves(tree: Any) -> Iterator[Any]:
    """Leaves of nested lists, tuples and dicts, in order."""
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item)
    else:
        yield tree


def fill(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """The same tree with every leaf replaced."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(fill(item, fn) for item in tree)
    if isinstance(tree, dict):
        return {key: fill(item, fn) for key, item in tree.items()}
    return fn(tree)


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of a call's arguments and their structure."""
    return pytree.tree_flatten((args, kwargs))


def unflatten(flat: list[Any], spec: Any) -> Any:
    """Put leaves together again."""
    return pytree.tree_unflatten(flat, spec)
