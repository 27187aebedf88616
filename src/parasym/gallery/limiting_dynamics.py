"""The limiting dynamics of SGD: modified loss, phase-space oscillations, anomalous diffusion.

Slug limiting-dynamics. Momentum SGD on a quadratic with noise proportional to the Hessian is an underdamped Langevin equation:
means oscillate per mode, the stationary law is a Gibbs law of a modified loss with currents that never stop, and displacement
grows with an exponent the spectrum sets. v = -m (torch's buffer); t = eta k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.digits import digits, networks, outputs
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble as Draws
from parasym.simulate import Average, Displacement, Ensemble, Increments, Run, diffusion_exponent
from parasym.solvable.contract import number
from parasym.solvable.engines import lbfgs_restarts
from parasym.solvable.langevin import Underdamped
from parasym.solvable.models import momentum_modes, signed_areas
from parasym.solvable.regression import batch_covariance

SLUG = "limiting-dynamics"


def simulate(d: Underdamped, replicas: int, steps: int, observe: list[Any], seed: int, noise: tuple[float, ...] | None = None) -> Run:
    """Momentum SGD on the modes of ``d``, from its exact stationary law."""
    params = {"lr": d.lr, "beta": d.momentum, "wd": d.decay}
    return Ensemble(momentum_modes(d, noise), replicas, params, seed).run(steps, observe)


# ------------------------------------------------------------------------------------------------ R1, R2


@dataclass(frozen=True)
class MeanConfig:
    """The mean of momentum SGD is momentum gradient descent: compared with R1 for shrinking learning rates at a fixed time."""

    rho: tuple[float, ...] = (0.05, 1.0, 4.0)
    momentum: float = 0.9
    rates: tuple[float, ...] = (0.02, 0.005, 0.00125)
    steps: int = 300


def means(config: MeanConfig) -> Part:
    """R1, R2: damped oscillation of each mode, first order in the learning rate."""
    worst: list[list[float]] = []
    series = []
    for lr in config.rates:
        # the dissipation of momentum is kept: (1 - beta) scales with the learning rate's root, so that every regime stays itself
        d = Underdamped(config.rho, lr, 1 - (1 - config.momentum) * (lr / config.rates[0]) ** 0.5)
        theta, m = np.ones(len(config.rho)), np.zeros(len(config.rho))
        steps = round(config.steps * (config.rates[0] / lr) ** 0.5)
        path = [theta]
        for _ in range(steps):
            m = d.momentum * m + d.modes * theta
            theta = theta - lr * m
            path.append(theta)
        flow = np.array([d.propagator(lr * k)[:, 0, 0] for k in range(steps + 1)])
        worst.append(np.abs(np.array(path) - flow).max(0).tolist())
        if lr == config.rates[0]:
            for k, rho in enumerate(config.rho):
                series.append({"name": f"rho = {rho}", "x": list(range(steps + 1)), "y": [float(p[k]) for p in path], "colour": k})
                series.append(
                    {"name": f"R1, rho = {rho}", "x": list(range(steps + 1)), "y": flow[:, k].tolist(), "mark": "dash", "colour": k}
                )
            regimes = d.regime()
            frequency = _frequency(np.array(path)[:, -1])
            predicted = float(np.sqrt(d.omega[-1] ** 2 - d.gamma**2) * lr)
    shrink = [a / b for before, after in pairwise(worst) for a, b in zip(after, before, strict=True)]
    checks: tuple[Check, ...] = (
        holds("largest distance of momentum descent to the modified flow, every mode", worst[0], at_most=0.12, source=f"{SLUG} R1"),
        holds(
            "it shrinks as the root of the learning rate or faster: ratio when eta is quartered", shrink, at_most=0.62, source=f"{SLUG} R1"
        ),
        match("oscillation frequency of the stiffest mode, per step", predicted, frequency, 0.03, source=f"{SLUG} R1", relative=True),
        holds("the stiff modes are underdamped (1)", [float(r == "underdamped") for r in regimes[1:]], at_least=1, source=f"{SLUG} R1"),
        control(
            "without momentum none is (1)",
            [float(r == "overdamped") for r in Underdamped(config.rho, 0.02, 0.0).regime()],
            at_least=1,
            source=f"{SLUG} R1",
        ),
    )
    checks += _transient(config)
    return Part(checks, (Figure("Mean of each mode", {"series": series, "x": "step", "y": "theta"}, curves),))


def _transient(config: MeanConfig) -> tuple[Check, ...]:
    """R2: covariance on the way from a point, against the recursion of second moments of momentum SGD."""
    gaps = []
    for lr in (config.rates[0], config.rates[0] / 4):
        d = Underdamped(config.rho, lr, 1 - (1 - config.momentum) * (lr / config.rates[0]) ** 0.5)
        steps = round(120 * (config.rates[0] / lr) ** 0.5)
        gaps.append(float(np.abs(spreading(d, d.modes, [steps])[0] / d.covariance(lr * steps)[:, 0, 0] - 1).max()))
    return (
        holds("variance on the way from a point: largest relative distance to B - E B E^T", gaps[0], at_most=0.1, source=f"{SLUG} R2"),
        holds("it shrinks as the root of the learning rate or faster", gaps[1] / gaps[0], at_most=0.62, source=f"{SLUG} R2"),
    )


def spreading(d: Underdamped, noise: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Variances (steps, modes) of theta from a point, by recursion of second moments; ``noise`` is the gradient's variance in each mode."""
    f, drive = d.discrete_map(), np.array([-d.lr, 1.0])
    p, kicks, seen = np.zeros_like(f), noise[:, None, None] * np.outer(drive, drive), []
    for step in range(1, max(steps) + 1):
        p = f @ p @ np.swapaxes(f, 1, 2) + kicks
        if step in steps:
            seen.append(p[:, 0, 0])
    return np.array(seen)


def _frequency(path: np.ndarray) -> float:
    """Angular frequency from the times of sign change, interpolated."""
    turns = np.flatnonzero(path[:-1] * path[1:] < 0)
    at = turns + path[turns] / (path[turns] - path[turns + 1])
    return float(np.pi * (len(at) - 1) / (at[-1] - at[0]))


# ------------------------------------------------------------------------------------------------ R3, R4, R5, A1, A2, A4


@dataclass(frozen=True)
class StationaryConfig:
    """Five modes, eta = .05, beta = .9, with and without decay."""

    rho: tuple[float, ...] = (2.0, 1.0, 0.5, 0.2, 0.05)
    lr: float = 0.05
    momentum: float = 0.9
    decay: float = 0.1
    batch: int = 32
    replicas: int = 20_000
    steps: int = 200
    settings: tuple[tuple[float, float], ...] = ((0.05, 0.9), (0.2, 0.9), (0.1, 0.0), (0.02, 0.99))
    seeds: tuple[int, ...] = (0, 1, 2)


def stationary(config: StationaryConfig) -> Part:
    """A1, A2, A4, R3, R4, R5: variances, isotropy of the modified loss, and the currents."""
    n = len(config.rho)
    checks: list[Check] = []
    for decay in (0.0, config.decay):
        d = Underdamped(config.rho, config.lr, config.momentum, decay, config.batch)
        exact = d.discrete_stationary()
        squares = Average(lambda s, p: [x * x for x in s])
        local = Increments(lambda old, new, p: [sum(((a - b) * (a - b) for a, b in zip(new[:n], old[:n], strict=True)), 0.0)])
        areas = Increments(lambda old, new, p: [*signed_areas(old, new, n), new[0] * old[1] - old[0] * new[1]])
        seen, ratios, turns, steps = [], [], [], []
        idle: list[float] = []
        for seed in config.seeds:
            run = simulate(d, config.replicas, config.steps, [squares, local, areas], seed)
            values = torch.as_tensor(run[0].value)
            seen.extend((values / torch.from_numpy(np.concatenate([exact[:, 0, 0], exact[:, 1, 1]]))).tolist())
            ratios.extend((values[:n] / values[0]).tolist())
            turns.extend(torch.as_tensor(run[2].value)[:n].tolist())
            idle.append(abs(float(run[2].value[n])) / float(run[2].stderr[n]))
            steps.append(float(run[1].value[0]))
        words = f"decay {decay}"
        checks.append(
            match(f"variances of theta and m over the exact discrete ones, {words}", 1.0, seen, 0.04, source=f"{SLUG} A1", spread=seen)
        )
        share = (exact[:, 0, 0] / exact[0, 0, 0]).tolist()
        checks.append(
            match(
                f"position variances over the first, {words}", share * len(config.seeds), ratios, 0.06, source=f"{SLUG} A2", relative=True
            )
        )
        checks.append(
            match(
                f"signed area per step, -eta s^2 rho / (S (1-beta)), {words}",
                d.area_rate().tolist() * len(config.seeds),
                turns,
                0.02,
                source=f"{SLUG} A4",
                relative=True,
                spread=turns,
            )
        )
        checks.append(control(f"area in the plane of two positions, in standard errors, {words}", idle, at_most=4.0, source=f"{SLUG} A4"))
        step = float(d.displacement([1])[0])
        checks.append(match(f"squared step at stationarity, {words}", step, steps, 0.01, source=f"{SLUG} R5", relative=True, spread=steps))
        checks.append(
            match(
                f"which is eta^2 s^2 Tr H / (S (1-beta^2)) to first order, {words}",
                d.local_displacement(),
                step,
                0.04,
                source=f"{SLUG} R5",
                relative=True,
            )
        )
    return Part((*checks, *_white(config), *_formulas(config)))


def _white(config: StationaryConfig) -> list[Check]:
    """Control of A2: white noise instead of noise proportional to H."""
    d = Underdamped(config.rho, config.lr, config.momentum, 0.0, config.batch)
    noise = tuple(config.rho[0] / config.batch for _ in config.rho)
    exact = d.discrete_stationary()[:, 0, 0] / d.modes
    ratios = []
    for seed in config.seeds:
        values = torch.as_tensor(
            simulate(d, config.replicas, config.steps, [Average(lambda s, p: [x * x for x in s[: len(config.rho)]])], seed, noise)[0].value
        )
        ratios.extend((values / values[0]).tolist())
    n = len(config.rho)
    last = [ratios[k * n + n - 1] for k in range(len(config.seeds))]
    return [
        match(
            "white noise: position variances over the first",
            (exact / exact[0]).tolist() * len(config.seeds),
            ratios,
            0.06,
            source=f"{SLUG} A2",
            relative=True,
        ),
        control("white noise is far from isotropic: softest over stiffest", last, at_least=20.0, source=f"{SLUG} A2", spread=last),
    ]


def _formulas(config: StationaryConfig) -> list[Check]:
    """R3's factor, R4's factorisation and the isotropy of the modified loss, without sampling."""
    gaps: list[float] = []
    factor, inverse, flat = [], [], []
    for lr, beta in config.settings:
        for decay in (0.0, config.decay):
            d = Underdamped(config.rho, lr, beta, decay, config.batch)
            exact, langevin = d.discrete_stationary(), d.stationary()
            gaps.extend(float(np.abs(exact[:, k, k] / langevin[:, k, k] / d.correction() - 1).max()) for k in (0, 1))
            a, spread, q, u, kappa = d.phase_space()
            factor.append(float(np.abs((spread + q) @ u - a).max() / np.abs(a).max()))
            b = solve_continuous_lyapunov(a, 2 / kappa * spread)
            inverse.append(float(np.abs(u @ (kappa * b) - np.eye(len(a))).max()))
            if decay == 0:
                n = len(config.rho)
                flat.append(float(np.abs(u[:n, :n] * (lr * (1 + beta)) / 2 - np.eye(n)).max()))
    d = Underdamped(config.rho, config.lr, config.momentum, config.decay, config.batch)
    return [
        match(
            "exact discrete over Langevin variance is 1/(1 - eta (rho+wd)/(2(1+beta))): largest relative gap",
            0.0,
            gaps,
            1e-10,
            source=f"{SLUG} R3",
        ),
        control("the factor is not one: at rho = 2", float(d.correction()[0] - 1), at_least=0.02, source=f"{SLUG} R3"),
        match("A = (D + Q) U: residual", 0.0, factor, 1e-12, source=f"{SLUG} R4"),
        match("U is the inverse of kappa times the stationary covariance", 0.0, inverse, 1e-8, source=f"{SLUG} R4"),
        match(
            "without decay the modified loss is isotropic in positions: distance to 2/(eta(1+beta)) times one",
            0.0,
            flat,
            1e-12,
            source=f"{SLUG} R4",
        ),
    ]


# ------------------------------------------------------------------------------------------------ R6, R7, A3


@dataclass(frozen=True)
class DiffusionConfig:
    """100 modes i^-1.5, eta = .1, beta = .9, from the stationary law."""

    modes: int = 100
    power: float = 1.5
    lr: float = 0.1
    momentum: float = 0.9
    longest: int = 1000
    fitted: int = 20
    replicas: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)


def diffusion(config: DiffusionConfig) -> Part:
    """A3, R6, R7: mean squared displacement and its exponent, set by the spectrum."""
    rho = tuple(float(k**-config.power) for k in range(1, config.modes + 1))
    d = Underdamped(rho, config.lr, config.momentum)
    window = sorted({round(x) for x in np.geomspace(30, config.longest, config.fitted)})
    lags = sorted({1, 2, 3, 5, 8, 12, 18, *window})
    exact = d.displacement(lags)
    theory = d.exponent(window)
    off, exponents, series = [], [], []
    for seed in config.seeds:
        found = simulate(d, config.replicas, max(lags), [Displacement(lags, lambda s, p: s[: config.modes])], seed)[0]
        value = torch.as_tensor(found.value)
        off.append(float((value / torch.from_numpy(exact) - 1).abs().max()))
        kept = [lags.index(k) for k in window]
        exponents.append(number(diffusion_exponent(type(found)(value[kept]), window)))
        series.append({"name": f"seed {seed}", "x": lags, "y": value.tolist(), "mark": "points"})
    long = d.displacement([500, 1000]) / d.displacement([500, 1000], exact=False) - 1
    ballistic = float(np.log(exact[lags.index(2)] / exact[0]) / np.log(2))
    # R7: density of modes ~ h^(-1-1/alpha) gives k^(1/alpha) before the cut-off; a longer spectrum comes closer
    wide = Underdamped(tuple(float(k**-config.power) for k in range(1, 100_001)), config.lr, config.momentum)
    scaling = wide.exponent([200, 400, 800, 1600], exact=False)
    free = Underdamped(rho, config.lr, 0.0).exponent(window)
    checks = (
        holds(
            "largest relative deviation of the sampled displacement from the exact discrete one",
            off,
            at_most=0.05,
            source=f"{SLUG} A3",
            spread=off,
        ),
        match("diffusion exponent over k in [30, 1000]", theory, exponents, 0.02, source=f"{SLUG} A3", spread=exponents),
        control("diffusion is anomalous: distance of the exponent from one", [1 - x for x in exponents], at_least=0.3, source=f"{SLUG} R7"),
        holds("ballistic at first: exponent between steps 1 and 2", ballistic, at_least=1.7, source=f"{SLUG} R7"),
        match("Langevin form over the exact one at k = 500, 1000", 0.0, long.tolist(), 0.01, source=f"{SLUG} R6"),
        match("with a long spectrum the exponent is 1/alpha", 1 / config.power, scaling, 0.03, source=f"{SLUG} R7"),
        control("the exponent depends on momentum: without it, minus with it", free - theory, at_least=0.02, source=f"{SLUG} R7"),
    )
    series.append({"name": "exact", "x": lags, "y": exact.tolist()})
    figure = Figure("Mean squared displacement", {"series": series, "x": "steps", "y": "E|theta_k - theta_0|^2", "log": "xy"}, curves)
    return Part(checks, (figure,))


# ------------------------------------------------------------------------------------------------ R8


@dataclass(frozen=True)
class NetworkConfig:
    """A 64-6-1 tanh net on even/odd digits, (f - y)^2 / 2 and decay .01: trained to its minimum, then momentum SGD from there with
    batches of 64 drawn with replacement. Records on a logarithmic grid; fits on its last two thirds (needs scikit-learn)."""

    hidden: int = 6
    decay: float = 0.01
    lr: float = 0.01
    momentum: float = 0.9
    batch: int = 64
    stiff: int = 10
    replicas: int = 64
    steps: int = 1000
    records: int = 24
    kick: float = 5.0
    kicked: int = 256
    kicked_steps: int = 60
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, eq=False)
class Trained:
    """A net at its minimum: weights (p,), and in the eigenbasis of the Hessian its curvatures (p,) and the batch noise in each (p,)."""

    images: Tensor
    labels: Tensor
    weights: Tensor
    basis: Tensor
    dynamics: Underdamped
    noise: np.ndarray


def trained(config: NetworkConfig, seed: int) -> Trained:
    """Minimise by L-BFGS and measure Hessian and per-sample gradients there."""
    split = digits()
    x, y = split.x.double(), (split.y % 2).double() * 2 - 1
    shapes = [(65, config.hidden), (config.hidden + 1, 1)]

    def output(flat: Tensor, images: Tensor) -> Tensor:
        return outputs([w[None] for w in layers(flat, shapes)], images, torch.tanh)[0, :, 0]

    def loss(flat: Tensor) -> Tensor:
        return 0.5 * (output(flat, x) - y).square().mean() + 0.5 * config.decay * flat.square().sum()

    start = torch.cat([w.detach().double().flatten() for w in networks(Draws((seed,)), (64, config.hidden, 1))])
    weights = lbfgs_restarts(lambda w: loss(w["w"]), [{"w": start}], max_iter=6000).best["w"]
    values, basis = torch.linalg.eigh(torch.func.hessian(loss)(weights))
    sample = torch.func.grad(lambda flat, a, b: 0.5 * (output(flat, a[None])[0] - b).square())
    gradients = torch.func.vmap(sample, (None, 0, 0))(weights, x, y) @ basis
    noise = np.diag(batch_covariance(gradients.numpy(), config.batch))
    modes = Underdamped(tuple((values - config.decay).tolist()), config.lr, config.momentum, config.decay)
    return Trained(x.float(), y.float(), weights, basis, modes, noise)


def layers(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The two layers, bias in the last row, of flat weights (..., p)."""
    parts = flat.split([a * b for a, b in shapes], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def descended(config: NetworkConfig, net: Trained, start: Tensor, steps: Sequence[int], seed: int) -> Tensor:
    """Weights of momentum SGD from ``start`` (replicas, p) in the eigenbasis, measured from the minimum, at each of ``steps``."""
    shapes = [(65, config.hidden), (config.hidden + 1, 1)]
    draw = torch.Generator().manual_seed(seed)
    weights = [w.contiguous() for w in layers(start.float(), shapes)]
    buffers = [torch.zeros_like(w) for w in weights]
    seen = []
    for step in range(1, max(steps) + 1):
        rows = torch.randint(len(net.images), (len(start), config.batch), generator=draw)
        x, y = net.images[rows], net.labels[rows, None]
        inner = torch.tanh(torch.baddbmm(weights[0][:, -1:], x, weights[0][:, :-1]))
        residual = (torch.baddbmm(weights[1][:, -1:], inner, weights[1][:, :-1]) - y) / config.batch
        back = residual * weights[1][:, :-1].mT * (1 - inner.square())
        for w, m, below, error in zip(weights, buffers, (x, inner), (back, residual), strict=True):
            gradient = torch.cat([below.mT @ error, error.sum(1, keepdim=True)], 1) + config.decay * w
            w -= config.lr * m.mul_(config.momentum).add_(gradient)
        if step in steps:
            seen.append((torch.cat([w.flatten(1) for w in weights], 1).double() - net.weights) @ net.basis)
    return torch.stack(seen)


def network(config: NetworkConfig) -> Part:
    """R8: a real net from its minimum. Stiff modes move as the theory of each says, and oscillate at its frequency; the soft ones, where
    neither curvature nor noise stays what it was, carry the whole farther than the quadratic does."""
    lags = sorted({round(k) for k in np.geomspace(1, config.steps, config.records)})
    late = lags[len(lags) // 3 :]
    spread: list[float] = []
    white: list[float] = []
    slopes: list[float] = []
    expected: list[float] = []
    turns, rates, inside, series = [], [], [], []
    for seed in config.seeds:
        net = trained(config, seed)
        theory = spreading(net.dynamics, net.noise, lags)
        moved = descended(config, net, net.weights.expand(config.replicas, -1), lags, seed).square().mean(1).numpy()
        kept = [lags.index(k) for k in late]
        even = spreading(net.dynamics, np.full_like(net.noise, net.noise.mean()), lags)
        for law, into in ((theory, spread), (even, white)):
            into.append(float((moved[kept, -config.stiff :] / law[kept, -config.stiff :]).mean()))
        for total, into in ((theory.sum(1), expected), (moved.sum(1), slopes)):
            into.append(float(np.polyfit(np.log(late), np.log(total[kept]), 1)[0]))
            series.append({"name": f"seed {seed}, {'quadratic' if into is expected else 'SGD'}", "x": lags, "y": total.tolist(),
                           "mark": "line" if into is expected else "points", "colour": seed})  # fmt: skip
        d = replace(net.dynamics, rho=net.dynamics.rho[-1:])
        every = range(1, config.kicked_steps + 1)
        sd = np.sqrt(spreading(d, net.noise[-1:], every)[:, 0])
        start = net.weights + config.kick * sd[-1] * net.basis[:, -1]
        path = descended(config, net, start.expand(config.kicked, -1), every, seed + 100)[:, :, -1].numpy()
        flow = config.kick * sd[-1] * np.array([np.linalg.matrix_power(d.discrete_map()[0], k)[0, 0] for k in every])
        turns.append(_frequency(path.mean(1)[: config.kicked_steps // 2]))
        rates.append(float(np.sqrt(d.omega[0] ** 2 - d.gamma**2) * d.lr))
        inside.append(float((np.abs(path - flow[:, None]) < sd[:, None]).mean()))
    source = f"{SLUG} R8"
    figure = Figure(
        "a net on digits, from its minimum", {"series": series, "x": "steps", "y": "|theta_k - theta_0|^2", "log": "xy"}, curves
    )
    return Part(
        (
            match(f"digits: squared displacement of the {config.stiff} stiffest modes over the theory's, mean of the late records", 1.0,
                  spread, 3 * (2 / (config.replicas * config.stiff)) ** 0.5, source=source, spread=spread),
            control("the same, had the noise no preferred direction", white, at_least=2.0, source=source),
            match("kicked along the stiffest: frequency of the mean, per step", rates, turns, 0.03, source=source, relative=True),
            match("share of runs within one standard deviation of the mean's theory", math.erf(0.5**0.5), inside, 0.03, source=source),
            control("displacement of all weights is anomalous: its exponent", slopes, at_most=0.7, source=source, spread=slopes),
            refuted("that exponent is the quadratic's: distance", [a - b for a, b in zip(slopes, expected, strict=True)], at_most=0.02,
                    source=source),
        ),
        (figure,),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    means: MeanConfig | None = MeanConfig()
    stationary: StationaryConfig | None = StationaryConfig()
    diffusion: DiffusionConfig | None = DiffusionConfig()
    network: NetworkConfig | None = NetworkConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {"means": means, "stationary": stationary, "diffusion": diffusion, "network": network}

ENTRY = Entry(
    slug=SLUG,
    title="The Limiting Dynamics of SGD: Modified Loss, Phase-Space Oscillations, and Anomalous Diffusion",
    paper="Daniel Kunin, Javier Sagastuy-Brena, Lauren Gillespie, Eshed Margalit, Hidenori Tanaka, Surya Ganguli, Daniel Yamins, "
    "Neural Computation 2024, arXiv 2107.09133",
    claims=(
        "Near a minimum momentum SGD is an underdamped Langevin equation: every mode oscillates at a frequency of its own.",
        "Its stationary law is a Gibbs law of a modified loss, isotropic without decay, with currents in phase space.",
        "Displacement grows with an anomalous exponent set by the Hessian spectrum and the hyperparameters.",
    ),
    presets={
        "smoke": Config(
            stationary=StationaryConfig(replicas=8000, steps=400),
            diffusion=None,
            network=None,
        ),
        "default": Config(),
        "full": Config(
            stationary=StationaryConfig(replicas=100_000, seeds=tuple(range(5))),
            diffusion=DiffusionConfig(modes=400, longest=3000, fitted=30, replicas=4000, seeds=tuple(range(5))),
            network=NetworkConfig(hidden=16, replicas=256, steps=4000, kicked=1024),
        ),
    },
    experiments=_EXPERIMENTS,
)
