"""Products of random factors 1 - lr h: the exponent E log|1 - lr h|, its roots, and what it decides.

Sources: probabilistic-stability R1-R8, sgd-local-maxima R0-R5.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.simulate.expr import Expr, where
from parasym.simulate.system import Draws
from parasym.solvable.contract import positive

Phase = Literal["I", "II", "III", "IV"]
REFS = ("probabilistic-stability R1", "probabilistic-stability R5")


class Law(ABC):
    """Distribution of a random curvature h (or of chi = x y)."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """E h."""

    @property
    @abstractmethod
    def variance(self) -> float:
        """Var h."""

    @property
    def square(self) -> float:
        """E h^2."""
        return self.variance + self.mean**2

    @abstractmethod
    def log_factor(self, lr: float) -> float:
        """E log|1 - lr h|; minus infinity when a factor of positive probability is zero."""

    @abstractmethod
    def moment(self, lr: float, order: float) -> float:
        """E|1 - lr h|^order."""

    @abstractmethod
    def averaged(self, batch: int) -> Law:
        """The law of the mean of ``batch`` independent draws."""

    @abstractmethod
    def draw(self, draws: Draws) -> Expr:
        """One draw, in a step of the simulator."""


@dataclass(frozen=True)
class Discrete(Law):
    """h takes ``values`` with probabilities ``weights`` (equal when not given)."""

    values: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        values = tuple(float(v) for v in self.values)
        weights = tuple(float(w) for w in self.weights) or (1 / max(len(values), 1),) * len(values)
        if not values or len(weights) != len(values) or not all(map(math.isfinite, values)):
            raise InputError(f"a discrete law needs finite values with one weight each, got {self.values} and {self.weights}")
        if min(weights) < 0 or abs(sum(weights) - 1) > 1e-9:
            raise InputError(f"the weights of a discrete law must be probabilities that add up to 1, got {weights}")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "weights", weights)

    @property
    def mean(self) -> float:
        """E h."""
        return math.fsum(w * v for v, w in zip(self.values, self.weights, strict=True))

    @property
    def variance(self) -> float:
        """Var h."""
        return math.fsum(w * (v - self.mean) ** 2 for v, w in zip(self.values, self.weights, strict=True))

    def log_factor(self, lr: float) -> float:
        """Sum of p log|1 - lr h|."""
        factors = [(w, abs(1 - lr * v)) for v, w in zip(self.values, self.weights, strict=True) if w > 0]
        return -math.inf if any(f == 0 for _, f in factors) else math.fsum(w * math.log(f) for w, f in factors)

    def moment(self, lr: float, order: float) -> float:
        """Sum of p |1 - lr h|^order."""
        return math.fsum(w * abs(1 - lr * v) ** order for v, w in zip(self.values, self.weights, strict=True))

    def averaged(self, batch: int) -> Discrete:
        """The convolution; values that agree to twelve digits are merged."""
        _batch(batch)
        law: dict[float, float] = {}
        for value, weight in zip(self.values, self.weights, strict=True):
            law[value] = law.get(value, 0.0) + weight
        total = dict(law)
        for _ in range(batch - 1):
            summed: dict[float, float] = {}
            for a, p in total.items():
                for b, q in law.items():
                    key = float(f"{a + b:.12g}")
                    summed[key] = summed.get(key, 0.0) + p * q
            if len(summed) > 200_000:
                raise InputError(f"the mean of {batch} draws of {len(self.values)} values takes too many values to list")
            total = summed
        scale = math.fsum(total.values())
        return Discrete(tuple(v / batch for v in total), tuple(w / scale for w in total.values()))

    def draw(self, draws: Draws) -> Expr:
        """By comparing a uniform with the cumulative weights."""
        u = draws.uniform()
        out = u.tape.constant(self.values[-1])
        edges = np.cumsum(self.weights)[:-1].tolist()
        for value, edge in zip(reversed(self.values[:-1]), reversed(edges), strict=True):
            out = where(u < edge, value, out)
        return out


@dataclass(frozen=True)
class Normal(Law):
    """h ~ N(mu, sd^2)."""

    mu: float
    sd: float

    def __post_init__(self) -> None:
        positive(sd=self.sd)
        if not math.isfinite(self.mu):
            raise InputError(f"the mean of a normal law must be finite, got {self.mu}")

    @property
    def mean(self) -> float:
        """E h."""
        return self.mu

    @property
    def variance(self) -> float:
        """Var h."""
        return self.sd**2

    def log_factor(self, lr: float) -> float:
        """E log|Z| for Z ~ N(1 - lr mu, (lr sd)^2), by the non-central chi-square series."""
        return log_of_normal(1 - lr * self.mu, lr * self.sd)

    def moment(self, lr: float, order: float) -> float:
        """E|Z|^order, by the confluent hypergeometric function."""
        m, s = 1 - lr * self.mu, abs(lr) * self.sd
        scale = (math.sqrt(2) * s) ** order * math.gamma((1 + order) / 2) / math.sqrt(math.pi)
        return scale * float(special.hyp1f1(-order / 2, 0.5, -0.5 * (m / s) ** 2))

    def averaged(self, batch: int) -> Normal:
        """Variance divided by the batch."""
        return Normal(self.mu, self.sd / math.sqrt(_batch(batch)))

    def draw(self, draws: Draws) -> Expr:
        """mu + sd z."""
        return self.mu + self.sd * draws.normal()


@dataclass(frozen=True)
class Uniform(Law):
    """h uniform on (low, high)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"a uniform law needs two finite numbers in increasing order, got {self.low}, {self.high}")

    @property
    def mean(self) -> float:
        """E h."""
        return (self.low + self.high) / 2

    @property
    def variance(self) -> float:
        """Var h."""
        return (self.high - self.low) ** 2 / 12

    def log_factor(self, lr: float) -> float:
        """From the antiderivative z log|z| - z."""
        ends = (1 - lr * self.high, 1 - lr * self.low)
        low, high = (float(special.xlogy(z, abs(z))) - z for z in ends)
        return (high - low) / (ends[1] - ends[0])

    def moment(self, lr: float, order: float) -> float:
        """From the antiderivative z |z|^order / (order + 1)."""
        ends = (1 - lr * self.high, 1 - lr * self.low)
        low, high = (z * abs(z) ** order / (order + 1) for z in ends)
        return (high - low) / (ends[1] - ends[0])

    def averaged(self, batch: int) -> Law:
        """Itself for a batch of one; no closed form beyond.

        Raises:
            InputError: batch > 1; draw samples and use a `Discrete` law.
        """
        if _batch(batch) == 1:
            return self
        raise InputError("the mean of several uniform draws has no closed form here: use a Discrete law of samples")

    def draw(self, draws: Draws) -> Expr:
        """low + (high - low) u."""
        return self.low + (self.high - self.low) * draws.uniform()


def log_of_normal(m: float, s: float) -> float:
    """E log|Z| for Z ~ N(m, s^2): log s + (log 2 + sum_j Pois(j; d/2) psi(1/2 + j)) / 2 with d = (m/s)^2 (probabilistic-stability R5).

    For d > 2000 the asymptotic series log|m| - sum (2k-1)!! / (2k d^k), whose terms there fall below rounding before they grow.
    """
    s = abs(s)
    if s == 0:
        return math.log(abs(m)) if m else -math.inf
    d = (m / s) ** 2
    if d > 2000:
        total, term = math.log(abs(m)), 1.0
        for k in range(1, 40):
            term *= (2 * k - 1) / d
            total -= term / (2 * k)
            if term < 1e-18:
                break
        return total
    j = np.arange(0, int(d / 2 + 14 * math.sqrt(d / 2 + 1)) + 40)
    weights = stats.poisson.pmf(j, d / 2)
    return math.log(s) + 0.5 * (math.log(2) + math.fsum(weights * special.digamma(0.5 + j)) / math.fsum(weights))


def _batch(batch: int) -> int:
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"the batch size must be a positive integer, got {batch!r}")
    return batch


# ------------------------------------------------------------------------------------------------ what the exponent decides


def exponent(law: Law, lr: float, batch: int = 1) -> Estimate:
    """Lambda = E log|1 - lr h_S|, per step: below zero, and only then, the point attracts in probability (probabilistic-stability R1).

    A factor that is zero with positive probability gives minus infinity: stable at once; the status is then ``not_applicable``
    and the note says so.
    """
    positive(lr=lr)
    value = law.averaged(batch).log_factor(lr)
    if math.isinf(value):
        return Estimate(
            None, status="not_applicable", refs=REFS, note="a factor is exactly zero: the exponent is minus infinity, stable at once"
        )
    return Estimate(value, refs=REFS, assumptions=("independent draws at every step", "linearised at the point"))


def small_rate_exponent(law: Law, lr: float, batch: int = 1) -> float:
    """-lr E h - lr^2 E h^2 / 2, the exponent to second order in the learning rate (probabilistic-stability R2)."""
    averaged = law.averaged(batch)
    return -lr * averaged.mean - lr**2 * averaged.square / 2


def moment_limit(law: Law, batch: int = 1) -> float:
    """2 E h / E h^2: below it the second moment contracts; zero or negative when no learning rate does (probabilistic-stability R4)."""
    averaged = law.averaged(batch)
    return 2 * averaged.mean / averaged.square


def roots(value: Callable[[float], float], low: float, high: float, points: int = 400) -> list[Estimate]:
    """Where a function of a positive number changes sign between ``low`` and ``high``, bracketed on a logarithmic grid.

    The residual is the width of the last bracket, relative to the root. A jump through an infinity is no root.
    """
    positive(low=low, high=high)
    grid = np.geomspace(low, high, points)
    seen = [value(float(x)) for x in grid]
    found: list[Estimate] = []
    for a, b, fa, fb in zip(grid[:-1], grid[1:], seen[:-1], seen[1:], strict=True):
        if math.isfinite(fa) and math.isfinite(fb) and fa * fb < 0:
            root, report = optimize.brentq(value, float(a), float(b), xtol=1e-15, rtol=1e-14, full_output=True)
            found.append(Estimate(root, residual=abs(value(root)), status="ok" if report.converged else "not_converged", refs=REFS))
    return found


def critical_rates(law: Law, batch: int = 1, low: float = 1e-3, high: float = 100.0) -> list[Estimate]:
    """Learning rates at which the exponent changes sign, increasing (probabilistic-stability R2, R8)."""
    averaged = law.averaged(batch)
    return roots(averaged.log_factor, low, high)


def critical_batch(law: Law, lr: float, largest: int = 4096) -> Estimate:
    """Smallest batch at which E log|1 + lr chi_S| > 0: the escape from a saddle that a smaller batch is held at (R7)."""
    for batch in range(1, largest + 1):
        if law.averaged(batch).log_factor(-lr) > 0:
            return Estimate(batch, refs=("probabilistic-stability R7",))
    return Estimate(None, status="not_applicable", note=f"no batch up to {largest} escapes", refs=("probabilistic-stability R7",))


def two_layer_exponents(law: Law, lr: float, batch: int = 1) -> tuple[float, float]:
    """(Lambda_+, Lambda_-) = (E log|1 + lr chi|, E log|1 - lr chi|) at the origin of u sigma(w x) (R6)."""
    averaged = law.averaged(batch)
    return averaged.log_factor(-lr), averaged.log_factor(lr)


def phase(plus: float, minus: float) -> Phase:
    """Which of the four phases two exponents name (R6): I learns, II learns the wrong sign, III dies, IV is unstable throughout."""
    if plus > 0:
        return "I" if minus < 0 else "IV"
    return "II" if minus > 0 else "III"


def largest_stable_rate(curvatures: Sequence[float]) -> Estimate:
    """Largest learning rate with a negative exponent for batches of one on the curvatures h_i (R8): the last root, by bracketing."""
    law = Discrete(tuple(curvatures))
    if min(law.values) <= 0:
        return Estimate(None, status="not_applicable", note="a curvature is not positive", refs=("probabilistic-stability R8",))
    found = critical_rates(law, low=0.5 / max(law.values), high=50 / min(law.values))
    return found[-1] if found else Estimate(None, status="not_converged", note="no sign change found", refs=("probabilistic-stability R8",))


def design_slow_escape(eps: float, lr: float, b: float) -> float:
    """The c that makes x in {b, -c} escape at exactly the rate ``eps``: (e^{2 eps} / (1 - lr b) - 1) / lr (sgd-local-maxima R2).

    Raises:
        InputError: lr b >= 1.
    """
    positive(lr=lr, b=b)
    if lr * b >= 1:
        raise InputError(f"the construction needs lr b < 1, got {lr * b}")
    return (math.exp(2 * eps) / (1 - lr * b) - 1) / lr
