"""Compression that keeps the function: redundant units are cut out of the network, and their readers make up for them.

Source: stochastic-collapse R7 (zero and duplicate neurons), universal-compression (duplicates are its order zero).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError, ParasymError
from parasym.core.functional import Functional, functional
from parasym.core.graph import Graph, trace
from parasym.core.guards import preserve, rng_state
from parasym.core.results import Estimate
from parasym.core.samples import Batch, draw, flatten
from parasym.measure.judge import Judge, Runner
from parasym.methods.edit import Edit, output_change
from parasym.methods.masks import refuse_parametrized
from parasym.methods.redundant import Join, Relations, exact, observe_units, pulled, relations, sources, without
from parasym.methods.state import Tensors, Transport
from parasym.methods.units import (
    Units,
    all_trainable,
    as_arguments,
    attributes,
    buffer_names,
    cut_axes,
    find_units,
    kept_axes,
    parent_attributes,
)
from parasym.symmetry.spaces import find_spaces

EXACT = 1e-12  # relative change of the outputs that counts as none, in float64
STORED = {torch.float64: EXACT, torch.float32: 1e-5}
BAR = 12.3  # digits one index space must keep
Tell = Callable[[str, float], None]


@dataclass
class Subject:
    """A model with its trace, its units and data: what every method on units starts from."""

    view: Functional
    graph: Graph
    units: list[Units]
    given: list[Batch]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generator: torch.Generator

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        inputs: Sequence[Sequence[Any]] | None,
        seed: int,
        method: str,
    ) -> Subject:
        """Trace and read.

        Raises:
            InputError, TraceError: no module, arguments that do not fit, NaN or quantised weights, parametrised weights.
        """
        view = functional(model)
        refuse_parametrized(view.params, method)
        with preserve(view.model), all_trainable(view.model):
            graph = trace(view.model, tuple(args), kwargs)
        batches = [flatten(graph, args, kwargs)] if inputs is None else [flatten(graph, tuple(i), kwargs) for i in inputs]
        if not batches:
            raise InputError("inputs is empty: give at least one tuple of arguments.")
        units = find_units(graph, find_spaces(graph))
        return cls(view, graph, units, batches, tuple(args), dict(kwargs or {}), torch.Generator().manual_seed(seed))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and running statistics of the graph, float64."""
        return {**self.graph.params, **{n: b for n, b in self.graph.buffers.items() if b.is_floating_point()}}

    def judge(self, trust_inputs: bool) -> Judge:
        """Given data and draws that nothing was looked for on."""
        fresh = [] if trust_inputs else [draw(self.graph, self.given[0], self.generator, wide=w) for w in (False, True)]
        return Judge(Runner(self.graph), self.graph.params, self.given[:2], fresh)

    def cases(self, trust_inputs: bool) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments to certify on: the given ones and further draws."""
        more = [] if trust_inputs else [draw(self.graph, self.given[0], self.generator, wide=w) for w in (False, True)]
        return [as_arguments(b, self.args, self.kwargs) for b in [*self.given[:2], *more]]


def compress(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    inputs: Sequence[Sequence[Any]] | None = None,
    trust_inputs: bool = False,
    seed: int = 0,
    progress: Tell | None = None,
) -> Edit:
    """Plan the lossless compression of a model: every dead, unread, duplicate or linearly dependent unit is cut out.

    Units are those of any index space of the traced graph that contractions read: neurons, channels with their norms, gated units,
    heads. Nothing is touched until ``apply(optimizer)``; ``edited()`` gives a compressed copy.

    Args:
        args, kwargs: example arguments, the batch first.
        inputs: more argument tuples (the structure of ``args``) to look at.
        trust_inputs: also cut what is redundant on the given data only (a ReLU that these data never switch on). By default a
            relation must also hold on fresh data of the same kind and on data of many amplitudes, on as many samples as are cheap
            (thousands for a small network): units that wake more rarely than that are taken for dead.
        seed: of the fresh data.
        progress: called with (stage, fraction).

    Returns:
        The edit. Its certificate is the largest relative change of the outputs in float64, on data that nothing was looked for on;
        its details give the same in the model's own type. ``summary`` lists what was cut, and what was left and why. Optimiser state
        follows its weights; gradients of a copy join those of the unit it repeats (exact), second moments join by the bound
        (sqrt v_i + |s| sqrt v_j)^2, which is reached when both gradients agree.

    Raises:
        InputError, TraceError: what, where, and what to do.
    """
    tell = progress or (lambda stage, fraction: None)
    with rng_state(), torch.no_grad():
        tell("trace", 0.0)
        subject = Subject.of(model, args, kwargs, inputs, seed, "compress")
        tell("look", 0.2)
        runner = Runner(subject.graph)
        seen = sources(runner, subject.given, subject.generator, trust_inputs)
        free = [u for u in subject.units if u.why is None]
        features = observe_units(runner, subject.graph.params, seen, free, seed, len(subject.given) + 4)
        tell("try", 0.4)
        judge = subject.judge(trust_inputs)
        plan = [(u, exact(u, relations(u, f, subject.graph.params), judge, BAR)) for u, f in zip(free, features, strict=True)]
        plan = [(u, r) for u, r in plan if r.parts]
        tell("certify", 0.7)
        return _planned(model, subject, plan, trust_inputs)


def _planned(model: nn.Module, subject: Subject, plan: list[tuple[Units, Relations]], trust_inputs: bool) -> Edit:
    """The edit; index spaces whose cut the model's own forward refuses are left alone and named."""
    cases = subject.cases(trust_inputs)
    left = [{"where": u.where, "of": u.size, "why": u.why} for u in subject.units if u.why is not None]
    after, fields, certificate = _tried(subject, plan, cases)
    if not certificate.ok:
        good: list[tuple[Units, Relations]] = []
        for u, r in plan:
            found = _tried(subject, [*good, (u, r)], cases)
            if found[2].ok:
                good.append((u, r))
            else:
                left.append({"where": u.where, "of": u.size, "units": sorted(r.parts), "why": _brief(found[2].note)})
        plan = good
        after, fields, certificate = _tried(subject, plan, cases)
    return Edit(
        "compress",
        model,
        after,
        certificate,
        _transport(subject, plan),
        fields,
        _summary(subject, plan, after, left),
    )


def _tried(
    subject: Subject, plan: Sequence[tuple[Units, Relations]], cases: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any], Estimate]:
    """New tensors, attributes, and what they do to the outputs of the model itself."""
    after, fields, parents = _new_tensors(subject, plan)
    if not after:
        return {}, {}, Estimate(0.0, refs=("stochastic-collapse",), note="nothing to cut")
    found = certificate_of(subject.view, after, fields, cases)
    if not found.ok and parents:
        again = certificate_of(subject.view, after, {**fields, **parents}, cases)
        if again.ok:
            return after, {**fields, **parents}, again
    return after, fields, found


def _new_tensors(subject: Subject, plan: Sequence[tuple[Units, Relations]]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    changed: dict[str, Tensor] = {}
    for u, r in plan:
        changed = without(u, r, subject.graph.params, changed)
    tensors = {**subject.tensors, **changed}
    keep = kept_axes(tensors, [(u.places, list(r.parts)) for u, r in plan])
    names = buffer_names(subject.view, subject.graph)
    after = {names.get(n, n): v for n, v in {**changed, **cut_axes(tensors, keep)}.items()}
    named = {(names.get(t, t), axis): index for (t, axis), index in keep.items()}
    shapes = {names.get(n, n): t.shape for n, t in tensors.items()}
    parents: dict[str, Any] = {}
    for u, r in plan:
        parents |= parent_attributes(subject.view, u, u.size - len(r.parts))
    return after, attributes(subject.view, named, shapes), parents


def certificate_of(
    view: Functional,
    after: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    cases: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    lossy: bool = False,
) -> Estimate:
    """The change of the outputs in float64, and with the new weights stored in the model's own type; any change will do if ``lossy``."""
    within = float("inf") if lossy else EXACT
    kinds = {p.dtype for p in view.params.values()}
    try:
        if kinds == {torch.float64}:
            return output_change(view.model, after, cases, attributes=fields, within=within)
        wide = copy.deepcopy(view.model).double()
        found = output_change(wide, after, cases, attributes=fields, within=within)
        del wide
        own = output_change(view.model, after, cases, attributes=fields, within=max(1.0, within))
    except (ParasymError, RuntimeError, ValueError, IndexError, TypeError) as error:
        return Estimate(None, status="not_applicable", note=f"the forward of the model fixes this width: {_brief(str(error))}")
    bar = float("inf") if lossy else max(STORED.get(k, 100 * torch.finfo(k).eps) for k in kinds)
    stored = float(own.value) if isinstance(own.value, float) else float("inf")
    status = found.status if stored <= bar else "violated"
    note = found.note or ("" if stored <= bar else f"stored in the model's own type the outputs change by {stored:.2g}")
    return Estimate(found.value, status=status, assumptions=found.assumptions, note=note, details={"stored": stored})


def _transport(subject: Subject, plan: Sequence[tuple[Units, Relations]]) -> Transport:
    """Gradients: copies join their representative, then the cut. Second moments: the same with roots added up."""
    tensors = subject.tensors
    keep = kept_axes(tensors, [(u.places, list(r.parts)) for u, r in plan])
    joins: dict[str, list[Join]] = {}
    for u, r in plan:
        for name, found in pulled(u.inside, r, tensors).items():
            joins.setdefault(name, []).extend(found)

    def moved(given: Tensors, magnitude: bool) -> Tensors:
        joined = {}
        for n, value in given.items():
            for join in joins.get(n, []):
                value = join.add(value, magnitude)
            joined[n] = value
        return {**joined, **cut_axes(joined, {k: i for k, i in keep.items() if k[0] in given})}

    def square(given: Tensors) -> Tensors:
        return {n: v.square() for n, v in moved({n: v.sqrt() for n, v in given.items()}, True).items()}

    return Transport(lambda given: moved(given, False), square)


def _summary(
    subject: Subject, plan: Sequence[tuple[Units, Relations]], after: Mapping[str, Tensor], left: list[dict[str, Any]]
) -> dict[str, Any]:
    before = sum(p.numel() for p in subject.view.params.values())
    lost = sum(subject.view.params[n].numel() - v.numel() for n, v in after.items() if n in subject.view.params)
    removed = []
    for u, r in plan:
        for kind in ("dead", "unread", "duplicate", "linear"):
            units = sorted(j for j, k in r.kind.items() if k == kind)
            if units:
                removed.append({"where": u.where, "kind": kind, "units": units, "count": len(units), "of": u.size})
    return {"parameters_before": before, "parameters_after": before - lost, "removed": removed, "left": left}


def _brief(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:160] if lines else text
