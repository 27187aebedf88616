"""What a network does far outside its data: the periodic sums that snake networks are, and the asymptote of any network.

Source: snake-activation R1-R3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parasym.nn.periodic import Snake


def fourier_snake(
    constant: float, amplitudes: Sequence[float], phases: Sequence[float], *, frequency: float = 1.0, a: float = 1.0
) -> nn.Sequential:
    """The Fourier sum constant + sum_n A_n cos(n frequency x + phi_n), n = 1..N, as a snake network of 2 N hidden units.

    cos(2 a z) = 1 - a (snake_a(z) + snake_a(-z)). Everything is float64: in float32 the error at abs(x) = 1e5 is about 1e-2.

    Args:
        constant: mean of the sum.
        amplitudes: A_1..A_N.
        phases: phi_1..phi_N, radians.
        frequency: of the fundamental, radians per unit of x.
        a: frequency of the activations, not zero.

    Returns:
        (batch, 1) -> (batch, 1), float64.

    Raises:
        ValueError: amplitudes and phases differ in number, or a is zero.

    Source: snake-activation R3 (the universal-extrapolation theorem, made by hand).
    """
    if len(amplitudes) != len(phases) or not amplitudes or a == 0:
        raise ValueError(f"need as many phases as amplitudes, at least one, and a != 0: got {len(amplitudes)}, {len(phases)}, a = {a}")
    height, shift = torch.tensor(amplitudes, dtype=torch.float64), torch.tensor(phases, dtype=torch.float64)
    slope = frequency * torch.arange(1, len(amplitudes) + 1, dtype=torch.float64) / (2 * a)
    units = 2 * len(amplitudes)
    # skip_init: every weight is written below, and a builder should not draw from the global generator
    inner, outer = (nn.utils.skip_init(nn.Linear, i, o, dtype=torch.float64) for i, o in ((1, units), (units, 1)))
    with torch.no_grad():
        inner.weight.copy_(torch.cat([slope, -slope])[:, None])
        inner.bias.copy_(torch.cat([shift, -shift]) / (2 * a))
        outer.weight.copy_(-a * torch.cat([height, height])[None])
        outer.bias.fill_(constant + float(height.sum()))
    return nn.Sequential(inner, Snake(a=a, dtype=torch.float64), outer)


@dataclass(frozen=True)
class Asymptote:
    """The straight line nearest to a network along a ray.

    Attributes:
        slope, intercept: of the line, one number for each output.
        residual: root mean square of what the line leaves, the largest over the outputs.
        change: size of the slope times the length of the range, the largest over the outputs.
        kind: "constant", "linear", or "other" (a periodic or growing remainder) at the tolerance asked for.
    """

    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    residual: float
    change: float
    kind: Literal["constant", "linear", "other"]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


@torch.no_grad()
def extrapolation(f: Callable[[Tensor], Tensor], direction: Tensor, distances: Tensor, *, tol: float = 1e-8) -> Asymptote:
    """Fit a straight line to z -> f(z u) over the distances z.

    Networks of ReLU-like units become exactly linear (R1), of tanh or sigmoid units constant (R2); snake networks do neither.

    Args:
        f: (n, d) -> (n,) or (n, outputs), best in float64.
        direction: u, (d,).
        distances: z, (n,), at least three different ones.
        tol: residual (or change) below which it counts as zero, relative to the largest output or 1.

    Raises:
        ValueError: fewer than three distances, or an output that is not finite.

    Source: snake-activation R1, R2.
    """
    if distances.dim() != 1 or distances.unique().numel() < 3:
        raise ValueError(f"a line needs at least three different distances, got {tuple(distances.shape)}")
    values = f(distances[:, None] * direction).reshape(len(distances), -1).double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the network is not finite along this ray")
    centre = distances.double().mean()
    z = distances.double() - centre
    middle = values.mean(0)
    slope = (z @ (values - middle)) / z.square().sum()
    residual = float((values - middle - z[:, None] * slope).square().mean(0).sqrt().max())
    change = float(slope.abs().max() * (z.max() - z.min()))
    size = tol * max(1.0, float(values.abs().max()))
    kind: Literal["constant", "linear", "other"] = "other" if residual > size else "linear" if change > size else "constant"
    return Asymptote(tuple(slope.tolist()), tuple((middle - slope * centre).tolist()), residual, change, kind)
