"""Whole-volume inference through one device in bounded memory, with the result of the whole network."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import optional_import
from torch import nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_device
from monai_memeff.halo.frame import around, attempt_dry, cropped, extents_taken, with_meta
from monai_memeff.halo.planning.capture import bare, home
from monai_memeff.halo.planning.plan import Plan, make_plan
from monai_memeff.halo.planning.program import Program, flatten_call, unflatten
from monai_memeff.halo.planning.state.fingerprint import call_key, fingerprint, mode_key
from monai_memeff.halo.run.stores import FolderStore, HostStore, Store, available_memory
from monai_memeff.halo.run.stream import Stream
from monai_memeff.memory.budget import bounded, refusing_when_full
from monai_memeff.memory.dry import dry_run
from monai_memeff.memory.threads import one_at_a_time, short_lock

tqdm, _ = optional_import("tqdm", name="tqdm")
_LOG = logging.getLogger(__name__)
_counting = short_lock()
_PADDED = "%s takes multiples only: %s voxels run with zeros around, as %s, and results are cropped"
GPU_SHARE = 0.7  # of a GPU's free memory: the rest is for the kernels' workspace and fragments
HOST_SHARE = 0.5  # of the free host memory: other programs want some


@dataclass(frozen=True)
class StreamingReport:
    """What one call cost.

    Attributes:
        partitions: number of tiles of the most finely cut step.
        device_peak_bytes: highest number of activation bytes on the device (weights and store not counted).
        moved_bytes: bytes copied between device and store, both directions.
        seconds: wall time, planning included.
        planned_peak_bytes: what the plan promised for `device_peak_bytes`.
        budget_bytes: what the plan was allowed, None if the number of partitions was given.
        store_bytes: highest number of bytes in the store, the output included.
        plan_seconds: the part of `seconds` that made the plan; 0 if it was at hand.
        padded_to: extents with zeros around the volume (`pad`), None where the network took its own.

    Examples:
        >>> inferer = SpatialPartitionInferer(partitions=4)
        >>> _ = inferer(torch.rand(1, 1, 16, 8, 8), torch.nn.Conv3d(1, 2, 3, padding=1))
        >>> inferer.last_report.partitions, inferer.last_report.store_bytes
        (4, 8192)
    """

    partitions: int
    device_peak_bytes: int
    moved_bytes: int
    seconds: float
    planned_peak_bytes: int = 0
    budget_bytes: int | None = None
    store_bytes: int = 0
    plan_seconds: float = 0.0
    padded_to: tuple[int, ...] | None = None


class SpatialPartitionInferer(Inferer):
    """Runs an existing network on a whole volume, a tile at a time, with the result of the whole network.

    The network is captured as a graph at the volume's shape. Every operator is computed tile by tile from whole tensors
    in a store; norms use the statistics of the whole volume. Any size that the network takes is run as it is: nothing
    is padded or cropped, unless `pad` is set and the network takes it no other way.
    Where the device runs out of memory all the same, the tile is halved and the work goes on from there.
    The idea of halo rows is that of Hou et al. 2019 (https://arxiv.org/abs/1909.03108), streamed through one device.

    The network runs as under `torch.no_grad()` and is unchanged afterwards, running statistics too, also in training
    mode. Random numbers of torch are neither drawn nor moved on: dropout and the like follow `torch.initial_seed()` and
    the number of the call, in a way that does not depend on the parts.

    Threads may share an inferer and a network, and call or train that network plainly meanwhile. While one of them
    makes a plan, others may not change its mode, device, hooks or other attributes, which are put back as they were,
    nor compile or export anything by torch.

    Args:
        partitions: number of parts along `axis`, or "auto": as few as fit `memory_budget`. Small late steps take fewer.
        store: where whole tensors wait: "host" memory, or a folder for memory-mapped files.
        device: where the work happens; by default the network's own device.
        axis: spatial axis that is cut (0 is the first).
        labels: True gives a label for every voxel instead of logits, written part by part: `logit > 0` of one channel,
            else the arg-max, (B, 1, spatial...) uint8 (int16 from 257 classes on). "regions" gives `logit > 0` of every
            channel, (B, C, spatial...) uint8, for regions that overlap.
        memory_budget: bytes for activations on the device; by default 70 % of a GPU's free memory. A GPU's allocator
            gives this process no more, to 40 MiB, while the work lasts. On a CPU, where the store shares the memory,
            half of what is free, less what the store needs.
        progress: show a progress bar.
        pad: True puts zeros around a volume whose extents the network itself does not take or rounds up, to the next
            multiples it takes, says so in a log line, and crops the results. Other volumes are not padded, nor are
            those that come with other arguments.

    Attributes:
        last_report: a `StreamingReport` of the last call, None before it.

    Raises:
        ValueError: for partitions < 1 or an unknown word.

    Examples:
        >>> network = torch.nn.Conv3d(1, 2, 3, padding=1)
        >>> SpatialPartitionInferer(partitions=4)(torch.zeros(1, 1, 17, 16, 16), network).shape
        torch.Size([1, 2, 17, 16, 16])
    """

    @numbers_checked
    def __init__(
        self,
        partitions: int | str = "auto",
        store: str | os.PathLike[str] = "host",
        device: torch.device | str | None = None,
        axis: int = 0,
        labels: bool | str = False,
        memory_budget: int | None = None,
        progress: bool = False,
        pad: bool = False,
    ) -> None:
        wrong = isinstance(partitions, bool) or not isinstance(partitions, int) or partitions < 1
        if partitions != "auto" and wrong:
            raise ValueError(f"partitions must be a positive number or 'auto' but is {partitions!r}.")
        if labels not in (True, False, "regions"):
            raise ValueError(f"labels must be True, False or 'regions' but is {labels!r}.")
        if axis < 0:
            raise ValueError(f"axis must be a whole number in 0 ... 2, got {axis}.")
        self.partitions, self.store, self.axis = partitions, store, axis
        self.device = None if device is None else as_device(device)
        self.labels, self.memory_budget, self.progress = labels, memory_budget, progress
        self.pad = pad
        self.last_report: StreamingReport | None = None
        self._calls, self._extents = 0, dict[Hashable, tuple[int, ...]]()
        self._plans: dict[Hashable, tuple[weakref.ref[nn.Module], Plan]] = {}

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network on the whole volume.

        Args:
            inputs: (B, C, spatial...), on any device; only a part at a time is copied to the working device.
            network: an nn.Module; it is not changed.
            args: passed to the network; tensors among them are cut where the network cuts them.
            kwargs: passed to the network likewise.

        Returns:
            What the network returns, its tensors on the CPU: floating-point logits, or labels.

        Raises:
            NotPartitionableError: what cannot be run in parts, by module, operator and line, before anything is
                computed; or if no number of partitions fits the budget.
            InputError: the device has less memory than one row takes; it names the bytes that would do.
            TypeError: if the network is not an nn.Module.
        """
        if not isinstance(network, nn.Module):
            raise TypeError(f"SpatialPartitionInferer needs an nn.Module but got {type(network).__name__}.")
        network = bare(network)
        size = self._taken(network, inputs) if self.pad and not args and not kwargs else None
        if size is None:
            answer, self.last_report = self._run(inputs, network, *args, **kwargs)
            return with_meta(answer, inputs)
        own = tuple(inputs.shape[2:])
        padded = torch.nn.functional.pad(inputs.as_subclass(torch.Tensor), around(own, size))
        answer, report = self._run(padded, network)
        answer = cropped(answer, own, size)
        self.last_report = replace(report, padded_to=size)
        return with_meta(answer, inputs)

    @one_at_a_time
    def _taken(self, network: nn.Module, inputs: torch.Tensor) -> tuple[int, ...] | None:
        """Larger extents at which the network runs, None for the volume's own."""
        own, key = tuple(inputs.shape[2:]), (fingerprint(network), mode_key(), tuple(inputs.shape), inputs.dtype)
        if key not in self._extents:
            size, _ = extents_taken(own, attempt_dry(network, tuple(inputs.shape[:2]), inputs.dtype))
            self._extents = dict(list(self._extents.items())[-15:]) | {key: size}
            if size != own:
                _LOG.warning(_PADDED, type(network).__name__, *(" x ".join(map(str, e)) for e in (own, size)))
        return None if self._extents[key] == own else self._extents[key]

    def _run(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, StreamingReport]:
        began = time.perf_counter()
        flat, spec = flatten_call((inputs, *args), kwargs)
        flat = [leaf.as_subclass(torch.Tensor) if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
        call = unflatten(flat, spec)
        device = self._device(network)
        plan = self._plan(network, call, flat, device)
        planned = time.perf_counter() - began
        store = self._store(device)
        store.reserve(plan.store_bytes)
        bar = tqdm(total=sum(j.tiles for j in plan.schedule.jobs), desc="tiles") if self.progress else None
        try:
            with _counting:
                self._calls += 1
                seed = torch.initial_seed() + self._calls
            with refusing_when_full("the network beside its weights", device, "free some, or take another device"):
                stream = Stream(plan, network, store, bar.update if bar is not None else None, seed)
                with bounded(device, self.memory_budget):
                    whole = stream(*call)
        finally:
            if bar is not None:
                bar.close()
        return whole, StreamingReport(
            stream.partitions,
            stream.peak_bytes,
            stream.moved_bytes,
            time.perf_counter() - began,
            plan.peak_bytes,
            plan.budget,
            plan.store_bytes,
            planned,
        )

    def prepare(self, inputs: torch.Tensor, network: nn.Module, program: Program | None = None) -> Plan:
        """The plan of a later call of the same network on a volume of the same shape and type, which will use it.

        Args:
            inputs: (B, C, spatial...) of any device, meta included: only shape and type count.
            network: not changed; a change of it or of its mode before the call makes the plan anew.
            program: the one of another plan of the same network and shape without labels, which saves time.

        Raises:
            NotPartitionableError: see :meth:`__call__`.
        """
        network = bare(network)
        size = self._taken(network, inputs) if self.pad else None
        if size is not None:
            inputs = inputs.new_empty((*inputs.shape[:2], *size), device="meta")
        return self._plan(network, ((inputs,), {}), [inputs], self._device(network), program)

    def _device(self, network: nn.Module) -> torch.device:
        device = self.device or home(network)
        return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device

    def _store(self, device: torch.device) -> Store:
        return HostStore(device) if self.store == "host" else FolderStore(Path(self.store))

    @one_at_a_time
    def _plan(
        self, network: nn.Module, call: Any, flat: list[Any], device: torch.device, program: Program | None = None
    ) -> Plan:
        options = (str(device), self.partitions, self.memory_budget, self.axis, self.labels)
        seen = fingerprint(network)
        key = (seen, call_key(flat), mode_key(), options)
        found = self._plans.get(key)
        known = found[1] if found is not None and found[0]() is network else None
        if known is not None and known.fresh_budget(self._budget(device)):
            return known
        program = known.schedule.bound.program if known is not None else program  # only the budget is another one
        shared = self.memory_budget is None and device.type == "cpu" and self.store == "host"
        budget, args, kwargs = self._budget(device), call[0], call[1]
        plan = make_plan(
            network, args, kwargs, self.partitions, budget, self.axis, device, self.labels, shared, program
        )
        self._plans = {k: v for k, v in list(self._plans.items())[-3:] if v[0]() is not None}
        if seen == fingerprint(network):  # else forward changes what the next call sees
            self._plans[key] = (weakref.ref(network), plan)
        return plan

    def _budget(self, device: torch.device) -> int | None:
        """Bytes the plan may use, None if a number of partitions is given."""
        if self.memory_budget is not None:
            return self.memory_budget
        if self.partitions != "auto":
            return None
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own reserve
            return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
        free = available_memory()
        return None if free is None else int(HOST_SHARE * free)


def whole_peak_bytes(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Activation bytes that the plain network would need at once in inference, by a dry run.

    Args:
        network: not changed.
        shape: input shape (B, C, spatial...).
        dtype: The input's type.
    """
    return dry_run(network, shape, dtype, lambda volume: network(torch.empty_like(volume)), False).peak_bytes
