"""A model as a pure function of a dict of tensors."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from parasym.core.errors import InputError, ParasymError
from parasym.core.guards import no_checkpointing

_WRAPPERS = ("DistributedDataParallel", "DataParallel")
_PACKED = ("4bit", "8bit", "int8params", "quantiz", "packed")


@dataclass(frozen=True, eq=False, repr=False)
class Functional:
    """A model as a pure function ``f(params, args, kwargs) -> tuple of float tensors``. Made by `functional`.

    The tensors in ``params`` and ``buffers`` are the model's own, detached, not copies: after a training step they show the new
    weights. A call never changes the module: buffers it writes (batch-norm statistics), attributes it rebinds and its mode are as
    before. Dropout draws from torch's global generator as it does in the model; `parasym.core.guards.preserve` restores that.

    Attributes:
        model: the module called, without DataParallel or compile wrappers, in the mode it was in.
        params: canonical name -> tensor; every floating or complex parameter, frozen or not, once for each place in memory. The
            canonical name is the first in ``model.named_parameters()`` order.
        buffers: name -> tensor, once for each place in memory; parameters of integer type are listed here too, as constants.
        aliases: every other name of a parameter -> its canonical name (tied weights, shared modules, transposed views).
        frozen: canonical names of parameters whose ``requires_grad`` is off.
        empty: canonical names of parameters without entries; they take part, and contribute no dimension.
        dtype: when set, floating arguments are cast to it at every call.
    """

    model: nn.Module
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    aliases: dict[str, str]
    frozen: frozenset[str]
    empty: tuple[str, ...]
    dtype: torch.dtype | None = None
    _slots: tuple[_Slot, ...] = field(default=())
    _perms: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __call__(
        self, params: Mapping[str, Tensor] | None = None, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, ...]:
        """Evaluate the model at the given parameters.

        Args:
            params: name -> tensor of the parameter's shape, any float dtype; names left out keep the model's value, an alias stands
                for its canonical name. None means the model's own parameters. Differentiable, and may be traced or vmapped over.
            args: positional arguments; a single tensor means one argument, a mapping means keyword arguments.
            kwargs: keyword arguments.

        Returns:
            The floating-point tensors of the output, in pytree order (ModelOutput, dict, tuple, dataclass are opened; a complex
            tensor gets a last axis of size 2; None, integers and key-value caches are left out).

        Raises:
            InputError: unknown name, wrong shape, arguments the model does not take, or no floating tensor in the output.
        """
        args, kwargs = _arguments(args, kwargs)
        given = self._resolve(params or {})
        if self.dtype is not None:
            args, kwargs = cast(args, self.dtype), cast(kwargs, self.dtype)
        out = self._run(given, args, kwargs)
        return float_outputs(out, of=type(self.model).__name__)

    def output(self, params: Mapping[str, Tensor] | None = None, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Evaluate as ``__call__`` does, and return what the model returns, as it is. Raises as ``__call__``, but for the output."""
        args, kwargs = _arguments(args, kwargs)
        if self.dtype is not None:
            args, kwargs = cast(args, self.dtype), cast(kwargs, self.dtype)
        return self._run(self._resolve(params or {}), args, kwargs)

    def to(self, dtype: torch.dtype) -> Functional:
        """Return the same function with its floating parameters, buffers and arguments in another float type; the model is untouched.

        Casts inside the forward stay what they are: see `parasym.core.guards.float64_casts`.

        Raises:
            InputError: ``dtype`` is not a floating type.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"Functional.to needs a floating dtype such as torch.float64, got {dtype!r}.")
        return dataclasses.replace(self, params=cast(self.params, dtype), buffers=cast(self.buffers, dtype), dtype=dtype)

    @property
    def training(self) -> bool:
        """True when any submodule is in train mode."""
        return any(m.training for m in self.model.modules())

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.params.values())
        tied = f", {len(self.aliases)} aliases" if self.aliases else ""
        return f"Functional({type(self.model).__name__}, {n:,} parameters in {len(self.params)} tensors{tied})"

    def _resolve(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(params, Mapping):
            raise InputError(f"Parameters must be a mapping of name to tensor, got {type(params).__name__}.")
        found: dict[str, Tensor] = {}
        for name, value in params.items():
            canonical = self.aliases.get(name, name)
            if canonical not in self.params:
                close = _close(name, [*self.params, *self.aliases])
                raise InputError(f"{type(self.model).__name__} has no parameter {name!r}{f'; did you mean {close!r}?' if close else ''}")
            if not isinstance(value, Tensor):
                raise InputError(f"Parameter {name!r} must be a tensor, got {type(value).__name__}.")
            own = self.params[canonical]
            perm = self._perms.get(name)
            shape = own.shape if perm is None else torch.Size(own.shape[i] for i in perm)
            if value.shape != shape:
                raise InputError(f"Parameter {name!r} has shape {tuple(shape)}, got {tuple(value.shape)}.")
            if value.dtype.is_complex != own.dtype.is_complex or not (value.is_floating_point() or value.is_complex()):
                wanted = "complex" if own.is_complex() else "floating"
                raise InputError(f"Parameter {name!r} is {own.dtype}, got {value.dtype}: give a {wanted} tensor.")
            if perm is not None:
                value = value.permute(tuple(perm.index(i) for i in range(len(perm))))
            if canonical in found and found[canonical] is not value:
                raise InputError(f"Parameter {canonical!r} was given twice, the second time under its other name {name!r}; give it once.")
            found[canonical] = value
        return found

    def _run(self, given: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        modules = list(self.model.modules())
        saved = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in modules]
        fresh: dict[str, Tensor] = {}
        try:
            for slot in self._slots:
                if slot.name in self.params:
                    value = given.get(slot.name, self.params[slot.name])
                    slot.module._parameters[slot.attr] = value if slot.perm is None else value.permute(slot.perm)  # type: ignore[assignment]
                elif slot.is_param:
                    slot.module._parameters[slot.attr] = self.buffers[slot.name]  # type: ignore[assignment]
                elif isinstance(slot.module, _NormBase) and slot.module.training:
                    slot.module._buffers[slot.attr] = None  # train mode uses the batch's statistics; no running ones means none are written
                else:
                    if slot.name not in fresh:
                        fresh[slot.name] = self.buffers[slot.name].clone()
                    slot.module._buffers[slot.attr] = fresh[slot.name]
            with no_checkpointing():
                return self.model(*args, **kwargs)
        except (ParasymError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as e:
            if _under_transform():
                raise  # the operator lacks a derivative or a batching rule: for the caller's fall-back, not for the user
            raise InputError(_misfit(self.model, args, kwargs, e)) from e
        finally:
            for m, attributes, own_params, own_buffers, children in saved:
                _restore(m._parameters, own_params)
                _restore(m._buffers, own_buffers)
                _restore(m._modules, children)
                _restore(vars(m), attributes)


@dataclass(frozen=True, eq=False)
class _Slot:
    """One place in the module tree that holds a tensor: ``module.attr``; ``perm`` when it is a transposed view of the canonical one."""

    module: nn.Module
    attr: str
    path: str
    name: str
    is_param: bool
    perm: tuple[int, ...] | None = None


def functional(model: nn.Module, *, values: bool = True) -> Functional:
    """Make a pure function of a model's parameters, and check that its weights can be used.

    Args:
        model: any ``nn.Module``; its mode is kept. DataParallel, DistributedDataParallel and ``torch.compile`` wrappers are opened,
            so that names are those of the plain module.
        values: whether the weights will be read. With False, meta and packed weights are accepted and nothing is checked for NaN.

    Raises:
        InputError: not a module; a scripted module; an uninitialised (lazy), sharded, quantised, packed, sparse or meta weight; NaN
            or Inf in a weight, NaN in a buffer; parameters of integer type only; two parameters that overlap in memory without
            being views of one tensor.

    Example:
        >>> f = functional(nn.Linear(3, 2))
        >>> [tuple(y.shape) for y in f(f.params, torch.zeros(5, 3))]
        [(5, 2)]
    """
    model = _unwrap(model)
    slots: list[_Slot] = []
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    perms: dict[str, tuple[int, ...]] = {}
    by_id: dict[int, str] = {}
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    seen_slots: dict[tuple[int, str], str] = {}
    frozen: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if values:
            _check_module(prefix, module)
        for attr, p in module._parameters.items():
            if p is None:
                continue
            path = f"{prefix}.{attr}" if prefix else attr
            if (id(module), attr) in seen_slots:
                if (first := seen_slots[id(module), attr]) in params or first in aliases:
                    aliases[path] = aliases.get(first, first)
                    if first in perms:
                        perms[path] = perms[first]
                continue
            seen_slots[id(module), attr] = path
            _check_tensor(path, p, values)
            if not (p.is_floating_point() or p.is_complex()):
                buffers[path] = p.detach()
                slots.append(_Slot(module, attr, path, path, True))
                continue
            strided = p.layout is torch.strided and not p.is_meta and p.numel() > 0 and not _is_shard(p)
            family = by_storage.setdefault(p.untyped_storage().data_ptr(), []) if strided else []
            name, perm = (by_id[id(p)], None) if id(p) in by_id else _canonical(path, p, family)
            slots.append(_Slot(module, attr, path, name, True, perm))
            if name != path:
                aliases[path] = name
                if perm is not None:
                    perms[path] = perm
                continue
            by_id[id(p)] = path
            family.append((path, p))
            params[path] = p.detach()
            if not p.requires_grad:
                frozen.add(path)
    integer = list(buffers)
    if integer and not params:
        raise InputError(
            f"{type(model).__name__} has parameters of integer type only ({_list(integer)}; {buffers[integer[0]].dtype}): "
            "there is no continuous parameter to look at. If the weights are quantised, load the unquantised model."
        )
    known: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for attr, b in module._buffers.items():
            if b is None:
                continue
            path = f"{prefix}.{attr}" if prefix else attr
            _check_tensor(path, b, values, kind="buffer")
            name = known.setdefault(id(b), path)
            buffers.setdefault(name, b.detach())
            slots.append(_Slot(module, attr, path, name, False))
    if values:
        _check_finite(params, buffers)
    empty = tuple(n for n, p in params.items() if p.numel() == 0)
    return Functional(model, params, buffers, aliases, frozenset(frozen), empty, None, tuple(slots), perms)


def float_outputs(out: Any, of: str = "the function") -> tuple[Tensor, ...]:
    """Flatten a nest to its floating tensors, in pytree order; dataclasses are opened, complex tensors become real pairs, caches dropped.

    Raises:
        InputError: there is none.
    """
    found: list[Tensor] = []

    def walk(x: Any) -> None:
        for leaf in pytree.tree_leaves(x, is_leaf=_is_cache):
            if isinstance(leaf, Tensor):
                if leaf.is_complex():
                    found.append(torch.view_as_real(leaf.resolve_conj()))
                elif leaf.is_floating_point():
                    found.append(leaf)
            elif _is_cache(leaf):
                continue
            elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
                walk([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
            elif isinstance(leaf, Mapping):
                walk(list(leaf.values()))

    walk(out)
    if not found:
        kinds = sorted({f"{type(x).__name__} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in pytree.tree_leaves(out)})
        raise InputError(
            f"{of} returned no floating-point tensor, but {type(out).__name__}{f' of {_list(kinds)}' if kinds else ''}. "
            "Wrap the model so that it returns its logits or features before argmax, decoding or conversion."
        )
    return tuple(found)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Cast every floating tensor of a nest to ``dtype``, complex ones to the complex type of that width; the rest is kept as it is."""

    def one(t: Any) -> Any:
        if isinstance(t, Tensor) and t.is_floating_point():
            return t.to(dtype)
        if isinstance(t, Tensor) and t.is_complex():
            return t.to(dtype.to_complex())
        return t

    return pytree.tree_map(one, tree)


# -------------------------------------------------------------------------------------------------------------------- helpers


def _unwrap(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, Mapping):
            hint = " That is a state dict: build the model and load it with model.load_state_dict(...)."
        elif isinstance(model, type):
            hint = f" That is a class: make an instance, {model.__name__}(...)."
        raise InputError(f"The model must be a torch.nn.Module, got {type(model).__name__}.{hint}")
    while True:
        attr = "module" if type(model).__name__ in _WRAPPERS else "_orig_mod"
        inner = getattr(model, attr, None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{type(model).__name__} is a TorchScript module, whose weights cannot be exchanged: give the eager module it was made from."
        )
    return model


def _check_module(prefix: str, module: nn.Module) -> None:
    where = f"Module {prefix or '(root)'} ({type(module).__name__})"
    if "quantized" in type(module).__module__.split(".") or hasattr(module, "_packed_params") or hasattr(module, "qweight"):
        raise InputError(f"{where} holds packed, quantised weights, which have no derivative: give the model before quantisation.")


def _check_tensor(path: str, t: Tensor, values: bool, kind: str = "parameter") -> None:
    if is_lazy(t):
        raise InputError(f"The {kind} {path} is not initialised yet (lazy module): run the model once on an example batch first.")
    if not values:
        return
    kind_name = type(t).__name__
    if _is_shard(t):
        raise InputError(f"The {kind} {path} is sharded over devices ({kind_name}): gather it (full_tensor, or a full state dict) first.")
    if t.is_meta:
        raise InputError(f"The {kind} {path} is on the meta device and has no values: load the weights (to_empty, then load_state_dict).")
    packed = t.is_quantized or getattr(t, "quant_state", None) is not None or any(k in kind_name.lower() for k in _PACKED)
    if packed or (t.is_floating_point() and t.element_size() == 1):
        raise InputError(
            f"The {kind} {path} is quantised or packed ({kind_name}, {t.dtype}): dequantise the model, or load it in float32 or bfloat16."
        )
    if t.layout is not torch.strided:
        raise InputError(f"The {kind} {path} has layout {t.layout}: only dense (strided) tensors can be used; call .to_dense().")


def _is_shard(t: Tensor) -> bool:
    """Whether a tensor is a DTensor: it has no address of its own."""
    return type(t).__name__ == "DTensor" or (hasattr(t, "full_tensor") and hasattr(t, "placements"))


def _check_finite(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    bad = []
    for name, p in params.items():
        if p.numel() and not bool(torch.isfinite(p).all()):
            nan = int(torch.isnan(p).sum())
            inf = int((~torch.isfinite(p)).sum()) - nan
            found = " and ".join(f"{n} {kind}" for n, kind in ((nan, "NaN"), (inf, "Inf")) if n)
            bad.append(f"{name} ({found} of {p.numel()} entries)")
    for name, b in buffers.items():  # infinities are legitimate there: attention masks
        if (b.is_floating_point() or b.is_complex()) and (nan := int(torch.isnan(b).sum())):
            bad.append(f"buffer {name} ({nan} NaN of {b.numel()} entries)")
    if bad:
        raise InputError(f"The weights are not finite: {_list(bad)}. Load an earlier checkpoint, or repair those tensors.")


def _canonical(path: str, p: Tensor, owners: list[tuple[str, Tensor]]) -> tuple[str, tuple[int, ...] | None]:
    """Find the earlier parameter this one is (the same memory, or a transposed view of it), else itself; ``owners`` share its storage."""
    for name, q in owners:
        if q.device != p.device or _end(p) <= q.data_ptr() or _end(q) <= p.data_ptr():  # neighbours in one flat buffer
            continue
        if p.data_ptr() == q.data_ptr() and p.dtype == q.dtype and p.ndim == q.ndim:
            if p.shape == q.shape and p.stride() == q.stride():
                return name, None
            axes = list(zip(q.shape, q.stride(), strict=True))
            perm = []
            for axis in zip(p.shape, p.stride(), strict=True):
                match = next((i for i, a in enumerate(axes) if a == axis and i not in perm), None)
                if match is None:
                    break
                perm.append(match)
            if len(perm) == p.ndim:
                return name, tuple(perm)
        raise InputError(
            f"Parameters {name} {tuple(q.shape)} and {path} {tuple(p.shape)} overlap in memory but are neither the same tensor nor a "
            "transpose of it: make one of them a function of the other in the forward, or clone it."
        )
    return path, None


def _end(t: Tensor) -> int:
    span = sum((s - 1) * abs(d) for s, d in zip(t.shape, t.stride(), strict=True)) + 1
    return t.data_ptr() + span * t.element_size()


def _arguments(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(args, Mapping):
        return (), {**args, **(kwargs or {})}
    return (tuple(args) if isinstance(args, tuple | list) else (args,)), dict(kwargs or {})


def _restore(now: MutableMapping[str, Any], before: Mapping[str, Any]) -> None:
    """Make ``now`` hold what ``before`` holds, order included; nearly free when nothing changed."""
    if len(now) == len(before) and all(map(operator.is_, now.values(), before.values())) and all(map(operator.eq, now, before)):
        return
    now.clear()
    now.update(before)


def _is_cache(x: Any) -> bool:
    return type(x).__name__.endswith("Cache")


def _under_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _describe(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in x.items()) + "}"
    if isinstance(x, tuple | list) and len(x) <= 4:
        return "(" + ", ".join(map(_describe, x)) + ")"
    return type(x).__name__


def _misfit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], e: Exception) -> str:
    given = ", ".join([*map(_describe, args), *(f"{k}={_describe(v)}" for k, v in kwargs.items())]) or "no arguments"
    text = str(e).strip().splitlines()
    said = f"{type(e).__name__}: {text[0][:240]}" if text else type(e).__name__
    low = str(e).lower()
    where = _where(model, e)
    if isinstance(e, TypeError) and ("argument" in low or "positional" in low):
        cure = "Give the arguments the forward asks for; keyword arguments go in kwargs."
    elif "grouped_mm" in low or "expected mat_a" in low:
        cure = "The fused expert kernel takes no float64: choose the eager experts (model.set_experts_implementation('eager'))."
    elif "dtype" in low or "scalar type" in low:
        cure = "Give inputs of the weights' dtype, or use Functional.to(dtype), which casts both."
    elif "device" in low:
        cure = "Put the model and the inputs on one device."
    elif "index out of range" in low or isinstance(e, IndexError):
        cure = "Check that token ids are below the vocabulary size and the sequence is not longer than the position table."
    else:
        cure = "Check the shapes against what the model is trained on."
    return f"{type(model).__name__} could not be evaluated on ({given}){where}: {said}. {cure}"


def _where(model: nn.Module, e: Exception) -> str:
    """Name the innermost module whose forward was running when the exception was raised."""
    names = {id(m): n for n, m in model.named_modules()}
    inner, tb = None, e.__traceback__
    while tb is not None:
        owner = tb.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            inner = owner
        tb = tb.tb_next
    return "" if inner is None or inner is model else f" in {names[id(inner)]} ({type(inner).__name__})"


def _close(name: str, names: list[str]) -> str | None:
    import difflib

    found = difflib.get_close_matches(name, names, n=1)
    return found[0] if found else None


def _list(items: list[str], n: int = 4) -> str:
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
