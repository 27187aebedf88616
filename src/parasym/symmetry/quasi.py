"""Quasi-homogeneity: the exponents lambda of a network whose output scales as f(e^{alpha lambda} theta) = e^alpha f(theta).

Euler's identity sum_k lambda_k <theta_k, d f / d theta_k> = f is linear in the exponents, so they are solved for: one derivative
of the traced graph along each group's own weights, and least squares (quasi-homogeneous-margin R1, R2). The null space of the same
matrix holds the exact rescaling symmetries; of all exponents >= 0 the member whose largest, then next largest, ... is least is
reported, because it is the one the growth along a flow obeys (R3). Nothing is reported that a finite rescaling does not confirm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linprog  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.graph import Graph, trace
from parasym.core.guards import math_attention, rng_state
from parasym.core.results import Status, plain
from parasym.core.samples import draw, flatten, generic_parameters
from parasym.symmetry.certify import relative_change

Exponents = dict[str, Tensor]
Groups = Literal["tensor", "unit"]
REF = "quasi-homogeneous-margin"
_HOLDS = 1e-8  # relative residual of Euler's identity below which it holds
_NULL = 1e-8  # relative singular values below this are null
_CERTIFIED = 1e-8  # largest relative error of a finite rescaling
_ROWS, _MOST = 4000, 1500  # outputs per draw, groups
_ALPHAS = (-0.7, 0.4, 1.0)


@dataclass(frozen=True, eq=False)
class QuasiHomogeneity:
    """How a network's output scales with its parameters.

    Attributes:
        exponents: parameter -> lambda >= 0, of its shape divided into groups: a number for each tensor, or a tensor of its shape.
            Empty when the network is not quasi-homogeneous.
        residual: of Euler's identity, relative, over the draws it was solved on.
        certificate: largest relative error of f(e^{alpha lambda} theta) = e^alpha f(theta) over finite alpha, fresh parameters and
            inputs, and the weights at hand; None when there was nothing to certify.
        null: exact rescaling symmetries, as exponents that leave f unchanged; their charges sum N theta^2 are conserved.
        status: ``ok``; ``not_applicable`` (no exponents exist, or none >= 0); ``violated`` (Euler's identity holds, the finite
            rescaling does not).
        note: why, when the status is not ``ok``.
    """

    exponents: Exponents
    residual: float
    certificate: float | None
    null: tuple[Exponents, ...] = field(repr=False)
    status: Status
    note: str = ""
    refs: tuple[str, ...] = (f"{REF} R2", f"{REF} R3")

    @property
    def ok(self) -> bool:
        """Whether the exponents may be used."""
        return self.status == "ok"

    @property
    def nullity(self) -> int:
        """Number of independent rescaling symmetries of the groups."""
        return len(self.null)

    @property
    def largest(self) -> float:
        """lambda_max."""
        self._need()
        return max(float(v.max()) for v in self.exponents.values() if v.numel())

    @property
    def minimised(self) -> tuple[str, ...]:
        """Parameters with entries of the largest exponent: the only ones whose norm the margin minimises (R4)."""
        top = self.largest
        return tuple(n for n, v in self.exponents.items() if v.numel() and float(v.max()) > top - 1e-7)

    def scale(self, params: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """psi_alpha(theta) = e^{alpha lambda} theta, a new dict; parameters without exponent as they are."""
        self._need()
        return _scaled(params, self.exponents, alpha)

    def norm2(self, params: Mapping[str, Tensor]) -> float:
        """|theta|_lambda^2 = sum lambda theta^2; under gradient flow half its rate is E e^{-q} q (R5)."""
        self._need()
        return sum(float((v * params[n].detach().double().square()).sum()) for n, v in self.exponents.items())

    def charges(self, params: Mapping[str, Tensor]) -> Tensor:
        """sum N theta^2 for each null vector N, (nullity,): conserved under gradient flow (R5)."""
        rows = [sum(float((v * params[n].detach().double().square()).sum()) for n, v in null.items()) for null in self.null]
        return torch.tensor(rows, dtype=torch.float64)

    def normaliser(self, params: Mapping[str, Tensor]) -> float:
        """alpha with |psi_{-alpha}(theta)|_lambda = 1, so that e^{-alpha} q is the normalised margin (R5).

        Raises:
            InputError: every weight with a positive exponent is zero.
        """
        self._need()
        squares = torch.cat([(v * params[n].detach().double().square()).reshape(-1) for n, v in self.exponents.items()])
        lam = torch.cat([v.expand(params[n].shape).reshape(-1) for n, v in self.exponents.items()]).double()
        squares, lam = squares[squares > 0], lam[squares > 0]
        if not len(squares):
            raise InputError("Every weight with a positive exponent is zero: there is no margin to normalise.")

        def norm(alpha: float) -> float:
            return float((squares * (-2 * alpha * lam).exp()).sum())

        low, high = -1.0, 1.0
        while norm(low) < 1:
            low *= 2
        while norm(high) > 1:
            high *= 2
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if norm(middle) > 1 else (low, middle)
        return 0.5 * (low + high)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("exponents", "residual", "certificate", "nullity", "null", "status", "note", "refs")
        out: dict[str, Any] = {name: plain(getattr(self, name)) for name in names}
        return out

    def _need(self) -> None:
        if self.status != "ok":
            raise InputError(f"The network has no exponents to use ({self.status}): {self.note}")


def exponents(
    model: nn.Module,
    args: Sequence[Any] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    groups: Groups = "tensor",
    pin: Mapping[str, float] | None = None,
    draws: int = 4,
    seed: int = 0,
) -> QuasiHomogeneity:
    """The exponents of a torch model, from its traced graph.

    Args:
        model: any module, in the mode it is trained in (batch norm in train mode has other exponents than in eval mode).
        args, kwargs: example arguments; a single tensor stands for one argument. The answer is about these outputs.
        groups: "tensor", one exponent for each parameter tensor (tied ones once); "unit", one for each row and column of each, so
            that rescalings of single units show in ``null``.
        pin: parameter -> exponent it must have.
        draws: random parameters and inputs Euler's identity is solved on.
        seed: of the draws.

    Returns:
        the exponents, or a ``not_applicable`` that says why there are none.

    Raises:
        InputError: weights or inputs that are not finite, an unknown name in ``pin``, more than 1500 groups.
        TraceError: the model cannot be traced.

    Example:
        >>> found = exponents(nn.Linear(3, 2), torch.ones(4, 3))
        >>> {name: float(v) for name, v in found.exponents.items()}
        {'weight': 1.0, 'bias': 1.0}
    """
    graph = trace(model, (args,) if isinstance(args, Tensor) else tuple(args), kwargs)
    return graph_exponents(graph, flatten(graph, (args,) if isinstance(args, Tensor) else args, kwargs), groups, pin, draws, seed)


def graph_exponents(
    graph: Graph,
    data: Sequence[Tensor],
    groups: Groups = "tensor",
    pin: Mapping[str, float] | None = None,
    draws: int = 4,
    seed: int = 0,
) -> QuasiHomogeneity:
    """`exponents` of a traced graph on the tensors of a call."""
    for name, p in graph.params.items():
        if not bool(torch.isfinite(p).all()):
            raise InputError(f"parameter {name} holds NaN or infinite values.")
    places = _places(graph, groups)
    pinned = _pinned(graph, pin or {})
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad(), rng_state(), math_attention():
        rows, rhs = [], []
        for k in range(max(1, draws)):
            params = generic_parameters(graph, stream, own_scale=k % 2 == 0)
            inputs = list(data) if k == 0 else draw(graph, list(data), stream)
            row, value = _euler(graph, params, inputs, places, stream)
            size = float(value.norm())
            if size > 0 and math.isfinite(size):
                rows.append(row / size)
                rhs.append(value / size)
    if not rows:
        return QuasiHomogeneity({}, math.inf, None, (), "not_applicable", "the output is zero (or not finite) at generic weights")
    J, f = torch.cat(rows).numpy(), torch.cat(rhs).numpy()
    particular, null, residual = _solve(J, f)
    if residual > _HOLDS:
        note = (
            f"no exponents satisfy Euler's identity: relative residual {residual:.2g} (a bounded or saturating output, or a constant added)"
        )
        return QuasiHomogeneity({}, residual, None, (), "not_applicable", note)
    entries = _entries(graph, places)
    symmetries = _distinct(graph, places, entries, null)
    member = _least(entries, particular, null, _pin_rows(graph, places, pinned))
    if member is None:
        note = "no exponents >= 0 satisfy Euler's identity" + (" with the pinned ones" if pinned else "")
        return QuasiHomogeneity({}, residual, None, symmetries, "not_applicable", note)
    found = _named(graph, places, _rational(J, f, member, residual))
    certificate = _certified(graph, data, found, stream)
    good = certificate <= _CERTIFIED
    note = "" if good else f"a finite rescaling misses e^alpha f by {certificate:.2g}"
    return QuasiHomogeneity(found, residual, certificate, symmetries, "ok" if good else "violated", note)


@dataclass(frozen=True)
class _Place:
    """A group: one parameter, whole (axis None) or one index of one axis."""

    name: str
    axis: int | None = None
    index: int = 0

    def part(self, p: Tensor) -> Tensor:
        """``p`` on the group, zero elsewhere."""
        if self.axis is None:
            return p
        out = torch.zeros_like(p)
        out.select(self.axis, self.index).copy_(p.select(self.axis, self.index))
        return out


def _places(graph: Graph, groups: Groups) -> list[_Place]:
    if groups not in ("tensor", "unit"):
        raise InputError(f"groups must be 'tensor' or 'unit', got {groups!r}")
    out: list[_Place] = []
    for name, p in graph.params.items():
        if name in graph.dead or p.numel() == 0:
            continue
        axes = range(min(p.dim(), 2)) if groups == "unit" and p.dim() else ()
        out += [_Place(name, axis, i) for axis in axes for i in range(p.shape[axis])] or [_Place(name)]
    if len(out) > _MOST:
        raise InputError(f"{len(out)} groups are too many to solve for (at most {_MOST}): use groups='tensor'.")
    if not out:
        raise InputError("No parameter reaches the output.")
    return out


def _euler(
    graph: Graph, params: Mapping[str, Tensor], data: list[Tensor], places: Sequence[_Place], stream: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(rows, groups) of <theta_k, d f / d theta_k> and the outputs f (rows,)."""
    env = graph.prepare(data)

    def run(name: str, p: Tensor) -> Tensor:
        return torch.cat([o.reshape(-1) for o in graph.replay({**params, name: p}, env)])

    f = run(places[0].name, params[places[0].name])
    kept = torch.randperm(len(f), generator=stream)[:_ROWS]
    columns = []
    for place in places:
        base = params[place.name]
        columns.append(_along(lambda p, n=place.name: run(n, p), base, place.part(base))[kept])  # type: ignore[misc]
    return torch.stack(columns, 1), f[kept]


def _along(run: Any, base: Tensor, tangent: Tensor) -> Tensor:
    try:
        pushed: Tensor = torch.func.jvp(run, (base,), (tangent,))[1]
    except (RuntimeError, NotImplementedError):  # an operator without forward derivative: twice backward
        with torch.enable_grad():
            pushed = torch.autograd.functional.jvp(run, base.clone(), tangent)[1]
    return pushed.detach()


def _solve(J: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Least squares with columns of unit norm: a solution (G,), a basis of the null space (G, k), the relative residual."""
    sizes = np.linalg.norm(J, axis=0)
    seen = sizes > 1e-9 * max(sizes.max(), 1e-300)
    scaled = J[:, seen] / sizes[seen]
    u, s, vt = np.linalg.svd(scaled, full_matrices=True)
    rank = int((s > _NULL * s[0]).sum()) if len(s) else 0
    solution, null = np.zeros(J.shape[1]), np.zeros((J.shape[1], J.shape[1] - rank))
    solution[seen] = (vt[:rank].T @ ((u[:, :rank].T @ f) / s[:rank])) / sizes[seen]
    null[seen, : seen.sum() - rank] = vt[rank:].T / sizes[seen][:, None]
    null[np.flatnonzero(~seen), np.arange(seen.sum() - rank, null.shape[1])] = 1.0
    if null.shape[1]:
        null = np.linalg.qr(null)[0]
    return solution, null, float(np.linalg.norm(J @ solution - f) / np.linalg.norm(f))


def _entries(graph: Graph, places: Sequence[_Place]) -> np.ndarray:
    """(entries, groups): which groups' exponents add up at each distinct entry of the parameters."""
    rows: list[np.ndarray] = []
    by_name: dict[str, list[int]] = {}
    for k, place in enumerate(places):
        by_name.setdefault(place.name, []).append(k)
    for members in by_name.values():
        first = [k for k in members if places[k].axis in (None, 0)]
        second = [k for k in members if places[k].axis == 1]
        for a in first:
            for b in second or [None]:  # type: ignore[list-item]
                row = np.zeros(len(places))
                row[a] = 1.0
                if b is not None:
                    row[b] = 1.0
                rows.append(row)
    return np.stack(rows)


def _distinct(graph: Graph, places: Sequence[_Place], entries: np.ndarray, null: np.ndarray) -> tuple[Exponents, ...]:
    """Null vectors that differ as exponents of entries (rows and columns of one matrix can trade a constant)."""
    if not null.shape[1]:
        return ()
    _, s, vt = np.linalg.svd(entries @ null, full_matrices=False)
    return tuple(_named(graph, places, null @ v) for v in vt[: int((s > _NULL * max(s[0], 1e-300)).sum())])


def _least(entries: np.ndarray, particular: np.ndarray, null: np.ndarray, pins: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
    """The member particular + null z with entries >= 0 whose largest entry, then the next, ... is least; None if there is none.

    One linear programme for each level, and one for each entry that sits at it: an entry is fixed there if no optimum lowers it.
    """
    base, move = entries @ particular, entries @ null
    pin_rows, pin_values = pins
    equal, target = pin_rows @ null, pin_values - pin_rows @ particular
    k = null.shape[1]
    if not k:
        fits = base.min() > -1e-9 and (not len(target) or np.abs(target).max() < 1e-8)
        return particular if fits else None
    ceiling, free, z = np.full(len(base), np.inf), np.ones(len(base), dtype=bool), np.zeros(k)
    bounds = [(None, None)] * k
    while free.any():
        # minimise t over (z, t): free entries <= t, fixed ones at most their level, all >= 0
        held = ~free
        A = np.vstack([np.c_[move[free], -np.ones(free.sum())], np.c_[move[held], np.zeros(held.sum())], np.c_[-move, np.zeros(len(base))]])
        b = np.concatenate([-base[free], ceiling[held] - base[held], base])
        level = _programme(np.r_[np.zeros(k), 1.0], A, b, np.c_[equal, np.zeros(len(equal))], target, [*bounds, (0, None)])
        if level is None:
            return None if held.sum() == 0 else particular + null @ z
        z, t = level[:k], float(level[k])
        caps = np.where(free, t, ceiling) + 1e-9
        A, b = np.vstack([move, -move]), np.concatenate([caps - base, base + 1e-12])
        at = np.flatnonzero(free & (base + move @ z > t - 1e-7))
        fixed = []
        for i in at:
            lower = _programme(move[i], A, b, equal, target, bounds)
            if lower is None or base[i] + move[i] @ lower > t - 1e-6:
                fixed.append(i)
        for i in fixed or list(at):
            ceiling[i], free[i] = t, False
    return particular + null @ z


def _programme(cost: np.ndarray, A: np.ndarray, b: np.ndarray, E: np.ndarray, e: np.ndarray, bounds: Any) -> np.ndarray | None:
    found = linprog(cost, A, b, E if len(E) else None, e if len(e) else None, bounds=bounds, method="highs")
    return np.asarray(found.x) if found.success else None


def _rational(J: np.ndarray, f: np.ndarray, member: np.ndarray, residual: float) -> np.ndarray:
    """The nearest simple fractions, if they satisfy Euler's identity as well as the solution does."""
    simple = np.array([float(Fraction(float(v)).limit_denominator(60)) for v in member])
    error = np.linalg.norm(J @ simple - f) / np.linalg.norm(f)
    return simple if np.abs(simple - member).max() < 1e-6 and error <= max(10 * residual, 1e-12) else member


def _named(graph: Graph, places: Sequence[_Place], values: np.ndarray) -> Exponents:
    out: Exponents = {}
    for place, value in zip(places, values.tolist(), strict=True):
        p = graph.params[place.name]
        if place.axis is None:
            out[place.name] = torch.tensor(value, dtype=torch.float64)
        else:
            full = out.setdefault(place.name, torch.zeros(p.shape, dtype=torch.float64))
            full.select(place.axis, place.index).add_(value)
    return out


def _scaled(params: Mapping[str, Tensor], lam: Exponents, alpha: float) -> dict[str, Tensor]:
    return {n: p * (alpha * lam[n]).exp().to(p) if n in lam else p for n, p in params.items()}


def _certified(graph: Graph, data: Sequence[Tensor], lam: Exponents, stream: torch.Generator) -> float:
    worst = 0.0
    with torch.no_grad(), rng_state(), math_attention():
        for params, inputs in (
            (graph.params, list(data)),
            (generic_parameters(graph, stream), draw(graph, list(data), stream, wide=True)),
            (generic_parameters(graph, stream), draw(graph, list(data), stream)),
        ):
            before = graph(params, inputs)
            for alpha in _ALPHAS:
                worst = max(worst, relative_change(math.exp(alpha) * before, graph(_scaled(params, lam, alpha), inputs)))
    return worst


def _pinned(graph: Graph, pin: Mapping[str, float]) -> dict[str, float]:
    out = {}
    for name, value in pin.items():
        canonical = graph.aliases.get(name, name)
        if canonical not in graph.params:
            raise InputError(f"pin: the model has no parameter {name!r}; it has {', '.join(list(graph.params)[:8])}, ...")
        if not math.isfinite(value) or value < 0:
            raise InputError(f"pin: the exponent of {name} must be a number >= 0, got {value!r}")
        out[canonical] = float(value)
    return out


def _pin_rows(graph: Graph, places: Sequence[_Place], pinned: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Equations (rows over groups, values): each entry of a pinned parameter has its exponent."""
    entries = _entries(graph, places)
    names = [places[int(row.argmax())].name for row in entries]
    chosen = [i for i, name in enumerate(names) if name in pinned]
    return entries[chosen].reshape(len(chosen), len(places)), np.array([pinned[names[i]] for i in chosen])
