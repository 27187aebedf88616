"""``parasym.watch``: start watching a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parasym.core.errors import InputError
from parasym.laws.charges import Charge
from parasym.measure.gradients import LossFn
from parasym.watch.observer import MEASURES, Watch
from parasym.watch.record import Record
from parasym.watch.sinks import Sink

__all__ = ["MEASURES", "Watch", "watch"]


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn | None = None,
    *,
    every: int | Mapping[str, int] = 1,
    budget: float | None = 0.05,
    path: str | Path | Record | None = "watch.sqlite",
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    batch: Any = None,
    charges: Sequence[Charge] | None = None,
    head: Any = None,
    measure: Sequence[str] = MEASURES,
    sinks: Sequence[Sink | str] = (),
    resume: bool = False,
    step: int = 0,
    meta: Mapping[str, Any] | None = None,
    seed: int = 0,
    tol: float = 1e-2,
) -> Watch:
    """Observe a training run: charges beside their predictions, collapse, gradient noise, sharpness, norms and rates.

    The run is not changed: weights, buffers, optimiser state and random states after any number of steps are bitwise those of the
    unwatched run. Nothing that goes wrong in watching reaches the training loop: it ends in one warning. Under
    ``torch.distributed`` every rank calls this; the first rank writes. Replicas (DDP) are measured on the first rank, shards (FSDP2)
    are gathered one charge at a time at observed steps.

    Args:
        model: the module that training calls; wrappers (compile, DDP) may be on it.
        optimizer: whose steps are the steps of the run. Its step hooks are all the watcher hangs on.
        loss_fn: ``loss_fn(output, target)`` -> mean over samples; needed, with ``batch``, for sharpness and per-sample noise, unless the
            model returns its loss (then its first call's arguments serve).
        every: smallest number of steps between two measurements, for all or by name (`MEASURES`).
        budget: share of the run's own time that may be spent; measurements thin out to stay inside it. The search for symmetries
            before the first step is done once, reported in the record, and not part of it. None: no limit.
        path: file or folder of the record (`parasym.watch.record.Record`), or an open one; None: no record, sinks only.
        args, kwargs: example arguments for the search; by default the model's first call is used. Needed where the model was
            compiled in place, or is called under another name: hooks do not see its calls.
        batch: (input, target), or the arguments of a model that returns its loss, on which it is run again for sharpness and noise.
        charges: to keep books of, instead of searching.
        head: function of the output that stands for the loss, for charges only the loss has (`parasym.laws.charges.charges`).
        measure: which of `MEASURES`.
        sinks: where else rows go, `parasym.watch.sinks.Sink` objects or the names "tensorboard", "wandb", "mlflow".
        resume: go on with the record at ``path``; what it holds beyond ``step`` is superseded. `Watch.load_state_dict` also brings the
            predictions back.
        step: steps the run has taken before, of a resumed run.
        meta: facts to keep with the record.
        seed: of the search. tol: of the sharpness, relative.

    Returns:
        A `Watch`: use it as a context, ``log(loss=...)`` numbers to it, ``close()`` it at the end.

    Raises:
        InputError: an option is out of range, or the optimiser holds none of the model's parameters.
        RecordError: the record cannot be made.

    Example:
        >>> with parasym.watch(model, optimizer, path="run1"):   # doctest: +SKIP
        ...     train(model, optimizer)
    """
    inner = _torch_optimizer(optimizer)
    if not isinstance(model, nn.Module):
        raise InputError(f"parasym.watch needs the torch.nn.Module that is trained, got {type(model).__name__}.")
    if budget is not None and not 0 < budget <= 1e6:
        raise InputError(f"budget is a share of the run's time and must be positive (or None for no limit), got {budget}.")
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(f"loss_fn must be a function (output, target) -> loss, got {type(loss_fn).__name__}.")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"step must be an integer >= 0, got {step!r}.")
    unknown = [m for m in (*measure, *(every if isinstance(every, Mapping) else ())) if m not in MEASURES]
    if unknown:
        raise InputError(f"Unknown measurement {unknown[0]!r}: {', '.join(MEASURES)}.")
    cadences = every.values() if isinstance(every, Mapping) else (every,)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in cadences):
        raise InputError(f"every must be a positive integer, or name -> positive integer, got {every!r}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("The model has no trainable parameter: every one is frozen (requires_grad=False).")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for g in inner.param_groups for p in g["params"]):
        raise InputError("The optimiser holds none of the model's parameters: build it from model.parameters(), after wrapping the model.")
    return Watch(
        model, inner, loss_fn, every=every, budget=budget, path=path, args=args, kwargs=kwargs, batch=batch, charges=charges, head=head,
        measure=measure, sinks=sinks, resume=resume, step=step, meta=meta, seed=seed, tol=tol,
    )  # fmt: skip


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside accelerate's and other wrappers.

    Raises:
        InputError: there is none.
    """
    inner = optimizer
    for _ in range(4):
        held = getattr(inner, "optimizer", None)
        if not isinstance(held, torch.optim.Optimizer):
            break
        inner = held
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(f"parasym.watch hangs on torch.optim.Optimizer objects, got {type(optimizer).__name__}.")
    return inner
