"""A plain OSS-Net that cuts out the patches of all voxels first, and a plain border band: to compare with."""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from monai_memeff.occupancy import OccupancyNet


def all_patches(volume: Tensor, size: int) -> Tensor:
    """The ``size``^3 voxels around every voxel of (B, C, H, W, D): (B, H * W * D, C, size, size, size)."""
    before = size // 2
    padded = F.pad(volume, (before, size - 1 - before) * 3)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).unfold(4, size, 1)
    return windows.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(1, 3)


def plain_batch_norm(x: Tensor, axes: tuple[int, ...], training: bool) -> Tensor:
    """Batch norm of (B, N, F) over ``axes`` with fresh running statistics (0 and 1) in evaluation."""
    if not training:
        return x / (1 + 1e-5) ** 0.5
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean(axes, keepdim=True) + 1e-5).sqrt()


class PlainOccupancy:
    """Dense logits of a network of the paper with nothing but convolutions and matrix products on all voxels at once.

    The layers' weights and the encoder are those of the network; what is done with points is written out here.
    """

    def __init__(self, network: OccupancyNet) -> None:
        self.network = network

    def __call__(self, volume: Tensor) -> Tensor:
        """Logits (B, K, H, W, D)."""
        net, shape = self.network, volume.shape[2:]
        features = net.encoder(F.interpolate(volume, scale_factor=0.5, mode="trilinear"))
        codes = net.code(features)
        axes = [torch.arange(extent, dtype=volume.dtype) for extent in shape]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        known = [places.expand(len(volume), -1, -1)]
        if net.parts.local:
            known.append(self._patch_features(volume))
        known.append(codes[0][:, None].expand(-1, len(places), -1))
        x = torch.cat(known, 2)
        for block, code in zip(net.decoder.blocks, codes[1:], strict=True):
            x = self._block(block, x, code)
        logits = x @ net.decoder.final.weight.T
        return logits.transpose(1, 2).unflatten(2, shape)

    def _patch_features(self, volume: Tensor) -> Tensor:
        net = self.network
        patches = all_patches(volume, 7)
        if net.parts.mid_range:
            wide = all_patches(volume, 14)
            pooled = F.avg_pool3d(wide.flatten(0, 1), 2).unflatten(0, wide.shape[:2])
            patches = torch.cat([patches, pooled], 2)
        batch = patches.shape[:2]
        y = patches.flatten(0, 1)
        layers = list(net.patch_encoder)
        for convolution, act in (layers[:2], layers[2:]):
            y = act(F.conv3d(y, convolution.weight, convolution.bias, padding=3))
        return y.flatten(1).unflatten(0, batch)

    def _block(self, block: torch.nn.Module, x: Tensor, code: Tensor) -> Tensor:
        y = block.act_1(self._norm(block.norm_1, block.linear_1(x), code))
        return block.act_2(self._norm(block.norm_2, block.linear_2(y), code) + block.residual(x))

    def _norm(self, norm: torch.nn.Module, x: Tensor, code: Tensor) -> Tensor:
        axes = (0, 1, 2) if norm.statistics == "scalar" else (0, 1)
        scale, shift = norm.scale(code)[:, None], norm.shift(code)[:, None]
        return scale * plain_batch_norm(x, axes, norm.training) + shift


def sobel_band(label: Tensor, width: int) -> Tensor:
    """Where a Sobel gradient of a binary (H, W, D) label is not zero, dilated by ``width``^3: the published recipe."""
    values = label.double().numpy()
    gradients = sum(abs(ndimage.sobel(values, axis, mode="nearest")) for axis in range(3))
    return torch.from_numpy(ndimage.maximum_filter((gradients > 0).astype("uint8"), width, mode="constant") > 0)


def ball(shape: tuple[int, int, int], radius: float, label: int = 1) -> Tensor:
    """(1, 1, H, W, D) int64 with a ball off the middle."""
    axes = [torch.arange(extent) - 0.4 * extent for extent in shape]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return (label * (x**2 + y**2 + z**2 < radius**2)).long()[None, None]
