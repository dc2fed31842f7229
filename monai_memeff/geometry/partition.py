"""An axis cut into parts, and which inputs an output of a layer reads: integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from monai_memeff.arguments import numbers_checked


@numbers_checked
def split_axis(
    size: int, parts: int, alignment: int = 1, weights: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Cut one axis into consecutive parts at multiples of an alignment; the last part takes the rest.

    Without weights the parts differ by at most one alignment (and the last by the rest); larger parts come last.

    Args:
        size: voxels along the axis.
        parts: number of parts.
        alignment: every cut is a multiple of it; the total stride of a network, so that no layer's cell is cut.
        weights: Wanted size of each part (any scale); each still gets at least one alignment.

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
