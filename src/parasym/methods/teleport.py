"""Teleport: move a network along its orbit to where some objective is lowest, its function certified unchanged.

The group is the one discovery finds; nothing is assumed of layer types. Balance, minimum norm and the noise equilibrium are solved in
closed form, int8 error, sharpness and any function of the parameters by L-BFGS over group coordinates, agreement with another
checkpoint by assignment, signs and rotations (`parasym.methods.rebasin`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError, NotASymmetryError
from parasym.core.functional import functional
from parasym.core.graph import batch_statistics, trace
from parasym.core.guards import rng_state
from parasym.core.results import Estimate
from parasym.core.samples import flatten
from parasym.methods.edit import Edit, batch_norms, evaluating, output_change
from parasym.methods.masks import refuse_parametrized
from parasym.methods.objectives import Balance, Function, Int8, MinimumNorm, Objective, Problem, Solution
from parasym.methods.orbit import Move, Tell, apply, orbit_of, transport_of
from parasym.methods.rebasin import Agreement
from parasym.symmetry.discrete import discrete_symmetries
from parasym.symmetry.full import EXACT_PARAMETERS, audit_full_size
from parasym.symmetry.search import search
from parasym.symmetry.symmetry import Level, Params, Symmetry

NAMED: dict[str, Callable[[], Objective]] = {"balance": Balance, "minimum-norm": MinimumNorm, "int8": Int8}
EXACT, ROUNDED = 1e-12, 1e-5
"""Largest relative change of the outputs: of the move in float64, and once it is rounded to float32 weights."""
_HALF = 3e-2
_WRONG = 1e-9  # a change that no rounding and no eps explains
_DIRECT = 5_000_000  # parameters up to which permutations and signs are certified on the model itself
_EPS = 2e-14  # residual of a certified symmetry above which the eps of a norm shows


def teleport(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    to: str | Objective | Callable[[dict[str, Tensor]], Tensor],
    symmetries: Iterable[Symmetry] | None = None,
    inputs: Sequence[Sequence[Any]] | None = None,
    seed: int = 0,
    progress: Tell | None = None,
) -> Edit:
    """Plan the move of a model to the point of its orbit where an objective is lowest. The model is not touched.

    Args:
        model: any module that `parasym.audit` takes; frozen parameters stay, tied ones move together.
        args, kwargs: example arguments, the batch first.
        to: "balance", "minimum-norm" or "int8"; an objective (`Sharpness`, `NoiseEquilibrium`, `Agreement`, ...); or a function of the
            dict of parameters (canonical name -> float64 tensor) that returns one number to be made small.
        symmetries: ``parasym.audit(model, ...).symmetries``; found anew if not given.
        inputs: more argument tuples to certify on.
        seed: of discovery and of random starts.
        progress: called with (stage, fraction).

    Returns:
        The edit: ``apply(optimizer)``, ``undo()``, ``bake()``. Its certificate is the change of the outputs in the model's own dtype,
        judged in float64; the summary has the objective before and after, and the change before rounding.

    Raises:
        InputError: weights or arguments that cannot be used, a parametrized model, an unknown objective, symmetries of another model.
        NotASymmetryError: a given symmetry changes what this model computes.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> edit = teleport(net, (torch.randn(8, 3),), to="balance")
        >>> edit.summary["after"] < 1e-9 and edit.certificate.ok
        True
    """
    tell = progress or (lambda stage, fraction: None)
    objective = _objective(to)
    view = functional(model)
    refuse_parametrized(view.params, "teleport")
    unreal = [n for n, p in view.params.items() if p.is_complex()]
    if unreal:
        raise InputError(f"{unreal[0]!r} is complex: teleport moves real parameters; hold it as its real and imaginary parts.")
    if not any(p.numel() and n not in view.frozen for n, p in view.params.items()):
        raise InputError(f"{type(model).__name__} has no trainable parameter, so there is nothing to move.")
    with rng_state():
        found = (
            find_symmetries(view.model, args, kwargs, seed, tell, isinstance(objective, Agreement))
            if symmetries is None
            else list(symmetries)
        )
        f = view.to(torch.float64)
        params = {n: p.detach().double().clone() for n, p in f.params.items()}
        buffers = {"b_" + n.replace(".", "_"): b for n, b in f.buffers.items()}
        level: Level = "train" if view.training else "function"
        problem = Problem(
            view.model, f, params, buffers, orbit_of(found, params, buffers, level),
            [(tuple(args), dict(kwargs or {})), *((tuple(i), {}) for i in inputs or ())],
            torch.Generator().manual_seed(seed), lambda fraction: tell(objective.name, fraction),
        )  # fmt: skip
        tell(objective.name, 0.0)
        start = {**buffers, **params}
        _leave_out_batch_only(problem, start)
        solution, end, exact = _solved(problem, objective, start, symmetries is not None)
        moves, status, note = solution.moves, solution.status, solution.note
        before, after = objective.value(problem, params), objective.value(problem, end)
        if not after <= before * (1 + 1e-9):
            moves, end, after, exact, note = [], start, before, 0.0, note or "nothing on the orbit was found that is better"
        tell("certify", 0.0)
        edit = _edit(problem, moves, start, end, exact)
    better = after < before * (1 - 1e-9)
    if not better and status == "ok":
        note = note or "already there"
    note = "; ".join(filter(None, [note, edit.summary["optimiser"]]))
    summary = {
        "to": objective.name, "before": before, "after": after, "status": status, "note": note,
        **edit.summary, "left_out": _counted(problem.orbit.left_out), "details": dict(solution.details), "seed": seed,
    }  # fmt: skip
    return dataclasses.replace(edit, summary=summary)


def _counted(left: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"name": name, "why": why, "count": n} for (name, why), n in Counter(left).items()]


def _objective(to: Any) -> Objective:
    if isinstance(to, Objective):
        return to
    if isinstance(to, str):
        if to not in NAMED:
            raise InputError(
                f"There is no objective {to!r}: use one of {', '.join(NAMED)}, or an object: Sharpness(loss_fn, data), "
                "NoiseEquilibrium(loss_fn, data, batch_size=...), Agreement(checkpoint), or a function of the dict of parameters."
            )
        return NAMED[to]()
    if callable(to) and not isinstance(to, type | nn.Module):
        return Function(to)
    raise InputError(f"to must be the name of an objective, an objective, or a function of the dict of parameters; got {to!r}.")


def find_symmetries(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, seed: int, tell: Tell, discrete: bool = True
) -> list[Symmetry]:
    """The certified symmetries of a model, without counting or collapse; all its index spaces where ``discrete`` ones are wanted."""
    generator = torch.Generator().manual_seed(seed)
    graph = trace(model, args, kwargs)
    batch = [flatten(graph, args, kwargs)]
    size = sum(p.numel() for p in graph.params.values())
    if size > EXACT_PARAMETERS:
        found = audit_full_size(model, args, kwargs, graph, batch, generator, tell).symmetries
        if not discrete or size > _DIRECT:
            return found
        continuous = [
            s for s in found if s.kind != "discrete"
        ]  # a twin with fewer layers may lack an index space: look at the model itself
        return [*continuous, *discrete_symmetries(graph, batch, generator)[0]]
    level: Level = "train" if model.training and batch_statistics(graph) else "function"
    result = search(graph, batch, generator, blind=False, level=level, progress=tell)
    return [*result.symmetries, *discrete_symmetries(graph, result.fresh, generator)[0]]


# --------------------------------------------------------------------------------------------------------------- certificate


def _solved(problem: Problem, objective: Objective, start: Params, given: bool) -> tuple[Solution, Params, float]:
    """Solve, and check that the outputs stay; symmetries that the eps of a norm spoils are left out where that would show."""
    doubtful = [s for s in problem.orbit.families if s.residual > _EPS]
    if doubtful:
        tries = [Move(s.name, s.action, s.random_element(problem.generator, 0.3)) for s in doubtful]
        if not _change(problem, apply(tries, start)) <= EXACT / 4:
            _leave_out(problem, doubtful)
    for retry in (False, True):
        solution = objective.solve(problem)
        end = apply(solution.moves, start)
        exact = _change(problem, end)
        doubtful = [s for s in problem.orbit.families if s.residual > _EPS]
        if exact <= EXACT or retry or not doubtful or not exact <= _WRONG:
            break
        _leave_out(problem, doubtful)
    if not exact <= _WRONG:
        _blame(problem, solution.moves, start, exact, given)
    return solution, end, exact


def _leave_out_batch_only(problem: Problem, start: Params) -> None:
    """Leave out what holds only under the statistics of a batch: with running ones, in eval mode, the outputs would change."""
    if not batch_norms(problem.f.model):
        return
    names: set[int] = set()
    stream = torch.Generator().manual_seed(0)
    with evaluating(problem.f.model):
        for s in (*problem.orbit.families, *problem.orbit.discrete):
            try:
                change = _change(problem, Move(s.name, s.action, s.random_element(stream, 0.3)).act(start))
            except (RuntimeError, IndexError, ValueError, TypeError):
                change = float("inf")
            if not change <= _WRONG:
                names.add(id(s))
    why = "holds in train mode only: running statistics would not follow, and eval-mode outputs would change; teleport in eval mode"
    every = (*problem.orbit.families, *problem.orbit.discrete)
    orbit = problem.orbit
    problem.orbit = dataclasses.replace(
        orbit,
        families=tuple(s for s in orbit.families if id(s) not in names),
        discrete=tuple(s for s in orbit.discrete if id(s) not in names),
        left_out=(*orbit.left_out, *((s.name, why) for s in every if id(s) in names)),
    )


def _leave_out(problem: Problem, families: Sequence[Symmetry]) -> None:
    names = {id(s) for s in families}
    left = tuple((s.name, "exact but for the eps of a norm, which would show in the twelfth digit") for s in families)
    held = problem.orbit.only(lambda s: id(s) not in names)
    problem.orbit = dataclasses.replace(held, left_out=(*held.left_out, *left))


def _edit(problem: Problem, moves: Sequence[Move], start: Params, end: Params, exact: float) -> Edit:
    """The edit of some moves, certified after rounding to the model's dtype."""
    view = functional(problem.model)
    own = {**view.buffers, **view.params}
    names = problem.names
    after = {names[n]: v.to(own[names[n]].dtype) for n, v in end.items() if n in names and not torch.equal(v, start[n])}
    after = {n: v for n, v in after.items() if not torch.equal(v, own[n])}
    certificate = certified(problem.model, after, problem.inputs)
    transport, note = transport_of(moves, start, end, [n for n in problem.params if n in after]) if after else (None, "")
    summary = {"exact": exact, "moves": len(moves), "tensors": len(after), "optimiser": note, "families": sorted({m.name for m in moves})}
    return Edit("teleport", problem.model, after, certificate, transport, summary=summary)


def certified(model: nn.Module, after: Mapping[str, Tensor], inputs: Any) -> Estimate:
    """The change of the outputs by tensors in the model's dtype, run in float64."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    within = EXACT if dtypes <= {torch.float64, torch.complex128} else _HALF if dtypes & {torch.float16, torch.bfloat16} else ROUNDED
    return output_change(model, after, inputs, within=within)


def _change(problem: Problem, end: Params) -> float:
    with torch.no_grad():
        old, new = problem.outputs({**problem.buffers, **problem.params}), problem.outputs(end)
    worst = 0.0
    for a, b in zip(old, new, strict=True):
        gap = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0
        worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def _blame(problem: Problem, moves: Sequence[Move], start: Params, exact: float, given: bool) -> None:
    """Raise the error of a move that changes the function, with the symmetry at fault."""
    each = sorted(((_change(problem, m.act(start)), m.name) for m in moves), reverse=True)
    wrong = [f"{name} ({change:.1e})" for change, name in each if not change <= _WRONG]
    who = (
        "one given is of another model, or of other weights" if given else "this is a fault of parasym, or of a very ill-conditioned model"
    )
    raise NotASymmetryError(
        f"The move changes the outputs by {exact:.1e} (limit {_WRONG:g}), so it was not made; {who}. "
        f"At fault: {', '.join(wrong[:3]) or 'all moves together, by rounding'}. Audit this model and use the symmetries of that audit."
    )
