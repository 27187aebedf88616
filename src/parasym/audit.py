"""The main job: trace, discover, certify, count, measure collapse, advise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from parasym import __version__
from parasym.core.checkpoint import TensorFile
from parasym.core.errors import CheckpointError, InputError, ParasymError
from parasym.core.functional import float_outputs, functional
from parasym.core.graph import Graph, batch_statistics, trace
from parasym.core.guards import check_deterministic, preserve, rng_state
from parasym.core.samples import flatten
from parasym.measure.advice import advice as advice_on
from parasym.measure.collapse import collapse as collapse_of
from parasym.measure.collapse import weight_collapse
from parasym.symmetry.discrete import discrete_symmetries
from parasym.symmetry.full import EXACT_PARAMETERS, architecture, audit_full_size
from parasym.symmetry.picture import picture
from parasym.symmetry.rigid import at_rest
from parasym.symmetry.search import Progress, Search, search
from parasym.symmetry.symmetry import Level, Symmetry, SymmetrySet

Completeness = Literal["auto", "exact", "none"]


@dataclass(frozen=True)
class Count:
    """How much of the null space is explained.

    Attributes:
        parameters: number of distinct trainable numbers.
        rank, nullity: of the Jacobian of all outputs (of the twin, where the model is too large: see ``method``).
        explained: rank of the certified symmetries over the nullity; None where it was not counted.
        exact: counted on the model itself, not on a twin.
        method: how.
        gap: smallest kept and largest null relative singular value.
    """

    parameters: int
    rank: int | None
    nullity: int | None
    explained: float | None
    exact: bool
    method: str
    gap: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "gap": list(self.gap) if self.gap else None}


@dataclass(frozen=True)
class Audit:
    """What an audit found. ``print`` it, ``to_dict`` it, or write it as a page with ``to_html``."""

    model: dict[str, Any]
    symmetries: list[Symmetry]
    completeness: Count
    collapse: list[dict[str, Any]]
    advice: list[dict[str, Any]]
    refuted: list[dict[str, Any]]
    undecided: list[dict[str, Any]]
    approximate: list[dict[str, Any]]
    classified: dict[str, int]
    graph: dict[str, Any] = field(repr=False)
    reasons: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "parasym": __version__,
            "model": self.model,
            "symmetries": [s.to_dict() for s in self.symmetries],
            "refuted": self.refuted,
            "undecided": self.undecided,
            "approximate": self.approximate,
            "completeness": self.completeness.to_dict(),
            "classified": self.classified,
            "reasons": self.reasons,
            "collapse": self.collapse,
            "advice": self.advice,
            "graph": self.graph,
        }

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page."""
        from parasym.report.html import write_audit

        write_audit(self.to_dict(), path)
        return Path(path)

    def __str__(self) -> str:
        c = self.completeness
        lines = [f"{self.model['name']}: {c.parameters:,} parameters, {len(self.symmetries)} certified symmetries"]
        if c.explained is not None:
            lines.append(f"nullity {c.nullity} (rank {c.rank}), explained {c.explained:.1%}; {c.method}")
        width = max((len(s.where) for s in self.symmetries), default=0)
        for s in self.symmetries:
            lines.append(f"  {s.where:{min(width, 48)}}  {s.group:14} {s.dim:6}  {s.residual:.0e}  {s.name}")
        for title, rows in (("refuted", self.refuted), ("undecided", self.undecided), ("approximate", self.approximate)):
            lines += [f"  {title}: {r['name']} ({r['why']})" for r in rows[:20]]
        seen = [r for r in self.collapse if r["kind"] != "not measured"]
        lines += [f"  collapse: {r['where']}: {r['count']} of {r['of']} {r['kind']}" for r in seen]
        lines += [f"  collapse: {r['where']}: {r['note']}" for r in self.collapse if r["kind"] == "not measured"]
        lines += [f"  advice: {r['where']}: {r['what']}" for r in self.advice]
        return "\n".join(lines)


class _WithLoss(nn.Module):
    """A model followed by a function of its output, under the model's own parameter names."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.loss_fn(self.model(*args, **kwargs))


def audit(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    inputs: Sequence[Sequence[Any]] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    completeness: Completeness = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Find, certify and count every parameter symmetry of a model, and measure where its weights have collapsed.

    Args:
        model: any ``torch.nn.Module`` (or exported program); never changed.
        args, kwargs: example arguments, the batch first.
        inputs: list of argument tuples used for certificates and rank, exactly these; None: the given batch and freshly
            drawn ones of the same kind (floats of its scale, tokens of the embedding's range) until the rank stops growing.
        loss_fn: function of the model's output; adds the symmetries that only the loss has (level "loss"), such as the shift
            of all logits under ``lambda y: y.log_softmax(-1)``.
        completeness: "auto" counts on the model itself up to 1,500 parameters and on a small twin beyond; "exact" always on
            the model itself; "none" skips the count of large models.
        seed: of every random draw.
        progress: called with (stage, fraction).

    Raises:
        InputError, TraceError, NonDeterministicError: what, where, and what to do.
    """
    tell = progress or (lambda stage, fraction: None)
    _check_options(completeness, seed, loss_fn, inputs, args, model)
    generator = torch.Generator().manual_seed(seed)
    tell("trace", 0.0)
    with rng_state():
        _check(model, args, kwargs)
        model = functional(model, values=False).model if isinstance(model, nn.Module) else model  # without its wrappers
        if loss_fn is not None:
            _check_loss(model, loss_fn, args, kwargs)
        graph = trace(model, args, kwargs)
        batches = (
            [flatten(graph, args, kwargs)]
            if inputs is None
            else [flatten(graph, tuple(i), kwargs if len(i) == len(args) else None) for i in inputs]
        )
        _check_weights(graph)
        size = sum(p.numel() for p in graph.params.values())
        if size > EXACT_PARAMETERS and completeness != "exact":
            found = audit_full_size(model, args, kwargs, graph, batches, generator, tell)
            free = sum(s.dim for s in found.symmetries)
            symmetries = found.symmetries
            count = Count(size, size - free, free, found.explained, False, f"dimensions written at full size; {found.method}", found.gap)
            result, twin, rest = found.search, found.twin, found.rest
        else:
            level: Level = "train" if getattr(model, "training", False) and batch_statistics(graph) else "function"
            result = search(graph, batches, generator, grow=inputs is None, level=level, progress=tell)
            symmetries, twin = list(result.symmetries), None
            explained = result.explained / result.null.nullity if result.null.nullity else 1.0
            method = f"singular values of the Jacobian on {len(result.batches)} batches, cut at the gap"
            count = Count(size, size - result.null.nullity, result.null.nullity, explained, True, method, result.null.gap)
            tell("discrete", 0.0)
            discrete, refuted, undecided = discrete_symmetries(graph, result.fresh, generator)
            rest = at_rest(result, undecided)
            symmetries += discrete
            result.refuted += [{**r, "why": r["reason"]} for r in refuted]
            result.undecided += [{**r, "why": r["reason"], "dim": 0} for r in undecided]
        if loss_fn is not None:
            symmetries += _loss_level(model, loss_fn, args, kwargs, inputs, result, generator)
        tell("collapse", 0.0)
        entries = [e for e in result.entries if e is not None]
        rows = collapse_of(graph, graph.params, batches, result.spaces, entries)
        tell("report", 0.5)
        described = {
            "name": type(model).__name__,
            "parameters": size,
            "tensors": len(graph.params),
            "trace": graph.trace,
            "mode": "train" if getattr(model, "training", False) else "eval",
            "seed": seed,
            "inputs": f"{len(result.batches)} batches" + ("" if inputs is None else ", as given"),
            "twin": twin,
        }
        classes = SymmetrySet(tuple(symmetries), rest=rest)
        return Audit(
            described,
            symmetries,
            count,
            rows,
            advice_on(rows),
            result.refuted,
            result.undecided,
            result.approximate,
            classes.counts(),
            picture(graph, result.spaces, symmetries),
            classes.reasons(),
        )


def audit_checkpoint(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    path: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Audit a safetensors checkpoint of any size without building its model in memory.

    The model lives on the meta device; its families and their certificates come from a small twin; weights are read from the
    file a few rows at a time. Peak memory is that of tracing (shapes, no weights), and of what is kept of one family at a time: a few
    n^2 numbers for a stream of width n.

    Args:
        model: the network on the meta device (``with torch.device("meta"): ...``).
        path: the safetensors file, its tensors under the model's parameter names; None: the architecture alone, nothing is said of
            collapse.

    Raises:
        CheckpointError: the file is damaged, or its tensors do not fit the model.
    """
    tell = progress or (lambda stage, fraction: None)
    generator = torch.Generator().manual_seed(seed)
    file = None if path is None else TensorFile(Path(path))
    with rng_state():
        tell("trace", 0.0)
        graph = trace(model, args, kwargs, values=False)
        keys = {} if path is None or file is None else _keys(graph, file.header, Path(path))
        found = audit_full_size(model, args, kwargs, graph, None, generator, tell)
        entries = [e for e in found.search.entries if e is not None]
        tell("collapse", 0.0)
        rows = [] if file is None else weight_collapse(entries, lambda name: file.rows(keys[name]), found.search.spaces)
    size, free = sum(p.numel() for p in graph.params.values()), sum(s.dim for s in found.symmetries)
    method = f"dimensions written at full size, certificates of the twin; {found.method}"
    count = Count(size, size - free, free, found.explained, False, method, found.gap)
    described = {
        "name": type(model).__name__,
        "parameters": size,
        "tensors": len(graph.params),
        "trace": graph.trace,
        "mode": "train" if model.training else "eval",
        "seed": seed,
        "inputs": "none: " + ("the architecture alone" if file is None else "weights streamed from the checkpoint"),
        "twin": found.twin,
    }
    drawn = picture(graph, found.search.spaces, found.symmetries)
    whole = found.found
    classified, reasons = whole.counts(), whole.reasons()
    return Audit(
        described,
        found.symmetries,
        count,
        rows,
        advice_on(rows),
        list(whole.refuted),
        list(whole.undecided),
        list(whole.approximate),
        classified,
        drawn,
        reasons,
    )


def _keys(graph: Graph, header: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Parameter -> key of the file, with or without a common prefix; shapes must fit."""
    out: dict[str, str] = {}
    for name, canonical in graph.aliases.items():
        if canonical in out or canonical not in graph.params:
            continue
        for key in (name, name.split(".", 1)[-1], next((k for k in header if k.endswith("." + name)), name)):
            if key in header and list(header[key]["shape"]) == list(graph.params[canonical].shape):
                out[canonical] = key
                break
    missing = sorted(set(graph.params) - set(out))
    if missing:
        listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise CheckpointError(f"{path} has no tensor of the right shape for {listed}. Give the --model that this file was saved from.")
    return out


def symmetries(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, seed: int = 0, progress: Progress | None = None
) -> SymmetrySet:
    """Discovery alone: the symmetries of the architecture, at parameters in general position.

    Works on a model on the meta device: no weights are read. Arguments as :func:`audit`.
    """
    generator = torch.Generator().manual_seed(seed)
    tell = progress or (lambda stage, fraction: None)
    with rng_state():
        _check(model, args, kwargs, values=False)
        model = functional(model, values=False).model if isinstance(model, nn.Module) else model
        return architecture(model, args, kwargs, generator, tell)


def _check(model: Any, args: Any, kwargs: Any, values: bool = True) -> None:
    """The model and its arguments can be used: two evaluations agree, and finite numbers come out.

    Args:
        values: whether the weights matter (False: any values, and none on the meta device, will do).
    """
    _check_arguments(args, kwargs)
    if isinstance(model, torch.export.ExportedProgram):
        return
    if not isinstance(model, nn.Module):
        hint = " That is a class: make an instance." if isinstance(model, type) else ""
        raise InputError(
            f"parasym audits torch.nn.Module objects, got {type(model).__name__}. "
            f"Pass the model itself, not its class, state_dict or function.{hint}"
        )
    meta = any(p.device.type == "meta" for p in model.parameters())
    if meta and values:
        raise InputError(
            "the model is on the meta device, so there are no weights to audit. Use parasym.symmetries(model, args), or load weights first."
        )
    functional(model, values=values)  # lazy, scripted, quantised, packed, sparse, sharded, not finite: each has its message
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "the model has no trainable parameters (all are frozen, or there are none). Set requires_grad on what you want audited."
        )
    if not torch.is_inference_mode_enabled() and any(p.is_inference() for p in model.parameters()):
        raise InputError("the weights were made under torch.inference_mode and have no derivative: make or load the model outside it.")
    if meta:
        return

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return float_outputs(model(*args, **dict(kwargs or {})), type(model).__name__)

    try:
        with preserve(model):
            out = check_deterministic(run, model=model, what=f"{type(model).__name__} on the example arguments")
    except (ParasymError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a forward may raise
        raise InputError(
            f"{type(model).__name__} does not accept the example arguments ({_shapes(args, kwargs)}): "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    if not sum(o.numel() for o in out):
        raise InputError(f"the outputs on the arguments ({_shapes(args, kwargs)}) have no entries: give a batch of at least one sample.")
    bad = sum(int((~torch.isfinite(o)).sum()) for o in out)
    if values and bad:
        raise InputError(
            f"{bad} of {sum(o.numel() for o in out)} outputs are NaN or infinite on the example arguments, so nothing can be compared. "
            "Look for overflow, a logarithm or root of a negative number; return masked logits as large finite numbers."
        )


def _check_arguments(args: Any, kwargs: Any) -> None:
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args must be a tuple of the model's arguments, got {type(args).__name__}; for one tensor write args=(x,).")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs must be a mapping of argument names to values, got {type(kwargs).__name__}.")
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs or {}))):
        if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
            raise InputError(f"an input of shape {tuple(leaf.shape)} has layout {leaf.layout}: give it dense, x.to_dense().")


def _check_options(completeness: Any, seed: Any, loss_fn: Any, inputs: Any, args: Sequence[Any], model: Any) -> None:
    if completeness not in get_args(Completeness):
        raise InputError(f"completeness must be one of {', '.join(get_args(Completeness))}, got {completeness!r}.")
    if not isinstance(seed, int):
        raise InputError(f"seed must be an integer, got {type(seed).__name__}.")
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(f"loss_fn must be a function of the model's output, got {type(loss_fn).__name__}.")
    if loss_fn is not None and not isinstance(model, nn.Module):
        raise InputError("loss_fn needs the module itself, not an exported program.")
    if inputs is None:
        return
    if not isinstance(inputs, (tuple, list)) or not all(isinstance(i, (tuple, list)) for i in inputs):
        raise InputError("inputs must be a list of argument tuples, such as [(x1,), (x2,)].")
    if not inputs:
        raise InputError("inputs is empty: give at least one tuple of arguments, or None to draw them.")
    example = [a for a in pytree.tree_leaves(tuple(args)) if isinstance(a, Tensor)]
    for k, given in enumerate(inputs):
        for a, b in zip(example, (x for x in pytree.tree_leaves(tuple(given)) if isinstance(x, Tensor)), strict=False):
            if (a.is_floating_point(), a.is_complex()) != (b.is_floating_point(), b.is_complex()):
                raise InputError(f"entry {k} of inputs holds a tensor of {b.dtype} where args has one of {a.dtype}.")


def _check_loss(model: nn.Module, loss_fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> None:
    with preserve(model), torch.no_grad():
        out = model(*args, **dict(kwargs or {}))
        try:
            loss = loss_fn(out)
        except Exception as error:
            raise InputError(f"loss_fn failed on the model's output: {type(error).__name__}: {str(error)[:300]}") from error
    float_outputs(loss, "loss_fn")


def _shapes(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> str:
    def one(a: Any) -> str:
        return str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__

    return ", ".join([*map(one, args), *(f"{k}={one(v)}" for k, v in (kwargs or {}).items())])


def _check_weights(graph: Graph) -> None:
    bad = {n: int((~torch.isfinite(p)).sum()) for n, p in graph.params.items() if p.numel() and not bool(torch.isfinite(p).all())}
    if bad:
        listed = ", ".join(f"{n} ({k})" for n, k in list(bad.items())[:5])
        raise InputError(f"NaN or infinite weights in {len(bad)} tensors: {listed}. Load a checkpoint from before the run diverged.")


def _loss_level(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    inputs: Any,
    base: Search,
    generator: torch.Generator,
) -> list[Symmetry]:
    """Symmetries of loss_fn(model) that the model itself does not have."""
    from dataclasses import replace

    wrapped = trace(_WithLoss(model, loss_fn), args, kwargs)
    strip = {n: n.removeprefix("model.") for n in wrapped.params}
    wrapped.params = {strip[n]: p for n, p in wrapped.params.items()}
    wrapped.holders = {h: strip[n] for h, n in wrapped.holders.items()}
    wrapped.aliases = {a.removeprefix("model."): strip[n] for a, n in wrapped.aliases.items()}
    if sum(p.numel() for p in wrapped.params.values()) > EXACT_PARAMETERS:
        return []
    found = search(wrapped, base.batches, generator, grow=False, level="loss")
    known = {(s.name, s.parameters, s.dim) for s in base.symmetries}
    return [replace(s, level="loss") for s in found.symmetries if (s.name, s.parameters, s.dim) not in known]


class _CallableModule(ModuleType):
    """``parasym.audit`` names this module once it is imported, and the function before: both can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Audit:
        return audit(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
