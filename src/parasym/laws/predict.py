"""One call: the charges of a model, the curves a law predicts for a training run, and what the run does."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.guards import rng_state
from parasym.core.results import Status, plain
from parasym.laws.charges import Charge, charges
from parasym.laws.drift import MeanLedger, charge_moments
from parasym.laws.flow import modified_flow
from parasym.laws.ledger import Account, Ledger
from parasym.measure.gradients import LossFn, Objective, batch_size, batches

LawLevel = Literal["ledger", "modified_flow", "statistical", "frozen"]
LEVELS: tuple[LawLevel, ...] = ("ledger", "modified_flow", "statistical", "frozen")


@dataclass(frozen=True, eq=False)
class Curve:
    """One charge along a run.

    Attributes:
        charge: whose. steps: (T,). measured: (T, numbers).
        predicted: level -> (T, numbers).
        error: level -> root-mean-square error over the numbers at the end, relative to that of the change; for the ledger the largest
            absolute residual.
        verdict: of the exact ledger: conserved, predicted, broken, or measured.
        status: ok; violated where the ledger's residual exceeds round-off; not_applicable where there is no exact law.
        notes: level -> why it is missing.
    """

    charge: Charge
    steps: Tensor
    measured: Tensor
    predicted: Mapping[LawLevel, Tensor]
    error: Mapping[LawLevel, float]
    verdict: str
    status: Status
    account: Account
    notes: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        keys = ("steps", "measured", "predicted", "error", "verdict", "status", "notes")
        return {"charge": self.charge.to_dict(), **plain({k: getattr(self, k) for k in keys})}


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predicted and measured charge curves of one run, with the losses of its batches.

    Attributes:
        curves: one for each charge. losses: (steps,). without: symmetries that give no charge, with the reason.
        assumptions: of the statistical levels.
    """

    curves: tuple[Curve, ...]
    losses: Tensor
    without: tuple[tuple[str, str], ...] = ()
    assumptions: tuple[str, ...] = ()
    refs: tuple[str, ...] = ("neural-mechanics R7", "neural-mechanics R9", "noise-equilibrium R1")

    def __str__(self) -> str:
        lines = [f"{'charge':52} {'numbers':>7} {'verdict':>10} " + " ".join(f"{level:>13}" for level in LEVELS)]
        for c in self.curves:
            errors = " ".join(f"{c.error[level]:13.1e}" if level in c.error else f"{'-':>13}" for level in LEVELS)
            where = f"{c.charge.name}: {c.charge.parameters[0]}"
            lines.append(f"{where[:52]:52} {c.charge.numbers:7d} {c.verdict:>10} {errors}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "curves": [c.to_dict() for c in self.curves], "losses": self.losses.tolist(), "without": [list(w) for w in self.without],
            "assumptions": list(self.assumptions), "refs": list(self.refs),
        }  # fmt: skip


def predict(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    charges_of: Sequence[Charge] | None = None,
    levels: Sequence[LawLevel] = LEVELS,
    refresh: int = 30,
    replacement: bool | None = None,
    moments: Any = None,
    head: Any = None,
) -> Prediction:
    """Train a copy of a model and put each charge's predicted curves beside the measured one; the model itself does not change.

    Levels, from what needs the run to what does not: "ledger", the exact recursion fed with the size of each step; "modified_flow", the
    closed form in continuous time fed with the same; "statistical", the mean drift from per-sample gradients, measured anew every
    ``refresh`` steps; "frozen", the same from the start alone.

    Args:
        model, loss_fn: see `parasym.measure.gradients.Objective`.
        loader: batches to train on, repeated as often as needed.
        optimizer: of the model's parameters; copied together with it, state included.
        steps: how many.
        charges_of: charges to follow; found from the first batch if not given.
        levels: which to compute.
        refresh: steps between two measurements of the noise.
        replacement: whether batches are drawn with replacement; None: without, for a DataLoader.
        moments: loader for the noise; the training loader if not given.
        head: function of the output for charges of the loss, see `parasym.laws.charges`.

    Raises:
        InputError: bad levels or steps, an optimiser of other parameters, or see `Objective`.
    """
    _check(levels, steps, refresh)
    with rng_state():
        clone, rule = _copied(model, optimizer)
        _check_owner(clone, rule)
        stream = _endless(loader)
        first = next(stream)
        found: Sequence[Charge] = charges_of if charges_of is not None else _find(clone, loss_fn, first, head)
        without = getattr(found, "without", ())
        size = batch_size(first)
        drawn = replacement if replacement is not None else not isinstance(loader, torch.utils.data.DataLoader)
        means = _Means(found, rule, size, drawn, [level for level in levels if level in ("statistical", "frozen")])
        losses = []
        with Ledger(rule, found, clone) as ledger:
            batch = first
            for k in range(steps):
                objective = Objective(clone, loss_fn)
                if means.levels and (k % refresh == 0 or (k < refresh and k & (k - 1) == 0)):  # early on at powers of two
                    means.measure(objective, loader if moments is None else moments, fresh=k == 0)
                losses.append(_train_step(clone, loss_fn, rule, batch))
                means.advance()
                if ledger.stopped:
                    break
                batch = next(stream)
        curves = tuple(_curve(a, i, levels, rule, means) for i, a in enumerate(ledger.accounts()))
    return Prediction(curves, torch.tensor(losses, dtype=torch.float64), tuple(without), means.assumptions)


def _copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The two together; a torch optimiser leaves attributes of its own behind when it is copied (L-BFGS its parameters)."""
    memo: dict[int, Any] = {}
    clone, rule = copy.deepcopy((model, optimizer), memo)
    for name, value in vars(optimizer).items():
        if name not in vars(rule):
            setattr(rule, name, copy.deepcopy(value, memo))
    return clone, rule


def _check(levels: Sequence[str], steps: int, refresh: int) -> None:
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        raise InputError(f"Unknown level {unknown[0]!r}: {', '.join(LEVELS)}.")
    if steps < 1 or refresh < 1:
        raise InputError(f"steps and refresh must be positive, got {steps} and {refresh}.")


def _check_owner(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for g in optimizer.param_groups for p in g["params"]):
        raise InputError("The optimiser holds none of the model's parameters: build it from model.parameters().")


def _find(model: nn.Module, loss_fn: LossFn | None, batch: Any, head: Any) -> Sequence[Charge]:
    inputs = batch[0] if loss_fn is not None else batch
    if isinstance(inputs, Mapping):
        return charges(model, (), dict(inputs), head=head)
    return charges(model, inputs if isinstance(inputs, tuple) else (inputs,), head=head)


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from batches(loader)


def _train_step(model: nn.Module, loss_fn: LossFn | None, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """One ordinary training step on the live model; rules that cannot step without a closure (L-BFGS) get one."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        if loss_fn is None:
            out = model(**batch) if isinstance(batch, Mapping) else model(*batch)
            loss = out if isinstance(out, Tensor) else out["loss"] if isinstance(out, Mapping) else out.loss
        else:
            x, target = batch
            out = model(**x) if isinstance(x, Mapping) else model(*x) if isinstance(x, tuple) else model(x)
            loss = loss_fn(out, target)
        if loss.numel() != 1:
            raise InputError(f"The loss must be one number, got shape {tuple(loss.shape)}: reduce it by a mean over samples.")
        loss.backward()
        return loss

    wanted = inspect.signature(type(optimizer).step).parameters.get("closure")
    if wanted is not None and wanted.default is inspect.Parameter.empty:
        return float(torch.as_tensor(optimizer.step(closure)).detach())  # type: ignore[arg-type]
    loss = closure()
    optimizer.step()
    return float(loss.detach())


class _Means:
    """Mean-field curves of all charges, advanced step by step."""

    def __init__(
        self, found: Sequence[Charge], rule: torch.optim.Optimizer, size: int, replacement: bool, levels: Sequence[LawLevel]
    ) -> None:
        group = rule.param_groups[0]
        keys = ("lr", "momentum", "weight_decay")
        same = all(g.get(k) == group.get(k) for g in rule.param_groups for k in keys)
        usable = type(rule) is torch.optim.SGD and same and not rule.state
        self.note = "" if usable else "the statistical law needs SGD from rest with one rate, momentum and decay for all"
        self.levels = tuple(levels) if usable else ()
        self.found, self.rule, self.size, self.replacement = found, rule, size, replacement
        self.values: dict[LawLevel, list[list[Tensor]]] = {level: [[] for _ in found] for level in self.levels}
        self.moments: dict[LawLevel, Any] = {}
        self.means: dict[LawLevel, list[MeanLedger]] = {}
        how = "with" if replacement else "without"
        self.assumptions = (f"batches of {size} drawn {how} replacement",) if self.levels else ()

    def measure(self, objective: Objective, loader: Any, fresh: bool) -> None:
        """Take the moments at the present point; the frozen level keeps the first."""
        if not fresh and "statistical" not in self.levels:
            return
        found, gradient = charge_moments(objective, loader, self.found)
        factor = gradient.factor(self.size, self.replacement)
        for level in self.levels:
            if fresh or level == "statistical":
                self.moments[level] = found, factor
            if fresh:
                self.means[level] = [MeanLedger.at(f.value) for f in found]
                for i, f in enumerate(found):
                    self.values[level][i].append(f.value)

    def advance(self) -> None:
        g = self.rule.param_groups[0]
        for level in self.levels:
            found, factor = self.moments[level]
            for i, (f, mean) in enumerate(zip(found, self.means[level], strict=True)):
                now = mean.advance(f, factor, g["lr"], g["momentum"], g["weight_decay"], g["dampening"], g["nesterov"])
                self.values[level][i].append(now)


def _curve(account: Account, index: int, levels: Sequence[LawLevel], rule: torch.optim.Optimizer, means: _Means) -> Curve:
    predicted: dict[LawLevel, Tensor] = {}
    notes: dict[str, str] = {"ledger": account.note} if account.note else {}
    if "ledger" in levels:
        predicted["ledger"] = account.predicted
    if "modified_flow" in levels:
        group = rule.param_groups[0]
        if account.exact and len(rule.param_groups) == 1 and not group["nesterov"]:
            predicted["modified_flow"] = modified_flow(
                account, group["lr"], group["momentum"], group["dampening"] if group["momentum"] else 0.0, group["weight_decay"]
            )
        else:
            notes["modified_flow"] = "the closed form is for SGD or heavy-ball with one group and constant rates"
    for level in means.levels:
        rows = means.values[level][index][: len(account.steps)]
        predicted[level] = torch.stack([account.charge.flat(v) for v in rows])
    if means.note and {"statistical", "frozen"} & set(levels):
        notes["statistical"] = means.note
    measured = account.measured
    moved = float((measured[-1] - measured[0]).square().mean().sqrt())
    error = {level: float((p[-1] - measured[-1]).square().mean().sqrt()) / max(moved, account.limit) for level, p in predicted.items()}
    if "ledger" in predicted:
        error["ledger"] = account.residual
    return Curve(account.charge, account.steps, measured, predicted, error, account.verdict, account.status, account, notes)
