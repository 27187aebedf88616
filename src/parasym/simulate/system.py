"""What is simulated: a step written once on symbols, traced into a `Program` that either engine runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from parasym.core.errors import InputError
from parasym.simulate.expr import Expr, Tape, evaluate, push_forward, where

Sampling = Literal["replacement", "subset", "epoch"]
State = Sequence[Expr]


class Table:
    """Data a step draws rows from, (rows, columns).

    Raises:
        InputError: the data is empty, not two-dimensional, or holds a number that is not finite.
    """

    def __init__(self, rows: ArrayLike | torch.Tensor) -> None:
        data = np.asarray(rows, dtype=np.float64)
        if data.ndim == 1:
            data = data[:, None]
        if data.ndim != 2 or data.size == 0:
            raise InputError(f"a table has rows and columns, got the shape {data.shape}")
        if not np.isfinite(data).all():
            raise InputError(f"the table holds {int((~np.isfinite(data)).sum())} numbers that are not finite: clean the data first")
        if data.shape[0] > 1 << 24:
            raise InputError(f"a table has at most {1 << 24} rows, got {data.shape[0]}")
        self.rows: NDArray[np.float64] = data

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.rows.shape[0]


class Params:
    """The parameters of a run by name: ``p.lr`` is a symbol, its value (or values, over a grid) is given to the `Ensemble`."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._used: list[str] = []

    def __getattr__(self, name: str) -> Expr:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._used:
            self._used.append(name)
        return self._tape.symbol("param", name)


@dataclass(frozen=True)
class RowDraw:
    """One way a step draws rows: ``count`` of the ``table`` each step."""

    table: Table
    count: int
    sampling: Sampling


@dataclass
class Draws:
    """The random numbers of one step, as symbols; independent over steps and replicas (but see the sampling of `rows`)."""

    tape: Tape
    normal_count: int = 0
    uniform_count: int = 0
    row_draws: list[RowDraw] = field(default_factory=list)

    def normal(self) -> Expr:
        """A standard normal. In float32 |z| ends at 6.8, in float64 at 9.4."""
        self.normal_count += 1
        return self.tape.symbol("normal", self.normal_count - 1)

    def normals(self, count: int) -> tuple[Expr, ...]:
        """``count`` independent standard normals."""
        return tuple(self.normal() for _ in range(count))

    def uniform(self) -> Expr:
        """Uniform on the open interval (0, 1)."""
        self.uniform_count += 1
        return self.tape.symbol("uniform", self.uniform_count - 1)

    def rows(self, table: Table, count: int = 1, sampling: Sampling = "replacement") -> list[tuple[Expr, ...]]:
        """A batch: ``count`` rows of the table, each a tuple of its columns.

        ``sampling``: "replacement" (independent rows), "subset" (distinct rows, a fresh subset each step) or "epoch" (each replica
        goes through a random order of all rows, a new order for every epoch; the rows left over by the last batch start no batch).

        Raises:
            InputError: more rows than the table has, or an unknown sampling.
        """
        if sampling not in ("replacement", "subset", "epoch"):
            raise InputError(f"sampling {sampling!r} is unknown: use 'replacement', 'subset' or 'epoch'")
        if count < 1 or (sampling != "replacement" and count > table.size):
            raise InputError(f"a batch of {count} rows cannot be drawn from {table.size} ({sampling})")
        self.row_draws.append(RowDraw(table, count, sampling))
        at = len(self.row_draws) - 1
        return [tuple(self.tape.symbol("row", (at, k, c)) for c in range(table.rows.shape[1])) for k in range(count)]


@dataclass(frozen=True)
class System:
    """A small stochastic recursion.

    Attributes:
        name: what it is called in messages.
        start: (params, draws) -> the d numbers a replica starts at.
        step: (state, params, draws) -> the next d numbers; plain arithmetic and the functions of `parasym.simulate` on symbols.
    """

    name: str
    start: Callable[[Params, Draws], Sequence[Any]]
    step: Callable[[State, Params, Draws], Sequence[Any]]


@dataclass(frozen=True)
class TorchSystem:
    """A recursion given as a torch function on all replicas at once: large states, or a network under `torch.func.vmap`.

    Runs on the engine "torch" only, and has no symbolic derivative, so no Lyapunov exponents. Draw from the generator given.

    Attributes:
        name: what it is called in messages.
        size: d.
        start: (generator, replicas) -> (replicas, d).
        step: (state (replicas, d), parameters by name, each (replicas,), generator) -> (replicas, d).
        params: names of the parameters.
    """

    name: str
    size: int
    start: Callable[[torch.Generator, int], torch.Tensor]
    step: Callable[[torch.Tensor, Mapping[str, torch.Tensor], torch.Generator], torch.Tensor]
    params: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moment:
    """What an observable may look at when a step is done.

    Attributes:
        old: state before the step.
        new: state after it.
        carry: what the observable carried along so far.
        params: the parameters.
        push: derivative of the step along a direction of the state.
        eps: distance from one to the next number of the state's precision.
    """

    old: State
    new: State
    carry: State
    params: Params
    push: Callable[[Sequence[Expr]], list[Expr]]
    eps: float


@dataclass(frozen=True)
class Program:
    """A traced system with what its observables add: everything an engine needs.

    Attributes:
        tape: the graph.
        size: number of state entries d; rows d.. are carried by the observables.
        outputs: next value of every row.
        sums: one number a step, summed over the recorded steps for each replica.
        running: is this replica to go on (None: always). If there is one, the last row is a gate that holds it open during burn-in.
        draws: what each step draws.
        params: names of the parameters used.
        opaque: the torch function that makes the ("next", k) symbols, where the step is not symbolic.
    """

    tape: Tape
    size: int
    outputs: tuple[Expr, ...]
    sums: tuple[Expr, ...]
    running: Expr | None
    draws: Draws
    params: tuple[str, ...]
    opaque: TorchSystem | None = None


def trace_start(system: System) -> tuple[list[Expr], Draws, tuple[str, ...]]:
    """The start of a system as a graph."""
    tape = Tape()
    params, draws = Params(tape), Draws(tape)
    values = _lifted(tape, system.start(params, draws), system)
    if any(draw.sampling == "epoch" for draw in draws.row_draws):
        raise InputError(f"{system.name}: the start cannot draw by epochs")
    return values, draws, tuple(params._used)


def trace(
    system: System | TorchSystem, size: int, observables: Sequence[Any], eps: float = 2.0**-23
) -> tuple[Program, list[slice], list[slice]]:
    """Record one step of the system and what the observables add to it; ``eps`` is that of the precision it will run in.

    Returns the program, and for each observable which rows it carries and which sums are its own.

    Raises:
        InputError: the step returns another number of entries than it starts with.
    """
    tape = Tape()
    params, draws = Params(tape), Draws(tape)
    old = [tape.symbol("state", k) for k in range(size)]
    opaque = system if isinstance(system, TorchSystem) else None
    if isinstance(system, TorchSystem):
        new = [tape.symbol("next", k) for k in range(size)]
        for name in system.params:
            getattr(params, name)
    else:
        new = _lifted(tape, system.step(old, params, draws), system)
    if len(new) != size:
        raise InputError(f"{system.name}: the step returns {len(new)} numbers, the start has {size}")

    def push(direction: Sequence[Expr]) -> list[Expr]:
        if opaque is not None:
            raise InputError(f"{system.name}: a torch step has no symbolic derivative; write it as a System to get Lyapunov exponents")
        return push_forward(new, {entry.index: tangent for entry, tangent in zip(old, direction, strict=True)})

    rows: list[Expr] = list(new)
    sums: list[Expr] = []
    carries: list[slice] = []
    owned: list[slice] = []
    running: Expr | None = None
    for observable in observables:
        width = len(observable.begin([tape.constant(0.0)] * size, params))
        carry = [tape.symbol("state", len(rows) + k) for k in range(width)]
        carries.append(slice(len(rows), len(rows) + width))
        moment = Moment(old, new, carry, params, push, eps)
        following, added = observable.follow(moment)
        owned.append(slice(len(sums), len(sums) + len(added)))
        rows.extend(moment.new[0]._lift(value) for value in following)
        sums.extend(moment.new[0]._lift(value) for value in added)
        observable.look(old, carry, params)  # for the names of the parameters it reads
        goes_on = observable.running(carry)
        if goes_on is not None:
            running = goes_on if running is None else running & goes_on
    if running is not None:  # a replica that is finished stands still, with everything it carries
        gate = tape.symbol("state", len(rows))  # one until recording starts: nothing stops during burn-in
        moving = running | (gate > 0.5)
        rows = [*(where(moving, value, tape.symbol("state", k)) for k, value in enumerate(rows)), gate]
        sums = [where(moving, value, 0.0) for value in sums]
    program = Program(tape, size, tuple(rows), tuple(sums), running, draws, tuple(params._used), opaque)
    return program, carries, owned


def sample(observable: Any, size: int, carry: slice, rows: NDArray[Any], values: dict[str, Any]) -> list[NDArray[np.float64]]:
    """What an observable reads off the state now: arrays over replicas, in float64. ``rows`` is (all rows, replicas)."""
    tape = Tape()
    state = [tape.symbol("state", k) for k in range(size)]
    kept = [tape.symbol("state", k) for k in range(carry.start, carry.stop)]
    wanted = [state[0]._lift(value) for value in observable.look(state, kept, Params(tape))]

    def lookup(kind: str, key: Any) -> Any:
        return rows[key].astype(np.float64) if kind == "state" else values[key]

    return [np.broadcast_to(np.asarray(value, np.float64), rows.shape[1:]) for value in evaluate(wanted, lookup)]


def _lifted(tape: Tape, values: Sequence[Any], system: System) -> list[Expr]:
    values = list(values)
    if not values:
        raise InputError(f"{system.name}: the state is empty")
    return [value if isinstance(value, Expr) else tape.constant(value) for value in values]
