"""The network of an nnU-Net plan, built by the class that it names; nnU-Net itself is not needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from monai_memeff.data.json_object import read_json_object
from monai_memeff.errors import InputError
from monai_memeff.hosts.estimate.origin import Source, network_of
from monai_memeff.memory.step import tensors_in


def is_plans(content: Any) -> bool:
    """Whether a dictionary is an nnU-Net plan."""
    return isinstance(content, dict) and isinstance(content.get("configurations"), dict)


def plans_source(file: Path, content: Mapping[str, Any], name: str | None, training: bool) -> Source:
    """What a plan and the ``dataset.json`` beside it say of a network.

    Args:
        file: where the plan is.
        content: what it holds.
        name: Name of the configuration; None: ``3d_fullres``, or the only one.
        training: whether the network gives the outputs of deep supervision.

    Raises:
        InputError: no such configuration, a plan of an old nnU-Net, or no ``dataset.json``.
    """
    name = name or (
        "3d_fullres" if "3d_fullres" in content["configurations"] else next(iter(content["configurations"]))
    )
    plan = _resolved(content["configurations"], name)
    architecture = plan.get("architecture")
    if not isinstance(architecture, dict) or "network_class_name" not in architecture:
        raise InputError(f"{file} has no architecture for {name}: it is of an nnU-Net before 2.4; plan again with 2.8")
    channels, classes, regions = _numbers(_dataset(file), plan)
    what = f"the network of {name} in {file}"
    network = network_of(what, lambda: _build(architecture, channels, classes, training))
    return Source(
        name=f"{file}, {name}",
        network=network,
        kind="plans",
        loss=_Loss(regions),
        loss_name="Dice and cross-entropy at every scale, as nnU-Net's",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.99, nesterov=True),
        shape=(int(plan.get("batch_size", 2)) if training else 1, channels, *map(int, plan["patch_size"])),
    )


class _Loss:
    """Dice and cross-entropy of every output."""

    def __init__(self, regions: bool) -> None:
        self.regions = regions
        self.loss = DiceCELoss(to_onehot_y=not regions, softmax=not regions, sigmoid=regions, batch=True)

    def __call__(self, output: Any) -> Tensor:
        """Added; labels of zeros."""
        losses = []
        for tensor in tensors_in(output):
            channels = tensor.shape[1] if self.regions else 1
            losses.append(self.loss(tensor, torch.zeros(len(tensor), channels, *tensor.shape[2:])))
        return torch.stack(losses).sum()


def _resolved(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits."""
    if name not in configurations:
        raise InputError(f"the plan has no configuration {name!r}: choose {', '.join(configurations)}")
    own = dict(configurations[name])
    parent = own.pop("inherits_from", None)
    return own if parent is None or parent == name else {**_resolved(configurations, parent), **own}


def _dataset(file: Path) -> dict[str, Any]:
    path = file.parent / "dataset.json"
    absent = f"channels and classes stand in dataset.json, which is not beside {file}: copy it there"
    content = read_json_object(path, absent)
    if not isinstance(content.get("labels"), dict):
        raise InputError(f"{path} names no labels: it is not a dataset.json of nnU-Net")
    return content


def _numbers(dataset: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Channels, classes, and whether these are regions that overlap."""
    labels = {name: value for name, value in dataset["labels"].items() if name != "ignore"}
    regions = any(isinstance(value, list) for value in labels.values())
    foreground = [name for name in labels if name != "background"]
    channels = len(dataset.get("channel_names") or dataset.get("modality") or {})
    if not channels:
        raise InputError("dataset.json names no channels (channel_names)")
    if plan.get("previous_stage"):
        channels += len(foreground)
    return channels, len(foreground) if regions else len(labels), regions


def _build(architecture: Mapping[str, Any], channels: int, classes: int, training: bool) -> nn.Module:
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture.get("_kw_requires_import", ()):
        if arguments.get(key) is not None:
            arguments[key] = _named(arguments[key])
    make: Callable[..., Any] = _named(architecture["network_class_name"])
    supervised = {"deep_supervision": training}
    network: nn.Module = make(input_channels=channels, num_classes=classes, **{**arguments, **supervised})
    return network


def _named(name: str) -> Any:
    """What a dotted name means."""
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last)
    except AttributeError:
        raise InputError(f"the plan names {name}, which {module} does not have") from None
