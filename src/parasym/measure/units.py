"""Units of a traced graph: maximal sets of non-linear elementwise operators between contractions, whatever the activation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.measure.findings import common
from parasym.measure.moments import Moments
from parasym.symmetry.axes import Monomial
from parasym.symmetry.discrete_actions import grid
from parasym.symmetry.readers import Reader, readers
from parasym.symmetry.spaces import Spaces, live_nodes
from parasym.symmetry.symmetry import Params

CARRY = frozenset(
    {
        "_to_copy", "_unsafe_view", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "alias",
        "amax", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "detach", "dropout",
        "expand", "feature_dropout", "flatten", "getitem", "instance_standardise", "lift_fresh_copy", "max_pool1d", "max_pool2d",
        "max_pool2d_with_indices", "max_pool3d", "mean", "pad", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
        "squeeze", "stack", "standardise", "sum", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "upsample_bilinear2d",
        "upsample_nearest2d", "view",
    }
)  # fmt: skip


def op_name(n: Node) -> str:
    """Name of an operator, without its overload."""
    schema = getattr(n.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(n.target, "__name__", str(n.target))


class _Elementwise:
    """Tells elementwise operators, and which of them are affine in their activations, by asking the operators."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[Any, str | None] = {}
        self.generator = torch.Generator().manual_seed(0)

    def of(self, n: Node) -> str | None:
        """ "affine", "bent", or None for an operator that is not elementwise."""
        if n.op != "call_function" or self.graph.kind.get(n.name) != "active" or not isinstance(n.meta.get("val"), Tensor):
            return None
        if op_name(n) in CARRY - {"to", "clone", "dropout", "alias", "detach", "contiguous", "_to_copy"}:
            return None
        key = (n.target, str(torch.fx.node.map_arg((n.args, n.kwargs), self._sort)))
        if key not in self.known:
            self.known[key] = self._ask(n)
        return self.known[key]

    def _sort(self, a: Node) -> str:
        v = a.meta.get("val")
        return f"{self.graph.kind.get(a.name)}:{v.dtype if isinstance(v, Tensor) else type(v).__name__}"  # type: ignore[return-value]

    def _ask(self, n: Node) -> str | None:
        inputs = n.all_input_nodes
        moving = [a for a in inputs if self.graph.kind.get(a.name) == "active"]
        if not all(isinstance(a.meta.get("val"), Tensor) for a in inputs):
            return None
        shape = n.meta["val"].shape
        if not any(a.meta["val"].shape == shape for a in moving):
            return None
        for width in (64, 1):
            still = {a.name: self._draw(a, width) for a in inputs if a not in moving}
            try:
                return self._answer(n, moving, still)
            except (RuntimeError, IndexError, TypeError, ValueError):
                continue
        return None

    def _draw(self, a: Node, width: int) -> Tensor:
        v = a.meta["val"]
        x = 3 * torch.randn(width, generator=self.generator, dtype=torch.float64)
        return x if v.is_floating_point() else x > 0 if v.dtype == torch.bool else (x > 0).to(v.dtype)

    def _answer(self, n: Node, moving: Sequence[Node], still: Mapping[str, Tensor]) -> str | None:
        first, second = ({a.name: self._draw(a, 64) for a in moving} for _ in range(2))

        def value(at: Mapping[str, Tensor]) -> Tensor:
            return self.graph._evaluate(n, {**still, **at})  # type: ignore[no-any-return]

        y, half = value(first), torch.arange(64) < 32
        mixed = value({k: torch.where(half, v, second[k]) for k, v in first.items()})
        if y.shape != (64,) or not torch.equal(y[:32].nan_to_num(), mixed[:32].nan_to_num()):
            return None
        if not y.is_floating_point() or any(not v.is_floating_point() for v in first.values()):
            return "bent"
        zero = value({k: torch.zeros_like(v) for k, v in first.items()})
        both = value({k: v + second[k] for k, v in first.items()})
        gap = both + zero - y - value(second)
        return "affine" if bool((gap.abs() <= 1e-9 * (y.abs() + both.abs() + 1)).all()) else "bent"


@dataclass(frozen=True)
class Source:
    """Where an input of a region comes from.

    Attributes:
        writers: contractions that write it.
        path: nodes between them and the input, in order.
        vectors: parameters that act unit by unit on the way.
        foreign: something else than contractions writes it too.
        shared: what is written is read elsewhere as well.
    """

    writers: tuple[Reader, ...]
    path: tuple[Node, ...]
    vectors: tuple[str, ...]
    foreign: bool
    shared: bool


@dataclass(frozen=True)
class Use:
    """A contraction that reads a region's units: its operand, and (n, m) columns of its weight."""

    reader: Reader
    operand: str
    columns: Tensor

    def owned(self, params: Params) -> int:
        """Entries of the weight that read one unit."""
        W = params[self.reader.weight]
        return self.columns.shape[1] * W.numel() // W.shape[self.reader.in_axis]


@dataclass(frozen=True)
class Region:
    """One run of non-linear elementwise operators.

    Attributes:
        nodes: its operators.
        inputs: activations that enter, floating point, each with its source.
        output: the node whose values leave.
        axis: where its units lie.
        uses: who reads it; ``leaks``: it is also read by something that is no plain contraction.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    sources: tuple[Source, ...]
    output: Node
    axis: int
    uses: tuple[Use, ...]
    leaks: bool
    vectors: tuple[str, ...]


@dataclass
class Layer:
    """Units that one set of weights writes; a recurrent layer has a region for each step.

    Attributes:
        regions: where they are computed.
        size: number of units.
        where: module path of what writes them.
        rows: parameter -> (axis, (n, m) positions of each unit): the in-side.
    """

    regions: list[Region]
    size: int
    where: str
    rows: dict[str, tuple[int, Tensor]]
    moments: Moments | None = None
    wider: Moments | None = None  # fresh data included
    effective: list[Tensor] | None = None  # (n, d) for each input: affine map from activations to pre-activation
    powers: tuple[float | None, ...] = ()
    signs: tuple[int, ...] = ()  # for each input +1 even, -1 odd, 0 neither

    @property
    def writers(self) -> list[Reader]:
        """Contractions that write the units."""
        return list({(r.weight, r.out_axis): r for g in self.regions for s in g.sources for r in s.writers}.values())

    @property
    def uses(self) -> list[Use]:
        """Contractions that read them."""
        return list({(u.reader.weight, u.reader.in_axis): u for g in self.regions for u in g.uses}.values())

    @property
    def private(self) -> bool:
        """In-weights serve these units alone."""
        return bool(self.rows) and not any(g.leaks or any(s.foreign or s.shared for s in g.sources) for g in self.regions)

    @property
    def axis(self) -> int | None:
        """Axis of the first in-weight along which unit j is entry j."""
        axis, at = next(iter(self.rows.values()), (None, torch.zeros(0, 1)))
        return axis if torch.equal(at, torch.arange(self.size)[:, None]) else None

    @property
    def parameters(self) -> list[str]:
        """In-side first, then the weights of the readers."""
        return list(dict.fromkeys([*self.rows, *(u.reader.weight for u in self.uses)]))


def find_layers(graph: Graph, spaces: Spaces) -> list[Layer]:
    """All units between contractions; needs no values."""
    finder = Finder(graph, spaces)
    layers: list[Layer] = []
    for region in finder.regions():
        keys = {(r.weight, r.out_axis) for s in region.sources for r in s.writers}
        size = region.output.meta["val"].shape[region.axis]
        same = next((x for x in layers if x.size == size and keys & {(r.weight, r.out_axis) for r in x.writers}), None)
        if same is not None:
            same.regions.append(region)
            same.rows.update({k: v for k, v in finder.rows(region).items() if k not in same.rows})
        else:
            layers.append(Layer([region], size, "", finder.rows(region)))
    for layer in layers:
        weights = [r.weight for r in layer.writers] or [u.reader.weight for u in layer.uses]
        layer.where = common(weights)
    return layers


class Finder:
    """Regions of a graph."""

    def __init__(self, graph: Graph, spaces: Spaces) -> None:
        self.graph, self.spaces = graph, spaces
        live = live_nodes(graph)
        self.nodes = [n for n in graph.nodes if n.name in live]
        self.live = live
        ask = _Elementwise(graph)
        self.sort = {n.name: ask.of(n) for n in self.nodes}
        self.readers = {r.node: r for r in readers(graph)}
        self.order = {n.name: i for i, n in enumerate(self.nodes)}

    def active(self, n: Node) -> list[Node]:
        """Activations that enter a node."""
        return [a for a in n.all_input_nodes if self.graph.kind.get(a.name) == "active"]

    def users(self, n: Node) -> list[Node]:
        """Nodes that read it, of those an output depends on."""
        return [u for u in n.users if u.name in self.live]

    def boundary(self, n: Node) -> bool:
        """Its value leaves the elementwise part."""
        return n.name in self.graph.outputs or any(self.sort[u.name] is None for u in self.users(n))

    def regions(self) -> list[Region]:
        """All runs of non-linear elementwise operators with units."""
        out = []
        for members in self._components():
            found = self._region(members)
            if found is not None:
                out.append(found)
        return out

    def _components(self) -> list[set[str]]:
        """Bent operators joined by elementwise paths that stay inside, with those paths."""
        group: dict[str, set[str]] = {}
        reach: dict[str, set[str]] = {}  # bent operators seen upstream along elementwise nodes, through no boundary
        through: dict[str, set[str]] = {}  # affine nodes on the way
        for n in self.nodes:
            sort = self.sort[n.name]
            if sort is None:
                continue
            seen, way = set[str](), set[str]()
            for a in self.active(n):
                if self.sort.get(a.name) is not None and not self.boundary(a):
                    seen |= reach[a.name]
                    way |= through[a.name]
            if sort == "bent":
                merged = {n.name} | way
                for m in seen:
                    merged |= group[m]
                for m in merged:
                    group[m] = merged
                reach[n.name], through[n.name] = {n.name}, set()
            else:
                reach[n.name], through[n.name] = seen, (way | {n.name}) if seen else set()
        unique = {id(g): g for g in group.values()}
        return [self._heads(self._tail(set(g))) for g in sorted(unique.values(), key=lambda g: min(self.order[m] for m in g))]

    def _tail(self, members: set[str]) -> set[str]:
        """Add affine nodes that put a region together with what it was computed from (x + sin(x)^2)."""
        above = self._above(members)
        grown = True
        while grown:
            grown = False
            for m in sorted(members, key=self.order.__getitem__):
                if self.boundary(self._node(m)):
                    continue
                for u in self.users(self._node(m)):
                    if u.name in members or self.sort[u.name] != "affine":
                        continue
                    others = [a.name for a in self.active(u) if a.name not in members]
                    if all(o in above for o in others):
                        members |= {u.name} | {x for o in others for x in self._between(o, members)}
                        grown = True
        return members

    def _heads(self, members: set[str]) -> set[str]:
        """Add affine nodes above a region until no two of its inputs come from one activation (x and x / 2)."""
        while True:
            inputs = dict.fromkeys(a.name for m in members for a in self.active(self._node(m)) if a.name not in members)
            above = {
                i: {i} | (self._above({i}) if self.sort[i] == "affine" and not self.boundary(self._node(i)) else set()) for i in inputs
            }
            common = [(above[i] & above[k], above[i] | above[k]) for i, k in itertools.combinations(above, 2) if above[i] & above[k]]
            if not common:
                return members
            both, either = common[0]
            top = max(both, key=self.order.__getitem__)
            lower = {n for n in either if n != top and top in self._above({n})}
            if not lower - members:
                return members
            members |= lower

    def _node(self, name: str) -> Node:
        return self.nodes[self.order[name]]

    def _above(self, members: set[str]) -> set[str]:
        out, stack = set[str](), [a for m in members for a in self.active(self._node(m))]
        while stack:
            a = stack.pop()
            if a.name in out or a.name in members:
                continue
            out.add(a.name)
            if self.sort.get(a.name) == "affine" and not self.boundary(a):
                stack.extend(self.active(a))
        return out

    def _between(self, top: str, members: set[str]) -> set[str]:
        """Affine nodes below ``top`` that lead into a region."""
        below = {top}
        for n in self.nodes[self.order[top] + 1 : max(self.order[m] for m in members)]:
            if self.sort[n.name] == "affine" and any(a.name in below for a in self.active(n)):
                below.add(n.name)
        leads = set(members)
        for n in reversed(self.nodes[: max(self.order[m] for m in members)]):
            if n.name in below and any(u.name in leads for u in self.users(n)):
                leads.add(n.name)
        return leads - members - {top}

    def _region(self, members: set[str]) -> Region | None:
        nodes = tuple(sorted((self._node(m) for m in members), key=lambda n: self.order[n.name]))
        outs = [n for n in nodes if n.name in self.graph.outputs or any(u.name not in members for u in self.users(n))]
        inputs = tuple(dict.fromkeys(a for n in nodes for a in self.active(n) if a.name not in members))
        if not outs or not inputs or not all(i.meta["val"].is_floating_point() for i in inputs):
            return None
        sources = tuple(self._source(i, members) for i in inputs)
        best: tuple[int, int, Region] | None = None
        for output in outs:
            if not output.meta["val"].is_floating_point() or output.name in self.graph.outputs:
                continue
            reached, leaks = self.reached(output, members)
            for axis in range(output.meta["val"].dim()):
                region = self._at(nodes, inputs, sources, output, axis, reached, leaks or len(outs) > 1)
                hits = 0 if region is None else len(region.uses) + len(self.rows(region))
                if region is not None and hits and (best is None or hits > best[0]):
                    best = (hits, axis, region)
        return best[2] if best else None

    def _at(
        self,
        nodes: tuple[Node, ...],
        inputs: tuple[Node, ...],
        sources: tuple[Source, ...],
        output: Node,
        axis: int,
        reached: list[tuple[Reader, str]],
        leaks: bool,
    ) -> Region | None:
        """The region with its units on one axis, or None if they cannot lie there."""
        size, rank = output.meta["val"].shape[axis], output.meta["val"].dim()
        like = self.blocks(output, axis)
        if size < 2 or like is None:
            return None
        if any(i.meta["val"].dim() != rank or i.meta["val"].shape[axis] != size for i in inputs):
            return None
        uses = []
        for r, operand in reached:
            at = columns(self.spaces, like, r.weight, r.in_axis)
            if at is not None:
                uses.append(Use(r, operand, at))
        if not uses and all(self._sums(u, like) for u in self.users(output) if u not in nodes):
            return None  # a statistic over the units, not a unit
        vectors = tuple(p for n in nodes for p in self.graph.parameters_of(n))
        return Region(nodes, inputs, sources, output, axis, tuple(uses), leaks or len(uses) < len(reached), vectors)

    def blocks(self, n: Node, axis: int) -> tuple[Monomial, ...] | None:
        """What an axis of an activation is made of; None where it has no index spaces of its own."""
        found = self.spaces.axes.get(n.name)
        return self.spaces.blocks(n.name, axis) if found and not isinstance(found[0], list) else None

    def _sums(self, n: Node, like: Sequence[Monomial]) -> bool:
        """Reduces over the units."""
        rank = n.meta["val"].dim() if isinstance(n.meta.get("val"), Tensor) else 0
        left = {a for axis in range(rank) for b in self.blocks(n, axis) or () for a in b.atoms}
        return op_name(n) in ("mean", "sum", "amax", "var", "norm", "linalg_vector_norm") and not left & {a for b in like for a in b.atoms}

    def rows(self, region: Region) -> dict[str, tuple[int, Tensor]]:
        """In-side parameters with the positions of each unit."""
        like = self.blocks(region.output, region.axis) or ()
        out: dict[str, tuple[int, Tensor]] = {}
        for s in region.sources:
            for r in s.writers:
                at = columns(self.spaces, like, r.weight, r.out_axis)
                if at is not None:
                    out[r.weight] = (r.out_axis, at)
        if not out:
            return out
        for p in dict.fromkeys([*(v for s in region.sources for v in s.vectors), *region.vectors]):
            shape = self.graph.params[p].shape
            for axis in range(len(shape)):
                at = columns(self.spaces, like, p, axis) if shape[axis] > 1 and shape[axis] == self.graph.params[p].numel() else None
                if at is not None:
                    out.setdefault(p, (axis, at))
        return out

    def _source(self, z: Node, members: set[str]) -> Source:
        writers, path, foreign, stack, vectors = list[Reader](), dict[str, Node](), False, [z], dict[str, None]()
        while stack:
            n = stack.pop()
            if n.name in path:
                continue
            path[n.name] = n
            if n.name in self.readers:
                writers.append(self.readers[n.name])
            elif self.sort.get(n.name) == "affine" or (op_name(n) in CARRY and self.sort.get(n.name) is None):
                vectors |= dict.fromkeys(self.graph.parameters_of(n))
                stack.extend(self.active(n))
            else:
                foreign = True
        inside = path.keys() | members
        shared = any(u.name not in inside for n in path.values() for u in self.users(n))
        return Source(tuple(writers), tuple(sorted(path.values(), key=lambda n: self.order[n.name])), tuple(vectors), foreign, shared)

    def reached(self, output: Node, members: set[str]) -> tuple[list[tuple[Reader, str]], bool]:
        """Contractions that read a node's units, possibly after operators that act unit by unit; and whether anything else does."""
        found, leaks, seen, stack = list[tuple[Reader, str]](), False, {output.name}, [output]
        while stack:
            n = stack.pop()
            leaks |= n.name in self.graph.outputs
            for u in self.users(n):
                if u.name in members or u.name in seen:
                    continue
                if u.name in self.readers:
                    found.append((self.readers[u.name], n.name))
                elif op_name(u) in CARRY or (self.sort[u.name] is not None and len(self.active(u)) == 1):
                    seen.add(u.name)
                    stack.append(u)
                else:
                    leaks = True
        return found, leaks


def columns(spaces: Spaces, like: Sequence[Monomial], tensor: str, axis: int) -> Tensor | None:
    """(n, m) indices along an axis of a tensor that belong to each index of an axis made of the blocks ``like``."""
    blocks = spaces.blocks(tensor, axis)
    if [(b.atoms, b.sizes) for b in like] == [(b.atoms, b.sizes) for b in blocks]:
        return torch.arange(sum(math.prod(b.sizes) for b in blocks))[:, None]
    if len({b.atoms for b in like}) < len(like):
        return None
    parts = []
    for b in like:
        hits = [_align(b, c) for c in blocks if b.atoms and set(b.atoms) <= set(c.atoms)]
        if not hits:
            return None
        parts.append((grid(b).reshape(-1), torch.cat(hits, 1)))
    if len({p.shape[1] for _, p in parts}) > 1:
        return None
    out = torch.zeros(sum(len(p) for _, p in parts), parts[0][1].shape[1], dtype=torch.long)
    if int(max(at.max() for at, _ in parts)) >= len(out):
        return None
    for at, p in parts:
        out[at] = p
    return out


def _align(b: Monomial, c: Monomial) -> Tensor:
    """Positions in block c, one row for each index of block b."""
    first = [c.atoms.index(a) for a in b.atoms]
    rest = [k for k in range(len(c.atoms)) if k not in first]
    return grid(c).permute(*first, *rest).reshape(math.prod(b.sizes), -1)
