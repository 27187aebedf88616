"""Strength and shape of minibatch noise in linear regression, and the fluctuation it drives (minibatch-noise-strength R1-R14).

x ~ N(0, A), y = u.x + eps with Var eps = sigma^2, loss (w.x - y)^2 / 2, batch S with replacement, w measured from u unless said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize, special

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable.contract import number, positive
from parasym.solvable.stationary import hessian, momentum_value

Matrix = NDArray[np.float64]


def batch_covariance(gradients: ArrayLike, batch: int, *, replacement: bool = True) -> Matrix:
    """Covariance of a batch-mean gradient from per-sample gradients (n, d); times (n-S)/(n-1) without replacement (R1)."""
    g = np.asarray(gradients, float)
    if g.ndim != 2 or not np.isfinite(g).all():
        raise InputError(f"per-sample gradients must be finite and (n, d), got {g.shape}")
    n = len(g)
    if not batch >= 1 or (not replacement and batch > n):
        raise InputError(f"a batch of {batch} cannot be drawn from {n} samples")
    spread = g.T @ g / n - np.outer(g.mean(0), g.mean(0))
    return np.asarray(spread / batch * (1.0 if replacement or n == 1 else (n - batch) / (n - 1)))


def label_noise_fluctuation(a: Sequence[float], lr: float | Sequence[float], batch: int, sigma: float, momentum: float = 0.0) -> Estimate:
    """Stationary variances of w in the eigenbasis of A (d,), and the noise ``details["C"]`` (d,), exact for label noise (R5).

    ``not_applicable`` beyond the stability limit (t < S and G > 0).
    """
    values = np.asarray(a, float)
    rates = np.broadcast_to(np.asarray(lr, float), values.shape)
    mu = momentum_value(momentum)
    if values.ndim != 1 or not (np.isfinite(values).all() and (values > 0).all() and (rates > 0).all()) or batch < 1:
        raise InputError("the eigenvalues of A and the learning rates must be positive, and the batch at least 1")
    g = 2 * (1 - mu) - ((1 - mu) / (1 + mu) + 1 / batch) * rates * values
    refs = ("minibatch-noise-strength R5",)
    t = float((rates * values / g).sum()) if (g > 0).all() else math.inf
    if not t < batch:
        return Estimate(None, status="not_applicable", note=f"unstable: t = {t:.4g} is not below the batch {batch}", refs=refs)
    kappa = t / (1 - t / batch)
    s2 = sigma**2
    variances = s2 / batch * (1 + kappa / batch) * rates / g
    noise = s2 / batch * values + s2 / batch**2 * (1 + kappa / batch) * (rates * values / g + t) * values
    details = {"C": torch.from_numpy(noise), "t": t, "kappa": kappa, "G": torch.from_numpy(g)}
    return Estimate(torch.from_numpy(variances), refs=refs, assumptions=("Gaussian x", "infinite data", "fresh batches"), details=details)


def label_noise_strength(a: ArrayLike, sigma_w: ArrayLike, batch: int, sigma: float) -> Matrix:
    """C = (A Sig A + Tr[A Sig] A + sigma^2 A) / S (R4)."""
    am, s = hessian(a), np.asarray(sigma_w, float)
    return np.asarray((am @ s @ am + np.trace(am @ s) * am + sigma**2 * am) / batch)


def label_noise_by_linear_solve(a: ArrayLike, lr: float, batch: int, sigma: float, momentum: float = 0.0) -> Estimate:
    """Cov(w) for any A by one linear solve of the second moments of (w, m) with the state-dependent noise of R4: the independent route."""
    am, mu = hessian(a), momentum_value(momentum)
    d = len(am)
    eye = np.eye(d)
    f = np.block([[eye - lr * am, -mu * lr * eye], [am, mu * eye]])
    drive = np.vstack([-lr * eye, eye])
    select = np.hstack([eye, np.zeros((d, d))])
    n = 2 * d
    # vec(P) = (F x F + noise(P)) vec(P) + b, rows stacked
    operator = np.kron(f, f)
    for i in range(n):
        for j in range(n):
            unit = np.zeros((n, n))
            unit[i, j] = 1.0
            s = select @ unit @ select.T
            noise = (am @ s @ am + np.trace(am @ s) * am) / batch
            operator[:, i * n + j] += (drive @ noise @ drive.T).reshape(-1)
    radius = float(np.abs(linalg.eigvals(operator)).max())
    if radius >= 1:
        note = f"second moments unstable: radius {radius:.6g}"
        return Estimate(None, status="not_applicable", note=note, refs=("minibatch-noise-strength R4",))
    right = (drive @ (sigma**2 * am / batch) @ drive.T).reshape(-1)
    pair = linalg.solve(np.eye(n * n) - operator, right).reshape(n, n)
    return Estimate(torch.from_numpy(pair[:d, :d].copy()), refs=("minibatch-noise-strength R4",), details={"radius": radius})


def decay_fluctuation(a: Sequence[float], u: Sequence[float], decay: Sequence[float] | float, lr: float, batch: int) -> Estimate:
    """Cov(w) (d, d) in the eigenbasis of A with L2 decay Gamma and no label noise, any u (R7, corrected off the diagonal).

    Sig_ij [lr (K_i+K_j) - lr^2 K_i K_j - (lr^2/S) a_i a_j] = (lr^2/S) [delta_ij a_i (sum_l a_l Sig_ll + q) + v_i v_j],
    v = Gamma K^-1 A u, q = Tr[A K^-2 Gamma^2 U]; ``details["test_loss"]`` = (Tr[A Sig] + q) / 2.
    """
    av, uv = np.asarray(a, float), np.asarray(u, float)
    gv = np.broadcast_to(np.asarray(decay, float), av.shape)
    k = av + gv
    refs = ("minibatch-noise-strength R7",)
    if (k <= 0).any():
        return Estimate(
            None, status="not_applicable", note="the decay makes the loss unbounded below: A + Gamma is not positive", refs=refs
        )
    bias = gv / k * uv
    q = float((av * bias**2).sum())
    v = gv / k * av * uv
    below = lr * (k[:, None] + k[None]) - lr**2 * np.outer(k, k) - lr**2 / batch * np.outer(av, av)
    if (np.diag(below) <= 0).any() or (share := float((lr**2 / batch * av**2 / np.diag(below)).sum())) >= 1:
        return Estimate(None, status="not_applicable", note="unstable", refs=refs)
    scale = lr**2 / batch
    base = float((av * scale * (av * q + v**2) / np.diag(below)).sum())
    total = base / (1 - share)  # sum_l a_l Sig_ll
    sigma = scale * (np.diag(av * (total + q)) + np.outer(v, v)) / below
    test = 0.5 * (float((av * np.diag(sigma)).sum()) + q)
    return Estimate(torch.from_numpy(sigma), refs=refs, details={"test_loss": test, "q": q, "mean": torch.from_numpy(av * uv / k)})


def test_loss(a: Sequence[float], u: Sequence[float], decay: float, lr: float, batch: int) -> Estimate:
    """L_test = (lr / 2S)(q kappa + r) + q / 2, the paper's closed form (R7), for the same setting."""
    av, uv = np.asarray(a, float), np.asarray(u, float)
    k = av + decay
    g = 2 - lr * (k + av**2 / k / batch)
    refs = ("minibatch-noise-strength R7",)
    s = float((av**2 / k / g).sum()) if (k > 0).all() and (g > 0).all() else math.inf
    if not lr * s / batch < 1:
        return Estimate(None, status="not_applicable", note="unstable", refs=refs)
    q = float((av / k**2 * decay**2 * uv**2).sum())
    r = float((av**3 / k**3 * decay**2 / g * uv**2).sum()) / (1 - lr * s / batch)
    kappa = s / (1 - lr * s / batch)
    return Estimate(lr / (2 * batch) * (q * kappa + r) + q / 2, refs=refs)


test_loss.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever its name


def best_decay(a: Sequence[float], u: Sequence[float], lr: float, batch: int, largest: float = 5.0) -> Estimate:
    """The decay with the smallest test loss, negative ones included (R8)."""
    low = -min(a) * (1 - 1e-9)
    grid = np.linspace(low, largest, 4001)
    found = [test_loss(a, u, float(g), lr, batch) for g in grid]
    values = np.array([math.inf if e.value is None else number(e) for e in found])
    if not np.isfinite(values).any():
        return Estimate(None, status="not_applicable", note="no decay is stable", refs=("minibatch-noise-strength R8",))
    k = int(values.argmin())

    def loss(g: float) -> float:
        e = test_loss(a, u, g, lr, batch)
        return math.inf if e.value is None else number(e)

    best = optimize.minimize_scalar(
        loss, bounds=(grid[max(k - 1, 0)], grid[min(k + 1, len(grid) - 1)]), method="bounded", options={"xatol": 1e-12}
    )
    return Estimate(float(best.x), refs=("minibatch-noise-strength R8",), details={"test_loss": float(best.fun)})


Sampler = Literal["replacement", "subset"]


def finite_data(x: ArrayLike, y: ArrayLike, lr: float, batch: int, sampling: Sampler = "replacement") -> Estimate:
    """Exact stationary covariance about the least-squares solution for a data set (n, d), (n,): one linear solve (R11).

    ``not_applicable`` when the second moments are unstable (the radius is in ``details``), or for "epoch" sampling, whose batches
    depend on each other and for which this formula does not hold (R12).
    """
    xm, ym = np.asarray(x, float), np.asarray(y, float)
    refs = ("minibatch-noise-strength R11",)
    if sampling not in ("replacement", "subset"):
        note = "batches of one epoch depend on each other: no closed form here"
        return Estimate(None, status="not_applicable", note=note, refs=("minibatch-noise-strength R12",))
    if xm.ndim != 2 or ym.shape != xm.shape[:1] or not (np.isfinite(xm).all() and np.isfinite(ym).all()):
        raise InputError(f"x must be finite (n, d) and y (n,), got {xm.shape} and {ym.shape}")
    n, d = xm.shape
    if not 1 <= batch <= (n if sampling == "subset" else batch):
        raise InputError(f"a batch of {batch} cannot be drawn from {n} samples")
    positive(lr=lr)
    a = xm.T @ xm / n
    if np.linalg.eigvalsh(a)[0] < 1e-12 * np.linalg.eigvalsh(a)[-1]:
        return Estimate(None, status="not_applicable", note="the data covariance is singular: some weights are never moved", refs=refs)
    best = linalg.lstsq(xm, ym)[0]
    e = xm @ best - ym
    f = 1 / batch if sampling == "replacement" or n == 1 else (n - batch) / (batch * (n - 1))
    outer = np.einsum("ni,nj->nij", xm, xm).reshape(n, d * d)
    kick = outer.T @ outer / n - np.kron(a, a)
    step = np.eye(d) - lr * a
    # E (x x^T) S (x x^T) in row-stacked form is the same matrix as (x x)(x x)^T on symmetric S
    operator = np.kron(step, step) + lr**2 * f * kick
    right = lr**2 * f * (outer * (e**2)[:, None]).mean(0)
    radius = float(np.abs(linalg.eigvals(operator)).max())
    if radius >= 1:
        return Estimate(
            None, status="not_applicable", note=f"second moments unstable: radius {radius:.6g}", refs=refs, details={"radius": radius}
        )
    sigma = linalg.solve(np.eye(d * d) - operator, right).reshape(d, d)
    details: dict[str, Any] = {"radius": radius, "solution": torch.from_numpy(best)}
    return Estimate(torch.from_numpy((sigma + sigma.T) / 2), refs=refs, details=details)


def overparametrised(a_hat: ArrayLike, samples: int, lr: float, batch: int, sigma: float) -> Estimate:
    """Tr[A Sigma] in high-dimensional regression, from the empirical covariance (R10); approximate, worse near the limit.

    ``details["limit"]`` is sum 1/(2/(lr a) - 1 + 1/S) / S, unstable from 1 on.
    """
    values = np.linalg.eigvalsh(hessian(a_hat))
    values = values[values > 1e-12 * values[-1]]
    d = len(np.asarray(a_hat))
    refs = ("minibatch-noise-strength R10",)
    g = 2 - lr * (1 - 1 / batch) * values
    limit = float((lr * values / (2 - lr * values * (1 - 1 / batch))).sum() / batch) if (g > 0).all() else math.inf
    if limit >= 1:
        return Estimate(None, status="not_applicable", note=f"unstable: {limit:.4g} is not below 1", refs=refs, details={"limit": limit})
    t = float((values / g).sum())
    kappa = t / (1 - lr / batch * t)
    excess = max(0.0, 1 - d / samples)
    return Estimate(lr * sigma**2 / batch * excess * kappa, refs=refs, assumptions=("proportional limit",), details={"limit": limit})


def damped_newton_fluctuation(dim: int, lr: float, batch: int, sigma: float, momentum: float = 0.0) -> Estimate:
    """The factor of A^-1 in Cov(w) for Lambda = lr A^-1 with label noise: lr sigma^2 / (g S - lr D) (R13).

    g = 2 (1-mu) - ((1-mu)/(1+mu) + 1/S) lr.
    """
    mu = momentum_value(momentum)
    g = 2 * (1 - mu) - ((1 - mu) / (1 + mu) + 1 / batch) * lr
    if g <= 0 or batch <= lr * dim / g:
        return Estimate(None, status="not_applicable", note="unstable", refs=("minibatch-noise-strength R13",))
    return Estimate(lr * sigma**2 / (g * batch - lr * dim), refs=("minibatch-noise-strength R13",))


def natural_gradient_factor(dim: int, lr: float, batch: int, momentum: float = 0.0) -> float:
    """The factor of A^-1 in Cov(w) for natural gradient without label noise (R13)."""
    return lr / 2 * (1 / ((1 + dim) * (1 + momentum)) + 1 / ((1 - momentum) * batch))


def kesten_index(rate: float, batch: int) -> Estimate:
    """Tail index: the positive root beta of E|1 - (lr a / S) chi2_S|^beta = 1, with ``rate`` = lr a (R14, corrected)."""
    positive(rate=rate)
    # x = sqrt(chi2) has the smooth density x^(S-1) e^(-x^2/2); double-exponential nodes take the kink and the ends of each panel
    kink = math.sqrt(batch / rate)
    constant = (batch / 2 - 1) * math.log(2) + special.gammaln(batch / 2)

    def log_integrand(x: Matrix, beta: float) -> Matrix:
        with np.errstate(divide="ignore"):
            return (batch - 1) * np.log(x) - x**2 / 2 - constant + beta * np.log(np.abs(1 - rate / batch * x**2))

    def excess(beta: float) -> float:
        far = kink + math.sqrt(batch) + 8
        while log_integrand(np.array([far]), beta)[0] > -60:
            far *= 1.3
        return (
            sum(float(w @ np.exp(log_integrand(x, beta))) for x, w in (_double_exponential(0.0, kink), _double_exponential(kink, far))) - 1
        )

    refs = ("minibatch-noise-strength R14",)
    slope = (excess(1e-4)) / 1e-4  # E log factor
    if slope >= 0:
        return Estimate(None, status="not_applicable", note="the factors grow on average: no stationary law", refs=refs)
    high = 1.0
    while excess(high) < 0:
        high *= 1.6
        if high > 500:
            return Estimate(None, status="not_applicable", note="the factors never exceed 1: no power tail", refs=refs)
    root = float(optimize.brentq(excess, high / 1.6 if high > 1 else 1e-4, high, xtol=1e-12, rtol=1e-12))
    return Estimate(root, residual=abs(excess(root)), refs=refs)


def _double_exponential(low: float, high: float, points: int = 241) -> tuple[Matrix, Matrix]:
    """Nodes and weights on (low, high) that converge geometrically even with algebraic singularities at the ends."""
    t = np.linspace(-3.6, 3.6, points)
    u = np.pi / 2 * np.sinh(t)
    half = (high - low) / 2
    # measured from the nearer end, so that nodes next to it keep their digits
    offset = 2 * half / (1 + np.exp(2 * np.abs(u)))
    nodes = np.where(u < 0, low + offset, high - offset)
    weights = half * np.pi / 2 * np.cosh(t) / np.cosh(u) ** 2 * (t[1] - t[0])
    return nodes, weights


def moment_index(rate: float, batch: int) -> float:
    """The paper's index 2S/(lr a) - S, exact for the variance only (R14)."""
    return 2 * batch / rate - batch


def continuous_index(rate: float, batch: int) -> float:
    """The continuous-time index 2S/(lr a) + 1 (R14)."""
    return 2 * batch / rate + 1


def hill(values: ArrayLike, count: int) -> Estimate:
    """Hill estimate of the tail index from the ``count`` largest |values|; standard error index / sqrt(count)."""
    x = np.sort(np.abs(np.asarray(values, float).reshape(-1)))
    if not np.isfinite(x).all() or not 1 < count < len(x) or x[-count - 1] <= 0:
        raise InputError(f"a Hill estimate needs finite values and 1 < count < {len(x)}, got {count}")
    index = 1 / float(np.log(x[-count:] / x[-count - 1]).mean())
    return Estimate(index, stderr=index / math.sqrt(count), refs=("minibatch-noise-strength R14",))
