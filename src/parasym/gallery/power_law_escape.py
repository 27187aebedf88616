"""Power-law escape rate of SGD: for the mean-square loss the noise is proportional to the loss, and escape is a power of its ratio.

Slug power-law-escape. Time t = eta k, T = eta h*/B. A random change of time turns the noise into additive noise on log L, so the
density is L^-phi and the escape rate a power of L(saddle)/L(min). The formulas are exact for the stochastic differential equation
and semi-quantitative for SGD itself; what SGD does instead is measured as such.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.drawings import curves
from parasym.simulate import SGD, Ensemble, FirstPassage, descent, diffusion, dot, regression, sqrt
from parasym.solvable import escape as theory
from parasym.solvable.contract import number
from parasym.solvable.regression import batch_covariance

SLUG = "power-law-escape"


# ------------------------------------------------------------------------------------------------ A1, A2, R1, R6-R9


@dataclass(frozen=True)
class FormulaConfig:
    """Escape formulas against exact quadrature."""

    wells: tuple[float, ...] = (1.0, 3.0, 10.0)
    temperatures: tuple[float, ...] = (0.05, 0.1)
    hot: float = 0.3
    dims: tuple[int, ...] = (1, 3)
    levels: tuple[float, float] = (50.0, 100.0)
    slope_temperature: float = 0.25
    seeds: tuple[int, ...] = (0,)


def formulas(config: FormulaConfig) -> Part:
    """A1, A2, R1, R6, R7, R8, R9."""
    ratios: list[float] = []
    hot: list[float] = []
    series = []
    for a in config.wells:
        for t in (*config.temperatures, config.hot):
            exact = number(theory.double_well_time(a, t))
            rate = number(theory.escape_rate(8 * a, -4 * a, 1.0, 1 + a, t, 8 * a))  # eta h*/B = t
            (hot if t == config.hot else ratios).append(rate * exact)
    slopes = {d: theory.radial_slope(d, *config.levels, config.slope_temperature) for d in (*config.dims, *(d + 2 for d in config.dims))}
    limits = [theory.limiting_slope(d, config.slope_temperature) for d in config.dims]
    levels = np.geomspace(2, 100, 12)
    arrhenius = []
    for d in config.dims:
        times = [number(theory.radial_time(d, float(c), config.slope_temperature)) for c in levels]
        arrhenius.append(_unexplained(levels - 1, np.log(times)) / _unexplained(np.log(levels), np.log(times)))
        series.append({"name": f"{d} dimensions", "x": levels.tolist(), "y": times})
    checks = [
        match("escape rate times exact mean passage time, a = 1, 3, 10, T = .05, .1", 1.0, ratios, 0.04, source=f"{SLUG} A1"),
        holds("at T = .3 the formula is off by more, and no more than", [abs(r - 1) for r in hot], at_most=0.08, source=f"{SLUG} R6"),
        match(
            "slope of log time over log level between 50 and 100, T = .25: 1/T + 1 - d/2",
            limits,
            [slopes[d] for d in config.dims],
            0.05,
            source=f"{SLUG} A2",
        ),
        match(
            "two dimensions more take one off the slope, half each",
            1.0,
            [slopes[d] - slopes[d + 2] for d in config.dims],
            0.1,  # two slopes of .05
            source=f"{SLUG} A2",
        ),
        control(
            "Arrhenius in the loss itself explains less: variance it leaves over what a power of the loss leaves",
            arrhenius,
            at_least=10.0,
            source=f"{SLUG} A2",
        ),
        *_algebra(config),
    ]
    return Part(tuple(checks), (Figure("Mean time to grow the loss", {"series": series, "x": "L / L*", "y": "time", "log": "xy"}, curves),))


def _unexplained(x: np.ndarray, y: np.ndarray) -> float:
    """Share of the variance of y a straight line in x leaves."""
    line = np.polyfit(x, y, 1)
    return float(np.var(y - np.polyval(line, x)) / np.var(y))


def _algebra(config: FormulaConfig) -> list[Check]:
    """R1 by enumeration, R3, R7 in one dimension, R8."""
    g = np.random.default_rng(config.seeds[0]).normal(size=(7, 2))
    means = np.array([g[list(k)].mean(0) for k in itertools.combinations(range(7), 3)]) - g.mean(0)
    exact = means.T @ means / len(means)
    formula = batch_covariance(g, 3, replacement=False)
    strength = (np.square(g).sum(1).mean() - np.square(g.mean(0)).sum()) / 3 * (7 - 3) / (7 - 1)
    one = number(theory.escape_rate(8.0, -4.0, 1.0, 2.0, 0.1, 8.0))
    kramers = math.sqrt(8 * 4) / (2 * math.pi) * 2 ** -(0.5 + 8.0 / (0.1 * 8.0))
    powers = []
    for n in (1, 3):
        saddle = np.diag([-4.0] + [8.0] * (n - 1))
        powers.append(float(theory.escape_rate(8.0 * np.eye(n), saddle, 1.0, 2.0, 0.1, 8.0).details["power"]))
    critical = theory.critical_dimension(0.1, 8.0, 8.0)
    return [
        match(
            "batch covariance without replacement, by enumeration", 0.0, float(np.abs(exact - formula).max()), 1e-15, source=f"{SLUG} R1"
        ),
        match("its trace", float(strength), float(np.trace(exact)), 1e-14, source=f"{SLUG} R3"),
        match("the rate in n dimensions is that of one for n = 1", kramers, one, 1e-12, source=f"{SLUG} R7"),
        match("each outlier takes 1/2 off the power", 0.5, (powers[0] - powers[1]) / 2, 1e-12, source=f"{SLUG} R7"),
        match("the power vanishes at the critical number of outliers", 0.0, powers[0] + 0.5 - critical / 2, 1e-12, source=f"{SLUG} R8"),
        holds(
            "flat and low-dimensional minima are the stable ones: critical number falls with h* (differences)",
            [theory.critical_dimension(0.1, 8.0, h) - theory.critical_dimension(0.1, 8.0, 2 * h) for h in (1.0, 2.0, 4.0)],
            at_least=0.0,
            source=f"{SLUG} R8",
        ),
        match(
            "no noise at an interpolating minimum, so no escape",
            0.0,
            number(theory.escape_rate(8.0, -4.0, 0.0, 2.0, 0.1, 8.0)),
            0.0,
            source=f"{SLUG} R6",
        ),
    ]


# ------------------------------------------------------------------------------------------------ A3, R4, R5


@dataclass(frozen=True)
class SdeConfig:
    """dx = -x dt + sqrt(T (1 + x^2)) dW: passage times in three dimensions, and the stationary density in one."""

    dim: int = 3
    temperature: float = 0.25
    levels: tuple[float, ...] = (2.0, 4.0)
    dt: float = 0.002
    replicas: int = 8000
    horizon: float = 12.0
    density_replicas: int = 40_000
    density_time: float = 12.0
    density_dt: float = 0.005
    seeds: tuple[int, ...] = (0, 1, 2)


def sde(config: SdeConfig) -> Part:
    """A3, R4, R5: simulated passage times, and the density in both times."""
    exact = [number(theory.radial_time(config.dim, c, config.temperature)) for c in config.levels]
    bridged, plain = [], []
    steps = int(config.horizon * max(exact) / config.dt)
    params = {"dt": config.dt, "T": config.temperature, "level": config.levels}
    for seed in config.seeds:
        with_bridge = FirstPassage(lambda s, p: s[config.dim] > 0.5)
        run = Ensemble(theory.radial_sde(config.dim), config.replicas, params, seed).run(steps, [with_bridge])
        bridged.append((torch.as_tensor(run[0].mean.value) * config.dt).tolist())
        without = FirstPassage(lambda s, p: 1.0 + dot(s, s) > p.level)
        run = Ensemble(theory.radial_sde(config.dim, bridge=False), config.replicas, params, seed).run(steps, [without])
        plain.append((torch.as_tensor(run[0].mean.value) * config.dt).tolist())
    ratio = [[b / e for b, e in zip(row, exact, strict=True)] for row in bridged]
    late = [[b / e for b, e in zip(row, exact, strict=True)] for row in plain]
    checks = [
        match("passage time with the bridge over the quadrature", 1.0, [x for row in ratio for x in row], 0.04, source=f"{SLUG} A3"),
        match("passage time watched at every step only", 1.0, [x for row in late for x in row], 0.12, source=f"{SLUG} A3"),
        control("which is late: by", [x - 1 for row in late for x in row], at_least=0.01, source=f"{SLUG} A3"),
        *_densities(config),
    ]
    return Part(tuple(checks))


def _densities(config: SdeConfig) -> list[Check]:
    """R4, R5: phi = 1 + 1/T in t-time, 1/T in tau-time, where the noise is additive."""
    t = config.temperature
    systems = {
        "t": diffusion("t", lambda x, p: [-1.0 * x[0]], lambda x, p: [sqrt(p.T * (1.0 + x[0] * x[0]))], [0.0]),
        "tau": diffusion("tau", lambda x, p: [-2.0 * x[0] / (1.0 + x[0] * x[0])], lambda x, p: [sqrt(2.0 * p.T)], [0.0]),
    }
    expected = {"t": theory.exponent_of_density(t, 1.0, 1.0), "tau": 1 / t}
    out, fitted = [], []
    for name, system in systems.items():
        found = []
        for seed in config.seeds:
            run = Ensemble(system, config.density_replicas, {"dt": config.density_dt, "T": t}, seed).run(
                int(config.density_time / config.density_dt)
            )
            found.append(number(theory.density_exponent(run.final[:, 0].numpy())))
        fitted.append(found)
        out.append(
            match(
                f"density exponent in {name}-time",
                expected[name],
                found,
                0.04,
                source=f"{SLUG} R{5 if name == 't' else 4}",
                relative=True,
                spread=found,
            )
        )
    out.append(
        control(
            "the change of time shifts the exponent, by one: fitted difference",
            [a - b for a, b in zip(*fitted, strict=True)],
            at_least=0.75,
            source=f"{SLUG} R5",
        )
    )
    return out


# ------------------------------------------------------------------------------------------------ A4, R10


@dataclass(frozen=True)
class SgdConfig:
    """SGD itself on one-dimensional label-noise regression, L = (1 + w^2)/2: (eta, B), A4 first."""

    settings: tuple[tuple[float, int], ...] = ((0.1, 2), (0.05, 1), (0.1, 1), (0.5, 2), (1.0, 4))
    replicas: int = 40_000
    steps: int = 400
    passage_rate: float = 0.1
    passage_levels: tuple[float, ...] = (1.5, 1.7, 1.9, 2.1)
    passage_dims: tuple[int, ...] = (1, 3)
    passage_replicas: int = 2000
    passage_steps: int = 400_000
    cold: tuple[float, ...] = (0.15, 0.1, 0.075)
    cold_levels: tuple[float, float] = (1.3, 1.6)
    seeds: tuple[int, ...] = (0, 1, 2)


def sgd(config: SgdConfig) -> Part:
    """A4, R10: the density of SGD has the discrete exponent, and its passage times follow neither law exactly."""
    checks: list[Check] = []
    for eta, batch in config.settings:
        found = []
        for seed in config.seeds:
            system = descent("sgd", regression([[1.0]], batch), SGD(), [0.0])
            run = Ensemble(system, config.replicas, {"lr": eta, "sigma": 1.0}, seed).run(config.steps)
            found.append(number(theory.density_exponent(run.final[:, 0].numpy())))
        discrete, continuous = theory.discrete_exponent_of_density(eta, batch, 1.0), theory.exponent_of_density(eta, batch, 1.0)
        words = f"eta {eta}, B {batch}"
        first = (eta, batch) == config.settings[0]
        checks.append(
            match(
                f"density exponent of SGD, {words}: (2B/(eta h) - B + 1)/2",
                discrete,
                found,
                0.03,
                source=f"{SLUG} {'A4' if first else 'R10'}",
                relative=True,
                spread=found,
            )
        )
        distance, source = [abs(f / continuous - 1) for f in found], f"{SLUG} {'A4' if first else 'R10'}"
        checks += [
            control(f"relative distance to the continuous-time value, {words}", distance, at_least=0.05 if first else 0.03, source=source),
            refuted(
                f"the density of SGD has the exponent 1 + B/(eta h), {words}: relative distance", distance, at_most=0.03, source=source
            ),
        ]
    return Part((*checks, *_passages(config), *_cold(config), _violation(config)))


def _times(dim: int, eta: float, levels: tuple[float, ...], replicas: int, steps: int, seed: int) -> list[float]:
    system = descent("sgd", regression(np.eye(dim), 1), SGD(), [0.0] * dim)
    params = {"lr": eta, "sigma": 1.0, "level": levels}
    mean = Ensemble(system, replicas, params, seed).run(steps, [FirstPassage(lambda s, p: 1.0 + dot(s, s) > p.level)])[0].mean
    return torch.as_tensor(mean.value).tolist() if mean.ok else [math.nan] * len(levels)


def _passages(config: SgdConfig) -> list[Check]:
    """R10c: slopes of log time over log level, B = 1, beside the formula and the SDE in the same window."""
    out: list[Check] = []
    off: list[float] = []
    for dim in config.passage_dims:
        slopes = []
        for seed in config.seeds:
            times = _times(dim, config.passage_rate, config.passage_levels, config.passage_replicas, config.passage_steps, seed)
            slopes.append(float(np.polyfit(np.log(config.passage_levels), np.log(times), 1)[0]))
        window = [number(theory.radial_time(dim, c, config.passage_rate)) for c in config.passage_levels]
        exact = float(np.polyfit(np.log(config.passage_levels), np.log(window), 1)[0])
        out.append(
            control(
                f"SGD escapes by another slope than its SDE in the same window, {dim} dimensions (formula "
                f"{theory.limiting_slope(dim, config.passage_rate):.1f}, SDE {exact:.1f}): difference",
                [s - exact for s in slopes],
                at_least=1.0,
                source=f"{SLUG} R10",
                spread=slopes,
            )
        )
        off += [abs(s - theory.limiting_slope(dim, config.passage_rate)) for s in slopes]
    out.append(
        refuted(f"SGD escapes by the slope 1/T + 1 - d/2, d = {config.passage_dims}: distance", off, at_most=0.5, source=f"{SLUG} R10")
    )
    return out


def _cold(config: SgdConfig) -> list[Check]:
    """R10d: increments of log time between two levels move from the log law to the linear (large-deviation) law as eta falls."""
    low, high = config.cold_levels
    places = []
    for eta in config.cold:
        times = _times(1, eta, config.cold_levels, config.passage_replicas, config.passage_steps, config.seeds[0])
        log_law, linear = math.log(high / low) / eta, (high - low) / eta
        places.append((math.log(times[1] / times[0]) - log_law) / (linear - log_law))
    return [
        control(
            "between the two laws, 0 the power law and 1 Arrhenius in the loss: grows as eta falls (difference)",
            [places[-1] - places[0]],
            at_least=0.1,
            source=f"{SLUG} R10",
        ),
        refuted("SGD is at the power law at the smallest eta", places[-1], at_most=0.2, source=f"{SLUG} R10"),
    ]


def _violation(config: SgdConfig) -> Check:
    """R10a: per-sample noise is 1 + 2 w^2 for Gaussian x in one dimension, not 1 + w^2."""
    draw = np.random.default_rng(config.seeds[0])
    x, e = draw.normal(size=400_000), draw.normal(size=400_000)
    values = [float(batch_covariance(((w * x - e) * x)[:, None], 1)[0, 0]) for w in (0.0, 1.0, 2.0)]
    growth = (values[2] - values[0]) / 4
    return match("variance of a sample's gradient grows as 1 + 2 w^2: coefficient of w^2", 2.0, growth, 0.05, source=f"{SLUG} R10")


# ------------------------------------------------------------------------------------------------ A5, R2


@dataclass(frozen=True)
class DigitsConfig:
    """A 64-20-1 tanh net on even/odd digits, mean-square loss, S = 32, lr .1 (needs scikit-learn)."""

    hidden: int = 20
    batch: int = 32
    lr: float = 0.1
    steps: tuple[int, ...] = (0, 200, 1000)
    checked: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)


def digits(config: DigitsConfig) -> Part:
    """A5, R2: the noise covariance is 2 L H_GN - grad grad^T in direction and size, and not proportional to H alone."""
    from torch.func import functional_call, grad, vmap

    from parasym.gallery.digits import digits as load

    split = load()
    x, y = split.x.double(), (split.y % 2).double() * 2 - 1
    cosines: dict[int, list[float]] = {k: [] for k in config.steps}
    sizes: dict[int, list[float]] = {k: [] for k in config.steps}
    per_curvature: dict[int, list[float]] = {k: [] for k in config.steps}
    for seed in config.seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = torch.nn.Sequential(torch.nn.Linear(64, config.hidden), torch.nn.Tanh(), torch.nn.Linear(config.hidden, 1)).double()
        params = {name: p.detach().clone() for name, p in net.named_parameters()}

        def output(p: dict[str, torch.Tensor], a: torch.Tensor, net: torch.nn.Module = net) -> torch.Tensor:
            return functional_call(net, p, (a[None],))[0, 0]

        def loss(p: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor, output: Any = output) -> torch.Tensor:
            return 0.5 * (output(p, a) - b).square()

        draw = torch.Generator().manual_seed(seed)
        for step in range(max(config.steps) + 1):
            if step in config.steps:
                jac = torch.cat([g.flatten(1) for g in vmap(grad(output), (None, 0))(params, x).values()], dim=1)
                residual = vmap(output, (None, 0))(params, x) - y
                mean = (residual[:, None] * jac).mean(0)
                noise = (residual[:, None] * jac).T @ (residual[:, None] * jac) / len(x) - torch.outer(mean, mean)
                gauss_newton = jac.T @ jac / len(x)
                theory_ = residual.square().mean() * gauss_newton - torch.outer(mean, mean)
                cosines[step].append(float((noise * theory_).sum() / noise.norm() / theory_.norm()))
                sizes[step].append(float(noise.trace() / theory_.trace()))
                per_curvature[step].append(float(noise.trace() / gauss_newton.trace()))
            rows = torch.randint(len(x), (config.batch,), generator=draw)
            step_gradient = grad(lambda p, rows=rows: vmap(loss, (None, 0, 0))(p, x[rows], y[rows]).mean())(params)
            params = {name: p - config.lr * step_gradient[name] for name, p in params.items()}
    last = config.steps[-1]
    return Part(
        (
            holds(
                f"cosine of the noise covariance and 2 L H_GN - g g^T at step {config.checked}",
                cosines[config.checked],
                at_least=0.95,
                source=f"{SLUG} A5",
                spread=cosines[config.checked],
            ),
            holds(
                f"their traces agree at step {config.checked}: distance of the ratio from one",
                [abs(s - 1) for s in sizes[config.checked]],
                at_most=0.25,
                source=f"{SLUG} R2",
                spread=sizes[config.checked],
            ),
            control(
                f"noise over curvature alone is not constant: its fall from step 0 to {last}",
                [a / b for a, b in zip(per_curvature[0], per_curvature[last], strict=True)],
                at_least=2.0,
                source=f"{SLUG} R2",
            ),
        )
    )


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    formulas: FormulaConfig | None = FormulaConfig()
    sde: SdeConfig | None = SdeConfig()
    sgd: SgdConfig | None = SgdConfig()
    digits: DigitsConfig | None = DigitsConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {"formulas": formulas, "sde": sde, "sgd": sgd, "digits": digits}

ENTRY = Entry(
    slug=SLUG,
    title="Power-law escape rate of SGD",
    paper="Takashi Mori, Liu Ziyin, Kangqiao Liu, Masahito Ueda, ICML 2022, arXiv 2105.09557",
    claims=(
        "Minibatch noise of the mean-square loss is proportional to the loss; a change of time makes it additive on log L.",
        "The stationary density is a power of the loss, and the escape rate a power of L(saddle)/L(min), fewer outliers being more stable.",
        "For SGD itself both hold only roughly: the density has a discrete exponent, and cold escape turns into Arrhenius in the loss.",
    ),
    presets={
        "smoke": Config(
            sde=None,
            sgd=SgdConfig(settings=((0.1, 2),), passage_dims=(1,), passage_levels=(1.5, 1.75, 2.0), cold=(0.15, 0.075)),
            digits=None,
        ),
        "default": Config(),
        "full": Config(
            formulas=FormulaConfig(dims=(1, 3, 5)),
            sde=SdeConfig(replicas=40_000, dt=0.0005, seeds=tuple(range(5))),
            sgd=SgdConfig(replicas=400_000, passage_replicas=20_000, passage_dims=(1, 3, 5), seeds=tuple(range(5))),
            digits=DigitsConfig(steps=(0, 200, 1000, 4000), seeds=tuple(range(10))),
        ),
    },
    experiments=_EXPERIMENTS,
)
