"""Errors that callers tell apart, and the one place where a command turns them into a line and an exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping

BAD_INPUT = 2
INTERRUPTED = 130  # as shells say it: 128 + SIGINT


class InputError(ValueError):
    """An input that the work cannot use: one line that says the limit, the value and the way out."""


def refuse_together(mode: str, options: Mapping[str, object]) -> None:
    """Refuse options that have no meaning in a mode of a command, instead of leaving them without effect.

    Args:
        mode: what was chosen.
        options: names of options and what they were given; None and False: nothing.

    Raises:
        InputError: one of them was given.
    """
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise InputError(f"{mode} has no use for {' and '.join(given)}: leave it out")


@contextlib.contextmanager
def exit_in_one_line(program: str) -> Iterator[None]:
    """End the process with one line on stderr when the block meets bad input or is interrupted.

    Input that cannot be used, files and disks that cannot be read or written, too little memory and missing packages
    exit with status 2, an interrupt with 130. Every other exception is a fault of ours and keeps its traceback.

    Args:
        program: what the line begins with.

    Raises:
        SystemExit: in place of those errors.

    Example::

        with exit_in_one_line("memeff"):
            raise InputError("size must be at least 64, got 63: try 64")
    """
    try:
        yield
    except KeyboardInterrupt:
        _stop(program, "interrupted", INTERRUPTED)
    except (InputError, OSError, MemoryError, ModuleNotFoundError) as error:
        _stop(program, message(error), BAD_INPUT)


def message(error: BaseException) -> str:
    """What an error says, in one line without Python's numbers and quotes."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        text = f"this needs the package {error.name}, which is not installed: pip install it"
    elif isinstance(error, OSError) and error.strerror:
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([" -> ".join(places), error.strerror] if places else [error.strerror])
    elif isinstance(error, MemoryError):
        text = f"not enough memory {error}".strip()
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def _stop(program: str, text: str, status: int) -> None:
    print(f"{program}: {text}", file=sys.stderr)
    raise SystemExit(status) from None
