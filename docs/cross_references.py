"""A hook of mkdocs: roles in docstrings, such as ``:class:`SparseTensor```, become links on the pages of the API."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

ROLE = re.compile(r":(?:class|data|func|meth):<code>~?([\w.]+)</code>")
ANCHOR = re.compile(r'<h[2-6] id="([\w.]+)"')


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The page with a link for every role whose object is on it, and its bare name for the others."""
    anchors = {anchor.rpartition(".")[2]: anchor for anchor in ANCHOR.findall(html)}
    several = Counter(anchor.rpartition(".")[2] for anchor in ANCHOR.findall(html))

    def link(role: re.Match[str]) -> str:
        last = role[1].rpartition(".")[2]
        shown = f"<code>{last if role[1].startswith('monai_memeff.') else role[1]}</code>"
        return f'<a href="#{anchors[last]}">{shown}</a>' if several[last] == 1 else shown

    return ROLE.sub(link, html).replace("::</p>", ":</p>")
