"""Writing a folder of files that belong together: all of them or none, and never over what they are made from."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from monai_memeff.data.atomic import check_other_file
from monai_memeff.errors import InputError


def check_output_folder(
    output: str | os.PathLike[str], names: Sequence[str], *sources: str | os.PathLike[str] | None
) -> Path:
    """Refuse a folder that cannot be written, before any work starts.

    Args:
        output: the folder.
        names: files that will be written there.
        sources: what is read (None: nothing); nothing is written over it, nor into the folder of a series.

    Returns:
        The absolute path.

    Raises:
        InputError: when it is a file, it or the nearest folder above it cannot be written, or it holds a source.

    Example::

        target = check_output_folder("out", ["report.json"], "head.nii.gz")
    """
    path = Path(output).expanduser().absolute()
    for source in (Path(given).expanduser().resolve() for given in sources if given is not None):
        if source.is_dir() and path.resolve().is_relative_to(source):
            raise InputError(f"output {path} lies in the image's own folder: give another --output")
        for name in names:
            check_other_file(path / name, source)
    above = next(p for p in (path, *path.parents) if p.exists())
    if not above.is_dir():
        raise InputError(f"output {path} needs a folder, but {above} is a file: give another --output")
    if not _takes_files(above):
        raise InputError(f"output {path} cannot be written, {above} allows no new files: give another --output")
    return path


def _takes_files(folder: Path) -> bool:
    """Whether a new folder can be made there; permissions alone do not say it of special and full file systems."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder):
            return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


@contextlib.contextmanager
def atomic_folder(output: Path, names: Sequence[str], last: Sequence[str]) -> Iterator[Path]:
    """Files written into the folder that this gives appear in ``output`` when all is done, and never when it fails.

    Args:
        output: made when it does not exist; what an earlier run wrote there goes away, other files stay.
        names: files that a run may write.
        last: those of them that go first and come last: where one stands, the files beside it belong to it.

    Example::

        with atomic_folder(Path("out"), ["picture.png", "report.json"], last=["report.json"]) as work:
            (work / "report.json").write_text("{}")
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield work
        work.chmod(0o755)
        if output.exists():
            for name in sorted(names, key=lambda name: name not in last):
                (output / name).unlink(missing_ok=True)
            for file in sorted(work.iterdir(), key=lambda file: file.name in last):
                os.replace(file, output / file.name)
        else:
            os.replace(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
