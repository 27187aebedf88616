"""Random architectures: a sampler that turns a stream of choices into a network, driven by a seed or by hypothesis.

``random_architecture(seed)`` is deterministic and needs no hypothesis; ``architectures()`` is a hypothesis strategy whose
examples shrink to shallow, narrow, plain networks. Both return an ``Architecture``: model, args, a description, whether it is
in train mode. Weights are generic and in float64; at most ``LIMIT`` parameters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from known_answers import fresh
from zoo import Attention, Pointwise, spread_

LIMIT = 250
SAMPLES = 11
T = TypeVar("T")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "abs": lambda: Pointwise(torch.abs),
    "square": lambda: Pointwise(torch.square),
    "sin": lambda: Pointwise(torch.sin),
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "prelu": nn.PReLU,
    "hardtanh": nn.Hardtanh,
}
NORMS = ("none", "layer", "rms", "batch")
KINDS = ("plain", "gated", "residual", "residual_gated", "attention", "shared")


@dataclass(frozen=True)
class Architecture:
    """A random network with one batch of inputs.

    Attributes:
        model: the network, float64, in evaluation mode.
        args: positional arguments of one call; the first axis counts samples.
        description: the choices that made it, for error messages.
        seed: the seed of its weights.
    """

    model: nn.Module
    args: tuple[Tensor, ...]
    description: str
    seed: int

    @property
    def params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())


class Chooser(Protocol):
    """What the sampler needs of a source of choices."""

    def pick(self, options: Sequence[T]) -> T: ...

    def flag(self) -> bool: ...

    def number(self, low: int, high: int) -> int: ...


class Seeded:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)


class Norm(nn.Module):
    """A norm over channels, on the last axis of tokens or the second of maps."""

    def __init__(self, kind: str, width: int, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first and kind in ("layer", "rms")
        self.norm: nn.Module = {
            "none": nn.Identity,
            "layer": lambda: nn.LayerNorm(width),
            "rms": lambda: nn.RMSNorm(width, eps=1e-5),
            "batch": lambda: nn.BatchNorm1d(width),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first and x.dim() == 3:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(x)


class Gated(nn.Module):
    """act(g x) * (u x)."""

    def __init__(self, gate: nn.Module, up: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.act = gate, up, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * self.up(x)


class Skip(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Twice(nn.Module):
    """One block applied twice: shared weights."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


class Head(nn.Module):
    """Mean over positions, then a linear readout."""

    def __init__(self, width: int, out: int, axis: int | None, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias=bias)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x if self.axis is None else x.mean(self.axis))


class Tied(nn.Module):
    """Tokens in, logits out through the embedding table itself."""

    def __init__(self, vocab: int, width: int, body: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        self.body = body

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.body(self.table(tokens)), self.table.weight)


def _block(choose: Chooser, kind: str, domain: str, width: int, out: int, words: list[str]) -> tuple[nn.Module, int]:
    """One block from ``width`` channels; returns it with its output width."""
    bias = choose.flag()
    name = choose.pick(list(ACTIVATIONS))
    if name == "square" and any("square" in word for word in words):
        name = "tanh"  # one square per network: stacked ones overflow every scale
    norm = choose.pick(NORMS)
    if norm == "batch" and domain == "tokens":
        norm = "layer"
    first = domain == "maps"

    def layer(fan_in: int, fan_out: int) -> nn.Module:
        return nn.Conv1d(fan_in, fan_out, 3, padding=1, bias=bias) if first else nn.Linear(fan_in, fan_out, bias=bias)

    act = ACTIVATIONS[name]
    words.append(f"{kind}({width}->{out}, {name}, {norm}{', bias' if bias else ''})")
    if kind == "attention":
        heads, head_dim = choose.pick((1, 2)), choose.pick((2, 4))
        rotary = choose.pick((None, "half", "pairs"))
        words[-1] = f"attention({width}, {heads}x{head_dim}, rotary {rotary}{', bias' if bias else ''}, {norm})"
        attention = Attention(width, heads, choose.pick((1, heads)), head_dim, bias=bias, rotary=rotary, causal=choose.flag())
        return Skip(nn.Sequential(Norm(norm, width, False), attention)), width
    if kind == "plain":
        return nn.Sequential(layer(width, out), Norm(norm, out, first), act()), out
    if kind == "gated":
        return nn.Sequential(Norm(norm, width, first), Gated(layer(width, out), layer(width, out), act())), out
    hidden = nn.Sequential(layer(width, out), act()) if kind != "residual_gated" else Gated(layer(width, out), layer(width, out), act())
    body = nn.Sequential(Norm(norm, width, first), hidden, layer(out, width))
    return (Twice(Skip(body)) if kind == "shared" else Skip(body)), width


def build(choose: Chooser, weight_seed: int, samples: int = SAMPLES) -> Architecture:
    """Turn choices into a network: 1 to 4 blocks of width 2 to 7 on vectors, maps or tokens, dropped while it is too large."""
    depth = choose.number(1, 4)
    domain = choose.pick(("vectors", "maps", "tokens"))
    tied = domain == "tokens" and choose.flag()
    fan_in, out, bias = choose.number(2, 5), choose.number(2, 4), choose.flag()
    with fresh(weight_seed):
        words: list[str] = []
        if domain == "vectors":
            x, width = 2 * torch.randn(samples, fan_in), fan_in
        elif domain == "maps":
            x, width = 2 * torch.randn(samples, fan_in, 5), fan_in
        else:
            width = choose.number(3, 4)
            x = torch.randint(5 if tied else fan_in + 3, (samples, 4))
        entry = width
        blocks: list[nn.Module] = []
        vocab = 5 if tied else fan_in + 3
        budget = LIMIT - (vocab * width if domain == "tokens" else 0) - (0 if tied else 8 * out)
        for _ in range(depth):
            options = ("plain", *KINDS) if domain == "tokens" else tuple(k for k in KINDS if k != "attention")
            kind = choose.pick(options)
            if tied and kind in ("plain", "gated"):
                kind = "residual"
            target = choose.number(2, 7)
            block, after = _block(choose, kind, domain, width, target, words)
            size = sum(p.numel() for p in block.parameters())
            if size > budget:
                words.pop()
                continue
            blocks.append(block)
            width, budget = after, budget - size
        body = nn.Sequential(*blocks)
        model: nn.Module
        if tied:
            model = Tied(vocab, entry, body)
        else:
            head = Head(width, out, {"vectors": None, "maps": -1, "tokens": 1}[domain], bias)
            table = [nn.Embedding(vocab, entry)] if domain == "tokens" else []
            model = nn.Sequential(*table, body, head)
        spread_(model).eval()
    description = f"{domain}{' tied' if tied else ''} {fan_in if domain != 'tokens' else entry}: {' | '.join(words) or 'no block'} -> {out}"
    return Architecture(model, (x,), description, weight_seed)


def random_architecture(seed: int, samples: int = SAMPLES) -> Architecture:
    """A network from a seed alone: choices and weights."""
    return build(Seeded(seed), seed, samples)


def architectures(samples: int = SAMPLES) -> Any:
    """A hypothesis strategy over ``Architecture``."""
    from hypothesis import strategies as st

    class Drawn:
        def __init__(self, draw: Any) -> None:
            self.draw = draw

        def pick(self, options: Sequence[T]) -> T:
            return self.draw(st.sampled_from(list(options)))

        def flag(self) -> bool:
            return self.draw(st.booleans())

        def number(self, low: int, high: int) -> int:
            return self.draw(st.integers(low, high))

    @st.composite
    def strategy(draw: Any) -> Architecture:
        return build(Drawn(draw), draw(st.integers(0, 2**16)), samples)

    return strategy()
