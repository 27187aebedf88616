"""What shapes the loss landscape of self-supervised learning?

Slug ssl-landscape. Linear encoder f = W x, L = -Tr[W B W^T] + q Tr[(W Sigma W^T)^2], Sigma = A + C the covariance of a view. Losses are
as the dictionary states them (InfoNCE with squared distances and their 1/2; spectral and Barlow without), temperature 1; moments are
exact, or estimated from the stated number of Gaussian samples; starts W ~ N(0, c^2 / d0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.diagrams import SSL
from parasym.gallery.digits import digits
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble
from parasym.solvable.engines import flow, morse
from parasym.solvable.joint_embedding import GaussianInfoNCE, SSLQuartic, monte_carlo_infonce, view_covariances, views
from parasym.solvable.landscape import normal

SLUG = "ssl-landscape"
DATA = (2.0, 1.2, 0.8, 0.5, 0.3, 0.1)
AUGMENTATION = (0.9, 0.1, 0.4, 0.6, 0.05, 0.3)


def covariances(seed: int) -> tuple[Tensor, Tensor]:
    """A and C with the eigenvalues of A1 in random bases, A's drawn first."""
    rng = np.random.default_rng(seed)
    out = []
    for values in (DATA, AUGMENTATION):
        q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        out.append(torch.from_numpy(q * np.array(values) @ q.T))
    return out[0], out[1]


# ------------------------------------------------------------------------------------------------ A1, A3, R1, R2, R4, R5


SETTINGS: dict[str, tuple[str, Callable[[Tensor, Tensor], SSLQuartic]]] = {
    "InfoNCE, d = 4": ("A1, R1", lambda a, c: SSLQuartic.infonce(a, c, 4)),
    "InfoNCE, d = 9": ("A1, R1", lambda a, c: SSLQuartic.infonce(a, c, 9)),
    "spectral, d = 4": ("A1, R1", lambda a, c: SSLQuartic.spectral(a, c, 4)),
    "spectral, d = 9": ("A1, R1", lambda a, c: SSLQuartic.spectral(a, c, 9)),
    "Barlow, d = 5": ("R1", lambda a, c: SSLQuartic.barlow(a, 5)),
    "weight decay .4": ("A1, R2", lambda a, c: SSLQuartic.infonce(a, c, 5, decay=0.4)),
    "alignment overweighted, B = A - C": ("A1, R2", lambda a, c: SSLQuartic.infonce(a, c, 5, align=1.0)),
    "normalised, d = 5": ("A1, R4", lambda a, c: SSLQuartic(a, a + c, 5, 0.75, power=1.0)),
    "normalised, d = 4": ("A1, R4", lambda a, c: SSLQuartic(a, a + c, 4, 0.75, power=1.0)),
    "normalised, bias, B = .3 A": ("A3, R5", lambda a, c: SSLQuartic(0.3 * a, a + c, 6, 0.75, power=1.0, bias=True)),
    "normalised, bias, B = -C": ("A3, R5", lambda a, c: SSLQuartic(-c, a + c, 6, 0.75, power=1.0, bias=True)),
    "normalised, no bias, B = -C": ("A3, R4", lambda a, c: SSLQuartic(-c, a + c, 6, 0.75, power=1.0)),
}


@dataclass(frozen=True)
class MinimumConfig:
    """Six inputs, eigenvalues of A (2, 1.2, .8, .5, .3, .1) and of C (.9, .1, .4, .6, .05, .3) in random bases; L-BFGS."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    restarts: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)


def minima(config: MinimumConfig) -> Part:
    """A1, A3: loss, spectrum of N, rank and bias of the global minimum, every restart counted."""
    checks: list[Check] = []
    for name in config.settings:
        source, build = SETTINGS[name]
        rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        share = []
        for seed in config.seeds:
            model = build(*covariances(seed))
            theory, found = model.predict("minimum").values, model.minimise(seed, config.restarts)
            seen = model.at_minimum(found)
            share.append(found.fraction())
            for key, value in theory.items():
                pair = rows.setdefault(key, ([], []))
                for side, number in zip(pair, (value, seen[key]), strict=True):
                    side.append(torch.as_tensor(number.value, dtype=torch.float64).reshape(-1))
        # a normalised loss of -C is met where power lies in the bias: the spectrum is a square root of what is left of the gradient
        bound = {"loss": 1e-6, "spectrum": 1e-5, "rank": 0.0, "bias": 1e-5}
        checks += [match(f"{name}: {key}", torch.cat(a), torch.cat(b), bound[key], source=f"{SLUG} {source}")
                   for key, (a, b) in rows.items() if not (key == "rank" and float(torch.cat(a).sum()) == 0)]  # fmt: skip
        checks.append(holds(f"{name}: share of restarts at the minimum", share, at_least=1.0, source=f"{SLUG} R1", spread=share))
    return Part((*checks, *_controls(config)), (_spectra_figure(), _decay_figure()))


def _controls(config: MinimumConfig) -> list[Check]:
    sheared, misspecified = [], []
    for seed in config.seeds:
        a, c = covariances(seed)
        model = SSLQuartic.infonce(a, c, 4)
        w = model.representative(seed)["W"]
        shear = torch.eye(4, dtype=torch.float64) + 0.3 * normal(seed, 4, 4)
        sheared.append(abs(float(model.loss({"W": shear @ w}) - model.loss({"W": w}))))
        right, wrong = SSLQuartic.barlow(a, 6).strengths()[0], SSLQuartic(2 * a, a + c, 6, 1.0).strengths()[0]
        misspecified.append(float(((wrong - right) / right).abs().max()))
    return [
        control("a shear of the outputs changes the loss by", sheared, at_least=1e-3, source=f"{SLUG} control"),
        control("Barlow with Sigma = A + C: relative error of N", misspecified, at_least=0.1, source=f"{SLUG} control"),
    ]


def _spectra_figure() -> Figure:
    a, c = covariances(0)
    series = []
    for name in ("InfoNCE, d = 9", "weight decay .4", "alignment overweighted, B = A - C", "normalised, d = 5"):
        spectrum = torch.as_tensor(SETTINGS[name][1](a, c).predict("minimum").values["spectrum"].value).tolist()
        series.append({"name": name, "x": list(range(1, len(spectrum) + 1)), "y": spectrum})
    data = {"series": series, "x": "direction", "y": "strength N_i"}
    return Figure("what is learned", data, curves, "Decay, alignment and normalisation cut directions; the loss alone only shrinks them.")


def _decay_figure() -> Figure:
    a, c = covariances(0)
    grid = np.linspace(0, 2.2, 120)
    rows = torch.stack([SSLQuartic.infonce(a, c, 6, decay=g).strengths()[0] for g in grid.tolist()])
    series = [{"name": f"mode {k + 1}", "x": grid.tolist(), "y": rows[:, k].tolist()} for k in range(6)]
    data = {"series": series, "x": "weight decay", "y": "N_i"}
    return Figure("dimensional collapse", data, curves, "A direction dies where the decay passes an eigenvalue of A.")


# ------------------------------------------------------------------------------------------------ R1, R2, R7: stationary points and origin


@dataclass(frozen=True)
class SaddleConfig:
    """All stationary points for B = A, d = 3, and B = A - C, d = 4; ranks at decays between the eigenvalues of A."""

    restarts: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)


def saddles(config: SaddleConfig) -> Part:
    """R1: gradient, loss and Morse index of every stationary point; R2: rank against decay; R7: escape rates from the origin."""
    index, gradients, losses, expected, minima_found, ranks, counts, rates, growth = [], [], [], [], [], [], [], [], []
    for seed in config.seeds:
        a, c = covariances(seed)
        for model in (SSLQuartic.infonce(a, c, 3), SSLQuartic.infonce(a, c, 4, align=1.0)):
            zero = 0
            points = list(model.stationary())
            for modes, loss, order in points[:: 1 if seed == config.seeds[0] else 4]:
                strengths = torch.zeros(6, dtype=torch.float64)
                strengths[list(modes)] = model.levels[list(modes)] / (2 * model.quartic)
                theta = {"W": model.encoder(strengths, seed)}
                gradients.append(float(torch.func.grad(model.loss)(theta)["W"].abs().max()))
                losses.append(float(model.loss(theta)))
                expected.append(loss)
                index.append(float(morse(model.loss, theta, 1e-9)[0] - order))
            zero = sum(order == 0 for _, _, order in points)
            minima_found.append(float(zero))
        values = torch.linalg.eigvalsh(a)
        for g in (0.5 * (values[1:] + values[:-1])).tolist():
            model = SSLQuartic.infonce(a, c, 6, decay=g)
            found = model.minimise(seed, config.restarts)
            ranks.append(float(model.observables(found.best)["rank"]))
            counts.append(float((values > g).sum()))
        model = SSLQuartic.infonce(a, c, 1)
        values, vectors = torch.linalg.eigh(a)
        start = {"W": 1e-6 * vectors[:, -1:].T}
        path = flow(model.loss, start, [0.0, 1.0])
        growth.append(float((path.theta["W"][-1].norm() / path.theta["W"][0].norm()).log()))
        rates.append(2 * float(values[-1]))
    return Part(
        (
            match(f"Hessian index minus theory, {len(index)} stationary points", 0.0, index, 0.0, source=f"{SLUG} R1"),
            match("largest gradient at the stationary points", 0.0, gradients, 1e-10, source=f"{SLUG} R1"),
            match("their losses", expected, losses, 1e-10, source=f"{SLUG} R1"),
            match("stationary points of index 0 in each landscape", 1.0, minima_found, 0.0, source=f"{SLUG} R1"),
            match("rank at decays between the eigenvalues of A", counts, ranks, 0.0, source=f"{SLUG} R2"),
            match("growth rate along the top eigenvector of B near the origin", rates, growth, 1e-6, source=f"{SLUG} R7"),
        )
    )


# ------------------------------------------------------------------------------------------------ A2, R3 and the dictionary


@dataclass(frozen=True)
class InfoNCEConfig:
    """Exact Gaussian InfoNCE; Monte Carlo on pairs with 4000 negatives; small random W (d = 3, four inputs) for the dictionary."""

    restarts: int = 5
    pairs: int = 6000
    negatives: int = 4000
    dictionary_pairs: int = 400_000
    seeds: tuple[int, ...] = (0, 1, 2)


def infonce(config: InfoNCEConfig) -> Part:
    """A2, R3, and each line of the dictionary by sampling."""
    losses, expected, spectra, theory, sampled, top4, gaps = [], [], [], [], [], [], []
    for seed in config.seeds:
        a, c = covariances(seed)
        model = GaussianInfoNCE(a, c, 6)
        found = model.minimise(seed, config.restarts)
        losses.append(found.value)
        expected.append(model.value(model.strengths()))
        spectra.append(model.spectrum(found.best["W"]))
        theory.append(model.strengths().sort(descending=True).values)
        narrow = GaussianInfoNCE(a, c, 4)
        top4.append(narrow.minimise(seed, config.restarts).value - narrow.value(narrow.strengths()))
        first, second, others = views(a, c, config.pairs, seed, config.negatives)
        sampled.append(float(monte_carlo_infonce(found.best["W"], first, second, others)) - found.value)
        quartic = SSLQuartic.infonce(a, c, 6)
        n = model.strengths()
        gaps.append(float(((quartic.strengths()[0] - n) / n).abs().max()))
    small = _small_encoders(config)
    checks = (
        match("exact InfoNCE, d = 6: loss", expected, losses, 1e-8, source=f"{SLUG} A2, R3", spread=losses),
        match("exact InfoNCE, d = 6: spectrum of S", torch.cat(theory), torch.cat(spectra), 1e-4, relative=True, source=f"{SLUG} R3"),
        match("exact InfoNCE, d = 4: loss minus that of the top four modes", 0.0, top4, 1e-8, source=f"{SLUG} A2"),
        match("sampled InfoNCE minus exact (finite negatives lower it)", 0.0, sampled, 0.05, source=f"{SLUG} R3", spread=sampled),
        control("the quartic spectrum at the minimum is off by, relative", gaps, at_least=0.5, source=f"{SLUG} R3"),
        *small,
    )
    return Part(checks)


def _small_encoders(config: InfoNCEConfig) -> list[Check]:
    """The dictionary: sampled losses at a random W against the polynomial."""
    rows: dict[str, tuple[list[float], list[float], list[float]]] = {}
    for seed in config.seeds:
        a, c = torch.diag(torch.tensor([1.0, 0.6, 0.4, 0.2]).double()), torch.diag(torch.tensor([0.2, 0.4, 0.1, 0.3]).double())
        w = 0.5 * normal(seed + 40, 3, 4)
        first, second = views(a, c, config.dictionary_pairs, seed)
        f, g = first @ w.T, second @ w.T
        inner = (f * g).sum(-1)
        wall = (f * g.roll(1, 0)).sum(-1).square()  # the next sample's other view: independent of this one
        spectral = -2 * inner + wall
        cross = f.T @ g / len(f)
        barlow = float((0.5 * (cross + cross.T) - torch.eye(3)).square().sum()) - 3
        tiny = 0.25 * w
        pairs = min(len(first), 8000)
        model = SSLQuartic.infonce(a, c, 3)
        exact = GaussianInfoNCE(a, c, 3)
        found = monte_carlo_infonce(tiny, first[:pairs], second[:pairs], views(a, c, 1, seed + 1, 8000)[2])
        for name, theory, seen, error in (
            ("spectral", SSLQuartic.spectral(a, c, 3).loss({"W": w}), spectral.mean(), spectral.std() / len(spectral) ** 0.5),
            ("Barlow", SSLQuartic.barlow(a, 3).loss({"W": w}), barlow, 0.01 * abs(barlow + 3) / 4),
            ("InfoNCE, small W", model.loss({"W": tiny}), found, 0.03 * abs(float(model.loss({"W": tiny}))) / 4),
            ("InfoNCE, small W, exact form", model.loss({"W": 0.2 * tiny}) / exact.loss({"W": 0.2 * tiny}), 1.0, 1e-3 / 4),
        ):
            left, right, tolerance = rows.setdefault(name, ([], [], []))
            left.append(float(theory))
            right.append(float(seen))
            tolerance.append(4 * float(error))
    return [
        match(f"dictionary: {name} loss at a random W", left, right, max(tolerance), source=f"{SLUG} dictionary", spread=right)
        for name, (left, right, tolerance) in rows.items()
    ]


# ------------------------------------------------------------------------------------------------ A4, R6


@dataclass(frozen=True)
class ImbalanceConfig:
    """Two clusters 3 apart along e1, variance .05 within, other variances (.6, .3, .1) with augmentation .2; A, C from view pairs."""

    shares: tuple[float, ...] = (0.5, 0.1, 0.02)
    noises: tuple[float, ...] = (0.02, 1.0)
    samples: int = 200_000
    seeds: tuple[int, ...] = (0, 1, 2)


def imbalance(config: ImbalanceConfig) -> Part:
    """A4: the strength of the class direction is a / (a + c): little augmentation along it makes it robust to imbalance."""
    checks: list[Check] = []
    series, found_mean = [], {}
    for noise in config.noises:
        for share in config.shares:
            found = []
            for seed in config.seeds:
                rng = np.random.default_rng(seed)
                x = rng.normal(size=(config.samples, 4)) * np.sqrt([0.05, 0.6, 0.3, 0.1])
                x[:, 0] += 3 * (rng.uniform(size=config.samples) < share)
                spread = np.sqrt([noise, 0.2, 0.2, 0.2])
                pair = [x + rng.normal(size=x.shape) * spread for _ in range(2)]
                a, c = view_covariances(*pair)
                model = SSLQuartic.infonce(a, c, 4)
                found.append(float(model.levels[model.directions[0].abs().argmax()]))
            a_true = 9 * share * (1 - share) + 0.05
            theory = a_true / (a_true + noise)
            found_mean[(noise, share)] = sum(found) / len(found)
            claim = f"minority share {share}, augmentation {noise} along the class: level b"
            checks.append(match(claim, theory, found, 0.01, source=f"{SLUG} A4, R6", spread=found))
        grid = np.geomspace(0.005, 0.5, 60)
        strength = 9 * grid * (1 - grid) + 0.05
        series.append({"name": f"theory, c = {noise}", "x": grid.tolist(), "y": (strength / (strength + noise)).tolist()})
        measured = [found_mean[(noise, s)] for s in config.shares]
        series.append({"name": f"from view pairs, c = {noise}", "x": list(config.shares), "y": measured, "mark": "points"})
    drop = [found_mean[(n, config.shares[0])] / found_mean[(n, config.shares[-1])] for n in config.noises]
    checks.append(holds("little augmentation: level at balance over that at the rarest", drop[0], at_most=1.15, source=f"{SLUG} R6"))
    checks.append(control("strong augmentation: the same ratio", drop[-1], at_least=2.0, source=f"{SLUG} R6"))
    data = {"series": series, "x": "share of the minority", "y": "b", "log": "x"}
    return Part(tuple(checks), (Figure("imbalance", data, curves, "Strength of the class direction against the minority's share."),))


# ------------------------------------------------------------------------------------------------ A5, R8


@dataclass(frozen=True)
class BenignConfig:
    """20 inputs: 4 of signal (a = 1, c = .1), 16 of nuisance (a = .5, c = 2); linear target, noise .3, 40 labels, least squares. Errors
    are exact over the data, means over ``trials`` draws of the labelled set (one draw scatters by a factor of several)."""

    labels: int = 40
    noise: float = 0.3
    trials: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)


def benign(config: BenignConfig) -> Part:
    """A5: collapse of noise directions helps a probe on the signal, and ruins one on what was collapsed. Least squares on p features of
    n labels has mean excess error noise^2 p / (n - p - 1)."""
    a = torch.diag(torch.tensor([1.0] * 4 + [0.5] * 16).double())
    c = torch.diag(torch.tensor([0.1] * 4 + [2.0] * 16).double())
    models = {"full rank": SSLQuartic.infonce(a, c, 20), "decay .6": SSLQuartic.infonce(a, c, 20, decay=0.6),
              "alignment .5": SSLQuartic.infonce(a, c, 20, align=0.5)}  # fmt: skip
    errors: dict[tuple[str, str], list[Tensor]] = {}
    for seed in config.seeds:
        draws = Ensemble((seed,))
        x = draws.normal(config.trials, config.labels, 20)[0] * a.diagonal().sqrt()
        noise = config.noise * draws.normal(config.trials, config.labels)[0]
        signal = torch.cat([draws.normal(config.trials, 4)[0], torch.zeros(config.trials, 16, dtype=torch.float64)], 1)
        targets = {"signal": signal, "nuisance": 2 * torch.eye(20, dtype=torch.float64)[10].expand(config.trials, -1)}
        for name, model in models.items():
            w = model.encoder(model.strengths()[0], seed)
            readers = torch.linalg.pinv(x @ w.T, rtol=1e-9)
            for target, direction in targets.items():
                labels = (x @ direction[..., None])[..., 0] + noise
                gap = (readers @ labels[..., None])[..., 0] @ w - direction
                errors.setdefault((name, target), []).append((gap.square() * a.diagonal()).sum(-1))
    ranks = [float(m.learned_rank()) for m in models.values()]
    checks = [match("learned rank: B = A, decay .6, alignment .5", [20.0, 4.0, 4.0], ranks, 0.0, source=f"{SLUG} A5")]
    means = {key: [float(e.mean()) for e in rows] for key, rows in errors.items()}
    for (name, model), rank in zip(models.items(), ranks, strict=True):
        theory = config.noise**2 * rank / (config.labels - rank - 1)
        tolerance = max(5 * float(e.std()) / config.trials**0.5 for e in errors[(name, "signal")])
        seen = means[(name, "signal")]
        claim = f"{name}: mean error of a probe on the signal"
        checks.append(match(claim, theory, seen, tolerance, source=f"{SLUG} A5, R8", spread=seen))
        if model is models["full rank"]:
            continue
        gain = [f / e for f, e in zip(means[("full rank", "signal")], seen, strict=True)]
        loss = [e / f for f, e in zip(means[("full rank", "nuisance")], means[(name, "nuisance")], strict=True)]
        single = torch.stack([f / e for f, e in zip(errors[("full rank", "signal")], errors[(name, "signal")], strict=True)])
        checks.append(refuted(f"{name}: the ratio of errors is above 4 for every single draw of the labels, not only in the mean",
                              single.amin(-1), at_least=4.0, source=f"{SLUG} A5"))  # fmt: skip
        checks.append(holds(f"{name}: mean error of a signal probe, full rank over collapsed", gain, at_least=4.0, source=f"{SLUG} A5, R8",
                            spread=gain))  # fmt: skip
        checks.append(control(f"{name}: error of a probe on a collapsed direction over full rank", loss, at_least=4.0, source=f"{SLUG} A5",
                              spread=loss))  # fmt: skip
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ digits


@dataclass(frozen=True)
class DigitsConfig:
    """Linear encoder on scikit-learn's digits / 16, centred; views: a shift by at most one pixel and noise of deviation ``noise``;
    spectral contrastive loss on sampled pairs, Adam with a rate falling to zero."""

    outputs: int = 12
    noise: float = 0.2
    decays: tuple[float, ...] = (0.0, 0.3)
    batch: int = 256
    steps: int = 1500
    lr: float = 1e-2
    estimate: int = 20
    margin: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2)


def digit_encoder(config: DigitsConfig) -> Part:
    """Spectrum of a linear encoder trained on augmented digits, against the closed form on covariances estimated from view pairs."""
    split = digits()
    x = torch.cat([split.x, split.x_test]).double()
    x = x - x.mean(0)
    draws = Ensemble(config.seeds)

    padded = torch.nn.functional.pad(x.reshape(-1, 8, 8), (1, 1, 1, 1))
    moved = torch.stack([padded[:, i : i + 8, j : j + 8].flatten(1) for i in range(3) for j in range(3)])  # (9, n, 64), edges mean grey

    def view(index: Tensor) -> Tensor:
        """(s, b, 64) a random shift of each image (s, b), and noise."""
        step = draws.integers(9, index.shape[1])
        return moved[step, index] + config.noise * draws.normal(index.shape[1], 64)

    everything = torch.arange(len(x)).expand(len(config.seeds), -1)
    firsts, seconds = (torch.cat([view(everything) for _ in range(config.estimate)], 1) for _ in range(2))
    mean = firsts.mean((0, 1))
    a, c = view_covariances(firsts.flatten(0, 1), seconds.flatten(0, 1))
    values, vectors = torch.linalg.eigh(a)
    a = vectors * values.clamp_min(0) @ vectors.T
    checks: list[Check] = []
    series: list[dict[str, object]] = []
    for decay in config.decays:
        model = SSLQuartic.spectral(a, c, config.outputs, decay=decay)
        theory = torch.as_tensor(model.predict("minimum").values["spectrum"].value)
        w = (0.3 * draws.normal(config.outputs, 64) / 8).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=config.lr)
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
            index = draws.integers(len(x), config.batch)
            f, g = ((view(index) - mean) @ w.mT for _ in range(2))
            gram = f @ g.mT  # (s, b, b): off the diagonal, pairs of different samples
            inner = gram.diagonal(dim1=-2, dim2=-1)
            wall = (gram.square().sum((-2, -1)) - inner.square().sum(-1)) / (config.batch * (config.batch - 1))
            loss = -2 * inner.mean(-1) + wall + decay * w.square().sum((-2, -1))
            optimizer.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            spectra = torch.stack([model.spectrum(each) for each in w])
        words = f"digits, decay {decay:g}"
        blind = torch.as_tensor(
            SSLQuartic.spectral(a + c, 1e-9 * c, config.outputs, decay=decay).predict("minimum").values["spectrum"].value
        )
        gap = (spectra - theory).abs().amax(-1)
        checks.append(
            match(f"{words}: largest error of the trained spectrum", 0.0, gap, config.margin, source=f"{SLUG} full scale", spread=gap)
        )
        wrong = (spectra - blind).abs().amax(-1)
        checks.append(control(f"{words}: the covariance of single views in place of that of pairs misses it by", wrong,
                              at_least=4 * config.margin, source=f"{SLUG} pitfall"))  # fmt: skip
        ranks = (spectra > 0.02).double().sum(-1)
        checks.append(match(f"{words}: directions above .02", float((theory > 0.02).sum()), ranks, 1.0, source=f"{SLUG} R2", spread=ranks))
        order = list(range(1, config.outputs + 1))
        series.append({"name": f"theory, decay {decay:g}", "x": order, "y": theory.tolist(), "colour": len(series) // 2})
        series.append({"name": f"trained, decay {decay:g}", "x": order, "y": spectra.mean(0).tolist(), "mark": "points",
                       "colour": len(series) // 2})  # fmt: skip
    figure = Figure("a linear encoder on augmented digits", {"series": series, "x": "direction", "y": "N_i"}, curves,
                    "Decay collapses what the closed form says.")  # fmt: skip
    return Part(tuple(checks), (figure,))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    minima: MinimumConfig | None = MinimumConfig()
    saddles: SaddleConfig | None = SaddleConfig()
    infonce: InfoNCEConfig | None = InfoNCEConfig()
    imbalance: ImbalanceConfig | None = ImbalanceConfig()
    benign: BenignConfig | None = BenignConfig()
    digits: DigitsConfig | None = DigitsConfig()


ENTRY = Entry(
    slug=SLUG,
    title="What shapes the loss landscape of self-supervised learning?",
    paper="Liu Ziyin, Ekdeep Singh Lubana, Masahito Ueda, Hidenori Tanaka, ICLR 2023, arXiv 2210.00638",
    claims=(
        "InfoNCE, spectral contrastive and Barlow losses share one quartic landscape near the origin; all its stationary points are known.",
        "The losses alone only shrink directions; decay, overweighted alignment and normalisation make them collapse.",
        "With normalisation complete collapse is impossible, unless there is a bias.",
        "Little augmentation along a class makes it robust to imbalance; collapse of noise directions helps what is learned on top.",
    ),
    presets={
        "smoke": Config(
            minima=MinimumConfig(restarts=3, seeds=(0,)),
            saddles=None,
            infonce=InfoNCEConfig(restarts=2, pairs=2000, dictionary_pairs=200_000, seeds=(0,)),
            imbalance=ImbalanceConfig(shares=(0.5, 0.02)),
            digits=None,
        ),
        "default": Config(),
        "full": Config(
            minima=MinimumConfig(restarts=20),
            infonce=InfoNCEConfig(pairs=20_000, dictionary_pairs=4_000_000),
            imbalance=ImbalanceConfig(samples=2_000_000),
            digits=DigitsConfig(outputs=24, steps=20_000, batch=1024),
        ),
    },
    experiments={
        "minima": minima,
        "saddles": saddles,
        "infonce": infonce,
        "imbalance": imbalance,
        "benign": benign,
        "digits": digit_encoder,
    },
    sweeps={"directions": SSL},
)
