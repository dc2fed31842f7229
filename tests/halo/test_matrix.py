"""The networks of MONAI and nnU-Net in parts: exact, or refused by module and operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.halo.matrix import ENTRIES
from tests.halo.study import study


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.fast])
@pytest.mark.long
def test_networks_in_parts(name: str, tmp_path: Path) -> None:
    row = study(ENTRIES[name], tmp_path, [(0, 3)], more=False)
    assert row.exact == 1, row.refused


@pytest.mark.long
@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e.slow])
def test_more_networks_in_more_settings(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    row = study(entry, tmp_path, [(0, 8), (len(entry.shape) - 3, 2)], more=False)
    assert not row.refused or not entry.convolutional, row.refused
