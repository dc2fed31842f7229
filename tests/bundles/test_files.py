"""The files of every bundle: configurations only, every class by its full name, metadata by MONAI's schema."""

from __future__ import annotations

import json
import pydoc
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import verify_metadata

from tests.bundles.conftest import ROOT

BUNDLES = sorted(folder for folder in (ROOT / "bundles").iterdir() if folder.is_dir())
SCHEMA = ROOT / "tests" / "data" / "meta_schema_20240725.json"
"""Beside the tests: MONAI takes the file that is there and downloads nothing."""

every_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda folder: folder.name)


def targets(node: Any) -> Iterator[str]:
    """Every ``_target_`` of a configuration."""
    if isinstance(node, dict):
        yield from [node["_target_"]] if "_target_" in node else []
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from targets(child)


def test_there_are_bundles() -> None:
    assert len(BUNDLES) >= 5


@every_bundle
def test_configurations_only(bundle: Path) -> None:
    assert not list(bundle.rglob("*.py"))
    assert (bundle / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (bundle / "docs" / "README.md").read_text()
    assert {"train.json", "inference.json", "metadata.json"} <= {path.name for path in (bundle / "configs").iterdir()}


@every_bundle
def test_targets_are_full_paths(bundle: Path) -> None:
    """They need no import before them, and no other package's class of the same name is in their way."""
    for path in (bundle / "configs").glob("*.json"):
        names = set(targets(json.loads(path.read_text())))
        assert names or path.stem in ("metadata", "statistics")
        assert not [name for name in names if "." not in name or pydoc.locate(name) is None], path.name


def expressions(node: Any) -> Iterator[str]:
    """Every string of a configuration that MONAI evaluates."""
    if isinstance(node, str) and node.startswith("$"):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from expressions(child)


@every_bundle
def test_our_targets_are_public(bundle: Path) -> None:
    """A module inside the package may move; what a subpackage exports stays."""
    for path in (bundle / "configs").glob("*.json"):
        for target in targets(json.loads(path.read_text())):
            module, _, name = target.rpartition(".")
            if module.startswith("monai_memeff"):
                found = import_module(module)
                assert hasattr(found, "__path__"), target
                assert name in found.__all__, target


@every_bundle
def test_expressions_are_short_and_raise_nothing(bundle: Path) -> None:
    for path in (bundle / "configs").glob("*.json"):
        for expression in expressions(json.loads(path.read_text())):
            assert len(expression) <= 92, expression
            assert not re.search(r"throw|sys\.exit|raise ", expression), expression


@every_bundle
def test_metadata(bundle: Path, tmp_path: Path) -> None:
    file = bundle / "configs" / "metadata.json"
    verify_metadata(meta_file=str(file), filepath=str(SCHEMA))
    metadata = json.loads(file.read_text())
    assert metadata["version"] in metadata["changelog"]
    assert "monai-memeff" in metadata["required_packages_version"]
    del metadata["required_packages_version"]
    broken = tmp_path / "metadata.json"
    broken.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="required_packages_version"):
        verify_metadata(meta_file=str(broken), filepath=str(SCHEMA))
