"""Deep linear chains under label noise: where SGD's noise leads among the global minima, and how sharp it is there.

f(x) = W_D ... W_1 x, y = V x + eps, loss |f - y|^2 summed over outputs (no 1/2), eps independent of x. All global minima have the
product V; they differ by a gauge G_i in every hidden layer, W_i -> G_i W_i G_(i-1)^-1. Gradient noise picks one of them, the minimiser
of E|g|^2, which has a closed form (perfect-platonic R3), and with it the curvature (flatness-or-sharpness R3, R5). With
(1/2)|f - y|^2 the Hessian is half, E|g|^2 a quarter of the values here. Everything in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.solvable.engines import lbfgs_restarts

Weights = Sequence[Tensor]


def square_roots(M: Tensor) -> tuple[Tensor, Tensor]:
    """M^1/2 and its pseudo-inverse, for a symmetric positive semi-definite M (..., n, n)."""
    w, Q = torch.linalg.eigh(0.5 * (M + M.mT))
    w = torch.where(w > 1e-14 * w.amax(-1, keepdim=True), w, torch.zeros_like(w))
    root = w.sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp_min(1e-300), torch.zeros_like(root))
    return (Q * root[..., None, :]) @ Q.mT, (Q * inverse[..., None, :]) @ Q.mT


def product(weights: Weights) -> Tensor:
    """W_D ... W_1, batched."""
    out = weights[0]
    for W in weights[1:]:
        out = W @ out
    return out


# ------------------------------------------------------------------------------------------------ any global minimum


def signals(weights: Weights, inputs: Tensor, noise: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What runs forward and back through the chain, batched over leading axes.

    Args:
        weights: W_1..W_D, each (..., d_i, d_(i-1)). inputs: (d_0, d_0) covariance. noise: (d_D, d_D) covariance of eps.

    Returns:
        H_0..H_(D-1), covariances of the representations, and G_1..G_D, covariances of the back-signals L_i^T eps (perfect-platonic R1).
    """
    H, G = [inputs], [noise]
    for W in weights[:-1]:
        H.append(W @ H[-1] @ W.mT)
    for W in reversed(list(weights[1:])):
        G.append(W.mT @ G[-1] @ W)
    return H, G[::-1]


def _trace(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1).sum(-1)


def layer_fluctuations(weights: Weights, inputs: Tensor, noise: Tensor) -> Tensor:
    """E|g_i|^2 = 4 tr G_i tr H_(i-1) of each layer at a global minimum, (D, ...) (perfect-platonic R1, flatness-or-sharpness R1)."""
    H, G = signals(weights, inputs, noise)
    return torch.stack([4 * _trace(g) * _trace(h) for g, h in zip(G, H, strict=True)])


def chain_fluctuation(weights: Weights, inputs: Tensor, noise: Tensor) -> Tensor:
    """E|g|^2 at a global minimum: the sum of `layer_fluctuations`."""
    return layer_fluctuations(weights, inputs, noise).sum(0)


def hessian_trace(weights: Weights, inputs: Tensor, outward: Tensor | None = None) -> Tensor:
    """tr H = 2 sum tr(L_i^T L_i) tr(R_(i-1) Sigma_x R_(i-1)^T) at a global minimum, batched (flatness-or-sharpness R1).

    Args:
        outward: (o, d_D) fixed read-out M_O behind the chain; the identity if not given.
    """
    metric = torch.eye(weights[-1].shape[-2], dtype=inputs.dtype) if outward is None else outward.T @ outward
    return layer_fluctuations(weights, inputs, metric).sum(0) / 2


def curvature_kernel(weights: Weights, inputs: Tensor, outward: Tensor | None = None) -> Tensor:
    """(o d_0, o d_0) matrix with the non-zero spectrum of the Hessian at a global minimum (flatness-or-sharpness R5).

    2 sum_i (L_i L_i^T) kron (Sigma_x^1/2 R_(i-1)^T R_(i-1) Sigma_x^1/2): the Hessian is 2 E J^T J, this is 2 E J J^T in the form of inputs.
    """
    rX, _ = square_roots(inputs)
    L = torch.eye(weights[-1].shape[0], dtype=inputs.dtype) if outward is None else outward
    R = [torch.eye(inputs.shape[0], dtype=inputs.dtype)]
    for W in weights[:-1]:
        R.append(W @ R[-1])
    total = torch.zeros(L.shape[0] * len(inputs), L.shape[0] * len(inputs), dtype=inputs.dtype)
    for W, r in zip(reversed(list(weights)), reversed(R), strict=True):
        total = total + 2 * torch.kron(L @ L.T, rX @ r.T @ r @ rX)
        L = L @ W
    return total


def balance_gap(weights: Weights, inputs: Tensor, noise: Tensor) -> Tensor:
    """Largest over hidden layers of |tr(G_(i+1)) H_i - tr(H_(i-1)) G_i|_F over the sum of the two norms (perfect-platonic R2)."""
    H, G = signals(weights, inputs, noise)
    gaps = []
    for i in range(1, len(weights)):
        a, b = _trace(G[i])[..., None, None] * H[i], _trace(H[i - 1])[..., None, None] * G[i - 1]
        gaps.append((a - b).norm(dim=(-2, -1)) / (a.norm(dim=(-2, -1)) + b.norm(dim=(-2, -1))))
    return torch.stack(gaps).amax(0) if gaps else torch.zeros(())


def regauge(weights: Weights, gauges: Sequence[Tensor]) -> list[Tensor]:
    """The same product in another gauge: W_i -> G_i W_i G_(i-1)^-1 with ``gauges`` G_1..G_(D-1)."""
    left, right = [*gauges, None], [None, *(torch.linalg.inv(G) for G in gauges)]
    out = []
    for a, W, b in zip(left, weights, right, strict=True):
        moved = W if a is None else a @ W
        out.append(moved if b is None else moved @ b)
    return out


def random_gauges(widths: Sequence[int], size: float, generator: torch.Generator) -> list[Tensor]:
    """I + size N(0, 1) / sqrt(width) for each hidden layer."""
    return [torch.eye(w, dtype=torch.float64) + size * torch.randn(w, w, generator=generator, dtype=torch.float64) / w**0.5 for w in widths]


def minimise_gauge(weights: Weights, value: Callable[[list[Tensor]], Tensor], seed: int = 0, spread: float = 0.3) -> list[Tensor]:
    """Minimise a function of the weights over all gauges of one minimum, by L-BFGS on G_i = exp(A_i) from a random start.

    Returns:
        the weights found, with the same product.
    """
    widths, g = [W.shape[0] for W in weights[:-1]], torch.Generator().manual_seed(seed)
    start = {str(i): spread * torch.randn(w, w, generator=g, dtype=torch.float64) for i, w in enumerate(widths)}

    def moved(algebra: Mapping[str, Tensor]) -> list[Tensor]:
        return regauge(weights, [torch.linalg.matrix_exp(A) for A in algebra.values()])

    return moved(lbfgs_restarts(lambda algebra: value(moved(algebra)), [start], tol=1e-11).best)


# ------------------------------------------------------------------------------------------------ the one noise picks


@dataclass(frozen=True, eq=False)
class Chain:
    """Closed forms of the minimiser of E|g|^2 among the global minima of a chain of ``depth`` layers.

    Args:
        target: V (o, i), the product of the weights. inputs: Sigma_x (i, i). noise: Sigma_eps (o, o), or the metric M_O^T Sigma_eps M_O
            behind a fixed read-out. depth: D, the number of trainable layers.
        outward: fixed read-out M_O behind the chain, which only the curvature asks for.

    Raises:
        InputError: shapes that do not fit, covariances that are not positive semi-definite, or a target that reaches outputs without noise
            (the equilibrium is then arbitrarily sharp and does not exist).
    """

    target: Tensor
    inputs: Tensor
    noise: Tensor
    depth: int
    outward: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("target", "inputs", "noise"):
            M = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            if M.ndim != 2 or not bool(torch.isfinite(M).all()):
                raise InputError(f"{name} must be a finite matrix, got shape {tuple(M.shape)}.")
            object.__setattr__(self, name, M)
        o, i = self.target.shape
        for name, n in (("inputs", i), ("noise", o)):
            M = getattr(self, name)
            if M.shape != (n, n) or not torch.allclose(M, M.T) or float(torch.linalg.eigvalsh(M).min()) < -1e-10 * float(M.trace().abs()):
                raise InputError(f"{name} must be a covariance of shape ({n}, {n}): symmetric and positive semi-definite.")
        if self.depth < 1:
            raise InputError(f"depth must be at least 1, got {self.depth}.")
        rE, iE = square_roots(self.noise)
        rX, _ = square_roots(self.inputs)
        unseen = (self.target - rE @ iE @ self.target) @ rX
        if float(unseen.norm()) > 1e-9 * max(float(self.target.norm()), 1e-300):
            raise InputError("The target reaches outputs without label noise: nothing bounds the sharpness there, no equilibrium exists.")

    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """P (o, r), s (r,), Q^T (r, i): the thin SVD of Sigma_eps^1/2 V Sigma_x^1/2, cut at its rank."""
        P, s, Qt = torch.linalg.svd(square_roots(self.noise)[0] @ self.target @ square_roots(self.inputs)[0], full_matrices=False)
        keep = s > 1e-13 * s.max().clamp_min(1e-300)
        return P[:, keep], s[keep], Qt[keep]

    @property
    def total(self) -> float:
        """s_bar, the nuclear norm of Sigma_eps^1/2 V Sigma_x^1/2."""
        return float(self.spectrum()[1].sum())

    @property
    def energy(self) -> float:
        """T, a quarter of E|g_i|^2, the same for every layer: (te tx)^(1/D) s_bar^(2 - 2/D)."""
        te, tx = float(self.noise.trace()), float(self.inputs.trace())
        return (te * tx) ** (1 / self.depth) * self.total ** (2 - 2 / self.depth)

    def scales(self) -> list[float]:
        """a_1..a_(D-1): H_i = a_i O_i diag(s) O_i^T, G_i = O_i diag(s) O_i^T / a_i."""
        s, T = self.total, self.energy
        if not s:
            return [0.0] * (self.depth - 1)
        return [s * float(self.inputs.trace()) / T * (s**2 / T) ** i for i in range(self.depth - 1)]

    def fluctuation(self) -> float:
        """The least E|g|^2 = 4 D T."""
        return 4 * self.depth * self.energy

    def weights(self, widths: Sequence[int], generator: torch.Generator | None = None) -> list[Tensor]:
        """W_1..W_D at the minimiser (perfect-platonic R3).

        Args:
            widths: d_1..d_(D-1), each at least the rank of the target.
            generator: draws the free rotation O_i of every hidden layer; the identity if not given.

        Raises:
            InputError: the wrong number of widths, or a hidden layer narrower than the rank.
        """
        P, s, Qt = self.spectrum()
        if len(widths) != self.depth - 1:
            raise InputError(f"A chain of {self.depth} layers has {self.depth - 1} hidden widths, got {len(widths)}.")
        if self.depth == 1:
            return [self.target.clone()]
        if min(widths) < len(s):
            raise InputError(f"A hidden width of {min(widths)} cannot carry a map of rank {len(s)}.")
        if not len(s):
            shapes = [self.target.shape[1], *widths, self.target.shape[0]]
            return [torch.zeros(b, a, dtype=torch.float64) for a, b in pairwise(shapes)]
        turns, a = [torch.eye(w, len(s), dtype=torch.float64) for w in widths], self.scales()
        if generator is not None:
            turns = [torch.linalg.qr(torch.randn(w, len(s), generator=generator, dtype=torch.float64)).Q for w in widths]
        first = math.sqrt(a[0]) * turns[0] @ (s.sqrt()[:, None] * (Qt @ square_roots(self.inputs)[1]))
        middle = [math.sqrt(a[i] / a[i - 1]) * turns[i] @ turns[i - 1].T for i in range(1, self.depth - 1)]
        last = a[-1] ** -0.5 * (square_roots(self.noise)[1] @ P * s.sqrt()) @ turns[-1].T
        return [first, *middle, last]

    @property
    def _out(self) -> Tensor:
        """M_O, the identity without one."""
        return torch.eye(len(self.noise), dtype=torch.float64) if self.outward is None else self.outward.double()

    def _outer(self) -> tuple[Tensor, float]:
        """Y = M_O Sigma_eps^-1/2 P diag(s) P^T Sigma_eps^-1/2 M_O^T, and tr M_O^T M_O (d_y without a read-out)."""
        P, s, _ = self.spectrum()
        out = self._out
        half = out @ square_roots(self.noise)[1] @ P * s.sqrt()
        return half @ half.T, float(out.square().sum())

    def sharpness(self) -> float:
        """tr H at the minimiser: 2 T [(D - 1) q / s_bar + d_y / te] (flatness-or-sharpness R3)."""
        Y, d = self._outer()
        te = float(self.noise.trace())
        return 2 * self.energy * ((self.depth - 1) * float(Y.trace()) / self.total + d / te)

    def flattest(self) -> Chain:
        """The chain whose minimiser is the flattest global minimum: noise proportional to M_O^T M_O (the identity), since then
        E|g|^2 = 2 s2 tr H (flatness-or-sharpness R1)."""
        return Chain(self.target, self.inputs, self._out.T @ self._out, self.depth, self.outward)

    def flattest_sharpness(self) -> float:
        """The smallest tr H of any global minimum: 2 D (d_y tx)^(1/D) |V Sigma_x^1/2|_*^(2 - 2/D) (flatness-or-sharpness R3)."""
        return self.flattest().fluctuation() / 2

    def top_curvature(self) -> float:
        """The largest Hessian eigenvalue at the minimiser, from the closed form of the curvature kernel (flatness-or-sharpness R5)."""
        _, s, Qt = self.spectrum()
        Y, T, D = self._outer()[0], self.energy, self.depth
        full, Sq = self._out @ self._out.T, Qt.T @ (s[:, None] * Qt)
        if D == 1:
            return float(torch.linalg.eigvalsh(2 * torch.kron(full, self.inputs))[-1])
        a = self.scales()
        K = torch.kron(Y, self.inputs) / a[0] + (D - 2) * T / self.total**2 * torch.kron(Y, Sq) + a[-1] * torch.kron(full, Sq)
        return float(torch.linalg.eigvalsh(2 * K)[-1])

    def kernel(self) -> Tensor:
        """The matrix K of the kernel x^T K x' that every hidden layer has up to a factor (perfect-platonic R4).

        K = Sigma_x^-1/2 (Sigma_x^1/2 V^T Sigma_eps V Sigma_x^1/2)^1/2 Sigma_x^-1/2.
        """
        rX, iX = square_roots(self.inputs)
        return iX @ square_roots(rX @ self.target.T @ self.noise @ self.target @ rX)[0] @ iX


def chain_equilibrium(V: Tensor, inputs: Tensor, noise: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Weights W_1..W_D with product V that minimise E|g|^2; see `Chain.weights`."""
    return Chain(V, inputs, noise, len(widths) + 1).weights(widths)
