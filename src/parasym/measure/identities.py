"""Gradient, Hessian and finite identities that any equivariance forces on a function of the parameters.

A model that transforms in a known way when its parameters are transformed, F(K(theta)) = rho(F(theta)), obeys one identity
for its gradient and one for its Hessian (equivariance-toolbox R1, R2); a discrete symmetry has its own (R7), and a mean-value
form that holds at a distance from the mirror (R8). They verify any symmetry object without knowing where it came from,
and turn it into curvature bounds, flat directions and charges. Pure functions of a dict of tensors; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from parasym.symmetry.symmetry import Params, Symmetry

Function = Callable[[Params], Tensor]
Tangent = Callable[[Params], Mapping[str, Tensor]]
Move = Callable[[Params], Mapping[str, Tensor]]
OutputLaw = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Residual:
    """How far an identity is from holding.

    Attributes:
        value: norm of (left side - right side), in the unit of the identity.
        scale: the size the two sides could have had by their factors; ``relative = value / scale``.
        left: norm of the measured side.
        right: norm of the predicted side.
        alignment: cosine between the two sides; nan where either vanishes.
        identity: the formula.
        status: "ok", or "not_applicable" when the tangent vanishes here.
    """

    value: float
    scale: float
    left: float
    right: float
    alignment: float
    identity: str
    status: str = "ok"

    @property
    def relative(self) -> float:
        """``value / scale``; the value itself where the scale vanishes."""
        return self.value / self.scale if self.scale > 0 else self.value

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**asdict(self), "relative": self.relative}


@dataclass(frozen=True)
class Equivariance:
    """A one-parameter family of moves, and how the function answers: F(action(theta, l)) = rho_l(F(theta)).

    Attributes:
        action: (params, l) -> the moved parameters (only those that move); l a scalar, 0 the identity.
        tangent: params -> xi, the derivative of the action at l = 0; by forward-mode differentiation if not given.
        output_law: F -> r(F), the derivative of rho_l at l = 0; ``None`` for invariance (r = 0).
        name: for reports.
    """

    action: Callable[[Params, Tensor], Mapping[str, Tensor]] | None = None
    tangent: Tangent | None = None
    output_law: OutputLaw | None = None
    name: str = field(default="")

    def __post_init__(self) -> None:
        if self.action is None and self.tangent is None:
            raise ValueError(f"equivariance {self.name!r}: give an action or a tangent field")

    def xi(self, params: Params) -> dict[str, Tensor]:
        """The tangent at ``params``: a tensor of the parameter's shape for each parameter that moves."""
        if self.tangent is not None:
            return dict(self.tangent(params))
        anchor = next(iter(params.values()))
        zero = torch.zeros((), dtype=anchor.dtype, device=anchor.device)
        move = self.action
        assert move is not None
        return dict(jvp(lambda step: dict(move(params, step)), (zero,), (torch.ones_like(zero),))[1])

    def response(self, output: Tensor) -> Tensor:
        """r(F), in the shape of the output."""
        return torch.zeros_like(output) if self.output_law is None else self.output_law(output)


def equivariances(symmetry: Symmetry, params: Params, limit: int | None = None) -> list[Equivariance]:
    """One invariance for each generator of a continuous symmetry, or for ``limit`` of them, evenly spread.

    The tangents are the symmetry's generators. Where they were found numerically they are no differentiable function of the
    parameters: then `second_order_residual` does not apply, and `orbit_residual` does.

    Args:
        symmetry: a continuous symmetry; a discrete one has no generators and gives an empty list.
        params: the parameters, for the number of generators.
        limit: how many to return.
    """
    moved = symmetry.generators(params) if symmetry.kind != "discrete" else {}
    count = next((tangent.shape[0] for tangent in moved.values()), 0)
    wanted = count if limit is None else min(limit, count)
    return [_generator(symmetry, index * count // wanted, count) for index in range(wanted)]


def _generator(symmetry: Symmetry, index: int, count: int) -> Equivariance:
    def action(params: Params, step: Tensor) -> dict[str, Tensor]:
        return symmetry.action.act(params, step * torch.eye(count, dtype=step.dtype, device=step.device)[index])

    def tangent(params: Params) -> dict[str, Tensor]:
        return {name: rows[index] for name, rows in symmetry.generators(params).items()}

    return Equivariance(action, tangent, name=f"{symmetry.name}[{index}]")


def first_order_residual(function: Function, params: Params, equivariance: Equivariance, *, seed: int = 0) -> Residual:
    """J xi = r(F) (equivariance-toolbox R1).

    Args:
        function: params -> a loss, outputs or margins, of any shape.
        params: where to look, name -> tensor.
        equivariance: the move and the output law.
        seed: of the output direction u that sets the scale |J^T u| |xi| + |r|, |u| = 1.
    """
    with _math_attention():
        xi = equivariance.xi(params)
        output, left = _push(function, params, xi)
        right = equivariance.response(output)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype).to(output.device)
        pulled = vjp(function, dict(params))[1](direction / direction.norm())[0]
    scale = float(_norm(pulled) * _norm(xi) + right.norm())
    return _residual({"": left}, {"": right}, scale, "J xi = r(F)", xi)


def second_order_residual(function: Function, params: Params, equivariance: Equivariance) -> Residual:
    """H xi = r'(F) g - (D xi)^T g for a scalar function (equivariance-toolbox R2); one Hessian-vector product.

    The cosine of the two sides is the gradient-Hessian alignment: where it is 1, the curvature along the tangent is known
    from the gradient alone.
    """
    with _math_attention():
        xi = equivariance.xi(params)
        left = hvp(function, params, xi)
        right = predicted_curvature(function, params, equivariance)
        gradient = grad(function)(dict(params))
    scale = float(_norm(left) + _norm(right) + _norm(gradient))
    return _residual(left, right, scale, "H xi = r'(F) g - (D xi)^T g", xi)


def orbit_residual(
    function: Function, params: Params, action: Callable[[Params, Tensor], Mapping[str, Tensor]], *, step: float = 1e-2, seed: int = 0
) -> Residual:
    """xi.H xi = -g.K''(0): the second-order identity along one orbit K(l), from finite moves alone.

    For an action that cannot be differentiated (found numerically, acting by step and retraction); xi and K'' by central
    differences of fourth order, so the error falls like step^4 until rounding, 1e-16 / step^2, takes over.

    Args:
        function: params -> scalar, unchanged by the action.
        params: where to look.
        action: (params, l) -> the moved parameters (only those that move).
        step: spacing of l, in units of the action's own coordinate.
        seed: of the direction u whose |H u| / |u| enters the scale: along an invisible direction both sides are rounding errors.
    """
    point = dict(params)
    anchor = next(iter(point.values()))
    moved = {
        shift: {**point, **action(point, torch.tensor(shift * step, dtype=anchor.dtype, device=anchor.device))} for shift in (-2, -1, 1, 2)
    }
    xi = {name: (8 * (moved[1][name] - moved[-1][name]) - moved[2][name] + moved[-2][name]) / (12 * step) for name in point}
    near = {name: (moved[1][name] - value) + (moved[-1][name] - value) for name, value in point.items()}
    far = {name: (moved[2][name] - value) + (moved[-2][name] - value) for name, value in point.items()}
    bend = {name: (16 * near[name] - far[name]) / (12 * step**2) for name in point}
    force, curved = grad(function)(point), hvp(function, point, xi)
    probe = _gaussian(params, seed)
    typical = _norm(hvp(function, point, probe)) / _norm(probe)
    scale = float(_norm(xi) * _norm(curved) + _norm(force) * _norm(bend) + typical * _norm(xi).square())
    return _residual({"": dot(xi, curved)}, {"": -dot(force, bend)}, scale, "xi.H xi = -g.K''(0)", xi)


def predicted_curvature(function: Function, params: Params, equivariance: Equivariance) -> dict[str, Tensor]:
    """r'(F) g - (D xi)^T g: what H xi must be, from the gradient alone (equivariance-toolbox R2)."""
    point = dict(params)
    gradient, output = torch.func.grad_and_value(function)(point)
    moving, pull = torch.func.vjp(equivariance.xi, point)[:2]
    pulled = pull({name: gradient[name] for name in moving})[0]
    if equivariance.output_law is None:
        return {name: -pulled[name] for name in point}
    slope = jvp(equivariance.response, (output,), (torch.ones_like(output),))[1]
    return {name: slope * gradient[name] - pulled[name] for name in point}


def hvp(function: Function, params: Params, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hessian-vector product of a scalar function, by reverse over reverse; absent entries of ``vector`` are zero."""
    with _math_attention():
        return vjp(grad(function), dict(params))[1](_full(vector, params))[0]


@dataclass(frozen=True)
class DiscreteResiduals:
    """Residuals of a discrete equivariance F(G theta) = rho(F(theta)): of the function, its gradient and its Hessian."""

    function: Residual
    gradient: Residual
    hessian: Residual

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {"function": self.function.to_dict(), "gradient": self.gradient.to_dict(), "hessian": self.hessian.to_dict()}


def discrete_residual(function: Function, params: Params, move: Move, *, sign: float = 1.0, seed: int = 0) -> DiscreteResiduals:
    """F(G theta) = s F(theta), G^T g(G theta) = s g(theta), G^T H(G theta) G v = s H(theta) v (equivariance-toolbox R7, R9).

    Args:
        function: params -> scalar.
        params: where to look.
        move: the linear move G, returning all parameters or only those that move.
        sign: s, the linear output law; 1 for invariance, -1 for an odd function.
        seed: of the probe v ~ N(0, 1).
    """
    point, probe = dict(params), _gaussian(params, seed)

    def whole(values: Params) -> dict[str, Tensor]:
        return {**values, **move(values)}

    with _math_attention():
        there, pull = torch.func.vjp(whole, point)[:2]
        gradient, value = torch.func.grad_and_value(function)(point)
        moved_gradient, moved_value = torch.func.grad_and_value(function)(there)
        curved = hvp(function, point, probe)
        moved_curved = pull(hvp(function, there, jvp(whole, (point,), (probe,))[1]))[0]
    back = pull(moved_gradient)[0]
    scaled, scaled_curve = _times(gradient, sign), _times(curved, sign)
    return DiscreteResiduals(
        _residual({"": moved_value}, {"": sign * value}, float(abs(value)), "F(G theta) = s F(theta)"),
        _residual(back, scaled, float(_norm(gradient)), "G^T g(G theta) = s g(theta)"),
        _residual(moved_curved, scaled_curve, float(_norm(curved)), "G^T H(G theta) G v = s H(theta) v"),
    )


def mirror_force(function: Function, params: Params, basis: Sequence[Mapping[str, Tensor]], nodes: int = 40) -> tuple[Tensor, Tensor]:
    """O^T g(theta), measured, and Mbar c, predicted: the normal force is an averaged Hessian times the distance to the mirror.

    Mbar = int_0^1 O^T H(P theta + s O c) O ds, c = O^T theta, by Gauss-Legendre quadrature (equivariance-toolbox R8).

    Args:
        function: params -> scalar, unchanged by the reflection 1 - 2 O O^T.
        params: where to look.
        basis: r orthonormal directions, the columns of O, each a dict (absent entries are zero).
        nodes: number of quadrature points.

    Returns:
        (r,) measured and (r,) predicted.
    """
    columns = [_full(column, params) for column in basis]
    normal = _sum([_times(column, dot(column, params)) for column in columns])
    mirror = {name: value - normal[name] for name, value in params.items()}
    pushed = mean_curvature(function, mirror, normal, nodes)
    force = grad(function)(dict(params))
    return torch.stack([dot(column, force) for column in columns]), torch.stack([dot(column, pushed) for column in columns])


def finite_noether(function: Function, params: Params, move: Move, nodes: int = 40) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g(theta) - G g(theta), measured, and the averaged Hessian on theta - G theta, predicted, for an orthogonal move G.

    The average runs along the segment from G theta to theta. For the exchange of two units i, j this is
    g_i - g_j = int (H_ii - H_ij) ds (theta_i - theta_j) (equivariance-toolbox R8).
    """
    there = {**params, **move(params)}
    step = {name: value - there[name] for name, value in params.items()}
    force = grad(function)(dict(params))
    turned = {**force, **move(force)}
    return {name: force[name] - turned[name] for name in force}, mean_curvature(function, there, step, nodes)


def mean_curvature(function: Function, start: Params, step: Mapping[str, Tensor], nodes: int = 40) -> dict[str, Tensor]:
    """int_0^1 H(start + s step) step ds by Gauss-Legendre quadrature with ``nodes`` points."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    spots = [({name: start[name] + 0.5 * (1 + s) * step[name] for name in start}, 0.5 * w) for s, w in zip(points, weights, strict=True)]
    return _sum([_times(hvp(function, spot, step), weight) for spot, weight in spots])


def sharpness_lower_bound(function: Function, params: Params, equivariances: Sequence[Equivariance]) -> Tensor:
    """max over the moves of |r' g - (D xi)^T g| / |xi| <= ||H||_2: a bound from gradients alone (equivariance-toolbox R4)."""
    bounds = [_norm(predicted_curvature(function, params, item)) / _norm(item.xi(params)) for item in equivariances]
    return torch.stack(bounds).max()


def null_basis(params: Params, equivariances: Sequence[Equivariance], tol: float = 1e-10) -> Tensor:
    """An orthonormal basis (N, k) of the orbit's tangent space, in the order of ``params``: null for J, the Gauss-Newton
    matrix, the Fisher matrix and the gradient covariance at every point, and for the Hessian where the gradient vanishes
    (equivariance-toolbox R5). Project it out before an eigenvalue search or a Newton step.

    Args:
        params: where to look.
        equivariances: invariances, at least one.
        tol: singular values below ``tol`` times the largest count as dependence between the tangents.
    """
    rows = torch.stack([flatten(item.xi(params), params) for item in equivariances])
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > tol * values[0]].T


def charge_step(function: Function, params: Params, tangent: Tangent, eta: float, decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """Change of Q = theta.A theta / 2 over one gradient step: measured, and (eta^2 / 2) g.A g predicted (equivariance-toolbox R6).

    For a linear tangent xi(theta) = A theta with A symmetric, of a symmetry of ``function``; exact, of either sign.
    With decay (gradient + 2 decay theta) the prediction is exact too:
    ((1 - 2 eta decay)^2 - 1) Q + (eta^2 / 2) g.A g, that is Q' = -4 decay Q under flow.
    """
    gradient = grad(function)(dict(params))
    shrink = 1 - 2 * eta * decay
    moved = {name: shrink * value - eta * gradient[name] for name, value in params.items()}
    charge = 0.5 * dot(tangent(params), params)
    predicted = (shrink**2 - 1) * charge + 0.5 * eta**2 * dot(tangent(gradient), gradient)
    return 0.5 * dot(tangent(moved), moved) - charge, predicted


def dot(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Inner product over the names both have."""
    return torch.stack([(value * second[name]).sum() for name, value in first.items() if name in second]).sum()


def flatten(values: Mapping[str, Tensor], like: Params) -> Tensor:
    """All entries as one vector (N,) in the order of ``like``; absent entries are zero."""
    full = _full(values, like)
    return torch.cat([full[name].reshape(-1) for name in like])


def unflatten(vector: Tensor, like: Params) -> dict[str, Tensor]:
    """The inverse of `flatten`."""
    pieces = vector.split([value.numel() for value in like.values()])
    return {name: piece.reshape(value.shape) for (name, value), piece in zip(like.items(), pieces, strict=True)}


def _residual(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], scale: float, identity: str, xi: Mapping[str, Tensor] | None = None
) -> Residual:
    gap = _norm({name: left[name] - right[name] for name in left})
    sizes = float(_norm(left)), float(_norm(right))
    cosine = float(dot(left, right)) / (sizes[0] * sizes[1]) if min(sizes) > 0 else float("nan")
    status = "not_applicable" if xi is not None and float(_norm(xi)) == 0 else "ok"
    return Residual(float(gap), scale, sizes[0], sizes[1], cosine, identity, status)


def _norm(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.square().sum() for value in values.values()]).sum().sqrt()


def _full(vector: Mapping[str, Tensor], params: Params) -> dict[str, Tensor]:
    return {name: vector[name] if name in vector else torch.zeros_like(value) for name, value in params.items()}


def _times(values: Mapping[str, Tensor], factor: Tensor | float) -> dict[str, Tensor]:
    return {name: value * factor for name, value in values.items()}


def _sum(terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([term[name] for term in terms]).sum(0) for name in terms[0]}


def _push(function: Function, params: Params, xi: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The value and its derivative along ``xi``; by reverse mode twice where an operator has no forward-mode derivative."""
    try:
        value, slope = jvp(function, (dict(params),), (_full(xi, params),))[:2]
    except (NotImplementedError, RuntimeError):
        value, pull = torch.func.vjp(function, dict(params))[:2]
        slope = torch.func.vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(value))[1](_full(xi, params))[0]
    return value, slope


def _gaussian(params: Params, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value) for name, value in params.items()}


@contextmanager
def _math_attention() -> Iterator[None]:
    """Attention by its plain formula, the only kernel that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
