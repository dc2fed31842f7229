"""The command `memeff certify`: what runs, in which order, and what is written when all of it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from monai_memeff.data.folder import atomic_folder, check_output_folder
from monai_memeff.errors import InputError
from monai_memeff.hosts.certify.page import certificate_page
from monai_memeff.hosts.certify.sources.subject import Options, open_subject, read_label
from monai_memeff.hosts.certify.work import Work
from monai_memeff.hosts.run.offline import no_network
from monai_memeff.memory.size import bytes_of

JSON, HTML = "certificate.json", "certificate.html"
NOT_EXACT = 1


def certify(
    model: str,
    images: Sequence[Path],
    output: Path,
    labels: Sequence[Path] = (),
    partitions: int | None = None,
    budget: str | None = None,
    repeats: int = 10,
    whole: bool | None = None,
    options: Options | None = None,
) -> int:
    """Run one model on one volume whole, streamed and by sliding window, and write what differs.

    Args:
        model: folder of a MONAI bundle or of a trained nnU-Net model, or ``module:function`` of a network.
        images: one file or DICOM folder for each image that the model reads.
        output: folder of ``certificate.html`` and ``certificate.json``.
        labels: the true labels on the image's grid; where segments overlap, one file for each of them.
        partitions: parts of the streamed run, 8 unless a budget is given.
        budget: memory for activations instead, such as "8GiB".
        repeats: streamed runs that must be the same to the last bit.
        whole: whether the whole network runs; None where it fits.
        options: what else the user says about the model.

    Returns:
        Exit status: 0 where the streamed network is exact in labels, 1 where not, or where nothing is proven.

    Raises:
        InputError: nothing can be compared; nothing is written.

    Examples:
        >>> from pathlib import Path
        >>> certify("mybundle", [Path("ct.nii.gz")], Path("certificate"), budget="8GiB")  # doctest: +SKIP
        0
    """
    if repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {repeats}")
    if partitions is not None and (partitions < 1 or budget is not None):
        raise InputError(f"--partitions must be at least 1, and goes without --budget, got {partitions}")
    if not images:
        raise InputError("--image is needed: the file or DICOM folder that the model is run on")
    for path in (*images, *labels):
        if not path.exists():
            raise InputError(f"{path} does not exist")
    target = check_output_folder(output, [JSON, HTML], *images, *labels)
    if any((target / name).exists() for name in (JSON, HTML)):
        raise InputError(f"{output} holds a certificate already, and none is overwritten: give another --output")
    limit = None if budget is None else bytes_of(budget)
    with no_network():
        subject = open_subject(model, images, options or Options())
        truth = [read_label(file, subject.image) for file in labels]
        work = Work(subject, truth, partitions or (8 if limit is None else None), limit, repeats, whole)
        found, pictures = work(images, labels)
    text = json.dumps(found, indent=2, default=str) + "\n"
    page = certificate_page(found, pictures, hashlib.sha256(text.encode()).hexdigest())
    with atomic_folder(target, [JSON, HTML], last=[HTML]) as folder:
        (folder / JSON).write_text(text, encoding="utf-8")
        (folder / HTML).write_text(page.render(), encoding="utf-8")
    print(found["verdict"]["sentence"])
    print(f"wrote {output / HTML} and {JSON} beside it")
    return 0 if found["verdict"]["exact"] is True else NOT_EXACT
