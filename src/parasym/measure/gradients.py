"""Per-sample gradients and their moments, streamed: gradient noise without a matrix of size parameters x parameters.

The gradient of one sample is taken by ``vmap(grad)``, a chunk of samples together; where an operator has no batching rule, one
sample at a time. Nothing of size samples x parameters is kept: each chunk is reduced to sums, in float64. Where only squares are
wanted and every parameter belongs to a known layer, they come from two passes of ordinary backpropagation (`squares`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from parasym.core.errors import InputError
from parasym.core.functional import Functional, functional
from parasym.core.guards import math_attention, no_checkpointing, preserve, rng_state
from parasym.core.results import Estimate

Gradient = dict[str, Tensor]
Form = Callable[[Gradient], Tensor]
LossFn = Callable[[Any, Any], Tensor]
_BUDGET = 256e6  # bytes of per-sample gradients alive at once


class Objective:
    """A model, its loss and its trainable parameters as one function ``objective(params, batch) -> loss``.

    Args:
        model: any module, in the mode to be measured in; never changed.
        loss_fn: ``loss_fn(output, target)`` -> one number, a mean over samples. A batch is then a pair (input, target), the input a
            tensor, a tuple of positional or a dict of keyword arguments. None: a batch is the model's arguments, and the model returns
            its loss (as ``out.loss``, ``out["loss"]`` or itself).
        dtype: when set, parameters, buffers and floating inputs are cast to it.

    Attributes:
        params: canonical name -> detached trainable parameter. frozen: names left out because ``requires_grad`` is off.

    Raises:
        InputError: no trainable parameter, or weights that cannot be used.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn | None = None, *, dtype: torch.dtype | None = None) -> None:
        whole = functional(model)
        self.functional: Functional = whole.to(dtype) if dtype is not None else whole
        self.model, self.loss_fn = self.functional.model, loss_fn
        self.frozen = tuple(sorted(self.functional.frozen))
        self.params = {n: p for n, p in self.functional.params.items() if n not in self.functional.frozen and p.numel()}
        if not self.params:
            raise InputError(f"{type(model).__name__} has no trainable parameter: every one is frozen (requires_grad=False).")

    def __call__(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Loss at the given parameters (frozen ones keep the model's values). Differentiable."""
        if self.loss_fn is None:
            out = self.functional.output(params, *_as_arguments(batch))
            found = out if isinstance(out, Tensor) else getattr(out, "loss", None)
            found = out.get("loss") if found is None and isinstance(out, Mapping) else found
            if not isinstance(found, Tensor):
                raise InputError(f"{type(self.model).__name__} returned {type(out).__name__} without a loss: give loss_fn(output, target).")
            return found
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"A batch must be a pair (input, target) for a loss_fn, got {_kind(batch)}.")
        return self.loss_fn(self.functional.output(params, *_as_arguments(batch[0])), batch[1])

    @property
    def coupled(self) -> list[str]:
        """Modules through which the samples of a batch see one another: batch norms that use the batch's statistics."""
        return coupled_modules(self.model)

    @property
    def stochastic(self) -> bool:
        """Whether dropout is active."""
        return any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in self.model.modules())


def _as_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})


def _kind(x: Any) -> str:
    return f"{type(x).__name__} of {len(x)}" if isinstance(x, tuple | list | Mapping) else type(x).__name__


def batch_size(batch: Any) -> int:
    """Number of samples: the common first dimension of the batch's tensors.

    Raises:
        InputError: there is none, they differ, or the batch is empty.
    """
    sizes = {t.shape[0] for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim}
    if len(sizes) != 1:
        raise InputError(f"The tensors of a batch must share their first dimension, the samples; found {sorted(sizes) or 'no tensor'}.")
    n = sizes.pop()
    if n == 0:
        raise InputError("The batch is empty.")
    return n


def batches(loader: Any) -> Iterator[Any]:
    """Batches of a loader, or of a list of batches; a single batch (a tuple or dict of tensors) stands for itself.

    Raises:
        InputError: there is none.
    """
    if isinstance(loader, Mapping) or (isinstance(loader, tuple) and any(isinstance(t, Tensor) for t in loader)):
        yield loader
        return
    if not isinstance(loader, Iterable):
        raise InputError(f"Give a loader, a list of batches or one batch, got {type(loader).__name__}.")
    empty = True
    for batch in loader:
        empty = False
        yield tuple(batch) if isinstance(batch, list) else batch
    if empty:
        raise InputError("The loader gave no batch.")


# --------------------------------------------------------------------------------------------------------- per-sample gradients


def per_sample(
    objective: Objective, batch: Any, *, params: Mapping[str, Tensor] | None = None, chunk: int | None = None
) -> Iterator[Chunk]:
    """Yield the gradients of a batch's samples, a chunk at a time, without keeping them.

    Args:
        objective: model and loss.
        batch: its tensors share their first dimension.
        params: where; the model's own if not given.
        chunk: samples together; by default as many as fit 256 MB of gradients.

    Raises:
        InputError: batch-coupled layers, a loss that is not one number for one sample, or a gradient that is not finite.
    """
    refuse_coupled(objective)
    point = {n: p.detach() for n, p in (objective.params if params is None else params).items()}
    n, size = batch_size(batch), sum(p.numel() * p.element_size() for p in point.values())
    step = chunk or max(1, min(n, int(_BUDGET // max(size, 1))))
    leaves, spec = pytree.tree_flatten(batch)
    axes = [0 if isinstance(t, Tensor) and t.ndim else None for t in leaves]

    def one(p: Mapping[str, Tensor], *parts: Any) -> Tensor:
        single = [t if a is None else t[None] for t, a in zip(parts, axes, strict=True)]
        loss = objective(p, pytree.tree_unflatten(single, spec))
        if loss.numel() != 1:
            raise InputError(f"The loss must be one number, got shape {tuple(loss.shape)}: reduce it by a mean over samples.")
        return loss.reshape(())

    together = vmap(grad_and_value(one), in_dims=(None, *axes), randomness="different")
    reason = ""
    for start in range(0, n, step):
        part = [t if a is None else t[start : start + step] for t, a in zip(leaves, axes, strict=True)]
        count = min(step, n - start)
        with torch.enable_grad(), torch.inference_mode(False), rng_state(), math_attention(), no_checkpointing(), preserve(objective.model):
            if not reason:
                try:
                    grads, losses = together(point, *part)
                except InputError:
                    raise
                except Exception as e:
                    if isinstance(e, MemoryError | torch.OutOfMemoryError):
                        raise
                    reason = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160]}"
            if reason:
                rows = [_single(one, point, [t if a is None else t[i] for t, a in zip(part, axes, strict=True)]) for i in range(count)]
                grads = {k: torch.stack([r[0][k] for r in rows]) for k in point}
                losses = torch.stack([r[1] for r in rows])
        grads = {k: g.detach() for k, g in grads.items()}
        bad = [k for k, g in grads.items() if not bool(torch.isfinite(g).all())]
        if bad or not bool(torch.isfinite(losses).all()):
            raise InputError(f"The gradient of a sample is not finite{f' in {bad[0]}' if bad else ''}: check the batch and the weights.")
        yield Chunk(grads, losses.detach(), "one by one" if reason else "vmap", reason)


def _single(one: Callable[..., Tensor], point: Mapping[str, Tensor], parts: list[Any]) -> tuple[Gradient, Tensor]:
    """Gradient and loss of one sample by ordinary autograd, which needs no rule of torch.func."""
    leaves = {k: p.detach().requires_grad_() for k, p in point.items()}
    loss = one(leaves, *parts)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), loss.detach()


@dataclass(frozen=True, eq=False)
class Chunk:
    """Gradients name -> (b, *shape) and losses (b,) of b samples; what computed them, and why not vmap."""

    gradients: Gradient
    losses: Tensor
    backend: str
    reason: str = ""


def refuse_coupled(objective: Objective) -> None:
    """Raise InputError where a sample's gradient does not exist because a batch norm mixes samples."""
    refuse_coupled_model(objective.model)


def coupled_modules(model: nn.Module) -> list[str]:
    """Modules through which the samples of a batch see one another: batch norms that use the batch's statistics."""
    norms = ((n, m) for n, m in model.named_modules() if isinstance(m, _NormBase) and "Instance" not in type(m).__name__)
    return [n or type(m).__name__ for n, m in norms if m.training or m.running_mean is None]


def refuse_coupled_model(model: nn.Module) -> None:
    """As `refuse_coupled`, for a bare model."""
    if coupled := coupled_modules(model):
        raise InputError(
            f"{coupled[0]} normalises by batch statistics, so one sample has no gradient of its own: call model.eval(), use "
            " GroupNorm, or measure the noise between batches (gradient_moments with unit='batch')."
        )


def check_mean(objective: Objective, batch: Any, mean_of_samples: float) -> None:
    """Refuse a batch loss that is not the mean of its samples' losses.

    Raises:
        InputError: says whether it looks like a sum, or by how much it differs.
    """
    if objective.stochastic:
        return
    with torch.no_grad(), rng_state(), preserve(objective.model):
        found = objective(objective.params, batch)
    if found.numel() != 1:
        raise InputError(f"The loss of a batch must be one number, got shape {tuple(found.shape)}: reduce it by a mean over samples.")
    whole, n = float(found), batch_size(batch)
    eps = max(torch.finfo(p.dtype).eps for p in objective.params.values()) ** 0.5
    scale = max(abs(whole), abs(mean_of_samples), 1e-30)
    if abs(whole - mean_of_samples) <= 10 * eps * scale:
        return
    if abs(whole - n * mean_of_samples) <= 10 * eps * scale * n:
        raise InputError(f"The loss is a sum over the {n} samples, not a mean: divide it by their number (reduction='mean').")
    raise InputError(
        f"The loss of the batch is {whole:.6g}, the mean of its samples' losses {mean_of_samples:.6g}: the loss is not a mean over samples "
        "(weighted or token-wise mean), or a layer mixes them. Reduce within each sample first, then average over samples."
    )


# ------------------------------------------------------------------------------------- squares from one ordinary backward pass


Rule = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]


def layerwise(objective: Objective, batch: Any, *, squares: bool = True) -> tuple[Gradient, Gradient, Tensor, float] | str:
    """Squares of per-sample gradients from one forward and backward pass, where parameters sit in known layers used once.

    The gradient of a sample in a layer is a product of what entered the layer and what came back to its output; its squares follow
    from the two without a second pass (linear, convolution, embedding, layer and group norm, batch norm in eval mode). Parameters
    that sit elsewhere are done by vmap, as long as they are the smaller part.

    Args:
        objective: model and a loss that is a mean over samples.
        batch: its tensors share their first dimension.
        squares: also the sum of squares entry by entry (else only norms).

    Returns:
        (mean gradient, sum over samples of g^2 entry by entry, |g|^2 of each sample (B,), loss), or why it cannot be done.
    """
    count = batch_size(batch)
    owners, rest = _owners(objective)
    if (reason := _too_much(objective, rest)) or not owners:
        return reason
    inputs: dict[nn.Module, list[Tensor]] = {m: [] for m in owners}
    returned: dict[nn.Module, list[Tensor]] = {m: [] for m in owners}

    def record(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        inputs[module].append(args[0].detach())
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(lambda g: returned[module].append(g.detach()))

    hooks = [m.register_forward_hook(record) for m in owners]
    try:
        with torch.enable_grad(), rng_state(), math_attention(), no_checkpointing(), preserve(objective.model):
            leaves = {n: p.detach().requires_grad_() for n, p in objective.params.items()}
            loss = objective(leaves, batch)
            if loss.numel() != 1:
                raise InputError(f"The loss must be one number, got shape {tuple(loss.shape)}: reduce it by a mean over samples.")
            found = torch.autograd.grad(loss.reshape(()), list(leaves.values()), allow_unused=True, materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    mean = {n: g.detach() for n, g in zip(leaves, found, strict=True)}
    norms = torch.zeros(count, dtype=torch.float64, device=loss.device)
    square: Gradient = {}
    with torch.no_grad():
        for module, names in owners.items():
            seen = inputs[module], returned[module]
            if len(seen[0]) != 1 or len(seen[1]) != 1 or seen[0][0].shape[0] != count or seen[1][0].shape[0] != count:
                rest += [(n, "its layer is called several times, or without the samples first") for n in names.values()]
                continue
            for attr, (norm, total) in _layer(module, seen[0][0], seen[1][0] * count, names, squares).items():
                norms += norm.double()
                if squares:
                    square[names[attr]] = total
    if reason := _too_much(objective, rest):
        return reason
    if rest:
        _others(objective, batch, [n for n, _ in rest], norms, square if squares else None)
    return mean, square, norms.cpu(), float(loss.detach())


def _too_much(objective: Objective, rest: list[tuple[str, str]]) -> str:
    """Why the layers' way is not worth it: the parameters they do not cover are the larger part."""
    left = sum(objective.params[n].numel() for n, _ in rest)
    if 2 * left <= sum(p.numel() for p in objective.params.values()):
        return ""
    return f"{rest[0][0]}: {rest[0][1]}"


def _others(objective: Objective, batch: Any, names: list[str], norms: Tensor, square: Gradient | None) -> None:
    """Add what the parameters outside of known layers contribute, by vmap over samples."""
    start = 0
    for part in per_sample(objective, batch, params={n: objective.params[n] for n in names}):
        for n, g in part.gradients.items():
            s = g.square()
            norms[start : start + len(g)] += s.flatten(1).sum(1).double()
            if square is not None:
                square[n] = square[n] + s.sum(0) if n in square else s.sum(0)
        start += len(part.losses)


def _owners(objective: Objective) -> tuple[dict[nn.Module, dict[str, str]], list[tuple[str, str]]]:
    """Layer -> its trainable parameters by attribute; and the parameters without a rule, with the reason."""
    owners: dict[nn.Module, dict[str, str]] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {n: [] for n in objective.params}
    for path, module in objective.model.named_modules(remove_duplicate=False):
        for attr, p in module._parameters.items():
            name = f"{path}.{attr}" if path else attr
            name = objective.functional.aliases.get(name, name)
            if p is not None and name in found:
                found[name].append((module, attr))
    rest = []
    for name, places in found.items():
        if len(places) != 1:
            rest.append((name, f"used in {len(places)} places"))
        elif not _has_rule(places[0][0]):
            rest.append((name, f"{type(places[0][0]).__name__} has no rule"))
        else:
            owners.setdefault(places[0][0], {})[places[0][1]] = name
    return owners, rest


def _has_rule(m: nn.Module) -> bool:
    if isinstance(m, nn.Embedding):
        return not (m.sparse or m.scale_grad_by_freq or m.max_norm is not None)
    return isinstance(m, _KNOWN) and getattr(m, "padding_mode", "zeros") == "zeros"


_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
_CHUNK = 16e6  # numbers of per-sample gradients of one layer alive at once


def _layer(m: nn.Module, a: Tensor, d: Tensor, names: Mapping[str, str], squares: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """attribute -> (|g|^2 of each sample (B,), sum over samples of g^2 in the parameter's shape)."""
    out: dict[str, tuple[Tensor, Tensor]] = {}
    if isinstance(m, nn.Embedding):
        return {"weight": _embedding(m, a, d)}
    if isinstance(m, nn.Linear):
        a3, d3 = a.reshape(a.shape[0], -1, a.shape[-1]), d.reshape(d.shape[0], -1, d.shape[-1])
        if "weight" in names:
            out["weight"] = _outer(a3, d3, m.weight.shape, squares)
        if "bias" in names:
            out["bias"] = _reduced(d3.sum(1))
        return out
    if isinstance(m, nn.Conv1d | nn.Conv2d):
        if "weight" in names:
            out["weight"] = _conv(m, a, d, squares)
        if "bias" in names:
            out["bias"] = _reduced(d.flatten(2).sum(2))
        return out
    if isinstance(m, nn.LayerNorm):
        axes = tuple(range(-len(m.normalized_shape), 0))
        unit = F.layer_norm(a, m.normalized_shape, eps=m.eps)
        rest = tuple(range(1, d.ndim - len(axes)))
    elif isinstance(m, nn.GroupNorm):
        unit, rest = F.group_norm(a, m.num_groups, eps=m.eps), tuple(range(2, d.ndim))
    else:
        assert isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
        unit = F.batch_norm(a, m.running_mean, m.running_var, eps=m.eps)
        rest = tuple(range(2, d.ndim))
    if "weight" in names:
        out["weight"] = _reduced((d * unit).sum(rest) if rest else d * unit)
    if "bias" in names:
        out["bias"] = _reduced(d.sum(rest) if rest else d)
    return out


def _reduced(g: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of per-sample gradients that are at hand, (B, *shape)."""
    s = g.square()
    return s.flatten(1).sum(1), s.sum(0)


def _outer(a: Tensor, d: Tensor, shape: torch.Size, squares: bool) -> tuple[Tensor, Tensor]:
    """Squares of g_b = sum_t d_bt a_bt^T for a (B, T, i), d (B, T, o)."""
    B, T, i = a.shape
    o = d.shape[2]
    if T == 1:
        a2, d2 = a[:, 0].square(), d[:, 0].square()
        return a2.sum(1) * d2.sum(1), (d2.T @ a2).reshape(shape) if squares else a2.new_zeros(())
    if not squares and T * (i + o) < i * o:  # |g|^2 from the T x T products of what goes in and what comes back
        return (torch.bmm(a, a.mT) * torch.bmm(d, d.mT)).sum((1, 2)), a.new_zeros(())
    step = max(1, int(_CHUNK // (i * o)))
    norms, total = a.new_zeros(B), a.new_zeros(o, i)
    for start in range(0, B, step):
        g = torch.bmm(d[start : start + step].mT, a[start : start + step]).square_()
        norms[start : start + step] = g.sum((1, 2))
        if squares:
            total += g.sum(0)
    return norms, total.reshape(shape) if squares else total


def _conv(m: nn.Conv1d | nn.Conv2d, a: Tensor, d: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
    flat = isinstance(m, nn.Conv1d)
    size, dilation, stride = ((1, *t) if flat else t for t in (m.kernel_size, m.dilation, m.stride))
    a = a[:, :, None] if flat else a
    if isinstance(m.padding, str):
        whole = [k * (s - 1) for k, s in zip(dilation, size, strict=True)] if m.padding == "same" else [0, 0]
        a = F.pad(a, (whole[1] // 2, whole[1] - whole[1] // 2, whole[0] // 2, whole[0] - whole[0] // 2))
        padding: tuple[int, ...] = (0, 0)
    else:
        padding = (0, *m.padding) if flat else m.padding
    u = F.unfold(a, size, dilation, padding, stride)  # type: ignore[arg-type]
    B, g = a.shape[0], m.groups
    u, d = u.reshape(B * g, -1, u.shape[-1]).mT, d.reshape(B * g, m.out_channels // g, -1).mT
    if g == 1:
        return _outer(u, d, m.weight.shape, squares)
    each = torch.bmm(d.mT, u).square_().reshape(B, *m.weight.shape)
    return each.flatten(1).sum(1), each.sum(0)


def _embedding(m: nn.Embedding, ids: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A row's gradient in a sample is the sum over its occurrences."""
    B, V, D = ids.shape[0], m.num_embeddings, m.embedding_dim
    key = (torch.arange(B, device=ids.device)[:, None] * V + ids.reshape(B, -1)).reshape(-1)
    rows, at = key.unique(return_inverse=True)
    g = d.new_zeros(len(rows), D).index_add_(0, at, d.reshape(-1, D))
    if m.padding_idx is not None:
        g[rows % V == m.padding_idx] = 0
    s = g.square()
    norms = d.new_zeros(B).index_add_(0, rows // V, s.sum(1))
    return norms, d.new_zeros(V, D).index_add_(0, rows % V, s)


# -------------------------------------------------------------------------------------------------------------------- moments


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """First and second moments of gradients over samples (or over batches).

    Attributes:
        count: number of samples n (or batches).
        unit: "sample" or "batch"; with "batch" every quantity is that of a batch gradient of ``size`` samples.
        size: samples in a unit.
        loss: mean loss.
        means: name -> E g, of the parameter's shape, as it was summed: one batch in the model's own type, several in float64.
        squares: name -> E g^2 entry by entry, likewise; empty when it was not asked for.
        norms: (n,) of |g|^2.
        forms: name -> (mean, standard error) of each quadratic form that was asked for.
        backend, reason: what computed the gradients, and why not vmap.
    """

    count: int
    unit: str
    size: int
    loss: float
    means: Gradient
    squares: Gradient
    norms: Tensor
    forms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    backend: str = ""
    reason: str = ""

    @functools.cached_property
    def mean(self) -> Gradient:
        """name -> E g, of the parameter's shape, float64."""
        return {k: g.double() for k, g in self.means.items()}

    @functools.cached_property
    def square(self) -> Gradient:
        """name -> E g^2 entry by entry, float64; empty when it was not asked for."""
        return {k: g.double() for k, g in self.squares.items()}

    @property
    def mean_square(self) -> float:
        """|E g|^2 as computed: its expectation exceeds the true one by tr Sigma / n."""
        return sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in self.means.values())

    def noise_trace(self) -> Estimate:
        """tr Sigma, the trace of the covariance of a unit's gradient: unbiased, with a standard error."""
        n = self.count
        if n < 2:
            return Estimate(None, status="not_applicable", note="one sample has no spread", refs=("noise-equilibrium R1",))
        value = (float(self.norms.mean()) - self.mean_square) * n / (n - 1)
        return Estimate(
            max(value, 0.0),
            stderr=float(self.norms.std()) / math.sqrt(n),
            assumptions=("independent samples",),
            refs=("noise-equilibrium R1",),
            details={"samples": n, "backend": self.backend},
        )

    def mean_norm_square(self) -> Estimate:
        """|grad L|^2 without its bias tr Sigma / n; may come out negative where the noise drowns it (then not_converged)."""
        trace = self.noise_trace()
        if not isinstance(trace.value, float):
            return Estimate(self.mean_square, note="one sample: biased by its noise", status="not_converged")
        value, error = self.mean_square - trace.value / self.count, float(self.norms.std()) / self.count
        status: Literal["ok", "not_converged"] = "ok" if value > 2 * error else "not_converged"
        note = "" if status == "ok" else "the mean gradient is smaller than its noise: use more samples"
        return Estimate(value, stderr=error, status=status, note=note, details={"samples": self.count})

    def noise_scale(self) -> Estimate:
        """tr Sigma / |grad L|^2 in samples: the batch size at which noise and gradient are equal ("simple" gradient noise scale)."""
        top, bottom = self.noise_trace(), self.mean_norm_square()
        if not (bottom.ok and isinstance(top.value, float) and isinstance(bottom.value, float)):
            return Estimate(None, status="not_applicable", note=top.note or bottom.note)
        value, spread = self.size * top.value / bottom.value, float(self.norms.std()) / math.sqrt(self.count)
        error = value * math.hypot(spread / max(top.value, 1e-300), spread / math.sqrt(self.count) / bottom.value)
        return Estimate(value, stderr=error, assumptions=("independent samples",), details={"samples": self.count})

    def factor(self, batch: int, replace: bool = True, population: int | None = None) -> float:
        """The factor on Sigma in the covariance of a batch mean: 1/S, or (N-S)/(S (N-1)) without replacement.

        Raises:
            InputError: a batch larger than the population, or no population given without replacement.
        """
        if batch < 1:
            raise InputError(f"The batch size must be positive, got {batch}.")
        share = batch / self.size
        if replace:
            return 1 / share
        population = population or self.count
        if share > population:
            raise InputError(f"A batch of {batch} cannot be drawn without replacement from {population * self.size} samples.")
        return (population - share) / (share * max(population - 1, 1))

    def second(self, batch: int, replace: bool = True) -> Gradient:
        """E[g_B^2] entry by entry for batches of ``batch`` samples: the diagonal of M2.

        Raises:
            InputError: the squares were not kept.
        """
        if not self.square:
            raise InputError("The moments hold no squares: compute them with gradient_moments(..., squares=True).")
        c = self.factor(batch, replace)
        return {k: m.square() + c * (self.square[k] - m.square()) for k, m in self.mean.items()}

    def form(self, name: str, of_mean: Tensor, batch: int, replace: bool = True) -> Tensor:
        """E_B q(g_B) = q(mean) + c (E q(g) - q(mean)) for a quadratic form that was asked for by ``name``."""
        return of_mean + self.factor(batch, replace) * (self.forms[name][0] - of_mean)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the tensors of the parameters' size."""
        return {
            "count": self.count, "unit": self.unit, "size": self.size, "loss": self.loss, "backend": self.backend, "reason": self.reason,
            "noise_trace": self.noise_trace().to_dict(), "noise_scale": self.noise_scale().to_dict(),
            "mean_norm_square": self.mean_norm_square().to_dict(),
        }  # fmt: skip


def gradient_moments(
    objective: Objective,
    loader: Any,
    *,
    forms: Mapping[str, Form] | None = None,
    squares: bool = True,
    unit: Literal["sample", "batch"] = "sample",
    chunk: int | None = None,
    limit: int | None = None,
    check: bool = True,
    layers: bool = True,
) -> GradientMoments:
    """Stream a loader once and return the moments of its gradients.

    Without forms they come from one ordinary backward pass where every parameter sits in a known layer (`layerwise`; confirmed on two
    samples), else from per-sample gradients by vmap, else one sample at a time: ``backend`` says which, ``reason`` why.

    Args:
        objective: model and loss.
        loader: a loader, a list of batches, or one batch.
        forms: name -> function of one gradient (dict of tensors) -> tensor; averaged, with a standard error. Vmapped over samples.
        squares: keep E g^2 entry by entry.
        unit: "sample"; or "batch" for the spread between the loader's batches (works with batch norm, and costs one gradient each).
        chunk: samples together in vmap.
        limit: stop after this many samples (batches).
        check: compare the first batch's loss with the mean of its samples', or two samples' norms of `layerwise` with vmap's.
        layers: try `layerwise` first.

    Raises:
        InputError: see `per_sample`; a loss that is not a mean over samples; batches of different sizes with unit="batch".
    """
    total = _Sums(forms or {}, squares)
    size, fast = 1, layers and not forms and unit == "sample" and chunk is None
    for number, batch in enumerate(batches(loader)):
        if unit == "batch":
            size = _same_size(size, batch_size(batch), number)
            total.add(_whole(objective, batch))
        else:
            if number == 0:
                refuse_coupled(objective)
                fast = fast and not objective.stochastic
            made = layerwise(objective, batch, squares=squares) if fast else "not asked for"
            if not isinstance(made, str) and number == 0 and check:
                made = _confirmed(made, objective, batch)
            if isinstance(made, str):
                fast = False
                before = total.count, total.loss
                for part in per_sample(objective, batch, chunk=chunk):
                    total.add(part)
                if check and number == 0:
                    check_mean(objective, batch, (total.loss - before[1]) / (total.count - before[0]))
                total.reason = total.reason or made
            else:
                total.add_layers(*made)
        if limit is not None and total.count >= limit:
            break
    return total.result(unit, size)


def _confirmed(
    made: tuple[Gradient, Gradient, Tensor, float], objective: Objective, batch: Any
) -> tuple[Gradient, Gradient, Tensor, float] | str:
    """What `layerwise` found, if it agrees with the gradients of the first and the last sample; else why not."""
    n = batch_size(batch)
    pick = [0, n - 1] if n > 1 else [0]
    few = pytree.tree_map(lambda t: t[pick] if isinstance(t, Tensor) and t.ndim else t, batch)
    (part,) = list(per_sample(objective, few, chunk=len(pick)))
    exact = torch.stack([g.double().flatten(1).square().sum(1) for g in part.gradients.values()]).sum(0).cpu()
    eps = max(torch.finfo(p.dtype).eps for p in objective.params.values()) ** 0.5
    if bool(((made[2][pick] - exact).abs() <= 10 * eps * exact.clamp_min(eps * float(exact.max()))).all()):
        return made
    return "the layers do not account for the gradient of a sample: the loss is no mean over samples, or a parameter is used elsewhere too"


def _same_size(size: int, found: int, number: int) -> int:
    if number and found != size:
        raise InputError(f"Batch {number} has {found} samples, the ones before {size}: drop the last (drop_last=True).")
    return found


def _whole(objective: Objective, batch: Any) -> Chunk:
    """The gradient of a whole batch, as a chunk of one."""
    with torch.enable_grad(), rng_state(), math_attention(), no_checkpointing(), preserve(objective.model):
        leaves = {n: p.detach().requires_grad_() for n, p in objective.params.items()}
        loss = objective(leaves, batch)
        if loss.numel() != 1:
            raise InputError(f"The loss must be one number, got shape {tuple(loss.shape)}: reduce it by a mean over samples.")
        found = torch.autograd.grad(loss.reshape(()), list(leaves.values()), allow_unused=True, materialize_grads=True)
    grads = dict(zip(leaves, (g.detach()[None] for g in found), strict=True))
    if not all(bool(torch.isfinite(g).all()) for g in grads.values()):
        raise InputError("The gradient of a batch is not finite: check the batch and the weights.")
    return Chunk(grads, loss.detach().reshape(1), "batch gradients")


class _Sums:
    """Streaming means in float64; each batch moves them by its share of all samples so far, which saves passes over zeros and sums."""

    def __init__(self, forms: Mapping[str, Form], squares: bool) -> None:
        self.squares = squares
        self.first: Gradient = {}
        self.second: Gradient = {}
        self.forms, self.sums = dict(forms), dict[str, list[Tensor]]()
        self.norms: list[Tensor] = []
        self.count, self.loss, self.backend, self.reason = 0, 0.0, "", ""

    def add(self, part: Chunk) -> None:
        """Per-sample gradients."""
        n = len(part.losses)
        self.count += n
        self.loss += float(part.losses.double().sum())
        norm = torch.zeros(n, dtype=torch.float64, device=part.losses.device)
        for k, g in part.gradients.items():
            square = g.square()
            self._mix(k, g.sum(0, dtype=torch.float64).div_(n), square.sum(0, dtype=torch.float64).div_(n) if self.squares else None, n)
            norm += square.flatten(1).sum(1, dtype=torch.float64)
        self.norms.append(norm.cpu())
        for name, form in self.forms.items():
            each = vmap(form)(part.gradients).double()
            first, second = each.sum(0), each.square().sum(0)
            held = self.sums.setdefault(name, [torch.zeros_like(first), torch.zeros_like(second)])
            held[0] += first
            held[1] += second
        self.backend, self.reason = part.backend, part.reason

    def add_layers(self, mean: Gradient, square: Gradient, norms: Tensor, loss: float) -> None:
        """A batch from `layerwise`."""
        n = len(norms)
        if not (math.isfinite(loss) and bool(torch.isfinite(norms).all())):
            raise InputError("The gradient of a sample is not finite: check the batch and the weights.")
        self.count += n
        self.loss += n * loss
        for k, g in mean.items():
            self._mix(k, g, square[k].div_(n) if self.squares else None, n)
        self.norms.append(norms)
        self.backend = "one backward pass"

    def _mix(self, name: str, first: Tensor, second: Tensor | None, n: int) -> None:
        """``first`` and ``second``: means over n samples, already counted."""
        share = n / self.count
        for held, value in ((self.first, first), (self.second, second)):
            if value is None:
                continue
            if name in held:
                held[name] = held[name].double().lerp_(value.double(), share)
            else:
                held[name] = value  # as it is: most callers have one batch, and a copy in float64 costs as much as a pass

    def result(self, unit: str, size: int) -> GradientMoments:
        """The moments of everything that was added."""
        n = self.count
        forms = {}
        for name, (first, second) in self.sums.items():
            mean = first / n
            forms[name] = mean, ((second / n - mean.square()).clamp_min(0) / max(n - 1, 1)).sqrt()
        return GradientMoments(
            n, unit, size, self.loss / n, self.first, self.second, torch.cat(self.norms), forms, self.backend, self.reason
        )
