"""Merged files: what MONAI reads from a list of files, or one line that says why an overlay would do nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from monai_memeff import cli
from monai_memeff.errors import InputError
from monai_memeff.hosts import merge_bundle_configs
from monai_memeff.overlays import overlay_names, overlay_path
from tests.bundles.conftest import STOCK, save_nifti

Memeff = Callable[..., tuple[int, str, str]]
STOCK_FILES = {file.stem: file for file in (STOCK / "configs").glob("*.json")}


def base_of(overlay: str) -> Path:
    return STOCK_FILES["inference" if overlay.endswith("_inference") else "train"]


def file_of(name: str) -> Path:
    return STOCK_FILES[name] if name in STOCK_FILES else overlay_path(name)


@pytest.fixture
def memeff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Memeff:
    """`memeff` in this process: exit status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["memeff", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.mark.parametrize("name", overlay_names())
def test_what_monai_reads_from_two_files(name: str, memeff: Memeff, tmp_path: Path) -> None:
    both = [base_of(name), overlay_path(name)]
    assert memeff("merge", *both, "--output", tmp_path / "all.json")[0] == 0
    merged = json.loads((tmp_path / "all.json").read_text())
    assert merged == ConfigParser.load_config_files([str(file) for file in both])
    assert memeff("merge", *both, "--output", tmp_path / "all.yaml")[0] == 0
    assert ConfigParser.load_config_file(str(tmp_path / "all.yaml")) == merged


@pytest.mark.parametrize("name", overlay_names())
def test_an_overlay_without_effect_is_an_error(name: str) -> None:
    base, ours = base_of(name), overlay_path(name)
    other = STOCK_FILES["train" if name.endswith("_inference") else "inference"]
    for order, words in (
        ((ours, base), "come after the bundle's own file"),
        ((ours,), "come after the bundle's own file"),
        ((base, ours, base), f"{base.name} after it replaces"),
        ((other, ours), "which this bundle's files do not have|the files before it have no"),
    ):
        if name == "sparse_unet" and order[0] == other:
            continue  # a network only, which inference can use too
        with pytest.raises(InputError, match=words) as caught:
            merge_bundle_configs(order)
        assert "\n" not in str(caught.value)


def test_a_file_of_the_bundle_that_replaces_what_an_overlay_sets_is_named() -> None:
    with pytest.raises(InputError, match=r"halo\.json has no effect: multi_gpu_train\.json after it replaces"):
        merge_bundle_configs([file_of(name) for name in ("train", "halo", "multi_gpu_train")])


@pytest.mark.parametrize(
    "order",
    [
        ("train", "clstm", "evaluate"),
        ("train", "sparse_unet", "multi_gpu_train"),
        ("train", "multi_gpu_train", "clstm"),
    ],
    ids="-".join,
)
def test_the_bundles_own_further_files_may_follow(order: tuple[str, ...]) -> None:
    files = [file_of(name) for name in order]
    assert merge_bundle_configs(files) == ConfigParser.load_config_files([str(file) for file in files])


def test_numbers_may_be_set_by_a_later_file(tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"network_def#channels": [4, 8], "occupancy_points": 64}))
    merged = merge_bundle_configs([STOCK_FILES["train"], overlay_path("occupancy"), small])
    assert (merged["network_def"]["channels"], merged["occupancy_points"]) == ([4, 8], 64)


BAD: dict[str, tuple[str, Any, str]] = {
    "missing": ("none.json", None, "cannot read|no such"),
    "words": ("words.json", "no configuration", "is not JSON"),
    "list": ("list.json", "[1, 2]", "is a dictionary"),
    "empty": ("empty.json", "", "is not JSON"),
    "binary": ("binary.json", b"\x00\xff\xfe", "is not JSON"),
    "folder": ("folder.json", ..., "cannot read"),
    "text": ("overlay.txt", "{}", r"\.json or \.yaml"),
    "tabs": ("bad.yaml", "a:\n\t- b: [", "is not YAML"),
    "nested key": ("key.json", '{"valdate#inferer": {"_target_": "SimpleInferer"}}', "have no valdate"),
    "typing": ("typing.json", '{"infererr": {"_target_": "SimpleInferer"}}', "infererr.* nothing refers to"),
    "list into words": ("plus.json", '{"+bundle_root": ["x"]}', "adds list to str"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_file_is_one_line_and_status_2(kind: str, memeff: Memeff, tmp_path: Path) -> None:
    name, content, words = BAD[kind]
    file = tmp_path / name
    if content is ...:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = memeff("merge", STOCK_FILES["inference"], file, "--output", tmp_path / "all.json")
    assert (status, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert re.search(words, err)
    assert not (tmp_path / "all.json").exists()


def test_a_bad_output_is_one_line_and_status_2(memeff: Memeff, tmp_path: Path) -> None:
    (tmp_path / "model.json").mkdir()
    for output in (tmp_path / "all.txt", tmp_path / "all", tmp_path / "model.json", STOCK_FILES["inference"]):
        status, _, err = memeff("merge", STOCK_FILES["inference"], "--output", output)
        assert (status, len(err.strip().splitlines())) == (2, 1), err
    status, _, err = memeff("merge", STOCK_FILES["inference"], "--output", tmp_path / "a.json", "--host", "monai")
    assert status == 2
    assert "choose label" in err


# The file that MONAI Label reads


@pytest.mark.parametrize(("name", "kind"), [("clstm", "train"), ("clstm_inference", "inference")])
def test_label_gets_the_name_that_it_reads(name: str, kind: str, memeff: Memeff, tmp_path: Path) -> None:
    words = ("merge", base_of(name), overlay_path(name), "--host", "label", "--output")
    for output in ("bundle", "bundle/configs", f"bundle/configs/{kind}.json"):
        status, out, _ = memeff(*words, tmp_path / output)
        assert status == 0
        assert f"wrote {tmp_path / 'bundle' / 'configs' / kind}.json" in out
        assert "metadata.json: copy" in out
        assert "model.pt, which is not there" in out
        (tmp_path / "bundle" / "configs" / f"{kind}.json").unlink()
    for output in (f"{kind}.json", "bundle/configs/merged.json", "bundle/configs/overlay.yaml"):
        status, _, err = memeff(*words, tmp_path / output)
        assert (status, len(err.strip().splitlines())) == (2, 1)
        assert f"MONAI Label reads configs/{kind}.json" in err


def test_spacing_of_nifti_does_not_stop_at_labels_path(memeff: Memeff, tmp_path: Path) -> None:
    """MONAI's Spacingd takes Label's ``image_path`` for metadata: the merged steps give it all else as it is."""
    base, file = json.loads(STOCK_FILES["inference"].read_text()), tmp_path / "image.nii.gz"
    spacing = {"_target_": "Spacingd", "keys": ["image"], "pixdim": [2.0, 1.5, 3.0]}
    base["preprocessing"]["transforms"] = [
        {"_target_": "LoadImaged", "keys": "image", "image_only": False},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        spacing,
    ]
    (tmp_path / "inference.json").write_text(json.dumps(base))
    save_nifti(file, np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    data = {"image": str(file), "image_path": str(file)}
    words = ("merge", tmp_path / "inference.json", overlay_path("halo_inference"), "--output", tmp_path / "bundle")
    assert memeff(*words, "--host", "label")[0] == 0
    merged = ConfigParser.load_config_file(str(tmp_path / "bundle" / "configs" / "inference.json"))
    steps, plain = (ConfigParser(c).get_parsed_content("preprocessing") for c in (merged, base))
    with pytest.raises(RuntimeError, match="Spacingd"):
        plain(data)
    found, expected = steps(data), plain({"image": str(file)})
    assert (found["image_path"], found["image"].shape) == (str(file), expected["image"].shape)
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(found["image"].affine, expected["image"].affine)
    back, known = steps.inverse({"image": found["image"]}), plain.inverse({"image": expected["image"]})
    assert torch.equal(back["image"], known["image"])


# A bundle with other names


def other_layout(tmp_path: Path) -> Path:
    """The stock bundle, with the trainer and everything that it names at the top level, as some bundles have it."""
    config = json.loads(STOCK_FILES["train"].read_text())
    text = json.dumps(config)
    moves = {"train#trainer": "trainer", "train#handlers": "train_handlers", "validate#evaluator": "evaluator"}
    moves |= {"validate#handlers": "val_handlers", "validate#inferer": "window", "loss": "lossfn"}
    moves |= {"network_def": "model_def", "network": "model", "train#key_metric": "train_metric"}
    for usual, place in moves.items():
        text = text.replace(f'@{usual}"', f'@{place}"').replace(f"@{usual}.", f"@{place}.")
    config = json.loads(text)
    for usual, place in moves.items():
        *above, last = usual.split("#")
        holder = config[above[0]] if above else config
        config[place] = holder.pop(last)
    config["training"] = config.pop("run")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", ["clstm", "occupancy", "sparse_unet", "halo"])
def test_overlays_find_their_places_in_another_layout(name: str, tmp_path: Path) -> None:
    merged = merge_bundle_configs([other_layout(tmp_path), overlay_path(name)])
    assert "run" not in merged
    assert not {"network_def", "loss"} & set(merged)
    assert "trainer" not in merged["train"]
    if name == "halo":
        assert merged["halo_loss"]["loss"] == "@lossfn"
        assert merged["halo_whole"]["network"] == "@model"
        assert merged["trainer"]["loss_function"] == "@halo_loss"
        assert merged["trainer"]["train_handlers"]["handlers"] == "@train_handlers"
        assert merged["evaluator"]["network"] == "@halo_whole"
    else:
        assert merged["model_def"]["_target_"].startswith("monai_memeff.hosts.")
    if name in ("clstm", "occupancy"):
        assert merged["window"]["_target_"].startswith("monai_memeff.")
        assert merged["evaluator"]["inferer"] == "@window"


def test_an_engine_that_uses_another_inferer_is_seen(tmp_path: Path) -> None:
    config = json.loads(STOCK_FILES["inference"].read_text())
    config["run"] = ["$@own.run()"]
    config["own"] = {**config["evaluator"], "_target_": "SupervisedEvaluator", "inferer": {"_target_": "SimpleInferer"}}
    path = tmp_path / "inference.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"halo_inference\.json has no effect: .* does not use its inferer"):
        merge_bundle_configs([path, overlay_path("halo_inference")])
