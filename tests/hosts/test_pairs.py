"""Two overlays at once, all ordered pairs: they work, or every host refuses them by name before work starts."""

from __future__ import annotations

import json
import re
from itertools import permutations
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from monai_memeff.errors import InputError
from monai_memeff.hosts import merge_bundle_configs
from monai_memeff.hosts.run.source.bundle import Bundle
from monai_memeff.overlays import overlay_names, overlay_path
from monai_memeff.sparse import SparseInferer, SparseUNet
from tests.bundles.conftest import ROOT, STOCK

PAIRS = list(permutations(overlay_names(), 2))
TOGETHER = {("sparse_unet", "sparse_unet_inference"), ("sparse_unet_inference", "sparse_unet")}
"""Pairs that work: both put in SparseUNet, and one brings its inferer."""
SMALL = {"device": "cpu", "network_def#channels": [4, 8], "network_def#strides": [2]}
ALONE = {"_target_": "monai_memeff.halo.run.ranks.comm.mesh.single_rank_mesh"}


def base_of(*names: str) -> Path:
    """The bundle's file for overlays; for one of each kind that for inference, which has no place for the other."""
    inference = any(name.endswith("_inference") for name in names)
    return STOCK / "configs" / ("inference.json" if inference else "train.json")


def first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def test_there_are_56_pairs() -> None:
    assert len(PAIRS) == 56


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_merge_takes_or_refuses_a_pair(first: str, second: str) -> None:
    for base in ("train.json", "inference.json"):
        files = [STOCK / "configs" / base, overlay_path(first), overlay_path(second)]
        if (first, second) in TOGETHER and base == "inference.json":
            assert merge_bundle_configs(files)["network_def"]["_target_"] == "monai_memeff.hosts.switch_unet"
            continue
        with pytest.raises(InputError) as caught:
            merge_bundle_configs(files)
        words = str(caught.value)
        assert "\n" not in words
        assert any(f"{name}.json" in words for name in (first, second)), words


def started(*names: str) -> ConfigParser:
    """The bundle with overlays as MONAI reads it, after the steps of ``initialize`` that are ours."""
    files = [base_of(*names), *map(overlay_path, names)]
    config = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    for place, value in (SMALL | ({"halo_mesh": ALONE} if "halo_mesh" in config else {})).items():
        config[place] = value
    for number, step in enumerate(config["initialize"]):
        if "monai_memeff" in str(step):
            config.get_parsed_content(f"initialize#{number}")
    return config


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_monais_own_command_takes_or_refuses_a_pair(first: str, second: str) -> None:
    """Its parser has no place for a nested key, or a step of initialize refuses before anything is read or trained."""
    if (first, second) in TOGETHER:
        config = started(first, second)
        assert isinstance(config.get_parsed_content("evaluator#inferer"), SparseInferer)
        assert isinstance(config.get_parsed_content("network"), SparseUNet)
        return
    for_both = first.endswith("_inference") != second.endswith("_inference")
    kind, words = (KeyError, "query key") if for_both else (RuntimeError, "Failed to")
    if for_both and "sparse_unet" in (first, second):  # it replaces a network, which both kinds of file have
        kind, words = RuntimeError, "Failed to"
    with pytest.raises(kind, match=words) as caught:
        started(first, second)
    cause = str(first_cause(caught.value))
    named = any(f"overlay {name}" in cause for name in (first, second))
    assert kind is KeyError or "\n" not in cause
    assert kind is KeyError or named or re.search(r"\(\w+\) is not run in parts", cause), cause


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_memeff_run_takes_or_refuses_a_pair(first: str, second: str) -> None:
    """It takes an overlay's variant for inference, whichever is named."""
    if first.removesuffix("_inference") == second.removesuffix("_inference"):
        Bundle(STOCK, (first, second))
        return
    with pytest.raises(InputError, match=f"{first}_inference|{second}_inference|{first}|{second}") as caught:
        Bundle(STOCK, (first, second))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bundle", ["cranial_cavity_clstm", "organ_occupancy", "skull_completion_sparse"])
def test_a_shipped_network_of_our_own_is_not_run_in_parts(bundle: str, tmp_path: Path) -> None:
    base = ROOT / "bundles" / bundle / "configs" / "inference.json"
    with pytest.raises(InputError, match=r"halo_inference\.json .*runs the network in parts, and \w+ is not"):
        merge_bundle_configs([base, overlay_path("halo_inference")])
    mine = tmp_path / "mine.json"  # a file of somebody's own, as the how-to writes it
    mine.write_text(json.dumps({"inferer": {"_target_": "monai_memeff.halo.SpatialPartitionInferer"}}))
    with pytest.raises(InputError, match=r"mine\.json and inference\.json exclude each other"):
        merge_bundle_configs([base, mine])
