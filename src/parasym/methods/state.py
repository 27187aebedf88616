"""Optimiser state that moves with the weights it belongs to.

A buffer of an optimiser is gradient-like (momentum), second-moment-like (Adam's ``exp_avg_sq``), or a step already divided by the
root of a second moment (LaProp's ``exp_avg``). Each has its own law when the weights are moved by a linear map theta' = M theta that
leaves the loss unchanged: g' = M^-T g, and for the squares the same map squared entry by entry, which is exact where M is monomial
(permutations, signs, diagonal scales) and does not exist otherwise: then the state of the moved parameters starts afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from parasym.core.errors import InputError
from parasym.optim import LaProp

Tensors = dict[str, Tensor]
Law = Literal["gradient", "square", "size", "step"]

# optimiser -> buffer -> its law; "step" is a gradient divided by the root of the optimiser's second moment
_SECOND = ("exp_avg_sq", "square_avg")
_LAWS: tuple[tuple[str, dict[str, Law]], ...] = (
    ("SGD", {"momentum_buffer": "gradient"}),
    ("Muon", {"momentum_buffer": "gradient"}),
    ("Adam", {"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}),
    ("AdamW", {"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}),
    ("NAdam", {"exp_avg": "gradient", "exp_avg_sq": "square"}),
    ("RAdam", {"exp_avg": "gradient", "exp_avg_sq": "square"}),
    ("Adamax", {"exp_avg": "gradient", "exp_inf": "size"}),
    ("Adagrad", {"sum": "square"}),
    ("RMSprop", {"square_avg": "square", "grad_avg": "gradient", "momentum_buffer": "step"}),
)


@dataclass(frozen=True)
class Transport:
    """How what belongs to the weights moves with them.

    Attributes:
        gradient: gradient-like tensors of the edited parameters (name -> tensor) -> the same at the edited point; linear.
        square: the same for second moments; ``None`` where there is no such map, and the state starts afresh.
    """

    gradient: Callable[[Tensors], Tensors]
    square: Callable[[Tensors], Tensors] | None = None


def linear_transport(inverse: Callable[[Tensors], Tensors], at: Mapping[str, Tensor], *, monomial: bool) -> Transport:
    """Transport under a linear move of the weights, from its inverse.

    Args:
        inverse: edited weights -> weights before; linear, differentiable.
        at: the edited weights.
        monomial: each number goes to one number (permutations, signs, diagonal scales), so that second moments move too.
    """
    point = {n: v.detach() for n, v in at.items()}

    def gradient(given: Tensors) -> Tensors:
        pull = torch.func.vjp(inverse, {n: point[n].to(given[n].dtype) for n in given})[1]
        return pull(given)[0]

    def square(given: Tensors) -> Tensors:
        return {n: g.square() for n, g in gradient({n: v.sqrt() for n, v in given.items()}).items()}

    return Transport(gradient, square if monomial else None)


def sliced_transport(slices: Mapping[str, Callable[[Tensor], Tensor]]) -> Transport:
    """Transport where units are cut: every buffer keeps the entries its weight keeps."""

    def cut(given: Tensors) -> Tensors:
        return {n: slices[n](v) if n in slices else v for n, v in given.items()}

    return Transport(cut, cut)


@dataclass(frozen=True)
class Moved:
    """What happened to an optimiser's state: parameters whose state moved, and those whose state starts afresh."""

    moved: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()


def move_state(optimizer: Optimizer, named: Mapping[str, Tensor], transport: Transport | None, unknown: str = "error") -> Moved:
    """Move an optimiser's state along with its weights, in place; call it with the old parameters still in the optimiser.

    Args:
        optimizer: any of torch.optim's that keep one state for each parameter, or parasym.optim.LaProp.
        named: the edited parameters, name -> the tensor the optimiser knows.
        transport: how buffers move; ``None``: the state of the edited parameters starts afresh.
        unknown: for a buffer of unknown meaning, "error" or "reset".

    Raises:
        InputError: an optimiser whose state cannot be read, with ``unknown="error"``.
    """
    table = laws_of(optimizer)
    states = {n: optimizer.state[p] for n, p in named.items() if optimizer.state.get(p)}
    if not states:
        return Moved()
    strange = refuse_unknown(optimizer, named, unknown)
    like = {n: _shaped(s, named[n]) for n, s in states.items()}
    keys = {k: table[k] for n in like for k in like[n]} if table is not None and not strange else {}
    if not keys or transport is None or (transport.square is None and any(law != "gradient" for law in keys.values())):
        for n in states:
            optimizer.state.pop(named[n])
        return Moved(reset=tuple(states))
    moved = {key: _moved(key, law, states, named, transport) for key, law in keys.items()}
    for key, values in moved.items():
        for n, s in states.items():
            if key in s:
                s[key] = values[n].to(s[key].dtype).contiguous()
    return Moved(moved=tuple(states))


def refuse_unknown(optimizer: Optimizer, named: Mapping[str, Tensor], unknown: str = "error") -> list[str]:
    """Buffers of unknown meaning among the state of some parameters, of which there must be none unless they may be reset.

    Raises:
        InputError: a state that cannot be read, with ``unknown="error"``.
    """
    table = laws_of(optimizer)
    states = {n: optimizer.state[p] for n, p in named.items() if optimizer.state.get(p)}
    strange = sorted({k for n, s in states.items() for k in _shaped(s, named[n]) if table is None or k not in table})
    if states and (table is None or strange) and unknown != "reset":
        what = f"its buffers {', '.join(strange)}" if strange else "its state"
        raise InputError(
            f"{type(optimizer).__name__} is not an optimiser whose state parasym can move ({what}): "
            "pass unknown='reset' to start the state of the edited parameters afresh, or apply the edit before the optimiser is made."
        )
    return strange


def _shaped(state: Mapping[str, Any], like: Tensor) -> set[str]:
    """The buffers of a state that have one number for each of the parameter's."""
    return {k for k, v in state.items() if isinstance(v, Tensor) and v.shape == like.shape and v.dim()}


def laws_of(optimizer: Optimizer) -> dict[str, Law] | None:
    """Buffer -> its law, for an optimiser of a known class (or a subclass of one); ``None`` for any other."""
    if isinstance(optimizer, LaProp):
        # exp_mean_avg_beta2 is a mean of gradients (the centred form); exp_avg holds gradients already divided
        return {"exp_avg": "step", "exp_avg_sq": "square", "max_exp_avg_sq": "square", "exp_mean_avg_beta2": "gradient"}
    for name, table in _LAWS:
        kind = getattr(torch.optim, name, None)
        if kind is not None and isinstance(optimizer, kind):
            return table
    return None


def _moved(key: str, law: Law, states: Mapping[str, dict[str, Tensor]], named: Mapping[str, Tensor], transport: Transport) -> Tensors:
    assert transport.square is not None or law == "gradient"
    old = {n: _buffer(states.get(n), key, p) for n, p in named.items()}
    if law == "gradient":
        return transport.gradient(old)
    square = transport.square
    assert square is not None
    if law == "square":
        return square(old)
    if law == "size":
        return {n: v.sqrt() for n, v in square({n: v.square() for n, v in old.items()}).items()}
    second = {n: _buffer(states.get(n), next((k for k in _SECOND if k in states.get(n, {})), ""), p) for n, p in named.items()}
    raw, new = transport.gradient({n: v * second[n].sqrt() for n, v in old.items()}), square(second)
    return {n: torch.where(v > 0, raw[n] / v.clamp_min(1e-300).sqrt(), torch.zeros_like(v)) for n, v in new.items()}


def _buffer(state: Mapping[str, Tensor] | None, key: str, p: Tensor) -> Tensor:
    """A buffer in float64; zeros where a parameter has none."""
    value = state.get(key) if state else None
    return torch.zeros_like(p, dtype=torch.float64) if value is None else value.detach().double()
