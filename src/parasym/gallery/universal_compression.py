"""A universal compression theory: lottery ticket hypothesis and superpolynomial scaling laws.

Slug universal-compression. Networks are in mean-field form f = sum_i w_i v_i tanh(u_i x + b_i), w_i = 1/N for the whole one, and every
object moves by -(eta / w_i) dL/dtheta_i, so that eta does not depend on the width; L = mse / 2. Data sets: L = mse with weights that
sum to 1 (ridge: plus 1e-6 |beta|^2). Objects are scaled to [-1, 1] before moments are taken; an error of a mean has weights of sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.drawings import curves
from parasym.laws.compression import cell_exponent, compression_bound, fixed_share_exponent, monomial_count, order_for_size
from parasym.methods.moments import Objects, compress_dataset, compress_objects, monomials, scaled

SLUG = "universal-compression"


def _stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(stream: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=stream, dtype=torch.float64)


def _uniform(stream: torch.Generator, *shape: int) -> Tensor:
    """U(-1, 1)."""
    return 2 * torch.rand(shape, generator=stream, dtype=torch.float64) - 1


# ------------------------------------------------------------------------------------------------ A1: exact moments


@dataclass(frozen=True)
class ExactConfig:
    """``objects`` Gaussian points in 1 to 3 dimensions; the raw control: 10 +- 3, two dimensions, order 8."""

    objects: int = 4000
    orders: tuple[int, ...] = (2, 4, 8, 10)
    dims: tuple[int, ...] = (1, 2, 3)
    raw_order: int = 8
    adversaries: tuple[int, ...] = (3, 5, 7, 9, 11)
    seeds: tuple[int, ...] = (0, 1, 2)


def exact(config: ExactConfig) -> Part:
    """A1, R0, R1, R2: C(m + k, k) of the objects have all moments up to order k; scaling and QR make it exact in double precision."""
    size, count, error, least, raw, power = ([] for _ in range(6))  # type: ignore[var-annotated]
    series = []
    for seed in config.seeds:
        stream = _stream(seed)
        for m in config.dims:
            z = _normal(stream, config.objects, m)
            found = [compress_objects(z, order=k) for k in config.orders]
            size += [len(f.index) for f in found]
            count += [monomial_count(m, k) for k in config.orders]
            error += [float(f.moment_error) for f in found]
            least += [float(f.weights.min()) for f in found]
        z = 10 + 3 * _normal(stream, min(1000, config.objects), 2)
        w = torch.full((len(z),), 1 / len(z), dtype=torch.float64)
        index, weights = by_singular_vectors(monomials(z, config.raw_order), w)
        A = monomials(scaled(z), config.raw_order)
        raw.append(float((weights @ A[index] - A.mean(0)).abs().max()))
        x = _uniform(stream, config.objects, 1)
        missed = []
        for kept in config.adversaries:
            chosen = compress_objects(x, order=kept - 1)
            g = (x - x[chosen.index].T).square().prod(1)  # zero on all that is kept
            missed.append(float(g.mean() / g.max()))
        power += [math.log(e) + kept for e, kept in zip(missed, config.adversaries, strict=True)]
        series.append({"name": f"seed {seed}", "x": list(config.adversaries), "y": missed})
    checks = (
        match("number of objects kept = C(m + k, k)", count, size, 0.0, source=f"{SLUG} A1, R1"),
        match("moments up to order k, scaled objects: largest difference", 0.0, error, 1e-13, source=f"{SLUG} A1, R2"),
        holds("smallest weight", least, at_least=1e-12, source=f"{SLUG} A1"),
        control("raw monomials, no scaling, no QR: moment error", raw, at_least=1e-11, source=f"{SLUG} A1", spread=raw),
        control(
            "no subset of d' serves every function: log error of q^2, q zero on the subset, plus d'",
            power,
            at_least=0.0,
            source=f"{SLUG} R0 (Theorem 6)",
        ),
    )
    data = {"series": series, "x": "objects kept", "y": "error of the worst polynomial", "log": "y"}
    return Part(checks, (Figure("What a subset must miss", data, curves),))


def by_singular_vectors(A: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The naive algorithm: the last right singular vectors of raw monomials, block by block, one object after the other.

    The library's own (an orthogonal complement by Householder reflections, accurate column by column) is immune to bad scaling.
    """
    alive, weight, q = torch.arange(len(A)), w.clone(), A.shape[1]
    while len(alive) > q:
        block = alive[: 2 * q]
        null = torch.linalg.svd(A[block].T, full_matrices=True).Vh[q:].clone()
        left = torch.ones(len(block), dtype=torch.bool)
        for k in range(len(null)):
            v = null[k] if float(null[k].max()) > 0 else -null[k]
            ratio = torch.where(left & (v > 1e-14), weight[block] / v.clamp(min=1e-300), torch.inf)
            j = int(ratio.argmin())
            weight[block] = (weight[block] - ratio[j] * v).clamp(min=0)
            weight[block[j]], left[j] = 0, False
            null[k + 1 :] -= null[k + 1 :, j : j + 1] / v[j] * v
        alive = torch.cat([alive[2 * q :], block[left]])
    return alive, weight[alive]


# ------------------------------------------------------------------------------------------------ A2: networks and their training


@dataclass(frozen=True)
class NetworkConfig:
    """1000 neurons (u, b, v) ~ N(0, (1, .5, 1)) clipped at 2.5, y = sin 2x on 40 points of [-2, 2]; ``orders`` 2, 4 keep 10, 35."""

    neurons: int = 1000
    samples: int = 40
    orders: tuple[int, ...] = (2, 4, 6, 8)
    demanded: tuple[int, ...] = (4, 8)
    eta: float = 0.5
    steps: int = 400
    adam: float = 0.02
    eps: tuple[float, float] = (0.1, 1e-8)
    adam_seeds: tuple[int, ...] = (20, 21, 22, 23, 24)
    subsets: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Rule:
    """How an object moves, given the gradient of L and its weight."""

    eta: float
    kind: str = "descent"  # "momentum", "adam"
    divide: bool = True
    eps: float = 1e-300


def trajectory(theta: Tensor, w: Tensor, x: Tensor, y: Tensor, rule: Rule, steps: int) -> Tensor:
    """(steps + 1, samples) outputs along training; theta (n, 3) holds u, b, v and w (n,) the frozen weights."""
    theta, first, second, out = theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta), []
    for t in range(1, steps + 2):
        u, b, v = theta.unbind(1)
        h = torch.tanh(u[:, None] * x + b[:, None])
        f = (w * v) @ h
        out.append(f)
        r = (f - y) / len(x)
        slope = (1 - h.square()) * (w * v)[:, None]
        g = torch.stack([slope @ (r * x), slope @ r, w * (h @ r)], 1)
        if rule.divide:
            g = g / w[:, None]
        if rule.kind == "adam":
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
            g = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + rule.eps)
        elif rule.kind == "momentum":
            first = 0.9 * first + g
            g = first
        theta = theta - rule.eta * g
    return torch.stack(out)


def network(config: NetworkConfig) -> Part:
    """A2, R5: a compressed net follows the whole one through training, under any smooth rule that treats its objects alike.

    Adam with a tiny eps is close to a sign rule, which is not smooth in the objects: with torch's own 1e-8 the compressed net follows less
    well (.27 to .99 of the gap of random subsets over seeds 20 to 29; .13 to .34 at eps .1), so that the paper's claim for Adam is entered
    as refuted there. eps .1 had been chosen on seeds 0 to 2, so both are run on ``adam_seeds``, which were not looked at before.
    """
    x = torch.linspace(-2, 2, config.samples, dtype=torch.float64)
    y = torch.sin(2 * x)
    descent = Rule(config.eta)
    gaps: dict[int, list[float]] = {k: [] for k in config.orders}
    random: dict[int, list[float]] = {k: [] for k in config.orders}
    uniform: dict[int, list[float]] = {k: [] for k in config.orders}
    folded, momentum, cancels, learned = [], [], [], []
    for seed in config.seeds:
        stream = _stream(seed)
        theta, even = _neurons(config, stream)
        n = config.neurons

        def run(at: Tensor, w: Tensor, rule: Rule, theta: Tensor = theta) -> Tensor:
            return trajectory(theta[at], w, x, y, rule, config.steps)

        every = torch.arange(n)
        whole = run(every, even, descent)
        learned.append(float((whole[-1] - y).square().mean() / (whole[0] - y).square().mean()))
        for k in config.orders:
            kept = compress_objects(theta, even, order=k)
            s = len(kept.index)
            gaps[k].append(_gap(run(kept.index, kept.weights, descent), whole))
            flat = torch.full((s,), 1 / s, dtype=torch.float64)
            uniform[k].append(_gap(run(kept.index, flat, descent), whole))
            drawn = [torch.randperm(n, generator=stream)[:s] for _ in range(config.subsets)]
            random[k].append(sum(_gap(run(at, flat, descent), whole) for at in drawn) / config.subsets)
            if k == max(config.orders):
                stored = theta.clone()
                stored[kept.index, 2] *= kept.weights * s  # the weight inside v, equal weights outside
                folded.append(_gap(trajectory(stored[kept.index], flat, x, y, descent, config.steps), whole))
                pushed = Rule(config.eta / 10, "momentum")
                momentum.append(_against(run, kept, drawn, flat, pushed, run(every, even, pushed)))
                adaptive = Rule(config.adam, "adam")
                ours = run(kept.index, kept.weights, adaptive)
                cancels.append(_gap(run(kept.index, kept.weights, Rule(config.adam, "adam", divide=False)), ours))
    top = max(config.orders)
    ratios = [a / b for k in config.demanded for a, b in zip(gaps[k], random[k], strict=True)]
    checks = (
        holds(
            "largest gap along training over the mean of random subsets of the same size",
            ratios,
            at_most=0.6,
            source=f"{SLUG} A2",
            spread=ratios,
        ),
        holds(
            "the gap falls with the order: first over last, every seed",
            [a / b for a, b in zip(gaps[config.orders[0]], gaps[top], strict=True)],
            at_least=3.0,
            source=f"{SLUG} A2",
        ),
        control(
            "the same support with equal weights: gap over ours",
            [a / b for a, b in zip(uniform[top], gaps[top], strict=True)],
            at_least=2.0,
            source=f"{SLUG} A2",
            spread=uniform[top],
        ),
        control(
            "weights folded into v: gap over ours",
            [a / b for a, b in zip(folded, gaps[top], strict=True)],
            at_least=2.0,
            source=f"{SLUG} R5",
            spread=folded,
        ),
        holds("heavy ball: gap over that of random subsets", momentum, at_most=0.6, source=f"{SLUG} R5", spread=momentum),
        match("as eps goes to 0 the factor 1/w cancels under Adam: largest difference", 0.0, cancels, 1e-6, source=f"{SLUG} R5"),
        holds("the task is learned: loss at the end over start", learned, at_most=0.05, source=f"{SLUG} A2"),
        *_adam_checks(config, x, y),
    )
    sizes = [monomial_count(3, k) for k in config.orders]
    series = [
        {"name": name, "x": sizes, "y": [sum(v) / len(v) for v in table.values()], "low": [min(v) for v in table.values()],
         "high": [max(v) for v in table.values()]}
        for name, table in (("compressed", gaps), ("same support, equal weights", uniform), ("random subset", random))
    ]  # fmt: skip
    data = {"series": series, "x": "neurons kept of 1000", "y": "largest gap of outputs", "log": "xy"}
    return Part(checks, (Figure("Training of compressed networks", data, curves),))


def _neurons(config: NetworkConfig, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """The neurons (n, 3) of a seed, and their equal weights (n,)."""
    scale = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    theta = (_normal(stream, config.neurons, 3) * scale).clamp(-2.5, 2.5)
    return theta, torch.full((config.neurons,), 1 / config.neurons, dtype=torch.float64)


def _adam_checks(config: NetworkConfig, x: Tensor, y: Tensor) -> list[Check]:
    if not config.adam_seeds:
        return []
    smooth, plain_adam = (_under_adam(config, x, y, eps) for eps in config.eps)
    claim = "gap over that of random subsets"
    return [
        holds(f"Adam, eps {config.eps[0]:g}, a smooth rule: {claim}", smooth, at_most=0.6, source=f"{SLUG} R5", spread=smooth),
        refuted(f"Adam, eps {config.eps[1]:g}: {claim}, every seed", plain_adam, at_most=0.6, source=f"{SLUG} R5", spread=plain_adam),
    ]


def _under_adam(config: NetworkConfig, x: Tensor, y: Tensor, eps: float) -> list[float]:
    """Gap of the net compressed to the highest order over that of random subsets, of each of ``adam_seeds``."""
    out, rule = [], Rule(config.adam, "adam", eps=eps)
    for seed in config.adam_seeds:
        stream = _stream(seed)
        theta, even = _neurons(config, stream)
        kept = compress_objects(theta, even, order=max(config.orders))
        size = len(kept.index)
        drawn = [torch.randperm(config.neurons, generator=stream)[:size] for _ in range(config.subsets)]
        whole = trajectory(theta, even, x, y, rule, config.steps)

        def run(at: Tensor, w: Tensor, rule: Rule, theta: Tensor = theta) -> Tensor:
            return trajectory(theta[at], w, x, y, rule, config.steps)

        out.append(_against(run, kept, drawn, torch.full((size,), 1 / size, dtype=torch.float64), rule, whole))
    return out


def _against(
    run: Callable[[Tensor, Tensor, Rule], Tensor], kept: Objects, drawn: Sequence[Tensor], flat: Tensor, rule: Rule, whole: Tensor
) -> float:
    """Gap of the compressed net over the mean gap of random subsets, under a rule."""
    return _gap(run(kept.index, kept.weights, rule), whole) * len(drawn) / sum(_gap(run(at, flat, rule), whole) for at in drawn)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------ A3: data sets


@dataclass(frozen=True)
class LandscapeConfig:
    """(x1, x2, y), x ~ U(-1, 1)^2, y = sin(2 x1) x2 + .1 noise; losses of random tanh nets with N(0, 1) weights."""

    points: int = 4000
    nets: int = 30
    units: int = 10
    orders: tuple[int, ...] = (2, 4, 6, 8)
    seeds: tuple[int, ...] = (0, 1, 2)


def landscape(config: LandscapeConfig) -> Part:
    """A3, R7: a weighted subset of the data has nearly the loss of all of it, whatever the network."""
    ours: dict[int, list[float]] = {k: [] for k in config.orders}
    random: dict[int, list[float]] = {k: [] for k in config.orders}
    for seed in config.seeds:
        stream = _stream(seed)
        x = _uniform(stream, config.points, 2)
        y = torch.sin(2 * x[:, 0]) * x[:, 1] + 0.1 * _normal(stream, config.points)
        W, b, v = (
            _normal(stream, *s) for s in ((config.nets, config.units, 2), (config.nets, config.units, 1), (config.nets, config.units))
        )
        f = torch.einsum("nu,nup->np", v, torch.tanh(W @ x.T + b))
        each = (f - y).square()  # (nets, points)
        whole = each.mean(1)
        for k in config.orders:
            small = compress_dataset(x, y, order=k)
            at, w = small.objects.index, small.weights / small.weights.sum()
            ours[k].append(float(((each[:, at] @ w) / whole - 1).abs().max()))
            drawn = torch.randperm(config.points, generator=stream)[: len(at)]
            random[k].append(float((each[:, drawn].mean(1) / whole - 1).abs().max()))
    top = max(config.orders)
    checks = (
        holds("largest relative error of the loss of any net", ours[top], at_most=0.005, source=f"{SLUG} A3, R7", spread=ours[top]),
        holds(
            "over that of a random subset",
            [a / b for a, b in zip(ours[top], random[top], strict=True)],
            at_most=0.05,
            source=f"{SLUG} A3",
        ),
        control("random subset: error", random[top], at_least=0.03, source=f"{SLUG} A3", spread=random[top]),
        holds(
            "the error falls with every order: ratio of neighbours",
            [a / b for i, k in enumerate(config.orders[:-1]) for a, b in zip(ours[k], ours[config.orders[i + 1]], strict=True)],
            at_least=1.0,
            source=f"{SLUG} A3",
        ),
    )
    sizes = [monomial_count(3, k) for k in config.orders]
    series = [
        {"name": name, "x": sizes, "y": [sum(v) / len(v) for v in table.values()]}
        for name, table in (("compressed", ours), ("random subset", random))
    ]
    data = {"series": series, "x": "points kept", "y": "largest relative error of the loss", "log": "xy"}
    return Part(checks, (Figure("Loss landscape on compressed data", data, curves),))


# ------------------------------------------------------------------------------------------------ A4: scaling of test errors


@dataclass(frozen=True)
class RidgeConfig:
    """x ~ U(-1, 1), y = sin 3x + .3 noise, ridge on 40 features tanh(W x + b), W ~ N(0, 2^2), b ~ N(0, 1); ``draws`` data sets a seed."""

    sizes: tuple[int, ...] = (200, 800, 3200)
    orders: tuple[int, ...] = (4, 8, 12, 16)
    features: int = 40
    ridge: float = 1e-6
    draws: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)


def ridge(config: RidgeConfig) -> Part:
    """A4: 153 weighted points test as well as the 3200 they stand for; too low an order does not.

    The demand is on a seed's mean over its draws of data, as in the dossier; a single draw can be beyond it (2.02 was seen). Seeds 0 to 9
    give 1.04 to 1.73.
    """
    grid = torch.linspace(-1, 1, 501, dtype=torch.float64)[:, None]
    truth = torch.sin(3 * grid[:, 0])
    full: dict[int, list[float]] = {n: [] for n in config.sizes}
    small: dict[int, list[float]] = {k: [] for k in config.orders}
    for seed in config.seeds:
        stream = _stream(seed)
        W, b = 2 * _normal(stream, 1, config.features), _normal(stream, config.features)

        def test(x: Tensor, y: Tensor, w: Tensor, W: Tensor = W, b: Tensor = b) -> float:
            P = torch.tanh(x @ W + b)
            A = P.T @ (w[:, None] * P) + config.ridge * torch.eye(config.features, dtype=torch.float64)
            beta = torch.linalg.solve(A, P.T @ (w * y))
            return float((torch.tanh(grid @ W + b) @ beta - truth).square().mean())

        scores: dict[str | int, list[float]] = {}
        for _ in range(config.draws):
            x = _uniform(stream, max(config.sizes), 1)
            y = torch.sin(3 * x[:, 0]) + 0.3 * _normal(stream, len(x))
            for n in config.sizes:
                scores.setdefault(f"n{n}", []).append(test(x[:n], y[:n], torch.full((n,), 1 / n, dtype=torch.float64)))
            for k in config.orders:
                kept = compress_dataset(x, y, order=k)
                scores.setdefault(k, []).append(test(kept.x, kept.y, kept.weights / kept.weights.sum()))
        for n in config.sizes:
            full[n].append(sum(scores[f"n{n}"]) / config.draws)
        for k in config.orders:
            small[k].append(sum(scores[k]) / config.draws)
    most, top, low = max(config.sizes), max(config.orders), min(config.orders)
    ratio = [a / b for a, b in zip(small[top], full[most], strict=True)]
    checks = (
        holds(
            f"{monomial_count(2, top)} weighted points: test error over that of {most}",
            ratio,
            at_most=2.0,
            source=f"{SLUG} A4",
            spread=ratio,
        ),
        holds(
            f"and below that of the first {config.sizes[0]} points: ratio",
            [a / b for a, b in zip(small[top], full[config.sizes[0]], strict=True)],
            at_most=0.5,
            source=f"{SLUG} A4",
        ),
        control(
            f"order {low} ({monomial_count(2, low)} points) is useless: test error over that of {most}",
            [a / b for a, b in zip(small[low], full[most], strict=True)],
            at_least=10.0,
            source=f"{SLUG} A4",
            spread=small[low],
        ),
    )
    series = [
        {"name": "all points", "x": list(config.sizes), "y": [sum(v) / len(v) for v in full.values()]},
        {
            "name": f"{most} points compressed",
            "x": [monomial_count(2, k) for k in config.orders],
            "y": [sum(v) / len(v) for v in small.values()],
        },
    ]
    data = {"series": series, "x": "points", "y": "test error", "log": "xy"}
    return Part(checks, (Figure("Test error against the number of points", data, curves),))


# ------------------------------------------------------------------------------------------------ R3, R4, R6: rates


@dataclass(frozen=True)
class RatesConfig:
    """Errors of means of random features tanh(a.z + c) over uniform objects, a ~ N(0, 1), c ~ N(0, 1).

    Cells: two dimensions, 1 to 64 cells, orders 1 to 3. One cell: orders 2 to 10. Fixed share: 10 % kept, three dimensions.
    """

    objects: int = 4000
    features: int = 50
    cells: tuple[int, ...] = (1, 4, 16, 64)
    orders: tuple[int, ...] = (1, 2, 3)
    single: tuple[int, ...] = (2, 4, 6, 8, 10)
    shared: tuple[int, ...] = (1000, 2000, 4000, 8000, 16000)
    share: float = 0.1
    shared_orders: tuple[int, ...] = (1, 2)
    seeds: tuple[int, ...] = (0, 1, 2)


def rates(config: RatesConfig) -> Part:
    """R3, R4, R6: algebraic in the number of cells, exponential in the order, and d^-((k+1)/m + 1/2) at a fixed share."""
    cell: dict[int, list[list[float]]] = {k: [] for k in config.orders}
    within, single, drawn, ellipse = [], [], [], []
    shared: dict[int, list[float]] = {k: [] for k in config.shared_orders}
    for seed in config.seeds:
        stream = _stream(seed)
        a, c = _normal(stream, config.features, 2), _normal(stream, config.features)
        z = _uniform(stream, config.objects, 2)
        for k in config.orders:
            errors = []
            for count in config.cells:
                kept = compress_objects(z, order=k, cells=count, seed=seed)
                errors.append(_mean_error(z, kept, a, c))
                if k == 1:
                    radius = _radius(z, count, seed)
                    slope = float(compression_bound(_BEND * float(a.square().sum(1).max()), radius, 1))
                    within.append(_mean_error(z, kept, a, c, worst=True) / slope)
            cell[k].append(errors)
        line = _uniform(stream, config.objects, 1)
        a1 = a[:, :1]
        found = [_mean_error(line, compress_objects(line, order=k), a1, c) for k in config.single]
        single.append(found)
        pole = math.pi / 2 / float(a1.abs().max())
        ellipse.append(pole + math.sqrt(pole**2 + 1))
        size = monomial_count(1, config.single[-1])
        subset = torch.randperm(config.objects, generator=stream)[:size]
        drawn.append(float((torch.tanh(line[subset] @ a1.T + c).mean(0) - torch.tanh(line @ a1.T + c).mean(0)).abs().mean()))
        a3 = _normal(stream, config.features, 3)
        for k in config.shared_orders:
            errors = []
            for d in config.shared:
                z3 = _uniform(stream, d, 3)
                count = max(1, round(config.share * d / monomial_count(3, k)))
                errors.append(_mean_error(z3, compress_objects(z3, order=k, cells=count, seed=seed), a3, c))
            shared[k].append(_power(config.shared, errors))
    powers = {k: [_power(config.cells, e) for e in cell[k]] for k in config.orders}
    span = config.single[-1] - config.single[0]
    decay = [math.log(e[0] / e[-1]) / (span * math.log(r)) for e, r in zip(single, ellipse, strict=True)]
    checks = [
        holds("order 1: error of any feature over the bound 2 sup|D^2 phi| r^2 / 2!", within, at_most=1.0, source=f"{SLUG} R3"),
        *(
            holds(
                f"order {k}, m = 2: power of the number of cells over (k + 1) / m, mean of the seeds",
                -sum(powers[k]) / len(powers[k]) / cell_exponent(2, k),
                at_least=0.75,
                source=f"{SLUG} R3",
                spread=[-p for p in powers[k]],
            )
            for k in config.orders
        ),
        holds(
            "one cell: rate of decay in the order over log rho, rho the ellipse up to the nearest pole of a feature",
            decay,
            at_least=0.75,
            source=f"{SLUG} R4",
            spread=decay,
        ),
        control(
            "a random subset of the last size: error over ours",
            [d / e[-1] for d, e in zip(drawn, single, strict=True)],
            at_least=100.0,
            source=f"{SLUG} R4",
            spread=drawn,
        ),
        *(
            match(
                f"{config.share:.0%} kept, m = 3, order {k}: power of d is (k + 1) / m + 1/2, mean of the seeds",
                fixed_share_exponent(3, k),
                -sum(shared[k]) / len(shared[k]),
                0.25,
                source=f"{SLUG} R6",
                spread=[-p for p in shared[k]],
            )
            for k in config.shared_orders
        ),
        match(
            "order_for_size is the largest order that fits: C(m + k, k) <= budget < C(m + k + 1, k + 1)",
            1.0,
            [
                float(monomial_count(m, (k := order_for_size(m, b))) <= b < monomial_count(m, k + 1))
                for m in (1, 2, 3)
                for b in (5, 100, 999)
            ],
            0.0,
            source=f"{SLUG} R4",
        ),
    ]
    series = [
        {"name": f"order {k}", "x": list(config.cells), "y": [sum(e[i] for e in cell[k]) / len(cell[k]) for i in range(len(config.cells))]}
        for k in config.orders
    ]
    data = {"series": series, "x": "cells", "y": "error of the mean", "log": "xy"}
    orders = {"series": [{"name": f"seed {s}", "x": list(config.single), "y": e} for s, e in zip(config.seeds, single, strict=True)]}
    return Part(
        tuple(checks),
        (
            Figure("Cells", data, curves, "Algebraic in the number of cells."),
            Figure("Order", {**orders, "x": "order", "y": "error of the mean", "log": "y"}, curves, "Exponential in the order."),
        ),
    )


_BEND = 4 / (3 * math.sqrt(3))  # sup of |tanh''|


def _mean_error(z: Tensor, kept: Objects, a: Tensor, c: Tensor, worst: bool = False) -> float:
    phi = torch.tanh(z @ a.T + c)
    w = kept.weights / kept.weights.sum()
    missed = ((w[:, None] * phi[kept.index]).sum(0) - phi.mean(0)).abs()
    return float(missed.max() if worst else missed.mean())


def _radius(z: Tensor, cells: int, seed: int) -> float:
    """Largest distance of an object from the middle of its cell."""
    from parasym.methods.moments import cells_of

    labels = cells_of(z, cells, seed)
    return max(float((part - part.mean(0)).norm(dim=1).max()) for part in (z[labels == i] for i in labels.unique()))


def _power(sizes: Sequence[int], errors: Sequence[float]) -> float:
    a, b = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    exact: ExactConfig | None = ExactConfig()
    network: NetworkConfig | None = NetworkConfig()
    landscape: LandscapeConfig | None = LandscapeConfig()
    ridge: RidgeConfig | None = RidgeConfig()
    rates: RatesConfig | None = RatesConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "exact": exact,
    "network": network,
    "landscape": landscape,
    "ridge": ridge,
    "rates": rates,
}
_MANY = tuple(range(6))

ENTRY = Entry(
    slug=SLUG,
    title="A universal compression theory: lottery ticket hypothesis and superpolynomial scaling laws",
    paper="Hong-Yi Wang, Di Luo, Tomaso Poggio, Isaac Chuang, Liu Ziyin, 2025, arXiv 2510.00504; ICLR 2026",
    claims=(
        "C(m + k, k) of the objects, with positive weights, have all moments up to order k of the whole set.",
        "A network compressed so follows the whole one through training; so does the loss landscape of a compressed data set.",
        "The error falls exponentially in the order: polylogarithmic size at vanishing error, and power laws in data get steeper.",
    ),
    presets={
        "smoke": Config(
            exact=ExactConfig(objects=600, orders=(2, 6), adversaries=(3, 5, 7)),
            network=NetworkConfig(orders=(2, 4, 8), subsets=3, adam_seeds=()),
            landscape=LandscapeConfig(points=1500),
            ridge=None,
            rates=None,
        ),
        "default": Config(),
        "full": Config(
            network=NetworkConfig(neurons=10_000, orders=(2, 4, 6, 8, 10), steps=3000, seeds=_MANY),
            landscape=LandscapeConfig(points=100_000, orders=(2, 4, 6, 8, 10), seeds=_MANY),
            ridge=RidgeConfig(sizes=(200, 800, 3200, 12_800), orders=(4, 8, 12, 16, 20), draws=10, seeds=_MANY),
            rates=RatesConfig(shared=(1000, 4000, 16_000, 64_000), shared_orders=(1, 2, 3), seeds=_MANY),
        ),
    },
    experiments=_EXPERIMENTS,
)
