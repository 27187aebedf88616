"""The judge: a finite element is applied, and outputs are compared in float64 on inputs the search never saw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parasym.symmetry.fibre import Sampled
from parasym.symmetry.symmetry import Action, Params

ACCEPT = 1e-10
SIZES = (0.3, 0.1, 0.03, 0.01)  # norms at which a local claim is tried, largest first
MARGIN = 4.0  # and how much smaller than the certified norm an element of it must be


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


def certify_local(action: Action, sampled: Sampled, params: Params, generator: torch.Generator) -> tuple[Certificate, float]:
    """Certificate and radius of what holds at these weights only: the largest size at which no element of eight fails, nor nearer.

    A half-space that one direction in nine leaves at a distance is left at a quarter of it by one in many thousands.
    """
    for size in SIZES:
        each = size / max(1, action.dim) ** 0.5
        certificate = certify(action, sampled, params, generator, elements=8, size=each)
        if certificate.accepted and certify(action, sampled, params, generator, elements=4, size=each / MARGIN).residual <= ACCEPT:
            break
    else:
        certificate = replace(certificate, accepted=False)
    return certificate, size / MARGIN
