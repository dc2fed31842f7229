"""What a rule is: how one operator's rows are computed from rows of its inputs, for streaming and for ranks alike.

How an executor uses a rule. `bind` (rules/__init__.py) turns every `Value` of a program into a `Step`:

* ``step.inputs`` are the indices of the values it reads, and ``step.reads[i]`` the *layout* in which it reads input i;
  ``step.out`` is the layout of its result. The producer's own layout may differ: `layout.source_box` says which native
  rows contain a wanted box, and `layout.crop` cuts them to it. Correctness never depends on the choice of a layout.
* ``step.needs(box)`` gives, for a box of output rows, the boxes of input rows as a tuple of `Read` (several of one
  input where the operator wraps round; none where only padding is needed; a box may be empty, then give a tensor of
  no rows).
* ``step.compute(tensors, reads, box, env)`` gives those output rows from the tensors of these reads, in that order. It
  is made of differentiable torch operators, pads at the volume's ends only, and depends on nothing else.
* A `Reduction` has an output that is not spread where its input is: ``partial(tensor, box, env)`` for the rows of any
  box of ``reads[0]``, ``combine(a, b)`` of two partial results (tuples of small tensors, associative up to rounding,
  combined in the order of the rows), then ``finish(state, env)``. ``compute`` does the three at once on whole inputs.
* A `Whole` step runs the operator itself on whole inputs. Its output may be spread afterwards (``out``).

``env`` is an `Env`: the working device and the seed of the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Dim, Layout, along, unspread
from monai_memeff.halo.planning.program import Ref, Value, fill

State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Env:
    """What a step may know besides its inputs.

    Attributes:
        device: where the work happens.
        seed: The seed of this call's random numbers.
    """

    device: torch.device
    seed: int = 0


@dataclass(frozen=True)
class Read:
    """Rows `box` of the step's input number `source`."""

    source: int
    box: Box


@dataclass(frozen=True)
class Context:
    """What a rule may know when it is bound.

    Attributes:
        axes: the split spatial axes, e.g. (0,) or (0, 1).
        dims: number of spatial dimensions of the volume.
        sizes: numbers of rows that tensors spread by default may have (to tell a volume from a table of weights).
    """

    axes: tuple[int, ...]
    dims: int
    sizes: frozenset[int] = frozenset()

    def whole(self, shape: Sequence[int]) -> Layout:
        """The layout of a tensor that is not spread."""
        return unspread(shape, len(self.axes))

    def default(self, shape: Sequence[int], offset: int | None = None) -> Layout:
        """Spread along the spatial dimensions that are cut, where they have two rows or more."""
        first = len(shape) - self.dims if offset is None else offset
        where = {i: first + a for i, a in enumerate(self.axes) if 0 <= first + a < len(shape) and shape[first + a] > 1}
        return along(shape, where, len(self.axes))

    def volume(self, shape: Sequence[int]) -> bool:
        """Whether a tensor made from no spread tensor is worth spreading: it has a volume's rows and many elements."""
        if len(shape) != self.dims + 2:
            return False
        size = 1
        for n in shape:
            size *= n
        return size >= 4096 and any(shape[2 + a] in self.sizes for a in self.axes)


class Step:
    """One value with its rule. The default rule maps rows one to one (pointwise)."""

    heavy = False  # worth storing: computing it twice costs more than keeping it

    def __init__(self, value: Value, inputs: Sequence[int], reads: Sequence[Layout], out: Layout) -> None:
        self.value, self.inputs, self.reads, self.out = value, tuple(inputs), tuple(reads), out

    def needs(self, box: Box) -> tuple[Read, ...]:
        """The input rows that output rows `box` are made from."""
        return tuple(Read(i, self.same(i, box)) for i in range(len(self.inputs)))

    def same(self, source: int, box: Box) -> Box:
        """The box of an input whose rows are the output's, where it is spread."""
        layout = self.reads[source]
        return tuple((0, 1) if layout.places[a] is None else r for a, r in enumerate(box))

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """Output rows `box` from the rows that `needs` named."""
        return call(self.value, tensors, env)

    def work(self) -> int | None:
        """Multiplications that the whole result takes, where they are counted."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value.name}: {self.value.operator})"


class Reduction(Step, ABC):
    """A step that combines partial results of all rows."""

    heavy = True

    def needs(self, box: Box) -> tuple[Read, ...]:
        """All rows."""
        return tuple(Read(i, layout.whole) for i, layout in enumerate(self.reads))

    @abstractmethod
    def partial(self, tensor: torch.Tensor, box: Box, env: Env) -> State:
        """Small tensors that stand for the rows `box` of the first input."""

    @abstractmethod
    def combine(self, a: State, b: State) -> State:
        """The partial results of two sets of rows, a's rows before b's."""

    @abstractmethod
    def finish(self, state: State, env: Env) -> torch.Tensor:
        """The result."""

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The result from whole inputs."""
        return self.finish(self.partial(tensors[0], self.reads[0].whole, env), env)


class Whole(Step):
    """The operator itself on whole inputs: exact for anything deterministic."""

    heavy = True

    def needs(self, box: Box) -> tuple[Read, ...]:
        """All rows of every input."""
        return tuple(Read(i, layout.whole) for i, layout in enumerate(self.reads))

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The operator's result; its inputs lie in memory as the plain network's do when they are contiguous."""
        gates = _gates(self.value, tensors)
        if _by_memory(self.value):
            tensors = [t.contiguous() for t in tensors]
        result = super().compute(tensors, reads, box, env)
        del gates
        return result


def _by_memory(value: Value) -> bool:
    return "as_strided" in str(value.target)


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _gates(value: Value, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """In a dry run what a recurrent layer takes beside its result: its gates and two states of every step at once.

    Measured on a CPU in torch 2.14; operators without memory do not take it.
    """
    count = GATES.get(str(value.target).split(".")[1]) if "aten." in str(value.target) else None
    if count is None or tensors[0].device.type != "meta":
        return None
    states = tensors[2:4] if str(value.target).endswith(".data") else tensors[1:3]  # packed: after the batch sizes
    hidden = max(t.shape[-1] for t in states[: 2 if count == GATES["lstm"] else 1])
    steps = tensors[0].numel() // max(tensors[0].shape[-1], 1)
    return tensors[0].new_empty((count + 2) * steps * hidden)


class WholeOf(Whole):
    """A step for which torch has no operator of its own (a norm taken apart, say), on whole inputs.

    Args:
        step: computes the result; none of its inputs is spread.
        out: how the result is spread afterwards.
    """

    def __init__(self, step: Step, out: Layout) -> None:
        super().__init__(step.value, step.inputs, step.reads, out)
        self.step = step

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The result from whole inputs."""
        everything = self.step.out.whole
        return self.step.compute(tensors, self.step.needs(everything), everything, env)


def call(value: Value, tensors: Sequence[torch.Tensor], env: Env, **override: Any) -> torch.Tensor:
    """The value's operator with its tensors replaced in order of appearance; `device` arguments become env's."""
    queue = iter(tensors)

    def leaf(x: Any) -> Any:
        if isinstance(x, Ref):
            return next(queue)
        return env.device if isinstance(x, torch.device) else x

    args, kwargs = fill(value.args, leaf), fill(value.kwargs, leaf)
    kwargs.update(override)
    result = value.target(*args, **kwargs)
    return result if value.pick is None else result[value.pick]


Binder = Callable[[Value, Sequence[Layout], Context], Step]


def arguments(value: Value) -> dict[str, Any]:
    """The call's arguments by the names of its schema, defaults filled in."""
    schema = value.target._schema
    found: dict[str, Any] = {}
    for i, arg in enumerate(schema.arguments):
        if i < len(value.args):
            found[arg.name] = value.args[i]
        elif arg.name in value.kwargs:
            found[arg.name] = value.kwargs[arg.name]
        else:
            found[arg.name] = arg.default_value if arg.has_default_value() else None
    return found


def aligned(shape: Sequence[int], out: Layout) -> Layout:
    """The layout in which a tensor that broadcasts to `out` is read: the same factors where the size is the same."""
    skip = len(out.dims) - len(shape)
    dims: list[Dim] = []
    for d, n in enumerate(shape):
        if n == out.shape[skip + d]:
            dims.append(out.dims[skip + d])
        elif n == 1:
            dims.append(((1, -1),))
        else:
            raise NoTileError(f"a tensor of {tuple(shape)} does not broadcast to {out.shape}")
    return Layout(tuple(dims), out.axes)


def broadcast_layout(shape: Sequence[int], natives: Sequence[Layout], ctx: Context) -> Layout:
    """The layout of a result that inputs broadcast to: that of the largest input, which most axes cut."""
    spread = [n for n in natives if n.spread]
    for native in sorted(spread, key=lambda n: (-_size(n.shape), n.places.count(None))):
        skip = len(shape) - len(native.dims)
        dims: list[Dim] = [((int(n), -1),) for n in shape]
        fits = True
        for d, dim in enumerate(native.dims):
            if native.shape[d] == shape[skip + d]:
                dims[skip + d] = dim
            elif any(a >= 0 for _, a in dim):
                fits = False
        if fits:
            return Layout(tuple(dims), len(ctx.axes))
    if not spread and ctx.volume(shape):
        return ctx.default(shape)
    return ctx.whole(shape)


def _size(shape: Sequence[int]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def free(layout: Layout, dims: Sequence[int], message: str = "") -> None:
    """Raise NoTileError if the layout is spread over one of these dimensions."""
    n = len(layout.dims)
    touched = {d % n for d in dims} if n else set()
    if any(p is not None and p[0] in touched for p in layout.places):
        raise NoTileError(message or f"works along the split axis (dimensions {sorted(touched)})")


def whole_step(value: Value, natives: Sequence[Layout], ctx: Context) -> Whole:
    """The step that runs the operator on whole inputs; a result of a volume's shape is spread afterwards."""
    return Whole(value, value.refs(), [ctx.whole(n.shape) for n in natives], _afterwards(value, natives, ctx))


def whole_word(step: Step, natives: Sequence[Layout], ctx: Context) -> WholeOf:
    """The same for a step that was bound to inputs that are not spread."""
    return WholeOf(step, _afterwards(step.value, natives, ctx))


def _afterwards(value: Value, natives: Sequence[Layout], ctx: Context) -> Layout:
    spread = any(n.spread for n in natives)
    like = len(value.shape) == ctx.dims + 2 and (spread or ctx.volume(value.shape))
    return ctx.default(value.shape) if like and value.dependent else ctx.whole(value.shape)
