"""Embedded deep linear networks: what SGD's noise selects among their global minima, and what it does to the curvature.

f(x) = M_O W_D ... W_1 M_I Z x with fixed invertible M_O, M_I and view Z, y = V x + eps, loss |f - y|^2. With all of them the identity it is
the deep linear regression of flatness-or-sharpness. `Chain` holds the closed forms; here they are put beside minimisation over the
gauge group, automatic differentiation, and SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.simulate import Average, Ensemble, Run, Snapshots, System, dot
from parasym.solvable.chains import (
    Chain,
    chain_fluctuation,
    hessian_trace,
    layer_fluctuations,
    minimise_gauge,
    product,
    random_gauges,
    regauge,
    signals,
    square_roots,
)
from parasym.solvable.contract import Model, Prediction


@dataclass(frozen=True, eq=False)
class EDLN(Model):
    """An embedded deep linear network and the data it learns from.

    Args:
        target: V (o, i). inputs: Sigma_x (i, i). noise: Sigma_eps (o, o).
        widths: hidden widths d_1..d_(D-1).
        read_in: M_I Z (i', i), invertible; the identity if not given. read_out: M_O (o, o), invertible; the identity if not given.
        lr, batch: of SGD, for the kind "sgd".
        gauge: spread of the random gauge that runs start from.

    Kinds: "equilibrium", least E|g|^2, its equal share of every layer, and the whitened spectrum of every hidden representation, beside
    L-BFGS over all gauges; "kernel", the cosine of every layer's kernel with the Platonic one; "sgd", the same cosine after a run.

    Raises:
        InputError: see `Chain`; a read-in or read-out that is not invertible; a hidden layer narrower than the rank.
    """

    target: Tensor
    inputs: Tensor
    noise: Tensor
    widths: tuple[int, ...]
    read_in: Tensor | None = None
    read_out: Tensor | None = None
    lr: float = 0.003
    batch: int = 1
    gauge: float = 0.5
    slug: ClassVar[str] = "perfect-platonic"
    kinds: ClassVar[tuple[str, ...]] = ("equilibrium", "kernel", "sgd")

    def __post_init__(self) -> None:
        o, i = self.target.shape
        for name, n in (("read_in", i), ("read_out", o)):
            M = getattr(self, name)
            if M is not None and (M.shape != (n, n) or float(torch.linalg.svdvals(M.double())[-1]) <= 1e-10 * float(M.norm())):
                raise InputError(f"{name} must be an invertible matrix ({n}, {n}), got shape {tuple(M.shape)}.")
        if not (self.lr > 0 and self.batch >= 1 and self.gauge >= 0):
            raise InputError(f"EDLN needs lr > 0, batch >= 1, gauge >= 0, got {self.lr}, {self.batch}, {self.gauge}.")
        self.chain.weights(self.widths)

    @property
    def _embeddings(self) -> tuple[Tensor, Tensor]:
        """M_I Z and M_O."""
        o, i = self.target.shape
        into = torch.eye(i, dtype=torch.float64) if self.read_in is None else self.read_in.double()
        return into, torch.eye(o, dtype=torch.float64) if self.read_out is None else self.read_out.double()

    @property
    def depth(self) -> int:
        """D."""
        return len(self.widths) + 1

    @property
    def chain(self) -> Chain:
        """The trainable part: its own target M_O^-1 V (M_I Z)^-1, inputs and noise metric."""
        into, out = self._embeddings
        V = torch.linalg.solve(out, self.target.double()) @ torch.linalg.inv(into)
        metric, X = out.T @ self.noise.double() @ out, into @ self.inputs.double() @ into.T
        return Chain(V, 0.5 * (X + X.T), 0.5 * (metric + metric.T), self.depth, None if self.read_out is None else out)

    def platonic_kernel(self) -> Tensor:
        """K (i, i) of the kernel x^T K x' in the coordinates of x; it knows neither widths, depth, view nor embeddings (R4)."""
        return Chain(self.target, self.inputs, self.noise, 1).kernel()

    def noise_equilibrium(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """W_1..W_D where E|g|^2 is least (R3)."""
        return self.chain.weights(self.widths, generator)

    def random_minimum(self, generator: torch.Generator, spread: float | None = None) -> list[Tensor]:
        """A global minimum in a random gauge around the noise equilibrium: what gradient flow may end at (R5)."""
        gauges = random_gauges(self.widths, self.gauge if spread is None else spread, generator)
        return regauge(self.noise_equilibrium(generator), gauges)

    def kernels(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """(M_I Z)^T R_i^T R_i M_I Z of each hidden layer: the kernel in the coordinates of x, batched."""
        into, _ = self._embeddings
        out, R = [], into
        for W in weights[:-1]:
            R = W @ R
            out.append(R.mT @ R)
        return out

    # -- the contract ------------------------------------------------------------------------------------------------------------

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_i, d_(i-1)) of each layer."""
        sizes = [self.target.shape[1], *self.widths, self.target.shape[0]]
        return [(b, a) for a, b in pairwise(sizes)]

    def unflatten(self, theta: Tensor) -> list[Tensor]:
        """Weights of a flat vector (..., P), and back by ``torch.cat`` of their rows."""
        parts = theta.split([a * b for a, b in self.shapes], -1)
        return [p.reshape(*p.shape[:-1], *s) for p, s in zip(parts, self.shapes, strict=True)]

    def loss(self, theta: Tensor) -> Tensor:
        """E|f - y|^2 = |(M_O W M_I Z - V) Sigma_x^1/2|^2 + tr Sigma_eps, of a flat theta (..., P)."""
        into, out = self._embeddings
        gap = (out @ product(self.unflatten(theta)) @ into - self.target.double()) @ square_roots(self.inputs.double())[0]
        return gap.square().sum((-2, -1)) + self.noise.double().trace()

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """Gaussian x (count, i) and y = V x + eps (count, o)."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, self.inputs.shape[0], generator=g, dtype=torch.float64) @ square_roots(self.inputs.double())[0]
        e = torch.randn(count, self.noise.shape[0], generator=g, dtype=torch.float64) @ square_roots(self.noise.double())[0]
        return {"x": x, "y": x @ self.target.double().T + e}

    def sample_loss(self, theta: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean |f(x) - y|^2 over a batch; its expectation is `loss`."""
        into, out = self._embeddings
        f = batch["x"] @ (out @ product(self.unflatten(theta)) @ into).mT
        return (f - batch["y"]).square().sum(-1).mean(-1)

    def observables(self, theta: Tensor) -> Mapping[str, Tensor]:
        """Gauge-dependent only through what the noise fixes: E|g|^2 of each layer, tr H, the map, the kernels of the hidden layers."""
        W, c = self.unflatten(theta), self.chain
        return {
            "layers": layer_fluctuations(W, c.inputs, c.noise),
            "trace": hessian_trace(W, c.inputs, c.outward),
            "map": self._embeddings[1] @ product(W) @ self._embeddings[0],
            **{f"kernel {i + 1}": K for i, K in enumerate(self.kernels(W))},
        }

    def module(self, weights: Sequence[Tensor] | None = None) -> nn.Module:
        """The network in torch: ``M_I Z`` and ``M_O`` are buffers, the layers (from the noise equilibrium if not given) parameters."""
        return _Network(self.noise_equilibrium() if weights is None else list(weights), *self._embeddings)

    def _start(self, seed: int) -> list[Tensor]:
        return self.random_minimum(torch.Generator().manual_seed(seed))

    # -- prediction and run --------------------------------------------------------------------------------------------------------

    def _predict(self, kind: str) -> Prediction:
        c, ref = self.chain, ("perfect-platonic R3", "perfect-platonic R4")
        if kind == "equilibrium":
            values = {
                "fluctuation": Estimate(c.fluctuation()),
                "layers": Estimate(torch.full((self.depth,), 4 * c.energy, dtype=torch.float64)),
                "spectrum": Estimate(_normed(c.spectrum()[1])[None].repeat(len(self.widths), 1)),
            }
            return Prediction(kind, values, refs=ref)
        values = {"cosine": Estimate(torch.ones(len(self.widths), dtype=torch.float64), refs=ref)}
        return Prediction(kind, values, exact=kind == "kernel", condition={} if kind == "kernel" else {"lr": self.lr}, refs=ref)

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if kind == "sgd":
            found = run_sgd([self], [self._start(seed)], steps=max(200, round(60_000 * budget)), replicas=20, seed=seed, read=False)
            return {"cosine": Estimate(found.cosines[0], stderr=found.spread[0])}
        c = self.chain
        W = minimise_gauge(self._start(seed), lambda W: chain_fluctuation(W, c.inputs, c.noise) / c.fluctuation(), seed)
        if kind == "kernel":
            return {"cosine": Estimate(torch.stack([kernel_cosine(K, self.platonic_kernel(), self.inputs) for K in self.kernels(W)]))}
        rank = len(c.spectrum()[1])
        H = signals(W, c.inputs, c.noise)[0][1:]
        spectra = torch.stack([_normed(torch.linalg.eigvalsh(h).flip(0)[:rank]) for h in H])
        return {
            "fluctuation": Estimate(float(chain_fluctuation(W, c.inputs, c.noise))),
            "layers": Estimate(layer_fluctuations(W, c.inputs, c.noise)),
            "spectrum": Estimate(spectra),
        }

    def _control(self, kind: str) -> Prediction:
        """Without the entropic force any global minimum is as good: numbers of a random gauge."""
        c = self.chain
        W = self.random_minimum(torch.Generator().manual_seed(12345))
        if kind == "equilibrium":
            spectra = [_normed(torch.linalg.eigvalsh(h).flip(0)[: len(c.spectrum()[1])]) for h in signals(W, c.inputs, c.noise)[0][1:]]
            layers = layer_fluctuations(W, c.inputs, c.noise)
            return Prediction(
                kind,
                {"fluctuation": Estimate(float(layers.sum())), "layers": Estimate(layers), "spectrum": Estimate(torch.stack(spectra))},
            )
        cosines = torch.stack([kernel_cosine(K, self.platonic_kernel(), self.inputs) for K in self.kernels(W)])
        return Prediction(kind, {"cosine": Estimate(cosines)})


@dataclass(frozen=True, eq=False)
class LinearRegressionNetwork(EDLN):
    """Deep linear regression with label noise: how sharp is the minimum that SGD ends at (flatness-or-sharpness).

    Kinds: "sharpness", tr H and the largest eigenvalue, beside the autograd Hessian at the minimiser that L-BFGS finds; "stationary",
    tr H averaged over the last 30 % of a run of SGD.
    """

    lr: float = 0.005
    gauge: float = 0.4
    slug: ClassVar[str] = "flatness-or-sharpness"
    kinds: ClassVar[tuple[str, ...]] = ("sharpness", "stationary")

    def _predict(self, kind: str) -> Prediction:
        c, ref = self.chain, ("flatness-or-sharpness R3", "flatness-or-sharpness R5")
        if kind == "stationary":
            return Prediction(kind, {"trace": Estimate(c.sharpness())}, exact=False, condition={"lr": self.lr}, refs=ref)
        return Prediction(kind, {"trace": Estimate(c.sharpness()), "top": Estimate(c.top_curvature())}, refs=ref)

    def _control(self, kind: str) -> Prediction:
        """The flattest global minimum, as if SGD sought flatness."""
        flat = self.chain.flattest()
        if kind == "stationary":
            return Prediction(kind, {"trace": Estimate(flat.sharpness())})
        return Prediction(kind, {"trace": Estimate(flat.sharpness()), "top": Estimate(flat.top_curvature())})

    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        if kind == "stationary":
            found = run_sgd([self], [self._start(seed)], steps=max(200, round(60_000 * budget)), replicas=20, seed=seed).average
            assert found is not None
            return {"trace": found if not found.ok else Estimate(float(found.value[0, 0]), stderr=float(found.stderr[0, 0]))}  # type: ignore[index]
        c = self.chain
        W = minimise_gauge(self._start(seed), lambda W: chain_fluctuation(W, c.inputs, c.noise) / c.fluctuation(), seed)
        theta = torch.cat([w.reshape(-1) for w in W])
        H = torch.func.hessian(self.loss)(theta)
        return {"trace": Estimate(float(H.trace())), "top": Estimate(float(torch.linalg.eigvalsh(H)[-1]))}


Precision = Literal["float32", "float64"]


class _Network(nn.Module):
    def __init__(self, weights: Sequence[Tensor], into: Tensor, out: Tensor) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(W.clone()) for W in weights])
        self.register_buffer("read_in", into.clone())
        self.register_buffer("read_out", out.clone())

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.get_buffer("read_in").T
        for W in self.layers:
            h = h @ W.T
        return h @ self.get_buffer("read_out").T


def _normed(s: Tensor) -> Tensor:
    return s / s.norm()


def kernel_cosine(K: Tensor, L: Tensor, inputs: Tensor) -> Tensor:
    """<K, L> / (|K| |L|) of the kernels x^T K x' and x^T L x' over pairs of independent x, x' with second moment ``inputs``; batched."""
    a, b = inputs @ K, inputs @ L
    return (a * b.mT).sum((-2, -1)) / ((a * a.mT).sum((-2, -1)) * (b * b.mT).sum((-2, -1))).sqrt()


# ------------------------------------------------------------------------------------------------ SGD, all networks and replicas at once


@dataclass(frozen=True, eq=False)
class SGDRun:
    """What SGD on networks of one shape left; one row for each network.

    Attributes:
        average: tr H of the population loss and E|g|^2 (as if at a global minimum) averaged over the last part of the run and over
            replicas, (networks, 2), with their standard errors; None with a ``path``.
        path: the same two averaged over replicas at the times asked for, (networks, times, 2); None if not asked for.
        kernels: for each network the replica-averaged kernel of each hidden layer in the coordinates of x.
        cosines, spread: their cosines with the Platonic kernel, (networks, layers), and the standard errors by a jackknife over replicas.
        lost: share of replicas that diverged, (networks,).
    """

    average: Estimate | None
    path: Estimate | None
    kernels: list[list[Tensor]]
    cosines: Tensor
    spread: Tensor
    lost: Tensor


def run_sgd(
    models: Sequence[EDLN],
    starts: Sequence[Sequence[Tensor]],
    *,
    steps: int,
    replicas: int,
    seed: int,
    last: float = 0.3,
    path: Sequence[int] = (),
    read: bool = True,
) -> SGDRun:
    """SGD on fresh Gaussian samples, from given weights, ``replicas`` runs of every network.

    Args:
        models: of the same widths and batch; they may differ in everything else. starts: weights for each.
        steps: how many. last: share of them over which tr H is averaged.
        path: steps at which tr H is read instead. read: False leaves tr H and E|g|^2 out, which is faster.

    Raises:
        InputError: networks of different shapes.
    """
    ensemble, embedded = sgd_ensemble(models, replicas, seed), any(m.read_out is not None for m in models)
    theta = torch.stack([torch.cat([W.reshape(-1) for W in start]) for start in starts])
    reader = _reader(models[0].shapes, embedded)
    burn = 0 if path or not read else round((1 - last) * steps)
    observe = [] if not read else [Snapshots(tuple(path), reader)] if path else [Average(reader)]
    run: Run = ensemble.run(steps - burn, observe, burn=burn, start=theta[:, None])
    found: Estimate | None = run[0] if read else None
    kernels, cosines, spread = [], [], []
    for m, final, sound in zip(models, run.final, run.sound, strict=True):
        each = m.kernels(m.unflatten(final[sound]))
        kernels.append([K.mean(0) for K in each])
        seen = [_jackknife(K, m.platonic_kernel(), m.inputs.double()) for K in each]
        cosines.append(torch.stack([c for c, _ in seen]))
        spread.append(torch.stack([e for _, e in seen]))
    lost = (~run.sound).double().mean(-1)
    return SGDRun(None if path else found, found if path else None, kernels, torch.stack(cosines), torch.stack(spread), lost)


def sgd_ensemble(models: Sequence[EDLN], replicas: int, seed: int, precision: Precision = "float32") -> Ensemble:
    """``replicas`` runs of SGD of each network, as an ensemble to be given a start; a state is a network's flat weights."""
    first = models[0]
    if any(m.shapes != first.shapes or m.batch != first.batch for m in models):
        raise InputError("Networks that are run together must have the same widths and batch.")
    embedded = any(m.read_out is not None for m in models)
    params: dict[str, list[float]] = {"lr": [m.lr for m in models]}
    for m in models:
        into, out = m._embeddings
        named = {
            "a": into @ square_roots(m.inputs.double())[0],
            "b": out.T @ square_roots(m.noise.double())[0],
            "v": m.chain.target,
            **({"c": out.T @ out} if embedded else {}),
        }
        for name, M in named.items():
            for i, row in enumerate(M.tolist()):
                for j, value in enumerate(row):
                    params.setdefault(f"{name}{i}_{j}", []).append(value)
    return Ensemble(_system(first.shapes, first.batch, embedded), replicas, params, seed, precision=precision)


def _jackknife(K: Tensor, target: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of the mean of K (n, i, i) with the target, and its standard error."""
    n, whole = len(K), kernel_cosine(K.mean(0), target, inputs)
    without = kernel_cosine((K.sum(0) - K) / max(n - 1, 1), target, inputs)
    return whole, ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()


Matrix = list[list[Any]]


def _symbols(p: Any, name: str, rows: int, columns: int) -> Matrix:
    return [[getattr(p, f"{name}{i}_{j}") for j in range(columns)] for i in range(rows)]


def _matrices(state: Any, shapes: Sequence[tuple[int, int]]) -> list[Matrix]:
    out, at = [], 0
    for rows, columns in shapes:
        out.append([[state[at + i * columns + j] for j in range(columns)] for i in range(rows)])
        at += rows * columns
    return out


def _apply(M: Matrix, x: Sequence[Any]) -> list[Any]:
    return [dot(row, x) for row in M]


def _times(A: Matrix, B: Matrix) -> Matrix:
    return [[dot(row, column) for column in zip(*B, strict=True)] for row in A]


def _system(shapes: Sequence[tuple[int, int]], batch: int, embedded: bool) -> System:
    """One step of SGD on ``batch`` fresh samples of |M_O W_D ... W_1 x~ - y|^2."""
    inside, outside = shapes[0][1], shapes[-1][0]

    def step(state: Any, p: Any, draws: Any) -> Any:
        W = _matrices(state, shapes)
        A, B = _symbols(p, "a", inside, inside), _symbols(p, "b", outside, outside)
        V = _symbols(p, "v", outside, inside)
        total: list[Any] = [0.0] * len(state)
        for _ in range(batch):
            h = [_apply(A, draws.normals(inside))]
            for M in W:
                h.append(_apply(M, h[-1]))
            gap = [a - b for a, b in zip(h[-1], _apply(V, h[0]), strict=True)]
            if embedded:
                gap = _apply(_symbols(p, "c", outside, outside), gap)
            back = [a - b for a, b in zip(gap, _apply(B, draws.normals(outside)), strict=True)]
            at = len(state)
            for k in range(len(W) - 1, -1, -1):
                rows, columns = shapes[k]
                at -= rows * columns
                for i in range(rows):
                    for j in range(columns):
                        total[at + i * columns + j] = total[at + i * columns + j] + back[i] * h[k][j]
                if k:
                    back = _apply([list(column) for column in zip(*W[k], strict=True)], back)
        rate = 2.0 / batch * p.lr
        return [w - rate * g for w, g in zip(state, total, strict=True)]

    return System("deep linear network", lambda p, d: [0.0] * sum(a * b for a, b in shapes), step)


def _reader(shapes: Sequence[tuple[int, int]], embedded: bool) -> Any:
    """tr H = 2 sum |M_O L_i|^2 |R_(i-1) Sigma_x^1/2|^2 of the population loss (at any weights: the residual has no part in the trace),
    and 4 sum |Sigma_eps^1/2 M_O L_i|^2 |R_(i-1) Sigma_x^1/2|^2, which is E|g|^2 at a global minimum; as expressions of the weights."""
    inside, outside = shapes[0][1], shapes[-1][0]

    def read(state: Any, p: Any) -> Any:
        W = _matrices(state, shapes)
        forward = [_symbols(p, "a", inside, inside)]
        for M in W[:-1]:
            forward.append(_times(M, forward[-1]))
        right = [_square(M) for M in forward]
        back: Matrix = [[1.0 if i == j else 0.0 for j in range(outside)] for i in range(outside)]
        noisy = [list(column) for column in zip(*_symbols(p, "b", outside, outside), strict=True)]
        C = _symbols(p, "c", outside, outside) if embedded else back
        trace: Any = 0.0
        fluctuation: Any = 0.0
        for k in range(len(W) - 1, -1, -1):
            left = dot([x for row in _times(C, back) for x in row], [x for row in back for x in row])
            trace = trace + 2.0 * left * right[k]
            fluctuation = fluctuation + 4.0 * _square(noisy) * right[k]
            back, noisy = _times(back, W[k]), _times(noisy, W[k])
        return [trace, fluctuation]

    return read


def _square(M: Matrix) -> Any:
    return dot([x for row in M for x in row], [x for row in M for x in row])
