"""The subject of ``module:function``: a network that a Python function returns, on a preprocessed volume."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from monai_memeff.data import VolumeReader, read_volume
from monai_memeff.errors import InputError
from monai_memeff.hosts.certify.sources.subject import DEFAULT_WINDOW, Options, Subject, file_sha256


def function_subject(model: str, images: Sequence[Path], options: Options) -> Subject:
    """A network that a function without arguments returns with its weights; the images are its channels as they are.

    Raises:
        InputError: there is no such function, it fails, or it returns something else than a network.
    """
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise InputError(f"--threshold must be a number, got {options.threshold}")
    function = _function(model)
    network = _of_the_user(function, f"{model} failed")
    if not isinstance(network, nn.Module):
        raise InputError(f"{model} returned {type(network).__name__}, and a torch.nn.Module is needed")
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise InputError(f"{model} returned a network without weights (meta device): load them in the function")
    values, _ = VolumeReader().get_data([*images])
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    kind = next((parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()), torch.float32)
    source = Path(str(sys.modules[function.__module__].__file__)) if function.__module__ in sys.modules else None
    weights = {str(source): file_sha256(source)} if source is not None and source.is_file() else {}
    subject = Subject(
        name=model,
        kind="a Python function that returns a network",
        network=network.eval(),
        inputs=(tensor if tensor.ndim == 4 else tensor[None])[None].to(kind),
        labels=lambda answer: _labels(answer, options.threshold, tuple(tensor.shape[-3:])),
        rule="arg-max of the channels" if options.threshold is None else f"channels above {options.threshold:g}",
        image=read_volume(images[0]).image,
        window=SlidingWindowInferer(options.window or DEFAULT_WINDOW),
        weights=weights,
    )
    subject.inputs = subject.inputs.to(subject.device)
    return subject


def _function(model: str) -> Any:
    module, _, name = model.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with python -m: the user's own file in this folder
    try:
        found = _of_the_user(lambda: importlib.import_module(module), f"{module} cannot be imported")
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(f"there is no module {module}: run the command in the folder of {module}.py") from None
    function = getattr(found, name, None)
    if not callable(function):
        raise InputError(f"{module} has no function {name!r}")
    return function


def _of_the_user(work: Callable[[], Any], failed: str) -> Any:
    """The result of code of the user's own, whose errors are bad input."""
    try:
        return work()
    except (InputError, MemoryError, ModuleNotFoundError):
        raise
    except (Exception, SystemExit) as error:  # of any kind
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{failed}: {type(error).__name__}: {text}") from error


def _labels(answer: Any, threshold: float | None, extents: tuple[int, ...]) -> np.ndarray:
    if not isinstance(answer, Tensor) or answer.ndim != 5 or answer.shape[0] != 1:
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise InputError(f"the network must return one tensor (1, channels, H, W, D), and it returned {shape}")
    if tuple(answer.shape[2:]) != extents:
        sizes = (" x ".join(map(str, shape)) for shape in (answer.shape[2:], extents))
        raise InputError(f"the network returns {' voxels of '.join(sizes)}: certify needs a label for each voxel")
    logits = answer.as_subclass(Tensor).cpu()[0]
    if threshold is not None:
        above = (logits > threshold).numpy().astype(np.uint8)
        return above[0] if len(above) == 1 else above
    if len(logits) == 1:
        raise InputError("the network has one channel: say where it is foreground, --threshold 0 for logits, 0.5 for "
                         "probabilities")  # fmt: skip
    return logits.argmax(0).to(torch.int32).numpy()
