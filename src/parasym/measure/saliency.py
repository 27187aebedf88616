"""Synaptic saliency: how much of a scalar of the outputs flows through each weight, and the laws that this flow obeys.

Saliency of a scalar R of the network's output is S(theta) = (dR/dtheta) * theta. Where the activation is homogeneous, what flows
into a unit flows out of it (the Noether charge of its rescaling, score by score), so that every set of weights that cuts all paths
from input to output carries the same total. SynFlow's R runs through the same graph with absolute weights, all-ones inputs and
every activation replaced by the identity: its saliency is the sum of absolute path weights through a weight.

Source: synflow R1-R3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from parasym.core.errors import InputError, TraceError
from parasym.core.functional import functional
from parasym.core.graph import Graph, trace
from parasym.core.guards import float64_casts, preserve
from parasym.core.results import Estimate
from parasym.measure.units import CARRY, find_layers, op_name
from parasym.symmetry.readers import readers
from parasym.symmetry.spaces import find_spaces, live_nodes

_IDENTITY = frozenset(
    {
        "softmax", "_softmax", "log_softmax", "_log_softmax", "layer_norm", "rms_norm", "group_norm", "standardise",
        "instance_standardise", "masked_fill", "clamp", "clamp_min", "clamp_max", "pow",
    }
)  # fmt: skip
_SUM = frozenset({"add", "sub", "rsub", "div", "where", "maximum", "minimum", "lerp", "atan2"})
_PRODUCT = frozenset({"matmul", "bmm", "mm", "einsum", "baddbmm"})
_LINEAR = frozenset(
    {
        "cumsum", "flip", "gather", "index", "index_select", "movedim", "narrow", "pixel_shuffle", "pixel_unshuffle", "repeat",
        "repeat_interleave", "roll",
    }
)  # fmt: skip


def synaptic_saliency(
    model: nn.Module, readout: Callable[[Any], Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """(dR/dtheta) * theta of every parameter, in float64.

    Args:
        readout: what the model returns -> R, one number; a function of the output alone (a loss with its labels closed over).
        args, kwargs: the batch; R may sum over it.

    Raises:
        InputError: R is not one number, or does not depend on the parameters.

    Source: synflow R1.
    """
    f = functional(model).to(torch.float64)
    with preserve(f.model), float64_casts(), torch.enable_grad():
        params = {n: p.detach().clone().requires_grad_() for n, p in f.params.items()}
        value = readout(f.output(params, tuple(args), dict(kwargs or {})))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError("the readout must return one number that depends on the model's output, such as a loss or a sum.")
        grads = torch.autograd.grad(value.reshape(()), list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else (g * p).detach() for (n, p), g in zip(params.items(), grads, strict=True)}


@dataclass(frozen=True)
class Conservation:
    """How well saliency is conserved.

    Attributes:
        units: layer -> (n,) saliency into each unit less that out of it, over the root mean square flow of the layer.
        cuts: for each parameter that cuts every path alone: its sum with the additive parameters behind it.
        unit_residual: the largest of ``units``; ``cut_residual``: spread of ``cuts`` over the largest.
    """

    units: Mapping[str, Tensor]
    cuts: Mapping[str, float]

    @property
    def unit_residual(self) -> Estimate:
        if not self.units:
            return Estimate(None, status="not_applicable", note="no layer of units between two contractions", refs=("synflow",))
        return Estimate(max(float(r.abs().max()) for r in self.units.values()), refs=("synflow",), assumptions=("homogeneous activations",))

    @property
    def cut_residual(self) -> Estimate:
        if len(self.cuts) < 2:
            return Estimate(None, status="not_applicable", note="fewer than two parameters cut every path alone", refs=("synflow",))
        values = list(self.cuts.values())
        size = max(abs(v) for v in values) or 1.0
        return Estimate((max(values) - min(values)) / size, refs=("synflow",), assumptions=("homogeneous activations",))


def saliency_conservation(
    model: nn.Module, saliency: Mapping[str, Tensor], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Conservation:
    """What flows into every hidden unit less what flows out of it, and the sum over every parameter that cuts all paths.

    Args:
        saliency: parameter -> scores of its shape (:func:`synaptic_saliency`, or any other score that is asked for the law).

    Source: synflow R1, R2.
    """
    graph = trace(model, args, kwargs)
    spaces = find_spaces(graph)
    units: dict[str, Tensor] = {}
    for layer in find_layers(graph, spaces):
        if not layer.uses or len(layer.regions) != 1 or len(layer.regions[0].sources) != 1 or layer.regions[0].leaks:
            continue
        into = _into(graph, layer.regions[0].inputs[0], layer.regions[0].sources[0].path)
        if into is None or any(p not in layer.rows for p in into):
            continue
        flows = [_by_unit(saliency[p], *layer.rows[p]) for p in into]
        out = [_by_unit(saliency[u.reader.weight], u.reader.in_axis, u.columns) for u in layer.uses]
        enters, leaves = torch.stack(flows).sum(0), torch.stack(out).sum(0)
        scale = torch.cat([enters, leaves]).square().mean().sqrt().clamp(min=1e-300)
        units[layer.where or "model"] = (enters - leaves) / scale
    ancestors = _ancestors(graph)
    sums = {}
    added = _additive(graph)
    for name, nodes in contractions(graph).items():
        if cuts_alone(graph, nodes):
            above = set().union(*(ancestors[n] for n in nodes))
            behind = [p for p, at in added.items() if not set(at) & above]
            sums[name] = math.fsum(float(saliency[p].sum()) for p in [name, *behind] if p in saliency)
    return Conservation(units, sums)


def _by_unit(scores: Tensor, axis: int, at: Tensor) -> Tensor:
    """(n,) sums of the entries of each unit."""
    total = scores.movedim(axis, 0).flatten(1).sum(1) if scores.dim() > 1 else scores
    return total[at].sum(1)


def _into(graph: Graph, z: Node, path: Sequence[Node]) -> list[str] | None:
    """Parameters whose saliencies add up to <dR/dz, z> of each unit: biases met on the way up, and the first gain or weight."""
    inside, found, n = {p.name for p in path}, list[str](), z
    while n.name in inside or n is z:
        params, active = graph.parameters_of(n), [a for a in n.all_input_nodes if graph.kind.get(a.name) == "active"]
        name = op_name(n)
        if params and name == "add" and len(active) == 1:
            found += params
        elif params and len(params) == 1:
            return [*found, params[0]]
        elif params or name not in CARRY or len(active) != 1:
            return None
        n = active[0]
    return None


def _additive(graph: Graph) -> dict[str, list[str]]:
    """Parameters that are added to activations -> the nodes where."""
    out: dict[str, list[str]] = {}
    for n in graph.parameter_ops():
        if op_name(n) == "add":
            for p in graph.parameters_of(n):
                out.setdefault(p, []).append(n.name)
    return out


def _ancestors(graph: Graph) -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for n in graph.nodes:
        out[n.name] = set().union(*(out.get(a.name, set()) | {a.name} for a in n.all_input_nodes))
    return out


# ------------------------------------------------------------------------------------------------ cuts


def contractions(graph: Graph) -> dict[str, list[str]]:
    """Weights of at least two dimensions that multiply activations (or are looked up) -> the nodes that do it.

    Gains, biases and tables that are only added are left out.
    """
    live = live_nodes(graph)
    out: dict[str, list[str]] = {}
    for n in graph.parameter_ops():
        if n.name in live and op_name(n) not in ("add", "mul", "sub", "div"):
            for p in graph.parameters_of(n):
                if sum(s > 1 for s in graph.params[p].shape) >= 2:
                    out.setdefault(p, []).append(n.name)
    for r in readers(graph):
        if r.node in live and graph.params[r.weight].dim() >= 2:
            out.setdefault(r.weight, [])
            if r.node not in out[r.weight]:
                out[r.weight].append(r.node)
    order = {p: i for i, p in enumerate(graph.params)}
    return dict(sorted(out.items(), key=lambda item: order[item[0]]))


def cuts_alone(graph: Graph, nodes: Iterable[str]) -> bool:
    """Whether every path from the data to an output passes one of these nodes."""
    return not _reaches(graph, set(nodes))


def _reaches(graph: Graph, barred: set[str]) -> bool:
    seen = set(graph.inputs)
    for n in graph.nodes:
        if n.name not in barred and any(a.name in seen for a in n.all_input_nodes):
            seen.add(n.name)
    return any(o in seen for o in graph.outputs)


def parameter_cuts(graph: Graph, weights: Mapping[str, Sequence[str]] | None = None) -> list[tuple[str, ...]]:
    """Sets of weights that cut every path from the data to the outputs, one for each depth of the graph.

    At every depth the activations alive there are followed up to the last weight on each path. Where one of them is the input
    itself (a shortcut without a weight), there is no such set.

    Args:
        weights: parameter -> nodes (default: :func:`contractions`).

    Source: synflow R2 for graphs that are no chain.
    """
    weights = contractions(graph) if weights is None else weights
    owner = {n: p for p, nodes in weights.items() for n in nodes}
    live = live_nodes(graph)
    nodes = [n for n in graph.nodes if n.name in live]
    last: dict[str, frozenset[str] | None] = dict.fromkeys(graph.inputs)  # None: reached without a weight
    carries = set(graph.inputs)
    order = {n.name: i for i, n in enumerate(nodes)}
    end = {n.name: max((order[u.name] for u in n.users if u.name in live), default=len(nodes)) for n in nodes}
    end |= dict.fromkeys(graph.outputs, len(nodes))
    found: dict[tuple[str, ...], None] = {}
    for i, n in enumerate(nodes):
        above = [a.name for a in n.all_input_nodes if a.name in carries]
        if above:
            carries.add(n.name)
            known = [last[a] for a in above]
            last[n.name] = frozenset({owner[n.name]}) if n.name in owner else None if None in known else frozenset().union(*known)  # type: ignore[arg-type]
        frontier = [a for a in carries if order.get(a, -1) <= i < end.get(a, -1)]
        sets = [last[a] for a in frontier]
        if sets and None not in sets:
            found.setdefault(tuple(sorted(frozenset().union(*sets))))  # type: ignore[arg-type]
    minimal = [c for c in found if not any(set(o) < set(c) for o in found)]
    return minimal


# ------------------------------------------------------------------------------------------------ SynFlow's network


class Flow:
    """The network that SynFlow scores: absolute weights, ones in, every activation the identity.

    Activations that meet in a product (gates, attention) are added instead: what is counted are paths. Norms and softmax pass what
    they get; a norm with frozen statistics keeps its scale; biases are left out, since a path begins at an input.

    Args:
        graph: any traced graph.

    Attributes:
        guessed: operators without a rule of their own, treated as the sum of their inputs.

    Raises:
        TraceError: an operator that nothing is known about.

    Source: synflow R3.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.guessed = graph, set[str]()
        live = live_nodes(graph)
        self.nodes = [n for n in graph.nodes if n.name in live]
        self.still: dict[str, Any] = {}
        blank = [torch.ones(n.meta["val"].shape, dtype=torch.float64) if n.meta["val"].is_floating_point() else
                 torch.zeros(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in self._inputs()]  # fmt: skip
        for name, value in graph.prepare(blank).items():
            data = graph.kind.get(name) == "data"
            if isinstance(value, Tensor) and value.is_floating_point():
                self.still[name] = torch.ones_like(value) if data else value.abs()
            else:
                self.still[name] = value

    def _inputs(self) -> list[Node]:
        by_name = {n.name: n for n in self.graph.nodes}
        return [by_name[i] for i in self.graph.inputs]

    def total(self, weights: Mapping[str, Tensor], reach: bool = False) -> Tensor:
        """R: the sum of all outputs, for absolute weights (parameters left out: the model's own).

        With ``reach`` every activation becomes one where anything arrives, zero elsewhere: the number of outputs that an input reaches,
        without the overflow that counting all paths of a deep network would bring.
        """
        live: dict[str, Any] = dict(self.still)
        for holder, name in self.graph.holders.items():
            live[holder] = weights[name] if name in weights else self.graph.params[name].abs()
        for n in self.nodes:
            if n.name not in live:
                kind = self.graph.kind.get(n.name)
                live[n.name] = self.graph._evaluate(n, live) if kind != "active" else self._pass(n, live)
                if reach and kind == "active" and _floats(live[n.name]):
                    live[n.name] = (live[n.name] > 0).to(live[n.name].dtype)
        return torch.stack([live[o].sum() for o in self.graph.outputs]).sum()

    def scores(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """dR/d|theta| * |theta| of the given weights, and R.

        Raises:
            InputError: R overflows, or nothing flows.
        """
        with torch.enable_grad():
            leaves = {n: w.detach().abs().requires_grad_() for n, w in weights.items()}
            value = self.total(leaves)
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True) if value.requires_grad else [None] * len(leaves)
        value = value.detach()
        if not math.isfinite(float(value)):
            raise InputError("the synaptic flow overflows: the product of absolute weights is too large; divide the weights by a constant.")
        found = {n: torch.zeros_like(w) if g is None else (g * w).detach() for (n, w), g in zip(leaves.items(), grads, strict=True)}
        return found, float(value)

    def _pass(self, n: Node, live: Mapping[str, Any]) -> Any:
        try:
            return self._rule(n, live)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise TraceError(f"no synaptic flow through {op_name(n)} ({n.name}): use another score for this model.") from error

    def _rule(self, n: Node, live: Mapping[str, Any]) -> Any:
        kind, name, shape = self.graph.kind, op_name(n), n.meta["val"].shape if isinstance(n.meta.get("val"), Tensor) else torch.Size()
        inputs = n.all_input_nodes
        moving = [a for a in inputs if kind.get(a.name) in ("active", "data") and _floats(live[a.name])]
        active = [a for a in inputs if kind.get(a.name) == "active"]
        held = [a for a in inputs if kind.get(a.name) in ("param", "const") and _floats(live[a.name])]
        if name == "embedding":
            return live[inputs[0].name].mean(0).expand(shape)
        if name == "scaled_dot_product_attention":
            q, k, v = (live[a.name] for a in inputs[:3])
            return _attention(q, k, v, shape)
        if name in _IDENTITY:
            return live[active[0].name]
        if name in _PRODUCT and len(active) > 1:
            if name == "einsum":  # by either side, the others set to one
                ones = {a.name: torch.ones_like(live[a.name]) for a in active}
                return _sum([self.graph._evaluate(n, {**live, **ones, a.name: live[a.name]}) for a in active], shape)
            *more, a, b = (live[x.name] for x in inputs)
            return _sum([_paths(a, b, shape), *(m for x, m in zip(inputs, more, strict=False) if x in active)], shape)
        if name == "mul" or (name == "div" and held and len(moving) == 1):
            out = _sum([live[a.name] for a in moving], shape)
            for a in held:
                out = out * live[a.name] if name == "mul" else out / live[a.name].clamp(min=1e-300)
            return out * _factor(n, name)
        if name in _SUM:
            return _sum([live[a.name] for a in moving], shape)
        if name in CARRY or name in _LINEAR or name in _PRODUCT or name == "linear" or name.startswith("conv") or held:
            source = {a.name: torch.zeros_like(live[a.name]) for a in held} if name in ("cat", "stack") else {}
            return self.graph._evaluate(n, {**live, **source})
        mixed = [live[a.name] for a in active if _floats(live[a.name])]
        if not isinstance(n.meta.get("val"), Tensor):
            self.guessed.add(name)
            return self.graph._evaluate(n, live)
        if len(active) > 1 or any(m.shape != shape for m in mixed):
            self.guessed.add(name)
        return _blend(mixed, shape)


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _sum(values: Sequence[Tensor], shape: torch.Size) -> Tensor:
    return torch.stack([v.expand(shape) for v in values]).sum(0) if len(values) > 1 else values[0].expand(shape)


def _blend(values: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """What enters, where shapes agree, else its average."""
    fit = [v if _fits(v.shape, shape) else v.mean().reshape((1,) * len(shape)) for v in values]
    return _sum(fit, shape)


def _fits(own: torch.Size, shape: torch.Size) -> bool:
    return len(own) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(own), reversed(shape), strict=False))


def _factor(n: Node, name: str) -> float:
    numbers = [abs(float(a)) for a in n.args if isinstance(a, int | float)]
    return (math.prod(numbers) if name == "mul" else 1 / math.prod(numbers)) if numbers else 1.0


def _paths(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """A product of two activations: what enters by either side, averaged over the index that is summed."""
    if a.dim() < 2 or b.dim() < 2:
        return _blend([a, b], shape)
    return (a.mean(-1, keepdim=True) + b.mean(-2, keepdim=True)).expand(shape)


def _attention(q: Tensor, k: Tensor, v: Tensor, shape: torch.Size) -> Tensor:
    groups = q.shape[-3] // k.shape[-3] if q.dim() > 2 and k.dim() > 2 else 1
    if groups > 1:
        k, v = (x.repeat_interleave(groups, -3) for x in (k, v))
    return (v.mean(-2, keepdim=True) + q.mean(-1, keepdim=True) + k.mean((-1, -2), keepdim=True)).expand(shape)


__all__ = [
    "Conservation",
    "Flow",
    "contractions",
    "cuts_alone",
    "parameter_cuts",
    "saliency_conservation",
    "synaptic_saliency",
]
