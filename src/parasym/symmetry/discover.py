"""Which dictionary terms belong together: a linear solve on the null space of the Jacobian.

For each index space and each algebra a random element is pushed through every term that could take part; combinations of the
resulting tangents that lie in the null space are families. Nothing is assumed about which parameters write to a space and
which read from it, or with which weight: the null space says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from parasym.core.graph import Graph
from parasym.symmetry.dictionary import (
    Algebra, Copies, DictionaryAction, Entry, Place, Term, algebra_dim, algebra_element, by_unit, row_shape, tangent,
)
from parasym.symmetry.readers import readers
from parasym.symmetry.symmetry import Params
from parasym.symmetry.tangent import Flat, kernel, span

_TOL = 1e-8
Places = Mapping[str, Sequence[Place]]


@dataclass
class Found:
    """An entry with what it explains here."""

    entry: Entry
    action: DictionaryAction
    new: int


class Discovery:
    """Search of the dictionary over a model's null space."""

    def __init__(self, graph: Graph, params: Params, null: Tensor, flat: Flat, places: Places, generator: torch.Generator) -> None:
        self.graph, self.params, self.flat, self.generator = graph, params, flat, generator
        self.null = null
        self.explained = torch.zeros(null.shape[1], 0, dtype=torch.float64)
        self.places = {k: list(v) for k, v in places.items()}
        self.sizes = {k: v[0].index.shape[0] for k, v in self.places.items() if v}
        self.readers = readers(graph)
        self.found: list[Found] = []

    @property
    def complete(self) -> bool:
        return self.explained.shape[1] >= self.null.shape[1]

    def run(self) -> list[Found]:
        """All families, the narrowest kinds first."""
        for step in (self._free, self._rows, self._shifts, self._scales, self._linear):
            for space, places in self.places.items():
                if self.complete:
                    return self.found
                step(space, places)
        return self.found

    # -- kinds of families ---------------------------------------------------------------------------------------------------

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

    def _shifts(self, space: str, places: Sequence[Place]) -> None:
        terms: list[Term] = []
        for place in places:
            terms.append(Term("shift", place))
        for term in self._absorbs(space, places):
            terms.append(term)
            gains = {t.key: t for t in self._gained(term, places)}
            terms.extend(gains.values())
        for local in self._locals(space, places):
            self._solve("shift", space, places, terms, local)

    def _scales(self, space: str, places: Sequence[Place]) -> None:
        terms = [Term("mode", p) for p in places]
        for local in self._locals(space, places, with_space=True):
            self._solve("scale", space, places, terms, local)

    def _linear(self, space: str, places: Sequence[Place]) -> None:
        n = self.sizes[space]
        if n < 2:
            return
        terms = [Term(op, p) for p in places for op in ("mode", "dual")]
        gained = [t for term in terms for t in self._gained(term, places)]
        for local in self._locals(space, places):
            self._solve("gl", space, places, terms, local)
        for algebra in ("so", "so1"):
            only = [t for t in (*terms, *gained) if t.op == "mode"] + [t for t in gained if t.op == "dual"]
            for local in self._locals(space, places):
                if algebra_dim(algebra, n):  # type: ignore[arg-type]
                    self._solve(algebra, space, places, only, local)  # type: ignore[arg-type]

    # -- candidate terms -----------------------------------------------------------------------------------------------------

    def _gained(self, term: Term, places: Sequence[Place]) -> list[Term]:
        """The same term with the gain that stands before its reader folded in."""
        out = []
        for r in self.readers:
            if r.weight == term.place.parameter and r.in_axis == term.place.axis and r.gain is not None:
                gain = next((p for p in places if p.parameter == r.gain), None)
                if gain is not None and gain.index.shape[1] in (1, term.place.index.shape[1]):
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

    def _locals(self, space: str, places: Sequence[Place], with_space: bool = False) -> list[Copies]:
        """Sets of index spaces over which an element may vary, largest first."""
        outer = {k: int(v.max()) + 1 for p in places for k, v in p.outer.items()}
        if with_space:
            outer[space] = self.sizes[space]
        names = list(outer)[:5]
        sets = [c for r in range(len(names), -1, -1) for c in itertools.combinations(names, r)]
        return [Copies(tuple((n, outer[n]) for n in c)) for c in sets]

    # -- the solve -----------------------------------------------------------------------------------------------------------

    def _solve(self, algebra: Algebra, space: str, places: Sequence[Place], terms: Sequence[Term], local: Copies) -> None:
        n = 1 if algebra == "scale" else self.sizes[space]
        dim = algebra_dim(algebra, n)
        coords = torch.zeros(local.count, dim, dtype=torch.float64)
        coords[0] = torch.randn(dim, generator=self.generator, dtype=torch.float64) if dim > 1 else 1.0
        X = algebra_element(algebra, n, coords)
        kept, columns = [], []
        for term in terms:
            t = replace(term, place=by_unit(term.place, space)) if algebra == "scale" else term
            v = self._pack(tangent(t, self.params, X, local.columns(t.place)))
            if float(v.norm()) > 1e-12:
                kept.append(term)
                columns.append(v)
        if not columns:
            return
        T = torch.stack(columns, 1)
        if local.local and not any(self._distinguishes(t, space, algebra, local) for t in kept):
            return
        norms = T.norm(dim=0)
        A = T / norms
        K = kernel(A - self.null @ (self.null.T @ A), _TOL)
        if K.shape[1] == 0:
            return
        K = _independent(K, A)
        for weights in _sparse(K / norms[:, None]):
            pairs = tuple((w, t) for w, t in zip(weights, kept, strict=True) if w)
            if not pairs:
                continue
            entry = Entry(algebra, space, self.sizes[space], local, pairs)
            if self._outside(T @ torch.tensor(weights, dtype=torch.float64)[:, None]) < _TOL:
                self._keep(entry, 0)

    def _distinguishes(self, term: Term, space: str, algebra: Algebra, local: Copies) -> bool:
        place = by_unit(term.place, space) if algebra == "scale" else term.place
        return local.columns(place) is not None

    def _pack(self, tangents: Mapping[str, Tensor]) -> Tensor:
        v = torch.zeros(self.flat.size, dtype=torch.float64)
        for name, t in tangents.items():
            v[self.flat.slices[name]] += t.reshape(-1)
        return v

    def _outside(self, v: Tensor) -> float:
        """Relative part of tangents outside the null space."""
        size = float(v.norm())
        return float((v - self.null @ (self.null.T @ v)).norm()) / size if size > 0 else 1.0

    def _keep(self, entry: Entry, rows: int) -> None:
        action = DictionaryAction(entry, rows)
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
        u, s, _ = torch.linalg.svd(rest, full_matrices=False)
        fresh = u[:, s > 1e-6]
        if fresh.shape[1] == 0:
            return
        self.explained = torch.cat([self.explained, fresh], 1)
        self.found.append(Found(entry, action, self.explained.shape[1] - before))


def _whole(params: Params, name: str) -> Place:
    p = params[name]
    axis = max(range(p.dim()), key=lambda a: p.shape[a])
    return Place(name, axis, (), torch.arange(p.shape[axis])[:, None], {}, p.shape[axis])


def _independent(K: Tensor, A: Tensor) -> Tensor:
    """Drop combinations that vanish as tangents (two terms that are the same movement)."""
    V = A @ K
    u, s, Vh = torch.linalg.svd(V, full_matrices=False)
    return K @ Vh[s > 1e-8].T


def _sparse(K: Tensor) -> list[list[float]]:
    """A sparse basis of the columns of K with whole-number weights where there is one (reduced echelon form, rounded)."""
    M = K.T.clone()
    M = M / M.abs().max(dim=1, keepdim=True).values.clamp(min=1e-300)
    rows, r = M.shape[0], 0
    for c in range(M.shape[1]):
        if r == rows:
            break
        pivot = int(M[r:, c].abs().argmax()) + r
        if float(M[pivot, c].abs()) < 1e-7:
            continue
        M[[r, pivot]] = M[[pivot, r]]
        M[r] = M[r] / M[r, c]
        others = [i for i in range(rows) if i != r]
        M[others] = M[others] - M[others, c : c + 1] * M[r]
        r += 1
    out = []
    for row in M[:r].tolist():
        out.append([_round(w) for w in row])
    return out


def _round(w: float) -> float:
    f = Fraction(w).limit_denominator(12)
    return float(f) if abs(float(f) - w) < 1e-6 else (0.0 if abs(w) < 1e-9 else w)
