"""Riccati equations with constant coefficients, solved exactly: the one primitive behind every linear network trained by gradient flow.

`scalar` solves x' = a x^2 + b x + c. `Propagator` solves Q' = F Q - Q Q^T Q / 2 for a symmetric F, the stacked weights of a two-layer
linear network (lazy-to-rich R2-R5); a hidden width of one gives the weights themselves (get-rich-quick R3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.integrate import solve_ivp  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from parasym.core.errors import InputError

_STRIDE = 3.0  # largest eigenvalue x time of one step of the propagator


def scalar(a: float | Tensor, b: float | Tensor, c: float | Tensor, x0: float | Tensor, times: Sequence[float] | Tensor) -> Tensor:
    """x(t) of x' = a x^2 + b x + c, x(0) = x0, without a special case for a = 0, c = 0 or a double root.

    Args:
        a, b, c, x0: numbers or tensors (...,), broadcast.
        times: (T,), t >= 0.

    Returns:
        (..., T) in float64.

    Raises:
        InputError: not finite, a negative time, or a solution that blows up before the last time.
    """
    t = _times(times)
    parts = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (a, b, c, x0)))
    if not all(bool(torch.isfinite(v).all()) for v in parts):
        raise InputError("riccati.scalar: a coefficient or the start is not finite.")
    return _solved(*(v[..., None] for v in parts), t=t)


def _solved(a: Tensor, b: Tensor, c: Tensor, x0: Tensor, *, t: Tensor) -> Tensor:
    square = b * b - 4 * a * c
    return _turning(a, b, c, x0, square, t) if bool((square < 0).any()) else _settling(a, b, c, x0, square.sqrt(), t)


def _settling(a: Tensor, b: Tensor, c: Tensor, x0: Tensor, d: Tensor, t: Tensor) -> Tensor:
    """Real roots. With e = exp(-d t): x = N / M, N and M written so that nothing cancels as e -> 0."""
    e = (-d * t).exp()
    phi = torch.where(d * t > 1e-9, -torch.expm1(-d * t) / torch.where(d > 0, d, 1.0), t - 0.5 * d * t * t)  # (1 - e) / d
    # d + b and d - b: the smaller of the two from the product (d + b)(d - b) = -4 a c
    larger = d + b.abs()
    smaller = torch.where(larger > 0, -4 * a * c / torch.where(larger > 0, larger, 1.0), 0.0)
    plus, minus = torch.where(b >= 0, larger, smaller), torch.where(b >= 0, smaller, larger)
    # divided by d: 1 + e = 2 e / 1 + d phi, so N / d = x0 (plus phi + 2 e) + 2 c phi and M / d = (minus - 2 a x0) phi + 2 e
    top = x0 * (plus * phi + 2 * e) + 2 * c * phi
    bottom = (minus - 2 * a * x0) * phi + 2 * e
    _no_pole(bottom, t)
    return top / bottom


def _turning(a: Tensor, b: Tensor, c: Tensor, x0: Tensor, square: Tensor, t: Tensor) -> Tensor:
    w = square.abs().sqrt()
    phase = 0.5 * w * t
    top = x0 * (w * phase.cos() + b * phase.sin()) + 2 * c * phase.sin()
    bottom = w * phase.cos() - (b + 2 * a * x0) * phase.sin()
    real = square >= 0
    if bool(real.any()):
        mixed = _settling(a, b, c, x0, square.clamp_min(0).sqrt(), t)
        bottom = torch.where(real, torch.ones_like(bottom), bottom)
        _no_pole(bottom, t)
        return torch.where(real, mixed, top / bottom)
    _no_pole(bottom, t)
    if float(phase.max()) >= math.pi:
        raise InputError("riccati.scalar: the solution blows up before the last time (no real fixed point).")
    return top / bottom


def _no_pole(bottom: Tensor, t: Tensor) -> None:
    if bool((bottom <= 0).any()):
        raise InputError(f"riccati.scalar: the solution blows up before t = {float(t.max()):g}.")


def _times(times: Sequence[float] | Tensor) -> Tensor:
    t = torch.as_tensor(times, dtype=torch.float64).reshape(-1)
    if not t.numel() or not bool(torch.isfinite(t).all()) or bool((t < 0).any()):
        raise InputError("times must be finite numbers >= 0, at least one.")
    return t


class Propagator:
    """The flow Q' = F Q - Q Q^T Q / 2.

    Q Q^T(t) = e^{Ft} Q0 [I + Q0^T Phi(t) Q0]^{-1} Q0^T e^{Ft}, Phi(t) = int_0^t e^{2Fs} ds, for any shape of Q and any symmetric F,
    singular ones too (lazy-to-rich R3). Long times are reached by stepping, which neither overflows nor loses the small modes (R4).

    Args:
        F: (..., N, N) symmetric; leading axes are a batch.

    Raises:
        InputError: F is not square, finite and symmetric.
    """

    def __init__(self, F: Tensor) -> None:
        F = torch.as_tensor(F, dtype=torch.float64)
        if F.ndim < 2 or F.shape[-1] != F.shape[-2] or not bool(torch.isfinite(F).all()):
            raise InputError(f"F must be a finite square matrix, got shape {tuple(F.shape)}.")
        if float((F - F.mT).abs().max()) > 1e-10 * (1 + float(F.abs().max())):
            raise InputError("F must be symmetric.")
        self.F = 0.5 * (F + F.mT)
        self.values, self.vectors = torch.linalg.eigh(self.F)
        self.speed = float(self.values.abs().max())

    def step(self, Q: Tensor, dt: float) -> Tensor:
        """Q (..., N, h) after ``dt``, up to a rotation from the right (its Gram matrix Q Q^T is exact); the sign is exact for h = 1."""
        count = max(1, math.ceil(self.speed * dt / _STRIDE))
        grow, phi = self._maps(dt / count)
        for _ in range(count):
            z = self.vectors.mT @ Q
            inner = torch.eye(Q.shape[-1], dtype=torch.float64) + z.mT @ (phi[..., None] * z)
            lower = torch.linalg.cholesky(inner)
            moved = self.vectors @ (grow[..., None] * z)
            Q = torch.linalg.solve_triangular(lower, moved.mT, upper=False).mT
        return Q

    def gram(self, Q0: Tensor, t: float) -> Tensor:
        """Q Q^T (..., N, N) at time t."""
        Q = self.step(torch.as_tensor(Q0, dtype=torch.float64), float(_times([t])[0]))
        return Q @ Q.mT

    def trajectory(self, Q0: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """Q Q^T at increasing times, (T, ..., N, N)."""
        Q = self.factors(Q0, times)
        return Q @ Q.mT

    def factors(self, Q0: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """Q at increasing times up to a rotation from the right, (T, ..., N, h)."""
        out, now, Q = [], 0.0, torch.as_tensor(Q0, dtype=torch.float64)
        for t in _increasing(times):
            Q, now = self.step(Q, t - now) if t > now else Q, t
            out.append(Q)
        return torch.stack(out)

    def weights(self, Q0: Tensor, times: Sequence[float] | Tensor, rtol: float = 1e-11) -> Tensor:
        """The weights themselves, not only their Gram matrices, (T, N, h); Q0 (N, h) and F without batch axes (R5).

        Q(t) = e^{Ft} Q0 S(t); only the rotation in S is not known in closed form, and S' = -S S^T (Q0^T e^{2Ft} Q0) S / 2 (h x h) gives it.
        """
        if self.F.ndim != 2:
            raise InputError("weights needs one F, not a batch.")
        out, now, Q = [], 0.0, torch.as_tensor(Q0, dtype=torch.float64)
        for t in _increasing(times):
            count = max(1, math.ceil(self.speed * (t - now) / _STRIDE)) if t > now else 0
            for _ in range(count):
                Q = self._turned(Q, (t - now) / count, rtol)
            now = t
            out.append(Q)
        return torch.stack(out)

    def _turned(self, Q: Tensor, dt: float, rtol: float) -> Tensor:
        h = Q.shape[-1]
        z, values = (self.vectors.mT @ Q).numpy(), self.values.numpy()

        def rate(s: float, flat: np.ndarray) -> np.ndarray:
            S = flat.reshape(h, h)
            pull = (z * np.exp(2 * values * s)[:, None]).T @ z
            return np.asarray(-0.5 * S @ S.T @ pull @ S).reshape(-1)

        S = solve_ivp(rate, (0.0, dt), np.eye(h).reshape(-1), method="DOP853", rtol=rtol, atol=1e-14).y[:, -1].reshape(h, h)
        return self.vectors @ torch.from_numpy(np.exp(values * dt)[:, None] * z @ S)

    def _maps(self, dt: float) -> tuple[Tensor, Tensor]:
        """e^{ev dt} and int_0^dt e^{2 ev s} ds in the eigenbasis."""
        x = 2 * self.values * dt
        phi = torch.where(x.abs() > 1e-12, torch.expm1(x) / torch.where(x == 0, 1.0, x), 1.0) * dt
        return (0.5 * x).exp(), phi


def _increasing(times: Sequence[float] | Tensor) -> list[float]:
    t = _times(times)
    if bool((t[1:] < t[:-1]).any()):
        raise InputError("times must not decrease.")
    return [float(v) for v in t]


def two_layer_matrix(target: Tensor, lam: float) -> Tensor:
    """F of a lambda-balanced two-layer network, Q = [W1^T; W2]: [[-lam/2 I, target^T], [target, lam/2 I]] (lazy-to-rich R2).

    Args:
        target: (..., No, Ni) input-output correlation of whitened inputs.
        lam: W2^T W2 - W1 W1^T = lam I.
    """
    target = torch.as_tensor(target, dtype=torch.float64)
    out, inn = target.shape[-2:]
    left = -0.5 * lam * torch.eye(inn, dtype=torch.float64).expand(*target.shape[:-2], inn, inn)
    right = 0.5 * lam * torch.eye(out, dtype=torch.float64).expand(*target.shape[:-2], out, out)
    return torch.cat([torch.cat([left, target.mT], -1), torch.cat([target, right], -1)], -2)
