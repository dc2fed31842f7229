"""A bundle's configuration with overlays merged, its readers and writers replaced, and nothing instantiated yet."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_memeff.data.json_object import read_json_object
from monai_memeff.errors import InputError
from monai_memeff.hosts.layout import Config, components, get, places, references
from monai_memeff.hosts.merge import merge_bundle_configs
from monai_memeff.hosts.run.source.agree import check_arguments, check_names
from monai_memeff.hosts.run.source.served import LOADERS, serve
from monai_memeff.overlays import overlay_names, overlay_path

DECODER_LOG = "monai.data.nvimgcodec_pydicom_plugin"
"""Where every reader of MONAI's says that a decoder on a GPU is missing, whatever is read."""

NAMES = ("inference.json", "inference.yaml", "inference.yml")
KNOWN_STEPS = (
    r"^\$monai\.utils\.set_determinism\(", r"^\$setattr\(torch\.backends\.cudnn,", r"^\$torch\.backends\.cudnn\.",
    r"^\$import ", r"^\$@(evaluator|validate#evaluator)\.run\(\)$", r"^\$None$",
)  # fmt: skip
"""Steps of ``initialize`` that do not decide what the labels are, besides those that load checkpoints."""


class Bundle:
    """The files of a bundle, and what they say.

    Args:
        folder: Folder of the bundle: ``configs/inference.json`` or ``.yaml``, ``configs/metadata.json``.
        overlays: names of overlays of this package, or files, to be merged in this order.

    Attributes:
        config: the merged configuration.
        metadata: the bundle's.
        parser: MONAI's, of the merged configuration.

    Raises:
        InputError: a file is missing or wrong, an overlay has no effect, or the bundle does something at its start or
            its end that this command does not know.
    """

    def __init__(self, folder: Path, overlays: Sequence[str] = ()) -> None:
        self.folder = folder.absolute()
        base = next(
            (self.folder / "configs" / name for name in NAMES if (self.folder / "configs" / name).is_file()), None
        )
        if base is None:
            raise InputError(f"{folder} is not a bundle for inference: it has no configs/{NAMES[0]}, nor .yaml")
        metadata = self.folder / "configs" / "metadata.json"
        absent = f"a bundle has a configs/metadata.json, which says what its labels are: {metadata} is absent"
        self.metadata = read_json_object(metadata, absent)
        merged = merge_bundle_configs([base, *(_overlay(name) for name in overlays)])
        self.digest = hashlib.sha256(
            json.dumps([merged, self.metadata], sort_keys=True, default=str).encode()
        ).hexdigest()
        self.evaluator = places(merged).get("evaluator", "evaluator")
        self._check_engine(merged)
        check_names(merged, self.metadata, self.folder)
        self.config: Config = serve(merged)
        self.config["bundle_root"] = str(self.folder)
        if str(self.folder) not in sys.path:
            sys.path.insert(0, str(self.folder))  # bundles import their own `scripts`
        self.parser = ConfigParser(config=self.config)
        logging.getLogger(DECODER_LOG).setLevel(logging.ERROR)

    @property
    def name(self) -> str:
        """As the metadata says, or the folder's."""
        return str(self.metadata.get("name") or self.folder.name)

    @property
    def version(self) -> str:
        """As the metadata says."""
        return str(self.metadata.get("version") or "unknown")

    def part(self, argument: str) -> str | None:
        """Place of what the evaluator gets as an argument, or of the same name at the top; None if there is none."""
        for place in (f"{self.evaluator}#{argument}", argument):
            if get(self.config, place) is not None:
                return place
        return None

    @property
    def preprocessing(self) -> str:
        """Place of the transforms before the network."""
        place = next((p for p in ("dataset#transform", "preprocessing") if get(self.config, p) is not None), None)
        if place is None:
            raise InputError(f"{self.folder} has no preprocessing: its inference configuration is not a usual one")
        return place

    def parse(self, place: str, default: Any = None) -> Any:
        """What stands at a place, instantiated; the default where nothing does.

        Raises:
            InputError: it cannot be made.
        """
        if get(self.config, place) is None:
            return default
        try:
            return self.parser.get_parsed_content(place)
        except SystemExit as stopped:  # an option out of range
            raise InputError(str(stopped)) from None
        except Exception as error:  # of the bundle's own code, of any kind
            raise InputError(f"the bundle's {place} cannot be made: {first_cause(error)}") from error

    def image_keys(self) -> list[str]:
        """Keys of the images that the preprocessing reads."""
        reached = self.reached([self.preprocessing])
        loaders = [
            place for place, kind in components(self.config) if kind in LOADERS and self._is_used(place, reached)
        ]
        found: list[str] = []
        for place in loaders:
            keys = self.parse(f"{place}#keys")
            if not self.parse(f"{place}#_disabled_", False) and not self.parse(f"{place}#allow_missing_keys", False):
                found += [key for key in ([keys] if isinstance(keys, str) else keys) if key not in found]
        if not found:
            raise InputError(f"the preprocessing of {self.folder} reads no image (LoadImaged)")
        return found

    def image_names(self) -> list[str]:
        """Names of the images of one study: keys where there are several, else the metadata's channels."""
        keys = self.image_keys()
        inputs: dict[str, Any] = self.metadata.get("network_data_format", {}).get("inputs", {})
        said = inputs[keys[0]] if keys[0] in inputs else next(iter(inputs.values()), None)
        channels: dict[str, Any] = (said or {}).get("channel_def") or {}
        return keys if len(keys) > 1 else [str(name) for name in channels.values()] or keys

    def reached(self, starts: Sequence[str]) -> set[str]:
        """Places that these places refer to, over any number of steps, themselves included."""
        waiting, seen = list(starts), set()
        while waiting:
            place = waiting.pop()
            if place not in seen:
                seen.add(place)
                waiting += references(get(self.config, place))
        return seen

    def check_records(self) -> None:
        """What a bundle of this package does at its start: weights that were trained with other settings are refused.

        Raises:
            InputError: the settings differ.
        """
        for place in self._records(self.config):
            try:
                self.parse(place).check()
            except SystemExit as stopped:
                raise InputError(str(stopped)) from None

    @staticmethod
    def _records(config: Config) -> list[str]:
        return [place for place, word in components(config) if word == "WeightsRecord"]

    def _is_used(self, place: str, reached: set[str]) -> bool:
        return any(place == other or place.startswith(f"{other}#") for other in reached)

    def _check_engine(self, merged: Config) -> None:
        engine = get(merged, self.evaluator)
        kind = str(engine.get("_target_", "")).rpartition(".")[2] if isinstance(engine, dict) else ""
        if kind not in ("", "SupervisedEvaluator"):
            raise InputError(
                f"{self.folder} runs a {kind}, and memeff run knows SupervisedEvaluator: use MONAI's command"
            )
        if isinstance(engine, dict):
            check_arguments(engine, self.folder)
        if isinstance(engine, dict) and engine.get("decollate", True) is not True:
            raise InputError(f"the evaluator of {self.folder} keeps batches together (decollate): use MONAI's command")
        loaders = {place for place, word in components(merged) if word == "CheckpointLoader"}
        loaders |= {f"{place}.check" for place in self._records(merged)}
        for name in ("initialize", "finalize"):
            steps = merged.get(name) or []
            for step in steps if isinstance(steps, list) else [steps]:
                if not _is_known(step, loaders):
                    raise InputError(
                        f"the {name} of {self.folder} has the step {step!s:.80}, which memeff run does not know"
                    )


def first_cause(error: BaseException) -> str:
    """What began a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _is_known(step: Any, loaders: set[str]) -> bool:
    if isinstance(step, dict):
        return str(step.get("_target_", "")).startswith(
            ("monai_memeff.bundles.", "monai_memeff.hosts.", "monai_memeff.halo.")
        )
    if not isinstance(step, str) or any(re.search(pattern, step) for pattern in KNOWN_STEPS):
        return step is None or isinstance(step, str)
    calls = re.findall(r"([@\w.#:]+)\(", step)
    return bool(calls) and all(call.removeprefix("@").replace("::", "#") in loaders for call in calls)


def _overlay(name: str) -> Path:
    """The file of an overlay; its variant for inference where it has one."""
    if name.endswith((".json", ".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(".json")
    return overlay_path(f"{stem}_inference" if f"{stem}_inference" in overlay_names() else stem)
