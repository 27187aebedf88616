"""Exact step-by-step bookkeeping of charges while an optimiser runs.

For SGD with momentum, Nesterov momentum, dampening, coupled decay, clipping, schedules and a rate for each group, every charge obeys a
recursion whose only measured input is the quadratic form of the step itself, q(step): the term <A theta, g> is zero by symmetry
(_charges-and-laws section 2, neural-mechanics R9). The recursion is exact for any data, batch and step size, so the difference from the
measured charge is round-off where the symmetry holds, and shows at once where it does not. For any other rule the same
bookkeeping holds with a measured cross term, which is how much the rule breaks the conservation ("kinetic asymmetry").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.core.results import Status, plain
from parasym.laws.charges import Charge

_DECOUPLED = ("AdamW", "Muon", "Lion", "Adafactor")


@dataclass(frozen=True, eq=False)
class Account:
    """The ledger of one charge.

    Attributes:
        charge: whose.
        exact: the law was used (<A theta, g> taken as zero); False: the cross term was measured, and the sum is an identity.
        steps: (T,) numbers of the recorded steps; step 0 is the start.
        measured, predicted: (T, numbers) of the charge, and of the recursion run from the start on its own values.
        decay, source, cross: (T, numbers) change in each step from weight decay, from the step's own size eta^2 q(step)
            (discretisation and noise), and from the rest: inertia, or for ``exact=False`` the asymmetry -2 eta <A theta, step>.
        residual: largest |measured - predicted|.
        limit: what round-off explains: eps (32 + steps) sum |a| theta^2.
        status: ok; violated (the residual is beyond the limit); not_applicable (a rule without an exact law: see ``note``).
        metric: parameter -> factor that the charge carries where groups have different rates (inverse of the relative rate).
        note: why.
    """

    charge: Charge
    exact: bool
    steps: Tensor
    measured: Tensor
    predicted: Tensor
    decay: Tensor
    source: Tensor
    cross: Tensor
    residual: float
    limit: float
    status: Status
    metric: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "conserved" (no change beyond round-off), "predicted", "broken", or "measured" where there is no law."""
        if self.status == "violated":
            return "broken"
        if not self.exact:
            return "measured"
        return "conserved" if float((self.measured - self.measured[:1]).abs().max()) <= self.limit else "predicted"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data = {k: getattr(self, k) for k in ("exact", "residual", "limit", "status", "metric", "note", "verdict")}
        curves = {k: getattr(self, k) for k in ("steps", "measured", "predicted", "decay", "source", "cross")}
        return {"charge": self.charge.to_dict(), **plain(data), **plain(curves), "refs": ["neural-mechanics R9"]}


@dataclass
class _Row:
    """What one charge carries from step to step."""

    charge: Charge
    names: tuple[str, ...]
    metric: dict[str, float]
    value: Tensor
    momentum: Tensor
    size: float
    exact: bool = True
    note: str = ""
    history: list[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)


class Ledger:
    """Records charges and their predicted values at every step of an optimiser; never changes the run.

    Use as a context around training, or call `close`. Costs one copy of the parameters that charges are made of, and about three
    passes over them at each step.

    Args:
        optimizer: any ``torch.optim.Optimizer``; `torch.optim.SGD` has the exact law, the rest the measured one.
        charges: from `parasym.laws.charges`.
        model: the module the names refer to, or name -> parameter.
        every: keep each n-th step (the recursion runs at all of them).

    Raises:
        InputError: a charge names a parameter the model does not have.

    Example:
        >>> with Ledger(optimizer, charges, model) as ledger:      # doctest: +SKIP
        ...     train(model, optimizer)
        >>> ledger.accounts()[0].verdict                           # doctest: +SKIP
        'predicted'
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, charges: Sequence[Charge], model: nn.Module | Mapping[str, Tensor], every: int = 1
    ) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1, got {every}.")
        self.optimizer, self.every = optimizer, every
        self.params = _parameters(model)
        wanted = dict.fromkeys(n for c in charges for n in c.parameters)
        missing = [n for n in wanted if n not in self.params]
        if missing:
            raise InputError(f"The model has no parameter {missing[0]!r} that a charge is made of: find the charges on this model.")
        self._names = tuple(wanted)
        self._group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self._sgd = type(optimizer) is torch.optim.SGD
        self.step = 0
        self.stopped = ""
        self._before: dict[str, Tensor] = {}
        self._gradient: dict[str, Tensor | None] = {}
        self._fresh: dict[str, bool] = {}
        self._evaluations = 0
        self._rows = [self._open(c) for c in charges]
        self._hooks = [optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)]

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop recording."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # -- opening ---------------------------------------------------------------------------------------------------------------

    def _open(self, charge: Charge) -> _Row:
        names = charge.parameters
        outside = [n for n in names if id(self.params[n]) not in self._group or not self.params[n].requires_grad]
        metric, note = dict.fromkeys(names, 1.0), ""
        if outside:
            note = f"{outside[0]} is frozen or not in the optimiser: the orbit leaves the trained parameters"
        elif not self._sgd:
            note = f"{type(self.optimizer).__name__} has no exact law: the cross term is measured"
        else:
            rates = {n: float(self._group[id(self.params[n])]["lr"]) for n in names}
            if min(rates.values()) <= 0:
                note = "a learning rate is zero: that part of the orbit is frozen"
            else:
                first = rates[names[0]]
                metric = {n: first / r for n, r in rates.items()}
        point = self._read(names)
        value, momentum = charge(point, metric), torch.zeros(charge.shape, dtype=torch.float64)
        buffers = self._buffers(names)
        if buffers:
            momentum = charge.form(buffers, buffers) if charge.kind == "linear" else charge.form(point, buffers)
        row = _Row(charge, names, metric, value.cpu(), momentum.cpu(), 0.0, exact=not note, note=note)
        zero = torch.zeros_like(row.value)
        row.history.append((0, row.value, row.value, zero, zero, zero))
        row.size = size_of(charge, point, metric)
        return row

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {n: self.params[n].detach().to(torch.float64, copy=True) for n in names}

    def _buffers(self, names: Sequence[str]) -> dict[str, Tensor]:
        out = {}
        for n in names:
            buffer = self.optimizer.state.get(self.params[n], {}).get("momentum_buffer") if self._sgd else None
            if buffer is not None:
                out[n] = buffer.detach().to(torch.float64)
        return out

    # -- the step ----------------------------------------------------------------------------------------------------------------

    def _pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.stopped:
            return None
        self._before = self._read(self._names)
        self._fresh = {n: self.optimizer.state.get(self.params[n], {}).get("momentum_buffer") is None for n in self._names}
        self._evaluations = 0
        closure = next((a for a in (*args, *kwargs.values()) if callable(a) and not isinstance(a, torch.optim.Optimizer)), None)
        if closure is None:
            self._snapshot()
            return None

        def counted() -> Any:  # the gradient of a closure exists only after its call, inside the step
            loss = closure()
            self._snapshot()
            return loss

        return tuple(counted if a is closure else a for a in args), {k: counted if v is closure else v for k, v in kwargs.items()}

    def _snapshot(self) -> None:
        """The gradient as the optimiser is about to use it, after clipping; copied, because Nesterov's foreach form writes into it."""
        self._evaluations += 1
        self._gradient = {}
        for n in self._names:
            g = self.params[n].grad
            self._gradient[n] = None if g is None else (g.to_dense() if g.is_sparse else g).detach().to(torch.float64, copy=True)

    def _post(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.stopped or not self._before:
            return
        self.step += 1
        after = self._read(self._names)
        bad = [n for n in self._names if not bool(torch.isfinite(after[n]).all())]
        if bad:
            self.stopped = f"step {self.step}: {bad[0]} is not finite after it; the ledger ends at step {self.step - 1}"
            return
        for row in self._rows:
            self._advance(row, after)

    def _advance(self, row: _Row, after: Mapping[str, Tensor]) -> None:
        charge, names = row.charge, row.names
        new = {n: after[n] for n in names}
        old = {n: self._before[n] for n in names}
        if row.exact:
            row.note = self._obstacle(row)
            row.exact = not row.note
        decay, source, cross = self._law(row, old) if row.exact else self._identity(row, old, new)
        row.value = row.value + decay + source + cross
        row.size = max(row.size, size_of(charge, new, row.metric))
        if self.step % self.every == 0:
            row.history.append((self.step, charge(new, row.metric).cpu(), row.value, decay, source, cross))

    def _obstacle(self, row: _Row) -> str:
        """Why the law cannot be used at this step; empty where it can."""
        groups = [self._group[id(self.params[n])] for n in row.names]
        first = groups[0]
        if self._evaluations != 1:
            return f"step {self.step}: the closure was evaluated {self._evaluations} times"
        if any(g[k] != first[k] for g in groups for k in ("momentum", "dampening", "nesterov", "maximize")):
            return f"step {self.step}: its parameters have different momentum settings"
        rates = [float(g["lr"]) * row.metric[n] for g, n in zip(groups, row.names, strict=True)]
        if max(rates) - min(rates) > 1e-12 * abs(max(rates)):
            return f"step {self.step}: the ratio of the learning rates of its parameters changed"
        decays = [float(g["lr"]) * float(g["weight_decay"]) for g in groups]
        if max(decays) - min(decays) > 1e-12 * max(decays):
            return f"step {self.step}: its parameters decay at different rates"
        if len({self._gradient[n] is None for n in row.names}) > 1 or len({self._fresh[n] for n in row.names}) > 1:
            return f"step {self.step}: some of its parameters have no gradient"
        return ""

    def _law(self, row: _Row, old: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Decay, source and inertia of one step of SGD, from the predicted state of the recursion."""
        charge, group = row.charge, self._group[id(self.params[row.names[0]])]
        zero = torch.zeros_like(row.value)
        if self._gradient[row.names[0]] is None:
            return zero, zero, zero
        eta, mu = float(group["lr"]) * row.metric[row.names[0]], float(group["momentum"])
        gamma = float(group["weight_decay"]) / row.metric[row.names[0]]
        sign = -1.0 if group["maximize"] else 1.0
        d = {}
        for n in row.names:
            gradient = self._gradient[n]
            assert gradient is not None
            d[n] = sign * gradient + float(self._group[id(self.params[n])]["weight_decay"]) * old[n]
        inverse = {n: 1 / m for n, m in row.metric.items()}
        if mu == 0:
            velocity, step, keep = d, d, 1.0
        else:
            keep = 1.0 if self._fresh[row.names[0]] else 1 - float(group["dampening"])
            velocity = self._buffers(row.names)
            step = {n: d[n] + mu * velocity[n] for n in row.names} if group["nesterov"] else velocity
        middle = mu * row.momentum + keep * gamma * row.value
        if charge.kind == "linear":
            half, source, momentum = 1.0, zero, middle
        else:
            half, source = 2.0, eta**2 * charge.form(step, step, inverse).cpu()
            momentum = middle - eta * charge.form(step, velocity, inverse).cpu()
        inertia = mu * row.momentum
        pull = keep * gamma * row.value
        if mu and group["nesterov"]:
            pull, inertia = gamma * row.value + mu * pull, mu * inertia
        row.momentum = momentum
        return -half * eta * pull, source, -half * eta * inertia

    def _identity(self, row: _Row, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """theta' = dec theta - w with the decoupled decay known: dec^2 - 1, q(w), and the cross term -2 dec q(theta, w), measured."""
        dec, move = {}, {}
        for n in row.names:
            group = self._group.get(id(self.params[n]))
            known = group is not None and decoupled(self.optimizer, group)
            dec[n] = 1 - float(group["lr"]) * float(group["weight_decay"]) if known and group is not None else 1.0
            move[n] = dec[n] * old[n] - new[n]
        charge, metric = row.charge, row.metric
        shrink = {n: metric[n] * (dec[n] if charge.kind == "linear" else dec[n] ** 2) - metric[n] for n in row.names}
        decay = charge(old, shrink).cpu()
        if charge.kind == "linear":
            return decay, torch.zeros_like(decay), -charge.form(move, move, metric).cpu()
        mixed = {n: -2 * dec[n] * metric[n] for n in row.names}
        return decay, charge.form(move, move, metric).cpu(), charge.form(old, move, mixed).cpu()

    # -- the result --------------------------------------------------------------------------------------------------------------

    def accounts(self) -> list[Account]:
        """One `Account` for each charge, up to the present step."""
        out = []
        for row in self._rows:
            steps = torch.tensor([h[0] for h in row.history])
            columns = [torch.stack([row.charge.flat(v) for v in column]) for column in list(zip(*row.history, strict=True))[1:]]
            residual = float((columns[0] - columns[1]).abs().max())
            limit = self._epsilon(row.names) * (32 + self.step) * row.size
            status: Status = "violated" if residual > limit and row.exact else "ok" if row.exact else "not_applicable"
            note = "; ".join(t for t in (row.note, self.stopped) if t)
            metric = row.metric if len(set(row.metric.values())) > 1 else {}
            measured, predicted, decay, source, cross = columns
            out.append(
                Account(row.charge, row.exact, steps, measured, predicted, decay, source, cross, residual, limit, status, metric, note)
            )
        return out

    def _epsilon(self, names: Sequence[str]) -> float:
        return max(torch.finfo(self.params[n].dtype).eps for n in names)

    def table(self) -> dict[str, list[Any]]:
        """Columns step, charge, measured, predicted, decay, source, cross, one row for each number and recorded step."""
        out: dict[str, list[Any]] = {k: [] for k in ("step", "charge", "measured", "predicted", "decay", "source", "cross")}
        for account in self.accounts():
            for j, label in enumerate(account.charge.labels()):
                out["step"] += account.steps.tolist()
                out["charge"] += [label] * len(account.steps)
                for key in ("measured", "predicted", "decay", "source", "cross"):
                    out[key] += getattr(account, key)[:, j].tolist()
        return out


def decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group's weight decay multiplies the weights instead of adding to the gradient."""
    return type(optimizer).__name__ in _DECOUPLED or bool(group.get("decoupled_weight_decay"))


def _parameters(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names -> the live parameters (not detached copies)."""
    if isinstance(model, Mapping):
        return dict(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"Give the model, or name -> parameter, got {type(model).__name__}.")
    f = functional(model)
    live = dict(f.model.named_parameters(remove_duplicate=False))
    return {n: live[n] for n in f.params}


def size_of(charge: Charge, point: Mapping[str, Tensor], metric: Mapping[str, float]) -> float:
    """sum |a| theta^2 of the largest number: the scale of round-off."""
    if charge.kind == "linear":
        return max(float(charge.form({n: p.abs() for n, p in point.items()}, point, metric).abs().max()), 1e-300)
    plus, minus = charge.split(point, point)
    return max(float((plus.abs() + minus.abs()).max()) * max(metric.values()), 1e-300)
