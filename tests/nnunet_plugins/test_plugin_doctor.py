"""`python -m nnunet_plugins`: the export line, and what the doctor says of each thing that can be wrong."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

import nnunet_plugins
from nnunet_plugins import doctor, environment
from nnunet_plugins.__main__ import main
from nnunet_plugins.environment import OPT_OUT, VARIABLE, ext_folder


@pytest.fixture
def listed(monkeypatch):
    """The variable names our folder alone."""
    monkeypatch.delenv(OPT_OUT, raising=False)
    monkeypatch.setenv(VARIABLE, ext_folder())
    return monkeypatch


@pytest.fixture
def fake_host(monkeypatch, tmp_path):
    """A folder that passes for an installed nnunetv2; returns a function that sets its version."""
    (tmp_path / "nnunetv2").mkdir()
    monkeypatch.setattr(doctor, "host_folder", lambda: tmp_path / "nnunetv2")
    return lambda version: monkeypatch.setattr(doctor, "host_version", lambda: version)


def plugin(folder: Path, name: str, text: str) -> str:
    """Write a module of somebody else's plugin folder; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return str(folder)


def test_env_prints_a_line_a_shell_can_eval(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "/with space/mine")
    assert main(["env"]) == 0
    command, value = shlex.split(capsys.readouterr().out)
    assert (command, value) == ("export", f"{VARIABLE}=/with space/mine{os.pathsep}{ext_folder()}")


def test_env_on_windows(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert environment.export_line(windows=True) == f'set "{VARIABLE}={ext_folder()}"'


def test_without_nnunet(listed, capsys):
    listed.setattr(doctor, "host_folder", lambda: None)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "nnU-Net: not installed" in printed
    assert "pip install 'monai-memeff[nnunet]'" in printed


@pytest.mark.parametrize("version", ["2.7.1", "2.5", "1.7.1"])
def test_an_old_nnunet_is_named_with_the_way_out(listed, fake_host, capsys, version):
    fake_host(version)
    assert main(["doctor"]) == 1
    assert f"problem: nnunetv2 {version} does not read {VARIABLE}, 2.8 does" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["2.8.0", "2.8.1", "2.10", "3.0rc1", ""])
def test_a_new_enough_nnunet_passes(fake_host, version):
    fake_host(version)
    assert doctor.can_look_up()


def test_a_variable_that_does_not_name_us_is_explained(listed, fake_host, capsys):
    fake_host("2.8.1")
    listed.setenv(VARIABLE, "/mine")
    listed.setenv(OPT_OUT, "1")
    assert main(["doctor", "SparseTrainer"]) == 1
    printed = capsys.readouterr().out
    assert f"{VARIABLE} does not name {ext_folder()}: {OPT_OUT} is set" in printed
    assert 'eval "$(python -m nnunet_plugins env)"' in printed


def test_a_misspelt_folder_is_named(listed, tmp_path, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    listed.setenv(VARIABLE, os.pathsep.join([str(tmp_path / "trianers"), ext_folder()]))
    assert main(["doctor", "SparseTrainer"]) == 1
    printed = capsys.readouterr().out
    assert f"problem: {VARIABLE} names {tmp_path / 'trianers'}, which is not a folder" in printed
    assert "SparseTrainer: not found" not in printed


def test_a_trainer_that_nnunet_finds_elsewhere_is_not_called_missing(listed, tmp_path, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    link = tmp_path / "somewhere"
    plugin(link, "memeff_trainers", (Path(ext_folder()) / "memeff_trainers.py").read_text())
    listed.setenv(VARIABLE, str(link))
    assert main(["doctor", "SparseTrainer"]) == 0
    assert "SparseTrainer: " + nnunet_plugins.__file__.replace("__init__", "sparse_trainer") in capsys.readouterr().out


def test_a_variable_overwritten_in_the_process_is_said(listed, tmp_path, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    listed.setitem(sys.modules, "_monai_memeff_nnunet", sys)
    listed.setenv(VARIABLE, str(tmp_path))
    assert main(["doctor", "SparseTrainer"]) == 1
    assert "set the variable anew afterwards" in capsys.readouterr().out


@pytest.mark.slow
def test_lean_prediction_is_reported_and_proved(listed, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    listed.delenv("MEMEFF_NNUNET", raising=False)
    assert main(["doctor", "lean"]) == 0
    assert "lean prediction: off here, possible; 0 of 9072 voxels of a trial model differ" in capsys.readouterr().out
    listed.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "SwitchFinder"])
    listed.setenv("MEMEFF_NNUNET", "lean")
    assert main(["doctor", "lean"]) == 1
    assert "problem: MEMEFF_NNUNET=lean has no effect: " in capsys.readouterr().out
    listed.setattr(sys, "meta_path", [type("SwitchFinder", (), {"find_spec": lambda *_: None})(), *sys.meta_path])
    assert main(["doctor", "lean"]) == 0
    assert "lean prediction: on; 0 of 9072 voxels" in capsys.readouterr().out
    listed.setenv("MEMEFF_NNUNET", "whole")
    assert main(["doctor", "lean"]) == 0
    assert "on; 0 of 9072 voxels of a trial model differ from the network on the whole image" in capsys.readouterr().out
    listed.setenv("MEMEFF_NNUNET", "wholly")
    assert main(["doctor", "lean"]) == 1
    assert "got 'wholly'" in capsys.readouterr().out


def test_why_not_listed(listed, tmp_path):
    name = "_monai_memeff_nnunet"
    listed.delitem(sys.modules, name, raising=False)
    listed.setattr(environment, "find_spec", lambda _: None)
    assert "not a pip install" in environment.why_not_listed()
    spec = type("Spec", (), {"origin": str(tmp_path / f"{name}.py")})
    listed.setattr(environment, "find_spec", lambda _: spec)
    assert "monai_memeff_nnunet.pth is missing" in environment.why_not_listed()
    (tmp_path / "monai_memeff_nnunet.pth").touch()
    assert "is not a site-packages folder" in environment.why_not_listed()


def test_trainers_are_attributes_loaded_when_asked_for():
    assert "SparseTrainer" in dir(nnunet_plugins)
    with pytest.raises(AttributeError, match=r"its trainers are .*SparseTrainer"):
        nnunet_plugins.SparseTrianer  # noqa: B018


def test_what_a_trainer_lacks_is_said_in_one_line(monkeypatch):
    monkeypatch.setitem(nnunet_plugins.TRAINERS, "GhostTrainer", "nnunet_plugins.no_such_module")
    with pytest.raises(ImportError, match=r"GhostTrainer cannot be loaded: No module named .*doctor"):
        nnunet_plugins.GhostTrainer  # noqa: B018


def test_the_shim_answers_for_our_names_alone(monkeypatch):
    monkeypatch.syspath_prepend(ext_folder())
    import memeff_trainers

    assert not hasattr(memeff_trainers, "SomebodyElsesTrainer")
    monkeypatch.setitem(sys.modules, "nnunet_plugins", None)  # as in another environment that inherits the variable
    assert not hasattr(memeff_trainers, "SparseTrainer")


def test_the_whole_installation(listed, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"  SparseTrainer: {Path(nnunet_plugins.__file__).parent / 'sparse_trainer.py'}" in printed
    assert "nothing is missing" in printed


@pytest.mark.slow
def test_other_peoples_trainers_are_listed_found_and_may_shadow_ours(listed, tmp_path, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    base = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
    mine = plugin(tmp_path / "mine", "my_trainer", base + "class MyTrainer(nnUNetTrainer):\n    pass\n")
    alias = plugin(tmp_path / "alias", "my_alias", base + "MyAliasTrainer = nnUNetTrainer\n")
    listed.setenv(VARIABLE, os.pathsep.join([mine, alias, ext_folder()]))
    assert main(["doctor"]) == 0
    assert f"MyTrainer: {Path(mine) / 'my_trainer.py'} (not ours)" in capsys.readouterr().out
    assert main(["doctor", "MyTrainer"]) == 0
    assert main(["doctor", "MyAliasTrainer"]) == 1
    assert "is a class called nnUNetTrainer" in capsys.readouterr().out

    shadow = plugin(tmp_path / "shadow", "shadow", base + "class SparseTrainer(nnUNetTrainer):\n    pass\n")
    listed.setenv(VARIABLE, os.pathsep.join([shadow, ext_folder()]))
    assert main(["doctor", "SparseTrainer"]) == 1
    assert f"SparseTrainer is shadowed by {Path(shadow) / 'shadow.py'}" in capsys.readouterr().out


def test_a_broken_file_of_another_plugin_is_named(listed, tmp_path, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    broken = plugin(tmp_path / "broken", "broken_plugin", "import no_such_library\n")
    listed.setenv(VARIABLE, os.pathsep.join([broken, ext_folder()]))
    assert main(["doctor", "SparseTrainer"]) == 1
    printed = capsys.readouterr().out
    assert "nnU-Net stopped at the external module broken_plugin: ModuleNotFoundError" in printed


def test_an_unknown_name_is_answered_with_close_ones(listed, capsys):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    assert main(["doctor", "SparseTrianer"]) == 1
    assert "did you mean SparseTrainer" in capsys.readouterr().out
    assert main(["doctor", "Xqz"]) == 1
    assert f"ours are {', '.join(nnunet_plugins.TRAINERS)}" in capsys.readouterr().out
    assert main(["doctor", "nnUNetTrainer"]) == 0


@pytest.mark.parametrize("words", [[], ["nonsense"], ["doctor", "a", "b"], ["env", "--quietly"]])
def test_bad_words_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
