"""Partition any network of known layers in place and back."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from monai_memeff.halo.guard import Guard, tensors_in
from monai_memeff.halo.layers import CONTAINERS, POINTWISE, TABLE, refuse
from monai_memeff.halo.mesh import HaloMesh
from monai_memeff.halo.region import Layout, Region, forget, region_of
from monai_memeff.halo.stride import network_stride, spatial_dims_of
from monai_memeff.halo.volume import cuts


class _Guarded:
    """Mixed into the network and into every module with a forward of its own."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        region = region_of(self)
        region.state.names.append(self.halo_name or type(self).__name__)
        try:
            if region.state.guarded:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            with _guarding(region, args, kwargs, self.halo_root) as (args, kwargs):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            region.state.names.pop()


class _guarding:
    """Switches the guard on, and at the network's entrance agrees with the other ranks on how the volume is cut."""

    def __init__(self, region: Region, args: Any, kwargs: Any, root: bool) -> None:
        self._region, self._root = region, root
        self._args, self._kwargs = _plain(args), _plain(kwargs)
        self._guard = Guard(region)

    def __enter__(self) -> tuple[Any, Any]:
        tensors = [t for t in tensors_in((self._args, self._kwargs)) if t.dim() > self._region.spatial_dims]
        if self._root:
            if not tensors:
                raise self._region.fail("expected a tensor (B, C, spatial...) as input.")
            layout = agree(self._region, tensors[0])
            for t in tensors:
                if self._region.local(t) == self._region.local(tensors[0]):
                    self._region.tag(t, layout)
        else:  # a recomputed forward: tensors come back without their tags
            for t in tensors:
                if not hasattr(t, "_halo_layout"):
                    self._region.tag(t, self._region.layout(t))
        self._region.state.guarded = True
        self._guard.__enter__()
        return self._args, self._kwargs

    def __exit__(self, *error: Any) -> None:
        self._guard.__exit__(*error)
        self._region.state.guarded = False


def _plain(values: Any) -> Any:
    """Arguments with subclasses of tensors (MONAI's MetaTensor) made plain, and free of older tags."""
    if isinstance(values, torch.Tensor):
        return values.as_subclass(torch.Tensor) if type(values) is not torch.Tensor else values
    if isinstance(values, (list, tuple)):
        return type(values)(_plain(v) for v in values)
    return {k: _plain(v) for k, v in values.items()} if isinstance(values, dict) else values


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def agree(region: Region, x: torch.Tensor) -> Layout:
    """Tell all ranks the shape of this rank's part and learn theirs; refuse on every rank if they do not fit.

    Raises:
        NotPartitionable: if the parts do not make up one volume, or the ranks run different configurations.
    """
    space = x.shape[-region.spatial_dims :]
    seed = int(torch.randint(2**31, ()).item()) if region.random else 0
    state = [
        _DTYPES.index(x.dtype) if x.dtype in _DTYPES else -1,
        int(torch.is_grad_enabled()),
        int(torch.is_grad_enabled() and x.requires_grad),
        int(region.training()),
        int(region.digest[:12] or "0", 16),
    ]
    mine = torch.tensor([*space, *x.shape[:2], *state, seed], dtype=torch.int64, device=x.device)
    headers = [h.tolist() for h in region.comm.all_gather(mine)]
    n = region.spatial_dims
    others = [h[n:-1] for h in headers]
    if any(o != others[0] for o in others):
        raise region.fail(
            f"ranks differ in (batch, channels, dtype, grad mode, input grad, training, configuration): {others}; "
            f"all ranks of a spatial group must run the same network in the same mode."
        )
    bounds = cuts(region.mesh, [h[:n] for h in headers])
    layout = Layout(bounds)
    region.begin(layout, headers[0][-1])
    return layout


_GUARDED: dict[type[nn.Module], type[nn.Module]] = {}


def _guarded_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _GUARDED:
        _GUARDED[kind] = _make_guarded(kind)
    return _GUARDED[kind]


def _make_guarded(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Partitioned{kind.__name__}", (_Guarded, kind), {"__module__": kind.__module__, "halo_original": kind})


def _replacement(name: str, module: nn.Module) -> type[nn.Module] | None:
    """Class to swap in, None if the module stays as it is.

    Raises:
        NotPartitionable: if the module is a layer of torch that is not in the table.
    """
    kind = type(module)
    if kind in TABLE:
        return TABLE[kind]
    if kind in POINTWISE or kind in CONTAINERS:
        return None
    if not any(True for _ in module.children()) and kind.__module__.startswith("torch.nn"):
        raise refuse(name or "network", module)
    return _guarded_class(kind)


def _swaps(network: nn.Module) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    for name, module in network.named_modules():
        new = _replacement(name, module)
        if new is not None:
            yield name, module, new


def is_partitioned(network: nn.Module) -> bool:
    """Whether `spatial_partition` was applied."""
    return "halo_key" in network.__dict__


def spatial_partition(
    network: nn.Module,
    mesh: HaloMesh,
    multiple: int | Sequence[int] | None = None,
    overlap: bool = True,
) -> nn.Module:
    """Make a network compute on one part of a volume per rank, with the result of the whole.

    Layers are swapped in place by the table in `monai_memeff.halo.layers`: parameters, `state_dict` keys, optimizer
    references and `deepcopy` survive, and `unpartition` restores the network. Gradients of parameters are those of this
    rank's part; their sum over the spatial ranks is the gradient of the whole. After Hou et al. 2019, section 3
    (https://arxiv.org/abs/1909.03108).

    Args:
        network: any network made of layers in the table; its input is (B, C, spatial...).
        mesh: from `init_mesh`, `virtual_mesh` or `no_mesh`; its `multiple` is raised to the network's stride.
        multiple: rows between possible cuts (one number, or one per split axis); found by a dry run on the meta
            device if None.
        overlap: convolve the interior while halo rows fly; False exchanges first and convolves once, which rounds
            exactly as the whole does in low precision.

    Returns:
        The same object.

    Raises:
        NotPartitionable: if a layer is not in the table; the network is then unchanged.
        ValueError: if the mesh splits an axis the network does not have.
    """
    if is_partitioned(network):
        raise ValueError("This network is partitioned already; call unpartition(network) first.")
    dims = spatial_dims_of(network)
    if max(mesh.axes) >= dims:
        raise ValueError(f"The mesh splits spatial axes {mesh.axes} but the network has only {dims} spatial axes.")
    swaps = list(_swaps(network))
    steps = _multiples(network, mesh, dims, multiple)
    mesh.spatial_dims = dims
    mesh.multiple = tuple(math.lcm(a, b) for a, b in zip(mesh.multiple, steps, strict=False))
    digest = hashlib.sha256(str(network).encode()).hexdigest()
    region = Region(mesh, dims, overlap, digest)
    region.watch(network)
    for name, module, new in swaps:
        module.__class__ = new
        module.__dict__.update(halo_key=region.key, halo_name=name, halo_root=False)
    if not isinstance(network, _Guarded):
        network.__class__ = _guarded_class(type(network))
    network.__dict__.update(halo_key=region.key, halo_name="", halo_root=True)
    return network


def _multiples(network: nn.Module, mesh: HaloMesh, dims: int, multiple: int | Sequence[int] | None) -> Sequence[int]:
    if isinstance(multiple, int):
        return [multiple] * len(mesh.axes)
    if multiple is not None:
        return list(multiple)
    strides = network_stride(network, dims)
    return [strides[a] for a in mesh.axes]


def unpartition(network: nn.Module) -> nn.Module:
    """Undo `spatial_partition`, in place."""
    keys = set()
    for module in network.modules():
        if "halo_key" not in module.__dict__:
            continue
        keys.add(module.__dict__["halo_key"])
        while hasattr(type(module), "halo_original"):
            module.__class__ = type(module).halo_original
        for name in ("halo_key", "halo_name", "halo_root"):
            module.__dict__.pop(name, None)
    for key in keys:
        forget(key)
    return network


def replica(network: nn.Module, share_buffers: bool = True) -> nn.Module:
    """A copy of the modules on the same parameters, for one virtual rank: some networks keep tensors on themselves.

    Args:
        network: partitioned network.
        share_buffers: also use the same buffers; False where running statistics are updated.
    """
    shared = [*network.parameters(), *(network.buffers() if share_buffers else ())]
    return copy.deepcopy(network, {id(t): t for t in shared})
