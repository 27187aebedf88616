"""Units that can be cut out of a network: index spaces that some contraction reads, and everything that carries them.

What belongs to a unit is read off the traced graph, not off layer types: rows of what writes it, its biases, gains, slopes and running
statistics, and the columns that read it, wherever they are stored (fused, tied, flattened, grouped by heads).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from parasym.core.functional import Functional
from parasym.core.graph import Graph, standardise
from parasym.core.samples import Batch
from parasym.measure.findings import common
from parasym.measure.units import CARRY, Use, op_name
from parasym.symmetry.index_rules import arguments
from parasym.symmetry.readers import readers
from parasym.symmetry.spaces import Spaces, live_nodes

Place = tuple[str, int, Tensor]
"""A parameter or running statistic, an axis, and (n, m) positions along it: unit j is made of the entries at[j]."""

_SUMS = (
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "max",
    "min",
    "prod",
    "argmax",
    "topk",
    "sort",
)


@dataclass(frozen=True)
class Units:
    """The units of one index space.

    Attributes:
        size: how many.
        where: module path of what writes them.
        uses: contractions that read them.
        inside: what writes and carries them; ``outside``: the columns that read them.
        why: why they cannot be cut though they can be told apart, or None.
    """

    size: int
    where: str
    uses: tuple[Use, ...]
    inside: tuple[Place, ...]
    outside: tuple[Place, ...]
    why: str | None

    @property
    def places(self) -> tuple[Place, ...]:
        """Everything that carries them."""
        return self.inside + self.outside


def find_units(graph: Graph, spaces: Spaces) -> list[Units]:
    """All index spaces with writers and readers, in the order of the graph."""
    live = live_nodes(graph)
    found = [r for r in readers(graph) if r.node in live]
    nodes = {n.name: n for n in graph.nodes}
    out = []
    for atom in spaces.atoms:
        if atom.frozen is not None or atom.size < 2 or not atom.places:
            continue
        at: dict[tuple[str, int], Tensor] = {}
        for p in atom.places:
            index = p.positions(atom.number)
            known = at.get((p.tensor, p.axis))
            at[p.tensor, p.axis] = index if known is None else torch.cat([known, index], 1)
        uses = tuple(Use(r, _operand(graph, nodes[r.node]), at[r.weight, r.in_axis]) for r in found if (r.weight, r.in_axis) in at)
        read = {(u.reader.weight, u.reader.in_axis) for u in uses}
        inside = tuple((t, axis, index) for (t, axis), index in at.items() if (t, axis) not in read)
        outside = tuple((t, axis, index) for (t, axis), index in at.items() if (t, axis) in read)
        writers = [t for t, _, _ in inside if t in graph.params and graph.params[t].dim() > 1]
        if uses and writers:
            out.append(Units(atom.size, common(writers), uses, inside, outside, _coupled(graph, spaces, atom.number, live)))
    return out


def _operand(graph: Graph, contraction: Node) -> str:
    return next(a.name for a in contraction.all_input_nodes if graph.kind.get(a.name) != "param")


def _coupled(graph: Graph, spaces: Spaces, atom: int, live: set[str]) -> str | None:
    """An operator that sees how many units there are: a norm over them, a mean, a softmax."""
    for n in graph.nodes:
        if n.name not in live or graph.kind.get(n.name) != "active":
            continue
        name = op_name(n)
        if n.name in spaces.contractions:
            continue
        for a in n.all_input_nodes:
            if graph.kind.get(a.name) != "active" or not isinstance(a.meta.get("val"), Tensor):
                continue
            axes = [i for i in range(a.meta["val"].dim()) if atom in _atoms(spaces, a.name, i)]
            if axes and _mixes(n, name, a, axes, spaces, atom):
                return f"{name} ({n.name}) sees how many of them there are"
    return None


def _atoms(spaces: Spaces, name: str, axis: int) -> set[int]:
    found = spaces.axes.get(name)
    if not found or isinstance(found[0], list) or axis >= len(found):
        return set()
    return {x for b in spaces.blocks(name, axis) for x in b.atoms}


def _mixes(n: Node, name: str, a: Node, axes: Sequence[int], spaces: Spaces, atom: int) -> bool:
    rank = a.meta["val"].dim()
    if name in ("layer_norm", "rms_norm"):
        return max(axes) >= rank - len(arguments(n)["normalized_shape"])
    if name == "group_norm":
        return 1 in axes
    if name in ("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum"):
        return int(arguments(n)["dim"]) % rank in axes
    if n.target is standardise or name in CARRY - set(_SUMS):
        return False
    if name in _SUMS and isinstance(n.meta.get("val"), Tensor):
        return not any(atom in _atoms(spaces, n.name, i) for i in range(n.meta["val"].dim()))
    return False


# ------------------------------------------------------------------------------------------------ cutting


def cut(tensors: Mapping[str, Tensor], places: Sequence[Place], gone: Sequence[int]) -> dict[str, Tensor]:
    """The tensors that carry some units, without those units; several groups of units may be cut one after the other."""
    return cut_axes(tensors, kept_axes(tensors, [(places, gone)]))


def kept_axes(tensors: Mapping[str, Tensor], groups: Sequence[tuple[Sequence[Place], Sequence[int]]]) -> dict[tuple[str, int], Tensor]:
    """(tensor, axis) -> positions that stay, when units are cut out of several index spaces at once."""
    keep: dict[tuple[str, int], Tensor] = {}
    for places, gone in groups:
        for t, axis, at in places:
            on = keep.setdefault((t, axis), torch.ones(tensors[t].shape[axis], dtype=torch.bool))
            on[at[list(gone)].reshape(-1)] = False
    return {k: on.nonzero().flatten() for k, on in keep.items()}


def cut_axes(tensors: Mapping[str, Tensor], keep: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
    """Tensors with some of the positions along their axes."""
    out: dict[str, Tensor] = {}
    for (t, axis), index in keep.items():
        value = out.get(t, tensors[t])
        out[t] = value.index_select(axis, index.to(value.device))
    return out


_ATTRIBUTES: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("Linear", "weight", 0, ("out_features",)),
    ("Linear", "weight", 1, ("in_features",)),
    ("_ConvTransposeNd", "weight", 0, ("in_channels",)),
    ("_ConvTransposeNd", "weight", 1, ("out_channels",)),
    ("_ConvNd", "weight", 0, ("out_channels",)),
    ("_ConvNd", "weight", 1, ("in_channels",)),
    ("_NormBase", "weight", 0, ("num_features",)),
    ("_NormBase", "running_mean", 0, ("num_features",)),
    ("PReLU", "weight", 0, ("num_parameters",)),
    ("Embedding", "weight", 0, ("num_embeddings",)),
    ("Embedding", "weight", 1, ("embedding_dim",)),
    ("Conv1D", "weight", 0, ("nx",)),
    ("Conv1D", "weight", 1, ("nf",)),
    ("RNNBase", "weight_hh_l0", 1, ("hidden_size",)),
    ("RNNBase", "weight_ih_l0", 1, ("input_size",)),
    ("RNNCellBase", "weight_hh", 1, ("hidden_size",)),
    ("RNNCellBase", "weight_ih", 1, ("input_size",)),
)
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads", "all_head_size", "split_size", "inner_dim", "num_kv_heads",
          "num_key_value_heads")  # fmt: skip


def attributes(view: Functional, keep: Mapping[tuple[str, int], Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """What modules say about their own sizes, for the sizes after a cut: "path.attribute" -> value."""
    names = {**{n: n for n in shapes}, **view.aliases}
    out: dict[str, Any] = {}
    for (tensor, axis), index in keep.items():
        for name in [n for n, canonical in names.items() if canonical == tensor]:
            path, _, attr = name.rpartition(".")
            module = view.model.get_submodule(path)
            kinds = {c.__name__ for c in type(module).__mro__}
            for kind, held, at, fields in _ATTRIBUTES:
                if kind not in kinds or (held, at) != (attr, axis) or (kind == "_ConvNd" and "_ConvTransposeNd" in kinds):
                    continue
                for f in fields:
                    if getattr(module, f, None) == shapes[tensor][axis]:
                        out[f"{path}.{f}" if path else f] = len(index)
            groups = getattr(module, "groups", 1)
            if attr == "weight" and axis == 0 and groups > 1 and groups == shapes[tensor][0]:  # depthwise
                out |= {f"{path}.{f}" if path else f: len(index) for f in ("groups", "in_channels")}
    return out


def parent_attributes(view: Functional, units: Units, left: int) -> dict[str, Any]:
    """Counts of heads that the module around the writers keeps, for ``left`` of them: "path.attribute" -> value."""
    out: dict[str, Any] = {}
    spans = {units.size: left} | {units.size * at.shape[1]: left * at.shape[1] for _, _, at in units.places}
    path = units.where
    for _ in range(2):
        module = view.model.get_submodule(path) if path else view.model
        for f in _HEADS:
            value = getattr(module, f, None)
            if isinstance(value, int) and value in spans:
                out[f"{path}.{f}" if path else f] = spans[value]
        if not path:
            break
        path = path.rpartition(".")[0]
    return out


# ------------------------------------------------------------------------------------------------ names and data


def buffer_names(view: Functional, graph: Graph) -> dict[str, str]:
    """Placeholder of a buffer in the graph -> its name in the model."""
    out = {}
    for name, value in view.buffers.items():
        holder = "b_" + name.replace(".", "_")
        if holder in graph.buffers and graph.buffers[holder].shape == value.shape:
            out[holder] = name
    return out


def as_arguments(batch: Batch, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A flat batch in the structure of example arguments, in their types."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    rest = iter(batch)
    filled = [next(rest).to(x.dtype) if isinstance(x, Tensor) else x for x in leaves]
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(filled, spec)
    return found


@contextlib.contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Frozen parameters take part in a trace, too; their flags are put back."""
    frozen = [p for p in model.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
