"""The gallery contract: what every reproduction declares and returns.

A paper is one `Entry`; an entry is a few experiments, each a pure function from its frozen config to a `Part` (checks and
figures). `run` gathers the parts into a `Result`. A check puts a computed prediction beside a computed measurement: its
error and its verdict follow from the two, they are never given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from parasym.gallery.drawings import Drawing, drawing_named, name_of

Number = float | int | Tensor | Sequence[Any]
Relation = Literal["=", ">=", "<="]
CheckKind = Literal["match", "control", "refuted"]
_PLAIN = ("slug", "preset", "config", "seconds", "environment", "title", "paper")


@dataclass(frozen=True)
class Check:
    """One claim, with what the theory says beside what was measured.

    Attributes:
        claim: the statement in words, with its symbols.
        predicted: the value the theory gives (relation "="), or the bound that is demanded (">=", "<=").
        measured: what the run gave; several values when the claim covers several modes or seeds.
        error: for "=", the largest absolute difference (relative if ``relative``); for a bound, by how much it is missed.
        tolerance: the largest error that passes, in the unit of ``error``.
        passed: ``error <= tolerance`` with every value finite.
        kind: "match" (must hold), "control" (what must show when the mechanism is taken away) or "refuted" (a demand of the paper or
            its dossier that this run does not bear out: ``error`` says by how much, and the check passes only while it is missed).
        source: paper slug and result, for example "dcs-mirror-symmetry A1".
        relation: how measured is compared with predicted.
        relative: whether ``error`` is divided by the size of the prediction.
        spread: the value of each seed, where the run is stochastic.
    """

    claim: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    error: float
    tolerance: float
    passed: bool
    kind: CheckKind
    source: str
    relation: Relation = "="
    relative: bool = False
    spread: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; numbers that are not finite become their names."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Check:
        """Rebuild a check from `to_dict`."""
        listed = {key: tuple(float(value) for value in data[key]) for key in ("predicted", "measured", "spread")}
        return cls(**{**data, **listed, "error": float(data["error"]), "tolerance": float(data["tolerance"])})


def match(
    claim: str, predicted: Number, measured: Number, tol: Number, *, source: str, relative: bool = False, spread: Number = ()
) -> Check:
    """A claim of equality: passes when the largest difference is within ``tol``.

    Args:
        claim: the statement in words.
        predicted: one number or several.
        measured: as many numbers as ``predicted``; one prediction may stand for several measurements.
        tol: largest difference allowed, absolute, or as a fraction of the prediction if ``relative``.
        source: paper slug and result.
        relative: divide each difference by the absolute prediction.
        spread: the measurement of each seed.

    Raises:
        ValueError: the numbers of predictions and measurements differ.
    """
    theory, seen = flat(predicted), flat(measured)
    theory = theory * len(seen) if len(theory) == 1 else theory
    if len(theory) != len(seen) or not seen:
        raise ValueError(f"{claim!r}: {len(theory)} predictions for {len(seen)} measurements; give one for each")
    scales = [abs(value) if relative else 1.0 for value in theory]
    error = _worst(abs(a - b) / scale if scale else math.inf * abs(a - b) for a, b, scale in zip(seen, theory, scales, strict=True))
    return _check(claim, theory, seen, error, flat(tol)[0], "match", source, "=", relative, spread)


def holds(
    claim: str, measured: Number, *, at_least: Number | None = None, at_most: Number | None = None, source: str, spread: Number = ()
) -> Check:
    """A claim of inequality on every measured value; the bound may be computed, one for all or one for each value."""
    return _bounded(claim, measured, at_least, at_most, "match", source, spread)


def control(
    claim: str, measured: Number, *, at_least: Number | None = None, at_most: Number | None = None, source: str, spread: Number = ()
) -> Check:
    """What must show when the mechanism is taken away, as an inequality on every measured value."""
    return _bounded(claim, measured, at_least, at_most, "control", source, spread)


def refuted(claim: str, measured: Number, *, at_least: Number | None = None, at_most: Number | None = None, source: str,
            spread: Number = ()) -> Check:  # fmt: skip
    """A negative result: a demand that is not borne out. It passes only while some measured value misses the bound, so that a claim
    which comes true has to be entered as `holds`; the entry says in its docstring why the demand fails."""
    missed = _bounded(claim, measured, at_least, at_most, "refuted", source, spread)
    return replace(missed, passed=math.isfinite(missed.error) and missed.error > 0)


def flat(value: Number) -> tuple[float, ...]:
    """All numbers of a scalar, a tensor or a nested sequence, as floats."""
    if isinstance(value, Tensor):
        return tuple(float(item) for item in value.detach().reshape(-1).double().tolist())
    if isinstance(value, Sequence):
        return tuple(number for item in value for number in flat(item))
    return (float(value),)


def _bounded(claim: str, measured: Number, low: Number | None, high: Number | None, kind: CheckKind, source: str, spread: Number) -> Check:
    if low is not None and high is None:
        bounds, relation, sign = flat(low), ">=", 1.0
    elif high is not None and low is None:
        bounds, relation, sign = flat(high), "<=", -1.0
    else:
        raise ValueError(f"{claim!r}: give exactly one of at_least and at_most")
    seen = flat(measured)
    limits = bounds * len(seen) if len(bounds) == 1 else bounds
    if len(limits) != len(seen) or not seen:
        raise ValueError(f"{claim!r}: {len(limits)} bounds for {len(seen)} measurements; give one for each")
    error = _worst(max(0.0, sign * (limit - value)) if value == value else math.nan for value, limit in zip(seen, limits, strict=True))
    return _check(claim, bounds, seen, error, 0.0, kind, source, relation, False, spread)


def _worst(errors: Any) -> float:
    values = list(errors)
    return math.nan if any(value != value for value in values) else max(values)


def _check(
    claim: str,
    theory: tuple[float, ...],
    seen: tuple[float, ...],
    error: float,
    tol: float,
    kind: CheckKind,
    source: str,
    relation: Any,
    relative: bool,
    spread: Number,
) -> Check:
    sound = all(math.isfinite(value) for value in (*theory, *seen, error, tol))
    return Check(claim, theory, seen, error, tol, sound and error <= tol, kind, source, relation, relative, flat(spread))


@dataclass(frozen=True)
class Figure:
    """A figure as data: plain lists, and the drawing that turns them into a plotly figure.

    Attributes:
        name: short title, unique within its part.
        data: what the drawing needs, JSON-ready.
        draw: one of the drawings of `parasym.gallery.drawings`: data -> plotly figure.
        caption: what to look at.
    """

    name: str
    data: Mapping[str, Any]
    draw: Drawing = field(repr=False)
    caption: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; the drawing goes by its name."""
        return {"name": self.name, "caption": self.caption, "draw": name_of(self.draw), "data": to_plain(self.data)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figure:
        """Rebuild a figure from `to_dict`."""
        return cls(data["name"], data["data"], drawing_named(data["draw"]), data["caption"])


@dataclass(frozen=True)
class Part:
    """What one experiment returns, with the wall time it took in seconds."""

    checks: tuple[Check, ...]
    figures: tuple[Figure, ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "checks": [check.to_dict() for check in self.checks],
            "figures": [figure.to_dict() for figure in self.figures],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Part:
        """Rebuild a part from `to_dict`."""
        return cls(
            tuple(Check.from_dict(item) for item in data["checks"]),
            tuple(Figure.from_dict(item) for item in data["figures"]),
            float(data["seconds"]),
        )


@dataclass(frozen=True)
class Result:
    """A whole run of one entry.

    Attributes:
        slug: the paper.
        preset: name of the preset, or "custom".
        config: everything the numbers depend on, as plain values.
        seeds: every seed used, sorted.
        checks: all checks, in the order of the experiments.
        figures: all figures.
        seconds: compute time, summed over the experiments (a resumed experiment counts what it took when it ran).
        environment: versions and thread count the numbers were made with.
        title: title of the paper.
        paper: its citation.
        claims: what the entry shows, in words.
    """

    slug: str
    preset: str
    config: Mapping[str, Any]
    seeds: tuple[int, ...]
    checks: tuple[Check, ...]
    figures: tuple[Figure, ...] = ()
    seconds: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    paper: str = ""
    claims: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there are checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        plain = {key: to_plain(getattr(self, key)) for key in (*_PLAIN, "seeds", "claims")}
        checks = [check.to_dict() for check in self.checks]
        return {**plain, "passed": self.passed, "checks": checks, "figures": [figure.to_dict() for figure in self.figures]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Rebuild a result from `to_dict`."""
        rest = {key: data[key] for key in _PLAIN}
        checks = tuple(Check.from_dict(item) for item in data["checks"])
        return cls(
            **rest,
            seeds=tuple(data["seeds"]),
            claims=tuple(data["claims"]),
            checks=checks,
            figures=tuple(Figure.from_dict(item) for item in data["figures"]),
        )


Experiment = Callable[[Any], Part]


@dataclass(frozen=True)
class Entry:
    """One paper of the gallery.

    Attributes:
        slug: the paper's slug.
        title: its title.
        paper: authors, year, venue or arXiv number.
        claims: what the entry shows, in words.
        presets: name -> config, a frozen dataclass with one field for each experiment, named like it; a field that is
            ``None`` leaves its experiment out.
        experiments: field name -> pure module-level function from that field's config to a `Part`.
        sweeps: name -> what can be swept over a grid (`parasym.gallery.sweep`), the first one by default.
    """

    slug: str
    title: str
    paper: str
    claims: tuple[str, ...]
    presets: Mapping[str, Any]
    experiments: Mapping[str, Experiment]
    sweeps: Mapping[str, Any] = field(default_factory=dict)

    def config(self, preset: str) -> Any:
        """The config of a preset.

        Raises:
            KeyError: there is no such preset; the message lists those there are.
        """
        if preset not in self.presets:
            raise KeyError(f"{self.slug} has no preset {preset!r}; it has {', '.join(self.presets)}")
        return self.presets[preset]

    def run(self, config: Any) -> Result:
        """Run every experiment of ``config`` here and now; pure. `parasym.gallery.run` adds a store and parallel workers."""
        from parasym.gallery.runner import run_entry

        return run_entry(self, config)


def to_plain(value: Any) -> Any:
    """Turn dataclasses, tensors and tuples into what JSON can hold; a number that is not finite becomes its name."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Tensor):
        return to_plain(value.detach().tolist())
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value
