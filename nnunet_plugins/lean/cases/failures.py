"""Cases that fail while the others go on, and the one line that says so in the end."""

from __future__ import annotations

import os
from typing import Any


class PredictionError(RuntimeError):
    """Some cases failed; the others are written.

    Attributes:
        failures: Case -> reason.
        total: Number of cases.
    """

    def __init__(self, failures: dict[str, str], total: int) -> None:
        self.failures = failures
        reasons = "; ".join(f"{case}: {reason}" for case, reason in failures.items())
        super().__init__(f"{len(failures)} of {total} cases failed, the others are done. {reasons}")
        self.total = total

    def __reduce__(self) -> Any:
        return type(self), (self.failures, self.total)  # a pool hangs on an exception that it cannot make anew


class FailedCase(dict):
    """Stands in the place of a preprocessed case; whoever wants its data gets the error.

    Args:
        name: Output file without its ending, or None.
        reason: In one line.
    """

    def __init__(self, name: str | None, reason: str) -> None:
        super().__init__(ofile=name, data_properties={})
        self.reason = reason

    def __missing__(self, key: str) -> Any:
        raise PredictionError({case_name(self["ofile"]): self.reason}, 1)


class Failures:
    """Collects failures of a run."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.total = 0
        self.first: BaseException | None = None

    def add(self, name: str | None, error: BaseException | str) -> None:
        """Note a failure and say it at once."""
        case = case_name(name) if name else f"case {self.total}"
        if name and case in self.reasons:  # a case of another folder
            case = name
        self.reasons[case] = error if isinstance(error, str) else one_line(error)
        if self.first is None and isinstance(error, BaseException):
            self.first = error
        print(f"FAILED {case}: {self.reasons[case]}")

    def check(self) -> None:
        """Raise when there was a failure.

        Raises:
            PredictionError: names every failed case.
        """
        if self.reasons:
            raise PredictionError(self.reasons, self.total) from self.first


def case_name(name: str | None) -> str:
    """A case as its output file is called."""
    return os.path.basename(name) if name else "a case without a name"


def one_line(error: BaseException) -> str:
    """Kind and message of an error on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300].rstrip(": ")
