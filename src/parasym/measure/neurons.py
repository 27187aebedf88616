"""How many neurons of a layer are independent: neither vanishing nor copies of each other.

The measure of stochastic-collapse R7, with its thresholds as arguments: they are conventions, so report a sweep of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from parasym.core.errors import InputError


@dataclass(frozen=True)
class IndependentNeurons:
    """The neurons of one layer, sorted into zeros and groups of copies.

    Attributes:
        width: number of neurons.
        zeros: number of vanishing neurons.
        groups: for each neuron the index of its representative; -1 for a vanishing one.
        independent: number of representatives.
        zero_tol: norm, as a fraction of the largest, below which a neuron counts as vanishing.
        dup_tol: relative squared distance below which two neurons count as copies.
    """

    width: int
    zeros: int
    groups: tuple[int, ...]
    independent: int
    zero_tol: float
    dup_tol: float

    @property
    def fraction(self) -> float:
        """``independent / width``."""
        return self.independent / self.width

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**asdict(self), "fraction": self.fraction}


def neuron_vectors(incoming: Tensor, outgoing: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each neuron's weights as one row: in-weights, bias, out-weights.

    Args:
        incoming: (width, ...) weights that write the neurons: linear, or convolution with its kernel.
        outgoing: (out, width, ...) weights that read them.
        bias: (width,) their bias, if there is one.

    Returns:
        (width, d) rows.

    Raises:
        InputError: the widths differ.
    """
    width = incoming.shape[0]
    if outgoing.shape[1] != width or (bias is not None and bias.shape != (width,)):
        raise InputError(
            f"the layer writes {width} neurons (incoming {tuple(incoming.shape)}) but the reader is {tuple(outgoing.shape)}"
            f"{'' if bias is None else f' and the bias {tuple(bias.shape)}'}; outgoing must be (out, {width}, ...)"
        )
    columns = [incoming.reshape(width, -1), outgoing.transpose(0, 1).reshape(width, -1)]
    return torch.cat(columns if bias is None else [columns[0], bias.reshape(width, 1), columns[1]], dim=1)


def independent_neurons(vectors: Tensor, zero_tol: float = 0.1, dup_tol: float = 0.1) -> IndependentNeurons:
    """Sort the neurons of a layer into vanishing ones and groups of copies (stochastic-collapse R7).

    A neuron vanishes if |w_j| < zero_tol max_k |w_k|. Among the rest, i and j are copies if
    2 |w_i - w_j|^2 / (|w_i|^2 + |w_j|^2) < dup_tol; groups are made greedily in index order, each neuron joining the first
    representative it is a copy of.

    Args:
        vectors: (width, d) rows, see `neuron_vectors`.
        zero_tol: dimensionless.
        dup_tol: dimensionless.

    Raises:
        InputError: not a matrix, empty, or with entries that are not finite.
    """
    if vectors.ndim != 2 or 0 in vectors.shape or not bool(torch.isfinite(vectors).all()):
        raise InputError(f"expected finite neuron vectors of shape (width, d), got {tuple(vectors.shape)}; see neuron_vectors")
    rows = vectors.detach().double()
    size = rows.square().sum(1)
    alive = size.sqrt() >= zero_tol * size.sqrt().max()
    alive &= size > 0
    close = _relative_distance(rows, size) < dup_tol
    groups = _greedy(close, alive)
    found = len({group for group in groups if group >= 0})
    return IndependentNeurons(len(groups), int((~alive).sum()), groups, found, zero_tol, dup_tol)


def spectral_entropy(weight: Tensor) -> Tensor:
    """-sum p log p of the normalised singular values, in nats, as the official code has it; its exponential is an effective rank.

    Args:
        weight: (..., m, n).
    """
    values = torch.linalg.svdvals(weight.detach().double())
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return -torch.special.xlogy(share, share).sum(-1)


def effective_rank(weight: Tensor) -> Tensor:
    """exp of `spectral_entropy`: between 1 and min(m, n)."""
    return spectral_entropy(weight).exp()


def _relative_distance(rows: Tensor, size: Tensor) -> Tensor:
    squared = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return 2 * squared / (size[:, None] + size[None, :]).clamp_min(torch.finfo(torch.float64).tiny)


def _greedy(close: Tensor, alive: Tensor) -> tuple[int, ...]:
    groups, representatives = [-1] * len(alive), list[int]()
    for index in alive.nonzero().flatten().tolist():
        joined = next((leader for leader in representatives if bool(close[index, leader])), None)
        if joined is None:
            representatives.append(index)
        groups[index] = index if joined is None else joined
    return tuple(groups)


def layer_independence(
    layers: Mapping[str, tuple[Tensor, Tensor | None, Tensor]], zero_tol: float = 0.1, dup_tol: float = 0.1
) -> dict[str, IndependentNeurons]:
    """`independent_neurons` for each layer, given as name -> (incoming, bias or None, outgoing)."""
    return {
        name: independent_neurons(neuron_vectors(incoming, outgoing, bias), zero_tol, dup_tol)
        for name, (incoming, bias, outgoing) in layers.items()
    }
