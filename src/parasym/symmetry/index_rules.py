"""How operators move and tie indices: one rule for each family of operators, none about architectures.

A rule takes the axes of an operator's arguments, unifies those that must be permuted together, freezes those whose order
matters, and returns the axes of the result (a list of them for several results), or None where it does not apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import instance_standardise, standardise
from parasym.symmetry.axes import Axis, concatenation, cut, freeze, product, unify

if TYPE_CHECKING:
    from parasym.symmetry.spaces import Walk

Axes = list[Axis]
Labels = Sequence[Any]
CONSTANT_ELEMENTS = 1_000_000


@dataclass
class Contraction:
    """A multilinear operator as labelled axes (None: an axis of size one)."""

    operands: list[tuple[str, list[Any]]]
    out: list[Any]


Rule = Callable[["Walk", Node, Mapping[str, Any]], Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


def operator_name(n: Node) -> str:
    """The name of an operator without its overload."""
    schema = getattr(n.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else getattr(n.target, "__name__", str(n.target))


def arguments(n: Node) -> dict[str, Any]:
    """Arguments of an operator by the names of its schema, defaults filled in."""
    schema = getattr(n.target, "_schema", None)
    if schema is None:
        return {**{f"_{i}": a for i, a in enumerate(n.args)}, **n.kwargs}
    out = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    out.update({a.name: v for a, v in zip(schema.arguments, n.args, strict=False)})
    return {**out, **n.kwargs}


def _tensors(w: Walk, n: Node) -> list[Axes]:
    return [w.axes[a.name] for a in n.all_input_nodes if a.name in w.axes]


def _dim(i: int, rank: int) -> int:
    return i % rank if rank else 0


def _dims(value: Any, rank: int) -> list[int]:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    return [_dim(i, rank) for i in (value if isinstance(value, (list, tuple)) else [value])]


def _broadcast(tensors: Sequence[Axes]) -> Axes:
    rank = max((len(t) for t in tensors), default=0)
    out: Axes = []
    for i in range(rank):
        present = [t[i - rank] for t in tensors if len(t) >= rank - i]
        wide = [a for a in present if a.size != 1]
        for a in wide[1:]:
            unify(wide[0], a)
        out.append(wide[0] if wide else Axis(1))
    return out


@_rule("where", "__and__", "__or__", "__xor__", "lerp", "hardswish", "log_sigmoid", "clamp_min", "clamp_max", "logical_and", "logical_or")
def pointwise(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    return _broadcast(_tensors(w, n))


@_rule("dropout", "feature_dropout", "alpha_dropout", "bernoulli", "standardise", "instance_standardise",
       "to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy")  # fmt: skip
def _same(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[next(iter(n.all_input_nodes)).name]
    if n.target is standardise:
        w.hidden.append([x[1]])
    if n.target is instance_standardise:
        w.hidden.append(x[:2])
    return list(x)


@_rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _uniform(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    """Tensors that are the same everywhere, whatever they take their shape from."""
    size = list(a["size"]) if "size" in a else [i.size for i in w.axes[a["self"].name]]
    fill = 0.0 if "zeros" in operator_name(n) else 1.0 if "ones" in operator_name(n) else a.get("fill_value")
    if not isinstance(fill, (int, float)):
        return None
    if math.prod(size) <= CONSTANT_ELEMENTS:
        dtype = torch.bool if n.meta["val"].dtype == torch.bool else torch.float64
        w.spaces.constants[n.name] = torch.full(size, float(fill), dtype=torch.float64).to(dtype)
    return [Axis(s) for s in size]


@_rule("prelu")
def _prelu(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x, slope = w.axes[a["self"].name], w.axes[a["weight"].name]
    channel = x[1] if len(x) > 1 else x[0]
    if slope and slope[0].size != 1:
        unify(channel, slope[0])
    return list(x)


@_rule("weight_norm")
def _weight_norm(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    v, g = (w.axes[x.name] for x in n.all_input_nodes)
    out = _broadcast([v, g])
    w.hidden.append(list(g))
    return out


# contractions


def contract(w: Walk, n: Node, operands: Sequence[tuple[Node, Labels]], out: Labels) -> Axes:
    """Tie axes with equal labels and return those of the result; labels that do not come out are summed."""
    by_label: dict[Any, Axis] = {}
    sizes_one: dict[Any, Axis] = {}
    clean: list[tuple[str, list[Any]]] = []
    for node, labels in operands:
        used: list[Any] = []
        for axis, label in zip(w.axes[node.name], labels, strict=True):
            if axis.size == 1:
                sizes_one[label] = axis
                used.append(None)
                continue
            used.append(label)
            if label in by_label:
                unify(by_label[label], axis)
            else:
                by_label[label] = axis
        clean.append((node.name, used))
    w.spaces.contractions[n.name] = Contraction(clean, [x if x in by_label else None for x in out])
    return [by_label.get(x) or sizes_one.get(x) or Axis(1) for x in out]


@_rule("linear")
def _linear(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x, weight = a["input"], a["weight"]
    if a.get("bias") is not None:
        return None
    lead = list(range(len(w.axes[x.name]) - 1))
    if len(w.axes[weight.name]) == 1:
        return contract(w, n, [(x, [*lead, "k"]), (weight, ["k"])], lead)
    return contract(w, n, [(x, [*lead, "k"]), (weight, ["n", "k"])], [*lead, "n"])


@_rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x, y = [v for v in n.args if isinstance(v, Node)][:2]
    p, q = len(w.axes[x.name]), len(w.axes[y.name])
    left = [*range(-p, -2), "m", "k"] if p > 1 else ["k"]
    right = [*range(-q, -2), "k", "n"] if q > 1 else ["k"]
    lead = list(range(-max(p, q), -2)) if max(p, q) > 2 else []
    return contract(w, n, [(x, left), (y, right)], [*lead, *(["m"] if p > 1 else []), *(["n"] if q > 1 else [])])


@_rule("einsum")
def _einsum(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    equation, tensors = a["equation"].replace(" ", ""), a["tensors"]
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        letters = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
        out = ("..." if "..." in inputs else "") + "".join(letters)
    ranks = [len(w.axes[t.name]) for t in tensors]
    dots = max((r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)

    def expand(term: str, free: int) -> list[Any]:
        head, dot, tail = term.partition("...")
        return [*head, *(range(-free, 0) if dot else ()), *tail]

    labelled = [(t, expand(s, len(w.axes[t.name]) - len(s.replace("...", "")))) for t, s in zip(tensors, terms, strict=True)]
    return contract(w, n, labelled, expand(out, dots))


@_rule("baddbmm")
def _baddbmm(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    base, x, y = (w.axes[a[k].name] for k in ("self", "batch1", "batch2"))
    unify(x[2], y[1])
    unify(x[0], y[0])
    return _broadcast([[x[0], x[1], y[2]], base])


@_rule("bilinear")
def _bilinear(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x, y, weight = (w.axes[a[k].name] for k in ("input1", "input2", "weight"))
    unify(x[-1], weight[1])
    unify(y[-1], weight[2])
    if isinstance(a.get("bias"), Node):
        unify(weight[0], w.axes[a["bias"].name][0])
    return [*_broadcast([x[:-1], y[:-1]]), weight[0]]


@_rule("cosine_similarity")
def _cosine(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = _broadcast([w.axes[a["x1"].name], w.axes[a["x2"].name]])
    d = _dim(a["dim"], len(x))
    return x[:d] + x[d + 1 :]


@_rule("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(w: Walk, n: Node, a: Mapping[str, Any]) -> Any:
    """Recurrent cells: every gate block of the rows, and the columns of the recurrent weight, carry the state."""
    states = a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    state = w.axes[states[0].name][-1]
    for other in states[1:]:
        unify(state, w.axes[other.name][-1])
    unify(w.axes[a["input"].name][-1], w.axes[a["w_ih"].name][1])
    unify(state, w.axes[a["w_hh"].name][1])
    for key in ("w_ih", "w_hh", "b_ih", "b_hh"):
        rest = w.axes[a[key].name][0] if isinstance(a.get(key), Node) else state
        while rest.size > state.size:
            head, rest = cut(rest, state.size)
            unify(head, state)
        unify(rest, state)
    out = [w.axes[s.name] for s in states]
    for x in out:
        if len(x) > 1 and len(w.axes[a["input"].name]) > 1:
            unify(x[0], w.axes[a["input"].name][0])
    return [list(x) for x in out] if len(out) > 1 else list(out[0])


@_rule("embedding")
def _embedding(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    table, index = w.axes[a["weight"].name], w.axes[a["indices"].name]
    freeze(table[0], "rows are picked by data (embedding)")
    w.spaces.contractions[n.name] = Contraction([(a["weight"].name, ["row", "d"])], [*(None for _ in index), "d"])
    return [*index, table[1]]


@_rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x, weight = w.axes[a["input"].name], w.axes[a["weight"].name]
    if a.get("bias") is not None:
        return None
    groups = int(a.get("groups", 1))
    transposed = "transpose" in operator_name(n) or bool(a.get("transposed", False))
    space = len(weight) - 2
    channel = len(x) - space - 1
    for axis in [*weight[2:], *x[channel + 1 :]]:
        freeze(axis, "convolution window")
    fan_in, fan_out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    if groups == 1:
        sizes = _window_sizes(n, x, weight, a, channel, transposed)
        spatial = [Axis(s, "convolution window") for s in sizes]
        lead: list[Any] = ["b"] if channel else []
        taps = [f"t{i}" for i in range(space)]
        kernel = ["c", "o", *taps] if transposed else ["o", "c", *taps]
        image = [*lead, "c", *(f"s{i}" for i in range(space))]
        out = contract(w, n, [(a["input"], image), (a["weight"], kernel)], [*lead, "o"])
        return [*out, *spatial]
    each = Axis(groups)
    if transposed:
        unify(x[channel], fan_in)
        unify(fan_in, product([each, Axis(fan_in.size // groups)]))
        result = product([each, fan_out])
    else:
        unify(x[channel], product([each, fan_in]))
        unify(fan_out, product([each, Axis(fan_out.size // groups)]))
        result = fan_out
    sizes = _window_sizes(n, x, weight, a, channel, transposed)
    return [*x[:channel], result, *(Axis(s, "convolution window") for s in sizes)]


def _window_sizes(n: Node, x: Axes, weight: Axes, a: Mapping[str, Any], channel: int, transposed: bool) -> list[int]:
    """Spatial sizes of the result, asked of the operator itself on the meta device."""
    args = {k: v for k, v in a.items() if not isinstance(v, Node)}
    args["input"] = torch.empty([i.size for i in x], device="meta")
    args["weight"] = torch.empty([i.size for i in weight], device="meta")
    names = [s.name for s in n.target._schema.arguments]  # type: ignore[union-attr]
    out = n.target(*[args.get(k) for k in names])  # type: ignore[operator]
    return list(out.shape[channel + 1 :])


@_rule("scaled_dot_product_attention")
def _attention(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    q, k, v = (w.axes[a[i].name] for i in ("query", "key", "value"))
    lead = list(q[:-2])
    if a.get("enable_gqa") and len(q) > 2 and q[-3].size != k[-3].size:
        unify(q[-3], product([k[-3], Axis(q[-3].size // k[-3].size)]))
        unify(k[-3], v[-3])
        _broadcast([q[:-3], k[:-3], v[:-3]])
    else:
        lead = _broadcast([q[:-2], k[:-2], v[:-2]])
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    scores = [*lead, q[-2], k[-2]]
    if isinstance(a.get("attn_mask"), Node):
        _broadcast([scores, w.axes[a["attn_mask"].name]])
    if a.get("is_causal"):
        for axis in scores[-2:]:
            freeze(axis, "causal attention")
    w.hidden += [scores, scores[:-1]]
    return [*lead, q[-2], v[-1]]


# reductions and normalisations


@_rule("mean", "sum", "amax", "amin", "var", "std", "norm", "prod", "logsumexp", "linalg_vector_norm", "any", "all", "nansum")
def _reduce(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[_first(a).name]
    dims = _dims(a.get("dim"), len(x))
    return [Axis(1) if i in dims else axis for i, axis in enumerate(x) if i not in dims or a.get("keepdim")]


@_rule("max", "min")
def _extreme(w: Walk, n: Node, a: Mapping[str, Any]) -> Any:
    if "other" in a:
        return pointwise(w, n, a)
    x = w.axes[a["self"].name]
    if "dim" not in a:
        return []
    dim = _dim(a["dim"], len(x))
    if any(u.args[1] == 1 and u.users for u in n.users):
        freeze(x[dim], f"its indices are read ({operator_name(n)})")
    out = [Axis(1) if i == dim else axis for i, axis in enumerate(x) if i != dim or a.get("keepdim")]
    return [out, list(out)]


@_rule("argmax", "argmin")
def _arg_extreme(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    dims = _dims(a.get("dim"), len(x))
    for d in dims:
        freeze(x[d], f"its indices are read ({operator_name(n)})")
    return [Axis(1) if i in dims else axis for i, axis in enumerate(x) if i not in dims or a.get("keepdim")]


@_rule("topk", "sort")
def _sorted(w: Walk, n: Node, a: Mapping[str, Any]) -> Any:
    x = w.axes[a["self"].name]
    dim = _dim(a.get("dim", -1), len(x))
    for u in n.users:
        if u.args[1] == 1 and u.users:
            if _only_picks(u):
                w.picking[u.name] = x[dim]
            else:
                freeze(x[dim], f"its indices are read ({operator_name(n)})")
    ranked = Axis(int(a.get("k", x[dim].size)), "order of a sort")
    w.hidden.append([*x[:dim], *x[dim + 1 :]])
    out = [*x[:dim], ranked, *x[dim + 1 :]]
    return [out, list(out)]


_MOVED = ("reshape", "view", "_unsafe_view", "alias", "clone", "contiguous", "flatten", "detach", "to", "_to_copy")


def _only_picks(n: Node) -> bool:
    """Whether a tensor of indices does nothing but pick from axes of other tensors."""
    return all(_only_picks(u) if operator_name(u) in _MOVED else operator_name(u) == "index" and u.args[0] is not n for u in n.users)


def _picked(w: Walk, n: Node) -> Axis | None:
    """The axis whose indices a tensor holds, where it was found by a sort along it."""
    while operator_name(n) in _MOVED:
        n = n.all_input_nodes[0]
    return w.picking.get(n.name)


@_rule("softmax", "_softmax", "log_softmax", "_log_softmax", "softmin")
def _softmax(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[_first(a).name]
    dim = _dim(a["dim"], len(x))
    w.hidden.append([*x[:dim], *x[dim + 1 :]])
    return list(x)


@_rule("layer_norm", "rms_norm")
def _layer_norm(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x = w.axes[a["input"].name]
    if a.get("weight") is not None or a.get("bias") is not None:
        return None
    w.hidden.append(x[: len(x) - len(a["normalized_shape"])])
    return list(x)


@_rule("_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training")
def _batch_norm_state(w: Walk, n: Node, a: Mapping[str, Any]) -> Any:
    """The bookkeeping half of a batch norm (its result is written out as operators): every vector runs along the channels."""
    x = w.axes[a["input"].name]
    for key in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(key), Node):
            unify(x[1], w.axes[a[key].name][0])
    value = n.meta["val"]
    return [list(x), *([x[1]] if v.numel() else [Axis(0)] for v in value[1:])]


@_rule("group_norm")
def _group_norm(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x = w.axes[a["input"].name]
    if a.get("weight") is not None or a.get("bias") is not None:
        return None
    group = Axis(int(a["num_groups"]))
    unify(x[1], product([group, Axis(x[1].size // group.size)]))
    w.hidden.append([x[0], group])
    return list(x)


@_rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "diff")
def _ordered(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x = w.axes[a["self"].name]
    if operator_name(n) in ("diff", "cummax", "cummin"):
        return None
    dims = _dims(a.get("dim", a.get("dims")), len(x))
    for d in dims:
        freeze(x[d], f"order matters ({operator_name(n)})")
    return [Axis(i.size, i.frozen) if d in dims else i for d, i in enumerate(x)]


@_rule("tril", "triu")
def _triangle(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    for axis in x[-2:]:
        freeze(axis, f"order matters ({operator_name(n)})")
    return list(x)


@_rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool2d",
       "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
       "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa")  # fmt: skip
def _pool(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x = w.axes[_first(a).name]
    digits = [c for c in operator_name(n) if c.isdigit()]
    space = int(digits[0])
    value = n.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    for axis in x[-space:]:
        freeze(axis, f"spatial window ({operator_name(n)})")
    return [*x[:-space], *(Axis(s, f"spatial window ({operator_name(n)})") for s in value.shape[-space:])]


@_rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d")
def _pad(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x, pads = list(w.axes[a["self"].name]), list(a.get("pad", a.get("padding")))
    constant = operator_name(n) == "constant_pad_nd" or a.get("mode", "") == "constant"
    for i in range(len(pads) // 2):
        before, after = pads[2 * i : 2 * i + 2]
        axis = x[-1 - i]
        if not before and not after:
            continue
        if not constant or before < 0 or after < 0:
            freeze(axis, "padding")
            x[-1 - i] = Axis(axis.size + before + after, "padding")
        else:
            x[-1 - i] = concatenation([Axis(before, "padding"), axis, Axis(after, "padding")])
    return x


# moving indices


def _first(a: Mapping[str, Any]) -> Node:
    return next(v for v in a.values() if isinstance(v, Node))


def _reshape(x: Axes, shape: Sequence[int]) -> Axes:
    """Axes after a row-major reshape: runs of axes with equal numbers of elements correspond."""
    total = math.prod(i.size for i in x)
    if -1 in shape:
        known = math.prod(s for s in shape if s != -1)
        shape = [total // known if s == -1 else s for s in shape]
    if total == 0 or math.prod(shape) != total:
        raise ValueError("empty or inconsistent reshape")
    source, target = [i for i in x if i.size != 1], [s for s in shape if s != 1]
    made: Axes = []
    i = j = 0
    while i < len(source):
        left, right = [source[i]], [target[j]]
        i, j = i + 1, j + 1
        while (p := math.prod(a.size for a in left)) != (q := math.prod(right)):
            if p < q:
                left.append(source[i])
                i += 1
            else:
                right.append(target[j])
                j += 1
        made += _regroup(left, right)
    supply = iter(made)
    return [Axis(1) if s == 1 else next(supply) for s in shape]


def _regroup(left: Axes, right: Sequence[int]) -> Axes:
    if len(right) == 1:
        return [product(left)] if len(left) > 1 else [left[0]]
    new = [Axis(s) for s in right]
    unify(product(left) if len(left) > 1 else left[0], product(new))
    return new


@_rule("reshape", "view", "_unsafe_view", "view_copy", "_reshape_copy")
def _view(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    return _reshape(w.axes[a["self"].name], list(a.get("shape", a.get("size"))))


@_rule("flatten")
def _flatten(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    first, last = _dim(a["start_dim"], len(x)), _dim(a["end_dim"], len(x))
    return [*x[:first], product(x[first : last + 1]), *x[last + 1 :]]


@_rule("unflatten")
def _unflatten(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    d = _dim(a["dim"], len(x))
    return [*x[:d], *_reshape([x[d]], list(a["sizes"])), *x[d + 1 :]]


@_rule("permute")
def _permute(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    return [x[_dim(d, len(x))] for d in a["dims"]]


@_rule("transpose", "swapaxes", "swapdims")
def _transpose(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = list(w.axes[a["self"].name])
    i, j = (_dim(v, len(x)) for v in list(a.values())[1:3])
    x[i], x[j] = x[j], x[i]
    return x


@_rule("movedim")
def _movedim(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    source, target = _dims(a["source"], len(x)), _dims(a["destination"], len(x))
    rest = iter([i for i in range(len(x)) if i not in source])
    at = dict(zip(target, source, strict=True))
    return [x[at[i] if i in at else next(rest)] for i in range(len(x))]


@_rule("t", "numpy_T", "mT", "adjoint", "matrix_H")
def _t(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = list(w.axes[a["self"].name])
    return x[::-1] if operator_name(n) in ("t", "numpy_T") else [*x[:-2], x[-1], x[-2]]


@_rule("unsqueeze")
def _unsqueeze(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = list(w.axes[a["self"].name])
    x.insert(_dim(a["dim"], len(x) + 1), Axis(1))
    return x


@_rule("squeeze")
def _squeeze(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    dims = _dims(a.get("dim"), len(x))
    return [axis for i, axis in enumerate(x) if i not in dims or axis.size != 1]


@_rule("expand")
def _expand(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x, size = w.axes[a["self"].name], list(a["size"])
    lead = len(size) - len(x)
    out = [Axis(s) for s in size[:lead]]
    return out + [axis if s in (-1, axis.size) else Axis(s) for axis, s in zip(x, size[lead:], strict=True)]


@_rule("expand_as", "broadcast_to")
def _expand_as(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = w.axes[a["self"].name]
    size = list(a["size"]) if "size" in a else [i.size for i in w.axes[a["other"].name]]
    return _expand(w, n, {"self": a["self"], "size": size}) if len(size) >= len(x) else list(x)


@_rule("repeat")
def _repeat(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x, times = w.axes[a["self"].name], list(a["repeats"])
    full = [Axis(1)] * (len(times) - len(x)) + list(x)
    return [axis if t == 1 else product([Axis(t), axis]) for axis, t in zip(full, times, strict=True)]


@_rule("repeat_interleave")
def _repeat_interleave(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x = list(w.axes[a["self"].name])
    if not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        return None
    d = _dim(a["dim"], len(x))
    x[d] = product([x[d], Axis(a["repeats"])])
    return x


@_rule("slice", "narrow")
def _slice(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x = list(w.axes[a["self"].name])
    d = _dim(a["dim"], len(x))
    size = x[d].size
    start = a.get("start") or 0
    end = start + a["length"] if "length" in a else size if a.get("end") is None else a["end"]
    start, end = (max(0, min(size, i + size if i < 0 else i)) for i in (start, end))
    step = a.get("step", 1)
    if step == 1:
        x[d] = cut(cut(x[d], end)[0], start)[1]
        return x
    if start >= step or end != size or size % step:
        return None
    lead, inner = Axis(size // step), Axis(step, "picked by index (strided slice)")
    unify(x[d], product([lead, inner]))
    x[d] = lead
    return x


@_rule("select")
def _select(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = list(w.axes[a["self"].name])
    d = _dim(a["dim"], len(x))
    i = a["index"] % x[d].size
    cut(cut(x[d], i + 1)[0], i)
    return x[:d] + x[d + 1 :]


@_rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split", "unbind")
def _split(w: Walk, n: Node, a: Mapping[str, Any]) -> Any:
    x = list(w.axes[a["self"].name])
    d = _dim(a.get("dim", 0), len(x))
    name, size = operator_name(n), x[d].size
    if name == "unbind":
        sizes = [1] * size
    elif name in ("chunk", "unsafe_chunk"):
        each = -(-size // a["chunks"])
        sizes = [each] * (size // each) + ([size % each] if size % each else [])
    elif name == "tensor_split":
        return None
    else:
        each = a.get("split_sizes", a.get("split_size"))
        sizes = list(each) if isinstance(each, (list, tuple)) else [each] * (size // each) + ([size % each] if size % each else [])
    rest, pieces = x[d], []
    for s in sizes:
        head, rest = cut(rest, s)
        pieces.append(head)
    drop = name == "unbind"
    return [x[:d] + ([] if drop else [p]) + x[d + 1 :] for p in pieces]


@_rule("getitem")
def _getitem(w: Walk, n: Node, a: Mapping[str, Any]) -> Any:
    source, index = n.args
    return w.axes[source.name][index]  # type: ignore[union-attr, index]


@_rule("cat", "concat", "concatenate")
def _cat(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    parts = [w.axes[t.name] for t in a["tensors"]]
    parts = [p for p in parts if not (len(p) == 1 and p[0].size == 0)]
    d = _dim(a.get("dim", 0), len(parts[0]))
    others = _tie([p[:d] + p[d + 1 :] for p in parts])
    return [*others[:d], concatenation([p[d] for p in parts]), *others[d:]]


@_rule("stack")
def _stack(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    parts = [w.axes[t.name] for t in a["tensors"]]
    out = _tie(parts)
    out.insert(_dim(a.get("dim", 0), len(out) + 1), concatenation([Axis(1) for _ in parts]))
    return out


def _tie(tensors: Sequence[Axes]) -> Axes:
    for t in tensors[1:]:
        for x, y in zip(tensors[0], t, strict=True):
            unify(x, y)
    return list(tensors[0])


@_rule("glu")
def _glu(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = list(w.axes[a["self"].name])
    d = _dim(a.get("dim", -1), len(x))
    x[d], gate = cut(x[d], x[d].size // 2)
    unify(x[d], gate)
    return x


@_rule("pixel_shuffle")
def _pixel_shuffle(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x, r = list(w.axes[a["self"].name]), int(a["upscale_factor"])
    channel = Axis(x[-3].size // r**2)
    unify(x[-3], product([channel, Axis(r, "pixel shuffle"), Axis(r, "pixel shuffle")]))
    for axis in x[-2:]:
        freeze(axis, "pixel shuffle")
    return [*x[:-3], channel, *(Axis(i.size * r, "pixel shuffle") for i in x[-2:])]


@_rule("index_select")
def _index_select(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes:
    x = list(w.axes[a["self"].name])
    d = _dim(a["dim"], len(x))
    freeze(x[d], "picked by index (index_select)")
    x[d] = Axis(w.axes[a["index"].name][0].size, "picked by index (index_select)")
    return x


@_rule("index")
def _index(w: Walk, n: Node, a: Mapping[str, Any]) -> Axes | None:
    x, indices = w.axes[a["self"].name], list(a["indices"])
    picked = [i for i, t in enumerate(indices) if t is not None]
    if any(indices[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in picked):
        return None
    sources = [_picked(w, indices[i]) for i in picked]
    for i, source in zip(picked, sources, strict=True):
        if source is None or source.size != x[i].size:
            freeze(x[i], "picked by index")
        else:
            unify(x[i], source)
    found = [Axis(i.size, "picked by index") for i in _broadcast([w.axes[indices[i].name] for i in picked])]
    if len(picked) == len(found) == 1:
        found[0].picks = (indices[picked[0]].name, x[picked[0]])
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    rest = [axis for i, axis in enumerate(x) if i not in picked]
    at = picked[0] if adjacent else 0
    return [*rest[:at], *found, *rest[at:]]
