"""Bundles of the model zoo made small: their own configurations, random weights, and tiny volumes in their format."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from scipy.ndimage import gaussian_filter

from monai_memeff.overlays import overlay_path
from tests.bundles.conftest import save_nifti

SCRIPTS = Path(__file__).parent / "zoo_scripts"
SEGRESNET = {"network_def#init_filters": 8, "network_def#blocks_down": [1, 1, 1], "network_def#blocks_up": [1, 1]}
SHRUNK: dict[str, dict[str, Any]] = {
    "brats_mri_segmentation": SEGRESNET,
    "renalStructures_CECT_segmentation": SEGRESNET,
    "wholeBody_ct_segmentation": SEGRESNET,
    "spleen_ct_segmentation": {"network_def#channels": [4, 8, 8], "network_def#strides": [2, 2]},
    "spleen_deepedit_annotation": {"network_def#filters": [4, 4, 8, 8, 8, 8], "spatial_size": [32, 32, 32]},
    "swin_unetr_btcv_segmentation": {"network_def#feature_size": 12},
}
"""Bundle -> what makes its network small."""
OURS: dict[str, dict[str, Any]] = {
    "clstm": {"network_def#channels": [4, 8], "network_def#hidden_channels": 2},
    "occupancy": {"network_def#channels": [4, 8], "occupancy_points": 512},
    "sparse_unet": {},
    "halo": {},
}
"""Overlay -> what makes our network small."""
EXTENTS = {"swin_unetr_btcv_segmentation": (64, 32, 32)}
"""Bundle -> extents of its volumes, where (32, 32, 32) leave nothing to norms at the network's lowest resolution."""
SPACING = {"renalStructures_CECT_segmentation": (0.8, 0.8, 0.8), "wholeBody_ct_segmentation": (1.5, 1.5, 1.5)}
"""Bundle -> its own spacing, so that volumes keep extents that its network can halve; others (1.5, 1.5, 2) mm."""
FLOAT = {"keys": "label", "dtype": "float32"}


def prepare(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle with tiny data, and without what MONAI 1.6.1 does not take or a test
    machine lacks (SwinUNETR's ``img_size``, boolean targets, ITK, TensorBoard)."""
    root = Path(shutil.copytree(bundle, folder / bundle.name))
    for path in (*root.rglob("*"), root):
        path.chmod(path.stat().st_mode | 0o200)
    for file in ("train.json", "inference.json"):
        config = json.loads((root / "configs" / file).read_text())
        config["network_def"].pop("img_size", None)
        for _, handler in components(config, "TensorBoard"):
            handler["_disabled_"] = True
        for _, regions in list(components(config, "ConvertToMultiChannelBasedOnBratsClassesd")):
            regions |= {"_target_": "Compose", "transforms": [dict(regions), {"_target_": "EnsureTyped", **FLOAT}]}
            del regions["keys"]
        (root / "configs" / file).write_text(json.dumps(config).replace("ITKReader", "NibabelReader"))
    _write_data(root)
    return root


def _write_data(root: Path) -> None:
    """Two cases in the places of all six bundles."""
    generator, data = np.random.default_rng(0), root / "data"
    extents = EXTENTS.get(root.name, (32, 32, 32))
    datalist = []
    for case in ("a", "b"):
        image = (100 + 1000 * gaussian_filter(generator.normal(0, 1, extents), 3.0)).astype(np.float32)
        label = np.zeros(extents, dtype=np.uint8)
        label[8:20, 8:20, 8:20], label[20:24, 10:20, 10:20] = 1, 2
        affine = np.diag([*SPACING.get(root.name, (1.5, 1.5, 2.0)), 1.0])
        phases = [f"{case}_{number}.nii.gz" for number in range(4)]
        binary = (label > 0).astype(np.uint8)
        for name, values in (
            (f"imagesTr/{case}.nii.gz", image),
            (f"labelsTr/{case}.nii.gz", binary),
            (f"imagesTs/{case}.nii.gz", image),
            *((name, np.roll(image, number)) for number, name in enumerate(phases)),
            (f"{case}_label.nii.gz", label),
            *((f"{case}/{phase}.nii.gz", image) for phase in ("12", "22-", "32-")),
            (f"{case}/merged.nii.gz", label),
        ):
            save_nifti(data / name, values, affine)
        datalist.append({"image": phases, "label": f"{case}_label.nii.gz"})
    lists = dict.fromkeys(("training", "validation", "testing"), datalist)
    (root / "configs" / "datalist.json").write_text(json.dumps(lists))


def options(root: Path, overlay: str = "", **more: Any) -> dict[str, Any]:
    """Overrides for a small run: folders, CPU, no worker processes, small networks."""
    engine = overlay.removesuffix("_inference")
    ours = OURS.get(engine, {})
    small = SHRUNK[root.name]
    if engine in ("clstm", "occupancy"):
        small = {key: value for key, value in small.items() if not key.startswith("network_def")}
    folders = {"bundle_root": str(root), "dataset_dir": str(root / "data"), "output_dir": str(root / "eval")}
    return {**folders, "device": torch.device("cpu"), **small, **ours, **more}


def workflow(root: Path, kind: str, *overlays: str, **more: Any) -> ConfigWorkflow:
    """A bundle's inference or training with overlays, made but not begun."""
    files = [root / "configs" / f"{kind}.json", *map(overlay_path, overlays)]
    config = json.loads(files[0].read_text())
    run = next(name for name, steps in config.items() if "run()" in str(steps) and isinstance(steps, list))
    engines = {"inference": ["evaluator"], "train": ["train#trainer", "validate#evaluator"]}[kind]
    loaders = {"inference": ["dataloader"], "train": ["train#dataloader", "validate#dataloader"]}[kind]
    still = {f"{place}#amp": False for place in engines} | {f"{place}#num_workers": 0 for place in loaders}
    if kind == "train":
        still |= _short(root.name, config)
    return ConfigWorkflow(
        config_file=[str(file) for file in files],
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="infer" if kind == "inference" else "train",
        run_id=run,
        **{**still, **options(root, overlays[0] if overlays else "", **more)},
    )


def _short(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """One epoch on the two cases, whole, validated at its end."""
    short: dict[str, Any] = {"train#trainer#max_epochs": 1, "val_interval": 1}
    if "images" in config and name != "renalStructures_CECT_segmentation":
        pairs = "$[{'image': i, 'label': l} for i, l in zip(@images, @labels)]"
        short |= {"train#dataset#data": pairs, "validate#dataset#data": pairs}
    extents = list(EXTENTS.get(name, (32, 32, 32)))
    for place, transform in components(config, "Crop"):
        short |= {f"{place}#{key}": extents for key in ("k_divisible", "roi_size", "spatial_size") if key in transform}
    for place, _ in components(config, "RandRotate90"):
        short[f"{place}#prob"] = 0.0  # volumes of a batch keep one shape
    return short


def components(config: Any, kind: str, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Components anywhere in a configuration whose class has this in its name, with their places."""
    if isinstance(config, dict) and kind in str(config.get("_target_")):
        yield place, config
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield from components(value, kind, f"{place}#{key}" if place else str(key))


def save_weights(root: Path, network: Any) -> None:
    """``models/model.pt`` for the bundle's own loader."""
    (root / "models").mkdir(exist_ok=True)
    torch.save(network.state_dict(), root / "models" / "model.pt")


@contextmanager
def scripts_of_the_zoo() -> Iterator[None]:
    """The bundles' package ``scripts`` can be imported."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield
    finally:
        sys.path.remove(str(SCRIPTS))
