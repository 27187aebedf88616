"""Momentum SGD near a minimum as an underdamped Langevin equation: oscillation, phase space, anomalous diffusion.

m' = beta m + ghat + wd theta, theta' = theta - eta m', Cov ghat = (sigma^2/S) H; v = (theta' - theta)/eta = -m'. Source:
limiting-dynamics R1-R7. Modes are the eigenvalues rho of H; times t = eta k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg

from parasym.core.errors import InputError
from parasym.solvable.contract import positive
from parasym.solvable.stationary import momentum_value

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Underdamped:
    """Momentum SGD on independent modes.

    Attributes:
        rho: Hessian eigenvalues.
        lr: eta.
        momentum: beta.
        decay: weight decay wd.
        batch: S.
        sigma: noise scale.

    Raises:
        InputError: a mode with rho + wd <= 0, or a learning rate beyond 2 (1 + beta) / (rho + wd).
    """

    rho: tuple[float, ...]
    lr: float
    momentum: float
    decay: float = 0.0
    batch: int = 1
    sigma: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", tuple(float(r) for r in self.rho))
        momentum_value(self.momentum)
        positive(lr=self.lr, batch=self.batch, sigma=self.sigma)
        stiff = np.array(self.rho) + self.decay
        if not len(stiff) or not np.isfinite(stiff).all() or (stiff <= 0).any():
            raise InputError("every mode needs rho + weight decay > 0: a flat or negative direction has no stationary law")
        if (self.lr * stiff >= 2 * (1 + self.momentum)).any():
            raise InputError(f"unstable: lr (rho + wd) must stay below 2 (1 + momentum) = {2 * (1 + self.momentum)}")

    @property
    def modes(self) -> Array:
        """rho as an array."""
        return np.array(self.rho)

    @property
    def stiffness(self) -> Array:
        """rho + wd."""
        return self.modes + self.decay

    @property
    def gamma(self) -> float:
        """Damping (1-beta)/(eta (1+beta)) (R1)."""
        return (1 - self.momentum) / (self.lr * (1 + self.momentum))

    @property
    def omega(self) -> Array:
        """Frequencies sqrt(2 (rho+wd)/(eta (1+beta))) (R1)."""
        return np.sqrt(2 * self.stiffness / (self.lr * (1 + self.momentum)))

    def regime(self) -> tuple[str, ...]:
        """Per mode: underdamped iff 2 (rho+wd) eta (1+beta) > (1-beta)^2 (R1)."""
        gap = 2 * self.stiffness * self.lr * (1 + self.momentum) - (1 - self.momentum) ** 2
        return tuple("underdamped" if g > 0 else "overdamped" if g < 0 else "critical" for g in gap)

    def propagator(self, t: float) -> Array:
        """E(t) (modes, 2, 2): how (theta, v) moves in time t without noise (R2); the critical case by its limit."""
        delta = np.sqrt((self.omega**2 - self.gamma**2).astype(complex))
        small = np.abs(delta * t) < 1e-6
        safe = np.where(small, 1.0, delta)
        up, down = (np.exp((sign * 1j * delta - self.gamma) * t) for sign in (1, -1))  # damped before they are added: neither overflows
        cos = (up + down) / 2
        # sin(delta t)/delta, by its series where delta t vanishes: the critically damped limit
        series = t * (1 - (delta * t) ** 2 / 6) * math.exp(-self.gamma * t)
        sin = np.where(small, series, (up - down) / (2j * safe))
        out = np.empty((len(self.rho), 2, 2))
        out[:, 0, 0] = (cos + self.gamma * sin).real
        out[:, 0, 1] = sin.real
        out[:, 1, 0] = -(self.omega**2) * sin.real
        out[:, 1, 1] = (cos - self.gamma * sin).real
        return out

    def covariance(self, t: float) -> Array:
        """Cov(theta, v) at time t from a point, (modes, 2, 2): B - E B E^T (R2)."""
        b, e = self.stationary(), self.propagator(t)
        return np.asarray(b - e @ b @ np.swapaxes(e, 1, 2))

    def stationary(self) -> Array:
        """B (modes, 2, 2) of the Langevin equation: diag(eta s^2 rho / (2S (1-beta)(rho+wd)), s^2 rho / (S (1-beta^2))) (R3)."""
        out = np.zeros((len(self.rho), 2, 2))
        noise = self.sigma**2 / self.batch * self.modes
        out[:, 0, 0] = self.lr * noise / (2 * (1 - self.momentum) * self.stiffness)
        out[:, 1, 1] = noise / (1 - self.momentum**2)
        return out

    def correction(self) -> Array:
        """Exact discrete over Langevin variance, the same for theta and v: 1 / (1 - eta (rho+wd) / (2 (1+beta))) (R3)."""
        return 1 / (1 - self.lr * self.stiffness / (2 * (1 + self.momentum)))

    def discrete_map(self) -> Array:
        """F (modes, 2, 2) of (theta, m) (R6)."""
        out = np.empty((len(self.rho), 2, 2))
        out[:, 0, 0] = 1 - self.lr * self.stiffness
        out[:, 0, 1] = -self.lr * self.momentum
        out[:, 1, 0] = self.stiffness
        out[:, 1, 1] = self.momentum
        return out

    def discrete_stationary(self) -> Array:
        """P (modes, 2, 2): exact covariance of (theta, m) by the discrete Lyapunov equation of each mode (R3, R6)."""
        drive = np.array([-self.lr, 1.0])
        noise = np.outer(drive, drive)
        scale = self.sigma**2 / self.batch
        return np.stack([linalg.solve_discrete_lyapunov(f, scale * r * noise) for f, r in zip(self.discrete_map(), self.rho, strict=True)])

    def local_displacement(self) -> float:
        """E|theta_{k+1} - theta_k|^2 = eta^2 s^2 Tr H / (S (1-beta^2)), Langevin (R5)."""
        return self.lr**2 * self.sigma**2 * float(self.modes.sum()) / (self.batch * (1 - self.momentum**2))

    def displacement(self, lags: Sequence[int], *, exact: bool = True) -> Array:
        """E|theta_k - theta_0|^2 from stationarity, (lags,): exact discrete, or the Langevin form 2 sum B (1 - E_00) (R6)."""
        if exact:
            p, f = self.discrete_stationary(), self.discrete_map()
            power = [np.linalg.matrix_power(f, int(k)) for k in lags]
            return np.array([2 * float((p[:, 0, 0] - (fk @ p)[:, 0, 0]).sum()) for fk in power])
        b = self.stationary()[:, 0, 0]
        return np.array([2 * float((b * (1 - self.propagator(self.lr * k)[:, 0, 0])).sum()) for k in lags])

    def exponent(self, lags: Sequence[int], *, exact: bool = True) -> float:
        """Least-squares slope of log displacement over log lag (R7)."""
        x, y = np.log(np.asarray(lags, float)), np.log(self.displacement(lags, exact=exact))
        return float(((x - x.mean()) * y).sum() / ((x - x.mean()) ** 2).sum())

    def area_rate(self) -> Array:
        """E[theta_k v_{k+1} - v_k theta_{k+1}] per mode = -eta s^2 rho / (S (1-beta)), whatever the decay (A4)."""
        return -self.lr * self.sigma**2 * self.modes / (self.batch * (1 - self.momentum))

    def phase_space(self) -> tuple[Array, Array, Array, Array, float]:
        """(A, D, Q, U, kappa) of dz = -A z dt + sqrt(2 D / kappa) dW with A = (D + Q) U, per block of positions and velocities (R4)."""
        n = len(self.rho)
        zero, eye, h = np.zeros((n, n)), np.eye(n), np.diag(self.modes)
        factor = 2 / (self.lr * (1 + self.momentum))
        a = np.block([[zero, -eye], [factor * np.diag(self.stiffness), factor * (1 - self.momentum) * eye]])
        d = np.block([[zero, zero], [zero, factor * (1 - self.momentum) * h]])
        q = np.block([[zero, -h], [h, zero]])
        u = linalg.block_diag(factor * np.diag(self.stiffness / self.modes), np.diag(1 / self.modes))
        return a, d, q, u, self.batch * (1 - self.momentum**2) / self.sigma**2

    def modified_loss(self, theta: ArrayLike, velocity: ArrayLike) -> float:
        """Psi = z^T U z / 2: the stationary law is exp(-kappa Psi) (R4)."""
        z = np.concatenate([np.asarray(theta, float), np.asarray(velocity, float)])
        return 0.5 * float(z @ self.phase_space()[3] @ z)

    def current(self, theta: ArrayLike, velocity: ArrayLike) -> Array:
        """Direction of the stationary current, -Q U z (R4)."""
        _, _, q, u, _ = self.phase_space()
        return np.asarray(-q @ u @ np.concatenate([np.asarray(theta, float), np.asarray(velocity, float)]))


def general_covariance(h: ArrayLike, c: ArrayLike, lr: float, momentum: float) -> Array:
    """Exact Cov(theta) (d, d) for noise that does not commute with H, by the discrete Lyapunov equation of the pair."""
    from parasym.solvable.stationary import stationary_covariance

    found = stationary_covariance(h, c, lr, momentum)
    if found.value is None:
        raise InputError(found.note)
    return np.asarray(found.value)
