"""The gambler's loss: a classifier with one extra output, the stake it keeps; its gradient, optimum, plateau and early stopping.

Source: deep-gamblers R1-R4, gamblers-noisy-labels R1-R4. Convention here: loss -log(p_y + k / o), the authors' code; the paper's
-log(o p_y + k) is smaller by log o.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Reduction = Literal["mean", "sum", "none"]
PayoffRule = Literal["mid", "exp", "euc"]


def gambler_loss(logits: Tensor, target: Tensor, payoff: float | Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """-log(p_y + k / o): m classes and the reserve k, in log space and in float32 at least.

    Args:
        logits: (B, m + 1, ...) or (m + 1,); the last class is the reserve.
        target: (B, ...) class indices below m, or (B, m, ...) probabilities q, for -sum_j q_j log(p_j + k / o).
        payoff: o > 1; a number, (m,) one for each class, or (B, 1) one for each sample.
        reduction: as in `torch.nn.CrossEntropyLoss`.

    Returns:
        A scalar, or (B, ...) without reduction.

    Raises:
        ValueError: shapes that do not fit (logits without the reserve column among them), a payoff <= 1, a label outside 0..m-1.

    Source: deep-gamblers R1.
    """
    if logits.dim() < 1 or logits.shape[min(1, logits.dim() - 1)] < 3:
        raise ValueError(f"logits of shape {tuple(logits.shape)}: need at least two classes and the reserve along axis 1")
    axis = 0 if logits.dim() == 1 else 1
    classes = logits.shape[axis] - 1
    soft = target.is_floating_point()
    wanted = [*logits.shape[:axis], *([classes] if soft else []), *logits.shape[axis + 1 :]]
    if list(target.shape) != wanted:
        raise ValueError(
            f"target of shape {tuple(target.shape)} does not fit logits of shape {tuple(logits.shape)}, whose last class is the "
            f"reserve: expected {tuple(wanted)}"
        )
    _check_labels(target, classes, soft)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_f = torch.log_softmax(wide, axis)
    log_p, log_k = log_f.narrow(axis, 0, classes), log_f.narrow(axis, classes, 1)
    kept = log_k - _log_payoff(payoff, log_p, axis)
    if soft:
        loss = -(target.to(wide.dtype) * torch.logaddexp(log_p, kept)).sum(axis)
    else:
        index = target.unsqueeze(axis)
        mine = kept if kept.shape[axis] == 1 else kept.gather(axis, index)
        loss = -torch.logaddexp(log_p.gather(axis, index), mine).squeeze(axis)
    return _reduced(loss, reduction)


class GamblerLoss(nn.Module):
    """`gambler_loss` as a module, with the warm-up that a small payoff needs.

    From scratch a small payoff collapses to k = 1 at once and never learns; during the first ``pretrain_epochs`` the loss is the
    cross-entropy of the m classes, the reserve untouched. Tell it the epoch by `set_epoch`, as a distributed sampler.

    Args:
        payoff: o > 1, or "mid", "exp", "euc": an automatic payoff for each sample (`auto_payoff`); "euc" runs away to k = 1 and is
            there for comparison.
        reduction: as in `torch.nn.CrossEntropyLoss`.
        pretrain_epochs: epochs of cross-entropy before the gambling begins.

    Source: deep-gamblers R1 and its pitfalls, gamblers-noisy-labels R4.
    """

    epoch: Tensor
    payoff: Tensor

    def __init__(self, payoff: float | Tensor | PayoffRule, *, reduction: Reduction = "mean", pretrain_epochs: int = 0) -> None:
        super().__init__()
        if isinstance(payoff, str) and payoff not in ("mid", "exp", "euc"):
            raise ValueError(f"payoff rule must be 'mid', 'exp' or 'euc', got {payoff!r}")
        if not isinstance(payoff, str):
            _check_payoff(payoff)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{reduction!r} is not a valid value for reduction")
        self.reduction, self.pretrain_epochs = reduction, pretrain_epochs
        self.rule = payoff if isinstance(payoff, str) else None
        if not isinstance(payoff, str):
            self.register_buffer("payoff", torch.as_tensor(payoff, dtype=torch.get_default_dtype()))
        self.register_buffer("epoch", torch.tensor(0))
        self.warming = pretrain_epochs > 0
        self.register_load_state_dict_post_hook(_take_up)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0."""
        self.epoch.fill_(epoch)
        self.warming = epoch < self.pretrain_epochs

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of (B, m + 1, ...) logits."""
        if self.warming:
            axis = 0 if logits.dim() == 1 else 1
            _check_labels(target, logits.shape[axis] - 1, target.is_floating_point())
            return nn.functional.cross_entropy(logits.narrow(axis, 0, logits.shape[axis] - 1), target, reduction=self.reduction)
        payoff = self.payoff if self.rule is None else auto_payoff(logits, self.rule)
        return gambler_loss(logits, target, payoff, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Payoff and warm-up."""
        return f"payoff={self.rule or self.payoff.tolist()}, pretrain_epochs={self.pretrain_epochs}"


def _take_up(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, GamblerLoss)
    module.set_epoch(int(module.epoch))


@torch.no_grad()
def auto_payoff(logits: Tensor, rule: PayoffRule = "mid") -> Tensor:
    """A payoff for each sample from its own class outputs, no gradient: with s = sum p = 1 - k and r = p / s,

    "mid": 1 / (s sum r^2); "exp": exp(entropy of r) / s; "euc": 1 / sum r^2. The factor 1 / s raises the payoff as the net
    abstains; "euc" lacks it and collapses to k = 1.

    Args:
        logits: (B, m + 1, ...).

    Returns:
        (B, 1, ...), kept above 1.

    Source: gamblers-noisy-labels R4.
    """
    f = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)
    p = f[:, :-1]
    s = p.sum(1, keepdim=True).clamp_min(1e-10)
    r = p / s
    if rule == "exp":
        return (torch.exp(torch.special.entr(r).sum(1, keepdim=True)) / s).clamp_min(1 + 1e-6)
    spread = 1 / r.square().sum(1, keepdim=True)
    return (spread / s if rule == "mid" else spread).clamp_min(1 + 1e-6)


class AbstainHead(nn.Module):
    """A classifier head with one more output, the reserve, whose logit starts low so that small payoffs can learn.

    Args:
        linear: the head to extend, (in_features -> m).
        reserve_bias: initial bias of the reserve; its weights start at zero.

    Shape:
        (..., in_features) -> (..., m + 1), the reserve last.
    """

    def __init__(self, linear: nn.Linear, reserve_bias: float = -3.0) -> None:
        super().__init__()
        self.linear = linear
        self.reserve = nn.Linear(linear.in_features, 1, device=linear.weight.device, dtype=linear.weight.dtype)
        nn.init.zeros_(self.reserve.weight)
        nn.init.constant_(self.reserve.bias, reserve_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits and the reserve's, (..., m + 1)."""
        return torch.cat([self.linear(x), self.reserve(x)], dim=-1)


class Bet(NamedTuple):
    """The optimum of the gambler's loss: ``p`` (..., m), the reserve ``k`` (...) and the loss ``value`` (...)."""

    p: Tensor
    k: Tensor
    value: Tensor


def kelly_reserve(q: Tensor, payoff: float | Tensor) -> Bet:
    """Best bets and reserve for known class probabilities: the minimum of -sum_j q_j log(p_j + k / o).

    With S = {j : q_j > k / o}: p_j = q_j - k / o on S, k = (1 - sum_S q) / (1 - len(S) / o), S filled in the order of decreasing q.
    o > m never abstains; max q <= 1 / o keeps everything. Differentiable almost everywhere.

    Args:
        q: (..., m), non-negative, sums to 1.
        payoff: o >= 1; a number or (...).

    Raises:
        ValueError: q is not a distribution, or a payoff below 1.

    Source: deep-gamblers R3.
    """
    if not bool(((q >= 0).all(-1) & ((q.sum(-1) - 1).abs() < 1e-4)).all()):
        raise ValueError("q must be non-negative and sum to 1 along its last axis")
    o = torch.as_tensor(payoff, dtype=q.dtype, device=q.device)
    if not bool((o >= 1).all()):
        raise ValueError(f"the payoff must be at least 1, got {o.min().item()}")
    o = o.expand(q.shape[:-1])[..., None]
    ordered = q.sort(-1, descending=True).values
    size = torch.arange(q.shape[-1] + 1, device=q.device)
    left = 1 - torch.cat([torch.zeros_like(q[..., :1]), ordered.cumsum(-1)], -1).clamp(max=1)
    share = 1 - size / o
    reserve = left / torch.where(share > 0, share, torch.ones_like(share))  # with the first 0..m classes bet on
    joins = (ordered > reserve[..., :-1] / o) & (share[..., 1:] > 0)
    count = joins.long().cumprod(-1).sum(-1, keepdim=True)
    k = reserve.gather(-1, count)
    p = (q - k / o).clamp_min(0)
    value = -torch.special.xlogy(q, p + k / o).sum(-1)
    return Bet(p, k[..., 0], value)


class Plateau(NamedTuple):
    """The gambler's loss where the clean structure is learned and no wrong label is: ``loss``, reserve ``k``, bet ``p``."""

    loss: float
    k: float
    p: float


def gambler_plateau(noise: float, payoff: float, classes: int) -> Plateau:
    """The optimum under symmetric label noise: k* = e o / (o - 1), p* = 1 - k*, L* = -(1-e) log(1-e) - e log(e / (o-1)).

    Args:
        noise: e, the fraction of labels that are really wrong, uniform over the m - 1 others.
        payoff: o in [1 / (1 - e), m].
        classes: m.

    Raises:
        ValueError: outside that range: below, everything is kept (k = 1); above, nothing; use `kelly_reserve`.

    Source: gamblers-noisy-labels R1, R2; loss in the convention of this module.
    """
    if not 0 <= noise < 1 or classes < 2:
        raise ValueError(f"need noise in [0, 1) and at least two classes, got {noise} and {classes}")
    if not 1 < payoff <= classes or payoff < 1 / (1 - noise):
        raise ValueError(f"payoff {payoff} has no plateau: it must lie between 1 / (1 - noise) = {1 / (1 - noise):.4g} and m = {classes}")
    k = noise * payoff / (payoff - 1)
    lost = noise * math.log(noise / (payoff - 1)) if noise > 0 else 0.0
    return Plateau(-(1 - noise) * math.log1p(-noise) - lost, k, 1 - k)


class PlateauStop:
    """Stop at the first epoch whose mean training loss is below the plateau: from there on wrong labels are memorised.

    The loss must have been above the plateau once since the warm-up, since a net warmed by cross-entropy may start below it. Feed it
    losses in evaluation mode: dropout and augmentation lift them.

    Args:
        noise, payoff, classes: of `gambler_plateau`. Too large a noise stops too early.
        patience: epochs in a row below the plateau.
        warmup: epochs that are not looked at.

    Source: gamblers-noisy-labels R2.
    """

    def __init__(self, noise: float, payoff: float, classes: int, *, patience: int = 1, warmup: int = 0) -> None:
        if patience < 1 or warmup < 0:
            raise ValueError(f"patience must be at least 1 and warmup not negative, got {patience} and {warmup}")
        self.threshold = gambler_plateau(noise, payoff, classes).loss
        self.patience, self.warmup = patience, warmup
        self.epochs, self.below, self.was_above = 0, 0, False

    def update(self, mean_loss: float) -> bool:
        """Take the mean training loss of one epoch; whether to stop now.

        Raises:
            ValueError: the loss is not finite.
        """
        if not math.isfinite(mean_loss):
            raise ValueError(f"the training loss is {mean_loss}")
        self.epochs += 1
        if self.epochs <= self.warmup:
            return False
        if mean_loss >= self.threshold:
            self.was_above, self.below = True, 0
        elif self.was_above:
            self.below += 1
        return self.below >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"epochs": self.epochs, "below": self.below, "was_above": self.was_above}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a stored state."""
        self.epochs, self.below, self.was_above = (state_dict[key] for key in ("epochs", "below", "was_above"))


def _check_payoff(payoff: float | Tensor) -> None:
    smallest = payoff.min().item() if isinstance(payoff, Tensor) else payoff
    if not smallest > 1:
        raise ValueError(f"the payoff must be above 1, or keeping the stake is always best; got {smallest}")


def _check_labels(target: Tensor, classes: int, soft: bool) -> None:
    # reading values would stop a GPU and break a graph; there `gather` itself refuses an index out of range
    if soft or target.numel() == 0 or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels run from {low} to {high}, but the logits have {classes} classes before the reserve: "
            "labels must lie in 0..m-1 and logits have m + 1 columns"
        )


def _log_payoff(payoff: float | Tensor, log_p: Tensor, axis: int) -> Tensor | float:
    if not isinstance(payoff, Tensor) or payoff.dim() == 0:
        if not torch.compiler.is_compiling():
            _check_payoff(payoff)
        return payoff.to(log_p.dtype).log() if isinstance(payoff, Tensor) else math.log(payoff)
    if payoff.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_payoff(payoff)
    log_o = payoff.to(log_p.dtype).log()
    if payoff.dim() == 1 and payoff.shape[0] == log_p.shape[axis]:
        return log_o.view(-1, *[1] * (log_p.dim() - axis - 1))
    if axis == 1 and payoff.dim() >= 2 and payoff.shape[:2] == (log_p.shape[0], 1):
        return log_o.view(*payoff.shape, *[1] * (log_p.dim() - payoff.dim()))
    raise ValueError(
        f"payoff of shape {tuple(payoff.shape)} is neither a number, nor ({log_p.shape[axis]},) for the classes, "
        f"nor ({log_p.shape[0]}, 1) for the samples"
    )


def _reduced(loss: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{reduction!r} is not a valid value for reduction")
    return loss.mean() if reduction == "mean" else loss.sum()
