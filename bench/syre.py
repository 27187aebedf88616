"""Time a training step with syre beside the same optimiser with plain decay.

Run with OMP_NUM_THREADS=1. Contestants take turns in one run on one model, so what else the machine does and where the weights lie hits all
alike; processor time; the ratio is the median over the rounds of the ratio to plain decay in the same round, with its standard error, and
plain decay takes part twice. First whole training steps, then AdamW's step alone on 25 M parameters, where reading theta0 shows most.
"syre" is the hook as it comes, "every step" the hook that pulls at each step, "shift" the change of coordinates, which costs the optimiser
nothing and the forward one addition.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from optim import SHAPES
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasym.methods import syre
from parasym.methods.syre import Pull

LIMIT = 1.02
BLOCK = 50  # steps in a row, one pull among them (two with the momentum of SGD): lr * weight_decay = 1e-4 owes 5e-3 of theta0 by then


class Transformer(nn.Module):
    """Four pre-norm blocks of width 256 and a head."""

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(block, depth, enable_nested_tensor=False), nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def convolutional() -> nn.Module:
    """A small convolutional network on 32 x 32 images."""
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 64), (64, 128)):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=2 if b > a > 3 else 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def perceptron() -> nn.Module:
    """A wide dense network: few samples for many weights, the case that shows the cost most."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, 1e-3, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda params: torch.optim.Adam(params, 1e-3, weight_decay=1e-2),
}


@dataclass(frozen=True)
class Contestant:
    """A way to step: what is put in before a block of steps, the step itself, and what takes it out again; only the steps are timed."""

    step: Callable[[], object]
    enter: Callable[[], object] = lambda: None
    leave: Callable[[], object] = lambda: None


def contestants(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> dict[str, Contestant]:
    """Plain decay and the hooks, all on the same weights: where memory lies makes more difference than syre does."""
    anchor, held = syre(model), list[Pull]()

    def attached(every: int | None) -> Contestant:
        return Contestant(step, lambda: held.append(anchor.attach(optimizer, every=every)), lambda: held.pop().undo())

    return {"plain": Contestant(step), "plain again": Contestant(step), "syre": attached(None), "every step": attached(1)}


def training(make: Callable[[], nn.Module], x: Tensor, rule: str) -> dict[str, Contestant]:
    """Whole training steps; the change of coordinates on a model of its own."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]:
        torch.manual_seed(0)
        model = make()
        optimizer = RULES[rule](model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            with parametrize.cached():  # torch's own: a weight that is read twice in a forward pass is made once
                loss = model(x).square().mean()
            loss.backward()
            optimizer.step()

        return model, optimizer, step

    model, optimizer, step = fresh()
    syre(model).shift().apply(optimizer)
    return {**contestants(*fresh()), "shift": Contestant(step)}


def stepping(fused: bool) -> dict[str, Contestant]:
    """The optimiser's step alone, constant gradients."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, foreach=False, fused=fused)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return contestants(model, optimizer, optimizer.step)


def race(field: dict[str, Contestant], seconds: float) -> dict[str, tuple[float, float]]:
    """Of each contestant the median over rounds of its time over the first one's, and the standard error of that median; the first
    has its milliseconds. Rounds of ``BLOCK`` steps each; the order turns from round to round."""

    def block(c: Contestant, steps: int) -> float:
        c.enter()
        start = time.process_time()
        for _ in range(steps):
            c.step()
        spent = time.process_time() - start
        c.leave()
        return spent

    for c in field.values():
        block(c, 3)
    rounds = max(7, int(seconds / BLOCK / sum(block(c, 2) / 2 for c in field.values())))
    times: dict[str, list[float]] = {name: [] for name in field}
    names = list(field)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            times[name].append(block(field[name], BLOCK))
    base = names[0]
    out = {base: (1e3 * min(times[base]) / BLOCK, 0.0)}
    for name in names[1:]:
        ratios = [t / b for t, b in zip(times[name], times[base], strict=True)]
        spread = statistics.quantiles(ratios, n=4)
        out[name] = statistics.median(ratios), 1.25 * (spread[2] - spread[0]) / 1.35 / math.sqrt(rounds)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of processor time for each case")
    parser.add_argument("--only", nargs="*", help="cases: transformer convolutions perceptron step")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s); ratio to plain decay (limit {LIMIT} for syre as it comes), with its standard error")
    cases: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "transformer": (Transformer, torch.randn(8, 128, 256)),
        "convolutions": (convolutional, torch.randn(32, 3, 32, 32)),
        "perceptron": (perceptron, torch.randn(64, 784)),
    }
    for name, (make, x) in cases.items():
        if options.only and name not in options.only:
            continue
        for rule in RULES if name == "perceptron" else ["AdamW"]:
            report(f"training step, {name}, {rule}", race(training(make, x, rule), options.seconds))
    for fused in (False, True):
        if not options.only or "step" in options.only:
            report(f"AdamW step alone, 25 M parameters, {'fused' if fused else 'loop'}", race(stepping(fused), options.seconds))


def report(title: str, found: dict[str, tuple[float, float]]) -> None:
    """One line for each case."""
    base, *others = found
    marks = [f"{n} {found[n][0]:.3f} +- {found[n][1]:.3f}" for n in others]
    ratio, error = found["syre"]
    verdict = "ok" if ratio <= LIMIT else "MISSED" if ratio - 2 * error > LIMIT else "not decided: too noisy"
    print(f"{title}: {base} {found[base][0]:.2f} ms; {', '.join(marks)}; {verdict}", flush=True)


if __name__ == "__main__":
    main()
