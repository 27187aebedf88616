"""Thermodynamic Irreversibility of Training Algorithms.

Slug thermodynamic-irreversibility. How irreversible a training rule is can be measured by numerical backward error, by refining time, by
running the rule backwards, or by the entropy production of regularised noise. The four agree to leading order in the learning rate; the
gradient of the common potential is a force that breaks symmetries, keeps isometries, and prefers low entropy production. The paper was
available as an abstract only: the definitions are the dossier's, chosen so that the four agree, and its normalisation may differ.

Conventions: tanh network 3-4-1 with biases, N(0, 1/fan_in), squared error averaged over a batch (no 1/2), 16 samples of N(0, I) inputs and
N(0, 1) targets, 6 batches of 4, float64; reference force -grad (eta/4) E|g_B|^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from parasym.core.operators import Layout
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble
from parasym.laws.backward import (
    Field,
    adam,
    adaptive_field,
    circulation,
    flow,
    heavy_ball,
    momentum_condition,
    momentum_field,
)
from parasym.laws.entropy import effective_loss
from parasym.laws.irreversibility import KINDS, EntropyProduction, Irreversibility, irreversibility, retrace_rule, reversal
from parasym.measure.gradients import Objective
from parasym.solvable.edln import LinearRegressionNetwork, run_sgd
from parasym.solvable.engines import follow

SLUG = "thermodynamic-irreversibility"
_F64 = torch.float64
Batches = list[tuple[Tensor, Tensor]]


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error."""
    return (a - b).square().mean()


def tanh_net(seed: int) -> tuple[Objective, Batches, tuple[Tensor, Tensor]]:
    """The network of the conventions, its batches, and all its samples."""
    draws = Ensemble((seed,))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draws.normal(*p.shape)[0] / (p.shape[1] if p.ndim > 1 else 3) ** 0.5)
    X, Y = draws.normal(16, 3)[0], draws.normal(16, 1)[0]
    picks = [draws.permutation(16)[0][:4] for _ in range(6)]
    return Objective(model, mse), [(X[i], Y[i]) for i in picks], (X, Y)


def gradient_of(objective: Objective, batch: Any) -> tuple[Field, Tensor]:
    """The gradient on a batch as a function of flat weights, and the weights."""
    layout = Layout.of(objective.params)
    slope = torch.func.grad(lambda x: objective(layout.unflatten(x), batch).reshape(()))
    return cast(Field, slope), layout.flatten(objective.params)


# ------------------------------------------------------------------------------------------------ the four measures


@dataclass(frozen=True)
class MeasuresConfig:
    """Relative error of each measure at halved rates; ``bounds`` on it at the smallest; 100 antithetic draws at D = 1e-6."""

    rates: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125)
    bounds: tuple[float, ...] = (0.04, 0.03, 0.03, 0.07)
    draws: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)


def measures(config: MeasuresConfig) -> Part:
    """E1, R1-R6: four measures, one potential; with a metric too."""
    names = dict(zip(KINDS, ("backward error", "time renormalisation", "time reversal", "entropy production"), strict=True))
    plain, metric = [], []
    for seed in config.seeds:
        objective, found, _ = tanh_net(seed)
        P = _metric(objective, seed)
        plain.append([irreversibility(objective, found, eta, draws=config.draws) for eta in config.rates])
        metric.append([irreversibility(objective, found, eta, preconditioner=P, draws=config.draws) for eta in config.rates[-2:]])
    checks: list[Check] = []
    errors = {k: torch.tensor([[run.error(k) for run in row] for row in plain], dtype=_F64) for k in KINDS}
    for kind, bound in zip(KINDS, config.bounds, strict=True):
        e = errors[kind]
        halving = e[:, :-1] / e[:, 1:]
        claim = f"{names[kind]}: factor by which the error falls when the rate is halved"
        checks += [
            match(claim, 2.0, halving, 0.3, source=f"{SLUG} E1, R5", spread=halving[:, -1]),
            holds(
                f"{names[kind]}: relative error at eta {config.rates[-1]}", e[:, -1], at_most=bound, source=f"{SLUG} E1", spread=e[:, -1]
            ),
        ]
        with_metric = torch.tensor([[run.error(kind) for run in row] for row in metric], dtype=_F64)
        checks.append(match(f"{names[kind]}, theta' = theta - eta P g: the same factor", 2.0, with_metric[:, 0] / with_metric[:, 1], 0.3,
                            source=f"{SLUG} R6", spread=with_metric[:, 0] / with_metric[:, 1]))  # fmt: skip
    below = torch.tensor([[_value(run) / run.potential for run in row] for row in plain], dtype=_F64)
    checks.append(holds("entropy production over the potential: always from below", below, at_most=1.0, source=f"{SLUG} E1"))
    pairs = torch.tensor([_pairwise(row[-1]) for row in plain], dtype=_F64)
    checks.append(holds("smallest cosine between any two of the forces at the smallest rate", pairs, at_least=0.995, source=f"{SLUG} R5",
                        spread=pairs))  # fmt: skip
    series = [{"name": names[k], "x": list(config.rates), "y": errors[k].mean(0).tolist(), "low": errors[k].amin(0).tolist(),
               "high": errors[k].amax(0).tolist()} for k in KINDS]  # fmt: skip
    data = {"series": series, "x": "learning rate", "y": "relative error", "log": "xy"}
    return Part(tuple(checks), (Figure("four measures of one irreversibility", data, curves, "Each falls in proportion to the rate."),))


def _metric(objective: Objective, seed: int) -> dict[str, Tensor]:
    draws = Ensemble((seed + 500,))
    return {n: draws.uniform(*p.shape)[0] + 0.5 for n, p in objective.params.items()}


def _value(run: Irreversibility) -> float:
    return float("nan") if run.production is None else float(run.production)


def _pairwise(run: Irreversibility) -> float:
    forces = torch.stack([*run.forces.values(), run.reference])
    unit = forces / forces.norm(dim=1, keepdim=True)
    return float((unit @ unit.T).min())


# ------------------------------------------------------------------------------------------------ momentum and Adam


@dataclass(frozen=True)
class RulesConfig:
    """Iterates after a burn-in of 12 / (1 - mu) (momentum) or 200 (adaptive) full-batch steps, against the plain and the corrected flow
    over a time T; (mu, eta, least gain) and (beta1, beta2, eta, least gain); eps 1e-2 inside the root. The error is the root mean square
    distance at eight times; the gain is its ratio, demanded of every seed. ``early``: the rate at which the dossier asks a gain of 5 of
    Adam. Seed 0 has 4.2 there (eleven of twelve networks pass: 5.5 to 19): the expansion is of first order in eta, and its next term is not
    small yet. At half the rate every one of the twelve has 11 or more."""

    momentum: tuple[tuple[float, float, float], ...] = ((0.5, 0.005, 8.0), (0.9, 0.001, 3.0))
    adaptive: tuple[tuple[float, float, float, float], ...] = ((0.0, 0.9, 5e-4, 5.0), (0.9, 0.95, 2.5e-4, 5.0))
    early: tuple[float, float, float, float] | None = (0.9, 0.95, 5e-4, 5.0)
    long: float = 2.0
    short: float = 0.5
    eps: float = 1e-2
    seeds: tuple[int, ...] = (0, 1, 2)


def rules(config: RulesConfig) -> Part:
    """E2, R8, R9: the flow corrected by the rule's own irreversibility follows it several times better than the plain flow."""
    checks: list[Check] = []
    for mu, eta, gain in config.momentum:
        seen = torch.tensor([_momentum_gain(seed, mu, eta, config.long, round(12 / (1 - mu))) for seed in config.seeds], dtype=_F64)
        checks.append(holds(f"heavy ball, mu {mu}, eta {eta}: error of the plain flow over the corrected", seen,
                            at_least=gain, source=f"{SLUG} E2, R8", spread=seen))  # fmt: skip
        if mu == config.momentum[0][0]:
            rest = torch.tensor([_momentum_gain(seed, mu, eta, config.long, 0) for seed in config.seeds], dtype=_F64)
            checks.append(control(f"from rest, without burn-in, mu {mu}: the gain over that after it", _typical(rest / seen), at_most=0.5,
                                  source=f"{SLUG} R8", spread=rest))  # fmt: skip
    for b1, b2, eta, gain in config.adaptive:
        name = "RMSprop" if b1 == 0 else "Adam"
        seen = torch.tensor([_adaptive_gain(seed, b1, b2, eta, config) for seed in config.seeds], dtype=_F64)
        checks.append(holds(f"{name}, beta1 {b1}, beta2 {b2}, eta {eta}: error of the plain flow over the corrected", seen,
                            at_least=gain, source=f"{SLUG} E2, R9", spread=seen))  # fmt: skip
    if config.early is not None:
        b1, b2, eta, gain = config.early
        seen = torch.tensor([_adaptive_gain(seed, b1, b2, eta, config) for seed in config.seeds], dtype=_F64)
        checks.append(refuted(f"Adam, beta1 {b1}, beta2 {b2}, at twice that rate: the same gain for every seed", seen, at_least=gain,
                              source=f"{SLUG} E2, R9", spread=seen))  # fmt: skip
    refused = [momentum_condition(0.02, 0.9, 1.0).status, momentum_condition(0.001, 0.9, 1.0).status]
    checks.append(control("mu .9, curvature 1: the expansion is refused at eta .02, not at .001",
                          [float(refused[0] == "not_converged"), float(refused[1] == "ok")], at_least=1.0,
                          source=f"{SLUG} R8"))  # fmt: skip
    return Part(tuple(checks))


def full_batch_gradient(X: Tensor, Y: Tensor) -> Field:
    """The gradient of `tanh_net`'s loss on X (n, 3), Y (n, 1) in closed form, many times faster than by automatic differentiation."""

    def gradient(theta: Tensor) -> Tensor:
        W, b, u, c = theta[:12].reshape(4, 3), theta[12:16], theta[16:20], theta[20:]
        h = torch.tanh(X @ W.T + b)
        r = 2 / len(X) * (h @ u + c - Y[:, 0])
        back = r[:, None] * u * (1 - h.square())
        return torch.cat([(back.T @ X).reshape(-1), back.sum(0), h.T @ r, r.sum()[None]])

    return gradient


def _apart(field: Field, iterates: Tensor, times: Tensor) -> float:
    """Root-mean-square distance of the flow of ``field`` from the iterates at equal times, the first of them its start."""
    found = follow(lambda t, x: {"x": field(x["x"])}, {"x": iterates[0]}, times, rtol=1e-9)
    return float((found.theta["x"] - iterates)[1:].square().sum(1).mean().sqrt())


def _typical(gains: Tensor) -> Tensor:
    """Geometric mean."""
    return gains.log().mean().exp()


def _momentum_gain(seed: int, mu: float, eta: float, time: float, burn: int, points: int = 8) -> float:
    """Error of the plain flow over that of the corrected one, from the iterate and velocity that ``burn`` steps reach."""
    objective, _, whole = tanh_net(seed)
    gradient = full_batch_gradient(*whole)
    x, v = heavy_ball(gradient, gradient_of(objective, whole)[1], eta, mu, burn)
    rows, every = [x], round(time / eta / points)
    for _ in range(points):
        x, v = heavy_ball(gradient, x, eta, mu, every, v)
        rows.append(x)
    times = eta * every * torch.arange(points + 1, dtype=_F64)
    errors = [_apart(momentum_field(gradient, eta, mu, correct), torch.stack(rows), times) for correct in (False, True)]
    return errors[0] / errors[1]


def _adaptive_gain(seed: int, b1: float, b2: float, eta: float, config: RulesConfig, points: int = 8) -> float:
    objective, _, whole = tanh_net(seed)
    gradient = full_batch_gradient(*whole)
    x, state = adam(gradient, gradient_of(objective, whole)[1], eta, b1, b2, config.eps, 200)
    rows, every = [x], round(config.short / eta / points)
    for _ in range(points):
        x, state = adam(gradient, x, eta, b1, b2, config.eps, every, state)
        rows.append(x)
    times = eta * every * torch.arange(points + 1, dtype=_F64)
    errors = [_apart(adaptive_field(gradient, eta, b1, b2, config.eps, correct), torch.stack(rows), times) for correct in (False, True)]
    return errors[0] / errors[1]


# ------------------------------------------------------------------------------------------------ controls, currents


@dataclass(frozen=True)
class ControlsConfig:
    """A rotated quadratic; leapfrog without friction, 50 steps of .01; reversal with another batch; a rotating linear field."""

    dim: int = 6
    rates: tuple[float, ...] = (0.0125, 0.00625)
    steps: int = 50
    step: float = 0.01
    seeds: tuple[int, ...] = (0, 1, 2)


def controls(config: ControlsConfig) -> Part:
    """E3, R3, R7: what must be reversible is, what must not agree does not."""
    rows: dict[str, list[float]] = {k: [] for k in ("rotated", "leapfrog", "ta", "descent", "wrong", "limit", "single", "still", "current",
                                                    "vector", "potential")}  # fmt: skip
    for seed in config.seeds:
        draws = Ensemble((seed,))
        rows["rotated"].append(_rotated(draws, config.dim))
        leap, back = _leapfrog(config.step)
        state = draws.normal(2 * config.dim)[0]
        rows["leapfrog"].append(float(retrace_rule(leap, back, state, [None] * config.steps)))
        rows["ta"].append(float(reversal(leap, back, state, None, config.step).norm()))
        objective, found, _ = tanh_net(seed)
        gradient, start = gradient_of(objective, found[0])
        down: Callable[[Tensor, Any], Tensor] = lambda x, b, g=gradient: x - config.step * g(x)  # type: ignore[misc] # noqa: E731
        up: Callable[[Tensor, Any], Tensor] = lambda x, b, g=gradient: x + config.step * g(x)  # type: ignore[misc] # noqa: E731
        rows["descent"].append(float(retrace_rule(down, up, start, [None] * config.steps)))
        wrong = [_other_batch(seed, eta) for eta in config.rates]
        right = irreversibility(objective, found, config.rates[-1], kinds=("TA",)).error("TA")
        rows["wrong"].append(wrong[-1][0] / right)
        rows["limit"].append(wrong[1][0] / wrong[0][0])
        rows["single"].append(wrong[0][1])
        rows["still"].append(float(circulation(lambda x, g=gradient: -g(x), start)))  # type: ignore[misc]
        for name, value in _currents(draws, config.dim).items():
            rows[name].append(value)
    seen = {k: torch.tensor(v, dtype=_F64) for k, v in rows.items()}
    checks = (
        match("quadratic loss with theta rotated: change of the potential, relative", 0.0, seen["rotated"], 1e-12, source=f"{SLUG} E3"),
        match(f"leapfrog, {config.steps} steps forward and back: distance", 0.0, seen["leapfrog"], 1e-12, source=f"{SLUG} E3"),
        match("leapfrog: force of time reversal", 0.0, seen["ta"], 1e-12, source=f"{SLUG} E3"),
        control("descent, as many steps: distance from the start", seen["descent"], at_least=1e-4, source=f"{SLUG} E3"),
        control("reversal with another batch: error of the mean force over that with the same batch, at the smaller rate", seen["wrong"],
                at_least=5.0, source=f"{SLUG} E3", spread=seen["wrong"]),
        match("reversal with another batch: the error over that at twice the rate, no convergence", 1.0, seen["limit"], 0.25,
              source=f"{SLUG} E3", spread=seen["limit"]),
        control("one pair of different batches: size of its force over the true one", seen["single"], at_least=10.0, source=f"{SLUG} E3",
                spread=seen["single"]),
        match("gradient field: circulation", 0.0, seen["still"], 1e-12, source=f"{SLUG} R7"),
        holds("field with an antisymmetric part: circulation", seen["current"], at_least=0.1, source=f"{SLUG} R7", spread=seen["current"]),
        match("the same: defect of a step, by flow and by reversal, against -(eta/2) Df f, relative", 0.0, seen["vector"], 1e-2,
              source=f"{SLUG} R7"),
        control("the same: that vector against -grad |f|^2 eta / 4, the force of entropy production: relative difference",
                seen["potential"], at_least=0.1, source=f"{SLUG} R7", spread=seen["potential"]),
    )  # fmt: skip
    return Part(checks)


def _rotated(draws: Ensemble, n: int) -> float:
    """Relative change of (eta/4)|g|^2 when a quadratic and its argument are rotated together."""
    A, theta, Q = draws.normal(n, n)[0], draws.normal(n)[0], torch.linalg.qr(draws.normal(n, n)[0]).Q
    H = A @ A.T
    before, after = (H @ theta).square().sum(), ((Q @ H @ Q.T) @ (Q @ theta)).square().sum()
    return float((after - before).abs() / before)


def _leapfrog(step: float) -> tuple[Callable[[Tensor, Any], Tensor], Callable[[Tensor, Any], Tensor]]:
    """Half kick, drift, half kick of q, p under the force -q - q^3, and its inverse."""

    def move(h: float) -> Callable[[Tensor, Any], Tensor]:
        def run(state: Tensor, batch: Any) -> Tensor:
            q, p = state.chunk(2)
            p = p - h / 2 * (q + q**3)
            q = q + h * p
            return torch.cat([q, p - h / 2 * (q + q**3)])

        return run

    return move(step), move(-step)


def _other_batch(seed: int, eta: float) -> tuple[float, float]:
    """Relative error of the mean reversal force when each batch is undone with the next; size of one pair's force over the reference."""
    objective, found, _ = tanh_net(seed)
    reference = irreversibility(objective, found, eta, kinds=("TA",)).reference
    total, one = torch.zeros_like(reference), 0.0
    for a, b in zip(found, found[1:] + found[:1], strict=True):
        (forth, start), (back, _) = gradient_of(objective, a), gradient_of(objective, b)
        force = reversal(lambda x, _, f=forth: x - eta * f(x), lambda x, _, f=back: x + eta * f(x), start, None, eta)  # type: ignore[misc]
        total, one = total + force, max(one, float(force.norm() / reference.norm()))
    return float((total / len(found) - reference).norm() / reference.norm()), one


def _currents(draws: Ensemble, n: int, eta: float = 1e-3) -> dict[str, float]:
    """f = -A theta - theta^3 with a strongly antisymmetric A."""
    S, K = draws.normal(n, n)[0], draws.normal(n, n)[0]
    A, start = S @ S.T / n + (K - K.T), draws.normal(n)[0]

    def field(x: Tensor) -> Tensor:
        return -(A @ x) - x**3

    one = start + eta * field(start)
    by_flow = (one - flow(field, start, eta)) / eta
    by_reversal = reversal(lambda x, _: x + eta * field(x), lambda x, _: x - eta * field(x), start, None, eta)
    jacobian = torch.func.jacrev(field)(start)
    f = field(start)
    vector, gradient = -eta / 2 * jacobian @ f, -eta / 2 * jacobian.T @ f
    gap = max(float((v - vector).norm() / vector.norm()) for v in (by_flow, by_reversal))
    return {
        "current": float(circulation(field, start)), "vector": gap, "potential": float((vector - gradient).norm() / vector.norm()),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ symmetry and path preference


@dataclass(frozen=True)
class PathConfig:
    """Deep linear regression, dx = dy = 3, one hidden layer of 4, label noise diag(1, .1, .02) of trace 3, from the flattest minimum;
    E|g|^2 at equal times. Entropy production of a tanh network held almost still: ``still`` batches of 4 at a rate of 1e-7."""

    eta: float = 0.005
    steps: int = 400_000
    points: int = 20
    replicas: int = 100
    still: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)


def path(config: PathConfig) -> Part:
    """R4, R10, R11: isometries feel no force; along the valley of minima training goes to the least entropy production."""
    times = (*range(0, config.steps, config.steps // config.points), config.steps - 1)
    phi, ends, kept, moved, z, costs, spread = [], [], [], [], [], [], []
    for seed in config.seeds:
        draws = Ensemble((seed,))
        V = torch.diag(torch.tensor([1.0, 0.8, 0.6], dtype=_F64)) @ torch.linalg.qr(draws.normal(3, 3)[0]).Q
        noise = torch.diag(torch.tensor([1.0, 0.1, 0.02], dtype=_F64)) * 3 / 1.12
        model = LinearRegressionNetwork(V, torch.diag(torch.tensor([1.0, 0.7, 0.5], dtype=_F64)), noise, (4,), lr=config.eta)
        start = model.chain.flattest().weights((4,))
        run = run_sgd([model], [start], steps=config.steps, replicas=config.replicas, seed=seed, path=times)
        assert run.path is not None
        values = cast(Tensor, run.path.value)[0, :, 1]
        phi.append(config.eta / 4 * values)
        ends.append(values[len(values) // 2 :].mean() / model.chain.fluctuation())
        isometry, other = _orbit_forces(seed)
        kept.append(isometry)
        moved.append(other)
        score, cost, error = _production(seed, config.still)
        z.append(score)
        costs.append(cost)
        spread.append(error)
    potential = torch.stack(phi)
    third = len(times) // 3
    falls = torch.stack([potential[:, :third].mean(1), potential[:, third : 2 * third].mean(1), potential[:, 2 * third :].mean(1)], 1)
    checks = (
        match("rotation of the hidden layer of a linear network: change of the potential, relative", 0.0, kept, 1e-12,
              source=f"{SLUG} R10", spread=kept),
        control("rescaling of the hidden layer: slope of the potential, relative", moved, at_least=1e-2, source=f"{SLUG} R10",
                spread=moved),
        holds("SGD along the valley: potential late over that at the start", potential[:, -1] / potential[:, 0], at_most=0.95,
              source=f"{SLUG} R11", spread=potential[:, -1] / potential[:, 0]),
        holds("the same: smallest fall of its mean from one third of the run to the next", (falls[:, 0] - falls[:, 1]) / falls[:, 0],
              at_least=0.0, source=f"{SLUG} R11", spread=(falls[:, 0] - falls[:, 1]) / falls[:, 0]),
        match("E|g|^2 in the second half over its least value on the valley: the point of least production is the noise equilibrium", 1.0,
              torch.stack(ends), 0.06, source=f"{SLUG} R11", spread=torch.stack(ends)),
        match("entropy production counted at training over that predicted from per-sample gradients: z", 0.0, z, 4.0, source=f"{SLUG} R4",
              spread=z),
        match("its cost int phi dt over steps x eta x potential", 1.0, costs, 4 * max(spread), source=f"{SLUG} R11",
              spread=costs),
    )  # fmt: skip
    series = [{"name": f"seed {s}", "x": list(times), "y": (p / p[0]).tolist()} for s, p in zip(config.seeds, potential, strict=True)]
    data = {"series": series, "x": "step", "y": "potential over its start"}
    return Part(
        checks, (Figure("training goes down its own irreversibility", data, curves, "At the same loss, along the valley of minima."),)
    )


def _orbit_forces(seed: int) -> tuple[float, float]:
    """Linear network 3-4-2: relative change of E|g_B|^2 under a rotation of the hidden layer, and its slope under W1 -> e^lam W1."""
    draws = Ensemble((seed + 70,))
    X, Y, W, U = draws.normal(16, 3)[0], draws.normal(16, 2)[0], draws.normal(4, 3)[0], draws.normal(2, 4)[0]
    Q = torch.linalg.qr(draws.normal(4, 4)[0]).Q

    def potential(W: Tensor, U: Tensor) -> Tensor:
        def one(w: Tensor, u: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return (u @ w @ x - y).square().sum()

        gs = torch.func.vmap(torch.func.grad(one, (0, 1)), (None, None, 0, 0))(W, U, X, Y)
        return torch.stack([g.square().flatten(1).sum(1) for g in gs]).sum(0).mean()

    base = potential(W, U)
    h = 1e-5
    slope = (potential(W * math.exp(h), U * math.exp(-h)) - potential(W * math.exp(-h), U * math.exp(h))) / (2 * h)
    return float((potential(Q @ W, U @ Q.T) - base).abs() / base), float(slope.abs() / base)


def _production(seed: int, steps: int) -> tuple[float, float, float]:
    """z of the counted entropy production against 4 S steps from per-sample moments; cost over its prediction, and its relative error."""
    objective, _, (X, Y) = tanh_net(seed)
    model = objective.model
    eta, g = 1e-7, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), eta)
    S = effective_loss(model, mse, (X, Y), optimizer, batch_size=4)
    potential = S.mean + float(S.noise)
    values = []
    with EntropyProduction(optimizer) as meter:
        for _ in range(steps):
            index = torch.randint(16, (4,), generator=g)
            optimizer.zero_grad()
            mse(model(X[index]), Y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            values.append(meter.last)
    seen = torch.tensor(values, dtype=_F64)
    error = float(seen.std() / steps**0.5)
    return (float(seen.mean()) - 4 * potential) / error, float(meter.cost) / (steps * eta * potential), error / (4 * potential)


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    measures: MeasuresConfig | None = MeasuresConfig()
    rules: RulesConfig | None = RulesConfig()
    controls: ControlsConfig | None = ControlsConfig()
    path: PathConfig | None = PathConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Thermodynamic Irreversibility of Training Algorithms",
    paper="Liu Ziyin, Yuanjie Ren, Adam Levine, Isaac Chuang, arXiv 2605.21933",
    claims=(
        "Backward error, refined time, time reversal and entropy production give one potential of a training rule, to leading order.",
        "Its correction to the continuous flow is what momentum and Adam need to be followed several times better.",
        "The force keeps isometries and breaks every other symmetry; along a valley of minima training goes to the least production.",
        "A reversible rule has none; a rule that follows no gradient has a current that no potential explains.",
    ),
    presets={
        "smoke": Config(
            measures=MeasuresConfig(rates=(0.05, 0.025, 0.0125), draws=20),
            rules=RulesConfig(momentum=((0.5, 0.005, 8.0),), adaptive=(), early=None),
            path=PathConfig(steps=200_000, still=500),
        ),
        "default": Config(),
        "full": Config(
            measures=MeasuresConfig(seeds=tuple(range(9)), draws=400),
            rules=RulesConfig(seeds=tuple(range(9))),
            controls=ControlsConfig(seeds=tuple(range(9))),
            path=PathConfig(steps=2_000_000, points=40, still=20_000),
        ),
    },
    experiments={"measures": measures, "rules": rules, "controls": controls, "path": path},
)
