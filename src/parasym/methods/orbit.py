"""The orbit of a network's parameters: the points its symmetries lead to, coordinates on it, and what moves along.

A point is reached by a list of moves, each a symmetry and one of its elements; coordinates are those of the Lie algebras of the
continuous families, zero the identity. Everything here works on float64 copies and is differentiable in the coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.func import vjp

from parasym.core.errors import InputError
from parasym.core.results import Status
from parasym.methods.state import Transport, linear_transport
from parasym.symmetry.dictionary import DictionaryAction, EntriesAction, Entry, Term
from parasym.symmetry.discrete_actions import Exchange, GlobalSign, Joint, Pairs, Permutations, Signs
from parasym.symmetry.symmetry import Level, Params, Symmetry

Point = dict[str, Tensor]
Tell = Callable[[str, float], None]
LINEAR = ("scale", "gl", "so", "so1")
_LIMIT = 7.0  # largest coordinate of a scale or linear family in one descent: a factor of a thousand
_INVERTED = 1e-9  # how well a move back must undo a move for momentum to go along


class Acts(Protocol):
    """What a move needs of a group: its finite action."""

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Move:
    """One group element.

    Attributes:
        name: of the symmetry. action: of its group, or of a part of it.
        element: coordinates, a table of a permutation, bits of signs; see the action.
    """

    name: str
    action: Any
    element: Tensor

    def act(self, params: Params) -> Point:
        """All of ``params`` with the element applied."""
        return {**params, **self.action.act(params, self.element)}

    def inverse(self) -> Move:
        """The move back."""
        if hasattr(self.action, "inverse"):
            return replace(self, element=self.action.inverse(self.element))
        if isinstance(self.action, DictionaryAction | EntriesAction):
            return replace(self, element=-self.element)
        if isinstance(self.action, Permutations | Pairs) and self.element.dim() > 0:
            return replace(self, element=torch.argsort(self.element.reshape(-1, self.element.shape[-1]), 1).reshape(self.element.shape))
        return self  # signs and exchanges undo themselves; so does an adjacent transposition

    @property
    def monomial(self) -> bool:
        """Whether each number goes to one number (times a constant, plus a constant)."""
        if isinstance(self.action, DictionaryAction):
            return all(_monomial(self.action.entry, t) for _, t in self.action.entry.terms)
        return isinstance(self.action, EntriesAction | Permutations | Pairs | Joint | Signs | GlobalSign | Exchange)


def _monomial(entry: Entry, term: Term) -> bool:
    if entry.algebra == "scale":
        return term.op in ("mode", "dual")
    if term.op == "normal":
        return term.gain is None and term.offset is None
    return term.op in ("ones", "free") or (term.op == "shift" and term.gain is None)


def apply(moves: Iterable[Move], params: Params) -> Point:
    """All of ``params`` after the moves, one after the other."""
    now = dict(params)
    for move in moves:
        now = move.act(now)
    return now


def back(moves: Sequence[Move], params: Params) -> Point:
    """The way back."""
    return apply([m.inverse() for m in reversed(moves)], params)


# ------------------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Orbit:
    """The exact symmetries that hold at every point, fit for moving along.

    Attributes:
        families: continuous ones, in closed form.
        discrete: permutations, signs, exchanges.
        left_out: (name, reason) of symmetries that are not used.
    """

    families: tuple[Symmetry, ...]
    discrete: tuple[Symmetry, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    _slices: tuple[slice, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ends = np.cumsum([0, *(s.action.dim for s in self.families)])
        object.__setattr__(self, "_slices", tuple(slice(int(a), int(b)) for a, b in pairwise(ends)))

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return self._slices[-1].stop if self._slices else 0

    def only(self, wanted: Callable[[Symmetry], bool]) -> Orbit:
        """The same without some families."""
        return Orbit(tuple(s for s in self.families if wanted(s)), self.discrete, self.left_out)

    def moves(self, c: Tensor) -> list[Move]:
        """The moves with coordinates ``c``; families whose coordinates are all zero are left out."""
        return [Move(s.name, s.action, c[at]) for s, at in zip(self.families, self._slices, strict=True) if bool((c[at] != 0).any())]

    def act(self, params: Params, c: Tensor) -> Point:
        """All of ``params`` at coordinates ``c``. Differentiable in both."""
        now = dict(params)
        for s, at in zip(self.families, self._slices, strict=True):
            now.update(s.action.act(now, c[at]))
        return now

    def act_both(self, params: Params, covectors: Sequence[Params], c: Tensor) -> tuple[Point, list[Point]]:
        """The point at ``c`` and gradients of any function of the outputs there, from those here (matrices only, by g' = M^-T g).

        For families of matrices (scale, gl, so, so1); others leave the gradients of matrices as they are or are not linear.
        """
        now, along = dict(params), [dict(g) for g in covectors]
        for s, at in zip(self.families, self._slices, strict=True):
            other = contragredient(s.action, set(along[0])) if along else None
            if other is not None:
                for g in along:
                    g.update({n: v for n, v in other.act({**now, **g}, c[at]).items() if n in g})
            now.update(s.action.act(now, c[at]))
        return now, along

    def bounds(self, limit: float = _LIMIT) -> list[tuple[float | None, float | None]]:
        """Bounds on the coordinates: non-compact groups of matrices are kept from running away."""
        out: list[tuple[float | None, float | None]] = []
        for s in self.families:
            wide = isinstance(s.action, DictionaryAction) and s.action.entry.algebra in ("scale", "gl")
            out += [(-limit, limit) if wide else (None, None)] * s.action.dim
        return out


def contragredient(action: Any, names: set[str]) -> DictionaryAction | None:
    """The action on gradients of the given matrices: each factor's inverse transpose; None where it leaves them alone."""
    if not isinstance(action, DictionaryAction) or action.entry.algebra not in LINEAR:
        return None
    turned = {"mode": "dual", "dual": "mode"}
    terms = tuple((w, replace(t, op=turned[t.op])) for w, t in action.entry.terms if t.op in turned and t.place.parameter in names)
    return DictionaryAction(replace(action.entry, terms=terms), action.rows) if terms else None


def orbit_of(symmetries: Iterable[Symmetry], params: Params, buffers: Params, level: Level = "function") -> Orbit:
    """Sort symmetries into those that can be moved along and those that cannot, with the reason.

    Args:
        symmetries: from `parasym.audit` or `parasym.symmetries`.
        params, buffers: of the model, by name.
        level: "train" admits symmetries of the train-mode function.

    Raises:
        InputError: something else than symmetries; a symmetry of parameters that the model does not have, or of other shapes.
    """
    families, discrete, left = list[Symmetry](), list[Symmetry](), list[tuple[str, str]]()
    for s in symmetries:
        if not isinstance(s, Symmetry):
            raise InputError(f"Expected symmetries of parasym.audit(model, ...).symmetries, got {type(s).__name__}.")
        missing = [n for n in s.parameters if n not in params]
        if missing:
            raise InputError(f"The symmetry {s.name!r} moves {missing[0]!r}, which this model does not have: audit this model.")
        reason = _unfit(s, level)
        if reason:
            left.append((s.name, reason))
            continue
        _check_shapes(s, params, buffers)
        (discrete if s.kind == "discrete" else families).append(s)
    return Orbit(tuple(families), tuple(discrete), tuple(left))


def _unfit(s: Symmetry, level: Level) -> str:
    if not s.certified:
        return "not certified"
    if s.level != "function" and s.level != level:
        return f"holds for the {'loss' if s.level == 'loss' else 'train-mode function'} only"
    if s.kind == "point" or s.radius != float("inf"):
        return "holds near these weights only"
    if s.kind != "discrete" and not isinstance(s.action, DictionaryAction | EntriesAction):
        return "found numerically, without a closed form"
    return ""


def _check_shapes(s: Symmetry, params: Params, buffers: Params) -> None:
    have = {n: torch.zeros((), dtype=p.dtype).expand(p.shape) for n, p in {**buffers, **params}.items()}
    element = torch.tensor(0) if s.kind == "discrete" else torch.zeros(s.action.dim, dtype=torch.float64)
    try:
        moved = s.action.act(have, element)
    except (IndexError, RuntimeError, KeyError) as error:
        raise InputError(
            f"The symmetry {s.name!r} does not fit the shapes of this model's parameters ({error}): audit this model."
        ) from error
    for n, v in moved.items():
        if v.shape != have[n].shape:
            raise InputError(f"The symmetry {s.name!r} does not fit {n!r} of shape {tuple(have[n].shape)}: audit this model.")


# -------------------------------------------------------------------------------------------------------------------- descent


@dataclass(frozen=True)
class Descent:
    """Where a descent on an orbit ended: moves, coordinates, point, objective, iterations; at the bounds or unsettled where that is so."""

    moves: list[Move]
    coordinates: Tensor
    point: Point
    start: float
    value: float
    iterations: int
    status: Status = "ok"
    note: str = ""


def descend(
    orbit: Orbit,
    params: Params,
    loss: Callable[[Any], Tensor],
    *,
    coordinates: bool = False,
    start: Tensor | None = None,
    iterations: int = 60,
    limit: float = _LIMIT,
    tell: Callable[[float], None] = lambda fraction: None,
) -> Descent:
    """Minimise a differentiable function over group coordinates by L-BFGS, from the identity or from ``start``.

    Args:
        orbit: its families are moved along.
        params: float64.
        loss: of the moved parameters; with ``coordinates``, of the coordinates.
        limit: largest coordinate of scales and linear maps; ending there is reported.
    """
    if orbit.dim == 0:
        return Descent([], torch.zeros(0), dict(params), 0.0, 0.0, 0, "not_applicable", "there is no continuous symmetry to move along")
    seen: list[float] = []

    def f(x: np.ndarray) -> tuple[float, np.ndarray]:
        c = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            value = loss(c) if coordinates else loss(orbit.act(params, c))
        (g,) = torch.autograd.grad(value, c, allow_unused=True)
        seen.append(float(value.detach()))
        tell(min(1.0, len(seen) / (1.3 * iterations)))
        if g is None or not np.isfinite(seen[-1]):
            return (seen[-1] if np.isfinite(seen[-1]) else 1e300), np.zeros_like(x)
        return seen[-1], g.numpy()

    c0 = torch.zeros(orbit.dim, dtype=torch.float64) if start is None else start
    found = minimize(
        f,
        c0.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=orbit.bounds(limit),
        options={"maxiter": iterations, "ftol": 1e-13, "gtol": 1e-10, "maxcor": 20},
    )
    c = torch.tensor(found.x, dtype=torch.float64)
    moves = orbit.moves(c)
    bounded = torch.tensor([b[1] is not None for b in orbit.bounds(limit)])
    at_limit = bool((c.abs()[bounded] >= limit * (1 - 1e-9)).any())
    settled = found.nit < iterations
    note = "some coordinates ended at their bound: the objective has no minimum there" if at_limit else ""
    note = note or ("" if settled else f"stopped after {iterations} iterations")
    status: Status = "ok" if settled and not at_limit else "not_converged"
    return Descent(moves, c, apply(moves, params), seen[0], float(found.fun), int(found.nit), status, note)


def least_squares(symmetry: Symmetry, params: Params, target: Params | None = None, steps: int = 100) -> Tensor | None:
    """The element of a family of translations that brings the moved parameters closest to a target (or zero): conjugate gradients.

    For actions that are affine in the element at fixed parameters (shift, row, free); ``None`` where this one is not.
    """
    action = symmetry.action
    if isinstance(action, EntriesAction):
        gap = params if target is None else {n: params[n] - target[n] for n in action.entries}
        return -torch.cat([gap[n].reshape(-1)[i] for n, i in action.entries.items()])
    if not isinstance(action, DictionaryAction) or action.entry.algebra in LINEAR or any(t.op == "fold" for _, t in action.entry.terms):
        return None
    names = symmetry.parameters
    zero = torch.zeros(action.dim, dtype=torch.float64)

    def field(c: Tensor) -> tuple[Tensor, ...]:
        t = action.tangents(params, c)
        return tuple(t[n] for n in names if n in t)

    moving = [n for n in names if n in action.tangents(params, zero)]
    pull = vjp(field, zero)[1]
    x, r = zero.clone(), -pull(tuple(params[n] - (0.0 if target is None else target[n]) for n in moving))[0]
    p, rho = r.clone(), float(r @ r)
    first = rho
    for _ in range(min(steps, action.dim + 5)):
        if rho <= 1e-18 * first or rho == 0:
            break
        q = pull(field(p))[0]
        alpha = rho / max(float(p @ q), 1e-300)
        x, r = x + alpha * p, r - alpha * q
        rho, old = float(r @ r), rho
        p = r + (rho / old) * p
    return x


# ------------------------------------------------------------------------------------------------------------- what moves along


def transport_of(moves: Sequence[Move], before: Params, after: Params, names: Sequence[str]) -> tuple[Transport | None, str]:
    """How gradients and optimiser buffers go along, and why they do not where that is so.

    Args:
        moves: the way from ``before`` to ``after``, both float64 with every parameter.
        names: the parameters that move.
    """
    rest = {n: p for n, p in after.items() if n not in names}

    def inverse(given: Point) -> Point:
        dtype = next(iter(given.values())).dtype
        found = back(moves, {**{n: p.to(dtype) for n, p in rest.items()}, **given})
        return {n: found[n] for n in given}

    try:
        there = inverse({n: after[n] for n in names})
    except (RuntimeError, IndexError, KeyError) as error:
        return None, f"a move has no way back in closed form ({error}), so optimiser state starts afresh"
    gap = max((float((there[n] - before[n]).norm() / before[n].norm().clamp_min(1e-300)) for n in names), default=0.0)
    if not gap <= _INVERTED:
        return None, f"the way back misses by {gap:.1e}, so optimiser state starts afresh"
    monomial = all(m.monomial for m in moves)
    note = "" if monomial else "second moments start afresh: the move mixes weights"
    return linear_transport(inverse, {n: after[n] for n in names}, monomial=monomial), note
