"""Parts of a certificate's content: scores, sentences, and the model, runs and files as a JSON file holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.errors import InputError
from monai_memeff.hosts.certify.compare import Difference, dice
from monai_memeff.hosts.certify.frame import Frame
from monai_memeff.hosts.certify.runs import Run
from monai_memeff.hosts.certify.sources.subject import Subject, file_sha256


def check_true_labels(subject: Subject, labels: np.ndarray, truth: Sequence[np.ndarray]) -> None:
    """Refuse true labels that do not say which segment or class they are.

    Raises:
        InputError: their number is not that of the segments, or none of their values is one of the model's classes.
    """
    segments = len(labels) if labels.ndim == 4 else 1
    if truth and len(truth) != segments:
        raise InputError(
            f"the model gives {segments} segments that may overlap, and --label was given {len(truth)} times: once for "
            "each of them, in their order"
        )
    strange, known = unknown_values(subject, truth), sorted({n for one in subject.classes.values() for n in one})
    if labels.ndim == 3 and strange and len(strange) == len(np.unique(truth[0][truth[0] > 0])):
        raise InputError(
            f"the label holds {_numbers(strange)} beside 0, and the model's classes are {_numbers(known)}: give a label"
            " with the model's numbers"
        )


def unknown_values(subject: Subject, truth: Sequence[np.ndarray]) -> list[int]:
    """Values of one true label that no class of the model has, 0 left out; none where the model does not name any."""
    if len(truth) != 1 or not subject.classes:
        return []
    known = {0, *(number for numbers in subject.classes.values() for number in numbers)}
    return sorted(set(np.unique(truth[0]).tolist()) - known)


def _numbers(values: Sequence[int]) -> str:
    """At most five of them, in words."""
    return ", ".join(map(str, values[:5])) + (" and others" if len(values) > 5 else "")


def scores(subject: Subject, truth: Sequence[np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Dice of every class of every run; empty without true labels."""
    if not truth or not labels:
        return {}
    classes, first = dict(subject.classes), next(iter(labels.values()))
    true = truth[0] if first.ndim == 3 else np.stack(truth)
    if first.ndim == 4:
        named = {numbers[0]: name for name, numbers in classes.items()}
        classes = {named.get(index, f"segment {index + 1}"): (index,) for index in range(len(first))}
    elif not classes:
        numbers = sorted({*np.unique(true).tolist(), *np.unique(first).tolist()} - {0})
        classes = {f"label {number}": (number,) for number in numbers}
    return {"classes": list(classes), "runs": {way: dice(found, true, classes) for way, found in labels.items()}}


def window_sentence(run: Run, reference: str | None, found: Difference | None) -> str:
    """What the sliding window changes, or why it did not run."""
    details = run.details or {}
    size = " x ".join(map(str, details.get("roi_size") or ()))
    if found is None:
        return f"MONAI's sliding window ({size}) {run.refused}." if reference else ""
    return (
        f"MONAI's sliding window ({size}, overlap {details['overlap']}) gives {found.voxels:,} of {found.of:,} voxels "
        f"({100 * found.voxels / max(found.of, 1):.3g} %) another label than the "
        f"{'whole' if reference == 'whole' else 'streamed'} network."
    )


def notes(subject: Subject, frame: Frame, runs: Mapping[str, Run], truth: Sequence[np.ndarray]) -> list[str]:
    """What a reader must know besides the numbers."""
    found, strange = list(subject.notes), unknown_values(subject, truth)
    if strange:
        found.append(f"The label also holds {_numbers(strange)}, which no class of the model has: no Dice counts them.")
    if frame.padded:
        size = " x ".join(map(str, frame.inputs.shape[2:]))
        found.append(
            "The network takes no volume of these extents, or returns another one, so whole and streamed network see it"
            f" with zeros around it to {size} voxels, and their results are cropped; the sliding window sees it as it"
            " is."
        )
    if runs["whole"].refused and not runs["streamed"].refused:
        found.append("The whole network did not run, so the sliding window is compared with the streamed network.")
    return found


def model_facts(subject: Subject, state: str) -> dict[str, Any]:
    """The model and its weights."""
    return {
        "name": subject.name,
        "kind": subject.kind,
        "network": type(subject.network).__name__,
        "parameters": sum(parameter.numel() for parameter in subject.network.parameters()),
        "files": dict(subject.weights),
        "state_sha256": state,
    }


def run_facts(run: Run) -> dict[str, Any]:
    """A run without its result."""
    return {name: value for name, value in vars(run).items() if name != "answer"}


def difference_facts(found: Difference) -> dict[str, Any]:
    """A difference by the names of the JSON file."""
    values = asdict(found)
    values["largest_logit_difference"] = values.pop("largest")
    values["largest_logit"] = values.pop("scale")
    values["bit_identical"] = values.pop("identical")
    return values


def file_facts(path: Path) -> dict[str, str]:
    """A file or folder and its hash."""
    return {"file": str(path), "sha256": file_sha256(path)}
