"""Noether's Learning Dynamics: the role of symmetry breaking in neural networks.

Slug noether-learning-dynamics. A learning rule has a kinetic energy and the loss is its potential. A symmetry of the loss that the
kinetic energy does not share makes the Noether charge move in a definite way. For normalised weights the moving norm turns plain
descent into an adaptive method: RMSProp with weight decay, AdaGrad without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, slope
from parasym.gallery.noise_equilibrium import scale_invariant_data, scale_invariant_gradient
from parasym.laws.flow import NormFlow

SLUG = "noether-learning-dynamics"


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Run:
    """SGD with momentum b and decay k on f(q) = mean softplus(-3 y x.q / |q|); ``batch`` 0 is the full batch; |q| = ``start`` and v = 0
    at first.

    n samples x ~ N(0, 1)^d, y = sign(x.w + xi / 2), drawn from each seed; ``normalised`` False drops the division by |q|.
    """

    momentum: float = 0.0
    decay: float = 0.0
    batch: int = 0
    steps: int = 4000
    start: float = 1.0
    eta: float = 0.02
    samples: int = 200
    dim: int = 10
    normalised: bool = True


@dataclass(frozen=True)
class Path:
    """What a run recorded, for each seed: |q|^2 (T + 1, s), |grad f| at unit q (T, s) squared, turning angle of each step (T, s)."""

    squares: Tensor
    gradient: Tensor
    angle: Tensor
    curvature: Tensor


def _gradient(run: Run, q: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if run.normalised:
        return scale_invariant_gradient(q, x, y)
    slope_of = -3 * y * torch.sigmoid(-3 * y * (x @ q[..., None])[..., 0])
    return (slope_of[..., None] * x).mean(-2)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return torch.stack([v[i] for v, i in zip(values, index, strict=True)])


def simulate(run: Run, seeds: tuple[int, ...]) -> Path:
    """Run all seeds at once."""
    draws = Ensemble(seeds)
    x, y = scale_invariant_data(draws, run.samples, run.dim)
    q = run.start * torch.nn.functional.normalize(draws.normal(run.dim), dim=-1)
    top = torch.stack([_top_curvature(run, qi, xi, yi) for qi, xi, yi in zip(q / run.start, x, y, strict=True)])
    v = torch.zeros_like(q)
    squares, gradient, angle = [q.square().sum(-1)], [], []
    for k in range(run.steps):
        if run.batch:
            if k % 500 == 0:
                picks = draws.integers(run.samples, 500, run.batch)
            index = picks[:, k % 500]
            bx, by = _pick(x, index), _pick(y, index)
        else:
            bx, by = x, y
        g = _gradient(run, q, bx, by)
        gradient.append(g.square().sum(-1) * squares[-1])  # |grad f(q)| = |grad f(unit q)| / |q|
        v = run.momentum * v + g + run.decay * q
        new = q - run.eta * v
        cosine = (new * q).sum(-1) / (new.norm(dim=-1) * q.norm(dim=-1))
        angle.append(cosine.clamp(-1, 1).arccos())
        q = new
        squares.append(q.square().sum(-1))
    return Path(torch.stack(squares), torch.stack(gradient), torch.stack(angle), top)


def _top_curvature(run: Run, q: Tensor, x: Tensor, y: Tensor) -> Tensor:
    def f(p: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-3 * y * (x @ (p / p.norm() if run.normalised else p))).mean()

    return torch.linalg.eigvalsh(torch.func.hessian(f)(q)).max()


def predicted(run: Run, path: Path) -> Tensor:
    """|q|^4 by the closed form (R4), (T + 1, s)."""
    flow = NormFlow(run.eta, run.momentum, run.decay, noise=bool(run.batch))
    starts = path.squares[0].square()
    return torch.stack([flow.predict(float(a), g) for a, g in zip(starts, path.gradient.T, strict=True)], -1)


# ------------------------------------------------------------------------------------------------ E1: the norm


@dataclass(frozen=True)
class NormConfig:
    """The three runs of E1, and the one that leaves the regime."""

    plain: Run = Run()
    decayed: Run = Run(decay=0.01, batch=8, steps=12_000)
    momentum: Run = Run(momentum=0.9, start=5.0)
    outside: Run = Run(momentum=0.9)
    seeds: tuple[int, ...] = (0, 1, 2)


def norm(config: NormConfig) -> Part:
    """E1, R4, R8, R9: |q|^4 follows the integral of the squared gradient; outside its regime the tool says so."""
    checks: list[Check] = []
    plain, decayed = simulate(config.plain, config.seeds), simulate(config.decayed, config.seeds)
    for name, run, path, tol in (("no momentum, no decay, full batch", config.plain, plain, 1e-3),
                                 ("no momentum, decay .01, batch 8", config.decayed, decayed, 2e-3)):  # fmt: skip
        error = (predicted(run, path) / path.squares.square() - 1).abs().amax(0)
        checks.append(
            match(f"{name}: |q|^4 at every step, largest relative error", 0.0, error, tol, source=f"{SLUG} E1, R4, R8", spread=error)
        )
    heavy = simulate(config.momentum, config.seeds)
    theory, seen = predicted(config.momentum, heavy), heavy.squares.square()
    growth = (theory[-1] - theory[0]) / (seen[-1] - seen[0])
    flow = NormFlow(config.momentum.eta, config.momentum.momentum)
    inside = [flow.overdamped(float(h), config.momentum.start**2) for h in heavy.curvature]
    lost = simulate(config.outside, config.seeds)
    off = (predicted(config.outside, lost)[-1] / lost.squares[-1].square() - 1).abs()
    warned = [not flow.overdamped(float(h), config.outside.start**2) for h in lost.curvature]
    identity = _identity(plain, config.plain.eta)
    bound = plain.squares[1:] - 2 * config.plain.eta * plain.gradient.sqrt()
    checks += [
        match("momentum .9, |q| = 5, full batch: |q|^4 at the end, relative error", 0.0, (theory[-1] / seen[-1] - 1).abs(), 0.02,
              source=f"{SLUG} E1, R4", spread=theory[-1] / seen[-1] - 1),
        match("the same: growth of |q|^4 over the run, predicted over measured", 1.0, growth, 0.06, source=f"{SLUG} E1, R4", spread=growth),
        holds("the same: the tool calls it over-damped (1 = yes)", [float(i) for i in inside], at_least=1.0, source=f"{SLUG} E1"),
        control("momentum .9, |q| = 1: relative error of |q|^4 at the end", off, at_least=0.05, source=f"{SLUG} E1", spread=off),
        control("the same: the tool warns (1 = yes)", [float(w) for w in warned], at_least=1.0, source=f"{SLUG} E1"),
        match("one step: |q'|^2 = |q|^2 + eta^2 |g(unit q)|^2 / |q|^2, largest relative error", 0.0, identity, 1e-12, source=f"{SLUG} R9"),
        holds("after one step |q'|^2 is at least 2 eta |g(unit q)|: smallest margin", bound.amin(0), at_least=0.0, source=f"{SLUG} R9"),
    ]  # fmt: skip
    step = torch.stack([NormFlow(config.plain.eta).effective_rate(1.0) * g.sqrt() for g in plain.gradient]) / plain.squares[:-1]
    turn = (plain.angle[:50] / torch.arctan(step[:50]) - 1).abs().amax(0)  # later the angle of a step drowns in the rounding of arccos
    claim = "angle of a step = arctan(eta_eff |g(unit q)|), eta_eff = eta / |q|^2, largest relative error"
    checks.append(match(claim, 0.0, turn, 1e-3, source=f"{SLUG} R5", spread=turn))
    every = max(1, config.decayed.steps // 200)
    x = list(range(0, config.decayed.steps + 1, every))
    theory = predicted(config.decayed, decayed)
    series = [{"name": "measured", "x": x, "y": decayed.squares[::every, 0].square().tolist()},
              {"name": "closed form", "x": x, "y": theory[::every, 0].tolist(), "mark": "dash"}]  # fmt: skip
    figure = Figure(
        "|q|^4 of a normalised weight", {"series": series, "x": "step", "y": "|q|^4"}, curves, "Decay .01, batch 8, first seed."
    )
    return Part(tuple(checks), (figure,))


def _identity(path: Path, eta: float) -> Tensor:
    after = path.squares[:-1] + eta**2 * path.gradient / path.squares[:-1]
    return (after / path.squares[1:] - 1).abs().amax(0)


# ------------------------------------------------------------------------------------------------ E2: the stationary state


@dataclass(frozen=True)
class StationaryConfig:
    """Decay .01, batch 8: averages over the second half of the run."""

    plain: Run = Run(decay=0.01, batch=8, steps=12_000)
    heavy: Run = Run(decay=0.01, batch=8, steps=12_000, momentum=0.9)
    free: Run = Run(decay=0.01, batch=8, steps=6000, normalised=False)
    falling: Run = Run(decay=0.01, momentum=0.9, steps=12_000)
    seeds: tuple[int, ...] = (0, 1, 2)


def stationary(config: StationaryConfig) -> Part:
    """E2, R5, R7: angle per step and norm in the stationary state; without the normalisation, or full-batch, there is none of the kind."""
    checks: list[Check] = []
    for run, tol in ((config.plain, 0.02), (config.heavy, 0.09)):
        path = simulate(run, config.seeds)
        half = run.steps // 2
        flow = NormFlow(run.eta, run.momentum, run.decay, noise=True)
        angle = path.angle[half:].square().mean(0).sqrt()
        quartic = path.squares[half:].square().mean(0)
        theory = torch.tensor([flow.stationary(float(g)) for g in path.gradient[half:].mean(0)], dtype=torch.float64)
        checks += [
            match(f"momentum {run.momentum}: angle per step, root mean square", flow.angular_update(), angle, 0.02, relative=True,
                  source=f"{SLUG} E2, R7", spread=angle),
            match(f"momentum {run.momentum}: stationary |q|^4 over eta E|g|^2 / (2 k f)", 1.0, quartic / theory, tol,
                source=f"{SLUG} E2, R7",
                  spread=quartic / theory),
        ]  # fmt: skip
    free = simulate(config.free, config.seeds)
    half = config.free.steps // 2
    flow = NormFlow(config.free.eta, 0.0, config.free.decay, noise=True)
    theory = torch.tensor([flow.stationary(float(g)) for g in free.gradient[half:].mean(0)], dtype=torch.float64)
    gap = (free.squares[half:].square().mean(0) / theory - 1).abs()
    fell = simulate(config.falling, config.seeds)
    falling = NormFlow(config.falling.eta, config.falling.momentum, config.falling.decay)
    warned = [float(not falling.overdamped(float(h), float(s))) for h, s in zip(fell.curvature, fell.squares[-1], strict=True)]
    checks += [
        control(
            "without the normalisation: relative error of the stationary |q|^4", gap, at_least=0.2, source=f"{SLUG} control", spread=gap
        ),
        control(
            "full batch with momentum and decay: |q| falls until the tool warns (1 = yes)", warned, at_least=1.0, source=f"{SLUG} control"
        ),
    ]
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ E3: implicit RMSProp


@dataclass(frozen=True)
class AdaptiveConfig:
    """SGD with decay from ``warm`` steps on beside RMSProp on the sphere with one accumulator, same batches, for ``steps`` steps."""

    run: Run = Run(decay=0.01, batch=8)
    warm: int = 4000
    steps: int = 6000
    seeds: tuple[int, ...] = (0, 1, 2)


def adaptive(config: AdaptiveConfig) -> Part:
    """E3, R6: the direction under SGD with decay is that of RMSProp with decay rate and base rate given by the flow."""
    run, draws = config.run, Ensemble(config.seeds)
    x, y = scale_invariant_data(draws, run.samples, run.dim)
    q = torch.nn.functional.normalize(draws.normal(run.dim), dim=-1)
    flow = NormFlow(run.eta, 0.0, run.decay, noise=True)
    rho, base = flow.rmsprop()
    p, G, wrong = q, q.new_zeros(q.shape[0]), q
    worst, off = torch.ones(q.shape[0], dtype=torch.float64), torch.ones(q.shape[0], dtype=torch.float64)
    for k in range(config.warm + config.steps):
        index = draws.integers(run.samples, run.batch)
        bx, by = _pick(x, index), _pick(y, index)
        if k == config.warm:
            p = wrong = torch.nn.functional.normalize(q, dim=-1)
            G = 2 * run.decay / run.eta * q.square().sum(-1).square()
        if k >= config.warm:
            g = scale_invariant_gradient(p, bx, by)
            p = torch.nn.functional.normalize(p - (base / G.sqrt())[:, None] * g, dim=-1)
            G = rho * G + (1 - rho) * g.square().sum(-1)
            wrong = torch.nn.functional.normalize(wrong - run.eta * scale_invariant_gradient(wrong, bx, by), dim=-1)
        q = q - run.eta * (scale_invariant_gradient(q, bx, by) + run.decay * q)
        if k >= config.warm:
            unit = torch.nn.functional.normalize(q, dim=-1)
            worst = torch.minimum(worst, (unit * p).sum(-1))
            off = torch.minimum(off, (unit * wrong).sum(-1))
    return Part(
        (
            holds("cosine between SGD with decay and RMSProp on the sphere, smallest over the run", worst, at_least=0.999,
                source=f"{SLUG} E3, R6",
                  spread=worst),
            control("1 - cosine for descent on the sphere at the bare rate, over that of RMSProp", (1 - off) / (1 - worst).clamp_min(1e-12),
                    at_least=1e3, source=f"{SLUG} E3", spread=off),
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ R1-R3: the Lagrangian


@dataclass(frozen=True)
class LagrangianConfig:
    """Heavy-ball on f = |q|^4 / 4 + q_1^2 / 2 against m q'' + f q' + grad + k q = 0; charges kept and broken by each rule on random
    losses."""

    rates: tuple[float, ...] = (0.008, 0.004, 0.002)
    momentum: float = 0.6
    decay: float = 0.1
    time: float = 1.0
    steps: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)


def lagrangian(config: LagrangianConfig) -> Part:
    """R1-R3: the equation of motion, and which rule shares which symmetry of the loss."""
    order = torch.stack([_order(config, seed) for seed in config.seeds])
    kept = {key: torch.stack([_kept(config, seed)[key] for seed in config.seeds]) for key in _kept(config, config.seeds[0])}
    return Part(
        (
            match("order in eta of heavy-ball against m q'' + f q' + grad f + k q = 0", 2.0, order, 0.3, source=f"{SLUG} R1", spread=order),
            match("descent, translation: a.q kept, largest change", 0.0, kept["translation"], 1e-12, source=f"{SLUG} R3"),
            match("heavy-ball, rotation: q^T A v = mu^n of the start, largest difference", 0.0, kept["rotation"], 1e-12,
                source=f"{SLUG} R2, R3"),
            match("mirror descent, translation: a.grad h(q) kept, largest change", 0.0, kept["mirror"], 1e-12, source=f"{SLUG} R3"),
            control("mirror descent, translation: a.q is not kept, change", kept["mirror_plain"], at_least=1e-3, source=f"{SLUG} R3"),
            control("Adam, rotation: q^T A v leaves mu^n of the start", kept["adam"], at_least=1e-3, source=f"{SLUG} R3"),
            control("descent, scale: |q|^2 is not kept, change", kept["scale"], at_least=1e-3, source=f"{SLUG} R3"),
        )
    )  # fmt: skip


def _order(config: LagrangianConfig, seed: int) -> Tensor:
    """Slope of log error over log eta at a fixed time, after a common start from rest."""
    q0 = 0.7 * Ensemble((seed,)).normal(3)[0]
    mu, k = config.momentum, config.decay

    def force(q: Tensor) -> Tensor:
        return -(q * q.square().sum() + torch.tensor([1.0, 0, 0], dtype=torch.float64) * q) - k * q

    errors = []
    for eta in config.rates:
        n, m, f = round(config.time / eta), eta * (1 + mu) / 2, 1 - mu
        q, v = q0.clone(), -force(q0) / f  # on the slow manifold: the start-up from rest is a boundary layer of its own
        for _ in range(n):
            v = mu * v - force(q)
            q = q - eta * v
        x, speed, h = q0.clone(), force(q0) / f, eta / 6

        def rates(x: Tensor, s: Tensor, m: float = m, f: float = f) -> tuple[Tensor, Tensor]:
            return s, (force(x) - f * s) / m

        for _ in range(6 * n):
            a1, b1 = rates(x, speed)
            a2, b2 = rates(x + h / 2 * a1, speed + h / 2 * b1)
            a3, b3 = rates(x + h / 2 * a2, speed + h / 2 * b2)
            a4, b4 = rates(x + h * a3, speed + h * b3)
            x, speed = x + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4), speed + h / 6 * (b1 + 2 * b2 + 2 * b3 + b4)
        errors.append((q - x).norm())
    return slope(torch.tensor(config.rates, dtype=torch.float64).log(), torch.stack(errors).log())


def _kept(config: LagrangianConfig, seed: int) -> dict[str, Tensor]:
    """Largest violation of each charge over a run."""
    draws = Ensemble((seed,))
    a, target = torch.ones(4, dtype=torch.float64), draws.normal(4)[0]
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    start = draws.normal(4)[0]

    def shift_free(q: Tensor) -> Tensor:  # gradient of |P (q - t)|^2 / 2 + sum of fourth powers of differences / 4: unchanged by q + c a
        d = q - q.mean()
        return (d - (target - target.mean())) + (d**3 - (d**3).mean())

    def round_free(q: Tensor) -> Tensor:  # gradient of a function of |q|^2
        return q * (q.square().sum() - 1)

    q, worst = start.clone(), torch.zeros(())
    for _ in range(config.steps):
        q = q - 0.05 * shift_free(q)
        worst = torch.maximum(worst, (a @ (q - start)).abs())
    out = {"translation": worst}
    p, v = start[:2].clone(), start[2:].clone()
    charge, worst = p @ turn @ v, torch.zeros(())
    adam, m, s = p.clone(), v.clone(), torch.zeros(2, dtype=torch.float64)
    slip = torch.zeros(())
    for n in range(1, config.steps + 1):
        v = 0.9 * v + round_free(p)
        p = p - 0.02 * v
        worst = torch.maximum(worst, (p @ turn @ v - 0.9**n * charge).abs())
        g = round_free(adam)
        m, s = 0.9 * m + g, 0.99 * s + 0.01 * g * g
        adam = adam - 0.02 * m / (s.sqrt() + 1e-3)
        slip = torch.maximum(slip, (adam @ turn @ m - 0.9**n * charge).abs())
    out |= {"rotation": worst, "adam": slip}
    q = (0.5 * start).exp()  # h = q log q - q on positive q: grad h = log q, the step is multiplicative
    first, plain_first, worst, free = a @ q.log(), a @ q, torch.zeros(()), torch.zeros(())
    for _ in range(config.steps):
        q = q * torch.exp(-0.01 * shift_free(q))
        worst, free = torch.maximum(worst, (a @ q.log() - first).abs()), torch.maximum(free, (a @ q - plain_first).abs())
    out |= {"mirror": worst, "mirror_plain": free}
    q = start[None] / start.norm()
    x, y = draws.normal(50, 4), draws.normal(50).sign()
    for _ in range(config.steps):
        q = q - 0.1 * scale_invariant_gradient(q, x, y)
    out["scale"] = (q.square().sum() - 1).abs()
    return out


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    norm: NormConfig | None = NormConfig()
    stationary: StationaryConfig | None = StationaryConfig()
    adaptive: AdaptiveConfig | None = AdaptiveConfig()
    lagrangian: LagrangianConfig | None = LagrangianConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Noether's Learning Dynamics: Role of Symmetry Breaking in Neural Networks",
    paper="Hidenori Tanaka, Daniel Kunin, NeurIPS 2021, arXiv 2105.02716",
    claims=(
        "Learning with momentum is motion with friction; a symmetry that the kinetic energy does not share moves its charge.",
        "The fourth power of a normalised weight's norm is a running sum of squared gradients.",
        "So descent with weight decay is RMSProp in the direction, with a stationary angle per step of sqrt(2 eta k / (1 + b)).",
        "Euclidean rules keep translations and rotations; mirror descent keeps a transformed charge; Adam keeps no rotation.",
    ),
    presets={
        "smoke": Config(
            norm=NormConfig(Run(steps=1000), Run(decay=0.01, batch=8, steps=2000), Run(momentum=0.9, start=5.0), Run(momentum=0.9)),
            stationary=None,
            adaptive=AdaptiveConfig(warm=1500, steps=1500),
            lagrangian=LagrangianConfig(seeds=(0, 1, 2), time=0.4),
        ),
        "default": Config(),
        "full": Config(
            norm=replace(NormConfig(), seeds=tuple(range(6))),
            stationary=StationaryConfig(seeds=tuple(range(6))),
            adaptive=AdaptiveConfig(seeds=tuple(range(6))),
        ),
    },
    experiments={"norm": norm, "stationary": stationary, "adaptive": adaptive, "lagrangian": lagrangian},
)
