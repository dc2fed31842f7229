"""Every overlay on six bundles of the model zoo: what docs/overlays.md says is what happens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from monai_memeff.overlays import overlay_names
from tests.hosts.overlay_table import read_table, table
from tests.hosts.verdicts import TRIED, verdict
from tests.hosts.zoo import SHRUNK, prepare, scripts_of_the_zoo

TABLE = read_table()
LONG = ("halo",)
"""Overlays whose trial starts processes."""
LONGER = (
    "swin_unetr_btcv_segmentation-halo_inference",
    "swin_unetr_btcv_segmentation-occupancy",
    "wholeBody_ct_segmentation-occupancy",
)


def cases() -> Iterator[object]:
    for bundle in SHRUNK:
        for overlay in TRIED:
            name = f"{bundle}-{overlay}"
            slow = [pytest.mark.exhaustive] if overlay in LONG or name in LONGER else []
            yield pytest.param(bundle, overlay, id=name, marks=slow)


@pytest.fixture(scope="module")
def roots(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The bundles, made small."""
    folder = tmp_path_factory.mktemp("zoo")
    with scripts_of_the_zoo():
        yield {name: prepare(data_dir / "model_zoo" / name, folder) for name in SHRUNK}


@pytest.mark.parametrize(("bundle", "overlay"), list(cases()))
@pytest.mark.long
def test_the_table_says_what_happens(bundle: str, overlay: str, roots: dict[str, Path]) -> None:
    assert verdict(roots[bundle], overlay) == TABLE[bundle, overlay]


def test_the_table_is_complete_and_reads_back() -> None:
    assert {overlay for _, overlay in TABLE} == set(TRIED) <= set(overlay_names())
    assert {bundle for bundle, _ in TABLE} == set(SHRUNK)
    assert table(TABLE).count("\n") > len(SHRUNK)
    for (_, overlay), words in TABLE.items():
        assert words.startswith(("works: ", "refused: ")), overlay
