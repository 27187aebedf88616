"""Runs an ensemble: many replicas of a system, perhaps over a grid of parameters, with observables on the fly."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from parasym.core.errors import InputError
from parasym.simulate import kernel
from parasym.simulate.expr import evaluate
from parasym.simulate.observe import Observable, Record
from parasym.simulate.reference import ReferenceEngine, draw_inputs
from parasym.simulate.rng import LaneDraws, streams
from parasym.simulate.system import Draws, Program, System, Tape, TorchSystem, sample, trace, trace_start

EngineName = Literal["auto", "lanes", "torch"]
Precision = Literal["float32", "float64"]
_LARGEST_STATE = 1 << 34  # bytes


class Engine(Protocol):
    """What runs a program: all replicas go on by a number of steps."""

    def advance(self, steps: int, clock: int, progress: Callable[[int], None]) -> None:
        """Run ``steps`` steps; ``clock`` is the number of the first, ``progress`` is told replica-steps done."""
        ...

    def read(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """The rows (rows, n) and the sums (sums, n)."""
        ...

    def write(self, rows: NDArray[Any], keep: NDArray[np.bool_] | None) -> None:
        """Set the rows, zero the sums, and go on only with the replicas in ``keep``."""
        ...


@dataclass(frozen=True, eq=False)
class Run:
    """What a run left.

    Attributes:
        results: what each observable measured, in the order they were given.
        final: state of every replica at the end, (replicas, d) or (g, replicas, d), float64; what diverged is as it was found.
        sound: False where a replica diverged, (replicas,) or (g, replicas).
        steps: steps run, burn-in included.
        engine: "lanes" or "torch".
        updates: replica-steps done.
        seconds: CPU seconds of this process while stepping.
    """

    results: tuple[Any, ...]
    final: torch.Tensor
    sound: torch.Tensor
    steps: int
    engine: str
    updates: int
    seconds: float

    @property
    def diverged(self) -> int:
        """How many replicas left the range of floating-point numbers."""
        return int((~self.sound).sum())

    def __getitem__(self, index: int) -> Any:
        return self.results[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the final states."""
        from parasym.core.results import plain

        return {
            "results": plain(list(self.results)),
            "replicas": self.sound.numel(),
            "diverged": self.diverged,
            "steps": self.steps,
            "engine": self.engine,
            "updates": self.updates,
            "seconds": self.seconds,
        }


def grid(**axes: Sequence[float]) -> dict[str, NDArray[np.float64]]:
    """All combinations of the values of each parameter, as equally long lists; the last axis runs fastest."""
    points = np.array(list(itertools.product(*axes.values())), float).reshape(-1, len(axes))
    return {name: points[:, k] for k, name in enumerate(axes)}


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Independent replicas of a small stochastic system.

    Attributes:
        system: what is iterated.
        replicas: how many, for each grid point.
        params: value of each parameter the system names: a number, or a list with one value for each grid point.
        seed: fixes everything; replica k has its own random stream, whatever the number of threads or of replicas.
        engine: "lanes" (compiled, needs numba), "torch" (the reference, no compiler), or "auto".
        precision: of the state; sums are kept in float64.
        threads: worker threads of the lanes; the numbers do not depend on it, bit for bit.

    Raises:
        InputError: sizes, parameters or names that cannot be used.
        MissingExtraError: engine "lanes" without numba.

    Example:
        >>> walk = System("walk", lambda p, draw: [0.0], lambda x, p, draw: [x[0] + p.step * draw.normal()])
        >>> run = Ensemble(walk, replicas=1000, params={"step": 0.1}, engine="torch").run(10)
        >>> tuple(run.final.shape), run.diverged
        ((1000, 1), 0)
    """

    system: System | TorchSystem
    replicas: int
    params: Mapping[str, Any]
    seed: int = 0
    engine: EngineName = "auto"
    precision: Precision = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("replicas", "threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if self.engine not in ("auto", "lanes", "torch"):
            raise InputError(f"engine {self.engine!r} is unknown: use 'auto', 'lanes' or 'torch'")
        if self.precision not in ("float32", "float64"):
            raise InputError(f"precision {self.precision!r} is unknown: use 'float32' or 'float64'")
        streams(self.seed, np.zeros(1, np.int64))
        self._grid()

    def run(
        self,
        steps: int,
        observe: Sequence[Observable] = (),
        *,
        burn: int = 0,
        start: Any = None,
        progress: bool = False,
    ) -> Run:
        """Run ``burn`` steps unobserved and ``steps`` steps observed.

        Args:
            steps: observed steps.
            observe: what to measure; results come in this order.
            burn: steps before recording starts.
            start: state to start from, (d,), (replicas, d) or (g, replicas, d), instead of the system's own.
            progress: show a progress bar.

        Raises:
            InputError: impossible sizes, missing or unknown parameters, a start that does not fit.
        """
        for name, value in (("steps", steps), ("burn", burn)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name} must be a non-negative integer, got {value!r}")
        if steps == 0 and observe:
            raise InputError("observables need at least one recorded step")
        values, points = self._grid()
        count = points * self.replicas
        symbolic = self.system if isinstance(self.system, System) else None
        first, start_draws, start_params = trace_start(symbolic) if symbolic else ([], Draws(Tape()), ())
        size = self.system.size if isinstance(self.system, TorchSystem) else len(first)
        program, carries, owned = trace(self.system, size, observe, float(np.finfo(self.precision).eps))
        self._check_names({*program.params, *start_params}, values)
        if count * max(len(program.outputs), 1) * 8 > _LARGEST_STATE:
            raise InputError(f"{count} replicas of {len(program.outputs)} numbers need more than {_LARGEST_STATE >> 30} GiB: run fewer")
        spread = {name: np.repeat(value, self.replicas) if value.size > 1 else value for name, value in values.items()}
        generators = streams(self.seed, np.arange(count, dtype=np.int64))
        rows = self._start(first, size, start_draws, spread, generators, start, count, len(program.outputs))
        name, engine = self._engine(program, rows, generators, spread)
        recorder = _Recorder(program, carries, owned, observe, spread, points, self.replicas, steps)
        began = time.process_time()
        with _Bar(progress, count * (steps + burn)) as tick:
            updates = recorder.drive(engine, rows, burn, steps, tick)
        seconds = time.process_time() - began
        sound = recorder.sound.reshape(points, self.replicas)
        final = recorder.rows[: program.size].astype(np.float64).T.reshape(points, self.replicas, program.size)
        gridded = any(np.ndim(value) for value in self.params.values())
        results = tuple(observable.result(recorder.record(k, gridded)) for k, observable in enumerate(observe))
        return Run(
            results,
            torch.from_numpy(final if gridded else final[0]),
            torch.from_numpy(sound if gridded else sound[0]),
            steps + burn,
            name,
            updates,
            seconds,
        )

    def _grid(self) -> tuple[dict[str, NDArray[np.float64]], int]:
        values = {name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in self.params.items()}
        lengths = {value.size for value in values.values() if value.size != 1}
        if any(value.ndim != 1 for value in values.values()) or len(lengths) > 1 or 0 in lengths:
            shapes = {name: value.shape for name, value in values.items()}
            raise InputError(f"parameters must be numbers or equally long lists, got shapes {shapes}; `grid` makes all combinations")
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise InputError(f"parameter {name!r} is not finite: {self.params[name]!r}")
        return values, next(iter(lengths), 1)

    def _check_names(self, used: set[str], values: Mapping[str, Any]) -> None:
        if missing := sorted(used - set(values)):
            raise InputError(f"{self.system.name} needs the parameters {', '.join(sorted(used))}; missing: {', '.join(missing)}")
        if unknown := sorted(set(values) - used):
            raise InputError(f"{self.system.name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(used)) or 'none'}")

    def _start(
        self, first: list[Any], size: int, draws: Any, spread: dict[str, Any], generators: Any, start: Any, count: int, rows: int
    ) -> NDArray[Any]:
        out = np.zeros((rows, count), np.float64 if self.precision == "float64" else np.float32)
        if start is None and isinstance(self.system, TorchSystem):
            start = self.system.start(torch.Generator().manual_seed(self.seed), count)
            if start.shape != (count, size):
                raise InputError(f"{self.system.name}: the start has the shape {tuple(start.shape)}; {(count, size)} was expected")
            start = start.reshape(-1, self.replicas, size)
        if start is None:
            inputs = draw_inputs(draws, LaneDraws(generators, self.precision == "float64"), spread)
            for k, value in enumerate(evaluate(first, inputs)):
                out[k] = value
            return out
        given = np.asarray(start.detach() if isinstance(start, torch.Tensor) else start, dtype=np.float64)
        points = count // self.replicas
        try:
            whole = np.broadcast_to(given, (points, self.replicas, size))
        except ValueError:
            raise InputError(f"start has the shape {given.shape}; {(points, self.replicas, size)} was expected") from None
        if not np.isfinite(whole).all():
            raise InputError("start holds numbers that are not finite")
        out[:size] = whole.reshape(count, size).T
        return out

    def _engine(self, program: Program, rows: NDArray[Any], generators: Any, spread: dict[str, Any]) -> tuple[str, Engine]:
        name = self.engine
        if program.opaque is not None:
            if name == "lanes":
                raise InputError(f"{self.system.name} is a torch step: use engine='torch'")
            name = "torch"
        if name == "auto":
            name = "lanes" if kernel.available() and kernel.fits(program) else "torch"
        if name == "lanes":
            kernel.require_numba()
            return name, LaneEngine(program, rows, generators, spread, self.threads)
        return name, ReferenceEngine(program, rows, self.seed, spread)


class LaneEngine:
    """Blocks of lanes, run by the compiled kernel on a few threads."""

    def __init__(self, program: Program, rows: NDArray[Any], generators: NDArray[np.uint32], params: dict[str, Any], threads: int) -> None:
        self.double = rows.dtype == np.float64
        self.threads = threads
        self.module = kernel.compiled(kernel.source(program, self.double))
        draws = program.draws.row_draws
        tables = [draw.table.rows.T.ravel() for draw in draws] or [np.zeros(1)]
        self.tables = np.concatenate(tables).astype(rows.dtype)
        count = rows.shape[1]
        self.sum_rows = len(program.sums)
        self.rows, self.generators = _blocks(rows), _blocks(generators)
        self.params = _blocks(
            np.stack([np.broadcast_to(params[name], count) for name in program.params] or [np.zeros(count)]).astype(rows.dtype)
        )
        orders = [np.arange(draw.table.size, dtype=np.int32) for draw in draws if draw.sampling == "epoch"] or [np.zeros(1, np.int32)]
        self.orders = np.tile(np.repeat(np.concatenate(orders), kernel.LANES), (len(self.rows), 1))
        self.totals = np.zeros((len(self.rows), max(self.sum_rows, 1) * kernel.LANES))
        self.count = count
        self.module.advance(self.rows, self.generators, self.params, self.totals, self.orders, self.tables, 0, 0, 0, 0)  # compiles

    def advance(self, steps: int, clock: int, progress: Callable[[int], None]) -> None:
        """See `Engine`."""
        blocks = len(self.rows)
        size = max(1, min(-(-blocks // self.threads), 1 + (1 << 22) // (kernel.LANES * max(steps, 1))))
        pieces = [(low, min(low + size, blocks)) for low in range(0, blocks, size)]

        def work(piece: tuple[int, int]) -> int:
            self.module.advance(
                self.rows, self.generators, self.params, self.totals, self.orders, self.tables, piece[0], piece[1], steps, clock
            )
            return (piece[1] - piece[0]) * kernel.LANES * steps

        if self.threads == 1 or len(pieces) == 1:
            for piece in pieces:
                progress(work(piece))
            return
        with ThreadPoolExecutor(self.threads) as pool:
            for done in pool.map(work, pieces):
                progress(done)

    def read(self) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """See `Engine`."""
        sums = _lanes(self.totals, self.count) if self.sum_rows else np.zeros((0, self.count))
        return _lanes(self.rows, self.count), sums

    def write(self, rows: NDArray[Any], keep: NDArray[np.bool_] | None) -> None:
        """See `Engine`."""
        if keep is not None:
            self.generators, self.params, self.orders = (
                _blocks(_lanes(array, self.count)[:, keep]) for array in (self.generators, self.params, self.orders)
            )
            rows = rows[:, keep]
            self.count = rows.shape[1]
        self.rows = _blocks(rows)
        self.totals = np.zeros((len(self.rows), max(self.sum_rows, 1) * kernel.LANES))


def _blocks(array: NDArray[Any]) -> NDArray[Any]:
    """(rows, n) -> (blocks, rows * LANES); the last block is filled with copies of its last replica."""
    rows, count = array.shape
    blocks = -(-count // kernel.LANES)
    if blocks * kernel.LANES != count:
        array = np.concatenate([array, np.repeat(array[:, -1:], blocks * kernel.LANES - count, axis=1)], axis=1)
    return np.ascontiguousarray(array.reshape(rows, blocks, kernel.LANES).transpose(1, 0, 2)).reshape(blocks, rows * kernel.LANES)


def _lanes(array: NDArray[Any], count: int) -> NDArray[Any]:
    """The inverse of `_blocks`."""
    blocks, rows = array.shape[0], array.shape[1] // kernel.LANES
    return array.reshape(blocks, rows, kernel.LANES).transpose(1, 0, 2).reshape(rows, blocks * kernel.LANES)[:, :count]


class _Recorder:
    """Drives an engine from one appointment to the next and keeps what the observables will want."""

    def __init__(
        self,
        program: Program,
        carries: list[slice],
        owned: list[slice],
        observe: Sequence[Observable],
        params: dict[str, Any],
        points: int,
        replicas: int,
        steps: int,
    ) -> None:
        self.program, self.carries, self.owned, self.observe, self.params = program, carries, owned, observe, params
        self.points, self.replicas, self.steps = points, replicas, steps
        count = points * replicas
        self.sound = np.ones(count, bool)
        self.rows = np.zeros((0, count))
        self.sums = np.zeros((len(program.sums), count))
        self.looked: list[list[Any]] = [[] for _ in observe]
        self.active = np.arange(count)

    def drive(self, engine: Engine, rows: NDArray[Any], burn: int, steps: int, tick: Callable[[int], None]) -> int:
        """Burn in, start recording, and stop at every appointment. Returns the replica-steps done."""
        updates = 0
        self.rows = rows
        self.watch = False
        if self.program.running is not None:
            self.rows[-1] = 1.0
            engine.write(self.rows, None)
        for low, high in itertools.pairwise(appointments(burn, ())):
            engine.advance(high - low, low, tick)
            updates += (high - low) * len(self.active)
            self._take(engine)
        for observable, carry in zip(self.observe, self.carries, strict=True):
            for k, value in enumerate(self._begin(observable, carry)):
                self.rows[carry.start + k] = value
        if self.program.running is not None:
            self.rows[-1] = 0.0
        self.sums[:] = 0
        engine.write(self.rows[:, self.active], None)
        self.watch = True
        times = [observable.times(steps) for observable in self.observe]
        self._look(0, times)
        for low, high in itertools.pairwise(appointments(steps, {t for some in times for t in some})):
            if len(self.active):
                engine.advance(high - low, burn + low, tick)
                updates += (high - low) * len(self.active)
                self._take(engine)
            self._look(high, times)
        return updates

    def _begin(self, observable: Observable, carry: slice) -> list[Any]:
        beginning = _Beginning(observable)
        return sample(beginning, self.program.size, carry, self.rows, self.params) if carry.stop > carry.start else []

    def _take(self, engine: Engine) -> None:
        """Fetch the numbers, find what diverged, and let go of replicas that are done."""
        rows, sums = engine.read()
        with np.errstate(invalid="ignore", over="ignore"):
            # minus infinity may be the value of a sum of logs; any other infinity, and nan, is a divergence
            lost = ~(np.isfinite(rows).all(0) & (np.isfinite(sums) | np.isneginf(sums)).all(0))
        self.rows[:, self.active] = rows
        self.sums[:, self.active] += sums
        self.sound[self.active[lost]] = False
        done = lost.copy()
        if self.watch and self.program.running is not None:
            alive = evaluate([self.program.running], lambda kind, key: rows[key] if kind == "state" else self.params[key])[0]
            done |= ~alive
        if self._compact(done, lost):
            keep = ~done
            self.active = self.active[keep]
            engine.write(rows, keep)
        else:
            engine.write(rows, None)

    def _compact(self, done: NDArray[np.bool_], lost: NDArray[np.bool_]) -> bool:
        """Whether to let go: at once of what diverged, else when half is done."""
        return bool(lost.any() or 2 * done.sum() >= len(done) > 0)

    def _look(self, now: int, times: list[Sequence[int]]) -> None:
        sound = self.sound.reshape(self.points, self.replicas)
        for k, observable in enumerate(self.observe):
            if now in times[k]:
                values = sample(observable, self.program.size, self.carries[k], self.rows, self.params)
                folded = observable.fold(np.stack(values).reshape(-1, self.points, self.replicas), sound)
                self.looked[k].append((now, folded))

    def record(self, k: int, gridded: bool) -> Record:
        """What observable ``k`` is handed at the end."""
        shape = (-1, self.points, self.replicas)
        return Record(
            self.sums[self.owned[k]].reshape(shape),
            self.rows[self.carries[k]].astype(np.float64).reshape(shape),
            self.steps,
            self.sound.reshape(self.points, self.replicas),
            self.looked[k],
            gridded,
        )


class _Beginning:
    """Lets `sample` read what an observable carries at first."""

    def __init__(self, observable: Observable) -> None:
        self.observable = observable

    def look(self, state: Any, carry: Any, params: Any) -> Sequence[Any]:
        return self.observable.begin(state, params)


def appointments(steps: int, times: Any) -> list[int]:
    """Steps at which to look up: 0, the times asked for, the end, and a growing ladder between to find what is done or diverged."""
    marks = {0, steps, *times}
    at = 0
    while at < steps:
        at += max(kernel.CHUNK, min(1 << 14, at // 4) // kernel.CHUNK * kernel.CHUNK)
        marks.add(min(at, steps))
    return sorted(marks)


class _Bar:
    """A progress bar in replica-steps, or none."""

    def __init__(self, show: bool, total: int) -> None:
        self.show, self.total = show, total

    def __enter__(self) -> Callable[[int], None]:
        if not self.show:
            return lambda done: None
        from rich.progress import Progress

        self.progress = Progress()
        self.progress.start()
        task = self.progress.add_task("simulating", total=self.total)
        return lambda done: self.progress.advance(task, done)

    def __exit__(self, *_: object) -> None:
        if self.show:
            self.progress.stop()
