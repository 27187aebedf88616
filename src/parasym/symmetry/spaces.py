"""Index spaces of a traced graph: which axes of which parameters carry the same units.

Every axis of every tensor is an expression in atoms (:mod:`parasym.symmetry.axes`). Operators only say how they move and tie
indices: elementwise operators tie, contractions create and consume, reshapes factor, slices cut. An operator without a rule,
model inputs and outputs, positions and constants that vary along an axis freeze the atoms they touch, with the reason.
Nothing depends on sizes or values of parameters: a graph traced on the meta device is read in time linear in its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.symmetry import axes as ax
from parasym.symmetry.axes import Axis, Monomial, find, freeze
from parasym.symmetry.index_rules import CONSTANT_ELEMENTS, RULES, Axes, Contraction, arguments, operator_name, pointwise

_name, _arguments = operator_name, arguments  # the names they go by elsewhere in this room
_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class Expr:
    """What an axis is made of: an atom, a row-major product or a concatenation."""

    kind: ax.Kind
    size: int
    atom: int = -1
    parts: tuple[Expr, ...] = ()

    def __str__(self) -> str:
        if self.kind == "atom":
            return f"a{self.atom}[{self.size}]"
        return "(" + (" * " if self.kind == "prod" else " + ").join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class Place:
    """One occurrence of an atom in a parameter or buffer.

    Attributes:
        tensor: name of the parameter (canonical) or buffer (placeholder).
        axis: which of its axes.
        block: the strided block of that axis that holds the atom.
        slot: position of the block among the blocks of the axis.
    """

    tensor: str
    axis: int
    block: Monomial
    slot: int

    def positions(self, atom: int) -> Tensor:
        """(size, multiplicity) indices along the axis that belong to each unit of the atom."""
        index = torch.tensor([[self.block.offset]])
        for a, stride, size in zip(self.block.atoms, self.block.strides, self.block.sizes, strict=True):
            steps = stride * torch.arange(size)
            if a == atom:
                index = (index[:, None, :] + steps[None, :, None]).reshape(-1, index.shape[1])
            else:
                index = (index[:, :, None] + steps).flatten(1)
        return index


@dataclass(frozen=True)
class Atom:
    """An index space that no operator takes apart.

    Attributes:
        number: its index in ``Spaces.atoms``.
        size: how many units.
        frozen: why its units cannot be exchanged, or None.
        places: where it sits in parameters and running statistics.
        parents: atoms present in every tensor that carries this one: its units may be exchanged separately for each of
            their indices.
    """

    number: int
    size: int
    frozen: str | None
    places: tuple[Place, ...]
    parents: tuple[int, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.tensor for p in self.places))


@dataclass
class Spaces:
    """Index spaces of a graph.

    Attributes:
        atoms: all atoms that occur in tensors of the graph.
        axes: node name -> its axes (a list of them for an operator with several results).
        unknown: node -> operator without a rule, whose tensors are frozen.
        contractions: multilinear operators by node name.
        constants: values of nodes that depend on nothing, where they could be computed.
        carriers: buffers that move with the units: running statistics.
    """

    graph: Graph
    axes: dict[str, Any]
    atoms: list[Atom] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    contractions: dict[str, Contraction] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    carriers: tuple[str, ...] = ()

    def axis_of(self, node: str, axis: int) -> Expr:
        """What an axis of a node (or of a parameter or buffer, by its name) is made of."""
        return self._expr(self._axes(node)[axis])

    def blocks(self, node: str, axis: int) -> tuple[Monomial, ...]:
        """An axis as strided blocks of atoms, end to end."""
        return ax.monomials(self._axes(node)[axis])

    def positions(self, atom: Atom | int, tensor: str) -> list[tuple[int, Tensor]]:
        """Where the units of an atom sit in a parameter or running statistic: (axis, (size, multiplicity) indices)."""
        a = atom if isinstance(atom, Atom) else self.atoms[atom]
        return [(p.axis, p.positions(a.number)) for p in a.places if p.tensor == tensor]

    def _axes(self, name: str) -> Axes:
        found = self.axes.get(name, self._by_tensor.get(name))
        if found is None:
            raise KeyError(f"no tensor called {name!r} in this graph")
        return found

    @cached_property
    def _by_tensor(self) -> dict[str, Axes]:
        return {canonical: self.axes[holder] for holder, canonical in self.graph.holders.items() if holder in self.axes}

    def _expr(self, a: Axis) -> Expr:
        r = find(a)
        if r.kind == "atom":
            return Expr("atom", r.size, r.number)
        parts = ax.factors(r) if r.kind == "prod" else ax.segments(r)
        return Expr(r.kind, r.size, parts=tuple(map(self._expr, parts)))


def find_spaces(graph: Graph) -> Spaces:
    """Index spaces of a traced graph, in time linear in its nodes."""
    return Walk(graph).run()


def live_nodes(graph: Graph) -> set[str]:
    """Nodes that an output depends on."""
    live = set(graph.outputs)
    for n in reversed(graph.nodes):
        if n.name in live:
            live.update(a.name for a in n.all_input_nodes)
    return live


class Walk:
    """One pass over the nodes: each operator's rule ties or creates axes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.spaces = Spaces(graph, {})
        self.hidden: list[Axes] = []  # statistics inside an operator: tensors without the reduced axes
        self.picking: dict[str, Axis] = {}  # tensors of indices, by the axis they were found along
        self.shared: dict[str, Axes] = {}
        self.carried: set[str] = set()
        self.alive = {n.name: n for n in graph.nodes}

    @property
    def axes(self) -> dict[str, Any]:
        return self.spaces.axes

    def run(self) -> Spaces:
        live = live_nodes(self.graph)
        for n in self.graph.nodes:
            statistics = "batch_norm" in operator_name(n)  # nothing reads them now, but they follow their channels
            if n.name not in live and n.op != "placeholder" and not statistics:
                continue
            result = self._placeholder(n) if n.op in ("placeholder", "get_attr") else self._operator(n)
            if result is not None:
                self.axes[n.name] = result
        for name in self.graph.outputs:
            for a in self.axes.get(name, ()):
                freeze(a, "model output")
        self._number()
        return self.spaces

    # -- leaves of the graph --

    def _placeholder(self, n: Node) -> Axes | None:
        if n.name in self.graph.holders:
            name = self.graph.holders[n.name]
            fresh = [Axis(s) for s in self.graph.params[name].shape]
            return self.shared.setdefault(name, fresh)
        if n.name in self.graph.buffers:
            value = self.graph.buffers[n.name]
            if n.name.endswith(_RUNNING) and value.dim() == 1:
                self.carried.add(n.name)
                self.spaces.carriers += (n.name,)
                return [Axis(s) for s in value.shape]
            return self._constant(n, value)
        example = n.meta.get("val")
        return [Axis(s, "model input") for s in example.shape] if isinstance(example, Tensor) else None

    def _constant(self, n: Node, value: Any) -> Axes | None:
        """Axes of a constant: free where it does not vary, shared where it is invariant under joint exchanges, else frozen."""
        if not isinstance(value, Tensor):
            return None
        if value.device.type == "meta" or value.numel() > CONSTANT_ELEMENTS:
            return [Axis(s, None if s == 1 else f"constant {n.name}") for s in value.shape]
        self.spaces.constants[n.name] = value
        return constant_axes(value, f"constant {n.name} varies along it")

    # -- operators --

    def _operator(self, n: Node) -> Any:
        kind = self.graph.kind.get(n.name)
        moving = any(a.name in self.carried for a in n.all_input_nodes)
        if kind == "const" and not moving:
            return self._constant_operator(n)
        if moving and kind == "const":
            self.carried.add(n.name)
        if not any(a.name in self.axes for a in n.all_input_nodes):
            return self._opaque(n)
        name = operator_name(n)
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in getattr(n.target, "tags", ()) else None)
        try:
            result = rule(self, n, arguments(n)) if rule is not None else None
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            result = None
        return self._opaque(n) if result is None else result

    def _constant_operator(self, n: Node) -> Any:
        known: dict[str, Any] = {}
        for a in n.all_input_nodes:
            if a.name not in self.spaces.constants:
                return self._frozen(n, f"constant {n.name}")
            known[a.name] = self.spaces.constants[a.name]
        val = n.meta.get("val")
        if isinstance(val, Tensor) and val.numel() > CONSTANT_ELEMENTS:
            return self._frozen(n, f"constant {n.name}")
        try:
            value: Any = self.graph._evaluate(n, known)
        except Exception:  # not computable without a device or data: it may vary
            return self._frozen(n, f"constant {n.name}")
        if isinstance(value, (list, tuple)):
            self.spaces.constants[n.name] = value  # type: ignore[assignment]
            return [constant_axes(v, f"constant {n.name} varies along it") if isinstance(v, Tensor) else None for v in value]
        return self._constant(n, value)

    def _opaque(self, n: Node) -> Any:
        """An operator without a rule: everything it touches is frozen."""
        if self.graph.kind.get(n.name) in ("active", "param"):
            why = f"no index rule for {operator_name(n)} ({n.name})"
            self.spaces.unknown[n.name] = operator_name(n)
            for a in n.all_input_nodes:
                for axis in _flat(self.axes.get(a.name)):
                    freeze(axis, why)
            return self._frozen(n, why)
        return self._frozen(n, "data")

    def _frozen(self, n: Node, why: str) -> Any:
        value = n.meta.get("val")
        if isinstance(value, Tensor):
            return [Axis(s, why) for s in value.shape]
        if isinstance(value, (list, tuple)):
            return [[Axis(s, why) for s in v.shape] if isinstance(v, Tensor) else None for v in value]
        return None

    # -- results --

    def _number(self) -> None:
        numbered: list[Axis] = []
        tensors: list[Axes] = []
        for name, found in self.axes.items():
            for a in _flat(found):
                for leaf in ax.leaves(a):
                    if leaf.number < 0:
                        leaf.number = len(numbered)
                        numbered.append(leaf)
            relevant = self.graph.kind.get(name) in ("active", "param") or name in self.carried
            if relevant and found:
                tensors.extend(found if isinstance(found[0], list) else [found])
        places = self._places()
        parents = _parents([*tensors, *self.hidden])
        for i, a in enumerate(numbered):
            above = tuple(sorted(parents.get(i, frozenset()) - {i}))
            self.spaces.atoms.append(Atom(i, a.size, a.frozen, tuple(places.get(i, ())), tuple(p for p in above if numbered[p].size > 1)))

    def _places(self) -> dict[int, list[Place]]:
        out: dict[int, list[Place]] = {}
        named = {**{self.graph.holders[h]: h for h in self.graph.holders if h in self.axes}, **{c: c for c in self.spaces.carriers}}
        for tensor, node in named.items():
            for i, a in enumerate(self.axes[node]):
                for slot, block in enumerate(ax.monomials(a)):
                    for atom in dict.fromkeys(block.atoms):
                        out.setdefault(atom, []).append(Place(tensor, i, block, slot))
        return out


def constant_axes(value: Tensor, why: str) -> Axes:
    """Axes of a constant tensor: unfrozen where its entries do not tell indices apart.

    An axis along which nothing varies is free. Axes of one size under whose joint exchange nothing changes (an identity
    matrix) share one free axis. All others are frozen.
    """
    still = [s <= 1 or bool((value == value.narrow(i, 0, 1)).all()) for i, s in enumerate(value.shape)]
    out: list[Axis | None] = [Axis(s) if free else None for s, free in zip(value.shape, still, strict=True)]
    rest = [i for i, a in enumerate(out) if a is None]
    for i in rest:
        group = [j for j in rest if out[j] is None and value.shape[j] == value.shape[i]]
        if out[i] is None and len(group) > 1 and _jointly_invariant(value, group):
            shared = Axis(value.shape[i])
            for j in group:
                out[j] = shared
    return [Axis(value.shape[i], why) if a is None else a for i, a in enumerate(out)]


def _jointly_invariant(value: Tensor, group: Sequence[int]) -> bool:
    n = value.shape[group[0]]
    for order in (torch.arange(n).roll(1), torch.tensor([1, 0, *range(2, n)])):
        moved = value
        for axis in group:
            moved = moved.index_select(axis, order)
        if not torch.equal(moved, value):
            return False
    return True


def _parents(tensors: Sequence[Sequence[Axis]]) -> dict[int, frozenset[int]]:
    """For each atom the atoms found in every tensor (block by block) that carries it, or by which its entries were picked."""
    out: dict[int, frozenset[int]] = {}
    for tensor in tensors:
        blocks = [[frozenset(m.atoms) for m in ax.monomials(a)] or [frozenset()] for a in tensor if a.size != 1]
        common = [frozenset.intersection(*b) | _picking(a) for b, a in zip(blocks, (a for a in tensor if a.size != 1), strict=True)]
        for i, axis_blocks in enumerate(blocks):
            elsewhere = frozenset().union(*common[:i], *common[i + 1 :])
            for atoms in axis_blocks:
                for atom in atoms:
                    seen = atoms | elsewhere
                    out[atom] = out[atom] & seen if atom in out else seen
    return out


def _picking(a: Axis) -> frozenset[int]:
    """Atoms of the axis that the entries of an axis were picked from."""
    picks = find(a).picks
    return frozenset(leaf.number for leaf in ax.leaves(picks[1])) if picks and picks[0] and find(picks[1]).kind == "atom" else frozenset()


def _flat(found: Any) -> list[Axis]:
    if not found:
        return []
    return [a for part in found if part for a in part] if any(isinstance(p, list) or p is None for p in found) else list(found)
