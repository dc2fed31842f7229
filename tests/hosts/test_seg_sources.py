"""What a DICOM SEG refers to: numbers that a series lacks are taken from the heads of its files, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monai_memeff.errors import InputError
from monai_memeff.hosts.run.output.dicom_seg import sources_of
from tests.faults.dicom_files import CT_IMAGE, numbers, write_series

pytest.importorskip("highdicom", reason="DICOM SEG needs highdicom")


def _emptied(folder: Path, *keywords: str) -> Path:
    def change(_: int, data: Any) -> None:
        for keyword in keywords:
            setattr(data, keyword, "")

    write_series(folder, numbers(), change=change)
    return folder


def test_numbers_of_an_instance_are_those_of_its_files_head(tmp_path: Path) -> None:
    images = sources_of(_emptied(tmp_path / "s", "SOPClassUID", "SOPInstanceUID"), None).images
    assert {image.SOPClassUID for image in images} == {CT_IMAGE}
    assert sorted(image.SOPInstanceUID for image in images) == sorted(f"1.2.3.1.{k + 1}" for k in range(len(images)))


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
def test_a_series_without_what_a_seg_refers_to_is_refused(keyword: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no {keyword}, which a DICOM SEG refers to.*--format nifti") as caught:
        sources_of(_emptied(tmp_path / "s", keyword), None)
    assert "\n" not in str(caught.value)
