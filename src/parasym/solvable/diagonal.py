"""A diagonal linear network of any depth and width under SGD: its stationary density and its sparsity transition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.simulate import SGD, Ensemble, descent
from parasym.solvable.balance import Moments, mean_and_variance, sparsity_transition
from parasym.solvable.contract import Model, Prediction, absent, positive

_LOST = 1e3  # a replica that a finite kick has thrown beyond this never comes back


@dataclass(frozen=True)
class DiagonalLinear(Model):
    """f = v x, v = sum_i prod_j u_ij, loss (v x - y)^2 (no 1/2), y = x + sigma eps, x, eps ~ N(0, 1); T = lr / batch.

    All factors of a unit are equal at the start (the balanced manifold, where noise drives every start) and v = 1. "stationary": mean
    and variance of v, in the limit of small T and large sigma; "phase": the share of the mass at v = 0, for two factors, where the
    transition is at T_c = E[xy] / Var[xy] (law-of-balance R4-R9).

    Attributes:
        sigma: label noise.
        temperature: in units of T_c.
        factors: weights multiplied in a unit, 1 to 4.
        width: units.
        batch: samples of a step, drawn anew; the learning rate is temperature * T_c * batch.
    """

    sigma: float = 20.0
    temperature: float = 0.34
    factors: int = 2
    width: int = 1
    batch: int = 1
    slug: ClassVar[str] = "law-of-balance"
    kinds: ClassVar[tuple[str, ...]] = ("stationary", "phase")

    def __post_init__(self) -> None:
        positive(sigma=self.sigma, temperature=self.temperature)
        for name, value, most in (("factors", self.factors, 4), ("width", self.width, 64), ("batch", self.batch, 64)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(f"{name} must be a whole number from 1 to {most}, got {value!r}")

    @property
    def moments(self) -> Moments:
        """Population moments of the data."""
        return Moments(a1=2.0, a2=2.0, a3=2 + self.sigma**2, b1=1.0, b2=1.0)

    @property
    def critical(self) -> float:
        """T_c = b2 / a3."""
        return sparsity_transition(self.moments)[0]

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        """(v - 1)^2 + sigma^2 at theta (..., width * factors)."""
        v = theta.unflatten(-1, (self.width, self.factors)).prod(-1).sum(-1)
        return (v - 1).square() + self.sigma**2

    def data(self, count: int, seed: int) -> Mapping[str, torch.Tensor]:
        """x, y of ``count`` samples, float64."""
        x, eps = torch.randn(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return {"x": x, "y": x + self.sigma * eps}

    def _predict(self, kind: str) -> Prediction:
        small = {"T / T_c": self.temperature, "1 / sigma": 1 / self.sigma}
        if kind == "phase":
            if self.factors != 2:
                return Prediction(kind, {"at zero": absent("only two factors have a sparsity transition", (f"{self.slug} R8",))})
            return Prediction(kind, {"at zero": Estimate(float(self.temperature > 1))}, False, small, (f"{self.slug} R8",))
        mean, variance = mean_and_variance(self.moments, self.temperature * self.critical, self.factors, self.width)
        return Prediction(kind, {"mean": Estimate(mean), "variance": Estimate(variance)}, False, small, (f"{self.slug} R5",))

    def _control(self, kind: str) -> Prediction:
        """What gradient descent, which has no noise, would do: v = 1, whatever the temperature."""
        if kind == "phase":
            return Prediction(kind, {"at zero": Estimate(float(self.temperature <= 1))})
        return Prediction(kind, {"mean": Estimate(1.0), "variance": Estimate(0.0)})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if kind == "phase" and self.factors != 2:
            return {"at zero": absent("only two factors have a sparsity transition")}
        width, factors, batch, sigma = self.width, self.factors, self.batch, self.sigma

        def gradient(u: Any, p: Any, draws: Any) -> Any:
            units = [u[i * factors : (i + 1) * factors] for i in range(width)]
            v = sum(math.prod(unit[1:], start=unit[0]) for unit in units)
            pull: Any = 0.0
            for _ in range(batch):
                x = draws.normal()
                pull = pull + (v * x - x - sigma * draws.normal()) * x
            pull = 2.0 * pull / float(batch)
            return [pull * math.prod([w for k, w in enumerate(unit) if k != j], start=1.0) for unit in units for j in range(factors)]

        start = [float(width) ** (-1 / factors)] * (width * factors)
        system = descent("diagonal linear network", gradient, SGD(), start)
        replicas = max(400, round(2000 * budget))
        run = Ensemble(system, replicas, {"lr": self.temperature * self.critical * batch}, seed, precision="float64").run(16_000)
        v = run.final.unflatten(-1, (width, factors)).prod(-1).sum(-1)
        kept = v[run.sound & (v.abs() < _LOST)]
        details = {"replicas": replicas, "thrown out": replicas - len(kept)}
        if kind == "phase":
            share = float((kept.abs() < 1e-3).double().mean())
            near = 1.0 if share > 0.9 else 0.0 if share < 0.1 else share  # near T_c a finite run is in between
            return {"at zero": Estimate(near, stderr=0.0, details={**details, "share": share})}
        variance = kept.var()
        fourth = (kept - kept.mean()).pow(4).mean()
        return {
            "mean": Estimate(float(kept.mean()), stderr=float(kept.std()) / len(kept) ** 0.5, details=details),
            "variance": Estimate(float(variance), stderr=float((fourth - variance.square()).clamp_min(0).sqrt()) / len(kept) ** 0.5),
        }
