"""Every public constructor and function with numeric parameters, found in ``__all__``, and what it needs."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

MODULES = (
    "apps.liver",
    "apps.skull",
    "bundles",
    "clstm",
    "data",
    "geometry",
    "halo",
    "hosts",
    "memory",
    "occupancy",
    "overlays",
    "sparse",
    "sparse.points",
    "sparse.points.nn",
    "transforms",
)
NUMBERS = re.compile(r"\b(int|float|Size)\b")
CHANNELS = {"in_channels": 1, "out_channels": 2}
UNET: dict[str, Any] = {"spatial_dims": 3, **CHANNELS, "channels": (2, 4), "strides": (2,)}
WHOLE = {"network": nn.ReLU(), "inputs": torch.zeros(1, 1, 4, 3, 2)}
NEEDED: dict[str, dict[str, Any]] = {
    "AddFeatsByKeys": {"list_add_to_x": [True], "feat_names": ["x"], "input_nc_feats": [1]},
    "BatchNorm": {"num_features": 2},
    "CLSTMUNet": {"channels": (2, 4)},
    "CoarseToSparseUNet": {**UNET, "refine_channels": (2, 4), "refine_strides": (2,)},
    "ConditionalBatchNorm": {"features": 2, "condition_features": 2},
    "Conv3d": CHANNELS,
    "Conv3dTranspose": CHANNELS,
    "DownsampleMask": {"factor": 2.0},
    "FixedPoints": {"num": 3},
    "FreezeUNetHandler": {"network": nn.Identity()},
    "GatedConvLSTMCell": {"hidden_channels": 2},
    "GridSampling3D": {"size": 1.0},
    "LabelFile": {"shape": (3, 4, 5), "affine": np.eye(4)},
    "OccupancyNet": {"channels": (2, 4)},
    "PredictMask": {"network": nn.Identity()},
    "RandTumorSynthesisd": {"image_key": "image", "label_key": "label"},
    "RandVoxelDropout": {"p": 0.5},
    "RandomSphere": {"radius": 1.0},
    "SaveAgreementd": {"keys": "pred"},
    "CheckSameGridd": {"keys": ["image", "label"]},
    "SliceUNet": {**CHANNELS, "channels": (2, 4)},
    "SparseConv3d": CHANNELS,
    "SparseConvTranspose3d": CHANNELS,
    "SparseUNet": UNET,
    "SphereSampling": {"radius": 1.0, "sphere_center": (0.0, 0.0, 0.0)},
    "ThresholdAtSpacing": {"pixdim": 1.0, "threshold": 1.0},
    "VolumeUNet": {"features": (2, 4)},
    "explain": WHOLE,
    "labels_to_mesh": {"labels": torch.ones(4, 4, 4, dtype=torch.uint8), "affine": torch.eye(4)},
    "keep_kernel_maps": {"folder": None},
    "logits_to_mesh": {"logits": torch.randn(2, 4, 4, 4), "affine": torch.eye(4)},
    "occupancy_optimizer": {"network": nn.Linear(1, 1)},
    "plan": WHOLE,
    "verify": {"network": WHOLE["network"], "shape": (1, 1, 4, 3, 2)},
}
"""Callable -> what it cannot be called without; dictionary versions take that of their array version, and keys."""
ELSEWHERE = {
    "HaloMesh", "NetworkEstimate", "OctreeReport", "PeakEstimate", "Plan", "StreamingReport",  # records
    "coordinates_to_keys", "crop_affine", "data_from_sparse", "estimate_peak", "index_to_unit", "is_anisotropic",
    "is_oblique", "keys_to_coordinates", "mm_to_index", "ras_affine", "resize_affine", "space_of",  # by tensors
    "active_voxels", "SparseTensor", "Lookahead", "save_agreement", "scatter", "spatial_partition",
    "init_from_torchrun", "init_mesh",  # a world of processes
    "checked_option", "estimate_network",
}  # fmt: skip
"""Callables whose numbers have tests of their own."""


PACKAGES = [importlib.import_module(f"monai_memeff.{module}") for module in MODULES]
NAMES = {name for package in PACKAGES for name in getattr(package, "__all__", ())}


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public callables by name, each once."""
    seen: dict[int, str] = {}
    for found in PACKAGES:
        for name in getattr(found, "__all__", ()):
            thing = getattr(found, name)
            alias = name.endswith("Dict") or (name[0].isupper() and name.endswith("D") and name[-2].islower())
            if callable(thing) and id(thing) not in seen and name not in ELSEWHERE and not alias and _is_ours(thing):
                seen[id(thing)] = name
                yield name, thing


def _is_ours(thing: Callable[..., Any]) -> bool:
    """Whether its parameters are ours, and not torch's in a layer of torch's name."""
    made = getattr(thing, "__init__", None) if inspect.isclass(thing) else thing
    return getattr(made, "__module__", "").startswith("monai_memeff")


def numeric_parameters(thing: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters whose annotation names numbers; none for what has no signature."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except ValueError:
        return []
    return [p for p in parameters if NUMBERS.search(str(p.annotation)) and p.kind is not p.VAR_KEYWORD]


def needed(name: str) -> dict[str, Any]:
    """Arguments with which it can be called."""
    array = name.removesuffix("d") if name.removesuffix("d") in NAMES else name
    if name in NEEDED:
        return dict(NEEDED[name])
    return {**NEEDED.get(array, {}), **({"keys": "image"} if array != name else {})}
