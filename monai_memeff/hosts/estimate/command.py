"""The command `memeff estimate`: find the network, estimate every system, and write the overlay that keeps a budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from monai_memeff.errors import InputError
from monai_memeff.hosts.estimate.bundle import OVERLAYS
from monai_memeff.hosts.estimate.choice import choose, on_device, why_chosen
from monai_memeff.hosts.estimate.image import active_image
from monai_memeff.hosts.estimate.origin import Source
from monai_memeff.hosts.estimate.report import as_data, table
from monai_memeff.hosts.estimate.shape import shape_of
from monai_memeff.hosts.estimate.source import find_source
from monai_memeff.hosts.estimate.systems import SYSTEMS, Row, Wish, rows_of
from monai_memeff.hosts.estimate.written import write_overlay
from monai_memeff.memory import NetworkEstimate
from monai_memeff.memory.size import bytes_of


class Answer(NamedTuple):
    """The report.

    Attributes:
        lines: Lines for people.
        data: The same for programs.
    """

    lines: list[str]
    data: dict[str, Any]

    def text(self, as_json: bool) -> str:
        """Either of them as text."""
        return json.dumps(self.data, indent=2) if as_json else "\n".join(self.lines)


def run_estimate(
    given: str,
    shape: str | None = None,
    budget: str | None = None,
    image: Path | None = None,
    threshold: float | None = None,
    training: bool = False,
    overlays: Sequence[str] = (),
    configuration: str | None = None,
    arguments: str | None = None,
    device: str | None = None,
    output: Path | None = None,
) -> Answer:
    """Estimate a network in every system, and choose one for a budget.

    Args:
        given: a bundle or its configuration, an nnU-Net plan, or the dotted name of a class or function.
        shape: Shape of the input; may be left out for a plan, whose patch it then is.
        budget: with its unit; everything on the device must fit.
        image: whose share of active voxels counts.
        threshold: Value above which voxels are active.
        training: a step of training instead of inference.
        overlays: names of overlays, whose systems alone are then compared with the dense network; or files, which are
            merged into a bundle's configuration.
        configuration: Name of a plan's configuration.
        arguments: Keyword arguments of a class or function, as JSON.
        device: ``cpu`` or ``cuda``; default the GPU if there is one.
        output: file for the overlay; default ``memeff_SYSTEM.json`` here.

    Returns:
        The report.

    Raises:
        InputError: whatever is wrong, in one line.

    Examples:
        >>> arguments = '{"in_channels": 1, "out_channels": 2, "kernel_size": 3}'
        >>> answer = run_estimate("torch.nn.Conv3d", "1,1,32,32,32", arguments=arguments, overlays=["halo"])
        >>> [row["system"] for row in answer.data["systems"]]
        ['dense', 'halo']
    """
    bound = None if budget is None else bytes_of(budget)
    if output is not None and bound is None:
        raise InputError("--output is for the overlay that keeps a budget: give --budget too, or leave it out")
    target = _device(device)
    wanted = None if shape is None else shape_of(shape)
    files, systems = _overlays(overlays)
    source = find_source(given, files, configuration, arguments, training)
    wanted = wanted or source.shape
    if wanted is None:
        raise InputError("--shape is needed, such as 1,1,128,128,128: batch, channels and extents of the input")
    example, active = (None, None) if image is None else active_image(image, wanted, threshold)
    if example is not None:
        example = example.expand(1, 1, *wanted[2:])
    wish = Wish(wanted, training, bound, target, example, active, systems)
    rows = rows_of(source, wish)
    lines = [f"{source.name}: {'training step' if training else 'inference'} on {wanted}, {target.type}", *table(rows)]
    data = _data(source, wish, rows)
    if bound is not None:
        chosen = choose(rows, bound, target.type)
        more, data["chosen"] = _written(source, chosen, bound, wish, output)
        lines += more
    return Answer(lines, data)


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"--device is cpu or cuda, got {name!r}")
    return torch.device((name or ("cuda" if torch.cuda.is_available() else "cpu")).replace("cuda", "cuda:0"))


def _overlays(given: Sequence[str]) -> tuple[list[Path], tuple[str, ...]]:
    """Files to be merged, and the systems of the overlays that are named."""
    files, named = [], []
    for name in given:
        if name.endswith((".json", ".yaml", ".yml")):
            files.append(Path(name))
            continue
        stem = name.removesuffix("_inference")
        systems = {**{overlay: system for system, overlay in OVERLAYS.items()}, "halo": "halo"}
        if stem not in systems:
            raise InputError(f"no overlay is called {name!r}: choose one of {', '.join(systems)}, or give a file")
        named.append(systems[stem])
    return files, ("dense", *named) if named else SYSTEMS


def _data(source: Source, wish: Wish, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "source": source.name,
        "kind": source.kind,
        "shape": list(wish.shape),
        "training": wish.training,
        "device": wish.device.type,
        "loss": source.loss_name if wish.training else None,
        "budget_bytes": wish.budget,
        "active_share": wish.active,
        "systems": [as_data(row) for row in rows],
    }


def _written(
    source: Source, chosen: NetworkEstimate, budget: int, wish: Wish, output: Path | None
) -> tuple[list[str], dict[str, Any]]:
    lines = [why_chosen(chosen, budget, wish.device.type)]
    data: dict[str, Any] = {
        "system": chosen.system,
        "setting": dict(chosen.setting),
        "needed_bytes": on_device(chosen, wish.device.type),
    }
    if source.kind == "plans":
        lines.append(_for_nnunet(chosen))
        return lines, {**data, "overlay": None}
    path = output or Path(f"memeff_{chosen.system}.json")
    file = write_overlay(chosen, path, *([Path(source.name)] if source.kind == "bundle" else []))
    lines.append("no overlay is needed: the bundle trains so as it is" if file is None else f"wrote {file}")
    return lines, {**data, "overlay": None if file is None else str(file)}


def _for_nnunet(chosen: NetworkEstimate) -> str:
    if chosen.system == "halo":
        return "nnU-Net runs it so with MEMEFF_NNUNET=whole, which chooses the parts by the free memory itself"
    if chosen.system == "dense":
        return "nnU-Net runs it so as it is"
    trainer = {"clstm": "CLSTMTrainer", "occupancy": "OccupancyTrainer", "sparse": "SparseTrainer"}[chosen.system]
    return f"nnU-Net trains such a network with -tr {trainer}, at sizes of its own"
