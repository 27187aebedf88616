"""A picture of the network for reports: parameter operators, what flows between them, and the group of each flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from parasym.core.graph import Graph
from parasym.symmetry.naming import where_of
from parasym.symmetry.spaces import Spaces
from parasym.symmetry.symmetry import Symmetry


def picture(graph: Graph, spaces: Spaces, found: Sequence[Symmetry]) -> dict[str, Any]:
    """Nodes (parameter operators, inputs, outputs) and edges (the activations that run between them)."""
    ops = {n.name: n for n in graph.parameter_ops()}
    nodes: list[dict[str, Any]] = [{"id": name, "label": name, "op": "input", "where": "", "params": []} for name in graph.inputs]
    for name, n in ops.items():
        params = graph.parameters_of(n)
        nodes.append(
            {
                "id": name,
                "label": params[0].split(".")[-1] if params else name,
                "op": str(getattr(n.target, "__name__", n.target)),
                "where": where_of(params),
                "params": params,
            }
        )
    reach: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in graph.inputs}
    edges: list[dict[str, Any]] = []
    group = _groups(found)
    for n in graph.nodes:
        up: set[str] = set()
        for a in n.all_input_nodes:
            up |= {a.name} if a.name in ops else reach.get(a.name, frozenset())
        if n.name not in reach:
            reach[n.name] = frozenset(up)
        if n.name in ops:
            edges += [_edge(graph, ops, u, n.name, group) for u in sorted(up)]
    for o in graph.outputs:
        nodes.append({"id": f"{o}:out", "label": "output", "op": "output", "where": "", "params": []})
        edges += [_edge(graph, ops, u, f"{o}:out", group) for u in sorted({o} if o in ops else reach.get(o, frozenset()))]
    return {"nodes": nodes, "edges": edges}


def _groups(found: Sequence[Symmetry]) -> dict[str, str]:
    """The largest group that moves each parameter."""
    out: dict[str, str] = {}
    for s in sorted(found, key=lambda s: s.dim):
        for p in s.parameters:
            out[p] = s.group
    return out


def _edge(graph: Graph, ops: dict[str, Any], source: str, target: str, group: dict[str, str]) -> dict[str, Any]:
    value = ops[source].meta.get("val") if source in ops else None
    size = int(value.shape[-1 if value.dim() != 4 else 1]) if isinstance(value, Tensor) and value.dim() else 0
    params = graph.parameters_of(ops[source]) if source in ops else []
    return {
        "source": source,
        "target": target,
        "space": str(size) if size else "",
        "size": size,
        "group": next((group[p] for p in params if p in group), ""),
    }
