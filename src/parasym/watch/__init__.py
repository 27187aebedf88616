"""A training run observed: what is recorded, where it goes, and how it is read.

``parasym.watch(model, optimizer)`` starts it (`parasym.watch.run.watch`).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from parasym.watch.run import Watch as Watch
from parasym.watch.run import watch as watch


class _CallableModule(ModuleType):
    """``parasym.watch`` names this package once it is imported, and the function before: both can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Watch:
        return watch(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
