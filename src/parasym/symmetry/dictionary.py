"""The dictionary: closed-form tangents and finite actions on index spaces, at any size.

A term says how one parameter moves along one index space: multiplied by exp(X) on that axis (or by the contragredient, or
with a norm's gain folded in), shifted, absorbing a shift of its input into a bias, moved along all-ones, along the normal of
a norm's output, or freely. Which terms belong together, and with which weights, is not written here: :mod:`.discover` solves
for it on the null space of a model's Jacobian. The weights are small whole numbers that do not depend on any width, so a
family found on a small twin is written down at full size by replacing the index spaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from parasym.symmetry.symmetry import Params

Algebra = Literal["scale", "gl", "so", "so1", "shift", "row", "free"]


@dataclass(frozen=True)
class Place:
    """One index space on one axis of one parameter.

    Attributes:
        parameter, axis: where.
        branch: which part of the axis, where it is a concatenation (query, key, value; gates).
        index: (n, m) positions along the axis: unit i sits at index[i, :].
        outer: for each other index space that the m columns run over, its name -> (m,) index.
        size: length of the axis.
        cross: for index spaces on the parameter's other axes, name -> (rest,) index, rest the other axes flattened.
    """

    parameter: str
    axis: int
    branch: tuple[int, ...]
    index: Tensor
    outer: Mapping[str, Tensor]
    size: int
    cross: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, tuple[int, ...]]:
        return self.parameter, self.axis, self.branch

    @cached_property
    def spacing(self) -> tuple[int | None, bool]:
        """First position and whether units (else columns) are next to each other, where the positions are a run of the axis; else None."""
        n, m = self.index.shape
        if n * m == 0 or int(self.index[-1, -1]) - (first := int(self.index[0, 0])) != n * m - 1:
            return None, False
        steps = torch.arange(first, first + n * m, device=self.index.device)
        if torch.equal(self.index, steps.view(n, m)):
            return first, False
        return (first, True) if torch.equal(self.index, steps.view(m, n).T) else (None, False)


@dataclass(frozen=True)
class Term:
    """How one parameter takes part in a family.

    Attributes:
        op: "mode" (p <- exp(w X) p on the axis), "dual" (p <- exp(-w X^T) p), "shift" (p += w c), "absorb" (bias -= w W c),
            "ones" (p += 1 r^T), "normal" (W += r (1/g)^T, bias -= r sum(b/g)), "fold" (a reader without a bias
            absorbs a shift through that normal),
            "free" (p += r).
        place: where the index space sits on the parameter.
        gain: a gain vector folded into X (mode, dual: g X g^-1; shift: g c), as its place.
        gain_power: +1 or -1.
        target: for absorb and normal, the place of the bias on the reader's output axis.
        offset: for normal, the shift that goes with the gain.
        factor: constant (n,) multiplying the vector (the scale of frozen batch statistics).
        rows: for shift, which entries of the other axes move (a class token's position, say); None: all.
        rows_at: the other axis and its branch that ``rows`` stands for.
        out_axis: for absorb and normal, the axis of the parameter that the bias shares.
    """

    op: str
    place: Place
    gain: Place | None = None
    gain_power: int = 1
    target: Place | None = None
    offset: Place | None = None
    factor: Tensor | None = None
    rows: Tensor | None = None
    rows_at: tuple[int, int] | None = None
    out_axis: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        return (
            self.op,
            self.place.key,
            self.gain.key if self.gain else None,
            self.gain_power,
            self.target.key if self.target else None,
            self.offset.key if self.offset else None,
            self.rows_at,
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Parameters that move."""
        if self.op == "absorb":
            assert self.target is not None
            return (self.target.parameter,)
        return (self.place.parameter, self.target.parameter) if self.op == "normal" and self.target else (self.place.parameter,)


@dataclass(frozen=True)
class Copies:
    """How many independent copies of an algebra act, and which columns of a place belong to which copy.

    Attributes:
        local: names and sizes of the index spaces over which the element is free to vary.
    """

    local: tuple[tuple[str, int], ...] = ()

    @property
    def count(self) -> int:
        n = 1
        for _, s in self.local:
            n *= s
        return n

    def columns(self, place: Place) -> Tensor | None:
        """(rest or 1, m) copy of each entry, or None where the place does not tell the copies apart (all then act alike)."""
        at = torch.zeros(1, place.index.shape[1], dtype=torch.long)
        for name, size in self.local:
            if name in place.outer:
                at = at * size + place.outer[name]
            elif name in place.cross:
                at = at * size + place.cross[name][:, None]
            else:
                return None
        return at


def units(p: Tensor, place: Place) -> Tensor:
    """(rest, n, m) values of a parameter by unit and column; not to be written to: where the positions are evenly spaced it is a view."""
    moved = _last(p, place.axis)
    n, m = place.index.shape
    first, by_column = place.spacing
    if first is None:
        return moved[..., place.index.reshape(-1)].reshape(-1, n, m)
    part = moved.narrow(-1, first, n * m)
    return part.reshape(-1, m, n).transpose(1, 2) if by_column else part.reshape(-1, n, m)


def put(p: Tensor, place: Place, value: Tensor, add: bool) -> Tensor:
    """Write (rest, n, m) values back along the axis; a new tensor."""
    moved = _last(p, place.axis)
    out = moved.clone()
    value = value.reshape(*moved.shape[:-1], -1).to(p.dtype)
    index = place.index.reshape(-1)
    out[..., index] = out[..., index] + value if add else value
    return out.movedim(-1, place.axis).reshape(p.shape)


def _last(p: Tensor, axis: int) -> Tensor:
    """The parameter with an axis moved to the end; a single number has one axis of size one."""
    return p.movedim(axis, -1) if p.dim() else p[None]


def _vector(params: Params, place: Place) -> Tensor:
    """(n, m) values of a vector-like parameter on an index space."""
    return units(params[place.parameter].to(torch.float64), place)[0]


def embed_gain(X: Tensor, g: Tensor, power: int) -> Tensor:
    """g X g^-1 on (..., n, n), or its inverse conjugation."""
    g = g if power > 0 else 1 / g
    return g[..., :, None] * X / g[..., None, :]


def tangent(term: Term, params: Params, X: Tensor, copy: Tensor | None = None) -> dict[str, Tensor]:
    """Tangent of a term at the identity.

    Args:
        X: (c, n, n) algebra elements for mode and dual; (c, n) vectors for shift and absorb; for ones, normal and free a
            tensor of the shape of the parameter's other axes (see ``row_shape``).
        copy: (m,) which element acts on which column of the place; None: the first on all.
    """
    place = term.place
    p = params[place.parameter].to(torch.float64)
    m = place.index.shape[1]
    copy = torch.zeros(1, m, dtype=torch.long) if copy is None else copy
    if term.op in ("mode", "dual"):
        M = X[copy]  # (rest or 1, m, n, n)
        if term.gain is not None:
            M = embed_gain(M, _aligned(_vector(params, term.gain), place).T, term.gain_power)
        M = M if term.op == "mode" else -M.transpose(-1, -2)
        return {place.parameter: put(torch.zeros_like(p), place, _apply(M, units(p, place)), False)}
    if term.op in ("shift", "recentre"):
        c = _weighted(term, params, (X[..., 0] if X.dim() == 3 else X)[copy].transpose(-1, -2))
        if term.op == "recentre":
            c = -c
        c = c.expand(p.numel() // place.size, *c.shape[1:])
        c = c if term.rows is None else c * torch.zeros(c.shape[0], 1, 1, dtype=c.dtype).index_fill(0, term.rows, 1.0)
        return {place.parameter: put(torch.zeros_like(p), place, c, False)}
    if term.op == "absorb":
        assert term.target is not None
        c = _weighted(term, params, X[copy].transpose(-1, -2))
        total = -(units(p, place) * c).sum((1, 2)).reshape(p.movedim(place.axis, -1).shape[:-1])
        return {term.target.parameter: _to_bias(total, term, p.dim(), params[term.target.parameter])}
    if term.op == "fold":
        return {place.parameter: _fold(term, params, X[copy[0]].T, params)}
    if term.op == "ones":
        value = X.reshape(-1, 1, m).expand(-1, place.index.shape[0], m)
        return {place.parameter: put(torch.zeros_like(p), place, value, False)}
    if term.op == "free":
        return {place.parameter: put(torch.zeros_like(p), place, X.reshape(-1, *place.index.shape), False)}
    if term.op == "normal":
        n_hat = torch.ones(place.index.shape, dtype=p.dtype) if term.gain is None else _aligned(1 / _vector(params, term.gain), place)
        rows = X.reshape(-1, 1, 1)
        out = {place.parameter: put(torch.zeros_like(p), place, rows * n_hat, False)}
        if term.offset is not None and term.target is not None:
            c = (n_hat * _aligned(_vector(params, term.offset), place)).sum()
            total = -(X.reshape(p.movedim(place.axis, -1).shape[:-1]) * c)
            out[term.target.parameter] = _to_bias(total, term, p.dim(), params[term.target.parameter])
        return out
    raise ValueError(f"unknown term {term.op}")


def _apply(M: Tensor, units: Tensor) -> Tensor:
    """(rest or 1, m, n, n) matrices on (rest, n, m) units."""
    if M.shape[-1] == 1:
        return units * M[..., 0, 0][:, None, :]
    if M.shape[0] == 1:
        return torch.einsum("mij,rjm->rim", M[0], units)
    return torch.einsum("rmij,rjm->rim", M, units)


def _weighted(term: Term, params: Params, c: Tensor) -> Tensor:
    """Vectors (rest or 1, n, m), multiplied by the gain and the constant factor of a term."""
    if term.gain is not None:
        g = _aligned(_vector(params, term.gain), term.place)
        c = c * (g if term.gain_power > 0 else 1 / g)
    return c if term.factor is None else c * _aligned(term.factor.reshape(-1, 1), term.place)


def _aligned(v: Tensor, place: Place) -> Tensor:
    """Values by unit (units, 1 or m) in the layout (n, m) of a place, also where its units run as columns (n = 1)."""
    n, m = place.index.shape
    if n == 1 and v.shape[0] > 1:
        v = v.expand(v.shape[0], m // v.shape[0]) if v.shape[1] == 1 else v
        return v.reshape(1, m)
    return v if v.shape[1] == m else v[:, :1].expand(n, m)


def _fold(term: Term, params: Params, c: Tensor, at: Params) -> Tensor:
    """-(W c) n^T / kappa, n the normal (1/gain) of the activations read and kappa = n . offset where they stand."""
    assert term.offset is not None
    p, place = params[term.place.parameter].to(torch.float64), term.place
    n_hat = torch.ones(term.place.index.shape, dtype=p.dtype) if term.gain is None else _aligned(1 / _vector(params, term.gain), place)
    kappa = (n_hat * _aligned(_vector(at, term.offset), place)).sum()
    U = units(p, term.place)
    step = -torch.einsum("rnm,nm->r", U, c)[:, None, None] * n_hat / kappa
    return put(torch.zeros_like(p), term.place, step, False)


def _to_bias(total: Tensor, term: Term, rank: int, bias: Tensor) -> Tensor:
    """Sum what a reader's other axes give, onto the output axis that its bias shares, in the bias's shape."""
    axes = [a for a in range(rank) if a != term.place.axis]
    keep = axes.index(term.out_axis)
    rest = [i for i in range(total.dim()) if i != keep]
    return (total.sum(rest) if rest else total).reshape(bias.shape)


def row_shape(term: Term, params: Params) -> int:
    """Number of free coefficients of a ones, normal or free term."""
    p, place = params[term.place.parameter], term.place
    rest = p.numel() // place.size
    n, m = place.index.shape
    return {"ones": rest * m, "normal": rest, "free": rest * n * m}[term.op]


def finite(term: Term, weight: float, params: Params, moved: dict[str, Tensor], X: Tensor, copy: Tensor | None) -> None:
    """Apply exp(weight * X) of one term to the parameters collected in ``moved``."""
    place, m = term.place, term.place.index.shape[1]
    copy = torch.zeros(1, m, dtype=torch.long) if copy is None else copy
    if term.op in ("mode", "dual"):
        W = weight * X if term.op == "mode" else -weight * X.transpose(-1, -2)
        E = (W.exp() if X.shape[-1] == 1 else torch.linalg.matrix_exp(W))[copy]
        if term.gain is not None and X.shape[-1] > 1:  # exp(g X g^-1) = g exp(X) g^-1; a dual conjugates the other way
            power = term.gain_power if term.op == "mode" else -term.gain_power
            E = embed_gain(E, _aligned(_vector(params, term.gain), place).T, power)
        p = _current(moved, params, place.parameter)
        moved[place.parameter] = put(p, place, _apply(E, units(p, place)), False)
        return
    if term.op == "recentre":  # the frozen mean does not scale along: g s m (e^-t - 1) makes up for it
        c = _weighted(term, params, torch.expm1(-weight * X[..., 0])[copy].transpose(-1, -2))
        p = _current(moved, params, place.parameter)
        moved[place.parameter] = put(p, place, c.expand(p.numel() // place.size, *c.shape[1:]), True)
        return
    if term.op == "fold":  # exact at the shifted offset: W' x' = W x needs kappa after the move
        c = (weight * X)[copy[0]].T
        assert term.offset is not None
        after = {**params, term.offset.parameter: _current(moved, params, term.offset.parameter)}
        moved[place.parameter] = _current(moved, params, place.parameter) + _fold(term, params, c, after)
        return
    for name, step in tangent(term, params, weight * X, copy).items():
        moved[name] = _current(moved, params, name) + step


def _current(moved: Mapping[str, Tensor], params: Params, name: str) -> Tensor:
    return moved[name] if name in moved else params[name].to(torch.float64)


# -- algebras ------------------------------------------------------------------------------------------------------------------


def algebra_dim(algebra: Algebra, n: int) -> int:
    return {"scale": 1, "gl": n * n, "so": n * (n - 1) // 2, "so1": (n - 1) * (n - 2) // 2, "shift": n}.get(algebra, 0)


def algebra_element(algebra: Algebra, n: int, coordinates: Tensor) -> Tensor:
    """(c, dim) coordinates -> (c, n, n) matrices, or (c, n) vectors for shifts."""
    c = coordinates.shape[0]
    if algebra == "shift":
        return coordinates
    if algebra == "scale":
        return coordinates[:, :, None]
    if algebra == "gl":
        return coordinates.reshape(c, n, n)
    k = n if algebra == "so" else n - 1
    S = torch.zeros(c, k, k, dtype=coordinates.dtype)
    i, j = torch.triu_indices(k, k, 1)
    S[:, i, j], S[:, j, i] = coordinates, -coordinates
    if algebra == "so":
        return S
    Q = _complement(n)
    return Q @ S @ Q.T


def _complement(n: int) -> Tensor:
    """(n, n-1) orthonormal basis of the vectors that sum to zero."""
    Q = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), torch.eye(n, dtype=torch.float64)[:, : n - 1]], 1)).Q
    return Q[:, 1:]


# -- families ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A family of the dictionary: an algebra on an index space, and the weighted terms through which it acts.

    Attributes:
        algebra: which.
        space: name of the index space.
        size: its size n.
        copies: index spaces over which the element may vary (heads, units, members).
        terms: (weight, term).
    """

    algebra: Algebra
    space: str
    size: int
    copies: Copies
    terms: tuple[tuple[float, Term], ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p for _, t in self.terms for p in t.parameters))


@dataclass
class DictionaryAction:
    """The finite, closed-form action of a dictionary entry at any parameters of the right shapes."""

    entry: Entry
    rows: int = 0
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        e = self.entry
        self.dim = self.rows if e.algebra in ("row", "free") else e.copies.count * algebra_dim(e.algebra, self._n)

    @property
    def _n(self) -> int:
        return 1 if self.entry.algebra == "scale" else self.entry.size

    def _element(self, element: Tensor) -> Tensor:
        e = self.entry
        if e.algebra in ("row", "free"):
            return element
        return algebra_element(e.algebra, self._n, element.reshape(e.copies.count, -1).to(torch.float64))

    def _copy(self, term: Term) -> tuple[Place, Tensor | None]:
        return term.place, self.entry.copies.columns(term.place)

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        """Closed form; parameters keep their dtype."""
        X = self._element(element)
        moved: dict[str, Tensor] = {}
        for weight, term in sorted(self.entry.terms, key=lambda wt: wt[1].op == "fold"):  # a fold needs the moved offset
            t, copy = self._at(term)
            finite(t, weight, params, moved, X, copy)
        return {n: v.to(params[n].dtype) for n, v in moved.items()}

    def _at(self, term: Term) -> tuple[Term, Tensor | None]:
        """A scale acts unit by unit: its index space of size one runs over the units as columns."""
        if self.entry.algebra == "scale":
            term = replace(term, place=by_unit(term.place, self.entry.space))
        return term, self.entry.copies.columns(term.place)

    def tangents(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        X = self._element(element)
        out: dict[str, Tensor] = {}
        for weight, term in self.entry.terms:
            t, copy = self._at(term)
            for name, step in tangent(t, params, weight * X, copy).items():
                out[name] = out[name] + step if name in out else step
        return out

    def generators(self, params: Params) -> dict[str, Tensor]:
        """(dim, *shape) for each parameter that moves."""
        each = [self.tangents(params, e) for e in torch.eye(self.dim, dtype=torch.float64)]
        return {n: torch.stack([t[n] for t in each]) for n in each[0]} if each else {}

    def charge(self, params: Params) -> Tensor | None:
        """theta . xi / 2 for each symmetric generator of a linear family; c . theta for a constant translation."""
        e, n = self.entry, self.entry.size
        if e.algebra in ("so", "so1", "free", "row") or any(t.gain is not None or t.op in ("absorb", "normal", "fold") for _, t in e.terms):
            return None
        if e.algebra == "shift":
            g = self.generators(params)
            return sum(
                ((v * params[k].to(torch.float64)).flatten(1).sum(1) for k, v in g.items()), torch.zeros(self.dim, dtype=torch.float64)
            )
        if e.algebra == "gl":
            i, j = torch.triu_indices(n, n)
            basis = torch.zeros(len(i), n, n, dtype=torch.float64)
            basis[torch.arange(len(i)), i, j] = 1
            basis = (basis + basis.transpose(1, 2)) / 2
        else:
            basis = torch.ones(1, 1, 1, dtype=torch.float64)
        total = torch.zeros(e.copies.count, len(basis), dtype=torch.float64)
        for weight, term in e.terms:
            t, copy = self._at(term)
            U = units(params[t.place.parameter].to(torch.float64), t.place)
            sign = weight if t.op == "mode" else -weight
            per = torch.einsum("rim,kij,rjm->rmk", U, basis, U) * sign / 2
            at = torch.zeros(1, per.shape[1], dtype=torch.long) if copy is None else copy
            total.index_add_(0, at.expand(per.shape[:2]).reshape(-1), per.reshape(-1, per.shape[2]))
        return total.reshape(-1)


@dataclass
class EntriesAction:
    """Single numbers that nothing depends on, free to take any value.

    Attributes:
        entries: parameter -> flat indices.
    """

    entries: dict[str, Tensor]
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        self.dim = sum(len(i) for i in self.entries.values())

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        """Add ``element`` to the entries."""
        out, at = {}, 0
        for name, index in self.entries.items():
            p = params[name].clone().reshape(-1)
            p[index] += element[at : at + len(index)].to(p.dtype)
            out[name], at = p.reshape(params[name].shape), at + len(index)
        return out

    def generators(self, params: Params) -> dict[str, Tensor]:
        """Unit vectors, (dim, *shape)."""
        out, at = {}, 0
        for name, index in self.entries.items():
            g = torch.zeros(self.dim, params[name].numel(), dtype=torch.float64)
            g[torch.arange(at, at + len(index)), index] = 1
            out[name], at = g.reshape(self.dim, *params[name].shape), at + len(index)
        return out

    def charge(self, params: Params) -> Tensor:
        """The entries themselves: their gradient is zero."""
        return torch.cat([params[n].reshape(-1)[i].to(torch.float64) for n, i in self.entries.items()])


def by_unit(place: Place, space: str) -> Place:
    """The same place with its units as columns: n = 1, and the unit's own index among the outer ones."""
    n, m = place.index.shape
    outer = {k: v.repeat(n) for k, v in place.outer.items()}
    outer[space] = torch.arange(n).repeat_interleave(m)
    return replace(place, index=place.index.reshape(1, -1), outer=outer)


def local_of(places: Sequence[Place]) -> list[str]:
    """Index spaces that some place runs over beside its own."""
    return list(dict.fromkeys(k for p in places for k in p.outer))
