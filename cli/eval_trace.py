"""`zoomr eval --trace DIR`: which problems are recorded, in which files, and a solver that records them.

`eval.py` calls it. A file a cell and problem: the cells of a grid run one after the other, but with `--jobs` its problems are
solved by several processes, and a trace has one writer.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import UsageError
from zoomr_local.gguf_file import printable
from zoomr_local.sizes import counted
from zoomr_local.solve import Listener, Problem, Solver

from . import tracing

if TYPE_CHECKING:
    from zoomr_local.engine import EngineConfig
    from zoomr_local.evaluate import Cell, Suite

DEFAULT_PROBLEMS = 3

Files = Mapping[tuple["EngineConfig", str], Path]
"""The file of each problem that is recorded, by its cell's configuration and its id, which no two families share."""


def files(folder: Path, cells: Sequence[Cell], suite: Suite, problems: int | None) -> dict[tuple[EngineConfig, str], Path]:
    """The files of the first ``problems`` of each family in every cell, their folders made (mode 0700).

    Raises UsageError if a folder cannot be made, or a file is there that is no trace, of another version or in use.
    """
    from zoomr_local.trace_file import TraceWriter

    found = {}
    for cell in cells:
        inside = folder / cell.file_name.removesuffix(".jsonl")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            inside.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--trace {folder}: cannot make the folder {inside}: {error.strerror}; name another one") from None
        for problem in suite.problems[cell.family][: problems or DEFAULT_PROBLEMS]:
            path = found[cell.config, str(problem.id)] = inside / f"{_file_name(str(problem.id))}.jsonl"
            if path.exists():
                TraceWriter.open(path).close()
    return found


@dataclass(frozen=True)
class TracedSolver(Solver):
    """Solves as any solver does, and has what happens in some problems written to ``files``."""

    files: Files = field(default_factory=dict)

    def solve(self, problem: Problem, listener: Listener) -> dict[str, Any] | None:
        """The record of one problem; a trace that cannot be written costs no record, and is said."""
        path = self.files.get((self.engine.config, str(problem.id)))
        if path is None:
            return super().solve(problem, listener)
        from zoomr_local.trace_record import Recording, result_of

        with ExitStack() as stack:
            try:
                recorder = stack.enter_context(tracing.recording(path, self.engine, self.sampling, self.max_tokens, quiet=True))
            except UsageError as error:
                print(f"warning: problem {printable(str(problem.id))} is not recorded: {error}", file=sys.stderr)
                return super().solve(problem, listener)
            recorder.begin(problem.id)
            record = super().solve(problem, Recording(listener, recorder))
            if record is not None:
                recorder.end(result_of(record))
            return record


def say(folder: Path, asked: Files, whole: bool) -> None:
    """Say on stderr what was recorded, and of a ``whole`` run what was not."""
    there = [path for path in asked.values() if path.exists()]
    if there:
        print(f"traces: {counted(len(there), 'file')} in {folder}; to look at one: {shlex.join(['zoomr', 'view', str(there[0])])}", file=sys.stderr)
    if whole and len(there) < len(asked):
        print(
            f"{len(asked) - len(there)} of {counted(len(asked), 'problem')} to be recorded have no trace: what an earlier run has solved is solved"
            " again with --overwrite only", file=sys.stderr,
        )  # fmt: skip


def _file_name(name: str) -> str:
    """``name`` where it is a file's name; else one that no other id has."""
    plain = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
