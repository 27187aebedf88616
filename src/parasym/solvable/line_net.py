"""A two-layer linear network on data that lie on a line: the whole run in one scalar (three-mechanisms).

f(x) = gamma sum_i u_i w_i.x with x = a n, |n| = 1, and L = E (f - y)^2 / 2. Only omega_i = w_i.n moves. In the variables
p = u / sqrt(eta_u) + omega / sqrt(eta_w), q = u / sqrt(eta_u) - omega / sqrt(eta_w) gradient flow is p -> sqrt(alpha) p,
q -> q / sqrt(alpha) for all neurons at once, and alpha solves a scalar Riccati equation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable import riccati
from parasym.solvable.contract import Prediction, absent, positive
from parasym.solvable.engines import Params
from parasym.solvable.trained import Trained

SLUG = "three-mechanisms"
Mechanism = Literal["alignment", "disalignment", "rescaling", "lazy"]


@dataclass(frozen=True, eq=False)
class LineFlow:
    """Gradient flow in closed form, for one start or a batch of starts.

    Attributes:
        u: (..., d) output weights at the start. omega: (..., d) input weights along the line.
        v: E a^2 > 0. m: E a y.
        gamma: output multiplier > 0 (for a negative one change the sign of u). eta_u, eta_w: rates of the layers.

    Raises:
        InputError: shapes differ, a value is not finite, or v, gamma or a rate is not positive.
    """

    u: Tensor
    omega: Tensor
    v: float
    m: float
    gamma: float = 1.0
    eta_u: float = 1.0
    eta_w: float = 1.0

    def __post_init__(self) -> None:
        positive(v=self.v, gamma=self.gamma, eta_u=self.eta_u, eta_w=self.eta_w)
        u, omega = torch.as_tensor(self.u, dtype=torch.float64), torch.as_tensor(self.omega, dtype=torch.float64)
        if u.shape != omega.shape or not u.ndim or not bool(torch.isfinite(u).all() & torch.isfinite(omega).all()):
            raise InputError(f"u and omega must be finite and of one shape (..., d), got {tuple(u.shape)} and {tuple(omega.shape)}")
        if not math.isfinite(self.m):
            raise InputError(f"E a y must be finite, got {self.m}")
        object.__setattr__(self, "u", u)
        object.__setattr__(self, "omega", omega)

    @property
    def c(self) -> float:
        """sqrt(eta_u eta_w)."""
        return math.sqrt(self.eta_u * self.eta_w)

    @property
    def k(self) -> float:
        """v gamma c / 4."""
        return 0.25 * self.v * self.gamma * self.c

    @property
    def optimum(self) -> float:
        """s* = m / (v gamma), the product u.omega of the minimum."""
        return self.m / (self.v * self.gamma)

    @cached_property
    def p(self) -> Tensor:
        """u / sqrt(eta_u) + omega / sqrt(eta_w), (..., d)."""
        return self.u / math.sqrt(self.eta_u) + self.omega / math.sqrt(self.eta_w)

    @cached_property
    def q(self) -> Tensor:
        """u / sqrt(eta_u) - omega / sqrt(eta_w), (..., d)."""
        return self.u / math.sqrt(self.eta_u) - self.omega / math.sqrt(self.eta_w)

    @cached_property
    def P(self) -> Tensor:
        """sum p^2 (...)."""
        return self.p.square().sum(-1)

    @cached_property
    def Q(self) -> Tensor:
        """sum q^2 (...)."""
        return self.q.square().sum(-1)

    @cached_property
    def R(self) -> Tensor:
        """sum p q (...), conserved."""
        return (self.p * self.q).sum(-1)

    @property
    def discriminant(self) -> Tensor:
        """D = sqrt(m^2 + 4 k^2 P Q) (...); 2 c gamma D is the rate at which alpha settles (R4, R6)."""
        return (self.m**2 + 4 * self.k**2 * self.P * self.Q).sqrt()

    @property
    def rate(self) -> Tensor:
        """2 c gamma D (...): v times the tangent kernel at the end, for a = a' = 1 (R6)."""
        return 2 * self.c * self.gamma * self.discriminant

    def alpha(self, times: Sequence[float] | Tensor) -> Tensor:
        """alpha (..., T) at times >= 0 (R3, R4)."""
        speed = 2 * self.c * self.gamma
        return riccati.scalar(-speed * self.k * self.P, speed * self.m, speed * self.k * self.Q, 1.0, times)

    def weights(self, times: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """u and omega, (..., T, d) each (R1)."""
        root = self.alpha(times).sqrt()[..., None]
        p, q = root * self.p[..., None, :], self.q[..., None, :] / root
        return 0.5 * math.sqrt(self.eta_u) * (p + q), 0.5 * math.sqrt(self.eta_w) * (p - q)

    def product(self, times: Sequence[float] | Tensor) -> Tensor:
        """s = u.omega (..., T); the output is gamma s a (R5)."""
        return 0.25 * self.c * (self._grown(times) - self._shrunk(times))

    def norms(self, times: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """|u|^2 and |omega|^2, (..., T) (R5): P alpha + Q / alpha +- 2 R as sums of squares, exact for a layer that starts at zero."""
        root = self.alpha(times).sqrt()[..., None]
        p, q = self.p[..., None, :], self.q[..., None, :]
        # sqrt(alpha) p +- q / sqrt(alpha) = sqrt(alpha) (p +- q) -+ (alpha - 1) / sqrt(alpha) q
        turn = (root - 1) * (root + 1) / root * q
        u, omega = root * (p + q) - turn, root * (p - q) + turn
        return 0.25 * self.eta_u * u.square().sum(-1), 0.25 * self.eta_w * omega.square().sum(-1)

    def cosine(self, times: Sequence[float] | Tensor) -> Tensor:
        """cos between u and omega (..., T)."""
        a, b = self.norms(times)
        return self.product(times) / (a * b).sqrt()

    def kernel_ratio(self, times: Sequence[float] | Tensor) -> Tensor:
        """K(t) / K(0) of the tangent kernel (..., T) (R5)."""
        return (self._grown(times) + self._shrunk(times)) / (self.P + self.Q)[..., None]

    def loss(self, times: Sequence[float] | Tensor, second_moment: float) -> Tensor:
        """L (..., T), with second_moment = E y^2."""
        s = self.product(times)
        return 0.5 * second_moment - self.m * self.gamma * s + 0.5 * self.v * self.gamma**2 * s.square()

    def final_product(self) -> Tensor:
        """s at the end (...): s*, or 0 where the start lies on the way into the saddle (P = 0 or Q = 0 with the wrong sign of m)."""
        dies = ((self.P == 0) & (self.m > 0)) | ((self.Q == 0) & (self.m < 0))
        return torch.where(dies, 0.0, torch.full_like(self.P, self.optimum))

    def kernel_change(self) -> Tensor:
        """K(inf) / K(0) (...): sqrt(1 + 4 (s_inf^2 - s_0^2) / (c N_0)^2) with N_0 = (P + Q) / 2 (R7)."""
        start = 0.25 * self.c * (self.P - self.Q)
        size = 0.5 * self.c * (self.P + self.Q)
        return (1 + 4 * (self.final_product().square() - start.square()) / size.square()).clamp_min(0).sqrt()

    def richness(self) -> Tensor:
        """Theta = 2 |s*| / (c N_0) (...): lazy as it goes to 0 (with |s_0| / (c N_0)), rich from order one (R7)."""
        return 2 * abs(self.optimum) / (0.5 * self.c * (self.P + self.Q))

    def _grown(self, times: Sequence[float] | Tensor) -> Tensor:
        return self.P[..., None] * self.alpha(times)

    def _shrunk(self, times: Sequence[float] | Tensor) -> Tensor:
        return self.Q[..., None] / self.alpha(times)


def mechanism(cosines: Tensor, sizes: Tensor, tol: float = 0.05) -> Mechanism:
    """What a run did, from |cos| and |u||omega| at its start and end (T,): the layers turned together, apart, only grew, or nothing (R9).

    Args:
        tol: change of |cos|, and relative change of the size, that count as one.
    """
    turn, grown = float(cosines[-1].abs() - cosines[0].abs()), abs(float(sizes[-1] / sizes[0]) - 1)
    if abs(turn) <= tol:
        return "rescaling" if grown > tol else "lazy"
    return "alignment" if turn > 0 else "disalignment"


@dataclass(frozen=True)
class ScalingPhase:
    """Where a scaling with width leads (three-mechanisms R8).

    Attributes:
        richness: exponent of Theta in d: < 0 lazy, 0 rich, > 0 ultra-rich.
        output: exponent of f at the start; must be <= 0.
        speed: exponent of v K(0): < 0 frozen, > 0 unstable at a finite learning rate.
    """

    richness: float
    output: float
    speed: float

    @property
    def label(self) -> str:
        """ "lazy", "rich" or "ultra-rich", with what is wrong with the run."""
        phase = "lazy" if self.richness < -1e-12 else "rich" if self.richness <= 1e-12 else "ultra-rich"
        flaws = ["output diverges"] * (self.output > 1e-12) + ["frozen"] * (self.speed < -1e-12) + ["unstable"] * (self.speed > 1e-12)
        return f"{phase} ({', '.join(flaws)})" if flaws else phase


def scaling_phase(gamma: float, u: float, w: float, eta_u: float = 0.0, eta_w: float = 0.0) -> ScalingPhase:
    """Exponents in the width d of gamma = d^-gamma, u ~ d^-u, w ~ d^-w and rates d^eta_u, d^eta_w -> the phase (R8)."""
    inner = max(-2 * u + 0.5 * (eta_w - eta_u), -2 * w + 0.5 * (eta_u - eta_w))
    speed = 1 - 2 * gamma + max(eta_w - 2 * u, eta_u - 2 * w)
    return ScalingPhase(gamma - 1 - inner, 0.5 - gamma - u - w, speed)


@dataclass(frozen=True)
class OneDLinearNet(Trained):
    """A network of ``width`` neurons on ``samples`` points a_k n, a_k ~ N(0,1), with labels slope a_k + noise (three-mechanisms).

    Start u_i ~ N(0, sigma_u^2), w_i ~ N(0, sigma_w^2 I); ``aligned`` sets omega = u. ``seed`` draws data and start. Observables at
    ``points`` times up to ``horizon``.
    """

    width: int
    sigma_u: float
    sigma_w: float
    slope: float = 1.5
    gamma: float = 1.0
    eta_u: float = 1.0
    eta_w: float = 1.0
    noise: float = 0.0
    aligned: bool = False
    inputs: int = 3
    samples: int = 40
    horizon: float = 8.0
    points: int = 9
    seed: int = 0
    slug: ClassVar[str] = SLUG
    kinds: ClassVar[tuple[str, ...]] = ("trajectory", "final", "conserved")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "trajectory": dict.fromkeys(("product", "kernel ratio", "cosine", "|u|^2", "|omega|^2"), 2e-8),
        "final": {"product": 1e-6, "kernel ratio": 1e-6},
        "conserved": {"charges": 1e-8},
    }

    def __post_init__(self) -> None:
        positive(width=self.width, sigma_u=self.sigma_u, sigma_w=self.sigma_w, gamma=self.gamma, horizon=self.horizon)
        if self.points < 2 or self.samples < 1 or self.inputs < 1:
            raise InputError("Give at least 2 points, 1 sample and 1 input.")
        self.full()  # drawn here, outside any transform

    def full(self) -> Mapping[str, Tensor]:
        """The whole data set: x (n, inputs), y (n,), the direction (inputs,) and a (n,)."""
        return _full(self)

    def init(self, seed: int | None = None) -> Params:
        """A start: u (d,), w (d, inputs); the model's own without ``seed``."""
        draws = torch.Generator().manual_seed(self.seed + 1 if seed is None else seed)
        u = self.sigma_u * torch.randn(self.width, generator=draws, dtype=torch.float64)
        w = self.sigma_w * torch.randn(self.width, self.inputs, generator=draws, dtype=torch.float64)
        if self.aligned:
            n = self.full()["direction"]
            w = w + (u - w @ n)[:, None] * n
        return {"u": u, "w": w}

    def losses(self, theta: Params, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of each sample."""
        return 0.5 * (self.gamma * (batch["x"] @ theta["w"].mT @ theta["u"]) - batch["y"]).square()

    def generators(self, theta: Params) -> list[Params]:
        """Tangent of u_i -> c u_i, w_i -> w_i / c for each neuron."""
        out = []
        for i in range(self.width):
            row = torch.zeros(self.width, dtype=torch.float64)
            row[i] = 1.0
            out.append({"u": row * theta["u"], "w": -row[:, None] * theta["w"]})
        return out

    def observables(self, theta: Params) -> dict[str, Tensor]:
        """Product u.omega, tangent kernel over a a', cosine, squared norms, charges: all but the charges unchanged by permutation."""
        omega = theta["w"] @ self.full()["direction"]
        u, s = theta["u"], theta["u"] @ omega
        uu, ww = u @ u, omega @ omega
        kernel = self.gamma**2 * (self.eta_w * uu + self.eta_u * ww)
        charges = u.square() / self.eta_u - omega.square() / self.eta_w
        return {"product": s, "kernel": kernel, "cosine": s / (uu * ww).sqrt(), "|u|^2": uu, "|omega|^2": ww, "charges": charges}

    @property
    def closed(self) -> LineFlow:
        """The closed form from the model's own start."""
        full, theta = self.full(), self.init()
        v, m = float(full["a"].square().mean()), float((full["a"] * full["y"]).mean())
        return LineFlow(theta["u"], theta["w"] @ full["direction"], v, m, self.gamma, self.eta_u, self.eta_w)

    def _predict(self, kind: str) -> Prediction:
        flow = self.closed
        if kind == "conserved":
            return Prediction(kind, {"charges": Estimate(flow.p * flow.q)}, refs=(f"{SLUG} R2",))
        if kind == "final":
            if bool((flow.P == 0) | (flow.Q == 0)):
                reason = "P = 0 or Q = 0: the sign of the final solution comes from round-off"
                return Prediction(kind, {name: absent(reason) for name in ("product", "kernel ratio")}, refs=(f"{SLUG} R4",))
            values = {"product": Estimate(float(flow.final_product())), "kernel ratio": Estimate(float(flow.kernel_change()))}
            return Prediction(kind, values, condition={"richness": float(flow.richness())}, refs=(f"{SLUG} R6", f"{SLUG} R7"))
        t, (uu, ww) = self.times, flow.norms(self.times)
        rows = {"product": flow.product(t), "kernel ratio": flow.kernel_ratio(t), "cosine": flow.cosine(t), "|u|^2": uu, "|omega|^2": ww}
        return Prediction(kind, {name: Estimate(value) for name, value in rows.items()}, refs=(f"{SLUG} R4", f"{SLUG} R5"))

    def _control(self, kind: str) -> Prediction:
        """A kernel that never moves (lazy training); the sum in place of the difference for the charges."""
        flow, t = self.closed, self.times
        if kind == "conserved":
            return Prediction(kind, {"charges": Estimate(0.5 * (flow.p.square() + flow.q.square()))})
        if kind == "final":
            return Prediction(kind, {"product": Estimate(flow.optimum), "kernel ratio": Estimate(1.0)})
        start = float(flow.product([0.0])[0])
        speed = flow.v * flow.gamma**2 * 0.5 * flow.c**2 * float(flow.P + flow.Q)
        return Prediction(kind, {
            "product": Estimate(flow.optimum + (start - flow.optimum) * (-speed * t).exp()),
            "kernel ratio": Estimate(torch.ones_like(t)),
        })  # fmt: skip

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """Gradient flow of the loss by automatic differentiation, with the two rates; ``budget`` and ``seed`` change nothing."""
        times = self.times if kind != "final" else torch.tensor([0.0, 40.0 / float(self.closed.rate)], dtype=torch.float64)
        run, rows = self.run(times, {"u": self.eta_u, "w": self.eta_w})
        kernel = rows.pop("kernel")
        rows["kernel ratio"] = kernel / kernel[0]
        if not run.ok:
            return dict.fromkeys(rows, Estimate(None, status="not_converged", note=run.message))
        return {name: Estimate(value if kind == "trajectory" else value[-1]) for name, value in rows.items()}


@functools.lru_cache(maxsize=64)
def _full(model: OneDLinearNet) -> Mapping[str, Tensor]:
    draws = torch.Generator().manual_seed(model.seed)
    direction = torch.randn(model.inputs, generator=draws, dtype=torch.float64)
    direction = direction / direction.norm()
    a = torch.randn(model.samples, generator=draws, dtype=torch.float64)
    y = model.slope * a + model.noise * torch.randn(model.samples, generator=draws, dtype=torch.float64)
    return {"x": a[:, None] * direction, "y": y, "direction": direction, "a": a}
