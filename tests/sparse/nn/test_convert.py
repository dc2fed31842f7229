"""to_sparse: what is swapped, what is refused by name, and that a refusal leaves the network as it was."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import Convolution, ResidualUnit
from monai.networks.layers.simplelayers import SkipConnection
from torch import nn

from monai_memeff.sparse import SparseConv3d, SparseConvTranspose3d, SparseTensor, to_sparse
from monai_memeff.sparse.nn.convert import SPARSE_TWINS
from tests.oracles import assert_same_as_dense, asymmetric
from tests.sparse.reference import random_mask

SHAPE = (6, 4, 8)


def network() -> nn.Sequential:
    """A dense network of everything that can be swapped."""
    return nn.Sequential(
        Convolution(3, 2, 4, kernel_size=3, norm="batch", act="relu", dropout=0.0),
        ResidualUnit(3, 4, 6, strides=2, subunits=2, norm=("group", {"num_groups": 2}), act="leakyrelu"),
        SkipConnection(nn.Sequential(nn.Conv3d(6, 5, 1), nn.InstanceNorm3d(5), nn.PReLU()), mode="cat"),
        SkipConnection(nn.Conv3d(11, 11, 3, padding=2, dilation=2), mode="add"),
        nn.Identity(),
        nn.ConvTranspose3d(11, 3, 3, 2, padding=1, output_padding=1),
        nn.Conv3d(3, 3, (1, 3, 5), padding="same"),
    ).double()


def test_every_layer_is_swapped_and_keeps_its_parameters() -> None:
    dense, sparse = network(), network()
    parameters = list(sparse.parameters())
    names = list(sparse.state_dict())
    assert to_sparse(sparse) is sparse
    assert all(mine is before for mine, before in zip(sparse.parameters(), parameters, strict=True))
    assert list(sparse.state_dict()) == names == list(dense.state_dict())
    assert not [module for module in sparse.modules() if type(module) in SPARSE_TWINS]
    mask = torch.ones(2, 1, *SHAPE, dtype=torch.bool)
    assert_same_as_dense(
        lambda x: sparse(SparseTensor.from_dense(x, mask)).dense(),
        dense,
        asymmetric((2, 2, *SHAPE)),
        modules=(sparse, dense),
    )


def test_swapping_twice_changes_nothing() -> None:
    once = to_sparse(network())
    kinds = [type(module) for module in once.modules()]
    assert [type(module) for module in to_sparse(once).modules()] == kinds


def test_a_single_layer_can_be_swapped() -> None:
    layer = to_sparse(nn.Conv3d(2, 3, 3, padding=1))
    assert type(layer) is SparseConv3d
    up = to_sparse(nn.ConvTranspose3d(3, 2, 2, 2))
    assert type(up) is SparseConvTranspose3d
    x = SparseTensor.from_dense(torch.randn(1, 2, *SHAPE), random_mask(1, SHAPE, 0.3))
    down = SparseConv3d(2, 3, 2, 2)
    assert torch.equal(up(down(x)).coordinates, x.coordinates)
    assert not up.generative


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Conv2d(1, 1, 3), TypeError, r"1\.0 \(Conv2d\) has no sparse twin; supported: Conv3d"),
        (nn.Upsample(scale_factor=2), TypeError, r"1\.0 \(Upsample\) has no sparse twin"),
        (nn.Linear(2, 2), TypeError, r"1\.0 \(Linear\)"),
        (nn.BatchNorm2d(2), TypeError, r"1\.0 \(BatchNorm2d\)"),
        (nn.Conv3d(4, 4, 3, padding=1, groups=2), ValueError, r"1\.0: .*groups=1 .*got groups=2"),
        (nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"), ValueError, r"padding_mode='circular'"),
        (nn.Conv3d(4, 4, 3), ValueError, r"1\.0: .*padding must be .* = 1, got 0"),
        (nn.Conv3d(4, 4, 3, padding="valid"), ValueError, r"= 1, got 0"),
        (nn.Conv3d(4, 4, 2, padding=1), ValueError, r"= 0\.5, got 1"),
        (nn.Conv3d(4, 4, 3, padding=1, dilation=2), ValueError, r"= 2, got 1"),
        (nn.ConvTranspose3d(4, 4, 3), ValueError, r"= 1, got 0"),
        (nn.InstanceNorm3d(4, track_running_stats=True), ValueError, r"1\.0: .*set track_running_stats=False"),
        (SkipConnection(nn.Identity(), mode="mul"), ValueError, r"1\.0: .*'cat' or 'add', got 'mul'"),
    ],
)
def test_what_has_no_twin_is_refused_by_name(layer: nn.Module, error: type[Exception], message: str) -> None:
    net = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Sequential(layer), nn.ReLU())
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(error, match=message):
        to_sparse(net)
    assert [type(module) for module in net.modules()] == kinds, "nothing has been changed"


def test_the_network_itself_is_named_too() -> None:
    class Custom(nn.Module):
        pass

    with pytest.raises(TypeError, match=r"network \(Custom\) has no sparse twin"):
        to_sparse(Custom())
