"""Volumization: every weight lives in a box [-V, V] whose walls are soft, hard or bouncing.

Source: volumization R1-R5. alpha in [-1, 1] is the share of the excess that survives the wall, in the sign convention of the
authors' final code: 1 no wall, (0, 1) a soft wall, 0 clipping, [-1, 0) a bounce. Their first class and their README use -alpha:
see `flip_convention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Excluded = Callable[[str, Tensor], bool]
_BUFFERS = ("momentum_buffer", "exp_avg")
_KEYS = ("volume", "wall_alpha", "wall_lam")


def vectors(name: str, p: Tensor) -> bool:
    """The default exclusion: biases and gains of norms, that is whatever has fewer than two dimensions.

    A bias that starts at zero would get a box of size zero and never move again.
    """
    return p.dim() < 2


class Volumize:
    """Walls around the weights of any torch optimiser, applied after each of its steps.

    It hooks itself to the optimiser, whose ``step`` is called as before, by a loop, a scaler or a trainer. Walls are held in the
    optimiser's groups (key ``"walls"``), so its ``state_dict`` carries them: build both, then load, and training goes on as if
    it had never stopped. Walls do not act on a step that is skipped (a scaler that found infinities) or taken at a learning rate
    of zero, nor on a parameter without a gradient.

    Args:
        optimizer: any `torch.optim.Optimizer`: SGD, Adam, AdamW, LaProp, ...
        volume: size v of the boxes. V = v * max abs(w) of each tensor as it is now; with ``absolute`` V = v for all.
        alpha: share of the excess that survives, in [-1, 1].
        lam: instead of alpha: the strength of the penalty (lam / 2) max(abs(w) - V, 0)^2 that a soft wall is the proximal step of.
            alpha = 1 / (1 + lr lam) then follows the learning rate, and the regulariser does not depend on it (R3).
        absolute: ``volume`` is V itself, in units of the weights.
        exclude: (name, parameter) -> whether to leave it alone; names are empty unless the optimiser was given names.
        scale_momentum: multiply the momentum of a weight that hit the wall by alpha, as the authors' code does.

    A group may override ``volume``, ``wall_alpha`` and ``wall_lam`` by keys of these names. For FSDP2 build it after sharding
    (a wall is a maximum over all shards; the step itself needs no communication), for mixed precision give the optimiser the
    float32 weights, as always. Second moments are not touched, so a weight parked at a wall leaves it slowly: this is wanted.

    Raises:
        ValueError: alpha or lam out of range, a box of size zero (a tensor of zeros would stay frozen), or a weight that is not
            finite.
        RuntimeError: the optimiser has walls already.

    Source: volumization R1-R3.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        volume: float = 1.0,
        alpha: float = 0.0,
        *,
        lam: float | None = None,
        absolute: bool = False,
        exclude: Excluded = vectors,
        scale_momentum: bool = True,
    ) -> None:
        if any("walls" in group for group in optimizer.param_groups):
            raise RuntimeError("this optimizer has walls already; remove() the first Volumize")
        self.optimizer, self.exclude, self.absolute, self.scale_momentum = optimizer, exclude, absolute, scale_momentum
        self.defaults = {"volume": volume, "wall_alpha": alpha, "wall_lam": lam}
        try:
            for group in optimizer.param_groups:
                self._build(group)
        except Exception:
            self._clear()
            raise
        self._handles = [optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)]

    def walls(self) -> dict[Tensor, float]:
        """V of every walled parameter."""
        return {p: wall for group in self.optimizer.param_groups for p, wall in self._walled(group)}

    def remove(self) -> None:
        """Take the walls away; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._clear()

    def _clear(self) -> None:
        for group in self.optimizer.param_groups:
            group.pop("walls", None)

    def _build(self, group: dict[str, Any]) -> None:
        for key in _KEYS:
            group.setdefault(key, self.defaults[key])
        if not (group["volume"] >= 0 and math.isfinite(group["volume"])):
            raise ValueError(f"volume must be finite and not negative, got {group['volume']}")
        if not -1 <= group["wall_alpha"] <= 1:
            raise ValueError(f"alpha must be in [-1, 1], got {group['wall_alpha']}")
        if group["wall_lam"] is not None and not group["wall_lam"] >= 0:
            raise ValueError(f"lam must not be negative, got {group['wall_lam']}")
        names = group.get("param_names") or [""] * len(group["params"])
        group["walls"] = [self._wall(name, p, group) for name, p in zip(names, group["params"], strict=True)]

    def _wall(self, name: str, p: Tensor, group: dict[str, Any]) -> float | None:
        if not p.is_floating_point() or self.exclude(name, p):
            return None
        if self.absolute:
            return float(group["volume"])
        top = _largest(p)
        if not math.isfinite(top):
            raise ValueError(f"parameter {name or 'of shape ' + str(tuple(p.shape))} holds NaN or infinity: it has no box")
        # volume = 0 asks for weight decay; a zero maximum would freeze the tensor by accident
        if top == 0 and group["volume"] > 0:
            raise ValueError(f"parameter {name or 'of shape ' + str(tuple(p.shape))} is all zeros: its box would freeze it; exclude it")
        return float(group["volume"]) * top

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if "walls" not in group:  # added since
                self._build(group)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            # torch's distributed checkpoints make an optimiser's state by a step at rate zero, which must move nothing
            if not torch.compiler.is_compiling() and float(group["lr"]) == 0:
                continue
            alpha = group["wall_alpha"]
            if group["wall_lam"] is not None:
                alpha = wall_alpha(group["wall_lam"], float(group["lr"]))
            met = [(p, wall) for p, wall in self._walled(group) if p.grad is not None]
            momenta = [_momentum(optimizer, p) if self.scale_momentum else None for p, _ in met]
            volumize_([p for p, _ in met], [wall for _, wall in met], alpha, momenta)

    def _walled(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, float]]:
        return ((p, wall) for p, wall in zip(group["params"], group.get("walls", ()), strict=False) if wall is not None)


@torch.no_grad()
def volumize_(params: Sequence[Tensor], walls: Sequence[float], alpha: float, momenta: Sequence[Tensor | None] = ()) -> None:
    """Push what left the box back, in place: w <- sign(w) (V + alpha (abs(w) - V)), m <- alpha m where abs(w) > V.

    A bounce strong enough to reach the opposite wall (abs(w) > 3 V at alpha = -1) stops there; the authors' code lets it through.

    Args:
        params: weights, any shapes.
        walls: V >= 0 of each.
        alpha: share of the excess that survives, in [-1, 1]; 1 does nothing at all.
        momenta: momentum buffers shaped like the weights, or None.

    Source: volumization R1.
    """
    if alpha == 1 or not params:
        return
    inside = [p.clamp(-wall, wall) for p, wall in zip(params, walls, strict=True)]
    excess = torch._foreach_sub(list(params), inside)
    for p, kept, out, wall in zip(params, inside, excess, walls, strict=True):
        p.copy_(kept if alpha == 0 else torch.add(kept, out, alpha=alpha))
        if alpha < 0:
            p.clamp_(-wall, wall)
    for out, momentum in zip(excess, momenta, strict=False):
        if momentum is not None:
            momentum.copy_(torch.where(out != 0, momentum * alpha, momentum))


@torch.no_grad()
def binarize_(params: Sequence[Tensor], walls: Sequence[float]) -> None:
    """w <- V sign(w), in place; a zero counts as positive. Source: volumization R5."""
    for p, wall in zip(params, walls, strict=True):
        p.copy_(torch.where(p < 0, torch.full_like(p, -wall), torch.full_like(p, wall)))


@torch.no_grad()
def ternarize_(params: Sequence[Tensor], walls: Sequence[float], threshold: float = 0.5) -> None:
    """w <- V sign(w) where abs(w) > threshold V, else 0, in place. Source: volumization R5."""
    for p, wall in zip(params, walls, strict=True):
        p.copy_(torch.sign(p) * wall * (p.abs() > threshold * wall))


def wall_occupancy(params: Iterable[Tensor], walls: Iterable[float], tol: float = 0.02) -> list[float]:
    """Fraction of each tensor's weights whose size is within tol V of the wall V."""
    return [float(((p.detach().abs() - wall).abs() <= tol * wall).double().mean()) for p, wall in zip(params, walls, strict=True)]


def wall_alpha(lam: float, eta: float) -> float:
    """The wall that is the proximal step of (lam / 2) max(abs(w) - V, 0)^2: alpha = 1 / (1 + eta lam). Source: volumization R3."""
    return 1 / (1 + eta * lam)


def wall_penalty(alpha: float, eta: float) -> float:
    """The lam of `wall_alpha`, (1 - alpha) / (alpha eta): ridge at V = 0, infinite for a hard wall.

    Raises:
        ValueError: alpha < 0: a bounce is not the proximal step of any penalty.

    Source: volumization R3.
    """
    if not 0 <= alpha <= 1 or not eta > 0:
        raise ValueError(f"a penalty exists for alpha in [0, 1] and eta > 0, got alpha {alpha}, eta {eta}")
    return (1 - alpha) / (alpha * eta) if alpha > 0 else math.inf


def resting_offset(alpha: float, eta: float, force: float) -> float:
    """abs(w) - V where a weight pushed outwards by a steady force comes to rest under plain descent: alpha eta force / (1 - alpha).

    Outside a soft wall, on a hard one, inside a bouncing one. Source: volumization R3.
    """
    if not -1 <= alpha < 1:
        raise ValueError(f"alpha must be in [-1, 1), got {alpha}")
    return alpha * eta * force / (1 - alpha)


def flip_convention(alpha: float) -> float:
    """alpha of the authors' first class and README (-1 no wall, 1 elastic) from ours, and back."""
    return -alpha


def clip_bias_variance(u: float, s: float, wall: float, alpha: float) -> tuple[float, float]:
    """Squared bias and variance of a walled estimate of u from x ~ N(u, s^2).

    Args:
        u: the truth; s: standard deviation, > 0; wall: V >= 0; alpha: in [-1, 1].

    Source: volumization R4 (no fold: valid while the bounce does not reach the opposite wall).
    """
    if not s > 0 or not wall >= 0 or not -1 <= alpha <= 1:
        raise ValueError(f"need s > 0, wall >= 0 and alpha in [-1, 1], got {s}, {wall}, {alpha}")
    low, high = (-wall - u) / s, (wall - u) / s
    phi = [math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (low, high)]
    cdf = [math.erfc(-z / math.sqrt(2)) / 2 for z in (low, high)]
    below = _part(u, s, cdf[0], -phi[0], -low * phi[0])
    within = _part(u, s, cdf[1] - cdf[0], phi[0] - phi[1], low * phi[0] - high * phi[1])
    above = _part(u, s, math.erfc(high / math.sqrt(2)) / 2, phi[1], high * phi[1])
    shift = (1 - alpha) * wall
    mean, square = within[1], within[2]
    for part, c in ((above, shift), (below, -shift)):
        mean += c * part[0] + alpha * part[1]
        square += c * c * part[0] + 2 * c * alpha * part[1] + alpha * alpha * part[2]
    return (mean - u) ** 2, square - mean * mean


def _part(u: float, s: float, mass: float, first: float, second: float) -> tuple[float, float, float]:
    """Moments 0, 1, 2 of x over one part of the line; ``first`` and ``second`` are those of (x - u) / s, the latter less ``mass``."""
    return mass, u * mass + s * first, (u * u + s * s) * mass + 2 * u * s * first + s * s * second


def _largest(p: Tensor) -> float:
    top = p.detach().abs().max()
    return float(top.full_tensor() if hasattr(top, "full_tensor") else top)


def _momentum(optimizer: Optimizer, p: Tensor) -> Tensor | None:
    state = optimizer.state.get(p, {})
    return next((state[key] for key in _BUFFERS if state.get(key) is not None), None)
