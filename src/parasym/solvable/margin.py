"""Maximum-margin bias of quasi-homogeneous classifiers, where it has closed forms (quasi-homogeneous-margin).

Loss (1/N) sum exp(-q_n), q_n = y_n f(theta; x_n). Two examples: f = sum_i prod(theta of factor i) x_i on two balls, whose limit direction
is the minimum of an asymmetric norm; and a linear head on normalised free features, whose limit is a simplex frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Estimate, Status
from parasym.solvable.contract import Prediction, absent
from parasym.solvable.engines import Params, follow
from parasym.solvable.trained import Trained

SLUG = "quasi-homogeneous-margin"


def asymmetric_angle(mu: tuple[float, float], radius: float, exponents: tuple[float, float]) -> Estimate:
    """Angle (degrees) of the direction (a, b) that gradient flow on two balls at +-mu of ``radius`` ends at (R4, R6).

    The coordinate with the larger exponent pays for the norm. If the other one separates alone, the first is discarded; else it is as
    small as it may be: sin phi = mu_2 / r for exponents (1, < 1). Equal exponents give the Euclidean margin.

    Returns:
        the angle of atan2(b, a) in [0, 90]; ``not_applicable`` if the balls cannot be separated.
    """
    if not all(math.isfinite(v) and v >= 0 for v in (*mu, radius, *exponents)) or not radius > 0:
        raise InputError(f"mu, radius and exponents must be finite and not negative, got {mu}, {radius}, {exponents}")
    refs = (f"{SLUG} R4", f"{SLUG} R6")
    if math.hypot(*mu) <= radius:
        return absent(f"the balls at distance {math.hypot(*mu):.3g} of radius {radius:.3g} meet: no direction separates them", refs)
    if exponents[0] == exponents[1]:
        return Estimate(math.degrees(math.atan2(mu[1], mu[0])), refs=refs)
    cheap = mu[1] if exponents[0] > exponents[1] else mu[0]
    angle = 90.0 if cheap >= radius else math.degrees(math.asin(cheap / radius))
    # at sin phi = mu_2 / r the margin of the cheap part is zero per unit of norm; the dear coordinate supplies all of it
    return Estimate(angle if exponents[0] > exponents[1] else 90.0 - angle, refs=refs)


def hard_margin(x: Tensor, y: Tensor) -> Tensor:
    """The Euclidean maximum-margin direction (d,) of data x (n, d), y in {-1, 1}: min |w|^2 / 2 with y x.w >= 1 (dual, by NNLS).

    Raises:
        InputError: not separable through the origin, or not finite.
    """
    rows = (x * y[:, None]).double().numpy()
    if not np.isfinite(rows).all():
        raise InputError("x and y must be finite")
    # the point of the cone's dual nearest to 0: minimise |rows^T a|^2 with sum a = 1, a >= 0
    weight = 1e6
    a, _ = optimize.nnls(np.vstack([rows.T, weight * np.ones(len(rows))]), np.r_[np.zeros(rows.shape[1]), weight])
    w = rows.T @ a / max(a.sum(), 1e-300)
    if np.linalg.norm(w) < 1e-9 * np.abs(rows).max() or (rows @ w).min() <= 0:
        raise InputError("the data cannot be separated by a direction through the origin")
    return torch.from_numpy(w / (w @ w))


@dataclass(frozen=True)
class TwoBalls(Trained):
    """Two classes on circles of ``radius`` around +-mu, f = a x_1 + b x_2 with a and b products of ``powers`` weights.

    powers: (1, 3): b = t^3 (``shared``) or three factors; the exponent of each weight is 1 / power. The flow is run to a margin of
    ``margin``.
    """

    mu: tuple[float, float] = (2.0, 0.5)
    radius: float = 1.0
    powers: tuple[int, int] = (1, 2)
    shared: bool = False
    points: int = 200
    margin: float = 2000.0
    start: float = 0.3
    slug: ClassVar[str] = SLUG
    kinds: ClassVar[tuple[str, ...]] = ("direction", "growth", "conserved")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "direction": {"angle": 0.5},
        "growth": {"first": 0.02, "second": 0.02},
        "conserved": {"charges": 1e-6},
    }

    def __post_init__(self) -> None:
        if min(self.powers) < 1 or self.points < 4 or not self.radius > 0 or not self.margin > 1 or not self.start > 0:
            raise InputError("powers >= 1, at least 4 points, a positive radius and start, and a margin above 1, please")
        if not all(map(math.isfinite, (*self.mu, self.radius, self.margin))):
            raise InputError(f"mu, radius and margin must be finite, got {self.mu}, {self.radius}, {self.margin}")

    @property
    def exponents(self) -> tuple[float, float]:
        """lambda of the weights of each coordinate."""
        return 1 / self.powers[0], 1 / self.powers[1]

    def full(self) -> Mapping[str, Tensor]:
        """x (2 points, 2) and y (2 points,) on the two circles; y x is the same set for both."""
        angle = torch.arange(self.points, dtype=torch.float64) * (2 * math.pi / self.points)
        ball = torch.tensor(self.mu, dtype=torch.float64) + self.radius * torch.stack([angle.cos(), angle.sin()], 1)
        y = torch.cat([torch.ones(self.points), -torch.ones(self.points)]).double()
        return {"x": torch.cat([ball, -ball]), "y": y}

    def module(self) -> nn.Module:
        """The network, for `parasym.symmetry.quasi.exponents`."""
        return _Products(self.powers, self.shared, self.start)

    def init(self, seed: int | None = None) -> Params:
        """Every weight at ``start`` (the factors of one product a little apart), perturbed by ``seed``."""
        draws = torch.Generator().manual_seed(0 if seed is None else seed)
        out = {}
        for name, power in zip(("a", "b"), self.powers, strict=True):
            count = 1 if self.shared else power
            spread = 1 + 0.1 * torch.arange(count, dtype=torch.float64)
            out[name] = (
                self.start * spread * (1 if seed is None else torch.exp(0.2 * torch.randn(count, generator=draws, dtype=torch.float64)))
            )
        return out

    def direction(self, theta: Params) -> Tensor:
        """(a, b) the data are read with."""
        powers = self.powers if self.shared else (1, 1)
        return torch.stack([theta[n].prod() ** p for n, p in zip(("a", "b"), powers, strict=True)])

    def losses(self, theta: Params, batch: Mapping[str, Tensor]) -> Tensor:
        """exp(-q) of each sample."""
        return (-batch["y"] * (batch["x"] @ self.direction(theta))).exp()

    def generators(self, theta: Params) -> list[Params]:
        """Tangents of the rescalings between the factors of one product."""
        out = []
        for name in ("a", "b"):
            for i in range(1, len(theta[name])):
                move = torch.zeros_like(theta[name])
                move[0], move[i] = theta[name][0], -theta[name][i]
                out.append({"a": torch.zeros_like(theta["a"]), "b": torch.zeros_like(theta["b"]), name: move})
        return out

    def observables(self, theta: Params) -> dict[str, Tensor]:
        """Angle in degrees, smallest margin, and the charges theta_0^2 - theta_i^2 of the products."""
        a, b = self.direction(theta)
        full = self.full()
        charges = [theta[n][:1].square() - theta[n][1:].square() for n in ("a", "b")]
        margin = (full["y"] * (full["x"] @ torch.stack([a, b]))).min()
        return {"angle": torch.rad2deg(torch.atan2(b, a)), "margin": margin, "charges": torch.cat(charges)}

    def _predict(self, kind: str) -> Prediction:
        angle = asymmetric_angle(self.mu, self.radius, self.exponents)
        condition = {"1 / margin": 1 / self.margin}
        if kind == "conserved":
            start = self.observables(self.init())["charges"]
            if not len(start):
                return Prediction(kind, {"charges": absent("no product has two factors")}, refs=(f"{SLUG} R5",))
            return Prediction(kind, {"charges": Estimate(start)}, refs=(f"{SLUG} R5",))
        if kind == "direction" or angle.status != "ok":
            names = {"direction": ("angle",), "growth": ("first", "second")}[kind]
            return Prediction(kind, dict.fromkeys(names, angle), False, condition, (f"{SLUG} R6",))
        if self.mu[1] >= self.radius or self.powers[0] != 1:
            reason = "a coordinate is discarded: its weights grow slower than their exponents (R3)"
            return Prediction(kind, dict.fromkeys(("first", "second"), absent(reason)), False, condition, (f"{SLUG} R3",))
        first, second = self.exponents
        return Prediction(kind, {"first": Estimate(first), "second": Estimate(second)}, False, condition, (f"{SLUG} R3",))

    def _control(self, kind: str) -> Prediction:
        """The Euclidean margin; one exponent for all; charges of the other sign."""
        theirs = self.predict(kind)
        if theirs.status == "not_applicable":
            return theirs
        if kind == "conserved":
            return Prediction(kind, {"charges": Estimate(-torch.as_tensor(theirs.values["charges"].value))})
        if kind == "growth":
            return Prediction(kind, {"second": Estimate(1.0 if self.powers[1] > 1 else 0.5)})
        equal = self.powers[0] == self.powers[1]
        angle = math.degrees(math.atan2(self.mu[1], self.mu[0]))
        return Prediction(kind, {"angle": Estimate(90.0 if equal else angle)})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """Loss-normalised flow to the margin asked for; ``seed`` and ``budget`` change nothing."""
        path = self.path()
        last = {name: w[-1] for name, w in path.items()}
        seen = self.observables(last)
        status: Status = "ok" if float(seen["margin"]) > 0.5 * self.margin else "not_converged"
        note = "" if status == "ok" else f"margin {float(seen['margin']):.3g} of {self.margin:g}"
        if kind == "direction":
            return {"angle": Estimate(float(seen["angle"]), status=status, note=note)}
        if kind == "conserved":
            return {"charges": Estimate(seen["charges"], status=status, note=note)}
        margins = torch.stack([self.observables({n: w[i] for n, w in path.items()})["margin"] for i in range(len(path["a"]))])
        rates = growth_exponents({n: w[:, 0] for n, w in path.items()}, margins)
        return {name: Estimate(float(rates[key]), status=status, note=note) for name, key in (("first", "a"), ("second", "b"))}

    def path(self, count: int = 60) -> Params:
        """Weights (T, factors) along d theta / ds = q_min x softmax-weighted gradient of the margins, at log-spaced margins.

        The clock makes log q grow at about rate 1, so LSODA crosses four decades of margin; the path is that of gradient flow.
        """
        full = self.full()
        signed = torch.unique(full["y"][:, None] * full["x"], dim=0)
        powers = dict(zip(("a", "b"), self.powers, strict=True))

        def rhs(_: float, theta: Params) -> Params:
            q = signed @ self.direction(theta)
            pull = torch.softmax(-q, 0) @ signed
            g = {name: pull[k] * self._slope(theta[name], powers[name]) for k, name in enumerate(powers)}
            speed = q.min().clamp_min(1e-2) / torch.stack([v.square().sum() for v in g.values()]).sum()
            return {name: speed * value for name, value in g.items()}

        times = torch.linspace(0, math.log(self.margin) + 4.0, 4 * count, dtype=torch.float64)
        run = follow(rhs, self.init(), times, method="LSODA", rtol=1e-8, atol=1e-10).theta
        q = torch.stack([(signed @ self.direction({n: w[i] for n, w in run.items()})).min() for i in range(len(times))])
        kept = (q <= self.margin * 1.2) & q.isfinite()
        return {name: w[kept] for name, w in run.items()}

    def _slope(self, w: Tensor, power: int) -> Tensor:
        """Derivative of the product (or power) of ``w`` with respect to each factor."""
        if self.shared:
            return power * w ** (power - 1)
        return torch.stack([torch.cat([w[:i], w[i + 1 :]]).prod() for i in range(len(w))])


class _Products(nn.Module):
    def __init__(self, powers: tuple[int, int], shared: bool, start: float) -> None:
        super().__init__()
        self.powers, self.shared = powers, shared
        self.a = nn.Parameter(torch.full((1 if shared else powers[0],), start))
        self.b = nn.Parameter(torch.full((1 if shared else powers[1],), start))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.a[0] ** self.powers[0], self.b[0] ** self.powers[1]) if self.shared else (self.a.prod(), self.b.prod())
        return x[:, 0] * first + x[:, 1] * second


def growth_exponents(history: Mapping[str, Tensor], margin: Tensor, least: float = 0.05) -> dict[str, float]:
    """Slope of log |theta| over log q_min for each curve (T,) of ``history``, over the part with a margin above ``least`` of the last."""
    late = margin > least * margin[-1]
    if int(late.sum()) < 3:
        raise InputError("a growth exponent needs at least three points above the margin asked for")
    x = margin[late].log()
    x = x - x.mean()
    return {name: float((x * w[late].abs().log()).sum() / x.square().sum()) for name, w in history.items()}


@dataclass(frozen=True)
class Collapse:
    """Neural collapse of features and head (R7).

    Attributes:
        within: trace of the within-class over that of the between-class covariance (NC1). cosine, spread: mean and standard deviation of
            the cosines between centred class means (NC2): -1/(C-1) and 0 for a simplex. alignment: mean cosine between head rows and
            centred class means (NC3). agreement: share of samples the nearest class mean classifies as the head does (NC4).
    """

    within: float
    cosine: float
    spread: float
    alignment: float
    agreement: float


def neural_collapse(features: Tensor, labels: Tensor, weight: Tensor) -> Collapse:
    """NC1 to NC4 of features (n, d), labels (n,) and a linear head (C, d).

    Raises:
        InputError: a class without samples, or values that are not finite.
    """
    h, W, classes = features.double(), weight.double(), weight.shape[0]
    if not bool(torch.isfinite(h).all() & torch.isfinite(W).all()):
        raise InputError("features and head must be finite")
    counts = torch.bincount(labels, minlength=classes)
    if int(counts.min()) == 0 or len(counts) != classes:
        raise InputError(f"every one of the {classes} classes needs a sample, got {counts.tolist()}")
    means = torch.zeros(classes, h.shape[1], dtype=torch.float64).index_add(0, labels, h) / counts[:, None]
    centred = means - means.mean(0)
    within = (h - means[labels]).square().sum() / len(h)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosines = (unit @ unit.mT)[~torch.eye(classes, dtype=torch.bool)]
    rows = W - W.mean(0)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    near = torch.cdist(h, means).argmin(1) == (h @ W.mT).argmax(1)
    return Collapse(float(within / centred.square().sum(1).mean().clamp_min(1e-300)), float(cosines.mean()), float(cosines.std()),
                    float((rows * unit).sum(1).mean()), float(near.double().mean()))  # fmt: skip


def simplex_margin(classes: int) -> float:
    """Largest margin over |W|_F of a linear head on unit features: sqrt(C) / (C - 1), by a simplex frame (R7)."""
    if classes < 2:
        raise InputError(f"a margin needs at least two classes, got {classes}")
    return math.sqrt(classes) / (classes - 1)
