"""Slabs are written into arrays and label files that can hold them, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_memeff.clstm import CLSTMUNet, NiftiSlabs, SlabInferer
from monai_memeff.data import LabelFile
from monai_memeff.errors import InputError
from tests.faults.volume_files import AFFINE, names, values


@pytest.fixture(scope="module")
def net() -> CLSTMUNet:
    torch.manual_seed(0)
    return CLSTMUNet(out_channels=2, channels=(4, 8), hidden_channels=2).eval()


def test_an_interrupted_write_leaves_no_file(net: CLSTMUNet, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(values(), AFFINE), tmp_path / "ct.nii")

    def stop(slab: torch.Tensor) -> torch.Tensor:
        if float(slab.affine[2, 3]) > 10 and not armed:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return slab

    armed: list[int] = []
    slabs = NiftiSlabs(tmp_path / "ct.nii", slab=2, transform=stop)
    (tmp_path / "labels.nii").write_bytes(b"an earlier result")
    with pytest.raises(KeyboardInterrupt):
        SlabInferer(labels=True, prefetch=0).write(slabs, net, slabs.create_labels(tmp_path / "labels.nii"))
    assert names(tmp_path) == ["ct.nii", "labels.nii"]
    assert (tmp_path / "labels.nii").read_bytes() == b"an earlier result"
    armed.append(1)
    SlabInferer(labels=True).write(slabs, net, slabs.create_labels(tmp_path / "labels.nii"))
    assert names(tmp_path) == ["ct.nii", "labels.nii"]
    assert nib.load(tmp_path / "labels.nii").shape == (5, 6, 7)


def test_a_label_file_that_is_dropped_vanishes(tmp_path: Path) -> None:
    labels = LabelFile(tmp_path / "a.nii", (2, 3, 4), AFFINE)
    labels[...] = 1
    del labels
    assert names(tmp_path) == []
    with pytest.raises(RuntimeError), LabelFile(tmp_path / "a.nii", (2, 3, 4), AFFINE):
        raise RuntimeError
    assert names(tmp_path) == []
    with LabelFile(tmp_path / "a.nii", (2, 3, 4), AFFINE) as labels:
        labels[0, 0, 1] = 3
    assert nib.load(tmp_path / "a.nii").get_fdata().sum() == 3 * 12
    with pytest.raises(ValueError, match="finished"):
        labels[...] = 2


@pytest.mark.parametrize("value", [-2.0, 2.7, 256, -1, np.nan, np.inf, torch.tensor(-0.5)])
def test_what_is_no_label_is_not_pressed_into_a_label_file(value: Any, tmp_path: Path) -> None:
    """In uint8 a logit of -2 would be label 254."""
    with LabelFile(tmp_path / "a.nii", (2, 3, 4), AFFINE) as labels:
        for part in (value, torch.as_tensor(value).expand(2, 3), np.full((2, 3), value)):
            with pytest.raises(InputError, match="a label file takes whole numbers from 0 to 255"):
                labels[0, 0, ..., 1] = part
        for kind in (torch.int64, torch.float16, torch.bool, torch.uint8):
            labels[0, 0, ..., 2] = torch.ones(2, 3, dtype=kind)
    assert nib.load(tmp_path / "a.nii").get_fdata().sum() == 6


SHAPES = [
    (1, 2, 8, 8, 12), (1, 2, 8, 8, 10), (1, 2, 8, 8, 1), (1, 2, 8, 9, 11), (1, 1, 8, 8, 11), (2, 2, 8, 8, 11),
    (8, 8, 11), (2, 8, 8, 11), (1, 2, 8, 8, 0), (1, 3, 8, 8, 11),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["volume", "list", "generator"])
def test_targets_of_another_shape_are_refused_before_anything_is_written(
    net: CLSTMUNet, shape: tuple[int, ...], kind: str
) -> None:
    volume = torch.randn(1, 1, 8, 8, 11)
    out = np.full(shape, 7.0, np.float32)
    inputs: Any = volume if kind == "volume" else list(volume.split(3, -1))
    inputs = iter(inputs) if kind == "generator" else inputs
    with pytest.raises(InputError, match=r"the target has|slices came"):
        SlabInferer(slab=3).write(inputs, net, out)
    if kind != "generator" or shape[-1:] not in ((12,), (10,)):  # a generator's depth is known at its end only
        assert (out == 7).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16, bool, ">i2"])
@pytest.mark.parametrize("labels", [False, True])
def test_targets_whose_dtype_loses_values_are_refused(net: CLSTMUNet, dtype: Any, labels: bool) -> None:
    volume = torch.randn(1, 1, 8, 8, 5)
    out = np.full((1, 1 if labels else 2, 8, 8, 5), 7, dtype)
    whole = SlabInferer(labels=labels)(volume, net)
    if np.can_cast(whole.numpy().dtype, out.dtype, "safe"):
        SlabInferer(slab=2, labels=labels).write(volume, net, out)
        np.testing.assert_array_equal(out, whole.numpy())
        return
    before = out.copy()
    with pytest.raises(InputError, match="cannot hold every value"):
        SlabInferer(slab=2, labels=labels).write(volume, net, out)
    np.testing.assert_array_equal(out, before)
    tensor = torch.from_numpy(np.zeros(out.shape, out.dtype.newbyteorder("=")))
    with pytest.raises(InputError, match="cannot hold every value"):
        SlabInferer(slab=2, labels=labels).write(volume, net, tensor)


def test_a_target_that_is_the_input_is_refused(tmp_path: Path) -> None:
    one = CLSTMUNet(out_channels=1, channels=(4, 8)).eval()
    np.save(tmp_path / "ct.npy", np.random.default_rng(0).random((1, 1, 5, 6, 7), np.float32))
    stored = (tmp_path / "ct.npy").read_bytes()
    mapped = np.load(tmp_path / "ct.npy", mmap_mode="r+")
    volume = torch.from_numpy(mapped)
    out = np.zeros_like(mapped)
    for inputs, target in ((volume, mapped), (volume.split(3, -1), mapped), (volume, volume), (volume, volume.numpy())):
        with pytest.raises(InputError, match="the target is the input itself"):
            SlabInferer(slab=3).write(inputs, one, target)
    assert (tmp_path / "ct.npy").read_bytes() == stored
    SlabInferer(slab=3).write(volume, one, out)
    assert out.any()


def test_targets_without_a_shape_are_refused(net: CLSTMUNet) -> None:
    with pytest.raises(TypeError, match="shape and dtype, got list"):
        SlabInferer().write(torch.zeros(1, 1, 8, 8, 5), net, [])
