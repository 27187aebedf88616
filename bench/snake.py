"""Time Snake forward and backward, and count what it holds for the backward pass, beside the public modules.

Run with OMP_NUM_THREADS=1. The peers are those that are installed of: ``torch-snake``, ``bigvgan``, ``descript-audio-codec`` (with
``einops``); ``pip install --no-deps`` is enough, only the file with the activation is loaded. Contestants take turns; ratios are of
the fastest passes. ``--compile`` adds the compiled form of each.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parasym.nn import Snake

BATCH, CHANNELS, LENGTH = 8, 64, 8192


class Last(nn.Module):
    """A module that wants its channels last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT  # type: ignore[no-any-return]


def load(package: str, file: str) -> Any:
    """One file of an installed package, without the imports of the rest; None if it is not there."""
    # not from this folder, where a file is called snake
    spec = importlib.machinery.PathFinder.find_spec(package, sys.path[1:])
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    inner = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    if inner is None or inner.loader is None:
        return None
    module = importlib.util.module_from_spec(inner)
    try:
        inner.loader.exec_module(module)
    except ImportError as error:
        print(f"{package}: not compared ({error})")
        return None
    return module


def contestants() -> dict[str, Callable[[], nn.Module]]:
    """Ours first; all have one trainable frequency for each channel of (batch, channels, length)."""
    found: dict[str, Callable[[], nn.Module]] = {"parasym": lambda: Snake(CHANNELS, learnable=True)}
    if (module := load("snake", "activations.py")) is not None:
        peer = module.Snake
        found["torch-snake"] = lambda: peer([CHANNELS, 1], a=1.0)
    if (module := load("bigvgan", "activations.py")) is not None:
        bigvgan = module.Snake
        found["bigvgan"] = lambda: bigvgan(CHANNELS)
    if (module := load("dac", "nn/layers.py")) is not None:
        dac = module.Snake1d
        found["dac"] = lambda: dac(CHANNELS)
    return found


def held(module: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that the graph keeps beyond the parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)  # kept alive while counting: a freed storage could be counted twice or not at all
    del y
    return sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(BATCH, CHANNELS, LENGTH, requires_grad=True)
    upstream = torch.randn_like(x)
    for form in ["eager", *(["compiled"] if arguments.compile else [])]:
        modules = {name: make() for name, make in contestants().items()}
        bytes_held = {name: held(module, x) for name, module in modules.items()}
        runs = {name: torch.compile(module) if form == "compiled" else module for name, module in modules.items()}
        times = {name: ([], []) for name in runs}  # type: dict[str, tuple[list[float], list[float]]]
        for turn in range(arguments.rounds + 2):
            for name, run in runs.items():
                x.grad = None
                start = time.process_time()
                y = run(x)
                middle = time.process_time()
                y.backward(upstream)
                end = time.process_time()
                if turn >= 2:
                    times[name][0].append(middle - start)
                    times[name][1].append(end - start)
        best = {name: min(both) for name, (_, both) in times.items()}
        for name, (forward, both) in times.items():
            memory = f", holds {bytes_held[name] / x.nbytes:.2f} x the input" if form == "eager" else ""
            print(
                f"{form} {name}: forward {1e3 * min(forward):.1f} ms, both {1e3 * best[name]:.1f} ms "
                f"(median {1e3 * statistics.median(both):.1f}){memory}"
            )
        peers = [name for name in runs if name != "parasym"]
        if peers:
            fastest = min(peers, key=best.__getitem__)
            ratio = best["parasym"] / best[fastest]
            print(f"{form}: {ratio:.2f} of the time of the fastest peer ({fastest}), {'ok' if ratio <= 1 else 'MISSED'}")
            if form == "eager":
                memory_ratio = bytes_held["parasym"] / min(bytes_held[name] for name in peers)
                print(f"eager: {memory_ratio:.2f} of the memory of the leanest peer, {'ok' if memory_ratio <= 1 else 'MISSED'}")


if __name__ == "__main__":
    main()
