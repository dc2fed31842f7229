"""Partition a network over the ranks of a mesh, in place and back."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from monai_memeff.halo.errors import NotPartitionableError
from monai_memeff.halo.run.ranks import calls
from monai_memeff.halo.run.ranks.agreement import agree
from monai_memeff.halo.run.ranks.mesh import HaloMesh

_KEPT = 8  # plans per network: training, validation and a few shapes
_CAPTURE = threading.Lock()  # torch.export patches global state


class _Partition:
    """What leads a network's calls to its plans; it is copied with the network and forgets its plans then."""

    def __init__(self, network: nn.Module, mesh: HaloMesh, segments: int) -> None:
        self.network, self.mesh, self.segments = network, mesh, segments
        self.plans: OrderedDict[Any, Any] = OrderedDict()
        self.step = 0

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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same for those who call `forward` themselves; the plan holds the root's hooks, so there must be none."""
        if calls.has_root_hooks(self.network):
            raise NotPartitionableError("The network has hooks; call network(...), not network.forward(...).")
        return self._run(args, kwargs)
