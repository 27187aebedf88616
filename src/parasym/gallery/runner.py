"""Runs entries: experiments are the cells of a sweep, resumed from a store and spread by joblib."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import torch

from parasym.core.guards import rng_state
from parasym.gallery.contract import Entry, Experiment, Part, Result, to_plain
from parasym.gallery.registry import entries
from parasym.gallery.store import Store, digest


def run(slug: str, preset: str = "default", store: Store | str | os.PathLike[str] | None = None, *, jobs: int = 1) -> Result:
    """Run a paper of the gallery.

    Args:
        slug: the paper, one of `entries()`.
        preset: "smoke" (at most 10 s), "default" (at most 60 s on two cores) or "full".
        store: directory for finished experiments; a run that was killed takes up where it stopped.
        jobs: worker processes; joblib's active backend is used, so a cluster backend registered with it works too.

    Raises:
        KeyError: unknown paper or preset; the message lists what there is.
    """
    table = entries()
    if slug not in table:
        raise KeyError(f"the gallery has no {slug!r}; it has {', '.join(table)}")
    return run_entry(table[slug], table[slug].config(preset), preset=preset, store=store, jobs=jobs)


def run_entry(
    entry: Entry, config: Any, *, preset: str = "custom", store: Store | str | os.PathLike[str] | None = None, jobs: int = 1
) -> Result:
    """Run the experiments of ``config`` (see `run`) and gather their parts, in the order of the entry."""
    kept = store if isinstance(store, Store) or store is None else Store(store)
    cells = [(name, getattr(config, name)) for name in entry.experiments if getattr(config, name) is not None]
    work = (joblib.delayed(_cell)(entry.experiments[name], cell, f"{entry.slug}/{name}", kept) for name, cell in cells)
    parts: list[Part] = list(joblib.Parallel(n_jobs=jobs)(work))
    return Result(
        slug=entry.slug,
        preset=preset,
        config=to_plain(config),
        seeds=seeds_of(config),
        title=entry.title,
        paper=entry.paper,
        claims=entry.claims,
        checks=tuple(check for part in parts for check in part.checks),
        figures=tuple(figure for part in parts for figure in part.figures),
        seconds=sum(part.seconds for part in parts),
        environment=environment(),
    )


def cell_key(experiment: Experiment, cell: Any, name: str) -> str:
    """The hash a finished experiment is stored under: its name, its config, the code it runs and `provenance`."""
    return digest({"name": name, "config": to_plain(cell), "code": code_key(experiment)})


def code_key(function: Callable[..., Any]) -> list[str]:
    """What a function's numbers depend on besides its config: the source of its module, and `provenance`."""
    return [inspect.getsource(inspect.getmodule(function) or function), provenance()]


@functools.cache
def provenance() -> str:
    """Hash of what computes the numbers in this process: the library's source, and the versions of what it computes with.

    Without numba the simulator runs on another engine with other random numbers, so that it is absent counts too.
    """
    return digest({"library": _library_digest(), **{name: _version(name) for name in ("torch", "numpy", "scipy", "numba")}})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _library_digest() -> str:
    """Hash of the library's source: what was measured with other code is measured again."""
    root = Path(__file__).parents[1]
    return digest({str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))})


def seeds_of(config: Any) -> tuple[int, ...]:
    """Every seed a config names, in any of its experiments, sorted."""
    found: set[int] = set()
    for key, value in _leaves(config):
        if key == "seeds" or key.endswith("_seeds"):
            found.update(int(seed) for seed in value)
        elif key == "seed" or key.endswith("_seed"):
            found.add(int(value))
    return tuple(sorted(found))


def environment() -> dict[str, Any]:
    """The versions and the thread count the numbers were made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def _cell(experiment: Experiment, cell: Any, name: str, store: Store | None) -> Part:
    if store is None:
        return _timed(experiment, cell)
    key = cell_key(experiment, cell, name)
    kept = store.get(key)
    if kept is not None:
        return Part.from_dict(kept)
    part = _timed(experiment, cell)
    store.put(key, part.to_dict())
    return part


def _timed(experiment: Experiment, cell: Any) -> Part:
    start = time.perf_counter()
    with rng_state():  # layers draw when they are made; a run leaves no trace of it
        part = experiment(cell)
    return dataclasses.replace(part, seconds=time.perf_counter() - start)


def _leaves(value: Any, key: str = "") -> Sequence[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return [leaf for name, item in value.items() for leaf in _leaves(item, str(name))]
    return [(key, value)] if value is not None else []
