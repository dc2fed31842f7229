"""Runs a plan on one device: whole tensors in a store, tiles on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _python_dispatch  # read in torch 2.6 to 2.14
from torch.utils import _pytree as pytree

from monai_memeff.errors import InputError
from monai_memeff.halo.planning.capture import bare
from monai_memeff.halo.planning.estimate import Estimate, job_box, no_autocast
from monai_memeff.halo.planning.layout import Box, narrow
from monai_memeff.halo.planning.plan import Plan
from monai_memeff.halo.planning.program import Ref, check_memory, flatten_call
from monai_memeff.halo.planning.rules.base import Env, Reduction, State
from monai_memeff.halo.planning.schedule import Job
from monai_memeff.halo.planning.tile import Copies, Worker
from monai_memeff.halo.run.copies import CopyStreams, to_device, to_store
from monai_memeff.halo.run.stores import Store
from monai_memeff.memory.budget import lacking, ran_out
from monai_memeff.memory.meter import CUDAPeakMeter
from monai_memeff.memory.tracker import StorageTracker, Watcher


class Stream:
    """One run of a plan. Where the device runs out of memory, the tile is halved, and so are those after it.

    Args:
        plan: what to run.
        network: whose parameters and buffers are used.
        store: where whole tensors wait.
        on_tile: called after every tile.
        seed: The seed of random numbers.

    Attributes:
        peak_bytes: highest number of activation bytes on the device.
        moved_bytes: bytes copied between device and store, both ways.
        partitions: number of tiles of the most finely cut job.
    """

    def __init__(
        self, plan: Plan, network: nn.Module, store: Store, on_tile: Callable[[], object] | None = None, seed: int = 0
    ) -> None:
        self.plan, self.store, self.on_tile = plan, store, on_tile
        self.schedule, self.bound = plan.schedule, plan.schedule.bound
        self.env = Env(plan.device, seed)
        self.copies = CopyStreams(plan.device) if plan.device.type == "cuda" else Copies()
        self.peak_bytes = self.moved_bytes = self.partitions = 0
        self.wholes: dict[int, torch.Tensor] = {}
        self._read_state(bare(network))

    def _read_state(self, network: nn.Module) -> None:
        state = dict(network.named_parameters(remove_duplicate=False))
        state.update(network.named_buffers(remove_duplicate=False))
        program = self.bound.program
        for index, name in program.state.items():
            found = state[name] if name in state else program.constants[program[index].name]
            self.wholes[index] = found.detach().to(self.env.device)

    def load(self, index: int, box: Box, copies: Copies) -> torch.Tensor:
        """Rows of a value that is stored, kept, an input or a parameter, on the device."""
        layout = self.bound.layouts[index]
        if any(hi <= lo for lo, hi in box):
            value = self.bound.program[index]
            return torch.empty(layout.part_shape(box), dtype=value.dtype, device=self.env.device)
        rows = narrow(self.wholes[index], layout, layout.whole, box)
        if index in self.schedule.stored or index in self.bound.program.inputs.values():
            self.moved_bytes += rows.numel() * rows.element_size()
            return to_device(rows, self.env.device, copies)
        return rows

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the network returns for these arguments.

        The caller's arguments are changed as the network would change them.
        """
        program = self.bound.program
        flat, _ = flatten_call(args, kwargs)
        check_memory(program, flat, [self.wholes[i] for i in program.state])
        for position, index in program.inputs.items():
            self.wholes[index] = flat[position].detach()
        with torch.no_grad(), no_autocast(self.env.device), self._measured():
            for job in self.schedule.jobs:
                self._job(job)
        for position, index in program.input_mutations.items():
            flat[position].copy_(self.wholes[index])
        leaves = [self._output(leaf) for leaf in program.outputs]
        return pytree.tree_unflatten(leaves, program.output_spec)

    def _output(self, leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        found = self.wholes[leaf.index]
        if leaf.index in self.bound.program.inputs.values() or leaf.index in self.bound.program.state:
            return found.clone().cpu()
        return found.cpu()

    def _job(self, job: Job) -> None:
        program, whole = self.bound.program, None
        if job.index in self.schedule.stored:
            whole = self.store.allocate(program[job.index].shape, program[job.index].dtype)
        kept, states = self._tiles(job, whole)
        if whole is not None:
            self._written(job.index, whole)
        elif kept is not None:
            self.wholes[job.index] = kept
        for index, state in states.items():
            reduction = self.bound.step(index)
            assert isinstance(reduction, Reduction)
            self.wholes[index] = reduction.finish(state, self.env)
        for index in job.frees:
            self.wholes.pop(index, None)

    def _tiles(self, job: Job, whole: torch.Tensor | None) -> tuple[torch.Tensor | None, dict[int, State]]:
        """Compute a job's tiles; returns the last if it is kept, and the states of the reductions."""
        worker = Worker(self.schedule, self.load, self.env, to_store, self.copies)
        states, kept, cuts = dict[int, State](), None, job.cuts()
        most, count, ahead = job.rows, 0, job.ahead
        try:
            for (lo, hi), after in zip(cuts, [*cuts[1:], None], strict=True):
                while lo < hi or not count:
                    end, fed = min(hi, lo + most), dict(states)  # a tile that fails may have fed some reductions
                    following = _following(job, end, hi, most, after) if ahead else None
                    try:
                        kept = worker.tile(job, job_box(job, lo, end), whole, fed, following)
                    except RuntimeError as error:
                        worker.finish()
                        most, ahead = self._less(job, end - lo, ahead, error), False
                        continue
                    states, lo, count = fed, end, count + 1
                if self.on_tile is not None:
                    self.on_tile()
        finally:
            worker.finish()
        self.partitions = max(self.partitions, count)
        return kept, states

    def _less(self, job: Job, rows: int, ahead: bool, error: RuntimeError) -> int:
        """Rows of a tile after one ran out of memory: as many where others were read ahead, else half of them.

        An error that says something else is raised.
        """
        if not ran_out(error, self.env.device):
            raise error
        if ahead:
            return rows
        if rows > 1 and job.domain.spread:
            return -(-rows // 2)
        value, estimate = self.bound.program[job.index], Estimate(self.schedule, self.env.device)
        base = estimate.kept_bytes()[self.schedule.jobs.index(job)]
        raise InputError(
            f"{value.where}: {value.operator} needs {base + estimate.job(job, job.rows)} bytes of {self.env.device} "
            f"even in {job.rows} tiles, and they are not free (with all else, the work "
            f"{lacking(error, self.env.device)}): free them, take a smaller volume, or another device"
        ) from error

    def _written(self, index: int, whole: torch.Tensor) -> None:
        """A stored value is complete."""
        self.moved_bytes += whole.numel() * whole.element_size()
        if self.env.device.type == "cuda":
            torch.cuda.current_stream(self.env.device).synchronize()
        self.wholes[index] = whole

    @contextlib.contextmanager
    def _measured(self) -> Iterator[None]:
        """Measure the highest number of bytes on the device while the block runs."""
        if self.env.device.type == "cuda":
            with CUDAPeakMeter(self.env.device) as meter:
                yield
            self.peak_bytes = meter.peak_bytes
            return
        tracker = StorageTracker(self.env.device.type, count_older=False)
        try:
            with Watcher(tracker), _hidden(self, tracker):
                yield
        finally:
            tracker.close()
        self.peak_bytes = tracker.peak


def _following(job: Job, end: int, hi: int, most: int, after: tuple[int, int] | None) -> Box | None:
    """The tile after one that ends there: the rest of a cut that was halved, or the next cut."""
    rows = (end, min(hi, end + most)) if end < hi else after
    return None if rows is None else job_box(job, *rows)


@contextlib.contextmanager
def _hidden(stream: Stream, tracker: StorageTracker) -> Iterator[None]:
    """What the store gives out is not on the device, although both may be host memory."""
    plain = stream.store

    class Quiet:
        def reserve(self, nbytes: int) -> None:
            plain.reserve(nbytes)

        def allocate(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
            with _python_dispatch._pop_mode_temporarily():  # the innermost mode: ours
                whole = plain.allocate(shape, dtype)
            tracker.track(whole.untyped_storage(), is_new=False)
            return whole

    stream.store = Quiet()
    try:
        yield
    finally:
        stream.store = plain
