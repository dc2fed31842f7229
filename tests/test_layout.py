"""Where lines stand: folders and files of a size that one reads, and doors that offer all that is public, no more."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import statistics
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import monai_memeff

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for package in ("monai_memeff", "nnunet_plugins") for path in sorted((ROOT / package).rglob("*.py"))]
MAX_FILES = 14
MAX_MEDIAN = 150
MAX_LINES = 300


def test_folders_are_small() -> None:
    crowded = {folder: number for folder, number in Counter(p.parent for p in FILES).items() if number > MAX_FILES}
    assert not crowded


def test_files_are_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert statistics.median(lines.values()) <= MAX_MEDIAN
    assert not {path: count for path, count in lines.items() if count > MAX_LINES}


def doors() -> list[str]:
    """Modules that say what they offer: all that have ``__all__``."""
    names = [info.name for info in pkgutil.walk_packages(monai_memeff.__path__, "monai_memeff.")]
    found = [name for name in ["monai_memeff", *names] if "__main__" not in name]
    return [name for name in found if "\n__all__ = " in _source(name)]


def _source(name: str) -> str:
    path = ROOT / name.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def offered(module: ModuleType) -> set[str]:
    """Its classes and functions that begin with no underscore; for a package those that it imports from below."""
    is_package = hasattr(module, "__path__")
    lazy = getattr(module, "HOMES", ())
    things = {name: getattr(module, name) for name in (*vars(module), *lazy) if not name.startswith("_")}
    return {
        name
        for name, thing in things.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        and (thing.__module__.startswith(module.__name__) if is_package else thing.__module__ == module.__name__)
    }


@pytest.mark.parametrize("name", doors())
def test_all_is_what_a_module_offers(name: str) -> None:
    module = importlib.import_module(name)
    callables = {
        n for n in module.__all__ if inspect.isclass(getattr(module, n)) or inspect.isfunction(getattr(module, n))
    }
    assert len(module.__all__) == len(set(module.__all__))
    assert callables == offered(module)


def test_every_sparse_layer_is_offered() -> None:
    from monai_memeff import sparse
    from monai_memeff.sparse.nn import activations, blocks, conv

    files = (vars(activations) | vars(blocks) | vars(conv)).items()
    layers = {name for name, thing in files if inspect.isclass(thing) and issubclass(thing, nn.Module)}
    layers = {name for name in layers if name.startswith("Sparse")}
    assert {"SparseELU", "SparseDropout", "SparseConv3d"} <= layers <= set(sparse.__all__)
