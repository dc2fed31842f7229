"""The refusal: what cannot be partitioned exactly, by name, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence


class NotPartitionableError(ValueError):
    """A network (or a call of it) that cannot be run in parts with the result of the whole.

    Attributes:
        reasons: one line for each cause: module path, operator, the user's line.

    Examples:
        >>> try:
        ...     plan(torch.nn.Conv2d(1, 1, 3), (1, 1, 8, 8), axis=2)
        ... except NotPartitionableError as error:
        ...     print(error.reasons)
        ['axis is 2 but the volume has the spatial axes 0 to 1']
    """

    def __init__(self, reasons: str | Sequence[str]) -> None:
        self.reasons = [reasons] if isinstance(reasons, str) else list(reasons)
        super().__init__("; ".join(self.reasons))


class NoTileError(Exception):
    """A rule that cannot treat this call tile by tile: the operator then runs whole (used inside the plan only)."""
