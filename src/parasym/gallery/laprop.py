"""LaProp: separating momentum and adaptivity in Adam. What is bounded, what is not, and where the two part.

Slug laprop. Update u means the step divided by the learning rate. mu, nu = betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from parasym.gallery.contract import Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import cross_entropies, digits, networks, outputs
from parasym.gallery.drawings import bars, curves
from parasym.gallery.ensemble import Ensemble
from parasym.optim import LaProp

SLUG = "laprop"


# ------------------------------------------------------------------------------------------------ A1, R2: the recurrence


@dataclass(frozen=True)
class RecurrenceConfig:
    """Scalar gradients N(mean, 1); constant rate, and a schedule that drops ``drop``-fold half way. float64."""

    steps: int = 500
    lr: float = 1e-3
    drop: float = 10.0
    mean: float = 0.3
    after: int = 50
    decay: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def official(gradients: Tensor, rates: Sequence[float], *, decay: float = 0.0, centered: bool = False, amsgrad: bool = False) -> Tensor:
    """R1 in plain numbers, for gradients (steps, n) of n independent scalars starting at 0: positions (steps, n)."""
    b1, b2, eps = 0.9, 0.999, 1e-15
    paths = []
    for column in gradients.T.tolist():
        v = m = l1 = l2 = mean = top = x = 0.0
        path = []
        for step, (g, lr) in enumerate(zip(column, rates, strict=True), 1):
            v, l1, l2 = b2 * v + (1 - b2) * g * g, b1 * l1 + (1 - b1) * lr, b2 * l2 + (1 - b2)
            d = v
            if centered:
                mean = b2 * mean + (1 - b2) * g
                d = v - mean * mean if step > 10 else v
            if amsgrad and not (centered and step <= 10):
                top = max(top, d)
                d = top
            m = b1 * m + (1 - b1) * lr * g / (math.sqrt(max(d, 0.0) / l2) + eps)
            x -= m / (l1 / lr if lr else 1.0)
            x -= decay * x
            path.append(x)
        paths.append(path)
    return torch.tensor(paths, dtype=torch.float64).T


def textbook(gradients: Tensor, rates: Sequence[float]) -> Tensor:
    """The paper's form, the learning rate outside the momentum: positions (steps, n)."""
    v, m, x = (torch.zeros_like(gradients[0]) for _ in range(3))
    path = []
    for step, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        v = 0.999 * v + 0.001 * g * g
        m = 0.9 * m + 0.1 * g / ((v / (1 - 0.999**step)).sqrt() + 1e-15)
        x = x - lr * m / (1 - 0.9**step)
        path.append(x)
    return torch.stack(path)


def walk(make: Callable[[Tensor], torch.optim.Optimizer], gradients: Tensor, rates: Sequence[float]) -> Tensor:
    """Positions (steps, n) of an optimiser that starts at 0 and is fed ``gradients``."""
    p = torch.zeros_like(gradients[0], requires_grad=True)
    optimizer, path = make(p), []
    for g, lr in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def recurrence(config: RecurrenceConfig) -> Part:
    """A1, R2: the class is the authors' recurrence; the rate inside the momentum matters only when it changes."""
    gradients = config.mean + Ensemble(config.seeds).normal(config.steps).T
    half = config.steps // 2
    rates = [config.lr] * half + [config.lr / config.drop] * (config.steps - half)
    worst = []
    for centered, amsgrad, decay in ((False, False, 0.0), (True, False, 0.0), (False, True, 0.0), (True, True, config.decay)):
        options: dict[str, Any] = {"centered": centered, "amsgrad": amsgrad, "weight_decay": decay, "decoupled": "official"}
        theory = official(gradients, rates, decay=decay, centered=centered, amsgrad=amsgrad)
        for form in ({"foreach": False}, {"foreach": True}, {"capturable": True}):
            path = walk(lambda p, o=options, f=form: LaProp([p], **o, **f), gradients, rates)  # type: ignore[misc]
            worst.append((path - theory).abs().amax(0))
    constant = [config.lr] * config.steps
    inside, outside = walk(lambda p: LaProp([p]), gradients, rates), walk(lambda p: LaProp([p], lr_in_momentum=False), gradients, rates)
    steps = [path.diff(dim=0)[half - 1 : half - 1 + config.after].abs() for path in (inside, outside)]
    kept = walk(lambda p: LaProp([p]), gradients[:half], [config.lr] * (half - 1) + [0.0]).diff(dim=0)[-1].abs()
    checks = (
        match("class = authors' recurrence, every flag and form, largest difference", 0.0, torch.stack(worst), 1e-12, source=f"{SLUG} A1"),
        match(
            "constant rate: class = textbook form",
            textbook(gradients, constant)[-1],
            walk(lambda p: LaProp([p]), gradients, constant)[-1],
            1e-12,
            source=f"{SLUG} R2",
        ),
        match(
            "rate outside the momentum = textbook form, with a schedule",
            textbook(gradients, rates)[-1],
            outside[-1],
            1e-12,
            source=f"{SLUG} R2",
        ),
        holds(
            f"after a {config.drop:g}x drop: path over the next {config.after} steps, rate inside / outside",
            steps[0].sum(0) / steps[1].sum(0),
            at_most=config.drop / 5,  # lingering large steps would give about the drop itself
            source=f"{SLUG} R2",
            spread=steps[0].sum(0) / steps[1].sum(0),
        ),
        control(
            "with a schedule the two forms differ, largest distance", (inside - outside).abs().amax(0), at_least=1e-5, source=f"{SLUG} R2"
        ),
        control("a step at rate 0 still moves (inside): size", kept, at_least=1e-7, source=f"{SLUG} R2"),
    )
    return Part(checks)


# ------------------------------------------------------------------------------------------------ A3, R3, R4, R6: bounds and limits


@dataclass(frozen=True)
class BoundConfig:
    """Gradients chosen to make updates large: growing g_t = r^t for LaProp, g_t = (nu / mu)^t for Adam; float64, eps 1e-300.

    ``white``: N(0, 1) gradients of that many coordinates for the size of an ordinary update. ``centred``: constant gradients.
    """

    mu: float = 0.9
    nus: tuple[float, ...] = (0.1, 0.5, 0.999)
    growth: float = 30.0
    steps: int = 40
    early: int = 10
    white: int = 20_000
    white_steps: int = 100
    centred_nu: float = 0.9
    seeds: tuple[int, ...] = (0, 1, 2)


def adam_bound(mu: float, nu: float, t: int) -> float:
    """R3: the largest abs(u) of Adam after t steps, by Cauchy-Schwarz."""
    series = sum((mu * mu / nu) ** k for k in range(t))
    return (1 - mu) / math.sqrt(1 - nu) * math.sqrt(series) * math.sqrt(1 - nu**t) / (1 - mu**t)


def laprop_bound(nu: float, t: int) -> float:
    """R3: max_s sqrt((1 - nu^s) / (1 - nu)), s <= t."""
    return math.sqrt((1 - nu**t) / (1 - nu))


def bounds(config: BoundConfig) -> Part:
    """A3, A5, R3, R4, R6: LaProp's updates are bounded for all betas, Adam's only while mu^2 < nu; the limits are sign and Adam."""
    mu, rows = config.mu, []
    for nu in config.nus:
        for t in (config.early, config.steps):
            growing = torch.tensor([[config.growth**s] for s in range(t)], dtype=torch.float64)
            fading = torch.tensor([[(nu / mu) ** s] for s in range(t)], dtype=torch.float64)
            rows.append(
                (nu, t, last_update(adam(mu, nu), fading), last_update(laprop(mu, nu), growing), last_update(laprop(mu, nu), fading))
            )
    draws = Ensemble(config.seeds)
    gradients = draws.normal(config.steps).T
    ones = [1.0] * config.steps
    momentum, signs = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for t, g in enumerate(gradients, 1):
        momentum = mu * momentum + (1 - mu) * g.sign()
        signs = signs - momentum / (1 - mu**t)
    centred = torch.ones(config.steps, 1, dtype=torch.float64)
    exploding = last_update(lambda p: LaProp([p], lr=1.0, betas=(0.0, config.centred_nu), centered=True), centred)
    white, expected, error = white_updates(config, draws)
    short = [row for row in rows if row[1] == config.early]
    checks = (
        match(
            "Adam's worst case is its bound (mu = .9; every nu and t)",
            [adam_bound(mu, row[0], row[1]) for row in rows],
            [row[2] for row in rows],
            1e-3,
            relative=True,
            source=f"{SLUG} A3, R3",
        ),
        holds(
            "LaProp stays below sqrt((1 - nu^t) / (1 - nu)) on growing gradients (every nu and t)",
            [row[3] for row in rows],
            at_most=[laprop_bound(row[0], row[1]) for row in rows],
            source=f"{SLUG} R3",
        ),
        holds(
            "... and ends within 1 % of it where nu is far from 1",
            [row[3] / laprop_bound(row[0], row[1]) for row in rows if row[0] <= 0.5 and row[1] == config.steps],
            at_least=0.99,
            source=f"{SLUG} R3",
        ),
        holds(
            "on the gradients that are worst for Adam LaProp stays below 1 / sqrt(1 - nu)",
            [row[4] for row in rows],
            at_most=[(1 - row[0]) ** -0.5 for row in rows],
            source=f"{SLUG} R3",
        ),
        control(
            "mu^2 > nu: Adam's update, over its value 30 steps before",
            [b[2] / a[2] for a, b in zip(rows[::2], rows[1::2], strict=True) if mu * mu > b[0]],
            at_least=100.0,
            source=f"{SLUG} R3",
        ),
        control(
            "bounded is not small: at nu = .999 LaProp's bound over Adam's",
            laprop_bound(0.999, 10**6) / adam_bound(mu, 0.999, 10**4),
            at_least=4.0,
            source=f"{SLUG} R3",
        ),
        match("nu = 0: momentum of signs", signs, walk(laprop(mu, 0.0), gradients, ones)[-1], 1e-12, source=f"{SLUG} A5, R4"),
        match(
            "mu = 0: Adam with mu = 0",
            walk(adam(0.0, 0.99), gradients, ones)[-1],
            walk(laprop(0.0, 0.99), gradients, ones)[-1],
            1e-12,
            source=f"{SLUG} R4",
        ),
        match(
            "white gradients: update RMS = sqrt((1 - mu) / (1 + mu)), each seed (5 standard errors)",
            expected,
            white,
            5 * error,
            source=f"{SLUG} pitfalls",
            spread=white,
        ),
        match(
            "centred, constant gradients: u = nu^(-t / 2)",
            config.centred_nu ** (-config.steps / 2),
            exploding,
            1e-3,
            relative=True,
            source=f"{SLUG} R6",
        ),
        control(
            "not centred, constant gradients: u",
            last_update(laprop(0.0, config.centred_nu), centred),
            at_most=1 + 1e-9,
            source=f"{SLUG} R6",
        ),
    )
    labels = [f"nu = {row[0]:g}" for row in short]
    late = [row for row in rows if row[1] == config.steps]
    series = [{"name": name, "y": [row[i] for row in late]} for name, i in (("Adam", 2), ("LaProp", 3))]
    figure = Figure(
        f"Largest update after {config.steps} adversarial steps",
        {"labels": labels, "series": series, "y": "|u|", "log": "y"},
        bars,
        "Each optimiser on the gradients that are worst for it.",
    )
    return Part(checks, (figure,))


def laprop(mu: float, nu: float, **options: Any) -> Callable[[Tensor], torch.optim.Optimizer]:
    """A maker of LaProp with rate 1 and no eps to speak of."""
    return lambda p: LaProp([p], lr=1.0, betas=(mu, nu), eps=1e-300, **options)


def adam(mu: float, nu: float) -> Callable[[Tensor], torch.optim.Optimizer]:
    """A maker of Adam with rate 1 and no eps to speak of."""
    return lambda p: torch.optim.Adam([p], lr=1.0, betas=(mu, nu), eps=1e-300)


def last_update(make: Callable[[Tensor], torch.optim.Optimizer], gradients: Tensor) -> float:
    """abs(u) of the last step at rate 1."""
    p = torch.zeros_like(gradients[0], requires_grad=True)
    optimizer = make(p)
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        # from zero, or a small step beside a large position would be lost to rounding
        moved = (p.detach() - before).abs().max()
        with torch.no_grad():
            p.zero_()
    return float(moved)


def white_updates(config: BoundConfig, draws: Ensemble) -> tuple[Tensor, float, float]:
    """RMS of the update of N(0, 1) gradients for each seed, its prediction, and the standard error of one seed."""
    p = torch.zeros(len(config.seeds), config.white, dtype=torch.float64, requires_grad=True)
    optimizer = LaProp([p], betas=(config.mu, 0.999))
    for _ in range(config.white_steps):
        p.grad = draws.normal(config.white)
        optimizer.step()
    square = optimizer.updates()[0].square()
    # g_s^2 over the mean of the g^2 so far has mean 1 by exchange, so u is an average of uncorrelated signals of unit size
    mu, t = config.mu, config.white_steps
    expected = math.sqrt((1 - mu) / (1 + mu) * (1 + mu**t) / (1 - mu**t))
    error = float((square.std(1) / config.white**0.5).max()) / (2 * expected)
    return square.mean(1).sqrt(), expected, error


# ------------------------------------------------------------------------------------------------ A4, R5: the online problem


@dataclass(frozen=True)
class OnlineConfig:
    """Reddi's problem: losses g_t x on [-1, 1], g = C at every third step and -1 otherwise; rate lr / sqrt t; start 0, projected.

    The best fixed point is x = -1. Deterministic. nu = 1 / (1 + C^2) is the value that defeats RMSProp.
    """

    cost: float = 3.0
    nus: tuple[float, ...] = (0.99, 0.999)
    mu: float = 0.9
    lr: float = 0.5
    steps: int = 20_000


def play(optimizers: Sequence[torch.optim.Optimizer], params: Sequence[Tensor], config: OnlineConfig) -> tuple[list[float], list[float]]:
    """Last positions and average regrets."""
    regret = [0.0] * len(params)
    for t in range(1, config.steps + 1):
        g = config.cost if t % 3 == 1 else -1.0
        for i, (optimizer, p) in enumerate(zip(optimizers, params, strict=True)):
            regret[i] += g * (p.item() + 1) / config.steps
            optimizer.param_groups[0]["lr"] = config.lr / math.sqrt(t)
            p.grad = torch.full_like(p, g)
            optimizer.step()
            with torch.no_grad():
                p.clamp_(-1, 1)
    return [p.item() for p in params], regret


def online(config: OnlineConfig) -> Part:
    """A4, R5: small nu inherits the bias of sign methods, momentum or not; amsgrad mends it."""
    hard = 1 / (1 + config.cost**2)
    cases: list[tuple[str, Callable[[Tensor], torch.optim.Optimizer]]] = [
        ("LaProp, mu = 0", laprop(0.0, hard)),
        ("LaProp", laprop(config.mu, hard)),
        ("Adam", adam(config.mu, hard)),
        ("LaProp, amsgrad", laprop(config.mu, hard, amsgrad=True)),
        *((f"LaProp, nu = {nu:g}", laprop(config.mu, nu)) for nu in config.nus),
    ]
    params = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in cases]
    last, regret = play([make(p) for (_, make), p in zip(cases, params, strict=True)], params, config)
    worst = 2 * (config.cost - 2) / 3  # average regret of staying at x = +1
    checks = (
        match("nu = 1 / (1 + C^2): LaProp ends at the worst point, x = 1 (mu = 0 and .9)", 1.0, last[:2], 1e-2, source=f"{SLUG} A4, R5"),
        match("... with the average regret of that point", worst, regret[:2], 1e-2, source=f"{SLUG} R5"),
        holds("amsgrad mends it: average regret", regret[3], at_most=0.02, source=f"{SLUG} A4, R5"),
        holds("and so does nu = .99, .999: average regret", regret[4:], at_most=0.02, source=f"{SLUG} R5"),
        control("Adam with momentum at the same nu: average regret", regret[2], at_most=0.02, source=f"{SLUG} R5"),
    )
    data = {"labels": [name for name, _ in cases], "series": [{"name": "average regret", "y": regret}], "y": "regret"}
    return Part(checks, (Figure("An online problem made to defeat adaptive steps", data, bars, "C = 3; unlabelled nu are 1 / (1 + C^2)."),))


# ------------------------------------------------------------------------------------------------ A2, R7: where Adam diverges


@dataclass(frozen=True)
class DivergenceConfig:
    """``hidden`` ReLU layers of ``width`` on the digits (all 1797), cross-entropy, batches of ``batch``, mu = .9; float32, eps 1e-15."""

    hidden: int = 9
    width: int = 48
    nus: tuple[float, ...] = (0.7, 0.5)
    safe: float = 0.999
    mu: float = 0.9
    lr: float = 1e-3
    batch: int = 32
    steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)


def train_deep(config: DivergenceConfig, nu: float, separate: bool) -> tuple[Tensor, Tensor, list[list[float]]]:
    """Largest abs(u) and mean loss of the last 50 steps of each seed; the running largest abs(u), every 10 steps."""
    split = digits()
    x, y = torch.cat([split.x, split.x_test]), torch.cat([split.y, split.y_test])
    draws = Ensemble(config.seeds)
    weights = networks(draws, [64, *[config.width] * config.hidden, 10])
    kind = LaProp if separate else torch.optim.Adam
    optimizer = kind(weights, lr=config.lr, betas=(config.mu, nu), eps=1e-15)
    largest, losses, path = torch.zeros(len(config.seeds)), [], []
    for step in range(config.steps):
        rows = draws.integers(len(x), config.batch)
        optimizer.zero_grad()
        loss = cross_entropies(outputs(weights, x[rows]), y[rows])
        loss.sum().backward()  # type: ignore[no-untyped-call]
        before = [w.detach().clone() for w in weights]
        optimizer.step()
        size = torch.stack([(w.detach() - b).abs().amax((1, 2)) for w, b in zip(weights, before, strict=True)]).amax(0) / config.lr
        largest = torch.maximum(largest, torch.nan_to_num(size, nan=0.0, posinf=0.0))  # once a net is NaN its last finite step counts
        losses.append(loss.detach())
        if step % 10 == 9:
            path.append(largest.tolist())
    return largest.double(), torch.stack(losses[-50:]).mean(0).double(), path


def divergence(config: DivergenceConfig) -> Part:
    """A2, R7: with nu < mu^2 Adam's steps explode on a deep network, LaProp's do not."""
    checks, series = [], []
    x = [10.0 * (i + 1) for i in range(config.steps // 10)]
    for i, nu in enumerate(config.nus):
        adam_size, adam_loss, adam_path = train_deep(config, nu, separate=False)
        size, loss, path = train_deep(config, nu, separate=True)
        relation = "<" if nu < config.mu**2 else ">"
        checks += [
            holds(
                f"nu = {nu:g} {relation} mu^2: LaProp's largest |u| is below 1 / sqrt(1 - nu)",
                size,
                at_most=(1 - nu) ** -0.5 * (1 + 1e-4),
                source=f"{SLUG} A2, R3",
                spread=size,
            ),
            holds(
                f"nu = {nu:g}: LaProp's loss stays finite, below 2 log 10", loss, at_most=2 * math.log(10), source=f"{SLUG} A2", spread=loss
            ),
        ]
        if nu < config.mu**2:
            checks.append(control(f"nu = {nu:g}: Adam's largest |u|", adam_size, at_least=1e3, source=f"{SLUG} A2, R7", spread=adam_size))
        for name, lines, colour in ((f"Adam, nu = {nu:g}", adam_path, 1), (f"LaProp, nu = {nu:g}", path, 0)):
            mark = "line" if i == 0 else "dash"
            series.append({"name": name, "x": x, "y": [max(line) for line in lines], "mark": mark, "colour": colour})
    adam_size, adam_loss, _ = train_deep(config, config.safe, separate=False)
    size, loss, _ = train_deep(config, config.safe, separate=True)
    checks += [
        control(
            f"nu = {config.safe:g} > mu^2: Adam's largest |u|",
            adam_size,
            at_most=adam_bound(config.mu, config.safe, 10**4),
            source=f"{SLUG} R7",
        ),
        holds(
            f"nu = {config.safe:g}: LaProp's loss against Adam's, difference of the means over seeds",
            (loss.mean() - adam_loss.mean()).abs(),
            at_most=3 * float((loss.var() + adam_loss.var()).sqrt()) + 0.1,
            source=f"{SLUG} R7",
            spread=loss - adam_loss,
        ),
    ]
    data = {"series": series, "x": "step", "y": "largest |u| so far, worst seed", "log": "y"}
    return Part(tuple(checks), (Figure("A ten-layer network with short memory in the second moment", data, curves),))


# ------------------------------------------------------------------------------------------------ R8: noisy Rosenbrock


@dataclass(frozen=True)
class RosenbrockConfig:
    """(1 - x + e1)^2 + 100 (y - x^2 + e2)^2, e uniform(-s, s), from (0, 0); ``replicas`` runs of each seed, float64, mu = .9."""

    noise: float = 0.04
    nus: tuple[float, ...] = (0.1, 0.5)
    safe: float = 0.999
    mu: float = 0.9
    lr: float = 2e-4
    steps: int = 15_000
    replicas: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)


def descend(config: RosenbrockConfig, nu: float, separate: bool) -> tuple[Tensor, Tensor]:
    """Largest abs(u) and mean distance to (1, 1) at the end, for each seed."""
    draws = Ensemble(config.seeds)
    p = torch.zeros(len(config.seeds), config.replicas, 2, dtype=torch.float64, requires_grad=True)
    optimizer = (LaProp if separate else torch.optim.Adam)([p], lr=config.lr, betas=(config.mu, nu), eps=1e-15)
    largest = torch.zeros(len(config.seeds), dtype=torch.float64)
    block = 500
    for step in range(config.steps):
        if step % block == 0:
            noise = config.noise * (2 * draws.uniform(block, config.replicas, 2) - 1)
        before = p.detach().clone()
        x, y, e = before[..., 0], before[..., 1], noise[:, step % block]
        bend = y - x * x + e[..., 1]
        p.grad = torch.stack([-2 * (1 - x + e[..., 0]) - 400 * x * bend, 200 * bend], -1)
        optimizer.step()
        largest = torch.maximum(largest, (p.detach() - before).abs().amax((1, 2)) / config.lr)
    return largest, (p.detach() - 1).norm(dim=-1).mean(1)


def rosenbrock(config: RosenbrockConfig) -> Part:
    """R8: the update-size claim holds on a noisy valley; a better end point does not follow from it."""
    checks = []
    for nu in config.nus:
        theirs, their_end = descend(config, nu, separate=False)
        ours, our_end = descend(config, nu, separate=True)
        bound = (1 - nu) ** -0.5
        checks += [
            holds(f"nu = {nu:g}: LaProp's largest |u|", ours, at_most=bound * (1 + 1e-6), source=f"{SLUG} R8, R3", spread=ours),
            control(
                f"nu = {nu:g}: Adam's largest |u| is beyond LaProp's bound", theirs, at_least=bound, source=f"{SLUG} R8", spread=theirs
            ),
            control(
                f"nu = {nu:g}: no better end: LaProp's distance to the minimum less Adam's",
                our_end - their_end,
                at_least=0.0,
                source=f"{SLUG} R8",
                spread=our_end,
            ),
        ]
    their_end, our_end = (descend(config, config.safe, separate=kind)[1] for kind in (False, True))
    checks.append(match(f"nu = {config.safe:g}: equal distances", their_end, our_end, 0.02, source=f"{SLUG} R8", spread=our_end))
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    recurrence: RecurrenceConfig | None = RecurrenceConfig()
    bounds: BoundConfig | None = BoundConfig()
    online: OnlineConfig | None = OnlineConfig()
    divergence: DivergenceConfig | None = DivergenceConfig()
    rosenbrock: RosenbrockConfig | None = RosenbrockConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "recurrence": recurrence,
    "bounds": bounds,
    "online": online,
    "divergence": divergence,
    "rosenbrock": rosenbrock,
}

ENTRY = Entry(
    slug=SLUG,
    title="LaProp: Separating Momentum and Adaptivity in Adam",
    paper="Liu Ziyin, Zhikang T. Wang, Masahito Ueda, 2020, arXiv 2002.04839",
    claims=(
        "Normalising gradients before averaging bounds every update for every pair of betas; Adam's are bounded only if mu^2 < nu.",
        "With nu < mu^2 Adam's steps explode on a deep network; LaProp trains.",
        "The limits are momentum of signs (nu = 0) and Adam (mu = 0); small nu inherits the bias of sign methods.",
        "Bounded is not small, nor better by itself: at the default betas the two do alike.",
    ),
    presets={
        "smoke": Config(online=OnlineConfig(steps=6000), divergence=None, rosenbrock=None),
        "default": Config(),
        "full": Config(
            recurrence=RecurrenceConfig(steps=2000, seeds=tuple(range(10))),
            online=OnlineConfig(steps=100_000),
            divergence=replace(DivergenceConfig(), nus=(0.9, 0.7, 0.5, 0.3), seeds=tuple(range(5))),
            rosenbrock=RosenbrockConfig(nus=(0.1, 0.5), replicas=64, seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
)
