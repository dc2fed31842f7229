"""SparseCompletionNet: the generative sparse auto-encoder that completes a structure such as a skull."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import ClassVar

import torch
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_mask
from monai_memeff.geometry import key_lists
from monai_memeff.memory import checkpoint
from monai_memeff.sparse.core.activity import ABSENT_LOGIT
from monai_memeff.sparse.core.annotation import check_ignore_index, foreground_and_ignored
from monai_memeff.sparse.core.tensor import SparseTensor, nonzero_voxels
from monai_memeff.sparse.core.voxel_set import VoxelSet
from monai_memeff.sparse.networks.budget import check_budget, check_candidates, prune_to_budget
from monai_memeff.sparse.nn.activations import SparseReLU
from monai_memeff.sparse.nn.blocks import SparseBatchNorm3d
from monai_memeff.sparse.nn.conv import SparseConv3d, SparseConvTranspose3d


class SparseCompletionNet(nn.Module):
    """Generative sparse auto-encoder that completes a binary structure such as a skull.

    Kroviakov, Li and Egger, "Sparse convolutional neural network for skull reconstruction", AutoImplant 2021; Li et
    al., Sci Rep 13:20229 (2023), doi 10.1038/s41598-023-47437-6, table of layers. Encoder: a 3^3 convolution, then
    six times a 2^3 convolution of stride 2 and a 3^3 convolution. Decoder: six times a generative transposed
    convolution of stride 2 (kernel 4 first, then 2), a 3^3 convolution, the sum with the encoder's features over the
    union of both voxel sets, and a 1^3 convolution to one occupancy logit per candidate voxel; candidates with a
    logit above 0 go on to the next level, in training also those of the target. Every convolution but the heads is
    followed by batch norm and ReLU. Candidates beyond the border are clipped.

    Args:
        channels: features at strides 1, 2, 4, 8, 16, 32, 64. Published lists and their parameters: (8, 8, 16, 16, 32,
            32, 64) 434,695; (22, 32, 32, 128, 156, 256, 388) 18,137,201; (2, 2, 4, 4, 4, 4, 16) 16,563.
        use_checkpoint: recompute the activations of every block in the backward pass instead of keeping them.
        max_voxels: candidates that one volume may have at one level, the encoder's own voxels included. Where there
            would be more, the voxels with the largest logits go on (in training those of the target before others) and
            a warning says so; None: no bound. It bounds the memory of the worst case, such as a network that has not
            learned to prune yet. A volume that has more to begin with, or at the first level, is refused.
        ignore_index: label of voxels without annotation, in the values of the target; not 0.

    Shape: the input is a SparseTensor with one channel, or a dense (B, 1, H, W, D) volume that is non-zero where
    there is something. In training mode the output is a list of six SparseTensors of candidate logits, coarsest
    first, for :class:`SparseCompletionLoss`. In evaluation mode it is the logits at full resolution: dense (B, 1, H,
    W, D) for a dense input, with -10 where no candidate was generated, or a SparseTensor for a sparse one.

    The published network has a last 1^3 convolution after the final pruning that is never in the loss; it is kept as
    ``final``, frozen and not computed, so that parameter counts and checkpoints agree.

    Raises:
        ValueError: not seven channels, ``max_voxels`` below 64 or ``ignore_index`` 0; ``forward`` names its own.

    Examples:
        >>> skull = torch.eye(64).expand(1, 1, 64, 64, 64)
        >>> SparseCompletionNet().eval()(skull).shape
        torch.Size([1, 1, 64, 64, 64])
    """

    why_not_in_parts: ClassVar[str] = "it computes active voxels only, wherever they are: use SparseInferer"

    @numbers_checked
    def __init__(
        self,
        channels: Sequence[int] = (8, 8, 16, 16, 32, 32, 64),
        use_checkpoint: bool = False,
        max_voxels: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != 7 or min(channels) < 1:
            raise ValueError(f"channels must be seven positive numbers (strides 1 ... 64), got {tuple(channels)}.")
        if max_voxels is not None and not (isinstance(max_voxels, Integral) and max_voxels >= 64):
            raise ValueError(
                "max_voxels must be a whole number of at least 64, what one voxel can generate at once, got "
                f"{max_voxels}; give the number of voxels that fit into memory, or None for no bound."
            )
        self.channels = tuple(channels)
        self.use_checkpoint = use_checkpoint
        self.max_voxels = max_voxels
        self.ignore_index = check_ignore_index(ignore_index)
        self.stem = _conv_block(1, channels[0])
        self.encoder = nn.ModuleList(_down_block(channels[i], channels[i + 1]) for i in range(6))
        kernels = (2, 2, 2, 2, 2, 4)
        self.decoder = nn.ModuleList(_up_block(channels[i + 1], channels[i], kernels[i]) for i in reversed(range(6)))
        self.heads = nn.ModuleList(SparseConv3d(channels[i], 1, 1) for i in reversed(range(6)))
        self.final = SparseConv3d(channels[0], 1, 1).requires_grad_(False)

    @torch.compiler.disable  # every number of active voxels would be compiled anew
    def forward(
        self, x: SparseTensor | Tensor, target: SparseTensor | Tensor | None = None
    ) -> list[SparseTensor] | SparseTensor | Tensor:
        """Complete a structure.

        Args:
            x: the incomplete structure (see the class).
            target: the complete structure on the same grid, sparse or dense; required in training, ignored otherwise.

        Raises:
            ValueError: no target is given in training, shapes do not fit, the volume holds NaN, infinity or negative
                numbers, or a volume has more voxels than ``max_voxels`` to begin with.
        """
        if self.training and target is None:
            raise ValueError("SparseCompletionNet prunes with the target in training: call network(x, target).")
        present = self.sparsify(x)
        check_budget(present.voxels, self.max_voxels)
        wanted = None
        if self.training and target is not None:
            wanted = _target_keys(foreground_and_ignored(target, self.ignore_index)[0], present)
        levels = self._decode(self._encode(present), wanted)
        if self.training:
            return levels
        if isinstance(x, SparseTensor):
            return levels[-1]
        logits = self.densify(levels[-1])
        return convert_to_dst_type(logits, x, dtype=logits.dtype, device=logits.device)[0]

    def sparsify(self, volume: SparseTensor | Tensor) -> SparseTensor:
        """The non-zero voxels of (B, 1, H, W, D), which holds no negative numbers; a SparseTensor as it is."""
        if isinstance(volume, Tensor):
            check_mask(volume, "SparseCompletionNet")
        return nonzero_voxels(volume)

    def densify(self, logits: SparseTensor) -> Tensor:
        """Logits (B, 1, H, W, D), -10 where no candidate was generated."""
        return logits.dense(-ABSENT_LOGIT)

    def _encode(self, x: SparseTensor) -> list[SparseTensor]:
        ones = torch.ones_like(x.features, dtype=self.heads[0].weight.dtype)
        features = [self._run(self.stem, x.replace(ones))]
        for block in self.encoder:
            features.append(self._run(block, features[-1]))
        if not torch.is_grad_enabled():  # the decoder works on other voxels: free what the encoder planned
            for level in features:
                level.voxels.forget_plans()
        return features

    def _decode(self, features: list[SparseTensor], wanted: list[Tensor] | None) -> list[SparseTensor]:
        x = features.pop()
        levels: list[SparseTensor] = []
        for number, (block, head) in enumerate(zip(self.decoder, self.heads, strict=True)):
            present = features.pop()
            if number == 0:
                check_candidates(block[0].generated_voxels(x), present.voxels, self.max_voxels)
            x = self._run(block, x) + present
            logits = head(x)
            levels = [*levels, logits] if self.training else [logits]
            if number < len(self.heads) - 1:
                in_target = None if wanted is None else wanted[number]
                x = x.prune(self._worth_refining(logits, features[-1].voxels, in_target))
        return levels

    def _run(self, block: nn.Module, x: SparseTensor) -> SparseTensor:
        if not (self.use_checkpoint and self.training):
            return block(x)
        result: SparseTensor = checkpoint(block, x)
        result.voxels.forget_plans()
        return result

    def _worth_refining(self, logits: SparseTensor, present: VoxelSet, wanted: Tensor | None) -> Tensor:
        """(N,) boolean: voxels with a logit above zero or in the target, within the budget of the next level."""
        values = logits.features.detach()[:, 0]
        keep = values > 0
        if wanted is not None:
            in_target = key_lists.contains(wanted, logits.voxels.keys, logits.voxels.cells)
            keep |= in_target
            values = values.masked_fill(in_target, torch.inf)
        return prune_to_budget(keep, values, logits.voxels, present, self.max_voxels)


def _target_keys(target: SparseTensor, present: SparseTensor) -> list[Tensor]:
    """Keys of the target's cells at strides 32, 16, 8, 4, 2, 1."""
    if not target.voxels.same_grid(present.voxels):
        raise ValueError(
            "the target must lie on the grid of the input: (batch_size, spatial_shape, stride) "
            f"{(present.batch_size, present.spatial_shape, present.stride)}, "
            f"got {(target.batch_size, target.spatial_shape, target.stride)}."
        )
    sets = [target.voxels]
    for _ in range(5):
        sets.append(sets[-1].coarsened((2, 2, 2)))
    return [voxel_set.keys for voxel_set in reversed(sets)]


class _ConvBlock(nn.Sequential):
    """Convolution, batch norm and ReLU, the latter two fused."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Run the three layers."""
        convolution, norm, act = self
        return norm(convolution(x), act)


class _UpBlock(nn.Sequential):
    """A generative convolution with batch norm and ReLU, and a :class:`_ConvBlock`."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Run all layers."""
        grow, norm, act, block = self
        return block(norm(grow(x), act))


def _conv_block(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> _ConvBlock:
    convolution = SparseConv3d(in_channels, out_channels, kernel_size, stride, bias=False)
    return _ConvBlock(convolution, SparseBatchNorm3d(out_channels), SparseReLU())


def _down_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_conv_block(in_channels, out_channels, 2, 2), _conv_block(out_channels, out_channels))


def _up_block(in_channels: int, out_channels: int, kernel_size: int) -> _UpBlock:
    """The published engine's even kernels reach forward only, 0 ... kernel_size - 1: no padding."""
    grow = SparseConvTranspose3d(in_channels, out_channels, kernel_size, 2, bias=False, generative=True, padding=0)
    return _UpBlock(grow, SparseBatchNorm3d(out_channels), SparseReLU(), _conv_block(out_channels, out_channels))
