"""Pruning neural networks without any data by iteratively conserving synaptic flow.

Slug synflow. Networks are bias-free ReLU chains with He-normal weights (A1: with biases), scored in eval mode. Cross-entropy is the batch
mean, without 1/2; inputs are the handwritten digits, pixels over 16; training is SGD at 0.1 with momentum 0.9, batches of 64 shuffled
anew in every epoch, on 60 % of the digits. c = log10(N / kept).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.graph import trace
from parasym.core.guards import rng_state
from parasym.gallery.contract import Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import Split, cross_entropies, digits, train
from parasym.gallery.drawings import bars, curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.measure.saliency import Flow, contractions, saliency_conservation, synaptic_saliency
from parasym.methods.prune import Pruner, grasp, prune, rewound, snip

SLUG = "synflow"
CHAIN = (64, 128, 128, 128, 128, 10)
GRID = (5, 6, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 800, 1200, 2000, 3200, 6400)


def chain(sizes: Sequence[int], seed: int, activation: type[nn.Module] = nn.ReLU, bias: float = 0.0) -> nn.Sequential:
    """A fully connected chain in float64: He-normal weights, biases N(0, bias^2) or none."""
    stream = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        with rng_state():
            layer = nn.Linear(a, b, bias=bias > 0, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(b, a, generator=stream, dtype=torch.float64) * math.sqrt(2 / a))
            if bias > 0:
                layer.bias.copy_(bias * torch.randn(b, generator=stream, dtype=torch.float64))
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def _images(split: Split, count: int, seed: int) -> tuple[Tensor, Tensor]:
    at = torch.randperm(len(split.y), generator=torch.Generator().manual_seed(seed))[:count]
    return split.x[at].double(), split.y[at]


def _per_class(split: Split, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """``each`` images of every class: what the data-based scores look at (R6)."""
    stream = torch.Generator().manual_seed(seed)
    rows = [(split.y == k).nonzero().flatten() for k in range(10)]
    at = torch.cat([r[torch.randperm(len(r), generator=stream)[:each]] for r in rows])
    return split.x[at].double(), split.y[at]


# ------------------------------------------------------------------------------------------------ A1: conservation


@dataclass(frozen=True)
class ConservationConfig:
    """MLP with biases on a batch of digits; three readouts of the output; weights times each of ``scales``."""

    sizes: tuple[int, ...] = (64, 100, 50, 30, 10)
    batch: int = 64
    bias: float = 0.1
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2)


def conservation(config: ConservationConfig) -> Part:
    """A1, R1, R2, R3, R6: what flows in flows out, at every unit and through every cut; not for tanh, |SNIP| or GraSP."""
    split = digits()
    units, sums, against, at_input, tanh, absolute, second, flows, closed = ([] for _ in range(9))  # type: ignore[var-annotated]
    for seed in config.seeds:
        x, y = _images(split, config.batch, seed)
        readouts: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda out, y=y: nn.functional.cross_entropy(out, y),  # type: ignore[misc]
            lambda out: out.sum(),
            lambda out: out.square().mean(),
        )
        for scale in config.scales:
            model = chain(config.sizes, seed, bias=config.bias)
            _scaled(model, scale)
            for readout in readouts:
                law = saliency_conservation(model, synaptic_saliency(model, readout, (x,)), (x,))
                units.append(float(law.unit_residual))
                out = model(x).detach().requires_grad_()
                through = float((torch.autograd.grad(readout(out), out)[0] * out.detach()).sum())
                sums += [v / through for v in law.cuts.values()]
                against += [1.0] * len(law.cuts)
        bare = chain(config.sizes, seed)
        x.requires_grad_()
        into = float((torch.autograd.grad(readouts[0](bare(x)), x)[0] * x).detach().sum())
        x = x.detach()
        law = saliency_conservation(bare, synaptic_saliency(bare, readouts[0], (x,)), (x,))
        at_input += [v / into for v in law.cuts.values()]
        bent = chain(config.sizes, seed, nn.Tanh, bias=config.bias)
        tanh.append(float(saliency_conservation(bent, synaptic_saliency(bent, readouts[0], (x,)), (x,)).unit_residual))
        pruner = Pruner.of(bare, (x,))
        ones = {n: torch.ones_like(w, dtype=torch.bool) for n, w in pruner.weights.items()}
        for rule, into_list in ((snip, absolute), (grasp, second)):
            into_list.append(float(saliency_conservation(bare, rule(pruner, readouts[0])(ones), (x,)).unit_residual))
        scores, _ = Flow(trace(bare, (x[:1],))).scores(pruner.weights)
        flows += [float(s.sum()) for s in scores.values()]
        product = torch.ones(config.sizes[0], dtype=torch.float64)
        for w in pruner.weights.values():
            product = w.abs() @ product
        closed += [float(product.sum())] * len(scores)
    checks = (
        match(
            "every hidden unit: saliency in + bias = saliency out (residual over the layer's)", 0.0, units, 1e-12, source=f"{SLUG} A1, R1"
        ),
        match("every cut: its saliency over <dR/dy, y>", against, sums, 1e-12, source=f"{SLUG} A1, R2"),
        match("without biases also over <dR/dx, x>", 1.0, at_input, 1e-12, source=f"{SLUG} R2"),
        match("SynFlow's layer sums = 1^T (prod |theta|) 1, relative", closed, flows, 1e-12, relative=True, source=f"{SLUG} R3"),
        match("convolution, norm and pooling: residual of every channel", 0.0, _convolution(config), 1e-12, source=f"{SLUG} R1"),
        control("tanh: relative residual", tanh, at_least=0.1, source=f"{SLUG} A1", spread=tanh),
        control("the absolute values of SNIP: relative residual", absolute, at_least=0.1, source=f"{SLUG} R6", spread=absolute),
        control("GraSP's score: relative residual", second, at_least=0.1, source=f"{SLUG} R6", spread=second),
    )
    return Part(checks)


def _scaled(model: nn.Module, scale: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)


def _convolution(config: ConservationConfig) -> list[float]:
    found = []
    for seed in config.seeds:
        stream = torch.Generator().manual_seed(seed)
        with rng_state():
            model = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(8, 6, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(24, 10),
            ).double().eval()  # fmt: skip
        with torch.no_grad():
            for t in (*model.parameters(), model.get_buffer("1.running_mean")):
                t.copy_(0.5 * torch.randn(t.shape, generator=stream, dtype=torch.float64))
        x, y = _images(digits(), config.batch, seed)
        images = x.reshape(-1, 1, 8, 8)
        scores = synaptic_saliency(model, lambda out, y=y: nn.functional.cross_entropy(out, y), (images,))  # type: ignore[misc]
        found.append(float(saliency_conservation(model, scores, (images,)).unit_residual))
    return found


# ------------------------------------------------------------------------------------------------ R5: the certificate


@dataclass(frozen=True)
class ScheduleConfig:
    """One chain cut at exponent ``c`` in 1, 10, 100 exponential steps; the linear schedule at ``hard``."""

    sizes: tuple[int, ...] = CHAIN
    c: float = 3.0
    hard: tuple[float, ...] = (3.5, 4.0)
    steps: tuple[int, ...] = (1, 10, 100)
    seeds: tuple[int, ...] = (0, 1, 2)


def schedule(config: ScheduleConfig) -> Part:
    """R4, R5: the share of a cut that one step removes; below 1 throughout, no layer can be emptied."""
    x = (torch.ones(1, config.sizes[0], dtype=torch.float64),)
    worst: dict[int, list[float]] = {n: [] for n in config.steps}
    fewest: dict[int, list[float]] = {n: [] for n in config.steps}
    linear, emptied, kept = list[float](), list[float](), list[float]()
    series = []
    for seed in config.seeds:
        model = chain(config.sizes, seed)
        for n in config.steps:
            edit = prune(model, x, keep=10**-config.c, steps=n)
            ratios = list(edit.certificate.details["ratios"])
            worst[n].append(max(ratios))
            fewest[n].append(min(edit.kept.values()))
            if seed == config.seeds[0] and n > 1:
                series.append({"name": f"exponential, {n} steps", "x": [k / n for k in range(1, n + 1)], "y": ratios})
        straight = prune(model, x, keep=10**-config.c, steps=config.steps[-1], schedule="linear")
        linear.append(max(straight.certificate.details["ratios"]))
        if seed == config.seeds[0]:
            count = len(straight.certificate.details["ratios"])
            line = {"x": [k / count for k in range(1, count + 1)], "y": list(straight.certificate.details["ratios"])}
            series.append({"name": f"linear, {count} steps", **line})
        for c in config.hard:
            for kind, out in (("linear", emptied), ("exponential", kept)):
                cut = prune(model, x, keep=10**-c, steps=config.steps[-1], schedule=kind)  # type: ignore[arg-type]
                out.append(float(min(cut.kept.values())))
    one, many = config.steps[0], config.steps[-1]
    checks = (
        holds(f"{many} exponential steps: largest ratio, every seed", worst[many], at_most=1.0, source=f"{SLUG} R5", spread=worst[many]),
        holds("and the fewest weights left in a layer", fewest[many], at_least=1.0, source=f"{SLUG} R5", spread=fewest[many]),
        control("one step: ratio", worst[one], at_least=1.0, source=f"{SLUG} R5", spread=worst[one]),
        control("and a layer is emptied: fewest weights left", fewest[one], at_most=0.0, source=f"{SLUG} R5"),
        control(f"linear in {many} steps is not certified: largest ratio", linear, at_least=1.0, source=f"{SLUG} R5", spread=linear),
        control(f"and at c = {config.hard} it empties a layer: fewest left", emptied, at_most=0.0, source=f"{SLUG} R5"),
        holds("where the exponential schedule empties none: fewest left", kept, at_least=1.0, source=f"{SLUG} R5", spread=kept),
    )
    if any(series):
        series.append({"name": "one cut", "x": [0, 1], "y": [1, 1], "mark": "dash"})
    data = {"series": series, "x": "progress", "y": "score removed / score of a cut", "log": "y"}
    return Part(checks, (Figure("What a step removes", data, curves, "Below one, no layer can be emptied."),))


# ------------------------------------------------------------------------------------------------ A2: critical compression


@dataclass(frozen=True)
class CriticalConfig:
    """Chains cut to each count of ``grid``; ``rivals`` are scored once, SynFlow once and in ``steps`` steps; 10 images of each class."""

    sizes: tuple[int, ...] = CHAIN
    grid: tuple[int, ...] = GRID
    steps: int = 100
    rivals: tuple[str, ...] = ("magnitude", "random", "snip", "grasp")
    each: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)


def critical(config: CriticalConfig) -> Part:
    """A2: SynFlow in many steps reaches one weight a layer; scored once it is the worst of all."""
    names = ("SynFlow", "SynFlow, one step", *config.rivals)
    reach: dict[str, list[float]] = {name: [] for name in names}
    layers: list[dict[str, Any]] = []
    most = []
    split = digits() if {"snip", "grasp"} & set(config.rivals) else None
    for seed in config.seeds:
        x, y = _per_class(split, config.each, seed) if split is not None else (torch.ones(1, config.sizes[0]).double(), None)
        pruner = Pruner.of(chain(config.sizes, seed), (x[:1],))
        looking = Pruner.of(pruner.model, (x,))
        most.append(math.log10(pruner.count / len(pruner.weights)))
        loss = lambda out, y=y: nn.functional.cross_entropy(out, y)  # noqa: E731
        for name in names:
            score = "synflow" if name.startswith("SynFlow") else name
            own = looking if score in ("snip", "grasp") else pruner
            steps = config.steps if name == "SynFlow" else 1
            sound = math.nan
            for count in sorted(config.grid, reverse=True):
                masks, _ = own.masks(own.rule(score, loss, seed), count, steps=steps)  # type: ignore[arg-type]
                if own.empty(masks):
                    break
                sound = math.log10(own.count / count)
            reach[name].append(sound)
            if seed == config.seeds[0]:
                at = min(config.grid, key=lambda k: abs(math.log10(own.count / k) - 2.0))
                masks, _ = own.masks(own.rule(score, loss, seed), at, steps=steps)  # type: ignore[arg-type]
                layers.append({"name": name, "y": [int(m.sum()) for m in masks.values()]})
    others = [v for name in config.rivals for v in reach[name]]
    worst = [max(reach["SynFlow, one step"]) - v for v in others]
    checks = (
        match(
            f"log10 critical compression of SynFlow in {config.steps} steps = log10 N / L, every seed",
            most,
            reach["SynFlow"],
            1e-9,
            source=f"{SLUG} A2",
            spread=reach["SynFlow"],
        ),
        control(
            "scored once it is", reach["SynFlow, one step"], at_most=2.5, source=f"{SLUG} A2", spread=reach["SynFlow, one step"]
        ),
        control("and no better than any other score: difference", worst, at_most=0.0, source=f"{SLUG} A2"),
        control("the other scores, once: log10 critical less the maximum, mean of the seeds",
                [sum(reach[n]) / len(most) - sum(most) / len(most) for n in config.rivals], at_most=-0.1, source=f"{SLUG} A2"),
    )  # fmt: skip
    data = {"labels": list(names), "series": [{"name": "mean of the seeds", "y": [sum(v) / len(v) for v in reach.values()]}]}
    shape = [f"{a}-{b}" for a, b in pairwise(config.sizes)]
    return Part(
        checks,
        (
            Figure("Critical compression", {**data, "y": "log10 N / kept"}, bars, f"The maximum is {most[0]:.2f}."),
            Figure("Weights left in each layer at c = 2", {"labels": shape, "series": layers, "y": "weights", "log": "y"}, bars),
        ),
    )


# ------------------------------------------------------------------------------------------------ R7: the layer view


@dataclass(frozen=True)
class LayersConfig:
    """A chain of unequal layers; mean score against 1 / size; ``epochs`` of training for the squares of the weights."""

    sizes: tuple[int, ...] = (64, 256, 64, 160, 32, 10)
    epochs: int = 40
    batch: int = 64
    lr: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def layer_view(config: LayersConfig) -> Part:
    """R7: a conservative score gives each layer the same total, so its mean falls as 1 / size; magnitudes come to do so by training."""
    split, flow, signed, size = digits(), [], [], []
    points: dict[str, list[list[float]]] = {"SynFlow": [], "saliency of the loss": [], "magnitude": []}
    for seed in config.seeds:
        model = chain(config.sizes, seed)
        x, y = _images(split, 64, seed)
        graph = trace(model, (x,))
        weights = {n: graph.params[n] for n in contractions(graph)}
        size = [1 / w.numel() for w in weights.values()]
        scores, _ = Flow(graph).scores(weights)
        saliency = synaptic_saliency(model, lambda out, y=y: nn.functional.cross_entropy(out, y), (x,))  # type: ignore[misc]
        means = {
            "SynFlow": [float(s.mean()) for s in scores.values()],
            "saliency of the loss": [abs(float(saliency[n].mean())) for n in weights],
            "magnitude": [float(w.abs().mean()) for w in weights.values()],
        }
        for name, values in means.items():
            points[name].append(values)
        flow.append(_slope(size, means["SynFlow"]))
        signed.append(_slope(size, means["saliency of the loss"]))
    plainly = [_slope(size, values) for values in points["magnitude"]]
    start, end = _squares(config, split)
    checks = (
        match("slope of log mean SynFlow score over log 1/size", 1.0, flow, 1e-9, source=f"{SLUG} R7", spread=flow),
        match("the same for the saliency of the loss", 1.0, signed, 1e-9, source=f"{SLUG} R7", spread=signed),
        control("magnitude at the start: slope", plainly, at_most=0.8, source=f"{SLUG} R7", spread=plainly),
        holds(
            "training brings the means of w^2 nearer to that line: spread of log layer sums, before less after",
            [a - b for a, b in zip(start, end, strict=True)],
            at_least=0.0,
            source=f"{SLUG} R7",
            spread=end,
        ),
    )
    series = [{"name": name, "x": size, "y": values[0], "mark": "points"} for name, values in points.items()]
    return Part(checks, (Figure("Mean score of a layer", {"series": series, "x": "1 / size", "y": "mean score", "log": "xy"}, curves),))


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    a, b = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


def _squares(config: LayersConfig, split: Split) -> tuple[list[float], list[float]]:
    """Standard deviation over layers of log sum w^2, before and after training."""
    weights = [torch.stack(w) for w in zip(*(_matrices(chain(config.sizes, seed)) for seed in config.seeds), strict=True)]

    def spread() -> list[float]:
        return plain(torch.stack([w.detach().square().sum((1, 2)).log() for w in weights]).std(0))

    start = spread()
    fit(weights, [torch.ones_like(w) for w in weights], split, config.epochs, config.batch, config.lr, config.seeds)
    return start, spread()


def _matrices(model: nn.Sequential) -> list[Tensor]:
    """(in, out) float32 weights of a chain."""
    return [p.detach().T.float().contiguous() for p in model.parameters()]


# ------------------------------------------------------------------------------------------------ A3: training after pruning


@dataclass(frozen=True)
class TrainingConfig:
    """Chains pruned at the start, then trained; (score, c) of every run. ``shuffled``: SynFlow's counts at random places."""

    sizes: tuple[int, ...] = CHAIN
    runs: tuple[tuple[str, float], ...] = (
        ("synflow", 1.5),
        ("magnitude", 1.5),
        ("synflow", 2.0),
        ("snip", 2.0),
        ("magnitude", 2.0),
        ("random", 2.0),
    )
    epochs: int = 25
    batch: int = 64
    lr: float = 0.1
    each: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)


def training(config: TrainingConfig) -> Part:
    """A3: what is left by SynFlow still learns where other scores have cut the network in two."""
    split, draws = digits(), len(config.seeds)
    starts: list[list[Tensor]] = []
    cuts: list[list[Tensor]] = []
    for score, c in config.runs:
        for seed in config.seeds:
            model = chain(config.sizes, seed)
            x, y = _per_class(split, config.each, seed)
            loss = lambda out, y=y: nn.functional.cross_entropy(out, y)  # noqa: E731
            args = (x,) if score in ("snip", "grasp") else (x[:1],)
            edit = prune(model, args, keep=10**-c, score=score, loss=loss, seed=seed)  # type: ignore[arg-type]
            starts.append(_matrices(model))
            cuts.append([m.T.float() for m in edit.masks.values()])
    weights = [torch.stack(w) for w in zip(*starts, strict=True)]
    masks = [torch.stack(m) for m in zip(*cuts, strict=True)]
    history = fit(weights, masks, split, config.epochs, config.batch, config.lr, config.seeds)
    accuracy = history[-1].reshape(len(config.runs), draws)
    at = {run: accuracy[i] for i, run in enumerate(config.runs)}
    checks = [
        holds("c = 2: accuracy of SynFlow, every seed", at["synflow", 2.0], at_least=0.7, source=f"{SLUG} A3", spread=at["synflow", 2.0]),
        control("c = 2: accuracy of magnitude", at["magnitude", 2.0], at_most=0.2, source=f"{SLUG} A3", spread=at["magnitude", 2.0]),
        holds(
            "c = 1.5: SynFlow less magnitude",
            at["synflow", 1.5] - at["magnitude", 1.5],
            at_least=0.3,
            source=f"{SLUG} A3",
            spread=at["synflow", 1.5],
        ),
    ]
    if ("random", 2.0) in at:
        lead = at["synflow", 2.0] - at["random", 2.0]
        checks.append(control("c = 2: SynFlow less random", lead, at_least=0.4, source=f"{SLUG} A3", spread=at["random", 2.0]))
    if ("snip", 2.0) in at:
        better = at["synflow", 2.0] - at["snip", 2.0]
        checks.append(holds("c = 2: SynFlow less SNIP, mean of the seeds", better.mean(), at_least=0.0, source=f"{SLUG} A3", spread=better))
    x_axis = list(range(1, config.epochs + 1))
    curve = history.reshape(config.epochs, len(config.runs), draws)
    series = [
        {"name": f"{s}, c = {c:g}", "x": x_axis, "y": plain(curve[:, i].mean(1)), "low": plain(curve[:, i].amin(1)),
         "high": plain(curve[:, i].amax(1)), "colour": i}
        for i, (s, c) in enumerate(config.runs)
    ]  # fmt: skip
    return Part(tuple(checks), (Figure("Test accuracy after pruning", {"series": series, "x": "epoch", "y": "accuracy"}, curves),))


def fit(weights: list[Tensor], masks: Sequence[Tensor], split: Split, epochs: int, batch: int, lr: float, seeds: Sequence[int]) -> Tensor:
    """Train a stack of masked bias-free ReLU chains in place, weights (s, in, out); test accuracy (epochs, s)."""
    for w in weights:
        w.requires_grad_()
    count, seen = len(weights[0]), list[Tensor]()

    def forward(x: Tensor) -> Tensor:
        value = x.expand(count, -1, -1)
        for k, (w, m) in enumerate(zip(weights, masks, strict=True)):
            value = torch.bmm(value if k == 0 else torch.relu(value), w * m)
        return value

    labels = split.y.expand(count, -1)
    train(
        forward,
        torch.optim.SGD(weights, lr=lr, momentum=0.9),
        split.x,
        labels,
        lambda logits, given, epoch: cross_entropies(logits, given),
        epochs=epochs,
        batch=batch,
        draws=Ensemble(seeds),
        watch=lambda epoch: seen.append((forward(split.x_test).argmax(-1) == split.y_test).double().mean(-1)),
    )
    return torch.stack(seen)


# ------------------------------------------------------------------------------------------------ R8: rewinding


@dataclass(frozen=True)
class RewindConfig:
    """Iterative magnitude pruning with rewinding in ``levels`` levels of ``epochs`` each, beside one shot at the start."""

    sizes: tuple[int, ...] = (64, 100, 100, 10)
    c: float = 1.7
    levels: int = 4
    epochs: int = 10
    batch: int = 64
    lr: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def rewinding(config: RewindConfig) -> Part:
    """R8: level l keeps rho^(l / L) and starts from the first weights again; the mask it ends with learns where one shot does not."""
    split = digits()
    scores: dict[str, list[float]] = {"rewound": [], "one shot": []}
    back = []
    for seed in config.seeds:
        model = chain(config.sizes, seed).float()
        first = [p.detach().clone() for p in model.parameters()]

        def learn(net: nn.Module, seed: int = seed) -> None:
            _learn(net, split, config, seed)

        x = (split.x[:1],)
        edits = {
            "rewound": rewound(model, learn, x, keep=10**-config.c, levels=config.levels),
            "one shot": prune(model, x, keep=10**-config.c, score="magnitude"),
        }
        back.append(max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), first, strict=True)))
        for name, edit in edits.items():
            edit.apply()
            learn(model)
            with torch.no_grad():
                scores[name].append(float((model(split.x_test).argmax(-1) == split.y_test).double().mean()))
            edit.undo()
            with torch.no_grad():
                for p, q in zip(model.parameters(), first, strict=True):
                    p.copy_(q)
    gain = [a - b for a, b in zip(scores["rewound"], scores["one shot"], strict=True)]
    checks = (
        match("the weights are those of the start, bit for bit", 0.0, back, 0.0, source=f"{SLUG} R8"),
        holds("accuracy of the rewound mask less one shot", gain, at_least=0.05, source=f"{SLUG} R8", spread=scores["rewound"]),
    )
    return Part(checks)


def _learn(net: nn.Module, split: Split, config: RewindConfig, seed: int) -> None:
    optimizer, stream = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=0.9), torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(config.epochs):
            for at in torch.randperm(len(split.y), generator=stream).split(config.batch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(split.x[at]), split.y[at]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    conservation: ConservationConfig | None = ConservationConfig()
    schedule: ScheduleConfig | None = ScheduleConfig()
    critical: CriticalConfig | None = CriticalConfig()
    layer_view: LayersConfig | None = LayersConfig()
    training: TrainingConfig | None = TrainingConfig()
    rewinding: RewindConfig | None = RewindConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "conservation": conservation,
    "schedule": schedule,
    "critical": critical,
    "layer_view": layer_view,
    "training": training,
    "rewinding": rewinding,
}
_EVERY = tuple((score, c) for c in (1.5, 2.0) for score in ("synflow", "snip", "grasp", "magnitude", "random"))

ENTRY = Entry(
    slug=SLUG,
    title="Pruning neural networks without any data by iteratively conserving synaptic flow",
    paper="Hidenori Tanaka, Daniel Kunin, Daniel L. K. Yamins, Surya Ganguli, NeurIPS 2020, arXiv 2006.05467",
    claims=(
        "Saliency is conserved at every homogeneous unit and through every cut, so wide layers have small scores.",
        "One global threshold then empties the widest layers; scoring many times on an exponential schedule provably does not.",
        "SynFlow reaches one weight a layer, without data; what it leaves still learns.",
    ),
    presets={
        "smoke": Config(
            conservation=ConservationConfig(scales=(1.0,)),
            schedule=ScheduleConfig(sizes=(64, 48, 48, 48, 10), c=2.8, hard=(3.2,), steps=(1, 100)),
            critical=CriticalConfig(sizes=(64, 64, 64, 64, 10), grid=(4, 60, 1200), rivals=("magnitude", "random")),
            layer_view=LayersConfig(epochs=5),
            training=None,
            rewinding=None,
        ),
        "default": Config(),
        "full": Config(
            critical=CriticalConfig(seeds=tuple(range(5))),
            training=TrainingConfig(runs=_EVERY, seeds=tuple(range(5))),
            rewinding=RewindConfig(sizes=CHAIN, levels=8, epochs=25),
        ),
    },
    experiments=_EXPERIMENTS,
)
