"""Whether a bundle is one that an overlay is for, as far as its files say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from monai_memeff.errors import InputError
from monai_memeff.hosts.layout import Config, components, get, places, references, used

SWITCH, REPLACE = "monai_memeff.hosts.switch_unet", "monai_memeff.hosts.replace_network"
SPARSE = "monai_memeff.sparse.SparseUNet"
IN_PARTS = ("SpatialPartitionInferer", "parallelize", "spatial_partition")
"""Components that run a network in parts of the volume."""


def require_suited(name: str, overlay: Config, bundle: Config) -> None:
    """Refuse a bundle that an overlay is not for.

    Args:
        name: the overlay's, for the message.
        overlay: its content.
        bundle: what the files before it say.

    Raises:
        InputError: SparseUNet would take another place than UNet's, or points would be queried of overlapping classes
            or of a training that changes its own iterations.
    """
    where = places(bundle)
    network = get(bundle, where.get("network_def", "network_def"))
    if overlay.get("network_def#_target_") == SWITCH:
        _require_unet(name, network)
    if str(overlay.get("network_def#replacement", "")).endswith("OccupancyNet"):
        evaluator = get(bundle, where.get("validate#evaluator") or where.get("evaluator", "")) or {}
        _require_exclusive(name, network, evaluator.get("postprocessing"), bundle)
    if any("PrepareBatch" in str(value) for value in overlay.values()):
        _require_own_iterations(name, get(bundle, where.get("train#trainer", "")) or {})


def require_together(files: Sequence[tuple[str, Config]], merged: Config) -> None:
    """Refuse files of which one runs the network in parts and another one puts in a network that is not run in parts.

    Args:
        files: names and contents, in their order.
        merged: what they give together.

    Raises:
        InputError: it names both files.
    """
    reached = used(merged)
    parts = [place for place, kind in components(merged) if kind in IN_PARTS and _is_reached(place, reached)]
    network = get(merged, places(merged).get("network_def", "network_def"))
    kind = network_class(network)
    why = getattr(kind, "why_not_in_parts", None)
    if not parts or kind is None or why is None:
        return
    splits = _last_with(files, lambda text: any(f".{name}" in text for name in IN_PARTS))
    puts = _last_with(files, lambda text: f".{kind.__name__}" in text or str(network["_target_"]) in text)
    both = f"{splits} and {puts} exclude each other: {splits}" if splits != puts else splits
    raise InputError(f"{both} runs the network in parts, and {kind.__name__} is not run in parts: {why}")


def network_class(network: Any) -> type | None:
    """The class of this package that a bundle's ``network_def`` makes, seen through the switches of overlays.

    None for other networks, and for what names none.
    """
    target = str(network.get("_target_", "")) if isinstance(network, Mapping) else ""
    target = {SWITCH: SPARSE, REPLACE: str(network.get("replacement"))}.get(target, target) if target else ""
    module, _, name = target.rpartition(".")
    if not module.startswith("monai_memeff."):
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def _is_reached(place: str, reached: set[str]) -> bool:
    return not reached or any(place == other or place.startswith(f"{other}#") for other in reached)


def _last_with(files: Sequence[tuple[str, Config]], says: Callable[[str], bool]) -> str:
    return next((name for name, content in reversed(files) if says(json.dumps(content, default=str))), files[0][0])


def _require_own_iterations(name: str, trainer: Mapping[str, Any]) -> None:
    if trainer.get("iteration_update") is not None:
        raise InputError(
            f"{name} trains on points or parts of volumes, and this bundle's trainer has an iteration_update of its "
            f"own (clicks, say) that needs them whole: choose the overlay clstm"
        )


def _require_unet(name: str, network: Any) -> None:
    ours = network_class(network)
    kind = str(network.get("_target_", "")).rpartition(".")[2] if isinstance(network, Mapping) else ""
    kind = ours.__name__ if ours is not None else kind
    if ours is not None and network.get("_target_") == REPLACE:
        raise InputError(
            f"{name} switches MONAI's UNet and no other network, and the overlay {network.get('overlay')} before it "
            f"has put {kind} in its place: name one of the two"
        )
    if kind and kind not in ("UNet", "SparseUNet"):
        way = "run the bundle as it is" if ours else "choose the overlay halo_inference, clstm or occupancy"
        raise InputError(
            f"{name} switches MONAI's UNet and no other network, and this bundle's network_def is {kind}: {way}, see "
            f"docs/overlays.md"
        )


def _require_exclusive(name: str, network: Any, postprocessing: Any, bundle: Config) -> None:
    one = isinstance(network, Mapping) and network.get("out_channels") == 1
    if not one and any(_sigmoids(postprocessing, bundle, set())):
        raise InputError(
            f"{name} is for bundles whose classes exclude each other (softmax), and the classes of this bundle overlap "
            f"(sigmoid): choose the overlay clstm or halo"
        )


def _sigmoids(value: Any, bundle: Config, seen: set[str]) -> Iterator[bool]:
    """Whether each Activations transform in a value, or in what it refers to, takes sigmoids."""
    for place in references(value) if isinstance(value, str) else ():
        if place not in seen:
            seen.add(place)
            yield from _sigmoids(get(bundle, place), bundle, seen)
    if isinstance(value, Mapping) and "Activations" in str(value.get("_target_")):
        given = value.get("sigmoid", False)
        yield any(given) if isinstance(given, list) else bool(given)
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in inside:
        yield from _sigmoids(part, bundle, seen)
