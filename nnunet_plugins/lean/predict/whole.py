"""Whole images through a stock network by halo streaming, in the place of nnU-Net's tiles (``MEMEFF_NNUNET=whole``)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.utilities.helpers import dummy_context, empty_cache
from torch import Tensor, nn

from monai_memeff.halo import SpatialPartitionInferer
from nnunet_plugins.lean.predict.files import FOLDER_VARIABLE, NoRoomError, roomiest
from nnunet_plugins.lean.predict.logits import LogitsFile
from nnunet_plugins.lean.predict.sliding import check_image
from nnunet_plugins.lean.predict.writer import INFINITE
from nnunet_plugins.lean.variable import check_unchanged
from nnunet_plugins.networks import unwrapped

STOCK_STEP = 0.5
"""nnU-Net's own step between tiles."""

_INFERERS: WeakKeyDictionary[Any, SpatialPartitionInferer] = WeakKeyDictionary()


def predict_sliding_window_return_logits(self: Any, input_image: Tensor) -> Tensor:
    """Logits (C, X, Y, Z) of the network on a whole preprocessed image, on disk; in the place of nnU-Net's method.

    Mirroring is averaged as nnU-Net does it. A 2D configuration sees every slice as a whole. The image is padded only
    when the network cannot take its size, and a line says so.

    Raises:
        NotPartitionableError: the network cannot be run in parts; nothing was computed.
        NoRoomError: the scratch folder has too little room for the activations.
        RuntimeError: nnU-Net's own, for infinite logits; or the variable is not ``whole`` any more.
    """
    check_unchanged(whole=True)
    check_image(input_image)
    if self.tile_step_size != STOCK_STEP:
        print(f"-step_size {self.tile_step_size} has no effect: whole images are predicted.")
    logits = LogitsFile((self.label_manager.num_segmentation_heads, *input_image.shape[1:]))
    cuda = self.device.type == "cuda"
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda") if cuda else dummy_context():
        self.network = self.network.to(self.device)
        self.network.eval()
        image = input_image.clone() if input_image.is_inference() else input_image
        if len(self.configuration_manager.patch_size) == 2:
            for row in range(image.shape[1]):
                _write(logits, row, _predicted(self, image[:, row], quiet=row > 0))
        else:
            whole = _predicted(self, image)
            for row in range(image.shape[1]):
                _write(logits, row, whole[:, row])
    empty_cache(self.device)
    return logits.tensor()


def _write(logits: LogitsFile, row: int, planes: Tensor) -> None:
    """Write a row's planes (C, Y, Z) in half precision, as nnU-Net holds logits."""
    half = planes.to(torch.half)
    if torch.any(torch.isinf(half)):
        raise RuntimeError(INFINITE)
    logits.write(row, 0, half)


def _predicted(predictor: Any, image: Tensor, quiet: bool = False) -> Tensor:
    """The network's logits (C, spatial...) of an image (channels, spatial...), mean over the mirrorings."""
    network = unwrapped(predictor.network)
    size = fitting_size(network, image.shape, predictor.configuration_manager)
    if size != tuple(image.shape[1:]) and not quiet:
        print(
            f"The network cannot take {_times(image.shape[1:])} voxels: the image is padded with zeros to "
            f"{_times(size)}, and the logits are cropped back."
        )
    padded, inside = pad_nd_image(image, size, "constant", {"value": 0}, True, None)
    axes = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
    if predictor not in _INFERERS:
        _INFERERS[predictor] = SpatialPartitionInferer(store=roomiest(), device=predictor.device)
    try:
        whole: Tensor = _mirrored(_INFERERS[predictor], network, padded[None], axes)[0]
    except OSError as error:
        raise NoRoomError(f"{error.strerror or error} ({FOLDER_VARIABLE} names the folder)") from error
    cropped = (slice(None), *inside[1:])
    return whole[cropped]


def _mirrored(inferer: SpatialPartitionInferer, network: nn.Module, image: Tensor, axes: Any) -> Tensor:
    """The mean over the mirrorings, summed a class at a time in nnU-Net's order."""
    total: Tensor = inferer(image, network)
    if axes is None:
        return total
    assert max(axes) <= image.ndim - 3, "mirror_axes does not match the dimension of the input!"
    ways = [way for n in range(len(axes)) for way in itertools.combinations([axis + 2 for axis in axes], n + 1)]
    for way in ways:
        mirrored = inferer(image.flip(way), network)
        for label in range(total.shape[1]):
            total[:, label] += mirrored[:, label : label + 1].flip(way)[:, 0]
        del mirrored
    total /= len(ways) + 1
    return total


def fitting_size(network: nn.Module, shape: Sequence[int], configuration: Any) -> tuple[int, ...]:
    """The spatial size that the network can take: the image's own, else the next multiple of its strides.

    An image that is too small even so is padded to the patch, as nnU-Net pads. When the network takes none of them, the
    image's own is returned, so that its error is the one that is seen.

    Args:
        network: in evaluation mode, without deep supervision.
        shape: (channels, spatial...) of the image.
        configuration: nnU-Net's configuration manager.
    """
    own, patch = tuple(shape[1:]), configuration.patch_size
    strides = [1] * len(own)
    for stride in configuration.network_arch_init_kwargs.get("strides", ()):
        steps = [stride] * len(own) if isinstance(stride, int) else stride
        strides = [a * b for a, b in zip(strides, steps, strict=True)]

    def multiple(size: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-extent // step) * step for extent, step in zip(size, strides, strict=True))

    at_least = [max(a, b) for a, b in zip(own, patch, strict=True)]
    for size in (own, multiple(own), multiple(at_least)):
        if _takes(network, (1, shape[0], *size)):
            return size
    return own


def _takes(network: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the network gives a result of its input's size; tried without values."""
    copied = copy.deepcopy(network).to("meta")
    dtype = next((parameter.dtype for parameter in network.parameters()), None)
    try:
        result = copied(torch.empty(shape, device="meta", dtype=dtype))
    except (RuntimeError, ValueError):
        return False
    return isinstance(result, Tensor) and result.shape[2:] == shape[2:]


def _times(size: Sequence[int]) -> str:
    return " x ".join(str(extent) for extent in size)
