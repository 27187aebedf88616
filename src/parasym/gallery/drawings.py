"""The drawings the gallery shares: each turns plain lists into a plotly figure.

A figure is stored as data and the name of its drawing, so a stored result can be drawn again without running anything.
A new drawing is one function with the decorator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Drawing = Callable[[Mapping[str, Any]], Any]
_DRAWINGS: dict[str, Drawing] = {}
_COLOURS = ("#0b6e99", "#d9730d", "#4d8b31", "#ad1a72", "#6940a5", "#64473a", "#dfab01", "#7a8793")


def drawing(function: Drawing) -> Drawing:
    """Register a drawing under its name."""
    _DRAWINGS[function.__name__] = function
    return function


def drawing_named(name: str) -> Drawing:
    """The registered drawing of that name.

    Raises:
        KeyError: nothing is registered under ``name``.
    """
    if name not in _DRAWINGS:
        raise KeyError(f"no drawing is called {name!r}; there are {', '.join(sorted(_DRAWINGS))}")
    return _DRAWINGS[name]


def name_of(function: Drawing) -> str:
    """The name a drawing is registered under.

    Raises:
        ValueError: the function is not a registered drawing.
    """
    name = getattr(function, "__name__", "")
    if _DRAWINGS.get(name) is not function:
        raise ValueError(f"{function!r} is not a registered drawing; decorate a module-level function with @drawing")
    return name


@drawing
def curves(data: Mapping[str, Any]) -> Any:
    """Lines and points over one axis.

    ``data``: ``series``, a list of {name, x, y, and perhaps low, high (a band), mark ("line" | "points" | "dash")};
    ``x``, ``y`` axis titles; ``log`` a string holding the letters of the axes that are logarithmic.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, series in enumerate(data["series"]):
        colour = _COLOURS[series.get("colour", index) % len(_COLOURS)]
        if "low" in series:
            figure.add_trace(_band(series, colour))
        figure.add_trace(_trace(series, colour))
    return _framed(figure, data)


@drawing
def agreement(data: Mapping[str, Any]) -> Any:
    """Measured against predicted, with the diagonal; ``data``: ``series`` of {name, predicted, measured}, ``x``, ``y``, ``log``."""
    import plotly.graph_objects as go

    points = [value for series in data["series"] for key in ("predicted", "measured") for value in series[key]]
    ends = [min(points), max(points)]
    figure = go.Figure(go.Scatter(x=ends, y=ends, mode="lines", name="equal", line={"color": "#9aa3aa", "dash": "dot"}))
    for index, series in enumerate(data["series"]):
        marker = {"color": _COLOURS[index % len(_COLOURS)], "size": 8}
        figure.add_trace(go.Scatter(x=series["predicted"], y=series["measured"], mode="markers", name=series["name"], marker=marker))
    return _framed(figure, data)


@drawing
def bars(data: Mapping[str, Any]) -> Any:
    """Grouped bars; ``data``: ``labels``, ``series`` of {name, y}, ``x``, ``y``, ``log``."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, series in enumerate(data["series"]):
        figure.add_trace(go.Bar(x=data["labels"], y=series["y"], name=series["name"], marker={"color": _COLOURS[index % len(_COLOURS)]}))
    return _framed(figure, data)


@drawing
def heatmap(data: Mapping[str, Any]) -> Any:
    """A matrix in colours, with its values; ``data``: ``x``, ``y`` labels, ``z`` rows, ``low``, ``high`` of the colours, ``title``."""
    import plotly.graph_objects as go

    text = [[f"{value:.3f}" for value in row] for row in data["z"]]
    figure = go.Figure(
        go.Heatmap(
            x=data["x"], y=data["y"], z=data["z"], zmin=data.get("low"), zmax=data.get("high"), text=text, texttemplate="%{text}",
            colorscale="Viridis", colorbar={"title": data.get("title", "")},
        )
    )  # fmt: skip
    return _framed(figure, {})


@drawing
def phase_diagram(data: Mapping[str, Any]) -> Any:
    """A map of a measured number, with the boundary theory predicts as a line on top.

    ``data``: ``x``, ``y`` values, ``z`` and perhaps ``boundary`` as rows (one for each y), ``level`` of the boundary (or None: no
    line), ``xtitle``, ``ytitle``, ``ztitle``, ``log``. Values beyond the 2nd and 98th percentile share the end colours.
    """
    import numpy as np
    import plotly.graph_objects as go

    z = np.array([[float(value) for value in row] for row in data["z"]])
    level, finite = data.get("level"), z[np.isfinite(z)]
    low, high = (float(v) for v in np.percentile(finite, [2, 98])) if finite.size else (0.0, 1.0)
    if level is None:
        colours: dict[str, Any] = {"colorscale": "Viridis", "zmin": low, "zmax": high}
    else:
        reach = max(abs(low - level), abs(high - level), 1e-12)
        colours = {"colorscale": "RdBu", "zmid": level, "zmin": level - reach, "zmax": level + reach}
    figure = go.Figure(go.Heatmap(x=data["x"], y=data["y"], z=z, colorbar={"title": data.get("ztitle", "")}, **colours))
    if level is not None and "boundary" in data:
        bounds = np.array([[float(value) for value in row] for row in data["boundary"]])
        contours = {"start": level, "end": level, "size": 1, "coloring": "none"}
        line = {"color": "black", "width": 2.5}
        figure.add_trace(go.Contour(x=data["x"], y=data["y"], z=bounds, contours=contours, line=line, showscale=False, name="predicted"))
    framed = _framed(figure, {"x": data["xtitle"], "y": data["ytitle"], "log": data.get("log", "")})
    framed.update_layout(height=460)
    return framed


def _trace(series: Mapping[str, Any], colour: str) -> Any:
    import plotly.graph_objects as go

    mark = series.get("mark", "line")
    style: dict[str, Any] = {"mode": "markers", "marker": {"color": colour, "size": 8}}
    if mark != "points":
        style = {"mode": "lines", "line": {"color": colour, "dash": "dash" if mark == "dash" else "solid"}}
    return go.Scatter(x=series["x"], y=series["y"], name=series["name"], **style)


def _band(series: Mapping[str, Any], colour: str) -> Any:
    import plotly.graph_objects as go

    around: Sequence[float] = [*series["x"], *reversed(series["x"])]
    edge = [*series["high"], *reversed(series["low"])]
    return go.Scatter(
        x=around, y=edge, fill="toself", fillcolor=colour, opacity=0.15, line={"width": 0}, showlegend=False, hoverinfo="skip"
    )


def _framed(figure: Any, data: Mapping[str, Any]) -> Any:
    log = data.get("log", "")
    figure.update_layout(
        template="simple_white",
        height=360,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": -0.22},
        xaxis={"title": data.get("x", ""), "type": "log" if "x" in log else None},
        yaxis={"title": data.get("y", ""), "type": "log" if "y" in log else None, "exponentformat": "power"},
    )
    return figure
