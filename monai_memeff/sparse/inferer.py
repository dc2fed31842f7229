"""SparseInferer: a whole volume through a sparse network in one pass."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import as_device, check_logits
from monai_memeff.errors import InputError
from monai_memeff.memory import measure_peak
from monai_memeff.memory.budget import lacking, ran_out, refusing_when_full
from monai_memeff.sparse.core.tensor import SparseTensor


class SparseInferer(Inferer):
    """Run a sparse network on the whole volume at once; takes the place of a sliding-window inferer.

    The dense volume stays where it is (host memory, say); only its active voxels travel to the network's device, and
    only their logits come back.

    Args:
        device: where the network computes; default the device of its first parameter.
        memory_budget: bytes that the network may take on its device, beside its weights, for each volume of the batch:
            they go through one after the other, and what takes more is refused with the bytes it took. One volume has
            no smaller parts: its sites see each other through the whole network.

    Where the device runs out of memory, the volumes of a batch go through one after the other.

    Examples:
        >>> network = SparseUNet(3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,)).eval()
        >>> SparseInferer()(torch.eye(16).expand(1, 1, 16, 16, 16), network).shape
        torch.Size([1, 2, 16, 16, 16])
    """

    @numbers_checked
    def __init__(self, device: str | torch.device | None = None, memory_budget: int | None = None) -> None:
        super().__init__()
        self.memory_budget = memory_budget
        self.device = None if device is None else as_device(device)

    def __call__(
        self, inputs: Tensor | SparseTensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> Tensor | SparseTensor:
        """Infer.

        Args:
            inputs: (B, C, H, W, D) on any device, or a SparseTensor.
            network: a sparse network of this package (it says which voxels are active), or anything with the methods
                ``sparsify`` and ``densify``; bare or inside DistributedDataParallel.
            args: passed on to the network.
            kwargs: passed on to the network.

        Returns:
            Logits (B, K, H, W, D) on the device of ``inputs``; a SparseTensor if ``inputs`` is one.

        Raises:
            TypeError: the network does not say which voxels are active.
            InputError: the network's voxels lie on another grid than the volume, whose space they would be given; or a
                volume needs more than ``memory_budget`` or the device's memory; or, with a budget, there are further
                arguments, or several volumes in training.
        """
        bare = getattr(network, "module", network)
        device = self.device or next(bare.parameters()).device
        if isinstance(inputs, SparseTensor):
            what = f"a SparseTensor of {len(inputs.features)} voxels"
            with refusing_when_full(what, device, "take fewer, or give it more memory"):
                return network(inputs.to(device), *args, **kwargs)
        if not (hasattr(bare, "sparsify") and hasattr(bare, "densify")):
            raise TypeError(
                f"SparseInferer needs a network with the methods sparsify and densify, got {type(bare).__name__}; "
                "use a network of monai_memeff.sparse, or MONAI's SlidingWindowInferer for dense networks."
            )
        if self.memory_budget is None or len(inputs) == 0:
            try:
                return self._dense(inputs, network, bare, device, *args, **kwargs)
            except RuntimeError as error:
                if not ran_out(error, device):
                    raise
                if len(inputs) < 2 or bare.training:
                    raise InputError(_too_much(inputs, lacking(error, device))) from error
        # each volume has its own parts of what is passed on only where nothing else is
        if args or kwargs or (bare.training and len(inputs) > 1):
            raise InputError(
                "SparseInferer passes volumes singly within memory_budget: in evaluation, without arguments"
            )
        parts = [self._bounded(item, network, bare, device) for item in inputs.split(1)]
        dense = torch.cat(parts)
        return convert_to_dst_type(dense, inputs, dtype=dense.dtype, device=dense.device)[0]

    def _bounded(self, item: Tensor, network: nn.Module, bare: Any, device: torch.device) -> Tensor:
        """One volume, refused where it takes more than the budget."""
        try:
            if self.memory_budget is None:
                return self._dense(item, network, bare, device).as_subclass(Tensor)
            with measure_peak(device) as meter:
                dense = self._dense(item, network, bare, device).as_subclass(Tensor)
        except RuntimeError as error:
            if not ran_out(error, device):
                raise
            raise InputError(_too_much(item, lacking(error, device))) from error
        if meter.peak_bytes > self.memory_budget:
            raise InputError(
                _too_much(item, f"needs more than memory_budget = {self.memory_budget}, it took {meter.peak_bytes}")
            )
        return dense

    def _dense(
        self, inputs: Tensor, network: nn.Module, bare: Any, device: torch.device, *args: Any, **kwargs: Any
    ) -> Tensor:
        logits = network(bare.sparsify(inputs).to(device), *args, **kwargs)
        shape = tuple(inputs.shape[2:])
        if logits.spatial_shape != shape:
            raise InputError(
                f"the network gave voxels on a grid of {logits.spatial_shape}, the volume has {shape}; "
                "bring the volume to the fine grid first, or call the network itself."
            )
        if not bare.training:
            check_logits(logits.features, "the sparse network")
        dense = bare.densify(logits.to(inputs.device))
        return convert_to_dst_type(dense, inputs, dtype=dense.dtype, device=dense.device)[0]


def _too_much(volume: Tensor, needs: str) -> str:
    planes = volume.as_subclass(Tensor).transpose(0, 2)  # a plane at a time: memory may just have run out
    active = sum(int((plane != 0).any(0).sum()) for plane in planes)
    return (
        f"a volume of {tuple(volume.shape[2:])} voxels with {active} that are not 0 {needs}: crop it, take a "
        "coarser grid, or give it more memory"
    )
