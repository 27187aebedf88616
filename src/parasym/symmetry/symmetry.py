"""The currency of the library: a symmetry of a network's parameters, and a set of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        """Return all of ``params`` with the group element applied; nothing is changed in place."""
        return {**params, **self.action.act(params, element)}

    def random_element(self, generator: torch.Generator | None = None, scale: float = 0.5) -> Tensor:
        """Draw an element: Lie-algebra coordinates of standard deviation ``scale``, or the index of a discrete generator."""
        if self.kind == "discrete":
            return torch.randint(max(self.order, 1), (), generator=generator)
        return scale * torch.randn(self.action.dim, generator=generator, dtype=torch.float64)

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
            "name": self.name, "group": self.group, "dim": self.dim, "order": self.order, "kind": self.kind,
            "parameters": list(self.parameters), "level": self.level, "residual": self.residual,
            "certified": self.certified, "where": self.where, "note": self.note,
            "fixed_set": self.fixed_set.description if self.fixed_set else None,
        }


@dataclass(frozen=True)
class SymmetrySet(Sequence[Symmetry]):
    """What discovery found: certified symmetries, what was refuted, what could not be decided."""

    symmetries: tuple[Symmetry, ...]
    refuted: tuple[dict[str, Any], ...] = ()
    undecided: tuple[dict[str, Any], ...] = ()
    approximate: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.symmetries)

    def __getitem__(self, index: Any) -> Any:
        return self.symmetries[index]

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self.symmetries)
