"""Few weighted objects with the moments of many: what a symmetric function of neurons or data points cannot tell apart.

A symmetric function sees its d objects through symmetric statistics. Tchakaloff: at most C(m + k, k) of the objects, with positive
weights, have all moments up to order k of the whole set. Found by elimination: null vectors of the monomial matrix move weight between
objects until one after the other is empty. Coordinates are scaled to [-1, 1] and the monomials made orthonormal in the weighted set;
without that the numerical null space is a matter of taste.

Source: universal-compression R1, R2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.laws.compression import monomial_count

Progress = Callable[[float], None]
_ROOM = 1 << 23  # numbers in the null vectors of the blocks handled at a time


@dataclass(frozen=True)
class Objects:
    """A weighted subset.

    Attributes:
        index: (s,) which of the objects are kept, ascending.
        weights: (s,) their positive weights, float64; they sum to what the weights of all summed to.
        moment_error: largest difference of a moment (coordinates scaled to [-1, 1], weights to sum 1) from that of the whole set.
        order: k. cells: how many cells were compressed one by one.
        bound: s can be no larger than this: cells times C(m + k, k).
    """

    index: Tensor
    weights: Tensor
    moment_error: Estimate
    order: int
    cells: int
    bound: int


def monomials(z: Tensor, order: int) -> Tensor:
    """(n, N_k) all monomials of degree at most ``order`` of points (n, m), the constant first."""
    columns = [torch.ones(len(z), dtype=z.dtype)]
    known: dict[tuple[int, ...], Tensor] = {(): columns[0]}
    for degree in range(1, order + 1):
        for powers in combinations_with_replacement(range(z.shape[1]), degree):
            known[powers] = known[powers[:-1]] * z[:, powers[-1]]
            columns.append(known[powers])
    return torch.stack(columns, 1)


def scaled(z: Tensor) -> Tensor:
    """Each coordinate moved and scaled to [-1, 1]; a constant one becomes 0."""
    low, high = z.amin(0), z.amax(0)
    half = (high - low) / 2
    return torch.where(half > 0, (z - (high + low) / 2) / torch.where(half > 0, half, 1.0), torch.zeros_like(z))


def compress_objects(
    z: Tensor,
    weights: Tensor | None = None,
    *,
    order: int,
    cells: int = 1,
    tol: float = 1e-9,
    seed: int = 0,
    progress: Progress | None = None,
) -> Objects:
    """A subset of objects with positive weights and the moments of all of them up to an order.

    Args:
        z: (n, m) objects, any float type.
        weights: (n,) positive weights (default: 1 each).
        order: k; the subset holds at most C(m + k, k) objects of each cell. ``order_for_size`` gives the largest k for a budget.
        cells: partition by k-means first; the error falls with the radius of a cell to the power k + 1.
        tol: moment error above which the result does not count as exact.
        seed: of the partition.
        progress: called with the share of objects done.

    Raises:
        InputError: not a finite matrix, weights that are not positive, an order or number of cells that makes no sense.

    Source: universal-compression R1, R2, R3.
    """
    if z.dim() != 2 or 0 in z.shape or not bool(torch.isfinite(z).all()):
        raise InputError(f"expected finite objects of shape (n, m), got {tuple(z.shape)}.")
    if not isinstance(order, int) or order < 0:
        raise InputError(f"order must be a whole number, at least 0, got {order!r}.")
    if not isinstance(cells, int) or not 1 <= cells <= len(z):
        raise InputError(f"cells must be between 1 and {len(z)}, got {cells!r}.")
    w = torch.ones(len(z), dtype=torch.float64) if weights is None else weights.detach().double().cpu()
    if w.shape != (len(z),) or not bool((w > 0).all()) or not bool(torch.isfinite(w).all()):
        raise InputError(f"weights must be {len(z)} positive numbers.")
    count = monomial_count(z.shape[1], order)
    if count > 20_000:
        raise InputError(
            f"{count:,} moments of order {order} in {z.shape[1]} coordinates are too many: lower the order, "
            "or describe the objects by fewer coordinates (principal components)."
        )
    tell = progress or (lambda share: None)
    points = z.detach().double().cpu()
    total = float(w.sum())
    labels = cells_of(points, cells, seed)
    kept, mass, done = [], [], 0
    for cell in range(int(labels.max()) + 1):
        at = (labels == cell).nonzero().flatten()
        index, found = caratheodory(monomials(scaled(points[at]), order), w[at] / total)
        kept.append(at[index])
        mass.append(found)
        done += len(at)
        tell(done / len(points))
    index, weight = torch.cat(kept), torch.cat(mass)
    order_of = index.argsort()
    index, weight = index[order_of], weight[order_of]
    A = monomials(scaled(points), order)
    error = float((_sum(weight, A[index]) - _sum(w / total, A)).abs().max())
    used = int(labels.max()) + 1
    estimate = Estimate(error, residual=error, status="ok" if error <= tol else "not_converged", refs=("universal-compression",))
    return Objects(index, weight * total, estimate, order, used, used * count)


def caratheodory(A: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """At most rank(A) <= q rows of A (n, q) with positive weights and the same weighted sum.

    Returns:
        (s,) indices and (s,) weights.

    Source: universal-compression R2.
    """
    alive, weight = torch.arange(len(A)), w.clone()
    basis = _orthonormal(A, w)
    q = basis.shape[1]
    while len(alive) > q:
        size = min(len(alive), 2 * q)
        count = max(1, min(len(alive) // size, _ROOM // (size * size)))
        block = alive[: count * size].reshape(count, size)
        left, weight[block] = _eliminate(_null(basis[block]), weight[block])
        alive = torch.cat([alive[count * size :], block[left]])
    index = alive.sort().values
    return index, _polished(basis, w, index, weight[index])


def _null(rows: Tensor) -> Tensor:
    """(g, b - q, b) orthonormal vectors that no column of the blocks (g, b, q) sees: what may be moved between their rows."""
    return torch.linalg.qr(rows, mode="complete").Q[..., rows.shape[-1] :].mT.clone()


def _orthonormal(A: Tensor, w: Tensor) -> Tensor:
    """A basis of the columns, orthonormal in the weighted set; dependent columns are left out."""
    import scipy.linalg

    root = w.sqrt()[:, None]
    r, order = scipy.linalg.qr((root * A).numpy(), mode="r", pivoting=True, check_finite=False)
    size = np.abs(np.diagonal(r))
    rank = int((size > 1e-13 * size[0]).sum())
    columns = A[:, torch.from_numpy(np.ascontiguousarray(order[:rank])).long()]
    for _ in range(2):  # twice is enough
        R = torch.linalg.qr(root * columns, mode="r").R
        columns = torch.linalg.solve_triangular(R, columns, upper=True, left=False)
    return columns


def _eliminate(null: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Empty one object of each block for each null vector: w - t v with the largest t that keeps all weights positive.

    Args:
        null: (g, r, b), overwritten. weight: (g, b).

    Returns:
        (g, b) which objects are left, and their weights.
    """
    weight, left = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    blocks = torch.arange(len(weight))
    for k in range(null.shape[1]):
        v = null[:, k] / null[:, k].abs().amax(1, keepdim=True).clamp(min=1e-300)
        v = torch.where((v.amax(1) > 0.5)[:, None], v, -v)  # an entry of size one, to run into
        ratio = torch.where(left & (v > 1e-10), weight / v.clamp(min=1e-300), torch.inf)
        j = ratio.argmin(1)
        t, pivot = ratio[blocks, j], v[blocks, j]
        weight = (weight - t[:, None] * v).clamp(min=0)
        weight[blocks, j] = 0
        left[blocks, j] = False
        rest = null[:, k + 1 :]
        if rest.shape[1]:  # the others leave object j alone from now on
            rest -= rest[blocks, :, j][:, :, None] / pivot[:, None, None] * v[:, None]
            rest[blocks, :, j] = 0
            rest /= rest.norm(dim=2, keepdim=True).clamp(min=1e-300)
    return left, torch.where(left, weight, 0.0)


def _polished(basis: Tensor, w: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """One step of refinement: the weights that match the moments best, where they stay positive."""
    missing = _sum(w, basis) - _sum(weight, basis[index])
    step = torch.linalg.lstsq(basis[index].T, missing[:, None], driver="gelsd").solution[:, 0]
    better = weight + step
    return better if bool((better > 0).all()) else weight


def _sum(w: Tensor, A: Tensor) -> Tensor:
    """Weighted sums of the columns, added in a cascade: a long plain product loses two digits."""
    return (w[:, None] * A).sum(0)


def cells_of(z: Tensor, cells: int, seed: int) -> Tensor:
    """(n,) labels of a k-means partition of scaled objects, counted from 0 without gaps."""
    if cells == 1:
        return torch.zeros(len(z), dtype=torch.long)
    from scipy.cluster.vq import kmeans2

    _, labels = kmeans2(scaled(z).numpy(), cells, minit="++", seed=seed, iter=30)
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1]).long()


class WeightedDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Data points with weights: (x, y, weight). The loss is sum w l / sum w; norms and augmentation must use the weights, too.

    Attributes:
        x, y, weights: (s, ...), (s, ...), (s,).
        objects: how they were chosen.
    """

    def __init__(self, x: Tensor, y: Tensor, weights: Tensor, objects: Objects) -> None:
        self.x, self.y, self.weights, self.objects = x, y, weights, objects

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[i], self.y[i], self.weights[i]

    def loss(self, each: Tensor) -> Tensor:
        """Weighted mean of the losses of all points (s,)."""
        return (each * self.weights.to(each.dtype)).sum() / self.weights.sum().to(each.dtype)

    def sampler(self, count: int, generator: torch.Generator | None = None) -> torch.utils.data.WeightedRandomSampler:
        """Draws points with probability proportional to their weight, for mini-batches of equal weight."""
        return torch.utils.data.WeightedRandomSampler(self.weights.tolist(), count, replacement=True, generator=generator)


def compress_dataset(
    x: Tensor, y: Tensor, *, order: int, cells: int = 1, seed: int = 0, progress: Progress | None = None
) -> WeightedDataset:
    """A weighted subset of a data set on which every smooth loss takes nearly the same value, for all parameters.

    Args:
        x: (n, ...) inputs; y: (n,) or (n, ...) targets. An object is (x, y) flattened; classes (integers; equal rows of them, where y
            has more axes) are compressed one by one.
            High-dimensional inputs must be reduced first: C(m + k, k) objects are kept.
        order, cells, seed, progress: as in :func:`compress_objects`.

    Raises:
        InputError: no points, targets for other points or complex ones.

    Source: universal-compression R7.
    """
    if x.dim() < 1 or y.dim() < 1 or len(x) != len(y) or not len(x):
        raise InputError(f"inputs {tuple(x.shape)} and targets {tuple(y.shape)}: give one target, along the first axis, for each input.")
    if y.is_complex():
        raise InputError("complex targets: give their real and imaginary parts as two columns.")
    flat = x.reshape(len(x), -1).double()
    if y.is_floating_point():
        objects = compress_objects(
            torch.cat([flat, y.reshape(len(y), -1).double()], 1), order=order, cells=cells, seed=seed, progress=progress
        )
        return WeightedDataset(x[objects.index], y[objects.index], objects.weights, objects)
    kept, mass, worst, bound, used = [], [], 0.0, 0, 0
    _, labels = y.reshape(len(y), -1).unique(dim=0, return_inverse=True)  # (n,), also where the targets are (n, 1) or rows of integers
    for label in labels.unique():
        at = (labels == label).nonzero().flatten()
        part = compress_objects(flat[at], order=order, cells=min(cells, len(at)), seed=seed, progress=progress)
        kept.append(at[part.index])
        mass.append(part.weights)
        worst, bound, used = max(worst, float(part.moment_error.value)), bound + part.bound, used + part.cells  # type: ignore[arg-type]
    index, weights = torch.cat(kept), torch.cat(mass)
    estimate = Estimate(worst, residual=worst, status="ok" if worst <= 1e-9 else "not_converged", refs=("universal-compression",))
    return WeightedDataset(x[index], y[index], weights, Objects(index, weights, estimate, order, used, bound))
