"""Small bundles with random weights, and series, for tests of `memeff run`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser

from tests.bundles.conftest import STOCK
from tests.faults.dicom_files import write_series

TILTED = (np.cos(0.3), np.sin(0.3), 0.0, -np.sin(0.3) * np.cos(0.2), np.cos(0.3) * np.cos(0.2), np.sin(0.2))
SMALL = {"channels": [4, 8], "strides": [2], "num_res_units": 0}


def small_bundle(folder: Path, source: Path = STOCK, network: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a bundle with a smaller network and random weights.

    Args:
        folder: new.
        source: bundle.
        network: arguments of ``network_def`` to be changed.
        changes: other places of ``inference.json`` and their values, ``__`` for ``#``.
    """
    shutil.copytree(source / "configs", folder / "configs")
    file = folder / "configs" / "inference.json"
    parser = ConfigParser(json.loads(file.read_text()))
    for key, value in {f"network_def#{k}": v for k, v in (SMALL if network is None else network).items()}.items():
        parser[key] = value
    for key, value in changes.items():
        parser[key.replace("__", "#")] = value
    config = parser.get()
    config.pop("_meta_", None)
    file.write_text(json.dumps(config))
    torch.manual_seed(1)
    parser["device"] = "cpu"
    save(parser.get_parsed_content("network_def"), folder / "models" / "model.pt")
    return folder


def save(network: torch.nn.Module, file: Path) -> None:
    """Save weights, none of them at its start: running statistics of norms too."""
    state = {k: v + 0.3 * torch.rand(v.shape) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    file.parent.mkdir(exist_ok=True)
    torch.save(state, file)


def image(shape: tuple[int, int, int] = (24, 20, 9), seed: int = 0) -> np.ndarray:
    """Smooth noise in the range of soft tissue, int16, without any symmetry."""
    values = np.random.default_rng(seed).normal(size=shape)
    for axis in range(3):
        values = values.cumsum(axis) / 3
    return (values * 40 + 60).astype(np.int16)


def series(folder: Path, number: int = 1, **options: Any) -> np.ndarray:
    """A tilted CT series; its values."""
    values = image(seed=number)
    write_series(folder, values, (6.0, 5.0, 7.0), axes=TILTED, uid=f"1.2.3.{number}", **options)
    return values
