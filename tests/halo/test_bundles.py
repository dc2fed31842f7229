"""Overlays on a stock bundle: data x spatial training under torchrun, and streamed inference with its weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_memeff.overlays import overlay_path
from tests.bundles.conftest import ROOT, command, organ_data, read_nifti, stock  # noqa: F401


def torchrun(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``torchrun -m monai.bundle ...`` on the CPU, as a user types it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*run, "-m", "monai.bundle", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_overlays_train_in_parts_and_infer_in_parts_like_the_stock_bundle(
    stock: Path,  # noqa: F811
    organ_data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    seed = tmp_path / "seed.json"
    seed.write_text(json.dumps({"+initialize": ["$monai.utils.set_determinism(seed=0)"]}))
    data, results = ["--dataset_dir", str(organ_data)], {}
    for name, overlay in (("whole", seed), ("parts", overlay_path("halo"))):
        arguments = (
            "run",
            "--config_file",
            f"['configs/train.json', '{overlay}']",
            *data,
            "--ckpt_dir",
            str(tmp_path / name),
        )
        run = command(stock, *arguments) if name == "whole" else torchrun(stock, 2, *arguments)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        results[name] = torch.load(tmp_path / name / "model.pt", weights_only=True)
    assert list(results["whole"]) == list(results["parts"])
    for key, value in results["whole"].items():  # Adam's first steps turn rounding into fractions of its rate, 1e-3
        torch.testing.assert_close(results["parts"][key], value, atol=2e-3, rtol=1e-3, msg=key)

    whole = tmp_path / "whole.json"
    whole.write_text(
        json.dumps({"inferer": {"_target_": "monai_memeff.halo.SpatialPartitionInferer", "partitions": 1}})
    )
    images = []
    (stock / "models").mkdir(exist_ok=True)
    torch.save(results["whole"], stock / "models" / "model.pt")
    streamed = tmp_path / "streamed.json"
    streamed.write_text(json.dumps({"inferer#partitions": 2}))
    for name, files in (("one", [whole]), ("two", [overlay_path("halo_inference"), streamed])):
        listed = ", ".join(f"'{f}'" for f in ("configs/inference.json", *files))
        run = command(stock, "run", "--config_file", f"[{listed}]", *data, "--output_dir", str(tmp_path / name))
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        images.append(read_nifti(next((tmp_path / name).rglob("*.nii.gz")))[0])
    np.testing.assert_array_equal(*images)
