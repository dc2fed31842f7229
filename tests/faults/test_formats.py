"""NIfTI and FreeSurfer files in every form are read right or refused by name."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_memeff.clstm import CLSTMUNet, NiftiSlabs, SlabInferer
from monai_memeff.data import atomic_write, check_other_file, open_nifti, read_volume, save_nifti
from monai_memeff.errors import InputError
from tests.faults.volume_files import AFFINE, names, values


@pytest.fixture(scope="module")
def net() -> CLSTMUNet:
    torch.manual_seed(0)
    return CLSTMUNet(out_channels=2, channels=(4, 8), hidden_channels=2).eval()


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
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.array([0, 2**24 + 1], np.int32), "holds the integer 16777217, and float32"),
        (np.array([0, -(2**31) + 1], np.int32), "holds the integer -2147483647, and float32"),
        (np.array([0, 2**64 - 1], np.uint64), "holds the integer 18446744073709551615, and float32"),
        (np.array([0, 1e300]), r"numbers beyond 3.4e\+38, the largest of float32"),
        (np.array([0, -(2**31)], np.int32), None),
        (np.array([0, 2**24], np.uint32), None),
        (np.array([0, 1 / 3]), None),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_numbers_that_float32_lacks_are_refused(
    numbers: np.ndarray, message: str | None, ending: str, tmp_path: Path
) -> None:
    file = tmp_path / f"a{ending}"
    nib.save(nib.Nifti1Image(np.broadcast_to(numbers, (3, 4, 2)), AFFINE, dtype=numbers.dtype), file)
    for read in (lambda: read_volume(file).image.numpy()[0], lambda: NiftiSlabs(file, slab=4)[0].numpy()[0, 0]):
        if message is None:
            assert np.array_equal(read(), np.broadcast_to(numbers.astype(np.float32), (3, 4, 2)))
        else:
            with pytest.raises(InputError, match=message):
                read()


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

    def backwards(header: Any) -> None:
        header["sform_code"], header["pixdim"][3] = 0, -3

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
    assert "readers disagree" in saved(backwards)
    assert "complex64" in saved(lambda header: None, values(np.complex64))
    color = np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "real numbers are needed" in saved(lambda header: None, color)


WHOLE = 2**24


@pytest.mark.parametrize("ending", [".nii", ".mha"])
@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.float64])
def test_whole_numbers_are_read_exactly_or_refused(dtype: Any, ending: str, tmp_path: Path) -> None:
    """Atlases number structures up to 614454277, and float32 would join neighbors."""
    for largest, exact in ((WHOLE, True), (WHOLE + 1, False), (WHOLE + 2, True), (2**30, True), (614454277, False)):
        data = values(dtype)
        data[1, 2, 3] = largest
        path = tmp_path / f"a{ending}"
        if "nii" in ending:
            save_nifti(path, data, AFFINE)
        else:
            sitk = pytest.importorskip("SimpleITK", reason="NRRD and MetaImage need SimpleITK")
            sitk.WriteImage(sitk.GetImageFromArray(data.transpose(2, 1, 0)), str(path))
        if exact:
            np.testing.assert_array_equal(read_volume(path).image.numpy()[0].astype(np.float64), data)
            continue
        with pytest.raises(InputError, match=f"holds the integer {largest}(.0)?, and float32"):
            read_volume(path)
        if "nii" in ending:
            with pytest.raises(InputError, match="float32"):
                list(NiftiSlabs(path, slab=2))


def test_numbers_beyond_float32_are_refused_and_fractions_rounded(tmp_path: Path) -> None:
    data = values(np.float64) + 1e9 + 0.3
    save_nifti(tmp_path / "a.nii", data, AFFINE)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").image.numpy()[0], data.astype(np.float32))
    save_nifti(tmp_path / "a.nii", data * 1e200, AFFINE)
    image = nib.Nifti1Image(values(), AFFINE)
    image.header.set_slope_inter(1e38, 0)
    nib.save(image, tmp_path / "b.nii")
    for name in ("a.nii", "b.nii"):
        with pytest.raises(InputError, match="numbers beyond"):
            read_volume(tmp_path / name)


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
@pytest.mark.slow
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
