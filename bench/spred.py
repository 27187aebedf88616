"""Time the lasso by spred beside FISTA, scikit-learn and celer on one synthetic problem, all to the same objective gap.

Run with OMP_NUM_THREADS=1. n = 500, p = 2000, 30 true weights, noise .5, penalties .1 and .01 of the largest; processor seconds, the
least of the repeats; gap = (F - F*) / (F(0) - F*). spred has to reach 1e-6 within ten times FISTA's time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from sklearn.linear_model import Lasso as CoordinateDescent

from parasym.core.guards import blas_threads
from parasym.methods import lasso

LIMIT = 10.0


def problem(n: int = 500, p: int = 2000, true: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian design and a sparse truth."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((n, p)), np.zeros(p)
    w[rng.choice(p, true, False)] = rng.standard_normal(true)
    return x, x @ w + 0.5 * rng.standard_normal(n)


def fista(x: np.ndarray, y: np.ndarray, alpha: float, wanted: float, value: Callable[[np.ndarray], float]) -> np.ndarray:
    """Accelerated proximal gradient until the objective gap is reached (looked at every 20 steps, as a user could not)."""
    n, p = x.shape
    size = float(np.linalg.norm(x, 2) ** 2 / n)
    w = z = np.zeros(p)
    t = 1.0
    for k in range(20_000):
        g = x.T @ (x @ z - y) / n
        free = z - g / size
        new = np.sign(free) * np.maximum(np.abs(free) - alpha / size, 0)
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z, w, t = new + (t - 1) / following * (new - w), new, following
        if k % 20 == 0 and value(w) <= wanted:
            break
    return w


def timed(solve: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Least processor seconds and the solution."""
    best, found = float("inf"), np.zeros(0)
    for _ in range(repeats):
        start = time.process_time()
        found = solve()
        best = min(best, time.process_time() - start)
    return best, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    x, y = problem()
    top = float(np.abs(x.T @ y).max()) / len(y)
    for share in (0.1, 0.01):
        alpha = top * share

        def objective(w: np.ndarray, alpha: float = alpha) -> float:
            return 0.5 * float(np.mean((y - x @ w) ** 2)) + alpha * float(np.abs(w).sum())

        def descent(tol: float, alpha: float = alpha) -> np.ndarray:
            return np.asarray(CoordinateDescent(alpha=alpha, fit_intercept=False, tol=tol, max_iter=200_000).fit(x, y).coef_)

        exact, zero = objective(descent(1e-14)), objective(np.zeros(x.shape[1]))
        solvers: dict[str, Callable[[], np.ndarray]] = {
            "FISTA to 1e-6": lambda a=alpha, f=objective, e=exact, z=zero: fista(x, y, a, e + 1e-6 * (z - e), f),  # type: ignore[misc]
            "spred to 1e-6": lambda a=alpha: lasso(x, y, a, tol=1e-6).weights,  # type: ignore[misc]
            "spred to 1e-10": lambda a=alpha: lasso(x, y, a, tol=1e-10).weights,  # type: ignore[misc]
            "scikit-learn 1e-8": lambda d=descent: d(1e-8),  # type: ignore[misc]
        }
        try:
            from celer import Lasso as Celer

            solvers["celer 1e-8"] = lambda a=alpha: Celer(alpha=a, fit_intercept=False, tol=1e-8).fit(x, y).coef_  # type: ignore[misc]
        except ImportError:
            print("celer is not installed: left out (pip install celer)")
        print(f"penalty {share:g} of the largest, F* = {exact:.8g}")
        seconds = {}
        with blas_threads():
            for name, solve in solvers.items():
                seconds[name], w = timed(solve, repeats)
                gap = (objective(w) - exact) / (zero - exact)
                print(f"  {name:18} {1e3 * seconds[name]:8.1f} ms  gap {gap:8.1e}  {int((w != 0).sum()):4} weights", flush=True)
        proof = lasso(x, y, alpha, tol=1e-10)
        ratio = seconds["spred to 1e-6"] / seconds["FISTA to 1e-6"]
        print(f"  {proof}; spred / FISTA {ratio:.2f} (limit {LIMIT:g}) {'ok' if ratio <= LIMIT else 'MISSED'}")


if __name__ == "__main__":
    main()
