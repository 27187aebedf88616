"""The step size below which a layer's neurons cannot merge, and a schedule that stays below it first.

Source: topological-invariance R2-R4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.core.graph import trace
from parasym.core.guards import preserve
from parasym.core.results import Estimate
from parasym.measure.topology import critical_rate
from parasym.measure.units import find_layers
from parasym.symmetry.spaces import find_spaces


def topological_critical_lr(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    where: str,
    nodes: int = 6,
    pairs: int = 64,
    iterations: int = 20,
    generator: torch.Generator | None = None,
) -> Estimate:
    """eta* = 1 / K of one layer at the model's present weights: below it a step of gradient descent keeps all its neurons apart.

    Args:
        loss: what the model returns -> the loss on ``args``, labels closed over.
        where: module path of what writes the layer, as the audit gives it. Everything that belongs to a unit is its state.
        nodes, pairs, iterations, generator: see `parasym.measure.topology.critical_rate`.

    Returns:
        The learning rate of plain descent on that loss (a mean over the batch stays a mean). It is local: ask again as training goes on.

    Raises:
        InputError: no such layer, or its units do not show in the weights.

    Source: topological-invariance R2.
    """
    f = functional(model).to(torch.float64)
    graph = trace(f.model, args, kwargs)
    layers = {layer.where: layer for layer in find_layers(graph, find_spaces(graph))}
    if where not in layers or not layers[where].rows:
        raise InputError(f"no layer {where!r} whose units show in the weights; there are {', '.join(map(repr, layers)) or 'none'}.")
    layer = layers[where]
    places = [(p, axis, at) for p, (axis, at) in layer.rows.items()] + [(u.reader.weight, u.reader.in_axis, u.columns) for u in layer.uses]
    parts = [f.params[p].movedim(axis, 0)[at].reshape(layer.size, -1) for p, axis, at in places]
    widths = [part.shape[1] for part in parts]

    def value(cloud: Tensor) -> Tensor:
        params: dict[str, Tensor] = {}
        for (p, axis, at), part in zip(places, cloud.split(widths, 1), strict=True):
            rows = params.get(p, f.params[p]).movedim(axis, 0)
            params[p] = rows.index_copy(0, at.reshape(-1), part.reshape(at.numel(), *rows.shape[1:])).movedim(0, axis)
        return loss(f.output(params, tuple(args), dict(kwargs or {}))).reshape(())

    with preserve(f.model):
        return critical_rate(value, torch.cat(parts, 1), nodes=nodes, pairs=pairs, iterations=iterations, generator=generator)


def two_phase_lr(optimizer: torch.optim.Optimizer, low: float, high: float, switch: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule that keeps the cloud of neurons whole first and lets it simplify later: ``low`` for ``switch`` steps, then ``high``.

    Args:
        low: below eta* (`topological_critical_lr`); high: above it, and below 2 / lambda_max.

    Raises:
        InputError: rates that are not positive, or low above high.
    """
    if not 0 < low <= high or switch < 0:
        raise InputError(f"need 0 < low <= high and switch >= 0, got low={low}, high={high}, switch={switch}.")
    bases = [float(group["lr"]) for group in optimizer.param_groups]
    if any(b <= 0 for b in bases):
        raise InputError("every parameter group needs a positive learning rate.")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step, b=b: (low if step < switch else high) / b for b in bases])  # type: ignore[misc]
