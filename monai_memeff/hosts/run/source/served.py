"""A configuration whose readers and writers of files are this package's, by the names that MONAI gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from monai_memeff.errors import InputError
from monai_memeff.hosts.layout import SIGNS, components, get

LOADERS = ("LoadImaged", "LoadImageD", "LoadImageDict")
SAVERS = ("SaveImaged", "SaveImageD", "SaveImageDict")
READER = "memeff_reader"
"""Key of the reader in the configuration."""

KEPT = {
    "_target_", "_desc_", "_disabled_", "_mode_", "_requires_", "keys", "reader", "dtype", "meta_keys",
    "meta_key_postfix", "overwriting", "image_only", "ensure_channel_first", "simple_keys",
    "prune_meta_pattern", "prune_meta_sep", "allow_missing_keys", "expanduser",
}  # fmt: skip
READERS = ("ITKReader", "NibabelReader", "PydicomReader", "NrrdReader", "VolumeReader")
HARMLESS = {"affine_lps_to_ras": True, "series_meta": False, "reverse_indexing": False, "as_closest_canonical": False}
"""Arguments of MONAI's readers with the values under which they read what this package reads."""


def serve(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration in which files are read by StudyReader and results are collected instead of saved.

    An image that is read and saved, and that nothing else names, is left out: it is a copy of its own file, such as the
    label of a bundle that was made for data with labels.

    Raises:
        InputError: a reader or writer does something that cannot be served exactly.
    """
    copy: dict[str, Any] = _served(config, _copies(config))
    copy[READER] = {"_target_": "monai_memeff.hosts.run.source.transforms.StudyReader"}
    return copy


def _copies(config: dict[str, Any]) -> set[str]:
    """Keys that are read and saved, and that nothing else names."""
    found = {place: kind for place, kind in components(config) if kind in (*LOADERS, *SAVERS)}
    keys = {place: _keys(get(config, place)) for place in found}
    read = {key for place, kind in found.items() if kind in LOADERS for key in keys[place]}
    saved = {key for place, kind in found.items() if kind in SAVERS for key in keys[place]}
    elsewhere = list(_strings(config))
    return {key for key in (read & saved) - {"image"} if not any(_names(text, key) for text in elsewhere)}


def _keys(transform: dict[str, Any]) -> list[str]:
    keys = transform.get("keys")
    return [key for key in (keys if isinstance(keys, list) else [keys]) if isinstance(key, str)]


def _names(text: str, key: str) -> bool:
    quoted = (f"'{key}'", f'"{key}"')
    return text == key or (text.startswith(SIGNS) and any(part in text for part in quoted))


def _strings(value: Any) -> Iterator[str]:
    """All strings but those of readers and writers, and of lists of files."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict) and str(value.get("_target_", "")).rpartition(".")[2] not in (*LOADERS, *SAVERS):
        for key, part in value.items():
            if key != "data":
                yield from _strings(part)


def _served(value: Any, copies: set[str]) -> Any:
    if isinstance(value, list):
        parts = [_served(part, copies) for part in value]
        return [part for part, whole in zip(parts, value, strict=True) if part is not None or whole is None]
    if not isinstance(value, dict):
        return value
    kind = str(value.get("_target_", "")).rpartition(".")[2]
    if kind in (*LOADERS, *SAVERS):
        left = [key for key in _keys(value) if key not in copies]
        if left != _keys(value):
            value = {**value, "keys": left}
        if not left and copies:
            return None
        return _loader(value, kind) if kind in LOADERS else _saver(value, kind)
    if "LoadImage" in kind or "SaveImage" in kind:
        raise InputError(
            f"the bundle uses {kind}, and memeff run serves {LOADERS[0]} and {SAVERS[0]}: use MONAI's command"
        )
    return {key: _served(part, copies) for key, part in value.items()}


def _loader(value: dict[str, Any], kind: str) -> dict[str, Any]:
    reader = value.get("reader")
    name = reader.get("_target_", "") if isinstance(reader, dict) else reader
    if name is not None and str(name).rpartition(".")[2].strip("'\"") not in READERS:
        raise InputError(f"the bundle reads by {name}, and memeff run reads volumes ({', '.join(READERS)})")
    extra = {key: part for key, part in value.items() if key not in KEPT}
    extra |= {
        key: part for key, part in (reader.items() if isinstance(reader, dict) else ()) if not key.startswith("_")
    }
    extra = {key: part for key, part in extra.items() if key not in HARMLESS or HARMLESS[key] != part}
    if extra:
        raise InputError(
            f"the bundle's {kind} sets {', '.join(extra)}, which decides how files are read: use MONAI's command"
        )
    return {key: part for key, part in value.items() if key not in HARMLESS} | {"reader": f"@{READER}"}


def _saver(value: dict[str, Any], kind: str) -> dict[str, Any]:
    if value.get("scale") is not None:
        raise InputError(f"the bundle's {kind} scales its results, which are not labels then: use MONAI's command")
    kept: dict[str, Any] = {key: value[key] for key in ("keys", "allow_missing_keys", "_disabled_") if key in value}
    name = value.get("output_postfix", "trans")
    return {"_target_": "monai_memeff.hosts.run.source.transforms.CollectResultd", "name": name, **kept}
