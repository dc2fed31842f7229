"""Checks: what passes is the same object, what does not is one line with the file, the value and the way out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from monai_memeff import transforms
from monai_memeff.errors import InputError

PAIRS: dict[str, dict[str, Any]] = {
    "CheckVolume": {},
    "CheckForeground": {"max_fraction": 0.5, "name": "bone", "threshold": 300, "option": "--bone_threshold"},
    "CheckLabels": {"names": ["liver", "spleen"], "option": "--organs"},
}


def volume(
    values: Any = 0.0, shape: tuple[int, ...] = (1, 4, 5, 6), file: str | None = "/data/case.nii.gz"
) -> MetaTensor:
    """A volume as ``LoadImaged`` gives it, with one voxel changed."""
    made = torch.zeros(shape)
    made.flatten()[7] = values
    return MetaTensor(made, meta={} if file is None else {"filename_or_obj": file})


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["meta", "tensor", "numpy"])
def test_what_passes_is_unchanged(name: str, kind: str) -> None:
    given: Any = volume(2)
    given = {"meta": given, "tensor": given.as_tensor(), "numpy": given.as_tensor().numpy()}[kind]
    assert getattr(transforms, name)(**PAIRS[name])(given) is given
    data = {"image": given, "other": 3}
    for alias in ("d", "D", "Dict"):
        dictionary = getattr(transforms, f"{name}{alias}")
        assert dictionary is getattr(transforms, f"{name}d")
        result = Compose([dictionary("image", **PAIRS[name])])(data)
        assert result["image"] is given
        assert result is not data
        assert dictionary(["image", "none"], **PAIRS[name], allow_missing_keys=True)(data)["image"] is given
        with pytest.raises(KeyError):
            dictionary("none", **PAIRS[name])(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(bad: float) -> None:
    expected = (
        "/data/case.nii.gz has the shape (1, 4, 5, 6) with 1 values that are not finite; one finite 3D volume is needed"
    )
    with pytest.raises(InputError) as caught:
        transforms.CheckVolume()(volume(bad))
    assert str(caught.value) == expected
    with pytest.raises(InputError, match=r"^the volume has the shape"):
        transforms.CheckVolume()(volume(bad, file=None))
    with pytest.raises(InputError, match=r"^the volume has the shape"):
        transforms.CheckVolume()(np.full((1, 2, 2, 2), bad))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 4, 5), (1, 1, 4, 5, 6), (9,), (0, 4, 5, 6)])
def test_volumes_of_another_kind(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="one finite 3D volume is needed") as caught:
        transforms.CheckVolume()(MetaTensor(torch.zeros(shape)))
    assert str(shape) in str(caught.value)


def test_nothing_and_too_much_foreground() -> None:
    check = transforms.CheckForeground(**PAIRS["CheckForeground"])
    for share, passes in ((0, False), (1, True), (59, True), (60, False), (120, False)):
        img = volume()
        img.flatten()[:share] = 1
        if passes:
            assert check(img) is img
            continue
        with pytest.raises(InputError) as caught:
            check(img)
        assert str(caught.value) == (
            f"/data/case.nii.gz: {share / 120:.1%} of the voxels are bone at the threshold 300,"
            " more than 0 and less than 50% must be; change --bone_threshold"
        )


def test_foreground_of_any_size_but_none() -> None:
    check = transforms.CheckForeground()
    assert check(torch.ones(1, 2, 2, 2)).all()
    with pytest.raises(InputError) as caught:
        check(volume())
    expected = "/data/case.nii.gz: 0.0% of the voxels are foreground, more than 0 must be; leave the file out"
    assert str(caught.value) == expected
    with pytest.raises(InputError):
        check(torch.zeros(1, 0, 2, 2))
    for fraction in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="max_fraction"):
            transforms.CheckForeground(fraction)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "has labels from 0 to 3, 0 to 2 are named; set --organs"),
        (-1, "has labels from -1 to 0, 0 to 2 are named; set --organs"),
        (float("nan"), "has labels from nan to nan"),
        (1.5, "has values that are not labels, such as fractions"),
    ],
)
def test_labels_without_a_name(value: float, message: str) -> None:
    with pytest.raises(InputError, match=f"^/data/case.nii.gz {message}"):
        transforms.CheckLabels(["liver", "spleen"], option="--organs")(volume(value))


def test_labels_need_names() -> None:
    for names in ([], "liver"):
        with pytest.raises(ValueError, match="names must list"):
            transforms.CheckLabels(names)
    with pytest.raises(InputError, match="name them all"):
        transforms.CheckLabels(["liver"])(torch.tensor([2]))
