"""Snake, x + sin^2(a x) / a: an activation that extrapolates periodically.

Source: snake-activation R3-R5.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PIECE = 1 << 16  # entries
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def snake(x: Tensor, a: float | Tensor = 1.0, beta: float | Tensor | None = None) -> Tensor:
    """x + sin^2(a x) / a, or x + sin^2(a x) / beta.

    Only ``x``, ``a`` and ``beta`` are kept for the backward pass, which needs one transcendental function. Half-precision input
    is computed in float32: sin(a x) in float16 has lost its phase at abs(a x) > 2048. ``a = 0`` is the identity, with gradient
    x^2 in ``a``; the function is odd in ``a``.

    Args:
        x: (...) floating point.
        a: frequency (the period is pi / a), a number or a tensor that broadcasts to the shape of ``x``.
        beta: amplitude, likewise; must not be zero. None ties it to ``a``.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: ``x`` is not real floating point.
        ValueError: ``a`` or ``beta`` does not broadcast to the shape of ``x``.

    Source: snake-activation R3, R4.
    """
    if not x.is_floating_point():
        raise TypeError(f"snake needs a real floating-point input, got {x.dtype}")
    frequency, amplitude = _parameter(a, "a", x), None if beta is None else _parameter(beta, "beta", x)
    if torch.compiler.is_exporting():
        return _formula(x, frequency, amplitude)
    if torch.compiler.is_compiling():
        return _CompiledSnake.apply(x, frequency, amplitude)  # type: ignore[no-any-return, no-untyped-call]
    return _Snake.apply(x, frequency, amplitude)  # type: ignore[no-any-return, no-untyped-call]


class Snake(nn.Module):
    """The activation x + sin^2(a x) / a as a module, for all inputs alike or per channel.

    Args:
        channels: None for one ``a``, or the size of axis ``dim`` for one ``a`` each.
        a: (initial) frequency. About pi / the shortest period for periodic signals, with inputs scaled to [-1, 1]; 0.2 to 5 for
            other tasks (R5).
        learnable: train ``a`` (and ``beta``). Weight decay would pull ``a`` to 0 (``log a`` to 0): put parameters that have the
            attribute ``no_weight_decay`` into a group without.
        log_scale: hold log a instead, so that ``a`` stays positive whatever the optimiser does.
        beta: separate amplitude, x + sin^2(a x) / beta; trained and held like ``a``.
        dim: the channel axis, 1 as in convolutions; -1 for (..., features).
        corrected: divide by the standard deviation of the output at N(0, 1) input (R4).
        device, dtype: of the parameters, as in `torch.nn`.

    Shape:
        Input and output: (...), with ``channels`` entries along ``dim``.

    Raises:
        ValueError: ``a`` or ``beta`` is not finite, not positive in log scale, ``beta`` is zero, or an input does not fit.

    Source: snake-activation R4, R5.
    """

    a: Tensor
    log_a: Tensor
    beta: Tensor
    log_beta: Tensor

    def __init__(
        self,
        channels: int | None = None,
        a: float = 1.0,
        *,
        learnable: bool = False,
        log_scale: bool = False,
        beta: float | None = None,
        dim: int = 1,
        corrected: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.channels, self.learnable, self.log_scale, self.dim, self.corrected = channels, learnable, log_scale, dim, corrected
        self.separate = beta is not None
        for name, value in (("a", a), ("beta", beta)):
            if value is None:
                continue
            if not math.isfinite(value) or (value <= 0 and log_scale) or (value == 0 and name == "beta"):
                raise ValueError(f"{name} = {value}: it must be finite{', positive in log scale' if log_scale else ''}, and beta not zero")
            start = torch.full(() if channels is None else (channels,), math.log(value) if log_scale else value, device=device, dtype=dtype)
            held = f"log_{name}" if log_scale else name
            if learnable:
                parameter = nn.Parameter(start)
                parameter.no_weight_decay = True  # type: ignore[attr-defined]
                self.register_parameter(held, parameter)
            else:
                self.register_buffer(held, start)

    def forward(self, x: Tensor) -> Tensor:
        """x + sin^2(a x) / a, shaped like ``x``."""
        a = self._shaped("a", x)
        beta = self._shaped("beta", x) if self.separate else None
        y = snake(x, a, beta)
        if self.corrected:
            y = y * snake_moments(a, beta).variance.rsqrt().to(y.dtype)
        return y

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        options = [f"channels={self.channels}", f"dim={self.dim}"] if self.channels is not None else []
        options += [name for name in ("learnable", "log_scale", "separate", "corrected") if getattr(self, name)]
        return ", ".join(options)

    def _shaped(self, name: str, x: Tensor) -> Tensor:
        value = getattr(self, f"log_{name}").exp() if self.log_scale else getattr(self, name)
        if self.channels is None:
            return value
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.channels:
            raise ValueError(f"input of shape {tuple(x.shape)} has no axis {self.dim} of size {self.channels}; set channels and dim")
        shape = [1] * x.dim()
        shape[self.dim] = self.channels
        return value.view(shape)


class SnakeMoments(NamedTuple):
    """Moments of snake(x) for x ~ N(0, 1): ``mean``, ``variance``, ``second`` = E[s^2] and ``backward`` = E[s'^2]."""

    mean: Tensor
    variance: Tensor
    second: Tensor
    backward: Tensor


def snake_moments(a: float | Tensor, beta: float | Tensor | None = None) -> SnakeMoments:
    """Mean, variance, second moment and squared slope of snake at N(0, 1) input.

    Args:
        a: frequency, (...); a number becomes a float64 scalar.
        beta: amplitude, likewise; None ties it to ``a``.

    Source: snake-activation R4 (the paper's Proposition 1 is the variance); for a separate beta derived likewise.
    """
    a = _nonzero(a if isinstance(a, Tensor) else torch.tensor(float(a), dtype=torch.float64))
    b = a if beta is None else beta
    mean = -torch.expm1(-2 * a * a) / (2 * b)
    variance = 1 + (torch.expm1(-4 * a * a) / b).square() / 8
    backward = 1 - (a / b) ** 2 * torch.expm1(-8 * a * a) / 2
    return SnakeMoments(mean, variance, variance + mean.square(), backward)


@torch.no_grad()
def init_snake_(module: nn.Module, a: float | None = None, *, generator: torch.Generator | None = None) -> nn.Module:
    """Give every linear and convolution layer of ``module`` U(-c, c) weights of variance gain^2 / fan_in, in place; biases 0.

    Args:
        module: layers that feed, and are fed by, snake activations.
        a: the frequency of uncorrected activations: gain^2 = 1 / E[s^2], so that the second moment is kept from layer to layer.
            None for activations with ``corrected=True``: gain 1.
        generator: source of randomness.

    Source: snake-activation R4. The gain of ReLU, sqrt(2), would be wrong; torch's default is three times too small in variance.
    """
    gain = 1.0 if a is None else float(snake_moments(a).second) ** -0.5
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            bound = gain * (3 / layer.weight[0].numel()) ** 0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
    return module


def _formula(x: Tensor, a: Tensor, beta: Tensor | None) -> Tensor:
    wide = x.float() if x.dtype in _LOW_PRECISION else x
    a = _nonzero(a.to(wide.dtype))
    wave = torch.sin(a * wide)
    return (wide + wave * wave * (a if beta is None else beta.to(wide.dtype)).reciprocal()).to(x.dtype)


class _CompiledSnake(torch.autograd.Function):
    """For the compiler, which fuses plain expressions; the gradient in ``a`` is one reduction. It refuses functions with a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, beta: Tensor | None) -> Tensor:
        return _formula(x, a, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, beta = ctx.saved_tensors
        wide, freq, amp = _widened(x, a, beta)
        g, shrink = grad.to(wide.dtype), amp.reciprocal()
        phase = freq * wide
        twice, square = torch.sin(2 * phase), torch.sin(phase).square()
        if beta is None:
            grad_a = (g * (twice * wide - square * shrink)).sum_to_size(a.shape) * shrink
            return (g + g * twice).to(x.dtype), grad_a.to(a.dtype), None
        grad_a = (g * twice * wide * shrink).sum_to_size(a.shape)
        grad_beta = -(g * square * shrink * shrink).sum_to_size(beta.shape)
        return (g + g * twice * (freq * shrink)).to(x.dtype), grad_a.to(a.dtype), grad_beta.to(beta.dtype)


class _Snake(torch.autograd.Function):
    """The eager path: temporaries are reused in place unless somebody differentiates through the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, beta: Tensor | None) -> Tensor:
        wide, a, b = _widened(x, a, beta)
        # binary operators only: those of three operands are not vectorised where one is broadcast
        wave = (wide * a).sin_()
        return wave.mul_(wave).mul_(b.reciprocal()).add_(wide).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, beta = ctx.saved_tensors
        wide, freq, amp = _widened(x, a, beta)
        g = grad.to(wide.dtype)
        rows = _rows(x, a, beta)
        if rows is None or torch.is_grad_enabled():
            parts: tuple[Tensor | None, ...] = _pull_back(wide, freq, amp, beta is None, g, ctx.needs_input_grad)
        else:
            # piece by piece, so that the temporaries stay in the cache; only the gradient of x is as large as x
            out = torch.empty_like(wide) if ctx.needs_input_grad[0] else None
            sums: list[Tensor | None] = [None, None]
            for start in range(0, len(x), rows):
                piece = slice(start, start + rows)
                part = _pull_back(wide[piece], freq, amp, beta is None, g[piece], ctx.needs_input_grad)
                if out is not None and part[0] is not None:
                    out[piece] = part[0]
                sums = [new if old is None or new is None else old + new for old, new in zip(sums, part[1:], strict=True)]
            parts = (out, *sums)
        return tuple(None if part is None else part.to(like.dtype) for part, like in zip(parts, (x, a, beta), strict=True))

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, da: Tensor | None, dbeta: Tensor | None) -> Tensor:
        x, a, beta = ctx.saved_tensors
        wide, freq, amp = _widened(x, a, beta)
        wave, both = torch.sin(wide * freq), torch.sin(2 * wide * freq)
        out = torch.zeros_like(wide)
        if dx is not None:
            out = out + dx * (1 + both * freq / amp)
        if da is not None:
            out = out + da * wide * both / amp
        change = da if beta is None else dbeta
        if change is not None:
            out = out - change * (wave / amp).square()
        return out.to(x.dtype)


def _pull_back(
    x: Tensor, freq: Tensor, amp: Tensor, tied: bool, g: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, the frequency and the amplitude; ``tied``: the amplitude is the frequency, and its share is added there."""
    twice, square = _waves(x, freq, need_square=any(needed[1:]))
    pull = g * twice
    grad_x = (g + (pull if tied else pull * (freq / amp))) if needed[0] else None
    if square is None:
        return grad_x, None, None
    grad_amp = -(g * square).sum_to_size(amp.shape) / (amp * amp)
    turn = (pull * x).sum_to_size(torch.broadcast_shapes(freq.shape, amp.shape)) / amp if needed[1] else None
    if tied:
        return grad_x, grad_amp if turn is None else turn + grad_amp, None
    return grad_x, None if turn is None else turn.sum_to_size(freq.shape), grad_amp if needed[2] else None


def _rows(x: Tensor, a: Tensor, beta: Tensor | None) -> int | None:
    """How many entries of the first axis make a piece; None to take all at once."""
    if x.device.type != "cpu" or x.numel() < 2 * _PIECE or any(t is not None and t.dim() == x.dim() and len(t) > 1 for t in (a, beta)):
        return None
    return max(1, _PIECE * len(x) // x.numel())


def _waves(x: Tensor, freq: Tensor, need_square: bool) -> tuple[Tensor, Tensor | None]:
    """sin(2 a x) and, if asked for, sin^2(a x): from one transcendental function in either case."""
    if not need_square:
        return torch.sin(x * (2 * freq)), None
    # t = tan(a x): sin 2 a x = 2 t / (1 + t^2), sin^2 a x = t^2 / (1 + t^2), exact to rounding near zero and near the poles
    if torch.is_grad_enabled():  # somebody asks for second derivatives: nothing may be overwritten
        phase = x * freq
        return torch.sin(2 * phase), torch.sin(phase).square()
    t = (x * freq).tan_()
    half = (t * t).add_(1).reciprocal_().mul_(t)
    square = t.mul_(half)
    return half.mul_(2), square


def _widened(x: Tensor, a: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x, frequency and amplitude in the dtype of the computation, the frequency kept off zero."""
    wide = x.float() if x.dtype in _LOW_PRECISION else x
    freq = _nonzero(a.to(wide.dtype))
    return wide, freq, freq if beta is None else beta.to(wide.dtype)


def _nonzero(a: Tensor) -> Tensor:
    """``a``, or a number so small that snake is the identity to rounding; the gradient passes as if nothing was done."""
    tiny = torch.finfo(a.dtype).eps ** 1.5
    return a + torch.where(a.abs() < tiny, tiny - a, torch.zeros_like(a)).detach()


def _parameter(value: float | Tensor, name: str, x: Tensor) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, device=x.device, dtype=torch.float64)
    if tensor.dim() > x.dim() or any(t not in (1, s) for t, s in zip(tensor.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not broadcast to the input's shape {tuple(x.shape)}")
    return tensor
