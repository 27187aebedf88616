"""A watched run as one page: self-contained, without network, its numbers also as tables."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parasym.report import words
from parasym.report.page import label, render
from parasym.watch.record import Record, Segment, Series
from parasym.watch.summary import detail_of, duration, most_collapsed, pattern, share, summarise

COLOURS = ("#4269d0", "#ef5f48", "#3ca951", "#d99a06", "#9a5be8", "#2ba8a0", "#e0649b", "#9c6b4e")
SHOWN = 6
"""Lines of a figure that are drawn at first; a menu shows the others."""
POINTS = 600
"""Points a line is thinned to: the lowest and the highest of each of half as many stretches, so that no spike is lost."""

_TITLES = {
    "loss": ("Loss", "What training minimises, as it was handed to the watcher."),
    "charge": (
        "Charges",
        "Each symmetry has a charge that training changes only by discretisation, noise, weight decay and, under adaptive optimisers, a "
        "cross term. Solid: measured on the weights. Dashed: what the law's parts add up to from the start, with a band of two standard "
        "errors. Under SGD that is a prediction: the parts come from the state before each step, never from what it did to the charge. "
        "Under any other rule it is a reconstruction: what some steps were seen to do stands for the steps between. Errors are relative to "
        "the change of the charge since the start.",
    ),
    "collapse": (
        "Collapse",
        "The share of each layer's units that sit on the fixed set of a symmetry: dead, duplicate or unread. SGD leaves them there.",
    ),
    "noise": ("Gradient noise", "What the gradients of different samples and batches disagree by; bands of two standard errors."),
    "sharpness": (
        "Sharpness",
        "The largest curvature, and what share of it the optimiser's step can stand: above 1 a quadratic would be unstable.",
    ),
    "norm": ("Norms", "Lengths of weights and gradients, for the whole model and by module."),
    "rate": ("Learning rates", "As set, and, where a scale symmetry makes only the direction count, as the weights see them."),
    "cost": ("Cost of watching", "What the watcher took of the run's own time; it thins itself out to stay within its budget."),
}
_SHARES = {"collapse", "overhead"}


def write_run(record: Record, path: str | os.PathLike[str]) -> Path:
    """Write the page of a run.

    Args:
        record: an open record, of a finished run or a live one.
        path: the file to write; its folder must exist.

    Returns:
        The file written.

    Raises:
        RecordError: the record cannot be read.
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.write_text(render_run(record), encoding="utf-8")
    return path


def render_run(record: Record) -> str:
    """Return the page of a run as HTML; see `write_run`."""
    with record.snapshot():
        meta, segments, alerts, series, old = record.meta, record.segments, record.alerts(), record.all_series(), record.superseded
    found = summarise(str(record.path), meta, segments, alerts, series, old)
    marks = _marks(segments, found["alerts"])
    sections: list[dict[str, Any]] = []
    for kind, (title, lead) in _TITLES.items():
        members = [item for item in series if item.kind == kind]
        figures = _figures(kind, members, marks, found)
        if figures or kind == "charge":
            sections.append({"id": kind, "title": title, "lead": lead, "figures": figures})
    figures = [figure for section in sections for figure in section["figures"]]
    for number, figure in enumerate(figures):
        figure["id"] = f"figure-{number}"
    return render(
        "watch.html",
        scripts=("page.js", "watch.js"),
        data={"figures": [{key: figure[key] for key in ("id", "traces", "layout", "choices")} for figure in figures]},
        version=importlib.metadata.version("parasym"),
        name=str(meta.get("model", record.path.name)),
        facts=_facts(found),
        found=words.plain(found),
        tiles=_tiles(found),
        sections=sections,
        alerts=_alerts(found["alerts"]),
        meta=[(key, value if isinstance(value, str) else json.dumps(value)) for key, value in sorted(meta.items())],
        cost=[_cost_row(item) for item in found["cost"]["parts"]],
        share=share,
        when=_when,
    )


# -- words -----------------------------------------------------------------------------------------------------------------------------


def _when(moment: float | None) -> str:
    return "–" if moment is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def _facts(found: Mapping[str, Any]) -> list[str]:
    meta, first = found["meta"], found["segments"][0]
    state = {"running": "still running", "killed": "its process is gone", "finished": "finished"}.get(
        found["state"], f"ended: {found['state']}"
    )
    groups = meta.get("groups") if isinstance(meta.get("groups"), list) else []
    given = [group.get("lr") for group in groups or () if isinstance(group, dict)]
    rates = sorted({float(rate) for rate in given if isinstance(rate, int | float)})
    seen = [item for item in found["rate"] if item["name"] == "learning rate" and item["high"] is not None]
    if seen:  # a schedule that warms up starts from zero
        rates = sorted({rate for item in seen for rate in (item["low"], item["high"])})
    scheduled = any(item["low"] != item["high"] for item in seen)
    facts: list[str] = [
        f"{meta['parameters']:,} parameters" if isinstance(meta.get("parameters"), int) else "",
        str(meta.get("optimizer", "")) + (f", learning rate {_rates(rates, scheduled)}" if rates else ""),
        f"{meta['ranks']} ranks" if isinstance(meta.get("ranks"), int) and meta["ranks"] > 1 else "",
        f"steps {found['first_step']:,} to {found['last_step']:,}, {found['observations']:,} of them observed"
        if found["last_step"] is not None
        else "nothing recorded yet",
        f"{duration(found['seconds'])} from {_when(first['started'])}",
        state,
    ]
    return [fact for fact in facts if fact]


def _rates(rates: Sequence[float], scheduled: bool) -> str:
    return f"{min(rates):g} to {max(rates):g}" if scheduled else ", ".join(f"{rate:g}" for rate in rates[:3])


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    judged = [item for item in found["charges"] if item["follows"] is not None]
    kept = sum(item["follows"] and not item["violated"] for item in judged)
    loss = next((item for item in found["loss"] if item["name"] == "loss"), next(iter(found["loss"]), None))
    collapsed = most_collapsed(found)
    worst = collapsed["last"] if collapsed else 0.0
    limit = next((item for item in found["sharpness"] if item["name"].endswith("limit") and item["last"] is not None), None)
    overhead, budget = found["cost"]["overhead"], found["cost"]["budget"]
    serious = sum(item["severity"] != "info" for item in found["alerts"])
    tiles = [
        {
            "title": loss["name"] if loss else "loss",
            "value": words.number(loss["last"], 4) if loss else "–",
            "note": f"from {words.number(loss['first'], 4)}" if loss else "none was handed over: watch.log(loss=loss)",
            "tone": "bad" if loss and loss["last"] is None else "",
        },
        {
            "title": f"charges as {'predicted' if all(item['status'] == 'ok' for item in judged) else 'reconstructed'}",
            "value": f"{kept} of {len(judged)}" if judged else "–",
            "note": f"median error {share(float(np.median([item['error'] for item in judged])))} of their change"
            if judged
            else "none is predicted",
            "tone": "" if not judged else "good" if kept == len(judged) else "warn",
        },
        {
            "title": "collapsed",
            "value": share(worst) if found["collapse"] else "–",
            "note": f"{collapsed['name']}, {collapsed['where']}"
            if collapsed and worst
            else "no unit"
            if found["collapse"]
            else "not measured",
            "tone": "" if not found["collapse"] else "bad" if worst >= 0.25 else "warn" if worst >= 0.05 else "good",
        },
        {
            "title": "sharpness",
            "value": words.number(limit["last"], 2) if limit else "–",
            "note": "of what the step can stand" if limit else "not measured",
            "tone": "" if not limit else "warn" if limit["last"] > 1 else "good",
        },
        {
            "title": "overhead",
            "value": share(overhead),
            "note": f"of the run's time; budget {share(budget)}" if budget is not None else "of the run's time; no budget",
            "tone": "" if overhead is None or budget is None else "good" if overhead <= budget else "warn",
        },
        {
            "title": "alerts",
            "value": str(serious),
            "note": f"and {len(found['alerts']) - serious} for information",
            "tone": "bad" if any(item["severity"] == "high" for item in found["alerts"]) else "warn" if serious else "good",
        },
    ]
    return tiles


def _alerts(alerts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Serious ones first, then by step; ones that repeat with other numbers are told once, with how often."""
    told: dict[tuple[str, str, str], dict[str, Any]] = {}
    for item in alerts:
        key = (item["severity"], item["where"], pattern(item["message"]))
        if key in told:
            told[key].update(item, times=told[key]["times"] + 1, since=told[key]["since"])
        else:
            told[key] = {**item, "times": 1, "since": item["step"]}
    order = ("high", "warn", "info")
    tone = {"high": "high", "warn": "medium", "info": "info"}
    return [
        {**item, "tone": tone[item["severity"]]} for item in sorted(told.values(), key=lambda a: (order.index(a["severity"]), -a["step"]))
    ]


def _cost_row(item: Mapping[str, Any]) -> list[str]:
    say = share if item["name"] in _SHARES else words.number
    return [item["name"], *(say(item[key]) for key in ("first", "last", "low", "high")), item["note"]]


# -- figures ---------------------------------------------------------------------------------------------------------------------------


def _figures(kind: str, members: Sequence[Series], marks: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One figure for each quantity, its places drawn over each other; the charges' errors together in one more."""
    if kind == "charge":
        main = [item for item in members if detail_of(item, members) is None]
        errors = [item for item in members if detail_of(item, members) == "prediction error"]
        groups = sorted(_groups(main), key=lambda pair: -max(_moved(item) for item in pair[1]))
        figures = [_lines(kind, name, group, marks, predicted=True) for name, group in groups]
        if errors:
            figures.append(
                _lines(kind, "prediction error of all, relative to their change", errors, marks, log=True, strip=": prediction error")
            )
        return figures
    if kind == "cost":
        members = [item for item in members if not item.name.startswith("seconds of")]
    figures = []
    for name, group in _groups(members):
        bounds = [found["cost"]["budget"]] if name == "overhead" else [1.0] if name.endswith("stability limit") else []
        shown = marks if kind in ("loss", "collapse") else {**marks, "alerts": []}
        figures.append(_lines(kind, name, group, shown, bounds=[bound for bound in bounds if bound is not None]))
    return figures


def _groups(members: Iterable[Series]) -> list[tuple[str, list[Series]]]:
    """Series that share a name but for its numbers."""
    groups: dict[str, list[Series]] = {}
    for item in members:
        groups.setdefault(pattern(item.name), []).append(item)
    return [(group[0].name if len({item.name for item in group}) == 1 else name, group) for name, group in groups.items()]


def _lines(
    kind: str,
    title: str,
    group: Sequence[Series],
    marks: Mapping[str, Any],
    *,
    predicted: bool = False,
    log: bool = False,
    strip: str = "",
    bounds: Sequence[float] = (),
) -> dict[str, Any]:
    """Lines over the steps, one for each series: a band, the prediction and the measurement; and the same as a table."""
    names = [_name(item, title, strip) for item in group]
    order = sorted(range(len(group)), key=lambda index: (group[index].where != "", -_interest(group[index])))
    first, colour_of = set(order[:SHOWN]), {index: COLOURS[rank % len(COLOURS)] for rank, index in enumerate(order)}
    short = _short(names)
    as_share = kind in _SHARES or title in _SHARES
    values = np.concatenate([item.value[np.isfinite(item.value)] for item in group])
    log = bool(log or (len(values) and not predicted and not as_share and values.min() > 0 and values.max() > 30 * values.min()))
    traces: list[dict[str, Any]] = []
    choices: list[list[int]] = []
    for index, (item, name) in enumerate(zip(group, short, strict=True)):
        colour = colour_of[index]
        drawn = [*_band(item, colour, name, predicted, log), *_curves(item, colour, name, predicted, log)]
        choices.append(list(range(len(traces), len(traces) + len(drawn))))
        for trace in drawn:
            if index not in first:
                trace["visible"] = False
            traces.append(trace)
    shapes, annotations = _marked(marks, [item.step[-1] for item in group if len(item.step)])
    for bound in bounds:
        shapes.append(
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "yref": "y",
                "y0": bound,
                "y1": bound,
                "line": {"dash": "dash", "width": 1.5},
            }
        )
    axis: dict[str, Any] = {"exponentformat": "power", "rangemode": "tozero" if as_share else "normal"}
    if as_share:
        axis["tickformat"] = ".3~p"
    if log:
        axis.update(type="log", **({"dtick": 1} if values.max() > 300 * max(values.min(), 1e-300) else {}))
    layout = {
        "height": 270 + 20 * min(len(group), SHOWN) // (1 if max(map(len, short)) > 26 else 2) * (len(group) > 1),
        "showlegend": len(group) > 1,
        "xaxis": {"title": {"text": "step"}, "tickformat": ",d"},
        "yaxis": axis,
        "hovermode": "closest",
        "shapes": shapes,
        "annotations": annotations,
    }
    head = ["series", "where", "first", "last", *(["predicted"] if predicted else []), "lowest", "highest", "points", "note"]
    rows = [_row(item, predicted, as_share) for item in group]
    return {
        "title": title, "traces": traces, "layout": layout, "choices": choices if len(group) > SHOWN else [],
        "names": names, "shown": len(first), "head": head, "rows": rows, "of": len(group),
    }  # fmt: skip


def _name(item: Series, title: str, strip: str) -> str:
    name = item.name.removesuffix(strip)
    if name == title or not name:
        return item.where or "whole model"
    return f"{name} · {item.where}" if item.where else name


def _short(names: Sequence[str]) -> list[str]:
    """Names without the modules they all lie in."""
    parts = [name.split(".") for name in names if name != "whole model"]
    columns = zip(*(part[:-1] for part in parts), strict=False) if len(parts) > 1 else ()
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    if any(part[shared].isdigit() for part in parts):
        shared = max(0, shared - 1)  # "h.0", not "0"
    return [name if name == "whole model" else ".".join(name.split(".")[shared:]) for name in names]


def _moved(item: Series) -> float:
    finite = item.value[np.isfinite(item.value)]
    return float(finite.max() - finite.min()) if len(finite) else 0.0


def _interest(item: Series) -> float:
    """How much a line moved, relative to its size."""
    finite = item.value[np.isfinite(item.value)]
    if not len(finite):
        return 0.0
    size = float(np.abs(finite).max())
    return _moved(item) / size if size > 0 else 0.0


def _thin(item: Series) -> np.ndarray:
    """Indices to draw."""
    count = len(item.step)
    if count <= POINTS:
        return np.arange(count)
    filled = np.where(np.isfinite(item.value), item.value, np.inf)
    kept = {0, count - 1}
    for part in np.array_split(np.arange(count), POINTS // 2):
        kept |= {int(part[filled[part].argmin()]), int(part[np.where(np.isfinite(item.value[part]), item.value[part], -np.inf).argmax()])}
        kept |= set(map(int, part[~np.isfinite(item.value[part])][:1]))  # a gap stays one
    return np.array(sorted(kept))


def _plain(values: np.ndarray, log: bool) -> list[float | None]:
    """Numbers JSON can hold and the axis can show; six digits are more than a screen has."""
    return [float(f"{x:.6g}") if np.isfinite(x) and not (log and x <= 0) else None for x in values.tolist()]


def _curves(item: Series, colour: str, name: str, predicted: bool, log: bool) -> list[dict[str, Any]]:
    at = _thin(item)
    steps = item.step[at].tolist()
    there = np.isfinite(np.concatenate([[np.nan], item.value[at], [np.nan]]))
    alone = bool((there[1:-1] & ~there[:-2] & ~there[2:]).any())  # a line does not show a point between two gaps
    mode = "lines+markers" if alone or len(at) <= 40 else "lines"
    common = {"type": "scatter", "x": steps, "mode": mode, "marker": {"size": 5}, "legendgroup": label(name)}
    curves = []
    if predicted and np.isfinite(item.predicted).any():
        curves.append(
            {
                **common, "y": _plain(item.predicted[at], log), "name": label(name), "showlegend": False, "mode": "lines",
                "line": {"color": colour, "width": 3.5, "dash": "dash"}, "opacity": 0.55,
                "hovertemplate": f"{label(name)}<br>step %{{x:,}}: predicted %{{y:.4g}}<extra></extra>",
            }
        )  # fmt: skip
    curves.append(
        {
            **common, "y": _plain(item.value[at], log), "name": label(name), "line": {"color": colour, "width": 1.8},
            "hovertemplate": f"{label(name)}<br>step %{{x:,}}: %{{y:.4g}}<extra></extra>",
        }
    )  # fmt: skip
    return curves


def _band(item: Series, colour: str, name: str, predicted: bool, log: bool) -> list[dict[str, Any]]:
    """Two standard errors about the prediction, or about the measurement where nothing is predicted."""
    middle = item.predicted if predicted and np.isfinite(item.predicted).any() else item.value
    at = _thin(item)
    good = np.isfinite(middle[at]) & np.isfinite(item.stderr[at])
    x: list[int | None] = []
    y: list[float | None] = []
    for run in np.split(at, np.flatnonzero(np.diff(good.astype(int))) + 1):
        if len(run) < 2 or not (np.isfinite(middle[run[0]]) and np.isfinite(item.stderr[run[0]])):
            continue
        low, high = middle[run] - 2 * item.stderr[run], middle[run] + 2 * item.stderr[run]
        if log:
            low = np.maximum(low, np.abs(middle[run]) * 1e-2)
        steps = item.step[run].tolist()
        x += [*steps, *steps[::-1], None]
        y += [*_plain(np.concatenate([high, low[::-1]]), log), None]
    if not x or not (item.stderr[at][good] > 0).any():
        return []
    return [
        {
            "type": "scatter", "x": x, "y": y, "fill": "toself",
            "fillcolor": colour, "opacity": 0.16, "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip", "showlegend": False,
            "name": label(name), "legendgroup": label(name),
        }
    ]  # fmt: skip


def _row(item: Series, predicted: bool, as_share: bool) -> list[str]:
    finite = item.value[np.isfinite(item.value)]

    def say(values: np.ndarray) -> str:
        if not len(values):
            return "–"
        value = float(values[-1])
        return (
            "not a number" if np.isnan(value) else str(value) if np.isinf(value) else share(value) if as_share else words.number(value, 4)
        )

    return [
        item.name,
        item.where or "whole model",
        say(item.value[:1]),
        say(item.value),
        *([say(item.predicted[np.isfinite(item.predicted)])] if predicted else []),
        say(np.sort(finite)[:1]),
        say(np.sort(finite)),
        f"{len(item.step):,}" + (f" ({len(item.step) - len(finite)} without a value)" if len(finite) < len(item.step) else ""),
        next((note for note in reversed(item.note) if note), ""),
    ]


def _marks(segments: Sequence[Segment], alerts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the run was resumed, and where something serious happened."""
    serious = [item for item in alerts if item["severity"] != "info"]
    resumed = [s.first for s in segments[1:] if s.first is not None and (s.until is None or s.first < s.until)]
    return {"resumed": resumed, "alerts": serious[-24:]}


def _marked(marks: Mapping[str, Any], ends: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    shapes: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for step in marks["resumed"]:
        shapes.append(
            {
                "type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1,
                "line": {"dash": "dot", "width": 1, "color": "--soft"},
            }
        )  # fmt: skip
        annotations.append(
            {
                "xref": "x", "yref": "paper", "x": step, "y": 0, "text": "resumed", "showarrow": False, "xanchor": "left",
                "yanchor": "bottom", "font": {"size": 11, "color": "--soft"},
            }
        )  # fmt: skip
    for item in marks["alerts"]:
        annotations.append(
            {
                "xref": "x", "yref": "paper", "x": item["step"], "y": 0, "text": "▲", "showarrow": False, "yanchor": "bottom",
                "hovertext": label(item["message"]), "font": {"color": "--bad" if item["severity"] == "high" else "--warn", "size": 13},
            }
        )  # fmt: skip
    return shapes, annotations
