"""What each charge's symmetry demands of the gradient and the Hessian, checked on a user's own loss and batch.

I1: <A theta, g> = 0; I2: H A theta + A g = 0 (H a = 0 for a translation), for every element of the family at once: a random element
of the algebra is pushed through one gradient and one Hessian-vector product (neural-mechanics R1, R2). A residual at round-off says
the symmetry holds for this loss; up to 1e-4, that it holds up to the eps of a norm; above, that it is broken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parasym.core.guards import preserve, rng_state
from parasym.core.results import Estimate
from parasym.laws.charges import Charge
from parasym.measure.gradients import Objective
from parasym.measure.identities import dot, hvp

APPROXIMATE = 1e-4


def tangent(charge: Charge, at: Mapping[str, Tensor], element: Tensor) -> dict[str, Tensor]:
    """sum lam A at (or the translation): the derivative of ``charge.act`` at the identity along ``element``, of the charge's shape."""
    names = {n: at[n] for n in charge.parameters}
    if charge.kind == "linear":
        return charge.act({n: torch.zeros_like(p) for n, p in names.items()}, element)
    total = {n: torch.zeros_like(p) for n, p in names.items()}
    for block in charge.blocks:  # a parameter may be met by several blocks: their moves add up
        single = Charge(charge.name, charge.kind, (block,), charge.count, charge.size)
        for n, v in single.multiply(names, lambda weight: weight * element).items():
            kept = single.multiply(names, lambda weight: torch.zeros_like(element))
            total[n] = total[n] + v - kept[n]
    return total


def _element(charge: Charge, seed: int) -> Tensor:
    lam = torch.randn(charge.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.5 * (lam + lam.mT) if charge.kind == "matrix" else lam


def gradient_geometry(objective: Objective, batch: Any, charges: Sequence[Charge], *, seed: int = 0) -> list[Estimate]:
    """I1 for each charge: |<A theta, g>| / (|A theta| |g|), g on the parameters of the charge; one gradient for all of them.

    Returns:
        value = the residual; ``ok`` at round-off (1e4 eps), ``violated`` above, with the note "approximate" up to 1e-4; ``not_applicable``
        where a parameter is frozen or the gradient vanishes.
    """
    g = _gradient(objective, batch)
    return [_judge(objective, c, *_first(objective, c, g, seed), "neural-mechanics R1") for c in charges]


def hessian_geometry(objective: Objective, batch: Any, charges: Sequence[Charge], *, seed: int = 0) -> list[Estimate]:
    """I2 for each charge: |H A theta + A g| / (|H A theta| + |A g|) (over |H v| |a| / |v|, v random, for a translation); one HVP each.

    Returns as `gradient_geometry`.
    """
    g = _gradient(objective, batch)
    probe = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(p) for n, p in g.items()}

    def function(params: Mapping[str, Tensor]) -> Tensor:
        return objective(params, batch).reshape(())

    out = []
    with rng_state(), preserve(objective.model):
        usual = _norm(hvp(function, objective.params, probe)) / _norm(probe)
        for c in charges:
            if any(n not in objective.params for n in c.parameters):
                out.append(_judge(objective, c, 0.0, 0.0, "neural-mechanics R2"))
                continue
            lam = _element(c, seed)
            along = tangent(c, objective.params, lam)
            curved = hvp(function, objective.params, along)
            turned = tangent(c, g, lam) if c.kind != "linear" else {}
            gap = {n: curved[n] + turned.get(n, torch.zeros_like(curved[n])) for n in curved}
            scale = usual * _norm(along) + (_norm(turned) if turned else 0.0)
            out.append(_judge(objective, c, float(_norm(gap)), float(scale), "neural-mechanics R2"))
    return out


def _gradient(objective: Objective, batch: Any) -> dict[str, Tensor]:
    with torch.enable_grad(), rng_state(), preserve(objective.model):
        leaves = {n: p.detach().requires_grad_() for n, p in objective.params.items()}
        found = torch.autograd.grad(objective(leaves, batch).reshape(()), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _first(objective: Objective, c: Charge, g: Mapping[str, Tensor], seed: int) -> tuple[float, float]:
    if any(n not in objective.params for n in c.parameters):
        return 0.0, 0.0
    along = tangent(c, objective.params, _element(c, seed))
    own = {n: g[n] for n in along}
    return float(dot(along, own).abs()), float(_norm(along) * _norm(own))


def _judge(objective: Objective, c: Charge, gap: float, scale: float, ref: str) -> Estimate:
    missing = [n for n in c.parameters if n not in objective.params]
    if missing:
        return Estimate(None, status="not_applicable", note=f"{missing[0]} is frozen: the orbit leaves the trained parameters", refs=(ref,))
    if scale <= 0:
        return Estimate(None, status="not_applicable", note="the gradient or the tangent vanishes here", refs=(ref,))
    value = gap / scale
    limit = 1e4 * max(torch.finfo(objective.params[n].dtype).eps for n in c.parameters)
    if value <= limit:
        return Estimate(value, residual=value, refs=(ref,))
    note = "approximate: holds up to the eps of a norm, or to round-off" if value <= APPROXIMATE else "broken on this loss"
    return Estimate(value, residual=value, status="violated", note=note, refs=(ref,))


def _norm(x: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([v.double().square().sum() for v in x.values()]).sum().sqrt()
