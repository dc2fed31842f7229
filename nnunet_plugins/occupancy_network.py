"""OccupancyNet as nnU-Net builds networks from plans: points in training, dense logits by the octree otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monai_memeff.occupancy import OccupancyNet
from monai_memeff.occupancy.inferer import OctreeInferer
from nnunet_plugins.networks import mark_class_layers


class OccupancyPlansNet(OccupancyNet):
    """The default :class:`~monai_memeff.occupancy.OccupancyNet` with nnU-Net's names of arguments.

    With points it answers them. Without, it gives dense logits: by the octree or voxel after voxel.

    Args:
        input_channels: modalities.
        num_classes: labels without the ignore label, background first.
        channels: features of the encoder's levels, finest first.
        width: features in the decoder.
        blocks: residual blocks of the decoder.
        points_per_pass: most points answered at once.
        inference: ``"octree"`` or ``"dense"``.
        initial: where the octree starts: ``"grid"`` or ``"network"``, see OctreeInferer.
        deep_supervision: set by nnU-Net; there is one output only.

    Raises:
        ValueError: another word for ``inference`` or ``initial``.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        channels: Sequence[int] = (32, 64, 128, 128),
        width: int = 128,
        blocks: int = 3,
        points_per_pass: int = 2**16,
        inference: str = "octree",
        initial: str = "grid",
        deep_supervision: bool = False,
    ) -> None:
        if inference not in ("octree", "dense"):
            raise ValueError(f"inference must be 'octree' or 'dense', got {inference!r}.")
        options: dict[str, Any] = {
            "channels": tuple(channels),
            "variant": "interpolated",
            "width": width,
            "blocks": blocks,
            "points_per_pass": points_per_pass,
        }
        super().__init__(input_channels, num_classes, **options)
        mark_class_layers(self, lambda: OccupancyNet(input_channels, num_classes + 1, **options))
        self.octree = OctreeInferer(points_per_pass, initial) if inference == "octree" else None

    @torch.compiler.disable
    def forward(self, volume: Tensor, points: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits of points and auxiliary logits, or logits (B, K, H, W, D) of a patch."""
        if points is None and self.octree is not None and not self.training:
            return self.octree(volume, self)
        return super().forward(volume, points)
