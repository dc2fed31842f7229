"""One study through a bundle: its own transforms, network and inferer, and its results on the grid of the input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from monai.data.utils import list_data_collate
from monai.engines.utils import default_prepare_batch
from monai.inferers import SimpleInferer
from monai.transforms import Compose, apply_transform
from torch import nn

from monai_memeff.checks import check_logits
from monai_memeff.errors import InputError
from monai_memeff.geometry import ras_affine
from monai_memeff.hosts.run.source.bundle import Bundle
from monai_memeff.hosts.run.source.checkpoints import checkpoints_of, load_weights
from monai_memeff.hosts.run.source.served import READER
from monai_memeff.hosts.run.source.transforms import RESULTS, StudyReader
from monai_memeff.hosts.run.studies import Study

OFF_GRID = 0.01
"""Largest distance of a corner of a result from the input's corner, in voxels."""


@dataclass(frozen=True)
class Result:
    """What a bundle would have saved.

    Attributes:
        key: in the bundle's dictionary, ``pred`` as a rule.
        name: the bundle's postfix.
        values: (C, H, W, D) on the grid of the input.
    """

    key: str
    name: str
    values: np.ndarray


@dataclass
class Prediction:
    """Results of a study with the grid they lie on: RAS affine (4, 4), notes of the reader, seconds of each stage."""

    results: list[Result]
    affine: np.ndarray
    notes: list[str]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Case:
    """A study before the network: MONAI's batch of one, what the network gets, and seconds of each stage so far."""

    batch: Any
    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    seconds: dict[str, float]


class Program:
    """A bundle ready to run, its weights loaded.

    Args:
        bundle: its configuration.

    Raises:
        InputError: a part cannot be made, or weights are missing or foreign.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.device = torch.device(bundle.parse("device", "cuda" if torch.cuda.is_available() else "cpu"))
        self.network: nn.Module = bundle.parse(str(bundle.part("network")))
        if not isinstance(self.network, nn.Module):
            raise InputError(f"the network of {bundle.folder} is {type(self.network).__name__}, and a module is needed")
        self.inferer = bundle.parse(bundle.part("inferer") or "inferer") or SimpleInferer()
        self.before = bundle.parse(bundle.preprocessing)
        self.after = bundle.parse(bundle.part("postprocessing") or "postprocessing") or Compose([])
        self.prepare = bundle.parse(f"{bundle.evaluator}#prepare_batch") or default_prepare_batch
        self.amp = bool(bundle.parse(f"{bundle.evaluator}#amp", False))
        self.amp_options = bundle.parse(f"{bundle.evaluator}#amp_kwargs") or {}
        self.reader: StudyReader = bundle.parse(READER)
        self.keys = bundle.image_keys()
        bundle.check_records()
        load_weights(bundle, checkpoints_of(bundle))
        self.network.to(self.device).eval()

    def __call__(self, study: Study, series: str | None = None, resample: bool = False) -> Prediction:
        """Read, transform, infer, and transform back.

        Raises:
            InputError: the study cannot be read, or a result is not on its grid.
        """
        case = self.read(study, series, resample)
        with _timed(case.seconds, "inference"), torch.no_grad(), self.precision():
            answer = self.inferer(case.inputs, self.network, *case.args, **case.kwargs)
        return self.finish(case, answer)

    def read(self, study: Study, series: str | None = None, resample: bool = False) -> Case:
        """The network's input, by the bundle's own preprocessing.

        Raises:
            InputError: the study cannot be read, or the preprocessing makes several images of it.
        """
        self.reader.begin(series if study.dicom else None, resample and study.dicom)
        seconds: dict[str, float] = {}
        with _timed(seconds, "reading and preprocessing"), torch.no_grad():
            item = apply_transform(self.before, self._item(study))
            if not isinstance(item, dict):
                raise InputError("the bundle's preprocessing makes several images of one, and memeff takes one")
            batch = list_data_collate([item])
            prepared = self.prepare(batch, self.device, False)
        inputs, _, args, kwargs = prepared if len(prepared) == 4 else (*prepared, (), {})
        return Case(batch, inputs, args, kwargs, seconds)

    def finish(self, case: Case, answer: Any) -> Prediction:
        """Results on the grid of the image, by the bundle's own postprocessing.

        Args:
            case: it may be finished several times, with other answers.
            answer: The network's.

        Raises:
            InputError: the answer has NaN, or a result is not on the grid.
        """
        for part in answer.values() if isinstance(answer, dict) else [answer]:
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                check_logits(part, f"the network of {self.bundle.folder.name}")
        with _timed(case.seconds, "postprocessing"):
            output = {"image": case.inputs, "pred": answer}
            data = {**decollate_batch(case.batch)[0], **decollate_batch(output)[0]}
            del output
            data = apply_transform(self.after, data)
            results = [self._result(*found) for found in data.get(RESULTS) or [("pred", "", data["pred"])]]
        assert self.reader.affine is not None
        return Prediction(results, self.reader.affine, self.reader.notes, case.seconds)

    def _item(self, study: Study) -> dict[str, Any]:
        paths = [str(path) for path in study.images]
        if len(self.keys) > 1:
            return dict(zip(self.keys, paths, strict=True))
        return {self.keys[0]: paths if len(paths) > 1 else paths[0]}

    def precision(self) -> AbstractContextManager[Any]:
        """As MONAI's evaluator: mixed precision on a GPU only."""
        if self.amp and self.device.type == "cuda":
            return torch.autocast("cuda", **self.amp_options)
        return nullcontext()

    def _result(self, key: str, name: str, value: Any) -> Result:
        """A result, or the reason why it does not lie on the grid of the input."""
        shape, affine = self.reader.shape, self.reader.affine
        if shape is None or affine is None:
            raise InputError("the bundle read no image")
        if not isinstance(value, MetaTensor):
            raise InputError(
                f"the bundle's result {key} carries no geometry ({type(value).__name__}): use MONAI's command"
            )
        found, own = tuple(value.shape[1:]), ras_affine(value).cpu().numpy()
        if found != tuple(shape):
            raise InputError(
                f"the bundle's result {key} has {' x '.join(map(str, found))} voxels, and the image "
                f"{' x '.join(map(str, shape))}: its postprocessing needs Invertd for it"
            )
        corners = np.array(np.meshgrid(*[(0, extent - 1) for extent in shape], [1], indexing="ij")).reshape(4, -1)
        off = np.abs(np.linalg.solve(affine, own @ corners) - corners).max()
        if not off < OFF_GRID:
            raise InputError(
                f"the bundle's result {key} lies {off:.3g} voxels off the image's grid: its postprocessing "
                "needs Invertd for it"
            )
        return Result(key, name, value.detach().as_subclass(torch.Tensor).cpu().numpy())


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - began, 3)
