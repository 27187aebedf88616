"""What the library returns instead of bare numbers: a value, its error, what was assumed, and whether it may be trusted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from parasym.core.errors import InputError

Status = Literal["ok", "not_applicable", "not_converged", "violated"]


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """A measured or predicted quantity with its error and its standing.

    Two estimates are compared by identity, because their values may be tensors.

    Attributes:
        value: a number, or a tensor or array of them; None when the quantity is not applicable.
        residual: how far the defining equation is from being met (same units as the equation, relative unless the producer says
            otherwise); None when the value is exact or has only sampling error.
        stderr: standard error of the mean, in the units of ``value``; a number, or a tensor of the shape of ``value``; None when
            nothing was sampled.
        status: ``ok``; ``not_applicable`` (the quantity does not exist here, value is None); ``not_converged`` (the value did not
            settle and must not be used as if it had); ``violated`` (converged, and it contradicts what was claimed).
        assumptions: names of what must hold for the value to mean what it says.
        refs: citation keys, paper slug first.
        note: one sentence for people; why, when the status is not ``ok``.
        details: anything else worth keeping (back end used, number of Hessian-vector products); plain data.

    Raises:
        InputError: the status is unknown, or a non-finite or missing value is declared ``ok``, or an error is negative.

    Example:
        >>> Estimate(2.0, residual=1e-9, assumptions=("full batch",), refs=("law-of-balance",))
        Estimate(2, residual=1e-09)
        >>> Estimate(2.0, residual=0.3, status="not_converged")
        Estimate(2, residual=0.3, status=NOT_CONVERGED)
    """

    value: float | Tensor | np.ndarray | None
    residual: float | None = None
    stderr: float | Tensor | None = None
    status: Status = "ok"
    assumptions: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise InputError(f"Estimate status {self.status!r} is unknown: use one of {', '.join(get_args(Status))}.")
        object.__setattr__(self, "assumptions", _strings(self.assumptions, "assumptions"))
        object.__setattr__(self, "refs", _strings(self.refs, "refs"))
        for name in ("residual", "stderr"):
            bound = getattr(self, name)
            if bound is not None and bool((torch.as_tensor(bound) < 0).any()):
                raise InputError(f"Estimate {name} is negative ({bound}): give its absolute value.")
        if self.status in ("ok", "violated"):
            if self.value is None:
                raise InputError(f"Estimate without a value cannot have status {self.status!r}: use 'not_applicable'.")
            for name in ("value", "residual", "stderr"):
                part = getattr(self, name)
                if part is not None and not bool(torch.isfinite(torch.as_tensor(part)).all()):
                    raise InputError(f"Estimate {name} is not finite but the status is {self.status!r}: use 'not_converged'.")
        elif self.status == "not_applicable" and self.value is not None:
            raise InputError("Estimate with status 'not_applicable' must have no value (None).")

    @property
    def ok(self) -> bool:
        """True when the value may be used."""
        return self.status == "ok"

    def __float__(self) -> float:
        """Return the value as a Python float; refuse when it did not converge, does not exist, or is not one number.

        Raises:
            InputError: the status is ``not_converged`` or ``not_applicable``, or the value has more than one entry.
        """
        if self.status in ("not_converged", "not_applicable"):
            raise InputError(f"{self!r} is no number to compute with ({self.note or self.status}); read .value if you must.")
        if isinstance(self.value, float):
            return self.value  # a tensor of the default type would round it
        value = torch.as_tensor(self.value)
        if value.numel() != 1:
            raise InputError(f"{self!r} holds {value.numel()} numbers, not one; read .value.")
        return float(value)

    def __repr__(self) -> str:
        parts = [_brief(self.value)]
        if self.residual is not None:
            parts.append(f"residual={_brief(self.residual)}")
        if self.stderr is not None:
            parts.append(f"stderr={_brief(self.stderr)}")
        if self.status != "ok":
            parts.append(f"status={self.status.upper()}")
        if self.note:
            parts.append(f"note={self.note!r}")
        return f"Estimate({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json.dumps(..., allow_nan=False)`` accepts; non-finite numbers become "nan", "inf", "-inf"."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def plain(x: Any) -> Any:
    """Turn tensors, arrays, tuples, mappings and dataclasses into lists, dicts, numbers and strings, as JSON has them.

    Non-finite floats become the strings "nan", "inf", "-inf"; complex numbers become [real, imaginary]; objects of unknown type
    become their ``repr``. An object with a ``to_dict`` is asked for it.
    """
    if x is None or isinstance(x, bool | int | str):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else ("nan" if math.isnan(x) else "inf" if x > 0 else "-inf")
    if isinstance(x, complex):
        return [plain(x.real), plain(x.imag)]
    if isinstance(x, Tensor):
        return plain(x.detach().resolve_conj().resolve_neg().cpu().tolist())
    if isinstance(x, np.ndarray | np.generic):
        return plain(x.tolist())
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple | set | frozenset):
        return [plain(v) for v in x]
    if callable(to_dict := getattr(x, "to_dict", None)) and not isinstance(x, type):
        return plain(to_dict())
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    return repr(x)


def _strings(x: Any, name: str) -> tuple[str, ...]:
    if isinstance(x, str) or not all(isinstance(s, str) for s in x):
        raise InputError(f"Estimate {name} must be a tuple of strings, got {x!r}.")
    return tuple(x)


def _brief(x: Any) -> str:
    if x is None:
        return "None"
    if isinstance(x, int | float):
        return f"{x:.6g}"
    t = torch.as_tensor(x)
    return f"{t.item():.6g}" if t.ndim == 0 else f"<{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}>"
