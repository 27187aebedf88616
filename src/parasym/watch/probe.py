"""Measurements that run the model again, on a batch of the user's: per-sample noise, sharpness, collapse.

The live model is called under guards that put back modes, buffers, gradients and random states; it is run eagerly, so that nothing is
compiled anew, and outside of autocast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from parasym.core.errors import InputError, NonDeterministicError
from parasym.core.functional import functional
from parasym.core.guards import preserve
from parasym.measure.advice import advice
from parasym.measure.collapse import collapse, weight_collapse
from parasym.measure.curvature import hessian, sharpness, stability
from parasym.measure.gradients import LossFn, Objective, gradient_moments
from parasym.watch.finding import Found
from parasym.watch.record import Row


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model may be called inside and is as it was afterwards."""
    with ExitStack() as stack:
        stack.enter_context(preserve(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for device in {p.device.type for p in model.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def sample_rows(model: nn.Module, loss_fn: LossFn | None, batch: Any) -> list[Row]:
    """Noise from the gradients of single samples.

    Raises:
        InputError: batch-coupled layers, or a loss that is not a mean over samples.
    """
    with quiet(model):
        moments = gradient_moments(Objective(model, loss_fn), batch, squares=False)
    note = f"from {moments.count} samples of one batch, {moments.backend}"
    out = []
    estimates = {
        "trace of the gradient covariance (samples)": moments.noise_trace(),
        "gradient noise scale (samples)": moments.noise_scale(),
    }
    for name, e in estimates.items():
        value = float(e.value) if isinstance(e.value, float) else math.nan
        error = float(e.stderr) if isinstance(e.stderr, float) else None
        status = e.status if e.value is not None or e.status != "ok" else "not_applicable"
        out.append(Row(name, "", "noise", value, stderr=error, status=status, note="; ".join(t for t in (note, e.note) if t)))
    return out


def sharpness_rows(model: nn.Module, loss_fn: LossFn | None, batch: Any, optimizer: torch.optim.Optimizer, tol: float) -> list[Row]:
    """Largest Hessian eigenvalue on the batch, beside what the optimiser's step tolerates on a quadratic.

    Dropout is switched off for it: the Hessian of a random function is not one thing. Batch norms stay in their mode.

    Raises:
        NonDeterministicError, InputError: no Hessian can be taken.
    """
    with quiet(model):
        note = ""
        for m in model.modules():
            if isinstance(m, _DropoutNd) and m.training and m.p > 0:
                m.training, note = False, "dropout off"
        try:
            op = hessian(model, loss_fn, batch)
        except NonDeterministicError:
            model.eval()
            op, note = hessian(model, loss_fn, batch), "in eval mode: in train mode the loss is random"
        try:
            found = stability(op, optimizer, functional(model).model, tol=tol)
            top, limit, why = found.sharpness, found.limit, ""
        except InputError as error:
            found, top, limit, why = None, sharpness(op, tol=tol), math.nan, str(error)
    value = float(top.value) if isinstance(top.value, float) else math.nan
    plain = found is None or found.rule == "SGD"
    name = "sharpness" if plain else "sharpness, preconditioned"
    notes = [note, f"residual {top.residual:.1e}" if top.residual is not None else "", top.note]
    rows = [Row(name, "", "sharpness", value, status=top.status, note="; ".join(t for t in notes if t))]
    if found is not None:
        rows.append(Row("sharpness over the stability limit", "", "sharpness", found.ratio, status=found.status, note=f"limit {limit:.3g}"))
    elif why:
        rows.append(Row("sharpness over the stability limit", "", "sharpness", math.nan, status="not_applicable", note=why))
    return rows


COLLAPSED = ("dead", "duplicate", "rank", "head", "norm-dead")
"""Kinds of finding that are collapsed sets; the others (imbalance, linear units) are shown beside them."""

REMEDIES = {
    "dead": "parasym.methods.syre keeps units out of collapsed sets",
    "duplicate": "parasym.methods.syre keeps units out of collapsed sets",
    "rank": "parasym.methods.syre keeps factors at full rank",
    "head": "parasym.methods.syre keeps heads out of collapsed sets",
}


def collapse_rows(found: Found, params: Mapping[str, Tensor], data: bool) -> list[dict[str, Any]]:
    """The audit's table of collapse at the present weights.

    Args:
        found: graph, spaces and families of the model.
        params: canonical name -> whole weight, read when needed.
        data: on the batch (dead units are seen on data only), else from weights alone.
    """
    if not data or found.batch is None:
        return weight_collapse(found.entries, params.__getitem__, found.spaces)
    return collapse(found.graph, params, [found.batch], found.spaces, found.entries, checks=1)


def collapse_summary(rows: Sequence[Mapping[str, Any]], seen: set[tuple[str, str]]) -> list[Row]:
    """One row for each place and kind, those that were there before and are gone included."""
    shares: dict[tuple[str, str], list[Any]] = {}
    for r in rows:
        if r["kind"] == "not measured":
            continue
        at = shares.setdefault((str(r["kind"]), str(r["where"])), [0, 0, []])
        at[0] += int(r["count"])
        at[1] = max(at[1], int(r["of"]))
        at[2].append(str(r["note"]))
    out = []
    for kind, where in sorted(seen | set(shares)):
        count, of, notes = shares.get((kind, where), [0, 0, []])
        share = min(1.0, count / of) if of else 0.0
        out.append(Row(kind, where, "collapse", share, note=f"{count} of {of}; {'; '.join(notes)}"[:400] if of else "none any more"))
    seen |= set(shares)
    return out


def remedy_of(row: Row, rows: Sequence[Mapping[str, Any]]) -> str:
    """What helps against a kind of collapse: the method that keeps it away, else the audit's advice."""
    if row.name in REMEDIES:
        return REMEDIES[row.name]
    for r in rows:
        if r["kind"] == row.name and r["where"] == row.where:
            for a in advice([dict(r)]):
                return a["command"] or a["why"]
    return ""
