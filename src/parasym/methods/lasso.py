"""The lasso by spred: min |y - X w|^2 / (2 n) + alpha |w|_1 through w = u v, to a duality gap.

Smooth minimisation of |y - X (u v)|^2 / (2 n) + (alpha / 2)(|u|^2 + |v|^2) by L-BFGS, on a working set that grows by the violation of
|g_j| <= alpha, with factors put back to |u| = |v| between rounds; the certificate |g_j| < alpha says which weights are zero, and the
normal equations on the support finish the digits. On a convex problem coordinate descent is faster: spred's place is inside networks.

Source: spred R1-R4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from parasym.core.errors import InputError
from parasym.core.guards import blas_threads


@dataclass(frozen=True)
class Lasso:
    """A solution with its proof.

    Attributes:
        weights: (p,) w, exact zeros where the certificate has them.
        objective: |y - X w|^2 / (2 n) + alpha |w|_1.
        gap: duality gap, an upper bound of the distance to the optimal objective, in the same units.
        relative_gap: gap / |y|^2 * 2 n, the gap in units of the objective at w = 0.
        support: number of weights that are not zero.
        steps: L-BFGS steps in all; rounds: working sets.
        converged: relative_gap <= the wanted one.
    """

    weights: np.ndarray
    objective: float
    gap: float
    relative_gap: float
    support: int
    steps: int
    rounds: int
    converged: bool

    def __str__(self) -> str:
        state = "" if self.converged else ", NOT CONVERGED"
        gap = f"duality gap {self.gap:.1e} ({self.relative_gap:.1e} relative)"
        return f"objective {self.objective:.10g}, {gap}, {self.support} weights{state}"


def lasso(x: np.ndarray, y: np.ndarray, alpha: float, *, tol: float = 1e-10, max_rounds: int = 60) -> Lasso:
    """Solve the lasso without intercept, in float64.

    Args:
        x: (n, p) design; y: (n,) target.
        alpha: penalty, > 0, in scikit-learn's convention.
        tol: wanted duality gap, relative to the objective at w = 0.
        max_rounds: most working sets.

    Raises:
        InputError: shapes that do not fit, numbers that are not finite, alpha <= 0.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or 0 in x.shape:
        raise InputError(f"lasso needs x of shape (n, p) and y of shape (n,), got {x.shape} and {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("x or y holds NaN or infinity: clean the data first.")
    if not alpha > 0:
        raise InputError(f"alpha must be positive, got {alpha}; without a penalty use least squares.")
    with blas_threads():
        return _solve(x, y, alpha, tol, max_rounds)


def duality_gap(x: np.ndarray, y: np.ndarray, w: np.ndarray, alpha: float) -> tuple[float, float]:
    """Objective and duality gap of any w; the dual point is the residual, shrunk until |x^T theta| <= alpha n."""
    return _gap(x, y, y - x @ w, w, alpha)[:2]


def _gap(x: np.ndarray, y: np.ndarray, r: np.ndarray, w: np.ndarray, alpha: float) -> tuple[float, float, np.ndarray]:
    n = len(y)
    slope = x.T @ r / n
    scale = min(1.0, alpha / max(float(np.abs(slope).max()), 1e-300))
    primal = float(r @ r) / (2 * n) + alpha * float(np.abs(w).sum())
    theta = scale * r
    dual = float(y @ y - (y - theta) @ (y - theta)) / (2 * n)
    return primal, max(primal - dual, 0.0), slope


def _solve(x: np.ndarray, y: np.ndarray, alpha: float, tol: float, max_rounds: int) -> Lasso:
    n, p = x.shape
    unit = float(y @ y) / (2 * n)
    w, steps, size, rounds = np.zeros(p), 0, 0, 0
    primal, gap, slope = _gap(x, y, y, w, alpha)
    for rounds in range(1, max_rounds + 1):
        if gap <= tol * unit:
            rounds -= 1
            break
        # the support, and as many of the worst violators again: at most doubling, so that a large set is not solved for nothing
        need = np.abs(slope)
        need[w != 0] = np.inf
        size = int(min(p, max(2 * np.count_nonzero(w), size, 16)))
        working = np.argpartition(-need, size - 1)[:size] if size < p else np.arange(p)
        working = working[need[working] > 0.5 * alpha] if size < p else working
        part, used = _factors(x[:, working], y, w[working], alpha, tol * unit)
        steps += used
        new = np.zeros(p)
        new[working] = part
        r = y - x[:, working] @ part
        now = _gap(x, y, r, new, alpha)
        if now[0] >= primal - 1e-3 * gap and size < p:
            size = min(p, 2 * size)  # nothing gained: look wider
        # the gap decides where objectives differ by rounding only
        if now[0] < primal - 1e-13 * unit or (now[0] < primal + 1e-13 * unit and now[1] < gap):
            w, (primal, gap, slope) = new, now
    return Lasso(w, primal, gap, gap / max(unit, 1e-300), int(np.count_nonzero(w)), steps, rounds, gap <= tol * max(unit, 1e-300))


def _factors(x: np.ndarray, y: np.ndarray, w: np.ndarray, alpha: float, wanted: float) -> tuple[np.ndarray, int]:
    """One working set: L-BFGS on (u, v) in stages, each followed by the certificate and the normal equations on the support."""
    n, p = x.shape
    gram, target = (x.T @ x / n, x.T @ y / n) if p <= 2 * n else (None, None)
    square = float(y @ y) / (2 * n)
    scale = max(float(np.abs(target if target is not None else x.T @ y / n).max()), alpha) / max(float((x * x).sum(0).max()) / n, 1e-300)
    steps = 0

    def smooth(w: np.ndarray) -> tuple[float, np.ndarray]:
        if gram is not None and target is not None:
            g = gram @ w
            return 0.5 * float(w @ g) - float(target @ w) + square, g - target
        r = x @ w - y
        return float(r @ r) / (2 * n), x.T @ r / n

    def cost(z: np.ndarray) -> tuple[float, np.ndarray]:
        u, v = z[:p], z[p:]
        value, g = smooth(u * v)
        return value + 0.5 * alpha * float(z @ z), np.concatenate([g * v + alpha * u, g * u + alpha * v])

    best = w
    best_value, best_gap, _ = _gap(x, y, y - x @ w, w, alpha)
    for stage in range(8):
        slope = smooth(best)[1]
        # balanced factors; a zero pair is a saddle, so it starts a little on the side its gradient wants, unless it is certain to stay
        seed = -np.sign(slope) * 1e-3 * scale * (np.abs(slope) > (0.5 if stage == 0 else 1 - 1e-9) * alpha)
        start = np.where(np.abs(best) < 1e-6 * scale, seed, best)
        root = np.sqrt(np.abs(start))
        found = minimize(
            cost, np.concatenate([np.sign(start) * root, root]), jac=True, method="L-BFGS-B",
            options={"maxiter": 60 * (stage + 1), "maxcor": 20, "gtol": 1e-14, "ftol": 1e-16},
        )  # fmt: skip
        steps += int(found.nit)
        product = found.x[:p] * found.x[p:]
        for candidate in (product, _polished(x, y, product, smooth, alpha, scale)):
            value, gap, _ = _gap(x, y, y - x @ candidate, candidate, alpha)
            if value < best_value - 1e-13 * square or (value < best_value + 1e-13 * square and gap < best_gap):
                best, best_value, best_gap = candidate, value, gap
        if best_gap <= 0.3 * wanted:
            break
    return best, steps


def _polished(x: np.ndarray, y: np.ndarray, w: np.ndarray, smooth: object, alpha: float, scale: float) -> np.ndarray:
    """The minimum on a support and its signs by the normal equations, dropping what changes sign and adding what violates."""
    n = len(y)
    signs = np.sign(w) * (np.abs(w) > 1e-6 * scale)
    for _ in range(12):
        on = np.flatnonzero(signs)
        if not len(on) or len(on) > n:
            break
        block = x[:, on]
        solved = _normal(block.T @ block / n, block.T @ y / n - alpha * signs[on])
        crossed = np.sign(solved) != signs[on]
        if crossed.any():
            signs[on[crossed]] = 0
            continue
        out = np.zeros_like(w)
        out[on] = solved
        slope = x.T @ (y - block @ solved) / n
        missing = (signs == 0) & (np.abs(slope) > alpha * (1 + 1e-12))
        if not missing.any():
            return out
        signs[missing] = np.sign(slope[missing])
    return w


def _normal(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """gram^-1 right, of least norm where columns depend on each other (then equal columns share their weight, with one sign)."""
    try:
        factor = cho_factor(gram)
        if np.diag(factor[0]).min() ** 2 > 1e-11 * gram.diagonal().max():
            return np.asarray(cho_solve(factor, right))
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(gram)
    keep = values > 1e-11 * values[-1]
    return np.asarray(vectors[:, keep] @ ((vectors[:, keep].T @ right) / values[keep]))
