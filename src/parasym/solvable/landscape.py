"""Base of the models whose loss surface is known: exact loss, data, invariants of the weights, and the minimum by restarts.

Weights are never compared, only what the symmetries leave alone. The minimum is the best of several L-BFGS runs: a prediction above it
is a wrong theory, a prediction below it a search that failed, and the two keep different names (``violated``, ``not_converged``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable.contract import Comparison, Model, NotSolvable
from parasym.solvable.engines import Params, Restarts, lbfgs_restarts

Array = NDArray[np.float64]
Generator = Callable[[Params], Params]


class Landscape(Model):
    """A model whose weights are a dict of float64 tensors and whose global minimum has a closed form."""

    scales: ClassVar[tuple[float, ...]] = (1.0, 2.0)  # of the starts, in turn

    @abstractmethod
    def init(self, seed: int, scale: float = 1.0) -> Params:
        """Random weights, N(0, scale^2 / fan-in)."""

    @abstractmethod
    def loss(self, theta: Params) -> Tensor:
        """Exact mean loss, a differentiable scalar."""

    @abstractmethod
    def sample_losses(self, theta: Params, count: int, seed: int) -> Tensor:
        """(count,) independent draws of the loss on one sample and one realisation of the noise; their mean is the loss."""

    @abstractmethod
    def observables(self, theta: Params) -> dict[str, Tensor]:
        """What the symmetries of the loss leave alone."""

    @abstractmethod
    def representative(self, seed: int = 0) -> Params:
        """Weights at the global minimum; ``seed`` picks the element of the gauge group.

        Raises:
            NotSolvable: there is no minimum here; the message says why.
        """

    def generators(self) -> Mapping[str, Generator]:
        """Name -> tangent field of a continuous symmetry of the loss."""
        return {}

    def minimise(self, seed: int = 0, restarts: int = 6) -> Restarts:
        """The best of ``restarts`` runs of L-BFGS from random weights."""
        scales = self.scales
        return lbfgs_restarts(self.loss, [self.init(1000 * seed + k, scales[k % len(scales)]) for k in range(restarts)])

    def at_minimum(self, found: Restarts) -> dict[str, Estimate]:
        """The loss and the observables of the best restart, with the share of restarts that reached it."""
        status = "ok" if found.converged else "not_converged"
        gradient = float(found.gradient[found.index])
        note = "" if found.converged else f"L-BFGS stopped at a gradient of {gradient:.2g}"
        details = {"restarts": len(found.loss), "fraction at best": found.fraction(), "losses": found.loss.tolist()}
        common = Estimate(found.value, residual=gradient, status=status, note=note, details=details)  # type: ignore[arg-type]
        with torch.no_grad():
            seen = self.observables(found.best)
        return {"loss": common, **{name: replace(common, value=value, details={}) for name, value in seen.items()}}

    def compare(
        self,
        kind: str,
        seed: int = 0,
        budget: float = 1.0,
        *,
        relative: float = 0.0,
        absolute: float | Mapping[str, float] | None = None,
    ) -> Comparison:
        """Theory beside a run. A predicted minimum below the best restart is ``not_converged`` (the search failed), one above it is
        ``violated`` (the theory failed)."""
        found = super().compare(kind, seed, budget, relative=relative, absolute=absolute)
        if kind != "minimum" or not any(r.observable == "loss" and r.predicted < r.measured - r.tolerance for r in found.rows):
            return found
        return replace(found, rows=tuple(replace(row, status="not_converged") for row in found.rows))

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if kind == "minimum":
            return self.at_minimum(self.minimise(seed, max(6, round(6 * budget))))
        return self._measure(kind, seed, budget)

    def _measure(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """The run of any other kind."""
        raise NotSolvable(f"{type(self).__name__} cannot simulate {kind!r}")


# ------------------------------------------------------------------------------------------------ input


def matrix(name: str, values: ArrayLike | Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """A float64 tensor of the given shape (None: any size).

    Raises:
        InputError: another shape, an empty axis, or entries that are not finite.
    """
    out = torch.as_tensor(np.asarray(values, dtype=np.float64)).clone()
    if out.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, out.shape, strict=True)) or out.numel() == 0:
        wanted = " x ".join("n" if size is None else str(size) for size in shape)
        raise InputError(f"{name} must have shape {wanted}, got {' x '.join(map(str, out.shape)) or 'a number'}")
    if not bool(out.isfinite().all()):
        raise InputError(f"{name} has {int((~out.isfinite()).sum())} entries that are NaN or infinite: clean the data first")
    return out


def symmetric(name: str, values: ArrayLike | Tensor, size: int | None = None, *, definite: bool | None = None) -> Tensor:
    """A symmetric float64 matrix; ``definite``: True for positive definite, False for positive semidefinite, None for any.

    Raises:
        InputError: not square, not symmetric, or an eigenvalue that is too small.
    """
    out = matrix(name, values, (size, size))
    if out.shape[0] != out.shape[1]:
        raise InputError(f"{name} must be square, got {out.shape[0]} x {out.shape[1]}")
    top = float(out.abs().max())
    if float((out - out.T).abs().max()) > 1e-10 * top:
        raise InputError(f"{name} is not symmetric: largest difference {float((out - out.T).abs().max()):.3g}")
    out = 0.5 * (out + out.T)
    lowest = float(torch.linalg.eigvalsh(out)[0])
    if definite is True and lowest <= 1e-12 * top:
        raise InputError(f"{name} is singular or indefinite (smallest eigenvalue {lowest:.3g}): drop the directions without variance")
    if definite is False and lowest < -1e-10 * top:
        raise InputError(f"{name} must be positive semidefinite; its smallest eigenvalue is {lowest:.3g}")
    return out


def sizes(name: str, values: tuple[int, ...]) -> tuple[int, ...]:
    """Widths as positive integers.

    Raises:
        InputError: one is not.
    """
    if any(isinstance(v, bool) or int(v) != v or v < 1 for v in values):
        raise InputError(f"{name} must be positive whole numbers, got {values}")
    return tuple(int(v) for v in values)


def roots_of(a: Tensor, relative: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a semidefinite matrix and its pseudo-inverse on the range."""
    values, vectors = torch.linalg.eigh(a)
    inside = values > relative * values.abs().max().clamp_min(1e-300)
    root = torch.where(inside, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(inside, 1 / root.clamp_min(1e-300), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def rotation(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    draws = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=draws, dtype=torch.float64))
    return q * r.diagonal().sign()


def skew(size: int, seed: int = 0) -> Tensor:
    """A random antisymmetric matrix: a generator of rotations."""
    draws = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=draws, dtype=torch.float64)
    return a - a.T


def normal(seed: int, *shape: int) -> Tensor:
    """N(0, 1) in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joint_sample(second: Tensor, cross: Tensor, power: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian x (count, d0) and y (count, d2) with E xx^T = second, E yx^T = cross (d2, d0), E yy^T = ``power`` (d2, d2)."""
    draws = torch.Generator().manual_seed(seed)
    root, inverse = roots_of(second)
    whitened = cross @ inverse
    rest, _ = roots_of(power - whitened @ whitened.T)
    z = torch.randn(count, len(second), generator=draws, dtype=torch.float64)
    e = torch.randn(count, len(power), generator=draws, dtype=torch.float64)
    return z @ root, z @ whitened.T + e @ rest
