"""Escape under noise proportional to the loss: a Langevin equation for log L after a random change of time (power-law-escape R1-R10)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, linalg

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.simulate.expr import dot, sqrt
from parasym.simulate.problems import diffusion
from parasym.simulate.system import System
from parasym.solvable.contract import number, positive


def exponent_of_density(lr: float, batch: float, h: float) -> float:
    """phi of the quasi-stationary density L^-phi in continuous time, 1 + B/(eta h) (R5)."""
    positive(lr=lr, batch=batch, h=h)
    return 1 + batch / (lr * h)


def discrete_exponent_of_density(lr: float, batch: float, h: float) -> float:
    """phi of actual SGD on one-dimensional label-noise regression, (2B/(eta h) - B + 1)/2 (R10b)."""
    positive(lr=lr, batch=batch, h=h)
    return (2 * batch / (lr * h) - batch + 1) / 2


def escape_rate(h_min: ArrayLike, h_saddle: ArrayLike, loss_min: float, loss_saddle: float, lr: float, batch: float) -> Estimate:
    """Escape rate over a saddle (R6, R7): |h_e|/2pi sqrt(det H*/|det H^s|) (L^s/L*)^-(B/(eta h*) + 1 - n/2).

    Args:
        h_min: Hessian at the minimum in the outlier space, a number or (n, n); h* is its mean eigenvalue.
        h_saddle: Hessian at the saddle, with one negative eigenvalue h_e.
        loss_min: L* > 0.
        loss_saddle: L^s > L*.
        lr: eta.
        batch: B.

    Returns:
        The rate per unit time t = eta k; zero at L* = 0, where there is no noise to escape by.
    """
    low, top = np.atleast_2d(np.asarray(h_min, float)), np.atleast_2d(np.asarray(h_saddle, float))
    positive(loss_saddle=loss_saddle, lr=lr, batch=batch)
    refs = ("power-law-escape R7",)
    down = linalg.eigvalsh(top)
    at = linalg.eigvalsh(low)
    if low.shape != top.shape or at[0] <= 0 or not (down[0] < 0 and (len(down) == 1 or down[1] > 0)):
        raise InputError("escape needs a minimum (all curvatures positive) and a saddle with exactly one negative curvature, of one size")
    if loss_min == 0:
        return Estimate(0.0, refs=refs, note="the minimum interpolates: no noise there, no escape")
    if not 0 < loss_min < loss_saddle:
        raise InputError(f"the saddle must lie above the minimum: L* = {loss_min}, L^s = {loss_saddle}")
    n, h = len(low), float(at.mean())
    power = batch / (lr * h) + 1 - n / 2
    prefactor = abs(down[0]) / (2 * math.pi) * math.sqrt(np.prod(at) / abs(np.prod(down)))
    rate = prefactor * (loss_saddle / loss_min) ** -power
    return Estimate(float(rate), refs=refs, assumptions=("eta h*/B small", "noise 2 L H / B"), details={"power": power})


def critical_dimension(lr: float, batch: float, h: float) -> float:
    """n_c = 2 (B/(eta h*) + 1): a minimum is stable while it has fewer outliers (R8)."""
    positive(lr=lr, batch=batch, h=h)
    return 2 * (batch / (lr * h) + 1)


def double_well_time(a: float, temperature: float) -> Estimate:
    """Mean time from -1 to the other minimum +1 of L = 1 + a (x^2-1)^2 with diffusion T L(x), by quadrature (R6).

    dx = -L' dt + sqrt(2 T L) dW with T = eta h*/B, so that the density is L^-(1 + 1/T) and the scale L^(1/T).
    """
    positive(a=a, temperature=temperature)

    def loss(x: float) -> float:
        return 1 + a * (x * x - 1) ** 2

    power = 1 / temperature
    inner = _cumulative(lambda y: loss(y) ** (-power - 1), -3.0, 1.0)
    value, error = integrate.quad(
        lambda x: loss(x) ** power * inner(x) / temperature, -1, 1, limit=800, epsabs=0, epsrel=1e-10, points=[-0.5, 0, 0.5]
    )
    return Estimate(float(value), residual=float(error / value), refs=("power-law-escape R6",))


def _cumulative(density: Callable[[float], float], low: float, high: float) -> Callable[[float], float]:
    """Integral of a density from ``low``, at any point up to ``high``, by a dense solution of its differential equation."""
    solved = integrate.solve_ivp(lambda x, y: [density(x)], (low, high), [0.0], rtol=1e-12, atol=1e-16, dense_output=True, method="DOP853")
    return lambda x: float(solved.sol(x)[0])


def radial_time(dim: int, level: float, temperature: float) -> Estimate:
    """Mean time for L = (1 + r^2)/2 to grow by the factor ``level`` from r = 0 in ``dim`` dimensions (R9): exact for the SDE.

    int_0^{r_b} dr / mu(r) int_0^r mu(s) 2 / (T (1+s^2)) ds, mu(r) = r^(d-1) (1+r^2)^(-1/T), r_b = sqrt(level - 1), T = eta/B.
    """
    positive(dim=dim, temperature=temperature)
    if not level > 1:
        raise InputError(f"the level must exceed 1, got {level}")
    edge = math.sqrt(level - 1)
    # with z = r^d the inner integrand is smooth at 0: int_0^r s^(d-1) f(s) ds = r^d int_0^1 q^(d-1) f(r q) dq
    nodes, weights = np.polynomial.legendre.leggauss(400)

    def panels(low: float, high: float, count: int) -> tuple[np.ndarray, np.ndarray]:
        ends = np.linspace(low, high, count + 1)
        half = np.diff(ends) / 2
        x = (ends[:-1] + half)[:, None] + half[:, None] * nodes
        return x.reshape(-1), (half[:, None] * weights).reshape(-1)

    q, wq = panels(0.0, 1.0, 2)

    def integrate_outer(count: int) -> float:
        r, wr = panels(0.0, edge, count)
        s = r[:, None] * q
        # ratio ((1+r^2)/(1+s^2))^(1/T) in logs: each factor alone may overflow
        ratio = np.exp((np.log1p(r**2)[:, None] - np.log1p(s**2)) / temperature)
        inner = (q ** (dim - 1) * ratio * 2 / (temperature * (1 + s**2)) * wq).sum(1)
        return float((r * inner * wr).sum())

    value, coarse = integrate_outer(2), integrate_outer(1)
    return Estimate(value, residual=abs(value - coarse) / value, refs=("power-law-escape R9",))


def radial_slope(dim: int, low: float, high: float, temperature: float) -> float:
    """d log time / d log level between two levels, by quadrature (R9)."""
    first, second = radial_time(dim, low, temperature), radial_time(dim, high, temperature)
    return math.log(number(second) / number(first)) / math.log(high / low)


def limiting_slope(dim: int, temperature: float) -> float:
    """The slope for high levels, 1/T + 1 - d/2 (R9)."""
    return 1 / temperature + 1 - dim / 2


def radial_sde(dim: int, *, bridge: bool = True) -> System:
    """dx = -x dt + sqrt(T (1 + |x|^2)) dW from 0: SGD's SDE for L = (1 + r^2)/2. Parameters dt, T, level.

    With ``bridge`` the state ends with a flag: 1 once 1 + r^2 has reached the level, between two steps included.
    """
    return diffusion(
        f"log-loss SDE in {dim} dimensions",
        lambda x, p: [-1.0 * a for a in x],
        lambda x, p: [sqrt(p.T * (1.0 + dot(x, x)))] * dim,
        [0.0] * dim,
        # the distance to the sphere; linear in r, so that the bridge sees a flat boundary at the right distance
        bridge=(lambda x, p: sqrt(p.level - 1.0) - sqrt(dot(x, x) + 1e-12)) if bridge else None,
    )


def density_exponent(values: ArrayLike) -> Estimate:
    """Maximum-likelihood phi of the density (1 + w^2)^-phi on the line, phi > 1/2 (A4)."""
    w = np.asarray(values, float).reshape(-1)
    if w.size < 10 or not np.isfinite(w).all():
        raise InputError("the fit needs at least ten finite values")
    target = float(np.log1p(w**2).mean())
    from scipy.optimize import brentq
    from scipy.special import digamma, polygamma

    # normaliser B(1/2, phi - 1/2): d log Z / d phi = psi(phi - 1/2) - psi(phi) = -mean log(1 + w^2)
    phi = float(brentq(lambda f: digamma(f) - digamma(f - 0.5) - target, 0.5 + 1e-9, 1e7, xtol=1e-12, rtol=1e-14))
    information = float(polygamma(1, phi - 0.5) - polygamma(1, phi))
    return Estimate(phi, stderr=1 / math.sqrt(information * w.size), refs=("power-law-escape R10",), assumptions=("independent values",))
