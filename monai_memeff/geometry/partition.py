"""A volume cut into boxes, and how far a chain of layers looks past them: integers only.

All boxes are half-open, ``start <= index < stop``, in voxels along (i, j, k). A box may reach past its volume (negative
start, for instance) until it is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product


@dataclass(frozen=True)
class Box:
    """A block of voxels.

    Args:
        start: first voxel along each axis.
        stop: one past the last voxel along each axis; an axis with ``stop <= start`` is empty.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop):
            raise ValueError(f"A box needs as many starts as stops, got {self.start} and {self.stop}.")

    @classmethod
    def whole(cls, spatial_shape: Sequence[int]) -> Box:
        """The box of a whole volume."""
        return cls((0,) * len(spatial_shape), tuple(spatial_shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis; 0 where empty."""
        return tuple(max(0, stop - start) for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether no voxel lies in the box."""
        return 0 in self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes the last axes of an array: ``image[(..., *box.slices)]``.

        Raises:
            ValueError: a start is negative, which an array would read from its end.
        """
        if min(self.start, default=0) < 0:
            raise ValueError(f"A box must be clipped to its volume before it indexes an array, got start {self.start}.")
        return tuple(slice(start, max(start, stop)) for start, stop in zip(self.start, self.stop, strict=True))

    def shift(self, offset: Sequence[int]) -> Box:
        """The box moved by ``offset`` voxels."""
        start = tuple(a + o for a, o in zip(self.start, offset, strict=True))
        return Box(start, tuple(b + o for b, o in zip(self.stop, offset, strict=True)))

    def grow(self, low: int | Sequence[int], high: int | Sequence[int] | None = None) -> Box:
        """The box with a halo; not clipped.

        Args:
            low: voxels added before the start, one number or one per axis; negative crops.
            high: voxels added after the stop; the same as ``low`` if not given.
        """
        lows = _per_axis(low, len(self.start))
        highs = lows if high is None else _per_axis(high, len(self.start))
        start = tuple(a - margin for a, margin in zip(self.start, lows, strict=True))
        return Box(start, tuple(b + margin for b, margin in zip(self.stop, highs, strict=True)))

    def intersect(self, other: Box) -> Box:
        """What both boxes cover; empty (``is_empty``) if they do not touch."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        return Box(start, tuple(max(s, min(a, b)) for s, a, b in zip(start, self.stop, other.stop, strict=True)))

    def clip(self, spatial_shape: Sequence[int]) -> Box:
        """The part of the box inside a volume."""
        return self.intersect(Box.whole(spatial_shape))

    def contains(self, other: Box) -> bool:
        """Whether every voxel of ``other`` lies in this box."""
        return other.is_empty or self.intersect(other) == other

    def within(self, outer: Box) -> Box:
        """The same voxels counted from the start of ``outer``: cuts this box out of an array that holds ``outer``."""
        return self.shift([-start for start in outer.start])


def split_axis(
    size: int, parts: int, alignment: int = 1, weights: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Cut one axis into consecutive parts at multiples of an alignment; the last part takes the rest.

    Without weights the parts differ by at most one alignment (and the last by the rest); larger parts come last.

    Args:
        size: voxels along the axis.
        parts: number of parts.
        alignment: every cut is a multiple of it; the total stride of a network, so that no layer's cell is cut.
        weights: wanted share of each part (any scale); each still gets at least one alignment.

    Returns:
        ``parts`` intervals (start, stop) that cover ``range(size)`` in order.

    Raises:
        ValueError: there are more parts than aligned blocks, or the weights do not fit.
    """
    if size < 1 or parts < 1 or alignment < 1:
        raise ValueError(f"size, parts and alignment must be at least 1, got {size}, {parts} and {alignment}.")
    blocks = max(1, size // alignment)
    if parts > blocks:
        raise ValueError(
            f"An axis of {size} voxels cut at multiples of {alignment} has at most {blocks} parts, got {parts}; "
            "use fewer parts, a larger volume or a network with a smaller total stride."
        )
    cuts = [block * alignment for block in _cut_blocks(blocks, parts, weights)]
    cuts[-1] = size
    return list(pairwise(cuts))


def split_volume(spatial_shape: Sequence[int], parts: Sequence[int], alignment: int | Sequence[int] = 1) -> list[Box]:
    """Cut a volume into a grid of boxes that cover it once.

    Args:
        spatial_shape: voxels along each axis.
        parts: number of parts along each axis.
        alignment: cuts are multiples of it, one number or one per axis.

    Returns:
        ``prod(parts)`` boxes, the last axis running fastest.

    Raises:
        ValueError: see :func:`split_axis`.
    """
    alignments = _per_axis(alignment, len(spatial_shape))
    axes = [split_axis(*axis) for axis in zip(spatial_shape, parts, alignments, strict=True)]
    return [Box(tuple(a for a, _ in cell), tuple(b for _, b in cell)) for cell in product(*axes)]


@dataclass(frozen=True)
class Stencil:
    """One layer seen along one axis: which inputs an output reads.

    Convolution and pooling read inputs ``o * stride - padding + dilation * t`` for ``t`` in ``range(kernel)``; a
    transposed layer writes input ``i`` to the outputs at these places. Nearest upsampling by s is transposed with
    kernel s and stride s; linear upsampling by an even s without aligned corners is transposed with kernel 2 s, stride
    s and padding s / 2.

    Args:
        kernel: kernel size.
        stride: step of a convolution or pooling, growth of a transposed layer.
        dilation: distance between kernel elements.
        padding: zeros added on either side (taken away from either side if transposed), as in torch.
        output_padding: size added to one side of a transposed layer's output.
        transposed: whether the layer is a transposed convolution.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    output_padding: int = 0
    transposed: bool = False

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride, self.dilation) < 1 or min(self.padding, self.output_padding) < 0:
            raise ValueError(f"kernel, stride and dilation start at 1, paddings at 0, got {self}.")
        if self.output_padding and not self.transposed:
            raise ValueError(f"output_padding belongs to transposed layers, got {self}.")

    @property
    def reach(self) -> int:
        """Distance between the first and the last element of the kernel."""
        return self.dilation * (self.kernel - 1)

    @property
    def scale(self) -> Fraction:
        """Output voxels per input voxel."""
        return Fraction(self.stride) if self.transposed else Fraction(1, self.stride)

    def output_size(self, size: int) -> int:
        """Voxels after the layer for ``size`` voxels before it, as torch computes it; 0 if none."""
        if self.transposed:
            return max(0, (size - 1) * self.stride - 2 * self.padding + self.reach + self.output_padding + 1)
        return max(0, (size + 2 * self.padding - self.reach - 1) // self.stride + 1)

    def inputs_of(self, start: int, stop: int) -> tuple[int, int]:
        """The smallest interval that holds every input read by outputs ``start <= o < stop``.

        It is not clipped: it may reach past the volume, where a layer reads zeros. For an empty interval of outputs, or
        outputs of a transposed layer that no input reaches, it is empty (stop <= start).
        """
        if stop <= start:
            return (0, 0)
        if not self.transposed:
            return start * self.stride - self.padding, (stop - 1) * self.stride - self.padding + self.reach + 1
        phases = range(start, min(stop, start + self.stride)), range(max(start, stop - self.stride), stop)
        first = [source for output in phases[0] for source in self._sources(output)]
        last = [source for output in phases[1] for source in self._sources(output)]
        return (min(first), max(last) + 1) if first else (0, 0)

    def _sources(self, output: int) -> list[int]:
        shifted = [output + self.padding - self.dilation * element for element in range(self.kernel)]
        return [place // self.stride for place in shifted if place % self.stride == 0]

    def halo(self) -> tuple[int, int]:
        """Voxels (low, high) an aligned shard reads past its own input to make its own output; negative: less than it.

        Aligned: the input shard begins at a multiple of the stride (any voxel, if transposed), and the output shard is
        the input shard scaled.
        """
        if self.transposed:
            first, last = self.inputs_of(0, self.stride)
            return -first, last - 1
        first, last = self.inputs_of(0, 1)
        return -first, last - self.stride


def output_size(layers: Iterable[Stencil], size: int) -> int:
    """Voxels along one axis after a chain of layers."""
    for layer in layers:
        size = layer.output_size(size)
    return size


def total_stride(layers: Iterable[Stencil]) -> int:
    """The least alignment whose multiples fall on a whole voxel before and after every layer of a chain."""
    scale, least = Fraction(1), 1
    for layer in layers:
        scale *= layer.scale
        least = math.lcm(least, scale.denominator)
    return least


def receptive_field(layers: Sequence[Stencil], start: int, stop: int) -> tuple[int, int]:
    """The interval of inputs of a chain that outputs ``start <= o < stop`` depend on; not clipped to the volume."""
    for layer in reversed(layers):
        start, stop = layer.inputs_of(start, stop)
    return start, stop


def margins(layers: Sequence[Stencil]) -> tuple[int, int]:
    """How far a chain looks past an aligned box: the halo that makes one pass over the box exact.

    A U-Net is the chain down to its deepest level and up again (its skips look less far).

    Args:
        layers: the chain along one axis, first layer first.

    Returns:
        (low, high) input voxels needed before and after any input box whose ends are multiples of
        :func:`total_stride`, so that the outputs of that box are those of the whole volume.
    """
    stride = total_stride(layers)
    scale = math.prod((layer.scale for layer in layers), start=Fraction(1))
    first, last = receptive_field(layers, 0, int(stride * scale))
    return max(0, -first), max(0, last - stride)


def _per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise ValueError(f"Give one number or one per axis ({axes}), got {values}.")
    return values


def _cut_blocks(blocks: int, parts: int, weights: Sequence[float] | None) -> list[int]:
    if weights is None:
        return [blocks * part // parts for part in range(parts + 1)]
    if len(weights) != parts or min(weights) <= 0:
        raise ValueError(f"weights must be {parts} positive numbers, one per part, got {tuple(weights)}.")
    cuts = [0]
    for part in range(1, parts):
        wanted = round(blocks * sum(weights[:part]) / sum(weights))
        cuts.append(min(max(wanted, cuts[-1] + 1), blocks - (parts - part)))
    return [*cuts, blocks]
