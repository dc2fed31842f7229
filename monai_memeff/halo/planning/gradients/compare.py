"""The gradients of a captured graph beside those of the plain network, without computing any: their autograd graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher  # read in torch 2.6 to 2.14
from torch._subclasses.fake_tensor import FakeTensor  # read in torch 2.6 to 2.14
from torch.autograd.function import BackwardCFunction
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.gradients.watch import Watch
from monai_memeff.halo.planning.program import Where
from monai_memeff.memory.dry.known_numbers import tensors_in
from monai_memeff.memory.threads import FakeMode

_OWN = "has a backward of its own, of which a captured network does not know; write it with torch's operators"


def check_gradients(exported: ExportedProgram, watch: Watch, network: nn.Module, flat: list[Any], place: Any) -> None:
    """Refuse a captured graph whose gradients are not those of the plain network.

    Both are run on tensors without memory: the plain network while it was captured, the graph here. Nodes of autograd
    that are the same and lead to the same parameters and arguments compute the same gradients.

    Args:
        exported: what `torch.export.export` gave, with regions spelled out.
        watch: what saw the plain call.
        network: the module.
        flat: leaves of the call's arguments.
        place: the function that tells a node's place.

    Raises:
        NotPartitionableError: with the place of the first difference.
    """
    replay = _Replay(exported, network, flat, place)
    outputs = replay.outputs()
    try:
        _Comparison(watch, replay, place).run(watch.outputs, outputs)
    finally:
        watch.outputs.clear()
        watch.leaves.clear()


class _Replay(fx.Interpreter):
    """Runs a captured graph with gradients enabled, on tensors without memory."""

    def __init__(self, exported: ExportedProgram, network: nn.Module, flat: list[Any], place: Any) -> None:
        super().__init__(exported.graph_module)
        self.extra_traceback = False  # or it writes into the text of a refusal
        self.place, self.leaves = place, dict[int, tuple[torch.Tensor, set[Any]]]()
        self.made, self.kept = dict[int, fx.Node](), list[Any]()
        self.wants: dict[Any, bool] = {k: v.requires_grad for k, v in _named(network)}
        self.wants.update((i, x.requires_grad) for i, x in enumerate(flat) if isinstance(x, torch.Tensor))
        self.given, position = list[Any](), 0
        nodes = exported.graph.find_nodes(op="placeholder")
        for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
            label: Any = spec.target
            if spec.kind is InputKind.USER_INPUT:
                label, position = position, position + 1
            self.given.append(self._leaf(node, label))

    def _leaf(self, node: fx.Node, label: Any) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, FakeTensor):
            return value
        with value.fake_mode:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        made.requires_grad_(self.wants.get(label, False))
        self.leaves[id(made)] = (made, {label})
        return made

    def outputs(self) -> list[Any]:
        """What the graph returns, by the same decompositions as while it was captured."""
        modes = [x.fake_mode for x in self.given if isinstance(x, FakeTensor)]
        with torch.enable_grad(), enable_python_dispatcher(), modes[0] if modes else FakeMode():
            return list(self.run(*self.given))

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, after it is known which node of autograd it made."""
        result = super().run_node(n)
        for x in tensors_in(result):
            if x.grad_fn is not None:
                self.kept.append(x.grad_fn)
                self.made.setdefault(id(x.grad_fn), n)
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            for written in _written(n, self.env):
                self._check_memory(n, written)
        return result

    def _check_memory(self, node: fx.Node, written: torch.Tensor) -> None:
        """Values that are read later and share memory must all have gradients or none: a graph has no memory to tell
        them apart."""
        gone = self.user_to_last_uses.get(node, [])
        later = [x for n, x in self.env.items() if n.users and n not in gone and isinstance(x, torch.Tensor)]
        given = [x for x, _ in self.leaves.values()]
        alike = [x for x in (*later, *given) if _memory(x) == _memory(written)]
        if len({x.requires_grad for x in (written, *alike)}) > 1:
            names = [str(label) for x in alike for label in self.leaves.get(id(x), (x, ()))[1] if label in self.wants]
            what = f"'{names[0]}'" if names else "memory of a tensor that has a gradient"
            raise NotPartitionableError(
                f"{self.place(node)}: forward writes, past autograd, into {what}; write into a copy"
            )


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _named(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _written(node: fx.Node, env: dict[fx.Node, Any]) -> Iterator[torch.Tensor]:
    """Tensors that an operator writes into."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for number, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
            found = env.get(given) if isinstance(given, fx.Node) else None
            if isinstance(found, torch.Tensor):
                yield found


class _Comparison:
    """Walks two autograd graphs in step."""

    def __init__(self, watch: Watch, replay: _Replay, place: Any) -> None:
        self.watch, self.replay, self.place = watch, replay, place
        self.same = dict[int, int]()
        self.kept = list[Any]()

    def run(self, plain: list[Any], captured: list[Any]) -> None:
        """Compare all outputs.

        Raises:
            NotPartitionableError: with the place of the first difference.
        """
        pairs = [(a, b) for a, b in zip(plain, captured, strict=True) if isinstance(a, torch.Tensor)]
        stack = [(*map(_edge, pair), None) for pair in reversed(pairs)]
        while stack:
            mine, theirs, reader = stack.pop()
            if not self._known(mine, theirs, reader):
                assert mine is not None
                nexts = zip(mine.next_functions, theirs.next_functions, strict=True)
                stack += [(a, b, theirs) for (a, _), (b, _) in nexts]

    def _known(self, mine: Any, theirs: Any, reader: Any) -> bool:
        """Whether nothing is left to be looked at behind two nodes that are alike."""
        if theirs is None and self._ends(mine):
            return True
        if mine is None or theirs is None or not self._alike(mine, theirs):
            self._refuse(mine, theirs, reader)
        if id(mine) in self.same:
            if self.same[id(mine)] != id(theirs):
                self._refuse(mine, theirs, reader)
            return True
        self.same[id(mine)] = id(theirs)
        self.kept += [mine, theirs]
        return False

    def _alike(self, mine: Any, theirs: Any) -> bool:
        if isinstance(mine, BackwardCFunction) or mine.name() != theirs.name():
            return False
        if hasattr(mine, "variable"):
            return bool(_labels(mine.variable, self.watch.leaves) & _labels(theirs.variable, self.replay.leaves))
        ways = [[number for _, number in node.next_functions] for node in (mine, theirs)]
        return ways[0] == ways[1]

    def _ends(self, mine: Any) -> bool:
        """Whether gradients reach nothing but tensors that forward made itself and gave one to."""
        stack, seen = [mine], set[int]()
        while stack:
            node = stack.pop()
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            self.kept.append(node)
            variable = getattr(node, "variable", None)
            if variable is not None and (not isinstance(variable, FakeTensor) or _labels(variable, self.watch.leaves)):
                return False
            stack += [following for following, _ in node.next_functions]
        return True

    def _refuse(self, mine: Any, theirs: Any, reader: Any) -> None:
        node = self.replay.made.get(id(theirs)) or self.replay.made.get(id(reader))
        where = self.place(node) if node is not None else Where()
        if isinstance(mine, BackwardCFunction):
            raise NotPartitionableError(f"{where}: {type(mine).__name__.removesuffix('Backward')} {_OWN}")
        names = ["none" if node is None else node.name() for node in (mine, theirs)]
        raise NotPartitionableError(
            f"{where}: gradients take another way in the network than in what is captured of it ({names[0]}, not "
            f"{names[1]}); detach what is to have none, and let forward leave requires_grad as it is"
        )


def _edge(x: torch.Tensor) -> Any:
    if not x.requires_grad:
        return None
    return x.grad_fn if x.grad_fn is not None else torch.autograd.graph.get_gradient_edge(x).node


def _labels(variable: torch.Tensor, leaves: dict[int, tuple[torch.Tensor, set[Any]]]) -> set[Any]:
    known = leaves.get(id(variable))
    return known[1] if known is not None and known[0] is variable else set()
