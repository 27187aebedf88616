"""What stands around each parameter operator that contracts an axis: the gain and shift before it, the bias after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from parasym.core.graph import Graph

aten = torch.ops.aten
_MOVES = {
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.to.dtype,
    aten.dropout.default,
    aten.detach.default,
    aten.t.default,
    aten.unflatten.int,
    aten.expand.default,
    aten._unsafe_view.default,
    aten.repeat_interleave.self_int,
}
_MULTIPLY: set[Any] = {aten.mul.Tensor}
_ADD: set[Any] = {aten.add.Tensor}


@dataclass(frozen=True)
class Reader:
    """A product of an activation with a weight, and its surroundings.

    Attributes:
        node: the product.
        weight: canonical name; in_axis is contracted, out_axis is new.
        gain, offset: vectors multiplied and added right before (a norm's gain and bias), or None.
        bias: vector added right after, or None.
    """

    node: str
    weight: str
    in_axis: int
    out_axis: int
    gain: str | None
    offset: str | None
    bias: str | None


def readers(graph: Graph, stacked: bool = False) -> list[Reader]:
    """All products whose weight is a parameter, possibly transposed; with ``stacked`` also products of slices of a parameter, one
    for each sample, such as the expert picked for a token."""
    out = []
    for n in graph.nodes:
        found = _product(graph, n) if graph.kind.get(n.name) == "active" else None
        if stacked and found is None and n.target is aten.bmm.default:
            found = _slices(graph, n.args[0], n.args[1], [1, 2]) or _slices(graph, n.args[1], n.args[0], [2, 1])
        if found is None:
            continue
        x, weight, in_axis, out_axis = found
        gain, offset = _before(graph, x)
        out.append(Reader(n.name, weight, in_axis, out_axis, gain, offset, _after(graph, n)))
    return out


def _raw(graph: Graph, n: Node, axes: list[int]) -> tuple[str, list[int]] | None:
    """The raw parameter behind a chain of transpositions, with the axes followed back."""
    while n.name not in graph.holders:
        if n.target in (aten.t.default, aten.numpy_T.default):
            rank = len(n.meta["val"].shape)
            axes = [rank - 1 - a for a in axes]
        elif n.target is aten.transpose.int:
            rank = len(n.meta["val"].shape)
            i, j = int(n.args[1]) % rank, int(n.args[2]) % rank  # type: ignore[arg-type]
            axes = [j if a == i else i if a == j else a for a in axes]
        elif n.target is aten.permute.default:
            order = [int(d) % len(n.args[1]) for d in n.args[1]]  # type: ignore[union-attr, arg-type]
            axes = [order[a] for a in axes]
        elif n.target is aten.index.Tensor:  # whole slices of the parameter, one picked for each sample
            if n.args[1][0] is None or len(n.args[1]) > 1 or len(n.args[1][0].meta["val"].shape) != 1:  # type: ignore[index, arg-type, union-attr]
                return None
        elif n.target not in (aten.alias.default, aten.clone.default, aten.to.dtype, aten.detach.default):
            return None
        if not isinstance(n.args[0], Node):
            return None
        n = n.args[0]
    return graph.holders[n.name], axes


def _product(graph: Graph, n: Node) -> tuple[Node, str, int, int] | None:
    kind = graph.kind
    name = str(n.target)
    if n.target is aten.linear.default:
        x, w, axes = n.args[0], n.args[1], [1, 0]
    elif n.target in (aten.mm.default, aten.matmul.default):
        x, w = n.args[0], n.args[1]
        if not (isinstance(w, Node) and kind.get(w.name) == "param") or len(w.meta["val"].shape) != 2:
            return None
        axes = [0, 1]
    elif name.startswith("aten.conv"):
        x, w = n.args[0], n.args[1]
        transposed = "transpose" in name or (name.startswith("aten.convolution") and bool(n.args[6]))
        groups_at = {"aten.convolution.default": 8}.get(str(name), 7 if "transpose" in name else 6)
        if "transpose" in name:
            groups_at = 6
        groups = n.args[groups_at] if len(n.args) > groups_at else n.kwargs.get("groups", 1)
        if groups != 1:
            return None
        axes = [0, 1] if transposed else [1, 0]
    else:
        return None
    if not isinstance(x, Node) or not isinstance(w, Node) or kind.get(w.name) != "param":
        return None
    raw = _raw(graph, w, axes)
    return (x, raw[0], raw[1][0], raw[1][1]) if raw is not None else None


def _slices(graph: Graph, x: Any, w: Any, axes: list[int]) -> tuple[Node, str, int, int] | None:
    raw = _raw(graph, w, axes)
    return (x, raw[0], raw[1][0], raw[1][1]) if raw is not None else None


def _skip(n: Node) -> Node:
    while n.op == "call_function" and n.target in _MOVES and isinstance(n.args[0], Node):
        n = n.args[0]
    return n


def _vector(graph: Graph, n: Node, targets: set[Any]) -> tuple[str, Node] | None:
    """For an addition or product of an activation with a raw vector parameter: (parameter, activation)."""
    if n.op != "call_function" or n.target not in targets or len(n.all_input_nodes) != 2:
        return None
    a, b = n.args[0], n.args[1]
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None
    for p, x in ((b, a), (a, b)):
        if graph.kind.get(p.name) == "param" and graph.kind.get(x.name) in ("active", "data"):
            q = p
            while q.op == "call_function" and q.target in _MOVES and isinstance(q.args[0], Node):
                q = q.args[0]
            if (
                q.name in graph.holders
                and max(graph.params[graph.holders[q.name]].shape, default=1) == graph.params[graph.holders[q.name]].numel()
            ):
                return graph.holders[q.name], x
    return None


def _before(graph: Graph, x: Node) -> tuple[str | None, str | None]:
    n, offset = _skip(x), None
    if n.target is aten.mean.dim:  # an average of affine images is the affine image of an average
        n = _skip(n.args[0])  # type: ignore[arg-type]
    added = _vector(graph, n, _ADD)
    if added is not None:
        offset, n = added[0], _skip(added[1])
    multiplied = _vector(graph, n, _MULTIPLY)
    return (multiplied[0] if multiplied else None), offset


def _after(graph: Graph, n: Node) -> str | None:
    while True:
        if len(n.users) != 1:
            return None
        n = next(iter(n.users))
        found = _vector(graph, n, _ADD)
        if found is not None:
            return found[0]
        if n.target not in _MOVES:
            return None


@dataclass(frozen=True)
class Frozen:
    """A norm with frozen statistics: y = gain * scale * (x - mean) + offset.

    Attributes:
        gain, offset: parameters; mean, scale: graph nodes of the constants.
    """

    gain: str
    offset: str
    mean: str
    scale: str


def frozen_norms(graph: Graph) -> list[Frozen]:
    """Norms in evaluation mode."""
    out = []
    for n in graph.parameter_ops():
        added = _vector(graph, n, _ADD)
        multiplied = _vector(graph, added[1], _MULTIPLY) if added else None
        if added is None or multiplied is None:
            continue
        scaled = _constant(graph, multiplied[1], aten.mul.Tensor)
        centred = _constant(graph, scaled[0], aten.sub.Tensor) if scaled else None
        if scaled and centred:
            out.append(Frozen(multiplied[0], added[0], centred[1].name, scaled[1].name))
    return out


def _constant(graph: Graph, n: Node, target: object) -> tuple[Node, Node] | None:
    if n.target is not target or not all(isinstance(a, Node) for a in n.args[:2]):
        return None
    x, c = n.args[0], n.args[1]
    return (x, c) if graph.kind.get(str(c.name)) == "const" else None  # type: ignore[union-attr, return-value]
