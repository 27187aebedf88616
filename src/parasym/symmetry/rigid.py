"""What a parameter is when no certified symmetry moves it: proven rigid, or undecided with the reason.

Rigid means: no null direction of the Jacobian moves it, so no continuous symmetry does, known or not; and every exchange and sign
of its units that the index spaces allow was refuted. At full size the proof is that of its counterpart in the twin, at weights in
general position. Undecided is the default: a parameter about which nothing was proven is never called rigid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from parasym.core.graph import Graph
from parasym.symmetry import axes as ax
from parasym.symmetry.search import Search
from parasym.symmetry.spaces import Spaces
from parasym.symmetry.symmetry import Classified
from parasym.symmetry.tangent import flat_of

_MOVES = 1e-7  # entries of an orthonormal null basis: what does not move has 1e-15, what does has more than 1e-5


def at_rest(found: Search, undecided: Iterable[Mapping[str, Any]] = ()) -> dict[str, Classified]:
    """Each parameter of a searched graph, if no certified symmetry moves it.

    Args:
        found: a search of the whole graph; its null space is that of all parameters.
        undecided: records of the discrete stage.
    """
    flat, null = flat_of(found.graph), found.null
    motion = null.basis.norm(dim=1)
    rank = flat.size - null.nullity
    named: dict[str, str] = {}
    for r in (*undecided, *found.undecided):
        for p in r.get("parameters", ()):
            named.setdefault(p, f"{r['name']}: {r.get('why') or r.get('reason', '')}")
    out = {}
    for name, s in flat.slices.items():
        size = s.stop - s.start
        if size and null.nullity and float(motion[s].max()) > _MOVES:
            what = named.get(name, "no family in closed form carries it")
            out[name] = Classified("undecided", size, f"a null direction of the Jacobian moves it that is not certified ({what})")
        elif name in named:
            out[name] = Classified("undecided", size, named[name])
        elif (node := _without_rule(found.spaces, name)) is not None:
            out[name] = Classified("undecided", size, _NO_RULE.format(node))
        else:
            proof = f"no null direction of the Jacobian moves it (rank {rank} of {flat.size}), and no exchange or sign of its units holds"
            out[name] = Classified("rigid", size, proof)
    return out


def at_full_size(spaces: Spaces, names: Mapping[str, str], twin: Mapping[str, Classified]) -> dict[str, Classified]:
    """Each parameter of a large model, from its counterpart in the twin.

    Args:
        spaces: index spaces of the large model.
        names: its parameters -> those of the twin.
        twin: the twin's parameters by :func:`at_rest`.
    """
    out = {}
    for name, p in spaces.graph.params.items():
        node = _without_rule(spaces, name)
        if names.get(name) not in twin:
            out[name] = Classified("undecided", p.numel(), "it has no counterpart in the twin")
        elif node is not None:
            out[name] = Classified("undecided", p.numel(), _NO_RULE.format(node))
        else:
            there = twin[names[name]]
            where = "in the twin " if there.kind == "rigid" else "in the twin, "
            out[name] = replace(there, size=p.numel(), why=where + there.why)
    return out


def nowhere(graph: Graph, why: str) -> dict[str, Classified]:
    """Every parameter undecided, for one reason."""
    return {name: Classified("undecided", p.numel(), why) for name, p in graph.params.items()}


_NO_RULE = "the index spaces stop at {}, for which there is no rule: exchanges and signs of its units were not looked for"


def _without_rule(spaces: Spaces, name: str) -> str | None:
    """An operator without an index rule that a parameter's axes run into."""
    if name not in spaces._by_tensor:
        return None
    for axis in spaces._by_tensor[name]:
        for leaf in ax.leaves(axis):
            if leaf.size > 1 and (leaf.frozen or "").startswith("no index rule"):
                return str(leaf.frozen).removeprefix("no index rule for ")
    return None
