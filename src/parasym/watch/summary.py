"""What a record says, in plain data and in words: shared by the page, the terminal and ``--json``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from parasym.core.errors import RecordError
from parasym.report import words
from parasym.watch.record import Record, Segment, Series

WITHIN = 0.1
"""A charge counts as following its prediction when the error is at most this share of how much it moved ..."""
STANDARD_ERRORS = 3.0
"""... or at most this many standard errors of the prediction."""
NOT_LOST = frozenset({"unused", "always-on", "linearised", "imbalance"})
"""Kinds of collapse that cost no unit: rows of a vocabulary that the data does not pick, units that have become linear."""
ROUND_OFF = 1e-6
"""A charge that moved by less than this share of its size did not move: single precision sees no more."""


def summary(record: Record) -> dict[str, Any]:
    """Everything a reader of a run wants to know first.

    Args:
        record: an open record, of a finished run or a live one.

    Returns:
        Plain data: ``state``, ``verdict``, ``charges``, one list for each other kind of row, ``alerts``, ``cost``, ``segments``.

    Raises:
        RecordError: the record cannot be read.
    """
    with record.snapshot():
        meta, segments, alerts, series, old = record.meta, record.segments, record.alerts(), record.all_series(), record.superseded
    return summarise(str(record.path), meta, segments, alerts, series, old)


def summarise(
    path: str, meta: Mapping[str, Any], segments: Sequence[Segment], alerts: Sequence[Any], series: Sequence[Series], superseded: int = 0
) -> dict[str, Any]:
    """`summary` of what was read already."""
    by_kind: dict[str, list[Series]] = {}
    for item in series:
        by_kind.setdefault(item.kind, []).append(item)
    steps = np.unique(np.concatenate([item.step for item in series])) if series else np.array([], dtype=int)
    times = [float(item.time.max()) for item in series]
    found: dict[str, Any] = {
        "path": path,
        "meta": dict(meta),
        "state": state(segments),
        "segments": [
            {"id": s.id, "first": s.first, "until": s.until, "started": s.started, "ended": s.ended, "outcome": s.outcome} for s in segments
        ],
        "superseded": superseded,
        "first_step": int(steps[0]) if len(steps) else None,
        "last_step": int(steps[-1]) if len(steps) else None,
        "observations": len(steps),
        "seconds": max([*times, *(s.ended or 0.0 for s in segments)]) - segments[0].started if times else 0.0,
        "charges": charges(by_kind.get("charge", [])),
        "alerts": [
            {"step": a.step, "severity": a.severity, "where": a.where, "message": a.message, "remedy": a.remedy, "kind": a.kind}
            for a in alerts
        ],
        "cost": _cost(by_kind.get("cost", []), meta),
    }
    for kind in ("loss", "collapse", "noise", "sharpness", "norm", "rate"):
        found[kind] = [_line(item) for item in by_kind.get(kind, [])]
    found["verdict"] = verdict(found)
    return found


def state(segments: Sequence[Segment]) -> str:
    """ "running", "killed" (its process is gone), or what ended the run."""
    if not segments:
        raise RecordError("The record is damaged: it has no segment, which every run writes first. Restore it from a copy.")
    last = segments[-1]
    return last.outcome or "ended" if last.ended is not None else "killed" if last.killed else "running"


def charges(series: Iterable[Series]) -> list[dict[str, Any]]:
    """Each charge: what it did, what was predicted, and whether the two agree; the largest errors first.

    The error is the difference of measured and predicted at the last step that has both, relative to the largest change of the charge
    since it was first measured (or, where it did not move, to its size). "follows" allows `WITHIN` of that, or `STANDARD_ERRORS`; or
    whatever accumulates where every single step was observed and obeyed the law to round-off. Rows called "CHARGE: DETAIL" at the
    same place belong to that charge; a detail "prediction error" is the error of all its numbers together, and counts where it is there.
    Where no law was used and no step went unobserved, nothing was predicted that was not measured: "follows" is None.
    """
    known = list(series)
    main = [item for item in known if detail_of(item, known) is None]
    out = [
        _charge(item, [other for other in known if other.where == item.where and other.name.startswith(f"{item.name}: ")]) for item in main
    ]
    return sorted(out, key=lambda item: -(item["error"] if item["error"] is not None else -1.0))


def detail_of(item: Series, known: Iterable[Series]) -> str | None:
    """The part after the colon, when the rest is a charge at the same place."""
    head, colon, tail = item.name.rpartition(": ")
    return tail if colon and any(other.name == head and other.where == item.where for other in known) else None


def _charge(item: Series, details: Sequence[Series]) -> dict[str, Any]:
    both = np.flatnonzero(np.isfinite(item.value) & np.isfinite(item.predicted))
    finite = item.value[np.isfinite(item.value)]
    moved = float(np.abs(finite - finite[0]).max()) if len(finite) else math.nan
    size = float(np.abs(finite).max()) if len(finite) else math.nan
    still = moved <= ROUND_OFF * size
    error = spread = None
    if len(both):
        last = both[-1]
        gap = abs(float(item.value[last] - item.predicted[last]))
        error = gap / (size if still else moved) if (size if still else moved) > 0 else gap
        spread = gap / float(item.stderr[last]) if item.stderr[last] > 0 else None
    for other in details:
        if other.name.endswith(": prediction error") and np.isfinite(other.value).any() and not still:
            error = float(other.value[np.isfinite(other.value)][-1])
    violated = any("violated" in other.status for other in (item, *details))
    steps = [other for other in details if other.name.endswith(": residual of the step")]
    exact = spread is None and bool(steps) and not violated  # every step was looked at and did what the law says: the rest is round-off
    judged = error is not None and ("ok" in item.status or bool((item.stderr > 0).any()))  # else what is predicted is what was measured
    follows = None if error is None or not judged else exact or error <= WITHIN or (spread is not None and spread <= STANDARD_ERRORS)
    return {
        "name": item.name,
        "where": item.where,
        "points": len(item.step),
        "first": _last(item.value[:1]),
        "last": _last(item.value),
        "predicted": _last(item.predicted),
        "stderr": _last(item.stderr),
        "moved": moved,
        "still": still,
        "error": error,
        "standard_errors": spread,
        "follows": follows,
        "violated": violated,
        "status": item.status[-1],
        "note": next((note for note in reversed(item.note) if note), ""),
    }


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) and not np.isnan(values[-1]) else None


def _line(item: Series) -> dict[str, Any]:
    finite = item.value[np.isfinite(item.value)]
    return {
        "name": item.name,
        "where": item.where,
        "points": len(item.step),
        "first": _last(item.value[:1]),
        "last": _last(item.value),
        "predicted": _last(item.predicted),
        "stderr": _last(item.stderr),
        "low": float(finite.min()) if len(finite) else None,
        "high": float(finite.max()) if len(finite) else None,
        "lost": int((~np.isfinite(item.value)).sum()),
        "status": item.status[-1],
        "note": next((note for note in reversed(item.note) if note), ""),
    }


def _cost(series: Sequence[Series], meta: Mapping[str, Any]) -> dict[str, Any]:
    by_name = {item.name: item for item in series}
    overhead, cadence = by_name.get("overhead"), by_name.get("steps between observations")
    return {
        "overhead": _last(overhead.value) if overhead else None,
        "budget": meta.get("budget") if isinstance(meta.get("budget"), (int, float)) else None,
        "cadence": _last(cadence.value) if cadence else None,
        "note": overhead.note[-1] if overhead else "",
        "parts": [_line(item) for item in series],
    }


def most_collapsed(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The layer with the largest share of lost units at the end; None where none is lost."""
    lost = [item for item in found["collapse"] if item["where"] and item["name"] not in NOT_LOST and (item["last"] or 0.0) > 0]
    return max(lost, key=lambda item: item["last"], default=None)


# -- in words --------------------------------------------------------------------------------------------------------------------------


def verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the run needs a person, and why, in one sentence."""
    worries, facts = [], []
    judged = [item for item in found["charges"] if item["follows"] is not None]
    broken = [item for item in found["charges"] if item["violated"]]
    off = [item for item in judged if not item["follows"]]
    high = [item for item in found["alerts"] if item["severity"] == "high"]
    ended = [item for item in found["alerts"] if item["kind"] == "failed"]
    lost = sum(item["lost"] for item in found["loss"])
    if high:
        worries.append(
            f"{high[-1]['message']}" + (f" (and {len(high) - 1} more {_plural(len(high) - 1, 'alert')})" if len(high) > 1 else "")
        )
    if ended:
        worries.append(f"watching ended at step {words.number(ended[-1]['step'])}: {ended[-1]['message']}")
    if lost and not any(item["kind"] == "nan" for item in high):
        worries.append(f"the loss was not finite at {lost} observed {_plural(lost, 'step')}")
    if broken:
        worries.append(f"{len(broken)} of {len(found['charges'])} charges broke their law")
    elif off:
        worries.append(f"{len(off)} of {len(judged)} charges left their prediction")
    if found["state"] == "killed":
        worries.append(f"its process is gone; the record is whole up to step {words.number(found['last_step'])}")
    elif found["state"] not in ("running", "finished"):
        worries.append(f"the run ended with {found['state']}")
    if judged and not off and not broken:
        typical = share(float(np.median([item["error"] for item in judged])))
        facts.append(f"{len(judged)} of {len(found['charges'])} charges follow their predictions (median error {typical})")
    if found["collapse"]:
        worst = most_collapsed(found)
        facts.append(f"most collapsed: {worst['where']}, {share(worst['last'])} {worst['name']}" if worst else "no unit is collapsed")
    overhead, budget = found["cost"]["overhead"], found["cost"]["budget"]
    if overhead is not None:
        facts.append(f"watching costs {share(overhead)} of the run's time")
        if budget is not None and overhead > budget:
            worries.append(f"watching costs {share(overhead)}, more than its budget of {share(budget)}")
    if found["last_step"] is None:
        return {"good": False, "sentence": "Nothing was recorded yet." if found["state"] == "running" else "Nothing was recorded."}
    if worries:
        return {"good": False, "sentence": _sentence(worries)}
    return {"good": True, "sentence": _sentence(facts or ["nothing out of the ordinary was recorded"])}


def share(value: float | None) -> str:
    """A fraction as a percentage with two digits; tiny ones as they are."""
    if value is None or not math.isfinite(value):
        return "–"
    percent = 100 * value
    return f"{percent:,.0f} %" if abs(percent) >= 100 or not value else f"{percent:.2g} %" if abs(percent) >= 0.01 else f"{percent:.0e} %"


def duration(seconds: float) -> str:
    """Seconds in words of at most two units."""
    seconds = max(0, round(seconds))
    for size, unit, below in ((86400, "d", 3600), (3600, "h", 60), (60, "min", 1)):
        if seconds >= size:
            rest = seconds % size // below
            return f"{seconds // size} {unit}" + (f" {rest} {'h' if below == 3600 else 'min' if below == 60 else 's'}" if rest else "")
    return f"{seconds} s"


def pattern(name: str) -> str:
    """A name with its numbers blotted out: what repeats over layers and heads shares one."""
    return re.sub(r"\d+", "#", name)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
