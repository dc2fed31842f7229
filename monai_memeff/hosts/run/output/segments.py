"""What the numbers of a result mean: names from the bundle's metadata, and codes of DICOM for them."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_memeff.errors import InputError
from monai_memeff.hosts.run.program import Result

BACKGROUND = ("background", "bg", "back ground", "unlabeled", "unlabelled", "none")
ABNORMAL = re.compile(r"tumou?r|lesion|neoplasm|edema|cyst|necro|infarct|metasta|nodule|defect", re.I)
OBJECT = re.compile(r"implant|prosthe|stent|electrode|catheter", re.I)
PRIVATE = "99MEMEFF"
"""Coding scheme of names that SNOMED CT, as pydicom knows it, does not have."""


@dataclass(frozen=True)
class Labels:
    """A result as labels.

    Attributes:
        values: (H, W, D) where classes are exclusive, (S, H, W, D) of 0 and 1 where segments overlap.
        names: name of every segment, by its number from 1 on; empty where the bundle does not say.
        unnamed: why there are no names.
    """

    values: np.ndarray
    names: dict[int, str]
    unnamed: str = ""


def labels_of(result: Result, outputs: dict[str, Any]) -> Labels:
    """A result in the smallest integer type that holds it, or as it is where it is not labels.

    Args:
        result: what the bundle would save.
        outputs: the metadata's ``network_data_format#outputs``.
    """
    values = _integers(result.values)
    said = outputs.get(result.key) or (
        next(iter(outputs.values())) if len(outputs) == 1 and result.key == "pred" else {}
    )
    channels = {int(key): str(name) for key, name in (said.get("channel_def") or {}).items() if str(key).isdecimal()}
    named = result.key in outputs or result.key == "pred"
    if values.dtype.kind not in "iu":
        return Labels(values[0] if len(values) == 1 else values, {}, "its values are not whole numbers")
    if len(values) > 1:
        return _overlapping(values, channels)
    labels, largest = values[0], int(values.max(initial=0))
    if int(values.min(initial=0)) < 0:
        return Labels(labels, {}, "it has negative values")
    if not named or len(channels) < 2:
        name = channels.get(0, "") if named and channels else result.name or result.key
        one = largest <= 1 and bool(name)
        return Labels(
            labels, {1: name} if one else {}, "" if one else "the metadata names one class, and it has several"
        )
    names = {number: name for number, name in channels.items() if number > 0}
    if channels.get(0, "").strip().lower() not in BACKGROUND:
        why = f"channel 0 of the metadata is {channels.get(0)!r} and not the background, so labels and channels differ"
        return Labels(labels, {}, why)
    if largest > max(names):
        return Labels(labels, {}, f"it has the label {largest}, and the metadata names {max(names)} classes")
    return Labels(labels, names)


def _overlapping(values: np.ndarray, channels: dict[int, str]) -> Labels:
    if values.max(initial=0) > 1 or values.min(initial=0) < 0:
        return Labels(values, {}, "it has several channels of other numbers than 0 and 1")
    if sorted(channels) != list(range(len(values))):
        return Labels(values, {}, f"it has {len(values)} channels, and the metadata names {len(channels)}")
    first = int(channels[0].strip().lower() in BACKGROUND)
    return Labels(values[first:], {number - first + 1: name for number, name in channels.items() if number >= first})


def _integers(values: np.ndarray) -> np.ndarray:
    """In the smallest of three integer types, or float32 where a value is none."""
    if values.dtype.kind not in "iub" and not (np.isfinite(values).all() and np.array_equal(values, np.rint(values))):
        return values.astype(np.float32)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values.astype(np.float32 if values.dtype.kind not in "iu" else values.dtype)


def described(labels: Labels, algorithm: Any) -> list[Any]:
    """highdicom's descriptions of all segments, those without a voxel too: they were looked for.

    Raises:
        InputError: the bundle does not say what the numbers mean.
    """
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription

    if not labels.names or sorted(labels.names) != list(range(1, len(labels.names) + 1)):
        why = labels.unnamed or "its classes are not numbered 1, 2, ..."
        raise InputError(f"no DICOM SEG can be made of the bundle's result, as {why}; use --format nifti")
    segments = []
    for number, name in sorted(labels.names.items()):
        category, kind, side = codes_of(name)
        segment = SegmentDescription(
            number, name[:64], category, kind, SegmentAlgorithmTypeValues.AUTOMATIC, algorithm_identification=algorithm
        )
        if side is not None:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
        segments.append(segment)
    return segments


def codes_of(name: str) -> tuple[Any, Any, Any]:
    """Category, type and, for paired organs, side of a segment, by its name.

    The type is the concept of SNOMED CT that has this very name, else a private one with the name as its meaning.
    """
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    sides = [word for word in words if word in ("left", "right")]
    bare = [word for word in words if word not in ("left", "right")] if len(sides) == 1 else words
    kind = _concept(bare, codes)
    side = getattr(codes.cid244, sides[0].capitalize()) if kind is not None and bare != words else None
    known = codes.cid7150
    category = known.AnatomicalStructure if kind is not None else known.SpatialAndRelationalConcept
    category = known.MorphologicallyAbnormalStructure if ABNORMAL.search(name) else category
    category = known.PhysicalObject if OBJECT.search(name) else category
    own = kind or CodedConcept(f"M{zlib.crc32(name.lower().encode()):08X}", PRIVATE, name[:64])
    modifier = None if side is None else CodedConcept(side.value, side.scheme_designator, side.meaning)
    return category, own, modifier


def _concept(words: list[str], codes: Any) -> Any:
    if len(words) == 2 and words[0] in ("vertebra", "vertebrae") and re.fullmatch(r"[ctl]\d+", words[1]):
        words = [words[1], "vertebra"]
    try:
        return getattr(codes.SCT, "".join(word.capitalize() for word in words)) if words else None
    except AttributeError:
        return None
