"""Stochastic Collapse: gradient noise pulls SGD towards simpler subnetworks (slug stochastic-collapse).

Near a set that no gradient step can leave, the noise is multiplicative: the log-distance drifts, and its Lyapunov exponent
decides whether SGD falls in, even where the averaged loss has a maximum. Every run here is batched over seeds, settings and
chains, float64, and takes its loss convention, start, batch rule and step from its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import agreement, bars, curves
from parasym.gallery.ensemble import Ensemble, plain, slope, standard_error
from parasym.measure.neurons import independent_neurons, neuron_vectors

SLUG = "stochastic-collapse"
COLLAPSED = 1e-6
FLOOR = 1e-290


# ------------------------------------------------------------------------------------------------ predictions


def sde_exponent(curvature: Tensor, noise_curvature: Tensor) -> Tensor:
    """Drift of log|theta| near 0 under d theta = -L' dt + sqrt(2 D) dW: -(L''(0) + D''(0) / 2) (R1)."""
    return -(curvature + 0.5 * noise_curvature)


def sgd_exponent(curvatures: Tensor, eta: Tensor | float) -> Tensor:
    """E log|1 - eta h|, the exact exponent per step for batches whose normal curvatures h (..., n) are equally likely (R2)."""
    return (1 - torch.as_tensor(eta) * curvatures).abs().log().mean(-1)


def critical_eta(curvatures: Tensor, low: float = 1e-3, high: float = 0.999) -> float:
    """The learning rate at which `sgd_exponent` changes sign."""
    return float(brentq(lambda eta: float(sgd_exponent(curvatures, eta)), low, high, xtol=1e-13))


def gaussian_log_mean(shift: Tensor, width: Tensor, points: int = 200_001) -> Tensor:
    """E log|1 + shift + width xi| for xi ~ N(0, 1), by the trapezoid rule on 12 standard deviations."""
    xi = torch.linspace(-12, 12, points, dtype=torch.float64)
    weight = torch.exp(-0.5 * xi.square())
    values = (1 + shift[..., None] + width[..., None] * xi).abs().clamp_min(1e-12).log()
    return (values * weight).sum(-1) / weight.sum()


def soft_threshold(signal: Tensor, eta: float, sigma: float) -> Tensor:
    """Stationary mean of a mode under label noise: max(s* - eta sigma^2 / 2, 0) (R6)."""
    return (signal - 0.5 * eta * sigma**2).clamp_min(0)


def sigmoid_growth(rate: Tensor, start: Tensor | float, time: Tensor) -> Tensor:
    """z / (1 + (z / s0 - 1) exp(-2 z t)): a mode that grows from s0 to z (R6)."""
    return rate / (1 + (rate / start - 1) * torch.exp(-2 * rate * time))


# ------------------------------------------------------------------------------------------------ A1: quartic well


@dataclass(frozen=True)
class QuarticConfig:
    """d theta = (mu theta - theta^3) dt + zeta theta dW by Euler steps ``dt`` up to ``horizon``, from ``start``."""

    mu: float = 1.5
    zetas: tuple[float, ...] = (0.5, 1.0, 1.4)
    collapsing: tuple[float, ...] = (2.2, 2.5)
    chains: int = 1000
    dt: float = 2.5e-3
    horizon: float = 25.0
    burn_in: float = 5.0
    start: float = 0.5
    noise: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)


def simulate_quartic(config: QuarticConfig, record: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Times (r,), E log|theta| (r, seeds, zetas) and the mean of theta^2 after the burn-in (seeds, zetas)."""
    zeta = config.noise * torch.tensor([*config.zetas, *config.collapsing], dtype=torch.float64)[None, :, None]
    draws, steps = Ensemble(config.seeds), round(config.horizon / config.dt)
    theta = torch.full((len(config.seeds), zeta.shape[1], config.chains), config.start, dtype=torch.float64)
    square, counted, times, logs = torch.zeros(theta.shape[:2], dtype=torch.float64), 0, [], []
    every = max(1, steps // record)
    for step in range(steps):
        kick = zeta * config.dt**0.5 * draws.normal(zeta.shape[1], config.chains)
        theta = theta + theta * ((config.mu - theta * theta) * config.dt + kick)
        if step * config.dt > config.burn_in and step % 10 == 0:
            square, counted = square + theta.square().mean(-1), counted + 1
        if step % every == 0:
            times.append((step + 1) * config.dt)
            logs.append(theta.abs().clamp_min(FLOOR).log().mean(-1))
    return torch.tensor(times, dtype=torch.float64), torch.stack(logs), square / counted


def quartic(config: QuarticConfig) -> Part:
    """A1: the stationary second moment below the threshold zeta = sqrt(2 mu), the collapse exponent above it."""
    times, logs, square = simulate_quartic(config)
    settled = len(config.zetas)
    zeta = torch.tensor(config.zetas, dtype=torch.float64)
    strong = torch.tensor(config.collapsing, dtype=torch.float64)
    moment = config.mu - 0.5 * zeta.square()
    exponent = sde_exponent(torch.tensor(-config.mu, dtype=torch.float64), strong.square())
    late = times > config.horizon / 3
    fitted = slope(times[late], logs[late])[:, settled:]
    checks = [
        match(
            f"quartic well, zeta = {value:g}: E theta^2 = mu - zeta^2 / 2",
            moment[i],
            square[:, i].mean(),
            0.05,
            source=f"{SLUG} A1, R4",
            spread=square[:, i],
        )
        for i, value in enumerate(config.zetas)
    ]
    checks += [
        match(
            f"quartic well, zeta = {value:g} > sqrt(2 mu): slope of E log|theta| = mu - zeta^2 / 2",
            exponent[i],
            fitted[:, i].mean(),
            0.10,
            relative=True,
            source=f"{SLUG} A1, R1, R4",
            spread=fitted[:, i],
        )
        for i, value in enumerate(config.collapsing)
    ]
    series = [
        {"name": f"zeta = {value:g}", "x": plain(times), "y": plain(logs[:, :, i].mean(1))}
        for i, value in enumerate((*config.zetas, *config.collapsing))
    ]
    dashed = [
        {
            "name": f"predicted slope, zeta = {value:g}",
            "x": plain(times),
            "colour": settled + i,
            "mark": "dash",
            "y": plain(logs[0, :, settled + i].mean() + exponent[i] * times),
        }
        for i, value in enumerate(config.collapsing)
    ]
    figure = Figure(
        "Quartic well: log-distance to the invariant set",
        {"series": series + dashed, "x": "time", "y": "E log|theta|"},
        curves,
        "The drift minimum is off zero for every curve; above zeta = sqrt(2 mu) noise pulls the walker into zero all the same.",
    )
    return Part((*checks, _no_noise_quartic(config)), (figure,))


def _no_noise_quartic(config: QuarticConfig) -> Check:
    """Control: without noise the walker sits at the minimum sqrt(mu), however strong the noise would have been."""
    still = QuarticConfig(**{**vars(config), "noise": 0.0, "zetas": config.zetas[:1], "chains": 1, "seeds": config.seeds[:1]})
    _, logs, _ = simulate_quartic(still)
    return control(
        "quartic well without noise: |theta| stays away from 0 (log|theta| at the end)", logs[-1], at_least=-1.0, source=f"{SLUG} A1"
    )


# ------------------------------------------------------------------------------------------------ A1b: a maximum that attracts


@dataclass(frozen=True)
class MaximumConfig:
    """t <- t - eta g, g = (h t + t^3 / 2) / (1 + t^2), h one of ``curvatures`` at random each step; per-chain batches of one."""

    curvatures: tuple[float, ...] = (-2.0, 1.0)
    etas: tuple[float, ...] = (0.3, 0.4, 0.47, 0.53, 0.6, 0.7)
    repelled: tuple[float, ...] = (0.3, 0.4)
    collapsing: tuple[float, ...] = (0.6, 0.7)
    slope_at: float = 0.6
    chains: int = 2000
    steps: int = 4000
    fit: tuple[int, int] = (200, 1000)
    start: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def simulate_maximum(config: MaximumConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Steps (r,), E log|t| (r, seeds, etas), and the collapsed fraction |t| < 1e-6 at the end (seeds, etas)."""
    eta = torch.tensor(config.etas, dtype=torch.float64)[None, :, None]
    kinds = torch.tensor(config.curvatures, dtype=torch.float64)
    draws = Ensemble(config.seeds)
    state = torch.full((len(config.seeds), len(config.etas), config.chains), config.start, dtype=torch.float64)
    marks, logs = [], []
    for step in range(config.steps):
        curvature = kinds[draws.integers(len(kinds), len(config.etas), config.chains)]
        squared = state * state
        state = state * (1 - eta * (curvature + 0.5 * squared) / (1 + squared))
        if step % 20 == 0:
            marks.append(step + 1)
            logs.append(state.abs().clamp_min(FLOOR).log().mean(-1))
    fraction = (state.abs() < COLLAPSED).double().mean(-1)
    return torch.tensor(marks, dtype=torch.float64), torch.stack(logs), fraction


def maximum(config: MaximumConfig) -> Part:
    """A1b: SGD converges to a local maximum of the mean loss once E log|1 - eta h| < 0, and not before."""
    marks, logs, fraction = simulate_maximum(config)
    kinds, etas = torch.tensor(config.curvatures, dtype=torch.float64), torch.tensor(config.etas, dtype=torch.float64)
    exponent = sgd_exponent(kinds[None], etas[:, None])
    window = (marks >= config.fit[0]) & (marks <= config.fit[1])
    fitted = slope(marks[window], logs[window])
    at = config.etas.index(config.slope_at)
    low = [config.etas.index(eta) for eta in config.repelled]
    high = [config.etas.index(eta) for eta in config.collapsing]
    majority = (fraction.mean(0) > 0.5).double()
    edge = critical_eta(kinds)
    checks = (
        match(
            f"maximum, eta = {config.slope_at}: slope of E log|t| per step = E log|1 - eta h|",
            exponent[at],
            fitted[:, at].mean(),
            0.05,
            relative=True,
            source=f"{SLUG} A1b, R2",
            spread=fitted[:, at],
        ),
        holds(f"maximum, eta in {config.repelled}: collapsed fraction", fraction[:, low], at_most=0.1, source=f"{SLUG} A1b"),
        holds(f"maximum, eta in {config.collapsing}: collapsed fraction", fraction[:, high], at_least=0.99, source=f"{SLUG} A1b"),
        match(
            "maximum: most chains collapse exactly where E log|1 - eta h| < 0", (exponent < 0).double(), majority, 0.0, source=f"{SLUG} R2"
        ),
        match(
            "maximum: eta_c solves (1 + 2 eta)(1 - eta) = 1 and lies between the last repelled and first collapsing eta",
            edge,
            _bracket(config.etas, majority),
            0.5 * _bracket_width(config.etas, majority),
            source=f"{SLUG} R2",
        ),
        control(
            "maximum: the mean curvature is negative, so gradient descent on the mean loss is repelled (its |t| at the end)",
            _descend_mean(config),
            at_least=5 * config.start,
            source=f"{SLUG} A1b",
        ),
    )
    x = plain(etas)
    figure = Figure(
        "A local maximum that attracts SGD",
        {
            "series": [
                {"name": "measured slope (10 x, per step)", "x": x, "y": plain(10 * fitted.mean(0)), "mark": "points"},
                {"name": "10 E log|1 - eta h|", "x": x, "y": plain(10 * exponent), "colour": 0},
                {"name": "collapsed fraction", "x": x, "y": plain(fraction.mean(0)), "mark": "points"},
            ],
            "x": "learning rate",
            "y": "exponent, fraction",
        },
        curves,
        "Chains collapse where the exponent is negative, although 0 is a maximum of the mean loss.",
    )
    return Part(checks, (figure,))


def _bracket(etas: tuple[float, ...], majority: Tensor) -> float:
    first = int(majority.argmax())
    return 0.5 * (etas[first - 1] + etas[first]) if first else float("nan")


def _bracket_width(etas: tuple[float, ...], majority: Tensor) -> float:
    first = int(majority.argmax())
    return etas[first] - etas[first - 1] if first else float("nan")


def _descend_mean(config: MaximumConfig) -> float:
    mean, state = sum(config.curvatures) / len(config.curvatures), config.start
    for _ in range(config.steps):
        state -= config.slope_at * (mean * state + 0.5 * state**3) / (1 + state**2)
    return abs(state)


# ------------------------------------------------------------------------------------------------ R3: more than one dimension


@dataclass(frozen=True)
class PlaneConfig:
    """c <- c - eta (H c + |c|^2 c / 2) / (1 + |c|^2), H = R(th) diag(d1, d2) R(th)^T drawn each step from ``matrices`` fixed ones.

    d1, d2 are independent and equally likely among ``curvatures``, th ~ U(-a, a) for each spread a.
    """

    curvatures: tuple[float, ...] = (-2.0, 1.0)
    spreads: tuple[float, ...] = (0.0, 0.3, 3.141592653589793)
    etas: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    matrices: int = 2000
    chains: int = 500
    steps: int = 4000
    exponent_chains: int = 64
    start: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def normal_hessians(config: PlaneConfig, draws: Ensemble) -> Tensor:
    """(seeds, spreads, matrices, 3): the entries xx, xy, yy of the per-sample normal Hessians."""
    shape = (len(config.spreads), config.matrices)
    kinds = torch.tensor(config.curvatures, dtype=torch.float64)
    first, second = kinds[draws.integers(len(kinds), *shape)], kinds[draws.integers(len(kinds), *shape)]
    angle = (2 * draws.uniform(*shape) - 1) * torch.tensor(config.spreads, dtype=torch.float64)[:, None]
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack(
        [
            first * cosine**2 + second * sine**2,
            (first - second) * cosine * sine,
            first * sine**2 + second * cosine**2,
        ],
        dim=-1,
    )


def _drawn(table: Tensor, draws: Ensemble, settings: int, chains: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each setting and chain one of the matrices of its seed and spread: three tensors (seeds, spreads, settings, chains)."""
    seeds, spreads, matrices, _ = table.shape
    pick = draws.integers(matrices, spreads, settings, chains).reshape(seeds, spreads, -1, 1).expand(-1, -1, -1, 3)
    chosen = table.gather(2, pick).reshape(seeds, spreads, settings, chains, 3)
    return chosen[..., 0], chosen[..., 1], chosen[..., 2]


def top_exponent(config: PlaneConfig, table: Tensor, draws: Ensemble) -> Tensor:
    """Top Lyapunov exponent per step of prod (1 - eta H), by renormalised products along a run (seeds, spreads, etas)."""
    eta = torch.tensor(config.etas, dtype=torch.float64)[None, None, :, None]
    shape = (*table.shape[:2], len(config.etas), config.exponent_chains)
    x, y, total = (
        torch.full(shape, 0.6, dtype=torch.float64),
        torch.full(shape, 0.8, dtype=torch.float64),
        torch.zeros(shape, dtype=torch.float64),
    )
    for _ in range(config.steps):
        xx, xy, yy = _drawn(table, draws, len(config.etas), config.exponent_chains)
        x, y = x - eta * (xx * x + xy * y), y - eta * (xy * x + yy * y)
        size = torch.hypot(x, y)
        x, y, total = x / size, y / size, total + size.log()
    return total.mean(-1) / config.steps


def simulate_plane(config: PlaneConfig, table: Tensor, draws: Ensemble) -> Tensor:
    """Collapsed fraction |c| < 1e-6 at the end (seeds, spreads, etas)."""
    eta = torch.tensor(config.etas, dtype=torch.float64)[None, None, :, None]
    phase = 2 * torch.pi * draws.uniform(len(config.spreads), len(config.etas), config.chains)
    x, y = config.start * phase.cos(), config.start * phase.sin()
    for _ in range(config.steps):
        xx, xy, yy = _drawn(table, draws, len(config.etas), config.chains)
        squared = x * x + y * y
        rate = eta / (1 + squared)
        x, y = x - rate * (xx * x + xy * y + 0.5 * squared * x), y - rate * (xy * x + yy * y + 0.5 * squared * y)
    return (torch.hypot(x, y) < COLLAPSED).double().mean(-1)


def norm_exponent(table: Tensor, etas: tuple[float, ...]) -> Tensor:
    """E log ||1 - eta H||_2 (seeds, spreads, etas): the sufficient condition is that it be negative."""
    trace, gap = 0.5 * (table[..., 0] + table[..., 2]), torch.hypot(0.5 * (table[..., 0] - table[..., 2]), table[..., 1])
    norms = [torch.maximum((1 - eta * (trace - gap)).abs(), (1 - eta * (trace + gap)).abs()).log().mean(-1) for eta in etas]
    return torch.stack(norms, dim=-1)


def plane(config: PlaneConfig) -> Part:
    """R3: the sign of the top exponent of the random matrix product decides the collapse; the norm condition is too strict."""
    draws = Ensemble(config.seeds)
    table = normal_hessians(config, draws)
    exponent, fraction = top_exponent(config, table, draws), simulate_plane(config, table, draws)
    down, up, clear = exponent < -0.03, exponent > 0.05, exponent.abs() > 0.015
    norms = norm_exponent(table, config.etas)
    allowance = 3 * (0.1 * 0.9 / config.chains) ** 0.5
    checks = (
        holds("two normal directions, exponent < -0.03: collapsed fraction", fraction[down], at_least=0.95, source=f"{SLUG} R3"),
        holds(
            "two normal directions, exponent > 0.05: collapsed fraction (0.1 and three binomial standard errors)",
            fraction[up],
            at_most=0.1 + allowance,
            source=f"{SLUG} R3",
        ),
        match(
            "two normal directions, |exponent| > 0.015: share of settings where the sign of the exponent tells the majority",
            1.0,
            ((fraction > 0.5) == (exponent < 0))[clear].double().mean(),
            0.0,
            source=f"{SLUG} R3",
        ),
        holds(
            "the norm exponent E log||1 - eta H|| bounds the top exponent (smallest gap)",
            (norms - exponent).min(),
            at_least=0.0,
            source=f"{SLUG} R3",
        ),
        control(
            "the norm condition alone would not see the collapse: it stays positive where chains collapse",
            norms[down],
            at_least=0.0,
            source=f"{SLUG} R3",
        ),
        control(
            f"incoherent rotation weakens the attraction: exponent at eta = {config.etas[-1]}, spread {config.spreads[-1]:.2g} - spread 0",
            exponent[:, -1, -1] - exponent[:, 0, -1],
            at_least=0.1,
            source=f"{SLUG} R3",
            spread=exponent[:, -1, -1],
        ),
    )
    series = [
        {
            "name": f"rotation spread {spread:.2g}",
            "x": plain(exponent[:, i].flatten()),
            "y": plain(fraction[:, i].flatten()),
            "mark": "points",
        }
        for i, spread in enumerate(config.spreads)
    ]
    figure = Figure(
        "Exponent and collapse, two normal directions",
        {"series": series, "x": "top Lyapunov exponent per step", "y": "collapsed fraction"},
        curves,
        "One point for each seed, learning rate and rotation spread.",
    )
    return Part(checks, (figure,))


# ------------------------------------------------------------------------------------------------ A2, R6: soft threshold


@dataclass(frozen=True)
class ThresholdConfig:
    """u <- u - eta (u v - s* + sigma xi) v and the same for v with the same xi ~ N(0, 1); u = v = ``start``."""

    signals: tuple[float, ...] = (0.5, 0.8, 1.2)
    below: tuple[float, ...] = (0.05,)
    eta: float = 0.01
    sigma: float = 6.0
    chains: int = 400
    steps: int = 10_000
    burn_in: int = 2_000
    start: float = 0.7
    seeds: tuple[int, ...] = (0, 1, 2)


def simulate_modes(config: ThresholdConfig, record: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Steps (r,), the modes u v at them (r, seeds, modes, chains), and their mean after the burn-in (seeds, modes, chains)."""
    signal = torch.tensor([*config.signals, *config.below], dtype=torch.float64)[None, :, None]
    draws, shape = Ensemble(config.seeds), (signal.shape[1], config.chains)
    u = torch.full((len(config.seeds), *shape), config.start, dtype=torch.float64)
    v, total, marks, modes = u.clone(), torch.zeros_like(u), [], []
    for step in range(config.steps):
        if step % record == 0:
            marks.append(step)
            modes.append(u * v)
        error = u * v - signal
        if config.sigma:
            error = error + config.sigma * draws.normal(*shape)
        u, v = u - config.eta * error * v, v - config.eta * error * u
        if step >= config.burn_in:
            total = total + u * v
    return torch.tensor(marks, dtype=torch.float64), torch.stack(modes), total / (config.steps - config.burn_in)


def threshold(config: ThresholdConfig) -> Part:
    """A2: label noise soft-thresholds the modes of a linear network; without it nothing is thresholded."""
    marks, modes, mean = simulate_modes(config)
    quiet = ThresholdConfig(**{**vars(config), "sigma": 0.0, "chains": 1, "seeds": config.seeds[:1]})
    _, _, still = simulate_modes(quiet)
    signal = torch.tensor(config.signals, dtype=torch.float64)
    predicted, measured = soft_threshold(signal, config.eta, config.sigma), mean.mean(-1)
    count = len(config.signals)
    settled = still[0, :count, 0]
    checks = [
        match(
            f"mode s* = {value:g}: E s = max(s* - eta sigma^2 / 2, 0)",
            predicted[i],
            measured[:, i].mean(),
            0.02,
            source=f"{SLUG} A2, R6",
            spread=measured[:, i],
        )
        for i, value in enumerate(config.signals)
    ]
    checks += [
        holds(
            f"mode s* = {value:g} below the threshold: E s at the end", modes[-1, :, count + i].mean(-1), at_most=5e-3, source=f"{SLUG} R6"
        )
        for i, value in enumerate(config.below)
    ]
    checks += [
        control("without label noise every mode reaches its s*: |s - s*|", (settled - signal).abs(), at_most=1e-3, source=f"{SLUG} A2"),
        control(
            "without label noise the thresholded value is wrong: |s - max(s* - eta sigma^2 / 2, 0)|",
            (settled - predicted).abs(),
            at_least=0.1,
            source=f"{SLUG} A2",
        ),
        _transient_check(config, marks, modes, signal),
    ]
    series = [
        {"name": "modes", "predicted": plain(predicted.repeat(len(config.seeds))), "measured": plain(measured[:, :count].flatten())},
        {"name": "no noise", "predicted": plain(signal), "measured": plain(settled)},
    ]
    points = Figure("Label noise as a soft threshold", {"series": series, "x": "predicted mean of the mode", "y": "measured"}, agreement)
    return Part(tuple(checks), (points, _transient_figure(config, marks, modes, signal)))


def _growth(config: ThresholdConfig, marks: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper curve of E s for each mode, (r, modes) each (R6)."""
    time, start = config.eta * marks[:, None], config.start**2
    return sigmoid_growth(signal - 0.5 * config.eta * config.sigma**2, start, time), sigmoid_growth(signal, start, time)


def _transient_check(config: ThresholdConfig, marks: Tensor, modes: Tensor, signal: Tensor) -> Check:
    kept = modes[1:, :, : len(signal)].flatten(2, 2).transpose(1, 2).flatten(2)
    low, high = _growth(config, marks[1:], signal)
    error = standard_error(kept)
    inside = torch.minimum((kept.mean(-1) - low) / error, (high - kept.mean(-1)) / error)
    return holds(
        "transient: E s(t) lies between the thresholded and the noiseless curve (smallest margin, standard errors)",
        inside.min(),
        at_least=-5.0,
        source=f"{SLUG} R6",
    )


def _transient_figure(config: ThresholdConfig, marks: Tensor, modes: Tensor, signal: Tensor) -> Figure:
    low, high = _growth(config, marks, signal)
    x, series = plain(config.eta * marks), []
    for i, value in enumerate(config.signals):
        series.append(
            {
                "name": f"E s, s* = {value:g}",
                "x": x,
                "y": plain(modes[:, :, i].mean((1, 2))),
                "low": plain(low[:, i]),
                "high": plain(high[:, i]),
                "colour": i,
            }
        )
    return Figure(
        "Modes growing under label noise",
        {"series": series, "x": "time eta x step", "y": "mode"},
        curves,
        "The band runs from the thresholded to the noiseless curve.",
    )


# ------------------------------------------------------------------------------------------------ A5: the learning-rate drop


@dataclass(frozen=True)
class DropConfig:
    """Two modes, the second one noise the training set carries (true value 0); phases of (steps, eta), start u = v = ``start``."""

    signals: tuple[float, ...] = (1.0, 0.1)
    truth: tuple[float, ...] = (1.0, 0.0)
    start: float = 0.4
    sigma: float = 6.0
    chains: int = 200
    large: float = 0.01
    small: float = 5e-4
    phases: tuple[int, ...] = (0, 500, 3000)
    steps_without: int = 24_000
    steps_after: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)


def _schedules(config: DropConfig) -> Tensor:
    """(steps, schedules) learning rates; the last column never drops; a finished schedule has rate 0."""
    columns = []
    for phase in config.phases:
        after = config.steps_after if phase else config.steps_without
        columns.append([config.large] * phase + [config.small] * after)
    columns.append([config.large] * (max(config.phases) + config.steps_after))
    longest = max(len(column) for column in columns)
    return torch.tensor([column + [0.0] * (longest - len(column)) for column in columns], dtype=torch.float64).T


def simulate_drop(config: DropConfig) -> Tensor:
    """Modes at the end of each schedule (seeds, schedules, modes, chains)."""
    rates, draws = _schedules(config), Ensemble(config.seeds)
    signal = torch.tensor(config.signals, dtype=torch.float64)[:, None]
    shape = (rates.shape[1], len(config.signals), config.chains)
    u = torch.full((len(config.seeds), *shape), config.start, dtype=torch.float64)
    v = u.clone()
    for step in range(rates.shape[0]):
        kick = rates[step][:, None, None] * (u * v - signal + config.sigma * draws.normal(*shape))
        u, v = u - kick * v, v - kick * u
    return u * v


def drop(config: DropConfig) -> Part:
    """A5: the longer the noisy large-rate phase, the lower the error after the drop."""
    modes = simulate_drop(config)
    truth = torch.tensor(config.truth, dtype=torch.float64)[:, None]
    error = (modes - truth).square().sum(2).mean(-1)
    noise = modes[:, :, 1].mean(-1)
    dropped = error[:, :-1]
    late = config.phases[-1]
    predicted = soft_threshold(torch.tensor(config.signals[0], dtype=torch.float64), config.small, config.sigma)
    checks = (
        holds(
            "error after the drop falls with the length of the large-rate phase (mean error of one length minus the next longer)",
            -dropped.mean(0).diff(),
            at_least=0.0,
            source=f"{SLUG} A5",
            spread=dropped,
        ),
        holds(
            f"phase of {late} steps against none: error difference for every seed",
            dropped[:, 0] - dropped[:, -1],
            at_least=0.0,
            source=f"{SLUG} A5",
        ),
        holds(
            "never dropping is worst: its error minus the largest after a drop, every seed",
            error[:, -1] - dropped.max(1).values,
            at_least=0.0,
            source=f"{SLUG} A5",
            spread=error[:, -1],
        ),
        holds(
            "the noise mode shrinks with the length of the phase (mean of one length minus the next longer)",
            -noise[:, :-1].mean(0).diff(),
            at_least=0.0,
            source=f"{SLUG} A5",
            spread=noise[:, :-1],
        ),
        match(
            "the signal mode recovers: E s = s* - eta sigma^2 / 2 at the small rate",
            predicted,
            modes[:, :-1, 0].mean(),
            5 * standard_error(modes[:, :-1, 0].flatten()),
            source=f"{SLUG} R6",
            spread=modes[:, :-1, 0].mean((1, 2)),
        ),
    )
    labels = [f"{phase} steps, then drop" for phase in config.phases] + ["no drop"]
    figure = Figure(
        "Error after the learning-rate drop",
        {
            "labels": labels,
            "series": [{"name": f"seed {seed}", "y": plain(error[i])} for i, seed in enumerate(config.seeds)],
            "y": "E sum (s - true)^2",
            "log": "y",
        },
        bars,
    )
    return Part(checks, (figure,))


# ------------------------------------------------------------------------------------------------ R5: a single neuron


@dataclass(frozen=True)
class NeuronConfig:
    """f = w2 tanh(w1 x), loss mean (f - y)^2 / 2, label noise zeta: Euler steps ``dt`` of the noisy flow at learning rate eta.

    ``levels`` are eta zeta^2 / 2 in units of the predicted threshold sum x y / (sigma'(0) sum x^2).
    """

    x: tuple[float, ...] = (-1.2, 0.5, 1.0)
    y: tuple[float, ...] = (-1.1, 0.6, 0.95)
    levels: tuple[float, ...] = (0.6, 1.25, 1.5)
    slopes_from: float = 1.2
    start: float = 0.1
    chains: int = 300
    dt: float = 0.02
    horizon: float = 300.0
    slope_from: float = 60.0
    seeds: tuple[int, ...] = (0, 1, 2)


def _neuron_moments(config: NeuronConfig) -> tuple[Tensor, Tensor, Tensor]:
    """a = mean x y, q = mean x^2 and s = tanh'(0)."""
    x, y = torch.tensor(config.x, dtype=torch.float64), torch.tensor(config.y, dtype=torch.float64)
    gain = torch.func.grad(torch.tanh)(torch.zeros((), dtype=torch.float64))
    return (x * y).mean(), x.square().mean(), gain


def simulate_neuron(config: NeuronConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Times (r,), E log|w1 + w2| (r, seeds, levels), fraction |w| < 0.01 at the end (seeds, levels)."""
    x, y = torch.tensor(config.x, dtype=torch.float64), torch.tensor(config.y, dtype=torch.float64)
    mean, second, gain = _neuron_moments(config)
    level = torch.tensor(config.levels, dtype=torch.float64)[None, :, None]
    strength = (2 * level * mean.abs() / (gain * second)).sqrt()[..., None] * (config.dt / len(config.x)) ** 0.5
    first = torch.full((len(config.seeds), len(config.levels), config.chains), config.start, dtype=torch.float64)
    second_weight, draws, times, logs = first.clone(), Ensemble(config.seeds), [], []
    steps = round(config.horizon / config.dt)
    for step in range(steps):
        hidden = torch.tanh(first[..., None] * x)
        error = config.dt / len(config.x) * (second_weight[..., None] * hidden - y)
        error = error + strength * draws.normal(len(config.levels), config.chains, len(config.x))
        slope_in = ((1 - hidden * hidden) * x * error).sum(-1) * second_weight
        first, second_weight = first - slope_in, second_weight - (hidden * error).sum(-1)
        if step % 50 == 49:
            times.append((step + 1) * config.dt)
            logs.append((first + second_weight).abs().clamp_min(FLOOR).log().mean(-1))
    fraction = (torch.hypot(first, second_weight) < 0.01).double().mean(-1)
    return torch.tensor(times, dtype=torch.float64), torch.stack(logs), fraction


def neuron(config: NeuronConfig) -> Part:
    """R5: label noise kills a neuron once eta zeta^2 s / 2 exceeds |sum x y| / sum x^2."""
    times, logs, fraction = simulate_neuron(config)
    mean, second, gain = _neuron_moments(config)
    level = torch.tensor(config.levels, dtype=torch.float64)
    spread = (2 * level * mean.abs() / (gain * second) * config.dt * second).sqrt() * gain
    exact = gaussian_log_mean((gain * mean * config.dt).expand_as(level), spread) / config.dt
    window = times > config.slope_from
    fitted = slope(times[window], logs[window])
    high = level > config.slopes_from
    checks = (
        match(
            f"neuron, levels {plain(level[high])}: slope of E log|w1 + w2| = exponent of the discretised linear part",
            exact[high],
            fitted.mean(0)[high],
            0.10,
            relative=True,
            source=f"{SLUG} R5",
            spread=fitted[:, high],
        ),
        holds("neuron above the threshold: fraction with |w| < 0.01", fraction[:, high], at_least=0.95, source=f"{SLUG} R5"),
        control("neuron below 0.7 of the threshold: fraction with |w| < 0.01", fraction[:, level < 0.7], at_most=0.1, source=f"{SLUG} R5"),
    )
    series = [
        {"name": f"level {value:g}", "x": plain(times), "y": plain(logs[:, :, i].mean(1)), "colour": i}
        for i, value in enumerate(config.levels)
    ]
    figure = Figure("A single neuron under label noise", {"series": series, "x": "time", "y": "E log|w1 + w2|"}, curves)
    return Part(checks, (figure,))


# ------------------------------------------------------------------------------------------------ A3, R8: invariant sets


@dataclass(frozen=True)
class InvariantConfig:
    """f = sum_j v_j act(w_j.x + b_j) + c on fixed Gaussian data, loss mean (f - y)^2 / 2, batches drawn with replacement."""

    width: int = 8
    inputs: int = 4
    samples: int = 32
    batch: int = 8
    steps: int = 300
    eta: float = 0.05
    rules: tuple[str, ...] = ("sgd", "momentum", "decay", "adam")
    split: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def layer(params: Mapping[str, Tensor], x: Tensor, activation: str) -> Tensor:
    """Outputs (batch,) of the layer; written with sums over one axis, so equal units compute equal numbers to the last bit."""
    hidden = _ACTIVATIONS[activation]((params["w"] * x[:, None, :]).sum(-1) + params["b"])
    return (params["v"] * hidden).sum(-1) + params["c"]


def _optimizer(rule: str, params: list[Tensor], eta: float) -> torch.optim.Optimizer:
    if rule == "adam":
        return torch.optim.Adam(params, lr=eta)
    options: dict[str, dict[str, Any]] = {"sgd": {}, "momentum": {"momentum": 0.9}, "decay": {"momentum": 0.9, "weight_decay": 0.01}}
    return torch.optim.SGD(params, lr=0.3 * eta if rule != "sgd" else eta, **options[rule])


def train_layer(config: InvariantConfig, rule: str, activation: str, seed: int, state: str) -> tuple[Tensor, float]:
    """Train from a ``state`` ("duplicate": units 0, 1 equal; "zero": unit 0 vanishes); return unit rows and how far other units moved."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (config.width, config.inputs), "b": (config.width,), "v": (config.width,), "c": ()}
    params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("w", "b", "v"):
        params[name][0] = params[name][1] + config.split if state == "duplicate" else config.split
    before = _rows(params)
    x = torch.randn(config.samples, config.inputs, generator=generator, dtype=torch.float64)
    y = torch.randn(config.samples, generator=generator, dtype=torch.float64)
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    optimizer = _optimizer(rule, list(leaves.values()), config.eta)
    for _ in range(config.steps):
        pick = torch.randint(config.samples, (config.batch,), generator=generator)
        optimizer.zero_grad()
        (0.5 * (layer(leaves, x[pick], activation) - y[pick]).square().mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    rows = _rows({name: value.detach() for name, value in leaves.items()})
    return rows, float((rows[2:] - before[2:]).norm())


def _rows(params: Mapping[str, Tensor]) -> Tensor:
    return neuron_vectors(params["w"], params["v"][None], params["b"]).clone()


def invariant(config: InvariantConfig) -> Part:
    """A3, R8: duplicates and zero neurons stay so exactly, under every optimiser; a sigmoid zero neuron does not."""
    checks, moved = [], []
    for state, activation in (("duplicate", "gelu"), ("duplicate", "sigmoid"), ("zero", "gelu"), ("zero", "tanh")):
        distances = []
        for rule in config.rules:
            for seed in config.seeds:
                rows, travel = train_layer(config, rule, activation, seed, state)
                distances.append(float((rows[0] - rows[1]).norm() if state == "duplicate" else rows[0].norm()))
                moved.append(travel)
        checks.append(
            match(
                f"{state} {activation} neuron, {', '.join(config.rules)}: distance to its invariant set after {config.steps} steps",
                0.0,
                distances,
                0.0,
                source=f"{SLUG} A3, R8",
            )
        )
    loose = [train_layer(config, rule, "sigmoid", seed, "zero")[0][0].norm() for rule in config.rules for seed in config.seeds]
    checks.append(control("zero sigmoid neuron (sigma(0) = 1/2): it moves", torch.stack(loose), at_least=0.1, source=f"{SLUG} A3, R8"))
    checks.append(control("the other neurons did train: how far they moved", moved, at_least=0.1, source=f"{SLUG} A3"))
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ A4: two neurons that merge


@dataclass(frozen=True)
class MergeConfig:
    """f = sum_k v_k gelu(w_k x), no bias; y = -gelu(.8 x) + fresh N(0, noise^2); loss (f - y)^2 / 2; one sample a step, torch momentum.

    x: ``points`` from -1 to 1. The strict demands are made on ``seeds``, the majority on ``many_seeds``; each seed is one
    numpy ``default_rng`` that draws, step by step, the index of the sample and then its noise. With a full batch all points
    enter each step with the same noise.
    """

    points: int = 8
    scale: float = 0.8
    noise: float = 0.1
    w: tuple[float, float] = (1.0, 0.6)
    v: tuple[float, float] = (-0.6, -0.4)
    apart: tuple[float, ...] = (0.02, 0.05, 0.1)
    merging: tuple[float, ...] = (0.2,)
    between: tuple[float, ...] = (0.15,)
    momentum: float = 0.9
    steps: int = 4000
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    many_seeds: tuple[int, ...] = tuple(range(40))


def _samples(config: MergeConfig, seeds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Index of the sample and its label noise, (steps, seeds) each."""
    streams = [np.random.default_rng(seed) for seed in seeds]
    drawn = [[(stream.integers(config.points), config.noise * stream.normal()) for _ in range(config.steps)] for stream in streams]
    table = torch.tensor(drawn, dtype=torch.float64)
    return table[..., 0].long().T, table[..., 1].T


def _gelu_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    area = 0.5 * (1 + torch.erf(z * 0.5**0.5))
    return z * area, area + z * torch.exp(-0.5 * z * z) * (0.5 / torch.pi) ** 0.5


def simulate_merge(config: MergeConfig, seeds: tuple[int, ...], full_batch: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Steps (r,), squared distance of the two neurons (r, seeds, etas), smallest neuron norm at the end (seeds, etas)."""
    etas = (*config.apart, *config.between, *config.merging)
    eta = torch.tensor(etas, dtype=torch.float64)[None, :, None, None]
    grid = torch.linspace(-1, 1, config.points, dtype=torch.float64)
    target, everything = -torch.nn.functional.gelu(config.scale * grid), torch.arange(config.points)
    index, noise = _samples(config, seeds)
    shape = (len(seeds), len(etas), 2)
    theta = torch.stack(
        [torch.tensor(config.w, dtype=torch.float64).expand(shape), torch.tensor(config.v, dtype=torch.float64).expand(shape)], -1
    )
    speed, marks, gaps = torch.zeros_like(theta), [], []
    for step in range(config.steps):
        pick = everything.expand(len(seeds), -1) if full_batch else index[step][:, None]
        x, y = grid[pick][:, None, None, :], (target[pick] + noise[step][:, None])[:, None, None, :]
        value, rise = _gelu_and_slope(theta[..., 0, None] * x)
        error = (theta[..., 1, None] * value).sum(2, keepdim=True) - y
        gradient = torch.stack([(error * theta[..., 1, None] * rise * x).mean(-1), (error * value).mean(-1)], -1)
        speed = config.momentum * speed + gradient
        theta = theta - eta * speed
        if step % 20 == 19:
            marks.append(step + 1)
            gaps.append((theta[:, :, 0] - theta[:, :, 1]).square().sum(-1))
    return torch.tensor(marks, dtype=torch.float64), torch.stack(gaps), theta.norm(dim=-1).amin(-1)


def merge(config: MergeConfig) -> Part:
    """A4: at a large learning rate two neurons become one, while neither vanishes; at small ones they stay apart."""
    _, strict, size = simulate_merge(config, config.seeds)
    marks, gaps, _ = simulate_merge(config, config.many_seeds)
    _, whole, _ = simulate_merge(config, config.seeds, full_batch=True)
    low, last = len(config.apart), strict[-1]
    joined = slice(gaps.shape[-1] - len(config.merging), None)
    share = (gaps[-1] < 1e-3).double().mean(0)
    many = len(config.many_seeds)
    checks = (
        holds(
            f"two neurons, eta in {config.merging}, seeds {config.seeds}: squared distance",
            last[:, joined],
            at_most=1e-3,
            source=f"{SLUG} A4",
            spread=last[:, joined],
        ),
        holds(
            "the merged neurons did not vanish: smallest norm", size[:, joined], at_least=0.5, source=f"{SLUG} A4", spread=size[:, joined]
        ),
        holds(f"eta in {config.merging}: share of {many} seeds that merge", share[joined], at_least=0.5, source=f"{SLUG} A4"),
        control(
            f"two neurons, eta in {config.apart}, seeds {config.seeds}: squared distance", last[:, :low], at_least=0.05, source=f"{SLUG} A4"
        ),
        control(f"eta in {config.apart}: share of {many} seeds that merge", share[:low], at_most=0.05, source=f"{SLUG} A4"),
        control(f"full batch, eta in {config.merging}: squared distance", whole[-1][:, joined], at_least=1e-3, source=f"{SLUG} A4"),
    )
    etas = (*config.apart, *config.between, *config.merging)
    series = [{"name": f"eta = {eta:g}", "x": plain(marks), "y": plain(gaps[:, :, i].median(1).values)} for i, eta in enumerate(etas)]
    figure = Figure(
        "Two neurons becoming one", {"series": series, "x": "step", "y": f"squared distance (median of {many} seeds)", "log": "y"}, curves
    )
    return Part(checks, (figure,))


# ------------------------------------------------------------------------------------------------ R7: the metric


@dataclass(frozen=True)
class MetricConfig:
    """Layers of ``width`` Gaussian neurons with ``copies`` copies (relative jitter ``jitter``) and ``zeros`` small ones put in."""

    width: int = 24
    inputs: int = 10
    outputs: int = 4
    copies: int = 7
    zeros: int = 5
    jitter: float = 0.01
    seeds: tuple[int, ...] = (0, 1, 2)


def planted_layer(config: MetricConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Incoming (width, inputs), bias (width,), outgoing (outputs, width) with planted copies and zeros, in random order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(config.width, config.inputs + 1 + config.outputs, generator=generator, dtype=torch.float64)
    free = config.width - config.copies - config.zeros
    source = torch.randint(free, (config.copies,), generator=generator)
    jitter = torch.randn(config.copies, rows.shape[1], generator=generator, dtype=torch.float64)
    rows[free : free + config.copies] = rows[source] + config.jitter * jitter
    rows[free + config.copies :] *= 0.01
    rows = rows[torch.randperm(config.width, generator=generator)]
    return rows[:, : config.inputs], rows[:, config.inputs], rows[:, config.inputs + 1 :].T


def metric(config: MetricConfig) -> Part:
    """R7: the metric finds the planted zeros and copies; without planting every neuron is independent."""
    found = [_measured(config, seed) for seed in config.seeds]
    bare = MetricConfig(**{**vars(config), "copies": 0, "zeros": 0})
    free = (config.width - config.copies - config.zeros) / config.width
    checks = (
        match(
            "fraction of independent neurons = (width - copies - zeros) / width",
            free,
            [item.fraction for item in found],
            1e-12,
            source=f"{SLUG} R7",
        ),
        match("vanishing neurons found", config.zeros, [item.zeros for item in found], 0.0, source=f"{SLUG} R7"),
        control(
            "nothing planted: fraction of independent neurons",
            [_measured(bare, seed).fraction for seed in config.seeds],
            at_least=1.0,
            source=f"{SLUG} R7",
        ),
    )
    return Part(checks)


def _measured(config: MetricConfig, seed: int) -> Any:
    incoming, bias, outgoing = planted_layer(config, seed)
    return independent_neurons(neuron_vectors(incoming, outgoing, bias))


@dataclass(frozen=True)
class ShrinkConfig:
    """f = sum_j v_j gelu(w_j.x) on a GELU teacher, y fresh with N(0, noise^2) each step; loss mean (f - y)^2 / 2 over a batch.

    x (samples, inputs) ~ N(0, 1); student weights ~ N(0, init^2); teacher weights ~ N(0, teacher^2 / inputs), readout 1; batches
    drawn with replacement, plain SGD; the same number of steps at every rate and batch.
    """

    width: int = 12
    inputs: int = 3
    teachers: int = 2
    teacher: float = 1.5
    init: float = 0.7
    noise: float = 1.0
    samples: int = 64
    etas: tuple[float, ...] = (0.01, 0.03, 0.06)
    batches: tuple[int, ...] = (1, 4, 16)
    steps: int = 4000
    tolerances: tuple[float, ...] = (0.05, 0.1, 0.2)
    seeds: tuple[int, ...] = tuple(range(8))


def simulate_shrink(config: ShrinkConfig, batch: int) -> Tensor:
    """Neuron rows (w_j, v_j) after training, (seeds, etas, width, inputs + 1)."""
    draws, eta = Ensemble(config.seeds), torch.tensor(config.etas, dtype=torch.float64)[None, :, None, None]
    data, teacher = draws.normal(config.samples, config.inputs), draws.normal(config.teachers, config.inputs)
    clean = torch.nn.functional.gelu(data @ teacher.mT * (config.teacher / config.inputs**0.5)).sum(-1)
    w = config.init * draws.normal(config.width, config.inputs)[:, None].expand(-1, len(config.etas), -1, -1)
    v = config.init * draws.normal(config.width, 1)[:, None].expand(-1, len(config.etas), -1, -1)
    for _ in range(config.steps):
        pick = draws.integers(config.samples, batch)
        x = data.gather(1, pick[..., None].expand(-1, -1, config.inputs))[:, None]
        y = (clean.gather(1, pick) + config.noise * draws.normal(batch))[:, None, None]
        value, rise = _gelu_and_slope(w @ x.mT)
        error = ((v * value).sum(2, keepdim=True) - y) / batch
        w, v = w - eta * (error * v * rise) @ x, v - eta * (error * value).sum(-1, keepdim=True)
    return torch.cat([w, v], dim=-1)


def shrink(config: ShrinkConfig) -> Part:
    """Headline: the fraction of independent neurons falls with the learning rate and with a smaller batch."""
    rows = {batch: simulate_shrink(config, batch) for batch in config.batches}
    tables = {tol: torch.stack([_fractions(rows[batch], tol) for batch in config.batches]) for tol in config.tolerances}
    main = tables[config.tolerances[len(config.tolerances) // 2]]
    by_rate, by_batch = main[0, :, 0] - main[0, :, -1], main[-1, :, -1] - main[0, :, -1]
    small, large = config.batches[0], config.batches[-1]
    low, high = config.etas[0], config.etas[-1]
    checks = (
        holds(
            f"batch {small}: independent fraction at eta {low} minus at {high}, less 3 standard errors",
            by_rate.mean() - 3 * standard_error(by_rate),
            at_least=0.0,
            source=f"{SLUG} headline, R7",
            spread=by_rate,
        ),
        holds(
            f"eta {high}: independent fraction with batch {large} minus with {small}, less 3 standard errors",
            by_batch.mean() - 3 * standard_error(by_batch),
            at_least=0.0,
            source=f"{SLUG} headline, R7",
            spread=by_batch,
        ),
        holds(
            "both hold at every tolerance of the metric: smallest mean difference",
            [min(float((t[0, :, 0] - t[0, :, -1]).mean()), float((t[-1, :, -1] - t[0, :, -1]).mean())) for t in tables.values()],
            at_least=0.0,
            source=f"{SLUG} R7 pitfalls",
        ),
        control(
            f"little noise (batch {large}, eta {low}): independent fraction",
            main[-1, :, 0].mean(),
            at_least=0.9,
            source=f"{SLUG} headline",
            spread=main[-1, :, 0],
        ),
    )
    series = [
        {
            "name": f"batch {batch}",
            "x": list(config.etas),
            "y": plain(main[i].mean(0)),
            "low": plain(main[i].amin(0)),
            "high": plain(main[i].amax(0)),
        }
        for i, batch in enumerate(config.batches)
    ]
    figure = Figure(
        "Independent neurons after training",
        {"series": series, "x": "learning rate", "y": "fraction"},
        curves,
        "Mean of the seeds; the band runs from the smallest to the largest.",
    )
    return Part(checks, (figure,))


def _fractions(rows: Tensor, tolerance: float) -> Tensor:
    """Independent fraction (seeds, etas) of rows (seeds, etas, width, d)."""
    found = [independent_neurons(layer, tolerance, tolerance).fraction for layer in rows.flatten(0, 1)]
    return torch.tensor(found, dtype=torch.float64).reshape(rows.shape[:2])


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    quartic: QuarticConfig | None = QuarticConfig()
    maximum: MaximumConfig | None = MaximumConfig()
    plane: PlaneConfig | None = PlaneConfig()
    threshold: ThresholdConfig | None = ThresholdConfig()
    drop: DropConfig | None = DropConfig()
    neuron: NeuronConfig | None = NeuronConfig()
    invariant: InvariantConfig | None = InvariantConfig()
    merge: MergeConfig | None = MergeConfig()
    metric: MetricConfig | None = MetricConfig()
    shrink: ShrinkConfig | None = ShrinkConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Stochastic Collapse: How Gradient Noise Attracts SGD Dynamics Towards Simpler Subnetworks",
    paper="Feng Chen, Daniel Kunin, Atsushi Yamamura, Surya Ganguli, NeurIPS 2023, arXiv 2306.04251",
    claims=(
        "A set no gradient step can leave attracts SGD when the log-distance to it drifts down, even at a maximum of the mean loss.",
        "Label noise soft-thresholds the modes of a linear network; a later learning-rate drop keeps what that removed.",
        "Zero neurons and equal neurons are such sets, for every optimiser; at a large learning rate SGD merges two neurons.",
    ),
    presets={
        "smoke": Config(
            quartic=QuarticConfig(chains=600, zetas=(1.0,), collapsing=(2.5,)),
            maximum=MaximumConfig(etas=(0.4, 0.47, 0.53, 0.6), repelled=(0.4,), collapsing=(0.6,), chains=1000),
            plane=PlaneConfig(
                spreads=(0.0, 3.141592653589793), etas=(0.3, 0.6, 0.8), chains=200, matrices=1000, exponent_chains=24, steps=3000
            ),
            threshold=ThresholdConfig(chains=300),
            drop=None,
            shrink=None,
            neuron=NeuronConfig(levels=(0.6, 1.5), chains=300, horizon=80.0, slope_from=30.0, dt=0.04),
            invariant=InvariantConfig(rules=("momentum", "adam"), steps=80),
            merge=MergeConfig(apart=(0.1,), between=(), many_seeds=tuple(range(8))),
        ),
        "default": Config(),
        "full": Config(
            quartic=QuarticConfig(chains=4000, zetas=(0.5, 1.0, 1.2, 1.4), collapsing=(2.2, 2.5, 3.0), seeds=tuple(range(5))),
            maximum=MaximumConfig(chains=8000, etas=(0.3, 0.4, 0.45, 0.47, 0.53, 0.55, 0.6, 0.7), seeds=tuple(range(5))),
            plane=PlaneConfig(etas=(0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8), seeds=tuple(range(5))),
            threshold=ThresholdConfig(chains=2000, seeds=tuple(range(5))),
            drop=DropConfig(chains=1000, phases=(0, 500, 1000, 3000), seeds=tuple(range(5))),
            neuron=NeuronConfig(levels=(0.6, 0.8, 0.9, 1.1, 1.25, 1.5), chains=500, seeds=tuple(range(5))),
            merge=MergeConfig(many_seeds=tuple(range(400))),
        ),
    },
    experiments={
        "quartic": quartic,
        "maximum": maximum,
        "plane": plane,
        "threshold": threshold,
        "drop": drop,
        "neuron": neuron,
        "invariant": invariant,
        "merge": merge,
        "metric": metric,
        "shrink": shrink,
    },
)
