"""parasym: the symmetries in a network's parameters, and what they do to its training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from parasym.audit import Audit as Audit
    from parasym.audit import audit as audit
    from parasym.audit import symmetries as symmetries
    from parasym.core.errors import ParasymError as ParasymError
    from parasym.symmetry.symmetry import Symmetry as Symmetry
    from parasym.symmetry.symmetry import SymmetrySet as SymmetrySet
    from parasym.watch import Watch as Watch
    from parasym.watch import watch as watch

_PUBLIC = {
    "audit": "parasym.audit",
    "symmetries": "parasym.audit",
    "Audit": "parasym.audit",
    "ParasymError": "parasym.core.errors",
    "Symmetry": "parasym.symmetry.symmetry",
    "SymmetrySet": "parasym.symmetry.symmetry",
    "Watch": "parasym.watch",
    "watch": "parasym.watch",
}
__all__ = ["Audit", "ParasymError", "Symmetry", "SymmetrySet", "Watch", "__version__", "audit", "symmetries", "watch"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'parasym' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value  # also over the sub-module of the same name
    return value
