"""The table in docs/overlays.md: `python -m tests.hosts.overlay_table` tries all overlays and writes it."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from monai_memeff.overlays import overlay_names
from tests.hosts.verdicts import TRIED, verdict
from tests.hosts.zoo import SHRUNK, prepare, scripts_of_the_zoo

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "overlays.md"
BEGIN, END = "<!-- begin: tests/hosts/overlay_table.py -->", "<!-- end -->"

Verdicts = Mapping[tuple[str, str], str]


def table(verdicts: Verdicts) -> str:
    """Bundles down, overlays across; numbers say what was compared or why not."""
    overlays = [name for name in overlay_names() if any(overlay == name for _, overlay in verdicts)]
    notes = list(dict.fromkeys(verdicts.values()))
    lines = [f"| bundle | {' | '.join(f'`{name}`' for name in overlays)} |", "|---" * (len(overlays) + 1) + "|"]
    for bundle in sorted({bundle for bundle, _ in verdicts}):
        cells = [verdicts[bundle, overlay] for overlay in overlays]
        marks = [f"{'yes' if cell.startswith('works') else 'no'} ({notes.index(cell) + 1})" for cell in cells]
        lines.append(f"| {bundle} | {' | '.join(marks)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def read_table() -> dict[tuple[str, str], str]:
    """The verdicts that the page holds."""
    inside = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    notes = {int(number): note for number, note in re.findall(r"^(\d+)\. (.*)$", inside, re.MULTILINE)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if "|" in line]
    overlays = [name.strip("`") for name in rows[0][1:]]
    return {
        (row[0], overlay): notes[int(cell.partition("(")[2].rstrip(")"))]
        for row in rows[2:]
        for overlay, cell in zip(overlays, row[1:], strict=True)
    }


def main(*only: str) -> None:
    """Try all overlays, or those that are named, and write the page."""
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    verdicts = read_table() if only else {}
    zoo = ROOT.parent / "shared" / "data" / "model_zoo"
    with tempfile.TemporaryDirectory() as folder, scripts_of_the_zoo():
        for bundle in sorted(SHRUNK):
            root = prepare(zoo / bundle, Path(folder))
            for overlay in only or TRIED:
                verdicts[bundle, overlay] = verdict(root, overlay)
                print(bundle, overlay, verdicts[bundle, overlay], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(verdicts)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
