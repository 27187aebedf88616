"""Statistics of layers, units and heads: norms, gradient noise, and how evenly the two sides of a rescaling share them.

At the noise equilibrium of a rescaling the gradient's second moment is the same on both sides; under gradient flow it is the
difference of squared weights that stays (law-of-balance R1, neural-thermodynamics R5). These meters need the moments of the
gradient only, so they work with or without the symmetry being exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import plain
from parasym.measure.gradients import GradientMoments

Part = tuple[str, int]


@dataclass(frozen=True)
class LayerRow:
    """One parameter tensor.

    Attributes:
        weight, gradient: Euclidean norms of the weights and of the mean gradient.
        energy: E|g|^2 of one sample (or unit of the moments). noise: its part that is variance.
        scale: noise / |gradient|^2, the batch size at which the two are equal.
        angle: |<weights, gradient>| / (norms): zero for a scale-invariant tensor.
    """

    name: str
    size: int
    weight: float
    gradient: float
    energy: float
    noise: float
    scale: float
    angle: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return plain(self.__dict__)  # type: ignore[no-any-return]


def layers(params: Mapping[str, Tensor], moments: GradientMoments) -> list[LayerRow]:
    """One row for each parameter tensor.

    Raises:
        InputError: the moments hold no squares.
    """
    if not moments.square:
        raise InputError("The moments hold no squares: compute them with gradient_moments(..., squares=True).")
    out = []
    for name, mean in moments.mean.items():
        w, g2, energy = params[name].detach().double(), float(mean.square().sum()), float(moments.square[name].sum())
        size, slope = float(w.norm()), g2**0.5
        angle = abs(float((w * mean).sum())) / (size * slope) if size * slope > 0 else 0.0
        scale = max(energy - g2, 0.0) / g2 if g2 > 0 else float("inf")
        out.append(LayerRow(name, w.numel(), size, slope, energy, max(energy - g2, 0.0), scale, angle))
    return out


@dataclass(frozen=True, eq=False)
class UnitBalance:
    """The two sides of each unit's rescaling, (units,) each.

    Attributes:
        inward, outward: sums of squared weights. noise_in, noise_out: sums of E g^2.
    """

    inward: Tensor
    outward: Tensor
    noise_in: Tensor
    noise_out: Tensor

    @property
    def weights(self) -> Tensor:
        """(in - out) / (in + out) of squared weights: 0 where the two sides are equally large."""
        return _ratio(self.inward, self.outward)

    @property
    def noise(self) -> Tensor:
        """(in - out) / (in + out) of the gradient's second moments: 0 at the noise equilibrium, +-1 where one side is dead."""
        return _ratio(self.noise_in, self.noise_out)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return plain({"weights": self.weights, "noise": self.noise})  # type: ignore[no-any-return]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a + b > 0, (a - b) / (a + b).clamp_min(1e-300), torch.zeros_like(a))


def units(
    params: Mapping[str, Tensor], second: Mapping[str, Tensor], inward: Sequence[str | Part], outward: Sequence[str | Part]
) -> UnitBalance:
    """The balance of the units that run over one axis of each parameter.

    Args:
        params: name -> weights. second: name -> E g^2 entry by entry (``moments.square``, or ``moments.second(S)`` for batches).
        inward, outward: parameters, each with the axis over the units (0 for inward, 1 for outward if not given).

    Raises:
        InputError: unknown names, or axes of different lengths.
    """
    sides: list[list[Tensor]] = []
    for group, default in ((inward, 0), (outward, 1)):
        rows = []
        for item in group:
            name, axis = (item, default) if isinstance(item, str) else item
            if name not in params or name not in second:
                raise InputError(f"There is no trainable parameter {name!r}.")
            axis = min(axis, params[name].ndim - 1)
            over = [i for i in range(params[name].ndim) if i != axis]
            pair = params[name].detach().double().square(), second[name].double()
            rows.append(torch.stack([t.sum(over) if over else t for t in pair]))
        if len({r.shape[1] for r in rows}) > 1:
            raise InputError(f"The axes of {[str(i) for i in group]} have different lengths: each must run over the units.")
        sides.append(rows)
    a, b = (torch.stack(rows).sum(0) for rows in sides)
    if a.shape != b.shape:
        raise InputError(f"There are {a.shape[1]} units inward and {b.shape[1]} outward.")
    return UnitBalance(a[0], b[0], a[1], b[1])


@dataclass(frozen=True)
class HeadRow:
    """One attention head: Frobenius norms of the two factors of a product, and what the product looks like.

    Attributes:
        left, right: norms of the factors. product: norm of their product. rank: effective rank (tr S)^2 / tr S^2 of its singular values.
        imbalance: |L L^T - R^T R|_F / (|L L^T|_F + |R^T R|_F) over the inner axis: 0 for balanced factors.
    """

    head: int
    left: float
    right: float
    product: float
    rank: float
    imbalance: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return plain(self.__dict__)  # type: ignore[no-any-return]


def heads(left: Tensor, right: Tensor, count: int) -> list[HeadRow]:
    """Statistics of each head's product left_h^T right_h: query and key, or value and (transposed) output.

    Args:
        left, right: (heads x width, d) weights, head by head along the first axis, as in ``nn.Linear``; give an output projection as
            ``o.weight.T``.
        count: number of heads.

    Raises:
        InputError: the first axis does not divide into heads, or the two differ in it.
    """
    if left.shape[0] != right.shape[0] or left.shape[0] % count:
        raise InputError(f"{left.shape[0]} and {right.shape[0]} rows do not make {count} equal heads.")
    out = []
    for h, (a, b) in enumerate(zip(left.detach().double().chunk(count), right.detach().double().chunk(count), strict=True)):
        s = torch.linalg.svdvals(a.T @ b)
        A, B = a @ a.T, b @ b.T
        rank = float(s.sum().square() / s.square().sum().clamp_min(1e-300))
        out.append(HeadRow(h, float(a.norm()), float(b.norm()), float(s.norm()), rank, float((A - B).norm() / (A.norm() + B.norm()))))
    return out
