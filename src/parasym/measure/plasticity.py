"""Plasticity: whether a network can still learn, and the signs that come before it cannot.

Source: issue of the methods room (revive acts on what is measured here); effective rank as in stochastic-collapse R7.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.functional import float_outputs, functional
from parasym.core.graph import trace
from parasym.core.guards import rng_state
from parasym.core.results import Estimate
from parasym.core.samples import flatten
from parasym.measure.activity import unit_samples
from parasym.measure.judge import Runner
from parasym.measure.neurons import effective_rank
from parasym.measure.units import find_layers
from parasym.symmetry.spaces import find_spaces


@dataclass(frozen=True)
class Signs:
    """One layer of units on a batch.

    Attributes:
        width: units; dormant: share of them whose output does not vary beyond 1e-6 of the median one.
        rank: effective rank of the centred outputs, between 1 and the smaller of units and samples.
        scale: root mean square of the outputs.
    """

    width: int
    dormant: float
    rank: float
    scale: float


def plasticity_signs(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, Signs]:
    """Dormant units and effective rank of every layer on a batch: layer -> `Signs`. The model is not changed."""
    graph = trace(model, args, kwargs)
    out: dict[str, Signs] = {}
    with torch.no_grad(), rng_state():
        layers = find_layers(graph, find_spaces(graph))

        def look(where: str, node: str, axis: int, live: Mapping[str, Any]) -> None:
            rows = unit_samples(live[node], axis)
            spread = rows.amax(1) - rows.amin(1)
            typical = float(spread[spread > 0].median()) if bool((spread > 0).any()) else 1.0
            centred = rows - rows.mean(1, keepdim=True)
            rank = float(effective_rank(centred)) if bool(centred.any()) else 0.0
            out[where] = Signs(len(rows), float((spread <= 1e-6 * typical).double().mean()), rank, float(rows.square().mean().sqrt()))

        watch = []
        for layer in layers:
            g = layer.regions[0]
            watch.append(((g.output.name,), lambda live, w=layer.where, n=g.output.name, a=g.axis: look(w, n, a, live)))
        Runner(graph).run(graph.params, graph.prepare(flatten(graph, args, kwargs)), watch)  # type: ignore[arg-type]
    return out


def plasticity(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    steps: int = 100,
    lr: float = 1e-3,
    tasks: int = 3,
    seed: int = 0,
) -> Estimate:
    """How well a copy of the model learns random targets, beside a copy with fresh weights: 1 as well, 0 not at all.

    Each task asks for fixed Gaussian targets of the outputs' shape on the given inputs, learned by Adam on the mean squared error; the
    measure is the mean log-decrease of the error of the model over that of a copy whose modules were reset (``reset_parameters``).

    Args:
        args, kwargs: a batch.
        steps, lr: of Adam. tasks: random targets. seed: of targets and fresh weights.

    Returns:
        The ratio, with its standard error over the tasks.

    Raises:
        InputError: nothing in the model can be reset, or fewer than two tasks.
    """
    if tasks < 2:
        raise InputError(f"tasks must be at least 2 for a standard error, got {tasks}.")
    plain = functional(model).model
    worn, ours = list[float](), list[float]()
    with rng_state(), torch.enable_grad():
        for task in range(tasks):
            torch.manual_seed(seed + task)
            fresh = copy.deepcopy(plain)
            reset = [m for m in fresh.modules() if callable(getattr(m, "reset_parameters", None))]
            if not reset:
                raise InputError(f"{type(plain).__name__} has no module with reset_parameters(): there is nothing fresh to compare with.")
            for m in reset:
                m.reset_parameters()  # type: ignore[operator]
            targets: list[Tensor] = []
            for net, into in ((copy.deepcopy(plain), ours), (fresh, worn)):
                into.append(_learn(net, args, kwargs, targets, steps, lr))
    ratio = torch.tensor([a / b if b > 0 else 0.0 for a, b in zip(ours, worn, strict=True)], dtype=torch.float64)
    note = "the fresh copy does not learn either: more steps or another rate" if min(worn) <= 0 else ""
    status = "not_converged" if note else "ok"
    return Estimate(float(ratio.mean()), stderr=float(ratio.std() / tasks**0.5), status=status, note=note, details={"decrease": ours})  # type: ignore[arg-type]


def _learn(net: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, targets: list[Tensor], steps: int, lr: float) -> float:
    """log of the error at the start over that at the end."""
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer, first, error = torch.optim.Adam(params, lr=lr), 0.0, 0.0
    for step in range(steps + 1):
        out = float_outputs(net(*args, **dict(kwargs or {})))
        if not targets:
            targets.extend(torch.randn(o.shape, dtype=torch.float64).to(o) for o in out)
        # the targets' offset is free: what is asked for is their shape
        loss = torch.stack([((o - o.mean()) - (t - t.mean())).square().mean() for o, t in zip(out, targets, strict=True)]).mean()
        error = float(loss.detach())
        first = error if step == 0 else first
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(torch.tensor(first / max(error, 1e-300)).log())
