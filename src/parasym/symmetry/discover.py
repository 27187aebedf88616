"""Which dictionary terms belong together: a linear solve on the null space of the Jacobian.

For each index space and each algebra a random element is pushed through every term that could take part; combinations of the
resulting tangents that lie in the null space are families. Nothing is assumed about which parameters write to a space and
which read from it, or with which weight: the null space says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from parasym.core.graph import Graph
from parasym.symmetry.dictionary import (
    Algebra,
    Copies,
    DictionaryAction,
    EntriesAction,
    Entry,
    Place,
    Term,
    algebra_dim,
    algebra_element,
    by_unit,
    row_shape,
    tangent,
)
from parasym.symmetry.readers import frozen_norms, readers
from parasym.symmetry.symmetry import Params
from parasym.symmetry.tangent import Flat, NullSpace, kernel, svd

_TOL = 1e-11  # null directions move outputs by 1e-15, genuine ones by 4e-10 and more
Places = Mapping[str, Sequence[Place]]


@dataclass
class Found:
    """An entry with what it explains here."""

    entry: Entry
    action: DictionaryAction | EntriesAction
    new: int


class Discovery:
    """Search of the dictionary over a model's null space."""

    def __init__(
        self,
        graph: Graph,
        params: Params,
        null: NullSpace,
        flat: Flat,
        places: Places,
        constants: Mapping[str, object],
        generator: torch.Generator,
    ) -> None:
        self.graph, self.params, self.flat, self.generator = graph, params, flat, generator
        self.null, self.factor = null.basis, null.factor / (null.scale or 1.0)
        self.explained = torch.zeros(null.nullity, 0, dtype=torch.float64)
        self.places = {k: list(v) for k, v in places.items()}
        self.sizes = {k: v[0].index.shape[0] for k, v in self.places.items() if v}
        self.readers, self.frozen = readers(graph, stacked=True), frozen_norms(graph)
        self.constants = {k: v for k, v in constants.items() if isinstance(v, Tensor)}
        self.found: list[Found] = []
        self.everywhere: dict[str, list[Place]] = {}
        for found in self.places.values():
            for p in found:
                self.everywhere.setdefault(p.parameter, []).append(p)

    @property
    def complete(self) -> bool:
        return self.explained.shape[1] >= self.null.shape[1]

    def run(self) -> list[Found]:
        """All families, the narrowest kinds first; within a kind those with the most independent copies first."""
        for space, places in self.places.items():
            self._free(space, places)
        for space, places in self.places.items():
            self._rows(space, places)
        for step in (self._shifts, self._linear, self._scales):
            jobs = [(local, space) for space, places in self.places.items() for local in self._locals(space, places, step)]
            for local, space in sorted(jobs, key=lambda j: -len(j[0].local)):
                if self.complete:
                    return self.found
                step(space, self.places[space], local)
        self._uniform()
        self._entries()
        return self.found

    # -- kinds of families ---------------------------------------------------------------------------------------------------

    def _entries(self) -> None:
        """Numbers that lie in the null space by themselves."""
        dead = (self.null.norm(dim=1) > 1 - 1e-9).nonzero().squeeze(1)
        for name, s in self.flat.slices.items():
            index = dead[(dead >= s.start) & (dead < s.stop)] - s.start
            if len(index):
                self._keep(Entry("free", "", 1, Copies(), ()), 0, EntriesAction({name: index}))

    def _free(self, space: str, places: Sequence[Place]) -> None:
        """Parameters (or parts of one) that nothing reads."""
        for place in places:
            term = Term("free", place)
            self._single("free", space, term)

    def _rows(self, space: str, places: Sequence[Place]) -> None:
        """Directions no reader sees: all-ones in a writer, the normal of a norm's output in a reader."""
        for place in places:
            self._single("row", space, Term("ones", place))
        for term in self._normals(space, places):
            self._single("row", space, term)

    def _single(self, algebra: Algebra, space: str, term: Term) -> None:
        rows = row_shape(term, self.params)
        if rows == 0:
            return
        r = torch.randn(rows, generator=self.generator, dtype=torch.float64)
        if self._outside(self._pack(tangent(term, self.params, r))[:, None]) > _TOL:
            return
        entry = Entry(algebra, space, term.place.index.shape[0], Copies(), ((1.0, term),))
        self._keep(entry, rows)

    def _shifts(self, space: str, places: Sequence[Place], local: Copies) -> None:
        absorbs = self._absorbs(space, places)
        gained = list({t.key: t for term in absorbs for t in self._gained(term, places)}.values())
        self._solve(
            "shift",
            space,
            [
                *self._folds(places),
                *gained,
                *absorbs,
                *(Term("shift", p) for p in places),
                *self._partial(places),
                *self._recentres(places, "shift"),
            ],
            local,
        )

    def _scales(self, space: str, places: Sequence[Place], local: Copies) -> None:
        self._solve(
            "scale", space, [*(self._recentres(places, "recentre") if local.local else ()), *(Term("mode", p) for p in places)], local
        )

    def _linear(self, space: str, places: Sequence[Place], local: Copies) -> None:
        n = self.sizes[space]
        if n < 2:
            return
        terms = [Term(op, p) for p in places for op in ("mode", "dual")]
        self._solve("gl", space, terms, local)
        gained = [t for p in places for t in self._gained(Term("mode", p), places)]
        for algebra in ("so", "so1"):
            if algebra_dim(algebra, n):  # type: ignore[arg-type]
                self._solve(algebra, space, [t for t in terms if t.op == "mode"] + gained, local)  # type: ignore[arg-type]

    def _uniform(self) -> None:
        """Whole tensors scaled or shifted by one number, across index spaces."""
        sizes = {n: p.shape[0] if p.dim() else 1 for n, p in self.params.items() if p.numel()}
        whole = {n: Place(n, 0, (), torch.arange(size)[None, :], {}, size) for n, size in sizes.items()}
        self._solve("scale", "", [Term("mode", p) for p in whole.values()], Copies())
        absorbs = []
        for r in self.readers:
            if r.bias is not None:
                size = self.params[r.weight].shape[r.in_axis]
                place = Place(r.weight, r.in_axis, (), torch.arange(size)[None, :], {}, size)
                absorbs.append(Term("absorb", place, target=_whole(self.params, r.bias), out_axis=r.out_axis))
        self._solve("shift", "", [*absorbs, *(Term("shift", p) for p in whole.values())], Copies())

    # -- candidate terms -----------------------------------------------------------------------------------------------------

    def _gained(self, term: Term, places: Sequence[Place]) -> list[Term]:
        """The same term with the gain that stands before its reader folded in."""
        out = []
        for r in self.readers:
            if r.weight == term.place.parameter and r.in_axis == term.place.axis and r.gain is not None:
                gain = next((p for p in places if p.parameter == r.gain), None)
                if gain is not None and gain.index.shape[1] in (1, term.place.index.shape[1]):
                    out += [replace(term, gain=gain, gain_power=s) for s in (1, -1)]
        if term.op == "mode":  # the shift of a norm turns with the activation that it is added to
            for gain_name in {r.gain for r in self.readers if r.gain and r.offset == term.place.parameter}:
                gain = next((p for p in places if p.parameter == gain_name), None)
                if gain is not None:
                    out += [replace(term, gain=gain, gain_power=s) for s in (1, -1)]
        return out

    def _absorbs(self, space: str, places: Sequence[Place]) -> list[Term]:
        out = []
        for r in self.readers:
            if r.bias is None:
                continue
            for place in places:
                if (place.parameter, place.axis) == (r.weight, r.in_axis):
                    out.append(Term("absorb", place, target=_whole(self.params, r.bias), out_axis=r.out_axis))
        return out

    def _partial(self, places: Sequence[Place]) -> list[Term]:
        """Shifts of only some rows, where another axis is a concatenation (class token, then patches)."""
        out = []
        for p in places:
            for other in {q.axis for q in self.everywhere.get(p.parameter, ()) if q.axis != p.axis}:
                blocks = {q.branch: q for q in self.everywhere[p.parameter] if q.axis == other and q.branch != (-1,)}
                if len(blocks) > 1:
                    shape = self.params[p.parameter].shape
                    out += [Term("shift", p, rows=rows_of(shape, p.axis, q), rows_at=(other, q.branch[0])) for q in blocks.values()]
        return out

    def _recentres(self, places: Sequence[Place], op: str) -> list[Term]:
        """What the offset of a norm with frozen statistics must do when its input is scaled ("recentre") or shifted."""
        out = []
        for f in self.frozen:
            gain, offset = (next((p for p in places if p.parameter == n), None) for n in (f.gain, f.offset))
            mean, scale = self.constants.get(f.mean), self.constants.get(f.scale)
            if gain is not None and offset is not None and mean is not None and scale is not None:
                factor = (scale * mean if op == "recentre" else scale).reshape(-1)
                if factor.numel() == offset.index.shape[0]:
                    out.append(Term(op, offset, gain=gain, factor=factor))
        return out

    def _folds(self, places: Sequence[Place]) -> list[Term]:
        """A reader without a bias absorbs a shift through the normal of the norm before it."""
        out = []
        for r in self.readers:
            for place in places:
                gain = next((p for p in places if p.parameter == r.gain), None)
                offset = next((p for p in places if p.parameter == r.offset), None)
                if (place.parameter, place.axis) == (r.weight, r.in_axis) and offset is not None and (gain is not None or r.gain is None):
                    out.append(Term("fold", place, gain=gain, offset=offset, out_axis=r.out_axis))
        return out

    def _normals(self, space: str, places: Sequence[Place]) -> list[Term]:
        out = []
        for r in self.readers:
            for place in places:
                if (place.parameter, place.axis) != (r.weight, r.in_axis):
                    continue
                gain = next((p for p in places if p.parameter == r.gain), None) if r.gain else None
                offset = next((p for p in places if p.parameter == r.offset), None) if r.offset else None
                if (r.gain and gain is None) or (r.offset and (offset is None or r.bias is None)):
                    continue
                bias = _whole(self.params, r.bias) if r.bias and offset is not None else None
                out.append(Term("normal", place, gain=gain, offset=offset, target=bias, out_axis=r.out_axis))
        return out

    def _locals(self, space: str, places: Sequence[Place], step: Callable[..., None]) -> list[Copies]:
        """Sets of index spaces over which an element may vary, largest first."""
        outer = {k: int(v.max()) + 1 for p in places for k, v in p.outer.items()}
        if step == self._scales:
            outer[space] = self.sizes[space]
        names = list(outer)[:4]
        seen: dict[str, set[str]] = {}
        for p in places:
            for k in p.cross:
                seen.setdefault(k, set()).add(p.parameter)
                outer.setdefault(k, int(p.cross[k].max()) + 1)
        shared = sorted((k for k in seen if len(seen[k]) > 1 and k not in names), key=lambda k: -len(seen[k]))
        names += shared[: max(0, 3 - len(names))] if step == self._scales else []
        sets = [c for r in range(len(names), -1, -1) for c in itertools.combinations(names, r)]
        return [Copies(tuple((n, outer[n]) for n in c)) for c in sets]

    # -- the solve -----------------------------------------------------------------------------------------------------------

    def _solve(self, algebra: Algebra, space: str, terms: Sequence[Term], local: Copies) -> None:
        size = self.sizes.get(space, 1)
        n = 1 if algebra == "scale" else size
        dim = algebra_dim(algebra, n)
        coords = torch.zeros(local.count, dim, dtype=torch.float64)
        coords[0] = torch.randn(dim, generator=self.generator, dtype=torch.float64) if dim > 1 else 1.0
        X = algebra_element(algebra, n, coords)
        kept, columns = [], []
        for term in terms:
            t = replace(term, place=by_unit(term.place, space)) if algebra == "scale" and space else term
            if local.columns(t.place) is None:
                continue
            v = self._pack(tangent(t, self.params, X, local.columns(t.place)))
            if 1e-12 < float(v.norm()) < math.inf:  # a fold through an offset of zero is not finite
                kept.append(term)
                columns.append(v)
        if not columns:
            return
        T = torch.stack(columns, 1)
        norms = T.norm(dim=0)
        A = T / norms
        K = kernel(self.factor @ A, _TOL)
        if K.shape[1] == 0:
            return
        K = K / norms[:, None]
        movement = self.null.T @ T @ K
        fresh = movement - self.explained @ (self.explained.T @ movement)
        known = K @ kernel(fresh / movement.norm(dim=0).clamp(min=1e-300).max(), 1e-7)
        for weights in _representatives(K, known):
            pairs = tuple((w, t) for w, t in zip(weights, kept, strict=True) if w)
            if (
                pairs
                and all(_is_nice(w) for w, _ in pairs)
                and not (algebra == "gl" and _antisymmetric(pairs))
                and self._outside(T @ torch.tensor(weights, dtype=torch.float64)[:, None]) < _TOL
            ):
                self._keep(Entry(algebra, space, size, local, pairs), 0)

    def _pack(self, tangents: Mapping[str, Tensor]) -> Tensor:
        v = torch.zeros(self.flat.size, dtype=torch.float64)
        for name, t in tangents.items():
            v[self.flat.slices[name]] += t.reshape(-1)
        return v

    def _outside(self, v: Tensor) -> float:
        """How far tangents move the outputs, relative to their size and to the largest singular value."""
        size = float(v.norm())
        return float((self.factor @ v).norm()) / size if size > 0 else 1.0

    def tangent_error(self, action: DictionaryAction | EntriesAction) -> float:
        """Largest relative part of an action's tangents outside the null space."""
        worst = 0.0
        tangents = action.generators(self.params)
        V = torch.zeros(action.dim, self.flat.size, dtype=torch.float64)
        for name, t in tangents.items():
            V[:, self.flat.slices[name]] += t.reshape(action.dim, -1)
        for v in V:
            if float(v.norm()) > 1e-12:
                worst = max(worst, self._outside(v[:, None]))
        return worst

    def _keep(self, entry: Entry, rows: int, action: DictionaryAction | EntriesAction | None = None) -> None:
        action = action or DictionaryAction(entry, rows)
        tangents = action.generators(self.params)
        V = torch.zeros(action.dim, self.flat.size, dtype=torch.float64)
        for name, t in tangents.items():
            V[:, self.flat.slices[name]] += t.reshape(action.dim, -1)
        if self._outside(V.T) > _TOL * 10:
            return
        inside = self.null.T @ V.T
        inside = inside / inside.norm(dim=0).clamp(min=1e-300)
        before = self.explained.shape[1]
        rest = inside - self.explained @ (self.explained.T @ inside)
        rest = rest - self.explained @ (self.explained.T @ rest)
        u, s, _ = svd(rest, full=False)
        fresh = u[:, s > 1e-6]
        if fresh.shape[1] == 0:
            return
        self.explained = torch.cat([self.explained, fresh], 1)
        self.found.append(Found(entry, action, self.explained.shape[1] - before))


def rows_of(shape: torch.Size, axis: int, other: Place) -> Tensor:
    """Entries of the axes other than ``axis``, flattened, that belong to a place on one of them."""
    rest = [a for a in range(len(shape)) if a != axis]
    grid = torch.arange(torch.Size([shape[a] for a in rest]).numel()).reshape([shape[a] for a in rest]).movedim(rest.index(other.axis), 0)
    return grid[other.index.reshape(-1)].reshape(-1).sort().values


def _antisymmetric(pairs: Sequence[tuple[float, Term]]) -> bool:
    """X and -X^T on one place: that is the rotation X - X^T, found as such."""
    modes = {(t.place.key, t.gain and t.gain.key) for _, t in pairs if t.op == "mode"}
    return any((t.place.key, t.gain and t.gain.key) in modes for _, t in pairs if t.op == "dual")


def _whole(params: Params, name: str) -> Place:
    p = params[name]
    axis = max(range(p.dim()), key=lambda a: p.shape[a])
    return Place(name, axis, (), torch.arange(p.shape[axis])[:, None], {}, p.shape[axis])


def _echelon(rows: Tensor) -> tuple[Tensor, list[int]]:
    """Reduced row echelon form with its pivot columns."""
    M, pivots, r = rows.clone(), [], 0
    scale = float(M.abs().max()) if M.numel() else 0.0
    for c in range(M.shape[1]):
        if r == len(M):
            break
        at = int(M[r:, c].abs().argmax()) + r
        if float(M[at, c].abs()) < 1e-7 * scale:
            continue
        M[[r, at]] = M[[at, r]]
        M[r] = M[r] / M[r, c].clone()
        others = [i for i in range(len(M)) if i != r]
        M[others] = M[others] - M[others, c : c + 1] * M[r]
        pivots.append(c)
        r += 1
    return M[:r], pivots


def _representatives(K: Tensor, known: Tensor) -> list[list[float]]:
    """Whole-number combinations that span K beyond what is known.

    Adding a known combination changes nothing new, so among all such representatives those with small whole weights are
    taken: their weights then hold for every unit and every width.
    """
    base, taken = _echelon(known.T)
    rest = K.T.clone()
    for row, c in zip(base, taken, strict=True):
        rest = rest - rest[:, c : c + 1] * row
    rest, _ = _echelon(rest[rest.norm(dim=1) > 1e-9])
    out = []
    for i in range(len(rest)):  # elementary row operations: the span stays
        others = torch.cat([base, rest[:i], rest[i + 1 :]])
        if 0 < len(others) <= 5:
            signs = torch.tensor(list(itertools.product((0.0, 1.0, -1.0), repeat=len(others))), dtype=K.dtype)
            candidates = rest[i] + signs.reshape(-1, len(others)) @ others
            rest[i] = candidates[int(_cost(candidates).argmin())]
        rest[i] = _simplest(rest[i], others)
        out.append([_round(w) for w in rest[i].tolist()])
    return out


def _cost(rows: Tensor) -> Tensor:
    """Weights that are no halves of whole numbers count most, then the number of weights."""
    odd = ((rows * 2 - (rows * 2).round()).abs() > 1e-6).sum(-1)
    return 1e3 * odd + (rows.abs() > 1e-9).sum(-1)


def _simplest(row: Tensor, others: Tensor) -> Tensor:
    """Add multiples of other rows that clear or round a weight, as long as that makes the row simpler."""
    for _ in range(4 * len(others)):
        steps = []
        for other in others:
            at = other.abs() > 1e-9
            share = row[at] / other[at]
            factors = torch.cat([-share, (row[at].round() - row[at]) / other[at], torch.tensor([1.0, -1.0], dtype=row.dtype)])
            steps.append(row + factors[:, None] * other)
        if not steps:
            return row
        candidates = torch.cat(steps)
        cost = _cost(candidates)
        if float(cost.min()) >= float(_cost(row)):
            return row
        row = candidates[int(cost.argmin())]
    return row


def _is_nice(w: float) -> bool:
    """A weight that can hold at every width: a small fraction. Others belong to these weights and these data only."""
    return float(Fraction(w).limit_denominator(12)) == w


def _round(w: float) -> float:
    f = Fraction(w).limit_denominator(12)
    return float(f) if abs(float(f) - w) < 1e-6 else (0.0 if abs(w) < 1e-9 else w)
