"""What every test starts from."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of no stated width: packages that tests import may leave COLUMNS behind, and tables would fold."""
    monkeypatch.delenv("COLUMNS", raising=False)
