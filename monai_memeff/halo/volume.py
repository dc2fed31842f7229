"""Cut a volume into the boxes of a mesh and put the boxes together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor

from monai_memeff.halo.arithmetic import Bounds, Spans, coordinates, cut
from monai_memeff.halo.mesh import HaloMesh
from monai_memeff.halo.region import NotPartitionable


def boxes(mesh: HaloMesh, shape: Sequence[int]) -> tuple[Bounds, ...]:
    """Cuts of a volume along the mesh's split axes.

    Args:
        mesh: where the parts live.
        shape: spatial shape in voxels.

    Raises:
        ValueError: if an axis has too few voxels for its parts.
    """
    return tuple(cut(shape[a], n, m) for a, n, m in zip(mesh.axes, mesh.spatial, mesh.multiple, strict=False))


def own_box(mesh: HaloMesh, shape: Sequence[int]) -> Spans:
    """This rank's rows along the mesh's split axes, for a volume of a spatial shape."""
    return tuple((b[p], b[p + 1]) for b, p in zip(boxes(mesh, shape), mesh.position, strict=False))


def slices(mesh: HaloMesh, shape: Sequence[int]) -> tuple[slice, ...]:
    """This rank's box as one slice per spatial axis."""
    spans = dict(zip(mesh.axes, own_box(mesh, shape), strict=False))
    return tuple(slice(*spans.get(a, (0, n))) for a, n in enumerate(shape))


def scatter(volume: torch.Tensor | None, mesh: HaloMesh, src: int | None = None) -> torch.Tensor:
    """This rank's box of a volume.

    Args:
        volume: (B, C, spatial...), the whole volume; on every rank, or only on rank `src` of the spatial group.
        mesh: where the parts live; call after `spatial_partition`, which sets where it may be cut.
        src: spatial rank that holds the volume and sends the boxes; None if every rank has it.

    Returns:
        A contiguous tensor, on the volume's device; sent by NCCL, on this process's GPU.

    Raises:
        ValueError: if the volume is too small for the mesh, on every rank.
    """
    if src is not None:
        return _send_boxes(volume, mesh, src)
    if volume is None:
        raise ValueError("scatter() needs the volume on every rank, or src= the spatial rank that holds it.")
    box = (slice(None), slice(None), *slices(mesh, volume.shape[2:]))
    return volume[box].contiguous()


_KINDS = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int64,
    torch.int32,
    torch.int16,
)


def _send_boxes(volume: torch.Tensor | None, mesh: HaloMesh, src: int) -> torch.Tensor:
    comm = mesh.comm
    device = mesh.device if volume is None or mesh.device.type == "cuda" else volume.device
    header = torch.zeros(12, dtype=torch.int64, device=device)
    if comm.rank == src:
        if volume is None:
            raise ValueError(f"Spatial rank {src} is the source of scatter() but has no volume.")
        values = [volume.dim(), _KINDS.index(volume.dtype), *volume.shape]
        header[: len(values)] = torch.tensor(values, device=device)
    told = comm.all_gather(header)[src].tolist()
    shape, kind = told[2 : 2 + told[0]], _KINDS[told[1]]
    bounds = boxes(mesh, shape[2:])
    if comm.rank == src:
        assert volume is not None
        parts = [_box_of(volume, mesh, bounds, r).to(device) for r in range(comm.size)]
        comm.exchange([(r, t) for r, t in enumerate(parts) if r != src], []).wait()
        return parts[src]
    local = list(shape)
    for axis, b, p in zip(mesh.axes, bounds, mesh.position, strict=False):
        local[2 + axis] = b[p + 1] - b[p]
    return comm.exchange([], [(src, torch.empty(local, dtype=kind, device=device))]).wait()[0]


def _box_of(volume: torch.Tensor, mesh: HaloMesh, bounds: tuple[Bounds, ...], rank: int) -> torch.Tensor:
    for axis, b, p in zip(mesh.axes, bounds, coordinates(rank, mesh.spatial), strict=False):
        volume = volume.narrow(2 + axis, b[p], b[p + 1] - b[p])
    return volume.clone(memory_format=torch.contiguous_format)


def cuts(mesh: HaloMesh, shapes: Sequence[Sequence[int]]) -> tuple[Bounds, ...]:
    """Cuts of a volume from the spatial shapes of all parts, by rank.

    Raises:
        NotPartitionable: if the parts do not fit together or are not cut where the network allows it.
    """
    found = []
    for axis, n, step in zip(mesh.axes, mesh.spatial, mesh.multiple, strict=False):
        rows: list[set[int]] = [set() for _ in range(n)]
        for rank, shape in enumerate(shapes):
            rows[coordinates(rank, mesh.spatial)[mesh.axes.index(axis)]].add(shape[axis])
        sizes = [min(r) for r in rows]
        if any(len(r) > 1 for r in rows) or any(s % step for s in sizes[:-1]) or min(sizes) < 1:
            raise NotPartitionable(
                f"The parts have {[sorted(r) for r in rows]} rows along spatial axis {axis}; parts must agree and be "
                f"multiples of {step} (the network's stride), except the last one. Use scatter() or PartitionCropd."
            )
        found.append(tuple(sum(sizes[:i]) for i in range(n + 1)))
    for axis in set(range(len(shapes[0]))) - set(mesh.axes):
        if len({shape[axis] for shape in shapes}) > 1:
            raise NotPartitionable(f"The parts differ along spatial axis {axis}, which is not split: {list(shapes)}.")
    return tuple(found)


def gather(output: Any, mesh: HaloMesh) -> Any:
    """The whole of an output on every rank (no gradient), for tensors, lists, tuples and dictionaries of them.

    Args:
        output: this rank's part, (B, C, spatial...) each.
        mesh: where the parts live.
    """
    if isinstance(output, (list, tuple)):
        return type(output)(gather(o, mesh) for o in output)
    if isinstance(output, dict):
        return {k: gather(v, mesh) for k, v in output.items()}
    part = output.detach().as_subclass(torch.Tensor).contiguous()
    comm = mesh.comm
    mine = torch.tensor(part.shape, dtype=torch.int64, device=part.device)
    shapes = [s.tolist() for s in comm.all_gather(mine)]
    peers = [r for r in range(comm.size) if r != comm.rank]
    arrivals = comm.exchange([(r, part) for r in peers], [(r, part.new_empty(shapes[r])) for r in peers]).wait()
    parts = dict(zip(peers, arrivals, strict=False)) | {comm.rank: part}
    return _join([parts[r] for r in range(comm.size)], mesh)


def with_meta(output: Any, inputs: torch.Tensor) -> Any:
    """Give outputs the meta data of a MONAI MetaTensor, so that transforms can be inverted."""
    if not isinstance(inputs, MetaTensor):
        return output
    if isinstance(output, (list, tuple)):
        return type(output)(with_meta(o, inputs) for o in output)
    if isinstance(output, dict):
        return {k: with_meta(o, inputs) for k, o in output.items()}
    tensor = MetaTensor(output)
    tensor.copy_meta_from(inputs)
    tensor.is_batch = inputs.is_batch
    return tensor


def _join(parts: list[torch.Tensor], mesh: HaloMesh) -> torch.Tensor:
    """Concatenate parts, last axis of the mesh first."""
    for axis, n in list(zip(mesh.axes, mesh.spatial, strict=False))[::-1]:
        dim = parts[0].dim() - (mesh.spatial_dims or parts[0].dim() - 2) + axis
        parts = [torch.cat(parts[i : i + n], dim) for i in range(0, len(parts), n)]
    return parts[0]
