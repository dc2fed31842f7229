"""One command for the day a GPU is there: sections in the order of their worth, rows written as soon as they are known.

    python tests/benchmarks/gpu_day.py --jsonl gpu_day.jsonl                 # everything, under ten minutes
    python tests/benchmarks/gpu_day.py --sections tests exact stream --minutes 3 --jsonl gpu_day.jsonl
    python tests/benchmarks/gpu_day.py --toy --jsonl rows.jsonl              # a dry run on a fake CUDA device, no times

A section begins only while its seconds are left; what fails is a row with its reason, and one that crashes, hangs or
leaves the device in an error ends its own process only. Peaks are those of torch's allocator above what was there
before; seconds are wall time with the device synchronized. The section `organs` needs the folder of
`nnunet_organs.py prepare`. The fake device cannot be captured in a graph, so the dry run of `exact` and `stream` is the
CPU's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.gpu_day_sections import SECTIONS, Day, Row  # noqa: E402 as a script it has another path
from tests.benchmarks.supervised import BEGINS, POISONED, supervise  # noqa: E402 as a script it has another path

GRACE = 15.0
"""Seconds beyond the minutes after which everything is stopped."""

CAPTURED = ("exact", "stream")
"""Sections whose networks are captured as a graph, which the fake device cannot."""


def fake_device() -> contextlib.AbstractContextManager[Any]:
    """The tests' CUDA device without a GPU."""
    from tests.fake_cuda import fake_cuda_device

    return fake_cuda_device()


def run_sections(day: Day, names: list[str], minutes: float, jsonl: Path) -> int:
    """Run the sections in order while time is left; the number of sections that failed."""
    end, failed = time.monotonic() + 60 * minutes, 0
    card = "fake CUDA device" if day.toy else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "python": ".".join(map(str, sys.version_info[:3]))}
    about = {"device": card, "date": datetime.date.today().isoformat(), **versions}
    for name in names:
        work, seconds = SECTIONS[name]
        if not day.toy and time.monotonic() + seconds > end:
            write(jsonl, {"section": name, **about, "skipped": f"less than {seconds} s left"})
            continue
        print(f"{BEGINS}{name}", flush=True)
        try:
            with fake_device() if day.toy and name not in CAPTURED else contextlib.nullcontext():
                for row in work(day):
                    write(jsonl, {"section": name, **about, **row, **about})  # a row may name its device in other words
        except Exception as error:  # the next section is worth running whatever this one met
            failed += 1
            where = re.sub(r"\s+", " ", "".join(traceback.format_tb(error.__traceback__)[-2:]))
            where = where.replace(f"{ROOT}{os.sep}", "")
            write(
                jsonl, {"section": name, **about, "error": f"{type(error).__name__}: {str(error)[:300]}", "at": where}
            )
            if not day.toy and is_poisoned():
                sys.exit(POISONED)
    return failed


def is_poisoned() -> bool:
    """Whether the device is in an error that only another process can leave; else what the section held is freed."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def supervise_sections(options: argparse.Namespace) -> int:
    """Run the sections in processes of their own, and write a row for each that ends its process."""

    def command(names: list[str], seconds: float) -> list[str]:
        script = [sys.executable, str(Path(__file__).resolve()), "--inside", "--jsonl", str(options.jsonl)]
        script += ["--organs", str(options.organs)] if options.organs else []
        script += ["--organs-seconds", str(options.organs_seconds)]
        return [*script, *(["--toy"] if options.toy else []), "--minutes", str(seconds / 60), "--sections", *names]

    def report(name: str, reason: str) -> None:
        write(options.jsonl, {"section": name, "error": reason})

    limits = {name: 2.0 * SECTIONS[name][1] for name in options.sections}
    return supervise(command, limits, 60 * options.minutes + GRACE, report)


def write(jsonl: Path, row: Row) -> None:
    """Append a row and show it."""
    line = json.dumps(row)
    with jsonl.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--jsonl", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a fake CUDA device")
    parser.add_argument("--organs", type=Path, help="folder that nnunet_organs.py has prepared")
    parser.add_argument("--organs-seconds", type=float, default=60.0, help="of each training")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.exit("this script needs a CUDA device, and torch finds none; --toy is a dry run on a fake one.")
    # A step that fills the card would fail for gaps between blocks of fixed sizes; read where torch is imported.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not options.inside:
        sys.exit(1 if supervise_sections(options) else 0)
    day = Day(torch.device("cuda"), options.toy, options.organs and options.organs.resolve(), options.organs_seconds)
    sys.exit(1 if run_sections(day, options.sections, options.minutes, options.jsonl) else 0)


if __name__ == "__main__":
    main()
