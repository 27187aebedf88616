"""Linear autoencoders with L2 on the product or on the factors (regularized-lae).

L = |X - W2 W1 X|_F^2 (+ lam |W2 W1|^2, or + lam (|W1|^2 + |W2|^2)), summed over samples, no 1/2; only X X^T enters. W1 is (k, m), W2
(m, k). Without the second penalty the symmetry is GL(k); with it O(k), and every critical point has W1 = W2^T.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import linalg, optimize
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate, Status
from parasym.solvable.contract import Prediction, absent
from parasym.solvable.engines import Params, flatten, flow, morse, unflatten
from parasym.solvable.landscape import Generator, Landscape, matrix, normal, roots_of, rotation, sizes, skew, symmetric

Penalty = Literal["none", "product", "sum"]


@dataclass(frozen=True, eq=False)
class Critical:
    """A critical manifold.

    Attributes:
        modes: index set I, from 0, increasing.
        loss: L there.
        index: negative Hessian eigenvalues; None where no count is known.
        nullity: dimension of the manifold; None likewise.
    """

    modes: tuple[int, ...]
    loss: float
    index: int | None = None
    nullity: int | None = None


@dataclass(frozen=True, eq=False)
class RegularizedLAE(Landscape):
    """A linear autoencoder.

    Attributes:
        scatter: (m, m) X X^T, summed over samples.
        codes: k.
        lam: strength of the penalty.
        penalty: "none", "product" (lam |W2 W1|^2) or "sum" (lam (|W1|^2 + |W2|^2)).
        time: at which ``conserved`` compares the charge.

    Kinds: ``minimum`` (loss, map W2 W1, transpose gap and recovered singular values for "sum"), ``critical points`` (loss of every
    critical manifold, and for "sum" its Morse index and nullity), ``conserved`` (Q = W1 W1^T - W2^T W2 under gradient flow).

    Raises:
        InputError: a scatter that is not positive semidefinite, a negative lam, widths that are not positive, NaN.
    """

    scatter: Tensor
    codes: int
    lam: float = 1.0
    penalty: Penalty = "sum"
    time: float = 0.05
    slug: ClassVar[str] = "regularized-lae"
    kinds: ClassVar[tuple[str, ...]] = ("minimum", "critical points", "conserved")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "minimum": {"loss": 1e-8, "map": 1e-5, "transpose gap": 1e-5, "singular values": 1e-4},
        "critical points": {"loss": 1e-8, "index": 0.0, "nullity": 0.0},
        "conserved": {"charge": 1e-7},
    }

    def __post_init__(self) -> None:
        a = symmetric("scatter", self.scatter, definite=False)
        (codes,) = sizes("codes", (self.codes,))
        if self.penalty not in ("none", "product", "sum"):
            raise InputError(f"penalty must be 'none', 'product' or 'sum', got {self.penalty!r}")
        if not (math.isfinite(self.lam) and self.lam >= 0) or (self.penalty != "none" and self.lam == 0):
            raise InputError(f"lam must be positive (or use penalty='none'), got {self.lam!r}")
        for name, value in {"scatter": a, "codes": codes, "lam": float(self.lam) if self.penalty != "none" else 0.0}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of_data(cls, x: ArrayLike, codes: int, lam: float = 1.0, penalty: Penalty = "sum", **rest: Any) -> RegularizedLAE:
        """From data x (n, m), rows are samples, centred here."""
        data = matrix("x", x, (None, None))
        data = data - data.mean(0)
        return cls(data.T @ data, codes, lam, penalty, **rest)

    # ---------------------------------------------------------------- the closed form

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """sigma^2 (m,), largest first, and principal directions (m, m) in columns."""
        values, vectors = torch.linalg.eigh(self.scatter)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    @property
    def live(self) -> int:
        """Modes that a critical point may hold: sigma^2 > lam for "sum", sigma^2 > 0 otherwise."""
        square = self.spectrum[0]
        return int((square > max(self.lam if self.penalty == "sum" else 0.0, 1e-12 * float(square[0]))).sum())

    def shrinkage(self, square: Tensor) -> Tensor:
        """Eigenvalues of W2 W1 on modes with sigma^2 = ``square`` (R1)."""
        if self.penalty == "none":
            return torch.ones_like(square)
        return square / (square + self.lam) if self.penalty == "product" else (1 - self.lam / square).clamp_min(0)

    def cost(self, modes: tuple[int, ...]) -> float:
        """Loss of the critical manifold that holds ``modes`` (R2)."""
        square = self.spectrum[0]
        held = square[list(modes)] if modes else square[:0]
        extra = {"none": held * 0, "product": self.lam * held / (held + self.lam), "sum": 2 * self.lam - self.lam**2 / held}[self.penalty]
        return float(square.sum() - held.sum() + extra.sum())

    def critical_points(self, limit: int | None = None) -> Iterator[Critical]:
        """Critical manifolds, fewest modes first, at most ``limit``; index and nullity for "sum" (R5)."""
        square, live, k = self.spectrum[0], self.live, self.codes
        simple = live < 2 or float((square[: live - 1] - square[1:live]).min()) > 1e-9 * float(square[0])
        every = (c for size in range(min(k, live) + 1) for c in itertools.combinations(range(live), size))
        for modes in itertools.islice(every, limit):
            if self.penalty != "sum" or not simple or k > len(square):
                yield Critical(modes, self.cost(modes))
                continue
            size = len(modes)
            index = sum(j < i for i in modes for j in range(live) if j not in modes) + (k - size) * (live - size)
            yield Critical(modes, self.cost(modes), index, k * (k - 1) // 2 - (k - size) * (k - size - 1) // 2)

    def top(self) -> tuple[int, ...]:
        """The modes of the global minimum."""
        return tuple(range(min(self.codes, self.live)))

    def weights(self, modes: tuple[int, ...], seed: int = 0) -> Params:
        """Weights on the critical manifold of ``modes``: W2 = U_I S^(1/2) O^T, W1 = W2^T, or S^0, S and a random G."""
        square, vectors = self.spectrum
        shrunk = self.shrinkage(square[list(modes)])
        u = vectors[:, list(modes)]
        turn = rotation(self.codes, seed)[:, : len(modes)]
        if self.penalty != "sum":
            stretch = torch.linspace(0.7, 1.5, self.codes, dtype=torch.float64)[: len(modes)]
            return {"W1": turn * stretch @ (shrunk[:, None] * u.T), "W2": u / stretch @ turn.T}
        w2 = u * shrunk.sqrt() @ turn.T
        return {"W1": w2.T.contiguous(), "W2": w2}

    # ---------------------------------------------------------------- the model

    def init(self, seed: int, scale: float = 1.0) -> Params:
        m = len(self.scatter)
        return {
            "W1": scale * normal(2 * seed, self.codes, m) / m**0.5,
            "W2": scale * normal(2 * seed + 1, m, self.codes) / self.codes**0.5,
        }

    def loss(self, theta: Params) -> Tensor:
        product = theta["W2"] @ theta["W1"]
        error = ((product @ self.scatter - 2 * self.scatter) * product).sum((-2, -1))
        return self.scatter.trace() + error + self._regulariser(theta, product)

    def _regulariser(self, theta: Params, product: Tensor) -> Tensor:
        if self.penalty == "sum":
            return self.lam * (theta["W1"].square().sum((-2, -1)) + theta["W2"].square().sum((-2, -1)))
        return self.lam * product.square().sum((-2, -1))  # lam = 0 without a penalty

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """Gaussian x (count, m) with E x x^T = scatter: each stands for the whole data set."""
        return {"x": normal(seed, count, len(self.scatter)) @ roots_of(self.scatter)[0]}

    def sample_losses(self, theta: Params, count: int, seed: int) -> Tensor:
        x, product = self.data(count, seed)["x"], theta["W2"] @ theta["W1"]
        return (x - x @ product.T).square().sum(-1) + self._regulariser(theta, product)

    def observables(self, theta: Params) -> dict[str, Tensor]:
        out = {"map": theta["W2"] @ theta["W1"]}
        if self.penalty == "sum":
            out["transpose gap"] = (theta["W1"] - theta["W2"].T).norm()
            out["singular values"] = principal_directions(theta["W2"], self.lam)[1][: len(self.top())]
        return out

    def charge(self, theta: Params) -> Tensor:
        """(k, k) Q = W1 W1^T - W2^T W2 (R6)."""
        return theta["W1"] @ theta["W1"].mT - theta["W2"].mT @ theta["W2"]

    def generators(self) -> Mapping[str, Generator]:
        turn = skew(self.codes) if self.penalty == "sum" else normal(0, self.codes, self.codes)
        name = "rotation" if self.penalty == "sum" else "general linear"
        return {name: lambda theta: {"W1": turn @ theta["W1"], "W2": -theta["W2"] @ turn}}

    def representative(self, seed: int = 0) -> Params:
        return self.weights(self.top(), seed)

    # ---------------------------------------------------------------- prediction and runs

    def _predict(self, kind: str) -> Prediction:
        square, vectors = self.spectrum
        if kind == "conserved":
            q = self.charge(self.init(0))
            return Prediction(kind, {"charge": Estimate(q * math.exp(-4 * self._decay() * self.time))}, refs=("regularized-lae R6",))
        if kind == "critical points":
            points = list(self.critical_points(24))
            values = {"loss": Estimate(torch.tensor([p.loss for p in points], dtype=torch.float64))}
            if self.penalty == "sum":
                reason = absent("repeated singular values, or more codes than inputs: the manifolds merge and the count does not apply")
                for name in ("index", "nullity"):
                    counts = [getattr(p, name) for p in points]
                    values[name] = reason if None in counts else Estimate(torch.tensor(counts, dtype=torch.float64))
            return Prediction(kind, values, refs=("regularized-lae R1, R2, R5",))
        top = self.top()
        kept = list(top)
        through = Estimate(vectors[:, kept] * self.shrinkage(square[kept]) @ vectors[:, kept].T)
        if len(top) < self.live and float(square[len(top) - 1] - square[len(top)]) < 1e-9 * float(square[0]):
            through = absent("the last kept singular value is repeated beyond the codes: the map is not unique")
        values = {"loss": Estimate(self.cost(top)), "map": through}
        if self.penalty == "sum":
            values |= {"transpose gap": Estimate(0.0), "singular values": Estimate(square[kept].sqrt())}
            if not top:
                values["singular values"] = absent("lam is at least sigma_1^2: every mode is cut and W = 0")
        return Prediction(kind, values, refs=("regularized-lae R2, R3, R4",))

    def _decay(self) -> float:
        return self.lam if self.penalty == "sum" else 0.0

    def _control(self, kind: str) -> Prediction:
        """The penalty mistaken: shrinkage of the other kind, and a charge that decays at half the rate (or decays where it is kept)."""
        if kind == "conserved":
            rate = 2 * self.lam if self.penalty == "sum" else 1.0
            return Prediction(kind, {"charge": Estimate(self.charge(self.init(0)) * math.exp(-rate * self.time))})
        square, vectors = self.spectrum
        other = (1 - 0.5 * self.lam / square).clamp_min(0) if self.penalty == "sum" else 0.9 * self.shrinkage(square)
        if kind == "critical points":
            wrong = [float(square.sum() - (other * square)[list(p.modes)].sum()) for p in self.critical_points(24)]
            return Prediction(kind, {"loss": Estimate(torch.tensor(wrong, dtype=torch.float64))})
        kept = list(range(min(self.codes, len(square))))
        return Prediction(kind, {"map": Estimate(vectors[:, kept] * other[kept] @ vectors[:, kept].T)})

    def _measure(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if kind == "conserved":
            path = flow(self.loss, self.init(0), [0.0, self.time])
            status: Status = "ok" if path.ok else "not_converged"
            return {"charge": Estimate(self.charge({name: w[-1] for name, w in path.theta.items()}), status=status)}
        gradient, losses, counts, worst = torch.func.grad(self.loss), [], [], 0.0
        for point in self.critical_points(24):
            start = self.weights(point.modes, seed)
            x0 = flatten(start) + 1e-4 * normal(seed + 7, sum(w.numel() for w in start.values())).numpy()
            found = optimize.root(lambda x, start=start: flatten(gradient(unflatten(x, start))), x0, method="lm", options={"xtol": 1e-15})
            end = unflatten(found.x, start)
            worst = max(worst, float(np.abs(found.fun).max()))
            losses.append(float(self.loss(end)))
            counts.append(morse(self.loss, end, 1e-6))
        status = "ok" if worst < 1e-6 * float(self.scatter.trace()) else "not_converged"
        pairs = torch.tensor(counts, dtype=torch.float64)
        values = {"loss": torch.tensor(losses, dtype=torch.float64), "index": pairs[:, 0], "nullity": pairs[:, 1]}
        return {name: Estimate(value, residual=worst, status=status) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------ reading the weights, and algorithms


def principal_directions(decoder: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Principal directions (m, k) and singular values (k,) of the data from the decoder of a "sum" autoencoder (R4).

    sigma_i = sqrt(lam / (1 - s_i^2)) with s_i the decoder's singular values; a dead code (s_i = 0) gives sqrt(lam), which means nothing.
    """
    left, s, _ = torch.linalg.svd(decoder, full_matrices=False)
    return left, (lam / (1 - s.square()).clamp_min(1e-300)).sqrt()


def transpose_gap(encoder: Tensor, decoder: Tensor) -> float:
    """|W1 - W2^T|_F over the mean of the two norms: 0 at every critical point under L2 on both factors (R3)."""
    scale = 0.5 * (encoder.norm() + decoder.norm())
    return float((encoder - decoder.T).norm() / scale) if float(scale) else 0.0


def tied_descent(scatter: Tensor, start: Tensor, lam: float, lr: float, steps: int) -> Tensor:
    """Regularised Oja: W2 -= lr (((W2 W2^T - I) X X^T) W2 + lam W2); the decoder (m, k) after ``steps`` (R8)."""
    w = start.clone()
    for _ in range(steps):
        projected = w.T @ scatter
        w = w - lr * (w @ (projected @ w) - projected.T + lam * w)
    return w


def exact_tied(scatter: Tensor, start: Tensor, lam: float, steps: int) -> Tensor:
    """W1 = W2^T, then W2 = (W1 X X^T)^T (W1 X X^T W1^T + lam)^-1, repeated; the decoder (m, k) (R8)."""
    w = start.clone()
    eye = torch.eye(w.shape[1], dtype=w.dtype)
    for _ in range(steps):
        seen = w.T @ scatter
        w = torch.linalg.solve(seen @ w + lam * eye, seen).T
    return w


def align_backward(scatter: Tensor, forward: Tensor, start: Tensor, lam: float, lr: float, steps: int) -> Tensor:
    """Information alignment: backward weights B (m, k) of a layer with fixed ``forward`` weights W (k, m) follow the decoder's gradient,
    B += lr (X X^T W^T - B W X X^T W^T - lam B), which needs the layer's input and output only; it ends at ridge regression of the input on
    the output, and at W^T where W is the encoder of a critical point (R9, R3)."""
    b, seen = start.clone(), forward @ scatter
    square = seen @ forward.T
    for _ in range(steps):
        b = b + lr * (seen.T - b @ square - lam * b)
    return b


def exact_untied(scatter: Tensor, theta: Params, lam: float, steps: int, *, synced: bool = False) -> Params:
    """Alternate the exact minima over the two factors; W1 solves the Sylvester equation W2^T W2 W1 X X^T + lam W1 = W2^T X X^T (R8).

    Args:
        synced: average W1 and W2^T after each step.
    """
    w1, w2 = theta["W1"].clone(), theta["W2"].clone()
    inverse, eye = torch.linalg.pinv(scatter, hermitian=True).numpy(), torch.eye(len(w1), dtype=w1.dtype)
    full = bool(torch.linalg.matrix_rank(scatter) == len(scatter))
    for _ in range(steps):
        gram = w2.T @ w2
        if full:  # (W2^T W2) W1 + W1 lam (X X^T)^-1 = W2^T
            w1 = torch.from_numpy(linalg.solve_sylvester(gram.numpy(), lam * inverse, w2.T.numpy()))
        else:
            values, vectors = torch.linalg.eigh(scatter)
            rows = [torch.linalg.solve(s * gram + lam * eye, s * (w2.T @ v)) for s, v in zip(values, vectors.T, strict=True)]
            w1 = torch.stack(rows, 1) @ vectors.T
        w2 = torch.linalg.solve(w1 @ scatter @ w1.T + lam * eye, w1 @ scatter).T
        if synced:
            w2 = 0.5 * (w2 + w1.T)
            w1 = w2.T.contiguous()
    return {"W1": w1, "W2": w2}
