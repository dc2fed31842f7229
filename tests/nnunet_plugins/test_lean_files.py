"""Lean prediction against stock nnU-Net through files: every reader, odd images, and the options of the commands."""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

import nibabel
import SimpleITK
import tifffile
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from skimage.io import imsave
from skimage.transform import resize

from nnunet_plugins import lean_prediction
from nnunet_plugins.lean.cases.images import by_splines, reproduces, resampling_of
from nnunet_plugins.lean.trial import TrialModel, predictor_of
from tests.nnunet_plugins.host import Host
from tests.nnunet_plugins.test_lean_prediction import REGIONS, exclusive

RECORDS = {"predict_from_raw_data_args.json", "dataset.json", "plans.json"}
OBLIQUE = np.array([[0.0, 0.9, 0.3, 5], [-1.1, 0.0, 0.2, -7], [0.1, -0.3, 1.6, 3], [0, 0, 0, 1]])


def noise(shape: tuple[int, ...], kind: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Values around 100 in a type."""
    return np.random.default_rng(seed).normal(100, 30, shape).clip(0, 255).astype(kind)


def islands(shape: tuple[int, ...]) -> np.ndarray:
    """Two islands in zeros, which nnU-Net crops to one box."""
    image = np.zeros(shape, np.float32)
    image[1:3, 2:5, 1:4] = noise((2, 3, 3))
    image[-4:-2, -5:-2, -3:-1] = noise((2, 3, 2))
    return image


def nifti(image: np.ndarray, affine: Any = (1.0, 1.2, 0.8)) -> Callable[[Path], None]:
    """Writes an image as NIfTI."""
    matrix = np.diag([*affine, 1.0]) if np.ndim(affine) == 1 else affine
    return lambda stem: nibabel.save(nibabel.Nifti1Image(image, matrix), f"{stem}_0000.nii.gz")


def by_simpleitk(ending: str) -> Callable[[Path], None]:
    """Writes an image with SimpleITK, turned and shifted."""

    def write(stem: Path) -> None:
        image = SimpleITK.GetImageFromArray(noise((9, 8, 11), np.int16))
        image.SetSpacing((0.8, 1.1, 2.0))
        image.SetOrigin((5, -3, 100))
        image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
        SimpleITK.WriteImage(image, f"{stem}_0000{ending}")

    return write


def channels(count: int) -> Callable[[Path], None]:
    """Writes several channels."""

    def write(stem: Path) -> None:
        for number in range(count):
            image = nibabel.Nifti1Image(noise((9, 8, 10), np.float32, number), np.diag([1.0, 1.3, 1.0, 1.0]))
            nibabel.save(image, f"{stem}_{number:04}.nii.gz")

    return write


def tiff(stem: Path) -> None:
    """Writes a TIFF stack and the file with its spacing."""
    tifffile.imwrite(f"{stem}_0000.tif", noise((9, 8, 11), np.uint8))
    Path(f"{stem}.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))


@dataclass
class Trial:
    """A model's settings, and what writes its image."""

    write: Callable[[Path], None]
    model: dict[str, Any] = field(default_factory=dict)
    probabilities: bool = False
    predictor: dict[str, Any] = field(default_factory=dict)


FLAT = {"patch": (6, 8), "spacing": (1.0, 1.0), "mirroring": (0, 1)}
SEPARATE = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}

TRIALS = {
    "300 labels": Trial(nifti(noise((4, 5, 4))), {"labels": exclusive(300), "patch": (4, 4, 4), "features": (2, 3)}),
    "255 labels, probabilities": Trial(nifti(noise((5, 6, 6))), {"labels": exclusive(256), "patch": (4, 4, 4)}, True),
    "one slice": Trial(nifti(noise((9, 11, 1)))),
    "one voxel": Trial(nifti(noise((1, 1, 1)))),
    "all zero": Trial(nifti(np.zeros((7, 8, 9), np.float32))),
    "constant": Trial(nifti(np.full((7, 8, 9), 7, np.float32)), {}, True),
    "smaller than the patch": Trial(nifti(noise((3, 4, 5))), {"patch": (16, 16, 16)}, True),
    "20 : 1": Trial(nifti(noise((12, 11, 4)), (0.5, 0.5, 10.0)), {"resampling": SEPARATE}),
    "20 : 1, another axis": Trial(
        nifti(noise((4, 11, 12)), (10.0, 0.5, 0.5)), {"resampling": {**SEPARATE, "order_z": 1}, "transpose": (2, 0, 1)}
    ),
    "1 : 20": Trial(nifti(noise((8, 9, 40)), (1.0, 1.0, 1.0)), {"spacing": (20.0, 1.0, 1.0), "resampling": SEPARATE}),
    "islands": Trial(nifti(islands((12, 14, 13))), {"transpose": (1, 2, 0)}, True),
    "float64": Trial(nifti(noise((9, 8, 10), np.float64))),
    "uint16": Trial(nifti(noise((9, 8, 10), np.uint16))),
    "three channels": Trial(channels(3), {"channels": ("CT", "PET", "MR")}, True),
    "regions over each other": Trial(
        nifti(islands((9, 8, 12))), {"labels": REGIONS, "regions_class_order": (3, 1, 2), "folds": 2}, True
    ),
    "regions with an ignore label": Trial(
        nifti(noise((9, 8, 12))),
        {"labels": {**REGIONS, "ignore": 4}, "regions_class_order": (1, 2, 3), "mirroring": (0, 2)},
    ),
    "turned, kept": Trial(nifti(noise((9, 8, 11)), OBLIQUE)),
    "turned, reoriented": Trial(nifti(noise((9, 8, 11)), OBLIQUE), {"reader": "NibabelIOWithReorient"}, True),
    "nrrd": Trial(by_simpleitk(".nrrd"), {"reader": "SimpleITKIO", "file_ending": ".nrrd"}),
    "mha, reoriented": Trial(by_simpleitk(".mha"), {"reader": "SimpleITKIOWithReorient", "file_ending": ".mha"}),
    "tiff": Trial(tiff, {"reader": "Tiff3DIO", "file_ending": ".tif"}, True),
    "RGB": Trial(
        lambda stem: imsave(f"{stem}_0000.png", noise((13, 17, 3), np.uint8), check_contrast=False),
        {**FLAT, "reader": "NaturalImage2DIO", "file_ending": ".png", "channels": ("R", "G", "B")},
        True,
    ),
    "slices": Trial(nifti(noise((9, 11, 5)), (1.0, 1.4, 5.0)), {**FLAT, "transpose": (2, 0, 1), "folds": 2}, True),
    "steps of a whole tile": Trial(nifti(noise((13, 9, 10))), {}, False, {"tile_step_size": 1.0}),
    "small steps, no weights, no mirrors": Trial(
        nifti(noise((13, 9, 10))),
        {"mirroring": (0, 1, 2)},
        False,
        {"tile_step_size": 0.25, "use_gaussian": False, "use_mirroring": False},
    ),
}


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder but nnU-Net's records: arrays of npz files, bytes of the others."""
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".npz":
            found[file.name] = np.load(file)["probabilities"]
        elif file.suffix == ".pkl":
            found[file.name] = repr(pickle.loads(file.read_bytes()))
        elif file.name not in RECORDS:
            found[file.name] = file.read_bytes()[10 if file.suffix == ".gz" else 0 :]  # without gzip's time of writing
    return found


def assert_same(folder: Path, names: set[str]) -> None:
    """The folders ``stock`` and ``lean`` hold these files, alike in every bit."""
    stock, lean = (contents(folder / way) for way in ("stock", "lean"))
    assert stock.keys() == lean.keys() == names
    for name, value in stock.items():
        assert np.array_equal(value, lean[name]), name


def ways(folder: Path) -> Iterator[tuple[Any, Path]]:
    """A context and an empty folder for each way to predict."""
    for name, way in (("stock", contextlib.nullcontext), ("lean", lean_prediction)):
        (folder / name).mkdir()
        yield way(), folder / name


def resampling(**settings: Any) -> functools.partial:
    """nnU-Net's function for images."""
    defaults = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return functools.partial(resample_data_or_seg_to_shape, **{**defaults, **settings})


@settings(max_examples=30)
@given(
    before=st.tuples(*[st.integers(1, 15)] * 3),
    after=st.tuples(*[st.integers(0, 15)] * 3),
    order=st.sampled_from([0, 1, 2, 3, 5]),
    spacing=st.tuples(*[st.sampled_from([0.5, 1.0, 4.0])] * 3),
    kind=st.sampled_from(["float32", "float64"]),
    hole=st.booleans(),
)
def test_images_are_resampled_as_stock_does(before, after, order, spacing, kind, hole) -> None:
    data = np.random.default_rng(sum(before)).normal(0, 100, (2, *before)).astype(kind)
    if hole:
        data[0, 0, 0, 0] = np.nan
    function = resampling(order=order)
    arguments = (np.array(after), spacing, (1.0, 1.0, 1.0))
    stock, lean = (resampled_or_why_not(way, data, *arguments) for way in (function, resampling_of(function)))
    if isinstance(stock, np.ndarray):
        assert stock.dtype == lean.dtype
        np.testing.assert_array_equal(stock, lean)
    else:
        assert stock == lean


def resampled_or_why_not(function: Callable[..., np.ndarray], *arguments: Any) -> Any:
    """The result of a function, or the words in which nnU-Net refuses, to an extent of 0 for example."""
    try:
        return function(*arguments)
    except (ValueError, ZeroDivisionError) as error:
        return type(error), str(error)


def test_splines_take_half_of_the_memory() -> None:
    assert reproduces(3)
    volume, peaks = noise((72, 64, 68)), []
    by_splines(volume, (4, 4, 4), 3)
    for function in (lambda: resize(volume.astype(float), (20, 20, 20), 3, mode="edge"), by_splines):
        tracemalloc.start()
        function() if function is not by_splines else by_splines(volume, (20, 20, 20), 3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.long
def test_files_are_stocks(tmp_path: Path, name: str) -> None:
    trial = TRIALS[name]
    described = {"labels": exclusive(4), "patch": (6, 6, 6), "features": (3, 4), **trial.model}
    model = TrialModel(**described)
    predictor = predictor_of(model.write(tmp_path / "model"), **trial.predictor)
    (tmp_path / "images").mkdir()
    trial.write(tmp_path / "images" / "a")
    for way, out in ways(tmp_path):
        with way:
            predictor.predict_from_files_sequential(str(tmp_path / "images"), str(out), trial.probabilities)
    names = {f"a{model.file_ending}", *(["a.npz", "a.pkl"] if trial.probabilities else [])}
    assert_same(tmp_path, names | ({"a.json"} if model.reader == "Tiff3DIO" else set()))


@pytest.mark.long
def test_parts_continuing_and_the_fold_of_all_cases(tmp_path: Path) -> None:
    folder = TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3)).write(tmp_path / "model")
    (folder / "fold_0").rename(folder / "fold_all")
    predictor = predictor_of(folder)
    (tmp_path / "images").mkdir()
    for number, case in enumerate("abcde"):
        nifti(noise((7 + number, 8, 9), seed=number))(tmp_path / "images" / case)
    images = str(tmp_path / "images")
    for way, out in ways(tmp_path):
        with way:
            (out / "c.nii.gz").write_bytes(b"done before")
            common = {"num_processes_preprocessing": 1, "num_processes_segmentation_export": 1}
            if out.name == "lean":
                common = dict.fromkeys(common, 0)  # in this process, which stock cannot
            predictor.predict_from_files(images, str(out), False, False, **common, num_parts=2, part_id=0)
    stock, lean = (sorted(file.name for file in (tmp_path / way).glob("*.nii.gz")) for way in ("stock", "lean"))
    assert stock == lean == [f"{case}.nii.gz" for case in "ace"]
    assert_same(tmp_path, set(lean))


@pytest.mark.slow
def test_results_that_are_returned(tmp_path: Path) -> None:
    predictor = predictor_of(TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3)).write(tmp_path / "model"))
    (tmp_path / "images").mkdir()
    for number, case in enumerate("ab"):
        nifti(noise((7 + number, 8, 9), seed=number))(tmp_path / "images" / case)
    lists = [[str(tmp_path / "images" / f"{case}_0000.nii.gz")] for case in "ba"]
    found = []
    for way, out in ways(tmp_path):
        with way:
            found.append(predictor.predict_from_files_sequential(lists, out, True))  # nnU-Net wants a str to write to
        assert not list(out.iterdir())
    assert [labels.shape for labels, _ in found[1]] == [(9, 8, 8), (9, 8, 7)]
    for stock, lean in zip(*found, strict=True):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(stock, lean, strict=True))


@pytest.mark.exhaustive
def test_commands_and_what_reads_their_files(tmp_path: Path) -> None:
    host = Host(tmp_path)
    common = {"labels": exclusive(4), "patch": (6, 6, 6), "features": (3, 4), "transpose": (1, 0, 2)}
    for cascade in (False, True):
        model = TrialModel(**common, folds=1 if cascade else 2, mirroring=(0,), cascade=cascade)
        folder = model.write(host.results / "Dataset999_Trial" / f"nnUNetTrainer__nnUNetPlans__{model.configuration}")
    (folder.parent / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_1").rename(tmp_path / "fold_all")
    (tmp_path / "fold_all").rename(folder.parent / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_all")
    (tmp_path / "images").mkdir()
    for number, case in enumerate("ab"):
        nifti(noise((7 + number, 8, 9), seed=number))(tmp_path / "images" / case)
    largest = ([remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": [1, 2, 3]}])
    (tmp_path / "kept.pkl").write_bytes(pickle.dumps(largest))

    def predict(out: Path, *more: object, workers: int = 1) -> list[object]:
        options = ["-i", tmp_path / "images", "-o", out, "-d", 999, "-device", "cpu", "-npp", workers, "-nps", workers]
        return ["nnUNetv2_predict", *options, "--disable_progress_bar", "--save_probabilities", *more]

    for way, value in (("stock", "off"), ("lean", "lean")):
        first, second, both, kept = (tmp_path / way / name for name in ("first", "second", "both", "kept"))
        fullres = ["-c", "3d_fullres", "-f"]
        host.run_in_one_process(
            predict(first, *fullres, 0, "--disable_tta", "-num_parts", 2, "-part_id", 1, workers=2),  # more than cases
            predict(first, *fullres, "all", 0, "-step_size", 1, "--continue_prediction"),
            predict(second, "-c", "3d_cascade_fullres", "-f", 0, "-prev_stage_predictions", first, workers=0),
            ["nnUNetv2_ensemble", "-i", first, second, "-o", both, "-np", 1, "--save_npz"],
            ["nnUNetv2_apply_postprocessing", "-i", first, "-o", kept, "-pp_pkl_file", tmp_path / "kept.pkl", "-np", 1],
            MEMEFF_NNUNET=value,
        )
    for name in ("first", "second", "both", "kept"):
        stock, lean = (contents(tmp_path / way / name) for way in ("stock", "lean"))
        assert stock.keys() == lean.keys() >= {"a.nii.gz", "b.nii.gz"}
        assert all(np.array_equal(value, lean[file]) for file, value in stock.items())
