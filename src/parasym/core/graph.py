"""The traced graph: a model as a pure, replayable function of its parameters, operator by operator.

A model is captured by ``torch.export`` (non-strict) and normalised so that every operator that holds parameters does one
thing: ``linear(x, W, b)`` becomes a product and an addition, a norm with gain and bias becomes standardise, multiply, add.
The graph can be replayed with any parameter values in float64, whatever dtype casts the model contains.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Node

from parasym.core.errors import InputError, TraceError
from parasym.core.guards import preserve, without_cache

aten = torch.ops.aten
_LOW = (torch.float32, torch.float16, torch.bfloat16)
_RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")  # layers and cells
_SKIP = (aten._assert_tensor_metadata.default, aten.sym_constrain_range_for_size.default)


@dataclass
class Graph:
    """A replayable model.

    Attributes:
        fx: the normalised operator graph.
        params: canonical parameter name -> value (float64, or meta).
        aliases: every parameter name, tied ones included -> canonical name.
        buffers: constants of the graph by placeholder name.
        inputs: placeholder names of the data, in the order of the flattened example arguments.
        kind: node name -> "const" | "data" | "param" | "active".
        outputs: names of the floating-point output nodes that depend on parameters.
        trace: how the graph was obtained.
        dead: parameters that no output depends on.
    """

    fx: torch.fx.Graph
    params: dict[str, Tensor]
    aliases: dict[str, str]
    buffers: dict[str, Tensor]
    holders: dict[str, str]
    inputs: list[str]
    kind: dict[str, str]
    outputs: list[str]
    trace: str
    module: torch.fx.GraphModule
    dead: list[str] = field(default_factory=list)
    kinds_of_input: list[torch.dtype] = field(default_factory=list)
    _kept: tuple[Any, dict[str, Any]] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def nodes(self) -> list[Node]:
        return [n for n in self.fx.nodes if n.op not in ("output",)]

    def prepare(self, data: Sequence[Tensor]) -> dict[str, Any]:
        """Evaluate everything that does not depend on parameters, once for a batch of data."""
        env, values = dict(self._constants()), dict(zip(self.inputs, data, strict=True))
        for n in self.nodes:
            if self.kind.get(n.name) == "data":
                env[n.name] = values[n.name] if n.op == "placeholder" else self._evaluate(n, env)
        return env

    def _constants(self) -> dict[str, Any]:
        """Everything that depends on neither parameters nor data; kept until a buffer, the graph or a kept value changes."""
        nodes = [n for n in self.nodes if self.kind.get(n.name) == "const"]
        if self._kept is not None and self._kept[0] == self._state(nodes, self._kept[1]):
            return self._kept[1]
        env: dict[str, Any] = {}
        for n in nodes:
            env[n.name] = self.buffers[n.name].clone() if n.op == "placeholder" else self._evaluate(n, env)
        random = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in nodes)
        self._kept = None if random else (self._state(nodes, env), env)
        return env

    def _state(self, nodes: Sequence[Node], env: Mapping[str, Any]) -> Any:
        values = [*self.buffers.values(), *(v for v in env.values() if isinstance(v, Tensor))]
        return nodes, [(id(v), 0 if v.is_inference() else v._version) for v in values]

    def replay(self, params: Mapping[str, Tensor], env: Mapping[str, Any], wanted: Iterable[str] | None = None) -> list[Tensor]:
        """Evaluate the wanted nodes (default: the outputs) at the given parameters, on a prepared batch."""
        wanted = list(self.outputs if wanted is None else wanted)
        live: dict[str, Any] = dict(env)
        for name, canonical in self.holders.items():
            live[name] = params[canonical]
        for n in self.nodes:
            if n.name not in live:
                live[n.name] = self._evaluate(n, live)
        return [live[w] for w in wanted]

    def __call__(self, params: Mapping[str, Tensor], data: Sequence[Tensor]) -> Tensor:
        """All outputs of the model, flattened and concatenated."""
        out = self.replay(params, self.prepare(data))
        return torch.cat([o.reshape(-1) for o in out])

    def _evaluate(self, n: Node, env: Mapping[str, Any]) -> Any:
        if n.op == "get_attr":
            return operator.attrgetter(str(n.target))(self.module)
        args = torch.fx.node.map_arg(n.args, lambda a: env[a.name])
        kwargs = torch.fx.node.map_arg(n.kwargs, lambda a: env[a.name])
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def parameter_ops(self) -> list[Node]:
        """Active nodes that take a parameter, or something computed from parameters only, as an argument."""
        return [
            n for n in self.nodes if self.kind.get(n.name) == "active" and any(self.kind.get(a.name) == "param" for a in n.all_input_nodes)
        ]

    def edges(self) -> list[str]:
        """Activations that cross between parameter operators and what lies between them."""
        names: dict[str, None] = {}
        for n in self.parameter_ops():
            for a in n.all_input_nodes:
                if self.kind.get(a.name) == "active" and _is_tensor(a):
                    names[a.name] = None
            if _is_tensor(n):
                names[n.name] = None
            else:
                for u in n.users:
                    if u.target is operator.getitem and _is_tensor(u):
                        names[u.name] = None
        return [n for n in names if n not in self.outputs]

    def parameters_of(self, n: Node) -> list[str]:
        """Canonical names of the parameters that reach a node without passing an activation."""
        found: dict[str, None] = {}
        stack = [a for a in n.all_input_nodes if self.kind.get(a.name) == "param"]
        while stack:
            a = stack.pop()
            if a.name in self.holders:
                found[self.holders[a.name]] = None
            stack.extend(b for b in a.all_input_nodes if self.kind.get(b.name) == "param")
        return list(found)


def _is_tensor(n: Node) -> bool:
    value = n.meta.get("val")
    return value is None or isinstance(value, Tensor)


def trace(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, values: bool = True) -> Graph:
    """Capture ``model(*args, **kwargs)`` as a :class:`Graph`.

    Args:
        model: any module; on the meta device its values are not needed.
        args, kwargs: example arguments (tensors, or trees of tensors). The batch is axis 0 of each. A Transformers model is
            traced without its key-value cache.
        values: copy parameter values in float64 (False: keep them on the meta device).

    Raises:
        InputError: not a module, or the arguments do not fit it, or no floating-point tensor comes out.
        TraceError: data-dependent control flow, or an operator that cannot be captured; says which.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model, model.graph_signature.inputs_to_parameters, values, "exported program")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"parasym audits torch.nn.Module objects (or exported programs), got {type(model).__name__}. "
            f"Pass the model itself, not its class, state_dict or function."
        )
    kwargs = dict(kwargs or {})
    if any(p.device.type == "meta" for p in model.parameters()):
        args = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), tuple(args))
        kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), kwargs)
    if kwargs.get("use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    with preserve(model), without_cache(model):
        program = _export(model, tuple(args), dict(kwargs))
    shared: dict[int, str] = {}
    aliases = {name: shared.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    frozen = {aliases[n] for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return _from_program(program, None, values, "torch.export", aliases, frozen, own)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    import warnings

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch raises many kinds; what matters is whether the model runs at all
        try:
            with torch.no_grad():
                copy.deepcopy(model)(*args, **kwargs)
        except Exception as plain:
            shapes = ", ".join(
                str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in pytree.tree_leaves((args, kwargs))
            )
            raise InputError(
                f"{type(model).__name__} does not accept the example arguments ({shapes}): {_first_line(plain)}. "
                f"Pass arguments that model(*args, **kwargs) accepts."
            ) from plain
        text = str(error)
        where = re.findall(r'File "([^"]+)", line (\d+)', text)
        at = f" (near {where[-1][0].rsplit('/', 1)[-1]}:{where[-1][1]})" if where else ""
        data = "data-dependent" in text.lower() or "GuardOnDataDependent" in text
        reason = "its control flow or shapes depend on the data" if data else _first_line(error)
        raise TraceError(
            f"torch.export could not capture {type(model).__name__}: {reason}{at}. "
            f"Replace data-dependent branches by masks or torch.where, or audit the sub-modules that can be traced."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _from_program(
    program: torch.export.ExportedProgram,
    names: Mapping[str, str] | None,
    values: bool,
    how: str,
    aliases: dict[str, str] | None = None,
    frozen: set[str] | None = None,
    unused: Mapping[str, Tensor] | None = None,
) -> Graph:
    program = _functional(program)
    signature, module = program.graph_signature, copy.deepcopy(program.graph_module) if values else program.graph_module
    state, fx = {**program.state_dict, **program.constants}, module.graph
    if aliases is None:
        shared: dict[Any, str] = {}
        aliases = {}
        for _, name in signature.inputs_to_parameters.items():
            p = program.state_dict[name]
            aliases[name] = shared.setdefault((p.data_ptr(), tuple(p.shape)) if p.device.type != "meta" and p.numel() else id(p), name)
        frozen = {n for n in aliases if not getattr(program.state_dict[n], "requires_grad", True)}
    frozen = frozen or set()
    holders: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    lifted = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    for n in list(fx.nodes):
        if n.op != "placeholder":
            continue
        key = str(n.target)  # copying a graph may rename nodes, never targets
        if key in signature.inputs_to_parameters:
            name = signature.inputs_to_parameters[key]
            canonical = aliases.get(name, name)
            if canonical in frozen:
                constants[n.name] = _lift(state[name].detach(), values)
            else:
                holders[n.name] = canonical
        elif key in lifted:
            constants[n.name] = _lift(state[lifted[key]].detach(), values)
        elif key in signature.user_inputs:
            inputs.append(n.name)
        else:
            constants[n.name] = torch.zeros(())
    _check_shapes(fx)
    _normalise(module)
    _lift_casts(module)
    kind = _classify(fx, holders, inputs)
    results = next(n for n in fx.nodes if n.op == "output").args[0]
    specs = zip(signature.output_specs, results, strict=True)  # type: ignore[arg-type]
    users = [r.name for spec, r in specs if spec.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT and isinstance(r, Node)]
    outputs = [o for o in users if kind.get(o) == "active"]
    by_name = {n.name: n for n in fx.nodes}
    outputs = [
        o
        for o in outputs
        if not isinstance(by_name[o].meta.get("val"), Tensor)
        or by_name[o].meta["val"].is_floating_point()
        or by_name[o].meta["val"].is_complex()
    ]
    if not outputs:
        raise InputError(
            "no floating-point output of the model depends on its trainable parameters, so there is nothing to audit. "
            "Return logits or features as tensors, and check requires_grad."
        )
    params = {}
    for name in holders.values():
        if name not in params:
            p = program.state_dict[name].detach()
            if not p.is_floating_point() and not p.is_complex():
                raise InputError(
                    f"parameter {name} has dtype {p.dtype}: quantised or integer weights have no continuous symmetry. "
                    f"Audit the float model they came from."
                )
            if p.is_complex():
                raise InputError(
                    f"parameter {name} is complex ({p.dtype}), which is not supported: store its real and imaginary parts as real "
                    "parameters (torch.view_as_real) and join them in the forward."
                )
            params[name] = _lift(p, values)
    for name, value in (unused or {}).items():
        params.setdefault(name, _lift(value.detach(), values))
    live = _reaches(fx, outputs)
    dead = sorted({c for c in params if not any(h in live for h, x in holders.items() if x == c)})
    for n in reversed(list(fx.nodes)):
        if n.op == "call_function" and n.name not in live and not n.users:
            fx.erase_node(n)
    input_dtypes = [by_name[i].meta["val"].dtype if isinstance(by_name[i].meta.get("val"), Tensor) else torch.float64 for i in inputs]
    return Graph(fx, params, aliases, constants, holders, inputs, kind, outputs, how, module, dead, input_dtypes)


def _check_shapes(fx: torch.fx.Graph) -> None:
    """Every sample must have the same shapes: a selection by value has another length for other weights."""
    for n in fx.nodes:
        value = n.meta.get("val")
        if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
            line = [x.strip() for x in (n.meta.get("stack_trace") or "").splitlines() if x.strip()]
            at = f" ({line[-1][:120]})" if line else ""
            raise TraceError(
                f"the shape of {n.name} depends on the data{at}: a selection by value, such as x[x > 0]. "
                "Replace it by a mask or torch.where, fix the dynamic dimensions, or audit the sub-modules that can be traced."
            )


def _lift(t: Tensor, values: bool) -> Tensor:
    if not values or t.device.type == "meta":
        return torch.empty_like(t, device="meta")
    return t.to("cpu", torch.float64) if t.is_floating_point() else t.cpu()


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove in-place operators and open recurrent ones, where there are any."""
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    recurrent = any(t.startswith(_RECURRENT) for t in targets)
    mutating = any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in program.graph.nodes)
    if not recurrent and not mutating:
        return program
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not recurrent:
                return program.run_decompositions({})
            table = torch.export.default_decompositions()
            return program.run_decompositions({op: rule for op, rule in table.items() if str(op).startswith(_RECURRENT)})
    except Exception as error:
        if recurrent:
            raise TraceError(f"the recurrent operator could not be opened: {_first_line(error)}") from error
        return program


def _reaches(fx: torch.fx.Graph, outputs: Sequence[str]) -> set[str]:
    live = set(outputs)
    for n in reversed(list(fx.nodes)):
        if n.name in live:
            live.update(a.name for a in n.all_input_nodes)
    return live


def _classify(fx: torch.fx.Graph, holders: Mapping[str, str], inputs: Sequence[str]) -> dict[str, str]:
    """Kind of every node, by what it depends on: parameters, data, both, neither."""
    kind: dict[str, str] = {}
    for n in fx.nodes:
        if n.op == "output":
            continue
        if n.op == "placeholder":
            kind[n.name] = "param" if n.name in holders else "data" if n.name in inputs else "const"
            continue
        kinds = {kind[a.name] for a in n.all_input_nodes}
        if "active" in kinds or {"param", "data"} <= kinds:
            kind[n.name] = "active"
        else:
            kind[n.name] = "param" if "param" in kinds else "data" if "data" in kinds else "const"
    return kind


def _lift_casts(module: torch.fx.GraphModule) -> None:
    """Every low-precision floating dtype argument becomes float64; device arguments become the CPU."""

    def lift(a: Any) -> Any:
        if isinstance(a, torch.dtype):
            return torch.float64 if a in _LOW else a
        if isinstance(a, torch.device):
            return torch.device("cpu")
        return a

    for sub in [module, *(m for m in module.modules() if isinstance(m, torch.fx.GraphModule) and m is not module)]:
        for n in list(sub.graph.nodes):
            if n.op == "call_function" and n.target in _SKIP:
                sub.graph.erase_node(n)
                continue
            if n.op != "call_function":
                continue
            n.args, n.kwargs = pytree.tree_map(lift, n.args), pytree.tree_map(lift, dict(n.kwargs))
            if n.target is aten.view.default:
                n.target = aten.reshape.default
            if n.target is aten.embedding.default:  # padding_idx only zeroes a gradient; the function depends on the row
                n.args = n.args[:2]
            if n.target in (aten.to.device, aten.to.dtype_layout, aten._to_copy.default):
                dtype = n.kwargs.get("dtype") or next((a for a in n.args[1:] if isinstance(a, torch.dtype)), None)
                n.target, n.kwargs = (aten.to.dtype, {}) if dtype is not None else (aten.clone.default, {})
                n.args = (n.args[0], dtype) if dtype is not None else (n.args[0],)
        if sub is not module:
            sub.recompile()


# -- normalisation: one parameter, one job ------------------------------------------------------------------------------------


def _normalise(module: torch.fx.GraphModule) -> None:
    for n in list(module.graph.nodes):
        rule = _SPLIT.get(n.target) if n.op == "call_function" else None
        if rule is not None:
            with module.graph.inserting_before(n):
                new = rule(module.graph, n)
            if new is not None:
                new.name, old = n.name + "_sum", n.name
                n.replace_all_uses_with(new)
                module.graph.erase_node(n)
                new.name = old
    module.graph.lint()


def _call(g: torch.fx.Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    n = g.call_function(target, args, kwargs)
    n.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
    n.meta["val"] = like.meta.get("val")
    return n


def _arg(n: Node, i: int, name: str, default: Any = None) -> Any:
    return n.args[i] if len(n.args) > i else n.kwargs.get(name, default)


def _along(g: torch.fx.Graph, n: Node, p: Node, axis: int) -> Node:
    """Reshape a vector parameter so that it broadcasts along ``axis`` of the output of ``n``."""
    rank = n.meta["val"].dim() if isinstance(n.meta.get("val"), Tensor) else n.meta["val"][0].dim()
    shape = [1] * rank
    shape[axis] = -1
    return _call(g, n, aten.reshape.default, p, shape)


def _split_linear(g: torch.fx.Graph, n: Node) -> Node | None:
    bias = _arg(n, 2, "bias")
    if bias is None:
        return None
    return _call(g, n, aten.add.Tensor, _call(g, n, aten.linear.default, n.args[0], n.args[1]), bias)


def _split_addmm(g: torch.fx.Graph, n: Node) -> Node | None:
    if n.kwargs.get("beta", 1) != 1 or n.kwargs.get("alpha", 1) != 1:
        return None
    return _call(g, n, aten.add.Tensor, _call(g, n, aten.mm.default, n.args[1], n.args[2]), n.args[0])


def _split_conv(g: torch.fx.Graph, n: Node) -> Node | None:
    bias = _arg(n, 2, "bias")
    if bias is None:
        return None
    product = _call(g, n, n.target, *n.args[:2], None, *n.args[3:], **{k: v for k, v in n.kwargs.items() if k != "bias"})
    weight = n.args[1].meta["val"]  # type: ignore[union-attr]
    axis = n.meta["val"].dim() - (weight.dim() - 1)  # batched or not
    return _call(g, n, aten.add.Tensor, product, _along(g, n, bias, axis))


def _affine(g: torch.fx.Graph, n: Node, core: Node, weight: Node | None, bias: Node | None, axis: int | None) -> Node:
    out = core
    if weight is not None:
        out = _call(g, n, aten.mul.Tensor, out, weight if axis is None else _along(g, n, weight, axis))
    if bias is not None:
        out = _call(g, n, aten.add.Tensor, out, bias if axis is None else _along(g, n, bias, axis))
    return out


def _split_layer_norm(g: torch.fx.Graph, n: Node) -> Node | None:
    weight, bias = _arg(n, 2, "weight"), _arg(n, 3, "bias")
    if weight is None and bias is None:
        return None
    return _affine(g, n, _call(g, n, n.target, n.args[0], n.args[1], None, None, _arg(n, 4, "eps", 1e-5)), weight, bias, None)


def _split_rms_norm(g: torch.fx.Graph, n: Node) -> Node | None:
    weight = _arg(n, 2, "weight")
    if weight is None:
        return None
    return _affine(g, n, _call(g, n, n.target, n.args[0], n.args[1], None, _arg(n, 3, "eps")), weight, None, None)


def _split_group_norm(g: torch.fx.Graph, n: Node) -> Node | None:
    weight, bias = _arg(n, 2, "weight"), _arg(n, 3, "bias")
    if weight is None and bias is None:
        return None
    return _affine(g, n, _call(g, n, n.target, n.args[0], n.args[1], None, None, _arg(n, 4, "eps", 1e-5)), weight, bias, 1)


def standardise(x: Tensor, eps: float) -> Tensor:
    """Train-mode batch statistics over every axis but the channel axis 1; no state, any transform."""
    axes = [i for i in range(x.dim()) if i != 1]
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def batch_statistics(graph: Graph) -> bool:
    """Whether outputs of a sample depend on the others of its batch, through a norm in train mode."""
    return any(n.target is standardise for n in graph.nodes)


def instance_standardise(x: Tensor, eps: float) -> Tensor:
    """Statistics over the spatial axes of each sample and channel."""
    axes = list(range(2, x.dim()))
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _split_batch_norm(g: torch.fx.Graph, n: Node) -> Node | None:
    weight, bias, mean, var = (_arg(n, i, name) for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1))
    training, eps = bool(_arg(n, 5, "training")), float(_arg(n, 7, "eps", 1e-5))
    return _batch_core(g, n, weight, bias, mean, var, training, eps)


def _batch_core(g: torch.fx.Graph, n: Node, weight: Any, bias: Any, mean: Any, var: Any, training: bool, eps: float) -> Node:
    if training or mean is None:
        core = _call(g, n, standardise, n.args[0], eps)
    else:
        centred = _call(g, n, aten.sub.Tensor, n.args[0], _along(g, n, mean, 1))
        scale = _call(g, n, aten.rsqrt.default, _call(g, n, aten.add.Tensor, var, eps))
        core = _call(g, n, aten.mul.Tensor, centred, _along(g, n, scale, 1))
    return _affine(g, n, core, weight, bias, 1)


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """g v / |v|, the norm taken over every axis but ``dim`` (-1: over all)."""
    axes = [i for i in range(v.dim()) if i != dim % v.dim()] if dim != -1 else list(range(v.dim()))
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def _split_weight_norm(g: torch.fx.Graph, n: Node) -> Node | None:
    return _call(g, n, weight_norm, n.args[0], n.args[1], int(_arg(n, 2, "dim", 0)))


def _split_instance_norm(g: torch.fx.Graph, n: Node) -> Node | None:
    weight, bias = _arg(n, 1, "weight"), _arg(n, 2, "bias")
    if not bool(_arg(n, 5, "use_input_stats", True)):
        return _batch_core(g, n, weight, bias, _arg(n, 3, "running_mean"), _arg(n, 4, "running_var"), False, float(_arg(n, 7, "eps", 1e-5)))
    return _affine(g, n, _call(g, n, instance_standardise, n.args[0], float(_arg(n, 7, "eps", 1e-5))), weight, bias, 1)


def _split_getitem(g: torch.fx.Graph, n: Node) -> Node | None:
    """The output of a decomposed batch norm, written as standardise, multiply, add."""
    source = n.args[0]
    if not isinstance(source, Node) or n.args[1] != 0 or source.op != "call_function":
        return None
    if source.target is aten._native_batch_norm_legit_functional.default:
        x, weight, bias, mean, var, training, _, eps = source.args[:8]
    elif source.target is aten._native_batch_norm_legit_no_training.default:
        x, weight, bias, mean, var, _, eps = source.args[:7]
        training = False
    else:
        return None
    proxy = _call(g, n, aten.alias.default, x)
    core_like = n
    if training:
        core = _call(g, core_like, standardise, proxy, float(eps))  # type: ignore[arg-type]
    else:
        centred = _call(g, n, aten.sub.Tensor, proxy, _along(g, n, mean, 1))  # type: ignore[arg-type]
        scale = _call(g, n, aten.rsqrt.default, _call(g, n, aten.add.Tensor, var, eps))
        core = _call(g, n, aten.mul.Tensor, centred, _along(g, n, scale, 1))
    return _affine(g, n, core, weight, bias, 1)  # type: ignore[arg-type]


_SPLIT: dict[Any, Callable[[torch.fx.Graph, Node], Node | None]] = {
    aten.linear.default: _split_linear,
    aten.addmm.default: _split_addmm,
    aten.conv1d.default: _split_conv,
    aten.conv2d.default: _split_conv,
    aten.conv3d.default: _split_conv,
    aten.conv1d.padding: _split_conv,
    aten.conv2d.padding: _split_conv,
    aten.conv3d.padding: _split_conv,
    aten.conv_transpose1d.default: _split_conv,
    aten.conv_transpose2d.input: _split_conv,
    aten.conv_transpose3d.input: _split_conv,
    aten.convolution.default: _split_conv,
    aten.layer_norm.default: _split_layer_norm,
    aten.rms_norm.default: _split_rms_norm,
    aten.group_norm.default: _split_group_norm,
    aten.batch_norm.default: _split_batch_norm,
    aten.instance_norm.default: _split_instance_norm,
    aten._weight_norm.default: _split_weight_norm,
    operator.getitem: _split_getitem,
}
