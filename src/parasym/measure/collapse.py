"""Where trained weights sit relative to the collapsed states: units that are dead, zero, copies or affine, heads and factors that
lost rank, channels whose gain vanished, rows and parameters that nothing reads, factors out of balance.

Units are found from the graph: maximal sets of non-linear elementwise operators between contractions, whatever the activation.
What a finding is worth is measured, not argued: the units are removed in a copy of the parameters (out-weights zeroed, constants
folded into the next bias, copies merged) and the outputs compared in float64, on the given data and on fresh data of the same kind.

Sources: stochastic-collapse R7 (zero and duplicate neurons), dcs-mirror-symmetry R4 (which state each symmetry collapses to),
_symmetry-catalog section 0 (charges of GL and rescaling), law-of-balance (balance of factors).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.core.guards import rng_state
from parasym.core.samples import Batch, draw
from parasym.measure.neurons import IndependentNeurons
from parasym.symmetry.axes import Monomial
from parasym.symmetry.dictionary import Copies, Entry, Place, Term, by_unit, tangent
from parasym.symmetry.discrete_actions import grid
from parasym.symmetry.places import places_of
from parasym.symmetry.readers import Reader, readers
from parasym.symmetry.spaces import Spaces, find_spaces, live_nodes
from parasym.symmetry.symmetry import Params

Read = Callable[[str], Tensor]
Row = dict[str, Any]
_LISTED = 64
_EXACT = 10.0  # digits from which a removal counts as changing nothing; the bar of every certificate
_CHUNK = 1 << 22  # numbers handled at a time
_KEEP = 1 << 26  # activations kept (in numbers) to re-evaluate only what a removal can change
_MIN_SAMPLES = 16
_CARRY = frozenset(
    {
        "_to_copy", "_unsafe_view", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "alias",
        "amax", "avg_pool1d", "avg_pool2d", "avg_pool3d", "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "detach", "dropout",
        "expand", "feature_dropout", "flatten", "getitem", "instance_standardise", "lift_fresh_copy", "max_pool1d", "max_pool2d",
        "max_pool2d_with_indices", "max_pool3d", "mean", "pad", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
        "squeeze", "stack", "standardise", "sum", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "upsample_bilinear2d",
        "upsample_nearest2d", "view",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Thresholds:
    """When a state counts as collapsed. All are relative and free of units: scaling data or weights leaves them.

    Attributes:
        dead: range of a unit's output over the data, relative to the median of its layer's units that vary.
        affine: residual of the affine fit of a unit's output, relative to its spread: exactly affine ("always-on").
        linearised: the same, affine to this accuracy.
        duplicate: sqrt(2) |u_i - u_j| / sqrt(|u_i|^2 + |u_j|^2), u the in- and out-weights (stochastic-collapse R7 without the square).
        copy: the same for in-weights alone: two units that compute one feature.
        zero: norm of in- and of out-weights, relative to the largest of the layer.
        rank: singular value of a product or stack, relative to its largest.
        head: largest singular value of a head's product, relative to the median head.
        imbalance: ratio of the norms of two factors, or its inverse.
        norm: gain of a channel, or its running standard deviation, relative to the median.
    """

    dead: float = 1e-6
    affine: float = 1e-6
    linearised: float = 1e-3
    duplicate: float = 1e-2
    copy: float = 1e-6
    zero: float = 1e-3
    rank: float = 1e-6
    head: float = 1e-3
    imbalance: float = 10.0
    norm: float = 1e-3


def collapse(
    graph: Graph,
    params: Params,
    batches: Sequence[Batch],
    spaces: Spaces,
    entries: Sequence[Entry],
    *,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    checks: int = 2,
    r7: tuple[float, float] | None = None,
) -> list[Row]:
    """Measure every collapsed state of a model on given data.

    Args:
        graph, params: a traced graph and its parameters in float64; neither is changed.
        batches: data, each a list of tensors in the order of the graph's inputs.
        spaces: index spaces of the graph (found anew if they belong to another one).
        entries: certified dictionary families of this model; may be empty, then linear factors are read off the index spaces.
        thresholds: what counts as collapsed.
        seed: of the fresh inputs.
        checks: how many of the batches, and how many fresh ones, each removal is measured on.
        r7: (zero_tol, dup_tol) adds rows with the number of independent neurons of stochastic-collapse R7.

    Returns:
        Rows of the audit's "collapse" table, with more keys: ``parameters`` (names the finding is about), ``axis`` (of the first of them
        along which unit j is entry j, or None) and, for dead units, ``margin`` (shift of the pre-activation, in its own standard
        deviations, that makes the unit vary again; None: none found).
        ``distance`` lists one figure for each listed unit; where more than 64 units are meant, five quantiles (``quantiles`` True).
    """
    t = thresholds or Thresholds()
    if spaces.graph is not graph:
        spaces = find_spaces(graph)
    params = {k: v.to(torch.float64) for k, v in params.items()}
    entries = [e for e in entries if _fits(e, {k: tuple(p.shape) for k, p in params.items()})]
    with torch.no_grad(), rng_state():
        layers = find_layers(graph, spaces)
        runner = _Runner(graph)
        generator = torch.Generator().manual_seed(seed)
        fresh = [draw(graph, batches[i % len(batches)], generator) for i in range(checks)]
        _observe(runner, params, batches, layers)
        judge = _Judge(runner, params, batches[:checks], fresh)
        _observe_fresh(judge, layers)
        read = params.__getitem__
        rows = _norms(graph, params, spaces, judge, t)
        gone = {(r["_node"], u) for r in rows for u in r["_all"]}
        for layer in layers:
            rows += _layer_rows(layer, params, judge, t, gone)
        rows += _linear_rows([*entries, *_factors(spaces, layers, entries)], read, judge, t)
        rows += _imbalance(entries, read, t)
        rows += _tables(graph, read, judge, batches, t)
        rows += _dead_parameters(graph, judge)
        if r7 is not None:
            rows += _r7_rows(independent_units(graph, spaces, read, *r7), r7)
    return [_public(r) for r in rows]


def weight_collapse(
    entries: Sequence[Entry], read: Read, spaces: Spaces | None = None, *, thresholds: Thresholds | None = None
) -> list[Row]:
    """What weights alone say: duplicates, zero units, rank deficits, dead heads, imbalance. No forward pass.

    Args:
        entries: certified dictionary families.
        read: name -> tensor; asked for the tensors of one family at a time, in any dtype, so that a checkpoint can be streamed.
        spaces: index spaces of the architecture (also traced on the meta device); adds the units that no continuous family
            reaches, such as those of a GELU layer, and rows of tables.
        thresholds: what counts as collapsed.

    Returns:
        Rows as those of :func:`collapse`; nothing was run, so ``digits`` is None and ``removable`` False.
    """
    t = thresholds or Thresholds()
    rows: list[Row] = []
    with torch.no_grad():
        covered: set[str] = set()
        layers = find_layers(spaces.graph, spaces) if spaces is not None else []
        scales = [e for e in entries if e.algebra == "scale" and e.copies.local == ((e.space, e.size),) and e.size > 1 and _is_layer(e)]
        for layer in layers:
            blocks = _raw_blocks(layer, read)
            if blocks is not None:
                covered |= set(layer.parameters)
                blocks = _rescaled(
                    layer, blocks, next((e for e in scales if e.size == layer.size and set(e.parameters) <= set(layer.parameters)), None)
                )
                rows += _weight_rows(layer.where, blocks, layer.parameters, t)
        for e in scales:
            if not covered.intersection(e.parameters):
                found = _scale_blocks(e, read)
                if found is not None:
                    rows += _weight_rows(_common(e.parameters), found, e.parameters, t)
        factors = _factors(spaces, layers, entries) if spaces is not None else []
        rows += _linear_rows([*entries, *factors], read, None, t)
        rows += _imbalance(entries, read, t)
        if spaces is not None:
            rows += _tables(spaces.graph, read, None, (), t)
    return [_public(r) for r in rows]


def _is_layer(entry: Entry) -> bool:
    """Matrices both write to and read from the space: its units are neurons, not the channels of a norm's gain."""
    matrices = [w > 0 for w, t in entry.terms if t.op == "mode" and t.place.cross]
    return any(matrices) and not all(matrices)


# -- rows ----------------------------------------------------------------------------------------------------------------------


def _row(
    kind: str,
    where: str,
    units: Sequence[int],
    of: int,
    distance: Sequence[float | None] | None,
    lost: int,
    note: str,
    parameters: Sequence[str],
    **more: Any,
) -> Row:
    listed = list(units)[:_LISTED]
    spread = distance is not None and len(units) > _LISTED
    figures: list[float | None] | None = None if distance is None else _quantiles(distance) if spread else list(distance)
    return {
        "symmetry": None,
        "where": where,
        "kind": kind,
        "count": len(units),
        "of": of,
        "units": listed,
        "distance": figures,
        "quantiles": spread,
        "parameters_lost": int(lost),
        "removable": False,
        "digits": None,
        "note": note,
        "parameters": list(parameters),
        "axis": None,
        "_all": list(units),
        "_node": "",
        **more,
    }


def _exact_first(units: Sequence[int], distance: Tensor) -> list[list[int]]:
    """Units that sit on the collapsed state to machine precision, and those that are near it: what holds for the first may not for both."""
    exact = [j for j in units if float(distance[j]) <= 1e-12]
    return [part for part in (exact, [j for j in units if j not in set(exact)]) if part]


def _public(row: Row) -> Row:
    return {k: v for k, v in row.items() if not k.startswith("_")}


def _quantiles(values: Sequence[float | None]) -> list[float | None]:
    known = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    return known.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)).tolist() if len(known) else []


def _judged(row: Row, figures: tuple[float, float], what: str) -> Row:
    """Write the measured digits of a removal into a row."""
    given, fresh = figures
    row["digits"] = round(min(given, fresh), 2)
    row["removable"] = row["digits"] >= _EXACT
    row["note"] += f"; {what}: {given:.1f} digits kept on the given data, {fresh:.1f} on fresh data"
    return row


def _common(names: Iterable[str]) -> str:
    """Module path that parameters share; where they share none, that of the first."""
    paths = [n.split(".")[:-1] for n in names]
    first = ".".join(paths[0]) if paths else ""
    out = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return ".".join(out) or first


# -- running the graph ---------------------------------------------------------------------------------------------------------

Watch = tuple[tuple[str, ...], Callable[[Mapping[str, Any]], None]]
Swap = dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Tensor]]]


class _Runner:
    """Evaluates the live part of a graph and lets go of activations that nothing reads any more."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        live = live_nodes(graph)
        self.order = [n for n in graph.nodes if n.name in live]
        self.place = {n.name: i for i, n in enumerate(self.order)}
        self.last = {n.name: max((self.place[u.name] for u in n.users if u.name in live), default=i) for i, n in enumerate(self.order)}
        self.active = [n.name for n in self.order if graph.kind.get(n.name) == "active"]

    @property
    def numbers(self) -> int:
        """Size of all activations of one batch."""
        values = (n.meta.get("val") for n in self.order if self.graph.kind.get(n.name) == "active")
        return sum(v.numel() for v in values if isinstance(v, Tensor))

    def below(self, names: Iterable[str]) -> set[str]:
        """Nodes that depend on any of the given ones, with these."""
        out = set(names)
        for n in self.order:
            if n.name not in out and any(a.name in out for a in n.all_input_nodes):
                out.add(n.name)
        return out

    def run(
        self,
        params: Params,
        env: Mapping[str, Any],
        watch: Sequence[Watch] = (),
        swap: Swap | None = None,
        base: Mapping[str, Any] | None = None,
        dirty: set[str] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Outputs, flattened and concatenated, and (with ``keep``) every value.

        Args:
            watch: (nodes, what to call with their values); called as soon as the last of them is known.
            swap: node -> (other nodes needed, what to put in the place of its value).
            base, dirty: values of an earlier run and the nodes that must be evaluated again.
        """
        last = dict(self.last)
        due: dict[int, list[Callable[[Mapping[str, Any]], None]]] = {}
        for names, call in watch:
            at = max(self.place[n] for n in names)
            due.setdefault(at, []).append(call)
            for n in names:
                last[n] = max(last[n], at)
        for name, (needs, _) in (swap or {}).items():
            last |= {a: max(last[a], self.place[name]) for a in needs}
        for name in self.graph.outputs:
            last[name] = len(self.order)
        release: dict[int, list[str]] = {}
        for name in self.active:
            release.setdefault(last[name], []).append(name)
        live: dict[str, Any] = dict(env)
        for holder, name in self.graph.holders.items():
            live[holder] = params[name]
        old = base if base is not None and dirty is not None else {}
        for i, node in enumerate(self.order):
            if node.name not in live:
                clean = node.name in old and node.name not in (dirty or ())
                live[node.name] = old[node.name] if clean else self.graph._evaluate(node, live)
            if swap and node.name in swap:
                live[node.name] = swap[node.name][1](live)
            for call in due.get(i, ()):
                call(live)
            if not keep:
                for name in release.get(i, ()):
                    live.pop(name, None)
        return torch.cat([live[o].reshape(-1) for o in self.graph.outputs]), live


class _Judge:
    """Compares outputs of changed parameters with those of the original ones, in float64."""

    def __init__(self, runner: _Runner, params: Params, given: Sequence[Batch], fresh: Sequence[Batch]) -> None:
        self.runner, self.params = runner, params
        room = _KEEP // max(1, runner.numbers)
        self.cases: list[tuple[bool, dict[str, Any], dict[str, Any] | None, Tensor]] = []
        for i, batch in enumerate([*given, *fresh]):
            env = runner.graph.prepare(batch)
            out, values = runner.run(params, env, keep=i < room)
            self.cases.append((i < len(given), env, values if i < room else None, out))

    def look(self, watch: Sequence[Watch], case: int = 0) -> None:
        """Show activations of one batch, by default the first given one."""
        _, env, values, _ = self.cases[case]
        if values is None:
            self.runner.run(self.params, env, watch)
        else:
            for _, call in watch:
                call(values)

    def digits(self, changed: Params, swap: Swap | None = None) -> tuple[float, float]:
        """-log10 of the largest relative change of the outputs, at most 16: on given and on fresh data."""
        graph, worst = self.runner.graph, [0.0, 0.0]
        dirty = self.runner.below([h for h, n in graph.holders.items() if n in changed] + list(swap or {}))
        for given, env, values, before in self.cases:
            after, _ = self.runner.run({**self.params, **changed}, env, swap=swap, base=values, dirty=dirty)
            change = float((after - before).abs().max()) / (float(before.abs().max()) + 1e-300)
            worst[not given] = max(worst[not given], change if change == change else math.inf)
        return _digits(worst[0]), _digits(worst[1])


def _digits(change: float) -> float:
    return 0.0 if math.isinf(change) else max(0.0, -math.log10(max(change, 1e-16)))


# -- units from the graph ------------------------------------------------------------------------------------------------------


def _name(n: Node) -> str:
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
        if _name(n) in _CARRY - {"to", "clone", "dropout", "alias", "detach", "contiguous", "_to_copy"}:
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
    moments: _Moments | None = None
    wider: _Moments | None = None  # fresh data included
    effective: list[Tensor] | None = None  # (n, d) for each input: affine map from activations to pre-activation
    powers: tuple[float | None, ...] = ()
    signs: tuple[int, ...] = ()  # for each input +1 even, -1 odd, 0 neither

    @property
    def writers(self) -> list[Reader]:
        return list({(r.weight, r.out_axis): r for g in self.regions for s in g.sources for r in s.writers}.values())

    @property
    def uses(self) -> list[Use]:
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
        return list(dict.fromkeys([*self.rows, *(u.reader.weight for u in self.uses)]))


def find_layers(graph: Graph, spaces: Spaces) -> list[Layer]:
    """All units between contractions; needs no values."""
    finder = _Finder(graph, spaces)
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
        layer.where = _common(weights)
    return layers


class _Finder:
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
        return [a for a in n.all_input_nodes if self.graph.kind.get(a.name) == "active"]

    def users(self, n: Node) -> list[Node]:
        return [u for u in n.users if u.name in self.live]

    def boundary(self, n: Node) -> bool:
        """Its value leaves the elementwise part."""
        return n.name in self.graph.outputs or any(self.sort[u.name] is None for u in self.users(n))

    def regions(self) -> list[Region]:
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
            reached, leaks = self._reached(output, members)
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
        like = self._blocks(output, axis)
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

    def _blocks(self, n: Node, axis: int) -> tuple[Monomial, ...] | None:
        found = self.spaces.axes.get(n.name)
        return self.spaces.blocks(n.name, axis) if found and not isinstance(found[0], list) else None

    def _sums(self, n: Node, like: Sequence[Monomial]) -> bool:
        """Reduces over the units."""
        rank = n.meta["val"].dim() if isinstance(n.meta.get("val"), Tensor) else 0
        left = {a for axis in range(rank) for b in self._blocks(n, axis) or () for a in b.atoms}
        return _name(n) in ("mean", "sum", "amax", "var", "norm", "linalg_vector_norm") and not left & {a for b in like for a in b.atoms}

    def rows(self, region: Region) -> dict[str, tuple[int, Tensor]]:
        """In-side parameters with the positions of each unit."""
        like = self._blocks(region.output, region.axis) or ()
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
            elif self.sort.get(n.name) == "affine" or (_name(n) in _CARRY and self.sort.get(n.name) is None):
                vectors |= dict.fromkeys(self.graph.parameters_of(n))
                stack.extend(self.active(n))
            else:
                foreign = True
        inside = path.keys() | members
        shared = any(u.name not in inside for n in path.values() for u in self.users(n))
        return Source(tuple(writers), tuple(sorted(path.values(), key=lambda n: self.order[n.name])), tuple(vectors), foreign, shared)

    def _reached(self, output: Node, members: set[str]) -> tuple[list[tuple[Reader, str]], bool]:
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
                elif _name(u) in _CARRY or (self.sort[u.name] is not None and len(self.active(u)) == 1):
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


# -- watching the units --------------------------------------------------------------------------------------------------------


@dataclass
class _Moments:
    """Streaming sums of a layer's pre-activations z_1..z_k and output h, unit by unit, about a reference point.

    Attributes:
        low, high: (n,) range of h.
        first: (n, k+1) reference values.
        total: (n, k+1) sums; products: (n, k+1, k+1) sums of products.
        count: samples (times tokens or places) seen.
    """

    low: Tensor
    high: Tensor
    first: Tensor
    total: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def start(cls, values: Tensor) -> _Moments:
        n, k = values.shape[0], values.shape[1]
        inf = torch.full((n,), math.inf, dtype=torch.float64)
        zero = torch.zeros(n, k, dtype=torch.float64)
        return cls(inf, -inf, values[:, :, 0].clone(), zero, torch.zeros(n, k, k, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Take up (n, k+1, samples) values, h last."""
        self.low = torch.minimum(self.low, values[:, -1].amin(1))
        self.high = torch.maximum(self.high, values[:, -1].amax(1))
        d = values - self.first[:, :, None]
        self.total += d.sum(2)
        self.products += d @ d.transpose(1, 2)
        self.count += values.shape[2]

    @property
    def spread(self) -> Tensor:
        return self.high - self.low

    @property
    def deviation(self) -> Tensor:
        """(n, k+1) standard deviations."""
        mean = self.total / self.count
        return (self.products.diagonal(dim1=1, dim2=2) / self.count - mean.square()).clamp(min=0).sqrt()

    def fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Least squares h = a.z + c for each unit: (n, k) slopes, (n,) offsets, (n,) residual relative to the spread of h."""
        mean = self.total / self.count
        cov = self.products / self.count - mean[:, :, None] * mean[:, None, :]
        scale = cov.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().clamp(min=1e-150)
        cor = cov / scale[:, :, None] / scale[:, None, :]
        slope = (torch.linalg.pinv(cor[:, :-1, :-1], rtol=1e-10, hermitian=True) @ cor[:, :-1, -1:])[:, :, 0]
        left = (1 - (slope * cor[:, :-1, -1]).sum(1)).clamp(min=0).sqrt()
        slope = slope * scale[:, -1:] / scale[:, :-1]
        offset = self.first[:, -1] + mean[:, -1] - (slope * (self.first[:, :-1] + mean[:, :-1])).sum(1)
        return slope, offset, left


def _by_unit(x: Tensor, axis: int) -> Tensor:
    """(n, samples) view or copy of an activation."""
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _values(region: Region, live: Mapping[str, Any]) -> Iterable[Tensor]:
    """(n, k+1, chunk) values of inputs and output, a bounded number of samples at a time."""
    shape = live[region.output.name].shape
    rows = [_by_unit(live[i.name].expand(shape), region.axis) for i in region.inputs] + [_by_unit(live[region.output.name], region.axis)]
    n, samples = rows[0].shape
    step = max(1, _CHUNK // max(1, n * len(rows)))
    for at in range(0, samples, step):
        yield torch.stack([r[:, at : at + step] for r in rows], 1)


def _observe(runner: _Runner, params: Params, batches: Sequence[Batch], layers: Sequence[Layer]) -> None:
    """Pass all data once and collect what the units do; probe their activations and in-weights on the first batch."""
    for i, batch in enumerate(batches):
        watch: list[Watch] = []
        for layer in layers:
            for j, region in enumerate(layer.regions):
                names = tuple(x.name for x in (*region.inputs, region.output))
                watch.append((names, partial(_collect, layer, region)))
                if i == 0 and j == 0:
                    made = {r.node for s in region.sources for r in s.writers}
                    names += tuple(_operand(runner.graph, n) for n in runner.order if n.name in made)
                    watch.append((names, partial(_probe, runner.graph, params, layer, region)))
        if watch:
            runner.run(params, runner.graph.prepare(batch), watch)


def _collect(layer: Layer, region: Region, live: Mapping[str, Any]) -> None:
    for values in _values(region, live):
        if layer.moments is None:
            layer.moments = _Moments.start(values)
        into = layer.moments if layer.wider is None else layer.wider
        if values.shape[1] == into.first.shape[1]:
            into.add(values)


def _observe_fresh(judge: _Judge, layers: Sequence[Layer]) -> None:
    """Go on with fresh data, beside the figures of the given data."""
    for layer in layers:
        layer.wider = copy.deepcopy(layer.moments)
    names = [(layer, region, tuple(x.name for x in (*region.inputs, region.output))) for layer in layers for region in layer.regions]
    for i, case in enumerate(judge.cases):
        if not case[0]:
            judge.look([(n, partial(_collect, layer, region)) for layer, region, n in names], i)


def _replay(graph: Graph, nodes: Iterable[Node], live: Mapping[str, Any], at: Mapping[str, Tensor], wanted: str) -> Tensor:
    """A few nodes evaluated again, with some values replaced."""
    here = {**live, **at}
    for n in nodes:
        if n.name not in at:
            here[n.name] = graph._evaluate(n, here)
    return here[wanted]  # type: ignore[no-any-return]


def _probe(graph: Graph, params: Params, layer: Layer, region: Region, live: Mapping[str, Any]) -> None:
    """Homogeneity and parity of the activation, and the affine map that leads to each of its inputs."""
    noise = torch.Generator().manual_seed(0)
    z = {i.name: 2 * torch.randn(live[i.name].shape, generator=noise, dtype=torch.float64) for i in region.inputs}
    out = region.output.name
    h = _replay(graph, region.nodes, live, z, out)
    size = float(h.abs().max()) + 1e-300
    powers = []
    for name in z:
        twice = _replay(graph, region.nodes, live, {**z, name: 2 * z[name]}, out)
        power = math.log2((float(twice.abs().sum()) + 1e-300) / (float(h.abs().sum()) + 1e-300))
        good = abs(power) > 1e-3 and float((twice - 2**power * h).abs().max()) <= 1e-9 * size
        powers.append(round(power, 6) if good else None)
    layer.powers = tuple(powers)
    turned = [_replay(graph, region.nodes, live, {**z, name: -z[name]}, out) for name in z]
    layer.signs = tuple(next((s for s in (1, -1) if float((back - s * h).abs().max()) <= 1e-12 * size), 0) for back in turned)
    if len(layer.regions) == 1:
        maps = [_effective(graph, params, region, i, s, live) for i, s in zip(region.inputs, region.sources, strict=True)]
        layer.effective = [m for m in maps if m is not None] if all(m is not None for m in maps) else None


def _effective(graph: Graph, params: Params, region: Region, z: Node, source: Source, live: Mapping[str, Any]) -> Tensor | None:
    """(n, d) rows [alpha_j w_j r, beta_j] with z_j = alpha_j w_j . x + beta_j and r the root mean square of x, so that all entries
    have the units of z; biases, gains and frozen statistics are included.

    The way from the one contraction to z is run on constants; None where it is not one affine map for each unit.
    """
    if source.foreign or len(source.writers) != 1:
        return None
    writer = source.writers[0]
    c = next(n for n in source.path if n.name == writer.node)
    like, rank = c.meta["val"], c.meta["val"].dim()
    at = _out_axis(writer, graph, rank)
    shape = [like.shape[at] if i == at else 1 for i in range(rank)]
    index = torch.arange(like.shape[at], dtype=torch.float64).reshape(shape).expand(like.shape)
    nodes = [n for n in source.path if n.name != c.name]
    runs = []
    for x in (torch.zeros_like(index), torch.ones_like(index), index):
        y = _by_unit(_replay(graph, nodes, live, {c.name: x}, z.name), region.axis)
        if float((y - y[:, :1]).abs().max()) > 1e-9 * (float(y.abs().max()) + 1e-300):
            return None  # padding, positions, batch statistics
        runs.append(y[:, 0])
    beta, alpha = runs[0], runs[1] - runs[0]
    on = alpha.abs() > 1e-12 * alpha.abs().max()
    if not bool(on.any()):
        return None  # a norm with the statistics of the batch forgets constants
    row = torch.where(on, (runs[2] - beta) / torch.where(on, alpha, 1.0), 0.0).round().long()
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heard = _by_unit(_replay(graph, nodes, live, {c.name: noise}, z.name), region.axis).std(1)
    sent = _by_unit(noise, at).std(1)
    if int(row.min()) < 0 or int(row.max()) >= len(sent):
        return None
    if bool(((heard - alpha.abs() * sent[row]).abs() > 1e-9 * heard.max()).any()):
        return None  # the way depends on what else is in the batch
    W = params[writer.weight].movedim(writer.out_axis, 0).flatten(1)
    if len(W) != len(sent) or float((alpha * row + beta - runs[2]).abs().max()) > 1e-6 * float(runs[2].abs().max() + 1):
        return None
    size = live[_operand(graph, c)].square().mean().sqrt()
    return torch.cat([alpha[:, None] * W[row] * size, beta[:, None]], 1)


def _operand(graph: Graph, contraction: Node) -> str:
    """What a contraction reads, beside its weight."""
    return next(a.name for a in contraction.all_input_nodes if graph.kind.get(a.name) != "param")


def _out_axis(r: Reader, graph: Graph, rank: int) -> int:
    """Axis of a contraction's result (or operand) that carries the features."""
    spatial = graph.params[r.weight].dim() - 2
    return rank - 1 if spatial == 0 else rank - spatial - 1


# -- what the units' weights say -----------------------------------------------------------------------------------------------


@dataclass
class Blocks:
    """Weights of units as rows, each block (n, d), free of the units' rescaling where they have one.

    Attributes:
        inside, outside: in- and out-weights.
        raw: (n, blocks) norms of the slices of each parameter before that.
        signs: joint signs, one for each block of ``inside`` and one for ``outside``, under which two units are still the same.
        lost: parameters that one unit owns.
    """

    inside: list[Tensor]
    outside: list[Tensor]
    raw: Tensor
    signs: tuple[tuple[tuple[int, ...], int], ...] = ()
    lost: int = 0

    @property
    def count(self) -> int:
        return len(self.raw)


def _slices(p: Tensor, axis: int, at: Tensor) -> Tensor:
    """(n, m * rest) entries of each unit."""
    moved = p.to(torch.float64).movedim(axis, 0)
    return moved[at.reshape(-1)].reshape(at.shape[0], -1)


def _raw_blocks(layer: Layer, read: Read) -> Blocks | None:
    """Slices of the parameters as they are; None where units do not show in the weights."""
    if not layer.rows:
        return None
    inside = [_slices(read(p), axis, at) for p, (axis, at) in layer.rows.items()]
    outside = [_slices(read(u.reader.weight), u.reader.in_axis, u.columns) for u in layer.uses]
    lost = sum(b.shape[1] for b in [*inside, *outside])
    return Blocks(inside, outside, _norms_of([*inside, *outside]), lost=lost)


def _unit_blocks(layer: Layer, read: Read) -> Blocks | None:
    """The same modulo rescaling and sign, where the activation and the way to it allow."""
    raw = _raw_blocks(layer, read)
    if raw is None or layer.effective is None:
        return raw
    inside, power = [], torch.ones(layer.size, dtype=torch.float64)
    for rows, p in zip(layer.effective, layer.powers, strict=True):
        size = rows.norm(dim=1).clamp(min=1e-300)
        inside.append(rows / size[:, None] if p is not None else rows)
        power = power * size**p if p is not None else power
    known = {r.weight for r in layer.writers} | {v for g in layer.regions for s in g.sources for v in s.vectors}
    inside += [b for (p, _), b in zip(layer.rows.items(), raw.inside, strict=True) if p not in known]  # slopes of the activation
    signs = []
    for flips in itertools.product((False, True), repeat=len(layer.signs) if len(layer.signs) <= 3 else 0):
        if any(flips) and all(s for f, s in zip(flips, layer.signs, strict=True) if f):
            still = (1,) * (len(inside) - len(flips))
            signs.append(((*(-1 if f else 1 for f in flips), *still), math.prod(s for f, s in zip(flips, layer.signs, strict=True) if f)))
    return Blocks(inside, [b * power[:, None] for b in raw.outside], raw.raw, tuple(signs), raw.lost)


def _norms_of(blocks: Sequence[Tensor]) -> Tensor:
    """(n, blocks) norms."""
    return torch.stack([b.norm(dim=1) for b in blocks], 1)


def _vectors(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks side by side, each divided by the root mean square norm of its rows: no block outweighs another."""
    return torch.cat([b / b.square().sum(1).mean().sqrt().clamp(min=1e-300) for b in blocks], 1)


def _zero(blocks: Blocks, t: Thresholds) -> tuple[list[int], list[float]]:
    """Units whose slices of every parameter vanish beside the largest of their layer."""
    top = blocks.raw.amax(0)
    share = (blocks.raw / top.clamp(min=1e-300))[:, top > 0].amax(1) if bool((top > 0).any()) else blocks.raw.new_zeros(blocks.count)
    units = (share <= t.zero).nonzero().flatten().tolist()
    return units, share[units].tolist()


def nearest(rows: Tensor, signs: Sequence[Tensor], tolerance: float) -> tuple[Tensor, Tensor]:
    """For each row the nearest earlier one within a tolerance, up to the given signs of its columns.

    Rows are compared through a random sketch first (64 numbers each keep distances within a few tens of percent) and the
    candidates exactly, so that n wide units take n^2 * 64 operations in blocks of bounded memory.

    Returns:
        (n,) index of the partner, -1 for none, and (n,) distances sqrt(2) |u_i - s u_j| / sqrt(|u_i|^2 + |u_j|^2).
    """
    n = len(rows)
    partner, best = torch.full((n,), -1), torch.full((n,), math.inf, dtype=torch.float64)
    small = _sketch(rows)
    for sign in signs:
        turned = small if bool((sign == 1).all()) else _sketch(rows * sign)
        i, j = _candidates(small, turned, max(8 * tolerance**2, 1e-5))
        exact = _distances(rows, i, j, sign)
        order = exact.argsort(descending=True, stable=True)  # of several entries for one index the last, the nearest, stays
        i, j, exact = i[order], j[order], exact[order]
        better = exact < best[i]
        best[i[better]], partner[i[better]] = exact[better], j[better]
    partner[best > tolerance] = -1
    return partner, best


def _sketch(rows: Tensor) -> Tensor:
    """Rows in single precision, at most 64 numbers each, with squared norms of about the same size."""
    d = rows.shape[1]
    if d <= 256:
        return rows.float()
    return rows.float() @ (torch.randn(d, 64, generator=torch.Generator().manual_seed(0)) / 8)


def _candidates(small: Tensor, turned: Tensor, bar: float) -> tuple[Tensor, Tensor]:
    """Pairs (i, j), j < i, whose squared relative distance is below a bar; where they are very many, the nearest j of each i."""
    n, size, found = len(small), small.square().sum(1), list[Tensor]()
    step = max(1, _CHUNK // n)
    for at in range(0, n, step):
        end = min(at + step, n)
        gap = small[at:end] @ turned[:end].T
        total = (size[at:end, None] + size[None, :end]).clamp_(min=1e-30)
        gap.mul_(-2).div_(total).add_(1)  # |x - y|^2 / (|x|^2 + |y|^2)
        gap[:, at:end].masked_fill_(torch.ones(end - at, end - at, dtype=torch.bool).triu_(), math.inf)
        hits = (gap <= bar).nonzero()
        if len(hits) > 8 * (end - at):
            near, j = gap.min(1)
            hits = torch.stack([torch.arange(end - at), j], 1)[near <= bar]
        found.append(hits + torch.tensor([at, 0]))
    pairs = torch.cat(found)
    return pairs[:, 0], pairs[:, 1]


def _distances(rows: Tensor, i: Tensor, j: Tensor, sign: Tensor) -> Tensor:
    out = [rows.new_zeros(0)]
    for a, b in zip(i.split(1024), j.split(1024), strict=True):
        x, y = rows[a], rows[b] * sign
        out.append(math.sqrt(2) * (x - y).norm(dim=1) / (x.square().sum(1) + y.square().sum(1)).sqrt().clamp(min=1e-300))
    return torch.cat(out)


def _groups(partner: Tensor) -> dict[int, list[int]]:
    """Representative -> the others, from each unit's earlier partner."""
    lead: dict[int, int] = {}
    for i, j in enumerate(partner.tolist()):
        lead[i] = i if j < 0 else lead[j]
    out: dict[int, list[int]] = {}
    for i, j in lead.items():
        if i != j:
            out.setdefault(j, []).append(i)
    return out


def _alike(blocks: Blocks, t: Thresholds, skip: set[int]) -> tuple[dict[int, list[int]], dict[int, list[int]], dict[int, float]]:
    """Groups equal in in- and out-weights, further groups equal in in-weights alone, and each member's distance."""
    keep = torch.tensor([j for j in range(blocks.count) if j not in skip], dtype=torch.long)
    distance: dict[int, float] = {}
    found: list[dict[int, list[int]]] = []
    if len(keep) < 2 or not blocks.inside:
        return {}, {}, distance
    taken: set[int] = set()
    for outside, tolerance in ((blocks.outside, t.duplicate), ([], t.copy)):
        if outside or tolerance == t.copy:
            rows = _vectors([b[keep] for b in (*blocks.inside, *outside)])
            widths = [b.shape[1] for b in blocks.inside]
            signs = [rows.new_ones(rows.shape[1])]
            for each, out in blocks.signs:
                parts = [rows.new_full((w,), s) for w, s in zip(widths, each, strict=True)]
                signs.append(torch.cat([*parts, rows.new_full((rows.shape[1] - sum(widths),), out)]))
            partner, gap = nearest(rows, signs, tolerance)
            groups = {int(keep[k]): [int(keep[v]) for v in vs if int(keep[v]) not in taken] for k, vs in _groups(partner).items()}
            groups = {k: v for k, v in groups.items() if v}
            distance |= {int(keep[i]): float(gap[i]) for i in range(len(keep)) if math.isfinite(gap[i]) and int(keep[i]) not in distance}
            taken |= {x for v in groups.values() for x in v}
            found.append(groups)
        else:
            found.append({})
    return found[0], found[1], distance


def _weight_rows(where: str, blocks: Blocks, parameters: Sequence[str], t: Thresholds) -> list[Row]:
    """Zero units and duplicates from weights alone."""
    rows, size = [], blocks.count
    zero, share = _zero(blocks, t)
    if zero:
        rows.append(
            _row(
                "dead",
                where,
                zero,
                size,
                share,
                len(zero) * blocks.lost,
                f"zero units: in- and out-weights below {t.zero:g} of the layer's largest; weights only, nothing was run",
                parameters,
            )
        )
    same, copies, distance = _alike(blocks, t, set(zero))
    for groups, what in (
        (same, "in- and out-weights equal"),
        (copies, "in-weights equal, out-weights differ: one feature computed several times"),
    ):
        others = sorted(x for v in groups.values() for x in v)
        if others:
            note = f"{what}, copies of {_some(groups)}; weights only, nothing was run"
            rows.append(
                _row("duplicate", where, others, size, [distance.get(x) for x in others], len(others) * blocks.lost, note, parameters)
            )
    return rows


def _some(groups: Mapping[int, Sequence[int]]) -> str:
    heads = sorted(groups)
    return ", ".join(f"unit {h}" for h in heads[:8]) + (f" and {len(heads) - 8} more" if len(heads) > 8 else "")


def _rescaled(layer: Layer, blocks: Blocks, e: Entry | None) -> Blocks:
    """Blocks of a layer, normalised by a rescaling family of its units."""
    if e is None or any(t.op not in ("mode", "dual") or t.gain is not None for _, t in e.terms):
        return blocks
    power = {t.place.parameter: w if t.op == "mode" else -w for w, t in e.terms}
    names = [*layer.rows, *(u.reader.weight for u in layer.uses)]
    sides = [*blocks.inside, *blocks.outside]
    lead = max(power.values())
    moving = [b for n, b in zip(names, sides, strict=True) if power.get(n, 0) == lead]
    if lead <= 0 or not moving or len(set(names)) < len(names):
        return blocks
    scale = torch.cat(moving, 1).norm(dim=1).clamp(min=1e-300)
    sides = [b / (scale ** (power.get(n, 0) / lead))[:, None] for n, b in zip(names, sides, strict=True)]
    return replace(blocks, inside=sides[: len(blocks.inside)], outside=sides[len(blocks.inside) :])


def _scale_blocks(e: Entry, read: Read) -> Blocks | None:
    """Units of a rescaling family, normalised by it: terms of positive weight are in-weights, of negative weight out-weights."""
    inside, outside, size = list[Tensor](), list[Tensor](), e.size
    if any(t.op not in ("mode", "dual") or t.gain is not None for _, t in e.terms):
        return None
    positive = [(w if t.op == "mode" else -w, t) for w, t in e.terms]
    lead = max(w for w, _ in positive)
    if lead <= 0:
        return None
    for w, t in positive:
        rows = _slices(read(t.place.parameter), t.place.axis, t.place.index)
        (inside if w > 0 else outside).append(rows)
    if not inside or not outside:
        return None
    raw = _norms_of([*inside, *outside])
    scale = torch.cat(inside, 1).norm(dim=1).clamp(min=1e-300)
    powers = [w / lead for w, _ in positive]
    ins, outs = ([p for p in powers if p > 0], [p for p in powers if p < 0])
    lost = sum(b.shape[1] for b in [*inside, *outside])
    inside = [b / (scale**p)[:, None] for b, p in zip(inside, ins, strict=True)]
    outside = [b * (scale**-p)[:, None] for b, p in zip(outside, outs, strict=True)]
    return Blocks(inside, outside, raw, lost=lost) if raw.shape[0] == size else None


# -- rows of one layer ---------------------------------------------------------------------------------------------------------


def _layer_rows(layer: Layer, params: Params, judge: _Judge, t: Thresholds, gone: set[tuple[str, int]]) -> list[Row]:
    m = layer.moments
    if m is None:
        return []
    blocks = _unit_blocks(layer, params.__getitem__)
    path = {n.name for g in layer.regions for s in g.sources for n in s.path}
    known = {u for node, u in gone if node in path}
    zero, share = _zero(blocks, t) if blocks is not None and layer.uses else ([], [])
    spread = m.spread
    typical = float(spread[spread > 0].median()) if bool((spread > 0).any()) else 1.0
    relative = spread / typical
    idle = [j for j in (relative <= t.dead).nonzero().flatten().tolist() if m.count >= 2]
    dead = [j for j in idle if j not in known and j not in set(zero)]
    rows = []
    lost = blocks.lost if blocks is not None and layer.private else sum(u.owned(params) for u in layer.uses)
    if zero:
        note = f"zero units: in- and out-weights below {t.zero:g} of the layer's largest"
        rows.append(
            _remove(layer, params, judge, _row("dead", layer.where, zero, layer.size, share, len(zero) * lost, note, layer.parameters))
        )
    always = (layer.wider or m).spread / typical <= t.dead
    steady = _exact_first([j for j in dead if always[j]], relative)
    groups = [*((part, "and on fresh data") for part in steady), ([j for j in dead if not always[j]], "but not on fresh data")]
    for units, also in groups:
        if not units:
            continue
        margin = _margin(layer, judge, units, typical, t)
        note = f"output constant on {m.count} samples x tokens x places (range below {t.dead:g} of the layer's median) {also}"
        row = _row(
            "dead",
            layer.where,
            units,
            layer.size,
            relative[units].tolist(),
            len(units) * lost,
            note,
            layer.parameters,
            margin=margin[:_LISTED],
        )
        known_margins = [abs(x) for x in margin if x is not None]
        if known_margins:
            row["note"] += f"; alive again if the pre-activation shifts by {min(known_margins):.2g} or more of its standard deviations"
        rows.append(_remove(layer, params, judge, row))
    quiet = set(idle) | set(zero) | known
    rows += _affine_rows(layer, judge, quiet, t)
    if blocks is not None:
        rows += _copy_rows(layer, params, judge, blocks, quiet, lost, t)
    return [{**r, "axis": layer.axis} for r in rows]


def _remove(layer: Layer, params: Params, judge: _Judge, row: Row) -> Row:
    """Take units out: out-weights zeroed, their mean folded into the next bias; then in-weights zeroed too where only they use them."""
    units = row["_all"]
    if not layer.uses:
        row["note"] += "; not removed: no contraction reads these units alone"
        row["parameters_lost"] = 0
        return row
    changed = _fold(layer.uses, units, params, judge)
    full = (-1.0, -1.0)
    if layer.private:
        full = judge.digits(_blank(layer, units, params, changed))
        if min(full) >= _EXACT:
            return _judged(row, full, "all their weights zeroed and the constant folded")
    figures = judge.digits(changed)
    if min(full) >= min(figures):
        return _judged(row, full, "all their weights zeroed and the constant folded")
    row["parameters_lost"] = len(units) * sum(u.owned(params) for u in layer.uses)
    return _judged(row, figures, "out-weights zeroed and the constant folded")


def _blank(layer: Layer, units: Sequence[int], params: Params, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero the in-side of some units too."""
    out = dict(changed)
    for p, (axis, at) in layer.rows.items():
        q = out.get(p, params[p]).clone()
        q.movedim(axis, 0)[at[list(units)].reshape(-1)] = 0
        out[p] = q
    return out


def _fold(uses: Sequence[Use], units: Sequence[int], params: Params, judge: _Judge) -> dict[str, Tensor]:
    """Zero the columns that read some units and add what they read on average to the bias behind, where there is one."""
    means: dict[int, Tensor] = {}

    def take(k: int, use: Use, live: Mapping[str, Any]) -> None:
        x = live[use.operand]
        means[k] = _by_unit(x, _out_axis(use.reader, judge.runner.graph, x.dim()))[use.columns[units].reshape(-1)].mean(1)

    judge.look([((u.operand,), partial(take, k, u)) for k, u in enumerate(uses)])
    changed: dict[str, Tensor] = {}
    for k, u in enumerate(uses):
        r = u.reader
        at = u.columns[units].reshape(-1)
        W = changed.get(r.weight, params[r.weight]).clone()
        moved = W.movedim((r.in_axis, r.out_axis), (0, 1))  # a view
        total = torch.einsum("co...,c->o", moved[at].flatten(2), means[k]) if moved.dim() > 2 else moved[at].T @ means[k]
        moved[at] = 0
        changed[r.weight] = W
        if r.bias is not None and params[r.bias].numel() == len(total):
            b = changed.get(r.bias, params[r.bias])
            changed[r.bias] = b + total.reshape(b.shape)
    return changed


def _margin(layer: Layer, judge: _Judge, units: Sequence[int], typical: float, t: Thresholds) -> list[float | None]:
    """Smallest shift of the pre-activation, in its own standard deviations, after which a unit's output varies again."""
    region, graph = layer.regions[0], judge.runner.graph
    assert layer.moments is not None
    deviation = layer.moments.deviation[:, 0]
    usual = float(deviation[deviation > 0].median()) if bool((deviation > 0).any()) else 1.0
    deviation = torch.where(deviation > 1e-9 * usual, deviation, usual)[list(units)]
    best = torch.full((len(units),), math.inf, dtype=torch.float64)

    def search(live: Mapping[str, Any]) -> None:
        nonlocal best
        z = live[region.inputs[0].name]

        def alive(shift: Tensor) -> Tensor:
            moved = z.clone()
            moved.movedim(region.axis, -1)[..., list(units)] += shift * deviation
            h = _by_unit(_replay(graph, region.nodes, live, {region.inputs[0].name: moved}, region.output.name), region.axis)[list(units)]
            return h.amax(1) - h.amin(1) > t.dead * typical

        for sign in (1.0, -1.0):
            low, high = torch.zeros(len(units), dtype=torch.float64), torch.full((len(units),), math.inf, dtype=torch.float64)
            for step in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0):
                on = alive(torch.full_like(low, sign * step)) & torch.isinf(high)
                high[on] = step
                low[~on & torch.isinf(high)] = step
            for _ in range(8):
                middle = torch.where(torch.isinf(high), low, (low.clamp(min=1e-3) * high.clamp(min=1e-3)).sqrt())
                on = alive(sign * middle)
                high, low = torch.where(on & ~torch.isinf(high), middle, high), torch.where(on, low, middle)
            best = torch.where(high < best.abs(), sign * high, best)

    judge.look([(tuple(n.name for n in (*region.inputs, region.output)), search)])
    return [None if math.isinf(x) else float(f"{x:.3g}") for x in best.tolist()]


def _affine_rows(layer: Layer, judge: _Judge, quiet: set[int], t: Thresholds) -> list[Row]:
    """Units on which the activation acts as one affine map of its inputs."""
    m = layer.moments
    assert m is not None
    if m.count < max(_MIN_SAMPLES, 4 * m.first.shape[1]):
        return []
    slope, offset, left = m.fit()
    wide = (layer.wider or m).fit()[2]
    rows = []
    kinds = (
        ("always-on", left <= t.affine, wide <= t.affine),
        ("always-on", left <= t.affine, wide > t.affine),
        ("linearised", left > t.affine, left <= t.linearised),
    )
    for k, (kind, first, second) in enumerate(kinds):
        units = [j for j in (first & second).nonzero().flatten().tolist() if j not in quiet]
        if not units:
            continue
        also = (" and on fresh data", ", but not on fresh data", "")[k]
        degree = "exactly" if kind == "always-on" else "nearly"
        worst = float(left[units].max())
        note = (
            f"the activation is {degree} one affine map on {m.count} samples x tokens x places{also} (relative residual up to {worst:.1e})"
        )
        if layer.uses and layer.writers:
            note += _merge_note(layer, len(units), judge.params)
        row = _row(kind, layer.where, units, layer.size, left[units].tolist(), 0, note, layer.parameters)
        rows.append(_judged(row, judge.digits({}, _linear_swap(layer, units, slope, offset)), "activation replaced by that map"))
        rows[-1]["removable"] = False  # the map remains
    return rows


def _merge_note(layer: Layer, units: int, params: Params) -> str:
    """How many units the affine ones amount to: the rank that a linear map of these widths can have."""
    fan_in = sum(params[r.weight].shape[r.in_axis] * math.prod(params[r.weight].shape[2:]) for r in layer.writers)
    fan_out = sum(params[u.reader.weight].shape[u.reader.out_axis] * math.prod(params[u.reader.weight].shape[2:]) for u in layer.uses)
    rank = min(fan_in, fan_out)
    return f"; together they are one linear map, of rank at most {rank}" if units > rank else ""


def _linear_swap(layer: Layer, units: Sequence[int], slope: Tensor, offset: Tensor) -> Swap:
    swap, at = Swap(), list(units)
    for region in layer.regions:
        if len(region.inputs) != slope.shape[1]:
            continue

        def value(live: Mapping[str, Any], region: Region = region) -> Tensor:
            h = live[region.output.name].clone()
            parts = (live[i.name].expand(h.shape).movedim(region.axis, -1)[..., at] * slope[at, k] for k, i in enumerate(region.inputs))
            h.movedim(region.axis, -1)[..., at] = sum(parts) + offset[at]
            return h

        swap[region.output.name] = tuple(i.name for i in region.inputs), value
    return swap


def _copy_rows(layer: Layer, params: Params, judge: _Judge, blocks: Blocks, quiet: set[int], lost: int, t: Thresholds) -> list[Row]:
    """Units that are equal to others, fully or in what they compute."""
    same, copies, distance = _alike(blocks, t, quiet)
    rows = []
    modulo = (
        " up to the rescaling and sign of a unit"
        if layer.effective is not None and (any(p is not None for p in layer.powers) or any(layer.signs))
        else ""
    )
    for groups, what in (
        (same, f"in- and out-weights equal{modulo}: SGD keeps them equal"),
        (copies, f"in-weights equal{modulo}, out-weights differ: one feature computed several times"),
    ):
        others = sorted(x for v in groups.values() for x in v)
        if not others:
            continue
        row = _row(
            "duplicate",
            layer.where,
            others,
            layer.size,
            [distance.get(x) for x in others],
            len(others) * lost,
            f"{what}; copies of {_some(groups)}",
            layer.parameters,
        )
        rows.append(_merge(layer, groups, params, judge, row))
    return rows


def _merge(layer: Layer, groups: Mapping[int, Sequence[int]], params: Params, judge: _Judge, row: Row) -> Row:
    """Give the out-weights of copies to their representative, whose output explains theirs; zero the copies."""
    pairs = [(k, x) for k, v in groups.items() for x in v]
    if not layer.uses:
        row["note"] += "; not merged: no contraction reads these units alone"
        row["parameters_lost"] = 0
        return row
    fits: dict[int, tuple[Tensor, Tensor]] = {}

    def take(k: int, use: Use, live: Mapping[str, Any]) -> None:
        x = live[use.operand]
        rows = _by_unit(x, _out_axis(use.reader, judge.runner.graph, x.dim()))
        a, b = (rows[use.columns[[p[i] for p in pairs]].reshape(-1)].reshape(len(pairs), -1) for i in (0, 1))
        mean_a, mean_b = a.mean(1), b.mean(1)
        a, b = a - mean_a[:, None], b - mean_b[:, None]
        slope = (a * b).sum(1) / a.square().sum(1).clamp(min=1e-300)
        offset = mean_b - slope * mean_a
        fits[k] = slope, torch.where(offset.abs() < 1e-12 * (mean_b.abs() + b.abs().amax(1)), 0.0, offset)

    judge.look([((u.operand,), partial(take, k, u)) for k, u in enumerate(layer.uses)])
    changed: dict[str, Tensor] = {}
    for k, u in enumerate(layer.uses):
        r, (slope, offset) = u.reader, fits[k]
        W = changed.get(r.weight, params[r.weight]).clone()
        moved = W.movedim((r.in_axis, r.out_axis), (0, 1))
        total = torch.zeros(moved.shape[1], dtype=W.dtype)
        for (lead, other), s, c in zip(pairs, slope.tolist(), offset.tolist(), strict=True):
            taken = moved[u.columns[other]].clone()
            moved[u.columns[lead]] += s * taken
            moved[u.columns[other]] = 0
            total += c * taken.movedim(1, 0).flatten(1).sum(1)
        changed[r.weight] = W
        if r.bias is not None and params[r.bias].numel() == len(total) and bool(total.any()):
            b = changed.get(r.bias, params[r.bias])
            changed[r.bias] = b + total.reshape(b.shape)
    if layer.private:
        changed = _blank(layer, row["_all"], params, changed)
    return _judged(row, judge.digits(changed), "copies merged into one")


# -- gains, tables, dead parameters --------------------------------------------------------------------------------------------


def _norms(graph: Graph, params: Params, spaces: Spaces, judge: _Judge, t: Thresholds) -> list[Row]:
    """Channels that a vanishing gain, or a vanishing running variance before it, makes constant."""
    finder = _Finder(graph, spaces)
    rows = []
    for n in finder.nodes:
        gain = _gain(graph, n)
        if gain is None or not finder.active(n):
            continue
        g = params[gain].reshape(-1)
        sized = g.abs() / g.abs().median().clamp(min=1e-300)
        silent = (sized <= t.norm).nonzero().flatten().tolist()
        variance = _variance(graph, n)
        relative = None if variance is None else (variance / variance.median().clamp(min=1e-300)).clamp(min=0).sqrt()
        frozen = [] if relative is None else [j for j in (relative <= t.norm).nonzero().flatten().tolist() if j not in silent]
        end = n
        users = finder.users(n)
        offset = (
            graph.parameters_of(users[0])
            if len(users) == 1 and finder.sort[users[0].name] == "affine" and len(finder.active(users[0])) == 1
            else []
        )
        if len(offset) == 1 and params[offset[0]].numel() == len(g):
            end = users[0]
        for found, distance, why in ((silent, sized, "gain"), (frozen, relative, "running standard deviation")):
            if distance is None or len(found) > len(g) // 2:
                continue
            for units in _exact_first(found, distance):
                note = f"{why} below {t.norm:g} of the median: the channel carries only its shift"
                row = _row(
                    "norm-dead", gain.rpartition(".")[0], units, len(g), distance[units].tolist(), 0, note, [gain, *offset], _node=end.name
                )
                rows.append(_silence(finder, graph, params, judge, row, gain, end, units))
    return rows


def _silence(finder: _Finder, graph: Graph, params: Params, judge: _Judge, row: Row, gain: str, end: Node, units: Sequence[int]) -> Row:
    """Zero gains, and fold the constant channel into those who read it."""
    g = params[gain].clone()
    g.reshape(-1)[units] = 0
    reached, leaks = finder._reached(end, set())
    uses, size = [], len(g.reshape(-1))
    axis = next(
        (
            a
            for a in range(end.meta["val"].dim())
            if end.meta["val"].shape[a] == size
            and columns(finder.spaces, finder._blocks(end, a) or (), gain, _long(params[gain])) is not None
        ),
        None,
    )
    if axis is not None and not leaks:
        for r, operand in reached:
            at = columns(finder.spaces, finder._blocks(end, axis) or (), r.weight, r.in_axis)
            if at is not None and len(at) == size:
                uses.append(Use(r, operand, at))
    changed: dict[str, Tensor] = {gain: g}
    row["parameters_lost"] = len(units)
    if uses and len(uses) == len(reached):
        each = sum(u.owned(params) for u in uses)
        figures = judge.digits({**changed, **_fold(uses, units, params, judge)})
        if min(figures) >= min(_EXACT, min(judge.digits(changed))):
            row["parameters_lost"] = len(units) * (each + len(row["parameters"]))
            return _judged(row, figures, "gain and out-weights zeroed, the constant folded")
    return _judged(row, judge.digits(changed), "gain set to zero")


def _long(p: Tensor) -> int:
    return max(range(p.dim()), key=lambda a: p.shape[a]) if p.dim() else 0


def _gain(graph: Graph, n: Node) -> str | None:
    """The vector parameter that multiplies an activation, or None."""
    if n.target is not torch.ops.aten.mul.Tensor or graph.kind.get(n.name) != "active":
        return None
    names = graph.parameters_of(n)
    if len(names) != 1 or graph.params[names[0]].numel() < 2:
        return None
    p = graph.params[names[0]]
    held = [a for a in n.all_input_nodes if graph.kind.get(a.name) == "param"]
    while len(held) == 1 and _name(held[0]) in _CARRY and held[0].all_input_nodes:
        held = held[0].all_input_nodes
    return names[0] if max(p.shape) == p.numel() and len(held) == 1 and held[0].name in graph.holders else None


def _variance(graph: Graph, n: Node) -> Tensor | None:
    """Running variance used right before a gain."""
    stack, seen = [a for a in n.all_input_nodes if graph.kind.get(a.name) == "active"], 0
    while stack and seen < 4:
        a, seen = stack.pop(), seen + 1
        for c in a.all_input_nodes:
            while c.op == "call_function" and graph.kind.get(c.name) == "const" and c.all_input_nodes:
                c = c.all_input_nodes[0]
            if c.op == "placeholder" and c.name in graph.buffers and c.name.endswith("running_var"):
                return graph.buffers[c.name].reshape(-1).to(torch.float64)
        if a.target is torch.ops.aten.mul.Tensor:
            stack.extend(b for b in a.all_input_nodes if graph.kind.get(b.name) == "active")
    return None


def _tables(graph: Graph, read: Read, judge: _Judge | None, batches: Sequence[Batch], t: Thresholds) -> list[Row]:
    """Rows of embeddings that vanish, or that no position of this input shape, or no token of much data, picks."""
    rows = []
    picks: dict[str, list[Node]] = {}
    for n in graph.nodes:
        if n.target is torch.ops.aten.embedding.default:
            held, index = n.args[:2]
            if isinstance(held, Node) and isinstance(index, Node) and held.name in graph.holders:
                picks.setdefault(graph.holders[held.name], []).append(index)
    for name, indices in picks.items():
        table = read(name).to(torch.float64)
        norms = table.norm(dim=1)
        share = norms / norms.median().clamp(min=1e-300)
        zero = (share <= t.zero).nonzero().flatten().tolist()
        where, size = name.rpartition(".")[0], len(table)
        if zero and bool((norms > 0).any()):
            row = _row(
                "dead",
                where,
                zero,
                size,
                share[zero].tolist(),
                len(zero) * table.shape[1],
                f"rows below {t.zero:g} of the median norm",
                [name],
            )
            rows.append(
                row if judge is None else _judged(row, judge.digits({name: table.index_fill(0, torch.tensor(zero), 0.0)}), "rows zeroed")
            )
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
            row = _row("unused", where, idle, size, None, 0, f"rows never read: {why}", [name])
            row = _judged(row, judge.digits({name: table.index_fill(0, torch.tensor(idle), 0.0)}), "rows zeroed")
            rows.append({**row, "removable": False})
    return rows


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


def _dead_parameters(graph: Graph, judge: _Judge) -> list[Row]:
    """Parameters that no output depends on, by module."""
    groups: dict[str, list[str]] = {}
    for name in graph.dead:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    rows = []
    for where, names in groups.items():
        count = sum(judge.params[n].numel() for n in names)
        row = _row(
            "dead",
            where,
            range(len(names)),
            len(names),
            None,
            count,
            f"no output depends on {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}",
            names,
        )
        rows.append(_judged({**row, "units": []}, judge.digits({n: torch.zeros_like(judge.params[n]) for n in names}), "tensors zeroed"))
    return rows


# -- linear factors: heads, bottlenecks, streams -------------------------------------------------------------------------------


def _fits(e: Entry, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    places = [p for _, t in e.terms for p in (t.place, t.gain, t.target, t.offset) if p is not None]
    return bool(places) and all(
        p.parameter in shapes and p.axis < len(shapes[p.parameter]) and shapes[p.parameter][p.axis] == p.size for p in places
    )


def _factors(spaces: Spaces, layers: Sequence[Layer], entries: Sequence[Entry]) -> list[Entry]:
    """Pairs of factors read off the index spaces where no family says so: what one contraction writes and one other reads, or
    two contractions that meet in a product of activations (queries and keys)."""
    graph = spaces.graph
    found = readers(graph)
    written, read = {(r.weight, r.out_axis) for r in found}, {(r.weight, r.in_axis) for r in found}
    counted: dict[tuple[str, int], int] = {}
    for r in found:
        counted[r.weight, r.in_axis] = counted.get((r.weight, r.in_axis), 0) + 1
    known = {frozenset(p for p in e.parameters if graph.params[p].dim() > 1) for e in entries if e.algebra == "gl"}
    bent = {a for layer in layers for g in layer.regions for b in spaces.blocks(g.output.name, g.axis) for a in b.atoms}
    out = []
    for name, places in places_of(spaces).items():
        if not name.startswith("a") or int(name[1:]) in bent or spaces.atoms[int(name[1:])].frozen is not None:
            continue
        wide = [p for p in places if len(graph.params[p.parameter].shape) > 1]
        makers = [p for p in wide if (p.parameter, p.axis) in written]
        takers = [p for p in wide if (p.parameter, p.axis) in read]
        if (
            len(wide) != 2
            or (len(makers), len(takers)) not in ((1, 1), (2, 0))
            or any(counted.get((p.parameter, p.axis), 0) > 1 for p in takers)
        ):
            continue
        first, second = makers[0], (takers or makers[1:])[0]
        if frozenset((first.parameter, second.parameter)) in known or first.index.shape[0] < 2:
            continue
        local = [k for k in first.outer if k in second.outer]
        copies = Copies(tuple((k, int(first.outer[k].max()) + 1) for k in local))
        out.append(Entry("gl", name, first.index.shape[0], copies, ((1.0, Term("mode", first)), (1.0, Term("dual", second)))))
    return out


def _sides(e: Entry, read: Read) -> tuple[list[Tensor], list[Tensor]] | None:
    """(copies, n, columns) matrices that the algebra multiplies from the left, and those that take its inverse transpose."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for w, t in e.terms:
        if t.op not in ("mode", "dual") or abs(w) != 1 or w != e.terms[0][0]:
            return None
        at = e.copies.columns(t.place)
        U = read(t.place.parameter).to(torch.float64).movedim(t.place.axis, -1)
        U = U[..., t.place.index.reshape(-1)].reshape(-1, *t.place.index.shape)  # (rest, n, m)
        if t.gain is not None:
            g = read(t.gain.parameter).to(torch.float64).movedim(t.gain.axis, -1).reshape(-1)[t.gain.index[:, 0]]
            U = U / g[None, :, None] if (t.gain_power > 0) == (t.op == "mode") else U * g[None, :, None]
        flat = U.permute(1, 0, 2).reshape(U.shape[1], -1)
        if at is None:
            sides[t.op == "dual"].append(flat.expand(e.copies.count, *flat.shape))
            continue
        owner = at.expand(U.shape[0], U.shape[2]).reshape(-1)
        if len(owner) % e.copies.count or bool((owner.bincount(minlength=e.copies.count) != len(owner) // e.copies.count).any()):
            return None
        flat = flat[:, owner.argsort(stable=True)].reshape(flat.shape[0], e.copies.count, -1)
        sides[t.op == "dual"].append(flat.transpose(0, 1))
    return sides


def _linear_rows(entries: Sequence[Entry], read: Read, judge: _Judge | None, t: Thresholds) -> list[Row]:
    """Dead, duplicate and rank-deficient products of factors, and rank-deficient stacks of what rotates together."""
    rows: list[Row] = []
    twins: dict[tuple[tuple[str, int], ...], list[_Heads]] = {}
    for e in entries:
        if e.algebra not in ("gl", "so", "so1") or e.size < 2:
            continue
        sides = _sides(e, read)
        if sides is None:
            continue
        first, second = (torch.cat(s, 2) if s else None for s in sides)
        if e.algebra == "gl" and first is not None and second is not None:
            found, pairs, gap = _product_rows(e, first, second, judge, t)
            rows += found
            if e.copies.count > 1:
                twins.setdefault(e.copies.local, []).append(_Heads(e, pairs, gap, e.size * (first.shape[2] + second.shape[2])))
        elif e.algebra != "gl" and first is not None:
            rows += _stack_rows(e, [x for x in (first, second) if x is not None], judge, t)
    for members in twins.values():
        rows += _twin_rows(members, judge)
    return rows


def _product_rows(e: Entry, A: Tensor, B: Tensor, judge: _Judge | None, t: Thresholds) -> tuple[list[Row], set[tuple[int, int]], Tensor]:
    """Singular values of A^T B for each copy (head); A is (copies, n, a), B (copies, n, b)."""
    n, C = e.size, e.copies.count
    RA, RB = (torch.linalg.qr(x.transpose(1, 2), mode="r").R for x in (A, B))
    U, S, Vh = torch.linalg.svd(RA @ RB.transpose(1, 2), full_matrices=False)
    where, columns_of = _common(e.parameters), A.shape[2] + B.shape[2]
    top = S[:, 0]
    size = top / top.median().clamp(min=1e-300) if C > 1 else torch.ones_like(top) * float(top[0] > 0)
    silent = (size <= t.head).nonzero().flatten().tolist() if bool((top > 0).any()) else list(range(C))
    rows = []
    what = f"product of {_pair(e)}, {f'{C} heads of width {n}' if C > 1 else f'inner width {n}'}"
    if silent:
        row = _row(
            "head",
            where,
            silent,
            C,
            size[silent].tolist(),
            len(silent) * n * columns_of,
            f"{what}: vanishes (below {t.head:g} of the median)",
            e.parameters,
        )
        X = torch.zeros(C, n, n, dtype=torch.float64)
        X[silent] = -torch.eye(n, dtype=torch.float64)
        rows.append(_moved(row, e, X, judge, "factor zeroed"))
    share = S / top[:, None].clamp(min=1e-300)
    low = share <= t.rank
    low[silent] = False
    short = low.any(1).nonzero().flatten().tolist()
    if short:
        p = share / share.sum(1, keepdim=True)
        effective = torch.special.entr(p).sum(1).exp()[short]
        note = f"{what}: {int(low.sum())} of {S.numel()} singular values below {t.rank:g} of the largest; effective rank "
        note += f"{float(effective.min()):.2f} to {float(effective.max()):.2f}"
        row = _row("rank", where, short, C, share[short].amin(1).tolist(), int(low.sum()) * columns_of, note, e.parameters)
        row |= {"count": int(low.sum()), "of": S.numel(), "effective_rank": effective.tolist()[:_LISTED]}
        inverse = torch.where(low, 0.0, 1 / S.clamp(min=1e-300))
        X = RB.transpose(1, 2) @ Vh.transpose(1, 2) @ (inverse[:, :, None] * (U.transpose(1, 2) @ RA)) - torch.eye(n, dtype=torch.float64)
        X[[h for h in range(C) if h not in short]] = 0
        rows.append(_moved(row, e, X, judge, "projected on the rest"))
    pairs, gap = _same_products(A, B, silent, t) if C > 1 else (set(), torch.zeros(C, C, dtype=torch.float64))
    return rows, pairs, gap


def _same_products(A: Tensor, B: Tensor, silent: Sequence[int], t: Thresholds) -> tuple[set[tuple[int, int]], Tensor]:
    """Pairs of copies with equal products, and all relative distances, from inner products tr(A_i A_j^T B_j B_i^T)."""
    C = len(A)
    inner = torch.stack([((a @ A.transpose(1, 2)) * (b @ B.transpose(1, 2))).sum((1, 2)) for a, b in zip(A, B, strict=True)])
    size = inner.diagonal()
    squared = 2 * (size[:, None] + size[None, :] - 2 * inner) / (size[:, None] + size[None, :]).clamp(min=1e-300)
    gap = squared.clamp(min=0).sqrt()
    return {
        (i, j) for j in range(C) for i in range(j) if float(gap[i, j]) <= max(t.duplicate, 1e-7) and i not in silent and j not in silent
    }, gap


@dataclass(frozen=True)
class _Heads:
    """One product of each head: pairs of heads where it is equal, all relative distances, parameters that one head owns."""

    entry: Entry
    pairs: set[tuple[int, int]]
    gap: Tensor
    lost: int


def _twin_rows(members: Sequence[_Heads], judge: _Judge | None) -> list[Row]:
    """Heads equal in every product they have; merged by doubling one and dropping the other."""
    C = members[0].entry.copies.count
    pairs = set.intersection(*(m.pairs for m in members)) if len(members) > 1 else set()
    lead = {j: min(i for i, k in pairs if k == j) for _, j in pairs}
    rows = []
    for m in members:
        found = {(i, j) for i, j in m.pairs if j not in lead}
        if found:
            others = sorted({j for _, j in found})
            note = f"products of {_pair(m.entry)} equal those of an earlier head; their other products do not, or were not compared"
            gaps = [min(float(m.gap[i, k]) for i, k in found if k == j) for j in others]
            rows.append(_row("head", _common(m.entry.parameters), others, C, gaps, 0, note, m.entry.parameters))
    if not lead:
        return rows
    others = sorted(lead)
    parameters = list(dict.fromkeys(p for m in members for p in m.entry.parameters))
    note = "heads equal in all their products; copies of " + ", ".join(f"head {h}" for h in sorted(set(lead.values())))
    gaps = [max(float(m.gap[lead[j], j]) for m in members) for j in others]
    row = _row("head", _common(parameters), others, C, gaps, len(others) * sum(m.lost for m in members), note, parameters)
    trials = []
    for m in members:
        eye = torch.eye(m.entry.size, dtype=torch.float64)
        X = torch.zeros(C, m.entry.size, m.entry.size, dtype=torch.float64)
        for j in others:
            X[j] = -eye
            X[lead[j]] += eye
        trials.append(_moved(dict(row), m.entry, X, judge, "merged into one"))
    return [*rows, max(trials, key=lambda r: r["digits"] or -1.0)]


def _pair(e: Entry) -> str:
    """Short names of the modules that hold a pair of factors."""
    names = (p.rpartition(".")[0].rpartition(".")[2] or p for p in e.parameters if not p.endswith("bias"))
    return " and ".join(dict.fromkeys(names))


def _stack_rows(e: Entry, parts: Sequence[Tensor], judge: _Judge | None, t: Thresholds) -> list[Row]:
    """Rank of everything that rotates together, stacked: directions that no writer fills and no reader sees."""
    gram = sum(((p @ p.transpose(1, 2)) for p in parts), torch.zeros(1, dtype=torch.float64))
    n = e.size
    expected = n
    if e.algebra == "so1":  # the all-ones direction is no part of it
        P = torch.eye(n, dtype=torch.float64) - 1 / n
        gram, expected = P @ gram @ P, n - 1
    values, vectors = torch.linalg.eigh(gram)
    share = (values.clamp(min=0) / values[:, -1:].clamp(min=1e-300)).sqrt()
    low = share <= max(t.rank, 3e-8 * math.sqrt(n))
    low[:, : n - expected] = False
    short = low.any(1).nonzero().flatten().tolist()
    if not short:
        return []
    each = sum(p.shape[2] for p in parts)
    row = _row(
        "rank",
        _common(e.parameters),
        short,
        e.copies.count,
        share[short][:, n - expected :].amin(1).tolist(),
        int(low.sum()) * each,
        f"stack of all that writes and reads a space of width {n}: {int(low.sum())} directions are empty",
        e.parameters,
    )
    row |= {"count": int(low.sum()), "of": expected * e.copies.count}
    X = -(vectors * low[:, None, :]) @ vectors.transpose(1, 2)
    return [_moved(row, replace(e, terms=tuple((1.0, replace(x, op="dual")) for _, x in e.terms)), X, judge, "projected on the rest")]


def _moved(row: Row, e: Entry, X: Tensor, judge: _Judge | None, what: str) -> Row:
    """Multiply the second factors by 1 + X and compare."""
    if judge is None:
        row["note"] += "; weights only, nothing was run"
        return row
    changed: dict[str, Tensor] = {}
    for _, t in e.terms:
        at = e.copies.columns(t.place)
        if t.op != "dual":
            continue
        if at is None and e.copies.count > 1:
            return row
        term = Term("mode", t.place, t.gain, -t.gain_power if t.gain is not None and row["kind"] != "rank" else t.gain_power)
        for name, step in tangent(term, judge.params, X, at).items():
            changed[name] = changed.get(name, judge.params[name]) + step
    return _judged(row, judge.digits(changed), what)


# -- balance -------------------------------------------------------------------------------------------------------------------


def _imbalance(entries: Sequence[Entry], read: Read, t: Thresholds) -> list[Row]:
    """Noether charges W W^T - V^T V (GL) and |w|^2 - p |v|^2 (rescaling), beside the sum of the same terms."""
    rows = []
    for e in entries:
        if e.algebra not in ("scale", "gl") or any(x.gain is not None or x.op not in ("mode", "dual") for _, x in e.terms):
            continue
        found = _charges(e, read)
        if found is None:
            continue
        plus, minus, spread = found
        total = (plus + minus).clamp(min=1e-300)
        ratio = (plus / minus.clamp(min=1e-300)).sqrt()
        off = (((ratio > t.imbalance) | (ratio < 1 / t.imbalance)) & (plus > 0) & (minus > 0)).nonzero().flatten().tolist()
        if not off:
            continue
        law = "|w|^2 - |v|^2" if e.algebra == "scale" else "W W^T - V^T V"
        note = (
            f"charge {law} far from zero: norms of the two factors differ up to {_worst(ratio[off]):.3g} times "
            f"(bar {t.imbalance:g}); relative charge of the whole family {float(spread):.2f}; gradient flow conserves it, weight decay "
            "shrinks it"
        )
        rows.append(
            _row("imbalance", _common(e.parameters), off, len(plus), ((plus - minus).abs() / total)[off].tolist(), 0, note, e.parameters)
        )
    return rows


def _worst(ratio: Tensor) -> float:
    return float(torch.maximum(ratio, 1 / ratio).max())


def _charges(e: Entry, read: Read) -> tuple[Tensor, Tensor, Tensor] | None:
    """Weighted squared norms (copies,) of the two sides, and |sum of differences| relative to the sum over the family."""
    if e.algebra == "gl":
        sides = _sides(e, read)
        if sides is None or not sides[0] or not sides[1]:
            return None
        grams = [sum((x @ x.transpose(1, 2) for x in s), torch.zeros(1, dtype=torch.float64)) for s in sides]
        plus, minus = (g.diagonal(dim1=1, dim2=2).sum(1) for g in grams)
        spread = (grams[0] - grams[1]).norm() / (grams[0].norm() + grams[1].norm()).clamp(min=1e-300)
        return plus, minus, spread
    both = torch.zeros(2, e.copies.count, dtype=torch.float64)
    for w, x in e.terms:
        place: Place = by_unit(x.place, e.space) if e.space else x.place
        at = e.copies.columns(place)
        if at is None:
            return None
        p = read(place.parameter).to(torch.float64).movedim(place.axis, -1)
        square = p[..., place.index.reshape(-1)].reshape(-1, place.index.shape[0], place.index.shape[1]).square().sum(1)
        weight = w if x.op == "mode" else -w
        both[int(weight < 0)].index_add_(0, at.expand(square.shape).reshape(-1), abs(weight) * square.reshape(-1))
    if not bool(both[0].any()) or not bool(both[1].any()):
        return None
    return both[0], both[1], (both[0] - both[1]).abs().sum() / both.sum().clamp(min=1e-300)


# -- stochastic-collapse R7 ----------------------------------------------------------------------------------------------------


def independent_units(
    graph: Graph, spaces: Spaces, read: Read, zero_tol: float = 0.1, dup_tol: float = 0.1
) -> dict[str, IndependentNeurons]:
    """How many units of each layer are independent, as stochastic-collapse R7 counts them, through Gram matrices in blocks.

    Args:
        graph, spaces: a traced graph and its index spaces.
        read: name -> parameter.
        zero_tol, dup_tol: as in :func:`parasym.measure.neurons.independent_neurons`; conventions, so report a sweep.
    """
    out = {}
    for layer in find_layers(graph, spaces):
        blocks = _raw_blocks(layer, read)
        if blocks is not None and blocks.outside:
            out[layer.where] = _independent(torch.cat([*blocks.inside, *blocks.outside], 1), zero_tol, dup_tol)
    return out


def _independent(rows: Tensor, zero_tol: float, dup_tol: float) -> IndependentNeurons:
    size = rows.square().sum(1)
    alive = (size.sqrt() >= zero_tol * size.sqrt().max()) & (size > 0)
    groups, leaders = torch.full((len(rows),), -1), list[int]()
    step = max(1, _CHUNK // len(rows))
    for at in range(0, len(rows), step):
        gram = rows[at : at + step] @ rows.T
        total = size[at : at + step, None] + size[None, :]
        close = 2 * (total - 2 * gram) / total.clamp(min=1e-300) < dup_tol
        for k in range(len(gram)):
            if not alive[at + k]:
                continue
            hit = close[k, leaders].nonzero() if leaders else torch.zeros(0)
            groups[at + k] = leaders[int(hit[0])] if len(hit) else at + k
            if not len(hit):
                leaders.append(at + k)
    return IndependentNeurons(len(rows), int((~alive).sum()), tuple(groups.tolist()), len(leaders), zero_tol, dup_tol)


def _r7_rows(found: Mapping[str, IndependentNeurons], tolerances: tuple[float, float]) -> list[Row]:
    rows = []
    for where, r in found.items():
        lost = [i for i, g in enumerate(r.groups) if g != i]
        if lost:
            note = f"stochastic-collapse R7: {r.independent} of {r.width} independent, {r.zeros} vanishing "
            note += f"(zero_tol {tolerances[0]:g}, dup_tol {tolerances[1]:g}: conventions, report a sweep)"
            rows.append(_row("duplicate", where, lost, r.width, None, 0, note, []))
    return rows


# -- advice --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Remedy:
    severity: str
    what: str
    why: str
    command: str = ""


def advice(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What to do about what was found, worst first.

    Commands are one-liners for a Python session in which ``model`` is the audited model, or empty where no command does it.

    Args:
        rows: from :func:`collapse` or :func:`weight_collapse`.
    """
    out = []
    for r in rows:
        remedy = _remedy(r)
        if remedy is not None:
            out.append(
                {"severity": remedy.severity, "where": r["where"], "what": remedy.what, "why": remedy.why, "command": remedy.command}
            )
    order = {"high": 0, "medium": 1, "low": 2, "info": 3}
    return sorted(out, key=lambda a: order[a["severity"]])


def _remedy(r: Row) -> _Remedy | None:
    share = r["count"] / max(1, r["of"])
    kind, note = r["kind"], r["note"]
    if kind == "dead" and "no output depends" in note:
        return _Remedy(
            "low",
            f"{r['parameters_lost']:,} parameters are never used",
            "No output depends on them: they cost memory and optimiser state, and weight decay still moves them. Freeze or delete them.",
            _freeze(r),
        )
    if kind == "dead" and note.startswith("rows"):
        return _Remedy(
            "info",
            f"{r['count']} rows of the table vanish",
            "A padding row is meant to; any other was lost to weight decay, which shrinks rows that no token picks.",
        )
    if kind == "dead":
        gradient = "A constant output passes no gradient to the in-weights: only weight decay moves them, and the unit stays dead."
        zero = note.startswith("zero units")
        why = (
            "Weights in and out vanish together: the gradients vanish with them, and weight decay and gradient noise keep the unit there."
            if zero
            else gradient
        )
        do = (
            " Delete it: the outputs do not change."
            if r["removable"]
            else " Removing it changes outputs on other data; measure on more of yours before you do."
        )
        return _Remedy(
            "high" if share > 0.2 else "medium" if share > 0.02 else "low",
            f"{r['count']} of {r['of']} units {_are(r)} dead",
            why + do + " To use it again, draw its in-weights anew.",
            _redraw(r),
        )
    if kind == "duplicate" and r.get("parameters_lost", 0):
        equal = note.startswith("in- and out-weights equal")
        why = (
            "Equal units get equal gradients, so SGD, momentum and Adam never part them; weight decay pulls near copies together."
            if equal
            else "They compute one feature several times; gradients can still part them."
        )
        return _Remedy(
            "medium" if equal else "low",
            f"{r['count']} of {r['of']} units {'repeats another' if r['count'] == 1 else 'repeat others'}",
            why + " Merge them (add their out-weights), or add noise to one of each pair to part them.",
            _redraw(r) if equal else "",
        )
    if kind in ("always-on", "linearised"):
        return _Remedy(
            "medium" if share > 0.5 else "info",
            f"{r['count']} of {r['of']} units {_are(r)} linear on this data",
            "On this data the activation bends nothing there; a layer of such units adds no depth.",
        )
    if kind == "rank":
        why = "Weight decay on two factors acts as a nuclear norm on their product; a direction it has pruned has no gradient."
        return _Remedy(
            "medium" if share > 0.25 else "low",
            f"{r['count']} of {r['of']} directions {_are(r)} empty",
            why + " Use a smaller inner width, or less decay on these factors.",
        )
    if kind == "head":
        return _Remedy(
            "medium",
            f"{r['count']} of {r['of']} heads {'vanishes or repeats another' if r['count'] == 1 else 'vanish or repeat others'}",
            "A head whose product vanishes adds nothing of its own; equal heads get equal gradients. Prune them, or decay attention less.",
        )
    if kind == "norm-dead":
        return _Remedy(
            "medium" if share > 0.1 else "low",
            f"{r['count']} of {r['of']} channels {'has' if r['count'] == 1 else 'have'} lost the gain",
            "The channel carries its shift only; weight decay on gains drives this. Exclude gains and biases from weight decay.",
            _decay(),
        )
    if kind == "imbalance":
        why = "Factors of different size see different effective learning rates, and gradient flow conserves the difference. "
        why += "Weight decay shrinks it; rescaling to equal norms removes it at once and leaves the function as it is."
        return _Remedy("low" if share < 0.5 else "medium", f"{r['count']} of {r['of']} factor pairs {_are(r)} out of balance", why)
    return None


def _are(r: Row) -> str:
    return "is" if r["count"] == 1 else "are"


def _freeze(r: Row) -> str:
    return f"[model.get_parameter(n).requires_grad_(False) for n in {r['parameters']!r}]"


def _decay() -> str:
    wide, narrow = (f"[p for p in model.parameters() if p.dim() {test} 2]" for test in (">=", "<"))
    return f"groups = [{{'params': {wide}}}, {{'params': {narrow}, 'weight_decay': 0.0}}]"


def _redraw(r: Row) -> str:
    """A one-liner that draws the in-weights of the listed units again, at the spread of their layer."""
    at = r.get("axis")
    if at is None or not r["units"] or r["count"] > len(r["units"]):
        return ""
    weight = f"model.get_parameter({r['parameters'][0]!r}).data.movedim({at}, 0)"
    return f"import torch; i = {r['units']}; w = {weight}; w[i] = torch.randn_like(w[i]) * w.std()"
