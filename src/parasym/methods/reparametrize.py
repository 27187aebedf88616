"""Live reparametrisations: weights written as a function of other tensors, on `torch.nn.utils.parametrize`, as handles.

A method says which parametrisation each parameter gets; `Reparametrization.apply` puts it in, with the function unchanged and the
optimiser moved along; ``bake`` turns the model back into plain weights, ``undo`` into what it was, bit by bit. Tied weights stay tied.
A parametrised module computes, copies, compiles, and saves its ``state_dict``, but does not pickle: bake it first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.core.results import Estimate, plain
from parasym.methods.decay import decay_of
from parasym.methods.state import laws_of, refuse_unknown

Place = tuple[nn.Module, str]


class Lift(nn.Module):
    """Base of the parametrisations: ``forward`` makes the weight, ``right_inverse`` splits a plain weight into what is trained.

    Attributes:
        decay: torch's ``weight_decay`` of each trained tensor, by position; None: what the optimiser's group has.
    """

    decay: tuple[float | None, ...] = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.lifting = True

    def split(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The trained tensors for a plain weight."""
        raise NotImplementedError

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`split`, but for a second place of a tied weight, which has been split already."""
        return self.split(weight) if self.lifting else weight

    def push(self, law: str, buffer: Tensor, weight: Tensor) -> tuple[Tensor, ...] | None:
        """An optimiser's buffer of the plain weight for each trained tensor (chain rule), or None: it starts afresh."""
        return None

    def pull(self, law: str, buffers: tuple[Tensor, ...], weight: Tensor) -> Tensor | None:
        """The way back of `push`, at the plain weight of now; None: the plain weight's state starts afresh."""
        return None

    def extra(self) -> list[tuple[nn.Parameter, float]]:
        """Trained tensors the parametrisation holds itself, shared between weights, with their weight decay."""
        return []

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        self.lifting = False
        try:
            yield
        finally:
            self.lifting = True


@dataclass(eq=False)
class Reparametrization:
    """A change of the coordinates a model is trained in. Nothing is touched until `apply`.

    Attributes:
        method: which method planned it ("syre", "spred", "dcs").
        model: the model it is for.
        lifts: canonical name of a parameter -> its parametrisation.
        finish: plain weight and its name -> the weight that `bake` leaves (to set small entries to zero, ...).
        summary: what the method did, in plain data.
    """

    method: str
    model: nn.Module
    lifts: Mapping[str, Lift]
    finish: Callable[[str, Tensor], Tensor] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    certificate: Estimate | None = None
    _taken: _Taken | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        view = functional(self.model)
        self.model = view.model
        for name in self.lifts:
            if name in view.buffers:
                raise InputError(f"{name!r} is {view.buffers[name].dtype}, not a trainable floating-point parameter: leave it out.")
            if name not in view.params:
                other = view.aliases.get(name)
                raise InputError(
                    f"{type(self.model).__name__} has no parameter {name!r}{f'; its canonical name is {other!r}' if other else ''}."
                )
            refuse_parametrized(self.model, name)

    @property
    def applied(self) -> bool:
        """Whether the model is parametrised now."""
        return self._taken is not None

    def apply(self, optimizer: Optimizer | None = None, *, unknown: str = "error") -> Self:
        """Put the parametrisation in; the weights, and so the function, stay what they are to rounding.

        Args:
            optimizer: the optimiser that trains the model, if there is one already: the new tensors take the place of the old ones
                in it, in groups of the right weight decay, and its state is carried over by the chain rule where it can be.
            unknown: what to do with the state of an optimiser of unknown class: "error" or "reset".

        Raises:
            InputError: applied already; the model has been parametrised since; a scheduler counts the optimiser's groups; the optimiser
                has a state of unknown meaning.
        """
        if self.applied:
            raise InputError(f"This {self.method} reparametrisation is applied already: undo() or bake() it first.")
        for name in self.lifts:
            refuse_parametrized(self.model, name)
        adds = any(d is not None for lift in self.lifts.values() for d in (*lift.decay, *lift.extra()))
        if adds and optimizer is not None and any("initial_lr" in g for g in optimizer.param_groups):
            raise InputError(
                f"A learning-rate scheduler counts the groups of this {type(optimizer).__name__}, and {self.method} adds groups: "
                "apply it first, then make the scheduler."
            )
        if optimizer is not None and unknown != "reset":
            refuse_unknown(optimizer, {n: p for n, p in self.model.named_parameters() if n in self.lifts})
        self._taken = _Taken.install(self, optimizer)
        self.certificate = self._taken.certificate
        return self

    def weights(self) -> dict[str, Tensor]:
        """The plain weights as they are now, by canonical name; differentiable."""
        return {n: getattr(*places[0]) for n, places in self._places().items()}

    def originals(self, name: str) -> tuple[nn.Parameter, ...]:
        """The trained tensors of one weight."""
        module, attr = self._places()[name][0]
        return originals(module, attr)

    def param_groups(self, **options: Any) -> list[dict[str, Any]]:
        """Parameter groups for a new optimiser: every trainable tensor once, those with a decay of their own in groups with it.

        Args:
            options: shared by all groups (``lr`` ...); ``weight_decay`` is that of everything else.
        """
        self._places()
        own: dict[nn.Parameter, float] = {}
        for name, lift in self.lifts.items():
            for p, d in zip(self.originals(name), lift.decay, strict=True):
                if d is not None:
                    own[p] = d
            own.update(dict(lift.extra()))
        rest = [p for p in self.model.parameters() if p.requires_grad and p not in own]
        groups = [{"params": rest, **options}] if rest else []
        for d in dict.fromkeys(own.values()):
            members = [p for p, value in own.items() if value == d and p.requires_grad]
            if members:
                groups.append({"params": members, **options, "weight_decay": d})
        return groups

    def undo(self) -> None:
        """Put the plain weights back as they were before `apply`, bit by bit, with the optimiser's state.

        Raises:
            InputError: not applied, or the weights were trained since: then the way back would throw that training away.
        """
        self._places()
        assert self._taken is not None
        if (changed := self._taken.changed(self)) is not None:
            raise InputError(f"{changed!r} was trained after {self.method} was applied: bake() keeps it, undo() would lose it.")
        self._restore()

    def _restore(self) -> None:
        """The weights of before `apply`, whatever was trained since."""
        assert self._taken is not None
        self._taken.remove(self._places(), None)
        self._taken = None

    def bake(self) -> nn.Module:
        """Make the model plain again with the weights as they are now, and return it; the optimiser trains the plain weights."""
        if not self.applied:
            self.apply()
        places = self._places()
        assert self._taken is not None
        with torch.no_grad():
            values = {n: getattr(*p[0]).detach().clone() for n, p in places.items()}
            if self.finish is not None:
                values = {n: self.finish(n, v) for n, v in values.items()}
        self._taken.remove(places, values)
        self._taken = None
        return self.model

    def plain_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """A ``state_dict`` of the plain model (names and values), from the one of the parametrised model.

        Args:
            state: a full state dict of the parametrised model, as FSDP gathers it; None: the model's own.
        """
        places = self._places()
        out = dict(self.model.state_dict() if state is None else state)
        paths = {id(m): path for path, m in self.model.named_modules()}
        with torch.no_grad():
            made: dict[str, Tensor] = {}
            for name, holders in places.items():
                for module, attr in holders:
                    prefix = f"{paths[id(module)]}." if paths[id(module)] else ""
                    stem = f"{prefix}parametrizations.{attr}."
                    mine = {k.removeprefix(stem): out.pop(k) for k in list(out) if k.startswith(stem)}
                    if name not in made:
                        made[name] = self._remade(name, mine) if state is not None else getattr(module, attr).detach().clone()
                        if self.finish is not None:
                            made[name] = self.finish(name, made[name])
                    out[f"{prefix}{attr}"] = made[name]
        return out

    def _remade(self, name: str, mine: Mapping[str, Tensor]) -> Tensor:
        lift = self.lifts[name]
        if getattr(lift, "partners", None):
            raise InputError(f"{name!r} shares normal directions with other parameters: bake() the model to get its plain weights.")
        keys = sorted(k for k in mine if k.startswith("original"))
        inner = {k.removeprefix("0."): v for k, v in mine.items() if k.startswith("0.")}
        return torch.func.functional_call(lift, inner, tuple(mine[k] for k in keys))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, without the tensors."""
        return plain({"method": self.method, "parameters": list(self.lifts), "certificate": self.certificate, "summary": self.summary})

    def _places(self) -> dict[str, list[Place]]:
        if self._taken is None:
            raise InputError(f"This {self.method} reparametrisation is not applied: call apply() first.")
        return self._taken.places


def originals(module: nn.Module, attr: str) -> tuple[nn.Parameter, ...]:
    """The trained tensors behind one parametrised attribute."""
    held: Any = module.parametrizations[attr]  # type: ignore[index, union-attr]
    if held.is_tensor:
        return (held.original,)
    return tuple(getattr(held, f"original{i}") for i in range(held.ntensors))


def holders(model: nn.Module, name: str) -> list[Place]:
    """Every (module, attribute) that holds the parameter of that name; several for tied weights."""
    path, _, attr = name.rpartition(".")
    mine = model.get_submodule(path)._parameters[attr]
    return [(m, a) for m in model.modules() for a, p in m._parameters.items() if p is mine]


def refuse_parametrized(model: nn.Module, name: str) -> None:
    """Raise InputError where the parameter belongs to, or stands behind, a parametrisation already."""
    if "parametrizations." in name:
        where = name.replace("parametrizations.", "").rpartition(".original")[0]
        raise InputError(
            f"{where!r} is parametrised already: undo() or bake() the method that did it, or call "
            "torch.nn.utils.parametrize.remove_parametrizations on it."
        )
    path, _, attr = name.rpartition(".")
    module = model.get_submodule(path)
    if parametrize.is_parametrized(module, attr):
        raise InputError(f"{name!r} is parametrised already: undo() or bake() the method that did it first.")
    if hasattr(module, f"{attr}_g") or hasattr(module, f"{attr}_orig"):
        raise InputError(f"{name!r} is written by a forward hook (weight_norm or prune of old style): remove it first.")


def select(model: nn.Module, where: Callable[[str, Tensor], bool] | None, *, frozen: bool = False) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, those that can be trained and that ``where`` accepts.

    Raises:
        InputError: nothing is left, or what `parasym.core.functional` refuses (NaN, integer only, packed, sharded).
    """
    view = functional(model)
    params = dict(view.model.named_parameters(remove_duplicate=False))
    found = {
        n: params[n]
        for n, v in view.params.items()
        if v.numel() and (frozen or n not in view.frozen) and (where is None or where(n, v)) and not v.is_complex()
    }
    if not found:
        names = ", ".join(list(view.params)[:6])
        raise InputError(f"No trainable real parameter of {type(view.model).__name__} is selected; it has {names}.")
    return found


@dataclass(eq=False)
class _Taken:
    """What `apply` took away, for the way back."""

    places: dict[str, list[Place]]
    plain: dict[str, nn.Parameter]
    before: dict[str, Tensor]
    lifted: dict[str, tuple[Tensor, ...]]
    certificate: Estimate
    optimizer: Optimizer | None
    groups: list[list[Tensor]]
    group_names: list[list[str] | None]
    state: dict[Tensor, dict[str, Any]]
    order: list[tuple[nn.Module, list[str]]]
    grads: dict[str, Tensor | None]

    @classmethod
    def install(cls, plan: Reparametrization, optimizer: Optimizer | None) -> _Taken:
        model = plan.model
        places = {n: holders(model, n) for n in plan.lifts}
        kept: dict[str, nn.Parameter] = {n: p[0][0]._parameters[p[0][1]] for n, p in places.items()}  # type: ignore[misc]
        before = {n: p.detach().clone() for n, p in kept.items()}
        grads = {n: p.grad for n, p in kept.items()}
        order = [(m, list(m._parameters)) for m in dict.fromkeys(m for held in places.values() for m, _ in held)]
        taken = cls(places, kept, before, {}, Estimate(0.0), optimizer, [], [], {}, order, grads)
        if optimizer is not None:
            taken.groups = [list(g["params"]) for g in optimizer.param_groups]
            taken.group_names = [list(g["param_names"]) if "param_names" in g else None for g in optimizer.param_groups]
            taken.state = {p: dict(optimizer.state[p]) for p in kept.values() if p in optimizer.state}
        done: list[str] = []
        try:
            for name, lift in plan.lifts.items():
                done.append(name)
                _register(places[name], lift)
                for p in originals(*places[name][0]):
                    p.grad = None
            worst = 0.0
            with torch.no_grad():
                for name, (first, *_) in places.items():
                    change = (getattr(*first) - before[name]).abs().max() / before[name].abs().max().clamp_min(1e-300)
                    worst = max(worst, float(change) if bool(before[name].any()) else float(change > 0))
            eps = max(torch.finfo(p.dtype).eps for p in before.values())
            taken.certificate = Estimate(
                worst,
                status="ok" if worst <= 8 * eps else "violated",
                assumptions=("largest relative change of a weight",),
                note="" if worst <= 8 * eps else f"the weights change by {worst:.2g} when they are split",
            )
            if optimizer is not None:
                _swap(plan, taken, optimizer)
        except BaseException:
            taken.remove({n: places[n] for n in done}, None)
            raise
        taken.lifted = {n: tuple(p.detach().clone() for p in taken.trained(plan, n)) for n in places}
        return taken

    def trained(self, plan: Reparametrization, name: str) -> tuple[nn.Parameter, ...]:
        """Everything that is trained in place of a weight."""
        return (*originals(*self.places[name][0]), *(p for p, _ in plan.lifts[name].extra()))

    def changed(self, plan: Reparametrization) -> str | None:
        for n, values in self.lifted.items():
            for p, v in zip(self.trained(plan, n), values, strict=True):
                if not torch.equal(p.detach(), v):
                    return n
        return None

    def remove(self, places: Mapping[str, list[Place]], values: Mapping[str, Tensor] | None) -> None:
        """Make the weights plain: with ``values``, or as they were, and then with the optimiser's state as it was."""
        gone: dict[nn.Parameter, nn.Parameter] = {}
        back: dict[str, dict[str, Any]] = {}
        for name, held in places.items():
            p = self.plain[name]
            for module, attr in held:
                if not parametrize.is_parametrized(module, attr):
                    continue
                behind = originals(module, attr)
                lift: Any = module.parametrizations[attr][0]  # type: ignore[index, union-attr]
                gone.update(dict.fromkeys(behind, p) | {q: p for q, _ in lift.extra()})
                if values is not None and name not in back:
                    back[name] = self._pulled(lift, behind, values[name])
                _own_class(module)
                parametrize.remove_parametrizations(module, attr, leave_parametrized=len(behind) > 1)
                module._parameters[attr] = p
            with torch.no_grad():
                p.set_((self.before[name] if values is None else values[name]).clone())  # type: ignore[call-overload]
            p.grad = self.grads[name] if values is None else None
        for module, names in self.order:  # as it was: an optimiser's state dict counts the parameters
            table = {n: module._parameters[n] for n in names}
            module._parameters.clear()
            module._parameters.update(table)
        if self.optimizer is None:
            return
        groups = self.optimizer.param_groups
        for i in reversed(range(len(self.groups), len(groups))):  # those the swap added; a user's own, added since, stay
            if groups[i]["params"] and all(q in gone for q in groups[i]["params"]):
                del groups[i]
        for group, params, labels in zip(groups, self.groups, self.group_names, strict=False):
            group["params"] = params
            if labels is not None:
                group["param_names"] = labels
        for q in gone:
            self.optimizer.state.pop(q, None)
        if values is None:
            self.optimizer.state.update(self.state)
        self.optimizer.state.update({places[n][0][0]._parameters[places[n][0][1]]: s for n, s in back.items() if s})  # type: ignore[misc]

    def _pulled(self, lift: Lift, behind: tuple[nn.Parameter, ...], weight: Tensor) -> dict[str, Any]:
        """The optimiser's state of the plain weight, where every buffer can be carried back; else empty."""
        states = [self.optimizer.state.get(q, {}) for q in behind] if self.optimizer is not None else []
        if not states or not all(states):
            return {}
        laws: Mapping[str, str] = (self.optimizer and laws_of(self.optimizer)) or {}
        out: dict[str, Any] = {}
        for key, value in states[0].items():
            if not isinstance(value, Tensor) or value.dim() == 0 or key not in laws:
                out[key] = value
                continue
            part = lift.pull(laws[key], tuple(s[key] for s in states), weight)
            if part is None:
                return {}
            out[key] = part
        return out


def _own_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own: torch shares it with deep copies, and takes the property off the class."""
    kind = type(module)
    table = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, table)


def _register(places: list[Place], lift: Lift) -> None:
    (module, attr), *others = places
    parametrize.register_parametrization(module, attr, lift)
    made = originals(module, attr)
    for other, name in others:
        if len(made) == 1:
            with lift.settled():  # the tied tensor holds the split value already
                parametrize.register_parametrization(other, name, lift)
        else:
            parametrize.register_parametrization(other, name, lift)
            for i, p in enumerate(made):
                setattr(other.parametrizations[name], f"original{i}", p)  # type: ignore[index, union-attr]


def _swap(plan: Reparametrization, taken: _Taken, optimizer: Optimizer) -> None:
    """Let the optimiser train the new tensors in place of the old, in groups of their own decay."""
    laws = laws_of(optimizer) or {}
    where = {p: i for i, params in enumerate(taken.groups) for p in params}
    extra: dict[tuple[int, float], list[nn.Parameter]] = {}
    seen: set[Tensor] = set()
    for name, lift in plan.lifts.items():
        old, new = taken.plain[name], originals(*taken.places[name][0])
        at = where.get(old)
        if at is None:
            if old.requires_grad:
                raise InputError(f"The optimiser does not train {name!r}: give it all parameters of the model, or leave {name!r} out.")
            continue
        group = optimizer.param_groups[at]
        state = optimizer.state.pop(old, {})
        for i, (p, decay) in enumerate(zip(new, lift.decay, strict=True)):
            if decay is not None:
                extra.setdefault((at, decay), []).append(p)
            pushed = _pushed(state, laws, lift, taken.before[name], i)
            if pushed:
                optimizer.state[p] = pushed
        for p, decay in lift.extra():
            if p not in seen:
                seen.add(p)
                extra.setdefault((at, decay), []).append(p)
        if new[0] is not old:
            keep = [j for j, q in enumerate(group["params"]) if q is not old]
            if "param_names" in group:
                group["param_names"] = [group["param_names"][j] for j in keep]
            group["params"] = [group["params"][j] for j in keep]
            free = [p for p, d in zip(new, lift.decay, strict=True) if d is None]
            group["params"] += free
            if "param_names" in group:
                group["param_names"] += [name] * len(free)
    for (at, decay), params in extra.items():
        options = {k: v for k, v in optimizer.param_groups[at].items() if k not in ("params", "param_names")}
        options["weight_decay"] = decay
        if decay and decay_of(optimizer, options, "l2") == "decoupled":
            if "decoupled_weight_decay" not in options:
                raise InputError(
                    f"{type(optimizer).__name__} decays weights beside the gradient, and {plan.method} needs decay in the gradient: "
                    "with decoupled decay the product is not an L1 or group penalty. Use SGD, Adam, or AdamW's own switch."
                )
            options["decoupled_weight_decay"] = False
        named = {"param_names": [f"{plan.method}.{len(optimizer.param_groups)}.{i}" for i in range(len(params))]}
        has_names = "param_names" in optimizer.param_groups[0]
        optimizer.add_param_group({"params": params, **options, **(named if has_names else {})})


def _pushed(state: Mapping[str, Any], laws: Mapping[str, str], lift: Lift, weight: Tensor, i: int) -> dict[str, Any]:
    """The state of the i-th trained tensor by the chain rule; empty (afresh) unless every buffer can be carried over."""
    out: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != weight.shape or value.dim() == 0:
            out[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        parts = lift.push(laws[key], value, weight) if key in laws else None
        if parts is None:
            return {}
        out[key] = parts[i].clone() if parts[i] is value else parts[i]  # the old state is kept for the way back
    return out
