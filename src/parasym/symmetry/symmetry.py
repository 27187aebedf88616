"""The currency of the library: a symmetry of a network's parameters, and a set of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Level = Literal["function", "train", "loss"]
Kind = Literal["pure", "translation", "diagonal", "linear", "affine", "discrete", "point", "blind"]


class Action(Protocol):
    """How the elements of a group move parameters.

    ``element`` is a flat tensor of coordinates: Lie-algebra coordinates (zero is the identity) for a continuous action,
    an index into the group's generators for a discrete one.
    """

    dim: int

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        """Return the moved parameters (only those that move); the finite action, not its tangent."""
        ...

    def generators(self, params: Params) -> dict[str, Tensor]:
        """Return the tangents at the identity: for each parameter it moves, a tensor (dim, *parameter.shape)."""
        ...


@dataclass(frozen=True)
class FixedSet:
    """The states a symmetry cannot tell from their image: a collapsed sub-network.

    Attributes:
        description: what collapses there, in words ("unit j is zero", "units i and j are equal", "rank drop").
        distance: params -> (n,) relative distances, one for each unit, head or pair; 0 means collapsed.
        project: (params, index) -> the moved parameters, put exactly on the index-th fixed set.
        labels: n names, one for each entry of ``distance``.
    """

    description: str
    distance: Callable[[Params], Tensor]
    project: Callable[[Params, int], dict[str, Tensor]]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Symmetry:
    """A group that moves parameters and leaves the network's function (or its loss) unchanged.

    Attributes:
        name: what it is, in the field's words, and where ("QK GL(2) per head: h.0.attn").
        group: the group, "GL(2)^2", "R+^6", "S_6", "Z2^4", "R^4".
        dim: dimension of the tangent space it adds at a generic point (0 for a discrete group).
        order: for a discrete group, its number of generators; 0 for a continuous one.
        kind: pure (no activation moves) | translation | diagonal | linear | affine | discrete | point (only at these
            weights) | blind (found from the Jacobian alone).
        parameters: the parameters it moves.
        level: what stays unchanged: "function" | "train" (train-mode function) | "loss".
        residual: largest relative change of the outputs under random finite elements, in float64, on fresh inputs.
        certified: ``residual`` is at most 1e-10 and the move was not small.
        where: module path the parameters share.
        action: how its elements move parameters.
        fixed_set: the collapsed states, where there are any.
        note: assumptions and caveats (domain it was certified on, eps, dead gradient, ...).
        radius: largest norm of an element's coordinates that the claim covers: what is true at these weights only ends
            where a unit wakes or a kink is crossed; infinite for a group.
    """

    name: str
    group: str
    dim: int
    kind: Kind
    parameters: tuple[str, ...]
    level: Level
    residual: float
    certified: bool
    action: Action = field(repr=False)
    where: str = ""
    order: int = 0
    fixed_set: FixedSet | None = field(default=None, repr=False)
    note: str = ""
    radius: float = math.inf

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        """Return all of ``params`` with the group element applied; nothing is changed in place."""
        return {**params, **self.action.act(params, element)}

    def random_element(self, generator: torch.Generator | None = None, scale: float = 0.5) -> Tensor:
        """Draw an element: Lie-algebra coordinates of standard deviation ``scale``, or the index of a discrete generator.

        Coordinates longer than the symmetry's radius are shortened to it.
        """
        if self.kind == "discrete":
            return torch.randint(max(self.order, 1), (), generator=generator)
        element = scale * torch.randn(self.action.dim, generator=generator, dtype=torch.float64)
        return element * min(1.0, self.radius / max(float(element.norm()), 1e-300))

    def generators(self, params: Params) -> dict[str, Tensor]:
        """Tangents at the identity, (dim, *shape) for each parameter that moves."""
        return self.action.generators(params)

    def charge(self, params: Params) -> Tensor | None:
        """Noether charges conserved by gradient flow, one for each generator with a symmetric linear part or a translation.

        A linear generator A (xi = A theta, A symmetric) has Q = theta.A theta / 2; a translation b has Q = b.theta
        (equivariance-toolbox R6). ``None`` where Noether gives none (rotations, discrete groups, fibres).
        """
        charge = getattr(self.action, "charge", None)
        return charge(params) if charge is not None else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, without the functions."""
        return {
            "name": self.name,
            "group": self.group,
            "dim": self.dim,
            "order": self.order,
            "kind": self.kind,
            "parameters": list(self.parameters),
            "level": self.level,
            "residual": self.residual,
            "certified": self.certified,
            "where": self.where,
            "note": self.note,
            "fixed_set": self.fixed_set.description if self.fixed_set else None,
            "radius": self.radius if math.isfinite(self.radius) else None,
        }


@dataclass(frozen=True)
class Classified:
    """What is known of one parameter.

    Attributes:
        kind: "symmetric": a certified symmetry moves it (all of it or a part); "rigid": nothing does, and that is proven;
            "undecided": neither is known.
        size: how many numbers it holds.
        why: the proof that it is rigid, or what stood in the way of a decision.
        by: names of the certified symmetries that move it.
    """

    kind: Literal["symmetric", "rigid", "undecided"]
    size: int
    why: str = ""
    by: tuple[str, ...] = ()


@dataclass(frozen=True)
class SymmetrySet(Sequence[Symmetry]):
    """What discovery found: certified symmetries, what was refuted, what could not be decided.

    Attributes:
        rest: for every trainable parameter what it is where no certified symmetry moves it: rigid or undecided
            (:mod:`parasym.symmetry.rigid`).
    """

    symmetries: tuple[Symmetry, ...]
    refuted: tuple[dict[str, Any], ...] = ()
    undecided: tuple[dict[str, Any], ...] = ()
    approximate: tuple[dict[str, Any], ...] = ()
    rest: Mapping[str, Classified] = field(default_factory=dict, repr=False)

    def classify(self) -> dict[str, Classified]:
        """Every trainable parameter: symmetric, rigid, or undecided with the reason; none is left out."""
        by: dict[str, dict[str, None]] = {}
        for s in self.symmetries:
            for p in s.parameters if s.certified else ():
                by.setdefault(p, {})[s.name] = None
        return {n: replace(c, kind="symmetric", why="", by=tuple(by[n])) if n in by else c for n, c in self.rest.items()}

    def counts(self) -> dict[str, int]:
        """Numbers in symmetric, rigid and undecided parameters; they add up to all trainable ones."""
        classes = self.classify().values()
        return {kind: sum(c.size for c in classes if c.kind == kind) for kind in ("symmetric", "rigid", "undecided")}

    def reasons(self) -> list[dict[str, Any]]:
        """Why parameters stayed undecided: each reason with the numbers and the parameters it concerns, the most first."""
        out: dict[str, dict[str, Any]] = {}
        for name, c in self.classify().items():
            if c.kind == "undecided":
                row = out.setdefault(c.why, {"why": c.why, "count": 0, "parameters": []})
                row["count"] += c.size
                row["parameters"].append(name)
        return sorted(out.values(), key=lambda row: -row["count"])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, without the functions."""
        return {
            "symmetries": [s.to_dict() for s in self.symmetries], "refuted": list(self.refuted), "undecided": list(self.undecided),
            "approximate": list(self.approximate), "classified": self.counts(), "reasons": self.reasons(),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.symmetries)

    def __getitem__(self, index: Any) -> Any:
        return self.symmetries[index]

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self.symmetries)
