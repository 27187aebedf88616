"""Neural Thermodynamics: Entropic Forces in Deep and Universal Representation Learning.

Slug neural-thermodynamics. One stochastic step of size eta is, to next order, gradient flow on the loss plus an effective entropy
S = (eta/4) E|g_B|^2. The entropic force -grad S breaks continuous symmetries, keeps discrete and orthogonal ones, and picks the point of
each orbit where the second moments of the gradient are balanced.

Conventions: the tanh network of thermodynamic-irreversibility (squared error averaged over outputs, no 1/2) for the one-step defect; a ReLU
unit 6-1-3 and the digits under cross-entropy for balance, batches drawn with replacement; deep linear networks with |f - y|^2 summed over
outputs; the rank-one model with (1/2) r^2. Penalties are torch's weight decay gamma (the paper's g is gamma / 2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasym.core.operators import Layout
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import digits
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, settle, slope
from parasym.gallery.thermodynamic_irreversibility import full_batch_gradient, gradient_of, tanh_net
from parasym.laws.backward import corrected, flow
from parasym.laws.charges import Charge, charges, matrix, rescale
from parasym.laws.charges import scale as scale_charge
from parasym.laws.drift import charge_moments
from parasym.laws.entropy import dominance, effective_loss, entropic_force, entropy, equipartition, orbit_slope
from parasym.laws.equilibrium import noise_equilibrium, solve_generator
from parasym.laws.irreversibility import irreversibility
from parasym.measure.gradients import Objective, gradient_moments
from parasym.simulate import Adam, Snapshots, descent, dot, log
from parasym.simulate import Ensemble as Replicas
from parasym.solvable.chains import balance_gap
from parasym.solvable.edln import EDLN, LinearRegressionNetwork, kernel_cosine, sgd_ensemble

SLUG = "neural-thermodynamics"
_F64 = torch.float64


# ------------------------------------------------------------------------------------------------ the entropic loss


@dataclass(frozen=True)
class DefectConfig:
    """Tanh networks, batches of 4; f = -(x + x^3) at x = .7 in one dimension; orders fitted over the last three
    ``rates``."""

    rates: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125, 0.00625)
    one_dimension: tuple[float, ...] = (0.1, 0.05, 0.025)
    parts: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)


def defect(config: DefectConfig) -> Part:
    """E1, R1, R2: the defect of a step is the entropic force; the expansion goes on to the next order."""
    errors, several, halves, gradients = [], [], [], []
    for seed in config.seeds:
        objective, found, _ = tanh_net(seed)
        runs = [irreversibility(objective, found, eta, kinds=("DE",)) for eta in config.rates]
        errors.append([run.error("DE") for run in runs])
        force = entropic_force(objective, found, config.rates[0])
        gradients.append(float((runs[0].layout.flatten(force) - runs[0].reference).norm() / runs[0].reference.norm()))
        halves.append(_orders(objective, found[0], config))
        several.append(_several_steps(objective, found[0], config))
    e, o = torch.tensor(errors, dtype=_F64), torch.tensor(halves, dtype=_F64)
    one, halving = _one_dimension(config), e[:, :-1] / e[:, 1:]
    fall = "(theta_1 - flow_eta(theta)) / eta against -grad S: fall of the error at each halving of eta"
    checks = (
        holds(f"{fall}, at least", halving, at_least=1.7, source=f"{SLUG} E1, R1", spread=halving[:, -1]),
        holds(f"{fall}, at most", halving, at_most=2.2, source=f"{SLUG} E1, R1", spread=halving[:, -1]),
        match("-grad S by a double backward pass against -(eta/2) E H g, relative", 0.0, gradients, 1e-12, source=f"{SLUG} R1"),
        match("network: order of the one-step error of f, with the first and with the second correction", [2.0, 3.0, 4.0] * len(o), o, 0.25,
              source=f"{SLUG} R2", spread=o[:, 0]),
        match("f = -(x + x^3): the same orders", [2.0, 3.0, 4.0], one, 0.2, source=f"{SLUG} R2"),
        match(f"{config.parts} steps of eta / {config.parts} on l + (eta/4)(1 - 1/n)|grad l|^2 against one step: order of the gap", 3.0,
              several, 0.25, source=f"{SLUG} R2", spread=several),
    )  # fmt: skip
    series = [{"name": f"seed {s}", "x": list(config.rates), "y": row.tolist()} for s, row in zip(config.seeds, e, strict=True)]
    data = {"series": series, "x": "learning rate", "y": "relative error", "log": "xy"}
    return Part(checks, (Figure("a step follows the flow on loss plus entropy", data, curves),))


def _order(rates: Sequence[float], errors: Sequence[float]) -> float:
    return float(slope(torch.tensor(rates, dtype=_F64).log(), torch.tensor(errors, dtype=_F64).log()))


def _field(objective: Objective, batch: Any) -> tuple[Any, Tensor]:
    gradient = full_batch_gradient(*batch)
    return (lambda x: -gradient(x)), gradient_of(objective, batch)[1]


def _orders(objective: Objective, batch: Any, config: DefectConfig) -> list[float]:
    field, start = _field(objective, batch)
    out = []
    for order in (0, 1, 2):
        errors = [float((start + eta * field(start) - flow(corrected(field, eta, order), start, eta)).norm()) for eta in config.rates[-3:]]
        out.append(_order(config.rates[-3:], errors))
    return out


def _several_steps(objective: Objective, batch: Any, config: DefectConfig) -> float:
    field, start = _field(objective, batch)
    errors = []
    for eta in config.rates[-3:]:
        small, x = corrected(field, eta, 1, config.parts), start
        for _ in range(config.parts):
            x = x + eta / config.parts * small(x)
        errors.append(float((x - start - eta * field(start)).norm()))
    return _order(config.rates[-3:], errors)


def _one_dimension(config: DefectConfig) -> list[float]:
    start, out = torch.tensor([0.7], dtype=_F64), []
    field = lambda x: -(x + x**3)  # noqa: E731
    for order in (0, 1, 2):
        errors = [
            float((start + eta * field(start) - flow(corrected(field, eta, order), start, eta)).abs()) for eta in config.one_dimension
        ]
        out.append(_order(config.one_dimension, errors))
    return out


# ------------------------------------------------------------------------------------------------ orbits


@dataclass(frozen=True)
class OrbitConfig:
    """ReLU unit 6-1-3 with an inner bias, 64 samples, cross-entropy, batches of one; 21 points lam* +- 1."""

    samples: int = 64
    points: int = 21
    eta: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def orbits(config: OrbitConfig) -> Part:
    """E2, E4, R3: S is convex along an orbit, least at the noise equilibrium; discrete and orthogonal symmetries are kept."""
    rows: dict[str, list[float]] = {k: [] for k in ("convex", "argmin", "flat", "slope", "curve", "rates", "twin", "turned", "broken")}
    figures = []
    for seed in config.seeds:
        model, charge, data = _unit(config, seed)
        found = noise_equilibrium(model, F.cross_entropy, data, [charge], batch_size=1)
        lam, objective = next(iter(found.elements.values())), Objective(model, F.cross_entropy)
        base, grid = dict(objective.params), torch.linspace(-1, 1, config.points, dtype=_F64)
        S, first, second = (
            torch.stack(v) for v in zip(*(_along(objective, charge, base, lam + x, data, config.eta) for x in grid), strict=True)
        )
        rows["convex"].append(float((S[2:] - 2 * S[1:-1] + S[:-2]).min() / S.min()))
        rows["argmin"].append(float(grid[S.argmin()]))
        middle = config.points // 2
        rows["flat"].append(float(first[middle].abs() / S[middle]))
        h = float(grid[1] - grid[0])
        rows["slope"].append(float(((S[2:] - S[:-2]) / (2 * h) - first[1:-1]).abs().max() / first.abs().max()))
        rows["curve"].append(float(((S[2:] - 2 * S[1:-1] + S[:-2]) / h**2 / second[1:-1] - 1).abs().max()))
        rows["rates"].append(_with_rates(objective, charge, base, data))
        rows["twin"].append(_twins(seed))
        kept, lost = _turned(seed)
        rows["turned"].append(kept)
        rows["broken"].append(lost)
        figures.append({"name": f"seed {seed}", "x": grid.tolist(), "y": (S / S.min()).tolist()})
    checks = (
        holds("S along the orbit: smallest second difference over its least value", rows["convex"], at_least=0.0, source=f"{SLUG} E2, R3"),
        match("grid point of the least S - lam* of the solver", 0.0, rows["argmin"], 1e-12, source=f"{SLUG} E2"),
        match("dS/dlam = -(eta/2) tr(A E g g^T) at lam*, over S", 0.0, rows["flat"], 1e-8, source=f"{SLUG} E2, R3"),
        match("the same law against difference quotients along the orbit, relative", 0.0, rows["slope"], 0.02, source=f"{SLUG} R3"),
        match("d2S/dlam2 = eta E g.A^2 g against second differences, relative", 0.0, rows["curve"], 0.02, source=f"{SLUG} R3"),
        match("rates by parameter: dS/dlam = -(1/2) tr(A Lam E g g^T) against the entropic force, relative", 0.0, rows["rates"], 1e-8,
              source=f"{SLUG} R3, R9"),
        match("two equal ReLU units after SGD: largest difference", 0.0, rows["twin"], 1e-12, source=f"{SLUG} E4"),
        match("rotated hidden basis of a linear network: change of S, relative", 0.0, rows["turned"], 1e-12, source=f"{SLUG} E4, R3"),
        control("the same under a diagonal Lam: change of S, relative", rows["broken"], at_least=1e-4, source=f"{SLUG} E4, R3"),
    )  # fmt: skip
    data_ = {"series": figures, "x": "lam - lam*", "y": "S over its least value"}
    return Part(checks, (Figure("effective entropy along an orbit", data_, curves, "Convex, least where the solver says."),))


def _unit(config: OrbitConfig, seed: int) -> tuple[nn.Module, Charge, tuple[Tensor, Tensor]]:
    draws = Ensemble((seed,))
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draws.normal(*p.shape)[0] / (6 if p.shape[-1] == 6 else 1) ** 0.5)
        model[0].bias.fill_(0.5)  # type: ignore[operator, union-attr]
    data = draws.normal(config.samples, 6)[0], draws.integers(3, config.samples)[0]
    return model, rescale(dict(model.named_parameters()), ["0.weight", "0.bias"], ["2.weight"]), data


def _along(
    objective: Objective, charge: Charge, base: Mapping[str, Tensor], lam: Tensor, data: Any, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """S, dS/dlam and d2S/dlam2 at a point of the orbit, from per-sample gradients."""
    objective.params.update(charge.act(base, lam))
    moments, gradient = charge_moments(objective, data, [charge])
    value = entropy(gradient, eta, 1)
    square = gradient_moments(objective, data, forms={"A2": lambda g: charge.form(g, g, power=2)}).forms["A2"][0]
    objective.params.update(base)
    first = orbit_slope(moments[0], gradient.factor(1), eta).value
    return torch.tensor(value.mean + float(value.noise), dtype=_F64), cast(Tensor, first)[0], eta * square[0]


def _with_rates(objective: Objective, charge: Charge, base: Mapping[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
    """A rate for each side of the unit: the slope from second moments against the double backward pass, one sample a batch."""
    rate = {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.03, "2.bias": 0.05}
    singles = [(data[0][i : i + 1], data[1][i : i + 1]) for i in range(len(data[0]))]
    force = entropic_force(objective, singles, rate)
    along = -charge.form(base, force)
    second = gradient_moments(objective, data).square
    roots = {n: (rate[n] * s).sqrt() for n, s in second.items()}
    expected = -0.5 * charge.form(roots, roots)
    return float(((along - expected) / expected).abs().max())


def _twins(seed: int) -> float:
    """SGD on a ReLU network with two equal units."""
    draws = Ensemble((seed + 10,))
    first, last = nn.Linear(5, 4), nn.Linear(4, 3)
    model = nn.Sequential(first, nn.ReLU(), last).double()
    X, y = draws.normal(64, 5)[0], draws.integers(3, 64)[0]
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draws.normal(*p.shape)[0] / 2)
        for part, axis in ((first.weight, 0), (first.bias, 0), (last.weight, 1)):
            part.select(axis, 1).copy_(part.select(axis, 0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(300):
        index = draws.integers(64, 2)[0]
        optimizer.zero_grad()
        F.cross_entropy(model(X[index]), y[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    W, U = first.weight.detach(), last.weight.detach()
    return float(torch.maximum((W[0] - W[1]).abs().max(), (U[:, 0] - U[:, 1]).abs().max()))


def _turned(seed: int) -> tuple[float, float]:
    """Relative change of S of a linear network 3-4-2 when its hidden basis is rotated: one rate, and a rate for each entry."""
    draws = Ensemble((seed + 20,))
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    data = draws.normal(50, 3)[0], draws.normal(50, 2)[0]
    W, U, Q = draws.normal(4, 3)[0], draws.normal(2, 4)[0], torch.linalg.qr(draws.normal(4, 4)[0]).Q
    rate = {"0.weight": draws.uniform(4, 3)[0] + 0.1, "1.weight": draws.uniform(2, 4)[0] + 0.1}
    objective, values = Objective(model, lambda a, b: (a - b).square().sum(-1).mean()), []
    for w, u in ((W, U), (Q @ W, U @ Q.T)):
        objective.params.update({"0.weight": w, "1.weight": u})
        moments = gradient_moments(objective, data)
        values.append([e.mean + float(e.noise) for e in (entropy(moments, 0.1, 4), entropy(moments, rate, 4))])
    before, after = torch.tensor(values, dtype=_F64)
    change = (after / before - 1).abs()
    return float(change[0]), float(change[1])


# ------------------------------------------------------------------------------------------------ balance


@dataclass(frozen=True)
class BalanceConfig:
    """Two-layer linear regression as in flatness-or-sharpness E1 at kappa 10, from a random gauge, at a fifth of its rate, since the gap of
    a single run fluctuates by the root of the rate; solved models: a ReLU network 8-7-6-4
    without biases, a linear pair, a self-attention block of width 6 with two heads, and scale-invariant logistic regression with decay.
    """

    eta: float = 0.001
    steps: int = 2_000_000
    replicas: int = 20
    gauge: float = 0.4
    kick: float = 0.02
    still: int = 500
    samples: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)


class Attention(nn.Module):
    """Two-head self-attention with biases, pooled and read out."""

    def __init__(self, d: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.u = (nn.Linear(d, d) for _ in range(5))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (m(x).view(b, t, self.heads, d // self.heads).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = (q @ k.mT / (d // self.heads) ** 0.5).softmax(-1)
        out: Tensor = self.u((x + self.o((a @ v).transpose(1, 2).reshape(b, t, d))).mean(1))
        return out


def balance(config: BalanceConfig) -> Part:
    """E3, R4, R5, R6: at the noise equilibrium the second moments are balanced, whatever the kind of symmetry; SGD gets there."""
    fall, still, settled, table, kernels = [], [], [], dict[str, list[float]](), []
    for seed in config.seeds:
        before, after, changed, fell = _trained(config, seed)
        fall.append(before / after)
        still.append(abs(changed))
        settled.append(fell)
        for name, value in {**_solved(config, seed), **_scale(seed)}.items():
            table.setdefault(name, []).append(value)
        kernels.append(_universal(seed))
    checks: list[Check] = [
        holds("linear pair under SGD: relative gap of the two matrices, start over end", fall, at_least=5.0, source=f"{SLUG} E3, R5c",
              spread=fall),
        control("full-batch descent without noise from near the start: relative change of the gap", still, at_most=0.05,
                source=f"{SLUG} E3", spread=still),
        holds("the same: its excess loss fell, start over end", settled, at_least=100.0, source=f"{SLUG} E3", spread=settled),
    ]  # fmt: skip
    words = {
        "unit": ("ReLU units at the equilibrium: largest imbalance of sum_in E g^2 and sum_out E g^2", "R5a"),
        "layer": ("layers of the homogeneous network: largest relative difference of E|g_i|^2", "R5b"),
        "decay": ("with decay: largest relative gap of eta E|g_i|^2 - 2 gamma |W_i|^2 between layers", "R5b, R4"),
        "pair": ("linear pair: relative gap of E grad_U^T grad_U and E grad_W grad_W^T", "R5c"),
        "attention": ("query-key and value-output of every head: relative gap of the matrices", "R5d"),
        "scale": ("scale-invariant weights with decay: gap of gamma |w|^2 and (eta/2) E|g|^2, relative", "R5e"),
    }
    checks += [match(text, 0.0, table[k], 1e-8, source=f"{SLUG} {ref}", spread=table[k]) for k, (text, ref) in words.items()]
    checks += [
        control("the same units before: largest imbalance", table["unit before"], at_least=0.1, source=f"{SLUG} R5a"),
        control("scale-invariant weights without decay: balanced points found", table["alone"], at_most=0.0, source=f"{SLUG} R5e"),
        match("hidden layers of embedded linear networks of widths (4,), (3, 5): smallest kernel cosine", 1.0, kernels, 1e-9,
              source=f"{SLUG} R6"),
    ]  # fmt: skip
    return Part(tuple(checks))


def _regression(config: BalanceConfig, seed: int) -> LinearRegressionNetwork:
    draws = Ensemble((seed,))
    V = torch.diag(torch.tensor([1.0, 0.8, 0.6], dtype=_F64)) @ torch.linalg.qr(draws.normal(3, 3)[0]).Q
    noise = torch.diag(torch.logspace(0, -1, 3, dtype=_F64))
    X = torch.diag(torch.tensor([1.0, 0.7, 0.5], dtype=_F64))
    return LinearRegressionNetwork(V, X, 3 * noise / noise.trace(), (4,), lr=config.eta, gauge=config.gauge)


def _trained(config: BalanceConfig, seed: int) -> tuple[float, float, float, float]:
    """Relative gap of E grad_U^T grad_U and E grad_W grad_W^T: at the start, after SGD (mean over replicas);
    its relative change in noiseless descent from near the start, and by what factor the excess loss fell there."""
    model = _regression(config, seed)
    c, start = model.chain, model.random_minimum(torch.Generator().manual_seed(seed))
    theta = torch.cat([w.reshape(-1) for w in start])
    run = sgd_ensemble([model], config.replicas, seed).run(config.steps, start=theta)
    if run.diverged:
        return math.nan, math.nan, math.nan, math.nan
    end = balance_gap(model.unflatten(run.final.reshape(config.replicas, -1)), c.inputs, c.noise).mean()
    moved, x, fell = settle(model.loss, theta, config.kick, config.still, seed + 90)
    gaps = [float(balance_gap(W, c.inputs, c.noise)) for W in (start, model.unflatten(moved), model.unflatten(x))]
    return gaps[0], float(end), gaps[2] / gaps[1] - 1, fell


def _solved(config: BalanceConfig, seed: int) -> dict[str, float]:
    """Balance left at the equilibrium the solver finds, measured again from scratch."""
    draws, out = Ensemble((seed + 30,)), dict[str, float]()
    relu = nn.Sequential(nn.Linear(8, 7, False), nn.ReLU(), nn.Linear(7, 6, False), nn.ReLU(), nn.Linear(6, 4, False)).double()
    _drawn(relu, draws, 1.5)
    data = draws.normal(config.samples, 8)[0], draws.integers(4, config.samples)[0]
    P = dict(relu.named_parameters())
    units = [rescale(P, ["0.weight"], ["2.weight"], "first"), rescale(P, ["2.weight"], ["4.weight"], "second")]
    out["unit before"] = equipartition(Objective(relu, F.cross_entropy), data, units, lr=0.1, batch_size=4).worst
    for name, decay in (("layer", 0.0), ("decay", 0.01)):
        moved = copy.deepcopy(relu)
        noise_equilibrium(moved, F.cross_entropy, data, units, batch_size=4, lr=0.1, weight_decay=decay).apply(moved)
        found = equipartition(Objective(moved, F.cross_entropy), data, units, lr=0.1, batch_size=4, weight_decay=decay)
        net = torch.tensor(list(found.layers.values()), dtype=_F64)
        energy = equipartition(Objective(moved, F.cross_entropy), data, units, lr=0.1, batch_size=4).layers
        out[name] = float((net.max() - net.min()) / max(energy.values()))
        if name == "layer":
            out["unit"] = found.worst
    mse = lambda a, b: (a - b).square().sum(-1).mean()  # noqa: E731
    pair = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    _drawn(pair, draws, 1.0)
    regression = draws.normal(config.samples, 5)[0], draws.normal(config.samples, 4)[0]
    charge = matrix(dict(pair.named_parameters()), [("0.weight", 0)], [("1.weight", 1)])
    noise_equilibrium(pair, mse, regression, [charge], batch_size=4).apply(pair)
    out["pair"] = equipartition(Objective(pair, mse), regression, [charge], lr=0.1, batch_size=4).worst
    block = Attention().double()
    _drawn(block, draws, 1.5)
    tokens = draws.normal(config.samples, 4, 6)[0], draws.integers(6, config.samples)[0]
    heads = attention_charges(block)
    noise_equilibrium(block, F.cross_entropy, tokens, heads, batch_size=4, passes=40, tol=1e-10).apply(block)
    out["attention"] = equipartition(Objective(block, F.cross_entropy), tokens, heads, lr=0.1, batch_size=4).worst
    return out


def attention_charges(block: nn.Module) -> list[Charge]:
    """The matrix charges that the library finds on the block: query-key and value-output of every head."""
    found = charges(block, (torch.randn(4, 4, 6, dtype=_F64, generator=torch.Generator().manual_seed(0)),))
    return [c for c in found if c.kind == "matrix"]


def _drawn(model: nn.Module, draws: Ensemble, gain: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(gain * draws.normal(*p.shape)[0] / (p.shape[1] if p.ndim > 1 else p.shape[0]) ** 0.5)


def _scale(seed: int, eta: float = 0.05, gamma: float = 0.02) -> dict[str, float]:
    """f(w) = mean softplus(-3 y x.w / |w|): the root with decay, and none without."""
    draws = Ensemble((seed + 40,))
    x, w = draws.normal(100, 5)[0], draws.normal(5)[0]
    y = (x @ draws.normal(5)[0] + 0.5 * draws.normal(100)[0]).sign()

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(w.clone()[:, None])

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.w / self.w.norm())

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-3 * y * out[:, 0]).mean()

    model = Unit()
    charge = scale_charge({"w": model.w}, [("w", 1)])
    alone = noise_equilibrium(model, loss, (x, y), [charge], batch_size=1)
    noise_equilibrium(model, loss, (x, y), [charge], batch_size=1, lr=eta, weight_decay=gamma).apply(model)
    moments = gradient_moments(Objective(model, loss), (x, y))
    energy, size = float(moments.second(1)["w"].sum()), float(model.w.detach().square().sum())
    return {"scale": abs(gamma * size / (eta / 2 * energy) - 1), "alone": float(not alone.no_root)}


def _universal(seed: int) -> float:
    draws, g = Ensemble((seed + 60,)), torch.Generator().manual_seed(seed)
    V, X = draws.normal(3, 3)[0], torch.diag(torch.tensor([1.0, 0.7, 0.5], dtype=_F64))
    noise = torch.diag(torch.tensor([1.0, 0.4, 0.15], dtype=_F64))
    nets = [EDLN(V, X, noise, w, draws.normal(3, 3)[0], draws.normal(3, 3)[0]) for w in ((4,), (3, 5))]
    kernels = [k for net in nets for k in net.kernels(net.noise_equilibrium(g))]
    return min(float(kernel_cosine(a, b, X)) for a in kernels for b in kernels)


# ------------------------------------------------------------------------------------------------ sharpness, other rules, a real network


@dataclass(frozen=True)
class RulesConfig:
    """Isotropic label noise; rank-one model f = w (u.x), x ~ N(0, I_d), y = u*.x + noise, loss r^2 / 2, under RMSprop (beta1 = 0, eps 1e-8)
    from |u|^2 / w^2 = ``starts``: ratio of medians over replicas, second half of the run."""

    dim: int = 3
    eta: float = 8e-3
    beta2: float = 0.9999
    fast: float = 0.99
    starts: tuple[float, ...] = (5.0, 14.0)
    steps: int = 150_000
    replicas: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)


def rules(config: RulesConfig) -> Part:
    """R7, R9: with isotropic label noise S is the sharpness; a slow adaptive rule balances root mean squares instead."""
    sharp, coherent, noisy = [], [], []
    for seed in config.seeds:
        draws = Ensemble((seed,))
        s2 = 0.3 + float(draws.uniform(1)[0])
        model = EDLN(draws.normal(2, 3)[0], torch.eye(3, dtype=_F64), s2 * torch.eye(2, dtype=_F64), (4, 3))
        gap, net, data = _isotropic(model, s2, seed)
        sharp.append(gap)
        moments = gradient_moments(Objective(net, lambda a, b: (a - b).square().sum(-1).mean()), (data[0], data[1] + 0.5))
        plain, heavy = entropy(moments, 0.1, 4), entropy(moments, 0.1, 4, momentum=0.8)
        coherent.append(heavy.mean / plain.mean)
        noisy.append(float(heavy.noise) / float(plain.noise))
    slow, fast = (_rmsprop(config, b, s) for b, s in ((config.beta2, config.steps), (config.fast, config.steps // 2)))
    d = config.dim
    lam = solve_generator(0.5 * torch.tensor([1.0] * d + [-1.0], dtype=_F64), torch.ones(d + 1, dtype=_F64)).value  # from |u| = |w| = 1
    predicted = math.exp(4 * lam)
    checks = (
        match("isotropic label noise: (1/4) E|g|^2 over (s2/2) tr H - 1 at a global minimum", 0.0, sharp, 1e-9, source=f"{SLUG} R7"),
        match("momentum .8: mean part of S over that of SGD, (1 + mu) / (1 - mu)^2", 1.8 / 0.2**2, coherent, 1e-9, relative=True,
              source=f"{SLUG} R9"),
        match("momentum .8: noise part of S over that of SGD, 1 / (1 - mu)", 5.0, noisy, 1e-9, relative=True, source=f"{SLUG} R9"),
        match(f"RMSprop, beta2 {config.beta2}: |u|^2 / w^2 from {config.starts}, against the l1 balance d^2", predicted, slow, 0.08,
              relative=True, source=f"{SLUG} R9", spread=slow),
        control(f"RMSprop, beta2 {config.fast}: it follows the noise and the ratio leaves d^2", fast, at_least=1.3 * predicted,
                source=f"{SLUG} R9", spread=fast),
    )  # fmt: skip
    return Part(checks)


def _isotropic(model: EDLN, s2: float, seed: int, count: int = 40) -> tuple[float, nn.Module, tuple[Tensor, Tensor]]:
    """(1/4) E|g|^2 over (s2/2) tr H - 1 at a random global minimum, both by automatic differentiation on samples whose moments are exact:
    every pair of ``count`` inputs and ``count`` label noises. The network and the samples too."""
    draws = Ensemble((seed + 80,))
    parts = []
    for n, size in ((3, 1.0), (2, s2)):
        raw = draws.normal(count, n)[0]
        parts.append(torch.linalg.qr(raw - raw.mean(0)).Q * (count * size) ** 0.5)  # mean 0, covariance size x 1
    x, e = parts
    net = model.module(model.random_minimum(torch.Generator().manual_seed(seed)))
    loss = lambda a, b: (a - b).square().sum(-1).mean()  # noqa: E731
    data = x.repeat_interleave(count, 0), (x @ model.target.T).repeat_interleave(count, 0) + e.repeat(count, 1)
    objective = Objective(net, loss)
    layout = Layout.of(objective.params)
    H = torch.func.hessian(lambda t: objective(layout.unflatten(t), data))(layout.flatten(objective.params))
    fluctuation = float(gradient_moments(objective, data).norms.mean())
    return fluctuation / 4 / (s2 / 2 * float(H.trace())) - 1, net, data


def _rmsprop(config: RulesConfig, beta2: float, steps: int) -> Tensor:
    """(starts, seeds): median over replicas of the ratio, averaged over the second half."""
    d, unit = config.dim, config.dim**-0.5

    def gradient(w: Any, p: Any, draws: Any) -> Any:
        x, u, v = draws.normals(d), w[:d], w[d]
        across = dot(u, x)
        r = v * across - unit * dot([1.0] * d, x) - draws.normal()
        return [*(r * v * a for a in x), r * across]

    times = tuple(steps // 2 + k * (steps // 2) // 20 for k in range(20))
    rows = []
    for ratio in config.starts:
        size = ratio**-0.25
        start = [unit / size] * d + [size]
        system = descent("rank one", gradient, Adam(), start)
        row = []
        for seed in config.seeds:
            run = Replicas(system, config.replicas, {"lr": config.eta, "beta1": 0.0, "beta2": beta2, "eps": 1e-8}, seed)
            found = run.run(times[-1] + 1, [Snapshots(times, lambda s, p: [_log_ratio(s, d)])])
            row.append(cast(Tensor, found[0].value)[:, 0].mean().exp())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _log_ratio(s: Any, d: int) -> Any:
    return log(dot(s[:d], s[:d])) - log(s[d] * s[d])


@dataclass(frozen=True)
class NetworkConfig:
    """Digits 64-32-10, ReLU, SGD with replacement, batches of ``batch``, cross-entropy; S by layer and |grad S| / |grad L|."""

    eta: float = 0.1
    batch: int = 8
    steps: int = 3000
    points: int = 4
    probes: int = 150
    seeds: tuple[int, ...] = (0, 1, 2)


def network(config: NetworkConfig) -> Part:
    """R1, R8: S of a real network, from per-sample gradients and from batches; the entropic force gains on the loss."""
    split = digits()
    X, y = split.x.double(), split.y
    z, first, last, layers, shares = [], [], [], [], []
    for seed in config.seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
        optimizer, g = torch.optim.SGD(model.parameters(), config.eta), torch.Generator().manual_seed(seed)
        row, sizes = [], []
        for k in range(config.steps + 1):
            if k % (config.steps // config.points) == 0:
                found = effective_loss(model, F.cross_entropy, (X, y), optimizer, batch_size=config.batch)
                row.append([found.parts["0.weight"], found.parts["2.weight"]])
                probe = [torch.randint(len(X), (config.batch,), generator=g) for _ in range(config.probes)]
                pieces = [(X[i], y[i]) for i in probe]
                sizes.append(float(dominance(Objective(model, F.cross_entropy), pieces, config.eta)))
                shares.append((found.mean + float(found.noise)) / found.loss)
                if k == 0:
                    z.append(_batch_score(model, pieces, found.mean + float(found.noise), config.eta))
            index = torch.randint(len(X), (config.batch,), generator=g)
            optimizer.zero_grad()
            F.cross_entropy(model(X[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        layers.append(row)
        first.append(sizes[0])
        last.append(sizes[-1])
    gain = torch.tensor(last, dtype=_F64) / torch.tensor(first, dtype=_F64)
    checks = (
        match("S from per-sample gradients against (eta/4) |g_B|^2 of batches at the start: z", 0.0, z, 4.0, source=f"{SLUG} R1", spread=z),
        holds("|grad S| / |grad L| after training over that at the start", gain, at_least=2.0, source=f"{SLUG} R8", spread=gain),
        control("|grad S| / |grad L| at the start", first, at_most=1.0, source=f"{SLUG} R8", spread=first),
    )  # fmt: skip
    S = torch.tensor(layers, dtype=_F64)
    times = [config.steps * k // config.points for k in range(S.shape[1])]
    series = [{"name": f"layer {i + 1}", "x": times, "y": S[:, :, i].mean(0).tolist(), "low": S[:, :, i].amin(0).tolist(),
               "high": S[:, :, i].amax(0).tolist()} for i in range(2)]  # fmt: skip
    data = {"series": series, "x": "step", "y": "effective entropy", "log": "y"}
    return Part(checks, (Figure("effective entropy by layer along training", data, curves, "Band: spread of the seeds."),))


def _batch_score(model: nn.Module, pieces: Sequence[tuple[Tensor, Tensor]], predicted: float, eta: float) -> float:
    values = []
    for x, y in pieces:
        gs = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        values.append(eta / 4 * sum(float(g.square().sum()) for g in gs))
    seen = torch.tensor(values, dtype=_F64)
    return float((seen.mean() - predicted) / (seen.std() / len(seen) ** 0.5))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    defect: DefectConfig | None = DefectConfig()
    orbits: OrbitConfig | None = OrbitConfig()
    balance: BalanceConfig | None = BalanceConfig()
    rules: RulesConfig | None = RulesConfig()
    network: NetworkConfig | None = NetworkConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Neural Thermodynamics: Entropic Forces in Deep and Universal Representation Learning",
    paper="Liu Ziyin, Yizhou Xu, Isaac Chuang, NeurIPS 2025, arXiv 2505.12387",
    claims=(
        "One noisy step is the flow on the loss plus an effective entropy, the mean square of the batch gradient.",
        "It is convex along every orbit of a continuous symmetry, and indifferent to rotations and permutations.",
        "Where its force vanishes second moments of the gradient are balanced: units, layers, linear pairs, heads.",
        "With isotropic label noise it is the sharpness; an adaptive rule has another balance.",
    ),
    presets={
        "smoke": Config(
            defect=DefectConfig(rates=(0.0125, 0.00625)),
            orbits=OrbitConfig(points=11),
            balance=BalanceConfig(samples=60, steps=500_000),
            rules=None,
            network=NetworkConfig(steps=600, points=2, probes=60),
        ),
        "default": Config(),
        "full": Config(
            defect=DefectConfig(seeds=tuple(range(9))),
            orbits=OrbitConfig(seeds=tuple(range(9))),
            balance=BalanceConfig(seeds=tuple(range(5))),
            rules=RulesConfig(replicas=1000),
            network=NetworkConfig(steps=30_000, points=20, seeds=tuple(range(5))),
        ),
    },
    experiments={"defect": defect, "orbits": orbits, "balance": balance, "rules": rules, "network": network},
)
