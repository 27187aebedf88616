"""What a change of parameters does to the outputs: the live part of a graph run again, and digits kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parasym.core.graph import Graph
from parasym.core.samples import Batch
from parasym.symmetry.spaces import live_nodes
from parasym.symmetry.symmetry import Params

_KEEP = 1 << 26  # activations kept (in numbers) to re-evaluate only what a removal can change


Watch = tuple[tuple[str, ...], Callable[[Mapping[str, Any]], None]]
Swap = dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Tensor]]]


class Runner:
    """Evaluates the live part of a graph and lets go of activations that nothing reads any more."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        live = live_nodes(graph)
        self.order = [n for n in graph.nodes if n.name in live]
        self.place = {n.name: i for i, n in enumerate(self.order)}
        self.last = {n.name: max((self.place[u.name] for u in n.users if u.name in live), default=i) for i, n in enumerate(self.order)}
        self.active = [n.name for n in self.order if graph.kind.get(n.name) == "active"]

    @property
    def numbers(self) -> int:
        """Size of all activations of one batch."""
        values = (n.meta.get("val") for n in self.order if self.graph.kind.get(n.name) == "active")
        return sum(v.numel() for v in values if isinstance(v, Tensor))

    def below(self, names: Iterable[str]) -> set[str]:
        """Nodes that depend on any of the given ones, with these."""
        out = set(names)
        for n in self.order:
            if n.name not in out and any(a.name in out for a in n.all_input_nodes):
                out.add(n.name)
        return out

    def run(
        self,
        params: Params,
        env: Mapping[str, Any],
        watch: Sequence[Watch] = (),
        swap: Swap | None = None,
        base: Mapping[str, Any] | None = None,
        dirty: set[str] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Outputs, flattened and concatenated, and (with ``keep``) every value.

        Args:
            watch: (nodes, what to call with their values); called as soon as the last of them is known.
            swap: node -> (other nodes needed, what to put in the place of its value).
            base, dirty: values of an earlier run and the nodes that must be evaluated again.
        """
        last = dict(self.last)
        due: dict[int, list[Callable[[Mapping[str, Any]], None]]] = {}
        for names, call in watch:
            at = max(self.place[n] for n in names)
            due.setdefault(at, []).append(call)
            for n in names:
                last[n] = max(last[n], at)
        for name, (needs, _) in (swap or {}).items():
            last |= {a: max(last[a], self.place[name]) for a in needs}
        for name in self.graph.outputs:
            last[name] = len(self.order)
        release: dict[int, list[str]] = {}
        for name in self.active:
            release.setdefault(last[name], []).append(name)
        live: dict[str, Any] = dict(env)
        for holder, name in self.graph.holders.items():
            live[holder] = params[name]
        old = base if base is not None and dirty is not None else {}
        for i, node in enumerate(self.order):
            if node.name not in live:
                clean = node.name in old and node.name not in (dirty or ())
                live[node.name] = old[node.name] if clean else self.graph._evaluate(node, live)
            if swap and node.name in swap:
                live[node.name] = swap[node.name][1](live)
            for call in due.get(i, ()):
                call(live)
            if not keep:
                for name in release.get(i, ()):
                    live.pop(name, None)
        return torch.cat([live[o].reshape(-1) for o in self.graph.outputs]), live


class Judge:
    """Compares outputs of changed parameters with those of the original ones, in float64."""

    def __init__(self, runner: Runner, params: Params, given: Sequence[Batch], fresh: Sequence[Batch]) -> None:
        self.runner, self.params = runner, params
        room = _KEEP // max(1, runner.numbers)
        self.cases: list[tuple[bool, dict[str, Any], dict[str, Any] | None, Tensor]] = []
        for i, batch in enumerate([*given, *fresh]):
            env = runner.graph.prepare(batch)
            out, values = runner.run(params, env, keep=i < room)
            self.cases.append((i < len(given), env, values if i < room else None, out))

    def look(self, watch: Sequence[Watch], case: int = 0) -> None:
        """Show activations of one batch, by default the first given one."""
        _, env, values, _ = self.cases[case]
        if values is None:
            self.runner.run(self.params, env, watch)
        else:
            for _, call in watch:
                call(values)

    def digits(self, changed: Params, swap: Swap | None = None) -> tuple[float, float]:
        """-log10 of the largest relative change of the outputs, at most 16: on given and on fresh data."""
        graph, worst = self.runner.graph, [0.0, 0.0]
        dirty = self.runner.below([h for h, n in graph.holders.items() if n in changed] + list(swap or {}))
        for given, env, values, before in self.cases:
            after, _ = self.runner.run({**self.params, **changed}, env, swap=swap, base=values, dirty=dirty)
            change = float((after - before).abs().max()) / (float(before.abs().max()) + 1e-300)
            worst[not given] = max(worst[not given], change if change == change else math.inf)
        return _digits(worst[0]), _digits(worst[1])


def _digits(change: float) -> float:
    return 0.0 if math.isinf(change) else max(0.0, -math.log10(max(change, 1e-16)))
