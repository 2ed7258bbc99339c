"""One run of `zoomr solve`: what is left to do, a solver on an open engine, and what is said at the end.

`solve.py` makes a Job of its flags; only it calls this file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import UsageError
from zoomr_local.sizes import counted

from . import INTERRUPTED, SOME_FAILED, notes, summaries, tracing
from .solve_replies import Replies

if TYPE_CHECKING:
    from zoomr_local.attempts import AttemptLog
    from zoomr_local.checkpoint import Checkpoints
    from zoomr_local.engine import EngineConfig
    from zoomr_local.journal import Journal, LineForm, Manifest
    from zoomr_local.sampling import SamplingParams
    from zoomr_local.solve import Problem
    from zoomr_local.solve import Solver
    from zoomr_local.tally import Tally


@dataclass(frozen=True)
class Job:
    """One run: what is asked, of which model, with which settings. ``beyond`` are the input's problems behind ``--limit``."""

    problems: list[Problem]
    config: EngineConfig
    sampling: SamplingParams
    max_tokens: int
    model_file: Path
    n_gpu_layers: int
    as_json: bool
    quiet: bool
    arguments: list[str]
    checkpoint: Path | None = None
    checkpoint_every: float | None = None
    think_budget: str | None = None
    trace: Path | None = None
    replies: Replies = Replies()
    beyond: Sequence[Problem] = ()

    def command(self, *extra: str, without: tuple[str, ...] = ()) -> str:
        """The command line as the user can type it again."""
        return notes.typed_again(self.arguments, *extra, without=without)

    def run(self, journal: Journal | None, overwrite: bool = False, retry_failed: bool = False) -> int:
        """Solve what is left to solve and return the exit code. Without a journal records go to stdout."""
        from zoomr_local.journal import record_key
        from zoomr_local.tally import Tally

        from .render import make_progress

        manifest = self._manifest()
        tally, left = Tally(), self.problems
        if journal is not None and not overwrite:
            left = self.left(journal, tally, retry_failed, manifest)
        checkpoints = self._checkpoints(journal, manifest, left, overwrite)
        key = lambda problem: record_key(problem.asked(), manifest)  # noqa: E731
        if journal is not None and not left:
            if checkpoints is not None:
                checkpoints.prune()
            done = "the one problem is" if len(self.problems) == 1 else f"all {len(self.problems):,} problems are"
            self._say(f"{journal.path}: {done} done already")
            return self._conclude(tally, journal)

        from zoomr_local.attempts import AttemptLog

        attempts = AttemptLog() if journal is None else AttemptLog.beside(journal.path)
        with _interruptible() as interrupted, self._solver(interrupted, key, checkpoints, attempts) as solver:
            budget = None if self.config.policy == "full" else self.config.kv_budget
            write = _stdout_writer(self.replies.line_form()) if journal is None else journal.append
            traced = tracing.recording(self.trace, solver.engine, self.sampling, self.max_tokens, self.quiet)
            with traced as recorder:
                if journal is not None:  # drops what was made before, so nothing that may refuse the run comes after it
                    manifest.info["resolved"] = solver.engine.resolved()
                    journal.begin(manifest, overwrite, keep=_not_retried(left) if retry_failed else None)
                    if checkpoints is not None:
                        checkpoints.prune()
                    self._keep_attempts(attempts, set() if overwrite else {key(problem) for problem in (*left, *self.beyond)})
                with make_progress(len(self.problems), tally, budget, self.quiet) as progress:
                    from zoomr_local.solve import solve_all

                    whole = solve_all(left, solver, write, tracing.listener(progress, recorder))
        if checkpoints is not None:
            checkpoints.close()
        if not whole:
            return self._interrupted(tally, journal)
        return self._conclude(tally, journal)

    @contextmanager
    def _solver(
        self, stopping: Callable[[], bool], key: Callable[[Problem], str], checkpoints: Checkpoints | None, attempts: AttemptLog
    ) -> Iterator[Solver]:
        from zoomr_local.solve import Solver

        from .solve import open_engine

        with open_engine(self.model_file, self.config, self.n_gpu_layers) as (model, engine):
            summaries.say(engine, self.quiet)
            debug = bool(os.environ.get("ZOOMR_DEBUG"))
            limits = None
            if (budget := self.think_budget) is not None:
                from zoomr_local.thinking import budget_of

                limits = lambda max_tokens: budget_of(budget, max_tokens)  # noqa: E731
            if self.sampling.grammar is not None:
                self.replies.check_grammar(model)
            with self.replies.grader_for(self.problems) as grader:
                yield Solver(
                    model, engine, self.sampling, self.max_tokens, key, stopping, debug, checkpoints, limits, grader, self.replies.votes,
                    self.replies.vote_by or "majority", self.replies.retries, self.replies.timeout, attempts,
                )  # fmt: skip

    def _keep_attempts(self, attempts: AttemptLog, keys: set[str]) -> None:
        """Of the replies to unfinished problems that earlier starts have made, keep those to the problems with these keys; says both."""
        there = attempts.count
        kept = attempts.keep(keys)
        if kept:
            self._say(f"{attempts.path}: {counted(kept, 'reply', 'replies')} to unfinished problems {'is' if kept == 1 else 'are'} there already")
        if there > kept:
            gone = counted(there - kept, "reply", "replies")
            self._say(f"{attempts.path}: {gone} of an earlier run, asked for otherwise or overwritten, thrown away")

    def _checkpoints(
        self, journal: Journal | None, manifest: Manifest, left: list[Problem], overwrite: bool
    ) -> Checkpoints | None:
        """Where the unfinished problem is saved, looked at first. Raises UsageError if it holds another run's."""
        if self.checkpoint is None or journal is None:
            return None
        from zoomr_local.checkpoint import EVERY_SECONDS, Checkpoints
        from zoomr_local.journal import record_key

        every = EVERY_SECONDS if self.checkpoint_every is None else self.checkpoint_every
        aloud = lambda text: print(text, file=sys.stderr)  # noqa: E731
        checkpoints = Checkpoints(self.checkpoint, manifest, journal.path, every, say=aloud, tell=self._say)
        keys, to_do = ({record_key(problem.asked(), manifest) for problem in some} for some in ((*self.problems, *self.beyond), (*left, *self.beyond)))
        checkpoints.check(keys, to_do, overwrite)
        return checkpoints

    def _manifest(self) -> Manifest:
        from zoomr_local.errors import ModelError
        from zoomr_local.journal import Manifest, model_fingerprint

        from .versions import versions

        try:
            fingerprint = model_fingerprint(self.model_file)
        except OSError as error:
            raise ModelError(f"cannot read the model {self.model_file}: {error.strerror}; give a .gguf file with -m") from error
        asked = self.config.asked()
        if self.config.policy == "full":
            asked["kv_budget"] = None
        settings = {**asked, **self.sampling.asked(), **self.replies.settings(self.problems), "max_tokens": self.max_tokens, "n_gpu_layers": self.n_gpu_layers}
        if markers := summaries.user_markers():
            settings["markers"] = [asdict(row) for row in markers]
        if self.think_budget is not None:
            settings["think_budget"] = self.think_budget
        return Manifest(settings, fingerprint, versions(), {"command": self.command(), "threads": self.config.threads, "timeout": self.replies.timeout})

    def left(self, journal: Journal, tally: Tally, retry_failed: bool, manifest: Manifest | None = None) -> list[Problem]:
        """The problems without a record; counts those with one. Raises UsageError if they were made with other settings, or one asked
        differently."""
        from zoomr_local.journal import record_key
        from zoomr_local.tally import has_failed, readable

        manifest = manifest or self._manifest()
        journal.check(manifest)
        left, changed = [], []
        with readable(journal.path):
            done = {str(r["id"]): r for r in journal.records if not (retry_failed and has_failed(r))}
            for problem in self.problems:
                record = done.pop(str(problem.id), None)
                if record is None:
                    left.append(problem)
                elif record["key"] != record_key(problem.asked(), manifest):
                    changed.append(f"{problem.id} (line {problem.line})")
                else:
                    tally.add(record)
        if changed:
            raise UsageError(
                f"{journal.path} has records of {counted(len(changed), 'problem')} whose prompt or answer has changed since:"
                f" {', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''};"
                " choose another output with -o, or start again with --overwrite"
            )
        if journal.torn_bytes:
            self._say(f"{journal.path}: the last record was torn ({counted(journal.torn_bytes, 'byte')}); it is cut off and solved again")
        if done and len(done) + tally.done > len(self.problems):
            self._say(f"{journal.path}: keeps {counted(len(done), 'more record')} of problems that are not among these")
        if left and (before := journal.earlier_code(manifest)):
            self._say(f"note: {journal.path}: records there were made with zoomr {', '.join(before)}, further ones are with {manifest.versions.get('zoomr')}; --overwrite makes all anew")
        if tally.done and left:
            self._say(f"{journal.path}: {tally.done} of {len(self.problems)} {'is' if tally.done == 1 else 'are'} done already, {len(left)} to go")
        return left

    def _conclude(self, tally: Tally, journal: Journal | None) -> int:
        from .render import summary_lines

        where = "stdout" if journal is None else str(journal.path)
        self._say(f"{tally.done} of {len(self.problems)} done, in {where}")
        budget = None if self.config.policy == "full" else self.config.kv_budget
        for line in summary_lines(tally, budget):
            self._say(line)
        if tally.out_of_tokens and self.think_budget is None:
            self._say("to give replies more room: a larger -n, or --think-budget auto, which ends thoughts in time for the answer")
        if tally.failed and journal is not None:
            self._say(f"to try the failed ones again: {self.command('--retry-failed', without=('--overwrite',))}")
        if self.as_json:
            print(json.dumps({"output": where, "total": len(self.problems), **tally.summary()}))
        return SOME_FAILED if tally.failed else 0

    def _interrupted(self, tally: Tally, journal: Journal | None) -> int:
        kept = "" if journal is None else f", all in {journal.path}; to go on: {self.command(without=('--overwrite',))}"
        print(f"interrupted: {tally.done} of {len(self.problems)} done{kept}", file=sys.stderr)
        return INTERRUPTED

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While this lasts the first Ctrl-C or SIGTERM is only noted (the answer is the yielded function), the second one raises."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stdout_writer(form: LineForm) -> Callable[[dict[str, Any]], None]:
    def write(record: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(form.write(record)) + "\n")
        sys.stdout.flush()

    return write


def _not_retried(left: Sequence[Problem]) -> Callable[[dict[str, Any]], bool]:
    """Whether a record stays: a failed one of a problem that is not solved now is all that there is of it."""
    from zoomr_local.tally import has_failed

    ids = {str(problem.id) for problem in left}
    return lambda record: not (has_failed(record) and str(record["id"]) in ids)
