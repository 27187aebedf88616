"""The stochastic models, each a frozen description with closed forms and a simulation of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.simulate import (
    SGD,
    Average,
    Covariance,
    Displacement,
    Ensemble,
    FirstPassage,
    Increments,
    Lyapunov,
    Momentum,
    Run,
    System,
    descent,
    dot,
    log,
    quadratic,
    regression,
    sqrt,
    table_regression,
    where,
)
from parasym.solvable import adaptive, escape, stationary
from parasym.solvable import regression as linear
from parasym.solvable.contract import Model, NotSolvable, Prediction, absent, number, positive
from parasym.solvable.factors import Law, exponent, phase, small_rate_exponent, two_layer_exponents
from parasym.solvable.langevin import Underdamped


def _scaled(count: int, budget: float, least: int = 64) -> int:
    return max(least, round(count * budget))


def _fraction(hits: torch.Tensor, run: Run) -> Estimate:
    """Share of replicas, with the error of a proportion (never below that of one replica); diverged ones count as misses."""
    p, n = float(hits.double().mean()), hits.numel()
    return Estimate(p, stderr=max((p * (1 - p) / n) ** 0.5, 1 / n), details={"replicas": n, "diverged": run.diverged})


def _batch_mean(law: Law, batch: int, draws: Any) -> Any:
    return dot([1.0 / batch] * batch, [law.draw(draws) for _ in range(batch)])


@dataclass(frozen=True)
class RandomCurvature(Model):
    """l = h theta^2 / 2 with random h: theta' = (1 - lr h_S) theta (probabilistic-stability R1, sgd-local-maxima R0)."""

    law: Law
    lr: float
    batch: int = 1
    slug: ClassVar[str] = "probabilistic-stability"
    kinds: ClassVar[tuple[str, ...]] = ("exponent",)

    def __post_init__(self) -> None:
        positive(lr=self.lr, batch=self.batch)

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """E h theta^2 / 2."""
        return 0.5 * self.law.mean * theta.square().sum(-1)

    def _predict(self, kind: str) -> Prediction:
        return Prediction(kind, {"exponent": exponent(self.law, self.lr, self.batch)}, refs=("probabilistic-stability R1",))

    def _control(self, kind: str) -> Prediction:
        """The expectation of the norm, log E|1 - lr h|, in place of the expectation of its log."""
        value = float(np.log(self.law.averaged(self.batch).moment(self.lr, 1)))
        return Prediction(kind, {"exponent": Estimate(value)}, refs=("sgd-local-maxima R0",))

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        def step(theta: Any, p: Any, draws: Any) -> Any:
            return [theta[0] - p.lr * _batch_mean(self.law, self.batch, draws) * theta[0]]

        run = Ensemble(System("random curvature", lambda p, d: [0.0], step), _scaled(4096, budget), {"lr": self.lr}, seed).run(
            4000, [Lyapunov()]
        )
        found = run[0]
        return {"exponent": Estimate(found.value[0], stderr=found.stderr[0], details=found.details) if found.ok else found}


@dataclass(frozen=True)
class TwoLayerOrigin(Model):
    """The origin of f = u sigma(w x) with chi = x y: two exponents and the phase they name (probabilistic-stability R6).

    ``fate`` is the share of replicas of the network f = u w x (x = 1, y = chi) that die, start .1 N(0,1), for phases I and III.
    """

    law: Law
    lr: float
    batch: int = 1
    slug: ClassVar[str] = "probabilistic-stability"
    kinds: ClassVar[tuple[str, ...]] = ("exponents", "fate")

    def __post_init__(self) -> None:
        positive(lr=self.lr, batch=self.batch)

    @property
    def phase(self) -> str:
        """I, II, III or IV."""
        return phase(*two_layer_exponents(self.law, self.lr, self.batch))

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """(u w)^2 / 2 - u w E chi + E chi^2 / 2 for theta = (u, w)."""
        product = theta[..., 0] * theta[..., 1]
        return 0.5 * product.square() - product * self.law.mean + 0.5 * self.law.square

    def _predict(self, kind: str) -> Prediction:
        plus, minus = two_layer_exponents(self.law, self.lr, self.batch)
        if kind == "exponents":
            return Prediction(kind, {"plus": Estimate(plus), "minus": Estimate(minus)}, refs=("probabilistic-stability R6",))
        if self.phase not in ("I", "III"):
            return Prediction(kind, {"dead": absent(f"phase {self.phase} has no fate decided at the origin alone")})
        return Prediction(kind, {"dead": Estimate(1.0 if self.phase == "III" else 0.0)}, refs=("probabilistic-stability R6",))

    def _control(self, kind: str) -> Prediction:
        """Small learning rate or full batch: gradient flow always leaves a saddle with E chi != 0."""
        if kind == "fate":
            return Prediction(kind, {"dead": Estimate(0.0 if self.phase == "III" else 1.0)})
        plus, minus = (float(np.log(abs(1 + s * self.lr * self.law.mean))) for s in (1, -1))
        return Prediction(kind, {"plus": Estimate(plus), "minus": Estimate(minus)})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if kind == "exponents":

            def factors(s: Any, p: Any, draws: Any) -> Any:
                chi = _batch_mean(self.law, self.batch, draws)
                return [1.0 + p.lr * chi, 1.0 - p.lr * chi]

            system = System("factors at the origin", lambda p, d: [1.0, 1.0], factors)
            observe = [Average(lambda s, p: [log(abs(factor)) for factor in s])]
            found = Ensemble(system, _scaled(4096, budget), {"lr": self.lr}, seed).run(2000, observe)[0]
            return {
                name: Estimate(found.value[k], stderr=found.stderr[k]) if found.ok else found for k, name in enumerate(("plus", "minus"))
            }

        def network(s: Any, p: Any, draws: Any) -> Any:
            residual = s[0] * s[1] - _batch_mean(self.law, self.batch, draws)
            return [s[0] - p.lr * residual * s[1], s[1] - p.lr * residual * s[0]]

        system = System("u w x", lambda p, d: [0.1 * d.normal(), 0.1 * d.normal()], network)
        run = Ensemble(system, _scaled(2000, budget), {"lr": self.lr}, seed).run(5000)
        return {"dead": _fraction((run.final.abs() < 1e-3).all(-1) & run.sound, run)}


@dataclass(frozen=True)
class LocalMaximum(Model):
    """l = x w^2/2 + w^4/4 with x in {b, -c} evenly, c > b: a strict local maximum at 0 (sgd-local-maxima R1).

    ``fate``: share of replicas at the maximum (|w| < 1e-6) after 3000 steps from .1 N(0,1).
    """

    b: float
    c: float
    lr: float
    slug: ClassVar[str] = "sgd-local-maxima"
    kinds: ClassVar[tuple[str, ...]] = ("fate",)

    def __post_init__(self) -> None:
        if not self.c > self.b > 0:
            raise InputError(f"the origin is a local maximum only for c > b > 0, got b = {self.b}, c = {self.c}")
        positive(lr=self.lr)

    @property
    def rate(self) -> float:
        """E log|1 - lr x|."""
        return 0.5 * float(np.log(abs(1 - self.lr * self.b)) + np.log(1 + self.lr * self.c))

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """(b-c)/4 w^2 + w^4/4."""
        w = theta[..., 0]
        return 0.25 * (self.b - self.c) * w.square() + 0.25 * w.square().square()

    def _predict(self, kind: str) -> Prediction:
        return Prediction(kind, {"at maximum": Estimate(1.0 if self.rate < 0 else 0.0)}, refs=("sgd-local-maxima R1",))

    def _control(self, kind: str) -> Prediction:
        """Gradient descent never stays at a maximum; a repelling one never holds SGD."""
        return Prediction(kind, {"at maximum": Estimate(0.0 if self.rate < 0 else 1.0)})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        run = local_maximum_run(self.b, self.c, self.lr, _scaled(2000, budget), 3000, seed)
        return {"at maximum": _fraction((run.final[:, 0].abs() < 1e-6) & run.sound, run)}


def local_maximum_run(b: float, c: float, lr: float, replicas: int, steps: int, seed: int) -> Run:
    """SGD on the landscape of `LocalMaximum`, float64, start .1 N(0,1)."""

    def gradient(w: Any, p: Any, draws: Any) -> Any:
        return [where(draws.uniform() < 0.5, p.b, -p.c) * w[0] + w[0] ** 3]

    system = descent("local maximum", gradient, SGD(), lambda p, d: [0.1 * d.normal()])
    return Ensemble(system, replicas, {"lr": lr, "b": b, "c": c}, seed, precision="float64").run(steps)


@dataclass(frozen=True)
class QuadraticSGD(Model):
    """L = w^T H w / 2 with additive gradient noise of covariance C, SGD with momentum (finite-lr-noise)."""

    h: tuple[tuple[float, ...], ...]
    c: tuple[tuple[float, ...], ...]
    lr: float
    momentum: float = 0.0
    slug: ClassVar[str] = "finite-lr-noise"
    kinds: ClassVar[tuple[str, ...]] = ("stationary", "excess_loss")

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """theta^T H theta / 2."""
        h = torch.tensor(self.h, dtype=theta.dtype)
        return 0.5 * torch.einsum("...i,ij,...j->...", theta, h, theta)

    def _predict(self, kind: str) -> Prediction:
        sigma = stationary.stationary_covariance(self.h, self.c, self.lr, self.momentum)
        if kind == "stationary" or sigma.value is None:
            return Prediction(kind, {"covariance" if kind == "stationary" else "excess loss": sigma}, refs=("finite-lr-noise R2",))
        value = stationary.excess_loss(self.h, self.c, self.lr, self.momentum)
        return Prediction(kind, {"excess loss": Estimate(value)}, refs=("finite-lr-noise R6",))

    def _control(self, kind: str) -> Prediction:
        """Continuous time."""
        sigma = stationary.continuous_covariance(self.h, self.c, self.lr, self.momentum)
        if kind == "stationary":
            return Prediction(kind, {"covariance": Estimate(torch.from_numpy(sigma))}, exact=False)
        return Prediction(kind, {"excess loss": Estimate(0.5 * float(np.trace(np.asarray(self.h) @ sigma)))}, exact=False)

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        d = len(self.h)
        rule, params = (Momentum(), {"lr": self.lr, "momentum": self.momentum}) if self.momentum else (SGD(), {"lr": self.lr})
        system = descent("quadratic", quadratic(self.h, self.c), rule, [0.0] * d)
        half = [[0.5 * x for x in row] for row in self.h]

        def energy(s: Any, p: Any) -> Any:
            return [dot(s[:d], [dot(row, s[:d]) for row in half])]

        observe = [Covariance(lambda s, p: s[:d]) if kind == "stationary" else Average(energy)]
        burn = int(min(20_000, 40 * self._memory())) + 50
        run = Ensemble(system, _scaled(8192, budget), params, seed).run(200, observe, burn=burn)
        if kind == "stationary":
            return {"covariance": run[0]}
        found = run[0]
        return {"excess loss": Estimate(found.value[0], stderr=found.stderr[0]) if found.ok else found}

    def _memory(self) -> float:
        found = stationary.stationary_covariance(self.h, self.c, self.lr, self.momentum)
        return float(found.details.get("memory_steps", 100.0))


@dataclass(frozen=True)
class LabelNoiseRegression(Model):
    """Linear regression on fresh Gaussian data with label noise; A = diag(a), w measured from u (minibatch-noise-strength R5)."""

    a: tuple[float, ...]
    lr: float
    batch: int
    sigma: float
    momentum: float = 0.0
    slug: ClassVar[str] = "minibatch-noise-strength"
    kinds: ClassVar[tuple[str, ...]] = ("stationary",)

    def __post_init__(self) -> None:
        positive(lr=self.lr, batch=self.batch, sigma=self.sigma)
        if not self.a:
            raise InputError("a regression needs at least one input: the eigenvalues of A are empty")

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """(w^T A w + sigma^2) / 2."""
        return 0.5 * ((theta.square() * torch.tensor(self.a, dtype=theta.dtype)).sum(-1) + self.sigma**2)

    def data(self, count: int, seed: int) -> Mapping[str, torch.Tensor]:
        """x (n, d) and label noise (n,): y = u.x + noise."""
        draws = torch.Generator().manual_seed(seed)
        x = torch.randn(count, len(self.a), generator=draws, dtype=torch.float64) * torch.tensor(self.a, dtype=torch.float64).sqrt()
        return {"x": x, "noise": self.sigma * torch.randn(count, generator=draws, dtype=torch.float64)}

    def _predict(self, kind: str) -> Prediction:
        found = linear.label_noise_fluctuation(self.a, self.lr, self.batch, self.sigma, self.momentum)
        return Prediction(kind, {"variances": found}, refs=("minibatch-noise-strength R5",))

    def _control(self, kind: str) -> Prediction:
        """The small-rate value lr sigma^2 / (2 S (1-mu))."""
        value = self.lr * self.sigma**2 / (2 * self.batch * (1 - self.momentum))
        return Prediction(kind, {"variances": Estimate(torch.full((len(self.a),), value, dtype=torch.float64))}, exact=False)

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        d = len(self.a)
        rule, params = (Momentum(), {"momentum": self.momentum}) if self.momentum else (SGD(), {})
        system = descent("label noise", regression(np.diag(self.a), self.batch), rule, [0.0] * d)
        run = Ensemble(system, _scaled(8192, budget), {"lr": self.lr, "sigma": self.sigma, **params}, seed)
        slow = int(12 / (self.lr / (1 - self.momentum) * min(self.a))) + 100
        return {"variances": run.run(300, [Average(lambda s, p: [x * x for x in s[:d]])], burn=min(slow, 5000))[0]}


@dataclass(frozen=True)
class DataRegression(Model):
    """Least squares on a finite data set: exact stationary covariance about the solution (minibatch-noise-strength R11)."""

    x: tuple[tuple[float, ...], ...]
    y: tuple[float, ...]
    lr: float
    batch: int
    sampling: str = "replacement"
    slug: ClassVar[str] = "minibatch-noise-strength"
    kinds: ClassVar[tuple[str, ...]] = ("stationary",)

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """Mean of (x.w - y)^2 / 2."""
        x, y = torch.tensor(self.x, dtype=theta.dtype), torch.tensor(self.y, dtype=theta.dtype)
        return 0.5 * (theta @ x.T - y).square().mean(-1)

    def _predict(self, kind: str) -> Prediction:
        found = linear.finite_data(self.x, self.y, self.lr, self.batch, self.sampling)  # type: ignore[arg-type]
        return Prediction(kind, {"covariance": found}, refs=("minibatch-noise-strength R11",))

    def _control(self, kind: str) -> Prediction:
        """The other sampler's formula."""
        other = "subset" if self.sampling == "replacement" else "replacement"
        found = linear.finite_data(self.x, self.y, self.lr, self.batch, other)  # type: ignore[arg-type]
        return Prediction(kind, {"covariance": found})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        x, y = np.asarray(self.x), np.asarray(self.y)
        centred = y - x @ np.linalg.lstsq(x, y)[0]  # weights from the solution
        system = descent("data", table_regression(x, centred, self.batch, self.sampling), SGD(), [0.0] * x.shape[1])  # type: ignore[arg-type]
        burn = int(min(20_000, 12 / (self.lr * np.linalg.eigvalsh(x.T @ x / len(y))[0]))) + 60
        return {"covariance": Ensemble(system, _scaled(2048, budget), {"lr": self.lr}, seed).run(600, [Covariance()], burn=burn)[0]}


@dataclass(frozen=True)
class MomentumModes(Model):
    """Momentum SGD on independent modes with noise proportional to the Hessian (limiting-dynamics).

    ``stationary``: variances of theta; ``displacement``: mean squared displacement at ``lags``; ``area``: signed area per step.
    """

    dynamics: Underdamped
    lags: tuple[int, ...] = (1, 3, 10, 30, 100)
    slug: ClassVar[str] = "limiting-dynamics"
    kinds: ClassVar[tuple[str, ...]] = ("stationary", "displacement", "area")

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """sum (rho + wd) theta^2 / 2."""
        return 0.5 * (theta.square() * torch.from_numpy(self.dynamics.stiffness).to(theta.dtype)).sum(-1)

    def _predict(self, kind: str) -> Prediction:
        d = self.dynamics
        refs = ("limiting-dynamics R6",)
        if kind == "stationary":
            return Prediction(kind, {"variances": Estimate(torch.from_numpy(d.discrete_stationary()[:, 0, 0].copy()))}, refs=refs)
        if kind == "displacement":
            return Prediction(kind, {"displacement": Estimate(torch.from_numpy(d.displacement(self.lags)))}, refs=refs)
        return Prediction(kind, {"area": Estimate(torch.from_numpy(d.area_rate()))}, refs=("limiting-dynamics A4",))

    def _control(self, kind: str) -> Prediction:
        """Noise that is white instead of proportional to the Hessian; for the area, first-order theory, larger by 2 / (1 + beta)."""
        d = self.dynamics
        if kind == "area":
            return Prediction(kind, {"area": Estimate(torch.from_numpy(d.area_rate() * 2 / (1 + d.momentum)))}, exact=False)
        if kind == "stationary":
            white = d.discrete_stationary()[:, 0, 0] / d.modes
            return Prediction(kind, {"variances": Estimate(torch.from_numpy(white))})
        ordinary = d.displacement([1]) * np.array(self.lags)
        return Prediction(kind, {"displacement": Estimate(torch.from_numpy(ordinary))})

    def system(self) -> System:
        """The recursion, starting in its exact stationary law."""
        return momentum_modes(self.dynamics)

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        d, n = self.dynamics, len(self.dynamics.rho)
        ensemble = Ensemble(self.system(), _scaled(4096, budget), {"lr": d.lr, "beta": d.momentum, "wd": d.decay}, seed)
        if kind == "displacement":
            return {"displacement": ensemble.run(max(self.lags), [Displacement(self.lags, lambda s, p: s[:n])])[0]}
        if kind == "area":
            return {"area": ensemble.run(400, [Increments(lambda old, new, p: signed_areas(old, new, n))])[0]}
        return {"variances": ensemble.run(200, [Average(lambda s, p: [x * x for x in s[:n]])])[0]}


def momentum_modes(d: Underdamped, noise: tuple[float, ...] | None = None) -> System:
    """Momentum SGD on the modes of ``d`` from its exact stationary law; parameters lr, beta, wd.

    ``noise``: variances of the gradient noise instead of s^2 rho / S.
    """
    n = len(d.rho)
    scale = [float(np.sqrt(v)) for v in (noise or d.sigma**2 / d.batch * d.modes)]
    own = noise is None or bool(np.allclose(noise, d.sigma**2 / d.batch * d.modes))
    pair = d.discrete_stationary() if own else d.discrete_stationary() * (np.array(noise) / (d.sigma**2 / d.batch * d.modes))[:, None, None]
    roots = np.linalg.cholesky(pair + 1e-300 * np.eye(2))

    def start(p: Any, draws: Any) -> Any:
        z = [(draws.normal(), draws.normal()) for _ in range(n)]
        theta = [float(r[0, 0]) * a for r, (a, _) in zip(roots, z, strict=True)]
        m = [float(r[1, 0]) * a + float(r[1, 1]) * b for r, (a, b) in zip(roots, z, strict=True)]
        return [*theta, *m]

    def step(s: Any, p: Any, draws: Any) -> Any:
        m = [p.beta * s[n + k] + (d.rho[k] + p.wd) * s[k] + scale[k] * draws.normal() for k in range(n)]
        return [*(s[k] - p.lr * m[k] for k in range(n)), *m]

    return System("momentum modes", start, step)


def signed_areas(old: Any, new: Any, n: int) -> list[Any]:
    """theta_k v_{k+1} - v_k theta_{k+1} per mode, with v = -m."""
    return [new[k] * old[n + k] - old[k] * new[n + k] for k in range(n)]


@dataclass(frozen=True)
class LogLossSDE(Model):
    """L = (1 + r^2)/2 under noise of covariance 2 L eta / B: mean time for L to grow by ``level`` (power-law-escape R9)."""

    dim: int
    level: float
    temperature: float
    dt: float = 0.002
    slug: ClassVar[str] = "power-law-escape"
    kinds: ClassVar[tuple[str, ...]] = ("passage",)

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """(1 + |theta|^2) / 2."""
        return 0.5 * (1 + theta.square().sum(-1))

    def _predict(self, kind: str) -> Prediction:
        found = escape.radial_time(self.dim, self.level, self.temperature)
        return Prediction(kind, {"time": found}, exact=False, condition={"dt": self.dt}, refs=("power-law-escape R9",))

    def _control(self, kind: str) -> Prediction:
        """Additive noise of the strength at the minimum: Arrhenius in the loss itself."""
        from scipy.integrate import quad

        t, edge = self.temperature, (self.level - 1) ** 0.5

        def outer(r: float) -> float:
            inner = quad(lambda s: s ** (self.dim - 1) * np.exp((r * r - s * s) / t) * 2 / t, 0, r)[0]
            return float(r ** (1 - self.dim) * inner)

        return Prediction(kind, {"time": Estimate(quad(outer, 0, edge)[0])})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        horizon = int(12 * number(escape.radial_time(self.dim, self.level, self.temperature)) / self.dt) + 200
        params = {"dt": self.dt, "T": self.temperature, "level": self.level}
        run = Ensemble(escape.radial_sde(self.dim), _scaled(2000, budget), params, seed).run(
            horizon, [FirstPassage(lambda s, p: s[self.dim] > 0.5)]
        )
        mean = run[0].mean
        if not mean.ok:
            return {"time": mean}
        return {"time": Estimate(mean.value * self.dt, stderr=mean.stderr * self.dt, details=mean.details)}


@dataclass(frozen=True)
class AdaptiveStep(Model):
    """u_t = g_t / sqrt(v_t) for Gaussian gradients and a bias-corrected moving average (None: the plain mean)."""

    t: int
    beta2: float | None = None
    slug: ClassVar[str] = "adaptive-gradient-distribution"
    kinds: ClassVar[tuple[str, ...]] = ("moments",)

    def _predict(self, kind: str) -> Prediction:
        found = adaptive.uniform_moments(self.t) if self.beta2 is None else adaptive.ema_moments(self.t, self.beta2)
        return Prediction(kind, {name: found[name] for name in ("E|u|", "E u^2", "E u^4")}, refs=("adaptive-gradient-distribution R2",))

    def _control(self, kind: str) -> Prediction:
        """u standard normal: what a constant v would give."""
        values = {"E|u|": (2 / np.pi) ** 0.5, "E u^2": 1.0, "E u^4": 3.0}
        return Prediction(kind, {name: Estimate(value) for name, value in values.items()})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if self.t < 2:
            raise NotSolvable("the first step is a sign: nothing to simulate")
        weights = adaptive.ema_weights(self.t, self.beta2) if self.beta2 else np.full(self.t, 1 / self.t)

        def step(s: Any, p: Any, draws: Any) -> Any:
            g = draws.normals(self.t)
            return [g[-1] / sqrt(dot([float(w) for w in weights], [x * x for x in g]))]

        steps = max(16, int(1024 / self.t))
        run = Ensemble(System("adaptive step", lambda p, d: [0.0], step), _scaled(8192, budget), {}, seed)
        found = run.run(steps, [Average(lambda s, p: [abs(s[0]), s[0] ** 2, s[0] ** 4])])[0]
        return {
            name: Estimate(found.value[k], stderr=found.stderr[k]) if found.ok else found
            for k, name in enumerate(("E|u|", "E u^2", "E u^4"))
        }


def small_rate(model: RandomCurvature) -> Estimate:
    """The second-order exponent of a random curvature, with what it leaves out as its residual (probabilistic-stability R2)."""
    value, full = small_rate_exponent(model.law, model.lr, model.batch), exponent(model.law, model.lr, model.batch)
    return Estimate(value, residual=abs(value - number(full)), refs=("probabilistic-stability R2",)) if full.ok else full
