"""Stochastic Neural Networks with Infinite Width are Deterministic.

Slug stochastic-networks-deterministic. Units carry independent multiplicative noise of mean 1 and variance s^2 = p / (1 - p); the loss
is the mean over samples of E |f - y|^2 = bias^2 + variance, no 1/2, full batch, no decay where not said. A wider network is grown from a
narrower one by copying units, never restarted: independent restarts measure the optimiser, not the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from parasym.core.guards import rng_state
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble
from parasym.methods.replicate import marginal_dropout_loss, predictive_variance, replicate, variance_bound
from parasym.solvable.engines import Loss, Params, lbfgs_restarts, settle
from parasym.solvable.latent import LinearLVM
from parasym.solvable.linear_nets import DeepLinear

SLUG = "stochastic-networks-deterministic"


def log_slope(widths: tuple[int, ...] | list[int], values: list[float]) -> float:
    """Exponent of a power law through the points."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


# ------------------------------------------------------------------------------------------------ R1, R4: copies


@dataclass(frozen=True)
class CopyConfig:
    """A random ReLU network of 12 units and dropout .5, copied; and one with a tanh layer after the dropout."""

    units: int = 12
    copies: tuple[int, ...] = (2, 5)
    samples: int = 20_000
    tail_copies: tuple[int, ...] = (8, 16, 32)
    seeds: tuple[int, ...] = (0, 1, 2)


def copies(config: CopyConfig) -> Part:
    """R1, R4: the mean is kept, the variance divided exactly; behind a nonlinear tail to leading order."""
    means, ratios, sampled, expected, tail, losses = [], [], [], [], [], []
    for seed in config.seeds:
        with rng_state():
            torch.manual_seed(seed)
            x = torch.randn(6, 3, dtype=torch.float64)
            model = nn.Sequential(nn.Linear(3, config.units), nn.ReLU(), nn.Dropout(0.5), nn.Linear(config.units, 2)).double()
            y = torch.randn(6, 2, dtype=torch.float64)
            deep = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        with torch.no_grad():
            own = predictive_variance(model, x, exact=True)
            draws = predictive_variance(model, x, config.samples, seed=seed)
            z = (draws / own - 1) / (2 / config.samples) ** 0.5  # the sample variance of a nearly Gaussian sum
            sampled.append(float(z.abs().max()))
            bias = (model.eval()(x) - y).square().sum(-1).mean()
            losses.append(float(marginal_dropout_loss(model, x, y) - bias - own.sum(-1).mean()))
            for k in config.copies:
                wide = replicate(model, 0, k).eval()
                means.append(float((wide(x) - model(x)).abs().max()))
                ratios.append(own / predictive_variance(wide, x, exact=True))
                expected.append(torch.full_like(own, k))
            spread = [float(predictive_variance(replicate(deep, 0, k), x, config.samples, seed=seed).mean()) for k in config.tail_copies]
            tail.append(log_slope(config.tail_copies, spread))
    return Part(
        (
            match("copied units: largest change of the mean function", 0.0, means, 1e-12, source=f"{SLUG} R1"),
            match("copied units: variance divided by", torch.stack(expected), torch.stack(ratios), 1e-10, source=f"{SLUG} R1"),
            match("loss averaged over dropout minus bias^2 minus variance", 0.0, losses, 1e-12, source=f"{SLUG} R7"),
            holds("sampled variance against s^2 sum u_i^2 h_i^2, largest of 12 deviations in standard errors", sampled, at_most=4.0,
                  source=f"{SLUG} R4", spread=sampled),
            match("a tanh layer after the noise: exponent of the variance", -1.0, tail, 0.1, source=f"{SLUG} R1", spread=tail),
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ A1, R3: linear networks


@dataclass(frozen=True)
class LinearConfig:
    """A = diag(2.2, 1, .5, .2), E = (.9, .5, -.4, .3), s^2 = .5, gamma = .05, all hidden widths equal."""

    widths: tuple[int, ...] = (4, 16, 64, 256)
    trained: tuple[int, ...] = (4, 16)
    depths: tuple[int, ...] = (1, 2)
    noise: float = 0.5
    decay: float = 0.05
    samples: int = 200_000
    seeds: tuple[int, ...] = (0, 1, 2)


def linear(config: LinearConfig) -> Part:
    """A1, R3: Var f / (E f)^2 = prod(1 + s^2 / d) - 1 at the minimum, sampled and from trained networks."""
    checks: list[Check] = []
    series = []
    for depth in config.depths:
        ratios = []
        for width in config.widths:
            model = DeepLinear(torch.diag(torch.tensor([2.2, 1, 0.5, 0.2])), torch.tensor([0.9, 0.5, -0.4, 0.3]), 2.0, (width,) * depth,
                               (config.noise,) * depth, config.decay)  # fmt: skip
            ratios.append(model.kappa - 1)
            if width not in config.trained:
                continue
            seen = [model.simulate("variance", seed, config.samples / 400_000).values["relative variance"] for seed in config.seeds]
            tolerance = 3 * max(float(s.stderr or 0.0) for s in seen)
            values = [float(s) for s in seen]
            words = f"D = {depth}, width {width}: Var f / (E f)^2 of a trained network, sampled"
            checks.append(match(words, ratios[-1], values, tolerance, source=f"{SLUG} A1, R3", spread=values))
        checks.append(match(f"D = {depth}: exponent in the width, the two widest", -1.0, log_slope(list(config.widths[-2:]), ratios[-2:]),
                            0.02, source=f"{SLUG} R3"))  # fmt: skip
        series.append({"name": f"{depth} hidden layer{'s' if depth > 1 else ''}", "x": list(config.widths), "y": ratios})
    figure = Figure("linear networks", {"series": series, "x": "width", "y": "Var f / (E f)^2", "log": "xy"}, curves, "Exactly 1/width.")
    return Part(tuple(checks), (figure,))


# ------------------------------------------------------------------------------------------------ A2, R2, R6: grown by copies


@dataclass(frozen=True)
class GrowthConfig:
    """Eight samples x ~ N(0, 1) of three inputs, y = relu(x1) - .5 relu(-x2) + .3 x3, s^2 = 1; f = u.relu(W x), read-out after noise."""

    start: int = 16
    doublings: int = 6
    restarts: int = 6
    steps: int = 3000
    polish: int = 300
    data_seeds: tuple[int, ...] = (0, 1, 2)
    slope: tuple[float, float] = (-1.1, -0.8)


def relu_data(seed: int, samples: int = 8) -> tuple[Tensor, Tensor]:
    """The data of A2 and A3."""
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(samples, 3)))
    return x, x[:, 0].relu() - 0.5 * (-x[:, 1]).relu() + 0.3 * x[:, 2]


def parts_of(w: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """bias^2 and variance at s^2 = 1, means over samples."""
    h = (x @ w["W"].mT).relu()
    return ((h * w["u"][..., None, :]).sum(-1) - y).square().mean(-1), (h * w["u"][..., None, :]).square().sum(-1).mean(-1)


def shared_parts(w: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same with one noise for all units of a sample."""
    mean = (x @ w["W"].T).relu() @ w["u"]
    return (mean - y).square().mean(), mean.square().mean()


def double(w: Params) -> Params:
    """Every unit twice, outgoing weights halved."""
    return {"W": w["W"].repeat_interleave(2, 0), "u": w["u"].repeat_interleave(2) / 2}


def growth(config: GrowthConfig) -> Part:
    """A2: the variance at the minimum falls as 1/width, inside the bound of every doubling; noise shared by all units never falls."""
    slopes, shared_slopes, misses, shared_gap, untrained = [], [], [], [], []
    series: list[dict[str, object]] = []
    for seed in config.data_seeds:
        x, y = relu_data(seed)
        widths, variances, biases, excess = _grow(config, seed, x, y, shared=False)
        misses += excess
        slopes.append(log_slope(widths, variances))
        series.append({"name": f"variance, data {seed}", "x": widths, "y": variances, "colour": seed})
        series.append({"name": f"bias^2, data {seed}", "x": widths, "y": biases, "mark": "dash", "colour": seed})
        if seed == config.data_seeds[0]:
            other = _grow(config, seed, x, y, shared=True)
            shared_slopes.append(log_slope(other[0], other[1]))
            shared_gap.append(other[1][-1] - float((y / 2).square().mean()))  # f = y / (1 + s^2)
            series.append({"name": "noise shared by all units", "x": other[0], "y": other[1], "mark": "points"})
        draws = Ensemble(range(100 * seed, 100 * seed + 64))
        start = [float(parts_of({"W": draws.normal(d, 3), "u": draws.normal(d) / d**0.5}, x, y)[1].mean()) for d in widths]
        untrained.append(log_slope(widths, start))
    low, high = config.slope
    checks = (
        holds("exponent of the variance in the width, from below", slopes, at_least=low, source=f"{SLUG} A2", spread=slopes),
        holds("the same, from above", slopes, at_most=high, source=f"{SLUG} A2", spread=slopes),
        holds("loss of the doubled network over its bound bias^2 + variance / 2", misses, at_most=1e-10, source=f"{SLUG} R2"),
        match("shared noise: exponent of the variance", 0.0, shared_slopes, 0.02, source=f"{SLUG} R6"),
        match("shared noise: variance minus that of y / (1 + s^2)", 0.0, shared_gap, 1e-5, source=f"{SLUG} R6"),
        control("untrained, read-out N(0, 1/d): exponent of the variance, in size", [abs(s) for s in untrained], at_most=0.2,
                source=f"{SLUG} R6", spread=untrained),
    )  # fmt: skip
    series.append({"name": "1/width", "x": [16, 1024], "y": [0.05, 0.05 / 64], "mark": "dash", "colour": 7})
    figure = Figure("a ReLU network grown by copies", {"series": series, "x": "width", "y": "mean over the training set", "log": "xy"},
                    curves, "The wider, the more deterministic; not so when the units share their noise.")  # fmt: skip
    return Part(checks, (figure,))


def _grow(
    config: GrowthConfig, seed: int, x: Tensor, y: Tensor, *, shared: bool
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Widths, variances, bias^2, and by how much each doubled and polished network is above the bound."""
    split = shared_parts if shared else parts_of
    loss: Loss = lambda w: torch.stack(split(w, x, y)).sum()  # noqa: E731
    draws = Ensemble(range(1000 * seed, 1000 * seed + config.restarts))
    first, second = draws.normal(config.start, 3), draws.normal(config.start) / config.start**0.5
    found = lbfgs_restarts(loss, [{"W": a, "u": b} for a, b in zip(first, second, strict=True)], max_iter=config.steps, tol=1e-10)
    w, widths, variances, biases, excess = found.best, [config.start], [], [], []
    for k in range(config.doublings + 1):
        bias, variance = (float(v) for v in split(w, x, y))
        variances.append(variance)
        biases.append(bias)
        if k == config.doublings:
            break
        bound = bias + variance_bound(variance, 1, 2)
        w = lbfgs_restarts(loss, [double(w)], max_iter=config.polish, tol=1e-10).best
        widths.append(2 * widths[-1])
        excess.append(float(loss(w)) - bound)
    return widths, variances, biases, excess


# ------------------------------------------------------------------------------------------------ A3: ordinary dropout


@dataclass(frozen=True)
class DropoutConfig:
    """Dropout .5 sampled afresh each step, Adam 3e-3 for the first half and 3e-4 for the second; torch's own start; data seed 0."""

    widths: tuple[int, ...] = (16, 64, 256, 1024)
    steps: int = 4000
    slope: float = -0.6
    seeds: tuple[int, ...] = (0, 1, 2)


def dropout(config: DropoutConfig) -> Part:
    """A3: what a practitioner's dropout network does: the same fall, unfinished because training is."""
    x, y = relu_data(0)
    x, y = x.float(), y.float()
    rows = []
    for width in config.widths:
        draws = Ensemble(config.seeds)
        w = ((2 * draws.uniform(width, 3) - 1) / 3**0.5).float().requires_grad_()
        b = ((2 * draws.uniform(width) - 1) / 3**0.5).float().requires_grad_()
        u = ((2 * draws.uniform(width) - 1) / width**0.5).float().requires_grad_()
        c = torch.zeros(len(config.seeds), 1, requires_grad=True)
        optimizer = torch.optim.Adam([w, b, u, c], lr=3e-3)
        noise = torch.Generator().manual_seed(width)
        for step in range(config.steps):
            if step == config.steps // 2:
                optimizer.param_groups[0]["lr"] = 3e-4
            h = torch.baddbmm(b[:, None], x.expand(len(config.seeds), -1, -1), w.mT).relu()
            kept = h * torch.randint(0, 2, h.shape, generator=noise) * 2.0
            loss = (torch.bmm(kept, u[..., None])[..., 0] + c - y).square().mean(-1).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            h = torch.baddbmm(b[:, None], x.expand(len(config.seeds), -1, -1), w.mT).relu().double()
            rows.append((h * u.double()[:, None]).square().sum(-1).mean(-1))
    variances = torch.stack(rows)  # widths, seeds
    slopes = [log_slope(list(config.widths), variances[:, k].tolist()) for k in range(len(config.seeds))]
    check = holds(
        "dropout trained by Adam: exponent of the training variance", slopes, at_most=config.slope, source=f"{SLUG} A3", spread=slopes
    )
    mean = variances.mean(1)
    series = [{"name": "dropout, Adam", "x": list(config.widths), "y": mean.tolist(), "mark": "points"},
              {"name": "1/width", "x": list(config.widths), "y": [float(mean[0]) * config.widths[0] / d for d in config.widths],
               "mark": "dash"}]  # fmt: skip
    data = {"series": series, "x": "width", "y": "predictive variance", "log": "xy"}
    return Part((check,), (Figure("ordinary dropout", data, curves, "Sampled dropout falls a little slower than the minimum does."),))


# ------------------------------------------------------------------------------------------------ R5: latent variable models


@dataclass(frozen=True)
class LatentConfig:
    """x (400, 6) scaled by (2, 1.5, 1, .8, .5, .3), y = .6 x T + .2 noise; e_d = e_e = 1."""

    latents: tuple[int, ...] = (2, 4, 16)
    beta: float = 0.3
    falling: tuple[float, ...] = (0.03, 0.003)
    small: tuple[float, ...] = (1e-5, 1e-6)  # below every mode's own threshold
    seeds: tuple[int, ...] = (1, 2, 3)


def latent_data(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The data of posterior-collapse A1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, 6)) * [2, 1.5, 1, 0.8, 0.5, 0.3]
    return x, 0.6 * x @ (rng.normal(size=(6, 5)) @ np.diag([1.5, 1, 0.6, 0.3, 0.1])) + 0.2 * rng.normal(size=(400, 5))


def latent(config: LatentConfig) -> Part:
    """R5: with the KL in force more latents do not make a model deterministic; with beta to 0 it becomes so."""
    seen: list[float] = []
    expected: list[float] = []
    slopes, falls, trained, theory, shrink, slight = [], [], [], [], [], []
    for seed in config.seeds:
        x, y = latent_data(seed)

        def variance(latents: int, beta: float, x: np.ndarray = x, y: np.ndarray = y, seed: int = seed) -> tuple[float, float]:
            model = LinearLVM.of_data(x, y, latents=latents, beta=beta)
            return float(model.output_variance(model.minimise(seed, 2).best)), model.predicted_output_variance()

        row, closed = zip(*(variance(latents, config.beta) for latents in config.latents), strict=True)
        seen += row
        expected += closed
        slopes.append(log_slope(list(config.latents[1:]), list(row[1:])))
        found = [variance(config.latents[1], beta) for beta in config.falling]
        trained += [a for a, _ in found]
        theory += [b for _, b in found]
        falls += [b / a for a, b in pairwise([row[1], *(a for a, _ in found)])]
        tiny = [_settled(LinearLVM.of_data(x, y, latents=5, beta=b), seed) for b in config.small]
        slight += [a / b for a, b in tiny]
        shrink.append(tiny[1][0] / tiny[0][0] / (config.small[1] / config.small[0]))
    return Part(
        (
            match("output variance of the trained model, each number of latents", expected, seen, 1e-5, source=f"{SLUG} R5", spread=seen),
            control("its exponent in the number of latents, in size", [abs(s) for s in slopes], at_most=0.02, source=f"{SLUG} R5"),
            match(f"the same at beta = {config.falling}", theory, trained, 1e-5, source=f"{SLUG} R5", spread=trained),
            holds("it falls with beta: trained variance over that at ten times the beta", falls, at_most=0.5, source=f"{SLUG} R5"),
            match(f"and at beta = {config.small}, below every mode's threshold, over the closed form", 1.0, slight, 1e-5,
                  source=f"{SLUG} R5", spread=slight),
            match("there the trained variance is proportional to beta: its ratio over that of the two beta", 1.0, shrink, 0.02,
                  source=f"{SLUG} R5", spread=shrink),
        )
    )  # fmt: skip


def _settled(model: LinearLVM, seed: int) -> tuple[float, float]:
    """Output variance where Newton steps from 1 % beside the closed form end (from afar so small a beta takes long), and its own."""
    draws = torch.Generator().manual_seed(seed)
    beside = {n: w * (1 + 0.01 * torch.randn(w.shape, generator=draws, dtype=torch.float64)) for n, w in model.representative(seed).items()}
    return float(model.output_variance(settle(model.loss, beside, radius=0.2))), model.predicted_output_variance()


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    copies: CopyConfig | None = CopyConfig()
    linear: LinearConfig | None = LinearConfig()
    growth: GrowthConfig | None = GrowthConfig()
    dropout: DropoutConfig | None = DropoutConfig()
    latent: LatentConfig | None = LatentConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Stochastic Neural Networks with Infinite Width are Deterministic",
    paper="Liu Ziyin, Hanlin Zhang, Xiangming Meng, Yuting Lu, Eric Xing, Masahito Ueda, arXiv 2201.12724",
    claims=(
        "Copying units keeps the mean and divides the variance, so at the minimum the predictive variance is at most of order 1/width.",
        "Linear networks: Var f / (E f)^2 = prod(1 + s^2 / d) - 1 exactly.",
        "Noise shared by all units, an untrained network, and a latent model under a KL term do not become deterministic.",
    ),
    presets={
        "smoke": Config(
            copies=CopyConfig(samples=4000, seeds=(0, 1, 2)),
            linear=LinearConfig(trained=(4,), depths=(1,), samples=50_000),
            growth=GrowthConfig(doublings=4, restarts=2, data_seeds=(0,)),
            dropout=None,
            latent=LatentConfig(latents=(2, 4, 8), falling=(0.03,), seeds=(1,)),
        ),
        "default": Config(),
        "full": Config(
            copies=CopyConfig(samples=200_000),
            growth=GrowthConfig(data_seeds=(0, 1, 2, 3), polish=1000),
            dropout=DropoutConfig(steps=16_000, seeds=tuple(range(6))),
            latent=LatentConfig(latents=(2, 4, 16, 64)),
        ),
    },
    experiments={"copies": copies, "linear": linear, "growth": growth, "dropout": dropout, "latent": latent},
)
