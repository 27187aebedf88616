"""Upstream starts: early layers made small and the last one large, or the reverse, without changing the function (get-rich-quick).

The move is one along the exact rescaling symmetries of the traced network (`parasym.symmetry.quasi`), so it needs no rule about layers.
With ReLU an upstream start turns activation patterns early and learns features fast; in a linear network it is lazy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.methods.edit import Edit, output_change
from parasym.methods.state import linear_transport
from parasym.symmetry.quasi import exponents


def upstream(model: nn.Module, args: Sequence[Any] | Tensor, tau: float, kwargs: Mapping[str, Any] | None = None) -> Edit:
    """Plan W_l -> W_l / tau for every layer but the last, W_D -> tau^(D-1) W_D, with biases moved so that the function stays.

    Args:
        model: a chain of layers with activations of degree one between them (linear, ReLU, leaky ReLU, pooling). Its matrices and kernels
            are counted in the order of its parameters.
        args, kwargs: example arguments.
        tau: > 1 upstream, < 1 downstream.

    Returns:
        an `Edit` with the certificate that no output changes; apply it before training, or with the optimiser during it. Adam's steps do
        not scale with the gradient, so unbalanced layers act differently under it.

    Raises:
        InputError: tau is not positive, there are fewer than two layers, or no rescaling symmetry makes this move (a norm layer, a
            smooth activation or a skip connection lies between).
    """
    if not (tau > 0 and math.isfinite(tau)):
        raise InputError(f"tau must be a positive number, got {tau!r}")
    inputs = (args,) if isinstance(args, Tensor) else tuple(args)
    found = exponents(model, inputs, kwargs)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    layers = [n for n, p in params.items() if p.ndim > 1]
    if len(layers) < 2:
        raise InputError(f"an upstream start needs at least two layers, found {len(layers)}")
    wanted = torch.tensor([-1.0] * (len(layers) - 1) + [len(layers) - 1.0], dtype=torch.float64)
    if found.null:
        rows = torch.stack([torch.stack([null.get(n, torch.zeros((), dtype=torch.float64)) for null in found.null]) for n in layers])
        mix = torch.linalg.lstsq(rows, wanted[:, None], driver="gelsd").solution[:, 0]
        missed = float((rows @ mix - wanted).norm())
    if not found.null or missed > 1e-6:
        raise InputError(
            "no rescaling symmetry scales the layers that way: a norm layer, an activation that is not of degree one, or a skip connection "
            "lies between them. exponents(model, args).null lists the rescalings there are."
        )
    names = [n for n in params if any(n in null for null in found.null)]
    factor = {n: math.exp(math.log(tau) * float(sum(z * null[n] for z, null in zip(mix, found.null, strict=True)))) for n in names}
    factor = {n: f for n, f in factor.items() if abs(f - 1) > 1e-12}
    after = {n: params[n] * f for n, f in factor.items()}
    certificate = output_change(model, after, [(inputs, dict(kwargs or {}))], within=1e-6 if _single(params) else 1e-12)
    transport = linear_transport(lambda moved: {n: v / factor[n] for n, v in moved.items()}, after, monomial=True)
    return Edit("upstream", model, after, certificate, transport, summary={"tau": tau, "factors": factor})


def _single(params: Mapping[str, Tensor]) -> bool:
    return any(p.dtype != torch.float64 for p in params.values())
