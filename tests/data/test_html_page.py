"""The page: whole in one file, every text escaped, rows that fit their columns."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest

from monai_memeff.data.html_page import HtmlPage

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAADCAYAAAC56t6BAAAAFUlEQVR4nGNkYGD4zwAFTAxAACZQGADm2QEGmW3pJgAAAABJRU5ErkJggg=="
)


class Tags(HTMLParser):
    """Collects tags, and sees to it that all are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: HtmlPage) -> Tags:
    tags = Tags()
    tags.feed(page.render())
    assert not tags.open
    return tags


def test_everything_is_in_one_file_and_nothing_runs() -> None:
    page = HtmlPage("What <b>was</b> measured & found")
    page.heading("Numbers")
    page.sentences("One <script>alert(1)</script> scan.", "And another.")
    page.items(["a < b", "c"])
    page.table(("system", "sec & s"), [("<i>halo</i>", '3"')], caption="times")
    page.picture(PNG, 'a "picture"', "below")
    tags = parsed(page)
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names
    assert names.count("p") == names.count("li") == 2
    assert "<script>alert(1)</script> scan." in tags.text
    assert "<i>halo</i>" in tags.text
    for name, given in tags.seen:
        assert not (given.get("src") or "data:").startswith("http"), name
        assert (given.get("href") or "data:,") == "data:,"
    image = next(given for tag, given in tags.seen if tag == "img")
    assert image["alt"] == 'a "picture"'
    assert (image["width"], image["height"]) == ("2", "3")
    assert base64.b64decode(str(image["src"]).partition(",")[2]) == PNG
    assert next(given for tag, given in tags.seen if tag == "td")["data-column"] == "sec & s"


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells, one for each column, got 1"):
        HtmlPage("t").table(("a", "b"), [("1",)])
    with pytest.raises(ValueError, match="must be a PNG"):
        HtmlPage("t").picture(b"GIF89a", "picture")
