"""Mode connectivity: the loss along paths between two sets of weights, straight or bent around the barrier.

The curve is a quadratic Bezier curve whose middle is trained to lower the mean loss along it; equal function on both ends up to a
symmetry shows as a barrier on the straight path that the curve, or an alignment of the two, takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate

Params = Mapping[str, Tensor]
Loss = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Path:
    """Loss along a path.

    Attributes:
        at: (k,) positions in [0, 1]; loss: (k,).
        barrier: largest loss above the straight line between the losses of the ends.
    """

    at: Tensor
    loss: Tensor
    barrier: Estimate


def straight_path(loss: Loss, a: Params, b: Params, points: int = 21) -> Path:
    """The loss along (1 - t) a + t b.

    Args:
        loss: parameters -> number (a `parasym.core.functional` model with its data closed over).
        a, b: parameters of the same names and shapes.

    Raises:
        InputError: names or shapes differ, or fewer than three points.
    """
    _check(a, b, points)
    return _along(loss, lambda t: {n: (1 - t) * a[n] + t * b[n] for n in a}, points)


def curved_path(
    loss: Loss, a: Params, b: Params, *, steps: int = 200, lr: float = 1e-2, points: int = 21, seed: int = 0
) -> tuple[Path, dict[str, Tensor]]:
    """The loss along a quadratic Bezier curve from a to b whose middle was trained, and that middle.

    Args:
        steps, lr: Adam on the loss at one random place of the curve a step, started from the straight path.
        seed: of the places.
    """
    _check(a, b, points)
    middle = {n: ((a[n] + b[n]) / 2).detach().clone().requires_grad_() for n in a}
    optimizer, stream = torch.optim.Adam(list(middle.values()), lr=lr), torch.Generator().manual_seed(seed)

    def point(t: float) -> dict[str, Tensor]:
        return {n: (1 - t) ** 2 * a[n] + 2 * t * (1 - t) * middle[n] + t**2 * b[n] for n in a}

    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss(point(float(torch.rand((), generator=stream)))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return _along(loss, point, points), {n: m.detach() for n, m in middle.items()}


def _along(loss: Loss, point: Callable[[float], dict[str, Tensor]], points: int) -> Path:
    at = torch.linspace(0, 1, points, dtype=torch.float64)
    with torch.no_grad():
        values = torch.stack([loss(point(float(t))).detach().double().reshape(()) for t in at])
    above = values - ((1 - at) * values[0] + at * values[-1])
    finite = bool(torch.isfinite(values).all())
    height = float(above.max()) if finite else None
    note = "" if finite else "the loss is not finite somewhere on the path"
    details = {"at": float(at[int(above.argmax())])} if finite else {}
    return Path(at, values, Estimate(height, status="ok" if finite else "not_applicable", note=note, details=details))


def _check(a: Params, b: Params, points: int) -> None:
    if set(a) != set(b) or any(a[n].shape != b[n].shape for n in a):
        raise InputError("the two ends of a path need parameters of the same names and shapes.")
    if points < 3:
        raise InputError(f"a path needs at least 3 points, got {points}.")
