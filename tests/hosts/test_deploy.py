"""Series that the reader of MONAI Deploy's SDK changes without a word are refused before its example starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from monai_memeff.errors import InputError
from monai_memeff.hosts.deploy import require_deploy_reads
from tests.faults.dicom_files import numbers, write_series

SQUARE = (0.8, 0.8, 1.5)


def test_a_series_that_the_sdk_reads_right_passes(tmp_path: Path) -> None:
    write_series(tmp_path, numbers(), SQUARE)
    require_deploy_reads(tmp_path)
    positive = tmp_path / "positive"
    write_series(positive, np.abs(numbers()) + np.int16(1), SQUARE)
    require_deploy_reads(positive)


def test_pixels_that_are_not_square_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, numbers(), (0.8, 0.7, 1.5))
    with pytest.raises(InputError, match=r"pixels of 0\.8 x 0\.7 mm.* swaps the two: use memeff run"):
        require_deploy_reads(tmp_path)


@pytest.mark.parametrize("end", [0, -1])
def test_negative_values_behind_a_first_slice_without_any_are_refused(end: int, tmp_path: Path) -> None:
    volume = numbers()
    volume[..., end] = np.abs(volume[..., end]) + 1
    write_series(tmp_path, volume, SQUARE)
    with pytest.raises(InputError, match=r"the type of its first slice \(uint16\) does not hold"):
        require_deploy_reads(tmp_path)


def test_a_series_that_is_no_regular_stack_is_refused_here_too(tmp_path: Path) -> None:
    write_series(tmp_path, numbers(), SQUARE, keep=[0, 1, 2, 4, 5, 6])
    with pytest.raises(InputError, match="missing"):
        require_deploy_reads(tmp_path)


def test_the_example_calls_the_check_before_it_joins_operators() -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto" / "deploy_app.py").read_text(encoding="utf-8")
    assert text.index("        require_deploy_reads(source)") < text.index("loader = DICOMDataLoaderOperator(")
