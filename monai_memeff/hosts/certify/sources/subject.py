"""What is certified: a network with its weights, one volume as it sees it, and how its result becomes labels."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import nn

from monai_memeff.data import read_volume
from monai_memeff.errors import InputError
from monai_memeff.geometry import ras_affine

DEFAULT_WINDOW = (96, 96, 96)
OFF_GRID = 0.01
"""Largest distance of a label's corner from the image's, in voxels."""

KINDS: dict[str, str] = {
    "plans.json": "nnunet_plugins.certify:nnunet_subject",
    "configs": "monai_memeff.hosts.certify.sources.bundle:bundle_subject",
}
"""File or folder that a model's folder holds -> function that makes the subject of it."""


@dataclass
class Options:
    """What the user says about the model and its labels.

    Attributes:
        fold: for nnU-Net, the fold whose weights are taken.
        threshold: for a function, the value above which a channel is foreground; None is the arg-max of channels.
        window: size of the sliding window; None is the model's own.
    """

    fold: str | None = None
    threshold: float | None = None
    window: tuple[int, ...] | None = None


@dataclass
class Subject:
    """One model on one volume.

    Attributes:
        name: The model's.
        kind: what it was read from, in words.
        network: in evaluation mode, on its device.
        inputs: (1, C, spatial...), preprocessed.
        labels: result of the network -> labels on the image's grid, (H, W, D), or (S, H, W, D) of 0 and 1.
        rule: how `labels` decides, in words.
        image: (H, W, D), the first image as it was read, with its affine.
        window: the sliding window that users of this model run.
        weights: file -> sha256.
        classes: name -> numbers in the labels, or (index of the segment,) where segments overlap.
        args: further arguments of the network.
        kwargs: further arguments of the network by name.
        precision: what the network runs in, such as mixed precision.
        notes: what a reader of the certificate must know.
    """

    name: str
    kind: str
    network: nn.Module
    inputs: torch.Tensor
    labels: Callable[[Any], np.ndarray]
    rule: str
    image: MetaTensor
    window: Inferer
    weights: Mapping[str, str]
    classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")


def open_subject(model: str, images: Sequence[Path], options: Options) -> Subject:
    """The subject of a bundle's folder, an nnU-Net model folder, or ``module:function``.

    Raises:
        InputError: it is none of them, or cannot be loaded.
    """
    folder = Path(model)
    if not folder.is_dir():
        if ":" in model and not folder.exists():
            from monai_memeff.hosts.certify.sources.function import function_subject

            return function_subject(model, images, options)
        raise InputError(
            f"{model} is neither a folder of a MONAI bundle or a trained nnU-Net model nor module:function of a network"
        )
    for mark, place in KINDS.items():
        if (folder / mark).exists():
            module, _, function = place.partition(":")
            made: Subject = getattr(importlib.import_module(module), function)(folder, images, options)
            return made
    raise InputError(
        f"{folder} holds neither configs/inference.json (a MONAI bundle) nor plans.json (a trained nnU-Net model)"
    )


def window_of(text: str | None) -> tuple[int, ...] | None:
    """The size of a window in words, "96,96,96" or "96".

    Raises:
        InputError: it is none.
    """
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--window takes one or three positive numbers with commas in between, got {text!r}")
    return tuple(int(part) for part in parts) * (3 if len(parts) == 1 else 1)


def read_label(file: Path, image: MetaTensor) -> np.ndarray:
    """Whole numbers (H, W, D) on the grid of the image.

    Raises:
        InputError: the label is on another grid, or holds other numbers.
    """
    label = read_volume(file).image
    if label.shape != image.shape:
        sizes = (" x ".join(map(str, volume.shape[1:])) for volume in (label, image))
        raise InputError(f"the label {file} has {' voxels and the image '.join(sizes)}: both must have one grid")
    own, other = ras_affine(image).cpu().numpy(), ras_affine(label).cpu().numpy()
    corners = np.array(np.meshgrid(*[(0, extent - 1) for extent in image.shape[1:]], [1], indexing="ij"))
    off = np.abs(np.linalg.solve(own, other @ corners.reshape(4, -1)) - corners.reshape(4, -1)).max()
    if not off < OFF_GRID:
        raise InputError(f"the label {file} lies {off:.3g} voxels off the image's grid: both must have one grid")
    values = label.as_tensor()[0].numpy()
    if not np.array_equal(values, np.rint(values)) or values.min() < 0:
        raise InputError(f"the label {file} holds numbers that are not whole numbers from 0 on, so it is not a label")
    return values.astype(np.int32)


def file_sha256(file: Path) -> str:
    """Of the content of a file; of a folder, of the contents of all its files in the order of their names."""
    digest = hashlib.sha256()
    if file.is_dir():
        for part in sorted(path for path in file.rglob("*") if path.is_file()):
            digest.update(bytes.fromhex(file_sha256(part)))
        return digest.hexdigest()
    with open(file, "rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()
