"""What a step will need, as an object to print, to compare with a budget, and to run by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class NetworkEstimate:
    """The predicted cost of one step of a network by one system.

    Attributes:
        system: "dense", "halo", "clstm", "occupancy" or "sparse".
        network: Name of the network's class, the one that runs.
        shape: Shape of the input (B, C, spatial...).
        training: whether the step is one of training.
        peak_bytes: highest number of bytes on the device that the step itself makes, as
            :func:`~monai_memeff.memory.measure_peak` around it counts: activations, output, in training what autograd
            keeps, the loss and all gradients. Neither weights nor input nor an optimizer's state is in it, nor the
            workspace that a kernel takes and gives back before it returns.
        parameter_bytes: weights and buffers.
        input_bytes: The input.
        gradient_bytes: Share of ``peak_bytes``: the gradients of the weights; 0 in inference.
        optimizer_bytes: the optimizer's state, beside all others.
        host_bytes: in host memory beside the device's, the caller's input not counted. Where the device is the CPU,
            these come on top of ``peak_bytes`` in the same memory.
        disk_bytes: in files while the step runs.
        output_shape: Shape of the first tensor that comes out, None if unknown.
        multiplications: Number in convolutions and matrix products, None if unknown.
        relative_time: multiplications relative to those of the dense network, None where that is not known. Copies,
            searches for neighbors and the speed of each kernel are not in it.
        basis: where the numbers come from, in words.
        setting: arguments for the system's inferer that make it so.
        plan: halo's plan, the one that ``inferer`` executes; None for other systems.
        inferer: runs ``network`` on a volume in this way; None for dense networks and for training.
        notes: what else is to be known, a sentence each.

    Examples:
        >>> network, volume = torch.nn.Conv3d(1, 4, 3, padding=1), torch.rand(1, 1, 32, 32, 32)
        >>> estimate = estimate_network(network, volume.shape, system="halo")
        >>> estimate.host_bytes, estimate.inferer(volume, network).shape
        (524288, torch.Size([1, 4, 32, 32, 32]))
    """

    system: str
    network: str
    shape: tuple[int, ...]
    training: bool
    peak_bytes: int
    parameter_bytes: int
    input_bytes: int
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    output_shape: tuple[int, ...] | None = None
    multiplications: int | None = None
    relative_time: float | None = None
    basis: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)
    plan: Any = field(default=None, repr=False, compare=False)
    inferer: Any = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Everything at once: the step, weights, input, the optimizer's state and what lies on the host."""
        return self.peak_bytes + self.parameter_bytes + self.input_bytes + self.optimizer_bytes + self.host_bytes

    def __str__(self) -> str:
        """A few lines."""
        what = "training step" if self.training else "inference"
        gradients = f", {in_units(self.gradient_bytes)} of it gradients" if self.gradient_bytes else ""
        lines = [
            f"{self.network}, {what} on {self.shape}, system {self.system}",
            f"  device  {in_units(self.peak_bytes)}{gradients}",
            f"  beside  {in_units(self.parameter_bytes)} weights, {in_units(self.input_bytes)} input"
            + (f", {in_units(self.optimizer_bytes)} optimizer" if self.optimizer_bytes else ""),
            f"  host    {in_units(self.host_bytes)}, disk {in_units(self.disk_bytes)}",
            f"  time    {'unknown' if self.relative_time is None else f'{self.relative_time:.2g}'} (dense: 1)",
            f"  from    {self.basis}",
        ]
        if self.setting:
            lines.append("  setting " + ", ".join(f"{name}={value!r}" for name, value in self.setting.items()))
        return "\n".join([*lines, *(f"  note    {note}" for note in self.notes)])

    def print(self) -> None:
        """Print it."""
        print(self)


def in_units(nbytes: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point: ``1.50 GiB``."""
    value, unit = float(nbytes), 0
    while abs(value) >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.4g} {UNITS[unit]}"
