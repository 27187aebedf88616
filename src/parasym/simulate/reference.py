"""The reference engine: the same graph interpreted on arrays of replicas, by torch; no compiler needed.

Slower than the lanes, and the yardstick of their tests: run on the lanes' own random words (`replay`) it follows them step by
step, run on torch's generator it has the same statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from parasym.core.errors import InputError
from parasym.simulate.expr import evaluate
from parasym.simulate.system import Draws, Program

BLOCK = 1 << 14  # replicas at once: state and temporaries stay in the second-level cache


class Source(Protocol):
    """Where the random numbers of a step come from, each an array over replicas."""

    def normals(self, count: int) -> list[Any]: ...
    def uniform(self) -> Any: ...
    def indices(self, size: int, count: int, replacement: bool) -> list[Any]: ...
    def epoch(self, size: int, count: int) -> list[Any]: ...


class TorchDraws:
    """Random numbers of one block of replicas from a torch generator."""

    def __init__(self, generator: torch.Generator, count: int, dtype: torch.dtype) -> None:
        self.generator, self.count, self.dtype = generator, count, dtype
        self.clock = 0
        self.orders: dict[tuple[int, int], torch.Tensor] = {}

    def normals(self, count: int) -> list[torch.Tensor]:
        """``count`` arrays of standard normals."""
        return list(torch.randn(count, self.count, generator=self.generator, dtype=self.dtype)) if count else []

    def uniform(self) -> torch.Tensor:
        """Uniform on (0, 1)."""
        return torch.rand(self.count, generator=self.generator, dtype=self.dtype).clamp_min(2.0**-25)

    def indices(self, size: int, count: int, replacement: bool) -> list[torch.Tensor]:
        """Row numbers, independent or distinct."""
        if replacement:
            return list(torch.randint(size, (count, self.count), generator=self.generator))
        return list(torch.rand(size, self.count, generator=self.generator).topk(count, dim=0).indices)

    def epoch(self, size: int, count: int) -> list[torch.Tensor]:
        """The next rows of each replica's order."""
        place = self.clock % (size // count)
        if place == 0 or (size, count) not in self.orders:
            self.orders[size, count] = torch.rand(size, self.count, generator=self.generator).argsort(dim=0)
        return list(self.orders[size, count][place * count : (place + 1) * count])


def draw_inputs(plan: Draws, source: Source, params: dict[str, Any], rows: Any = None) -> Callable[[str, Any], Any]:
    """Draw what a step needs, in the order the lanes draw it, and return the lookup for `evaluate`."""
    normals = source.normals(plan.normal_count)
    uniforms = [source.uniform() for _ in range(plan.uniform_count)]
    batches = []
    for draw in plan.row_draws:
        if draw.sampling == "epoch":
            batches.append(source.epoch(draw.table.size, draw.count))
        else:
            batches.append(source.indices(draw.table.size, draw.count, draw.sampling == "replacement"))

    def lookup(kind: str, key: Any) -> Any:
        if kind == "state":
            return rows[key]
        if kind == "param":
            return params[key]
        if kind == "normal":
            return normals[key]
        if kind == "uniform":
            return uniforms[key]
        number, k, column = key
        index = batches[number][k]
        data = plan.row_draws[number].table.rows[:, column]
        if isinstance(index, torch.Tensor):
            return torch.from_numpy(data).to(rows.dtype)[index]
        return data[index]

    return lookup


def step(program: Program, rows: Any, source: Any, params: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """One step: next rows and what is added to the sums."""
    lookup = draw_inputs(program.draws, source, params, rows)
    if program.opaque is not None:
        lookup = _with_next(lookup, _opaque_step(program, rows, source, params))
    values = evaluate([*program.outputs, *program.sums], lookup)
    source.clock += 1
    return values[: len(program.outputs)], values[len(program.outputs) :]


def _opaque_step(program: Program, rows: torch.Tensor, source: TorchDraws, params: dict[str, Any]) -> torch.Tensor:
    """The next state (d, n) of a torch step."""
    system = program.opaque
    assert system is not None
    state = rows[: program.size].T
    following = system.step(state, {name: params[name] for name in system.params}, source.generator)
    if following.shape != state.shape or following.dtype != state.dtype:
        found = f"{tuple(following.shape)} {following.dtype}"
        raise InputError(f"{system.name}: the step returns {found}; {tuple(state.shape)} {state.dtype} was expected")
    return following.detach().T


def _with_next(lookup: Callable[[str, Any], Any], following: torch.Tensor) -> Callable[[str, Any], Any]:
    return lambda kind, key: following[key] if kind == "next" else lookup(kind, key)


class ReferenceEngine:
    """Runs blocks of replicas one after the other, each with a generator of its own."""

    def __init__(self, program: Program, rows: NDArray[Any], seed: int, params: dict[str, NDArray[np.float64]]) -> None:
        self.program = program
        self.rows = torch.from_numpy(rows.copy())
        count = rows.shape[1]
        self.sums = torch.zeros(len(program.sums), count, dtype=torch.float64)
        self.params = {name: torch.from_numpy(np.broadcast_to(params[name], count).copy()).to(self.rows.dtype) for name in program.params}
        self.cuts = [(low, min(low + BLOCK, count)) for low in range(0, count, BLOCK)]
        spawned = np.random.SeedSequence(seed).spawn(len(self.cuts))
        self.sources = [
            TorchDraws(torch.Generator().manual_seed(int(child.generate_state(1, np.uint64)[0] >> 1)), high - low, self.rows.dtype)
            for child, (low, high) in zip(spawned, self.cuts, strict=True)
        ]
        self.kept = np.ones(count, bool)

    def advance(self, steps: int, clock: int, progress: Callable[[int], None]) -> None:
        """See `parasym.simulate.ensemble.Engine`."""
        for (low, high), source in zip(self.cuts, self.sources, strict=True):
            rows, sums = self.rows[:, low:high], self.sums[:, low:high]
            params = {name: value[low:high] for name, value in self.params.items()}
            for _ in range(steps):
                following, added = step(self.program, rows, source, params)
                rows = torch.stack([torch.as_tensor(value, dtype=rows.dtype).expand(high - low) for value in following])
                for k, value in enumerate(added):
                    sums[k] += value
            self.rows[:, low:high] = rows
            progress((high - low) * steps)

    def read(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """See `parasym.simulate.ensemble.Engine`."""
        return self.rows.numpy()[:, self.kept].copy(), self.sums.numpy()[:, self.kept].copy()

    def write(self, rows: NDArray[Any], keep: NDArray[np.bool_] | None) -> None:
        """See `parasym.simulate.ensemble.Engine`: replicas that are let go run on unseen, so that blocks keep their draws."""
        self.rows[:, torch.from_numpy(self.kept)] = torch.from_numpy(np.ascontiguousarray(rows))
        self.sums.zero_()
        if keep is not None:
            self.kept[np.flatnonzero(self.kept)[~keep]] = False
