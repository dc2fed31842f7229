"""Partition a network over the ranks of a mesh, in place and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from monai_memeff.arguments import numbers_checked
from monai_memeff.halo.planning.capture import capture, require_capturable
from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.state.fingerprint import fingerprint, mode_key
from monai_memeff.halo.run.ranks import calls
from monai_memeff.halo.run.ranks.agreement import agreed_parts, digest
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.parts import Part
from monai_memeff.halo.run.ranks.schedule import RankPlan
from monai_memeff.memory.threads import one_at_a_time

_KEPT = 8  # plans per network: training, validation and a few shapes
_MARK = "_memeff_partition"
_SKIPPED = frozenset(("_parameters", "_buffers", *calls.ROUTED, _MARK))  # tensors are found by name at every call


class _Partition:
    """What leads a network's calls to its plans; it is copied with the network and starts without plans there."""

    def __init__(self, network: nn.Module, mesh: HaloMesh, segments: int) -> None:
        self.network, self.mesh, self.segments = network, mesh, segments
        self.plans: OrderedDict[Any, RankPlan] = OrderedDict()
        self.agreed: tuple[Any, int] = (None, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Partition:
        network = memo.get(id(self.network))
        if network is None:
            return self
        new = memo[id(self)] = _Partition(network, self.mesh, self.segments)
        # nn.Module.__getstate__ leaves this attribute out of copies; inner modules follow at the copy's first call
        network.__dict__["_compiled_call_impl"] = new.call
        return new

    def __reduce__(self) -> Any:
        raise TypeError(
            "A partitioned network cannot be pickled: save its state_dict(), or unpartition(network) first."
        )

    @torch.compiler.disable
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The network on this rank's parts."""
        calls.lead(self.network, self.call, self.forward)
        args, kwargs = calls.before(self.network, args, kwargs)
        return calls.after(self.network, args, kwargs, self._run(args, kwargs))

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same for those who call `forward` themselves; the plan holds the root's hooks, so there must be none."""
        if calls.has_root_hooks(self.network):
            raise NotPartitionableError(
                "The network is partitioned already and something hooks into it: call network(...), not "
                "network.forward(...), and unpartition(network) before plan, verify or SpatialPartitionInferer."
            )
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        calls.refuse_transforms(self.network, leaves)
        traits = tuple(_traits(self.network))
        if traits != self.agreed[0]:  # the text of a large network takes longer than a small step
            options = (self.mesh.spatial, self.mesh.axes, self.segments)
            self.agreed = traits, digest((str(self.network), traits, options))
        parts = agreed_parts(self.mesh, self.network, self.agreed[1], args, kwargs)
        plan = self._plan(traits, leaves, spec, parts)
        return plan.run(self.network, leaves, self.segments)

    @one_at_a_time
    def _plan(self, traits: Any, leaves: Sequence[Any], spec: Any, parts: Sequence[Part | None]) -> RankPlan:
        described = [_described(leaf, part) for leaf, part in zip(leaves, parts, strict=True)]
        seen = fingerprint(self.network, _SKIPPED)
        wanted = tuple((p.requires_grad, bool(p._backward_hooks)) for p in self.network.parameters())
        key = (traits, seen, wanted, tuple(described), str(spec), torch.is_grad_enabled(), mode_key())
        if key not in self.plans:
            _check_sharding(self.network)
            whole = [_whole(leaf, part) for leaf, part in zip(leaves, parts, strict=True)]
            args, kwargs = tree_unflatten(whole, spec)
            with calls.plain(self.network), calls.with_parameters(self.network):
                program = capture(self.network, args, kwargs)
            plan = RankPlan(program, self.mesh, parts)
            if seen != fingerprint(self.network, _SKIPPED):  # forward changes what the next call sees
                return plan
            self.plans[key] = plan
            while len(self.plans) > _KEPT:
                self.plans.popitem(last=False)
        self.plans.move_to_end(key)
        return self.plans[key]


def _described(leaf: Any, part: Part | None) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape) if part is None else part, leaf.dtype, leaf.device, leaf.requires_grad)
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else id(leaf)


def _whole(leaf: Any, part: Part | None) -> Any:
    """What capture sees of an argument: the whole's shape, without its memory."""
    if part is None:
        return leaf
    return torch.empty(part.shape, dtype=leaf.dtype, device="meta", requires_grad=leaf.requires_grad)


def _simple(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_simple(v) for v in value)
    return isinstance(value, (bool, int, float, str, type(None)))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value


def _traits(network: nn.Module) -> Iterator[Any]:
    """What decides what a network's Python does: settings of every module, shapes and kinds of its tensors."""
    for name, module in network.named_modules():
        settings = tuple((k, _frozen(v)) for k, v in module.__dict__.items() if _simple(v) and k not in calls.ROUTED)
        yield name, type(module).__qualname__, settings
        tensors = [*module._parameters.items(), *module._buffers.items()]
        yield tuple((k, None if t is None else (tuple(t.shape), str(t.dtype))) for k, t in tensors)


@numbers_checked
def spatial_partition(network: nn.Module, mesh: HaloMesh, checkpoint_segments: int = 1) -> nn.Module:
    """Make a network compute on one part of a volume per rank, with the result of the whole.

    The network is captured at the whole volume's shape when it is first called with it, which takes a second or two;
    every rank then runs the same plan on its own rows. The module keeps its class, parameters, `state_dict`, hooks and
    optimizer references, and `deepcopy` copies it partitioned; `unpartition` restores it. Gradients of parameters are
    those of this rank's part; their sum over the spatial ranks is the gradient of the whole, which is what
    DistributedDataParallel and FSDP2 on top make of them behind a `SpatialLoss`. After Hou et al. 2019, section 3
    (https://arxiv.org/abs/1909.03108).

    Args:
        network: any network that `torch.export` captures; its volumes are (B, C, spatial...), given as parts from
            `scatter` (the first volume may also come from `PartitionCropd`). Other tensors are the same on every rank,
            and so are the weights, which DistributedDataParallel sees to.
        mesh: from `init_mesh`.
        checkpoint_segments: parts of the plan of which only inputs and outputs are kept for backward, which then
            computes them once more; 1 keeps everything.

    Returns:
        The same object. A call returns this rank's rows of each output; `gather` collects them.

    Raises:
        ValueError: if the network is partitioned already or `checkpoint_segments` is below 1.
        NotPartitionableError: if it is of a kind that is never run in parts; when called, on every rank, before
            anything is computed: if it cannot be run in parts, if the ranks differ, or if an argument may be a part or
            a whole.

    Examples:
        >>> mesh = init_mesh(data=1, spatial=(1,))  # (2,) under torchrun, with DistributedDataParallel around
        >>> network = spatial_partition(torch.nn.Conv3d(1, 1, 3, padding=1), mesh)
        >>> image, label = torch.ones(2, 1, 1, 9, 8, 8)
        >>> loss = SpatialLoss(torch.nn.MSELoss(), mesh)
        >>> loss(network(scatter(image, mesh)), scatter(label, mesh)).backward()
    """
    if is_partitioned(network):
        raise ValueError("This network is partitioned already; call unpartition(network) first.")
    if checkpoint_segments < 1:
        raise ValueError(f"checkpoint_segments must be at least 1 but is {checkpoint_segments}.")
    require_capturable(network)
    _check_sharding(network)
    partition = _Partition(network, mesh, checkpoint_segments)
    network.__dict__[_MARK] = partition
    calls.lead(network, partition.call, partition.forward)
    return network


def _check_sharding(network: nn.Module) -> None:
    inner = calls.sharded_inside(network)
    if inner is not None:
        raise NotPartitionableError(f"fully_shard was applied to '{inner}': apply it to the partitioned root only.")


def is_partitioned(network: nn.Module) -> bool:
    """Whether `spatial_partition` was applied."""
    return _MARK in network.__dict__


def unpartition(network: nn.Module) -> nn.Module:
    """Undo `spatial_partition`, in place.

    Examples:
        >>> network = torch.nn.Conv3d(1, 2, 3, padding=1)
        >>> unpartition(spatial_partition(network, init_mesh(spatial=(1,)))) is network
        True
    """
    if is_partitioned(network):
        calls.release(network)
        network.__dict__.pop(_MARK)
    return network
