"""The network of a bundle's configuration, with its loss, its optimizer and the networks of the overlays."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from monai_memeff.errors import InputError
from monai_memeff.hosts.estimate.origin import Source, made, network_of
from monai_memeff.hosts.layout import Config, get, places
from monai_memeff.hosts.merge import merge_bundle_configs
from monai_memeff.memory.step import tensors_in
from monai_memeff.overlays import overlay_names, overlay_path

OVERLAYS = {"sparse": "sparse_unet", "occupancy": "occupancy", "clstm": "clstm"}
"""System -> overlay that puts its network in the place of a bundle's."""


def config_in(folder: Path, training: bool) -> Path:
    """The configuration of a bundle's folder that trains, or the one that infers.

    Raises:
        InputError: the folder has none.
    """
    name = "train" if training else "inference"
    for parent in (folder / "configs", folder):
        for suffix in (".json", ".yaml", ".yml"):
            if (parent / f"{name}{suffix}").is_file():
                return parent / f"{name}{suffix}"
    raise InputError(f"{folder} is not a bundle: it has no configs/{name}.json, nor .yaml")


def bundle_source(file: Path, overlays: Sequence[Path]) -> Source:
    """What a bundle's configuration says of its network.

    Args:
        file: the configuration.
        overlays: Files to be merged into it.

    Raises:
        InputError: it has no network, or it cannot be made.
    """
    files = [file, *overlays]
    config = merge_bundle_configs(files)
    network = _network(config, file)
    parser = _parser(config, file)
    loss = places(config).get("loss", "loss")
    place = next((p for p in (places(config).get("optimizer"), "optimizer") if p and get(config, p) is not None), None)
    return Source(
        name=str(file),
        network=network,
        kind="bundle",
        loss=_loss(config, loss, parser),
        loss_name="cross-entropy" if get(config, loss) is None else f"the bundle's {_kind(config, loss)}",
        optimizer=None if place is None else _optimizer(config, place, file),
        twins={system: _twin(files, system, config) for system in OVERLAYS},
    )


def _loss(config: Config, place: str, parser: ConfigParser) -> BundleLoss | None:
    if get(config, place) is None:
        return None
    return BundleLoss(made(f"the bundle's {place}", lambda: parser.get_parsed_content(place)))


class BundleLoss:
    """A bundle's loss of an output and a label of zeros, or the usual one where it does not take them.

    Args:
        loss: Loss of MONAI's kinds: (output, label).
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def __call__(self, output: Any) -> Tensor:
        """The losses of all tensors of the output, added."""
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad and tensor.dim() > 2]
        losses = [self.loss(tensor, self._label(tensor)) for tensor in tensors]
        if not losses:
            raise InputError("nothing that the network returns has a gradient: it cannot be trained")
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _label(self, tensor: Tensor) -> Tensor:
        inner = getattr(self.loss, "loss", self.loss)
        parts = (inner, getattr(inner, "dice", None))
        one_hot = any(getattr(part, "to_onehot_y", False) for part in parts)
        channels = 1 if one_hot else tensor.shape[1]
        return torch.zeros(tensor.shape[0], channels, *tensor.shape[2:], device=tensor.device)


def _kind(config: Config, place: str) -> str:
    value = get(config, place)
    return str(value.get("_target_", "loss")).rpartition(".")[2] if isinstance(value, dict) else "loss"


def _parser(config: Config, file: Path) -> ConfigParser:
    root = file.absolute().parent.parent if file.absolute().parent.name == "configs" else file.absolute().parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # bundles import their own `scripts`
    parser = ConfigParser(config={**config, "bundle_root": str(root)})
    parser["device"] = "$torch.device('cpu')"
    return parser


def _network(config: Config, file: Path) -> nn.Module:
    named = places(config).get("network_def", "network_def")
    place = next((p for p in (named, "network_def", "network") if get(config, p) is not None), None)
    if place is None:
        raise InputError(f"{file} has no network_def, nor network: it is not a bundle's configuration")
    parser = _parser(config, file)
    return network_of(f"{place} of {file}", lambda: parser.get_parsed_content(place))


def _optimizer(config: Config, place: str, file: Path) -> Callable[[Any], Any]:
    def build(parameters: Any) -> Any:
        parser = _parser(config, file)
        parser[f"{place}#params"] = None
        value = {name: part for name, part in dict(parser[place]).items() if name != "params"}
        parser["memeff_optimizer"] = {**value, "_mode_": "callable"}
        return parser.get_parsed_content("memeff_optimizer")(params=parameters)

    return lambda parameters: made(f"the bundle's {place}", lambda: build(parameters))


def _twin(files: Sequence[Path], system: str, config: Config) -> Callable[[], nn.Module]:
    name = OVERLAYS[system]
    if "train#trainer" not in places(config) and f"{name}_inference" in overlay_names():
        name = f"{name}_inference"

    def build() -> nn.Module:
        merged = json.loads(json.dumps(merge_bundle_configs([*files, overlay_path(name)])))
        named = places(merged).get("network_def", "network_def")
        merged[named]["require_weights"] = False
        return _network(merged, files[0])

    return build
