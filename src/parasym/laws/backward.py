"""Backward error analysis: the continuous flow that a training rule follows better than the one it was made from.

A step theta' = theta + eta f(theta) is, to next order, the time-eta map of the flow of f~ = f - (eta / 2) f'f + ..., for f = -grad l the
flow on l + (eta / 4)|grad l|^2 (neural-thermodynamics R2, thermodynamic-irreversibility R1). The same for heavy-ball momentum on its
slow manifold (R8) and for Adam and RMSprop (R9). Vectors are flat (n,), best in float64; fields are built of torch operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable.engines import follow

Field = Callable[[Tensor], Tensor]


def push(field: Field, at: Tensor, along: Tensor) -> Tensor:
    """The directional derivative Df . along, without a Jacobian."""
    out: Tensor = jvp(field, (at,), (along,))[1]
    return out


def corrected(field: Field, lr: float, order: int = 1, parts: int | None = None) -> Field:
    """The field whose flow a step of size ``lr`` along ``field`` follows to one more order for each order of correction.

    f - (eta/2) f'f + eta^2 [f'f'f / 3 + f''(f, f) / 12]: one-step error of order eta^(order + 2).

    Args:
        order: 0, 1 or 2.
        parts: with ``order=1``, the field of which ``parts`` steps of size lr / parts equal one step of ``field``, in place of its flow:
            the correction is (1 - 1/parts) times as large (the loss l + (eta/4)(1 - 1/n)|grad l|^2).

    Raises:
        InputError: another order, or parts without order 1.
    """
    if order not in (0, 1, 2) or (parts is not None and (order != 1 or parts < 1)):
        raise InputError(f"corrected knows orders 0, 1, 2, and parts >= 1 with order 1; got order {order}, parts {parts}.")
    share = 1.0 if parts is None else 1 - 1 / parts

    def first(x: Tensor) -> Tensor:
        return push(field, x, field(x))

    def fixed(x: Tensor) -> Tensor:
        f = field(x)
        if order == 0:
            return f
        one = push(field, x, f)
        if order == 1:
            return f - share * lr / 2 * one
        two = push(field, x, one)  # f' f' f
        bent = push(first, x, f) - two  # d(f' f) . f = f''(f, f) + f' f' f
        return f - lr / 2 * one + lr**2 * (two / 3 + bent / 12)

    return fixed


def flow(field: Field, start: Tensor, time: float, rtol: float = 1e-12) -> Tensor:
    """Where the flow of ``field`` carries ``start`` (n,) in ``time``; DOP853.

    Raises:
        InputError: the flow blows up on the way.
    """
    found = follow(lambda t, x: {"x": field(x["x"])}, {"x": start.double()}, (0.0, time), rtol=rtol, atol=1e-15)
    if not found.ok:
        raise InputError(f"The flow could not be followed for a time of {time:g}: {found.message}")
    return found.theta["x"][-1]


def circulation(field: Field, at: Tensor) -> Estimate:
    """|Df f - Df^T f| / (|Df f| + |Df^T f|): 0 where the correction is a gradient, up to 1 where it is pure current (R7).

    For a rule that follows no gradient the defect -(eta/2) Df f of a step has no potential; entropy production gives |f|^2/4, whose
    gradient is Df^T f / 2. Their difference is what no potential explains.
    """
    f = field(at)
    forward, (back,) = push(field, at, f), vjp(field, at)[1](f)
    scale = forward.norm() + back.norm()
    ref = ("thermodynamic-irreversibility R7",)
    if float(scale) == 0:
        return Estimate(None, status="not_applicable", note="the field does not change along itself here", refs=ref)
    return Estimate(float((forward - back).norm() / scale), refs=ref)


def _rates(lr: float, **decays: float) -> None:
    if not lr > 0 or any(not 0 <= b < 1 for b in decays.values()):
        raise InputError(f"Give lr > 0 and {', '.join(decays)} in [0, 1), got {lr} and {', '.join(map(str, decays.values()))}.")


def momentum_field(gradient: Field, lr: float, momentum: float, correct: bool = True) -> Field:
    """The flow of heavy-ball descent after its velocity has relaxed, in time lr k (R8).

    -(1/(1-mu)) grad[L + lr (1+mu)/(4 (1-mu)^2) |grad L|^2]. Holds from some 12/(1-mu) steps after rest, and where
    `momentum_condition` is small.

    Args:
        gradient: grad L. correct: False gives the plain flow -grad L / (1-mu).
    """
    _rates(lr, momentum=momentum)
    factor = lr * (1 + momentum) / (2 * (1 - momentum) ** 2) if correct else 0.0

    def field(x: Tensor) -> Tensor:
        g = gradient(x)
        turned = g + factor * push(gradient, x, g) if factor else g
        return -turned / (1 - momentum)

    return field


def momentum_condition(lr: float, momentum: float, curvature: float) -> Estimate:
    """lr (1+mu) h_max / (2 (1-mu)^2), which must be well below 1: else the corrected flow is worse than the plain one (R8)."""
    _rates(lr, momentum=momentum)
    value = lr * (1 + momentum) * curvature / (2 * (1 - momentum) ** 2)
    ref = ("thermodynamic-irreversibility R8",)
    if value < 0.5:
        return Estimate(value, refs=ref)
    return Estimate(
        value, status="not_converged", note="the expansion in the learning rate does not hold here: lower lr or momentum", refs=ref
    )


def adaptive_field(gradient: Field, lr: float, beta1: float, beta2: float, eps: float, correct: bool = True) -> Field:
    """The flow of Adam (``beta1 = 0``: RMSprop) on a full batch after some 1/(1-beta2) steps, bias corrected, eps inside the root (R9).

    -[g_j + (lr/2)((1+b1)/(1-b1) - (1+rho)/(1-rho) + (1+rho)/(1-rho) eps/(g_j^2+eps)) d_j |g|_{1,eps}] / sqrt(g_j^2+eps) with
    |g|_{1,eps} = sum sqrt(g_j^2 + eps): the potential of its irreversibility is an l1 norm of the gradient, with a negative sign
    where beta2 > beta1 and eps is small.

    Args:
        correct: False gives sign-like descent -g / sqrt(g^2 + eps).
    """
    _rates(lr, beta1=beta1, beta2=beta2)
    if eps <= 0:
        raise InputError(f"adaptive_field needs eps > 0 (inside the root), got {eps}.")
    fast, slow = (1 + beta1) / (1 - beta1), (1 + beta2) / (1 - beta2)

    def field(x: Tensor) -> Tensor:
        g = gradient(x)
        root = (g.square() + eps).sqrt()
        if not correct:
            return -g / root
        along = push(gradient, x, g / root)  # gradient of sum sqrt(g_j^2 + eps): H (g / root)
        return -(g + lr / 2 * (fast - slow + slow * eps / root.square()) * along) / root

    return field


def heavy_ball(
    gradient: Field, start: Tensor, lr: float, momentum: float, steps: int, velocity: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(theta, v) after ``steps`` of v' = mu v + g, theta' = theta - lr v'."""
    x, v = start, torch.zeros_like(start) if velocity is None else velocity
    for _ in range(steps):
        v = momentum * v + gradient(x)
        x = x - lr * v
    return x, v


@torch.no_grad()
def adam(
    gradient: Field,
    start: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    steps: int,
    state: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, int]]:
    """Adam with eps inside the root, sqrt(v^ + eps), as `adaptive_field` assumes; torch adds its eps outside."""
    x = start
    m, v, t = (torch.zeros_like(start), torch.zeros_like(start), 0) if state is None else state
    for _ in range(steps):
        g = gradient(x)
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
        x = x - lr * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps).sqrt()
    return x, (m, v, t)
