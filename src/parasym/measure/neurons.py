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
from parasym.core.graph import Graph
from parasym.measure.copies import raw_blocks
from parasym.measure.findings import Row, finding
from parasym.measure.slices import CHUNK, Read
from parasym.measure.units import find_layers
from parasym.symmetry.spaces import Spaces


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
    alive = (size.sqrt() >= zero_tol * size.sqrt().max()) & (size > 0)
    groups, leaders = torch.full((len(rows),), -1), list[int]()
    step = max(1, CHUNK // len(rows))
    for at in range(0, len(rows), step):  # a block of the matrix of distances at a time
        total = size[at : at + step, None] + size[None, :]
        close = 2 * (total - 2 * rows[at : at + step] @ rows.T) / total.clamp(min=1e-300) < dup_tol
        for k in range(len(close)):
            if not alive[at + k]:
                continue
            hit = close[k, leaders].nonzero() if leaders else torch.zeros(0)
            groups[at + k] = leaders[int(hit[0])] if len(hit) else at + k
            if not len(hit):
                leaders.append(at + k)
    return IndependentNeurons(len(rows), int((~alive).sum()), tuple(groups.tolist()), len(leaders), zero_tol, dup_tol)


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


def independent_units(
    graph: Graph, spaces: Spaces, read: Read, zero_tol: float = 0.1, dup_tol: float = 0.1
) -> dict[str, IndependentNeurons]:
    """How many units of each layer are independent, as stochastic-collapse R7 counts them.

    Args:
        graph, spaces: a traced graph and its index spaces.
        read: name -> parameter.
        zero_tol, dup_tol: as in :func:`independent_neurons`; conventions, so report a sweep.
    """
    out = {}
    for layer in find_layers(graph, spaces):
        blocks = raw_blocks(layer, read)
        if blocks is not None and blocks.outside:
            every = torch.arange(layer.size)
            rows = torch.cat([b.rows(every) for b in (*blocks.inside, *blocks.outside)], 1)
            out[layer.where] = independent_neurons(rows, zero_tol, dup_tol)
    return out


def r7_rows(found: Mapping[str, IndependentNeurons], tolerances: tuple[float, float]) -> list[Row]:
    """Rows of :func:`independent_units`, for layers where not all are independent."""
    rows = []
    for where, r in found.items():
        lost = [i for i, g in enumerate(r.groups) if g != i]
        if lost:
            note = f"stochastic-collapse R7: {r.independent} of {r.width} independent, {r.zeros} vanishing "
            note += f"(zero_tol {tolerances[0]:g}, dup_tol {tolerances[1]:g}: conventions, report a sweep)"
            rows.append(finding("duplicate", where, lost, r.width, None, 0, note, []))
    return rows
