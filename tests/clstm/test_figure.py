"""The picture's colors say what they stand for, and sections lie where they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.clstm import SaveAgreementd, save_agreement
from monai_memeff.clstm.figure import GREEN, PURPLE, RED, agreement_colors


def test_colors() -> None:
    prediction = np.array([[True, False], [True, False]])
    reference = np.array([[True, True], [False, False]])
    colors = agreement_colors(np.full((2, 2), 0.5), prediction, reference, 1.0)
    np.testing.assert_allclose(colors[0, 0], GREEN)
    np.testing.assert_allclose(colors[0, 1], RED)
    np.testing.assert_allclose(colors[1, 0], PURPLE)
    np.testing.assert_allclose(colors[1, 1], 0.5)


def test_every_case_gets_a_picture_of_its_own(tmp_path: Path) -> None:
    pixels = pytest.importorskip("matplotlib.image", reason="the picture needs matplotlib")
    image = MetaTensor(torch.zeros(1, 9, 11, 7), affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])))
    image.meta["filename_or_obj"] = "/somewhere/case7.nii.gz"
    label = torch.zeros(1, 9, 11, 7)
    label[0, 2:7, 3:8, 1:5] = 1
    data = {"image": image, "pred": torch.roll(label, 2, 1), "label": label}
    result = SaveAgreementd("pred", output_dir=tmp_path / "new")(data)
    assert result.keys() == data.keys()
    picture = pixels.imread(tmp_path / "new" / "case7_pred.png")[..., :3]
    for color in (GREEN, RED, PURPLE):
        shade = 0.45 * np.asarray(color)  # over black
        assert (np.abs(picture - shade).max(-1) < 0.02).sum() > 500


def test_empty_references_and_wrong_shapes(tmp_path: Path) -> None:
    empty = np.zeros((4, 5, 6))
    save_agreement(tmp_path / "empty.png", empty, empty, empty)
    assert (tmp_path / "empty.png").exists()
    with pytest.raises(ValueError, match=r"of one shape, got \(4, 5, 6\), \(4, 5, 6\) and \(4, 5, 7\)"):
        save_agreement(tmp_path / "no.png", empty, empty, np.zeros((4, 5, 7)))
