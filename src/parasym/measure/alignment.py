"""How alike two sets of representations are, layer by layer: the metrics of the Platonic representation papers.

Representations of the same n samples, one tensor (n, d) for each layer; the widths may differ. Every metric is 1 for representations
that are the same up to rotation and scale (perfect-platonic R8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate

Metric = Literal["kernel_cos", "cka", "mutual_knn", "procrustes"]


def kernel_cos(X: Tensor, Y: Tensor) -> Tensor:
    """<K, L>_F / (|K| |L|) of the Gram matrices K = X X^T, L = Y Y^T, uncentred; from (d, d) products, never (n, n)."""
    return (X.T @ Y).square().sum() / ((X.T @ X).norm() * (Y.T @ Y).norm())


def cka(X: Tensor, Y: Tensor) -> Tensor:
    """Linear centred kernel alignment: `kernel_cos` of the centred representations (biased: use n well above the widths)."""
    return kernel_cos(X - X.mean(0), Y - Y.mean(0))


def procrustes(X: Tensor, Y: Tensor) -> Tensor:
    """|X^T Y|_* / (|X|_F |Y|_F) of the centred representations: the cosine after the best rotation."""
    X, Y = X - X.mean(0), Y - Y.mean(0)
    return torch.linalg.matrix_norm(X.T @ Y, "nuc") / (X.norm() * Y.norm())


def mutual_knn(X: Tensor, Y: Tensor, k: int = 10) -> Tensor:
    """Mean share of the k nearest neighbours (by cosine, oneself left out) that the two representations have in common."""
    if not 0 < k < len(X):
        raise InputError(f"mutual_knn needs 0 < k < {len(X)} samples, got {k}.")
    found = []
    for Z in (X, Y):
        unit = torch.nn.functional.normalize(Z, dim=1)
        near = unit @ unit.T
        near.fill_diagonal_(-torch.inf)
        found.append(torch.zeros_like(near, dtype=torch.bool).scatter_(1, near.topk(k, 1).indices, True))
    return (found[0] & found[1]).sum(1).double().mean() / k


_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kernel_cos": kernel_cos, "cka": cka, "mutual_knn": mutual_knn, "procrustes": procrustes,
}  # fmt: skip


def alignment(first: Sequence[Tensor], second: Sequence[Tensor], metric: Metric = "kernel_cos") -> Estimate:
    """The metric between every layer of one network and every layer of another, (layers, layers), in float64.

    Args:
        first, second: representations (n, d) of the same n samples in the same order; more axes are flattened into d.

    Raises:
        InputError: no layers, different numbers of samples, values that are not finite, a representation that is constant or zero, or an
            unknown metric.
    """
    if metric not in get_args(Metric):
        raise InputError(f"Unknown metric {metric!r}: use one of {', '.join(get_args(Metric))}.")
    sides = [[_checked(t, f"{name}[{i}]", metric) for i, t in enumerate(side)] for name, side in (("first", first), ("second", second))]
    if not sides[0] or not sides[1]:
        raise InputError("Give at least one representation on each side.")
    counts = {len(t) for side in sides for t in side}
    if len(counts) > 1:
        raise InputError(f"All representations must be of the same samples, got {sorted(counts)} of them.")
    rows = [[_METRICS[metric](a, b) for b in sides[1]] for a in sides[0]]
    value = torch.stack([torch.stack(row) for row in rows])
    return Estimate(value, assumptions=(f"{counts.pop()} samples",), refs=("perfect-platonic R8",), details={"metric": metric})


def _checked(t: Tensor, where: str, metric: str) -> Tensor:
    t = t.detach().double().flatten(1)
    if not bool(torch.isfinite(t).all()):
        raise InputError(f"{where} holds values that are not finite.")
    centred = t if metric in ("kernel_cos", "mutual_knn") else t - t.mean(0)
    if float(centred.norm()) <= 1e-12 * max(float(t.norm()), 1e-300):
        raise InputError(f"{where} is {'zero' if centred is t else 'the same for all samples'}: it is aligned with nothing.")
    return t
