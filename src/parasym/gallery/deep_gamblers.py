"""Deep Gamblers: a classifier that may keep its stake. Loss, optimum, and what the reserve is worth as a score.

Slug deep-gamblers. Loss -log(p_y + k / o), k the reserve, o the payoff (the paper's convention is smaller by log o).
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from parasym.core.errors import MissingExtraError
from parasym.core.guards import rng_state
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import accuracies, cross_entropies, digits, networks, outputs, train
from parasym.gallery.drawings import agreement, bars, curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.nn import aurc, e_aurc, flip_labels, gambler_loss, kelly_reserve, reserve, risk_coverage, softmax_response

SLUG = "deep-gamblers"
CLASSES = 10


# ------------------------------------------------------------------------------------------------ A1, A2: closed forms


@dataclass(frozen=True)
class ExactConfig:
    """Random class probabilities (softmax of N(0, spread^2), m classes) and payoffs U(1.05, m + 1.5); ``draws`` for each seed."""

    classes: int = 6
    draws: int = 10
    spread: float = 1.5
    iterations: int = 400
    rows: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)


def exact(config: ExactConfig) -> Part:
    """A1, A2, R1-R4: the closed form is the optimum; the gradient is cross-entropy with a target that believes the label by w."""
    draws, m = Ensemble(config.seeds), config.classes
    q = torch.softmax(config.spread * draws.normal(config.draws, m), -1).flatten(0, 1)
    o = (1.05 + (m + 0.45) * draws.uniform(config.draws)).flatten()
    best = kelly_reserve(q, o)
    found, kept = numerical(q, o, config.iterations)
    inside = (best.p > 0).all(-1)  # else the optimum sits at infinite logits, and L-BFGS stops short of it
    clear = ((q - (best.k / o)[:, None]).abs() > 1e-3).all(-1)
    easy = inside & clear
    logits, y = 3 * draws.normal(config.rows, m + 1).flatten(0, 1), draws.integers(m, config.rows).flatten()
    gap = gradient_gap(logits, y, 2.5)
    extreme = (1e4 * torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)).requires_grad_()
    far = gambler_loss(extreme, torch.zeros(len(extreme), dtype=torch.long), 1.8, reduction="none")
    far.sum().backward()
    assert extreme.grad is not None
    wild = torch.cat([far.detach(), extreme.grad.flatten()])
    lone = one_class(m)
    checks = [
        holds("closed form is never above the numerical optimum (+ 1e-10)", found - best.value, at_least=-1e-10, source=f"{SLUG} A1, R3"),
        holds("and the numerical optimum comes within 1e-3", (found - best.value)[clear], at_most=1e-3, source=f"{SLUG} A1"),
        match("o = 1: everything is kept", 1.0, kelly_reserve(q, 1.0).k, 1e-12, source=f"{SLUG} A1, R3"),
        match("o = m + .5: nothing is kept", 0.0, kelly_reserve(q, m + 0.5).k, 1e-12, source=f"{SLUG} A1, R3"),
        match("o = m + .5: p = q", q, kelly_reserve(q, m + 0.5).p, 1e-12, source=f"{SLUG} A1, R3"),
        match("one class worth betting on: k = e o / (o - 1)", lone[0], lone[1], 1e-12, source=f"{SLUG} R4"),
        match("gradient = f - (w, 1 - w), largest difference", 0.0, gap, 1e-12, source=f"{SLUG} A2, R2"),
        match(
            "logits of +-1e4 in float32: entries of loss and gradient that are not finite",
            0,
            (~wild.isfinite()).sum(),
            0,
            source=f"{SLUG} A2, R1",
        ),
        control(
            "log(p_y + k / o) by way of exp there: losses that are not finite", _naive(extreme.detach()), at_least=1, source=f"{SLUG} R1"
        ),
    ]
    if bool(easy.any()):
        checks.insert(2, match("where all classes are bet on: the two agree", 0.0, (found - best.value)[easy], 1e-8, source=f"{SLUG} A1"))
        checks.insert(3, match("... and so does the reserve", best.k[easy], kept[easy], 1e-4, source=f"{SLUG} A1"))
    data = {
        "series": [{"name": "random q and o", "predicted": plain(best.k), "measured": plain(kept)}],
        "x": "k, closed form",
        "y": "k, numerical",
    }
    return Part(tuple(checks), (Figure("The reserve of the best bet", data, agreement),))


def numerical(q: Tensor, o: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lowest loss and reserve found by L-BFGS on the logits of each problem, (n,), (n,)."""
    values, kept = [], []
    for target, payoff in zip(q, o, strict=True):
        z = torch.zeros(1, len(target) + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([z], max_iter=iterations, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe")

        def closure(z: Tensor = z, target: Tensor = target, payoff: Tensor = payoff, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = gambler_loss(z, target[None], payoff)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        values.append(closure().detach())
        kept.append(reserve(z.detach())[0])
    return torch.stack(values), torch.stack(kept)


def gradient_gap(logits: Tensor, y: Tensor, payoff: float) -> float:
    """Largest difference of the gradient from that of cross-entropy with target w on y and 1 - w on the reserve."""
    free = logits.clone().requires_grad_()
    gambler_loss(free, y, payoff, reduction="sum").backward()  # type: ignore[no-untyped-call]
    f = torch.softmax(logits, -1)
    p, k = f.gather(1, y[:, None])[:, 0], f[:, -1]
    w = p / (p + k / payoff)
    target = torch.zeros_like(f).scatter(1, y[:, None], w[:, None])
    target[:, -1] = 1 - w
    assert free.grad is not None
    return float((free.grad - (f - target)).abs().max())


def one_class(m: int) -> tuple[list[float], list[Tensor]]:
    """R4: predicted and computed reserve for q = (1 - e, e / (m - 1), ...), o = 3, e below its limit."""
    o, errors = 3.0, (0.05, 0.2, 0.4)
    q = torch.tensor([[1 - e, *[e / (m - 1)] * (m - 1)] for e in errors], dtype=torch.float64)
    return [e * o / (o - 1) for e in errors], list(kelly_reserve(q, o).k)


def _naive(logits: Tensor) -> Tensor:
    f = torch.softmax(logits, -1)
    return (~(-(f[:, 0] + f[:, -1] / 1.8).log()).isfinite()).sum()


# ------------------------------------------------------------------------------------------------ A3: wrong labels


@dataclass(frozen=True)
class DigitsConfig:
    """64-256-11 on the digits with a share ``noise`` of wrong training labels; SGD with momentum; ``warmup`` epochs of cross-entropy."""

    noise: float = 0.2
    payoffs: tuple[float, ...] = (2.5, 5.0)
    beyond: float = 11.0
    width: int = 256
    lr: float = 0.05
    momentum: float = 0.9
    batch: int = 64
    warmup: int = 3
    epochs: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)


def wrong_labels(config: DigitsConfig) -> Part:
    """A3: the reserve goes to the points whose label is wrong; a payoff above m leaves it unused."""
    split, draws = digits(), Ensemble(config.seeds)
    noisy = [flip_labels(split.y, config.noise, CLASSES, generator=torch.Generator().manual_seed(seed)) for seed in config.seeds]
    offers = (*config.payoffs, config.beyond)
    given, wrong = (torch.stack([pair[i] for pair in noisy]).repeat(len(offers), 1) for i in range(2))
    payoff = torch.tensor(offers).repeat_interleave(len(config.seeds))[:, None]
    weights = networks(draws, (64, config.width, CLASSES + 1), len(offers))

    def loss(logits: Tensor, labels: Tensor, epoch: int) -> Tensor:
        if epoch < config.warmup:
            return cross_entropies(logits[..., :CLASSES], labels)
        each = gambler_loss(logits.flatten(0, 1), labels.flatten(), payoff.expand_as(labels).reshape(-1, 1), reduction="none")
        return each.reshape(labels.shape).mean(1)

    optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum)
    train(lambda x: outputs(weights, x), optimizer, split.x, given, loss, epochs=config.epochs, batch=config.batch, draws=draws)
    with torch.no_grad():
        kept, test = reserve(outputs(weights, split.x)).double(), outputs(weights, split.x_test)
    on_wrong = (kept * wrong).sum(1) / wrong.sum(1)
    on_clean = (kept * ~wrong).sum(1) / (~wrong).sum(1)
    shape = (len(offers), len(config.seeds))
    gap, mean = (on_wrong - on_clean).reshape(shape), kept.mean(1).reshape(shape)
    error = (1 - accuracies(test, split.y_test)).reshape(shape)
    right = test[..., :CLASSES].argmax(-1) == split.y_test
    area = torch.tensor([aurc(k, c) for k, c in zip(reserve(test), right, strict=True)], dtype=torch.float64).reshape(shape)
    checks = [
        holds(f"o = {o:g}: mean reserve on wrong labels less that on clean ones", gap[i], at_least=0.3, source=f"{SLUG} A3", spread=gap[i])
        for i, o in enumerate(config.payoffs)
    ]
    checks += [
        holds(
            f"o = {config.payoffs[0]:g}: area under the risk-coverage curve of k / error rate",
            area[0] / error[0],
            at_most=0.6,
            source=f"{SLUG} A3, R5",
            spread=area[0] / error[0],
        ),
        control(
            f"o = {config.beyond:g} > m: mean reserve over that at o = {config.payoffs[0]:g}",
            mean[-1] / mean[0],
            at_most=0.2,
            source=f"{SLUG} A3, R3",
            spread=mean[-1],
        ),
    ]
    labels = [f"o = {o:g}, seed {seed}" for o in offers for seed in config.seeds]
    series = [{"name": "clean", "y": plain(on_clean)}, {"name": "wrong", "y": plain(on_wrong)}]
    return Part(tuple(checks), (Figure("Mean reserve by kind of label", {"labels": labels, "series": series, "y": "k"}, bars),))


# ------------------------------------------------------------------------------------------------ pitfall: no warm-up


@dataclass(frozen=True)
class ColdConfig:
    """The net of `DigitsConfig` on clean labels, from scratch."""

    collapsing: tuple[float, ...] = (1.5, 2.5)
    safe: float = 8.0
    epochs: int = 15
    net: DigitsConfig = DigitsConfig(noise=0.0)


def cold_start(config: ColdConfig) -> Part:
    """Pitfall of R1: without a warm-up a small payoff keeps everything and learns nothing."""
    split, draws = digits(), Ensemble(config.net.seeds)
    offers = (*config.collapsing, config.safe)
    payoff = torch.tensor(offers).repeat_interleave(len(config.net.seeds))[:, None]
    weights = networks(draws, (64, config.net.width, CLASSES + 1), len(offers))

    def loss(logits: Tensor, labels: Tensor, epoch: int) -> Tensor:
        each = gambler_loss(logits.flatten(0, 1), labels.flatten(), payoff.expand_as(labels).reshape(-1, 1), reduction="none")
        return each.reshape(labels.shape).mean(1)

    optimizer = torch.optim.SGD(weights, lr=config.net.lr, momentum=config.net.momentum)
    y = split.y.expand(len(payoff), -1)
    train(lambda x: outputs(weights, x), optimizer, split.x, y, loss, epochs=config.epochs, batch=config.net.batch, draws=draws)
    with torch.no_grad():
        kept = reserve(outputs(weights, split.x)).mean(1).reshape(len(offers), -1)
    checks = (
        control("small payoffs, no warm-up: mean reserve", kept[:-1], at_least=0.99, source=f"{SLUG} pitfalls", spread=kept[:-1]),
        holds(f"o = {config.safe:g} trains from scratch: mean reserve", kept[-1], at_most=0.5, source=f"{SLUG} pitfalls", spread=kept[-1]),
    )
    return Part(checks)


# ------------------------------------------------------------------------------------------------ A4: clothes


@dataclass(frozen=True)
class ClothesConfig:
    """Fashion-MNIST of the Debian package: the first ``images`` and ``tests``; conv 16@5 s2, conv 32@3 s2, dense 64, 11 outputs.

    Adam; the first ``warmup`` epochs of the gambler are cross-entropy.
    """

    folder: str = "/usr/share/datasets/fashion-mnist"
    images: int = 10_000
    tests: int = 5_000
    payoffs: tuple[float, ...] = (6.0, 2.6)
    lr: float = 2e-3
    batch: int = 64
    epochs: int = 8
    warmup: int = 2
    coverages: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)
    seeds: tuple[int, ...] = (0, 1, 2)


def clothes_data(config: ClothesConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (n, 1, 28, 28) in [0, 1] and y of the training and the test part.

    Raises:
        MissingExtraError: the files are not there.
    """
    parts = []
    for name, count in (("train", config.images), ("t10k", config.tests)):
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8)):
            path = Path(config.folder) / f"{name}-{kind}-ubyte.gz"
            if not path.is_file():
                raise MissingExtraError(f"{path} is missing: apt-get install dataset-fashion-mnist, or set the folder in the config")
            with gzip.open(path) as file:
                data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=skip)
            parts.append(data.reshape(-1, 1, 28, 28)[:count].float() / 255 if skip == 16 else data[:count].long())
    return parts[0], parts[1], parts[2], parts[3]


def train_clothes(config: ClothesConfig, payoff: float | None, seed: int, data: tuple[Tensor, ...]) -> Tensor:
    """Test logits (tests, 11) of one network."""
    x, y, x_test, _ = data
    with rng_state():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(800, 64),
            nn.ReLU(),
            nn.Linear(64, 11),
        )
    optimizer, stream = torch.optim.Adam(model.parameters(), lr=config.lr), torch.Generator().manual_seed(seed)
    for epoch in range(config.epochs):
        for rows in torch.randperm(len(x), generator=stream).split(config.batch):
            optimizer.zero_grad()
            logits = model(x[rows])
            if payoff is None or epoch < config.warmup:
                loss = nn.functional.cross_entropy(logits[:, :CLASSES], y[rows])
            else:
                loss = gambler_loss(logits, y[rows], payoff)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return torch.cat([model(part) for part in x_test.split(1000)])  # type: ignore[no-any-return]


def clothes(config: ClothesConfig) -> Part:
    """A4: risk falls with coverage for either score; the reserve is not the better score at this scale, and that is shown."""
    data = clothes_data(config)
    y, low = data[3], config.payoffs[-1]
    curves_of: dict[str, list[list[float]]] = {}
    areas: dict[str, list[float]] = {}
    kept, errors = [], []
    for seed in config.seeds:
        for payoff in (None, *config.payoffs):
            logits = train_clothes(config, payoff, seed, data)
            right = logits[:, :CLASSES].argmax(1) == y
            scores = {"1 - max p": softmax_response(logits[:, :CLASSES])}
            if payoff is not None:
                scores["k"] = reserve(logits)
            for name, score in scores.items():
                label = f"{'cross-entropy' if payoff is None else f'o = {payoff:g}'}, {name}"
                curves_of.setdefault(label, []).append(list(risk_coverage(score, right, config.coverages).values()))
                areas.setdefault(label, []).append(aurc(score, right))
                assert e_aurc(score, right) >= 0
            if payoff == low:
                kept.append(float(reserve(logits).mean()))
                errors.append(1 - float(right.double().mean()))
    falls = [torch.tensor(curves_of[f"o = {low:g}, {name}"]).diff(dim=1) for name in ("1 - max p", "k")]
    share = torch.tensor(areas[f"o = {low:g}, k"]) / torch.tensor(errors)
    gap = torch.tensor(areas[f"o = {low:g}, k"]) - torch.tensor(areas[f"o = {low:g}, 1 - max p"])
    checks: tuple[Check, ...] = (
        holds(
            f"o = {low:g}: error falls with coverage, both scores: change from each coverage to the next",
            torch.cat(falls),
            at_most=0.0,
            source=f"{SLUG} A4",
        ),
        holds(f"o = {low:g}: AURC of k / error rate", share, at_most=0.45, source=f"{SLUG} A4", spread=share),
        holds(f"o = {low:g}: mean reserve, at least", kept, at_least=0.03, source=f"{SLUG} A4", spread=kept),
        holds(f"o = {low:g}: mean reserve, at most", kept, at_most=0.3, source=f"{SLUG} A4", spread=kept),
        control(
            "the reserve does not beat softmax response of the same net: AURC of k less that of 1 - max p",
            gap,
            at_least=0.0,
            source=f"{SLUG} A4",
            spread=gap,
        ),
    )
    series = [
        {"name": name, "x": list(config.coverages), "y": plain(torch.tensor(rows, dtype=torch.float64).mean(0))}
        for name, rows in curves_of.items()
    ]
    return Part(
        checks,
        (Figure("Risk against coverage, Fashion-MNIST", {"series": series, "x": "coverage", "y": "error"}, curves, "Mean of the seeds."),),
    )


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    exact: ExactConfig | None = ExactConfig()
    wrong_labels: DigitsConfig | None = DigitsConfig()
    cold_start: ColdConfig | None = ColdConfig()
    clothes: ClothesConfig | None = None


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "exact": exact,
    "wrong_labels": wrong_labels,
    "cold_start": cold_start,
    "clothes": clothes,
}

ENTRY = Entry(
    slug=SLUG,
    title="Deep Gamblers: Learning to Abstain with Portfolio Theory",
    paper=(
        "Liu Ziyin, Zhikang T. Wang, Paul Pu Liang, Ruslan Salakhutdinov, "
        "Louis-Philippe Morency, Masahito Ueda, NeurIPS 2019, arXiv 1907.00208"
    ),
    claims=(
        "The gambler's loss has a closed-form optimum: water-filling of bets above a reserve.",
        "Its gradient is cross-entropy with a target that believes the label by w = p / (p + k / o).",
        "The reserve singles out wrong labels; without a warm-up a small payoff keeps everything.",
        "At small scale the reserve is not a better score than softmax response of the same net.",
    ),
    presets={
        "smoke": Config(exact=ExactConfig(draws=5), wrong_labels=None, cold_start=None),
        "default": Config(),
        "full": Config(
            exact=ExactConfig(draws=30),
            wrong_labels=DigitsConfig(seeds=tuple(range(5))),
            cold_start=replace(ColdConfig(), epochs=40),
            clothes=ClothesConfig(),
        ),
    },
    experiments=_EXPERIMENTS,
)
