"""Where a network comes from: a bundle's configuration, an nnU-Net plan, or a class or function by its dotted name."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai_memeff.errors import InputError
from monai_memeff.hosts.estimate.bundle import bundle_source, config_in
from monai_memeff.hosts.estimate.origin import Source, network_of
from monai_memeff.hosts.estimate.plans import is_plans, plans_source
from monai_memeff.hosts.merge import read

DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+)*[.:][A-Za-z_]\w*")


def find_source(
    given: str, overlays: Sequence[Path], configuration: str | None, arguments: str | None, training: bool
) -> Source:
    """What ``memeff estimate`` was given.

    Args:
        given: Folder of a bundle, a configuration or plan, or ``package.Class`` or ``module:function``.
        overlays: Files to be merged into a bundle's configuration.
        configuration: Name of a plan's configuration.
        arguments: keyword arguments of the class or function, as JSON.
        training: whether a bundle's training configuration is meant.

    Raises:
        InputError: nothing of these, or an option that does not belong to it.
    """
    path = Path(given)
    file = config_in(path, training) if path.is_dir() else path
    if file.is_file():
        content = read(file)
        _refuse(arguments is not None, "--arguments is for a class or function, and this is a file")
        if is_plans(content):
            _refuse(bool(overlays), "--overlay is for bundles, and this is an nnU-Net plan")
            return plans_source(file, content, configuration, training)
        _refuse(configuration is not None, "--configuration is for nnU-Net plans, and this is none")
        return bundle_source(file, overlays)
    if path.suffix in (".json", ".yaml", ".yml") or os.sep in given:
        raise InputError(f"there is no {given}: give a bundle, its configuration, an nnU-Net plan or package.Class")
    _refuse(bool(overlays) or configuration is not None, "--overlay and --configuration belong to files")
    return _dotted(given, arguments)


def _refuse(wrong: bool, text: str) -> None:
    if wrong:
        raise InputError(text)


def _dotted(given: str, arguments: str | None) -> Source:
    if not DOTTED.fullmatch(given):
        raise InputError(
            f"{given!r} is neither a file nor a dotted name: give a configuration, a plan or package.Class"
        )
    module, _, last = given.rpartition(":") if ":" in given else given.rpartition(".")
    keywords = _keywords(arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a module of the user's own, as `python -m` finds it
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{given}: there is no module {error.name}") from None
    if not hasattr(found, last):
        raise InputError(f"{given}: the module {module} has no {last}")
    return Source(given, network_of(given, lambda: getattr(found, last)(**keywords)), "dotted")


def _keywords(arguments: str | None) -> dict[str, Any]:
    try:
        keywords = json.loads(arguments or "{}")
    except ValueError as error:
        raise InputError(f"--arguments is a JSON dictionary, such as '{{\"in_channels\": 1}}': {error}") from None
    if not isinstance(keywords, dict):
        raise InputError(f"--arguments is a JSON dictionary, got {arguments}")
    return keywords
