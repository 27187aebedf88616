"""A traced graph at other widths: fewer layers, smaller index spaces, the same operators.

Index spaces say what every axis of every tensor is made of, so a graph can be rewritten at any size: choose a size for each
atom of the parameters, recreate the parameters, cut constants down to the indices that remain, and rewrite the integers in the
arguments of reshapes, slices, splits and their kin. Spatial sizes are not chosen: they follow from the size of the input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.errors import ParasymError
from parasym.core.graph import Graph
from parasym.symmetry import axes as ax
from parasym.symmetry.axes import Axis
from parasym.symmetry.spaces import Spaces, _arguments, _flat, _name

_LARGEST_CONSTANT = 1 << 24
_BATCH = 7
_ODD = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError)  # an operator used in a way no rule foresees


class Misfit(ParasymError):
    """The chosen sizes do not fit together."""


class Growth(Misfit):
    """A constant that varies along an axis would have to be longer than it is."""


class _Unbound(Exception):
    """The size of an index space is not known yet."""


# -- fewer layers --------------------------------------------------------------------------------------------------------------


@dataclass
class Layers:
    """Which layers were taken out.

    Attributes:
        names: canonical parameter name -> the name of the parameter that stands for it.
        repeats: container -> (layers before, layers after).
    """

    names: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, tuple[int, int]] = field(default_factory=dict)


def truncate(graph: Graph, keep: int) -> tuple[Graph, Layers]:
    """At most ``keep`` layers of each kind in every container of repeated layers.

    What read the result of a layer that goes reads the last kept layer of its kind instead. A container is left alone when a
    parameter of a layer that stays would no longer be read.
    """
    layers = Layers({n: n for n in graph.params})
    done: set[str] = set()
    while True:
        path = next((p for p in sorted(_containers(graph), key=lambda p: (p.count("."), p)) if p not in done), None)
        if path is None:
            return graph, layers
        done.add(path)
        members = _containers(graph)[path]
        kinds = {i: _signature(graph, f"{path}.{i}" if path else i, nodes) for i, nodes in members.items()}
        for few in range(keep, len(members)):
            stand_in = _stand_ins(kinds, few)
            if not stand_in:
                break
            swap = {a.name: b for i, j in stand_in.items() for a, b in zip(members[i], members[j], strict=True)}
            smaller = rebuild(graph, swap)
            moved = {n: _moved(n, path, stand_in) for n in graph.params}
            if set(moved.values()) - set(graph.dead) <= set(smaller.params):
                graph = smaller
                layers.names = {n: moved.get(m, m) for n, m in layers.names.items()}
                break
        else:
            stand_in = {}
        _note(layers, path, len(members), len(members) - len(stand_in), stand_in)


def _note(layers: Layers, path: str, before: int, after: int, stand_in: Mapping[str, str]) -> None:
    """Enter a container whose layers have parts, and the same one inside layers that went."""
    start = f"{path}." if path else ""
    inside = [n[len(start) :] for n in layers.names.values() if n.startswith(start)]
    if before == after and not all(n.count(".") > 1 for n in inside if n.partition(".")[0].isdigit()):
        return
    layers.repeats[path] = (before, after)
    for name, kept in layers.names.items():
        parts, others = name.split("."), kept.split(".")
        depth = path.count(".") + 1 if path else 0
        if len(parts) > depth and ".".join(others[:depth]) == path and parts[depth].isdigit():
            layers.repeats[".".join(parts[:depth])] = (before, after)


def _moved(name: str, path: str, stand_in: Mapping[str, str]) -> str:
    start = f"{path}." if path else ""
    if not name.startswith(start):
        return name
    head, _, rest = name[len(start) :].partition(".")
    return f"{start}{stand_in[head]}.{rest}" if head in stand_in else name


def _containers(graph: Graph) -> dict[str, dict[str, list[Node]]]:
    """Path -> index -> nodes, for modules whose numbered children hold parameters; at least two of them."""
    owners = {m.group(1) for n in graph.params for m in re.finditer(r"(?=((?:^|.*?\.)\d+)\.)", n)}
    owners |= {".".join(n.split(".")[: i + 1]) for n in graph.params for i, part in enumerate(n.split(".")) if part.isdigit()}
    found: dict[str, dict[str, list[Node]]] = {}
    for n in graph.nodes:
        if n.op == "placeholder":
            continue
        for path in dict.fromkeys(p.partition("@")[0] for p, _ in (n.meta.get("nn_module_stack") or {}).values()):
            container, _, index = path.rpartition(".")
            if index.isdigit() and path in owners:
                found.setdefault(container, {}).setdefault(index, []).append(n)
    return {p: members for p, members in found.items() if len(members) > 1}


def _signature(graph: Graph, path: str, nodes: Sequence[Node]) -> tuple[Any, ...]:
    """A layer up to the names of its parameters: equal for layers that can stand in for each other."""
    at = {n.name: i for i, n in enumerate(nodes)}

    def where(a: Node) -> Any:
        if a.name in at:
            return "layer", at[a.name]
        if a.name in graph.holders:
            name = graph.holders[a.name]
            inside = name.startswith(path + ".")
            return "parameter", name[len(path) :] if inside else name, tuple(graph.params[name].shape)
        return "outside", _shape(a)

    def arguments(n: Node) -> str:
        return repr(torch.fx.node.map_arg((n.args, n.kwargs), where))  # type: ignore[arg-type]

    return tuple((str(n.target), arguments(n), _shape(n)) for n in nodes)


def _shape(n: Node) -> Any:
    value = n.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(tuple(v.shape) for v in value if isinstance(v, Tensor)) if isinstance(value, (list, tuple)) else None


def _stand_ins(kinds: Mapping[str, Any], keep: int) -> dict[str, str]:
    kept: dict[Any, list[str]] = {}
    out = {}
    for i in sorted(kinds, key=int):
        same = kept.setdefault(kinds[i], [])
        if len(same) < keep:
            same.append(i)
        else:
            out[i] = same[-1]
    return out


def rebuild(graph: Graph, swap: Mapping[str, Node]) -> Graph:
    """The graph with some nodes replaced by others that come before them; what nothing reads any more is dropped."""
    nodes = {n.name: n for n in graph.nodes}

    def target(n: Node) -> Node:
        return nodes[swap[n.name].name] if n.name in swap else n

    outputs = [target(nodes[o]).name for o in graph.outputs]
    live = set(outputs)
    for n in reversed(graph.nodes):
        if n.name in live:
            live.update(target(a).name for a in n.all_input_nodes)
    fx = torch.fx.Graph()
    new: dict[str, Node] = {}
    for n in graph.nodes:
        if n.name in live or n.name in graph.inputs:
            new[n.name] = fx.node_copy(n, lambda a: new[target(a).name])
    fx.output(tuple(new[o] for o in outputs))
    return _graph_like(graph, fx, new, outputs)


def _graph_like(graph: Graph, fx: torch.fx.Graph, new: Mapping[str, Node], outputs: Sequence[str]) -> Graph:
    """A graph object around new nodes (old name -> node)."""
    holders = {new[h].name: p for h, p in graph.holders.items() if h in new}
    used = set(holders.values())
    return Graph(
        fx=fx,
        params={n: p for n, p in graph.params.items() if n in used},
        aliases={a: c for a, c in graph.aliases.items() if c in used},
        buffers={new[b].name: v for b, v in graph.buffers.items() if b in new},
        holders=holders,
        inputs=[new[i].name for i in graph.inputs],
        kind={new[n].name: k for n, k in graph.kind.items() if n in new},
        outputs=list(dict.fromkeys(new[o].name for o in outputs)),
        trace=graph.trace,
        module=graph.module,
        kinds_of_input=list(graph.kinds_of_input),
    )


# -- sizes ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """How small to make things.

    Attributes:
        base: least width.
        norm: least width of an axis that something averages over.
        distinct: different widths stay different.
        kernel: largest convolution kernel.
        cap: largest plain width.
        length: size of sequence and image axes of the input.
        samples: size of the batch.
    """

    base: int
    norm: int
    distinct: bool
    kernel: int
    cap: int = 99
    length: int = 5
    samples: int = _BATCH


class Choice:
    """Which atoms of a graph may be resized freely, and what they are."""

    def __init__(self, graph: Graph, spaces: Spaces) -> None:
        self.graph, self.spaces = graph, spaces
        self.size = {a.number: a.size for a in spaces.atoms}
        self.inputs = [self._leaves(spaces.axes[i]) for i in graph.inputs if i in spaces.axes]
        self.batch = {leaf for i in graph.inputs for leaf in self._leaves(spaces.axes.get(i, [])[:1])}
        self.taps, self.rows, self.normed, self.mixed = set[int](), dict[int, int](), set[int](), set[int]()
        self.patch: set[int] = set()
        self.fixed: set[int] = set()  # rows read at fixed places
        self.derived = self._walk()
        self.held = {n for name in graph.params for n in self._leaves(spaces._by_tensor.get(name, []))}

    @staticmethod
    def _leaves(axes: Any) -> list[int]:
        return [leaf.number for a in _flat(axes) for leaf in ax.leaves(a)]

    def _walk(self) -> set[int]:
        derived: set[int] = set()
        for n in self.graph.nodes:
            if n.op != "call_function" or self.graph.kind.get(n.name) == "const" or n.name not in self.spaces.axes:
                continue
            name, a = _name(n), _arguments(n)
            self._note(n, name, a)
            if name in ("expand", "repeat", "repeat_interleave", "topk", "expand_as"):
                continue
            before = {leaf for b in n.all_input_nodes for leaf in self._leaves(self.spaces.axes.get(b.name))}
            derived |= set(self._leaves(self.spaces.axes[n.name])) - before
        return (derived | (self.fixed - self.rows.keys())) - {leaf for leaves in self.inputs for leaf in leaves}

    def _note(self, n: Node, name: str, a: Mapping[str, Any]) -> None:
        axes = self.spaces.axes
        if "conv" in name and isinstance(a.get("weight"), Node):
            taps = self._leaves(axes[a["weight"].name][2:])
            self.taps |= set(taps)
            stride = a.get("stride") or [1]
            kernel = [i.size for i in axes[a["weight"].name][2:]]
            if all(k == stride[i % len(stride)] and k > 1 for i, k in enumerate(kernel)):
                self.patch |= set(taps)
        if name == "embedding":
            table = axes[a["weight"].name]
            for leaf in self._leaves(table[:1]):
                if self.graph.kind.get(a["indices"].name) == "const":
                    self.fixed.add(leaf)
                else:
                    self.rows[leaf] = table[1].size
        if name in ("layer_norm", "rms_norm", "mean", "var", "std", "norm", "linalg_vector_norm", "sum"):
            self.normed |= set(self._leaves(self._reduced(n, name, a)))
        if n.name in self.spaces.contractions and name != "embedding":
            self._contracted(n)

    def _reduced(self, n: Node, name: str, a: Mapping[str, Any]) -> list[Axis]:
        source = n.all_input_nodes[0]
        x = self.spaces.axes.get(source.name) or []
        if name in ("layer_norm", "rms_norm"):
            return x[len(x) - len(a["normalized_shape"]) :]
        dims = a.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or range(len(x))
        return [x[d] for d in dims]

    def _contracted(self, n: Node) -> None:
        """Atoms that a parameter sums over: features, not lengths."""
        kind = self.graph.kind
        for operand, labels in self.spaces.contractions[n.name].operands:
            if kind.get(operand) == "param":
                summed = [i for i, x in enumerate(labels) if x is not None and x not in self.spaces.contractions[n.name].out]
                for i in summed:
                    self.mixed |= set(self._leaves([self.spaces.axes[operand][i]]))

    @property
    def lengths(self) -> list[int]:
        """Atoms of the input that are neither samples nor features, by size."""
        found = {leaf for leaves in self.inputs for leaf in leaves} - self.batch - self.mixed
        return sorted((f for f in found if self.size[f] > 1), key=lambda f: self.size[f])

    def sizes(self, level: Level) -> dict[int, int]:
        """A size for every atom that is chosen rather than derived."""
        out = {f: level.samples for f in self.batch if self.size[f] > 1}
        for i, s in enumerate(sorted({self.size[f] for f in self.lengths})):
            out |= {f: min(s, level.length + i) for f in self.lengths if self.size[f] == s}
        for tap in self.taps:
            s = self.size[tap]
            out[tap] = 2 if tap in self.patch and s > 1 else s if s <= level.kernel else max(2, level.kernel - (level.kernel - s) % 2)
        inputs = {leaf for leaves in self.inputs for leaf in leaves}
        free = (self.held | (inputs & self.mixed)) - self.derived - out.keys()
        factors, products = self._factors(free)
        out |= factors
        out |= self._widths(free - factors.keys(), products, out, level)
        return out

    def _factors(self, free: set[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Atoms inside products (heads times width), and the products by full size -> small size."""
        out: dict[int, int] = {}
        blocks = [(name, i) for name in self.graph.params for i, p in enumerate(self.graph.params[name].shape) if p > 1]
        for name, i in blocks:
            found = self.spaces.blocks(name, i)
            parts = [b for b in found if len(b.atoms) > 1 and not self.derived & set(b.atoms)]
            inner: dict[tuple[int, ...], list[int]] = {}
            for b in parts:
                inner.setdefault(b.atoms[:-1], []).append(b.atoms[-1])
            for outer, last in inner.items():
                for atom in outer:
                    if atom in free:
                        out[atom] = min(self.size[atom], 2)
                doubled = any(last.count(x) > 1 for x in last) and _paired(found)
                for atom in last:
                    if atom in free:
                        out[atom] = min(out.get(atom, 9), self.size[atom], 2 if doubled else 3)
        products = {}
        for name, i in blocks:
            found = self.spaces.blocks(name, i)
            if len(found) == 1 and len(found[0].atoms) > 1 and all(a in out for a in found[0].atoms):
                products[math.prod(found[0].sizes)] = math.prod(out[a] for a in found[0].atoms)
        return out, products

    def _widths(self, free: set[int], products: Mapping[int, int], known: Mapping[int, int], level: Level) -> dict[int, int]:
        """Plain widths: in the order of the full ones, equal where those are equal."""
        out: dict[int, int] = {}
        last = level.base - 1
        for s in sorted({self.size[f] for f in free} | set(products)):
            group = [f for f in free if self.size[f] == s]
            if s in products:
                value = max(products[s], last if not level.distinct else 0)
            else:
                value = min(max(last + (1 if level.distinct else 0), level.base), max(level.cap, last))
            if any(f in self.normed for f in group):
                value = max(value, level.norm)
            for f in group:
                out[f] = min(s, value)
            last = max(last, min(s, value))
        for f in self.rows:
            if f in out:
                small = next((out[g] for g in out if self.size[g] == self.rows[f]), products.get(self.rows[f], 4))
                out[f] = min(self.size[f], max(out[f], small + 3))
        return out


def _paired(found: Sequence[ax.Monomial]) -> bool:
    """Neighbouring blocks over the same atoms, inside a product: the two halves of a rotary embedding."""
    return any(b.atoms == c.atoms and c.offset - b.offset == b.sizes[-1] * b.strides[-1] for b, c in pairwise(found))


# -- rewriting -----------------------------------------------------------------------------------------------------------------


class Resizer:
    """Rewrites a graph at given sizes of its atoms."""

    def __init__(self, graph: Graph, spaces: Spaces, choice: Choice, sizes: Mapping[int, int]) -> None:
        self.graph, self.spaces, self.choice = graph, spaces, choice
        self.sizes = dict(sizes)
        for a in spaces.atoms:
            if a.number not in self.sizes and a.number not in choice.derived:
                self.sizes[a.number] = a.size
        self.carried = self._carried()
        self.generator = torch.Generator().manual_seed(4)
        self.values: dict[str, Any] = {}  # constants of the full graph
        self.meta: dict[str, Any] = {}
        self.args: dict[str, tuple[Any, Any]] = {}
        self.constants: dict[str, Tensor] = {}

    def run(self) -> None:
        """Give every tensor its new shape.

        Raises:
            Misfit: the sizes contradict each other, or an operator refuses them.
        """
        pending = [n for n in self.graph.nodes if self._needed(n)]
        while pending:
            later = []
            for n in pending:
                try:
                    self._step(n)
                except _Unbound:
                    later.append(n)
            if len(later) == len(pending):
                raise Misfit(f"the size of {later[0].name} does not follow from the input")
            pending = later

    @property
    def parameters(self) -> int:
        return sum(math.prod(self.meta[h].shape) for h in {p: h for h, p in self.graph.holders.items()}.values())

    def _needed(self, n: Node) -> bool:
        if n.op == "output":
            return False
        if self.graph.kind.get(n.name) != "const" or n.name in self.carried:
            return True
        return any(self._keeps(u) for u in n.users)

    def _keeps(self, n: Node) -> bool:
        return n.op != "output" and (self.graph.kind.get(n.name) != "const" or n.name in self.carried)

    def _carried(self) -> set[str]:
        """Constants that move with the units: running statistics and what is computed from them."""
        out = set(self.spaces.carriers)
        for n in self.graph.nodes:
            if self.graph.kind.get(n.name) == "const" and any(a.name in out for a in n.all_input_nodes):
                out.add(n.name)
        return out

    # -- sizes of axes --

    def size(self, a: Axis) -> int:
        r = ax.find(a)
        if r.kind == "prod":
            return math.prod(self.size(p) for p in r.parts)
        if r.kind == "sum":
            return sum(self.size(p) for p in r.parts)
        if r.size <= 1:
            return r.size
        if r.number not in self.sizes:
            raise _Unbound
        return self.sizes[r.number]

    def kept(self, a: Axis) -> Tensor:
        """Indices along a full axis that remain, in order."""
        r = ax.find(a)
        if r.kind == "sum":
            parts, offset = [], 0
            for p in r.parts:
                parts.append(self.kept(p) + offset)
                offset += ax.find(p).size
            return torch.cat(parts)
        if r.kind == "prod":
            index = torch.zeros(1, dtype=torch.long)
            for p in r.parts:
                index = (index[:, None] * ax.find(p).size + self.kept(p)).reshape(-1)
            return index
        n = self.size(r)
        if n > r.size:
            raise Growth(f"an axis of size {r.size} would have to grow to {n}")
        return torch.arange(n)

    def bind(self, a: Axis, n: int) -> None:
        """Note the size an operator gave an axis.

        Raises:
            Misfit: another one was expected.
        """
        r = ax.find(a)
        if r.kind == "atom":
            if r.size <= 1 or r.number in self.sizes:
                if self.size(r) != n:
                    raise Misfit(f"an axis of size {r.size} became both {self.size(r)} and {n}")
            else:
                self.sizes[r.number] = n
            return
        open_parts, known = [], []
        for p in r.parts:
            try:
                known.append(self.size(p))
            except _Unbound:
                open_parts.append(p)
        if not open_parts:
            if self.size(r) != n:
                raise Misfit(f"an axis of size {r.size} became both {self.size(r)} and {n}")
        elif len(open_parts) == 1:
            rest = n // max(1, math.prod(known)) if r.kind == "prod" else n - sum(known)
            self.bind(open_parts[0], rest)
            if self.size(r) != n:
                raise Misfit(f"an axis of size {r.size} cannot become {n}")

    # -- nodes --

    def _step(self, n: Node) -> None:
        axes = self.spaces.axes.get(n.name)
        if n.op == "placeholder" or (self.graph.kind.get(n.name) == "const" and n.name not in self.carried):
            self._leaf(n, axes)
            return
        if n.op != "call_function":
            raise Misfit(f"{n.name} is a {n.op}, which cannot be rewritten")
        if _name(n) == "embedding":
            self._fixed_rows(n)
        if any(a.name not in self.meta for a in n.all_input_nodes):
            raise _Unbound
        args, kwargs = self._rewrite(n)
        low = torch.fx.node.map_arg((args, kwargs), lambda a: self.meta[a.name])  # type: ignore[arg-type]
        try:
            out = n.target(*low[0], **low[1])  # type: ignore[operator]
        except Exception as error:
            raise Misfit(
                f"{_name(n)} ({n.name}) refused the new sizes: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}"
            ) from error
        if axes:
            self._bind_all(axes, out)
        self.meta[n.name], self.args[n.name] = out, (args, kwargs)

    def _fixed_rows(self, n: Node) -> None:
        """A table read at fixed places needs the rows that are read."""
        a = _arguments(n)
        rows = ax.find(self.spaces.axes[a["weight"].name][0])
        index = self.constants.get(a["indices"].name)
        if index is None or not index.numel() or rows.kind != "atom" or rows.number in self.sizes:
            return
        if all(_name(u) == "embedding" and u.args[0] is n.args[0] for u in a["indices"].users):  # rows that are never read go
            index = self.constants[a["indices"].name] = index.unique(return_inverse=True)[1]
        self.sizes[rows.number] = min(rows.size, int(index.max()) + 1)

    def _bind_all(self, axes: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            if len(axes) == out.dim():
                for a, s in zip(axes, out.shape, strict=True):
                    self.bind(a, s)
        elif isinstance(out, (list, tuple)):
            for a, o in zip(axes, out, strict=False):
                if a is not None and isinstance(o, Tensor):
                    self._bind_all(a, o)

    def _leaf(self, n: Node, axes: Any) -> None:
        if n.name in self.graph.holders:
            p = self.graph.params[self.graph.holders[n.name]]
            self.meta[n.name] = torch.empty(
                [self.size(a) for a in axes], dtype=torch.float64 if p.is_floating_point() else p.dtype, device="meta"
            )
        elif n.name in self.graph.inputs:
            value = n.meta["val"]
            if not isinstance(value, Tensor):
                raise Misfit(f"input {n.name} is not a tensor")
            self.meta[n.name] = torch.empty(
                [self.size(a) for a in axes], dtype=torch.float64 if value.is_floating_point() else value.dtype, device="meta"
            )
        elif n.name in self.graph.buffers and str(n.target).startswith("p_"):  # a frozen parameter: any values will do
            shape = [self.size(a) for a in axes]
            self.constants[n.name] = 0.5 * torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self.meta[n.name] = self.constants[n.name].to("meta")
        else:
            self.constants[n.name] = self._restricted(self._value(n), axes, n.name)
            self.meta[n.name] = self.constants[n.name].to("meta")

    def _value(self, n: Node) -> Any:
        if n.name not in self.values:
            if n.name in self.graph.buffers:
                value = self.graph.buffers[n.name]
                if value.device.type == "meta":
                    drawn = n.name in self.spaces.carriers or str(n.target).startswith("p_")
                    if not drawn or value.numel() > _LARGEST_CONSTANT:
                        raise Misfit(f"constant {n.name} has no values on the meta device")
                    value = 1 + 0.3 * torch.randn(value.shape, generator=self.generator, dtype=torch.float64).clamp(-2, 2)
                self.values[n.name] = value
            else:
                for a in n.all_input_nodes:
                    self._value(a)
                self.values[n.name] = self.graph._evaluate(n, self.values)
        return self.values[n.name]

    def _restricted(self, value: Any, axes: Any, name: str) -> Tensor:
        if not isinstance(value, Tensor) or value.numel() > _LARGEST_CONSTANT:
            raise Misfit(f"constant {name} is no tensor, or too large")
        if axes is None or len(axes) != value.dim():
            axes = [Axis(s) if s <= 1 else None for s in value.shape]
        for i, a in enumerate(axes):
            if a is not None and value.shape[i] > 1:
                try:
                    value = value.index_select(i, self.kept(a))
                except Growth:
                    if not bool((value == value.narrow(i, 0, 1)).all()):
                        raise
                    value = value.narrow(i, 0, 1).expand(*value.shape[:i], self.size(a), *value.shape[i + 1 :]).contiguous()
        return value.clone()

    def _rewrite(self, n: Node) -> tuple[Any, Any]:
        rule = _REWRITE.get(_name(n))
        if rule is None:
            return n.args, n.kwargs
        changed = rule(self, n, _arguments(n))
        names = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
        args = tuple(changed.pop(names[i], v) for i, v in enumerate(n.args))
        kwargs = {k: changed.pop(k, v) for k, v in n.kwargs.items()}
        return args, {**kwargs, **changed}

    # -- the new graph --

    def build(self) -> Graph:
        """The rewritten graph; its parameters are zero."""
        fx = torch.fx.Graph()
        new: dict[str, Node] = {}
        leaves = [n for n in self.graph.nodes if n.name in self.meta and n.name not in self.args]
        for n in leaves:
            new[n.name] = fx.placeholder(n.name)
        for n in self.graph.nodes:
            if n.name in self.args:
                args, kwargs = torch.fx.node.map_arg(self.args[n.name], lambda a: new[a.name])  # type: ignore[arg-type]
                new[n.name] = fx.create_node("call_function", n.target, args, kwargs, name=n.name)
        for name, node in new.items():
            node.meta["val"] = self.meta[name]
        for n in self.graph.nodes:
            if n.name in new and n.meta.get("nn_module_stack"):
                new[n.name].meta["nn_module_stack"] = n.meta["nn_module_stack"]
        fx.output(tuple(new[o] for o in self.graph.outputs))
        out = _graph_like(self.graph, fx, new, self.graph.outputs)
        out.buffers = {new[c].name: v for c, v in self.constants.items()}
        out.params = {p: torch.zeros(self.meta[h].shape, dtype=torch.float64) for h, p in self.graph.holders.items()}
        out.params = {p: out.params[p] for p in self.graph.params if p in out.params}
        out.module = torch.fx.GraphModule(torch.nn.Module(), fx)
        out.fx = out.module.graph
        out.trace = "resized"
        return out


# -- integers in the arguments of operators ------------------------------------------------------------------------------------

Rewrite = Callable[[Resizer, Node, Mapping[str, Any]], dict[str, Any]]
_REWRITE: dict[str, Rewrite] = {}


def _rewrites(*names: str) -> Callable[[Rewrite], Rewrite]:
    def register(f: Rewrite) -> Rewrite:
        _REWRITE.update(dict.fromkeys(names, f))
        return f

    return register


def _source(r: Resizer, a: Mapping[str, Any]) -> list[Axis]:
    node = next(v for v in a.values() if isinstance(v, Node))
    return list(r.spaces.axes[node.name])


def _new_shape(r: Resizer, axes: Sequence[Axis], count: int | None) -> list[int]:
    """Sizes of axes, one of them from the number of elements where it is not known yet."""
    out: list[int | None] = []
    for a in axes:
        try:
            out.append(r.size(a))
        except _Unbound:
            out.append(None)
    if out.count(None) > 1 or (None in out and count is None):
        raise _Unbound
    known = math.prod(s for s in out if s is not None)
    return [(count or 0) // max(1, known) if s is None else s for s in out]


@_rewrites("reshape", "view", "_unsafe_view", "view_copy", "_reshape_copy")
def _reshape_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    key = "shape" if "shape" in a else "size"
    return {key: _new_shape(r, r.spaces.axes[n.name], r.meta[a["self"].name].numel())}


@_rewrites("unflatten")
def _unflatten_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    x = _source(r, a)
    d = a["dim"] % len(x)
    return {"sizes": _new_shape(r, r.spaces.axes[n.name][d : d + len(a["sizes"])], r.meta[a["self"].name].shape[d])}


@_rewrites("expand", "broadcast_to")
def _expand_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    axes = r.spaces.axes[n.name]
    return {"size": [-1 if s == -1 else r.size(axis) for s, axis in zip(a["size"], axes, strict=True)]}


@_rewrites("repeat")
def _repeat_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    shape = list(r.meta[a["self"].name].shape)
    shape = [1] * (len(a["repeats"]) - len(shape)) + shape
    return {"repeats": [1 if t == 1 else r.size(axis) // s for t, axis, s in zip(a["repeats"], r.spaces.axes[n.name], shape, strict=True)]}


@_rewrites("repeat_interleave")
def _repeat_interleave_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(a.get("repeats"), int):
        return {}
    d = a["dim"] % len(_source(r, a))
    return {"repeats": r.size(r.spaces.axes[n.name][d]) // r.meta[a["self"].name].shape[d]}


def _before(r: Resizer, axis: Axis, index: int) -> int:
    """How many of the first ``index`` indices of a full axis remain."""
    return int((r.kept(axis) < index).sum())


@_rewrites("slice", "narrow")
def _slice_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    x = _source(r, a)
    axis = x[a["dim"] % len(x)]
    size = ax.find(axis).size
    start = a.get("start") or 0
    end = start + a["length"] if "length" in a else size if a.get("end") is None else a["end"]
    start, end = (max(0, min(size, i + size if i < 0 else i)) for i in (start, end))
    if a.get("step", 1) != 1:
        return {"end": r.size(axis)} if a.get("end") is not None else {}
    new = _before(r, axis, start), _before(r, axis, end)
    return {"start": new[0], "length": new[1] - new[0]} if "length" in a else {"start": new[0], "end": new[1]}


@_rewrites("select")
def _select_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    x = _source(r, a)
    axis = x[a["dim"] % len(x)]
    index = a["index"] % ax.find(axis).size
    kept = r.kept(axis).tolist()
    if index not in kept:
        raise Misfit(f"index {index} picked by {n.name} is cut away")
    return {"index": kept.index(index)}


@_rewrites("split", "split_with_sizes")
def _split_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    x = _source(r, a)
    d = a.get("dim", 0) % len(x)
    pieces = [r.size(piece[d]) for piece in r.spaces.axes[n.name]]
    if "split_sizes" in a:
        return {"split_sizes": pieces}
    if isinstance(a["split_size"], (list, tuple)):
        return {"split_size": pieces}
    return {"split_size": pieces[0]}


@_rewrites("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    weight = r.meta[a["weight"].name]
    full = [i.size for i in r.spaces.axes[a["weight"].name]]
    out: dict[str, Any] = {}
    if int(a.get("groups", 1)) != 1:
        x = r.meta[a["input"].name]
        transposed = "transpose" in _name(n) or bool(a.get("transposed", False))
        channel = x.shape[x.dim() - weight.dim() + 1]
        out["groups"] = (
            _leading(r, ax.find(r.spaces.axes[a["input"].name][x.dim() - weight.dim() + 1]), int(a["groups"]))
            if transposed
            else channel // weight.shape[1]
        )
    taps, space = list(weight.shape[2:]), weight.dim() - 2
    if taps != full[2:]:
        stride, pad = list(a.get("stride") or [1]), a.get("padding", 0)
        strides = [stride[i % len(stride)] for i in range(space)]
        out["stride"] = [t if s == k else s for t, k, s in zip(taps, full[2:], strides, strict=True)]
        if not isinstance(pad, str):
            pads = [
                (pad if isinstance(pad, (list, tuple)) else [pad])[i % len(pad) if isinstance(pad, (list, tuple)) else 0]
                for i in range(space)
            ]
            out["padding"] = [min(p, t // 2) if t != k else p for p, t, k in zip(pads, taps, full[2:], strict=True)]
    return out


def _leading(r: Resizer, axis: Axis, count: int) -> int:
    """New size of the leading factors of an axis whose full sizes multiply to ``count``."""
    total, small = 1, 1
    for f in ax.factors(axis):
        if total == count:
            break
        total, small = total * ax.find(f).size, small * r.size(f)
    if total != count:
        raise Misfit(f"groups of {count} channels do not fit the index spaces")
    return small


@_rewrites("group_norm")
def _group_norm_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_groups": _leading(r, ax.find(r.spaces.axes[a["input"].name][1]), int(a["num_groups"]))}


@_rewrites("layer_norm", "rms_norm")
def _layer_norm_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    return {"normalized_shape": list(r.meta[a["input"].name].shape[-len(a["normalized_shape"]) :])}


@_rewrites(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"
)
def _adaptive_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    size = list(a["output_size"])
    x = r.meta[next(v for v in a.values() if isinstance(v, Node)).name]
    full = [i.size for i in _source(r, a)][-len(size) :]
    new = [s if s == 1 else t if s == f else min(s, 2) if s < f else s for s, f, t in zip(size, full, x.shape[-len(size) :], strict=True)]
    return {"output_size": new}


@_rewrites(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
)
def _upsample_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    size = a.get("output_size")
    if size is None:
        return {}
    x = r.meta[next(v for v in a.values() if isinstance(v, Node)).name]
    full = [i.size for i in _source(r, a)][-len(size) :]
    return {"output_size": [round(s / f * t) for s, f, t in zip(size, full, x.shape[-len(size) :], strict=True)]}


@_rewrites("one_hot")
def _one_hot_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_classes": r.size(r.spaces.axes[n.name][-1])}


@_rewrites("embedding")
def _embedding_args(r: Resizer, n: Node, a: Mapping[str, Any]) -> dict[str, Any]:
    """No row is set aside for padding."""
    return {"padding_idx": -1} if a.get("padding_idx", -1) != -1 else {}


# -- trying sizes --------------------------------------------------------------------------------------------------------------

LEVELS = (
    Level(3, 5, True, 7), Level(2, 4, True, 7), Level(2, 4, True, 3), Level(2, 4, True, 3, 5), Level(2, 4, True, 3, 4),
    Level(2, 4, True, 3, 3), Level(2, 4, False, 3), Level(2, 3, False, 3),
)  # fmt: skip
_LENGTHS = (5, 4, 6, 7, 8, 9, 10, 12, 13, 16, 17, 20, 24, 25, 28, 32, 33, 40, 48, 49, 64, 65, 96, 97, 128)


def resized(graph: Graph, spaces: Spaces, budget: int) -> Iterator[Graph | str]:
    """Small versions of a graph, the richest first; a reason for each choice of sizes that did not work."""
    choice = Choice(graph, spaces)
    longest = max((choice.size[f] for f in choice.lengths), default=0)
    lengths = [s for s in _LENGTHS if s < longest] + [longest] if longest else [5]
    samples, own = _BATCH, min([_BATCH, *(choice.size[f] for f in choice.batch)])
    first = 0  # lengths that a model cannot take do not depend on its widths
    for level in LEVELS:
        ran = False
        for i, length in enumerate(lengths[first:], first):
            found = _attempt(graph, spaces, choice, replace(level, length=length, samples=samples))
            if isinstance(found, Exception) and own != samples:  # constants or reshapes may be made for the given batch
                again = _attempt(graph, spaces, choice, replace(level, length=length, samples=own))
                found, samples = (found, samples) if isinstance(again, Exception) else (again, own)
            if isinstance(found, Exception):
                yield str(found) if isinstance(found, Misfit) else f"{type(found).__name__}: {found}"
                continue
            first, ran = (first if ran else i), True
            if found.parameters > budget:
                yield f"{found.parameters} parameters, {budget} allowed"
                break
            yield found.build()


def _attempt(graph: Graph, spaces: Spaces, choice: Choice, level: Level) -> Resizer | Exception:
    try:
        sizer = Resizer(graph, spaces, choice, choice.sizes(level))
        sizer.run()
    except (Misfit, *_ODD) as error:
        return error
    return sizer


def draw_inputs(
    graph: Graph, given: Iterable[Tensor], sizer_shapes: Sequence[torch.Size], rows: Mapping[str, int], generator: torch.Generator
) -> list[Tensor]:
    """Inputs of the same kind as the given ones, at the shapes of a rewritten graph."""
    out = []
    for name, t, shape in zip(graph.inputs, given, sizer_shapes, strict=True):
        if t.is_floating_point():
            known = t.device.type != "meta" and t.numel() > 1
            spread, centre = (float(t.std()), float(t.mean())) if known else (1.0, 0.0)
            out.append(centre + (spread or 1.0) * torch.randn(shape, generator=generator, dtype=torch.float64))
        elif name in rows:
            out.append(torch.randint(0, rows[name], shape, generator=generator, dtype=t.dtype))
        elif t.device.type == "meta":
            out.append(torch.ones(shape, dtype=t.dtype) if t.dtype == torch.bool else torch.zeros(shape, dtype=t.dtype))
        else:
            for i, s in enumerate(shape):
                t = t.index_select(i, torch.arange(s) % t.shape[i])
            out.append(t)
    return out
