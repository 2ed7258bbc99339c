"""Problems solved one at a time, each result one record.

Owns the record format. The command line, the demo and the benchmarks call it; it takes an engine and says what
happens to a listener, and knows nothing of terminals. What a problem is stands in `problems.py`, durability is
`journal.py`'s, the meaning of "right" `grading.py`'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from .attempts import AttemptLog
from .checkpoint import Checkpoint, Checkpoints
from .errors import StorageError, TierSizeError, UsageError
from .events import CacheStats, Event, Finished, Warned
from .grading import Grade, Grader
from .problems import SAMPLING_OPTIONS, Problem, read_problems
from .schema import compile_schema
from .tally import Tally
from .votes import elected

__all__ = ["Listener", "Problem", "Solver", "Tally", "kv_record", "read_problems", "solve_all"]

LASTING_ERRORS = ("UsageError", "BudgetError", "ModelError", "UnsupportedModel", "TierSizeError")
"""Another reply would meet them again."""

STOP_PASSED_OVER = "--stop is passed over: the problem's own schema says how its answer ends"

MOST_SEEDS = 2**32 - 1


class Listener(Protocol):
    """Who wants to know: called in this order for each problem, on the thread that decodes.

    A second reply to the same problem, for a vote or after a failure, is started once more, under a name of its own.
    """

    def started(self, problem: Problem) -> None: ...

    def event(self, event: Event) -> None: ...

    def finished(self, record: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Solver:
    """A model, an engine on it and the settings of every generation; turns problems into records.

    ``max_tokens`` bounds each reply, thoughts included. ``key`` gives a problem's resume key. ``stopping`` is
    asked after every event; once it says True the generation is given up and no further problem is begun. With
    ``checkpoints`` the unfinished reply is saved now and then and taken up where it was saved. ``limits`` gives the
    ThinkingLimits of a reply of so many tokens, which end thinking before the model does. ``votes`` replies are made of a
    problem, each with a seed of its own, and ``vote_by`` decides among them; a reply that failed or has no answer is made
    again up to ``retries`` times; after ``timeout_s`` seconds a problem ends with what there is. ``attempts`` keeps the
    replies of an unfinished one.
    """

    model: Any
    engine: Any
    sampling: Any
    max_tokens: int
    key: Callable[[Problem], str] = lambda problem: ""
    stopping: Callable[[], bool] = lambda: False
    debug: bool = False
    checkpoints: Checkpoints | None = None
    limits: Callable[[int], Any] | None = None
    grader: Any = Grader()
    votes: int = 1
    vote_by: str = "majority"
    retries: int = 0
    timeout_s: float | None = None
    attempts: AttemptLog = field(default_factory=AttemptLog)

    def solve(self, problem: Problem, listener: Listener) -> dict[str, Any] | None:
        """The record of one problem; None if it was given up because of ``stopping``.

        Whatever goes wrong inside one problem becomes its record, so that problem 3 of 500 cannot end a night's
        run; the type and message are kept. With ``debug`` it is raised instead, and so is a StorageError, as the next
        problem would meet the same tiers; not one by the problem's own length (TierSizeError).
        """
        if problem.refused is not None:
            return self._frame(problem, _failed("UnsupportedRequest", problem.refused), self.sampling.seed)
        try:
            sampling, max_tokens = self._settings(problem)
        except UsageError as error:
            return self._frame(problem, _failed(type(error).__name__, str(error)), self.sampling.seed)
        results: list[dict[str, Any]] = []
        time_left = self.timeout_s
        for vote in range(self.votes):
            result, time_left = self._vote(problem, sampling, max_tokens, vote, time_left, listener)
            if result is None:
                return None
            results.append(result)
            if time_left is not None and time_left <= 0:
                break
        seed = results[0]["seed"]
        result = results[0] if self.votes == 1 else elected(results, self.vote_by, self.votes, self.grader.same)
        if len(results) < self.votes or any(r["finish_reason"] == "timeout" for r in results):
            result["finish_reason"] = "timeout"
        return self._frame(problem, result, seed)

    def _settings(self, problem: Problem) -> tuple[Any, int]:
        """Sampling and length of a problem's replies. Raises UsageError."""
        own = {name: value for name, value in problem.options.items() if name in SAMPLING_OPTIONS}
        if "stop" in problem.options:
            own["stop"] = tuple(problem.options["stop"])
        elif "schema" in problem.options:
            own["stop"] = ()  # it could cut what the schema asks for
        if "schema" in problem.options:
            own["grammar"] = compile_schema(problem.options["schema"], f"the schema of {problem.id}").grammar
        sampling = replace(self.sampling, **own) if own else self.sampling
        if self.votes > 1 and sampling.temperature <= 0:
            raise UsageError("several votes need a temperature above 0: greedy replies are all the same")
        return sampling, problem.options.get("max_tokens", self.max_tokens)

    def _vote(
        self, problem: Problem, sampling: Any, max_tokens: int, vote: int, time_left: float | None, listener: Listener
    ) -> tuple[dict[str, Any] | None, float | None]:
        """One reply that counts, with what was tried before it, and the seconds that are left; None if it was given up."""
        tried: list[dict[str, Any]] = []
        for attempt in range(self.retries + 1):
            seed = (sampling.seed + vote + attempt * self.votes) % MOST_SEEDS
            result = self.attempts.get(self.key(problem), vote, attempt)
            if result is None:
                if vote or attempt:
                    names = [f"vote {vote + 1}"] * (self.votes > 1) + [f"try {attempt + 1}"] * bool(attempt)
                    listener.started(replace(problem, id=", ".join([str(problem.id), *names])))
                result = self._attempt(problem, replace(sampling, seed=seed), max_tokens, time_left, listener)
                if result is None:
                    return None, time_left
                if self.votes > 1 or self.retries:
                    self.attempts.add(self.key(problem), vote, attempt, result)
                    self._forget_checkpoint(problem)
            seconds = result.pop("seconds")
            time_left = None if time_left is None else time_left - seconds
            tried.append({**result, "seed": seed})
            if not self._is_tried_again(result, sampling):
                break
            if time_left is not None and time_left <= 0:
                if attempt < self.retries and "error" not in result:
                    tried[-1]["finish_reason"] = "timeout"  # no answer, and no time for the try that was to follow
                break
        last = tried[-1]
        if len(tried) > 1:
            last["tries"] = [{name: r[name] for name in ("seed", "finish_reason", "error") if name in r} for r in tried]
        return last, time_left

    def _is_tried_again(self, result: dict[str, Any], sampling: Any) -> bool:
        """Errors that another reply could escape, and, where another seed makes another reply, one without an answer."""
        if "error" in result:
            return result["error"]["type"] not in LASTING_ERRORS
        return sampling.temperature > 0 and not (result["answer"] and result.get("valid", True))

    def _attempt(
        self, problem: Problem, sampling: Any, max_tokens: int, time_left: float | None, listener: Listener
    ) -> dict[str, Any] | None:
        """The result of one reply; None if it was given up. ``seconds`` in it is how long it took."""
        checkpoint = self.checkpoints.of(self.key(problem)) if self.checkpoints else None
        warnings: list[str] = list(problem.notes)
        if self.sampling.stop and "schema" in problem.options and "stop" not in problem.options:
            warnings.append(STOP_PASSED_OVER)
        began = time.monotonic()
        try:
            done = self._generate(problem, sampling, max_tokens, time_left, listener, warnings, checkpoint)
            if done is None or done.reason == "cancelled":
                return None
            result = self._result(done, problem.answer, sampling.grammar is not None)
        except Exception as error:
            if self.debug or self._ends_the_run(error, checkpoint):
                raise
            return {**_failed(type(error).__name__, str(error)), "seconds": round(time.monotonic() - began, 3)}
        if warnings:
            result["warnings"] = warnings
        if checkpoint is not None and checkpoint.resumed:
            result["resumed"] = checkpoint.resumed
        before = 0.0 if checkpoint is None else checkpoint.seconds
        return {**result, "seconds": round(before + time.monotonic() - began, 3)}

    def _ends_the_run(self, error: Exception, checkpoint: Checkpoint | None) -> bool:
        """A full tier does; one that this problem alone is too long for does not, unless its record would throw a checkpoint away."""
        begun = checkpoint is not None and checkpoint.path.exists()
        return isinstance(error, StorageError) and (begun or not isinstance(error, TierSizeError))

    def _generate(
        self, problem: Problem, sampling: Any, max_tokens: int, time_left: float | None, listener: Listener,
        warnings: list[str], checkpoint: Checkpoint | None,
    ) -> Finished | None:  # fmt: skip
        def start() -> Iterator[Event]:
            tokens = self.model.tokenize(self.model.render(list(problem.messages)))
            limited = {} if self.limits is None else {"limits": self.limits(max_tokens)}
            return self.engine.generate(tokens, sampling, max_tokens, **limited)

        events = start() if checkpoint is None else checkpoint.events(self.engine, start, f"problem {problem.id}", sampling.seed)
        if checkpoint is not None:
            warnings.extend(text for text in checkpoint.warnings if text not in warnings)
        end = None if time_left is None else time.monotonic() + time_left - (0.0 if checkpoint is None else checkpoint.seconds)
        late = False
        # Closing the generator rather than asking the engine to cancel: that also ends a long prompt's prefill.
        with closing(events):
            for event in events:
                listener.event(event)
                if isinstance(event, Warned):
                    warnings.append(event.message)
                if isinstance(event, Finished):
                    return replace(event, reason="timeout") if late and event.reason == "cancelled" else event
                stopping = self.stopping()
                if checkpoint is not None:
                    checkpoint.tick(self.engine, warnings, now=stopping)
                if stopping:
                    return None
                if end is not None and not late and time.monotonic() >= end:
                    late = True
                    self.engine.cancel()  # it still says what was written, which a closed generator does not
        raise RuntimeError("the engine ended without saying how")

    def _result(self, done: Finished, expected: str | None, held: bool) -> dict[str, Any]:
        data = _held_data(done) if held else None
        if not held:
            graded = self.grader.grade(done.content, expected)
        elif data is None:
            graded = Grade("", None if expected is None else False)
        else:
            graded = self.grader.compare(_answer_of(data[0]), expected)
        result: dict[str, Any] = {
            "answer": graded.answer, "content": done.content, "reasoning": done.reasoning, "finish_reason": done.reason,
        }  # fmt: skip
        if held:
            result["valid"] = data is not None
        if done.thinking_cut is not None:
            result["thinking_cut"] = done.thinking_cut
        if graded.correct is not None:
            result["correct"], result["grader"] = graded.correct, graded.grader
        return {**result, **_costs(done)}

    def forget(self, problem: Problem) -> None:
        """Its record is on the disk: what was kept to go on with it is of no use any more."""
        self._forget_checkpoint(problem)
        self.attempts.forget(self.key(problem))

    def _forget_checkpoint(self, problem: Problem) -> None:
        if self.checkpoints is not None:
            self.checkpoints.of(self.key(problem)).remove()

    def _frame(self, problem: Problem, result: dict[str, Any], seed: int) -> dict[str, Any]:
        return {"id": problem.id, **result, "seed": seed, "model": self.model.name, "key": self.key(problem)}


def solve_all(
    problems: Sequence[Problem], solver: Solver, write: Callable[[dict[str, Any]], None], listener: Listener
) -> bool:
    """Solve in order; each record is handed to ``write`` before the listener hears of it.

    Returns False if it was told to stop on the way. What ``write`` raises (a full disk) ends the run.
    """
    for problem in problems:
        if solver.stopping():
            return False
        listener.started(problem)
        record = solver.solve(problem, listener)
        if record is None:
            return False
        write(record)
        solver.forget(problem)
        listener.finished(record)
    return True


def _failed(kind: str, message: str) -> dict[str, Any]:
    return {"answer": "", "content": "", "reasoning": "", "finish_reason": "error", "error": {"type": kind, "message": message}}


def _held_data(done: Finished) -> tuple[Any] | None:
    """What a reply that was held to a schema says; None if it was cut off: its model ends it only where it validates."""
    try:
        return (json.loads(done.content),) if done.reason == "stop" else None
    except ValueError:
        return None


def _answer_of(data: Any) -> str:
    """The property ``answer`` of an object, else all of it; text as it is, anything else as JSON."""
    if isinstance(data, dict) and "answer" in data:
        data = data["answer"]
    return data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)


def _costs(done: Finished) -> dict[str, Any]:
    rate = done.completion_tokens / done.decode_seconds if done.decode_seconds > 0 else None
    return {
        "usage": {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "reasoning_tokens": done.reasoning_tokens,
        },
        "timing": {
            "prefill_s": round(done.prefill_seconds, 6),
            "decode_s": round(done.decode_seconds, 6),
            "tokens_per_s": None if rate is None else round(rate, 2),
        },
        "kv": kv_record(done.cache),
    }


def kv_record(cache: CacheStats) -> dict[str, Any]:
    """The ``kv`` part of a record. Sizes ending in ``bytes`` are bytes, the others tokens or counts."""
    short = ("budget_tokens", "allocated_tokens", "resident_peak_tokens", "resident_mean_tokens")
    fields = {name.removesuffix("_tokens") if name in short else name: value for name, value in asdict(cache).items()}
    fields["resident_mean"] = round(fields["resident_mean"], 1)
    if fields["agreement"] is not None:
        fields["agreement"] = round(fields["agreement"], 4)
    return fields
