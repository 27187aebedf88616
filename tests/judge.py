"""An independent judge: the user's own module, called with moved parameters in float64, without the traced graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from parasym.symmetry.symmetry import Symmetry
from test_known_answers_oracle import LiftCasts, trainable, without_running_statistics

Params = dict[str, Tensor]


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy whose train-mode batch norms keep no state."""
    return without_running_statistics(copy.deepcopy(model)).double()


def outputs(model: nn.Module, params: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """All floating-point outputs of ``model`` (float64) at the given parameters, flattened."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (tuple(args), dict(kwargs or {})))
    with sdpa_kernel(SDPBackend.MATH), LiftCasts():
        out = functional_call(model, dict(params), args, kwargs)
    return torch.cat([t.reshape(-1) for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()])


def is_structural(symmetry: Symmetry) -> bool:
    """Whether the claim is about the architecture, so that it must hold at any parameters."""
    return symmetry.kind != "point" and "fibre" not in symmetry.group


def elsewhere(params: Mapping[str, Tensor], generator: torch.Generator) -> Params:
    """Other parameters of the same size, none of them zero."""
    out = {}
    for name, p in params.items():
        scale = float(p.square().mean().sqrt()) if p.numel() else 1.0
        out[name] = p + 0.4 * max(scale, 0.1) * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return out


def change(
    model: nn.Module,
    symmetry: Symmetry,
    inputs: Sequence[Sequence[Any]],
    generator: torch.Generator,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[float, float]:
    """(relative change of the outputs, relative size of the move) under one fresh element.

    Structural families are tried at fresh parameters, the others where they were found, within their radius.
    """
    model = in_float64(model)
    params: Params = trainable(model)
    if is_structural(symmetry):
        params = elsewhere(params, generator)
    element = symmetry.random_element(generator, scale=0.4)
    moved = symmetry.act(params, element)
    with torch.no_grad():
        before = torch.cat([outputs(model, params, args, kwargs) for args in inputs])
        after = torch.cat([outputs(model, moved, args, kwargs) for args in inputs])
    size = max((float((moved[n] - p).norm() / p.norm().clamp(min=1e-9)) for n, p in params.items() if p.numel()), default=0.0)
    return float((after - before).abs().max() / before.abs().max()), size
