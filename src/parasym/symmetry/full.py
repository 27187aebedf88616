"""Models too large for their own Jacobian: search a small twin of the same architecture, write the families at full size.

Each family written down is certified on the full model by a finite element where its weights are at hand, and carries the
twin's certificate where they are not. The count of null directions is the twin's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from parasym.core.graph import Graph, trace
from parasym.core.samples import Batch, draw, flatten
from parasym.symmetry.blocks import ACROSS, by_blocks
from parasym.symmetry.certify import ACCEPT, relative_change
from parasym.symmetry.dictionary import DictionaryAction, EntriesAction, Entry
from parasym.symmetry.discrete import Candidate, as_symmetry, discrete_candidates, discrete_symmetries
from parasym.symmetry.fibre import Sampled
from parasym.symmetry.fixed import fixed_set_of
from parasym.symmetry.generic import generic_draw
from parasym.symmetry.naming import group_of, name_of, where_of
from parasym.symmetry.readers import readers
from parasym.symmetry.rigid import at_full_size, at_rest, nowhere
from parasym.symmetry.search import Progress, Search, search, settle, unsettled
from parasym.symmetry.spaces import Spaces, find_spaces
from parasym.symmetry.symmetry import Classified, Level, Symmetry, SymmetrySet
from parasym.symmetry.tangent import NullSpace, flat_of
from parasym.symmetry.twin import Twin, find_twin, spelled_out
from parasym.symmetry.write import Writer, WritingError, action_of, base_of

EXACT_PARAMETERS = 1500  # up to here a model is searched itself, beyond it its twin
_DRAWS = 4
_MOVED = 1e-4  # a certificate of a smaller relative move says nothing
_STILL = "the elements tried move these weights by less than 1e-4, so outputs that stay the same show nothing"


@dataclass
class FullSize:
    """What was found on a large model.

    Attributes:
        symmetries: written at full size.
        search: entries at full size, and what stayed open.
        rank, nullity, gap: of the twin; explained: share of its null directions with a certified counterpart at full size; None
            without a twin.
        method, twin: how, in words.
        rest: each parameter where no certified symmetry moves it.
    """

    symmetries: list[Symmetry]
    search: Search
    rank: int | None
    nullity: int | None
    explained: float | None
    method: str
    twin: str | None
    gap: tuple[float, float] | None = None
    rest: dict[str, Classified] = field(default_factory=dict)

    @property
    def found(self) -> SymmetrySet:
        """Everything found, as one set."""
        s = self.search
        return SymmetrySet(tuple(self.symmetries), tuple(s.refuted), tuple(s.undecided), tuple(s.approximate), self.rest)


def audit_full_size(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    graph: Graph,
    batches: list[Batch] | None,
    generator: torch.Generator,
    tell: Progress,
) -> FullSize:
    """Search the twin, write at full size, certify.

    Args:
        batches: inputs of the full model for certificates; None: its weights are not at hand.
    """
    spaces = find_spaces(spelled_out(model, args, kwargs, graph))
    empty = torch.zeros(0, 0, dtype=torch.float64)
    nothing = NullSpace(empty, torch.zeros(0, dtype=torch.float64), 0.0, 0)
    out = Search(graph, spaces, batches or [], batches or [], nothing, nothing)
    tell("twin", 0.0)
    twin = find_twin(model, tuple(args), dict(kwargs or {}))
    if twin is None:
        symmetries = _within_blocks(out, model, args, kwargs, batches, generator)
        method = "not counted: no small twin of this architecture could be made, so each block was searched by itself"
        return FullSize([*symmetries, *_dead(graph, symmetries)], out, None, None, None, method, None, rest=nowhere(graph, ACROSS))
    small = twin.graph
    level: Level = "train" if getattr(model, "training", False) else "function"
    found = _search_twin(small, twin.data, generator, level, tell)
    tell("writing", 0.0)
    symmetries, lost = _written(out, found, spaces, twin, graph, batches, generator, level, tell)
    symmetries += _dead(graph, symmetries)
    tell("discrete", 0.0)
    discrete, refuted, undecided = discrete_symmetries(small, found.fresh, generator)
    symmetries += _discrete(out, discrete, twin, graph, batches, generator)
    rest = at_full_size(spaces, twin.names, at_rest(found, undecided))
    out.refuted += found.refuted + [_why(r) for r in refuted]
    out.undecided += found.undecided + [_why(r) for r in undecided]
    out.approximate += found.approximate
    explained = max(0, found.explained - lost) / found.null.nullity if found.null.nullity else 1.0
    method = f"counted on a twin ({twin.how}): {found.null.nullity} null directions of {found.null.basis.shape[0]} parameters"
    return FullSize(
        symmetries,
        out,
        found.null.basis.shape[0] - found.null.nullity,
        found.null.nullity,
        explained,
        method,
        twin.how,
        found.null.gap,
        rest,
    )


def architecture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, generator: torch.Generator, tell: Progress
) -> SymmetrySet:
    """The symmetries of an architecture, at parameters in general position; its weights are not read.

    Args:
        model: also on the meta device.
    """
    hollow = isinstance(model, nn.Module) and any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
    graph = trace(model, args, kwargs, values=not hollow)
    if sum(p.numel() for p in graph.params.values()) > EXACT_PARAMETERS:
        return audit_full_size(model, args, kwargs, graph, None, generator, tell).found
    batch = _concrete(graph, args, kwargs, generator)
    for name, b in graph.buffers.items():
        if b.device.type == "meta" and b.is_floating_point():  # statistics of a norm: any positive numbers
            graph.buffers[name] = 0.5 + torch.rand(b.shape, generator=generator, dtype=torch.float64)
    graph.params = generic_draw(graph, find_spaces(graph), batch)
    found = search(graph, [batch], generator, progress=tell)
    discrete, refuted, undecided = discrete_symmetries(graph, found.fresh, generator)
    return SymmetrySet(
        (*(s for s in found.symmetries if s.kind != "point"), *discrete),
        (*found.refuted, *refuted),
        (*found.undecided, *undecided),
        tuple(found.approximate),
        at_rest(found, undecided),
    )


def _concrete(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any] | None, generator: torch.Generator) -> Batch:
    """The example batch, drawn where it lies on the meta device."""
    leaves = [a for a in pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if isinstance(a, Tensor)]
    if any(a.device.type == "meta" for a in leaves):
        like = [torch.zeros(a.shape, dtype=torch.float64 if a.is_floating_point() else a.dtype) for a in leaves]
        like = [torch.randn(a.shape, generator=generator, dtype=torch.float64) if a.is_floating_point() else a for a in like]
        return draw(graph, like, generator)
    return flatten(graph, args, kwargs)


def _within_blocks(
    out: Search,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    batches: list[Batch] | None,
    generator: torch.Generator,
) -> list[Symmetry]:
    """Symmetries of the blocks of a model, certified on the whole model where its weights are at hand."""
    found = by_blocks(model, args, kwargs, out.graph, lambda m, a, k: architecture(m, a, k, generator, lambda stage, fraction: None))
    out.refuted += found.refuted
    out.undecided += found.undecided
    out.approximate += found.approximate
    params = out.graph.params
    judge = Sampled.of(out.graph, batches[:1]) if batches else None
    before = judge.outputs(params) if judge else None
    symmetries = []
    for s in found:
        residual = s.residual
        if judge is not None and before is not None:
            residual = relative_change(before, judge.outputs(s.act(params, s.random_element(generator, scale=0.3))))
        if residual <= ACCEPT:
            symmetries.append(replace(s, residual=residual))
        else:
            why = f"holds within its block, but a finite element changes the full model's outputs by {residual:.1e}"
            out.refuted.append({"name": s.name, "why": why, "parameters": list(s.parameters)})
    return symmetries


def _search_twin(small: Graph, batch: Batch, generator: torch.Generator, level: Level, tell: Progress) -> Search:
    """Search at a few draws of the twin's parameters, until one shows no direction that closed forms leave.

    What closed forms leave on small widths is mostly an accident of the draw (a unit on one side of its threshold).
    """
    flat, spaces, best = flat_of(small), find_spaces(small), None
    for attempt in range(_DRAWS):
        if attempt:
            small.params = generic_draw(small, spaces, batch, seed=3 + attempt)
        settled, data = settle(small, small.params, [draw(small, batch, generator, wide=True)], flat, generator, True, wide=True)
        found = search(small, data, generator, grow=False, general=True, blind=False, level=level, progress=tell)
        found.undecided += unsettled(settled)
        if best is None or found.null.nullity - found.explained < best.null.nullity - best.explained:
            best = found
        if best.explained == best.null.nullity:
            break
    assert best is not None
    return best


def _why(record: Mapping[str, Any]) -> dict[str, Any]:
    """Discrete records under the audit's keys."""
    return {**record, "why": record.get("why") or record.get("reason", "")}


def _written(
    out: Search,
    found: Search,
    spaces: Spaces,
    twin: Twin,
    graph: Graph,
    batches: list[Batch] | None,
    generator: torch.Generator,
    level: Level,
    tell: Progress,
) -> tuple[list[Symmetry], int]:
    """The twin's families at full size, and how many of the twin's directions have no certified counterpart there."""
    constants = graph.prepare(batches[0]) if batches else {}
    writer = Writer(spaces, found.spaces, twin.names, twin.layer_of, constants)
    judge = Sampled.of(graph, batches[:1]) if batches else None
    before = judge.outputs(graph.params) if judge else None
    near = readers(spaces.graph, stacked=True)
    symmetries: list[Symmetry] = []
    known: set[Any] = set()
    lost = sum(s.dim for s in found.symmetries)
    for k, (s, entry) in enumerate(zip(found.symmetries, found.entries, strict=True)):
        tell("writing", k / max(1, len(found.symmetries)))
        if entry is None and (rows := _unread(s, twin, graph)):
            certified = [_certified_rows(s, a, graph, judge, before, generator, level) for a in rows]
            symmetries += [c for c in certified if c is not None]
            lost -= s.dim if any(certified) else 0
            out.entries += [None for c in certified if c is not None]
            read = [p for a, c in zip(rows, certified, strict=True) if c is None for p in a.entries]
            if read:
                out.refuted.append({"name": s.name, "why": "the twin does not read these numbers, the full model does", "parameters": read})
            continue
        if entry is None or s.kind in ("point", "blind"):
            out.undecided.append(
                {
                    "name": s.name,
                    "why": f"a family of {s.dim} directions of the twin without a closed form, so it is not written at full size",
                    "parameters": [],
                    "dim": s.dim,
                }
            )
            continue
        try:
            entries, actions, residual = _best_way(writer, entry, s, known, twin, graph, judge, before, generator)
        except WritingError as error:
            out.undecided.append({"name": s.name, "why": f"not written at full size: {error}", "parameters": [], "dim": s.dim})
            continue
        where = [p for e in entries for p in e.parameters]
        if residual is None:
            out.undecided.append({"name": s.name, "why": _STILL, "parameters": where, "dim": s.dim})
            continue
        if residual > ACCEPT:
            why = f"holds on the twin, but a finite element changes the full model's outputs by {residual:.1e}"
            out.refuted.append({"name": s.name, "why": why, "parameters": where})
            continue
        lost -= s.dim
        known.update(map(_same, entries))
        note = "certified on the full model by a finite element" if judge else "certificate of the twin"
        for e, action in zip(entries, actions, strict=True):
            dim = _dim(action, entry, s.dim)
            symmetries.append(
                Symmetry(
                    name_of(e, near),
                    group_of(e, action.dim),
                    dim,
                    s.kind,
                    e.parameters,
                    level,
                    residual,
                    True,
                    action,
                    where_of(e.parameters),
                    fixed_set=fixed_set_of(e),
                    note=note,
                )
            )  # type: ignore[arg-type]
            out.entries.append(e)
    out.symmetries = symmetries
    return symmetries, lost


def _best_way(
    writer: Writer,
    entry: Entry,
    s: Symmetry,
    known: set[Any],
    twin: Twin,
    graph: Graph,
    judge: Sampled | None,
    before: Tensor | None,
    generator: torch.Generator,
) -> tuple[list[Entry], list[DictionaryAction], float | None]:
    """A family at full size in the first way that its certificate accepts, or else in the first way; with its residual."""
    tried: list[tuple[list[Entry], list[DictionaryAction], float | None]] = []
    for way in writer.ways(entry):
        # between equal layers one family of the twin may be written where another has been already
        entries = list({key: e for e in way if (key := _same(e)) not in known}.values())
        actions = [action_of(e, graph.params) for e in entries]
        residual: float | None = 0.0  # nothing left to write
        if entries and judge is not None and before is not None:
            residual = _joint_residual(actions, judge, before, graph.params, generator)
        elif entries:
            residual = s.residual if _acted(s.action, twin.graph.params, [_element(s.action.dim, entry.size, generator)]) else None
        tried.append((entries, actions, residual))
        if residual is not None and residual <= ACCEPT:
            return tried[-1]
    return tried[0]


def _same(entry: Entry) -> Any:
    """Equal for two entries that act alike: the same terms on the same places, up to a common factor."""
    terms = sorted(((t.place.parameter, t.place.axis, t.place.branch, t.op), w) for w, t in entry.terms)
    return entry.algebra, entry.space, entry.copies, tuple((place, round(w / terms[0][1], 9)) for place, w in terms)


def _unread(s: Symmetry, twin: Twin, graph: Graph) -> list[EntriesAction]:
    """Numbers of the twin that nothing reads, at full size: whole slices along axes whose size the twin keeps; else nothing."""
    if not isinstance(s.action, EntriesAction):
        return []
    out = []
    for name, small in twin.names.items():
        if small not in s.action.entries or name not in graph.params:
            continue
        shape, wide = twin.graph.params[small].shape, graph.params[name].shape
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[s.action.entries[small]] = True
        if mask.dim() < 2:
            return []
        rows = [mask.movedim(a, 0).flatten(1).any(1).nonzero()[:, 0] for a in range(mask.dim())]
        if math.prod(len(r) for r in rows) != int(mask.sum()):
            return []
        if any(len(r) < n and n != m for r, n, m in zip(rows, shape, wide, strict=True)):
            return []
        grid = torch.zeros(wide, dtype=torch.bool)
        whole = [torch.arange(m) if len(r) == n else r for r, n, m in zip(rows, shape, wide, strict=True)]
        grid[torch.meshgrid(*whole, indexing="ij")] = True
        out.append(EntriesAction({name: grid.reshape(-1).nonzero()[:, 0]}))
    return out


def _certified_rows(
    s: Symmetry,
    action: EntriesAction,
    graph: Graph,
    judge: Sampled | None,
    before: Tensor | None,
    generator: torch.Generator,
    level: Level,
) -> Symmetry | None:
    """Unread numbers of the full model as a symmetry, if its outputs do not depend on them."""
    residual, note = s.residual, "certificate of the twin"
    if judge is not None and before is not None:
        moved = _acted(action, graph.params, [_element(action.dim, 1, generator)])
        residual = relative_change(before, judge.outputs({**graph.params, **moved})) if moved else math.inf
        note = "certified on the full model by a finite element"
    if residual > ACCEPT:
        return None
    parameters = tuple(action.entries)
    dim = action.dim - (s.action.dim - s.dim)  # what other families of the twin count of it they count here
    where = where_of(parameters)
    return Symmetry(s.name, f"R^{action.dim}", dim, "pure", parameters, level, residual, True, action, where, note=note)


def _joint_residual(
    actions: Sequence[DictionaryAction], judge: Sampled, before: Tensor, params: Mapping[str, Tensor], generator: torch.Generator
) -> float | None:
    """One finite element of every copy of a family at once, end to end on the full model; None where a copy hardly moves."""
    moved = dict(params)
    for a in actions:
        new = _acted(a, moved, [_element(a.dim, a.entry.size, generator)])
        if new is None:
            return None
        moved.update(new)
    return relative_change(before, judge.outputs(moved))


def _element(dim: int, size: int, generator: torch.Generator) -> Tensor:
    """Coordinates of a finite element; its matrix has about the norm 0.5 at any size."""
    return 0.5 * torch.randn(dim, generator=generator, dtype=torch.float64) / max(1.0, float(size) ** 0.5)


def _acted(action: Any, params: Mapping[str, Tensor], elements: Iterable[Tensor]) -> dict[str, Tensor] | None:
    """What the first of some elements to move the weights makes of them.

    None where none moves any tensor by 1e-4 of its norm: outputs that stay the same then show nothing.
    """
    for element in elements:
        new: dict[str, Tensor] = action.act(params, element)
        if any(float((new[n] - params[n]).norm()) >= _MOVED * (float(params[n].norm()) + 1e-9) for n in new):
            return new
    return None


def _dim(action: DictionaryAction, entry: Entry, new: int) -> int:
    """Dimension at full size: what overlaps with other families in the twin overlaps here, for each copy."""
    from parasym.symmetry.dictionary import algebra_dim

    if entry.algebra in ("row", "free"):
        return action.dim
    n = 1 if entry.algebra == "scale" else entry.size
    overlap = entry.copies.count * algebra_dim(entry.algebra, n) - new
    if overlap and entry.copies.count > 1 and overlap % entry.copies.count == 0:
        overlap = overlap // entry.copies.count * action.entry.copies.count
    return max(0, action.dim - overlap)


def _dead(graph: Graph, found: Sequence[Symmetry]) -> list[Symmetry]:
    """Whole parameters that no output depends on."""
    known = {p for s in found for p in s.parameters}
    out = []
    for name in graph.dead:
        if name not in known:
            size = graph.params[name].numel()
            action = EntriesAction({name: torch.arange(size)})
            out.append(
                Symmetry(
                    "unread parameters (free)",
                    f"R^{size}",
                    size,
                    "pure",
                    (name,),
                    "function",
                    0.0,
                    True,
                    action,
                    where_of((name,)),
                    note="no output depends on it in the traced graph",
                )
            )
    return out


def _discrete(
    out: Search, found: Sequence[Symmetry], twin: Twin, graph: Graph, batches: list[Batch] | None, generator: torch.Generator
) -> list[Symmetry]:
    """The full model's candidates whose counterpart on the twin is certified; all copies of one are tested at once."""
    certified = {_signature(s.action.key(), {}, twin.graph): s for s in found if hasattr(s.action, "key")}
    groups: dict[Any, list[Candidate]] = {}
    kinds = {f: base_of(f, twin.layer_of(f)) for f in graph.params}
    small_kinds = {t: kinds[f] for f, t in reversed(twin.names.items()) if f in kinds}
    alike = {_signature(s.action.key(), small_kinds, twin.graph): s for s in certified.values()}  # type: ignore[attr-defined]
    for c in discrete_candidates(out.spaces.graph):
        for option in (c, c.fallback):
            if option is None:
                continue
            if (signature := _signature(option.key, twin.names, graph)) in certified:
                groups.setdefault(signature, []).append(option)
                break
            if (kind := _signature(option.key, kinds, graph)) in alike:  # between layers that the twin has one of: tested by itself
                groups[kind, option.name] = [option]
                certified[kind, option.name] = alike[kind]
                break
    before = Sampled.of(graph, batches[:1]).outputs(graph.params) if batches else None
    small = {**twin.graph.buffers, **twin.graph.params}
    symmetries = []
    for signature, candidates in groups.items():
        residual, note, moving = certified[signature].residual, "certificate of the twin", list[Candidate]()
        state = {**graph.buffers, **graph.params}
        for c in candidates:
            action: Any = c.action if before is not None else certified[signature].action
            new = _acted(action, state if before is not None else small, reversed(list(action.tests(generator))))
            if new is None:
                out.undecided.append({"name": c.name, "why": _STILL, "parameters": list(c.parameters(graph)), "dim": 0})
                continue
            moving.append(c)
            state |= new if before is not None else {}
        if batches and before is not None:
            turned = replace(graph, buffers={n: state[n] for n in graph.buffers})  # running statistics go with their channels
            after = Sampled.of(turned, batches[:1]).outputs({n: state[n] for n in graph.params})
            residual, note = relative_change(before, after), "certified on the full model by a finite element"
        if residual > ACCEPT:
            out.refuted.append(
                {
                    "name": candidates[0].name,
                    "why": f"holds on the twin, but changes the full model's outputs by {residual:.1e}",
                    "parameters": list(candidates[0].parameters(graph)),
                }
            )
            continue
        for c in moving:
            s = as_symmetry(graph, c, residual)
            symmetries.append(replace(s, note="; ".join(x for x in (s.note, note) if x)))
    return symmetries


def _signature(key: Any, names: Mapping[str, str], graph: Graph) -> Any:
    """A candidate's key on the twin's parameters, as sets: copies of one layer coincide."""
    if isinstance(key, tuple) and len(key) == 3 and isinstance(key[0], str) and isinstance(key[1], int):
        return (names.get(key[0], key[0]), key[1], key[2]) if key[0] in graph.params else None
    if isinstance(key, tuple):
        return frozenset(x for x in (_signature(k, names, graph) for k in key) if x is not None)
    return names.get(key, key) if isinstance(key, str) else key
