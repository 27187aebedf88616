"""Parameter Symmetry and Noise Equilibrium of Stochastic Gradient Descent.

Slug noise-equilibrium. Gradient flow cannot move along the orbit of a symmetry; gradient noise can, and does so systematically, to one
point of the orbit that does not depend on the start. The point is found here by a solver, and by running SGD until it gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import agreement
from parasym.gallery.ensemble import Ensemble
from parasym.gallery.neural_mechanics import DataConfig, cross_entropy, draw_data
from parasym.laws.charges import Charge, rescale
from parasym.laws.drift import charge_moments, expected_change
from parasym.laws.equilibrium import (
    chain_equilibrium,
    chain_fluctuation,
    geometric_mean,
    noise_equilibrium,
    pair_from_product,
    solve_generator,
)
from parasym.measure.gradients import Objective

SLUG = "noise-equilibrium"
_DATA = DataConfig()


# ------------------------------------------------------------------------------------------------ E1: rank one


@dataclass(frozen=True)
class RankOneConfig:
    """f = w (u.x), loss r^2 / 2, x ~ N(0, I_d), y = u*.x + noise, |u*| = 1, one fresh sample a step, started on the global minimum.

    The start has |u|^2 / w^2 = ``starts`` (in units of d: 1/d and 4); the median ratio over the second half is compared with d.
    """

    dims: tuple[int, ...] = (3, 5)
    eta: float = 0.03
    sigma: float = 1.0
    steps: int = 40_000
    replicas: int = 50
    chunk: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)


def _target(d: int) -> Tensor:
    return torch.ones(d, dtype=torch.float64) / d**0.5


def start_at(ratio: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(u, w) with w u = target and |u|^2 / w^2 = ratio."""
    w = ratio**-0.25 * target.norm() ** 0.5
    return target / w[..., None], w


def simulate_rank_one(config: RankOneConfig, d: int) -> tuple[Tensor, Tensor]:
    """Ratio: its median over replicas and the second half of the run (starts, seeds), and at the end (starts, seeds, replicas).

    Both starts see the same noise.
    """
    draws = Ensemble(config.seeds)
    ratio = torch.tensor([1.0, 4.0 * d], dtype=torch.float64)[:, None, None].expand(2, len(config.seeds), config.replicas)
    u, w = start_at(ratio, _target(d))
    rows, target = [], _target(d)
    for block in range(config.steps // config.chunk):
        x = draws.normal(config.chunk, config.replicas, d).transpose(0, 1)
        y = x @ target + config.sigma * draws.normal(config.chunk, config.replicas).transpose(0, 1)
        for k in range(config.chunk):
            across = (u * x[k]).sum(-1)
            pull = config.eta * (w * across - y[k])
            u, w = u - (pull * w)[..., None] * x[k], w - pull * across
            if 2 * (block * config.chunk + k) >= config.steps and k % 20 == 0:
                rows.append(u.square().sum(-1) / w.square())
    return torch.stack(rows, -1).flatten(-2).median(-1).values, rows[-1]


def rank_one(config: RankOneConfig) -> Part:
    """E1, R7: SGD ends at |u|^2 / w^2 = d from any start; full-batch descent keeps the charge instead."""
    checks: list[Check] = []
    for d in config.dims:
        seen, end = simulate_rank_one(config, d)
        x = torch.eye(d, dtype=torch.float64)  # the a-priori prediction: E J J^T and E J^T J of J = -eps x^T at the minimum
        U, W = pair_from_product(_target(d)[None], torch.ones(1, 1, dtype=torch.float64) * d, x, 1)
        predicted = W.square().sum() / U.square().sum()
        checks += [
            match(f"d = {d}: closed form of |u|^2 / w^2", float(d), predicted, 1e-10, source=f"{SLUG} R5, R7"),
            match(f"d = {d}: median |u|^2 / w^2 of SGD, starts 1 and {4 * d}", predicted, seen, 0.05, relative=True,
                  source=f"{SLUG} E1", spread=seen),
            match(f"d = {d}: the two starts end at one point under the same noise, largest difference", 0.0,
                  (end[0] - end[1]).abs().max() / d, 1e-9, source=f"{SLUG} R7"),
        ]  # fmt: skip
    d = config.dims[0]
    moved, charge = _full_batch(d, config.eta, 4000)
    checks += [
        control(f"d = {d}, full-batch descent from near a minimum: relative change of the ratio", moved, at_most=0.01, source=f"{SLUG} E1"),
        control(f"d = {d}, full-batch descent from elsewhere: relative change of |u|^2 - w^2", charge, at_most=0.005, source=f"{SLUG} E1"),
    ]
    return Part(tuple(checks))


def _full_batch(d: int, eta: float, steps: int) -> tuple[Tensor, Tensor]:
    """Population gradient descent: change of the ratio from a point one per cent off a minimum (ratio 1), where noise takes it to d, and of
    the charge from a point far off."""
    target = _target(d)
    u, w = start_at(torch.tensor([1.0, 4.0 * d], dtype=torch.float64), target)
    u = u * torch.tensor([0.99, 0.6], dtype=torch.float64)[:, None]
    ratio, charge = u.square().sum(-1) / w.square(), u.square().sum(-1) - w.square()
    for _ in range(steps):
        gap = w[:, None] * u - target
        u, w = u - eta * w[:, None] * gap, w - eta * (u * gap).sum(-1)
    after = u.square().sum(-1) / w.square(), u.square().sum(-1) - w.square()
    return (after[0] / ratio - 1)[0].abs(), ((after[1] - charge) / charge)[1].abs()


# ------------------------------------------------------------------------------------------------ T4: adaptive balance


@dataclass(frozen=True)
class AdaptiveConfig:
    """The rank-one model under RMSprop (no momentum): g / (sqrt(v) + eps), v an average of g^2 with decay ``beta2`` started at E g^2.

    Starts at |u|^2 / w^2 = ``starts``; the median over replicas of the ratio, averaged over the second half.
    """

    dim: int = 3
    eta: float = 8e-3
    beta2: float = 0.9999
    fast: float = 0.99
    starts: tuple[float, ...] = (5.0, 14.0)
    steps: int = 150_000
    replicas: int = 100
    chunk: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)


def simulate_adaptive(config: AdaptiveConfig, beta2: float, steps: int) -> Tensor:
    """(starts, seeds): median over replicas of the ratio in the second half."""
    d, target, draws = config.dim, _target(config.dim).float(), Ensemble(config.seeds)
    ratio = torch.tensor(config.starts)[:, None, None].expand(-1, len(config.seeds), config.replicas)
    u, w = start_at(ratio, target)
    theta = torch.cat([u, w[..., None]], -1)
    v = torch.cat([w.square()[..., None].expand_as(u), u.square().sum(-1, keepdim=True)], -1)
    rows = []
    for block in range(steps // config.chunk):
        x = draws.normal(config.chunk, config.replicas, d, dtype=torch.float32).transpose(0, 1).contiguous()
        y = x @ target + draws.normal(config.chunk, config.replicas, dtype=torch.float32).transpose(0, 1)
        for k in range(config.chunk):
            w, across = theta[..., d], (theta[..., :d] * x[k]).sum(-1)
            r = w * across - y[k]
            g = torch.cat([(r * w)[..., None] * x[k], (r * across)[..., None]], -1)
            v = torch.lerp(g.square(), v, beta2)
            theta = theta - config.eta * g * v.rsqrt()
        if 2 * block * config.chunk >= steps:
            rows.append((theta[..., :d].square().sum(-1) / theta[..., d].square()).median(-1).values)
    return torch.stack(rows).mean(0).double()


def adaptive(config: AdaptiveConfig) -> Part:
    """T4, _charges-and-laws section 5: a slow diagonal preconditioner balances sum |g| instead of sum g^2, so the ratio is d^2, not d."""
    d = config.dim
    seen = simulate_adaptive(config, config.beta2, config.steps)
    fast = simulate_adaptive(config, config.fast, config.steps // 2)
    weights = torch.tensor([1.0] * d + [-1.0], dtype=torch.float64)
    u, w = start_at(torch.tensor([1.0], dtype=torch.float64), _target(d))
    lam = solve_generator(0.5 * weights, torch.cat([w.expand(d), u.norm()[None]])).value  # sigma_u = |w|, sigma_w = |u| at the minimum
    predicted = (u.norm() * np.exp(lam)) ** 2 / (w * np.exp(-lam)) ** 2
    return Part(
        (
            match("solver: |u|^2 / w^2 of the l1 balance", float(d * d), predicted, 1e-9, source=f"{SLUG} T4"),
            match(f"RMSprop, beta2 {config.beta2}: median |u|^2 / w^2 from {config.starts}", predicted, seen, 0.08, relative=True,
                  source="neural-thermodynamics R9, T4", spread=seen),
            control(f"RMSprop, beta2 {config.fast}: the second moment follows the noise and the ratio leaves d^2", fast,
                    at_least=1.3 * d * d, source="neural-thermodynamics R9", spread=fast),
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ E2, R3, R9: solvers


@dataclass(frozen=True)
class SolverConfig:
    """Random problems: a pair U W of width ``hidden`` with random positive E, X; chains of linear layers of widths ``chain``."""

    out: int = 4
    into: int = 5
    hidden: int = 4
    chain: tuple[int, ...] = (6, 4, 5)
    restarts: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)


def _positive(draws: Ensemble, n: int) -> Tensor:
    A = draws.normal(n, n)[0]
    return A @ A.T / n + 0.3 * torch.eye(n, dtype=torch.float64)


def _minimise(function: Callable[[Tensor], Tensor], size: int, seed: int) -> float:
    """L-BFGS from a random start near the identity, polished until it stops."""
    start = 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        t = torch.from_numpy(x.copy()).requires_grad_()
        f = function(t)
        (g,) = torch.autograd.grad(f, t)
        return float(f.detach()), g.numpy()

    found = minimize(
        value, start.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-11}
    )
    return float(found.fun)


def solvers(config: SolverConfig) -> Part:
    """E2, R3, R5, R9, R10, R13: closed forms against minimisation over the whole group, and against autograd."""
    pair, chain, hess, scaled, unique, geometric = [], [], [], [], [], []
    turned, speed, aligned = [], [], []
    for seed in config.seeds:
        draws = Ensemble((seed,))
        E, X = _positive(draws, config.out), _positive(draws, config.into)
        U0, W0 = draws.normal(config.out, config.hidden)[0], draws.normal(config.hidden, config.into)[0]
        U, W = pair_from_product(U0 @ W0, E, X, config.hidden)

        def fluctuation(flat: Tensor, E: Tensor = E, X: Tensor = X, U0: Tensor = U0, W0: Tensor = W0) -> Tensor:
            B = torch.linalg.matrix_exp(flat.reshape(config.hidden, config.hidden))
            A, C = torch.linalg.solve(B.T, U0.T).T, B @ W0
            return (A.T @ E @ A).trace() + (C @ X @ C.T).trace()

        best = min(_minimise(fluctuation, config.hidden**2, 10 * seed + i) for i in range(config.restarts))
        closed = (U.T @ E @ U).trace() + (W @ X @ W.T).trace()
        pair.append((closed - best) / best)
        H = geometric_mean(W0 @ X @ W0.T, U0.T @ E @ U0)
        geometric.append((H @ (W0 @ X @ W0.T) @ H - U0.T @ E @ U0).norm() / (U0.T @ E @ U0).norm())
        chain.append(_chain_gap(config, draws, E, X, seed))
        hess.append(_trace_gap(U, W, X))
        scaled.append(_scaling(U0 @ W0, E, X))
        turned.append(_rotation(draws))
        speed.append(_speed(draws))
        left, right = chain_equilibrium(U0 @ W0, X, E, (config.out,))[::-1]
        ends = left.T @ E @ left / E.trace(), right @ X @ right.T / X.trace()
        aligned.append((ends[0] - ends[1]).norm() / ends[0].norm())
        a, s = draws.normal(6)[0], draws.normal(6)[0].square()
        F = torch.stack([(a * s * torch.exp(-2 * a * t)).sum() for t in torch.linspace(-2, 2, 101, dtype=torch.float64)])
        unique.append((F[1:] - F[:-1]).max())
    return Part(
        (
            match("linear pair: closed form against L-BFGS over GL(h), relative gap", 0.0, torch.stack(pair).abs(), 1e-9,
                source=f"{SLUG} E2",
                  spread=torch.stack(pair)),
            match("geometric mean: residual of H K H = N", 0.0, torch.stack(geometric), 1e-12, source=f"{SLUG} R5"),
            match("deep chain: closed form against L-BFGS over all gauges, relative gap", 0.0, torch.stack(chain).abs(), 1e-8,
                  source=f"{SLUG} R9", spread=torch.stack(chain)),
            match("tr H = 2 (|U|^2 tr X + d_y tr W X W^T) against autograd, relative", 0.0, torch.stack(hess), 1e-10, source=f"{SLUG} R10"),
            match("x -> s x with the map kept: tr H at the equilibrium of a pair over s, relative", 0.0, torch.stack(scaled), 1e-10,
                  source=f"{SLUG} R13"),
            match("rotations: theta.A theta and tr(A M2) for antisymmetric A", 0.0, torch.stack(turned), 1e-12, source=f"{SLUG} R2"),
            match("dQ/dlam along an orbit = 2 theta.A^2 theta, relative", 0.0, torch.stack(speed), 1e-8, source=f"{SLUG} R4"),
            match("regression: W X W^T / tr X = U^T E U / tr E at the equilibrium, relative", 0.0, torch.stack(aligned), 1e-10,
                  source=f"{SLUG} R6"),
            holds("F(lam) falls along every orbit: its largest increase", torch.stack(unique), at_most=0.0, source=f"{SLUG} R3"),
        )
    )  # fmt: skip


def _rotation(draws: Ensemble) -> Tensor:
    A, theta, g = draws.normal(6, 6)[0], draws.normal(6)[0], draws.normal(40, 6)[0]
    A = A - A.T
    return torch.stack([(theta @ A @ theta).abs(), (A @ (g.T @ g)).trace().abs() / 40])


def _speed(draws: Ensemble) -> Tensor:
    """Difference quotient of Q along the orbit of every unit at once against the form with A^2."""
    P = {"in": draws.normal(5, 4)[0], "out": draws.normal(3, 5)[0]}
    c = rescale(P, ["in"], ["out"])
    h = torch.full((5,), 1e-5, dtype=torch.float64)
    quotient = (c(c.act(P, h)) - c(c.act(P, -h))) / 2e-5
    theory = 2 * c.form(P, P, power=2)
    return ((quotient - theory) / theory).abs().max()


def _chain_gap(config: SolverConfig, draws: Ensemble, E: Tensor, X: Tensor, seed: int) -> Tensor:
    V = draws.normal(config.out, config.into)[0]
    weights = chain_equilibrium(V, X, E, config.chain)
    closed = chain_fluctuation(weights, X, E)
    sizes = [w * w for w in config.chain]

    def moved(flat: Tensor) -> Tensor:
        gauges = [torch.linalg.matrix_exp(p.reshape(w, w)) for p, w in zip(flat.split(sizes), config.chain, strict=True)]
        eye_in, eye_out = torch.eye(config.into, dtype=torch.float64), torch.eye(config.out, dtype=torch.float64)
        right, left = [eye_in, *(torch.linalg.inv(g) for g in gauges)], [*gauges, eye_out]
        return chain_fluctuation([a @ W @ b for a, W, b in zip(left, weights, right, strict=True)], X, E)

    best = min(_minimise(moved, sum(sizes), 100 + 10 * seed + i) for i in range(config.restarts))
    return (closed - best) / best


def _trace_gap(U: Tensor, W: Tensor, X: Tensor) -> Tensor:
    """tr of the Hessian of E |U W x - V x|^2 at a minimum, formula against autograd."""
    V, root = U @ W, torch.linalg.cholesky(X)

    def loss(flat: Tensor) -> Tensor:
        A, B = flat[: U.numel()].reshape(U.shape), flat[U.numel() :].reshape(W.shape)
        return ((A @ B - V) @ root).square().sum()

    seen = torch.func.hessian(loss)(torch.cat([U.reshape(-1), W.reshape(-1)])).trace()
    formula = 2 * (U.square().sum() * X.trace() + U.shape[0] * (W @ X @ W.T).trace())
    return (seen - formula).abs() / formula


def _scaling(V: Tensor, E: Tensor, X: Tensor) -> Tensor:
    """tr H* of a pair for inputs s x with the map V / s, over s times its value at s = 1, minus one."""
    values = []
    for s in (1.0, 3.0):
        U, W = chain_equilibrium(V / s, s**2 * X, E, (min(V.shape),))[::-1]
        values.append(2 * (U.square().sum() * s**2 * X.trace() + V.shape[0] * (W @ (s**2 * X) @ W.T).trace()))
    return (values[1] / (3.0 * values[0]) - 1).abs()


# ------------------------------------------------------------------------------------------------ E3: a ReLU net


@dataclass(frozen=True)
class NetworkConfig:
    """A 64-12-9-10 ReLU net at initialisation, cross-entropy; batches of ``batch`` with replacement, float64."""

    data: DataConfig = _DATA
    sizes: tuple[int, ...] = (64, 12, 9, 10)
    batch: int = 8
    eta: float = 0.02
    steps: int = 200
    runs: int = 4
    one_step: int = 400
    seeds: tuple[int, ...] = (0, 1, 2)


def deep(config: NetworkConfig, seed: int, act: type[nn.Module]) -> tuple[nn.Module, list[Charge]]:
    """The net and the rescaling charges of its two hidden layers."""
    a, b, c, d = config.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(a, b), act(), nn.Linear(b, c), act(), nn.Linear(c, d)).double()
    P = dict(model.named_parameters())
    return model, [rescale(P, ["0.weight", "0.bias"], ["2.weight"]), rescale(P, ["2.weight", "2.bias"], ["4.weight"])]


def network(config: NetworkConfig) -> Part:
    """E3, R1, T2, T3: the one-step law, the balanced point and what SGD does there."""
    rows = [_network(config, seed) for seed in config.seeds]
    table = {key: torch.stack([torch.as_tensor(row[key], dtype=torch.float64) for row in rows]) for key in rows[0] if key != "points"}
    checks = (
        holds("ReLU: root-mean-square z of the mean one-step change against eta^2 tr(A M2)", table["z"], at_most=1.4,
              source=f"{SLUG} R1, T2", spread=table["z"]),
        holds("ReLU: the same root-mean-square z from below", table["z"], at_least=0.7, source=f"{SLUG} R1, T2"),
        holds("ReLU: correlation of the mean one-step change with the prediction", table["correlation"], at_least=0.97, source=f"{SLUG} T2",
              spread=table["correlation"]),
        match("Osborne point: largest relative imbalance over that at the start", 0.0, table["residual"], 1e-10, source=f"{SLUG} E3, T3"),
        match("Osborne point: change of the loss", 0.0, table["loss"], 1e-12, source=f"{SLUG} E3, T3"),
        holds("mean |change of a charge| over SGD from the start over that from the balanced point", table["drop"], at_least=1.5,
              source=f"{SLUG} E3", spread=table["drop"]),
        control("tanh: root-mean-square z of the law", table["tanh_z"], at_least=5.0, source=f"{SLUG} E3, T2", spread=table["tanh_z"]),
        control("tanh: correlation of the law", table["tanh_correlation"], at_most=0.8, source=f"{SLUG} E3",
            spread=table["tanh_correlation"]),
        control("tanh: change of the loss at the would-be balanced point", table["tanh_loss"], at_least=1e-6, source=f"{SLUG} E3"),
    )  # fmt: skip
    figure = Figure(
        "one step of SGD: mean change of each charge",
        {"series": [{"name": "ReLU units", **rows[0]["points"]}], "x": "predicted", "y": "measured"},
        agreement,
        "Each point is a hidden unit of the first seed.",
    )
    return Part(checks, (figure,))


def _network(config: NetworkConfig, seed: int) -> dict[str, Any]:
    X, y = draw_data(config.data, seed)
    model, found = deep(config, seed, nn.ReLU)
    g = torch.Generator().manual_seed(seed)
    z, correlation, points = _one_step(config, model, found, X, y, g)
    balanced = noise_equilibrium(model, cross_entropy, (X, y), found, batch_size=config.batch)
    start = dict(Objective(model, cross_entropy).params)
    moved = {**start, **balanced.params}
    before, after = (_wander(config, model, found, p, X, y, seed) for p in (start, moved))
    tanh, wrong = deep(config, seed, nn.Tanh)
    tz, tc, _ = _one_step(config, tanh, wrong, X, y, g)
    false = noise_equilibrium(tanh, cross_entropy, (X, y), wrong, batch_size=config.batch)
    return {
        "z": z, "correlation": correlation, "points": points, "tanh_z": tz, "tanh_correlation": tc,
        "residual": balanced.residual / balanced.start, "loss": abs(balanced.loss_after - balanced.loss_before),
        "tanh_loss": abs(false.loss_after - false.loss_before), "drop": before / after,
    }  # fmt: skip


def _one_step(
    config: NetworkConfig, model: nn.Module, found: list[Charge], X: Tensor, y: Tensor, g: torch.Generator
) -> tuple[float, float, dict[str, list[float]]]:
    """z and correlation of the mean one-step change over batches, at the start of training."""
    objective = Objective(model, cross_entropy)
    moments, gradient = charge_moments(objective, (X, y), found)
    predicted = torch.cat([torch.as_tensor(expected_change(m, gradient.factor(config.batch), config.eta).value) for m in moments])
    point = dict(objective.params)
    start = torch.cat([c(point) for c in found])
    index = torch.randint(len(X), (config.one_step, config.batch), generator=g)
    slopes = torch.func.vmap(torch.func.grad(lambda p, a, b: objective(p, (a, b))), (None, 0, 0))(point, X[index], y[index])

    def change(gs: Mapping[str, Tensor]) -> Tensor:
        moved = {n: p - config.eta * gs[n] for n, p in point.items()}
        return torch.cat([c(moved) for c in found]) - start

    seen = torch.func.vmap(change)(slopes)
    live = seen.std(0) > 1e-12
    mean, theory = seen.mean(0)[live], predicted[live]
    z = (mean - theory) / (seen.std(0)[live] / config.one_step**0.5)
    points = {"predicted": theory.tolist(), "measured": mean.tolist()}
    return float(z.square().mean().sqrt()), float(torch.corrcoef(torch.stack([mean, theory]))[0, 1]), points


def _wander(
    config: NetworkConfig, model: nn.Module, found: list[Charge], start: Mapping[str, Tensor], X: Tensor, y: Tensor, seed: int
) -> float:
    """Mean |change of a charge| over runs of SGD, all runs at once."""
    objective = Objective(model, cross_entropy)
    g = torch.Generator().manual_seed(500 + seed)
    slope = torch.func.vmap(torch.func.grad(lambda p, a, b: objective(p, (a, b))))
    theta = {n: p.expand(config.runs, *p.shape).clone() for n, p in start.items()}
    for _ in range(config.steps):
        index = torch.randint(len(X), (config.runs, config.batch), generator=g)
        slopes = slope(theta, X[index], y[index])
        theta = {n: p - config.eta * slopes[n] for n, p in theta.items()}
    end = torch.func.vmap(lambda p: torch.cat([c(p) for c in found]))(theta)
    return float((end - torch.cat([c(start) for c in found])).abs().mean())


# ------------------------------------------------------------------------------------------------ E4: no balance


@dataclass(frozen=True)
class ScaleConfig:
    """f = mean softplus(-3 y x.q / |q|) under SGD without decay, n samples of dimension d, one sample a step, |q| = 1 at the start."""

    samples: int = 200
    dim: int = 10
    eta: float = 0.02
    steps: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)


def scale_class(config: ScaleConfig) -> Part:
    """E4, R8: a scale symmetry has no noise equilibrium: no root, and the norm grows at every step; decay brings a root."""
    draws = Ensemble(config.seeds)
    x, y = scale_invariant_data(draws, config.samples, config.dim)
    q = torch.nn.functional.normalize(draws.normal(config.dim), dim=-1)
    norms = [q.norm(dim=-1)]
    for _ in range(config.steps):
        index = draws.integers(config.samples, 1)
        q = q - config.eta * scale_invariant_gradient(q, _pick(x, index), _pick(y, index))
        norms.append(q.norm(dim=-1))
    grown = torch.stack(norms)
    unit = torch.nn.functional.normalize(q, dim=-1)
    square = torch.stack([scale_invariant_gradient(unit, x[:, i : i + 1], y[:, i : i + 1]).square().sum(-1) for i in range(config.samples)])
    noise = square.mean(0)
    alone = [solve_generator(torch.ones(1), s[None]) for s in noise]
    k = 0.01
    rooted = torch.tensor(
        [solve_generator(torch.ones(1), s[None], torch.ones(1), 2 * k / config.eta).value for s in noise], dtype=torch.float64
    )
    expected = (config.eta * noise / (2 * k)) ** 0.25
    return Part(
        (
            control("scale symmetry: number of seeds for which the solver finds a balanced point",
                float(sum(r.status == "ok" for r in alone)),
                    at_most=0.0, source=f"{SLUG} E4, R3"),
            holds("scale symmetry, no decay: smallest change of |q| in a step", (grown[1:] - grown[:-1]).amin(0), at_least=0.0,
                  source=f"{SLUG} E4", spread=(grown[1:] - grown[:-1]).amin(0)),
            match("scale symmetry with decay: |q| of the solver against (eta E|g|^2 / 2 k)^(1/4)", expected, rooted.exp(), 1e-9,
                relative=True,
                  source=f"{SLUG} R8"),
        )
    )  # fmt: skip


def scale_invariant_data(draws: Ensemble, samples: int, dim: int) -> tuple[Tensor, Tensor]:
    """(seeds, n, d) inputs and labels sign(x.w + xi / 2)."""
    x, w = draws.normal(samples, dim), draws.normal(dim)
    return x, (torch.einsum("snd,sd->sn", x, w) + 0.5 * draws.normal(samples)).sign()


def scale_invariant_gradient(q: Tensor, x: Tensor, y: Tensor, sharpness: float = 3.0) -> Tensor:
    """(s, d) gradient of mean softplus(-c y x.q / |q|) at q (s, d) for x (s, b, d), y (s, b)."""
    size = q.norm(dim=-1, keepdim=True)
    unit = q / size
    slope = -sharpness * y * torch.sigmoid(-sharpness * y * (x @ unit[..., None])[..., 0])
    g = (slope[..., None] * x).mean(-2)
    return (g - (g * unit).sum(-1, keepdim=True) * unit) / size


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return torch.stack([v[i] for v, i in zip(values, index, strict=True)])


# ------------------------------------------------------------------------------------------------ E5: warm-up


@dataclass(frozen=True)
class WarmupConfig:
    """f = w u x, y = x + eps / 2, x, eps ~ N(0, 1), loss r^2 / 2, one fresh sample a step, from u = 4, w = 1/4; linear ramp of eta over
    N."""

    eta: float = 0.15
    ramps: tuple[int, ...] = (0, 100, 1000, 4000)
    start: float = 4.0
    sigma: float = 0.5
    steps: int = 6000
    replicas: int = 400
    bound: float = 1e3
    seeds: tuple[int, ...] = (0, 1, 2)


def simulate_warmup(config: WarmupConfig) -> Tensor:
    """(ramps + 1, seeds): share of replicas that diverged; the last row starts balanced (u = w = 1) without a ramp."""
    draws, rows = Ensemble(config.seeds), len(config.ramps) + 1
    u = torch.full((rows, len(config.seeds), config.replicas), config.start, dtype=torch.float64)
    u[-1] = 1.0
    w, lost = 1 / u, torch.zeros_like(u, dtype=torch.bool)
    ramp = torch.tensor([*config.ramps, 0], dtype=torch.float64)[:, None, None]
    chunk = 500
    for block in range(config.steps // chunk):
        x = draws.normal(chunk, config.replicas).transpose(0, 1)
        y = x + config.sigma * draws.normal(chunk, config.replicas).transpose(0, 1)
        for k in range(chunk):
            eta = config.eta * ((block * chunk + k + 1) / ramp.clamp_min(1)).clamp(max=1)
            pull = eta * (w * u * x[k] - y[k]) * x[k]
            u, w = u - pull * w, w - pull * u
            lost |= ~(u.abs() + w.abs() < config.bound)
            u, w = torch.where(lost, 0.0, u), torch.where(lost, 0.0, w)
    return lost.double().mean(-1)


def warmup(config: WarmupConfig) -> Part:
    """E5, R11: noise removes the imbalance while the rate is small, so a warm-up prevents the divergence that the full rate causes."""
    share = simulate_warmup(config)
    long = config.ramps.index(1000)
    left, sharp = _noiseless(config)
    step = _exact_step(config)
    return Part(
        (
            match("one step multiplies u^2 - w^2 by 1 - eta^2 J_B^2, largest relative error over 500 steps", 0.0, step, 1e-12,
                  source=f"{SLUG} R11", spread=step),
            control(f"eta {config.eta}, no warm-up: share diverged", share[0], at_least=0.25, source=f"{SLUG} E5", spread=share[0]),
            holds(f"eta {config.eta}, warm-up over 1000 steps: share diverged", share[long], at_most=0.02, source=f"{SLUG} E5",
                spread=share[long]),
            holds(f"eta {config.eta}, balanced start, no warm-up: share diverged", share[-1], at_most=0.01, source=f"{SLUG} E5",
                spread=share[-1]),
            holds("share diverged falls with the length of the warm-up: largest increase", (share[1:-1] - share[:-2]).amax(), at_most=0.01,
                  source=f"{SLUG} E5"),
            control("without noise warm-up removes nothing: largest relative change of u^2 - w^2 at eta 0.05", left, at_most=0.02,
                    source=f"{SLUG} E5"),
            control(f"without noise the run ends on a minimum of sharpness above 2 / eta, eta {config.eta}", sharp, at_least=2 / config.eta,
                    source=f"{SLUG} E5"),
        )
    )  # fmt: skip


def _noiseless(config: WarmupConfig) -> tuple[Tensor, Tensor]:
    """Descent on (u w - 1)^2 / 2 from u = 4, w = 0.3: relative change of the charge at eta .05 (two ramps), sharpness reached at
    ``eta``."""
    changes = []
    for eta, ramp in ((0.05, 0), (0.05, 4000), (config.eta, 4000)):
        u, w = config.start, 0.3
        before = u * u - w * w
        for k in range(config.steps):
            pull = eta * min(1.0, (k + 1) / max(ramp, 1)) * (u * w - 1)
            u, w = u - pull * w, w - pull * u
        changes.append(torch.tensor([abs((u * u - w * w) / before - 1), u * u + w * w], dtype=torch.float64))
    return torch.stack(changes[:2])[:, 0].max(), changes[2][1]


def _exact_step(config: WarmupConfig) -> Tensor:
    draws = Ensemble(config.seeds)
    u = torch.full((len(config.seeds),), 1.5, dtype=torch.float64)
    w, worst = 0.5 + 0 * u, torch.zeros_like(u)
    for _ in range(500):
        x = draws.normal()
        J = x * (w * u * x - x - config.sigma * draws.normal())
        charge = u**2 - w**2
        u, w = u - 0.02 * J * w, w - 0.02 * J * u
        worst = torch.maximum(worst, ((u**2 - w**2) / (charge * (1 - (0.02 * J) ** 2)) - 1).abs())
    return worst


# ------------------------------------------------------------------------------------------------ R12: approximate symmetry


@dataclass(frozen=True)
class ApproximateConfig:
    """l = (w u.x - y)^2 / 2 + b (|u|^2 + c.u): a rescaling broken by the second term; mean one-step change of |u|^2 - w^2 over fresh
    samples."""

    dim: int = 3
    breaking: float = 0.05
    eta: float = 0.02
    draws: int = 400_000
    seeds: tuple[int, ...] = (0, 1, 2)


def approximate(config: ApproximateConfig) -> Part:
    """R12: dC = -2 eta theta.A grad L + eta^2 tr(A M2): the noise term survives where the symmetry is only approximate."""
    draws, d = Ensemble(config.seeds), config.dim
    x = draws.normal(config.draws, d)
    u, w, c = draws.normal(d)[:, None], 0.7, torch.ones(d, dtype=torch.float64)
    y = x @ _target(d) + draws.normal(config.draws)
    across = (u * x).sum(-1)
    r = w * across - y
    gu = (r * w)[..., None] * x + config.breaking * (2 * u + c)
    gw = r * across
    nu, nw = u - config.eta * gu, w - config.eta * gw
    change = nu.square().sum(-1) - nw.square() - (u.square().sum(-1) - w**2)
    eye = torch.eye(d, dtype=torch.float64)
    predicted, frozen = [], []
    for i in range(len(config.seeds)):  # population values by Gaussian moments: u, w fixed
        a = w * u[i, 0] - _target(d)
        mean_u = w * a + config.breaking * (2 * u[i, 0] + c)
        mean_w = a @ u[i, 0]
        extra = config.breaking * (2 * u[i, 0] + c)
        second = (a @ a + 1) * eye + 2 * torch.outer(a, a)  # E r^2 x x^T
        raw = w**2 * second.trace() + 2 * w * (a @ extra) + extra @ extra - u[i, 0] @ second @ u[i, 0]
        first = -2 * config.eta * (u[i, 0] @ mean_u - w * mean_w)
        predicted.append(first + config.eta**2 * raw)
        frozen.append(first)
    theory = torch.stack(predicted)
    error = change.std(-1) / config.draws**0.5
    z = (change.mean(-1) - theory) / error
    without = (change.mean(-1) - torch.stack(frozen)) / error
    return Part(
        (
            match("approximate symmetry: z of the mean one-step change against -2 eta theta.A grad L + eta^2 tr(A M2)", 0.0, z, 4.0,
                  source=f"{SLUG} R12", spread=z),
            control("the same without the noise term: |z|", without.abs(), at_least=5.0, source=f"{SLUG} R12", spread=without),
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    solvers: SolverConfig | None = SolverConfig()
    rank_one: RankOneConfig | None = RankOneConfig()
    network: NetworkConfig | None = NetworkConfig()
    scale_class: ScaleConfig | None = ScaleConfig()
    warmup: WarmupConfig | None = WarmupConfig()
    approximate: ApproximateConfig | None = ApproximateConfig()
    adaptive: AdaptiveConfig | None = AdaptiveConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Parameter Symmetry and Noise Equilibrium of Stochastic Gradient Descent",
    paper="Liu Ziyin, Mingze Wang, Hongchao Li, Lei Wu, NeurIPS 2024, arXiv 2402.07193",
    claims=(
        "Gradient noise moves the charge of a symmetry at the rate eta^2 tr(A E[g g^T]), without any noise of its own.",
        "Each orbit has one point where the noise of the two sides is equal; SGD goes there from any start.",
        "Linear pairs and chains have it in closed form, networks of rescalings by balancing sweeps, with the function unchanged.",
        "A pure scale has none: the norm grows. A warm-up removes the imbalance before the full rate makes it diverge.",
    ),
    presets={
        "smoke": Config(
            solvers=SolverConfig(chain=(4,), restarts=1),
            rank_one=RankOneConfig(dims=(3,), steps=20_000, replicas=40),
            network=replace(NetworkConfig(), data=DataConfig(samples=256), seeds=(0, 1, 2)),
            scale_class=ScaleConfig(steps=300),
            warmup=WarmupConfig(steps=3000, ramps=(0, 100, 1000)),
            approximate=ApproximateConfig(draws=100_000),
            adaptive=None,
        ),
        "default": Config(),
        "full": Config(
            solvers=SolverConfig(seeds=tuple(range(6))),
            rank_one=RankOneConfig(dims=(3, 5), seeds=tuple(range(5))),
            network=replace(NetworkConfig(), data=DataConfig(kind="digits"), seeds=tuple(range(5))),
            adaptive=AdaptiveConfig(replicas=200),
        ),
    },
    experiments={
        "solvers": solvers,
        "rank_one": rank_one,
        "network": network,
        "scale_class": scale_class,
        "warmup": warmup,
        "approximate": approximate,
        "adaptive": adaptive,
    },
)
