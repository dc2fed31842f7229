"""The sliding window of nnU-Net's predictor, with its arithmetic, whose logits go to disk row by row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from queue import Queue
from threading import Thread
from typing import Any, TypeAlias

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import dummy_context, empty_cache
from torch import Tensor
from tqdm import tqdm

from monai_memeff.memory.budget import ran_out
from nnunet_plugins.lean.predict.logits import LogitsFile
from nnunet_plugins.lean.predict.previous_stage import WithPreviousStage
from nnunet_plugins.lean.predict.window import Window, blocks, extents_of, first_open_rows, rows_of
from nnunet_plugins.lean.predict.writer import RowWriter
from nnunet_plugins.lean.stock import PREDICTOR, is_from, stock_method
from nnunet_plugins.lean.variable import check_unchanged

Sink = Callable[[int, int, Tensor], None]
"""Takes (row, first class, planes (classes, Y, Z)) without padding, on the CPU."""

Image: TypeAlias = Tensor | WithPreviousStage

ON_DEVICE_SHARE = 0.25
"""Part of the free memory of a GPU that accumulators may take."""


def predict_sliding_window_return_logits(self: Any, input_image: Tensor) -> Tensor:
    """Logits (C, X, Y, Z) of a preprocessed image, on disk; in the place of nnU-Net's method of this name."""
    if not has_stock_window(self):
        result: Tensor = stock_method("predict_sliding_window_return_logits")(self, input_image)
        return result
    check_image(input_image)
    logits = LogitsFile((self.label_manager.num_segmentation_heads, *input_image.shape[1:]))
    stream(self, input_image, logits.write)
    return logits.tensor()


def has_stock_window(predictor: Any) -> bool:
    """Whether a predictor's loop over tiles is nnU-Net's: no derived class, and nobody else, has put another there."""
    calls = vars(import_module(PREDICTOR))
    own = calls["compute_gaussian"] is compute_gaussian and calls["pad_nd_image"] is pad_nd_image
    return own and is_from(predictor._internal_predict_sliding_window_return_logits, PREDICTOR)


@torch.inference_mode()
def stream(predictor: Any, image: Image, sink: Sink) -> None:
    """Predict an image (C, X, Y, Z) tile by tile with nnU-Net's predictor, and hand on rows of logits as they are done.

    Raises:
        RuntimeError: nnU-Net's own, for infinite logits; a network of other classes; the variable is ``whole`` now.
    """
    check_unchanged(whole=False)
    check_image(image)
    predictor.network = predictor.network.to(predictor.device)
    predictor.network.eval()
    empty_cache(predictor.device)
    cuda = predictor.device.type == "cuda"
    with torch.autocast(predictor.device.type, enabled=True) if cuda else dummy_context():
        patch = predictor.configuration_manager.patch_size
        data, unpadded = padded(image, patch)
        slicers = predictor._internal_get_sliding_window_slicers(data.shape[1:])
        once = OnceOnly(sink)
        try:
            _attempt(predictor, data, slicers, RowWriter(unpadded[1:], once, predictor.device), cuda)
        except RuntimeError as error:  # cuDNN and cuBLAS have words of their own for it
            if not cuda or not ran_out(error, predictor.device):
                raise
            print("The GPU ran out of memory: accumulators move to the host.")
            empty_cache(predictor.device)
            _attempt(predictor, data, slicers, RowWriter(unpadded[1:], once, predictor.device), False)
    empty_cache(predictor.device)


def check_image(image: Any) -> None:
    """Refuse what nnU-Net refuses, in its words."""
    assert isinstance(image, (Tensor, WithPreviousStage))
    assert image.ndim == 4, "input_image must be a 4D np.ndarray or torch.Tensor (c, x, y, z)"


def padded(image: Image, patch: Sequence[int]) -> tuple[Image, tuple[slice, ...]]:
    """An image that holds a tile at least, as nnU-Net pads it, and where the image lies in it."""
    if isinstance(image, WithPreviousStage):
        return image.padded(patch)
    result: tuple[Tensor, tuple[slice, ...]] = pad_nd_image(image, patch, "constant", {"value": 0}, True, None)
    return result


class OnceOnly:
    """Hands planes on to a sink the first time that they come; a second attempt brings some of them again."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.seen: set[tuple[int, int]] = set()

    def __call__(self, row: int, first_class: int, planes: Tensor) -> None:
        """Take planes (classes, Y, Z) of a row."""
        if (row, first_class) not in self.seen:
            self.sink(row, first_class, planes)
            self.seen.add((row, first_class))


def _attempt(
    predictor: Any, data: Image, slicers: list[tuple[Any, ...]], writer: RowWriter, may_use_device: bool
) -> None:
    try:
        _accumulate(predictor, data, slicers, writer, may_use_device)
    except BaseException:
        writer.stop()
        raise
    writer.finish()


def _accumulate(
    predictor: Any, data: Image, slicers: list[tuple[Any, ...]], writer: RowWriter, may_use_device: bool
) -> None:
    opened = first_open_rows(slicers)
    rows = max(rows_of(slicer)[1] - first for slicer, first in zip(slicers, opened, strict=True))
    shape = (predictor.label_manager.num_segmentation_heads, *data.shape[1:])
    window = _window(predictor, shape, rows, writer, may_use_device)
    device = window.sums.device
    gaussian: Tensor | int = 1
    if predictor.use_gaussian:
        patch = tuple(predictor.configuration_manager.patch_size)
        gaussian = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
    with tqdm(desc=None, total=len(slicers), disable=not predictor.allow_tqdm) as progress:
        for (tile, slicer), first in zip(_tiles(data, slicers, predictor.device), opened, strict=True):
            window.finish(first)
            prediction = predictor._internal_maybe_mirror_and_predict(tile)[0].to(device)
            weigh(prediction, gaussian)
            prediction = prediction.expand(shape[0], *extents_of(slicer))  # nnU-Net adds as far as shapes allow it
            start, _ = rows_of(slicer)
            weight = gaussian
            if not isinstance(slicer[1], slice):  # 2D: one row
                prediction = prediction[:, None]
                weight = gaussian if isinstance(gaussian, int) else gaussian[None]
            window.add(start, slicer[2:], prediction, weight)
            del prediction  # before the next one is made
            progress.update()
    window.finish(data.shape[1])


def _window(predictor: Any, shape: tuple[int, ...], rows: int, writer: RowWriter, may_use_device: bool) -> Window:
    if may_use_device and predictor.perform_everything_on_device:
        size = 2 * rows * (shape[0] + 1) * shape[2] * shape[3]
        if size < ON_DEVICE_SHARE * torch.cuda.mem_get_info(predictor.device)[0]:
            return Window(shape, rows, predictor.device, writer.put)
    return Window(shape, rows, torch.device("cpu"), writer.put)


def weigh(prediction: Tensor, gaussian: Tensor | int) -> None:
    """Multiply the logits (C, ...) of a tile by the weights in place, some classes at a time."""
    if isinstance(gaussian, Tensor):
        for classes in blocks(len(prediction), 4 * prediction[0].numel()):
            prediction[classes] *= gaussian


@torch.inference_mode()
def _internal_maybe_mirror_and_predict(self: Any, x: Tensor) -> Tensor:
    """The mean prediction over nnU-Net's mirrorings, summed some classes at a time; in the place of its method."""
    axes = self.allowed_mirroring_axes if self.use_mirroring else None
    prediction: Tensor = self.network(x)
    if axes is None:
        return prediction
    assert max(axes) <= x.ndim - 3, "mirror_axes does not match the dimension of the input!"
    ways = [way for n in range(len(axes)) for way in itertools.combinations([axis + 2 for axis in axes], n + 1)]
    for way in ways:
        mirrored = self.network(torch.flip(x, way))
        for classes in blocks(prediction.shape[1], 4 * prediction[:, 0].numel()):
            prediction[:, classes] += torch.flip(mirrored[:, classes], way)
        del mirrored
    prediction /= len(ways) + 1
    return prediction


def _tiles(data: Image, slicers: list[tuple[Any, ...]], device: torch.device) -> Iterator[tuple[Tensor, Any]]:
    """The tiles (1, C, ...) on the device in order, the next two made ready meanwhile."""
    ready: Queue[Any] = Queue(maxsize=2)
    stopped = False

    def produce() -> None:
        try:
            for slicer in slicers:
                if stopped:
                    return
                tile = torch.clone(data[slicer][None], memory_format=torch.contiguous_format)
                ready.put((tile.to(device), slicer))
            ready.put(None)
        except Exception as error:
            ready.put(error)

    thread = Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped = True
        _join(thread, ready)


def _join(thread: Thread, ready: Queue[Any]) -> None:
    """Wait for a thread that may be waiting for a place in its queue."""
    while thread.is_alive():
        if not ready.empty():
            ready.get()
        thread.join(0.01)
