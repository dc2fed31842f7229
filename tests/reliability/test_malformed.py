"""Hundreds of malformed images: refused in one line, or read as the image that they were made from."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from monai_memeff.apps.skull.demo.io import read_ct
from monai_memeff.data import read_volume
from monai_memeff.errors import InputError
from tests.reliability.malformed import AFFINE, KINDS, Case, shared_bad

pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")
pytest.importorskip("SimpleITK", reason="NRRD and MetaImage need SimpleITK")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
SECONDS = 20
DOCS = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A read that waits for ever ends in an error that names the test."""

    def stop(*_: object) -> None:
        raise TimeoutError("a read did not come back")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(case: Case) -> str:
    """What a reader makes of a case: "refused", "right" or "said"; anything else is a fault, named."""
    signal.alarm(SECONDS)
    try:
        volume = read_volume(case.path)
    except InputError as error:
        message = str(error)
        return "refused" if "\n" not in message and 20 < len(message) < 700 else f"refused badly: {message}"
    if case.whole is None:
        return "taken"
    values = volume.image.as_tensor().numpy()[0]
    if values.shape != case.whole.shape:
        return f"read with the shape {values.shape}"
    same = [np.array_equal(values, turned) for turned in (case.whole, case.whole[..., ::-1])]
    if any(same) and np.allclose(volume.image.affine, AFFINE, atol=0.02):
        return "right"
    return "said" if volume.notes else f"read with another content or affine {np.asarray(volume.image.affine).tolist()}"


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.slow
def test_no_traceback_no_hang_no_wrong_result(kind: str, tmp_path: Path) -> None:
    cases = list(KINDS[kind](tmp_path / "cases"))
    found = {case.name: outcome(case) for case in cases}
    faults = {name: what for name, what in found.items() if what not in ("refused", "right", "said")}
    assert not faults
    counts = {what: list(found.values()).count(what) for what in ("refused", "right", "said")}
    assert counts["refused"] > len(cases) / 10
    row = re.search(rf"^\| malformed: {re.escape(kind)} \| (\d+) \|", DOCS.read_text(encoding="utf-8"), re.M)
    assert row is not None, f"docs/reliability.md: | malformed: {kind} | {len(cases)} | {counts}"
    assert int(row.group(1)) == len(cases)


@pytest.mark.slow
def test_the_demo_refuses_them_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They are smaller than any head, so the demo takes none, however they are read."""
    for number, make in enumerate(KINDS.values()):
        for case in list(make(tmp_path / str(number)))[::3]:
            signal.alarm(SECONDS)
            with pytest.raises(InputError) as caught:
                read_ct(case.path)
            assert "\n" not in str(caught.value), case.name
    assert capfd.readouterr().err == ""


def test_files_that_others_met_are_refused(data_dir: Path) -> None:
    cases = list(shared_bad(data_dir))
    assert len(cases) >= 30
    assert {case.name: what for case in cases if (what := outcome(case)) != "refused"} == {}


def test_there_are_at_least_three_hundred(tmp_path: Path) -> None:
    rows = re.findall(r"^\| malformed: [^|]+ \| (\d+) \|", DOCS.read_text(encoding="utf-8"), re.M)
    assert sum(map(int, rows)) >= 300
    assert len(rows) == len(KINDS)
