"""What the solvable models share to be minimised, followed and swept: restarts of L-BFGS, flows, batched descent, scans for roots.

Weights are a dict of float64 tensors (`Params`) and a loss is a function of one such dict to a scalar; a leading axis, where there is
one, counts independent copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, optimize
from torch import Tensor

from parasym.core.errors import InputError

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]
Array = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------ minimising


@dataclass(frozen=True, eq=False)
class Restarts:
    """Where L-BFGS ended from each start.

    Attributes:
        theta: name -> (n, ...) final weights.
        loss: (n,) final losses.
        gradient: (n,) largest entry of the gradient there.
        evaluations: of the loss and its gradient, over all starts.
    """

    theta: Params
    loss: Tensor
    gradient: Tensor
    evaluations: int

    @property
    def index(self) -> int:
        """The start that ended lowest."""
        return int(torch.where(self.loss.isfinite(), self.loss, math.inf).argmin())

    @property
    def best(self) -> Params:
        """Its weights."""
        return pick(self.theta, self.index)

    @property
    def value(self) -> float:
        """Its loss."""
        return float(self.loss[self.index])

    @property
    def converged(self) -> bool:
        """Whether the gradient of the lowest is below 1e-6 (1 + |loss|)."""
        return bool(self.gradient[self.index] <= 1e-6 * (1 + abs(self.value)))

    def fraction(self, tolerance: float = 1e-6) -> float:
        """Share of the starts that ended within ``tolerance`` of the lowest."""
        return float((self.loss <= self.value + tolerance).double().mean())


def lbfgs_restarts(loss: Loss, inits: Sequence[Params], *, max_iter: int = 3000, tol: float = 1e-12) -> Restarts:
    """Minimise ``loss`` from every start by L-BFGS (history 30), stopped at a gradient of ``tol`` or when no step helps.

    Each start is run twice, the second time from where the first ended with an empty history, which mends a line search that stalled.

    Raises:
        InputError: there is no start, or the loss is not finite at one.
    """
    if not inits:
        raise InputError("L-BFGS needs at least one start")
    ends, values, gradients, evaluations = [], [], [], 0
    for k, init in enumerate(inits):
        function = _numpy_gradient(loss, init)
        point = flatten(init)
        if not math.isfinite(function(point)[0]):
            raise InputError(f"the loss is not finite at start {k}: check the data and the start for NaN or infinity")
        for _ in range(2):
            options = {"maxiter": max_iter, "maxfun": 4 * max_iter, "maxcor": 30, "ftol": 0.0, "gtol": tol, "maxls": 50}
            found = optimize.minimize(function, point, jac=True, method="L-BFGS-B", options=options)
            point, evaluations = found.x, evaluations + int(found.nfev)
        value, gradient = function(point)
        ends.append(unflatten(point, init))
        values.append(value)
        gradients.append(float(np.abs(gradient).max(initial=0.0)))
    theta = {name: torch.stack([end[name] for end in ends]) for name in inits[0]}
    return Restarts(theta, torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64), evaluations)


def settle(loss: Loss, theta: Params, *, radius: float = 0.02, max_iter: int = 500, tol: float = 1e-11) -> Params:
    """The local minimum whose basin holds ``theta``, by trust-region Newton steps no longer than ``radius``: it does not leave a shallow
    metastable minimum as a line search may. Dense Hessians, so for a few hundred parameters."""
    function = _numpy_gradient(loss, theta)
    dense = torch.func.hessian(lambda x: loss(_split(x, theta)))
    options = {"initial_trust_radius": radius / 2, "max_trust_radius": radius, "gtol": tol, "maxiter": max_iter}
    curvature = lambda x: dense(torch.from_numpy(np.array(x))).numpy()  # noqa: E731
    found = optimize.minimize(function, flatten(theta), jac=True, hess=curvature, method="trust-exact", options=options)
    return unflatten(found.x, theta)


def descend(
    loss: Loss,
    theta: Params,
    lr: float | Tensor,
    steps: int,
    watch: Callable[[int, Params], None] | None = None,
    *,
    broadcasts: bool = False,
) -> Params:
    """Plain gradient descent on n independent copies at once.

    Args:
        loss: of one copy; or of all n at once, (n,), if it ``broadcasts``, which is several times faster.
        theta: name -> (n, ...).
        lr: one rate, or (n,) rates.
        watch: called with the step and the weights before each step.
    """
    gradient = torch.func.grad(lambda w: loss(w).sum()) if broadcasts else torch.func.vmap(torch.func.grad(loss))
    rate = torch.as_tensor(lr, dtype=torch.float64)
    for step in range(steps):
        if watch is not None:
            watch(step, theta)
        slope = gradient(theta)
        theta = {name: w - rate.reshape(rate.shape + (1,) * (w.ndim - rate.ndim)) * slope[name] for name, w in theta.items()}
    return theta


# ------------------------------------------------------------------------------------------------ flows


@dataclass(frozen=True, eq=False)
class Flow:
    """A trajectory in continuous time.

    Attributes:
        times: (m,).
        theta: name -> (m, ...); NaN past the point at which the solver gave up.
        ok: whether it reached the last time.
        evaluations: of the right-hand side.
        message: what the solver said.
    """

    times: Tensor
    theta: Params
    ok: bool
    evaluations: int
    message: str = ""


def flow(loss: Loss, theta: Params, times: ArrayLike | Tensor, *, method: str = "DOP853", rtol: float = 1e-9, atol: float = 1e-13) -> Flow:
    """Gradient flow d theta/dt = -grad loss from times[0]; see `follow`."""
    gradient = torch.func.grad(loss)
    return follow(lambda t, w: {name: -g for name, g in gradient(w).items()}, theta, times, method=method, rtol=rtol, atol=atol)


def normalised_flow(log_loss: Loss, theta: Params, times: ArrayLike | Tensor, *, method: str = "LSODA", rtol: float = 1e-9) -> Flow:
    """d theta/ds = (1 + |theta|) g / |g| with g = -grad log_loss: the path of gradient flow on an exponential loss, at a speed that
    reaches log-many orders of magnitude of the loss. Give the logarithm of the loss, so that nothing underflows."""
    gradient = torch.func.grad(log_loss)

    def rhs(_: float, w: Params) -> Params:
        g = gradient(w)
        speed = (1 + norm(w)) / norm(g)
        return {name: -speed * value for name, value in g.items()}

    return follow(rhs, theta, times, method=method, rtol=rtol)


def follow(
    rhs: Callable[[float, Params], Params],
    theta: Params,
    times: ArrayLike | Tensor,
    *,
    method: str = "DOP853",
    rtol: float = 1e-9,
    atol: float = 1e-13,
) -> Flow:
    """Solve d theta/dt = rhs(t, theta) at the given times, in float64, by SciPy's ``method``.

    Args:
        theta: weights at times[0].
        times: (m,) increasing.

    Raises:
        InputError: the times do not increase.
    """
    at = np.asarray(times, dtype=np.float64)
    if at.ndim != 1 or len(at) < 2 or (np.diff(at) <= 0).any():
        raise InputError("a flow needs at least two times, increasing")

    def function(t: float, x: Array) -> Array:
        return flatten(rhs(float(t), unflatten(x, theta)))

    found = integrate.solve_ivp(function, (at[0], at[-1]), flatten(theta), method=method, t_eval=at, rtol=rtol, atol=atol)
    path = np.full((len(at), len(flatten(theta))), np.nan)
    path[: found.y.shape[1]] = found.y.T
    rows = [unflatten(row, theta) for row in path]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in theta}
    return Flow(torch.from_numpy(at), stacked, bool(found.success), int(found.nfev), str(found.message))


# ------------------------------------------------------------------------------------------------ curvature and symmetry at a point


def hessian(loss: Loss, theta: Params) -> Tensor:
    """(p, p) Hessian over all entries of ``theta``, in the order of `flatten`."""

    def function(x: Tensor) -> Tensor:
        return loss(_split(x, theta))

    return torch.func.hessian(function)(torch.cat([w.reshape(-1) for w in theta.values()]))


def morse(loss: Loss, theta: Params, relative: float = 1e-7) -> tuple[int, int]:
    """(index, nullity): negative and zero eigenvalues of the Hessian; zero is below ``relative`` x the largest magnitude."""
    values = torch.linalg.eigvalsh(hessian(loss, theta))
    cut = relative * float(values.abs().max().clamp_min(1e-300))
    return int((values < -cut).sum()), int((values.abs() <= cut).sum())


def tangent_derivative(loss: Loss, theta: Params, generator: Callable[[Params], Params]) -> float:
    """Derivative of the loss along a generator's tangent at ``theta``: zero for a symmetry."""
    return float(torch.func.jvp(loss, (theta,), (generator(theta),))[1])


# ------------------------------------------------------------------------------------------------ sweeps and roots


def sweep(solve: Callable[[float, Params], Params], controls: Sequence[float], theta: Params) -> list[Params]:
    """Follow a branch adiabatically: ``solve(control, start)`` from where the previous control ended; the end at each control."""
    out: list[Params] = []
    for control in controls:
        theta = solve(float(control), theta)
        out.append(theta)
    return out


def roots(function: Callable[[float], float], low: float, high: float, points: int = 400) -> list[float]:
    """All roots of a function of a positive number that a scan of ``points`` logarithmic intervals can tell apart, increasing.

    Raises:
        InputError: not 0 < low < high.
    """
    if not 0 < low < high or not math.isfinite(high):
        raise InputError(f"a scan needs 0 < low < high, got {low!r} and {high!r}")
    grid = np.linspace(math.log(low), math.log(high), points + 1)
    values = [function(math.exp(x)) for x in grid]
    found: list[float] = []
    for a, b, fa, fb in zip(grid[:-1], grid[1:], values[:-1], values[1:], strict=True):
        if fa == 0.0:
            found.append(math.exp(a))
        elif fa * fb < 0:
            found.append(math.exp(optimize.brentq(lambda x: function(math.exp(x)), a, b, xtol=1e-15, rtol=1e-15)))
    return [*found, math.exp(grid[-1])] if values[-1] == 0.0 else found


# ------------------------------------------------------------------------------------------------ two small closed problems


def waterfill(levels: ArrayLike, q: float, total: float, slots: int | None = None) -> tuple[Array, float]:
    """Minimise sum(-b_i N_i + q N_i^2) over N >= 0 with sum N = total and at most ``slots`` non-zero: N_i = (b_i - mu)_+ / (2q).

    Args:
        levels: (n,) b_i.
        total: positive.

    Returns:
        N in the order of ``levels``, and the water level mu.

    Raises:
        InputError: q or total not positive, or no slot.
    """
    b = np.asarray(levels, dtype=np.float64)
    if not (q > 0 and total > 0 and math.isfinite(q) and math.isfinite(total)) or b.ndim != 1 or not len(b) or not np.isfinite(b).all():
        raise InputError(f"water-filling needs finite levels, q > 0 and a positive total, got q = {q!r} and total = {total!r}")
    if slots is not None and slots < 1:
        raise InputError(f"water-filling needs at least one slot, got {slots!r}")
    order = np.argsort(-b, kind="stable")[:slots]
    top = b[order]
    counts = np.arange(1, len(top) + 1)
    levels_of = (np.cumsum(top) - 2 * q * total) / counts  # mu if exactly the first n are wet
    wet = int(np.nonzero(top > levels_of)[0][-1])
    mu = float(levels_of[wet])
    out = np.zeros_like(b)
    out[order] = np.clip(top - mu, 0, None) / (2 * q)
    return out, mu


def per_mode_min(m: float, depth: int, g: float) -> tuple[float, float]:
    """Global minimum over s >= 0 of s^2 - 2 m s + (D + 1) g s^(2 / (D + 1)), with D = ``depth`` hidden layers.

    D = 0: ridge, s = m / (1 + g); D = 1: soft threshold, s = max(m - g, 0); D >= 2: a jump, the larger stationary point if it is
    below 0 (deep-linear-exact R9).

    Returns:
        s and the value there.

    Raises:
        InputError: a negative g or depth, or numbers that are not finite.
    """
    if not (math.isfinite(m) and math.isfinite(g) and g >= 0 and depth >= 0):
        raise InputError(f"a mode needs finite m, g >= 0 and depth >= 0, got m = {m!r}, g = {g!r}, depth = {depth!r}")
    if m <= 0:
        return 0.0, 0.0
    if depth == 0:
        s = m / (1 + g)
    elif depth == 1:
        s = max(m - g, 0.0)
    elif g == 0:
        s = m
    else:
        # stationary where 2 s - 2 m + 2 g s^(-(D-1)/(D+1)) = 0, whose left side falls until `bottom` and then grows
        power = (depth - 1) / (depth + 1)
        slope = lambda s: s - m + g * s**-power  # noqa: E731
        bottom = (g * power) ** (1 / (1 + power))
        if bottom >= m or slope(bottom) >= 0:
            return 0.0, 0.0
        s = float(optimize.brentq(slope, bottom, m, xtol=1e-16, rtol=1e-15))
    value = s * s - 2 * m * s + (depth + 1) * g * s ** (2 / (depth + 1))
    return (s, value) if value < 0 else (0.0, 0.0)


# ------------------------------------------------------------------------------------------------ weights as vectors


def flatten(theta: Mapping[str, Tensor]) -> Array:
    """All entries, in the order of the dict, as float64."""
    return torch.cat([w.detach().reshape(-1) for w in theta.values()]).to(torch.float64).numpy().copy()


def unflatten(x: Array, like: Mapping[str, Tensor]) -> Params:
    """The inverse of `flatten`, with the shapes of ``like``."""
    return _split(torch.from_numpy(np.array(x, dtype=np.float64)), like)


def pick(theta: Mapping[str, Tensor], index: int) -> Params:
    """One copy of many."""
    return {name: w[index] for name, w in theta.items()}


def stack(thetas: Sequence[Mapping[str, Tensor]]) -> Params:
    """Many copies as one."""
    return {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}


def norm(theta: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm over all entries."""
    return torch.stack([w.square().sum() for w in theta.values()]).sum().sqrt()


def _split(x: Tensor, like: Mapping[str, Tensor]) -> Params:
    out, start = {}, 0
    for name, w in like.items():
        out[name] = x[start : start + w.numel()].reshape(w.shape)
        start += w.numel()
    return out


def _numpy_gradient(loss: Loss, like: Params) -> Callable[[Array], tuple[float, Array]]:
    def function(x: Array) -> tuple[float, Array]:
        leaf = torch.from_numpy(np.array(x, dtype=np.float64)).requires_grad_()
        value = loss(_split(leaf, like))
        (slope,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), slope.numpy()

    return function
