"""`--trace FILE`: opens the file, says what has to be said, and gives commands a recorder, or none.

`solve.py`, `demo.py`, `chat.py` and `eval_trace.py` call it; what is recorded is `zoomr_local.trace_record`'s.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import UsageError

if TYPE_CHECKING:
    from zoomr_local.sampling import SamplingParams
    from zoomr_local.trace_record import Recorder


@contextmanager
def recording(path: Path | None, engine: Any, sampling: SamplingParams, max_tokens: int, quiet: bool) -> Iterator[Recorder | None]:
    """A recorder of what ``engine`` does, written to ``path``; None, and nothing else, without a path.

    Raises UsageError for a file that cannot be written or is something else.
    """
    if path is None:
        yield None
        return
    from zoomr_local.trace_file import TraceWriter
    from zoomr_local.trace_record import Recorder

    from .versions import versions

    writer = TraceWriter.open(path)
    if writer.cut_bytes and not quiet:
        print(f"{path}: the last line of the trace was torn ({writer.cut_bytes} bytes); it is cut off", file=sys.stderr)
    kept = {name: value for name, value in asdict(engine.config).items() if name != "kv_dir"}
    settings = {**kept, **engine.resolved(), **asdict(sampling), "max_tokens": max_tokens}
    known = versions()
    about = {
        "zoomr": known.pop("zoomr"), "versions": known, "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "file": engine.model.path.name, "settings": settings,
    }  # fmt: skip
    recorder = Recorder(writer, engine, about, lambda text: print(text, file=sys.stderr))
    try:
        yield recorder
    finally:
        recorder.close()
        if not quiet:
            print(f"trace: {path}; to look at it: {shlex.join(['zoomr', 'view', str(path)])}", file=sys.stderr)


def listener(inner: Any, recorder: Recorder | None) -> Any:
    """``inner``, or a listener that has everything recorded on its way to it."""
    if recorder is None:
        return inner
    from zoomr_local.trace_record import Recording

    return Recording(inner, recorder)


def refuse_same_file(trace: Path | None, *others: str | Path | None) -> None:
    """Raise UsageError if the trace would be written to one of the other files of the command."""
    for other in others:
        if trace is None or other is None or str(other) == "-":
            continue
        there = os.path.exists(trace) and os.path.exists(other) and os.path.samefile(trace, other)
        if there or trace.absolute() == Path(other).absolute():
            raise UsageError(f"--trace {trace} is the command's {other} too; name another file")
