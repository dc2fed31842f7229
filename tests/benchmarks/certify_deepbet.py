"""Certifies the brain extraction network of the package deepbet on a head MRI: whole, streamed and by sliding window.

    pip install deepbet --no-deps
    python tests/benchmarks/certify_deepbet.py [--image mr.nii.gz] [--label brain.nii.gz] --output deepbet

The package (MIT) ships its weights as TorchScript, which no tool can look into at a new shape. The network is built
here as a plain module from the operators of that graph, takes the weights by their names, and is held against the
TorchScript before anything is certified. The image is prepared as the package does it: turned to RAS, a first network
at 128^3 finds the head's box, the box is sampled at 256^3 by nearest neighbors, and intensities are clipped and
normalized. The volume and the label on its grid are written beside the certificate, so that the command can be run on
them again in this folder:

    MEMEFF_CERTIFY_MODELS=... memeff certify certify_deepbet:brain_network --image deepbet/input.nii.gz --output again
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nibabel
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from monai_memeff.hosts.certify import certify

ROOT = Path(__file__).resolve().parents[2]
MODELS = "MEMEFF_CERTIFY_MODELS"
SMALL, LARGE = (128, 128, 128), (256, 256, 256)
MARGIN = 0.1


def conv(
    inputs: int, outputs: int, size: int, stride: int = 1, up: bool = False, bias: bool = False, act: bool = True
) -> nn.Sequential:
    """A (transposed) convolution that keeps or halves (doubles) extents, an instance norm, a ReLU."""
    padding = (size - 1) // 2
    layer: nn.Module = nn.Conv3d(inputs, outputs, size, stride, padding, bias=bias)
    if up:
        layer = nn.ConvTranspose3d(inputs, outputs, size, stride, padding, output_padding=stride - 1, bias=bias)
    return nn.Sequential(layer, nn.InstanceNorm3d(outputs), *([nn.ReLU(inplace=True)] if act else []))


class Block(nn.Module):
    """Two convolutions beside the identity, or beside a convolution of one voxel where extents are halved."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(*conv(inputs, outputs, 3, stride), *conv(outputs, outputs, 3, act=False))
        self.downsample = conv(inputs, outputs, 1, stride, act=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, ...) to (B, outputs, ...)."""
        beside = x if self.downsample is None else self.downsample(x)
        return F.relu(self.double_conv(x) + beside)


class Down(nn.Module):
    """Two blocks."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.block1, self.block2 = Block(inputs, outputs, stride), Block(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, ...) to (B, outputs, ...)."""
        return self.block2(self.block1(x))


class Up(nn.Module):
    """A quarter of the channels through a transposed convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, inputs // 4, 1)
        self.tp_conv = conv(inputs // 4, inputs // 4, 3, stride, up=True)
        self.conv2 = conv(inputs // 4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, ...) to (B, outputs, ...)."""
        return self.conv2(self.tp_conv(self.conv1(x)))


class LinkNet(nn.Module):
    """The network of the TorchScript: probabilities (B, 2, H, W, D) of background and brain."""

    def __init__(self) -> None:
        super().__init__()
        self.init = nn.Sequential(*conv(1, 16, 7, 2), nn.MaxPool3d(3, 2, 1))
        self.down0, self.down1 = Down(16, 16, 1), Down(16, 32, 2)
        self.down2, self.down3 = Down(32, 64, 2), Down(64, 128, 2)
        self.up0, self.up1 = Up(128, 64, 2), Up(64, 32, 2)
        self.up2, self.up3 = Up(32, 16, 2), Up(16, 16, 1)
        self.tp_conv1 = conv(16, 8, 3, 2, up=True, bias=True)
        self.conv = conv(8, 8, 3, bias=True)
        self.tp_conv2 = nn.ConvTranspose3d(8, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W, D) to (B, 2, H, W, D)."""
        start = self.init(x)
        first = self.down0(start)
        second = self.down1(first)
        third = self.down2(second)
        x = self.up0(self.down3(third)) + third
        x = self.up1(x) + second
        x = self.up2(x) + first
        x = self.up3(x) + start
        return torch.softmax(self.tp_conv2(self.conv(self.tp_conv1(x))), 1)


def models() -> Path:
    """The folder of the package's weights; the package itself is not imported, as it needs others."""
    if os.environ.get(MODELS):
        return Path(os.environ[MODELS])
    found = find_spec("deepbet")
    if found is None or found.origin is None:
        raise SystemExit("deepbet is not installed: pip install deepbet --no-deps")
    return Path(found.origin).parents[1] / "data" / "models"


def rebuilt(name: str) -> tuple[nn.Module, nn.Module]:
    """The plain network with the weights of a TorchScript, and the TorchScript."""
    script = torch.jit.load(str(models() / name), map_location="cpu").eval()
    network = LinkNet().eval()
    network.load_state_dict(script.state_dict(), strict=True)
    return network, script


def brain_network() -> nn.Module:
    """For `memeff certify certify_deepbet:brain_network`."""
    return rebuilt("model.pt")[0]


def normalized(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Intensities as the networks were trained on them."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return 0.226 * (x - x.mean()) / x.std() + 0.449


def nearest(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A volume sampled at another number of voxels."""
    return F.interpolate(x[None, None], shape, mode="nearest-exact")[0, 0]


def head_box(inside: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The box of the largest component, with a margin, in voxels of the image."""
    labels, _ = ndimage.label(inside, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    mask = labels == sizes[1:].argmax() + 1
    box = []
    for axis, extent in enumerate(shape):
        share = mask.mean(tuple(other for other in range(3) if other != axis))
        where, scale = np.flatnonzero(share > 0.02), extent / mask.shape[axis]
        middle = round(scale * (where[-1] + 1 + where[0]) / 2)
        size = round((1 + 2 * MARGIN) * scale * (where[-1] + 1 - where[0]))
        box.append(slice(max(0, int(middle - size / 2)), min(extent, int(middle + size / 2))))
    return tuple(box)


def prepared(image: Path, label: Path) -> tuple[Tensor, Tensor, np.ndarray]:
    """The volume (256, 256, 256) as the network sees it, the label on its grid, and the grid's affine."""
    found = nibabel.as_closest_canonical(nibabel.load(image))
    x = torch.nan_to_num(torch.from_numpy(found.get_fdata(dtype=np.float32)))
    truth = torch.from_numpy(nibabel.as_closest_canonical(nibabel.load(label)).get_fdata(dtype=np.float32))
    small = nearest(x, SMALL)
    low, high = small.quantile(0.005), small.quantile(0.995)
    with torch.no_grad():
        inside = rebuilt("bbox_model.pt")[0](normalized(small, low, high)[None, None])[0, 1] > 0.5
    box = head_box(inside.numpy(), tuple(x.shape))
    steps = np.array([x[box].shape[axis] / LARGE[axis] for axis in range(3)])
    grid = found.affine @ np.diag([*steps, 1.0])
    grid[:3, 3] = (found.affine @ [*[part.start + step / 2 - 0.5 for part, step in zip(box, steps, strict=True)], 1])[
        :3
    ]
    return normalized(nearest(x[box], LARGE), low, high), (nearest(truth[box], LARGE) > 0).byte(), grid


def main() -> int:
    """Rebuild, compare, prepare, certify."""
    data = Path(os.environ.get("MEMEFF_DATA", ROOT.parent / "shared" / "data")) / "head_mr_seg3d"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=data / "mr.nii.gz")
    parser.add_argument("--label", type=Path, default=data / "brain.nii.gz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    x = torch.randn(1, 1, 64, 96, 128, generator=torch.Generator().manual_seed(0))
    for name in ("model.pt", "bbox_model.pt"):
        network, script = rebuilt(name)
        with torch.no_grad():
            off = float((network(x) - script(x)).abs().max())
        print(f"{name}: the plain module differs from the TorchScript by {off:.1e}")
        if off > 1e-6:
            raise SystemExit("the package has another network now")
    volume, truth, grid = prepared(options.image, options.label)
    options.output.mkdir(parents=True, exist_ok=True)
    files = options.output / "input.nii.gz", options.output / "label.nii.gz"
    for file, values in zip(files, (volume, truth), strict=True):
        nibabel.save(nibabel.Nifti1Image(values.numpy(), grid), file)
    parts, target = options.partitions, options.output / "certificate"
    return certify(
        "certify_deepbet:brain_network", files[:1], target, files[1:], partitions=parts, repeats=options.repeats
    )


if __name__ == "__main__":
    raise SystemExit(main())
