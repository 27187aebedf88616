"""An Equivariance Toolbox for Learning Dynamics: one identity, and what it says about gradients, Hessians, flat directions and charges.

Slug equivariance-toolbox. Every identity is checked on networks whose moves are written by hand, then on a network in
training, then on symmetries that discovery found by itself. Losses are means over the samples; float64 unless said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

from parasym.core.errors import MissingExtraError
from parasym.core.graph import trace
from parasym.core.guards import rng_state
from parasym.core.samples import flatten as flatten_inputs
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import agreement, curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.measure.identities import (
    Equivariance,
    Residual,
    charge_step,
    discrete_residual,
    dot,
    equivariances,
    finite_noether,
    first_order_residual,
    flatten,
    hvp,
    mirror_force,
    null_basis,
    orbit_residual,
    predicted_curvature,
    second_order_residual,
    sharpness_lower_bound,
    unflatten,
)
from parasym.symmetry.search import search
from parasym.symmetry.symmetry import Params, Symmetry

SLUG = "equivariance-toolbox"
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh, "linear": lambda z: z}


# ------------------------------------------------------------------------------------------------ networks and their moves


@dataclass(frozen=True)
class NetConfig:
    """f = V act(W x) without biases, N(0, 1) weights and data; widths inputs-hidden-outputs; loss mean |f - y|^2 / (2 outputs)."""

    activation: str = "relu"
    inputs: int = 4
    hidden: int = 5
    outputs: int = 3
    samples: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Net:
    """A two-layer network with its data: params W (hidden, inputs), V (outputs, hidden); x (n, inputs), y (n, outputs)."""

    params: dict[str, Tensor]
    x: Tensor
    y: Tensor
    activation: Activation

    def outputs(self, params: Params) -> Tensor:
        """(n, outputs)."""
        return self.activation(self.x @ params["W"].T) @ params["V"].T

    def loss(self, params: Params) -> Tensor:
        """mean |f - y|^2 / 2."""
        return 0.5 * (self.outputs(params) - self.y).square().mean()

    def margins(self, params: Params) -> Tensor:
        """(n,): the first output times the sign of the first target."""
        return self.outputs(params)[:, 0] * self.y[:, 0].sign()


def net(config: NetConfig, seed: int) -> Net:
    """A random network of the config."""
    draws = Ensemble((seed,))
    params = {"W": draws.normal(config.hidden, config.inputs)[0], "V": draws.normal(config.outputs, config.hidden)[0]}
    x, y = draws.normal(config.samples, config.inputs)[0], draws.normal(config.samples, config.outputs)[0]
    return Net(params, x, y, ACTIVATIONS[config.activation])


def rescaling(unit: int, hidden: int) -> Equivariance:
    """w_j -> e^l w_j, v_j -> e^-l v_j; the tangent comes from the action."""
    mark = torch.eye(hidden, dtype=torch.float64)[unit]

    def action(params: Params, step: Tensor) -> dict[str, Tensor]:
        scale = torch.exp(step * mark)
        return {"W": params["W"] * scale[:, None], "V": params["V"] / scale}

    return Equivariance(action, name=f"rescaling of unit {unit}")


def general_linear(generator: Tensor) -> Equivariance:
    """W -> exp(l M) W, V -> V exp(-l M) of a linear network: a generator that is not symmetric, so A and A^T differ."""

    def action(params: Params, step: Tensor) -> dict[str, Tensor]:
        return {"W": torch.linalg.matrix_exp(step * generator) @ params["W"], "V": params["V"] @ torch.linalg.matrix_exp(-step * generator)}

    return Equivariance(action, name="GL")


def homogeneity(degree: float) -> Equivariance:
    """theta -> e^l theta, F -> e^(degree l) F."""
    return Equivariance(
        lambda params, step: {name: torch.exp(step) * value for name, value in params.items()}, output_law=lambda f: degree * f
    )


def output_scaling() -> Equivariance:
    """The affine output law: V -> e^l V, F -> e^l F."""
    return Equivariance(lambda params, step: {"V": torch.exp(step) * params["V"]}, output_law=lambda f: f)


# ------------------------------------------------------------------------------------------------ A1: continuous identities


def continuous(config: NetConfig) -> Part:
    """A1: R1-R3, R5 and R6 on a ReLU network; controls with GELU and with the wrong transpose."""
    nets = [net(config, seed) for seed in config.seeds]
    checks = [
        *_first_order(config, nets),
        *_second_order(config, nets),
        *_composite(nets),
        *_flat_directions(config, nets),
        *_charges(config, nets),
    ]
    return Part(tuple(checks), (_alignment_figure(config, nets),))


def _moves(config: NetConfig) -> list[Equivariance]:
    return [rescaling(unit, config.hidden) for unit in range(config.hidden)]


def _first_order(config: NetConfig, nets: Sequence[Net]) -> list[Check]:
    moves = _moves(config)
    smooth = [net(NetConfig(**{**vars(config), "activation": "gelu"}), seed) for seed in config.seeds]
    broken = [max(first_order_residual(item.loss, item.params, move).value for move in moves) for item in smooth]
    return [
        match(
            "rescaling: g.A theta = 0",
            0.0,
            [_worst([first_order_residual(item.loss, item.params, move) for move in moves]) for item in nets],
            1e-11,
            source=f"{SLUG} A1, R1",
        ),
        match(
            "rescaling: J A theta = 0 for every output",
            0.0,
            [_worst([first_order_residual(item.outputs, item.params, move) for move in moves]) for item in nets],
            1e-11,
            source=f"{SLUG} A1, R1, R5",
        ),
        match(
            "homogeneity of degree 2: J theta = 2 f",
            0.0,
            [first_order_residual(item.outputs, item.params, homogeneity(2.0)).value for item in nets],
            1e-11,
            source=f"{SLUG} A1, R1",
        ),
        match(
            "output law f(l V) = l f: J xi = f",
            0.0,
            [first_order_residual(item.outputs, item.params, output_scaling()).value for item in nets],
            1e-11,
            source=f"{SLUG} A1, R1",
        ),
        match(
            "translation (softmax shift of an output bias): g.b = 0 and H b = 0",
            0.0,
            [_translation(item) for item in nets],
            1e-11,
            source=f"{SLUG} A1, R1, R2",
        ),
        control("GELU network: largest |g.A theta| of the same moves", broken, at_least=0.02, source=f"{SLUG} A1", spread=broken),
    ]


def _translation(item: Net) -> float:
    """Largest of the first- and second-order residuals of a shift of all output biases under the softmax cross-entropy."""
    params = {**item.params, "c": item.y[0]}

    def loss(point: Params) -> Tensor:
        return nn.functional.cross_entropy(item.outputs(point) + point["c"], item.y.argmax(-1))

    shift = Equivariance(lambda point, step: {"c": point["c"] + step})
    return max(first_order_residual(loss, params, shift).value, second_order_residual(loss, params, shift).value)


def _second_order(config: NetConfig, nets: Sequence[Net]) -> list[Check]:
    linear = [net(NetConfig(**{**vars(config), "activation": "linear"}), seed) for seed in config.seeds]
    mixers = [Ensemble((seed + 1000,)).normal(config.hidden, config.hidden)[0] for seed in config.seeds]
    scalar = [_summed(item) for item in nets]
    return [
        match(
            "rescaling: H A theta = -A^T g",
            0.0,
            [_worst([second_order_residual(item.loss, item.params, move) for move in _moves(config)]) for item in nets],
            1e-11,
            source=f"{SLUG} A1, R2",
        ),
        match(
            "GL of a linear network, A not symmetric: H A theta = -A^T g",
            0.0,
            [
                second_order_residual(item.loss, item.params, general_linear(mixer)).value
                for item, mixer in zip(linear, mixers, strict=True)
            ],
            1e-11,
            source=f"{SLUG} A1, R2",
        ),
        match(
            "homogeneity: H theta = (p - 1) g for an output",
            0.0,
            [second_order_residual(f, item.params, homogeneity(2.0)).value for f, item in zip(scalar, nets, strict=True)],
            1e-11,
            source=f"{SLUG} A1, R2",
        ),
        match(
            "homogeneity: theta.H theta = p (p - 1) f",
            [2.0 * f(item.params) for f, item in zip(scalar, nets, strict=True)],
            [dot(item.params, hvp(f, item.params, item.params)) for f, item in zip(scalar, nets, strict=True)],
            1e-11,
            source=f"{SLUG} A1, R2",
        ),
        match(
            "two commuting generators: (A theta).H (B theta) = -g.B A theta",
            0.0,
            [_pairs(config, item) for item in nets],
            1e-11,
            source=f"{SLUG} A1, R2",
        ),
        control(
            "the wrong transpose: |H A theta + A g| of the GL generator",
            [_untransposed(item, m) for item, m in zip(linear, mixers, strict=True)],
            at_least=0.1,
            source=f"{SLUG} pitfalls",
        ),
    ]


def _summed(item: Net) -> Callable[[Params], Tensor]:
    return lambda params: (item.outputs(params) * item.y).sum()


def _pairs(config: NetConfig, item: Net) -> float:
    """Largest violation over all pairs of rescalings; B A theta is the tangent of B, which is linear, at A theta."""
    tangents = [move.xi(item.params) for move in _moves(config)]
    force = grad(item.loss)(item.params)
    gaps = []
    for first in tangents:
        curved = hvp(item.loss, item.params, first)
        for move, second in zip(_moves(config), tangents, strict=True):
            twice = move.xi(first)
            gaps.append(float((dot(second, curved) + dot(force, twice)).abs()))
    return max(gaps)


def _untransposed(item: Net, mixer: Tensor) -> float:
    force = grad(item.loss)(item.params)
    left = hvp(item.loss, item.params, general_linear(mixer).xi(item.params))
    wrong = general_linear(mixer).xi(force)
    return float(flatten({name: left[name] + wrong[name] for name in left}, item.params).norm())


def _composite(nets: Sequence[Net]) -> list[Check]:
    rows = [_composite_numbers(item) for item in nets]
    return [
        match(
            "composite loss: theta.g = p <l' f>",
            [row["slope"][0] for row in rows],
            [row["slope"][1] for row in rows],
            1e-11,
            source=f"{SLUG} A1, R3",
        ),
        match(
            "composite loss: |H theta - (p - 1) g - p J^T(l'' f) / n|", 0.0, [row["curve"] for row in rows], 1e-11, source=f"{SLUG} A1, R3"
        ),
        match(
            "exponential loss of margins: theta.g = -p <q e^-q>",
            [row["margin"][0] for row in rows],
            [row["margin"][1] for row in rows],
            1e-11,
            source=f"{SLUG} A1, R3",
        ),
        match(
            "exponential loss: |H theta - <e^-q (p q - (p - 1)) grad q>|",
            0.0,
            [row["margin_curve"] for row in rows],
            1e-11,
            source=f"{SLUG} A1, R3",
        ),
        match("one margin q: H theta = -(p q - p + 1) g", 0.0, [row["single"] for row in rows], 1e-11, source=f"{SLUG} R3"),
        match(
            "flow: d|theta|^2/dt = 2 p <q e^-q>",
            [row["growth"][0] for row in rows],
            [row["growth"][1] for row in rows],
            1e-11,
            source=f"{SLUG} R3",
        ),
    ]


def _composite_numbers(item: Net) -> dict[str, Any]:
    params, degree = {name: 0.5 * value for name, value in item.params.items()}, 2.0
    f, q, count = item.outputs(params), item.margins(params), item.y.numel()
    force, curved = grad(item.loss)(params), hvp(item.loss, params, params)
    (pulled,) = torch.func.vjp(item.outputs, params)[1](f / count)
    squared = {name: curved[name] - (degree - 1) * force[name] - degree * pulled[name] for name in params}

    def exponential(point: Params) -> Tensor:
        return torch.exp(-item.margins(point)).mean()

    slope, bent = grad(exponential)(params), hvp(exponential, params, params)
    (weighted,) = torch.func.vjp(item.margins, params)[1](torch.exp(-q) * (degree * q - (degree - 1)) / len(q))

    def single(point: Params) -> Tensor:
        return torch.exp(-item.margins(point)[0])

    alone, gain = grad(single)(params), degree * q[0] - degree + 1
    lone = {name: value + gain * alone[name] for name, value in hvp(single, params, params).items()}
    mean = -degree * (q * torch.exp(-q)).mean()
    step = 1e-2
    moved = {name: params[name] - step * slope[name] for name in params}
    growth = (dot(moved, moved) - dot(params, params) - step**2 * dot(slope, slope)) / step
    return {
        "slope": (degree * ((f - item.y) * f).mean(), dot(params, force)),
        "curve": flatten(squared, params).norm(),
        "margin": (mean, dot(params, slope)),
        "margin_curve": flatten({name: bent[name] - weighted[name] for name in params}, params).norm(),
        "single": flatten(lone, params).norm(),
        "growth": (-2 * mean, growth),
    }


def _flat_directions(config: NetConfig, nets: Sequence[Net]) -> list[Check]:
    rows = [_null_numbers(config, item) for item in nets]
    size = sum(value.numel() for value in nets[0].params.values())
    return [
        match(
            "rank of the Jacobian = N - dim of the orbit - what these samples do not see",
            [size - row["orbit"] - row["unseen"] for row in rows],
            [row["rank"] for row in rows],
            0.0,
            source=f"{SLUG} A1, R5",
        ),
        match(
            "the orbit's tangents are null for the Jacobian, so for the Gauss-Newton matrix",
            0.0,
            [row["null"] for row in rows],
            1e-11,
            source=f"{SLUG} A1, R5",
        ),
        match(
            "covariance of the per-sample gradients: C A theta = 0",
            0.0,
            [row["covariance"] for row in rows],
            1e-11,
            source=f"{SLUG} A1, R5",
        ),
        match(
            "at a stationary point H A theta = 0, one flat direction for each generator (teacher's own weights)",
            0.0,
            [row["stationary"] for row in rows],
            1e-11,
            source=f"{SLUG} A1, R5",
        ),
        control("away from it the Hessian is not flat: |H A theta|", [row["bent"] for row in rows], at_least=1e-2, source=f"{SLUG} R5"),
    ]


def _null_numbers(config: NetConfig, item: Net) -> dict[str, float]:
    basis = null_basis(item.params, _moves(config))
    jacobian = torch.cat([block.flatten(0, 1).flatten(1) for block in jacrev(item.outputs)(item.params).values()], dim=1)

    def sample_loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return Net(item.params, x[None], y[None], item.activation).loss(unflatten(vector, item.params))

    slopes = vmap(grad(sample_loss), (None, 0, 0))(flatten(item.params, item.params), item.x, item.y)
    covariance = (slopes - slopes.mean(0)).T @ (slopes - slopes.mean(0)) / len(slopes)
    taught = Net(item.params, item.x, item.outputs(item.params).detach(), item.activation)
    return {
        "orbit": float(basis.shape[1]),
        "unseen": _unseen(config, item),
        "null": float((jacobian @ basis).abs().max()),
        "rank": float(torch.linalg.matrix_rank(jacobian)),
        "covariance": float((covariance @ basis).abs().max()),
        "stationary": _curvature_along(config, taught),
        "bent": _curvature_along(config, item),
    }


def _unseen(config: NetConfig, item: Net) -> float:
    """Null directions of a ReLU network at these weights and samples only.

    A unit active on a < inputs samples loses inputs - a, a dead one all but its orbit; m units that switch together on every
    sample form a linear layer, whose GL(m) has m (m - 1) directions besides the rescalings.
    """
    if config.activation != "relu":
        return 0.0
    pattern = item.x @ item.params["W"].T > 0
    active = pattern.sum(0)
    few = torch.where(active > 0, (config.inputs - active).clamp_min(0), config.inputs + config.outputs - 1).sum()
    together = torch.unique(pattern[:, active > 0], dim=1, return_counts=True)[1]
    return float(few + (together * (together - 1)).sum())


def _curvature_along(config: NetConfig, item: Net) -> float:
    return max(float(flatten(hvp(item.loss, item.params, move.xi(item.params)), item.params).norm()) for move in _moves(config))


def _charges(config: NetConfig, nets: Sequence[Net]) -> list[Check]:
    eta, decay, moves = 0.05, 0.01, _moves(config)
    steps = [charge_step(item.loss, item.params, move.xi, eta) for item in nets for move in moves]
    decayed = [charge_step(item.loss, item.params, move.xi, eta, decay) for item in nets for move in moves]
    return [
        match(
            "charge Q = theta.A theta / 2 over one gradient step: dQ = (eta^2 / 2) g.A g",
            [step[1] for step in steps],
            [step[0] for step in steps],
            1e-11,
            source=f"{SLUG} R6",
        ),
        match(
            "with decay: dQ = ((1 - 2 eta gamma)^2 - 1) Q + (eta^2 / 2) g.A g",
            [step[1] for step in decayed],
            [step[0] for step in decayed],
            1e-11,
            source=f"{SLUG} R6",
        ),
        control(
            "homogeneity is no symmetry of the loss: |dQ - (eta^2 / 2) g.g|",
            [_false_charge(item, eta) for item in nets],
            at_least=1e-3,
            source=f"{SLUG} R6",
        ),
    ]


def _false_charge(item: Net, eta: float) -> float:
    measured, predicted = charge_step(item.loss, item.params, lambda params: params, eta)
    return abs(float(measured - predicted))


def _alignment_figure(config: NetConfig, nets: Sequence[Net]) -> Figure:
    series = []
    for seed, item in zip(config.seeds, nets, strict=True):
        move = _moves(config)[0]
        left, right = hvp(item.loss, item.params, move.xi(item.params)), predicted_curvature(item.loss, item.params, move)
        series.append(
            {"name": f"seed {seed}", "predicted": plain(flatten(right, item.params)), "measured": plain(flatten(left, item.params))}
        )
    return Figure(
        "Curvature along a rescaling, from the gradient alone",
        {"series": series, "x": "-A^T g", "y": "H A theta"},
        agreement,
        "Every entry of the vector, ReLU network.",
    )


def _worst(residuals: Sequence[Residual]) -> float:
    return max(residual.value for residual in residuals)


# ------------------------------------------------------------------------------------------------ A2: discrete identities


@dataclass(frozen=True)
class DiscreteConfig:
    """The network of `NetConfig` with tanh, N(0, 1) weights; Gauss-Legendre quadrature with ``nodes`` points."""

    net: NetConfig = NetConfig(activation="tanh")
    nodes: int = 40


def swap(first: int, second: int) -> Callable[[Params], dict[str, Tensor]]:
    """Exchange two units."""

    def move(params: Params) -> dict[str, Tensor]:
        order = torch.arange(params["W"].shape[0])
        order[[first, second]] = order[[second, first]]
        return {"W": params["W"][order], "V": params["V"][:, order]}

    return move


def flip(unit: int) -> Callable[[Params], dict[str, Tensor]]:
    """Change the sign of all weights of a unit, in and out."""

    def move(params: Params) -> dict[str, Tensor]:
        sign = torch.ones(params["W"].shape[0], dtype=params["W"].dtype)
        sign[unit] = -1
        return {"W": params["W"] * sign[:, None], "V": params["V"] * sign}

    return move


def negate_readout(params: Params) -> dict[str, Tensor]:
    """V -> -V: the output changes sign."""
    return {"V": -params["V"]}


def discrete(config: DiscreteConfig) -> Part:
    """A2: gradients and Hessians under exchanges and sign flips, at the mirror and away from it; odd outputs."""
    nets = [net(config.net, seed) for seed in config.net.seeds]
    moves = {"exchange of two units": swap(0, 1), "sign of a unit": flip(2)}
    checks: list[Check] = []
    for name, move in moves.items():
        found = [discrete_residual(item.loss, item.params, move) for item in nets]
        checks += [
            match(f"{name}: G^T g(G theta) = g(theta)", 0.0, [item.gradient.value for item in found], 1e-12, source=f"{SLUG} A2, R7"),
            match(
                f"{name}: G^T H(G theta) G = H(theta), on a random vector",
                0.0,
                [item.hessian.value for item in found],
                1e-12,
                source=f"{SLUG} A2, R7",
            ),
            match(
                f"{name}, on its fixed set: gradient fixed and Hessian commuting",
                0.0,
                [_fixed(item, move) for item in nets],
                1e-12,
                source=f"{SLUG} A2, R7",
            ),
        ]
    odd = [discrete_residual(_summed(item), item.params, negate_readout, sign=-1.0) for item in nets]
    checks += [
        match(
            "V -> -V: f, its gradient and its Hessian change sign",
            0.0,
            [max(item.function.value, item.gradient.value, item.hessian.value) for item in odd],
            1e-11,
            source=f"{SLUG} R9",
        ),
        match(
            "V -> -V on a data set closed under y -> -y: the loss is unchanged, with gradient and Hessian",
            0.0,
            [_paired(item) for item in nets],
            1e-12,
            source=f"{SLUG} R9",
        ),
        *_mean_value(config, nets),
    ]
    smooth = [net(NetConfig(**{**vars(config.net), "activation": "gelu"}), seed) for seed in config.net.seeds]
    wrong = [discrete_residual(item.loss, item.params, flip(2)).gradient.value for item in smooth]
    checks.append(control("the sign of a GELU unit is no symmetry: |G^T g(G theta) - g(theta)|", wrong, at_least=1e-2, source=f"{SLUG} A2"))
    return Part(tuple(checks), (_force_figure(config, nets),))


def _fixed(item: Net, move: Callable[[Params], dict[str, Tensor]]) -> float:
    params = {name: 0.5 * (value + move(item.params)[name]) for name, value in item.params.items()}
    found = discrete_residual(item.loss, params, move)
    force, probe = grad(item.loss)(params), Ensemble((7,)).normal(sum(value.numel() for value in params.values()))[0]
    vector = unflatten(probe, params)
    one, other = move(hvp(item.loss, params, vector)), hvp(item.loss, params, move(vector))
    gaps = [
        flatten({name: move(force)[name] - force[name] for name in force}, params),
        flatten({n: one[n] - other[n] for n in one}, params),
    ]
    return max(found.gradient.value, *(float(gap.abs().max()) for gap in gaps))


def _paired(item: Net) -> float:
    both = Net(item.params, torch.cat([item.x, item.x]), torch.cat([item.y, -item.y]), item.activation)
    found = discrete_residual(both.loss, both.params, negate_readout)
    return max(found.function.value, found.gradient.value, found.hessian.value)


def _mirror_basis(item: Net, unit: int) -> list[dict[str, Tensor]]:
    """Orthonormal directions of the sign mirror of a unit: each of its in and out weights."""
    basis = []
    for name, index in [("W", (unit, i)) for i in range(item.params["W"].shape[1])] + [
        ("V", (i, unit)) for i in range(item.params["V"].shape[0])
    ]:
        direction = torch.zeros_like(item.params[name])
        direction[index] = 1
        basis.append({name: direction})
    return basis


def _mean_value(config: DiscreteConfig, nets: Sequence[Net]) -> list[Check]:
    mirrors = [mirror_force(item.loss, item.params, _mirror_basis(item, 2), config.nodes) for item in nets]
    pairs = [finite_noether(item.loss, item.params, swap(0, 1), config.nodes) for item in nets]
    return [
        match(
            "mirror form: O^T g = averaged Hessian x distance to the mirror",
            [pair[1] for pair in mirrors],
            [pair[0] for pair in mirrors],
            1e-10,
            source=f"{SLUG} A2, R8",
        ),
        match(
            "pair form: g_i - g_j = averaged (H_ii - H_ij) (theta_i - theta_j)",
            [flatten(pair[1], nets[0].params) for pair in pairs],
            [flatten(pair[0], nets[0].params) for pair in pairs],
            1e-10,
            source=f"{SLUG} A2, R8",
        ),
        control(
            "the Hessian at the point instead of the average: largest |O^T g - O^T H O c|",
            [_unaveraged(item) for item in nets],
            at_least=1e-3,
            source=f"{SLUG} R8",
        ),
    ]


def _unaveraged(item: Net) -> float:
    basis = _mirror_basis(item, 2)
    columns = torch.stack([flatten(column, item.params) for column in basis], dim=1)
    theta, force = flatten(item.params, item.params), flatten(grad(item.loss)(item.params), item.params)
    curved = flatten(hvp(item.loss, item.params, unflatten(columns @ (columns.T @ theta), item.params)), item.params)
    return float((columns.T @ (force - curved)).abs().max())


def _force_figure(config: DiscreteConfig, nets: Sequence[Net]) -> Figure:
    series = []
    for seed, item in zip(config.net.seeds, nets, strict=True):
        measured, predicted = mirror_force(item.loss, item.params, _mirror_basis(item, 2), config.nodes)
        series.append({"name": f"seed {seed}", "predicted": plain(predicted), "measured": plain(measured)})
    return Figure("The force towards a mirror", {"series": series, "x": "averaged Hessian x distance", "y": "O^T g"}, agreement)


# ------------------------------------------------------------------------------------------------ A3: curvature bounds


@dataclass(frozen=True)
class CurvatureConfig:
    """Bounds on ||H||_2 at ``points`` random weights of the ReLU network, N(0, scale^2); the hand case L = (u v - 1)^2 / 2 at (u, 0)."""

    net: NetConfig = NetConfig(seeds=(0,))
    points: int = 100
    scale: float = 1.0
    hand: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 5.0)
    seeds: tuple[int, ...] = (0, 1, 2)


def curvature(config: CurvatureConfig) -> Part:
    """A3: gradients bound the sharpness from below, at every point, and scale invariance makes the Hessian indefinite."""
    item = net(config.net, config.net.seeds[0])
    thetas = config.scale * Ensemble(config.seeds).normal(config.points, sum(value.numel() for value in item.params.values())).flatten(0, 1)
    bounds, norms = _bounds(config, item, thetas)
    scale = _scale_invariant(thetas[: config.points])
    hand = [_hand_case(value) for value in config.hand]
    checks = (
        holds(
            "||H||_2 - max |A^T g| / |A theta| over the rescalings, smallest of all points",
            (norms - bounds).min(),
            at_least=0.0,
            source=f"{SLUG} A3, R4",
        ),
        match("hand case (u v - 1)^2 / 2 at (u, 0): the bound", 1.0, [row[0] for row in hand], 1e-12, source=f"{SLUG} A3"),
        holds("hand case: ||H||_2", [row[1] for row in hand], at_least=1.0, source=f"{SLUG} A3"),
        match("hand case: ||H||_2 of [[0, -1], [-1, u^2]]", [row[2] for row in hand], [row[1] for row in hand], 1e-11, source=f"{SLUG} A3"),
        match("scale-invariant loss: g.theta, H theta + g and theta.H theta vanish", 0.0, scale["identities"], 1e-11, source=f"{SLUG} R4"),
        holds("scale-invariant loss: ||H||_2 - |g| / |theta|", scale["gap"], at_least=0.0, source=f"{SLUG} R4"),
        holds("scale-invariant loss: (h - sqrt(h^2 + 4 k^2)) / 2 - lambda_min", scale["indefinite"], at_least=-1e-11, source=f"{SLUG} R4"),
        holds("scale-invariant loss: lambda_min is negative", scale["lowest"], at_most=0.0, source=f"{SLUG} R4"),
        control("not scale invariant (no normalisation): largest |H theta + g|", scale["broken"], at_least=0.1, source=f"{SLUG} R4"),
    )
    order = bounds.argsort()
    series = [
        {"name": "points", "x": plain(bounds[order]), "y": plain(norms[order]), "mark": "points"},
        {"name": "bound", "x": plain(bounds[order]), "y": plain(bounds[order])},
    ]
    figure = Figure(
        "Sharpness above its bound",
        {"series": series, "x": "max |A^T g| / |A theta|", "y": "largest |eigenvalue| of H", "log": "xy"},
        curves,
    )
    return Part(checks, (figure,))


def _bounds(config: CurvatureConfig, item: Net, thetas: Tensor) -> tuple[Tensor, Tensor]:
    moves = _moves(config.net)

    def loss(vector: Tensor) -> Tensor:
        return item.loss(unflatten(vector, item.params))

    bounds = vmap(lambda vector: sharpness_lower_bound(item.loss, unflatten(vector, item.params), moves))(thetas)
    return bounds, torch.linalg.eigvalsh(vmap(hessian(loss))(thetas)).abs().amax(-1)


def _hand_case(u: float) -> tuple[float, float, float]:
    params = {"u": torch.tensor(u, dtype=torch.float64), "v": torch.zeros((), dtype=torch.float64)}
    scale = Equivariance(lambda point, step: {"u": torch.exp(step) * point["u"], "v": torch.exp(-step) * point["v"]})

    def loss(point: Params) -> Tensor:
        return 0.5 * (point["u"] * point["v"] - 1).square()

    matrix = hessian(lambda vector: loss({"u": vector[0], "v": vector[1]}))(torch.tensor([u, 0.0], dtype=torch.float64))
    closed = 0.5 * (u**2 + (u**4 + 4) ** 0.5)
    return float(sharpness_lower_bound(loss, params, [scale])), float(torch.linalg.eigvalsh(matrix).abs().max()), closed


def _scale_invariant(thetas: Tensor) -> dict[str, Tensor]:
    """L(theta) = mean of a fixed function of theta / |theta|; identities, bounds and the loss without the normalisation."""
    probe = Ensemble((11,)).normal(6, thetas.shape[1])[0]

    def bare(theta: Tensor) -> Tensor:
        return torch.tanh(probe @ theta).square().mean() + (probe[0] @ theta) * (probe[1] @ theta)

    def loss(theta: Tensor) -> Tensor:
        return bare(theta / theta.norm())

    slope, matrix = vmap(grad(loss))(thetas), vmap(hessian(loss))(thetas)
    along = (matrix @ thetas[..., None])[..., 0]
    values, size = torch.linalg.eigvalsh(matrix), slope.norm(dim=-1)
    k, h = size / thetas.norm(dim=-1), torch.einsum("ni,nij,nj->n", slope, matrix, slope) / size.square()
    gaps = torch.stack([(slope * thetas).sum(-1).abs().max(), (along + slope).abs().max(), (along * thetas).sum(-1).abs().max()])
    wrong = (vmap(hessian(bare))(thetas) @ thetas[..., None])[..., 0] + vmap(grad(bare))(thetas)
    return {
        "identities": gaps,
        "gap": (values.abs().amax(-1) - k).min(),
        "indefinite": (0.5 * (h - (h.square() + 4 * k.square()).sqrt()) - values[:, 0]).min(),
        "lowest": values[:, 0].max(),
        "broken": wrong.abs().max(),
    }


# ------------------------------------------------------------------------------------------------ R10: at a kink


@dataclass(frozen=True)
class KinkConfig:
    """The ReLU network with a unit turned so that one sample sits exactly on its kink; one-sided slopes by steps of ``step``."""

    net: NetConfig = NetConfig()
    step: float = 1e-6


def kink(config: KinkConfig) -> Part:
    """R10: on a kink there is no gradient, but along the orbit the function is still constant and the finite laws hold."""
    rows = [_kink_numbers(config, seed) for seed in config.net.seeds]
    checks = (
        match("at a kink: outputs along the orbit of a finite rescaling", 0.0, [row["orbit"] for row in rows], 1e-11, source=f"{SLUG} R10"),
        match("at a kink: f(l theta) = l^2 f(theta) for finite l", 0.0, [row["scaled"] for row in rows], 1e-11, source=f"{SLUG} R10"),
        control(
            "at a kink: left and right slope across it differ, so there is no gradient",
            [row["jump"] for row in rows],
            at_least=1e-2,
            source=f"{SLUG} R10",
        ),
        match("at a kink: left and right slope along the orbit agree", 0.0, [row["smooth"] for row in rows], 1e-8, source=f"{SLUG} R10"),
    )
    return Part(checks)


def _kink_numbers(config: KinkConfig, seed: int) -> dict[str, float]:
    item = net(config.net, seed)
    weight = item.params["W"].clone()
    weight[0, 0] = 0.0
    x = item.x.clone()
    x[0] = 0.0
    x[0, 0] = 1.0
    placed = Net({"W": weight, "V": item.params["V"]}, x, item.y, item.activation)
    move, big = rescaling(0, config.net.hidden).action, torch.tensor(1.3, dtype=torch.float64)
    assert move is not None
    across = {"W": torch.zeros_like(weight)}
    across["W"][0, 0] = 1.0
    jump = _one_sided(placed, lambda s: {**placed.params, "W": placed.params["W"] + s * across["W"]}, config.step)
    smooth = _one_sided(placed, lambda s: dict(move(placed.params, torch.tensor(s, dtype=torch.float64))), config.step)
    base = placed.outputs(placed.params)
    scaled = placed.outputs({name: big * value for name, value in placed.params.items()})
    return {
        "orbit": float((placed.outputs(dict(move(placed.params, big))) - base).abs().max()),
        "scaled": float((scaled - big**2 * base).abs().max()),
        "jump": jump,
        "smooth": smooth,
    }


def _one_sided(item: Net, path: Callable[[float], dict[str, Tensor]], step: float) -> float:
    ahead, here, behind = (item.outputs(path(s))[0] for s in (step, 0.0, -step))
    return float(((ahead - here) - (here - behind)).abs().max()) / step


# ------------------------------------------------------------------------------------------------ full scale: a network in training


@dataclass(frozen=True)
class TrainingConfig:
    """A small convolutional network with BatchNorm after every convolution, float32, full-batch SGD on random images and labels.

    The loss is the train-mode batch loss (BatchNorm couples the samples); ``eps`` of BatchNorm makes the scale invariance of
    the convolutions approximate. Cross-entropy, mean over the batch, no decay.
    """

    channels: tuple[int, ...] = (8, 8)
    images: int = 32
    size: int = 8
    classes: int = 4
    eps: float = 1e-6
    eta: float = 0.1
    steps: int = 20
    every: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)


def convolutional(config: TrainingConfig, seed: int) -> nn.Module:
    """conv-BatchNorm-GELU blocks, mean pooling, a linear head; float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        width = 1
        for channels in config.channels:
            layers += [
                nn.Conv2d(width, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels, eps=config.eps, track_running_stats=False),
                nn.GELU(),
            ]
            width = channels
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, config.classes)).train()


def filter_scaling(name: str) -> Equivariance:
    """W -> e^l W for the whole convolution ``name``."""
    return Equivariance(lambda params, step: {name: torch.exp(step) * params[name]}, name=f"scale of {name}")


def training(config: TrainingConfig) -> Part:
    """Full scale in small: H theta = -g block by block along training, in float32 with Hessian-vector products."""
    rows = [_train(config, seed) for seed in config.seeds]
    first, second, aligned = (torch.tensor([[row[i] for row in run] for run in rows]) for i in (1, 2, 3))
    plain_net = [_without_norm(config, seed) for seed in config.seeds]
    checks = (
        holds(
            "float32, BatchNorm network: relative residual of g.A theta = 0 over training", first, at_most=1e-3, source=f"{SLUG} full scale"
        ),
        holds(
            "float32, BatchNorm network: relative residual of H A theta = -A^T g over training",
            second,
            at_most=1e-3,
            source=f"{SLUG} full scale",
        ),
        holds(
            "gradient-Hessian alignment cos(H theta_block, -g_block) over training",
            aligned,
            at_least=0.999,
            source=f"{SLUG} full scale, R4",
        ),
        control("without normalisation: relative residual of H A theta = -A^T g", plain_net, at_least=0.05, source=f"{SLUG} full scale"),
    )
    x = [row[0] for row in rows[0]]
    series = [
        {"name": f"seed {seed}", "x": x, "y": [max(row[2], 1e-12) for row in run]} for seed, run in zip(config.seeds, rows, strict=True)
    ]
    return Part(
        checks,
        (Figure("Second-order identity along training", {"series": series, "x": "step", "y": "relative residual", "log": "y"}, curves),),
    )


def _loss_of(model: nn.Module, config: TrainingConfig, seed: int) -> Callable[[Params], Tensor]:
    draws = Ensemble((seed + 1000,))
    x = draws.normal(config.images, 1, config.size, config.size, dtype=torch.float32)[0]
    labels = draws.integers(config.classes, config.images)[0]
    return lambda params: nn.functional.cross_entropy(functional_call(model, dict(params), (x,)), labels)


def _train(config: TrainingConfig, seed: int) -> list[tuple[int, float, float, float]]:
    """(step, worst first-order, worst second-order relative residual, worst alignment) over the convolutions."""
    model = convolutional(config, seed)
    loss = _loss_of(model, config, seed)
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    moves = [filter_scaling(name) for name, value in params.items() if value.ndim == 4]
    rows = []
    for step in range(config.steps + 1):
        if step % config.every == 0:
            once = [first_order_residual(loss, params, move).relative for move in moves]
            twice = [second_order_residual(loss, params, move) for move in moves]
            rows.append((step, max(once), max(item.relative for item in twice), min(item.alignment for item in twice)))
        slope = grad(loss)(params)
        params = {name: value - config.eta * slope[name] for name, value in params.items()}
    return rows


def _without_norm(config: TrainingConfig, seed: int) -> float:
    model = nn.Sequential(
        *(nn.Identity() if isinstance(layer, nn.BatchNorm2d) else layer for layer in convolutional(config, seed).children())
    )
    params = {name: 5 * value.detach().clone() if value.ndim == 4 else value.detach().clone() for name, value in model.named_parameters()}
    moves = [filter_scaling(name) for name, value in params.items() if value.ndim == 4]
    return max(second_order_residual(_loss_of(model, config, seed), params, move).relative for move in moves)


# ------------------------------------------------------------------------------------------------ symmetries that discovery found


@dataclass(frozen=True)
class DiscoveredConfig:
    """Symmetries of whole networks, found by the library and not written here; loss mean |f - y|^2 / 2 on random data, float64.

    ``networks``: names of `NETWORKS`; ``generators``: how many of each symmetry's generators are tried, evenly spread;
    ``step``: spacing of the finite moves along an orbit, in the symmetry's own coordinate.
    """

    networks: tuple[str, ...] = ("convolutional", "transformer")
    generators: int = 3
    step: float = 5e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def _small_convolutional() -> tuple[nn.Module, Tensor]:
    """conv-ReLU-conv-ReLU-pool-linear with biases, and a batch of 6 images of 6 x 6."""
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers), torch.randn(6, 1, 6, 6)


def _small_transformer() -> tuple[nn.Module, Tensor]:
    """GPT-2 of one layer from its Hugging Face config: width 4, 2 heads, 7 tokens, untied head; and 4 texts of 5 tokens."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise MissingExtraError("this network comes from transformers: pip install 'parasym[transformers]'") from error
    config = GPT2Config(
        vocab_size=7,
        n_positions=5,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=8,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config), torch.randint(7, (4, 5))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"convolutional": _small_convolutional, "transformer": _small_transformer}


def network(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A network of `NETWORKS` with every parameter drawn anew, biases and gains too, float64 and in eval mode; and its input."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = NETWORKS[name]()
        model = model.double().eval()
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(0.5 * torch.randn(value.shape, dtype=value.dtype) + (1.0 if bool((value == 1).all()) else 0.0))
    return model, x.double() if x.is_floating_point() else x


def _network_loss(model: nn.Module, x: Tensor, seed: int) -> Callable[[Params], Tensor]:
    def outputs(params: Params) -> Tensor:
        out = functional_call(model, dict(params), (x,))
        return out if isinstance(out, Tensor) else out.logits

    with torch.no_grad():
        shape = outputs(dict(model.named_parameters())).shape
    y = Ensemble((seed + 1000,)).normal(*shape)[0]
    return lambda params: 0.5 * (outputs(params) - y).square().mean()


def find_symmetries(model: nn.Module, x: Tensor, seed: int) -> list[Symmetry]:
    """The continuous symmetries discovery certifies at these weights."""
    with rng_state():
        graph = trace(model, (x,))
        return [
            symmetry
            for symmetry in search(graph, [flatten_inputs(graph, (x,))], torch.Generator().manual_seed(seed)).symmetries
            if symmetry.dim
        ]


def of_symmetries(
    found: Sequence[Symmetry], loss: Callable[[Params], Tensor], params: Params, config: DiscoveredConfig
) -> list[tuple[float, float]]:
    """Relative residuals of g.xi = 0 and of xi.H xi = -g.K''(0), for the tried generators of every continuous symmetry."""
    rows = []
    for symmetry in found:
        for item in equivariances(symmetry, params, config.generators):
            assert item.action is not None
            rows.append(
                (first_order_residual(loss, params, item).relative, orbit_residual(loss, params, item.action, step=config.step).relative)
            )
    return rows


def discovered(config: DiscoveredConfig) -> Part:
    """R1, R2 on the symmetries discovery finds by itself in a convolutional network and in a transformer."""
    checks: list[Check] = []
    for name in config.networks:
        rows, counts, random = [], [], []
        for seed in config.seeds:
            model, x = network(name, seed)
            loss, params = _network_loss(model, x, seed), {key: value.detach() for key, value in model.named_parameters()}
            found = find_symmetries(model, x, seed)
            tried = of_symmetries(found, loss, params, config)
            rows.append(tuple(max(row[order] for row in tried) for order in (0, 1)))
            counts.append(len(found))
            random.append(_random_direction(loss, params, seed))
        checks += [
            holds(f"{name}: continuous symmetries found", counts, at_least=1, source=f"{SLUG} audit"),
            match(f"{name}, every symmetry found: g.xi = 0 (relative)", 0.0, [row[0] for row in rows], 1e-10, source=f"{SLUG} R1"),
            match(
                f"{name}, every symmetry found: xi.H xi = -g.K''(0) on its orbit (relative)",
                0.0,
                [row[1] for row in rows],
                1e-6,
                source=f"{SLUG} R2",
            ),
            control(f"{name}, a random direction: |g.xi| / |g| |xi|", random, at_least=1e-4, source=f"{SLUG} R1"),
        ]
    return Part(tuple(checks))


def _random_direction(loss: Callable[[Params], Tensor], params: Params, seed: int) -> float:
    vector = unflatten(Ensemble((seed + 2000,)).normal(sum(value.numel() for value in params.values()))[0], params)
    return first_order_residual(loss, params, Equivariance(tangent=lambda _: vector)).relative


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    continuous: NetConfig | None = NetConfig()
    discrete: DiscreteConfig | None = DiscreteConfig()
    curvature: CurvatureConfig | None = CurvatureConfig()
    kink: KinkConfig | None = KinkConfig()
    training: TrainingConfig | None = TrainingConfig()
    discovered: DiscoveredConfig | None = DiscoveredConfig()


ENTRY = Entry(
    slug=SLUG,
    title="An Equivariance Toolbox for Learning Dynamics",
    paper="Yongyi Yang, Liu Ziyin, 2025, arXiv 2512.21447",
    claims=(
        "An equivariance gives one identity for the gradient and one for the Hessian; both hold to rounding.",
        "Gradients alone bound the sharpness and predict the curvature along every symmetry.",
        "A discrete symmetry gives a force towards its mirror: an averaged Hessian times the distance.",
    ),
    presets={
        "smoke": Config(discovered=DiscoveredConfig(networks=("convolutional",), seeds=(0,))),
        "default": Config(
            continuous=NetConfig(seeds=tuple(range(6))),
            curvature=CurvatureConfig(seeds=tuple(range(5))),
            training=TrainingConfig(channels=(8, 16, 16), steps=60),
            discovered=DiscoveredConfig(seeds=(0,)),
        ),
        "full": Config(
            continuous=NetConfig(seeds=tuple(range(20))),
            discrete=DiscreteConfig(net=NetConfig(activation="tanh", seeds=tuple(range(10))), nodes=80),
            curvature=CurvatureConfig(points=1000),
            training=TrainingConfig(channels=(32, 64, 64), images=64, size=16, classes=10, steps=60, every=20),
        ),
    },
    experiments={
        "continuous": continuous,
        "discrete": discrete,
        "curvature": curvature,
        "kink": kink,
        "training": training,
        "discovered": discovered,
    },
)
