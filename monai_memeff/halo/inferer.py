"""Whole-volume inference through one device in bounded memory: virtual ranks take turns, a pager moves the rest out."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.utils import optional_import
from torch import nn

from monai_memeff.halo import arithmetic as ints
from monai_memeff.halo.mesh import HaloMesh, virtual_mesh
from monai_memeff.halo.network import replica, spatial_partition, unpartition
from monai_memeff.halo.pager import FolderStore, HostStore, Pager, Watch
from monai_memeff.halo.region import Margin, region_of, set_margin
from monai_memeff.halo.stride import network_stride, on_meta, spatial_dims_of
from monai_memeff.halo.virtual import Hub
from monai_memeff.halo.volume import boxes, slices, with_meta

tqdm, _ = optional_import("tqdm", name="tqdm")
_HEADROOM = 1.25  # a part's peak over the whole's peak divided by the parts: halo rows and uneven parts


@dataclass(frozen=True)
class StreamingReport:
    """What one call cost.

    Attributes:
        partitions: number of parts.
        device_peak_bytes: highest number of activation bytes on the device (weights and workspace not counted).
        moved_bytes: bytes copied between device and store, both directions.
        seconds: wall time.
    """

    partitions: int
    device_peak_bytes: int
    moved_bytes: int
    seconds: float


class _Output:
    """The whole output in host memory or in a file, filled part by part."""

    def __init__(self, pager: Pager, mesh: HaloMesh, dims: int, labels: bool) -> None:
        self._pager, self._mesh, self._dims, self._labels = pager, mesh, dims, labels
        self.whole: Any = None

    def take(self, part: Any) -> None:
        """Copy one rank's output to its place."""
        if isinstance(part, torch.Tensor):
            self.whole = self._fill(self.whole, part)
        elif isinstance(part, (list, tuple)):
            wholes = self.whole or [None] * len(part)
            self.whole = type(part)(self._fill(w, p) for w, p in zip(wholes, part, strict=True))
        elif isinstance(part, dict):
            wholes = self.whole or dict.fromkeys(part)
            self.whole = {k: self._fill(wholes[k], p) for k, p in part.items()}
        else:
            raise TypeError(f"Expected the network to return tensors but got {type(part).__name__}.")

    def _fill(self, whole: Any, part: torch.Tensor) -> torch.Tensor:
        bounds = part._halo_layout.bounds
        if self._labels:
            part = part.argmax(1, keepdim=True).to(torch.uint8 if part.shape[1] <= 256 else torch.int16)
        place: list[slice] = [slice(None)] * part.dim()
        shape = list(part.shape)
        for axis, b, p in zip(self._mesh.axes, bounds, self._mesh.position, strict=True):
            dim = part.dim() - self._dims + axis
            shape[dim], place[dim] = (b[-1], slice(b[p], b[p + 1])) if b else (1, slice(None))
        if whole is None:
            whole = self._allocate(shape, part.dtype)
        whole[tuple(place)].copy_(part)
        return whole

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self._pager.quietly():
            if isinstance(self._pager.store, FolderStore):
                return self._pager.ignore(self._pager.store.output(shape, dtype))
            return self._pager.ignore(torch.empty(tuple(shape), dtype=dtype))


def _input_margin(volume: torch.Tensor, mesh: HaloMesh, dims: int, device: torch.device) -> Margin:
    """The neighbours' rows of the input, read straight from the volume."""
    bounds = boxes(mesh, volume.shape[2:])
    wanted = tuple(tuple((max(lo - 1, 0), min(hi + 1, b[-1])) for lo, hi in itertools.pairwise(b)) for b in bounds)
    pieces = {}
    for piece in ints.plan(mesh.comm.rank, bounds, wanted).receives:
        rows = volume
        for axis, (lo, hi) in zip(mesh.axes, piece.source, strict=True):
            rows = rows.narrow(volume.dim() - dims + axis, lo, hi - lo)
        pieces[piece.source] = rows.clone().to(device)
    return Margin(1, pieces)


def _padded(volume: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The volume with zeros at the far ends up to multiples of the network's stride."""
    rest = [-n % s for n, s in zip(volume.shape[2:], strides, strict=True)]
    return F.pad(volume, [n for r in reversed(rest) for n in (0, r)]) if any(rest) else volume


def _cropped(whole: Any, shape: Sequence[int], padded: Sequence[int]) -> Any:
    """Cut the padding off outputs of the padded size; coarser outputs (deep supervision) keep it."""
    if isinstance(whole, (list, tuple)):
        return type(whole)(_cropped(w, shape, padded) for w in whole)
    if isinstance(whole, dict):
        return {k: _cropped(w, shape, padded) for k, w in whole.items()}
    if tuple(whole.shape[-len(shape) :]) != tuple(padded) or tuple(shape) == tuple(padded):
        return whole
    box = (..., *(slice(0, n) for n in shape))
    return whole[box]


def whole_peak_bytes(network: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Activation bytes that the unpartitioned network would need at once in inference, by a dry run.

    Args:
        network: not partitioned; not changed.
        shape: input shape (B, C, spatial...).
        dtype: of the input.
    """
    pager = Pager(None, torch.device("meta"), [])
    with on_meta(network):
        x = torch.empty(tuple(shape), dtype=dtype, device="meta")
        pager._skip = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
        with Watch(pager):
            network(x)
    return pager.peak


class SpatialPartitionInferer(Inferer):
    """Runs an existing network with existing weights on a whole volume, a part at a time, with the result of the whole.

    The parts are virtual ranks in one process: they exchange halo rows and share normalisation statistics, so the
    output equals whole-volume inference, InstanceNorm included. Only the running part's activations are on the device.
    A volume that is not a multiple of the network's stride is padded with zeros at its far ends, and cropped again.
    The layers are those of Hou et al. 2019 (https://arxiv.org/abs/1909.03108), streamed through one device.

    Args:
        partitions: number of parts along `axis`, or "auto": as few as fit `memory_budget`.
        store: where the other parts wait: "host" memory, or a folder for memory-mapped files.
        device: where the network's weights are and the work happens; by default the network's own device.
        axis: spatial axis that is cut (0 is the first).
        labels: return the arg-max label of every voxel, (B, 1, spatial...) uint8 (int16 from 257 classes on), written
            part by part, instead of logits.
        memory_budget: bytes for activations on the device, for "auto"; by default 70 % of a GPU's free memory.
        progress: show a progress bar.

    Attributes:
        last_report: a `StreamingReport` of the last call, None before it.

    Raises:
        ValueError: for partitions < 1 or an unknown word.
    """

    def __init__(
        self,
        partitions: int | str = "auto",
        store: str | os.PathLike[str] = "host",
        device: torch.device | str | None = None,
        axis: int = 0,
        labels: bool = False,
        memory_budget: int | None = None,
        progress: bool = False,
    ) -> None:
        if partitions != "auto" and (not isinstance(partitions, int) or partitions < 1):
            raise ValueError(f"partitions must be a positive number or 'auto' but is {partitions!r}.")
        self.partitions, self.store, self.axis = partitions, store, axis
        self.device = None if device is None else torch.device(device)
        self.labels, self.memory_budget, self.progress = labels, memory_budget, progress
        self.last_report: StreamingReport | None = None

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network on the whole volume.

        Args:
            inputs: (B, C, spatial...), on any device; only a part at a time is copied to the working device.
            network: an nn.Module of known layers; it is not changed.
            args: passed to the network as they are.
            kwargs: passed to the network as they are.

        Returns:
            What the network returns, on the CPU: float logits, or labels.

        Raises:
            NotPartitionable: if the network has a layer that is not in the table.
            ValueError: if the volume is too small for the partitions, or no number of partitions fits the budget.
        """
        if not isinstance(network, nn.Module):
            raise TypeError(f"SpatialPartitionInferer needs an nn.Module but got {type(network).__name__}.")
        network = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
        began = time.perf_counter()
        shape = inputs.shape[2:]
        volume = _padded(inputs.as_subclass(torch.Tensor).detach(), network_stride(network, spatial_dims_of(network)))
        device = self.device or next(iter(network.parameters())).device
        parts = self._parts(network, volume, device)
        store = HostStore(device) if self.store == "host" else FolderStore(self.store)
        pager = Pager(store, device, [volume, *network.parameters(), *network.buffers()])
        try:
            whole = self._stream(network, volume, parts, device, pager, args, kwargs)
        finally:
            store.close()
        whole = _cropped(whole, shape, volume.shape[2:])
        seconds = time.perf_counter() - began
        self.last_report = StreamingReport(parts, pager.peak, pager.moved, seconds)
        return with_meta(whole, inputs)

    def _parts(self, network: nn.Module, volume: torch.Tensor, device: torch.device) -> int:
        if self.partitions != "auto":
            return int(self.partitions)
        budget, dims = self.memory_budget, spatial_dims_of(network)
        if budget is None and device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own reserve
            budget = int(0.7 * (torch.cuda.mem_get_info(device)[0] + unused))
        if budget is None:
            raise ValueError("partitions='auto' needs memory_budget= (bytes) when the work is not on a GPU.")
        peak = whole_peak_bytes(network, volume.shape, volume.dtype)
        limit = volume.shape[2 + self.axis] // network_stride(network, dims)[self.axis]
        parts = 1 if peak <= budget else int(-(-peak * _HEADROOM // budget))
        if parts > limit:
            raise ValueError(
                f"No number of partitions fits {budget} bytes: the whole volume needs about {peak} bytes and spatial "
                f"axis {self.axis} can be cut into at most {limit} parts; allow more memory or cut a longer axis."
            )
        return parts

    def _stream(
        self,
        network: nn.Module,
        volume: torch.Tensor,
        parts: int,
        device: torch.device,
        pager: Pager,
        args: Iterable[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        hub = Hub(parts, on_switch=pager.evict)
        mesh = virtual_mesh(hub, (parts,), (self.axis,))
        shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
        partitioned = spatial_partition(copy.deepcopy(network, shared), mesh)
        ranks = [replica(partitioned) for _ in range(parts)]
        region = region_of(partitioned)
        output = _Output(pager, mesh, region.spatial_dims, self.labels)
        bar = self._bar(partitioned, parts)
        region.listener = bar.update if bar is not None else None

        def work(rank: int) -> None:
            with Watch(pager):
                box = (slice(None), slice(None), *slices(mesh, volume.shape[2:]))
                part = volume[box].clone(memory_format=torch.contiguous_format).to(device)
                set_margin(part, _input_margin(volume, mesh, region.spatial_dims, device))
                result = ranks[rank](part, *args, **kwargs)
                del part
                output.take(result)

        try:
            with torch.no_grad():
                hub.run(work)
        finally:
            unpartition(partitioned)
            if bar is not None:
                bar.close()
        return output.whole

    def _bar(self, network: nn.Module, parts: int) -> Any:
        if not self.progress:
            return None
        layers = sum("halo_key" in vars(m) and not list(m.children()) for m in network.modules())
        return tqdm(total=layers * parts, desc=f"{parts} partitions", unit="layer")
