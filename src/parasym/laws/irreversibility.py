"""Four ways to measure how irreversible a training rule is; they agree to leading order in the learning rate.

Numerical backward error, refinement of time, running the rule backwards, and the entropy production of regularised noise all give the
potential (eta / 4) E g_B.P g_B or its force (thermodynamic-irreversibility R1-R6), which is the entropic potential of
`parasym.laws.entropy`. Rules that follow no gradient have a force without a potential (R3, R7): `reversal` and `retrace_rule` take any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.guards import math_attention, no_checkpointing, preserve, rng_state
from parasym.core.operators import Layout
from parasym.core.results import Estimate, plain
from parasym.laws.entropy import rates
from parasym.measure.gradients import Objective, batches

Kind = Literal["DE", "TR", "TA", "ST"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, eq=False)
class Irreversibility:
    """How irreversible the step theta' = theta - eta P g_B is, four ways.

    Attributes:
        potential: (eta / 4) E g_B.P g_B. reference: (n,) -P grad of it.
        forces: "DE" backward error, "TR" time renormalisation, "TA" microscopic time reversal -> (n,) their force, the same to O(eta).
        production: the potential from entropy production ("ST"), with its standard error over draws; None if not asked for.
        layout: positions of the parameters in the flat vectors.
    """

    potential: float
    reference: Tensor
    forces: Mapping[Kind, Tensor]
    production: Estimate | None
    layout: Layout
    lr: float
    assumptions: tuple[str, ...] = ("leading order in the learning rate", "batches frozen within each measure")
    refs: tuple[str, ...] = ("thermodynamic-irreversibility R1", "thermodynamic-irreversibility R4")

    def error(self, kind: Kind) -> float:
        """Relative difference from the reference: of the force, or for "ST" of the potential."""
        if kind == "ST":
            if self.production is None or not isinstance(self.production.value, float):
                raise InputError("Entropy production was not asked for: add 'ST' to kinds.")
            return abs(self.production.value - self.potential) / abs(self.potential)
        return float((self.forces[kind] - self.reference).norm() / self.reference.norm())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the vectors."""
        errors = {k: self.error(k) for k in (*self.forces, *(("ST",) if self.production else ()))}  # type: ignore[arg-type]
        cosines = {k: float(f @ self.reference / (f.norm() * self.reference.norm())) for k, f in self.forces.items()}
        return plain(  # type: ignore[no-any-return]
            {"potential": self.potential, "errors": errors, "cosines": cosines, "production": self.production, "lr": self.lr,
             "assumptions": self.assumptions, "refs": self.refs}
        )  # fmt: skip


def irreversibility(
    objective: Objective,
    loader: Any,
    lr: float,
    *,
    kinds: Sequence[Kind] = KINDS,
    preconditioner: Mapping[str, Tensor] | None = None,
    refine: int = 4,
    temperature: float = 1e-6,
    draws: int = 100,
    seed: int = 0,
) -> Irreversibility:
    """Measure the irreversibility of a gradient step on the batches of ``loader``, in float64.

    Args:
        objective: model and loss; built with dtype=torch.float64, since the defect is of order lr^2.
        lr: eta.
        kinds: which measures.
        preconditioner: name -> positive tensor, the diagonal of P (R6); ones if not given.
        refine: sub-steps n of the time renormalisation.
        temperature: D of the regularising noise, of covariance 2 eta D P.
        draws: antithetic pairs of it for each batch.
        seed: of the draws.

    Raises:
        InputError: parameters that are not float64, unknown kinds, bad numbers.
    """
    if any(p.dtype != torch.float64 for p in objective.params.values()):
        raise InputError("The defect of a step is of order lr^2 and drowns in float32: build the Objective with dtype=torch.float64.")
    if lr <= 0 or refine < 2 or temperature <= 0 or draws < 1 or any(k not in KINDS for k in kinds):
        raise InputError(f"irreversibility needs lr > 0, refine >= 2, temperature > 0, draws >= 1, kinds among {', '.join(KINDS)}.")
    layout = Layout.of(objective.params)
    theta = layout.flatten(objective.params)
    P = torch.ones_like(theta) if preconditioner is None else layout.flatten(preconditioner).to(theta)
    generator = torch.Generator().manual_seed(seed)
    found: dict[Kind, Tensor] = {k: torch.zeros_like(theta) for k in kinds if k != "ST"}
    reference, potential, count = torch.zeros_like(theta), 0.0, 0
    produced: list[float] = []
    for batch in batches(loader):
        count += 1

        def gradient(x: Tensor, batch: Any = batch) -> Tensor:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (g,) = torch.autograd.grad(objective(layout.unflatten(leaf), batch).reshape(()), leaf)
            return g

        with rng_state(), math_attention(), no_checkpointing(), preserve(objective.model):
            g0 = gradient(theta)
            potential += lr / 4 * float(g0 @ (P * g0))
            leaf = theta.clone().requires_grad_()
            (g,) = torch.autograd.grad(objective(layout.unflatten(leaf), batch).reshape(()), leaf, create_graph=True)
            (curved,) = torch.autograd.grad(g, leaf, grad_outputs=P * g.detach())  # H P g
            reference -= lr / 2 * P * curved
            one = theta - lr * P * g0
            if "DE" in found:
                found["DE"] += (one - _flow(theta, gradient, P, lr)) / lr
            if "TR" in found:
                x = theta
                for _ in range(refine):
                    x = x - lr / refine * P * gradient(x)
                found["TR"] += (one - x) / (lr * (1 - 1 / refine))
            if "TA" in found:
                found["TA"] += (one + lr * P * gradient(one) - theta) / (2 * lr)
            if "ST" in kinds:
                produced.append(_production(theta, gradient, g0, P, lr, temperature, draws, generator))
    forces = {k: f / count for k, f in found.items()}
    production = None
    if produced:
        values = torch.tensor(produced, dtype=torch.float64)
        spread = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
        production = Estimate(
            float(values.mean()), stderr=spread, note="standard error over batches", refs=("thermodynamic-irreversibility R4",)
        )
    return Irreversibility(potential / count, reference / count, forces, production, layout, lr)


def _flow(theta: Tensor, gradient: Any, P: Tensor, lr: float, steps: int = 4) -> Tensor:
    """Gradient flow for a time lr by the classical Runge-Kutta rule: exact to order lr^5."""
    x, h = theta, lr / steps
    for _ in range(steps):
        a = -P * gradient(x)
        b = -P * gradient(x + h / 2 * a)
        c = -P * gradient(x + h / 2 * b)
        d = -P * gradient(x + h * c)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def _production(theta: Tensor, gradient: Any, g0: Tensor, P: Tensor, lr: float, D: float, draws: int, generator: torch.Generator) -> float:
    """D sigma / 4, sigma = E ln p(theta'|theta) / p(theta|theta') with the batch kept on the way back."""
    total = 0.0
    for _ in range(draws):
        xi = math.sqrt(2 * lr * D) * P.sqrt() * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        for sign in (1.0, -1.0):
            d = -lr * P * g0 + sign * xi
            back, forth = -d + lr * P * gradient(theta + d), d + lr * P * g0
            total += float((back.square() / P).sum() - (forth.square() / P).sum())
    return total / (2 * draws) / (4 * lr) / 4


def retrace(objective: Objective, batch: Any, lr: float, steps: int) -> Estimate:
    """Distance from the start after ``steps`` gradient steps on one batch forward and as many backward (theta + eta g).

    To leading order 2 eta times the summed force of the potential; ``residual`` is the part of it that this does not explain.
    """
    layout = Layout.of(objective.params)
    start = layout.flatten(objective.params)

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(objective(layout.unflatten(leaf), batch).reshape(()), leaf)
        return g

    with rng_state(), math_attention(), no_checkpointing(), preserve(objective.model):
        x, force = start, torch.zeros_like(start)
        for _ in range(steps):
            leaf = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(objective(layout.unflatten(leaf), batch).reshape(()), leaf, create_graph=True)
            (curved,) = torch.autograd.grad(g, leaf, grad_outputs=g.detach())
            force = force - lr / 2 * curved.detach()
            x = x - lr * g.detach()
        for _ in range(steps):
            x = x + lr * gradient(x)
    gap, expected = (x - start).double(), 2 * lr * force.double()
    distance = float(gap.norm())
    return Estimate(
        distance, residual=float((gap - expected).norm()) / max(float(expected.norm()), 1e-300), refs=("thermodynamic-irreversibility R3",)
    )


# ---------------------------------------------------------------------------------------------------------------- any rule

Move = Callable[[Tensor, Any], Tensor]


def reversal(step: Move, reverse: Move, state: Tensor, batch: Any, lr: float) -> Tensor:
    """(reverse(step(state)) - state) / (2 lr): the force of microscopic time reversal of any rule, -grad phi to leading order (R3).

    Args:
        step, reverse: (state (n,), batch) -> state; the state may hold more than the weights (velocities, accumulators).
        batch: the same one on the way back, else the noise of two batches is all that is seen.
        lr: eta.
    """
    return (reverse(step(state, batch), batch) - state) / (2 * lr)


def retrace_rule(step: Move, reverse: Move, state: Tensor, batches_: Sequence[Any]) -> Estimate:
    """Distance from the start after stepping through the batches and back in reverse order; 0 for a reversible rule (R3).

    ``residual`` is the distance relative to how far the run went.
    """
    x = state
    for batch in batches_:
        x = step(x, batch)
    far = float((x - state).norm())
    for batch in reversed(batches_):
        x = reverse(x, batch)
    gap = float((x - state).norm())
    return Estimate(gap, residual=gap / max(far, 1e-300), refs=("thermodynamic-irreversibility R3",))


class EntropyProduction:
    """Running entropy production D sigma = sum Lam g^2 of a training run, and with it the excess cost int phi dt (R4, R11).

    A hook on the optimiser's steps, in the limit of weak regularising noise and at leading order; it never changes the run. SGD (momentum
    aside) and, with the second moments as they stand, Adam, AdamW and RMSprop.

    Args:
        optimizer: after its first step for the adaptive rules' second moments; steps before are not counted.

    Attributes:
        steps: counted. total: sum over steps of g.Lam g, with Lam the rate of each parameter: D sigma summed over steps. last: of one step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps, self.total, self.last = optimizer, 0, 0.0, 0.0
        rates(optimizer)  # refuses rules it does not know
        self._hook = optimizer.register_step_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        rate = rates(self.optimizer)
        known = [(p.grad, r) for p, r in rate.items() if p.grad is not None]
        if not known:
            return
        value = sum(float((r * g.detach().double().square()).sum()) for g, r in known)
        if math.isfinite(value):
            self.steps, self.last, self.total = self.steps + 1, value, self.total + value

    @property
    def cost(self) -> Estimate:
        """int phi dt = sum eta phi = (1/4) sum eta g.Lam g for one learning rate: what irreversibility has cost so far, in loss x time."""
        lrs = {float(g["lr"]) for g in self.optimizer.param_groups}
        ref = ("thermodynamic-irreversibility R11",)
        if len(lrs) != 1:
            return Estimate(None, status="not_applicable", note="groups with different rates share no time", refs=ref)
        return Estimate(lrs.pop() * self.total / 4, refs=ref, assumptions=("constant learning rate", "leading order in the learning rate"))

    def __enter__(self) -> EntropyProduction:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting."""
        self._hook.remove()
