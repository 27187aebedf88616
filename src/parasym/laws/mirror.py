"""When a mirror of the loss catches training: how much decay or gradient noise it takes, and what decay to a random point does to it.

Near the surface c = O^T theta = 0 a step of SGD is linear in c: c <- (1 - eta (O^T H_B O + 2 gamma)) c. Its mean decides what weight
decay does, its top Lyapunov exponent what noise does.

Source: dcs-mirror-symmetry R1, R2; stochastic-collapse R2; syre R3; parameter-symmetry-unifies R5, R6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.measure.gradients import LossFn, Objective
from parasym.symmetry.mirror import Mirror


@dataclass(frozen=True)
class MirrorThresholds:
    """What a mirror does to training near its surface.

    Attributes:
        decay: torch's weight decay above which the surface attracts the mean loss, -lambda_min(O^T H O); negative where it does anyway.
        rate: growth of log |c| per step of full-batch descent in the softest normal direction.
        exponent: top Lyapunov exponent of log |c| per step of SGD, with its standard error.
    """

    decay: Estimate
    rate: Estimate
    exponent: Estimate

    @property
    def collapsed(self) -> bool | None:
        """Whether SGD ends on the surface; None where the exponent is within two standard errors of zero."""
        value, error = float(self.exponent), float(self.exponent.stderr or 0.0)
        return None if abs(value) <= 2 * error else value < 0

    def escape_steps(self, start: float, end: float = 1.0) -> float:
        """Steps of full-batch descent from |c| = ``start`` to ``end``; infinite where the surface attracts."""
        return math.log(end / start) / float(self.rate) if float(self.rate) > 0 else math.inf


def normal_hessians(model: nn.Module, loss_fn: LossFn, data: tuple[Tensor, Tensor], mirror: Mirror) -> Tensor:
    """O^T H_i O of every sample at the nearest point of the surface, (n, r, r), float64.

    Args:
        loss_fn: of an output and a target, a mean over samples.
        data: inputs and targets, samples first.

    Raises:
        InputError: the mirror moves a parameter that is not a trainable one of the model.
    """
    objective = Objective(model, loss_fn, dtype=torch.float64)
    lost = [n for n in mirror.shapes if n not in objective.params]
    if lost:
        raise InputError(f"The mirror moves {lost[0]!r}, which is no trainable parameter of {type(model).__name__}.")
    point = {**objective.params, **mirror.project(objective.params)}

    def loss(c: Tensor, x: Tensor, y: Tensor) -> Tensor:
        moved = {n: point[n] + step for n, step in mirror.lift(c).items()}
        return objective({**point, **moved}, (x[None], y[None]))

    origin = torch.zeros(mirror.rank, dtype=torch.float64)
    x, y = (t.double() if t.is_floating_point() else t for t in data)
    return torch.func.vmap(torch.func.hessian(loss), (None, 0, 0), chunk_size=256)(origin, x, y).detach()


def mirror_thresholds(
    model: nn.Module,
    loss_fn: LossFn,
    data: tuple[Tensor, Tensor],
    mirror: Mirror,
    *,
    lr: float,
    batch_size: int,
    weight_decay: float = 0.0,
    steps: int = 2000,
    replicas: int = 32,
    seed: int = 0,
) -> MirrorThresholds:
    """Decay and noise thresholds of a mirror at the model's present weights, put on the surface; the model is not changed.

    Args:
        loss_fn, data: see `normal_hessians`.
        mirror: one mirror or several at once; cost grows with the square of their normal directions r.
        lr, batch_size, weight_decay: of SGD (torch's meaning), batches drawn with replacement.
        steps, replicas: of the product of random matrices whose growth is the exponent; a tenth of the steps is left out.
        seed: of its batches.

    The weights off the mirror are held: meant where they have settled, or change more slowly than c.
    """
    hessians = normal_hessians(model, loss_fn, data, mirror)
    n, r = hessians.shape[:2]
    softest = float(torch.linalg.eigvalsh(hessians.mean(0))[0])
    draws, burn = torch.Generator().manual_seed(seed), steps // 10
    c = torch.nn.functional.normalize(torch.randn(replicas, r, generator=draws, dtype=torch.float64), dim=-1)
    total = torch.zeros(replicas, dtype=torch.float64)
    for step in range(burn + steps):
        pick = torch.randint(n, (replicas, batch_size), generator=draws)
        c = (1 - lr * weight_decay) * c - lr * (hessians[pick].mean(1) @ c[..., None])[..., 0]
        size = c.norm(dim=-1, keepdim=True)
        c = c / size
        if step >= burn:
            total += size[:, 0].log()
    exponents = total / steps
    refs, held = ("dcs-mirror-symmetry R1, R2",), ("the weights off the mirror have settled",)
    return MirrorThresholds(
        Estimate(-softest, assumptions=held, refs=refs),
        Estimate(math.log(abs(1 - lr * (softest + weight_decay))), assumptions=held, refs=refs),
        Estimate(float(exponents.mean()), stderr=float(exponents.std() / replicas**0.5), assumptions=held, refs=refs),
    )


def syre_gap(mirror: Mirror, params: Mapping[str, Tensor], centre: Mapping[str, Tensor], gamma: float) -> Tensor:
    """l_r(R theta) - l_r(theta) = 4 gamma c.c0 of l + gamma |theta - theta0|^2: what is left of the mirror, one number (syre R3)."""
    return 4 * gamma * (mirror.coordinates(params) @ mirror.coordinates(centre))
