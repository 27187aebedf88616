"""Stationary fluctuation of SGD on a quadratic at a finite learning rate, with momentum and matrix learning rates.

L = w^T H w / 2, g = H w + eta, Cov eta = C; m' = mu m + g, w' = w - Lambda m'. Sources: finite-lr-noise R1-R13,
minibatch-noise-strength R3. All matrices are float64 numpy arrays (d, d); ``lr`` is a number or the matrix Lambda.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.simulate.problems import square_root

Matrix = NDArray[np.float64]
_REF = ("finite-lr-noise R2",)


def rate_matrix(lr: float | ArrayLike, size: int) -> Matrix:
    """The learning rate as a matrix.

    Raises:
        InputError: not finite, or of the wrong size, or a number that is not positive.
    """
    value = np.asarray(lr, float)
    if value.ndim == 0:
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"the learning rate must be positive, got {lr!r}")
        return np.eye(size) * float(value)
    if value.shape != (size, size) or not np.isfinite(value).all():
        raise InputError(f"a matrix learning rate must be finite and ({size}, {size}), got {value.shape}")
    return value


def hessian(h: ArrayLike) -> Matrix:
    """A symmetric finite matrix.

    Raises:
        InputError: it is not one.
    """
    value = np.asarray(h, float)
    if value.ndim != 2 or value.shape[0] != value.shape[1] or not np.isfinite(value).all() or not np.allclose(value, value.T, atol=1e-12):
        raise InputError(f"the Hessian must be a finite symmetric matrix, got the shape {value.shape}")
    return value


def momentum_value(mu: float) -> float:
    """A momentum in [0, 1).

    Raises:
        InputError: it is not.
    """
    if not (math.isfinite(mu) and 0 <= mu < 1):
        raise InputError(f"momentum must be in [0, 1), got {mu}")
    return float(mu)


def state_map(h: Matrix, lam: Matrix, mu: float) -> Matrix:
    """F (2d, 2d) of (w, m): [[1 - Lambda H, -mu Lambda], [H, mu]]."""
    eye = np.eye(len(h))
    return np.block([[eye - lam @ h, -mu * lam], [h, mu * eye]])


def stationary_covariance(h: ArrayLike, c: ArrayLike, lr: float | ArrayLike, momentum: float = 0.0, *, dampened: bool = False) -> Estimate:
    """Exact stationary covariance of (w, m), from the discrete Lyapunov equation of the pair (finite-lr-noise R2).

    Args:
        h: Hessian (d, d), symmetric.
        c: gradient noise covariance (d, d), possibly singular.
        lr: learning rate, or matrix.
        momentum: mu.
        dampened: m' = mu m + (1 - mu) g, as Adam does it (R13).

    Returns:
        An `Estimate` of Cov(w) (d, d); ``details`` has the covariance of the pair, its spectral radius, and the time to forget.
        ``not_applicable`` when the spectral radius is not below 1: unstable, or (a singular Hessian) diffusing without end, with the
        diffusion per step in ``details``.
    """
    hm, root = hessian(h), square_root(c, "noise covariance")
    if root.shape != hm.shape:
        raise InputError(f"the Hessian {hm.shape} and the noise covariance {root.shape} differ in size")
    mu = momentum_value(momentum)
    lam = rate_matrix(lr, len(hm)) * ((1 - mu) if dampened else 1.0)
    f = state_map(hm, lam, mu)
    radius = float(np.abs(linalg.eigvals(f)).max())
    cov = root @ root.T
    if radius >= 1 - 1e-13:
        flat = float(linalg.eigvalsh(hm)[0]) < 1e-12 * max(1.0, float(np.abs(hm).max()))
        note = "a flat direction diffuses without end" if flat and radius < 1 + 1e-9 else "unstable"
        details: dict[str, Any] = {"spectral_radius": radius}
        if note != "unstable":
            details["diffusion_per_step"] = torch.from_numpy(lam @ cov @ lam.T / (1 - mu) ** 2)
        return Estimate(None, status="not_applicable", refs=_REF, note=f"{note}: spectral radius {radius:.6g}", details=details)
    drive = np.vstack([-lam, np.eye(len(hm))])
    pair = linalg.solve_discrete_lyapunov(f, drive @ cov @ drive.T)
    residual = float(np.abs(pair - f @ pair @ f.T - drive @ cov @ drive.T).max() / max(np.abs(pair).max(), 1e-300))
    details = {"spectral_radius": radius, "pair": torch.from_numpy(pair), "memory_steps": 1 / (1 - radius)}
    sigma = pair[: len(hm), : len(hm)]
    return Estimate(
        torch.from_numpy(sigma.copy()), residual=residual, refs=_REF, assumptions=("quadratic loss", "additive noise"), details=details
    )


def master_residual(sigma: ArrayLike, h: ArrayLike, c: ArrayLike, lr: float | ArrayLike, momentum: float = 0.0) -> float:
    """How far Sigma is from solving the master equation (finite-lr-noise R2), relative to Lambda C Lambda."""
    s, hm, cm = np.asarray(sigma, float), hessian(h), np.asarray(c, float)
    lam, mu = rate_matrix(lr, len(hm)), momentum_value(momentum)
    left = (1 - mu) * (lam @ hm @ s + s @ hm @ lam) - (1 + mu**2) / (1 - mu**2) * lam @ hm @ s @ hm @ lam
    left = left + mu / (1 - mu**2) * (lam @ hm @ lam @ hm @ s + s @ hm @ lam @ hm @ lam)
    right = lam @ cm @ lam
    return float(np.abs(left - right).max() / np.abs(right).max())


def eigenbasis_covariance(h: ArrayLike, c: ArrayLike, lr: float, momentum: float = 0.0) -> Matrix:
    """Sigma for a scalar learning rate and any C, entry by entry in the eigenbasis of H (finite-lr-noise R3)."""
    values, q = linalg.eigh(hessian(h))
    mu, a = momentum_value(momentum), lr * values
    ct = q.T @ np.asarray(c, float) @ q
    sums, products = a[:, None] + a[None], a[:, None] * a[None]
    below = (1 - mu) * sums - (1 + mu**2) / (1 - mu**2) * products + mu / (1 - mu**2) * (a[:, None] ** 2 + a[None] ** 2)
    return np.asarray(q @ (lr**2 * ct / below) @ q.T)


def continuous_covariance(h: ArrayLike, c: ArrayLike, lr: float, momentum: float = 0.0) -> Matrix:
    """The continuous-time value, (1-mu)(H S + S H) = lr C: what a finite learning rate is compared with."""
    return np.asarray(linalg.solve_continuous_lyapunov((1 - momentum) * hessian(h), lr * np.asarray(c, float)))


def enhancement(h: ArrayLike, lr: float, momentum: float = 0.0) -> NDArray[np.float64]:
    """Exact over continuous variance of each eigendirection for commuting noise, 1 / (1 - lr h / (2 (1 + mu))) (R4)."""
    return np.asarray(1 / (1 - lr * linalg.eigvalsh(hessian(h)) / (2 * (1 + momentum))))


def stability_limit(h: ArrayLike, momentum: float = 0.0) -> float:
    """Largest stable scalar learning rate, 2 (1 + mu) / h_max (R5)."""
    return float(2 * (1 + momentum_value(momentum)) / linalg.eigvalsh(hessian(h))[-1])


def excess_loss_identity(sigma: ArrayLike, h: ArrayLike, c: ArrayLike, lr: float | ArrayLike, momentum: float = 0.0) -> float:
    """Residual of 2(1-mu) Tr[H S] - (1-mu)/(1+mu) Tr[H S H Lambda] = Tr[C Lambda] (R6), relative to the right side."""
    s, hm = np.asarray(sigma, float), hessian(h)
    lam = rate_matrix(lr, len(hm))
    right = float(np.trace(np.asarray(c, float) @ lam))
    left = 2 * (1 - momentum) * np.trace(hm @ s) - (1 - momentum) / (1 + momentum) * np.trace(hm @ s @ hm @ lam)
    return abs(float(left) - right) / abs(right)


def excess_loss(h: ArrayLike, c: ArrayLike, lr: float, momentum: float = 0.0) -> float:
    """E L - L* = Tr[H Sigma] / 2 = sum_i lr C_ii / ((1-mu)(2 - lr h_i/(1+mu))) / 2 in the eigenbasis of H (R6)."""
    values, q = linalg.eigh(hessian(h))
    diagonal = np.einsum("ki,kl,li->i", q, np.asarray(c, float), q)
    return float(0.5 * (lr * diagonal / ((1 - momentum) * (2 - lr * values / (1 + momentum)))).sum())


def bayes_preconditioner(h: ArrayLike, c: ArrayLike, samples: float, momentum: float = 0.0) -> Matrix:
    """Lambda that makes the stationary covariance H^-1 / N exactly: 2(1-mu) [N C + (1-mu)/(1+mu) H]^-1 (R8)."""
    mu = momentum_value(momentum)
    return np.asarray(2 * (1 - mu) * linalg.inv(samples * np.asarray(c, float) + (1 - mu) / (1 + mu) * hessian(h)))


def bayes_rate(h: ArrayLike, c: ArrayLike, samples: float, momentum: float = 0.0) -> Estimate:
    """Scalar learning rate whose stationary law is closest to N(0, H^-1/N) in KL(stationary || target), found in one dimension (R8)."""
    hm = hessian(h)

    def divergence(lr: float) -> float:
        product = samples * hm @ eigenbasis_covariance(hm, c, lr, momentum)
        return 0.5 * float(np.trace(product) - len(hm) - np.linalg.slogdet(product)[1])

    limit = stability_limit(hm, momentum)
    best = optimize.minimize_scalar(
        divergence, bounds=(1e-9 * limit, (1 - 1e-9) * limit), method="bounded", options={"xatol": 1e-12 * limit}
    )
    return Estimate(
        float(best.x), status="ok" if best.success else "not_converged", refs=("finite-lr-noise R8",), details={"divergence": best.fun}
    )


def escape_temperature(curvature: float, noise: float, lr: float, momentum: float = 0.0) -> Estimate:
    """T = a Sigma = lr C / ((1-mu)(2 - lr a/(1+mu))), the temperature of the Arrhenius law of escape (R9)."""
    margin = 2 - lr * curvature / (1 + momentum)
    if margin <= 0:
        return Estimate(None, status="not_applicable", note="unstable", refs=("finite-lr-noise R9",))
    return Estimate(lr * noise / ((1 - momentum) * margin), refs=("finite-lr-noise R9",), assumptions=("Gaussian noise", "harmonic well"))


def damped_newton(h: ArrayLike, c: ArrayLike, lr: float, momentum: float = 0.0) -> Matrix:
    """Sigma for Lambda = lr H^-1 and any C (R10)."""
    inverse = linalg.inv(hessian(h))
    return np.asarray(lr / ((1 - momentum) * (2 - lr / (1 + momentum))) * inverse @ np.asarray(c, float) @ inverse)


def natural_gradient(h: ArrayLike, lr: float, batch: int, momentum: float = 0.0, *, trace: bool = False) -> Matrix:
    """Sigma for Lambda = lr J^-1, C = J / S, J = H Sigma H (+ Tr[H Sigma] H), closed self-consistently (R11)."""
    hm = hessian(h)
    share = 1 / ((1 + momentum) * (1 + (len(hm) if trace else 0)))
    return np.asarray(lr / 2 * (share + 1 / ((1 - momentum) * batch)) * linalg.inv(hm))


def natural_gradient_iterated(
    h: ArrayLike, lr: float, batch: int, momentum: float = 0.0, *, trace: bool = False, rounds: int = 600
) -> Estimate:
    """The same by damped iteration of the exact stationary covariance: the independent route.

    The fixed point without the trace term must exceed what the self-consistent curvature needs; ``not_converged`` says it did not settle.
    """
    hm = hessian(h)
    sigma = linalg.inv(hm) * lr
    moved = math.inf
    for _ in range(rounds):
        j = hm @ sigma @ hm + (np.trace(hm @ sigma) * hm if trace else 0.0)
        new = stationary_covariance(hm, (j + j.T) / 2 / batch, lr * linalg.inv((j + j.T) / 2), momentum)
        if new.value is None:
            return Estimate(None, status="not_applicable", note=new.note, refs=("finite-lr-noise R11",))
        following = (sigma + np.asarray(new.value)) / 2
        moved = float(np.abs(following - sigma).max() / np.abs(following).max())
        sigma = following
        if moved < 1e-13:
            break
    status = "ok" if moved < 1e-9 else "not_converged"
    return Estimate(torch.from_numpy(sigma), residual=moved, status=status, refs=("finite-lr-noise R11",))  # type: ignore[arg-type]


def adaptive_covariance(h: ArrayLike, c: ArrayLike, lr: float, beta1: float = 0.0, *, rounds: int = 500) -> Estimate:
    """Stationary Cov(w) of Adam/RMSProp in the limit of slow v (R12).

    v_i = C_ii + (H Sigma H)_ii, Lambda = lr / sqrt(v), momentum dampened by 1 - beta1.
    ``details["v"]`` holds the second moments. ``not_converged`` when the fixed point was not reached.
    """
    hm, cm = hessian(h), np.asarray(c, float)
    v = np.diag(cm).copy()
    sigma: Matrix = np.zeros_like(hm)
    moved = math.inf
    for _ in range(rounds):
        found = stationary_covariance(hm, cm, np.diag(lr / np.sqrt(v)), beta1, dampened=True)
        if found.value is None:
            return Estimate(None, status="not_applicable", note=found.note, refs=("finite-lr-noise R12",))
        sigma = np.asarray(found.value)
        following = np.diag(cm) + np.diag(hm @ sigma @ hm)
        moved = float(np.abs(following / v - 1).max())
        v = following
        if moved < 1e-13:
            break
    status = "ok" if moved < 1e-10 else "not_converged"
    return Estimate(
        torch.from_numpy(sigma),
        residual=moved,
        status=status,  # type: ignore[arg-type]
        refs=("finite-lr-noise R12",),
        assumptions=("beta2 close to 1",),
        details={"v": torch.from_numpy(v)},
    )


def impulse_kurtosis(h: float, lr: float, momentum: float, excess: float) -> float:
    """Kurtosis of stationary w in one dimension under noise of kurtosis 3 + ``excess``: 3 + excess sum x^4 / (sum x^2)^2.

    x is the impulse response of w, summed until it is forgotten (finite-lr-noise A3).
    """
    f = state_map(np.array([[h]]), np.array([[lr]]), momentum)
    radius = float(np.abs(linalg.eigvals(f)).max())
    if radius >= 1:
        raise InputError(f"unstable: spectral radius {radius:.6g}")
    state = np.array([-lr, 1.0])
    second = fourth = 0.0
    for _ in range(int(40 / -math.log(max(radius, 1e-3))) + 10):
        second += state[0] ** 2
        fourth += state[0] ** 4
        state = f @ state
    return 3 + excess * fourth / second**2
