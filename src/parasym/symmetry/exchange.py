"""Exchanges of whole parameters: experts, the two factors of a product, parallel branches.

Colour refinement of the operator graph, in sweeps along and against the data flow, gives every parameter a colour; parameters
of one colour may have been written down in either order. Telling two of them apart and refining again shows what else must
move with them: other parameters, and the blocks of the axes that list the exchanged parts (a router's rows). The result is a
proposal; the finite action decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.symmetry.axes import Axis, monomials
from parasym.symmetry.discrete_actions import Exchange, Joint, grid, units_of
from parasym.symmetry.index_rules import operator_name
from parasym.symmetry.spaces import Spaces, live_nodes

_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "__and__", "__or__"}
_UNORDERED = {"cat", "stack"}
_PICKING = {"slice", "select", "narrow", "getitem"}
_SWEEPS = 3
_VISITS = 4_000_000


@dataclass(frozen=True)
class Swap:
    """A proposed automorphism: where each parameter and each atom goes (those that stay are left out)."""

    parameters: Mapping[str, str]
    atoms: Mapping[int, int]


def exchanges(graph: Graph, spaces: Spaces) -> list[list[tuple[Exchange | Joint, str]]]:
    """Proposed exchanges with their groups; each entry lists alternatives, the finest first."""
    coloured = _Coloured(graph, spaces)
    base = coloured.refine({})
    classes: dict[int, list[str]] = defaultdict(list)
    for name in graph.params:
        if name not in graph.dead and name in coloured.parameters:
            classes[base[name]].append(name)
    found: dict[Any, Exchange] = {}
    chains: dict[Any, int] = {}
    budget = _VISITS
    for members in classes.values():
        for a, b in pairwise(members):
            if any({a, b} == {x, y} for e in found.values() for x, y in e.swaps):
                continue
            budget -= 2 * _SWEEPS * len(coloured.nodes)
            if budget < 0:
                break
            action = _action(graph, spaces, coloured.swap(a, b))
            if action is not None:
                key = frozenset(frozenset(s) for s in action.swaps)
                found[key] = action
                chains[key] = len(members)
    return list(_grouped(graph, spaces, list(found.values())))


def _grouped(graph: Graph, spaces: Spaces, actions: list[Exchange]) -> Iterator[list[tuple[Exchange | Joint, str]]]:
    """Chains of exchanges that share parameters generate a symmetric group; single ones may act entry by entry."""
    left = list(actions)
    while left:
        chain, names = [left.pop(0)], set()
        names |= _moved(chain[0])
        grown = True
        while grown:
            grown = False
            for other in list(left):
                if names & _moved(other):
                    chain.append(other)
                    left.remove(other)
                    names |= _moved(other)
                    grown = True
        if len(chain) > 1:
            yield [(Joint(tuple(chain)), f"S_{len(chain) + 1}")]
        else:
            yield list(_finest(graph, spaces, chain[0]))


def _moved(e: Exchange) -> set[str]:
    return {n for s in e.swaps for n in s}


def _finest(graph: Graph, spaces: Spaces, e: Exchange) -> Iterator[tuple[Exchange, str]]:
    """The exchange entry by entry, then unit by unit of each common atom, then as a whole."""
    common = [] if e.reorder else _common(graph, spaces, e)
    choices = [tuple(common)] if len(common) > 1 else []
    choices += [(a,) for a in common]
    for atoms in choices:
        inside = tuple(units_of(spaces, spaces.atoms[a], parents=()) for a in atoms)
        action = Exchange(e.swaps, inside)
        yield action, f"Z2^{action.order}"
    yield e, "Z2"


def _common(graph: Graph, spaces: Spaces, e: Exchange) -> list[int]:
    """Atoms that make up a whole axis of every exchanged parameter."""
    sets = []
    for name in _moved(e):
        plain = [spaces.axis_of(name, i) for i in range(graph.params[name].dim())]
        alone = [x.atom for x in plain if x.kind == "atom" and x.size > 1]
        sets.append({a for a in alone if alone.count(a) == 1})
    return sorted(set.intersection(*sets)) if sets else []


def _action(graph: Graph, spaces: Spaces, swap: Swap | None) -> Exchange | None:
    """The finite action of a proposed automorphism, where it is an involution that keeps the order inside each parameter."""
    if swap is None:
        return None
    to = swap.parameters
    if any(to.get(b) != a for a, b in to.items()):
        return None
    pairs = tuple((a, b) for a, b in to.items() if list(graph.params).index(a) < list(graph.params).index(b))
    for a, b in pairs:
        same = graph.params[a].shape == graph.params[b].shape
        if not same or any(_order(spaces, a, b, i, swap.atoms) is not None for i in range(graph.params[a].dim())):
            return None
    reorder: dict[str, tuple[tuple[int, Tensor], ...]] = {}
    for name in graph.params:
        if name in to or name in graph.dead:
            continue
        orders = [(i, _order(spaces, name, name, i, swap.atoms)) for i in range(graph.params[name].dim())]
        moved = tuple((i, o) for i, o in orders if o is not None)
        if moved:
            reorder[name] = moved
    return Exchange(pairs, (), reorder) if pairs else None


def _order(spaces: Spaces, source: str, target: str, axis: int, atoms: Mapping[int, int]) -> Tensor | None:
    """Index order that brings the blocks of one axis to those of another under a map of atoms; None where nothing moves."""
    before, after = spaces.blocks(source, axis), spaces.blocks(target, axis)
    images = [tuple(atoms.get(a, a) for a in m.atoms) for m in before]
    wanted = [m.atoms for m in after]
    if images == wanted or sorted(images) != sorted(wanted):
        return None
    size = sum(int(torch.tensor(m.sizes).prod()) for m in before)
    order = torch.arange(size)
    free = list(range(len(before)))
    for m in after:
        k = next(i for i in free if images[i] == m.atoms)
        free.remove(k)
        order[grid(m).reshape(-1)] = grid(before[k]).reshape(-1)
    return order


class _Coloured:
    """Colours of nodes, parameters and atoms."""

    def __init__(self, graph: Graph, spaces: Spaces) -> None:
        self.graph, self.spaces = graph, spaces
        live = live_nodes(graph)
        self.inner = {n.name for n in graph.nodes if n.name in live and _inner(n)}
        self.nodes = [n for n in graph.nodes if n.name in live and n.name not in self.inner]
        used = {graph.holders[n.name] for n in self.nodes if n.name in graph.holders}
        self.parameters = [name for name in graph.params if name in used]
        self.blocks = {n.name: self._node_blocks(n) for n in self.nodes}
        self.inputs = {n.name: _leaves(n, self.inner) for n in self.nodes}
        self.own = {n.name: self._own(n) for n in self.nodes}
        self.units = {n.name: self._unit(n) for n in self.nodes}
        self.at = {n.name: [[atom for block in axis for atom in block] for axis in self.blocks[n.name]] for n in self.nodes}

    def _node_blocks(self, n: Node) -> list[list[tuple[int, ...]]]:
        found = self.spaces.axes.get(n.name) or []
        if found and not isinstance(found[0], Axis):
            return []
        return [[m.atoms for m in monomials(a)] for a in found]

    def _own(self, n: Node) -> int:
        name = operator_name(n)
        if n.op == "placeholder" or self.graph.kind.get(n.name) in ("const", "data"):
            holder = self.graph.holders.get(n.name)
            return hash(n.name) if holder is None else hash(tuple(self.graph.params[holder].shape))
        constants = repr([a for a in n.args if not isinstance(a, Node | list | tuple)])
        if name in _PICKING or (name in _COMMUTATIVE and not n.kwargs and _plain(n)):
            constants = ""
        return hash((str(n.target), constants, repr({k: v for k, v in n.kwargs.items() if not isinstance(v, Node)})))

    def _unit(self, n: Node) -> list[int]:
        """Atoms of size one that an operator picks or lines up."""
        name = operator_name(n)
        args: Any = n.args
        try:
            if name == "select":
                axis = self._axis(args[0], args[1])
                return self._piece(axis, args[2] % axis.size)
            if name == "getitem" and operator_name(args[0]) == "unbind":
                source: Any = args[0]
                return self._piece(self._axis(source.args[0], _dim_of(source)), args[1])
            if name == "stack":
                return [a for i in range(len(args[0])) for a in self._piece(self._axis(n, _dim_of(n)), i)]
        except (KeyError, TypeError, AttributeError, IndexError):
            return []
        return []

    def _axis(self, n: Node, dim: int) -> Axis:
        axes = self.spaces.axes[n.name]
        return axes[dim % len(axes)]

    @staticmethod
    def _piece(axis: Axis, index: int) -> list[int]:
        return [m.atoms[0] for m in monomials(axis) if m.offset == index and m.sizes == (1,)]

    def refine(self, marks: Mapping[str, int]) -> dict[Any, int]:
        """Colours by name (parameters), node name and atom number, with some parameters marked beforehand."""
        atoms = {a.number: hash((a.size, a.number if a.frozen is not None else -1)) for a in self.spaces.atoms}
        nodes: dict[str, int] = dict(self.own)
        for n in self.nodes:
            if n.name in self.graph.holders:
                nodes[n.name] = hash((nodes[n.name], marks.get(self.graph.holders[n.name], 0)))
        params: dict[str, int] = {}
        for _ in range(_SWEEPS):
            self._forward(nodes, atoms)
            self._backward(nodes)
            params = self._parameters(nodes, marks)
            atoms = self._atoms(nodes, atoms)
        return {**nodes, **params, **atoms}

    def _forward(self, nodes: dict[str, int], atoms: Mapping[int, int]) -> None:
        for n in self.nodes:
            axes = tuple(hash(tuple(sorted(hash(tuple(atoms[a] for a in block)) for block in axis))) for axis in self.blocks[n.name])
            nodes[n.name] = hash((nodes[n.name], self._arguments(n, nodes, atoms), axes))

    def _arguments(self, n: Node, nodes: Mapping[str, int], atoms: Mapping[int, int]) -> Any:
        name = operator_name(n)
        units = [atoms[a] for a in self.units[n.name]]
        if name in _UNORDERED and isinstance(n.args[0], (list, tuple)):
            parts = [nodes.get(a.name, 0) for a in n.args[0] if isinstance(a, Node)]
            return tuple(sorted(hash(p) for p in (zip(parts, units, strict=True) if len(units) == len(parts) else parts)))
        colours = [nodes.get(a.name, 0) for a in self.inputs[n.name]]
        return (tuple(sorted(colours) if name in _COMMUTATIVE and not n.kwargs else colours), tuple(units))

    def _backward(self, nodes: dict[str, int]) -> None:
        told: dict[str, list[int]] = defaultdict(list)
        for n in reversed(self.nodes):
            nodes[n.name] = hash((nodes[n.name], tuple(sorted(told[n.name]))))
            name = operator_name(n)
            free = (name in _COMMUTATIVE and not n.kwargs) or name in _UNORDERED
            for i, a in enumerate(self.inputs[n.name]):
                told[a.name].append(hash((nodes[n.name], 0 if free else i)))

    def _parameters(self, nodes: dict[str, int], marks: Mapping[str, int]) -> dict[str, int]:
        """One colour for all placeholders of a parameter."""
        seen: dict[str, list[int]] = defaultdict(list)
        for n in self.nodes:
            if n.name in self.graph.holders:
                seen[self.graph.holders[n.name]].append(nodes[n.name])
        colours = {name: hash((tuple(sorted(c)), marks.get(name, 0))) for name, c in seen.items()}
        for n in self.nodes:
            if n.name in self.graph.holders:
                nodes[n.name] = colours[self.graph.holders[n.name]]
        return colours

    def _atoms(self, nodes: Mapping[str, int], atoms: Mapping[int, int]) -> dict[int, int]:
        seen: dict[int, list[int]] = defaultdict(list)
        for n in self.nodes:
            for i, axis in enumerate(self.at[n.name]):
                for a in axis:
                    seen[a].append(hash((nodes[n.name], i)))
            picked = operator_name(n) in _UNORDERED
            parts = [a for a in n.args[0] if isinstance(a, Node)] if picked and isinstance(n.args[0], (list, tuple)) else []
            for i, a in enumerate(self.units[n.name]):
                seen[a].append(hash(nodes[parts[i].name]) if i < len(parts) else hash(nodes[n.name]))
        return {a: hash((c, tuple(sorted(seen[a])))) for a, c in atoms.items()}

    def swap(self, a: str, b: str) -> Swap | None:
        """Where everything goes when two parameters change places; None where the colours do not match."""
        one, two = self.refine({a: 1, b: 2}), self.refine({a: 2, b: 1})
        params = _matching(self.parameters, one, two)
        atoms = _matching([x.number for x in self.spaces.atoms], one, two)
        if params is None or atoms is None or params.get(a) != b:
            return None
        return Swap(params, atoms)


def _matching(items: Iterable[Any], one: Mapping[Any, int], two: Mapping[Any, int]) -> dict[Any, Any] | None:
    """Items by equal colour, itself where possible; only those that move."""
    by_colour: dict[int, list[Any]] = defaultdict(list)
    rest = []
    for x in items:
        if one[x] != two[x]:
            rest.append(x)
            by_colour[two[x]].append(x)
    out = {}
    for x in sorted(rest):
        if not by_colour[one[x]]:
            return None
        out[x] = by_colour[one[x]].pop(0)
    return out


def _dim_of(n: Any) -> int:
    return n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)


def _plain(n: Node) -> bool:
    return all(isinstance(a, Node) or a == 0 for a in n.args)


def _inner(n: Node) -> bool:
    """Whether a sum (product) is only a term (factor) of another one: then order and brackets do not matter."""
    if operator_name(n) not in ("add", "mul") or len(n.users) != 1 or n.kwargs or not _plain(n):
        return False
    if operator_name(n) == "mul" and not all(isinstance(a, Node) for a in n.args):
        return False
    user = next(iter(n.users))
    return user.target is n.target and not user.kwargs


def _leaves(n: Node, inner: set[str]) -> list[Node]:
    out: list[Node] = []
    for a in _inputs(n):
        out += _leaves(a, inner) if a.name in inner and a.target is n.target else [a]
    return out


def _inputs(n: Node) -> Sequence[Node]:
    """Arguments in order, repetitions included."""
    out: list[Node] = []
    torch.fx.node.map_arg((n.args, n.kwargs), out.append)
    return out
