"""One network on one volume in three ways, with memory and time: whole, streamed, by sliding window."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monai_memeff.checks import as_network_input
from monai_memeff.errors import InputError
from monai_memeff.halo.run.stores import available_memory
from monai_memeff.hosts.certify.frame import Frame
from monai_memeff.hosts.certify.sources.subject import Subject
from monai_memeff.hosts.run.peak import peaks
from monai_memeff.memory import measure_peak

HEADROOM = 2.0
"""Free memory over the predicted peak at which the whole network runs: kernels need workspace that no plan counts."""


@dataclass
class Run:
    """How one way went.

    Attributes:
        answer: What the network returns, on the CPU; None where it did not run.
        refused: why it did not run, in words; empty where it did.
        predicted_bytes: activations and whole tensors at once, as predicted before the run; None where nobody predicts.
        peak_bytes: the highest measured number of these bytes.
        process_bytes: highest resident bytes of the process; on a GPU of the device.
        seconds: wall time.
        cpu_seconds: CPU time of the process.
        details: further numbers, such as the parts of a plan.
    """

    answer: Any = None
    refused: str = ""
    predicted_bytes: int | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    details: dict[str, Any] | None = None


def run_whole(subject: Subject, frame: Frame, force: bool | None) -> Run:
    """The network as it is, on the whole volume, if it fits.

    Args:
        subject: what runs.
        frame: The volume.
        force: True runs it in any case, False never; None where the predicted peak has room.
    """
    run = Run(predicted_bytes=frame.whole_bytes)
    free = _free_bytes(subject.device)
    if force is False:
        run.refused = "left out on request (--no-whole)"
    elif force is None and frame.whole_bytes is not None and free is not None and HEADROOM * frame.whole_bytes > free:
        run.refused = (
            f"does not fit: it needs {frame.whole_bytes / 2**30:.2f} GiB and as much again for workspace, and "
            f"{free / 2**30:.2f} GiB are free"
        )
    if run.refused:
        return run
    try:
        return measured(
            run, subject, lambda: frame.crop(subject.network(frame.inputs, *subject.args, **subject.kwargs))
        )
    except torch.OutOfMemoryError:
        run.refused = "does not fit: the device ran out of memory"
        return run
    except (RuntimeError, ValueError) as error:
        shape = " x ".join(map(str, frame.inputs.shape[2:]))
        kind = str(frame.inputs.dtype).removeprefix("torch.")
        raise InputError(f"the network cannot take a volume of {shape} voxels of {kind}: {_line(error)}") from error


def run_window(subject: Subject) -> Run:
    """MONAI's sliding window on the volume as it is, with the settings that users of this model run."""
    window: Any = subject.window
    inputs, network = _in_floats(subject)
    run = Run(details={name: getattr(window, name, None) for name in ("roi_size", "overlap", "sw_batch_size")})
    assert run.details is not None
    run.details = {key: list(value) if isinstance(value, tuple | list) else value for key, value in run.details.items()}
    run.details["mode"] = str(getattr(window.mode, "value", window.mode))
    bare = Frame(inputs, tuple(inputs.shape[2:]), None)
    try:
        call = (inputs, network, *subject.args)
        return measured(run, subject, lambda: bare.crop(window(*call, **subject.kwargs)))
    except torch.OutOfMemoryError:
        run.refused = "failed: the device ran out of memory"
    except (RuntimeError, ValueError) as error:
        run.refused = f"failed: {_line(error)}"
    return run


def _in_floats(subject: Subject) -> tuple[Tensor, Callable[..., Any]]:
    """The input as floating-point numbers, in whose type MONAI's window adds up results, and the network for windows.

    The network sees its input's own type in every window, as it does on the whole volume.
    """
    inputs, network = subject.inputs.as_subclass(Tensor), subject.network
    if inputs.is_floating_point():
        return inputs, network
    kind = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.get_default_dtype())
    floats = as_network_input(inputs, kind, "MONAI's sliding window")
    return floats, lambda part, *args, **kwargs: network(part.to(inputs.dtype), *args, **kwargs)


def measured(run: Run, subject: Subject, work: Callable[[], Any]) -> Run:
    """Do the work, and write its result, memory and time into the run."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad(), subject.precision(), peaks(subject.device) as process, measure_peak(subject.device) as meter:
        run.answer = work()
    run.seconds, run.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    run.peak_bytes = meter.peak_bytes
    run.process_bytes = process["device"] if subject.device.type == "cuda" else process["process"]
    return run


def _free_bytes(device: torch.device) -> int | None:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
