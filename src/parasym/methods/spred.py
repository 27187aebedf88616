"""spred: L1 and group penalties by weight decay on a product, for the parameters of any module.

A weight W that should be L1-regularised is trained as U V with weight decay a on both factors: on each orbit of (U, V) -> (t U, V / t)
the decay is least at |U| = |V| and costs a |W|_1 there, no bad minimum is added, and any optimiser with decay in the gradient solves
the penalised problem. One factor for a whole group gives the group penalty a |W_g|_2. Decay is torch's: it adds a theta to the gradient.

Source: spred R1-R9.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.methods.reparametrize import Lift, Reparametrization, select

Group = Literal["in", "out"] | tuple[int, ...] | None
OFF_BALANCE = 0.1  # of the mean size of a parameter's weights: |V|^2 - |U|^2 where training starts


class Product(Lift):
    """W = U V (V of the same shape, or constant over the dimensions of a group), trained with decay a on each factor.

    Args:
        l1: the penalty a; the decay of every factor is a, or its own in ``ratio``.
        group: None for every weight by itself; "out" one factor for each output (a neuron, a filter), "in" one for each input
            (features, channels); a tuple names the dimensions that share a factor.
        factors: how many; D factors penalise (a D / 2) |W|^(2/D), non-convex for D > 2 (R6: do not start near zero then).
        ratio: decay of U over that of V, s: they are a sqrt(s) and a / sqrt(s), and the penalty stays a |W| (R1).
    """

    def __init__(self, l1: float, group: Group = None, factors: int = 2, ratio: float = 1.0) -> None:
        super().__init__()
        if not (l1 > 0 and math.isfinite(l1)) or not (ratio > 0 and math.isfinite(ratio)):
            raise InputError(f"l1 and ratio must be positive, got {l1}, {ratio}.")
        if factors < 2 or (factors > 2 and (group is not None or ratio != 1)):
            raise InputError(f"spred needs at least 2 factors, and groups and ratio work with 2: got {factors}.")
        self.l1, self.group, self.factors, self.ratio = l1, group, factors, ratio
        self.decay = (l1 * ratio**0.5, l1 / ratio**0.5) if factors == 2 else (l1,) * factors

    def forward(self, *parts: Tensor) -> Tensor:
        out = parts[0]
        for part in parts[1:]:
            out = out * part
        return out

    def dims(self, weight: Tensor) -> tuple[int, ...] | None:
        """Dimensions that share one factor.

        Raises:
            InputError: the weight has no such dimension.
        """
        if self.group is None:
            return None
        if isinstance(self.group, tuple):
            found = tuple(d % weight.dim() for d in self.group if -weight.dim() <= d < weight.dim())
            if len(found) == len(self.group):
                return found
        elif self.group == "out" and weight.dim() >= 1:
            return tuple(range(1, weight.dim()))
        elif self.group == "in" and weight.dim() >= 2:
            return tuple(d for d in range(weight.dim()) if d != 1)
        raise InputError(f"A weight of shape {tuple(weight.shape)} has no groups {self.group!r}: choose others, or leave it out.")

    def size(self, weight: Tensor) -> Tensor:
        """|W| of every entry, or of every group (its dimensions kept with size one)."""
        dims = self.dims(weight)
        return weight.abs() if dims is None else torch.linalg.vector_norm(weight, dim=dims, keepdim=True) if dims else weight.abs()

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A point of the orbit a little off balance, |V| above |U|; the function stays.

        From |U| = |V| exactly no descent changes the sign of a weight: both factors reach zero together and stop at that saddle. Here V
        is still there when U reaches zero, so U passes through, and weights that are zero can grow. Decay restores the balance (R4).
        """
        size = self.size(weight)
        mean = size.mean()
        spare = OFF_BALANCE * torch.where(mean > 0, mean, torch.ones_like(mean))
        others = (size + spare) ** (1 / self.factors)
        if self.factors > 2:
            return (weight / others ** (self.factors - 1), *(others.clone() for _ in range(self.factors - 1)))
        return weight / others * self.ratio**-0.25, others * self.ratio**0.25

    def balanced(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The point of the orbit that costs least, and then as much as the penalty; zeros and signs are stuck there under descent."""
        size = self.size(weight)
        if self.factors > 2:
            root = size ** (1 / self.factors)
            return (root * weight.sign(), *(root.clone() for _ in range(self.factors - 1)))
        v = size.sqrt()
        u = torch.where(v > 0, weight / torch.where(v > 0, v, 1.0), 0.0)
        return u * self.ratio**-0.25, v * self.ratio**0.25

    def push(self, law: str, buffer: Tensor, weight: Tensor) -> tuple[Tensor, ...] | None:
        if self.factors != 2 or law not in ("gradient", "square"):
            return None
        u, v = self.split(weight)
        dims = self.dims(weight)
        if law == "square":
            to_v = buffer * u.square()
            return buffer * v.square(), to_v if not dims else to_v.sum(dims, keepdim=True)
        to_v = buffer * u
        return buffer * v, to_v if not dims else to_v.sum(dims, keepdim=True)


@dataclass(eq=False)
class Spred(Reparametrization):
    """The handle of `spred`: a `Reparametrization` that knows about sparsity."""

    @torch.no_grad()
    def prune(self, tol: float | None = None, *, keep: float | None = None) -> dict[str, float]:
        """Set both factors of small weights (or groups) to zero, where they stay for good: a pair of zeros has no gradient (R9).

        Args:
            tol: weights (group norms) below it go.
            keep: instead: the share of all weights under spred that stays, the largest ones over all parameters, in (0, 1].

        Returns:
            Share of weights that is left, by parameter.

        Raises:
            InputError: neither or both are given, fewer than one entry would be left, or a weight is not finite.

        Of equal sizes the first ones stay; a group stays or goes as a whole.
        """
        if (tol is None) == (keep is None):
            raise InputError("Give exactly one of tol (a size) and keep (a share).")
        weights = self.weights()
        bad = next((n for n, w in weights.items() if not bool(torch.isfinite(w).all())), None)
        if bad is not None:
            raise InputError(f"{bad!r} is not finite: there is no size to prune by. Train again with a smaller learning rate.")
        sizes = {n: self._lift(n).size(w) for n, w in weights.items()}
        if keep is not None:
            masks = _largest(sizes, {n: w.numel() for n, w in weights.items()}, keep)
        else:
            assert tol is not None
            masks = {n: s >= tol if tol > 0 else s > 0 for n, s in sizes.items()}
        left = {}
        for name, w in weights.items():
            left[name] = float(masks[name].expand_as(w).double().mean())
            for part in self.originals(name):
                part.mul_(masks[name])
        return left

    def report(self, loss: Callable[[], Tensor], tol: float = 1e-8) -> Certificate:
        """Optimality of the L1 problem at the weights of now, for any loss: its Karush-Kuhn-Tucker residual.

        On the support the gradient must be -a W / |W|, off it its size at most a (R3); of trainable parameters without penalty (biases,
        ...) it must be zero.

        Args:
            loss: the plain loss over all data, without penalty, of the model as it is now.
            tol: weights (group norms) of at most this size count as zero.
        """
        bad = next((n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())), None)
        if bad is not None:
            raise InputError(f"{bad!r} is not finite: there is no certificate. Train again with a smaller learning rate.")
        value, made, slopes, free = self._slopes(loss)
        rows = {n: _conditions(self._lift(n), w, slopes[n], self.originals(n), tol) for n, w in made.items()}
        l1 = min(self._lift(n).l1 for n in rows)
        plain = {n: float(g.abs().max()) / l1 for n, g in free.items() if g.numel()}
        return Certificate(value, rows, max([r["residual"] for r in rows.values()] + list(plain.values())), plain)

    def _slopes(self, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The loss, the plain weights, its gradients with respect to them, and to the trainable parameters without penalty."""
        own = {p for n in self.lifts for p in self.originals(n)}
        free = {n: p for n, p in self.model.named_parameters() if p.requires_grad and p not in own}
        with torch.enable_grad(), parametrize.cached():  # each weight is one tensor in here, whose gradient can be asked for
            value = loss()
            made = {n: [getattr(*place) for place in held] for n, held in self._places().items()}
            asked = [w for ws in made.values() for w in ws] + list(free.values())
            found = torch.autograd.grad(value, asked, allow_unused=True)
        slopes = iter([torch.zeros_like(w) if g is None else g for w, g in zip(asked, found, strict=True)])
        weights = {n: ws[0].detach() for n, ws in made.items()}
        return float(value.detach()), weights, {n: sum(next(slopes) for _ in ws) for n, ws in made.items()}, dict(zip(free, slopes))  # type: ignore[misc]  # noqa: B905

    def _lift(self, name: str) -> Product:
        lift = self.lifts[name]
        assert isinstance(lift, Product)
        return lift


def _largest(sizes: Mapping[str, Tensor], numel: Mapping[str, int], keep: float) -> dict[str, Tensor]:
    """Masks of the largest sizes, until they hold the share ``keep`` of all weights; ties by position."""
    total = sum(numel.values())
    count = round(keep * total) if 0 < keep <= 1 else 0
    if count < 1:
        raise InputError(f"keep={keep} of {total} weights leaves {count}: keep at least one, at most all.")
    every = torch.cat([s.reshape(-1) for s in sizes.values()])
    members = torch.cat([torch.full((s.numel(),), numel[n] // s.numel(), device=s.device) for n, s in sizes.items()])
    order = every.argsort(descending=True, stable=True)
    held = members[order].cumsum(0)
    alive = torch.zeros_like(every, dtype=torch.bool)
    alive[order[held - members[order] < count]] = True
    return {n: part.view_as(s) for (n, s), part in zip(sizes.items(), alive.split([s.numel() for s in sizes.values()]), strict=True)}


@dataclass(frozen=True)
class Certificate:
    """How far weights are from a minimum of loss + a |W|_1.

    Attributes:
        loss: the plain loss.
        parameters: name -> ``residual`` (largest violation, in units of a), ``sparsity`` (share of zeros), ``excess`` (cost of the
            factors over the penalty |W|, relative, less one: zero where they are balanced, |u| = |v|).
        residual: the largest of all residuals, in units of a.
        free: trainable parameters without penalty -> their largest gradient, in units of a.
    """

    loss: float
    parameters: Mapping[str, Mapping[str, float]]
    residual: float
    free: Mapping[str, float] = field(default_factory=dict)

    def estimate(self, within: float = 1e-6) -> Estimate:
        """The residual as an estimate that says whether it converged."""
        status: Any = "ok" if self.residual <= within else "not_converged"
        return Estimate(self.residual, status=status, refs=("spred R3",), note=f"KKT residual in units of the penalty, wanted {within:g}")


@torch.no_grad()
def _conditions(lift: Product, weight: Tensor, slope: Tensor, factors: tuple[Tensor, ...], tol: float) -> dict[str, float]:
    """KKT residual in units of a, from a plain weight and the gradient of the plain loss with respect to it."""
    if lift.factors != 2:
        raise InputError("The certificate is for two factors: with more the penalty is not convex.")
    dims = lift.dims(weight)
    size, on = lift.size(weight), lift.size(weight) > tol
    pull = lift.size(slope + lift.l1 * torch.where(on, weight / size.clamp_min(torch.finfo(weight.dtype).tiny), 0.0))
    gap = torch.where(on, pull, (lift.size(slope) - lift.l1).clamp_min(0))
    u, v = factors
    cost = 0.5 * (u.square().sum(dims, keepdim=True) if dims else u.square()) * lift.ratio**0.5 + 0.5 * v.square() * lift.ratio**-0.5
    return {
        "residual": float(gap.max()) / lift.l1,
        "sparsity": float((~on).expand_as(weight).double().mean()),
        "excess": float((cost - size).sum() / size.sum().clamp_min(1e-300)),
    }


def spred(
    model: nn.Module,
    l1: float,
    where: Callable[[str, Tensor], bool] | None = None,
    *,
    group: Group = None,
    factors: int = 2,
    ratio: float = 1.0,
    threshold: float = 0.0,
) -> Spred:
    """Plan L1 (or group) regularisation of a model's parameters by a product of factors. The model is not touched yet.

    ``handle = spred(model, 1e-3).apply(optimizer)``, or build the optimiser from ``handle.param_groups(lr=...)``; train with decay in
    the gradient (SGD, Adam; AdamW is switched to it in the factors' groups, as decoupled decay does not give L1, R8); then
    ``handle.bake()`` for a plain model. Both factors must share one learning rate.

    Args:
        model: any module.
        l1: the penalty a: the problem solved is loss + a |W|_1.
        where: (name, parameter) -> whether it is regularised; None: all with two dimensions or more (not biases, not gains).
        group, factors, ratio: see `Product`.
        threshold: weights (group norms) up to this size are set to zero by ``bake``.

    Raises:
        InputError: nothing selected, NaN weights, integer parameters, a weight that is parametrised already, or without such groups.

    Note: the factors start a little off balance (`Product.split`), so that weights can change sign and exact zeros can grow; weights
    that `Spred.prune` took have two zero factors, and stay.
    """
    chosen = select(model, where if where is not None else lambda name, p: p.dim() >= 2)
    lifts: dict[str, Lift] = {}
    for name, p in chosen.items():
        product = Product(l1, group, factors, ratio)
        product.dims(p)
        lifts[name] = product

    def finish(name: str, weight: Tensor) -> Tensor:
        lift = lifts[name]
        assert isinstance(lift, Product)
        return torch.where(lift.size(weight) > threshold, weight, torch.zeros_like(weight)) if threshold > 0 else weight

    stuck = sum(int((p == 0).sum()) for p in chosen.values())
    summary = {"l1": l1, "group": group, "factors": factors, "weights": sum(p.numel() for p in chosen.values()), "zero at the start": stuck}
    return Spred("spred", model, lifts, finish, summary)


def solve(
    model: nn.Module,
    loss: Callable[[], Tensor],
    l1: float,
    where: Callable[[str, Tensor], bool] | None = None,
    *,
    group: Group = None,
    tol: float = 1e-6,
    max_steps: int = 2000,
    zero: float = 1e-8,
    progress: Callable[[int, float], None] | None = None,
) -> Certificate:
    """Train a whole network to a minimum of loss + l1 |W|_1 on all its data, and leave plain sparse weights in it.

    L-BFGS on the factors, zeros taken where the certificate allows it; every round ends with the KKT residual, and starts weights again
    that stopped at zero though their gradient is above the penalty; where the line search has no step left it goes on without one. If
    anything goes wrong (an interrupt too) the model is left as it was.

    Args:
        model: any module whose loss is deterministic.
        loss: the plain loss over all data.
        where, group: as in `spred`.
        tol: wanted KKT residual, in units of l1.
        max_steps: most L-BFGS steps.
        zero: size, in units of the largest weight at the start, up to which a weight (group norm) is set to zero.
        progress: called with (steps, residual) after each round.

    Returns:
        The certificate at the weights left in the model; it says itself whether it converged.

    Raises:
        InputError: as `spred`; the loss is not finite.
    """
    plan = spred(model, l1, where, group=group)
    tensors = [*plan.model.parameters(), *plan.model.buffers()]
    before = [(t, t.detach().clone(), t.grad) for t in tensors]
    plan.apply()
    try:
        certificate = _solved(plan, loss, l1, tol, max_steps, zero, progress)
    except BaseException:  # an interrupt too: nothing of it stays
        plan._restore()
        with torch.no_grad():
            for t, value, grad in before:
                t.copy_(value)
                t.grad = grad
        raise
    plan.bake()
    return certificate


def _solved(
    plan: Spred,
    loss: Callable[[], Tensor],
    l1: float,
    tol: float,
    max_steps: int,
    zero: float,
    progress: Callable[[int, float], None] | None,
) -> Certificate:
    """The rounds of `solve`, on a plan that is applied; sets what ``bake`` will leave."""
    limit = zero * max(float(p.detach().abs().max()) for p in plan.weights().values())
    free = [p for p in plan.model.parameters() if p.requires_grad]
    own = {p for n in plan.lifts for p in plan.originals(n)}
    steps = 0
    while True:
        most = min(100, max_steps - steps)
        optimizer = torch.optim.LBFGS(
            free, max_iter=most, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
        )

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023  # called in this round only
            value = loss() + 0.5 * l1 * sum(((p * p).sum() for p in own), torch.zeros((), dtype=free[0].dtype))
            if not bool(torch.isfinite(value)):
                raise InputError("The loss is not finite: check the data, or start from other weights.")
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
        taken = optimizer.state_dict()["state"][0]["n_iter"]
        steps += max(taken, 1)
        certificate = plan.report(loss, limit)
        if progress is not None:
            progress(steps, certificate.residual)
        if certificate.residual <= tol or steps >= max_steps:
            break
        if not _reseed(plan, loss) and taken < 3:  # no step is left to take
            certificate = _polished(plan, loss, closure, limit, certificate)
            break
    plan.finish = lambda name, w: torch.where(plan._lift(name).size(w) > limit, w, torch.zeros_like(w))
    return certificate


def _polished(plan: Spred, loss: Callable[[], Tensor], closure: Callable[[], Tensor], limit: float, reached: Certificate) -> Certificate:
    """Quasi-Newton steps without a line search: close to a minimum its comparisons of values drown in rounding, gradients do not yet.

    Undone unless the residual fell.
    """
    free = [p for p in plan.model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in free]
    optimizer = torch.optim.LBFGS(free, max_iter=300, history_size=30, tolerance_grad=0, tolerance_change=0)
    with contextlib.suppress(InputError):  # it left the region where the loss is finite
        optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    found = plan.report(loss, limit) if all(bool(torch.isfinite(p).all()) for p in free) else reached
    if found.residual < reached.residual:
        return found
    with torch.no_grad():
        for p, value in zip(free, kept, strict=True):
            p.copy_(value)
    return reached


@torch.no_grad()
def _reseed(plan: Spred, loss: Callable[[], Tensor]) -> int:
    """Start weights (groups) that stopped at zero, a saddle where |g| > a, a little on the side their gradient wants; how many."""
    _, weights, slopes, _ = plan._slopes(loss)
    count = 0
    for n, w in weights.items():
        lift, size = plan._lift(n), plan._lift(n).size(w)
        scale = size.max() if bool(size.any()) else torch.ones_like(size.max())
        pull = lift.size(slopes[n])
        stuck = (size < 1e-6 * scale) & (pull > lift.l1 * (1 + 1e-9))
        seed = -1e-3 * scale * slopes[n] / pull.clamp_min(torch.finfo(w.dtype).tiny)
        for p, part, level in zip(plan.originals(n), lift.balanced(seed), lift.balanced(w), strict=True):
            p.copy_(torch.where(stuck, part, level))  # the rest goes to the balanced point: the same function at least cost
        count += int(stuck.sum())
    return count


class FeatureGate(nn.Module):
    """Multiply features by a trained mask: feature selection in front of any network (R5).

    With decay a on the mask and on a linear map behind it the pair costs a |W_column|_2 for each feature: a group penalty. Give both to
    the optimiser with ``weight_decay=a``.

    Args:
        features: size of the last dimension.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask

    def selected(self, tol: float = 1e-10) -> Tensor:
        """Indices of the features that are left: by size, whatever the sign."""
        return (self.mask.detach().abs() > tol).nonzero()[:, 0]
