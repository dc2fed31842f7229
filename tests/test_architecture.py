"""The architecture as tests: who imports whom, what an import costs, and whose names are whose."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import pytest

import monai_memeff

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("monai_memeff", "nnunet_plugins")
SUBPACKAGES = ("geometry", "data", "memory", "transforms", "handlers", "sparse", "occupancy", "clstm", "halo", "apps")
OPTIONAL = (
    "spconv",
    "ocnn",
    "MinkowskiEngine",
    "nnunetv2",
    "itk",
    "pydicom",
    "matplotlib",
    "skimage",
    "nibabel",
    "scipy",
    "torch_geometric",
)

IMPORTERS = ("import_module", "optional_import", "__import__")

SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

IMPORT_AND_TELL = """
import json, sys
import torch, monai
before = set(sys.modules)
import monai_memeff
after = set(sys.modules) - before
cuda = torch.cuda.is_initialized()
import monai_memeff.sparse.points
print(json.dumps({"new": sorted(after), "cuda": cuda, "with points": sorted(sys.modules)}))
"""


def in_a_new_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python on the checkout, apart from what this test run has imported."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def subpackages() -> list[ModuleType]:
    """The subpackages that stand."""
    found = {info.name for info in pkgutil.iter_modules(monai_memeff.__path__) if info.ispkg}
    return [importlib.import_module(f"monai_memeff.{name}") for name in SUBPACKAGES if name in found]


def public() -> Iterator[tuple[str, Any]]:
    """All classes and functions that the subpackages offer: ``(name, object)``."""
    for subpackage in subpackages():
        for name in getattr(subpackage, "__all__", ()):
            thing = getattr(subpackage, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield name, thing


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Who imports whom


def test_the_import_contracts_are_kept() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the extra [test]")
    run = in_a_new_python("-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def uses_of(library: str) -> list[str]:
    """Files that import a library, by statement or by name, or reach for it as an attribute: ``torch.distributed``."""
    return [relative(path) for path in SOURCES if any(_names(path, library))]


def _names(path: Path, library: str) -> Iterator[bool]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        yield any(name == library or name.startswith(f"{library}.") for name in _reached(node))


def _reached(node: ast.AST) -> list[str]:
    """Modules that one statement or expression brings in; a string alone, such as a docstring, brings in nothing."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS and node.args:
        return [node.args[0].value] if _is_text(node.args[0]) else []
    return []


def _is_text(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("torch.distributed", "monai_memeff/halo/run/ranks/comm/process_group.py"),
        ("spconv", "monai_memeff/sparse/backends/spconv.py"),
        ("ocnn", "monai_memeff/sparse/backends/ocnn.py"),
        ("MinkowskiEngine", "monai_memeff/sparse/backends/minkowski.py"),
        ("triton", "monai_memeff/sparse/backends/triton/kernels.py"),
    ],
)
@pytest.mark.slow
def test_a_library_is_named_in_one_file_only(library: str, home: str) -> None:
    assert set(uses_of(library)) == {home for home in (home,) if (ROOT / home).exists()}


def test_nnunet_is_named_in_its_plugins_only() -> None:
    users = uses_of("nnunetv2")
    assert users
    assert all(user.startswith("nnunet_plugins/") for user in users), users


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed",
        "import os, torch.distributed.fsdp as f",
        "from torch import distributed as dist",
        "from torch.distributed import all_reduce",
        "torch.distributed.is_initialized()",
        "importlib.import_module('torch.distributed.nn')",
        "dist, _ = optional_import('torch.distributed')",
    ],
)
def test_no_way_to_import_goes_unnoticed(line: str, tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(line, encoding="utf-8")
    (tmp_path / "tells.py").write_text('"""About torch.distributed."""\nx = "torch.distributed"\nimport torch', "utf-8")
    assert any(_names(tmp_path / "uses.py", "torch.distributed"))
    assert not any(_names(tmp_path / "tells.py", "torch.distributed"))


# What an import costs


@pytest.fixture(scope="module")
def fresh_import() -> dict[str, Any]:
    """What `import monai_memeff` adds to `import torch, monai` in a new process."""
    run = in_a_new_python("-c", IMPORT_AND_TELL)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_import_loads_no_optional_package(fresh_import: dict[str, Any]) -> None:
    loaded = {name.partition(".")[0] for name in fresh_import["new"]}
    assert not loaded & set(OPTIONAL)
    foreign = loaded - set(sys.stdlib_module_names) - {"monai_memeff", "monai", "torch", "numpy"}
    assert not foreign, "the import needs torch and MONAI alone"


@pytest.mark.slow
def test_points_are_loaded_when_they_are_used_and_without_their_hosts(fresh_import: dict[str, Any]) -> None:
    assert "monai_memeff.sparse.points" not in fresh_import["new"]
    assert "monai_memeff.sparse.points" in fresh_import["with points"]
    assert "torch_geometric" not in fresh_import["with points"]


def test_the_import_starts_no_cuda(fresh_import: dict[str, Any]) -> None:
    assert fresh_import["cuda"] is False


def test_the_import_stays_small(fresh_import: dict[str, Any]) -> None:
    """Few modules beside our own: a bound on their number holds on any machine, a bound on seconds does not."""
    others = [name for name in fresh_import["new"] if name.partition(".")[0] != "monai_memeff"]
    assert len(others) <= 20, others


# Whose names are whose


def test_no_public_name_is_one_of_monais() -> None:
    """MONAI finds a component by its bare name, so one name must mean one thing."""
    from monai.bundle import ComponentLocator

    locator, clashes = ComponentLocator(), {}
    for name in sorted({name for name, _ in public()} | set(_defined_names())):
        found = locator.get_component_module_name(name) or []
        homes = [found] if isinstance(found, str) else found
        theirs = [home for home in homes if not home.startswith("monai_memeff")]
        if theirs:
            clashes[name] = theirs
    assert not clashes


def _defined_names() -> Iterator[str]:
    """Every class and function of every module, offered or not: once its module is imported, MONAI's search sees it."""
    for path in (path for path in SOURCES if "monai_memeff" in path.parts):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                yield node.name


def test_the_names_of_all_exist_and_have_docstrings() -> None:
    for subpackage in subpackages():
        assert subpackage.__doc__, subpackage.__name__
        for name in getattr(subpackage, "__all__", ()):
            assert hasattr(subpackage, name), f"{subpackage.__name__}.{name}"
    bare = [name for name, thing in public() if not inspect.getdoc(thing)]
    assert not bare


def test_monai_resolves_our_short_names() -> None:
    """Undocumented in MONAI: `_target_` by class name alone works for modules whose name begins with "monai"."""
    from monai.bundle import ConfigParser

    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [2, 4], "strides": [2]}
    net = ConfigParser({"net": {"_target_": "SparseUNet", **arguments}}).get_parsed_content("net")
    assert type(net) is monai_memeff.sparse.SparseUNet


# How a file is written


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_opens_with_a_sentence(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, "say in one sentence what this file is"
    first = docstring.partition("\n\n")[0]
    assert first.rstrip().endswith((".", ":", "?")), first


@pytest.mark.slow
def test_no_constructor_swallows_keywords() -> None:
    """A misspelt argument must not vanish in **kwargs."""
    guilty = [
        f"{relative(path)}: {owner.name}"
        for path in SOURCES
        for owner in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(owner, ast.ClassDef)
        for member in owner.body
        if isinstance(member, ast.FunctionDef) and member.name == "__init__" and member.args.kwarg is not None
    ]
    assert not guilty
