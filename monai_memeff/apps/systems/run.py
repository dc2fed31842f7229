"""One scan through the dense network and the four systems, from the file to the page."""

from __future__ import annotations

from pathlib import Path

from monai.data import MetaTensor
from rich.console import Console

from monai_memeff.apps.skull.demo.io import silent_readers
from monai_memeff.apps.skull.demo.run import show_progress
from monai_memeff.apps.skull.phantom import head_phantom
from monai_memeff.apps.systems.compare import compare
from monai_memeff.apps.systems.montage import montage
from monai_memeff.apps.systems.page import make_json, make_page, make_table, sentences
from monai_memeff.apps.systems.scan import VOXELS, Scan, prepare_scan
from monai_memeff.data.folder import atomic_folder, check_output_folder
from monai_memeff.data.volume import read_volume
from monai_memeff.errors import InputError

SECONDS = 75.0
WRITTEN = ("systems.html", "systems.json", "systems.png")


def run_systems(
    image: Path | None,
    label: Path | None,
    output: Path,
    seconds: float | None = None,
    threshold: float | None = None,
    seed: int = 0,
    series: str | None = None,
    resample: bool = False,
    voxels: int = VOXELS,
    iterations: int | None = None,
) -> None:
    """Compare the systems on one scan, and write ``systems.html``, ``systems.json`` and ``systems.png``.

    Args:
        image: CT or MRI; None generates a head CT with labels.
        label: whole numbers on the image's grid; None: bone of a CT, foreground of an MRI.
        output: folder.
        seconds: most seconds of training for each network; None: 75.
        threshold: what is to be found in an image without a label is above this value; None: 300 Hounsfield units in
            a CT, Otsu's threshold in an MRI.
        seed: seed of the generated head, weights and drawn points.
        series: ``SeriesInstanceUID`` of a DICOM folder with several series.
        resample: interpolate uneven or tilted DICOM slices onto an even grid.
        voxels: most voxels of the grid.
        iterations: training steps of every network; None: as many as each is made for.

    Raises:
        InputError: on every bad input, in one line, before training starts.
    """
    target = check_output_folder(output, WRITTEN, image, label)
    seconds = SECONDS if seconds is None else seconds
    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds must be positive and finite, got {seconds:g}; leave it out for the default")
    console = Console()
    with console.status("reading the scan"):
        scan = load_scan(image, label, threshold, seed, series, resample, voxels)
    shape = " x ".join(map(str, scan.target.shape))
    console.print(f"{scan.name}: {shape} voxels, {scan.occupancy:.1%} active. {scan.task}", highlight=False)
    results = compare(scan, seconds, seed, lambda title: show_progress(console, title), iterations)
    with console.status("writing"), atomic_folder(target, WRITTEN, ("systems.json",)) as folder:
        (folder / "systems.png").write_bytes(montage(scan, results))
        (folder / "systems.html").write_text(make_page(scan, results, seed), encoding="utf-8")
        (folder / "systems.json").write_text(make_json(scan, results, seed), encoding="utf-8")
    console.print(make_table(scan, results))
    console.print("\n".join(sentences(scan, results, seed)), highlight=False)
    console.print(f"written to {target}: open {target / 'systems.html'}", highlight=False)


def load_scan(
    image: Path | None,
    label: Path | None,
    threshold: float | None = None,
    seed: int = 0,
    series: str | None = None,
    resample: bool = False,
    voxels: int = VOXELS,
) -> Scan:
    """Read a scan and its label, or generate a head CT with labels, onto the grid of the comparison.

    Raises:
        InputError: on every bad input.
    """
    if threshold is not None and (image is None or label is not None):
        raise InputError("labels say what is to be found: leave out --threshold, or give --image without --label")
    if image is None:
        if label is not None or series is not None or resample:
            raise InputError("a generated head has its own labels: give --image, or leave --label and --series out")
        return _generated(seed, voxels)
    with silent_readers():
        found = read_volume(image, series, resample)
        truth = None if label is None else read_volume(label)
    return prepare_scan(
        found.image, None if truth is None else truth.image, Path(image).name, threshold, voxels, notes=found.notes
    )


def _generated(seed: int, voxels: int) -> Scan:
    head = head_phantom((112, 136, 146), 1.65, seed)
    image, labels = (MetaTensor(v[None].float(), affine=head.affine) for v in (head.image, head.labels))
    names = {value: name for name, value in head.names.items()}
    return prepare_scan(image, labels, f"generated head (seed {seed})", voxels=voxels, names=names)
