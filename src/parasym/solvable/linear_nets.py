"""Deep linear networks with decay on every layer and independent multiplicative noise on hidden units.

    f(x) = U eps_D W_D ... eps_1 W_1 x,   L = E (f - y)^2 + gamma_u |U|^2 + sum gamma_i |W_i|^2

No 1/2 anywhere; torch's weight_decay w is gamma = w / 2. D counts hidden layers. Sources: deep-linear-exact, exact-phase-transitions,
stochastic-networks-deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable.contract import NotSolvable, Prediction, absent
from parasym.solvable.engines import Params, flatten, hessian, per_mode_min, settle, unflatten
from parasym.solvable.landscape import Generator, Landscape, joint_sample, matrix, normal, rotation, sizes, skew, symmetric
from parasym.solvable.scale import Scale, Stationary

_LOSS, _MAP = 1e-8, 1e-5


def _chain(theta: Params) -> list[Tensor]:
    """Layers from the input to the read-out."""
    return [theta[f"W{i + 1}"] for i in range(len(theta) - 1)] + [theta["U"]]


def _hidden_rotations(widths: Sequence[int], free: Sequence[bool]) -> dict[str, Generator]:
    """One rotation of each hidden layer that has no noise (with noise only signs and permutations are left)."""

    def generator(layer: int, turn: Tensor) -> Generator:
        def tangent(theta: Params) -> Params:
            layers = _chain(theta)
            out = [torch.zeros_like(w) for w in layers]
            out[layer], out[layer + 1] = turn @ layers[layer], -layers[layer + 1] @ turn
            return dict(zip(theta, out, strict=True))

        return tangent

    return {f"rotation {i + 1}": generator(i, skew(d, i)) for i, d in enumerate(widths) if free[i] and d > 1}


@dataclass(frozen=True, eq=False)
class DeepLinear(Landscape):
    """A deep linear network with one output.

    Attributes:
        second: (d0, d0) A = E[x x^T].
        cross: (d0,) E = E[x y].
        power: E[y^2].
        widths: hidden widths d_1..d_D; none for a linear regressor.
        noise: s_i^2 of each hidden layer, Var of eps (dropout with rate p: p / (1 - p)); none for no noise.
        decay: gamma_1..gamma_D and gamma_u; one number stands for all.

    Kinds: ``minimum`` (loss, beta, decay x squared norm of each layer, predictive variance), ``critical points`` (losses and |beta| of
    all nontrivial stationary points), ``phase`` (critical decay, spinodal, jump), ``variance``
    (predictive variance over squared prediction).

    Raises:
        InputError: moments that no data has, widths that are not positive, negative noise or decay, NaN.
    """

    second: Tensor
    cross: Tensor
    power: float
    widths: tuple[int, ...] = ()
    noise: tuple[float, ...] = ()
    decay: tuple[float, ...] | float = 0.1
    slug: ClassVar[str] = "deep-linear-exact"
    kinds: ClassVar[tuple[str, ...]] = ("minimum", "critical points", "phase", "variance")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "minimum": {"loss": _LOSS, "map": _MAP, "balance": _MAP, "variance": _MAP},
        "critical points": {"loss": _LOSS, "norm": _MAP},
        "phase": {"critical decay": 1e-6, "spinodal": 1e-4, "jump": 1e-3},
    }

    def __post_init__(self) -> None:
        a = symmetric("second", self.second, definite=False)
        e = matrix("cross", self.cross, (len(a),))
        widths = sizes("widths", tuple(self.widths))
        noise = tuple(float(s) for s in self.noise) or (0.0,) * len(widths)
        decay = (float(self.decay),) * (len(widths) + 1) if isinstance(self.decay, int | float) else tuple(map(float, self.decay))
        if len(noise) != len(widths) or not all(math.isfinite(s) and s >= 0 for s in noise):
            raise InputError(f"noise needs one variance s^2 >= 0 for each of {len(widths)} hidden layers, got {noise}")
        if len(decay) != len(widths) + 1 or not all(math.isfinite(g) and g >= 0 for g in decay):
            raise InputError(f"decay needs one gamma >= 0 for each of {len(widths) + 1} layers, or one number, got {decay}")
        if not math.isfinite(self.power):
            raise InputError(f"power is E[y^2], a finite number, got {self.power!r}")
        for name, value in {"second": a, "cross": e, "widths": widths, "noise": noise, "decay": decay}.items():
            object.__setattr__(self, name, value)
        if self.power < float(self.scale.cross @ self.scale.beta(0.0)) * self.kappa - 1e-9 * abs(self.power):
            raise InputError("E[y^2] is below what the linear regression explains: no data has such moments")

    @classmethod
    def of_data(cls, x: ArrayLike, y: ArrayLike, widths: Sequence[int] = (), **rest: Any) -> DeepLinear:
        """From data x (n, d0), y (n,): the training loss itself."""
        inputs, targets = matrix("x", x, (None, None)), matrix("y", y, (None,))
        if len(inputs) != len(targets):
            raise InputError(f"x has {len(inputs)} samples and y has {len(targets)}")
        n = len(targets)
        return cls(inputs.T @ inputs / n, inputs.T @ targets / n, float(targets.square().mean()), tuple(widths), **rest)

    # ---------------------------------------------------------------- the closed form

    @property
    def depth(self) -> int:
        """D."""
        return len(self.widths)

    @property
    def kappa(self) -> float:
        """prod(1 + s_i^2 / d_i)."""
        return math.prod(1 + s / d for s, d in zip(self.noise, self.widths, strict=True))

    @property
    def decays(self) -> tuple[float, ...]:
        """gamma_1..gamma_D, gamma_u."""
        return self.decay  # type: ignore[return-value]

    @property
    def g(self) -> float:
        """Geometric mean of the decays."""
        return math.prod(self.decays) ** (1 / len(self.decays))

    @cached_property
    def scale(self) -> Scale:
        """The reduced problem."""
        return Scale(self.second.numpy(), self.cross.numpy(), self.depth, self.kappa)

    def global_minimum(self) -> Stationary:
        """The reduced global minimum (deep-linear-exact R3); its loss leaves E[y^2] out.

        Raises:
            NotSolvable: a layer without decay.
        """
        if self.g == 0:
            raise NotSolvable(f"decay {self.decays}: a layer without decay runs to infinity and the infimum is not attained; give it some")
        return self.scale.minimum(self.g)

    def layers(self, beta: ArrayLike, signs: Sequence[Tensor] | None = None) -> Params:
        """Weights of the uniform network with end-to-end map ``beta`` (R1, R3).

        Args:
            signs: r_i in {-1, +1}^(d_i) of each hidden layer, or without noise any vector of norm sqrt(d_i); ones by default.
        """
        b = torch.as_tensor(np.asarray(beta, dtype=np.float64))
        length = float(b.norm())
        if self.depth == 0:
            return {"U": b[None]}
        r = [torch.ones(d, dtype=torch.float64) for d in self.widths] if signs is None else list(signs)
        q = self.g * length ** (2 / (self.depth + 1))
        direction = b / length if length else b
        out = {"W1": torch.outer(r[0], direction) * math.sqrt(q / (self.decays[0] * self.widths[0]))}
        for i in range(1, self.depth):
            out[f"W{i + 1}"] = torch.outer(r[i], r[i - 1]) * math.sqrt(q / (self.decays[i] * self.widths[i] * self.widths[i - 1]))
        out["U"] = r[-1][None] * math.sqrt(q / (self.decays[-1] * self.widths[-1]))
        return out

    def origin(self) -> Literal["global minimum", "saddle", "bad minimum"]:
        """What the origin is (R5, R6)."""
        if self.global_minimum().norm == 0:
            return "global minimum"
        return "saddle" if self.depth < 2 else "bad minimum"

    def barrier(self) -> float:
        """|beta| of the smaller stationary point: below it descent falls back to zero (D >= 2); 0 if there is none."""
        points = self.scale.stationary(self.g)
        return points[0].norm if self.depth >= 2 and len(points) > 1 else 0.0

    def trapped(self, theta: Params) -> bool:
        """Whether the end-to-end map is shorter than the barrier, so that descent from here is expected to fall back to zero although a
        better minimum exists; for balanced layers that is exact along the barrier's own direction."""
        return self.origin() == "bad minimum" and float(self.moments(theta)[0].norm()) < self.barrier()

    def predictive_variance(self, x: ArrayLike) -> Tensor:
        """(n,) variance of f(x) over the noise at the global minimum: (kappa - 1)(beta.x)^2 (R8)."""
        return (self.kappa - 1) * (matrix("x", x, (None, len(self.cross))) @ torch.from_numpy(self.global_minimum().beta)).square()

    def with_decay(self, factor: float) -> DeepLinear:
        """The same network with every decay multiplied."""
        return replace(self, decay=tuple(factor * d for d in self.decays))

    # ---------------------------------------------------------------- the network

    def init(self, seed: int, scale: float = 1.0) -> Params:
        ends = [len(self.cross), *self.widths, 1]
        draws = torch.Generator().manual_seed(seed)
        made = [scale * torch.randn(b, a, generator=draws, dtype=torch.float64) / a**0.5 for a, b in pairwise(ends)]
        return dict(zip([*(f"W{i + 1}" for i in range(self.depth)), "U"], made, strict=True))

    def moments(self, theta: Params) -> tuple[Tensor, Tensor]:
        """Mean map (..., d0) and E[f^2] (...) of the network, the noise averaged exactly (R0); leading axes count copies."""
        first, *rest = _chain(theta)
        mean = first
        if any(self.noise):
            second = first @ self.second @ first.mT
            for noise, layer in zip(self.noise, rest, strict=True):
                second = layer @ (second + noise * torch.diag_embed(second.diagonal(dim1=-2, dim2=-1))) @ layer.mT
                mean = layer @ mean
            return mean[..., 0, :], second[..., 0, 0]
        for layer in rest:
            mean = layer @ mean
        mean = mean[..., 0, :]
        return mean, ((mean @ self.second) * mean).sum(-1)

    def error(self, theta: Params) -> Tensor:
        """E (f - y)^2, shape (...)."""
        mean, square = self.moments(theta)
        return square - 2 * (mean * self.cross).sum(-1) + self.power

    def squared_norms(self, theta: Params) -> Tensor:
        """(..., D + 1) squared norm of each layer, from the input to the read-out."""
        return torch.stack([w.square().sum((-2, -1)) for w in _chain(theta)], -1)

    def loss(self, theta: Params) -> Tensor:
        return self.error(theta) + (self.squared_norms(theta) * torch.tensor(self.decays, dtype=torch.float64)).sum(-1)

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """Gaussian x (count, d0) and y (count,) with the model's moments."""
        power = torch.tensor([[self.power]], dtype=torch.float64)
        x, y = joint_sample(self.second, self.cross[None], power, count, seed)
        return {"x": x, "y": y[:, 0]}

    def sample_outputs(self, theta: Params, x: Tensor, seed: int) -> Tensor:
        """f(x) with one draw of dropout noise for each row of x."""
        draws = torch.Generator().manual_seed(seed)
        first, *rest = _chain(theta)
        h = x @ first.T
        for noise, layer in zip(self.noise, rest, strict=True):
            keep = 1 / (1 + noise)
            h = h * torch.bernoulli(torch.full_like(h, keep), generator=draws) / keep
            h = h @ layer.T
        return h[:, 0]

    def sample_losses(self, theta: Params, count: int, seed: int) -> Tensor:
        batch = self.data(count, seed)
        penalty = self.squared_norms(theta) @ torch.tensor(self.decays, dtype=torch.float64)
        return (self.sample_outputs(theta, batch["x"], seed + 1) - batch["y"]).square() + penalty

    def observables(self, theta: Params) -> dict[str, Tensor]:
        mean, square = self.moments(theta)
        balance = self.squared_norms(theta) * torch.tensor(self.decays, dtype=torch.float64)
        return {"map": mean, "balance": balance, "variance": square - ((mean @ self.second) * mean).sum(-1)}

    def generators(self) -> Mapping[str, Generator]:
        return _hidden_rotations(self.widths, [s == 0 for s in self.noise])

    def representative(self, seed: int = 0) -> Params:
        draws = torch.Generator().manual_seed(seed)
        signs = [torch.randint(0, 2, (d,), generator=draws).double() * 2 - 1 for d in self.widths]
        return self.layers(self.global_minimum().beta, signs)

    # ---------------------------------------------------------------- prediction

    def _predict(self, kind: str) -> Prediction:
        refs = ("deep-linear-exact R3",)
        if kind == "variance":
            return Prediction(kind, {"relative variance": Estimate(self.kappa - 1, refs=("stochastic-networks-deterministic R3",))})
        if kind == "phase":
            s = self.scale
            found = {"critical decay": s.critical_decay(), "spinodal": s.spinodal(), "jump": s.jump()}
            return Prediction(kind, found, refs=("exact-phase-transitions R5, R6",))
        if self.g == 0:
            reason = absent(f"decay {self.decays}: a layer without decay runs to infinity and the infimum is not attained", refs)
            return Prediction(kind, {"loss": reason}, refs=refs)
        if kind == "critical points":
            points = self.scale.stationary(self.g)
            if not points:
                return Prediction(kind, {"loss": absent("only the trivial stationary point", refs)}, refs=refs)
            values = {
                "loss": torch.tensor([p.loss + self.power for p in points], dtype=torch.float64),
                "norm": torch.tensor([p.norm for p in points], dtype=torch.float64),
            }
            return Prediction(kind, {name: Estimate(value) for name, value in values.items()}, refs=refs)
        return self._at(self.global_minimum())

    def _at(self, point: Stationary) -> Prediction:
        q = self.g * point.norm ** (2 / (self.depth + 1))
        beta = torch.from_numpy(point.beta)
        values = {
            "loss": Estimate(point.loss + self.power),
            "map": Estimate(beta),
            "balance": Estimate(torch.full((self.depth + 1,), q, dtype=torch.float64)),
            "variance": Estimate((self.kappa - 1) * float(beta @ self.second @ beta)),
        }
        return Prediction("minimum", values, refs=("deep-linear-exact R2, R3, R8",))

    def _control(self, kind: str) -> Prediction:
        """The depth forgotten: ridge regression with the same g; for the variance, noise shared by a whole layer."""
        if kind == "variance":
            return Prediction(kind, {"relative variance": Estimate(math.prod(1 + s for s in self.noise) - 1)})
        if kind == "phase":
            e, a = float(self.cross.norm()), float(self.second.trace()) / len(self.cross)
            return Prediction(kind, {"critical decay": Estimate(e * e / a)}, refs=("exact-phase-transitions R11",))
        ridge = Scale(self.second.numpy(), self.cross.numpy(), 0, self.kappa).minimum(self.g)
        if kind == "critical points":
            return Prediction(kind, {"loss": Estimate(torch.full((len(self.scale.stationary(self.g)),), ridge.loss + self.power))})
        return Prediction(kind, {"loss": Estimate(ridge.loss + self.power), "map": Estimate(torch.from_numpy(ridge.beta))})

    # ---------------------------------------------------------------- runs

    def _measure(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if kind == "variance":
            return {"relative variance": self._sampled_variance(seed, budget)}
        return self._solved_points(seed) if kind == "critical points" else self._swept(seed)

    def _sampled_variance(self, seed: int, budget: float) -> Estimate:
        found = self.minimise(seed)
        count = max(1000, round(400_000 * budget))
        x = self.data(1, seed)["x"].expand(count, -1)
        outputs = self.sample_outputs(found.best, x, seed + 1)
        mean = outputs.mean()
        if not found.converged or float(mean.abs()) < 1e-6:
            return Estimate(None, status="not_applicable", note="the minimum is trivial: it predicts zero")
        spread = (outputs - mean).square()
        ratio = spread.mean() / mean.square()
        # delta method over the draws of (f - m)^2 and f together
        influence = spread / mean.square() - ratio - 2 * ratio * (outputs - mean) / mean
        return Estimate(float(ratio), stderr=float(influence.std() / count**0.5), details={"draws": count})

    def _solved_points(self, seed: int) -> Mapping[str, Estimate]:
        """Zeros of the network's gradient by Levenberg-Marquardt, from weights near each predicted point."""
        losses, norms, residual = [], [], 0.0
        gradient = torch.func.grad(self.loss)
        for k, point in enumerate(self.scale.stationary(self.g)):
            start = self.layers(point.beta)
            x0 = flatten(start)
            x0 = x0 + 1e-3 * np.abs(x0).max() * normal(seed + k, len(x0)).numpy()
            found = optimize.root(lambda x, start=start: flatten(gradient(unflatten(x, start))), x0, method="lm", options={"xtol": 1e-14})
            end = unflatten(found.x, start)
            losses.append(float(self.loss(end)))
            norms.append(float(self.observables(end)["map"].norm()))
            residual = max(residual, float(np.abs(found.fun).max()))
        status: Any = "ok" if residual < 1e-8 else "not_converged"
        values = {"loss": losses, "norm": norms}
        return {name: Estimate(torch.tensor(v, dtype=torch.float64), residual=residual, status=status) for name, v in values.items()}

    def _swept(self, seed: int) -> Mapping[str, Estimate]:
        """The nontrivial branch of the network followed up in decay: where its loss crosses E[y^2], and where it ends."""
        if self.depth == 0:
            return dict.fromkeys(("critical decay", "spinodal", "jump"), absent("no transition to follow"))
        base = self.with_decay(1 / self.g)  # decays with geometric mean 1
        if self.depth == 1:
            zero = {name: torch.zeros_like(w) for name, w in self.init(seed).items()}

            def lowest(log_g: float) -> float:
                loss = base.with_decay(math.exp(log_g)).loss
                return float(torch.linalg.eigvalsh(hessian(loss, zero))[0])

            size = float(self.cross.norm()) or 1.0
            root = math.exp(optimize.brentq(lowest, math.log(size) - 3, math.log(size) + 3, xtol=1e-12))
            return {"critical decay": Estimate(root), "spinodal": Estimate(root), "jump": Estimate(0.0)}
        size = float(self.cross.norm()) or 1.0
        g = 1e-2 * size
        theta = base.with_decay(g).minimise(seed).best

        def follow(target: float, start: Params) -> tuple[Params, float, float]:
            model = base.with_decay(target)
            end = settle(model.loss, start)
            return end, float(model.loss(end)) - self.power, float(model.observables(end)["map"].norm())

        crossing = None  # the last point below E[y^2]: its decay and weights
        while True:  # geometric steps to the end of the branch
            end, value, length = follow(1.15 * g, theta)
            if crossing is None and value > 0 and length > 1e-3 * size:
                crossing = g, theta
            if length < 1e-3 * size:
                break
            g, theta = 1.15 * g, end
        low, high, here = g, 1.15 * g, theta
        while high / low - 1 > 2e-5:
            middle = math.sqrt(low * high)
            end, _, length = follow(middle, here)
            low, high, here = (middle, high, end) if length > 1e-3 * size else (low, middle, here)
        edge = low
        low, here = crossing or (g, theta)
        high = min(1.15 * low, edge)
        while high / low - 1 > 1e-8:
            middle = math.sqrt(low * high)
            end, value, _ = follow(middle, here)
            low, high, here = (middle, high, end) if value < 0 else (low, middle, here)
        return {"critical decay": Estimate(low), "spinodal": Estimate(edge), "jump": Estimate(follow(low, here)[2])}


@dataclass(frozen=True, eq=False)
class DeepLinearMulti(Landscape):
    """A deep linear network with several outputs, whitened input and no noise: modes decouple (deep-linear-exact R9).

    Attributes:
        target: (d2, d0) M = E[y x^T], with E[x x^T] = I.
        widths: hidden widths; the narrowest limits the number of modes.
        decay: gamma of each layer, or one number for all.
        power: E|y|^2; |M|^2 (no noise in y) by default.

    Kinds: ``minimum`` (loss, singular values of the end-to-end map).
    """

    target: Tensor
    widths: tuple[int, ...] = ()
    decay: tuple[float, ...] | float = 0.1
    power: float | None = None
    slug: ClassVar[str] = "deep-linear-exact"
    kinds: ClassVar[tuple[str, ...]] = ("minimum",)
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {"minimum": {"loss": 1e-7, "singular values": 1e-4}}
    scales: ClassVar[tuple[float, ...]] = (1.0, 1.5)

    def __post_init__(self) -> None:
        m = matrix("target", self.target, (None, None))
        widths = sizes("widths", tuple(self.widths))
        count = len(widths) + 1
        decay = (float(self.decay),) * count if isinstance(self.decay, int | float) else tuple(map(float, self.decay))
        if len(decay) != count or not all(math.isfinite(g) and g > 0 for g in decay):
            raise InputError(f"decay needs one gamma > 0 for each of {count} layers, or one number, got {decay}")
        least = float(m.square().sum())
        power = least if self.power is None else float(self.power)
        if not power >= least * (1 - 1e-12):
            raise InputError(f"E|y|^2 = {power!r} is below |M|^2 = {least:.6g}: no data has such moments")
        for name, value in {"target": m, "widths": widths, "decay": decay, "power": power}.items():
            object.__setattr__(self, name, value)

    @property
    def g(self) -> float:
        """Geometric mean of the decays."""
        decays: tuple[float, ...] = self.decay  # type: ignore[assignment]
        return math.prod(decays) ** (1 / len(decays))

    def modes(self) -> list[tuple[float, float]]:
        """Singular value and loss of each mode at the minimum, largest first; those beyond the narrowest width are 0."""
        values = torch.linalg.svdvals(self.target).tolist()
        slots = min(self.widths, default=len(values))
        return [per_mode_min(m, len(self.widths), self.g) if k < slots else (0.0, 0.0) for k, m in enumerate(values)]

    def init(self, seed: int, scale: float = 1.0) -> Params:
        ends = [self.target.shape[1], *self.widths, self.target.shape[0]]
        draws = torch.Generator().manual_seed(seed)
        names = [f"W{i + 1}" for i in range(len(self.widths))] + ["U"]
        made = [scale * torch.randn(b, a, generator=draws, dtype=torch.float64) / a**0.5 for a, b in pairwise(ends)]
        return dict(zip(names, made, strict=True))

    def _map(self, theta: Params) -> Tensor:
        first, *rest = _chain(theta)
        for layer in rest:
            first = layer @ first
        return first

    def _penalty(self, theta: Params) -> Tensor:
        decays: tuple[float, ...] = self.decay  # type: ignore[assignment]
        return torch.stack([g * w.square().sum() for g, w in zip(decays, _chain(theta), strict=True)]).sum()

    def loss(self, theta: Params) -> Tensor:
        whole = self._map(theta)
        return whole.square().sum() - 2 * (whole * self.target).sum() + float(self.power or 0.0) + self._penalty(theta)

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """White Gaussian x (count, d0) and y (count, d2)."""
        outputs = len(self.target)
        extra = (float(self.power or 0.0) - float(self.target.square().sum())) / outputs
        second = self.target @ self.target.T + max(extra, 0.0) * torch.eye(outputs, dtype=torch.float64)
        x, y = joint_sample(torch.eye(self.target.shape[1], dtype=torch.float64), self.target, second, count, seed)
        return {"x": x, "y": y}

    def sample_losses(self, theta: Params, count: int, seed: int) -> Tensor:
        batch = self.data(count, seed)
        return (batch["x"] @ self._map(theta).T - batch["y"]).square().sum(-1) + self._penalty(theta)

    def observables(self, theta: Params) -> dict[str, Tensor]:
        return {"singular values": torch.linalg.svdvals(self._map(theta))}

    def generators(self) -> Mapping[str, Generator]:
        return _hidden_rotations(self.widths, [True] * len(self.widths))

    def representative(self, seed: int = 0) -> Params:
        """The balanced factors of the end-to-end map, each hidden layer rotated at random."""
        left, _, right = torch.linalg.svd(self.target, full_matrices=False)
        s = torch.tensor([value for value, _ in self.modes()], dtype=torch.float64)
        decays: tuple[float, ...] = self.decay  # type: ignore[assignment]
        q = self.g * s ** (2 / len(decays))  # decay x square of each layer's singular value
        ends = [self.target.shape[1], *self.widths, self.target.shape[0]]
        turns = [right.T, *(rotation(d, seed + i) for i, d in enumerate(self.widths)), left]
        names = [f"W{i + 1}" for i in range(len(self.widths))] + ["U"]
        out: Params = {}
        for i, name in enumerate(names):
            if not self.widths:
                out[name] = (left * s) @ right
                break
            k = min(ends[i], ends[i + 1], len(s))
            out[name] = (turns[i + 1][:, :k] * (q[:k] / decays[i]).sqrt()) @ turns[i][:, :k].T
        return out

    def _predict(self, kind: str) -> Prediction:
        found = self.modes()
        values = {
            "loss": Estimate(sum(value for _, value in found) + float(self.power or 0.0)),
            "singular values": Estimate(torch.tensor([s for s, _ in found], dtype=torch.float64)),
        }
        return Prediction(kind, values, refs=("deep-linear-exact R9",))

    def _control(self, kind: str) -> Prediction:
        """One hidden layer more than there is."""
        deeper = [per_mode_min(m, len(self.widths) + 1, self.g) for m in torch.linalg.svdvals(self.target).tolist()]
        return Prediction(kind, {"loss": Estimate(sum(v for _, v in deeper) + float(self.power or 0.0))})
