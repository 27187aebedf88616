"""Principal directions read from a regularised linear autoencoder, in the manner of scikit-learn (regularized-lae R4, R7, R8)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from parasym.core.errors import InputError
from parasym.solvable.autoencoder import exact_tied, principal_directions
from parasym.solvable.landscape import matrix, normal

Array = NDArray[np.float64]


class LAEPCA:
    """A linear autoencoder with L2 on both factors, fitted by exact alternation: the left singular vectors of its decoder are principal
    directions, in order, and its singular values map one to one to those of the data.

    Args:
        codes: k.
        lam: penalty, in units of squared singular values of the data (sums over samples). A direction with sigma^2 <= lam is cut; the
            rate at which the rotation inside the subspace settles grows with lam.
        steps: alternations at most.
        tol: stop when no entry of the decoder moves by more.
        seed: of the start.

    Attributes (after `fit`):
        components_: (l, m) principal directions, l <= k of them alive.
        singular_values_: (l,) of the centred data.
        mean_: (m,).
        noise_variance_: lam / n, the noise of the probabilistic PCA it is the maximum likelihood of.
        n_iter_: alternations made; converged_: whether they settled.
    """

    def __init__(self, codes: int, lam: float = 1.0, *, steps: int = 20_000, tol: float = 1e-12, seed: int = 0) -> None:
        self.codes, self.lam, self.steps, self.tol, self.seed = codes, lam, steps, tol, seed

    def fit(self, x: ArrayLike) -> LAEPCA:
        """Fit to x (n, m).

        Raises:
            InputError: NaN, fewer than two samples, codes not between 1 and m, lam not positive or above every sigma^2.
        """
        data = matrix("x", x, (None, None))
        n, m = data.shape
        if n < 2 or not 1 <= self.codes <= m:
            raise InputError(f"{n} samples of {m} features: needs two samples and codes between 1 and {m}, got {self.codes}")
        if not self.lam > 0:
            raise InputError(f"lam must be positive, got {self.lam!r}")
        self.mean_: Array = data.mean(0).numpy()
        centred = data - data.mean(0)
        scatter = centred.T @ centred
        top = float(torch.linalg.eigvalsh(scatter)[-1])
        if self.lam >= top:
            raise InputError(f"lam = {self.lam:.6g} cuts every direction: the largest squared singular value is {top:.6g}")
        w, self.n_iter_, self.converged_ = normal(self.seed, m, self.codes) / m**0.5, 0, False
        while self.n_iter_ < self.steps and not self.converged_:
            new = exact_tied(scatter, w, self.lam, 20)
            self.converged_ = float((new - w).abs().max()) <= self.tol * 20
            w, self.n_iter_ = new, self.n_iter_ + 20
        directions, values = principal_directions(w, self.lam)
        alive = torch.linalg.svdvals(w) > 1e-6
        self.components_: Array = directions.T[alive].numpy()
        self.singular_values_: Array = values[alive].numpy()
        self.noise_variance_ = self.lam / n
        return self

    def transform(self, x: ArrayLike) -> Array:
        """(n, l) scores along the directions."""
        return (matrix("x", x, (None, len(self.mean_))).numpy() - self.mean_) @ self.components_.T  # type: ignore[no-any-return]
