"""The one-vector problem a deep linear network reduces to, and the phases it has.

    min over beta of  kappa beta^T A beta - 2 E.beta + (D + 1) g |beta|^(2 / (D + 1))

with D hidden layers, kappa = prod(1 + s_i^2 / d_i) from the noise and g the geometric mean of the decays. Its stationary points are
beta(tau) = (kappa A + tau)^-1 E with tau |beta(tau)|^(2 D / (D + 1)) = g. Sources: deep-linear-exact R3, R5, R6;
exact-phase-transitions R1-R7, R11. No 1/2 anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable.contract import absent, positive

Array = NDArray[np.float64]
_PER_DECADE = 100


@dataclass(frozen=True, eq=False)
class Stationary:
    """A nontrivial stationary point.

    Attributes:
        tau: its multiplier.
        beta: (d0,) end-to-end map.
        loss: value of the reduced problem, E[y^2] left out.
    """

    tau: float
    beta: Array
    loss: float

    @property
    def norm(self) -> float:
        """|beta|."""
        return float(np.linalg.norm(self.beta))


@dataclass(frozen=True, eq=False)
class Scale:
    """The reduced problem at a given depth.

    Attributes:
        second: (d0, d0) A = E[x x^T], positive semidefinite.
        cross: (d0,) E = E[x y], in the range of A.
        depth: D, hidden layers.
        kappa: prod(1 + s_i^2 / d_i), at least 1.

    Raises:
        InputError: E outside the range of A, kappa below 1, a negative depth.
    """

    second: Array
    cross: Array
    depth: int
    kappa: float = 1.0

    def __post_init__(self) -> None:
        a, e = np.asarray(self.second, dtype=np.float64), np.asarray(self.cross, dtype=np.float64)
        if self.depth < 0 or int(self.depth) != self.depth:
            raise InputError(f"depth is the number of hidden layers, 0 or more; got {self.depth!r}")
        if not (math.isfinite(self.kappa) and self.kappa >= 1):
            raise InputError(f"kappa = prod(1 + s^2 / d) is at least 1, got {self.kappa!r}")
        values, vectors = np.linalg.eigh(a)
        inside = values > 1e-12 * max(values[-1], 1e-300)
        parts = vectors.T @ e
        if np.abs(parts[~inside]).max(initial=0.0) > 1e-8 * max(float(np.abs(e).max(initial=0.0)), 1e-300):
            raise InputError("E[x y] has a part outside the range of E[x x^T]: no data has such moments")
        for name, value in (("values", np.where(inside, values, 0.0)), ("vectors", vectors), ("parts", np.where(inside, parts, 0.0))):
            object.__setattr__(self, f"_{name}", value)

    # ---------------------------------------------------------------- beta(tau)

    def beta(self, tau: float) -> Array:
        """(kappa A + tau)^-1 E; on the range of A for tau = 0."""
        return self._vectors @ self._ratio(np.array([tau]))[0]  # type: ignore[attr-defined, no-any-return]

    def _ratio(self, tau: Array) -> Array:
        """(n, d0) components of beta(tau) in the eigenbasis."""
        below = self.kappa * self._values + tau[:, None]  # type: ignore[attr-defined]
        return np.divide(self._parts, below, out=np.zeros_like(below), where=below > 0)  # type: ignore[attr-defined, no-any-return]

    def log_decay(self, log_tau: Array) -> Array:
        """log g at which beta(tau) is stationary: log tau + D / (D + 1) log |beta|^2."""
        squares = np.square(self._ratio(np.exp(log_tau))).sum(1)
        return log_tau + self.depth / (self.depth + 1) * np.log(np.maximum(squares, 1e-300))  # type: ignore[no-any-return]

    @property
    def trivial(self) -> bool:
        """E = 0: nothing to learn."""
        return not np.abs(self._parts).any()  # type: ignore[attr-defined]

    def value(self, beta: ArrayLike, g: float) -> float:
        """The reduced loss, E[y^2] left out."""
        b = np.asarray(beta, dtype=np.float64)
        return float(
            self.kappa * b @ self.second @ b - 2 * self.cross @ b + (self.depth + 1) * g * np.linalg.norm(b) ** (2 / (self.depth + 1))
        )

    # ---------------------------------------------------------------- stationary points

    def stationary(self, g: float) -> list[Stationary]:
        """All nontrivial stationary points at decay ``g``, smallest |beta| first.

        Raises:
            InputError: g is not positive.
        """
        positive(g=g)
        if self.trivial:
            return []
        if self.depth == 0:
            return [self._point(g)]
        low, high = self._bracket(g)
        if not low < high:
            return []
        count = int(_PER_DECADE * (high - low) / math.log(10)) + 2
        grid = np.linspace(low, high, min(count, 200_000))
        gap = self.log_decay(grid) - math.log(g)
        found = []
        for k in np.nonzero(np.sign(gap[:-1]) * np.sign(gap[1:]) < 0)[0]:
            root = optimize.brentq(lambda x: float(self.log_decay(np.array([x]))[0]) - math.log(g), grid[k], grid[k + 1], xtol=1e-15)
            found.append(self._point(math.exp(root)))
        found += [self._point(math.exp(grid[k])) for k in np.nonzero(gap == 0)[0]]
        return sorted(found, key=lambda point: point.norm)

    def minimum(self, g: float) -> Stationary:
        """The global minimum; beta = 0 with loss 0 and tau = inf when no stationary point lies below."""
        best = min(self.stationary(g), key=lambda point: point.loss, default=None)
        return best if best is not None and best.loss < 0 else Stationary(math.inf, np.zeros(len(self.cross)), 0.0)

    def _point(self, tau: float) -> Stationary:
        beta = self.beta(tau)
        return Stationary(tau, beta, float(-self.cross @ beta + self.depth * tau * beta @ beta))

    def _bracket(self, g: float) -> tuple[float, float]:
        """Bounds of log tau outside which |tau|beta|^p - g| has one sign: |beta| <= |beta(0)| and |beta| <= |E| / tau."""
        p = 2 * self.depth / (self.depth + 1)
        least, size = float(np.linalg.norm(self._ratio(np.zeros(1)))), float(np.linalg.norm(self.cross))
        low = math.log(g) - p * math.log(least) - 1e-9
        if self.depth > 1:
            return low, (p * math.log(size) - math.log(g)) * (self.depth + 1) / (self.depth - 1) + 1e-9
        if g >= size:
            return 0.0, 0.0
        return low, math.log(g * self.kappa * float(self._values.max())) - math.log(size - g) + 1e-9  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- phases

    @property
    def order(self) -> int | None:
        """Order of the transition in g: None for ridge, 2 with one hidden layer, 1 with more (exact-phase-transitions)."""
        return None if self.depth == 0 else 2 if self.depth == 1 else 1

    def critical_decay(self) -> Estimate:
        """g at which the nontrivial minimum stops being the global one (deep-linear-exact R5, R6).

        D = 1: |E|. D >= 2: tau |beta|^(2D/(D+1)) where E.beta = D tau |beta|^2, the largest such g.
        """
        refs = ("deep-linear-exact R6", "exact-phase-transitions R6")
        if self.depth == 0:
            return absent("a linear regressor with ridge is analytic in the decay: no transition", refs)
        if self.trivial:
            return absent("E[x y] = 0: only the trivial solution at any decay", refs)
        if self.depth == 1:
            return Estimate(float(np.linalg.norm(self.cross)), refs=refs)

        def gap(log_tau: float) -> float:
            parts = self._ratio(np.array([math.exp(log_tau)]))[0]
            squares = float(parts @ parts)
            return float(self._parts @ parts) / (self.depth * math.exp(log_tau) * squares) - 1  # type: ignore[attr-defined]

        # E.beta / (tau |beta|^2) = 1 + kappa beta^T A beta / (tau |beta|^2) lies between 1 + kappa a / tau of the extreme eigenvalues
        seen = self._values[self._parts != 0]  # type: ignore[attr-defined]
        low, high = (math.log(self.kappa * float(a) / (self.depth - 1)) for a in (seen.min(), seen.max()))
        grid = np.linspace(low - 1e-6, high + 1e-6, int(_PER_DECADE * (high - low) / math.log(10)) + 3)
        values = [gap(x) for x in grid]
        found = [
            optimize.brentq(gap, a, b, xtol=1e-15)
            for a, b, fa, fb in zip(grid[:-1], grid[1:], values[:-1], values[1:], strict=True)
            if fa * fb <= 0
        ]
        log_g = max(float(self.log_decay(np.array([x]))[0]) for x in found)
        return Estimate(math.exp(log_g), residual=max(abs(gap(x)) for x in found), refs=refs)

    def spinodal(self) -> Estimate:
        """g up to which a nontrivial local minimum survives: the maximum over tau of tau |beta|^(2D/(D+1)); equal to the critical decay
        with one hidden layer (no metastability)."""
        refs = ("deep-linear-exact R6",)
        if self.depth < 2 or self.trivial:
            return self.critical_decay()
        # d log g / d log tau = 0 needs the mean of tau / (kappa a + tau) to be (D+1)/(2D), so tau lies between those of the extremes
        seen = self._values[self._parts != 0]  # type: ignore[attr-defined]
        share = (self.depth + 1) / (2 * self.depth)
        low, high = (math.log(self.kappa * float(a) * share / (1 - share)) for a in (seen.min(), seen.max()))
        grid = np.linspace(low - 1e-3, high + 1e-3, int(_PER_DECADE * (high - low) / math.log(10)) + 5)
        heights = self.log_decay(grid)
        k = int(np.clip(np.argmax(heights), 1, len(grid) - 2))
        found = optimize.minimize_scalar(
            lambda x: -float(self.log_decay(np.array([x]))[0]),
            bounds=(grid[k - 1], grid[k + 1]),
            method="bounded",
            options={"xatol": 1e-11},
        )
        return Estimate(math.exp(-float(found.fun)), refs=refs)

    def jump(self) -> Estimate:
        """|beta| of the nontrivial minimum at the critical decay: 0 with one hidden layer."""
        critical = self.critical_decay()
        if not critical.ok or self.depth == 1:
            return Estimate(0.0) if critical.ok else critical
        points = self.stationary(float(critical))
        return Estimate(min(points, key=lambda p: abs(p.loss)).norm, refs=("exact-phase-transitions R5",))

    def landau(self, width: int, variance: float = 0.0) -> tuple[float, float]:
        """One hidden layer, equal decays: slopes of b^2 in (g_c - g) and of L - E[y^2] in (g_c - g)^2 at the transition
        (exact-phase-transitions R4); b = |beta|^(1/2) / d.

        Raises:
            InputError: another depth.
        """
        if self.depth != 1:
            raise InputError(f"the Landau expansion is that of one hidden layer, not of {self.depth}")
        critical = float(np.linalg.norm(self.cross))
        bend = (variance + width) * float(self.cross @ self.second @ self.cross)
        return critical**2 / (width * bend), -width * critical**2 / bend

    def width_form(self, b: float, g: float, width: int, variance: float) -> float:
        """L(b) - E[y^2] of equal widths d and noise s^2 with every other weight minimised out (exact-phase-transitions R1)."""
        d, scale = float(width), float(width) ** (2 * self.depth) * b ** (2 * self.depth)
        a, e = self._values, self._parts  # type: ignore[attr-defined]
        gain = scale * e**2 / (d**self.depth * (variance + d) ** self.depth * a * b ** (2 * self.depth) + g)
        return float(-gain.sum() + g * self.depth * d**2 * b**2)


def isotropic(a: float, e: float, depth: int, kappa: float = 1.0) -> dict[str, float]:
    """Closed forms when E is an eigenvector of A with eigenvalue ``a``, |E| = ``e``, D >= 1 (exact-phase-transitions R5).

    Returns:
        critical (g_c), jump (|beta| there), spinodal (g_s; equal to g_c for D = 1).

    Raises:
        InputError: a, e not positive, or no hidden layer.
    """
    positive(a=a, e=e, kappa=kappa)
    if depth < 1:
        raise InputError("a linear regressor has no transition")
    jump = e * (depth - 1) / (depth * a * kappa)
    critical = e / depth * jump ** ((depth - 1) / (depth + 1)) if depth > 1 else e
    if depth == 1:
        return {"critical": critical, "jump": jump, "spinodal": critical}
    tau = a * kappa * (depth + 1) / (depth - 1)
    return {"critical": critical, "jump": jump, "spinodal": tau * (e / (a * kappa + tau)) ** (2 * depth / (depth + 1))}


def infinite_depth(a: float, e: float) -> float:
    """Limit of (D + 1) g_c as D grows at kappa = 1: E^2 / a, where an L0 penalty would jump (exact-phase-transitions R11)."""
    positive(a=a, e=e)
    return e * e / a
