"""The report, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai_memeff.hosts.estimate.systems import Row
from monai_memeff.memory.forecast import in_units

COLUMNS = ("system", "suits", "device", "host", "disk", "weights", "time", "why")
FIELDS = (
    *("network", "shape", "training", "peak_bytes", "parameter_bytes", "input_bytes", "gradient_bytes"),
    *("optimizer_bytes", "host_bytes", "disk_bytes", "total_bytes", "output_shape", "multiplications"),
    *("relative_time", "basis", "notes"),
)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with one row for each system."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(COLUMNS) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in cells]


def _cells(row: Row) -> tuple[str, ...]:
    suits = {True: "yes", False: "no", None: "?"}[row.verdict.suits]
    if row.found is None:
        return (row.system, suits, "-", "-", "-", "-", "-", row.refusal or "")
    found = row.found
    time = "?" if found.relative_time is None else f"{found.relative_time:.2g}"
    sizes = (found.peak_bytes, found.host_bytes, found.disk_bytes, found.parameter_bytes)
    why = row.verdict.why if row.refusal is None else row.refusal
    return (row.system, suits, *map(in_units, sizes), time, why)


def as_data(row: Row) -> dict[str, Any]:
    """A row for JSON."""
    data: dict[str, Any] = {"system": row.system, "suits": row.verdict.suits, "why": row.verdict.why}
    data["refusal"] = row.refusal
    if row.found is not None:
        data |= {name: getattr(row.found, name) for name in FIELDS}
        data["setting"] = dict(row.found.setting)
    return data
