"""Rows of tables and whole parameters that vanish or that nothing reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.core.samples import Batch
from parasym.measure.findings import Row, Thresholds, finding, judged
from parasym.measure.judge import Judge
from parasym.measure.slices import Read, parts


def table_rows(graph: Graph, read: Read, judge: Judge | None, batches: Sequence[Batch], t: Thresholds) -> list[Row]:
    """Rows of embeddings that vanish, or that no position of this input shape, or no token of much data, picks."""
    rows = []
    picks: dict[str, list[Node]] = {}
    for n in graph.nodes:
        if n.target is torch.ops.aten.embedding.default:
            held, index = n.args[:2]
            if isinstance(held, Node) and isinstance(index, Node) and held.name in graph.holders:
                picks.setdefault(graph.holders[held.name], []).append(index)
    for name, indices in picks.items():
        size, width = read(name).shape
        norms = torch.zeros(size, dtype=torch.float64)
        for part, _, which in parts(read(name), 0, torch.arange(size)[None]):
            norms[which] += part.to(torch.float64).square().sum((0, 1))
        norms = norms.sqrt()
        share = norms / norms.median().clamp(min=1e-300)
        zero = (share <= t.zero).nonzero().flatten().tolist()
        where = name.rpartition(".")[0]
        if zero and bool((norms > 0).any()):
            row = finding(
                "dead",
                where,
                zero,
                size,
                share[zero].tolist(),
                len(zero) * width,
                f"rows below {t.zero:g} of the median norm",
                [name],
            )
            rows.append(row if judge is None else _zeroed(row, name, zero, judge))
        if judge is None:
            continue
        used, tokens, fixed = _used(graph, indices, batches, size)
        idle = [j for j in (~used).nonzero().flatten().tolist() if j not in set(zero)]
        if idle and (fixed or tokens >= 5 * size):
            why = (
                "inputs of this shape and form never pick them; longer or other ones may"
                if fixed
                else f"none of {tokens} tokens of the given data picks them; other data may"
            )
            row = finding("unused", where, idle, size, None, 0, f"rows never read: {why}", [name])
            rows.append({**_zeroed(row, name, idle, judge), "removable": False})
    return rows


def _zeroed(row: Row, name: str, units: Sequence[int], judge: Judge) -> Row:
    return judged(row, judge.digits({name: judge.params[name].index_fill(0, torch.tensor(units), 0.0)}), "rows zeroed")


def _used(graph: Graph, indices: Sequence[Node], batches: Sequence[Batch], size: int) -> tuple[Tensor, int, bool]:
    """Which rows are picked, by how many tokens, and whether that is fixed by the input's shape."""
    used, tokens, fixed = torch.zeros(size, dtype=torch.bool), 0, True
    for batch in batches:
        env = graph.prepare(batch)
        for i in indices:
            if i.name not in env:
                return torch.ones(size, dtype=torch.bool), 0, False
            fixed &= graph.kind.get(i.name) == "const"
            used[env[i.name].reshape(-1).long()] = True
            tokens += env[i.name].numel()
        if fixed:
            break
    return used, tokens, fixed


def dead_parameter_rows(graph: Graph, judge: Judge) -> list[Row]:
    """Parameters that no output depends on, by module."""
    groups: dict[str, list[str]] = {}
    for name in graph.dead:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    rows = []
    for where, names in groups.items():
        count = sum(judge.params[n].numel() for n in names)
        row = finding(
            "dead",
            where,
            range(len(names)),
            len(names),
            None,
            count,
            f"no output depends on {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}",
            names,
        )
        rows.append(judged({**row, "units": []}, judge.digits({n: torch.zeros_like(judge.params[n]) for n in names}), "tensors zeroed"))
    return rows
