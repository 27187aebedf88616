"""Channels that a vanishing gain, or a vanishing running variance before it, makes constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.measure.findings import EXACT, Row, Thresholds, exact_first, finding, judged
from parasym.measure.judge import Judge
from parasym.measure.layers import fold
from parasym.measure.units import CARRY, Finder, Use, columns, op_name
from parasym.symmetry.spaces import Spaces
from parasym.symmetry.symmetry import Params


def norm_rows(graph: Graph, params: Params, spaces: Spaces, judge: Judge, t: Thresholds) -> list[Row]:
    """Channels that a vanishing gain, or a vanishing running variance before it, makes constant."""
    finder = Finder(graph, spaces)
    rows = []
    for n in finder.nodes:
        gain = _gain(graph, n)
        if gain is None or not finder.active(n):
            continue
        g = params[gain].reshape(-1)
        sized = g.abs() / g.abs().median().clamp(min=1e-300)
        silent = (sized <= t.norm).nonzero().flatten().tolist()
        variance = _variance(graph, n)
        relative = None if variance is None else (variance / variance.median().clamp(min=1e-300)).clamp(min=0).sqrt()
        frozen = [] if relative is None else [j for j in (relative <= t.norm).nonzero().flatten().tolist() if j not in silent]
        end = n
        users = finder.users(n)
        offset = (
            graph.parameters_of(users[0])
            if len(users) == 1 and finder.sort[users[0].name] == "affine" and len(finder.active(users[0])) == 1
            else []
        )
        if len(offset) == 1 and params[offset[0]].numel() == len(g):
            end = users[0]
        for found, distance, why in ((silent, sized, "gain"), (frozen, relative, "running standard deviation")):
            if distance is None or len(found) > len(g) // 2:
                continue
            for units in exact_first(found, distance):
                note = f"{why} below {t.norm:g} of the median: the channel carries only its shift"
                row = finding(
                    "norm-dead", gain.rpartition(".")[0], units, len(g), distance[units].tolist(), 0, note, [gain, *offset], _node=end.name
                )
                rows.append(_silence(finder, graph, params, judge, row, gain, end, units))
    return rows


def _silence(finder: Finder, graph: Graph, params: Params, judge: Judge, row: Row, gain: str, end: Node, units: Sequence[int]) -> Row:
    """Zero gains, and fold the constant channel into those who read it."""
    g = params[gain].clone()
    g.reshape(-1)[units] = 0
    reached, leaks = finder.reached(end, set())
    uses, size = [], len(g.reshape(-1))
    axis = next(
        (
            a
            for a in range(end.meta["val"].dim())
            if end.meta["val"].shape[a] == size
            and columns(finder.spaces, finder.blocks(end, a) or (), gain, _long(params[gain])) is not None
        ),
        None,
    )
    if axis is not None and not leaks:
        for r, operand in reached:
            at = columns(finder.spaces, finder.blocks(end, axis) or (), r.weight, r.in_axis)
            if at is not None and len(at) == size:
                uses.append(Use(r, operand, at))
    changed: dict[str, Tensor] = {gain: g}
    row["parameters_lost"] = len(units)
    if uses and len(uses) == len(reached):
        each = sum(u.owned(params) for u in uses)
        figures = judge.digits({**changed, **fold(uses, units, params, judge)})
        if min(figures) >= min(EXACT, min(judge.digits(changed))):
            row["parameters_lost"] = len(units) * (each + len(row["parameters"]))
            return judged(row, figures, "gain and out-weights zeroed, the constant folded")
    return judged(row, judge.digits(changed), "gain set to zero")


def _long(p: Tensor) -> int:
    return max(range(p.dim()), key=lambda a: p.shape[a]) if p.dim() else 0


def _gain(graph: Graph, n: Node) -> str | None:
    """The vector parameter that multiplies an activation, or None."""
    if n.target is not torch.ops.aten.mul.Tensor or graph.kind.get(n.name) != "active":
        return None
    names = graph.parameters_of(n)
    if len(names) != 1 or graph.params[names[0]].numel() < 2:
        return None
    p = graph.params[names[0]]
    held = [a for a in n.all_input_nodes if graph.kind.get(a.name) == "param"]
    while len(held) == 1 and op_name(held[0]) in CARRY and held[0].all_input_nodes:
        held = held[0].all_input_nodes
    return names[0] if max(p.shape) == p.numel() and len(held) == 1 and held[0].name in graph.holders else None


def _variance(graph: Graph, n: Node) -> Tensor | None:
    """Running variance used right before a gain."""
    stack, seen = [a for a in n.all_input_nodes if graph.kind.get(a.name) == "active"], 0
    while stack and seen < 4:
        a, seen = stack.pop(), seen + 1
        for c in a.all_input_nodes:
            while c.op == "call_function" and graph.kind.get(c.name) == "const" and c.all_input_nodes:
                c = c.all_input_nodes[0]
            if c.op == "placeholder" and c.name in graph.buffers and c.name.endswith("running_var"):
                return graph.buffers[c.name].reshape(-1).to(torch.float64)
        if a.target is torch.ops.aten.mul.Tensor:
            stack.extend(b for b in a.all_input_nodes if graph.kind.get(b.name) == "active")
    return None
