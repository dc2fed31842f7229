"""Buffers that a network has under several names, as a decoder that holds its encoder gives it."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind


def drop_second_names(exported: ExportedProgram) -> None:
    """Take the buffers that nothing reads out of a captured graph, in place; it reads every buffer by one name.

    Torch's decomposition fails where a buffer that is written to, as a batch norm's mean, comes in a second time.
    """
    specs, graph = exported.graph_signature.input_specs, exported.graph_module.graph
    for node, spec in list(zip(graph.find_nodes(op="placeholder"), specs, strict=True)):
        if spec.kind is InputKind.BUFFER and not node.users:
            graph.erase_node(node)
            specs.remove(spec)
    exported.graph_module.recompile()
