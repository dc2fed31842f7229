"""`memeff estimate`: bundles, plans and classes in; a table, JSON and an overlay out that keeps the budget when run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from monai_memeff.clstm import CLSTMUNet
from monai_memeff.errors import InputError
from monai_memeff.halo import SpatialPartitionInferer
from monai_memeff.hosts.estimate import run_estimate
from monai_memeff.hosts.estimate.rules import Facts, verdict
from monai_memeff.hosts.estimate.written import write_overlay
from monai_memeff.hosts.merge import merge_bundle_configs
from monai_memeff.memory import estimate_network, measure_peak
from tests.bundles.conftest import STOCK
from tests.hosts.bundles import small_bundle
from tests.test_cli import run

SHAPE = "1,1,48,32,32"
UNET = json.dumps({"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]})
LABELS = {"background": 0, "liver": 1, "tumor": 2}
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv3d", "kernel_sizes": 3,
        "strides": [1, 2], "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1, "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a small UNet."""
    return small_bundle(tmp_path_factory.mktemp("estimate") / "bundle")


def plans(folder: Path, labels: dict[str, Any] = LABELS, **configuration: Any) -> Path:
    """An nnU-Net plan with one inheriting configuration, and its dataset.json."""
    full = {"batch_size": 2, "patch_size": [16, 24, 16], "architecture": ARCHITECTURE, **configuration}
    configurations = {"3d_fullres": full, "3d_large": {"inherits_from": "3d_fullres", "patch_size": [24, 24, 16]}}
    (folder / "plans.json").write_text(json.dumps({"plans_name": "nnUNetPlans", "configurations": configurations}))
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}, "labels": labels}))
    return folder / "plans.json"


def rows(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the JSON by system."""
    return {row["system"]: row for row in data["systems"]}


@pytest.mark.slow
def test_the_overlay_of_a_budget_keeps_it(bundle: Path, tmp_path: Path) -> None:
    whole = run_estimate(str(bundle), SHAPE, overlays=["halo_inference"], device="cpu")[1]
    dense = rows(whole)["dense"]
    for number, budget in enumerate((2 * dense["total_bytes"], int(0.8 * dense["total_bytes"]))):
        target = tmp_path / f"{number}.json"
        lines, data = run_estimate(str(bundle), SHAPE, f"{budget}B", overlays=["halo"], device="cpu", output=target)
        assert lines[-1] == f"wrote {target}"
        assert data["chosen"]["system"] == ("dense", "halo")[number]
        config = merge_bundle_configs([bundle / "configs" / "inference.json", target])
        parser = ConfigParser({**config, "bundle_root": str(bundle), "device": "cpu"})
        network, inferer = parser.get_parsed_content("network_def").eval(), parser.get_parsed_content("inferer")
        assert isinstance(inferer, SpatialPartitionInferer) == (number == 1)
        volume = torch.rand(1, 1, 48, 32, 32)
        with torch.no_grad(), measure_peak() as meter:
            inferer(volume, network)
        weights = sum(t.nbytes for t in network.state_dict().values())
        assert meter.peak_bytes + weights + volume.nbytes <= budget


IMAGE = (1, 1, 64, 56, 40)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose network takes more than the systems that could stand in for it."""
    network = {"channels": [320, 8], "strides": [2], "num_res_units": 0}
    return small_bundle(tmp_path_factory.mktemp("wide") / "bundle", network=network)


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An image that is active in a ball, and its file."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in IMAGE[2:]), indexing="ij")
    values = np.where(sum(a**2 for a in axes) < 0.2, 1.0, 0.0).astype(np.float32)
    file = tmp_path_factory.mktemp("ball") / "ball.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
    return file, torch.from_numpy(values)[None, None]


@pytest.mark.parametrize(
    ("system", "overlay", "shares"),
    [
        ("halo", "halo", (0.7, 0.4, 0.3)),
        ("sparse", "sparse_unet", (1.0, 1.1)),
        ("occupancy", "occupancy", (1.0, 0.6)),
    ],
)
@pytest.mark.long
def test_every_systems_written_overlay_keeps_its_budget(
    system: str, overlay: str, shares: tuple[float, ...], wide: Path, ball: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """The file that the command wrote is merged and run as the host runs it; weights and input are in the budget."""
    file, volume = ball
    given: dict[str, Any] = {"image": file, "overlays": [overlay], "device": "cpu"}
    found = rows(run_estimate(str(wide), ",".join(map(str, IMAGE)), **given)[1])
    most = min(found[system if system != "halo" else "dense"]["total_bytes"], found["dense"]["total_bytes"] - 1)
    settings = []
    for share in shares:
        budget, target = int(share * most), tmp_path / f"{share}.json"
        data = run_estimate(str(wide), ",".join(map(str, IMAGE)), f"{budget}B", output=target, **given)[1]
        assert data["chosen"]["system"] == system
        settings.append(data["chosen"]["setting"])
        config = merge_bundle_configs([wide / "configs" / "inference.json", target])
        if system != "halo":  # weights of a training are not there yet
            config["network_def"]["require_weights"] = False
        parser = ConfigParser({**config, "bundle_root": str(wide), "device": "cpu"})
        network, inferer = parser.get_parsed_content("network_def").eval(), parser.get_parsed_content("inferer")
        with torch.no_grad(), measure_peak() as meter:
            inferer(volume.clone(), network)
        weights = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
        assert meter.peak_bytes + weights <= budget, (share, settings[-1])
    assert all("memory_budget" in setting for setting in settings)


@pytest.mark.long
def test_slabs_of_a_written_overlay_keep_their_budget(tmp_path: Path) -> None:
    """The overlay's own network has 126 MB of weights: a small one takes its place here."""
    network, volume = (
        CLSTMUNet(channels=(8, 16), hidden_channels=4, out_channels=3).eval(),
        torch.rand(1, 1, 24, 20, 36),
    )
    whole = estimate_network(network, tuple(volume.shape), system="clstm")
    slabs = []
    for share in (1.0, 0.75):
        budget = int(share * whole.peak_bytes)
        found = estimate_network(network, tuple(volume.shape), system="clstm", memory_budget=budget)
        file = write_overlay(found, tmp_path / f"{share}.json")
        inferer = ConfigParser({"inferer": json.loads(file.read_text())["inferer"]}).get_parsed_content("inferer")
        with torch.no_grad(), measure_peak() as meter:
            inferer(volume, network)
        assert meter.peak_bytes <= budget
        slabs.append(inferer.slab)
    assert len(set(slabs)) > 1
    with pytest.raises(InputError, match="1 slices at a time or a few take") as refused:
        estimate_network(network, tuple(volume.shape), system="clstm", memory_budget=100_000)
    least = int(re.search(r"take (\d+): raise", str(refused.value))[1])  # type: ignore[index]
    found = estimate_network(network, tuple(volume.shape), system="clstm", memory_budget=least)
    found.inferer(volume, network)


@pytest.mark.slow
def test_a_bundles_training_is_estimated_with_its_own_loss_and_optimizer() -> None:
    data = run_estimate(str(STOCK), "1,1,32,32,32", training=True, overlays=["sparse_unet"], device="cpu")[1]
    dense = rows(data)["dense"]
    assert dense["basis"] == "a dry run of every operation"
    assert dense["gradient_bytes"] > 0
    assert data["loss"].startswith("the bundle's")
    assert not dense["notes"]
    assert rows(data)["sparse"]["network"] == "SparseUNet"


@pytest.mark.slow
def test_a_plan_is_built_by_the_class_that_it_names(tmp_path: Path) -> None:
    file = plans(tmp_path)
    lines, data = run_estimate(str(file), overlays=["halo"], budget="1GB", device="cpu", training=True)
    assert data["shape"] == [2, 2, 16, 24, 16]
    assert rows(data)["dense"]["output_shape"] == (2, 3, 16, 24, 16)
    assert rows(data)["dense"]["optimizer_bytes"] == rows(data)["dense"]["gradient_bytes"]
    assert lines[-1].startswith("nnU-Net runs it so")
    larger = run_estimate(str(file), configuration="3d_large", overlays=["halo"], device="cpu")[1]
    assert larger["shape"] == [1, 2, 24, 24, 16]
    regions = plans(tmp_path, {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    assert rows(run_estimate(str(regions), overlays=["halo"], device="cpu")[1])["dense"]["output_shape"][1] == 2


@pytest.mark.slow
def test_the_active_voxels_of_an_image_count(tmp_path: Path) -> None:
    values = np.full((40, 30, 20), -1000, dtype=np.int16)
    values[10:20, 10:20, 5:15] = 200
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "ct.nii.gz")
    with pytest.raises(InputError, match="say with --threshold"):
        run_estimate("monai.networks.nets.UNet", SHAPE, image=tmp_path / "ct.nii.gz", arguments=UNET)
    data = run_estimate(
        "monai.networks.nets:UNet", SHAPE, image=tmp_path / "ct.nii.gz", threshold=0.0, arguments=UNET, device="cpu",
        overlays=["sparse_unet"],
    )[1]  # fmt: skip
    assert data["active_share"] == pytest.approx(1000 / 24000)
    found = rows(data)["sparse"]
    assert found["suits"] is True
    assert found["peak_bytes"] < rows(data)["dense"]["peak_bytes"]
    assert 0 < found["relative_time"] < 0.5


@pytest.mark.parametrize(
    ("system", "facts", "suits"),
    [
        ("sparse", Facts(False, 0.1, 2, ("batch",), 1), True),
        ("sparse", Facts(False, 0.6, 2, ("batch",), 1), False),
        ("sparse", Facts(False, 0.2, 2, ("batch",), 2), False),
        ("sparse", Facts(False, 0.05, 2, ("batch",), 2), True),
        ("sparse", Facts(False, None, 2, ("batch",), 1), None),
        ("occupancy", Facts(False, None, 3, (), 1), True),
        ("occupancy", Facts(False, None, 105, (), 1), False),
        ("occupancy", Facts(False, None, None, (), 1), None),
        ("halo", Facts(False, None, 2, ("instance",), 1), True),
        ("halo", Facts(True, None, 2, ("instance",), 1), False),
        ("clstm", Facts(True, None, 105, (), 4), True),
    ],
)
def test_the_rules_say_what_suits(system: str, facts: Facts, suits: bool | None) -> None:
    found = verdict(system, facts)
    assert found.suits is suits
    assert found.why


@pytest.mark.slow
def test_json_is_one_object(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("estimate", bundle, "--shape", "1,1,16,16,16", "--overlay", "halo_inference", "--json", "--device", "cpu")
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, err) == (0, "")
    assert list(rows(json.loads(out))) == ["dense", "halo"]


class NotSquare(nn.Module):
    """Needs a number that nobody gives."""

    def __init__(self, number: int) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("BUNDLE",), "--shape is needed"),
        (("BUNDLE", "--shape", "1,1"), "--shape is batch"),
        (("BUNDLE", "--shape", "1,1,a,8,8"), "--shape is batch"),
        (("BUNDLE", "--shape", "1,1,99999999999,8,8"), "--shape is batch"),
        (("BUNDLE", "--shape", "1,2,16,16,16"), "does not take an input"),
        (("BUNDLE", "--shape", SHAPE, "--budget", "1KiB"), "nothing fits 1 KiB"),
        (("BUNDLE", "--shape", SHAPE, "--budget", "8GBi"), "a size is a number with a unit"),
        (("BUNDLE", "--shape", SHAPE, "--budget", "-3"), "a size is a number with a unit"),
        (("BUNDLE", "--shape", SHAPE, "--output", "x.json"), "give --budget too"),
        (("BUNDLE", "--shape", SHAPE, "--overlay", "warp"), "no overlay is called 'warp'"),
        (("BUNDLE", "--shape", SHAPE, "--overlay", "absent.json"), "absent.json"),
        (("BUNDLE", "--shape", SHAPE, "--device", "tpu"), "--device is cpu or cuda"),
        (("BUNDLE", "--shape", SHAPE, "--image", "absent.nii.gz"), "absent.nii.gz"),
        (("BUNDLE", "--shape", SHAPE, "--configuration", "2d"), "is for nnU-Net plans"),
        (("BUNDLE", "--shape", SHAPE, "--arguments", "{}"), "is for a class or function"),
        (("BUNDLE/configs/metadata.json", "--shape", SHAPE), "no network_def"),
        (("BUNDLE/absent.json", "--shape", SHAPE), "there is no"),
        (("PLANS", "--configuration", "4d"), "choose 3d_fullres, 3d_large"),
        (("PLANS", "--overlay", "x.json"), "--overlay is for bundles"),
        (("torch.nn.Conv9d", "--shape", SHAPE), "has no Conv9d"),
        (("nowhere.to.be.Found", "--shape", SHAPE), "there is no module nowhere"),
        (("tests.hosts.test_estimate:NotSquare", "--shape", SHAPE), "cannot be made: TypeError"),
        (("tests.hosts.test_estimate:NotSquare", "--shape", SHAPE, "--arguments", "[1]"), "is a JSON dictionary"),
        (("math:sqrt", "--shape", SHAPE, "--arguments", "{"), "is a JSON dictionary"),
        (("builtins:dict", "--shape", SHAPE), "gives dict, and a network is"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    part: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = plans(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = [word.replace("BUNDLE", str(bundle)).replace("PLANS", str(file)) for word in words]
    status, out, err = run(monkeypatch, capsys, "estimate", *given)
    assert (status, out, len(err.strip().splitlines())) == (2, "", 1)
    assert err.startswith("memeff: ")
    assert part in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "plans.json"]
