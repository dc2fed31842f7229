"""What each overlay does with a bundle, tried: a sentence for the table in the docs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism
from torch import Tensor

from monai_memeff.errors import InputError
from monai_memeff.halo import NotPartitionableError
from monai_memeff.hosts import merge_bundle_configs
from monai_memeff.overlays import overlay_path
from tests.hosts.zoo import save_weights, scripts_of_the_zoo, workflow

TOLERANCE = 1e-4
SEED = 123  # the bundles' own
SHARE = 1e-3


def verdict(root: Path, overlay: str) -> str:
    """Merge, run and compare an overlay on a prepared bundle.

    Returns:
        "refused: ..." as `memeff merge` and the run itself say it, or "works: ..." with what was compared.
    """
    kind = "inference" if overlay.endswith("_inference") else "train"
    torch.manual_seed(0)
    try:
        merge_bundle_configs([root / "configs" / f"{kind}.json", overlay_path(overlay)])
    except InputError as error:
        _check_refused_when_run(root, kind, overlay)
        return f"refused: {str(error).partition(': choose')[0].removeprefix(f'{overlay}.json ')}"
    try:
        return TRIED[overlay](root, overlay)
    except Exception as error:
        if isinstance(error, AssertionError) or "monai_memeff" not in _raised_in(error):
            raise
        return f"refused: {str(_first_cause(error)).splitlines()[0]}"


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _raised_in(error: BaseException) -> str:
    """The file that raised what was wrong in the first place: a refusal is one of ours."""
    return traceback.extract_tb(_first_cause(error).__traceback__)[-1].filename


def _check_refused_when_run(root: Path, kind: str, overlay: str) -> None:
    """What `memeff merge` refuses, MONAI's own command must not do either."""
    try:
        _own_weights(root, kind, overlay)
        work = workflow(root, kind, overlay)
        work.initialize()
        work.run()
    except Exception:
        return
    raise AssertionError(f"{root.name} runs with {overlay}, which merge refuses")


def _own_weights(root: Path, kind: str, overlay: str, **more: Any) -> Any:
    """``models/model.pt`` from the network that the overlay builds."""
    network = workflow(root, kind, overlay, **more).parser.get_parsed_content("network_def")
    save_weights(root, network)
    return network


def _ran(root: Path, kind: str, overlay: str, **more: Any) -> ConfigWorkflow:
    work = workflow(root, kind, overlay, **more)
    work.initialize()
    work.run()
    return work


def _first(work: ConfigWorkflow) -> Tensor:
    return next(iter(work.parser.get_parsed_content("dataloader")))["image"]


def _close(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float(
        (found.as_subclass(Tensor).cpu() - expected.as_subclass(Tensor).cpu()).abs().max() / expected.abs().max()
    )


def _whole(root: Path, overlay: str) -> str:
    """The inferer's logits against the network's on the whole volume at once, after a run with files."""
    _own_weights(root, "inference", overlay)
    work = _ran(root, "inference", overlay)
    network, inferer, image = work.parser.get_parsed_content("network"), work.evaluator.inferer, _first(work)
    with torch.no_grad():
        difference = _close(inferer(image, network.eval()), network(image))
    assert difference < TOLERANCE, difference
    return "works: equal to the whole volume at once"


def _points(root: Path, overlay: str) -> str:
    """The octree's labels against those of all voxels."""
    _own_weights(root, "inference", overlay)
    work = _ran(root, "inference", overlay)
    network, inferer, image = work.parser.get_parsed_content("network"), work.evaluator.inferer, _first(work)
    with torch.no_grad():
        found, expected = inferer(image, network.eval()).argmax(1), network(image).argmax(1)
    share = float((found != expected).float().mean())
    assert share < SHARE, share  # pieces that no voxel of the grid meets, with random weights
    return "works: labels equal to those of every voxel queried, but for isolated pieces between the queried ones"


def _sparse(root: Path, overlay: str) -> str:
    """Dense weights, every voxel active, against the bundle's own network."""
    dense = workflow(root, "inference").parser.get_parsed_content("network_def")
    save_weights(root, dense)
    work = _ran(root, "inference", overlay, **{"network_def#threshold": -1e9})
    network, inferer, image = work.parser.get_parsed_content("network"), work.evaluator.inferer, _first(work)
    with torch.no_grad():
        difference = _close(inferer(image, network.eval()), dense.eval()(image))
    assert difference < TOLERANCE, difference
    return "works: with all voxels active equal to the dense network with the same weights"


def _trained(root: Path, overlay: str) -> str:
    """An epoch with validation; what it saved is what inference with the same overlay loads."""
    work = workflow(root, "train", overlay, ckpt_dir=str(root / "models"))
    work.initialize()
    network = work.parser.get_parsed_content("network_def")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    work.run()
    trainer = work.parser.get_parsed_content("train#trainer")
    assert torch.isfinite(torch.tensor(trainer.state.output[0]["loss"]))
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())
    _ran(root, "inference", f"{overlay}_inference")
    return f"works: trains, validates, and `{overlay}_inference` runs what it saved"


def _halo(root: Path, overlay: str) -> str:
    """The losses of two processes with half a volume each against those of one with the bundle's own training."""
    alone, parts = losses(root), _started(root, overlay)
    assert len(alone) == len(parts) > 1, (alone, parts)
    difference = max(abs(a - b) for a, b in zip(alone, parts, strict=True))
    assert difference < TOLERANCE, (alone, parts)
    return "works: on two processes the losses of the bundle's own training on one"


def losses(root: Path, *overlays: str) -> list[float]:
    """Loss of every iteration of a bundle's training, without dropout."""
    still = {"network_def#dropout_prob": 0.0} if "dropout_prob" in _network_of(root) else {}
    seeds = {"halo_seed": SEED} if overlays else {}  # the overlay seeds before it makes the network
    options = {**still, **seeds, "train#trainer#max_epochs": 2}
    work = workflow(root, "train", *overlays, ckpt_dir=str(root / "models"), **options)
    work.initialize()
    found: list[float] = []
    set_determinism(SEED)  # some bundles seed when they run, after their parts are made here
    trainer = work.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: found.append(float(engine.state.output[0]["loss"]))
    )
    work.run()
    work.finalize()
    return found


def _network_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "configs" / "train.json").read_text())["network_def"]


def _started(root: Path, overlay: str) -> list[float]:
    """The same under torchrun; the first process writes what it found."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    out = root / "losses.json"
    done = subprocess.run(
        [*run, "-m", "tests.hosts.verdicts", str(root), overlay, str(out)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    refused = re.findall(r"(?:Error|Partitionable\w*): (.*)", done.stderr)
    if done.returncode:
        raise NotPartitionableError(refused[0] if refused else done.stderr[-2000:])
    return json.loads(out.read_text())


TRIED: dict[str, Callable[[Path, str], str]] = {
    "clstm": _trained,
    "clstm_inference": _whole,
    "halo": _halo,
    "halo_inference": _whole,
    "occupancy": _trained,
    "occupancy_inference": _points,
    "sparse_unet": _trained,
    "sparse_unet_inference": _sparse,
}


if __name__ == "__main__":
    folder, name, target = sys.argv[1:]
    with scripts_of_the_zoo():
        values = losses(Path(folder), name)
    if os.environ["RANK"] == "0":
        Path(target).write_text(json.dumps(values))
