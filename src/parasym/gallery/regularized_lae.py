"""Loss Landscapes of Regularized Linear Autoencoders.

Slug regularized-lae. L = |X - W2 W1 X|_F^2 with nothing, lam |W2 W1|^2 or lam (|W1|^2 + |W2|^2) added; sums over samples, no 1/n and no
1/2, data centred; starts W ~ N(0, c^2 / fan-in), full batch. The last penalty cuts the symmetry from GL(k) to O(k), makes the encoder the
decoder's transpose at every critical point, and puts the principal directions and singular values of the data into the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import digits
from parasym.gallery.drawings import agreement, curves
from parasym.methods.principal import LAEPCA
from parasym.solvable.autoencoder import RegularizedLAE, align_backward, exact_tied, exact_untied, principal_directions, tied_descent
from parasym.solvable.engines import Params, descend, flow, lbfgs_restarts, morse, stack, tangent_derivative
from parasym.solvable.landscape import normal, rotation

SLUG = "regularized-lae"
SIGMA = (5.0, 4.2, 3.5, 2.9, 2.2, 1.6, 1.1, 0.6)


def scatter(seed: int, sigma: tuple[float, ...] = SIGMA) -> Tensor:
    """X X^T with these singular values and a random basis."""
    basis = rotation(len(sigma), seed)
    return basis * torch.tensor(sigma, dtype=torch.float64).square() @ basis.T


# ------------------------------------------------------------------------------------------------ A1, R1-R4


@dataclass(frozen=True)
class MinimumConfig:
    """m = 8, k = 4, singular values 5, 4.2, 3.5, 2.9, 2.2, 1.6, 1.1, .6 in a random basis; L-BFGS."""

    lams: tuple[float, ...] = (2.0, 11.0, 14.0)
    codes: int = 4
    restarts: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)


def minima(config: MinimumConfig) -> Part:
    """A1: minima of the three losses; transpose, directions and spectrum with the sum penalty, and their absence without it."""
    checks: list[Check] = []
    free_gaps, cosines, predicted, measured = [], [], [], []
    for penalty in ("none", "product", "sum"):
        for lam in config.lams if penalty != "none" else config.lams[:1]:
            rows: dict[str, list[float]] = {name: [] for name in ("theory", "loss", "map", "rank", "share", "gap", "cos", "sigma")}
            for seed in config.seeds:
                model = RegularizedLAE(scatter(seed), config.codes, lam, penalty)  # type: ignore[arg-type]
                theory, found = model.predict("minimum").values, model.minimise(seed, config.restarts)
                seen = model.observables(found.best)
                rows["theory"].append(float(theory["loss"]))
                rows["loss"].append(found.value)
                rows["share"].append(found.fraction())
                rows["map"].append(float((seen["map"] - torch.as_tensor(theory["map"].value)).norm()))
                rows["rank"].append(float((torch.linalg.svdvals(seen["map"]) > 1e-4).sum()))
                w1, w2 = found.best["W1"], found.best["W2"]
                gap = float((w1 - w2.T).norm())
                left = torch.linalg.svd(w2, full_matrices=False)[0]
                along = (left.T @ model.spectrum[1][:, : config.codes]).abs()
                live = len(model.top())
                cos = float(along[:live, :live].diagonal().min())
                if penalty == "sum":
                    rows["gap"].append(gap)
                    rows["cos"].append(1 - cos)
                    values = principal_directions(w2, lam)[1][:live]
                    rows["sigma"].append(float((values - model.spectrum[0][:live].sqrt()).abs().max()))
                    predicted += model.spectrum[0][:live].sqrt().tolist()
                    measured += values.tolist()
                else:
                    free_gaps.append(gap)
                    cosines.append(cos)
            words = "no penalty" if penalty == "none" else f"penalty on the {penalty}, lam = {lam:g}"
            expected = sum(s * s > (lam if penalty == "sum" else 0) for s in SIGMA[: config.codes])
            checks += [
                match(f"{words}: loss", rows["theory"], rows["loss"], 1e-8, source=f"{SLUG} A1, R2", spread=rows["loss"]),
                match(f"{words}: |W2 W1 - theory|", 0.0, rows["map"], 1e-5, source=f"{SLUG} A1, R1", spread=rows["map"]),
                match(f"{words}: rank", expected, rows["rank"], 0.0, source=f"{SLUG} A1, R2"),
                holds(f"{words}: share of restarts at the minimum", rows["share"], at_least=1.0, source=f"{SLUG} R2"),
            ]
            if penalty == "sum":
                checks += [
                    match(f"{words}: |W1 - W2^T|", 0.0, rows["gap"], 1e-5, source=f"{SLUG} A1, R3", spread=rows["gap"]),
                    match(f"{words}: 1 - |cos| to the principal directions", 0.0, rows["cos"], 1e-6, source=f"{SLUG} A1, R4"),
                    match(f"{words}: sqrt(lam / (1 - s^2)) minus sigma", 0.0, rows["sigma"], 1e-4, source=f"{SLUG} R4"),
                ]
    checks += [
        control("no penalty or the product's: |W1 - W2^T|", free_gaps, at_least=1.0, source=f"{SLUG} A1", spread=free_gaps),
        control("the same: worst |cos| to a principal direction", cosines, at_most=0.9, source=f"{SLUG} A1", spread=cosines),
        *_cut_and_symmetry(config),
    ]
    figure = Figure("singular values read from the decoder", {"series": [{"name": "lam = " + ", ".join(f"{lam:g}" for lam in config.lams),
                    "predicted": predicted, "measured": measured}], "x": "of the data", "y": "from the decoder"}, agreement,
                    "sqrt(lam / (1 - s^2)) of the decoder's singular values s.")  # fmt: skip
    return Part(tuple(checks), (figure, _shrinkage()))


def _cut_and_symmetry(config: MinimumConfig) -> list[Check]:
    """lam above sigma_1^2: nothing is left. GL(k) is a symmetry of the first two losses, only O(k) of the third."""
    dead, turned, stretched = [], [], []
    for seed in config.seeds:
        model = RegularizedLAE(scatter(seed), config.codes, 1.02 * SIGMA[0] ** 2)
        dead.append(float(model.minimise(seed, 2).best["W2"].abs().max()))
        for penalty in ("none", "product", "sum"):
            made = RegularizedLAE(scatter(seed), config.codes, 2.0, penalty)  # type: ignore[arg-type]
            theta = made.init(seed)
            turned.append(abs(tangent_derivative(made.loss, theta, next(iter(made.generators().values())))))
        general = RegularizedLAE(scatter(seed), config.codes, penalty="none").generators()["general linear"]
        stretched.append(abs(tangent_derivative(made.loss, made.init(seed), general)))
    return [
        control("lam > sigma_1^2: largest weight", dead, at_most=1e-4, source=f"{SLUG} A1", spread=dead),
        match("derivative along GL(k) (none, product) and O(k) (sum)", 0.0, turned, 1e-10, source=f"{SLUG} R1"),
        control("derivative along GL(k) with the sum penalty", stretched, at_least=0.1, source=f"{SLUG} R1"),
    ]


def _shrinkage() -> Figure:
    """The paper's plot: what each penalty leaves of a singular value."""
    sigma = np.linspace(0.05, 20, 200)
    series = []
    for root in (1, 5, 9):
        lam = float(root**2)
        series.append(
            {"name": f"sum, lam = {root}^2", "x": sigma.tolist(), "y": np.clip(1 - lam / sigma**2, 0, None).tolist(), "colour": root}
        )
        product = (sigma**2 / (sigma**2 + lam)).tolist()
        series.append({"name": f"product, lam = {root}^2", "x": sigma.tolist(), "y": product, "mark": "dash", "colour": root})
    data = {"series": series, "x": "sigma", "y": "eigenvalue of W2 W1"}
    return Figure("shrinkage", data, curves, "The sum penalty cuts sigma^2 <= lam; the product only shrinks.")


# ------------------------------------------------------------------------------------------------ A2, R5


@dataclass(frozen=True)
class MorseConfig:
    """All index sets of the problem of A1 at lam = 2 (six modes above it), four codes."""

    lam: float = 2.0
    codes: int = 4
    limit: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)


def saddles(config: MorseConfig) -> Part:
    """A2: gradient, loss, Hessian index and nullity on every critical manifold; one of them is a minimum, all have W1 = W2^T."""
    index, nullity, losses, gradients, expected, minima_found = [], [], [], [], [], []
    for n, seed in enumerate(config.seeds):
        model = RegularizedLAE(scatter(seed), config.codes, config.lam)
        points = list(model.critical_points(config.limit))
        chosen = points if n == 0 else points[:: max(1, len(points) // 10)]
        for point in chosen:
            theta = model.weights(point.modes, seed)
            found = morse(model.loss, theta, 1e-8)
            index.append(float(found[0] - (point.index or 0)))
            nullity.append(float(found[1] - (point.nullity or 0)))
            losses.append(float(model.loss(theta)))
            expected.append(point.loss)
            gradients.append(max(float(g.abs().max()) for g in torch.func.grad(model.loss)(theta).values()))
        if n == 0:
            minima_found.append(float(sum(point.index == 0 for point in points)))
    checks = [
        match(f"Hessian index minus theory, {len(index)} critical manifolds", 0.0, index, 0.0, source=f"{SLUG} A2, R5"),
        match("Hessian nullity minus the dimension of the manifold", 0.0, nullity, 0.0, source=f"{SLUG} A2, R5"),
        match("loss on the manifold", expected, losses, 1e-10, source=f"{SLUG} R2"),
        match("largest gradient on the manifold", 0.0, gradients, 1e-9, source=f"{SLUG} R1, R3"),
    ]
    if config.limit is None:
        claim = "manifolds of index 0: every local minimum is global"
        checks.append(match(claim, 1.0, minima_found, 0.0, source=f"{SLUG} R2"))
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ A3, R6


@dataclass(frozen=True)
class ChargeConfig:
    """Descent at rate 1e-4 with lam = .05 for 20,000 steps (time 2), and the flow itself."""

    lam: float = 0.05
    lr: float = 1e-4
    steps: int = 20_000
    codes: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)


def charge(config: ChargeConfig) -> Part:
    """A3: Q = W1 W1^T - W2^T W2 decays as e^(-4 lam t) under the sum penalty and is kept by the other two."""
    model = RegularizedLAE(scatter(0), config.codes, config.lam)
    flows, kept = [], []
    time = config.lr * config.steps
    predicted = math.exp(-4 * config.lam * time)
    starts = stack([model.init(seed) for seed in config.seeds])
    size = model.charge(starts).norm(dim=(-2, -1))
    trace: list[Tensor] = []

    def watch(step: int, w: Params) -> None:
        if step % 500 == 0:
            trace.append(model.charge(w).norm(dim=(-2, -1)) / size)

    end = descend(model.loss, starts, config.lr, config.steps, watch, broadcasts=True)
    ratios = (model.charge(end).norm(dim=(-2, -1)) / size).tolist()
    times = [config.lr * 500 * k for k in range(len(trace))]
    rows = torch.stack(trace)
    series: list[dict[str, object]] = [
        {"name": f"descent, seed {seed}", "x": times, "y": rows[:, k].tolist(), "mark": "points"} for k, seed in enumerate(config.seeds)
    ]
    for k, seed in enumerate(config.seeds):
        theta = model.init(seed)
        path = flow(model.loss, theta, [0.0, 0.25 * time])
        last = model.charge({name: w[-1] for name, w in path.theta.items()})
        flows.append(float((last - math.exp(-config.lam * time) * model.charge(theta)).norm() / size[k]))
        for penalty in ("none", "product"):
            free = replace(model, penalty=penalty, lam=1.0)
            still = flow(free.loss, theta, [0.0, 0.1])
            kept.append(float((free.charge({name: w[-1] for name, w in still.theta.items()}) - free.charge(theta)).norm() / size[k]))
    grid = np.linspace(0, time, 60)
    series.append({"name": "e^(-4 lam t)", "x": grid.tolist(), "y": np.exp(-4 * config.lam * grid).tolist()})
    figure = Figure("the imbalance decays", {"series": series, "x": "time", "y": "|Q| / |Q(0)|", "log": "y"}, curves, "R6.")
    return Part(
        (
            match("|Q(t)| / |Q(0)| under descent", predicted, ratios, 0.01, relative=True, source=f"{SLUG} A3, R6", spread=ratios),
            match("flow: Q(t) - e^(-4 lam t) Q(0), relative", 0.0, flows, 1e-7, source=f"{SLUG} R6"),
            match("no penalty, product penalty: change of Q under the flow, relative", 0.0, kept, 1e-7, source=f"{SLUG} R6"),
            control("half the rate (the convention with 1/2) misses by, relative", [abs(r / predicted**0.5 - 1) for r in ratios],
                    at_least=0.05, source=f"{SLUG} R6"),
        ),
        (figure,),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ R7, R8 and real data


@dataclass(frozen=True)
class AlgorithmConfig:
    """The algorithms of the paper at lam = 2 on the problem of A1, and scikit-learn's digits with k codes; ``share``: lam in units of
    the squared singular value of the last kept direction."""

    lam: float = 2.0
    rate: float = 0.01
    steps: int = 3000
    alternations: int = 400
    digit_codes: tuple[int, ...] = (2, 9)
    share: float = 0.5
    seeds: tuple[int, ...] = (0, 1, 2)


def algorithms(config: AlgorithmConfig) -> Part:
    """R8: descent, tied descent (regularised Oja), exact alternations; R9: information alignment; R7: probabilistic PCA; the digits."""
    top = torch.tensor(SIGMA[:4], dtype=torch.float64)
    names = ("untied descent", "tied descent", "exact, tied", "exact, untied", "exact, synced")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    gaps = []
    for seed in config.seeds:
        model = RegularizedLAE(scatter(seed), 4, config.lam)
        start = model.init(seed, 0.5)
        free = {name: w[0] for name, w in descend(model.loss, stack([start]), 0.4 * config.rate, config.steps, broadcasts=True).items()}
        gaps.append(float((free["W1"] - free["W2"].T).norm()))
        ends = (
            free["W2"],
            tied_descent(model.scatter, start["W2"], config.lam, config.rate, config.steps),
            exact_tied(model.scatter, start["W2"], config.lam, config.alternations),
            exact_untied(model.scatter, start, config.lam, config.alternations)["W2"],
            exact_untied(model.scatter, start, config.lam, config.alternations, synced=True)["W2"],
        )
        for values, w2 in zip(found.values(), ends, strict=True):
            values.append(principal_directions(w2, config.lam)[1])
    expected = top.repeat(len(config.seeds))
    checks = [match(f"{name}: singular values", expected, torch.cat(v), 1e-6, source=f"{SLUG} R8") for name, v in found.items()]
    checks.append(match("untied descent: |W1 - W2^T| at the end", 0.0, gaps, 1e-6, source=f"{SLUG} R3, R8", spread=gaps))
    return Part((*checks, *_alignment(config), *_likelihood(config), *_digits(config)))


def _alignment(config: AlgorithmConfig) -> list[Check]:
    """R9: backward weights that learn from a layer's input and output alone, for any forward weights and for those of a minimum."""
    ends, ridge, aligned, apart = [], [], [], []
    for seed in config.seeds:
        model = RegularizedLAE(scatter(seed), 4, config.lam)
        some, start = normal(seed, 4, len(SIGMA)) / 4, normal(seed + 50, len(SIGMA), 4)
        seen = some @ model.scatter
        end = align_backward(model.scatter, some, start, config.lam, config.rate, config.steps)
        ends.append(end)
        ridge.append(torch.linalg.solve(seen @ some.T + config.lam * torch.eye(4, dtype=torch.float64), seen).T)
        apart.append(float((end - some.T).norm() / some.norm()))
        best = model.representative(seed)["W1"]
        found = align_backward(model.scatter, best, start, config.lam, config.rate, config.steps)
        aligned.append(float((found - best.T).abs().max()))
    return [
        match("information alignment, any forward weights W: B against ridge regression of the input", torch.stack(ridge),
              torch.stack(ends), 1e-8, source=f"{SLUG} R9"),
        match("information alignment, W at the minimum: |B - W^T|", 0.0, aligned, 1e-8, source=f"{SLUG} R9, R3", spread=aligned),
        control("information alignment, W not at a critical point: |B - W^T| / |W|", apart, at_least=0.1, source=f"{SLUG} R9",
                spread=apart),
    ]  # fmt: skip


def _likelihood(config: AlgorithmConfig) -> list[Check]:
    """R7: the likelihood of probabilistic PCA, x ~ N(0, W W^T + s^2), maximised at s^2 = lam / n, against sigma times the decoder."""
    n, seen, theory = 30, [], []
    for seed in config.seeds:
        model = RegularizedLAE(scatter(seed), 4, config.lam)
        eye = torch.eye(len(SIGMA), dtype=torch.float64)

        def loss(w: Params, covariance: Tensor = model.scatter / n, eye: Tensor = eye) -> Tensor:
            whole = w["W"] @ w["W"].T + config.lam / n * eye
            return torch.logdet(whole) + torch.linalg.solve(whole, covariance).trace()

        found = lbfgs_restarts(loss, [{"W": normal(10 * seed + k, len(SIGMA), 4)} for k in range(3)]).best["W"]
        w2 = model.representative(seed)["W2"]
        left, s, _ = torch.linalg.svd(w2, full_matrices=False)
        loading = left * s * (config.lam / (1 - s.square())).sqrt() / n**0.5
        seen.append(found @ found.T)
        theory.append(loading @ loading.T)
    return [match("maximum likelihood of probabilistic PCA at noise lam / n: W W^T from the decoder", torch.stack(theory),
                  torch.stack(seen), 1e-6, source=f"{SLUG} R7")]  # fmt: skip


def _digits(config: AlgorithmConfig) -> list[Check]:
    split = digits()
    x = torch.cat([split.x, split.x_test]).double()
    centred = x - x.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    checks = []
    for codes in config.digit_codes:
        lam = config.share * float(values[codes - 1]) ** 2
        cosines, spectra, loadings = [], [], []
        for seed in config.seeds:
            fitted = LAEPCA(codes, lam, seed=seed).fit(x)
            components = torch.from_numpy(fitted.components_)
            cosines.append(float(1 - (components * directions[:codes]).sum(1).abs().min()))
            spectra.append(torch.from_numpy(fitted.singular_values_))
            # R7: pPCA loading (Lambda - s^2)^(1/2), Lambda = sigma^2 / n, against (sigma / sqrt n) s of the decoder
            n = len(x)
            shrunk = (1 - lam / spectra[-1].square()).sqrt()
            loadings.append(spectra[-1] / n**0.5 * shrunk - (values[:codes].square() / n - fitted.noise_variance_).sqrt())
        words = f"digits, {codes} codes"
        expected = values[:codes].repeat(len(config.seeds))
        checks += [
            match(f"{words}: 1 - |cos| to the principal directions", 0.0, cosines, 1e-6, source=f"{SLUG} R4", spread=cosines),
            match(f"{words}: singular values", expected, torch.cat(spectra), 1e-5, relative=True, source=f"{SLUG} R4"),
            match(f"{words}: loadings of probabilistic PCA from the fitted spectrum", 0.0, torch.cat(loadings), 1e-5, source=f"{SLUG} R7"),
        ]
    return checks


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    minima: MinimumConfig | None = MinimumConfig()
    saddles: MorseConfig | None = MorseConfig()
    charge: ChargeConfig | None = ChargeConfig()
    algorithms: AlgorithmConfig | None = AlgorithmConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Loss Landscapes of Regularized Linear Autoencoders",
    paper="Daniel Kunin, Jonathan M. Bloom, Aleksandrina Goeva, Cotton Seed, ICML 2019, arXiv 1901.08168",
    claims=(
        "L2 on both factors makes the encoder the decoder's transpose at every critical point and leaves only a rotation free.",
        "The decoder's singular vectors are principal directions, its singular values give those of the data; sigma^2 <= lam is cut.",
        "Critical manifolds, their losses, Morse indices and dimensions are known; all local minima are global.",
        "The imbalance W1 W1^T - W2^T W2 is a Noether charge that the penalty makes decay as e^(-4 lam t).",
    ),
    presets={
        "smoke": Config(
            minima=MinimumConfig(lams=(2.0, 14.0), restarts=2, seeds=(0,)),
            saddles=MorseConfig(limit=8),
            charge=ChargeConfig(steps=2000, lr=1e-3, seeds=(0,)),
            algorithms=AlgorithmConfig(digit_codes=(2,), seeds=(0,)),
        ),
        "default": Config(),
        "full": Config(
            minima=MinimumConfig(restarts=12, seeds=tuple(range(6))),
            algorithms=AlgorithmConfig(digit_codes=(2, 9, 20)),
        ),
    },
    experiments={"minima": minima, "saddles": saddles, "charge": charge, "algorithms": algorithms},
)
