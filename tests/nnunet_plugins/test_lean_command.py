"""Lean prediction by commands: the variable, its values, and the command of our own."""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunet_plugins import lean_prediction
from nnunet_plugins.__main__ import main
from nnunet_plugins.lean import fingerprint, switch
from nnunet_plugins.lean.cases.failures import PredictionError
from nnunet_plugins.lean.trial import predictor_of
from tests.nnunet_plugins.lean_world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """See :class:`World`."""
    return World(tmp_path_factory.mktemp("lean"))


@pytest.mark.parametrize("value", ["", "0", "off", "OFF"])
def test_the_variable_that_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEFF_NNUNET", value)
    switch.on_import(switch.PREDICTOR)
    assert not switch.is_on()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("wholly", "MEMEFF_NNUNET must be lean, whole or off, got 'wholly'.\n"),
        ("leen", "MEMEFF_NNUNET must be lean, whole or off, got 'leen'.\n"),
    ],
)
def test_values_that_are_refused(value: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("MEMEFF_NNUNET", value)
    with pytest.raises(SystemExit) as ended:
        switch.on_import(switch.EXPORT)
    assert ended.value.code == 2
    assert capsys.readouterr().err == words


def test_an_unknown_nnunet_keeps_its_functions(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(fingerprint, "KNOWN", {"2.8.1": "another digest"})
    monkeypatch.setenv("MEMEFF_NNUNET", "lean")
    fingerprint.refusal.cache_clear()
    try:
        switch.on_import(switch.PREDICTOR)
        assert not switch.is_on()
        assert "WARNING: MEMEFF_NNUNET=lean has no effect: the inference functions" in capsys.readouterr().err
        with pytest.raises(RuntimeError, match=r"are not those of 2\.8\.1"), lean_prediction():
            pass
        assert main(["predict"]) == 2
    finally:
        fingerprint.refusal.cache_clear()


@pytest.mark.slow
def test_the_command_of_our_own(world: World, capsys: Any) -> None:
    options = ["-i", world.images, "-o", world.new("own"), "-m", world.model, "-f", 0, 1, "-device", "cpu"]
    assert main(["predict", *map(str, options), "-npp", "0", "-nps", "0", "--disable_progress_bar"]) == 1
    assert capsys.readouterr().err.startswith("1 of 5 cases failed, the others are done. b: ")
    world.check("own", "acde")
    assert main(["predict", "-i", "x", "-o", world.new("own"), "-m", "nowhere", "-f", "0", "-device", "cpu"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not switch.is_on()


@pytest.mark.slow
def test_files_are_readable_as_nibabel_wrote_them(world: World) -> None:
    with lean_prediction(), pytest.raises(PredictionError):
        predictor_of(world.model).predict_from_files_sequential(str(world.images), world.new("files"))
    stock, lean = (nibabel.load(world.folder / folder / "a.nii.gz") for folder in ("stock", "files"))
    np.testing.assert_array_equal(stock.affine, lean.affine)
    assert stock.get_data_dtype() == lean.get_data_dtype()
