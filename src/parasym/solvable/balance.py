"""The law of balance in closed form: a diagonal linear network on the balanced manifold is one scalar equation.

f = v x, v a sum over ``width`` units of products of ``factors`` weights, loss (v x - y)^2, SGD at temperature T = eta / S. The stationary
density of |v|, the sparsity transition and the most likely value follow from five moments of the data (law-of-balance R4-R11).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parasym.core.errors import InputError


@dataclass(frozen=True)
class Moments:
    """a1 = Var[x^2], a2 = E[x^3 y] - E[x^2] E[xy], a3 = Var[xy], b1 = E[x^2], b2 = E[xy]; the gradient noise is 4 v-wise k(v),
    k(v) = a1 v^2 - 2 a2 v + a3."""

    a1: float
    a2: float
    a3: float
    b1: float
    b2: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Empirical moments of samples x (n,), y (n,)."""
        x, y = x.double(), y.double()
        xx, xy = x * x, x * y
        cov = float((xx * xy).mean() - xx.mean() * xy.mean())
        return cls(float(xx.var(correction=0)), cov, float(xy.var(correction=0)), float(xx.mean()), float(xy.mean()))


def sparsity_transition(moments: Moments) -> tuple[float, float]:
    """(T_c, T_c / 3) for two factors: above T_c = b2 / a3 all mass is at v = 0; above T_c / 3 the most likely value is 0 (R8).

    Raises:
        InputError: b2 <= 0: the branch of positive v holds no minimum.
    """
    if moments.b2 <= 0:
        raise InputError(f"The transition needs E[xy] > 0, got {moments.b2:g}: reflect v.")
    return moments.b2 / moments.a3, moments.b2 / moments.a3 / 3


def reduced_sde(moments: Moments, temperature: float, factors: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Drift a(v) and squared diffusion b(v)^2 of dv = a dt + b dW (Ito) on the balanced manifold of width one, v > 0 or v < 0 (R4).

    dv = -L |v|^(2-2/L) (l' dt + sqrt(T c) dW) + L (L-1) / 2 v |v|^(2-4/L) T c dt with l'(v) = 2 (b1 v - b2), c(v) = 4 k(v); time eta k.

    Raises:
        InputError: fewer than one factor, or a temperature that is not positive.
    """
    if factors < 1 or temperature <= 0:
        raise InputError(f"Give factors >= 1 and a positive temperature, got {factors}, {temperature}.")
    m, L, T = moments, factors, temperature

    def noise(v: Tensor) -> Tensor:
        return 4 * T * (m.a1 * v**2 - 2 * m.a2 * v + m.a3)

    def drift(v: Tensor) -> Tensor:
        s = v.abs()
        return -2 * L * s ** (2 - 2 / L) * (m.b1 * v - m.b2) + L * (L - 1) / 2 * v * s ** (2 - 4 / L) * noise(v)

    def square(v: Tensor) -> Tensor:
        return L**2 * v.abs() ** (4 - 4 / L) * noise(v)

    return drift, square


def log_density(moments: Moments, temperature: float, factors: int, log_s: Tensor, width: int = 1, sign: int = 1) -> Tensor:
    """log p(s) up to a constant at s = exp(log_s), an increasing grid, for the branch of v = sign s (R5); one factor on s > 0 too.

    The exponent is integrated by the trapezoidal rule in log s, outwards from the grid point nearest to s = 1.
    """
    if factors < 1 or temperature <= 0 or width < 1:
        raise InputError(f"Give factors >= 1, width >= 1 and a positive temperature, got {factors}, {width}, {temperature}.")
    m, L = moments, factors
    s = log_s.exp()
    k = m.a1 * s**2 - 2 * sign * m.a2 * s + m.a3
    rate = width ** (1 - 2 / L) * (m.b1 * s - sign * m.b2) / (L * s ** (2 - 2 / L) * k) * s / temperature
    steps = 0.5 * (rate[1:] + rate[:-1]) * (log_s[1:] - log_s[:-1])
    integral = torch.cat([torch.zeros(1, dtype=s.dtype), steps.cumsum(0)])
    start = int(log_s.abs().argmin())
    back = torch.cat([steps[:start].flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=s.dtype)])
    integral = torch.cat([-back[:start], integral[start:] - integral[start]])
    return -3 * (1 - 1 / L) * log_s - k.log() - integral


def _grid(factors: int, points: int = 150_001) -> Tensor:
    low = -300.0 if factors == 2 else -12.0  # two factors: a power law down to 0
    near = torch.linspace(-9.0, 9.0, points, dtype=torch.float64)
    if low >= -12.0:
        return torch.linspace(low, 9.0, points, dtype=torch.float64)
    return torch.cat([torch.linspace(low, -9.0, points // 3, dtype=torch.float64)[:-1], near])


def _weights(moments: Moments, temperature: float, factors: int, width: int) -> tuple[Tensor, Tensor]:
    """Grid of v and normalised probabilities of its points."""
    if factors == 1:
        return _line(moments, temperature)
    x = _grid(factors)
    log_p = log_density(moments, temperature, factors, x, width) + x
    w = torch.zeros_like(x)
    gaps = x[1:] - x[:-1]
    w[1:] += 0.5 * gaps
    w[:-1] += 0.5 * gaps
    p = (log_p - log_p.max()).exp() * w
    return x.exp(), p / p.sum()


def _line(m: Moments, temperature: float) -> tuple[Tensor, Tensor]:
    """One factor (linear regression): the density on the whole line (R7)."""
    delta = math.sqrt(max(m.a1 * m.a3 - m.a2**2, 1e-300))
    centre, unit = m.a2 / m.a1, delta / m.a1
    angle = torch.linspace(-math.pi / 2 + 1e-6, math.pi / 2 - 1e-6, 200_001, dtype=torch.float64)
    v = centre + unit * angle.tan()
    k = m.a1 * v**2 - 2 * m.a2 * v + m.a3
    log_p = -(1 + m.b1 / (2 * temperature * m.a1)) * k.log() - (m.a2 * m.b1 - m.a1 * m.b2) / (temperature * m.a1 * delta) * angle
    log_p = log_p - 2 * angle.cos().log()  # dv = unit / cos^2 d angle
    p = (log_p - log_p.max()).exp()
    return v, p / p.sum()


def density(moments: Moments, temperature: float, factors: int, at: Tensor, width: int = 1) -> Tensor:
    """Normalised density of v > 0 at the points ``at`` (n,), positive.

    Raises:
        InputError: not normalisable: two factors above T_c, where all mass is at zero.
    """
    _refuse_collapsed(moments, temperature, factors)
    x = _grid(factors)
    log_p = log_density(moments, temperature, factors, x, width)
    top = (log_p + x).max()
    norm = torch.trapezoid((log_p + x - top).exp(), x)
    inside = torch.searchsorted(x, at.double().log()).clamp(1, len(x) - 1)
    low, high = x[inside - 1], x[inside]
    share = (at.double().log() - low) / (high - low)
    return ((1 - share) * log_p[inside - 1] + share * log_p[inside] - top).exp() / norm


def _refuse_collapsed(moments: Moments, temperature: float, factors: int) -> None:
    if factors == 2 and temperature >= sparsity_transition(moments)[0]:
        raise InputError("Two factors above T_c: the density is not normalisable, all mass is at v = 0 (law-of-balance R8).")


def mean_and_variance(moments: Moments, temperature: float, factors: int, width: int = 1) -> tuple[float, float]:
    """Mean and variance of v in the stationary state (zero for two factors above T_c)."""
    if factors == 2 and temperature >= sparsity_transition(moments)[0]:
        return 0.0, 0.0
    v, p = _weights(moments, temperature, factors, width)
    mean = float((v * p).sum())
    return mean, float(((v - mean).square() * p).sum())


def quantile(moments: Moments, temperature: float, factors: int, share: float, width: int = 1) -> float:
    """The value below which ``share`` of the mass lies."""
    _refuse_collapsed(moments, temperature, factors)
    v, p = _weights(moments, temperature, factors, width)
    return float(v[int(torch.searchsorted(p.cumsum(0), share).clamp(max=len(v) - 1))])


def mode(moments: Moments, temperature: float, factors: int, width: int = 1) -> float:
    """The most likely v > 0; 0 where the density is largest at the origin."""
    x = _grid(factors) if factors != 2 else torch.linspace(-40.0, 3.0, 60_001, dtype=torch.float64)
    p = log_density(moments, temperature, factors, x, width)
    inner = p[1:-1]
    peaks = ((inner >= p[:-2]) & (inner > p[2:])).nonzero()
    return 0.0 if len(peaks) == 0 else float(x[1 + int(peaks[inner[peaks].argmax()])].exp())
