"""Prediction beside measurement: what every solvable model offers, and the table in which the two meet.

A `Model` is a frozen description of a small learning problem that has closed forms. `predict(kind)` gives numbers from theory,
`simulate(kind)` gives the same numbers from a run, `compare(kind)` puts them side by side, and `control(kind)` compares with
what the mechanism taken away would give, which must fail.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from parasym.core.errors import InputError, ParasymError
from parasym.core.results import Estimate, Status, plain


class NotSolvable(ParasymError):
    """The model has no closed form for what was asked."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What theory says.

    Attributes:
        kind: what was asked, for example "stationary".
        values: observable -> predicted value, with the residual of its defining equation where it was solved numerically.
        exact: False when it holds only as something becomes small or large.
        condition: the numbers that must be small (or large) for an asymptotic prediction, by name.
        refs: paper slug and result.
    """

    kind: str
    values: Mapping[str, Estimate]
    exact: bool = True
    condition: Mapping[str, float] = field(default_factory=dict)
    refs: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The worst status of the values."""
        return worst(value.status for value in self.values.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: plain(getattr(self, name)) for name in ("kind", "values", "exact", "condition", "refs")} | {"status": self.status}


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a run gave.

    Attributes:
        kind: as in the prediction.
        values: observable -> measured value with its standard error.
        seed: of the run.
        config: everything else the numbers depend on, as plain data.
        seconds: wall time.
    """

    kind: str
    values: Mapping[str, Estimate]
    seed: int
    config: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def status(self) -> Status:
        """The worst status of the values."""
        return worst(value.status for value in self.values.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = ("kind", "values", "seed", "config", "seconds")
        return {name: plain(getattr(self, name)) for name in names} | {"status": self.status}


@dataclass(frozen=True)
class Row:
    """One number of theory beside one number of a run; ``tolerance`` is the largest difference that passes."""

    observable: str
    predicted: float
    measured: float
    stderr: float
    tolerance: float
    status: Status

    @property
    def error(self) -> float:
        """Absolute difference."""
        return abs(self.predicted - self.measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = ("observable", "predicted", "measured", "stderr", "tolerance", "error", "status")
        return {name: plain(getattr(self, name)) for name in names}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Theory beside a run, row by row, with both kept."""

    rows: tuple[Row, ...]
    prediction: Prediction
    measurement: Measurement

    @property
    def status(self) -> Status:
        """The worst status of the rows."""
        return worst(row.status for row in self.rows)

    @property
    def ok(self) -> bool:
        """Whether every row is within its tolerance."""
        return bool(self.rows) and self.status == "ok"

    @property
    def worst(self) -> Row:
        """The row that misses by most, in units of its tolerance."""
        return max(self.rows, key=lambda row: math.inf if math.isnan(row.error) else row.error / max(row.tolerance, 1e-300))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        parts = {"prediction": self.prediction.to_dict(), "measurement": self.measurement.to_dict()}
        return {"status": self.status, "rows": [row.to_dict() for row in self.rows], **parts}

    def to_markdown(self) -> str:
        """The table."""
        lines = ["| observable | predicted | measured | standard error | tolerance | |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            numbers = " | ".join(f"{value:.6g}" for value in (row.predicted, row.measured, row.stderr, row.tolerance))
            lines.append(f"| {row.observable} | {numbers} | {row.status} |")
        return "\n".join(lines)


def worst(statuses: Any) -> Status:
    """The worst of several statuses; ``ok`` of none."""
    order: tuple[Status, ...] = ("violated", "not_converged", "not_applicable", "ok")
    found = set(statuses)
    return next((status for status in order if status in found), "ok")


def beside(
    prediction: Prediction,
    measurement: Measurement,
    relative: float = 0.0,
    absolute: float | Mapping[str, float] = 0.0,
    errors: float = 5.0,
) -> Comparison:
    """Align a prediction and a measurement by observable.

    A row passes when it is off by at most ``errors`` standard errors + ``absolute`` (one for all, or one for each observable) +
    ``relative`` x |prediction|. What did not converge or does not apply is never compared: its row carries that status. A row of
    numbers that disagree is ``violated``.

    Raises:
        InputError: a predicted observable was not measured.
    """
    if missing := sorted(set(prediction.values) - set(measurement.values)):
        raise InputError(f"predicted but not measured: {', '.join(missing)}")
    rows: list[Row] = []
    for name, theory in prediction.values.items():
        seen = measurement.values[name]
        standing = worst((theory.status, seen.status))
        if standing != "ok":
            rows.append(Row(name, math.nan, math.nan, math.nan, math.nan, standing))
            continue
        expected = torch.as_tensor(theory.value, dtype=torch.float64)
        found = torch.as_tensor(seen.value, dtype=torch.float64)
        if expected.shape != found.shape:
            raise InputError(f"{name}: predicted with shape {tuple(expected.shape)}, measured with {tuple(found.shape)}")
        least = absolute.get(name, 0.0) if isinstance(absolute, Mapping) else absolute
        spread = torch.as_tensor(0.0 if seen.stderr is None else seen.stderr, dtype=torch.float64).expand(found.shape)
        for k, (a, b, s) in enumerate(
            zip(expected.reshape(-1).tolist(), found.reshape(-1).tolist(), spread.reshape(-1).tolist(), strict=True)
        ):
            tolerance = errors * s + least + relative * abs(a)
            status: Status = "ok" if abs(a - b) <= tolerance else "violated"
            rows.append(Row(name if expected.ndim == 0 else f"{name}[{k}]", a, b, s, tolerance, status))
    return Comparison(tuple(rows), prediction, measurement)


class Model(ABC):
    """Base of the solvable models; a subclass is a frozen dataclass of the numbers that define it."""

    slug: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {}  # kind -> observable -> absolute error of a run that samples nothing

    def loss(self, theta: Any) -> torch.Tensor:
        """Exact mean loss at ``theta``, differentiable: (..., d) gives (...), a dict of tensors gives a scalar."""
        raise NotSolvable(f"{type(self).__name__} has no loss of its own")

    def data(self, count: int, seed: int) -> Mapping[str, torch.Tensor]:
        """``count`` samples of the data the model learns from."""
        raise NotSolvable(f"{type(self).__name__} has no data of its own")

    @abstractmethod
    def _predict(self, kind: str) -> Prediction:
        """The closed form."""

    @abstractmethod
    def _simulate(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """The run."""

    def _control(self, kind: str) -> Prediction:
        """What a wrong theory, or the theory without its mechanism, would say."""
        raise NotSolvable(f"{type(self).__name__} has no negative control for {kind!r}")

    def predict(self, kind: str) -> Prediction:
        """The numbers of theory.

        Raises:
            NotSolvable: the model has no closed form of this kind; the message lists those it has.
        """
        return self._predict(self._known(kind))

    def simulate(self, kind: str, seed: int = 0, budget: float = 1.0) -> Measurement:
        """The same numbers from a run; ``budget`` scales its size (1: a second or two on one core)."""
        if not budget > 0 or not math.isfinite(budget):
            raise InputError(f"budget must be positive, got {budget}")
        began = time.perf_counter()
        values = self._simulate(self._known(kind), seed, budget)
        config = {"model": type(self).__name__, "budget": budget, **{k: plain(v) for k, v in vars(self).items()}}
        return Measurement(kind, values, seed, config, time.perf_counter() - began)

    def compare(
        self,
        kind: str,
        seed: int = 0,
        budget: float = 1.0,
        *,
        relative: float = 0.0,
        absolute: float | Mapping[str, float] | None = None,
    ) -> Comparison:
        """Theory beside a run; see `beside` for the tolerance, which is the model's own where none is given."""
        least = self.tolerance.get(kind, 0.0) if absolute is None else absolute
        return beside(self.predict(kind), self.simulate(kind, seed, budget), relative, least)

    def control(self, kind: str, seed: int = 0, budget: float = 1.0) -> Comparison:
        """A run beside what it must not agree with, at the same tolerance."""
        return beside(self._control(self._known(kind)), self.simulate(kind, seed, budget), 0.0, self.tolerance.get(kind, 0.0))

    def _known(self, kind: str) -> str:
        if kind not in self.kinds:
            raise NotSolvable(f"{type(self).__name__} has no {kind!r}; it has {', '.join(self.kinds)}")
        return kind


def positive(**numbers: float) -> None:
    """Check that numbers are finite and positive.

    Raises:
        InputError: names the first that is not.
    """
    for name, value in numbers.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, got {value!r}")


def number(estimate: Estimate) -> float:
    """The value of an estimate in double precision.

    Raises:
        InputError: it did not converge, does not apply, or is not one number.
    """
    float(estimate)  # refuses what is no number to compute with
    return float(torch.as_tensor(estimate.value, dtype=torch.float64))


def absent(reason: str, refs: Sequence[str] = ()) -> Estimate:
    """An estimate that does not apply, with the reason."""
    return Estimate(None, status="not_applicable", note=reason, refs=tuple(refs))
