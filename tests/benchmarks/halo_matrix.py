"""Runs every network of the matrix in all settings and writes the table of docs/systems/halo_networks.md.

OMP_NUM_THREADS=1 python tests/benchmarks/halo_matrix.py [--only UNet] [--write]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.halo.matrix import ENTRIES
from tests.halo.study import Row, study

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "halo_networks.md"
HEAD = """# Networks that run in parts

Each network, with random weights and tiny widths, was run whole and by `SpatialPartitionInferer`: every axis, and 2, 3
and 8 parts, in float64 (two networks know float32 alone), then once each with a store in a folder, a batch of two, and
float32. Two settings mean 3 parts of the first axis and 2 of the last alone. *Exact* means that the largest error is
below 1e-9 of the largest value in float64, 2e-4 in float32. *Whole* names operators that the plan runs on whole stored
tensors, because they look at the whole volume. `python tests/benchmarks/halo_matrix.py --write` makes this page;
`tests/halo/test_matrix.py` runs most of it.

| network | volume | settings | result | whole |
|---|---|---|---|---|
"""


def line(name: str, row: Row) -> str:
    """A row of the table."""
    volume = " x ".join(str(n) for n in ENTRIES[name].shape[2:])
    result = "exact" if not row.refused else ("refused: " if not row.exact else "in part: ") + _short(row.refused[0])
    return f"| {name} | {volume} | {row.exact + len(row.refused)} | {result} | {', '.join(row.whole)} |\n"


def _short(reason: str) -> str:
    return reason.replace("|", "/").split(" (/")[0][:160]


def main() -> None:
    """Run and print, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines, convolutional, exact, wrong = [], 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, entry in ENTRIES.items():
            if options.only not in name:
                continue
            began = time.process_time()
            try:
                row = study(entry, Path(folder))
            except AssertionError as error:
                wrong += 1
                print(f"WRONG {name}: {str(error)[:600]}", flush=True)
                continue
            lines.append(line(name, row))
            convolutional += entry.convolutional
            exact += entry.convolutional and not row.refused
            print(f"{lines[-1].strip()} {time.process_time() - began:.0f} CPU-seconds", flush=True)
    tail = f"\n{exact} of {convolutional} convolutional networks are exact in every setting.\n"
    print(tail, f"{wrong} wrong")
    if options.write and not wrong and not options.only:
        PAGE.write_text(HEAD + "".join(lines) + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
