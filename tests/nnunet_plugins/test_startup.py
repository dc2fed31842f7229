"""The start-up module: what it does to the variable, and that it never stops Python."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from nnunet_plugins import environment
from nnunet_plugins.environment import ext_folder

STARTUP_FOLDER = Path(__file__).resolve().parents[2] / "nnunet_plugins" / "_startup"


def load_startup():
    """Import the start-up module from the source tree, whatever is installed."""
    spec = spec_from_file_location("startup_under_test", STARTUP_FOLDER / "_monai_memeff_nnunet.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


startup = load_startup()


@pytest.fixture
def variable(monkeypatch):
    """The variable and the opt-out, both unset, restored afterwards."""
    monkeypatch.delenv(startup.VARIABLE, raising=False)
    monkeypatch.delenv(startup.OPT_OUT, raising=False)
    return monkeypatch


def test_register_names_the_folder_of_the_shim(variable):
    startup.register()
    assert os.environ[startup.VARIABLE] == ext_folder()
    assert [file.name for file in Path(ext_folder()).glob("*.py")] == ["memeff_trainers.py"]


def test_register_keeps_what_the_user_listed_first_and_adds_itself_once(variable):
    variable.setenv(startup.VARIABLE, os.pathsep.join(["/one", "/two"]))
    startup.register()
    startup.register()
    assert os.environ[startup.VARIABLE].split(os.pathsep) == ["/one", "/two", ext_folder()]


def test_register_leaves_a_value_that_names_it_another_way_untouched(variable):
    value = ext_folder() + os.sep
    variable.setenv(startup.VARIABLE, value)
    startup.register()
    assert os.environ[startup.VARIABLE] == value


@pytest.mark.parametrize(("value", "listed"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_opt_out(variable, value, listed):
    variable.setenv(startup.OPT_OUT, value)
    startup.register()
    assert (startup.VARIABLE in os.environ) is listed


def test_register_never_raises(variable):
    class Broken:
        def find_spec(self, name, path):
            raise RuntimeError("a broken import hook")

    variable.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    startup.register()
    assert startup.VARIABLE not in os.environ


def test_the_switch_may_be_set_until_nnunet_is_imported(variable):
    name = startup.SWITCHED[0]

    class Host:
        def find_spec(self, wanted, path=None, target=None):
            return ModuleSpec(wanted, SourceFileLoader(wanted, "nowhere.py")) if wanted == name else None

    variable.setattr(sys, "meta_path", [Host()])
    startup.watch()
    startup.watch()
    finder, host = sys.meta_path
    assert (type(finder), type(host)) == (startup.SwitchFinder, Host)
    for value, watched in ((None, False), ("off", False), ("lean", True), (" Whole ", True), ("1", True)):
        if value is not None:
            variable.setenv(startup.SWITCH, value)
        else:
            variable.delenv(startup.SWITCH, raising=False)
        assert (finder.find_spec(name) is not None) is watched
        assert finder.find_spec("numpy") is None


def test_register_does_nothing_without_the_package(variable):
    variable.setattr(sys, "meta_path", [])
    startup.register()
    assert startup.VARIABLE not in os.environ


def test_register_imports_no_package():
    code = (
        "import os, sys; before = set(sys.modules); import _monai_memeff_nnunet; _monai_memeff_nnunet.register();"
        "print(os.environ['nnUNet_extTrainer']); print(sorted(set(sys.modules) - before))"
    )
    path = os.pathsep.join([str(STARTUP_FOLDER), str(STARTUP_FOLDER.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop(startup.VARIABLE, None)
    environment.pop(startup.OPT_OUT, None)
    command = [sys.executable, "-S", "-c", code]  # without the start-up files of this environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder, imported = done.stdout.splitlines()
    assert folder == ext_folder()
    assert imported == "['__future__', '_monai_memeff_nnunet']"


def test_the_two_start_up_files_name_the_same_function():
    line = (STARTUP_FOLDER / "monai_memeff_nnunet.pth").read_text().strip()
    assert line == "import _monai_memeff_nnunet; _monai_memeff_nnunet.register()"  # one readable line, no exec
    assert (STARTUP_FOLDER / "monai_memeff_nnunet.start").read_text().strip() == "_monai_memeff_nnunet:register"


@pytest.mark.parametrize("value", [None, "", "/mine", os.pathsep.join(["/one", "", "/two"]), ext_folder()])
def test_the_export_line_sets_what_the_start_up_file_sets(variable, value):
    if value is not None:
        variable.setenv(startup.VARIABLE, value)
    line = environment.export_line()
    startup.register()
    assert (startup.VARIABLE, startup.OPT_OUT) == (environment.VARIABLE, environment.OPT_OUT)
    assert line == f"export {startup.VARIABLE}={os.environ[startup.VARIABLE]}"
