"""At each call, all ranks tell each other what they are about to run, and refuse together if it is not the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.parts import Part, part_of
from monai_memeff.halo.run.ranks.volume import fitted

_DIMS = 8  # most dimensions of a tensor that is spread
_SMALL = 2**16  # values up to which a tensor that every rank holds is compared in full
FIELDS = ("inputs", "gradient mode", "training mode", "autocast", "network", "parameters that want gradients")


def digest(value: Any) -> int:
    """63 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 1


def volumes_among(leaves: Sequence[Any], mesh: HaloMesh) -> list[int]:
    """Positions of the volumes: the first tensor with all axes that the mesh splits, and others of as many axes."""
    tensors = {i: leaf.dim() for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    dims = next((n for n in tensors.values() if n > 2 + max(mesh.axes)), None)
    return [i for i, n in tensors.items() if n == dims]


def agreed_parts(mesh: HaloMesh, network: nn.Module, fingerprint: int, args: Any, kwargs: Any) -> list[Part | None]:
    """How each argument is spread, the same on every rank; None for what every rank holds whole.

    The first volume among the arguments may be unmarked (`PartitionCropd` in a data loader): the shapes of all ranks
    tell its whole. All others must come from `scatter`.

    Args:
        mesh: where the parts live.
        network: what is about to run.
        fingerprint: `digest` of the network's settings and the mesh.
        args: positional arguments.
        kwargs: keyword arguments.

    Raises:
        NotPartitionableError: on every rank, if an argument is ambiguous or the ranks differ.
    """
    leaves, spec = tree_flatten((args, kwargs))
    problem, first = _problem(leaves, mesh), next(iter(volumes_among(leaves, mesh)), None)
    shape = list(leaves[first].shape) if first is not None else []
    others = [_told(leaf, i == first and part_of(leaf) is None) for i, leaf in enumerate(leaves)]
    fields = [digest((str(spec), others)), *_modes(network), fingerprint, _wants_gradients(network)]
    header = [1 if problem else 0, len(shape), *shape, *[0] * (_DIMS - len(shape)), *fields]
    device = leaves[first].device if first is not None else mesh.device
    headers = [h.tolist() for h in mesh.comm.all_gather(torch.tensor(header, dtype=torch.int64, device=device))]
    _compare(headers, problem)
    parts = [part_of(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    if first is not None and parts[first] is None:
        try:
            parts[first] = fitted([h[2 : 2 + h[1]] for h in headers], mesh)
        except ValueError as error:
            raise NotPartitionableError(f"{error} Use scatter() or PartitionCropd.") from None
    return parts


def _problem(leaves: Sequence[Any], mesh: HaloMesh) -> str | None:
    """Why the arguments are refused on this rank, if they are."""
    volumes = [leaves[i] for i in volumes_among(leaves, mesh)]
    if not volumes:
        return "Expected a volume (B, C, spatial...) among the arguments but found none."
    for number, volume in enumerate(volumes):
        part = part_of(volume)
        if part is None and number:
            return (
                f"Volume {number + 1} among the arguments, of shape {tuple(volume.shape)}, may be a part or a whole; "
                f"pass every volume through scatter(volume, mesh)."
            )
        if part is not None and part.local(mesh.position) != tuple(volume.shape):
            return f"A tensor of shape {tuple(volume.shape)} is marked as a part of {part.shape}; scatter it again."
    return None


def _told(leaf: Any, unmarked: bool) -> Any:
    """What must agree about an argument: all of a whole one, everything but the rows of a part."""
    if not isinstance(leaf, torch.Tensor):
        return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__name__
    state = (str(leaf.dtype), leaf.device.type, leaf.requires_grad and torch.is_grad_enabled())
    if unmarked or (part := part_of(leaf)) is not None:
        return (*state, None if unmarked else part)
    values = leaf.detach().flatten()[:_SMALL].cpu()
    return (*state, tuple(leaf.shape), values.tolist())


def _modes(network: nn.Module) -> list[int]:
    low = [(k, torch.is_autocast_enabled(k), str(torch.get_autocast_dtype(k))) for k in ("cpu", "cuda")]
    return [int(torch.is_grad_enabled()), digest([m.training for m in network.modules()]), digest(low)]


def _wants_gradients(network: nn.Module) -> int:
    return digest([p.requires_grad for p in network.parameters()])


def _compare(headers: list[list[int]], problem: str | None) -> None:
    if problem is not None:
        raise NotPartitionableError(problem)
    refused = [rank for rank, h in enumerate(headers) if h[0]]
    if refused:
        raise NotPartitionableError(f"Spatial ranks {refused} refused their arguments; see their logs.")
    rows = [h[2 + _DIMS :] for h in headers]
    differing = [name for i, name in enumerate(FIELDS) if len({row[i] for row in rows}) > 1]
    if differing or len({h[1] for h in headers}) > 1:
        raise NotPartitionableError(
            f"The ranks differ in {', '.join(differing) or 'inputs'}: all ranks of a spatial group must run the same "
            f"network in the same mode on parts of the same volume."
        )
