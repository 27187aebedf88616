"""Sweeps: one pure function of a small config over a grid of its fields, spread by joblib, resumed from a store.

A paper offers a `Sweep` (its config, its cell function, its quantities); any experiment of the gallery can be swept too
(`sweep_of`). A cell is stored by the hash of all its numbers depend on, and its random streams come from that config alone, so a
sweep that was killed, ran on another number of workers or on a cluster gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
import torch

from parasym.core.errors import InputError, MissingExtraError, ParasymError
from parasym.gallery.contract import Entry, Figure, Part, to_plain
from parasym.gallery.drawings import curves, phase_diagram
from parasym.gallery.runner import code_key, provenance
from parasym.gallery.store import Cells, digest

Cell = Callable[[Any], Mapping[str, Mapping[str, float]]]
Backend = Literal["loky", "ray", "dask"]
_CHUNK = 0.4  # seconds of work a task should hold, so that handing it out costs little
_TRIES = 5  # rounds lost to a dead worker before giving up


@dataclass(frozen=True)
class Quantity:
    """One number of a cell.

    Attributes:
        name: its key in what the cell returns.
        title: what it is, in words.
        level: where theory puts a boundary: the value of the prediction that separates two phases; ``None``: there is none.
        floor: how close to ``level`` a prediction may be for a cell not to count in the agreement (finite runs cannot decide there).
    """

    name: str
    title: str
    level: float | None = None
    floor: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """What can be swept of a paper.

    Attributes:
        title: what the cells compute.
        config: a frozen dataclass of numbers and names with the defaults; its fields are what can be swept or set.
        cell: config -> quantity -> {"measured", and where there are any "predicted", "stderr", "diverged"}; pure, module-level.
        quantities: what it returns.
        axes: fields swept when nothing is said, with their values.
    """

    title: str
    config: Any
    cell: Cell
    quantities: tuple[Quantity, ...]
    axes: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Diagram:
    """A finished sweep.

    Attributes:
        slug, title: of the paper, of the sweep.
        axes: field -> values, in the order of the grid (the last runs fastest).
        config: the fields that were not swept.
        quantities: what every cell holds.
        cells: one dict for each grid point, as the cell function returned it.
    """

    slug: str
    title: str
    axes: Mapping[str, tuple[float, ...]]
    config: Mapping[str, Any]
    quantities: tuple[Quantity, ...]
    cells: tuple[Mapping[str, Mapping[str, float]], ...]

    def values(self, quantity: str, what: str = "measured") -> np.ndarray:
        """An array with one axis for each swept field; NaN where a cell has no such number."""
        found = [float(cell[quantity].get(what, math.nan)) for cell in self.cells]
        return np.array(found, float).reshape([len(v) for v in self.axes.values()])

    def agreement(self, quantity: Quantity) -> dict[str, float] | None:
        """Share of the cells where measured and predicted lie on the same side of the boundary, of those the floor leaves in.

        ``None`` without a boundary. Also the number of cells judged, what share the larger side alone would give by chance, and how
        many of the judged cells have no measurement (``void``): they count as being on the wrong side.
        """
        if quantity.level is None:
            return None
        theory, seen = self.values(quantity.name, "predicted") - quantity.level, self.values(quantity.name) - quantity.level
        judged, void = np.isfinite(theory) & (np.abs(theory) > quantity.floor), np.isnan(seen)
        above = float((theory[judged] > 0).mean()) if judged.any() else math.nan
        same = float((((theory > 0) == (seen > 0)) & ~void)[judged].mean()) if judged.any() else math.nan
        return {"share": same, "cells": int(judged.sum()), "chance": max(above, 1 - above), "void": int((judged & void).sum())}

    @property
    def diverged(self) -> int:
        """Replicas that left the range of numbers, over all cells (what a cell reports under "diverged")."""
        return sum(int(max((q.get("diverged", 0) for q in cell.values()), default=0)) for cell in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; the same bytes whatever way the sweep was run."""
        plain = {"slug": self.slug, "title": self.title, "axes": self.axes, "config": self.config, "cells": self.cells}
        summary = {q.name: {"title": q.title, "level": q.level, "agreement": self.agreement(q)} for q in self.quantities}
        return {**to_plain(plain), "quantities": to_plain(summary), "diverged": self.diverged}

    def figures(self) -> list[Figure]:
        """A map (two axes) or curves (one axis) of every quantity, the predicted boundary or curve on top; none for more axes."""
        make = {1: self._curve, 2: self._map}.get(len(self.axes))
        return [make(q) for q in self.quantities] if make else []

    def _map(self, q: Quantity) -> Figure:
        (x, xs), (y, ys) = self.axes.items()
        data = {
            "x": list(xs), "y": list(ys), "z": self.values(q.name).T.tolist(), "boundary": self.values(q.name, "predicted").T.tolist(),
            "level": q.level, "xtitle": x, "ytitle": y, "ztitle": q.name, "log": _log_axes(x=xs, y=ys),
        }  # fmt: skip
        return Figure(
            q.title, to_plain(data), phase_diagram, "Colour: measured. Line: where theory puts the boundary." if q.level is not None else ""
        )

    def _curve(self, q: Quantity) -> Figure:
        ((x, xs),) = self.axes.items()
        seen, theory, error = (self.values(q.name, what) for what in ("measured", "predicted", "stderr"))
        series: list[dict[str, Any]] = [{"name": "measured", "x": list(xs), "y": seen.tolist(), "mark": "points"}]
        if np.isfinite(error).any():
            series[0] |= {"low": (seen - 2 * error).tolist(), "high": (seen + 2 * error).tolist()}
        if np.isfinite(theory).any():
            series.append({"name": "predicted", "x": list(xs), "y": theory.tolist()})
        return Figure(q.title, {"series": series, "x": x, "y": q.name, "log": _log_axes(x=xs)}, curves)


def sweep(
    slug: str,
    offered: Sweep,
    axes: Mapping[str, Sequence[float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    store: Cells | str | None = None,
    workers: int = 1,
    backend: Backend = "loky",
    address: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagram:
    """Run a sweep, or what is left of it.

    Args:
        slug: the paper; part of the hash of every cell.
        offered: what to sweep, one of ``entry.sweeps`` or `sweep_of`.
        axes: field -> values; the default is the sweep's own.
        settings: field -> value, for fields that stay fixed.
        store: file (or open `Cells`) that keeps finished cells; without one nothing is kept.
        workers: processes (loky), or tasks at a time on the cluster.
        backend: "loky" (this machine), "ray" or "dask".
        address: of a running Ray or Dask cluster; without one a local one is started.
        progress: told (cells done, cells in all).

    Raises:
        InputError: unknown fields, values of the wrong type, a cell that is refused (named by its config), workers that keep dying or
            run other code, or a store that cannot be written. What was finished before is kept.
        MissingExtraError: the backend is not installed.
    """
    chosen = {name: tuple(values) for name, values in (axes or offered.axes).items()}
    configs = _configs(offered.config, chosen, settings or {})
    code = code_key(offered.cell.func if isinstance(offered.cell, functools.partial) else offered.cell)
    keys = [digest({"sweep": slug, "title": offered.title, "config": to_plain(c), "code": code}) for c in configs]
    kept = store if isinstance(store, Cells) else Cells(store) if store else Cells(":memory:")
    with contextlib.closing(kept) if not isinstance(store, Cells) else contextlib.nullcontext():
        _fill(offered.cell, dict(zip(keys, configs, strict=True)), kept, workers, backend, address, progress)
        cells = kept.get(keys)
    fixed = {f.name: getattr(configs[0], f.name) for f in dataclasses.fields(configs[0]) if f.name not in chosen}
    return Diagram(slug, offered.title, chosen, to_plain(fixed), offered.quantities, tuple(cells[key] for key in keys))


def offered(entry: Entry, name: str | None = None, experiment: str | None = None, preset: str = "smoke") -> Sweep:
    """What of a paper to sweep: its sweep of that name (its first by default), or one of its experiments.

    Raises:
        InputError: there is no such thing; the message lists what there is.
    """
    if experiment is not None:
        return sweep_of(entry, experiment, preset)
    if not entry.sweeps or (name is not None and name not in entry.sweeps):
        has = f"its sweeps are {', '.join(entry.sweeps)}" if entry.sweeps else "it has no sweep of its own"
        raise InputError(f"{entry.slug}: {has}; any experiment can be swept with --experiment: {', '.join(entry.experiments)}")
    return entry.sweeps[name or next(iter(entry.sweeps))]


def page(path: str | os.PathLike[str], diagram: Diagram) -> Path:
    """Write the figures of a sweep as one HTML file that loads nothing from anywhere."""
    from plotly.io import to_html

    parts = [f"<h1>{html.escape(diagram.slug)}: {html.escape(diagram.title)}</h1>"]
    lost = [f"{diagram.diverged:,} replicas left the range of numbers"] if diagram.diverged else []
    parts.append(f"<p>{html.escape(', '.join([*(f'{k} {v}' for k, v in diagram.config.items()), *lost]))}</p>")
    for index, figure in enumerate(diagram.figures()):
        quantity = next(q for q in diagram.quantities if q.title == figure.name)
        side = diagram.agreement(quantity)
        said = (
            f" {side['share']:.2%} of {side['cells']:,} cells lie on the predicted side (by chance {side['chance']:.0%})." if side else ""
        )
        said += f" {side['void']} of them have no measurement." if side and side["void"] else ""
        drawn = to_html(figure.draw(figure.data), include_plotlyjs=index == 0, full_html=False, config={"displaylogo": False})
        parts.append(f"<h2>{html.escape(figure.name)}</h2><p>{html.escape(figure.caption + said)}</p>{drawn}")
    if not diagram.figures():
        parts.append("<p>A diagram is drawn for one or two swept fields; the numbers are in the JSON output.</p>")
    style = "body{font:16px/1.5 system-ui,sans-serif;max-width:900px;margin:0 auto;padding:1.5rem;color:#1d2429}h2{font-size:1.1rem}"
    head = f'<meta charset="utf-8"><title>parasym sweep</title><style>{style}</style>'
    target = Path(path)
    target.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>', encoding="utf-8")
    return target


def cell_seed(config: Any) -> int:
    """A seed for one cell: different for every config, the same wherever and whenever the cell is run."""
    return int(digest(to_plain(config))[:12], 16)


def sweep_of(entry: Entry, experiment: str, preset: str = "smoke") -> Sweep:
    """Any experiment of the gallery as a sweep over the fields of its config: how far each of its checks is from its tolerance.

    Raises:
        InputError: no such experiment, or the preset leaves it out.
    """
    if experiment not in entry.experiments:
        raise InputError(f"{entry.slug} has no experiment {experiment!r}; it has {', '.join(entry.experiments)}")
    config = getattr(entry.config(preset), experiment)
    if config is None:
        raise InputError(f"the preset {preset!r} of {entry.slug} leaves {experiment!r} out: choose another")
    quantities = (Quantity("passed", "share of the checks that pass"), Quantity("margin", "largest error over its tolerance"))
    return Sweep(f"{entry.slug}: {experiment}", config, functools.partial(_experiment_cell, entry.experiments[experiment]), quantities)


def _experiment_cell(experiment: Callable[[Any], Part], config: Any) -> dict[str, dict[str, float]]:
    checks = experiment(config).checks
    shares = np.array([check.error / check.tolerance for check in checks if check.tolerance > 0] or [0.0])
    return {
        "passed": {"measured": sum(check.passed for check in checks) / max(len(checks), 1), "predicted": 1.0},
        "margin": {"measured": float(shares.max())},  # NaN if any error is
    }


# ------------------------------------------------------------------------------------------------ what to run


def parse_axis(text: str) -> tuple[str, tuple[float, ...]]:
    """Read "field=0.1,0.2,0.5", "field=low:high:count" or "field=low:high:count:log".

    Raises:
        InputError: it is none of these.
    """
    name, _, values = text.partition("=")
    try:
        if ":" in values:
            low, high, count, *how = values.split(":")
            if how not in ([], ["log"]) or int(count) < 1:
                raise ValueError
            space = np.geomspace if how else np.linspace
            found = tuple(float(v) for v in space(float(low), float(high), int(count)))
        else:
            found = tuple(float(v) for v in values.split(","))
        if not name or not all(math.isfinite(v) for v in found):
            raise ValueError
    except ValueError:
        raise InputError(f"cannot read {text!r}: write field=0.1,0.2,0.5 or field=low:high:count or field=low:high:count:log") from None
    return name.strip(), found


def parse_setting(text: str) -> tuple[str, Any]:
    """Read "field=value" (a number, a list in JSON, or a word).

    Raises:
        InputError: there is no "=".
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(f"cannot read {text!r}: write field=value")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def _configs(base: Any, axes: Mapping[str, Sequence[float]], settings: Mapping[str, Any]) -> list[Any]:
    known = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    if not axes or not all(axes.values()):
        numbers = [name for name, value in known.items() if isinstance(value, int | float) and not isinstance(value, bool)]
        raise InputError(f"say what to sweep: --over FIELD=VALUES, with a field of {', '.join(numbers)}")
    for name in (*axes, *settings):
        if name not in known:
            shown = ", ".join(f"{field} (now {value})" for field, value in known.items())
            raise InputError(f"there is no field {name!r} to sweep or set; there are {shown}")
    if both := sorted(set(axes) & set(settings)):
        raise InputError(f"{both[0]} is swept and set: do one")
    fixed = dataclasses.replace(base, **{name: _typed(name, value, known[name]) for name, value in settings.items()})
    columns = {name: [_typed(name, value, known[name]) for value in values] for name, values in axes.items()}
    return [dataclasses.replace(fixed, **dict(zip(columns, point, strict=True))) for point in itertools.product(*columns.values())]


def _typed(name: str, value: Any, like: Any) -> Any:
    """A value in the type of the field it replaces."""
    if isinstance(like, tuple):
        items = value if isinstance(value, list | tuple) else (value,)
        kind = next((item for item in like if isinstance(item, float)), like[0] if like else None)
        return tuple(_typed(name, item, kind) for item in items) if like else tuple(items)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} takes finite numbers, not {value!r}")
    if isinstance(like, bool) or not isinstance(like, int | float):
        if not isinstance(value, type(like)):
            raise InputError(f"{name} takes {'true or false' if isinstance(like, bool) else type(like).__name__}, not {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(like, int) and float(value) != int(value)):
        raise InputError(f"{name} takes {'whole numbers' if isinstance(like, int) else 'numbers'}, not {value!r}")
    return type(like)(value)


def _log_axes(**axes: Sequence[float]) -> str:
    """Names of the axes whose values are spaced by a constant factor."""

    def geometric(values: Sequence[float]) -> bool:
        if len(values) < 4 or min(values) <= 0:
            return False
        ratios = np.array(values[1:]) / np.array(values[:-1])
        return bool(abs(ratios[0] - 1) > 1e-6 and np.allclose(ratios, ratios[0], rtol=1e-6))

    return "".join(name for name, values in axes.items() if geometric(values))


# ------------------------------------------------------------------------------------------------ running it


def _fill(
    cell: Cell,
    configs: Mapping[str, Any],
    kept: Cells,
    workers: int,
    backend: Backend,
    address: str | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Compute every cell that is not kept yet, in rounds of a few tasks for each worker; a task is kept as soon as it arrives."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise InputError(f"workers must be a positive whole number, not {workers!r}")
    have = kept.get(list(configs))
    missing = {key: config for key, config in configs.items() if key not in have}
    total, size, lost = len(configs), 1, 0
    tell = progress or (lambda done, of: None)
    tell(total - len(missing), total)
    while missing:
        with _pool(backend, workers, address) as pool:
            try:
                while missing:
                    chunks = _chunks(list(missing.items()), size, workers)
                    began = time.perf_counter()
                    for found, code in pool(joblib.delayed(_run)(cell, chunk) for chunk in chunks):
                        if code != provenance():
                            raise InputError(
                                "a worker runs another parasym, torch, numpy, scipy or numba than this process: make them equal"
                            )
                        kept.put(found)
                        for key in found:
                            del missing[key]
                        tell(total - len(missing), total)
                    seconds = time.perf_counter() - began
                    size = max(1, min(4 * size, round(_CHUNK * size * len(chunks) / workers / max(seconds, 1e-9))))
            except Exception as error:
                lost += 1
                if not _worker_died(error):
                    raise
                if lost >= _TRIES:
                    raise InputError(
                        f"workers died {lost} times; {total - len(missing)} of {total} cells are kept. The last word was: {error}"
                    ) from error
                size = max(1, size // 4)


def _chunks(items: list[Any], size: int, workers: int) -> list[list[Any]]:
    """The tasks of one round: four for each worker."""
    few = items[: 4 * workers * size]
    return [few[low : low + size] for low in range(0, len(few), size)]


def _run(cell: Cell, chunk: Sequence[tuple[str, Any]]) -> tuple[dict[str, Any], str]:
    """The cells of one task, on one thread, and what computed them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {key: to_plain(_named(cell, config)) for key, config in chunk}, provenance()
    finally:
        torch.set_num_threads(threads)


def _named(cell: Cell, config: Any) -> Mapping[str, Mapping[str, float]]:
    """What the cell returns; an error says in which cell it was."""
    try:
        return cell(config)
    except Exception as error:
        where = ", ".join(f"{f.name} {getattr(config, f.name)}" for f in dataclasses.fields(config))
        said = str(error) if isinstance(error, ParasymError) else f"{type(error).__name__}: {error}"
        raise (InputError if isinstance(error, ParasymError) else RuntimeError)(f"the cell {where}: {said}") from error


@contextlib.contextmanager
def _pool(backend: Backend, workers: int, address: str | None) -> Iterator[Callable[[Any], Iterable[Any]]]:
    """A joblib pool on the backend asked for; results come as they are ready."""
    with (
        _cluster(backend, address) as name,
        joblib.parallel_config(backend=name, n_jobs=workers),
        joblib.Parallel(batch_size=1, return_as="generator_unordered") as pool,
    ):
        yield pool


@contextlib.contextmanager
def _cluster(backend: Backend, address: str | None) -> Iterator[str]:
    """joblib's name of a backend, with the cluster it needs: the running one at ``address``, else one started here and ended
    afterwards."""
    if backend == "ray":
        try:
            import ray
            from ray.util.joblib.ray_backend import RayBackend
        except ImportError as error:
            raise MissingExtraError("backend 'ray' needs the extra [ray]: pip install 'parasym[ray]'") from error
        # joblib takes results one by one only from a backend that says it can; Ray's can, but inherits "no" from multiprocessing's
        joblib.register_parallel_backend("parasym-ray", type("RayBackend", (RayBackend,), {"supports_return_generator": True}))
        own = not ray.is_initialized()
        if own:
            how: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
            _reached(lambda: ray.init(log_to_driver=False, configure_logging=False, **how), address)
        try:
            yield "parasym-ray"
        finally:
            if own:
                ray.shutdown()
    elif backend == "dask":
        try:
            from dask.distributed import Client
        except ImportError as error:
            raise MissingExtraError("backend 'dask' needs the extra [dask]: pip install 'parasym[dask]'") from error
        kind: dict[str, Any] = {} if address else {"threads_per_worker": 1, "dashboard_address": None}
        with _reached(lambda: Client(address, **kind), address):
            yield "dask"
    elif backend == "loky":
        yield "loky"
    else:
        raise InputError(f"backend {backend!r} is unknown: use loky, ray or dask")


def _reached(connect: Callable[[], Any], address: str | None) -> Any:
    """What ``connect`` returns.

    Raises:
        InputError: there is no cluster at ``address``.
    """
    try:
        return connect()
    except (OSError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        raise InputError(f"no cluster answers at {address}: {error}") from error


def _worker_died(error: BaseException) -> bool:
    """Whether a worker was lost (killed, out of memory, its node gone), as each backend says it; any other error is the cell's own."""
    names = {kind.__name__ for kind in type(error).__mro__}
    lost = {
        "TerminatedWorkerError",
        "BrokenProcessPool",
        "KilledWorker",
        "RayActorError",
        "ActorDiedError",
        "WorkerCrashedError",
        "NodeDiedError",
    }
    return bool(names & lost)
