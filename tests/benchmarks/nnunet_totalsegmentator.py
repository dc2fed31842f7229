"""TotalSegmentator's task `total`, its five models one after the other, with stock nnU-Net and with lean prediction.

    pip install --no-deps TotalSegmentator && python tests/benchmarks/nnunet_totalsegmentator.py --shape 128 128 128

Its own function ``nnUNet_predict_image`` runs, as its command calls it after the download of the weights: it resamples
to 1.5 mm, predicts with each model, puts the labels together by its class maps, and resamples back. Weights are random,
in networks of nnU-Net's plans with the numbers of classes of the real ones. One line of JSON: peak of the process tree,
wall and CPU seconds of both, and the voxels that differ. Without TotalSegmentator it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
from nnunet_lean import measured

from nnunet_plugins.lean.trial import TrialModel, write_image

TRAINER = "nnUNetTrainerNoMirroring"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 128, 128], help="voxels of the image")
    parser.add_argument("--spacing", type=float, default=1.5, help="mm of the image's voxels")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16], help="of the networks' stages")
    parser.add_argument("--models", type=int, default=5, help="how many of the five")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # what one process does: way, folder
    return parser.parse_args()


def write_models(folder: Path, options: argparse.Namespace) -> None:
    """Write the models where TotalSegmentator looks for them."""
    from totalsegmentator.map_to_binary import class_map_5_parts, map_taskid_to_partname_ct

    for number, part in list(map_taskid_to_partname_ct.items())[: options.models]:
        labels = {"background": 0, **{name: label for label, name in class_map_5_parts[part].items()}}
        model = TrialModel(
            labels, patch=[options.patch] * 3, spacing=[1.5] * 3, features=options.features, mirroring=None
        )
        model.write(folder / f"Dataset{number}_{part}" / f"{TRAINER}__nnUNetPlans__3d_fullres", seed=number)


def predict(way: str, folder: Path, options: argparse.Namespace) -> None:
    """Segment the image in this process."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(folder / "models")
    if way == "lean":  # as after pip install of this package, with the variable set
        os.environ["MEMEFF_NNUNET"] = "lean"
        import_module("nnunet_plugins._startup._monai_memeff_nnunet").watch()
    from nnunetv2.inference import export_prediction
    from totalsegmentator.map_to_binary import map_taskid_to_partname_ct
    from totalsegmentator.nnunet import nnUNet_predict_image

    export = export_prediction.export_prediction_from_logits.__module__
    assert export.startswith("nnunet_plugins") == (way == "lean"), export
    nnUNet_predict_image(
        folder / "image_0000.nii.gz",
        folder / f"{way}.nii.gz",
        list(map_taskid_to_partname_ct)[: options.models],
        folds=[0],
        trainer=TRAINER,
        resample=1.5,
        nr_threads_saving=1,
        quiet=True,
        device=options.device,
    )
    print("RESULT {}")


def main() -> None:
    """Measure both ways and compare."""
    options = parsed()
    if find_spec("totalsegmentator") is None:
        print("skipped: TotalSegmentator is not installed (pip install --no-deps TotalSegmentator).")
        return
    if options.run:
        predict(options.run[0], Path(options.run[1]), options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder / "models", options)
        write_image(folder / "image_0000.nii.gz", options.shape, [options.spacing] * 3)
        found = {"shape": options.shape, "spacing": options.spacing, "patch": options.patch, "models": options.models}
        for way in ("lean", "stock"):
            found[way] = measured([__file__, *sys.argv[1:], "--run", way, name])
        stock, lean = (np.asarray(nibabel.load(folder / f"{way}.nii.gz").dataobj) for way in ("stock", "lean"))
        found |= {"voxels_that_differ": int((stock != lean).sum()), "labels_seen": len(np.unique(stock))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
