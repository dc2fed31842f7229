"""A JSON file that holds one object, or one line that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai_memeff.errors import InputError


def read_json_object(file: Path, absent: str | None = None) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        file: in UTF-8.
        absent: what to say where there is no such file.

    Raises:
        InputError: there is none, it is no JSON, or it holds something else than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(absent or f"{file} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold one JSON object, got {type(content).__name__}")
    return content
