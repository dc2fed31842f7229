"""Lean prediction against stock nnU-Net, voxel for voxel, over plans, images and settings that nnU-Net could have."""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import pickle
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

import blosc2

from nnunet_plugins import lean_prediction
from nnunet_plugins.lean import switch
from nnunet_plugins.lean.export import functions as export
from nnunet_plugins.lean.export.labels import RunningArgmax
from nnunet_plugins.lean.predict import window
from nnunet_plugins.lean.predict.files import FOLDER_VARIABLE, NoRoomError, ScratchFile
from nnunet_plugins.lean.predict.logits import LogitsFile, StoredArray, StoredLogits, class_volumes, file_of
from nnunet_plugins.lean.predict.writer import RowWriter, has_infinite
from nnunet_plugins.lean.stock import stock_method
from nnunet_plugins.lean.trial import TrialModel, predictor_of, write_image

SMALL = {"max_examples": 20, "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def exclusive(classes: int, ignore: bool = False) -> dict[str, Any]:
    """Labels 0 ... classes - 1, and the ignore label."""
    labels = {"background": 0, **{f"label{number}": number for number in range(1, classes)}}
    return {**labels, "ignore": classes} if ignore else labels


REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "spot": 3}


@st.composite
def models(draw: Any) -> TrialModel:
    """Small models of every kind that plans can describe."""
    flat = draw(st.booleans())
    axes = 2 if flat else 3
    regions = draw(st.booleans())
    return TrialModel(
        REGIONS if regions else exclusive(draw(st.integers(1, 5)), draw(st.booleans())),
        draw(st.permutations([1, 2, 3])) if regions else None,
        patch=[draw(st.sampled_from([4, 6, 8])) for _ in range(axes)],
        spacing=[draw(st.sampled_from([0.7, 1.0, 1.3, 4.0])) for _ in range(axes)],
        folds=draw(st.integers(1, 2)),
        mirroring=draw(st.sampled_from([None, (0,), (0, 1), tuple(range(axes))])),
        transpose=draw(st.permutations([0, 1, 2])),
        resampling={
            "is_seg": False,
            "order": draw(st.sampled_from([0, 1, 3])),
            "order_z": draw(st.sampled_from([0, 1, 3])),
            "force_separate_z": draw(st.sampled_from([None, None, False, True])),
        },
        features=(3, 4),
    )


def predicted(predictor: Any, image: np.ndarray, spacing: Any, probabilities: bool, previous: Any = None) -> Any:
    """Labels, or labels and probabilities, or what nnU-Net raises."""
    properties = {"spacing": list(spacing)}
    try:
        return predictor.predict_single_npy_array(image[None], properties, previous, None, probabilities)
    except Exception as error:
        return type(error), str(error)


def same(stock: Any, lean: Any) -> bool:
    """Whether two predictions are the same in every bit and type."""
    if isinstance(stock, tuple):
        return all(same(a, b) for a, b in zip(stock, lean, strict=True))
    if isinstance(stock, np.ndarray):
        return stock.dtype == lean.dtype and np.array_equal(stock, lean, equal_nan=stock.dtype.kind == "f")
    return stock == lean


def compare(predictor: Any, image: np.ndarray, spacing: Any, probabilities: bool = False, previous: Any = None) -> Any:
    """Predict both ways; returns the stock result, after both were found to be the same."""
    stock = predicted(predictor, image, spacing, probabilities, previous)
    with lean_prediction():
        lean = predicted(predictor, image, spacing, probabilities, previous)
    assert same(stock, lean)
    return stock


def noise(shape: Any, margin: int = 0, seed: int = 0) -> np.ndarray:
    """An image with zeros at the lower ends, which nnU-Net crops."""
    image = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    for axis in range(3):
        image[(slice(None),) * axis + (slice(0, margin),)] = 0
    return image


@pytest.mark.long
def test_every_voxel_is_stocks(tmp_path_factory) -> None:
    predicted_by_stock = []

    @settings(**SMALL)
    @given(
        model=models(),
        shape=st.tuples(*[st.integers(3, 12)] * 3),
        spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 1.5, 4.0])] * 3),
        margin=st.integers(0, 2),
        probabilities=st.booleans(),
        step=st.sampled_from([0.4, 0.5, 1.0]),
        gaussian=st.booleans(),
        tiny_blocks=st.booleans(),
    )
    def check(model, shape, spacing, margin, probabilities, step, gaussian, tiny_blocks) -> None:
        folder = model.write(tmp_path_factory.mktemp("model"))
        predictor = predictor_of(folder, tile_step_size=step, use_gaussian=gaussian)
        with pytest.MonkeyPatch.context() as changed:
            if tiny_blocks:  # accumulators on disk, a class at a time
                changed.setattr(window, "IN_MEMORY", 0)
                changed.setattr(window, "BLOCK", 64)
            result = compare(predictor, noise(shape, min(margin, min(shape) - 1)), spacing, probabilities)
        predicted_by_stock.append(not isinstance(result, tuple) or isinstance(result[0], np.ndarray))

    check()
    assert np.mean(predicted_by_stock) > 0.6  # the others are refused by stock, and by us in the same words


@pytest.mark.parametrize("classes", [255, 256, 300])
@pytest.mark.slow
def test_many_classes(tmp_path: Path, classes: int) -> None:
    model = TrialModel(exclusive(classes), patch=(4, 6, 4), features=(2, 3), folds=2)
    labels = compare(predictor_of(model.write(tmp_path)), noise((7, 8, 6)), (1.0, 2.0, 1.0))
    assert labels.dtype == (np.uint8 if classes <= 255 else np.uint16)
    assert len(np.unique(labels)) > 10


@pytest.mark.parametrize("function", ["no_resampling_hack", "resample_torch_fornnunet"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.slow
def test_other_resampling_functions(tmp_path: Path, function: str, regions: bool) -> None:
    settings_ = {} if function == "no_resampling_hack" else {"is_seg": False, "force_separate_z": None}
    labels = (REGIONS, (3, 1, 2)) if regions else (exclusive(4), None)
    model = TrialModel(*labels, patch=(6, 6, 6), resampling_function=function, resampling=settings_)
    spacing = (1.0, 1.0, 1.0) if function == "no_resampling_hack" else (1.0, 2.0, 1.0)
    for probabilities in (False, True):
        compare(predictor_of(model.write(tmp_path)), noise((9, 8, 10)), spacing, probabilities)


@pytest.mark.slow
def test_a_compiled_network(tmp_path: Path) -> None:
    model = TrialModel(exclusive(3), patch=(6, 6, 6), features=(2,), folds=2, mirroring=(0,))
    predictor = predictor_of(model.write(tmp_path))
    convolution = torch.nn.Conv3d(1, 3, 3, padding=1)
    weights = {name: value.clone() for name, value in convolution.state_dict().items()}
    predictor.list_of_parameters = [weights, {name: 0.3 - value for name, value in weights.items()}]
    predictor.network = torch.compile(convolution, backend="eager")  # as nnU-Net does for nnUNet_compile=t
    compare(predictor, noise((9, 8, 10), 1), (1.0, 1.5, 1.0), probabilities=True)


@pytest.mark.parametrize("flat", [False, True])
def test_cascade(tmp_path: Path, flat: bool) -> None:
    model = TrialModel(exclusive(4), patch=(6, 6) if flat else (6, 6, 6), cascade=not flat, folds=2)
    previous = None if flat else np.random.default_rng(1).integers(0, 4, (1, 9, 8, 10)).astype(np.int8)
    compare(predictor_of(model.write(tmp_path)), noise((9, 8, 10), 1), (1.0, 1.5, 1.0), previous=previous)


@pytest.mark.parametrize(
    ("labels", "order"),
    [(exclusive(4), None), (REGIONS, (1, 2, 3)), (exclusive(200), None)],  # of 200 the image has four, in bytes
    ids=["4", "regions", "200"],
)
@pytest.mark.slow
def test_cascade_from_files(tmp_path: Path, labels: Any, order: Any) -> None:
    model = TrialModel(labels, order, patch=(6, 6, 6), features=(2, 3), cascade=True)
    predictor = predictor_of(model.write(tmp_path / "model"))
    write_image(tmp_path / "images" / "a_0000.nii.gz", (9, 8, 4), (1.0, 1.5, 0.8), 1)
    previous = np.random.default_rng(1).integers(0, 4, (9, 8, 4)).astype(np.uint8)
    (tmp_path / "previous").mkdir()
    nibabel.save(nibabel.Nifti1Image(previous, np.diag([1.0, 1.5, 0.8, 1.0])), tmp_path / "previous" / "a.nii.gz")
    found = []
    images, before = str(tmp_path / "images" / "a_0000.nii.gz"), str(tmp_path / "previous" / "a.nii.gz")
    for way in (contextlib.nullcontext, lean_prediction, lambda: own_logits(predictor)):
        out = tmp_path / str(len(found))
        out.mkdir()
        with way():
            arguments = (str(tmp_path / "images"), str(out), True, True, str(tmp_path / "previous"))
            predictor.predict_from_files_sequential(*arguments)
        found.append((np.asarray(nibabel.load(out / "a.nii.gz").dataobj), np.load(out / "a.npz")["probabilities"]))
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    with lean_prediction():
        (case,) = predictor._internal_get_data_iterator_from_lists_of_filenames([[images]], [before], None, 0)
    assert isinstance(case["data"], torch.Tensor)
    assert len(case["data"]) == 1 + len(predictor.label_manager.foreground_labels)


@pytest.mark.slow
def test_cases_of_others_iterators(tmp_path: Path) -> None:
    predictor = predictor_of(TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3)).write(tmp_path / "model"))
    image = noise((9, 8, 10))
    placed = {"shape_before_cropping": image.shape, "bbox_used_for_cropping": [[0, extent] for extent in image.shape]}
    properties = {"spacing": [1.0] * 3, "shape_after_cropping_and_before_resampling": image.shape, **placed}
    np.save(tmp_path / "image.npy", image[None])
    cases = [{"data": str(tmp_path / "image.npy"), "data_properties": properties, "ofile": None}]
    with lean_prediction():
        (labels,) = predictor.predict_from_data_iterator(cases, False, 0)
        with pytest.raises(ValueError, match=r"^2 cases need as many output files, got 1\.$"):
            predictor.predict_from_files_sequential([["a_0000.nii.gz"], ["b_0000.nii.gz"]], [str(tmp_path / "a")])
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image[None]))
    np.testing.assert_array_equal(labels, logits.numpy().argmax(0))
    assert not (tmp_path / "image.npy").exists()


@contextlib.contextmanager
def own_logits(predictor: Any) -> Iterator[None]:
    """Lean prediction of a predictor whose owner does something with the image before."""

    def logits(data: torch.Tensor) -> Any:
        return type(predictor).predict_logits_from_preprocessed_data(predictor, data * 1)

    with lean_prediction(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "predict_logits_from_preprocessed_data", logits, raising=False)
        yield


@pytest.mark.slow
def test_labels_for_the_next_stage(tmp_path: Path) -> None:
    from nnunetv2.inference.export_prediction import resample_and_save
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

    logits = np.random.default_rng(0).normal(0, 1, (4, 5, 6, 7)).astype(np.float16)
    predictor = predictor_of(TrialModel(exclusive(4), patch=(4, 4, 4)).write(tmp_path / "model"))
    managers = (predictor.plans_manager, predictor.configuration_manager)
    properties = {"spacing": [1.0, 1.0, 2.0], "shape_after_cropping_and_before_resampling": (5, 6, 7)}
    for kind in (None, nnUNetDatasetBlosc2, nnUNetDatasetNumpy):
        found = []
        for way in (contextlib.nullcontext, lean_prediction):
            out = tmp_path / f"{way.__name__}{getattr(kind, '__name__', '')}"
            out.mkdir()
            with way():
                function = export.resample_and_save if way is lean_prediction else resample_and_save
                function(logits, [9, 11, 12], str(out / "a"), *managers, properties, predictor.dataset_json, 1, kind)
            (file,) = out.iterdir()
            if file.suffix == ".npz":
                found.append(np.load(file)["seg"])
            else:
                found.append(blosc2.open(str(file))[:])
        assert same(*found)
        assert found[0].shape[-3:] == (9, 11, 12)


@pytest.mark.parametrize("value", [float("nan"), 1e9])
@pytest.mark.slow
def test_what_is_not_finite_is_as_in_stock(tmp_path: Path, value: float) -> None:
    model = TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3))
    predictor = predictor_of(model.write(tmp_path))
    for parameters in predictor.list_of_parameters:
        for name in parameters:
            if "seg_layers" in name and name.endswith("bias"):
                parameters[name][1] = value
    result = compare(predictor, noise((9, 8, 10)), (1.0, 1.5, 1.0))
    if value > 0:
        assert result[0] is RuntimeError
        assert "Encountered inf" in result[1]
    else:
        assert set(np.unique(result)) == {1}


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.slow
def test_a_network_of_other_heads_is_refused_as_in_stock(tmp_path: Path, heads: int) -> None:
    predictor = predictor_of(TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3)).write(tmp_path))
    forward = predictor.network.forward
    predictor.network.forward = lambda tile: forward(tile).repeat(1, 2, 1, 1, 1)[:, :heads]
    stock = predicted(predictor, noise((9, 8, 10)), (1.0, 1.0, 1.0), False)
    with lean_prediction():
        lean = predicted(predictor, noise((9, 8, 10)), (1.0, 1.0, 1.0), False)
    if heads == 1:  # which torch adds to all classes
        assert same(stock, lean)
    else:
        assert stock[0] is lean[0] is RuntimeError


def test_what_is_no_image_is_refused_as_in_stock(tmp_path: Path) -> None:
    predictor = predictor_of(TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3)).write(tmp_path))
    tensor, found = torch.from_numpy(noise((9, 8, 10))), []
    for way in (contextlib.nullcontext(), lean_prediction()):
        with way:
            methods = (predictor.predict_sliding_window_return_logits, predictor.predict_logits_from_preprocessed_data)
            for method in methods:
                for wrong in (None, tensor.numpy()[None], tensor, tensor[None, None]):
                    with pytest.raises(AssertionError) as refused:
                        method(wrong)
                    found.append(str(refused.value))
            with pytest.MonkeyPatch.context() as patch:  # no weights
                patch.setattr(predictor, "list_of_parameters", [])
                found.append(predictor.predict_logits_from_preprocessed_data(tensor[None]))
    assert found[:9] == found[9:]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("special", [(), (np.inf,), (np.nan,), (np.nan, np.inf, -np.inf)])
def test_the_first_of_equals_and_the_first_nan_win(special: tuple[float, ...], dtype: type) -> None:
    rng = np.random.default_rng(0)
    values = rng.choice(np.array([-0.0, 0.0, 1.0, *special], dtype), (300, 20, 5, 4))
    running = RunningArgmax(values.shape[1:], np.uint16)
    threads = torch.get_num_threads()
    for number, value in enumerate(values):
        running.add(number, value)
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(running.labels, values.argmax(0))


def test_infinite_logits_are_seen_by_their_bits() -> None:
    every = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.float16))  # of half precision
    assert every.isinf().sum() == 2
    assert not has_infinite(every[~every.isinf()])
    assert all(has_infinite(one) for one in every[every.isinf()][:, None])
    assert has_infinite(every.view(4, 128, 128)[:, ::2])
    assert not has_infinite(every.view(4, 128, 128)[:, :, 1:])


@pytest.mark.parametrize("free", [10**9, 1000])  # accumulators on the device, or on the host
@pytest.mark.parametrize(
    ("fails_at", "how"),  # the GPU runs out of memory in the seventh tile
    [
        (None, None),
        (7, torch.OutOfMemoryError("CUDA out of memory")),
        (7, RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
    ],
)
@pytest.mark.slow
def test_a_gpu(tmp_path: Path, free: int, fails_at: int | None, how: RuntimeError, monkeypatch) -> None:
    from tests.fake_cuda import fake_cuda_device

    class Event:
        def record(self, stream: object) -> None:
            assert stream == "stream of the GPU that predicts"

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "stream of the GPU that predicts")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    monkeypatch.setattr(RowWriter, "_on_host", lambda self, planes, ready: planes.cpu())  # no streams to copy on here
    folder = TrialModel(exclusive(4), patch=(4, 6, 6), folds=2).write(tmp_path)
    image, calls = noise((9, 8, 10), 1), []
    with fake_cuda_device():
        predictor = predictor_of(folder, device=torch.device("cuda"))
        stock = predicted(predictor, image, (1.0, 1.5, 1.0), False)
        forward = predictor.network.forward

        def fail_once(tile: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == fails_at:
                raise how
            return forward(tile)

        predictor.network.forward = fail_once
        with lean_prediction():
            assert same(stock, predicted(predictor, image, (1.0, 1.5, 1.0), False))
    assert isinstance(stock, np.ndarray)
    assert len(calls) > 14


@pytest.mark.slow
def test_logits_reach_nnunets_own_pools() -> None:
    logits, values = stored()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        sums = [pool.apply_async(torch.sum, (sent,), {"dtype": torch.float64}) for sent in (logits, logits)]
        del logits
        for result in sums:
            assert float(result.get()) == float(values.sum(dtype=torch.float64))


def test_off_means_untouched(tmp_path: Path) -> None:
    from nnunetv2.inference import export_prediction, predict_from_raw_data
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer

    owners = (export_prediction, predict_from_raw_data, nnUNetTrainer, predict_from_raw_data.nnUNetPredictor)
    before = [dict(vars(owner)) for owner in owners]
    with lean_prediction():
        assert switch.is_on()
        assert nnUNetTrainer.export_prediction_from_logits.__module__ == "nnunet_plugins.lean.export.functions"
        with lean_prediction():
            assert switch.is_on()
        assert switch.is_on()
    assert not switch.is_on()
    assert [dict(vars(owner)) for owner in owners] == before


@pytest.mark.slow
def test_a_variable_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = predictor_of(TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3)).write(tmp_path))
    for before, now in (("", "whole"), ("whole", "lean"), ("whole", "off")):
        monkeypatch.setenv("MEMEFF_NNUNET", before)
        with lean_prediction():
            monkeypatch.setenv("MEMEFF_NNUNET", now)
            kind, words = predicted(predictor, noise((6, 6, 6)), (1.0, 1.0, 1.0), False)
        assert kind is RuntimeError
        assert words.startswith(f"MEMEFF_NNUNET was {'whole' if before == 'whole' else 'lean or off'} when nnU-Net's ")
    monkeypatch.setenv("MEMEFF_NNUNET", "1")
    with pytest.raises(RuntimeError, match="must be lean, whole or off, got '1'"), lean_prediction():
        pass


@pytest.mark.parametrize("dtype", [torch.half, torch.float32])
def test_predictors_of_others_keep_their_ways(tmp_path: Path, dtype: torch.dtype) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class Own(nnUNetPredictor):
        def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
            return torch.arange(3.0)[:, None, None, None].to(dtype) * input_image.to(dtype)

    model = TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3), folds=3).write(tmp_path)
    predictor = Own(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0, 1, 2))
    labels, _ = compare(predictor, noise((9, 8, 10)), (1.0, 1.0, 1.5), probabilities=True)
    assert set(np.unique(labels)) == {0, 2}


def other_ways() -> dict[str, Any]:
    """Ways in which somebody changes a step of nnU-Net's prediction; each takes a predictor and a MonkeyPatch."""
    from nnunetv2.inference import export_prediction, predict_from_raw_data
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    window, mirror = "_internal_predict_sliding_window_return_logits", "_internal_maybe_mirror_and_predict"
    sliding, logits = "predict_sliding_window_return_logits", "predict_logits_from_preprocessed_data"
    convert = "convert_predicted_logits_to_segmentation_with_correct_shape"
    stock = {name: getattr(nnUNetPredictor, name) for name in (window, mirror, sliding, logits)}

    def turned(name: str) -> Any:
        return lambda self, *arguments: -stock[name](self, *arguments)

    def derived(name: str) -> Any:
        return lambda predictor, patch: setattr(
            predictor, "__class__", type("Own", (nnUNetPredictor,), {name: turned(name)})
        )

    def own(name: str) -> Any:
        return lambda predictor, patch: setattr(predictor, name, turned(name).__get__(predictor))

    def patched(name: str) -> Any:
        return lambda predictor, patch: patch.setattr(nnUNetPredictor, name, turned(name))

    def wrapped(name: str) -> Any:
        return lambda predictor, patch: patch.setattr(
            nnUNetPredictor, name, functools.wraps(stock[name])(lambda self, *all: -stock[name](self, *all))
        )

    def exported(predictor: Any, patch: pytest.MonkeyPatch) -> None:
        function = getattr(export_prediction, convert)
        for module in (export_prediction, predict_from_raw_data):
            patch.setattr(module, convert, lambda *all, **more: 255 - function(*all, **more))

    ways = {f"{how.__name__} {name}": how(name) for how in (derived, own, patched, wrapped) for name in stock}
    return {**ways, **other_calls(), "export": exported}


def other_calls() -> dict[str, Any]:
    """Ways in which somebody changes what a step of nnU-Net's prediction calls."""
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.preprocessing.resampling import default_resampling
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    def called(owner: Any, name: str, change: Any) -> Any:
        return lambda predictor, patch: patch.setattr(owner, name, change(getattr(owner, name)))

    label = "convert_logits_to_segmentation"
    return {
        "weights": called(predict_from_raw_data, "compute_gaussian", ramp),
        "padding": called(predict_from_raw_data, "pad_nd_image", lambda old: lambda x, *more: old(x + 1, *more)),
        "resizing": called(default_resampling, "resize", lambda old: lambda x, *all, **more: -old(x, *all, **more)),
        "axes": called(default_resampling, "determine_do_sep_z_and_axis", lambda old: lambda *_, **more: (True, 0)),
        "labels": called(LabelManager, label, lambda old: lambda self, logits: logits.argmin(0)),
    }


def ramp(gaussian: Any) -> Any:
    """Weights of tiles of our own; a function with a cache, as nnU-Net's."""
    return functools.lru_cache(lambda size, **more: torch.linspace(1, 9, size[2]).half().expand(size).contiguous())


@pytest.mark.long
def test_changed_steps_of_nnunet_stay_changed(tmp_path: Path, capsys: Any) -> None:
    folder = TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3), folds=2, mirroring=(0,)).write(tmp_path)
    image, spacing = noise((9, 8, 10)), (1.0, 1.0, 1.5)
    plain = compare(predictor_of(folder), image, spacing)
    for name, change in other_ways().items():
        with pytest.MonkeyPatch.context() as patch:
            predictor = predictor_of(folder)
            change(predictor, patch)
            assert (compare(predictor, image, spacing) != plain).any(), name
            listed = name.startswith(("patched", "wrapped", "export")) and "_internal_predict" not in name
            assert ("lean prediction keeps" in capsys.readouterr().err) == listed, name
    assert same(plain, compare(predictor_of(folder), image, spacing))


def test_iterators_that_others_put_in_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.inference import predict_from_raw_data

    predictor = predictor_of(TrialModel(exclusive(3), patch=(6, 6, 6), features=(2, 3)).write(tmp_path))
    monkeypatch.setattr(predict_from_raw_data, "preprocessing_iterator_fromfiles", lambda files, *_: iter(files))
    with lean_prediction():
        assert list(predictor._internal_get_data_iterator_from_lists_of_filenames(["a"], None, None, 1)) == ["a"]


def test_what_others_put_in_meanwhile_stays() -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    name = "predict_from_data_iterator"
    with pytest.MonkeyPatch.context() as patch:
        with lean_prediction():
            theirs = lambda self, iterator: None  # noqa: E731
            patch.setattr(nnUNetPredictor, name, theirs)
        assert getattr(nnUNetPredictor, name) is theirs
        patch.undo()
    nnUNetPredictor.predict_from_data_iterator = stock_method(name)


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.slow
def test_networks_that_see_whole_volumes_still_do(tmp_path: Path, wrapped_first: bool, monkeypatch) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_plugins.lean.predict.sliding import predict_sliding_window_return_logits as lean_method
    from nnunet_plugins.training import whole_volume

    name = "predict_sliding_window_return_logits"
    stock_method = getattr(nnUNetPredictor, name)
    stock_method = stock_method.__wrapped__ if hasattr(stock_method, "whole_volume") else stock_method
    monkeypatch.setattr(nnUNetPredictor, name, stock_method)
    folder = TrialModel(exclusive(3), patch=(4, 4, 4), folds=2).write(tmp_path)
    tiled, whole = predictor_of(folder), predictor_of(folder)
    shapes: list[tuple[int, ...]] = []

    def predict_volume(image: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(image.shape[2:]))
        return torch.cat([image, -image, image * torch.arange(image.shape[2]).view(-1, 1, 1) / 5], 1).half()

    whole.network.predict_volume = predict_volume
    if wrapped_first:
        whole_volume.install()
    with lean_prediction():
        whole_volume.install()
        assert getattr(nnUNetPredictor, name).__wrapped__ is lean_method
        results = [predicted(p, noise((9, 8, 10)), (1.0, 1.5, 1.0), False) for p in (tiled, whole)]
    assert getattr(nnUNetPredictor, name).__wrapped__ is stock_method
    for predictor, result in zip((tiled, whole), results, strict=True):
        assert same(predicted(predictor, noise((9, 8, 10)), (1.0, 1.5, 1.0), False), result)
    assert shapes == [(9, 12, 10)] * 4
    assert len(np.unique(results[1])) > 1


def test_one_tiles_logits_are_in_memory_at_a_time(tmp_path: Path) -> None:
    predictor = predictor_of(TrialModel(exclusive(3), patch=(4, 4, 4)).write(tmp_path))
    forward, made, alive = predictor.network.forward, [], []

    def watched(tile: torch.Tensor) -> torch.Tensor:
        alive.extend(storage for storage in made if not storage.expired())
        result = forward(tile)
        made.append(StorageWeakRef(result.untyped_storage()))
        return result

    predictor.network.forward = watched
    with lean_prediction():
        predicted(predictor, noise((9, 8, 10)), (1.0, 1.0, 1.0), False)
    assert len(made) > 20
    assert not alive


# Logits on disk


def stored(shape: tuple[int, ...] = (3, 4, 5, 6)) -> tuple[StoredLogits, torch.Tensor]:
    values = torch.randn(shape).half()
    file = LogitsFile(values.shape)
    for row in range(4):
        file.write(row, 0, values[:, row])
    return file.tensor(), values


def test_logits_on_disk_are_a_tensor_for_everybody_else() -> None:
    logits, values = stored()
    assert torch.equal(logits, values)
    assert logits.cpu() is logits
    assert logits.detach().to("cpu") is logits
    assert type(logits + 1) is torch.Tensor
    assert torch.equal(logits.to(torch.float32), values.float())
    array = logits.cpu().detach().numpy()
    assert isinstance(array, StoredArray)
    np.testing.assert_array_equal(array.argmax(0), values.numpy().argmax(0))
    logits += 1
    assert torch.equal(torch.from_numpy(logits.file.class_volumes(1, 3)), values[1:] + 1)


def test_logits_on_disk_lie_as_in_memory() -> None:
    logits, values = stored()
    assert logits.stride() == values.stride()
    flat = logits.view(3, -1)
    flat[0] -= 7
    assert torch.equal(logits[0], values[0] - 7)
    assert torch.equal(torch.from_numpy(logits.file.class_volumes(0, 1))[0], values[0] - 7)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.transpose_(1, 2),
        lambda logits: logits.set_(torch.zeros(3, 4, 4, 4).half()),
        lambda logits: setattr(logits, "data", torch.zeros(3, 4, 4, 4).half()),
    ],
)
def test_logits_that_were_moved_in_place_are_ordinary(change: Any) -> None:
    logits, _ = stored((3, 4, 4, 4))
    change(logits)
    expected = logits.clone().numpy()
    assert file_of(logits) is file_of(logits.numpy()) is None
    np.testing.assert_array_equal(class_volumes(logits, 1, 3), expected[1:])
    for sent in (logits, logits.numpy()):
        np.testing.assert_array_equal(np.asarray(ForkingPickler.loads(ForkingPickler.dumps(sent))), expected)


def test_another_process_gets_the_file_and_a_pickle_the_values() -> None:
    logits, values = stored()
    for sent in (logits, logits.numpy()):
        received = ForkingPickler.loads(ForkingPickler.dumps(sent))
        assert received.file.shape == (3, 4, 5, 6)
        np.testing.assert_array_equal(np.asarray(received), values.numpy())
        assert len(bytes(ForkingPickler.dumps(sent))) < 1000
        np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(sent))), values.numpy())
    assert torch.equal(copy.deepcopy(logits), values)


def test_scratch_files_have_no_name_and_are_refused_in_a_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    file = ScratchFile(1000)
    assert not list(tmp_path.iterdir())
    assert file.read(10, np.empty(5, np.int16)).tolist() == [0] * 5
    with pytest.raises(NoRoomError, match=rf"needs 1048576.0 GiB .* {tmp_path} has .* set {FOLDER_VARIABLE}") as error:
        ScratchFile(2**50)
    assert "\n" not in str(error.value)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(NoRoomError, match="No such file"):
        ScratchFile(10)
