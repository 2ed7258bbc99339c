"""The file of a trace: JSON lines, appended to while a model works, read whole afterwards. See docs/view.md.

Owns the format: its version, the private mode, what a torn end is and what is refused. What stands in the lines is
made by `trace_record.py` and understood by `trace_view.py`; the command line opens files here.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError

FORMAT = 1
"""Raised when a reader of today would misunderstand a file. New kinds of lines do not raise it: they are passed over."""

HEADER = "trace"
"""The ``event`` of a run's first line."""

_MOST_SETTINGS_CHARACTERS = 1 << 18  # they stand in the picture of each problem; the longest of ours is a grammar
_READ_BYTES = 1 << 30  # of a file that claims to be a trace: far more than anybody records, less than what kills the reader


class TraceWriter:
    """A trace that is being written. Lines are buffered until ``flush``; one process at a time."""

    def __init__(self, path: Path, file: int, cut_bytes: int) -> None:
        """Use ``TraceWriter.open``."""
        self.path = path
        self.cut_bytes = cut_bytes
        self.written_bytes = 0
        self._file = file
        self._lines: list[bytes] = []

    @classmethod
    def open(cls, path: Path) -> TraceWriter:
        """Create ``path`` with mode 0600, or go on behind the last whole line of a trace that is there.

        ``cut_bytes`` says how much of a torn last line was cut off. Raises UsageError if the file is something else, of
        another version, in use, or cannot be written.
        """
        try:
            # without O_NONBLOCK the opening of a pipe would wait for its reader
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise UsageError(f"--trace {path}: {error.strerror}; name another file") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UsageError(f"--trace {path}: not a regular file; name another one")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"--trace {path}: another process writes it; name another file") from None
            cut = _check_existing(path, file)
            os.fchmod(file, 0o600)
        except BaseException:
            os.close(file)
            raise
        return cls(path, file, cut)

    def write(self, line: dict[str, Any]) -> int:
        """Add one line; it is in the file after the next ``flush``. How many bytes it has."""
        self._lines.append(_dump(line))
        return len(self._lines[-1])

    def flush(self) -> None:
        """Write what was added. Raises OSError (disk full); a part of a line may stand in the file then."""
        data = b"".join(self._lines)
        self._lines.clear()
        while data:
            n = os.write(self._file, data)
            self.written_bytes += n
            data = data[n:]

    def close(self) -> None:
        """Close the file; what was not flushed is lost. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(frozen=True)
class Recorded:
    """One problem of a trace (in a chat: turns that share a cache). ``run`` counts from 1, ``header`` is its run's line."""

    run: int
    header: dict[str, Any]
    id: str | int
    lines: list[dict[str, Any]]


@dataclass(frozen=True)
class TraceContent:
    """A trace as it was read. ``torn_bytes``: of a last line that was never finished."""

    runs: int
    problems: list[Recorded]
    torn_bytes: int


def read_trace(path: Path) -> TraceContent:
    """The problems in ``path``, in their order. Raises UsageError that says what is wrong with the file."""
    try:
        with path.open("rb") as file:
            data = file.read(_READ_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give a file that --trace has written") from None
    if len(data) > _READ_BYTES:
        raise UsageError(f"{path} is larger than {_READ_BYTES >> 30} GiB, too large to be drawn; trace fewer problems")
    *rows, torn = data.split(b"\n")
    header, runs, problems = None, 0, []
    for number, row in enumerate(rows, start=1):
        line = _parse(row)
        if line is None and number == len(rows) and not torn and number > 1:
            torn = row + b"\n"  # a power loss can leave zeros in a last line's place
            break
        if line is None:
            raise UsageError(f"{path} line {number} is not a line of a trace; give a file that --trace has written")
        if line["event"] == HEADER:
            _check_version(path, line)
            header, runs = {**line, "settings": _settings(line.get("settings"))}, runs + 1
        elif header is None:
            raise UsageError(f"{path} does not begin like a trace; give a file that --trace has written")
        elif line["event"] == "problem":
            problems.append(Recorded(runs, header, _problem_id(path, number, line), []))
        elif problems and problems[-1].run == runs:
            problems[-1].lines.append(line)
    if header is None:
        raise UsageError(f"{path} holds no trace; give a file that --trace has written")
    return TraceContent(runs, problems, len(torn))


def _settings(value: Any) -> dict[str, Any]:
    """A run's settings, checked once for all its problems; none of what no run of ours has written."""
    try:  # no browser reads the infinities that Python does
        text = json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) and len(text) <= _MOST_SETTINGS_CHARACTERS else {}


def _problem_id(path: Path, number: int, line: dict[str, Any]) -> str | int:
    name = line.get("id")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UsageError(f"{path} line {number}: a problem without an id; give a file that --trace has written")
    return name


def _check_existing(path: Path, file: int) -> int:
    """Bytes of a torn last line that were cut off ``file``. Raises UsageError unless it is empty or a trace of ours."""
    size = os.fstat(file).st_size
    if size == 0:
        return 0
    with os.fdopen(os.dup(file), "rb") as reader:
        reader.seek(0)
        first = reader.readline(1 << 20)
        line = _parse(first)
        if line is None or line["event"] != HEADER:
            raise UsageError(f"--trace {path}: there is such a file and it is no trace; name another one")
        _check_version(path, line)
        whole = _whole_bytes(reader, size)
    os.ftruncate(file, whole)
    return size - whole


def _whole_bytes(reader: Any, size: int) -> int:
    """Up to and with the last line end in a file of ``size`` bytes."""
    stop = size
    while stop > 0:
        start = max(0, stop - (1 << 16))
        reader.seek(start)
        at = reader.read(stop - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        stop = start
    return 0


def _check_version(path: Path, line: dict[str, Any]) -> None:
    if line.get("format") != FORMAT:
        made_by = line.get("zoomr")
        by = f", written by zoomr {made_by}" if isinstance(made_by, str) and made_by.isprintable() and len(made_by) < 40 else ""
        said = line.get("format") if isinstance(line.get("format"), int) else "unknown"
        raise UsageError(f"{path} is a trace of format {said}{by}; this version reads format {FORMAT}: use that version of zoomr")


def _dump(line: dict[str, Any]) -> bytes:
    # ASCII: half of a surrogate pair can stand in a model's text, and no UTF-8 has a place for it
    return (json.dumps(line, separators=(",", ":")) + "\n").encode()


def _parse(row: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("event"), str) else None
