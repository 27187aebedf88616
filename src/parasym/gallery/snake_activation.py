"""Neural Networks Fail to Learn Periodic Functions and How to Fix It: what nets do outside their data, and snake.

Slug snake-activation. snake_a(x) = x + sin^2(a x) / a.
"""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from parasym.core.errors import MissingExtraError
from parasym.core.guards import rng_state
from parasym.gallery.contract import Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import bars, curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.gallery.equivariance_toolbox import find_symmetries
from parasym.nn import Asymptote, Snake, extrapolation, fourier_snake, snake, snake_moments

SLUG = "snake-activation"
Activation = Callable[[Tensor], Tensor]


def activation_named(name: str) -> Activation:
    """ "relu", "tanh", "sin", or "snake A" with the frequency A."""
    kind, _, a = name.partition(" ")
    table: dict[str, Activation] = {"relu": torch.relu, "tanh": torch.tanh, "sin": torch.sin}
    return table[kind] if kind in table else lambda x: snake(x, float(a))


# ------------------------------------------------------------------------------------------------ A1, R3, R4: closed forms


@dataclass(frozen=True)
class MomentConfig:
    """Snake at N(0, 1) input by the trapezoidal rule on [-width, width]; ``depth`` layers of ``units`` for the initialisation."""

    frequencies: tuple[float, ...] = (0.2, 0.5, 0.56, 1.0, 2.0, 5.0, 20.0)
    width: float = 12.0
    points: int = 40_001
    harmonics: int = 8
    far: float = 1e5
    depth: int = 20
    units: int = 512
    inputs: int = 256
    peak: float = 0.66
    seeds: tuple[int, ...] = (0, 1, 2)


def moments(config: MomentConfig) -> Part:
    """A1, R3, R4: the moments, their peaks, what they are for, and a Fourier sum that is a snake network on all of R."""
    x = torch.linspace(-config.width, config.width, config.points, dtype=torch.float64)
    weight = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    theory, seen = [], []
    for a in config.frequencies:
        y, slope = snake(x, a), 1 + torch.sin(2 * a * x)
        mean, second = (weight * y).sum(), (weight * y * y).sum()
        seen.append(torch.stack([mean, second - mean**2, second, (weight * slope * slope).sum()]))
        theory.append(torch.stack(list(snake_moments(a))))
    grid = torch.linspace(0.3, 1.0, 700_001, dtype=torch.float64)
    table = snake_moments(grid)
    peaks = [grid[values.argmax()] for values in (table.variance, table.second)]
    slopes = [_peak(lambda a, index=index: float(snake_moments(a)[index])) for index in (1, 2)]  # type: ignore[misc]
    kept, grown = deep_signal(config, corrected=True), deep_signal(config, corrected=False)
    near, far = (triangle_error(config, start, torch.float64) for start in (-10.0, config.far))
    coarse = triangle_error(config, config.far, torch.float32)
    checks = (
        match("mean, variance, second moment and slope, every a", torch.stack(theory), torch.stack(seen), 1e-10, source=f"{SLUG} A1, R4"),
        match("where variance and second moment peak: grid against root of the derivative", slopes, peaks, 1e-4, source=f"{SLUG} A1, R4"),
        match(
            f"second moment after {config.depth} layers / before, gain 1 / sqrt(E[s^2]) (log)",
            0.0,
            kept.log(),
            0.5,
            source=f"{SLUG} R4",
            spread=kept,
        ),
        control(f"gain 1 and no correction: the same over {config.depth} layers", grown, at_least=10.0, source=f"{SLUG} R4", spread=grown),
        match("a triangle wave's 8 harmonics as a snake net: error on [-10, 10]", 0.0, near, 1e-10, source=f"{SLUG} R3"),
        match("... and on [1e5, 1e5 + 20]", 0.0, far, 1e-9, source=f"{SLUG} R3"),
        control("... in float32 there", coarse, at_least=1e-4, source=f"{SLUG} R3"),
    )
    axis = torch.logspace(-1, 1, 120, dtype=torch.float64)
    lines = snake_moments(axis)
    series = [{"name": name, "x": plain(axis), "y": plain(getattr(lines, name))} for name in ("variance", "second", "backward")]
    figure = Figure("Moments of snake at N(0, 1) input", {"series": series, "x": "a", "y": "moment", "log": "x"}, curves)
    return Part(checks, (figure,))


def _peak(f: Callable[[float], float]) -> float:
    """Argument of the maximum by golden section on [0.3, 1]."""
    low, high, ratio = 0.3, 1.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (left, high) if f(left) < f(right) else (low, right)
    return (low + high) / 2


def deep_signal(config: MomentConfig, corrected: bool) -> Tensor:
    """Second moment of the last layer over the first's, for each seed; uniform weights of variance gain^2 / fan-in, biases 0."""
    draws, a = Ensemble(config.seeds), config.peak
    gain = float(snake_moments(a).second) ** -0.5 if corrected else 1.0
    x = start = snake(draws.normal(config.inputs, config.units), a)
    for _ in range(config.depth):
        weight = (2 * draws.uniform(config.units, config.units) - 1) * gain * (3 / config.units) ** 0.5
        x = snake(x @ weight, a)
    return x.square().mean((1, 2)) / start.square().mean((1, 2))


def triangle_error(config: MomentConfig, start: float, dtype: torch.dtype) -> float:
    """Largest difference of the snake net from the partial Fourier sum it is made of, on [start, start + 20]."""
    orders = range(1, 2 * config.harmonics, 2)
    heights = [8 / (math.pi * n) ** 2 if n in orders else 0.0 for n in range(1, 2 * config.harmonics)]
    x = torch.linspace(start, start + 20, 4001, dtype=torch.float64)
    truth = sum((h * torch.cos(n * x) for n, h in enumerate(heights, 1)), torch.zeros_like(x))
    net = fourier_snake(0.0, heights, [0.0] * len(heights)).to(dtype)
    with torch.no_grad():
        return float((net(x[:, None].to(dtype))[:, 0].double() - truth).abs().max())


# ------------------------------------------------------------------------------------------------ small nets, many at once


def start_nets(draws: Ensemble, sizes: tuple[int, ...], kinds: int) -> list[Tensor]:
    """One float64 net for each kind and seed, (kinds, seeds, inputs + 1, outputs), torch's own start; the same for every kind."""
    nets = [(2 * draws.uniform(a + 1, b) - 1) / a**0.5 for a, b in pairwise(sizes)]
    return [w.repeat(kinds, 1, 1, 1).requires_grad_() for w in nets]


def evaluate(nets: list[Tensor], activations: list[Activation], x: Tensor) -> Tensor:
    """(kinds, seeds, n) outputs at x (n,)."""
    value = x[:, None].expand(*nets[0].shape[:2], -1, -1)
    for index, weight in enumerate(nets):
        value = value @ weight[..., :-1, :] + weight[..., -1:, :]
        if index < len(nets) - 1:
            value = torch.stack([f(part) for f, part in zip(activations, value, strict=True)])
    return value[..., 0]


def fit(nets: list[Tensor], activations: list[Activation], x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Full-batch least squares of all nets."""
    for _ in range(steps):
        optimizer.zero_grad()
        (evaluate(nets, activations, x) - y).square().mean(-1).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


# ------------------------------------------------------------------------------------------------ A2: asymptotes


@dataclass(frozen=True)
class AsymptoteConfig:
    """1-64-64-1 nets, float64, y = sin(4 pi x) at ``points`` in [-1, 1], full-batch Adam; judged on [1, 2] and far away."""

    activations: tuple[str, ...] = ("relu", "tanh", "snake 5")
    width: int = 64
    points: int = 128
    lr: float = 3e-3
    steps: int = 1500
    far: float = 1000.0
    seeds: tuple[int, ...] = (0, 1, 2)


def asymptotes(config: AsymptoteConfig) -> Part:
    """A2, R1, R2: far away a ReLU net is a line and a tanh net a constant, exactly; a snake net keeps moving."""
    draws = Ensemble(config.seeds)
    kinds = [activation_named(name) for name in config.activations]
    nets = start_nets(draws, (1, config.width, config.width, 1), len(kinds))
    x = torch.linspace(-1, 1, config.points, dtype=torch.float64)
    fit(nets, kinds, x, torch.sin(4 * math.pi * x), torch.optim.Adam(nets, lr=config.lr), config.steps)
    outside = torch.linspace(1, 2, 200, dtype=torch.float64)
    far = torch.linspace(config.far, config.far + 10, 401, dtype=torch.float64)
    with torch.no_grad():
        error = (evaluate(nets, kinds, outside) - torch.sin(4 * math.pi * outside)).square().mean(-1)
        shape = evaluate(nets, kinds, torch.linspace(-2, 2, 401, dtype=torch.float64))
    tails = [[_tail(nets, kinds, i, j, far) for j in range(len(config.seeds))] for i in range(len(kinds))]
    left = torch.tensor([[tail.residual for tail in row] for row in tails], dtype=torch.float64)
    relu, tanh, wave = (next(i for i, name in enumerate(config.activations) if name.startswith(key)) for key in ("relu", "tanh", "snake"))
    checks = (
        holds("ReLU, far away: RMS about the best line", left[relu], at_most=1e-8, source=f"{SLUG} A2, R1", spread=left[relu]),
        holds("tanh, far away: RMS about the best line", left[tanh], at_most=1e-8, source=f"{SLUG} A2, R2", spread=left[tanh]),
        holds("tanh: change over the range", [tail.change for tail in tails[tanh]], at_most=1e-8, source=f"{SLUG} R2"),
        control(
            "ReLU: its line is not a constant: change over the range", [t.change for t in tails[relu]], at_least=1.0, source=f"{SLUG} R1"
        ),
        control("snake, far away: RMS about the best line", left[wave], at_least=0.05, source=f"{SLUG} A2", spread=left[wave]),
        holds("snake: mean squared error on [1, 2]", error[wave], at_most=0.4, source=f"{SLUG} A2", spread=error[wave]),
        control("ReLU and tanh on [1, 2]: worse than predicting zero (.5)", error[[relu, tanh]], at_least=0.5, source=f"{SLUG} A2"),
    )
    z = plain(torch.linspace(-2, 2, 401, dtype=torch.float64))
    series = [{"name": name, "x": z, "y": plain(shape[i, 0].clamp(-3, 3))} for i, name in enumerate(config.activations)]
    series.append({"name": "target", "x": z, "y": [math.sin(4 * math.pi * t) for t in z], "mark": "dash"})
    figure = Figure("Fitted on [-1, 1], shown on [-2, 2]", {"series": series, "x": "x", "y": "f"}, curves, "First seed; cut off at 3.")
    return Part(checks, (figure,))


def _tail(nets: list[Tensor], kinds: list[Activation], i: int, j: int, far: Tensor) -> Asymptote:
    single = [w[i : i + 1, j : j + 1].detach() for w in nets]
    return extrapolation(lambda x: evaluate(single, [kinds[i]], x[:, 0])[0, 0], torch.ones(1, dtype=torch.float64), far)


# ------------------------------------------------------------------------------------------------ A3: a real season


@dataclass(frozen=True)
class WeatherConfig:
    """Weekly means of the mean of daily maximum and minimum temperature in Seattle, 2012-2015; the first 156 weeks train.

    t in years, temperature standardised by the training part; 1-64-64-1, float64, full-batch Adam with weight decay.
    """

    activations: tuple[str, ...] = ("snake 20", "relu", "tanh", "snake 0.01")
    width: int = 64
    lr: float = 2e-3
    decay: float = 1e-4
    steps: int = 2000
    train_weeks: int = 156
    seeds: tuple[int, ...] = (0, 1, 2)


def seattle() -> Tensor:
    """Weekly mean temperatures (208,), degrees Celsius, from the vega-datasets package (read as a file, without its imports).

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("the Seattle temperatures come with vega-datasets: pip install 'parasym[data]'")
    path = Path(next(iter(spec.submodule_search_locations))) / "_data" / "seattle-weather.csv"
    with path.open(newline="") as file:
        days = [(float(row["temp_max"]) + float(row["temp_min"])) / 2 for row in csv.DictReader(file)]
    weeks = len(days) // 7
    return torch.tensor(np.asarray(days[: 7 * weeks]).reshape(weeks, 7).mean(1))


def weather(config: WeatherConfig) -> Part:
    """A3: a year that was not seen, from three that were."""
    value = seattle()
    t = 7 * torch.arange(len(value), dtype=torch.float64) / 365.25
    cut = config.train_weeks
    y = (value - value[:cut].mean()) / value[:cut].std()
    kinds = [activation_named(name) for name in config.activations]
    nets = start_nets(Ensemble(config.seeds), (1, config.width, config.width, 1), len(kinds))
    fit(nets, kinds, t[:cut], y[:cut], torch.optim.Adam(nets, lr=config.lr, weight_decay=config.decay), config.steps)
    with torch.no_grad():
        guess = evaluate(nets, kinds, t)
    error = (guess - y)[..., cut:].square().mean(-1)
    by = {name: error[i] for i, name in enumerate(config.activations)}
    season = torch.stack([y[week % 52 : cut : 52].mean() for week in range(cut, len(y))])
    climatology = (season - y[cut:]).square().mean()
    checks = (
        holds("snake, a = 20: error on the unseen year", by["snake 20"], at_most=0.25, source=f"{SLUG} A3", spread=by["snake 20"]),
        holds("... against twice that of the mean of past years", by["snake 20"], at_most=2 * climatology, source=f"{SLUG} A3"),
        control("ReLU: error on the unseen year", by["relu"], at_least=0.9, source=f"{SLUG} A3", spread=by["relu"]),
        control("tanh: error on the unseen year", by["tanh"], at_least=0.9, source=f"{SLUG} A3", spread=by["tanh"]),
        control("a = .01, nearly the identity", by["snake 0.01"], at_least=0.9, source=f"{SLUG} A3", spread=by["snake 0.01"]),
    )
    labels = [f"{name}, seed {seed}" for name in config.activations for seed in config.seeds]
    x = plain(t)
    series = [{"name": "measured", "x": x, "y": plain(y), "mark": "points"}]
    series += [{"name": name, "x": x, "y": plain(guess[i, 0].clamp(-4, 4))} for i, name in enumerate(config.activations) if name in _SHOWN]
    figures = (
        Figure(
            "Seattle, weekly temperature",
            {"series": series, "x": "years", "y": "standardised"},
            curves,
            f"Training ends at {float(t[cut]):.2f}.",
        ),
        Figure(
            "Error on the unseen year",
            {"labels": labels, "series": [{"name": "MSE", "y": plain(error.flatten())}], "y": "MSE", "log": "y"},
            bars,
        ),
    )
    return Part(checks, figures)


_SHOWN = ("snake 20", "relu", "tanh")


# ------------------------------------------------------------------------------------------------ A4: the symmetries of snake


@dataclass(frozen=True)
class SymmetryConfig:
    """2-16-1 snake nets with one learnable frequency for each unit, float64; regression on sin(3 x_1) by full-batch descent to time 1."""

    units: int = 16
    samples: int = 64
    etas: tuple[float, ...] = (1e-3, 5e-4)
    time: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)


def symmetry(config: SymmetryConfig) -> Part:
    """A4: (w, b, a, v) -> (w / c, b / c, c a, c v) and the lattice b -> b + k pi / a are symmetries; the first has a charge."""
    draws, m = Ensemble(config.seeds), config.units
    x = draws.normal(config.samples, 2)
    y = torch.sin(3 * x[..., 0])
    w, b, v = draws.normal(m, 2) / 2**0.5, draws.normal(m), draws.normal(m) / m**0.5
    a, c = 0.5 + 2 * draws.uniform(m), torch.zeros(len(config.seeds), dtype=torch.float64)
    base = _snake_net(x, (w, b, a, v, c))
    scale, turns = 0.5 + draws.uniform(m), draws.integers(5, m) - 2
    scaled = _snake_net(x, (w / scale[..., None], b / scale, a * scale, v * scale, c))
    shift = turns.double() * math.pi / a
    shifted = _snake_net(x, (w, b + shift, a, v, c - (v * shift).sum(-1)))
    relu_like = _snake_net(x, (w / scale[..., None], b / scale, a, v * scale, c))
    drifts, moves = [], []
    for eta in config.etas:
        drift, moved = charge_drift(config, eta, x, y, (w, b, a, v, c))
        drifts.append(drift)
        moves.append(moved)
    ratio = drifts[0] / drifts[1]
    checks = (
        match("rescaling with the frequency: change of the output", 0.0, (scaled - base).abs().amax(1), 1e-12, source=f"{SLUG} A4"),
        match(
            "shift of a bias by k pi / a, absorbed: change of the output", 0.0, (shifted - base).abs().amax(1), 1e-12, source=f"{SLUG} A4"
        ),
        control(
            "ReLU's rescaling (a untouched): change of the output", (relu_like - base).abs().amax(1), at_least=1e-2, source=f"{SLUG} A4"
        ),
        match(
            "drift of |w|^2 + b^2 - a^2 - v^2 is first order in eta: ratio at two rates",
            config.etas[0] / config.etas[1],
            ratio,
            0.1,
            source=f"{SLUG} A4",
            spread=drifts[0],
        ),
        holds("meanwhile the weights move", moves[0], at_least=1e-2, source=f"{SLUG} A4", spread=moves[0]),
        control("and the drift is far smaller than that move", drifts[0] / moves[0], at_most=0.1, source=f"{SLUG} A4"),
    )
    return Part(checks)


Net = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _snake_net(x: Tensor, net: Net) -> Tensor:
    """(seeds, n) outputs of w (seeds, m, 2), b, a, v (seeds, m), c (seeds,)."""
    w, b, a, v, c = net
    return (snake(x @ w.mT + b[:, None], a[:, None]) * v[:, None]).sum(-1) + c[:, None]


def charge_drift(config: SymmetryConfig, eta: float, x: Tensor, y: Tensor, net: Net) -> tuple[Tensor, Tensor]:
    """Largest change of a unit's charge and of any weight, for each seed."""
    parts = [part.clone().requires_grad_() for part in net]

    def charge() -> Tensor:
        w, b, a, v = (part.detach() for part in parts[:4])
        return w.square().sum(-1) + b.square() - a.square() - v.square()

    first = charge()
    for _ in range(round(config.time / eta)):
        loss = (_snake_net(x, (parts[0], parts[1], parts[2], parts[3], parts[4])) - y).square().mean(1).sum()
        slopes = torch.autograd.grad(loss, parts)
        with torch.no_grad():
            for part, slope in zip(parts, slopes, strict=True):
                part -= eta * slope
    moved = torch.stack([(p.detach() - q).abs().flatten(1).amax(1) for p, q in zip(parts[:4], net[:4], strict=True)]).amax(0)
    return (charge() - first).abs().amax(1), moved


# ------------------------------------------------------------------------------------------------ A4, by discovery


@dataclass(frozen=True)
class DiscoveryConfig:
    """Linear(2, units) - Snake - Linear(units, 1), float64, torch's own start, frequencies U(1, 2); the library's own search."""

    units: int = 4
    samples: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)


def discovery(config: DiscoveryConfig) -> Part:
    """A4: the search finds one rescaling for each unit whose frequency is a parameter, and none where it is a constant."""
    counts = {learnable: [_count(config, seed, learnable) for seed in config.seeds] for learnable in (True, False)}
    checks = (
        match("learnable frequencies: continuous symmetries found = units", config.units, counts[True], 0, source=f"{SLUG} A4"),
        control("constant frequencies: continuous symmetries found", counts[False], at_most=0, source=f"{SLUG} A4"),
    )
    return Part(checks)


def _count(config: DiscoveryConfig, seed: int, learnable: bool) -> int:
    with rng_state():
        torch.manual_seed(seed)
        layer = Snake(config.units, learnable=learnable)
        model = nn.Sequential(nn.Linear(2, config.units), layer, nn.Linear(config.units, 1)).double()
    draws = Ensemble((seed,))
    with torch.no_grad():
        layer.a.add_(draws.uniform(config.units)[0])
    return sum(symmetry.dim for symmetry in find_symmetries(model, draws.normal(config.samples, 2)[0], seed))


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    moments: MomentConfig | None = MomentConfig()
    asymptotes: AsymptoteConfig | None = AsymptoteConfig()
    weather: WeatherConfig | None = WeatherConfig()
    symmetry: SymmetryConfig | None = SymmetryConfig()
    discovery: DiscoveryConfig | None = DiscoveryConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "moments": moments,
    "asymptotes": asymptotes,
    "weather": weather,
    "symmetry": symmetry,
    "discovery": discovery,
}

ENTRY = Entry(
    slug=SLUG,
    title="Neural Networks Fail to Learn Periodic Functions and How to Fix It",
    paper="Liu Ziyin, Tilman Hartwig, Masahito Ueda, NeurIPS 2020, arXiv 2006.08195",
    claims=(
        "Outside their data ReLU nets are lines and tanh nets constants, exactly.",
        "Snake nets extrapolate periodically: a Fourier sum is a snake net on all of R.",
        "The moments of snake, closed form, tell how to initialise it.",
        "Snake has no rescaling symmetry but one together with its frequency, with a conserved charge, and a lattice of bias shifts.",
    ),
    presets={
        "smoke": Config(asymptotes=None, weather=None),
        "default": Config(),
        "full": Config(
            moments=MomentConfig(depth=50, seeds=tuple(range(5))),
            asymptotes=AsymptoteConfig(seeds=tuple(range(10))),
            weather=WeatherConfig(("snake 20", "snake 10", "snake 5", "sin", "relu", "tanh", "snake 0.01"), seeds=tuple(range(10))),
            symmetry=SymmetryConfig(seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
)
