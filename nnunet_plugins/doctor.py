"""The doctor: which trainers nnU-Net finds, from which file, and in one line each what stands in the way."""

from __future__ import annotations

import ast
import difflib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from nnunet_plugins import TRAINERS
from nnunet_plugins.environment import VARIABLE, ext_folder, is_listed, listed_folders, why_not_listed
from nnunet_plugins.lean.doctor import LEAN, lean_report

MINIMUM = (2, 8)  # the first nnU-Net release that reads the variable
INSTALL = "pip install 'monai-memeff[nnunet]'"
ENV_LINE = 'eval "$(python -m nnunet_plugins env)"'


def diagnose(name: str | None = None) -> int:
    """Print the report, on one trainer name or on all of ours.

    Args:
        name: the trainer name given to nnU-Net's `-tr`, or `lean`; None reports on the whole installation.

    Returns:
        0 when nnU-Net finds every trainer in question, else 1.
    """
    print(f"nnU-Net: {host_line()}")
    print(f"{VARIABLE}: {', '.join(listed_folders()) or 'not set'}")
    problems = host_problems()
    if name != LEAN:
        problems += trainers([name] if name else list(TRAINERS))
    if name is None:
        for other, file in others():
            print(f"  {other}: {file} (not ours)")
    if name in (None, LEAN) and host_folder() is not None:
        line, wrong = lean_report(always=name == LEAN)
        print(f"lean prediction: {line}")
        problems += wrong
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("nothing is missing")
    return 1 if problems else 0


def trainers(names: list[str]) -> list[str]:
    """Print where nnU-Net finds each trainer; returns what is wrong with those it does not find."""
    problems: list[str] = []
    unlisted = False
    for name in names:
        found = report(name) if can_look_up() else ["not looked up"]
        if found and name in TRAINERS and not is_listed():
            unlisted = True
        elif can_look_up():
            problems += found
        if found:
            print(f"  {name}: not found")
    if unlisted and can_look_up():
        problems.insert(0, f"{VARIABLE} does not name {ext_folder()}: {why_not_listed()}; or run {ENV_LINE}")
    return problems


def host_line() -> str:
    """Name the installed nnU-Net: its version and its folder."""
    folder = host_folder()
    return "not installed" if folder is None else f"nnunetv2 {host_version() or 'of unknown version'} in {folder}"


def host_folder() -> Path | None:
    """Return the folder of nnunetv2 without importing it; None when it is not installed."""
    spec = find_spec("nnunetv2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def host_version() -> str:
    """Return the version of the installed nnunetv2, empty when its metadata is missing."""
    try:
        return version("nnunetv2")
    except PackageNotFoundError:
        return ""


def can_look_up() -> bool:
    """Return whether an nnU-Net is installed that reads the variable."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", host_version())[:2])
    return host_folder() is not None and (not numbers or numbers >= MINIMUM)


def host_problems() -> list[str]:
    """List what is wrong with the host and the variable, each with the way out."""
    if host_folder() is None:
        return [f"nnunetv2 is not installed: {INSTALL}"]
    problems = []
    if not can_look_up():
        needed = ".".join(map(str, MINIMUM))
        problems.append(f"nnunetv2 {host_version()} does not read {VARIABLE}, {needed} does: {INSTALL}")
    for folder in listed_folders():
        if not Path(folder).is_dir():
            problems.append(f"{VARIABLE} names {folder}, which is not a folder: nnU-Net skips it without a word")
    return problems


def report(name: str) -> list[str]:
    """Let nnU-Net look the name up, print the file it comes from, and return what is wrong with it."""
    trainer, text = look_up(name)
    if trainer is None:
        return [f"{name}: {text}"]
    if name in TRAINERS and trainer.__module__ != TRAINERS[name]:
        return [f"{name} is shadowed by {text}: nnU-Net takes the first file that has the name, so rename that one"]
    if trainer.__name__ != name:
        return [f"{name} in {text} is a class called {trainer.__name__}: nnU-Net needs both names to be the same"]
    print(f"  {name}: {text}")
    return []


def look_up(name: str) -> tuple[type | None, str]:
    """Run nnU-Net's own search; returns the class and its file, or None and the reason in one line."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    chatter = io.StringIO()
    try:
        with redirect_stdout(chatter):
            trainer = recursive_find_trainer_class_by_name(name)
        return trainer, file_of(trainer, chatter.getvalue())
    except Exception as error:  # whatever a file of another plugin raises when nnU-Net imports it
        if isinstance(error, RuntimeError) and "Could not find requested" in str(error):
            return None, unknown(name)
        return None, f"nnU-Net stopped at {last_file(chatter.getvalue())}: {one_line(error)}"


def file_of(trainer: type, chatter: str) -> str:
    """Return the file of a class; nnU-Net forgets the modules of external folders, so its own words name those."""
    module = sys.modules.get(trainer.__module__)
    if module is not None and module.__file__:
        return module.__file__
    folder = re.findall(r"Searching in: (.+)", chatter)[-1]
    name = re.findall(r"Found class \S+ in (\S+)", chatter)[-1]
    return str(Path(folder, *name.split(".")).with_suffix(".py"))


def unknown(name: str) -> str:
    """Say that no file has the name, and which names come close."""
    names = {**dict(others()), **dict(classes_in(host_trainers())), **TRAINERS}
    folded = {known.lower(): known for known in names}
    close = [folded[known] for known in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"ours are {', '.join(TRAINERS)}"
    return f"no trainer of this name in nnunetv2 or in the folders of {VARIABLE}; {hint}"


def others() -> list[tuple[str, Path]]:
    """List the trainers that other folders of the variable define, read without running them."""
    ours = Path(ext_folder())
    folders = [Path(entry) for entry in listed_folders() if Path(entry).resolve() != ours]
    return [found for folder in folders for found in classes_in(folder)]


def host_trainers() -> Path:
    """Return the folder in which nnU-Net keeps its own trainers."""
    return (host_folder() or Path()) / "training" / "nnUNetTrainer"


def classes_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (class name, file) for every public class that looks like a trainer, in the Python files of a folder."""
    for file in sorted(folder.rglob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any("Trainer" in ast.unparse(base) for base in node.bases):
                yield node.name, file


def last_file(chatter: str) -> str:
    """Return the module that nnU-Net named last before it stopped."""
    inspected = re.findall(r"Inspecting module: (\S+)", chatter)
    return f"the external module {inspected[-1]}" if inspected else "its own trainers"


def one_line(error: BaseException) -> str:
    """Return the error's kind and message on one line; of an error raised from another, the first one."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
