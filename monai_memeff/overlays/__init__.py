"""Ready configuration files that switch a stock MONAI bundle to one of this package's networks."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from monai_memeff.errors import InputError

__all__ = ["overlay_names", "overlay_path"]


def overlay_names() -> list[str]:
    """Names of the installed overlays, sorted.

    Examples:
        >>> "halo_inference" in overlay_names()
        True
    """
    names = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def overlay_path(name: str) -> Path:
    """Where an overlay is installed, to be named after a bundle's own file in ``--config_file``.

    Args:
        name: one of :func:`overlay_names`, with or without ``.json``.

    Returns:
        The file's path.

    Raises:
        InputError: there is no overlay of that name.

    Examples:
        >>> path = overlay_path("clstm")  # python -m monai.bundle run --config_file "['configs/train.json', '<path>']"
        >>> path.name, path.is_file()
        ('clstm.json', True)
    """
    stem = name.removesuffix(".json")
    if stem not in overlay_names():
        raise InputError(f"no overlay is called {name!r}: choose one of {', '.join(overlay_names())}")
    return Path(str(resources.files(__name__) / f"{stem}.json"))
