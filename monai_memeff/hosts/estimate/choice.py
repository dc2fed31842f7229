"""Which system a budget leads to."""

from __future__ import annotations

from collections.abc import Sequence

from monai_memeff.errors import InputError
from monai_memeff.hosts.estimate.systems import SYSTEMS, Row
from monai_memeff.memory import NetworkEstimate
from monai_memeff.memory.forecast import in_units


def choose(rows: Sequence[Row], budget: int, device: str) -> NetworkEstimate:
    """The first system in this order that fits a budget and suits: dense, halo, then those that need training.

    Raises:
        InputError: nothing fits; the line says what each would need, as far as it is known.
    """
    fitting = {row.system: row for row in rows if row.found is not None and row.refusal is None}
    suited = [fitting[name] for name in SYSTEMS if name in fitting and fitting[name].verdict.suits]
    others = [fitting[name] for name in SYSTEMS if name in fitting]
    for row in [*suited, *others]:
        assert row.found is not None
        if on_device(row.found, device) <= budget:
            return row.found
    reasons = "; ".join(f"{row.system}: {row.refusal or 'does not fit'}" for row in rows)
    raise InputError(f"nothing fits {in_units(budget)}: {reasons}")


def on_device(found: NetworkEstimate, device: str) -> int:
    """Bytes that count for a budget: on a CPU everything, on a GPU what is not on the host."""
    if device == "cpu" or found.system != "halo":
        return found.total_bytes
    return found.peak_bytes + found.parameter_bytes


def why_chosen(found: NetworkEstimate, budget: int, device: str) -> str:
    """One line."""
    setting = ", ".join(f"{name}={value!r}" for name, value in found.setting.items())
    same = "same weights and answer as the whole network" if found.system in ("dense", "halo") else "to be trained"
    with_setting = f" with {setting}" if setting else ""
    return f"chosen: {found.system}{with_setting}, {in_units(on_device(found, device))} of {in_units(budget)}; {same}"
