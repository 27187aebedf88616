"""Time one optimiser step on 25 M parameters: LaProp beside torch's Adam, each in its eager, foreach and compiled form.

Run with OMP_NUM_THREADS=1. The contestants take turns, so that what else the machine does hits all of them alike; the ratio is
that of the fastest steps. ``--compile`` also compiles LaProp's step and compares it with torch's fused Adam (about half a minute).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from parasym.optim import LaProp

# twelve transformer blocks of width 416, an embedding, biases: 24,985,792 numbers in 97 tensors
BLOCK: tuple[tuple[int, ...], ...] = ((1248, 416), (416, 416), (1664, 416), (416, 1664), (416,), (416,), (1248,), (1664,))
SHAPES: tuple[tuple[int, ...], ...] = ((50, 416), *(BLOCK * 12))


def contestant(make: Callable[[list[Tensor]], torch.optim.Optimizer], compiled: bool = False) -> Callable[[], object]:
    """A step on fresh parameters with constant gradients."""
    params = [torch.randn(shape) * 0.02 for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = make(params)
    return torch.compile(optimizer.step) if compiled else optimizer.step


def race(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, the contestants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3):
        for step in steps.values():
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pairs = [
        ("loop", "Adam for-loop", lambda p: torch.optim.Adam(p, foreach=False), "LaProp for-loop", lambda p: LaProp(p, foreach=False), 1.0),
        ("foreach", "Adam foreach", lambda p: torch.optim.Adam(p, foreach=True), "LaProp foreach", lambda p: LaProp(p, foreach=True), 1.0),
    ]
    if arguments.compile:
        pairs.append(("compiled", "Adam fused", lambda p: torch.optim.Adam(p, fused=True), "LaProp compiled", LaProp, 1.1))
    count = sum(torch.Size(shape).numel() for shape in SHAPES)
    print(f"{count:,} parameters in {len(SHAPES)} tensors, {torch.get_num_threads()} thread(s)")
    for form, theirs, make_theirs, ours, make_ours, target in pairs:
        times = race({theirs: contestant(make_theirs), ours: contestant(make_ours, compiled=form == "compiled")}, arguments.rounds)
        best = {name: min(values) for name, values in times.items()}
        middle = {name: statistics.median(values) for name, values in times.items()}
        ratio = best[ours] / best[theirs]
        listed = ", ".join(f"{name} {1e3 * best[name]:.1f} ms (median {1e3 * middle[name]:.1f})" for name in (theirs, ours))
        print(f"{form}: {listed}; ratio {ratio:.2f} (target {target}) {'ok' if ratio <= target else 'MISSED'}")


if __name__ == "__main__":
    main()
