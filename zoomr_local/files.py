"""Files that are written whole or not at all. Anybody may call these; this file imports nothing of ours."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def write_new(path: Path, text: str) -> None:
    """Write ``text`` to a file that is not there yet. Raises FileExistsError, or OSError with nothing left of it (disk full)."""
    with path.open("x", encoding="utf-8", errors="replace") as file:
        try:
            file.write(text)
            file.flush()
        except BaseException:
            path.unlink()
            raise


def write_atomically(path: Path, data: bytes, before_rename: Callable[[int], None] | None = None) -> None:
    """Replace ``path`` with ``data``: readers see the old file or the new one, also after a power loss."""
    file, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(data)
            out.flush()
            os.fchmod(out.fileno(), 0o644)
            os.fsync(out.fileno())
            if before_rename:
                before_rename(out.fileno())
            os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    with _directory(path.parent) as folder:
        os.fsync(folder)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    folder = os.open(path, os.O_RDONLY)
    try:
        yield folder
    finally:
        os.close(folder)
