"""Closed forms in continuous time: what papers plot beside a training run.

Heavy-ball SGD follows, to second order in the step, m Q'' + f Q' + 2 gamma Q = 2 m q(velocity), m = eta (1 + mu) / 2, f = 1 - mu: a
damped oscillator driven by the kinetic energy that the symmetry does not share (neural-mechanics R6, R7; noether-learning-dynamics
R2). Its integral is kept as two recursively decayed sums, which never overflow (R8).
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.laws.drift import ChargeMoments
from parasym.laws.ledger import Account
from parasym.solvable.engines import follow


@dataclass(frozen=True)
class ModifiedFlow:
    """The oscillator that a charge obeys under SGD, in time t = eta (1 - dampening) k.

    Args:
        lr, momentum, dampening, weight_decay: constants of ``torch.optim.SGD`` (not Nesterov).
        linear: a linear charge: half the restoring force and no source.

    Raises:
        InputError: values outside their range.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    linear: bool = False

    def __post_init__(self) -> None:
        if not (self.lr > 0 and 0 <= self.momentum < 1 and 0 <= self.dampening < 1 and self.weight_decay >= 0):
            raise InputError(f"{self} needs lr > 0, 0 <= momentum < 1, 0 <= dampening < 1, weight_decay >= 0.")
        if self.dampening and not self.momentum:
            raise InputError("Without momentum torch's SGD ignores the dampening: set it to 0.")

    @property
    def step(self) -> float:
        """Time of one step."""
        return self.lr * (1 - self.dampening)

    @property
    def damping(self) -> float:
        """Gamma = (1 - mu) / (eta (1 - damp) (1 + mu))."""
        return (1 - self.momentum) / (self.step * (1 + self.momentum))

    @property
    def frequency_square(self) -> float:
        """Omega^2 = 4 gamma / (eta (1 - damp) (1 + mu)); half of it for a linear charge."""
        return (2 if self.linear else 4) * self.weight_decay / (self.step * (1 + self.momentum))

    @property
    def regime(self) -> str:
        """ "first order" without momentum, else "over-damped", "critical" or "under-damped"."""
        if not self.momentum:
            return "first order"
        gap = self.damping**2 - self.frequency_square
        return "critical" if abs(gap) < 1e-12 * self.damping**2 else "over-damped" if gap > 0 else "under-damped"

    def _rates(self) -> tuple[complex, complex]:
        if not self.momentum:
            rate = (1 if self.linear else 2) * self.weight_decay
            return complex(-rate), complex(-rate)
        gap = self.damping**2 - self.frequency_square
        if self.regime == "critical":  # the two rates apart by 1e-5: their difference quotient is the derivative to 1e-10
            gap = 1e-10 * self.damping**2
        root = cmath.sqrt(gap)
        return -self.damping + root, -self.damping - root

    def homogeneous(self, t: Tensor) -> Tensor:
        """hom(t): what is left of the start at times t, from rest; 1 at 0."""
        a, b = self._rates()
        if not self.momentum:
            return torch.exp(a.real * t)
        z = t.to(torch.complex128)
        return ((a * torch.exp(b * z) - b * torch.exp(a * z)) / (a - b)).real

    def predict(self, start: Tensor, source: Tensor) -> Tensor:
        """The charge at every step.

        Args:
            start: (m,) at step 0.
            source: (T, m), q(d) of each step for plain SGD (d the gradient with its decay), q(v) for momentum (v torch's buffer after
                the step); ignored by a linear charge. Dampening is accounted for here: dtheta/dt = -v / (1 - damp).

        Returns:
            (T + 1, m).
        """
        a, b = self._rates()
        steps, h = source.shape[0], self.step
        hom = self.homogeneous(h * torch.arange(steps + 1, dtype=torch.float64))
        out = hom[:, None] * start.to(torch.float64)
        if self.linear:
            return out
        ea, eb = cmath.exp(a * h), cmath.exp(b * h)
        plus = torch.zeros(source.shape[1], dtype=torch.complex128)
        minus = torch.zeros_like(plus)
        q = source.to(torch.complex128) / (1 - self.dampening) ** 2
        if self.momentum:  # the trapezoidal rule, from rest: ten to twenty times closer than the value at either end
            q = 0.5 * (q + torch.cat([torch.zeros_like(q[:1]), q[:-1]]))
        rows = []
        for k in range(steps):
            plus = ea * (plus + q[k])
            if self.momentum:
                minus = eb * (minus + q[k])
                rows.append(2 * h * ((plus - minus) / (a - b)).real)
            else:
                rows.append(h**2 * plus.real)
        return out + torch.cat([torch.zeros(1, source.shape[1], dtype=torch.float64), torch.stack(rows)]) if rows else out

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "lr": self.lr, "momentum": self.momentum, "dampening": self.dampening, "weight_decay": self.weight_decay,
            "linear": self.linear, "regime": self.regime, "damping": self.damping, "frequency_square": self.frequency_square,
        }  # fmt: skip


def modified_flow(account: Account, lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    """The closed form (neural-mechanics R7) for a charge whose ledger was kept at every step, from the ledger's own source, (T, m).

    Raises:
        InputError: the ledger skipped steps, or has no exact law.
    """
    steps = account.steps
    if not account.exact or not torch.equal(steps, torch.arange(len(steps))):
        raise InputError("The closed form needs an exact ledger kept at every step (every=1): " + (account.note or "steps are missing"))
    flow = ModifiedFlow(lr, momentum, dampening, weight_decay, account.charge.kind == "linear")
    return flow.predict(account.measured[0], account.source[1:] / lr**2)


# --------------------------------------------------------------------------------------------------- norms of scale-invariant weights


@dataclass(frozen=True)
class NormFlow:
    """|q|^4 of a scale-invariant group of weights under SGD with decay k, and the adaptive method it is equivalent to.

    The norm grows with the gradient of the direction and decays with k, so the direction moves at the rate eta / ((1 - b) |q|^2): an
    RMSProp with one accumulator for each group (noether-learning-dynamics R4-R8). Valid for t >> m / (1 - b) and every direction
    over-damped: see `overdamped`.

    Args:
        lr, momentum, weight_decay: of SGD.
        noise: the gradient is dominated by minibatch noise, which momentum does not add up coherently.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    noise: bool = False

    @property
    def gain(self) -> float:
        """Coefficient of |grad f(unit q)|^2 in d|q|^4/dt: 4 m / f^3, or 2 eta / f^2 under noise."""
        m, f = self.lr * (1 + self.momentum) / 2, 1 - self.momentum
        return 2 * self.lr / f**2 if self.noise else 4 * m / f**3

    def predict(self, start: float, squares: Tensor) -> Tensor:
        """|q|^4 at every step, (T + 1,), from |q_0|^4 and |grad f(unit q)|^2 at each step, (T,)."""
        keep = math.exp(-4 * self.weight_decay * self.lr / (1 - self.momentum))
        value, rows = start, [start]
        for g in squares.double().tolist():
            value = keep * (value + self.lr * self.gain * g)
            rows.append(value)
        return torch.tensor(rows, dtype=torch.float64)

    def stationary(self, square: float) -> float:
        """|q|^4 where growth and decay balance, for E|g(unit q)|^2 = ``square`` under noise: eta E|g|^2 / (2 k f)."""
        if not self.weight_decay:
            return math.inf
        return self.lr * square / (2 * self.weight_decay * (1 - self.momentum))

    def effective_rate(self, norm_square: float) -> float:
        """Learning rate of the direction, eta / ((1 - b) |q|^2) (R5)."""
        return self.lr / ((1 - self.momentum) * norm_square)

    def angular_update(self) -> float:
        """Stationary angle per step, sqrt(2 eta k / (1 + b)) (R7)."""
        return math.sqrt(2 * self.lr * self.weight_decay / (1 + self.momentum))

    def rmsprop(self) -> tuple[float, float]:
        """(rho, base rate per step) of the equivalent RMSProp (R6).

        Raises:
            InputError: without decay the method is AdaGrad, with no fixed memory (R8).
        """
        if not self.weight_decay:
            raise InputError("Without weight decay the norm never forgets: the direction moves as in AdaGrad, not RMSProp.")
        rho = 1 - 4 * self.weight_decay * self.lr / (1 - self.momentum)
        return rho, self.lr * math.sqrt(2 * self.weight_decay / (self.lr * (1 + self.momentum)))

    def overdamped(self, top_curvature: float, norm_square: float) -> bool:
        """Whether eta h_max / |q|^2 is below half its critical value (1 - b)^2 / 4, h_max the top curvature at |q| = 1.

        Where it is False the prediction is off by up to 40 %: use the exact ledger.
        """
        return self.lr * top_curvature / norm_square < (1 - self.momentum) ** 2 / 8


@dataclass(frozen=True, eq=False)
class NoetherFlow:
    """How noise carries the charges of independent generators along their orbits, without training (noise-equilibrium R1, R4).

    Attributes:
        times: (T,) in steps x eta. lam: (T, count) group coordinate from the start. charge: (T, count) values of the charge.
        limit: (count,) where each lam ends, +-inf where nothing balances it.
    """

    times: Tensor
    lam: Tensor
    charge: Tensor
    limit: Tensor
    assumptions: tuple[str, ...] = ("the loss stays where it is", "one generator at a time", "small learning rate")
    refs: tuple[str, ...] = ("noise-equilibrium R1", "noise-equilibrium R4")


def noether_flow(
    found: ChargeMoments, params: Mapping[str, Tensor], factor: float, lr: float, times: Sequence[float], weight_decay: float = 0.0
) -> NoetherFlow:
    """Integrate dlam/dt = [eta tr(A M2(lam)) - 2 gamma Q(lam)] / (2 theta.A^2 theta) for every unit of a quadratic charge.

    Along the orbit the gradient goes to exp(-lam A) g, so the second moments at every lam follow from those at one point, and each unit
    is one scalar equation. Units that share weights with other generators are moved one family at a time here; their common end is
    `parasym.laws.equilibrium.osborne`.

    Args:
        found: moments of one quadratic charge with weights +1 and -1, from `parasym.laws.drift.charge_moments`.
        params: weights there. factor: 1 / S (``GradientMoments.factor``).
        lr, weight_decay: eta and gamma of SGD. times: increasing, from 0, in steps x eta.

    Raises:
        InputError: another kind of charge, weights other than +-1, or bad numbers.
    """
    c = found.charge
    if c.kind != "quadratic" or any(abs(b.weight) != 1 for b in c.blocks):
        raise InputError("noether_flow moves quadratic charges with weights +1 and -1; matrix charges go through noise_equilibrium.")
    if not lr > 0 or weight_decay < 0:
        raise InputError(f"noether_flow needs lr > 0 and weight_decay >= 0, got {lr} and {weight_decay}.")
    _, plus, minus = found.of_batch(factor)
    grow, shrink = c.split(params, params)

    def speed(lam: Tensor) -> Tensor:
        up, down = torch.exp(2 * lam), torch.exp(-2 * lam)
        force = lr * (plus * down - minus * up) - 2 * weight_decay * (grow * up - shrink * down)
        size = 2 * (grow * up + shrink * down)
        return torch.where(size > 0, force / size.clamp_min(1e-300), torch.zeros_like(force))

    at = torch.as_tensor(times, dtype=torch.float64)
    path = follow(lambda t, x: {"lam": speed(x["lam"])}, {"lam": torch.zeros(c.count, dtype=torch.float64)}, at, rtol=1e-10).theta["lam"]
    pull = 2 * weight_decay / lr
    above, below = plus + pull * shrink, minus + pull * grow
    limit = 0.25 * (above / below).log()
    charge = grow * torch.exp(2 * path) - shrink * torch.exp(-2 * path)
    return NoetherFlow(at, path, charge, limit)
