"""SlabInferer: slabs of slices pass by while the network's state stays, so a volume need never be in memory whole."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type, optional_import
from torch import Tensor, nn

from monai_memeff.arguments import check_count, numbers_checked
from monai_memeff.checks import as_device, check_tensor, plain
from monai_memeff.clstm.slabs import check_that_slabs_continue
from monai_memeff.clstm.sweep import Sweep
from monai_memeff.clstm.target import SlabTarget
from monai_memeff.memory.budget import refusing_when_full
from monai_memeff.memory.threads import same_stream

tqdm, _ = optional_import("tqdm", name="tqdm")


class SlabInferer(Inferer):
    """Run a :class:`~monai_memeff.clstm.CLSTMUNet` slab by slab, with the result of the whole volume at once.

    A volume in memory gives a volume. Slabs from anywhere else (a file, a generator) give an iterator of results, one
    slab at a time, so memory does not grow with the depth; :meth:`write` puts them into an array or a file as they
    come. A bidirectional network needs two walks: from the last slab to the first for the states of the backward
    direction (kept on the host, one per slab), then from the first to the last for the results; its U-Net runs twice.

    Args:
        slab: slices per slab, for volumes in memory.
        labels: give labels (B, 1, H, W, D), uint8 (int16 from 257 classes on), instead of logits: the largest class, or
            1 where a single logit is above 0.
        device: where the results are; default: where the volume is, the host for slabs from elsewhere.
        prefetch: slabs read and copied to the network's device ahead, by a thread of its own; 0: none.
        progress: show a progress bar.
        memory_budget: bytes that a call may take on the network's device, beside its weights and the volume; slabs then
            have at most as many slices as fit, of 1, 2, 4, ... and ``slab``. Results, states and slabs fetched ahead
            count where they lie on that device. Slabs from elsewhere are cut in the same way.

    Where the device runs out of memory, the slab at hand is cut in two and the work goes on from the state before it.

    Raises:
        ValueError: slab below 1, prefetch below 0, or memory_budget below 1.

    Examples:
        >>> network = CLSTMUNet(in_channels=1, out_channels=2, channels=(4, 8)).eval()
        >>> SlabInferer(slab=4)(torch.rand(1, 1, 16, 16, 9), network).shape
        torch.Size([1, 2, 16, 16, 9])
    """

    @numbers_checked
    def __init__(
        self,
        slab: int = 16,
        labels: bool = False,
        device: str | torch.device | None = None,
        prefetch: int = 1,
        progress: bool = False,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        if memory_budget is not None:
            check_count("memory_budget", memory_budget)
        self.memory_budget = memory_budget
        check_count("slab", slab)
        check_count("prefetch", prefetch, least=0)
        self.slab, self.labels, self.prefetch, self.progress = slab, labels, prefetch, progress
        self.device = None if device is None else as_device(device)

    def __call__(self, inputs: Tensor | Iterable[Tensor], network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Infer.

        Args:
            inputs: a volume (B, C, H, W, D), or its slabs (B, C, H, W, d) in order, with any numbers of slices; cut
                along the network's axis. Slabs for a bidirectional network must be a sequence, to be walked twice.
            network: a CLSTMUNet, bare or inside DistributedDataParallel, or anything with its method ``sweep``.
            args: none are taken.
            kwargs: none are taken.

        Returns:
            Logits or labels of the volume, or an iterator over those of the slabs.

        Raises:
            TypeError: the network has no ``sweep``, there are further arguments, or a bidirectional network gets slabs
                that can be read only once.
            ValueError: slabs do not continue each other (MetaTensor): other spacing, or slices missing between them.
        """
        bare = getattr(network, "module", network)
        if not hasattr(bare, "sweep") or args or kwargs:
            raise TypeError(
                f"SlabInferer runs CLSTMUNet on a volume and nothing else, got {type(bare).__name__} with "
                f"{len(args) + len(kwargs)} further arguments; use another inferer for other networks."
            )
        if not isinstance(inputs, Tensor):
            return self._stream(_slabs_of(inputs), bare)
        if torch.is_grad_enabled() and bare.training:  # a trainer: the network keeps its own memory low
            return network(inputs)
        return self._volume(inputs, bare)

    def write(self, inputs: Tensor | Iterable[Tensor], network: nn.Module, out: Any) -> None:
        """Put the results into an array slab by slab: a memory-mapped file, say.

        Args:
            inputs: see :meth:`__call__`.
            network: See :meth:`__call__`.
            out: (B, K, H, W, D), a tensor or anything with shape and dtype that numpy's slices can be assigned to. A
                file from ``create_labels`` takes its name when all slabs are written; an interruption leaves none.

        Raises:
            InputError: ``out`` has another shape, or its dtype cannot hold every value.
        """
        bare = getattr(network, "module", network)
        target = SlabTarget(out, bare.axis, _slabs_of(inputs))
        try:
            for result in self._stream(self._cut(inputs, bare.axis) if isinstance(inputs, Tensor) else inputs, bare):
                target.put(result)
            target.finish()
        except BaseException:
            target.abort()
            raise

    def _volume(self, volume: Tensor, network: Any) -> Tensor:
        whole: Tensor | None = None
        device, first = self.device or volume.device, 0
        slabs, here = self._cut(volume, network.axis), next(network.parameters()).device
        sweep = self._new_sweep(network, tuple(volume.shape) if device == here else None)
        if self.memory_budget is not None:  # slabs of the size that fits: nothing is joined
            with _refusing_when_full(here):
                slab = min(self.slab, sweep.fit(slabs[0].to(here)))
            slabs = list(plain(volume).split(slab, dim=2 + network.axis))
        for result in self._stream(slabs, network, device, sweep):
            if whole is None:
                shape = (*result.shape[:2], *volume.shape[2:])
                with _refusing_when_full(device):
                    whole = torch.empty(shape, dtype=result.dtype, device=device)
            length = result.shape[2 + network.axis]
            whole.narrow(2 + network.axis, first, length).copy_(result)
            first += length
        assert whole is not None
        return convert_to_dst_type(whole, volume, dtype=whole.dtype, device=whole.device)[0]

    def _new_sweep(self, network: Any, whole: tuple[int, ...] | None = None) -> Sweep:
        return Sweep(network, self.memory_budget, self.labels, self.prefetch, whole)

    def _cut(self, volume: Tensor, axis: int) -> list[Tensor]:
        if volume.ndim != 5:
            raise ValueError(f"SlabInferer takes a volume (B, C, H, W, D), got {tuple(volume.shape)}.")
        return list(plain(volume).split(self.slab, dim=2 + axis))

    def _stream(
        self,
        slabs: Iterable[Tensor],
        network: Any,
        device: torch.device | None = None,
        sweep: Sweep | None = None,
    ) -> Iterator[Tensor]:
        sweep = sweep or self._new_sweep(network)
        ends: list[Any] = [None]
        if network.bidirectional:
            if not isinstance(slabs, Sequence):
                raise TypeError(
                    "a bidirectional network walks over the slabs twice: give a sequence (a list, NiftiSlabs), not an "
                    f"iterator that can be read once ({type(slabs).__name__})."
                )
            with _refusing_when_full(sweep.device):
                ends = self._states_before(slabs, network, sweep)
        return self._results(slabs, network, device or self.device or torch.device("cpu"), ends, sweep)

    def _states_before(self, slabs: Sequence[Tensor], network: Any, sweep: Sweep) -> list[Any]:
        """For every slab the backward direction's state behind it, the first slab's last."""
        ends: list[Any] = [None]
        backwards = (slabs[number] for number in range(len(slabs) - 1, 0, -1))
        for slab in self._ahead(backwards, network, len(slabs) - 1, "backward"):
            with torch.no_grad():
                state = sweep.state_before(slab, _moved(ends[-1], slab.device))
            ends.append(_moved(state, torch.device("cpu")))
        return ends

    def _results(
        self, slabs: Iterable[Tensor], network: Any, device: torch.device, ends: list[Any], sweep: Sweep
    ) -> Iterator[Tensor]:
        state = None
        total = len(slabs) if isinstance(slabs, Sequence) else None
        with _refusing_when_full(sweep.device):
            for slab in self._ahead(check_that_slabs_continue(slabs, network.axis), network, total, "slabs"):
                end = _moved(ends.pop(), slab.device) if ends else None
                with torch.no_grad():
                    result, state = sweep(slab, state, end, device)
                yield result

    def _ahead(self, slabs: Iterable[Tensor], network: nn.Module, total: int | None, name: str) -> Iterator[Tensor]:
        """The slabs on the network's device, some of them fetched while others are computed."""
        device = next(network.parameters()).device
        source, in_order = iter(slabs), same_stream(device)
        bar = tqdm(total=total, desc=name, unit="slab", disable=not self.progress)

        def fetch() -> Tensor | None:
            slab = next(source, None)
            with in_order():
                return None if slab is None else slab.to(device, non_blocking=True)

        with ThreadPoolExecutor(1) as thread, bar:
            waiting = deque(thread.submit(fetch) for _ in range(self.prefetch))
            while True:
                if self.prefetch:
                    waiting.append(thread.submit(fetch))
                slab = waiting.popleft().result() if self.prefetch else fetch()
                if slab is None:
                    return
                yield slab
                bar.update()


def _refusing_when_full(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """For what lies on the device beside the slices at work: slabs fetched ahead, states, results."""
    return refusing_when_full("a slab with what waits beside it", device, "free some, or take a smaller slab or plane")


def _slabs_of(inputs: Any) -> Any:
    """The same; TypeError for an array, whose first axis would be walked along as if it were of slabs."""
    if hasattr(inputs, "ndim"):
        check_tensor(inputs, "SlabInferer")
    return inputs


def _moved(state: Any, device: torch.device) -> Any:
    return None if state is None else tuple(part.to(device) for part in state)
