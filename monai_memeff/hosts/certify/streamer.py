"""The network streamed by halo, as often as one likes, by a plan that is made first."""

from __future__ import annotations

from typing import Any

import torch

from monai_memeff.halo import NotPartitionableError, SpatialPartitionInferer, plan
from monai_memeff.hosts.certify.frame import Frame
from monai_memeff.hosts.certify.runs import Run, measured
from monai_memeff.hosts.certify.sources.subject import Subject


class Streamer:
    """The network streamed by halo, as often as one likes.

    Args:
        subject: what runs.
        frame: The volume.
        partitions: number of parts; None chooses them by the budget.
        budget: bytes for activations on the device.

    Attributes:
        text: the plan in words; empty where the network cannot be partitioned.
        refused: every reason why not.
    """

    def __init__(self, subject: Subject, frame: Frame, partitions: int | None, budget: int | None) -> None:
        self.subject, self.frame = subject, frame
        self.axis = max(range(len(frame.extents)), key=lambda axis: frame.extents[axis])
        parts: int | str = "auto" if partitions is None else partitions
        self.inferer = SpatialPartitionInferer(parts, axis=self.axis, memory_budget=budget)
        self.text, self.refused = "", ""
        call = (frame.inputs, *subject.args)
        try:
            with subject.precision(), torch.no_grad():
                made = plan(subject.network, call, parts, budget, self.axis, kwargs=dict(subject.kwargs))
            self.text, self.device_bytes, self.store_bytes = str(made), made.peak_bytes, made.store_bytes
        except NotPartitionableError as refusal:
            self.refused = "; ".join(refusal.reasons)

    def __call__(self, measure: bool = True) -> Run:
        """One run; without measuring it is only its result."""
        if self.refused:
            return Run(refused=self.refused)
        run = Run(predicted_bytes=self.device_bytes + self.store_bytes)
        if not measure:
            with torch.no_grad(), self.subject.precision():
                run.answer = self._answer()
            return run
        measured(run, self.subject, self._answer)
        report = self.inferer.last_report
        assert report is not None
        run.details = {
            "partitions": report.partitions,
            "axis": self.axis,
            "planned_device_bytes": report.planned_peak_bytes,
            "measured_device_bytes": report.device_peak_bytes,
            "store_bytes": report.store_bytes,
            "moved_bytes": report.moved_bytes,
            "plan_seconds": round(report.plan_seconds, 3),
        }
        return run

    def _answer(self) -> Any:
        subject = self.subject
        return self.frame.crop(self.inferer(self.frame.inputs, subject.network, *subject.args, **subject.kwargs))
