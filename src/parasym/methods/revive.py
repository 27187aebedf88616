"""Reset collapsed units, so that they can learn again, without changing what the network computes.

A dead unit, one that nobody reads, or the copy of another gets fresh in-weights of the size of its living peers, and no out-weights:
the function stays, and from the next step on gradients reach it. What the optimiser remembers of it is reset with it.

Source: stochastic-collapse R7 (what collapses); the reset is that of continual backpropagation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.guards import rng_state
from parasym.core.results import Estimate
from parasym.measure.judge import Runner
from parasym.methods.compress import BAR, Subject, certificate_of
from parasym.methods.edit import Edit
from parasym.methods.redundant import Join, Relations, exact, observe_units, pulled, relations, sources, without
from parasym.methods.state import Tensors, Transport
from parasym.methods.units import Place, Units, buffer_names

Kind = Literal["dead", "unread", "duplicate"]
_KINDS: tuple[Kind, ...] = ("dead", "unread", "duplicate")
_DRAWS = 8  # fresh in-weights that leave a unit dead are drawn again


def revive(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    kinds: Sequence[Kind] = _KINDS,
    inputs: Sequence[Sequence[Any]] | None = None,
    trust_inputs: bool = True,
    seed: int = 0,
) -> Edit:
    """Plan the reset of collapsed units; nothing is touched until ``apply(optimizer)``.

    Args:
        args, kwargs: a batch of the training data: a unit is dead if nothing in it switches it on.
        kinds: which units: constant ones, ones whose out-weights are zero, repetitions of others.
        inputs: more argument tuples to look at.
        trust_inputs: what is dead on these data counts as dead, so they must be like those in training; False: only what is dead on
            fresh data of many amplitudes as well, and ``args`` may be anything of the right shapes.
        seed: of the fresh weights.

    Returns:
        The edit. In-weights are drawn with the spread of the living units of their layer, biases, gains and running statistics are the
        living units' medians, out-weights are zero with the old constant folded into the next bias. The certificate is the change of the
        outputs on the given data. Momenta of what was reset are zero and its second moments are the mean of its peers' (zero would make
        Adam's first steps too long). ``summary`` lists the units, and how many are alive on the data now.

    Raises:
        InputError, TraceError: what, where, and what to do.
    """
    strange = [k for k in kinds if k not in _KINDS]
    if strange or not kinds:
        raise InputError(f"kinds {list(kinds)!r}: give some of {', '.join(_KINDS)}.")
    with rng_state(), torch.no_grad():
        subject = Subject.of(model, args, kwargs, inputs, seed, "revive")
        graph, runner = subject.graph, Runner(subject.graph)
        free = [u for u in subject.units if u.why is None and not _frozen(subject, u)]
        seen = sources(runner, subject.given, subject.generator, trust_inputs)
        features = observe_units(runner, graph.params, seen, free, seed, len(subject.given) + 4)
        judge = subject.judge(trust_inputs)
        plan = []
        for u, f in zip(free, features, strict=True):
            seen_in = relations(u, f, graph.params)
            seen_in = exact(u, seen_in.only([j for j, k in seen_in.kind.items() if k in kinds]), judge, BAR)
            if seen_in.parts and len(seen_in.parts) < u.size:
                plan.append((u, seen_in))
        renamed, alive, certificate = _tried(subject, runner, plan, seed, seen, trust_inputs)
        spoiled: list[tuple[Units, str]] = []
        if not certificate.ok:  # leave out, by name, the layers whose reset shows (with the running statistics of a norm, say)
            good: list[tuple[Units, Relations]] = []
            for u, r in plan:
                found = _tried(subject, runner, [*good, (u, r)], seed, seen, trust_inputs)[2]
                if found.ok:
                    good.append((u, r))
                else:
                    spoiled.append((u, found.note))
            plan = good
            renamed, alive, certificate = _tried(subject, runner, plan, seed, seen, trust_inputs)
    rows = [
        {"where": u.where, "kind": kind, "units": units, "count": len(units), "of": u.size}
        for u, r in plan
        for kind in _KINDS
        if (units := sorted(j for j, k in r.kind.items() if k == kind))
    ]
    left = [{"where": u.where, "why": u.why or f"{_frozen(subject, u)} is frozen"} for u in subject.units if u.why or _frozen(subject, u)]
    left += [{"where": u.where, "why": why} for u, why in spoiled]
    summary = {"revived": rows, "units": sum(len(r.parts) for _, r in plan), "alive": sum(len(a) for a in alive), "left": left}
    return Edit("revive", model, renamed, certificate, _transport(subject, plan), summary=summary)


def _tried(
    subject: Subject, runner: Runner, plan: Sequence[tuple[Units, Relations]], seed: int, seen: Sequence[Any], trust_inputs: bool
) -> tuple[dict[str, Tensor], list[set[int]], Estimate]:
    """New tensors, which of the reset units vary now, and what the reset does to the outputs."""
    changed: dict[str, Tensor] = {}
    for u, r in plan:
        changed = without(u, r, subject.graph.params, changed)
    after = _reborn(subject, runner, plan, changed, torch.Generator().manual_seed(seed), seen)
    names = buffer_names(subject.view, subject.graph)
    renamed = {names.get(n, n): v for n, v in after.items()}
    state = subject.generator.get_state()
    certificate = certificate_of(subject.view, renamed, {}, subject.cases(trust_inputs))
    subject.generator.set_state(state)  # every try is certified on the same draws
    return renamed, _alive(subject, runner, plan, after, seen), certificate


def _frozen(subject: Subject, u: Units) -> str | None:
    return next((t for t, _, _ in u.places if t in subject.view.frozen), None)


def _reborn(
    subject: Subject,
    runner: Runner,
    plan: Sequence[tuple[Units, Relations]],
    changed: Mapping[str, Tensor],
    generator: torch.Generator,
    seen: Sequence[Any],
) -> dict[str, Tensor]:
    """Fresh in-weights for all, drawn again for those that are still constant on the data."""
    after = dict(changed)
    still = [set(r.parts) for _, r in plan]
    for _ in range(_DRAWS):
        for (u, r), gone in zip(plan, still, strict=True):
            for place in u.inside:
                after[place[0]] = _drawn(after.get(place[0], subject.tensors[place[0]]), place, sorted(gone), set(r.parts), generator)
        still = [gone - living for gone, living in zip(still, _alive(subject, runner, plan, after, seen), strict=True)]
        if not any(still):
            break
    return after


def _drawn(value: Tensor, place: Place, gone: Sequence[int], collapsed: set[int], generator: torch.Generator) -> Tensor:
    """Rows of some units: normal with the spread of their living peers; vectors: the peers' median."""
    _, axis, at = place
    if not gone:
        return value
    out = value.clone()
    rows = out.movedim(axis, 0)  # a view
    peers = torch.tensor([j for j in range(len(at)) if j not in collapsed])
    alive = rows[at[peers]]
    if value.dim() > 1:
        shape = rows[at[list(gone)]].shape
        rows[at[list(gone)]] = float(alive.square().mean().sqrt()) * torch.randn(shape, generator=generator, dtype=value.dtype)
    else:
        rows[at[list(gone)]] = alive.median(0).values
    return out


def _alive(
    subject: Subject, runner: Runner, plan: Sequence[tuple[Units, Relations]], after: Mapping[str, Tensor], seen: Sequence[Any]
) -> list[set[int]]:
    """Which of the reset units vary on the data now."""
    if not plan:
        return []
    params = {**subject.graph.params, **{n: v for n, v in after.items() if n in subject.graph.params}}
    found = observe_units(runner, params, seen, [u for u, _ in plan])
    out = []
    for (_, r), f in zip(plan, found, strict=True):
        spread = torch.stack([(h - low).amax(1) for h, low in zip(f.high, f.low, strict=True)]).amax(0)
        typical = spread[spread > 0].median() if bool((spread > 0).any()) else torch.tensor(1.0)
        out.append({j for j in r.parts if float(spread[j]) > 1e-6 * float(typical)})
    return out


def _transport(subject: Subject, plan: Sequence[tuple[Units, Relations]]) -> Transport:
    """Momenta of reset weights are zero, second moments the mean of their peers'; those of a copy first join its representative."""
    tensors = subject.tensors
    joins: dict[str, list[Join]] = {}
    for u, r in plan:
        for name, found in pulled(u.inside, r, tensors).items():
            joins.setdefault(name, []).extend(found)

    def moved(given: Tensors, square: bool) -> Tensors:
        out = {}
        for n, value in given.items():
            value = value.double().sqrt() if square else value.double()
            for join in joins.get(n, []):
                value = join.add(value, square)
            out[n] = value.square() if square else value.clone()
        for u, r in plan:
            for name, axis, at in u.places:
                if name in out and r.parts:
                    rows = out[name].movedim(axis, 0)  # a view
                    peers = at[[j for j in range(u.size) if j not in r.parts]]
                    rows[at[list(r.parts)]] = rows[peers].mean(0) if square else torch.zeros((), dtype=rows.dtype)
        return out

    return Transport(lambda given: moved(given, False), lambda given: moved(given, True))
