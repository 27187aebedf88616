"""The twin of a model: the same architecture at widths so small that its symmetries can be counted.

What a network's symmetries are does not depend on how wide it is. A twin has the operators of the model, in the same order and
wired the same way, at distinct small widths, with two or three of its repeated layers and generic weights in float64. Families
found there are written down at full size by exchanging index spaces: the axes of each parameter have the same structure in
both, so that (parameter, axis, block, position in the block) names corresponding atoms.

A twin is made from the model's configuration where it has one (Transformers), else by rewriting its operator graph
(:mod:`parasym.symmetry.shrink`). Either way it is compared with the model operator by operator before it is handed out.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from parasym.core.errors import ParasymError
from parasym.core.graph import Graph, _export, _from_program, trace
from parasym.core.guards import preserve, rng_state
from parasym.core.samples import draw, flatten, token_ranges
from parasym.symmetry.generic import _units, generic_draw
from parasym.symmetry.shrink import Layers, draw_inputs, resized, truncate
from parasym.symmetry.spaces import Spaces, find_spaces, live_nodes
from parasym.symmetry.tangent import Together

log = logging.getLogger("parasym")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_BATCH, _IMAGES = 7, 29  # samples; an image often gives two or three numbers only
_LENGTH = 5
_AWAKE_STEPS, _AWAKE_SAMPLES, _SIDE = 150, 40, 0.2
_PLAIN_EXPERTS = "batched_mm"
_TRACES = 6  # candidates that are traced before giving up


class TwinError(ParasymError):
    """No small model of the same architecture could be made; the message says what stood in the way."""


@dataclass(frozen=True)
class Twin:
    """A small model with the operators of a big one.

    Attributes:
        graph: traced, with generic float64 parameters, ready to evaluate.
        args, kwargs: example inputs.
        how: which sizes became which, in one sentence.
        names: parameter of the full model (canonical name) -> parameter of the twin (canonical name). Layers beyond those of
            the twin share its last layer of the same kind.
        repeats: path of a container of repeated layers in the full model -> (its layers, those of the twin).
        model: the module that was traced; None for a twin made from a graph.
    """

    graph: Graph = field(repr=False)
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    how: str
    names: dict[str, str] = field(repr=False)
    repeats: dict[str, tuple[int, int]]
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def data(self) -> list[Tensor]:
        """The example inputs as the graph takes them."""
        return flatten(self.graph, self.args, self.kwargs)

    def layer_of(self, full_name: str) -> tuple[int, ...]:
        """Indices of the repeated layers a parameter of the full model belongs to, outermost first."""
        parts = full_name.split(".")
        return tuple(int(p) for i, p in enumerate(parts) if p.isdigit() and ".".join(parts[:i]) in self.repeats)


def find_twin(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, budget: int = 1500) -> Twin | None:
    """A small copy of the architecture, or None (the log says why).

    Args:
        model: any module, also on the meta device; its weights are not read. An exported program serves too.
        args, kwargs: example inputs of the full model.
        budget: most parameters the twin may have.
    """
    try:
        return make_twin(model, args, kwargs, budget=budget)
    except TwinError as error:
        log.info("no twin: %s", error)
        return None


def make_twin(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, budget: int = 1500) -> Twin:
    """Like :func:`find_twin`, but says why there is none.

    Raises:
        TwinError: no candidate ran, was small enough and had the operators of the model.
        InputError, TraceError: the full model cannot be traced with these inputs.
    """
    kwargs = dict(kwargs or {})
    with rng_state():
        torch.manual_seed(0)
        reasons = []
        for route in (_from_config, _from_graph):
            found = route(model, tuple(args), kwargs, budget)
            if isinstance(found, Twin):
                return found
            reasons.append(found)
    raise TwinError(". ".join(r for r in reasons if r))


@contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """Experts computed by operators that have index rules, for as long as the context lasts."""
    held: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in held if hasattr(c, "_experts_implementation")}
    before = {i: c._experts_implementation for i, c in configs.items()}
    try:
        for c in configs.values():
            c._experts_implementation = _PLAIN_EXPERTS
        yield
    finally:
        for i, c in configs.items():
            c._experts_implementation = before[i]


def spelled_out(model: object, args: Sequence[Any], kwargs: Mapping[str, Any] | None, graph: Graph) -> Graph:
    """The graph with fused kernels of experts spelled out, for its index spaces; the graph itself where there are none.

    It gathers the weights of an expert for every token: good for reading, too large to be run.
    """
    fused = any("grouped_mm" in str(n.target) for n in graph.nodes)
    if not fused or not isinstance(model, nn.Module):
        return graph
    with _plain_experts(model):
        spelled = trace(model, tuple(args), kwargs, values=False)
    return replace(spelled, params=graph.params) if spelled.params.keys() == graph.params.keys() else graph


# -- the same architecture? ----------------------------------------------------------------------------------------------------


def difference(full: Graph, twin: Graph, spaces: Spaces | None = None) -> str | None:
    """Why two graphs are not the same architecture at different widths; None when they are.

    Compared are the operators in order, their wiring, the rank of every tensor, which axes have size one, which taps of a
    convolution ever meet data, and the structure of every parameter's axes in index spaces (``spaces``: those of ``full``).
    """
    a, b = _wiring(full), _wiring(twin)
    if len(a) != len(b):
        return f"{len(a)} operators became {len(b)}"
    for (n, x), (_, y) in zip(a, b, strict=True):
        if x != y:
            return f"{n.name} became another operator, or reads other tensors ({x[0]} and {y[0]})"
    for (n, _), (m, _) in zip(a, b, strict=True):
        if full.kind.get(n.name) == "param":  # shapes of parameters are compared axis by axis below
            continue
        why = _other_shape(n, m) or _other_window(n, m)
        if why:
            return f"{n.name}: {why}"
    return _other_axes(spaces or find_spaces(full), find_spaces(twin))


def _wiring(graph: Graph) -> list[tuple[Node, tuple[Any, ...]]]:
    """Live nodes that are no constants, each with its operator and what it reads (-1: a constant)."""
    live = live_nodes(graph)
    nodes = [n for n in graph.nodes if n.name in live and graph.kind.get(n.name) != "const"]
    at = {n.name: i for i, n in enumerate(nodes)}
    return [(n, (_operator(n), tuple(at.get(a.name, -1) for a in n.all_input_nodes))) for n in nodes]


def _operator(n: Node) -> str:
    """An operator with its switches: flags and words among its arguments, not its sizes."""
    switches = [a for a in pytree.tree_leaves((n.args, dict(n.kwargs))) if isinstance(a, (bool, str))]
    return " ".join([str(n.target) if n.op == "call_function" else n.op, *map(str, switches)])


def _other_shape(n: Node, m: Node) -> str | None:
    x, y = n.meta.get("val"), m.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    if x.dim() != y.dim():
        return f"{x.dim()} axes became {y.dim()}"
    ones = [i for i, (s, t) in enumerate(zip(x.shape, y.shape, strict=True)) if (s == 1) != (t == 1)]
    return f"axis {ones[0]} of size {x.shape[ones[0]]} became {y.shape[ones[0]]}" if ones else None


def _other_window(n: Node, m: Node) -> str | None:
    """A tap of a kernel that only ever meets padding is a dead parameter: so in both, or in neither."""
    name = str(n.target)
    if "conv" not in name or "transpose" in name or n.op != "call_function":
        return None
    x, y = _taps(n), _taps(m)
    return (
        "the input is so small that part of the kernel only meets padding" if any(a and not b for a, b in zip(x, y, strict=False)) else None
    )


def _taps(n: Node) -> list[bool]:
    schema = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
    named = {**dict(zip(schema, n.args, strict=False)), **n.kwargs}
    x, w = named["input"].meta["val"], named["weight"].meta["val"]
    space = w.dim() - 2
    pad, dilation = named.get("padding", 0), named.get("dilation", 1)
    out = []
    for i in range(space):
        d = dilation[i % len(dilation)] if isinstance(dilation, (list, tuple)) else int(dilation)
        reach = d * (w.shape[2 + i] - 1)
        p = pad[i % len(pad)] if isinstance(pad, (list, tuple)) else reach // 2 if pad == "same" else 0 if pad == "valid" else int(pad)
        out.append(max(p, reach - p) < x.shape[x.dim() - space + i])
    return out


def _shape_of_axis(spaces: Spaces, name: str, axis: int) -> tuple[int, ...]:
    return tuple(len(b.atoms) for b in spaces.blocks(name, axis))


def _other_axes(full: Spaces, twin: Spaces) -> str | None:
    if full.graph.params.keys() != twin.graph.params.keys():
        return f"parameters differ: {sorted(full.graph.params.keys() ^ twin.graph.params.keys())[:3]}"
    return next((why for name in full.graph.params if (why := _unlike(full, twin, name, name))), None)


def _unlike(full: Spaces, twin: Spaces, name: str, small: str) -> str | None:
    if name not in full._by_tensor or small not in twin._by_tensor:
        return None if (name in full._by_tensor) == (small in twin._by_tensor) else f"{name} is read in one of the two only"
    for axis in range(full.graph.params[name].dim()):
        if _shape_of_axis(full, name, axis) != _shape_of_axis(twin, small, axis):
            return f"axis {axis} of {name} is {full.axis_of(name, axis)} in the model and {twin.axis_of(small, axis)} in the twin"
    return None


def atom_map(full: Spaces, twin: Spaces, twin_obj: Twin) -> tuple[dict[str, list[list[tuple[int, ...]]]], dict[str, str]]:
    """How the axes of each parameter line up with those of its counterpart.

    Returns:
        For each full parameter whose axes have the structure of its counterpart's: for each axis, for each block, the numbers
        of the full atoms in the order in which the twin's block lists its own. And the others, with the reason.
    """
    good: dict[str, list[list[tuple[int, ...]]]] = {}
    bad: dict[str, str] = {}
    for name in full.graph.params:
        small = twin_obj.names.get(name)
        why = "it has no counterpart" if small is None else _unlike(full, twin, name, small)
        if why:
            bad[name] = why
        elif name in full._by_tensor:
            good[name] = [[b.atoms for b in full.blocks(name, axis)] for axis in range(full.graph.params[name].dim())]
    return good, bad


# -- from a configuration ------------------------------------------------------------------------------------------------------

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
_WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim", "embedding_size")
_INNER = (
    "intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "hidden_dim", "d_inner",
    "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "decoder_hidden_size",
)  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HEAD_DIM = ("head_dim", "d_kv", "kv_channels", "attention_head_size")
_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx", "max_source_positions", "max_target_positions", "max_seq_len")
_EXPERT_INNER = 3  # few units: there are several experts in a layer, and two layers tell more than one
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_DROP = (
    "stage_names", "out_features", "out_indices", "quantization_config", "torch_dtype", "dtype", "id2label", "label2id", "architectures",
    "transformers_version", "_name_or_path", "_commit_hash",
)  # fmt: skip
_TYPES = ("layer_types", "attention_layers")
_TRUNCATING = (*_LAYERS, *_TYPES, "attention_types", "first_k_dense_replace", "num_stages", "num_encoder_blocks")
_FEW = {"num_attention_heads": 2, "num_heads": 2, "sr_ratios": 2, "patch_sizes": 3, "strides": 2, "mlp_ratios": 2}  # most, for each stage


@dataclass(frozen=True)
class _Sizes:
    """One choice of sizes for a configuration."""

    layers: int
    heads: int
    head_dim: int
    width: int
    inner: int
    rotary: int
    extra_positions: int
    stages: tuple[int, ...] = ()
    keep_padding: bool = False


def _from_config(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], budget: int) -> Twin | str:
    holder = _configured(model) if isinstance(model, nn.Module) else None
    if holder is None:
        return ""
    maker = _Maker(model, holder, args, kwargs)
    reasons: dict[str, None] = {}
    traced = 0
    for sizes in maker.candidates():
        try:
            found = maker.attempt(sizes, budget)
        except TwinError as error:
            reasons[str(error)] = None
            continue
        if isinstance(found, Twin):
            return found
        reasons[found] = None
        traced += 1
        if traced >= _TRACES:
            break
    shown = list(reasons)[:3] + ([f"and {len(reasons) - 3} more reasons"] if len(reasons) > 3 else [])
    return f"no small {type(maker.config).__name__} could be built: {'; '.join(shown)}"


def _configured(model: nn.Module) -> str | None:
    """Path of the module that holds a Transformers configuration: the model itself (""), or a child of it."""
    for path, module in [("", model), *model.named_children()]:
        config: object = getattr(module, "config", None)
        if hasattr(config, "to_dict") and hasattr(config, "model_type") and hasattr(type(module), "config_class"):
            return path
    return None


class _Maker:
    """Builds small models of one configured class and compares them with the full one."""

    def __init__(self, model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.path, self.args, self.kwargs = model, path, args, kwargs
        self.inner = cast(Any, model.get_submodule(path))
        self.config = self.inner.config
        self.full: dict[str, Any] = self.config.to_dict()
        if isinstance(getattr(self.config, "num_labels", None), int):  # a property, not among the fields
            self.full.setdefault("num_labels", self.config.num_labels)
        self.pooled = "add_pooling_layer" in inspect.signature(type(self.inner)).parameters
        self.cut: dict[tuple[Any, ...], Graph | str] = {}

    # -- candidate sizes --

    def candidates(self) -> Iterator[_Sizes]:
        """Choices of sizes, the richest first."""
        for padding in (False, True):
            yield from self._staged(padding) if self.staged else self._plain(padding)

    @property
    def staged(self) -> int:
        """How many stages of layers, each with a width of its own; 0 for a model without."""
        widths = isinstance(self.full.get("hidden_sizes"), (list, tuple)) or self.doubling
        return len(self.full["depths"]) if widths and isinstance(self.full.get("depths"), (list, tuple)) else 0

    @property
    def doubling(self) -> bool:
        """Whether the width is given for the first stage and doubles in each that follows."""
        return isinstance(self.full.get("embed_dim"), int) and "hidden_sizes" not in self.full and "window_size" in self.full

    def _kept(self, n: int) -> list[int]:
        """The stages of the model that a twin with ``n`` stages has: the first ones, and the last."""
        return [*range(n - 1), self.staged - 1]

    def _plain(self, padding: bool) -> Iterator[_Sizes]:
        heads = self._first(_HEADS)
        kv = self._first(_KV_HEADS)
        few = 4 if kv and heads and 1 < kv < heads else 2
        part = self._rotary_part()
        dims = (6, 8) if part is not None and part < 1 else (4, 6) if part is not None else (3, 4, 2)
        free = any(self.full.get(n) is not None for n in _HEAD_DIM) or (few == 4 and part is not None)
        for layers, d, extra in itertools.product((2, 1), dims, (0, 2, 4, 1)):
            turned = 4 if part is not None and part < 1 else d
            for width in dict.fromkeys([*((7, 8) if free and few == 4 else ()), few * d]):
                if width > d:
                    yield _Sizes(layers, few, d, width, width + 1, turned, extra, keep_padding=padding)

    def _staged(self, padding: bool) -> Iterator[_Sizes]:
        count = self.staged
        bases: tuple[tuple[int, ...], ...] = ((4, 5, 6, 7), (3, 4, 5, 6), (2, 3, 4, 5), (8, 12, 16, 20), (16, 24, 32, 40))
        if self.doubling:
            bases = ((4, 8, 16, 32),)
        elif isinstance(self.full.get("groups_width"), int):
            bases = ((6, 8, 10, 12),)
        elif isinstance(self.full.get("num_attention_heads"), (list, tuple)):
            bases = ((3, 4, 6, 8), (4, 6, 8, 10))
        for stages, layers, base in itertools.product(dict.fromkeys((min(count, 3), min(count, 2))), (2, 1), bases):
            yield _Sizes(layers, 2, 2, base[0], base[-1] + 2, 0, 0, tuple(base[:stages]), padding)

    def _first(self, names: Sequence[str]) -> Any:
        return next((self.full[n] for n in names if isinstance(self.full.get(n), int)), None)

    def _rotary_part(self) -> float | None:
        """Share of a head that rotary positions turn; None where there are none."""
        rope = self.full.get("rope_parameters") or self.full.get("rope_scaling") or {}
        dim = self.full.get("rotary_dim")
        heads, width = self._first(_HEADS), self._first(_WIDTH)
        if isinstance(dim, int) and heads and width:
            return dim * heads / width
        turns = any("rotary" in type(m).__name__.lower() for m in self.inner.modules())
        if not turns and not rope and "rope_theta" not in self.full:
            return None
        return float(rope.get("partial_rotary_factor") or self.full.get("partial_rotary_factor") or self.full.get("rotary_pct") or 1.0)

    # -- a configuration --

    def fields(self, sizes: _Sizes) -> dict[str, Any]:
        """What changes in the configuration."""
        new: dict[str, Any] = {}
        new |= self._layer_fields(sizes)
        full_width = self._first(_WIDTH)
        for names, value in ((_HEADS, sizes.heads), (_HEAD_DIM, sizes.head_dim), (_EXPERTS, 3)):
            new |= {n: value for n in names if isinstance(self.full.get(n), int)}
        for n in _WIDTH:
            if isinstance(self.full.get(n), int):
                new[n] = sizes.width if self.full[n] == full_width or n == "hidden_size" else max(2, sizes.width - 1)
        inner = _EXPERT_INNER if any(n in self.full for n in _EXPERTS) else sizes.inner
        new |= {n: inner for n in _INNER if n in self.full and (self.full[n] is None or isinstance(self.full[n], int))}
        new |= self._kv_fields(sizes) | self._token_fields(sizes) | self._image_fields(sizes) | self._rotary_fields(sizes)
        if sizes.heads == 4 and "head_dim" not in new and sizes.width != sizes.heads * sizes.head_dim:
            new["head_dim"] = sizes.head_dim
        if sizes.stages:
            new = {n: v for n, v in new.items() if n not in _LAYERS} | self._stage_fields(sizes)
            if self.doubling:
                new.pop("hidden_size", None)
        new |= {n: 0.0 for n, v in self.full.items() if isinstance(v, float) and re.search("drop", n)}
        return new

    def _layer_fields(self, sizes: _Sizes) -> dict[str, Any]:
        count = sizes.layers
        new: dict[str, Any] = {}
        for n in _TYPES:
            kinds = self.full.get(n)
            if isinstance(kinds, (list, tuple)) and kinds:
                distinct = list(dict.fromkeys(kinds))
                count = max(count, len(distinct))
                new[n] = (distinct + [distinct[-1]] * count)[:count]
                if "attention_types" in self.full and n == "attention_layers":
                    new["attention_types"] = [[new[n], 1]]
        new |= {n: min(count, self.full[n]) for n in _LAYERS if isinstance(self.full.get(n), int)}
        if isinstance(self.full.get("first_k_dense_replace"), int):
            new["first_k_dense_replace"] = min(1, self.full["first_k_dense_replace"])
        return new

    def _kv_fields(self, sizes: _Sizes) -> dict[str, Any]:
        heads, new = self._first(_HEADS), {}
        for n in _KV_HEADS:
            kv = self.full.get(n)
            if isinstance(kv, int) and heads:
                new[n] = sizes.heads if kv == heads else 1 if kv == 1 else max(1, sizes.heads // 2)
        return new

    def _token_fields(self, sizes: _Sizes) -> dict[str, Any]:
        new: dict[str, Any] = {}
        if isinstance(self.full.get("vocab_size"), int):
            new["vocab_size"] = min(self.full["vocab_size"], sizes.width + 3 if sizes.width + 3 != sizes.inner else sizes.width + 4)
        new |= {n: _LENGTH + sizes.extra_positions for n in _POSITIONS if isinstance(self.full.get(n), int)}
        if isinstance(self.full.get("relative_attention_num_buckets"), int):
            new |= {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 8}
        labels = self.full.get("num_labels")
        if isinstance(labels, int):
            new["num_labels"] = min(labels, 3)
        pad = self.full.get("pad_token_id")
        keep = sizes.keep_padding and isinstance(pad, int) and pad < new.get("vocab_size", 0)
        for n in self.full:
            if n.endswith("_token_id"):
                new[n] = self.full[n] if keep and n == "pad_token_id" else None
        if self.full.get("is_encoder_decoder") and "decoder_start_token_id" in self.full:
            new["decoder_start_token_id"] = 0
        return new

    def _image_fields(self, sizes: _Sizes) -> dict[str, Any]:
        new: dict[str, Any] = {}
        patch, image = self.full.get("patch_size"), self.full.get("image_size")
        if isinstance(patch, int):
            new["patch_size"] = min(patch, 2)
            if isinstance(image, int):
                new["image_size"] = 2 * new["patch_size"]
        new |= {n: min(self.full[n], most) for n, most in (("num_channels", 2), ("num_mel_bins", 3)) if isinstance(self.full.get(n), int)}
        return new

    def _rotary_fields(self, sizes: _Sizes) -> dict[str, Any]:
        new: dict[str, Any] = {}
        share = sizes.rotary / sizes.head_dim if sizes.head_dim else 1.0
        rope = self.full.get("rope_parameters")
        if isinstance(rope, dict):
            new["rope_parameters"] = _turned(rope, share)
        if "rope_theta" in self.full:
            new["rope_theta"] = 10.0
        if isinstance(self.full.get("rotary_dim"), int):
            new["rotary_dim"] = sizes.rotary
        for n in ("partial_rotary_factor", "rotary_pct"):
            if isinstance(self.full.get(n), float) and self.full[n] < 1:
                new[n] = share
        return new

    def _stage_fields(self, sizes: _Sizes) -> dict[str, Any]:
        """Lists with one entry for each stage."""
        kept = self._kept(len(sizes.stages))
        new: dict[str, Any] = {}
        for n, v in self.full.items():
            if isinstance(v, (list, tuple)) and len(v) == self.staged and n not in _DROP:
                new[n] = [min(v[i], _FEW.get(n, v[i])) for i in kept]
        new["depths"] = [min(sizes.layers, self.full["depths"][i]) for i in kept]
        new |= {n: len(kept) for n in ("num_stages", "num_encoder_blocks") if n in self.full}
        if self.doubling:
            new |= {"embed_dim": sizes.stages[0], "window_size": min(2, self.full["window_size"]), "mlp_ratio": 1.25}
            new["image_size"] = new.get("patch_size", 2) * 2 ** (len(kept) + 1)
            return new
        new["hidden_sizes"] = list(sizes.stages)
        grouped = isinstance(self.full.get("groups_width"), int)
        if grouped:
            new["groups_width"] = 2
        stem = self.full.get("embedding_size")
        if isinstance(stem, int):
            other = sizes.stages[0] + 1 if grouped else max(2, sizes.stages[0] - 1 if sizes.stages[0] < 8 else 3)
            new["embedding_size"] = sizes.stages[0] if stem == self.full["hidden_sizes"][0] else other
        return new

    def _build(self, fields: Mapping[str, Any], device: str) -> nn.Module:
        values = {k: v for k, v in self.full.items() if k not in _DROP} | dict(fields)
        if self.doubling:  # both follow from the first width and the depths
            values = {k: v for k, v in values.items() if k not in ("hidden_size", "num_layers", "num_hidden_layers")}
        if "layer_types" in values and "layer_types" not in fields:
            values.pop("layer_types")
        config = type(self.config)(**values)
        for name, value in fields.items():
            if getattr(config, name, None) != value and name not in ("num_labels",):
                setattr(config, name, value)
        config._attn_implementation = "eager"
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = _PLAIN_EXPERTS
        config.use_cache = False
        options = {"add_pooling_layer": getattr(self.inner, "pooler", None) is not None} if self.pooled else {}
        with torch.device(device):
            inner = type(self.inner)(config, **options)
        if self.path:
            memo = {id(self.inner): inner}
            inner = copy.deepcopy(self.model, memo)
        return inner.train(self.model.training)

    def _built(self, fields: Mapping[str, Any], device: str) -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return self._build(fields, device)
        except Exception as error:
            raise TwinError(_line(error)) from error
        finally:
            torch.set_default_dtype(before)

    # -- attempts --

    def attempt(self, sizes: _Sizes, budget: int) -> Twin | str:
        """A verified twin, or why this choice of sizes did not work once traced.

        Raises:
            TwinError: it could not be built, was too big or had other parameters.
        """
        fields = self.fields(sizes)
        sketch = self._built(fields, "meta")
        total = sum(p.numel() for p in sketch.parameters())
        if total > budget:
            raise TwinError(f"{total} parameters at the smallest sizes tried, {budget} allowed")
        matched = match(self.model, sketch, self._types(fields))
        full = self._truncated(sizes, fields)
        small = self._built(fields, "cpu").to(torch.float64)
        _generic_statistics(small)
        _freeze_like(self.model, small, matched.names)
        try:
            args, kwargs, graph = self._trace_small(small, fields, full)
        except ParasymError as error:
            return str(error)
        why = difference(full, graph)
        if why:
            return why
        why = _generic(graph, flatten(graph, args, kwargs), small)
        if why:
            return why
        return Twin(
            graph, args, kwargs, self._how(fields, graph, matched.repeats), matched.canonical(self.model, graph), matched.repeats, small
        )

    def _types(self, fields: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
        """Kinds of layers that the configuration tells apart, here and in the twin."""
        return next(((list(self.full[n]), fields[n]) for n in _TYPES if n in fields), None)

    def _truncated(self, sizes: _Sizes, fields: Mapping[str, Any]) -> Graph:
        """The full model with as many layers as the twin, traced on the meta device."""
        keep = {k: v for k, v in fields.items() if k in _TRUNCATING or k.endswith("_token_id") or "drop" in k}
        if sizes.stages:
            keep |= {
                k: [self.full[k][i] for i in self._kept(len(sizes.stages))]
                for k, v in fields.items()
                if isinstance(v, list) and isinstance(self.full.get(k), (list, tuple)) and k not in _TRUNCATING
            }
            keep["depths"] = fields["depths"]
        key = tuple(sorted((k, str(v)) for k, v in keep.items()))
        if key not in self.cut:
            try:
                module = self._built(keep, "meta")
                _freeze_like(self.model, module, match(self.model, module).names)
                args, kwargs = pytree.tree_map_only(Tensor, _to_meta, (self.args, self.kwargs))
                self.cut[key] = trace(module, args, kwargs, values=False)
            except ParasymError as error:
                self.cut[key] = str(error)
        found = self.cut[key]
        if isinstance(found, str):
            raise TwinError(found)
        return found

    def _trace_small(self, small: nn.Module, fields: Mapping[str, Any], full: Graph) -> tuple[tuple[Any, ...], dict[str, Any], Graph]:
        """Inputs small enough to be quick and big enough that every kernel meets data."""
        last: Exception | None = None
        for side in self._sides(fields, full):
            args, kwargs = _small_inputs(small, self.path, self.args, self.kwargs, fields, self.full, side)
            try:
                graph = trace(small, args, kwargs)
            except ParasymError as error:
                last = error
                continue
            if side is None or difference(full, graph) is None:
                break
        else:
            if last is not None:
                raise last
        return args, kwargs, graph

    def _sides(self, fields: Mapping[str, Any], full: Graph) -> list[int | None]:
        image = [
            a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Tensor) and a.dim() == 4 and a.is_floating_point()
        ]
        if not image:
            return [None]
        if "image_size" in fields:
            return [fields["image_size"]]
        given = int(image[0].shape[-1])
        least = min((n.meta["val"].shape[-1] for n in full.nodes if _is_image(n)), default=given)
        step = max(1, round(given / max(1, least)))
        return list(dict.fromkeys(min(given, s) for s in (*(17, 33)[: 2 * (step > 8)], 2 * step + 1, 4 * step, 8 * step, given)))

    def _how(self, fields: Mapping[str, Any], graph: Graph, repeats: Mapping[str, tuple[int, int]]) -> str:
        shown = []
        for n, v in fields.items():
            old = self.full.get(n)
            if (
                isinstance(v, (int, list))
                and not isinstance(v, bool)
                and old is not None
                and old != v
                and not n.endswith("_id")
                and n not in _TYPES
            ):
                shown.append(f"{n} {old} -> {v}")
        total = sum(p.numel() for p in graph.params.values())
        return f"{type(self.config).__name__} with {', '.join(shown)} ({total} parameters)"


def _turned(rope: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Rotary parameters with planes that turn visibly within a few positions."""
    out: dict[str, Any] = {}
    for k, v in rope.items():
        out[k] = (
            _turned(v, share)
            if isinstance(v, dict)
            else 10.0
            if k == "rope_theta"
            else share
            if k == "partial_rotary_factor" and v is not None and v < 1
            else v
        )
    return out


def _is_image(n: Node) -> bool:
    value = n.meta.get("val")
    return n.op == "call_function" and isinstance(value, Tensor) and value.dim() == 4 and "conv" in str(n.target) and value.shape[-1] > 1


def _to_meta(t: Tensor) -> Tensor:
    """The same kind of tensor without values: at least two samples, floats in float64."""
    shape = (max(2, t.shape[0]), *t.shape[1:]) if t.dim() else ()
    return torch.empty(shape, dtype=torch.float64 if t.is_floating_point() else t.dtype, device="meta")


def _small_inputs(
    small: nn.Module,
    path: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    fields: Mapping[str, Any],
    given: Mapping[str, Any],
    side: int | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the same kind as the given ones at small sizes."""
    names = list(inspect.signature(small.forward).parameters)
    generator = torch.Generator().manual_seed(1)
    config: Any = small.get_submodule(path).config
    full_length = given.get("max_source_positions", 0)
    tokens = max(
        (
            t.shape[1]
            for t in pytree.tree_leaves((args, dict(kwargs)))
            if isinstance(t, Tensor) and t.dim() >= 2 and not t.is_floating_point()
        ),
        default=_LENGTH,
    )

    def make(name: str, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t.dim() == 4 and t.is_floating_point() and side is not None:
            return torch.randn(_IMAGES, getattr(config, "num_channels", t.shape[1]), side, side, generator=generator, dtype=torch.float64)
        if t.dim() == 3 and t.is_floating_point() and "num_mel_bins" in fields:
            frames = t.shape[2] // full_length if full_length else 1  # the stem halves the length of a spectrogram
            spectrogram = (_BATCH, fields["num_mel_bins"], frames * fields["max_source_positions"])
            return torch.randn(spectrogram, generator=generator, dtype=torch.float64)
        shape = [_BATCH if i == 0 else min(_LENGTH, s) if s == tokens else s for i, s in enumerate(t.shape)]
        if t.dim() == 3 and t.is_floating_point() and "embeds" in name:
            shape[2] = fields.get(next((n for n in _WIDTH if n in fields), ""), shape[2])
        if t.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        return _small_integers(name, t, shape, config, generator)

    done = tuple(make(n, a) for n, a in zip([*names, *itertools.repeat("", len(args))], args, strict=False))
    return done, {n: make(n, a) for n, a in kwargs.items()}


def _small_integers(name: str, t: Tensor, shape: list[int], config: Any, generator: torch.Generator) -> Tensor:
    if "mask" in name:
        return torch.ones(shape, dtype=t.dtype)
    if "position" in name:
        return torch.arange(shape[-1]).expand(shape).contiguous()
    top = config.type_vocab_size if "type" in name and hasattr(config, "type_vocab_size") else getattr(config, "vocab_size", 2)
    drawn = torch.randint(0, top, shape, generator=generator, dtype=t.dtype)
    pad = getattr(config, "pad_token_id", None)
    return drawn if pad is None or "type" in name else torch.where(drawn == pad, (pad + 1) % top, drawn)


def _generic_statistics(model: nn.Module) -> None:
    """Running statistics in general position."""
    generator = torch.Generator().manual_seed(2)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.3 * torch.randn(b.shape, generator=generator, dtype=b.dtype))
        elif name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=b.dtype))


def _freeze_like(model: nn.Module, small: nn.Module, names: Mapping[str, str]) -> None:
    given = dict(model.named_parameters(remove_duplicate=False))
    target = dict(small.named_parameters(remove_duplicate=False))
    for full, name in names.items():
        target[name].requires_grad_(given[full].requires_grad)


def _generic(graph: Graph, data: Sequence[Tensor], model: nn.Module | None) -> str | None:
    """Parameters in general position, in the graph and in the module it came from; or why it does not run."""
    try:
        spaces = find_spaces(graph)
        graph.params.update(_awake(graph, spaces, generic_draw(graph, spaces, data), data))
        out = graph(graph.params, data)
    except (RuntimeError, IndexError, ValueError) as error:
        return f"it does not run: {_line(error)}"
    if model is not None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in graph.params:
                    p.copy_(graph.params[name])
    return None if bool(torch.isfinite(out).all()) else "its outputs are not finite"


def _awake(graph: Graph, spaces: Spaces, params: dict[str, Tensor], data: Sequence[Tensor]) -> dict[str, Tensor]:
    """The same parameters with offsets moved until every unit of a kinked activation is seen on both sides of its threshold.

    A unit that no sample reaches, or that all do, has symmetries of its own, which say nothing about the architecture. Gradient
    steps on the vectors go on until a share of the samples lies on either side for every unit.
    """
    units = _units(graph, spaces)
    vectors = [n for n, p in params.items() if p.dim() == 1]
    if not units or not vectors:
        return params
    generator = torch.Generator().manual_seed(6)
    more = max(2, _AWAKE_SAMPLES // max(1, data[0].shape[0] if data[0].dim() else 1))
    envs = [graph.prepare(b) for b in (list(data), *(draw(graph, list(data), generator, wide=True) for _ in range(more)))]
    together = Together(graph, envs)
    moved = {n: p.clone().requires_grad_(n in vectors) for n, p in params.items()}
    optimizer = torch.optim.Adam([moved[n] for n in vectors], lr=0.03)
    for _ in range(_AWAKE_STEPS):
        seen = together.values(moved, list(units))
        far = [_one_sided(found, free) for found, free in zip(seen, units.values(), strict=True)]
        loss = torch.cat(far).square().sum()
        if not bool(loss > 0) or not loss.requires_grad:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {n: p.detach() for n, p in moved.items()}


def _one_sided(x: Tensor, free: Sequence[int]) -> Tensor:
    """How far each unit is from being seen on both sides of zero by a share of the samples, in quartile distances."""
    kept = [i for i in range(x.dim()) if i not in free]
    each = x.permute(*kept, *free).reshape(math.prod(x.shape[i] for i in kept), -1).sort(1).values
    low, high = each[:, int(_SIDE * each.shape[1])], each[:, -1 - int(_SIDE * each.shape[1])]
    return (low.clamp(min=0) + (-high).clamp(min=0)) / (high - low).detach().clamp(min=1e-12)


# -- from the operator graph ---------------------------------------------------------------------------------------------------


def _from_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], budget: int) -> Twin | str:
    graph = _traced(model, args, kwargs)
    given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    reasons: dict[str, None] = {}
    for keep in (2, 1):
        cut, layers = truncate(graph, keep)
        spaces = find_spaces(cut)
        data: list[Tensor] = []
        tried = 0
        for candidate in resized(cut, spaces, budget):
            if isinstance(candidate, str):
                reasons[candidate] = None
                continue
            try:
                why = difference(cut, candidate, spaces)
                if why is None:
                    _statistics(candidate)
                    data = _inputs_for(candidate, given)
                    why = _generic(candidate, data, None)
            except (RuntimeError, IndexError, ValueError) as error:
                why = f"its inputs cannot be drawn: {_line(error)}"
            if why is None:
                names = {n: m for n, m in layers.names.items() if m in candidate.params}
                return Twin(candidate, tuple(data), {}, _how(spaces, candidate, layers), names, layers.repeats)
            reasons[why] = None
            tried += 1
            if tried > 40:
                break
    shown = list(reasons)[-3:]
    return f"no small graph of {type(model).__name__} could be made: {'; '.join(shown)}"


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """The full graph without parameter values, but with the values of its constants."""
    aliases: dict[str, str] | None = None
    frozen: set[str] | None = None
    if isinstance(model, torch.export.ExportedProgram):
        program: torch.export.ExportedProgram = model
    else:
        if any(p.is_meta for p in model.parameters()):
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
        with preserve(model):
            program = _export(model, args, kwargs)
        shared: dict[int, str] = {}
        aliases = {name: shared.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
        frozen = {aliases[n] for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    signature = program.graph_signature
    lifted = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    given: dict[str, Any] = {**dict(program.state_dict), **program.constants}
    names = signature.inputs_to_parameters if aliases is None else None
    graph = _from_program(program, names, False, "torch.export", aliases, frozen)
    by_name = {n.name: str(n.target) for n in graph.nodes if n.op == "placeholder"}
    for name in graph.buffers:
        value = given.get(lifted.get(by_name.get(name, ""), ""))
        if isinstance(value, Tensor) and value.device.type != "meta":
            graph.buffers[name] = value.detach().to("cpu", torch.float64) if value.is_floating_point() else value.detach().cpu()
    return graph


def _inputs_for(graph: Graph, given: Sequence[Tensor]) -> list[Tensor]:
    nodes = {n.name: n for n in graph.nodes}
    return draw_inputs(
        graph, given, [nodes[i].meta["val"].shape for i in graph.inputs], token_ranges(graph), torch.Generator().manual_seed(1)
    )


def _statistics(graph: Graph) -> None:
    """Running statistics in general position."""
    generator = torch.Generator().manual_seed(2)
    for name, b in graph.buffers.items():
        if name.endswith("running_mean"):
            graph.buffers[name] = 0.3 * torch.randn(b.shape, generator=generator, dtype=torch.float64)
        elif name.endswith("running_var"):
            graph.buffers[name] = 0.5 + torch.rand(b.shape, generator=generator, dtype=torch.float64)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__


def _how(spaces: Spaces, twin: Graph, layers: Layers) -> str:
    pairs: dict[tuple[int, int], None] = {}
    for name, p in spaces.graph.params.items():
        pairs |= dict.fromkeys((s, t) for s, t in zip(p.shape, twin.params[name].shape, strict=True) if s != t)
    shown = [f"{s} -> {t}" for s, t in sorted(pairs)]
    cut = [f"{path or 'layers'} {a} -> {b}" for path, (a, b) in layers.repeats.items() if a != b]
    total = sum(p.numel() for p in twin.params.values())
    return (
        f"the operator graph with widths {', '.join(shown) or 'kept'}{'; layers of ' + ', '.join(cut) if cut else ''} ({total} parameters)"
    )


# -- which parameter is which --------------------------------------------------------------------------------------------------


@dataclass
class Matched:
    """Parameters of a model and of one with fewer layers.

    Attributes:
        names: every full name, tied ones included -> name in the other model.
        repeats: container of repeated layers -> (count here, count there).
    """

    names: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, tuple[int, int]] = field(default_factory=dict)

    def canonical(self, model: nn.Module, graph: Graph) -> dict[str, str]:
        """Canonical full name -> canonical name in the traced twin."""
        seen: dict[int, str] = {}
        out: dict[str, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if seen.setdefault(id(p), name) == name and p.requires_grad:
                out[name] = graph.aliases.get(self.names[name], self.names[name])
        return out


def match(full: nn.Module, small: nn.Module, types: tuple[list[str], list[str]] | None = None) -> Matched:
    """Line up the parameters of two models of one class.

    Args:
        types: kinds of layers that cannot be told from their parameters, in the one and in the other.

    Raises:
        TwinError: a parameter has no counterpart, or one of another rank, or tied parameters are not tied there.
    """
    out = Matched()
    _match(full, small, "", "", out, types)
    _note_alike(full, out)
    given, there = dict(full.named_parameters(remove_duplicate=False)), dict(small.named_parameters(remove_duplicate=False))
    for name, p in given.items():
        q = there.get(out.names.get(name, ""))
        if q is None:
            raise TwinError(f"{name} has no counterpart")
        if p.dim() != q.dim() or any((s == 1) != (t == 1) for s, t in zip(p.shape, q.shape, strict=True)):
            raise TwinError(f"{name} of shape {tuple(p.shape)} became {tuple(q.shape)}")
    unused = there.keys() - set(out.names.values())
    if unused:
        raise TwinError(f"{sorted(unused)[0]} is not in the full model")
    _same_ties(given, there, out.names)
    return out


def _match(full: nn.Module, small: nn.Module, at: str, to: str, out: Matched, types: tuple[list[str], list[str]] | None) -> None:
    for name, _ in full.named_parameters(recurse=False, remove_duplicate=False):
        out.names[f"{at}{name}"] = f"{to}{name}"
    children, others = dict(full.named_children()), dict(small.named_children())
    repeated = _repeated(full)
    if repeated and (isinstance(full, nn.ModuleList) or len(children) != len(others)):
        out.repeats[at[:-1]] = (len(children), len(others))
    typed = types is not None and repeated and (len(children), len(others)) == (len(types[0]), len(types[1]))
    first, second = types if typed and types is not None else ([""] * len(children), [""] * len(others))
    kinds = {n: (_kind(m), t) for (n, m), t in zip(others.items(), second, strict=True)}
    for (name, child), kind_ in zip(children.items(), first, strict=True):
        kind = (_kind(child), kind_)
        other = name if name in others and (not repeated or kinds[name] == kind) else None
        if other is None and repeated:
            other = next((n for n in reversed(others) if kinds[n] == kind), None)
        if other is None:
            if next(child.parameters(), None) is None:
                continue
            raise TwinError(f"{at}{name} has no counterpart of its kind")
        _match(child, others[other], f"{at}{name}.", f"{to}{other}.", out, types)


def _note_alike(full: nn.Module, out: Matched) -> None:
    """What holds layers in one stage holds layers in all, also in those of the twin's depth."""
    noted = {_NUMBER.sub("*", path) for path in out.repeats}
    for path, module in full.named_modules():
        if path and path not in out.repeats and isinstance(module, (nn.ModuleList, nn.Sequential)) and _NUMBER.sub("*", path) in noted:
            out.repeats[path] = (len(module), len(module))


def _repeated(module: nn.Module) -> bool:
    """Whether a container holds layers of one kind, more than single torch operators."""
    children = list(module.children())
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not children:
        return False
    nested = any(next(c.children(), None) is not None for c in children)
    return len(children) == 1 or (nested and len({type(c) for c in children}) < len(children))


def _kind(module: nn.Module) -> tuple[str, frozenset[tuple[str, int]]]:
    """What a layer is, whatever its widths and the number of layers inside it."""
    params = frozenset((re.sub(r"\d+", "#", n), p.dim()) for n, p in module.named_parameters(remove_duplicate=False))
    return type(module).__name__, params


def _same_ties(given: Mapping[str, Tensor], there: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    first: dict[int, str] = {}
    for name, p in given.items():
        other = first.setdefault(id(p), name)
        if there[names[name]] is not there[names[other]]:
            raise TwinError(f"{name} and {other} are one parameter in the model, and two in the twin")
