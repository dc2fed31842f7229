"""Malformed images by kind: each case is a path, and the image that it was made from."""

from __future__ import annotations

import gzip
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from tests.faults.dicom_files import write_series

AFFINE = np.array([[-0.8, 0, 0, 20], [0, -0.7, 0, 30], [0, 0, 1.5, 40], [0, 0, 0, 1.0]])
SHAPE = (9, 7, 8)
NIFTI_HEADER = 348
UNCHECKED = range(112, 120)
"""Slope and intercept of a NIfTI header: nothing else in the file tells their right value."""


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        path: what a reader is given.
        name: what was done.
        whole: the values that a reader may give instead of a refusal; None where it must refuse.
    """

    path: Path
    name: str
    whole: np.ndarray | None


def numbers(dtype: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2000, SHAPE).astype(dtype)


def nifti_bytes(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(numbers(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, folder / "source.nii")
    return (folder / "source.nii").read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    """One whole image in every format, by ending."""
    plain = nifti_bytes(folder)
    mgh = nibabel.MGHImage(numbers(), AFFINE).to_bytes()
    head = (
        f"NRRD0004\ntype: int16\ndimension: 3\nspace: right-anterior-superior\nsizes: {' '.join(map(str, SHAPE))}\n"
        "space directions: (-0.8,0,0) (0,-0.7,0) (0,0,1.5)\nspace origin: (20,30,40)\nendian: little\n"
    )
    voxels = numbers().tobytes("F")
    meta = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        f"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -20 -30 40\nElementSpacing = 0.8 0.7 1.5\n"
        f"DimSize = {' '.join(map(str, SHAPE))}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    return {
        ".nii": plain, ".nii.gz": gzip.compress(plain, mtime=0), ".mgh": mgh, ".mgz": gzip.compress(mgh, mtime=0),
        ".nrrd": head.encode() + b"encoding: raw\n\n" + voxels, ".mha": meta.encode() + voxels,
        ".dcm": write_series(folder / "slices", numbers())[0].read_bytes(),
    }  # fmt: skip


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def truncated(folder: Path) -> Iterator[Case]:
    """Files that end too early."""
    for ending, whole in files(folder).items():
        for part in np.linspace(0.0, 0.995, 9):
            content = whole[: int(part * len(whole))]
            kept = numbers() if ending == ".mgh" else None  # its last bytes are not voxels
            yield Case(written(folder / f"{part:.3f}{ending}", content), f"{part:.3f} of {ending}", kept)


def wrong_endings(folder: Path) -> Iterator[Case]:
    """Whole images under the name of another format."""
    contents = files(folder)
    for is_a, content in contents.items():
        for named in (*contents, ".img", ".hdr", ".txt", ".png", ""):
            if named != is_a:
                path = written(folder / f"is{is_a.replace('.', '')}{named}", content)
                yield Case(path, f"{is_a} named {named or 'nothing'}", numbers())


def nothing(folder: Path) -> Iterator[Case]:
    """Zero bytes, zeros, noise and text under every name."""
    noise = np.random.default_rng(1).bytes(2000)
    for ending in (".nii", ".nii.gz", ".img", ".hdr", ".mgh", ".mgz", ".nrrd", ".mha", ".mhd", ".dcm", ".ima", ".x"):
        for name, content in (("empty", b""), ("zeros", b"\0" * 4000), ("noise", noise), ("text", b"no image\n" * 99)):
            yield Case(written(folder / f"{name}{ending}", content), f"{name}{ending}", None)


def nifti_bits(folder: Path) -> Iterator[Case]:
    """One wrong bit in a plain NIfTI's header."""
    whole = nifti_bytes(folder)
    for place in range(0, NIFTI_HEADER, 4):
        if place in UNCHECKED:
            continue
        for at, bit in ((place, 5), (place + 1, 0), (place + 3, 6), (place + 2, 7)):
            content = bytearray(whole)
            content[at] ^= 1 << bit
            yield Case(written(folder / f"{at}-{bit}.nii", content), f"byte {at}, bit {bit}", numbers())


def absurd_headers(folder: Path) -> Iterator[Case]:
    """Numbers that no image has."""
    template = nibabel.Nifti1Header.from_fileobj(io.BytesIO(nifti_bytes(folder)))
    for field, found in (
        ("dim", [[3, 30000, 30000, 30000], [3, 0, 7, 8], [3, -9, 7, 8], [0, 9, 7, 8], [7, 9, 7, 8], [-1, 9, 7, 8],
                 [3, 7, 9, 9], [4, 9, 7, 8, 3], [2, 9, 56], [3, 9, 7, 32767]]),
        ("datatype", [0, 1, 3, 32, 128, 1536, 1792, 2048, 2304, -4, 16, 64, 8, 2]),
        ("bitpix", [0, 1, 8, 32, 64, -16]),
        ("vox_offset", [0, 100, 348, 351, 353, 360, 1e9, -1, np.nan, np.inf]),
        ("sizeof_hdr", [0, 347, 540, -348]),
        ("magic", [b"ni1", b"xxx", b"", b"n+2", b"n+9"]),
        ("xyzt_units", [1, 3, 5, 7]),
        ("srow_x", [[0, 0, 0, 0], [np.nan, 0, 0, 0], [np.inf, 0, 0, 0], [0.8, 0, 0, 20], [-80, 0, 0, 0]]),
        ("scl_slope", [np.inf, -np.inf]),
        ("pixdim", [[1, 0, 0, 0], [-1, 0.8, 0.7, 1.5], [1, -0.8, 0.7, 1.5], [1, np.nan, 1, 1], [1, 8, 7, 15]]),
    ):  # fmt: skip
        for number, value in enumerate(found):
            header = template.copy()
            place = header.structarr[field]
            if isinstance(value, list):
                place[: len(value)] = value
            else:
                header.structarr[field] = value
            content = header.binaryblock + b"\0" * 4 + numbers().tobytes("F")
            path = written(folder / f"{field}{number}.nii", content)
            harmless = field in ("sizeof_hdr", "pixdim", "magic") or value == [
                7,
                9,
                7,
                8,
            ]  # seven axes, four of one voxel
            yield Case(path, f"{field} = {value!r}", numbers() if harmless else None)


def itk_headers(folder: Path) -> Iterator[Case]:
    """NRRD and MetaImage headers that contradict the file or say too little."""
    contents = files(folder)
    changes: dict[str, list[tuple[bytes, bytes]]] = {
        ".nrrd": [
            (b"space: right-anterior-superior\n", b""), (b"right-anterior-superior", b"scanner-xyz"),
            (b"right-anterior-superior", b"right-posterior-superior"), (b"space origin: (20,30,40)\n", b""),
            (b"space directions: (-0.8,0,0) (0,-0.7,0) (0,0,1.5)\n", b""), (b"(0,0,1.5)", b"none"),
            (b"(0,0,1.5)", b"(0,0,0)"), (b"(0,0,1.5)", b"(nan,0,0)"), (b"sizes: 9 7 8", b"sizes: 9 7 9"),
            (b"sizes: 9 7 8", b"sizes: 9 7 7"), (b"sizes: 9 7 8", b"sizes: 9 7"), (b"sizes: 9 7 8", b"sizes: 9 7 -8"),
            (b"sizes: 9 7 8", b"sizes: 90000 70000 80000"), (b"type: int16", b"type: double"),
            (b"NRRD0004", b"NRRDxxxx"), (b"type: int16", b"type: nonsense"),
            (b"dimension: 3", b"dimension: 4"), (b"dimension: 3", b"dimension: 2"),
            (b"encoding: raw", b"encoding: gzip"), (b"encoding: raw", b"encoding: hex"), (b"endian: little\n", b""),
            (b"endian: little", b'endian: little\nspace units: "um" "um" "um"'),
        ],
        ".mha": [
            (b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b""), (b"NDims = 3", b"NDims = 2"), (b"NDims = 3", b"NDims = 4"),
            (b"1 0 0 0 1 0 0 0 1", b"1 0 0 1 0 0 0 0 1"), (b"DimSize = 9 7 8", b"DimSize = 9 7 9"),
            (b"DimSize = 9 7 8", b"DimSize = 9 7 7"), (b"DimSize = 9 7 8", b"DimSize = 9 -7 8"),
            (b"DimSize = 9 7 8", b"DimSize = 90000 70000 80000"), (b"MET_SHORT", b"MET_DOUBLE"),
            (b"MET_SHORT", b"MET_NONSENSE"), (b"CompressedData = False", b"CompressedData = True"),
            (b"ElementSpacing = 0.8 0.7 1.5", b"ElementSpacing = 0 0 0"), (b"LOCAL", b"absent.raw"),
            (b"ElementSpacing = 0.8 0.7 1.5\n", b""), (b"BinaryData = True", b"BinaryData = False"),
        ],
    }  # fmt: skip
    for ending, edits in changes.items():
        for number, (before, after) in enumerate(edits):
            assert before in contents[ending]
            path = written(folder / f"edit{number}{ending}", contents[ending].replace(before, after))
            yield Case(path, f"{ending}: {before!r} -> {after!r}", None)


def dicom_bits(folder: Path) -> Iterator[Case]:
    """One wrong bit in the header of one slice of a series."""
    source = folder / "source"
    write_series(source, numbers())
    whole = (source / "IM0004.dcm").read_bytes()
    end = whole.index(b"\xe0\x7f\x10\x00")
    random = np.random.default_rng(2)
    for number, place in enumerate(np.linspace(128, end + 7, 120).astype(int)):
        bit = int(random.integers(0, 8))
        content = bytearray(whole)
        content[place] ^= 1 << bit
        yield Case(_series_with(folder / str(number), source, bytes(content)), f"byte {place}, bit {bit}", numbers())


def dicom_cuts(folder: Path) -> Iterator[Case]:
    """A series with one slice that ends too early, or is no DICOM at all."""
    source = folder / "source"
    write_series(source, numbers())
    whole = (source / "IM0004.dcm").read_bytes()
    for number, part in enumerate(np.linspace(0, len(whole) - 1, 40).astype(int)):
        yield Case(_series_with(folder / str(number), source, whole[:part]), f"{part} bytes of a slice", None)
    for name, content in (("zeros", b"\0" * 900), ("text", b"no slice\n" * 99), ("no preamble", whole[132:])):
        yield Case(_series_with(folder / name, source, content), name, None)


def _series_with(folder: Path, source: Path, content: bytes) -> Path:
    folder.mkdir(parents=True)
    for file in source.iterdir():
        os.link(file, folder / file.name)
    (folder / "IM0004.dcm").unlink()
    (folder / "IM0004.dcm").write_bytes(content)
    return folder


def places(folder: Path) -> Iterator[Case]:
    """Paths that lead to no file: pipes, loops, folders named as files, broken links."""
    folder.mkdir(parents=True)
    for ending in (".nii", ".nii.gz", ".dcm", ".nrrd", ""):
        os.mkfifo(folder / f"pipe{ending}")
        (folder / f"dir{ending}").mkdir()
        (folder / f"broken{ending}").symlink_to(folder / "absent")
        (folder / f"loop{ending}").symlink_to(folder / f"loop{ending}")
        for name in ("pipe", "dir", "broken", "loop", "none"):
            yield Case(folder / f"{name}{ending}", f"{name}{ending}", None)
    write_series(folder / "series", numbers())
    os.mkfifo(folder / "series" / "pipe.dcm")
    (folder / "series" / "again").symlink_to(folder / "series")
    yield Case(folder / "series", "a series with a pipe and a link to itself", numbers())
    shutil.copytree(folder / "dir.dcm", folder / "nested" / "a" / "b")
    yield Case(folder / "nested", "empty folders in folders", None)


def shared_bad(data: Path) -> Iterator[Case]:
    """Malformed DICOM files that pydicom's authors met, alone and together, and objects that are not images."""
    bad = data / "dicom" / "bad"
    for path in (bad, *sorted(bad.iterdir()), *sorted((data / "dicom" / "highdicom_test_files").iterdir())):
        yield Case(path, path.name, None)


KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "truncated files": truncated, "wrong endings": wrong_endings, "nothing in it": nothing,
    "wrong bits in NIfTI headers": nifti_bits, "absurd NIfTI headers": absurd_headers,
    "contradicting NRRD and MetaImage headers": itk_headers, "wrong bits in DICOM headers": dicom_bits,
    "cut or foreign DICOM slices": dicom_cuts, "places that are not files": places,
}  # fmt: skip
