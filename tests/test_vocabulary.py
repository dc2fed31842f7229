"""One vocabulary, the field's: words that the package has left behind do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("monai_memeff", "nnunet_plugins", "docs", "bundles", "README.md", "CHANGELOG.md")
ENDINGS = (".py", ".md", ".json")
WORDS = {
    r"\b[Aa]sk(s|ed|ing)?\b|\banswers? points|NOT_ASKED|points_asked|PointAnswers": "query, PointEvaluator",
    r"\bsettled?\b|mixed cells?\b|\bmixed_around\b": "propagate, boundary cells",
    r"\b(PlainCode|SkipCode|PooledCode|LastHead)\b": "...LatentHead, AuxiliaryHead",
    r"variant=.default.|\"variant\": \"default\"": "interpolated",
    r"\b(Guard|Hub|Flight|baton|pager|waiting room|def agree)\b": "plan, operator rule, executor, offload store",
    r"\b(NotPartitionable|PeerLost)\b": "NotPartitionableError, PeerLostError",
    r"\bClearSplitError\b": "SplitErrorMixin",
    r"\b(RandPepper|RandCoarseNoise|CoarsenMask|PlaceCoarse|BoneSpacing)d?\b|pepper\.py": "the transforms' field names",
    r"\bHounsfieldToUnitd?\b": "ScaleIntensityRange(clip=True)",
    r"[\"`@.]checkpointing\b|\bcheckpointing=": "use_checkpoint",
    r"output=.labels.|\"output\": \"labels\"": "labels=True",
    r"\b(PartitionPrepareBatch|SparsePrepareBatch|OccupancyPrepareBatch)\b": "PrepareBatch...",
    r"\babove=|#above\b|\bignored=|\bnumber=|\bband=": "threshold, ignore_index, num_samples, band_width",
    r"\b(kept_as|recalled|FEWEST_VOXELS|fault_of|few\.py)\b": "saved_for_recompute, load_cached, MIN_VOXELS",
    r"\b(bone_of|within_budget|added_at|enlarged)\b|\boccupied\(": "nonzero_voxels, foreground_mask, upsample, ...",
    r"\bhost=True|_way_back\b|\b_forth\b|[Ww]ay back\b": "offload_to_cpu, backward direction, forward direction",
    r"missed red|too much purple": "false negatives, false positives",
    r"\b(intake|TestDefect|_towards|_carry)\b": "io, HeldOutDefect, point_to_plane_step, transform_mask",
    r"\b[Ll]edger\b|\b_?strike\b": "StorageTracker, remove, sync",
    r"\bpretend": "fake CUDA device",
    r"thousand million|processor[- ]seconds": "billion, CPU-seconds",
    r"the so many|set free": "plain words",
    r"(?<!here )\b(is|are|was|be) no (?!longer|larger|more|less|finer)[a-z]": "is not a ...",
    r"\b([Ww]ings?|(ground|this|the) rooms?|[Rr]oofs?|floor plan)\b": "subpackage, module, layer, plugin",
    r"\b(neighbour|millimetre|centre|tumour|normalis|synthesis[ei])": "American spelling",
}
OF_ALONE = re.compile(r"^\s+\*{0,2}[a-z_]+: (of|likewise|the same)\b")


def lines() -> list[tuple[str, int, str]]:
    """File, number and text of every line for which the vocabulary holds."""
    files = [path for place in PLACES for path in sorted([ROOT / place, *(ROOT / place).rglob("*")]) if path.is_file()]
    names = {path: path.relative_to(ROOT).as_posix() for path in files if path.suffix in ENDINGS}
    return [
        (name, number, text)
        for path, name in names.items()
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]


LINES = lines()


@pytest.mark.parametrize("old", WORDS)
@pytest.mark.slow
def test_old_words_are_gone(old: str) -> None:
    found = [f"{name}:{number}: {text.strip()[:100]}" for name, number, text in LINES if re.search(old, text)]
    assert not found, f"say {WORDS[old]}"


def test_arguments_are_described_by_noun_phrases() -> None:
    """Not "channels: of the image." but "channels: Number of channels of the image."."""
    found = [f"{name}:{number}: {text.strip()}" for name, number, text in LINES if OF_ALONE.search(text)]
    assert not [line for line in found if line.partition(":")[0].endswith(".py")]
