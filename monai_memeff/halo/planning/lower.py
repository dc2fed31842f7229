"""From torch.export's graph to a `Program`: every operator result one value, norms and splits taken apart."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.planning.program import Program, Ref, Value, Where
from monai_memeff.halo.planning.rules.table import EXPANDERS, Expansion


def _user_line(trace: str | None) -> str:
    """The innermost frame of a stack trace that is not torch's own, as file:line."""
    found = ""
    for text in (trace or "").splitlines():
        text = text.strip()
        if text.startswith('File "') and "/torch/" not in text and "halo/planning/state/aside.py" not in text:
            name, line = text[6:].split('"', 1)
            found = f"{name}:{line.split('line ')[1].split(',')[0]}"
    return found


def place_of(node: fx.Node) -> Where:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return Where(str(path), kind.rsplit(".", 1)[-1], _user_line(node.meta.get("stack_trace")))


def _named_state(network: nn.Module) -> dict[str, torch.Tensor]:
    found = dict(network.named_parameters(remove_duplicate=False))
    found.update(network.named_buffers(remove_duplicate=False))
    return found


class _Lowering:
    def __init__(self, exported: Any, network: nn.Module, flat: list[Any]) -> None:
        self.exported, self.signature = exported, exported.graph_signature
        self.state = _named_state(network)
        self.flat, self.program = flat, Program()
        self.made: dict[fx.Node, Any] = {}  # node -> Ref, or a list of Refs for several results

    def run(self) -> Program:
        user = self._placeholders()
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self.call(node)
            elif node.op == "get_attr":
                reader = next(iter(node.users), node)
                raise NotPartitionableError(
                    f"{place_of(reader)}: torch's {reader.target} runs code of its own, which cannot be run in parts; "
                    "write it with torch.where or a Python loop"
                )
        self.outputs(user)
        return self.program

    def _placeholders(self) -> list[str]:
        names = {**self.signature.inputs_to_parameters, **self.signature.inputs_to_buffers}
        constants = getattr(self.signature, "inputs_to_lifted_tensor_constants", {})
        user, position = [], 0
        for node in self.exported.graph.nodes:
            if node.op != "placeholder":
                continue
            value = node.meta.get("val")
            if node.name in names or node.name in constants:
                self.made[node] = self._state(node, names.get(node.name), constants.get(node.name))
                continue
            user.append(node.name)
            if position >= len(self.flat):
                raise NotPartitionableError(
                    f"{node.name}: the capture has an input that is not an argument, such as a torch.Generator"
                )
            if isinstance(value, torch.Tensor):
                ref = self.program.add(Value(node.name, tuple(value.shape), value.dtype, dependent=True))
                self.program.inputs[position] = ref.index
                self.made[node] = ref
            else:
                self.made[node] = self.flat[position] if position < len(self.flat) else value
            position += 1
        return user

    def _state(self, node: fx.Node, name: str | None, constant: str | None) -> Ref:
        value = node.meta["val"]
        ref = self.program.add(Value(node.name, tuple(value.shape), value.dtype))
        if name is None or name not in self.state:
            key = name or str(constant)
            store = self.exported.state_dict if name is not None else self.exported.constants
            self.program.constants[node.name] = store[key].detach()
            name = node.name
        self.program.state[ref.index] = name
        return ref

    def _args(self, tree: Any) -> Any:
        def leaf(x: Any) -> Any:
            if not isinstance(x, fx.Node):
                return x
            return self.made[x]

        # immutable_list and immutable_dict of fx become plain ones
        if isinstance(tree, (list, tuple)):
            kind = tuple if isinstance(tree, tuple) else list
            return kind(self._args(x) for x in tree)
        if isinstance(tree, dict):
            return {k: self._args(v) for k, v in tree.items()}
        return leaf(tree)

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source = self.made[node.args[0]]
            self.made[node] = source[node.args[1]]
            return
        args, kwargs = self._args(node.args), self._args(node.kwargs)
        values = node.meta.get("val")
        where = place_of(node)
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            if values is None or not isinstance(values, (torch.Tensor, list, tuple)):
                self._scalar(node, where)
                return
            raise NotPartitionableError(f"{where}: {getattr(target, '__name__', target)} cannot be run in parts")
        if isinstance(values, torch.Tensor):
            self.made[node] = self._emit(node, target, args, kwargs, None, values, where)
        elif isinstance(values, (list, tuple)):
            used = {n.args[1] for n in node.users if n.target is operator.getitem}
            self.made[node] = [
                self._emit(node, target, args, kwargs, i, v, where) if i in used else None for i, v in enumerate(values)
            ]
        elif values is None:
            if node.users or not _harmless(target):
                raise NotPartitionableError(f"{where}: {target} has a side effect and cannot be run in parts")
        else:
            self._scalar(node, where)

    def _scalar(self, node: fx.Node, where: Where) -> None:
        raise NotPartitionableError(
            f"{where}: {node.target} gives a number that depends on the data, and is not known before the run; keep it "
            "a tensor (torch.where chooses by value)"
        )

    def _emit(
        self, node: fx.Node, target: Any, args: Any, kwargs: Any, pick: int | None, value: torch.Tensor, where: Where
    ) -> Ref:
        if getattr(target, "overloadpacket", None) is torch.ops.aten.unfold_backward:
            # what torch makes of a write into the view: it adds where windows overlap, and drops what none covers
            raise NotPartitionableError(f"{where}: a write into the windows of unfold cannot be captured; write a copy")
        if getattr(target, "overloadpacket", None) in _BY_MEMORY:
            _check_memory(node, args, where)
        name = node.name if pick is None else f"{node.name}_{pick}"
        if not all(isinstance(n, int) for n in value.shape):
            raise NotPartitionableError(
                f"{where}: {target} has a result whose size depends on the data; multiply by a mask instead of choosing"
            )
        if value.layout != torch.strided:
            raise NotPartitionableError(f"{where}: {target} gives a tensor that is sparse; use a dense one")
        made = Value(name, tuple(int(n) for n in value.shape), value.dtype, target, args, kwargs, pick, where)
        made.dependent = any(self.program[i].dependent for i in made.refs())
        expander = EXPANDERS.get(target)
        if expander is not None:
            result = expander(Expansion(self.program, made))
            if result is not None:
                return result
        return self.program.add(made)

    def outputs(self, user: list[str]) -> None:
        (result,) = next(n for n in self.exported.graph.nodes if n.op == "output").args
        mutated_inputs = getattr(self.signature, "user_inputs_to_mutate", {})
        for spec, leaf in zip(self.signature.output_specs, result, strict=True):
            ref = self._args(leaf)
            kind = spec.kind.name
            if kind == "BUFFER_MUTATION":
                self.program.mutations[spec.target] = ref.index
            elif kind == "USER_INPUT_MUTATION":
                name = mutated_inputs[leaf.name]
                self.program.input_mutations[user.index(name)] = ref.index
            elif kind == "USER_OUTPUT":
                self.program.outputs.append(ref)
            elif kind == "PARAMETER_MUTATION":
                raise NotPartitionableError(
                    f"{place_of(leaf)}: forward writes into the parameter '{spec.target}', which a run in parts "
                    "leaves as it is; write it before or after the call, or register a buffer"
                )
            else:
                raise NotPartitionableError(f"{place_of(leaf)}: an output of kind {kind} cannot be run in parts")
        self.program.output_spec = self.exported.call_spec.out_spec


_BY_MEMORY = (torch.ops.aten.as_strided, torch.ops.aten.as_strided_copy, torch.ops.aten.as_strided_scatter)


def _check_memory(node: fx.Node, args: Any, where: Where) -> None:
    """Refuse what reads memory by strides, unless it stays within a plain tensor's own elements."""
    source = node.args[0].meta["val"]
    size, stride, offset = args[-3:] if isinstance(args[-1], int) else (*args[-2:], 0)
    reach = 1 + (offset or 0) + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if not source.is_contiguous() or source.storage_offset() or reach > source.numel():
        raise NotPartitionableError(f"{where}: {node.target} reads memory by strides, which parts do not have")


def _harmless(target: Any) -> bool:
    """Whether an operator without a result only looks at shapes and types, which are those of the capture."""
    return "_assert_tensor_metadata" in str(target) or "sym_constrain" in str(target)


def lower(exported: Any, network: nn.Module, flat: list[Any]) -> Program:
    """Turn an exported program into a `Program`.

    Args:
        exported: The result of `torch.export.export(...).run_decompositions({})`.
        network: the module whose parameters and buffers are referred to by name.
        flat: leaves of the call's arguments.

    Raises:
        NotPartitionableError: for side effects and numbers that depend on the data.
    """
    return _Lowering(exported, network, flat).run()
