"""Cut a volume into the parts of a mesh and put the parts together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch.utils._pytree import tree_map_only

from monai_memeff.halo.run.ranks.comm.exchange import redistribute
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.comm.routes import coordinates, route
from monai_memeff.halo.run.ranks.parts import Part, mark, part_of

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64,
)  # fmt: skip
_HEADER = 12  # (number of dimensions, dtype, shape...)


def scatter(volume: torch.Tensor | None, mesh: HaloMesh, src: int | None = None) -> torch.Tensor:
    """This rank's part of a volume, marked as such: a partitioned network knows its whole and its cuts.

    Args:
        volume: (B, C, spatial...), the whole volume; on every rank, or only on rank `src` of the spatial group.
        mesh: where the parts live.
        src: spatial rank that holds the volume and sends the parts; None if every rank has it.

    Returns:
        A contiguous tensor, on the volume's device; sent by NCCL, on this process's GPU.

    Raises:
        ValueError: if the volume lacks a split axis or has fewer rows than parts, on every rank.

    Examples:
        >>> mesh = init_mesh(spatial=(1,))  # (2,) under torchrun: 4 of the 9 rows on the first rank, 5 on the second
        >>> scatter(torch.ones(1, 1, 9, 8, 8), mesh).shape
        torch.Size([1, 1, 9, 8, 8])
    """
    if src is not None:
        return _receive_part(volume, mesh, src)
    if volume is None:
        raise ValueError("scatter() needs the volume on every rank, or src= the spatial rank that holds it.")
    part = part_of_volume(volume.shape, mesh)
    box = (slice(None), slice(None), *mesh.slices(volume.shape[2:]))
    return mark(volume[box].clone(memory_format=torch.contiguous_format), part)


def part_of_volume(shape: Sequence[int], mesh: HaloMesh) -> Part:
    """How `scatter` cuts a volume of a shape (B, C, spatial...)."""
    return Part(tuple(shape), tuple(2 + a for a in mesh.axes), mesh.cuts(shape[2:]))


def _receive_part(volume: torch.Tensor | None, mesh: HaloMesh, src: int) -> torch.Tensor:
    comm = mesh.comm
    device = mesh.device if volume is None or mesh.device.type == "cuda" else volume.device
    header = torch.zeros(_HEADER, dtype=torch.int64, device=device)
    if comm.rank == src and volume is not None:
        values = [volume.dim(), _DTYPES.index(volume.dtype), *volume.shape]
        header[: len(values)] = torch.tensor(values, device=device)
    told = comm.all_gather(header)[src].tolist()
    if told[0] == 0:
        raise ValueError(f"Spatial rank {src} is the source of scatter() but has no volume.")
    shape, dtype = told[2 : 2 + told[0]], _DTYPES[told[1]]
    part = part_of_volume(shape, mesh)
    sizes = [math.prod(part.local(coordinates(r, mesh.spatial))) for r in range(comm.size)]
    if comm.rank == src:
        assert volume is not None
        parts = [_cut(volume, mesh, part, r).to(device) for r in range(comm.size)]
        comm.exchange([(r, t) for r, t in enumerate(parts) if r != src and sizes[r]], []).wait()
        return mark(parts[src], part)
    mine = torch.empty(part.local(mesh.position), dtype=dtype, device=device)
    comm.exchange([], [(src, mine)] if sizes[comm.rank] else []).wait()
    return mark(mine, part)


def _cut(volume: torch.Tensor, mesh: HaloMesh, part: Part, rank: int) -> torch.Tensor:
    for dim, bounds, here in zip(part.dims, part.cuts, coordinates(rank, mesh.spatial), strict=True):
        assert bounds is not None
        volume = volume.narrow(dim, bounds[here], bounds[here + 1] - bounds[here])
    return volume.clone(memory_format=torch.contiguous_format)


def gather(output: Any, mesh: HaloMesh) -> Any:
    """The whole of an output on every rank (no gradient), for nested containers of tensors.

    Args:
        output: this rank's part: what a partitioned network or `scatter` returned, or something computed voxel by
            voxel from it, (B, C, spatial...). What a network returns alike on every rank comes back as it is.
        mesh: where the parts live.

    Raises:
        ValueError: if a tensor lacks a split axis and a partitioned network did not return it.

    Examples:
        >>> volume, mesh = torch.ones(1, 1, 9, 8, 8), init_mesh(spatial=(1,))  # (2,) under torchrun
        >>> torch.equal(gather(scatter(volume, mesh), mesh), volume)
        True
    """
    return tree_map_only(torch.Tensor, lambda t: _gathered(t, mesh), output)


def _gathered(tensor: torch.Tensor, mesh: HaloMesh) -> torch.Tensor:
    part = part_of(tensor) or unmarked_part(tensor, mesh)
    plain = tensor.detach().as_subclass(torch.Tensor)
    if not part.spread:
        return plain
    wants = [tuple(((0, n),) for n in part.rows)] * mesh.size
    found = route(mesh.comm.rank, mesh.spatial, part.rows, part.cuts, wants)
    with torch.no_grad():
        rows, dims = part.exposed(plain, mesh.position)
        return redistribute(mesh.comm, rows, dims, found).reshape(part.shape)


def unmarked_part(tensor: torch.Tensor, mesh: HaloMesh) -> Part:
    """What an unmarked tensor is a part of, by the shapes of all ranks."""
    if tensor.dim() <= 2 + max(mesh.axes):
        raise ValueError(f"A tensor of shape {tuple(tensor.shape)} lacks spatial axis {max(mesh.axes)} of the mesh.")
    shapes = mesh.comm.all_gather(torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device))
    return fitted([s.tolist() for s in shapes], mesh)


def fitted(shapes: Sequence[Sequence[int]], mesh: HaloMesh) -> Part:
    """The whole that parts (B, C, spatial...) of these shapes make up, by rank.

    Raises:
        ValueError: if they do not fit together.
    """
    dims, whole, cuts = tuple(2 + a for a in mesh.axes), list(shapes[0]), []
    for i, (dim, parts) in enumerate(zip(dims, mesh.spatial, strict=True)):
        rows = [{s[dim] for r, s in enumerate(shapes) if coordinates(r, mesh.spatial)[i] == p} for p in range(parts)]
        if any(len(found) > 1 for found in rows):
            raise ValueError(f"The parts have {[sorted(f) for f in rows]} rows along spatial axis {dim - 2}.")
        sizes = [found.pop() for found in rows]
        cuts.append(tuple(sum(sizes[:p]) for p in range(parts + 1)))
        whole[dim] = sum(sizes)
    part = Part(tuple(whole), dims, tuple(cuts))
    if any(tuple(s) != part.local(coordinates(r, mesh.spatial)) for r, s in enumerate(shapes)):
        raise ValueError(f"The parts differ along an axis that is not split: {[tuple(s) for s in shapes]}.")
    return part


def with_meta(output: Any, inputs: torch.Tensor) -> Any:
    """Outputs with the meta data of a MONAI MetaTensor, so that transforms can be inverted."""
    if not isinstance(inputs, MetaTensor):
        return output

    def described(tensor: torch.Tensor) -> torch.Tensor:
        found = MetaTensor(tensor)
        found.copy_meta_from(inputs)
        found.is_batch = inputs.is_batch
        return found

    return tree_map_only(torch.Tensor, described, output)
