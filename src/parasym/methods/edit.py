"""An edit: new values for some tensors of a model, certified, to be put in, taken out again, or kept.

A method plans an edit and touches nothing; `Edit.apply` puts it in. What belongs to the weights moves with them: the optimiser's
state and the gradients.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from parasym.core.errors import InputError
from parasym.core.functional import Functional, functional
from parasym.core.guards import float64_casts, preserve, rng_state
from parasym.core.results import Estimate, plain
from parasym.methods.state import Moved, Transport, move_state


class Handle(Protocol):
    """What every method returns: a change that can be taken back, or made part of the model."""

    def undo(self) -> None:
        """Put the model back as it was, bit by bit."""
        ...

    def bake(self) -> nn.Module:
        """Make the change part of the plain model, forget the way back, and return the model."""
        ...


@dataclass(eq=False)
class Edit:
    """New values for some tensors of a model. Nothing is touched until `apply`, or ``with edit:`` for a while.

    Attributes:
        method: which method planned it ("teleport", "compress", ...).
        model: the model it is for.
        after: canonical name (`parasym.core.functional`) of a parameter or buffer -> its new value; the shape may be another.
        certificate: relative change of the outputs (largest over largest, float64), or what the method promises instead.
        transport: how gradients and optimiser buffers of the edited parameters move; ``None``: they start afresh.
        attributes: "module.path.attribute" -> new value ("fc1.out_features"), for edits that change shapes.
        summary: what the method did, in plain data (objective before and after, units removed, ...).
    """

    method: str
    model: nn.Module
    after: Mapping[str, Tensor]
    certificate: Estimate
    transport: Transport | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    _before: dict[str, Tensor] = field(init=False, repr=False)
    _taken: _Taken | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        view = functional(self.model)
        self._before = {n: _tensor(view, n).clone() for n in self.after}
        self.after = {n: v.detach() for n, v in self.after.items()}

    @property
    def applied(self) -> bool:
        """Whether the model holds the new values now, with a way back."""
        return self._taken is not None

    def apply(self, optimizer: Optimizer | None = None, *, unknown: str = "error") -> Moved:
        """Put the new values into the model, and move the optimiser's state and the gradients along.

        Tensors that keep their shape are written in place (tied weights, compiled graphs and DDP buckets stay what they are);
        others are replaced by new parameters, in the model and in the optimiser.

        Args:
            optimizer: the optimiser that trains the model, if there is one already.
            unknown: what to do with optimiser buffers of unknown meaning: "error" or "reset".

        Returns:
            Which parameters' optimiser state moved, and whose starts afresh.

        Raises:
            InputError: already applied; the weights have changed since the edit was planned; an unknown optimiser.
        """
        if self.applied:
            raise InputError(f"This {self.method} edit is applied already: undo() or bake() it first.")
        view = functional(self.model)
        reshaped = [n for n, v in self.after.items() if v.shape != self._before[n].shape]
        if reshaped and type(self.model).__name__ == "DistributedDataParallel":
            raise InputError(
                f"This {self.method} edit gives {reshaped[0]!r} another shape, and DDP would still reduce the gradients of the old tensor: "
                "edit the plain model (ddp.module), then wrap it in DDP anew."
            )
        changed = [n for n, v in self._before.items() if not torch.equal(_tensor(view, n), v)]
        if changed:
            raise InputError(f"{changed[0]!r} has changed since this {self.method} edit was planned: plan it again on the weights of now.")
        taken = _Taken.of(view.model, self, optimizer)
        try:
            moved = taken.put(self, unknown)
        except BaseException:
            taken.restore()
            raise
        self._taken = taken
        return moved

    def undo(self) -> None:
        """Put weights, gradients and optimiser state back as they were before `apply`, bit by bit.

        Raises:
            InputError: not applied, or the weights were trained since: then the way back would throw that training away.
        """
        if self._taken is None:
            raise InputError(f"This {self.method} edit is not applied: there is nothing to undo.")
        view = functional(self.model)
        self._refuse_trained([n for n, v in self.after.items() if not torch.equal(_tensor(view, n), v.to(_tensor(view, n).dtype))])
        self._taken.restore()
        self._taken = None

    def _refuse_trained(self, changed: Sequence[str]) -> None:
        if changed:
            raise InputError(
                f"{changed[0]!r} was trained after this {self.method} edit was applied: bake() keeps it, undo() would lose it."
            )

    def bake(self) -> nn.Module:
        """Keep the edit for good and return the model; applies it first if need be. The copies that undo needs are freed."""
        if not self.applied:
            self.apply()
        self._taken = None
        self._before = {}
        return self.model

    def __enter__(self) -> Edit:
        self.apply()
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def edited(self) -> nn.Module:
        """A copy of the model with the edit in it; the model itself is left alone."""
        return edited(self.model, self.after, self.attributes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, without the tensors."""
        names = {n: list(v.shape) for n, v in self.after.items()}
        return plain({"method": self.method, "certificate": self.certificate, "tensors": names, "summary": self.summary})


def edited(model: nn.Module, after: Mapping[str, Tensor], attributes: Mapping[str, Any] | None = None) -> nn.Module:
    """A deep copy of a model with new values in some of its tensors, which may have other shapes."""
    twin = copy.deepcopy(functional(model).model)
    _write(twin, after, attributes or {})
    return twin


def output_change(
    model: nn.Module,
    after: Mapping[str, Tensor],
    inputs: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    attributes: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    within: float = 1e-12,
) -> Estimate:
    """The certificate of an edit that promises the same function: how much the outputs change.

    Args:
        inputs: (args, kwargs) pairs to compare on.
        dtype: what both models are run in; casts inside the forward are lifted when it is float64.
        within: largest relative change that counts as none.

    A model with a norm in train mode is compared in eval mode, too: the statistics of a batch hide shifts and scales that the running
    ones show.

    Returns:
        Largest change over largest output, over all float outputs and inputs; ``violated`` above ``within``.
    """
    before, new = functional(model).to(dtype), functional(edited(model, after, attributes)).to(dtype)
    hidden = batch_norms(before.model)
    worst, where = _largest_change(before, new, inputs, dtype), ""
    if hidden:
        with evaluating(before.model), evaluating(new.model):
            later = _largest_change(before, new, inputs, dtype)
        if later > worst:
            worst, where = later, " in eval mode (running statistics)"
    finite = worst < float("inf")
    return Estimate(
        worst,
        status="not_converged" if not finite else "ok" if worst <= within else "violated",
        assumptions=(str(dtype).removeprefix("torch."), f"{len(inputs)} inputs", *(["train and eval mode"] if hidden else [])),
        note="" if worst <= within else f"the outputs change by {worst:.2g}{where}, more than {within:g}",
    )


def batch_norms(model: nn.Module) -> list[str]:
    """Paths of the norms in train mode that keep running statistics: what they compute changes with ``model.eval()``."""
    return [n for n, m in model.named_modules() if isinstance(m, _NormBase) and m.training and m.running_mean is not None]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode of every submodule as before outside."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _largest_change(
    before: Functional, new: Functional, inputs: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]], dtype: torch.dtype
) -> float:
    worst = 0.0
    with torch.no_grad(), preserve(before.model):
        for args, kwargs in inputs:
            with rng_state():
                old = _run(before, args, kwargs, dtype)
            with rng_state():
                now = _run(new, args, kwargs, dtype)
            for a, b in zip(old, now, strict=True):
                change = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0
                worst = max(worst, change) if change == change else float("inf")
    return worst


def _run(f: Functional, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    if dtype != torch.float64:
        return f(None, args, kwargs)
    with float64_casts():
        return f(None, args, kwargs)


@dataclass
class _Taken:
    """What an applied edit took away, for the way back."""

    model: nn.Module
    values: list[tuple[Tensor, Tensor]]
    grads: list[tuple[Tensor, Tensor | None]]
    places: list[tuple[nn.Module, str, Any]]
    optimizer: Optimizer | None
    state: dict[Tensor, dict[str, Any]]
    groups: list[list[Tensor]]

    @classmethod
    def of(cls, model: nn.Module, edit: Edit, optimizer: Optimizer | None) -> _Taken:
        tensors = {n: _held(model, n) for n in edit.after}
        params = [t for t in tensors.values() if isinstance(t, nn.Parameter)]
        places = [(m, a, getattr(m, a)) for m, a in (_place(model, p) for p in edit.attributes)]
        for n, t in tensors.items():
            if t.shape != edit.after[n].shape:
                places += [(m, a, t) for m, a in _holders(model, t)]
        state: dict[Tensor, dict[str, Any]] = {
            p: _copied(optimizer.state[p]) for p in params if optimizer is not None and p in optimizer.state
        }
        groups = [list(g["params"]) for g in optimizer.param_groups] if optimizer is not None else []
        kept = [(t, t.detach().clone()) for t in tensors.values()]
        return cls(model, kept, [(p, p.grad) for p in params], places, optimizer, state, groups)

    def put(self, edit: Edit, unknown: str) -> Moved:
        named = {n: t for n in edit.after if isinstance(t := _held(self.model, n), nn.Parameter)}
        moved = Moved()
        if self.optimizer is not None:
            moved = move_state(self.optimizer, named, edit.transport, unknown)
        grads = _moved_grads(named, edit.transport)
        new = _write(self.model, edit.after, edit.attributes)
        for n, p in named.items():
            fresh = new.get(p, p)
            fresh.grad = grads.get(n)
        if self.optimizer is not None and new:
            for group in self.optimizer.param_groups:
                group["params"] = [new.get(p, p) for p in group["params"]]
            for old, fresh in new.items():
                if old in self.optimizer.state:
                    self.optimizer.state[fresh] = self.optimizer.state.pop(old)
        return moved

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        for module, attr, value in self.places:
            if attr in module._parameters:
                module._parameters[attr] = value
            elif attr in module._buffers:
                module._buffers[attr] = value
            else:
                setattr(module, attr, value)
        for p, grad in self.grads:
            p.grad = grad
        if self.optimizer is not None:
            groups = self.optimizer.param_groups
            later = [g["params"] for g in groups[len(self.groups) :]]  # added by the user since: they stay
            old = {p for params in self.groups + later for p in params}
            for p in [p for p in self.optimizer.state if p not in old] + [p for p, _ in self.grads]:
                self.optimizer.state.pop(p, None)
            self.optimizer.state.update(self.state)
            for group, params in zip(groups, self.groups, strict=False):
                group["params"] = params


def _moved_grads(named: Mapping[str, Tensor], transport: Transport | None) -> dict[str, Tensor]:
    have = {n: p.grad for n, p in named.items() if p.grad is not None}
    if not have or transport is None:
        return {}
    full = {n: (p.grad if p.grad is not None else torch.zeros_like(p)).double() for n, p in named.items()}
    return {n: g.to(named[n].dtype) for n, g in transport.gradient(full).items() if n in have}


def _write(model: nn.Module, after: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> dict[Tensor, nn.Parameter]:
    """Write values in place where the shape stays, else as new tensors; return old parameter -> new one."""
    new: dict[Tensor, nn.Parameter] = {}
    for name, value in after.items():
        held = _held(model, name)
        if held.shape == value.shape:
            with torch.no_grad():
                held.copy_(value)
            continue
        _refuse_views(model, name, held)
        fresh: Any = value.detach().to(device=held.device, dtype=held.dtype).clone()
        if isinstance(held, nn.Parameter):
            fresh = new[held] = nn.Parameter(fresh, requires_grad=held.requires_grad)
        for module, attr in list(_holders(model, held)):
            (module._parameters if attr in module._parameters else module._buffers)[attr] = fresh
    for path, value in attributes.items():
        module, attr = _place(model, path)
        setattr(module, attr, value)
    return new


def _refuse_views(model: nn.Module, name: str, held: Tensor) -> None:
    if "parametrizations." in name:
        raise InputError(f"{name!r} is under a parametrization: its shape cannot be changed; remove the parametrization first.")
    where = held.untyped_storage().data_ptr()
    for other, p in model.named_parameters():
        if p is not held and p.numel() and p.untyped_storage().data_ptr() == where:
            raise InputError(f"{name!r} shares memory with {other!r} as a view: its shape cannot be changed.")


def _held(model: nn.Module, name: str) -> Tensor:
    module, attr = _place(model, name)
    tensor = module._parameters.get(attr, module._buffers.get(attr))
    if tensor is None:
        raise InputError(f"{type(model).__name__} has no parameter or buffer {name!r}.")
    return tensor


def _holders(model: nn.Module, tensor: Tensor) -> Iterator[tuple[nn.Module, str]]:
    """Every place that holds this very tensor (tied weights have several)."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for attr, held in table.items():
                if held is tensor:
                    yield module, attr


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, attr = path.rpartition(".")
    try:
        return model.get_submodule(parent), attr
    except AttributeError as error:
        raise InputError(f"{type(model).__name__} has no module {parent!r} (for {path!r}).") from error


def _tensor(view: Functional, name: str) -> Tensor:
    found = view.params.get(name, view.buffers.get(name))
    if found is None:
        other = view.aliases.get(name)
        hint = f"; its canonical name is {other!r}" if other else ""
        raise InputError(f"{type(view.model).__name__} has no parameter or buffer {name!r}{hint}.")
    return found


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}
