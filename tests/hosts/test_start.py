"""Overlays given to MONAI's bundle command: without effect, or beside a foreign checkpoint, nothing starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from monai_memeff.clstm import CLSTMUNet
from monai_memeff.overlays import overlay_names, overlay_path
from tests.bundles.conftest import command, run_here
from tests.bundles.test_overlays import parser

REPLACED: dict[str, dict[str, Any]] = {
    "network": {"network": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}},
    "inferer": {"inferer": {"_target_": "SimpleInferer"}},
    "validate inferer": {"validate#inferer": {"_target_": "SimpleInferer"}},
    "loss": {"train#trainer#loss_function": "@loss"},
}
VOID = [
    *((name, "network") for name in overlay_names() if not name.startswith("halo")),
    *((name, "inferer") for name in overlay_names() if name.endswith("_inference")),
    *((name, "validate inferer") for name in ("clstm", "occupancy")),
    ("occupancy", "loss"),
]


def base_of(stock: Path, name: str) -> Path:
    return stock / "configs" / ("inference.json" if name.endswith("_inference") else "train.json")


def first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@pytest.mark.parametrize(("name", "part"), VOID)
def test_a_later_file_that_replaces_what_an_overlay_sets(
    name: str,
    part: str,
    stock: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "later.json").write_text(json.dumps(REPLACED[part]))
    config = parser(base_of(stock, name), overlay_path(name), tmp_path / "later.json")
    config["device"] = "cpu"
    if part != "network":
        config["network_def#channels"] = [4, 8]
        config["network_def#strides"] = [2]
    (step,) = [number for number, step in enumerate(config["initialize"]) if "require_in_use" in str(step)]
    with pytest.raises(RuntimeError) as caught:
        config.get_parsed_content(f"initialize#{step}")
    assert f"the overlay {name} has no effect" in str(first_cause(caught.value))


@pytest.mark.parametrize("name", ["clstm", "occupancy", "sparse_unet"])
def test_a_training_that_seeds_later_starts_from_the_same_weights_every_time(name: str, stock: Path) -> None:
    """The overlay's checks make the network, which a bundle that seeds in its `run` makes after that."""
    found = []
    for _ in range(2):
        set_determinism(None)
        torch.seed()
        config = parser(base_of(stock, name), overlay_path(name))
        config["initialize#0"] = None  # the bundle's own seed
        config["device"] = "cpu"
        config["network_def#channels"], config["network_def#strides"] = [4, 8], [2]
        for step in range(len(config["initialize"])):
            config.get_parsed_content(f"initialize#{step}")
        found.append(config.get_parsed_content("network_def").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


@pytest.mark.parametrize("name", overlay_names())
def test_an_overlay_before_the_bundles_file_is_an_error(name: str, stock: Path) -> None:
    with pytest.raises(KeyError, match="query key"):
        ConfigParser.load_config_files([str(overlay_path(name)), str(base_of(stock, name))])


@pytest.mark.parametrize("name", ["clstm_inference", "occupancy_inference", "sparse_unet_inference"])
def test_a_foreign_checkpoint_ends_the_run(name: str, stock: Path, organ_data: Path, tmp_path: Path) -> None:
    """With ``strict`` off as on; the bundle's own loader, and MONAI's of another bundle."""
    (stock / "models").mkdir(exist_ok=True)
    torch.save(torch.nn.Conv3d(1, 2, 1).state_dict(), stock / "models" / "model.pt")
    folders = {"bundle_root": str(stock), "dataset_dir": str(organ_data), "output_dir": str(tmp_path)}
    small = {"network_def#channels": [4, 8]} | ({"network_def#strides": [2]} if "sparse" in name else {})
    for options in ({}, {"checkpointloader#strict": False}, {"checkpointloader#strict_shape": False}):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            run_here([base_of(stock, name), overlay_path(name)], "infer", **folders, **small, **options)
        assert "the checkpoint is not of the" in str(first_cause(caught.value))
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_the_command_ends_with_the_reason(stock: Path, organ_data: Path, tmp_path: Path) -> None:
    (stock / "models").mkdir(exist_ok=True)
    network = CLSTMUNet(out_channels=3, channels=(4, 8), hidden_channels=2)
    torch.save(network.state_dict(), stock / "models" / "model.pt")
    files = f"['configs/inference.json', '{overlay_path('clstm_inference')}']"
    folders = ["--dataset_dir", str(organ_data), "--output_dir", str(tmp_path)]
    run = command(stock, "run", "--config_file", files, *folders, "--network_def#channels", "[4, 8]")
    assert run.returncode != 0
    assert "the checkpoint is not of the CLSTMUNet of the overlay clstm_inference" in run.stderr
    assert not list(tmp_path.rglob("*.nii.gz"))


@pytest.mark.parametrize("name", overlay_names())
def test_an_overlay_runs_under_any_run_id(name: str, stock: Path, tmp_path: Path) -> None:
    """A bundle that is run by another name than ``run`` has no ``run`` afterwards, which would train nothing."""
    config = json.loads(base_of(stock, name).read_text())
    config["training"] = config.pop("run")
    (tmp_path / "base.json").write_text(json.dumps(config))
    both = ConfigParser.load_config_files([str(tmp_path / "base.json"), str(overlay_path(name))])
    assert "run" not in both
    assert both["training"] == config["training"]
