"""The command `memeff run`: which studies are left to do, who does them, and how it ended."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from monai_memeff.errors import InputError, message
from monai_memeff.hosts.run.offline import no_network
from monai_memeff.hosts.run.output.results import is_finished
from monai_memeff.hosts.run.pool import outcomes
from monai_memeff.hosts.run.source.bundle import Bundle
from monai_memeff.hosts.run.source.checkpoints import checkpoints_of
from monai_memeff.hosts.run.studies import Study, find_studies
from monai_memeff.hosts.run.worker import Settings

FORMATS = ("seg", "nifti")
SOME_FAILED = 1


def run_studies(
    bundle: Path,
    inputs: Sequence[Path],
    output: Path,
    overlays: Sequence[str] = (),
    format: str | None = None,
    workers: int = 1,
    series: str | None = None,
    resample: bool = False,
    part: str | None = None,
) -> int:
    """Run every study of the inputs through a bundle, and write a folder for each.

    Args:
        bundle: folder of a MONAI bundle.
        inputs: DICOM folders, folders of studies, or volume files.
        output: Folder of the results.
        overlays: names of overlays of this package, or files.
        format: "seg" or "nifti"; by default SEG for DICOM and NIfTI for the rest.
        workers: processes.
        series: for DICOM, the ``SeriesInstanceUID``.
        resample: for DICOM, interpolate uneven or tilted slices.
        part: "I/N" takes every Nth study from number I on (0 is the first), for jobs on many machines.

    Returns:
        Exit status: 0, or 1 where a study has no results.

    Raises:
        InputError: nothing can begin.

    Examples:
        >>> from pathlib import Path
        >>> run_studies(Path("mybundle"), [Path("studies")], Path("results"), ["halo_inference"])  # doctest: +SKIP
        0
    """
    if format not in (None, *FORMATS):
        raise InputError(f"--format is {' or '.join(FORMATS)}, got {format!r}")
    if workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}")
    share, of = _share(part)
    _check_output(output, inputs)
    with no_network():
        opened = Bundle(bundle, overlays)
        weights = {str(found.file): found.sha256() for found in checkpoints_of(opened)}
        settings = Settings(bundle, tuple(overlays), output, format, series, resample, weights, opened.digest)
        studies = find_studies(inputs, opened.image_names(), series)[share::of]
        return _all(settings, studies, workers)


def _all(settings: Settings, studies: Sequence[Study], workers: int) -> int:
    from tqdm import tqdm

    left, failed = [], 0
    for study in studies:
        try:
            finished = not study.fault and is_finished(settings.output / study.name, settings.key(study))
        except (InputError, OSError) as error:
            failed += _failed(f"{study.name}: {message(error)}")
            continue
        if finished:
            typer.echo(f"{study.name}: finished before")
        else:
            left.append(study)
    with tqdm(total=len(left), desc="studies", disable=None) as bar:
        for outcome in outcomes(settings, left, workers) if left else ():
            bar.clear()
            if outcome.done:
                typer.echo(outcome.line)
            else:
                failed += _failed(outcome.line)
            bar.update()
    typer.echo(f"{len(studies) - failed} of {len(studies)} studies have results in {settings.output}")
    return SOME_FAILED if failed else 0


def _failed(line: str) -> int:
    print(f"memeff: {line}", file=sys.stderr)
    return 1


def _share(part: str | None) -> tuple[int, int]:
    if part is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    if not found or int(found[1]) >= int(found[2]):
        raise InputError(f"--part is I/N with I from 0 to N - 1, got {part!r}")
    return int(found[1]), int(found[2])


def _check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Results beside slices would be taken for some of them the next time."""
    target = output.resolve()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, and --output is a folder: give another name")
    nearest = next(folder for folder in (target, *target.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"--output {output} cannot be written: {nearest} is a file or may not be changed")
    for path in inputs:
        if path.is_dir() and (path.resolve() == target or path.resolve() in target.parents):
            raise InputError(f"--output {output} lies in the input {path}: give a folder outside it")
