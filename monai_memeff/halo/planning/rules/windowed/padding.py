"""Padding of every mode and sign, rolling and flipping: output rows are input rows in another order, or a constant."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from monai_memeff.halo.planning.errors import NoTileError
from monai_memeff.halo.planning.layout import Box, Dim, Layout, along
from monai_memeff.halo.planning.program import Value
from monai_memeff.halo.planning.rules.base import Context, Env, Read, Step, arguments
from monai_memeff.halo.planning.rules.table import rule

Rows = Callable[[int], int | None]  # output row -> input row, None for a constant
Run = tuple[int | None, int, int]  # first input row, None for a constant; number of rows; step


def refined(native: Layout) -> Layout:
    """The same layout with every split dimension cut row by row.

    Raises:
        NoTileError: if two split axes lie in one dimension.
    """
    where = {a: p[0] for a, p in enumerate(native.places) if p is not None}
    if len(set(where.values())) < len(where):
        raise NoTileError("two split axes lie in one dimension")
    return along(native.shape, where, native.axes)


class RowOrder(Step):
    """Rows copied from other rows along split dimensions; other dimensions are left to `rest`."""

    def __init__(self, value: Value, source: Layout, out: Layout, order: dict[int, Rows], fill: float = 0.0) -> None:
        super().__init__(value, value.refs(), [source], out)
        self.order, self.fill = order, fill

    def runs(self, axis: int, lo: int, hi: int) -> list[tuple[int | None, int, int]]:
        """The output rows as runs (first input row or None, number of rows, step)."""
        found: list[tuple[int | None, int, int]] = []
        for row in range(lo, hi):
            source = self.order[axis](row)
            if found:
                first, n, step = found[-1]
                if first is None or source is None:
                    if first is None and source is None:
                        found[-1] = (None, n + 1, 1)
                        continue
                elif n == 1 and source - first in (1, -1):
                    found[-1] = (first, 2, source - first)
                    continue
                elif n > 1 and source == first + n * step:
                    found[-1] = (first, n + 1, step)
                    continue
            found.append((source, 1, 1))
        return found

    def _axis_runs(self, box: Box) -> list[list[tuple[int | None, int, int]]]:
        plain = self.same(0, box)
        return [
            self.runs(a, *box[a]) if a in self.order and hi > lo else [(lo, hi - lo, 1)]
            for a, (lo, hi) in enumerate(plain)
        ]

    def needs(self, box: Box) -> tuple[Read, ...]:
        """One read for every run of rows."""
        reads = []
        for runs in itertools.product(*self._axis_runs(box)):
            if all(first is not None for first, _, _ in runs):
                reads.append(Read(0, tuple(_span(run) for run in runs)))
        return tuple(reads)

    def compute(self, tensors: Sequence[torch.Tensor], reads: Sequence[Read], box: Box, env: Env) -> torch.Tensor:
        """The runs put together."""
        return self.rest(self._joined((), self._axis_runs(box), iter(tensors), env))

    def _joined(
        self, done: tuple[Run, ...], axes: list[list[Run]], parts: Iterator[torch.Tensor], env: Env
    ) -> torch.Tensor:
        """The parts of all runs that begin so; no closure, for one that calls itself keeps its tensors."""
        axis = len(done)
        if axis == len(axes):
            return self._part(done, parts, env)
        joined = [self._joined((*done, run), axes, parts, env) for run in axes[axis]]
        d = self.out.dim_of(axis)
        return joined[0] if d is None or len(joined) == 1 else torch.cat(joined, d)

    def _part(self, runs: tuple[Run, ...], parts: Iterator[torch.Tensor], env: Env) -> torch.Tensor:
        """One run along every axis: rows that were read, or rows of the fill."""
        if any(first is None for first, _, _ in runs):
            shape = list(self.reads[0].shape)
            for a, (_, n, _) in enumerate(runs):
                d = self.reads[0].dim_of(a)
                if d is not None:
                    shape[d] = n
            return torch.full(shape, self.fill, dtype=self.value.dtype, device=env.device)
        part = next(parts)
        back = [self.reads[0].dim_of(a) for a, (_, n, step) in enumerate(runs) if step < 0 and n > 1]
        dims = [d for d in back if d is not None]
        return part.flip(dims) if dims else part

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """What happens along the dimensions that are not cut."""
        return x


def _span(run: tuple[int | None, int, int]) -> tuple[int, int]:
    first, n, step = run
    assert first is not None
    return (first, first + n) if step > 0 or n == 1 else (first - n + 1, first + 1)


def _padded_row(mode: str, left: int, rows: int) -> Rows:
    def constant(row: int) -> int | None:
        return row - left if 0 <= row - left < rows else None

    def replicate(row: int) -> int:
        return min(max(row - left, 0), rows - 1)

    def reflect(row: int) -> int:
        return rows - 1 - abs(abs(row - left) - (rows - 1))

    def circular(row: int) -> int:
        return (row - left) % rows

    return {"constant": constant, "replicate": replicate, "reflect": reflect, "circular": circular}[mode]


class Padding(RowOrder):
    """Padding: rows of the split dimensions by order, the others by torch."""

    def setup(self, pads: list[int], mode: str) -> Padding:
        """Remember the padding of the dimensions that are not cut."""
        self.pads, self.mode = pads, mode
        return self

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """torch's padding of the other dimensions."""
        if not any(self.pads):
            return x
        return F.pad(x, self.pads, self.mode, self.fill if self.mode == "constant" else None)


@rule(["pad.default", "constant_pad_nd.default"], "padding", "rows by their order; every mode and sign")
def bind_pad(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """Padding of the last dimensions."""
    args = arguments(value)
    native = natives[0]
    pads, mode = list(args["pad"]), args.get("mode", "constant")
    fill = args["value"]
    n = len(native.shape)
    if not native.spread and ctx.volume(value.shape):
        native = ctx.default(native.shape)
    source = (
        refined(native) if any(not native.plain(d) and _pads_of(pads, d, n) != (0, 0) for d in range(n)) else native
    )
    order: dict[int, Rows] = {}
    dims: list[Dim] = list(source.dims)
    for d in range(n):
        left, right = _pads_of(pads, d, n)
        axes = [a for _, a in source.dims[d] if a >= 0]
        if (left, right) == (0, 0):
            continue
        if axes:
            order[axes[0]] = _padded_row(mode, left, source.shape[d])
            pads[2 * (n - 1 - d)] = pads[2 * (n - 1 - d) + 1] = 0
            dims[d] = ((value.shape[d], axes[0]),)
        else:
            dims[d] = ((value.shape[d], -1),)
    if mode != "constant" and len(pads) // 2 > n - 1:
        raise NoTileError("padding of every dimension")
    return Padding(value, source, Layout(tuple(dims), native.axes), order, fill or 0.0).setup(pads, mode)


def _pads_of(pads: Sequence[int], d: int, n: int) -> tuple[int, int]:
    i = 2 * (n - 1 - d)
    return (pads[i], pads[i + 1]) if i + 1 < len(pads) else (0, 0)


class Turned(RowOrder):
    """Roll or flip: rows of the split dimensions by order, the others by torch."""

    def setup(self, other: Callable[[torch.Tensor], torch.Tensor]) -> Turned:
        """Remember what happens to the other dimensions."""
        self.other = other
        return self

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """torch's operator on the other dimensions."""
        return self.other(x)


@rule("roll.default", "index", "rows in rolled order")
def bind_roll(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A roll along named dimensions."""
    args = arguments(value)
    native, n = natives[0], len(natives[0].shape)
    if not args["dims"]:
        raise NoTileError("a roll of all elements")
    moves: dict[int, int] = {}
    for d, s in zip(_list(args["dims"]), _list(args["shifts"]), strict=True):
        moves[d % n] = moves.get(d % n, 0) + s  # a dimension may be named twice
    source = _fine(native, list(moves))
    order: dict[int, Rows] = {}
    for axis in range(native.axes):
        dim = source.dim_of(axis)
        if dim in moves:
            shift, rows = moves.pop(dim), source.shape[dim]
            order[axis] = lambda row, shift=shift, rows=rows: (row - shift) % rows  # type: ignore[misc]
    step = Turned(value, source, source, order)
    return step.setup(lambda x: x.roll(list(moves.values()), list(moves)) if moves else x)


@rule("flip.default", "index", "rows in reversed order")
def bind_flip(value: Value, natives: Sequence[Layout], ctx: Context) -> Step:
    """A flip of named dimensions."""
    native, n = natives[0], len(natives[0].shape)
    dims = {d % n for d in value.args[1]}
    source = _fine(native, sorted(dims))
    order: dict[int, Rows] = {}
    for axis in range(native.axes):
        d = source.dim_of(axis)
        if d is not None and d in dims:
            dims.remove(d)
            order[axis] = lambda row, rows=source.shape[d]: rows - 1 - row  # type: ignore[misc]
    return Turned(value, source, source, order).setup(lambda x: x.flip(sorted(dims)) if dims else x)


def _fine(native: Layout, dims: Sequence[int]) -> Layout:
    return refined(native) if any(not native.plain(d) for d in dims) else native


def _list(x: int | Sequence[int]) -> list[int]:
    return list(x) if isinstance(x, (list, tuple)) else [x]  # type: ignore[list-item]
