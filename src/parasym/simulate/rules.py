"""Update rules: how a gradient moves the weights. Each goes with any gradient of `parasym.simulate.problems`, or your own.

A rule names its parameters (``p.lr``, ``p.momentum``, ...), so a grid may sweep them. Conventions are torch's: the momentum
buffer is not dampened unless asked, ``weight_decay`` is not part of a rule (add ``gamma * w`` to the gradient).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from parasym.core.errors import InputError
from parasym.simulate.expr import dot, maximum, sqrt
from parasym.simulate.system import Draws, Params, State, System

Gradient = Callable[[State, Params, Draws], Sequence[Any]]
Start = Callable[[Params, Draws], Sequence[Any]]


class Rule(ABC):
    """Base of the update rules; the state is the d weights, then the rule's slots."""

    @abstractmethod
    def slots(self, size: int) -> Sequence[float]:
        """Start values of the numbers the rule keeps for ``size`` weights."""

    @abstractmethod
    def update(self, w: State, kept: State, g: Sequence[Any], p: Params) -> tuple[Sequence[Any], Sequence[Any]]:
        """New weights and slots from the gradient ``g`` at ``w``."""


def descent(name: str, gradient: Gradient, rule: Rule, start: Start | Sequence[float]) -> System:
    """The system that follows ``gradient`` by ``rule``; ``start`` gives the weights, and the slots start as the rule says.

    Example:
        >>> well = descent("well", lambda w, p, draw: [w[0] + draw.normal()], SGD(), [1.0])
    """

    def begin(p: Params, draws: Draws) -> Sequence[Any]:
        weights = list(start(p, draws) if callable(start) else start)
        return [*weights, *rule.slots(len(weights))]

    size = len(list(start)) if not callable(start) else None

    def step(state: State, p: Params, draws: Draws) -> Sequence[Any]:
        d = _weights(rule, len(state)) if size is None else size
        w, kept = state[:d], state[d:]
        new, slots = rule.update(w, kept, gradient(w, p, draws), p)
        return [*new, *slots]

    return System(name, begin, step)


def _weights(rule: Rule, total: int) -> int:
    """How many of ``total`` state entries are weights."""
    return next(d for d in range(1, total + 1) if d + len(rule.slots(d)) == total)


@dataclass(frozen=True)
class SGD(Rule):
    """w' = w - lr g."""

    def slots(self, size: int) -> Sequence[float]:
        """None."""
        return ()

    def update(self, w: State, kept: State, g: Sequence[Any], p: Params) -> tuple[Sequence[Any], Sequence[Any]]:
        """See the class."""
        return [a - p.lr * b for a, b in zip(w, g, strict=True)], ()


@dataclass(frozen=True)
class Momentum(Rule):
    """m' = momentum m + g, w' = w - lr m' (heavy ball).

    ``dampened``: m' = momentum m + (1 - momentum) g. ``nesterov``: w' = w - lr (g + momentum m'), as torch does it.
    """

    dampened: bool = False
    nesterov: bool = False

    def slots(self, size: int) -> Sequence[float]:
        """The buffer."""
        return (0.0,) * size

    def update(self, w: State, kept: State, g: Sequence[Any], p: Params) -> tuple[Sequence[Any], Sequence[Any]]:
        """See the class."""
        m = [p.momentum * a + (b * (1 - p.momentum) if self.dampened else b) for a, b in zip(kept, g, strict=True)]
        along = [b + p.momentum * a for a, b in zip(m, g, strict=True)] if self.nesterov else m
        return [a - p.lr * b for a, b in zip(w, along, strict=True)], m


@dataclass(frozen=True)
class Preconditioned(Rule):
    """m' = momentum m + g, w' = w - Lambda m', with a fixed matrix Lambda (d, d).

    Raises:
        InputError: the matrix is not square, or not finite.
    """

    matrix: ArrayLike

    def __post_init__(self) -> None:
        matrix = np.asarray(self.matrix, float)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
            raise InputError(f"a preconditioner is a finite square matrix, got the shape {matrix.shape}")
        object.__setattr__(self, "matrix", matrix)

    def slots(self, size: int) -> Sequence[float]:
        """The buffer."""
        return (0.0,) * size

    def update(self, w: State, kept: State, g: Sequence[Any], p: Params) -> tuple[Sequence[Any], Sequence[Any]]:
        """See the class."""
        matrix = np.asarray(self.matrix, float)
        if matrix.shape[0] != len(w):
            raise InputError(f"the preconditioner is for {matrix.shape[0]} weights, there are {len(w)}")
        m = [p.momentum * a + b for a, b in zip(kept, g, strict=True)]
        return [a - dot([float(x) for x in row], m) for a, row in zip(w, matrix, strict=True)], m


@dataclass(frozen=True)
class Adam(Rule):
    """m' = beta1 m + (1 - beta1) g, v' = beta2 v + (1 - beta2) g^2, w' = w - lr m^ / (sqrt(v^) + eps).

    ``corrected`` divides m' and v' by 1 - beta^t. ``maximum`` keeps the largest v so far (AMSGrad). beta1 = 0 is RMSProp.
    """

    corrected: bool = True
    maximum: bool = False

    def slots(self, size: int) -> Sequence[float]:
        """m, v, the largest v, and the powers of the betas."""
        return (0.0,) * (size * (3 if self.maximum else 2)) + ((1.0, 1.0) if self.corrected else ())

    def update(self, w: State, kept: State, g: Sequence[Any], p: Params) -> tuple[Sequence[Any], Sequence[Any]]:
        """See the class."""
        d = len(w)
        m = [p.beta1 * a + (1 - p.beta1) * b for a, b in zip(kept[:d], g, strict=True)]
        v = [p.beta2 * a + (1 - p.beta2) * b * b for a, b in zip(kept[d : 2 * d], g, strict=True)]
        top = [maximum(a, b) for a, b in zip(kept[2 * d : 3 * d], v, strict=True)] if self.maximum else []
        powers: list[Any] = [kept[-2] * p.beta1, kept[-1] * p.beta2] if self.corrected else []
        first, second = ((1 - powers[0]), (1 - powers[1])) if self.corrected else (1.0, 1.0)
        new = [a - p.lr * (b / first) / (sqrt(c / second) + p.eps) for a, b, c in zip(w, m, top or v, strict=True)]
        return new, [*m, *v, *top, *powers]


@dataclass(frozen=True)
class LaProp(Rule):
    """v' = beta2 v + (1 - beta2) g^2, m' = beta1 m + (1 - beta1) g / (sqrt(v^) + eps), w' = w - lr m^ (both corrected)."""

    def slots(self, size: int) -> Sequence[float]:
        """m, v and the powers of the betas."""
        return (0.0,) * (2 * size) + (1.0, 1.0)

    def update(self, w: State, kept: State, g: Sequence[Any], p: Params) -> tuple[Sequence[Any], Sequence[Any]]:
        """See the class."""
        d = len(w)
        powers = [kept[-2] * p.beta1, kept[-1] * p.beta2]
        v = [p.beta2 * a + (1 - p.beta2) * b * b for a, b in zip(kept[d : 2 * d], g, strict=True)]
        scaled = [b / (sqrt(c / (1 - powers[1])) + p.eps) for b, c in zip(g, v, strict=True)]
        m = [p.beta1 * a + (1 - p.beta1) * b for a, b in zip(kept[:d], scaled, strict=True)]
        return [a - p.lr * b / (1 - powers[0]) for a, b in zip(w, m, strict=True)], [*m, *v, *powers]
