"""The entropic potential of a training rule: what one noisy step adds to the loss it descends.

One step theta' = theta - Lam grad l_B is, to next order, the flow on L + S with S = (1/4) E g_B.Lam g_B, (eta/4) E|g_B|^2 for plain SGD.
Its gradient, the entropic force, breaks every symmetry that is no isometry of Lam, is convex along each orbit, and balances gradient
second moments where it vanishes (neural-thermodynamics R1-R5). eta/4 acts as a temperature (R8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.guards import math_attention, no_checkpointing, preserve, rng_state
from parasym.core.results import Estimate, plain
from parasym.laws.charges import Charge
from parasym.laws.drift import ChargeMoments, charge_moments
from parasym.measure.gradients import GradientMoments, LossFn, Objective, batches, gradient_moments

Rates = float | Mapping[str, Tensor | float]

# --------------------------------------------------------------------------------------------------------------------- rates


def rates(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor | float]:
    """The metric Lam of an optimiser's step: parameter -> its learning rate, over the root of its second moment for adaptive rules.

    SGD: lr of the group (momentum is not part of it). Adam, AdamW, RMSprop: lr / (sqrt(v^) + eps) with the second moments as they stand
    (neural-thermodynamics R9: valid while they move slowly).

    Raises:
        InputError: another rule, or an adaptive one that has not stepped yet.
    """
    kind, out = type(optimizer).__name__, dict[Tensor, Tensor | float]()
    if kind not in ("SGD", "Adam", "AdamW", "RMSprop"):
        raise InputError(f"The step metric of {kind} is not known: SGD, Adam, AdamW and RMSprop are; give the rates by name instead.")
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        for p in group["params"]:
            if kind == "SGD":
                out[p] = lr
                continue
            state = optimizer.state.get(p, {})
            if p.grad is None and not state:
                continue  # never trained
            if not state:
                raise InputError(f"{kind} has no second moments before its first step: take a step, or give the rates by name.")
            if kind == "RMSprop":
                second = state["square_avg"].double()
            else:
                second = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            out[p] = lr / (second.sqrt() + group["eps"])
    return out


def _rate(lr: Rates, name: str) -> Tensor | float:
    if not isinstance(lr, Mapping):
        return lr
    if name not in lr:
        raise InputError(f"No learning rate is given for {name!r}.")
    return lr[name]


def _positive(lr: Rates) -> None:
    values = lr.values() if isinstance(lr, Mapping) else (lr,)
    if not all(bool((torch.as_tensor(v) > 0).all()) for v in values):
        raise InputError(f"Learning rates must be positive, got {lr if not isinstance(lr, Mapping) else 'some that are not'}.")


# ------------------------------------------------------------------------------------------------------------------- potential


@dataclass(frozen=True)
class Entropy:
    """The effective loss of a rule at a point.

    Attributes:
        loss: L. mean: (eta_e / 4) c |grad L|^2, c = (1 + mu) / (1 - mu). noise: (eta_e / 4) tr Sigma / S, with its standard error where one
            learning rate serves all.
        penalty: (gamma / 2)|theta|^2 of coupled weight decay. total: L + penalty + mean + noise.
        parts: parameter -> its share of mean + noise.
    """

    loss: float
    mean: float
    noise: Estimate
    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    penalty: float = 0.0
    assumptions: tuple[str, ...] = ("leading order in the learning rate",)
    refs: tuple[str, ...] = ("neural-thermodynamics R1", "neural-thermodynamics R9")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        keys = ("loss", "mean", "noise", "penalty", "total", "parts", "assumptions", "refs")
        return plain({k: getattr(self, k) for k in keys})  # type: ignore[no-any-return]


def entropy(moments: GradientMoments, lr: Rates, batch_size: int, momentum: float = 0.0, replacement: bool = True) -> Entropy:
    """S = (1 / 4) E g_B.Lam g_B from the moments of the gradient, split into the part of the mean and that of the noise.

    Args:
        moments: with squares for the shares of the parameters (`parasym.measure.gradients.gradient_moments`).
        lr: one rate for all, or name -> rate (a number or a tensor of the parameter's shape), which needs the squares.
        momentum: of SGD; eta_e = eta / (1 - mu), and the mean part is (1 + mu) / (1 - mu) times larger (R9).
        batch_size: S. replacement: how batches are drawn.

    Raises:
        InputError: rates or momentum out of range, or rates by name without squares.
    """
    _positive(lr)
    if not 0 <= momentum < 1:
        raise InputError(f"entropy needs 0 <= momentum < 1, got {momentum}.")
    grow, coherent, factor = 1 / (1 - momentum), (1 + momentum) / (1 - momentum), moments.factor(batch_size, replacement)
    shares: dict[str, tuple[float, float]] = {}
    if moments.square:
        for n, m in moments.mean.items():
            rate = _rate(lr, n)
            shares[n] = float((rate * m.square()).sum()), float((rate * (moments.square[n] - m.square())).sum())
    if isinstance(lr, Mapping):
        if not shares:
            raise InputError("Rates by name need the squares: gradient_moments(..., squares=True).")
        first, second, error = sum(a for a, _ in shares.values()), sum(b for _, b in shares.values()), None
    else:
        first, second = lr * moments.mean_square, lr * (float(moments.norms.mean()) - moments.mean_square)
        error = lr * grow / 4 * factor * float(moments.norms.std()) / math.sqrt(moments.count) if moments.count > 1 else None
    mean, noise = grow / 4 * coherent * first, grow / 4 * factor * second
    parts = {n: grow / 4 * (coherent * a + factor * b) for n, (a, b) in shares.items()}
    return Entropy(moments.loss, mean, Estimate(noise, stderr=error), moments.loss + mean + noise, parts)


def effective_loss(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    replacement: bool = True,
    limit: int | None = None,
) -> Entropy:
    """F = L + penalty + S of a user's model under their own optimiser, at the present weights.

    Args:
        model, loss_fn, loader: see `parasym.measure.gradients.Objective`. A batch norm in train mode is measured between batches.
        optimizer: of the model's parameters: its rates, momentum, coupled weight decay and second moments are used (`rates`).
        batch_size: S of training. limit: stop after this many samples.

    Raises:
        InputError: see `rates`, `gradient_moments`; groups of different momentum.
    """
    objective = Objective(model, loss_fn)
    named = _by_name(objective, rates(optimizer))
    momenta = {float(g.get("momentum", 0.0)) for g in optimizer.param_groups}
    if len(momenta) > 1:
        raise InputError(f"Groups of different momentum {sorted(momenta)} have no common effective loss.")
    params = {n: p for n, p in objective.params.items() if n in named}
    objective.params.clear()
    objective.params.update(params)
    unit: Any = "batch" if objective.coupled else "sample"
    moments = gradient_moments(objective, loader, unit=unit, limit=limit)
    found = entropy(moments, named, batch_size, momenta.pop() if type(optimizer).__name__ == "SGD" else 0.0, replacement)
    pull = 0.0
    if type(optimizer).__name__ == "SGD":
        pull = sum(
            float(g["weight_decay"]) / 2 * float(p.detach().double().square().sum()) for g in optimizer.param_groups for p in g["params"]
        )
    return Entropy(found.loss, found.mean, found.noise, found.total + pull, found.parts, pull)


def _by_name(objective: Objective, by_parameter: Mapping[Tensor, Tensor | float]) -> dict[str, Tensor | float]:
    live = dict(objective.model.named_parameters(remove_duplicate=False))
    return {n: by_parameter[live[n]] for n in objective.params if n in live and live[n] in by_parameter}


def entropic_force(objective: Objective, loader: Any, lr: Rates) -> dict[str, Tensor]:
    """-grad S, S = (1/4) E_B g_B.Lam g_B over the given batches: one double backward pass for each.

    Args:
        lr: one rate for all, or name -> rate, held fixed.

    Raises:
        InputError: the loss is not one number; see `parasym.measure.gradients.batches`.
    """
    _positive(lr)
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in objective.params.items()}
    count = 0
    for batch in batches(loader):
        count += 1
        with torch.enable_grad(), rng_state(), math_attention(), no_checkpointing(), preserve(objective.model):
            leaves = {n: p.detach().requires_grad_() for n, p in objective.params.items()}
            loss = objective(leaves, batch)
            if loss.numel() != 1:
                raise InputError(f"The loss must be one number, got shape {tuple(loss.shape)}: reduce it by a mean over samples.")
            first = torch.autograd.grad(
                loss.reshape(()), list(leaves.values()), create_graph=True, materialize_grads=True, allow_unused=True
            )
            square = torch.stack([(_rate(lr, n) * g.square()).sum() for n, g in zip(leaves, first, strict=True)]).sum()
            second = torch.autograd.grad(square, list(leaves.values()), materialize_grads=True, allow_unused=True)
        for n, g in zip(leaves, second, strict=True):
            total[n] -= g.detach().double() / 4
    return {n: g / count for n, g in total.items()}


def temperature(lr: float, momentum: float = 0.0) -> float:
    """eta_e / 4, which multiplies E|g_B|^2 as a temperature does an entropy (R8)."""
    _positive(lr)
    return lr / (1 - momentum) / 4


def dominance(objective: Objective, loader: Any, lr: Rates) -> Estimate:
    """|grad S| / |grad L| over the given batches: above 1 the entropic force, not the loss, decides where training goes (R8)."""
    force = entropic_force(objective, loader, lr)
    mean = gradient_moments(objective, loader, squares=False, unit="batch").mean
    top, bottom = (math.sqrt(sum(float(g.square().sum()) for g in part.values())) for part in (force, mean))
    if bottom == 0:
        return Estimate(None, status="not_applicable", note="the gradient of the loss vanishes: only the entropic force is left",
                        refs=("neural-thermodynamics R8",))  # fmt: skip
    return Estimate(top / bottom, refs=("neural-thermodynamics R8",))


# ---------------------------------------------------------------------------------------------------------------- along the orbits


def orbit_slope(found: ChargeMoments, factor: float, lr: float) -> Estimate:
    """dS / dlam = -(eta/2) tr(A E g_B g_B^T) along the orbit of each generator of a charge, of the charge's shape (R3, R10).

    Args:
        found: from `parasym.laws.drift.charge_moments`; factor: 1 / S (``GradientMoments.factor``).
    """
    _positive(lr)
    refs = ("neural-thermodynamics R3", "thermodynamic-irreversibility R10")
    return Estimate(-lr / 2 * found.of_batch(factor)[0], stderr=lr / 2 * factor * found.stderr, refs=refs)


@dataclass(frozen=True, eq=False)
class Equipartition:
    """How far a model is from where the entropic force along every symmetry vanishes (R4, R5).

    Attributes:
        layers: parameter -> eta E|g_B|^2 - 2 gamma |theta|^2, the same for all layers of a homogeneous network at equilibrium (R5b).
        charges: name of a charge -> (plus - minus) / (plus + minus) of eta E g_B^2 - 2 gamma theta^2 for each unit, or the relative
            Frobenius gap of the two matrices of a GL pair (R5a, c, d): 0 at equilibrium. For a scale there is only one side: +-1 (R5e).
    """

    layers: Mapping[str, float]
    charges: Mapping[str, Tensor]
    assumptions: tuple[str, ...] = ("one learning rate", "leading order in the learning rate")
    refs: tuple[str, ...] = ("neural-thermodynamics R4", "neural-thermodynamics R5")

    @property
    def worst(self) -> float:
        """Largest imbalance of any charge."""
        return max((float(v.abs().max()) for v in self.charges.values() if v.numel()), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return plain({k: getattr(self, k) for k in ("layers", "charges", "assumptions", "refs")})  # type: ignore[no-any-return]


def equipartition(
    objective: Objective,
    loader: Any,
    charges: Sequence[Charge],
    *,
    lr: float,
    batch_size: int,
    weight_decay: float = 0.0,
    replacement: bool = True,
) -> Equipartition:
    """Measure the balance of gradient second moments, layer by layer and for every charge that is not linear.

    With decay, (eta/2) tr(A E g_B g_B^T) = gamma theta.A theta at equilibrium, so 2 gamma / eta times the weights' own second moments
    is taken off each side.

    Args:
        objective, loader: see `gradient_moments`; batch norms in train mode are measured between batches.
        charges: from `parasym.laws.charges`. lr, weight_decay: of SGD (torch's decay: gamma). batch_size: S.
    """
    _positive(lr)
    usable = [c for c in charges if c.kind != "linear" and all(n in objective.params for n in c.parameters)]
    found, moments = charge_moments(objective, loader, usable)
    factor, pull = moments.factor(batch_size, replacement), 2 * weight_decay / lr
    squares = moments.square or gradient_moments(objective, loader, unit=moments.unit).square  # type: ignore[arg-type]
    layers = {}
    for n, m in moments.mean.items():
        energy = float((m.square() + factor * (squares[n] - m.square())).sum())
        layers[n] = lr * energy - 2 * weight_decay * float(objective.params[n].double().square().sum())
    gaps: dict[str, Tensor] = {}
    for c, f in zip(usable, found, strict=True):
        _, plus, minus = f.of_batch(factor)
        grow, shrink = c.split(objective.params, objective.params)
        net, size = plus - minus - pull * (grow - shrink), (plus, minus)
        if c.kind == "matrix":
            gap, scale = net.norm(dim=(-2, -1)), sum((s.norm(dim=(-2, -1)) for s in size), torch.zeros(()))
        else:
            gap, scale = net, plus + minus
        name = c.name if c.name not in gaps else f"{c.name}#{len(gaps)}"
        gaps[name] = torch.where(scale > 0, gap / scale.clamp_min(1e-300), torch.zeros_like(gap))
    return Equipartition(layers, gaps)
