"""Finite transformations of parameters: what must not be taken for a symmetry, and what must be found.

``CONTROLS`` are near misses, one or more for each row of the catalogue of symmetries: the wrong group, the wrong storage
layout, a partner left behind, another mode. Each changes the output by at least ``change`` of its largest entry. ``MOVES`` are
the true symmetries beside them, which change it by at most ``error``. A transform takes and returns a dict of named parameters
and floating-point buffers, and leaves its argument alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from known_answers import CASES, BarlowTwins, TinyGPT, draw_transformer_, fresh, generic_
from zoo import ZOO, Attention, Experts, GLUBlock, MeanPool, SqueezeExcite, spread_

State = Mapping[str, Tensor]
Transform = Callable[[State], dict[str, Tensor]]
Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
EXACT = 1e-10
EPS = 1e-3  # what the default eps of a norm may cost a scale


@dataclass(frozen=True)
class Control:
    """A transformation that is not a symmetry of the network it is given with.

    Attributes:
        name: row of the catalogue, and what is wrong.
        build: () -> (model, args), float64, generic weights.
        transform: state -> state; the finite move.
        change: least relative change of the output.
    """

    name: str
    build: Build = field(repr=False)
    transform: Transform = field(repr=False)
    change: float = 0.01


@dataclass(frozen=True)
class Move:
    """A transformation that is a symmetry; ``error`` is the largest relative change of the output."""

    name: str
    build: Build = field(repr=False)
    transform: Transform = field(repr=False)
    error: float = EXACT


def state(model: nn.Module) -> dict[str, Tensor]:
    """Named parameters and floating-point buffers, detached; tied tensors appear once."""
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return {name: t.detach() for name, t in [*model.named_parameters(), *buffers.items()]}


def relative_change(model: nn.Module, args: tuple[Any, ...], transform: Transform) -> float:
    """Largest change of the output under the transform, over the largest entry of the output."""
    before = state(model)
    kept = {name: t.clone() for name, t in before.items()}
    after = transform(before)
    if not all(torch.equal(before[name], kept[name]) for name in kept):
        raise ValueError("the transform changed its argument")
    old = torch.func.functional_call(model, {n: t.clone() for n, t in kept.items()}, args)
    new = torch.func.functional_call(model, {**kept, **after}, args)
    return float((new - old).detach().abs().max() / old.detach().abs().max())


CONTROLS: dict[str, Control] = {}
MOVES: dict[str, Move] = {}


def control(name: str, build: Build, transform: Transform, change: float = 0.01) -> None:
    assert name not in CONTROLS, name
    CONTROLS[name] = Control(name, build, transform, change)


def move(name: str, build: Build, transform: Transform, error: float = EXACT) -> None:
    assert name not in MOVES, name
    MOVES[name] = Move(name, build, transform, error)


# --- the vocabulary: matrices, and matrices acting along axes ---------------------------------------------------------


def _drawn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scales(n: int) -> Tensor:
    """A positive diagonal matrix away from 1."""
    return torch.diag(torch.linspace(0.5, 1.7, n, dtype=torch.float64) if n > 1 else torch.full((1,), 1.7, dtype=torch.float64))


def signs(n: int) -> Tensor:
    """Alternating signs, the first one negative."""
    return torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat((n + 1) // 2)[:n])


def flip(n: int, index: int = 0) -> Tensor:
    """The sign of one unit."""
    out = torch.eye(n, dtype=torch.float64)
    out[index, index] = -1
    return out


def cycle(n: int) -> Tensor:
    """The cyclic permutation."""
    return torch.eye(n, dtype=torch.float64).roll(1, 0)


def swap(n: int, i: int, j: int) -> Tensor:
    """A transposition."""
    order = list(range(n))
    order[i], order[j] = j, i
    return torch.eye(n, dtype=torch.float64)[order]


def gl(n: int) -> Tensor:
    """A well-conditioned general matrix."""
    return torch.linalg.matrix_exp(0.4 * _drawn(n, n))


def rotation(n: int) -> Tensor:
    """A rotation."""
    a = _drawn(n, n)
    return torch.linalg.matrix_exp(0.7 * (a - a.T))


def rotation_fixing_mean(n: int) -> Tensor:
    """A rotation that fixes the all-ones vector."""
    a = _drawn(n, n)
    a = a - a.T
    p = torch.eye(n, dtype=torch.float64) - 1.0 / n
    return torch.linalg.matrix_exp(0.7 * p @ a @ p)


def planes(n: int, interleaved: bool) -> Tensor:
    """One scaled rotation a I + b J for each rotary plane."""
    out = torch.zeros(n, n, dtype=torch.float64)
    for plane in range(n // 2):
        i, j = (2 * plane, 2 * plane + 1) if interleaved else (plane, plane + n // 2)
        a, b = 1.3 - 0.4 * plane, 0.6 + 0.2 * plane
        out[i, i], out[j, j], out[i, j], out[j, i] = a, a, -b, b
    return out


def inv_t(a: Tensor) -> Tensor:
    """The contragredient: what a reader takes when the writer takes ``a``."""
    return torch.linalg.inv(a).T


def blocks(*parts: Tensor) -> Tensor:
    """Block-diagonal matrix."""
    return torch.block_diag(*parts)


def copies(a: Tensor, n: int) -> Tensor:
    """``a`` on each of n consecutive blocks."""
    return torch.kron(torch.eye(n, dtype=torch.float64), a.contiguous())


def wide(a: Tensor, n: int) -> Tensor:
    """``a`` on blocks of n consecutive entries each."""
    return torch.kron(a.contiguous(), torch.eye(n, dtype=torch.float64))


def on(t: Tensor, axis: int, a: Tensor) -> Tensor:
    """The matrix ``a`` along an axis of ``t``."""
    return torch.tensordot(a, t, dims=([1], [axis])).movedim(0, axis)


def along(*moves: tuple[str, int, Tensor]) -> Transform:
    """Matrices along axes of parameters, one after the other."""

    def transform(p: State) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, axis, a in moves:
            out[name] = on(out.get(name, p[name]), axis, a)
        return out

    return transform


def hidden(a: Tensor, writers: str, readers: str, back: Tensor | None = None) -> Transform:
    """``a`` on axis 0 of the writers, its contragredient (or ``back``) on axis 1 of the readers; names separated by spaces."""
    b = inv_t(a) if back is None else back
    return along(*((w, 0, a) for w in writers.split()), *((r, 1, b) for r in readers.split()))


def plus(**terms: Callable[[State], Tensor] | Tensor) -> Transform:
    """Add to parameters; double underscores in names stand for dots."""

    def transform(p: State) -> dict[str, Tensor]:
        out = {}
        for key, term in terms.items():
            name = key.replace("__", ".")
            out[name] = p[name] + (term(p) if callable(term) else term)
        return out

    return transform


def both(*transforms: Transform) -> Transform:
    """One transform after another."""

    def transform(p: State) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for t in transforms:
            out |= t({**p, **out})
        return out

    return transform


def zoo(name: str) -> Build:
    """A network of the zoo without its keyword arguments."""
    return lambda: ZOO[name].build()[:2]


def known(name: str) -> Build:
    """A network of the known answers on its first batch."""

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        model, inputs = CASES[name].build()
        return model, inputs[0]

    return build


def made(model: Callable[[], nn.Module], *shapes: tuple[int, ...], train: bool = False, seed: int = 0) -> Build:
    """A network from its constructor, with generic weights and Gaussian inputs of the given shapes."""

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        with fresh(seed):
            net = spread_(model())
            return net.train(train), tuple(2 * torch.randn(*shape) for shape in shapes)

    return build


W1, W2, W3 = "0.weight 0.bias", "2.weight 2.bias", "4.weight"
FIRST = "2.weight"  # reads hidden layer 1 of the zoo's multilayer perceptrons (3-5-7-2)


# --- 1 pointwise activations -----------------------------------------------------------------------------------------

for _act in ("relu", "gelu", "sigmoid", "cos"):
    move(f"units permute: {_act}", zoo(f"mlp-{_act}"), hidden(cycle(5), W1, FIRST))
move("units permute with their slopes: prelu", zoo("mlp-prelu"), both(hidden(cycle(5), W1, FIRST), along(("1.weight", 0, cycle(5)))))
control("permutation leaving the slopes behind: prelu", zoo("mlp-prelu"), hidden(cycle(5), W1, FIRST))
control("permutation of writers only", zoo("mlp-gelu"), hidden(cycle(5), W1, ""))
control("permutation leaving the bias behind", zoo("mlp-gelu"), hidden(cycle(5), "0.weight", FIRST))
control("different permutations on writer and reader", zoo("mlp-gelu"), hidden(cycle(5), W1, FIRST, cycle(5).T))
for _act in ("relu", "leaky_relu", "prelu", "abs"):
    move(f"rescale: {_act}", zoo(f"mlp-{_act}"), hidden(scales(5), W1, FIRST))
for _act in ("relu", "leaky_relu", "prelu"):
    control(f"negative scale: {_act}", zoo(f"mlp-{_act}"), hidden(flip(5), W1, FIRST))
for _act in ("gelu", "silu", "tanh", "softplus", "elu", "sigmoid", "sin", "erf", "softsign", "hardtanh", "cos", "gaussian"):
    control(f"rescale: {_act}", zoo(f"mlp-{_act}"), hidden(scales(5), W1, FIRST))
for _act in ("square", "relu2"):
    move(f"rescale with the square of the scale: {_act}", zoo(f"mlp-{_act}"), hidden(scales(5), W1, FIRST, inv_t(scales(5) @ scales(5))))
    control(f"rescale with the scale itself: {_act}", zoo(f"mlp-{_act}"), hidden(scales(5), W1, FIRST))
control("rescale leaving the bias behind: relu", zoo("mlp-relu"), hidden(scales(5), "0.weight", FIRST))
for _act in ("tanh", "sin", "erf", "softsign", "hardtanh"):
    move(f"sign: {_act}", zoo(f"mlp-{_act}"), hidden(signs(5), W1, FIRST))
for _act in ("sigmoid", "gelu", "silu", "softplus", "elu", "cos", "gaussian", "square", "abs"):
    control(f"sign of writer and reader: {_act}", zoo(f"mlp-{_act}"), hidden(flip(5), W1, FIRST))
for _act in ("square", "cos", "abs", "gaussian"):
    move(f"sign of the writer alone: {_act}", zoo(f"mlp-{_act}"), hidden(signs(5), W1, ""))
for _act in ("tanh", "relu", "gelu"):
    control(f"sign of the writer alone: {_act}", zoo(f"mlp-{_act}"), hidden(signs(5), W1, ""))
_flip_into_bias = plus(**{"2__bias": lambda p: p["2.weight"][:, 0]})
move("sign with shift of the next bias: sigmoid", zoo("mlp-sigmoid"), both(_flip_into_bias, hidden(flip(5), W1, FIRST)))
control("sign with shift of the next bias: tanh", zoo("mlp-tanh"), both(_flip_into_bias, hidden(flip(5), W1, FIRST)))


def _invert_slope(p: State) -> dict[str, Tensor]:
    back = torch.eye(5, dtype=torch.float64)
    back[0, 0] = -p["1.weight"][0]
    slope = p["1.weight"].clone()
    slope[0] = 1 / slope[0]
    return hidden(flip(5), W1, FIRST, back)(p) | {"1.weight": slope}


def _invert_shared_slope(p: State, units: int) -> dict[str, Tensor]:
    turned, back = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    turned[:units, :units] *= -1
    back[:units, :units] *= -p["1.weight"]
    return hidden(turned, W1, FIRST, back)(p) | {"1.weight": 1 / p["1.weight"]}


move("sign with inverted slope: prelu", zoo("mlp-prelu"), _invert_slope)
move("sign of the whole layer with inverted slope: shared prelu", known("mlp-prelu-shared"), lambda p: _invert_shared_slope(p, 6))
control("sign of one unit with inverted slope: shared prelu", known("mlp-prelu-shared"), lambda p: _invert_shared_slope(p, 1))
_turn = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
move("bias by a period: sin", zoo("mlp-sin"), plus(**{"0__bias": 2 * math.pi * _turn}))
move("bias by a period: cos", zoo("mlp-cos"), plus(**{"0__bias": 2 * math.pi * _turn}))
move("bias by half a period with sign: sin", zoo("mlp-sin"), both(plus(**{"0__bias": math.pi * _turn}), along((FIRST, 1, flip(5)))))
control("bias by half a period: sin", zoo("mlp-sin"), plus(**{"0__bias": math.pi * _turn}))
_LINEAR = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Identity(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (11, 5))
_absorb = plus(**{"0__bias": _drawn(4), "2__bias": lambda p: -p["2.weight"] @ _drawn(4)})
move("general linear: no activation", _LINEAR, hidden(gl(4), W1, FIRST))
move("shift into the next bias: no activation", _LINEAR, _absorb)
control("shift without the next bias: no activation", _LINEAR, plus(**{"0__bias": _drawn(4)}))
for _act in ("relu", "tanh", "abs", "square"):
    control(f"general linear: {_act}", zoo(f"mlp-{_act}"), hidden(gl(5), W1, FIRST))
    control(f"rotation: {_act}", zoo(f"mlp-{_act}"), hidden(rotation(5), W1, FIRST))
control("shift into the next bias: relu", zoo("mlp-relu"), plus(**{"0__bias": _drawn(5), "2__bias": lambda p: -p["2.weight"] @ _drawn(5)}))
move(
    "pieces and units: maxout",
    zoo("maxout"),
    along(("up.weight", 0, wide(cycle(5), 2)), ("up.bias", 0, wide(cycle(5), 2)), ("down.weight", 1, cycle(5))),
)
move(
    "scale common to both pieces: maxout",
    zoo("maxout"),
    along(("up.weight", 0, wide(scales(5), 2)), ("up.bias", 0, wide(scales(5), 2)), ("down.weight", 1, inv_t(scales(5)))),
)
control(
    "sign: maxout", zoo("maxout"), along(("up.weight", 0, wide(flip(5), 2)), ("up.bias", 0, wide(flip(5), 2)), ("down.weight", 1, flip(5)))
)
control("pieces regrouped across units: maxout", zoo("maxout"), along(("up.weight", 0, swap(10, 1, 2)), ("up.bias", 0, swap(10, 1, 2))))


# --- 2 convolutions --------------------------------------------------------------------------------------------------

_POOL = known("conv-relu-pool-linear")
_c2 = ("c2.weight", 0), ("c2.bias", 0)
move("channels in blocks of columns: flatten", _POOL, along(*((n, a, cycle(3)) for n, a in _c2), ("fc.weight", 1, wide(cycle(3), 4))))
control(
    "channels in interleaved columns: flatten",
    _POOL,
    along(*((n, a, cycle(3)) for n, a in _c2), ("fc.weight", 1, copies(cycle(3), 4)[:12, :12])),
)
move("rescale through max pooling: relu", _POOL, hidden(scales(4), "c1.weight c1.bias", "c2.weight"))
control("sign through max pooling: relu", _POOL, hidden(flip(4), "c1.weight c1.bias", "c2.weight"))
_TANHPOOL = made(lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), MeanPool()), (11, 1, 7, 7))
_AVGPOOL = made(lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2), MeanPool()), (11, 1, 7, 7))
move("sign through average pooling: tanh", _AVGPOOL, hidden(signs(4), W1, "3.weight"))
control("sign through max pooling: tanh", _TANHPOOL, hidden(signs(4), W1, "3.weight"))
control(
    "general linear through max pooling",
    made(lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)), (11, 1, 7, 7)),
    hidden(gl(4), W1, "2.weight"),
)
move(
    "general linear through average pooling",
    made(lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2)), (11, 1, 7, 7)),
    hidden(gl(4), W1, "2.weight"),
)
_GROUPED = zoo("conv-grouped")  # 6 channels into 3 groups of 2, each giving 3


def _regroup(within: Tensor, groups: Tensor) -> Transform:
    """Permute inputs inside each group the same way, and groups as wholes; the kernels have shape (9, 2, 3)."""
    return both(
        along(("0.weight", 0, copies(within, 3)), ("0.bias", 0, copies(within, 3)), ("2.weight", 1, within)),
        along(("0.weight", 0, wide(groups, 2)), ("0.bias", 0, wide(groups, 2))),
        along(("2.weight", 0, wide(groups, 3)), ("2.bias", 0, wide(groups, 3)), ("5.weight", 1, wide(groups, 3))),
    )


move("channels inside groups and groups as wholes: grouped convolution", _GROUPED, _regroup(cycle(2), cycle(3)))
control("channels across groups: grouped convolution", _GROUPED, along(("0.weight", 0, swap(6, 1, 2)), ("0.bias", 0, swap(6, 1, 2))))
control(
    "groups exchanged without their outputs: grouped convolution",
    _GROUPED,
    along(
        ("0.weight", 0, wide(cycle(3), 2)),
        ("0.bias", 0, wide(cycle(3), 2)),
        ("2.weight", 0, wide(cycle(3), 3)),
        ("2.bias", 0, wide(cycle(3), 3)),
    ),
)
_DEPTH = zoo("conv-depthwise")
move(
    "channels with their filters: depthwise",
    _DEPTH,
    along(("0.weight", 0, cycle(5)), ("0.bias", 0, cycle(5)), ("1.weight", 0, cycle(5)), ("3.weight", 1, cycle(5))),
)
move(
    "producer against filter, either sign: depthwise",
    _DEPTH,
    along(("0.weight", 0, signs(5) @ scales(5)), ("0.bias", 0, signs(5) @ scales(5)), ("1.weight", 0, inv_t(signs(5) @ scales(5)))),
)
control(
    "channels without their filters: depthwise",
    _DEPTH,
    along(("0.weight", 0, cycle(5)), ("0.bias", 0, cycle(5)), ("3.weight", 1, cycle(5))),
)
control(
    "general linear between producer and filter: depthwise",
    _DEPTH,
    along(("0.weight", 0, gl(5)), ("0.bias", 0, gl(5)), ("1.weight", 0, inv_t(gl(5)))),
)
_TRANSPOSED = made(lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 4, 3, stride=2)), (11, 2, 7))
move(
    "channels: transposed convolution stores (in, out)",
    _TRANSPOSED,
    along(("0.weight", 0, cycle(4)), ("0.bias", 0, cycle(4)), ("2.weight", 0, cycle(4))),
)
control(
    "channels on the output axis: transposed convolution",
    _TRANSPOSED,
    along(("0.weight", 0, cycle(4)), ("0.bias", 0, cycle(4)), ("2.weight", 1, cycle(4))),
)
_SHUFFLE = zoo("conv-pixel-shuffle")
move(
    "blocks of sub-pixels: pixel shuffle",
    _SHUFFLE,
    along(("0.weight", 0, wide(cycle(3), 4)), ("0.bias", 0, wide(cycle(3), 4)), ("3.weight", 1, cycle(3))),
)
control(
    "interleaved sub-pixels: pixel shuffle",
    _SHUFFLE,
    along(("0.weight", 0, copies(cycle(3), 4)), ("0.bias", 0, copies(cycle(3), 4)), ("3.weight", 1, cycle(3))),
)


# --- 3 norms ---------------------------------------------------------------------------------------------------------


def _norm(layer: Callable[[], nn.Module], act: Callable[[], nn.Module] = nn.ReLU, train: bool = False) -> Build:
    return made(lambda: nn.Sequential(nn.Linear(3, 5), layer(), act(), nn.Linear(5, 4)), (11, 3), train=train)


_BN = _norm(lambda: nn.BatchNorm1d(5, eps=1e-30), train=True)
_BN_EPS = _norm(lambda: nn.BatchNorm1d(5), train=True)
_BN_EVAL = _norm(lambda: nn.BatchNorm1d(5, eps=1e-30))
_BN_ID = _norm(lambda: nn.BatchNorm1d(5), act=nn.Identity, train=True)
_gain = along(("1.weight", 0, scales(5)), ("1.bias", 0, scales(5)), ("3.weight", 1, inv_t(scales(5))))
_gain_signed = along(("1.weight", 0, signs(5)), ("1.bias", 0, signs(5)), ("3.weight", 1, signs(5)))
_norm_shift = plus(**{"1__bias": _drawn(5), "3__bias": lambda p: -p["3.weight"] @ _drawn(5)})
move("scale of a unit: batch norm, train", _BN, hidden(scales(5), W1, ""))
move("scale of a unit: batch norm, train, default eps", _BN_EPS, hidden(scales(5), W1, ""), EPS)
move("bias: batch norm, train", _BN_EPS, plus(**{"0__bias": _drawn(5)}))
move(
    "sign of writer and gain: batch norm, train",
    _BN_EPS,
    along(("0.weight", 0, signs(5)), ("0.bias", 0, signs(5)), ("1.weight", 0, signs(5))),
)
control("sign of the writer alone: batch norm, train", _BN_EPS, hidden(signs(5), W1, ""))
control("scale of a unit: batch norm, eval", _BN_EVAL, hidden(scales(5), W1, ""))
control("bias: batch norm, eval", _BN_EVAL, plus(**{"0__bias": _drawn(5)}))
move(
    "scale of a unit with its running statistics: batch norm, eval",
    _BN_EVAL,
    along(
        ("0.weight", 0, scales(5)), ("0.bias", 0, scales(5)), ("1.running_mean", 0, scales(5)), ("1.running_var", 0, scales(5) @ scales(5))
    ),
)
_units_bn = along(
    ("0.weight", 0, cycle(5)), ("0.bias", 0, cycle(5)), ("1.weight", 0, cycle(5)), ("1.bias", 0, cycle(5)), ("3.weight", 1, cycle(5))
)
move(
    "units with running statistics: batch norm, eval",
    _BN_EVAL,
    both(_units_bn, along(("1.running_mean", 0, cycle(5)), ("1.running_var", 0, cycle(5)))),
)
control("units without running statistics: batch norm, eval", _BN_EVAL, _units_bn)
move("units: batch norm, train", _BN_EPS, _units_bn)
control("units without gain and shift: batch norm, train", _BN_EPS, hidden(cycle(5), W1, "3.weight"))
move("gain and shift against the reader through relu: batch norm", _BN_EPS, _gain)
control("negative gain through relu: batch norm", _BN_EPS, _gain_signed)
control("gain without shift against the reader: batch norm", _BN_EPS, along(("1.weight", 0, scales(5)), ("3.weight", 1, inv_t(scales(5)))))
move("gain of either sign against the reader: batch norm", _BN_ID, _gain_signed)
move("shift into the next bias: batch norm", _BN_ID, _norm_shift)
control("shift into the next bias through relu: batch norm", _BN_EPS, _norm_shift)


def _row_against_gain(p: State) -> dict[str, Tensor]:
    a = scales(5).diagonal()
    sd = (p["1.running_var"] + 1e-30).sqrt()
    shift = p["1.bias"] + p["1.weight"] * p["1.running_mean"] / sd * (1 / a - 1)
    return hidden(scales(5), W1, "")(p) | {"1.weight": p["1.weight"] / a, "1.bias": shift}


move("row against gain and shift: batch norm, eval", _BN_EVAL, _row_against_gain)
control(
    "row against gain without the shift: batch norm, eval",
    _BN_EVAL,
    both(hidden(scales(5), W1, ""), along(("1.weight", 0, inv_t(scales(5))))),
)
_LN = _norm(lambda: nn.LayerNorm(5), act=nn.Identity)
_LN_RELU = _norm(lambda: nn.LayerNorm(5))
_LN_EXACT = _norm(lambda: nn.LayerNorm(5, eps=0))
_RMS = _norm(lambda: nn.RMSNorm(5, eps=1e-5), act=nn.Identity)
_RMS_EXACT = _norm(lambda: nn.RMSNorm(5, eps=1e-300))
_RMS_FREE = _norm(lambda: nn.RMSNorm(5, eps=1e-5, elementwise_affine=False), act=nn.Identity)
_LN_FREE = _norm(lambda: nn.LayerNorm(5, elementwise_affine=False), act=nn.Identity)
_all = 1.7 * torch.eye(5, dtype=torch.float64)
_rows = plus(**{"0__weight": _drawn(1, 3).expand(5, 3), "0__bias": _drawn(1).expand(5)})
move("scale of the whole map: layer norm", _LN_EXACT, hidden(_all, W1, ""))
move("common row: layer norm", _LN_RELU, _rows)
control("scale of a unit: layer norm", _LN_RELU, hidden(scales(5), W1, ""))
control("bias of a unit: layer norm", _LN_RELU, plus(**{"0__bias": _drawn(5)}))
move("scale of the whole map: rms norm", _RMS_EXACT, hidden(_all, W1, ""))
control("common row: rms norm", _RMS, _rows)
control("sign of the writer: layer norm", _LN, hidden(signs(5), W1, ""))
move("gain of either sign against the reader: layer norm", _LN, _gain_signed)
move("shift into the next bias: layer norm", _LN, _norm_shift)
move(
    "gain of either sign against the reader: rms norm",
    _RMS,
    along(("1.weight", 0, signs(5) @ scales(5)), ("3.weight", 1, inv_t(signs(5) @ scales(5)))),
)
_hyper = plus(
    **{"3__weight": lambda p: _drawn(4, 1) / p["1.weight"], "3__bias": lambda p: -_drawn(4) * (p["1.bias"] / p["1.weight"]).sum()}
)
move("hyperplane of the reader: layer norm", _LN, _hyper)
control("hyperplane of the reader through relu: layer norm", _LN_RELU, _hyper)
control("hyperplane of the reader without its bias: layer norm", _LN, plus(**{"3__weight": lambda p: _drawn(4, 1) / p["1.weight"]}))
control("hyperplane of the reader: batch norm", _BN_ID, _hyper)
move("rotation: rms norm without gain", _RMS_FREE, hidden(rotation(5), W1, "3.weight"))
control("rotation: rms norm with gain", _RMS, hidden(rotation(5), W1, "3.weight"))
move(
    "signed permutation, gain permuted: rms norm", _RMS, both(hidden(signs(5) @ cycle(5), W1, "3.weight"), along(("1.weight", 0, cycle(5))))
)
control("signed permutation, gain left behind: rms norm", _RMS, hidden(signs(5) @ cycle(5), W1, "3.weight"))
move("rotation that fixes the mean: layer norm without gain", _LN_FREE, hidden(rotation_fixing_mean(5), W1, "3.weight"))
control("rotation: layer norm without gain", _LN_FREE, hidden(rotation(5), W1, "3.weight"))
control("general linear: rms norm without gain", _RMS_FREE, hidden(gl(5), W1, "3.weight"))
_GN = known("conv-gn-relu")
_GN_EXACT = known("conv-gn-relu-eps0")
_two = torch.diag(torch.tensor([1.6, 1.6, 0.6, 0.6], dtype=torch.float64))
_gn_all = [("c1.weight", 0), ("c1.bias", 0), ("g1.weight", 0), ("g1.bias", 0)]
move("scale of a group: group norm", _GN_EXACT, hidden(_two, "c1.weight c1.bias", ""))
move("scale of a group: group norm, default eps", _GN, hidden(_two, "c1.weight c1.bias", ""), EPS)
move("common bias of a group: group norm", _GN, plus(c1__bias=torch.tensor([0.7, 0.7, -0.4, -0.4], dtype=torch.float64)))
control("scale of a channel: group norm", _GN, hidden(scales(4), "c1.weight c1.bias", ""))
control("bias of a channel: group norm", _GN, plus(c1__bias=_drawn(4)))
control("common filter of a group: group norm", _GN, plus(c1__weight=_drawn(1, 2, 3, 3).expand(4, 2, 3, 3)))
move("channels inside a group: group norm", _GN, along(*((n, a, swap(4, 0, 1)) for n, a in _gn_all), ("fc.weight", 1, swap(4, 0, 1))))
move("groups as wholes: group norm", _GN, along(*((n, a, wide(cycle(2), 2)) for n, a in _gn_all), ("fc.weight", 1, wide(cycle(2), 2))))
control("channels across groups: group norm", _GN, along(*((n, a, swap(4, 1, 2)) for n, a in _gn_all), ("fc.weight", 1, swap(4, 1, 2))))
_IN = made(
    lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.InstanceNorm1d(5, affine=True, eps=1e-30), nn.ReLU(), MeanPool(), nn.Linear(5, 3)),
    (11, 2, 9),
)
move("scale of a channel: instance norm", _IN, hidden(scales(5), W1, ""))
move("bias of a channel: instance norm", _IN, plus(**{"0__bias": _drawn(5)}))
control("filter shift of a channel: instance norm", _IN, plus(**{"0__weight": _drawn(5, 2, 3)}))
_WN = zoo("weight-norm-tanh")
_g, _v = "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"
move("direction of a row: weight norm", _WN, along((_v, 0, scales(5))))
move("sign of gain and direction: weight norm", _WN, along((_v, 0, signs(5)), (_g, 0, signs(5))))
control("sign of the direction: weight norm", _WN, along((_v, 0, signs(5))))
control("direction of a column: weight norm", _WN, along((_v, 1, scales(3))))
_SN = zoo("spectral-norm")
move("scale of the whole map: spectral norm", _SN, along(("0.parametrizations.weight.original", 0, _all)))
control("scale of a row: spectral norm", _SN, along(("0.parametrizations.weight.original", 0, scales(5))))


# --- 4 readouts and losses -------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """Linear 3-5-4 with tanh, and something made of its logits."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.body(x))


def _smoothed(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(logits.shape[0]) % 4, label_smoothing=0.1, reduction="none")


def _with_z_loss(logits: Tensor) -> Tensor:
    return _smoothed(logits) + 0.1 * logits.logsumexp(-1).square()


def _reading(read: Callable[[Tensor], Tensor]) -> Build:
    return made(lambda: Loss(read), (11, 3))


_SHIFT = plus(body__2__weight=_drawn(1, 5).expand(4, 5), body__2__bias=_drawn(1).expand(4))
move("common row of the readout: log-softmax", _reading(lambda z: z.log_softmax(-1)), _SHIFT)
move("common row of the readout: label smoothing", _reading(_smoothed), _SHIFT)
move(
    "common row of the readout: hinge on differences",
    _reading(lambda z: F.multi_margin_loss(z, torch.arange(z.shape[0]) % 4, reduction="none")),
    _SHIFT,
)
control("common row of the readout: logits", _reading(lambda z: z), _SHIFT)
control("common row of the readout: z-loss", _reading(_with_z_loss), _SHIFT)
control("common row of the readout: squared error", _reading(lambda z: (z - 1).square().sum(-1)), _SHIFT)
control("common row of the readout: independent sigmoids", _reading(torch.sigmoid), _SHIFT)
control(
    "scale of the readout: log-softmax",
    _reading(lambda z: z.log_softmax(-1)),
    along(("body.2.weight", 0, 1.5 * torch.eye(4, dtype=torch.float64))),
)
control(
    "permutation of the classes", _reading(lambda z: z.log_softmax(-1)), along(("body.2.weight", 0, cycle(4)), ("body.2.bias", 0, cycle(4)))
)


# --- 5 attention -----------------------------------------------------------------------------------------------------


def _attention(**options: Any) -> Build:
    heads, kv_heads, dim = options.pop("heads", 2), options.pop("kv_heads", 2), options.pop("dim", 4)
    return made(lambda: Attention(5, heads, kv_heads, dim, bias=options.pop("bias", True), **options), (11, 7, 5))


def _qk(a: Tensor, heads: int, kv_heads: int, names: str = "weight bias") -> Transform:
    """``a`` on every key head, its contragredient on every query head."""
    return along(
        *((f"k.{n}", 0, copies(a, kv_heads)) for n in names.split()), *((f"q.{n}", 0, copies(inv_t(a), heads)) for n in names.split())
    )


def _ov(a: Tensor, heads: int, kv_heads: int) -> Transform:
    return along(("v.weight", 0, copies(a, kv_heads)), ("v.bias", 0, copies(a, kv_heads)), ("o.weight", 1, copies(inv_t(a), heads)))


def _heads(p: Tensor, kv: Tensor, dim: int) -> Transform:
    """Query heads by ``p``, key and value heads by ``kv``."""
    q, k = wide(p, dim), wide(kv, dim)
    return along(*((f"{n}.{t}", 0, q if n == "q" else k) for n in "qkv" for t in ("weight", "bias")), ("o.weight", 1, q))


_MHA, _MHA3 = _attention(), _attention(heads=3, kv_heads=3, dim=2)
_GQA, _MQA = _attention(heads=4, kv_heads=2, dim=2), _attention(heads=3, kv_heads=1, dim=2)
_HALF, _PAIRS = _attention(rotary="half"), _attention(rotary="pairs")
_key_bias = plus(k__bias=_drawn(8))
move("QK general linear: attention", _MHA, _qk(gl(4), 2, 2))
move("OV general linear: attention", _MHA, _ov(gl(4), 2, 2))
control("QK general linear, keys alone: attention", _MHA, along(("k.weight", 0, copies(gl(4), 2)), ("k.bias", 0, copies(gl(4), 2))))
control(
    "QK general linear with the inverse, not the contragredient: attention",
    _MHA,
    along(
        *((f"k.{n}", 0, copies(gl(4), 2)) for n in ("weight", "bias")),
        *((f"q.{n}", 0, copies(torch.linalg.inv(gl(4)), 2)) for n in ("weight", "bias")),
    ),
)
control(
    "QK general linear without the query bias: attention",
    _MHA,
    along(("k.weight", 0, copies(gl(4), 2)), ("k.bias", 0, copies(gl(4), 2)), ("q.weight", 0, copies(inv_t(gl(4)), 2))),
)
control("QK general linear across heads: attention", _MHA, _qk(gl(8), 1, 1))
control("OV general linear across heads: attention", _MHA, _ov(gl(8), 1, 1))
move("key bias: attention", _MHA, _key_bias)
control("query bias: attention", _MHA, plus(q__bias=_drawn(8)))
control("key bias: rotary", _HALF, _key_bias)
move("value bias into the output bias: attention", _MHA, plus(v__bias=_drawn(8), o__bias=lambda p: -p["o.weight"] @ _drawn(8)))
control("value bias without the output bias: attention", _MHA, plus(v__bias=_drawn(8)))
move("heads: attention", _MHA3, _heads(cycle(3), cycle(3), 2))
control(
    "heads of queries and keys alone: attention",
    _MHA3,
    along(*((f"{n}.{t}", 0, wide(cycle(3), 2)) for n in "qk" for t in ("weight", "bias"))),
)
control(
    "heads in interleaved rows: attention",
    _MHA3,
    along(*((f"{n}.{t}", 0, copies(cycle(3), 2)) for n in "qkv" for t in ("weight", "bias")), ("o.weight", 1, copies(cycle(3), 2))),
)
move("QK general linear, shared in a group: grouped queries", _GQA, _qk(gl(2), 4, 2))
move("OV general linear, shared in a group: grouped queries", _GQA, _ov(gl(2), 4, 2))
move("QK general linear: one key head", _MQA, _qk(gl(2), 3, 1))
control(
    "QK general linear on one query head: grouped queries",
    _GQA,
    along(
        ("k.weight", 0, blocks(gl(2), torch.eye(2).double())),
        ("k.bias", 0, blocks(gl(2), torch.eye(2).double())),
        ("q.weight", 0, blocks(inv_t(gl(2)), torch.eye(6).double())),
        ("q.bias", 0, blocks(inv_t(gl(2)), torch.eye(6).double())),
    ),
)
move("query heads inside a group: grouped queries", _GQA, _heads(swap(4, 0, 1), torch.eye(2).double(), 2))
move("groups as wholes: grouped queries", _GQA, _heads(wide(cycle(2), 2), cycle(2), 2))
control("query heads across groups: grouped queries", _GQA, _heads(swap(4, 1, 2), torch.eye(2).double(), 2))
move("QK rotary planes: rotate-half", _HALF, _qk(planes(4, False), 2, 2))
move("QK rotary planes: interleaved", _PAIRS, _qk(planes(4, True), 2, 2))
move("OV general linear: rotary", _HALF, _ov(gl(4), 2, 2))
control("QK planes of the other layout: rotate-half", _HALF, _qk(planes(4, True), 2, 2))
control("QK planes of the other layout: interleaved", _PAIRS, _qk(planes(4, False), 2, 2))
control("QK general linear: rotary", _HALF, _qk(gl(4), 2, 2))
control("QK diagonal: rotary", _HALF, _qk(scales(4), 2, 2))
control("planes exchanged: rotary", _HALF, _qk(copies(cycle(2), 2), 2, 2))
control("heads: ALiBi", _attention(alibi=True), _heads(cycle(2), cycle(2), 4))
move("QK general linear: ALiBi", _attention(alibi=True), _qk(gl(4), 2, 2))
_QKN, _QKG = _attention(qk_norm="l2"), _attention(qk_norm="rms")
move(
    "queries and keys scaled apart: normalised q and k",
    _QKN,
    along(*((f"q.{n}", 0, blocks(1.7 * torch.eye(4).double(), 0.6 * torch.eye(4).double())) for n in ("weight", "bias"))),
)
move("rotation: normalised q and k", _QKN, _qk(rotation(4), 2, 2))
control("general linear: normalised q and k", _QKN, _qk(gl(4), 2, 2))
control("key bias: normalised q and k", _QKN, _key_bias)
control("queries scaled alone: attention", _MHA, along(*((f"q.{n}", 0, 1.7 * torch.eye(8).double()) for n in ("weight", "bias"))))
move(
    "gain of q against gain of k: normalised q and k", _QKG, along(("q_norm.weight", 0, scales(4)), ("k_norm.weight", 0, inv_t(scales(4))))
)
control("rotation: normalised q and k with gains", _QKG, _qk(rotation(4), 2, 2))


class TiedQK(nn.Module):
    """Full attention with one matrix for queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(5, 4, bias=False)
        self.v = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        return (k @ k.transpose(-1, -2) / 2).softmax(-1) @ self.v(x)


_TIED = made(TiedQK, (11, 7, 5))
move("rotation: tied queries and keys", _TIED, along(("k.weight", 0, rotation(4))))
control("general linear: tied queries and keys", _TIED, along(("k.weight", 0, gl(4))))
_KERNEL = zoo("linear-attention")
move("features permute: kernel attention", _KERNEL, along(("q.weight", 0, cycle(3)), ("k.weight", 0, cycle(3))))
control("sign of a feature: kernel attention", _KERNEL, along(("q.weight", 0, flip(3)), ("k.weight", 0, flip(3))))
control("QK general linear: kernel attention", _KERNEL, along(("k.weight", 0, gl(3)), ("q.weight", 0, inv_t(gl(3)))))
_PACKED = zoo("multihead-attention")  # in_proj rows: q 0-5, k 6-11, v 12-17; 3 heads of 2
_pack = "attention.in_proj_weight", "attention.in_proj_bias"
_O = "attention.out_proj.weight"
move("heads: packed projection", _PACKED, along(*((n, 0, copies(wide(cycle(3), 2), 3)) for n in _pack), (_O, 1, wide(cycle(3), 2))))
move(
    "QK general linear: packed projection",
    _PACKED,
    along(*((n, 0, blocks(copies(inv_t(gl(2)), 3), copies(gl(2), 3), torch.eye(6).double())) for n in _pack)),
)
control(
    "heads read as interleaved q, k, v: packed projection",
    _PACKED,
    along(*((n, 0, wide(cycle(3), 6)) for n in _pack), (_O, 1, wide(cycle(3), 2))),
)


# --- 6 streams and skips ---------------------------------------------------------------------------------------------


class Stream(nn.Module):
    """Tokens, one pre-norm tanh block, final norm, head; the head may be the table itself."""

    def __init__(self, norm: Callable[[], nn.Module], tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.n1, self.n2 = norm(), norm()
        self.up = nn.Linear(5, 6)
        self.down = nn.Linear(6, 5)
        self.head = None if tied else nn.Linear(5, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.down(torch.tanh(self.up(self.n1(x))))
        return F.linear(self.n2(x), self.table.weight if self.head is None else self.head.weight)


def _stream(norm: Callable[[], nn.Module], tied: bool = False) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        with fresh(0):
            return spread_(Stream(norm, tied)).eval(), (torch.randint(7, (11, 4)),)

    return build


def _turn_stream(a: Tensor, readers: str = "up.weight head.weight") -> Transform:
    return along(("table.weight", 1, a), ("down.weight", 0, a), ("down.bias", 0, a), *((r, 1, inv_t(a)) for r in readers.split()))


def _rms(affine: bool, eps: float = 1e-5) -> Callable[[], nn.Module]:
    return lambda: nn.RMSNorm(5, eps=eps, elementwise_affine=affine)


def _ln(affine: bool, eps: float = 1e-5) -> Callable[[], nn.Module]:
    return lambda: nn.LayerNorm(5, elementwise_affine=affine, eps=eps)


_means = plus(table__weight=_drawn(7, 1).expand(7, 5), down__weight=_drawn(1, 6).expand(5, 6), down__bias=_drawn(1).expand(5))
_writers = along(*((n, 0, 1.6 * torch.eye(s).double()) for n, s in (("table.weight", 7), ("down.weight", 5), ("down.bias", 5))))
move("general linear: stream without norm", _stream(nn.Identity), _turn_stream(gl(5)))
control("general linear: stream with rms norm", _stream(_rms(False)), _turn_stream(gl(5)))
move("rotation: stream with gainless rms norm", _stream(_rms(False)), _turn_stream(rotation(5)))
control("rotation: stream with rms gains not folded", _stream(_rms(True)), _turn_stream(rotation(5)))
control("rotation: stream with gainless layer norm", _stream(_ln(False)), _turn_stream(rotation(5)))
move("rotation that fixes the mean: stream with gainless layer norm", _stream(_ln(False)), _turn_stream(rotation_fixing_mean(5)))
move("rotation: tied stream with gainless rms norm", _stream(_rms(False), True), _turn_stream(rotation(5), "up.weight"))
control("general linear: tied stream without norm", _stream(nn.Identity, True), _turn_stream(gl(5), "up.weight"))
move("rotation: tied stream without norm", _stream(nn.Identity, True), _turn_stream(rotation(5), "up.weight"))
move(
    "signed permutation, gains permuted: stream with rms norm",
    _stream(_rms(True)),
    both(_turn_stream(signs(5) @ cycle(5)), along(("n1.weight", 0, cycle(5)), ("n2.weight", 0, cycle(5)))),
)
control("signed permutation, gains left behind: stream with rms norm", _stream(_rms(True)), _turn_stream(signs(5) @ cycle(5)))
control("sign of a channel: stream with layer norm", _stream(_ln(False)), _turn_stream(flip(5)))
move("multiples of one in the writers: stream with layer norm", _stream(_ln(True)), _means)
control("multiples of one in the writers: stream with rms norm", _stream(_rms(True)), _means)
control("multiples of one in a tied table: stream with layer norm", _stream(lambda: nn.LayerNorm(5), True), _means)
move("common scale of all writers: stream with a final norm", _stream(_ln(True, 1e-30)), _writers)
control(
    "common scale of some writers: stream with a final norm",
    _stream(_ln(True, 1e-30)),
    along(("table.weight", 0, 1.6 * torch.eye(7).double())),
)
control("common scale of all writers: stream without norm", _stream(nn.Identity), _writers)
_RES = zoo("residual-linear-stream")
_RESRELU = known("residual-bn-eval")
_stream_perm = [
    ("b0.weight", 0),
    ("b0.bias", 0),
    ("b0.running_mean", 0),
    ("b0.running_var", 0),
    ("c0.weight", 0),
    ("c1.weight", 1),
    ("fc.weight", 1),
]
_branch_perm = [("c2.weight", 0), ("b2.weight", 0), ("b2.bias", 0), ("b2.running_mean", 0), ("b2.running_var", 0)]
move(
    "stream channels, all writers and readers: residual batch norm",
    _RESRELU,
    along(*((n, a, cycle(3)) for n, a in _stream_perm + _branch_perm)),
)
control("stream channels of the stem only: residual batch norm", _RESRELU, along(*((n, a, cycle(3)) for n, a in _stream_perm)))
move(
    "stream scale, all writers and readers: residual batch norm",
    _RESRELU,
    along(
        *((n, 0, scales(3)) for n in ("b0.weight", "b0.bias", "b2.weight", "b2.bias")),
        ("c1.weight", 1, inv_t(scales(3))),
        ("fc.weight", 1, inv_t(scales(3))),
    ),
)
control(
    "stream scale of one writer: residual batch norm",
    _RESRELU,
    along(("b0.weight", 0, scales(3)), ("b0.bias", 0, scales(3)), ("c1.weight", 1, inv_t(scales(3)))),
)
control(
    "negative stream scale: residual batch norm",
    _RESRELU,
    along(
        *((n, 0, flip(3)) for n in ("b0.weight", "b0.bias", "b2.weight", "b2.bias")), ("c1.weight", 1, flip(3)), ("fc.weight", 1, flip(3))
    ),
)
move(
    "general linear of the stream: residual without norm",
    _RES,
    along(
        *((n, 0, gl(4)) for n in ("embed.weight", "embed.bias", "down.0.weight", "down.0.bias", "down.1.weight", "down.1.bias")),
        *((n, 1, inv_t(gl(4))) for n in ("up.0.weight", "up.1.weight", "head.weight")),
    ),
)
control(
    "general linear of one branch: residual without norm",
    _RES,
    along(("down.0.weight", 0, gl(4)), ("down.0.bias", 0, gl(4)), ("up.1.weight", 1, inv_t(gl(4)))),
)
_DENSE = zoo("densenet")
move(
    "concatenated parts apart: densenet",
    _DENSE,
    along(
        ("a.weight", 0, cycle(5)),
        ("a.bias", 0, cycle(5)),
        ("b.weight", 1, cycle(5)),
        ("c.weight", 1, blocks(cycle(5), torch.eye(4).double())),
    ),
)
control(
    "concatenated axis as one: densenet",
    _DENSE,
    along(
        ("a.weight", 0, cycle(5)),
        ("a.bias", 0, cycle(5)),
        ("b.weight", 1, cycle(5)),
        ("b.weight", 0, cycle(4)),
        ("b.bias", 0, cycle(4)),
        ("c.weight", 1, cycle(9)),
    ),
)


def _gpt() -> tuple[nn.Module, tuple[Any, ...]]:
    with fresh(0):
        model = TinyGPT()
        draw_transformer_(model, 0.8)
        return model.eval(), (torch.randint(7, (11, 5)),)


_token = _drawn(1, 4)
move("token table against position table: gpt", _gpt, plus(wte__weight=_token, wpe__weight=-_token))
control("token table alone: gpt", _gpt, plus(wte__weight=_token))
control(
    "rotation of the stream with its gains: gpt",
    _gpt,
    along(
        *((n, 1, rotation(4)) for n in ("wte.weight", "wpe.weight", "qkv.weight", "fc.weight", "head.weight")),
        *((n, 0, rotation(4)) for n in ("proj.weight", "proj.bias", "out.weight", "out.bias")),
    ),
)
_SE = made(SqueezeExcite, (11, 2, 7))
_se = [("conv.weight", 0), ("conv.bias", 0), ("squeeze.weight", 1), ("head.weight", 1)]
move(
    "channels with their gates: squeeze and excitation",
    _SE,
    along(*((n, a, cycle(5)) for n, a in _se), ("excite.weight", 0, cycle(5)), ("excite.bias", 0, cycle(5))),
)
control("channels without their gates: squeeze and excitation", _SE, along(*((n, a, cycle(5)) for n, a in _se)))


# --- 7 gated, recurrent, mixtures, factors ---------------------------------------------------------------------------

_UP, _GATE, _DOWN = "u.weight u.bias", "g.weight g.bias", "d.weight"
_SWIGLU, _REGLU = made(lambda: GLUBlock(F.silu), (11, 3)), made(lambda: GLUBlock(F.relu), (11, 3))
_BILINEAR = made(lambda: GLUBlock(lambda x: x), (11, 3))


def _exchange(p: State) -> dict[str, Tensor]:
    return {"g.weight": p["u.weight"], "u.weight": p["g.weight"], "g.bias": p["u.bias"], "u.bias": p["g.bias"]}


move("linear branch against down, either sign: swiglu", _SWIGLU, hidden(signs(5) @ scales(5), _UP, _DOWN))
move("units of both branches: swiglu", _SWIGLU, hidden(cycle(5), f"{_UP} {_GATE}", _DOWN))
control("units of one branch: swiglu", _SWIGLU, hidden(cycle(5), _UP, _DOWN))
control("gate against down: swiglu", _SWIGLU, hidden(scales(5), _GATE, _DOWN))
control("sign of gate and down: swiglu", _SWIGLU, hidden(flip(5), _GATE, _DOWN))
control("exchange of gate and linear branch: swiglu", _SWIGLU, _exchange)
move("gate against down: reglu", _REGLU, hidden(scales(5), _GATE, _DOWN))
control("sign of gate and down: reglu", _REGLU, hidden(flip(5), _GATE, _DOWN))
move("gate against down, either sign: bilinear", _BILINEAR, hidden(signs(5) @ scales(5), _GATE, _DOWN))
move("exchange of the branches: bilinear", _BILINEAR, _exchange)
control("general linear of the units: bilinear", _BILINEAR, hidden(gl(5), f"{_UP} {_GATE}", _DOWN))


def _cells(name: str, gates: int, a: Tensor, rows: Tensor | None = None, columns: bool = True) -> Transform:
    """``a`` on the hidden units: rows of every gate (or the given row matrix), recurrent columns, readout."""
    r = copies(a, gates) if rows is None else rows
    back = [("rnn.weight_hh_l0", 1, inv_t(a)), ("head.weight", 1, inv_t(a))] if columns else []
    return along(*((f"rnn.{n}_l0", 0, r) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")), *back)


def _only(n: int, gates: int, chosen: int, a: Tensor) -> Tensor:
    return blocks(*(a if g == chosen else torch.eye(n).double() for g in range(gates)))


def _against(n: int, rows: slice) -> Transform:
    c = torch.zeros(n, dtype=torch.float64)
    c[rows] = 0.7
    return plus(rnn__bias_ih_l0=c, rnn__bias_hh_l0=-c)


_RNN, _LSTM, _GRU = zoo("rnn"), zoo("lstm"), zoo("gru")
move("units: rnn", _RNN, _cells("rnn", 1, cycle(5)))
move("signs: rnn", _RNN, _cells("rnn", 1, signs(5)))
move("input bias against recurrent bias: rnn", _RNN, _against(5, slice(0, 5)))
control(
    "units without the recurrent columns: rnn", _RNN, both(_cells("rnn", 1, cycle(5), columns=False), along(("head.weight", 1, cycle(5))))
)
control("rescale: rnn", _RNN, _cells("rnn", 1, scales(5)))
move("units: lstm", _LSTM, _cells("lstm", 4, cycle(5)))
move("signs, candidate rows only: lstm", _LSTM, _cells("lstm", 4, signs(5), _only(5, 4, 2, signs(5))))
move("input bias against recurrent bias: lstm", _LSTM, _against(20, slice(0, 20)))
control("signs, all gates: lstm", _LSTM, _cells("lstm", 4, signs(5)))
control("signs, output gate instead of candidate: lstm", _LSTM, _cells("lstm", 4, signs(5), _only(5, 4, 3, signs(5))))
control(
    "gates exchanged: lstm",
    _LSTM,
    along(*((f"rnn.{n}_l0", 0, wide(swap(4, 0, 1), 5)) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))),
)
control("units in interleaved rows: lstm", _LSTM, _cells("lstm", 4, cycle(5), wide(cycle(5), 4)))
control("rescale: lstm", _LSTM, _cells("lstm", 4, scales(5), _only(5, 4, 2, scales(5))))
move("units: gru", _GRU, _cells("gru", 3, cycle(5)))
move("signs, new-gate rows only: gru", _GRU, _cells("gru", 3, signs(5), _only(5, 3, 2, signs(5))))
move("input bias against recurrent bias, gates r and z: gru", _GRU, _against(15, slice(0, 10)))
control("input bias against recurrent bias, new gate: gru", _GRU, _against(15, slice(10, 15)))
control("signs, all gates: gru", _GRU, _cells("gru", 3, signs(5)))
move(
    "rescale: relu rnn",
    known("rnn-relu"),
    along(
        *((f"r.{n}_l0", 0, scales(4)) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        ("r.weight_hh_l0", 1, inv_t(scales(4))),
        ("fc.weight", 1, inv_t(scales(4))),
    ),
)
move(
    "general linear of the state: dense state space",
    zoo("ssm-dense"),
    along(("A", 0, gl(3)), ("A", 1, inv_t(gl(3))), ("B", 0, gl(3)), ("C", 1, inv_t(gl(3)))),
)
control("general linear without the recurrence: dense state space", zoo("ssm-dense"), along(("B", 0, gl(3)), ("C", 1, inv_t(gl(3)))))
move(
    "states and their scales: diagonal state space",
    zoo("ssm-diagonal"),
    both(hidden(cycle(5) @ signs(5) @ scales(5), "B.weight", "C.weight"), along(("a", 0, cycle(5)))),
)
control("general linear of the state: diagonal state space", zoo("ssm-diagonal"), hidden(gl(5), "B.weight", "C.weight"))
for _name, _top in (("soft mixture", None), ("top-2 mixture", 2)):
    _MOE = made(lambda top=_top: Experts(top), (11, 5))
    _experts = along(("w1", 0, cycle(4)), ("w2", 0, cycle(4)))
    move(f"experts with router rows: {_name}", _MOE, both(_experts, along(("router.weight", 0, cycle(4)), ("router.bias", 0, cycle(4)))))
    control(f"experts without router rows: {_name}", _MOE, _experts)
    move(f"common router row: {_name}", _MOE, plus(router__weight=_drawn(1, 5).expand(4, 5), router__bias=_drawn(1).expand(4)))
    control(
        f"scale of the router: {_name}",
        _MOE,
        along(("router.weight", 0, 2 * torch.eye(4).double()), ("router.bias", 0, 2 * torch.eye(4).double())),
    )
    control(f"units permuted across experts: {_name}", _MOE, along(("w1", 0, cycle(4))))
move("rank space: low-rank adapter", zoo("lora"), hidden(gl(2), "0.down.weight", "0.up.weight"))
control("one factor alone: low-rank adapter", zoo("lora"), hidden(gl(2), "0.down.weight", ""))
control("frozen units rescaled by the adapter: low-rank adapter", zoo("lora"), hidden(scales(7), "0.up.weight", "2.down.weight"))
_entry = torch.linspace(0.5, 1.8, 20, dtype=torch.float64).view(5, 4) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(10).view(5, 4)
move("entry against entry: elementwise product", known("spred-uv"), lambda p: {"0.u": p["0.u"] * _entry, "0.v": p["0.v"] / _entry})
control(
    "row mixing: elementwise product", known("spred-uv"), lambda p: {"0.u": gl(5) @ p["0.u"], "0.v": torch.linalg.inv(gl(5)) @ p["0.v"]}
)
_AE = known("linear-ae-tied-bias")
move("rotation of the code: tied autoencoder", _AE, along(("W", 0, rotation(3)), ("be", 0, rotation(3))))
control("general linear of the code: tied autoencoder", _AE, along(("W", 0, gl(3)), ("be", 0, gl(3))))
move("general linear of the code: untied autoencoder", known("linear-ae-untied-bias"), hidden(gl(3), "0.weight 0.bias", "1.weight"))
move(
    "scales of product one: CP tensor",
    zoo("cp-tensor"),
    along(("a", 0, signs(3) @ scales(3)), ("b", 0, signs(3)), ("c", 0, inv_t(scales(3)))),
)
control(
    "scales of another product: CP tensor", zoo("cp-tensor"), along(("a", 0, scales(3)), ("b", 0, scales(3)), ("c", 0, inv_t(scales(3))))
)
move(
    "general linear: matrix factorisation",
    zoo("matrix-factorisation"),
    along(("rows.weight", 1, gl(3)), ("columns.weight", 1, inv_t(gl(3)))),
)
control(
    "one permutation for each member: batch ensemble",
    known("batch-ensemble"),
    lambda p: {n: torch.cat([p[n][:1].flip(1), p[n][1:]]) for n in ("l1.s", "l1.b", "l2.r")},
)
move(
    "one permutation for all members: batch ensemble",
    known("batch-ensemble"),
    along(("l1.W", 0, cycle(5)), ("l1.s", 1, cycle(5)), ("l1.b", 1, cycle(5)), ("l2.r", 1, cycle(5)), ("l2.W", 1, cycle(5))),
)
move("general linear of the pooled space: deep set", zoo("deep-set"), hidden(gl(3), "phi.2.weight phi.2.bias", "rho.0.weight"))
_MIX = known("mlp-mixer")
move(
    "common gain of the token norm: mixer",
    _MIX,
    along(
        ("n1.weight", 0, 1.6 * torch.eye(3).double()),
        ("n1.bias", 0, 1.6 * torch.eye(3).double()),
        ("t1.weight", 0, torch.eye(5).double() / 1.6),
    ),
)
control("gain of the token norm by channel: mixer", _MIX, along(("n1.weight", 0, scales(3)), ("n1.bias", 0, scales(3))))
control("tokens in one layer: mixer", _MIX, along(("t1.weight", 1, cycle(4))))
move("unread rows: table", zoo("unused-parts"), lambda p: {"table.weight": torch.cat([p["table.weight"][:5], p["table.weight"][5:] + 1])})
control("read rows: table", zoo("unused-parts"), lambda p: {"table.weight": torch.cat([p["table.weight"][:4], p["table.weight"][4:] + 1])})


# --- 8 embeddings and latents ----------------------------------------------------------------------------------------


class Contrastive(nn.Module):
    """InfoNCE over a batch: cosine similarities between two views; one number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.tower(a), dim=-1, eps=0), F.normalize(self.tower(b), dim=-1, eps=0)
        return F.cross_entropy(5 * a @ b.T, torch.arange(len(a)), reduction="none")


_NCE = made(Contrastive, (11, 3), (11, 3))
move("rotation of the embedding: InfoNCE", _NCE, along(("tower.2.weight", 0, rotation(4))))
move("scale of the embedding: InfoNCE", _NCE, along(("tower.2.weight", 0, 1.7 * torch.eye(4).double())))
control("general linear of the embedding: InfoNCE", _NCE, along(("tower.2.weight", 0, gl(4))))
control("bias of the embedding: cosine", zoo("siamese-cosine"), plus(tower__2__bias=_drawn(4)))
move(
    "rotation of the embedding: cosine", zoo("siamese-cosine"), along(("tower.2.weight", 0, rotation(4)), ("tower.2.bias", 0, rotation(4)))
)
move(
    "rotation and bias of the embedding: squared distance",
    zoo("siamese-euclidean"),
    both(along(("tower.2.weight", 0, rotation(4))), plus(tower__2__bias=_drawn(4))),
)
control("scale of the embedding: squared distance", zoo("siamese-euclidean"), along(("tower.2.weight", 0, 1.7 * torch.eye(4).double())))


def _twins() -> tuple[nn.Module, tuple[Any, ...]]:
    with fresh(11):
        model = generic_(BarlowTwins())
        base = 2 * torch.randn(17, 4)
        return model.eval(), (base + 0.5 * torch.randn(17, 4), base + 0.5 * torch.randn(17, 4))


move(
    "signed permutation, scales, shifts: Barlow Twins",
    _twins,
    both(
        along(("l2.weight", 0, signs(3) @ cycle(3) @ scales(3)), ("l2.bias", 0, signs(3) @ cycle(3) @ scales(3))), plus(l2__bias=_drawn(3))
    ),
)
control("rotation: Barlow Twins", _twins, along(("l2.weight", 0, rotation(3)), ("l2.bias", 0, rotation(3))))
_VAE, _NOISE = known("vae-mean-plus-kl"), known("vae-fixed-noise-samples")


def _latent(a: Tensor) -> Transform:
    return along(("mu.weight", 0, a), ("mu.bias", 0, a), ("d1.weight", 1, inv_t(a)))


move("rotation of the latent mean: VAE at its mean", _VAE, _latent(rotation(3)))
control("general linear of the latent mean: VAE with KL", _VAE, _latent(gl(3)))
control("translation of the latent: VAE with KL", _VAE, plus(mu__bias=_drawn(3), d1__bias=lambda p: -p["d1.weight"] @ _drawn(3)))
move("general linear of the latent mean: VAE without KL", known("vae-mean-no-kl"), _latent(gl(3)))
control("rotation of the latent mean: VAE with noise", _NOISE, _latent(rotation(3)))
control("signs of the latent: VAE with fixed noise", _NOISE, _latent(flip(3)))


class DiagonalPosterior(nn.Module):
    """Second moments of the decoder's first linear layer under a diagonal Gaussian posterior, and the KL: no sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Linear(4, 3)
        self.logvar = nn.Linear(4, 3)
        self.d = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.mu(x), 0.5 * torch.tanh(self.logvar(x))
        variance = logvar.exp() @ self.d.weight.square().T
        kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(-1, keepdim=True)
        return torch.cat([self.d(mu), variance, kl], -1)


_POSTERIOR = made(DiagonalPosterior, (11, 4))
_lv = along(("logvar.weight", 0, cycle(3)), ("logvar.bias", 0, cycle(3)))
_dl = along(*((f"mu.{n}", 0, signs(3) @ cycle(3)) for n in ("weight", "bias")), ("d.weight", 1, signs(3) @ cycle(3)))
move("signed permutation of the latent, variances permuted: diagonal posterior", _POSTERIOR, both(_dl, _lv))
control("signed permutation of the latent, variances left behind: diagonal posterior", _POSTERIOR, _dl)
control(
    "rotation of the latent: diagonal posterior",
    _POSTERIOR,
    along(("mu.weight", 0, rotation(3)), ("mu.bias", 0, rotation(3)), ("d.weight", 1, rotation(3))),
)
