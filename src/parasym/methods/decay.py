"""How an optimiser's weight decay enters its step: in the gradient, or beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from parasym.core.errors import InputError
from parasym.optim import LaProp

Decay = Literal["l2", "decoupled"]

_L2 = ("SGD", "Adam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "NAdam", "RAdam")
_DECOUPLED = ("AdamW", "Adafactor", "Muon")
_NONE = ("LBFGS", "Rprop", "SparseAdam")


def decay_of(optimizer: Optimizer, group: Mapping[str, Any], told: Decay | None = None) -> Decay:
    """How a group's ``weight_decay`` acts: "l2" adds it times the weight to the gradient, "decoupled" shrinks the weight itself.

    Args:
        told: the answer for an optimiser of an unknown class; overrides nothing that is known.

    Raises:
        InputError: the optimiser has no weight decay, or its class is unknown and ``told`` is None.
    """
    if isinstance(optimizer, LaProp):
        return "l2" if group["decoupled"] == "l2" else "decoupled"
    if group.get("decoupled_weight_decay"):
        return "decoupled"
    for names, kind in ((_DECOUPLED, "decoupled"), (_L2, "l2")):
        for name in names:
            known = getattr(torch.optim, name, None)
            if known is not None and isinstance(optimizer, known):
                if kind == "decoupled" and group.get("decoupled_weight_decay") is False:
                    return "l2"
                return kind  # type: ignore[return-value]
    if type(optimizer).__name__ in _NONE or "weight_decay" not in group:
        raise InputError(f"{type(optimizer).__name__} has no weight decay: use one that has, or add a penalty to the loss.")
    if told is None:
        raise InputError(
            f"{type(optimizer).__name__} is an optimiser of an unknown class: say how its weight decay acts, decay='l2' "
            "(added to the gradient) or decay='decoupled' (p shrinks by lr * weight_decay)."
        )
    return told


def decay_rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """The share of a weight that one decoupled step takes away: lr * weight_decay, or weight_decay alone for the authors' LaProp."""
    if isinstance(optimizer, LaProp) and group["decoupled"] == "official":
        return group["weight_decay"]
    return group["lr"] * group["weight_decay"]
