"""What the layers of one partitioned network know: the mesh, and how each tensor's rows are spread over the ranks."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from monai_memeff.halo.arithmetic import Bounds, Spans
from monai_memeff.halo.mesh import HaloMesh
from monai_memeff.halo.transport import Communicator
from monai_memeff.halo.virtual import here


class NotPartitionable(RuntimeError):
    """A layer or a function call that would be wrong on a part of the volume."""


@dataclass(frozen=True)
class Layout:
    """How a tensor is spread: the cuts of each split axis, or None where every rank holds the same single row."""

    bounds: tuple[Bounds | None, ...]

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the same tensor."""
        return all(b is None for b in self.bounds)


@dataclass
class _State(threading.local):
    """Per thread: where in the network it is."""

    names: list[str] = field(default_factory=list)
    inside: bool = False
    guarded: bool = False


@dataclass
class _Seen:
    """Per rank: what its current forward has seen; on a GPU autograd recomputes in another thread, and asks too."""

    layouts: list[Layout] = field(default_factory=list)
    seed: int = 0


_NUMBERS = itertools.count(1)
_KEEP: dict[int, Region] = {}


class Region:
    """Registry entry shared by the layers of one network; modules hold only its number, so they stay copyable.

    Args:
        mesh: where the parts live.
        spatial_dims: number of spatial axes of the network (the last axes of every tensor).
        overlap: compute the interior while halo rows fly; otherwise exchange first and convolve once (the reference).
        digest: text that must agree on all ranks (the network's configuration).
    """

    def __init__(self, mesh: HaloMesh, spatial_dims: int, overlap: bool = True, digest: str = "") -> None:
        self.mesh, self.spatial_dims, self.overlap, self.digest = mesh, spatial_dims, overlap, digest
        self.dims = tuple(axis - spatial_dims for axis in mesh.axes)  # negative, so extra leading axes do not matter
        self.state = _State()
        self._seen: dict[int | None, _Seen] = {}
        self.random = False
        self.listener: Callable[[], None] | None = None  # called by every layer (a progress bar)
        self._network: Any = None
        self.key = next(_NUMBERS)
        _KEEP[self.key] = self

    def watch(self, network: nn.Module) -> None:
        """Remember the network (weakly), for its training flag and whether it has dropout."""
        self._network = weakref.ref(network)
        self.random = any("Dropout" in type(m).__name__ for m in network.modules())

    def training(self) -> bool:
        """Whether the network is in training mode."""
        network = self._network() if self._network is not None else None
        return bool(network is not None and network.training)

    @property
    def comm(self) -> Communicator:
        """This rank's communicator."""
        return self.mesh.comm

    @property
    def seen(self) -> _Seen:
        """What this rank's current forward has seen."""
        return self._seen.setdefault(here(), _Seen())

    @property
    def name(self) -> str:
        """Dotted name of the module that runs now."""
        return self.state.names[-1] if self.state.names else "network"

    def fail(self, what: str) -> NotPartitionable:
        """An error that names the running layer."""
        return NotPartitionable(f"Layer '{self.name}': {what}")

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """Local rows of a layout on this rank, per split axis."""
        return tuple(
            1 if b is None else b[p + 1] - b[p] for b, p in zip(layout.bounds, self.mesh.position, strict=False)
        )

    def local(self, x: torch.Tensor) -> tuple[int, ...]:
        """Rows of a local tensor, per split axis."""
        return tuple(x.shape[d] for d in self.dims)

    def begin(self, layout: Layout, seed: int) -> None:
        """Forget the previous forward."""
        self._seen[here()] = _Seen([layout], seed)

    def tag(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Note how a tensor is spread."""
        x._halo_layout = layout
        if layout not in self.seen.layouts:
            self.seen.layouts.append(layout)
        return x

    def layout(self, x: torch.Tensor) -> Layout:
        """How a tensor is spread: by its tag, or (in a recomputed forward) by its size.

        Raises:
            NotPartitionable: if it was never seen, or if two layouts have this local size.
        """
        tag: Layout | None = getattr(x, "_halo_layout", None)
        if tag is not None:
            return tag
        found = [known for known in self.seen.layouts if self.shape(known) == self.local(x)]
        if len(found) != 1:
            raise self.fail(
                f"cannot tell how a tensor of local shape {tuple(x.shape)} is spread over the ranks "
                f"({len(found)} layouts have this size)."
            )
        return found[0]

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Inside a layer of ours: the guard lets its calls through."""
        if self.listener is not None:
            self.listener()
        before, self.state.inside = self.state.inside, True
        self.state.names.append(name)
        try:
            yield
        finally:
            self.state.inside = before
            self.state.names.pop()


def region_of(module: nn.Module) -> Region:
    """The region a swapped module belongs to.

    Raises:
        RuntimeError: if the module comes from another process and was not partitioned here.
    """
    key: Any = module.__dict__.get("halo_key")
    if key not in _KEEP:
        raise RuntimeError("This network was partitioned in another process: call unpartition and spatial_partition.")
    return _KEEP[key]


def forget(key: int) -> None:
    """Drop a region when its network is restored."""
    _KEEP.pop(key, None)


@dataclass
class Margin:
    """Rows just outside a tensor that arrived together with it, so the next layer need not ask.

    Attributes:
        width: rows on either side of each split axis (fewer at the volume's border).
        pieces: box in global row numbers and the rows themselves, by sender and wrap.
    """

    width: int
    pieces: dict[Spans, torch.Tensor]

    def rows(self, box: Spans, dims: tuple[int, ...]) -> torch.Tensor | None:
        """The rows of a box, cut from the piece that holds it; None if no piece does."""
        for larger, tensor in self.pieces.items():
            if all(bl <= lo and hi <= bh for (bl, bh), (lo, hi) in zip(larger, box, strict=False)):
                for dim, (lo, hi), (bl, _) in zip(dims, box, larger, strict=False):
                    tensor = tensor.narrow(dim, lo - bl, hi - lo)
                return tensor
        return None


def margin_of(x: torch.Tensor) -> Margin | None:
    """The margin that travels with a tensor, if any."""
    return getattr(x, "_halo_margin", None)


def set_margin(x: torch.Tensor, margin: Margin | None) -> torch.Tensor:
    """Attach a margin to a tensor."""
    if margin is not None:
        x._halo_margin = margin
    elif hasattr(x, "_halo_margin"):
        del x._halo_margin
    return x
