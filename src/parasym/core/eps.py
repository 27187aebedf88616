"""The same graph without the small numbers that keep norms from dividing by zero.

An eps breaks the scale symmetry of what stands before a norm, by a little: what the graph without it has, the model has
approximately.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from parasym.core.graph import Graph, instance_standardise, standardise

_LARGEST = 1e-2  # no eps is larger
_aten = torch.ops.aten
_POSITION: dict[Any, int] = {
    _aten.layer_norm.default: 4,
    _aten.group_norm.default: 4,
    _aten.rms_norm.default: 3,
    _aten.clamp_min.default: 1,
    standardise: 1,
    instance_standardise: 1,
}
_ROOTS = {_aten.rsqrt.default, _aten.sqrt.default}
_SUMS = {_aten.add.Tensor, _aten.add.Scalar}


def without_eps(graph: Graph) -> Graph | None:
    """A copy of a graph in which every eps of a norm over activations is zero; None where there is none."""
    fx = torch.fx.Graph()
    fx.output(fx.graph_copy(graph.fx, {}))
    changed = False
    for n in fx.nodes:
        if graph.kind.get(n.name) == "active" and (at := _eps_of(n)) is not None:
            n.update_arg(at, 0.0)
            changed = True
    return replace(graph, fx=fx) if changed else None


def _eps_of(n: Node) -> int | None:
    """Position of a node's eps among its arguments."""
    at = _POSITION.get(n.target)
    if at is None and n.target in _SUMS and n.users and all(_is_root(u) for u in n.users):
        at = 1
    if at is None or len(n.args) <= at:
        return None
    value = n.args[at]
    small = isinstance(value, int | float) and 0 < value <= _LARGEST
    return at if small or (value is None and n.target is _aten.rms_norm.default) else None


def _is_root(n: Node) -> bool:
    return n.target in _ROOTS or (n.target is _aten.pow.Tensor_Scalar and n.args[1] in (-0.5, 0.5))
