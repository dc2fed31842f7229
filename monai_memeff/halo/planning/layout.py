"""Where the split axes lie in a tensor, and the rows of it that a part holds.

A *layout* factors every dimension of a tensor; at most one factor per split axis carries that axis, and its size is the
number of *rows* the tensor has along it. A plain volume (B, C, D, H, W) cut along D has the factors
``((B,), (C,), (D*,), (H,), (W,))``; the windows of a Swin block, (B * D/7 * H/7 * W/7, 343, C), have
``((B, D/7*, H/7 * W/7), (343,), (C,))``. A *box* is one row range ``(lo, hi)`` per split axis, in the tensor's own
rows; along an axis that the tensor is not spread over it is ``(0, 1)``.

A layout only says how a tensor is sliced. Any choice is correct; a good one is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

Range = tuple[int, int]
Box = tuple[Range, ...]
Factor = tuple[int, int]  # (size, split axis or -1)
Dim = tuple[Factor, ...]


@dataclass(frozen=True)
class Layout:
    """The factors of every dimension.

    Attributes:
        dims: for every dimension its factors, outermost first, as (size, index of the split axis or -1).
        axes: number of split axes of the plan.
    """

    dims: tuple[Dim, ...]
    axes: int

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the whole tensor."""
        return tuple(math.prod(n for n, _ in dim) for dim in self.dims)

    @cached_property
    def places(self) -> tuple[tuple[int, int] | None, ...]:
        """For every split axis the (dimension, factor) that carries it, or None."""
        found: list[tuple[int, int] | None] = [None] * self.axes
        for d, dim in enumerate(self.dims):
            for f, (_, axis) in enumerate(dim):
                if axis >= 0:
                    found[axis] = (d, f)
        return tuple(found)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Number of rows along every split axis; 1 where the tensor is not spread."""
        return tuple(1 if p is None else self.dims[p[0]][p[1]][0] for p in self.places)

    @cached_property
    def whole(self) -> Box:
        """The box of all rows."""
        return tuple((0, n) for n in self.rows)

    @property
    def spread(self) -> bool:
        """Whether the tensor is spread over any axis."""
        return any(p is not None for p in self.places)

    def dim_of(self, axis: int) -> int | None:
        """The dimension that carries a split axis, or None."""
        place = self.places[axis]
        return None if place is None else place[0]

    def sizes(self, box: Box) -> list[list[int]]:
        """Sizes of the factors of the rows in `box`."""
        return [[n if a < 0 else box[a][1] - box[a][0] for n, a in dim] for dim in self.dims]

    def part_shape(self, box: Box) -> tuple[int, ...]:
        """Sizes of the rows in `box`."""
        return tuple(math.prod(sizes) for sizes in self.sizes(box))

    def exposed(self, box: Box) -> tuple[list[int], tuple[int, ...]]:
        """Sizes of the rows in `box` with every factor in a dimension of its own, and the dimension of each split axis.

        An axis that the tensor is not spread over gets a dimension of one row at the end.
        """
        sizes = [n for factors in self.sizes(box) for n in factors]
        owners = [axis for dim in self.dims for _, axis in dim]
        dims = []
        for axis in range(self.axes):
            if axis in owners:
                dims.append(owners.index(axis))
            else:
                dims.append(len(sizes))
                sizes.append(1)
        return sizes, tuple(dims)

    def plain(self, dim: int) -> bool:
        """Whether a dimension is one factor."""
        return len(self.dims[dim]) == 1


def unspread(shape: Sequence[int], axes: int) -> Layout:
    """The layout of a tensor that is not spread over any axis."""
    return Layout(tuple(((int(n), -1),) for n in shape), axes)


def along(shape: Sequence[int], where: Mapping[int, int], axes: int) -> Layout:
    """The layout of a tensor whose dimension `where[axis]` is spread over that split axis, row by row."""
    owner = {dim: axis for axis, dim in where.items()}
    return Layout(tuple(((int(n), owner.get(d, -1)),) for d, n in enumerate(shape)), axes)


def length(box: Box) -> int:
    """Number of rows in a box, over all axes."""
    return math.prod(hi - lo for lo, hi in box)


def bounds(rows: int, parts: int) -> list[int]:
    """Where `rows` rows are cut into at most `parts` nearly equal parts: parts + 1 numbers from 0 to rows."""
    parts = max(1, min(rows, parts))
    return [rows * i // parts for i in range(parts + 1)]


def narrow(tensor: torch.Tensor, layout: Layout, have: Box, want: Box) -> torch.Tensor:
    """Rows `want` of a tensor that holds the rows `have`; a view where torch can make one."""
    if have == want:
        return tensor
    for d, dim in enumerate(layout.dims):
        tagged = [(f, a) for f, (_, a) in enumerate(dim) if a >= 0 and have[a] != want[a]]
        if not tagged:
            continue
        if len(dim) == 1:
            a = tagged[0][1]
            tensor = tensor.narrow(d, want[a][0] - have[a][0], want[a][1] - want[a][0])
            continue
        sizes = [n if a < 0 else have[a][1] - have[a][0] for n, a in dim]
        split = tensor.unflatten(d, sizes)
        for f, a in tagged:
            split = split.narrow(d + f, want[a][0] - have[a][0], want[a][1] - want[a][0])
        tensor = split.flatten(d, d + len(dim) - 1)
    return tensor


Write = Callable[[torch.Tensor, torch.Tensor], object]
"""Writes the values of the second tensor into the first, which may be a view of several strides."""


def put(whole: torch.Tensor, layout: Layout, box: Box, part: torch.Tensor, write: Write = torch.Tensor.copy_) -> None:
    """Write the rows `box` into a whole contiguous tensor."""
    sizes: list[int] = []
    view = whole.view([n for dim in layout.dims for n, _ in dim])
    for d, (_, axis) in enumerate(f for dim in layout.dims for f in dim):
        if axis >= 0:
            view = view.narrow(d, box[axis][0], box[axis][1] - box[axis][0])
        sizes.append(view.shape[d])
    write(view, part.reshape(sizes))


def _stride(layout: Layout, axis: int) -> tuple[int, int, int]:
    """(dimension, elements before, elements per row) of a spread axis."""
    place = layout.places[axis]
    assert place is not None
    dim = layout.dims[place[0]]
    return place[0], math.prod(n for n, _ in dim[: place[1]]), math.prod(n for n, _ in dim[place[1] + 1 :])


def _related(native: Layout, wanted: Layout) -> bool:
    """Whether both layouts cut the same dimensions at the same place, possibly in rows of another size."""
    for axis in range(native.axes):
        if native.places[axis] is None or wanted.places[axis] is None:
            if native.places[axis] is not wanted.places[axis]:
                return False
            continue
        d, before, _ = _stride(native, axis)
        if (d, before) != _stride(wanted, axis)[:2]:
            return False
        if sum(a >= 0 for _, a in native.dims[d]) > 1 or sum(a >= 0 for _, a in wanted.dims[d]) > 1:
            return False
    return True


def source_box(native: Layout, wanted: Layout, box: Box) -> Box:
    """The native rows of a tensor that contain its rows `box` in another layout."""
    if native == wanted:
        return box
    if not _related(native, wanted):
        return native.whole
    out = []
    for axis, (lo, hi) in enumerate(box):
        if native.places[axis] is None:
            out.append((0, 1))
            continue
        per, want = _stride(native, axis)[2], _stride(wanted, axis)[2]
        out.append((lo * want // per, -(-hi * want // per)) if hi > lo else (0, 0))
    return tuple(out)


def crop(tensor: torch.Tensor, native: Layout, have: Box, wanted: Layout, want: Box) -> torch.Tensor:
    """Rows `want` in the layout `wanted` of a tensor that holds the native rows `have` (from `source_box`)."""
    if native == wanted:
        return narrow(tensor, native, have, want)
    if not _related(native, wanted):
        return narrow(tensor, wanted, wanted.whole, want)
    dims = list(native.dims)
    old, new = list(have), list(want)
    for axis in range(native.axes):
        if native.places[axis] is None:
            continue
        d, before, per = _stride(native, axis)
        each = _stride(wanted, axis)[2]
        unit = math.gcd(per, each)
        dims[d] = tuple(
            f for f in ((before, -1), (native.rows[axis] * per // unit, axis), (unit, -1)) if f[0] != 1 or f[1] >= 0
        )
        old[axis] = (have[axis][0] * per // unit, have[axis][1] * per // unit)
        new[axis] = (want[axis][0] * each // unit, want[axis][1] * each // unit)
    return narrow(tensor, Layout(tuple(dims), native.axes), tuple(old), tuple(new))
