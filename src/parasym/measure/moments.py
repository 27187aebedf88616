"""Streaming moments of what units receive and give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Streaming sums of a layer's pre-activations z_1..z_k and output h, unit by unit, about a reference point.

    Attributes:
        low, high: (n,) range of h.
        first: (n, k+1) reference values.
        total: (n, k+1) sums; products: (n, k+1, k+1) sums of products.
        count: samples (times tokens or places) seen.
    """

    low: Tensor
    high: Tensor
    first: Tensor
    total: Tensor
    products: Tensor
    count: int = 0

    @classmethod
    def start(cls, values: Tensor) -> Moments:
        """Nothing seen yet; (n, k+1, samples) values give the reference point."""
        n, k = values.shape[0], values.shape[1]
        inf = torch.full((n,), math.inf, dtype=torch.float64)
        zero = torch.zeros(n, k, dtype=torch.float64)
        return cls(inf, -inf, values[:, :, 0].clone(), zero, torch.zeros(n, k, k, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Take up (n, k+1, samples) values, h last."""
        self.low = torch.minimum(self.low, values[:, -1].amin(1))
        self.high = torch.maximum(self.high, values[:, -1].amax(1))
        d = values - self.first[:, :, None]
        self.total += d.sum(2)
        self.products += d @ d.transpose(1, 2)
        self.count += values.shape[2]

    @property
    def spread(self) -> Tensor:
        """(n,) range of the output."""
        return self.high - self.low

    @property
    def deviation(self) -> Tensor:
        """(n, k+1) standard deviations."""
        mean = self.total / self.count
        return (self.products.diagonal(dim1=1, dim2=2) / self.count - mean.square()).clamp(min=0).sqrt()

    def fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Least squares h = a.z + c for each unit: (n, k) slopes, (n,) offsets, (n,) residual relative to the spread of h."""
        mean = self.total / self.count
        cov = self.products / self.count - mean[:, :, None] * mean[:, None, :]
        scale = cov.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().clamp(min=1e-150)
        cor = cov / scale[:, :, None] / scale[:, None, :]
        slope = (torch.linalg.pinv(cor[:, :-1, :-1], rtol=1e-10, hermitian=True) @ cor[:, :-1, -1:])[:, :, 0]
        left = (1 - (slope * cor[:, :-1, -1]).sum(1)).clamp(min=0).sqrt()
        slope = slope * scale[:, -1:] / scale[:, :-1]
        offset = self.first[:, -1] + mean[:, -1] - (slope * (self.first[:, :-1] + mean[:, :-1])).sum(1)
        return slope, offset, left
