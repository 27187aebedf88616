"""Discovery on a model small enough for its whole Jacobian: every continuous symmetry, named and certified.

Structural families come from parameters in general position; what the given weights have beyond them (dead units, kernels)
is found at those weights. Closed forms first; what they leave is found blind and certified by retraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parasym.core.eps import without_eps
from parasym.core.errors import InputError
from parasym.core.graph import Graph
from parasym.core.samples import Batch, draw, generic_parameters
from parasym.symmetry.certify import ACCEPT, MARGIN, SIZES, Certificate, certify, certify_local, relative_change
from parasym.symmetry.dictionary import Entry
from parasym.symmetry.discover import Discovery, Found
from parasym.symmetry.families import Cover, Family, class_subspaces
from parasym.symmetry.fibre import FibreAction, Sampled
from parasym.symmetry.fixed import fixed_set_of
from parasym.symmetry.generic import generic_draw
from parasym.symmetry.naming import group_of, name_of, where_of
from parasym.symmetry.places import places_of
from parasym.symmetry.readers import readers
from parasym.symmetry.spaces import Spaces, find_spaces
from parasym.symmetry.symmetry import Kind, Level, Symmetry
from parasym.symmetry.tangent import Flat, NullSpace, edge_motion, flat_of, jacobian, kernel, null_space, triangular

Progress = Callable[[str, float], None]
_MAX_BATCHES = 64  # drawn until the rank settles,
_ROWS = 12  # or as many as give this many equations for each entry of a parameter
_NEARLY = 1e-2  # a finite element of an approximate symmetry changes the outputs by less
_SHARES = (1.0, -1.0, 1 / MARGIN, -1 / MARGIN, 0.2 / MARGIN, -0.2 / MARGIN)  # both ways: a kink may stand nearer than the far end
_SEEN = 1e-11  # relative derivative above which a batch sees a direction


@dataclass
class Search:
    """Everything a search found.

    Attributes:
        symmetries: certified families.
        entries: the dictionary entry behind a symmetry, by position (None for fibre families).
        refuted, undecided, approximate: what else was met.
        null: null space at the given parameters; generic: at general position.
        explained: rank that certified families explain.
    """

    graph: Graph
    spaces: Spaces
    batches: list[Batch]
    fresh: list[Batch]
    null: NullSpace
    generic: NullSpace
    symmetries: list[Symmetry] = field(default_factory=list)
    entries: list[Entry | None] = field(default_factory=list)
    refuted: list[dict[str, Any]] = field(default_factory=list)
    undecided: list[dict[str, Any]] = field(default_factory=list)
    approximate: list[dict[str, Any]] = field(default_factory=list)
    explained: int = 0
    moving: Tensor = field(default_factory=lambda: torch.zeros(0))


def settle(
    graph: Graph, params: Mapping[str, Tensor], batches: list[Batch], flat: Flat, generator: torch.Generator, grow: bool, wide: bool = False
) -> tuple[NullSpace, list[Batch]]:
    """Null space on enough samples: half as many again are added until the rank has not grown twice in a row.

    Small batches (one sample, few outputs) may be drawn up to ``_ROWS`` equations for each parameter entry.
    """
    R = triangular(graph, params, batches, flat)
    null = null_space(R, len(batches))
    if not grow:
        return null, batches
    outputs = sum(o.numel() for o in graph.replay(params, graph.prepare(batches[0])))
    still, grew, most = 0, False, max(_MAX_BATCHES, -(-_ROWS * flat.size // max(outputs, 1)))
    while still < 2 and null.nullity and len(batches) < most:
        enough = max(-(-len(batches) // 2), -(-2 * flat.size // max(outputs, 1)) - len(batches))
        more = [draw(graph, batches[0], generator, wide) for _ in range(min(enough, most - len(batches)))]
        R = torch.cat([R, triangular(graph, params, more, flat)])
        R = torch.linalg.qr(R, mode="r").R if len(R) > flat.size else R
        batches = batches + more
        new = null_space(R, len(batches))
        grew = new.nullity < null.nullity
        still = 0 if grew else still + 1
        null = new
    null.growing = grew and null.nullity > 0
    return null, batches


def search(
    graph: Graph,
    batches: list[Batch],
    generator: torch.Generator,
    *,
    grow: bool = True,
    general: bool = False,
    blind: bool = True,
    level: Level = "function",
    progress: Progress | None = None,
) -> Search:
    """Find, certify and count every continuous symmetry of a small graph.

    Args:
        batches: inputs for rank and certificates.
        grow: draw more of the same kind until the rank is stable (False: exactly these).
        general: a twin: its parameters are in general position and its batches were drawn, so certificates may draw their own.
        blind: look for families without a closed form in what closed forms leave.
    """
    tell = progress or (lambda stage, fraction: None)
    flat = flat_of(graph)
    tell("rank", 0.0)
    null, batches = settle(graph, graph.params, batches, flat, generator, grow)
    fresh = [draw(graph, batches[0], generator, wide=general) for _ in range(2)] if grow or general else batches
    spaces = find_spaces(graph)
    anywhere, generic = (graph.params, null) if general else general_position(graph, spaces, batches, flat, generator, null)
    out = Search(graph, spaces, batches, fresh, null, generic, undecided=unsettled(null))
    places, constants = places_of(spaces), graph.prepare(batches[0])
    tell("families", 0.3)
    structural = Discovery(graph, anywhere, generic, flat, places, constants, generator).run() if generic.nullity else []
    here = Discovery(graph, graph.params, null, flat, places, constants, generator)
    judge = Sampled.of(graph, fresh)
    tell("certificates", 0.5)
    for found in structural:
        _admit(out, here, found, judge, level, generator, point=False)
    everything = Sampled.of(graph, [*batches, *fresh] if grow else batches)  # a kink that few inputs cross ends a local claim
    if not here.complete:
        before, at = len(here.found), here.explained.shape[1]
        here.run()
        kept = [torch.arange(at)]
        for found in here.found[before:]:
            if _certify_entry(out, here, found, everything, level, generator, point=True):
                kept.append(torch.arange(at, at + found.new))
            at += found.new
        here.explained = here.explained[:, torch.cat(kept)]  # what was refuted stays open for the blind stage
    tell("approximate", 0.7)
    _approximate(out, here, anywhere, structural, judge, generator)
    tell("blind stage", 0.8)
    if not here.complete and not blind:
        left = null.nullity - here.explained.shape[1]
        out.undecided.append(
            {
                "name": "null directions without a closed form",
                "why": "the dictionary leaves them, and no blind search was made",
                "parameters": [],
                "dim": left,
            }
        )
    elif not here.complete:
        _blind(out, here, flat, everything, level, generator)
    out.explained = sum(s.dim for s in out.symmetries)
    out.moving = null.basis.norm(dim=1) > 1e-7
    tell("families", 1.0)
    return out


def unsettled(null: NullSpace) -> list[dict[str, Any]]:
    """What to record as undecided when the rank was counted on too few samples."""
    if not null.growing:
        return []
    why = f"the last of {null.samples} batches still raised the rank: the nullity is an upper bound. Give larger batches as inputs."
    return [{"name": "the rank did not settle", "why": why, "parameters": [], "dim": 0}]


def general_position(
    graph: Graph, spaces: Spaces, batches: Sequence[Batch], flat: Flat, generator: torch.Generator, null: NullSpace
) -> tuple[dict[str, Tensor], NullSpace]:
    """Redrawn parameters with the smallest nullity of a few draws: accidents only ever add null directions."""
    best: tuple[dict[str, Tensor], NullSpace] | None = None
    for attempt in range(6):
        own = attempt % 2 == 1
        params = generic_parameters(graph, generator, own_scale=own) if attempt else generic_draw(graph, spaces, batches[0])
        found = null_space(triangular(graph, params, batches, flat), len(batches))
        if best is not None and found.nullity == best[1].nullity <= null.nullity:
            break  # two draws agree on the smallest
        if best is None or found.nullity < best[1].nullity:
            best = (params, found)
            if found.nullity == null.nullity:
                break
    assert best is not None
    return best


def _admit(out: Search, here: Discovery, found: Found, judge: Sampled, level: Level, generator: torch.Generator, point: bool) -> None:
    """Add a structural family at the given weights, with what it explains there."""
    before = len(here.found)
    here._keep(found.entry, 0, found.action)
    if len(here.found) > before:
        if not _certify_entry(out, here, here.found[-1], judge, level, generator, point):
            here.explained = here.explained[:, : -here.found[-1].new]
        return
    outside = here.tangent_error(found.action)
    if outside > 1e-10 and found.entry.algebra != "free":  # an accident of the redrawn weights is no claim about these
        out.refuted.append(
            {
                "name": name_of(found.entry, here.readers),
                "why": f"its tangents leave the null space at these weights (relative part {outside:.1e})",
                "parameters": list(found.entry.parameters),
            }
        )


def _certify_entry(
    out: Search, here: Discovery, found: Found, judge: Sampled, level: Level, generator: torch.Generator, point: bool
) -> bool:
    certificate, radius = certify(found.action, judge, out.graph.params, generator), math.inf
    if point and found.entry.algebra not in _GROUPS:
        certificate, radius = certify_local(found.action, judge, out.graph.params, generator)
    entry = found.entry
    parameters = tuple(found.action.entries) if hasattr(found.action, "entries") and not entry.terms else entry.parameters
    name = name_of(entry, readers(out.graph, stacked=True))
    if not certificate.accepted:
        _reject(out, name, parameters, found.new, certificate, here.tangent_error(found.action))
        return False
    kind: Kind = "point" if point else _KINDS.get(entry.algebra, "linear")
    out.symmetries.append(
        Symmetry(
            name,
            group_of(entry, found.action.dim),
            found.new,
            kind,
            parameters,
            level,
            certificate.residual,
            True,
            found.action,
            where_of(parameters),
            fixed_set=fixed_set_of(entry),
            note="true at these weights only" if point else "",
            radius=radius,
        )
    )
    out.entries.append(entry if entry.terms else None)
    return True


_GROUPS = ("so", "so1")  # where these hold they hold along the whole orbit, also at special weights
_KINDS: dict[str, Kind] = {"free": "pure", "row": "pure", "shift": "translation", "scale": "diagonal"}


def _approximate(
    out: Search, here: Discovery, anywhere: Mapping[str, Tensor], structural: Sequence[Found], judge: Sampled, generator: torch.Generator
) -> None:
    """Families that the eps of a norm breaks: exact without it, nearly so with it."""
    graph = without_eps(out.graph)
    if graph is None:
        return
    try:
        null = null_space(triangular(graph, anywhere, out.batches, here.flat), len(out.batches))
    except InputError:  # a norm of zeros: its eps is what the model lives on
        return
    if null.nullity <= out.generic.nullity:
        return
    relaxed = Discovery(graph, anywhere, null, here.flat, here.places, here.constants, generator)
    for found in structural:
        relaxed._keep(found.entry, 0, found.action)
    known = len(relaxed.found)
    relaxed.run()
    for found in relaxed.found[known:]:
        c = certify(found.action, judge, out.graph.params, generator)
        if ACCEPT < c.residual < _NEARLY and c.moved > 1e-3:
            out.approximate.append(
                {
                    "name": name_of(found.entry, here.readers),
                    "group": group_of(found.entry, found.action.dim),
                    "parameters": list(found.entry.parameters),
                    "dim": found.new,
                    "ratio": here.tangent_error(found.action),
                    "change": c.residual,
                    "why": "exact but for the eps of a norm",
                }
            )


def _reject(out: Search, name: str, parameters: Sequence[str], dim: int, c: Certificate, ratio: float) -> None:
    record = {"name": name, "parameters": list(parameters), "dim": dim}
    if c.residual < 1e-3 and c.moved > 1e-3:
        out.approximate.append(
            {
                **record,
                "ratio": ratio,
                "change": c.residual,
                "why": "holds to first order and up to a small constant (the eps of a norm) under finite elements",
            }
        )
    else:
        out.refuted.append({**record, "why": f"a finite element changes the outputs by {c.residual:.1e} (moved {c.moved:.1e})"})


def _blind(out: Search, here: Discovery, flat: Flat, judge: Sampled, level: Level, generator: torch.Generator) -> None:
    """What closed forms leave: minimal parameter sets, certified by step and retraction."""
    null = out.null.basis
    edges = edge_motion(out.graph, out.graph.params, null, out.batches[: max(1, len(out.batches) // 3)], flat, generator)
    cover = Cover(out.graph, flat, null)
    cover.explained = here.explained
    n = null.shape[1]
    for kind, U in class_subspaces(edges, n).items():
        cover.add_class(kind, U)
    cover.add_class("blind", torch.eye(n, dtype=torch.float64))
    sampled = Sampled.of(out.graph, _enough(out, flat))
    special = out.null.nullity > out.generic.nullity
    for family in cover.families:
        _certify_family(out, family, sampled, judge, flat, level, generator, special)
    left = cover._fresh(torch.eye(n, dtype=torch.float64)).shape[1]
    if left:
        out.undecided.append(
            {"name": "null directions without a family", "why": "no parameter set carries them", "parameters": [], "dim": left}
        )


def _enough(out: Search, flat: Flat) -> list[Batch]:
    """Those batches that add to the rank: a retraction evaluates their Jacobian many times."""
    chosen, basis = [], torch.eye(flat.size, dtype=torch.float64)
    for data in out.batches:
        seen = jacobian(out.graph, out.graph.params, out.graph.prepare(data), flat) @ basis
        unseen = kernel(seen, _SEEN * out.null.scale)
        if unseen.shape[1] < basis.shape[1]:
            chosen.append(data)
            basis = basis @ unseen
        if basis.shape[1] <= out.null.nullity:
            return chosen
    return out.batches


_FIBRE_NAMES = {
    "pure": "directions that no reader sees",
    "translation": "translation of activations",
    "diagonal": "scale of units",
    "linear": "linear map of activations",
    "affine": "affine map of activations",
    "blind": "fibre of an over-complete map",
}


def _certify_family(
    out: Search, family: Family, sampled: Sampled, judge: Sampled, flat: Flat, level: Level, generator: torch.Generator, special: bool
) -> None:
    name = _FIBRE_NAMES[family.kind]
    best: Certificate | None = None
    for names in (family.parameters, tuple(flat.shapes)):  # the fibre may curve out of the smallest set: then all may move
        action = FibreAction(sampled, flat, family.new, names)
        for size in SIZES:
            best = certify_fibre(action, judge, out.graph.params, generator, size)
            if best.accepted:
                break
        if best is not None and best.accepted:
            break
    assert best is not None
    if best.accepted:
        kind: Kind = "point" if special else family.kind
        note = "certified by step and retraction, within the radius"
        note = f"true at these weights and on these inputs; {note}" if special else note
        out.symmetries.append(
            Symmetry(
                name,
                f"R^{family.dim} (fibre)",
                family.dim,
                kind,
                family.parameters,
                level,
                best.residual,
                True,
                action,
                where_of(family.parameters),
                note=note,
                radius=size / MARGIN,
            )
        )
        out.entries.append(None)
        return
    why = f"null to first order, but no finite move was certified (residual {best.residual:.1e}, moved {best.moved:.1e})"
    out.undecided.append({"name": name, "why": why, "parameters": list(family.parameters), "dim": family.dim})


def certify_fibre(
    action: FibreAction, judge: Sampled, params: Mapping[str, Tensor], generator: torch.Generator, size: float
) -> Certificate:
    """One step and retraction: outputs unchanged on the judge's inputs, and the parameters moved the way they were asked to."""
    before = judge.outputs(params)
    residual, cosine = 0.0, 1.0
    tries = [(k, share) for k in range(2) for share in _SHARES]
    directions = torch.randn(2, action.dim, generator=generator, dtype=torch.float64)
    for k, share in tries:
        element = share * size * directions[k] / directions[k].norm()
        new = action.act(params, element)
        residual = max(residual, relative_change(before, judge.outputs({**params, **new})))
        moved = torch.cat([(new[n] - params[n]).reshape(-1) for n in action.names])
        asked = (action.vectors @ element)[action.flat.rows(action.names)]
        cosine = min(cosine, float(moved @ asked / (moved.norm() * asked.norm()).clamp(min=1e-300)))
        if residual > ACCEPT or cosine < 0.9 or float(moved.norm()) < 0.5 * abs(share) * size:
            return Certificate(residual, min(cosine, float(moved.norm() / element.norm())), False, len(tries))
    return Certificate(residual, cosine, True, len(tries))
