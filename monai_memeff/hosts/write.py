"""The merged configuration as a file, under the name that a host reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai.bundle import ConfigParser

from monai_memeff.data import atomic_write
from monai_memeff.errors import InputError
from monai_memeff.hosts.layout import Config, get, places
from monai_memeff.hosts.merge import merge_bundle_configs

SUFFIXES = (".json", ".yaml", ".yml")
HOSTS = ("label",)
KEPT_PATH = "path_of_image"


def write_merged(configs: Sequence[Path], output: Path, host: str | None = None) -> list[str]:
    """Merge configurations into one file, and say in lines what was written and what its host reads beside it.

    Args:
        configs: see :func:`~monai_memeff.hosts.merge_bundle_configs`.
        output: the file; for a host its name may be left out, and the bundle's folder given.
        host: ``"label"`` for MONAI Label, which reads ``configs/inference.json`` and ``configs/train.json`` only.

    Raises:
        InputError: a file cannot be merged, the host is unknown, or it would not read a file of that name.
    """
    if host not in (None, *HOSTS):
        raise InputError(f"no host is called {host!r}: choose {', '.join(HOSTS)}, or leave --host out")
    if host is None and output.suffix not in SUFFIXES:
        raise InputError(f"a configuration is .json or .yaml, got {output.name!r}; give --output such a name")
    merged = merge_bundle_configs(configs)
    target = output if host is None else _for_label(merged, output)
    if host is not None:
        _hide_path(merged)
    with atomic_write(target, *configs) as work:
        ConfigParser.export_config_file(merged, str(work), fmt=target.suffix.lstrip("."), indent=2)
    return [f"wrote {target}", *(_beside(target) if host else ())]


def _for_label(merged: Config, output: Path) -> Path:
    """``configs/inference.json`` or ``configs/train.json`` in the folder, or the given file if that is its name."""
    name = "train" if "train#trainer" in places(merged) else "inference"
    if output.suffix not in SUFFIXES:
        folder = output if output.name == "configs" else output / "configs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.json"
    readable = [f"{name}.json", f"{name}.yaml"]
    if output.name not in readable or output.absolute().parent.name != "configs":
        raise InputError(
            f"MONAI Label reads configs/{name}.json of a bundle's folder and would not see {output}: give the folder, "
            f"or a file of that name"
        )
    if output.suffix == ".yaml" and output.with_suffix(".json").exists():
        raise InputError(f"MONAI Label reads {output.with_suffix('.json')} before {output}: write that, or remove it")
    return output


def _hide_path(merged: Config) -> None:
    """Take Label's ``image_path``, a text, out of the data while Spacingd works, and put it back afterwards.

    MONAI 1.6's Spacingd takes all that is called ``image_...`` for metadata of an image from NIfTI, and stops there.
    """
    place = "preprocessing#transforms" if get(merged, "preprocessing#transforms") is not None else "preprocessing"
    steps = get(merged, place)
    for step in list(steps) if isinstance(steps, list) else ():
        keys = step.get("keys", ()) if isinstance(step, dict) else ()
        if "image" not in keys or str(step.get("_target_")).rpartition(".")[2] not in ("Spacingd", "SpacingD"):
            continue
        index = steps.index(step)
        steps[index : index + 1] = [*_renamed("image_path", KEPT_PATH), step, *_renamed(KEPT_PATH, "image_path")]


def _renamed(old: str, new: str) -> list[Config]:
    copy = {"_target_": "CopyItemsd", "keys": old, "times": 1, "names": new, "allow_missing_keys": True}
    return [copy, {"_target_": "DeleteItemsd", "keys": old}]


def _beside(target: Path) -> list[str]:
    """What the host reads beside the configuration and does not find."""
    folder = target.absolute().parent.parent
    lines = []
    if not (folder / "configs" / "metadata.json").is_file():
        lines.append(f"MONAI Label also reads {folder / 'configs' / 'metadata.json'}: copy the bundle's")
    if not (folder / "models" / "model.pt").is_file():
        lines.append(f"MONAI Label loads {folder / 'models' / 'model.pt'}, which is not there")
    if (folder / "models" / "model.ts").is_file():
        lines.append(f"{folder / 'models' / 'model.ts'} may be used instead of this configuration: remove it")
    return lines
