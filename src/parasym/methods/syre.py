"""syre: weight decay towards a small fixed random point, which removes reflection symmetries and the collapse they cause.

The regulariser is gamma sum D (theta - theta0)^2 (torch's ``weight_decay`` is 2 gamma), theta0 drawn once and frozen, D = 1 or a
random diagonal metric close to 1. Three ways to train with it: a penalty in the loss, a shift of the coordinates (any optimiser's own
decay then pulls to theta0), or a hook on the optimiser that turns its decay to zero into decay to theta0.

Source: syre R3-R6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.methods.decay import Decay, decay_of, decay_rate
from parasym.methods.reparametrize import Lift, Reparametrization, select

Metric = Literal["identity", "random"]
_LOW = (torch.bfloat16, torch.float16)
_KEYS = ("syre_seed", "syre_step", "syre_owed", "syre_speed")
_SLACK, _STEPS = 5e-3, 50  # share of theta0 that is owed at most, and for how many steps


class Syre:
    """The point theta0 that weights decay to, and the metric D; made by `syre`.

    Attributes:
        parameters: name -> parameter; tied weights once.
        sigma0: name -> standard deviation of theta0 about its centre, in units of the weights.
        centre: name -> 1 for the gains of norms, 0 for everything else.
        seed: theta0 and D follow from it (on one platform; the state dict carries the numbers themselves).
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        sigma0: Mapping[str, float],
        centre: Mapping[str, float],
        spread: float | None,
        seed: int,
        stored: bool,
    ) -> None:
        self.model, self.parameters, self.sigma0, self.centre = model, dict(parameters), dict(sigma0), dict(centre)
        self.spread, self.seed, self.stored = spread, seed, stored
        self._points: dict[str, Tensor] = {}
        self._excess: dict[str, Tensor] = {}
        if stored:
            for name in self.parameters:
                self._points[name] = self._draw(name, 0)
                if spread:
                    self._excess[name] = self._draw(name, 1)

    @property
    def metric(self) -> Metric:
        """ "random" where D is drawn, "identity" where it is 1."""
        return "random" if self.spread else "identity"

    def theta0(self, name: str) -> Tensor:
        """The point one parameter decays to, shaped, placed and sharded like it."""
        return self._here(name, self._points) if self.stored else self._draw(name, 0)

    def excess(self, name: str) -> Tensor | None:
        """D - 1 of one parameter, in float32 or wider (1 + xi has too few distinct values near 1); None for D = 1."""
        if not self.spread:
            return None
        return self._here(name, self._excess) if self.stored else self._draw(name, 1)

    def penalty(self) -> Tensor:
        """sum D (theta - theta0)^2 over all parameters, a scalar; the loss gets gamma times it, and the optimiser no decay."""
        total = None
        for name, p in self.parameters.items():
            d = p - self.theta0(name)
            xi = self.excess(name)
            part = d.square().sum() if xi is None else (d * (d + d * xi)).sum()
            total = part if total is None else total + part
        assert total is not None
        return total

    def shift(self) -> Reparametrization:
        """theta = theta0 + phi / sqrt(D), phi trained: an optimiser's decay of phi, coupled or not, is decay towards theta0.

        theta0 is a buffer of the parametrised module, so the model's ``state_dict`` carries it.

        Returns:
            A handle: ``apply(optimizer)``, then ``bake()`` or ``undo()``.
        """
        lifts: dict[str, Lift] = {n: Shift(self.theta0(n), self.excess(n)) for n in self.parameters}
        return Reparametrization("syre", self.model, lifts, summary=self._summary())

    def attach(self, optimizer: Optimizer, *, every: int | None = None, decay: Decay | None = None) -> Pull:
        """Make an optimiser's own weight decay pull towards theta0, in every group whose ``weight_decay`` is positive.

        Args:
            optimizer: any torch optimiser with weight decay, in the gradient or decoupled (AdamW); LaProp.
            every: steps from one pull to the next, for decoupled decay and for SGD. The plain decay acts at every step; the pull of
                several steps follows from a number for each group, and is added at once (exact but for the gradients in between, which
                see a point short of what is owed). 1: at every step. None: once 5e-3 of theta0 is owed, at least every 50 steps, which
                saves the memory traffic where steps are cheap. Other optimisers with decay in the gradient, and a random metric unless
                ``every`` is given, are pulled at every step.
            decay: how the decay of an optimiser of an unknown class acts.

        Returns:
            A handle: ``undo()`` and ``bake()`` both leave the weights, and give the optimiser its plain decay back.
        """
        return Pull(self, optimizer, every, decay)

    def state_dict(self) -> dict[str, Any]:
        """theta0 and D - 1 by name, and what they were drawn with. Save it with the checkpoint (`Pull` needs it; a shift has buffers)."""
        return {
            "seed": self.seed,
            "spread": self.spread,
            "sigma0": dict(self.sigma0),
            "theta0": {n: self.theta0(n) for n in self.parameters} if self.stored else {},
            "excess": {n: self.excess(n) for n in self.parameters} if self.stored and self.spread else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take theta0 and D from a `state_dict`; those it does not hold (``stored=False``) are drawn from its seed.

        Raises:
            InputError: other parameters, shapes or metric than this one's.
        """
        if set(state["sigma0"]) != set(self.parameters) or bool(state["spread"]) != bool(self.spread):
            raise InputError("This syre state belongs to other parameters or another metric: build syre() with the same arguments first.")
        tables = ((state.get("theta0", {}), self._points, 0), (state.get("excess", {}), self._excess, 1))
        for table, _, _ in tables:
            for name, value in table.items():
                if value.shape != self.parameters[name].shape:
                    raise InputError(f"theta0 of {name!r} has shape {tuple(value.shape)}, not {tuple(self.parameters[name].shape)}.")
        self.seed, self.spread, self.sigma0 = state["seed"], state["spread"], dict(state["sigma0"])
        for table, mine, which in tables:
            for name, held in mine.items():  # a state that was not stored is drawn again from what it was drawn with
                held.copy_(table[name] if name in table else self._draw(name, which))

    def gap(self, reflected: Mapping[str, Tensor], gamma: float) -> Estimate:
        """l_r(R theta) - l_r(theta) for weights R theta of equal loss l: gamma (|R theta - theta0|^2_D - |theta - theta0|^2_D).

        For a mirror O it is 4 gamma c.c0 with c = O^T theta, c0 = O^T theta0 (D = 1): zero only if c0 = 0. Source: syre R3.
        """
        total = 0.0
        with torch.no_grad():
            for name, p in self.parameters.items():
                if name not in reflected:
                    continue
                xi = self.excess(name)
                weight = 1.0 if xi is None else 1 + xi.double()
                point = self.theta0(name).double()
                moved = (weight * (reflected[name].double() - point).square()).sum()
                total += float(moved - (weight * (p.double() - point).square()).sum())
        return Estimate(gamma * total, refs=("syre R3",))

    def _here(self, name: str, table: dict[str, Tensor]) -> Tensor:
        """A stored tensor, on the device its parameter has been moved to since."""
        if table[name].device != self.parameters[name].device:
            table[name] = table[name].to(self.parameters[name].device)
        return table[name]

    def _summary(self) -> dict[str, Any]:
        sizes = {"smallest": min(self.sigma0.values()), "largest": max(self.sigma0.values())}
        return {"parameters": len(self.parameters), "sigma0": sizes, "metric": self.metric, "seed": self.seed}

    def _draw(self, name: str, which: int) -> Tensor:
        """theta0 (0) or D - 1 (1) of one parameter: a stream of its own for each, whatever the others are."""
        p = self.parameters[name]
        index = list(self.parameters).index(name)
        stream = torch.Generator().manual_seed((self.seed * 1_000_003 + 2 * index + which) % 2**63)
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        if which == 0:
            value = self.centre[name] + self.sigma0[name] * torch.randn(p.shape, generator=stream, dtype=wide)
            return _like(p, value.to(p.dtype))
        assert self.spread is not None
        return _like(p, self.spread * (2 * torch.rand(p.shape, generator=stream, dtype=wide) - 1))


class Shift(Lift):
    """theta = theta0 + phi / sqrt(D)."""

    theta0: Tensor
    scale: Tensor | None

    def __init__(self, theta0: Tensor, excess: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("theta0", theta0.clone())
        self.register_buffer("scale", None if excess is None else (1 + excess).rsqrt().to(theta0.dtype))

    def forward(self, phi: Tensor) -> Tensor:
        return phi + self.theta0 if self.scale is None else phi * self.scale + self.theta0

    def split(self, weight: Tensor) -> Tensor:
        return weight - self.theta0 if self.scale is None else (weight - self.theta0) / self.scale

    def push(self, law: str, buffer: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (buffer if self.scale is None else buffer * _power(self.scale, law),)

    def pull(self, law: str, buffers: tuple[Tensor, ...], weight: Tensor) -> Tensor:
        return buffers[0] if self.scale is None else buffers[0] / _power(self.scale, law)


class Pull:
    """An optimiser whose weight decay goes to theta0, by hooks before and after each step. Made by `Syre.attach`.

    Decoupled: the optimiser shrinks the weights as ever, and what is missing is added just before. Decay in the gradient: SGD is linear, so
    its momentum's answer to a constant pull is a number, and what that makes of theta0 is added to the weights after the step; any other
    optimiser gets weight_decay D (theta - theta0) in its gradient, so ``grad`` holds the decay afterwards. Right for any group options,
    scalers, shards and closures (a gradient gets its pull after the closure). The optimiser's ``state_dict`` carries the seed, what is
    owed and the count of steps; save `Syre.state_dict` beside it. A step that a fused scaler skips forgets what was due.
    """

    def __init__(self, anchor: Syre, optimizer: Optimizer, every: int | None = None, decay: Decay | None = None) -> None:
        if every is not None and every < 1:
            raise InputError(f"every must be at least 1, got {every}.")
        if any("syre_seed" in g for g in optimizer.param_groups):
            raise InputError("This optimiser decays to a random point already: undo() the first.")
        self.anchor, self.optimizer, self.every, self.told = anchor, optimizer, every, decay
        self._names = {p: n for n, p in anchor.parameters.items()}
        self._lent: list[tuple[dict[str, Any], float]] = []
        self._late: list[dict[str, Any]] = []  # groups that are pulled after the step
        pulled = False
        for group in optimizer.param_groups:
            way = self._way(group) if group.get("weight_decay") or "weight_decay" not in group else "shrink"
            if way == "gradient" and every is not None and every > 1 and group["weight_decay"]:
                raise InputError(
                    "every > 1 needs decoupled weight decay or SGD (with the identity metric, neither fused nor compiled): in the gradient "
                    "of another optimiser the pull must be there at every step."
                )
            pulled |= bool(group["weight_decay"] and any(p in self._names for p in group["params"]))
        if not pulled:
            raise InputError(
                "No group of this optimiser has weight decay on a parameter of the model: without decay theta0 does nothing "
                "(syre Prop. 1). Set weight_decay, and give syre and the optimiser the same model."
            )
        for group in optimizer.param_groups:
            self._enter(group)
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def undo(self) -> None:
        """Give the optimiser its plain decay back; the weights stay as they are."""
        self._give_back()
        for handle in self._handles:
            handle.remove()
        for group in self.optimizer.param_groups:
            for key in _KEYS:
                group.pop(key, None)

    def bake(self) -> nn.Module:
        """The same as `undo`: the weights are plain all along. Returns the model."""
        self.undo()
        return self.anchor.model

    def _enter(self, group: dict[str, Any]) -> None:
        started = any("momentum_buffer" in self.optimizer.state[p] for p in group["params"] if p in self.optimizer.state)
        last = (self.every or _STEPS) - 1
        group["syre_seed"], group["syre_step"] = self.anchor.seed, last if self.every is None else 0  # the first pull comes at once
        group["syre_owed"], group["syre_speed"] = 0.0, 0.0 if started else None

    def _way(self, group: Mapping[str, Any]) -> Literal["shrink", "momentum", "gradient"]:
        """How the decay of a group enters, and with it the pull."""
        if decay_of(self.optimizer, group, self.told) == "decoupled":
            return "shrink"
        linear = isinstance(self.optimizer, torch.optim.SGD) and not self.anchor.spread and not group.get("fused") and self.every != 1
        return "momentum" if linear and not isinstance(group["lr"], Tensor) and not torch.compiler.is_compiling() else "gradient"

    def _groups(self) -> Iterator[tuple[dict[str, Any], Literal["shrink", "momentum", "gradient"]]]:
        for group in self.optimizer.param_groups:
            if "syre_seed" not in group:  # added since
                self._enter(group)
            if group["syre_seed"] != self.anchor.seed:
                raise InputError(
                    f"This optimiser was trained towards the theta0 of seed {group['syre_seed']}, not {self.anchor.seed}: "
                    "load the syre state saved with it (Syre.load_state_dict)."
                )
            if group["weight_decay"] and any(p.grad is not None for p in group["params"]):
                yield group, self._way(group)

    def _held(self, group: Mapping[str, Any]) -> tuple[list[Tensor], list[str]]:
        """The parameters of a group that this step moves, and their names."""
        params = [p for p in group["params"] if p.grad is not None and p in self._names]
        return params, [self._names[p] for p in params]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._give_back()  # of a step that raised an error
        self._late = []
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._act()
            return None

        def followed() -> Any:
            loss = closure()  # it clears the gradients and makes new ones: what came before would be lost
            self._act(inside=True)
            return loss

        return (args, {**kwargs, "closure": followed}) if "closure" in kwargs else ((args[0], followed, *args[2:]), kwargs)

    def _act(self, inside: bool = False) -> None:
        """Before the step, or ``inside`` it, where the optimiser may have read its options.

        It runs at every step with cold caches, where each call costs: nothing is entered that is not needed.
        """
        groups = list(self._groups())
        for group, way in groups:  # before anything is written
            if way == "shrink" and _wipes(decay_rate(self.optimizer, group)):
                raise InputError("lr * weight_decay = 1 wipes the weights at every step, and theta0 with them: lower one of the two.")
        for group, way in groups:
            if way == "shrink":
                self._shrink(group)
            elif way == "gradient":
                self._gradient(group, inside)
        self._late = [group for group, way in groups if way == "momentum"]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._give_back()
        for group in self._late:
            self._momentum(group)

    def _shrink(self, group: dict[str, Any]) -> None:
        """Decoupled decay: what this step owes, or what has been owed for some steps, before the step, which shrinks it as well."""
        lost: Any = decay_rate(self.optimizer, group)
        kept = 1 - lost
        often = self.every is None and (self.anchor.spread is not None or torch.compiler.is_compiling())
        rate: Any = lost / kept
        if self.every != 1 and not often and not isinstance(lost, Tensor):  # a number that changes would compile a step again
            rate = self._due(group, group["syre_owed"] + rate, kept)
        if isinstance(rate, Tensor) or rate:
            found = getattr(self.optimizer, "found_inf", None)  # a fused step skips by itself
            params, names = self._held(group)
            if params:
                _add(params, self._pull(params, names), rate if found is None else rate * (1 - found.to(params[0].dtype)))

    def _momentum(self, group: dict[str, Any]) -> None:
        """SGD: the weights are those of plain decay plus a multiple of theta0, which takes the optimiser's own steps.

        The multiple x has the gradient weight_decay (x - 1) and a momentum of its own. What is added to the weights is no longer owed, and
        decays with them; the momentum stays, by linearity.
        """
        mu, slope = group["momentum"], group["weight_decay"] * (group["syre_owed"] - 1)
        step = slope
        if mu:
            old = group["syre_speed"]  # the first buffer of SGD is the gradient itself
            group["syre_speed"] = speed = slope if old is None else mu * old + (1 - group["dampening"]) * slope
            step = slope + mu * speed if group["nesterov"] else speed
        rate = self._due(group, group["syre_owed"] - group["lr"] * step, 1.0)
        params, names = self._held(group) if rate else ([], [])
        if params:
            _add(params, self._pull(params, names), rate)

    def _due(self, group: dict[str, Any], owed: float, kept: float) -> float:
        """What is to be paid now of what is owed: all of it or nothing."""
        group["syre_step"] += 1
        due = group["syre_step"] >= (self.every or _STEPS) or (self.every is None and abs(owed) >= _SLACK)
        group["syre_owed"], group["syre_step"] = (0.0, 0) if due else (kept * owed, group["syre_step"])
        return owed if due else 0.0

    @torch.no_grad()
    def _gradient(self, group: dict[str, Any], inside: bool) -> None:
        """Decay in the gradient: all of it here, and none by the optimiser, in place of one pass more over the weights."""
        params, names = self._held(group)
        if not params:
            return
        grads = [p.grad for p in params if p.grad is not None]
        rate: Any = (-1.0 if group.get("maximize") else 1.0) * group["weight_decay"]
        if not inside and not group.get("fused") and len(params) == sum(p.grad is not None for p in group["params"]):
            _add(grads, params, rate)
            self._lent.append((group, group["weight_decay"]))
            group["weight_decay"] = 0.0
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused step unscales by itself
        _add(grads, self._pull(params, names), -rate if scale is None else -rate * scale.to(params[0].dtype))

    def _give_back(self) -> None:
        """The groups' own weight decay."""
        for group, rate in self._lent:
            group["weight_decay"] = rate
        self._lent = []

    @torch.no_grad()
    def _pull(self, params: list[Tensor], names: list[str]) -> list[Tensor]:
        """theta - D (theta - theta0) for each parameter: what decay towards theta0 gives beyond the plain one."""
        points = [self.anchor.theta0(n) for n in names]
        if not self.anchor.spread:
            return points
        moves = []
        for p, point, n in zip(params, points, names, strict=True):
            xi = self.anchor.excess(n)
            assert xi is not None
            moves.append(torch.addcmul(point, point - p, xi))
        return moves


def syre(
    model: nn.Module,
    sigma0: float | None = None,
    *,
    metric: Metric = "identity",
    spread: float = 0.01,
    include: Callable[[str, Tensor], bool] | None = None,
    seed: int = 0,
    stored: bool = True,
) -> Syre:
    """Draw the random point that weights decay to. The model is not touched.

    Args:
        model: any module; its trainable floating-point parameters take part, tied weights once.
        sigma0: standard deviation of theta0 in units of the weights. None: 0.01 of the usual initial standard deviation of each tensor,
            0.01 / sqrt(fan_in) (fan_in * kernel for convolutions; a bias takes the fan_in of its layer; 0.01 for norms and embeddings).
            Where plain decay would actively collapse the model, 0.05-0.1 is needed (R6).
        metric: "random" draws D ~ U(1 - spread, 1 + spread), which also removes continuous families (R4).
        spread: half-width of D, at most 1.
        include: (name, parameter) -> whether it takes part; default all.
        seed: of theta0 and D.
        stored: False draws theta0 anew at each use: no memory, more time.

    Raises:
        InputError: no such parameters, NaN weights, integer parameters only, a random metric on half-precision weights (their storage
            loses it), or a weight that is parametrised already (for ``shift``).

    Gains of norms decay to 1 + theta0, everything else to theta0.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> handle = syre(model).attach(optimizer)
    """
    if sigma0 is not None and not (sigma0 > 0 and math.isfinite(sigma0)):
        raise InputError(f"sigma0 must be positive: theta0 = 0 is plain decay, got {sigma0}.")
    if metric not in ("identity", "random") or (metric == "random" and not 0 < spread < 1):
        raise InputError(f"metric must be 'identity' or 'random' with a spread in (0, 1), got {metric!r}, {spread}.")
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    chosen: dict[str, Any] = _sharded(model, include) if sharded else select(model, include)
    low = [n for n, p in chosen.items() if p.dtype in _LOW]
    if metric == "random" and low:
        raise InputError(f"{low[0]!r} is {chosen[low[0]].dtype}, whose storage loses a random metric: train float32 master weights.")
    inner = getattr(model, "module", model) if type(model).__name__ == "DistributedDataParallel" else getattr(model, "_orig_mod", model)
    kinds = {n: _kind(inner, n) for n in chosen}
    centre = {n: 1.0 if kinds[n][0] == "gain" else 0.0 for n in chosen}
    sizes = {n: sigma0 if sigma0 is not None else 0.01 * kinds[n][1] for n in chosen}
    return Syre(inner, chosen, sizes, centre, spread if metric == "random" else None, seed, stored)


def _sharded(model: nn.Module, include: Callable[[str, Tensor], bool] | None) -> dict[str, nn.Parameter]:
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point() and (include is None or include(n, p))}
    if not chosen:
        raise InputError("No trainable floating-point parameter of this sharded model is selected.")
    return chosen


def _kind(model: nn.Module, name: str) -> tuple[str, float]:
    """What a parameter is ("gain", "norm", "table", "weight", "bias") and its usual initial standard deviation."""
    path, _, attr = name.rpartition(".")
    if "parametrizations." in path:  # made by someone else's parametrisation: what it writes says what it is
        path, _, attr = path.rpartition("parametrizations.")
        path = path.rstrip(".")
    module = model.get_submodule(path)
    p = next(p for n, p in model.named_parameters(remove_duplicate=False) if n == name)
    if p.dim() < 2 and "norm" in type(module).__name__.lower():
        return ("gain" if attr == "weight" else "norm"), 1.0
    if isinstance(module, nn.Embedding):
        return "table", 1.0
    if p.dim() >= 2:
        return "weight", (p.numel() / p.shape[0]) ** -0.5
    sibling = getattr(module, attr.replace("bias", "weight"), None) if "bias" in attr else None
    fan = sibling.numel() / sibling.shape[0] if isinstance(sibling, Tensor) and sibling.dim() >= 2 else max(1, p.numel())
    return "bias", fan**-0.5


def _like(p: Tensor, value: Tensor) -> Tensor:
    """A full tensor placed like p: on its device, and cut like it where it is sharded."""
    if hasattr(p, "placements"):
        from torch.distributed.tensor import distribute_tensor

        mesh: Any = getattr(p, "device_mesh", None)
        return distribute_tensor(value.to(p.device), mesh, p.placements, src_data_rank=None)
    return value.to(p.device)


def _power(scale: Tensor, law: str) -> Tensor:
    return scale.square() if law == "square" else torch.ones_like(scale) if law == "step" else scale


def _wipes(lost: float | Tensor) -> bool:
    """Whether a decoupled step takes the whole weight away; a number on an accelerator is not waited for."""
    if isinstance(lost, Tensor) and (lost.device.type != "cpu" or torch.compiler.is_compiling()):
        return False
    return bool(lost == 1)


@torch.no_grad()
def _add(targets: list[Tensor], moves: list[Tensor], rate: float | Tensor) -> None:
    """targets += rate * moves, in place."""
    if isinstance(rate, Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(moves, rate.to(targets[0].device)))
    else:
        torch._foreach_add_(targets, moves, alpha=rate)
