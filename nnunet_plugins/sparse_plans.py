"""From a stock plan to one for the coarse-to-sparse network: the architecture, and the patch its memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

KEY = "sparse_trainer"
"""Key of a configuration in the plans: settings to change beforehand, and afterwards what was used."""

NETWORK = "nnunet_plugins.plans_network.CoarseToSparsePlansUNet"

# settings that are arguments of the network; the others are used here
NETWORK_SETTINGS = (
    "num_res_units",
    "refine_channels",
    "context_channels",
    "max_active",
    "certainty",
    "dilation",
    "use_checkpoint",
)

STOCK_BYTES = 5.2
"""Bytes that a training step of a stock network needs per value of a convolution's output, in mixed precision."""


def edit_plans(plans: dict, configuration: str, dataset_json: dict, defaults: dict[str, Any]) -> None:
    """Replace network and patch size of one configuration, in place; doing it again changes nothing.

    Args:
        plans: Plans as nnU-Net loads them.
        configuration: a 3D configuration, such as 3d_fullres or 3d_lowres.
        dataset_json: Description of the dataset.
        defaults: value of every setting; the configuration's own under :data:`KEY` go first.

    Raises:
        ValueError: a 2D configuration, an unknown setting, or a network without the pyramid of nnU-Net's own.
    """
    manager = PlansManager(deepcopy(plans))
    resolved = manager.get_configuration(configuration).configuration  # with what it inherits
    if len(resolved["patch_size"]) != 3:
        raise ValueError(
            f"SparseTrainer works on volumes, configuration {configuration} has the patch size "
            f"{list(resolved['patch_size'])}: train 3d_fullres or 3d_lowres."
        )
    settings = merged_settings(resolved.get(KEY, {}), defaults)
    stock = settings["stock"] or {"patch_size": list(resolved["patch_size"]), "architecture": resolved["architecture"]}
    _check_pyramid(stock["architecture"], configuration)
    channels = determine_num_input_channels(manager, manager.get_configuration(configuration), dataset_json)
    labels = manager.get_label_manager(dataset_json)
    architecture = sparse_architecture(stock["architecture"], settings, labels.has_regions)
    edited = plans["configurations"][configuration]
    edited["patch_size"] = settings["patch_size"] or largest_patch(
        stock,
        architecture,
        resolved["median_image_size_in_voxels"],
        channels,
        labels.num_segmentation_heads,
        settings["memory_share"],
    )
    edited["architecture"] = architecture
    edited[KEY] = {**settings, "stock": deepcopy(stock)}


def merged_settings(chosen: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults with what the plans choose instead; "stock" is what a first edit replaced."""
    unknown = sorted(set(chosen) - set(defaults) - {"stock"})
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} under {KEY!r} in the plans; known are {', '.join(defaults)}.")
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    return {**lists, "stock": None, **deepcopy(chosen)}


def sparse_architecture(stock: dict, settings: dict[str, Any], sigmoid: bool) -> dict:
    """The plans' entry for the network: the stock pyramid, its first stage sparse."""
    arguments = {name: stock["arch_kwargs"][name] for name in ("strides", "features_per_stage")}
    arguments |= {name: settings[name] for name in NETWORK_SETTINGS}
    return {
        "network_class_name": NETWORK,
        "arch_kwargs": {**deepcopy(arguments), "sigmoid": sigmoid},
        "_kw_requires_import": [],
    }


def largest_patch(
    stock: dict,
    architecture: dict,
    image: Sequence[float],
    channels: int,
    heads: int,
    fraction: float,
) -> list[int]:
    """The rule: the largest patch whose training step needs at most ``fraction`` of the stock step's memory.

    The stock patch grows by one step of the network's total stride at a time, always along the axis where it covers
    least of the median image, never beyond that image, while the estimates (:func:`stock_bytes`, :func:`sparse_bytes`)
    stay within the fraction. Both are per sample, so the batch size stays that of the plan; both are for mixed
    precision, so the result does not depend on the machine. A patch is never made smaller.
    """
    patch = [int(extent) for extent in stock["patch_size"]]
    budget = fraction * stock_bytes(stock["architecture"], patch, channels, heads)
    limit = int(budget / sparse_bytes(architecture["arch_kwargs"], channels, heads))
    strides = architecture["arch_kwargs"]["strides"]
    steps = [math.prod(stride[axis] for stride in strides) for axis in range(3)]
    return grown(patch, image, steps, limit)


def why_not_larger(edited: dict) -> str:
    """Say why the patch of an edited configuration is the stock plan's."""
    settings, patch, image = edited[KEY], edited["patch_size"], edited["median_image_size_in_voxels"]
    if settings["patch_size"]:
        return f'"patch_size" under "{KEY}" says so'
    strides = edited["architecture"]["arch_kwargs"]["strides"]
    steps = [math.prod(stride[axis] for stride in strides) for axis in range(3)]
    if all(
        extent + step > math.ceil(size / step) * step for extent, step, size in zip(patch, steps, image, strict=True)
    ):
        return f"it covers the median image, {[round(size) for size in image]} voxels, already"
    return (
        f"one step larger would need more memory than memory_share = {settings['memory_share']} of the stock step's; "
        "raise memory_share, or lower max_active"
    )


def grown(patch: Sequence[int], image: Sequence[float], steps: Sequence[int], limit: int) -> list[int]:
    """Grow a patch step by step within the image and within ``limit`` voxels (see :func:`largest_patch`)."""
    patch = list(patch)
    ends = [math.ceil(extent / step) * step for extent, step in zip(image, steps, strict=True)]
    open_axes = {0, 1, 2}
    while open_axes:
        axis = min(sorted(open_axes), key=lambda a: patch[a] / image[a])
        larger = [extent + steps[a] if a == axis else extent for a, extent in enumerate(patch)]
        if larger[axis] > ends[axis] or math.prod(larger) > limit:
            open_axes.remove(axis)
        else:
            patch = larger
    return patch


def stock_bytes(architecture: dict, patch: Sequence[int], channels: int, heads: int) -> float:
    """Bytes a training step of the stock network needs per sample, by nnU-Net's own count of feature-map values."""
    with torch.device("meta"):  # shapes without memory
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            channels,
            heads,
            allow_init=False,
            deep_supervision=True,
        )
    return STOCK_BYTES * float(network.compute_conv_feature_map_size(patch))


def sparse_bytes(arguments: dict[str, Any], channels: int, heads: int, value: int = 2) -> float:
    """Bytes a training step of CoarseToSparsePlansUNet needs per voxel of the patch.

    The largest of three moments, each with what is kept through them (the borders of the coarse levels and the sparse
    network's input): the loss at full resolution, the backward pass of the sparse network, and that of the first coarse
    level. The factors were fitted to measured peaks.

    Args:
        arguments: Arguments of the network.
        channels: Number of channels of the image.
        heads: classes.
        value: bytes of a feature: 2 in mixed precision, 4 in single.
    """
    strides, features = arguments["strides"], arguments["features_per_stage"]
    active, context = arguments["max_active"], arguments["context_channels"]
    cell = [math.prod(math.prod(stride) for stride in strides[: level + 1]) for level in range(1, len(strides))]
    borders = sum(2 * width / size for width, size in zip(features, cell, strict=False))
    kept = borders + (heads + context) / cell[0] + active * (channels + heads + context)
    at_loss = value * kept + 24 * heads
    in_sparse = value * (kept + 12 * arguments["refine_channels"][0] * active) + 16 * heads
    in_coarse = value * (kept + 10 * features[0] / cell[0]) + 8 * heads
    return max(at_loss, in_sparse, in_coarse)


def _check_pyramid(architecture: dict, configuration: str) -> None:
    missing = [name for name in ("strides", "features_per_stage") if name not in architecture["arch_kwargs"]]
    if missing:
        raise ValueError(
            f"SparseTrainer takes over the pyramid of the plan's network, but {architecture['network_class_name']} in "
            f"{configuration} states no {' and no '.join(missing)}: use plans of nnU-Net's own planners."
        )
    if len(architecture["arch_kwargs"]["strides"]) < 2:
        raise ValueError(
            f"the images of {configuration} are too small for SparseTrainer: the plan has one resolution, so there is "
            "nothing coarse to start from; use the stock trainer."
        )
