"""Matrix-free Jacobian, Hessian and generalised Gauss-Newton of a function of a dict of parameters, and the dense Jacobian.

Every product has a chain of back ends, because no single way of differentiating works for every operator of torch. The first one
that works is used and named (`backend`); those that did not work are kept with their reason (`tried`). Vectors are flat, in the order
of the parameter dict (see `Layout`); a complex entry counts as two real ones.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.func import grad, jvp, vmap

from parasym.core.errors import InputError, NonDeterministicError
from parasym.core.functional import float_outputs
from parasym.core.guards import check_deterministic, log, math_attention, no_checkpointing, rng_state
from parasym.core.results import Estimate

Params = Mapping[str, Tensor]
Tensors = tuple[Tensor, ...]
Backend = Literal["auto", "reverse-over-reverse", "forward-over-reverse", "central difference"]

# ------------------------------------------------------------------------------------------------------------------ flat vectors


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a dict sits in a flat real vector.

    Attributes:
        names: in the order of the dict.
        shapes, dtypes: one for each name.
        offsets: first position of each tensor, and the total size at the end.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, tree: Mapping[str, Tensor]) -> Layout:
        """Read the layout off a dict of tensors. Raises InputError for an entry that is no floating or complex tensor."""
        offsets = [0]
        for name, t in tree.items():
            if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
                kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
                raise InputError(
                    f"Parameter {name!r} is {kind}: only floating or complex tensors have derivatives; leave it out of the dict."
                )
            offsets.append(offsets[-1] + t.numel() * (2 if t.is_complex() else 1))
        return cls(tuple(tree), tuple(t.shape for t in tree.values()), tuple(t.dtype for t in tree.values()), tuple(offsets))

    @property
    def size(self) -> int:
        """Length n of the flat vector."""
        return self.offsets[-1]

    def slice(self, name: str) -> slice:
        """Return the positions of one tensor. Raises InputError for an unknown name."""
        if name not in self.names:
            raise InputError(f"No tensor named {name!r} in this layout.")
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i + 1])

    def locate(self, position: int) -> tuple[str, tuple[int, ...]]:
        """Return the tensor's name and the index in it of a flat position (a complex entry has a last index 0 or 1)."""
        if not 0 <= position < self.size:
            raise InputError(f"Position {position} is outside 0 .. {self.size - 1}.")
        i = int(np.searchsorted(self.offsets, position, side="right")) - 1
        shape = self._real_shape(i)
        return self.names[i], tuple(int(j) for j in np.unravel_index(position - self.offsets[i], shape)) if shape else ()

    def flatten(self, tree: Mapping[str, Tensor]) -> Tensor:
        """Flatten a dict of tensors of these shapes to (n,), or of shapes (k, *shape) to columns (n, k).

        Differentiable. Missing names count as zeros. The dtype is the widest of those given.

        Raises:
            InputError: an unknown name, or a shape that is neither.
        """
        unknown = [n for n in tree if n not in self.names]
        if unknown:
            raise InputError(f"No tensor named {unknown[0]!r} in this layout.")
        if not tree:
            raise InputError("Nothing to flatten: the dict is empty.")
        widths = {t.shape[0] for n, t in tree.items() if t.ndim == len(self.shapes[self.names.index(n)]) + 1}
        first = next(iter(tree.values()))
        dtype = _real_dtype([t.dtype for t in tree.values()])
        if len(widths) > 1:
            raise InputError(f"Blocks of different widths {sorted(widths)} cannot be flattened together.")
        k = next(iter(widths)) if widths else None
        parts = []
        for i, name in enumerate(self.names):
            shape = self.shapes[i] if k is None else torch.Size((k, *self.shapes[i]))
            lead = () if k is None else (k,)
            if name not in tree:
                parts.append(torch.zeros((*lead, self.offsets[i + 1] - self.offsets[i]), dtype=dtype, device=first.device))
                continue
            t = tree[name]
            if t.shape != shape:
                raise InputError(f"Tensor {name!r} has shape {tuple(t.shape)}, expected {tuple(shape)}.")
            t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
            parts.append(t.reshape(*lead, self.offsets[i + 1] - self.offsets[i]).to(dtype))
        flat = torch.cat(parts, -1)
        return flat if k is None else flat.T

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut (n,) into tensors of these shapes, or columns (n, k) into tensors (k, *shape); dtypes as in the layout. Differentiable."""
        if flat.ndim not in (1, 2) or flat.shape[0] != self.size:
            raise InputError(f"Expected a vector ({self.size},) or a block ({self.size}, k), got {tuple(flat.shape)}.")
        rows = flat if flat.ndim == 1 else flat.T
        lead = rows.shape[:-1]
        out = {}
        for i, name in enumerate(self.names):
            part = rows[..., self.offsets[i] : self.offsets[i + 1]].reshape((*lead, *self._real_shape(i)))
            if self.dtypes[i].is_complex:
                part = torch.view_as_complex(part.to(self.dtypes[i].to_real()).contiguous())
            out[name] = part.to(self.dtypes[i])
        return out

    def _real_shape(self, i: int) -> tuple[int, ...]:
        return (*self.shapes[i], 2) if self.dtypes[i].is_complex else tuple(self.shapes[i])


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """Flatten a dict of float tensors to one real vector (n,)."""
    return Layout.of(tree).flatten(tree)


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a vector (n,) or a block of columns (n, k) into tensors shaped as those of ``like`` (with a leading k for a block)."""
    return Layout.of(like).unflatten(flat)


def _real_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    out = torch.float16 if all(d in (torch.float16, torch.complex32) for d in dtypes) else None
    for d in dtypes:
        real = d.to_real() if d.is_complex else d
        out = real if out is None else torch.promote_types(out, real)
    return out or torch.get_default_dtype()


# ------------------------------------------------------------------------------------------------------------- a function made real


class _Problem:
    """A function of a dict of parameters, seen as one of a tuple of real leaf tensors, with its own copy of their values."""

    def __init__(self, fn: Callable[[dict[str, Tensor]], Any], params: Params, what: str) -> None:
        if not callable(fn):
            raise InputError(f"{what} needs a function (params, batch) -> output, got {type(fn).__name__}.")
        if not isinstance(params, Mapping):
            raise InputError(
                f"{what} needs a dict of name to tensor, got {type(params).__name__}; core.functional makes one from a module."
            )
        self.layout = Layout.of(params)
        if self.layout.size == 0:
            raise InputError(f"{what} has nothing to differentiate: the parameter dict holds no entries.")
        devices = {t.device for t in params.values()}
        if len(devices) > 1:
            raise InputError(f"The parameters are on several devices ({', '.join(map(str, devices))}): move them to one.")
        self.device = devices.pop()
        if self.device.type == "meta":
            raise InputError("The parameters are on the meta device and have no values: load the weights first.")
        for name, t in params.items():
            bad = int((~torch.isfinite(t.detach())).sum())
            if bad:
                raise InputError(f"Parameter {name!r} has {bad} non-finite entries of {t.numel()}: load an earlier checkpoint.")
        self.fn = fn
        self.dtype = _real_dtype(list(self.layout.dtypes))
        with torch.inference_mode(False), torch.no_grad():
            self.point: Tensors = tuple(_real(t.detach().clone(memory_format=torch.contiguous_format)) for t in params.values())

    def dict(self, leaves: Tensors) -> dict[str, Tensor]:
        """Build the dict that the function takes from real leaves."""
        pairs = zip(self.layout.names, leaves, self.layout.dtypes, strict=True)
        return {n: torch.view_as_complex(t) if d.is_complex else t for n, t, d in pairs}

    def __call__(self, *leaves: Tensor) -> Tensors:
        return float_outputs(self.fn(self.dict(leaves)))

    def scalar(self, *leaves: Tensor) -> Tensor:
        out = self(*leaves)
        if len(out) != 1 or out[0].numel() != 1:
            raise InputError(f"The loss must be one number, got {_shapes(out)}: reduce it (mean or sum) in the function.")
        return out[0].reshape(())

    def split(self, flat: Tensor) -> Tensors:
        """(n,) -> real leaves; (n, k) -> real leaves with a leading k."""
        rows = flat if flat.ndim == 1 else flat.T
        lead = rows.shape[:-1]
        cut = zip(self.point, self.layout.offsets, self.layout.offsets[1:], strict=False)
        return tuple(rows[..., a:b].reshape((*lead, *p.shape)).to(p.dtype) for p, a, b in cut)

    def leaves(self) -> Tensors:
        """Fresh leaves with gradients on, over this problem's own memory."""
        return tuple(p.detach().requires_grad_() for p in self.point)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()).contiguous() if t.is_complex() else t


def _join(parts: Tensors, dtype: torch.dtype, block: bool = False) -> Tensor:
    """Flatten tensors to (n,), or tensors with a leading k to columns (n, k)."""
    if block:
        return torch.cat([p.reshape(p.shape[0], -1).to(dtype) for p in parts], 1).T
    return torch.cat([p.reshape(-1).to(dtype) for p in parts])


def _shapes(out: Tensors) -> str:
    return ", ".join(str(tuple(t.shape)) for t in out)


@contextlib.contextmanager
def _measuring(rng: bool = True) -> Iterator[None]:
    """Gradients on, inference mode off, kernels that can be differentiated twice, random state restored, vmap's speed hints silent."""
    with contextlib.ExitStack() as stack:
        if rng:
            stack.enter_context(rng_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(math_attention())
        stack.enter_context(no_checkpointing())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        warnings.filterwarnings("ignore", message=".*no longer supported as of.*")
        yield


def _reason(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0][:200]}" if text else type(e).__name__


def _raise_if_memory(e: BaseException) -> None:
    if isinstance(e, MemoryError | torch.OutOfMemoryError):
        raise e


def _direction(f: Callable[..., Tensors], at: Tensors, along: Tensors, step: float) -> Tensors:
    """Central difference of ``f`` along a direction, whose length matters: (f(at + h u) - f(at - h u)) |along| / 2h with unit u."""
    length = torch.sqrt(torch.stack([(t.double() ** 2).sum() for t in along]).sum()).item()
    if length == 0:
        return tuple(torch.zeros_like(y) for y in f(*at))
    h = step / length
    up = f(*(p + h * t for p, t in zip(at, along, strict=True)))
    down = f(*(p - h * t for p, t in zip(at, along, strict=True)))
    return tuple((a - b) / (2 * h) for a, b in zip(up, down, strict=True))


def _nodes(outputs: Tensors) -> Iterator[Node]:
    """Yield every node of the autograd graph behind the outputs."""
    stack = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _refuse_once_only(gradients: Tensors) -> None:
    """Refuse a gradient with a part that may not be differentiated again; torch.autograd.grad would leave that part out in silence."""
    if any(node.name() == "torch::autograd::Error" for node in _nodes(gradients)):
        raise NotImplementedError("a backward pass in the graph is marked once_differentiable, and its second derivative would be left out")


_UNSETTLED = 0.1


def _refuse_unsettled(error: float | None) -> None:
    if error is not None and not error <= _UNSETTLED:
        raise ArithmeticError(f"central differences do not settle (best relative error {error:.1e}): kinks or low precision; use float64")


def _relative(a: Tensor, b: Tensor) -> float:
    size = max(float(a.double().norm()), float(b.double().norm()))
    return float((a - b).double().norm()) / size if size > 0 else 0.0


def _tolerance(dtype: torch.dtype) -> float:
    """Difference between an exact derivative and a central difference that is nobody's fault."""
    return 1e-5 if dtype == torch.float64 else 1e-2


def _choose_step(f: Callable[..., Tensors], at: Tensors) -> tuple[float, float]:
    """Choose the distance for central differences where two successive distances agree best along a random direction.

    Returns:
        the distance, and the relative disagreement there: the error to expect of a product.
    """
    gen = torch.Generator().manual_seed(0)
    along = tuple(torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p) for p in at)
    eps = max(torch.finfo(p.dtype).eps for p in at)
    norm = torch.sqrt(torch.stack([(p.double() ** 2).sum() for p in at]).sum()).item() or 1.0
    best, previous = (eps ** (1 / 3) * norm, float("inf")), None
    for j in range(5):
        step = 4.0 * eps ** (1 / 3) * norm * 0.2**j
        now = _direction(f, at, along, step)
        if previous is not None:
            size = sum(float((x.double() ** 2).sum()) for x in now) ** 0.5
            gap = sum(float(((x - y).double() ** 2).sum()) for x, y in zip(now, previous, strict=True)) ** 0.5
            gap = gap / size if size > 0 else gap
            if gap < best[1]:
                best = (step, gap)
        previous = now
    return best


# ----------------------------------------------------------------------------------------------------------------------- operators


class LinearOperator(ABC):
    """A matrix known by its products. ``op @ x`` takes a tensor (n,) or a block of columns (n, k), in the order of `Layout`.

    The operator holds its own copy of the parameters: training on does not change it. Inputs are cast to its dtype and device.

    Attributes:
        shape: (rows, columns).
        dtype, device: of the products; the widest real type among the parameters.
        layout: positions of the parameters in a flat vector.
        backend: what computes ``op @ x``.
        tried: (back end, reason) for every one that failed before it.
        counts: how often each kind of work was done: loss, forward, grad, hvp, jvp, vjp (one for each vector).
        residual: for central differences, the relative error to expect of a product; None for exact derivatives.
    """

    def __init__(self, shape: tuple[int, int], problem: _Problem) -> None:
        self.shape = shape
        self.layout = problem.layout
        self.dtype = problem.dtype
        self.device = problem.device
        self.backend = ""
        self.tried: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.residual: float | None = None
        self._batched = {"pull": True, "push": True}

    @abstractmethod
    def _matmat(self, x: Tensor) -> Tensor:
        """(n, k) -> (m, k)."""

    @abstractmethod
    def _rmatmat(self, y: Tensor) -> Tensor:
        """(m, k) -> (n, k)."""

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply. Raises InputError when ``x`` is no tensor (n,) or (n, k) of finite numbers."""
        return _product(self._matmat, x, self.shape[1], self)

    @property
    def T(self) -> LinearOperator:
        """The transposed operator, sharing this one's back end and counts."""
        return _Transposed(self)

    def dense(self) -> Tensor:
        """Return the matrix (rows, columns), from products with the identity on its shorter side."""
        rows, cols = self.shape
        if cols <= rows or self.T is self:
            return self @ torch.eye(cols, dtype=self.dtype, device=self.device)
        return (self.T @ torch.eye(rows, dtype=self.dtype, device=self.device)).T

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return a SciPy operator over float32 or float64 arrays; wrap SciPy calls in `parasym.core.guards.blas_threads`."""
        wide = self.dtype == torch.float64
        np_dtype = np.float64 if wide else np.float32

        def through(op: LinearOperator) -> Callable[[np.ndarray], np.ndarray]:
            def call(a: np.ndarray) -> np.ndarray:
                x = torch.from_numpy(np.array(a, dtype=np_dtype, order="C", copy=True))
                y = op @ (x.reshape(-1) if x.ndim == 2 and a.ndim == 1 else x)
                return y.detach().to("cpu", torch.float64 if wide else torch.float32).numpy()

            return call

        forward, backward = through(self), through(self.T)
        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=np_dtype
        )

    def __repr__(self) -> str:
        exact = "" if self.residual is None else f", residual={self.residual:.1e}"
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]}, {str(self.dtype).removeprefix('torch.')}, {self.backend}{exact})"


class _Transposed(LinearOperator):
    def __init__(self, base: LinearOperator) -> None:
        self._base = base
        self.shape = (base.shape[1], base.shape[0])
        self.layout, self.dtype, self.device = base.layout, base.dtype, base.device
        self.tried, self.counts = base.tried, base.counts

    def __getattr__(self, name: str) -> Any:
        if name in ("backend", "residual"):
            return getattr(self._base, name)
        raise AttributeError(name)

    def _matmat(self, x: Tensor) -> Tensor:
        return self._base._rmatmat(x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._base._matmat(y)

    @property
    def T(self) -> LinearOperator:
        return self._base

    def __repr__(self) -> str:
        return f"{self._base!r}.T"


def _product(run: Callable[[Tensor], Tensor], x: Tensor, n: int, op: LinearOperator) -> Tensor:
    if not isinstance(x, Tensor):
        raise InputError(f"Multiply by a torch tensor, got {type(x).__name__}; to_scipy() works on arrays.")
    if x.ndim not in (1, 2) or x.shape[0] != n:
        raise InputError(f"{op!r} takes a vector ({n},) or a block ({n}, k), got {tuple(x.shape)}.")
    if x.is_complex():
        raise InputError("Multiply by a real tensor; a complex entry of a parameter counts as two real ones.")
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"The vector has {int((~torch.isfinite(x)).sum())} non-finite entries of {x.numel()}.")
    x = x.detach().to(op.device, op.dtype)
    if x.ndim == 1:
        return run(x[:, None])[:, 0]
    return run(x) if x.shape[1] else x.new_zeros(op.shape[0] if op.shape[1] == n else op.shape[1], 0)


class HessianOperator(LinearOperator):
    """Hessian (n, n) of a loss: second derivatives with respect to every entry of ``params``.

    Back ends, tried in this order:

    1. ``reverse-over-reverse``: the graph of the gradient is kept, a product is one backward pass through it (about 2 gradients).
       Keeps the activations of a forward and a backward pass alive as long as the operator lives.
    2. ``forward-over-reverse``: ``jvp(grad(loss))``, a fresh evaluation for every product.
    3. ``central difference`` of gradients; ``residual`` is the relative error to expect.

    Args:
        fn: ``fn(params, batch)`` -> loss, one number.
        params: name -> float tensor. Only these are differentiated; hold others fixed inside ``fn``.
        batch: handed to ``fn`` as it is.
        backend: one of the names above, or "auto".
        chunk: vectors of a block pushed through together.
        check: evaluate the gradient twice and refuse when it differs.

    Attributes:
        loss: value at the point. gradient: (n,) at the point.
        backend_block: what computed the last large block, when that was not ``backend``; under "auto" a block goes through
            forward-over-reverse where an operator (GroupNorm) cannot be batched on the kept graph.

    Raises:
        InputError: bad parameters, a loss that is not one finite number or has a non-finite gradient, or no back end works.
        NonDeterministicError: two gradients on the same batch differ.
    """

    def __init__(
        self,
        fn: Callable[[dict[str, Tensor], Any], Any],
        params: Params,
        batch: Any = None,
        *,
        backend: Backend = "auto",
        chunk: int = 16,
        check: bool = True,
    ) -> None:
        if backend not in ("auto", "reverse-over-reverse", "forward-over-reverse", "central difference"):
            raise InputError(f"Unknown back end {backend!r}: auto, reverse-over-reverse, forward-over-reverse or central difference.")
        self._problem = problem = _Problem(_bind(fn, batch), params, "HessianOperator")
        super().__init__((problem.layout.size, problem.layout.size), problem)
        self._chunk = _chunk(chunk)
        self._graph: tuple[Tensors, Tensors] | None = None
        self._step = 0.0
        self.backend_block = ""
        with _measuring():
            self.gradient, self.loss = self._gradient_at_point()
            if check:
                _compare_gradients(self.gradient, lambda: self._gradient_at_point()[0], fn)
        options = ("reverse-over-reverse", "forward-over-reverse", "central difference") if backend == "auto" else (backend,)
        self._multiply = self._choose(options)
        self._auto = backend == "auto"

    @property
    def T(self) -> LinearOperator:
        """The Hessian is symmetric."""
        return self

    def _gradient_at_point(self) -> tuple[Tensor, Tensor]:
        leaves = self._problem.leaves()
        loss = self._problem.scalar(*leaves)
        self.counts["grad"] += 1
        self._custom = sorted({n.name().removesuffix("Backward") for n in _nodes((loss,)) if isinstance(n, BackwardCFunction)})
        if not loss.requires_grad:
            raise InputError(
                "The loss does not depend on the parameters given: "
                "its graph is cut (detach, item, argmax), or it reads tensors outside the dict."
            )
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        _check_gradient(loss, grads, self.layout)
        return _join(grads, self.dtype), loss.detach()

    def _choose(self, options: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
        table = {
            "reverse-over-reverse": self._reverse,
            "forward-over-reverse": self._forward,
            "central difference": self._difference,
        }
        gen = torch.Generator().manual_seed(0)
        probe = torch.randn(self.shape[1], 1, generator=gen, dtype=torch.float64).to(self.device, self.dtype)
        for name in options:
            try:
                y = table[name](probe)
                if not bool(torch.isfinite(y).all()):
                    raise ArithmeticError("the product with a random vector is not finite")
                if name == "central difference":
                    _refuse_unsettled(self.residual)
                elif self._custom:
                    self._verify(probe, y)
            except Exception as e:
                _raise_if_memory(e)
                self.tried.append((name, _reason(e)))
                self._graph = None
                log.debug("Hessian back end %s failed: %s", name, _reason(e))
                last = e
                continue
            self.backend = name
            return table[name]
        raise InputError(f"No Hessian-vector product works: {'; '.join(f'{n} ({r})' for n, r in self.tried)}.") from last

    def _verify(self, probe: Tensor, y: Tensor) -> None:
        """Refuse a product that a central difference contradicts: second derivatives of a custom autograd function may be silently lost."""
        near = self._difference(probe)
        expected, self.residual = self.residual or 0.0, None
        _refuse_unsettled(expected)
        gap = _relative(y, near)
        if gap > max(10 * expected, _tolerance(self.dtype)):
            raise ArithmeticError(f"differs by {gap:.1e} from a central difference (custom autograd function {', '.join(self._custom)})")

    def _matmat(self, x: Tensor) -> Tensor:
        block = x.shape[1] > 3 and self._auto and self.backend == "reverse-over-reverse"
        if block and not self._batched["pull"] and self._batched["push"]:  # GroupNorm: the kept graph takes no blocks, forward mode does
            before = len(self.tried)
            try:
                y = self._forward(x)
                if self._batched["push"]:
                    self.backend_block = "forward-over-reverse"
                    return y
            except Exception as e:
                _raise_if_memory(e)
                self._batched["push"] = False
                del self.tried[before:]
                self.tried.append(("forward-over-reverse of a block", _reason(e)))
        return self._multiply(x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matmat(y)

    def _reverse(self, x: Tensor) -> Tensor:
        with _measuring(rng=self._graph is None):
            if self._graph is None:
                leaves = self._problem.leaves()
                self.counts["grad"] += 1
                grads = torch.autograd.grad(
                    self._problem.scalar(*leaves), leaves, create_graph=True, allow_unused=True, materialize_grads=True
                )
                _refuse_once_only(grads)
                self._graph = leaves, grads
            leaves, grads = self._graph
            return _pull(self, grads, leaves, x, self._problem.split, "hvp")

    def _forward(self, x: Tensor) -> Tensor:
        leaves = tuple(p.detach() for p in self._problem.point)
        g = grad(self._problem.scalar, argnums=tuple(range(len(leaves))))

        def push(*tangents: Tensor) -> Tensors:
            out: Tensors = jvp(g, leaves, tangents)[1]
            return out

        with _measuring():
            return _push(self, push, self._problem.split(x), "hvp")

    def _difference(self, x: Tensor) -> Tensor:
        problem = self._problem

        def gradient(*leaves: Tensor) -> Tensors:
            leaves = tuple(p.detach().requires_grad_() for p in leaves)
            self.counts["grad"] += 1
            return torch.autograd.grad(problem.scalar(*leaves), leaves, allow_unused=True, materialize_grads=True)

        with _measuring():
            if self.residual is None:
                self._step, self.residual = _choose_step(gradient, problem.point)
            self.counts["hvp"] += x.shape[1]
            columns = [_join(_direction(gradient, problem.point, problem.split(v), self._step), self.dtype) for v in x.T]
            return torch.stack(columns, 1).detach()


class JacobianOperator(LinearOperator):
    """Jacobian (m, n) of a function's outputs, flattened and joined in order, with respect to every entry of ``params``.

    ``J @ v`` is forward mode (``backend``: ``forward``), else two reverse passes (``reverse-over-reverse``), else ``central
    difference``. ``J.T @ u`` is one backward pass through a kept graph (``backend_T``: ``reverse``), else ``forward`` mode, which needs
    n passes. Forward and reverse disagree on purpose at an embedding's ``padding_idx``: reverse mode zeroes that row's gradient.

    Args:
        fn: ``fn(params, batch)`` -> tensor or nest of tensors.
        params, batch, chunk: as for `HessianOperator`.
        check: evaluate the outputs twice and refuse when they differ.

    Attributes:
        outputs: tuple of tensors at the point. backend_T: what computes ``J.T @ u``.

    Raises:
        InputError: bad parameters, no floating output, non-finite outputs, or no back end works.
        NonDeterministicError: two evaluations on the same batch differ.
    """

    def __init__(
        self, fn: Callable[[dict[str, Tensor], Any], Any], params: Params, batch: Any = None, *, chunk: int = 16, check: bool = True
    ) -> None:
        self._problem = problem = _Problem(_bind(fn, batch), params, "JacobianOperator")
        self._chunk = _chunk(chunk)
        counts: Counter[str] = Counter()
        self.outputs = _evaluate(problem, fn, check, counts)
        super().__init__((sum(y.numel() for y in self.outputs), problem.layout.size), problem)
        self.dtype = _real_dtype([self.dtype, *(y.dtype for y in self.outputs)])
        self.counts = counts
        self.backend_T = ""
        self._graph: tuple[Tensors, Tensors] | None = None
        self._double: tuple[Tensors, Tensors] | None = None
        self._step = 0.0
        self._transposed: Callable[[Tensor], Tensor] | None = None
        self._multiply: Callable[[Tensor], Tensor] | None = None
        self._prepare()

    def _prepare(self) -> None:
        gen = torch.Generator().manual_seed(0)

        def first(options: Mapping[str, Callable[[Tensor], Tensor]], n: int) -> tuple[str, Callable[[Tensor], Tensor]]:
            probe = torch.randn(n, 1, generator=gen, dtype=torch.float64).to(self.device, self.dtype)
            for name, run in options.items():
                try:
                    if not bool(torch.isfinite(run(probe)).all()):
                        raise ArithmeticError("the product with a random vector is not finite")
                    if name == "central difference":
                        _refuse_unsettled(self.residual)
                except Exception as e:
                    _raise_if_memory(e)
                    self.tried.append((name, _reason(e)))
                    log.debug("Jacobian back end %s failed: %s", name, _reason(e))
                    last = e
                    continue
                return name, run
            raise InputError(f"No product with the Jacobian works: {'; '.join(f'{n} ({r})' for n, r in self.tried)}.") from last

        ways = {"forward": self._forward, "reverse-over-reverse": self._reverse_twice, "central difference": self._difference}
        self.backend, self._multiply = first(ways, self.shape[1])
        self.backend_T, self._transposed = first({"reverse": self._reverse, self.backend: self._by_columns}, self.shape[0])

    def _matmat(self, x: Tensor) -> Tensor:
        assert self._multiply is not None
        return self._multiply(x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        assert self._transposed is not None
        return self._transposed(y)

    def _split_outputs(self, flat: Tensor) -> Tensors:
        rows = flat if flat.ndim == 1 else flat.T
        at, parts = 0, []
        for y in self.outputs:
            parts.append(rows[..., at : at + y.numel()].reshape((*rows.shape[:-1], *y.shape)).to(y.dtype))
            at += y.numel()
        return tuple(parts)

    def _forward(self, x: Tensor) -> Tensor:
        leaves = self._problem.point

        def push(*tangents: Tensor) -> Tensors:
            out: Tensors = jvp(self._problem.__call__, leaves, tangents)[1]
            return out

        with _measuring():
            return _push(self, push, self._problem.split(x), "jvp")

    def _record(self) -> tuple[Tensors, Tensors]:
        if self._graph is None:
            leaves = self._problem.leaves()
            self.counts["forward"] += 1
            with rng_state():
                self._graph = leaves, self._problem(*leaves)
        return self._graph

    def _reverse(self, y: Tensor) -> Tensor:
        with _measuring(rng=False):
            leaves, outputs = self._record()
            return _pull(self, outputs, leaves, y, self._split_outputs, "vjp")

    def _reverse_twice(self, x: Tensor) -> Tensor:
        """J v is the derivative with respect to u of the (linear) J^T u, along v."""
        with _measuring(rng=False):
            if self._double is None:
                leaves, outputs = self._record()
                dummies = tuple(torch.zeros_like(y, requires_grad=True) for y in outputs)
                pairs = [(y, u) for y, u in zip(outputs, dummies, strict=True) if y.requires_grad]
                pulled = torch.autograd.grad(
                    [y for y, _ in pairs], leaves, [u for _, u in pairs], create_graph=True, allow_unused=True, materialize_grads=True
                )
                _refuse_once_only(pulled)
                self._double = dummies, pulled
            dummies, pulled = self._double
            return _pull(self, pulled, dummies, x, self._problem.split, "jvp")

    def _difference(self, x: Tensor) -> Tensor:
        def forward(*leaves: Tensor) -> Tensors:
            self.counts["forward"] += 1
            with torch.no_grad():
                return self._problem(*leaves)

        with _measuring():
            if self.residual is None:
                self._step, self.residual = _choose_step(forward, self._problem.point)
            self.counts["jvp"] += x.shape[1]
            columns = [_join(_direction(forward, self._problem.point, self._problem.split(v), self._step), self.dtype) for v in x.T]
            return torch.stack(columns, 1)

    def _by_columns(self, y: Tensor) -> Tensor:
        out = torch.zeros(self.shape[1], y.shape[1], dtype=self.dtype, device=self.device)
        for a in range(0, self.shape[1], self._chunk):
            b = min(a + self._chunk, self.shape[1])
            basis = torch.zeros(self.shape[1], b - a, dtype=self.dtype, device=self.device)
            basis[range(a, b), range(b - a)] = 1
            out[a:b] = self._matmat(basis).T @ y
        return out


class GGNOperator(LinearOperator):
    """Generalised Gauss-Newton matrix (n, n): J^T H J, with J the Jacobian of the outputs and H the Hessian of the loss in the outputs.

    For a negative log likelihood whose outputs are natural parameters this is the Fisher matrix. Positive semi-definite when the loss
    is convex in the outputs.

    Args:
        fn: ``fn(params, batch)`` -> tensor, or nest of tensors.
        params, batch, chunk, check: as for `JacobianOperator`.
        loss: ``loss(outputs, batch)`` -> one number; ``outputs`` is the tensor when ``fn`` gives one, else the tuple.

    Attributes:
        jacobian: the `JacobianOperator` inside. curvature: the `HessianOperator` (m, m) of the loss in the outputs.

    Raises:
        InputError, NonDeterministicError: as for the two operators.
    """

    def __init__(
        self,
        fn: Callable[[dict[str, Tensor], Any], Any],
        params: Params,
        batch: Any = None,
        *,
        loss: Callable[[Any, Any], Tensor],
        chunk: int = 16,
        check: bool = True,
    ) -> None:
        self.jacobian = JacobianOperator(fn, params, batch, chunk=chunk, check=check)
        outputs = {f"output {i}": y for i, y in enumerate(self.jacobian.outputs)}

        def of_outputs(ys: dict[str, Tensor], batch: Any) -> Tensor:
            values = tuple(ys.values())
            return loss(values[0] if len(values) == 1 else values, batch)

        self.curvature = HessianOperator(of_outputs, outputs, batch, chunk=chunk, check=check)
        super().__init__((self.jacobian.shape[1], self.jacobian.shape[1]), self.jacobian._problem)
        self.dtype = self.jacobian.dtype
        self.tried = self.jacobian.tried + self.curvature.tried
        self.backend = f"{self.jacobian.backend_T} * {self.curvature.backend} * {self.jacobian.backend}"
        errors = [r for r in (self.jacobian.residual, self.curvature.residual) if r is not None]
        self.residual = max(errors) if errors else None

    @property
    def T(self) -> LinearOperator:
        """The matrix is symmetric."""
        return self

    def _matmat(self, x: Tensor) -> Tensor:
        self.counts["ggn"] += x.shape[1]
        return self.jacobian._rmatmat(self.curvature._matmat(self.jacobian._matmat(x).to(self.curvature.dtype)).to(self.dtype))

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matmat(y)


def consistency(op: LinearOperator, *, seed: int = 0) -> Estimate:
    """Compare u . (A v) with (A^T u) . v for random vectors: the relative difference, near machine precision for a correct operator.

    A large value means that forward and reverse derivatives disagree (custom operators, ``padding_idx``), or that a Hessian is not
    symmetric because a backward pass was not differentiable as written. It does not see an error that both share (``detach``): for
    that see the ``residual`` of `dense_jacobian` and `derivative_error`.

    Returns:
        value = the relative difference; status ``violated`` above the square root of the dtype's epsilon.
    """
    gen = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, generator=gen, dtype=torch.float64).to(op.device, op.dtype) for n in op.shape)
    av, au = op @ v, op.T @ u
    scale = float(u.double().norm() * av.double().norm() + au.double().norm() * v.double().norm()) / 2
    gap = abs(float(u.double() @ av.double()) - float(au.double() @ v.double()))
    value = gap / scale if scale > 0 else 0.0
    limit = max(torch.finfo(op.dtype).eps ** 0.5, 10 * (op.residual or 0.0))
    if value <= limit:
        return Estimate(value, residual=value)
    return Estimate(value, residual=value, status="violated", note=f"limit {limit:.1e}: forward and reverse derivatives disagree")


def derivative_error(op: HessianOperator | JacobianOperator, *, seed: int = 0) -> Estimate:
    """Compare derivatives with central differences: finds ``detach``, straight-through and wrong custom derivatives.

    For a Jacobian, ``J @ v`` for one random v. For a Hessian, ``H @ v`` against differences of the gradient, and the gradient against
    differences of the loss along itself plus a random direction; the larger of the two.

    Returns:
        value = relative difference; ``stderr`` = the error to expect of the difference itself; status ``violated`` when the first
        exceeds ten times the second and 1e-2 in float32, 1e-5 in float64. A kink (ReLU, max) within the step raises both.
        ``not_converged`` when no step gave a difference stable to 0.1, as happens for ReLU networks in float32.
    """
    gen = torch.Generator().manual_seed(seed + 1)
    v = torch.randn(op.shape[1], generator=gen, dtype=torch.float64).to(op.device, op.dtype)
    exact = op @ v
    before = (op.residual, op._step)
    try:
        op.residual = None
        near = op._difference(v[:, None])[:, 0]
        expected = float(op.residual or 0.0)
    finally:
        op.residual, op._step = before
    pairs = [(_relative(exact, near), expected)]
    if isinstance(op, HessianOperator) and float(op.gradient.norm()) > 0:
        problem = op._problem
        along = op.gradient / op.gradient.norm() + v / v.norm()

        def loss(*leaves: Tensor) -> Tensors:
            op.counts["loss"] += 1
            with torch.no_grad():
                return (problem.scalar(*leaves),)

        with _measuring():
            step, expected = _choose_step(loss, problem.point)
            (slope,) = _direction(loss, problem.point, problem.split(along), step)
        pairs.append((_relative(op.gradient @ along, slope), expected))
    value, expected = max(pairs, key=lambda p: math.inf if not p[1] <= _UNSETTLED else p[0] / max(10 * p[1], _tolerance(op.dtype)))
    limit = max(10 * expected, _tolerance(op.dtype))
    if not expected <= _UNSETTLED:
        note = f"central differences did not settle at any distance (best relative error {expected:.1e}): try float64"
        return Estimate(value, status="not_converged", note=note)
    if value <= limit:
        return Estimate(value, stderr=expected)
    return Estimate(value, stderr=expected, status="violated", note=f"limit {limit:.1e}: the derivative is not that of the function")


# ------------------------------------------------------------------------------------------------------------------ dense Jacobian


@dataclass(frozen=True, eq=False)
class DenseJacobian:
    """A Jacobian as a matrix, and how it was computed.

    Attributes:
        matrix: (m, n) outputs by parameters, flattened as `Layout` says.
        layout: positions of the parameters in the columns.
        outputs: the function's outputs at the point, tuple of tensors.
        backend: ``forward (vmap)``, ``forward``, ``reverse`` or ``central difference``.
        tried: (back end, reason) for every one that failed before.
        residual: relative difference between the matrix and a central difference along one random direction. Near 1e-9 in float64 and
            1e-3 in float32 for a smooth function; of order one when the derivative is not that of the function (``detach``,
            straight-through estimators, a custom backward, ``padding_idx`` in reverse mode).
        residual_expected: error to expect of that central difference by itself.
        counts: forward evaluations, forward-mode (jvp) and reverse-mode (vjp) passes, one for each vector.
    """

    matrix: Tensor
    layout: Layout
    outputs: Tensors
    backend: str
    tried: tuple[tuple[str, str], ...]
    residual: float
    residual_expected: float
    counts: Mapping[str, int] = field(default_factory=dict)


def dense_jacobian(
    fn: Callable[[dict[str, Tensor]], Any], params: Params, chunk: int = 64, *, check: bool = True, backend: str = "auto"
) -> DenseJacobian:
    """Compute the Jacobian of a function's outputs with respect to every entry of ``params``.

    Forward mode, ``chunk`` parameters together; one at a time where an operator has no batching rule; reverse mode, one output at a
    time, where one has no forward derivative; central differences where it has neither. Forward comes first even for few outputs,
    because it is right where reverse mode zeroes a gradient (``padding_idx``).

    Args:
        fn: ``fn(params)`` -> tensor or nest of tensors.
        params: name -> float tensor; give float64 for anything whose rank matters.
        chunk: memory grows with it: about ``chunk`` times the activations of a forward pass, and m x n numbers for the result.
        check: evaluate twice and refuse when the results differ.
        backend: "auto", or one of the four names in `DenseJacobian` to force it.

    Raises:
        InputError: bad parameters, no floating output, non-finite outputs, unknown back end, or none works.
        NonDeterministicError: two evaluations differ.
    """
    problem = _Problem(fn, params, "dense_jacobian")
    chunk = _chunk(chunk)
    counts: Counter[str] = Counter()
    outputs = _evaluate(problem, fn, check, counts)
    m, n = sum(y.numel() for y in outputs), problem.layout.size
    dtype = _real_dtype([problem.dtype, *(y.dtype for y in outputs)])
    new = torch.zeros(m, n, dtype=dtype, device=problem.device)

    def push(*tangents: Tensor) -> Tensors:
        out: Tensors = jvp(problem.__call__, problem.point, tangents)[1]
        return out

    def basis(a: int, b: int) -> Tensors:
        rows = torch.zeros(n, b - a, dtype=problem.dtype, device=problem.device)
        rows[range(a, b), range(b - a)] = 1
        return problem.split(rows)

    def forward_vmap() -> Tensor:
        out = new.clone()
        for a in range(0, n, chunk):
            b = min(a + chunk, n)
            out[:, a:b] = _join(vmap(push)(*basis(a, b)), dtype, block=True)
            counts["jvp"] += b - a
        return out

    def forward() -> Tensor:
        out = new.clone()
        for i in range(n):
            out[:, i] = _join(push(*(t[0] for t in basis(i, i + 1))), dtype)
            counts["jvp"] += 1
        return out

    def reverse() -> Tensor:
        out = new.clone()
        leaves = problem.leaves()
        counts["forward"] += 1
        row = 0
        for y in problem(*leaves):
            for entry in y.reshape(-1):
                if y.requires_grad:
                    counts["vjp"] += 1
                    grads = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
                    out[row] = _join(grads, dtype)
                row += 1
        return out

    def evaluate(*leaves: Tensor) -> Tensors:
        counts["forward"] += 1
        with torch.no_grad():
            return problem(*leaves)

    with _measuring():
        step, expected = _choose_step(evaluate, problem.point)

    def differences() -> Tensor:
        out = new.clone()
        size = sum(p.numel() for p in problem.point) ** 0.5
        for i in range(n):
            out[:, i] = _join(_direction(evaluate, problem.point, tuple(t[0] for t in basis(i, i + 1)), step / size), dtype)
        return out

    ways = {"forward (vmap)": forward_vmap, "forward": forward, "reverse": reverse, "central difference": differences}
    if backend != "auto" and backend not in ways:
        raise InputError(f"Unknown back end {backend!r}: auto, {', '.join(ways)}.")
    tried: list[tuple[str, str]] = []
    last: Exception | None = None
    for name, run in ways.items():
        if backend not in ("auto", name):
            continue
        try:
            with _measuring():
                if name == "central difference":
                    _refuse_unsettled(expected)
                matrix = run().detach()
            if not bool(torch.isfinite(matrix).all()):
                raise ArithmeticError(f"{int((~torch.isfinite(matrix)).sum())} entries are not finite")
        except Exception as e:
            _raise_if_memory(e)
            tried.append((name, _reason(e)))
            log.debug("dense Jacobian by %s failed: %s", name, _reason(e))
            last = e
            continue
        gen = torch.Generator().manual_seed(1)
        v = torch.randn(n, generator=gen, dtype=torch.float64).to(matrix)
        with _measuring():
            near = _join(_direction(evaluate, problem.point, problem.split(v), step), dtype)
        residual = _relative(matrix @ v, near)
        return DenseJacobian(matrix, problem.layout, outputs, name, tuple(tried), residual, expected, dict(counts))
    raise InputError(f"The Jacobian could not be computed: {'; '.join(f'{n} ({r})' for n, r in tried)}.") from last


# ------------------------------------------------------------------------------------------------------------------------- shared


class _Bound:
    """``fn`` with its batch, as a function of the parameters alone; keeps ``func`` so that a model inside can be found for messages."""

    def __init__(self, fn: Callable[[dict[str, Tensor], Any], Any], batch: Any) -> None:
        self.func, self.batch = fn, batch

    def __call__(self, params: dict[str, Tensor]) -> Any:
        return self.func(params, self.batch)


def _bind(fn: Callable[[dict[str, Tensor], Any], Any], batch: Any) -> Callable[[dict[str, Tensor]], Any]:
    if not callable(fn):
        raise InputError(f"Give a function (params, batch) -> output, got {type(fn).__name__}.")
    return _Bound(fn, batch)


def _chunk(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"chunk must be a positive integer, got {n!r}.")
    return n


def _evaluate(problem: _Problem, fn: Any, check: bool, counts: Counter[str]) -> Tensors:
    """Evaluate the outputs once or twice, refusing noise, empty and non-finite results."""

    def once() -> Tensors:
        counts["forward"] += 1
        return problem(*(p.detach() for p in problem.point))

    evaluation = _Named(once, fn)
    with _measuring(), torch.no_grad():
        outputs: Tensors = check_deterministic(evaluation, what="the function on the same batch") if check else once()
    for i, y in enumerate(outputs):
        bad = int((~torch.isfinite(y)).sum())
        if bad:
            raise InputError(f"Output {i} {tuple(y.shape)} has {bad} non-finite entries of {y.numel()}: check the batch and the masks.")
    if not sum(y.numel() for y in outputs):
        raise InputError(f"The outputs {_shapes(outputs)} hold no numbers: the batch is empty.")
    return tuple(y.detach() for y in outputs)


class _Named:
    """A call without arguments that remembers the user's function, where a model is looked for when a message has to name modules."""

    def __init__(self, call: Callable[[], Any], func: Any) -> None:
        self.call, self.func = call, func

    def __call__(self) -> Any:
        return self.call()


def _compare_gradients(first: Tensor, again: Callable[[], Tensor], fn: Any) -> None:
    try:
        torch.rand(7)  # another point of the random stream
        second = again()
    except InputError as e:
        raise NonDeterministicError(f"The gradient was finite once and not the second time on the same batch: {e}") from e
    values = iter((first, second))
    try:
        check_deterministic(_Named(lambda: next(values), None))
    except NonDeterministicError:
        check_deterministic(_Named(again, fn), what="the gradient on the same batch")
        raise


def _check_gradient(loss: Tensor, grads: Tensors, layout: Layout) -> None:
    if not bool(torch.isfinite(loss)):
        raise InputError(f"The loss is {loss.item()}: check the batch and the weights.")
    counts = ((n, int((~torch.isfinite(g)).sum()), g.numel()) for n, g in zip(layout.names, grads, strict=True))
    bad = [f"{n} ({k} of {size})" for n, k, size in counts if k]
    if bad:
        raise InputError(f"The gradient is not finite in {', '.join(bad[:4])}: a root, norm or logarithm at zero, or an overflow.")


def _pull(op: Any, outputs: Tensors, inputs: Tensors, x: Tensor, split: Callable[[Tensor], Tensors], what: str) -> Tensor:
    """Pull columns x (m, k) back through a kept graph to (n, k): batched where the operators allow it, one by one where not."""
    live = [i for i, y in enumerate(outputs) if y.requires_grad]
    op.counts[what] += x.shape[1]

    def back(cotangents: Tensors, batched: bool) -> Tensors:
        found: Tensors = torch.autograd.grad(
            [outputs[i] for i in live],
            inputs,
            [cotangents[i] for i in live],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=False,
            is_grads_batched=batched,
        )
        lead = (cotangents[0].shape[0],) if batched else ()
        pairs = zip(found, inputs, strict=True)
        return tuple(torch.zeros((*lead, *p.shape), dtype=p.dtype, device=p.device) if g is None else g for g, p in pairs)

    if not live:
        return torch.zeros(sum(p.numel() for p in inputs), x.shape[1], dtype=op.dtype, device=op.device)
    columns: list[Tensor] = []
    for a in range(0, x.shape[1], op._chunk):
        block = x[:, a : a + op._chunk]
        if op._batched["pull"] and block.shape[1] > 1:
            try:
                columns.append(_join(back(split(block), True), op.dtype, block=True))
                continue
            except Exception as e:
                _raise_if_memory(e)
                op._batched["pull"] = False
                op.tried.append((f"batched {what}", _reason(e)))
        columns += [_join(back(split(v), False), op.dtype)[:, None] for v in block.T]
    return torch.cat(columns, 1).detach()


def _push(op: Any, push: Callable[..., Tensors], tangents: Tensors, what: str) -> Tensor:
    """Push tangents with a leading k forward to columns (m, k): vmapped where the operators allow it, one by one where not."""
    k = tangents[0].shape[0]
    op.counts[what] += k
    columns: list[Tensor] = []
    for a in range(0, k, op._chunk):
        block = tuple(t[a : a + op._chunk] for t in tangents)
        width = block[0].shape[0]
        if op._batched["push"] and width > 1:
            try:
                columns.append(_join(vmap(push)(*block), op.dtype, block=True))
                continue
            except Exception as e:
                _raise_if_memory(e)
                op._batched["push"] = False
                op.tried.append((f"vmapped {what}", _reason(e)))
        columns += [_join(push(*(t[i] for t in block)), op.dtype)[:, None] for i in range(width)]
    return torch.cat(columns, 1).detach()
