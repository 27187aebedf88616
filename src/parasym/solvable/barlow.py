"""Linear and kernel Barlow Twins from small initialisation: embedding dimensions are learned one at a time (stepwise-ssl).

f(x) = W x, Gamma = sum_i (x_i x'_i^T + x'_i x_i^T) / (2n), C = W Gamma W^T, L = |C - I|_F^2 (lambda = 1, nothing normalised or centred),
gradient flow W' = -4 (C - I) W Gamma.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate, Status
from parasym.solvable.contract import Model, Prediction, absent, positive
from parasym.solvable.engines import Params, flow

SLUG = "stepwise-ssl"
_SEPARATED = 3.0  # separation number from which times and vectors of single modes are claimed


def view_correlation(x: Tensor, other: Tensor) -> Tensor:
    """Gamma (m, m) of the two views x, other (n, m)."""
    if x.shape != other.shape or x.ndim != 2 or not bool(torch.isfinite(x).all() & torch.isfinite(other).all()):
        raise InputError(f"the views must be finite and of one shape (n, m), got {tuple(x.shape)} and {tuple(other.shape)}")
    cross = x.double().mT @ other.double() / len(x)
    return 0.5 * (cross + cross.mT)


@dataclass(frozen=True, eq=False)
class BarlowFlow:
    """Closed forms of the flow for a given Gamma.

    Attributes:
        gamma: (m, m) symmetric; may have negative eigenvalues. d: embedding dimension <= m.

    Raises:
        InputError: gamma is not finite and symmetric, or d does not fit.
    """

    gamma: Tensor
    d: int

    def __post_init__(self) -> None:
        gamma = torch.as_tensor(self.gamma, dtype=torch.float64)
        if gamma.ndim != 2 or gamma.shape[0] != gamma.shape[1] or not bool(torch.isfinite(gamma).all()):
            raise InputError(f"Gamma must be a finite square matrix, got shape {tuple(gamma.shape)}")
        if float((gamma - gamma.mT).abs().max()) > 1e-10 * (1 + float(gamma.abs().max())):
            raise InputError("Gamma must be symmetric: average the two orders of the views")
        if not 1 <= self.d <= len(gamma):
            raise InputError(f"the embedding dimension must be between 1 and {len(gamma)}, got {self.d}")
        object.__setattr__(self, "gamma", 0.5 * (gamma + gamma.mT))

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.gamma)
        return values.flip(0), vectors.flip(1)

    @property
    def spectrum(self) -> Tensor:
        """g_1 >= g_2 >= ... (m,)."""
        return self._eigen[0]

    @property
    def directions(self) -> Tensor:
        """v_1, v_2, ... as columns (m, m)."""
        return self._eigen[1]

    @property
    def learned(self) -> int:
        """How many of the d dimensions have g > 0 and are learned; the final loss is d less this."""
        return int((self.spectrum[: self.d] > 1e-12 * self.spectrum.abs().max()).sum())

    def start(self, W0: Tensor) -> tuple[Tensor, Tensor]:
        """(u, s0): the aligned start (d, d), (d,) the flow from a small W0 (d, m) follows: QR in the order of learning (R3)."""
        W0 = torch.as_tensor(W0, dtype=torch.float64)
        if W0.shape != (self.d, len(self.gamma)) or not bool(torch.isfinite(W0).all()):
            raise InputError(f"W0 must be a finite ({self.d}, {len(self.gamma)}) matrix, got shape {tuple(W0.shape)}")
        Q, R = torch.linalg.qr(W0 @ self.directions[:, : self.d])
        return Q * R.diagonal().sign(), R.diagonal().abs()

    def strengths(self, s0: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """s_j(t) = e^{4 g t} / sqrt(s_0^-2 + (e^{8 g t} - 1) g), (T, d) (R1)."""
        t, g = torch.as_tensor(times, dtype=torch.float64)[:, None], self.spectrum[: self.d]
        s0 = torch.as_tensor(s0, dtype=torch.float64)
        fade = (-8 * g.abs() * t).exp()  # everything over the larger exponential, so that no time is too long
        inside = torch.where(g > 0, fade, 1.0) + s0.square() * g.abs() * (1 - fade)
        return s0 * torch.where(g > 0, 1.0, fade.sqrt()) / inside.sqrt()

    def eigenvalues(self, s0: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """lam_j(t) = g_j s_j^2 of C, (T, d): logistic of rate 8 g_j."""
        return self.spectrum[: self.d] * self.strengths(s0, times).square()

    def loss(self, s0: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """sum (1 - lam_j)^2, (T,)."""
        return (1 - self.eigenvalues(s0, times)).square().sum(-1)

    def step_times(self, s0: Tensor, eta: float | None = None) -> Tensor:
        """tau_j at which lam_j = 1/2, (d,); infinite for g_j <= 0, 0 for a mode that starts beyond. With ``eta``, in the
        time of gradient descent at that rate, whose growth rate is log(1 + 4 eta g) / eta (R2, A1)."""
        g, s0 = self.spectrum[: self.d], torch.as_tensor(s0, dtype=torch.float64)
        g = torch.where(g > 1e-12 * self.spectrum.abs().max(), g, torch.nan)
        small = g * s0.square()
        time = ((1 - small) / small).log() / (8 * g) if eta is None else -small.log() * eta / (2 * torch.log1p(4 * eta * g))
        return torch.where(g.isnan(), torch.inf, torch.where(small >= 0.5, 0.0, time))

    def separation(self, scale: float) -> Tensor:
        """(g_j - g_{j+1}) log(1 / scale) / g_j (m' - 1 or d,): how well each step is told from the next; must be large (R3).

        Args:
            scale: size of W0's entries.
        """
        g = self.spectrum[: self.d + 1]
        return (g[:-1] - g[1:]) * math.log(1 / scale) / g[:-1].abs().clamp_min(1e-300)

    def final(self, u: Tensor) -> Tensor:
        """sum_j g_j^{-1/2} u_j v_j^T over the learned modes (d, m) (R4)."""
        k = self.learned
        return u[:, :k] * self.spectrum[:k].rsqrt() @ self.directions[:, :k].mT

    def trajectory(self, W0: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """W(t) (T, d, m): exact for an aligned start, asymptotic in the size of W0 else (R1, R3)."""
        u, s0 = self.start(W0)
        return torch.einsum("ij,tj,kj->tik", u, self.strengths(s0, times), self.directions[:, : self.d])


# ------------------------------------------------------------------------------------------------ kernels


@dataclass(frozen=True, eq=False)
class KernelBarlow:
    """The same in a reproducing-kernel space: f = A k(.), k(x) = [K(x, x_1) .. K(x, x'_n)] (R5).

    Attributes:
        kernel: (2n, 2n) kernel of the views stacked as x_1 .. x_n, x'_1 .. x'_n. d: embedding dimension.
    """

    kernel: Tensor
    d: int

    def __post_init__(self) -> None:
        K = torch.as_tensor(self.kernel, dtype=torch.float64)
        if K.ndim != 2 or K.shape[0] != K.shape[1] or len(K) % 2 or not bool(torch.isfinite(K).all()):
            raise InputError(f"the kernel must be a finite (2n, 2n) matrix, got shape {tuple(K.shape)}")
        if not 1 <= self.d <= len(K):
            raise InputError(f"the embedding dimension must be between 1 and {len(K)}, got {self.d}")
        object.__setattr__(self, "kernel", 0.5 * (K + K.mT))

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """K^{1/2} and K^{-1/2}, eigenvalues below 1e-10 of the largest left out."""
        values, vectors = torch.linalg.eigh(self.kernel)
        kept = values > 1e-10 * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT

    @cached_property
    def swap(self) -> Tensor:
        """S: exchanges the two views of every pair."""
        n = len(self.kernel) // 2
        return torch.eye(2 * n, dtype=torch.float64).roll(n, 0)

    @cached_property
    def linear(self) -> BarlowFlow:
        """The linear flow it equals, with Gamma = K^{1/2} S K^{1/2} / 2n."""
        root = self._roots[0]
        return BarlowFlow(root @ self.swap @ root / len(self.kernel), self.d)

    def paper_form(self) -> Tensor:
        """K^{-1/2} (K_{:,1:n} K_{n+1:2n,:} + transpose) K^{-1/2} / 2n: the paper's form of Gamma."""
        n, inverse = len(self.kernel) // 2, self._roots[1]
        cross = self.kernel[:, :n] @ self.kernel[n:]
        return inverse @ (cross + cross.mT) @ inverse / (2 * n)

    def start(self, A0: Tensor) -> tuple[Tensor, Tensor]:
        """(u, s0) of a start A0 (d, 2n)."""
        return self.linear.start(torch.as_tensor(A0, dtype=torch.float64) @ self._roots[0])

    def random_start(self, scale: float, draws: torch.Generator) -> Tensor:
        """A0 = scale N(0, 1) K^{-1/2}, (d, 2n)."""
        return scale * torch.randn(self.d, len(self.kernel), generator=draws, dtype=torch.float64) @ self._roots[1]

    def covariance(self, A: Tensor) -> Tensor:
        """C = A K S K A^T / 2n (..., d, d)."""
        K = self.kernel
        return A @ K @ self.swap @ K @ A.mT / len(K)

    def rate(self, A: Tensor) -> Tensor:
        """dA/dt of gradient flow in the kernel's space, (d, 2n)."""
        eye = torch.eye(self.d, dtype=torch.float64)
        return -4 * (self.covariance(A) - eye) @ A @ self.kernel @ self.swap / len(self.kernel)

    def embed(self, A0: Tensor, cross: Tensor) -> Tensor:
        """Final embedding (p, d) of points whose kernel with the training views is ``cross`` (p, 2n)."""
        u, _ = self.start(A0)
        return cross @ self._roots[1] @ self.linear.final(u).mT


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class LinearBarlowTwins(Model):
    """Linear Barlow Twins with Gamma of the given spectrum, in a random basis, from W0 = scale * N(0, 1) (or in the modes, ``aligned``).

    The data are pairs of views with exactly this Gamma: x' = x with a sign for each mode, whose correlation is the eigenvalue's.
    """

    spectrum: tuple[float, ...]
    d: int
    scale: float = 1e-6
    aligned: bool = False
    samples: int = 64
    points: int = 40
    seed: int = 0
    slug: ClassVar[str] = SLUG
    kinds: ClassVar[tuple[str, ...]] = ("trajectory", "step_times", "final")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {}

    def __post_init__(self) -> None:
        positive(scale=self.scale, d=self.d)
        if not self.spectrum or not all(map(math.isfinite, self.spectrum)) or list(self.spectrum) != sorted(self.spectrum, reverse=True):
            raise InputError("the spectrum must be finite and decreasing")
        if not 1 <= self.d <= len(self.spectrum) or self.samples < len(self.spectrum):
            raise InputError(f"Give 1 <= d <= {len(self.spectrum)} and at least {len(self.spectrum)} samples.")
        if self.spectrum[0] <= 0:
            raise InputError("no eigenvalue of Gamma is positive: nothing is learned (are the views independent?)")
        self.full()  # drawn here, outside any transform

    @property
    def exact(self) -> BarlowFlow:
        """The closed forms."""
        return BarlowFlow(self.full()["gamma"], self.d)

    def full(self) -> Mapping[str, Tensor]:
        """The pairs x, other (n, m) and their gamma (m, m)."""
        return _full(self)

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """``count`` pairs of pairs, with replacement: x, other (count, 2, m), as an unbiased estimate of |C - I|^2 needs."""
        pick = torch.randint(self.samples, (count, 2), generator=torch.Generator().manual_seed(seed))
        full = self.full()
        return {"x": full["x"][pick], "other": full["other"][pick]}

    def init(self, seed: int | None = None) -> Params:
        """w (d, m); the model's own without ``seed``."""
        draws = torch.Generator().manual_seed(self.seed + 1 if seed is None else seed)
        w = self.scale * torch.randn(self.d, len(self.spectrum), generator=draws, dtype=torch.float64)
        if self.aligned:
            flow_ = self.exact
            u, s0 = flow_.start(w)
            w = u * s0 @ flow_.directions[:, : self.d].mT
        return {"w": w}

    def losses(self, theta: Params, batch: Mapping[str, Tensor]) -> Tensor:
        """tr (c_1 - I)(c_2 - I) of each pair of pairs, c of one pair; its mean is the loss."""
        z, other = batch["x"] @ theta["w"].mT, batch["other"] @ theta["w"].mT
        c = 0.5 * (z[..., :, None] * other[..., None, :] + other[..., :, None] * z[..., None, :])
        c = c - torch.eye(self.d, dtype=torch.float64)
        return (c[:, 0] * c[:, 1]).sum((-1, -2))

    def loss(self, theta: Params) -> Tensor:
        """|W Gamma W^T - I|_F^2."""
        c = theta["w"] @ self.full()["gamma"] @ theta["w"].mT
        return (c - torch.eye(self.d, dtype=torch.float64)).square().sum()

    def generators(self, theta: Params) -> list[Params]:
        """Tangents of the rotations of the embedding, O(d)."""
        out = []
        for i in range(self.d):
            for j in range(i):
                r = torch.zeros(self.d, self.d, dtype=torch.float64)
                r[i, j], r[j, i] = 1.0, -1.0
                out.append({"w": r @ theta["w"]})
        return out

    def observables(self, theta: Params) -> dict[str, Tensor]:
        """Eigenvalues of C (d,), decreasing, and W^T W: unchanged by rotations of the embedding."""
        w = theta["w"]
        return {"eigenvalues": torch.linalg.eigvalsh(w @ self.full()["gamma"] @ w.mT).flip(0), "gram": w.mT @ w}

    @property
    def horizon(self) -> float:
        """A time by which the last learnable mode has settled (one and a half of its step time)."""
        tau = self.exact.step_times(self.exact.start(self.init()["w"])[1])
        return 1.5 * float(tau[tau.isfinite()].max())

    @property
    def times(self) -> Tensor:
        """(points,) from 0 to the horizon."""
        return torch.linspace(0, self.horizon, self.points, dtype=torch.float64)

    def separation(self) -> Tensor:
        """Separation number of each step (min(d, m - 1),)."""
        return self.exact.separation(self.scale)

    def _predict(self, kind: str) -> Prediction:
        closed, refs = self.exact, (f"{SLUG} R1", f"{SLUG} R2", f"{SLUG} R3")
        u, s0 = closed.start(self.init()["w"])
        numbers = self.separation()[: closed.learned]
        if kind == "final":  # only the last learned mode must be told from the next one
            numbers = numbers[-1:] if closed.learned == self.d < len(self.spectrum) else numbers[:0]
        apart = float(numbers.min()) if len(numbers) else math.inf
        condition = {"scale": self.scale, "1 / separation": 1 / max(apart, 1e-300)}
        names = {"trajectory": ("eigenvalues",), "step_times": ("step times",), "final": ("loss", "gram")}[kind]
        if apart < (1e-9 if self.aligned else _SEPARATED):
            why = f"separation number {apart:.2g}: neighbouring steps merge (degenerate spectrum, or a start that is not small enough)"
            return Prediction(kind, {name: absent(why, refs) for name in names}, False, condition, refs)
        if kind == "final":
            values = {"loss": Estimate(float(self.d - closed.learned)), "gram": Estimate((w := closed.final(u)).mT @ w)}
            return Prediction(kind, values, False, condition, (f"{SLUG} R4",))
        if kind == "step_times":
            tau = closed.step_times(s0)[: closed.learned]
            return Prediction(kind, {"step times": Estimate(tau)}, self.aligned, condition, refs)
        lam = closed.eigenvalues(s0, self.times).sort(-1, descending=True).values
        return Prediction(kind, {"eigenvalues": Estimate(lam)}, self.aligned, condition, refs)

    def _control(self, kind: str) -> Prediction:
        """Each mode from |W0 v_j|, without the order of learning (aligned: all modes at the first one's rate); everything learned."""
        closed = self.exact
        if (theirs := self.predict(kind)).status == "not_applicable":
            return theirs
        s0 = (self.init()["w"] @ closed.directions[:, : self.d]).norm(dim=0)
        if kind == "final":
            return Prediction(kind, {"loss": Estimate(float(self.d - closed.learned) + 1.0)})
        fast = BarlowFlow(torch.eye(len(self.spectrum), dtype=torch.float64) * self.spectrum[0], self.d)
        used = fast if self.aligned else closed
        if kind == "step_times":
            return Prediction(kind, {"step times": Estimate(used.step_times(s0)[: closed.learned])})
        return Prediction(kind, {"eigenvalues": Estimate(used.eigenvalues(s0, self.times).sort(-1, descending=True).values)})

    def compare(
        self, kind: str, seed: int = 0, budget: float = 1.0, *, relative: float | None = None,
        absolute: float | Mapping[str, float] | None = None,
    ) -> Any:  # fmt: skip
        """As the base; where no tolerance is given, 1e-9 for an aligned start and what a start of size ``scale`` leaves else (R3)."""
        if relative is None and absolute is None:
            relative, absolute = self._allowed(kind)
        return super().compare(kind, seed, budget, relative=relative or 0.0, absolute=absolute)

    def control(self, kind: str, seed: int = 0, budget: float = 1.0) -> Any:
        """A run beside what it must not agree with, at the same tolerance."""
        from parasym.solvable.contract import beside

        relative, absolute = self._allowed(kind)
        return beside(self._control(self._known(kind)), self.simulate(kind, seed, budget), relative, absolute)

    def _allowed(self, kind: str) -> tuple[float, float]:
        if kind == "final":
            return 0.0, 1e-2
        if self.aligned:
            return 0.0, 1e-9
        return (1e-3, 0.0) if kind == "step_times" else (0.0, 1e-2)

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """Gradient flow by automatic differentiation; ``seed`` and ``budget`` change nothing."""
        times = torch.linspace(0, self.horizon, max(self.points, 2000), dtype=torch.float64) if kind == "step_times" else self.times
        run = flow(self.loss, self.init(), times, rtol=1e-12, atol=1e-18)
        status: Status = "ok" if run.ok else "not_converged"
        end = {"w": run.theta["w"][-1]}
        if kind == "final":
            return {"loss": Estimate(float(self.loss(end)), status=status), "gram": Estimate(self.observables(end)["gram"], status=status)}
        w = run.theta["w"]
        lam = torch.linalg.eigvalsh(w @ self.full()["gamma"] @ w.mT).flip(-1)
        if kind == "step_times":
            return {"step times": Estimate(half_times(times, lam)[: self.exact.learned], status=status)}
        return {"eigenvalues": Estimate(lam, status=status)}


@functools.lru_cache(maxsize=64)
def _full(model: LinearBarlowTwins) -> Mapping[str, Tensor]:
    m, draws = len(model.spectrum), torch.Generator().manual_seed(model.seed)
    basis = torch.linalg.qr(torch.randn(m, m, generator=draws, dtype=torch.float64))[0]
    white = torch.linalg.qr(torch.randn(model.samples, m, generator=draws, dtype=torch.float64))[0] * math.sqrt(model.samples)
    g = torch.tensor(model.spectrum, dtype=torch.float64)
    x = white * g.abs().sqrt() @ basis.mT
    other = white * g.abs().sqrt() * g.sign() @ basis.mT
    return {"x": x, "other": other, "gamma": basis * g @ basis.mT}


def half_times(times: Tensor, curves: Tensor, level: float = 0.5) -> Tensor:
    """First time each curve (T, k) passes ``level``, by linear interpolation of its logit (a logistic is a line there); inf if never."""
    out = []
    for curve in curves.double().mT:
        above = (curve >= level).nonzero()
        if not len(above) or int(above[0]) == 0:
            out.append(math.inf if not len(above) else float(times[0]))
            continue
        k = int(above[0])
        a, b = (float(v.clamp(1e-12, 1 - 1e-12).logit()) for v in curve[k - 1 : k + 1])
        aim = math.log(level / (1 - level))
        share = (aim - a) / (b - a) if b > a else 1.0
        out.append(float(times[k - 1]) + share * float(times[k] - times[k - 1]))
    return torch.tensor(out, dtype=torch.float64)
