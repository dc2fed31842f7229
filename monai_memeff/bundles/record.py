"""WeightsRecord: the settings that weights were trained with, kept beside them and checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WeightsRecord:
    """Keep a training's settings beside its weights, and refuse the weights under other settings.

    A network answers on any grid, also on one whose cells have another size than those it learned from, and then it is
    wrong without a word. ``model.json`` beside ``model.pt`` names the settings, and the weights they belong to by their
    SHA-256; about weights of another hash it says nothing, so files that came from elsewhere are taken as they are.

    Args:
        weights: the file of the weights.
        settings: what must be the same, by the names of the options that set it.

    Example::

        record = WeightsRecord("models/model.pt", {"grid": 64, "cell_mm": 4.0})
        record.attach(evaluator)  # after the handler that saves the weights
        record.check()            # before they are loaded
    """

    def __init__(self, weights: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.weights = Path(weights)
        self.settings = dict(settings)

    def attach(self, engine: Any) -> None:
        """Write the record whenever a run of an ignite engine is complete and has changed the weights."""
        from ignite.engine import Events

        engine.add_event_handler(Events.COMPLETED, self.write)

    def write(self) -> None:
        """Write the record of the weights as they are now; where there are none, nothing."""
        if not self.weights.is_file() or self._recorded() is not None:
            return
        found = {"sha256": _sha256(self.weights), "settings": self.settings}
        work = self._file.with_suffix(".json.part")
        work.write_text(json.dumps(found, indent=4) + "\n", encoding="utf-8")
        os.replace(work, self._file)

    def check(self) -> None:
        """End the program where the weights were trained with other settings.

        Raises:
            SystemExit: they were; with one line that names both.
        """
        recorded = self._recorded() or {}
        other = {name: value for name, value in self.settings.items() if recorded.get(name, value) != value}
        if other:
            raise SystemExit(
                f"{self.weights} was trained with {_options(recorded, other)}, got {_options(self.settings, other)}; "
                "give what it was trained with, or train with the settings you want"
            )

    @property
    def _file(self) -> Path:
        return self.weights.with_suffix(".json")

    def _recorded(self) -> dict[str, Any] | None:
        """The settings of these very weights, or None where nothing is known of them."""
        if not self._file.is_file() or not self.weights.is_file():
            return None
        found = json.loads(self._file.read_text(encoding="utf-8"))
        return dict(found["settings"]) if found["sha256"] == _sha256(self.weights) else None


def _options(values: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {values[name]}" for name in names)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
