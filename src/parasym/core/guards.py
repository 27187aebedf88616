"""Guards around a measurement: nothing about the model or the random generators may change, and the right kernels must run."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from parasym.core.errors import NonDeterministicError

log = logging.getLogger("parasym")

# ----------------------------------------------------------------------------------------------- random state and model state


@contextlib.contextmanager
def rng_state() -> Iterator[None]:
    """Restore the global generators of torch (CPU and every initialised CUDA device), NumPy and Python on exit."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    np_state = np.random.get_state()
    py_state = random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(np_state)
        random.setstate(py_state)


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache among the outputs of a Transformers model inside the block: a cache is no tensor and no symmetry is in it."""
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    held = {id(c): c for c in configs if getattr(c, "use_cache", None)}
    try:
        for config in held.values():
            config.use_cache = False
        yield
    finally:
        for config in held.values():
            config.use_cache = True


@contextlib.contextmanager
def preserve(*models: nn.Module) -> Iterator[None]:
    """Leave the models and the random generators as they were found, whatever happens inside, exceptions included.

    Restored on exit: the train/eval mode of every submodule; buffers (objects, values, and autograd version counters, so that a
    graph recorded before the block still runs backward); ``requires_grad`` of every parameter; ``.grad``; the global random state
    of torch, NumPy and Python. Parameter values are **not** saved: a measurement does not write them.

    ``.grad`` is set aside at entry, not copied: inside the block every gradient reads as None, so nothing accumulates into the
    caller's. Buffers are copied, so the cost is their size.

    Args:
        *models: none at all guards the random state alone.
    """
    modules = list(dict.fromkeys(m for model in models for m in model.modules()))
    params = list(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
    modes = [m.training for m in modules]
    flags = [(p, p.requires_grad, p.grad) for p in params]
    slots = [dict(m._buffers) for m in modules]
    buffers = list(dict.fromkeys(b for slot in slots for b in slot.values() if b is not None and not b.is_meta))
    saved = [(b, b.detach().clone(), b._version if not b.is_inference() else None, b.requires_grad) for b in buffers]
    for p in params:
        p.grad = None
    with rng_state():
        try:
            yield
        finally:
            for m, mode, slot in zip(modules, modes, slots, strict=True):
                m.training = mode
                if m._buffers.keys() != slot.keys() or any(m._buffers[k] is not b for k, b in slot.items()):
                    m._buffers.clear()
                    m._buffers.update(slot)
            for b, value, version, needs_grad in saved:
                if not _same(b, value):
                    with torch.no_grad():
                        b.detach().copy_(value)
                if version is not None and b._version != version:  # the bytes are the old ones again, so is the version
                    torch._C._autograd._unsafe_set_version_counter((b,), (version,))
                if b.requires_grad != needs_grad:
                    b.requires_grad_(needs_grad)
            for p, needs_grad, grad in flags:
                if p.requires_grad != needs_grad:
                    p.requires_grad_(needs_grad)
                p.grad = grad


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all()) if a.is_floating_point() or a.is_complex() else False


# ---------------------------------------------------------------------------------------------------------- kernels and casts


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Run attention with kernels that have a forward derivative and a second derivative.

    Selects the math back end of ``scaled_dot_product_attention`` and switches off the fused inference path of
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``. The function computed is the same up to rounding.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _RunNow:
    """Stands in for torch's reentrant checkpoint function."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextlib.contextmanager
def no_checkpointing() -> Iterator[None]:
    """Make ``torch.utils.checkpoint`` keep activations instead of recomputing them in the backward pass.

    A recomputation reads the weights the module holds at that later moment, not those the function was called with: without an error,
    the gradient at any other point than the module's own is wrong. Values are unchanged; memory is that of the model without
    checkpointing.
    """
    module: Any = torch.utils.checkpoint
    names = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")
    before = {n: getattr(module, n) for n in names if hasattr(module, n)}
    stand_ins = dict(zip(names, (lambda *args, **kwargs: iter((None,)), _RunNow), strict=True))
    for n in before:
        setattr(module, n, stand_ins[n])
    try:
        yield
    finally:
        for n, value in before.items():
            setattr(module, n, value)


_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_WIDER_NAMES = {
    f"torch.{device}{kind}Tensor": f"torch.{device}DoubleTensor" for device in ("", "cuda.") for kind in ("Float", "Half", "BFloat16")
}
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_COMPLEX_CASTS = {getattr(Tensor, name) for name in ("cfloat", "chalf")}
_REINTERPRET = {Tensor.view, torch.frombuffer, torch.from_file, torch.ops.aten.view.dtype}  # these read bits, they do not cast
_BY_EXAMPLE = {Tensor.to, Tensor.type_as}


class _Float64Casts(TorchFunctionMode):
    """Send every cast or allocation aimed at a narrower float type to float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _REINTERPRET:
            return func(*args, **kwargs)
        if func in _CASTS:
            return args[0].to(torch.float64, *args[1:], **kwargs)
        if func in _COMPLEX_CASTS:
            return args[0].to(torch.complex128, *args[1:], **kwargs)
        if func in _BY_EXAMPLE:
            other = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("tensor"))
            if isinstance(other, Tensor) and other.dtype in _WIDER:
                rest = {k: v for k, v in kwargs.items() if k not in ("other", "tensor")}
                return args[0].to(other.device, _WIDER[other.dtype], *args[2:], **rest)
        args = tuple(_wider(a) for a in args)
        kwargs = {k: _wider(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _wider(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return _WIDER.get(x, x)
    if isinstance(x, str):
        return _WIDER_NAMES.get(x, x)
    return x


@contextlib.contextmanager
def float64_casts() -> Iterator[None]:
    """Lift casts inside a forward pass to float64, so that a model given float64 weights and inputs stays in float64.

    ``x.float()``, ``x.to(torch.float32)``, ``softmax(x, dtype=torch.float32)``, ``torch.zeros(n, dtype=torch.bfloat16)`` and their
    kin, also as operators of an exported graph, produce float64 inside the block; complex64 becomes complex128; the default dtype
    is float64. Bit reinterpretation (``x.view(dtype)``) and 8-bit floats are left alone. A forward pass that narrows to float32
    otherwise has derivatives good to 1e-7, and the gap between null and small singular values is gone.

    Limits: a cast made inside C++ code or inside a Python function of torch that handles the override itself is not seen;
    ``torch.finfo(torch.float32)`` still answers for float32; a tensor attribute that is no buffer keeps its dtype.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Casts():
            yield
    finally:
        torch.set_default_dtype(default)


# --------------------------------------------------------------------------------------------------------------- determinism


def check_deterministic(fn: Callable[[], Any], *, model: nn.Module | None = None, rtol: float | None = None, what: str = "") -> Any:
    """Evaluate ``fn`` twice and refuse to go on when the two results differ.

    The random generators move on between the two evaluations, and are restored afterwards; buffers that the evaluation writes are
    restored too, when ``model`` is given.

    Args:
        fn: no arguments; returns a tensor or a nest (tuple, dict, dataclass known to pytree) of tensors and numbers.
        model: searched for the modules at fault; when missing, taken from ``fn`` if that is a module, a bound method, a partial or a
            closure over one.
        rtol: largest difference allowed relative to the largest entry of that tensor; default 1000 machine epsilons of its dtype
            (1.2e-4 in float32, 2.2e-13 in float64), which admits a changed order of summation.
        what: what is being evaluated, for the message.

    Returns:
        The first result of ``fn``.

    Raises:
        NonDeterministicError: the results differ in structure, shape or value; the message says by how much and which modules.
    """
    model = model if model is not None else _model_of(fn)
    guarded = () if model is None else (model,)
    with preserve(*guarded):
        first = fn()
    with preserve(*guarded):
        torch.rand(7), np.random.rand(7), random.random()  # another point of every stream, even if the first call drew nothing
        second = fn()
    gap, where, limit = _disagreement(first, second, rtol)
    if not gap > limit:
        return first
    culprits = [] if model is None else _culprits(fn, model)
    blame = f" First module whose equal inputs gave different outputs: {culprits[0]}." if culprits else ""
    suspects = [] if model is None else _suspects(model)
    if suspects:
        blame += f" Random in their present mode: {'; '.join(suspects[:6])}{' ...' if len(suspects) > 6 else ''}."
    if not blame:
        blame = (
            " No module is known to draw random numbers here: look for torch.rand/randn/bernoulli in the forward, "
            "state kept from call to call, or a shuffled batch."
        )
    amount = "in structure or shape" if math.isinf(gap) else f"by {gap:.2e} of the largest entry (limit {limit:.1e})"
    raise NonDeterministicError(
        f"Two evaluations of {what or 'the same function on the same input'} differ {amount}{where}.{blame} "
        "Call model.eval(), or fix the noise, and measure again."
    )


def _disagreement(a: Any, b: Any, rtol: float | None) -> tuple[float, str, float]:
    left, spec = pytree.tree_flatten_with_path(a)
    right, other = pytree.tree_flatten(b)
    if spec != other:
        return math.inf, "", 0.0
    worst = (0.0, "", 0.0)
    excess = 0.0
    for (path, x), y in zip(left, right, strict=True):
        if not isinstance(x, Tensor | np.ndarray | float | int | complex) or isinstance(x, bool):
            continue
        x, y = torch.as_tensor(x).detach(), torch.as_tensor(y).detach()
        name = f" at {pytree.keystr(path)}" if path else ""
        if x.shape != y.shape or x.dtype != y.dtype:
            return math.inf, name, 0.0
        if x.numel() == 0 or x.is_meta:
            continue
        inexact = x.is_floating_point() or x.is_complex()
        limit = (rtol if rtol is not None else 1e3 * torch.finfo(x.dtype).eps) if inexact else 0.0
        if _same(x, y):
            continue
        x, y = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, y))
        scale = torch.maximum(x.abs(), y.abs()).nan_to_num(0.0, 0.0).max().item()
        diff = (x - y).abs()
        both = (x == y) | ((x != x) & (y != y))
        gap = torch.where(both, torch.zeros_like(diff), diff).nan_to_num(math.inf, math.inf).max().item()
        gap = gap / scale if scale > 0 else gap
        if gap - limit > excess:
            excess, worst = gap - limit, (gap if math.isfinite(gap) else 1e308, name, limit)
    return worst


def _model_of(fn: Any, depth: int = 3) -> nn.Module | None:
    """Find the module that a callable is about: itself, its owner, an argument bound to it, or a variable it closes over."""
    if isinstance(fn, nn.Module):
        return fn
    if depth == 0 or isinstance(fn, str | bytes | Tensor | int | float | type(None)):
        return None
    inner: list[Any] = [getattr(fn, "__self__", None), getattr(fn, "model", None), getattr(fn, "func", None)]
    inner += list(getattr(fn, "args", None) or ()) if hasattr(fn, "func") else []
    inner += list(fn) if isinstance(fn, tuple | list) else []
    for cell in getattr(fn, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            inner.append(cell.cell_contents)
    code = getattr(fn, "__code__", None)
    if code is not None:
        used = (fn.__globals__.get(n) for n in code.co_names)
        inner += [x for x in used if isinstance(x, nn.Module) or isinstance(getattr(x, "model", None), nn.Module)]
    for x in inner:
        if x is not None and x is not fn and (found := _model_of(x, depth - 1)) is not None:
            return found
    return None


def _suspects(model: nn.Module) -> list[str]:
    found = []
    for name, m in model.named_modules():
        kind = type(m).__name__
        label = f"{name or '(root)'} ({kind}"
        p = getattr(m, "p", None)
        if not m.training:
            if "noise" in kind.lower():
                found.append(f"{label})")
            continue
        if isinstance(m, nn.modules.dropout._DropoutNd):
            if m.p > 0:
                found.append(f"{label}, p={m.p})")
        elif isinstance(m, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d) or "noise" in kind.lower():
            found.append(f"{label})")
        elif ("drop" in kind.lower() or "stochasticdepth" in kind.lower()) and isinstance(p, float) and p > 0:
            found.append(f"{label}, p={p})")
        else:
            rates = {k: v for k, v in vars(m).items() if "drop" in k.lower() and isinstance(v, float) and v > 0}
            if rates:
                found.append(f"{label}, {', '.join(f'{k}={v}' for k, v in rates.items())})")
    return found


def _culprits(fn: Callable[[], Any], model: nn.Module) -> list[str]:
    """Run ``fn`` twice more and name the innermost modules whose inputs agreed and whose outputs did not, in the order they ran."""
    names = {m: f"{n or '(root)'} ({type(m).__name__})" for n, m in model.named_modules()}
    runs: list[list[tuple[nn.Module, tuple[float, ...], tuple[float, ...]]]] = []

    def prints(x: Any) -> tuple[float, ...]:
        found = []
        for t in pytree.tree_leaves(x):
            if isinstance(t, Tensor) and t.numel() and not t.is_meta:
                t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
                flat = t.reshape(-1).double()
                found += [flat.sum().item(), (flat @ torch.linspace(1, 2, flat.numel(), dtype=flat.dtype, device=flat.device)).item()]
        return tuple(found)

    def record(m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        runs[-1].append((m, prints((args, kwargs)), prints(out)))

    handles = []
    try:
        handles += [m.register_forward_hook(record, with_kwargs=True) for m in names]
        for _ in range(2):
            runs.append([])
            with preserve(model):
                torch.rand(7 + len(runs))
                fn()
    except Exception:  # a transformed call has no plain numbers to compare: the list of suspects has to do
        log.debug("non-determinism could not be located by hooks", exc_info=True)
        return []
    finally:
        for h in handles:
            h.remove()
    if len(runs[0]) != len(runs[1]):
        return []
    found = []
    for (m, x, y), (m2, x2, y2) in zip(*runs, strict=True):  # hooks fire innermost first
        if m is m2 and _equal(x, x2) and not _equal(y, y2):
            found.append(names[m])
    return found


def _equal(x: tuple[float, ...], y: tuple[float, ...]) -> bool:
    return len(x) == len(y) and all(a == b or (a != a and b != b) for a, b in zip(x, y, strict=True))


# ------------------------------------------------------------------------------------------------------------------- threads


@contextlib.contextmanager
def blas_threads(n: int = 1) -> Iterator[None]:
    """Limit the BLAS pools used by NumPy and SciPy to ``n`` threads inside the block; torch's own pool is untouched.

    SciPy's ARPACK beside torch on two threads is about three times slower without the limit, because the two pools displace each
    other at every product. Without the package ``threadpoolctl`` the block runs unlimited and says so once in the log.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        global _warned
        if not _warned:
            log.warning("threadpoolctl is not installed: BLAS threads are not limited, SciPy calls may be slow (pip install threadpoolctl)")
            _warned = True
        yield
        return
    with threadpool_limits(limits=n, user_api="blas"):
        yield


_warned = False
