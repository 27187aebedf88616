"""Closed forms against an independent route each (quadrature, ODE solver, linear solve, enumeration, autodiff), and the models."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, stats

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable import (
    AdaptiveStep,
    DataRegression,
    Discrete,
    LabelNoiseRegression,
    LocalMaximum,
    LogLossSDE,
    Model,
    MomentumModes,
    Normal,
    NotSolvable,
    QuadraticSGD,
    RandomCurvature,
    TwoLayerOrigin,
    Uniform,
    adaptive,
    escape,
    factors,
    regression,
    stationary,
)
from parasym.solvable.contract import Measurement, Prediction, beside, number
from parasym.solvable.langevin import Underdamped

RNG = np.random.default_rng(0)


def spd(d: int, seed: int) -> np.ndarray:
    b = np.random.default_rng(seed).normal(size=(d, d))
    return b @ b.T / d + 0.1 * np.eye(d)


# ------------------------------------------------------------------------------------------------ factors


@pytest.mark.parametrize("lr", [1e-3, 0.02, 0.198, 0.5, 1.0, 2.5, 30.0])
def test_normal_exponent_is_the_integral(lr: float) -> None:
    law = Normal(-0.1, 1.0)

    def integrand(h: float) -> float:
        return stats.norm.pdf(h, law.mu, law.sd) * math.log(abs(1 - lr * h))

    cuts = sorted({-9.0, 9.0, *([1 / lr] if 1 / lr < 9 else []), 0.0})
    exact = sum(integrate.quad(integrand, a, b, limit=400, epsabs=1e-14, epsrel=1e-13)[0] for a, b in itertools.pairwise(cuts))
    assert abs(law.log_factor(lr) - exact) < 2e-13 * max(1, abs(exact)) + 1e-14
    for order in (1, 2, 3.5):
        exact = integrate.quad(
            lambda h, order=order: stats.norm.pdf(h, law.mu, law.sd) * abs(1 - lr * h) ** order,
            -12,
            12,
            points=[min(1 / lr, 11)],
            limit=400,
        )[0]
        assert abs(law.moment(lr, order) / exact - 1) < 1e-7


def test_normal_exponent_is_continuous_where_the_series_takes_over() -> None:
    s = 1 / math.sqrt(2000)
    below, above = factors.log_of_normal(1.0, s * (1 + 1e-12)), factors.log_of_normal(1.0, s * (1 - 1e-12))
    assert abs(below - above) < 1e-14


@pytest.mark.parametrize("lr", [0.1, 0.7, 1.3, 5.0])
def test_uniform_exponent_is_the_integral(lr: float) -> None:
    law = Uniform(-0.5, 2.0)
    cuts = sorted({-0.5, 2.0, *([1 / lr] if 1 / lr < 2 else [])})
    exact = sum(
        integrate.quad(lambda h: math.log(abs(1 - lr * h)) / 2.5, a, b, limit=400, epsabs=1e-13)[0] for a, b in itertools.pairwise(cuts)
    )
    assert abs(law.log_factor(lr) - exact) < 1e-10
    exact = integrate.quad(lambda h: abs(1 - lr * h) ** 1.5 / 2.5, -0.5, 2.0, points=[min(1 / lr, 1.9)])[0]
    assert abs(law.moment(lr, 1.5) - exact) < 1e-8


def test_mean_of_a_batch_is_the_enumeration() -> None:
    law = Discrete((1.0, -0.8, 0.3), (0.5, 0.3, 0.2))
    batch = 4
    exact = math.fsum(
        math.prod(law.weights[i] for i in draw) * math.log(abs(1 - 0.7 * sum(law.values[i] for i in draw) / batch))
        for draw in itertools.product(range(3), repeat=batch)
    )
    assert abs(law.averaged(batch).log_factor(0.7) - exact) < 1e-13
    assert abs(law.averaged(batch).variance - law.variance / batch) < 1e-14


def test_published_exponents_and_roots() -> None:
    law = Normal(-0.1, 1.0)
    for lr, value in {0.1: 0.0050, 0.2: -0.0007, 0.5: -0.110, 1.0: -0.135, 2.5: 0.401}.items():
        assert abs(law.log_factor(lr) - value) < 1e-3
    # the second-order threshold -2 E h / E h^2 is close to the first root
    first = factors.critical_rates(law)[0]
    assert abs(number(first) - 0.198) < 0.01 and first.residual < 1e-12
    chi = Normal(0.1, 1.0)
    signs = [chi.averaged(s).log_factor(-1.0) for s in (1, 2, 4, 8, 16, 64)]
    assert np.allclose(signs, [-0.135, -0.136, -0.050, 0.030, 0.067, 0.089], atol=6e-4)
    assert 4 < number(factors.critical_batch(chi, 1.0)) <= 8
    largest = factors.largest_stable_rate([0.5, 1.0, 4.0])
    assert abs(number(largest) - 2.2106) < 1e-4 and number(largest) > 1 / 0.5
    assert abs(factors.moment_limit(Discrete((0.5, 1.0, 4.0))) - 0.6377) < 1e-4


def test_a_zero_factor_is_said_not_clipped() -> None:
    found = factors.exponent(Discrete((2.0, 1.0)), 0.5)
    assert found.status == "not_applicable" and "minus infinity" in found.note
    assert Discrete((2.0, 1.0)).log_factor(0.5) == -math.inf


@pytest.mark.parametrize("eps", [1e-2, 1e-3, 0.0, -1e-3])
def test_the_slow_escape_is_designed_exactly(eps: float) -> None:
    c = factors.design_slow_escape(eps, 0.1, 3.0)
    assert abs(Discrete((3.0, -c)).log_factor(0.1) - eps) < 1e-15


def test_the_second_order_exponent_is_off_by_the_third_power() -> None:
    law = Normal(-0.1, 1.0)
    gaps = [abs(factors.small_rate_exponent(law, lr) - law.log_factor(lr)) for lr in (0.01, 0.005, 0.0025)]
    # E h^3 = 3 mu v + mu^3 = -.301, and the fourth order is E h^4 = 3.06
    assert all(6 < a / b < 17 for a, b in itertools.pairwise(gaps)) and gaps[0] < 1e-6
    third = -(law.mean**3 + 3 * law.mean * law.variance) / 3
    fourth = -(law.mean**4 + 6 * law.mean**2 * law.variance + 3 * law.variance**2) / 4
    exact = law.log_factor(0.01) - factors.small_rate_exponent(law, 0.01)
    assert abs(exact / (third * 1e-6 + fourth * 1e-8) - 1) < 1e-2


# ------------------------------------------------------------------------------------------------ stationary covariance


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stationary_covariance_by_every_route(mu: float, seed: int) -> None:
    h, c = spd(4, seed), spd(4, seed + 10)
    lam = 0.1 * (spd(4, seed + 20))
    found = stationary.stationary_covariance(h, c, lam, mu)
    assert stationary.master_residual(found.value, h, c, lam, mu) < 1e-11
    # route 3: the sum over the impulse response
    f, drive = stationary.state_map(h, lam, mu), np.vstack([-lam, np.eye(4)])
    total, power = np.zeros((8, 8)), drive @ c @ drive.T
    for _ in range(int(40 * found.details["memory_steps"])):
        total += power
        power = f @ power @ f.T
    assert np.abs(total[:4, :4] / np.asarray(found.value) - 1).max() < 1e-8
    assert stationary.excess_loss_identity(found.value, h, c, lam, mu) < 1e-11
    scalar = stationary.stationary_covariance(h, c, 0.2, mu)
    assert np.abs(stationary.eigenbasis_covariance(h, c, 0.2, mu) - np.asarray(scalar.value)).max() < 1e-11
    assert abs(stationary.excess_loss(h, c, 0.2, mu) - 0.5 * np.trace(h @ np.asarray(scalar.value))) < 1e-11
    newton = stationary.stationary_covariance(h, c, 0.3 * np.linalg.inv(h), mu)
    assert np.abs(stationary.damped_newton(h, c, 0.3, mu) - np.asarray(newton.value)).max() < 1e-10
    n = 50.0
    bayes = stationary.stationary_covariance(h, c, stationary.bayes_preconditioner(h, c, n, mu), mu)
    assert np.abs(np.asarray(bayes.value) * n - np.linalg.inv(h)).max() < 1e-10
    overshot = stationary.stationary_covariance(h, c, 2 * (1 - mu) * np.linalg.inv(n * c), mu)  # control: the continuous rule
    assert np.abs(np.asarray(overshot.value) * n - np.linalg.inv(h)).max() > 1e-4
    damped = stationary.stationary_covariance(h, c, lam, mu, dampened=True)
    assert stationary.master_residual(damped.value, h, c, (1 - mu) * lam, mu) < 1e-11


def test_continuous_time_is_the_limit_of_small_rates() -> None:
    h, c = spd(3, 4), spd(3, 5)
    gaps = []
    for lr in (1e-2, 1e-3):
        exact = np.asarray(stationary.stationary_covariance(h, c, lr, 0.5).value)
        gaps.append(np.abs(stationary.continuous_covariance(h, c, lr, 0.5) / exact - 1).max())
    assert gaps[1] < 0.11 * gaps[0] < 0.02


def test_enhancement_and_limit() -> None:
    h, c = np.diag([1.0, 0.5, 0.1]), np.eye(3)
    ratio = np.diag(np.asarray(stationary.stationary_covariance(h, c, 1.2).value)) / np.diag(stationary.continuous_covariance(h, c, 1.2))
    assert np.allclose(np.sort(ratio), np.sort(stationary.enhancement(h, 1.2)), rtol=1e-12) and np.allclose(
        np.sort(ratio)[::-1], [2.5, 1 / 0.7, 1 / 0.94]
    )
    limit = stationary.stability_limit(h, 0.3)
    assert stationary.stationary_covariance(h, c, limit * 0.999, 0.3).ok
    assert stationary.stationary_covariance(h, c, limit * 1.001, 0.3).status == "not_applicable"


def test_the_temperature_of_escape_is_curvature_times_variance() -> None:
    for mu in (0.0, 0.6):
        sigma = np.asarray(stationary.stationary_covariance([[1.7]], [[0.4]], 0.5, mu).value).item()
        assert abs(number(stationary.escape_temperature(1.7, 0.4, 0.5, mu)) - 1.7 * sigma) < 1e-13
    assert stationary.escape_temperature(1.7, 0.4, 1.2).status == "not_applicable"


def test_flat_directions_diffuse_and_say_so() -> None:
    found = stationary.stationary_covariance(np.diag([1.0, 0.0]), np.eye(2), 0.1, 0.5)
    assert found.status == "not_applicable" and "diffuses" in found.note
    assert abs(float(found.details["diffusion_per_step"][1, 1]) - 0.01 / 0.25) < 1e-15


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_natural_gradient_is_its_fixed_point(trace: bool, mu: float) -> None:
    h = spd(3, 8)
    found = stationary.natural_gradient_iterated(h, 0.1, 4, mu, trace=trace)
    assert found.ok and np.abs(np.asarray(found.value) - stationary.natural_gradient(h, 0.1, 4, mu, trace=trace)).max() < 1e-8
    if trace:
        assert abs(regression.natural_gradient_factor(3, 0.1, 4, mu) - stationary.natural_gradient(np.eye(1), 0.1, 4, mu)[0, 0]) > 1e-4


def test_bayes_rate_is_the_minimum_of_the_divergence() -> None:
    h, c = np.diag([1.0, 0.3]), np.diag([2.0, 0.5])
    found = stationary.bayes_rate(h, c, 20.0)

    def divergence(lr: float) -> float:
        s = np.asarray(stationary.stationary_covariance(h, c, lr).value)
        return 0.5 * (20 * np.trace(h @ s) - 2 - np.linalg.slogdet(20 * h @ s)[1])

    assert divergence(number(found)) < min(divergence(number(found) * k) for k in (0.999, 1.001))


def test_kurtosis_of_stationary_weights() -> None:
    # published: 8.54 / 7.34 / 3.76 and 3.47 / 3.46 / 3.40 for Student-t with 5 degrees of freedom, excess kurtosis 6
    first = [stationary.impulse_kurtosis(h, 1.2, 0.0, 6.0) for h in (1.0, 0.5, 0.1)]
    second = [stationary.impulse_kurtosis(h, 0.4, 0.9, 6.0) for h in (1.0, 0.5, 0.1)]
    assert np.allclose(first, [8.54, 7.34, 3.76], atol=5e-3) and np.allclose(second, [3.47, 3.46, 3.40], atol=5e-3)
    x = -1.2 * (1 - 1.2) ** np.arange(400)  # by hand without momentum
    assert abs(first[0] - (3 + 6 * (x**4).sum() / (x**2).sum() ** 2)) < 1e-12


def test_adam_fixed_point_is_self_consistent() -> None:
    h, c = spd(3, 1), spd(3, 2)
    for lr, b1 in ((0.05, 0.0), (0.3, 0.0), (0.1, 0.9)):
        found = stationary.adaptive_covariance(h, c, lr, b1)
        v = np.asarray(found.details["v"])
        assert found.ok and np.abs(v - np.diag(c) - np.diag(h @ np.asarray(found.value) @ h)).max() < 1e-10
        assert stationary.master_residual(found.value, h, c, (1 - b1) * np.diag(lr / np.sqrt(v)), b1) < 1e-9


# ------------------------------------------------------------------------------------------------ minibatch noise


@pytest.mark.parametrize("replacement", [True, False])
def test_batch_covariance_by_enumeration(replacement: bool) -> None:
    g = RNG.normal(size=(7, 2))
    draws = itertools.product(range(7), repeat=3) if replacement else itertools.combinations(range(7), 3)
    means = np.array([g[list(draw)].mean(0) for draw in draws])
    centred = means - g.mean(0)
    exact = centred.T @ centred / len(means)
    assert np.abs(regression.batch_covariance(g, 3, replacement=replacement) - exact).max() < 1e-15
    assert np.abs(regression.batch_covariance(g, 3, replacement=not replacement) - exact).max() > 1e-3


@pytest.mark.parametrize(("lr", "mu", "batch"), [(0.3, 0.0, 4), (0.6, 0.0, 2), (0.1, 0.9, 4), (0.2, 0.5, 2), (0.5, 0.0, 16)])
def test_label_noise_formula_solves_the_moment_equations(lr: float, mu: float, batch: int) -> None:
    a = (1.0, 0.5, 0.2)
    found = regression.label_noise_fluctuation(a, lr, batch, 0.7, mu)
    other = regression.label_noise_by_linear_solve(np.diag(a), lr, batch, 0.7, mu)
    assert np.abs(np.diag(np.asarray(other.value)) / np.asarray(found.value) - 1).max() < 1e-10
    strength = regression.label_noise_strength(np.diag(a), np.diag(np.asarray(found.value)), batch, 0.7)
    assert np.abs(np.diag(strength) / np.asarray(found.details["C"]) - 1).max() < 1e-12
    closed = stationary.stationary_covariance(np.diag(a), strength, lr, mu)
    assert np.abs(np.diag(np.asarray(closed.value)) / np.asarray(found.value) - 1).max() < 1e-10


def test_label_noise_limits_agree_and_beyond_them_nothing_is_claimed() -> None:
    a = (1.0, 0.5, 0.2)
    rates = np.linspace(0.4, 1.6, 25)
    stable = [regression.label_noise_fluctuation(a, float(lr), 2, 1.0).ok for lr in rates]
    by_radius = [regression.label_noise_by_linear_solve(np.diag(a), float(lr), 2, 1.0).ok for lr in rates]
    assert stable == by_radius and any(stable) and not all(stable)


@pytest.mark.parametrize(("lr", "batch", "decay"), [(0.4, 4, 0.2), (0.8, 4, 0.1), (0.5, 8, -0.05)])
def test_decay_test_loss_by_two_routes(lr: float, batch: int, decay: float) -> None:
    a, u = (1.0, 0.5, 0.3), (1.0, -0.5, 2.0)
    full, printed = regression.decay_fluctuation(a, u, decay, lr, batch), regression.test_loss(a, u, decay, lr, batch)
    assert abs(full.details["test_loss"] / number(printed) - 1) < 1e-12
    # third route: fourth moments of Gaussian x by Gauss-Hermite, iterated to the fixed point
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    grid = np.array(list(itertools.product(nodes, repeat=3))) * np.sqrt(a)
    w = np.prod(list(itertools.product(weights / weights.sum(), repeat=3)), axis=1)
    mean, second = np.array(a) * np.array(u) / (np.array(a) + decay), np.zeros((3, 3))
    step = np.eye(3) - lr * (np.diag(a) + decay * np.eye(3))
    for _ in range(4000):
        m2 = second + np.outer(mean - u, mean - u)
        # E (x x^T M x x^T) is the fourth moment; the decay adds nothing random
        kick = np.einsum("n,ni,nj->ij", w * np.einsum("ni,ij,nj->n", grid, m2, grid), grid, grid)
        spread = kick - np.diag(a) @ np.outer(mean - u, mean - u) @ np.diag(a) - np.diag(a) @ second @ np.diag(a)
        following = step @ second @ step.T + lr**2 / batch * spread
        if np.abs(following - second).max() < 1e-16:
            break
        second = following
    assert np.abs(second - np.asarray(full.value)).max() < 1e-10


def test_best_decay_turns_negative_past_the_stability_limit() -> None:
    for lr, value, tol in ((1.0, 0.0, 1e-4), (1.2, 0.0, 1e-4), (1.4, -0.24, 0.01)):
        found = regression.best_decay([1.0], [1.0], lr, 4)
        assert abs(number(found) - value) < tol
    assert regression.test_loss([1.0], [1.0], 0.0, 1.4, 4).status == "not_applicable"
    assert regression.test_loss([1.0], [1.0], 0.0, 1.33, 4).ok  # limit 4/3


@pytest.mark.parametrize("sampling", ["replacement", "subset"])
def test_finite_data_covariance_by_iterating_the_moments(sampling: str) -> None:
    x = np.random.default_rng(3).normal(size=(6, 2))
    y = x @ [1.0, -0.5] + np.random.default_rng(4).normal(size=6)
    lr, batch = 0.2, 2
    found = regression.finite_data(x, y, lr, batch, sampling)  # type: ignore[arg-type]
    best = linalg.lstsq(x, y)[0]
    draws = list(itertools.product(range(6), repeat=2)) if sampling == "replacement" else list(itertools.combinations(range(6), 2))
    steps = [np.eye(2) - lr * x[list(d)].T @ x[list(d)] / batch for d in draws]
    kicks = [lr * x[list(d)].T @ (y - x @ best)[list(d)] / batch for d in draws]
    first, second = np.zeros(2), np.zeros((2, 2))
    for _ in range(3000):
        cross = [m @ np.outer(first, k) for m, k in zip(steps, kicks, strict=True)]
        second = sum(m @ second @ m.T + c + c.T + np.outer(k, k) for m, k, c in zip(steps, kicks, cross, strict=True)) / len(draws)
        first = sum(m @ first + k for m, k in zip(steps, kicks, strict=True)) / len(draws)
    assert np.abs(second - np.asarray(found.value)).max() < 1e-12 and np.abs(first).max() < 1e-12


def test_finite_data_refuses_what_it_cannot_say() -> None:
    x, y = RNG.normal(size=(8, 2)), RNG.normal(size=8)
    assert regression.finite_data(x, y, 0.1, 2, "epoch").status == "not_applicable"  # type: ignore[arg-type]
    assert "unstable" in regression.finite_data(x, y, 5.0, 2).note
    assert "singular" in regression.finite_data(np.ones((8, 2)), y, 0.1, 2).note
    with pytest.raises(InputError, match="finite"):
        regression.finite_data(x * np.nan, y, 0.1, 2)
    with pytest.raises(InputError, match="drawn"):
        regression.finite_data(x, y, 0.1, 9, "subset")


def test_tail_index_roots() -> None:
    for batch, value in {1: 1.09, 2: 2.00, 3: 2.78, 4: 3.51, 8: 6.20, 16: 11.4}.items():
        found = regression.kesten_index(1.0, batch)
        assert abs(number(found) / value - 1) < 6e-3 and found.residual < 1e-9
    assert abs(number(regression.kesten_index(0.2, 1)) - 8.30) < 5e-3 and abs(number(regression.kesten_index(0.5, 1)) - 2.90) < 6e-3
    # by adaptive quadrature over the chi-square law itself
    for rate, batch in ((1.0, 3), (0.5, 1), (0.3, 8)):
        beta, zero = number(regression.kesten_index(rate, batch)), batch / rate
        pieces = ((0.0, zero), (zero, 3 * zero), (3 * zero, 3 * zero + 200.0))
        total = sum(
            integrate.quad(lambda s, b=beta, r=rate, n=batch: stats.chi2.pdf(s, n) * abs(1 - r * s / n) ** b, *ends, limit=400)[0]
            for ends in pieces
        )
        assert abs(total - 1) < 1e-7
    # the paper's index is right where the variance is about to diverge, at beta = 2
    assert abs(number(regression.kesten_index(1.0, 2)) - regression.moment_index(1.0, 2)) < 1e-9
    pareto = np.random.default_rng(0).pareto(3.0, 200_000) + 1
    hill = regression.hill(pareto, 2000)
    assert abs(number(hill) - 3) < 5 * float(hill.stderr)


def test_second_order_methods_close_their_own_equations() -> None:
    a, dim, lr, batch, sigma = spd(3, 5), 3, 0.3, 8, 0.6
    for mu in (0.0, 0.5):
        factor = number(regression.damped_newton_fluctuation(dim, lr, batch, sigma, mu))
        sig = factor * np.linalg.inv(a)
        c = regression.label_noise_strength(a, sig, batch, sigma)
        assert stationary.master_residual(sig, a, c, lr * np.linalg.inv(a), mu) < 1e-13
        sig = regression.natural_gradient_factor(dim, lr, batch, mu) * np.linalg.inv(a)
        c = regression.label_noise_strength(a, sig, batch, 0.0)
        assert stationary.master_residual(sig, a, c, lr / batch * np.linalg.inv(c), mu) < 1e-13


def test_overparametrised_trace_closes_its_own_equations() -> None:
    """R10: Sig_i (2 lr a_i - lr^2 a_i^2) = lr^2 ((T - a_i Sig_i) / S + c) a_i with T = sum a_i Sig_i, as one linear system."""
    a, lr, batch, n, sigma = np.linspace(0.2, 3.0, 12), 0.1, 5, 60, 0.7
    c = sigma**2 / batch * (1 - len(a) / n)
    system = np.diag(2 * lr * a - lr**2 * a**2 + lr**2 * a**2 / batch) - lr**2 / batch * np.outer(a, a)
    trace = a @ np.linalg.solve(system, lr**2 * c * a)
    assert abs(number(regression.overparametrised(np.diag(a), n, lr, batch, sigma)) / trace - 1) < 1e-12


def test_overparametrised_trace_and_its_limit() -> None:
    x = np.random.default_rng(1).normal(size=(200, 20)) / math.sqrt(1)
    y = np.random.default_rng(2).normal(size=200)
    a_hat = x.T @ x / 200
    found = regression.overparametrised(a_hat, 200, 0.05, 10, 1.0)
    exact = regression.finite_data(x, y, 0.05, 10)
    assert 0.6 < number(found) / np.trace(a_hat @ np.asarray(exact.value)) < 1.4
    assert regression.overparametrised(a_hat, 200, 2.0, 10, 1.0).status == "not_applicable"


# ------------------------------------------------------------------------------------------------ underdamped


MODES = Underdamped((4.0, 1.0, 0.25, 0.05, 0.125), 0.02, 0.9, 0.01, 8, 1.3)


def test_propagator_solves_its_differential_equation() -> None:
    critical = Underdamped(((1 - 0.9) ** 2 / (2 * 0.02 * 1.9),), 0.02, 0.9)
    assert critical.regime() == ("critical",) or abs(critical.gamma - critical.omega[0]) < 1e-9 * critical.gamma
    for dynamics in (MODES, critical, Underdamped((0.01, 5.0), 0.3, 0.0)):
        for k, omega in enumerate(dynamics.omega):
            a = np.array([[0.0, 1.0], [-(omega**2), -2 * dynamics.gamma]])
            for t in (0.1, 1.0, 3.0):
                assert np.abs(dynamics.propagator(t)[k] - linalg.expm(a * t)).max() < 2e-7 * max(1, omega**2)


def test_transient_covariance_solves_its_moment_equation() -> None:
    k, t = 1, 0.8
    omega, gamma = MODES.omega[k], MODES.gamma
    a = np.array([[0.0, 1.0], [-(omega**2), -2 * gamma]])
    noise = np.zeros((2, 2))
    noise[1, 1] = 4 * gamma * MODES.stationary()[k, 1, 1]

    def rhs(_: float, flat: np.ndarray) -> np.ndarray:
        p = flat.reshape(2, 2)
        return (a @ p + p @ a.T + noise).reshape(-1)

    solved = integrate.solve_ivp(rhs, (0, t), np.zeros(4), rtol=1e-12, atol=1e-15, method="DOP853").y[:, -1].reshape(2, 2)
    assert np.abs(MODES.covariance(t)[k] - solved).max() < 1e-10
    assert np.abs(MODES.covariance(500.0) - MODES.stationary()).max() < 1e-8


@pytest.mark.parametrize(("lr", "beta", "wd"), [(0.05, 0.9, 0.1), (0.2, 0.9, 0.0), (0.1, 0.0, 0.0), (0.02, 0.99, 0.05)])
def test_discrete_stationary_law_is_the_langevin_one_times_the_correction(lr: float, beta: float, wd: float) -> None:
    d = Underdamped((2.0, 1.0, 0.5, 0.2, 0.05), lr, beta, wd, 32)
    exact = d.discrete_stationary()
    for k in range(2):
        assert np.abs(exact[:, k, k] / d.stationary()[:, k, k] / d.correction() - 1).max() < 1e-10


def test_phase_space_decomposition() -> None:
    a, diffusion, q, u, kappa = MODES.phase_space()
    assert np.abs((diffusion + q) @ u - a).max() < 1e-12 and np.abs(q + q.T).max() == 0
    b = linalg.solve_continuous_lyapunov(a, 2 / kappa * diffusion)
    n = len(MODES.rho)
    assert np.abs(np.diag(b)[:n] - MODES.stationary()[:, 0, 0]).max() < 1e-10 and np.abs(u @ (kappa * b) - np.eye(2 * n)).max() < 1e-9
    z = RNG.normal(size=2 * n)
    current = MODES.current(z[:n], z[n:])
    assert abs(u @ z @ current) < 1e-9 * np.abs(u @ z).max() * np.abs(current).max() * n  # along the level sets of the modified loss
    grad = torch.func.grad(lambda x: 0.5 * x @ torch.from_numpy(u) @ x)(torch.from_numpy(z))
    assert np.abs(-q @ grad.numpy() - current).max() < 1e-10


def test_displacement_by_summing_velocities() -> None:
    """E|theta_k - theta_0|^2 = sum over pairs of steps of the velocity autocorrelation, an independent route."""
    d = Underdamped((1.0, 0.3), 0.1, 0.9)
    p, f = d.discrete_stationary(), d.discrete_map()
    k = 12
    total = 0.0
    for mode in range(2):
        # theta_{j+1} - theta_j = (F - 1) z_j + noise; build the covariance of the path by brute force
        size = 2 * (k + 1)
        cov = np.zeros((size, size))
        for i in range(k + 1):
            for j in range(i, k + 1):
                block = np.linalg.matrix_power(f[mode], j - i) @ p[mode]
                cov[2 * j : 2 * j + 2, 2 * i : 2 * i + 2] = block
                cov[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block.T
        moves = np.zeros((k, size))
        for j in range(k):
            moves[j, 2 * j + 2], moves[j, 2 * j] = 1, -1
        total += (moves @ cov @ moves.T).sum()
    assert abs(d.displacement([k])[0] / total - 1) < 1e-12
    assert abs(d.displacement([1])[0] / (d.local_displacement()) - 1) < 0.06
    slow = Underdamped((1.0, 0.3), 1e-4, 0.9)
    assert abs(slow.displacement([10_000])[0] / slow.displacement([10_000], exact=False)[0] - 1) < 1e-3


def test_area_rate_from_the_stationary_covariance() -> None:
    for wd in (0.0, 0.1):
        d = Underdamped((2.0, 0.5), 0.05, 0.9, wd, 32)
        p, f = d.discrete_stationary(), d.discrete_map()
        follow = f @ p  # E z_{k+1} z_k^T; v = -m
        area = -follow[:, 1, 0] + follow[:, 0, 1]
        assert np.abs(area / d.area_rate() - 1).max() < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Underdamped((1.0, -0.5), 0.1, 0.9), "no stationary law"),
        (lambda: Underdamped((1.0,), 5.0, 0.5), "unstable"),
        (lambda: Underdamped((1.0,), 0.1, 1.0), "momentum"),
        (lambda: Underdamped((1.0,), math.nan, 0.5), "lr"),
        (lambda: Discrete((1.0, 2.0), (0.5, 0.6)), "add up"),
        (lambda: Discrete(()), "finite values"),
        (lambda: Normal(0.0, 0.0), "sd"),
        (lambda: Uniform(1.0, 0.0), "increasing"),
        (lambda: Uniform(0.0, 1.0).averaged(2), "closed form"),
        (lambda: Normal(0.0, 1.0).averaged(0), "batch"),
        (lambda: factors.design_slow_escape(0.1, 1.0, 2.0), "lr b < 1"),
        (lambda: stationary.stationary_covariance(np.eye(2), [[1.0, 2.0], [2.0, 1.0]], 0.1), "negative eigenvalue"),
        (lambda: stationary.stationary_covariance([[1.0, 2.0], [0.0, 1.0]], np.eye(2), 0.1), "symmetric"),
        (lambda: stationary.stationary_covariance(np.eye(2), np.eye(2), -0.1), "positive"),
        (lambda: stationary.stationary_covariance(np.eye(2) * np.nan, np.eye(2), 0.1), "finite"),
        (lambda: escape.escape_rate(1.0, 1.0, 1.0, 2.0, 0.1, 1), "negative curvature"),
        (lambda: escape.escape_rate(1.0, -1.0, 2.0, 1.0, 0.1, 1), "above"),
        (lambda: escape.radial_time(1, 0.5, 0.1), "exceed 1"),
        (lambda: adaptive.ema_weights(3, 1.0), "beta2"),
        (lambda: adaptive.uniform_moments(0), "positive integer"),
        (lambda: regression.hill([1.0, 2.0], 5), "count"),
        (lambda: LocalMaximum(2.0, 1.0, 0.1), "local maximum"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ escape


@pytest.mark.parametrize(("dim", "temperature"), [(1, 0.25), (3, 0.25), (1, 0.1), (5, 0.1)])
def test_radial_time_solves_its_boundary_value_problem(dim: int, temperature: float) -> None:
    """tau'' T(1+r^2)/2 + tau' [T(1+r^2)(d-1)/(2r) - r] = -1, tau'(0) = 0, tau(r_b) = 0, by a collocation solver."""
    level = 4.0
    edge = math.sqrt(level - 1)

    def rhs(r: np.ndarray, y: np.ndarray) -> np.ndarray:
        d = temperature * (1 + r**2) / 2
        return np.vstack([y[1], (-1 + y[1] * (r - d * (dim - 1) / r)) / d])

    low = 1e-6
    slope = -2 * low / (temperature * dim)

    def boundary(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([a[1] - slope, b[0]])

    mesh = np.linspace(low, edge, 4000)
    found = escape.radial_time(dim, level, temperature)
    solved = integrate.solve_bvp(
        rhs, boundary, mesh, np.vstack([number(found) * (1 - mesh / edge), -np.ones_like(mesh)]), tol=1e-6, max_nodes=200_000
    )
    assert solved.success and abs(solved.y[0, 0] / number(found) - 1) < 1e-4 and found.residual < 1e-9


def test_published_passage_times_and_slopes() -> None:
    assert abs(number(escape.radial_time(3, 2, 0.25)) - 2.205) < 2e-3 and abs(number(escape.radial_time(3, 4, 0.25)) - 16.24) < 0.01
    assert abs(escape.radial_slope(1, 50, 100, 0.25) - 4.491) < 1e-3 and abs(escape.radial_slope(3, 50, 100, 0.25) - 3.469) < 1e-3


@pytest.mark.parametrize("a", [1.0, 3.0, 10.0])
def test_escape_rate_is_the_inverse_of_the_mean_time(a: float) -> None:
    ratios = []
    for t in (0.05, 0.1):
        exact = escape.double_well_time(a, t)
        rate = escape.escape_rate(8 * a, -4 * a, 1.0, 1 + a, t, 8 * a)  # eta h*/B = t
        ratios.append(number(rate) * number(exact) - 1)
    assert max(map(abs, ratios)) < 0.04


@pytest.mark.parametrize(("a", "temperature"), [(1.0, 0.1), (3.0, 0.3)])
def test_double_well_time_by_finite_differences(a: float, temperature: float) -> None:
    """T L tau'' - L' tau' = -1 with tau'(-3) = 0 and tau(1) = 0: second order in the step, extrapolated."""

    def solved(cells: int) -> float:
        x = np.linspace(-3, 1, cells + 1)
        step, loss, slope = x[1] - x[0], 1 + a * (x**2 - 1) ** 2, 4 * a * x * (x**2 - 1)
        up, down = temperature * loss / step**2 - slope / (2 * step), temperature * loss / step**2 + slope / (2 * step)
        bands = np.zeros((3, cells))
        bands[0, 1:], bands[1], bands[2, :-1] = up[: cells - 1], -(up + down)[:cells], down[1:cells]
        bands[0, 1] += down[0]  # reflected
        return float(linalg.solve_banded((1, 1), bands, -np.ones(cells))[cells // 2])  # from x = -1

    coarse, fine = solved(20_000), solved(40_000)
    found = escape.double_well_time(a, temperature)
    assert abs((4 * fine - coarse) / 3 / number(found) - 1) < 1e-6 and float(found.residual or 1) < 1e-8


def test_the_power_of_the_loss_carries_no_current() -> None:
    """power-law-escape R5: dx = -L' dt + sqrt(2 T L) dW in one dimension, T = eta h/B: -L' p - (T L p)' = 0 for p = L^-phi."""
    lr, batch, h = 0.2, 3.0, 1.5
    t = lr * h / batch
    loss = lambda x: 0.7 + 0.3 * x**2 + 0.1 * x**4  # noqa: E731
    for phi, still in ((escape.exponent_of_density(lr, batch, h), True), (1 / t, False)):
        for x in torch.tensor([-1.3, 0.4, 2.0], dtype=torch.float64):
            flow = -torch.func.grad(loss)(x) * loss(x) ** -phi - torch.func.grad(lambda z, p=phi: t * loss(z) ** (1 - p))(x)
            assert (abs(float(flow)) < 1e-14) == still


def test_the_discrete_exponents_have_the_exact_variance() -> None:
    """R10b and minibatch-noise-strength R14: (1 + w^2)^-phi has the variance 1 / (2 phi - 3), which is that of R5 in one dimension."""
    for lr, batch in ((0.1, 2), (0.05, 1), (0.5, 4)):
        exact = float(np.asarray(regression.label_noise_fluctuation([1.0], lr, batch, 1.0).value).item())
        for phi in (escape.discrete_exponent_of_density(lr, batch, 1.0), (1 + regression.moment_index(lr, batch)) / 2):
            assert abs(1 / (2 * phi - 3) / exact - 1) < 1e-12
        assert abs(1 / (2 * escape.exponent_of_density(lr, batch, 1.0) - 3) / exact - 1) > 1e-2


def test_escape_rate_in_more_dimensions_reduces_to_one() -> None:
    one = escape.escape_rate(8.0, -4.0, 1.0, 2.0, 0.1, 8.0)
    by_hand = math.sqrt(8 * 4) / (2 * math.pi) * 2 ** -(0.5 + 10)
    assert abs(number(one) / by_hand - 1) < 1e-12
    assert number(escape.escape_rate(8.0, -4.0, 0.0, 2.0, 0.1, 8.0)) == 0.0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_escape_rate_is_kramers_for_the_log_of_the_loss(n: int) -> None:
    """power-law-escape R4, R7: d theta = -grad U d tau + sqrt(2 T) dW with U = log L, and d tau = L* dt at the bottom; Hessians of U by
    autodiff of a loss that is isotropic at its minimum."""
    a, t = 0.7, 0.1

    def loss(x: torch.Tensor) -> torch.Tensor:
        return 1 + a * (x[0] ** 2 - 1) ** 2 + 4 * a * x[1:].square().sum()  # curvature 8 a in every direction at (1, 0, ..)

    bottom, top = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    bottom[0] = 1.0
    log_loss = lambda x: loss(x).log()  # noqa: E731
    low, high = (torch.linalg.eigvalsh(torch.func.hessian(log_loss)(x)) for x in (bottom, top))
    barrier = float(log_loss(top) - log_loss(bottom))
    langer = float(-high[0] / (2 * math.pi) * (low.prod() / high.prod().abs()).sqrt()) * math.exp(-barrier / t)
    curvatures = (torch.func.hessian(loss)(x).numpy() for x in (bottom, top))
    found = number(escape.escape_rate(*curvatures, float(loss(bottom)), float(loss(top)), t, 8 * a))
    assert abs(found / (float(loss(bottom)) * langer) - 1) < 1e-12
    # negative control: the power with one outlier more
    assert abs(found * (float(loss(top)) / float(loss(bottom))) ** -0.5 / (float(loss(bottom)) * langer) - 1) > 0.1


def test_density_exponent_recovers_a_student_sample() -> None:
    phi = 3.0  # (1+w^2)^-3 is Student-t with 5 degrees of freedom, w = t / sqrt 5
    w = stats.t.rvs(5, size=100_000, random_state=1) / math.sqrt(5)
    found = escape.density_exponent(w)
    assert abs(number(found) - phi) < 5 * float(found.stderr)


# ------------------------------------------------------------------------------------------------ adaptive steps


@pytest.mark.parametrize("t", [2, 3, 5, 10, 100])
def test_plain_mean_moments_by_the_beta_law_and_by_the_integrals(t: int) -> None:
    found, other = adaptive.uniform_moments(t), adaptive.weighted_moments(np.full(t, 1 / t))
    law = stats.beta(0.5, (t - 1) / 2)
    exact = {"E|u|": law.expect(lambda x: math.sqrt(t * x)), "E u^2": t * law.mean(), "E u^4": t**2 * law.moment(2)}
    for name, value in exact.items():
        assert abs(number(found[name]) / value - 1) < 1e-6
        assert abs(number(found[name]) - number(other[name])) < 1e-9


def test_published_table_of_the_moving_average() -> None:
    table = {0.9: (0.1778, 0.2290, 0.2644, 0.2859, 0.2956, 0.2964), 0.99: (0.1883, 0.2479, 0.2935, 0.3261, 0.3467, 0.3535)}
    for beta, row in table.items():
        for t, value in zip((2, 3, 5, 10, 30, 100), row, strict=True):
            found = adaptive.ema_moments(t, beta)["Var|u|"]
            assert abs(number(found) - value) < 6e-5 and found.residual < 1e-9
    assert number(adaptive.ema_moments(1, 0.9)["Var|u|"]) < 1e-12


def test_two_gradients_by_direct_integration() -> None:
    w = adaptive.ema_weights(2, 0.8)
    # u^2 = g2^2/(w1 g1^2 + w2 g2^2): the ratio is a function of one angle
    angle = lambda f: integrate.quad(f, 0, math.pi / 2, epsabs=1e-12)[0] / (math.pi / 2)  # noqa: E731
    for power, name in ((1, "E|u|"), (2, "E u^2"), (4, "E u^4")):
        exact = angle(lambda a, power=power: (math.sin(a) / math.sqrt(w[0] * math.cos(a) ** 2 + w[1] * math.sin(a) ** 2)) ** power)
        assert abs(number(adaptive.weighted_moments(w)[name]) - exact) < 1e-10


def test_bounds_and_divergences() -> None:
    g = RNG.standard_cauchy(size=(2000, 12)) ** 3
    for beta in (0.5, 0.9):
        u = g[:, -1] / np.sqrt((adaptive.ema_weights(12, beta) * g**2).sum(1))
        assert np.abs(u).max() <= adaptive.bound(12, beta) * (1 + 1e-12)
    assert adaptive.rectification_mean(2).status == "not_applicable" and number(adaptive.rectification_mean(4)) == 2
    assert adaptive.excluded_variance(3).status == "not_applicable" and abs(number(adaptive.excluded_variance(5)) - 2) < 1e-15
    assert abs(adaptive.limit_with_mean(0.0) - (1 - 2 / math.pi)) < 1e-15 and abs(adaptive.limit_with_mean(0.5) - 0.3583) < 5e-5


def test_what_diverges_by_the_laws_themselves() -> None:
    for t in (4, 5, 12, 40):
        inverse = integrate.quad(lambda x, t=t: t / x * stats.chi2.pdf(x, t), 0, np.inf, epsabs=1e-13)[0]
        assert abs(number(adaptive.rectification_mean(t)) / inverse - 1) < 1e-8
        assert abs(number(adaptive.excluded_variance(t)) / stats.t.var(t - 1) - 1) < 1e-12
    for m in (0.0, 0.5, 2.0):
        size = integrate.quad(lambda g, m=m: abs(g) * stats.norm.pdf(g, m), -12, 14, points=[0.0], epsabs=1e-13)[0]
        assert abs(adaptive.limit_with_mean(m) - (1 - size**2 / (1 + m**2))) < 1e-11


def test_the_curve_is_the_moment_of_each_step() -> None:
    curve = adaptive.ema_curve(12, 0.9)
    assert max(abs(curve[t - 1] - number(adaptive.ema_moments(t, 0.9)["Var|u|"])) for t in range(2, 13)) < 1e-12


# ------------------------------------------------------------------------------------------------ the models


DATA = np.random.default_rng(0).normal(size=(30, 3))
LABELS = DATA @ [1, -0.5, 0.2] + 0.5 * np.random.default_rng(1).normal(size=30)
ROWS = tuple(map(tuple, DATA.tolist()))
MODELS: dict[str, Model] = {
    "random curvature": RandomCurvature(Normal(-0.1, 1.0), 0.5),
    "two-point curvature": RandomCurvature(Discrete((3.0, -4.0)), 0.2, 2),
    "uniform curvature": RandomCurvature(Uniform(-1.0, 2.0), 0.7),
    "dying neuron": TwoLayerOrigin(Discrete((1.0, -0.8)), 0.6),
    "learning neuron": TwoLayerOrigin(Discrete((1.0, 0.5)), 0.1),
    "local maximum": LocalMaximum(1.5, 1.6, 0.5),
    "quadratic": QuadraticSGD(((1.0, 0.2), (0.2, 0.5)), ((1.0, -0.3), (-0.3, 0.4)), 0.8, 0.3),
    "label noise": LabelNoiseRegression((1.0, 0.5, 0.2), 0.6, 2, 1.0),
    "label noise with momentum": LabelNoiseRegression((1.0, 0.5, 0.2), 0.1, 4, 1.0, 0.9),
    "data": DataRegression(ROWS, tuple(LABELS.tolist()), 0.3, 6),
    "data without replacement": DataRegression(ROWS, tuple(LABELS.tolist()), 0.3, 6, "subset"),
    "momentum modes": MomentumModes(Underdamped((2.0, 1.0, 0.5, 0.2, 0.05), 0.05, 0.9, 0.1, 32)),
    "log loss": LogLossSDE(3, 2.0, 0.25),
    "adaptive step": AdaptiveStep(10, 0.9),
    "plain adaptive step": AdaptiveStep(5),
}
CASES = [(name, kind) for name, model in MODELS.items() for kind in model.kinds]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{n}-{k}" for n, k in CASES])
def test_models_meet_their_simulation_and_the_control_does_not(name: str, kind: str) -> None:
    model = MODELS[name]
    # the log-loss SDE is stepped at a finite dt: 4 % (power-law-escape A3)
    relative = 0.04 if isinstance(model, LogLossSDE) else 0.0
    found = model.compare(kind, seed=1, budget=0.5, relative=relative)
    assert found.ok, found.to_markdown()
    assert model.control(kind, seed=1, budget=0.5).status == "violated"
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["status"] == "ok" and found.worst.observable in found.to_markdown()


@pytest.mark.parametrize("name", MODELS)
def test_unknown_kinds_are_refused_with_a_list(name: str) -> None:
    with pytest.raises(NotSolvable, match=MODELS[name].kinds[0]):
        MODELS[name].predict("trajectory")


def test_losses_have_the_curvature_the_theory_uses() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    origin = MODELS["dying neuron"]
    h = torch.func.hessian(origin.loss)(zero)
    assert torch.allclose(h, torch.tensor([[0.0, -0.1], [-0.1, 0.0]], dtype=torch.float64))
    quadratic = MODELS["quadratic"]
    assert torch.allclose(torch.func.hessian(quadratic.loss)(zero), torch.tensor([[1.0, 0.2], [0.2, 0.5]], dtype=torch.float64))
    top = MODELS["local maximum"]
    assert float(torch.func.hessian(top.loss)(torch.zeros(1, dtype=torch.float64))) == pytest.approx(-0.05)
    data = MODELS["data"]
    best = torch.from_numpy(np.linalg.lstsq(DATA, LABELS)[0])
    assert float(torch.func.grad(data.loss)(best).abs().max()) < 1e-12
    noise = MODELS["label noise"]
    sample = noise.data(200_000, 0)
    x = sample["x"]
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    values = 0.5 * (x @ theta - sample["noise"]).square()
    assert abs(float(values.mean() - noise.loss(theta))) < 5 * float(values.std()) / math.sqrt(len(values))


def test_unstable_settings_are_not_compared_as_if_they_were_sound() -> None:
    unstable = QuadraticSGD(((1.0,),), ((1.0,),), 2.5)
    found = unstable.compare("stationary", budget=0.02)
    assert found.status in ("not_converged", "not_applicable") and not found.ok
    assert unstable.predict("stationary").status == "not_applicable"
    assert LabelNoiseRegression((1.0,), 1.9, 1, 1.0).predict("stationary").status == "not_applicable"
    assert TwoLayerOrigin(Discrete((1.0, -2.0)), 3.0).predict("fate").status == "not_applicable"


NAN, COLLINEAR = math.nan, tuple((a, b, a) for a, b, _ in ROWS)
TARGETS = tuple(LABELS.tolist())
ILL: list[tuple[str, Any, str]] = [  # what, the answer of the model, words of the error (or of the note, with "not applicable")
    ("curvature, rate NaN", lambda: RandomCurvature(Normal(-0.1, 1.0), NAN), "lr must be"),
    ("curvature, no batch", lambda: RandomCurvature(Normal(-0.1, 1.0), 0.1, 0), "batch must be"),
    ("curvature, law NaN", lambda: RandomCurvature(Normal(NAN, 1.0), 0.1).predict("exponent"), "finite"),
    ("origin, rate NaN", lambda: TwoLayerOrigin(Discrete((1.0, -0.8)), NAN), "lr must be"),
    ("origin, unstable", lambda: TwoLayerOrigin(Discrete((1.0, -2.0)), 3.0).predict("fate"), "not applicable: phase IV"),
    ("maximum, rate NaN", lambda: LocalMaximum(1.5, 1.6, NAN), "lr must be"),
    ("maximum, curvature NaN", lambda: LocalMaximum(NAN, 1.6, 0.5), "local maximum"),
    ("quadratic, unstable", lambda: QuadraticSGD(((1.0,),), ((1.0,),), 2.5).predict("stationary"), "not applicable: unstable"),
    ("quadratic, flat", lambda: QuadraticSGD(((1.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (0.0, 1.0)), 0.5).predict("excess_loss"),
     "not applicable: .*diffuses"),
    ("quadratic, NaN", lambda: QuadraticSGD(((NAN,),), ((1.0,),), 0.5).predict("stationary"), "finite"),
    ("quadratic, noise NaN", lambda: QuadraticSGD(((1.0,),), ((NAN,),), 0.5).predict("stationary"), "finite"),
    ("quadratic, sizes", lambda: QuadraticSGD(((1.0,),), ((1.0, 0.0), (0.0, 1.0)), 0.5).predict("stationary"), "differ in size"),
    ("label noise, unstable", lambda: LabelNoiseRegression((1.0,), 1.9, 1, 1.0).predict("stationary"), "not applicable: unstable"),
    ("label noise, singular", lambda: LabelNoiseRegression((1.0, 0.0), 0.5, 2, 1.0).predict("stationary"), "must be positive"),
    ("label noise, NaN", lambda: LabelNoiseRegression((1.0,), 0.5, 2, NAN), "sigma must be"),
    ("label noise, no inputs", lambda: LabelNoiseRegression((), 0.5, 2, 1.0), "at least one input"),
    ("data, unstable", lambda: DataRegression(ROWS, TARGETS, 9.0, 6).predict("stationary"), "not applicable: .*unstable"),
    ("data, collinear", lambda: DataRegression(COLLINEAR, TARGETS, 0.3, 6).predict("stationary"), "not applicable: .*singular"),
    ("data, NaN", lambda: DataRegression(ROWS, (NAN, *TARGETS[1:]), 0.3, 6).predict("stationary"), "finite"),
    ("data, batch", lambda: DataRegression(ROWS, TARGETS, 0.3, 60, "subset").predict("stationary"), "cannot be drawn"),
    ("log loss, level NaN", lambda: LogLossSDE(3, NAN, 0.25).predict("passage"), "must exceed 1"),
    ("log loss, temperature", lambda: LogLossSDE(3, 2.0, -1.0).predict("passage"), "temperature"),
    ("log loss, dimension", lambda: LogLossSDE(0, 2.0, 0.25).predict("passage"), "dim"),
    ("adaptive, no step", lambda: AdaptiveStep(0).predict("moments"), "positive integer"),
    ("adaptive, beta2 NaN", lambda: AdaptiveStep(5, NAN).predict("moments"), "beta2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), [row[1:] for row in ILL], ids=[row[0] for row in ILL])
def test_every_model_refuses_or_names_what_it_cannot_answer(call: Any, words: str) -> None:
    status, _, note = words.partition("not applicable: ")
    if status:
        with pytest.raises(InputError, match=words):
            call()
    else:
        found = call()
        assert found.status == "not_applicable"
        assert all(re.search(note, value.note) and value.value is None for value in found.values.values())


def test_a_comparison_keeps_wrong_and_unconverged_apart() -> None:
    def compare(seen: Estimate):
        return beside(Prediction("x", {"a": Estimate(1.0)}), Measurement("x", {"a": seen}, 0))

    assert compare(Estimate(1.05, stderr=0.02)).ok
    assert compare(Estimate(1.2, stderr=0.02)).status == "violated"
    assert compare(Estimate(1.0, status="not_converged")).status == "not_converged"
    with pytest.raises(InputError, match="not measured"):
        beside(Prediction("x", {"a": Estimate(1.0)}), Measurement("x", {}, 0))
    with pytest.raises(InputError, match="shape"):
        compare(Estimate(torch.ones(2)))
    with pytest.raises(InputError, match="budget"):
        MODELS["quadratic"].simulate("stationary", budget=math.nan)
