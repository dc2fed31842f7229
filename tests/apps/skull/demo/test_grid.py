"""The demo's grid is the skull bundle's own: same cells, same place, whatever the axes of the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from monai_memeff.apps.skull.demo.grid import along_the_body, onto_grid
from monai_memeff.bundles import bundle_path
from tests.bundles.conftest import save_nifti


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.slow
def test_the_bundle_puts_the_file_onto_the_same_grid(pool: int, ct: MetaTensor, tmp_path: Path) -> None:
    """As a user runs it, from the file to the network's input."""
    save_nifti(tmp_path / "head.nii.gz", ct[0].numpy(), np.asarray(ct.affine))
    options = {"grid": 64, "cell_mm": 3.5, "pool": pool, "headroom_mm": 12.0, "bone_threshold": 250}
    parser = ConfigParser()
    parser.read_config(str(bundle_path("skull_completion_sparse") / "configs" / "inference.json"))
    parser.update(options)
    expected = parser.get_parsed_content("preprocessing")({"image": str(tmp_path / "head.nii.gz")})["image"]
    found = onto_grid(ct, -1000.0, **options)
    assert 0.05 < found.float().mean() < 0.3
    assert torch.equal(found.as_tensor(), expected.as_tensor())
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)


def test_what_lies_below_the_grid_is_not_seen(ct: MetaTensor) -> None:
    """Shoulders wider than the head neither move the grid nor enter it."""
    options = {"grid": 64, "cell_mm": 3.5, "pool": 2, "headroom_mm": 12.0}
    bottom = float(ct.affine[2, 3]) + 50.0
    wide = ct.clone()
    wide[0, :5, :, :10] = 1000.0
    clean, cut = onto_grid(ct, bottom, **options), onto_grid(wide, bottom, **options)
    assert torch.equal(cut.as_tensor(), clean.as_tensor())
    assert torch.equal(cut.affine, clean.affine)


def test_oblique_axes_are_resampled_to_the_body(ct: MetaTensor, skewed: np.ndarray) -> None:
    """A ramp in millimeters is the same ramp on the other grid, and air outside."""
    assert along_the_body(ct) is ct
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 21, 22)), indexing="ij"), axis=-1)
    values = (index @ skewed[:3, :3].T + skewed[:3, 3]) @ np.array([0.3, -0.2, 0.5])
    moved = along_the_body(MetaTensor(torch.from_numpy(values).float()[None], affine=torch.from_numpy(skewed)))
    affine = np.asarray(moved.affine)
    np.testing.assert_allclose(affine[:3, :3], np.eye(3) * 1.5, atol=1e-6)
    found = np.asarray(moved[0])
    grid = np.stack(np.meshgrid(*map(np.arange, found.shape), indexing="ij"), axis=-1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    source = (world - skewed[:3, 3]) @ np.linalg.inv(skewed[:3, :3]).T
    inside = ((source >= 0) & (source <= np.array(values.shape) - 1)).all(axis=-1)
    outside = ((source < -1) | (source > np.array(values.shape))).any(axis=-1)
    assert inside.sum() > 1000
    np.testing.assert_allclose(found[inside], (world @ np.array([0.3, -0.2, 0.5]))[inside], atol=0.01)
    assert found[outside] == pytest.approx(-1024)
