"""The gallery: one file per paper, an experiment that puts prediction beside measurement."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parasym.gallery.contract import Check, Entry, Figure, Part, Result, control, holds, match, refuted
    from parasym.gallery.page import report
    from parasym.gallery.registry import entries
    from parasym.gallery.runner import run
    from parasym.gallery.store import Store
    from parasym.gallery.sweep import Diagram, Quantity, Sweep, sweep_of

__all__ = [
    "Check", "Diagram", "Entry", "Figure", "Part", "Quantity", "Result", "Store", "Sweep", "control", "entries", "holds", "match",
    "refuted", "report", "run", "sweep_of",
]  # fmt: skip

_SWEEP = ("Diagram", "Quantity", "Sweep", "sweep_of")
_HOMES = {"entries": "registry", "run": "runner", "report": "page", "Store": "store", **dict.fromkeys(_SWEEP, "sweep")}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"parasym.gallery.{_HOMES.get(name, 'contract')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
