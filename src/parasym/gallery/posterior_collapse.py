"""Posterior Collapse of a Linear Latent Variable Model.

Slug posterior-collapse. L = E |U z - y|^2 / (2 e_d^2) + beta KL, squares summed over outputs with their 1/2, Gaussian latent noise of
learned or fixed variance; data centred. A mode of the whitened input-target correlation dies at beta e_d^2 = zeta^2: the penalty on the
encoder's mean does it, not the variance. Moments are exact in the theory runs; the trained models use fresh or shuffled batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.diagrams import COLLAPSE
from parasym.gallery.digits import digits
from parasym.gallery.drawings import curves, phase_diagram
from parasym.gallery.ensemble import Ensemble
from parasym.gallery.stochastic_networks_deterministic import latent_data
from parasym.measure.posterior import PosteriorCollapse, effective_beta, gaussian_kl, posterior_collapse, recommend_beta
from parasym.solvable.contract import NotSolvable
from parasym.solvable.engines import hessian, settle
from parasym.solvable.latent import LinearLVM

SLUG = "posterior-collapse"


# ------------------------------------------------------------------------------------------------ A1, R0-R5, R7


@dataclass(frozen=True)
class ModeConfig:
    """x (400, 6) scaled by (2, 1.5, 1, .8, .5, .3), y = .6 x T + .2 noise, four latents; (beta, e_e, e_d)."""

    settings: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 0.5), (0.3, 1.3, 1.0), (4.0, 0.7, 1.2))
    fixed: tuple[float, ...] = (0.3, 1.1, 0.6, 0.8)
    latents: int = 4
    restarts: int = 6
    seeds: tuple[int, ...] = (1, 2, 3)


def modes(config: ModeConfig) -> Part:
    """A1: loss, decoder, posterior variances and KL of each mode at the global minimum, and how many modes live."""
    checks: list[Check] = []
    for beta, encoder, decoder in config.settings:
        made = [
            LinearLVM.of_data(*latent_data(s), latents=config.latents, beta=beta, encoder=encoder, decoder=decoder) for s in config.seeds
        ]
        checks += _beside(config, made, f"beta = {beta}, e_e = {encoder}, e_d = {decoder}")
    fixed = [LinearLVM.of_data(*latent_data(s), latents=config.latents, beta=0.3, sigma=config.fixed) for s in config.seeds]
    checks += _beside(config, fixed, f"beta = .3, fixed s = {config.fixed}")
    return Part((*checks, *_controls(config)), (_mode_figure(), _diagram()))


def _beside(config: ModeConfig, models: list[LinearLVM], words: str) -> list[Check]:
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    share = []
    for seed, model in zip(config.seeds, models, strict=True):
        theory = model.predict("minimum").values
        found = model.minimise(seed, config.restarts)
        seen = model.at_minimum(found)
        share.append(found.fraction())
        for name, value in theory.items():
            left, right = rows.setdefault(name, ([], []))
            left.append(torch.as_tensor(value.value, dtype=torch.float64).reshape(-1))
            right.append(torch.as_tensor(seen[name].value, dtype=torch.float64).reshape(-1))
    bounds = models[0].tolerance["minimum"]
    titles = {"loss": "loss", "map": "whitened map U W^T A^(1/2)", "decoder": "singular values of U", "active": "living modes",
              "variances": "posterior variances", "KL": "KL of each latent", "decoder variance": "e_d^2"}  # fmt: skip
    result = {
        "loss": "A1, R4",
        "map": "R1",
        "decoder": "A1, R1",
        "active": "A1, R2",
        "variances": "R0, R1",
        "KL": "R7",
        "decoder variance": "R6",
    }
    checks = [
        match(f"{words}: {titles[name]}", torch.cat(a), torch.cat(b), bounds[name], source=f"{SLUG} {result[name]}")
        for name, (a, b) in rows.items()
    ]
    return [*checks, holds(f"{words}: share of restarts at the minimum", share, at_least=1.0, source=f"{SLUG} A1, R5", spread=share)]


def _controls(config: ModeConfig) -> list[Check]:
    """Take away the penalty on the mean and nothing dies; learn or fix the variance and the threshold stays; Theorem 3."""
    alive, thresholds, right, at_origin, living, expected = [], [], [], [], [], []
    for seed in config.seeds:
        x, y = latent_data(seed)
        base = LinearLVM.of_data(x, y, latents=config.latents, beta=4.0, encoder=0.7, decoder=1.2)
        tiny = replace(base, beta=1e-3)
        found = tiny.minimise(seed, 1)
        alive.append(int(tiny.at_minimum(found)["active"].value))  # type: ignore[arg-type]
        fixed = replace(base, sigma=(base.encoder,) * config.latents)
        for share in (0.9, 1.1):  # of the beta at which the second mode dies
            beta = share * float(base.zeta[1] / base.decoder) ** 2
            expected += [float((base.zeta[: config.latents].square() > beta * base.decoder**2).sum())] * 2
            for model in (replace(base, beta=beta), replace(fixed, beta=beta)):
                living.append(float(model.at_minimum(model.minimise(seed, 1))["active"]))
        thresholds.append(fixed.critical_beta())
        right.append(base.critical_beta())
        for share in (0.8, 1.2):  # of the complete-collapse beta: saddle below, global minimum above
            model = replace(fixed, beta=share * float(fixed.critical_beta()[0]))
            zero = {name: torch.zeros_like(w) for name, w in model.init(0).items()}
            lowest = float(torch.linalg.eigvalsh(hessian(model.loss, zero))[0])
            at_origin.append(float((lowest >= -1e-10) == (model.active() == 0)))
    least = min(config.latents, 5)
    return [
        control("beta = 1e-3: living modes (nothing dies without the penalty)", alive, at_least=least, source=f"{SLUG} A1"),
        match("critical beta with the variance fixed at the prior's equals that with it learned", torch.cat(right), torch.cat(thresholds),
              1e-12, source=f"{SLUG} R2, R3"),
        match("living modes below and above the second threshold, variance learned and fixed at the prior's", expected, living, 0.0,
              source=f"{SLUG} R2, R3"),
        match("fixed variances: the Hessian at 0 is semidefinite iff 0 is the global minimum", 1.0, at_origin, 0.0, source=f"{SLUG} Thm 3"),
    ]  # fmt: skip


def _mode_figure() -> Figure:
    """Encoder deviation of each mode against beta for data of deviations 1..5 (the paper's plot)."""
    square = torch.tensor([25.0, 16, 9, 4, 1])
    betas = np.linspace(0.05, 30, 120)
    series = []
    for z in square.tolist():
        series.append({"name": f"zeta^2 = {z:g}", "x": betas.tolist(), "y": [min(1.0, (b / z) ** 0.5) for b in betas]})
    data = {"series": series, "x": "beta", "y": "posterior standard deviation"}
    return Figure("modes collapse one by one", data, curves, "A mode is the prior from beta = zeta^2 on.")


def _diagram() -> Figure:
    x, y = latent_data(1)
    model = LinearLVM.of_data(x, y, latents=4)
    betas, decoders = np.geomspace(0.01, 30, 60), np.geomspace(0.2, 3, 50)
    counts = model.phase_diagram(betas.tolist(), decoders.tolist())
    data = {"x": decoders.tolist(), "y": betas.tolist(), "z": counts.tolist(), "level": None, "xtitle": "e_d", "ytitle": "beta",
            "ztitle": "living modes", "log": "xy"}  # fmt: skip
    return Figure("living modes", data, phase_diagram, "Boundaries are beta e_d^2 = zeta_i^2; the prior's width plays no part.")


# ------------------------------------------------------------------------------------------------ A2, R6: learned decoder variance


@dataclass(frozen=True)
class DecoderConfig:
    """The data of A1, decoder variance learned."""

    betas: tuple[float, ...] = (0.5, 1.0, 2.0, 8.0)
    restarts: int = 3
    seeds: tuple[int, ...] = (1, 2, 3)


def decoder(config: DecoderConfig) -> Part:
    """A2, R6: modes kept and noise found; at beta = 1, y = x it is probabilistic PCA; where nothing is left over the loss has no bottom."""
    checks: list[Check] = []
    shared = ModeConfig(restarts=config.restarts, seeds=config.seeds)
    for beta in config.betas:
        models = [LinearLVM.of_data(*latent_data(s), latents=4, beta=beta, learn_decoder=True) for s in config.seeds]
        checks += _beside(shared, models, f"learned e_d, beta = {beta}")
    noise, expected = [], []
    shares, falls, said, power = (0.9, 1.2), [], [], []
    for seed in config.seeds:
        x, _ = latent_data(seed)
        values = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
        noise.append(LinearLVM.of_data(x, latents=3, learn_decoder=True).decoder_variance()[1])
        expected.append(float(values[3:].mean()))
        for beta in shares:
            falls.append(_lowest(x, beta, 0.02) - _lowest(x, beta, 0.1))
            power.append((1 - beta) * x.shape[1] * float(np.log(0.2)))
            said.append(float(_refused(x, beta)))
    checks += [
        match("y = x, beta = 1: e_d^2 is the mean discarded eigenvalue", expected, noise, 1e-10, source=f"{SLUG} R6"),
        match("y = x, a latent for each input: change of the least loss as e_d falls fivefold, (d2 - beta n) log .2: it falls without "
              "bound for beta < 1 and rises for beta > 1", power, falls, 1e-6, source=f"{SLUG} R6", spread=falls),
        match("and a learned e_d is refused for beta < 1 only", [1.0, 0.0] * len(config.seeds), said, 0.0, source=f"{SLUG} R6"),
    ]  # fmt: skip
    return Part(tuple(checks))


def _lowest(x: np.ndarray, beta: float, decoder: float) -> float:
    """Least loss found at this e_d by Newton steps from beside the closed form, (d2 / 2) log e_d^2 included."""
    model = LinearLVM.of_data(x, latents=x.shape[1], beta=beta, decoder=decoder)
    start = model.representative()
    moved = {name: w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
             for k, (name, w) in enumerate(start.items())}  # fmt: skip
    return float(model.loss(settle(model.loss, moved, radius=0.2))) + x.shape[1] * float(np.log(decoder))


def _refused(x: np.ndarray, beta: float) -> bool:
    try:
        LinearLVM.of_data(x, latents=x.shape[1], beta=beta, learn_decoder=True).decoder_variance()
    except NotSolvable as reason:
        return "without bound" in str(reason)
    return False


# ------------------------------------------------------------------------------------------------ headline: Adam on the linear VAE


@dataclass(frozen=True)
class TrainedConfig:
    """Linear VAE, x ~ N(0, diag(1, 4, 9, 16, 25)), linear log-variance head, five latents, Adam, fresh batches, rate falling to zero;
    losses on ``held`` fresh samples. The smaller beta, the weaker what aligns the latents with the modes, and the longer that takes."""

    betas: tuple[float, ...] = (1.0, 2.0, 4.0, 5.0, 10.0, 20.0, 25.0)
    batch: int = 128
    steps: int = 10_000
    lr: float = 2e-2
    held: int = 20_000
    margin: float = 0.02
    seeds: tuple[int, ...] = (0, 1, 2)


def trained(config: TrainedConfig) -> Part:
    """The official setting: total loss and posterior deviations of a VAE trained by Adam, its variance free to depend on x (R9)."""
    draws, n = Ensemble(config.seeds), len(config.betas)
    scale = torch.arange(1, 6, dtype=torch.float64)
    beta = torch.tensor(config.betas, dtype=torch.float64).repeat_interleave(len(config.seeds))

    def copied(*shape: int, size: float) -> Tensor:
        return (size * draws.normal(*shape)).repeat(n, 1, 1).requires_grad_()

    w, u, head = copied(5, 5, size=0.3), copied(5, 5, size=0.3), copied(5, 5, size=0.01)
    offset = torch.zeros(len(beta), 1, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w, u, head, offset], lr=config.lr, fused=True)

    def terms(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = x @ w, x @ head + offset
        z = mean + (0.5 * log_variance).exp() * noise
        return 0.5 * (z @ u - x).square().sum(-1).mean(-1), gaussian_kl(mean, log_variance).mean(1)

    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, 2.5 * (1 - step / config.steps) ** 1.5 + 0.01)
        x = (draws.normal(config.batch, 5) * scale).repeat(n, 1, 1)
        error, kl = terms(x, draws.normal(config.batch, 5).repeat(n, 1, 1))
        optimizer.zero_grad()
        (error + beta * kl.sum(-1)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        x = (draws.normal(config.held, 5) * scale).repeat(n, 1, 1)
        error, kl = terms(x, draws.normal(config.held, 5).repeat(n, 1, 1))
        losses = (error + beta * kl.sum(-1)).reshape(n, -1)
        deviations = (0.5 * (x @ head + offset)).exp().mean(1).sort(-1).values.reshape(n, len(config.seeds), 5)
    checks, seen = [], []
    square = torch.diag(scale.square())
    for i, b in enumerate(config.betas):
        model = LinearLVM(square, square, square, 5, beta=b)
        words = f"linear VAE by Adam, beta = {b}"
        claim, source = f"{words}: total loss", f"{SLUG} headline"
        checks.append(match(claim, model.minimal_loss(), losses[i], config.margin, relative=True, source=source, spread=losses[i]))
        theory = torch.as_tensor(model.predict("minimum").values["variances"].value).sqrt()
        checks.append(match(f"{words}: posterior deviations, every seed", theory.expand(len(config.seeds), -1), deviations[i], 0.02,
                            source=f"{SLUG} headline, R9"))  # fmt: skip
        seen.append(deviations[i].mean(0))
    grid = np.linspace(0.5, 32, 100)
    series = []
    for k, z in enumerate((25.0, 16.0, 9.0, 4.0, 1.0)):
        series.append({"name": f"theory, zeta^2 = {z:g}", "x": grid.tolist(), "y": [min(1.0, (b / z) ** 0.5) for b in grid], "colour": k})
        series.append({"name": f"Adam, zeta^2 = {z:g}", "x": list(config.betas), "y": [float(row[k]) for row in seen], "mark": "points",
                       "colour": k})  # fmt: skip
    figure = Figure("posterior deviations of a trained VAE", {"series": series, "x": "beta", "y": "deviation"}, curves,
                    "Each mode becomes the prior at beta = zeta^2.")  # fmt: skip
    return Part(tuple(checks), (figure,))


# ------------------------------------------------------------------------------------------------ R8: a nonlinear VAE on digits


@dataclass(frozen=True)
class DigitsConfig:
    """64 - hidden - latents - hidden - 64 ReLU VAE on scikit-learn's digits / 16, centred; sum of squares / 2 + beta KL, Adam, shuffled
    batches; beta in units of the largest PCA eigenvalue, where linear theory has complete collapse."""

    shares: tuple[float, ...] = (0.1, 0.3, 0.6, 0.8, 1.2, 1.5)
    alive: float = 0.8
    dead: float = 1.2
    hidden: int = 128
    latents: int = 8
    batch: int = 128
    epochs: int = 150
    lr: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def digit_vaes(config: DigitsConfig) -> Part:
    """R8: where a real VAE collapses, against the eigenvalues of its data; averaging over pixels collapses it by accident."""
    split = digits()
    x = torch.cat([split.x, split.x_test])
    x = x - x.mean(0)
    square = LinearLVM.of_data(x.double(), latents=1).zeta.square()
    top = float(square[0])
    shares = [*config.shares, config.shares[0] * x.shape[1]]  # the last: the first with the reconstruction averaged over pixels
    kl, collapse = _train_vaes(config, x, [s * top for s in shares])
    total = kl.sum(-1)  # shares, seeds
    living = torch.tensor([[c.active for c in row] for row in collapse])
    at = {s: i for i, s in enumerate(config.shares)}
    below = [total[i] for s, i in at.items() if s <= config.alive]
    above = [total[i] for s, i in at.items() if s >= config.dead]
    last = max(i for s, i in at.items() if s < config.dead)
    fewer = float((living[0] - living[last]).double().mean())
    accident = effective_beta(config.shares[0] * top, x.shape[1], reduction="mean")
    keep = 2
    advised = recommend_beta(x.double(), keep)
    checks = [
        holds(f"total KL of the digits VAE at beta <= {config.alive} of the largest eigenvalue, each seed", torch.stack(below),
              at_least=0.05, source=f"{SLUG} R8", spread=total[:, 0]),
        holds(f"total KL at beta >= {config.dead} of it: complete collapse", torch.stack(above), at_most=0.02, source=f"{SLUG} R8"),
        holds("no latent lives there", living[[i for s, i in at.items() if s >= config.dead]], at_most=0, source=f"{SLUG} R8"),
        holds("living latents at the smallest beta minus those at the largest below collapse", fewer, at_least=1.0,
              source=f"{SLUG} R8", spread=living[0].double()),
        match("averaging over pixels is beta times their number", shares[-1] * top, accident, 1e-9, source=f"{SLUG} pitfall"),
        control("the smallest beta with the reconstruction averaged over pixels: total KL", total[-1], at_most=0.02, source=f"{SLUG} R8"),
        match("linear theory keeps what it was asked to at the recommended beta", keep,
              LinearLVM.of_data(x.double(), latents=8, beta=float(advised)).active(), 0.0, source=f"{SLUG} R2"),
    ]  # fmt: skip
    linear = [LinearLVM.of_data(x.double(), latents=config.latents, beta=s * top) for s in np.linspace(0.05, 1.6, 60)]
    kls = [float(torch.as_tensor(m.predict("minimum").values["KL"].value).sum()) for m in linear]
    series = [
        {"name": "linear theory", "x": np.linspace(0.05, 1.6, 60).tolist(), "y": kls},
        {"name": "digits VAE", "x": list(config.shares), "y": total[: len(at)].mean(1).tolist(), "mark": "points",
         "low": total[: len(at)].amin(1).tolist(), "high": total[: len(at)].amax(1).tolist()},
    ]  # fmt: skip
    data = {"series": series, "x": "beta / largest eigenvalue", "y": "total KL (nats)"}
    mean_living = living[: len(at)].double().mean(1).tolist()
    counts = {"series": [{"name": "digits VAE", "x": list(config.shares), "y": mean_living, "mark": "points"},
                         {"name": "linear theory", "x": np.linspace(0.05, 1.6, 60).tolist(), "y": [m.active() for m in linear]}],
              "x": "beta / largest eigenvalue", "y": "living latents"}  # fmt: skip
    figures = (Figure("a VAE on digits", data, curves, "The last mode dies near where linear theory has it."),
               Figure("living latents on digits", counts, curves, "Measured by (eps, delta)-collapse."))  # fmt: skip
    return Part(tuple(checks), figures)


def _train_vaes(config: DigitsConfig, x: Tensor, betas: list[float]) -> tuple[Tensor, list[list[PosteriorCollapse]]]:
    """Mean KL of each latent (betas, seeds, latents) and the collapse of each network; all networks at once, each its own stream."""
    draws, n = Ensemble(config.seeds), len(betas)
    beta = torch.tensor(betas).repeat_interleave(len(config.seeds))

    def layer(a: int, b: int) -> tuple[Tensor, Tensor]:
        weight = ((2 * draws.uniform(a, b, dtype=torch.float32) - 1) / a**0.5).repeat(n, 1, 1).requires_grad_()
        return weight, torch.zeros(len(beta), 1, b, requires_grad=True)

    sizes = ((64, config.hidden), (config.hidden, 2 * config.latents), (config.latents, config.hidden), (config.hidden, 64))
    layers = [layer(a, b) for a, b in sizes]
    optimizer = torch.optim.Adam([w for pair in layers for w in pair], lr=config.lr)

    def encode(batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.baddbmm(layers[0][1], batch, layers[0][0]).relu()
        mean, log_variance = torch.baddbmm(layers[1][1], hidden, layers[1][0]).chunk(2, -1)
        return mean, log_variance

    steps, total = len(x) // config.batch, config.epochs * (len(x) // config.batch)
    for epoch in range(config.epochs):
        order = draws.permutation(len(x))
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = config.lr * (1 - 0.9 * (epoch * steps + k) / total)
            batch = x[order[:, k * config.batch : (k + 1) * config.batch]].repeat(n, 1, 1)
            mean, log_variance = encode(batch)
            noise = draws.normal(config.batch, config.latents, dtype=torch.float32).repeat(n, 1, 1)
            hidden = torch.baddbmm(layers[2][1], mean + (0.5 * log_variance).exp() * noise, layers[2][0]).relu()
            error = 0.5 * (torch.baddbmm(layers[3][1], hidden, layers[3][0]) - batch).square().sum(-1).mean(-1)
            optimizer.zero_grad()
            (error + beta * gaussian_kl(mean, log_variance).sum(-1).mean(-1)).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        mean, log_variance = encode(x.expand(len(beta), -1, -1))
    found = [posterior_collapse(lambda rows, i=i: (mean[i], log_variance[i]), [x], eps=0.01, delta=0.05) for i in range(len(beta))]  # type: ignore[misc]
    kl = torch.stack([c.kl for c in found]).reshape(n, len(config.seeds), -1)
    return kl, [found[i * len(config.seeds) : (i + 1) * len(config.seeds)] for i in range(n)]  # type: ignore[misc]


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    modes: ModeConfig | None = ModeConfig()
    decoder: DecoderConfig | None = DecoderConfig()
    trained: TrainedConfig | None = TrainedConfig()
    digits: DigitsConfig | None = DigitsConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Posterior Collapse of a Linear Latent Variable Model",
    paper="Zihao Wang, Liu Ziyin, NeurIPS 2022, arXiv 2205.04009",
    claims=(
        "A latent mode lives iff zeta^2 > beta e_d^2, zeta^2 the squared singular values of the whitened input-target correlation.",
        "The penalty on the encoder's mean causes collapse; learning the posterior variance neither causes nor cures it.",
        "Learning the decoder variance finds its own number of modes; with y = x and beta = 1 it is probabilistic PCA.",
        "A nonlinear VAE on digits lives at .8 and is dead at 1.2 of the beta at which the data's largest eigenvalue kills a linear one.",
    ),
    presets={
        "smoke": Config(
            modes=ModeConfig(seeds=(1,), restarts=3),
            decoder=DecoderConfig(betas=(1.0, 8.0), restarts=2, seeds=(1,)),
            trained=TrainedConfig(betas=(10.0, 30.0), steps=3000),
            digits=None,
        ),
        "default": Config(),
        "full": Config(
            trained=TrainedConfig(betas=(0.5, 1.0, 2.0, 4.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0), batch=16, steps=65_536, lr=1e-3),
            digits=DigitsConfig(
                shares=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0), hidden=512, epochs=400
            ),
        ),
    },
    experiments={"modes": modes, "decoder": decoder, "trained": trained, "digits": digit_vaes},
    sweeps={"modes": COLLAPSE},
)
