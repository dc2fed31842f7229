"""`memeff run`: series in, DICOM SEG or NIfTI out, the same voxels both ways; refusals, resuming, crashes, memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.nets import UNet

from monai_memeff import cli
from monai_memeff.data.dicom.scan import choose_series
from monai_memeff.hosts.run import run_studies
from monai_memeff.hosts.run.pool import _outcome
from monai_memeff.hosts.run.source.bundle import DECODER_LOG, Bundle
from monai_memeff.hosts.run.source.checkpoints import checkpoints_of
from monai_memeff.hosts.run.studies import Study, find_studies
from monai_memeff.hosts.run.worker import Outcome, Settings, Worker
from tests.bundles.conftest import ROOT
from tests.hosts.bundles import image, save, series, small_bundle

pydicom = pytest.importorskip("pydicom", reason="DICOM needs the extra [dicom]")
highdicom = pytest.importorskip("highdicom", reason="DICOM SEG needs the extra [dicom]")
pytestmark = pytest.mark.filterwarnings("ignore")
Memeff = Callable[..., tuple[int, str, str]]
OURS: dict[str, dict[str, Any]] = {
    "cranial_cavity_clstm": {},
    "organ_occupancy": {"pixdim": [6.0, 6.0, 7.0]},
    "liver_tumor_halo": {"side": 16, "features": [4, 8], "convs": 2, "inferer__partitions": 2},
}


@pytest.fixture
def memeff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Memeff:
    """`memeff` in this process: exit status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["memeff", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stock bundle with a small network."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "stock", inferer__roi_size=[16, 16, 16])


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tilted series."""
    folder = tmp_path_factory.mktemp("studies") / "ct"
    series(folder)
    return folder


def labels(file: Path) -> tuple[np.ndarray, np.ndarray]:
    found: Any = nibabel.load(file)
    return np.asarray(found.dataobj), found.affine


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def frames_of_seg(file: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The labels of a SEG, placed by the position of every frame alone, without highdicom's own assembly."""
    data = pydicom.dcmread(file)
    whole = np.zeros(shape, np.uint8)
    planes = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    for plane, group in zip(planes, data.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array([*group.PlanePositionSequence[0].ImagePositionPatient, 1.0]) * [-1, -1, 1, 1]
        index = np.linalg.solve(affine, corner)[:3]
        assert np.allclose(index, np.rint(index), atol=1e-3)
        assert np.allclose(index[:2], 0, atol=1e-3)
        source = group if "SegmentIdentificationSequence" in group else data.SharedFunctionalGroupsSequence[0]
        number = source.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        whole[..., round(index[2])][plane.T > 0] = number
    return whole


# Series to SEG: the same voxels as NIfTI, in three programs


@pytest.mark.parametrize("kind", ["stock", "sparse_unet", *OURS])
@pytest.mark.slow
def test_seg_and_nifti_agree_voxel_for_voxel(kind: str, stock: Path, ct: Path, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="an independent reader of DICOM SEG; nnU-Net brings it")
    network = {} if kind == "liver_tumor_halo" else {"channels": [4, 8]}
    bundle = small_bundle(tmp_path / kind, ROOT / "bundles" / kind, network, **OURS[kind]) if kind in OURS else stock
    overlays = [kind] if kind == "sparse_unet" else []
    for form in ("seg", "nifti"):
        assert run_studies(bundle, [ct], tmp_path / form, overlays, form) == 0
    values, affine = labels(tmp_path / "nifti" / "ct" / "segmentation.nii.gz")
    assert len(np.unique(values)) > 1 or kind in OURS
    assert np.allclose(affine @ [0, 0, 0, 1], [20, 30, 40, 1], atol=1e-4)
    file = tmp_path / "seg" / "ct" / "segmentation.dcm"
    seg = highdicom.seg.segread(file)
    names = {s["label"]: s["name"] for s in report(tmp_path / "seg" / "ct")["results"][0]["segments"]}
    assert {n: seg.get_segment_description(n).segment_label for n in seg.segment_numbers} == names
    assert {s.SOPInstanceUID for s in map(pydicom.dcmread, ct.iterdir())} == {u[2] for u in seg.get_source_image_uids()}
    assert np.array_equal(frames_of_seg(file, values.shape, affine), values)
    volume = seg.get_volume(combine_segments=True, skip_overlap_checks=False)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    found = np.zeros_like(values)
    for index in np.argwhere(volume.array):
        place = np.linalg.solve(affine, to_ras @ volume.affine @ [*index, 1])
        assert np.allclose(place, np.rint(place), atol=1e-3)
        found[tuple(np.rint(place[:3]).astype(int))] = volume.array[tuple(index)]
    assert np.array_equal(found, values)
    stack = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    assert int((stack > 0).sum()) == int((values > 0).sum())
    again = sitk.ReadImage(str(tmp_path / "nifti" / "ct" / "segmentation.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(again).transpose(2, 1, 0), values)


def test_the_same_labels_as_monais_own_command(stock: Path, tmp_path: Path) -> None:
    affine = np.diag([-6.0, 5.0, 7.0, 1.0])
    affine[:3, :3] = affine[:3, :3] @ np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    (tmp_path / "imagesTs").mkdir()
    file = tmp_path / "imagesTs" / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image(), affine), file)
    options = {"bundle_root": str(stock), "dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "monai")}
    config = str(stock / "configs" / "inference.json")
    work = ConfigWorkflow(config, logging_file=False, workflow_type="infer", device="cpu", **options)
    work.initialize()
    work.run()
    assert run_studies(stock, [file], tmp_path / "ours") == 0
    expected = labels(next((tmp_path / "monai").rglob("*.nii.gz")))
    found = labels(tmp_path / "ours" / "a" / "segmentation.nii.gz")
    assert np.array_equal(found[0], expected[0])
    assert len(np.unique(found[0])) == 2
    assert np.allclose(found[1], affine, atol=1e-5)
    assert found[0].dtype == np.uint8


@pytest.mark.slow
def test_the_segments_are_coded(stock: Path, ct: Path, tmp_path: Path) -> None:
    names = {"0": "background", "1": "right kidney", "2": "liver tumor", "3": "vertebrae_L5", "4": "something else"}
    bundle = small_bundle(
        tmp_path / "b", network={"channels": [4, 8], "strides": [2], "num_res_units": 0, "out_channels": 5}
    )
    file = bundle / "configs" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["network_data_format"]["outputs"]["pred"] |= {"channel_def": names, "num_channels": 5}
    file.write_text(json.dumps(metadata))
    assert run_studies(bundle, [ct], tmp_path / "out") == 0
    seg = highdicom.seg.segread(tmp_path / "out" / "ct" / "segmentation.dcm")
    found = [seg.get_segment_description(n) for n in range(1, 5)]
    types = [(s.segmented_property_type.value, s.segmented_property_type.scheme_designator) for s in found]
    assert types[0] == ("64033007", "SCT")
    assert types[2] == ("49668003", "SCT")
    assert types[1][1] == types[3][1] == "99MEMEFF"
    side = found[0].SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert side.CodeMeaning == "Right"
    assert found[1].segmented_property_category.meaning.startswith("Morphologically")
    identification = found[0].SegmentationAlgorithmIdentificationSequence[0]
    assert identification.AlgorithmSource == "monai-memeff"
    assert "weights=" in identification.AlgorithmParameters


# One bad study, and going on


@pytest.mark.slow
def test_one_bad_study_does_not_stop_the_others(stock: Path, tmp_path: Path, memeff: Memeff) -> None:
    inputs, output = tmp_path / "in", tmp_path / "out"
    for number, name in enumerate(("a", "b", "c"), 1):
        series(inputs / name, number)
    missing = next((inputs / "b").glob("*0004.dcm"))
    missing.rename(tmp_path / "kept.dcm")
    words = ("run", stock, inputs, "--output", output)
    status, out, err = memeff(*words)
    assert status == 1
    assert [line for line in err.splitlines() if line.startswith("memeff: ")] == err.strip().splitlines()[-1:]
    assert "memeff: b: b is not one regular stack: 1 slice is missing" in err
    assert "2 of 3 studies have results" in out
    assert json.loads((output / "b.refused.json").read_text())["refused"] in err
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*.dcm")}
    (tmp_path / "kept.dcm").rename(missing)
    status, out, err = memeff(*words)
    assert (status, out.count("finished before"), out.count("done in")) == (0, 2, 1)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert sorted(entry.name for entry in output.iterdir()) == ["a", "b", "c"]
    shown = report(output / "a")
    assert {"torch", "monai", "monai-memeff"} <= set(shown["versions"])
    assert shown["peak_process_bytes"] > 24 * 20 * 9 * 4
    assert set(shown["seconds"]) == {"reading and preprocessing", "inference", "postprocessing", "total"}


def test_results_of_other_weights_are_not_passed_off(ct: Path, tmp_path: Path, memeff: Memeff) -> None:
    bundle = small_bundle(tmp_path / "b")
    words = ("run", bundle, ct, "--output", tmp_path / "out")
    assert memeff(*words)[0] == 0
    file = bundle / "models" / "model.pt"
    state = torch.load(file, weights_only=True)
    torch.save({"model": {key: value * 2 for key, value in state.items()}}, file)
    status, _, err = memeff(*words)
    assert status == 1
    assert "holds results of another input, bundle, version or option" in err
    shutil.rmtree(tmp_path / "out" / "ct")
    assert memeff(*words)[0] == 0


def test_parts_of_a_list_of_studies(stock: Path, tmp_path: Path, memeff: Memeff) -> None:
    for name in "abcde":
        nibabel.save(nibabel.Nifti1Image(image((8, 8, 8)), np.eye(4)), tmp_path / f"{name}.nii")
    for number in range(2):
        assert memeff("run", stock, tmp_path, "--output", f"{tmp_path}_out{number}", "--part", f"{number}/2")[0] == 0
    found = [sorted(entry.name for entry in Path(f"{tmp_path}_out{number}").iterdir()) for number in range(2)]
    assert found == [["a", "c", "e"], ["b", "d"]]


@pytest.mark.exhaustive
def test_a_worker_that_dies_takes_its_own_study_only(tmp_path: Path, memeff: Memeff) -> None:
    bundle = small_bundle(tmp_path / "deadly")
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "__init__.py").touch()
    (bundle / "scripts" / "deadly.py").write_text(
        "import os\nfrom monai.transforms import MapTransform\n"
        "class Deadlyd(MapTransform):\n"
        "    def __call__(self, data):\n"
        "        if 'b.nii' in data['image'].meta['filename_or_obj']:\n"
        "            os.kill(os.getpid(), 9)\n"
        "        return data\n"
    )
    file = bundle / "configs" / "inference.json"
    config = json.loads(file.read_text())
    config["preprocessing"]["transforms"].append({"_target_": "scripts.deadly.Deadlyd", "keys": "image"})
    file.write_text(json.dumps(config))
    (tmp_path / "in").mkdir()
    for name in "abcd":
        nibabel.save(nibabel.Nifti1Image(image((8, 8, 8)), np.eye(4)), tmp_path / "in" / f"{name}.nii")
    status, out, err = memeff("run", bundle, tmp_path / "in", "--output", tmp_path / "out", "--workers", 2)
    assert status == 1
    assert "memeff: b: its process ended with status -9" in err
    assert "3 of 4 studies have results" in out
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["a", "c", "d"]


# What is refused, in one line each, before anything is written


def change(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = bundle / "configs" / "inference.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def without_inverse(config: dict[str, Any]) -> None:
    config["postprocessing"]["transforms"].pop(1)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], int, str]] = {
    "no Invertd": (without_inverse, 1, "postprocessing needs Invertd"),
    "shifted": (
        lambda c: c["postprocessing"]["transforms"].insert(
            3, {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: monai.data.MetaTensor(x, torch.eye(4))"}
        ),
        1,
        "voxels off the image's grid",
    ),
    "a second network": (
        lambda c: c["preprocessing"]["transforms"].append(
            {"_target_": "Lambdad", "keys": "image", "func": "@other"}
        )
        or c.update(other={"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}),
        2,
        "other has no checkpoint",
    ),
    "an unknown step": (lambda c: c["initialize"].append("$print('hello')"), 2, "which memeff run does not know"),
    "another engine": (lambda c: c["evaluator"].update(_target_="EnsembleEvaluator"), 2, "knows SupervisedEvaluator"),
    "another reader": (
        lambda c: c["preprocessing"]["transforms"][0].update(reader="PILReader"), 2, "reads by PILReader",
    ),
    "a turned reader": (
        lambda c: c["preprocessing"]["transforms"][0].update(reader="ITKReader", affine_lps_to_ras=False),
        2,
        "decides how files are read",
    ),
    "a network that is fetched": (
        lambda c: c.update(fetched="$__import__('urllib.request').request.urlopen('http://example.org/w')")
        or c["network_def"].update(norm="$'batch' if @fetched else 'batch'"),
        2,
        "uses no network",
    ),
    "a misspelled argument": (
        lambda c: c["evaluator"].update(inferrer=c["evaluator"].pop("inferer")),
        2,
        "argument inferrer, which MONAI's lacks",
    ),
    "organs of another order": (lambda c: c.update(organs=["tumor", "liver"]), 2, "names its labels tumor, liver"),
    "logits that are NaN": (
        lambda c: c.update(inferer="$lambda inputs, network: network(inputs) * float('nan')"),
        1,
        "gave logits that are NaN",
    ),
    "more classes than names": (
        lambda c: c["postprocessing"]["transforms"].insert(
            3, {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x * 7"}
        ),
        1,
        "it has the label 7, and the metadata names 1 classes; use --format nifti",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_cannot_be_exact_is_refused(
    kind: str, ct: Path, tmp_path: Path, memeff: Memeff, caplog: pytest.LogCaptureFixture
) -> None:
    edit, expected, words = REFUSED[kind]
    bundle = small_bundle(tmp_path / "b")
    change(bundle, edit)
    status, _, err = memeff("run", bundle, ct, "--output", tmp_path / "out")
    lines = [line for line in err.splitlines() if line.startswith("memeff: ")]
    assert (status, len(lines)) == (expected, 1), err
    assert words in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "ct").exists()
    assert not [record for record in caplog.records if record.name == DECODER_LOG]


def test_weights_that_are_not_the_networks(stock: Path, ct: Path, tmp_path: Path, memeff: Memeff) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    contents: dict[str, tuple[Any, str]] = {
        "foreign": (torch.nn.Conv3d(1, 2, 1).state_dict(), "weights are missing"),
        "code": ({"model": Evil()}, "not a checkpoint of tensors alone"),
        "list": ([torch.zeros(1)], "state dict is needed"),
    }
    bundle = small_bundle(tmp_path / "b")
    for content, words in contents.values():
        torch.save(content, bundle / "models" / "model.pt")
        status, _, err = memeff("run", bundle, ct, "--output", tmp_path / "out")
        assert status == 2
        assert words in err.splitlines()[-1]
    (bundle / "models" / "model.pt").rename(bundle / "models" / "model.ts")
    status, _, err = memeff("run", bundle, ct, "--output", tmp_path / "out")
    assert (status, "model.ts is not used" in err) == (2, True)
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists()


def test_bad_words_on_the_command_line(stock: Path, ct: Path, tmp_path: Path, memeff: Memeff) -> None:
    for words, said in (
        (("run", tmp_path, ct, "--output", tmp_path / "out"), "not a bundle for inference"),
        (("run", stock, tmp_path / "none", "--output", tmp_path / "out"), "no such input"),
        (("run", stock, ct, "--output", ct / "out"), "lies in the input"),
        (("run", stock, ct, "--output", stock / "configs" / "inference.json"), "is a file"),
        (("run", stock, ct, "--output", tmp_path / "out", "--format", "png"), "seg or nifti"),
        (("run", stock, ct, "--output", tmp_path / "out", "--workers", 0), "at least 1"),
        (("run", stock, ct, "--output", tmp_path / "out", "--part", "2/2"), "--part is I/N"),
        (("run", stock, ct, "--output", tmp_path / "out", "--overlay", "none"), "no overlay is called"),
        (("run", stock, ct), "--output"),
    ):
        status, _, err = memeff(*words)
        assert (status, len(err.strip().splitlines())) == (2, 1), err
        assert said in err
    assert not (tmp_path / "out").exists()


def test_no_socket_is_left_shut(stock: Path, ct: Path, tmp_path: Path) -> None:
    assert run_studies(stock, [ct], tmp_path / "out") == 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


# What is a study


def names(root: Path, images: tuple[str, ...] = ("image",)) -> dict[str, str]:
    return {study.name: study.fault for study in find_studies([root], images)}


def test_studies_of_a_folder(tmp_path: Path) -> None:
    series(tmp_path / "anna" / "ct", 1)
    series(tmp_path / "bert" / "ct" / "first", 2, keep=[0, 1, 2, 3])
    series(tmp_path / "bert" / "ct" / "second", 2, keep=[4, 5, 6, 7, 8])
    series(tmp_path / "carl" / "seg", 3, change=lambda k, data: setattr(data, "Modality", "SEG"))
    for file in ("dora.nii.gz", "emil.nrrd", "fred/x.hdr", "fred/x.img", "notes.txt", ".hidden.nii"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x")
    found = names(tmp_path)
    assert set(found) == {"anna_ct", "bert_ct_first", "bert_ct_second", "dora", "emil", "fred_x"}
    assert all("lies in 2 folders" in found[name] for name in ("bert_ct_first", "bert_ct_second"))
    (tmp_path / "dora.nii").write_text("x")
    with pytest.raises(ValueError, match="would both be written as dora"):
        names(tmp_path)


def test_a_study_that_is_a_link_to_nothing_is_told(stock: Path, tmp_path: Path, memeff: Memeff) -> None:
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(image((8, 8, 8)), np.eye(4)), tmp_path / "in" / "a.nii")
    (tmp_path / "in" / "b.nii").symlink_to(tmp_path / "absent.nii")
    status, out, err = memeff("run", stock, tmp_path / "in", "--output", tmp_path / "out")
    assert status == 1
    assert "1 of 2 studies have results" in out
    assert re.search(r"memeff: b: .*b\.nii", err)


@pytest.mark.parametrize("images", [("image",), ("T1", "T2")])
def test_a_folder_that_cannot_be_listed_is_told(
    images: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python passes it over."""
    series(tmp_path / "anna" / "ct", 1)
    series(tmp_path / "bert" / "shut", 2)
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(tmp_path, images)["bert_shut"] == f"{tmp_path / 'bert' / 'shut'}: Permission denied"
    with pytest.raises(PermissionError):
        choose_series(tmp_path / "bert")


def test_an_output_that_cannot_be_written_ends_in_one_line(stock: Path, tmp_path: Path, memeff: Memeff) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        nibabel.save(nibabel.Nifti1Image(image((8, 8, 8)), np.eye(4)), tmp_path / "in" / f"{name}.nii")
    (tmp_path / "file").write_text("x")
    for workers in (1, 2):
        words = ("--workers", workers, "--output", tmp_path / "file" / "out")
        status, _, err = memeff("run", stock, tmp_path / "in", *words)
        assert (status, len(err.strip().splitlines())) == (2, 1), err


@pytest.mark.parametrize(
    ("kind", "words", "wanted"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has", "20.00 GiB"),
        (
            RuntimeError,
            "[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
            "8 bytes",
        ),
    ],
)
def test_too_little_memory_is_told_with_a_way_out(
    kind: type[Exception],
    words: str,
    wanted: str,
    stock: Path,
    tmp_path: Path,
    memeff: Memeff,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(*_: Any) -> Any:
        raise kind(words)

    monkeypatch.setattr(UNet, "forward", forward)
    nibabel.save(nibabel.Nifti1Image(image((8, 8, 8)), np.eye(4)), tmp_path / "a.nii")
    status, _, err = memeff("run", stock, tmp_path / "a.nii", "--output", tmp_path / "out")
    assert status == 1
    assert f"memeff: a: too little memory of cpu for SlidingWindowInferer, which wanted {wanted} more: free some" in err
    assert "traceback" not in json.loads((tmp_path / "out" / "a.refused.json").read_text())


def test_a_disk_that_is_full_ends_a_worker_process_in_one_line(tmp_path: Path) -> None:
    def full(_: Study) -> Outcome:
        raise OSError(28, "No space left on device", str(tmp_path))

    assert _outcome(full, Study("a", ())) == f"{tmp_path}: No space left on device"  # type: ignore[arg-type]


def test_several_images_of_one_study(tmp_path: Path) -> None:
    for name in ("p1/p1_t1.nii", "p1/p1-T1c.nii.gz", "p1/p1_seg.nii", "p2/t1.nii", "p2/other.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    first, second = find_studies([tmp_path], ("T1c", "T1"))
    assert [image.name for image in first.images] == ["p1-T1c.nii.gz", "p1_t1.nii"]
    assert "there are 0 for T1c" in second.fault


def test_overlapping_regions_of_several_channels(tmp_path: Path) -> None:
    """As the brain tumor bundle: modalities in, regions out; one file for each region."""
    bundle = small_bundle(
        tmp_path / "b", network={"in_channels": 2, "out_channels": 3, "channels": [4, 8], "strides": [2]}
    )
    file = bundle / "configs" / "metadata.json"
    metadata = json.loads(file.read_text())
    data = metadata["network_data_format"]
    data["inputs"]["image"] |= {"num_channels": 2, "channel_def": {"0": "T1c", "1": "T1"}}
    data["outputs"]["pred"] |= {"num_channels": 3, "channel_def": {"0": "core", "1": "whole", "2": "edge"}}
    file.write_text(json.dumps(metadata))

    def regions(config: dict[str, Any]) -> None:
        config["postprocessing"]["transforms"][0] = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
        config["postprocessing"]["transforms"][2] = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}

    change(bundle, regions)
    for seed, name in enumerate(("t1", "t1c")):
        (tmp_path / "in" / "p").mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(image(seed=seed), np.diag([4.0, 5, 6, 1])), tmp_path / f"in/p/{name}.nii")
    assert run_studies(bundle, [tmp_path / "in"], tmp_path / "out") == 0
    found = sorted(entry.name for entry in (tmp_path / "out" / "p").glob("*.nii.gz"))
    assert found == [f"segmentation_{n}_{name}.nii.gz" for n, name in enumerate(("core", "whole", "edge"), 1)]
    assert [r["segments"][0]["name"] for r in report(tmp_path / "out" / "p")["results"]] == ["core", "whole", "edge"]


# Memory over many volumes


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.slow
def test_fifty_volumes_in_one_process(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(50):
        values = image((40, 40, 40), seed=number % 3)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([4.0, 4, 5, 1])), tmp_path / "in" / f"{number:02}.nii")
    opened = Bundle(stock)
    weights = {str(found.file): found.sha256() for found in checkpoints_of(opened)}
    work = Worker(Settings(stock, (), tmp_path / "out", None, None, False, weights, opened.digest))
    levels = []
    for study in find_studies([tmp_path / "in"], ["image"]):
        assert work(study).done
        levels.append(resident())
    assert levels[-1] < 1.02 * levels[2]


def test_weights_of_two_networks_in_one_file(tmp_path: Path, ct: Path) -> None:
    bundle = small_bundle(tmp_path / "b")
    other = torch.nn.Conv3d(1, 1, 1)
    save(other, tmp_path / "other.pt")
    state = {"model": torch.load(bundle / "models" / "model.pt"), "other": torch.load(tmp_path / "other.pt")}
    torch.save(state, bundle / "models" / "model.pt")

    def two(config: dict[str, Any]) -> None:
        config["other"] = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}
        config["preprocessing"]["transforms"].append(
            {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: @other(x).detach()"}
        )
        config["checkpointloader"]["load_dict"]["other"] = "@other"

    change(bundle, two)
    assert run_studies(bundle, [ct], tmp_path / "out") == 0
