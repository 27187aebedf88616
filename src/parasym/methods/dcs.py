"""DCS: a mirror made a differentiable constraint, so that plain training meets it exactly: sparsity, low rank, merging, tying.

theta = (1 - O O^T) w + O (c0 + u v): w free, u and v with weight decay a, so the normal coordinates c = O^T theta cost a |c|_1, or
a |c|_2 with one scalar for all the columns of a mirror. The constraint c = c0 is met once a exceeds the multipliers |O^T grad l| at the
constrained optimum, and not before. Decay is torch's: it adds a theta to the gradient.

Source: dcs-mirror-symmetry R4, R5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasym.core.errors import InputError, NotASymmetryError
from parasym.core.functional import functional
from parasym.core.guards import float64_casts, preserve, rng_state
from parasym.core.results import Estimate
from parasym.methods.reparametrize import Lift, Reparametrization, originals, refuse_parametrized
from parasym.symmetry.mirror import Mirror

Mode = Literal["elementwise", "group"]
Inputs = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
_ACCEPT = 1e-10


class Joint(nn.Module):
    """c - c0 = u v for every normal direction: v one number for each direction, or one for each mirror."""

    offset: Tensor
    owner: Tensor

    def __init__(self, c: Tensor, offset: Tensor, owner: Tensor, count: int) -> None:
        super().__init__()
        self.register_buffer("offset", offset)
        self.register_buffer("owner", owner)
        size = torch.zeros(count, dtype=c.dtype, device=c.device).index_add(0, owner, c.square()).sqrt()
        v = size.sqrt()
        self.u = nn.Parameter(torch.where(v[owner] > 0, c / torch.where(v > 0, v, 1.0)[owner], 0.0))
        self.v = nn.Parameter(v)

    def forward(self) -> Tensor:
        return self.offset + self.u * self.v[self.owner]


class Constrained(Lift):
    """One parameter under a mirror: w with its normal part replaced by that of the joint."""

    index: Tensor
    column: Tensor
    value: Tensor

    def __init__(self, joint: Joint, index: Tensor, column: Tensor, value: Tensor, decay: float) -> None:
        super().__init__()
        self.joint, self.weight_decay = joint, decay
        for name, tensor in (("index", index), ("column", column), ("value", value)):
            self.register_buffer(name, tensor)
        self.partners: list[tuple[Constrained, nn.Module, str]] = []  # in a list, so that they are no submodules

    def normal(self, w: Tensor) -> Tensor:
        """O^T w of this parameter alone, (r,)."""
        c = torch.zeros(self.joint.offset.shape, dtype=w.dtype, device=w.device)
        return c.index_add(0, self.column, self.value * w.reshape(-1)[self.index])

    def forward(self, w: Tensor) -> Tensor:
        c = self.joint() - self.normal(w)
        for other, module, attr in self.partners:
            here = parametrize.is_parametrized(module, attr)  # not yet, while they are put in one by one
            c = c - other.normal(originals(module, attr)[0] if here else getattr(module, attr))
        step = torch.zeros(w.numel(), dtype=w.dtype, device=w.device).index_add(0, self.index, self.value * c[self.column])
        return w + step.reshape(w.shape)

    def split(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def push(self, law: str, buffer: Tensor, weight: Tensor) -> tuple[Tensor, ...] | None:
        return (buffer,) if law == "gradient" and not self.partners else None

    def extra(self) -> list[tuple[nn.Parameter, float]]:
        return [(self.joint.u, self.weight_decay), (self.joint.v, self.weight_decay)]


@dataclass(eq=False)
class Dcs(Reparametrization):
    """The handle of `dcs`."""

    mirror: Mirror | None = None
    joint: Joint | None = None
    symmetry: Estimate | None = None

    def residuals(self) -> Tensor:
        """|c - c0| of each mirror as it is now, (mirrors,)."""
        assert self.mirror is not None and self.joint is not None
        with torch.no_grad():
            c = self.joint() - self.joint.offset
            return torch.zeros(len(self.mirror.labels), dtype=c.dtype).index_add(0, self.mirror.groups, c.square().cpu()).sqrt()

    def multipliers(self, loss: Callable[[], Tensor]) -> Tensor:
        """O^T grad l at the weights of now, (r,): at the constrained optimum, the decay that DCS needs is the largest of them (R5).

        Args:
            loss: the plain loss over all data of the model as it is now.
        """
        assert self.mirror is not None
        with torch.enable_grad(), parametrize.cached():
            value = loss()
            places = self._places()
            made = {n: [getattr(*place) for place in held] for n, held in places.items()}
            slopes = iter(torch.autograd.grad(value, [w for ws in made.values() for w in ws], allow_unused=True))
        total = {n: sum((g for w in ws if (g := next(slopes)) is not None), torch.zeros_like(ws[0])).detach() for n, ws in made.items()}
        return self.mirror.coordinates(total)

    def threshold(self, loss: Callable[[], Tensor]) -> Estimate:
        """The decay above which the constraint is met, from the multipliers of now: the largest |lambda|, or |lambda|_2 of a mirror.

        Meant at a point where the constraint holds and the rest has settled: elsewhere it is an indication only.
        """
        assert self.mirror is not None and self.joint is not None
        found = self.multipliers(loss).double()
        owner, count = self.joint.owner.cpu(), self.joint.v.numel()
        size = torch.zeros(count, dtype=torch.float64).index_add(0, owner, found.cpu().square()).sqrt()
        return Estimate(float(size.max()), assumptions=("the constraint holds", "the rest is stationary"), refs=("dcs-mirror-symmetry R5",))

    def snap(self, tol: float) -> int:
        """Set the normal coordinates of every mirror within ``tol`` of its surface exactly to it; returns how many mirrors that are."""
        assert self.mirror is not None and self.joint is not None
        near = self.residuals() <= tol
        with torch.no_grad():
            self.joint.u.mul_(~near[self.mirror.groups].to(self.joint.u.device))
            left = torch.zeros_like(self.joint.v).index_add(0, self.joint.owner, (self.joint.u != 0).to(self.joint.v))
            self.joint.v.mul_(left > 0)
        return int(near.sum())


def dcs(
    model: nn.Module,
    mirror: Mirror,
    decay: float,
    *,
    mode: Mode = "group",
    inputs: Inputs | None = None,
    imposed: bool = False,
    seed: int = 0,
) -> Dcs:
    """Plan a mirror of the model as a differentiable constraint. The model is not touched yet.

    ``handle = dcs(model, Mirror.of(symmetry, params), a, inputs=...).apply(optimizer)``, train with decay in the gradient (AdamW is
    switched to it for u and v), look at ``residuals()``, then ``snap(tol)`` and ``bake()``.

    Args:
        model: any module.
        mirror: from a symmetry that was found (`Mirror.of`, `Mirror.merged`), from zeros, equalities or any linear map.
        decay: a, torch's weight decay of u and v.
        mode: "group": one scalar for each mirror, all of it or nothing; "elementwise": every normal direction by itself.
        inputs: (args, kwargs) batches: the reflection is tried on them in float64, at the weights of now and at perturbed ones.
        imposed: the mirror is no symmetry of the model, but a constraint put in on purpose: nothing is tried.
        seed: of the perturbation.

    Raises:
        NotASymmetryError: the reflection changes what the model computes; says which, where, and by how much.
        InputError: no inputs for the certificate; unknown, parametrised, frozen, integer or NaN parameters; decay <= 0.

    The handle's ``symmetry`` is the certificate; ``certificate`` says that the weights did not change when the constraint went in.
    """
    if not decay > 0:
        raise InputError(f"DCS needs a positive decay, got {decay}: the decay is what enforces the constraint.")
    if mode not in ("group", "elementwise"):
        raise InputError(f"mode must be 'group' or 'elementwise', got {mode!r}.")
    view = functional(model)
    for name, shape in mirror.shapes.items():
        with contextlib.suppress(AttributeError):  # no such module: told below
            refuse_parametrized(view.model, name)
        if name not in view.params or tuple(view.params[name].shape) != shape:
            have = tuple(view.params[name].shape) if name in view.params else "none"
            hint = f"; its canonical name is {view.aliases[name]!r}" if name in view.aliases else ""
            raise InputError(f"The mirror moves {name!r} of shape {shape}, and {type(view.model).__name__} has {have}{hint}.")
        if name in view.frozen:
            raise InputError(f"{name!r} is frozen, and the mirror moves it: unfreeze it or take a mirror without it.")
    certificate = None
    if not imposed:
        if not inputs:
            raise InputError(
                "A symmetry is certified on data before it is used: give inputs=[(args, kwargs)], or imposed=True for a constraint "
                "that is no symmetry of the model."
            )
        certificate = certify_mirror(model, mirror, inputs, seed=seed)
        if not certificate.ok:
            raise NotASymmetryError(f"{certificate.note} Check the mirror, or pass imposed=True to impose it as a constraint.")
    some = next(iter(mirror.shapes))
    like = view.params[some]
    if any(view.params[n].dtype != like.dtype or view.params[n].device != like.device for n in mirror.shapes):
        raise InputError("The parameters of one mirror must have one dtype and one device.")
    offset = mirror.offset.to(like)
    c = mirror.coordinates(view.params) - offset
    owner = mirror.groups if mode == "group" else torch.arange(mirror.rank)
    joint = Joint(c, offset, owner.to(like.device), len(mirror.labels) if mode == "group" else mirror.rank)
    lifts: dict[str, Lift] = {}
    for name, b in mirror.blocks.items():
        lifts[name] = Constrained(joint, b.index.to(like.device), b.column.to(like.device), b.value.to(like), decay)
    summary = {"decay": decay, "mode": mode, "mirrors": list(mirror.labels[:8]), "directions": mirror.rank, "stuck": int((c == 0).sum())}
    plan = Dcs("dcs", model, lifts, None, summary, mirror=mirror, joint=joint, symmetry=certificate)
    _link(plan.model, lifts)
    return plan


def _link(model: nn.Module, lifts: Mapping[str, Lift]) -> None:
    """Tell each parameter which others have entries in its columns."""
    for name, lift in lifts.items():
        assert isinstance(lift, Constrained)
        mine = set(lift.column.tolist())
        for other, theirs in lifts.items():
            assert isinstance(theirs, Constrained)
            if other != name and not mine.isdisjoint(theirs.column.tolist()):
                path, _, attr = other.rpartition(".")
                lift.partners.append((theirs, model.get_submodule(path), attr))


def certify_mirror(model: nn.Module, mirror: Mirror, inputs: Inputs, *, seed: int = 0, within: float = _ACCEPT) -> Estimate:
    """Largest relative change of the outputs under the reflections of a mirror, in float64; ``violated`` above ``within``.

    Tried on up to eight of its mirrors, at the weights of now and at perturbed ones (a collapsed network is its own image), for which
    each parameter gets a tenth of its root mean square.
    """
    f = functional(model).to(torch.float64)
    stream = torch.Generator().manual_seed(seed)
    noisy = {
        n: v + 0.1 * v.square().mean().sqrt().clamp_min(1e-3) * torch.randn(v.shape, generator=stream, dtype=torch.float64).to(v.device)
        for n, v in f.params.items()
        if v.numel() and not v.is_complex()
    }
    singles: list[tuple[Mirror, int | None]] = [(p, None) for p in mirror.parts] or [(mirror, k) for k in range(len(mirror.labels))]
    step = max(1, -(-len(singles) // 8))
    worst, where = 0.0, ""
    with torch.no_grad(), preserve(f.model), float64_casts():
        for at in ({}, noisy):
            params = {**f.params, **at}
            for args, kwargs in inputs:
                with rng_state():
                    before = f(params, args, kwargs)
                for part, group in singles[::step]:
                    with rng_state():
                        after = f({**params, **part.reflect(params, group)}, args, kwargs)
                    for a, b in zip(before, after, strict=True):
                        change = float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0
                        if not change <= worst:
                            worst, where = change if change == change else float("inf"), part.labels[group or 0]
    note = "" if worst <= within else f"The reflection {where!r} changes the outputs by {worst:.2g} relative, more than {within:g}."
    finite = worst < float("inf")
    status: Any = "ok" if worst <= within else "violated" if finite else "not_converged"
    return Estimate(worst, status=status, note=note, assumptions=("float64", f"{len(inputs)} inputs"), refs=("dcs-mirror-symmetry R1",))
