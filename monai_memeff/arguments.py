"""What constructors refuse of their numbers: no comparison with a bound is true of NaN, so it would pass."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
INF = math.inf
LARGEST = 2**63 - 1
"""The largest whole number that torch takes."""

RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("in_channels", "out_channels", "channels", "refine_channels", "hidden_channels"), (1, INF)),
    **dict.fromkeys(("features", "num_features", "condition_features", "input_nc_feats", "width"), (1, INF)),
    **dict.fromkeys(("kernel_size", "up_kernel_size", "strides", "refine_strides", "convs", "band_width"), (1, INF)),
    **dict.fromkeys(("memory_budget", "volume_shape", "resolution", "shape", "num_samples", "downscale"), (1, INF)),
    **dict.fromkeys(("points_per_pass", "keep", "steps"), (1, INF)),
    **dict.fromkeys(("num_res_units", "blocks", "iterations", "padding", "first_slices", "seed", "eps"), (0, INF)),
    **dict.fromkeys(("distance_mm", "face", "face_mm", "top_margin", "tolerance", "spots"), (0, INF)),
    **dict.fromkeys(("class_weights", "lr", "pade_lr"), (0, INF)),
    **dict.fromkeys(("dropout", "prob", "p", "fraction", "momentum", "dice_weight", "min_ratio"), (0, 1)),
    **dict.fromkeys(("false_negatives", "false_positives"), (0, 1)),
    "percentile": (0, 100),
    "axis": (-3, 2),
}
"""What the names of arguments mean everywhere."""


def check_count(name: str, value: int, least: int = 1) -> None:
    """ValueError unless it is a whole number of at least ``least``."""
    if not _is_number(value, Integral, (least, LARGEST)):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_number(name: str, value: float, least: float = -INF) -> None:
    """ValueError unless it is a finite number of at least ``least``."""
    if not _is_number(value, Real, (least, INF)):
        bound = "" if least == -INF else f" and at least {least:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value!r}.")


def check_positive(name: str, value: float) -> None:
    """ValueError unless it is a finite number above 0."""
    if not _is_number(value, Real, (0, INF)) or value == 0:
        raise ValueError(f"{name} must be finite and above 0, got {value!r}.")


def check_odd(name: str, value: int | Sequence[int]) -> None:
    """ValueError unless it is an odd number, or a sequence of them: a kernel has its voxel in the middle."""
    for number in value if isinstance(value, Sequence) else (value,):
        if number % 2 == 0:
            raise ValueError(f"{name} must be odd, so that extents stay as they are, got {value!r}.")


def check_axis(axis: int) -> None:
    """ValueError unless it is an axis of a volume."""
    if not _is_number(axis, Integral, RANGES["axis"]):
        raise ValueError(f"axis must be a whole number in -3 ... 2, got {axis!r}.")


def numbers_checked(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which refuses by name an argument that is none of the numbers of its annotation.

    Every parameter with ``int`` or ``float`` in its annotation is checked, whatever else it may be: ``int`` takes whole
    numbers, ``float`` finite ones, sequences are not empty. :data:`RANGES` bounds some names; other ranges are the
    function's own.

    Raises:
        ValueError: when the function is called with such an argument.
    """
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    texts = {name: _SIZE.sub("int | tuple[int, int, int]", str(p.annotation)) for name, p in parameters.items()}
    kinds = {name: ast.parse(text, mode="eval").body for name, text in texts.items() if _NUMBER.search(text)}

    @functools.wraps(function)
    def with_checks(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in kinds and value is not parameters[name].default:
                bounds = RANGES.get(name, (-INF, INF))
                if not _fits(value.tolist() if hasattr(value, "tolist") else value, kinds[name], bounds):
                    raise ValueError(
                        f"{name} must be {_words(kinds[name]) or 'no number'}{_range(bounds)}, got {_shown(value)}."
                    )
        return function(*args, **kwargs)

    return with_checks


_NUMBER = re.compile(r"\b(int|float)\b")
_SIZE = re.compile(r"(\w+\.)?\bSize\b")
_SEVERAL = ("Sequence", "tuple", "list")


def _is_number(value: Any, kind: type, bounds: tuple[float, float]) -> bool:
    """Whether it is a finite number of a kind within bounds."""
    try:
        finite = isinstance(value, kind) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond every float
        return False
    low, high = bounds if kind is Real else (max(bounds[0], -LARGEST), min(bounds[1], LARGEST))
    return finite and low <= value <= high


def _fits(value: Any, kind: ast.expr, bounds: tuple[float, float]) -> bool:
    """Whether a value is what an annotation says; what is not a number is left to the function."""
    if isinstance(kind, ast.BinOp):
        return _fits(value, kind.left, bounds) or _fits(value, kind.right, bounds)
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) in _SEVERAL:
        several = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        return several and _all_fit(value, kind.slice, bounds)
    name = ast.unparse(kind)
    if name in ("int", "float"):
        return _is_number(value, Integral if name == "int" else Real, bounds)
    if name in ("None", "str"):
        return value is None if name == "None" else isinstance(value, str)
    return not isinstance(value, Real | complex | str | list | tuple | None)


def _all_fit(values: Sequence[Any], inside: ast.expr, bounds: tuple[float, float]) -> bool:
    kinds, fixed = _parts(inside)
    if fixed and len(values) != len(kinds):
        return False
    pairs = zip(values, kinds if fixed else kinds[:1] * len(values), strict=True)
    return all(_fits(value, kind, bounds) for value, kind in pairs)


def _parts(inside: ast.expr) -> tuple[list[ast.expr], bool]:
    """What stands in the brackets of an annotation, and whether it says how many there are."""
    kinds = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    return kinds, isinstance(inside, ast.Tuple) and ast.unparse(kinds[-1]) != "..."


def _words(kind: ast.expr, ending: str = "") -> str:
    """An annotation in words; what is not a number is left out."""
    if isinstance(kind, ast.BinOp):
        return " or ".join(filter(None, (_words(kind.left, ending), _words(kind.right, ending))))
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) in _SEVERAL:
        inside, fixed = _parts(kind.slice)
        several = "sequences of" if ending else "a sequence of"
        return f"{len(inside) if fixed else several} {_words(inside[0], 's')}"
    known = {"int": "a whole number", "float": "a finite number"}.get(ast.unparse(kind), "")
    return known.removeprefix("a ") + ending if known and ending else known


def _range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    if high < INF:
        return f" in {low:g} ... {high:g}"
    return f" of at least {low:g}" if low > -INF else ""


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:77]}..."
