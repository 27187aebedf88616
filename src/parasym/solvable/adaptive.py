"""Distribution of the adaptive step u = g / sqrt(v) for Gaussian gradients (adaptive-gradient-distribution R1-R6)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from parasym.core.errors import InputError
from parasym.core.results import Estimate

REFS = ("adaptive-gradient-distribution R2",)


def ema_weights(t: int, beta2: float) -> NDArray[np.float64]:
    """w_i = (1-b) b^(t-i) / (1-b^t), oldest first, (t,)."""
    _check(t, beta2)
    return np.asarray((1 - beta2) * beta2 ** np.arange(t - 1, -1, -1.0) / -math.expm1(t * math.log(beta2)))


def uniform_moments(t: int) -> dict[str, Estimate]:
    """Moments of u for v_t the plain mean of t squares (R1): u^2/t ~ Beta(1/2, (t-1)/2)."""
    _check(t, 0.5)
    mean = math.sqrt(t / math.pi) * math.exp(special.gammaln(t / 2) - special.gammaln((t + 1) / 2)) if t > 1 else 1.0
    fourth = 3 * t / (t + 2)
    values = {"E|u|": mean, "E u^2": 1.0, "E u^4": fourth, "Var|u|": 1 - mean**2, "Var u^2": 2 * (t - 1) / (t + 2)}
    return {name: Estimate(value, refs=("adaptive-gradient-distribution R1",)) for name, value in values.items()}


def weighted_moments(weights: NDArray[np.float64]) -> dict[str, Estimate]:
    """Moments of u = g_t / sqrt(sum w_i g_i^2) for any positive weights, current one last, by one-dimensional integrals (R2).

    The residual is the change when the grid is halved.
    """
    w = np.asarray(weights, float)
    if w.ndim != 1 or not len(w) or not np.isfinite(w).all() or (w <= 0).any():
        raise InputError("the weights must be positive numbers, one for each gradient")
    fine = _integrals(w, 16001)
    coarse = _integrals(w, 8001)
    mean, second, fourth = fine
    moments = {"E|u|": mean, "E u^2": second, "E u^4": fourth, "Var|u|": second - mean**2, "Var u^2": fourth - second**2}
    residual = max(abs(a - b) for a, b in zip(fine, coarse, strict=True))
    return {name: Estimate(value, residual=residual, refs=REFS) for name, value in moments.items()}


def _integrals(w: NDArray[np.float64], points: int) -> tuple[float, float, float]:
    """(E|u|, E u^2, E u^4) by the trapezoid in z = log s, products in logs."""
    if len(w) == 1:
        u = 1 / math.sqrt(w[0])
        return u, u**2, u**4
    z = np.linspace(-80, 80, points)
    s = np.exp(z)
    logs = np.zeros_like(s)
    for block in np.array_split(w, max(1, len(w) // 64)):
        logs += np.log1p(2 * s[:, None] * block).sum(1)
    now = np.log1p(2 * s * w[-1])
    step = z[1] - z[0]
    second = np.exp(z - now - 0.5 * logs).sum() * step
    fourth = 3 * np.exp(2 * z - 2 * now - 0.5 * logs).sum() * step
    first = math.sqrt(2) / math.pi * np.exp(0.5 * z - now - 0.5 * (logs - now)).sum() * step
    return float(first), float(second), float(fourth)


def ema_moments(t: int, beta2: float) -> dict[str, Estimate]:
    """Moments of u at step t with the bias-corrected moving average (R2)."""
    return weighted_moments(ema_weights(t, beta2))


def bound(t: int, beta2: float | None = None) -> float:
    """|u_t| <= sqrt((1-b^t)/(1-b)), or sqrt t for the plain mean, whatever the gradients (R3)."""
    _check(t, 0.5 if beta2 is None else beta2)
    return math.sqrt(t) if beta2 is None else math.sqrt(-math.expm1(t * math.log(beta2)) / (1 - beta2))


def limit_with_mean(m: float) -> float:
    """Limit of Var|u| for gradients N(m, 1), t -> inf, b -> 1: 1 - (E|g|)^2 / (1 + m^2) (R4)."""
    mean = math.sqrt(2 / math.pi) * math.exp(-(m**2) / 2) + m * math.erf(m / math.sqrt(2))
    return 1 - mean**2 / (1 + m**2)


def rectification_mean(t: int) -> Estimate:
    """E[1/v_t] = t/(t-2) for the plain mean: what diverges at t <= 2, and why warm-up was thought needed (R5)."""
    _check(t, 0.5)
    refs = ("adaptive-gradient-distribution R5",)
    return Estimate(t / (t - 2), refs=refs) if t > 2 else Estimate(None, status="not_applicable", note="infinite for t <= 2", refs=refs)


def excluded_variance(t: int) -> Estimate:
    """Var u when v leaves the current gradient out: Student-t with t-1 degrees of freedom, (t-1)/(t-3) (R5)."""
    _check(t, 0.5)
    refs = ("adaptive-gradient-distribution R5",)
    return (
        Estimate((t - 1) / (t - 3), refs=refs) if t > 3 else Estimate(None, status="not_applicable", note="infinite for t <= 3", refs=refs)
    )


def _check(t: int, beta2: float) -> None:
    if isinstance(t, bool) or not isinstance(t, int) or t < 1:
        raise InputError(f"the step must be a positive integer, got {t!r}")
    if not 0 < beta2 < 1:
        raise InputError(f"beta2 must lie strictly between 0 and 1, got {beta2}")


def ema_curve(longest: int, beta2: float) -> NDArray[np.float64]:
    """Var|u_t| for t = 1..longest at the cost of one integral each: the integrals of R2 with the current weight scaled out."""
    _check(longest, beta2)
    z = np.linspace(-80, 80, 16001)
    s, step = np.exp(z), float(z[1] - z[0])
    now = np.log1p(2 * s)
    past = np.zeros_like(s)  # sum over earlier gradients of log(1 + 2 s beta^k)
    out = np.empty(longest)
    for t in range(1, longest + 1):
        if t == 1:
            out[0] = 0.0  # u = sign g
        else:
            past += np.log1p(2 * s * beta2 ** (t - 1))
            scale = bound(t, beta2)  # 1 / sqrt(current weight)
            first = scale * math.sqrt(2) / math.pi * float(np.exp(0.5 * z - now - 0.5 * past).sum()) * step
            second = scale**2 * float(np.exp(z - 1.5 * now - 0.5 * past).sum()) * step
            out[t - 1] = second - first**2
    return out
