"""Variations of a skull: plausible, repeatable, and the geometry of the input."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.apps.skull import RandSkullVariation, RandSkullVariationd


@pytest.fixture(scope="module")
def shell() -> torch.Tensor:
    """A closed shell two voxels thick, (1, 40, 44, 48)."""
    axes = [torch.linspace(-1, 1, n) for n in (40, 44, 48)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    radius = ((x / 0.7) ** 2 + (y / 0.75) ** 2 + (z / 0.8) ** 2).sqrt()
    return ((radius < 1) & (radius > 0.85)).to(torch.uint8)[None]


def test_another_skull_of_the_same_kind(shell: torch.Tensor) -> None:
    vary = RandSkullVariation(cut=0.0).set_random_state(3)
    for _ in range(5):
        varied = vary(shell)
        assert varied.dtype == shell.dtype
        assert varied.shape == shell.shape
        assert set(varied.unique().tolist()) == {0, 1}
        assert not torch.equal(varied, shell)
        assert 0.4 < varied.sum() / shell.sum() < 2.5


def test_a_varied_shell_stays_closed(shell: torch.Tensor) -> None:
    """Air inside and outside do not meet: thin bone has no holes."""
    from scipy import ndimage

    vary = RandSkullVariation(cut=0.0, scale=0.1).set_random_state(1)
    for _ in range(5):
        air, count = ndimage.label(vary(shell)[0].numpy() == 0)
        assert count >= 2
        assert air[0, 0, 0] != air[20, 22, 24]


def test_no_range_leaves_the_skull(shell: torch.Tensor) -> None:
    still = RandSkullVariation(rotation=0, scale=0, shear=0, bend=0, cut=0).set_random_state(0)
    assert torch.equal(still(shell), shell)


def test_the_same_state_gives_the_same_skull(shell: torch.Tensor) -> None:
    one, other = (RandSkullVariationd("skull").set_random_state(5) for _ in range(2))
    assert torch.equal(one({"skull": shell})["skull"], other({"skull": shell})["skull"])
    vary = RandSkullVariation().set_random_state(5)
    assert torch.equal(vary(shell), vary(shell, randomize=False))


def test_the_lower_end_may_be_outside(shell: torch.Tensor) -> None:
    cut = RandSkullVariation(rotation=0, scale=0, shear=0, bend=0, cut=1).set_random_state(0)
    varied = cut(shell)
    rows = varied[0].flatten(0, 1).any(0).nonzero()[:, 0]
    assert rows[-1] == shell[0].flatten(0, 1).any(0).nonzero()[-1, 0]
    assert rows[0] > shell[0].flatten(0, 1).any(0).nonzero()[0, 0]


def test_metadata_stay(shell: torch.Tensor) -> None:
    image = MetaTensor(shell, affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])))
    varied = RandSkullVariation().set_random_state(0)(image)
    assert isinstance(varied, MetaTensor)
    assert torch.equal(varied.affine, image.affine)


def test_without_chance_nothing_changes(shell: torch.Tensor) -> None:
    assert RandSkullVariation(prob=0.0)(shell) is shell


@pytest.mark.parametrize("wrong", [{"rotation": -1}, {"scale": 1.0}, {"cut": 2}, {"bend": -0.1}])
def test_ranges_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} (must|a prob)"):
        RandSkullVariation(**wrong)


def test_other_shapes_are_refused(shell: torch.Tensor) -> None:
    for volume, wanted in ((shell[0], r"\(C, H, W, D\)"), (torch.cat((shell, shell)), r"\(1, H, W, D\)")):
        with pytest.raises(ValueError, match=wanted):
            RandSkullVariation()(volume)


def test_two_skulls_are_not_varied_apart() -> None:
    with pytest.raises(ValueError, match="keys must name one complete skull, got 2"):
        RandSkullVariationd(("skull", "implant"))
