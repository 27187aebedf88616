"""How Label Smoothing Affects Generalization: smoothing as insurance against memorised wrong labels, and how much of it is best.

Slug label-smoothing. Smoothing p: 1 - p on the given label, p / (M - 1) on each other; symmetric training noise r, clean test labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parasym.gallery.contract import Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import accuracies, digits, networks, outputs
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.nn import (
    compose_symmetric_noise,
    effective_neighbours,
    flip_labels,
    inverse_symmetric_noise,
    logit_gap,
    neighbour_agreement,
    noise_matrix,
    noisy_agreement,
    optimal_smoothing,
    smoothing_test_loss,
)

SLUG = "label-smoothing"
CLASSES = 10


# ------------------------------------------------------------------------------------------------ A4: closed forms


@dataclass(frozen=True)
class ExactConfig:
    """A grid of p against the closed forms, and samples of the noise channel; M = 10."""

    rates: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6)
    neighbours: tuple[int, ...] = (2, 3, 5)
    samples: int = 200_000
    grid: int = 20_000
    fit: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def exact(config: ExactConfig) -> Part:
    """A4, R0, R1, R3, R5, R6: the best amount in every regime, from sampled noise and from a search; composition of channels."""
    grid = torch.linspace(1e-5, 0.9, config.grid, dtype=torch.float64)
    best_one, best_noisy, sampled, theory = [], [], [], []
    for seed in config.seeds:
        stream = torch.Generator().manual_seed(seed)
        truth = torch.randint(CLASSES, (config.samples,), generator=stream)
        for r in config.rates:
            train, test = (flip_labels(truth, r, CLASSES, generator=stream)[0] for _ in range(2))
            best_one.append(_best_p((train == truth).double().mean(), grid))
            best_noisy.append(_best_p((train == test).double().mean(), grid))
    for r in config.rates:
        for k in config.neighbours:
            values = torch.tensor([smoothing_test_loss(float(p), r, CLASSES, k) for p in grid[:: config.grid // 2000]])
            sampled.append(grid[:: config.grid // 2000][values.argmin()])
            theory.append(optimal_smoothing(r, CLASSES, k))
    many, seeds = config.rates * len(config.seeds), len(config.seeds)
    error = 5 * max(math.sqrt(r * (1 - r) / config.samples) for r in config.rates) + 1 / config.grid
    chain = [(r, p) for r in config.rates for p in config.rates]
    joint = [(noise_matrix(r, CLASSES) @ noise_matrix(p, CLASSES))[0, 1] * (CLASSES - 1) for r, p in chain]
    undone = [compose_symmetric_noise(r, inverse_symmetric_noise(r, CLASSES), CLASSES) for r in config.rates]
    falling = [[optimal_smoothing(r, CLASSES, k) for k in (1, *config.neighbours)] for r in config.rates]
    checks = (
        match("memoriser: best p = r (sampled noise)", list(many), best_one, error, source=f"{SLUG} A4, R1"),
        match(
            "noisy test labels: best p = 1 - s*, the authors' rule (sampled noise)",
            [1 - noisy_agreement(r, CLASSES) for r in config.rates] * seeds,
            best_noisy,
            error,
            source=f"{SLUG} R0, R6",
        ),
        match("k neighbours: best p, search against grid", theory, sampled, 1e-3, source=f"{SLUG} A4, R3"),
        match(
            "smoothing after noise is one channel",
            [compose_symmetric_noise(r, p, CLASSES) for r, p in chain],
            joint,
            1e-12,
            source=f"{SLUG} A4, R3",
        ),
        match("and its inverse undoes the noise", 0.0, undone, 1e-12, source=f"{SLUG} R3"),
        match("logit gap of a smoothed fit", logit_gap(config.fit, CLASSES), fitted_gap(config.fit), 1e-6, source=f"{SLUG} R5"),
        control(
            "more neighbours, less smoothing: best p of each k over the k before",
            [later / former for row in falling for former, later in pairwise(row)],
            at_most=0.8,
            source=f"{SLUG} R3",
        ),
        control(
            "p = 0 costs a memoriser infinitely much: loss at p = 1e-12 over the best",
            [_relative_cost(r) for r in config.rates],
            at_least=3.0,
            source=f"{SLUG} R1",
        ),
    )
    count = range(1, 11)
    series = [
        {"name": f"r = {r:g}", "x": list(count), "y": [max(optimal_smoothing(r, CLASSES, k), 1e-6) for k in count]} for r in config.rates
    ]
    data = {"series": series, "x": "neighbours averaged over", "y": "best p", "log": "y"}
    return Part(checks, (Figure("Best smoothing of a local average", data, curves, "Cut off at 1e-6."),))


def _relative_cost(r: float) -> float:
    return smoothing_test_loss(1e-12, r, CLASSES) / smoothing_test_loss(r, r, CLASSES)


def _best_p(agree: Tensor, grid: Tensor) -> Tensor:
    """The p that minimises -agree log(1 - p) - (1 - agree) log(p / (M - 1)) on the grid."""
    return grid[(-agree * torch.log1p(-grid) - (1 - agree) * (grid / (CLASSES - 1)).log()).argmin()]


def fitted_gap(p: float) -> float:
    """Logit gap after fitting one smoothed label by Newton-like descent on the logits."""
    target = torch.full((CLASSES,), p / (CLASSES - 1), dtype=torch.float64)
    target[0] = 1 - p
    z = torch.zeros(CLASSES, dtype=torch.float64)
    for _ in range(20_000):
        z = z - 2 * (torch.softmax(z, 0) - target)
    return float(z[0] - z[1])


# ------------------------------------------------------------------------------------------------ A1: nearest neighbours


@dataclass(frozen=True)
class NeighbourConfig:
    """k-nearest neighbours on the digits, predictions the mean of the smoothed noisy labels; ``draws`` of the noise for each seed."""

    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    others: tuple[int, ...] = (3, 5)
    draws: int = 20
    step: float = 0.005
    top: float = 0.8
    at: float = 0.2
    seeds: tuple[int, ...] = (0, 1, 2)


def neighbours(config: NeighbourConfig) -> Part:
    """A1, R2: on real images the best p of a 1-NN memoriser is 1 - q; more neighbours want far less."""
    split = digits()
    nearest = torch.cdist(split.x_test, split.x).topk(max(1, *config.others), largest=False).indices
    exact_share = float((split.y[nearest[:, 0]] == split.y_test).double().mean())
    grid = torch.arange(config.step, config.top + config.step / 2, config.step, dtype=torch.float64)
    best: dict[int, list[list[float]]] = {k: [] for k in (1, *config.others)}
    lines, values = [], []
    for r in config.rates:
        rows: dict[int, list[float]] = {k: [] for k in best}
        for seed in config.seeds:
            stream = torch.Generator().manual_seed(seed)
            shares = {k: [] for k in best}  # type: dict[int, list[Tensor]]
            for _ in range(config.draws):
                noisy = flip_labels(split.y, r, CLASSES, generator=stream)[0]
                right = (noisy[nearest] == split.y_test[:, None]).double()
                for k in best:
                    shares[k].append(right[:, :k].mean(1))
            for k in best:
                share = torch.cat(shares[k])
                given = (1 - grid)[:, None] * share + (grid / (CLASSES - 1))[:, None] * (1 - share)
                loss = -given.log().mean(1)
                rows[k].append(float(grid[loss.argmin()]))
                if k == 1:
                    values.append(float(loss[(grid - config.at).abs().argmin()]))
                if k == 1 and seed == config.seeds[0]:
                    lines.append({"name": f"r = {r:g}", "x": plain(grid), "y": plain(loss)})
        for k in best:
            best[k].append(rows[k])
    theory = [1 - neighbour_agreement(r, CLASSES, exact_share) for r in config.rates]
    noisy_rows = [i for i, r in enumerate(config.rates) if r > 0]
    checks = [
        match(
            "1-NN: best p = 1 - q, every r",
            [t for t in theory for _ in config.seeds],
            best[1],
            0.015,
            source=f"{SLUG} A1, R2",
            spread=best[1],
        ),
    ]
    for k in config.others:
        ceiling = [max(0.5 * config.rates[i], 2 * config.step) for i in noisy_rows for _ in config.seeds]
        checks.append(control(f"{k}-NN: best p is far below r", [best[k][i] for i in noisy_rows], at_most=ceiling, source=f"{SLUG} A1, R3"))
    order = sorted(best)
    gaps = [torch.tensor(best[a])[noisy_rows] - torch.tensor(best[b])[noisy_rows] for a, b in pairwise(order)]
    checks.append(holds("... and falls with k: step from each k to the next", torch.stack(gaps), at_least=0.0, source=f"{SLUG} A1, R3"))
    level = [smoothing_test_loss(config.at, r, CLASSES, 1, exact_share) for r in config.rates for _ in config.seeds]
    # each neighbour's label is drawn ``draws`` times, and few test images share a neighbour
    size = math.log((1 - config.at) * (CLASSES - 1) / config.at) / 2 / math.sqrt(config.draws * len(split.y_test))
    checks.append(
        match(
            f"1-NN: test cross-entropy at p = {config.at:g} is H(p, 1 - q) (5 standard errors)",
            level,
            values,
            5 * size,
            source=f"{SLUG} R1, R2",
        )
    )
    data = {"series": lines, "x": "p", "y": "test cross-entropy"}
    return Part(tuple(checks), (Figure("1-NN on noisy digits", data, curves, "First seed."),))


# ------------------------------------------------------------------------------------------------ A2, A3: networks


@dataclass(frozen=True)
class NetConfig:
    """64-``width``-10 ReLU nets on a share ``train`` of the digits, noise r, full-batch Adam, one net for each p and seed; float32."""

    train: float = 0.4
    width: int = 128
    lr: float = 5e-3
    steps: int = 1500
    rate: float = 0.2
    amounts: tuple[float, ...] = (0.0, 0.02, 0.1, 0.3)
    seeds: tuple[int, ...] = (0, 1, 2)


def train_nets(config: NetConfig) -> dict[str, Tensor]:
    """Test cross-entropy, test accuracy and agreement with the given labels, each (amounts, seeds)."""
    split, count = digits(config.train), len(config.amounts)
    flipped = [flip_labels(split.y, config.rate, CLASSES, generator=torch.Generator().manual_seed(seed))[0] for seed in config.seeds]
    given = torch.stack(flipped).repeat(count, 1)
    p = torch.tensor(config.amounts).repeat_interleave(len(config.seeds))[:, None, None]
    hot = torch.nn.functional.one_hot(given, CLASSES).float()
    target = (1 - p) * hot + p / (CLASSES - 1) * (1 - hot)
    weights = networks(Ensemble(config.seeds), (64, config.width, CLASSES), count)
    optimizer = torch.optim.Adam(weights, lr=config.lr)
    for _ in range(config.steps):
        optimizer.zero_grad()
        loss = -(target * torch.log_softmax(outputs(weights, split.x), -1)).sum((0, 2)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        test = torch.log_softmax(outputs(weights, split.x_test).double(), -1)
        agreement = accuracies(outputs(weights, split.x), given)
        labels = split.y_test.expand(len(test), -1)
        loss = -test.gather(2, labels[..., None])[..., 0].mean(1)
    return {
        "loss": loss.reshape(count, -1),
        "accuracy": accuracies(test, split.y_test).reshape(count, -1),
        "agreement": agreement.reshape(count, -1),
    }


def memorising(config: NetConfig) -> Part:
    """A2, R4: a net that reproduces every wrong label has an interior best p, that of two or three neighbours, not r."""
    run = train_nets(config)
    best = run["loss"].argmin(0)
    amounts = torch.tensor(config.amounts, dtype=torch.float64)
    lowest = run["loss"].amin(0)
    guess = [effective_neighbours(float(amounts[i]), config.rate, CLASSES) for i in best]
    checks = (
        holds("it memorises: agreement with the given labels, every p", run["agreement"], at_least=0.995, source=f"{SLUG} A2"),
        holds(
            "test cross-entropy at p = 0 over the lowest", run["loss"][0] / lowest, at_least=1.2, source=f"{SLUG} A2", spread=run["loss"][0]
        ),
        holds("the best p lies inside: at least", amounts[best], at_least=0.005, source=f"{SLUG} A2", spread=amounts[best]),
        holds("... and at most", amounts[best], at_most=0.15, source=f"{SLUG} A2, R4"),
        control(
            "p = r, the rule of a pure memoriser, is worse: its loss over the lowest",
            _at(run["loss"], config) / lowest,
            at_least=1.02,
            source=f"{SLUG} R4",
        ),
        holds("neighbours the net averages over, by its best p", guess, at_least=1.2, source=f"{SLUG} R3, R4", spread=guess),
    )
    return Part(checks, (_net_figure(config, run, "loss", "A net that memorises", "test cross-entropy"),))


def _at(values: Tensor, config: NetConfig) -> Tensor:
    """The value at p = r, or between its neighbours on the grid of amounts."""
    above = next(i for i, p in enumerate(config.amounts) if p >= config.rate)
    low, high = config.amounts[above - 1], config.amounts[above]
    share = (config.rate - low) / (high - low)
    return (1 - share) * values[above - 1] + share * values[above]


def fitting(config: NetConfig) -> Part:
    """A3: before it has memorised everything, smoothing costs cross-entropy and gains accuracy."""
    run = train_nets(config)
    gain, cost = run["accuracy"][-1] - run["accuracy"][0], run["loss"][-1] - run["loss"][0]
    checks = (
        holds(f"accuracy at p = {config.amounts[-1]:g} less that at 0", gain, at_least=0.03, source=f"{SLUG} A3", spread=gain),
        control("while the cross-entropy does not fall", cost, at_least=0.0, source=f"{SLUG} A3", spread=cost),
    )
    figures = (
        _net_figure(config, run, "accuracy", "A larger net, stopped early: accuracy", "test accuracy"),
        _net_figure(config, run, "loss", "A larger net, stopped early: cross-entropy", "test cross-entropy"),
    )
    return Part(checks, figures)


def _net_figure(config: NetConfig, run: Mapping[str, Tensor], key: str, name: str, axis: str) -> Figure:
    x = list(config.amounts)
    values = run[key]
    series = {
        "name": f"r = {config.rate:g}",
        "x": x,
        "y": plain(values.mean(1)),
        "low": plain(values.amin(1)),
        "high": plain(values.amax(1)),
    }
    return Figure(name, {"series": [series], "x": "p", "y": axis}, curves, "Band: smallest and largest of the seeds.")


# ------------------------------------------------------------------------------------------------ the entry


EARLY = NetConfig(train=0.6, width=512, lr=3e-3, steps=250, amounts=(0.0, 0.1, 0.3))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    exact: ExactConfig | None = ExactConfig()
    neighbours: NeighbourConfig | None = NeighbourConfig()
    memorising: NetConfig | None = NetConfig()
    fitting: NetConfig | None = EARLY


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "exact": exact,
    "neighbours": neighbours,
    "memorising": memorising,
    "fitting": fitting,
}

_FINE = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)

ENTRY = Entry(
    slug=SLUG,
    title="An Investigation of how Label Smoothing Affects Generalization",
    paper="Blair Chen, Liu Ziyin, Zihao Wang, Paul Pu Liang, 2020, arXiv 2010.12648",
    claims=(
        "A memoriser's best smoothing equals the noise rate (more exactly 1 - q, q the agreement with its neighbour).",
        "Averaging over k noisy labels lowers it fast; a trained net acts like two or three neighbours.",
        "The best amount for cross-entropy and for accuracy differ.",
    ),
    presets={
        "smoke": Config(neighbours=NeighbourConfig(draws=20, rates=(0.0, 0.2)), memorising=None, fitting=None),
        "default": Config(),
        "full": Config(
            exact=ExactConfig(samples=1_000_000),
            neighbours=NeighbourConfig(draws=100, seeds=tuple(range(5))),
            memorising=NetConfig(amounts=_FINE, seeds=tuple(range(5))),
            fitting=NetConfig(train=0.6, width=512, lr=3e-3, steps=250, amounts=(0.0, 0.05, 0.1, 0.2, 0.3), seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
)
