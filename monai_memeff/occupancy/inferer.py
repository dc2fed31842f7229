"""OctreeInferer: the dense answer of a network of points, queried only where the answer changes."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type, optional_import
from torch import Tensor, nn

from monai_memeff.arguments import check_count, numbers_checked
from monai_memeff.checks import check_finite, check_tensor
from monai_memeff.memory.budget import refusing_when_full
from monai_memeff.occupancy.evaluator import PointEvaluator, labels_of
from monai_memeff.occupancy.octree import NodeGrid, default_stride, node_counts, refine
from monai_memeff.occupancy.report import OctreeReport, summed

tqdm, _ = optional_import("tqdm", name="tqdm")

UNQUERIED_LOGIT = 10.0
"""Size of the logit of voxels that were not queried: a probability of less than 5e-5 to be something else."""


class OctreeInferer(Inferer):
    """Label a whole volume with a network of points, querying near the boundaries between labels only.

    The idea is that of OSS-Net (Reich et al. 2021, arXiv 2110.10640, inference) and of multi-resolution isosurface
    extraction (Mescheder et al. 2019, arXiv 1812.03828): start coarse, halve the stride where the corners of a cell
    differ. Here, at every level, the corners of every boundary cell are queried until no cell joins them, so a
    boundary that was touched once is followed to its end. The labels then are those of dense evaluation, voxel for
    voxel, except for whole 26-connected pieces surrounded by one label of which no voxel was queried:

    - ``initial="grid"`` queries every node of the coarsest grid first, so it finds every piece that holds a cube of
      ``stride`` voxels. Thinner ones are found if they meet a node or touch a boundary that is followed.
    - ``initial="network"`` starts from the network's own coarse prediction and queries where that changes. It queries
      fewer points, and a piece that the coarse prediction misses is not found, however large it is. Where the coarse
      prediction is one single label it says nothing about where to query: the grid is used, with a warning.

    ``compare_dense=True`` counts the voxels that differ, at the price of querying all of them.

    A network has ``encode(volume) -> latent`` and ``query(latent, points, volume) -> logits``: volume (B, C, H, W, D),
    points (B, N, 3) floats, voxel indices (i, j, k) of the volume, logits (B, N, K). One with ``coarse_logits(latent)
    -> (B, K, h, w, d)`` has a coarse prediction of the whole volume; where it has none, or gives None, the grid is
    used. A plain function points -> logits is taken as well. One channel is a binary answer (inside where the logit is
    positive), several are classes of which the largest wins; overlapping labels (one sigmoid each) are not supported.
    The network should be in evaluation mode, so that a point's answer does not depend on the others.

    Args:
        points_per_pass: most points in one call of ``query``; bounds the memory of queries. ``encode`` sees the volume
            as a whole, and the octree keeps two bytes per voxel beside its list of boundary cells.
        initial: "grid" or "network", see above.
        stride: voxels between nodes of the coarsest grid, a power of two, for all axes or for each; by default for each
            axis the largest up to a sixteenth of its extent, at most 8. It need not divide the extents and may exceed
            them: the last voxel of an axis is always a node.
        labels: give labels instead of logits, which takes no float buffer of the volume's size.
        compare_dense: Query all remaining voxels afterwards, count those that differ, and change nothing.
        progress: show a progress bar of points.
        memory_budget: bytes that one call of the network may take on its device, beside weights and volume: passes get
            smaller until they fit. A pass that runs out of memory is halved and queried again.

    Attributes:
        last_report: an :class:`OctreeReport` of the last call, None before it.

    Raises:
        ValueError: an argument is out of range.

    Warns:
        UserWarning: the coarse prediction is one single label, so the grid is used.

    Examples:
        >>> inferer = OctreeInferer(labels=True, compare_dense=True)
        >>> ball = lambda points: 20.5 - (points - 32).norm(dim=-1, keepdim=True)  # a network of points
        >>> inferer(torch.zeros(1, 1, 65, 65, 65), ball).shape
        torch.Size([1, 1, 65, 65, 65])
        >>> inferer.last_report.fraction < 0.2, inferer.last_report.disagreement
        (True, 0)
    """

    @numbers_checked
    def __init__(
        self,
        points_per_pass: int = 2**14,
        initial: str = "grid",
        stride: int | Sequence[int] | None = None,
        labels: bool = False,
        compare_dense: bool = False,
        progress: bool = False,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        check_count("points_per_pass", points_per_pass)
        if initial not in ("network", "grid"):
            raise ValueError(f"initial must be 'network' or 'grid', got {initial!r}.")
        strides = None if stride is None else (stride,) * 3 if isinstance(stride, int) else tuple(stride)
        if strides is not None and (len(strides) != 3 or any(s < 1 or s & (s - 1) for s in strides)):
            raise ValueError(f"stride must be a power of two, or three of them, got {stride}.")
        self.points_per_pass, self.initial, self.stride, self.labels = points_per_pass, initial, strides, labels
        self.compare_dense, self.progress, self.memory_budget = compare_dense, progress, memory_budget
        self.last_report: OctreeReport | None = None

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, network: nn.Module | Callable[[Tensor], Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Infer.

        Args:
            inputs: (B, C, H, W, D), any extents. The labels are kept on its device.
            network: see the class; bare or inside DistributedDataParallel.
            args: none are taken.
            kwargs: none are taken.

        Returns:
            On the device of ``inputs``, with its metadata: labels (B, 1, H, W, D), uint8 (int16 from 257 classes on);
            or logits (B, K, H, W, D), float32. The logits of voxels that were not queried are a stand-in that agrees
            with their label: 10 for the label's channel and 0 for the others, or 10 and -10 for a single channel. All
            eight voxels of every 2 x 2 x 2 cell with more than one label have the network's own logits, so a surface
            extracted from them (:func:`logits_to_mesh`) is that of dense evaluation.

        Raises:
            TypeError: the network answers no points, or there are further arguments.
            ValueError: the volume is no (B, C, H, W, D), is empty or has values that are not finite; or the network's
                logits have another shape than (1, N, K), or are NaN.
        """
        if args or kwargs:
            raise TypeError("OctreeInferer passes no further arguments to the network; bind them beforehand.")
        check_tensor(inputs, "OctreeInferer")
        with refusing_when_full("the octree of a volume", inputs.device, "free some, or take a smaller volume"):
            result = self._infer(inputs.as_subclass(Tensor), network)
        return convert_to_dst_type(result, inputs, dtype=result.dtype, device=result.device)[0]

    def _infer(self, volume: Tensor, network: nn.Module | Callable[[Tensor], Tensor]) -> Tensor:
        _check_volume(volume)
        results, reports = [], []
        for item in volume.split(1):
            began = time.perf_counter()
            search = _Search(self, PointEvaluator(network, item, self.memory_budget), item)
            results.append(search.run())
            seconds = time.perf_counter() - began
            reports.append(search.report(seconds, search.disagreement() if self.compare_dense else None))
        self.last_report = summed(reports)
        return torch.stack(results) if len(results) > 1 else results[0][None]


class _Search:
    """One volume of a batch: its octree, and what was queried."""

    def __init__(self, settings: OctreeInferer, network: PointEvaluator, volume: Tensor) -> None:
        self.network, self.budget = network, settings.points_per_pass
        self.shape, self.device = tuple(volume.shape[2:]), volume.device
        self.stride = settings.stride or default_stride(self.shape)
        self.from_network = settings.initial == "network" and network.coarse is not None
        self.kept: list[tuple[Tensor, Tensor]] | None = None if settings.labels else []
        self.progress = settings.progress
        self.levels: list[tuple[int, ...]] = []
        self.points: list[int] = []
        self.rounds: list[int] = []

    def run(self) -> Tensor:
        """Label the volume: (1, H, W, D) labels, or (K, H, W, D) logits."""
        with self._bar("octree"):
            self.queried = 0
            for grid, rounds in refine(self._coarsest(), self._evaluate, self.budget):
                self.grid = grid
                self.levels.append(grid.stride)
                self.points.append(self.queried - sum(self.points))
                self.rounds.append(rounds)
        return self.grid.labels[None] if self.kept is None else self._logits(self.kept)

    def disagreement(self) -> int:
        """Voxels, of those that were not queried, that the network labels otherwise."""
        wrong, queried, labels = 0, self.grid.queried.view(-1), self.grid.labels.view(-1)
        with self._bar("dense"):
            for start in range(0, queried.numel(), self.budget):
                keys = start + (~queried[start : start + self.budget]).nonzero()[:, 0]
                if keys.numel():
                    answers = labels_of(self.network.logits(self.grid.voxels(keys)))
                    wrong += int((answers != labels[keys]).sum())
                    self._advance(len(keys))
        return wrong

    def report(self, seconds: float, disagreement: int | None) -> OctreeReport:
        """What this volume took."""
        return OctreeReport(
            num_queries=self.queried,
            voxels=math.prod(self.shape),
            levels=tuple(self.levels),
            points_per_level=tuple(self.points),
            rounds=tuple(self.rounds),
            initial="network" if self.from_network else "grid",
            disagreement=disagreement,
            seconds=seconds,
        )

    def _coarsest(self) -> NodeGrid:
        if self.from_network:
            assumed = self._nodes(queried=False)
            if bool((assumed.labels != assumed.labels.view(-1)[0]).any()):
                return assumed
            warnings.warn(
                f"the coarse prediction is label {int(assumed.labels.view(-1)[0])} everywhere and does not say where "
                f"to query: the grid of stride {self.stride} is queried instead. Train the coarse head longer, "
                "or set initial='grid'.",
                stacklevel=2,
            )
            self.from_network = False
        return self._nodes(queried=True)

    def _nodes(self, queried: bool) -> NodeGrid:
        """The coarsest grid, its labels queried, or assumed by the coarse prediction."""
        counts = node_counts(self.shape, self.stride)
        flags = torch.full(counts, queried, device=self.device)
        nodes = NodeGrid(self.shape, self.stride, flags, flags)
        label = self._evaluate if queried else self._predict
        keys = (torch.arange(i, min(i + self.budget, flags.numel())) for i in range(0, flags.numel(), self.budget))
        labels = torch.cat([label(nodes.voxels(part.to(self.device))) for part in keys])
        return NodeGrid(self.shape, self.stride, labels.view(counts), flags)

    def _predict(self, voxels: Tensor) -> Tensor:
        return labels_of(self.network.coarse_logits(voxels))

    def _evaluate(self, voxels: Tensor) -> Tensor:
        logits = self.network.logits(voxels)
        if self.kept is not None:
            _, width, depth = self.shape
            self.kept.append(((voxels[:, 0] * width + voxels[:, 1]) * depth + voxels[:, 2], logits))
        self.queried += len(voxels)
        self._advance(len(voxels))
        return labels_of(logits)

    def _logits(self, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        channels, labels = self.network.channels, self.grid.labels
        if channels == 1:
            whole = labels[None].float().mul_(2 * UNQUERIED_LOGIT).sub_(UNQUERIED_LOGIT)
        else:
            whole = torch.zeros(channels, *self.shape, device=self.device)
            for channel in range(channels):
                whole[channel].masked_fill_(labels == channel, UNQUERIED_LOGIT)
        for keys, logits in kept:
            whole.view(channels, -1)[:, keys] = logits.T.float()
        return whole

    @contextlib.contextmanager
    def _bar(self, name: str) -> Iterator[None]:
        bar = tqdm(desc=name, unit="point", unit_scale=True) if self.progress else None
        self._advance: Callable[[int], Any] = bar.update if bar is not None else int
        try:
            yield
        finally:
            if bar is not None:
                bar.close()


def _check_volume(volume: Tensor) -> None:
    if volume.dim() != 5 or volume.numel() == 0:
        raise ValueError(
            f"OctreeInferer works on volumes (B, C, H, W, D) with voxels, got shape {tuple(volume.shape)}."
        )
    check_finite(volume, "OctreeInferer")
