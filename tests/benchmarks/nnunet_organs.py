"""Trainers of nnU-Net and of this package on OpenKBP at equal time and equal memory: Dice per organ, peaks, seconds.

Five organs at risk of the head and neck, 24 patients: 14 to train, 4 to choose settings on, 6 to test; who is where
stands in nnunet_organs_data.py. Every training gets the same seconds of a clock: CPU time of its process with one
thread, loading and augmentation included, or wall time on a GPU. The learning rate falls by nnU-Net's polynomial over
that time. Nobody mirrors, since two organs are a left and a right one. Memory is that of the plan of stock nnU-Net;
what a step really took is measured.

    python tests/benchmarks/nnunet_organs.py prepare --work W --data OPENKBP --crop 64 64 96 --plan-gb 0.25
    python tests/benchmarks/nnunet_organs.py run --work W --seconds 550 --seeds 0 1 --jsonl ROWS   # again: goes on
    python tests/benchmarks/nnunet_organs.py run --work W --seconds 550 --seeds 2 --jsonl ROWS --seconds-this-time 3600
    python tests/benchmarks/nnunet_organs.py table --jsonl ROWS

Every finished training appends a row; rows of other machines and settings may be added to the same file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import nnunet_organs_data as data
from tests.benchmarks import nnunet_organs_rows as rows
from tests.benchmarks.nnunet_organs_table import table


def main() -> None:
    """Run one command."""
    options = arguments()
    COMMANDS[options.command](options)


def prepare(options: argparse.Namespace) -> None:
    """Write, plan and preprocess the dataset."""
    data.prepare(options.work.resolve(), options.data, options.crop, options.plan_gb)


def run(options: argparse.Namespace) -> None:
    """Train what has no row yet, one after the other, each in a process of its own."""
    left = options.seconds_this_time
    for seed, trainer in itertools.product(options.seeds, options.trainers):
        options.seed, options.trainer = seed, trainer
        if left > 0 and not rows.is_done(options):
            left -= piece(options, left)


def piece(options: argparse.Namespace, left: float) -> float:
    """Run the command `train` in a process of its own; returns the seconds it used."""
    words = ["train", "--work", options.work, "--trainer", options.trainer, "--seed", options.seed]
    words += ["--seconds", options.seconds, "--settings", json.dumps(options.settings), "--device", options.device]
    words += ["--jsonl", options.jsonl, "--seconds-this-time", left]
    if options.iterations is not None:
        words += ["--iterations", options.iterations]
    file = options.work / "log.txt"
    with file.open("a") as log:
        done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, stderr=log)
    if done.returncode:
        raise SystemExit(f"{options.trainer}, seed {options.seed}: status {done.returncode}, see {file}.")
    return float(done.stdout.split()[-1])


def train(options: argparse.Namespace) -> None:
    """Train one piece, and append a row if that was the last; the last word printed is the seconds used."""
    with (options.work / "log.txt").open("a") as log:
        from tests.benchmarks import nnunet_organs_piece

        used = nnunet_organs_piece.train(options, log)
    print(used)


def show(options: argparse.Namespace) -> None:
    """Print the tables of the rows."""
    print(table(rows.read(options.jsonl)))


COMMANDS = {"prepare": prepare, "run": run, "train": train, "table": show}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, many, one, last = (commands.add_parser(name, help=COMMANDS[name].__doc__) for name in COMMANDS)
    first.add_argument("--data", type=Path, required=True, help="the OpenKBP folder")
    first.add_argument("--crop", type=int, nargs=3, help="box around the organs in voxels; default: the whole image")
    first.add_argument("--plan-gb", type=float, default=8, help="memory that nnU-Net plans for")
    many.add_argument("--trainers", nargs="+", choices=list(rows.RECIPES), default=list(rows.RECIPES), metavar="NAME")
    many.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--trainer", choices=list(rows.RECIPES), required=True)
    one.add_argument("--seed", type=int, default=0)
    for command in (many, one):
        command.add_argument("--seconds", type=float, default=550, help="of each training")
        command.add_argument("--iterations", type=int, help="in the place of seconds: a budget that no clock disturbs")
        command.add_argument("--settings", type=json.loads, default={}, help="JSON, goes on top of the recipe's")
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        command.add_argument("--seconds-this-time", type=float, default=float("inf"), help="then stop, to go on later")
    for command in (first, many, one):
        command.add_argument("--work", type=Path, required=True, help="folder for data, plans and checkpoints")
    for command in (many, one, last):
        command.add_argument("--jsonl", type=Path, required=True, help="the rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
