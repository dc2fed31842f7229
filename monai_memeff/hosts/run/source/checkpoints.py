"""Weights of a bundle: found where its CheckpointLoaders look, loaded strictly, and none left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_memeff.errors import InputError
from monai_memeff.hosts.layout import components, get, references
from monai_memeff.hosts.run.source.bundle import Bundle


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights.

    Attributes:
        file: where it is.
        networks: key in the file -> place of the network in the configuration.
    """

    file: Path
    networks: dict[str, str]

    def sha256(self) -> str:
        """Of the file's content.

        Raises:
            InputError: there is no such file.
        """
        if not self.file.is_file():
            beside = " (a TorchScript model.ts is not used)" if self.file.with_suffix(".ts").is_file() else ""
            raise InputError(f"the bundle's weights are missing: no file {self.file}{beside}; download or train them")
        digest = hashlib.sha256()
        with open(self.file, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        return digest.hexdigest()


def checkpoints_of(bundle: Bundle) -> list[Checkpoint]:
    """The files that the bundle's CheckpointLoaders give to what is used, or ``models/model.pt`` for the network.

    ``load_pretrain`` and other conditions are left aside: a network without weights would answer all the same.
    """
    network = bundle.part("network")
    if network is None:
        raise InputError(f"{bundle.folder} has no network: its inference configuration is not a usual one")
    used = bundle.reached([network, bundle.preprocessing, *filter(None, [bundle.part("postprocessing")])])
    found = []
    for place, kind in components(bundle.config):
        wanted = get(bundle.config, f"{place}#load_dict") if kind == "CheckpointLoader" else None
        if isinstance(wanted, Mapping):
            networks = {key: next(iter(references(value)), "") for key, value in wanted.items()}
            if set(networks.values()) & used:
                found.append(Checkpoint(Path(str(bundle.parse(f"{place}#load_path"))), networks))
    target = next(iter(references(get(bundle.config, network))), network)
    if not any(set(checkpoint.networks.values()) & bundle.reached([network]) for checkpoint in found):
        found.insert(
            0, Checkpoint(bundle.folder / "models" / "model.pt", {"model": target if network != "network" else network})
        )
    return found


def load_weights(bundle: Bundle, found: list[Checkpoint]) -> None:
    """Load all weights strictly, by ``torch.load(weights_only=True)``, which runs no code of the file.

    Raises:
        InputError: a file is not a checkpoint, its weights do not fit, or a network of the configuration gets none.
    """
    known: set[int] = set()
    for checkpoint in found:
        state = _read(checkpoint.file)
        for key, place in checkpoint.networks.items():
            network = bundle.parse(place)
            if not isinstance(network, nn.Module):
                raise InputError(f"{checkpoint.file} is for the bundle's {place}, which is {type(network).__name__}")
            inside = (
                state[key] if isinstance(state.get(key), Mapping) else state if len(checkpoint.networks) == 1 else {}
            )
            _fill(network, inside, checkpoint.file)
            known |= {id(parameter) for parameter in network.parameters()}
    for place, made in bundle.parser.ref_resolver.resolved_content.items():
        if isinstance(made, nn.Module) and any(id(parameter) not in known for parameter in made.parameters()):
            raise InputError(f"the bundle's {place} has no checkpoint (CheckpointLoader), so its weights are random")


def _read(file: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"the bundle's weights are missing: no file {file}; download or train them") from None
    except Exception as error:  # pickle's, zip's and torch's own
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(f"{file} is not a checkpoint of tensors alone: {reason}") from error
    if not isinstance(state, Mapping):
        raise InputError(f"{file} holds {type(state).__name__}, and a state dict is needed")
    return state


def _fill(network: nn.Module, state: Mapping[str, Any], file: Path) -> None:
    try:
        network.load_state_dict(state, strict=True)
    except InputError:
        raise
    except Exception as error:  # torch says it in many lines
        own, given = set(network.state_dict()), set(state)
        missing, foreign = sorted(own - given), sorted(given - own)
        why = f"{len(missing)} of its {len(own)} weights are missing, {len(foreign)} are foreign"
        example = next(iter([*missing, *foreign]), "a shape differs")
        raise InputError(f"{file} is not of the bundle's {type(network).__name__}: {why} ({example})") from error
