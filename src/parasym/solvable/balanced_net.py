"""Two-layer linear networks with lambda-balanced layers, W2^T W2 - W1 W1^T = lambda I: from lazy to rich, exactly (lazy-to-rich).

f(x) = W2 W1 x, L = |W2 W1 X - Y|^2 / (2 P) with whitened inputs, X X^T = P I, so that up to a constant L = |W2 W1 - Sigma|^2 / 2 with
Sigma = Y X^T / P. Gradient flow at rate one. lambda = 0 is rich (both layers take the task's shape), |lambda| large lazy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Estimate, Status
from parasym.solvable.contract import Prediction, absent, positive
from parasym.solvable.engines import Params
from parasym.solvable.line_net import LineFlow
from parasym.solvable.riccati import Propagator, two_layer_matrix
from parasym.solvable.trained import Trained

SLUG = "lazy-to-rich"


def orthogonal(size: int, draws: torch.Generator) -> Tensor:
    """A random rotation (size, size)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=draws, dtype=torch.float64))
    return q * r.diagonal().sign()


def singular_pair(lam: float, s: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (of W1, of W2) with product s >= 0 and difference of squares lam, without cancellation (R8)."""
    root = (lam**2 + 4 * s.square()).sqrt()
    large = 0.5 * (root + abs(lam))
    small = torch.where(large > 0, s.square() / torch.where(large > 0, large, 1.0), 0.0)
    first, second = (small, large) if lam >= 0 else (large, small)
    return first.sqrt(), second.sqrt()


def balanced_pair(
    inputs: int, hidden: int, outputs: int, lam: float, s: Tensor, draws: torch.Generator, target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """W1 (hidden, inputs) and W2 (outputs, hidden) with W2^T W2 - W1 W1^T = lam I (R8).

    Args:
        s: (min(inputs, hidden, outputs),) singular values of W2 W1.
        target: aligns the modes with the singular vectors of this (outputs, inputs) matrix; else they are random.

    Raises:
        InputError: a width at which no such pair exists: lam > 0 needs hidden <= outputs, lam < 0 hidden <= inputs.
    """
    if (lam > 0 and hidden > outputs) or (lam < 0 and hidden > inputs):
        side, size = ("outputs", outputs) if lam > 0 else ("inputs", inputs)
        raise InputError(f"lambda = {lam:g} is impossible with hidden = {hidden} > {side} = {size}: the rank of lambda I does not fit")
    count = min(inputs, hidden, outputs)
    if s.shape != (count,) or bool((s < 0).any()) or not bool(torch.isfinite(s).all()):
        raise InputError(f"s must hold {count} finite numbers >= 0, got shape {tuple(s.shape)}")
    first, second = (torch.zeros(hidden, dtype=torch.float64) for _ in range(2))
    first[:count], second[:count] = singular_pair(lam, s.to(torch.float64))
    first[count:], second[count:] = math.sqrt(max(-lam, 0.0)), math.sqrt(max(lam, 0.0))
    S1, S2 = torch.zeros(hidden, inputs, dtype=torch.float64), torch.zeros(outputs, hidden, dtype=torch.float64)
    for matrix, values in ((S1, first), (S2, second)):
        k = min(matrix.shape)
        matrix[range(k), range(k)] = values[:k]
    R = orthogonal(hidden, draws)
    if target is None:
        U, V = orthogonal(outputs, draws), orthogonal(inputs, draws)
    else:
        U, _, Vt = torch.linalg.svd(target.to(torch.float64), full_matrices=True)
        V = Vt.mT
    return R @ S1 @ V.mT, U @ S2 @ R.mT


@torch.no_grad()
def lambda_balanced_(first: nn.Linear, second: nn.Linear, lam: float, scale: float = 0.02, *, generator: torch.Generator) -> None:
    """Redraw the weights of two adjacent linear layers so that they are lambda-balanced; biases are set to zero.

    Args:
        lam: > 0 makes the second layer the larger. scale: the singular values of their product are scale * |N(0, 1)|.

    Raises:
        InputError: the layers do not follow each other, or lam is impossible at this width.
    """
    if first.out_features != second.in_features:
        raise InputError(f"the layers do not follow each other: {first.out_features} outputs, {second.in_features} inputs")
    count = min(first.in_features, first.out_features, second.out_features)
    s = scale * torch.randn(count, generator=generator, dtype=torch.float64).abs()
    for layer, w in zip(
        (first, second), balanced_pair(first.in_features, first.out_features, second.out_features, lam, s, generator), strict=True
    ):
        layer.weight.copy_(w)
        if layer.bias is not None:
            layer.bias.zero_()


@dataclass(frozen=True)
class Balance:
    """How nearly two adjacent layers are lambda-balanced.

    Attributes:
        lam: trace(W2^T W2 - W1 W1^T) / hidden, the closest lambda. defect: |W2^T W2 - W1 W1^T - lam I| / |W2^T W2 - W1 W1^T|.
    """

    lam: float
    defect: float


def balance(w1: Tensor, w2: Tensor) -> Balance:
    """lambda and defect of W1 (hidden, inputs), W2 (outputs, hidden): the closed forms need a defect near 0 (R1, R12)."""
    charge = w2.double().mT @ w2.double() - w1.double() @ w1.double().mT
    lam = float(charge.diagonal().mean())
    rest = charge - lam * torch.eye(len(charge), dtype=torch.float64)
    size = float(charge.norm())
    # against the layers' own size where the charge itself vanishes
    scale = size if size > 1e-12 * float(w1.double().square().sum() + w2.double().square().sum()) else math.inf
    return Balance(lam, float(rest.norm()) / scale)


@dataclass(frozen=True, eq=False)
class Solution:
    """Everything the Gram matrix of the stacked weights says, at each time.

    Attributes:
        gram: (T, inputs + outputs, inputs + outputs). inputs: where it is cut.
    """

    gram: Tensor
    inputs: int

    @property
    def map(self) -> Tensor:
        """W2 W1 (T, outputs, inputs)."""
        return self.gram[..., self.inputs :, : self.inputs]

    @property
    def gram_in(self) -> Tensor:
        """W1^T W1 (T, inputs, inputs)."""
        return self.gram[..., : self.inputs, : self.inputs]

    @property
    def gram_out(self) -> Tensor:
        """W2 W2^T (T, outputs, outputs)."""
        return self.gram[..., self.inputs :, self.inputs :]

    def kernel_distance(self, other: Solution | None = None) -> Tensor:
        """1 - <K0, Kt> / |K0| |Kt| of the tangent kernel on whitened inputs, (T,); from the first time, or from ``other`` (R10)."""
        A0, B0 = (self.gram_in[:1], self.gram_out[:1]) if other is None else (other.gram_in, other.gram_out)
        return kernel_distance(A0, B0, self.gram_in, self.gram_out)


def kernel_distance(A0: Tensor, B0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Distance of the kernels I kron X^T A X + B kron X^T X from Gram matrices A = W1^T W1, B = W2 W2^T and whitened X (R10)."""

    def inner(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        outputs, inputs = B1.shape[-1], A1.shape[-1]
        trace = lambda M: M.diagonal(dim1=-2, dim2=-1).sum(-1)  # noqa: E731
        return outputs * (A1 * A2).sum((-1, -2)) + trace(B1) * trace(A2) + trace(B2) * trace(A1) + inputs * (B1 * B2).sum((-1, -2))

    return 1 - inner(A0, B0, A, B) / (inner(A0, B0, A0, B0) * inner(A, B, A, B)).sqrt()


def solve(w1: Tensor, w2: Tensor, target: Tensor, times: Sequence[float] | Tensor, tol: float = 1e-6) -> Solution:
    """The run from W1, W2 towards ``target`` under gradient flow (R2-R4).

    Raises:
        InputError: the layers are not lambda-balanced to ``tol``; see `balance`.
    """
    found = balance(w1, w2)
    if found.defect > tol:
        raise InputError(f"the layers are not lambda-balanced: defect {found.defect:.2g}, allowed {tol:g}; see balance(w1, w2)")
    return solve_as(w1, w2, target, times, found.lam)


def solve_as(w1: Tensor, w2: Tensor, target: Tensor, times: Sequence[float] | Tensor, lam: float) -> Solution:
    """`solve` with a given lambda, whatever the balance is: an approximation for layers that are not balanced."""
    Q0 = torch.cat([w1.mT, w2]).to(torch.float64)
    return Solution(Propagator(two_layer_matrix(target, lam)).trajectory(Q0, times), w1.shape[1])


def final_grams(target: Tensor, lam: float, hidden: int) -> tuple[Tensor, Tensor]:
    """W1^T W1 and W2 W2^T where W2 W1 fits the top modes of ``target`` (R9).

    Raises:
        InputError: more hidden units than modes with lam != 0: one layer keeps directions of its start.
    """
    U, s, Vt = torch.linalg.svd(target.to(torch.float64), full_matrices=False)
    if hidden > len(s) and lam != 0:
        raise InputError(f"hidden = {hidden} > {len(s)} modes with lambda != 0: the end depends on the start")
    first, second = singular_pair(lam, s[:hidden])
    return Vt[:hidden].mT * first.square() @ Vt[:hidden], U[:, :hidden] * second.square() @ U[:, :hidden].mT


def mode(lam: float, start: float, target: float, times: Sequence[float] | Tensor) -> Tensor:
    """Strength s(t) of one aligned mode: s' = sqrt(lam^2 + 4 s^2) (target - s), logistic at lam = 0, exponential for |lam| large (R7)."""
    a, b = singular_pair(lam, torch.tensor([abs(start)], dtype=torch.float64))
    return LineFlow(b * math.copysign(1.0, start), a, 1.0, target).product(times)


def task_sequence(w1: Tensor, w2: Tensor, targets: Sequence[Tensor], duration: float, points: int = 50) -> list[Solution]:
    """Tasks one after the other: lambda stays, Sigma changes; one `Solution` of ``points`` times for each (R11)."""
    lam, Q, out = balance(w1, w2).lam, torch.cat([w1.mT, w2]).to(torch.float64), []
    for target in targets:
        propagator = Propagator(two_layer_matrix(target, lam))
        factors = propagator.factors(Q, torch.linspace(0, duration, points, dtype=torch.float64))
        out.append(Solution(factors @ factors.mT, w1.shape[1]))
        Q = factors[-1]
    return out


@dataclass(frozen=True)
class LambdaBalancedNet(Trained):
    """A lambda-balanced net whose product starts with singular values scale * |N(0, 1)| and learns a Gaussian Sigma.

    ``samples`` whitened inputs carry noise of size ``noise`` on their labels that Sigma does not see. ``aligned`` starts in the modes
    of Sigma. ``seed`` draws all.
    """

    inputs: int
    hidden: int
    outputs: int
    lam: float
    scale: float = 0.05
    noise: float = 0.0
    aligned: bool = False
    samples: int = 24
    horizon: float = 8.0
    points: int = 6
    seed: int = 0
    slug: ClassVar[str] = SLUG
    kinds: ClassVar[tuple[str, ...]] = ("trajectory", "final", "conserved")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "trajectory": dict.fromkeys(("map", "gram in", "gram out", "kernel distance"), 1e-7),
        "final": dict.fromkeys(("map", "gram in", "gram out"), 1e-5),
        "conserved": {"balance": 1e-8},
    }

    def __post_init__(self) -> None:
        positive(inputs=self.inputs, hidden=self.hidden, outputs=self.outputs, scale=self.scale, horizon=self.horizon)
        if not (math.isfinite(self.lam) and math.isfinite(self.noise)) or self.points < 2 or self.samples < self.inputs:
            raise InputError(
                "Give a finite lambda and noise, at least 2 points, and at least as many samples as inputs (they are whitened)."
            )
        self.init()  # refuses impossible widths

    def full(self) -> Mapping[str, Tensor]:
        """x (n, inputs) with x^T x = n I, y (n, outputs), target (outputs, inputs)."""
        return _full(self)

    def init(self, seed: int | None = None) -> Params:
        """w1 (hidden, inputs), w2 (outputs, hidden); the model's own without ``seed``."""
        draws = torch.Generator().manual_seed(self.seed + 1 if seed is None else seed)
        s = self.scale * torch.randn(min(self.inputs, self.hidden, self.outputs), generator=draws, dtype=torch.float64).abs()
        w1, w2 = balanced_pair(self.inputs, self.hidden, self.outputs, self.lam, s, draws, self.full()["target"] if self.aligned else None)
        return {"w1": w1, "w2": w2}

    def losses(self, theta: Params, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of each sample; their mean is |W2 W1 X - Y|^2 / (2 P)."""
        return 0.5 * (batch["x"] @ theta["w1"].mT @ theta["w2"].mT - batch["y"]).square().sum(-1)

    def generators(self, theta: Params) -> list[Params]:
        """Tangents of W1 -> g W1, W2 -> W2 g^-1 for every elementary g of GL(hidden)."""
        out = []
        for i in range(self.hidden):
            for j in range(self.hidden):
                g = torch.zeros(self.hidden, self.hidden, dtype=torch.float64)
                g[i, j] = 1.0
                out.append({"w1": g @ theta["w1"], "w2": -theta["w2"] @ g})
        return out

    def observables(self, theta: Params) -> dict[str, Tensor]:
        """The map and the two Gram matrices, unchanged by rotations of the hidden layer, and the balance."""
        w1, w2, first = theta["w1"], theta["w2"], self.init()
        start = (first["w1"].mT @ first["w1"], first["w2"] @ first["w2"].mT)
        grams = (w1.mT @ w1, w2 @ w2.mT)
        return {"map": w2 @ w1, "gram in": grams[0], "gram out": grams[1], "kernel distance": kernel_distance(*start, *grams),
                "balance": w2.mT @ w2 - w1 @ w1.mT}  # fmt: skip

    def _predict(self, kind: str) -> Prediction:
        theta, target = self.init(), self.full()["target"]
        if kind == "conserved":
            return Prediction(kind, {"balance": Estimate(self.lam * torch.eye(self.hidden, dtype=torch.float64))}, refs=(f"{SLUG} R1",))
        if kind == "final":
            refs = (f"{SLUG} R9",)
            try:
                grams = final_grams(target, self.lam, self.hidden)
            except InputError as error:
                return Prediction(kind, {name: absent(str(error), refs) for name in ("map", "gram in", "gram out")}, refs=refs)
            U, s, Vt = torch.linalg.svd(target, full_matrices=False)
            s[self.hidden :] = 0
            values = {"map": U * s @ Vt, "gram in": grams[0], "gram out": grams[1]}
            gap = float(s[: self.hidden].min())
            return Prediction(kind, {n: Estimate(v) for n, v in values.items()}, condition={"smallest mode": gap}, refs=refs)
        found = solve_as(theta["w1"], theta["w2"], target, self.times, self.lam)
        values = {"map": found.map, "gram in": found.gram_in, "gram out": found.gram_out, "kernel distance": found.kernel_distance()}
        return Prediction(kind, {n: Estimate(v) for n, v in values.items()}, refs=(f"{SLUG} R3", f"{SLUG} R10"))

    def _control(self, kind: str) -> Prediction:
        """The kernel frozen at its start; a balance of the other sign (or of one, at 0); Gram matrices of another lambda."""
        theta, target, t = self.init(), self.full()["target"], self.times[:, None, None]
        if kind == "conserved":
            return Prediction(kind, {"balance": Estimate((-self.lam or 1.0) * torch.eye(self.hidden, dtype=torch.float64))})
        if kind == "final":
            theirs = self.predict(kind)
            if theirs.status == "not_applicable":
                return theirs
            grams = final_grams(target, -self.lam or 1.0, min(self.hidden, *target.shape))
            return Prediction(kind, {"gram in": Estimate(grams[0]), "gram out": Estimate(grams[1])})
        w1, w2 = theta["w1"], theta["w2"]
        left, right = torch.linalg.matrix_exp(-t * (w2 @ w2.mT)), torch.linalg.matrix_exp(-t * (w1.mT @ w1))
        still = torch.zeros(self.points, dtype=torch.float64)
        return Prediction(kind, {"map": Estimate(target - left @ (target - w2 @ w1) @ right), "kernel distance": Estimate(still)})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """Gradient flow of the loss by automatic differentiation; ``seed`` and ``budget`` change nothing."""
        last = torch.tensor([0.0, self._settled()], dtype=torch.float64)
        times = last if kind == "final" else self.times
        run, rows = self.run(times)
        slope = torch.func.grad(self.loss)({name: w[-1] for name, w in run.theta.items()})
        settled = kind != "final" or max(float(g.abs().max()) for g in slope.values()) < 1e-7
        status: Status = "ok" if run.ok and settled else "not_converged"
        note = "" if run.ok else run.message
        return {n: Estimate(v if kind == "trajectory" else v[-1], status=status, note=note) for n, v in rows.items()}

    def _settled(self) -> float:
        """A time by which every mode that can be learned has been: its slowest growth and its slowest settling."""
        s = torch.linalg.svdvals(self.full()["target"])[: self.hidden]
        slow = float((self.lam**2 + 4 * s[-1] ** 2).sqrt())
        return min(400.0, (2 * math.log(10 / self.scale) + 20) / slow * 4)


@functools.lru_cache(maxsize=64)
def _full(model: LambdaBalancedNet) -> Mapping[str, Tensor]:
    draws = torch.Generator().manual_seed(model.seed)
    target = torch.randn(model.outputs, model.inputs, generator=draws, dtype=torch.float64)
    x = torch.linalg.qr(torch.randn(model.samples, model.inputs, generator=draws, dtype=torch.float64))[0] * math.sqrt(model.samples)
    y = x @ target.mT
    free = torch.randn(model.samples, model.outputs, generator=draws, dtype=torch.float64)
    free = free - x @ (x.mT @ free) / model.samples
    return {"x": x, "y": y + model.noise * free, "target": target}
