"""The collapsed states of continuous families: zero units of a scale, rank drops of a general linear group."""

from __future__ import annotations

import torch
from torch import Tensor

from parasym.symmetry.dictionary import Entry, Place, by_unit, put, units
from parasym.symmetry.symmetry import FixedSet, Params


def fixed_set_of(entry: Entry) -> FixedSet | None:
    """Where a family's orbit degenerates, or None where nothing collapses (shifts, rotations, invisible directions).

    A scale acting unit by unit fixes the states in which all that it moves of a unit is zero. GL(n) between matrices
    degenerates where one direction is absent from all of them at once: a rank drop (dcs-mirror-symmetry R4).
    """
    labels = tuple(f"copy {i}" for i in range(entry.copies.count))
    if entry.algebra == "scale" and entry.copies.local:
        return FixedSet("all that the scale moves of a unit is zero", lambda p: _sizes(entry, p), lambda p, i: _zeroed(entry, p, i), labels)
    if entry.algebra == "gl":
        return FixedSet(
            "a direction is absent from every matrix: a rank drop", lambda p: _ranks(entry, p), lambda p, i: _dropped(entry, p, i), labels
        )
    return None


def _places(entry: Entry) -> list[tuple[Place, Tensor]]:
    """Places of the family's linear terms with the copy that each of their entries belongs to."""
    out = []
    for _, term in entry.terms:
        if term.op not in ("mode", "dual"):
            continue
        place = by_unit(term.place, entry.space) if entry.algebra == "scale" else term.place
        copy = entry.copies.columns(place)
        if copy is not None:
            out.append((place, copy))
    return out


def _sizes(entry: Entry, params: Params) -> Tensor:
    """(copies,) norms of what belongs to each unit, relative to the largest."""
    total = torch.zeros(entry.copies.count, dtype=torch.float64)
    for place, copy in _places(entry):
        squares = units(params[place.parameter].detach().to(torch.float64), place)[:, 0, :].square()
        total.index_add_(0, copy.expand(squares.shape).reshape(-1), squares.reshape(-1))
    size = total.sqrt()
    return size / size.max().clamp(min=1e-300)


def _zeroed(entry: Entry, params: Params, index: int) -> dict[str, Tensor]:
    moved: dict[str, Tensor] = {}
    for place, copy in _places(entry):
        p = moved.get(place.parameter, params[place.parameter])
        value = units(p, place)
        moved[place.parameter] = put(p, place, value * (copy != index)[:, None, :], False)
    return moved


def _grams(entry: Entry, params: Params) -> tuple[Tensor, Tensor]:
    """(copies, n, n) each: squared presence of every direction in the matrices that g multiplies, and in those that g^-T does."""
    n = entry.size
    total = torch.zeros(2, entry.copies.count, n, n, dtype=torch.float64)
    for place, copy, op in _linear_places(entry):
        u = units(params[place.parameter].detach().to(torch.float64), place)
        total[int(op == "dual")].index_add_(0, copy[0], torch.einsum("rim,rjm->mij", u, u))
    return total[0], total[1]


def _linear_places(entry: Entry) -> list[tuple[Place, Tensor, str]]:
    found = ((t.place, entry.copies.columns(t.place), t.op) for _, t in entry.terms if t.op in ("mode", "dual"))
    return [(place, copy, op) for place, copy, op in found if copy is not None]


def _modes(entry: Entry, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Squared singular values of the product of both sides (copies, n), ascending, with the directions a and b, b^T a = 1."""
    left, right = _grams(entry, params)
    w, Q = torch.linalg.eigh(left)
    w = w.clamp(min=1e-30 * float(w.max().clamp(min=1e-300)))
    root, inverse = Q * w.sqrt()[:, None, :], Q / w.sqrt()[:, None, :]
    values, y = torch.linalg.eigh(root.transpose(1, 2) @ right @ root)
    return values.clamp(min=0), root @ y, inverse @ y


def _ranks(entry: Entry, params: Params) -> Tensor:
    """(copies,) smallest singular value of the product relative to the largest: the same all along an orbit."""
    values = _modes(entry, params)[0].sqrt()
    return values[:, 0] / values[:, -1].clamp(min=1e-300)


def _dropped(entry: Entry, params: Params, index: int) -> dict[str, Tensor]:
    """The weakest direction of the product of one copy, removed from the matrices on both sides."""
    _, a, b = _modes(entry, params)
    P = torch.eye(entry.size, dtype=torch.float64) - a[index][:, :1] @ b[index][:, :1].T
    moved: dict[str, Tensor] = {}
    for place, copy, op in _linear_places(entry):
        p = moved.get(place.parameter, params[place.parameter])
        value = units(p.to(torch.float64), place)
        projected = torch.einsum("ij,rjm->rim", P if op == "mode" else P.T, value)
        moved[place.parameter] = put(p, place, torch.where((copy == index)[:, None, :], projected, value).to(p.dtype), False)
    return moved
