"""Real pip installs into throw-away environments: what they switch on, and that uninstalling leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "nnUNet_extTrainer"

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        find_spec("hatchling") is None, reason="hatchling is not installed: nothing can be built offline"
    ),
    pytest.mark.skipif(find_spec("pip") is None, reason="pip is not installed in this environment"),
]

PROBE = """
import json, os, subprocess, sys
early = [name for name in ("nnunet_plugins", "monai_memeff", "torch", "importlib.util") if name in sys.modules]
child = "import os; print(os.environ.get('nnUNet_extTrainer', ''))"
inherited = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip()
print(json.dumps({"value": os.environ.get("nnUNet_extTrainer"), "early": early, "child": inherited}))
"""

LOOK_UP = """
import json, nnunetv2
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
try:
    found = find("SparseTrainer").__module__
except RuntimeError:
    found = None
print("\\n" + json.dumps({"host": nnunetv2.__file__, "stock": find("nnUNetTrainer").__name__, "ours": found}))
"""


class Environment:
    """A virtual environment that sees this one's libraries, but not the packages under test."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = str(folder / scripts / "python")
        paths = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        libraries = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        # a path line only: the start-up files of this environment are not run in that one
        (self.packages / "zz_libraries.pth").write_text("".join(f"{library}\n" for library in libraries))

    def variables(self, **extra: str) -> dict[str, str]:
        """The caller's environment without anything that would reach into the test."""
        dropped = ("PYTHONPATH", VARIABLE, "MEMEFF_NO_NNUNET", "PYTHONDONTWRITEBYTECODE")
        return {**{key: value for key, value in os.environ.items() if key not in dropped}, **extra}

    def run(self, *arguments: str, **extra: str) -> str:
        """Run this environment's Python away from the source tree; returns what it printed."""
        command = [self.python, *arguments]
        done = subprocess.run(
            command, env=self.variables(**extra), cwd=self.packages.anchor, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: str) -> None:
        """Run this test environment's pip on that environment, without network."""
        options = ["--python", self.python, "--disable-pip-version-check", *arguments]
        command = [sys.executable, "-m", "pip", *options]
        done = subprocess.run(command, env=self.variables(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *what: str) -> None:
        """Install without dependencies, building (if need be) with the hatchling that is there."""
        offline = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        self.pip("install", *offline, *what)

    def uninstall(self) -> None:
        """Uninstall the package under test."""
        self.pip("uninstall", "--yes", "monai-memeff")

    def probe(self, **extra: str) -> dict:
        """Start Python and say what the start-up file did."""
        return json.loads(self.run("-c", PROBE, **extra))

    def files(self) -> set[Path]:
        """Every file below the environment's library folder."""
        return {path for path in self.packages.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> str:
    """The wheel of this source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return str(built)


def editable_nnunet(folder: Path) -> str:
    """Copy the installed nnunetv2 into a source folder that can be installed with `pip install -e`."""
    import nnunetv2

    shutil.copytree(nnunetv2.__path__[0], folder / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "nnunetv2"\nversion = "2.99.0"\n'
    )
    return str(folder)


def check_start_up(environment: Environment, shim_folder: Path) -> None:
    """What every kind of install must do at interpreter start, and no more."""
    found = environment.probe()
    assert found == {"value": str(shim_folder), "early": [], "child": str(shim_folder)}
    both = os.pathsep.join(["/mine", str(shim_folder)])
    assert environment.probe(**{VARIABLE: "/mine"}) == {"value": both, "early": [], "child": both}
    assert environment.probe(MEMEFF_NO_NNUNET="1")["value"] is None
    assert environment.probe(MEMEFF_NO_NNUNET="1", **{VARIABLE: "/mine"})["value"] == "/mine"


def test_wheel(tmp_path, wheel):
    environment = Environment(tmp_path / "venv")
    before = environment.files()
    environment.install(wheel)
    check_start_up(environment, environment.packages / "nnunet_plugins" / "_ext")
    environment.uninstall()
    assert environment.files() == before
    assert environment.probe()["value"] is None


def test_the_wheel_alone_brings_command_and_bundles(tmp_path, wheel):
    environment = Environment(tmp_path / "venv")
    environment.install(wheel)
    memeff = str(Path(environment.python).with_name("memeff"))
    options = {"env": environment.variables(), "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([memeff, "bundle", "copy", "skull_completion_sparse", "here"], **options)
    assert done.returncode == 0, done.stderr
    shipped = ROOT / "bundles" / "skull_completion_sparse"
    files = {path.relative_to(shipped) for part in ("configs", "docs") for path in (shipped / part).rglob("*.*")}
    assert files <= {path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*")}
    assert (tmp_path / "here" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    listed = subprocess.run([memeff, "bundle", "list"], **options).stdout
    assert [line.split()[0] for line in listed.splitlines()] == sorted(p.name for p in (ROOT / "bundles").iterdir())
    assert subprocess.run([memeff, "bundle", "copy", "skull_completion_sparse", "here"], **options).returncode == 2


@pytest.mark.skipif(find_spec("editables") is None, reason="hatchling builds no editable wheel without editables")
def test_editable_beside_an_editable_nnunet(tmp_path):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    environment = Environment(tmp_path / "venv")
    source = editable_nnunet(tmp_path / "nnunet_source")
    environment.install("--editable", source)
    before = environment.files()
    environment.install("--editable", str(ROOT))
    check_start_up(environment, ROOT / "nnunet_plugins" / "_ext")
    report = environment.run("-m", "nnunet_plugins", "doctor")
    assert f"nnunetv2 2.99.0 in {source}" in report
    assert f"SparseTrainer: {ROOT / 'nnunet_plugins' / 'sparse_trainer.py'}" in report

    environment.uninstall()
    assert {path for path in environment.files() if path.suffix != ".pyc"} == before
    found = json.loads(environment.run("-c", LOOK_UP).splitlines()[-1])
    assert found == {"host": str(Path(source) / "nnunetv2" / "__init__.py"), "stock": "nnUNetTrainer", "ours": None}


def test_a_folder_that_is_no_site_packages(tmp_path, wheel):
    environment = Environment(tmp_path / "venv")
    environment.install("--target", str(tmp_path / "target"), wheel)
    assert environment.probe(PYTHONPATH=str(tmp_path / "target"))["value"] is None
    line = environment.run("-m", "nnunet_plugins", "env", PYTHONPATH=str(tmp_path / "target"))
    assert line.strip() == f"export {VARIABLE}={tmp_path / 'target' / 'nnunet_plugins' / '_ext'}"
