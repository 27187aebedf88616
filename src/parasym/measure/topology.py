"""The shape of the cloud of neurons: distinct points, persistent homology, orders, crossings, and what a step does to them.

A layer of n interchangeable neurons is a cloud of n points in the space of everything that belongs to one of them. A step that is
equivariant under exchanges and Lipschitz enough cannot merge, fold or tear the cloud.

Homology is computed by GUDHI (``pip install 'parasym[topology]'``), Vietoris-Rips filtration by diameter.

Source: topological-invariance, measures, R1-R3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parasym.core.errors import InputError, MissingExtraError
from parasym.core.results import Estimate, Status


@dataclass(frozen=True)
class Barcode:
    """Persistent homology of a cloud.

    Attributes:
        bars: dimension -> (k, 2) births and deaths (inf: never), in the units of the cloud, longest first.
        diameter: largest distance in the cloud.
    """

    bars: dict[int, Tensor]
    diameter: float

    def betti(self, dim: int, scale: float) -> int:
        """Betti number at a scale, in units of the diameter: bars of this dimension alive there."""
        at, found = scale * self.diameter, self.bars.get(dim, torch.zeros(0, 2))
        return int(((found[:, 0] <= at) & (at < found[:, 1])).sum())

    def lengths(self, dim: int) -> Tensor:
        """Lengths of the bars, longest first; an endless one counts up to the diameter."""
        found = self.bars.get(dim, torch.zeros(0, 2, dtype=torch.float64))
        return (found[:, 1].clamp(max=self.diameter) - found[:, 0]).sort(descending=True).values


def barcode(cloud: Tensor, dims: Sequence[int] = (0, 1)) -> Barcode:
    """Persistent homology of a cloud of points (n, m), over Z/2, Vietoris-Rips up to the enclosing radius.

    Raises:
        InputError: not a finite matrix of at least two points.
        MissingExtraError: GUDHI is not installed.
    """
    points = _cloud(cloud)
    try:
        import gudhi  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingExtraError("persistent homology is computed by GUDHI: pip install 'parasym[topology]'") from error
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    enclosing = float(distances.amax(1).min())  # beyond it the complex is a cone
    complex_ = gudhi.RipsComplex(distance_matrix=distances.numpy(), max_edge_length=enclosing * (1 + 1e-12))
    tree = complex_.create_simplex_tree(max_dimension=1)
    if max(dims) > 0:
        tree.collapse_edges(nb_iterations=3)
        tree.expansion(max(dims) + 1)
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=max(dims) >= 1)
    bars = {}
    for d in dims:
        found = np.asarray(tree.persistence_intervals_in_dimension(d), dtype=np.float64).reshape(-1, 2)
        found = found[np.argsort(-(np.minimum(found[:, 1], 1e300) - found[:, 0]), kind="stable")]
        bars[d] = torch.from_numpy(found)
    return Barcode(bars, float(distances.max()))


def components(cloud: Tensor, tol: float) -> list[list[int]]:
    """Single-linkage clusters: points joined by steps of at most ``tol`` times the diameter; ``tol`` 0: points that coincide.

    One tolerance is not topology (distances shrink below the critical step size, too): report the barcode of dimension 0 beside it.
    """
    points = _cloud(cloud)
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    distances = pdist(points.numpy())
    labels = fcluster(linkage(distances, "single"), tol * distances.max(), "distance")
    out: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        out.setdefault(label, []).append(i)
    return sorted(out.values())


def distinct(cloud: Tensor, tol: float = 0.0) -> int:
    """How many clusters :func:`components` finds."""
    return len(components(cloud, tol))


def crossings(before: Tensor, after: Tensor) -> int:
    """Neighbours of a line of points (n,) that changed their order, counted in the order they had before.

    Raises:
        InputError: not two finite lines (n,) of the same length.
    """
    if before.dim() != 1 or before.shape != after.shape or not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise InputError(f"expected two finite lines of points (n,), got {tuple(before.shape)} and {tuple(after.shape)}.")
    order = before.argsort()
    return int((after[order].diff() < 0).sum())


def bilipschitz(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Smallest and largest ratio by which a step changed the distance of two neurons (pairs at distance zero are left out).

    Raises:
        InputError: not two finite clouds (n, m) of the same shape, or all points of the first coincide.
    """
    first, second = _cloud(before), _cloud(after)
    if first.shape != second.shape:
        raise InputError(f"the clouds before and after must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}.")
    a, b = torch.pdist(first), torch.pdist(second)
    if not bool((a > 0).any()):
        raise InputError("all points of the first cloud coincide: there is no distance whose change could be given.")
    ratio = b[a > 0] / a[a > 0]
    return float(ratio.min()), float(ratio.max())


def self_intersections(polygon: Tensor) -> int:
    """Pairs of edges of a closed polygon (n, 2) that cross; edges that share a corner do not count.

    Raises:
        InputError: not finite points of the plane.
    """
    if polygon.dim() != 2 or polygon.shape[1] != 2 or not bool(torch.isfinite(polygon).all()):
        raise InputError(f"expected finite corners (n, 2), got {tuple(polygon.shape)}{_nonfinite(polygon)}.")
    p, q = polygon.double(), polygon.double().roll(-1, 0)
    n = len(p)
    d = q - p

    def side(a: Tensor, u: Tensor, b: Tensor) -> Tensor:
        """(n, n) on which side of line i (a_i, direction u_i) point b_j lies."""
        w = b[None] - a[:, None]
        return u[:, None, 0] * w[..., 1] - u[:, None, 1] * w[..., 0]

    start, end = side(p, d, p), side(p, d, q)
    split = start * end < 0  # edge j is split by line i
    hit = split & split.T
    i, j = torch.triu_indices(n, n, 2)
    apart = ~((i == 0) & (j == n - 1))
    return int(hit[i[apart], j[apart]].sum())


def orientation_flips(jacobians: Tensor) -> int:
    """Neurons at which the step map turns space inside out: det B_i <= 0 of (n, m, m) Jacobians. Source: topological-invariance R3.

    Raises:
        InputError: not finite square matrices (n, m, m).
    """
    if jacobians.dim() != 3 or jacobians.shape[-1] != jacobians.shape[-2] or not bool(torch.isfinite(jacobians).all()):
        raise InputError(f"expected finite Jacobians (n, m, m), got {tuple(jacobians.shape)}{_nonfinite(jacobians)}.")
    return int((torch.linalg.det(jacobians.double()) <= 0).sum())


# ------------------------------------------------------------------------------------------------ the critical step size


Loss = Callable[[Tensor], Tensor]
_SMALL = 64  # width of a neuron up to which Mbar is formed, not only applied


def pair_hessians(loss: Loss, cloud: Tensor, pairs: Tensor, nodes: int = 96) -> Tensor:
    """Mbar_ij = int_0^1 (H_ii - H_ij) ds along the segment from the cloud with i and j exchanged to the cloud: (p, m, m).

    A step of descent moves the difference of two neurons by exactly (I - eta Mbar_ij).

    Args:
        loss: (n, m) cloud -> number, unchanged when neurons are exchanged; torch operations that ``vmap`` knows.
        pairs: (p, 2) indices.
        nodes: of the Gauss-Legendre rule; 96 leave 1e-14 where the activation saturates.

    Raises:
        InputError: not a finite cloud of at least two points, no nodes, or indices that are not in the cloud.

    Source: topological-invariance R1.
    """
    _cloud(cloud)
    if nodes < 1:
        raise InputError(f"nodes must be a positive whole number, got {nodes!r}.")
    if pairs.dim() != 2 or pairs.shape[1] != 2 or (len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < len(cloud)):
        raise InputError(f"pairs must be (p, 2) indices of the {len(cloud)} points.")
    basis = torch.eye(cloud.shape[1], dtype=cloud.dtype)
    return torch.func.vmap(lambda v: _along(loss, cloud, pairs, v.expand(len(pairs), -1), nodes), out_dims=2, chunk_size=8)(basis)


def _along(loss: Loss, cloud: Tensor, pairs: Tensor, v: Tensor, nodes: int) -> Tensor:
    """Mbar_ij v for every pair, (p, m)."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    s, weights = (torch.tensor(t, dtype=cloud.dtype) for t in ((x + 1) / 2, w / 2))
    one_hot = torch.nn.functional.one_hot(pairs, len(cloud)).to(cloud.dtype)  # (p, 2, n)
    first, apart = one_hot[:, 0], one_hot[:, 0] - one_hot[:, 1]
    step = torch.einsum("pn,nm->pm", apart, cloud)  # theta_i - theta_j
    gradient = torch.func.grad(loss)

    def product(first: Tensor, apart: Tensor, step: Tensor, v: Tensor, s: Tensor) -> Tensor:
        point = cloud - (1 - s) * apart[:, None] * step
        return first @ torch.func.jvp(gradient, (point,), (apart[:, None] * v,))[1]

    over_nodes = torch.func.vmap(product, (None, None, None, None, 0))
    values = torch.func.vmap(over_nodes, (0, 0, 0, 0, None), chunk_size=64)(first, apart, step, v, s)  # (p, nodes, m)
    return torch.einsum("k,pkm->pm", weights, values)


def critical_rate(
    loss: Loss,
    cloud: Tensor,
    *,
    nodes: int = 12,
    pairs: int = 256,
    iterations: int = 20,
    generator: torch.Generator | None = None,
    tol: float = 1e-3,
) -> Estimate:
    """eta* = 1 / K: below it one step of descent keeps every pair of neurons apart.

    K is the largest eigenvalue of Mbar over pairs. It is local: it belongs to this cloud (no global one exists for saturating
    activations).

    Args:
        loss: (n, m) cloud -> number.
        nodes: on the path between a pair, to begin with; doubled (three times at most) until K moves by less than ``tol`` of itself.
        pairs: if the cloud has more, so many are drawn: K is then a lower bound, eta* an upper one.
        iterations: of the power method, where a neuron has more than 64 numbers.
        generator: of the drawn pairs and of the starts of the power method; None: seed 0.

    Returns:
        eta*; its residual is what the last doubling of the nodes moved, plus what the last iteration did; ``not_converged`` where the
        doublings end above ``tol``; ``not_applicable`` where nothing contracts. ``details``: K and its pair, how many pairs of how
        many, nodes.

    Raises:
        InputError: not a finite cloud of at least two points, or a loss whose second derivatives there are not finite.

    Source: topological-invariance R2, R3.
    """
    _cloud(cloud)
    if nodes < 1 or pairs < 1 or iterations < 1 or not tol > 0:
        raise InputError(f"nodes {nodes!r}, pairs {pairs!r}, iterations {iterations!r} and tol {tol!r} must be positive.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    every = torch.combinations(torch.arange(len(cloud)))
    chosen = every if len(every) <= pairs else every[torch.randperm(len(every), generator=generator)[:pairs]]
    stream = generator.get_state()
    coarse, _ = _tops(loss, cloud, chosen, nodes, iterations, generator)
    gap, residual = math.inf, 0.0
    for _ in range(3):
        nodes *= 2
        generator.set_state(stream)  # the power method starts where it did: what moves is the rule's doing
        top, residual = _tops(loss, cloud, chosen, nodes, iterations, generator)
        gap, coarse = abs(float(top.max() / coarse.max()) - 1) if float(coarse.max()) != float(top.max()) else 0.0, top
        if gap <= tol:
            break
    best = int(coarse.argmax())
    K = float(coarse[best])
    details = {"K": K, "pair": chosen[best].tolist(), "pairs": [len(chosen), len(every)], "nodes": nodes}
    if K <= 0:
        return Estimate(None, status="not_applicable", note="nothing contracts: no step size merges neurons", details=details)
    status: Status = "ok" if gap <= tol else "not_converged"
    note = "" if gap <= tol else f"K still moves by {gap:.1g} of itself at {nodes} nodes: give more"
    return Estimate(1 / K, residual=gap / K + residual, status=status, note=note, refs=("topological-invariance",), details=details)


def _tops(loss: Loss, cloud: Tensor, pairs: Tensor, nodes: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Largest eigenvalue of the symmetric part of Mbar of every pair (p,), and what the last iteration moved it by."""
    if cloud.shape[1] > _SMALL:
        shape = (len(pairs), cloud.shape[1])
        top, moved = _power(lambda v: _along(loss, cloud, pairs, v, nodes), shape, iterations, cloud, generator)
    else:
        M = pair_hessians(loss, cloud, pairs, nodes)
        moved, symmetric = 0.0, (M + M.mT) / 2
        top = torch.linalg.eigvalsh(symmetric)[:, -1] if bool(torch.isfinite(symmetric).all()) else torch.full((len(pairs),), math.nan)
    if not bool(torch.isfinite(top).all()):
        raise InputError("the second derivatives of the loss between two neurons are not finite: check the loss and the cloud.")
    return top, moved


def _power(
    apply: Callable[[Tensor], Tensor], shape: tuple[int, int], iterations: int, like: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, float]:
    """Largest (not most negative) eigenvalue of each symmetric map, by the power method, shifted once if need be."""
    shift = torch.zeros(shape[0], dtype=like.dtype)
    for _ in range(2):
        v = torch.randn(shape, generator=generator, dtype=like.dtype)
        value, moved = shift, 0.0
        for _ in range(iterations):
            v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-300)
            applied = apply(v) + shift[:, None] * v
            new = (v * applied).sum(1)
            moved, value, v = float(((new - value).abs() / new.abs().clamp(min=1e-300)).max()), new, applied
        if bool((value - shift > 0).all()):
            break
        shift = torch.where(value < 0, -2 * value, shift)  # then the most negative eigenvalue is the smallest
    return value - shift, moved


def neuron_cloud(model: torch.nn.Module, args: Sequence[Any], where: str, kwargs: Any = None) -> Tensor:
    """The neurons of one layer as a cloud (n, m): all that belongs to each of them, in-weights first.

    Args:
        where: module path of what writes the layer, as the audit gives it.

    Raises:
        InputError: no such layer.
    """
    from parasym.core.graph import trace
    from parasym.measure.copies import raw_blocks
    from parasym.measure.units import find_layers
    from parasym.symmetry.spaces import find_spaces

    graph = trace(model, args, kwargs)
    layers = {layer.where: layer for layer in find_layers(graph, find_spaces(graph))}
    if where not in layers:
        raise InputError(f"no layer {where!r} in this model; there are {', '.join(map(repr, layers)) or 'none'}.")
    blocks = raw_blocks(layers[where], graph.params.__getitem__)
    if blocks is None:
        raise InputError(f"the units of layer {where!r} do not show in the weights.")
    every = torch.arange(layers[where].size)
    return torch.cat([b.rows(every) for b in (*blocks.inside, *blocks.outside)], 1)


def _cloud(points: Tensor) -> Tensor:
    if points.dim() != 2 or len(points) < 2 or points.shape[1] < 1 or not bool(torch.isfinite(points).all()):
        raise InputError(f"expected a finite cloud of at least two points, (n, m), got {tuple(points.shape)}{_nonfinite(points)}.")
    return points.detach().double()


def _nonfinite(values: Tensor) -> str:
    return "" if bool(torch.isfinite(values).all()) else ", some of them not finite"
