"""Whole-volume prediction of stock models: the network on the whole image, through stock's export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunet_plugins import lean_prediction
from nnunet_plugins.lean import fingerprint, switch
from nnunet_plugins.lean.predict import whole
from nnunet_plugins.lean.proof import plain_whole
from nnunet_plugins.lean.trial import TrialModel, predictor_of

LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
REGIONS = {"background": 0, "all": [1, 2, 3], "core": [2, 3], "spot": 3}


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """An image (1, X, Y, Z)."""
    return np.random.default_rng(0).normal(0, 1, (1, *shape)).astype(np.float32)


@pytest.fixture(autouse=True)
def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_NNUNET", "whole")


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"folds": 2, "mirroring": (0, 2), "transpose": (1, 2, 0), "spacing": (1.0, 1.3, 0.7)}, (20, 14, 17)),
        ({"labels": REGIONS, "regions_class_order": (1, 2, 3)}, (16, 12, 18)),
        ({"patch": (8, 8), "mirroring": (0, 1)}, (5, 11, 14)),
    ],
)
@pytest.mark.long
def test_labels_are_those_of_the_network_on_the_whole_image(tmp_path: Path, settings: Any, shape: Any) -> None:
    model = TrialModel(**{"labels": LABELS, "patch": (8, 8, 8), "features": (4, 6, 6), **settings})
    predictor = predictor_of(model.write(tmp_path))
    properties = {"spacing": [1.0, 1.0, 1.0]}
    tiles = predictor.predict_single_npy_array(noise(shape), properties)
    with plain_whole(predictor):
        expected, p = predictor.predict_single_npy_array(noise(shape), properties, save_or_return_probabilities=True)
    with lean_prediction():
        found, q = predictor.predict_single_npy_array(noise(shape), properties, save_or_return_probabilities=True)
    assert np.array_equal(expected, found)
    np.testing.assert_allclose(p, q, atol=2e-3)  # half precision
    assert (tiles != found).any()  # and not those of tiles
    assert not switch.is_on()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.slow
def test_logits_are_the_networks(tmp_path: Path, parts: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    predictor = predictor_of(TrialModel(LABELS, patch=(8, 8, 8), features=(4, 6, 6)).write(tmp_path))
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    predictor.network.double()
    whole._INFERERS[predictor] = whole.SpatialPartitionInferer(partitions=parts)
    image = torch.from_numpy(noise((16, 12, 20))).double()
    predictor.network.eval()
    with torch.no_grad():
        expected = predictor.network(image[None])[0]
    found = whole._predicted(predictor, image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert "padded" not in capsys.readouterr().out  # a size that the network takes


@pytest.mark.slow
def test_padding_is_said_and_only_where_needed(tmp_path: Path, capsys: Any) -> None:
    predictor = predictor_of(TrialModel(LABELS, patch=(8, 8, 8), features=(4, 6, 6), mirroring=None).write(tmp_path))
    with lean_prediction():
        predictor.predict_single_npy_array(noise((9, 12, 18)), {"spacing": [1.0, 1.0, 1.0]})
    said = "The network cannot take 9 x 12 x 18 voxels: the image is padded with zeros to 12 x 12 x 20"
    assert capsys.readouterr().out.count(said) == 1
    size = whole.fitting_size(predictor.network, (1, 2, 3, 4), predictor.configuration_manager)
    assert size == (8, 8, 8)  # one voxel at the lowest stage has no variance: to the patch, as nnU-Net pads
    assert whole.fitting_size(predictor.network, (1, 4, 4, 8), predictor.configuration_manager) == (4, 4, 8)


@pytest.mark.slow
def test_infinite_logits_are_refused(tmp_path: Path) -> None:
    predictor = predictor_of(TrialModel(LABELS, patch=(8, 8, 8)).write(tmp_path))
    predictor.list_of_parameters[0]["decoder.seg_layers.0.bias"] += 1e6
    with lean_prediction(), pytest.raises(RuntimeError, match="Encountered inf"):
        predictor.predict_single_npy_array(noise((8, 8, 8)), {"spacing": [1.0, 1.0, 1.0]})


def test_an_unknown_nnunet_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(fingerprint, "refusal", lambda: "another nnU-Net")
    with pytest.raises(SystemExit):
        switch.on_import(switch.PREDICTOR)
    assert "MEMEFF_NNUNET=whole is not possible: another nnU-Net" in capsys.readouterr().err
