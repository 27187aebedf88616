"""The noise equilibrium: the one point of an orbit where gradient noise stops moving the charges, found without training.

Along theta -> exp(lam A) theta the gradient goes to exp(-lam A) g, so its second moments at every point of the orbit are known from those
at one point, and the condition tr(A M2) = (2 gamma / eta) Q is an equation in lam alone (noise-equilibrium R3, _charges-and-laws
section 6). One generator: bracket and Brent. Rescalings that share weights: balancing sweeps (Osborne). A GL(n) pair: a geometric
mean of matrices. A chain of linear layers: the closed form of perfect-platonic R3. The function, hence the loss, is unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Status, plain
from parasym.laws.charges import Charge
from parasym.laws.drift import charge_moments
from parasym.measure.gradients import GradientMoments, LossFn, Objective, gradient_moments
from parasym.solvable.chains import chain_equilibrium as chain_equilibrium
from parasym.solvable.chains import chain_fluctuation as chain_fluctuation
from parasym.solvable.chains import square_roots

Rule = Literal["sgd", "adam"]


# ---------------------------------------------------------------------------------------------------------------- one generator


@dataclass(frozen=True)
class Root:
    """The balanced point of one generator.

    Attributes:
        value: lam*; +-inf where no balanced point exists and the flow runs away; nan where the generator feels nothing at all.
        residual: |F(lam*)| relative to the size of its terms.
        status: ok, or not_applicable (no root).
        note: why there is none.
    """

    value: float
    residual: float
    status: Status
    note: str = ""


def solve_generator(weights: Tensor, noise: Tensor, size: Tensor | None = None, pull: float = 0.0) -> Root:
    """Solve sum a s exp(-2 a lam) = pull sum a c exp(2 a lam) for lam.

    Args:
        weights: (k,) eigenvalues a of A. noise: (k,) s = E <g_B, e>^2. size: (k,) c = <theta, e>^2.
        pull: 2 gamma / eta.

    The left side minus the right falls strictly with lam, so the root is unique. It exists when there is noise on both signs of a, or
    decay against noise of one sign; otherwise the norm grows (or shrinks) without end (noise-equilibrium R3, second class).
    """
    a, s = weights.double(), noise.double()
    c = torch.zeros_like(s) if size is None else size.double()

    def force(lam: float) -> float:
        return float((a * s * torch.exp(-2 * a * lam)).sum() - pull * (a * c * torch.exp(2 * a * lam)).sum())

    def scale(lam: float) -> float:
        return float((a.abs() * s * torch.exp(-2 * a * lam)).sum() + pull * (a.abs() * c * torch.exp(2 * a * lam)).sum())

    up = bool(((a > 0) & (s > 0)).any()) or (pull > 0 and bool(((a < 0) & (c > 0)).any()))
    down = bool(((a < 0) & (s > 0)).any()) or (pull > 0 and bool(((a > 0) & (c > 0)).any()))
    if not (up or down):
        return Root(math.nan, 0.0, "not_applicable", "no noise reaches it (a dead unit)")
    if not (up and down):
        note = "noise on one side only: nothing balances it, and without weight decay the scale grows for ever"
        return Root(math.inf if up else -math.inf, 1.0, "not_applicable", note)
    low, high = -1.0, 1.0
    while force(low) < 0 and low > -1e3:
        low *= 2
    while force(high) > 0 and high < 1e3:
        high *= 2
    lam = float(brentq(force, low, high, xtol=1e-15, rtol=8.9e-16, maxiter=500))
    return Root(lam, abs(force(lam)) / scale(lam), "ok")


# ----------------------------------------------------------------------------------------------------------------- a linear pair


def geometric_mean(K: Tensor, N: Tensor) -> Tensor:
    """The positive H with H K H = N, for symmetric positive K, N (..., n, n): K^-1/2 (K^1/2 N K^1/2)^1/2 K^-1/2."""
    root, inverse = square_roots(K)
    return inverse @ square_roots(root @ N @ root)[0] @ inverse


def solve_pair(
    inward: Tensor, outward: Tensor, inward_size: Tensor | None = None, outward_size: Tensor | None = None, pull: float = 0.0
) -> Tensor:
    """The symmetric lam (..., n, n) for which inward parts times exp(lam) and outward parts times exp(-lam) are balanced.

    Args:
        inward, outward: second moments of the gradient, E G G^T summed over each side, n x n, at lam = 0.
        inward_size, outward_size: the same sums of the parameters. pull: 2 gamma / eta.

    Balance is B M_out B = B^-1 M_in B^-1 with B = exp(lam), so B^2 is the geometric mean of M_out^-1 and M_in. With decay M_in gains
    pull times the outward size, and the other way round (section 6c).
    """
    up, down = inward.double(), outward.double()
    if pull:
        assert inward_size is not None and outward_size is not None
        up, down = up + pull * outward_size.double(), down + pull * inward_size.double()
    (L, one), (M, two) = (torch.linalg.cholesky_ex(0.5 * (m + m.mT)) for m in (down, up))
    if not bool(one.any() | two.any()):  # B^2 = C C^T by singular values, which keep the small ones that roots of products lose
        P, S, _ = torch.linalg.svd(L.mT @ M)
        Q, s, _ = torch.linalg.svd(torch.linalg.solve_triangular(L.mT, P * S.sqrt()[..., None, :], upper=True))
        return (Q * s.clamp_min(1e-300).log()[..., None, :]) @ Q.mT
    H = geometric_mean(down, up)
    w, Q = torch.linalg.eigh(0.5 * (H + H.mT))
    return (Q * (0.5 * w.clamp_min(1e-300).log())[..., None, :]) @ Q.mT


def pair_from_product(M: Tensor, E: Tensor, X: Tensor, hidden: int | None = None) -> tuple[Tensor, Tensor]:
    """(U*, W*) with U* W* = M and U^T E U = W X W^T, by one SVD: E^1/2 M X^1/2 = P S R^T (section 6c).

    Args:
        M: (o, i) the product. E: (o, o) and X: (i, i) second moments E[J J^T], E[J^T J] of J = dl / dM, positive definite.
        hidden: width h >= rank M; extra hidden directions are zero.
    """
    rE, iE = square_roots(E)
    rX, iX = square_roots(X)
    P, S, Rt = torch.linalg.svd(rE @ M @ rX, full_matrices=False)
    keep = 1e-14 * S.max().clamp_min(1e-300) < S
    P, S, Rt = P[:, keep], S[keep], Rt[keep]
    h = hidden or len(S)
    if h < len(S):
        raise InputError(f"A hidden width of {h} cannot carry a product of rank {len(S)}.")
    turn = torch.eye(h, len(S), dtype=M.dtype)
    return iE @ P * S.sqrt() @ turn.T, turn @ (S.sqrt()[:, None] * (Rt @ iX))


# ----------------------------------------------------------------------------------------------------- rescalings that share weights


@dataclass(frozen=True, eq=False)
class Balanced:
    """What `osborne` found.

    Attributes:
        elements: lam of each charge, (count,); zero for units without noise.
        params, second: parameters and gradient second moments at the balanced point.
        sweeps: number of sweeps. residual: largest relative imbalance at the end. start: at the beginning.
        skipped: (charge, unit, reason) of generators without a root.
    """

    elements: tuple[Tensor, ...]
    params: dict[str, Tensor]
    second: dict[str, Tensor]
    sweeps: int
    residual: float
    start: float
    skipped: tuple[tuple[str, int, str], ...]


def osborne(
    params: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    charges: Sequence[Charge],
    *,
    pull: float = 0.0,
    rule: Rule = "sgd",
    tol: float = 1e-13,
    sweeps: int = 1000,
) -> Balanced:
    """Balance every unit rescaling at once: coordinate descent on a convex function of all lam (section 6b).

    Args:
        params: name -> weights. second: name -> E g_B^2 entry by entry, same shapes.
        charges: quadratic charges with weights +1 and -1 (others are solved one by one by Brent).
        pull: 2 gamma / eta.
        rule: "sgd" balances sum a E g^2; "adam" balances sum a sqrt(E g^2), the law of a slow diagonal preconditioner (section 5).
        tol: largest imbalance allowed. sweeps: at most.

    Raises:
        InputError: a charge that is not quadratic, or decay with rule="adam".
    """
    if any(c.kind != "quadratic" for c in charges):
        raise InputError("osborne balances quadratic charges; matrix ones go through noise_equilibrium.")
    if rule == "adam" and pull:
        raise InputError("With a diagonal preconditioner the decay term has no closed form along the orbit: set weight_decay to 0.")
    theta = {n: p.detach().to(torch.float64, copy=True) for n, p in params.items()}
    s = {n: m.detach().to(torch.float64, copy=True) for n, m in second.items()}
    power = 0.5 if rule == "adam" else 1.0
    lam = [torch.zeros(c.count, dtype=torch.float64) for c in charges]
    skipped: dict[tuple[int, int], str] = {}
    residual, start, sweep = math.inf, math.inf, 0
    for sweep in range(1, sweeps + 1):
        residual = 0.0
        for i, c in enumerate(charges):
            step, gap, dead = _balance(c, theta, s, pull, power)
            skipped.update({(i, j): why for j, why in dead.items()})
            residual = max(residual, gap)
            lam[i] += step
            theta.update(c.act(theta, step))
            s.update(c.act(s, -2 * step))
        start = residual if sweep == 1 else start
        if residual <= tol:
            break
    listed = tuple((charges[i].name, j, why) for (i, j), why in sorted(skipped.items()))
    return Balanced(tuple(lam), theta, s, sweep, residual, start, listed)


def _balance(
    c: Charge, theta: Mapping[str, Tensor], s: Mapping[str, Tensor], pull: float, power: float
) -> tuple[Tensor, float, dict[int, str]]:
    """lam of each unit of one charge that balances it now, the relative imbalance before, and the units without a root."""
    roots = {n: (s[n] ** power).sqrt() for n in c.parameters}
    plus, minus = c.split(roots, roots)
    unit_weights = all(abs(b.weight) == 1 for b in c.blocks)
    if pull:
        grow, shrink = c.split(theta, theta)
        plus, minus = plus + pull * shrink, minus + pull * grow
    live = (plus > 0) & (minus > 0)
    dead = {int(j): _why(float(plus[j]), float(minus[j])) for j in (~live).nonzero().flatten()}
    gap = ((plus - minus).abs() / (plus + minus).clamp_min(1e-300))[live]
    if unit_weights:
        step = torch.where(live, (plus.clamp_min(1e-300) / minus.clamp_min(1e-300)).log() / (4 * power), torch.zeros_like(plus))
        return step, float(gap.max()) if len(gap) else 0.0, dead
    step = torch.zeros_like(plus)
    for j in live.nonzero().flatten().tolist():
        a, noise, size = _terms(c, j, {n: s[n] ** power for n in c.parameters}, theta)
        step[j] = solve_generator(a * power, noise, size, pull).value if power == 1 else solve_generator(a * power, noise).value
    return step, float(gap.max()) if len(gap) else 0.0, dead


def _why(plus: float, minus: float) -> str:
    return "no noise reaches it (a dead unit)" if plus <= 0 and minus <= 0 else "noise on one side only: no balance, the scale grows"


def _terms(c: Charge, j: int, s: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    weights, noise, size = [], [], []
    for b in c.blocks:
        one = replace(c, blocks=(replace(b, weight=1.0),))
        root = {b.place.parameter: s[b.place.parameter].sqrt()}
        weights.append(b.weight)
        noise.append(float(one.form(root, root)[j]))
        size.append(float(one.form(theta, theta)[j]))
    return torch.tensor(weights), torch.tensor(noise), torch.tensor(size)


# ----------------------------------------------------------------------------------------------------------------- a whole model


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """A model moved along its orbits to the noise equilibrium.

    Attributes:
        params: name -> new value, in the model's dtype; only those that moved.
        residual: largest relative imbalance left; start: before.
        loss_before, loss_after: on the given data.
        fluctuation_before, fluctuation_after: E|g_B|^2, four times the entropic potential over eta.
        elements: name -> lam of each charge.
        no_root: (charge, unit, reason) of generators without an equilibrium.
        passes: passes over the data. status: ok, not_converged, or not_applicable (no charge has an equilibrium).
    """

    params: dict[str, Tensor]
    residual: float
    start: float
    loss_before: float
    loss_after: float
    fluctuation_before: float
    fluctuation_after: float
    elements: Mapping[str, Tensor]
    no_root: tuple[tuple[str, int, str], ...]
    passes: int
    status: Status
    note: str = ""
    refs: tuple[str, ...] = field(default=("noise-equilibrium R3", "noise-equilibrium R5"))

    def apply(self, model: nn.Module) -> None:
        """Write the balanced weights into the model; an optimiser's momentum does not move with them."""
        live = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in self.params.items():
                live[name].copy_(value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the parameters."""
        keys = ("residual", "start", "loss_before", "loss_after", "fluctuation_before", "fluctuation_after", "passes", "status", "note")
        return {**plain({k: getattr(self, k) for k in keys}), "no_root": [list(r) for r in self.no_root], "refs": list(self.refs)}


def noise_equilibrium(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    charges: Sequence[Charge],
    *,
    batch_size: int,
    lr: float | None = None,
    weight_decay: float = 0.0,
    replacement: bool = True,
    rule: Rule = "sgd",
    tol: float = 1e-9,
    passes: int = 12,
    floor: float = 0.0,
) -> Equilibrium:
    """The point of the model's orbits where SGD's noise is balanced; the function is the same, no training is done.

    Rescalings are balanced together from one pass over the data; with matrix charges the passes alternate with closed-form steps (each
    is the exact minimiser over its own group of the geodesically convex E|g|^2) until all are balanced.

    Args:
        model, loss_fn, loader: see `parasym.measure.gradients.Objective`; the model is not changed. Computed in float64.
        charges: from `parasym.laws.charges`; linear ones have no equilibrium and are left alone.
        batch_size: S of the SGD whose equilibrium is asked for; replacement: how its batches are drawn.
        lr, weight_decay: needed together: decay shifts the equilibrium by 2 gamma / eta.
        rule: "sgd"; "adam" for the l1 balance of a slow diagonal preconditioner (quadratic charges only).
        tol: relative imbalance to reach. passes: over the data, at most.
        floor: for matrix charges, noise below this share of its largest direction counts as that much: directions that the data barely
            reach, or not at all, then move by a factor of at most floor^-1/4 each way. 0: they are left alone if noise misses them.

    Raises:
        InputError: weight_decay without lr, or see `gradient_moments`.
    """
    if weight_decay and not lr:
        raise InputError("weight_decay shifts the equilibrium by 2 weight_decay / lr: give lr too.")
    pull = 2 * weight_decay / lr if weight_decay and lr else 0.0
    objective = Objective(model, loss_fn, dtype=torch.float64)
    if rule == "adam" and any(c.kind == "matrix" for c in charges):
        raise InputError("rule='adam' balances rescalings only: a diagonal preconditioner breaks the rotations of a GL.")
    frozen = [c for c in charges if any(n not in objective.params for n in c.parameters)]
    usable = [c for c in charges if c.kind != "linear" and c not in frozen]
    scales, matrices = [c for c in usable if c.kind == "quadratic"], [c for c in usable if c.kind == "matrix"]
    no_root = [(c.name, 0, "a parameter is frozen") for c in frozen]
    original = dict(objective.params)
    total = {_key(usable, c): torch.zeros(c.shape, dtype=torch.float64) for c in usable}
    begin = gradient_moments(objective, loader, unit=_unit(objective))
    start, residual, done = 0.0, 0.0, 0
    for done in range(1, passes + 1):
        for c in matrices:
            objective.params.update(_drop_unread(c, objective.params))
        found, _ = charge_moments(objective, loader, matrices) if matrices else ([], None)
        base = gradient_moments(objective, loader, unit=_unit(objective)) if matrices else begin
        factor = base.factor(batch_size, replacement)
        before, dead = 0.0, list[tuple[str, int, str]]()
        second = base.second(batch_size, replacement)
        for c, m in zip(matrices, found, strict=True):
            lam, gap, without = _pair_step(m.of_batch(factor)[1:], c.split(objective.params, objective.params), pull, floor)
            before, dead = max(before, gap), dead + [(c.name, j, why) for j, why in without.items()]
            objective.params.update(c.act(objective.params, lam))
            total[_key(usable, c)] += lam
        after = 0.0
        if scales:  # beside matrix charges the squares are those before the matrix step: one sweep, and measure again
            balanced = osborne(objective.params, second, scales, pull=pull, rule=rule, sweeps=1 if matrices else 5000)
            before, after, dead = max(before, balanced.start), balanced.residual, dead + list(balanced.skipped)
            objective.params.update(balanced.params)
            for c, lam in zip(scales, balanced.elements, strict=True):
                total[_key(usable, c)] += lam
        if done == 1:
            start, no_root = before, no_root + dead
        residual = before if matrices else after
        if residual <= tol or not matrices:
            break
    last = gradient_moments(objective, loader, unit=_unit(objective))
    own = {n: p.dtype for n, p in model.named_parameters(remove_duplicate=False)}
    moved = {n: p.to(own.get(n, p.dtype)) for n, p in objective.params.items() if not torch.equal(p, original[n])}
    status: Status = "not_applicable" if not usable else "ok" if residual <= tol else "not_converged"
    note = "" if status == "ok" else "no charge has an equilibrium" if not usable else f"imbalance {residual:.1e} after {done} passes"
    return Equilibrium(
        moved,
        residual,
        start,
        begin.loss,
        last.loss,
        _fluctuation(begin, batch_size, replacement),
        _fluctuation(last, batch_size, replacement),
        total,
        tuple(no_root),
        done * (2 if matrices else 0) + 2,
        status,
        note,
    )


def _key(usable: Sequence[Charge], c: Charge) -> str:
    return f"{c.name}#{next(i for i, other in enumerate(usable) if other is c)}"


def _unit(objective: Objective) -> Literal["sample", "batch"]:
    return "batch" if objective.coupled else "sample"


def _fluctuation(m: GradientMoments, batch: int, replacement: bool) -> float:
    c = m.factor(batch, replacement)
    return m.mean_square + c * (float(m.norms.mean()) - m.mean_square)


def raised(M: Tensor, floor: float) -> Tensor:
    """A symmetric matrix with eigenvalues of at least ``floor`` times the largest."""
    w, Q = torch.linalg.eigh(0.5 * (M + M.mT))
    return (Q * w.clamp_min(floor * float(w[-1]))) @ Q.mT


def _drop_unread(c: Charge, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set to zero what one side writes into hidden directions that the other side ignores: where the flow ends, and the same function."""
    moved = dict[str, Tensor]()
    for sign in (1.0, -1.0):
        held = {**params, **moved}
        seen = c.split(held, held)[1 if sign > 0 else 0]  # the Gram matrix of the other side
        w, Q = torch.linalg.eigh(seen)
        keep = (w > 1e-12 * w.amax(-1, keepdim=True).clamp_min(1e-300)).to(w.dtype)
        if bool(keep.all()):
            continue
        P = (Q * keep[..., None, :]) @ Q.mT
        eye = torch.eye(c.size, dtype=P.dtype).expand_as(P)
        moved.update(c.multiply(held, lambda weight, P=P, eye=eye, sign=sign: P if weight * sign > 0 else eye))  # type: ignore[misc]
    return moved


def _pair_step(
    noise: tuple[Tensor, Tensor], size: tuple[Tensor, Tensor], pull: float, floor: float
) -> tuple[Tensor, float, dict[int, str]]:
    """lam of each copy of a matrix charge, the relative imbalance before, and the copies without an equilibrium.

    ``noise`` and ``size``: second moments of the gradient and of the weights on the inward and the outward side.
    """
    (up, down), (grow, shrink) = noise, size
    lam, worst, dead = torch.zeros_like(up), 0.0, {}
    for j in range(len(up)):
        w, Q = torch.linalg.eigh(grow[j] + shrink[j])
        V = Q[:, w > 1e-12 * w.max().clamp_min(1e-300)]  # directions that exist on both sides
        pu, pd, pg, ps = (V.T @ t[j] @ V for t in (up, down, grow, shrink))
        if floor and V.shape[1]:
            pu, pd = raised(pu, floor), raised(pd, floor)
        a, b = pu + pull * ps, pd + pull * pg
        ranks = [int((torch.linalg.eigvalsh(m) > 1e-12 * m.trace().clamp_min(1e-300)).sum()) for m in (a, b)] if V.shape[1] else [0, 0]
        if not V.shape[1] or min(ranks) < V.shape[1]:
            dead[j] = f"noise does not reach every direction (ranks {ranks[0]} and {ranks[1]} of {V.shape[1]}): no unique balanced point"
            continue
        worst = max(worst, float((a - b).norm() / (a.norm() + b.norm())))
        lam[j] = V @ solve_pair(pu, pd, pg, ps, pull) @ V.T
    return lam, worst, dead
