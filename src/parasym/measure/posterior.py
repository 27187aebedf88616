"""Posterior collapse of a variational autoencoder: which latents say nothing about their input, and how many a linear theory expects.

A latent is collapsed when its posterior is the prior for almost every input. Before any training the whitened input-target correlation
says how many modes outlive a given beta (posterior-collapse R2, R8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate, plain
from parasym.solvable.latent import LinearLVM

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class PosteriorCollapse:
    """What each latent of a Gaussian encoder carries.

    Attributes:
        kl: (latents,) mean KL from the prior, in nats.
        quiet: (latents,) share of inputs whose KL is below eps.
        collapsed: (latents,) bool: quiet for more than 1 - delta of the inputs.
        samples: inputs seen.
    """

    kl: Tensor
    quiet: Tensor
    collapsed: Tensor
    samples: int

    @property
    def active(self) -> int:
        """Latents that are not collapsed."""
        return int((~self.collapsed).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**{name: plain(value) for name, value in vars(self).items()}, "active": self.active}


def gaussian_kl(mean: Tensor, log_variance: Tensor, prior: float = 1.0) -> Tensor:
    """KL of N(mean, exp log_variance) from N(0, prior^2) for each entry."""
    ratio = log_variance - 2 * math.log(prior)
    return 0.5 * (mean.square() / prior**2 + ratio.exp() - 1 - ratio)


@torch.no_grad()
def posterior_collapse(
    encode: Encode, batches: Iterable[Tensor], *, prior: float = 1.0, eps: float = 0.01, delta: float = 0.01
) -> PosteriorCollapse:
    """(eps, delta)-collapse of every latent, streamed over batches.

    Args:
        encode: inputs -> means and log variances of the posterior, (n, latents) each.
        batches: of inputs.
        prior: standard deviation of the prior.

    Raises:
        InputError: no batch, shapes that differ, or values that are not finite.
    """
    total = quiet = torch.zeros(())
    count = 0
    for batch in batches:
        mean, log_variance = encode(batch)
        if mean.shape != log_variance.shape or mean.ndim != 2:
            raise InputError(f"encode must give means and log variances (n, latents), got {tuple(mean.shape)}, {tuple(log_variance.shape)}")
        kl = gaussian_kl(mean.double(), log_variance.double(), prior)
        if not bool(kl.isfinite().all()):
            raise InputError("the encoder gives values that are NaN or infinite")
        total, quiet, count = total + kl.sum(0), quiet + (kl < eps).double().sum(0), count + len(kl)
    if not count:
        raise InputError("no inputs: give at least one batch")
    return PosteriorCollapse(total / count, quiet / count, quiet / count > 1 - delta, count)


def effective_beta(beta: float, outputs: int, *, reduction: Literal["sum", "mean"] = "sum", half: bool = True) -> float:
    """beta e_d^2 of the theory for a loss reconstruction + beta KL at e_d = 1.

    Args:
        outputs: number of output entries.
        reduction: over outputs: "mean" weakens the reconstruction by their number, the commonest cause of total collapse by accident.
        half: whether the squared error carries its 1/2; without it beta counts half.
    """
    return beta * (outputs if reduction == "mean" else 1) * (1.0 if half else 0.5)


def recommend_beta(x: ArrayLike, keep: int, y: ArrayLike | None = None, *, decoder: float = 1.0) -> Estimate:
    """beta that keeps exactly ``keep`` modes of a linear model: the geometric mean of the two critical values around it.

    Args:
        x: (n, d0) inputs; y: (n, d2) targets, x itself by default.

    Raises:
        InputError: keep below 1 or beyond the number of modes.
    """
    zeta2 = LinearLVM.of_data(x, y, latents=1).zeta.square() / decoder**2
    living = int((zeta2 > 1e-9 * float(zeta2[0])).sum())
    if not 1 <= keep <= living:
        raise InputError(f"the data has {living} modes: keep between 1 and {living} of them, not {keep}")
    high, low = float(zeta2[keep - 1]), float(zeta2[keep]) if keep < living else 0.5 * float(zeta2[keep - 1])
    if high - low < 1e-9 * high:
        return Estimate(None, status="not_applicable", note=f"modes {keep} and {keep + 1} are degenerate: they live and die together")
    return Estimate(math.sqrt(high * low), details={"dies above": high, "next lives below": low}, refs=("posterior-collapse R2",))
