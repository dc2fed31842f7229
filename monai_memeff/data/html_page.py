"""One self-contained HTML page: headings, sentences, tables and pictures in one file that loads nothing."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from html import escape as escape_markup

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What no page may hold: control characters, and the halves of characters that undecodable file names leave."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #667; }
@media (prefers-color-scheme: dark) { :root { --quiet: #99a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 4rem; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
p.verdict { max-width: none; font-size: 1.05rem; padding: .75rem 1rem; border-left: .35rem solid var(--quiet);
  background: var(--soft); }
p.good { border-color: #1a7f4b; } p.bad { border-color: #c0392b; } p.open { border-color: #c28a00; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto;
  font: .8rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0 1rem; }
figure { margin: 1rem 0; }
.pictures figure { margin: .5rem 0; }
.pictures img { width: 100%; }
img { display: block; max-width: 100%; height: auto; border-radius: .3rem; }
figcaption, caption { color: var(--quiet); font-size: .9rem; text-align: left; padding: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 600; background: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; }
.words td { text-align: left; overflow-wrap: anywhere; }
.words thead th { text-align: left; }
@media (max-width: 45rem) {
  table, caption, tbody, tr, th, td { display: block; width: 100%; }
  thead { display: none; }
  tbody tr { border: 1px solid var(--line); border-radius: .4rem; margin: .7rem 0; overflow: hidden; }
  tbody th { background: var(--soft); }
  td, .words td { display: flex; gap: 1rem; justify-content: space-between; border-bottom: 0; padding: .2rem .6rem; }
  td::before { content: attr(data-column); color: var(--quiet); text-align: left; }
  .words td { display: block; } .words td::before { display: block; font-size: .85rem; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class HtmlPage:
    """A page that is written from top to bottom; every text is escaped, and the page is one file without scripts.

    Args:
        title: heading, and the name of the browser's tab.

    Example::

        page = HtmlPage("What was measured")
        page.sentences("One scan, one run.")
        page.table(("system", "seconds"), [("halo", "3.1")])
        Path("page.html").write_text(page.render(), encoding="utf-8")
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def sentences(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        self._parts += [f"<p>{escape(text)}</p>" for text in paragraphs]

    def verdict(self, text: str, kind: str) -> None:
        """Add a paragraph that stands out: kind is "good", "bad" or "open"."""
        self._parts.append(f'<p class="verdict {escape(kind)}">{escape(text)}</p>')

    def text(self, text: str) -> None:
        """Add text with its lines and spaces as they are."""
        self._parts.append(f'<pre tabindex="0">{escape(text)}</pre>')

    def items(self, texts: Sequence[str]) -> None:
        """Add a list with a dot before every text."""
        self._parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", words: bool = False
    ) -> None:
        """Add a table; on a narrow screen every row is a card.

        Args:
            columns: names of the columns; the first one names the rows.
            rows: as many texts each as there are columns.
            caption: what the table shows.
            words: cells hold sentences, not numbers, and begin at the left.

        Raises:
            ValueError: a row has more or fewer texts than there are columns.
        """
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
        body = "".join(f"<tr>{_cells(columns, row)}</tr>" for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        kind = ' class="words"' if words else ""
        self._parts.append(f"<table{kind}>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, png: bytes, description: str, caption: str = "") -> None:
        """Add a PNG, which becomes a part of the page.

        Args:
            png: content of the file.
            description: what the picture shows, for those who cannot see it.
            caption: line below it.

        Raises:
            ValueError: the bytes are no PNG.
        """
        self._parts.append(self._figure(png, description, caption))

    def pictures(self, pictures: Sequence[tuple[bytes, str, str]]) -> None:
        """Add pictures (see :meth:`picture`) side by side, and one below the other where the window is narrow."""
        figures = "".join(self._figure(*picture) for picture in pictures)
        self._parts.append(f'<div class="pictures">{figures}</div>')

    def _figure(self, png: bytes, description: str, caption: str) -> str:
        if png[:8] != b"\x89PNG\r\n\x1a\n":
            raise ValueError(f"a picture must be a PNG, got bytes that begin with {png[:8]!r}")
        width, height = struct.unpack(">II", png[16:24])
        code = base64.b64encode(png).decode("ascii")
        image = (
            f'<img src="data:image/png;base64,{code}" width="{width}" height="{height}" alt="{escape(description)}">'
        )
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return f"<figure>{image}{below}</figure>"

    def render(self) -> str:
        """The whole page as text, to be written as UTF-8."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style>"
        )
        body = "\n".join(self._parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def escape(text: str) -> str:
    """Text as it may stand anywhere in a page."""
    return escape_markup(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _cells(columns: Sequence[str], row: Sequence[str]) -> str:
    if len(row) != len(columns):
        raise ValueError(f"a row must have {len(columns)} cells, one for each column, got {len(row)}")
    first = f'<th scope="row">{escape(row[0])}</th>'
    named = zip(columns[1:], row[1:], strict=True)
    return first + "".join(f'<td data-column="{escape(name)}">{escape(text)}</td>' for name, text in named)
