"""Where no small twin of a whole model can be made: its blocks are searched one by one.

A symmetry of the function that a sub-module computes, on parameters that nothing else reads, is a symmetry of every model that
holds the sub-module. What moves two blocks at once (a residual stream, a writer against a reader elsewhere) is not seen this way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from parasym.core.errors import ParasymError
from parasym.core.graph import Graph
from parasym.core.guards import preserve
from parasym.symmetry.symmetry import Action, FixedSet, Params, Symmetry, SymmetrySet

Solve = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], SymmetrySet]
ACROSS = "searched block by block, for no twin of the whole model could be made: symmetries that move several blocks at once are not seen"


@dataclass(frozen=True)
class Call:
    """The first call of a sub-module: its arguments, floating-point tensors as shapes only (on the meta device)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Renamed:
    """An action of a block on the parameters of the whole model.

    Attributes:
        names: parameter of the block -> parameter of the model.
    """

    action: Action
    names: Mapping[str, str]
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        self.dim = self.action.dim

    def _inner(self, params: Params) -> dict[str, Tensor]:
        return {short: params[full] for short, full in self.names.items() if full in params}

    def _outer(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.names[short]: t for short, t in found.items() if short in self.names}

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        return self._outer(self.action.act(self._inner(params), element))

    def generators(self, params: Params) -> dict[str, Tensor]:
        return self._outer(self.action.generators(self._inner(params)))

    def charge(self, params: Params) -> Tensor | None:
        charge = getattr(self.action, "charge", None)
        return charge(self._inner(params)) if charge is not None else None

    def fixed(self, found: FixedSet) -> FixedSet:
        """The fixed set of the block's symmetry, as a function of the model's parameters."""
        return replace(
            found,
            distance=lambda params: found.distance(self._inner(params)),
            project=lambda params, index: self._outer(found.project(self._inner(params), index)),
        )


def by_blocks(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, graph: Graph, solve: Solve) -> SymmetrySet:
    """The symmetries within each block of a model, in the names of its graph; blocks that are alike are solved once.

    Args:
        graph: of the whole model.
        solve: finds the symmetries of one block from its module and example arguments.

    Returns:
        the families that are about the architecture; what a block's own weights add, and what could not be searched, is
        undecided with the reason.
    """
    calls = record(model, tuple(args), dict(kwargs or {}))
    known: dict[Any, SymmetrySet | str] = {}
    found = SymmetrySet((), (), ({"name": "across blocks", "why": ACROSS, "parameters": [], "dim": 0},))
    for name, block in _outermost(model, calls):
        call = calls.get(name)
        key = _likeness(block, call)
        if key not in known:
            known[key] = _solved(block, call, solve)
        solved = known[key]
        names = {n: graph.aliases.get(f"{name}.{n}", f"{name}.{n}") for n, _ in block.named_parameters()}
        found = _joined(found, name, names, solved, _read_elsewhere(graph, name))
    return found


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    """The first call of every sub-module, by name; the model is left as it was."""
    calls: dict[str, Call] = {}
    hooks = []
    for name, module in model.named_modules():
        if module is not model:

            def note(_: nn.Module, given: Any, named: Any, name: str = name) -> None:
                calls.setdefault(name, Call(*pytree.tree_map_only(Tensor, _shape_of, (tuple(given), dict(named)))))

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with preserve(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for h in hooks:
            h.remove()
    return calls


def _shape_of(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta") if t.is_floating_point() else t.detach().clone()


def _outermost(model: nn.Module, calls: Mapping[str, Call], prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The outermost sub-modules that are called and hold parameters; containers that are never called are opened."""
    out: list[tuple[str, nn.Module]] = []
    for short, child in model.named_children():
        name = f"{prefix}.{short}" if prefix else short
        if next(child.parameters(), None) is None:
            continue
        if name in calls or next(child.children(), None) is None:
            out.append((name, child))
        else:
            out += _outermost(child, calls, name)
    return out


def _likeness(block: nn.Module, call: Call | None) -> Any:
    """Equal for blocks that compute the same function of their parameters, as far as their print and their shapes tell."""
    shapes = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
    leaves = pytree.tree_leaves((call.args, call.kwargs)) if call else []
    given = tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves)
    return type(block), repr(block), shapes, given


def _solved(block: nn.Module, call: Call | None, solve: Solve) -> SymmetrySet | str:
    if call is None:
        return "the model reads its parameters without calling it"
    tensors = [a for a in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(a, Tensor)]
    if not tensors:
        return "it is called without a tensor"
    args, kwargs = pytree.tree_map_only(Tensor, _drawn, (call.args, call.kwargs))
    try:
        return solve(block, args, kwargs)
    except ParasymError as error:
        return f"it could not be searched by itself: {error}"


def _drawn(t: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(t.numel())
    return torch.randn(t.shape, generator=generator).to(t.dtype) if t.device.type == "meta" else t


def _read_elsewhere(graph: Graph, block: str) -> set[str]:
    """Parameters that an operator outside a block reads."""
    out: set[str] = set()
    for n in graph.nodes:
        stack = [str(v[0]).split("@")[0] for v in (n.meta.get("nn_module_stack") or {}).values()]  # "name@1" is a second call
        if block not in stack:
            out |= {graph.holders[a.name] for a in n.all_input_nodes if a.name in graph.holders}
    return out


def _joined(found: SymmetrySet, block: str, names: Mapping[str, str], solved: SymmetrySet | str, elsewhere: set[str]) -> SymmetrySet:
    """What was found so far, with one block's symmetries in the model's names."""
    undecided: list[dict[str, Any]] = []
    lifted: list[Symmetry] = []
    if isinstance(solved, str):
        undecided.append({"name": block, "why": solved, "parameters": sorted(set(names.values())), "dim": 0})
        return replace(found, undecided=(*found.undecided, *undecided))
    for s in solved:
        moved = tuple(names[p] for p in s.parameters)
        if any(p in elsewhere for p in moved):
            why = "it moves a parameter that the model also reads outside this block"
            undecided.append({"name": s.name, "why": why, "parameters": list(moved), "dim": s.dim})
            continue
        if s.kind == "point" or "fibre" in s.group:
            why = "it was found at the block's own weights, which at full size are others"
            undecided.append({"name": s.name, "why": why, "parameters": list(moved), "dim": s.dim})
            continue
        action = Renamed(s.action, names)
        note = "; ".join(x for x in (s.note, f"found within {block}") if x)
        fixed = action.fixed(s.fixed_set) if s.fixed_set else None
        lifted.append(replace(s, parameters=moved, action=action, where=f"{block}.{s.where}".strip("."), fixed_set=fixed, note=note))
    rename = lambda r: {**r, "parameters": [names.get(p, p) for p in r.get("parameters", ())]}  # noqa: E731
    return SymmetrySet(
        (*found.symmetries, *lifted),
        (*found.refuted, *map(rename, solved.refuted)),
        (*found.undecided, *undecided, *map(rename, solved.undecided)),
        (*found.approximate, *map(rename, solved.approximate)),
        found.rest,
    )
