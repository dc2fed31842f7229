"""Checkpoints of MinkowskiEngine networks for ours and back: kernels reordered, layers matched by order and shape."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from monai_memeff.errors import InputError
from monai_memeff.sparse.networks.completion import SparseCompletionNet

State = dict[str, Tensor]

NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

SHOWN_MISMATCHES = 12


def kernel_to_weight(kernel: Tensor, kernel_size: tuple[int, int, int], transposed: bool = False) -> Tensor:
    """Reorder one MinkowskiEngine kernel.

    Args:
        kernel: (k^3, in, out) with the first axis of the kernel fastest, or (in, out) for a single point.
        kernel_size: points along (i, j, k).
        transposed: whether the layer is a transposed convolution.

    Returns:
        (out, in, k, k, k), transposed (in, out, k, k, k), as torch and this package hold it.

    Raises:
        ValueError: the kernel has another number of points.
    """
    points = kernel_size[0] * kernel_size[1] * kernel_size[2]
    kernel = kernel[None] if kernel.ndim == 2 else kernel
    if kernel.ndim != 3 or len(kernel) != points:
        raise ValueError(f"a kernel of size {kernel_size} must be ({points}, in, out), got {tuple(kernel.shape)}.")
    spread = kernel.unflatten(0, kernel_size[::-1])  # (k, j, i, in, out)
    return spread.permute((3, 4, 2, 1, 0) if transposed else (4, 3, 2, 1, 0)).contiguous()


def weight_to_kernel(weight: Tensor, transposed: bool = False) -> Tensor:
    """The inverse of :func:`kernel_to_weight`; a single point gives (in, out), as MinkowskiEngine holds it."""
    spread = weight.permute((4, 3, 2, 0, 1) if transposed else (4, 3, 2, 1, 0))
    kernel = spread.flatten(0, 2).contiguous()
    return kernel[0] if len(kernel) == 1 else kernel


def from_minkowski(checkpoint: Mapping[str, Tensor], network: SparseCompletionNet) -> State:
    """Convert a completion network's state dict of MinkowskiEngine.

    Layers are taken in the order of the checkpoint, whatever they are called, and every shape is compared, so renamed
    copies of the published network convert as well.

    Args:
        checkpoint: names -> tensors, with ``kernel`` and ``bn.*`` entries; wrappers' prefixes do not matter.
        network: one with the channels of the checkpoint: see :func:`channels_of`. It is not changed.

    Returns:
        A state dict that ``network.load_state_dict`` takes strictly.

    Raises:
        ValueError: layers are missing, too many, or of other shapes; the message lists them.
    """
    theirs, ours = _layers_of(checkpoint), _layers_in_order(network)
    faults = [f"{name}: neither a convolution nor a batch norm" for name, kind, _ in theirs if not kind]
    if len(theirs) != len(ours):
        faults.append(f"{len(theirs)} layers in the checkpoint, {len(ours)} in the network")
    state: State = {}
    for (name, _, entries), (target, layer, _) in zip(theirs, ours, strict=False):
        try:
            converted = _convert(entries, layer)
        except (ValueError, KeyError) as error:
            faults.append(f"{name} -> {target} ({type(layer).__name__}): {error}")
            continue
        expected = layer.state_dict()
        faults += _shape_faults(name, target, converted, expected)
        state.update({f"{target}.{entry}": value for entry, value in converted.items()})
    if faults:
        more = f"; and {len(faults) - SHOWN_MISMATCHES} more" if len(faults) > SHOWN_MISMATCHES else ""
        raise ValueError(
            f"the checkpoint does not fit SparseCompletionNet(channels={network.channels}): "
            f"{'; '.join(faults[:SHOWN_MISMATCHES])}{more}. Convert it with the channels it was trained with."
        )
    return state


def to_minkowski(network: SparseCompletionNet) -> State:
    """The network's state under the names of the published code, in MinkowskiEngine's layout.

    The published code is ``CompletionNet`` of github.com/akroviakov/SparseSkullCompletion.
    """
    state: State = {}
    for _, layer, name in _layers_in_order(network):
        entries = layer.state_dict()
        if isinstance(layer, nn.BatchNorm3d):
            state.update({f"{name}.bn.{entry}": entries[entry] for entry in NORM_ENTRIES})
            continue
        state[f"{name}.kernel"] = weight_to_kernel(entries["weight"], isinstance(layer, nn.ConvTranspose3d))
        if "bias" in entries:
            state[f"{name}.bias"] = entries["bias"][None]
    return state


def channels_of(checkpoint: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The seven channel numbers of a MinkowskiEngine checkpoint of the completion network: strides 1, 2, ... 64.

    Raises:
        ValueError: there are fewer than the encoder's thirteen convolutions.
    """
    kernels = [entries["kernel"] for _, kind, entries in _layers_of(checkpoint) if kind == "convolution"]
    if len(kernels) < 13:
        raise ValueError(
            f"a completion network has at least 13 convolutions with an entry `kernel`, got {len(kernels)}; "
            "is this the state dict of a MinkowskiEngine network?"
        )
    return tuple(kernels[number].shape[-1] for number in (0, *range(1, 13, 2)))


def convert_file(source: str, channels: tuple[int, ...] | None = None) -> tuple[State, tuple[int, ...]]:
    """Read and convert a checkpoint.

    Args:
        source: path of a file that ``torch.save`` wrote: a state dict, or a dictionary with one under ``state_dict``.
        channels: Numbers of channels of the network; default those of the checkpoint.

    Returns:
        The state dict for :class:`SparseCompletionNet`, on the CPU, and its channels.

    Raises:
        InputError: the file is empty, cut off or no checkpoint at all.
        ValueError: the file holds no state dict, or it does not fit; the message says where.
        OSError: the file cannot be read.
    """
    loaded = _load(source)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise ValueError(f"{source} holds no state dict: names and tensors, or those under `state_dict`.")
    channels = channels or channels_of(loaded)
    with torch.device("meta"):  # only names and shapes are wanted
        network = SparseCompletionNet(channels)
    return from_minkowski(loaded, network), channels


def _load(source: str) -> Any:
    """What ``torch.save`` wrote; every kind of file that it did not write is named in one line."""
    with open(source, "rb") as file:
        start = file.read(4)
    if not start:
        raise InputError(f"{source} is empty: copy the checkpoint again")
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(source):
        raise InputError(f"{source} is cut off: copy the checkpoint again")
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes end in whatever the unpickler stumbles over
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            way_out = "it holds other objects than tensors; save network.state_dict() and give that file"
            raise InputError(f"{source} is not read: {way_out}") from error
        raise InputError(
            f"{source} is not a checkpoint, or a damaged one: give a file that torch.save wrote"
        ) from error


def _layers_of(checkpoint: Mapping[str, Tensor]) -> list[tuple[str, str, State]]:
    """Name, kind and entries of the checkpoint's layers in its order; an unknown kind is empty."""
    layers: dict[str, State] = {}
    for key, value in checkpoint.items():
        name, _, entry = key.rpartition(".")
        layers.setdefault(name, {})[entry] = value
    kinds = {
        name: "convolution" if "kernel" in e else "norm" if "running_mean" in e else "" for name, e in layers.items()
    }
    return [(name, kinds[name], entries) for name, entries in layers.items()]


def _layers_in_order(network: SparseCompletionNet) -> list[tuple[str, nn.Module, str]]:
    """Our name, layer and published name, in the order in which the published code makes its layers."""
    blocks = [("stem", "enc_block_s1")]
    blocks += [(f"encoder.{n}", f"enc_block_s{2**n}s{2 ** (n + 1)}") for n in range(6)]
    for number, fine in enumerate(2**n for n in reversed(range(6))):
        blocks += [(f"decoder.{number}", f"dec_block_s{2 * fine}s{fine}"), (f"heads.{number}", f"dec_s{fine}_cls")]
    layers = [found for ours, theirs in blocks for found in _inside(network, ours, theirs)]
    return [*layers, ("final", network.final, "final_out.0")]


def _inside(network: SparseCompletionNet, ours: str, theirs: str) -> list[tuple[str, nn.Module, str]]:
    """The layers of one block; in the published code it is a flat sequence, activations included."""
    block = network.get_submodule(ours)
    leaves = [(name, part) for name, part in block.named_modules() if not list(part.children())]
    numbered = ((f"{ours}.{name}" if name else ours, part, number) for number, (name, part) in enumerate(leaves))
    return [
        (name, part, f"{theirs}.{number}" if len(leaves) > 1 else theirs)
        for name, part, number in numbered
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d | nn.BatchNorm3d)
    ]


def _convert(entries: State, layer: nn.Module) -> State:
    """One layer's entries as ours."""
    if isinstance(layer, nn.BatchNorm3d):
        return {entry: entries[entry] for entry in NORM_ENTRIES}
    assert isinstance(layer, nn.Conv3d | nn.ConvTranspose3d)
    i, j, k = layer.kernel_size
    converted = {"weight": kernel_to_weight(entries["kernel"], (i, j, k), isinstance(layer, nn.ConvTranspose3d))}
    if "bias" in entries:
        converted["bias"] = entries["bias"].flatten()
    return converted


def _shape_faults(name: str, target: str, converted: State, expected: State) -> list[str]:
    faults = [f"{name} -> {target}: no {entry} in the checkpoint" for entry in expected.keys() - converted.keys()]
    faults += [f"{name} -> {target}: the network has no {entry}" for entry in converted.keys() - expected.keys()]
    for entry in converted.keys() & expected.keys():
        ours, theirs = tuple(expected[entry].shape), tuple(converted[entry].shape)
        if ours != theirs:
            faults.append(f"{name} -> {target}.{entry}: {theirs} in the checkpoint, {ours} in the network")
    return sorted(faults)
