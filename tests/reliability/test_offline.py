"""No network at run time: with every socket watched, no command tries to reach another machine."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from monai_memeff import cli
from monai_memeff.apps.skull.phantom import head_phantom
from tests.bundles.conftest import save_nifti
from tests.hosts.bundles import image, small_bundle

pytestmark = pytest.mark.filterwarnings("ignore")
CALLS = ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket.socket, "sendto"))
LOOKUPS = ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "getfqdn", "create_connection")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What wanted to connect or to look up a name; all of it fails, as on a machine without a network."""
    found: list[str] = []

    def unreachable(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], socket.socket) and args[0].family == getattr(socket, "AF_UNIX", None):
                return whole(*args, **kwargs)  # between processes of this machine
            found.append(f"{name}{args}")
            raise OSError("Network is unreachable")

        return call

    for owner, name in (*CALLS, *((socket, name) for name in LOOKUPS)):
        monkeypatch.setattr(owner, name, unreachable(name, getattr(owner, name)))
    return found


@pytest.fixture
def memeff(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`memeff` in this process; it must end well."""

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["memeff", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code

    return run


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The stock bundle with a small network and a small window."""
    return small_bundle(tmp_path / "bundle", inferer__roi_size=[16, 16, 16])


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    file = tmp_path / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image(), np.diag([6.0, 5.0, 7.0, 1.0])), file)
    return file


def test_the_watch_sees_what_connects(tried: list[str]) -> None:
    with pytest.raises(OSError, match="unreachable"):
        urllib.request.urlopen("http://example.org", timeout=1)
    with pytest.raises(OSError, match="unreachable"), socket.socket() as plain:
        plain.connect(("192.0.2.1", 80))
    assert len(tried) == 2


@pytest.mark.slow
def test_commands_on_a_bundle(
    bundle: Path, ct: Path, tmp_path: Path, memeff: Callable[..., None], tried: list[str]
) -> None:
    memeff("run", bundle, ct, "--output", tmp_path / "run", "--overlay", "halo")
    memeff("estimate", bundle, "--shape", "1,1,32,32,32", "--device", "cpu", "--overlay", "halo")
    memeff("certify", bundle, "--image", ct, "--output", tmp_path / "page", "--repeats", 1, "--partitions", 2)
    memeff("doctor")
    assert tried == []


@pytest.mark.slow
def test_the_skull_bundle_copied_and_run(
    defective: tuple[Path, np.ndarray], tmp_path: Path, memeff: Callable[..., None], tried: list[str]
) -> None:
    memeff("bundle", "copy", "skull_completion_sparse", tmp_path / "bundle")
    memeff("run", tmp_path / "bundle", defective[0], "--output", tmp_path / "out")
    assert (tmp_path / "out" / "patient" / "implant.stl").is_file()
    assert tried == []


@pytest.mark.exhaustive
def test_the_demo(tmp_path: Path, memeff: Callable[..., None], tried: list[str]) -> None:
    head = head_phantom((66, 76, 80), 3.0)
    save_nifti(tmp_path / "head.nii.gz", head.image.numpy(), head.affine.numpy())
    memeff("demo", "--image", tmp_path / "head.nii.gz", "--output", tmp_path / "demo", "--seconds", 0.1, "--defects", 1)
    assert (tmp_path / "demo" / "report.txt").is_file()
    assert tried == []
