"""On the Stepwise Nature of Self-Supervised Learning: embedding dimensions are learned one at a time.

Slug stepwise-ssl. Linear and kernel encoders: L = |C - I|_F^2, C = W Gamma W^T, nothing normalised or centred, gradient descent from W0 =
alpha N(0, 1). InfoNCE in its exact Gaussian form. On digits: a small convolutional encoder, Barlow Twins with lambda = 1 on centred,
unnormalised embeddings of two noisy, shifted views, fresh views at every step, SGD; the start is scaled down on the last layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from scipy.integrate import quad  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import digits
from parasym.gallery.drawings import agreement, curves
from parasym.gallery.ensemble import Ensemble, plain, slope
from parasym.solvable.barlow import BarlowFlow, KernelBarlow, half_times, view_correlation
from parasym.solvable.engines import follow

SLUG = "stepwise-ssl"


def rotated(spectrum: tuple[float, ...], draws: torch.Generator) -> Tensor:
    """V diag(spectrum) V^T with a random orthogonal V."""
    m = len(spectrum)
    V = torch.linalg.qr(torch.randn(m, m, generator=draws, dtype=torch.float64))[0]
    return V * torch.tensor(spectrum, dtype=torch.float64) @ V.mT


# ------------------------------------------------------------------------------------------------ A1, A2: linear


@dataclass(frozen=True)
class LinearConfig:
    """m = 12, d = 5; descent at eta from alpha N(0, 1), every ``every``-th step recorded; several alphas for the convergence of R3."""

    spectrum: tuple[float, ...] = (1.0, 0.6, 0.36, 0.2, 0.11, 0.05, 0.03, 0.01, 0.0, -0.05, -0.1, -0.3)
    d: int = 5
    eta: float = 0.01
    alphas: tuple[float, ...] = (1e-3, 1e-6, 1e-8)
    time: float = 60.0
    every: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)


def descend(gamma: Tensor, W: Tensor, eta: float, steps: int) -> tuple[Tensor, Tensor]:
    """Descent for many W (..., d, m) and gammas (..., m, m) at once; C before every step and after the last (T, ..., d, d), W."""
    eye, seen = torch.eye(W.shape[-2], dtype=torch.float64), []
    for _ in range(steps + 1):
        seen.append(W @ gamma @ W.mT)
        last, W = W, W - 4 * eta * (seen[-1] - eye) @ W @ gamma
    return torch.stack(seen), last


def spectra(C: Tensor) -> Tensor:
    """Eigenvalues of symmetric (..., d, d), decreasing."""
    return torch.linalg.eigvalsh(C).flip(-1)


def linear(config: LinearConfig) -> Part:
    """A1, A2, R1-R4, and controls: step times, plateaus, the final map; a large start, independent views, a degenerate spectrum."""
    alpha, count = config.alphas[1], len(config.alphas)
    steps, d = round(config.time / config.eta), config.d
    flows, starts, gammas, W = [], [], [], []
    for seed in config.seeds:
        draws = torch.Generator().manual_seed(seed)
        flows.append(BarlowFlow(rotated(config.spectrum, draws), d))
        starts.append(torch.randn(d, len(config.spectrum), generator=draws, dtype=torch.float64))
        x, other = (torch.randn(40_000, len(config.spectrum), generator=draws, dtype=torch.float64) for _ in range(2))
        # the last two are controls: a start of order one, and views that have nothing in common
        gammas.append(torch.stack([flows[-1].gamma] * (count + 1) + [view_correlation(x, other)]))
        W.append(torch.stack([a * starts[-1] for a in (*config.alphas, 1.0, alpha)]))
    C, last = descend(torch.stack(gammas), torch.stack(W), config.eta, steps)
    loss = (C - torch.eye(d, dtype=torch.float64)).square().sum((-2, -1))
    t = config.eta * torch.arange(0, steps + 1, config.every, dtype=torch.float64)
    lam = spectra(C[:: config.every, :, 1])
    early, discrete, ends, plateaus, naive, converge, exact = [], [], [], [], [], [], []
    figure = None
    for i, (closed, start) in enumerate(zip(flows, starts, strict=True)):
        u, s0 = closed.start(alpha * start)
        found, theory = half_times(t, lam[:, i]), closed.step_times(s0)
        early.append(found / theory - 1)
        discrete.append(found / closed.step_times(s0, config.eta) - 1)
        wrong = (alpha * start @ closed.directions[:, :d]).norm(dim=0)
        naive.append((found / closed.step_times(wrong, config.eta) - 1).abs().max())
        converge.append(
            [float((last[i, k] - closed.final(closed.start(a * start)[0])).norm() / last[i, k].norm()) for k, a in enumerate(config.alphas)]
        )
        ends.append(converge[-1][1])
        plateaus.append([float(loss[round(float(0.5 * (found[j] + found[j + 1])) / config.eta), i, 1]) for j in range(d - 1)])
        exact.append(_aligned(closed, u * 1e-2 @ closed.directions[:, :d].mT))
        if figure is None:
            figure = _staircase(t, lam[:, i], closed.eigenvalues(s0, t), closed.loss(s0, t))
    controls = [*_linear_controls(config, loss), *_tied(config)]
    assert figure is not None
    checks = (
        match("step times, every mode and seed, relative", 0.0, torch.stack(early), 0.05, source=f"{SLUG} A1, R2, R3"),
        match("step times with the growth rate of descent, relative", 0.0, torch.stack(discrete), 0.01, source=f"{SLUG} A1"),
        match("plateaus of the loss: d - 1, ..., 1", [float(v) for v in range(d - 1, 0, -1)] * len(config.seeds),
              [v for row in plateaus for v in row], 0.05, source=f"{SLUG} A1, R4"),
        match(f"final W against sum g^-1/2 u v^T, relative, alpha = {alpha:g}", 0.0, ends, 1e-2, source=f"{SLUG} A1, R4", spread=ends),
        holds("the error of the final W falls with alpha: first over last", [row[0] / row[-1] for row in converge], at_least=10.0,
              source=f"{SLUG} R3"),
        match("aligned start against the ODE", 0.0, exact, 1e-10, source=f"{SLUG} A2, R1", spread=exact),
        control("|W0 v_j| in place of the QR rule: worst error of a step time", torch.stack(naive), at_least=0.02, source=f"{SLUG} R3"),
        *controls,
    )  # fmt: skip
    return Part(checks, figure)


def _aligned(closed: BarlowFlow, W: Tensor) -> float:
    t = torch.linspace(0, 20, 41, dtype=torch.float64)
    eye = torch.eye(closed.d, dtype=torch.float64)
    rhs = lambda _, w: {"w": -4 * (w["w"] @ closed.gamma @ w["w"].mT - eye) @ w["w"] @ closed.gamma}  # noqa: E731
    run = follow(rhs, {"w": W}, t, rtol=1e-12, atol=1e-15)
    return float((closed.trajectory(W, t) - run.theta["w"]).abs().max())


def _staircase(t: Tensor, lam: Tensor, theory: Tensor, loss: Tensor) -> tuple[Figure, Figure]:
    pick = torch.unique(torch.logspace(0, math.log10(len(t) - 1), 150).long())
    ranks = theory.sort(-1, descending=True).values
    series = []
    for j in range(lam.shape[1]):
        series.append({"name": f"mode {j + 1}", "x": plain(t[pick]), "y": plain(ranks[pick, j]), "colour": j})
        series.append({"name": f"descent {j + 1}", "x": plain(t[pick]), "y": plain(lam[pick, j]), "mark": "points", "colour": j})
    measured = (1 - lam).square().sum(-1)
    losses = [{"name": "closed form", "x": plain(t[pick]), "y": plain(loss[pick])},
              {"name": "descent", "x": plain(t[pick]), "y": plain(measured[pick]), "mark": "points"}]  # fmt: skip
    return (
        Figure("eigenvalues of the embedding, linear", {"series": series, "x": "time", "y": "lambda_j", "log": "x"}, curves),
        Figure(
            "the staircase of the loss", {"series": losses, "x": "time", "y": "loss", "log": "x"}, curves, "One step for each dimension."
        ),
    )


def _linear_controls(config: LinearConfig, loss: Tensor) -> list[Check]:
    """A start of order one and views that have nothing in common, from the losses (T, seeds, alphas and those two)."""
    d, alpha, source = config.d, config.alphas[1], f"{SLUG} control"
    # off the plateau d - j the next mode grows e-fold in 1 / (8 g_{j+1}): the unit in which a stay there is counted
    unit = config.eta * 8 * torch.tensor(config.spectrum[1:d], dtype=torch.float64)
    small, large = (torch.stack([_stays(loss[:, i, k], d) * unit for i in range(len(config.seeds))]) for k in (1, -2))
    blank = loss[..., -1].amin(0)
    return [
        holds(f"alpha = {alpha:g}: longest stay within .05 of each plateau d - 1, ..., 1, in e-folding times of the next mode, every seed",
              small, at_least=3.0, source=f"{SLUG} R4"),
        control("alpha = 1: the same; there are no plateaus", large, at_most=0.5, source=source),
        control("independent views: the loss stays at d", blank, at_least=0.95 * d, source=source, spread=blank),
    ]  # fmt: skip


def _stays(loss: Tensor, d: int) -> Tensor:
    """Longest run of steps within .05 of each of the levels d - 1, ..., 1, (d - 1,)."""
    longest = []
    for level in range(d - 1, 0, -1):
        away = torch.nn.functional.pad(((loss - level).abs() >= 0.05).nonzero()[:, 0], (1, 1), value=-1)
        away[-1] = len(loss)
        longest.append(float((away.diff() - 1).max()))
    return torch.tensor(longest, dtype=torch.float64)


def _tied(config: LinearConfig) -> list[Check]:
    """Equal eigenvalues have no order: the two steps are those of the singular values of W0 on the pair, of which the QR rule knows the
    product only, so the sum of the two times; how far apart they are does not grow as the start shrinks."""
    alphas, steps = (config.alphas[0], config.alphas[-1]), round(10 / config.eta)
    t = config.eta * torch.arange(steps + 1, dtype=torch.float64)
    tied, gammas, starts = [], [], []
    for seed in config.seeds:
        draws = torch.Generator().manual_seed(seed)
        pair = [rotated((1.0, g, 0.25, 0.0), draws) for g in (1.0, 0.7)]
        tied.append(BarlowFlow(pair[0], 2))
        gammas.append(torch.stack(pair)[:, None])
        starts.append(torch.randn(2, 4, generator=draws, dtype=torch.float64))
    W = torch.stack([torch.stack([a * w for a in alphas])[None] for w in starts])
    lam = spectra(descend(torch.stack(gammas), W, config.eta, steps)[0])  # steps, seeds, tied or not, alphas
    seen, theory, sums, wrong, gaps = [], [], [], [], []
    for i, (closed, w) in enumerate(zip(tied, starts, strict=True)):
        tau = [[half_times(t, lam[:, i, k, n]) for n in range(2)] for k in range(2)]
        for alpha, found in zip(alphas, tau[0], strict=True):
            rule = closed.step_times(closed.start(alpha * w)[1], config.eta)
            seen.append(found)
            theory.append(closed.step_times(torch.linalg.svdvals(alpha * w @ closed.directions[:, :2]), config.eta))
            sums.append(found.sum() / rule.sum() - 1)
            wrong.append((found / rule - 1).abs().max())
        gaps.append([(row[1].diff() / row[0].diff()).item() for row in tau])
    ratio = torch.tensor(gaps, dtype=torch.float64)
    return [
        match("equal eigenvalues: both step times, from the singular values of W0 on the pair", torch.stack(theory), torch.stack(seen),
              0.01, relative=True, source=f"{SLUG} control"),
        match("equal eigenvalues: the sum of the two step times against the QR rule, relative", 0.0, sums, 0.01,
              source=f"{SLUG} control"),
        control("equal eigenvalues: the QR rule for each of them, worst error of the seeds", torch.stack(wrong).max(), at_least=0.02,
                source=f"{SLUG} control", spread=wrong),
        match("equal eigenvalues: time between the two steps, smallest alpha over largest", 1.0, ratio[:, 0], 0.02,
              source=f"{SLUG} control", spread=ratio[:, 0]),
        control("unequal eigenvalues: the same, the steps part as alpha falls", ratio[:, 1], at_least=1.3, source=f"{SLUG} control",
                spread=ratio[:, 1]),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ A3: kernels


@dataclass(frozen=True)
class KernelConfig:
    """40 pairs in the plane around (0,0), (3,0), (0,5), (7,7) with 20, 11, 6, 3 points, jitter .3 in clusters and between views, RBF of
    width 1.5, d = 3; A0 = alpha N(0,1) K^-1/2, eta = .01 / g_1; embedding of 50 new points."""

    alphas: tuple[float, ...] = (1e-4, 1e-8)
    tolerances: tuple[float, ...] = (5e-2, 2e-3)
    d: int = 3
    steps: int = 12_000
    seeds: tuple[int, ...] = (0, 1, 2)


def kernels(config: KernelConfig) -> Part:
    """A3, R5: the embedding kernel gradient flow ends at, on new points."""
    centres, counts = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 5.0], [7.0, 7.0]], dtype=torch.float64), (20, 11, 6, 3)
    forms, losses, errors = [], [], {alpha: [] for alpha in config.alphas}  # type: ignore[var-annotated]
    for seed in config.seeds:
        draws = torch.Generator().manual_seed(seed)
        jitter = lambda n: 0.3 * torch.randn(n, 2, generator=draws, dtype=torch.float64)  # noqa: E731, B023
        points = centres.repeat_interleave(torch.tensor(counts), 0)
        points = points + jitter(len(points))
        views = torch.cat([points + jitter(len(points)), points + jitter(len(points))])
        fresh = centres[torch.randint(4, (50,), generator=draws)] + jitter(50)
        rbf = lambda a, b: (-torch.cdist(a, b).square() / (2 * 1.5**2)).exp()  # noqa: E731
        found = KernelBarlow(rbf(views, views), config.d)
        forms.append(float((found.paper_form() - found.linear.gamma).abs().max()))
        starts = [found.random_start(alpha, torch.Generator().manual_seed(seed + 7)) for alpha in config.alphas]
        A, eta = torch.stack(starts), 0.01 / float(found.linear.spectrum[0])
        KS, eye = found.kernel @ found.swap / len(found.kernel), torch.eye(config.d, dtype=torch.float64)
        both = KS @ found.kernel
        for _ in range(config.steps):
            A = A - 4 * eta * (A @ both @ A.mT - eye) @ A @ KS
        for k, alpha in enumerate(config.alphas):
            seen, theory = rbf(fresh, views) @ A[k].mT, found.embed(starts[k], rbf(fresh, views))
            errors[alpha].append(float((seen - theory).norm() / theory.norm()))
            losses.append(float((found.covariance(A[k]) - eye).square().sum()))
    checks = [match(f"embedding of new points, relative, alpha = {alpha:g}", 0.0, errors[alpha], tol, source=f"{SLUG} A3, R5",
                    spread=errors[alpha])
              for alpha, tol in zip(config.alphas, config.tolerances, strict=True)]  # fmt: skip
    checks += [
        match("loss at the end", 0.0, losses, 1e-11, source=f"{SLUG} A3"),
        match("K^1/2 S K^1/2 and the paper's form of Gamma", 0.0, forms, 1e-7, source=f"{SLUG} R5"),
    ]
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ A4, R7, R8: other losses, a speed-up


@dataclass(frozen=True)
class OtherConfig:
    """Gaussian InfoNCE with A = diag(2, 1, .5, .25), C = A / 5 in 4 x 4; and preconditioned descent.

    InfoNCE on Gaussian data has L = -Tr(W B W^T) + O(W^4) with B = A; here W Sigma W^T, Sigma = A + C; alpha = 1e-5, eta = .01.
    """

    levels: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25)
    alpha: float = 1e-5
    eta: float = 0.01
    steps: int = 6000
    spectrum: tuple[float, ...] = (1.0, 0.5, 0.25, 0.12)
    eps: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def infonce_slope(W: Tensor, A: Tensor, C: Tensor) -> Tensor:
    """Gradient (..., d, m) of the exact Gaussian InfoNCE (`GaussianInfoNCE`): 2 W C - (u + u^2) W (A + C), u = (1 + W (A + C) W^T)^-1."""
    sigma = A + C
    u = torch.linalg.inv(torch.eye(W.shape[-2], dtype=W.dtype) + W @ sigma @ W.mT)
    return 2 * W @ C - (u + u @ u) @ W @ sigma


def others(config: OtherConfig) -> Part:
    """A4, R7, R8: InfoNCE climbs the same staircase at rates 4 eig(B); a preconditioner makes the steps come together."""
    A = torch.tensor(config.levels, dtype=torch.float64).diag()
    C = A / 5
    t = config.eta * torch.arange(config.steps + 1, dtype=torch.float64)
    W, seen = config.alpha * Ensemble(config.seeds).normal(4, 4), []
    for _ in range(config.steps + 1):
        seen.append(W @ (A + C) @ W.mT)
        W = W - config.eta * infonce_slope(W, A, C)
    lam = torch.linalg.eigvalsh(torch.stack(seen)).flip(-1)
    rates, orders = [], []
    for i in range(len(config.seeds)):
        grown, halves = [], []
        for j in range(4):
            curve = lam[:, i, j]
            first, last, half = (int((curve >= share * curve[-1]).nonzero()[0]) for share in (1e-5, 3e-3, 0.5))
            grown.append(slope(t[first:last], curve[first:last].log()))
            halves.append(t[half])
        rates.append(torch.stack(grown))
        orders.append(min(float(b / a) for a, b in pairwise(halves)))
    tau, gap = _boosted(config)
    spread = {how: tau[how][:, -1] / tau[how][:, 0] for how in tau}
    checks = (
        match("InfoNCE: early growth rate of each eigenvalue against 4 eig(B)", [4 * v for v in config.levels] * len(config.seeds),
              torch.stack(rates), 0.03, relative=True, source=f"{SLUG} A4, R7"),
        holds("InfoNCE: each step comes later than the one before, ratio of times", orders, at_least=1.3, source=f"{SLUG} A4"),
        holds("P = (C + eps)^-1/2 over its largest eigenvalue: last step over first, share of the plain one",
              spread["largest"] / spread["plain"], at_most=0.5, source=f"{SLUG} R8", spread=spread["largest"]),
        holds("P = ((C + eps) / (c_max + eps))^-1/2: the same", spread["relative"] / spread["plain"], at_most=0.5, source=f"{SLUG} R8",
              spread=spread["relative"]),
        match("with either C = I at the end all the same", 0.0, [gap["largest"], gap["relative"]], 1e-3, source=f"{SLUG} R8"),
        match("P = (C + eps)^-1/2 of a fixed size: step times against int dlam / (8 g lam (1 - lam) P), relative",
              torch.stack([_fixed_times(config, seed) for seed in config.seeds]), tau["fixed"], 0.05,
              relative=True, source=f"{SLUG} R8"),
        control("P of a fixed size: the ratio of step times stays that of 1 / g", spread["fixed"] / spread["plain"],
                at_least=0.7, source=f"{SLUG} R8", spread=spread["fixed"]),
    )  # fmt: skip
    series = [{"name": f"eigenvalue {j + 1}", "x": plain(t[1:]), "y": plain(lam[1:, 0, j])} for j in range(4)]
    return Part(checks, (Figure("InfoNCE", {"series": series, "x": "time", "y": "eigenvalue of W Sigma W^T", "log": "y"}, curves),))


_BOOSTS = ("plain", "fixed", "largest", "relative")


def _boosted_start(config: OtherConfig, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return rotated(config.spectrum, draws), config.alpha * torch.randn(4, 4, generator=draws, dtype=torch.float64)


def _boosted(config: OtherConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Step times (seeds, 4), and |C - I| at the end (seeds,), of descent with each preconditioner P(C).

    With P a fixed function of C each mode obeys lam' = 8 g lam (1 - lam) P(lam): its step time is 1 / g times a number that hardly
    depends on the mode, so the ratios stay. A P relative to its own largest eigenvalue speeds all up as the last mode wakes; one relative
    to the largest of C leaves the first step alone and hurries the rest.
    """
    made = [_boosted_start(config, seed) for seed in config.seeds]
    gamma, W = torch.stack([g for g, _ in made]), torch.stack([w for _, w in made]).repeat(len(_BOOSTS), 1, 1, 1)
    eye, seen = torch.eye(4, dtype=torch.float64), []
    # a fixed P makes the start about 30 times faster
    eta = torch.tensor([config.eta / 8 if how == "fixed" else config.eta for how in _BOOSTS], dtype=torch.float64)
    for _ in range(config.steps):
        C = W @ gamma @ W.mT
        seen.append(C)
        values, vectors = torch.linalg.eigh(C)
        values = values.clamp_min(0) + config.eps
        rates = values.rsqrt()
        rates[0] = 1.0
        rates[2], rates[3] = rates[2] * values[2, :, :1].sqrt(), rates[3] * values[3, :, -1:].sqrt()
        W = W + 4 * eta[:, None, None, None] * (vectors * rates[..., None, :]) @ vectors.mT @ (eye - C) @ W @ gamma
    lam, t = spectra(torch.stack(seen)), torch.arange(len(seen), dtype=torch.float64)
    tau = {how: torch.stack([half_times(eta[i] * t, lam[:, i, k]) for k in range(len(made))]) for i, how in enumerate(_BOOSTS)}
    gaps = (W @ gamma @ W.mT - eye).abs().amax((-2, -1))
    return tau, dict(zip(_BOOSTS, gaps, strict=True))


def _fixed_times(config: OtherConfig, seed: int) -> Tensor:
    """(4,) step times of flow with P = (C + eps)^-1/2 from the QR start: int_{lam_0}^{1/2} (lam + eps)^{1/2} / (8 g lam (1 - lam)) dlam."""
    gamma, W = _boosted_start(config, seed)
    closed = BarlowFlow(gamma, 4)
    lam = closed.spectrum * closed.start(W)[1].square()
    times = []
    for g, first in zip(closed.spectrum.tolist(), lam.tolist(), strict=True):
        rate = lambda x: math.sqrt(math.exp(x) + config.eps) / (8 * g * -math.expm1(x))  # noqa: E731, B023
        times.append(quad(rate, math.log(first), math.log(0.5))[0])
    return torch.tensor(times, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ a convolutional encoder on digits


@dataclass(frozen=True)
class ConvConfig:
    """Encoder conv(8, 3x3, stride 1) - ReLU - conv(16, 3x3, stride 2) - ReLU - linear(d) without biases on the 1797 digits; views: shift
    of at most one pixel and noise of size ``noise``; the last layer's start times ``alpha``; plain SGD, batches of ``batch`` pairs."""

    d: int = 6
    alpha: float = 1e-4
    noise: float = 0.1
    lr: float = 0.05
    batch: int = 256
    steps: int = 1000
    every: int = 4
    probe: int = 300
    large: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)


def _views(x: Tensor, noise: float, stream: torch.Generator) -> Tensor:
    """(n, 1, 8, 8): images rolled by at most one pixel each way, sixteen groups by their own amount, with noise."""
    moves = torch.randint(-1, 2, (16, 2), generator=stream).tolist()
    moved = torch.cat([torch.roll(part, move, (2, 3)) for part, move in zip(x.chunk(16), moves, strict=False)])
    return moved + noise * torch.randn(x.shape, generator=stream)


def _centred(z: Tensor) -> Tensor:
    return z - z.mean(0)


def _encoder(d: int, alpha: float, stream: torch.Generator) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, d, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        for index, scale in (("0", 1.0), ("2", 1.0), ("5", alpha)):
            w = net.get_parameter(f"{index}.weight")
            w.copy_(scale * torch.randn(w.shape, generator=stream) * (2 / w[0].numel()) ** 0.5)
    return net


def _train(config: ConvConfig, alpha: float, seed: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the cross-correlation of held-out views (steps / every, d), and of Gamma of the untrained features (d,)."""
    stream = torch.Generator().manual_seed(seed)
    net, seen = _encoder(config.d, alpha, stream), []
    probe = [_views(x[: config.probe], config.noise, stream) for _ in range(2)]
    with torch.no_grad():
        features = [_centred(net[:5](v)).double() for v in probe]
        g = torch.linalg.eigvalsh(view_correlation(*features)).flip(0)[: config.d]
    eye = torch.eye(config.d)
    for step in range(config.steps):
        if step % config.every == 0:
            with torch.no_grad():
                seen.append(torch.linalg.eigvalsh(view_correlation(*(_centred(net(v)) for v in probe))).flip(0))
        pick = torch.randint(len(x), (config.batch,), generator=stream)
        a, b = (_centred(net(_views(x[pick], config.noise, stream))) for _ in range(2))
        C = 0.5 * (a.mT @ b + b.mT @ a) / config.batch
        grads = torch.autograd.grad((C - eye).square().sum(), list(net.parameters()))
        with torch.no_grad():
            for p, grad in zip(net.parameters(), grads, strict=True):
                p.sub_(config.lr * grad)
    return torch.stack(seen), g


def conv(config: ConvConfig) -> Part:
    """R7: a convolutional encoder learns its dimensions one at a time; step times fall as a power of the spectrum it starts with.

    Only the staircase and its times carry over: the learned eigenvalues of held-out views stay below the 1 at which linear theory ends
    (R4); by how much is among the checks.
    """
    x = digits(0.98).x.reshape(-1, 1, 8, 8)
    x = x - x.mean()
    order, powers, learned, series, waits, short = [], [], [], [], [], []
    t = 1 + torch.arange(0, config.steps, config.every).double()
    for seed in config.seeds:
        lam, g = _train(config, config.alpha, seed, x)
        tau = half_times(t, lam)
        done = tau.isfinite()
        learned.append(float(done.sum()))
        times = tau[done]
        order.append(float(times[-1] / times[0]))
        waits.append(float(times[0]))
        short.append(float(1 - lam[-1, done].min()))
        powers.append(float(torch.corrcoef(torch.stack([times.log(), -g[done].log()]))[0, 1]))
        if seed == config.seeds[0]:
            keep = torch.unique(torch.logspace(0, math.log10(len(t) - 1), 120).long())
            series = [{"name": f"dimension {j + 1}", "x": plain(t[keep]), "y": plain(lam[keep, j])} for j in range(config.d)]
            points = {"series": [{"name": "steps", "predicted": plain(1 / g[done]), "measured": plain(times)}], "x": "1 / g_j of the start",
                      "y": "step", "log": "xy"}  # fmt: skip
    brief = replace(config, steps=config.steps // 4)
    at_once = [half_times(t, _train(brief, config.large, seed, x)[0])[0] for seed in config.seeds[:1]]
    checks = (
        holds("dimensions learned (eigenvalue above one half)", learned, at_least=4.0, source=f"{SLUG} R7", spread=learned),
        holds("last step time over first", order, at_least=1.8, source=f"{SLUG} R7", spread=order),
        holds("correlation of log step time with log 1 / g at the start", powers, at_least=0.8, source=f"{SLUG} R7", spread=powers),
        holds("not carried over: least of the learned eigenvalues at the end, below the 1 of linear theory by", short, at_least=0.02,
              source=f"{SLUG} R4, R7", spread=short),
        control(f"last layer {config.large:g} times its usual size: first step, over that of the small start", at_once[0] / waits[0],
                at_most=0.25, source=f"{SLUG} control"),
    )  # fmt: skip
    return Part(checks, (
        Figure("the staircase of a convolutional encoder", {"series": series, "x": "step", "y": "eigenvalue", "log": "x"}, curves),
        Figure("step times against the spectrum", points, agreement),
    ))  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    linear: LinearConfig | None = LinearConfig()
    kernels: KernelConfig | None = KernelConfig()
    others: OtherConfig | None = OtherConfig()
    conv: ConvConfig | None = ConvConfig()


ENTRY = Entry(
    slug=SLUG,
    title="On the Stepwise Nature of Self-Supervised Learning",
    paper="J. B. Simon, M. Knutins, L. Ziyin, D. Geisz, A. J. Fetterman, J. Albrecht, ICML 2023, arXiv 2303.15438",
    claims=(
        "From a small start a linear or kernel encoder learns its embedding one dimension at a time, at times known in closed form.",
        "It ends at the top eigendirections of the cross-view correlation: a kernel PCA.",
        "InfoNCE, and a convolutional encoder on digits, climb the same staircase.",
    ),
    presets={
        "smoke": Config(linear=LinearConfig(eta=0.02), kernels=KernelConfig(steps=5000), others=OtherConfig(steps=4000), conv=None),
        "default": Config(),
        "full": Config(
            linear=LinearConfig(seeds=tuple(range(8))), kernels=KernelConfig(seeds=tuple(range(8))),
            conv=ConvConfig(d=16, steps=10_000, seeds=tuple(range(5))),
        ),
    },
    experiments={"linear": linear, "kernels": kernels, "others": others, "conv": conv},
)  # fmt: skip
