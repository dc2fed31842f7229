"""SparseInferer: a whole volume through a sparse network in one pass."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from monai_memeff.errors import InputError
from monai_memeff.sparse.core.tensor import SparseTensor


class SparseInferer(Inferer):
    """Run a sparse network on the whole volume at once; takes the place of a sliding-window inferer.

    The dense volume stays where it is (host memory, say); only its active voxels travel to the network's device, and
    only their logits come back.

    Args:
        device: where the network computes; default the device of its first parameter.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.device = None if device is None else torch.device(device)

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
            InputError: the network's voxels lie on another grid than the volume, whose space they would be given.
        """
        bare = getattr(network, "module", network)
        device = self.device or next(bare.parameters()).device
        if isinstance(inputs, SparseTensor):
            return network(inputs.to(device), *args, **kwargs)
        if not (hasattr(bare, "sparsify") and hasattr(bare, "densify")):
            raise TypeError(
                f"SparseInferer needs a network with the methods sparsify and densify, got {type(bare).__name__}; "
                "use a network of monai_memeff.sparse, or MONAI's SlidingWindowInferer for dense networks."
            )
        logits = network(bare.sparsify(inputs).to(device), *args, **kwargs)
        shape = tuple(inputs.shape[2:])
        if logits.spatial_shape != shape:
            raise InputError(
                f"the network gave voxels on a grid of {logits.spatial_shape}, the volume has {shape}; "
                "bring the volume to the fine grid first, or call the network itself."
            )
        dense = bare.densify(logits.to(inputs.device))
        return convert_to_dst_type(dense, inputs, dtype=dense.dtype, device=dense.device)[0]
