"""Sign changes that are not linear in the parameters: f(-z) = d - f(z), and the slope of a leaky unit turned over.

Negating what enters such an operator is undone by its readers: for f(-z) = d - f(z) (sigmoid: d = 1) the reader changes sign
and the bias behind it takes up d times the reader; for a PReLU of slope a the reader is multiplied by -a and a becomes 1/a.
Which operators are of the first kind is found by running them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.symmetry.discrete_actions import GlobalSign, Signs, grid
from parasym.symmetry.index_rules import operator_name
from parasym.symmetry.signs import WHOLE, Echelon, SignPass, global_sign, image, independent, sign_pass, unit_signs
from parasym.symmetry.spaces import Place, Spaces, live_nodes
from parasym.symmetry.symmetry import Params

_MOVES = {"reshape", "view", "flatten", "transpose", "permute", "contiguous", "clone", "dropout", "unsqueeze", "squeeze", "t"}


@dataclass(frozen=True)
class Reader:
    """Where a parameter reads the units: along one axis; ``bias`` is added to its result, along ``out``."""

    weight: str
    axis: int
    places: tuple[Place, ...]
    out: int
    bias: str | None

    def select(self, t: Tensor, unit: int | None, atom: int) -> Tensor:
        """(axis size,) 1 on the columns of one unit (None: of every unit)."""
        mask = torch.zeros(t.shape[self.axis], dtype=t.dtype)
        if unit is None:
            return mask + 1
        for p in self.places:
            g = grid(p.block)
            mask[g.select(p.block.atoms.index(atom), unit).reshape(-1)] = 1
        return mask


@dataclass
class Inversion:
    """Negation of what enters some operators, with their readers (and slopes) adapted.

    Attributes:
        signs: the linear part.
        shift: f(z) + f(-z) of the operators, 0 for slopes.
        slope: the slope parameter that is turned over, or None.
        readers: who reads the results.
    """

    signs: Signs | GlobalSign
    shift: float
    slope: str | None
    readers: tuple[Reader, ...]
    dim: int = 0

    @property
    def order(self) -> int:
        return self.signs.order

    @property
    def tensors(self) -> tuple[str, ...]:
        extra = [r.bias for r in self.readers if r.bias] if self.shift else []
        return tuple(dict.fromkeys([*self.signs.tensors, *extra, *([self.slope] if self.slope else [])]))

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        out = {**{n: params[n] for n in self.tensors if n in params}, **self.signs.act(params, element)}
        for unit in self._units(element):
            for r in self.readers:
                if self.slope is None:
                    self._absorb(params, out, r, unit)
                else:
                    self._scale(params, out, r, unit)
            if self.slope is not None:
                out[self.slope] = self._turned(out[self.slope], unit)
        return out

    def _units(self, element: Tensor) -> list[int | None]:
        if isinstance(self.signs, GlobalSign):
            return [None]
        return [int(element)] if element.dim() == 0 else element.reshape(-1).nonzero()[:, 0].tolist()

    def _atom(self) -> int:
        return self.signs.units.atom.number if isinstance(self.signs, Signs) else -1

    def _absorb(self, params: Params, out: dict[str, Tensor], r: Reader, unit: int | None) -> None:
        w = params[r.weight]
        mask = r.select(w, unit, self._atom()).reshape([-1 if i == r.axis else 1 for i in range(w.dim())])
        others = [i for i in range(w.dim()) if i != r.out]
        assert r.bias is not None
        out[r.bias] = out[r.bias] + self.shift * (w * mask).sum(others)

    def _scale(self, params: Params, out: dict[str, Tensor], r: Reader, unit: int | None) -> None:
        assert self.slope is not None
        a = params[self.slope].reshape(-1)[0 if unit is None else unit]
        w = out[r.weight]
        mask = r.select(w, unit, self._atom()).reshape([-1 if i == r.axis else 1 for i in range(w.dim())])
        out[r.weight] = w * (1 + (a - 1) * mask)

    @staticmethod
    def _turned(a: Tensor, unit: int | None) -> Tensor:
        new = a.clone()
        index = 0 if unit is None else unit
        new.view(-1)[index] = 1 / a.reshape(-1)[index]
        return new

    def key(self) -> tuple[Any, ...]:
        return ("inversion", self.slope, *self.signs.key())

    def generators(self, params: Params) -> dict[str, Tensor]:
        return {}

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        return self.signs.tests(generator)


def inversions(graph: Graph, spaces: Spaces, plain: SignPass) -> list[Inversion]:
    """Sign changes that need a compensation, uncertified; ``plain`` is the system of those that need none."""
    operators = _operators(graph, spaces)
    if not operators:
        return []
    system = sign_pass(graph, spaces, {n: o.source for n, o in operators.items()})
    out: list[Inversion] = []
    whole: list[int] = []
    for key in sorted(system.variables, reverse=True):  # units first, whole tensors (-1) last
        n = len(system.variables[key])
        known = plain.constraints.get(key, Echelon()).kernel(n) + (whole if key == WHOLE else [])
        for v in independent(system.constraints.get(key, Echelon()).kernel(n), known):
            found = _inversion(graph, spaces, system, operators, key, v)
            if found is None:
                continue
            out.append(found)
            if key != WHOLE:
                whole.append(image(spaces, system, v, key, WHOLE))
    return out


@dataclass(frozen=True)
class _Operator:
    source: Node
    shift: float
    slope: Node | None


def _operators(graph: Graph, spaces: Spaces) -> dict[str, _Operator]:
    """Operators with f(-z) = d - f(z), d not zero, and leaky units with a learned slope."""
    live = live_nodes(graph)
    nodes = {n.name: n for n in graph.nodes}
    answers: dict[str, float | None] = {}
    out: dict[str, _Operator] = {}
    for n in graph.nodes:
        if n.name not in live or n.name not in spaces.axes or graph.kind.get(n.name) != "active":
            continue
        name, inputs = str(n.target), n.all_input_nodes
        if "prelu" in name and len(inputs) == 2 and inputs[1].name in graph.holders:
            out[n.name] = _Operator(inputs[0], 0.0, inputs[1])
        elif len(inputs) == 1 and torch.Tag.pointwise in getattr(n.target, "tags", ()):
            key = name + repr([a for a in n.args if not isinstance(a, Node)]) + repr(n.kwargs)
            if key not in answers:
                answers[key] = _reflection(graph, n, inputs[0])
            if answers[key]:
                out[n.name] = _Operator(inputs[0], float(answers[key] or 0), None)
    return {name: o for name, o in out.items() if _readers(graph, spaces, nodes[name], WHOLE, bool(o.shift)) is not None}


def _reflection(graph: Graph, n: Node, source: Node) -> float | None:
    z = torch.linspace(-3.1, 2.9, 64, dtype=torch.float64)
    try:
        total = graph._evaluate(n, {source.name: z}) + graph._evaluate(n, {source.name: -z})
    except Exception:  # not an operator on real numbers
        return None
    if not isinstance(total, Tensor) or not total.is_floating_point():
        return None
    d = float(total[0])
    return d if abs(d) > 1e-9 and bool((total - d).abs().max() < 1e-12) else None


def _inversion(graph: Graph, spaces: Spaces, system: SignPass, operators: Mapping[str, _Operator], key: int, v: int) -> Inversion | None:
    nodes = {n.name: n for n in graph.nodes}
    turned = [n for n in operators if any(slot[2] == key and (mask & v).bit_count() & 1 for slot, mask in system.labels[n].items())]
    if not turned or (key != WHOLE and spaces.atoms[key].parents):
        return None
    slopes = {operators[n].slope for n in turned}
    shifts = {operators[n].shift for n in turned}
    if len(slopes) != 1 or len(shifts) != 1:
        return None
    slope, shift = slopes.pop(), shifts.pop()
    name = graph.holders[slope.name] if slope is not None else None
    if name is not None and (graph.params[name].numel() == 1) != (key == WHOLE):
        return None
    readers: list[Reader] = []
    for n in turned:
        found = _readers(graph, spaces, nodes[n], key, bool(shift))
        if found is None:
            return None
        readers += found
    signs: Signs | GlobalSign = global_sign(spaces, system, v) if key == WHOLE else unit_signs(spaces, system, v, key)
    unique = {(r.weight, r.axis): r for r in readers}
    return Inversion(signs, shift, name, tuple(unique.values()))


def _readers(graph: Graph, spaces: Spaces, n: Node, key: int, need_bias: bool) -> list[Reader] | None:
    """Parameters that contract the result of an operator; None when anything else reads it."""
    out: list[Reader] = []
    stack = list(n.users)
    while stack:
        u = stack.pop()
        if operator_name(u) in _MOVES:
            stack.extend(u.users)
            continue
        reader = _reader(graph, spaces, u, key, need_bias)
        if reader is None:
            return None
        out.append(reader)
    return out


def _reader(graph: Graph, spaces: Spaces, u: Node, key: int, need_bias: bool) -> Reader | None:
    c = spaces.contractions.get(u.name)
    weight = next((a for a in u.all_input_nodes if a.name in graph.holders), None)
    if c is None or weight is None or len(c.operands) != 2:
        return None
    labels = dict(c.operands)[weight.name]
    other = next(x for name, x in c.operands if name != weight.name)
    summed = [i for i, x in enumerate(labels) if x is not None and x in other and x not in c.out]
    outs = [i for i, x in enumerate(labels) if x is not None and x in c.out]
    if len(summed) != 1 or len(outs) != 1:
        return None
    bias = None
    if need_bias:
        adds = [a for a in u.users if operator_name(a) == "add"]
        if len(adds) != 1 or len(u.users) != 1:
            return None
        rows = graph.params[graph.holders[weight.name]].shape[outs[0]]
        names = [p for p in graph.parameters_of(adds[0]) if graph.params[p].shape == (rows,)]
        if len(names) != 1:
            return None
        bias = names[0]
    name = graph.holders[weight.name]
    places = tuple(p for p in spaces.atoms[key].places if p.tensor == name and p.axis == summed[0]) if key != WHOLE else ()
    return Reader(name, summed[0], places, outs[0], bias)
