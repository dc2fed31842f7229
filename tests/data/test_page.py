"""A page holds what it was given, escaped, in one file that loads nothing."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from monai_memeff.data.page import Page, Picture

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Seen(HTMLParser):
    """Tags, texts and addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_holds_what_it_was_given_and_loads_nothing() -> None:
    page = Page("Report <1>")
    page.paragraph("a & b", "good")
    page.heading("Section")
    page.facts({"file": "<script>alert(1)</script>"})
    page.table(["system", "Dice"], [["dense", "0.94"]])
    page.pictures([Picture(PNG, 'quote " and <tag>', 2.0)])
    page.text("line 1\n  line 2")
    seen = Seen(page.html())
    for text in ("Report <1>", "a & b", "Section", "<script>alert(1)</script>", "0.94", 'quote " and <tag>'):
        assert text in seen.texts
    assert "script" not in seen.tags
    assert all(address.startswith("data:") for address in seen.addresses)
    assert base64.b64decode(seen.addresses[-1].partition(",")[2]) == PNG


@pytest.mark.parametrize("text", ["null\0", "escape\x1b[31m", "undecodable\udcff"])
def test_what_no_page_may_hold_is_replaced(text: str, tmp_path: Path) -> None:
    page = Page(text)
    page.pictures([Picture(PNG, text, 1.0)])
    page.write(tmp_path / "page.html")
    assert "\N{REPLACEMENT CHARACTER}" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*"))
