"""Settings of nnU-Net for tests in this process, read when it is imported, and a preprocessed dataset for many."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("nnUNet_def_n_proc", "2")
for _folder in ("raw", "preprocessed", "results"):  # it warns when they are not set; tests name their own
    os.environ.setdefault(f"nnUNet_{_folder}", os.devnull)

SMALL = "Dataset900_Small"


@pytest.fixture(scope="session")
def small_host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three small images, c_000 to c_002, preprocessed under the name :data:`SMALL`, and c_003 to predict."""
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    from tests.nnunet_plugins.host import Host, write_dataset

    host = Host(tmp_path_factory.mktemp("small"))
    host.prepare(write_dataset(host.raw, SMALL, 3, (16, 20, 18)), 900, "-gpu_memory_target", 0.02)
    return host
