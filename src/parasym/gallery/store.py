"""Where finished work is kept, by the hash of everything its numbers depend on: a JSON file for each experiment, a row for each cell."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from parasym.core.errors import InputError


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
        """Store a JSON-ready value under ``key``, whole or not at all.

        Raises:
            InputError: it cannot be written (the disk is full, the directory is read-only); what was stored before stays.
        """
        record = json.dumps({"key": key, "sha256": digest(content), "content": content}, allow_nan=False)
        try:
            self._write(self.path(key), record)
        except OSError as error:
            raise InputError(f"a finished experiment cannot be kept in {self.directory}: {error}") from error
        return self.path(key)

    def _write(self, path: Path, record: str) -> None:
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.directory)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(record)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._flush_directory()

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


class Cells:
    """Many small results in one SQLite file (write-ahead log): what `put` returned from survives a kill at any moment.

    Several processes may fill one file at once: two that finish the same cell write the same row.

    Args:
        file: made if it is not there; ":memory:" keeps nothing.

    Raises:
        InputError: the file is something else, or cannot be written.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = str(file)
        try:
            if self.file != ":memory:":
                Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            self.connection = sqlite3.connect(self.file, timeout=30.0)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{self.file} cannot hold finished cells: {error}") from error
        try:
            with self._explained():
                self.connection.execute("PRAGMA journal_mode=WAL")
                self.connection.execute("PRAGMA synchronous=FULL")
                self.connection.execute("CREATE TABLE IF NOT EXISTS cells (key TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID")
        except InputError:
            self.connection.close()
            raise

    def get(self, keys: Sequence[str]) -> dict[str, Any]:
        """What is kept of ``keys``."""
        out: dict[str, Any] = {}
        with self._explained():
            for low in range(0, len(keys), 500):
                some = keys[low : low + 500]
                marks = ",".join("?" * len(some))
                found = self.connection.execute(f"SELECT key, content FROM cells WHERE key IN ({marks})", some)
                out |= {key: json.loads(content) for key, content in found}
        return out

    def put(self, cells: Mapping[str, Any]) -> None:
        """Keep JSON-ready results, all of them or none.

        Raises:
            InputError: they cannot be written (the disk is full, the file is locked for good); what was kept before stays.
        """
        rows = [(key, json.dumps(content, allow_nan=False)) for key, content in cells.items()]
        with self._explained(), self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO cells VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors in words: what stands in the way (`OperationalError`), or that the file is no store."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise InputError(f"{self.file} cannot hold finished cells: {error}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.file} is not a store of cells ({error}): give another file, or move it away") from error
