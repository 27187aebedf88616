"""Architectures whose parameter symmetries are known in full, with the numbers an audit must find.

Every case builds a small network with generic weights and inputs in float64 from a fixed seed, and carries the number of its
trainable parameters, the nullity of its Jacobian (outputs over all inputs with respect to all distinct trainable parameters),
and the named families that explain every null direction. ``test_known_answers_oracle.py`` checks the numbers with an oracle
that knows nothing of the library.

Reading a case:

- ``families`` maps a family to the dimension of its own tangents. Families overlap, so dimensions do not add up: ``cumulative``
  holds the rank of all families up to each, and its last entry is the nullity.
- ``approximate`` holds what the eps of a norm breaks: (dimension, smallest, largest ||Jv|| / (||v|| s0)).
- ``beyond_structure`` counts null directions that hold only at these weights or on these inputs (dead or always-on units,
  kernels, fibres of over-complete maps, frozen queries), which no symmetry of the architecture explains.
- ``discrete`` maps where to group; ``controls`` are transformations that must not be taken for symmetries.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Args = tuple[Tensor, ...]
Built = tuple[nn.Module, list[Args]]


@contextmanager
def fresh(seed: int, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Run a block as a fresh process would after ``torch.manual_seed(seed)``; the caller's dtype and random state come back."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Case:
    """An architecture with known symmetries.

    Attributes:
        name: key in ``CASES``.
        build: () -> (model, inputs); ``inputs`` is a list of argument tuples. ``build(seed)`` takes another draw.
        seed: the seed the numbers were taken at.
        params: number of distinct trainable parameters.
        nullity: params minus the rank of the Jacobian, cut at 1e-12 of the largest singular value.
        nullity_mod_softmax: the same for outputs up to a common shift of the last axis; None where there are no logits.
        families: family -> dimension of its own tangents.
        cumulative: rank of all families up to and including each.
        extra_mod_softmax: families that hold only modulo the softmax shift -> rank they add.
        approximate: family broken by eps -> (dimension, least, largest relative size of J v).
        discrete: where -> group.
        controls: what must not be reported.
        gap: (smallest relative singular value kept, largest one cut), as published; None where it was not.
        other_seeds: further draws -> nullity.
        beyond_structure: null directions that hold only at these weights or on these inputs.
        sample_axis: axis of the output that counts samples.
        mixes_samples: outputs depend on the other samples of a batch (batch statistics, losses).
        mode: "eval" or "train".
        slow: left out of the quick runs.
        requires: packages needed beyond torch.
        note: pitfalls.
    """

    name: str
    build: Callable[..., Built] = field(repr=False)
    seed: int
    params: int
    nullity: int
    nullity_mod_softmax: int | None = None
    families: Mapping[str, int] = field(default_factory=dict)
    cumulative: tuple[int, ...] = ()
    extra_mod_softmax: Mapping[str, int] = field(default_factory=dict)
    approximate: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    discrete: Mapping[str, str] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    gap: tuple[float, float] | None = None
    other_seeds: Mapping[int, int] = field(default_factory=dict)
    beyond_structure: int = 0
    sample_axis: int = 0
    mixes_samples: bool = False
    mode: Literal["eval", "train"] = "eval"
    slow: bool = False
    requires: tuple[str, ...] = ()
    note: str = ""

    @property
    def available(self) -> bool:
        """Whether the packages this case needs can be imported."""
        return all(importlib.util.find_spec(package) is not None for package in self.requires)


CASES: dict[str, Case] = {}


def case(name: str, *, seed: int, **facts: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a builder as a case; it runs in float64 after seeding, in evaluation mode unless ``mode="train"``."""

    def register(builder: Callable[[], Built]) -> Callable[[], Built]:
        def build(seed: int = seed) -> Built:
            with fresh(seed):
                model, inputs = builder()
            return model.train(facts.get("mode", "eval") == "train"), inputs

        if name in CASES:
            raise ValueError(f"two known answers are called {name!r}")
        CASES[name] = Case(name=name, build=build, seed=seed, **facts)
        return builder

    return register


def generic_(model: nn.Module) -> nn.Module:
    """Give norms and biases generic values: gains 1 + 0.3 N, shifts, biases and running means 0.3 N, running variances in [.5, 1.5]."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.3)
    return model


# --- multilayer perceptrons ------------------------------------------------------------------------------------------


def mlp_564(activation: Callable[[int], nn.Module], bias: bool) -> nn.Sequential:
    """Linear 5-6-4-3 with an activation module for each hidden width; weights N(0, 0.36)."""
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), activation(6), nn.Linear(6, 4, bias=bias), activation(4), nn.Linear(4, 3, bias=bias))
    generic_(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.6)
    return model


@case(
    "mlp-relu-bias",
    seed=0,
    params=79,
    nullity=10,
    nullity_mod_softmax=15,
    families={
        "rescale hidden 1": 6,
        "rescale hidden 2": 4,
    },
    cumulative=(6, 10),
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
    },
    controls=("negative scale of a unit",),
    gap=(0.0049, 3e-16),
    other_seeds={4: 10, 5: 10},
)
def _mlp_relu_bias() -> Built:
    return mlp_564(lambda n: nn.ReLU(), True), [(2 * torch.randn(400, 5),)]


@case(
    "mlp-relu-nobias",
    seed=0,
    params=66,
    nullity=10,
    nullity_mod_softmax=14,
    families={
        "rescale hidden 1": 6,
        "rescale hidden 2": 4,
    },
    cumulative=(6, 10),
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
    },
    controls=("negative scale of a unit",),
    gap=(0.039, 4e-16),
    other_seeds={4: 10, 8: 10},
    note="With 150 samples one seed shows 11: a dead weight, its two units are never on together. Coverage of pairs matters.",
)
def _mlp_relu_nobias() -> Built:
    return mlp_564(lambda n: nn.ReLU(), False), [(2 * torch.randn(600, 5),)]


@case(
    "mlp-leakyrelu",
    seed=0,
    params=79,
    nullity=10,
    nullity_mod_softmax=15,
    families={
        "rescale hidden 1": 6,
        "rescale hidden 2": 4,
    },
    cumulative=(6, 10),
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
    },
    controls=("negative scale of a unit",),
    gap=(0.005, 3e-16),
    other_seeds={2: 10, 4: 10},
)
def _mlp_leakyrelu() -> Built:
    return mlp_564(lambda n: nn.LeakyReLU(0.1), True), [(2 * torch.randn(150, 5),)]


@case(
    "mlp-prelu-channel",
    seed=0,
    params=89,
    nullity=10,
    nullity_mod_softmax=15,
    families={
        "rescale hidden 1": 6,
        "rescale hidden 2": 4,
    },
    cumulative=(6, 10),
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
        "hidden 1: (w, b) -> -(w, b), v -> -a v, a -> 1/a, per unit": "Z2^6",
    },
    controls=("permutation leaving the slopes behind",),
    gap=(0.0037, 2e-16),
    other_seeds={1: 10, 2: 10},
    note="Slopes move with the units; the Z2 acts nonlinearly.",
)
def _mlp_prelu_channel() -> Built:
    return _random_slopes(mlp_564(nn.PReLU, True)), [(2 * torch.randn(150, 5),)]


@case(
    "mlp-prelu-shared",
    seed=0,
    params=81,
    nullity=10,
    nullity_mod_softmax=15,
    families={
        "rescale hidden 1": 6,
        "rescale hidden 2": 4,
    },
    cumulative=(6, 10),
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
        "hidden 1: whole layer (w, b) -> -(w, b), W2 -> -a W2, a -> 1/a": "Z2",
    },
    controls=("sign of one unit with the shared slope",),
    gap=(0.0027, 2e-16),
    other_seeds={2: 10, 4: 10},
    note="The single slope must not join the channel axis.",
)
def _mlp_prelu_shared() -> Built:
    return _random_slopes(mlp_564(lambda n: nn.PReLU(), True)), [(2 * torch.randn(150, 5),)]


def _random_slopes(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.6)
    return model


@case(
    "mlp-relu-planted-dead-and-on",
    seed=0,
    params=79,
    nullity=23,
    nullity_mod_softmax=28,
    families={
        "rescale hidden 1": 6,
        "rescale hidden 2": 4,
        "dead unit 0": 10,
        "always-on units 1,2: GL(2)": 4,
        "always-on units 1,2: shift": 2,
    },
    cumulative=(6, 10, 19, 21, 23),
    gap=(0.00016, 5e-16),
    other_seeds={1: 23, 2: 23},
    beyond_structure=13,
    note="Structural rescalings give 10; the dead unit and the two always-on units are facts of this checkpoint.",
)
def _mlp_relu_planted() -> Built:
    model = mlp_564(lambda n: nn.ReLU(), True)
    x = 2 * torch.randn(150, 5)
    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    with torch.no_grad():
        first.bias[0], first.bias[1], first.bias[2] = -60, 60, 60
        first.weight[1:3] *= 0.5
        second.bias -= F.linear(F.relu(first(x)), second.weight).mean(0)
    return model, [(x,)]


@case(
    "mlp-tanh-bias",
    seed=0,
    params=79,
    nullity=0,
    nullity_mod_softmax=5,
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
        "hidden 1: signs": "Z2^6",
        "hidden 2: signs": "Z2^4",
    },
    controls=("rescale a unit by 1.3",),
    gap=(0.0056, 0.0),
    other_seeds={1: 0, 2: 0},
)
def _mlp_tanh_bias() -> Built:
    return mlp_564(lambda n: nn.Tanh(), True), [(2 * torch.randn(150, 5),)]


@case(
    "mlp-tanh-nobias",
    seed=0,
    params=66,
    nullity=0,
    nullity_mod_softmax=4,
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
        "hidden 1: signs": "Z2^6",
        "hidden 2: signs": "Z2^4",
    },
    controls=("rescale a unit by 1.3",),
    gap=(0.0072, 0.0),
    other_seeds={1: 0, 2: 0},
)
def _mlp_tanh_nobias() -> Built:
    return mlp_564(lambda n: nn.Tanh(), False), [(2 * torch.randn(150, 5),)]


@case(
    "mlp-gelu-bias",
    seed=0,
    params=79,
    nullity=0,
    nullity_mod_softmax=5,
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
    },
    controls=("rescale a unit by 1.3", "sign of a unit"),
    gap=(0.001, 0.0),
    other_seeds={1: 0, 2: 0},
)
def _mlp_gelu_bias() -> Built:
    return mlp_564(lambda n: nn.GELU(), True), [(2 * torch.randn(150, 5),)]


@case(
    "mlp-gelu-nobias",
    seed=0,
    params=66,
    nullity=0,
    nullity_mod_softmax=4,
    discrete={
        "hidden 1: units": "S_6",
        "hidden 2: units": "S_4",
    },
    controls=("rescale a unit by 1.3", "sign of a unit"),
    gap=(0.0041, 0.0),
    other_seeds={1: 0, 2: 0},
)
def _mlp_gelu_nobias() -> Built:
    return mlp_564(lambda n: nn.GELU(), False), [(2 * torch.randn(150, 5),)]


def _identity_tanh(bias: bool) -> nn.Module:
    return generic_(
        nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Identity(), nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))
    )


@case(
    "mlp-identity-tanh-bias",
    seed=0,
    params=75,
    nullity=20,
    nullity_mod_softmax=27,
    families={
        "GL(4) on the linear space": 16,
        "shift into the next bias": 4,
    },
    cumulative=(16, 20),
    discrete={
        "tanh layer: units": "S_6",
        "tanh layer: signs": "Z2^6",
    },
    gap=(0.0032, 4e-16),
    other_seeds={1: 20, 2: 20},
    note="nn.Identity leaves no node in the graph.",
)
def _mlp_identity_tanh_bias() -> Built:
    return _identity_tanh(True), [(2 * torch.randn(150, 5),)]


@case(
    "mlp-identity-tanh-nobias",
    seed=0,
    params=62,
    nullity=16,
    nullity_mod_softmax=22,
    families={
        "GL(4) on the linear space": 16,
    },
    cumulative=(16,),
    discrete={
        "tanh layer: units": "S_6",
        "tanh layer: signs": "Z2^6",
    },
    gap=(0.00093, 2e-16),
    other_seeds={1: 16, 2: 16},
    note="nn.Identity leaves no node in the graph.",
)
def _mlp_identity_tanh_nobias() -> Built:
    return _identity_tanh(False), [(2 * torch.randn(150, 5),)]


@case(
    "mlp-all-identity-5-4-6-3",
    seed=0,
    params=75,
    nullity=57,
    nullity_mod_softmax=63,
    families={
        "GL(4) on space 1": 16,
        "shift on space 1": 4,
        "GL(6) on space 2": 33,
        "shift on space 2": 6,
        "invisible direction of the reader of space 1": 6,
    },
    cumulative=(16, 20, 53, 56, 57),
    gap=(0.12, 5e-16),
    other_seeds={1: 57, 2: 57},
    beyond_structure=1,
    note="GL and shifts have rank 56 of 57: the last is a choice of kernel (width 4 exceeds the output width 3), a fibre.",
)
def _mlp_all_identity() -> Built:
    return generic_(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6), nn.Linear(6, 3))), [(2 * torch.randn(100, 5),)]


@case(
    "mlp-mixed",
    seed=1,
    params=125,
    nullity=21,
    nullity_mod_softmax=26,
    families={
        "rescale ReLU layer": 5,
        "rescale LeakyReLU layer": 4,
        "GL(3) on the linear space": 9,
        "shift into the next bias": 3,
    },
    cumulative=(5, 9, 18, 21),
    discrete={
        "tanh layer: signs": "Z2^4",
        "tanh layer: units": "S_4",
        "ReLU layer: units": "S_5",
        "GELU layer: units": "S_5",
        "LeakyReLU layer: units": "S_4",
    },
    gap=(8.3e-06, 3e-16),
    other_seeds={2: 21, 8: 21},
)
def _mlp_mixed() -> Built:
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.LeakyReLU(0.1),
        nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 3),
    )  # fmt: skip
    generic_(model)
    for index in (0, 2, 4, 6):
        layer = model[index]
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, 0, 0.8)
    return model, [(2 * torch.randn(300, 4),)]


# --- convolutions and norms ------------------------------------------------------------------------------------------


class ConvPool(nn.Module):
    """Conv, max pool, conv, average pool, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(2, 4, 3, padding=1)
        self.c2 = nn.Conv2d(4, 3, 3)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.avg_pool2d(F.relu(self.c2(x)), 2)
        return self.fc(x.flatten(1))


@case(
    "conv-relu-pool-linear",
    seed=6,
    params=226,
    nullity=7,
    nullity_mod_softmax=20,
    families={
        "rescale c1": 4,
        "rescale c2 through pool and flatten": 3,
    },
    cumulative=(4, 7),
    discrete={
        "c1 channels": "S_4",
        "c2 channels, fc columns in blocks of 4": "S_3",
    },
    controls=("c2 channels with interleaved fc columns",),
    gap=(0.0025, 1e-16),
    other_seeds={11: 7, 24: 7},
)
def _conv_relu_pool_linear() -> Built:
    return generic_(ConvPool()), [(2 * torch.randn(260, 2, 12, 12),)]


class ConvBN(nn.Module):
    """Two Conv-BatchNorm-ReLU blocks, spatial mean, linear."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(2, 3, 3, padding=1)
        self.b1 = nn.BatchNorm2d(3, eps=eps)
        self.c2 = nn.Conv2d(3, 4, 3)
        self.b2 = nn.BatchNorm2d(4, eps=eps)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b1(self.c1(x)))
        x = F.relu(self.b2(self.c2(x)))
        return self.fc(x.mean((2, 3)))


def _conv_bn(eps: float) -> Built:
    model = generic_(ConvBN(eps))
    return model, [(2 * torch.randn(12, 2, 6, 6),) for _ in range(18)]


@case(
    "conv-bn-relu-train",
    seed=0,
    params=198,
    nullity=14,
    nullity_mod_softmax=19,
    families={
        "BN1 gain and shift -> c2": 3,
        "BN2 gain and shift -> fc": 4,
        "conv bias under the batch mean": 7,
    },
    cumulative=(3, 7, 14),
    approximate={
        "filter scale under batch statistics c1": (3, 8e-07, 2e-06),
        "filter scale under batch statistics c2": (4, 1e-05, 3e-05),
    },
    discrete={
        "c1 filter and BN gain -> minus, per channel": "Z2^3",
        "c2 filter and BN gain -> minus, per channel": "Z2^4",
        "c1 channels": "S_3",
        "c2 channels": "S_4",
    },
    gap=(4.7e-08, 3e-16),
    other_seeds={1: 14, 2: 14},
    mixes_samples=True,
    mode="train",
    note="Train mode: rows of J are whole batches. The conv bias has exactly zero gradient.",
)
def _conv_bn_relu_train() -> Built:
    return _conv_bn(1e-5)


@case(
    "conv-bn-relu-train-eps0",
    seed=0,
    params=198,
    nullity=21,
    families={
        "BN1 gain and shift -> c2": 3,
        "BN2 gain and shift -> fc": 4,
        "conv bias under the batch mean": 7,
        "filter scale under batch statistics c1": 3,
        "filter scale under batch statistics c2": 4,
    },
    cumulative=(3, 7, 14, 17, 21),
    gap=(0.01, 3e-16),
    mixes_samples=True,
    mode="train",
    note="conv-bn-relu-train with eps 1e-30: the scales are exact.",
)
def _conv_bn_relu_train_eps0() -> Built:
    return _conv_bn(1e-30)


@case(
    "conv-bn-relu-eval",
    seed=43,
    params=198,
    nullity=21,
    nullity_mod_softmax=26,
    families={
        "BN1 gain and shift -> c2": 3,
        "BN2 gain and shift -> fc": 4,
        "c1 row scale against b1 gain": 3,
        "c1 bias against b1 shift": 3,
        "c2 row scale against b2 gain": 4,
        "c2 bias against b2 shift": 4,
    },
    cumulative=(3, 7, 10, 13, 17, 21),
    discrete={
        "c1 channels, running statistics moved too": "S_3",
        "c2 channels, running statistics moved too": "S_4",
    },
    controls=("filter scale alone", "permuting parameters but not the running statistics"),
    gap=(0.00057, 1e-16),
    other_seeds={174: 21, 247: 21},
    note="BatchNorm is a fixed affine map: scale needs a compensating gain and shift.",
)
def _conv_bn_relu_eval() -> Built:
    return _conv_bn(1e-5)


class ConvGN(nn.Module):
    """Conv, GroupNorm of two groups of two channels, ReLU, spatial mean, linear."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(2, 4, 3, padding=1)
        self.g1 = nn.GroupNorm(2, 4, eps=eps)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.g1(self.c1(x))).mean((2, 3)))


@case(
    "conv-gn-relu",
    seed=0,
    params=99,
    nullity=6,
    nullity_mod_softmax=11,
    families={
        "GN gain and shift -> fc": 4,
        "common bias per group": 2,
    },
    cumulative=(4, 6),
    approximate={
        "filter scale per group": (2, 2e-06, 3e-06),
    },
    discrete={
        "channels": "S_2 wr S_2",
        "sign of a group (filters, biases, gains)": "Z2^2",
    },
    controls=("exchange across groups", "per-channel filter scale", "per-channel bias shift"),
    gap=(2.7e-07, 1e-16),
    other_seeds={1: 6, 2: 6},
)
def _conv_gn_relu() -> Built:
    return generic_(ConvGN()), [(2 * torch.randn(120, 2, 5, 5),)]


@case(
    "conv-gn-relu-eps0",
    seed=0,
    params=99,
    nullity=8,
    families={
        "GN gain and shift -> fc": 4,
        "common bias per group": 2,
        "filter scale per group": 2,
    },
    cumulative=(4, 6, 8),
    gap=(0.0038, 2e-16),
    note="conv-gn-relu with eps 1e-30: the scales are exact.",
)
def _conv_gn_relu_eps0() -> Built:
    return generic_(ConvGN(1e-30)), [(2 * torch.randn(120, 2, 5, 5),)]


class ResidualBN(nn.Module):
    """A stem and one residual block with BatchNorm; ReLU after the add."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.c0 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.b0 = nn.BatchNorm2d(3, eps=eps)
        self.c1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(4, eps=eps)
        self.c2 = nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(3, eps=eps)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b0(self.c0(x)))
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)))))
        return self.fc(F.relu(x + y).mean((2, 3)))


def _residual_bn(eps: float) -> Built:
    model = generic_(ResidualBN(eps))
    return model, [(2 * torch.randn(12, 2, 5, 5),) for _ in range(27)]


@case(
    "residual-bn-train",
    seed=0,
    params=302,
    nullity=7,
    nullity_mod_softmax=11,
    families={
        "residual stream, one scale per channel": 3,
        "inner b1 -> c2": 4,
    },
    cumulative=(3, 7),
    approximate={
        "filter scale c0": (3, 2e-06, 5e-06),
        "filter scale c1": (4, 7e-06, 9e-06),
        "filter scale c2": (3, 2e-05, 5e-05),
    },
    discrete={
        "stream channels (both writers, both readers)": "S_3",
        "inner channels": "S_4",
        "filter and gain -> minus, per channel": "Z2^10",
    },
    controls=("stem channels only", "stream scale on one writer only"),
    gap=(1.4e-07, 2e-16),
    other_seeds={2: 7, 3: 7},
    mixes_samples=True,
    mode="train",
)
def _residual_bn_train() -> Built:
    return _residual_bn(1e-5)


@case(
    "residual-bn-train-eps0",
    seed=0,
    params=302,
    nullity=17,
    families={
        "residual stream, one scale per channel": 3,
        "inner b1 -> c2": 4,
        "filter scale c0": 3,
        "filter scale c1": 4,
        "filter scale c2": 3,
    },
    cumulative=(3, 7, 10, 14, 17),
    gap=(0.0082, 2e-16),
    mixes_samples=True,
    mode="train",
    note="residual-bn-train with eps 1e-30: the scales are exact.",
)
def _residual_bn_train_eps0() -> Built:
    return _residual_bn(1e-30)


@case(
    "residual-bn-eval",
    seed=14,
    params=302,
    nullity=17,
    nullity_mod_softmax=21,
    families={
        "residual stream, one scale per channel": 3,
        "inner b1 -> c2": 4,
        "c0 row scale against b0 gain": 3,
        "c1 row scale against b1 gain": 4,
        "c2 row scale against b2 gain": 3,
    },
    cumulative=(3, 7, 10, 14, 17),
    gap=(0.00048, 1e-16),
    other_seeds={83: 17, 282: 17},
)
def _residual_bn_eval() -> Built:
    return _residual_bn(1e-5)


# --- recurrent -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent network and a linear readout of every step, or of the last."""

    def __init__(self, rnn: nn.RNNBase, last: bool = False) -> None:
        super().__init__()
        self.r = rnn
        self.fc = nn.Linear(rnn.hidden_size, 2)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        states = self.r(x)[0]
        return self.fc(states[:, -1] if self.last else states)


def _recurrent(rnn: Callable[[], nn.RNNBase], std: float, samples: int, last: bool = False) -> Built:
    model = Recurrent(rnn(), last)
    generic_(model)
    for p in model.r.parameters():
        nn.init.normal_(p, 0, std)
    return model, [(1.5 * torch.randn(samples, 6, 2),)]


@case(
    "rnn-tanh",
    seed=0,
    params=42,
    nullity=4,
    nullity_mod_softmax=9,
    families={
        "bias_ih against bias_hh": 4,
    },
    cumulative=(4,),
    discrete={
        "hidden units": "S_4",
        "hidden signs": "Z2^4",
    },
    controls=("rows of weight_hh without its columns",),
    gap=(0.01, 2e-17),
    other_seeds={1: 4, 2: 4},
    note="One opaque node; the recurrent matrix writes and reads the same space.",
)
def _rnn_tanh() -> Built:
    return _recurrent(lambda: nn.RNN(2, 4, batch_first=True), 0.6, 60)


@case(
    "rnn-relu",
    seed=0,
    params=42,
    nullity=8,
    nullity_mod_softmax=13,
    families={
        "bias_ih against bias_hh": 4,
        "rescale the recurrent ReLU state": 4,
    },
    cumulative=(4, 8),
    discrete={
        "hidden units": "S_4",
    },
    gap=(0.0026, 2e-16),
    other_seeds={1: 8, 2: 8},
    note="The diagonal of weight_hh is invariant under the rescale.",
)
def _rnn_relu() -> Built:
    return _recurrent(lambda: nn.RNN(2, 4, nonlinearity="relu", batch_first=True), 0.4, 60)


@case(
    "lstm",
    seed=0,
    params=138,
    nullity=16,
    nullity_mod_softmax=21,
    families={
        "bias_ih against bias_hh": 16,
    },
    cumulative=(16,),
    discrete={
        "hidden units": "S_4",
        "hidden signs (candidate rows, weight_hh columns, readout)": "Z2^4",
    },
    controls=("permuting across gate blocks", "rescale as in a ReLU state"),
    gap=(0.00022, 2e-17),
    other_seeds={1: 16, 2: 16},
    note="Gate order in rows is i, f, g, o.",
)
def _lstm() -> Built:
    return _recurrent(lambda: nn.LSTM(2, 4, batch_first=True), 0.6, 60)


@case(
    "lstm-2layer-last-step",
    seed=0,
    params=188,
    nullity=24,
    nullity_mod_softmax=28,
    families={
        "bias_ih against bias_hh layer 0": 12,
        "bias_ih against bias_hh layer 1": 12,
    },
    cumulative=(12, 24),
    gap=(4.6e-06, 5e-17),
    other_seeds={1: 24, 2: 24},
    note="Only the last step is read: singular values of 5e-6 are generic.",
)
def _lstm_2layer_last_step() -> Built:
    return _recurrent(lambda: nn.LSTM(2, 3, num_layers=2, bidirectional=False, batch_first=True), 0.6, 320, last=True)


# --- generative and self-supervised ----------------------------------------------------------------------------------


class VAE(nn.Module):
    """Tanh VAE: reconstructions for fixed noise draws (zero noise: the mean), with the KL divergence as a last column."""

    def __init__(self, sample: bool = False, kl: bool = True) -> None:
        super().__init__()
        self.e = nn.Linear(5, 6)
        self.mu = nn.Linear(6, 3)
        self.lv = nn.Linear(6, 3)
        self.d1 = nn.Linear(3, 6)
        self.d2 = nn.Linear(6, 5)
        self.eps = torch.randn(4, 3) if sample else torch.zeros(1, 3)
        self.kl = kl

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.e(x))
        mu, lv = self.mu(h), self.lv(h)
        kl = 0.5 * (mu**2 + lv.exp() - lv - 1).sum(1)
        xh = torch.cat([self.d2(torch.tanh(self.d1(mu + e * (lv / 2).exp()))) for e in self.eps], 1)
        return torch.cat([xh, kl[:, None]], 1) if self.kl else xh


def _vae(sample: bool, kl: bool) -> Built:
    model = VAE(sample, kl)
    generic_(model)
    nn.init.normal_(model.lv.weight, 0, 0.6)
    nn.init.normal_(model.mu.weight, 0, 0.6)
    return model, [(1.5 * torch.randn(120, 5),)]


@case(
    "vae-mean-plus-kl",
    seed=0,
    params=137,
    nullity=3,
    families={
        "SO(3) on the latent mean": 3,
    },
    cumulative=(3,),
    discrete={
        "latents (mu rows signed, lv rows permuted, d1 columns signed)": "Z2 wr S_3",
        "mu and decoder alone, lv head left in place": "S_3",
        "encoder signs": "Z2^6",
        "decoder signs": "Z2^6",
    },
    controls=("GL on the latent", "translation of the latent"),
    gap=(0.00016, 8e-17),
    other_seeds={1: 3, 2: 3},
)
def _vae_mean_plus_kl() -> Built:
    return _vae(sample=False, kl=True)


@case(
    "vae-mean-no-kl",
    seed=0,
    params=137,
    nullity=33,
    families={
        "GL(3) on the latent mean": 9,
        "latent shift": 3,
        "dead log-variance head": 21,
    },
    cumulative=(9, 12, 33),
    gap=(0.00028, 2e-16),
    other_seeds={1: 33, 2: 33},
    note="The log-variance head is dead code: 21 unused parameters, not a symmetry of a space.",
)
def _vae_mean_no_kl() -> Built:
    return _vae(sample=False, kl=False)


@case(
    "vae-fixed-noise-samples",
    seed=0,
    params=137,
    nullity=0,
    discrete={
        "encoder signs": "Z2^6",
        "decoder signs": "Z2^6",
    },
    controls=("latent rotation of mu",),
    gap=(0.0015, 0.0),
    other_seeds={1: 0, 2: 0},
)
def _vae_fixed_noise_samples() -> Built:
    return _vae(sample=True, kl=True)


class Mixer(nn.Module):
    """One MLP-Mixer block with pre-norm token and channel mixing, final LayerNorm, token mean, linear."""

    def __init__(self, tokens: int = 4, channels: int = 3, ht: int = 5, hc: int = 5, eps: float = 1e-5) -> None:
        super().__init__()
        self.emb = nn.Linear(2, channels)
        self.n1 = nn.LayerNorm(channels, eps=eps)
        self.t1 = nn.Linear(tokens, ht)
        self.t2 = nn.Linear(ht, tokens)
        self.n2 = nn.LayerNorm(channels, eps=eps)
        self.c1 = nn.Linear(channels, hc)
        self.c2 = nn.Linear(hc, channels)
        self.n3 = nn.LayerNorm(channels, eps=eps)
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(self.n2(x))))
        return self.fc(self.n3(x).mean(1))


@case(
    "mlp-mixer",
    seed=0,
    params=126,
    nullity=35,
    nullity_mod_softmax=38,
    families={
        "n1 common gain against t1": 1,
        "n1 common shift into t1.bias": 1,
        "n2 gain against c1": 3,
        "n2 shift into c1.bias": 3,
        "n2 hyperplane in c1": 5,
        "n3 gain against fc (through the token mean)": 3,
        "n3 shift into fc.bias": 3,
        "n3 hyperplane in fc": 3,
        "invisible stream mean: emb": 3,
        "invisible stream mean: c2": 6,
        "invisible stream mean: t2.bias": 4,
    },
    cumulative=(1, 2, 5, 8, 13, 16, 19, 22, 25, 31, 35),
    approximate={
        "joint scale of the stream writers": (1, 0.001, 0.001),
    },
    discrete={
        "channels": "S_3",
        "token hidden units": "S_5",
        "channel hidden units": "S_5",
    },
    controls=("n1 gain per channel", "permutation of the tokens in t1 columns only"),
    gap=(2.1e-06, 2e-15),
    other_seeds={1: 35, 2: 35},
    note=(
        "Token mixing shares weights over channels: one common gain and shift for n1. The joint scale is broken at "
        "1e-3, above generic values of 2e-6."
    ),
)
def _mlp_mixer() -> Built:
    return generic_(Mixer()), [(2 * torch.randn(260, 4, 2),)]


@case(
    "mlp-mixer-eps0",
    seed=0,
    params=126,
    nullity=36,
    families={
        "n1 common gain against t1": 1,
        "n1 common shift into t1.bias": 1,
        "n2 gain against c1": 3,
        "n2 shift into c1.bias": 3,
        "n2 hyperplane in c1": 5,
        "n3 gain against fc (through the token mean)": 3,
        "n3 shift into fc.bias": 3,
        "n3 hyperplane in fc": 3,
        "invisible stream mean: emb": 3,
        "invisible stream mean: c2": 6,
        "invisible stream mean: t2.bias": 4,
        "joint scale of the stream writers": 1,
    },
    cumulative=(1, 2, 5, 8, 13, 16, 19, 22, 25, 31, 35, 36),
    gap=(6.3e-07, 2e-15),
    note="mlp-mixer with eps 1e-30: the scales are exact.",
)
def _mlp_mixer_eps0() -> Built:
    return generic_(Mixer(eps=1e-30)), [(2 * torch.randn(260, 4, 2),)]


class BarlowTwins(nn.Module):
    """Two towers with shared weights and the Barlow-Twins loss of the batch: one number."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(4, 5)
        self.l2 = nn.Linear(5, 3)

    def encode(self, x: Tensor) -> Tensor:
        z = self.l2(F.relu(self.l1(x)))
        z = z - z.mean(0)
        return z / z.pow(2).mean(0).sqrt()

    def forward(self, xa: Tensor, xb: Tensor) -> Tensor:
        za, zb = self.encode(xa), self.encode(xb)
        c = za.T @ zb / len(xa)
        eye = torch.eye(3, dtype=c.dtype)
        return ((c - eye) ** 2 * (eye + 0.05 * (1 - eye))).sum()[None]


@case(
    "siamese-barlow-twins-loss",
    seed=11,
    params=43,
    nullity=11,
    families={
        "rescale ReLU layer": 5,
        "scale per embedding dimension": 3,
        "shift per embedding dimension": 3,
    },
    cumulative=(5, 8, 11),
    discrete={
        "embedding": "Z2 wr S_3",
    },
    controls=("rotation of the embedding",),
    gap=(0.02, 2e-16),
    other_seeds={22: 11, 33: 11},
    mixes_samples=True,
    note="One number per batch; level loss.",
)
def _siamese_barlow_twins_loss() -> Built:
    model = generic_(BarlowTwins())
    base = [2 * torch.randn(16, 4) for _ in range(220)]
    return model, [(b + 0.5 * torch.randn(16, 4), b + 0.5 * torch.randn(16, 4)) for b in base]


# --- gated -----------------------------------------------------------------------------------------------------------


class GLU(nn.Module):
    """Gated linear unit d(act(g x) * (u x)); ``act`` None is bilinear."""

    def __init__(self, units: int, bias: bool, act: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.g = nn.Linear(4, units, bias=bias)
        self.u = nn.Linear(4, units, bias=bias)
        self.d = nn.Linear(units, 4, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        gate = self.g(x)
        return self.d((gate if self.act is None else self.act(gate)) * self.u(x))


@case(
    "swiglu",
    seed=0,
    params=72,
    nullity=6,
    families={
        "linear branch against down": 6,
    },
    cumulative=(6,),
    discrete={
        "units": "S_6",
        "sign of (u row, d column)": "Z2^6",
    },
    controls=("scale of the gate against down", "sign of gate and down"),
    gap=(0.0085, 2e-16),
    other_seeds={1: 6, 2: 6},
)
def _swiglu() -> Built:
    return generic_(GLU(6, False, F.silu)), [(2 * torch.randn(120, 4),)]


@case(
    "swiglu-bias",
    seed=0,
    params=88,
    nullity=6,
    families={
        "linear branch against down": 6,
    },
    cumulative=(6,),
    discrete={
        "units": "S_6",
        "sign of (u row, d column)": "Z2^6",
    },
    controls=("scale of the gate against down", "sign of gate and down"),
    gap=(0.003, 2e-16),
    other_seeds={1: 6, 2: 6},
)
def _swiglu_bias() -> Built:
    return generic_(GLU(6, True, F.silu)), [(2 * torch.randn(120, 4),)]


@case(
    "bilinear-glu-3",
    seed=0,
    params=36,
    nullity=6,
    families={
        "linear branch against down": 3,
        "gate branch against down": 3,
    },
    cumulative=(3, 6),
    discrete={
        "units": "S_3",
        "exchange of g and u rows, per unit": "Z2^3",
    },
    controls=("GL(3) mixing of units",),
    gap=(0.017, 2e-16),
    other_seeds={1: 6, 2: 6},
)
def _bilinear_glu_3() -> Built:
    return generic_(GLU(3, False, None)), [(2 * torch.randn(120, 4),)]


@case(
    "bilinear-glu",
    seed=0,
    params=72,
    nullity=32,
    families={
        "linear branch against down": 6,
        "gate branch against down": 6,
        "kernel of the coefficient map (fibre, not a group orbit)": 32,
    },
    cumulative=(6, 12, 32),
    discrete={
        "units": "S_6",
        "exchange of g and u rows, per unit": "Z2^6",
    },
    gap=(0.021, 4e-16),
    other_seeds={1: 32, 2: 32},
    beyond_structure=20,
    note="The function is 40 numbers, so 20 directions are a fibre of an over-complete polynomial map.",
)
def _bilinear_glu() -> Built:
    return generic_(GLU(6, False, None)), [(2 * torch.randn(120, 4),)]


# --- factored, tied and bare parameters ------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A linear layer with a low-rank adapter (2 / rank) B A."""

    def __init__(self, fan_in: int, fan_out: int, rank: int) -> None:
        super().__init__()
        self.w = nn.Linear(fan_in, fan_out)
        self.A = nn.Parameter(torch.randn(rank, fan_in))
        self.B = nn.Parameter(torch.randn(fan_out, rank))
        self.scale = 2 / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


def _lora_model(frozen: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), LoRA(5, 4, 2), nn.ReLU(), nn.Linear(4, 3))
    generic_(model)
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or name in ("2.A", "2.B"))
    return model


@case(
    "lora-frozen-base",
    seed=0,
    params=18,
    nullity=4,
    families={
        "GL(2) on the rank space": 4,
    },
    cumulative=(4,),
    controls=("scale A alone",),
    gap=(0.076, 3e-16),
    other_seeds={1: 4, 4: 4},
    note="Only the adapters are trainable.",
)
def _lora_frozen_base() -> Built:
    return _lora_model(True), [(2 * torch.randn(500, 4),)]


@case(
    "lora-all-trainable",
    seed=0,
    params=82,
    nullity=27,
    nullity_mod_softmax=32,
    families={
        "rescale hidden 1": 5,
        "rescale hidden 2": 4,
        "A absorbed by the base": 10,
        "B absorbed by the base": 8,
        "GL(2) on the rank space": 4,
    },
    cumulative=(5, 9, 19, 27, 27),
    gap=(0.0019, 5e-16),
    other_seeds={4: 27, 7: 27},
    note="The base absorbs every adapter direction. A x is not an affine function of the edge behind it.",
)
def _lora_all_trainable() -> Built:
    return _lora_model(False), [(4 * torch.randn(1500, 4),)]


@case(
    "lora-frozen-base-at-init-B0",
    seed=15,
    params=18,
    nullity=10,
    families={
        "A invisible while B = 0": 10,
    },
    cumulative=(10,),
    gap=(0.082, 5e-17),
    other_seeds={16: 10, 27: 10},
    beyond_structure=6,
    note="B = 0 is not generic: 10 instead of 4, a property of this checkpoint.",
)
def _lora_frozen_base_at_init() -> Built:
    model = _lora_model(True)
    adapter = model[2]
    assert isinstance(adapter, LoRA)
    nn.init.zeros_(adapter.B)
    return model, [(2 * torch.randn(500, 4),)]


@case(
    "weight-norm",
    seed=0,
    params=48,
    nullity=10,
    nullity_mod_softmax=16,
    families={
        "scale of the direction v": 5,
        "rescale ReLU layer": 5,
    },
    cumulative=(5, 10),
    discrete={
        "(g, v) -> minus, per row": "Z2^5",
        "units": "S_5",
    },
    gap=(0.027, 2e-16),
    other_seeds={1: 10, 2: 10},
    note="The weight is an intermediate of parametrizations.weight.original0 (g) and original1 (v).",
)
def _weight_norm() -> Built:
    model = generic_(nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3)))
    return model, [(2 * torch.randn(120, 4),)]


class UV(nn.Module):
    """A linear layer whose weight is the elementwise product u * v."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(fan_out, fan_in))
        self.v = nn.Parameter(torch.randn(fan_out, fan_in))
        self.b = nn.Parameter(0.3 * torch.randn(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.u * self.v, self.b)


@case(
    "spred-uv",
    seed=0,
    params=78,
    nullity=40,
    families={
        "u_ij against v_ij in layer 0": 20,
        "u_ij against v_ij in layer 2": 15,
        "rescale ReLU layer": 5,
    },
    cumulative=(20, 35, 40),
    discrete={
        "exchange of u and v, per layer": "Z2^2",
        "units": "S_5",
    },
    gap=(0.002, 2e-16),
    other_seeds={1: 40, 2: 40},
    note="The weight is an intermediate u * v: one scale per entry.",
)
def _spred_uv() -> Built:
    return nn.Sequential(UV(4, 5), nn.ReLU(), UV(5, 3)), [(2 * torch.randn(160, 4),)]


class EinsumMLP(nn.Module):
    """A two-layer ReLU network written with einsum on bare parameters; its units are indexed by a pair (h, j)."""

    def __init__(self) -> None:
        super().__init__()
        self.W1 = nn.Parameter(torch.randn(2, 4, 3))
        self.b1 = nn.Parameter(0.3 * torch.randn(2, 3))
        self.W2 = nn.Parameter(torch.randn(2, 3, 3))
        self.b2 = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("bi,hij->bhj", x, self.W1) + self.b1)
        return torch.einsum("bhj,hjo->bo", h, self.W2) + self.b2


@case(
    "einsum-mlp",
    seed=0,
    params=51,
    nullity=6,
    nullity_mod_softmax=13,
    families={
        "rescale unit (h,j)": 6,
    },
    cumulative=(6,),
    discrete={
        "units (h, j), across h too": "S_6",
    },
    gap=(0.035, 2e-16),
    other_seeds={1: 6, 2: 6},
    note="The 2 x 3 units form one space of 6.",
)
def _einsum_mlp() -> Built:
    return EinsumMLP(), [(2 * torch.randn(120, 4),)]


@case(
    "linear-ae-untied-nobias",
    seed=0,
    params=36,
    nullity=9,
    families={
        "GL(3) on the code": 9,
    },
    cumulative=(9,),
    gap=(0.059, 3e-16),
    other_seeds={1: 9, 2: 9},
)
def _linear_ae_untied_nobias() -> Built:
    return nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 6, bias=False)), [(2 * torch.randn(60, 6),)]


@case(
    "linear-ae-untied-bias",
    seed=0,
    params=45,
    nullity=12,
    families={
        "GL(3) on the code": 9,
        "code shift": 3,
    },
    cumulative=(9, 12),
    gap=(0.072, 2e-16),
    other_seeds={1: 12, 2: 12},
)
def _linear_ae_untied_bias() -> Built:
    return generic_(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 6))), [(2 * torch.randn(60, 6),)]


class TiedAE(nn.Module):
    """A linear autoencoder whose decoder is the transpose of its encoder."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 6))
        self.be = nn.Parameter(torch.randn(3)) if bias else None
        self.bd = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.W, self.be), self.W.T, self.bd)


@case(
    "linear-ae-tied-bias",
    seed=0,
    params=27,
    nullity=6,
    families={
        "SO(3) on the code": 3,
        "code shift": 3,
    },
    cumulative=(3, 6),
    discrete={
        "code: reflection": "Z2",
    },
    controls=("GL(3) on the code",),
    gap=(0.075, 2e-16),
    other_seeds={1: 6, 2: 6},
    note="The parameter enters twice, once transposed: GL restricts to O.",
)
def _linear_ae_tied_bias() -> Built:
    return TiedAE(True), [(2 * torch.randn(60, 6),)]


@case(
    "linear-ae-tied-nobias",
    seed=0,
    params=18,
    nullity=3,
    families={
        "SO(3) on the code": 3,
    },
    cumulative=(3,),
    discrete={
        "code: reflection": "Z2",
    },
    gap=(0.13, 1e-16),
    other_seeds={1: 3, 2: 3},
)
def _linear_ae_tied_nobias() -> Built:
    return TiedAE(False), [(2 * torch.randn(60, 6),)]


class BatchEnsembleLayer(nn.Module):
    """One shared weight with fast weights r (inputs) and s (outputs) for each of m members."""

    def __init__(self, fan_in: int, fan_out: int, members: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(fan_out, fan_in))
        self.r = nn.Parameter(torch.randn(members, fan_in))
        self.s = nn.Parameter(torch.randn(members, fan_out))
        self.b = nn.Parameter(0.3 * torch.randn(members, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.r[:, None]) @ self.W.T) * self.s[:, None] + self.b[:, None]


class BatchEnsemble(nn.Module):
    """A batch ensemble of three two-layer ReLU networks; output (members, samples, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = BatchEnsembleLayer(4, 5, 3)
        self.l2 = BatchEnsembleLayer(5, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(F.relu(self.l1(x.expand(3, *x.shape))))


@case(
    "batch-ensemble",
    seed=1,
    params=110,
    nullity=36,
    families={
        "l1: s against rows of W": 5,
        "l1: r against columns of W": 4,
        "l1: r against s per member": 3,
        "l2: s against rows of W": 3,
        "l2: r against columns of W": 5,
        "l2: r against s per member": 3,
        "per member ReLU rescale": 15,
    },
    cumulative=(5, 9, 11, 14, 19, 21, 36),
    discrete={
        "hidden units, one permutation for all members": "S_5",
        "signs of s[:, j] with row j of W (l1)": "Z2^5",
    },
    controls=("a different permutation per member",),
    gap=(0.00043, 5e-16),
    other_seeds={2: 36, 3: 36},
    sample_axis=1,
)
def _batch_ensemble() -> Built:
    return BatchEnsemble(), [(2 * torch.randn(100, 4),)]


# --- transformers ----------------------------------------------------------------------------------------------------


class TinyGPT(nn.Module):
    """A one-layer pre-LayerNorm GPT in plain torch: packed qkv, GELU MLP, biases everywhere but in the untied head."""

    def __init__(self, vocab: int = 7, length: int = 5, width: int = 4, heads: int = 2, hidden: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(length, width)
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln_1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        x = x + self.out(F.gelu(self.fc(self.ln_2(x))))
        return self.head(self.ln_f(x))


def draw_transformer_(model: nn.Module, std: float) -> None:
    """Draw generic weights: matrices N(0, std^2), tables and tokens N(0, 1), norm gains 1 + 0.3 N, biases 0.4 N."""
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            module = owner[id(p)]
            if isinstance(module, nn.Embedding) or name.endswith(("cls_token", "position_embeddings")):
                p.normal_()
            elif name.endswith("bias"):
                p.normal_(0, 0.4)
            elif "Norm" in type(module).__name__:
                p.normal_(1, 0.3)
            else:
                p.normal_(0, std)


@case(
    "gpt-design",
    seed=0,
    params=256,
    nullity=100,
    nullity_mod_softmax=104,
    families={
        "QK GL(2) per head": 8,
        "OV GL(2) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "LN gains -> readers (ln_1, ln_2, ln_f)": 12,
        "LN biases -> reader biases (ln_1, ln_2)": 8,
        "stream mean and wte/wpe translation": 29,
        "LN hyperplane in readers with a bias": 20,
        "LN hyperplane of the head with the ln_f bias": 4,
        "rotations of the stream that fix the mean": 3,
    },
    cumulative=(8, 16, 20, 24, 36, 44, 73, 93, 97, 100),
    extra_mod_softmax={
        "head rows += u": 4,
    },
    approximate={
        "joint scale of the stream writers": (1, 1e-08, 0.0001),
    },
    discrete={
        "heads": "S_2",
        "MLP units": "S_8",
        "stream channels": "S_4",
    },
    note=(
        "The 30 directions of stream mean and table translation have rank 29: multiples of 1 are both. The size of the "
        "approximate scale is an order of magnitude, not published."
    ),
)
def _gpt_design() -> Built:
    model = TinyGPT()
    draw_transformer_(model, 0.8)
    return model, [(torch.randint(7, (96, 5)),)]


class Logits(nn.Module):
    """A Hugging Face language model as a map from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


class Hidden(nn.Module):
    """A Hugging Face encoder as a map to its last hidden state."""

    def __init__(self, model: nn.Module, keys: tuple[str, ...] = ("input_ids",), first: bool = False) -> None:
        super().__init__()
        self.model = model
        self.keys = keys
        self.first = first

    def forward(self, *args: Tensor) -> Tensor:
        state = self.model(**dict(zip(self.keys, args, strict=True))).last_hidden_state
        return state[:, 0] if self.first else state


def _tokens(samples: int, length: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (samples, length))


def gpt2(vocab: int = 7, length: int = 5, width: int = 4, heads: int = 2, inner: int = 6, layers: int = 1, tied: bool = True) -> Built:
    """Tiny GPT-2 with a language-model head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab, n_positions=length, n_embd=width, n_layer=layers, n_head=heads, n_inner=inner, layer_norm_epsilon=1e-5,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    model = Logits(GPT2LMHeadModel(config))
    draw_transformer_(model, 0.8)
    return model, [(_tokens(96, length, vocab),)]


@case(
    "gpt2_tied",
    seed=0,
    params=210,
    nullity=75,
    nullity_mod_softmax=79,
    families={
        "QK GL(d) per head": 8,
        "OV GL(d) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "ln_1 gain -> readers": 4,
        "ln_1 bias -> reader biases": 4,
        "ln_2 gain -> readers": 4,
        "ln_2 bias -> reader biases": 4,
        "LN hyperplane in c_attn, c_fc": 18,
        "stream mean: wpe rows, c_proj cols, biases": 17,
    },
    cumulative=(8, 16, 20, 24, 28, 32, 36, 40, 58, 75),
    extra_mod_softmax={
        "softmax: wte translation vs wpe": 4,
    },
    approximate={
        "joint writer scale, ln_f inverse": (1, 8.8e-07, 1.4e-06),
    },
    discrete={
        "heads": "S_2",
        "MLP units": "S_6",
        "stream channels": "S_4",
        "global stream sign": "Z2",
        "sign of (ln_1 gain, bias, reader column), per channel": "Z2^4",
        "sign of (ln_2 gain, bias, reader column), per channel": "Z2^4",
    },
    controls=("sign of one stream channel",),
    requires=("transformers",),
    note="Conv1D stores (in, out). The tied table is two placeholders in the exported graph, one without users.",
)
def _gpt2_tied() -> Built:
    return gpt2()


@case(
    "gpt2_tied_L2",
    seed=0,
    params=610,
    nullity=220,
    nullity_mod_softmax=226,
    slow=True,
    requires=("transformers",),
    note="General-L formula L(2 H d^2 + 10 D + 2 I + 2) + T, softmax + D.",
)
def _gpt2_tied_two_layers() -> Built:
    return gpt2(vocab=8, length=4, width=6, inner=5, layers=2)


@case(
    "gpt2_untied_L2",
    seed=0,
    params=658,
    nullity=255,
    slow=True,
    requires=("transformers",),
    note="The tied formula + V + (D-1) + D + D + (D-1)(D-2)/2.",
)
def _gpt2_untied_two_layers() -> Built:
    return gpt2(vocab=8, length=4, width=6, inner=5, layers=2, tied=False)


def llama(
    tied: bool, vocab: int = 9, width: int = 8, inner: int = 3, heads: int = 4, kv_heads: int = 2, head_dim: int = 4, layers: int = 1
) -> Built:
    """Tiny Llama with grouped-query attention and rotary positions (theta 10)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10.0},
        max_position_embeddings=16, tie_word_embeddings=tied, attention_bias=False, mlp_bias=False, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    model = Logits(LlamaForCausalLM(config))
    draw_transformer_(model, 0.5)
    return model, [(_tokens(96, 5, vocab),)]


@case(
    "llama_tied",
    seed=0,
    params=552,
    nullity=59,
    nullity_mod_softmax=59,
    families={
        "QK: C* per RoPE plane per kv head": 8,
        "OV: GL(d) per kv head": 32,
        "SwiGLU: up scale per unit": 3,
        "input_layernorm gain -> readers": 8,
        "post_attention_layernorm gain -> readers": 8,
    },
    cumulative=(8, 40, 43, 51, 59),
    approximate={
        "joint writer scale, final gain inverse": (1, 5e-08, 9.4e-08),
    },
    discrete={
        "query heads in a kv group, kv groups as wholes": "S_2 wr S_2",
        "SwiGLU units": "S_3",
        "sign of (up, down), per unit": "Z2^3",
        "stream, gains permuted unsigned": "Z2 wr S_8",
    },
    controls=("query heads across kv groups", "GL(d) on QK", "exchange of the two rotary planes"),
    requires=("transformers",),
    note="RMSNorm, rotary and softmax cast to float32 inside the forward: lift the casts before cutting ranks.",
)
def _llama_tied() -> Built:
    return llama(True)


@case(
    "llama_untied",
    seed=0,
    params=624,
    nullity=95,
    nullity_mod_softmax=103,
    families={
        "QK: C* per RoPE plane per kv head": 8,
        "OV: GL(d) per kv head": 32,
        "SwiGLU: up scale per unit": 3,
        "input_layernorm gain -> readers": 8,
        "post_attention_layernorm gain -> readers": 8,
        "final norm gain -> readers": 8,
        "stream O(D) with gains folded": 28,
    },
    cumulative=(8, 40, 43, 51, 59, 67, 95),
    extra_mod_softmax={
        "softmax: head row translation": 8,
    },
    approximate={
        "joint writer scale": (1, 4.4e-08, 1e-07),
    },
    discrete={
        "query heads in a kv group, kv groups as wholes": "S_2 wr S_2",
        "SwiGLU units": "S_3",
        "sign of (up, down), per unit": "Z2^3",
        "stream, gains permuted unsigned": "Z2 wr S_8",
    },
    controls=("query heads across kv groups", "GL(d) on QK", "exchange of the two rotary planes"),
    requires=("transformers",),
    note="RMSNorm, rotary and softmax cast to float32 inside the forward: lift the casts before cutting ranks.",
)
def _llama_untied() -> Built:
    return llama(False)


@case(
    "llama_untied_v6",
    seed=0,
    params=576,
    nullity=167,
    beyond_structure=72,
    slow=True,
    requires=("transformers",),
    note="Small vocabulary V < D: D-V directions per row of q, k, v and D translations, true of this data domain only.",
)
def _llama_untied_v6() -> Built:
    return llama(False, vocab=6)


@case(
    "llama_untied_v8",
    seed=0,
    params=608,
    nullity=103,
    beyond_structure=8,
    slow=True,
    requires=("transformers",),
    note="Small vocabulary V = D: D translations beyond the 95, true of this data domain only.",
)
def _llama_untied_v8() -> Built:
    return llama(False, vocab=8)


@case(
    "llama_tied_L2",
    seed=0,
    params=516,
    nullity=72,
    slow=True,
    requires=("transformers",),
    note="General-L formula L(KV d + KV d^2 + I + 2D).",
)
def _llama_tied_two_layers() -> Built:
    return llama(True, width=6, inner=4, heads=2, kv_heads=1, layers=2)


@case(
    "llama_untied_L2",
    seed=0,
    params=570,
    nullity=93,
    slow=True,
    requires=("transformers",),
    note="General-L formula L(KV d + KV d^2 + I + 2D) + D + D(D-1)/2.",
)
def _llama_untied_two_layers() -> Built:
    return llama(False, width=6, inner=4, heads=2, kv_heads=1, layers=2)


def bert(eps: float, vocab: int = 7, width: int = 4, heads: int = 2, inner: int = 6, layers: int = 1) -> Built:
    """Tiny BERT encoder (post-LayerNorm) without padding index; inputs are tokens and token types."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
        max_position_embeddings=5, type_vocab_size=2, layer_norm_eps=eps, pad_token_id=None, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    model = Hidden(BertModel(config, add_pooling_layer=False), ("input_ids", "token_type_ids"))
    draw_transformer_(model, 0.8)
    return model, [(_tokens(150, 5, vocab), _tokens(150, 5, 2))]


@case(
    "bert_eps1e-5",
    seed=0,
    params=218,
    nullity=82,
    families={
        "QK GL(d) per head": 8,
        "OV GL(d) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "segment 0 shift: emb LN bias vs q,k,v,o biases": 4,
        "segment 1 shift: attn LN bias vs fc1,fc2 biases": 4,
        "LN hyperplane in q,k,v,fc1": 18,
        "pre-LN mean of o, fc2 (cols, bias)": 12,
        "embedding row means": 14,
        "word/position/type translations": 8,
    },
    cumulative=(8, 16, 20, 24, 28, 32, 50, 62, 76, 82),
    approximate={
        "embedding scale (eps)": (1, 2.7e-07, 1.1e-06),
        "segment scale (eps)": (2, 2.4e-08, 3.9e-07),
    },
    discrete={
        "heads": "S_2",
        "MLP units": "S_6",
        "sign of the tables with the embedding LN gain": "Z2",
        "sign of a segment": "Z2^2",
    },
    requires=("transformers",),
    note="Post-LN: gains are not free against the readers, no stream rotation or permutation.",
)
def _bert() -> Built:
    return bert(1e-5)


@case(
    "bert_eps1e-12",
    seed=0,
    params=218,
    nullity=85,
    families={
        "QK GL(d) per head": 8,
        "OV GL(d) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "segment 0 shift: emb LN bias vs q,k,v,o biases": 4,
        "segment 1 shift: attn LN bias vs fc1,fc2 biases": 4,
        "LN hyperplane in q,k,v,fc1": 18,
        "pre-LN mean of o, fc2 (cols, bias)": 12,
        "embedding row means": 14,
        "word/position/type translations": 8,
        "embedding scale (eps)": 1,
        "segment scale (eps)": 2,
    },
    cumulative=(8, 16, 20, 24, 28, 32, 50, 62, 76, 82, 83, 85),
    discrete={
        "heads": "S_2",
        "MLP units": "S_6",
        "sign of the tables with the embedding LN gain": "Z2",
        "sign of a segment": "Z2^2",
    },
    requires=("transformers",),
    note="At the default eps 1e-12 the three scales are below any practical cut.",
)
def _bert_default_eps() -> Built:
    return bert(1e-12)


@case(
    "bert_L2",
    seed=0,
    params=628,
    nullity=193,
    slow=True,
    requires=("transformers",),
    note="General-L formula L(2 H d^2 + 8 D + 2 I + 2) + V + T + TY + 2(D-1).",
)
def _bert_two_layers() -> Built:
    return bert(1e-5, vocab=8, width=6, heads=3, inner=5, layers=2)


def vit(
    eps: float, first: bool = False, width: int = 4, heads: int = 2, inner: int = 6, layers: int = 1, channels: int = 1, images: int = 120
) -> Built:
    """Tiny ViT on 4 x 4 images with 2 x 2 patches, read at all positions or (``first``) at the class token only."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner, image_size=4, patch_size=2,
        num_channels=channels, layer_norm_eps=eps, qkv_bias=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    model = Hidden(ViTModel(config, add_pooling_layer=False), ("pixel_values",), first)
    draw_transformer_(model, 0.8)
    return model, [(1.5 * torch.randn(images, channels, 4, 4),)]


@case(
    "vit_eps1e-5",
    seed=0,
    params=206,
    nullity=87,
    families={
        "QK GL(d) per head": 8,
        "OV GL(d) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "layernorm_before gain -> readers": 4,
        "layernorm_before bias -> reader biases": 4,
        "layernorm_after gain -> readers": 4,
        "layernorm_after bias -> reader biases": 4,
        "LN hyperplane in q,k,v,fc1": 18,
        "cls token vs its position row": 4,
        "patch conv bias vs patch position rows": 4,
        "stream mean (all writers)": 23,
    },
    cumulative=(8, 16, 20, 24, 28, 32, 36, 40, 58, 62, 66, 87),
    approximate={
        "joint writer scale (eps)": (1, 2.4e-06, 2.6e-06),
    },
    discrete={
        "heads": "S_2",
        "MLP units": "S_6",
        "global stream sign": "Z2",
    },
    controls=("stream permutation",),
    requires=("transformers",),
)
def _vit() -> Built:
    return vit(1e-5)


@case(
    "vit_eps1e-12",
    seed=0,
    params=206,
    nullity=88,
    families={
        "QK GL(d) per head": 8,
        "OV GL(d) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "layernorm_before gain -> readers": 4,
        "layernorm_before bias -> reader biases": 4,
        "layernorm_after gain -> readers": 4,
        "layernorm_after bias -> reader biases": 4,
        "LN hyperplane in q,k,v,fc1": 18,
        "cls token vs its position row": 4,
        "patch conv bias vs patch position rows": 4,
        "stream mean (all writers)": 23,
        "joint writer scale (eps)": 1,
    },
    cumulative=(8, 16, 20, 24, 28, 32, 36, 40, 58, 62, 66, 87, 88),
    discrete={
        "heads": "S_2",
        "MLP units": "S_6",
        "global stream sign": "Z2",
    },
    controls=("stream permutation",),
    requires=("transformers",),
    note="At the default eps 1e-12 the joint writer scale is below any practical cut.",
)
def _vit_default_eps() -> Built:
    return vit(1e-12)


@case(
    "vit_cls_only_eps1e-5",
    seed=0,
    params=206,
    nullity=104,
    families={
        "QK GL(d) per head": 8,
        "OV GL(d) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "layernorm_before gain -> readers": 4,
        "layernorm_before bias -> reader biases": 4,
        "layernorm_after gain -> readers": 4,
        "layernorm_after bias -> reader biases": 4,
        "LN hyperplane in q,k,v,fc1": 18,
        "cls token vs its position row": 4,
        "patch conv bias vs patch position rows": 4,
        "stream mean (all writers)": 23,
        "frozen cls query: W_q vs b_q": 16,
        "frozen cls query: key rows orthogonal to it": 8,
        "patch stream rotation fixing the mean, cls residual absorbed in o bias": 3,
    },
    cumulative=(8, 16, 20, 24, 28, 32, 36, 40, 58, 62, 66, 87, 99, 101, 104),
    approximate={
        "scales (eps)": (3, 8.7e-08, 2.5e-06),
    },
    discrete={
        "heads": "S_2",
        "MLP units": "S_6",
        "global stream sign": "Z2",
    },
    controls=("stream permutation",),
    beyond_structure=5,
    requires=("transformers",),
    note="The read-out decides: at the class token the first query is a constant of the network, 17 more directions.",
)
def _vit_cls_only() -> Built:
    return vit(1e-5, first=True, images=400)


@case(
    "vit_cls_only_eps1e-12",
    seed=0,
    params=206,
    nullity=107,
    families={
        "QK GL(d) per head": 8,
        "OV GL(d) per head": 8,
        "key bias": 4,
        "value bias -> output bias": 4,
        "layernorm_before gain -> readers": 4,
        "layernorm_before bias -> reader biases": 4,
        "layernorm_after gain -> readers": 4,
        "layernorm_after bias -> reader biases": 4,
        "LN hyperplane in q,k,v,fc1": 18,
        "cls token vs its position row": 4,
        "patch conv bias vs patch position rows": 4,
        "stream mean (all writers)": 23,
        "frozen cls query: W_q vs b_q": 16,
        "frozen cls query: key rows orthogonal to it": 8,
        "patch stream rotation fixing the mean, cls residual absorbed in o bias": 3,
        "scales (eps)": 3,
    },
    cumulative=(8, 16, 20, 24, 28, 32, 36, 40, 58, 62, 66, 87, 99, 101, 104, 107),
    discrete={
        "heads": "S_2",
        "MLP units": "S_6",
        "global stream sign": "Z2",
    },
    controls=("stream permutation",),
    beyond_structure=5,
    requires=("transformers",),
    note="The read-out decides: at the class token the first query is a constant of the network, 17 more directions.",
)
def _vit_cls_only_default_eps() -> Built:
    return vit(1e-12, first=True, images=400)


@case(
    "vit_L2",
    seed=0,
    params=628,
    nullity=217,
    slow=True,
    requires=("transformers",),
    note="General-L formula L(2 H d^2 + 10 D + 2 I + 2) + T + C p^2 + 2 D.",
)
def _vit_two_layers() -> Built:
    return vit(1e-5, width=6, heads=3, inner=5, layers=2, channels=2)


@case(
    "vit_cls_only_L2",
    seed=0,
    params=360,
    nullity=157,
    slow=True,
    requires=("transformers",),
    note="With two blocks the class read-out has no extra direction.",
)
def _vit_cls_only_two_layers() -> Built:
    return vit(1e-5, first=True, layers=2, images=400)


def t5(feed_forward: str, heads: int = 2, d_kv: int = 3, layers: int = 1) -> Built:
    """Tiny T5 encoder with relative position buckets; the last hidden state follows the final RMSNorm."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=9, d_model=6, d_kv=d_kv, d_ff=6, num_layers=layers, num_heads=heads, relative_attention_num_buckets=6,
        relative_attention_max_distance=8, dropout_rate=0.0, layer_norm_epsilon=1e-6, feed_forward_proj=feed_forward,
        is_encoder_decoder=False, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    model = Hidden(T5EncoderModel(config))
    draw_transformer_(model, 0.6)
    return model, [(_tokens(120, 6, 9),)]


@case(
    "t5_encoder_relu",
    seed=0,
    params=300,
    nullity=58,
    families={
        "QK GL(d) per head": 18,
        "OV GL(d) per head": 18,
        "relative bias: constant per head": 2,
        "relative bias: bucket never reached (dead)": 2,
        "attention norm gain -> readers": 6,
        "ff norm gain -> readers": 6,
        "ReLU scale per unit": 6,
    },
    cumulative=(18, 36, 38, 40, 46, 52, 58),
    approximate={
        "joint writer scale (eps)": (1, 1.6e-08, 3.7e-08),
    },
    discrete={
        "heads with their bias-table columns": "S_2",
        "feed-forward units": "S_6",
        "sign of a stream channel with that channel of the final gain": "Z2^6",
    },
    requires=("transformers",),
    note='The bucket "later at distance 0" is dead at any length.',
)
def _t5_encoder_relu() -> Built:
    return t5("relu")


@case(
    "t5_encoder_gated_gelu",
    seed=0,
    params=336,
    nullity=58,
    families={
        "QK GL(d) per head": 18,
        "OV GL(d) per head": 18,
        "relative bias: constant per head": 2,
        "relative bias: bucket never reached (dead)": 2,
        "attention norm gain -> readers": 6,
        "ff norm gain -> readers": 6,
        "linear branch wi_1 scale per unit": 6,
    },
    cumulative=(18, 36, 38, 40, 46, 52, 58),
    approximate={
        "joint writer scale (eps)": (1, 3.1e-08, 4.5e-08),
    },
    discrete={
        "heads with their bias-table columns": "S_2",
        "feed-forward units": "S_6",
        "sign of a stream channel with that channel of the final gain": "Z2^6",
    },
    requires=("transformers",),
    note='The bucket "later at distance 0" is dead at any length.',
)
def _t5_encoder_gated_gelu() -> Built:
    return t5("gated-gelu")


@case(
    "t5_encoder_relu_L2",
    seed=0,
    params=534,
    nullity=90,
    slow=True,
    requires=("transformers",),
    note="General-L formula L(2 H d^2 + 2 D + I) + H + H (unreached buckets). The table of layer 0 serves all layers.",
)
def _t5_encoder_relu_two_layers() -> Built:
    return t5("relu", heads=3, d_kv=2, layers=2)
