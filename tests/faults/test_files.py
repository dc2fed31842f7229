"""Files are written whole or not at all, never over their own source, and read right or refused by name."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_memeff import cli
from monai_memeff.apps.skull.demo import report
from monai_memeff.clstm import CLSTMUNet, NiftiSlabs, SlabInferer
from monai_memeff.clstm.figure import save_agreement
from monai_memeff.data import LabelFile, atomic_write, check_other_file, open_nifti, save_nifti
from monai_memeff.errors import InputError
from monai_memeff.occupancy.mesh import labels_to_mesh, write_mesh
from monai_memeff.sparse.core import map_cache

AFFINE = np.array([[-1.0, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1.0]])


def values(dtype: Any = np.int16, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


# One helper for all writers


def test_a_write_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "file.json"
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as work:
        interrupt(work.write_text("half"))
    assert names(tmp_path / "sub") == []
    for text in ("first", "second"):
        with atomic_write(target) as work:
            assert work.suffix == ".part"
            work.write_text(text)
            assert target.exists() == (text == "second")
        assert target.read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as work:
        interrupt(work.write_text("third"))
    assert target.read_text() == "second"
    assert names(tmp_path / "sub") == ["file.json"]


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with atomic_write(tmp_path / "link.txt") as work:
        work.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "fresh.txt") as work:
            work.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "fresh.txt").stat().st_mode & 0o777 == 0o640


def test_a_killed_process_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # nothing of this process may run on in the copy
        labels = LabelFile(tmp_path / "labels.nii", (5, 6, 7), np.eye(4))
        labels[..., :3] = 1
        os.kill(os.getpid(), 9)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".part"
    with pytest.raises(nib.filebasedimages.ImageFileError):
        nib.load(left)


@pytest.mark.parametrize("way", ["same", "link", "hard link", "relative", "folder"])
def test_the_source_is_never_written_over(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "ct.nii"
    nib.save(nib.Nifti1Image(values(), AFFINE), source)
    before = source.read_bytes()
    target: Path = source
    if way == "link":
        target = tmp_path / "link.nii"
        target.symlink_to(source)
    elif way == "hard link":
        target = tmp_path / "hard.nii"
        os.link(source, target)
    elif way == "relative":
        monkeypatch.chdir(tmp_path)
        target = Path("ct.nii")
    elif way == "folder":
        (tmp_path / "inner").mkdir()
        target = tmp_path / "inner" / ".." / "ct.nii"
    with pytest.raises(InputError, match="is the input itself"):
        NiftiSlabs(source).create_labels(target)
    with pytest.raises(InputError, match="is the input itself"), atomic_write(target, source):
        pass
    assert source.read_bytes() == before


def test_commands_do_not_write_over_their_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"x": 1}))
    torch.save({}, tmp_path / "model.pt")
    for words in (("merge", "a.json", "--output", "a.json"), ("convert", "model.pt", "model.pt")):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["memeff", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_demo_writes_neither_over_its_image_nor_into_its_series(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "implant.nii.gz").write_bytes(b"ct")
    with pytest.raises(InputError, match="is the input itself"):
        report.check_output(tmp_path / "out", tmp_path / "out" / "implant.nii.gz")
    for output in ("series", "series/out", "series/../series"):
        (tmp_path / "series").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="the image's own folder"):
            report.check_output(tmp_path / output, tmp_path / "series")
    assert report.check_output(tmp_path / "out", tmp_path / "out" / "ct.nii.gz") == tmp_path / "out"


def test_a_second_run_leaves_no_implant_of_the_first(tmp_path: Path) -> None:
    for written in (("report.json", "implant.stl"), ("report.json", "implant.nii.gz")):
        with report.atomic_folder(tmp_path / "out") as folder:
            for name in written:
                (folder / name).write_text(name)
        (tmp_path / "out" / "mine.txt").write_text("mine")
    assert names(tmp_path / "out") == ["implant.nii.gz", "mine.txt", "report.json"]


def test_writers_that_fail_leave_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = labels_to_mesh(torch.ones(2, 2, 2), np.eye(4))
    picture = np.zeros((4, 4, 4))
    writers = {
        "a.stl": lambda path: write_mesh(path, mesh),
        "a.png": lambda path: save_agreement(path, picture, picture > 0, picture > 0),
        "a.nii": lambda path: save_nifti(path, values(), AFFINE),
        "a.nii.gz": lambda path: save_nifti(path, values(), AFFINE),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _full)
            with pytest.raises(OSError, match="no space"):
                write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    assert names(tmp_path) == sorted(writers)


def _full(*_: object) -> None:
    raise OSError(28, "no space left on device")


def test_a_cached_kernel_map_with_a_wrong_bit_is_planned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_memeff.sparse.core.neighbors import NeighborTable

    table = NeighborTable(torch.arange(4000).reshape(2, 2000), None, 3, 2000)
    path = tmp_path / "x.pt"
    monkeypatch.setattr(map_cache, "_max_bytes", 2**30)
    map_cache._write(path, table)
    found = map_cache._read(path, torch.device("cpu"))
    assert found is not None
    assert torch.equal(found.entries, table.entries)
    whole = bytearray(path.read_bytes())
    for place in range(60, len(whole), len(whole) // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        found = map_cache._read(path, torch.device("cpu"))
        assert found is None or torch.equal(found.entries, table.entries)
    assert names(tmp_path) == ["x.pt"]


# Slabs into arrays and files


@pytest.fixture(scope="module")
def net() -> CLSTMUNet:
    torch.manual_seed(0)
    return CLSTMUNet(out_channels=2, channels=(4, 8), hidden_channels=2).eval()


def test_an_interrupted_write_leaves_no_file(net: CLSTMUNet, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(values(), AFFINE), tmp_path / "ct.nii")

    def stop(slab: torch.Tensor) -> torch.Tensor:
        if float(slab.affine[2, 3]) > 10 and not armed:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return slab

    armed: list[int] = []
    slabs = NiftiSlabs(tmp_path / "ct.nii", slab=2, transform=stop)
    (tmp_path / "labels.nii").write_bytes(b"an earlier result")
    with pytest.raises(KeyboardInterrupt):
        SlabInferer(labels=True, prefetch=0).write(slabs, net, slabs.create_labels(tmp_path / "labels.nii"))
    assert names(tmp_path) == ["ct.nii", "labels.nii"]
    assert (tmp_path / "labels.nii").read_bytes() == b"an earlier result"
    armed.append(1)
    SlabInferer(labels=True).write(slabs, net, slabs.create_labels(tmp_path / "labels.nii"))
    assert names(tmp_path) == ["ct.nii", "labels.nii"]
    assert nib.load(tmp_path / "labels.nii").shape == (5, 6, 7)


def test_a_label_file_that_is_dropped_vanishes(tmp_path: Path) -> None:
    labels = LabelFile(tmp_path / "a.nii", (2, 3, 4), AFFINE)
    labels[...] = 1
    del labels
    assert names(tmp_path) == []
    with pytest.raises(RuntimeError), LabelFile(tmp_path / "a.nii", (2, 3, 4), AFFINE):
        raise RuntimeError
    assert names(tmp_path) == []
    with LabelFile(tmp_path / "a.nii", (2, 3, 4), AFFINE) as labels:
        labels[0, 0, 1] = 3
    assert nib.load(tmp_path / "a.nii").get_fdata().sum() == 3 * 12
    with pytest.raises(ValueError, match="finished"):
        labels[...] = 2


SHAPES = [
    (1, 2, 8, 8, 12), (1, 2, 8, 8, 10), (1, 2, 8, 8, 1), (1, 2, 8, 9, 11), (1, 1, 8, 8, 11), (2, 2, 8, 8, 11),
    (8, 8, 11), (2, 8, 8, 11), (1, 2, 8, 8, 0), (1, 3, 8, 8, 11),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["volume", "list", "generator"])
def test_targets_of_another_shape_are_refused_before_anything_is_written(
    net: CLSTMUNet, shape: tuple[int, ...], kind: str
) -> None:
    volume = torch.randn(1, 1, 8, 8, 11)
    out = np.full(shape, 7.0, np.float32)
    inputs: Any = volume if kind == "volume" else list(volume.split(3, -1))
    inputs = iter(inputs) if kind == "generator" else inputs
    with pytest.raises(InputError, match=r"the target has|slices came"):
        SlabInferer(slab=3).write(inputs, net, out)
    if kind != "generator" or shape[-1:] not in ((12,), (10,)):  # a generator's depth is known at its end only
        assert (out == 7).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float16, bool, ">i2"])
@pytest.mark.parametrize("labels", [False, True])
def test_targets_whose_dtype_loses_values_are_refused(net: CLSTMUNet, dtype: Any, labels: bool) -> None:
    volume = torch.randn(1, 1, 8, 8, 5)
    out = np.full((1, 1 if labels else 2, 8, 8, 5), 7, dtype)
    whole = SlabInferer(labels=labels)(volume, net)
    if np.can_cast(whole.numpy().dtype, out.dtype, "safe"):
        SlabInferer(slab=2, labels=labels).write(volume, net, out)
        np.testing.assert_array_equal(out, whole.numpy())
        return
    before = out.copy()
    with pytest.raises(InputError, match="cannot hold every value"):
        SlabInferer(slab=2, labels=labels).write(volume, net, out)
    np.testing.assert_array_equal(out, before)
    tensor = torch.from_numpy(np.zeros(out.shape, out.dtype.newbyteorder("=")))
    with pytest.raises(InputError, match="cannot hold every value"):
        SlabInferer(slab=2, labels=labels).write(volume, net, tensor)


def test_targets_without_a_shape_are_refused(net: CLSTMUNet) -> None:
    with pytest.raises(TypeError, match="shape and dtype, got list"):
        SlabInferer().write(torch.zeros(1, 1, 8, 8, 5), net, [])


# Formats


def nifti(kind: str, data: np.ndarray, endian: str = "<", affine: np.ndarray = AFFINE) -> Any:
    makers = {"1": (nib.Nifti1Header, nib.Nifti1Image), "2": (nib.Nifti2Header, nib.Nifti2Image)}
    pairs = {"1": (nib.nifti1.Nifti1PairHeader, nib.Nifti1Pair), "2": (nib.nifti2.Nifti2PairHeader, nib.Nifti2Pair)}
    header, image = (pairs if kind.endswith("pair") else makers)[kind[0]]
    return image(data, affine, header(endianness=endian))


FORMATS = {
    "one file": ("1", ".nii"), "packed": ("1", ".nii.gz"), "pair": ("1pair", ".img"),
    "pair packed": ("1pair", ".img.gz"),
    "header of a pair": ("1pair", ".hdr"), "NIfTI-2": ("2", ".nii"), "NIfTI-2 packed": ("2", ".nii.gz"),
    "NIfTI-2 pair": ("2pair", ".hdr"), "FreeSurfer": ("mgh", ".mgh"), "FreeSurfer packed": ("mgh", ".mgz"),
}  # fmt: skip


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("name", list(FORMATS))
def test_labels_of_every_format_can_be_read(name: str, dtype: Any, endian: str, net: CLSTMUNet, tmp_path: Path) -> None:
    kind, ending = FORMATS[name]
    data = values(dtype)
    if kind == "mgh":
        if dtype == np.float64 or endian == "<":
            pytest.skip("FreeSurfer's files are big-endian and know no float64")
        image = nib.MGHImage(data, AFFINE)
    else:
        image = nifti(kind, data, endian)
    if kind[0] in "12":
        image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"x" * 300))  # a comment before the voxels
    nib.save(image, tmp_path / f"ct{ending}")
    slabs = NiftiSlabs(tmp_path / f"ct{ending}", slab=3)
    np.testing.assert_array_equal(torch.cat(list(slabs), -1)[0, 0].numpy(), data)
    SlabInferer(labels=True).write(slabs, net, slabs.create_labels(tmp_path / "labels.nii"))
    written = nib.load(tmp_path / "labels.nii")
    expected = SlabInferer(labels=True)(torch.from_numpy(data.astype(np.float32))[None, None], net)[0, 0]
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected.numpy())
    np.testing.assert_allclose(written.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(written.get_qform(), AFFINE, atol=1e-5)
    assert written.header.get_xyzt_units()[0] == "mm"


def test_scaled_voxels_give_labels_without_scaling(tmp_path: Path) -> None:
    image = nib.Nifti1Image(values(np.float64), AFFINE)
    image.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "ct.nii")
    slabs = NiftiSlabs(tmp_path / "ct.nii")
    with slabs.create_labels(tmp_path / "labels.nii") as labels:
        labels[...] = 2
    assert set(np.unique(nib.load(tmp_path / "labels.nii").get_fdata())) == {2.0}


def test_a_sheared_grid_has_one_geometry_only(tmp_path: Path) -> None:
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.8
    save_nifti(tmp_path / "a.nii.gz", values(), sheared)
    header = nib.load(tmp_path / "a.nii.gz").header
    np.testing.assert_allclose(header.get_sform(), sheared, atol=1e-6)
    assert int(header["qform_code"]) == 0


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_nifti(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name.split(".")[0] in message
    return message


def test_what_cannot_be_right_is_refused_by_name(tmp_path: Path) -> None:
    def saved(change: Any, data: np.ndarray | None = None) -> str:
        image = nib.Nifti1Image(values() if data is None else data, AFFINE)
        image.set_qform(AFFINE, 1)
        image.set_sform(AFFINE, 1)
        change(image.header)
        (tmp_path / "a.nii").write_bytes(image.to_bytes() if data is not None else _raw(image))
        return refused(tmp_path / "a.nii")

    def codes(header: Any) -> None:
        header["qform_code"] = header["sform_code"] = 0

    def unit(code: int) -> Any:
        return lambda header: header.__setitem__("xyzt_units", code)

    def turned(header: Any) -> None:
        header["srow_x"] = -header["srow_x"]

    def respaced(header: Any) -> None:
        header["srow_z"] = header["srow_z"] * 1.5

    def larger(header: Any) -> None:
        header["dim"][3] = 70

    def smaller(header: Any) -> None:
        header["dim"][3] = 3

    def flat(header: Any) -> None:
        header["srow_z"] = 0

    def infinite(header: Any) -> None:
        header["scl_slope"], header["scl_inter"] = np.inf, 0

    assert "stores no orientation" in saved(codes)
    for code, name in ((1, "is m,"), (3, "micron"), (5, "unknown code")):
        assert name in saved(unit(code))
    assert "left and right" in saved(turned)
    assert "differ in spacing" in saved(respaced)
    assert "truncated" in saved(larger)
    assert "left over" in saved(smaller)
    assert "span space" in saved(flat)
    assert "cannot read" in saved(infinite)
    assert "complex64" in saved(lambda header: None, values(np.complex64))
    color = np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "real numbers are needed" in saved(lambda header: None, color)


def _raw(image: Any) -> bytes:
    """The bytes of an image with the header as it stands, which nibabel would mend."""
    image.header["vox_offset"], image.header["magic"] = 352, b"n+1"
    return image.header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes("F")


def test_other_formats_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(values(), np.diag([-1.0, 1, 1, 1])), tmp_path / "old.img")
    assert "does not say left from right" in refused(tmp_path / "old.img")
    nib.save(nib.Nifti1Image(values(), AFFINE), tmp_path / "whole.nii.gz")
    whole = (tmp_path / "whole.nii.gz").read_bytes()
    plain = gzip.decompress(whole)
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    assert "cannot read" in refused(tmp_path / "plain.nii.gz")
    (tmp_path / "packed.nii").write_bytes(whole)
    assert "cannot read" in refused(tmp_path / "packed.nii")
    (tmp_path / "text.nii").write_text("not an image " * 99)
    (tmp_path / "lone.hdr").write_bytes(nifti("1pair", values()).header.binaryblock)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 99)
    (tmp_path / "none.nii").write_bytes(b"")
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")
    for name in ("text.nii", "lone.hdr", "image.png", "none.nii", "folder.nii", "pipe.nii", "absent.nii"):
        refused(tmp_path / name)
    mgh = bytearray(nib.MGHImage(values(), AFFINE).to_bytes())
    mgh[28:30] = b"\0\0"
    (tmp_path / "loose.mgh").write_bytes(mgh)
    assert "no orientation" in refused(tmp_path / "loose.mgh")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_packed_file_with_a_wrong_bit_or_cut_short_is_never_taken(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, cut: bool
) -> None:
    data = values(shape=(12, 11, 10))
    folder = tmp_path_factory.mktemp("bits")
    save_nifti(folder / "a.nii.gz", data, AFFINE)
    whole = bytearray((folder / "a.nii.gz").read_bytes())
    at = int(place * len(whole))
    if cut:
        del whole[at:]
    else:
        whole[at] ^= 1 << bit
    (folder / "a.nii.gz").write_bytes(whole)
    try:
        image = open_nifti(folder / "a.nii.gz")
    except InputError:
        return
    np.testing.assert_array_equal(np.asarray(image.dataobj), data)  # a bit that says nothing, such as the time


def test_names_that_are_no_volume_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"written as \.nii or \.nii\.gz"):
        save_nifti(tmp_path / "a.img", values(), AFFINE)
    with pytest.raises(InputError, match="is a folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(InputError, match=r"a volume \(H, W, D\)"):
        save_nifti(tmp_path / "a.nii", values(shape=(3, 4)), AFFINE)
    check_other_file(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == []


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mgz"])
def test_a_walk_along_the_slices_opens_the_file_once(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed file that is opened anew for every slab is unpacked from its beginning for every slab."""
    image = nib.MGHImage(values(np.float32), AFFINE) if ending == ".mgz" else nib.Nifti1Image(values(), AFFINE)
    nib.save(image, tmp_path / f"ct{ending}")
    slabs = NiftiSlabs(tmp_path / f"ct{ending}", slab=1)
    opened: list[object] = []
    before = nib.openers.ImageOpener.__init__
    monkeypatch.setattr(nib.openers.ImageOpener, "__init__", lambda *a, **k: (opened.append(a), before(*a, **k))[1])
    assert len(list(slabs)) == 7
    assert len(opened) <= 1
