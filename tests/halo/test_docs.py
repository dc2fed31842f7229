"""The pages about halo say what the rules and the matrix say."""

from __future__ import annotations

from pathlib import Path

from tests.halo.matrix import ENTRIES
from tests.halo.operator_table import PAGE, rows


def test_the_table_of_operators_is_that_of_the_rules() -> None:
    """An older torch lacks some operators: what it has is on the page, in the row of its family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for (family, how), names in rows().items():
        (line,) = [text for text in lines if text.startswith(f"| {family} |") and text.endswith(f"| {how} |")]
        assert [n for n in names if f"`{n}`" not in line] == []


def test_the_page_lists_every_network() -> None:
    text = (Path(PAGE).parent / "halo_networks.md").read_text(encoding="utf-8")
    assert [n for n in ENTRIES if f"| {n} |" not in text] == []
