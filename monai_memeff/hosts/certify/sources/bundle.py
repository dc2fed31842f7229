"""The subject of a MONAI bundle: its own preprocessing, network, window and postprocessing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from monai_memeff.data import read_volume
from monai_memeff.errors import InputError
from monai_memeff.hosts.certify.sources.subject import DEFAULT_WINDOW, Options, Subject
from monai_memeff.hosts.run.output.segments import labels_of
from monai_memeff.hosts.run.program import Program, Result
from monai_memeff.hosts.run.source.bundle import Bundle, first_cause
from monai_memeff.hosts.run.source.checkpoints import checkpoints_of
from monai_memeff.hosts.run.studies import Study


def bundle_subject(folder: Path, images: Sequence[Path], options: Options) -> Subject:
    """A bundle with its weights on one study.

    Raises:
        InputError: the bundle cannot be loaded, the study not read, or its results are not labels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bundle = Bundle(folder)
        program = Program(bundle)
        if len(images) != len(bundle.image_names()):
            wanted = f"{folder} reads {', '.join(bundle.image_names())}"
            raise InputError(f"{wanted}, and --image was given {len(images)} times: once for each of them")
        study = Study(images[0].name, tuple(images), images[0].is_dir())
        try:
            case = program.read(study)
        except (InputError, OSError, MemoryError):
            raise
        except Exception as error:  # of the bundle's own code, of any kind
            raise InputError(f"the preprocessing of {folder} fails on this image: {first_cause(error)}") from error
    outputs = bundle.metadata.get("network_data_format", {}).get("outputs", {})
    classes: dict[str, tuple[int, ...]] = {}

    def labels(answer: Any) -> np.ndarray:
        made = _as_inferred(answer, getattr(program.inferer, "labels", False))
        values, names = _labels(program.finish(case, _with_meta(made, case.inputs)).results, outputs)
        classes.update(names)
        return values

    return Subject(
        name=f"{bundle.name} {bundle.version}",
        kind="MONAI bundle",
        network=program.network,
        inputs=case.inputs,
        labels=labels,
        rule="the bundle's own postprocessing, on the grid of the image",
        image=read_volume(images[0]).image,
        window=_window(program.inferer, options),
        weights={str(found.file): found.sha256() for found in checkpoints_of(bundle)},
        classes=classes,
        args=tuple(case.args),
        kwargs=case.kwargs,
        precision=program.precision,
        notes=list(program.reader.notes),
    )


def _with_meta(answer: Any, inputs: Any) -> Any:
    """A network's tensor with the meta data that it has when a MetaTensor goes through the network."""
    if not isinstance(answer, Tensor):
        raise InputError(f"the network must return one tensor, and it returned {type(answer).__name__}")
    if not isinstance(inputs, MetaTensor):
        return answer.clone()
    made = MetaTensor(answer.clone())
    made.copy_meta_from(inputs)
    made.is_batch = inputs.is_batch
    return made


def _as_inferred(answer: Any, labels: bool | str) -> Any:
    """What the bundle's postprocessing gets: labels, where its inferer is one of this package that gives labels."""
    if not labels or not isinstance(answer, Tensor):
        return answer
    if labels == "regions" or answer.shape[1] == 1:
        return (answer > 0).to(torch.uint8)
    return answer.argmax(1, keepdim=True).to(torch.int32)


def _window(own: Any, options: Options) -> SlidingWindowInferer:
    """The bundle's own sliding window; one of 96 voxels where it has none, or of the size that the user says."""
    if type(own) is not SlidingWindowInferer:
        return SlidingWindowInferer(options.window or DEFAULT_WINDOW)
    if options.window is not None:
        own.roi_size = options.window
    return own


def _labels(results: Sequence[Result], outputs: dict[str, Any]) -> tuple[np.ndarray, dict[str, tuple[int, ...]]]:
    found = [(result, labels_of(result, outputs)) for result in results]
    for result, labels in found:
        if labels.values.dtype.kind not in "iu":
            raise InputError(
                f"the bundle saves {result.key} as values between whole numbers, and certify compares labels: add "
                "AsDiscreted to its postprocessing"
            )
    if len(found) == 1:
        values, names = found[0][1].values, found[0][1].names
        overlapping = values.ndim == 4
        return values, {name: (number - 1 if overlapping else number,) for number, name in names.items()}
    parts = [labels.values if labels.values.ndim == 4 else labels.values[None] for _, labels in found]
    return np.concatenate(parts), {}
