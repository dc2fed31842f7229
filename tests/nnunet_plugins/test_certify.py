"""`memeff certify` on trained nnU-Net models: labels are those of nnU-Net's own preprocessing and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from monai_memeff.errors import InputError
from monai_memeff.hosts.certify import certify
from monai_memeff.hosts.certify.sources.subject import Options, open_subject
from nnunet_plugins.lean.proof import plain_whole
from nnunet_plugins.lean.trial import TrialModel, predictor_of

pytestmark = pytest.mark.filterwarnings("ignore")
LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
REGIONS = {"background": 0, "all": [1, 2, 3], "core": [2, 3], "spot": 3}
SMALL: dict[str, Any] = {"labels": LABELS, "patch": (8, 8, 8), "features": (4, 6, 6)}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume in uneven spacing with a frame of zeros, which nnU-Net crops."""
    values = np.zeros((20, 17, 16), np.float32)
    values[2:, 1:-1] = np.random.default_rng(0).normal(3, 1, (18, 15, 16))
    file = tmp_path_factory.mktemp("image") / "case_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1.0, 1.0, 1.3, 1.0])), file)
    return file


def expected(model: Path, image: Path) -> np.ndarray:
    """nnU-Net's own labels of the network on the whole image: (H, W, D)."""
    predictor = predictor_of(model)
    predictor.use_mirroring = False
    reader = predictor.plans_manager.image_reader_writer_class()
    values, properties = reader.read_images([str(image)])
    with plain_whole(predictor):
        return predictor.predict_single_npy_array(values, properties).transpose(2, 1, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"mirroring": (0, 2), "transpose": (1, 2, 0), "spacing": (1.0, 1.3, 0.7)},
        {"labels": REGIONS, "regions_class_order": (1, 2, 3)},
    ],
)
@pytest.mark.long
def test_labels_are_those_of_nnunet_on_the_whole_image(settings: Any, image: Path, tmp_path: Path) -> None:
    model = TrialModel(**{**SMALL, **settings}).write(tmp_path / "model")
    label = tmp_path / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(expected(model, image), nibabel.load(image).affine), label)
    assert certify(str(model), [image], tmp_path / "out", [label], repeats=1, partitions=2) == 0
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    names = [name for name in settings.get("labels", LABELS) if name != "background"]
    assert list(found["dice"]["runs"]["streamed"]) == names
    for score in found["dice"]["runs"]["whole"].values():
        assert score is None or score > 0.98  # nnU-Net holds logits in half precision
    assert found["differences"]["streamed"]["voxels"] == 0
    assert found["differences"]["window"]["voxels"] > 0
    assert found["runs"]["window"]["details"]["roi_size"] == [8, 8, 8]
    assert ("Mirroring is left out (nnU-Net: --disable_tta)." in found["notes"]) == ("mirroring" in settings)


def test_a_fold_is_chosen_and_said(image: Path, tmp_path: Path) -> None:
    model = TrialModel(**SMALL, folds=2).write(tmp_path / "model")
    subject = open_subject(str(model), [image], Options(fold="1"))
    assert subject.name.endswith("fold_1")
    assert "One fold of 2" in subject.notes[0]
    with pytest.raises(InputError, match="has no fold 7: it has 0, 1"):
        open_subject(str(model), [image], Options(fold="7"))


def test_what_is_not_certified_is_refused_in_one_line(image: Path, tmp_path: Path) -> None:
    flat = TrialModel(LABELS, patch=(8, 8)).write(tmp_path / "flat")
    second = TrialModel(LABELS, cascade=True).write(tmp_path / "second")
    plain = TrialModel(**SMALL).write(tmp_path / "plain")
    with pytest.raises(InputError, match="--image was given 2"):
        open_subject(str(plain), [image, image], Options())
    for model in (flat, second):
        with pytest.raises(InputError, match="2D or the second stage"):
            open_subject(str(model), [image], Options())
    file = plain / "fold_0" / "checkpoint_final.pth"
    state = torch.load(file, weights_only=False)
    torch.save({**state, "trainer_name": "NoSuchTrainer"}, file)
    with pytest.raises(InputError, match="NoSuchTrainer"):
        open_subject(str(plain), [image], Options())
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match="is not a checkpoint of tensors") as refused:
        open_subject(str(plain), [image], Options())
    assert "\n" not in str(refused.value)
    file.unlink()
    with pytest.raises(InputError, match="has no fold"):
        open_subject(str(plain), [image], Options())
