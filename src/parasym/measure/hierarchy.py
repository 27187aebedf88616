"""How symmetric a state is: distances to the collapsed sets of its symmetries over a run, and what layers do to their features.

Source: parameter-symmetry-unifies (setup, R3-R5d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.symmetry.symmetry import Params, Symmetry


@dataclass(frozen=True)
class Event:
    """A collapsed state that was left ("break") or reached ("restore") at a step."""

    step: int
    symmetry: str
    label: str
    kind: str


@dataclass
class SymmetryTracker:
    """Record how far a run is from every collapsed state of some symmetries; call `observe` in the training loop.

    Distances are the relative ones of each symmetry's fixed set (0: collapsed). Non-compact orbits fake a distance: balance first.

    Attributes:
        symmetries: those with a fixed set are followed.
        steps, losses: as observed.
        distances: symmetry name -> one (n,) tensor for each observation.
    """

    symmetries: Sequence[Symmetry]
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    distances: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.symmetries = [s for s in self.symmetries if s.fixed_set is not None]
        if not self.symmetries:
            raise InputError("None of these symmetries has a collapsed state to follow.")
        self.distances = {s.name: [] for s in self.symmetries}

    @torch.no_grad()
    def observe(self, step: int, params: Params, loss: float = float("nan")) -> None:
        """Measure now; parameters are read, never changed."""
        values = {n: p.detach() for n, p in params.items()}
        self.steps.append(step)
        self.losses.append(float(loss))
        for s in self.symmetries:
            assert s.fixed_set is not None
            self.distances[s.name].append(s.fixed_set.distance(values).cpu())

    def level(self, tol: float = 0.1) -> dict[str, list[int]]:
        """How many states of each symmetry are collapsed (distance below ``tol``) at each observation."""
        return {name: [int((d < tol).sum()) for d in rows] for name, rows in self.distances.items()}

    def events(self, low: float = 0.05, high: float = 0.2) -> list[Event]:
        """When states were left or reached, with hysteresis: collapsed below ``low``, broken above ``high``, in between as before."""
        out = []
        for s in self.symmetries:
            assert s.fixed_set is not None
            rows = self.distances[s.name]
            collapsed = rows[0] < high
            for step, d in zip(self.steps[1:], rows[1:], strict=True):
                now = torch.where(d < low, True, torch.where(d > high, False, collapsed))
                for k in (now != collapsed).nonzero()[:, 0].tolist():
                    label = s.fixed_set.labels[k] if k < len(s.fixed_set.labels) else str(k)
                    out.append(Event(step, s.name, label, "restore" if bool(now[k]) else "break"))
                collapsed = now
        return sorted(out, key=lambda e: e.step)


def distinct_directions(rows: Tensor, active: float, cosine: float = 0.95) -> int:
    """Number of distinct directions among the rows of norm above ``active``; w and -w count as one (odd activations).

    Args:
        rows: (units, d).
        active: in the units of the rows.
        cosine: two directions with |cos| above it are one; greedy, in index order.
    """
    alive = rows[rows.norm(dim=1) > active]
    alive = torch.nn.functional.normalize(alive, dim=1)
    leaders: list[Tensor] = []
    for row in alive:
        if not leaders or float((torch.stack(leaders) @ row).abs().max()) <= cosine:
            leaders.append(row)
    return len(leaders)


def within_over_between(features: Tensor, labels: Tensor) -> Tensor:
    """NC1 = tr S_w / tr S_b: spread within classes over spread of their means; (...,) from features (..., n, d) and labels (n,)."""
    classes = torch.nn.functional.one_hot(labels).to(features)
    count = classes.sum(0).clamp_min(1)
    means = (classes.T @ features) / count[:, None]
    within = (features - means[..., labels, :]).square().sum((-1, -2)) / len(labels)
    centre = features.mean(-2, keepdim=True)
    between = ((means - centre).square().sum(-1) * count).sum(-1) / len(labels)
    return within / between.clamp_min(torch.finfo(features.dtype).tiny)


def feature_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the squared singular values of centred features (..., n, d)."""
    centred = features - features.mean(-2, keepdim=True)
    power = torch.linalg.svdvals(centred.double()).square()
    share = power / power.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (-torch.special.xlogy(share, share).sum(-1)).exp()


def gram_agreement(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of the centred Gram matrices (n, n) of two feature sets over the same n samples (linear CKA), 1 for equal geometry."""
    grams = []
    for features in (one, other):
        centred = features.double() - features.double().mean(0)
        grams.append(centred @ centred.T)
    a, b = grams
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300)


def effective_parameters(distinct: Mapping[str, tuple[int, int]]) -> int:
    """N_eff = sum over layers distinct_out (distinct_in + 1), from name -> (distinct_in, distinct_out)."""
    return sum(out * (into + 1) for into, out in distinct.values())
