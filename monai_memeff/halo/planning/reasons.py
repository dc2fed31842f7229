"""Why a capture failed, in one plain sentence: module path, the user's line, what it was, and the way out."""

from __future__ import annotations

import re
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor  # read in torch 2.6 to 2.14

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.program import Where

_PYTHON = sysconfig.get_paths()["stdlib"]
_DATA = "depends on the data, and is not known before the run; keep it a tensor (torch.where chooses by value)"
_SHAPES = "has no fake kernel, so the shape of its result is not known; register one with torch.library.register_fake"
_OUTSIDE = "a tensor's values go to code of which a part cannot know (NumPy, C++, torch.func, as_subclass)"
_WAY = "use torch's operators, or do it outside of the network"
_TEXTS = {
    "no fake impl registered": f"an operator of its own {_SHAPES}",
    "no fake impl or Meta kernel": f"an operator of its own {_SHAPES}",
    ".numpy() is not supported": f"{_OUTSIDE}; {_WAY}",
    "Cannot access data pointer": f"{_OUTSIDE}; {_WAY}",
    "FakeTensor.__format__": f"a tensor's value is written into a text; {_WAY}",
}


def reason(error: BaseException, network: nn.Module) -> str:
    """The refusal's sentence for what a capture raised."""
    return f"{_where(error, network)}: {_why(error)}"


def _why(error: BaseException) -> str:
    kind, text, operator = type(error).__name__, str(error), getattr(error, "func", None)
    kinds = {
        "GuardOnDataDependentSymNode": f"a branch, an index or a size {_DATA}",
        "DataDependentOutputException": f"the result of {operator} {_DATA}",
        "UnsupportedOperatorException": f"the operator {operator} {_SHAPES}",
    }
    known = kinds.get(kind) or _output(error) or next((said for part, said in _TEXTS.items() if part in text), None)
    if known:
        return known
    if not any(map(theirs, (frame.f_code.co_filename for frame, _ in _frames(error)))):
        return f"torch.export fails on it at this shape, in code of torch's own ({kind}: {_first_line(text)})"[:400]
    return f"cannot be captured at this shape: {kind}: {_first_line(text) or kind}"[:400]


def _output(error: BaseException) -> str | None:
    """The sentence for an output of a kind that torch does not take apart."""
    unknown = re.search(r"Found <class '(.*?)'> in output, which is not a known type", str(error))
    if _last_file(error).endswith("weakref.py"):  # torch 2.11 remembers what is returned
        unknown = re.search(r"unhashable type: '(.*?)'", str(error))
    return unknown and (
        f"the output holds a {unknown[1].rpartition('.')[2]}, which cannot be put together from parts; return "
        "tensors, numbers, texts, lists, tuples, dictionaries or a dataclass "
        "known to torch.export.register_dataclass"
    )


def _last_file(error: BaseException) -> str:
    return ([frame.f_code.co_filename for frame, _ in _frames(error)] or [""])[-1]


def theirs(file: str) -> bool:
    """Whether a file is neither torch's, nor Python's, nor this package's."""
    own = file.startswith(_PYTHON) and "site-packages" not in file
    ours = any(part in file for part in ("/torch/", "monai_memeff/halo", "monai_memeff/memory/dry"))
    return not own and not ours and not file.startswith("<")


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else ""


def _frames(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _where(error: BaseException, network: nn.Module) -> Where:
    """The innermost module of the network and the innermost line that is not torch's own."""
    paths = {id(module): (path, type(module).__name__) for path, module in network.named_modules()}
    path, kind, line = "", type(network).__name__, ""
    for frame, number in _frames(error):
        name = frame.f_code.co_filename
        path, kind = paths.get(id(frame.f_locals.get("self")), (path, kind))
        if theirs(name):
            line = f"{name}:{number}"
    return Where(path, kind, line)


def place_of_frame(frame: types.FrameType | None, network: nn.Module) -> Where:
    """The innermost module and the innermost line of somebody else's code that led to a frame."""
    paths = {id(module): (path, type(module).__name__) for path, module in network.named_modules()}
    line: str = ""
    found: tuple[str, str] | None = None
    while frame is not None and (found is None or not line):
        file = frame.f_code.co_filename
        line = line or (f"{file}:{frame.f_lineno}" if theirs(file) and "monai_memeff/memory" not in file else "")
        found = found or paths.get(id(frame.f_locals.get("self")))
        frame = frame.f_back
    path, kind = found or ("", type(network).__name__)
    return Where(path, kind, line)


def check_constants(exported: Any, where: Any) -> None:
    """Refuse a capture that took a tensor made from the input for a constant, as torch.func.grad makes it (2.14).

    Args:
        exported: the result of `torch.export.export`.
        where: the function that tells a node's place.

    Raises:
        NotPartitionableError: with the place of the first reader.
    """
    names = getattr(exported.graph_signature, "inputs_to_lifted_tensor_constants", {})
    for node in exported.graph.nodes:
        constant = exported.constants.get(names.get(node.name)) if node.op == "placeholder" else None
        if isinstance(constant, FakeTensor) or (
            isinstance(constant, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(constant)
        ):
            place = _place_of_reader(exported, node, where)
            raise NotPartitionableError(f"{place}: {_OUTSIDE}; {_WAY}")


def _place_of_reader(exported: Any, node: Any, where: Any) -> Where:
    """Where a value is read first; what torch.func wraps knows no line, but what it runs inside does."""
    place: Where = where(next(iter(node.users), node))
    graphs = [module.graph for module in exported.graph_module.modules() if hasattr(module, "graph")]
    inner = (where(n) for graph in graphs for n in graph.nodes if n.op == "call_function")
    return next((w for w in inner if w.module == place.module and w.line), place)
