"""Index expressions: every axis of a tensor is an atom, a product of expressions, or a concatenation of expressions.

Two axes that must be permuted together are unified. Unifying refines both to a common structure: a feature axis that one
operator reads as ``heads x width`` and another cuts into ``q, k, v`` becomes a concatenation of products. Where no common
refinement exists the axes are frozen: their indices can then not be exchanged at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["atom", "prod", "sum"]
_MAX_MONOMIALS = 4096


class Axis:
    """A union-find variable: an atom until something refines it to a product (row-major) or a concatenation.

    Where the entries were picked from another axis by a tensor of indices, ``picks`` has that tensor's name ("" for several) and
    the axis: each entry then belongs to one index of it.
    """

    __slots__ = ("frozen", "kind", "number", "parts", "picks", "size", "up")

    def __init__(self, size: int, frozen: str | None = None, kind: Kind = "atom", parts: Sequence[Axis] = ()) -> None:
        self.size, self.frozen, self.kind, self.parts = size, frozen, kind, tuple(parts)
        self.up: Axis | None = None
        self.picks: tuple[str, Axis] | None = None
        self.number = -1

    def __repr__(self) -> str:
        a = find(self)
        if a.kind == "atom":
            return f"{'#' if a.frozen else ''}{a.size}"
        return "(" + ("*".join(map(repr, factors(a))) if a.kind == "prod" else "+".join(map(repr, segments(a)))) + ")"


def find(a: Axis) -> Axis:
    """The representative of an axis."""
    root = a
    while root.up is not None:
        root = root.up
    while a is not root:
        following = a.up
        a.up = root
        assert following is not None
        a = following
    return root


def freeze(a: Axis, why: str) -> None:
    """Forbid every exchange of indices of an axis; the first reason given is kept."""
    stack = [a]
    while stack:
        r = find(stack.pop())
        if r.frozen is not None and r.kind == "atom":
            continue
        if r.frozen is None:
            r.frozen = why
            stack.extend(r.parts)


def product(parts: Iterable[Axis]) -> Axis:
    """The row-major product of axes; sizes of one drop out."""
    flat = [p for a in parts for p in factors(a) if p.size != 1]
    if not flat:
        return Axis(1)
    return flat[0] if len(flat) == 1 else Axis(math.prod(p.size for p in flat), kind="prod", parts=flat)


def concatenation(parts: Iterable[Axis]) -> Axis:
    """Axes laid end to end; empty ones drop out."""
    flat = [p for p in parts if p.size != 0]
    return flat[0] if len(flat) == 1 else Axis(sum(p.size for p in flat), kind="sum", parts=flat)


def factors(a: Axis) -> list[Axis]:
    """Row-major factors, none of them a product."""
    return _parts(a, "prod")


def segments(a: Axis) -> list[Axis]:
    """Segments end to end, none of them a concatenation."""
    return _parts(a, "sum")


def _parts(a: Axis, kind: Kind) -> list[Axis]:
    stack, out = [a], []
    while stack:
        r = find(stack.pop())
        if r.kind == kind:
            stack.extend(reversed(r.parts))
        else:
            out.append(r)
    return out


def unify(a: Axis, b: Axis) -> None:
    """Demand that two axes carry the same index; both are refined to a common structure, or frozen."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        _conflict(a, b)
    elif a.kind == "atom" or b.kind == "atom":
        atom, other = (a, b) if a.kind == "atom" else (b, a)
        _link(atom, other)
        if atom.frozen is not None:
            freeze(other, atom.frozen)
    else:
        if a.kind == b.kind:
            good = _unify_products(a, b) if a.kind == "prod" else _unify_sums(a, b)
        else:
            good = _unify_mixed(a, b) if a.kind == "sum" else _unify_mixed(b, a)
        a, b = find(a), find(b)
        if not good:
            _conflict(a, b)
        elif a is not b:
            if a.frozen is not None:
                freeze(b, a.frozen)
            if b.frozen is not None:
                freeze(a, b.frozen)
            _link(a, b)


def _link(a: Axis, b: Axis) -> None:
    """Let one axis stand for another."""
    a.up = b
    if a.picks is not None:
        b.picks = a.picks if b.picks is None or b.picks[0] == a.picks[0] else ("", b)


def _conflict(a: Axis, b: Axis) -> None:
    for x in (a, b):
        freeze(x, "two operators cut this axis in ways that do not fit each other")
        x = find(x)
        x.kind, x.parts = "atom", ()
    if a.size == b.size and find(a) is not find(b):
        _link(find(a), find(b))


def _unify_products(a: Axis, b: Axis) -> bool:
    left, right = factors(a), factors(b)
    while left and right:
        x, y = left[0], right[0]
        if x.size == y.size:
            unify(x, y)
            left, right = left[1:], right[1:]
            continue
        big, small = (x, y) if x.size > y.size else (y, x)
        if big.size % small.size:
            return False
        pieces = _split_product(big, small.size)
        if pieces is None:
            return False
        left = pieces + left[1:] if big is x else left
        right = pieces + right[1:] if big is y else right
    return True


def _split_product(x: Axis, lead: int) -> list[Axis] | None:
    x = find(x)
    pair = [Axis(lead, x.frozen), Axis(x.size // lead, x.frozen)]
    if x.kind == "atom":
        x.kind, x.parts = "prod", tuple(pair)
        return pair
    unify(x, product(pair))
    return factors(x) if find(x).kind == "prod" else [find(p) for p in pair]


def _unify_sums(a: Axis, b: Axis) -> bool:
    left, right = segments(a), segments(b)
    while left and right:
        x, y = left[0], right[0]
        if x.size == y.size:
            unify(x, y)
            left, right = left[1:], right[1:]
        elif x.size > y.size:
            left = list(cut(x, y.size)) + left[1:]
        else:
            right = list(cut(y, x.size)) + right[1:]
    return True


def _unify_mixed(total: Axis, prod: Axis) -> bool:
    rest = prod
    pieces = segments(total)
    for s in pieces[:-1]:
        head, rest = cut(rest, s.size)
        unify(s, head)
    unify(pieces[-1], rest)
    return True


def cut(a: Axis, at: int) -> tuple[Axis, Axis]:
    """Refine an axis to a concatenation with a boundary at an index; returns what lies before and after it."""
    r = find(a)
    if at <= 0 or at >= r.size:
        return (Axis(0), r) if at <= 0 else (r, Axis(0))
    if r.kind == "atom":
        r.kind, r.parts = "sum", (Axis(at, r.frozen), Axis(r.size - at, r.frozen))
    elif r.kind == "prod":
        r.kind, r.parts = "sum", tuple(_cut_product(r, at))
    return _boundary(segments(r), at)


def _boundary(parts: list[Axis], at: int) -> tuple[Axis, Axis]:
    offset = 0
    for i, p in enumerate(parts):
        if offset == at:
            return concatenation(parts[:i]), concatenation(parts[i:])
        if offset + p.size > at:
            head, tail = cut(p, at - offset)
            return concatenation([*parts[:i], head]), concatenation([tail, *parts[i + 1 :]])
        offset += p.size
    raise AssertionError("boundary outside the axis")


def _cut_product(r: Axis, at: int) -> list[Axis]:
    """Segments of lead x inner with a boundary: whole leading indices, and inside one of them where it must be."""
    lead, inner = factors(r)[0], product(factors(r)[1:])
    whole, rest = divmod(at, inner.size)
    before, after = cut(lead, whole)
    if not rest:
        return [product([before, inner]), product([after, inner])]
    _, after = cut(after, 1)
    head, tail = cut(inner, rest)
    parts = [product([before, inner]) if before.size else before, head, tail, product([after, inner]) if after.size else after]
    return [p for p in parts if p.size]


# -- flattened form ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Monomial:
    """Part of an axis indexed by a tuple of atoms: index = offset + sum of stride times atom index."""

    offset: int
    atoms: tuple[int, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]


def monomials(a: Axis) -> tuple[Monomial, ...]:
    """An axis as a disjoint union of strided blocks of atoms (numbered beforehand); () when there are too many."""
    terms = _terms(find(a))
    if terms is None:
        return ()
    return tuple(Monomial(o, tuple(x.number for x, _ in f), tuple(s for _, s in f), tuple(x.size for x, _ in f)) for o, f in terms)


_Term = tuple[int, tuple[tuple[Axis, int], ...]]


def _terms(r: Axis) -> list[_Term] | None:
    if r.kind == "atom":
        return [(0, ((r, 1),))]
    if r.kind == "sum":
        out: list[_Term] = []
        offset = 0
        for p in segments(r):
            inner = _terms(p)
            if inner is None or len(out) + len(inner) > _MAX_MONOMIALS:
                return None
            out += [(offset + o, f) for o, f in inner]
            offset += p.size
        return out
    out, stride = [(0, ())], r.size
    for p in factors(r):
        stride //= p.size
        inner = _terms(p)
        if inner is None or len(out) * len(inner) > _MAX_MONOMIALS:
            return None
        out = [(o + stride * q, f + tuple((x, stride * s) for x, s in g)) for o, f in out for q, g in inner]
    return out


def leaves(a: Axis) -> list[Axis]:
    """Atoms of an axis, in order."""
    stack, out = [a], []
    while stack:
        r = find(stack.pop())
        if r.kind == "atom":
            out.append(r)
        else:
            stack.extend(reversed(r.parts))
    return out
