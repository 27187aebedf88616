"""Noise and fluctuation of finite learning rate SGD: exact stationary covariance in discrete time.

Slug finite-lr-noise. Quadratic loss, additive noise of covariance C, momentum without dampening, matrix learning rates; what
continuous time misses, and what the exact law is good for: Bayesian sampling, escape, damped Newton, natural gradient, Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from parasym.core.results import Estimate
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.diagrams import DIVERGENCE
from parasym.gallery.drawings import agreement, curves
from parasym.simulate import (
    SGD,
    Adam,
    Average,
    Ensemble,
    FirstPassage,
    Momentum,
    Preconditioned,
    Snapshots,
    descent,
    quadratic,
    student,
)
from parasym.solvable import stationary as theory
from parasym.solvable.contract import number
from parasym.solvable.regression import label_noise_strength, natural_gradient_factor

SLUG = "finite-lr-noise"


def spd(draw: np.random.Generator, size: int) -> np.ndarray:
    """A random positive matrix."""
    b = draw.normal(size=(size, size))
    return b @ b.T / size + 0.1 * np.eye(size)


def value(estimate: Estimate) -> np.ndarray:
    """An estimate's matrix."""
    return np.asarray(torch.as_tensor(estimate.value))


# ------------------------------------------------------------------------------------------------ A1, A6


@dataclass(frozen=True)
class FormulaConfig:
    """Random 4 x 4 Hessian, noise and learning-rate matrices that do not commute."""

    size: int = 4
    momenta: tuple[float, ...] = (0.0, 0.5, 0.9)
    samples: float = 50.0
    seeds: tuple[int, ...] = (0, 1, 2)


def formulas(config: FormulaConfig) -> Part:
    """A1, A6, R1-R8, R10, R11, R13: every closed form against the discrete Lyapunov equation of (w, m)."""
    found: dict[str, list[float]] = {name: [] for name in ("R1", "R2", "R3", "R4", "R5", "R6", "R8", "R10", "R11", "R13", "loss")}
    wrong, damp = [], []
    for seed in config.seeds:
        draw = np.random.default_rng(seed)
        h, c, lam = spd(draw, config.size), spd(draw, config.size), 0.1 * spd(draw, config.size)
        for mu in config.momenta:
            sigma = value(theory.stationary_covariance(h, c, lam, mu))
            found["R1" if mu == 0 else "R2"].append(theory.master_residual(sigma, h, c, lam, mu))
            scalar = value(theory.stationary_covariance(h, c, 0.2, mu))
            found["R3"].append(float(np.abs(theory.eigenbasis_covariance(h, c, 0.2, mu) - scalar).max()))
            commuting = value(theory.stationary_covariance(h, h, 0.2, mu))
            by_formula = 0.2 / (1 - mu) * h @ np.linalg.inv(h @ (2 * np.eye(len(h)) - 0.2 * h / (1 + mu)))
            found["R4"].append(float(np.abs(commuting - by_formula).max()))
            found["R6"].append(theory.excess_loss_identity(sigma, h, c, lam, mu))
            found["loss"].append(abs(theory.excess_loss(h, c, 0.2, mu) - 0.5 * float(np.trace(h @ scalar))))
            n = config.samples
            target = np.linalg.inv(h) / n
            best = value(theory.stationary_covariance(h, c, theory.bayes_preconditioner(h, c, n, mu), mu))
            found["R8"].append(float(np.abs(best - target).max() / np.abs(target).max()))
            over = value(theory.stationary_covariance(h, c, 2 * (1 - mu) * np.linalg.inv(n * c), mu))
            wrong.append(float(np.abs(over - target).max() / np.abs(target).max()))
            newton = value(theory.stationary_covariance(h, c, 0.3 * np.linalg.inv(h), mu))
            found["R10"].append(float(np.abs(theory.damped_newton(h, c, 0.3, mu) - newton).max()))
            dampened = value(theory.stationary_covariance(h, c, lam, mu, dampened=True))
            found["R13"].append(theory.master_residual(dampened, h, c, (1 - mu) * lam, mu))
            limit = theory.stability_limit(h, mu)
            for factor, stable in ((0.999, True), (1.001, False)):
                found["R5"].append(float(theory.stationary_covariance(h, c, factor * limit, mu).ok != stable))
            if mu < 0.9:
                for trace in (False, True):
                    iterated = value(theory.natural_gradient_iterated(h, 0.1, 4, mu, trace=trace))
                    found["R11"].append(float(np.abs(iterated - theory.natural_gradient(h, 0.1, 4, mu, trace=trace)).max()))
                factor_of = natural_gradient_factor(config.size, 0.1, 4, mu)
                strength = label_noise_strength(h, factor_of * np.linalg.inv(h), 4, 0.0)
                damp.append(theory.master_residual(factor_of * np.linalg.inv(h), h, strength, 0.1 / 4 * np.linalg.inv(strength), mu))
    words = {
        "R1": "no momentum: residual of the matrix equation",
        "R2": "momentum .5 and .9: residual of the matrix equation",
        "R3": "any C entry by entry in the eigenbasis of H: largest difference",
        "R4": "noise that commutes: largest difference",
        "R5": "stable just inside 2(1+mu)/h_max and not just outside: failures",
        "R6": "identity of the excess loss: residual",
        "R8": "the Bayesian preconditioner gives H^-1/N: largest relative difference",
        "R10": "damped Newton: largest difference",
        "R13": "dampened momentum is a learning rate times 1 - mu: residual",
    }
    checks = [
        match(words[name], 0.0, found[name], 1e-10, source=f"{SLUG} {'A1' if name in ('R2', 'R3', 'R8') else name}") for name in words
    ]
    checks += [
        match("excess loss in closed form: largest difference", 0.0, found["loss"], 1e-10, source=f"{SLUG} R6"),
        match("natural gradient, closed form against iteration", 0.0, found["R11"], 1e-6, source=f"{SLUG} A6"),
        match("and it closes the label-noise equations without noise: residual", 0.0, damp, 1e-6, source=f"{SLUG} R11"),
        control("the continuous-time Bayesian rule misses the target: relative difference", wrong, at_least=1e-4, source=f"{SLUG} R8"),
        *_bayes_rate(config),
    ]
    return Part(tuple(checks))


def _bayes_rate(config: FormulaConfig) -> list[Check]:
    """R8: the best scalar learning rate, where KL is stationary, by a difference quotient."""
    draw = np.random.default_rng(config.seeds[0])
    h, c = spd(draw, 3), spd(draw, 3)
    found = number(theory.bayes_rate(h, c, config.samples))

    def divergence(lr: float) -> float:
        product = config.samples * h @ value(theory.stationary_covariance(h, c, lr))
        return 0.5 * float(np.trace(product) - 3 - np.linalg.slogdet(product)[1])

    rise = [divergence(found * k) - divergence(found) for k in (0.99, 1.01)]
    return [holds("KL to the target rises on either side of the best scalar learning rate", rise, at_least=0.0, source=f"{SLUG} R8")]


# ------------------------------------------------------------------------------------------------ A2, A3


@dataclass(frozen=True)
class SampleConfig:
    """H = diag(1, .5, .1), C = 1; snapshots 30 steps apart."""

    h: tuple[float, ...] = (1.0, 0.5, 0.1)
    settings: tuple[tuple[float, float], ...] = ((1.2, 0.0), (0.4, 0.9))
    replicas: int = 10_000
    burn: int = 300
    snapshots: int = 11
    spacing: int = 30
    seeds: tuple[int, ...] = (0, 1, 2)


def samples(config: SampleConfig) -> Part:
    """A2, A3, R4, R7: the sampled covariance, and a noise of another law with the same covariance."""
    checks: list[Check] = []
    series = []
    h, size = np.diag(config.h), len(config.h)
    at = [k * config.spacing for k in range(config.snapshots)]

    def powers(s: Any, p: Any) -> list[Any]:
        return [x * x for x in s[:size]] + [x**4 for x in s[:size]]

    for lr, mu in config.settings:
        exact = np.diag(value(theory.stationary_covariance(h, np.eye(size), lr, mu)))
        for noise, make, tol in (("Gaussian", None, 0.03), ("Student-t, 5 degrees", student(5), 0.1)):
            seen, kurtosis = [], []
            for seed in config.seeds:
                system = descent("quadratic", quadratic(h, np.eye(size), make), Momentum(), [0.0] * size)
                run = Ensemble(system, config.replicas, {"lr": lr, "momentum": mu}, seed).run(
                    at[-1] or 1, [Snapshots(at, powers)], burn=config.burn
                )
                second, fourth = torch.as_tensor(run[0].value).mean(0).split(size)
                seen.extend(second.tolist())
                kurtosis.append((fourth / second.square()).tolist())
            words = f"{noise}, lr {lr}, momentum {mu}"
            checks.append(
                match(
                    f"variances, {words}",
                    exact.tolist() * len(config.seeds),
                    seen,
                    tol,
                    source=f"{SLUG} {'A2' if make is None else 'A3'}",
                    relative=True,
                    spread=seen,
                )
            )
            series.append({"name": words, "predicted": exact.tolist() * len(config.seeds), "measured": seen})
            if make is None:
                checks.append(
                    match(f"kurtosis is that of a Gaussian, {words}", 3.0, [k for row in kurtosis for k in row], 0.15, source=f"{SLUG} A3")
                )
                if mu == 0:
                    short = exact / np.diag(theory.continuous_covariance(h, np.eye(size), lr, mu))
                    predicted = theory.enhancement(h, lr, mu)[::-1]
                    checks.append(
                        match(
                            "exact over continuous variance is 1/(1 - lr h / 2)",
                            predicted.tolist(),
                            short.tolist(),
                            1e-10,
                            source=f"{SLUG} A2",
                        )
                    )
                    ratios = [a / b for a, b in zip(seen, list(exact / short) * len(config.seeds), strict=True)]
                    checks.append(
                        control(
                            "sampled over continuous variance in the stiffest direction", ratios[::size], at_least=2.3, source=f"{SLUG} A2"
                        )
                    )
            else:
                peaked = [theory.impulse_kurtosis(curvature, lr, mu, 6.0) for curvature in config.h]
                bound = [5.0 if lr == config.settings[0][0] and k == 0 else 3.2 for k in range(size)]
                checks.append(
                    control(
                        f"yet another law: kurtosis (exact {', '.join(f'{x:.2f}' for x in peaked)}), {words}",
                        [k for row in kurtosis for k in row],
                        at_least=bound * len(config.seeds),
                        source=f"{SLUG} A3",
                    )
                )
    checks += _closures(config)
    return Part(tuple(checks), (Figure("Stationary variances", {"series": series, "x": "exact", "y": "sampled", "log": "xy"}, agreement),))


def _closures(config: SampleConfig) -> list[Check]:
    """R7 and R10 by simulation: noise H/S, and damped Newton with any C."""
    h = np.array([[1.0, 0.2], [0.2, 0.4]])
    lr, mu, batch = 0.6, 0.5, 4
    exact = lr / batch / (1 - mu) * np.linalg.inv(2 * np.eye(2) - lr * h / (1 + mu))
    c = np.array([[1.0, -0.5], [-0.5, 0.5]])
    newton = theory.damped_newton(h, c, lr, mu)
    out = []
    for name, target, noise, rule, params, source in (
        ("noise H/S", exact, h / batch, Momentum(), {"lr": lr, "momentum": mu}, "R7"),
        ("damped Newton", newton, c, Preconditioned(lr * np.linalg.inv(h)), {"momentum": mu}, "R10"),
    ):
        seen = []
        for seed in config.seeds:
            observe = [Average(lambda s, p: [s[0] * s[0], s[0] * s[1], s[1] * s[1]])]
            system = descent(name, quadratic(h, noise), rule, [0.0, 0.0])
            seen.extend(torch.as_tensor(Ensemble(system, config.replicas, params, seed).run(200, observe, burn=200)[0].value).tolist())
        predicted = [float(target[0, 0]), float(target[0, 1]), float(target[1, 1])]
        scale = max(abs(x) for x in predicted)
        out.append(
            match(f"covariance entries, {name}", predicted * len(config.seeds), seen, 0.03 * scale, source=f"{SLUG} {source}", spread=seen)
        )
    return out


# ------------------------------------------------------------------------------------------------ A4


@dataclass(frozen=True)
class AdamConfig:
    """Adam / RMSProp on a quadratic: (lr, beta1), slow beta2; started at the predicted law."""

    h: tuple[float, ...] = (1.0, 0.5, 0.2)
    c: tuple[float, ...] = (1.0, 0.2, 0.05)
    settings: tuple[tuple[float, float], ...] = ((0.05, 0.0), (0.3, 0.0), (0.1, 0.9))
    beta2: float = 0.9999
    fast: float = 0.99
    replicas: int = 10_000
    burn: int = 300
    steps: int = 300
    seeds: tuple[int, ...] = (0, 1, 2)


def adam(config: AdamConfig) -> Part:
    """A4, R12: the stationary state of Adam is a fixed point."""
    checks: list[Check] = []
    h, c, size = np.diag(config.h), np.diag(config.c), len(config.h)
    for lr, beta1 in config.settings:
        found = theory.adaptive_covariance(h, c, lr, beta1)
        sigma, v = np.diag(value(found)).copy(), np.asarray(found.details["v"])
        for beta2 in (config.beta2, config.fast):
            ratios, second = [], []
            for seed in config.seeds:
                draw = torch.Generator().manual_seed(seed)
                state = torch.zeros(config.replicas, 3 * size, dtype=torch.float64)
                state[:, :size] = torch.randn(config.replicas, size, generator=draw, dtype=torch.float64) * torch.from_numpy(np.sqrt(sigma))
                state[:, 2 * size :] = torch.from_numpy(v)
                system = descent("adam", quadratic(h, c), Adam(corrected=False), [0.0] * size)
                params = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": 1e-12}
                observe = [Average(lambda s, p: [x * x for x in s[:size]]), Average(lambda s, p: s[2 * size :])]
                run = Ensemble(system, config.replicas, params, seed).run(config.steps, observe, burn=config.burn, start=state)
                ratios.extend((torch.as_tensor(run[0].value) / torch.from_numpy(sigma)).tolist())
                second.extend((torch.as_tensor(run[1].value) / torch.from_numpy(v)).tolist())
            words = f"lr {lr}, beta1 {beta1}, beta2 {beta2}"
            checks.append(match(f"variances over the fixed point's, {words}", 1.0, ratios, 0.03, source=f"{SLUG} A4", spread=ratios))
            checks.append(match(f"second moments over the fixed point's, {words}", 1.0, second, 0.03, source=f"{SLUG} R12", spread=second))
        plain = np.diag(value(theory.stationary_covariance(h, c, lr, beta1, dampened=True)))
        checks.append(
            control(
                f"SGD at the same rate is another law: largest ratio of variances, lr {lr}, beta1 {beta1}",
                float((sigma / plain).max()),
                at_least=1.5,
                source=f"{SLUG} R12",
            )
        )
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ A5


@dataclass(frozen=True)
class EscapeConfig:
    """A harmonic well cut off at b standard deviations, a = C = 1."""

    rates: tuple[float, ...] = (0.2, 1.0, 1.5)
    depths: tuple[float, ...] = (2.4, 2.8, 3.2, 3.6)
    walkers: int = 4000
    steps: int = 60_000
    seeds: tuple[int, ...] = (0, 1, 2)


def escape(config: EscapeConfig) -> Part:
    """A5, R9: Arrhenius with the discrete temperature."""
    checks: list[Check] = []
    series = []
    for lr in config.rates:
        temperature = number(theory.escape_temperature(1.0, 1.0, lr))
        barriers = [0.5 * b * b * temperature for b in config.depths]  # a b^2 Sigma / 2 with Sigma = T / a
        slopes = []
        for seed in config.seeds:
            system = descent("well", quadratic([[1.0]], [[1.0]]), SGD(), [0.0])
            params = {"lr": lr, "edge": [b * temperature**0.5 for b in config.depths]}
            passage = Ensemble(system, config.walkers, params, seed).run(config.steps, [FirstPassage(lambda s, p: abs(s[0]) > p.edge)])[0]
            mean = passage.mean
            logs = torch.as_tensor(mean.value).log().numpy()
            slopes.append(float(np.polyfit(barriers, logs, 1)[0]) if mean.ok else math.nan)
            series.append({"name": f"lr {lr}, seed {seed}", "x": barriers, "y": np.exp(logs).tolist(), "mark": "points"})
        continuous = 2 / lr  # 1 / (lr C / 2)
        checks.append(
            match(
                f"slope of log mean exit time over the barrier, lr {lr}: 1/T",
                1 / temperature,
                slopes,
                0.15,
                source=f"{SLUG} A5",
                relative=True,
                spread=slopes,
            )
        )
        if lr >= 1:
            checks.append(
                control(f"below the continuous value by, lr {lr}", [1 - x / continuous for x in slopes], at_least=0.4, source=f"{SLUG} A5")
            )
    return Part(
        tuple(checks), (Figure("Exit times", {"series": series, "x": "barrier", "y": "mean exit time (steps)", "log": "y"}, curves),)
    )


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    formulas: FormulaConfig | None = FormulaConfig()
    samples: SampleConfig | None = SampleConfig()
    adam: AdamConfig | None = AdamConfig()
    escape: EscapeConfig | None = EscapeConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {"formulas": formulas, "samples": samples, "adam": adam, "escape": escape}

ENTRY = Entry(
    slug=SLUG,
    title="Noise and Fluctuation of Finite Learning Rate Stochastic Gradient Descent",
    paper="Kangqiao Liu, Liu Ziyin, Masahito Ueda, ICML 2021, arXiv 2012.03636",
    claims=(
        "The stationary fluctuation of SGD on a quadratic is exact in discrete time, with momentum and matrix learning rates.",
        "Continuous time underestimates it, most in stiff directions, and gets its shape wrong.",
        "The exact law gives the Bayesian preconditioner, the temperature of escape, and the stationary state of Adam.",
    ),
    presets={
        "smoke": Config(
            formulas=FormulaConfig(seeds=(0, 1, 2)),
            samples=None,
            adam=None,
            escape=EscapeConfig(rates=(1.0,), walkers=4000),
        ),
        "default": Config(),
        "full": Config(
            formulas=FormulaConfig(seeds=tuple(range(20))),
            samples=SampleConfig(replicas=200_000, seeds=tuple(range(5))),
            adam=AdamConfig(replicas=100_000, seeds=tuple(range(5))),
            escape=EscapeConfig(walkers=40_000, steps=300_000, seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
    sweeps={"divergence": DIVERGENCE},
)
