"""Where finished experiments are kept: one JSON file for each, named by the hash of everything its numbers depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest(content: Any) -> str:
    """Hash of a JSON-ready value that does not depend on the order of its keys (SHA-256, hexadecimal)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


class Store:
    """A directory of finished experiments that survives a kill at any moment.

    A file is written to a temporary name, flushed to disk and renamed, so it is there whole or not at all; what is read
    back is checked against its own hash, and a torn or foreign file is ignored with a warning and computed again.
    Safe for several processes at once: two that finish the same experiment write the same file.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """The file of ``key``."""
        return self.directory / f"{key}.json"

    def get(self, key: str) -> Any | None:
        """What was stored under ``key``; ``None`` if nothing was, or if the file cannot be trusted."""
        path = self.path(key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self._refuse(path, str(error))
            return None
        if not isinstance(record, Mapping) or record.get("key") != key or record.get("sha256") != digest(record.get("content")):
            self._refuse(path, "its content does not fit its hash")
            return None
        return record["content"]

    def put(self, key: str, content: Any) -> Path:
        """Store a JSON-ready value under ``key``, whole or not at all."""
        record = json.dumps({"key": key, "sha256": digest(content), "content": content}, allow_nan=False)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.directory)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(record)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path(key))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._flush_directory()
        return self.path(key)

    def _flush_directory(self) -> None:
        if os.name != "posix":
            return
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _refuse(self, path: Path, reason: str) -> None:
        warnings.warn(f"ignoring the stored experiment {path.name}: {reason}; it will be run again", RuntimeWarning, stacklevel=3)
