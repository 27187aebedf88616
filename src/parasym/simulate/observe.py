"""What is measured while replicas run: each observable adds a few numbers to the step, so memory does not grow with steps.

An observable may carry numbers from step to step (`begin`, `follow`), sum one number a step over time (`follow`), stop a replica
(`running`), and look at the state at given steps (`times`, `look`). Its collector turns these into an `Estimate`; errors come
from the spread over replicas, which are independent, so no model of autocorrelation is needed.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parasym.core.errors import InputError
from parasym.core.results import Estimate, Status
from parasym.simulate.expr import Expr, dot, log, sqrt, where
from parasym.simulate.system import Moment, Params, State

Reader = Callable[[State, Params], Sequence[Any]]
Array = NDArray[np.float64]
_REF = ("simulate",)
_ROUNDED = 1e-4  # share of steps on which a tangent may be lost in rounding: a random factor comes that close to zero now and then


@dataclass(frozen=True)
class Record:
    """What a run hands to an observable at the end; (g) grid points, (r) replicas.

    Attributes:
        sums: (its sums, g, r), each over the recorded steps.
        carry: (its carried numbers, g, r) at the end.
        steps: recorded steps.
        sound: (g, r) False where the replica diverged.
        looked: for each of its times (time, (its values, g, r)) folded by `fold`.
        grid: whether the run had a grid; without one, results drop the axis of grid points.
    """

    sums: Array
    carry: Array
    steps: int
    sound: NDArray[np.bool_]
    looked: list[Any]
    grid: bool


class Observable(ABC):
    """Base of the observables; a subclass overrides what it needs."""

    def begin(self, state: State, params: Params) -> Sequence[Any]:
        """Carried numbers when recording starts."""
        return ()

    def follow(self, moment: Moment) -> tuple[Sequence[Any], Sequence[Any]]:
        """After a step: the carried numbers, and what is added to the sums."""
        return moment.carry, ()

    def running(self, carry: State) -> Expr | None:
        """Whether the replica goes on; None when this observable never stops one."""
        return None

    def times(self, steps: int) -> Sequence[int]:
        """Recorded steps at which to `look`; 0 is the start of recording."""
        return ()

    def look(self, state: State, carry: State, params: Params) -> Sequence[Any]:
        """What to read off the state at those times."""
        return ()

    def fold(self, values: Array, sound: NDArray[np.bool_]) -> Any:
        """Reduce what was looked at, (values, g, r), to something whose size does not depend on the number of replicas."""
        return _fold_mean(values, sound)

    @abstractmethod
    def result(self, record: Record) -> Any:
        """The measurement."""


def everything(state: State, params: Params) -> Sequence[Expr]:
    """The state itself."""
    return state


@dataclass(frozen=True)
class Average(Observable):
    """Mean over recorded steps and replicas of each of the numbers ``of`` reads off the state.

    The result is an `Estimate` of shape (g, n), or (n,) without a grid.
    """

    of: Reader = everything

    def follow(self, moment: Moment) -> tuple[Sequence[Any], Sequence[Any]]:
        """Add the numbers up."""
        return (), tuple(self.of(moment.new, moment.params))

    def result(self, record: Record) -> Estimate:
        """Mean, with its error over replicas."""
        return _over_replicas(np.moveaxis(record.sums, 0, -1) / record.steps, record)


@dataclass(frozen=True)
class Increments(Observable):
    """Mean over recorded steps and replicas of numbers that depend on two states in a row: ``of(old, new, params)``."""

    of: Callable[[State, State, Params], Sequence[Any]]

    def follow(self, moment: Moment) -> tuple[Sequence[Any], Sequence[Any]]:
        """Add the numbers up."""
        return (), tuple(self.of(moment.old, moment.new, moment.params))

    def result(self, record: Record) -> Estimate:
        """Mean, with its error over replicas."""
        return _over_replicas(np.moveaxis(record.sums, 0, -1) / record.steps, record)


@dataclass(frozen=True)
class Covariance(Observable):
    """Covariance over recorded steps and replicas of the numbers ``of`` reads off the state, (g, n, n) or (n, n).

    Centred at the mean over everything; the error of an entry is that of a mean over replicas. What is summed is the distance from
    where the replica was when recording started, so that a mean far from zero costs no digits.
    """

    of: Reader = everything

    def begin(self, state: State, params: Params) -> Sequence[Any]:
        """Where recording starts."""
        return tuple(self.of(state, params))

    def follow(self, moment: Moment) -> tuple[Sequence[Any], Sequence[Any]]:
        """Add up the distances and their products."""
        x = [a - b for a, b in zip(self.of(moment.new, moment.params), moment.carry, strict=True)]
        return moment.carry, (*x, *(a * b for i, a in enumerate(x) for b in x[: i + 1]))

    def result(self, record: Record) -> Estimate:
        """The covariance."""
        size = len(record.carry)
        means = record.sums / record.steps
        origin, first = np.moveaxis(record.carry, 0, -1), np.moveaxis(means[:size], 0, -1)
        second = np.empty((*first.shape, size))
        at = size
        for i in range(size):
            for j in range(i + 1):
                second[..., i, j] = second[..., j, i] = means[at]
                at += 1
        with np.errstate(invalid="ignore", over="ignore"):  # what diverged is left out below
            off = _mean(origin + first, record.sound)[:, None] - origin
            shift = off[..., :, None] * first[..., None, :]
            centred = second - shift - np.swapaxes(shift, -1, -2) + off[..., :, None] * off[..., None, :]
        return _over_replicas(centred, record)


@dataclass(frozen=True)
class Snapshots(Observable):
    """Mean over replicas, at each of the recorded steps ``at``, of the numbers ``of`` reads off the state: (g, times, n) or (times, n)."""

    at: Sequence[int]
    of: Reader = everything

    def times(self, steps: int) -> Sequence[int]:
        """The steps asked for."""
        return _times(self.at, steps)

    def look(self, state: State, carry: State, params: Params) -> Sequence[Any]:
        """The numbers asked for."""
        return self.of(state, params)

    def result(self, record: Record) -> Estimate:
        """The means."""
        return _from_folds(record)


@dataclass(frozen=True)
class Displacement(Observable):
    """Mean squared distance from where recording started, at the recorded steps ``lags``: (g, lags) or (lags,)."""

    lags: Sequence[int]
    of: Reader = everything

    def begin(self, state: State, params: Params) -> Sequence[Any]:
        """Where recording starts."""
        return tuple(self.of(state, params))

    def times(self, steps: int) -> Sequence[int]:
        """The lags."""
        return _times(self.lags, steps)

    def look(self, state: State, carry: State, params: Params) -> Sequence[Any]:
        """Squared distance now."""
        moved = [a - b for a, b in zip(self.of(state, params), carry, strict=True)]
        return (dot(moved, moved),)

    def result(self, record: Record) -> Estimate:
        """The means, one for each lag."""
        found = _from_folds(record)
        assert isinstance(found.value, torch.Tensor)
        stderr = found.stderr[..., 0] if isinstance(found.stderr, torch.Tensor) else None  # none where replicas diverged
        return dataclasses.replace(found, value=found.value[..., 0], stderr=stderr)


def diffusion_exponent(displacement: Estimate, lags: Sequence[int]) -> Estimate:
    """Slope of log mean squared displacement over log lag, by least squares.

    Args:
        displacement: what `Displacement` measured, (lags,) or (g, lags).
        lags: its lags, all positive, at least three.

    Raises:
        InputError: too few lags, or a displacement that is not positive.
    """
    value = torch.as_tensor(displacement.value, dtype=torch.float64)
    x = torch.as_tensor(list(lags), dtype=torch.float64)
    if len(x) < 3 or len(x) != value.shape[-1] or not bool((value > 0).all()) or not bool((x > 0).all()):
        raise InputError("a diffusion exponent needs at least three positive lags with positive displacements")
    x, y = x.log(), value.log()
    centred = x - x.mean()
    slope = (centred * y).sum(-1) / centred.square().sum()
    left = y - y.mean(-1, keepdim=True) - slope[..., None] * centred
    # the spread about the line: displacements at different lags share replicas, so this is the curvature of the law, not sampling error
    scatter = (left.square().sum(-1) / (len(x) - 2) / centred.square().sum()).sqrt()
    return Estimate(slope, residual=float(scatter.max()), status=displacement.status, refs=_REF, note=displacement.note)


@dataclass(frozen=True)
class Histogram(Observable):
    """Counts over replicas of one number, at the recorded steps ``at``, added up.

    The result is a `Counts`; what falls outside the edges is counted apart.
    """

    edges: Sequence[float]
    at: Sequence[int]
    of: Callable[[State, Params], Any] = field(default=lambda state, params: state[0])

    def __post_init__(self) -> None:
        edges = np.asarray(self.edges, float)
        if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise InputError("histogram edges must be at least two numbers in increasing order")

    def times(self, steps: int) -> Sequence[int]:
        """The steps asked for."""
        return _times(self.at, steps)

    def look(self, state: State, carry: State, params: Params) -> Sequence[Any]:
        """The number."""
        return (self.of(state, params),)

    def fold(self, values: Array, sound: NDArray[np.bool_]) -> Any:
        """Counts: below, bins, above, diverged."""
        edges = np.asarray(self.edges, float)
        out = np.zeros((values.shape[1], len(edges) + 2), np.int64)
        for g in range(values.shape[1]):
            x = values[0, g]
            good = np.isfinite(x) & sound[g]
            out[g, : len(edges) + 1] = np.bincount(np.searchsorted(edges, x[good], "right"), minlength=len(edges) + 1)
            out[g, -1] = (~good).sum()
        return out

    def result(self, record: Record) -> Counts:
        """The counts."""
        total = np.sum([folded for _, folded in record.looked], axis=0)
        total = total if record.grid else total[0]
        bins, low, high, lost = (torch.from_numpy(np.array(total[..., k])) for k in (slice(1, -2), 0, -2, -1))
        return Counts(tuple(float(e) for e in self.edges), bins, low, high, lost)


@dataclass(frozen=True, eq=False)
class Counts:
    """A histogram: ``counts`` (..., bins) within the edges, and what was ``below``, ``above`` and ``diverged``."""

    edges: tuple[float, ...]
    counts: torch.Tensor
    below: torch.Tensor
    above: torch.Tensor
    diverged: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """How many numbers were offered, diverged ones included."""
        return self.counts.sum(-1) + self.below + self.above + self.diverged

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = ("counts", "below", "above", "diverged")
        return {"edges": list(self.edges), **{name: getattr(self, name).tolist() for name in names}}


@dataclass(frozen=True)
class FirstPassage(Observable):
    """Time until ``when(state, params)`` first holds (after at least one step); the replica then stands still.

    Replicas that are not out at the end are censored, and counted. What other observables sum over time stops with the replica.
    The result is a `Passage`.
    """

    when: Callable[[State, Params], Expr]

    def begin(self, state: State, params: Params) -> Sequence[Any]:
        """One while still inside."""
        return (1.0,)

    def follow(self, moment: Moment) -> tuple[Sequence[Any], Sequence[Any]]:
        """Count the steps inside, the crossing one included."""
        return (where(self.when(moment.new, moment.params), 0.0, moment.carry[0]),), (moment.carry[0],)

    def running(self, carry: State) -> Expr | None:
        """Until it is out."""
        return carry[0] > 0.5

    def result(self, record: Record) -> Passage:
        """Times and how they ended."""
        times, inside = record.sums[0], record.carry[0] > 0.5
        kept = [torch.from_numpy(np.array(a if record.grid else a[0])) for a in (times, ~inside & record.sound, record.sound)]
        return Passage(kept[0], kept[1], kept[2], record.steps)


@dataclass(frozen=True, eq=False)
class Passage:
    """First-passage times in steps, (replicas,) or (g, replicas).

    Attributes:
        times: steps until the passage, or until the end where ``out`` is False.
        out: whether the replica passed.
        sound: False where it diverged before it passed.
        steps: when watching ended.
    """

    times: torch.Tensor
    out: torch.Tensor
    sound: torch.Tensor
    steps: int

    @property
    def mean(self) -> Estimate:
        """Mean time, as total time over number of passages (maximum likelihood for exponential times, exact without censoring).

        ``not_converged`` when replicas diverged, when none passed, or when more than half are censored.
        """
        passed = self.out.sum(-1)
        total = (self.times * self.sound).sum(-1)
        value = total / passed
        spread = torch.where(self.out, self.times - value[..., None], 0.0).square().sum(-1) / passed
        censored = (~self.out & self.sound).sum(-1)
        stderr = torch.where(censored > 0, value, spread.sqrt()) / passed.sqrt()
        problem = ""
        if not bool(self.sound.all()):
            problem = f"{int((~self.sound).sum())} replicas diverged before they passed"
        elif bool((passed == 0).any()):
            problem = "no replica passed"
        elif bool((censored > passed).any()):
            problem = "more than half of the replicas did not pass"
        details = {"passed": passed, "censored": censored, "diverged": (~self.sound).sum(-1), "steps": self.steps}
        if problem:
            return Estimate(value, status="not_converged", refs=_REF, note=problem, details=details)
        return Estimate(value, stderr=stderr, refs=_REF, details=details, assumptions=("exponential times where censored",))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the mean, and how many passed, did not, and diverged before they could."""
        counts = {"passed": self.out, "censored": ~self.out & self.sound, "diverged": ~self.sound}
        return {"mean": self.mean.to_dict(), **{name: which.sum(-1).tolist() for name, which in counts.items()}, "steps": self.steps}


@dataclass(frozen=True)
class Lyapunov(Observable):
    """The largest ``count`` Lyapunov exponents of the step: tangents orthogonalised at every step (modified Gram-Schmidt, a QR).

    Per step, natural log, (g, count) or (count,); in decreasing order up to sampling error. The derivative of the step is taken
    symbolically; for a linear recursion it is the random matrix itself: start it at 0, since a state that decays passes through
    subnormal numbers, which take a processor a hundred times as long. A factor that is exactly zero makes the exponent minus
    infinity, and one whose columns are dependent up to rounding would make it the logarithm of rounding; the status is then
    ``not_converged``, with a note.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"the number of Lyapunov exponents must be positive, not {self.count}")

    def begin(self, state: State, params: Params) -> Sequence[Any]:
        """Unit vectors."""
        if self.count > len(state):
            raise InputError(f"{self.count} Lyapunov exponents were asked of a system with {len(state)} dimensions")
        return tuple(1.0 if i == k else 0.0 for k in range(self.count) for i in range(len(state)))

    def follow(self, moment: Moment) -> tuple[Sequence[Any], Sequence[Any]]:
        """Push the tangents through the step, orthogonalise, add the logs of the lengths, and count what is left of rounding."""
        size = len(moment.new)
        kept: list[list[Any]] = []
        grown: list[Any] = []
        rounded: list[Any] = []
        for k in range(self.count):
            before = moment.carry[k * size : (k + 1) * size]
            column: list[Any] = list(moment.push(before))
            taken: list[Any] = []
            for other in kept:
                taken.append(dot(other, column))
                column = [c - taken[-1] * o for c, o in zip(column, other, strict=True)]
            square = moment.new[0]._lift(dot(column, column))
            if taken:
                rounded.append(where(square <= dot(taken, taken) * (8 * moment.eps) ** 2, 1.0, 0.0))
            scale = 1.0 / sqrt(where(square <= 0.0, 1.0, square))
            kept.append([where(square <= 0.0, b, c * scale) for b, c in zip(before, column, strict=True)])
            grown.append(0.5 * log(square))
        return [entry for column in kept for entry in column], [*grown, *rounded]

    def result(self, record: Record) -> Estimate:
        """Exponents."""
        means = np.moveaxis(record.sums, 0, -1) / record.steps
        values, rounded = means[..., : self.count], _mean(means[..., self.count :], record.sound)
        note = ""
        if (np.isneginf(values) & record.sound[..., None]).any():
            note = "a factor was zero, or too small for this precision: the exponent is minus infinity"
        elif rounded.size and rounded.max() > _ROUNDED:
            note = f"on {rounded.max():.1%} of the steps a tangent was lost in rounding: its exponent is lower than this precision can tell"
        if note:
            mean = _mean(values, record.sound)
            return Estimate(torch.from_numpy(mean if record.grid else mean[0]), status="not_converged", refs=_REF, note=note)
        return _over_replicas(values, record)


# ------------------------------------------------------------------------------------------------ reductions


def _times(at: Sequence[int], steps: int) -> Sequence[int]:
    times = sorted({int(t) for t in at})
    if not times or times[0] < 0 or times[-1] > steps:
        raise InputError(f"times to look at must lie in 0..{steps} recorded steps, got {list(at)[:5]}")
    return times


def _mean(values: Array, sound: NDArray[np.bool_]) -> Array:
    """Mean over replicas (axis 1) of (g, r, ...), sound ones only."""
    weight = sound.reshape(*sound.shape, *([1] * (values.ndim - 2)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight, values, 0.0).sum(1) / weight.sum(1)


def _over_replicas(values: Array, record: Record) -> Estimate:
    """Mean and standard error over replicas of (g, r, ...)."""
    mean = _mean(values, record.sound)
    with np.errstate(over="ignore", invalid="ignore"):
        square = _mean(np.square(np.where(_like(record.sound, values), values, 0.0) - mean[:, None]), record.sound)
    count = record.sound.sum(1).reshape(-1, *([1] * (values.ndim - 2)))
    return _estimate(mean, square, count, record)


def _like(sound: NDArray[np.bool_], values: Array) -> NDArray[np.bool_]:
    return np.broadcast_to(sound.reshape(*sound.shape, *([1] * (values.ndim - 2))), values.shape)


def _fold_mean(values: Array, sound: NDArray[np.bool_]) -> tuple[Array, Array, NDArray[np.int64]]:
    """(mean, mean square deviation, count), each (g, n) or (g, 1), over sound replicas."""
    moved = np.moveaxis(values, 0, -1)
    mean = _mean(moved, sound)
    return mean, _mean(np.square(moved - mean[:, None]), sound), sound.sum(1)[:, None]


def _from_folds(record: Record) -> Estimate:
    mean, square, count = (np.stack([folded[k] for _, folded in record.looked], axis=1) for k in range(3))
    return _estimate(mean, square, count, record)


def _estimate(mean: Array, square: Array, count: Any, record: Record) -> Estimate:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        stderr = np.sqrt(square / np.maximum(count - 1, 1))
    if not record.grid:
        mean, stderr = mean[0], stderr[0]
    lost = int((~record.sound).sum())
    details = {"replicas": int(record.sound.size), "diverged": lost, "steps": record.steps}
    status: Status = "ok"
    note = ""
    if lost or not np.isfinite(mean).all() or not np.isfinite(stderr).all():
        status = "not_converged"
        note = (
            f"{lost} of {record.sound.size} replicas diverged; the value is over the others"
            if lost
            else "the value left the range of numbers"
        )
    single = count.min() < 2
    return Estimate(
        torch.from_numpy(np.array(mean)),
        stderr=None if single or status != "ok" else torch.from_numpy(np.array(stderr)),
        status=status,
        refs=_REF,
        note=note,
        details=details,
    )
