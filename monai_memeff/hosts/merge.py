"""A bundle's configuration and overlays in one file, refused where an overlay would have no effect."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_memeff.errors import InputError
from monai_memeff.hosts.layout import SIGNS, Config, get, is_steps, places, references, split, used
from monai_memeff.hosts.suited import require_suited, require_together

OURS = "monai_memeff."
STEPS = ("imports", "initialize", "run", "finalize")


def merge_bundle_configs(files: Sequence[Path]) -> Config:
    """The configuration that MONAI reads from these files in this order.

    Overlays of this package are written for the usual places (``train#trainer``, ``validate#evaluator``, ``loss``);
    where this bundle's files have them elsewhere, they are put there.

    Args:
        files: the bundle's own file first, then overlays.

    Raises:
        InputError: a file cannot be read, an overlay's place is missing in the files before it, or a later file
            replaces what an overlay of this package sets, or nothing uses it.

    Examples:
        >>> from monai_memeff.bundles import bundle_path
        >>> from monai_memeff.overlays import overlay_path
        >>> bundle = bundle_path("liver_tumor_halo") / "configs" / "inference.json"
        >>> merge_bundle_configs([bundle, overlay_path("halo_inference")])["inferer"]["_target_"]
        'monai_memeff.halo.SpatialPartitionInferer'
    """
    merged: Config = {}
    ours: list[tuple[Path, Config]] = []
    news: list[tuple[Path, list[str]]] = []
    contents: list[tuple[str, Config]] = []
    for file in files:
        content = read(file)
        if _is_ours(content):
            require_suited(file.name, content, merged)
            content = _moved(content, places(merged))
            ours.append((file, content))
        _check_places(file, content, merged)
        news.append((file, [key for key in content if merged and key not in merged and key.isidentifier()]))
        merged = _merge(merged, content)
        contents.append((file.name, content))
        if _is_ours(content):
            _check_references(file, content, merged)
        for overlay, sets in ours:
            _check_kept(overlay, sets, merged, file)
    for file, content in ours:
        _check_used(file, content, merged)
    require_together(contents, merged)
    for file, added in news:
        _check_referred(file, added, merged)
    return merged


def read(file: Path) -> Config:
    """The dictionary in a JSON or YAML file.

    Raises:
        InputError: there is no such file, or no dictionary in it.
    """
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise InputError(f"a configuration is a .json or .yaml file, got {file}")
    try:
        content = ConfigParser.load_config_file(str(file))
    except OSError as error:
        raise InputError(f"cannot read the configuration {file}: {error.strerror or error}") from None
    except Exception as error:  # JSON's and YAML's own, which have no common parent
        raise InputError(f"{file} is not {file.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds {type(content).__name__}, and a configuration is a dictionary")
    return content


def _is_ours(content: Config) -> bool:
    """Whether this is an overlay of this package, also one that was copied and changed: it brings no network along."""
    return OURS in json.dumps(content, default=str) and "bundle_root" not in content


def _check_places(file: Path, content: Config, before: Config) -> None:
    """Every nested key and every ``+key`` of a list must have its place in the files before."""
    known = dict(before)
    for key, value in content.items():
        parts = split(key.lstrip("+"))
        if len(parts) > 1 and not isinstance(get(known, "#".join(parts[:-1])), (dict, list)):
            raise InputError(
                f"{file} sets {key}, and the files before it have no {'#'.join(parts[:-1])}: {_advice(before)}"
            )
        known = _merge(known, {key: value})


def _check_references(file: Path, content: Config, merged: Config) -> None:
    """What an overlay refers to must be there."""
    absent = sorted({name for name in references(content) if get(merged, name) is None and not _nothing(merged, name)})
    if absent:
        raise InputError(f"{file.name} needs {', '.join(absent)}, which this bundle's files do not have")


def _check_referred(file: Path, added: Sequence[str], merged: Config) -> None:
    """A new key that is neither run nor referred to changes nothing: it is misspelt, or made for another bundle."""
    referred = {split(name)[0] for name in references(merged)}
    for key in added:
        if key not in referred and key not in STEPS and not key.startswith("_") and not is_steps(merged[key]):
            raise InputError(f"{file} sets {key}, which the bundle lacks and nothing refers to: check its spelling")


def _nothing(merged: Config, place: str) -> bool:
    """Whether a place is there and holds null."""
    *above, last = split(place)
    parent = get(merged, "#".join(above)) if above else merged
    return isinstance(parent, dict) and last in parent


def _advice(before: Config) -> str:
    return (
        "overlays come after the bundle's own file"
        if not before
        else "is it for another file of the bundle (train.json, inference.json), or for another bundle?"
    )


def _merge(before: Config, content: Config) -> Config:
    """One file more, by MONAI's own rules."""
    parser = ConfigParser(config=json.loads(json.dumps(before)))
    for key, value in content.items():
        if key.startswith("+") and get(parser.get(), key[1:]) is None:
            parser[key[1:]] = value  # MONAI does the same with a warning
        elif key.startswith("+"):
            known = parser[key[1:]]
            if type(known) is not type(value) or not isinstance(value, (dict, list)):
                raise InputError(f"{key} adds {type(value).__name__} to {type(known).__name__} of the files before")
            known.update(value) if isinstance(value, dict) else known.extend(value)
        else:
            parser[key] = value
    merged = dict(parser.get())
    merged.pop(ConfigParser.meta_key, None)
    return merged


def _moved(content: Config, where: dict[str, str]) -> Config:
    """An overlay with the places of this bundle instead of the usual ones, in keys and in references."""
    moves = {usual: place for usual, place in where.items() if usual != place}
    own = {key for key in content if not key.startswith("+") and len(split(key)) == 1} - set(where)
    moves = {usual: place for usual, place in moves.items() if usual not in own}
    if not moves:
        return content
    usual = sorted(moves, key=len, reverse=True)
    names = f"({'|'.join(map(re.escape, usual))})(?!\\w)"
    referred = re.compile(f"(?<=[@%]){names}")

    def move(value: Any) -> Any:
        if isinstance(value, str):
            return referred.sub(lambda m: moves[m[1]], value) if value.startswith(SIGNS) else value
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        return [move(part) for part in value] if isinstance(value, list) else value

    return {re.sub(rf"^(\+?){names}", lambda m: m[1] + moves[m[2]], key): move(v) for key, v in content.items()}


def _check_kept(file: Path, content: Config, merged: Config, later: Path) -> None:
    """Components and references of an overlay must stand after each later file; numbers may be set by these."""
    for key, value in content.items():
        if key.startswith("+"):
            continue
        for place, expected in _structure(key, value):
            if get(merged, place) != expected:
                raise InputError(
                    f"{file.name} has no effect: {later.name} after it replaces its {key}; name {file.name} last, "
                    f"and do not combine overlays that replace the same"
                )


def _structure(place: str, value: Any) -> list[tuple[str, Any]]:
    """Places inside a value whose contents are not parameters: ``_target_`` and references."""
    if isinstance(value, dict):
        return [found for key, part in value.items() for found in _structure(f"{place}#{key}", part)]
    if isinstance(value, list):
        return [found for n, part in enumerate(value) for found in _structure(f"{place}#{n}", part)]
    decides = place.endswith("#_target_") or (isinstance(value, str) and value.startswith(SIGNS))
    return [(place, value)] if decides else []


def _check_used(file: Path, content: Config, merged: Config) -> None:
    """The engine that runs must reach the network and the inferer of an overlay."""
    reached = used(merged)
    for key in content if reached else ():  # files that run nothing are parts of something
        top = "#".join(split(key)[:2]) if split(key)[0] in ("train", "validate") else split(key)[0]
        name = top.rpartition("#")[2]
        if name in ("network_def", "network", "inferer") and top not in reached and not key.startswith("+"):
            if top.startswith("validate") and not any(place.endswith("evaluator") for place in reached):
                continue  # a training without validation
            raise InputError(f"{file.name} has no effect: this bundle's {_engines(reached)} does not use its {top}")


def _engines(reached: set[str]) -> str:
    return " or ".join(sorted(p for p in reached if p.endswith(("trainer", "evaluator")))) or "run"
