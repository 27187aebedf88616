"""What the callbacks for trainers share: start a watch, new or resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from parasym.watch.observer import Watch
from parasym.watch.record import record_file
from parasym.watch.run import watch


def start(model: nn.Module, optimizer: Any, path: str | Path, state: Mapping[str, Any] | None, options: Mapping[str, Any]) -> Watch:
    """Start a watch.

    Args:
        model: as for `watch`.
        optimizer: as for `watch`.
        path: the record, or the folder it is in.
        state: what a checkpoint kept of the watch (`Watch.state_dict`); None for a new run.
        options: further ones of `watch`.

    Raises:
        RecordError: a new run finds a record at ``path``, or a resumed run a damaged one.
        InputError: as for `watch`.
    """
    path = record_file(path)
    if not state:
        return watch(model, optimizer, path=path, **options)
    step = int(state["step"])
    made = watch(model, optimizer, path=path, resume=path.exists(), step=step, **options)
    made.load_state_dict(state)
    return made


def trained_module(model: nn.Module) -> nn.Module:
    """The module whose call is the network's: the model, or its one child with parameters if the model itself defines no forward."""
    while type(model).forward is nn.Module.forward or _refuses_to_run(model):
        inner = [child for child in model.children() if any(True for _ in child.parameters())]
        if len(inner) != 1:
            break
        model = inner[0]
    return model


def _refuses_to_run(model: nn.Module) -> bool:
    """Whether ``forward`` is the one of a trainer's base class, which only hands on to nn.Module's."""
    return type(model).forward.__module__.startswith(("lightning.", "pytorch_lightning."))
