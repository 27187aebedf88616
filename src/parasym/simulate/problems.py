"""Gradients of small learning problems, to go with the rules; weights are measured as each function says.

The loss of a sample is (residual)^2 / 2 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from parasym.core.errors import InputError
from parasym.simulate.expr import dot, log, sqrt
from parasym.simulate.rules import Gradient, Start
from parasym.simulate.system import Draws, Params, Sampling, State, System, Table


def square_root(covariance: ArrayLike | torch.Tensor, what: str = "covariance") -> NDArray[np.float64]:
    """A matrix B with B B^T = covariance (d, d); a singular covariance is fine, its root has zero columns.

    Raises:
        InputError: not square, not symmetric, not finite, or with a negative eigenvalue.
    """
    c = np.asarray(covariance, dtype=np.float64)
    if c.ndim != 2 or c.shape[0] != c.shape[1] or not np.isfinite(c).all():
        raise InputError(f"the {what} must be a finite square matrix, got the shape {c.shape}")
    scale = max(float(np.abs(c).max()), 1e-300)
    if np.abs(c - c.T).max() > 1e-10 * scale:
        raise InputError(f"the {what} is not symmetric (by {np.abs(c - c.T).max():.1e})")
    values, vectors = np.linalg.eigh((c + c.T) / 2)
    if values[0] < -1e-12 * scale * len(c):
        raise InputError(f"the {what} has the negative eigenvalue {values[0]:.3g}: it is no covariance")
    return np.asarray(vectors * np.sqrt(np.clip(values, 0, None)))


def quadratic(hessian: ArrayLike, covariance: ArrayLike, noise: Callable[[Draws, int], Sequence[Any]] | None = None) -> Gradient:
    """g = H w + B z with B B^T = C: a quadratic loss with additive gradient noise, w measured from the minimum.

    ``noise(draws, d)`` gives the d numbers z of mean 0 and variance 1, standard normals by default.
    """
    h, root = np.asarray(hessian, float), square_root(covariance, "noise covariance")
    if h.shape != root.shape or not np.isfinite(h).all():
        raise InputError(f"the Hessian {h.shape} and the noise covariance {root.shape} must be square, finite and of one size")

    def gradient(w: State, p: Params, draws: Draws) -> Sequence[Any]:
        z = draws.normals(len(h)) if noise is None else noise(draws, len(h))
        return [dot([float(x) for x in row], w) + dot([float(x) for x in mix], z) for row, mix in zip(h, root, strict=True)]

    return gradient


def student(degrees: int) -> Callable[[Draws, int], Sequence[Any]]:
    """Independent Student-t numbers with ``degrees`` > 2 degrees of freedom, scaled to variance 1."""
    if degrees <= 2:
        raise InputError(f"Student-t noise with {degrees} degrees of freedom has no variance: use more than 2")
    scale = ((degrees - 2) / degrees) ** 0.5

    def noise(draws: Draws, size: int) -> Sequence[Any]:
        out = []
        for _ in range(size):
            z = draws.normals(degrees)
            out.append(scale * draws.normal() / sqrt(dot(z, z) / degrees))
        return out

    return noise


def regression(covariance: ArrayLike, batch: int, *, label_noise: bool = True) -> Gradient:
    """Linear regression on fresh Gaussian data: x ~ N(0, A), y = u.x + sigma z; w is measured from u. Parameter: ``p.sigma``."""
    root = square_root(covariance, "data covariance")
    _positive(batch)

    def gradient(w: State, p: Params, draws: Draws) -> Sequence[Any]:
        g: list[Any] = [0.0] * len(root)
        for _ in range(batch):
            z = draws.normals(len(root))
            x = [dot([float(b) for b in row], z) for row in root]
            residual = dot(x, w) - p.sigma * draws.normal() if label_noise else dot(x, w)
            g = [residual * a + b for a, b in zip(x, g, strict=True)]
        return [value * (1.0 / batch) for value in g]

    return gradient


def table_regression(x: ArrayLike, y: ArrayLike, batch: int, sampling: Sampling = "replacement", *, label_noise: bool = False) -> Gradient:
    """Linear regression on a data set x (n, d), y (n,); ``label_noise`` adds p.sigma z to each label at each draw."""
    inputs = np.asarray(x, float)
    targets = np.asarray(y, float)
    if inputs.ndim != 2 or targets.shape != inputs.shape[:1]:
        raise InputError(f"x must be (n, d) and y (n,), got {inputs.shape} and {targets.shape}")
    table = Table(np.column_stack([inputs, targets]))
    _positive(batch)

    def gradient(w: State, p: Params, draws: Draws) -> Sequence[Any]:
        g: list[Any] = [0.0] * inputs.shape[1]
        for row in draws.rows(table, batch, sampling):
            residual = dot(row[:-1], w) - row[-1]
            if label_noise:
                residual = residual - p.sigma * draws.normal()
            g = [residual * a + b for a, b in zip(row[:-1], g, strict=True)]
        return [value * (1.0 / batch) for value in g]

    return gradient


def two_layer(x: ArrayLike, y: ArrayLike, batch: int, sampling: Sampling = "replacement") -> Gradient:
    """f = u w x on a table of numbers: gradient in (u, w)."""
    table = Table(np.column_stack([np.asarray(x, float), np.asarray(y, float)]))
    _positive(batch)

    def gradient(w: State, p: Params, draws: Draws) -> Sequence[Any]:
        first: Any = 0.0
        for a, b in draws.rows(table, batch, sampling):
            first = (w[0] * w[1] * a - b) * a + first
        first = first * (1.0 / batch)
        return [first * w[1], first * w[0]]

    return gradient


def diffusion(
    name: str,
    drift: Callable[[State, Params], Sequence[Any]],
    scale: Callable[[State, Params], Sequence[Any]],
    start: Start | Sequence[float],
    *,
    bridge: Callable[[State, Params], Any] | None = None,
) -> System:
    """Euler-Maruyama in the Ito sense with independent noise in every direction: dx_i = drift_i dt + scale_i dW_i, step ``p.dt``.

    With ``bridge``, a level function whose zero is a boundary, the state gets one entry more: 1 once the path crossed it, also
    when it crossed between two steps, by the Brownian bridge; the noise normal to the boundary is that of the first direction
    scaled by |grad|, so the noise must be isotropic there.
    """

    def begin(p: Params, draws: Draws) -> Sequence[Any]:
        first = list(start(p, draws) if callable(start) else start)
        return [*first, 0.0] if bridge else first

    def step(state: State, p: Params, draws: Draws) -> Sequence[Any]:
        from parasym.simulate.expr import gradient as slope
        from parasym.simulate.expr import where

        x = list(state[:-1]) if bridge else list(state)
        spread = scale(x, p)
        new = [a + p.dt * b + c * sqrt(p.dt) * draws.normal() for a, b, c in zip(x, drift(x, p), spread, strict=True)]
        if not bridge:
            return new
        here, there = bridge(x, p), bridge(new, p)
        normal = slope(here, x)
        variance = dot(normal, normal) * spread[0] * spread[0] * p.dt
        # P(crossed between the ends | both inside) = exp(-2 d0 d1 / variance)
        crossed = (log(draws.uniform()) * variance <= -2.0 * here * there) | (here * there <= 0.0)
        return [*new, where(crossed, 1.0, state[-1])]

    return System(name, begin, step)


def _positive(batch: int) -> None:
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"the batch size must be a positive integer, got {batch!r}")
