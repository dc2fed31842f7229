"""NaN and infinity: refused in words by every network, transform, loss and score, before any work."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monai_memeff.apps.skull import (
    ImplantFromCompletion,
    RandSkullDefect,
    SkullShell,
    UpperSkullCrop,
)
from monai_memeff.apps.skull.metrics import compute_implant_dice
from monai_memeff.clstm import CLSTMUNet, SlabInferer
from monai_memeff.errors import InputError
from monai_memeff.occupancy import OccupancyNet, OctreeInferer, PrepareBatchOccupancy, RandOccupancyPoints
from monai_memeff.sparse import (
    CoarseToSparseUNet,
    DownsampleMask,
    RandSegmentationErrors,
    RandVoxelDropout,
    ResampleToGrid,
    SparseCompletionLoss,
    SparseCompletionNet,
    SparseCoordinates,
    SparseInferer,
    SparseTensor,
    SparseUNet,
    ThresholdAtSpacing,
)
from monai_memeff.sparse.points import Data, GridSampling3D
from monai_memeff.transforms import PredictMask

SHAPE = (5, 6, 7)
UNET = SparseUNet(3, 1, 2, (2, 4), (2,)).eval()
ABOVE = SparseUNet(3, 1, 2, (2, 4), (2,), threshold=0.5).eval()
COARSE = CoarseToSparseUNet(3, 1, 2, (2, 4), (2,), refine_channels=(2, 4), refine_strides=(2,)).eval()
COMPLETION = SparseCompletionNet((1,) * 7)
OCCUPANCY = OccupancyNet(1, 2, None, (4,), "interpolated", width=4, blocks=1).eval()
CLSTM = CLSTMUNet(3, 1, 2, (2, 4)).eval()
ONES = torch.ones(1, 1, *SHAPE)

ENTRANCES: dict[str, Callable[[Tensor], Any]] = {
    "SparseUNet": UNET,
    "SparseUNet with a threshold": ABOVE,
    "SparseUNet in SparseInferer": lambda x: SparseInferer()(x, UNET),
    "CoarseToSparseUNet": COARSE,
    "SparseCompletionNet": lambda x: COMPLETION(x, ONES),
    "its target": lambda x: COMPLETION(ONES, x),
    "its loss": lambda x: SparseCompletionLoss()(COMPLETION(ONES, ONES), x),
    "SparseTensor": lambda x: SparseTensor(x.view(-1, 1), ONES[:, 0].nonzero(), SHAPE),
    "SparseTensor.from_dense": lambda x: SparseTensor.from_dense(x, ONES.bool()),
    "SparseCoordinates": lambda x: SparseCoordinates()(x[0]),
    "DownsampleMask": lambda x: DownsampleMask(2)(x[0]),
    "ResampleToGrid": lambda x: ResampleToGrid()(x[0], ONES[0]),
    "ResampleToGrid, trilinear": lambda x: ResampleToGrid("trilinear")(x[0], ONES[0]),
    "RandSegmentationErrors": lambda x: RandSegmentationErrors()(x[0]),
    "RandVoxelDropout": lambda x: RandVoxelDropout(0.5)(x[0]),
    "ThresholdAtSpacing": lambda x: ThresholdAtSpacing(0.5, 1.0)(x[0]),
    "points": lambda x: GridSampling3D(1.0)(Data(x.view(-1)[:9].view(3, 3))),
    "OccupancyNet": OCCUPANCY,
    "OccupancyNet of points": lambda x: OCCUPANCY(x, torch.zeros(1, 3, 3)),
    "OctreeInferer": lambda x: OctreeInferer()(x, OCCUPANCY),
    "OctreeInferer of a function": lambda x: OctreeInferer()(x, lambda points: points[..., :1]),
    "RandOccupancyPoints": lambda x: RandOccupancyPoints(5)(x[0]),
    "PrepareBatchOccupancy": lambda x: PrepareBatchOccupancy()({"image": ONES, "label": x}),
    "CLSTMUNet": CLSTM,
    "SlabInferer": lambda x: SlabInferer(2)(x, CLSTM),
    "RandSkullDefect": lambda x: RandSkullDefect()(x[0]),
    "SkullShell": lambda x: SkullShell()(x[0]),
    "UpperSkullCrop": lambda x: UpperSkullCrop(keep=2)(x[0]),
    "ImplantFromCompletion": lambda x: ImplantFromCompletion()(x[0], ONES[0]),
    "the defective skull": lambda x: ImplantFromCompletion()(ONES[0], x[0]),
    "the implant's score": lambda x: compute_implant_dice(x, ONES),
    "the truth of the score": lambda x: compute_implant_dice(ONES, x),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@settings(max_examples=6)
@given(
    place=st.tuples(*[st.integers(0, extent - 1) for extent in (1, 1, 3)]),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_one_rule_at_every_entrance(entrance: str, place: tuple[int, int, int], value: float) -> None:
    volume = ONES.clone()
    volume[(0, 0, *place)] = value  # among the first nine values, which points are made of
    with pytest.raises(InputError, match=r"needs finite values, got \d+ NaN or infinite; replace them first"):
        ENTRANCES[entrance](volume)


OUT: dict[str, tuple[Callable[[Tensor, Any], Any], Any]] = {
    "SlabInferer": (SlabInferer(2, labels=True), CLSTM),
    "SlabInferer, both directions": (
        SlabInferer(2, labels=True),
        CLSTMUNet(3, 1, 1, (2, 4), bidirectional=True).eval(),
    ),
    "SparseInferer": (SparseInferer(), UNET),
    "SparseInferer, completion": (SparseInferer(), copy.deepcopy(COMPLETION).eval()),
    "OctreeInferer": (OctreeInferer(labels=True), OCCUPANCY),
    "PredictMask": (lambda x, net: PredictMask(net)(x[0]), torch.nn.Conv3d(1, 1, 1)),
}


@pytest.mark.parametrize("way", OUT)
def test_logits_that_are_nan_give_no_labels(way: str) -> None:
    """Of broken weights, or overflows of half precision: no comparison is true of NaN, so all would be background."""
    inferer, network = OUT[way]
    broken = copy.deepcopy(network)
    for parameter in broken.parameters():
        parameter.data.fill_(math.nan)
    inferer(ONES, network)
    with pytest.raises(InputError, match="NaN"):
        inferer(ONES, broken)


@pytest.mark.parametrize("entrance", [name for name in ENTRANCES if name not in ("OctreeInferer of a function",)])
def test_what_is_finite_passes(entrance: str) -> None:
    if entrance not in ("RandSkullDefect", "UpperSkullCrop"):
        ENTRANCES[entrance](ONES)


@pytest.mark.parametrize(
    "entrance",
    ["DownsampleMask", "ResampleToGrid", "RandSegmentationErrors", "RandVoxelDropout", "SkullShell",
     "ImplantFromCompletion", "the defective skull", "the implant's score", "the truth of the score"],
)  # fmt: skip
def test_logits_are_no_masks(entrance: str) -> None:
    logits = ONES.clone()
    logits[0, 0, 0, 0, 0] = -10
    with pytest.raises(InputError, match=r"needs masks.*got -10; compare logits or intensities with a threshold"):
        ENTRANCES[entrance](logits)
