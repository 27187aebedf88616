"""Charges under adaptive rules: what holds exactly, and what does not.

A preconditioner that differs within a symmetric block breaks <A theta, P g> = 0, so the charge theta.A theta of SGD has no law under
Adam. But <A theta, g> = 0 still holds, and with it the charge weighted by the inverse preconditioner, Q_P = sum a theta^2 / P, has
one: at fixed P the step changes it by its own size alone, as in heavy-ball SGD, and the rest is the measured change of the metric,
sum a theta^2 d(1 / P). Where P moves slowly that rest vanishes, and the noise equilibrium is sum a sigma = 0, an l1 balance of the
gradient's root mean squares in place of SGD's sum a sigma^2 = 0 (_charges-and-laws section 5, neural-thermodynamics R9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Status, plain
from parasym.laws.charges import Charge
from parasym.laws.ledger import _parameters

_RULES = ("Adam", "AdamW", "RMSprop")


@dataclass(frozen=True, eq=False)
class AdaptiveAccount:
    """The ledger of one weighted charge Q_P = sum a theta^2 / P.

    Attributes:
        charge: whose. steps: (T,).
        measured, predicted: (T, units) of Q_P, the latter from the recursion run on its own values.
        decay, source, inertia, metric: (T, units) change in each step: from weight decay, from the step's size eta^2 sum a P m^2, from the
            momentum, and from the change of 1 / P at fixed weights (measured).
        residual: largest |measured - predicted|. limit: what round-off explains. status: ok or violated.
    """

    charge: Charge
    steps: Tensor
    measured: Tensor
    predicted: Tensor
    decay: Tensor
    source: Tensor
    inertia: Tensor
    metric: Tensor
    residual: float
    limit: float
    status: Status
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        keys = ("steps", "measured", "predicted", "decay", "source", "inertia", "metric", "residual", "limit", "status", "note")
        return {"charge": self.charge.to_dict(), **plain({k: getattr(self, k) for k in keys}), "refs": ["neural-thermodynamics R9"]}


@dataclass
class _State:
    charge: Charge
    value: Tensor
    momentum: Tensor
    size: float = 1e-300
    history: list[tuple[Tensor, ...]] = field(default_factory=list)


class AdaptiveLedger:
    """Exact books of Q_P under torch's Adam, AdamW and RMSprop; a context around training, it never changes the run.

    Args:
        optimizer: fresh (before its first step), without amsgrad, maximize, centred or momentum RMSprop.
        charges: quadratic ones.
        model: the module the names refer to, or name -> parameter.

    Raises:
        InputError: another rule or option, a charge that is not quadratic, a frozen or missing parameter, or an optimiser that has run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, charges: Sequence[Charge], model: nn.Module | Mapping[str, Tensor]) -> None:
        self.rule = type(optimizer).__name__
        if self.rule not in _RULES or type(optimizer).__module__.split(".")[0] != "torch":
            raise InputError(
                f"{self.rule} has no exact adaptive ledger: {', '.join(_RULES)} of torch have; use Ledger for the measured one."
            )
        if any(g.get(k) for g in optimizer.param_groups for k in ("amsgrad", "maximize", "centered", "momentum")):
            raise InputError("The adaptive ledger takes no amsgrad, maximize, centered or momentum option: use Ledger.")
        if optimizer.state:
            raise InputError("The optimiser has already run: open the ledger before its first step.")
        if any(c.kind != "quadratic" for c in charges):
            raise InputError("A diagonal preconditioner keeps no matrix charge, and linear ones obey Ledger's measured balance only.")
        self.optimizer, self.params = optimizer, _parameters(model)
        self._group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        names = dict.fromkeys(n for c in charges for n in c.parameters)
        for n in names:
            if n not in self.params or not self.params[n].requires_grad or id(self.params[n]) not in self._group:
                raise InputError(f"{n} is missing, frozen or not in the optimiser: its charge has no law.")
        self._names, self.step = tuple(names), 0
        self._before: dict[str, Tensor] = {}
        zero = torch.zeros
        self._states = [_State(c, zero(c.shape, dtype=torch.float64), zero(c.shape, dtype=torch.float64)) for c in charges]
        for s in self._states:
            s.history.append((s.value,) * 6)
        self._hooks = [optimizer.register_step_pre_hook(self._pre), optimizer.register_step_post_hook(self._post)]

    def __enter__(self) -> AdaptiveLedger:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _pre(self, *_: Any) -> None:
        self._before = {n: self.params[n].detach().to(torch.float64, copy=True) for n in self._names}

    def _post(self, *_: Any) -> None:
        if any(self.params[n].grad is None for n in self._names):
            raise InputError("A parameter of a charge has no gradient: its symmetry does not act on what is trained.")
        self.step += 1
        parts = {n: self._parts(n) for n in self._names}
        for s in self._states:
            self._advance(s, parts)

    def _parts(self, name: str) -> tuple[Tensor, Tensor, Mapping[str, float]]:
        """(1 / P, m, constants) of one parameter after the step: theta' = dec theta - eta m P, m = keep m + (1 - keep) d."""
        p = self.params[name]
        state, g = self.optimizer.state[p], self._group[id(p)]
        eta, eps, decay = float(g["lr"]), float(g["eps"]), float(g["weight_decay"])
        if self.rule == "RMSprop":
            gradient = p.grad
            assert gradient is not None
            inverse = state["square_avg"].double().sqrt() + eps
            m = gradient.detach().double() + decay * self._before[name]
            return inverse, m, {"eta": eta, "keep": 0.0, "gamma": decay, "dec": 1.0}
        keep, slow = (float(b) for b in g["betas"])
        t = float(state["step"])
        inverse = (state["exp_avg_sq"].double() / (1 - slow**t)).sqrt() + eps
        constants = {"eta": eta / (1 - keep**t), "keep": keep, "gamma": decay, "dec": 1.0}
        if self.rule == "AdamW" or g.get("decoupled_weight_decay"):
            constants |= {"gamma": 0.0, "dec": 1 - eta * decay}
        return inverse, state["exp_avg"].double(), constants

    def _advance(self, s: _State, parts: Mapping[str, tuple[Tensor, Tensor, Mapping[str, float]]]) -> None:
        c, names = s.charge, s.charge.parameters
        constants = [parts[n][2] for n in names]
        if any(k != constants[0] for k in constants):
            raise InputError(f"The parameters of {c.name} have different rates or decays: give their group one setting.")
        k = constants[0]
        old = {n: self._before[n] for n in names}
        new = {n: self.params[n].detach().double() for n in names}
        m = {n: parts[n][1] for n in names}

        def weighted(x: Mapping[str, Tensor], by: int = 1) -> Tensor:
            """sum a x^2 / P, or times P."""
            return c.form(x, {n: v * parts[n][0] ** by for n, v in x.items()}).cpu()

        now = weighted(old)
        metric = now - s.history[-1][0] if self.step > 1 else now
        start = s.value + metric
        middle = k["keep"] * s.momentum + (1 - k["keep"]) * k["gamma"] * c(old).cpu()
        squares = c.form(m, {n: v / parts[n][0] for n, v in m.items()}).cpu()
        decay = (k["dec"] ** 2 - 1) * start - 2 * k["eta"] * k["dec"] * (1 - k["keep"]) * k["gamma"] * c(old).cpu()
        inertia = -2 * k["eta"] * k["dec"] * k["keep"] * s.momentum
        source = k["eta"] ** 2 * squares
        s.value = start + decay + inertia + source
        s.momentum = k["dec"] * middle - k["eta"] * squares
        plus, minus = (t.abs() for t in c.split(new, {n: v * parts[n][0] for n, v in new.items()}))
        s.size = max(s.size, float((plus + minus).max()))
        s.history.append((weighted(new), s.value, decay, source, inertia, metric))

    def accounts(self) -> list[AdaptiveAccount]:
        """One for each charge, up to the present step."""
        out = []
        for s in self._states:
            columns = [torch.stack(list(column)) for column in zip(*s.history, strict=True)]
            measured, predicted, decay, source, inertia, metric = columns
            residual = float((measured - predicted).abs().max())
            eps = max(torch.finfo(self.params[n].dtype).eps for n in s.charge.parameters)
            limit = eps * (32 + self.step) * s.size * 4
            status: Status = "ok" if residual <= limit else "violated"
            steps = torch.arange(len(measured))
            out.append(AdaptiveAccount(s.charge, steps, measured, predicted, decay, source, inertia, metric, residual, limit, status))
        return out
