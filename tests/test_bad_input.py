"""Bad input: every refusal is a ParasymError that names the cause; what is unusual but fine has a stated result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parasym
from parasym.core.errors import InputError, NonDeterministicError, ParasymError, TraceError

X = torch.linspace(-2, 2, 60).reshape(20, 3).sin() * torch.linspace(0.5, 2, 20)[:, None]
Call = Callable[[], Any]


def mlp() -> nn.Sequential:
    """Linear 3-4-2 with ReLU, float32, fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Then(nn.Module):
    """A function of Linear(3, 4)."""

    def __init__(self, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = mlp()[0]
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.linear(x))


class Branch(Then):
    """A branch on the sign of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return 2 * y if y.sum() > 0 else y


class Counting(Then):
    """Another result at every call, without a random number."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * self.linear(x)


class Tokens(nn.Module):
    """Integer inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.table(tokens))


class Gain(nn.Module):
    """A 0-d parameter in front of a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.linear = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x)


class Complex(nn.Module):
    """Two complex matrices in a row: GL(2, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.b = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(torch.complex64) @ self.a @ self.b)


class Int8(nn.Module):
    """An integer matrix with a trainable scale for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(-6, 6, dtype=torch.int8).reshape(4, 3), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale[:, None]).T


class Extra(Then):
    """An empty parameter that is used and a parameter that is not."""

    def __init__(self) -> None:
        super().__init__(lambda y: y)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.empty.sum(0)


def raising(error: Exception) -> Then:
    def after(y: Tensor) -> Tensor:
        raise error

    return Then(after)


def put(model: nn.Sequential, layer: int, name: str, value: float) -> nn.Sequential:
    """The model with the first number of one tensor replaced."""
    tensor = getattr(model[layer], name)
    tensor.data.reshape(-1)[0] = value
    return model


def with_x(value: float) -> Tensor:
    x = X.clone()
    x[0, 0] = value
    return x


def frozen(*names: str) -> nn.Module:
    model = mlp()
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names and names != ("all",))
    return model


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp().eval(), {nn.Linear}, dtype=torch.qint8)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(mlp())


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return mlp()


def sparse() -> nn.Module:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(3).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.w, x.T).T

    return Sparse()


def audit(model: Any, *args: Any, **options: Any) -> Call:
    return lambda: parasym.audit(model() if callable(model) and not isinstance(model, (nn.Module, type)) else model, args, **options)


REFUSED: dict[str, tuple[Call, type[ParasymError], str]] = {
    # what is no module
    "state dict": (lambda: parasym.audit(mlp().state_dict(), (X,)), InputError, "OrderedDict"),
    "class": (lambda: parasym.audit(nn.Linear, (X,)), InputError, "class"),
    "function": (lambda: parasym.audit(torch.sin, (X,)), InputError, "builtin_function"),
    "None": (lambda: parasym.audit(None, (X,)), InputError, "NoneType"),
    "no module, discovery": (lambda: parasym.symmetries(3, (X,)), InputError, "got int"),
    "module without forward": (audit(nn.ModuleList([nn.Linear(3, 2)]), X), InputError, "forward"),
    "scripted": (lambda: parasym.audit(scripted(), (X,)), InputError, "TorchScript"),
    # arguments that do not fit
    "shape": (audit(mlp(), X[:, :2]), InputError, r"\(20, 2\)"),
    "shape, discovery": (lambda: parasym.symmetries(mlp(), (X[:, :2],)), InputError, r"\(20, 2\)"),
    "missing argument": (audit(mlp()), InputError, "missing 1 required"),
    "too many arguments": (audit(mlp(), X, X), InputError, "3 were given"),
    "unknown keyword": (audit(mlp(), X, kwargs={"mask": 1}), InputError, "mask"),
    "kwargs not a mapping": (audit(mlp(), X, kwargs=[1]), InputError, "kwargs must be a mapping"),
    "args a tensor": (lambda: parasym.audit(mlp(), X), InputError, r"args=\(x,\)"),
    "args a tensor, discovery": (lambda: parasym.symmetries(mlp(), X), InputError, r"args=\(x,\)"),
    "args a dict": (lambda: parasym.audit(mlp(), {"input": X}), InputError, "got dict"),
    "dtype": (audit(mlp().double(), X), InputError, "dtype"),
    "token out of range": (audit(Tokens(), torch.full((20, 4), 9)), InputError, "index out of range"),
    "sparse input": (audit(mlp(), X.to_sparse()), InputError, "sparse"),
    "infinite input": (audit(mlp(), with_x(math.inf)), InputError, "NaN or infinite"),
    "NaN input": (audit(mlp(), with_x(math.nan)), InputError, "NaN or infinite"),
    "no samples": (audit(mlp(), X[:0]), InputError, "no entries"),
    "one sample for batch statistics": (audit(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), X[:1]), InputError, "more than 1 value"),
    # inputs=
    "inputs empty": (audit(mlp(), X, inputs=[]), InputError, "inputs is empty"),
    "inputs of another shape": (audit(mlp(), X, inputs=[(X[:7],)]), InputError, r"\(7, 3\).*\(20, 3\)"),
    "inputs not tuples": (audit(mlp(), X, inputs=[X]), InputError, "list of argument tuples"),
    "inputs of another structure": (audit(mlp(), X, inputs=[(X, X)]), InputError, "takes 1 tensors, got 2"),
    "inputs of another dtype": (audit(mlp(), X, inputs=[(X.long(),)]), InputError, "int64"),
    "inputs with NaN": (audit(mlp(), X, inputs=[(X,), (with_x(math.nan),)]), InputError, "NaN"),
    # outputs
    "output a string": (audit(Then(lambda y: "yes"), X), InputError, "no floating-point tensor.*str"),
    "output None": (audit(Then(lambda y: None), X), InputError, "no floating-point tensor.*NoneType"),
    "output a number": (audit(Then(lambda y: float(y.sum())), X), InputError, "no floating-point tensor.*float"),
    "output integers": (audit(Then(lambda y: y.argmax(-1)), X), InputError, "int64"),
    "output a constant": (audit(Then(lambda y: torch.ones(3)), X), InputError, "depends on its trainable parameters"),
    "output NaN": (audit(Then(lambda y: torch.log(-y.abs() - 1)), X), InputError, "80 of 80 outputs are NaN"),
    "output overflows": (audit(Then(lambda y: (1e3 + y).exp()), X), InputError, "80 of 80 outputs are NaN or infinite"),
    "forward raises": (audit(raising(RuntimeError("boom")), X), InputError, "RuntimeError: boom"),
    "forward raises another kind": (audit(raising(ZeroDivisionError("boom")), X), InputError, "ZeroDivisionError: boom"),
    "forward asserts": (audit(raising(AssertionError("want three")), X), InputError, "want three"),
    # weights
    "NaN weight": (audit(put(mlp(), 0, "weight", math.nan), X), InputError, r"0\.weight \(1 NaN of 12"),
    "infinite weight": (audit(put(mlp(), 2, "bias", math.inf), X), InputError, r"2\.bias \(1 Inf of 2"),
    "NaN buffer": (
        audit(put(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), 1, "running_mean", math.nan), X),
        InputError,
        "buffer 1.running_mean",
    ),
    "no parameters": (audit(nn.ReLU(), X), InputError, "no trainable parameters"),
    "no parameters, discovery": (lambda: parasym.symmetries(nn.ReLU(), (X,)), InputError, "no trainable parameters"),
    "all frozen": (audit(frozen("all"), X), InputError, "all are frozen"),
    "quantised": (lambda: parasym.audit(quantised(), (X,)), InputError, "quantised"),
    "sparse weight": (lambda: parasym.audit(sparse(), (X,)), InputError, "sparse"),
    "lazy": (audit(nn.Sequential(nn.LazyLinear(4)), X), InputError, "0.weight is not initialised"),
    "meta": (audit(mlp().to("meta"), X), InputError, "meta device"),
    "inference mode": (lambda: parasym.audit(in_inference_mode(), (X,)), InputError, "inference_mode"),
    # randomness and control flow
    "dropout": (audit(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), X), NonDeterministicError, r"1 \(Dropout, p=0.5\).*model.eval"),
    "dropout, discovery": (
        lambda: parasym.symmetries(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), (X,)), NonDeterministicError, "Dropout"
    ),
    "noise": (audit(Then(lambda y: y + torch.randn_like(y)), X), NonDeterministicError, r"\(root\) \(Then\)"),
    "state from call to call": (audit(Counting(lambda y: y), X), NonDeterministicError, r"\(Counting\)"),
    "branch": (audit(Branch(lambda y: y), X), TraceError, "depend on the data.*torch.where"),
    "selection": (audit(Then(lambda y: y[y > 0]), X), TraceError, "depends on the data.*mask"),
    # options
    "completeness": (audit(mlp(), X, completeness="maybe"), InputError, "auto, exact, none.*'maybe'"),
    "seed": (audit(mlp(), X, seed="one"), InputError, "seed must be an integer"),
    "loss not callable": (audit(mlp(), X, loss_fn=3), InputError, "loss_fn must be a function"),
    "loss with two arguments": (audit(mlp(), X, loss_fn=lambda y, target: y), InputError, "loss_fn failed.*target"),
    "loss a string": (audit(mlp(), X, loss_fn=lambda y: "low"), InputError, "loss_fn returned no floating-point tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


# --- unusual and fine -------------------------------------------------------------------------------------------------


def groups(found: parasym.Audit) -> dict[str, int]:
    """Continuous group -> dimension explained."""
    return {s.group: s.dim for s in found.symmetries if s.kind != "discrete"}


def checked(model: nn.Module, *args: Any, **options: Any) -> parasym.Audit:
    """An audit that explains everything, with every certificate in order."""
    found = parasym.audit(model, args, **options)
    assert found.completeness.explained == 1.0
    assert all(s.certified and s.residual <= 1e-10 for s in found.symmetries)
    return found


def test_integer_inputs() -> None:
    for dtype in (torch.int64, torch.int32):
        found = checked(Tokens(), torch.arange(80).reshape(20, 4).remainder(5).to(dtype))
        # 13 = GL(3), a shift into the bias, and one more: five tokens cannot span all of the table and the bias
        assert found.completeness.nullity == 23 - 5 * 2


def test_low_precision_weights() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert groups(checked(mlp().to(dtype), X.to(dtype))) == {"R+^4": 4}


def test_no_gradient_contexts() -> None:
    with torch.no_grad():
        assert groups(checked(mlp(), X)) == {"R+^4": 4}
    with torch.inference_mode():
        assert groups(checked(mlp(), X.clone())) == {"R+^4": 4}


def test_frozen_parameters_do_not_move() -> None:
    found = checked(frozen("0.weight"), X)
    assert found.completeness.parameters == 14
    assert all("0.weight" not in s.parameters for s in found.symmetries)


def test_shared_modules_and_tied_weights() -> None:
    layer = nn.Linear(3, 3)
    assert checked(nn.Sequential(layer, nn.ReLU(), layer), X).completeness.parameters == 12
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    found = checked(model, X)
    assert found.completeness.parameters == 9
    assert found.completeness.nullity == 0


def test_integer_parameters_are_constants() -> None:
    found = checked(Int8(), X)
    assert (found.completeness.parameters, found.completeness.nullity) == (4, 0)


def test_empty_and_unused_parameters() -> None:
    found = checked(Extra(), X)
    assert found.completeness.parameters == 16 + 3
    assert groups(found) == {"R^3": 3}
    assert [s.parameters for s in found.symmetries] == [("unused",)]


def test_zero_size_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 2))
    found = checked(model, X)
    assert (found.completeness.parameters, found.completeness.nullity) == (2, 0)


def test_non_contiguous_weights() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T)
    assert groups(checked(model, X)) == {"R+^4": 4}


def test_in_place_operators() -> None:
    assert groups(checked(nn.Sequential(mlp()[0], nn.ReLU(inplace=True), mlp()[2]), X)) == {"R+^4": 4}


def test_a_zero_dimensional_output() -> None:
    found = checked(Then(lambda y: y.square().mean()), X)  # a rotation of the output is not seen in its norm
    assert groups(found) == {"O(4)": 6}


def test_outputs_in_a_dict() -> None:
    assert checked(Then(lambda y: {"logits": y, "none": None, "count": 3}), X).completeness.nullity == 0


def test_arguments_that_are_no_tensors() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, flag: bool, name: str = "a") -> Tensor:
            return self.net(x) if flag and name == "b" else x

    found = parasym.audit(Flagged(), (X, True), {"name": "b"})
    assert groups(found) == {"R+^4": 4}


def test_a_zero_dimensional_parameter() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = parasym.audit(Gain(), (X,))
    assert (found.completeness.parameters, found.completeness.nullity) == (7, 1)
    assert sum(s.dim for s in found.symmetries) + sum(u["dim"] for u in found.undecided) == 1


def test_one_parameter() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * x

    assert checked(One(), X).completeness.nullity == 0


def test_complex_parameters() -> None:
    """Found in full, or refused by name: never an unrelated error."""
    try:
        found = parasym.audit(Complex(), (X,))
    except InputError as error:
        assert "complex" in str(error)  # noqa: PT017
    else:
        assert found.completeness.nullity == 8


def test_an_exported_program() -> None:
    program = torch.export.export(mlp(), (X,))
    found = parasym.audit(program, (X,))
    assert groups(found) == {"R+^4": 4}
    with pytest.raises(InputError, match=r"\(4, 7\)"):
        parasym.audit(program, (torch.zeros(4, 7),))


def test_an_output_that_is_constant_zero() -> None:
    found = parasym.audit(Then(lambda y: 0 * y), (X,))
    assert found.completeness.nullity == 16


@pytest.mark.xfail(reason="the rank is cut relative to the largest column: a bias beside inputs of size 1e30 falls below it", strict=True)
def test_inputs_of_extreme_size_hide_nothing() -> None:
    """A bias beside inputs of size 1e30 is not free."""
    found = parasym.audit(mlp(), (1e30 * X,))
    assert found.completeness.nullity == 4


def test_wrappers_keep_the_names_of_the_plain_module() -> None:
    found = parasym.audit(nn.DataParallel(mlp()), (X,))
    assert groups(found) == {"R+^4": 4}
    assert {p for s in found.symmetries for p in s.parameters} <= {n for n, _ in mlp().named_parameters()}


def test_a_refused_model_is_unchanged() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(NonDeterministicError):
        parasym.audit(model, (X,))
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
