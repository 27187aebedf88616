"""The landscape of self-supervised learning with a linear encoder (ssl-landscape).

    L(W) = -Tr[W B W^T] + q Tr[(W Sigma W^T)^2]

with Sigma = A + C the covariance of a view (data A, augmentation C) and B the attraction of the loss. Every stationary point is
N = Sigma^(1/2) W^T W Sigma^(1/2) = sum over I of b_i / (2q) v_i v_i^T, with b_i, v_i the eigenpairs of Sigma^(-1/2) B Sigma^(-1/2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate, Status
from parasym.solvable.contract import NotSolvable, Prediction, absent, positive
from parasym.solvable.engines import Params, flatten, morse, unflatten, waterfill
from parasym.solvable.landscape import Generator, Landscape, matrix, normal, roots_of, rotation, sizes, skew, symmetric


class _Embedding(Landscape):
    """What the two models share: the encoder W (d, d0), the spectrum of N, and rotations of the outputs."""

    sigma: Tensor
    outputs: int
    scales: ClassVar[tuple[float, ...]] = (0.7, 1.0)

    def init(self, seed: int, scale: float = 1.0) -> Params:
        return {"W": scale * normal(seed, self.outputs, len(self.sigma)) / len(self.sigma) ** 0.5}

    def generators(self) -> Mapping[str, Generator]:
        turn = skew(self.outputs)
        return {"rotation": lambda theta: {name: turn @ w for name, w in theta.items()}} if self.outputs > 1 else {}

    def encoder(self, strengths: Tensor, seed: int = 0) -> Tensor:
        """(d, d0) W = O N^(1/2) Sigma^(-1/2) with at most d non-zero ``strengths`` N_i, in the order of the modes."""
        _, vectors = self._modes
        keep = strengths.argsort(descending=True)[: self.outputs]
        kept = vectors[:, keep] * strengths[keep].clamp_min(0).sqrt() if len(keep) else vectors[:, :0]
        return rotation(self.outputs, seed)[:, : kept.shape[1]] @ kept.T @ roots_of(self.sigma)[1]

    def spectrum(self, w: Tensor) -> Tensor:
        """Eigenvalues of W Sigma W^T, largest first, as many as there can be: min(d, d0)."""
        return torch.linalg.eigvalsh(w @ self.sigma @ w.T).flip(0)[: min(self.outputs, len(self.sigma))]

    @property
    def _modes(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @property
    def directions(self) -> Tensor:
        """(d0, d0) eigenvectors v_i in columns, in whitened coordinates, in the order of the levels."""
        return self._modes[1]

    def _sorted(self, strengths: Tensor) -> Tensor:
        return strengths.sort(descending=True).values[: min(self.outputs, len(self.sigma))]


def _whitened_modes(attraction: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    inverse = roots_of(sigma)[1]
    values, vectors = torch.linalg.eigh(inverse @ attraction @ inverse)
    values = torch.where(values.abs() > 1e-12 * values.abs().max(), values, 0.0)  # a direction without data is not learned by round-off
    return values.flip(0), vectors.flip(1)


@dataclass(frozen=True, eq=False)
class SSLQuartic(_Embedding):
    """The quartic landscape, free or at a fixed mean power of the features.

    Attributes:
        attraction: (d0, d0) B, symmetric, may be indefinite.
        sigma: (d0, d0) Sigma, positive definite.
        outputs: d.
        quartic: q.
        power: rho: E|f|^2 is held there (an averaged normalisation, R4); None for no constraint.
        bias: with a power, add a constant feature that shares it (R5).

    Kinds: ``minimum`` (loss, spectrum of N, rank, and the bias squared), ``critical points`` (losses and Morse indices of all
    stationary points; without a power), ``phase`` (weight decay at which each mode dies; without a power).

    Raises:
        InputError: a singular Sigma, an asymmetric B, q or rho not positive, NaN.
    """

    attraction: Tensor
    sigma: Tensor
    outputs: int
    quartic: float = 1.0
    power: float | None = None
    bias: bool = False
    slug: ClassVar[str] = "ssl-landscape"
    kinds: ClassVar[tuple[str, ...]] = ("minimum", "critical points", "phase")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "minimum": {"loss": 1e-8, "spectrum": 1e-6, "rank": 0.0, "bias": 1e-6},
        "critical points": {"loss": 1e-8, "index": 0.0},
        "phase": {"critical decay": 1e-5},
    }

    def __post_init__(self) -> None:
        sigma = symmetric("sigma", self.sigma, definite=True)
        b = symmetric("attraction", self.attraction, len(sigma))
        (outputs,) = sizes("outputs", (self.outputs,))
        positive(quartic=self.quartic)
        if self.power is not None:
            positive(power=self.power)
        elif self.bias:
            raise InputError("a bias is a flat direction without a power: give power=rho")
        for name, value in {"attraction": b, "sigma": sigma, "outputs": outputs}.items():
            object.__setattr__(self, name, value)

    # ---------------------------------------------------------------- the losses it stands for

    @classmethod
    def infonce(cls, data: ArrayLike, augmentation: ArrayLike, outputs: int, *, decay: float = 0.0, align: float = 0.0) -> SSLQuartic:
        """InfoNCE with squared distances to fourth order, Gaussian views: B = A - g - w_a C, q = 3/4."""
        a, c = _pair(data, augmentation)
        return cls(a - decay * torch.eye(len(a)) - align * c, a + c, outputs, 0.75)

    @classmethod
    def spectral(cls, data: ArrayLike, augmentation: ArrayLike, outputs: int, *, decay: float = 0.0, align: float = 0.0) -> SSLQuartic:
        """Spectral contrastive loss, exact: B = 2A - g - 2 w_a C (``align`` weighs E|f(v1) - f(v2)|^2), q = 1."""
        a, c = _pair(data, augmentation)
        return cls(2 * a - decay * torch.eye(len(a)) - 2 * align * c, a + c, outputs, 1.0)

    @classmethod
    def barlow(cls, data: ArrayLike, outputs: int, *, decay: float = 0.0) -> SSLQuartic:
        """|E f(v1) f(v2)^T - 1|^2 - d without normalisation of each feature: B = 2A - g, Sigma = A; the augmentation drops out."""
        a = symmetric("data", data, definite=True)
        return cls(2 * a - decay * torch.eye(len(a)), a, outputs, 1.0)

    # ---------------------------------------------------------------- the closed form

    @cached_property
    def _modes(self) -> tuple[Tensor, Tensor]:
        return _whitened_modes(self.attraction, self.sigma)

    @property
    def levels(self) -> Tensor:
        """(d0,) b_i, largest first."""
        return self._modes[0]

    def strengths(self) -> tuple[Tensor, float]:
        """N_i of each mode at the global minimum, and the square of the bias (R1, R4, R5)."""
        b, q = self.levels, self.quartic
        free = (b / (2 * q)).clamp_min(0)
        free[self.outputs :] = 0
        if self.power is None:
            return free, 0.0
        if self.bias and float(free.sum()) <= self.power:
            return free, self.power - float(free.sum())
        return torch.from_numpy(waterfill(b.numpy(), q, self.power, self.outputs)[0]), 0.0

    def value(self, strengths: Tensor) -> float:
        """Loss of N with these strengths in the eigenbasis of the modes."""
        return float(-(self.levels * strengths).sum() + self.quartic * strengths.square().sum())

    def learned_rank(self) -> int:
        """How many directions are learned (R2)."""
        return int((self.strengths()[0] > 0).sum())

    def stationary(self, limit: int | None = None) -> Iterator[tuple[tuple[int, ...], float, int]]:
        """Index set, loss and Morse index of each stationary point, fewest modes first (R1); no power."""
        b = self.levels
        n = int((b > 0).sum())
        every = (c for size in range(min(self.outputs, n) + 1) for c in itertools.combinations(range(n), size))
        for modes in itertools.islice(every, limit):
            swaps = sum(float(b[j]) > float(b[i]) for i in modes for j in range(n) if j not in modes)
            loss = -float(b[list(modes)].square().sum()) / (4 * self.quartic)
            yield modes, loss, (self.outputs - len(modes)) * (n - len(modes)) + swaps

    # ---------------------------------------------------------------- the model

    def _placed(self, theta: Params) -> tuple[Tensor, Tensor]:
        """Encoder and bias after the constraint on the mean power, if there is one."""
        w, bias = theta["W"], theta.get("b", theta["W"].new_zeros(self.outputs, 1))
        if self.power is None:
            return w, bias
        factor = (self.power / ((w @ self.sigma * w).sum() + bias.square().sum())).sqrt()
        return w * factor, bias * factor

    def init(self, seed: int, scale: float = 1.0) -> Params:
        start = super().init(seed, scale)
        return start | {"b": 0.5 * normal(seed + 50_000, self.outputs, 1)} if self.bias else start

    def loss(self, theta: Params) -> Tensor:
        w, _ = self._placed(theta)
        return -(w @ self.attraction * w).sum() + self.quartic * (w @ self.sigma @ w.T).square().sum()

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """Gaussian views: two independent of covariance Sigma, and one of the positive and of the negative part of B."""
        values, vectors = torch.linalg.eigh(self.attraction)
        size, root = len(values), roots_of(self.sigma)[0]
        pull, push = (vectors * part.clamp_min(0).sqrt() for part in (values, -values))
        z = [normal(4 * seed + i, count, size) for i in range(4)]
        return {"view": z[0] @ root, "other": z[1] @ root, "pull": z[2] @ pull.T, "push": z[3] @ push.T}

    def sample_losses(self, theta: Params, count: int, seed: int) -> Tensor:
        w, _ = self._placed(theta)
        f = {name: x @ w.T for name, x in self.data(count, seed).items()}
        return f["push"].square().sum(-1) - f["pull"].square().sum(-1) + self.quartic * (f["view"] * f["other"]).sum(-1).square()

    def observables(self, theta: Params) -> dict[str, Tensor]:
        w, bias = self._placed(theta)
        spectrum = self.spectrum(w)
        out = {"spectrum": spectrum, "rank": (spectrum > 1e-6 * float(spectrum[0].clamp_min(1e-3))).sum()}
        return out | {"bias": bias.square().sum()} if self.bias else out

    def representative(self, seed: int = 0) -> Params:
        strengths, slack = self.strengths()
        theta = {"W": self.encoder(strengths, seed)}
        if self.bias:
            theta["b"] = rotation(self.outputs, seed + 1)[:, :1] * slack**0.5
        return theta

    # ---------------------------------------------------------------- prediction and runs

    def _predict(self, kind: str) -> Prediction:
        if kind == "minimum":
            strengths, slack = self.strengths()
            values = {
                "loss": Estimate(self.value(strengths)),
                "spectrum": Estimate(self._sorted(strengths)),
                "rank": Estimate(float((strengths > 0).sum())),
            }
            return Prediction(kind, values | ({"bias": Estimate(slack)} if self.bias else {}), refs=("ssl-landscape R1, R4, R5",))
        if self.power is not None:
            return Prediction(kind, {"loss": absent("stationary points and thresholds are those of the free landscape: drop the power")})
        if kind == "phase":
            return Prediction(kind, {"critical decay": Estimate(self._thresholds())}, refs=("ssl-landscape R2",))
        points = list(self.stationary(24))
        found = {"loss": [p[1] for p in points], "index": [float(p[2]) for p in points]}
        values = {name: Estimate(torch.tensor(v, dtype=torch.float64)) for name, v in found.items()}
        b = self.levels[self.levels > 0]
        if len(b) > 1 and float((b[:-1] - b[1:]).min()) < 1e-9 * float(b[0]):
            values["index"] = absent("repeated levels: the stationary points merge and the count does not apply")
        return Prediction(kind, values, refs=("ssl-landscape R1",))

    def _thresholds(self) -> Tensor:
        """Weight decays at which the number of positive eigenvalues of B - g drops: the positive eigenvalues of B."""
        values = torch.linalg.eigvalsh(self.attraction)
        kept = values[values > 0].flip(0)
        if not len(kept):
            raise NotSolvable("B has no positive eigenvalue: everything is collapsed without any decay")
        return kept

    def _control(self, kind: str) -> Prediction:
        """Thresholds of the whitened levels in place of those of B; a wall half as steep; the spectrum without the wall's metric."""
        if kind == "phase":
            return Prediction(kind, {"critical decay": Estimate(self.levels[: len(self._thresholds())])})
        if kind == "critical points":
            values = torch.tensor([p[1] for p in self.stationary(24)], dtype=torch.float64)
            return Prediction(kind, {"loss": Estimate(2 * values)})
        raw = torch.linalg.eigvalsh(self.attraction).flip(0).clamp_min(0) / (2 * self.quartic)
        return Prediction(kind, {"spectrum": Estimate(self._sorted(raw))})

    def _measure(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if self.power is not None:
            return {"loss": absent("stationary points and thresholds are those of the free landscape: drop the power")}
        return self._swept(seed) if kind == "phase" else self._solved(seed)

    def _solved(self, seed: int) -> Mapping[str, Estimate]:
        """Zeros of the gradient by Levenberg-Marquardt near each stationary point, and the Hessian there."""
        gradient, losses, counts, worst = torch.func.grad(self.loss), [], [], 0.0
        for modes, _, _ in self.stationary(24):
            strengths = torch.zeros(len(self.sigma), dtype=torch.float64)
            strengths[list(modes)] = self.levels[list(modes)] / (2 * self.quartic)
            start = {"W": self.encoder(strengths, seed)}
            x0 = flatten(start) + 1e-4 * normal(seed + 7, start["W"].numel()).numpy()
            found = optimize.root(lambda x, start=start: flatten(gradient(unflatten(x, start))), x0, method="lm", options={"xtol": 1e-15})
            end = unflatten(found.x, start)
            worst = max(worst, float(np.abs(found.fun).max()))
            losses.append(float(self.loss(end)))
            counts.append(float(morse(self.loss, end, 1e-6)[0]))
        status: Status = "ok" if worst < 1e-8 else "not_converged"
        found_values = {"loss": losses, "index": counts}
        return {name: Estimate(torch.tensor(v, dtype=torch.float64), residual=worst, status=status) for name, v in found_values.items()}

    def _swept(self, seed: int) -> Mapping[str, Estimate]:
        """Weight decay at which the smallest learned strength vanishes: parabola through three minima with that mode alive."""
        eye, wide = torch.eye(len(self.sigma), dtype=torch.float64), replace(self, outputs=len(self.sigma))

        def rank_and_least(g: float) -> tuple[int, float]:
            model = replace(wide, attraction=self.attraction - g * eye)
            found = model.minimise(seed, restarts=2)
            spectrum = model.spectrum(found.best["W"])
            alive = spectrum[spectrum > 1e-9]
            return len(alive), float(alive[-1]) if len(alive) else 0.0

        top, out = float(self.attraction.trace().abs() + self.attraction.abs().max()), []
        count = rank_and_least(0.0)[0]
        for rank in range(count, 0, -1):
            low, high = 0.0, top
            while high - low > 1e-4 * top:
                middle = 0.5 * (low + high)
                low, high = (middle, high) if rank_and_least(middle)[0] >= rank else (low, middle)
            at = low - 1e-3 * top * np.array([2.0, 1.0, 0.05])
            rows = [rank_and_least(g) for g in at]
            if any(row[0] != rank for row in rows):
                out.append(math.nan)
                continue
            roots = np.roots(np.polyfit(at, [row[1] for row in rows], 2)).real
            out.append(float(roots[np.argmin(np.abs(roots - low))]))
        status: Status = "ok" if all(map(math.isfinite, out)) else "not_converged"
        note = "" if status == "ok" else "two thresholds are closer than the grid"
        return {"critical decay": Estimate(torch.tensor(out[::-1], dtype=torch.float64), status=status, note=note)}


@dataclass(frozen=True, eq=False)
class GaussianInfoNCE(_Embedding):
    """InfoNCE with squared distances, Gaussian views and infinitely many negatives, exactly (ssl-landscape R3).

        L = Tr W C W^T - 1/2 log det(1 + S) - 1/2 Tr[S (1 + S)^-1],  S = W Sigma W^T

    Attributes:
        data_covariance: (d0, d0) A, positive semidefinite.
        augmentation: (d0, d0) C, with A + C positive definite; a direction without augmentation (b = 1) has no minimum.
        outputs: d.

    Kinds: ``minimum`` (loss, spectrum of S).

    Raises:
        InputError: covariances that are none, a singular A + C, NaN.
    """

    data_covariance: Tensor
    augmentation: Tensor
    outputs: int
    slug: ClassVar[str] = "ssl-landscape"
    kinds: ClassVar[tuple[str, ...]] = ("minimum",)
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {"minimum": {"loss": 1e-8, "spectrum": 1e-4}}

    def __post_init__(self) -> None:
        a, c = _pair(self.data_covariance, self.augmentation)
        (outputs,) = sizes("outputs", (self.outputs,))
        symmetric("A + C", a + c, definite=True)
        for name, value in {"data_covariance": a, "augmentation": c, "outputs": outputs, "sigma": a + c}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def _modes(self) -> tuple[Tensor, Tensor]:
        return _whitened_modes(self.data_covariance, self.sigma)

    def strengths(self) -> Tensor:
        """N_i = 1/u - 1, u = (-1 + sqrt(1 + 8 (1 - b_i))) / 2, of the d largest levels.

        Raises:
            NotSolvable: a level of 1: no augmentation in that direction, and N runs to infinity.
        """
        b = self._modes[0]
        if float(b[0]) > 1 - 1e-12:
            raise NotSolvable("a direction has no augmentation (b = 1): its strength runs to infinity and the infimum is not attained")
        n = (2 / ((1 + 8 * (1 - b)).sqrt() - 1) - 1).clamp_min(0)
        n[self.outputs :] = 0
        return n

    def value(self, strengths: Tensor) -> float:
        """Loss of N with these strengths in the eigenbasis of the modes."""
        n, b = strengths, self._modes[0]
        return float((n * (1 - b) - 0.5 * (1 + n).log() - 0.5 * n / (1 + n)).sum())

    def loss(self, theta: Params) -> Tensor:
        w = theta["W"]
        s = w @ self.sigma @ w.T
        eye = torch.eye(self.outputs, dtype=s.dtype)
        return (w @ self.augmentation * w).sum() - 0.5 * torch.logdet(eye + s) - 0.5 * torch.linalg.solve(eye + s, s).diagonal().sum()

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """Pairs of views of the same sample, (count, d0) each."""
        return dict(zip(("first", "second"), views(self.data_covariance, self.augmentation, count, seed), strict=True))

    def sample_losses(self, theta: Params, count: int, seed: int) -> Tensor:
        """Alignment of a pair, and the log mean over all negatives of each view in closed form."""
        w = theta["W"]
        f, g = (x @ w.T for x in self.data(count, seed).values())
        s = torch.eye(self.outputs, dtype=w.dtype) + w @ self.sigma @ w.T
        repel = -0.5 * torch.logdet(s) - 0.5 * (f * torch.linalg.solve(s, f.T).T).sum(-1)
        return 0.5 * (f - g).square().sum(-1) + repel

    def observables(self, theta: Params) -> dict[str, Tensor]:
        return {"spectrum": self.spectrum(theta["W"])}

    def representative(self, seed: int = 0) -> Params:
        return {"W": self.encoder(self.strengths(), seed)}

    def _predict(self, kind: str) -> Prediction:
        try:
            n = self.strengths()
        except NotSolvable as reason:
            return Prediction(kind, {"loss": absent(str(reason), ("ssl-landscape R3",))})
        return Prediction(kind, {"loss": Estimate(self.value(n)), "spectrum": Estimate(self._sorted(n))}, refs=("ssl-landscape R3",))

    def _control(self, kind: str) -> Prediction:
        """The quartic approximation, good only near the origin."""
        quartic = SSLQuartic(self.data_covariance, self.sigma, self.outputs, 0.75).strengths()[0]
        return Prediction(kind, {"spectrum": Estimate(self._sorted(quartic))})


def _pair(data: ArrayLike | Tensor, augmentation: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    a = symmetric("data covariance", data, definite=False)
    return a, symmetric("augmentation covariance", augmentation, len(a), definite=False)


def views(data: Tensor, augmentation: Tensor, count: int, seed: int, negatives: int = 0) -> tuple[Tensor, ...]:
    """Two Gaussian views of each of ``count`` samples, (count, d0) each, and one view of each of ``negatives`` others."""
    root, noise, size = roots_of(data)[0], roots_of(augmentation)[0], len(data)
    draws = torch.Generator().manual_seed(seed)

    def gauss(n: int) -> Tensor:
        return torch.randn(n, size, generator=draws, dtype=torch.float64)

    x = gauss(count) @ root
    pair = (x + gauss(count) @ noise, x + gauss(count) @ noise)
    return (*pair, gauss(negatives) @ root + gauss(negatives) @ noise) if negatives else pair


def view_covariances(first: ArrayLike, second: ArrayLike) -> tuple[Tensor, Tensor]:
    """A and C from two views (n, d0) of the same samples: A the symmetrised cross-covariance, C = Cov(v1 - v2) / 2.

    Cov(v) itself is A + C. With few samples A may have negative eigenvalues; that is how a batch sees it, and it is not mended here.
    """
    v, w = matrix("first", first, (None, None)), matrix("second", second, (None, None))
    if v.shape != w.shape:
        raise InputError(f"two views of the same samples must have one shape, got {tuple(v.shape)} and {tuple(w.shape)}")
    v, w = v - v.mean(0), w - w.mean(0)
    cross = v.T @ w / len(v)
    gap = v - w
    return 0.5 * (cross + cross.T), 0.5 * gap.T @ gap / len(v)


def monte_carlo_infonce(w: Tensor, first: Tensor, second: Tensor, others: Tensor) -> Tensor:
    """InfoNCE with squared distances on sampled views: mean |f1 - f2|^2 / 2 + mean log mean exp(-|f1 - f(chi)|^2 / 2)."""
    f, g, chi = first @ w.T, second @ w.T, others @ w.T
    distance = 0.5 * torch.cdist(f, chi).square()
    return 0.5 * (f - g).square().sum(-1).mean() + (torch.logsumexp(-distance, 1) - math.log(len(chi))).mean()
