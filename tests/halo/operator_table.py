"""The table of operators of docs/systems/halo_operators.md, made from the rules.

python -m tests.halo.operator_table
"""

from __future__ import annotations

from pathlib import Path

from monai_memeff.halo.planning.rules import RULES
from monai_memeff.halo.planning.rules.table import EXPANDERS

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "halo_operators.md"
HEAD = """# Operators that run in parts

Made from the rules by `python -m tests.halo.operator_table`; a test compares it with them. Besides the operators below,
every operator that torch tags as pointwise runs row for row. An operator without a row, or called in a way that its
row cannot treat (a softmax along the cut axis, say), runs whole on stored tensors; one that draws random numbers, has a
side effect or a size that depends on the data is refused by name.

| family | operators | how rows are made |
|---|---|---|
"""
APART = "taken apart into simpler operators before rules are looked up"


def _name(target: object) -> str:
    return str(target).removeprefix("aten.").split(".")[0] if not isinstance(target, str) else target


def rows() -> dict[tuple[str, str], list[str]]:
    """(family, how) -> operators."""
    found: dict[tuple[str, str], set[str]] = {}
    for target, rule in RULES.items():
        found.setdefault((rule.family, rule.note), set()).add(_name(target))
    for target in EXPANDERS:
        found.setdefault(("expanded", APART), set()).add(_name(target))
    return {key: sorted(names) for key, names in sorted(found.items())}


def page() -> str:
    """The whole page."""
    lines = [
        f"| {family} | {', '.join(f'`{n}`' for n in names)} | {how} |\n" for (family, how), names in rows().items()
    ]
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
