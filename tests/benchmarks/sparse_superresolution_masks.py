"""What the super-resolution benchmark trains on and tests on: skulls and organs of real scans, as fine masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from monai_memeff.sparse.transforms.downsample_mask import DownsampleMask

TRAINED = {1: "spleen", 2: "right kidney", 3: "left kidney", 5: "liver", 6: "stomach", 20: "colon", 25: "sacrum"} | {
    27: "L5",
    29: "L3",
    31: "L1",
    77: "left hip",
    78: "right hip",
    86: "left autochthon",
    100: "rib",
    112: "rib",
}
HELD_OUT = {52: "aorta", 63: "inferior vena cava", 64: "portal and splenic vein", 65: "left iliac artery"} | {
    66: "right iliac artery",
    67: "left iliac vein",
    68: "right iliac vein",
    79: "spinal cord",
    19: "duodenum",
}


@dataclass
class Task:
    """Fine masks (1, H, W, D) uint8 to train on and to test on, and how they are made coarse."""

    train: list[Tensor]
    test: dict[str, Tensor]
    cells: dict[str, Sequence[float]]  # of the test volumes
    crop: tuple[int, int, int]  # fine voxels of a training sample
    crop_cells: tuple[int, int, int]
    spacing: tuple[float, float, float]
    image: Tensor | None = None  # coarse (1, h, w, d), for a first stage, 0 to 1


@dataclass
class Coarse:
    """Coarse masks (1, h, w, d) of the test volumes, and the share or probability of every cell."""

    masks: dict[str, Tensor]
    shares: dict[str, Tensor]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values as stored, and millimeters per voxel."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj), np.asarray(image.header.get_zooms()[:3], dtype=float)


def largest(mask: np.ndarray) -> np.ndarray:
    """The largest 26-connected piece."""
    pieces, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return pieces == sizes.argmax()


def box(mask: np.ndarray, margin: int = 4) -> np.ndarray:
    """Cut to what is occupied, with a margin."""
    return np.pad(mask[ndimage.find_objects(mask.astype(np.uint8))[0]], margin)


def tensor(mask: np.ndarray) -> Tensor:
    """(1, H, W, D) uint8."""
    return torch.from_numpy(np.ascontiguousarray(mask).astype(np.uint8))[None]


def skulls(data: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """The test head on its own grid, and the training heads at 1 mm."""
    test, _ = read(data / "head_ct" / "vhf_head_ct.nii.gz")
    phantom, phantom_mm = read(data / "head_ct" / "philips_skull_phantom_bone1mm.nii.gz")
    mri, mri_mm = read(data / "head_mr_seg3d" / "skull.nii.gz")
    heads = [(largest(phantom > 300), phantom_mm), (largest(mri > 0), mri_mm)]
    return largest(test > 300), [box(ndimage.zoom(m.astype(np.float32), mm, order=1) >= 0.5) for m, mm in heads]


def cube_task(data: Path, factor: int) -> Task:
    """64^3 cells of 4 mm to ``factor`` voxels per cell, in a cube of 256 mm."""
    test, heads = skulls(data)
    cut = box(test, 0)
    cube = np.zeros((256, 256, 256), dtype=bool)
    start = [(256 - n) // 2 for n in cut.shape]
    cube[tuple(slice(s, s + n) for s, n in zip(start, cut.shape, strict=True))] = cut
    pool = DownsampleMask(factor=4 // factor, mode="majority")
    edge = 24 * factor
    return Task(
        [pool(tensor(np.pad(head, [(0, -n % 4) for n in head.shape]))) for head in heads],
        {"skull": pool(tensor(cube))},
        {"skull": (64, 64, 64)},
        (edge, edge, edge),
        (24, 24, 24),
        (4.0 / factor,) * 3,
    )


def skull512(data: Path) -> Task:
    """64^3 cells to the CT's own grid; a training sample has 8 x 8 x 32 cells of the same size."""
    test, heads = skulls(data)
    train = [tensor(head) for head in heads]
    return Task(train, {"skull": tensor(test)}, {"skull": (64, 64, 64)}, (64, 64, 117), (8, 8, 32), (1.0, 1.0, 1.0))


def organs(data: Path) -> Task:
    """12 mm to 3 mm."""
    labels, mm = read(data / "totalseg" / "example_seg_fast_force_split.nii.gz")
    labels = np.pad(labels, [(0, -n % 4) for n in labels.shape])
    train = [tensor(box(labels == value)) for value in TRAINED if (labels == value).any()]
    for file in sorted((data / "openkbp").glob("*_oar.nii.gz")):
        found, steps = read(file)
        for value in range(1, 6):
            if (found == value).any():
                zoomed = ndimage.zoom(box(found == value).astype(np.float32), steps / 3.0, order=1) >= 0.5
                train += [tensor(zoomed)] if zoomed.sum() > 50 else []
    test = {name: tensor(labels == value) for value, name in HELD_OUT.items() if (labels == value).any()}
    cells = tuple(n // 4 for n in labels.shape)
    return Task(train, test, dict.fromkeys(test, cells), (64, 64, 64), (16, 16, 16), tuple(mm))


def organs512(data: Path) -> Task:
    """512 x 512 x 20 from 128 x 128 x 10."""
    labels, mm = read(data / "totalseg" / "example_seg_dicom.nii.gz")
    train = [tensor(labels == value) for value in TRAINED if (labels == value).any()]
    test = {name: tensor(labels == value) for value, name in HELD_OUT.items() if (labels == value).any()}
    return Task(train, test, dict.fromkeys(test, (128, 128, 10)), (96, 96, 20), (24, 24, 10), tuple(mm))


def stages512(data: Path) -> Task:
    """The aorta of the CT of 512 x 512 x 20, with the CT on 128 x 128 x 16 cells."""
    from monai.transforms import LoadImage, Orientation, Resize, ScaleIntensityRange

    task, (edge, depth) = organs512(data), (128, 16)
    axes = nibabel.aff2axcodes(nibabel.load(data / "totalseg" / "example_seg_dicom.nii.gz").affine)
    scan = LoadImage("PydicomReader", ensure_channel_first=True)(data / "totalseg" / "example_ct_dicom")
    scan = ScaleIntensityRange(-160, 240, 0, 1, clip=True)(Orientation("".join(axes), labels=None)(scan))
    image = Resize((edge, edge, depth), mode="area")(scan).as_tensor()
    test, cells = {"aorta": task.test["aorta"]}, {"aorta": (edge, edge, depth)}
    return replace(task, test=test, cells=cells, crop_cells=(24, 24, depth), image=image)


TASKS = {
    "skull128": lambda data: cube_task(data, 2),
    "skull256": lambda data: cube_task(data, 4),
    "skull512": skull512,
    "organs": organs,
    "organs512": organs512,
    "stages512": stages512,
}
