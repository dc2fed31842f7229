"""Draws halo_streaming.svg: a network's U cut into tiles, what is stored and what flies.

python docs/images/halo_streaming.py
"""

from __future__ import annotations

from pathlib import Path

LEVELS = [(40, 40, 200), (150, 80, 140), (260, 120, 90), (370, 80, 140), (480, 40, 200)]  # x, top, height
NAMES = ["level 1", "level 2", "bottom", "level 2", "level 1"]
TILES = [8, 4, 2, 4, 8]


def text(x: float, y: float, words: str, size: int = 12, color: str = "#222") -> str:
    """Words, centered."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="middle">{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    """An arrow."""
    return f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{color}" stroke-width="2" fill="none" marker-end="url(#tip)"/>'


def drawing() -> str:
    """The picture."""
    found = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 400" font-family="sans-serif">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0 0 L7 3 L0 6 z" fill="#555"/></marker></defs>',
        '<rect width="620" height="400" fill="white"/>',
        text(310, 22, "whole tensors in the store, cut into tiles", 14),
    ]
    for (x, top, height), name, tiles in zip(LEVELS, NAMES, TILES, strict=True):
        found.append(f'<rect x="{x}" y="{top}" width="70" height="{height}" fill="#dce8f5" stroke="#456"/>')
        for i in range(1, tiles):
            y = top + height * i / tiles
            found.append(f'<path d="M{x} {y} H{x + 70}" stroke="#456" stroke-dasharray="3 3"/>')
        found.append(text(x + 35, top + height + 16, f"{name}, {tiles} tiles", 11))
    # one tile of the second tensor and the rows of the first under its kernel
    found.append('<rect x="40" y="84" width="70" height="62" fill="#f2b366" opacity="0.55"/>')
    found.append('<rect x="40" y="90" width="70" height="50" fill="#e07b1a" opacity="0.75"/>')
    found.append('<rect x="150" y="115" width="70" height="35" fill="#e07b1a" opacity="0.85"/>')
    found.append('<rect x="190" y="300" width="240" height="70" rx="8" fill="#eef5ea" stroke="#575"/>')
    found += [
        text(310, 320, "device: one tile at a time", 13),
        text(310, 340, "rows under the kernel, norm and activation", 11),
        text(310, 356, "applied to them, the convolution", 11),
        arrow(75, 146, 200, 298, "#c55"),
        text(98, 290, "rows read", 11, "#a33"),
        arrow(300, 300, 195, 152, "#393"), text(290, 262, "tile written", 11, "#262"),
        arrow(432, 335, 520, 335, "#555"), text(560, 330, "moments of the", 11),
        text(560, 345, "next norm: a sum", 11),
        text(560, 360, "over all tiles", 11), arrow(110, 52, 478, 52, "#999"),
        text(310, 47, "skip connection: stays in the store", 11, "#777"),
        text(190, 385, "dark: the tile's rows; light: margin under the kernel", 10, "#666"), "</svg>",
    ]  # fmt: skip
    return "\n".join(found) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), encoding="utf-8")
