"""SGD with a constant large learning rate can converge to local maxima, leave saddles slowly, and prefer sharp minima.

Slug sgd-local-maxima. One-dimensional landscapes with multiplicative noise, one sample a step; what happens at a point is
decided by the sign of E log|1 - lr h|, in discrete time. Replicas that overflow on an unbounded landscape are an outcome of
their own and never count as converged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import bars, curves
from parasym.gallery.probabilistic_stability import NetworkConfig, network
from parasym.gallery.sweep import Quantity, Sweep, cell_seed
from parasym.simulate import SGD, Adam, Ensemble, Increments, Lyapunov, Momentum, System, cos, descent, exp, log, sin, where
from parasym.solvable.factors import Discrete, design_slow_escape
from parasym.solvable.models import LocalMaximum, local_maximum_run

SLUG = "sgd-local-maxima"


# ------------------------------------------------------------------------------------------------ R0, R1, A1


@dataclass(frozen=True)
class MaximumConfig:
    """l = x w^2/2 + w^4/4, x in {b, -c}, start .1 N(0,1)."""

    held: tuple[float, float, float] = (1.5, 1.6, 0.5)  # b, c, lr
    strong: tuple[float, float, float] = (1.0, 1.4, 0.8)
    left: tuple[float, float, float] = (1.0, 1.4, 0.05)
    replicas: int = 2000
    steps: int = 3000
    seeds: tuple[int, ...] = (1, 2, 3)


def maximum(config: MaximumConfig) -> Part:
    """A1, R0, R1: a local maximum holds SGD when the exponent is negative, and gradient descent never."""
    checks: list[Check] = []
    for name, (b, c, lr), bound in (("held", config.held, 0.99), ("strong", config.strong, 0.9), ("left", config.left, None)):
        model = LocalMaximum(b, c, lr)
        there, overflowed = [], []
        for seed in config.seeds:
            run = local_maximum_run(b, c, lr, config.replicas, config.steps, seed)
            there.append(float(((run.final[:, 0].abs() < 1e-6) & run.sound).double().mean()))
            overflowed.append(run.diverged / config.replicas)
        words = f"b = {b}, c = {c}, lr = {lr}, exponent {model.rate:+.3f}: share at the maximum"
        if bound is None:
            checks.append(control(words, there, at_most=0.0, source=f"{SLUG} A1", spread=there))
            checks.append(control("its exponent is positive", model.rate, at_least=0.0, source=f"{SLUG} R1"))
        else:
            checks.append(holds(words, there, at_least=bound, source=f"{SLUG} A1", spread=there))
            checks.append(holds("its exponent is negative", model.rate, at_most=0.0, source=f"{SLUG} R1"))
        if name == "strong":
            accounted = [a + o for a, o in zip(there, overflowed, strict=True)]
            checks.append(
                holds(
                    "those not at the maximum overflowed: share accounted for",
                    accounted,
                    at_least=1.0,
                    source=f"{SLUG} R1",
                    spread=overflowed,
                )
            )
    b, c, lr = config.held
    law = Discrete((b, -c))
    powers = Increments(lambda old, new, p: [exp(new[0] - old[0]), exp(2 * (new[0] - old[0]))])
    grown = [
        torch.as_tensor(
            Ensemble(two_points(), 1000, {"lr": lr, "b": b, "c": c}, seed, precision="float64").run(1000, [powers])[0].value
        ).tolist()
        for seed in config.seeds
    ]
    curvature = float(torch.func.hessian(LocalMaximum(b, c, lr).loss)(torch.zeros(1, dtype=torch.float64)))
    return Part(
        (
            *checks,
            holds("the origin is a strict local maximum: curvature of the mean loss", curvature, at_most=-1e-3, source=f"{SLUG} R1"),
            match(
                "means of |1 - lr x| and its square over all factors drawn",
                [law.moment(lr, 1), law.moment(lr, 2)] * len(grown),
                [x for row in grown for x in row],
                0.01,
                source=f"{SLUG} R0",
            ),
            control("so that the moments say otherwise: both grow a step by", grown, at_least=1.01, source=f"{SLUG} R0"),
            _gradient_descent(config),
        )
    )


def _gradient_descent(config: MaximumConfig) -> Check:
    """Control 2: the full batch goes to the minima +- sqrt((c-b)/2)."""
    b, c, lr = config.held
    system = descent("full batch", lambda w, p, d: [0.5 * (b - c) * w[0] + w[0] ** 3], SGD(), lambda p, d: [0.1 * d.normal()])
    run = Ensemble(system, config.replicas, {"lr": lr}, config.seeds[0], precision="float64").run(config.steps)
    away = float((run.final[:, 0].abs() - math.sqrt((c - b) / 2)).abs().max())
    return control("full batch: largest distance from the minima +- sqrt((c-b)/2)", away, at_most=1e-6, source=f"{SLUG} A1")


# ------------------------------------------------------------------------------------------------ R2, A2


@dataclass(frozen=True)
class SlowConfig:
    """x in {b, -c} with c designed so that the exponent is eps exactly."""

    eps: tuple[float, ...] = (1e-2, 1e-3, 0.0, -1e-3)
    lr: float = 0.1
    b: float = 3.0
    replicas: int = 2000
    steps: int = 200_000
    seeds: tuple[int, ...] = (0, 1, 2)


def slow(config: SlowConfig) -> Part:
    """A2: the escape from a saddle may be as slow as one likes, while gradient descent leaves at a rate of its own."""
    designed = [design_slow_escape(eps, config.lr, config.b) for eps in config.eps]
    laws = [Discrete((config.b, -c)) for c in designed]
    rates = []
    for seed in config.seeds:
        run = Ensemble(two_points(), config.replicas, {"lr": config.lr, "b": config.b, "c": designed}, seed, precision="float64").run(
            config.steps
        )
        rates.append((run.final[..., 0].mean(-1) / config.steps).tolist())
    checks: list[Check] = []
    draws = config.replicas * config.steps
    for k, (eps, law) in enumerate(zip(config.eps, laws, strict=True)):
        # the dossier's bound for its own size; four standard errors for a shorter run
        tolerance = 7e-5 if draws >= 2000 * 200_000 else 4 * law_error(law, config.lr, draws)
        seen = [row[k] for row in rates]
        checks.append(match(f"escape rate designed to be {eps:g}", eps, seen, tolerance, source=f"{SLUG} A2", spread=seen))
    means = [law.mean for law in laws]
    downhill = _downhill(config.lr, means)
    checks += [
        match("gradient descent on the same saddles leaves at log(1 - lr E x)", [math.log(1 - config.lr * m) for m in means], downhill,
              1e-6, source=f"{SLUG} R2"),
        control("which is never slow", downhill, at_least=0.05, source=f"{SLUG} R2"),
    ]  # fmt: skip
    return Part(tuple(checks))


def _downhill(lr: float, curvatures: Sequence[float]) -> list[float]:
    """Growth of log|w| a step of full-batch descent on h w^2/2 + w^4/4 from next to the saddle at 0, for each mean curvature h."""
    system = descent("full batch", lambda w, p, d: [p.h * w[0] + w[0] ** 3], SGD(), [1e-9])
    run = Ensemble(system, 1, {"lr": lr, "h": list(curvatures)}, precision="float64").run(100)
    return ((run.final[:, 0, 0].abs() / 1e-9).log() / 100).tolist()


def two_points() -> System:
    """log|theta| under theta' = (1 - lr x) theta with x in {b, -c} evenly."""
    return System("two points", lambda p, d: [0.0], lambda s, p, d: [s[0] + log(abs(1.0 - p.lr * where(d.uniform() < 0.5, p.b, -p.c)))])


def law_error(law: Discrete, lr: float, draws: int) -> float:
    """Standard error of a mean of log|1 - lr h| over independent draws."""
    logs = [math.log(abs(1 - lr * value)) for value in law.values]
    mean = law.log_factor(lr)
    return math.sqrt(sum(w * (x - mean) ** 2 for w, x in zip(law.weights, logs, strict=True)) / draws)


# ------------------------------------------------------------------------------------------------ R3, A4


@dataclass(frozen=True)
class SharpConfig:
    """g(w, x) = h(x) g0(w) + h1 g1(w): a flat noisy minimum at 0, a sharp quiet one at 1, period 2."""

    h: tuple[float, float] = (3.4, -2.6)
    h1: float = 1.5
    large: float = 1.0
    small: float = 0.05
    width: float = 0.01
    replicas: int = 2000
    steps: int = 20_000
    seeds: tuple[int, ...] = (0, 1, 2)


def two_minima(config: SharpConfig) -> Callable[[Sequence[Any], Any, Any], list[Any]]:
    """The gradient of a sample."""

    def gradient(w: Sequence[Any], p: Any, draws: Any) -> list[Any]:
        s, c = sin(math.pi * w[0]), cos(math.pi * w[0])
        h = where(draws.uniform() < 0.5, config.h[0], config.h[1])
        return [(h * s * (1 + c) - config.h1 * s * (1 - c)) * (1 / (2 * math.pi))]

    return gradient


def sharp(config: SharpConfig) -> Part:
    """A4: at a large learning rate the sharp minimum wins from either start; at a small one each keeps its own."""
    flat_exponent = Discrete(config.h).log_factor(config.large)
    sharp_exponent = math.log(abs(1 - config.large * config.h1))
    checks = [
        control("the flat minimum repels at the large rate: E log|1 - lr h|", flat_exponent, at_least=0.0, source=f"{SLUG} R3"),
        holds("the sharp one attracts: log|1 - lr h1|", sharp_exponent, at_most=0.0, source=f"{SLUG} R3"),
        holds(
            "the flat one is flatter: mean curvature over the sharp one's",
            Discrete(config.h).mean / config.h1,
            at_most=0.5,
            source=f"{SLUG} R3",
        ),
    ]
    labels, heights = [], []
    for lr in (config.large, config.small):
        for centre, name in ((0.0, "flat"), (1.0, "sharp")):
            in_sharp, in_flat = [], []
            for seed in config.seeds:
                start = lambda p, d, centre=centre: [centre + config.width * d.normal()]  # noqa: E731
                system = descent("two minima", two_minima(config), SGD(), start)
                run = Ensemble(system, config.replicas, {"lr": lr}, seed, precision="float64").run(config.steps)
                place = torch.remainder(run.final[:, 0] + 1, 2) - 1  # in [-1, 1)
                in_sharp.append(float(((1 - place.abs()) < 0.01).double().mean()))
                in_flat.append(float((place.abs() < 0.2).double().mean()))
            goes_sharp = lr == config.large or name == "sharp"
            seen = in_sharp if goes_sharp else in_flat
            words = f"lr = {lr}, start at the {name} minimum: share in the {'sharp' if goes_sharp else 'flat'} one"
            checks.append(holds(words, seen, at_least=0.99, source=f"{SLUG} A4", spread=seen))
            labels.append(f"lr {lr}, from {name}")
            heights.append((sum(in_sharp) / len(in_sharp), sum(in_flat) / len(in_flat)))
    figure = Figure(
        "Where replicas end",
        {
            "labels": labels,
            "series": [{"name": "sharp", "y": [a for a, _ in heights]}, {"name": "flat", "y": [b for _, b in heights]}],
            "y": "share",
        },
        bars,
        "The sharp minimum wins at the large learning rate whatever the start.",
    )
    return Part(tuple(checks), (figure,))


# ------------------------------------------------------------------------------------------------ R4, A3


@dataclass(frozen=True)
class AdaptiveConfig:
    """AMSGrad (beta1 = 0) on l = x w^2/2 + w^4/4, x in {2, -2.05}, start 1."""

    x: tuple[float, float] = (2.0, -2.05)
    rates: tuple[float, ...] = (0.1, 0.2, 0.05, 0.02, 0.005)
    held: tuple[float, ...] = (0.1, 0.2)
    left: tuple[float, ...] = (0.02, 0.005)
    beta2: float = 0.9
    replicas: int = 2000
    steps: int = 20_000
    margin: float = 1e-3
    beta1: float = 0.9
    seeds: tuple[int, ...] = (0, 1, 2)


def amsgrad(config: AdaptiveConfig) -> Part:
    """A3, R4: AMSGrad freezes into SGD with lr / sqrt(v_max), and inherits its fate replica by replica."""
    law = Discrete(config.x)
    rule = Adam(corrected=False, maximum=True)
    system = descent("AMSGrad", lambda w, p, d: [law.draw(d) * w[0] + w[0] ** 3], rule, [1.0])
    shares: dict[float, list[float]] = {lr: [] for lr in config.rates}
    right: dict[float, list[float]] = {lr: [] for lr in config.rates}
    effective: dict[float, float] = {}
    for seed in config.seeds:
        params = {"lr": config.rates, "beta1": 0.0, "beta2": config.beta2, "eps": 1e-300}
        run = Ensemble(system, config.replicas, params, seed, precision="float64").run(config.steps)
        for k, lr in enumerate(config.rates):
            collapsed = (run.final[k, :, 0].abs() < 1e-6) & run.sound[k]
            frozen = lr / run.final[k, :, 3].sqrt()
            rate = 0.5 * torch.stack([(1 - frozen * value).abs().log() for value in config.x]).sum(0)
            decided = rate.abs() > config.margin if lr not in config.held + config.left else torch.ones_like(collapsed)
            shares[lr].append(float(collapsed.double().mean()))
            right[lr].append(float((collapsed == (rate < 0))[decided].double().mean()))
            effective[lr] = float(frozen.mean())
    middle = [lr for lr in config.rates if lr not in config.held + config.left]
    checks = [
        holds(
            f"lr = {lr} (effective {effective[lr]:.3f}): share at the maximum",
            shares[lr],
            at_least=0.99,
            source=f"{SLUG} A3",
            spread=shares[lr],
        )
        for lr in config.held
    ]
    checks += [
        control(
            f"lr = {lr} (effective {effective[lr]:.4f}): share at the maximum",
            shares[lr],
            at_most=0.01,
            source=f"{SLUG} A3",
            spread=shares[lr],
        )
        for lr in config.left
    ]
    checks += [
        holds(
            f"lr = {lr}: fate is the sign of E log|1 - lr_eff x| of each replica (share)",
            right[lr],
            at_least=0.99,
            source=f"{SLUG} R4",
            spread=right[lr],
        )
        for lr in (*config.held, *config.left)
    ]
    checks += [
        holds(
            f"lr = {lr}: the same among those with |E log| > {config.margin}, slow ones left out",
            right[lr],
            at_least=0.95,
            source=f"{SLUG} R4",
            spread=right[lr],
        )
        for lr in middle
    ]
    # the threshold of R1 for the effective rate, -2 E x / E x^2, must lie between what holds and what leaves
    threshold = -2 * law.mean / law.square
    checks.append(
        holds(
            "effective rates on either side of -2 E x / E x^2: held above (difference), left below",
            [min(effective[lr] for lr in config.held) - threshold, threshold - max(effective[lr] for lr in config.left)],
            at_least=0.0,
            source=f"{SLUG} R4",
        )
    )
    checks += _averaged(config)
    order = sorted(config.rates)
    figure = Figure(
        "AMSGrad at a local maximum",
        {
            "series": [{"name": "share collapsed", "x": order, "y": [sum(shares[lr]) / len(shares[lr]) for lr in order]}],
            "x": "learning rate",
            "y": "share",
            "log": "x",
        },
        curves,
    )
    return Part(tuple(checks), (figure,))


def _averaged(config: AdaptiveConfig) -> list[Check]:
    """R4 with a first moment: near 0 AMSGrad is momentum with frozen rates, a product of random 2 x 2 matrices of (w, m); its largest
    exponent at the rates of nearly all replicas, beside where they end."""
    law = Discrete(config.x)
    rule = Adam(corrected=False, maximum=True)
    system = descent("AMSGrad", lambda w, p, d: [law.draw(d) * w[0] + w[0] ** 3], rule, [1.0])
    frozen = descent("frozen", lambda w, p, d: [law.draw(d) * w[0]], Momentum(dampened=True), [0.0])
    checks = []
    for rates, held in ((config.held, True), (config.left, False)):
        shares, exponents = [], []
        for seed in config.seeds:
            params = {"lr": rates, "beta1": config.beta1, "beta2": config.beta2, "eps": 1e-300}
            run = Ensemble(system, config.replicas, params, seed, precision="float64").run(config.steps)
            shares.extend(((run.final[..., 0].abs() < 1e-6) & run.sound).double().mean(-1).tolist())
            rate = torch.tensor(rates, dtype=torch.float64)[:, None] / run.final[..., 3].sqrt()
            few = torch.cat([rate.quantile(q, dim=-1) for q in (0.05, 0.95)]).tolist()
            tangents = Ensemble(frozen, 1000, {"lr": few, "momentum": config.beta1}, seed, precision="float64")
            exponents.extend(torch.as_tensor(tangents.run(4000, [Lyapunov(1)], burn=100)[0].value).flatten().tolist())
        words = f"beta1 = {config.beta1}, lr {rates}"
        sign: Any = {"at_most": 0.0} if held else {"at_least": 0.0}
        share: Any = {"at_least": 0.99} if held else {"at_most": 0.01}
        make = holds if held else control
        source = f"{SLUG} R4"
        checks += [
            make(f"{words}: exponent of the 2 x 2 product at the effective rates of nine in ten", exponents, source=source, **sign),
            make(f"{words}: share at the maximum", shares, source=source, spread=shares, **share),
        ]
    return checks


# ------------------------------------------------------------------------------------------------ R5 and the entry


@dataclass(frozen=True)
class TiedConfig:
    """f = w^2 x with x y in {1, -.8}: tied weights make the origin a local maximum of the mean loss."""

    chi: tuple[float, float] = (1.0, -0.8)
    held: float = 0.3
    left: float = 0.025
    replicas: int = 2000
    steps: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)


def tied(config: TiedConfig) -> Part:
    """R5: h = -2 x y at the origin of (w^2 x - y)^2 / 2, |x| = 1."""
    law = Discrete(tuple(-2 * c for c in config.chi))
    system = descent(
        "tied",
        lambda w, p, d: [2 * (w[0] * w[0] - where(d.uniform() < 0.5, config.chi[0], config.chi[1])) * w[0]],
        SGD(),
        lambda p, d: [0.1 * d.normal()],
    )
    held, left = [], []
    for seed in config.seeds:
        run = Ensemble(system, config.replicas, {"lr": (config.held, config.left)}, seed, precision="float64").run(config.steps)
        share = ((run.final[..., 0].abs() < 1e-3) & run.sound).double().mean(-1)
        held.append(float(share[0]))
        left.append(float(share[1]))
    return Part(
        (
            holds("the origin is a local maximum: E h", law.mean, at_most=-1e-3, source=f"{SLUG} R5"),
            holds("exponent at the large rate is negative", law.log_factor(config.held), at_most=0.0, source=f"{SLUG} R5"),
            holds(f"lr = {config.held}: share at the origin", held, at_least=0.99, source=f"{SLUG} R5", spread=held),
            control("exponent at the small rate is positive", law.log_factor(config.left), at_least=0.0, source=f"{SLUG} R5"),
            control(f"lr = {config.left}: share at the origin", left, at_most=0.01, source=f"{SLUG} R5", spread=left),
        )
    )


def minimal_network(config: NetworkConfig) -> Part:
    """R5: f = u w x, whose origin is a strict saddle that gradient descent leaves."""
    part = network(config)
    return replace(part, checks=tuple(replace(check, source=f"{SLUG} R5") for check in part.checks))


NETWORK = NetworkConfig()


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    maximum: MaximumConfig | None = MaximumConfig()
    slow: SlowConfig | None = SlowConfig()
    sharp: SharpConfig | None = SharpConfig()
    amsgrad: AdaptiveConfig | None = AdaptiveConfig()
    network: NetworkConfig | None = NETWORK
    tied: TiedConfig | None = TiedConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "maximum": maximum,
    "slow": slow,
    "sharp": sharp,
    "amsgrad": amsgrad,
    "network": minimal_network,
    "tied": tied,
}


@dataclass(frozen=True)
class MaximumCell:
    """One cell: l = x w^2/2 + w^4/4, x in {b, -c} evenly with c > b (a local maximum at 0), learning rate eta, start .1 N(0,1)."""

    eta: float = 0.5
    b: float = 1.5
    c: float = 1.6
    replicas: int = 256
    steps: int = 3000
    seed: int = 0


def maximum_cell(config: MaximumCell) -> dict[str, dict[str, float]]:
    """R1: the exponent of a cell beside where the replicas are in the end."""
    run = local_maximum_run(config.b, config.c, config.eta, config.replicas, config.steps, cell_seed(config))
    share = float(((run.final[:, 0].abs() < 1e-6) & run.sound).double().mean())
    overflowed = run.diverged / config.replicas
    rate = LocalMaximum(config.b, config.c, config.eta).rate
    return {"left": {"predicted": rate, "measured": 0.5 - share}, "overflowed": {"measured": overflowed}}


MAXIMUM = Sweep(
    title="does a local maximum hold SGD",
    config=MaximumCell(),
    cell=maximum_cell,
    quantities=(
        Quantity("left", "E log|1 - eta x| (below 0: held) beside 1/2 - share of replicas at the maximum", 0.0, 0.02),
        Quantity("overflowed", "share of replicas that left the range of numbers"),
    ),
    axes={"eta": tuple(np.linspace(0.02, 1.0, 24).tolist()), "b": tuple(np.linspace(0.1, 1.55, 24).tolist())},
)

ENTRY = Entry(
    slug=SLUG,
    title="SGD with a Constant Large Learning Rate Can Converge to Local Maxima",
    paper="Liu Ziyin, Botao Li, James B. Simon, Masahito Ueda, ICLR 2022, arXiv 2107.11774",
    claims=(
        "SGD can converge to a local maximum with probability one, though every moment diverges.",
        "It can leave a saddle as slowly as one likes, whatever gradient descent does there.",
        "It can leave a flat minimum for a sharp one; AMSGrad inherits all of it through its frozen step size.",
    ),
    presets={
        "smoke": Config(
            maximum=MaximumConfig(replicas=1000, steps=2000),
            slow=SlowConfig(replicas=200, steps=20_000),
            sharp=None,
            amsgrad=None,
            network=None,
            tied=None,
        ),
        "default": Config(),
        "full": Config(
            maximum=replace(MaximumConfig(), replicas=50_000, seeds=tuple(range(10))),
            slow=SlowConfig(seeds=tuple(range(10))),
            sharp=SharpConfig(replicas=20_000, seeds=tuple(range(10))),
            amsgrad=AdaptiveConfig(replicas=20_000, seeds=tuple(range(5))),
            network=NetworkConfig(replicas=20_000, seeds=tuple(range(5))),
            tied=TiedConfig(replicas=20_000, seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
    sweeps={"maximum": MAXIMUM},
)
