"""Features of points from their attributes."""

from __future__ import annotations

import pytest
import torch

from monai_memeff.sparse.points import AddFeatsByKeys, AddOnes, Data, XYZFeature
from tests.sparse.points.clouds import cloud


def test_positions_and_ones() -> None:
    data = XYZFeature(add_x=True)(AddOnes()(cloud(4)))
    assert torch.equal(data.pos_x, data.pos[:, 0])
    assert torch.equal(data.pos_z, data.pos[:, 2])
    assert not hasattr(data, "pos_y")
    assert data.ones.dtype == torch.float32


def test_chosen_attributes_are_appended_in_order() -> None:
    data = XYZFeature()(AddOnes()(cloud(4)))
    add = AddFeatsByKeys([True, False, True], ["pos_z", "heat", "ones"], delete_feats=[True, True, False])
    result = add(data)
    expected = torch.cat((data.x, data.pos_z[:, None], data.ones.double()), dim=1)
    assert torch.equal(result.x, expected)
    assert not hasattr(result, "pos_z")
    assert not hasattr(result, "heat")
    assert data.x.shape == (4, 2)
    assert hasattr(data, "heat")


def test_features_begin_where_there_are_none() -> None:
    data = Data(torch.zeros(3, 3), y=torch.tensor([2, 0, 1]))
    assert AddFeatsByKeys([True], ["y"])(data).x.tolist() == [[2.0], [0.0], [1.0]]
    assert AddFeatsByKeys([False], ["y"])(data).x is None
    data.y = torch.tensor([2**24 + 1, 0, 1])
    with pytest.raises(ValueError, match="integers up to 16777216 exactly"):
        AddFeatsByKeys([True], ["y"])(data)


def test_strictness() -> None:
    data = cloud(4)
    loose = AddFeatsByKeys([True, True], ["absent", "heat"], input_nc_feats=[1, 9], stricts=[False, False])
    assert loose(data).x.shape == (4, 3)
    with pytest.raises(ValueError, match=r"no attribute 'absent', only pos, x.*add it, or strict=False"):
        AddFeatsByKeys([True], ["absent"])(data)
    with pytest.raises(ValueError, match="'heat' has 1 columns, input_nc_feats says 9"):
        AddFeatsByKeys([True], ["heat"], input_nc_feats=[9])(data)
    data.affine = torch.eye(3)
    with pytest.raises(ValueError, match="'affine' has 3 rows for 4 points"):
        AddFeatsByKeys([True], ["affine"])(data)
    with pytest.raises(ValueError, match="at least one name and one entry per name"):
        AddFeatsByKeys([True], [])
    with pytest.raises(ValueError, match="at least one name and one entry per name"):
        AddFeatsByKeys([True, False], ["heat"])
