"""Weights that the other measurements pass over, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.measure.findings import Row, common, finding
from parasym.measure.units import CARRY, Finder, Layer, op_name
from parasym.symmetry.dictionary import Entry
from parasym.symmetry.spaces import Spaces

KIND = "not measured"


def unmeasured_rows(graph: Graph, spaces: Spaces, layers: Iterable[Layer], linear: Iterable[Entry]) -> list[Row]:
    """Matrices whose units or factors are neither units of a layer nor part of a linear family, although something is made of them.

    Args:
        layers: all units between contractions.
        linear: families and pairs of factors.
    """
    finder = Finder(graph, spaces)
    known = {p for layer in layers for p in layer.parameters} | {p for e in linear for p in e.parameters}
    why: dict[str, str] = {}
    for n in graph.parameter_ops():
        reader = finder.readers.get(n.name)
        if reader is not None:
            reason = "what it writes is mixed with other activations before the next contraction reads it" if _bends(finder, n) else ""
        else:
            reason = _reason(graph, finder, n)
        for name in graph.parameters_of(n):
            if reason and name not in known and sum(size > 1 for size in graph.params[name].shape) > 1:
                why.setdefault(name, reason)
    rows = []
    for reason in dict.fromkeys(why.values()):
        by_module: dict[str, list[str]] = {}
        for name in (n for n, r in why.items() if r == reason):
            by_module.setdefault(common([name]), []).append(name)
        rows += [
            finding(KIND, where, [], len(names), None, 0, f"not measured, because {reason}", names) for where, names in by_module.items()
        ]
    return rows


def _reason(graph: Graph, finder: Finder, n: Node) -> str:
    """Why an operator is no contraction of an activation with a parameter; empty where its parameter holds no units."""
    name = op_name(n)
    if finder.sort.get(n.name) is not None or name in CARRY or name in ("add", "sub", "mul", "div"):
        return ""  # positions added, gains multiplied
    held = [a for a in n.all_input_nodes if graph.kind.get(a.name) == "param"]
    if n.target is torch.ops.aten.embedding.default and held and held[0].name in graph.holders:
        return ""  # a table
    if name.startswith("conv") and any(a.name in graph.holders for a in held):
        return "its channels lie in groups"
    if name in ("linear", "mm", "addmm", "matmul") or name.startswith("conv"):
        return "the weight in use is computed from these parameters"
    if name.startswith("index") or "grouped_mm" in name:
        return "each sample is read by the parts of it that are picked for it (experts)"
    return f"{name} is no single contraction of an activation with a matrix"


def _bends(finder: Finder, n: Node) -> bool:
    """Something non-linear acts on what a contraction writes, entry by entry, before another contraction."""
    seen, stack = set[str](), [n]
    while stack:
        for u in finder.users(stack.pop()):
            if u.name in seen or u.name in finder.readers:
                continue
            seen.add(u.name)
            if finder.sort[u.name] == "bent":
                return True
            if finder.sort[u.name] == "affine" or op_name(u) in CARRY:
                stack.append(u)
    return False
