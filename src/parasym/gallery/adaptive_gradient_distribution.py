"""On the distributional properties of adaptive gradients: the step u = g / sqrt(v) never has a diverging variance.

Slug adaptive-gradient-distribution. Gaussian gradients; v the plain mean of the squares so far, or Adam's bias-corrected moving
average. RAdam's argument for warm-up is that Var 1/sqrt(v) diverges at small t; the step itself is bounded, for any gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import curves
from parasym.simulate import Ensemble, Snapshots, System, sqrt
from parasym.solvable import adaptive as theory
from parasym.solvable.contract import number

SLUG = "adaptive-gradient-distribution"
NAMES = ("E|u|", "E u^2", "E u^4")


def plain_mean(mean: float = 0.0) -> System:
    """State: sum of squares, count, u_t with v_t the plain mean, u_t with v_{t-1}, 1/sqrt(v_t)."""

    def step(s: Any, p: Any, draws: Any) -> list[Any]:
        g = mean + draws.normal()
        total, count = s[0] + g * g, s[1] + 1.0
        return [total, count, g * sqrt(count / total), g * sqrt(s[1]) / sqrt(s[0] + 1e-300), sqrt(count / total)]

    return System("plain mean", lambda p, d: [0.0] * 5, step)


def moving_average(cauchy: bool = False) -> System:
    """State: m, v, powers of the betas, the largest |u| so far, u_t = m^ / sqrt(v^). Parameters beta1, beta2, mean."""

    def step(s: Any, p: Any, draws: Any) -> list[Any]:
        g = p.mean + draws.normal()
        if cauchy:
            g = g / draws.normal()
        m, v = p.beta1 * s[0] + (1 - p.beta1) * g, p.beta2 * s[1] + (1 - p.beta2) * g * g
        first, second = s[2] * p.beta1, s[3] * p.beta2
        u = m / (1 - first) / sqrt(v / (1 - second))
        return [m, v, first, second, u]

    return System("moving average", lambda p, d: [0.0, 0.0, 1.0, 1.0, 0.0], step)


def sampled(system: System, at: Sequence[int], entry: int, params: Mapping[str, float], replicas: int, seed: int) -> dict[str, list[float]]:
    """Mean and variance of |u|, u, u^2 and u^4 over replicas, at the steps ``at``."""

    def read(s: Any, p: Any) -> list[Any]:
        u = s[entry]
        return [abs(u), u, u * u, u**4]

    found = Ensemble(system, replicas, params, seed, precision="float64").run(max(at), [Snapshots(at, read)])[0]
    a, b, c, d = torch.as_tensor(found.value).T.tolist()
    return {
        "E|u|": a,
        "E u^2": c,
        "E u^4": d,
        "Var|u|": [y - x * x for x, y in zip(a, c, strict=True)],
        "Var u": [y - x * x for x, y in zip(b, c, strict=True)],
        "Var u^2": [y - x * x for x, y in zip(c, d, strict=True)],
    }


# ------------------------------------------------------------------------------------------------ A1, A2, R1, R2, R4


@dataclass(frozen=True)
class MomentsConfig:
    """Moments of u against sampling."""

    steps: tuple[int, ...] = (1, 2, 3, 5, 10)
    later: tuple[int, ...] = (30, 100)
    betas: tuple[float, ...] = (0.9, 0.99, 0.999)
    means: tuple[float, ...] = (0.5, 2.0)
    replicas: int = 400_000
    seeds: tuple[int, ...] = (0, 1, 2)


def moments(config: MomentsConfig) -> Part:
    """A1, A2, R1, R2, R4: closed forms and integrals against draws."""
    checks: list[Check] = []
    steps, seeds = [*config.steps, *config.later], config.seeds
    exact = {t: theory.uniform_moments(t) for t in steps}
    # a mean of the squares of |u|^2 <= t: four standard errors where the dossier's bound is for 4e5 draws
    loose = max(1.0, math.sqrt(400_000 / config.replicas))
    runs = [sampled(plain_mean(), steps, 2, {}, config.replicas, seed) for seed in seeds]
    few = [steps.index(t) for t in config.steps]
    for name, tol in (("Var|u|", 2e-3), ("E u^2", 8e-3), ("Var u^2", 0.03)):
        predicted = [number(exact[steps[k]][name]) for k in few]
        seen = [run[name][k] for run in runs for k in few]
        checks.append(
            match(f"plain mean: {name} for t = {config.steps}", predicted * len(seeds), seen, tol * loose, source=f"{SLUG} A1", spread=seen)
        )
    for beta in config.betas:
        predicted = [number(theory.ema_moments(t, beta)["Var|u|"]) for t in steps]
        params = {"beta1": 0.0, "beta2": beta, "mean": 0.0}
        drawn = [sampled(moving_average(), steps, 4, params, config.replicas, seed) for seed in seeds]
        seen = [x for run in drawn for x in run["Var|u|"]]
        checks.append(
            match(
                f"moving average {beta}: Var|u| for t = {tuple(steps)}",
                predicted * len(seeds),
                seen,
                3e-3 * loose,
                source=f"{SLUG} A2",
                spread=seen,
            )
        )
        seen = [x for run in drawn for x in run["E u^2"]]
        predicted = [number(theory.ema_moments(t, beta)["E u^2"]) for t in steps]
        checks.append(
            match(f"moving average {beta}: E u^2 for t = {tuple(steps)}", predicted * len(seeds), seen, 8e-3 * loose, source=f"{SLUG} R2",
                  spread=seen)
        )  # fmt: skip
        long = number(theory.ema_moments(1000 if beta < 0.999 else 8000, beta)["E u^2"])
        checks.append(
            control(f"moving average {beta}: E u^2 at stationarity falls short of one by", 1 - long, at_least=5e-4, source=f"{SLUG} R2")
        )
    for mean in config.means:
        seen = [sampled(plain_mean(mean), [200], 2, {}, config.replicas // 4, seed)["Var|u|"][0] for seed in seeds]
        checks.append(
            match(
                f"gradients of mean {mean}: Var|u| at t = 200 is near its limit",
                theory.limit_with_mean(mean),
                seen,
                6e-3,
                source=f"{SLUG} R4",
                spread=seen,
            )
        )
    ends = list(range(1, 101))
    series = [{"name": "plain mean", "x": ends, "y": [number(theory.uniform_moments(t)["Var|u|"]) for t in ends]}]
    series += [{"name": f"moving average {b}", "x": ends, "y": theory.ema_curve(100, b).tolist()} for b in config.betas]
    series.append({"name": "simulated, plain mean", "x": steps, "y": runs[0]["Var|u|"], "mark": "points"})
    return Part(tuple(checks), (Figure("Variance of the step size", {"series": series, "x": "t", "y": "Var|u_t|", "log": "x"}, curves),))


# ------------------------------------------------------------------------------------------------ A3, R3, R5


@dataclass(frozen=True)
class BoundConfig:
    """Monotone and bounded; what does diverge."""

    betas: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999)
    longest: int = 200
    small: int = 2_000
    large: int = 400_000
    seeds: tuple[int, ...] = (0, 1, 2)


def bounds(config: BoundConfig) -> Part:
    """A3, R3, R5: Var|u| rises from zero to at most 1 - 2/pi; Var 1/sqrt(v) and the step without its own gradient diverge."""
    checks: list[Check] = []
    rises, tops = [], []
    for beta in config.betas:
        curve = theory.ema_curve(config.longest, beta)
        rises.append(float(np.diff(curve).min()))
        tops.append(float(curve.max()))
    plain = np.array([number(theory.uniform_moments(t)["Var|u|"]) for t in range(1, config.longest + 1)])
    checks.append(holds(f"Var|u| never falls, t = 1..{config.longest}, each beta", rises, at_least=-1e-12, source=f"{SLUG} A3"))
    checks.append(holds("and stays below 1 - 2/pi", tops, at_most=1 - 2 / math.pi, source=f"{SLUG} A3"))
    checks.append(holds("plain mean: strictly increasing", float(np.diff(plain).min()), at_least=0.0, source=f"{SLUG} R1"))
    checks.append(
        match(
            "plain mean: the limit is 1 - 2/pi",
            1 - 2 / math.pi,
            number(theory.uniform_moments(100_000)["Var|u|"]),
            1e-5,
            source=f"{SLUG} R1",
        )
    )
    for beta in (0.5, 0.9):
        worst = []
        for seed in config.seeds:
            params = {"beta1": 0.0, "beta2": beta, "mean": 0.0}
            run = Ensemble(moving_average(cauchy=True), 20_000, params, seed, precision="float64").run(12)
            worst.append(float(run.final[:, 4].abs().max()))
        checks.append(
            holds(
                f"Cauchy gradients, beta {beta}: largest |u_12|",
                worst,
                at_most=theory.bound(12, beta) * (1 + 1e-9),
                source=f"{SLUG} R3",
                spread=worst,
            )
        )
        checks.append(
            control(
                f"and the bound is reached: largest over the bound, beta {beta}",
                [w / theory.bound(12, beta) for w in worst],
                at_least=0.99,
                source=f"{SLUG} R3",
            )
        )
    for entry, at, what in ((4, 2, "1/sqrt(v) at t = 2"), (3, 3, "the step with v_{t-1} at t = 3")):
        growth = []
        for seed in config.seeds:
            run = Ensemble(plain_mean(), config.large, {}, seed, precision="float64").run(at)
            values = run.final[:, entry]
            blocks = values[: config.large // config.small * config.small].reshape(-1, config.small)
            growth.append(float(values.var() / blocks.var(-1).median()))
        checks.append(
            control(
                f"variance of {what}: all draws over the median of {config.small}", growth, at_least=1.2, source=f"{SLUG} A3", spread=growth
            )
        )
    at, seen, inverse = 12, [], []
    for seed in config.seeds:
        run = Ensemble(plain_mean(), config.large, {}, seed, precision="float64").run(at)
        seen.append(float(run.final[:, 3].var()))
        inverse.append(float(run.final[:, 4].square().mean()))
    checks.append(
        match(
            "u with v_{t-1} is Student-t: variance (t-1)/(t-3) at t = 12",
            number(theory.excluded_variance(at)),
            seen,
            0.02,
            source=f"{SLUG} R5",
            spread=seen,
        )
    )
    checks.append(
        match("E 1/v = t/(t-2) at t = 12", number(theory.rectification_mean(at)), inverse, 0.01, source=f"{SLUG} R5", spread=inverse)
    )
    infinite = [
        float(theory.rectification_mean(2).status == "not_applicable"),
        float(theory.excluded_variance(3).status == "not_applicable"),
    ]
    checks.append(holds("and is infinite at t <= 2, as the variance is at t <= 3 (1)", infinite, at_least=1, source=f"{SLUG} R5"))
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ A4


@dataclass(frozen=True)
class AdamConfig:
    """Adam with a first moment."""

    beta1: float = 0.9
    beta2: float = 0.999
    steps: tuple[int, ...] = (1, 2, 3, 5, 10, 50, 2000)
    replicas: int = 20_000
    seeds: tuple[int, ...] = (0, 1, 2)


def adam(config: AdamConfig) -> Part:
    """A4, R6: with momentum Var|u| rises and falls, and stays bounded."""
    params = {"beta1": config.beta1, "beta2": config.beta2, "mean": 0.0}
    runs = [sampled(moving_average(), config.steps, 4, params, config.replicas, seed) for seed in config.seeds]
    peak = [run["Var|u|"][1] for run in runs]
    late = [run["Var|u|"][-1] for run in runs]
    signed = [run["Var u"][-1] for run in runs]
    expected = (1 - config.beta1) / (1 + config.beta1)
    figure = Figure(
        "Adam's step",
        {
            "series": [{"name": f"seed {k}", "x": list(config.steps), "y": run["Var|u|"], "mark": "points"} for k, run in enumerate(runs)],
            "x": "t",
            "y": "Var|u_t|",
            "log": "x",
        },
        curves,
    )
    # the first two gradients: m^ = (b1 g1 + g2)/(1 + b1), v^ = (b2 g1^2 + g2^2)/(1 + b2), a function of one uniform angle
    angle = (np.arange(200_000) + 0.5) / 200_000 * 2 * np.pi
    u = (config.beta1 * np.cos(angle) + np.sin(angle)) / (1 + config.beta1)
    u = np.abs(u) / np.sqrt((config.beta2 * np.cos(angle) ** 2 + np.sin(angle) ** 2) / (1 + config.beta2))
    checks = (
        holds("no variance at the first step", [run["Var|u|"][0] for run in runs], at_most=1e-9, source=f"{SLUG} R6"),
        match(
            "Var|u| at t = 2, by integration over the angle of two gradients", float(u.var()), peak, 0.004, source=f"{SLUG} R6", spread=peak
        ),
        control(
            "the curve is not monotone: its value at t = 2 over that at the end",
            [a / b for a, b in zip(peak, late, strict=True)],
            at_least=2.0,
            source=f"{SLUG} A4",
        ),
        match("Var u tends to (1 - beta1)/(1 + beta1)", expected, signed, 0.003, source=f"{SLUG} R6", spread=signed),
        match(
            "and |u| to that of a Gaussian: Var|u| = (1 - 2/pi) Var u",
            (1 - 2 / math.pi) * expected,
            late,
            0.002,
            source=f"{SLUG} R6",
            spread=late,
        ),
    )
    return Part(checks, (figure,))


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    moments: MomentsConfig | None = MomentsConfig()
    bounds: BoundConfig | None = BoundConfig()
    adam: AdamConfig | None = AdamConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {"moments": moments, "bounds": bounds, "adam": adam}

ENTRY = Entry(
    slug=SLUG,
    title="On the Distributional Properties of Adaptive Gradients",
    paper="Zhang Zhiyi, Liu Ziyin, 2021, arXiv 2105.07222",
    claims=(
        "For Gaussian gradients the variance of an adaptive step is finite at every time, zero at first, and rises to a bound.",
        "What diverges is the variance of 1/sqrt(v) alone: no reason for warm-up.",
    ),
    presets={
        "smoke": Config(moments=MomentsConfig(replicas=100_000, later=(30,), betas=(0.9,)), bounds=BoundConfig(large=200_000)),
        "default": Config(),
        "full": Config(
            moments=MomentsConfig(replicas=4_000_000, seeds=tuple(range(5))),
            bounds=BoundConfig(large=4_000_000, seeds=tuple(range(5))),
            adam=AdamConfig(replicas=400_000, seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
)
