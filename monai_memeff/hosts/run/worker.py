"""One study from its files to its folder, whatever goes wrong on the way said in one line."""

from __future__ import annotations

import hashlib
import re
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from monai_memeff.errors import InputError, message
from monai_memeff.hosts.run.output.dicom_seg import sources_of
from monai_memeff.hosts.run.output.results import versions, write_refusal, write_results
from monai_memeff.hosts.run.peak import peaks
from monai_memeff.hosts.run.program import Program
from monai_memeff.hosts.run.source.bundle import Bundle, first_cause
from monai_memeff.hosts.run.studies import Study

OUT = "too little memory"


@dataclass(frozen=True)
class Settings:
    """What holds for all studies of one command.

    Attributes:
        bundle: its folder.
        overlays: names or files.
        output: Folder of all results.
        format: "seg", "nifti", or None: SEG for DICOM, NIfTI for the rest.
        series: for DICOM, the ``SeriesInstanceUID``.
        resample: for DICOM, interpolate uneven or tilted slices.
        weights: sha256 of every file of weights.
        digest: Hash of the bundle's configuration with overlays.
    """

    bundle: Path
    overlays: tuple[str, ...]
    output: Path
    format: str | None
    series: str | None
    resample: bool
    weights: dict[str, str]
    digest: str

    def key(self, study: Study) -> str:
        """What the results of a study depend on, in one number."""
        parts = (self.digest, sorted(self.weights.values()), self.format, self.series, self.resample)
        return hashlib.sha256(repr((parts, study.fingerprint(), versions().get("monai-memeff"))).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """How a study ended: ``line`` says it, ``done`` whether there are results."""

    name: str
    done: bool
    line: str


class Worker:
    """A bundle that works on one study after the other.

    Args:
        settings: what the command says.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with warnings.catch_warnings(record=True) as said:
            self.bundle = Bundle(settings.bundle, settings.overlays)
            self.program = Program(self.bundle)
        self.said = said

    def __call__(self, study: Study) -> Outcome:
        """Work on a study; errors of its files and of the bundle's own code become an outcome."""
        folder = self.settings.output / study.name
        began = time.perf_counter()
        report: dict[str, Any] = {"study": study.name}
        try:
            report |= self._report(study)
            report = self._work(study, folder, report)
        except Exception as error:  # one bad study does not stop the others
            known = isinstance(error, (InputError, OSError, MemoryError, ModuleNotFoundError))
            why = self._out_of_memory(error) or (message(error) if known else first_cause(error))
            known = known or why.startswith(OUT)
            report |= {"status": "refused", "refused": why, "seconds": {"total": round(time.perf_counter() - began, 3)}}
            report |= {} if known else {"traceback": traceback.format_exc()}
            write_refusal(folder, report)
            return Outcome(study.name, False, f"{study.name}: {why}")
        total = report["seconds"]["total"]
        peak = report["peak_device_bytes"] or report["peak_process_bytes"] or 0
        return Outcome(study.name, True, f"{study.name}: done in {total:.1f} s, peak {peak / 2**20:.0f} MiB")

    def _out_of_memory(self, error: Exception) -> str:
        """What to do where torch found no memory, on a device or on the host; nothing for another error."""
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            return ""
        kind, size = type(self.program.inferer).__name__, re.search(r"allocate ([\d.]+ \w+)", str(error))
        wanted = f", which wanted {size[1]} more" if size else ""
        return (
            f"{OUT} of {self.program.device} for {kind}{wanted}: free some, or run the network in parts, by --overlay "
            f"halo_inference or another inferer with memory_budget"
        )

    def _work(self, study: Study, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
        settings, began = self.settings, time.perf_counter()
        if study.fault:
            raise InputError(study.fault)
        wanted = settings.format or ("seg" if study.dicom else "nifti")
        if wanted == "seg" and not study.dicom:
            raise InputError("a DICOM SEG refers to DICOM images, and the input is none; use --format nifti")
        sources = sources_of(study.images[0], settings.series, settings.resample) if wanted == "seg" else None
        with warnings.catch_warnings(record=True) as said, peaks(self.program.device) as peak:
            prediction = self.program(study, settings.series, settings.resample)
        inferer = getattr(self.program.inferer, "last_report", None)
        report |= {
            "status": "done",
            "notes": prediction.notes,
            "warnings": sorted({" ".join(str(warning.message).split()) for warning in [*self.said, *said]}),
            "peak_device_bytes": peak["device"],
            "peak_process_bytes": peak["process"],
            "inferer": {"kind": type(self.program.inferer).__name__}
            | (asdict(inferer) if is_dataclass(inferer) and not isinstance(inferer, type) else {}),
            "seconds": {**prediction.seconds, "total": round(time.perf_counter() - began, 3)},
        }
        return write_results(folder, prediction, sources, self._described(), report)

    def _described(self) -> dict[str, Any]:
        settings, weights = self.settings, "+".join(sha[:12] for sha in self.settings.weights.values())
        overlays = "+".join(Path(name).stem for name in settings.overlays) or "none"
        return {
            "name": self.bundle.name,
            "version": self.bundle.version,
            "outputs": self.bundle.metadata.get("network_data_format", {}).get("outputs", {}),
            "parameters": {"weights": weights, "overlays": overlays, "config": settings.digest[:12]}
            | {"software": versions().get("monai-memeff", "unknown")},
        }

    def _report(self, study: Study) -> dict[str, Any]:
        settings = self.settings
        return {
            "study": study.name,
            "key": settings.key(study),
            "input": {"images": [str(path) for path in study.images], "sha256": _content(study), "dicom": study.dicom},
            "bundle": {"name": self.bundle.name, "version": self.bundle.version, "config_sha256": settings.digest},
            "weights_sha256": settings.weights,
            "overlays": list(settings.overlays),
            "options": {"format": settings.format, "series": settings.series, "resample": settings.resample},
            "versions": versions(),
            "device": str(self.program.device),
            "refused": None,
        }


def _content(study: Study) -> str:
    """Of all files, in the order of their names."""
    digest = hashlib.sha256()
    for file in study.files():
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
