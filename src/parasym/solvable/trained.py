"""Base of the models that learn a fixed data set by gradient flow: its samples, its loss, and the run by automatic differentiation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from parasym.solvable.contract import Model
from parasym.solvable.engines import Flow, Params, follow


class Trained(Model):
    """A model with a data set of its own. ``horizon`` and ``points`` are those of `times`; a model that is not watched there has none."""

    horizon: float
    points: int

    @abstractmethod
    def full(self) -> Mapping[str, Tensor]:
        """The whole data set: x (n, ...) and y (n, ...), and what else the model draws."""

    @abstractmethod
    def init(self, seed: int | None = None) -> Params:
        """A start; the model's own without ``seed``."""

    @abstractmethod
    def losses(self, theta: Params, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of each sample (n,), whose mean is the loss."""

    @abstractmethod
    def observables(self, theta: Params) -> dict[str, Tensor]:
        """What theory speaks of, at these weights."""

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """``count`` samples with replacement, x (count, ...) and y (count, ...)."""
        full = self.full()
        pick = torch.randint(len(full["y"]), (count,), generator=torch.Generator().manual_seed(seed))
        return {"x": full["x"][pick], "y": full["y"][pick]}

    def loss(self, theta: Params) -> Tensor:
        """Mean loss of the whole data set."""
        return self.losses(theta, self.full()).mean()

    @property
    def times(self) -> Tensor:
        """(points,) from 0 to the horizon."""
        return torch.linspace(0, self.horizon, self.points, dtype=torch.float64)

    def run(self, times: Tensor, rates: Mapping[str, float] | None = None, method: str = "DOP853") -> tuple[Flow, dict[str, Tensor]]:
        """Gradient flow from the model's start, a rate for each weight (1 where none is given), and its observables (m, ...)."""
        gradient, speed = torch.func.grad(self.loss), rates or {}

        def rhs(_: float, theta: Params) -> Params:
            return {name: -speed.get(name, 1.0) * g for name, g in gradient(theta).items()}

        found = follow(rhs, self.init(), times, rtol=1e-11, atol=1e-13, method=method)
        seen = [self.observables({name: w[i] for name, w in found.theta.items()}) for i in range(len(times))]
        return found, {name: torch.stack([o[name] for o in seen]) for name in seen[0]}
