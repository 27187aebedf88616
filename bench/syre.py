"""Time a training step with syre beside the same optimiser with plain decay.

Run with OMP_NUM_THREADS=1. Contestants take turns in one run, so what else the machine does hits all alike; processor time; the ratio is
the median over the rounds of the ratio to the plain step of the same round. First whole training steps (forward, backward, AdamW), then
the optimiser's step alone on 25 M parameters, where reading theta0 shows most: the shift costs it nothing, the hook one more stream of
memory at every pull.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from optim import SHAPES
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasym.methods import syre

LIMIT = 1.02


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


def training(make: Callable[[], nn.Module], x: Tensor, mode: str) -> Callable[[], object]:
    """One training step of a fresh model."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1)
    prepare(model, optimizer, mode)

    def step() -> None:
        optimizer.zero_grad()
        with parametrize.cached():  # torch's own: a weight that is read twice in a forward pass is made once
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()

    return step


def stepping(mode: str, fused: bool) -> Callable[[], object]:
    """The optimiser's step alone, constant gradients."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1, foreach=False, fused=fused)
    prepare(model, optimizer, mode)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return optimizer.step


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Put syre in, in one of its forms."""
    if mode == "shift" and not isinstance(model, nn.ParameterList):
        syre(model).shift().apply(optimizer)
    elif mode == "shift":  # the optimiser trains phi, and knows nothing of theta0
        pass
    elif mode.startswith("hook"):
        syre(model).attach(optimizer, every=int(mode.split()[1]))


def race(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median over rounds of the time of each step over that of the first one, with the first one's milliseconds under its own name."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    base = next(iter(steps))
    ratios = {n: statistics.median(t / b for t, b in zip(values, times[base], strict=True)) for n, values in times.items()}
    return {**ratios, base: 1e3 * min(times[base])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    modes = ("plain", "shift", "hook 1", "hook 10")
    print(f"{torch.get_num_threads()} thread(s), {rounds} rounds, AdamW; ratio to plain decay (limit {LIMIT} where marked)")
    cases: dict[str, tuple[Callable[[], nn.Module], Tensor, bool]] = {
        "transformer, 1024 tokens": (Transformer, torch.randn(8, 128, 256), True),
        "convolutions, 32 images": (convolutional, torch.randn(32, 3, 32, 32), True),
        "perceptron, 64 samples": (perceptron, torch.randn(64, 784), False),
    }
    for name, (make, x, gated) in cases.items():
        found = race({mode: training(make, x, mode) for mode in modes}, rounds)
        report(f"training step, {name}", found, modes if gated else ())
    for fused in (False, True):
        found = race({mode: stepping(mode, fused) for mode in ("plain", "hook 1", "hook 10")}, max(8, rounds // 3))
        report(f"AdamW step alone, 25 M parameters, {'fused' if fused else 'loop'}", found, () if fused else ("hook 10",))
    print("the shift leaves the optimiser's step as it is: it trains phi = theta - theta0 with plain decay")


def report(title: str, found: dict[str, float], gated: tuple[str, ...]) -> None:
    """One line for each case."""
    base, *others = found
    marks = [f"{n} {found[n]:.3f}{'' if n not in gated else ' ok' if found[n] <= LIMIT else ' MISSED'}" for n in others]
    print(f"{title}: {base} {found[base]:.1f} ms; {', '.join(marks)}", flush=True)


if __name__ == "__main__":
    main()
