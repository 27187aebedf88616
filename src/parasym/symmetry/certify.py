"""The judge: a finite element is applied, and outputs are compared in float64 on inputs the search never saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parasym.symmetry.fibre import Sampled
from parasym.symmetry.symmetry import Action, Params

ACCEPT = 1e-10


@dataclass(frozen=True)
class Certificate:
    """Outcome of the finite tests of one action.

    Attributes:
        residual: largest relative change of the outputs.
        moved: relative size of the move of the parameters.
        accepted: residual at most 1e-10 and the move not small.
        elements: finite elements tried.
    """

    residual: float
    moved: float
    accepted: bool
    elements: int


def relative_change(before: Tensor, after: Tensor) -> float:
    """Largest change over largest value; infinite where the comparison is not finite."""
    change = float((after - before).abs().max()) / (float(before.abs().max()) + 1e-300)
    return change if change == change else float("inf")


def certify(
    action: Action,
    sampled: Sampled,
    params: Params,
    generator: torch.Generator,
    *,
    elements: int = 2,
    size: float = 0.5,
    accept: float = ACCEPT,
) -> Certificate:
    """Apply random finite elements and compare outputs.

    Args:
        size: norm of the element's coordinates for each generator (a move of order ``size``).
    """
    before = sampled.outputs(params)
    worst, moved = 0.0, float("inf")
    for _ in range(elements):
        element = size * torch.randn(action.dim, generator=generator, dtype=torch.float64)
        new = action.act(params, element)
        after = sampled.outputs({**params, **new})
        worst = max(worst, relative_change(before, after))
        step = max((float((new[n] - params[n]).norm()) / (float(params[n].norm()) + 1e-9) for n in new), default=0.0)
        moved = min(moved, step)
    return Certificate(worst, moved, worst <= accept and moved > 1e-3, elements)
