"""One neuron, f = a w.x, trained by gradient flow at two rates: how unbalanced layers learn features (get-rich-quick).

L = |y - X w a|^2 / 2, no mean over samples. delta = eta_w a^2 - eta_a |w|^2 is conserved; delta > 0 is "upstream" (w moves
faster), 0 balanced, < 0 "downstream". With hats, what = (eta_a / eta_w)^(1/4) w and ahat = (eta_w / eta_a)^(1/4) a, both rates
are c = sqrt(eta_a eta_w), beta = a w = ahat what, and ahat^2 - |what|^2 = delta / c.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate, Status
from parasym.solvable.contract import Prediction, absent, positive
from parasym.solvable.engines import Params
from parasym.solvable.trained import Trained

SLUG = "get-rich-quick"


@dataclass(frozen=True, eq=False)
class NeuronFlow:
    """Gradient flow of f = a w.x on whitened inputs, X^T X = I, in closed form: any signs, any rates, balanced or not (R3).

    Attributes:
        w: (..., d) input weights at the start. a: (...) output weight.
        target: (d,) or (..., d) least-squares solution beta*.
        eta_a, eta_w: rates.

    Raises:
        InputError: shapes that do not fit, values that are not finite, rates that are not positive.
    """

    w: Tensor
    a: Tensor
    target: Tensor
    eta_a: float = 1.0
    eta_w: float = 1.0

    def __post_init__(self) -> None:
        positive(eta_a=self.eta_a, eta_w=self.eta_w)
        w, a, target = (torch.as_tensor(v, dtype=torch.float64) for v in (self.w, self.a, self.target))
        if not w.ndim or a.shape != w.shape[:-1] or target.shape[-1:] != w.shape[-1:]:
            raise InputError(f"w (..., d), a (...) and target (d,) do not fit: {tuple(w.shape)}, {tuple(a.shape)}, {tuple(target.shape)}")
        if not all(bool(torch.isfinite(v).all()) for v in (w, a, target)):
            raise InputError("w, a and target must be finite")
        for name, value in (("w", w), ("a", a), ("target", target.expand(w.shape))):
            object.__setattr__(self, name, value)

    @property
    def c(self) -> float:
        """sqrt(eta_a eta_w)."""
        return math.sqrt(self.eta_a * self.eta_w)

    @cached_property
    def delta(self) -> Tensor:
        """eta_w a^2 - eta_a |w|^2 (...), conserved (R1)."""
        return self.eta_w * self.a.square() - self.eta_a * self.w.square().sum(-1)

    @cached_property
    def gap(self) -> Tensor:
        """r = sqrt((delta / c)^2 + 4 |beta*|^2) (...)."""
        return ((self.delta / self.c).square() + 4 * self.target.square().sum(-1)).sqrt()

    def weights(self, times: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """w (..., T, d) and a (..., T) at times >= 0.

        Q(T) = e^{FT} Q0 / sqrt(1 + Q0^T Phi Q0) with F of eigenvalues +-r/2 on the plane of beta* and a, and -lam/2 on the rest; all
        exponentials are taken relative to e^{rT/2}, so that no time is too long.
        """
        t = self.c * torch.as_tensor(times, dtype=torch.float64).reshape(-1)
        if not t.numel() or not bool(torch.isfinite(t).all()) or bool((t < 0).any()):
            raise InputError("times must be finite numbers >= 0, at least one")
        up, along = (self.eta_a / self.eta_w) ** 0.25, self._along
        what, ahat = self.w * up, self.a / up
        lam, r, s = self.delta / self.c, self.gap, self._size
        inside = (what * along).sum(-1)
        outside = what - inside[..., None] * along
        # eigenvectors of [[-lam/2, s], [s, lam/2]]: (x, y) with value r/2, (-y, x) with value -r/2
        angle = 0.5 * torch.atan2(2 * s, -lam)  # of the top eigenvector from the axis of w
        x, y = angle.cos(), angle.sin()
        top, low = x * inside + y * ahat, -y * inside + x * ahat
        top, low, rate, half = top[..., None], low[..., None], -0.5 * lam[..., None], 0.5 * r[..., None]
        grown, faded, rest = torch.ones_like(half * t), (-2 * half * t).exp(), ((rate - half) * t).exp()
        mass = top.square() * _phi(half, half, t) + low.square() * _phi(-half, half, t)
        mass = mass + outside.square().sum(-1)[..., None] * _phi(rate, half, t)
        scale = 1 / ((-2 * half * t).exp() + mass).sqrt()
        top, low, rest = top * grown * scale, low * faded * scale, rest * scale
        x, y = x[..., None], y[..., None]
        w = (x * top - y * low)[..., None] * along[..., None, :] + rest[..., None] * outside[..., None, :]
        return w / up, (y * top + x * low) * up

    def beta(self, times: Sequence[float] | Tensor) -> Tensor:
        """a w (..., T, d)."""
        w, a = self.weights(times)
        return a[..., None] * w

    def kernel_distance(self, times: Sequence[float] | Tensor) -> Tensor:
        """1 - <K0, Kt> / |K0| |Kt| of the tangent kernel X M X^T (..., T) (R6, with a_t in every term of |K_t|^2)."""
        w, a = self.weights(times)
        return kernel_distance(self.w[..., None, :], self.a[..., None], w, a, self.eta_a, self.eta_w)

    def final_sign(self) -> Tensor:
        """Sign of a at the end (...): of the part of the start along the top eigenvector [beta*; (r + lam) / 2]; 0 on the surface (R5)."""
        up, lam = (self.eta_a / self.eta_w) ** 0.25, self.delta / self.c
        return ((self.w * up * self.target).sum(-1) + 0.5 * (self.gap + lam) * self.a / up).sign()

    @property
    def _size(self) -> Tensor:
        return self.target.square().sum(-1).sqrt()

    @property
    def _along(self) -> Tensor:
        size = self._size[..., None]
        first = torch.zeros_like(self.target)
        first[..., 0] = 1.0
        return torch.where(size > 0, self.target / torch.where(size > 0, size, 1.0), first)


def _phi(value: Tensor, half: Tensor, t: Tensor) -> Tensor:
    """e^{-2 half t} int_0^t e^{2 value s} ds, for value <= half (up to round-off)."""
    x = 2 * value * t
    near = x.abs() < 1e-8
    exact = ((2 * (value - half) * t).exp() - (-2 * half * t).exp()) / torch.where(near, 1.0, 2 * value)
    small = (-2 * half * t).exp() * torch.expm1(x) / torch.where(x == 0, 1.0, x) * t
    small = torch.where(x == 0, (-2 * half * t).exp() * t, small)
    return torch.where(x.abs() < 1.0, small, exact)


def metric(beta: Tensor, delta: float, eta_a: float = 1.0, eta_w: float = 1.0) -> Tensor:
    """M of beta' = M X^T rho, (..., d, d): ((kappa + delta) / 2) I + ((kappa - delta) / 2) betahat betahat^T (R2)."""
    size = beta.square().sum(-1)
    kappa = (delta**2 + 4 * eta_a * eta_w * size).sqrt()
    hat = beta / size.sqrt().clamp_min(1e-300)[..., None]
    eye = torch.eye(beta.shape[-1], dtype=beta.dtype)
    return 0.5 * (kappa + delta)[..., None, None] * eye + 0.5 * (kappa - delta)[..., None, None] * hat[..., :, None] * hat[..., None, :]


def kernel_distance(w0: Tensor, a0: Tensor, w: Tensor, a: Tensor, eta_a: float = 1.0, eta_w: float = 1.0) -> Tensor:
    """1 - <K0, K> / |K0| |K| with K = eta_w a^2 I + eta_a w w^T, for whitened inputs; (..., d) and (...) (R6)."""

    def inner(w1: Tensor, a1: Tensor, w2: Tensor, a2: Tensor) -> Tensor:
        d, both = w.shape[-1], (w1 * w2).sum(-1)
        cross = a1.square() * w2.square().sum(-1) + a2.square() * w1.square().sum(-1)
        return d * eta_w**2 * (a1 * a2).square() + eta_a * eta_w * cross + eta_a**2 * both.square()

    return 1 - inner(w0, a0, w, a) / (inner(w0, a0, w0, a0) * inner(w, a, w, a)).sqrt()


def potential(beta: Tensor, delta: float) -> Tensor:
    """Psi_delta (...) = (kappa - 2 delta) sqrt(kappa + delta) / 3, kappa = sqrt(delta^2 + 4 |beta|^2), unit rates (R7)."""
    kappa = (delta**2 + 4 * beta.square().sum(-1)).sqrt()
    return (kappa - 2 * delta) * (kappa + delta).clamp_min(0).sqrt() / 3


def mirror(beta: Tensor, delta: float) -> Tensor:
    """grad Psi_delta (..., d) = 2 beta / sqrt(kappa + delta) = sqrt(2) sign(a) w (R7)."""
    square = beta.square().sum(-1)
    kappa = (delta**2 + 4 * square).sqrt()
    total = kappa + delta if delta >= 0 else 4 * square / (kappa - delta)  # kappa + delta without cancellation
    return 2 * beta / total.sqrt()[..., None]


def interpolator(X: Tensor, y: Tensor, beta0: Tensor, delta: float) -> Estimate:
    """argmin over X beta = y of Psi_delta(beta) - <grad Psi_delta(beta0), beta>: where gradient flow from beta0 ends if a keeps its sign.

    Args:
        X: (n, d) with n <= d independent rows. y: (n,). beta0: (d,), not zero. delta: in hats, ahat^2 - |what|^2.

    Returns:
        beta (d,) with the residual of X beta = y (relative); ``not_converged`` if the dual problem was not solved.

    Raises:
        InputError: dependent rows, values that are not finite, or beta0 = 0 with delta <= 0 (the origin is a saddle).
    """
    X, y, beta0 = (torch.as_tensor(v, dtype=torch.float64) for v in (X, y, beta0))
    if not all(bool(torch.isfinite(v).all()) for v in (X, y, beta0)):
        raise InputError("X, y and beta0 must be finite")
    if int(torch.linalg.matrix_rank(X)) < X.shape[0]:
        raise InputError("the rows of X are linearly dependent: leave out repeated samples")
    if delta <= 0 and float(beta0.norm()) == 0:
        raise InputError("beta0 = 0 with delta <= 0 is a saddle: the flow never leaves it")
    start = mirror(beta0, delta) if float(beta0.norm()) > 0 else torch.zeros_like(beta0)
    rows, aim = X.numpy(), y.numpy()

    def dual(mu: np.ndarray) -> tuple[float, np.ndarray]:
        """Psi*(start + X^T mu) - y.mu; Psi*(z) = (sqrt 2 / 3) (delta + |z|^2 / 2)_+^(3/2)."""
        z = start.numpy() + rows.T @ mu
        inner = max(delta + 0.5 * float(z @ z), 0.0)
        return math.sqrt(2) / 3 * inner**1.5 - float(aim @ mu), rows @ (z * math.sqrt(inner / 2)) - aim

    def curved(mu: np.ndarray) -> np.ndarray:
        z = start.numpy() + rows.T @ mu
        inner = max(delta + 0.5 * float(z @ z), 1e-300)
        Xz = rows @ z
        return np.asarray(math.sqrt(inner / 2) * rows @ rows.T + np.outer(Xz, Xz) / (2 * math.sqrt(2 * inner)))

    found = optimize.minimize(dual, np.zeros(len(y)), jac=True, hess=curved, method="trust-exact", options={"gtol": 1e-13, "maxiter": 2000})
    mu = found.x
    for _ in range(5):  # polish
        mu = mu - np.linalg.lstsq(curved(mu), dual(mu)[1], rcond=None)[0]
    z = start.numpy() + rows.T @ mu
    beta = torch.from_numpy(z * math.sqrt(max(delta + 0.5 * float(z @ z), 0.0) / 2))
    residual = float((X @ beta - y).norm() / y.norm().clamp_min(1e-300))
    status: Status = "ok" if residual < 1e-9 else "not_converged"
    return Estimate(beta, residual=residual, status=status, refs=(f"{SLUG} R7",))


@dataclass(frozen=True)
class MinimalRich(Trained):
    """f = a w.x in ``dim`` dimensions from beta0 of norm ``start`` and charge ``delta``, towards beta* of norm ``target``.

    ``samples`` >= dim: whitened inputs, X^T X = I; fewer: Gaussian inputs, and the question is which interpolator is found. ``seed``
    draws inputs, target and start (a > 0).
    """

    dim: int
    delta: float
    start: float = 0.3
    target: float = 1.5
    eta_a: float = 1.0
    eta_w: float = 1.0
    samples: int = 40
    horizon: float = 6.0
    points: int = 9
    seed: int = 0
    slug: ClassVar[str] = SLUG
    kinds: ClassVar[tuple[str, ...]] = ("trajectory", "conserved", "final_sign", "implicit_bias")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "trajectory": {"beta": 2e-8, "kernel distance": 2e-8},
        "conserved": {"delta": 1e-8},
        "final_sign": {"sign of a": 0.0},
        "implicit_bias": {"beta": 1e-6},
    }

    def __post_init__(self) -> None:
        positive(dim=self.dim, start=self.start, target=self.target, eta_a=self.eta_a, eta_w=self.eta_w, samples=self.samples)
        positive(horizon=self.horizon)
        if not math.isfinite(self.delta) or self.points < 2:
            raise InputError(f"delta must be finite and points >= 2, got {self.delta!r} and {self.points!r}")
        self.full()  # drawn here, outside any transform

    @property
    def whitened(self) -> bool:
        """Whether X^T X = I."""
        return self.samples >= self.dim

    def full(self) -> Mapping[str, Tensor]:
        """x (n, d), y (n,), the target (d,) and beta0 (d,)."""
        return _full(self)

    def init(self, seed: int | None = None) -> Params:
        """w (d,) and a > 0 with the model's charge and a w = beta0; a random direction of beta0 with ``seed``."""
        beta0 = self.full()["beta0"]
        if seed is not None:
            beta0 = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            beta0 = self.start * beta0 / beta0.norm()
        kappa = math.sqrt(self.delta**2 + 4 * self.eta_a * self.eta_w * self.start**2)
        both = kappa + self.delta if self.delta >= 0 else 4 * self.eta_a * self.eta_w * self.start**2 / (kappa - self.delta)
        a = torch.tensor(math.sqrt(both / (2 * self.eta_w)), dtype=torch.float64)
        return {"w": beta0 / a, "a": a}

    def losses(self, theta: Params, batch: Mapping[str, Tensor]) -> Tensor:
        """n r^2 / 2 of each sample, whose mean is the loss |y - X w a|^2 / 2."""
        return 0.5 * self.samples * (batch["x"] @ theta["w"] * theta["a"] - batch["y"]).square()

    def generators(self, theta: Params) -> list[Params]:
        """a -> c a, w -> w / c."""
        return [{"w": -theta["w"], "a": theta["a"]}]

    def observables(self, theta: Params) -> dict[str, Tensor]:
        """beta = a w, delta, the kernel's distance from the start."""
        w, a, first = theta["w"], theta["a"], self.init()
        moved = kernel_distance(first["w"], first["a"], w, a, self.eta_a, self.eta_w)
        return {
            "beta": a * w,
            "delta": self.eta_w * a.square() - self.eta_a * w.square().sum(),
            "kernel distance": moved,
            "sign of a": a.sign(),
        }

    @property
    def closed(self) -> NeuronFlow:
        """The closed form from the model's own start (whitened inputs)."""
        theta = self.init()
        return NeuronFlow(theta["w"], theta["a"], self.full()["target"], self.eta_a, self.eta_w)

    def _settled(self) -> float:
        """A time by which the loss has fallen below 1e-18, from the smallest rate at the predicted end; at most 400."""
        if self.whitened:
            return 60.0
        end = self.predict("implicit_bias").values["beta"].value
        slowest = float(
            torch.linalg.eigvalsh((x := self.full()["x"]) @ metric(torch.as_tensor(end), self.delta, self.eta_a, self.eta_w) @ x.mT)[0]
        )
        return min(400.0, 15.0 + 25.0 / slowest)

    def _predict(self, kind: str) -> Prediction:
        if kind == "conserved":
            return Prediction(kind, {"delta": Estimate(torch.full((self.points,), self.delta, dtype=torch.float64))}, refs=(f"{SLUG} R1",))
        if kind == "implicit_bias":
            refs = (f"{SLUG} R7",)
            if self.whitened:
                return Prediction(kind, {"beta": absent("the solution is unique: X has full column rank", refs)}, refs=refs)
            full = self.full()
            lam = self.delta / math.sqrt(self.eta_a * self.eta_w)
            return Prediction(kind, {"beta": interpolator(full["x"], full["y"], full["beta0"], lam)}, refs=refs)
        if not self.whitened:
            reason = "closed only for whitened inputs, X^T X = I: give at least as many samples as dimensions"
            names = {"trajectory": ("beta", "kernel distance"), "final_sign": ("sign of a",)}[kind]
            return Prediction(kind, {name: absent(reason) for name in names}, refs=(f"{SLUG} R3",))
        flow = self.closed
        if kind == "final_sign":
            return Prediction(kind, {"sign of a": Estimate(float(flow.final_sign()))}, refs=(f"{SLUG} R5",))
        values = {"beta": Estimate(flow.beta(self.times)), "kernel distance": Estimate(flow.kernel_distance(self.times))}
        return Prediction(kind, values, refs=(f"{SLUG} R3", f"{SLUG} R6"))

    def _control(self, kind: str) -> Prediction:
        """The kernel frozen at its start (lazy); the sum of the layers' sizes; the other sign; the potential of another charge."""
        full, t = self.full(), self.times
        if kind == "conserved":
            theta = self.init()
            size = float(self.eta_w * theta["a"].square() + self.eta_a * theta["w"].square().sum())
            return Prediction(kind, {"delta": Estimate(torch.full((self.points,), size, dtype=torch.float64))})
        theirs = self.predict(kind)
        if theirs.status == "not_applicable":
            return theirs
        if kind == "final_sign":
            return Prediction(kind, {"sign of a": Estimate(-float(self.closed.final_sign()))})
        if kind == "implicit_bias":
            lam = self.delta / math.sqrt(self.eta_a * self.eta_w)
            other = 0.0 if abs(lam) > 0.5 else 2.0
            return Prediction(kind, {"beta": interpolator(full["x"], full["y"], full["beta0"], other)})
        M = metric(full["beta0"], self.delta, self.eta_a, self.eta_w)
        decay = torch.linalg.matrix_exp(-t[:, None, None] * M)
        return Prediction(kind, {
            "beta": Estimate(full["target"] + decay @ (full["beta0"] - full["target"])),
            "kernel distance": Estimate(torch.zeros_like(t)),
        })  # fmt: skip

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """Gradient flow by automatic differentiation; ``seed`` and ``budget`` change nothing."""
        last = {"implicit_bias": self._settled(), "final_sign": 60.0}.get(kind)
        times = self.times if last is None else torch.linspace(0, last, 41, dtype=torch.float64)
        # a long way down a stiff slope needs an implicit method
        run, rows = self.run(times, {"w": self.eta_w, "a": self.eta_a}, "LSODA" if kind == "implicit_bias" else "DOP853")
        if kind == "implicit_bias":
            if bool((rows["sign of a"] != rows["sign of a"][0]).any()):
                return {"beta": absent("the run crossed a = 0: the potential describes runs that do not")}
            left = float(self.loss({name: w[-1] for name, w in run.theta.items()}))
            status: Status = "ok" if run.ok and left < 1e-18 else "not_converged"
            return {"beta": Estimate(rows["beta"][-1], residual=left, status=status)}
        if kind == "final_sign":
            return {"sign of a": Estimate(float(rows["sign of a"][-1]))}
        return {name: Estimate(value) for name, value in rows.items()}


@functools.lru_cache(maxsize=64)
def _full(model: MinimalRich) -> Mapping[str, Tensor]:
    draws = torch.Generator().manual_seed(model.seed)
    x, target, beta0 = (
        torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in ((model.samples, model.dim), (model.dim,), (model.dim,))
    )
    if model.whitened:
        x = torch.linalg.qr(x)[0]
    target, beta0 = model.target * target / target.norm(), model.start * beta0 / beta0.norm()
    return {"x": x, "y": x @ target, "target": target, "beta0": beta0}
