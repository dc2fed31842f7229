"""The array or file that results go into slab by slab: its shape and dtype are checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_memeff.data.atomic import check_other_file
from monai_memeff.data.nifti import LabelFile
from monai_memeff.errors import InputError


class SlabTarget:
    """Put results (B, K, H, W, d) behind each other into an array (B, K, H, W, D), or refuse it.

    Args:
        out: a tensor, or anything with ``shape`` and ``dtype`` that takes numpy's slices.
        axis: the spatial axis along which slabs follow each other.
        inputs: the volume or slabs that the results come from; its depth is compared where it is known.

    Raises:
        InputError: ``out`` has another depth, or is the file or memory that the slabs are read from.
        TypeError: ``out`` has no shape or dtype.
    """

    def __init__(self, out: Any, axis: int, inputs: Tensor | Iterable[Tensor]) -> None:
        if not hasattr(out, "shape") or not hasattr(out, "dtype"):
            raise TypeError(f"results go into an array with shape and dtype, got {type(out).__name__}.")
        self.out, self.axis, self.done = out, axis, 0
        depth = _depth(inputs, axis)
        if depth is not None and (len(out.shape) != 5 or out.shape[2 + axis] != depth):
            raise InputError(
                f"the target has the shape {tuple(out.shape)}, and {depth} slices along axis {axis} are written; make "
                "it (B, K, H, W, D) of the volume."
            )
        written, read = getattr(out, "filename", None), getattr(inputs, "path", None)
        if written is not None and read is not None:
            check_other_file(written, read)
        if _shares_memory(out, inputs):
            raise InputError("the target is the input itself and would be destroyed: give another array.")

    def put(self, result: Tensor) -> None:
        """Write the next slab.

        Raises:
            InputError: it does not fit the target's shape, or the target's dtype cannot hold every value.
        """
        shape, last = tuple(self.out.shape), self.done + result.shape[2 + self.axis]
        expected = list(result.shape)
        expected[2 + self.axis] = shape[2 + self.axis] if len(shape) == 5 else -1
        if list(shape) != expected or last > expected[2 + self.axis]:
            raise InputError(
                f"the target has the shape {shape}, and slices {self.done} to {last} of results {tuple(result.shape)} "
                "do not fit into it; make it (B, K, H, W, D) of the volume."
            )
        if not _holds(self.out, result):
            raise InputError(
                f"the target is {self.out.dtype}, which cannot hold every value of {result.dtype}; give an array of "
                "that dtype, or write labels (labels=True)."
            )
        place: list[slice] = [slice(None)] * 5
        place[2 + self.axis] = slice(self.done, last)
        self.out[tuple(place)] = result if isinstance(self.out, Tensor) else result.cpu().numpy()
        self.done = last

    def finish(self) -> None:
        """Give a file its name.

        Raises:
            InputError: fewer slices came than the target has; the rest of an array is as it was.
        """
        extent = self.out.shape[2 + self.axis]
        if self.done != extent:
            raise InputError(f"{self.done} slices came, and the target has {extent}; the rest is not written.")
        if isinstance(self.out, LabelFile):
            self.out.commit()

    def abort(self) -> None:
        """Leave no file behind."""
        if isinstance(self.out, LabelFile):
            self.out.abort()


def _shares_memory(out: Any, inputs: Tensor | Iterable[Tensor]) -> bool:
    """Whether results would overwrite voxels of the input in memory, or of the file that is mapped there."""
    slabs = [inputs] if isinstance(inputs, Tensor) else inputs if isinstance(inputs, list | tuple) else []
    tensors = [slab for slab in slabs if isinstance(slab, Tensor)]
    if isinstance(out, Tensor):
        return any(slab.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() != 0 for slab in tensors)
    arrays = (slab.detach().as_subclass(Tensor).numpy() for slab in tensors if slab.device.type == "cpu")
    return isinstance(out, np.ndarray) and any(np.may_share_memory(out, array) for array in arrays)


def _depth(inputs: Tensor | Iterable[Tensor], axis: int) -> int | None:
    """Slices of a volume, of a file, or of slabs in a list; None where only reading them tells."""
    if isinstance(inputs, list | tuple) and all(isinstance(slab, Tensor) and slab.ndim == 5 for slab in inputs):
        return sum(slab.shape[2 + axis] for slab in inputs)
    shape: Sequence[int] | None = getattr(inputs, "shape", None)
    return None if shape is None or len(shape) < 3 else int(shape[len(shape) - 3 + axis])


def _holds(out: Any, result: Tensor) -> bool:
    if isinstance(out, Tensor):
        return torch.promote_types(out.dtype, result.dtype) == out.dtype
    if result.dtype == torch.bfloat16:
        return False  # unknown to numpy
    return np.can_cast(torch.empty(0, dtype=result.dtype).numpy().dtype, np.dtype(out.dtype), "safe")
