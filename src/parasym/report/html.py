"""One audit as one page: self-contained, without network, readable without scripts as tables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parasym.report import words
from parasym.report.page import label, render

FLOOR = 1e-17
"""Residuals below this are drawn here: on a logarithmic axis zero has no place."""

KIND_COLOURS = {
    "pure": "#4269d0",
    "translation": "#d99a06",
    "diagonal": "#3ca951",
    "linear": "#ef5f48",
    "affine": "#9a5be8",
    "discrete": "#2ba8a0",
    "point": "#e0649b",
    "blind": "#9c6b4e",
}
COLLAPSE_COLOURS = {
    "dead": "#d1495b",
    "duplicate": "#d99a06",
    "always-on": "#3ca951",
    "linearised": "#2ba8a0",
    "rank": "#9a5be8",
    "imbalance": "#4269d0",
    "head": "#ef5f48",
    "norm-dead": "#9c6b4e",
}


def write_audit(audit: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the page of an audit.

    The page holds everything it needs, runs no script but its own (a content security policy names their hashes) and opens without network.

    Args:
        audit: an audit's ``to_dict()``.
        path: the file to write; its folder must exist.

    Returns:
        The file written.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.write_text(render_audit(audit), encoding="utf-8")
    return path


def render_audit(audit: Mapping[str, Any]) -> str:
    """Return the page of an audit as HTML; see `write_audit`."""
    audit = words.plain(audit)
    symmetries = [
        {**item, "meaning": words.meaning(item), "bare": words.bare_name(item), "colour": KIND_COLOURS.get(item["kind"], "#888")}
        for item in audit.get("symmetries") or []
    ]
    folds = words.fold(symmetries)
    good, sentence = words.verdict(audit)
    graph = _graph(audit)
    figures = [figure for figure in (_completeness(audit), _collapse(audit), _certificates(symmetries)) if figure]
    return render(
        "audit.html",
        scripts=("page.js", "audit.js"),
        data={"figures": [{key: figure[key] for key in ("id", "traces", "layout")} for figure in figures], "graph": graph},
        audit=audit,
        model=audit["model"],
        good=good,
        verdict=sentence,
        tiles=_tiles(audit, symmetries),
        symmetries=symmetries,
        folds=folds if len(folds) < len(symmetries) else [],
        colours=KIND_COLOURS,
        complete=audit.get("completeness") or {},
        classified=_shares(audit.get("classified") or {}),
        figures={figure["id"]: figure for figure in figures},
        graph=graph,
    )


def _tiles(audit: Mapping[str, Any], symmetries: list[dict[str, Any]]) -> list[dict[str, str]]:
    complete = audit.get("completeness") or {}
    certified = sum(item["certified"] for item in symmetries)
    collapsed = words.collapsed_units(audit)
    lost = sum(item.get("parameters_lost") or 0 for item in audit.get("collapse") or [])
    explained, nullity = complete.get("explained"), complete.get("nullity")
    return [
        {
            "title": "explained",
            "value": words.percent(explained),
            "note": "of the free directions have a name" if explained is not None else "free directions were not counted",
            "tone": "" if explained is None else "good" if explained >= 1 else "warn",
        },
        {
            "title": "free directions",
            "value": words.number(nullity),
            "tone": "",
            "note": f"of {words.number(complete.get('parameters') or audit['model']['parameters'])} parameters"
            + ("" if complete.get("exact") or nullity is None else ", an estimate"),
        },
        {
            "title": "certified",
            "value": f"{certified} of {len(symmetries)}",
            "note": "symmetries, by moving the real weights",
            "tone": "good" if certified == len(symmetries) else "warn",
        },
        {
            "title": "collapsed units",
            "value": words.number(collapsed),
            "note": f"{lost:,} parameters with them" if lost else "nothing is lost",
            "tone": "bad" if collapsed else "good",
        },
        {
            "title": "undecided",
            "value": words.number(len(audit.get("undecided") or [])),
            "note": f"{len(audit.get('refuted') or [])} refuted, {len(audit.get('approximate') or [])} approximate",
            "tone": "warn" if audit.get("undecided") else "good",
        },
    ]


def _shares(classified: Mapping[str, int]) -> list[dict[str, Any]]:
    total = sum(classified.values())
    return [{"kind": kind, "count": count, "share": 100 * count / total} for kind, count in classified.items()] if total else []


def _completeness(audit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bars: dimensions named, by kind, above the number counted."""
    totals = {kind: sum(item["dim"] for item in audit.get("symmetries") or [] if item["kind"] == kind) for kind in KIND_COLOURS}
    totals = {kind: total for kind, total in totals.items() if total}
    nullity = (audit.get("completeness") or {}).get("nullity")
    if not totals and nullity is None:
        return None
    undecided = sum(item.get("dim") or 0 for item in audit.get("undecided") or [])
    traces: list[dict[str, Any]] = [
        _bar(kind, ["named"], [total], KIND_COLOURS[kind], "%{x:,} dimensions") for kind, total in totals.items()
    ]
    rows = [[kind, words.MEANING[kind], f"{total:,}"] for kind, total in totals.items()]
    if undecided:
        traces.append(_bar("undecided", ["named"], [undecided], "#9a9a9a", "%{x:,} dimensions"))
        rows.append(["undecided", "could not be decided", f"{undecided:,}"])
    if nullity is not None:
        traces.append(_bar("counted by rank", ["counted"], [nullity], "#8a93a6", "%{x:,} dimensions"))
        rows.append(["counted", "nullity of the Jacobian", f"{nullity:,}"])
    layout = {
        "barmode": "stack",
        "height": 230,
        "xaxis": {"title": {"text": "dimensions"}, "tickformat": ",d"},
        "yaxis": {"autorange": "reversed"},
        "showlegend": True,
    }
    return {"id": "completeness", "traces": traces, "layout": layout, "head": ["kind", "what", "dimensions"], "rows": rows}


def _collapse(audit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bars: the share of each layer's units that collapsed, by kind."""
    items = audit.get("collapse") or []
    if not items:
        return None
    places = list(dict.fromkeys(item["where"] for item in items))
    traces = []
    row_of = {place: index for index, place in enumerate(places)}
    for kind in dict.fromkeys(item["kind"] for item in items if item["kind"] != "not measured"):
        members = [item for item in items if item["kind"] == kind]
        shares = [100 * (item.get("count") or 0) / item["of"] if item.get("of") else 0 for item in members]
        texts = [f"{item.get('count')} of {item.get('of')} {label(kind)}; units {label(_units(item))}" for item in members]
        traces.append(
            _bar(
                kind,
                [row_of[item["where"]] for item in members],
                shares,
                COLLAPSE_COLOURS.get(kind, "#888"),
                "%{customdata}",
                texts,
            )
        )
    layout = {
        "barmode": "stack",
        "height": min(110 + 26 * len(places), 2400),
        "xaxis": {"title": {"text": "% of the layer's units"}, "rangemode": "tozero"},
        "showlegend": True,
        "yaxis": {
            "range": [len(places) - 0.5, -0.5],
            "tickvals": list(range(len(places))),
            "ticktext": [label(place or "(all)") for place in places],
        },
    }
    rows = [
        [
            item["where"] or "(all)",
            item["kind"],
            f"{words.number(item.get('count'))} of {words.number(item.get('of'))}",
            _units(item),
            words.number(item.get("parameters_lost")),
            "yes" if item.get("removable") else "no",
            words.number(item.get("digits")),
            item.get("note") or "",
        ]
        for item in items
    ]
    head = ["where", "kind", "units", "which", "parameters lost", "removable", "digits kept", "note"]
    return {"id": "collapse", "traces": traces, "layout": layout, "head": head, "rows": rows}


def _units(item: Mapping[str, Any], limit: int = 12) -> str:
    units = item.get("units") or []
    return (
        ", ".join(map(str, units[:limit])) + (" …" if len(units) > limit or (item.get("count") or 0) > len(units) else "") if units else "–"
    )


def _certificates(symmetries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Dots: the residual of each certificate on a logarithmic axis, one row for each kind."""
    if not symmetries:
        return None
    kinds = [kind for kind in KIND_COLOURS if any(item["kind"] == kind for item in symmetries)]
    traces = []
    for kind in kinds:
        members = [item for item in symmetries if item["kind"] == kind and item["residual"] is not None]
        spread = [kinds.index(kind) + 0.5 * (((0.618034 * index) % 1) - 0.5) * (len(members) > 1) for index in range(len(members))]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": kind,
                "x": [max(item["residual"], FLOOR) for item in members],
                "y": spread,
                "marker": {
                    "color": KIND_COLOURS[kind],
                    "size": 9,
                    "opacity": 0.75,
                    "symbol": ["circle" if item["certified"] else "x" for item in members],
                },
                "customdata": [f"{label(item['name'])}<br>residual {item['residual']:.2g}" for item in members],
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    worst = max((item["residual"] for item in symmetries if item["residual"] is not None), default=FLOOR)
    top = math.log10(max(worst, words.CERTIFIED_BELOW)) + 1
    layout = {
        "height": 130 + 42 * len(kinds),
        "showlegend": False,
        "xaxis": {
            "type": "log",
            "title": {"text": "largest relative change of the outputs"},
            "range": [math.log10(FLOOR) - 0.3, top],
            "exponentformat": "power",
            "dtick": 2,
        },
        "yaxis": {"tickvals": list(range(len(kinds))), "ticktext": kinds, "range": [len(kinds) - 0.5, -0.5], "zeroline": False},
        "shapes": [
            {
                "type": "line",
                "xref": "x",
                "yref": "paper",
                "x0": words.CERTIFIED_BELOW,
                "x1": words.CERTIFIED_BELOW,
                "y0": 0,
                "y1": 1,
                "line": {"dash": "dot", "width": 2},
            }
        ],
        "annotations": [
            {
                "xref": "x",
                "yref": "paper",
                "x": math.log10(words.CERTIFIED_BELOW),
                "y": 1,
                "text": "limit 1e-10",
                "showarrow": False,
                "xanchor": "right",
                "yanchor": "bottom",
                "xshift": -4,
            }
        ],
    }
    rows = [
        [
            item["name"],
            item["kind"],
            "not a number" if item["residual"] is None else f"{item['residual']:.2e}",
            "yes" if item["certified"] else "no",
        ]
        for item in symmetries
    ]
    return {"id": "certificates", "traces": traces, "layout": layout, "head": ["symmetry", "kind", "residual", "certified"], "rows": rows}


def _bar(name: str, y: Sequence[str | int], x: list[float], colour: str, hover: str, texts: list[str] | None = None) -> dict[str, Any]:
    name = label(name)
    bar = {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": y,
        "x": x,
        "marker": {"color": colour},
        "hovertemplate": f"{name}: {hover}<extra></extra>",
    }
    return {**bar, "customdata": texts} if texts else bar


def _graph(audit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Nodes and edges for the picture, with what the audit found at each place."""
    graph = audit.get("graph") or {}
    nodes = graph.get("nodes") or []
    if not nodes:
        return None
    known = {node["id"] for node in nodes}
    edges = [edge for edge in graph.get("edges") or [] if edge["source"] in known and edge["target"] in known]
    found = [
        {"name": words.bare_name(item), "group": item["group"], "dim": item["dim"], "where": item["where"], "kind": item["kind"]}
        for item in audit.get("symmetries") or []
    ]
    collapse = [
        {"where": item["where"], "kind": item["kind"], "count": item.get("count"), "of": item.get("of")}
        for item in audit.get("collapse") or []
    ]
    return {"nodes": nodes, "edges": edges, "symmetries": found, "collapse": collapse, "colours": KIND_COLOURS}
