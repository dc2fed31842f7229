"""A training step of the skull completion network on a generated skull, in one engine: seconds and peak on a GPU.

    python tests/benchmarks/sparse_step.py --engine native
    python tests/benchmarks/sparse_step.py --engine triton --edges 128 --tuned --jsonl rows.jsonl

Every row is written as soon as it is known. A step is everything that a new volume costs: voxel sets, kernel maps,
network, loss and gradients. Without ``--tuned`` triton takes its first choice of block sizes, as what it chooses from
would take longer to compile than all steps here. ``first_seconds`` are those of an edge's first step, with what is
compiled in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

EDGES = (64, 128, 256)
WARM_UP_STEPS, STEPS = 2, 5


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--edges", nargs="+", type=int, default=list(EDGES))
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--jsonl", type=Path)
    options = parser.parse_args()
    if not options.tuned:
        os.environ.setdefault("MEMEFF_TUNING_CACHE", "off")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none.")
    for row in measured(options.engine, options.edges, torch.device("cuda")):
        line = json.dumps(row | {"tuned": options.tuned})
        print(line, flush=True)
        if options.jsonl:
            with options.jsonl.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def measured(engine: str, edges: list[int], device: torch.device, dry: bool = False) -> Iterator[dict[str, Any]]:
    """A row for every edge, up to the first that the engine cannot do; of a dry run without numbers of the device."""
    from monai_memeff.sparse import backends

    try:
        backends.use(engine)
        for edge in edges:
            yield {"engine": engine, "edge": edge, **_of_edge(edge, device, dry)}
    except Exception as error:  # a library fails in its own ways
        yield {"engine": engine, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    finally:
        backends.use(None)


def _of_edge(edge: int, device: torch.device, dry: bool) -> dict[str, Any]:
    from monai_memeff.apps.skull.phantom import HEAD_LABELS, head_phantom
    from monai_memeff.sparse import SparseCompletionLoss, SparseCompletionNet

    head = head_phantom((edge, edge, edge), 256 / edge)
    skull = (head.labels == HEAD_LABELS["skull"]).float()[None, None].to(device)
    torch.manual_seed(0)
    network, loss = SparseCompletionNet().to(device), SparseCompletionLoss()

    def step() -> None:
        loss(network(skull, skull), skull).backward()

    if dry:
        step()
        return {"voxels": int(skull.sum())}
    first = _seconds(step, 1)
    _seconds(step, WARM_UP_STEPS)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = _seconds(step, STEPS)
    peak = torch.cuda.max_memory_allocated() - before
    found = {"voxels": int(skull.sum()), "seconds": round(seconds, 4), "first_seconds": round(first, 2)}
    return found | {"peak_gib": round(peak / 2**30, 3)}


def _seconds(step: Callable[[], None], times: int) -> float:
    """Mean of several steps, the device synchronized."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    main()
