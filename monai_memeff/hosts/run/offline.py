"""No network while a bundle runs: what would be downloaded is refused by name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from monai_memeff.errors import InputError

_state = {"installed": 0, "blocked": 0}


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Refuse every connection to another machine, and every look-up of a name, made by Python code in the block.

    Raises:
        InputError: from the call that would connect.
    """
    if not _state["installed"]:
        sys.addaudithook(_hook)  # stays for the life of the process, and does nothing outside the block
        _state["installed"] = 1
    _state["blocked"] += 1
    try:
        yield
    finally:
        _state["blocked"] -= 1


def _hook(event: str, arguments: tuple[Any, ...], state: dict[str, int] = _state) -> None:
    # the state is an argument, for a hook outlives the names of its module when Python ends
    if not state["blocked"] or event not in ("socket.connect", "socket.getaddrinfo"):
        return
    place = arguments[1] if event == "socket.connect" else arguments[0]
    if event == "socket.connect" and not isinstance(place, tuple):
        return  # a socket of this machine
    host = place[0] if isinstance(place, tuple) else place
    raise InputError(
        f"the bundle wants to reach {host!s:.60}, and this command uses no network: copy the file there first"
    )
