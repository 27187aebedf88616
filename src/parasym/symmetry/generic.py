"""Parameters in general position for a graph whose own are unknown: signals keep their size, and no unit is dead by accident.

A dead or always-on unit has symmetries of its own, which say nothing about the architecture. Weights are drawn by what the
operators do with them, and of a few draws the one is kept in which most units of a kinked activation are seen on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph, weight_norm
from parasym.core.samples import draw
from parasym.symmetry.spaces import Spaces, _arguments, _name

_KINKED = ("relu", "leaky_relu", "prelu", "relu6", "hardtanh", "threshold", "abs", "clamp", "clamp_min", "hardswish", "hardsigmoid")
_DRAWS, _BATCHES, _SEEN = 24, 6, 0.2


def generic_draw(graph: Graph, spaces: Spaces, data: Sequence[Tensor], seed: int = 3) -> dict[str, Tensor]:
    """The liveliest of a few draws of all parameters.

    Args:
        graph: its parameters give names and shapes only.
        spaces: its index spaces.
        data: example inputs; more are drawn like them.
    """
    roles = _roles(graph)
    generator = torch.Generator().manual_seed(seed)
    batches = [list(data), *(draw(graph, list(data), generator) for _ in range(_BATCHES - 1))]
    units = _units(graph, spaces)
    best: tuple[float, dict[str, Tensor]] | None = None
    for _ in range(_DRAWS):
        params = {n: _values(p, roles.get(n, "shift"), generator) for n, p in graph.params.items()}
        asleep = _asleep(graph, params, batches, units) if units else 0.0
        if best is None or asleep < best[0]:
            best = asleep, params
        if asleep == 0:
            break
    assert best is not None
    return best[1]


def _values(p: Tensor, role: str, generator: torch.Generator) -> Tensor:
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    kind, _, fan = role.partition(":")
    if kind == "weight":
        return 1.4 / math.sqrt(max(1, int(fan))) * noise
    if kind == "gain":
        return 1 + 0.3 * noise
    if kind == "slope":
        return 0.1 + 0.5 * torch.rand(p.shape, generator=generator, dtype=torch.float64)
    return (0.7 if kind == "table" else 0.3) * noise


def _roles(graph: Graph) -> dict[str, str]:
    """Parameter -> "weight:fan-in", "gain", "slope", "table" or "shift", by the first operator that says."""
    out: dict[str, str] = {}
    for holder in graph.nodes:
        if holder.name not in graph.holders or graph.holders[holder.name] in out:
            continue
        found = [role for user, via in _readers(graph, holder) if (role := _role(user, via)) is not None]
        if found:
            out[graph.holders[holder.name]] = min(found, key=lambda r: not r.startswith("weight"))
    return out


def _readers(graph: Graph, holder: Node) -> list[tuple[Node, Node]]:
    """Operators that meet data, and the node through which a parameter reaches them."""
    out, stack, seen = [], [holder], {holder.name}
    while stack:
        n = stack.pop()
        for u in n.users:
            if u.op == "output" or u.name in seen:
                continue
            if graph.kind.get(u.name) == "param" and u.target is not weight_norm:
                seen.add(u.name)
                stack.append(u)
            else:
                out.append((u, n))
    return out


def _role(user: Node, via: Node) -> str | None:
    name = _name(user)
    shape = list(via.meta["val"].shape) if isinstance(via.meta.get("val"), Tensor) else []
    if name == "weight_norm" and user.args[0] is not via:
        return "gain"
    if name == "linear":
        return f"weight:{shape[-1]}" if shape else None
    if "conv_transpose" in name:
        return f"weight:{shape[0]}"
    if "conv" in name or name == "weight_norm":
        return f"weight:{math.prod(shape[1:])}"
    if name in ("matmul", "mm", "bmm", "mv"):
        return f"weight:{shape[-2] if user.args[1] is via and len(shape) > 1 else shape[-1]}"
    if name in ("einsum", "addmm", "baddbmm"):
        return f"weight:{round(math.sqrt(math.prod(shape)))}"
    if name in ("mul", "div"):
        return "gain"
    if name == "prelu":
        return "slope"
    return "table" if name == "embedding" or len([s for s in shape if s > 1]) > 1 else None


def _units(graph: Graph, spaces: Spaces) -> dict[str, list[int]]:
    """Input of each kinked activation -> its axes that no parameter runs along."""
    held = {a.number for a in spaces.atoms if a.parameters}
    out: dict[str, list[int]] = {}
    for n in graph.nodes:
        if n.op != "call_function" or _name(n) not in _KINKED or graph.kind.get(n.name) != "active":
            continue
        source = next((v for v in _arguments(n).values() if isinstance(v, Node)), None)
        if source is None or source.name not in spaces.axes or isinstance(spaces.axes[source.name][:1], tuple):
            continue
        axes = spaces.axes[source.name]
        blocks = [spaces.blocks(source.name, i) for i in range(len(axes))]
        free = [i for i, found in enumerate(blocks) if i == 0 or not any(a in held for b in found for a in b.atoms)]
        if len(free) < len(axes):
            out[source.name] = free
    return out


def _asleep(graph: Graph, params: Mapping[str, Tensor], batches: Sequence[list[Tensor]], units: Mapping[str, list[int]]) -> float:
    """How far units are from being seen on both sides of zero: the shares missing to ``_SEEN``, summed."""
    on: dict[str, Tensor] = {}
    for data in batches:
        for (name, free), x in zip(units.items(), graph.replay(params, graph.prepare(data), list(units)), strict=True):
            on[name] = on.get(name, torch.zeros(())) + (x > 0).to(torch.float64).mean(free) / len(batches)
    shares = torch.cat([f.reshape(-1) for f in on.values()])
    return float((_SEEN - torch.minimum(shares, 1 - shares)).clamp(min=0).sum())
