"""Where a bundle keeps its trainer, evaluator, network, loss, handlers and inferers, under whatever names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Config = dict[str, Any]

SIGNS = ("@", "$", "%")
"""What a string begins with that is not plain text: a reference, an expression, a macro."""

REFERENCE = re.compile(r"(?<=[@%])[A-Za-z_]\w*(?:(?:#|::)\w+)*")

PARTS = {
    "train#trainer": {
        "loss": "loss_function",
        "train#handlers": "train_handlers",
        "train#inferer": "inferer",
        "network": "network",
        "device": "device",
    },
    "validate#evaluator": {"validate#handlers": "val_handlers", "validate#inferer": "inferer"},
    "evaluator": {"inferer": "inferer", "network": "network", "device": "device"},
}
"""The usual place of an engine -> usual places of its parts and the engine's arguments that name them."""


def places(config: Config) -> dict[str, str]:
    """Usual place -> place in this bundle, for engines and for the parts that the engines name by reference.

    A part that an engine does not name as a plain ``@reference`` is left out, as is what the bundle does not have.
    """
    found: dict[str, str] = {}
    trainers = [place for place, kind in components(config) if kind.endswith("Trainer")]
    evaluators = [place for place, kind in components(config) if kind.endswith("Evaluator")]
    if len(trainers) == 1:
        found["train#trainer"] = trainers[0]
    if len(evaluators) == 1:
        found["validate#evaluator" if trainers else "evaluator"] = evaluators[0]
    for usual, parts in PARTS.items():
        engine = get(config, found.get(usual, ""))
        for part, argument in parts.items() if isinstance(engine, Mapping) else ():
            named = _plain(engine.get(argument))
            if named is not None and get(config, named) is not None:
                found.setdefault(part, named)
    network = next((n for n in references(get(config, found.get("network", ""))) if _is_component(config, n)), None)
    if network is not None:
        found["network_def"] = network
    return found


def components(config: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """All components of a configuration: place and the last word of ``_target_``."""
    if isinstance(config, Mapping) and isinstance(config.get("_target_"), str):
        yield place, config["_target_"].rpartition(".")[2]
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield from components(value, f"{place}#{key}" if place else str(key))


def get(config: Any, place: str) -> Any:
    """What stands at a place; None if nothing does."""
    if not place:
        return None
    for key in split(place):
        if isinstance(config, Mapping) and key in config:
            config = config[key]
        elif isinstance(config, list) and key.isdecimal() and int(key) < len(config):
            config = config[int(key)]
        else:
            return None
    return config


def split(place: str) -> list[str]:
    """Keys from the top to a place."""
    return place.replace("::", "#").split("#")


def references(value: Any) -> list[str]:
    """Places that a value, or anything inside it, refers to by ``@`` or ``%``."""
    if isinstance(value, str):
        return [name.replace("::", "#") for name in REFERENCE.findall(value)] if value.startswith(SIGNS) else []
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [name for part in inside for name in references(part)]


def used(config: Config) -> set[str]:
    """Places that a run of the bundle reaches: from what it runs, along all references and macros."""
    waiting = [name for steps in config.values() if _runs(steps) for name in references(steps)]
    seen: set[str] = set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        waiting += references(get(config, place))
    return seen


def is_steps(value: Any) -> bool:
    """Whether a value is a list of expressions, as MONAI runs them by their name."""
    return isinstance(value, list) and all(isinstance(step, str) and step.startswith("$") for step in value)


def _runs(steps: Any) -> bool:
    listed = steps if isinstance(steps, list) else [steps]
    return any(isinstance(step, str) and step.startswith("$") and ".run(" in step for step in listed)


def _plain(value: Any) -> str | None:
    """The place that ``@place`` names."""
    found = references(value) if isinstance(value, str) else []
    return found[0] if found and value.replace("::", "#") == f"@{found[0]}" else None


def _is_component(config: Config, place: str) -> bool:
    value = get(config, place)
    return isinstance(value, Mapping) and "_target_" in value
