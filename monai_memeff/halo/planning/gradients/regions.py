"""Code under `torch.no_grad()` in a captured graph, written with `detach`, which the operators' rules keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

_REGION = "wrap_with_set_grad_enabled"  # torch.export's name for it; read in torch 2.6 to 2.14
_STATE = (InputKind.BUFFER, InputKind.CONSTANT_TENSOR)  # need no gradient


def spell_out_regions(exported: ExportedProgram) -> None:
    """Take regions of code without gradients out of their wrappers, in place; what they read is detached.

    `torch.export`'s decomposition takes them out too, but drops that they had no gradients, and every `detach_`.
    """
    module = exported.graph_module
    specs = exported.graph_signature.input_specs
    pairs = zip(module.graph.find_nodes(op="placeholder"), specs, strict=True)
    _spell_out(module, {node for node, spec in pairs if spec.kind in _STATE})


def _spell_out(module: fx.GraphModule, state: set[fx.Node]) -> None:
    for node in list(module.graph.nodes):
        for inner in _inner(module, node):
            operands = node.args[-len(inner.graph.find_nodes(op="placeholder")) :] if node.args else ()
            pairs = zip(inner.graph.find_nodes(op="placeholder"), operands, strict=False)
            _spell_out(inner, {place for place, given in pairs if given in state})
        if getattr(node.target, "__name__", "") == _REGION and node.op == "call_function":
            _inline(module, node, state)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        _out_of_place(module.graph, node)
    module.graph.lint()
    module.recompile()


def _inner(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    used = [arg for arg in node.all_input_nodes if arg.op == "get_attr"] if node.op == "call_function" else []
    found = [getattr(module, str(arg.target), None) for arg in used]
    return [inner for inner in found if isinstance(inner, fx.GraphModule)]


def _inline(module: fx.GraphModule, region: fx.Node, state: set[fx.Node]) -> None:
    enabled, wrapped, *operands = region.args
    assert isinstance(wrapped, fx.Node)
    inner, made = getattr(module, str(wrapped.target)), dict[fx.Node, Any]()
    with module.graph.inserting_before(region):
        for place, given in zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True):
            free = enabled or given in state or not _floating(given)
            made[place] = given if free else _detached(module.graph, given, place)
        for node in inner.graph.nodes:
            if node.op == "get_attr":
                made[node] = _moved(module, inner, node)
            elif node.op not in ("placeholder", "output"):
                made[node] = module.graph.node_copy(node, made.__getitem__)
    (results,) = next(iter(reversed(inner.graph.nodes))).args
    for user in list(region.users):
        user.replace_all_uses_with(made[results[user.args[1]]])
        module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not wrapped.users:
        module.graph.erase_node(wrapped)
        delattr(module, str(wrapped.target))


def _out_of_place(graph: fx.Graph, node: fx.Node) -> None:
    """`detach_` as `detach`: the decomposition drops it."""
    node.target, source = torch.ops.aten.detach.default, node.args[0]
    assert isinstance(source, fx.Node)
    source.replace_all_uses_with(node, lambda user: user > node)


def _floating(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _detached(graph: fx.Graph, source: fx.Node, place: fx.Node) -> fx.Node:
    node = graph.call_function(torch.ops.aten.detach.default, (source,))
    reader = next(iter(place.users), place)
    node.meta = {k: v for k, v in reader.meta.items() if k in ("nn_module_stack", "stack_trace", "torch_fn")}
    node.meta["val"] = source.meta["val"].detach()
    return node


def _moved(module: fx.GraphModule, inner: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A submodule of a region's, kept by the module around it."""
    name, number = str(node.target), 0
    while hasattr(module, name):
        name, number = f"{node.target}_{number}", number + 1
    setattr(module, name, getattr(inner, str(node.target)))
    return module.graph.get_attr(name)
