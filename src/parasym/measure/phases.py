"""Phase transitions of a training minimum: adiabatic sweeps of a control, and the order of the transition they show.

A sweep that starts each run where the last one ended follows a branch and shows hysteresis; the two directions together tell a
first-order transition (a jump, at different places) from a continuous one (a kink) and from none (exact-phase-transitions R7, R10).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate, plain
from parasym.solvable.engines import Params, hessian, norm, settle, stack, sweep

Order = Literal["none", "first", "second"]


@dataclass(frozen=True, eq=False)
class PhaseCurve:
    """One branch, in increasing control.

    Attributes:
        control: (m,) values of the control.
        order_parameter: (m,) what vanishes in the trivial phase.
        loss: (m,) minima.
        norm2: (m,) squared norm of all weights: dL/d(decay), so its jump is a latent heat and its kink a second-order transition.
        direction: "up" or "down", the order in which the control was run through.
    """

    control: Tensor
    order_parameter: Tensor
    loss: Tensor
    norm2: Tensor
    direction: Literal["up", "down"]

    def to_dict(self) -> Mapping[str, Any]:
        """Plain data."""
        return {name: plain(value) for name, value in vars(self).items()}


def phase_sweep(
    loss: Callable[[Params, float], Tensor],
    order_parameter: Callable[[Params], Tensor],
    controls: Sequence[float],
    theta: Params,
    *,
    direction: Literal["up", "down"] = "up",
    kick: float = 1e-3,
    seed: int = 0,
) -> PhaseCurve:
    """Follow the local minimum of ``loss(theta, control)`` through the controls, each started from the last end plus ``kick`` x N(0, 1)
    (a state at a saddle would stay there without).

    Args:
        controls: in any order; they are run through up or down as ``direction`` says.
        theta: where the first run starts.

    Raises:
        InputError: fewer than two controls, or some that are equal or not finite.
    """
    values = sorted(float(c) for c in controls)
    if len(values) < 2 or len(set(values)) < len(values) or not all(map(math.isfinite, values)):
        raise InputError(f"a sweep needs at least two different finite controls, got {list(controls)}")
    draws = torch.Generator().manual_seed(seed)

    def solve(control: float, start: Params) -> Params:
        kicked = {name: w + kick * torch.randn(w.shape, generator=draws, dtype=w.dtype) for name, w in start.items()}
        return settle(lambda w: loss(w, control), kicked)

    ends = sweep(solve, values if direction == "up" else values[::-1], theta)
    if direction == "down":
        ends = ends[::-1]
    states = stack(ends)
    with torch.no_grad():
        losses = torch.stack([loss(end, c) for end, c in zip(ends, values, strict=True)])
        order = torch.stack([torch.as_tensor(order_parameter(end), dtype=torch.float64) for end in ends])
        squares = torch.stack([norm({name: w[k] for name, w in states.items()}).square() for k in range(len(ends))])
    return PhaseCurve(torch.tensor(values, dtype=torch.float64), order, losses, squares, direction)


def classify(up: PhaseCurve, down: PhaseCurve, *, jump: float = 0.1, zero: float = 1e-3) -> Estimate:
    """Order of the transition two branches show (R10): 1 (hysteresis wider than two steps and a jump of more than ``jump`` of the largest
    order parameter), 2 (the order parameter vanishes within the sweep on both branches at once), 0 (it does not vanish: none).

    Returns:
        value 0, 1 or 2; details: word, hysteresis (steps), jump (share), critical (last control with a living order parameter, each
        branch), and for second order the exponent q of order parameter ~ (critical - control)^q.

    Raises:
        InputError: the branches are not on the same controls.
    """
    if up.control.shape != down.control.shape or not torch.equal(up.control, down.control):
        raise InputError("the two branches must be on the same controls")
    top = float(torch.maximum(up.order_parameter.abs().max(), down.order_parameter.abs().max()))
    if top == 0:
        return Estimate(None, status="not_applicable", note="the order parameter is zero everywhere: nothing to classify")
    living = [branch.order_parameter.abs() > zero * top for branch in (up, down)]
    ends = [int(torch.nonzero(row).max()) if bool(row.any()) else -1 for row in living]
    steps = [float((branch.order_parameter.diff().abs() / top).max()) for branch in (up, down)]
    critical = [float(up.control[end]) if end >= 0 else math.nan for end in ends]
    details: dict[str, Any] = {"hysteresis": ends[0] - ends[1], "jump": max(steps), "critical": critical}
    if all(end == len(up.control) - 1 for end in ends):
        return Estimate(0.0, details={**details, "word": "none"})
    if ends[0] - ends[1] > 2 and max(steps) > jump:
        return Estimate(1.0, details={**details, "word": "first"})
    return Estimate(2.0, details={**details, "word": "second", "exponent": _exponent(up, ends[0])})


def origin_curvature(loss: Callable[[Params], Tensor], like: Params) -> Estimate:
    """Smallest Hessian eigenvalue of a loss at zero weights: negative, the origin repels; positive, small starts are held there
    (deep-linear-exact R5, R6). Dense, for a few hundred parameters.

    Args:
        like: weights whose shapes are used.

    Raises:
        InputError: the gradient at zero is not zero, so that the origin is no stationary point (a bias that predicts a mean, say).
    """
    zero = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in like.items()}
    slope = max(float(g.abs().max()) for g in torch.func.grad(loss)(zero).values())
    if slope > 1e-8:
        raise InputError(f"zero weights are no stationary point: the gradient there is {slope:.3g}; centre the targets or leave biases out")
    return Estimate(float(torch.linalg.eigvalsh(hessian(loss, zero))[0]), residual=slope, refs=("deep-linear-exact R5, R6",))


def layer_balance(layers: Sequence[Tensor], decay: Sequence[float] | float) -> Estimate:
    """gamma_i |W_i|^2 of a chain of layers whose function only depends on the product of their scales (linear or ReLU, no biases): all
    equal at every stationary point under L2 (deep-linear-exact R2).

    Returns:
        the (layers,) products; details["spread"]: (largest - smallest) / largest.

    Raises:
        InputError: not one decay for each layer.
    """
    rates = [float(decay)] * len(layers) if isinstance(decay, int | float) else [float(d) for d in decay]
    if len(rates) != len(layers) or not layers:
        raise InputError(f"{len(layers)} layers need as many decays, got {len(rates)}")
    values = torch.stack([g * w.detach().double().square().sum() for g, w in zip(rates, layers, strict=True)])
    spread = float((values.max() - values.min()) / values.max()) if float(values.max()) else 0.0
    return Estimate(values, details={"spread": spread}, refs=("deep-linear-exact R2",))


def _exponent(curve: PhaseCurve, end: int) -> float:
    """q of a straight line in logarithms, the critical point fitted on the last living points."""
    x = curve.control[: end + 1].numpy()
    y = curve.order_parameter[: end + 1].abs().numpy()
    if len(x) < 4:
        return math.nan
    x, y = x[-6:], y[-6:]
    high = float(curve.control[min(end + 1, len(curve.control) - 1)])
    best = (math.inf, math.nan)
    for c in np.linspace(x[-1] + 1e-3 * (high - x[-1] + 1e-12), high, 60):
        line, residual, *_ = np.polyfit(np.log(c - x), np.log(y), 1, full=True)
        best = min(best, (float(residual[0]) if len(residual) else 0.0, float(line[0])))
    return best[1]
