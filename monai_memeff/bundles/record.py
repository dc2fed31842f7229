"""WeightsRecord: the settings that weights were trained with, kept beside them and checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_memeff.errors import InputError


class WeightsRecord:
    """Keep a training's settings beside its weights, and refuse the weights under other settings.

    A network answers on any grid, also on one whose cells have another size than those it learned from, and then it is
    wrong without a word. ``model.json`` beside ``model.pt`` names the settings, and the weights they belong to by their
    SHA-256; about weights of another hash it says nothing, so files that came from elsewhere are taken as they are.

    Args:
        weights: the file of the weights.
        settings: what must be the same, by the names of the options that set it; what JSON can hold.

    Raises:
        SystemExit: settings that JSON cannot hold, such as NaN; with one line.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "model.pt").write_bytes(b"weights")
        ...     WeightsRecord(f"{folder}/model.pt", {"grid": 64}).write()  # or attach(engine), behind what saves them
        ...     WeightsRecord(f"{folder}/model.pt", {"grid": 64}).check()  # before they are loaded
    """

    def __init__(self, weights: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.weights = Path(weights)
        try:  # as they come back from the file: a tuple is a list there
            self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise SystemExit(f"no record can keep {dict(settings)}: {error}; give finite numbers and words") from None

    def attach(self, engine: Any) -> None:
        """Write the record whenever a run of an ignite engine is complete and has changed the weights.

        Raises:
            SystemExit: what lies in the place of the record is none; now, and not after the training.
        """
        from ignite.engine import Events

        self._recorded()
        engine.add_event_handler(Events.COMPLETED, self.write)

    def write(self) -> None:
        """Write the record of the weights as they are now; where there are none, nothing."""
        if not self.weights.is_file() or self._recorded() is not None:
            return
        found = {"sha256": _sha256(self.weights), "settings": self.settings}
        file = _record_of(self.weights)
        work = file.with_suffix(".json.part")
        work.write_text(json.dumps(found, indent=4) + "\n", encoding="utf-8")
        os.replace(work, file)

    def check(self) -> None:
        """End the program where the weights were trained with other settings.

        Raises:
            SystemExit: they were, or the record is damaged; with one line that names both, or the file.
        """
        recorded = self._recorded() or {}
        other = {name: value for name, value in self.settings.items() if recorded.get(name, value) != value}
        if other:
            raise SystemExit(
                f"{self.weights} was trained with {_options(recorded, other)}, got {_options(self.settings, other)}; "
                "give what it was trained with, or train with the settings you want"
            )

    def _recorded(self) -> dict[str, Any] | None:
        try:
            return recorded_settings(self.weights)
        except InputError as error:
            raise SystemExit(str(error)) from None


def recorded_settings(weights: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings of these very weights, or None where nothing is known of them: no record, or another file's.

    Args:
        weights: the file of the weights; the record lies beside it.

    Raises:
        InputError: what lies in the place of the record is none.
    """
    weights = Path(weights)
    file = _record_of(weights)
    if not file.is_file() or not weights.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    said, settings = (found.get(key) for key in ("sha256", "settings")) if isinstance(found, dict) else (None, None)
    if not isinstance(said, str) or not isinstance(settings, dict):
        raise InputError(
            f"{file} must be the record of {weights.name}, a JSON object with sha256 (a text) and settings (an object),"
            " and is not: bring the one of the training, or move it away where you know the settings"
        )
    return settings if said.lower() == _sha256(weights) else None


def _record_of(weights: Path) -> Path:
    return weights.with_suffix(".json")


def _options(values: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {values[name]!r}" for name in names)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
