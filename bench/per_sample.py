"""Second moments of per-sample gradients, entry by entry, and tr Cov: parasym beside BackPACK, Opacus-style hooks and vmap.

    OMP_NUM_THREADS=1 PEERS=DIR python bench/per_sample.py [mlp|conv|resnet|gpt]

One thread; CPU seconds, the smallest of several runs, in units of one batch gradient; the error is that of tr Cov against one sample
at a time. Peers are optional: directories of PEERS (``pip install --no-deps --target DIR backpack-for-pytorch opacus ...``).
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from curvature import GPT, resnet
from torch import Tensor, nn

from parasym.measure.gradients import Objective, gradient_moments

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


class Sequences(GPT):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.token(x) + self.place))).mT


def problem(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, inputs, targets)."""
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        return model, torch.randn(64, 784), torch.randint(0, 10, (64,))
    if kind == "conv":
        layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4096, 10)), torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    if kind == "gpt":
        text = torch.randint(0, 128, (16, 33))
        return Sequences(), text[:, :-1], text[:, 1:]
    return resnet(16), torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))


def clock(run: Callable[[], float], repeat: int = 5) -> tuple[float, float]:
    """Smallest CPU seconds, and the value."""
    value, best = run(), float("inf")
    for _ in range(repeat):
        start = time.process_time()
        value = run()
        best = min(best, time.process_time() - start)
    return best, value


def main(kind: str) -> None:
    """One table."""
    for path in os.environ.get("PEERS", "").split(os.pathsep):
        sys.path.append(path)
    model, x, y = problem(kind)
    parameters, n = list(model.parameters()), len(x)
    unit, _ = clock(lambda: float(torch.autograd.grad(F.cross_entropy(model(x), y), parameters)[0].sum()), 9)
    mean = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    centre = sum(float(g.square().sum()) for g in mean)
    print(f"{kind}: {sum(p.numel() for p in parameters):,} parameters, {n} samples, one gradient {1e3 * unit:.1f} ms")

    def trace(squares: float) -> float:
        return squares / n - centre

    def loop() -> float:
        total = 0.0
        for i in range(n):
            total += sum(
                float(g.square().sum()) for g in torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
            )
        return trace(total)

    reference = [0.0]

    def row(name: str, run: Callable[[], float], repeat: int = 5) -> None:
        try:
            seconds, value = clock(run, repeat)
        except Exception as e:
            print(f"  {name:50} fails: {type(e).__name__}: {str(e).splitlines()[0][:90]}")
            return
        reference[0] = reference[0] or value
        print(f"  {name:50} {seconds / unit:7.2f} gradients   relative error {abs(value / reference[0] - 1):.1e}")

    row("one sample at a time", loop, 1)
    objective = Objective(model, F.cross_entropy)

    def own(**k: bool) -> float:
        found = gradient_moments(objective, (x, y), check=False, **k)
        return float(found.norms.mean()) - found.mean_square

    row("parasym, squares entry by entry", own)
    row("parasym, norms only", lambda: own(squares=False))
    row("parasym, vmap", lambda: own(layers=False), 2)
    _peers(kind, x, y, row, trace)


def _peers(kind: str, x: Tensor, y: Tensor, row: Callable[..., None], trace: Callable[[float], float]) -> None:
    n = len(x)
    try:
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad, SumGradSquared

        model, loss = extend(problem(kind)[0], use_converter=kind in ("resnet", "gpt")), extend(nn.CrossEntropyLoss())
        parameters = list(model.parameters())

        def squares() -> float:
            for p in parameters:
                p.grad = None
            with backpack(SumGradSquared()):
                loss(model(x), y).backward()
            return trace(sum(float(p.sum_grad_squared.sum()) for p in parameters) * n * n)

        def norms() -> float:
            for p in parameters:
                p.grad = None
            with backpack(BatchL2Grad()):
                loss(model(x), y).backward()
            return trace(sum(float(p.batch_l2.sum()) for p in parameters) * n * n)

        row("BackPACK SumGradSquared", squares)
        row("BackPACK BatchL2Grad (norms only)", norms)
    except Exception as e:
        print(f"  BackPACK: {type(e).__name__}: {str(e).splitlines()[0][:90]}")
    try:
        from opacus import GradSampleModule

        wrapped = GradSampleModule(problem(kind)[0], loss_reduction="mean", strict=False)

        def hooks() -> float:
            for p in wrapped.parameters():
                p.grad = None
                p.grad_sample = None
            F.cross_entropy(wrapped(x), y).backward()
            return trace(sum(float(p.grad_sample.square().sum()) for p in wrapped.parameters()))

        row("Opacus GradSampleModule (stores all)", hooks, 2)
    except Exception as e:
        print(f"  Opacus: {type(e).__name__}: {str(e).splitlines()[0][:90]}")


if __name__ == "__main__":
    for which in sys.argv[1:] or ("mlp", "conv", "resnet", "gpt"):
        main(which)
