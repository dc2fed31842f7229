"""All runs of a certificate in their order, and its content."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_memeff.errors import InputError
from monai_memeff.hosts.certify import content, facts
from monai_memeff.hosts.certify.compare import (
    Difference,
    difference,
    differing,
    digest,
    require_finite,
    state_digest,
    tensors,
)
from monai_memeff.hosts.certify.frame import frame
from monai_memeff.hosts.certify.pictures import Pictures, sections
from monai_memeff.hosts.certify.runs import Run, run_whole, run_window
from monai_memeff.hosts.certify.sources.subject import Subject
from monai_memeff.hosts.certify.streamer import Streamer
from monai_memeff.hosts.certify.verdict import judge, rounding

FORMAT = 1


class Work:
    """Everything a certificate says about one subject.

    Args:
        subject: a model on a volume.
        truth: true labels (H, W, D) on the image's grid: none, one, or one for each of overlapping segments.
        partitions: parts of the streamed run; None chooses them by the budget.
        budget: bytes for activations; None goes with a number of parts.
        repeats: streamed runs.
        whole: whether the whole network runs; None where it fits.
    """

    def __init__(
        self,
        subject: Subject,
        truth: list[np.ndarray],
        partitions: int | None,
        budget: int | None,
        repeats: int,
        whole: bool | None,
    ) -> None:
        require_finite(subject.inputs, "the preprocessed image has")
        self.subject, self.truth, self.repeats, self.force = subject, truth, repeats, whole
        self.frame = frame(subject)
        self.stream = Streamer(subject, self.frame, partitions, budget)
        self.runs: dict[str, Run] = {}
        self.labels: dict[str, np.ndarray] = {}
        self.results: list[str] = []
        self.dtype = subject.inputs.dtype

    def __call__(self, images: Sequence[Path], labels: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Pictures]]:
        """Run all ways; the certificate's content, and its pictures."""
        state = state_digest(self.subject.network)
        self._run("whole", lambda: run_whole(self.subject, self.frame, self.force))
        self._run("streamed", self.stream)
        self._run("window", lambda: run_window(self.subject))
        reference = next((way for way in ("whole", "streamed") if way in self.labels), None)
        differences: dict[str, Difference] = {}
        wheres: dict[str, np.ndarray] = {}
        for way in [way for way in ("streamed", "window") if reference and way in self.labels and way != reference]:
            wheres[way] = differing(self.labels[way], self.labels[str(reference)])
            differences[way] = difference(self.runs[way].answer, self.runs[str(reference)].answer, wheres[way])
        self._repeat()
        if state_digest(self.subject.network) != state:
            raise InputError(
                "the network changes its own weights or buffers when it runs, so no two runs are comparable"
            )
        kinds = len(np.unique(self.labels[reference])) if reference else 0
        verdict = judge(self.runs["whole"], self.runs["streamed"], differences.get("streamed") if reference == "whole"
                        else None, self.results, kinds, rounding(self.dtype, self.subject.device))  # fmt: skip
        pictures = self._pictures(reference, wheres)
        return {
            "format": FORMAT,
            "verdict": {"exact": verdict.exact, "kind": verdict.kind, "sentence": verdict.sentence},
            "window_sentence": content.window_sentence(self.runs["window"], reference, differences.get("window")),
            "reference": reference,
            "differences": {way: content.difference_facts(found) for way, found in differences.items()},
            "runs": {way: content.run_facts(run) for way, run in self.runs.items()},
            "repeats": {"sha256": self.results, "identical": len(set(self.results)) <= 1},
            "dice": content.scores(self.subject, self.truth, self.labels),
            "model": content.model_facts(self.subject, state),
            "image": {"files": list(map(content.file_facts, images)), "shape": list(self.subject.image.shape[1:])},
            "label": list(map(content.file_facts, labels)),
            "input": {
                "shape": list(self.subject.inputs.shape),
                "padded": self.frame.padded,
                "padded_to": list(self.frame.inputs.shape),
                "sha256": digest(self.subject.inputs),
            },
            "rule": self.subject.rule,
            "notes": content.notes(self.subject, self.frame, self.runs, self.truth),
            "plan": self._plan(),
            "versions": facts.software(),
            "machine": facts.machine(self.subject.device),
            "date": facts.now(),
        }, pictures

    def _run(self, way: str, work: Any) -> None:
        print(f"{way}: running", file=sys.stderr, flush=True)
        run: Run = work()
        self.runs[way] = run
        if run.answer is None:
            print(f"{way}: {run.refused}", file=sys.stderr, flush=True)
            return
        require_finite(run.answer, f"the {way} network gives")
        self.labels[way] = self.subject.labels(run.answer)
        self.dtype = tensors(run.answer)[0].dtype
        content.check_true_labels(self.subject, self.labels[way], self.truth)
        print(f"{way}: {run.seconds:.1f} s", file=sys.stderr, flush=True)

    def _repeat(self) -> None:
        """Hash every streamed run; the answers of the first runs are not needed any more."""
        first = self.runs["streamed"].answer
        if first is not None:
            self.results.append(digest(first))
        for run in self.runs.values():
            run.answer = None
        del first
        if not self.results:
            return
        from tqdm import trange

        for _ in trange(self.repeats - 1, desc="streamed again", disable=None):
            self.results.append(digest(self.stream(measure=False).answer))

    def _pictures(self, reference: str | None, wheres: dict[str, np.ndarray]) -> dict[str, Pictures]:
        if reference is None:
            return {}
        image, labels = self.subject.image, self.labels[reference]
        found = {"labels": sections(image, labels, None, "labels of the reference")}
        for way, where in wheres.items():
            if where.any():
                found[way] = sections(image, labels, where, f"voxels where {way} differs")
        return found

    def _plan(self) -> dict[str, str]:
        text = self.stream.text
        return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text} if text else {}
