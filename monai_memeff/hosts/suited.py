"""Whether a bundle is one that an overlay is for, as far as its files say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from monai_memeff.errors import InputError
from monai_memeff.hosts.layout import Config, get, places, references


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
    if overlay.get("network_def#_target_") == "monai_memeff.hosts.switch_unet":
        _require_unet(name, network)
    if str(overlay.get("network_def#replacement", "")).endswith("OccupancyNet"):
        evaluator = get(bundle, where.get("validate#evaluator") or where.get("evaluator", "")) or {}
        _require_exclusive(name, network, evaluator.get("postprocessing"), bundle)
    if any("PrepareBatch" in str(value) for value in overlay.values()):
        _require_own_iterations(name, get(bundle, where.get("train#trainer", "")) or {})


def _require_own_iterations(name: str, trainer: Mapping[str, Any]) -> None:
    if trainer.get("iteration_update") is not None:
        raise InputError(
            f"{name} trains on points or parts of volumes, and this bundle's trainer has an iteration_update of its "
            f"own (clicks, say) that needs them whole: choose the overlay clstm"
        )


def _require_unet(name: str, network: Any) -> None:
    kind = str(network.get("_target_", "")).rpartition(".")[2] if isinstance(network, Mapping) else ""
    if kind and kind not in ("UNet", "SparseUNet", "switch_unet"):
        raise InputError(
            f"{name} switches MONAI's UNet and no other network, and this bundle's network_def is {kind}: choose the "
            f"overlay halo_inference, clstm or occupancy, see docs/overlays.md"
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
