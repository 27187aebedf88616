"""LaProp: normalise each gradient first, average afterwards; a step is bounded for every pair of betas.

Source: laprop R1 (the recurrence of the authors' own class), R2-R4, R6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _default_to_fused_or_foreach,
    _disable_dynamo_if_unsupported,
    _use_grad_for_differentiable,
)

Decay = Literal["lr", "official", "l2"]
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_BUNCH = 1 << 18  # elements
_SCALARS = ("step", "exp_avg_lr_1", "exp_avg_lr_2")


class LaProp(Optimizer):
    r"""Adam with momentum and adaptivity separated: the gradient is divided by its own scale, the quotient is averaged.

    For every entry of every parameter, with b1, b2 = ``betas``::

        v  = b2 v + (1 - b2) g^2                 n = b2 n + (1 - b2)
        m  = b1 m + (1 - b1) lr g / d            l = b1 l + (1 - b1) lr          d = sqrt(v / n) + eps
        theta = theta - lr m / l

    The learning rate lives inside the momentum: at a constant rate this is the textbook form to rounding, after a change the
    gradients seen at the larger rate keep the larger weight. ``lr_in_momentum=False`` keeps it outside (Adam's habit).

    What holds (laprop R3, R4): abs(update / lr) <= 1 / sqrt(1 - b2) for every b1 < 1 and any gradients, while Adam's update is
    bounded only if b1^2 < b2; b2 = 0 is the momentum of gradient signs; b1 = 0 is Adam with b1 = 0. What does not: updates are
    not smaller than Adam's at the default betas, and small b2 inherits the bias of sign methods (R5; ``amsgrad`` mends it).

    Args:
        params: parameters, named parameters, or groups; every option below can be set for a group.
        lr: learning rate, >= 0; a one-element tensor needs ``capturable`` on the foreach path.
        betas: memories of the momentum and of the second moment, each in [0, 1); both may be zero.
        eps: added to the root of the second moment. 1e-15 leaves small gradients their full step; coordinates with zero
            gradient stay put.
        weight_decay: strength, >= 0.
        centered: divide by the standard deviation instead of the root mean square, after ``centered_warmup`` steps.
            Gradients without noise then get exploding steps (R6).
        centered_warmup: steps before centring begins.
        amsgrad: use the largest second moment seen. It is compared before bias correction, as in the authors' class.
        decoupled: what weight decay means. "lr": theta is multiplied by 1 - lr * weight_decay before the step, as in AdamW.
            "official": by 1 - weight_decay after the step, whatever lr is (decay both in a schedule). "l2": it is added to
            the gradient, as in Adam.
        lr_in_momentum: see above.
        foreach, maximize, capturable, differentiable: as in `torch.optim.Adam`. ``capturable`` also runs on the CPU.
        fused: reserved; there is no fused kernel. Compile the step instead: ``torch.compile(optimizer.step)``.

    State of a parameter: ``step``, ``exp_avg`` (m), ``exp_avg_sq`` (v), ``exp_avg_lr_1`` (l), ``exp_avg_lr_2`` (n) and, where
    asked for, ``exp_mean_avg_beta2`` and ``max_exp_avg_sq``: the names of the authors' class, whose checkpoints load. Parameters
    in half precision have their state in float32.

    Raises:
        ValueError: an option is out of range, or a parameter holds NaN or infinity at its first step.
        TypeError: a parameter has an integer or boolean dtype.
        RuntimeError: a gradient is sparse, or options exclude each other.

    Source: laprop R1-R6.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        centered: bool = False,
        centered_warmup: int = 10,
        amsgrad: bool = False,
        decoupled: Decay = "lr",
        lr_in_momentum: bool = True,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "centered": centered,
            "centered_warmup": centered_warmup,
            "amsgrad": amsgrad,
            "decoupled": decoupled,
            "lr_in_momentum": lr_in_momentum,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked like the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for p in group["params"]:
                if not (p.is_floating_point() or p.is_complex()):
                    raise TypeError(f"LaProp trains floating-point or complex parameters, not one of shape {tuple(p.shape)} and {p.dtype}")
        except Exception:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # A group without these keys was written by the authors' class, whose weight decay does not know the learning rate.
            for key, value in (("decoupled", "official"), ("lr_in_momentum", True), ("centered", False), ("centered_warmup", 10)):
                group.setdefault(key, value)
            for key in ("foreach", "fused"):
                group.setdefault(key, None)
            for key in ("amsgrad", "maximize", "capturable", "differentiable"):
                group.setdefault(key, False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike torch's, half-precision parameters get their float32 state back unrounded.

        States of the authors' class (Python numbers for ``step`` and the two sums) load too.
        """
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for group in self.param_groups:
            for p in group["params"]:
                state = state_dict["state"].get(saved.pop(0), {})
                for key, value in state.items():
                    # torch has cast every value but the step to the dtype and the device of the parameter
                    if key in _SCALARS:
                        self.state[p][key] = _scalar_like(value, key, p, group["capturable"])
                    elif p.dtype in _LOW_PRECISION and isinstance(value, Tensor):
                        self.state[p][key] = value.to(device=p.device, dtype=torch.float32, copy=True)

    def updates(self) -> list[Tensor]:
        """The last update of every parameter that has one, in units of the learning rate: m / l, shaped like the parameter.

        Its root mean square is sqrt((1 - b1) / (1 + b1)) for white gradients, and its size never exceeds 1 / sqrt(1 - b2).
        """
        states = [self.state[p] for group in self.param_groups for p in group["params"] if "exp_avg" in self.state.get(p, ())]
        # sums of zero: the learning rate has been zero throughout, and so has the momentum
        return [torch.nan_to_num(s["exp_avg"] / _number(s["exp_avg_lr_1"], s["exp_avg"]).to(s["exp_avg"].device), nan=0.0) for s in states]

    # torch.compile runs this method itself, outside its trace, and knows it by this name and by its lists of tensors.
    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        means: list[Tensor],
        maxima: list[Tensor],
        lr_sums: list[Tensor],
        norms: list[Tensor],
        state_steps: list[Tensor],
    ) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("LaProp does not support sparse gradients, please consider SparseAdam instead")
            state = self.state[p]
            if len(state) == 0:
                state.update(_fresh_state(p, group))
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            if group["centered"]:
                means.append(state["exp_mean_avg_beta2"])
            if group["amsgrad"]:
                maxima.append(state["max_exp_avg_sq"])
            lr_sums.append(state["exp_avg_lr_1"])
            norms.append(state["exp_avg_lr_2"])
            state_steps.append(state["step"])

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one step.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [], [], [], [])
            params, grads, exp_avgs, exp_avg_sqs, means, maxima, lr_sums, norms, state_steps = lists
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, means, maxima, lr_sums, norms, state_steps)
            if params:
                _laprop(
                    params,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    means,
                    maxima,
                    lr_sums,
                    norms,
                    state_steps,
                    options=_Options(
                        lr=group["lr"],
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        eps=group["eps"],
                        weight_decay=group["weight_decay"],
                        decoupled=group["decoupled"],
                        lr_in_momentum=group["lr_in_momentum"],
                        warmup=group["centered_warmup"] if group["centered"] else None,
                        amsgrad=group["amsgrad"],
                        maximize=group["maximize"],
                    ),
                    foreach=group["foreach"],
                    capturable=group["capturable"],
                    differentiable=group["differentiable"],
                )
        return loss


class _Options(NamedTuple):
    """What a group asks for; ``warmup`` is None unless the second moment is centred."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: str
    lr_in_momentum: bool
    warmup: int | None
    amsgrad: bool
    maximize: bool


class _Item(NamedTuple):
    """One parameter with its gradient and state, complex tensors as pairs of reals."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    mean: Tensor | None
    vmax: Tensor | None
    lr_sum: Tensor
    norm: Tensor
    step: Tensor


@_disable_dynamo_if_unsupported()
def _laprop(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    means: list[Tensor],
    maxima: list[Tensor],
    lr_sums: list[Tensor],
    norms: list[Tensor],
    state_steps: list[Tensor],
    *,
    options: _Options,
    foreach: bool | None,
    capturable: bool,
    differentiable: bool,
) -> None:
    """Choose the form of the step, and step."""
    by_tensors = capturable or differentiable or torch.compiler.is_compiling()
    if foreach is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable, use_fused=False)
        foreach = foreach and not (isinstance(options.lr, Tensor) and not capturable)
    if by_tensors and options.warmup is not None:
        foreach = False  # whether centring has begun is then a tensor of each parameter, which no foreach operator takes
    if isinstance(options.lr, Tensor) and not by_tensors:
        options = options._replace(lr=options.lr.item())
    items = []
    for i, p in enumerate(params):
        real = torch.view_as_real if p.is_complex() else _same
        g = (-grads[i] if options.maximize else grads[i]).to(exp_avg_sqs[i].dtype)
        if options.weight_decay != 0 and options.decoupled == "l2":
            g = g + options.weight_decay * p.to(g.dtype)
        mean, vmax = (real(states[i]) if states else None for states in (means, maxima))
        items.append(_Item(real(p), real(g), real(exp_avgs[i]), real(exp_avg_sqs[i]), mean, vmax, lr_sums[i], norms[i], state_steps[i]))
    if options.weight_decay != 0 and options.decoupled == "lr":
        _scale(items, 1 - options.lr * options.weight_decay, foreach)
    if foreach:
        _foreach_step(items, options, by_tensors)
    else:
        for item in items:
            if by_tensors:
                _step_by_tensors(item, options)
            else:
                _step_in_place(item, options)
    if options.weight_decay != 0 and options.decoupled == "official":
        _scale(items, 1 - options.weight_decay, foreach)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _scale(items: list[_Item], factor: float | Tensor, foreach: bool) -> None:
    if foreach:
        torch._foreach_mul_([item.p for item in items], factor)
    else:
        for item in items:
            item.p.mul_(factor)


def _step_in_place(item: _Item, options: _Options) -> None:
    """The eager step: numbers for the coefficients, one temporary."""
    beta1, beta2 = options.beta1, options.beta2
    inner = options.lr if options.lr_in_momentum else 1.0
    step = item.step.add_(1)
    lr_sum = item.lr_sum.mul_(beta1).add_((1 - beta1) * inner).item()
    norm = item.norm.mul_(beta2).add_(1 - beta2).item()
    # sqrt(v / n) + eps = (sqrt(v) + eps sqrt(n)) / sqrt(n): the factor joins that of the momentum and saves a pass
    root_norm = norm**0.5
    item.v.mul_(beta2).addcmul_(item.g, item.g, value=1 - beta2)
    scale = item.v
    if options.warmup is not None:
        assert item.mean is not None
        item.mean.mul_(beta2).add_(item.g, alpha=1 - beta2)
    centred = options.warmup is not None and step.item() > options.warmup
    if centred:
        assert item.mean is not None
        scale = torch.addcmul(item.v, item.mean, item.mean, value=-1).clamp_(min=0)
    if options.amsgrad and (centred or options.warmup is None):
        assert item.vmax is not None
        scale = torch.maximum(item.vmax, scale, out=item.vmax)
    root = scale.sqrt().add_(options.eps * root_norm)
    item.m.mul_(beta1).addcdiv_(item.g, root, value=(1 - beta1) * inner * root_norm)
    item.p.add_(item.m, alpha=-_size(options, lr_sum))


def _size(options: _Options, lr_sum: float) -> float:
    """What multiplies m in the step; a rate of zero lets the momentum it already has run out (R2)."""
    lr = options.lr
    assert not isinstance(lr, Tensor)
    if not options.lr_in_momentum:
        return lr / lr_sum
    return lr / lr_sum if lr != 0 else 1.0


def _step_by_tensors(item: _Item, options: _Options) -> None:
    """The same step for graphs: no number is read from a tensor, and every new value is written once, from pure expressions."""
    beta1, beta2, lr = options.beta1, options.beta2, options.lr
    inner = lr if options.lr_in_momentum else 1.0
    step, lr_sum, norm = item.step + 1, beta1 * item.lr_sum + (1 - beta1) * inner, beta2 * item.norm + (1 - beta2)
    v = beta2 * item.v + (1 - beta2) * item.g * item.g
    scale, mean, vmax = v, item.mean, item.vmax
    started: Tensor | None = None
    if options.warmup is not None:
        assert item.mean is not None
        mean = beta2 * item.mean + (1 - beta2) * item.g
        started = (step > options.warmup).to(v.device)
        scale = torch.where(started, (v - mean * mean).clamp(min=0), v)
    if options.amsgrad:
        assert item.vmax is not None
        vmax = torch.maximum(item.vmax, scale)
        if started is not None:
            vmax = torch.where(started, vmax, item.vmax)
        scale = vmax if started is None else torch.where(started, vmax, scale)
    m = beta1 * item.m + (1 - beta1) * inner * (item.g / ((scale / _number(norm, v)).sqrt() + options.eps))
    p = item.p - _number(_size_by_tensors(options, lr_sum), v) * m
    for old, new in ((item.step, step), (item.lr_sum, lr_sum), (item.norm, norm), (item.v, v), (item.m, m), (item.p, p)):
        old.copy_(new)
    for state, value in ((item.mean, mean), (item.vmax, vmax)):
        if state is not None and value is not None:
            state.copy_(value)


def _number(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).reshape(())


def _size_by_tensors(options: _Options, lr_sum: Tensor) -> Tensor:
    if not isinstance(options.lr, Tensor):
        return options.lr / lr_sum if options.lr != 0 or not options.lr_in_momentum else torch.ones_like(lr_sum)
    if not options.lr_in_momentum:
        return options.lr / lr_sum
    # the inner `where` keeps 0 / 0 out of the gradient as well as out of the value
    still = options.lr == 0
    return torch.where(still, torch.ones_like(lr_sum), options.lr / torch.where(still, torch.ones_like(lr_sum), lr_sum))


def _foreach_step(items: list[_Item], options: _Options, by_tensors: bool) -> None:
    """The step by foreach operators, over parameters of one device, dtype and history at a time."""
    beta1, beta2 = options.beta1, options.beta2
    inner = options.lr if options.lr_in_momentum else 1.0
    torch._foreach_add_([item.step for item in items], 1)
    for sums, beta, value in (([i.lr_sum for i in items], beta1, inner), ([i.norm for i in items], beta2, 1.0)):
        torch._foreach_mul_(sums, beta)
        torch._foreach_add_(sums, (1 - beta) * value)
    bunches: dict[Any, list[_Item]] = {}
    filled = 0
    for item in items:
        history = () if by_tensors else (item.lr_sum.item(), item.norm.item(), item.step.item() if options.warmup is not None else 0)
        # on the CPU these operators are loops, and small bunches keep their temporaries in the cache
        filled += item.p.numel() if item.p.device.type == "cpu" else 0
        bunches.setdefault((item.p.device, item.p.dtype, *history, filled // _BUNCH), []).append(item)
    for key, bunch in bunches.items():
        p, g, m, v = [i.p for i in bunch], [i.g for i in bunch], [i.m for i in bunch], [i.v for i in bunch]
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        scale = v
        centred = options.warmup is not None and key[4] > options.warmup
        if options.warmup is not None:
            mean = [item.mean for item in bunch if item.mean is not None]
            torch._foreach_mul_(mean, beta2)
            torch._foreach_add_(mean, g, alpha=1 - beta2)
            if centred:
                scale = list(torch._foreach_addcmul(v, mean, mean, value=-1))
                torch._foreach_clamp_min_(scale, 0.0)
        if options.amsgrad and (centred or options.warmup is None):
            vmax = [item.vmax for item in bunch if item.vmax is not None]
            torch._foreach_maximum_(vmax, scale)
            scale = vmax
        torch._foreach_mul_(m, beta1)
        if by_tensors:
            root = list(torch._foreach_div(scale, [_number(item.norm, item.v) for item in bunch]))
            torch._foreach_sqrt_(root)
            torch._foreach_add_(root, options.eps)
            part = list(torch._foreach_div(g, root))
            torch._foreach_mul_(part, (1 - beta1) * inner)
            torch._foreach_add_(m, part)
            sizes = [_number(_size_by_tensors(options, item.lr_sum), item.v) for item in bunch]
            torch._foreach_sub_(p, list(torch._foreach_mul(m, sizes)))
        else:
            root_norm = key[3] ** 0.5
            root = list(torch._foreach_sqrt(scale))
            torch._foreach_add_(root, options.eps * root_norm)
            torch._foreach_addcdiv_(m, g, root, value=(1 - beta1) * inner * root_norm)
            torch._foreach_add_(p, m, alpha=-_size(options, key[2]))


def _fresh_state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    weights = p.detach()
    if not bool(torch.isfinite(weights.to_local() if hasattr(weights, "to_local") else weights).all()):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} holds NaN or infinity before its first LaProp step")
    names = ["exp_avg", "exp_avg_sq"]
    names += ["exp_mean_avg_beta2"] * group["centered"] + ["max_exp_avg_sq"] * group["amsgrad"]
    dtype = torch.float32 if p.dtype in _LOW_PRECISION else p.dtype
    state = {key: _scalar_like(0.0, key, p, group["capturable"]) for key in _SCALARS}
    return state | {name: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) for name in names}


def _scalar_like(value: float | Tensor, key: str, p: Tensor, capturable: bool) -> Tensor:
    """A scalar of the state: on the CPU, where reading it is free, unless the step must not read it at all."""
    # the step is float32 like torch's; the sums are exact where the device has float64
    double = key != "step" and (not capturable or p.dtype in (torch.float64, torch.complex128))
    dtype = torch.float64 if double else torch.float32
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    # one entry, not zero dimensions: torch 2.13's compiler loses writes to float64 scalars on the CPU
    return value.to(device=p.device if capturable else "cpu", dtype=dtype, copy=True).reshape(() if key == "step" else 1)


def _check_options(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if group["foreach"] and not group["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    # "not (in range)" also refuses NaN
    if not 0.0 <= (lr.item() if isinstance(lr, Tensor) else lr) < float("inf"):
        raise ValueError(f"Invalid learning rate: {lr}")
    if len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= group["eps"] < float("inf"):
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if not 0.0 <= group["weight_decay"] < float("inf"):
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if group["decoupled"] not in ("lr", "official", "l2"):
        raise ValueError(f"decoupled must be 'lr', 'official' or 'l2', got {group['decoupled']!r}")
    if group["decoupled"] == "official" and group["weight_decay"] > 1:
        raise ValueError(f"official weight decay multiplies weights by 1 - weight_decay; {group['weight_decay']} would turn their sign")
    if group["centered_warmup"] < 0:
        raise ValueError(f"Invalid centered_warmup: {group['centered_warmup']}")
    if group["fused"]:
        raise RuntimeError("LaProp has no fused kernel; compile the step instead: step = torch.compile(optimizer.step)")
    if group["foreach"] and group["differentiable"]:
        raise RuntimeError("`foreach` does not support `differentiable`")
