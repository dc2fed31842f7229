"""The tables of the organ comparison: mean and spread over seeds, made of the rows alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

SETTING = ("device", "plan_gb", "crop", "seconds", "iterations_asked")


def table(rows: Sequence[Row]) -> str:
    """A heading and a table for every setting, in the order of the rows."""
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(json.dumps([row[name] for name in SETTING]), []).append(row)
    return "\n\n".join(table_of_setting(same) for same in settings.values())


def table_of_setting(rows: Sequence[Row]) -> str:
    """What all rows share, then a line for every trainer and its settings."""
    trainers: dict[str, list[Row]] = {}
    for row in rows:
        trainers.setdefault(json.dumps([row["name"], row["settings"]]), []).append(row)
    organs = list(next(iter(rows[0]["test"].values())))
    heads = ["trainer", "seeds", "patch, batch", "iterations", "mean Dice", *organs, "validation"]
    heads += ["step, MiB", "prediction, s", "prediction, MiB"]
    lines = [shared(rows[0]), "", line(heads), line(["---"] * len(heads))]
    return "\n".join([*lines, *(line(cells(same, organs)) for same in trainers.values())])


def shared(row: Row) -> str:
    """What holds for every row of a table."""
    budget = f"{row['iterations_asked']} iterations" if row["iterations_asked"] else f"{row['seconds']:g} seconds"
    crop = "whole images" if row["crop"] is None else f"crops of {' x '.join(map(str, row['crop']))} voxels"
    return f"{budget} each on {row['device']}, plans for {row['plan_gb']:g} GB, {crop}"


def cells(rows: Sequence[Row], organs: Sequence[str]) -> list[str]:
    """One line: trainings that differ by their seed."""
    first = rows[0]
    changed = f" `{json.dumps(first['settings'])}`" if first["settings"] else ""
    patch = " x ".join(map(str, first["patch"]))
    return [
        f"{first['name']}{changed}",
        str(len(rows)),
        f"{patch}, {first['batch']}",
        spread([row["iterations"] for row in rows], 0),
        spread([mean_dice(row["test"], organs) for row in rows], 3),
        *(spread([mean_dice(row["test"], [organ]) for row in rows], 2) for organ in organs),
        spread([mean_dice(row["validation"], organs) for row in rows], 3),
        spread([row["step_peak_mib"] for row in rows], 0),
        spread([row["predict_seconds"] for row in rows], 1),
        spread([row["predict_peak_mib"] for row in rows], 0),
    ]


def mean_dice(scores: dict[str, dict[str, float | None]], organs: Iterable[str]) -> float:
    """The mean over organs of the mean over patients; a patient counts where the organ is there or predicted."""
    return statistics.mean(
        statistics.mean(patient[organ] for patient in scores.values() if patient[organ] is not None)  # type: ignore[type-var]
        for organ in organs
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds, the mean alone of one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def line(entries: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(entries)} |"
