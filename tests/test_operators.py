"""Every operator against a dense matrix from torch.func in float64, on networks that need different back ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from parasym.core.errors import InputError, NonDeterministicError
from parasym.core.functional import functional
from parasym.core.guards import blas_threads, math_attention
from parasym.core.operators import (
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    Layout,
    LinearOperator,
    consistency,
    dense_jacobian,
    derivative_error,
    flatten,
    unflatten,
)

RTOL = 1e-10


@dataclass
class Case:
    """A function of a dict, a loss of its outputs, a point and a batch."""

    fn: Callable[[dict[str, Tensor], Any], Any]
    loss: Callable[[Any, Any], Tensor]
    params: dict[str, Tensor]
    batch: Any

    def total(self, p: dict[str, Tensor], batch: Any) -> Tensor:
        out = self.fn(p, batch)
        return self.loss(out[0] if isinstance(out, tuple) and len(out) == 1 else out, batch)


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.conv(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        q, k, v = self.qkv(self.emb(ids)).view(b, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, 4)).mean(1)


def of_module(model: nn.Module, x: Tensor) -> Case:
    f = functional(model.double())
    y = torch.arange(len(x)) % 3
    return Case(lambda p, b: f(p, b[0])[0], lambda out, b: F.cross_entropy(out, b[1]), f.params, (x, y))


def mlp() -> Case:
    return of_module(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(7, 5).double())


def groupnorm() -> Case:
    return of_module(GroupNormNet(), torch.randn(4, 2, 5, 5).double())


def attention() -> Case:
    return of_module(Attention(), torch.randint(0, 7, (3, 4)))


def plain_dict() -> Case:
    params = {
        "a": torch.randn(3, 2).double(),
        "none": torch.zeros(0).double(),
        "b": torch.randn(()).double(),
        "unused": torch.ones(2).double(),
    }

    def fn(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(x @ p["a"]), p["b"] * p["a"].sum(0)

    return Case(fn, lambda out, x: out[0].pow(2).mean() + out[1].exp().sum(), params, torch.randn(4, 3).double())


def complex_dict() -> Case:
    params = {"z": torch.randn(3, dtype=torch.complex128), "w": torch.randn(3).double()}
    return Case(lambda p, x: p["z"] * p["z"] * p["w"], lambda out, x: out.pow(2).sum().sin(), params, None)


CASES = {c.__name__: c for c in (mlp, groupnorm, attention, plain_dict, complex_dict)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(3)
    return CASES[request.param]()


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def dense(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobian, Hessian and Gauss-Newton matrix by reverse-mode torch.func, one row at a time."""
    layout = Layout.of(case.params)
    v = layout.flatten(case.params)

    def outputs(v: Tensor) -> tuple[Tensor, ...]:
        out = case.fn(layout.unflatten(v), case.batch)
        return tuple(real(y) for y in (out if isinstance(out, tuple) else (out,)))

    def joined(v: Tensor) -> Tensor:
        return torch.cat([y.reshape(-1) for y in outputs(v)])

    def loss(ys: tuple[Tensor, ...]) -> Tensor:
        return case.loss(ys if len(ys) > 1 else ys[0], case.batch)

    shapes = [y.shape for y in outputs(v)]

    def of_joined(z: Tensor) -> Tensor:
        parts = torch.split(z, [s.numel() for s in shapes])
        return loss(tuple(p.view(s) for p, s in zip(parts, shapes, strict=True)))

    with math_attention():
        j = torch.func.jacrev(joined, chunk_size=1)(v)
        h = torch.func.jacrev(torch.func.grad(lambda v: loss(outputs(v))), chunk_size=1)(v)
        hz = torch.func.jacrev(torch.func.grad(of_joined), chunk_size=1)(joined(v))
    return j, h, j.T @ hz @ j


def total(case: Case) -> Callable[[dict[str, Tensor], Any], Tensor]:
    """The loss as a function of parameters, over real outputs."""

    def fn(p: dict[str, Tensor], batch: Any) -> Tensor:
        out = case.fn(p, batch)
        ys = tuple(real(y) for y in (out if isinstance(out, tuple) else (out,)))
        return case.loss(ys if len(ys) > 1 else ys[0], batch)

    return fn


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("backend", ["auto", "reverse-over-reverse", "forward-over-reverse"])
def test_hessian(case: Case, backend: str) -> None:
    _, h, _ = dense(case)
    op = HessianOperator(total(case), case.params, case.batch, backend=backend)
    battery(op, h)
    assert op.backend == ("reverse-over-reverse" if backend == "auto" else backend)
    assert op.T is op
    assert consistency(op).ok
    assert derivative_error(op).ok


def test_hessian_by_differences(case: Case) -> None:
    _, h, _ = dense(case)
    op = HessianOperator(total(case), case.params, case.batch, backend="central difference")
    assert op.residual is not None
    assert gap(op.dense(), h) < 1e-7
    assert gap(op.dense(), h) < 30 * op.residual
    assert "residual" in repr(op)


def test_jacobian(case: Case) -> None:
    j, _, _ = dense(case)
    op = JacobianOperator(case.fn, case.params, case.batch)
    assert (op.backend, op.backend_T) == ("forward", "reverse")
    battery(op, j)
    battery(op.T, j.T)
    assert consistency(op).ok
    assert derivative_error(op).ok
    assert torch.equal(torch.cat([y.reshape(-1) for y in op.outputs]), torch.cat([real(y).reshape(-1) for y in tuple_of(case)]))


def tuple_of(case: Case) -> tuple[Tensor, ...]:
    with math_attention():
        out = case.fn(case.params, case.batch)
    return out if isinstance(out, tuple) else (out,)


def test_gauss_newton(case: Case) -> None:
    _, _, g = dense(case)
    op = GGNOperator(case.fn, case.params, case.batch, loss=case.loss)
    battery(op, g)
    assert consistency(op).ok


@pytest.mark.parametrize("backend", ["auto", "forward", "reverse", "central difference"])
def test_dense_jacobian(case: Case, backend: str) -> None:
    j, _, _ = dense(case)
    d = dense_jacobian(lambda p: case.fn(p, case.batch), case.params, 5, backend=backend)
    assert gap(d.matrix, j) < (1e-7 if backend == "central difference" else RTOL)
    assert d.backend == ("forward (vmap)" if backend == "auto" else backend)
    assert d.residual < 1e-7


def battery(op: LinearOperator, reference: Tensor) -> None:
    """Vectors, blocks, empty blocks, other dtypes, SciPy and the transpose, against one dense matrix."""
    m, n = reference.shape
    gen = torch.Generator().manual_seed(0)
    x, block, y = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((n,), (n, 7), (m,)))
    assert op.shape == (m, n)
    assert gap(op @ x, reference @ x) < RTOL
    assert gap(op @ block, reference @ block) < RTOL
    assert gap(op.T @ y, reference.T @ y) < RTOL
    assert gap(op.dense(), reference) < RTOL
    assert (op @ block[:, :0]).shape == (m, 0)
    assert (op @ x.float()).dtype == torch.float64
    assert (op @ x).requires_grad is False
    s = op.to_scipy()
    assert isinstance(s, scipy.sparse.linalg.LinearOperator)
    assert np.allclose(s @ x.numpy(), (reference @ x).numpy(), rtol=1e-9, atol=1e-12)
    assert np.allclose(s @ block.numpy(), (reference @ block).numpy(), rtol=1e-9, atol=1e-12)
    assert np.allclose(s.T @ y.numpy(), (reference.T @ y).numpy(), rtol=1e-9, atol=1e-12)
    assert sum(op.counts.values()) > 0


def test_scipy_eigenvalues() -> None:
    torch.manual_seed(0)
    case = mlp()
    _, h, _ = dense(case)
    op = HessianOperator(case.total, case.params, case.batch)
    with blas_threads(1):
        top = scipy.sparse.linalg.eigsh(op.to_scipy(), k=3, which="LA", tol=1e-10, return_eigenvectors=False)
    assert np.allclose(np.sort(top), torch.linalg.eigvalsh(h)[-3:].numpy(), rtol=1e-8)


def test_gauss_newton_is_not_the_hessian() -> None:
    torch.manual_seed(0)
    case = mlp()
    _, h, g = dense(case)
    assert gap(g, h) > 0.05
    assert float(torch.linalg.eigvalsh(g)[0]) > -1e-12


def test_low_precision_operators_say_their_dtype() -> None:
    torch.manual_seed(0)
    f = functional(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    x = torch.randn(4, 5)
    op = HessianOperator(lambda p, b: f(p, b)[0].pow(2).mean(), f.params, x)
    wide = functional(f.model).to(torch.float64)
    ref = HessianOperator(lambda p, b: wide(p, b)[0].pow(2).mean(), wide.params, x)
    assert (op.dtype, ref.dtype) == (torch.float32, torch.float64)
    assert gap(op.dense().double(), ref.dense()) < 1e-5
    assert op.to_scipy().dtype == np.float32


# -------------------------------------------------------------------------------------------------------- the chain of back ends


class NoDouble(torch.autograd.Function):
    """A square whose backward cannot be differentiated, and that has no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Nothing(torch.autograd.Function):
    """A square without any derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise NotImplementedError("no backward here")


class Wrong(torch.autograd.Function):
    """A square whose backward is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] * g


class ForwardOnly(torch.autograd.Function):
    """A square with a forward derivative and no reverse one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * t


POINT = {"w": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)}


def test_hessian_falls_back_to_differences_and_says_so() -> None:
    op = HessianOperator(lambda p, b: (NoDouble.apply(p["w"]) * p["w"]).sum(), POINT)
    assert op.backend == "central difference"
    assert [n for n, _ in op.tried] == ["reverse-over-reverse", "forward-over-reverse"]
    assert all(r for _, r in op.tried)
    assert op.residual is not None
    assert op.residual < 1e-7
    assert gap(op.dense(), torch.diag(6 * POINT["w"])) < 1e-7


@pytest.mark.parametrize(
    ("loss", "true"),
    [
        (lambda w: (NoDouble.apply(w) * w).sum(), lambda w: (w**3).sum()),
        (lambda w: NoDouble.apply(w).sum() + w.prod(), lambda w: (w**2).sum() + w.prod()),
    ],
)
def test_a_second_derivative_that_torch_drops_in_silence_is_not_used(loss: Any, true: Any) -> None:
    w = POINT["w"].clone().requires_grad_()
    exact = torch.autograd.functional.hessian(true, w)
    (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
    dropped = torch.stack([torch.autograd.grad(g[i], w, retain_graph=True)[0] for i in range(3)])
    assert gap(dropped, exact) > 0.1  # control: plain double backward gives a wrong matrix and no error
    op = HessianOperator(lambda p, b: loss(p["w"]), POINT)
    assert gap(op.dense(), exact) < 1e-7
    assert op.backend == "central difference"


def test_a_forced_back_end_that_fails_is_refused() -> None:
    with pytest.raises(InputError, match="No Hessian-vector product works: reverse-over-reverse"):
        HessianOperator(lambda p, b: NoDouble.apply(p["w"]).sum(), POINT, backend="reverse-over-reverse")
    with pytest.raises(InputError, match="Unknown back end"):
        HessianOperator(lambda p, b: p["w"].sum(), POINT, backend="magic")


def test_groupnorm_blocks_take_the_other_way() -> None:
    torch.manual_seed(0)
    case = groupnorm()
    _, h, _ = dense(case)
    op = HessianOperator(case.total, case.params, case.batch)
    x = torch.randn(h.shape[0], 8, dtype=torch.float64)
    op @ x  # finds out
    assert gap(op @ x, h @ x) < RTOL
    assert op.backend == "reverse-over-reverse"
    assert op.backend_block == "forward-over-reverse"
    assert op.tried[0][0] == "batched hvp"


@pytest.mark.parametrize(("square", "backend"), [(NoDouble, "reverse"), (Nothing, "central difference"), (ForwardOnly, "forward (vmap)")])
def test_dense_jacobian_chain(square: type[torch.autograd.Function], backend: str) -> None:
    d = dense_jacobian(lambda p: square.apply(p["w"]), POINT)
    assert d.backend == backend
    assert gap(d.matrix, torch.diag(2 * POINT["w"])) < (1e-8 if backend == "central difference" else RTOL)
    assert d.residual < 1e-7


def test_dense_jacobian_one_at_a_time_where_vmap_fails() -> None:
    class NoBatching(ForwardOnly):
        generate_vmap_rule = False

    d = dense_jacobian(lambda p: NoBatching.apply(p["w"]), POINT)
    assert d.backend == "forward"
    assert d.tried[0][0] == "forward (vmap)"
    assert gap(d.matrix, torch.diag(2 * POINT["w"])) < RTOL


@pytest.mark.parametrize(
    ("square", "backend", "backend_t"),
    [
        (NoDouble, "central difference", "reverse"),
        (Nothing, "central difference", "central difference"),
        (ForwardOnly, "forward", "forward"),
    ],
)
def test_jacobian_chain(square: type[torch.autograd.Function], backend: str, backend_t: str) -> None:
    op = JacobianOperator(lambda p, b: square.apply(p["w"]), POINT)
    assert (op.backend, op.backend_T) == (backend, backend_t)
    for a in (op.dense(), op.T.dense().T):
        assert gap(a, torch.diag(2 * POINT["w"])) < 1e-7


def test_jacobian_without_forward_mode_uses_two_reverse_passes() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * g

    op = JacobianOperator(lambda p, b: Cube.apply(p["w"]), POINT)
    assert op.backend == "reverse-over-reverse"
    battery(op, torch.diag(3 * POINT["w"] ** 2))


def test_operators_choose_a_differentiable_attention_kernel() -> None:
    torch.manual_seed(0)
    case = attention()
    HessianOperator(case.total, case.params, case.batch)
    v = flatten(case.params)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises((RuntimeError, NotImplementedError)):  # control
        torch.func.jvp(lambda v: case.fn(unflatten(v, case.params), case.batch), (v,), (v,))


def test_linear_loss_has_zero_hessian() -> None:
    op = HessianOperator(lambda p, b: p["w"].sum(), POINT)
    assert torch.equal(op.dense(), torch.zeros(3, 3, dtype=torch.float64))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_activations_are_those_of_the_point_asked_for(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    f, x = functional(model), torch.randn(5, 3).double()
    point = {n: p + 0.5 for n, p in f.params.items()}  # not where the module is
    v = flatten(point)

    def reference(v: Tensor) -> Tensor:
        p = unflatten(v, f.params)
        hidden = torch.tanh(F.linear(x, p["a.weight"], p["a.bias"]))
        return torch.tanh(F.linear(hidden, p["b.weight"], p["b.bias"])).pow(2).mean()

    def bare(p: dict[str, Tensor], b: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (b,)).pow(2).mean()

    exact = torch.func.hessian(reference)(v)
    for loss in (lambda p, b: f(p, b)[0].pow(2).mean(), bare):
        op = HessianOperator(loss, point, x)
        assert gap(op.gradient, torch.func.grad(reference)(v)) < RTOL
        assert gap(op.dense(), exact) < RTOL

    leaves = {n: p.clone().requires_grad_() for n, p in point.items()}
    grads = torch.autograd.grad(f(leaves, x)[0].pow(2).mean(), list(leaves.values()))  # the functional alone, without an operator
    assert gap(torch.cat([g.reshape(-1) for g in grads]), torch.func.grad(reference)(v)) < RTOL
    # control: torch alone gives a wrong gradient, or none
    value = bare(leaves, x)
    if value.requires_grad:
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        assert gap(torch.cat([g.reshape(-1) for g in grads]), torch.func.grad(reference)(v)) > 1e-3


def test_differences_that_do_not_settle_are_refused() -> None:
    torch.manual_seed(0)
    f = functional(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    batch = torch.randn(256, 20), torch.randint(0, 10, (256,))

    def loss(p: dict[str, Tensor], b: Any) -> Tensor:
        return F.cross_entropy(f(p, b[0])[0], b[1])

    with pytest.raises(InputError, match=r"central differences do not settle.*float64"):
        HessianOperator(loss, f.params, batch, backend="central difference")
    assert derivative_error(HessianOperator(loss, f.params, batch)).status == "not_converged"
    wide = f.to(torch.float64)
    assert derivative_error(HessianOperator(lambda p, b: F.cross_entropy(wide(p, b[0])[0], b[1]), wide.params, batch)).ok


# ----------------------------------------------------------------------------------------------------------- negative controls


def test_wrong_derivatives_are_found() -> None:
    wrong = HessianOperator(lambda p, b: Wrong.apply(p["w"]).sum(), POINT)
    assert derivative_error(wrong).status == "violated"
    cut = JacobianOperator(lambda p, b: p["w"] * p["w"].detach(), POINT)
    assert consistency(cut).ok  # forward and reverse agree on the wrong answer
    assert derivative_error(cut).status == "violated"
    assert dense_jacobian(lambda p: p["w"] * p["w"].detach(), POINT).residual > 0.1
    assert derivative_error(HessianOperator(lambda p, b: p["w"].pow(2).sum(), POINT)).ok


def test_padding_index_is_seen_as_a_disagreement() -> None:
    case = of_module(nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Flatten(), nn.Linear(6, 3)), torch.tensor([[0, 1], [1, 4]]))
    assert consistency(JacobianOperator(case.fn, case.params, case.batch)).status == "violated"
    assert dense_jacobian(lambda p: case.fn(p, case.batch), case.params).residual < 1e-7
    assert dense_jacobian(lambda p: case.fn(p, case.batch), case.params, backend="reverse").residual > 1e-2


def noisy(p: dict[str, Tensor], b: Any) -> Tensor:
    return (p["w"] * torch.rand(3)).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: HessianOperator(noisy, POINT),
        lambda: JacobianOperator(noisy, POINT),
        lambda: GGNOperator(noisy, POINT, loss=lambda y, b: y.sum()),
        lambda: dense_jacobian(lambda p: noisy(p, None), POINT),
    ],
)
def test_noise_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(NonDeterministicError, match="differ by"):
        make()


def test_dropout_is_named_through_the_loss() -> None:
    f = functional(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)))
    with pytest.raises(NonDeterministicError, match=r"1 \(Dropout, p=0\.5\)"):
        HessianOperator(lambda p, b: f(p, b)[0].sum(), f.params, torch.ones(2, 3))
    f.model.eval()
    HessianOperator(lambda p, b: f(p, b)[0].square().sum(), f.params, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HessianOperator(lambda p, b: p["w"], POINT), "must be one number"),
        (lambda: HessianOperator(lambda p, b: torch.ones(()), POINT), "does not depend on the parameters"),
        (lambda: HessianOperator(lambda p, b: p["w"].sum() / 0, POINT), "The loss is inf|The loss is -?inf|The loss is nan"),
        (lambda: HessianOperator(lambda p, b: (p["w"] - p["w"]).norm() + (p["w"] * 0).sqrt().sum(), POINT), "gradient is not finite in w"),
        (lambda: HessianOperator("loss", POINT), "Give a function"),
        (lambda: HessianOperator(lambda p, b: 0, [1]), "needs a dict"),
        (lambda: HessianOperator(lambda p, b: 0, {}), "nothing to differentiate"),
        (lambda: HessianOperator(lambda p, b: 0, {"i": torch.ones(2, dtype=torch.int64)}), "'i' is torch.int64"),
        (lambda: HessianOperator(lambda p, b: 0, {"w": torch.tensor([1.0, float("nan")])}), "1 non-finite entries of 2"),
        (lambda: HessianOperator(lambda p, b: 0, {"w": torch.ones(2, device="meta")}), "meta device"),
        (lambda: HessianOperator(lambda p, b: p["w"].sum(), POINT, chunk=0), "chunk must be a positive"),
        (lambda: JacobianOperator(lambda p, b: p["w"] / 0, POINT), "non-finite entries"),
        (lambda: JacobianOperator(lambda p, b: p["w"][:0], POINT), "batch is empty"),
        (lambda: JacobianOperator(lambda p, b: 3, POINT), "no floating-point tensor"),
        (lambda: dense_jacobian(lambda p: p["w"], POINT, backend="magic"), "Unknown back end"),
        (lambda: dense_jacobian(lambda p: Nothing.apply(p["w"]), POINT, backend="reverse"), "could not be computed: reverse"),
    ],
)
def test_bad_problems_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.ones(4), r"takes a vector \(3,\) or a block \(3, k\), got \(4,\)"),
        (torch.ones(3, 1, 1), "got"),
        (np.ones(3), "torch tensor"),
        (torch.tensor([1.0, float("nan"), 0.0]), "1 non-finite"),
        (torch.ones(3, dtype=torch.complex64), "real tensor"),
    ],
)
def test_bad_vectors_are_refused(x: Any, match: str) -> None:
    op = HessianOperator(lambda p, b: p["w"].pow(2).sum(), POINT)
    with pytest.raises(InputError, match=match):
        op @ x


# ------------------------------------------------------------------------------------------------------------------- neighbours


def test_the_operator_keeps_its_own_point_and_touches_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 3)
    model(x).sum().backward()
    f = functional(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    op = HessianOperator(lambda p, b: f(p, b)[0].square().mean(), f.params, x)
    jac = JacobianOperator(lambda p, b: f(p, b), f.params, x)
    v = torch.linspace(-1, 1, op.shape[0])
    before = op @ v, jac @ v
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(op @ v, before[0])
    assert torch.equal(jac @ v, before[1])


def test_inside_no_grad_and_inference_mode() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            w = torch.tensor([1.0, 2.0], dtype=torch.float64)
            op = HessianOperator(lambda p, b: p["w"].pow(3).sum(), {"w": w})
            assert torch.allclose(op.dense(), torch.diag(6 * w))


def test_a_subset_of_the_parameters() -> None:
    torch.manual_seed(0)
    case = mlp()
    _, h, _ = dense(case)
    part = {n: p for n, p in case.params.items() if n.startswith("2")}
    layout = Layout.of(case.params)
    rows = torch.cat([torch.arange(layout.size)[layout.slice(n)] for n in part])
    assert gap(HessianOperator(case.total, part, case.batch).dense(), h[rows][:, rows]) < RTOL


def test_counts_are_what_was_done() -> None:
    op = HessianOperator(lambda p, b: p["w"].pow(4).sum(), POINT)
    start = dict(op.counts)
    op @ torch.ones(3, 5, dtype=torch.float64)
    assert op.counts["hvp"] == start["hvp"] + 5
    assert op.counts["grad"] == start["grad"]  # the graph is kept
    d = dense_jacobian(lambda p: p["w"] ** 2, POINT)
    assert d.counts["jvp"] == 3


def test_layout_round_trips() -> None:
    gen = torch.Generator().manual_seed(0)
    tree = {
        "a": torch.randn(2, 3, generator=gen),
        "z": torch.randn(2, generator=gen, dtype=torch.complex64),
        "none": torch.zeros(0, 4),
        "s": torch.tensor(2.0, dtype=torch.float64),
    }
    layout = Layout.of(tree)
    flat = flatten(tree)
    assert flat.dtype == torch.float64
    assert layout.size == len(flat) == 11
    back = unflatten(flat, tree)
    assert all(torch.equal(back[n], tree[n]) and back[n].dtype == tree[n].dtype for n in tree)
    block = torch.randn(11, 4, generator=gen, dtype=torch.float64)
    assert unflatten(block, tree)["a"].shape == (4, 2, 3)
    assert torch.allclose(layout.flatten(layout.unflatten(block)), block, atol=1e-6)
    assert [layout.locate(i) for i in (0, 5, 6, 9, 10)] == [("a", (0, 0)), ("a", (1, 2)), ("z", (0, 0)), ("z", (1, 1)), ("s", ())]
    assert layout.flatten({"s": tree["s"]}).tolist() == [0.0] * 10 + [2.0]
    for bad in ({"b": flat}, {"a": flat}, {}):
        with pytest.raises(InputError):
            layout.flatten(bad)
    with pytest.raises(InputError, match="Expected a vector"):
        layout.unflatten(flat[:3])
    with pytest.raises(InputError, match="outside"):
        layout.locate(11)
