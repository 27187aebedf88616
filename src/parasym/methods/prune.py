"""Pruning by a score: SynFlow, SNIP, GraSP, magnitude, random, or your own; one mask for the whole network, planned in many steps.

SynFlow scores without data and cannot empty a layer while it could cut elsewhere: as long as the score removed in each step stays
below the flow R of one cut, no set of weights that all paths cross can be gone. That ratio is measured at every step.

Source: synflow R3-R8.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.functional import Functional, functional
from parasym.core.graph import Graph, trace
from parasym.core.guards import math_attention, preserve
from parasym.core.results import Estimate
from parasym.measure.saliency import Flow, contractions, cuts_alone, parameter_cuts
from parasym.methods.masks import Masking, masked_transport, refuse_parametrized

Score = Literal["synflow", "snip", "grasp", "magnitude", "random"]
Scores = dict[str, Tensor]
Masks = Mapping[str, Tensor]
Rule = Callable[[Masks], Scores]
Loss = Callable[[Any], Tensor]
_DATA = ("snip", "grasp")
_TEMPERATURE = 200.0  # of GraSP's logits


@dataclass
class Pruner:
    """A model read once, to be cut at any number of keep fractions.

    Attributes:
        model: never changed.
        graph: its trace.
        weights: prunable parameter -> values, float64.
        alone: which of them cut every path by themselves.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    graph: Graph
    weights: dict[str, Tensor]
    alone: tuple[str, ...]
    cuts: list[tuple[str, ...]]
    view: Functional = field(repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        include: Callable[[str, Tensor], bool] | None = None,
    ) -> Pruner:
        """Trace a model and find its prunable weights.

        Args:
            include: (name, tensor) -> whether to prune it, of the weights that multiply activations or are looked up; the default
                leaves out tables that are only looked up.

        Raises:
            InputError: nothing to prune; NaN or integer weights; weights under a parametrization.
        """
        view = functional(model)
        refuse_parametrized(view.params, "prune")
        with preserve(view.model):
            graph = trace(view.model, tuple(args), kwargs)
        nodes = contractions(graph)
        tables = {p for p, at in nodes.items() if all("embedding" in n for n in at)}
        chosen = [p for p in nodes if (include(p, view.params[p]) if include is not None else p not in tables)]
        chosen = [p for p in chosen if p not in view.frozen]
        if not chosen:
            raise InputError(f"{type(view.model).__name__} has no trainable weight that multiplies activations: there is nothing to prune.")
        weights = {p: graph.params[p] for p in chosen}
        alone = tuple(p for p in chosen if cuts_alone(graph, nodes[p]))
        return cls(view.model, tuple(args), dict(kwargs or {}), graph, weights, alone, parameter_cuts(graph, nodes), view)

    @property
    def count(self) -> int:
        """N: prunable weights."""
        return sum(w.numel() for w in self.weights.values())

    def rule(self, score: Score | Rule, loss: Loss | None = None, seed: int = 0) -> Rule:
        """Masks -> scores, for a score by name.

        Raises:
            InputError: an unknown score, or one that needs a loss and has none.
        """
        if callable(score):
            return score
        if score not in get_args(Score):
            raise InputError(f"score {score!r} is unknown: use {', '.join(get_args(Score))}, or a function of the masks.")
        if score in _DATA:
            if loss is None:
                raise InputError(f"score {score!r} needs loss=: a function of what the model returns, with the labels closed over.")
            return (snip if score == "snip" else grasp)(self, loss)
        if score == "magnitude":
            return lambda masks: {n: w.abs() * masks[n] for n, w in self.weights.items()}
        if score == "random":
            stream = torch.Generator().manual_seed(seed)
            return lambda masks: {n: torch.randn(w.shape, generator=stream, dtype=torch.float64) for n, w in self.weights.items()}
        flow = Flow(self.graph)
        return lambda masks: flow.scores({n: w * masks[n] for n, w in self.weights.items()})[0]

    def masks(
        self, rule: Rule, keep: int, *, steps: int = 1, schedule: str = "exponential", scope: str = "global"
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Masks that keep exactly ``keep`` weights, and what share of one cut's score each step removed (R5's ratio).

        Source: synflow R4, R5.
        """
        total, rho = self.count, keep / self.count
        masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in self.weights.items()}
        ratios = []
        for k in range(1, steps + 1):
            share = rho ** (k / steps) if schedule == "exponential" else 1 - (1 - rho) * k / steps
            wanted = keep if k == steps else max(keep, round(share * total))
            scores = rule(masks)
            check_scores(scores, masks)
            before = {n: float(s[masks[n]].sum()) for n, s in scores.items()}
            masks = _best(scores, masks, wanted) if scope == "global" else _best_each(scores, masks, share if k < steps else rho)
            left = {n: float(s[masks[n]].sum()) for n, s in scores.items()}
            whole = [before[n] for n in self.alone] or [sum(before[n] for n in cut if n in before) for cut in self.cuts]
            cut = min(whole) if whole else max(before.values())
            ratios.append((math.fsum(before.values()) - math.fsum(left.values())) / cut if cut > 0 else math.inf)
        return masks, ratios

    def empty(self, masks: Masks) -> list[str]:
        """Weights of which nothing is left."""
        return [n for n, m in masks.items() if not bool(m.any())]

    def connected(self, masks: Masks) -> bool:
        """Whether a path of kept weights still leads from the input to an output."""
        ones = {n: m.to(torch.float64) for n, m in masks.items()}
        with torch.no_grad():
            return bool(Flow(self.graph).total(ones, reach=True) > 0)


def prune(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    keep: float | int,
    score: Score | Rule = "synflow",
    loss: Loss | None = None,
    schedule: Literal["exponential", "linear"] = "exponential",
    steps: int | None = None,
    scope: Literal["global", "local"] = "global",
    include: Callable[[str, Tensor], bool] | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> Masking:
    """Plan a pruning of a model's weights; nothing is touched until ``apply()`` (masks in every forward) or ``bake()`` (plain zeros).

    Args:
        args, kwargs: example arguments, the batch first. SNIP and GraSP score on them; the others read shapes only, so one sample is
            enough and fastest. Put the model in eval mode for scores of normalised nets.
        keep: fraction of the prunable weights to keep, in (0, 1]; an int is a number of weights.
        score: "synflow" needs no data; "snip" and "grasp" need ``loss``; "magnitude", "random"; or masks -> scores, largest kept.
        loss: what the model returns -> the loss on ``args`` (labels closed over).
        schedule, steps: keep^(k / steps), or linear in k; default 100 steps for SynFlow, 1 for the others.
        scope: one threshold for the whole network, or the same fraction of each weight tensor.
        include: (name, tensor) -> whether it may be pruned. Biases and gains never are; tied weights are scored once, all uses summed.
        shuffle: keep the counts of each layer and put them at random places: the ablation of what the score knows beyond them.
        seed: of the random score and of ``shuffle``.

    Returns:
        Masks with the certificate of no layer-collapse: its value is the smallest number of weights left in a tensor that every path
        needs; ``violated`` if that is 0 or the output is cut off. Its details hold the ratio of each step (below 1 throughout: the
        theorem forbids collapse), counts of each tensor, tensors emptied beside a shortcut, cuts of the graph.

    Raises:
        InputError: keep is not in range or leaves less than one weight a layer; NaN weights or scores; unknown score, schedule, scope.

    Source: synflow R3-R6.
    """
    _check(schedule, ("exponential", "linear"), "schedule")
    _check(scope, ("global", "local"), "scope")
    steps = (100 if score == "synflow" else 1) if steps is None else steps
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a positive whole number, got {steps!r}.")
    pruner = Pruner.of(model, args, kwargs, include)
    kept = _count(keep, pruner, scope)
    masks, ratios = pruner.masks(pruner.rule(score, loss, seed), kept, steps=steps, schedule=schedule, scope=scope)
    if shuffle:
        stream = torch.Generator().manual_seed(seed)
        masks = {n: m.reshape(-1)[torch.randperm(m.numel(), generator=stream)].reshape(m.shape) for n, m in masks.items()}
    name = score if isinstance(score, str) else getattr(score, "__name__", "own score")
    summary = {
        "score": name,
        "schedule": schedule,
        "steps": steps,
        "scope": scope,
        "weights": pruner.count,
        "kept": sum(int(m.sum()) for m in masks.values()),
        "log10_compression": math.log10(pruner.count / max(1, sum(int(m.sum()) for m in masks.values()))),
        "layers": {n: [int(m.sum()), m.numel()] for n, m in masks.items()},
    }
    after = {n: pruner.view.params[n] * masks[n].to(pruner.view.params[n].device) for n in masks}
    certificate = certify(pruner, masks, ratios if name == "synflow" and not shuffle else [])
    return Masking("prune", model, after, certificate, masked_transport(masks), summary=summary, masks=masks)


def certify(pruner: Pruner, masks: Masks, ratios: Sequence[float]) -> Estimate:
    """Whether a layer has collapsed: the fewest weights left in a tensor that every path needs, and what the theorem says.

    Source: synflow R5.
    """
    counts = {n: int(m.sum()) for n, m in masks.items()}
    needed = [counts[n] for n in pruner.alone] or [sum(counts[n] for n in c if n in counts) for c in pruner.cuts]
    fewest, linked = (min(needed) if needed else min(counts.values())), pruner.connected(masks)
    empty = pruner.empty(masks)
    sound = fewest > 0 and linked
    note = ""
    if not linked:
        note = "no path of kept weights leads from the input to an output"
    elif fewest == 0:
        note = f"nothing is left of {', '.join(n for n in pruner.alone if not counts[n])}, which every path needs"
    elif empty:
        note = f"nothing is left of {', '.join(empty[:4])}; other paths lead around"
    details = {
        "ratios": list(ratios),
        "guaranteed": bool(ratios) and max(ratios) < 1,
        "connected": linked,
        "empty": empty,
        "needed": list(pruner.alone),
        "cuts": [list(c) for c in pruner.cuts],
    }
    return Estimate(float(fewest), status="ok" if sound else "violated", refs=("synflow",), note=note, details=details)


# ------------------------------------------------------------------------------------------------ scores


def snip(pruner: Pruner, loss: Loss) -> Rule:
    """|g * w| on a batch, the gradient taken on the mask, normalised to sum 1. Source: synflow R6."""

    def scores(masks: Masks) -> Scores:
        with _Gradients(pruner, masks) as (leaves, value):
            grads = torch.autograd.grad(value(loss, 1.0), list(leaves.values()), allow_unused=True)
        found = {n: (g.double() * pruner.weights[n] * masks[n]).abs() if g is not None else torch.zeros_like(pruner.weights[n])
                 for n, g in zip(leaves, grads, strict=True)}  # fmt: skip
        total = math.fsum(float(s.sum()) for s in found.values())
        return {n: s / total for n, s in found.items()} if total > 0 else found

    return scores


def grasp(pruner: Pruner, loss: Loss) -> Rule:
    """(H g) * w with the logits divided by 200; largest kept. Source: synflow R6."""

    def scores(masks: Masks) -> Scores:
        with _Gradients(pruner, masks) as (leaves, value):
            inputs = list(leaves.values())
            still = torch.autograd.grad(value(loss, _TEMPERATURE), inputs, allow_unused=True)
            moving = torch.autograd.grad(value(loss, _TEMPERATURE), inputs, allow_unused=True, create_graph=True)
            pairs = [(a.detach() * b).sum() for a, b in zip(still, moving, strict=True) if a is not None and b is not None]
            second = torch.autograd.grad(torch.stack(pairs).sum(), inputs, allow_unused=True)
        found = {n: h.double() * pruner.weights[n] * masks[n] if h is not None else torch.zeros_like(pruner.weights[n])
                 for n, h in zip(leaves, second, strict=True)}  # fmt: skip
        total = abs(math.fsum(float(s.sum()) for s in found.values())) + 1e-10
        return {n: s / total for n, s in found.items()}

    return scores


class _Gradients:
    """Masked weights as leaves, in the model's own type, and the loss as a function of them; the model in eval mode meanwhile."""

    def __init__(self, pruner: Pruner, masks: Masks) -> None:
        self.pruner, self.masks = pruner, masks

    def __enter__(self) -> tuple[dict[str, Tensor], Callable[[Loss, float], Tensor]]:
        f = self.pruner.view
        self._guards = (preserve(f.model), math_attention(), torch.enable_grad())
        for guard in self._guards:
            guard.__enter__()
        f.model.eval()
        leaves = {n: (f.params[n] * self.masks[n].to(f.params[n].device)).requires_grad_() for n in self.pruner.weights}

        def value(loss: Loss, temperature: float) -> Tensor:
            out = f.output(leaves, self.pruner.args, self.pruner.kwargs)
            if temperature != 1.0:
                out = pytree.tree_map_only(Tensor, lambda t: t / temperature if t.is_floating_point() else t, out)
            found = loss(out)
            if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
                raise InputError("loss= must return one number that depends on the model's output.")
            return found.reshape(())

        return leaves, value

    def __exit__(self, *error: Any) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(*error)


def check_scores(scores: Scores, masks: Masks) -> None:
    """Raises InputError where scores are missing, of another shape, or not finite."""
    for n, m in masks.items():
        if n not in scores or scores[n].shape != m.shape:
            raise InputError(f"the score gives nothing of shape {tuple(m.shape)} for {n!r}.")
        if not bool(torch.isfinite(scores[n]).all()):
            raise InputError(f"the score of {n!r} is NaN or infinite: weights too large, or a loss that overflows.")


def _best(scores: Scores, masks: Masks, keep: int) -> dict[str, Tensor]:
    """The ``keep`` largest scores among the weights still there; of equal ones the first."""
    flat = torch.cat([scores[n].reshape(-1).double().masked_fill(~m.reshape(-1), -math.inf) for n, m in masks.items()])
    wanted = min(keep, sum(int(m.sum()) for m in masks.values()))
    least = flat.kthvalue(len(flat) - wanted + 1).values
    chosen = flat > least
    chosen[(flat == least).nonzero().flatten()[: wanted - int(chosen.sum())]] = True
    parts = chosen.split([m.numel() for m in masks.values()])
    return {n: part.reshape(m.shape) for (n, m), part in zip(masks.items(), parts, strict=True)}


def _best_each(scores: Scores, masks: Masks, share: float) -> dict[str, Tensor]:
    return {n: _best({n: scores[n]}, {n: m}, max(1, round(share * m.numel())))[n] for n, m in masks.items()}


def _count(keep: float | int, pruner: Pruner, scope: str) -> int:
    total, layers = pruner.count, len(pruner.weights)
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not (1 <= keep <= total if whole else 0 < keep <= 1):
        raise InputError(f"keep must be a fraction in (0, 1] or a number of weights from 1 to {total:,}, got {keep!r}.")
    kept = int(keep) if whole else round(keep * total)
    if kept < layers:
        raise InputError(
            f"keep={keep!r} leaves {kept} weights for {layers} layers, less than one each: the largest compression that keeps them all "
            f"is {total / layers:.4g} (keep={layers / total:.3g} or keep={layers})."
        )
    if scope == "local":
        thin = [n for n, w in pruner.weights.items() if kept / total * w.numel() < 0.5]
        if thin:
            raise InputError(f"keep={keep!r} leaves less than one weight of {thin[0]!r}; use scope='global' or keep more.")
    return kept


def _check(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise InputError(f"{what} {value!r} is unknown: use {' or '.join(known)}.")


# ------------------------------------------------------------------------------------------------ critical compression


@dataclass(frozen=True)
class Critical:
    """How far a score can cut before a layer collapses.

    Attributes:
        kept: the grid of kept counts, descending.
        collapsed: for each, whether a layer was emptied.
        compression: N / kept of the last one before the first collapse; nan if even the first collapses.
        maximum: N / L.
    """

    kept: tuple[int, ...]
    collapsed: tuple[bool, ...]
    compression: float
    maximum: float

    @property
    def is_maximal(self) -> bool:
        """The axiom of maximal critical compression holds on the grid."""
        return self.compression == self.maximum


def max_compression(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> float:
    """N / L: one weight in each layer. Source: synflow, set-up."""
    pruner = Pruner.of(model, args, kwargs)
    return pruner.count / len(pruner.weights)


def critical_compression(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    score: Score | Rule = "synflow",
    kept: Sequence[int] | None = None,
    loss: Loss | None = None,
    steps: int | None = None,
    schedule: str = "exponential",
    seed: int = 0,
) -> Critical:
    """The largest compression such that it and every smaller one on a grid leave no layer empty.

    Args:
        kept: numbers of weights to keep (default: 1, 1.2, 1.6, 2.4, 4, 6, 10, 16, 26, 40, 64, 100, ... weights a layer).

    Source: synflow A2.
    """
    pruner = Pruner.of(model, args, kwargs)
    layers = len(pruner.weights)
    grid = sorted({*(kept or (round(layers * f) for f in _GRID)), layers} if kept is None else set(kept), reverse=True)
    grid = [k for k in grid if layers <= k <= pruner.count]
    steps = (100 if score == "synflow" else 1) if steps is None else steps
    collapsed, best = [], math.nan
    for k in grid:
        masks, _ = pruner.masks(pruner.rule(score, loss, seed), k, steps=steps, schedule=schedule)
        collapsed.append(bool(pruner.empty(masks)))
        if not any(collapsed):
            best = pruner.count / k
    return Critical(tuple(grid), tuple(collapsed), best, pruner.count / layers)


_GRID = tuple(base * 10**power for power in range(4) for base in (1.0, 1.2, 1.6, 2.4, 4.0, 6.0))


def rewound(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    keep: float,
    levels: int,
    score: Score = "magnitude",
    loss: Loss | None = None,
    include: Callable[[str, Tensor], bool] | None = None,
    seed: int = 0,
) -> Masking:
    """Iterative pruning with rewinding: train a masked copy, score it, keep keep^(l / levels), set the weights back, again.

    Args:
        train: called with a copy of the model that wears the masks so far; trains it in place.
        levels: how many times.

    Returns:
        The masks, planned for the untrained ``model``.

    Source: synflow R8.
    """
    plain = functional(model).model
    pruner = Pruner.of(plain, args, kwargs, include)
    kept = _count(keep, pruner, "global")
    masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in pruner.weights.items()}
    for level in range(1, levels + 1):
        trained = copy.deepcopy(plain)
        worn = Masking("prune", trained, {}, Estimate(1.0), masks=masks)
        worn.apply()
        train(trained)
        worn.bake()
        after = Pruner.of(trained, args, kwargs, include)
        scores = after.rule(score, loss, seed)(masks)
        check_scores(scores, masks)
        masks = _best(scores, masks, kept if level == levels else max(kept, round(keep ** (level / levels) * pruner.count)))
    values = {n: pruner.view.params[n] * masks[n].to(pruner.view.params[n].device) for n in masks}
    layers = {n: [int(m.sum()), m.numel()] for n, m in masks.items()}
    summary = {"score": score, "levels": levels, "weights": pruner.count, "kept": kept, "layers": layers}
    return Masking("prune", model, values, certify(pruner, masks, []), masked_transport(masks), summary=summary, masks=masks)
