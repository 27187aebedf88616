"""Masks on weights: a parametrization that multiplies a weight by zeros and ones in every forward pass, and its handle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.methods.edit import Edit
from parasym.methods.state import Moved, Transport, move_state, sliced_transport


class Mask(nn.Module):
    """Multiply by a fixed mask; the mask is a buffer, so it travels in the ``state_dict``."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight where the mask is on, zero elsewhere: whatever stands there, and its gradient, is stopped."""
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


@dataclass(eq=False)
class Masking(Edit):
    """An edit that keeps weights at zero through training: `apply` hangs masks on the model, `bake` leaves plain sparse weights.

    The parameters stay the same objects (an optimiser, tied weights and DDP see no change); their names in the ``state_dict`` become
    ``weight`` -> ``parametrizations.weight.original``, with the mask beside them. Apply it before FSDP2's ``fully_shard`` and before the
    state of a masked run is loaded. After training, `undo` takes the masks away and leaves the trained dense weights.

    Attributes:
        masks: parameter -> bool tensor of its shape, True: kept.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    _worn: list[tuple[nn.Module, str, list[str]]] = field(init=False, default_factory=list, repr=False)
    _back: list[Callable[[], None]] = field(init=False, default_factory=list, repr=False)

    @property
    def applied(self) -> bool:
        """Whether the model wears the masks now."""
        return bool(self._worn)

    @property
    def kept(self) -> dict[str, int]:
        """Weights kept in each masked parameter."""
        return {n: int(m.sum()) for n, m in self.masks.items()}

    def apply(self, optimizer: Optimizer | None = None, *, unknown: str = "error") -> Moved:
        """Hang the masks on the model; gradients and optimiser state of masked weights become zero.

        Raises:
            InputError: applied already; the weights have other shapes now or are under another parametrization.
        """
        if self.applied:
            raise InputError(f"This {self.method} edit is applied already: undo() or bake() it first.")
        model = functional(self.model).model
        held = {n: (p, list(holders(model, p))) for n, p in model.named_parameters() if n in self.masks}
        for n, mask in self.masks.items():
            if n not in held or held[n][0].shape != mask.shape:
                raise InputError(f"{type(model).__name__} has no parameter {n!r} of shape {tuple(mask.shape)}: plan the cut again.")
        moved = Moved()
        back = []
        if optimizer is not None:
            named = {n: held[n][0] for n in self.masks}
            states = {p: dict(optimizer.state[p]) for p in named.values() if p in optimizer.state}  # moving makes new tensors
            moved = move_state(optimizer, named, masked_transport(self.masks), unknown)
            back += [_state_back(optimizer, p, state) for p, state in states.items()]
        for n, mask in self.masks.items():
            p, places = held[n]
            if p.grad is not None:
                whole = p.grad.detach().clone()
                p.grad.mul_(mask.to(p.device))
                back.append(_grad_back(p, whole))
            for module, attr in places:
                self._worn.append((module, attr, list(module._parameters)))
                parametrize.register_parametrization(module, attr, Mask(mask.to(p.device)), unsafe=True)
        self._back = back
        return moved

    def undo(self) -> None:
        """Take the masks away. Weights, gradients and optimiser state are bit by bit as before, or, where they were trained or cleared
        meanwhile, as training left them."""
        back = self._back
        self._bare("undo")
        for give in back:
            give()

    def bake(self) -> nn.Module:
        """Write the zeros into the plain weights, take the masks away, and return the model; applies them first if need be."""
        if not self.applied:
            self.apply()
        for module, attr, _ in self._worn:
            with torch.no_grad():
                worn: Any = module.parametrizations[attr]  # type: ignore[index]
                worn.original.mul_(worn[0].mask)
        self._bare("bake")
        return self.model

    def _bare(self, verb: str) -> None:
        if not self.applied:
            raise InputError(f"This {self.method} edit is not applied: there is nothing to {verb}.")
        for module, attr, order in reversed(self._worn):
            bare(module, attr, order)
        self._worn, self._back = [], []


def _state_back(optimizer: Optimizer, p: Tensor, before: dict[str, Any]) -> Callable[[], None]:
    """The way back of one parameter's masked optimiser state: taken if nothing has written to it since."""
    marks = _marks(optimizer.state.get(p, {}))

    def give() -> None:
        now = _marks(optimizer.state.get(p, {}))
        if now.keys() == marks.keys() and all(a is b and v == w for (a, v), (b, w) in ((now[k], marks[k]) for k in now)):
            optimizer.state[p] = before

    return give


def _marks(state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every entry with what tells whether it was written to: a tensor's version, or the value itself."""
    return {k: (v, v._version) if isinstance(v, Tensor) else (None, v) for k, v in state.items()}


def _grad_back(p: Tensor, whole: Tensor) -> Callable[[], None]:
    """The way back of one masked gradient, likewise."""
    grad = p.grad
    assert grad is not None
    version = grad._version

    def give() -> None:
        if p.grad is grad and grad._version == version:
            grad.copy_(whole)

    return give


def bare(module: nn.Module, attr: str, order: list[str]) -> None:
    """Take a parametrization away and leave its original parameter, the parameters of the module in their old order."""
    parametrize.remove_parametrizations(module, attr, leave_parametrized=False)
    held = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({n: held[n] for n in order if n in held} | held)


def masked_transport(masks: Mapping[str, Tensor]) -> Transport:
    """How optimiser state follows masks: what belongs to a cut weight becomes zero."""
    return sliced_transport({n: lambda v, m=m: v * m.to(v.device) for n, m in masks.items()})  # type: ignore[misc]


def holders(model: nn.Module, p: Tensor) -> Iterator[tuple[nn.Module, str]]:
    """Every (module, attribute) that holds this very parameter."""
    for module in model.modules():
        for attr, held in module._parameters.items():
            if held is p:
                yield module, attr


def refuse_parametrized(names: Any, method: str) -> None:
    """Raises InputError if a parameter is under a parametrization already."""
    for name in names:
        if "parametrizations." in name or name.endswith(("_orig", "weight_g", "weight_v")):
            raise InputError(
                f"{name!r} is parametrized already: {method} works on plain weights. "
                "bake() or undo() the edit that did it, or call torch.nn.utils.parametrize.remove_parametrizations first."
            )
