"""Stock nnU-Net's prediction against lean prediction: memory of all processes, time, and voxels that differ.

    python tests/benchmarks/nnunet_lean.py --classes 3 16 61 --folds 1 5 --output 256 256 256 --record lean.jsonl
    python tests/benchmarks/nnunet_lean.py --record lean.jsonl --table

One line of JSON per cell; cells that the record has are not run again, and the table is made of the record. Models
have random weights and nnU-Net's own plans; the image is smooth noise. Memory is that of one process, by the system's
own figure (its largest resident set), or with workers the peak of the proportional set sizes of the process tree, seen
up to ten times a second. CPU seconds are of all processes.
With ``--lean-only`` stock is not run; its memory is then computed by the rule in :func:`stock_rule`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from nnunet_plugins import lean_prediction
from nnunet_plugins.lean.trial import TrialModel, predictor_of, write_image

GIB = 2**30


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 16, 61])
    parser.add_argument("--folds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=int, nargs=3, default=[256, 256, 256], help="voxels of the image")
    parser.add_argument("--scale", type=float, default=2.0, help="voxel size of the network's grid over the image's")
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64])
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16], help="of the network's stages")
    parser.add_argument("--mirroring", action="store_true")
    parser.add_argument("--workers", type=int, default=0, help="processes to preprocess, and to export; 0: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lean-only", action="store_true")
    parser.add_argument("--record", type=Path, help="file that lines are added to")
    parser.add_argument("--table", action="store_true", help="print the record as a table, and run nothing")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # what one process does: way, model, images
    return parser.parse_args()


def predict(way: str, model: str, images: str, options: argparse.Namespace) -> None:
    """Predict in this process, for which the parent looks at memory and time."""
    device = torch.device(options.device)
    predictor = predictor_of(Path(model), device=device, use_mirroring=options.mirroring)
    out = Path(images).parent / way
    out.mkdir(exist_ok=True)

    def run() -> None:
        if options.workers:
            predictor.predict_from_files(images, str(out), False, True, options.workers, options.workers)
        else:
            predictor.predict_from_files_sequential(images, str(out), False, True)

    started = time.time()
    if way == "lean":
        with lean_prediction():
            run()
    else:
        run()
    gpu = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    print("RESULT " + json.dumps({"seconds_without_imports": round(time.time() - started, 1), "gpu_gib": gpu}))


def measured(arguments: list[str]) -> dict[str, float]:
    """Run Python with arguments; returns GiB, wall and CPU seconds, and what it printed after RESULT.

    ``gib`` is of all processes, sampled; ``process_gib`` is the system's own figure for the largest of them.
    """
    started, peak = time.time(), 0
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen([sys.executable, *arguments], stdout=printed, stderr=subprocess.DEVNULL)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            looked = time.time()
            peak = max(peak, sum(memory_of(pid) for pid in tree(process.pid)))
            time.sleep(max(0.1, 9 * (time.time() - looked)))  # looking takes a tenth of the time at most
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        lines = printed.read().splitlines()
    assert process.returncode == 0, lines[-20:]
    found = json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))
    seconds = {"wall": round(time.time() - started, 1), "cpu": round(usage.ru_utime + usage.ru_stime, 1)}
    return {"gib": round(peak / GIB, 3), "process_gib": round(usage.ru_maxrss * 1024 / GIB, 3), **seconds, **found}


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in tree(int(child)))]


def memory_of(pid: int) -> int:
    """Proportional set size in bytes."""
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))


def stock_rule(classes: int, folds: int, voxels: int, output: int) -> float:
    """GiB that stock needs for logits, from measurements of nnunetv2 2.8.1.

    The larger of two moments: prediction, 5.1 bytes per voxel and class (7.1 with several folds), and export, 4.1 bytes
    per voxel of the image and class.
    """
    return max((7.1 if folds > 1 else 5.1) * classes * voxels, 4.1 * classes * output) / GIB


def described(classes: int, folds: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a cell is, without what is measured."""
    settings = ("scale", "patch", "features", "mirroring", "workers", "device")
    network = [round(extent / options.scale) for extent in options.output]
    sizes = {"classes": classes, "folds": folds, "network": network, "output": options.output}
    return sizes | {name: getattr(options, name) for name in settings}


def cell(classes: int, folds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model and image both ways."""
    labels = {"background": 0, **{f"label{number}": number for number in range(1, classes)}}
    model = TrialModel(
        labels,
        patch=options.patch,
        folds=folds,
        spacing=[options.scale] * 3,
        features=options.features,
        mirroring=(0, 1, 2) if options.mirroring else None,
    )
    found = described(classes, folds, options)
    voxels = math.prod(found["network"])
    found["rule_gib"] = round(stock_rule(classes, folds, voxels, math.prod(options.output)), 2)
    with tempfile.TemporaryDirectory(dir=os.environ.get("MEMEFF_NNUNET_TMP")) as name:
        folder = Path(name)
        model.write(folder / "model")
        write_image(folder / "images" / "a_0000.nii.gz", options.output)
        run = [__file__, *sys.argv[1:], "--run"]
        paths = [str(folder / "model"), str(folder / "images")]
        found["lean"] = measured([*run, "lean", *paths])
        if not options.lean_only:
            found["stock"] = measured([*run, "stock", *paths])
            stock, lean = (np.asarray(nibabel.load(folder / way / "a.nii.gz").dataobj) for way in ("stock", "lean"))
            found["voxels_that_differ"] = int((stock != lean).sum())
            found["labels_seen"] = len(np.unique(stock))
    return found


def recorded(file: Path | None) -> list[dict[str, Any]]:
    """The cells of a record."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def row(found: dict[str, Any]) -> str:
    """A cell as a row of the table."""
    size = " x ".join(map(str, found["network"])) + " to " + " x ".join(map(str, found["output"]))
    folds = f"{found['folds']}{', mirrored' if found['mirroring'] else ''}"
    lean, stock = found["lean"], found.get("stock")
    gib = "gib" if found["workers"] else "process_gib"
    start = f"| {found['classes']} | {size} | {folds} |"
    if stock is None:
        return f"{start} {found['rule_gib']} by the rule | {lean[gib]} | -, {lean['cpu']} | - |"
    return f"{start} {stock[gib]} | {lean[gib]} | {stock['cpu']}, {lean['cpu']} | {found['voxels_that_differ']} |"


def main() -> None:
    """Measure every cell, or print the table."""
    options = parsed()
    if options.run:
        predict(*options.run, options)
        return
    if options.table:
        print(
            "| classes | voxels | folds | stock, GiB | lean, GiB | CPU-seconds, stock and lean | voxels that differ |"
        )
        print("|---|---|---|---|---|---|---|", *map(row, recorded(options.record)), sep="\n")
        return
    for folds in options.folds:
        for classes in options.classes:
            known = described(classes, folds, options)
            if any(known.items() <= old.items() for old in recorded(options.record)):
                continue
            line = json.dumps(cell(classes, folds, options))
            print(line, flush=True)
            if options.record:
                with options.record.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
