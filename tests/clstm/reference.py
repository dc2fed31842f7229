"""The plain network, written from the paper's equations: every slice through the U-Net, every activation kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_memeff.clstm import CLSTMUNet, SliceUNet


def unrolled(network: CLSTMUNet, x: Tensor) -> Tensor:
    """Logits of (B, C, H, W, D): one U-Net call per slice, gates as in figure 1, nothing recomputed."""
    slices = list(x.movedim(2 + network.axis, 0))
    gates = [network.unet(s) for s in slices]
    hidden = network.cell.hidden_channels
    ways = [_walk(network.cell, [u[:, : 4 * hidden] for u in gates])]
    if network.cell_back is not None:
        ways.append(_walk(network.cell_back, [u[:, 4 * hidden :] for u in gates[::-1]])[::-1])
    outputs = []
    for states in zip(*ways, strict=True):
        if network.head is None:
            outputs.append(sum(states) / len(states))
        else:
            outputs.append(torch.einsum("bchw,oc->bohw", torch.cat(states, 1), network.head.weight[:, :, 0, 0]))
            outputs[-1] = outputs[-1] + network.head.bias[:, None, None]
    return torch.stack(outputs, 2 + network.axis)


def plain_unet(unet: SliceUNet, x: Tensor) -> Tensor:
    """The U-Net as the paper draws it: upsampled features beside the encoder's, for sizes that halve."""

    def pair(level: torch.nn.Module, x: Tensor) -> Tensor:
        for layer in (level.first, level.second):
            x = layer.act(layer.norm(layer.conv(x)))
        return x

    skips = []
    for level in unet.encoder:
        x = pair(level, F.max_pool2d(x, 2) if skips else x)
        skips.append(x)
    for level, skip in zip(unet.decoder, skips[-2::-1], strict=True):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if level.halve is not None:
            x = level.halve.act(level.halve.norm(level.halve.conv(F.pad(x, (0, 1, 0, 1)))))
        x = pair(level.pair, torch.cat((skip, x), 1))
    return unet.last(x)


def _walk(cell: torch.nn.Module, gates: list[Tensor]) -> list[Tensor]:
    """The hidden states, one gate at a time with its own kernel and bias."""
    n = cell.hidden_channels
    weights, biases = cell.conv.weight.split(n), cell.conv.bias.split(n)
    h = c = torch.zeros(gates[0].shape[0], n, *gates[0].shape[2:], dtype=gates[0].dtype)
    found = []
    for u in gates:
        i, f, o, g = (
            part + torch.nn.functional.conv2d(h, w, b, padding=w.shape[-1] // 2)
            for part, w, b in zip(u.split(n, 1), weights, biases, strict=True)
        )
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        found.append(h)
    return found
