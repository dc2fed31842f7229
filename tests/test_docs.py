"""The documentation holds together: every page is in the navigation, every relative link leads somewhere."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import monai_memeff
from monai_memeff.sparse.backends import registry

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MOST_LINES = 6
INCLUDE = re.compile(r'--8<-- "([^"]+)"')


def relative_links(text: str) -> Iterator[str]:
    """Targets of links that are neither addresses nor anchors of the same page."""
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in LINK.findall(outside_code):
        if not re.match(r"[a-z]+:|#", target):
            yield target.partition("#")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [target for target in relative_links(page.read_text("utf-8")) if not (page.parent / target).is_file()]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE))
    assert listed == {page.relative_to(DOCS).as_posix() for page in PAGES}


def test_every_subpackage_that_configurations_name_has_a_page_of_the_api() -> None:
    shown = {name for page in DOCS.glob("api/*.md") for name in re.findall("::: (.+)", page.read_text("utf-8"))}
    doors = {name for name in monai_memeff.__all__ if name not in ("__version__", "apps")} | {
        "apps.liver",
        "apps.skull",
    }
    assert shown >= {f"monai_memeff.{name}" for name in doors}


@pytest.mark.parametrize("page", sorted(DOCS.glob("api/*.md")), ids=lambda page: page.stem)
def test_a_page_of_the_api_says_what_its_examples_import(page: Path) -> None:
    text = page.read_text("utf-8")
    (module,) = re.findall("::: (.+)", text)
    assert f"`import torch` and `from {module} import *`" in text


def public() -> Iterator[tuple[str, str, str]]:
    """What the pages of the API show: module, name, docstring."""
    for page in sorted(DOCS.glob("api/*.md")):
        for module in re.findall("::: (.+)", page.read_text("utf-8")):
            here = importlib.import_module(module)
            things = {name: getattr(here, name) for name in here.__all__}
            yield from (
                (module, name, inspect.cleandoc(thing.__doc__ or ""))
                for name, thing in things.items()
                if callable(thing)
            )


def points_to_its_array_transform(module: str, name: str, text: str) -> bool:
    """Whether a dictionary transform names the array transform beside it, whose example is its own."""
    array = re.sub("(d|D|Dict)$", "", name)
    return array != name and array in importlib.import_module(module).__all__ and f":class:`{array}`" in text


def test_every_public_name_has_an_example() -> None:
    without = {
        f"{module}.{name}"
        for module, name, text in public()
        if ">>>" not in text and not points_to_its_array_transform(module, name, text)
    }
    assert without == set()


def examples() -> Iterator[tuple[str, str]]:
    """Names of what the pages of the API show, and their docstrings that hold a runnable example, aliases once."""
    found = {text: f"{module}.{name}" for module, name, text in public() if ">>>" in text}
    yield from ((name, text) for text, name in found.items())


@pytest.mark.parametrize(("name", "text"), [pytest.param(*found, id=found[0]) for found in examples()])
@pytest.mark.slow
def test_an_example_does_what_it_says(name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
    monkeypatch.setattr(registry, "_chosen", None)
    module = importlib.import_module(name.rpartition(".")[0])
    named = {**{known: getattr(module, known) for known in module.__all__}, "torch": torch}
    test = doctest.DocTestParser().get_doctest(text, named, name, None, 0)
    assert sum(example.source.count("\n") for example in test.examples) <= MOST_LINES
    told: list[str] = []
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append).failed == 0, "".join(told)


def test_files_of_the_code_are_where_the_pages_say() -> None:
    files = [
        path.as_posix()
        for folder in ("monai_memeff", "nnunet_plugins", "tests")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    pages = {page: page.read_text("utf-8") for page in (*DOCS.glob("systems/*.md"), DOCS / "architecture.md")}
    named = {(page.name, name) for page, text in pages.items() for name in re.findall(r"`([\w/]+\.py)`", text)}
    assert named
    assert not [found for found in named if not any(path.endswith(f"/{found[1]}") for path in files)]


def test_included_files_exist() -> None:
    included = [name for page in PAGES for name in INCLUDE.findall(page.read_text("utf-8"))]
    assert included
    assert not [name for name in included if not (ROOT / name).is_file()]


def test_the_readme_is_short_and_its_paths_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    named = re.findall(r"`(docs/[^`]+|[A-Z]+\.md)`", text)
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_readmes_of_bundles_link_nowhere_outside(tmp_path: Path) -> None:
    """A bundle is copied out of the package: its README takes no file of the repository along."""
    for readme in sorted((ROOT / "bundles").glob("*/docs/README.md")):
        outside = [t for t in relative_links(readme.read_text("utf-8")) if not (readme.parent / t).is_file()]
        assert not outside, readme
