"""Implants out of completed skulls: against scipy, and what opening and the largest piece remove."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from scipy import ndimage

from monai_memeff.apps.skull.defects import RandSkullDefect
from monai_memeff.apps.skull.implant import (
    ImplantFromCompletion,
    ImplantFromCompletionD,
    ImplantFromCompletiond,
    ImplantFromCompletionDict,
)
from monai_memeff.apps.skull.shell import SkullShelld

SHAPE = (1, 18, 15, 17)


def by_scipy(completed: np.ndarray, defective: np.ndarray) -> np.ndarray:
    """The recipe of the paper on (H, W, D) booleans."""
    opened = ndimage.binary_opening(completed & ~defective)
    labels, count = ndimage.label(opened, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return (labels == sizes.argmax()) & opened


@pytest.mark.parametrize("seed", range(3))
def test_the_recipe_of_the_paper(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    completed = torch.rand(SHAPE, generator=generator) < 0.9
    defective = torch.rand(SHAPE, generator=generator) < 0.06
    implant = ImplantFromCompletion()(completed, defective)
    expected = by_scipy(completed[0].numpy(), defective[0].numpy())
    assert 0 < expected.sum() < int((completed & ~defective).sum())
    assert implant.dtype == torch.bool
    assert torch.equal(implant[0], torch.from_numpy(expected))


def pieces() -> tuple[torch.Tensor, torch.Tensor]:
    """A completed skull: a block of bone known before, two new blocks that meet at a corner, a small block, a sheet."""
    completed, defective = torch.zeros(SHAPE), torch.zeros(SHAPE)
    completed[:, :4], defective[:, :4] = 1, 1
    completed[:, 5:8, 0:3, 0:3] = 2
    completed[:, 8:12, 3:7, 3:7] = 2
    completed[:, 13:16, 10:13, 0:3] = 2
    completed[:, 14:16, :, 10:] = 2
    return completed, defective


def test_opening_and_the_largest_piece() -> None:
    completed, defective = pieces()
    raw = ImplantFromCompletion(opening=0, largest=False)(completed, defective)
    assert torch.equal(raw, ((completed != 0) & (defective == 0)).float())
    opened = ImplantFromCompletion(opening=1, largest=False)(completed, defective)
    assert not bool(opened[:, 14:16, :, 10:].any()), "a sheet of two voxels is not an implant"
    assert bool(opened[:, 6, 1, 1].all())
    assert bool(opened[:, 14, 11, 1].all())
    implant = ImplantFromCompletion(opening=0)(completed * (torch.arange(17) < 10), defective)
    assert int(implant.sum()) == 27 + 64, "blocks that meet at a corner are one piece"


def test_type_metadata_and_input() -> None:
    completed, defective = pieces()
    affine = torch.diag(torch.tensor([2.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    image = MetaTensor(completed.short(), affine=affine)
    implant = ImplantFromCompletion()(image, defective)
    assert implant.dtype == torch.int16
    assert torch.equal(implant.affine, affine)
    assert implant.unique().tolist() == [0, 1]
    assert torch.equal(image.as_tensor(), completed.short())


def test_nothing_new_is_an_empty_implant() -> None:
    skull = torch.ones(SHAPE)
    assert not bool(ImplantFromCompletion()(skull, skull).any())
    assert not bool(ImplantFromCompletion()(skull * 0, skull).any())


def test_in_a_dictionary() -> None:
    completed, defective = pieces()
    data = {"pred": completed, "defective": defective}
    result = ImplantFromCompletiond("pred")(data)
    assert torch.equal(result["pred"], ImplantFromCompletion()(completed, defective))
    assert data["pred"] is completed
    assert result["defective"] is defective
    assert ImplantFromCompletiond("absent", allow_missing_keys=True)(data) == data
    assert ImplantFromCompletionD is ImplantFromCompletionDict is ImplantFromCompletiond


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="opening must not be negative"):
        ImplantFromCompletion(opening=-1)
    with pytest.raises(ValueError, match=r"both be \(1, H, W, D\) on one grid, got \(1, 4, 4, 4\) and \(1, 4, 4, 5\)"):
        ImplantFromCompletion()(torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 5))
    with pytest.raises(ValueError, match=r"both be \(1, H, W, D\)"):
        ImplantFromCompletion()(torch.ones(2, 4, 4, 4), torch.ones(2, 4, 4, 4))


@pytest.mark.slow
def test_a_real_head_is_completed_and_its_implant_found_again(data_dir: Path) -> None:
    """The paper's target as a perfect prediction: what comes out is the implant, but for its thin rim."""
    image = LoadImage(ensure_channel_first=True)(data_dir / "head_ct" / "vhf_head_ct.nii.gz")
    skull = (image[:, 128:-128, 96:-96, 100:] > 300).to(torch.uint8)
    defective, implant = RandSkullDefect(kind="sphere").set_random_state(0)(skull)
    data = SkullShelld("defective", implant_key="implant")({"defective": defective, "implant": implant})
    assert int(data["defective"].sum()) < int(defective.sum())
    found = ImplantFromCompletion()(data["target"], data["defective"])
    assert not bool((found.as_tensor() & ~implant.as_tensor().bool()).any())
    dice = 2 * float((found * implant).sum()) / float(found.sum() + implant.sum())
    assert dice > 0.99
