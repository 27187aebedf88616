"""Learning Not to Learn in the Presence of Noisy Labels: the gambler's loss as protection, and when to stop.

Slug gamblers-noisy-labels. e: fraction of training labels that are wrong, symmetric; o: payoff; k: reserve; loss -log(p_y + k / o).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parasym.gallery.contract import Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.digits import accuracies, cross_entropies, digits, networks, outputs, train
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.nn import (
    PlateauStop,
    auto_payoff,
    flip_labels,
    gambler_loss,
    gambler_plateau,
    kelly_reserve,
    noise_matrix,
    reserve,
)

SLUG = "gamblers-noisy-labels"
CLASSES = 10


# ------------------------------------------------------------------------------------------------ A4: the table model


@dataclass(frozen=True)
class TableConfig:
    """One logit vector (m + 1, +2 on the true class), the exact expected loss under the noise, Adam at two rates; float64."""

    noises: tuple[float, ...] = (0.0, 0.2, 0.5)
    payoff: float = 8.0
    steps: tuple[int, ...] = (4000, 2000)
    rates: tuple[float, ...] = (0.05, 0.005)
    rows: int = 300
    flips: int = 100_000
    seeds: tuple[int, ...] = (0, 1, 2)


def table(config: TableConfig) -> Part:
    """A4, R1-R3, R5: the plateau is the optimum of the population loss; why wrong labels pull weakly."""
    m = CLASSES
    q = torch.stack([noise_matrix(e, m)[0] for e in config.noises])
    loss, kept = descend(config, q, config.payoff)
    plateaus = [gambler_plateau(e, config.payoff, m) for e in config.noises]
    beyond = descend(config, q, m + 1.0)[1]
    draws = Ensemble(config.seeds)
    logits, y = 3 * draws.normal(config.rows, m + 1).flatten(0, 1), draws.integers(m, config.rows).flatten()
    free = logits.clone().requires_grad_()
    losses = gambler_loss(free, y, config.payoff, reduction="none")
    losses.sum().backward()  # type: ignore[no-untyped-call]
    f = torch.softmax(logits, -1)
    p, k = f.gather(1, y[:, None])[:, 0], f[:, -1]
    assert free.grad is not None
    pull = -free.grad.gather(1, y[:, None])[:, 0]
    expected = p * (1 / (p + k / config.payoff) - 1)
    bound = (config.payoff / k).log()
    entropy = [-(1 - e) * math.log(1 - e) - e * math.log(e / (m - 1)) for e in config.noises if e > 0]
    at_m = [gambler_plateau(e, float(m), m).loss for e in config.noises if e > 0]
    below = [float(kelly_reserve(noise_matrix(e, m)[0], 0.99 / (1 - e)).k) for e in config.noises if e >= 0.2]
    checks = (
        match("loss at the optimum = L*", [item.loss for item in plateaus], loss, 1e-3, source=f"{SLUG} A4, R2"),
        match("reserve at the optimum = e o / (o - 1)", [item.k for item in plateaus], kept, 1e-3, source=f"{SLUG} A4, R1"),
        match("L* at o = m is the entropy bound of cross-entropy", entropy, at_m, 1e-12, source=f"{SLUG} R2"),
        match("o < 1 / (1 - e): everything is kept", 1.0, below, 1e-12, source=f"{SLUG} R1"),
        match("pull on the given label = p (1 / (p + k / o) - 1)", expected, pull, 1e-12, source=f"{SLUG} A4, R3"),
        holds("the loss is bounded by log(o / k): room left", bound - losses.detach(), at_least=0.0, source=f"{SLUG} R3"),
        control(
            "... while cross-entropy pulls a point that looks mislabelled (p < .02, k > .3) with 1 - p: its pull over the gambler's",
            ((1 - p) / pull)[(p < 0.02) & (k > 0.3)],
            at_least=2.0,
            source=f"{SLUG} R3",
        ),
        control("o = m + 1: reserve", beyond, at_most=1e-3, source=f"{SLUG} A4"),
        match(
            "label flips follow the matrix, symmetric and pair (5 standard errors)",
            0.0,
            [flip_error(config, seed, kind) for seed in config.seeds for kind in ("symmetric", "pair")],
            5 * math.sqrt(0.25 * m / config.flips),
            source=f"{SLUG} R5",
        ),
    )
    return Part(checks)


def descend(config: TableConfig, q: Tensor, payoff: float) -> tuple[Tensor, Tensor]:
    """Final loss and reserve for each row of q (n, m)."""
    start = torch.zeros(len(q), q.shape[1] + 1, dtype=torch.float64)
    start[:, 0] = 2
    z = start.requires_grad_()
    optimizer = torch.optim.Adam([z], lr=config.rates[0])
    for steps, rate in zip(config.steps, config.rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(steps):
            optimizer.zero_grad()
            gambler_loss(z, q, payoff, reduction="sum").backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return gambler_loss(z, q, payoff, reduction="none"), reserve(z)


def flip_error(config: TableConfig, seed: int, kind: str) -> float:
    """Largest entry of (seen frequencies - T)."""
    stream = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (config.flips,), generator=stream)
    noisy, _ = flip_labels(y, 0.3, CLASSES, kind, generator=stream)  # type: ignore[arg-type]
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.float64).index_put_((y, noisy), torch.ones(1, dtype=torch.float64), accumulate=True)
    return float((counts / counts.sum(1, keepdim=True) - noise_matrix(0.3, CLASSES, kind)).abs().max())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ networks on noisy digits


@dataclass(frozen=True)
class NetConfig:
    """64-256-11 ReLU nets on digits with wrong training labels (the given fractions), batches of 64; float32.

    ``methods``: "cross-entropy" (of the ten classes), a payoff, or an automatic rule "mid", "exp", "euc" (R4).
    """

    noises: tuple[float, ...] = (0.2, 0.5)
    methods: tuple[str | float, ...] = ("cross-entropy", 8.0)
    optimizer: str = "sgd"
    lr: float = 0.05
    width: int = 256
    batch: int = 64
    warmups: tuple[int, ...] = (0, 0)
    epochs: int = 150
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Runs:
    """What a set of nets did: train_loss and accuracy (epochs, methods, seeds), reserve on clean and wrong points (methods, seeds).

    ``share`` (seeds,): the fraction of training labels that did come out wrong, which the plateau rule must be given: two
    per cent more or less move its epoch by five.
    """

    train_loss: Tensor
    accuracy: Tensor
    clean: Tensor
    wrong: Tensor
    share: Tensor

    @property
    def last(self) -> Tensor:
        """Accuracy at the end (methods, seeds)."""
        return self.accuracy[-1]

    @property
    def best(self) -> Tensor:
        """Highest accuracy (methods, seeds)."""
        return self.accuracy.amax(0)


def train_nets(config: NetConfig, noise: float, warmup: int) -> Runs:
    """All methods side by side, from the same start, on the same batches."""
    split, draws, seeds = digits(), Ensemble(config.seeds), len(config.seeds)
    noisy = [flip_labels(split.y, noise, CLASSES, generator=torch.Generator().manual_seed(seed)) for seed in config.seeds]
    given, wrong = (torch.stack([pair[i] for pair in noisy]).repeat(len(config.methods), 1) for i in range(2))
    weights = networks(draws, (64, config.width, CLASSES + 1), len(config.methods))

    def loss(logits: Tensor, labels: Tensor, epoch: int) -> Tensor:
        parts = [
            method_loss("cross-entropy" if epoch < warmup else method, z, t)
            for method, z, t in zip(config.methods, logits.split(seeds), labels.split(seeds), strict=True)
        ]
        return torch.cat(parts)

    seen: list[Tensor] = []
    make = {"sgd": lambda: torch.optim.SGD(weights, lr=config.lr, momentum=0.9), "adam": lambda: torch.optim.Adam(weights, lr=config.lr)}
    history = train(
        lambda x: outputs(weights, x),
        make[config.optimizer](),
        split.x,
        given,
        loss,
        epochs=config.epochs,
        batch=config.batch,
        draws=draws,
        watch=lambda epoch: seen.append(accuracies(outputs(weights, split.x_test), split.y_test)),
    )
    with torch.no_grad():
        kept = reserve(outputs(weights, split.x)).double()
    shape = (len(config.methods), seeds)
    return Runs(
        history.double().reshape(-1, *shape),
        torch.stack(seen).reshape(-1, *shape),
        ((kept * ~wrong).sum(1) / (~wrong).sum(1)).reshape(shape),
        ((kept * wrong).sum(1) / wrong.sum(1)).reshape(shape),
        wrong[:seeds].double().mean(1),
    )


def method_loss(method: str | float, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each net, (s,), from (s, b, 11) and (s, b)."""
    if method == "cross-entropy":
        return cross_entropies(logits[..., :CLASSES], labels)
    flat = logits.flatten(0, 1)
    payoff = auto_payoff(flat, method) if isinstance(method, str) else method  # type: ignore[arg-type]
    return gambler_loss(flat, labels.flatten(), payoff, reduction="none").reshape(labels.shape).mean(1)


def stop_epochs(runs: Runs, payoff: float, method: int, warmup: int, noise: float | None = None) -> list[int]:
    """The epoch (from 0) at which the plateau rule stops each seed, given the share of labels that did come out wrong, or ``noise``; the
    last one if it never fires."""
    stops = []
    for losses, share in zip(runs.train_loss[:, method].T.tolist(), runs.share.tolist(), strict=True):
        share = share if noise is None else noise
        rule = PlateauStop(share, payoff, CLASSES, warmup=warmup)
        stops.append(next((epoch for epoch, value in enumerate(losses) if rule.update(value)), len(losses) - 1))
    return stops


def memorising(config: NetConfig) -> Part:
    """A1, A2: from scratch, the gambler forgets less than cross-entropy, and the plateau tells when to stop.

    A2 hands the rule the rate e the labels were drawn with. Of 1078 labels a share comes out wrong that is .015 off at e = .5 (one standard
    deviation), which moves L* and the epoch: of seeds 0 to 7 two then stop more than .03 below their peak (.033 and .039), so that demand
    is refuted. Given the share that did come out wrong every one of the eight is within .024.
    """
    checks, figures, nominal = [], [], []
    for noise, warmup in zip(config.noises, config.warmups, strict=True):
        runs = train_nets(config, noise, warmup)
        payoff = float(config.methods[1])
        gap = runs.last[1] - runs.last[0]
        each, mean = (0.015, 0.03) if noise <= 0.3 else (0.1, 0.1)
        stops = stop_epochs(runs, payoff, 1, warmup)
        at_stop = torch.stack([runs.accuracy[epoch, 1, i] for i, epoch in enumerate(stops)])
        drawn = stop_epochs(runs, payoff, 1, warmup, noise)
        nominal += plain(torch.stack([runs.accuracy[epoch, 1, i] for i, epoch in enumerate(drawn)]) - runs.best[1])
        theory = gambler_plateau(noise, payoff, CLASSES)
        name = f"e = {noise:g}, o = {payoff:g}"
        checks += [
            holds(f"{name}: accuracy at the end, gambler less cross-entropy", gap, at_least=each, source=f"{SLUG} A1", spread=gap),
            holds(f"{name}: the same, mean of the seeds", gap.mean(), at_least=mean, source=f"{SLUG} A1"),
            holds(
                f"{name}: accuracy where the rule stops less the peak",
                at_stop - runs.best[1],
                at_least=-0.03,
                source=f"{SLUG} A2, R2",
                spread=at_stop,
            ),
            holds(
                f"{name}: accuracy where the rule stops less cross-entropy's end",
                at_stop - runs.last[0],
                at_least=0.05,
                source=f"{SLUG} A2",
                spread=at_stop,
            ),
            control(
                f"{name}: going on loses: peak less end of the gambler", runs.best[1] - runs.last[1], at_least=0.02, source=f"{SLUG} A1, R3"
            ),
            control(
                f"{name}: memorisation takes the reserve below its plateau: plateau less end",
                theory.k - runs.clean[1],
                at_least=0.0,
                source=f"{SLUG} A1",
            ),
        ]
        figures.append(_accuracy_figure(config, runs, f"Test accuracy, e = {noise:g}", stops))
    claim = "the rule given the rate the labels were drawn with: accuracy where it stops less the peak, every rate and seed"
    checks.append(refuted(claim, nominal, at_least=-0.03, source=f"{SLUG} A2", spread=nominal))
    return Part(tuple(checks), tuple(figures))


def warmed(config: NetConfig) -> Part:
    """A3: after a warm-up a smaller payoff keeps the wrong labels out."""
    noise, warmup = config.noises[0], config.warmups[0]
    runs = train_nets(config, noise, warmup)
    gap, kept = runs.last[1] - runs.last[0], runs.wrong[1] - runs.clean[1]
    o = float(config.methods[1])
    checks = (
        holds(f"o = {o:g}, e = {noise:g}: accuracy at the end, less cross-entropy's", gap, at_least=0.05, source=f"{SLUG} A3", spread=gap),
        holds(f"o = {o:g}: mean reserve on wrong labels less that on clean ones", kept, at_least=0.3, source=f"{SLUG} A3", spread=kept),
    )
    return Part(checks, (_accuracy_figure(config, runs, f"After a warm-up, e = {noise:g}", None),))


def automatic(config: NetConfig) -> Part:
    """R4: a payoff from the net's own outputs needs no noise rate; without the factor 1 / (1 - k) it runs away."""
    checks, figures = [], []
    for noise, warmup, least in zip(config.noises, config.warmups, (0.015, 0.05), strict=True):
        runs = train_nets(config, noise, warmup)
        names = [str(method) for method in config.methods]
        gap = runs.last[names.index("mid")] - runs.last[names.index("cross-entropy")]
        kept = 0.5 * (runs.clean + runs.wrong)[names.index("euc")]
        checks += [
            holds(
                f'"mid", e = {noise:g}: accuracy at the end, less cross-entropy\'s', gap, at_least=least, source=f"{SLUG} R4", spread=gap
            ),
            control(f'"euc", e = {noise:g}: mean reserve', kept, at_least=0.99, source=f"{SLUG} R4", spread=kept),
        ]
        figures.append(_accuracy_figure(config, runs, f"Automatic payoffs, e = {noise:g}", None))
    return Part(tuple(checks), tuple(figures))


def _accuracy_figure(config: NetConfig, runs: Runs, name: str, stops: Sequence[int] | None) -> Figure:
    x = list(range(1, config.epochs + 1))
    series = []
    for i, method in enumerate(config.methods):
        values = runs.accuracy[:, i]
        label = method if isinstance(method, str) else f"o = {method:g}"
        series.append(
            {"name": label, "x": x, "y": plain(values.mean(1)), "low": plain(values.amin(1)), "high": plain(values.amax(1)), "colour": i}
        )
    if stops is not None:
        y = [float(runs.accuracy[epoch, 1, i]) for i, epoch in enumerate(stops)]
        series.append({"name": "the rule stops", "x": [epoch + 1 for epoch in stops], "y": y, "mark": "points", "colour": 3})
    return Figure(name, {"series": series, "x": "epoch", "y": "test accuracy"}, curves, "Band: smallest and largest of the seeds.")


# ------------------------------------------------------------------------------------------------ the entry


WARMED = NetConfig(noises=(0.2,), methods=("cross-entropy", 5.0), warmups=(3,), epochs=100)
AUTOMATIC = NetConfig(methods=("cross-entropy", "mid", "euc"), optimizer="adam", lr=1e-3, warmups=(0, 5), epochs=100)


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    table: TableConfig | None = TableConfig()
    memorising: NetConfig | None = NetConfig()
    warmed: NetConfig | None = WARMED
    automatic: NetConfig | None = AUTOMATIC


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "table": table,
    "memorising": memorising,
    "warmed": warmed,
    "automatic": automatic,
}

_MORE = tuple(range(6))

ENTRY = Entry(
    slug=SLUG,
    title="Learning Not to Learn in the Presence of Noisy Labels",
    paper=(
        "Liu Ziyin, Blair Chen, Ru Wang, Paul Pu Liang, Ruslan Salakhutdinov, Louis-Philippe Morency, Masahito Ueda, 2020, arXiv 2002.06541"
    ),
    claims=(
        "Under symmetric noise the gambler's loss has a plateau known in closed form: below it, wrong labels are being memorised.",
        "Stopping there loses almost nothing against the best epoch.",
        "The gambler's loss slows memorisation, it does not forbid it.",
        "A payoff computed from the net's own outputs works without knowing the noise, if it rises as the net abstains.",
    ),
    presets={
        "smoke": Config(memorising=None, warmed=None, automatic=None),
        "default": Config(),
        "full": Config(
            table=TableConfig(noises=(0.0, 0.1, 0.2, 0.3, 0.5, 0.7)),
            memorising=NetConfig(seeds=_MORE),
            warmed=replace(WARMED, seeds=_MORE),
            automatic=replace(AUTOMATIC, methods=("cross-entropy", "mid", "exp", "euc"), seeds=_MORE),
        ),
    },
    experiments=_EXPERIMENTS,
)
