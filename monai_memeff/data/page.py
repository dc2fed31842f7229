"""One self-contained HTML page: text, tables and pictures in a file that needs no script, no network and no folder."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from monai_memeff.data.atomic import atomic_write

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: a browser that finds anything outside the page refuses to load it."""

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What no page may hold: control characters, and the halves of characters that undecodable file names leave."""

STYLE = """
:root { color-scheme: light; --ink: #1c2733; --quiet: #5b6875; --line: #d5dde4; --good: #17643a; --bad: #a3231a;
  --open: #8a5a00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1.25rem 3rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p { margin: .5rem 0; max-width: 46rem; }
.verdict { border-left: .35rem solid var(--quiet); background: #f4f6f8; padding: .75rem 1rem; font-size: 1.05rem;
  max-width: none; }
.good { border-color: var(--good); } .bad { border-color: var(--bad); } .open { border-color: var(--open); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-weight: 600; }
tbody th { font-weight: 400; color: var(--quiet); }
.facts tbody th { width: 13rem; }
code, pre { font: .85em/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f4f6f8; padding: .75rem; overflow-x: auto; overflow-wrap: normal; margin: .5rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; margin: .75rem 0; }
figure { margin: 0; } figcaption { color: var(--quiet); font-size: .9rem; }
img { display: block; max-width: 100%; margin: 0 auto; background: #000; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 2rem; font-size: 15px; } h1 { font-size: 1.3rem; }
  th, td { padding-right: .5rem; } table { font-size: .87rem; } .facts tbody th { width: 34%; }
  .pictures { grid-template-columns: 1fr; } }
@media print { body { max-width: none; } pre { white-space: pre-wrap; } }
"""


class Picture(NamedTuple):
    """A PNG, the sentence below it, and its width over its height as it is to be seen."""

    png: bytes
    caption: str
    ratio: float


class Page:
    """A page that is filled from top to bottom; every text is escaped, so none of it can become markup.

    Args:
        title: what stands at the top and in the browser's tab.

    Example::

        page = Page("Report")
        page.paragraph("All is well.", "good")
        page.table(["system", "Dice"], [["dense", "0.94"]])
        page.write("report.html")
    """

    def __init__(self, title: str) -> None:
        self.root = Element("html", lang="en")
        head = SubElement(self.root, "head")
        SubElement(head, "meta", charset="utf-8")
        SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": POLICY})
        SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
        SubElement(head, "link", rel="icon", href="data:,")
        _text(SubElement(head, "title"), title)
        SubElement(head, "style").text = STYLE
        self.body = SubElement(self.root, "body")
        _text(SubElement(self.body, "h1"), title)

    def heading(self, text: str) -> None:
        """Begin a section."""
        _text(SubElement(self.body, "h2"), text)

    def paragraph(self, text: str, kind: str = "") -> None:
        """Add a paragraph; with a kind ("good", "bad", "open") it stands out as a verdict."""
        _text(SubElement(self.body, "p", {"class": f"verdict {kind}"} if kind else {}), text)

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add a table of names and values."""
        self._rows([[name, str(value)] for name, value in facts.items()], None, "facts")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table whose first column names the rows."""
        self._rows(rows, header, "table")

    def text(self, text: str) -> None:
        """Add text with its lines and spaces as they are."""
        _text(SubElement(self.body, "pre"), text)

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Add pictures side by side; one below the other where the window is narrow."""
        block = SubElement(self.body, "div", {"class": "pictures"})
        for picture in pictures:
            figure = SubElement(block, "figure")
            source = "data:image/png;base64," + base64.b64encode(picture.png).decode("ascii")
            style = f"aspect-ratio: {picture.ratio:.4f}; width: 100%"
            SubElement(figure, "img", src=source, alt=_clean(picture.caption), style=style)
            _text(SubElement(figure, "figcaption"), picture.caption)

    def html(self) -> str:
        """The whole page as text."""
        return "<!DOCTYPE html>\n" + tostring(self.root, encoding="unicode", method="html") + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        with atomic_write(path) as work:
            work.write_text(self.html(), encoding="utf-8")

    def _rows(self, rows: Sequence[Sequence[str]], header: Sequence[str] | None, kind: str) -> None:
        table = SubElement(SubElement(self.body, "div", {"class": "scroll"}), "table", {"class": kind})
        if header is not None:
            line = SubElement(SubElement(table, "thead"), "tr")
            for word in header:
                _text(SubElement(line, "th", scope="col"), word)
        body = SubElement(table, "tbody")
        for first, *values in rows:
            line = SubElement(body, "tr")
            _text(SubElement(line, "th", scope="row"), first)
            for value in values:
                _text(SubElement(line, "td"), value)


def _text(element: Element, text: str) -> None:
    element.text = _clean(text)


def _clean(text: str) -> str:
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
