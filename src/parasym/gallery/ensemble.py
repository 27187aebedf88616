"""Small shared tools for batched stochastic runs: one random stream per seed, straight-line fits, standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Ensemble:
    """Random streams for a batch of seeds: entry i of every draw depends on seed i alone, not on its neighbours."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self._streams = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(seeds, *shape) of N(0, 1)."""
        return torch.stack([torch.randn(shape, generator=stream, dtype=dtype) for stream in self._streams])

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(seeds, *shape) of U(0, 1)."""
        return torch.stack([torch.rand(shape, generator=stream, dtype=dtype) for stream in self._streams])

    def integers(self, high: int, *shape: int) -> Tensor:
        """(seeds, *shape) of uniform integers below ``high``."""
        return torch.stack([torch.randint(high, shape, generator=stream) for stream in self._streams])

    def permutation(self, count: int) -> Tensor:
        """(seeds, count): a random order of 0..count-1 for each seed."""
        return torch.stack([torch.randperm(count, generator=stream) for stream in self._streams])


def slope(times: Tensor, values: Tensor) -> Tensor:
    """Least-squares slope of ``values`` (n, ...) over ``times`` (n,), for each of the trailing entries."""
    centred = times - times.mean()
    return torch.tensordot(centred, values, dims=1) / centred.square().sum()


def standard_error(values: Tensor, dim: int = -1) -> Tensor:
    """Standard error of the mean of independent values along ``dim``."""
    return values.std(dim) / values.shape[dim] ** 0.5


def settle(loss: Callable[[Tensor], Tensor], minimum: Tensor, kick: float, steps: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Descent without noise from near a minimum: the control of what noise does along a valley.

    Args:
        loss: of flat weights (p,), twice differentiable.
        minimum: (p,), a global minimum.
        kick: how far the start lies from it, over its norm, in a random direction.
        steps: of size one over the largest curvature at the minimum.
        seed: of the direction.

    Returns:
        The start, the end, and by what factor the excess of the loss fell (at most to round-off).
    """
    aside = Ensemble((seed,)).normal(len(minimum))[0]
    start = minimum + kick * minimum.norm() / aside.norm() * aside
    gradient, end = torch.func.grad(loss), start
    rate = 1 / torch.linalg.eigvalsh(torch.func.hessian(loss)(minimum))[-1]
    for _ in range(steps):
        end = end - rate * gradient(end)
    least = loss(minimum)
    return start, end, float((loss(start) - least) / (loss(end) - least).clamp_min(1e-15 * float(least)))


def plain(values: Tensor) -> list[float]:
    """A tensor of one dimension as a list of floats."""
    return [float(value) for value in values]
