"""Proof of a Perfect Platonic Representation Hypothesis.

Slug perfect-platonic. Embedded deep linear networks M_O W_D ... W_1 M_I Z x of different width, depth, view Z and embedding, trained by SGD
on one relation, end with the same representation kernel in every hidden layer of every network: the one of least gradient
fluctuation. Almost no other global minimum has it.

Conventions: loss |f - y|^2 summed over outputs (no 1/2), y = V x + eps, Gaussian x and eps, batches of one fresh sample. Network A has
hidden widths 4, network B 3 and 5; dx = dy = 3, V = diag(1, .8, .6) Q, Sigma_x = diag(1, .7, .5), Sigma_eps = diag(1, .4, .15) scaled to
trace 3, M_O, M_I, Z = Q diag(1.2, 1, .8), every Q a random rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.drawings import bars, heatmap
from parasym.gallery.ensemble import Ensemble, settle
from parasym.measure.alignment import alignment
from parasym.solvable.chains import (
    balance_gap,
    chain_fluctuation,
    hessian_trace,
    layer_fluctuations,
    minimise_gauge,
    signals,
    square_roots,
)
from parasym.solvable.edln import EDLN, kernel_cosine, run_sgd

SLUG = "perfect-platonic"
_F64 = torch.float64


def rotation(draws: Ensemble, n: int) -> Tensor:
    """From a QR of N(0, 1)."""
    return torch.linalg.qr(draws.normal(n, n)[0]).Q


def _diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=_F64))


@dataclass(frozen=True, eq=False)
class Relation:
    """The data of one seed, and the fixed embeddings of the two networks."""

    target: Tensor
    inputs: Tensor
    noise: Tensor
    read_in: tuple[Tensor, Tensor]
    read_out: tuple[Tensor, Tensor]

    def network(self, which: int, widths: tuple[int, ...], **changes: Tensor | float) -> EDLN:
        """Network A (0) or B (1); ``changes`` to its target, inputs or noise."""
        data: dict[str, object] = {"target": self.target, "inputs": self.inputs, "noise": self.noise, **changes}
        return EDLN(widths=widths, read_in=self.read_in[which], read_out=self.read_out[which], **data)  # type: ignore[arg-type]


def relation(seed: int, n: int = 3) -> Relation:
    """V, covariances and embeddings of a seed."""
    draws, scale = Ensemble((seed,)), _diagonal(1.2, 1.0, 0.8)
    V, noise = _diagonal(1.0, 0.8, 0.6) @ rotation(draws, n), _diagonal(1.0, 0.4, 0.15) * (3 / 1.55)
    into = tuple(rotation(draws, n) @ scale @ rotation(draws, n) @ scale for _ in range(2))  # M_I Z
    out = tuple(rotation(draws, n) @ scale for _ in range(2))
    return Relation(V, _diagonal(1.0, 0.7, 0.5), noise, into, out)  # type: ignore[arg-type]


def worst_pair(kernels: Sequence[Tensor], inputs: Tensor) -> float:
    """Smallest cosine over all pairs of kernels, those of one network included."""
    return min(float(kernel_cosine(a, b, inputs)) for a, b in combinations(kernels, 2))


# ------------------------------------------------------------------------------------------------ closed forms


@dataclass(frozen=True)
class ClosedConfig:
    """Random V (3, 4), covariances and embeddings; chains of the widths below; L-BFGS over all gauges from a random start."""

    widths: tuple[tuple[int, ...], ...] = ((5,), (6, 4, 7), (3, 3))
    samples: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)


def closed(config: ClosedConfig) -> Part:
    """E1, R1-R5, R7, R8: the closed minimiser against minimisation over the whole gauge group, and what it says."""
    rows: dict[str, list[float]] = {
        k: [] for k in ("gap", "kernel", "layer", "balance", "gradient", "gauge", "spectrum", "raise", "aligned")
    }
    for seed in config.seeds:
        draws, g = Ensemble((seed,)), torch.Generator().manual_seed(seed)
        V, X, noise = draws.normal(3, 4)[0], _covariance(draws, 4), _covariance(draws, 3)
        reps = []
        for widths in config.widths:
            model = EDLN(V, X, noise, widths, draws.normal(4, 4)[0], draws.normal(3, 3)[0])
            c, K = model.chain, model.platonic_kernel()
            W = model.noise_equilibrium(g)
            start = model.random_minimum(g)
            found = minimise_gauge(start, lambda o, c=c: chain_fluctuation(o, c.inputs, c.noise) / c.fluctuation(), seed)  # type: ignore[misc]
            rows["gap"].append(float(chain_fluctuation(found, c.inputs, c.noise)) / c.fluctuation() - 1)
            rows["kernel"] += [float((k / k.norm() - K / K.norm()).abs().max() / (K / K.norm()).abs().max()) for k in model.kernels(found)]
            rows["layer"] += (layer_fluctuations(found, c.inputs, c.noise) / (4 * c.energy)).tolist()
            rows["balance"].append(float(balance_gap(W, c.inputs, c.noise)))
            rows["gauge"].append(min(float(kernel_cosine(k, K, X)) for k in model.kernels(start)))
            rows["spectrum"] += [float(v) for v in _spectra(model, W)]
            flat = hessian_trace(c.flattest().weights(widths), c.inputs, c.outward)
            rows["raise"].append(float(hessian_trace(W, c.inputs, c.outward) / flat))
            x = model.data(200, seed)["x"]
            reps += [x @ square_roots(k)[0] for k in model.kernels(W)]
            rows["gradient"].append(_gradients(model, start, config.samples, seed))
        for metric in ("kernel_cos", "mutual_knn"):
            rows["aligned"].append(float(alignment(reps, reps, metric).value.min()))  # type: ignore[arg-type, union-attr]
    checks = (
        match("E|g|^2: closed form against L-BFGS over all gauges, relative gap", 0.0, rows["gap"], 1e-8, source=f"{SLUG} E1, R3"),
        match("kernels that L-BFGS finds against the Platonic one, relative error", 0.0, rows["kernel"], 1e-6, source=f"{SLUG} E1, R4"),
        match("E|g_i|^2 of every layer over 4 T", 1.0, rows["layer"], 1e-6, source=f"{SLUG} R2, R3"),
        match("tr(G_(i+1)) H_i = tr(H_(i-1)) G_i in every hidden layer, relative gap", 0.0, rows["balance"], 1e-10, source=f"{SLUG} R2"),
        match("gradients of samples against -2 (L_i^T eps)(R_(i-1) x)^T, whose moments are 4 tr(H) G and 4 T_i; relative", 0.0,
              rows["gradient"], 1e-10, source=f"{SLUG} R1"),
        match("whitened spectrum of every hidden layer against that of Sigma_eps^1/2 V Sigma_x^1/2, relative", 0.0, rows["spectrum"], 1e-9,
              source=f"{SLUG} R4"),
        match("representations of all layers of all networks: smallest kernel cosine and share of common neighbours", 1.0, rows["aligned"],
              1e-9, source=f"{SLUG} R8"),
        holds("tr H at the minimiser over the flattest minimum: the cause that aligns also sharpens", rows["raise"], at_least=1.0,
              source=f"{SLUG} R7"),
        control("a random gauge of the same minimum: smallest cosine with the Platonic kernel", rows["gauge"], at_most=0.995,
                source=f"{SLUG} R5"),
    )  # fmt: skip
    return Part(checks)


def _covariance(draws: Ensemble, n: int) -> Tensor:
    A = draws.normal(n, n)[0]
    return A @ A.T / n + 0.2 * torch.eye(n, dtype=_F64)


def _spectra(model: EDLN, W: Sequence[Tensor]) -> list[Tensor]:
    """Relative gap of the normalised spectra of R_i Sigma^1/2 (squared) and of Sigma_eps^1/2 V Sigma_x^1/2, for each hidden layer."""
    s = torch.linalg.svdvals(square_roots(model.noise)[0] @ model.target @ square_roots(model.inputs)[0])
    out = []
    for H in signals(W, model.chain.inputs, model.chain.noise)[0][1:]:
        seen = torch.linalg.eigvalsh(H).flip(0)[: len(s)]
        out.append((seen / seen.sum() - s / s.sum()).abs().max() / (s / s.sum()).max())
    return out


def _gradients(model: EDLN, W: Sequence[Tensor], count: int, seed: int) -> float:
    """Autograd gradients of samples at a global minimum against -2 L_i^T M_O^T eps (R_(i-1) M_I Z x)^T, largest relative error: with eps
    independent of x the second moments of R1 follow."""
    theta = torch.cat([w.reshape(-1) for w in W])
    data = model.data(count, seed)

    def one(x: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(lambda t: model.sample_loss(t, {"x": x[None], "y": y[None]}))(theta)

    each = model.unflatten(torch.func.vmap(one)(data["x"], data["y"]))
    eps = data["y"] - data["x"] @ model.target.T
    forward = [data["x"] if model.read_in is None else data["x"] @ model.read_in.T]
    for w in W[:-1]:
        forward.append(forward[-1] @ w.T)
    back = [eps if model.read_out is None else eps @ model.read_out]
    for w in reversed(W[1:]):
        back.append(back[-1] @ w)
    pairs = zip(each, back[::-1], forward, strict=True)
    return max(float((g + 2 * b[:, :, None] * h[:, None, :]).norm() / g.norm()) for g, b, h in pairs)


# ------------------------------------------------------------------------------------------------ ways to break it


@dataclass(frozen=True)
class BreakingConfig:
    """Networks A and B at the minimiser of what each rule minimises over the gauges; the worst cosine over all pairs of hidden layers.

    Decay: S / S_min + c N / N_0, N = sum |W_i|^2, N_0 its value at the noise equilibrium. Q = O1 diag(2, 1, .3) O2. Input-dependent noise
    has covariance Sigma_eps x_1^2 / Var x_1. ``rates``: the last layer's learning rate over the first's; for the
    preconditioner, the last row's over the first's in every layer. The dossier lists unequal layer
    rates among what breaks the alignment; they do not: each hidden layer then has eta_(i+1) tr(G_(i+1)) H_i = eta_i tr(H_(i-1)) G_i, still
    H_i proportional to G_i, which fixes the kernel.

    Every bound is asked of every seed. The dossier's bounds on decay were read off six draws; seed 0 is beyond them, so they stand here as
    refuted: how much decay costs depends on V and the embeddings. What holds for every draw is the order.
    """

    decays: tuple[float, ...] = (0.01, 0.1, 1.0)
    rates: float = 10.0
    widths: tuple[tuple[int, ...], tuple[int, ...]] = ((4,), (3, 5))
    seeds: tuple[int, ...] = (0, 1, 2)


def breaking(config: BreakingConfig) -> Part:
    """E3, R6: what keeps the perfect alignment and what breaks it."""
    found: dict[str, list[float]] = {}
    for seed in config.seeds:
        for name, value in _broken(config, seed).items():
            found.setdefault(name, []).append(value)
    seen = {name: torch.tensor(values, dtype=_F64) for name, values in found.items()}
    decays = torch.stack([seen["intact"], *(seen[f"decay {c:g}"] for c in config.decays), seen["decay only"]])
    keep = ("intact", "orthogonal label transform of one side", "input-dependent noise on both sides", "unequal layer rates")
    cut: Mapping[str, tuple[float, str]] = {
        "random gauge": (0.95, "R5, E3"),
        "label transform of one side": (0.9, "E3"),
        "noise reversed on one side": (0.9, "E3"),
        "input-dependent noise on one side": (0.9995, "R6"),
        "diagonal preconditioner": (0.9995, "R6"),
    }
    looser: Mapping[str, float] = {f"decay {config.decays[-1]:g}": 0.995, "decay only": 0.985}
    checks: list[Check] = [
        match(f"{name}: worst cosine over all pairs of layers", 1.0, seen[name], 1e-6, source=f"{SLUG} E3, R6", spread=seen[name])
        for name in keep
    ]
    checks += [
        control(f"{name}: worst cosine, every seed", seen[name], at_most=b, source=f"{SLUG} {s}", spread=seen[name])
        for name, (b, s) in cut.items()
    ]
    checks += [
        refuted(f"{name}: worst cosine, every seed", seen[name], at_most=b, source=f"{SLUG} E3", spread=seen[name])
        for name, b in looser.items()
    ]
    checks += [
        control(f"{name}: worst cosine, every seed, is not the intact one", seen[name], at_most=0.9995, source=f"{SLUG} E3, R6",
                spread=seen[name]) for name in looser
    ]  # fmt: skip
    checks.append(holds("the more weight decay, the worse: smallest fall of the cosine", (decays[:-1] - decays[1:]).amin(0), at_least=0.0,
                        source=f"{SLUG} E3", spread=(decays[:-1] - decays[1:]).amin(0)))  # fmt: skip
    labels = list(seen)
    series = [{"name": f"seed {s}", "y": [float(seen[n][i]) for n in labels]} for i, s in enumerate(config.seeds)]
    data = {"labels": labels, "series": series,
            "y": "worst cosine over pairs of layers"}  # fmt: skip
    return Part(tuple(checks), (Figure("ways to break perfect alignment", data, bars),))


def _broken(config: BreakingConfig, seed: int) -> dict[str, float]:
    rel, draws, g = relation(seed), Ensemble((seed + 1000,)), torch.Generator().manual_seed(seed)
    X = rel.inputs

    def pair(weigh: Callable[[EDLN], list[Tensor]], change: Mapping[str, Tensor] | None = None, both: bool = False) -> float:
        nets = [rel.network(i, w, **(dict(change) if change and (both or i == 1) else {})) for i, w in enumerate(config.widths)]
        return worst_pair([k for net in nets for k in net.kernels(weigh(net))], X)

    def equilibrium(net: EDLN) -> list[Tensor]:
        return net.noise_equilibrium(g)

    def least(value: Callable[[EDLN, list[Tensor]], Tensor]) -> Callable[[EDLN], list[Tensor]]:
        return lambda net: minimise_gauge(equilibrium(net), lambda W: value(net, W), seed, 0.1)

    def norm(W: Sequence[Tensor]) -> Tensor:
        return torch.stack([w.square().sum() for w in W]).sum()

    def decayed(c: float) -> Callable[[EDLN, list[Tensor]], Tensor]:
        return lambda net, W: (
            chain_fluctuation(W, net.chain.inputs, net.chain.noise) / net.chain.fluctuation() + c * norm(W) / norm(equilibrium(net))
        )

    def rated(net: EDLN, W: list[Tensor]) -> Tensor:
        rates = torch.logspace(0, 1, net.depth, base=config.rates, dtype=_F64)
        return (rates * layer_fluctuations(W, net.chain.inputs, net.chain.noise)).sum() / net.chain.fluctuation()

    def preconditioned(net: EDLN, W: list[Tensor]) -> Tensor:
        """E g^T Lam g with a rate for each row: what noise minimises under a diagonal preconditioner, E g_i g_i^T = 4 tr(H_(i-1)) G_i."""
        H, G = signals(W, net.chain.inputs, net.chain.noise)
        rows = [torch.logspace(0, 1, len(b), base=config.rates, dtype=_F64) for b in G]
        return (
            torch.stack([(r * b.diagonal()).sum() * h.trace() for r, b, h in zip(rows, G, H, strict=True)]).sum() / net.chain.fluctuation()
        )

    O1, O2 = rotation(draws, 3), rotation(draws, 3)
    Q = O1 @ _diagonal(2.0, 1.0, 0.3) @ O2
    wild = X + 2 * torch.outer(X[:, 0], X[:, 0]) / X[0, 0]  # E[x_1^2 x x^T] / Var x_1
    return {
        "intact": pair(equilibrium),
        "orthogonal label transform of one side": pair(equilibrium, {"target": O1 @ rel.target, "noise": O1 @ rel.noise @ O1.T}),
        "input-dependent noise on both sides": pair(equilibrium, {"inputs": wild}, both=True),
        "unequal layer rates": pair(least(rated)),
        **{f"decay {c:g}": pair(least(decayed(c))) for c in config.decays},
        "decay only": pair(least(lambda net, W: norm(W) / norm(equilibrium(net)))),
        "random gauge": pair(lambda net: net.random_minimum(g)),
        "label transform of one side": pair(equilibrium, {"target": Q @ rel.target, "noise": Q @ rel.noise @ Q.T}),
        "noise reversed on one side": pair(equilibrium, {"noise": rel.noise.flip(0, 1)}),
        "input-dependent noise on one side": pair(equilibrium, {"inputs": wild}),
        "diagonal preconditioner": pair(least(preconditioned)),
    }


# ------------------------------------------------------------------------------------------------ SGD


@dataclass(frozen=True)
class SGDConfig:
    """Both networks trained by SGD from a random gauge, I + ``gauge`` N(0, 1) / sqrt(width); kernels averaged over replicas at the end.
    The noiseless control starts from that minimum moved by ``kick`` of its size in a random direction, so that it has a way to go."""

    eta: float = 0.003
    steps: int = 60_000
    replicas: int = 20
    gauge: float = 0.5
    kick: float = 0.01
    still_steps: int = 500
    widths: tuple[tuple[int, ...], tuple[int, ...]] = ((4,), (3, 5))
    seeds: tuple[int, ...] = (0, 1, 2)


def sgd(config: SGDConfig) -> Part:
    """E2: SGD aligns every hidden layer of both networks, with one another and with the closed form."""
    names = [f"{'AB'[i]}{k + 1}" for i, w in enumerate(config.widths) for k in range(len(w))]
    before, after, to_theory, still, settled, matrices = [], [], [], [], [], []
    for seed in config.seeds:
        rel, first, last = relation(seed), [], []
        for i, widths in enumerate(config.widths):
            model = rel.network(i, widths, lr=config.eta, gauge=config.gauge)
            start = model.random_minimum(torch.Generator().manual_seed(10 * seed + i))
            run = run_sgd([model], [start], steps=config.steps, replicas=config.replicas, seed=10 * seed + i, read=False)
            first += model.kernels(start)
            last += run.kernels[0]
            change, fell = _full_batch(model, start, config, seed)
            still.append(change)
            settled.append(fell)
        K = rel.network(0, config.widths[0]).platonic_kernel()
        before.append([float(kernel_cosine(a, b, rel.inputs)) for a, b in combinations(first, 2)])
        after.append([float(kernel_cosine(a, b, rel.inputs)) for a, b in combinations(last, 2)])
        to_theory.append([float(kernel_cosine(a, K, rel.inputs)) for a in last])
        matrices.append([[[float(kernel_cosine(a, b, rel.inputs)) for b in side] for a in side] for side in (first, last)])
    began, end, theory = (torch.tensor(v, dtype=_F64) for v in (before, after, to_theory))
    pairs = [f"{a}-{b}" for a, b in combinations(names, 2)]
    checks: list[Check] = [
        holds(f"SGD: cosine of {pair} at the end", end[:, i], at_least=0.98, source=f"{SLUG} E2", spread=end[:, i])
        for i, pair in enumerate(pairs)
    ]
    checks += [
        holds(f"SGD: cosine of {name} with the Platonic kernel at the end", theory[:, i], at_least=0.98, source=f"{SLUG} E2, R4",
              spread=theory[:, i]) for i, name in enumerate(names)
    ]  # fmt: skip
    checks += [
        control("the start, a random gauge: worst cosine over pairs", began.amin(1), at_most=0.95, source=f"{SLUG} E2",
                spread=began.amin(1)),
        control("full-batch descent without noise from near the start: largest change of a cosine with the Platonic kernel", still,
                at_most=0.01, source=f"{SLUG} E3", spread=still),
        holds("the same: its excess loss fell, start over end", settled, at_least=100.0, source=f"{SLUG} E3", spread=settled),
    ]  # fmt: skip
    figures = tuple(
        Figure(f"alignment of hidden layers {when}", {"x": names, "y": names, "z": matrices[0][k], "low": 0.5, "high": 1.0,
               "title": "kernel cosine"}, heatmap, f"Seed {config.seeds[0]}.")
        for k, when in enumerate(("at the start", "after SGD"))
    )  # fmt: skip
    return Part(tuple(checks), figures)


def _full_batch(model: EDLN, start: Sequence[Tensor], config: SGDConfig, seed: int) -> tuple[float, float]:
    """Largest change of the cosines with the Platonic kernel under noiseless descent, and by what factor the excess loss fell."""
    K, X = model.platonic_kernel(), model.inputs
    theta = torch.cat([w.reshape(-1) for w in start])
    begin, end, fell = settle(model.loss, theta, config.kick, config.still_steps, seed + 2000)
    pairs = zip(model.kernels(model.unflatten(begin)), model.kernels(model.unflatten(end)), strict=True)
    return max(abs(float(kernel_cosine(a, K, X) - kernel_cosine(b, K, X))) for a, b in pairs), fell


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    closed: ClosedConfig | None = ClosedConfig()
    breaking: BreakingConfig | None = BreakingConfig()
    sgd: SGDConfig | None = SGDConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Proof of a Perfect Platonic Representation Hypothesis",
    paper="Liu Ziyin, Isaac Chuang, arXiv 2507.01098",
    claims=(
        "Among the global minima of an embedded deep linear network, gradient noise picks one, up to rotation, in closed form.",
        "There every hidden layer of every network has one kernel, whatever its width, depth, view or embedding; SGD gets there.",
        "A random global minimum does not have it; decay, one-sided noise or labels, and non-isometric optimisers break it.",
    ),
    presets={
        "smoke": Config(
            closed=ClosedConfig(widths=((5,), (3, 3))),
            breaking=BreakingConfig(decays=(1.0,)),
            sgd=SGDConfig(still_steps=200, widths=((4,), (3,))),
        ),
        "default": Config(),
        "full": Config(
            closed=ClosedConfig(seeds=tuple(range(9))),
            breaking=BreakingConfig(seeds=tuple(range(6))),
            sgd=SGDConfig(replicas=200, steps=200_000, seeds=tuple(range(6))),
        ),
    },
    experiments={"closed": closed, "breaking": breaking, "sgd": sgd},
)
