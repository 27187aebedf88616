"""What a watched model can be asked: its charges, and the graph and index spaces in which collapse is measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from parasym.core.errors import ParasymError
from parasym.core.functional import functional
from parasym.core.graph import Graph, batch_statistics, trace
from parasym.core.guards import rng_state
from parasym.core.samples import Batch, flatten
from parasym.laws.charges import Charge, discover
from parasym.symmetry.dictionary import DictionaryAction, Entry
from parasym.symmetry.spaces import Spaces, find_spaces

LABELS = ("labels", "label", "label_ids", "num_items_in_batch")
_SAMPLES = 8  # of a captured batch: enough for certificates and batch statistics


@dataclass
class Found:
    """What was found on a model.

    Attributes:
        charges: to keep books of. without: symmetries that give none, with the reason.
        graph, spaces, entries: for collapse. batch: data in the order of the graph's inputs; None on the meta device.
        notes: what had to be done to get there.
    """

    charges: tuple[Charge, ...]
    without: tuple[tuple[str, str], ...]
    graph: Graph
    spaces: Spaces
    entries: list[Entry]
    batch: Batch | None
    notes: list[str] = field(default_factory=list)


def find(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], head: Any = None, seed: int = 0) -> Found:
    """Search a copy of the model; the model is not touched, and only read (not even that where it is sharded).

    Args:
        model: the live model, in the mode it trains in; wrappers are opened.
        args, kwargs: a batch it was called with. Labels are left out, so that what is searched is the function and not its loss.
        head: see `parasym.laws.charges.charges`.
        seed: of the search.

    Raises:
        InputError, TraceError: see `parasym.laws.charges.discover`.
    """
    with rng_state():
        copied, args, kwargs, notes = _searchable(model, tuple(args), dict(kwargs))
        wide = args, kwargs
        args, kwargs = few(args, kwargs)
        found, symmetries = discover(copied, args, kwargs, head=head, seed=seed)
        actions = [s.action for s in symmetries]
        entries = [a.entry for a in actions if isinstance(a, DictionaryAction)]
        hollow = any(p.is_meta for p in copied.parameters())
        args, kwargs = wide if not hollow else (args, kwargs)  # units are dead or alive on all the data at hand
        if not (copied.training and batch_statistics(graph := trace(copied, args, kwargs, values=not hollow))):
            graph = trace(copied.eval(), args, kwargs, values=not hollow)
        batch = None if hollow else flatten(graph, args, kwargs)
    return Found(found.charges, found.without, graph, find_spaces(graph), entries, batch, notes)


def _searchable(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[str]]:
    """A copy that can be traced, and the arguments for it: no labels, no cache, few samples; on the meta device where it is sharded."""
    inner = functional(model, values=False).model
    notes = []
    if any(is_sharded(p) for p in inner.parameters()):
        copied = hollow_copy(inner)
        notes.append("the model is sharded: its architecture was searched, its weights were not read")
        args, kwargs = pytree.tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs))
    else:
        copied = copy.deepcopy(inner)
    for p in copied.parameters():
        p.grad = None
    config = getattr(copied, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False  # a cache in the output cannot be traced
    kwargs.pop("use_cache", None)
    if any(k in kwargs for k in LABELS):
        kept = {k: v for k, v in kwargs.items() if k not in LABELS}
        try:
            with torch.no_grad(), rng_state():
                copied(*args, **kept)
            kwargs = kept
        except Exception:  # a model that cannot do without them is searched with them
            notes.append("searched together with its loss: the model takes no call without labels")
    return copied, args, kwargs, notes


def few(args: tuple[Any, ...], kwargs: dict[str, Any], most: int = _SAMPLES) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first samples of a call's tensors, copied, where they all share their first dimension; else all of it, copied."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
    sizes = {t.shape[0] for t in tensors}
    n = most if len(sizes) == 1 else None
    return pytree.tree_map(lambda t: (t[:n] if t.ndim else t).detach().clone() if isinstance(t, Tensor) else t, (args, kwargs))  # type: ignore[no-any-return]


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return hasattr(p, "full_tensor") and hasattr(p, "placements")


def hollow_copy(model: nn.Module) -> nn.Module:
    """The same architecture on the meta device, without hooks and without what ``fully_shard`` made of its classes.

    Raises:
        ParasymError: a module cannot be copied so.
    """
    made: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def tensor(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if id(t) not in tensors:
            empty = torch.empty(t.shape, dtype=t.dtype, device="meta")
            tensors[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
        return tensors[id(t)]

    def one(m: nn.Module) -> nn.Module:
        if id(m) in made:
            return made[id(m)]
        kind = next((c for c in type(m).__mro__ if "fsdp" not in c.__module__ and not c.__name__.startswith("FSDP")), None)
        if kind is None or not issubclass(kind, nn.Module):
            raise ParasymError(f"{type(m).__name__} cannot be copied without its shards.")
        new = made[id(m)] = kind.__new__(kind)
        new.__dict__.update(m.__dict__)
        for key in list(new.__dict__):
            if "_hooks" in key and isinstance(new.__dict__[key], dict):
                new.__dict__[key] = type(new.__dict__[key])()
        new.__dict__["_parameters"] = {k: tensor(p) for k, p in m._parameters.items()}
        new.__dict__["_buffers"] = {k: tensor(b) for k, b in m._buffers.items()}
        new.__dict__["_modules"] = {k: None if c is None else one(c) for k, c in m._modules.items()}
        for key, value in m.__dict__.items():  # other references to modules of the tree
            if isinstance(value, nn.Module):
                new.__dict__[key] = one(value)
        return new

    return one(model)
