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


def check_number_of_labels(labels: np.ndarray, truth: Sequence[np.ndarray]) -> None:
    """Refuse true labels that do not say which segment they are.

    Raises:
        InputError: their number is not that of the segments.
    """
    segments = len(labels) if labels.ndim == 4 else 1
    if truth and len(truth) != segments:
        raise InputError(
            f"the model gives {segments} segments that may overlap, and --label was given {len(truth)} times: once for "
            "each of them, in their order"
        )


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


def notes(subject: Subject, frame: Frame, runs: Mapping[str, Run]) -> list[str]:
    """What a reader must know besides the numbers."""
    found = list(subject.notes)
    if frame.padded:
        size = " x ".join(map(str, frame.inputs.shape[2:]))
        found.append(
            "The network takes no volume of these extents, so whole and streamed network see it with zeros around "
            f"it to {size} voxels, and their results are cropped; the sliding window sees it as it is."
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
