"""A zoo of small architectures: what people build, each as a twin of at most a few hundred parameters with distinct widths.

``ZOO[name].build()`` returns (model, args, kwargs) in float64 with generic weights and leaves dtype and random state as they
were; ``build(seed=1, samples=400)`` takes another draw and more samples. ``nullity`` is the number of null directions of the
Jacobian at many samples, as counted by the oracle of ``test_known_answers_oracle.py``; ``expects`` says in the field's words
what the catalogue of symmetries predicts (not a complete list).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from known_answers import fresh

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
SAMPLES = 11  # a prime that no other axis uses


@dataclass(frozen=True)
class ZooCase:
    """One architecture.

    Attributes:
        name: key in ``ZOO``.
        build: (seed=case.seed, samples=11) -> (model, args, kwargs).
        seed: the seed ``nullity`` was counted at: no dead, always-on or otherwise special unit.
        mode: "eval" or "train".
        expects: where -> group, from the catalogue.
        nullity: null directions of the Jacobian at generic weights and many samples; None where it was not counted.
        samples: how many samples ``nullity`` takes.
        exports: ``torch.export.export(..., strict=False)`` captures it.
        mixes_samples: outputs depend on the other samples of the batch.
        requires: packages needed beyond torch.
        note: pitfalls.
    """

    name: str
    build: Callable[..., Built] = field(repr=False)
    seed: int = 0
    mode: Literal["eval", "train"] = "eval"
    expects: Mapping[str, str] = field(default_factory=dict)
    nullity: int | None = None
    samples: int = 400
    exports: bool = True
    mixes_samples: bool = False
    requires: tuple[str, ...] = ()
    note: str = ""

    @property
    def available(self) -> bool:
        """Whether the packages this case needs can be imported."""
        return all(importlib.util.find_spec(package) is not None for package in self.requires)


ZOO: dict[str, ZooCase] = {}
Builder = Callable[[int], Built]


def zoo(name: str, seed: int = 0, **facts: Any) -> Callable[[Builder], Builder]:
    """Register a builder (samples -> model, args, kwargs) of generic weights; it runs in float64 after seeding."""

    def register(builder: Builder) -> Builder:
        def build(seed: int = seed, samples: int = SAMPLES) -> Built:
            with fresh(seed):
                model, args, kwargs = builder(samples)
            return model.train(facts.get("mode", "eval") == "train"), args, kwargs

        if name in ZOO:
            raise ValueError(f"two architectures are called {name!r}")
        ZOO[name] = ZooCase(name=name, build=build, seed=seed, **facts)
        return builder

    return register


def spread_(model: nn.Module) -> nn.Module:
    """Draw generic weights: gains 1 + 0.3 N, biases 0.3 N, tables N(0, 1), everything else N(0, 1 / fan-in)."""
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.BatchNorm1d, nn.BatchNorm2d)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
            for name, p in module.named_parameters(recurse=False):
                gain = "norm" in type(module).__name__.lower() or isinstance(module, norms)
                if isinstance(module, nn.PReLU):
                    p.uniform_(0.1, 0.6)
                elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
                    p.normal_()
                elif "bias" in name or (gain and name in ("beta", "shift")):
                    p.normal_(0, 0.3)
                elif gain or name in ("gain", "original0"):
                    p.normal_(1, 0.3)
                elif p.dim() < 2:
                    p.normal_(0.5, 0.5)
                else:
                    p.normal_(0, 1 / math.sqrt(max(p[0].numel(), 1)))
    return model


def _points(samples: int, *shape: int) -> tuple[Tensor]:
    return (2 * torch.randn(samples, *shape),)


# --- one multilayer perceptron for each activation of the catalogue ---------------------------------------------------


class Pointwise(nn.Module):
    """An elementwise function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BiggerMLP(nn.Sequential):
    """Linear 3-5-7-2 with one activation."""

    def __init__(self, activation: Callable[[int], nn.Module]) -> None:
        super().__init__(nn.Linear(3, 5), activation(5), nn.Linear(5, 7), activation(7), nn.Linear(7, 2))


SEEDS = {"relu": 1, "abs": 10, "relu2": 1, "hardtanh": 7}  # draws without dead, always-on or unsaturated units

ACTIVATIONS: dict[str, tuple[Callable[[int], nn.Module], str, int]] = {
    # name: (width -> module, group of each unit beyond permutations, nullity)
    "relu": (lambda n: nn.ReLU(), "R+", 12),
    "leaky_relu": (lambda n: nn.LeakyReLU(0.1), "R+", 12),
    "prelu": (nn.PReLU, "R+ and Z2 (slope inverted)", 12),
    "abs": (lambda n: Pointwise(torch.abs), "R+ and Z2 (even)", 12),
    "relu2": (lambda n: Pointwise(lambda x: F.relu(x) ** 2), "R+ (v / lam^2)", 12),
    "square": (lambda n: Pointwise(torch.square), "R+ (v / lam^2) and Z2 (even)", 21),
    "tanh": (lambda n: nn.Tanh(), "Z2 (odd)", 0),
    "sin": (lambda n: Pointwise(torch.sin), "Z2 (odd) and Z (periodic)", 0),
    "erf": (lambda n: Pointwise(torch.erf), "Z2 (odd)", 0),
    "softsign": (lambda n: nn.Softsign(), "Z2 (odd)", 0),
    "hardtanh": (lambda n: nn.Hardtanh(), "Z2 (odd)", 0),
    "sigmoid": (lambda n: nn.Sigmoid(), "Z2 affine (w, b, v) -> -(w, b, v), b2 += v", 0),
    "softplus": (lambda n: nn.Softplus(), "", 0),
    "elu": (lambda n: nn.ELU(), "", 0),
    "gelu": (lambda n: nn.GELU(), "", 0),
    "silu": (lambda n: nn.SiLU(), "", 0),
    "cos": (lambda n: Pointwise(torch.cos), "Z2 (even) and Z (periodic)", 0),
    "gaussian": (lambda n: Pointwise(lambda x: torch.exp(-(x**2))), "Z2 (even)", 0),
}


def _register_activation(name: str, activation: Callable[[int], nn.Module], unit: str, nullity: int) -> None:
    def build(samples: int) -> Built:
        return spread_(BiggerMLP(activation)), _points(samples, 3), {}

    expects = {"hidden 1": "S_5", "hidden 2": "S_7"} | ({"each unit": unit} if unit else {})
    zoo(f"mlp-{name}", seed=SEEDS.get(name, 0), nullity=nullity, expects=expects, samples=600)(build)


for _name, (_activation, _unit, _nullity) in ACTIVATIONS.items():
    _register_activation(_name, _activation, _unit, _nullity)


@zoo("mlp-linear", nullity=6, expects={"hidden": "GL(2) semidirect R^2"}, note="Two linear layers with nothing between.")
def _mlp_linear(samples: int) -> Built:
    return spread_(nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 3))), _points(samples, 5), {}


@zoo("mlp-dropout-eval", nullity=5, expects={"hidden": "S_5 and R+^5"})
def _mlp_dropout(samples: int) -> Built:
    return spread_(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2))), _points(samples, 3), {}


class Maxout(nn.Module):
    """Two linear pieces for each unit, the larger one read."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 10)
        self.down = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).unflatten(-1, (5, 2)).amax(-1))


@zoo("maxout", nullity=19, expects={"units": "S_5, R+^5, R^3+1 common to both pieces", "pieces": "S_2^5"})
def _maxout(samples: int) -> Built:
    return spread_(Maxout()), _points(samples, 3), {}


# --- convolutions ----------------------------------------------------------------------------------------------------


class MeanPool(nn.Module):
    """Mean over every axis behind the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


@zoo("conv-grouped", nullity=15, expects={"first channels": "S_2 wr S_3 and R+^6", "second channels": "S_9 and R+^9"})
def _conv_grouped(samples: int) -> Built:
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 9, 3, groups=3), nn.ReLU(), MeanPool(), nn.Linear(9, 2)
    )  # fmt: skip
    return spread_(model), _points(samples, 2, 13), {}


@zoo("conv-depthwise", nullity=17, expects={"channels": "S_5, R*^5 (producer against depthwise), R+^5 (through ReLU)"})
def _conv_depthwise(samples: int) -> Built:
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.Conv2d(5, 5, 2, groups=5, bias=False), nn.ReLU(), nn.Conv2d(5, 7, 1), nn.ReLU(), MeanPool(), nn.Linear(7, 3)
    )  # fmt: skip
    return spread_(model), _points(samples, 2, 6, 6), {}


@zoo("conv-transposed", nullity=5, expects={"channels": "S_5 and R+^5"}, note="weight is (in, out / groups, kernel).")
def _conv_transposed(samples: int) -> Built:
    return spread_(nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.ConvTranspose1d(5, 3, 3, stride=2))), _points(samples, 2, 7), {}


@zoo("conv-pixel-shuffle", nullity=3, expects={"channels": "S_3, the 4 sub-pixels of a channel as a block"})
def _conv_pixel_shuffle(samples: int) -> Built:
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 2))
    return spread_(model), _points(samples, 2, 3, 3), {}


@zoo("conv-flatten-tanh", nullity=0, expects={"channels": "S_5 and Z2^5, blocks of 4 columns"})
def _conv_flatten(samples: int) -> Built:
    model = nn.Sequential(nn.Conv2d(1, 5, 2), nn.Tanh(), nn.MaxPool2d(1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))
    return spread_(model), _points(samples, 1, 5, 5), {}


class UNet(nn.Module):
    """One-level 1-d U-Net: down, bottleneck, nearest upsampling, concatenated skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 3, 3, padding=1)
        self.down = nn.Conv1d(3, 5, 2, stride=2)
        self.up = nn.ConvTranspose1d(5, 4, 2, stride=2)
        self.head = nn.Conv1d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.stem(x))
        deep = F.relu(self.down(skip))
        return self.head(torch.cat([F.relu(self.up(deep)), skip], 1))


@zoo("unet", seed=1, nullity=12, expects={"stem": "S_3 and R+^3", "bottleneck": "S_5 and R+^5", "up": "S_4 and R+^4"})
def _unet(samples: int) -> Built:
    return spread_(UNet()), _points(samples, 2, 8), {}


class DenseBlock(nn.Module):
    """Concatenating (DenseNet) connections."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 5)
        self.b = nn.Linear(5, 4)
        self.c = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        return self.c(torch.cat([a, b], -1))


@zoo("densenet", seed=1, nullity=9, expects={"a": "S_5 and R+^5", "b": "S_4 and R+^4"})
def _densenet(samples: int) -> Built:
    return spread_(DenseBlock()), _points(samples, 3), {}


class SqueezeExcite(nn.Module):
    """A convolution whose channels are gated by a squeeze-and-excitation branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 5, 3)
        self.squeeze = nn.Linear(5, 3)
        self.excite = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(-1)))))
        return self.head((x * gate[..., None]).mean(-1))


@zoo("squeeze-excite", seed=3, nullity=8, expects={"conv": "S_5 and R+^5", "squeeze": "S_3 and R+^3"})
def _squeeze_excite(samples: int) -> Built:
    return spread_(SqueezeExcite()), _points(samples, 2, 7), {}


class Residual(nn.Module):
    """Two plain ReLU residual blocks between linear maps, without norms."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.up = nn.ModuleList(nn.Linear(4, 5) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(5, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(self.activation(up(x)))
        return self.head(x)


@zoo(
    "residual-linear-stream",
    seed=1,
    nullity=53,
    expects={"stream": "GL(4), one for all writers and readers", "shifts": "R^4 per stage", "units": "S_5 and R+^5 per block"},
)
def _residual(samples: int) -> Built:
    return spread_(Residual()), _points(samples, 3), {}


# --- norms -----------------------------------------------------------------------------------------------------------


def _batch_norm_mlp() -> nn.Module:
    return spread_(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))


@zoo(
    "batchnorm-train", mode="train", nullity=10, mixes_samples=True, samples=37, note="Filter scales are approximate (eps).",
    expects={"gain against next": "R+^5", "bias under the batch mean": "R^5", "units": "S_5"},
)  # fmt: skip
def _batchnorm_train(samples: int) -> Built:
    return _batch_norm_mlp(), _points(samples, 3), {}


@zoo("batchnorm-eval", nullity=15, expects={"gain against next": "R+^5", "row against gain": "R*^5", "bias against shift": "R^5"})
def _batchnorm_eval(samples: int) -> Built:
    return _batch_norm_mlp(), _points(samples, 3), {}


@zoo("batchnorm2d-eval", nullity=10, expects={"channels": "S_5, running statistics moved too"})
def _batchnorm2d_eval(samples: int) -> Built:
    model = nn.Sequential(nn.Conv2d(2, 5, 2, bias=False), nn.BatchNorm2d(5), nn.ReLU(), MeanPool(), nn.Linear(5, 3))
    return spread_(model), _points(samples, 2, 4, 4), {}


@zoo("groupnorm", nullity=9, expects={"channels": "S_2 wr S_3", "bias per group": "R^3", "gain against next": "R+^6"})
def _groupnorm(samples: int) -> Built:
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), MeanPool(), nn.Linear(6, 3))
    return spread_(model), _points(samples, 2, 9), {}


@zoo("instancenorm", nullity=10, expects={"channels": "S_5", "bias": "R^5", "gain against next": "R+^5"})
def _instancenorm(samples: int) -> Built:
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.InstanceNorm1d(5, affine=True), nn.ReLU(), MeanPool(), nn.Linear(5, 3))
    return spread_(model), _points(samples, 2, 9), {}


@zoo("layernorm", nullity=24, expects={"W += 1 u^T, b += c 1": "R^4", "gain": "R*^5", "shift": "R^5", "hyperplane of the reader": "R^3"})
def _layernorm(samples: int) -> Built:
    return spread_(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 3))), _points(samples, 3), {}


@zoo("layernorm-relu", nullity=9, expects={"W += 1 u^T, b += c 1": "R^4", "gain through ReLU": "R+^5", "units": "S_5"})
def _layernorm_relu(samples: int) -> Built:
    return spread_(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))), _points(samples, 3), {}


@zoo(
    "rmsnorm", nullity=19, expects={"gain": "R*^5", "hidden, gain folded": "O(5)", "units": "Z2 wr S_5"},
    note="Narrow input: spans of the reader, and the bias can make up for eps, so a scale of (W, b) is exact.",
)  # fmt: skip
def _rmsnorm(samples: int) -> Built:
    return spread_(nn.Sequential(nn.Linear(3, 5), nn.RMSNorm(5, eps=1e-5), nn.Linear(5, 3))), _points(samples, 3), {}


@zoo("rmsnorm-no-gain", nullity=10, expects={"hidden": "O(5)"}, note="Input width 6 > 5, output width 7 > 5: the rotation acts freely.")
def _rmsnorm_no_gain(samples: int) -> Built:
    model = nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5, eps=1e-5, elementwise_affine=False), nn.Linear(5, 7))
    return spread_(model), _points(samples, 6), {}


@zoo("weight-norm-tanh", nullity=8, expects={"direction": "R+^5 and R+^3", "(g, v) -> minus": "Z2^8", "units": "Z2 wr S_5"})
def _weight_norm_tanh(samples: int) -> Built:
    return spread_(nn.Sequential(weight_norm(nn.Linear(3, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 3)))), _points(samples, 3), {}


@zoo("spectral-norm", nullity=1, expects={"W": "R+"}, note="In eval mode the singular vectors are buffers; permutations move them too.")
def _spectral_norm(samples: int) -> Built:
    return spread_(nn.Sequential(spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2))), _points(samples, 3), {}


# --- attention -------------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1) on the halves of the last axis."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate_pairs(x: Tensor) -> Tensor:
    """(x0, x1) -> (-x1, x0) on neighbouring pairs of the last axis."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Attention(nn.Module):
    """Causal softmax attention with grouped keys; positions by rotation, ALiBi or not at all; optional normalised q and k."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, *, out: int | None = None, bias: bool = False,
        rotary: Literal["half", "pairs"] | None = None, alibi: bool = False, qk_norm: Literal["l2", "rms"] | None = None,
        causal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rotary, self.alibi, self.qk_norm, self.causal = rotary, alibi, qk_norm, causal
        self.q = nn.Linear(width, heads * head_dim, bias=bias)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.o = nn.Linear(heads * head_dim, out or width, bias=bias)
        if qk_norm == "rms":
            self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)

    def rotate(self, x: Tensor) -> Tensor:
        planes = self.head_dim // 2
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 3.0 ** -torch.arange(planes, dtype=x.dtype)
        angles = angles.repeat(1, 2) if self.rotary == "half" else angles.repeat_interleave(2, 1)
        turned = rotate_half(x) if self.rotary == "half" else rotate_pairs(x)
        return x * angles.cos() + turned * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if self.qk_norm == "l2":
            q, k = 4 * F.normalize(q, dim=-1, eps=0), F.normalize(k, dim=-1, eps=0)
        elif self.qk_norm == "rms":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        steps = torch.arange(x.shape[1])
        if self.alibi:
            slopes = 2.0 ** -torch.arange(1, self.heads + 1, dtype=x.dtype)
            logits = logits - slopes[:, None, None] * (steps[:, None] - steps).abs()
        if self.causal:
            logits = logits.masked_fill(steps[None, :] > steps[:, None], -torch.inf)
        return self.o((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class PackedAttention(nn.Module):
    """nn.MultiheadAttention with itself, between nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@zoo("multihead-attention", nullity=36, expects={"QK": "GL(2)^3", "OV": "GL(2)^3", "key bias": "R^6", "value bias": "R^6", "heads": "S_3"})
def _multihead(samples: int) -> Built:
    return spread_(PackedAttention()), _points(samples, 5, 6), {}


@zoo("cross-attention-kdim", nullity=24, expects={"QK": "GL(2)^2", "OV": "GL(2)^2", "heads": "S_2"}, note="Separate q, k, v weights.")
def _cross_attention(samples: int) -> Built:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v, need_weights=False)[0]

    return spread_(Cross()), (*_points(samples, 3, 4), *_points(samples, 6, 3), *_points(samples, 6, 5)), {}


@zoo("gqa-rope-half", nullity=40, expects={"QK": "(C*)^2 per kv head, dims (i, i + 2)", "OV": "GL(4)^2", "heads": "S_2 wr S_2"})
def _gqa_half(samples: int) -> Built:
    return spread_(Attention(5, 4, 2, 4, rotary="half")), _points(samples, 7, 5), {}


@zoo("gqa-rope-interleaved", nullity=40, expects={"QK": "(C*)^2 per kv head, dims (2i, 2i + 1)", "OV": "GL(4)^2", "heads": "S_2 wr S_2"})
def _gqa_pairs(samples: int) -> Built:
    return spread_(Attention(5, 4, 2, 4, rotary="pairs")), _points(samples, 7, 5), {}


@zoo("mqa-rope-half", nullity=24, expects={"QK": "(C*)^2", "OV": "GL(4)", "heads": "S_3"})
def _mqa_half(samples: int) -> Built:
    return spread_(Attention(5, 3, 1, 4, rotary="half", bias=True)), _points(samples, 7, 5), {}


@zoo("mqa-plain", nullity=12, expects={"QK": "GL(2)", "OV": "GL(2)", "heads": "S_3", "key bias": "R^2", "value bias": "R^2"})
def _mqa(samples: int) -> Built:
    return spread_(Attention(5, 3, 1, 2, bias=True)), _points(samples, 7, 5), {}


@zoo("alibi", nullity=36, expects={"QK": "GL(3)^2", "OV": "GL(3)^2"}, note="Slopes differ, so heads do not permute.")
def _alibi(samples: int) -> Built:
    return spread_(Attention(5, 2, 2, 3, alibi=True)), _points(samples, 7, 5), {}


@zoo("qk-norm-l2", nullity=28, expects={"QK": "R+ x R+ x O(3) per head", "OV": "GL(3)^2", "heads": "S_2"})
def _qk_norm(samples: int) -> Built:
    return spread_(Attention(5, 2, 2, 3, qk_norm="l2")), _points(samples, 7, 5), {}


@zoo("qk-norm-gain", nullity=21, expects={"gains": "R*^3, shared by the heads", "OV": "GL(3)^2", "heads": "S_2"})
def _qk_norm_gain(samples: int) -> Built:
    return spread_(Attention(5, 2, 2, 3, qk_norm="rms")), _points(samples, 7, 5), {}


class LinearAttention(nn.Module):
    """Kernel attention phi(q) (phi(k)^T v), normalised, phi = elu + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(5, 3, bias=False)
        self.k = nn.Linear(5, 3, bias=False)
        self.v = nn.Linear(5, 2, bias=False)
        self.o = nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        state = torch.einsum("btd,bte->bde", k, v)
        return self.o(torch.einsum("btd,bde->bte", q, state) / (q @ k.sum(1)[..., None]))


@zoo("linear-attention", nullity=4, expects={"q, k": "S_3", "OV": "GL(2)"})
def _linear_attention(samples: int) -> Built:
    return spread_(LinearAttention()), _points(samples, 7, 5), {}


@zoo("encoder-layer", nullity=49, expects={"heads": "S_2", "units": "S_5 and R+^5"}, note="Post-norm nn.TransformerEncoderLayer.")
def _encoder_layer(samples: int) -> Built:
    return spread_(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)), _points(samples, 3, 4), {}


class PreNormBlock(nn.Module):
    """RMSNorm, rotary attention, RMSNorm, SwiGLU on a residual stream with embedding and head: a Llama without the library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.n1 = nn.RMSNorm(4, eps=1e-6)
        self.attention = Attention(4, 2, 1, 2, rotary="half")
        self.n2 = nn.RMSNorm(4, eps=1e-6)
        self.gate = nn.Linear(4, 5, bias=False)
        self.up = nn.Linear(4, 5, bias=False)
        self.down = nn.Linear(5, 4, bias=False)
        self.n3 = nn.RMSNorm(4, eps=1e-6)
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.n1(x))
        y = self.n2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.n3(x))


@zoo("llama-plain", nullity=29, expects={"stream": "O(4), gains folded", "up": "R*^5", "QK": "C*", "OV": "GL(2)"})
def _llama_plain(samples: int) -> Built:
    return spread_(PreNormBlock()), (torch.randint(7, (samples, 5)),), {}


class TiedLM(nn.Module):
    """A token model whose output matrix is its embedding table; one ReLU residual block, no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.mix = nn.Linear(3, 3, bias=False)
        self.up = nn.Linear(3, 5)
        self.down = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.mix(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None])
        x = x + self.down(F.relu(self.up(x)))
        return F.linear(x, self.embed.weight)


@zoo("tied-lm", nullity=8, expects={"stream": "O(3)", "units": "S_5 and R+^5"})
def _tied_lm(samples: int) -> Built:
    return spread_(TiedLM()), (torch.randint(7, (samples, 4)),), {}


# --- gated, recurrent, mixtures, state spaces -------------------------------------------------------------------------


class GLUBlock(nn.Module):
    """d(act(g x) * (u x))."""

    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.g = nn.Linear(3, 5, bias=bias)
        self.u = nn.Linear(3, 5, bias=bias)
        self.d = nn.Linear(5, 2, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.act(self.g(x)) * self.u(x))


@zoo("swiglu", nullity=5, expects={"linear branch against down": "R*^5", "units": "S_5"})
def _swiglu(samples: int) -> Built:
    return spread_(GLUBlock(F.silu)), _points(samples, 3), {}


@zoo("geglu", nullity=5, expects={"linear branch against down": "R*^5", "units": "S_5"})
def _geglu(samples: int) -> Built:
    return spread_(GLUBlock(F.gelu, bias=False)), _points(samples, 3), {}


@zoo("reglu", nullity=10, expects={"linear branch against down": "R*^5", "gate against down": "R+^5", "units": "S_5"})
def _reglu(samples: int) -> Built:
    return spread_(GLUBlock(F.relu)), _points(samples, 3), {}


class Readout(nn.Module):
    """A recurrent network and a linear readout of every step."""

    def __init__(self, rnn: nn.RNNBase, features: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def _recurrent(rnn: nn.RNNBase, features: int, samples: int) -> Built:
    return spread_(Readout(rnn, features)), _points(samples, 7, 3), {}


@zoo("rnn", nullity=5, samples=60, expects={"units": "Z2 wr S_5", "bias_ih against bias_hh": "R^5"})
def _rnn(samples: int) -> Built:
    return _recurrent(nn.RNN(3, 5, batch_first=True), 5, samples)


@zoo("gru", nullity=10, samples=60, expects={"units": "Z2 wr S_5", "bias_ih against bias_hh, gates r and z": "R^10"})
def _gru(samples: int) -> Built:
    return _recurrent(nn.GRU(3, 5, batch_first=True), 5, samples)


@zoo("lstm", nullity=20, samples=60, expects={"units": "Z2 wr S_5", "bias_ih against bias_hh": "R^20"})
def _lstm(samples: int) -> Built:
    return _recurrent(nn.LSTM(3, 5, batch_first=True), 5, samples)


@zoo("lstm-bidirectional", nullity=16 * 2, samples=60, expects={"units": "Z2 wr S_4 per direction", "bias_ih against bias_hh": "R^32"})
def _lstm_bidirectional(samples: int) -> Built:
    return _recurrent(nn.LSTM(3, 4, batch_first=True, bidirectional=True), 8, samples)


class CellLoop(nn.Module):
    """A GRU cell unrolled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


@zoo("gru-cell-loop", nullity=6, samples=200, expects={"units": "Z2 wr S_3", "bias_ih against bias_hh, gates r and z": "R^6"})
def _cell_loop(samples: int) -> Built:
    return spread_(CellLoop()), _points(samples, 4, 2), {}


class Experts(nn.Module):
    """Four ReLU experts mixed by a softmax router: all of them, or the best two through a mask."""

    def __init__(self, top: int | None = None) -> None:
        super().__init__()
        self.router = nn.Linear(5, 4)
        self.w1 = nn.Parameter(torch.empty(4, 3, 5))
        self.w2 = nn.Parameter(torch.empty(4, 2, 3))
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.top is not None:
            bar = logits.topk(self.top, -1).values[..., -1:]
            logits = logits.masked_fill(logits < bar, -torch.inf)
        hidden = F.relu(torch.einsum("bi,ehi->beh", x, self.w1))
        return torch.einsum("beh,eoh,be->bo", hidden, self.w2, logits.softmax(-1))


@zoo("moe-soft", nullity=12 + 6, expects={"experts": "S_4", "units": "S_3 and R+^3 per expert", "router rows and bias += common": "R^6"})
def _moe_soft(samples: int) -> Built:
    return spread_(Experts()), _points(samples, 5), {}


@zoo("moe-top2", nullity=12 + 6, expects={"experts": "S_4", "units": "S_3 and R+^3 per expert", "router rows and bias += common": "R^6"})
def _moe_top2(samples: int) -> Built:
    return spread_(Experts(2)), _points(samples, 5), {}


class DiagonalSSM(nn.Module):
    """A diagonal linear state-space layer scanned over time: x' = a x + B u, y = C x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(5))
        self.B = nn.Linear(2, 5, bias=False)
        self.C = nn.Linear(5, 3, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        a = torch.tanh(self.a)
        state = u.new_zeros(u.shape[0], 5)
        ys = []
        for step in self.B(u).unbind(1):
            state = a * state + step
            ys.append(self.C(state))
        return torch.stack(ys, 1)


@zoo("ssm-diagonal", nullity=5, expects={"states": "R*^5 and S_5"})
def _ssm(samples: int) -> Built:
    return spread_(DiagonalSSM()), _points(samples, 13, 2), {}


class LinearRNN(nn.Module):
    """A dense linear recurrence: the state has GL(3)."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(3, 3))
        self.B = nn.Parameter(torch.empty(3, 2))
        self.C = nn.Parameter(torch.empty(2, 3))

    def forward(self, u: Tensor) -> Tensor:
        state = u.new_zeros(u.shape[0], 3)
        ys = []
        for step in u.unbind(1):
            state = torch.tanh(torch.ones(())) * (state @ self.A.T) + step @ self.B.T
            ys.append(state @ self.C.T)
        return torch.stack(ys, 1)


@zoo("ssm-dense", nullity=9, expects={"state": "GL(3): A -> S A S^-1, B -> S B, C -> C S^-1"})
def _ssm_dense(samples: int) -> Built:
    return spread_(LinearRNN()), _points(samples, 7, 2), {}


class Highway(nn.Module):
    """y = t * h + (1 - t) * x."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.h = nn.Linear(5, 5)
        self.t = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate = torch.sigmoid(self.t(x))
        return self.head(gate * torch.tanh(self.h(x)) + (1 - gate) * x)


@zoo(
    "highway", nullity=20, expects={"units": "Z2 wr S_5"},
    note="Rows of h and t may read what is constant on the 3-dimensional input: 10 + 10 spans, no group.",
)  # fmt: skip
def _highway(samples: int) -> Built:
    return spread_(Highway()), _points(samples, 3), {}


# --- factored, shared, generative, bare ------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter."""

    def __init__(self, fan_in: int, fan_out: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out).requires_grad_(False)
        self.down = nn.Linear(fan_in, rank, bias=False)
        self.up = nn.Linear(rank, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


@zoo("lora", nullity=4 + 4, expects={"rank space": "GL(2) per adapter"}, note="Base weights are frozen: no rescaling of units.")
def _lora(samples: int) -> Built:
    return spread_(nn.Sequential(Adapter(5, 7, 2), nn.ReLU(), Adapter(7, 3, 2))), _points(samples, 5), {}


class Siamese(nn.Module):
    """Two inputs through one tower, compared by cosine and squared distance."""

    def __init__(self, euclidean: bool) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.euclidean = euclidean

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.tower(a), self.tower(b)
        return (a - b).square().sum(-1) if self.euclidean else F.cosine_similarity(a, b, dim=-1, eps=1e-30)


@zoo("siamese-cosine", nullity=6 + 1, expects={"embedding": "O(4) and R+", "units": "Z2 wr S_5"})
def _siamese_cosine(samples: int) -> Built:
    return spread_(Siamese(False)), (*_points(samples, 3), *_points(samples, 3)), {}


@zoo("siamese-euclidean", nullity=6 + 4, expects={"embedding": "O(4) and R^4", "units": "Z2 wr S_5"})
def _siamese_euclidean(samples: int) -> Built:
    return spread_(Siamese(True)), (*_points(samples, 3), *_points(samples, 3)), {}


class Variational(nn.Module):
    """A VAE at its mean with the KL divergence as a last column."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 5)
        self.mu = nn.Linear(5, 2)
        self.logvar = nn.Linear(5, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x))
        mu, logvar = self.mu(h), self.logvar(h)
        kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(-1, keepdim=True)
        return torch.cat([self.decoder(mu), kl], -1)


@zoo("vae", nullity=1, expects={"latent mean": "O(2)", "log-variance head": "S_2", "encoder": "Z2 wr S_5", "decoder": "Z2 wr S_7"})
def _vae(samples: int) -> Built:
    return spread_(Variational()), _points(samples, 4), {}


class MixerBlock(nn.Module):
    """Token and channel mixing with LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.n1 = nn.LayerNorm(4)
        self.t1 = nn.Linear(3, 5)
        self.t2 = nn.Linear(5, 3)
        self.n2 = nn.LayerNorm(4)
        self.c1 = nn.Linear(4, 7)
        self.c2 = nn.Linear(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        return self.head((x + self.c2(F.gelu(self.c1(self.n2(x))))).mean(1))


@zoo("mlp-mixer", nullity=32, expects={"channels": "S_4", "token units": "S_5", "channel units": "S_7"})
def _mixer(samples: int) -> Built:
    return spread_(MixerBlock()), _points(samples, 3, 2), {}


class Bare(nn.Module):
    """No layers at all: parameters in a list, matmul, einsum, broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.ParameterList([torch.empty(3, 5), torch.empty(5), torch.empty(5, 7), torch.empty(7, 2)])

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, w3 = self.theta
        h = torch.relu(x @ w1 + b1)
        h = torch.einsum("bi,ij->bj", h, w2).tanh()
        return torch.matmul(h[:, None], w3).squeeze(1)


@zoo("bare-parameters", nullity=5, expects={"hidden 1": "S_5 and R+^5", "hidden 2": "Z2 wr S_7"})
def _bare(samples: int) -> Built:
    return spread_(Bare()), _points(samples, 3), {}


@zoo("bilinear", nullity=9, expects={"hidden": "GL(3)"}, note="A shift would need a bias linear in b.")
def _bilinear(samples: int) -> Built:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(4, 3)
            self.pair = nn.Bilinear(3, 5, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.pair(self.left(a), b)

    return spread_(Pair()), (*_points(samples, 4), *_points(samples, 5)), {}


class CPLayer(nn.Module):
    """A rank-3 CP tensor contracted with three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(3, 4))
        self.b = nn.Parameter(torch.empty(3, 5))
        self.c = nn.Parameter(torch.empty(3, 7))

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("ri,rj,rk,bi,bj,bk->b", self.a, self.b, self.c, x, y, z)


@zoo("cp-tensor", nullity=6, expects={"each component": "R*^2 (scales of product 1)", "components": "S_3"})
def _cp(samples: int) -> Built:
    return spread_(CPLayer()), (*_points(samples, 4), *_points(samples, 5), *_points(samples, 7)), {}


class FactorModel(nn.Module):
    """Matrix completion: rows and columns embedded, dot product plus biases."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(11, 3)
        self.columns = nn.Embedding(13, 3)

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        return (self.rows(i) * self.columns(j)).sum(-1)


@zoo("matrix-factorisation", nullity=9, expects={"factors": "GL(3)"}, samples=1000)
def _factorisation(samples: int) -> Built:
    return spread_(FactorModel()), (torch.randint(11, (samples,)), torch.randint(13, (samples,))), {}


class DeepSet(nn.Module):
    """rho(sum phi(x)): the pooled space is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
        self.rho = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(1))


@zoo("deep-set", nullity=12, expects={"pooled space": "GL(3) semidirect R^3", "phi": "Z2 wr S_5", "rho": "Z2 wr S_7"})
def _deep_set(samples: int) -> Built:
    return spread_(DeepSet()), _points(samples, 4, 2), {}


class GraphNet(nn.Module):
    """Two graph convolutions with a given adjacency matrix; keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 5)
        self.b = nn.Linear(5, 2)

    def forward(self, x: Tensor, *, adjacency: Tensor) -> Tensor:
        return self.b(adjacency @ F.relu(self.a(adjacency @ x)))


@zoo("graph-net", nullity=5, expects={"hidden": "S_5 and R+^5"})
def _graph_net(samples: int) -> Built:
    return spread_(GraphNet()), _points(samples, 4, 3), {"adjacency": torch.rand(samples, 4, 4)}


class SharedLayers(nn.Module):
    """One block applied three times (ALBERT): the group restricted to equal elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.up = nn.Linear(4, 5)
        self.down = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = x + 0.3 * self.down(F.relu(self.up(x)))
        return self.head(x)


@zoo("shared-layers", nullity=25, expects={"stream": "GL(4) semidirect R^4", "units": "S_5 and R+^5"})
def _shared_layers(samples: int) -> Built:
    return spread_(SharedLayers()), _points(samples, 3), {}


class UnusedParts(nn.Module):
    """A head that is never read and a table with rows that are never looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.hidden = nn.Linear(3, 5)
        self.read = nn.Linear(5, 2)
        self.idle = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens).sum(1)
        self.idle(x)
        return self.read(torch.tanh(self.hidden(x)))


@zoo(
    "unused-parts", nullity=6 + 8 + 12, note="Unread rows and the idle head are dead parameters.",
    expects={"unread rows 5, 6": "R^6", "idle head": "R^8", "table against hidden": "GL(3) semidirect R^3"},
)  # fmt: skip
def _unused_parts(samples: int) -> Built:
    return spread_(UnusedParts()), (torch.randint(5, (samples, 4)),), {}


class DictOutput(nn.Module):
    """Several outputs, of which one is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 5)
        self.policy = nn.Linear(5, 4)
        self.value = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.trunk(x))
        return {"policy": self.policy(h), "value": self.value(h)}


@zoo("two-heads-dict", nullity=5, expects={"trunk": "S_5 and R+^5"})
def _two_heads(samples: int) -> Built:
    return spread_(DictOutput()), _points(samples, 3), {}


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class Output(nn.Module):
    """A Hugging Face model read at one field of its output."""

    def __init__(self, model: nn.Module, field: str, *keys: str, **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.field = field
        self.keys = keys
        self.fixed = fixed

    def forward(self, *args: Tensor) -> Tensor:
        return getattr(self.model(**dict(zip(self.keys, args, strict=True)), **self.fixed), self.field)


COMMON = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager"}


def _language_model(name: str, samples: int, *, vocab: int = 7, length: int = 5, **config: Any) -> Built:
    """A causal language model from its config class, every parameter generic."""
    import transformers

    made = getattr(transformers, f"{name}Config")(vocab_size=vocab, **config, **COMMON)
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(made)
    return generic_hf_(Output(model, "logits", "input_ids", use_cache=False)), (torch.randint(vocab, (samples, length)),), {}


def generic_hf_(model: nn.Module) -> nn.Module:
    """Generic weights for a Hugging Face model, whose norms have names of their own."""
    spread_(model)
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter):
                nn.init.normal_(module.weight, 1, 0.3)
        for name, p in model.named_parameters():
            if name.endswith(("cls_token", "position_embeddings", "class_embedding")):
                p.normal_()
    return model


HF = ("transformers",)


@zoo("hf-gpt2", nullity=101, requires=HF, samples=96, note="Conv1D stores (in, out); the head is tied.")
def _hf_gpt2(samples: int) -> Built:
    return _language_model(
        "GPT2", samples, n_positions=5, n_embd=6, n_layer=1, n_head=3, n_inner=5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )


@zoo("hf-opt", nullity=86, requires=HF, samples=96, note="ReLU MLP; learned positions with an offset of two unread rows.")
def _hf_opt(samples: int) -> Built:
    return _language_model(
        "OPT", samples, hidden_size=4, ffn_dim=5, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=5,
        word_embed_proj_dim=4, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
    )  # fmt: skip


@zoo("hf-gpt-neox", nullity=248, requires=HF, samples=96, note="Parallel residual, packed qkv by head, rotary on part of a head.")
def _hf_neox(samples: int) -> Built:
    return _language_model(
        "GPTNeoX", samples, vocab=11, hidden_size=8, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, attention_dropout=0.0, hidden_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip


def _llama_like(name: str, samples: int, **config: Any) -> Built:
    sizes = {
        "hidden_size": 8, "intermediate_size": 3, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "max_position_embeddings": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0},
    }  # fmt: skip
    return _language_model(name, samples, vocab=11, **(sizes | config))


@zoo("hf-llama", nullity=75, requires=HF, samples=96, note="Forward casts to float32.")
def _hf_llama(samples: int) -> Built:
    return _llama_like("Llama", samples)


@zoo("hf-qwen3", nullity=73, requires=HF, samples=96, note="RMS-normalised q and k with gains.")
def _hf_qwen3(samples: int) -> Built:
    return _llama_like("Qwen3", samples)


@zoo("hf-gemma", nullity=39, requires=HF, samples=96, note="Gains enter as 1 + g; embedding times sqrt(width); tied head.")
def _hf_gemma(samples: int) -> Built:
    return _llama_like("Gemma", samples)


@zoo(
    "hf-mixtral", nullity=89, requires=HF, samples=96, exports=False,
    note="A loop over the experts that were hit: export stops at a data-dependent size (GuardOnDataDependentSymNode).",
)  # fmt: skip
def _hf_mixtral(samples: int) -> Built:
    return _llama_like("Mixtral", samples, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")


@zoo("hf-mixtral-batched", nullity=89, requires=HF, samples=96, note="The same function with gathered expert weights.")
def _hf_mixtral_batched(samples: int) -> Built:
    return _llama_like("Mixtral", samples, num_local_experts=3, num_experts_per_tok=2, experts_implementation="batched_mm")


@zoo("hf-falcon", nullity=52, requires=HF, samples=96, note="Multi-query, rotary or ALiBi, parallel residual.")
def _hf_falcon(samples: int) -> Built:
    return _language_model(
        "Falcon", samples, vocab=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, ffn_hidden_size=5, alibi=True,
        multi_query=True, new_decoder_architecture=False, parallel_attn=False, bias=True, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


@zoo("hf-bloom", nullity=91, requires=HF, samples=96, note="ALiBi, qkv interleaved by head, LayerNorm after the embedding.")
def _hf_bloom(samples: int) -> Built:
    return _language_model("Bloom", samples, hidden_size=4, n_layer=1, n_head=2, hidden_dropout=0.0, attention_dropout=0.0)


@zoo("hf-bert", nullity=108, requires=HF, samples=150, note="Post-LayerNorm.")
def _hf_bert(samples: int) -> Built:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=7, hidden_size=6, num_hidden_layers=1, num_attention_heads=3, intermediate_size=5, max_position_embeddings=5,
        type_vocab_size=2, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **COMMON,
    )  # fmt: skip
    model = Output(BertModel(config, add_pooling_layer=False), "last_hidden_state", "input_ids", "token_type_ids")
    return generic_hf_(model), (torch.randint(7, (samples, 5)), torch.randint(2, (samples, 5))), {}


@zoo("hf-vit-classifier", nullity=172, requires=HF, samples=400, note="Read at the class token through a linear head.")
def _hf_vit(samples: int) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=5, image_size=6, patch_size=3, num_channels=1,
        layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    model = Output(ViTForImageClassification(config), "logits", "pixel_values")
    return generic_hf_(model), (1.5 * torch.randn(samples, 1, 6, 6),), {}


@zoo("hf-t5", nullity=92, requires=HF, samples=120, note="Encoder and decoder: cross attention, two bias tables, tied head with a scale.")
def _hf_t5(samples: int) -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=9, d_model=4, d_kv=2, d_ff=5, num_layers=1, num_decoder_layers=1, num_heads=2, relative_attention_num_buckets=6,
        relative_attention_max_distance=8, dropout_rate=0.0, feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = Output(T5ForConditionalGeneration(config), "logits", "input_ids", "decoder_input_ids", use_cache=False)
    return generic_hf_(model), (torch.randint(9, (samples, 6)), torch.randint(9, (samples, 5))), {}


@zoo("hf-resnet", seed=1, nullity=28, requires=HF, samples=400, note="Evaluation mode: BatchNorm is an affine map of running statistics.")
def _hf_resnet(samples: int) -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=2, hidden_sizes=[2, 3], depths=[1, 1], layer_type="basic", num_labels=4,
        downsample_in_first_stage=False,
    )  # fmt: skip
    model = Output(ResNetForImageClassification(config), "logits", "pixel_values")
    return generic_hf_(model), (1.5 * torch.randn(samples, 1, 17, 17),), {}


@zoo("hf-convnext", nullity=63, requires=HF, samples=300, note="Depthwise convolution, channels-last LayerNorm, layer scale.")
def _hf_convnext(samples: int) -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(num_channels=1, patch_size=2, hidden_sizes=[4], depths=[1], num_stages=1, num_labels=3, image_size=14)
    model = Output(ConvNextForImageClassification(config), "logits", "pixel_values")
    return generic_hf_(model), (1.5 * torch.randn(samples, 1, 14, 14),), {}
