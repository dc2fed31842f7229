"""Networks of ours in the place of any bundle's: channels from the bundle, refusals in words."""

from __future__ import annotations

import inspect
import json
from typing import Any

import monai.networks.nets
import pytest
import torch
from monai.transforms import Activations, Activationsd, AsDiscreted, Compose, EnsureTyped

from monai_memeff.clstm import CLSTMUNet
from monai_memeff.hosts import replace_network, require_exclusive_classes, require_in_use, switch_unet
from monai_memeff.occupancy import OccupancyNet
from monai_memeff.overlays import overlay_path
from monai_memeff.sparse import SparseUNet

CLSTM = "monai_memeff.clstm.CLSTMUNet"
UNET: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8), "strides": (2,)}
SMALL = {"channels": (4, 8)}
OTHERS = {
    "SegResNet": {"in_channels": 4, "out_channels": 3, "init_filters": 16, "blocks_down": [1, 2], "dropout_prob": 0.2},
    "SwinUNETR": {"spatial_dims": 3, "img_size": 96, "in_channels": 4, "out_channels": 3, "feature_size": 48},
    "DynUNet": {"spatial_dims": 3, "in_channels": 4, "out_channels": 3, "kernel_size": [3, 3], "norm_name": "instance"},
    "DiNTS": {"dints_space": None, "in_channels": 4, "num_classes": 3, "use_downsample": True},
}


@pytest.mark.parametrize("kind", list(OTHERS))
@pytest.mark.parametrize("replacement", [CLSTM, "monai_memeff.occupancy.OccupancyNet"])
def test_channels_come_from_the_bundles_network(replacement: str, kind: str) -> None:
    overlay = {"channels": (4, 8), "kernel_size": 3} if replacement == CLSTM else {"channels": (4, 8)}
    network = replace_network(replacement, "clstm", **{**OTHERS[kind], **overlay})
    assert type(network) in (CLSTMUNet, OccupancyNet)
    assert (network.in_channels, network.out_channels) == (4, 3)


def test_numbers_on_the_command_line_go_first() -> None:
    given = {"in_channels": 2, "out_channels": None}
    network = replace_network(CLSTM, "clstm", instead=given, **{**UNET, **SMALL})
    assert (network.in_channels, network.out_channels) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spatial_dims": 2}, "is for volumes: this bundle's network_def has spatial_dims 2"),
        ({"out_channels": ...}, r"names none of out_channels, .*: add --network_def#out_channels N"),
        ({"in_channels": ...}, r"names none of in_channels, .*: add --network_def#in_channels N"),
    ],
)
def test_a_bundle_that_does_not_say_is_refused(changes: dict[str, Any], words: str) -> None:
    arguments = {name: value for name, value in {**UNET, **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=words):
        replace_network(CLSTM, "clstm", **arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spatial_dims": 2}, "spatial_dims 2"),
        ({"blocks_down": [1, 2]}, "switches MONAI's UNet .* and no other network.* has blocks_down"),
        ({"strides": ...}, "no other network.* lacks strides"),
    ],
)
def test_the_sparse_overlay_says_what_it_switches(changes: dict[str, Any], words: str) -> None:
    arguments = {name: value for name, value in {**UNET, **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=words):
        switch_unet("sparse_unet", **arguments)
    assert type(switch_unet("sparse_unet", **UNET)) is SparseUNet


@pytest.mark.parametrize("name", ["clstm", "clstm_inference", "occupancy", "occupancy_inference"])
def test_no_argument_of_a_bundles_network_reaches_ours_by_its_name(name: str) -> None:
    """Beside dimensions and channels, the overlay sets all that our network and any of MONAI's have in common."""
    config = json.loads(overlay_path(name).read_text())
    ours = set(inspect.signature(CLSTMUNet if "clstm" in name else OccupancyNet).parameters)
    kinds = [kind for kind in vars(monai.networks.nets).values() if inspect.isclass(kind)]
    theirs = {argument for kind in kinds for argument in inspect.signature(kind).parameters}
    own = {key.partition("#")[2] for key in config if key.startswith("network_def#")}
    assert ours & theirs - {"spatial_dims", "in_channels", "out_channels"} <= own


# In use


def test_what_is_not_in_use_is_named() -> None:
    network = torch.nn.DataParallel(switch_unet("sparse_unet", **UNET))
    require_in_use("sparse_unet", {"network": network}, {"network": "SparseUNet"})
    require_in_use("sparse_unet", {"network": network}, {"network": "UNet"})  # its parent
    for found, words in ((torch.nn.Linear(1, 1), "Linear"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"the overlay clstm has no effect: .*network is {words}, not CLSTMUNet"):
            require_in_use("clstm", {"network": found}, {"network": "CLSTMUNet"})


@pytest.mark.parametrize(
    ("transforms", "refused"),
    [
        ([Activationsd("pred", softmax=True)], False),
        ([AsDiscreted("pred", argmax=True)], False),
        ([Activationsd("pred", sigmoid=True)], True),
        ([Compose([EnsureTyped("pred"), Activationsd(["pred", "other"], sigmoid=[True, False])])], True),
        ([Activations(sigmoid=True)], True),
    ],
)
def test_points_are_for_classes_that_exclude_each_other(transforms: list[Any], refused: bool) -> None:
    postprocessing, network = Compose(transforms), OccupancyNet(1, 2, channels=(4,))
    require_exclusive_classes("occupancy", OccupancyNet(1, 1, channels=(4,)), postprocessing)  # one class is exclusive
    if refused:
        with pytest.raises(ValueError, match=r"exclude each other \(softmax\).* overlap \(sigmoid\)"):
            require_exclusive_classes("occupancy", network, postprocessing)
    else:
        require_exclusive_classes("occupancy", network, postprocessing)
