"""The skull bundle's own way onto the network's grid, for a CT that is in memory already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing, SpatialCrop

from monai_memeff.bundles import bundle_path
from monai_memeff.geometry import is_oblique, spacing

AIR = -1024.0
READING = ("LoadImaged", "EnsureChannelFirstd", "CopyItemsd")


def onto_grid(image: MetaTensor, bottom: float, **options: Any) -> MetaTensor:
    """Bring a head CT onto the network's grid as the bundle ``skull_completion_sparse`` does.

    The bundle's grid runs along the image's axes and is centered on all bone, so oblique axes are resampled and what
    lies below the vault is cut off before.

    Args:
        image: (1, H, W, D) in Hounsfield units, affine to RAS+ millimeters.
        bottom: Millimeters (RAS+ z) of the lower end of the grid.
        options: Keys of the bundle's ``inference.json``, such as ``grid`` and ``cell_mm``.

    Returns:
        uint8 (1, S, S, S), 1 where any bone lies in a cell, with the grid's affine.

    Raises:
        InputError: what the bundle's checks refuse.
    """
    upright = Orientation(axcodes="RAS", labels=None)(along_the_body(image))
    affine = np.asarray(upright.affine, dtype=np.float64)
    first = min(max(int((bottom - affine[2, 3]) / affine[2, 2]), 0), upright.shape[-1] - 1)
    data: dict[Any, Any] = {"image": SpatialCrop(roi_slices=[slice(None), slice(None), slice(first, None)])(upright)}
    for step in _steps(options):
        data = step(data)
    return data["image"]


def along_the_body(image: MetaTensor) -> MetaTensor:
    """The image itself, or one of the smallest spacing along the axes of the body where its own are oblique."""
    if not is_oblique(image.affine):
        return image
    resampled = Spacing(pixdim=[min(spacing(image.affine))] * 3, diagonal=True, padding_mode="zeros")(
        image - AIR
    )  # outside is air
    return MetaTensor(resampled.as_tensor().to(torch.float32) + AIR, affine=resampled.affine)


def _steps(options: dict[str, Any]) -> list[Callable[[Any], Any]]:
    """The transforms of the bundle that follow reading, one by one: their errors stay as they are."""
    parser = ConfigParser()
    parser.read_config(str(bundle_path("skull_completion_sparse") / "configs" / "inference.json"))
    parser.update(options)
    name = "preprocessing::transforms"
    wanted = [i for i, entry in enumerate(parser[name]) if _follows_reading(entry)]
    steps = [parser.get_parsed_content(f"{name}::{i}") for i in wanted]
    return [step for step in steps if step is not None]  # None: disabled


def _follows_reading(entry: dict[str, Any]) -> bool:
    return entry["keys"] == "image" and entry["_target_"].rpartition(".")[2] not in READING
