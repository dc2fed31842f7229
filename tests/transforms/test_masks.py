"""Masks: of a label, of a network, dilated and opened; against plain loops and SciPy."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor, nn

from monai_memeff import transforms
from monai_memeff.errors import InputError


class Level(nn.Module):
    """A network that says whether it is in training, and where it was asked."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 5
        assert not torch.is_grad_enabled()
        return torch.cat([x - 1, x - 2], 1) + (100 if self.training else 0)


def labels() -> MetaTensor:
    values = np.random.default_rng(0).integers(0, 4, (1, 5, 6, 7))
    return MetaTensor(values, affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])), meta={"filename_or_obj": "a.nii"})


def masks() -> MetaTensor:
    """Two channels with little in common, anything but 0 being foreground."""
    values = np.random.default_rng(1).random((2, 9, 10, 11)) < np.array([0.9, 0.97])[:, None, None, None]
    return MetaTensor(torch.from_numpy(values).to(torch.uint8), affine=torch.eye(4) * 2)


@pytest.mark.parametrize(
    ("name", "options", "given"),
    [
        ("SelectLabel", {"label": 2}, labels()),
        ("PredictMask", {"network": Level()}, labels()),
        ("DilateMask", {"size": 5}, masks()),
        ("OpenMask", {"size": 3}, masks()),
    ],
)
def test_dictionaries_do_what_arrays_do(name: str, options: dict[str, Any], given: MetaTensor) -> None:
    expected = getattr(transforms, name)(**options)(given)
    assert isinstance(expected, MetaTensor)
    assert torch.equal(expected.affine, given.affine)
    assert expected.shape[1:] == given.shape[1:]
    data = {"a": given, "b": given, "c": 1}
    for alias in ("d", "D", "Dict"):
        dictionary = getattr(transforms, f"{name}{alias}")
        assert dictionary is getattr(transforms, f"{name}d")
        result = dictionary(["a", "none"], **options, allow_missing_keys=True)(data)
        assert torch.equal(result["a"], expected)
        assert result["b"] is given
        assert data["a"] is given


def test_select_label() -> None:
    given = labels()
    for label in (0, 2, None):
        mask = transforms.SelectLabel(label)(given)
        assert mask.dtype == torch.uint8
        values = np.asarray(given)
        assert np.array_equal(np.asarray(mask), values != 0 if label is None else values == label)
    assert not transforms.SelectLabel(9)(given).any()
    with pytest.raises(InputError) as caught:
        transforms.SelectLabel(9, allow_empty=False)(given)
    expected = "a.nii holds no voxel of the structure: label 9; set --label, or leave the file out"
    assert str(caught.value) == expected
    with pytest.raises(InputError, match="all are 0"):
        transforms.SelectLabel(allow_empty=False)(torch.zeros(1, 2, 2, 2))


@pytest.mark.parametrize("training", [True, False])
def test_predict_mask_is_evaluation(training: bool) -> None:
    network = Level().train(training)
    given = labels().float().requires_grad_()
    mask = transforms.PredictMask(network, threshold=0.5, device="cpu")(given)
    assert mask.dtype == torch.uint8
    assert not mask.requires_grad
    assert network.training is training
    values = np.asarray(given.detach())
    assert np.array_equal(np.asarray(mask), np.concatenate([values - 1 > 0.5, values - 2 > 0.5]))


def test_threads_that_predict_at_once_are_all_in_evaluation() -> None:
    both, gone, modes = threading.Barrier(2), threading.Event(), list[tuple[bool, bool]]()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm3d(1).eval()

        def forward(self, x: Tensor) -> Tensor:
            if both.wait(20):  # one of the two stays until the other has left
                gone.wait(20)
            modes.append((self.training, self.norm.training))
            return x

    network = Slow().train()
    network.norm.eval()
    with ThreadPoolExecutor(2) as pool:
        for done in as_completed([pool.submit(transforms.PredictMask(network), torch.zeros(1, 2, 2, 2)) for _ in "ab"]):
            done.result()
            gone.set()
    assert modes == [(False, False)] * 2
    assert (network.training, network.norm.training) == (True, False)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_dilation_and_opening_are_scipys_in_every_channel(size: int) -> None:
    given = masks()
    cube = np.ones((size,) * 3)
    dilated, opened = (t(size)(given) for t in (transforms.DilateMask, transforms.OpenMask))
    assert dilated.dtype == opened.dtype == torch.uint8
    for channel, grown, kept in zip(np.asarray(given), np.asarray(dilated), np.asarray(opened), strict=True):
        assert np.array_equal(grown, ndimage.binary_dilation(channel, cube))
        eroded = ndimage.binary_erosion(channel, cube, border_value=1)
        assert np.array_equal(kept, ndimage.binary_dilation(eroded, cube))
        assert size == 1 or 0 < kept.sum() < channel.sum()


@pytest.mark.parametrize("size", [0, 2, -1])
def test_cubes_have_a_middle(size: int) -> None:
    for transform in (transforms.DilateMask, transforms.OpenMask):
        with pytest.raises(ValueError, match="size must be odd"):
            transform(size)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "transform",
    [
        transforms.SelectLabel(),
        transforms.SelectLabel(2),
        transforms.DilateMask(),
        transforms.OpenMask(),
        transforms.PredictMask(nn.Identity()),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_what_is_no_number_is_refused(transform: Any, bad: float) -> None:
    given = masks().float()
    given[1, 2, 3, 4] = bad
    with pytest.raises(InputError, match="needs finite values, got 1 NaN or infinite"):
        transform(given)


def test_no_mask_has_negative_numbers() -> None:
    for transform in (transforms.DilateMask(), transforms.OpenMask()):
        with pytest.raises(InputError, match="needs masks, which are zero where nothing is"):
            transform(masks().float() - 0.5)


def test_dilation_keeps_every_number_or_refuses_it() -> None:
    for value in (torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(2**24), torch.tensor(0.1, dtype=torch.half)):
        assert bool((transforms.DilateMask(3)(value.expand(1, 2, 2, 2)) == value).all())
    with pytest.raises(InputError, match="integers up to 16777216 exactly"):
        transforms.DilateMask(3)(torch.full((1, 2, 2, 2), 2**24 + 1))
