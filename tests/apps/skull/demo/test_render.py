"""The figure: a readable PNG of the right slices, with and without a predicted implant."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from nibabel.affines import apply_affine

from monai_memeff.apps.skull.demo import render
from monai_memeff.apps.skull.demo.implant import implant_field
from monai_memeff.apps.skull.demo.raycast import look_at
from tests.apps.skull.demo.conftest import Case


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = render.raycast
    monkeypatch.setattr(render, "raycast", lambda *arguments: draw(*arguments, pixels=120))


def _colored(picture: np.ndarray, color: tuple[float, float, float]) -> int:
    """Pixels with about the hue of a color."""
    scaled = picture / np.maximum(picture.max(axis=-1, keepdims=True), 0.05)
    wanted = np.array(color) / max(color)
    return int(((np.abs(scaled - wanted).max(axis=-1) < 0.2) & (picture.max(axis=-1) > 0.25)).sum())


@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.slow
def test_the_figure_shows_truth_and_prediction(case: Case, tmp_path: Path, predicted: bool) -> None:
    shape = implant_field(case.head, case.defective, case.truth)
    path = tmp_path / "figure.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render.render_png(path, case.head, case.defective, shape, shape if predicted else None, "title", "caption")
    picture = matplotlib.image.imread(path)[..., :3]
    height, width = picture.shape[:2]
    assert height > 1000
    assert width > 1400
    views = picture[height * 55 // 100 :]
    third = width // 3
    true_view, last_view = views[:, third : 2 * third], views[:, 2 * third :]
    assert _colored(true_view, render.TRUE) > 500
    assert (_colored(last_view, render.PREDICTED) > 500) == predicted
    assert _colored(views[:, :third], render.TRUE) < 50
    slices = picture[height * 12 // 100 : height * 52 // 100]
    for part in (slices[:, :third], slices[:, third : 2 * third], slices[:, 2 * third :]):
        assert _colored(part, render.TRUE) > 50


@pytest.mark.slow
def test_slices_are_radiological(case: Case) -> None:
    """A defect on the patient's left is on the right of axial and coronal pictures; the nose is on the left."""
    from matplotlib.figure import Figure

    shape = implant_field(case.head, case.defective, case.truth)
    truth = render._on_gray(case.head, shape)
    axes = Figure().subplots(1, 3)
    points = apply_affine(case.head.gray_affine, np.argwhere(truth > 0))
    render._slices(axes, case.head, case.head.gray.astype(np.float32), truth, None, points)
    for draw in axes[:2]:
        points = np.concatenate([path.vertices for path in draw.collections[0].get_paths()])
        assert points[:, 0].mean() > np.mean(draw.get_xlim())
    assert [t.get_text() for t in axes[0].texts[:4]] == list("RLAP")
    assert [t.get_text() for t in axes[2].texts[:4]] == list("APSI")
    face = np.asarray(axes[2].images[0].get_array())
    low = face[: face.shape[0] // 3] > 300  # upper jaw and teeth
    assert np.flatnonzero(low.any(axis=0))[0] < face.shape[1] // 2


def test_every_view_has_a_compass_without_hidden_letters() -> None:
    from matplotlib.figure import Figure

    for point in ((80, 0, 60), (-60, 60, 40), (0, 90, 10), (0, 0, 80)):
        draw = Figure().subplots()
        render._compass(draw, look_at(np.array(point, float), np.zeros(3), 100))
        letters = [t for t in draw.texts if t.get_text() in "RAS" and t.get_text()]
        assert len(letters) >= 2
        places = np.array([t.get_position() for t in letters])
        apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(len(places))
        assert apart.min() > 0.03
