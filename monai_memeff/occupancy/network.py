"""OccupancyNet: a volume is encoded once at low resolution, then answers any point of it at full resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from monai.networks.layers import get_norm_layer
from monai.utils import convert_to_dst_type
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.arguments import numbers_checked
from monai_memeff.checks import check_layer
from monai_memeff.geometry import index_to_unit, sample_at
from monai_memeff.norms import accept_single_values
from monai_memeff.occupancy.checks import checked_points, checked_shape, checked_volume, plain_tensor
from monai_memeff.occupancy.nn.activation import activation
from monai_memeff.occupancy.nn.decoder import PointDecoder
from monai_memeff.occupancy.nn.encoder import (
    AuxiliaryHead,
    CoarseHead,
    PlainLatentHead,
    PooledLatentHead,
    ResidualEncoder,
    SkipLatentHead,
)
from monai_memeff.occupancy.nn.norm import Statistics
from monai_memeff.occupancy.nn.patches import PatchEncoder, PatchLinear, gather_patches, halved, voxels_of


class Variant(NamedTuple):
    """What a variant consists of; Reich et al., BMVC 2021, table 1, and our own."""

    skip: bool = False
    local: bool = False
    mid_range: bool = False
    interpolated: bool = False


VARIANTS = {
    "o-net": Variant(),
    "a": Variant(local=True),
    "b": Variant(local=True, mid_range=True),
    "c": Variant(skip=True, local=True),
    "d": Variant(skip=True, local=True, mid_range=True),
    "interpolated": Variant(local=True, interpolated=True),
}


class Latent(NamedTuple):
    """What :meth:`OccupancyNet.encode` remembers of a volume.

    Attributes:
        conditions: (B, L) each: one for the decoder's input, then one per block.
        features: feature maps (B, F, h, w, d) to interpolate at points, finest first; none in the paper's variants.
        coarse: auxiliary logits (B, K, h, w, d), or None.
        halved: means of 2^3 voxels at every place, for mid-range patches, or None.
    """

    conditions: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    coarse: Tensor | None
    halved: Tensor | None

    def item(self, number: int) -> Latent:
        """What belongs to one volume of the batch, as a batch of one."""
        own = slice(number, number + 1)
        conditions, features = (tuple(part[own] for part in parts) for parts in (self.conditions, self.features))
        coarse, halved = (None if part is None else part[own] for part in (self.coarse, self.halved))
        return Latent(conditions, features, coarse, halved)


class OccupancyNet(nn.Module):
    """OSS-Net: segmentation as a function of points, queried only where a label is wanted.

    Reich, Prangemeier, Cetin and Koeppl, "OSS-Net: memory efficient high resolution semantic segmentation of 3D medical
    data", BMVC 2021 (arXiv 2110.10640), section 3. The variants ``"o-net"`` and ``"a"`` ... ``"d"`` are those of its
    table 1, with the authors' sizes, Pade activations, raw voxel indices as coordinates and one latent vector per
    volume (six in ``"c"`` and ``"d"``), which fixes the extents of the volume. ``"c"`` and ``"d"`` have the auxiliary
    low-resolution head; ``"a"`` ... ``"d"`` read the 7^3 voxels around a point, ``"b"`` and ``"d"`` also the 14^3 ones,
    average-pooled to 7^3 (from 7 voxels before to 6 after the point's voxel).

    ``"interpolated"``, the default, is not in the paper. It takes volumes of any extents, one voxel included:
    coordinates in the unit cube, features of all encoder levels interpolated at the point, the 7^3 voxels around it
    through one linear layer, an auxiliary head, group norm and leaky ReLU in the encoder, per-feature statistics in the
    decoder.

    Args:
        in_channels: Number of channels of the volume.
        out_channels: Number of logits K; 1 for one binary structure, else one per class with the background first.
        volume_shape: Extents (H, W, D) of every volume, divisible by ``downscale * 2 ** len(channels)``. The paper's
            variants need it, ``"interpolated"`` ignores it.
        channels: Features of the encoder's levels, finest first. Published: 16 to 128 for BraTS, 8 to 128 for LiTS.
        variant: ``"interpolated"``, or ``"o-net"``, ``"a"``, ``"b"``, ``"c"``, ``"d"`` as published.
        encoder: Module in the place of the residual blocks of ``"interpolated"``. It returns a feature map or a list of
            them (finest first) with the numbers of features in ``channels``, such as MONAI's ResNetFeatures.
        width: Number of features in the decoder; None: 512 as published, 128 in ``"interpolated"``.
        blocks: Number of residual blocks of the decoder; None: 5 as published, 3 in ``"interpolated"``.
        statistics: Those of the conditional batch norm, ``"scalar"`` (authors' code), ``"feature"``; None: as above.
        act: ``"PADE"`` or an activation as in MONAI; None: as above.
        norm: Norm of the encoder, as in MONAI; None: batch norm as published, groups of up to 8 in ``"interpolated"``.
        normalize_coordinates: Coordinates in the unit cube instead of voxel indices; None: as above.
        downscale: Factor by which the encoder's volume is smaller, by trilinear interpolation.
        points_per_pass: Number of points of one pass of :meth:`forward`; memory grows with it, results do not change.

    Shape: (B, in_channels, H, W, D) -> logits (B, out_channels, H, W, D).

    Raises:
        ValueError: an unknown variant, an encoder for a variant of the paper, or extents that do not divide.

    Examples:
        >>> OccupancyNet(1, 3, channels=(4, 8, 8)).eval()(torch.rand(1, 1, 16, 16, 16)).shape
        torch.Size([1, 3, 16, 16, 16])
    """

    why_not_in_parts: ClassVar[str] = "it is queried point by point: use OctreeInferer"

    @numbers_checked
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        volume_shape: Sequence[int] | None = None,
        channels: Sequence[int] = (32, 64, 128, 128),
        variant: str = "interpolated",
        encoder: nn.Module | None = None,
        width: int | None = None,
        blocks: int | None = None,
        statistics: Statistics | None = None,
        act: tuple | str | None = None,
        norm: tuple | str | None = None,
        normalize_coordinates: bool | None = None,
        downscale: int = 2,
        points_per_pass: int = 2**14,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
        self.parts = parts = VARIANTS[variant]
        ours = parts.interpolated
        if encoder is not None and not ours:
            raise ValueError(f"variant {variant!r} has its own encoder: use variant='interpolated' with another one.")
        if not channels:
            raise ValueError("channels must name a level or more, got none.")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.downscale, self.points_per_pass = downscale, points_per_pass
        self.volume_shape = None if ours else checked_shape(volume_shape, downscale * 2 ** len(channels))
        self.normalize_coordinates = ours if normalize_coordinates is None else normalize_coordinates
        width, blocks = width or (128 if ours else 512), blocks or (3 if ours else 5)
        act = act or (("leakyrelu", {"negative_slope": 0.01}) if ours else "PADE")
        norm = norm or ("batch" if not ours else ("group", {"num_groups": _groups(channels)}))
        check_layer("norm", norm, lambda: get_norm_layer(norm, 3, channels[0]))
        check_layer("act", act, lambda: activation(act))
        self.encoder = encoder or ResidualEncoder(in_channels, channels, act, norm)
        self.code = (PooledLatentHead if ours else SkipLatentHead if parts.skip else PlainLatentHead)(channels, blocks)
        self.coarse_head = _coarse_head(parts, channels, out_channels)
        cells = math.prod(self.volume_shape or ()) // (downscale * 2 ** len(channels)) ** 3
        condition = channels[-1] if ours else cells
        self.patch_encoder = _patch_encoder(parts, in_channels, act)
        known = 3 + condition + (sum(channels) if ours else 0)
        known += self.patch_encoder.features if self.patch_encoder else 0
        self.decoder = PointDecoder(
            known, out_channels, width, blocks, condition, act, statistics or ("feature" if ours else "scalar")
        )
        for part in (self.code, self.decoder, *(() if encoder else (self.encoder,))):
            accept_single_values(part)

    def encode(self, volume: Tensor) -> Latent:
        """Look at a volume once.

        Args:
            volume: (B, in_channels, H, W, D), finite, floating point.

        Raises:
            ValueError: wrong shape, or values that are NaN or infinite.
        """
        volume = checked_volume(volume, self.in_channels, self.volume_shape, self._dtype_of())
        small = volume
        if self.downscale > 1:
            grid = [max(1, extent // self.downscale) for extent in volume.shape[2:]]
            small = F.interpolate(volume, grid, mode="trilinear", align_corners=False)
        found = self.encoder(small)
        features = [found] if isinstance(found, Tensor) else list(found)
        return Latent(
            self.code(features),
            tuple(features) if self.parts.interpolated else (),
            None if self.coarse_head is None else self.coarse_head(features),
            halved(volume) if self.parts.mid_range else None,
        )

    def query(self, latent: Latent, points: Tensor, volume: Tensor) -> Tensor:
        """Answer points.

        Args:
            latent: Latent of the same volume, from :meth:`encode`.
            points: (B, N, 3) positions (i, j, k) in voxel indices of the volume, between voxels too; voxel i covers
                [i - 1/2, i + 1/2]. Patches are those of the voxel that holds the point.
            volume: Volume, as for :meth:`encode`.

        Returns:
            Logits (B, N, out_channels).

        Raises:
            ValueError: points of another shape, outside the volume, or NaN.
        """
        plain = plain_tensor(volume)
        points = checked_points(points, plain)
        shape, dtype = tuple(plain.shape[2:]), self._dtype_of(plain)
        points = points.to(torch.promote_types(points.dtype, dtype))  # never rounded to half precision
        unit = index_to_unit(points, shape)
        known = [unit if self.normalize_coordinates else points]
        if self.patch_encoder is not None:
            voxels = voxels_of(points, shape)
            patches = [gather_patches(plain, voxels, dtype=dtype)]
            if latent.halved is not None:
                patches.append(gather_patches(latent.halved, voxels, step=2))
            known.append(self.patch_encoder(torch.cat(patches, 2).flatten(2)))
        known.append(latent.conditions[0][:, None].expand(-1, points.shape[1], -1))
        known += [sample_at(level.to(unit.dtype), unit).transpose(1, 2) for level in latent.features]
        return self.decoder(torch.cat(known, 2).to(dtype), latent.conditions[1:])

    def coarse_logits(self, latent: Latent) -> Tensor | None:
        """Auxiliary logits (B, K, h, w, d) at low resolution; None for variants without that head."""
        return latent.coarse

    def forward(self, volume: Tensor, points: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        """Dense logits, or, given points, what the loss needs.

        Args:
            volume: (B, in_channels, H, W, D).
            points: (B, N, 3) in voxel indices.

        Returns:
            Logits (B, K, H, W, D), computed in passes of ``points_per_pass`` points of one volume; with points, logits
            (B, N, K) and auxiliary logits (B, K, h, w, d) or None. In training mode a pass takes the same points of all
            volumes, and batch norm sees these.
        """
        latent = self.encode(volume)
        if points is not None:
            return self.query(latent, points, volume), latent.coarse
        logits = self._dense(latent, plain_tensor(volume))
        return convert_to_dst_type(logits, volume, dtype=logits.dtype, device=logits.device)[0]

    def _dtype_of(self, volume: Tensor | None = None) -> torch.dtype:
        """In which the network answers: the volume's, or that of its weights for integers."""
        floats = volume is not None and volume.is_floating_point()
        return volume.dtype if floats and volume is not None else self.decoder.final.weight.dtype

    def _dense(self, latent: Latent, volume: Tensor) -> Tensor:
        if self.training or len(volume) == 1:
            return self._dense_together(latent, volume)
        items = (self._dense_together(latent.item(n), volume[n : n + 1]) for n in range(len(volume)))
        if torch.is_grad_enabled():
            return torch.cat(list(items))
        result = volume.new_empty(len(volume), self.out_channels, *volume.shape[2:], dtype=self._dtype_of(volume))
        for number, item in enumerate(items):
            result[number] = item[0]
        return result

    def _dense_together(self, latent: Latent, volume: Tensor) -> Tensor:
        shape = tuple(volume.shape[2:])
        passes = grid_points(shape, self.points_per_pass, volume.device)
        answers = (self.query(latent, p.expand(len(volume), -1, -1), volume).transpose(1, 2) for p in passes)
        if torch.is_grad_enabled():
            return torch.cat(list(answers), 2).unflatten(2, shape)
        extents = (len(volume), self.out_channels, math.prod(shape))
        result, start = volume.new_empty(extents, dtype=self._dtype_of(volume)), 0
        for answer in answers:
            result[:, :, start : start + answer.shape[2]] = answer
            start += answer.shape[2]
        return result.unflatten(2, shape)


def grid_points(
    spatial_shape: Sequence[int], points_per_pass: int, device: torch.device | None = None
) -> Iterator[Tensor]:
    """All voxel centers of a volume as (N, 3) float32 voxel indices, last axis fastest, in portions."""
    total = math.prod(spatial_shape)
    for start in range(0, total, points_per_pass):
        numbers = torch.arange(start, min(start + points_per_pass, total), device=device)
        yield torch.stack(torch.unravel_index(numbers, tuple(spatial_shape)), 1).float()


def _coarse_head(parts: Variant, channels: Sequence[int], out_channels: int) -> nn.Module | None:
    if parts.interpolated:
        return CoarseHead(channels, out_channels, min(1, len(channels) - 1))
    return AuxiliaryHead(channels[-1], out_channels) if parts.skip else None


def _patch_encoder(parts: Variant, in_channels: int, act: tuple | str) -> PatchEncoder | PatchLinear | None:
    if not parts.local:
        return None
    return PatchLinear(in_channels, 64, act) if parts.interpolated else PatchEncoder(in_channels, parts.mid_range, act)


def _groups(channels: Sequence[int]) -> int:
    return max(groups for groups in (8, 4, 2, 1) if all(width % groups == 0 for width in channels))
