"""NRRD and MetaImage: read exactly in every space and packing that is read at all."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_memeff.data import read_volume
from monai_memeff.errors import InputError

pytest.importorskip("SimpleITK", reason="NRRD and MetaImage need SimpleITK")
SHAPE = (5, 6, 7)
SIGNS = {"RAS": (1, 1, 1), "LPS": (-1, -1, 1), "LAS": (-1, 1, 1)}
NAMES = {"RAS": "right-anterior-superior", "LPS": "left-posterior-superior", "LAS": "left-anterior-superior"}
TURNED = np.array([[0.8, 0.1, 0, -20], [-0.1, 0.7, 0, -30], [0, 0, 1.5, 40], [0, 0, 0, 1.0]])


def numbers() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, SHAPE).astype(np.int16)


def nrrd(path: Path, space: str, packed: bool = False, apart: bool = False, endian: str = "little") -> Path:
    axes = " ".join(f"({','.join(f'{v:g}' for v in TURNED[:3, axis])})" for axis in range(3))
    head = (
        f"NRRD0004\ntype: short\ndimension: 3\nspace: {space}\nsizes: 5 6 7\nspace directions: {axes}\n"
        f"kinds: domain domain domain\nendian: {endian}\nencoding: {'gzip' if packed else 'raw'}\n"
        f"space origin: (-20,-30,40)\n{'data file: voxels' if apart else ''}\n"
    )
    voxels = numbers().astype("<i2" if endian == "little" else ">i2").tobytes("F")
    voxels = gzip.compress(voxels) if packed else voxels
    if apart:
        (path.parent / "voxels").write_bytes(voxels)
    path.write_bytes((head if apart else head.rstrip("\n") + "\n\n").encode() + (b"" if apart else voxels))
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("name", [*NAMES, *NAMES.values()])
def test_nrrd_of_every_space(name: str, endian: str, packed: bool, tmp_path: Path) -> None:
    image, notes = read_volume(nrrd(tmp_path / "a.nrrd", name, packed, endian=endian))
    np.testing.assert_array_equal(image.as_tensor().numpy()[0], numbers())
    short = {long: key for key, long in NAMES.items()}.get(name, name)
    np.testing.assert_allclose(image.affine, np.diag([*SIGNS[short], 1]) @ TURNED, atol=1e-6)
    assert notes == ()


@pytest.mark.parametrize("packed", [False, True])
def test_nrrd_and_metaimage_in_two_files(packed: bool, tmp_path: Path) -> None:
    image, _ = read_volume(nrrd(tmp_path / "a.nhdr", "LPS", packed, apart=True))
    np.testing.assert_array_equal(image.as_tensor().numpy()[0], numbers())
    for ending, data in ((".mhd", "a.raw"), (".mha", "LOCAL")):
        voxels = numbers().tobytes("F")
        voxels = zlib.compress(voxels) if packed else voxels
        size = f"CompressedDataSize = {len(voxels)}\n" if packed else ""
        head = (
            f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
            f"CompressedData = {packed}\n{size}TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -20 -30 40\n"
            f"ElementSpacing = 0.8 0.7 1.5\nDimSize = 5 6 7\nElementType = MET_SHORT\nElementDataFile = {data}\n"
        ).encode()
        (tmp_path / f"a{ending}").write_bytes(head + (voxels if data == "LOCAL" else b""))
        (tmp_path / "a.raw").write_bytes(voxels)
        image, _ = read_volume(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(image.as_tensor().numpy()[0], numbers())
        np.testing.assert_allclose(
            image.affine, [[-0.8, 0, 0, 20], [0, -0.7, 0, 30], [0, 0, 1.5, 40], [0, 0, 0, 1]], atol=1e-6
        )
    (tmp_path / "a.raw").write_bytes(voxels[:-2])
    with pytest.raises(InputError, match="cannot read"):
        read_volume(tmp_path / "a.mhd")


@settings(derandomize=True, max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_packed_voxels_with_a_wrong_bit_are_never_taken(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    path = nrrd(tmp_path_factory.mktemp("bits") / "a.nrrd", "RAS", packed=True)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"\n\n") + 2
    whole[start + int(place * (len(whole) - start))] ^= 1 << bit
    path.write_bytes(whole)
    try:
        image, _ = read_volume(path)
    except InputError:
        return
    np.testing.assert_array_equal(image.as_tensor().numpy()[0], numbers())


def test_the_real_files_agree_with_dicom(data_dir: Path) -> None:
    for name in ("23x38x3", "24x38x3"):
        folder = data_dir / "dicom" / "dcmqi_segmentations" / name
        label, image = read_volume(folder / "nrrd" / "label.nrrd").image, read_volume(folder / "image").image
        assert label.shape == image.shape
        np.testing.assert_allclose(label.affine, image.affine, atol=1e-3)


def test_numbers_that_float32_lacks_are_refused(tmp_path: Path) -> None:
    import SimpleITK

    for kind, number in ((np.int32, 2**24 + 1), (np.float64, -1e300)):
        image = SimpleITK.GetImageFromArray(np.full((3, 4, 5), number, kind))
        SimpleITK.WriteImage(image, str(tmp_path / "a.mha"))
        with pytest.raises(InputError, match=r"float32, in which|largest of float32"):
            read_volume(tmp_path / "a.mha")
