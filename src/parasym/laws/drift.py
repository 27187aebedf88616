"""The drift of a charge that gradient noise causes, from per-sample gradients at one point: before any training.

E[dQ per step] = eta^2 tr(A E[g_B g_B^T]) - 2 eta gamma Q (_charges-and-laws section 4; noise-equilibrium R1; law-of-balance R1). The
quadratic form of a charge is averaged over samples, so nothing of size parameters x parameters appears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from parasym.core.results import Estimate
from parasym.laws.charges import Charge
from parasym.measure.gradients import GradientMoments, Objective, gradient_moments


@dataclass(frozen=True, eq=False)
class ChargeMoments:
    """Quadratic forms of one charge in the gradient.

    Attributes:
        charge: whose.
        value: Q at the point, of the charge's shape.
        mean: q(E g). sample: E q(g) over units (samples or batches). stderr: of ``sample``.
        plus, minus: E of the parts of q(g) with positive and negative weight.
        mean_plus, mean_minus: the same parts of q(E g).
    """

    charge: Charge
    value: Tensor
    mean: Tensor
    sample: Tensor
    stderr: Tensor
    plus: Tensor
    minus: Tensor
    mean_plus: Tensor
    mean_minus: Tensor

    def of_batch(self, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """(q, plus, minus) averaged over batches, ``factor`` = 1/S or its form without replacement."""
        parts = ((self.mean, self.sample), (self.mean_plus, self.plus), (self.mean_minus, self.minus))
        q, plus, minus = (m + factor * (s - m) for m, s in parts)
        return q, plus, minus


def charge_moments(
    objective: Objective,
    loader: Any,
    charges: Sequence[Charge],
    *,
    unit: Literal["auto", "sample", "batch"] = "auto",
    chunk: int | None = None,
    limit: int | None = None,
) -> tuple[list[ChargeMoments], GradientMoments]:
    """Average the quadratic form of every charge over the gradients of a loader's samples, in one pass.

    Args:
        objective: model and loss.
        loader: a loader, a list of batches, or one batch.
        charges: quadratic or matrix ones; linear ones come back with zeros (noise does not move them).
        unit: "sample"; "batch" uses the loader's batches as units, for models whose samples are coupled; "auto" decides.
        chunk, limit: see `parasym.measure.gradients.gradient_moments`.

    Returns:
        one `ChargeMoments` for each charge, and the moments of the gradient itself.
    """
    how: Literal["sample", "batch"] = ("batch" if objective.coupled else "sample") if unit == "auto" else unit
    forms: dict[str, Any] = {}
    for i, c in enumerate(charges):
        if c.kind != "linear":
            forms[f"{i}+"] = lambda g, c=c: c.split(g, g)[0]
            forms[f"{i}-"] = lambda g, c=c: c.split(g, g)[1]
            forms[f"{i}"] = lambda g, c=c: c.form(g, g)
    moments = gradient_moments(objective, loader, forms=forms, squares=False, unit=how, chunk=chunk, limit=limit)
    out = []
    for i, c in enumerate(charges):
        value = c(objective.params)
        if c.kind == "linear":
            zero = torch.zeros_like(value)
            out.append(ChargeMoments(c, value, zero, zero, zero, zero, zero, zero, zero))
            continue
        sample, error = moments.forms[f"{i}"]
        plus, minus = c.split(moments.mean, moments.mean)
        parts = moments.forms[f"{i}+"][0], moments.forms[f"{i}-"][0]
        out.append(ChargeMoments(c, value, c.form(moments.mean, moments.mean), sample, error, *parts, plus, minus))
    return out, moments


def expected_change(
    found: ChargeMoments,
    factor: float,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    value: Tensor | None = None,
    nesterov: bool = False,
) -> Estimate:
    """Expected change of a charge in one step of SGD, of the charge's shape; its standard error from the samples used.

    Args:
        found: from `charge_moments`.
        factor: 1 / S, or ``GradientMoments.factor(S, replace=False)``.
        lr, momentum, weight_decay: of SGD; with momentum the slow manifold, after the velocity has relaxed.
        nesterov: Nesterov's form of the momentum: the same noise, a mean part (1 - mu + 2 mu^2) instead of (1 + mu).
        value: the charge where the decay acts; the one at the point if not given.
    """
    q, f = found.value if value is None else value, 1 - momentum
    noise = factor * (found.sample - found.mean)
    linear = found.charge.kind == "linear"
    if momentum == 0:
        shrink = 1 - lr * weight_decay
        change = ((shrink if linear else shrink**2) - 1) * q + lr**2 * (found.mean + noise)
    else:
        coherent = f + 2 * momentum**2 if nesterov else 1 + momentum
        source = lr**2 / f**2 * noise + lr**2 * coherent / f**3 * found.mean
        change = source - (1 if linear else 2) * lr * weight_decay / f * q
    assumed = ("batches drawn independently of the parameters",) + (("slow manifold of the momentum",) if momentum else ())
    return Estimate(
        change, stderr=lr**2 / f**2 * factor * found.stderr, assumptions=assumed, refs=("noise-equilibrium R1", "law-of-balance R1")
    )


@dataclass
class MeanLedger:
    """The exact recursion of a charge with its source replaced by an expectation: the statistical law, start-up of the momentum included.

    The velocity is a relaxing mean plus noise, v = r grad L + xi, with r and the variance of xi (in units of one batch gradient's noise)
    advanced step by step; after 1 / (1 - mu) steps this is the slow manifold of `expected_change`. Heavy-ball, Nesterov, dampening.

    Attributes:
        value: mean charge now, of the charge's shape. momentum: mean of q(theta, v).
        ramp, spread: r, and the variance of xi.
    """

    value: Tensor
    momentum: Tensor
    ramp: float = 0.0
    spread: float = 0.0
    started: bool = False

    @classmethod
    def at(cls, value: Tensor) -> MeanLedger:
        """From rest."""
        return cls(value, torch.zeros_like(value))

    def advance(
        self, found: ChargeMoments, factor: float, lr: float, mu: float = 0.0, gamma: float = 0.0, damp: float = 0.0, nesterov: bool = False
    ) -> Tensor:
        """One step with the moments ``found``; returns the new mean charge."""
        noise, mean, linear = factor * (found.sample - found.mean), found.mean, found.charge.kind == "linear"
        if mu == 0:
            shrink = 1 - lr * gamma
            self.value = (shrink if linear else shrink**2) * self.value + lr**2 * (mean + noise)
            return self.value
        keep = 1 - damp if self.started else 1.0
        self.ramp, self.spread, self.started = mu * self.ramp + keep, mu**2 * self.spread + keep**2, True
        middle, pull = mu * self.momentum + keep * gamma * self.value, 0.0 * self.value
        step, cross = self.ramp**2 * mean + self.spread * noise, self.ramp**2 * mean + self.spread * noise
        if nesterov:
            r = 1 + mu * self.ramp
            step = r**2 * mean + (1 + 2 * mu * keep + mu**2 * self.spread) * noise
            cross = r * self.ramp * mean + (keep + mu * self.spread) * noise
            pull, moved = gamma * self.value, mu * middle
        else:
            moved = middle
        self.value = self.value - (1 if linear else 2) * lr * (pull + moved) + (0.0 if linear else lr**2) * step
        self.momentum = middle - (0.0 if linear else lr) * cross
        return self.value


def imbalance(found: ChargeMoments, factor: float) -> Tensor:
    """(plus - minus) / (plus + minus) of the batch second moments: 0 at the noise equilibrium, +-1 where one side has no noise.

    For a matrix charge |plus - minus|_F / (|plus|_F + |minus|_F) for each copy.
    """
    _, plus, minus = found.of_batch(factor)
    if found.charge.kind == "matrix":
        gap, size = (plus - minus).norm(dim=(-2, -1)), plus.norm(dim=(-2, -1)) + minus.norm(dim=(-2, -1))
    else:
        gap, size = plus - minus, plus + minus
    return torch.where(size > 0, gap / size.clamp_min(1e-300), torch.zeros_like(gap))


def report_rows(found: Sequence[ChargeMoments], factor: float) -> list[Mapping[str, Any]]:
    """One row for each charge: its name, numbers, and root-mean-square imbalance."""
    return [
        {**f.charge.to_dict(), "imbalance": float(imbalance(f, factor).square().mean().sqrt())} for f in found if f.charge.kind != "linear"
    ]
