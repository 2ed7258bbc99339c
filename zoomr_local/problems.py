"""What is asked: one problem, and JSON lines of them read and checked as a whole.

Owns `Problem`, which every reader makes, the list of bad lines, and what a row's fields mean. `problem_input.py` finds
the reader for a file; `solve.py` solves what comes out of it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError
from .sizes import counted
from .template import Template

QUESTIONS = ("question", "problem", "prompt")
ANSWERS = ("answer", "solution")
"""Columns that are found without being named."""

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "repeat_last_n", "seed")
"""Of a problem's own options those that are fields of SamplingParams, by the same name."""

_LISTED_ERRORS = 10  # bad lines named before "and N more": a screenful


@dataclass(frozen=True)
class Problem:
    """One problem of an input. ``messages`` are role and content; ``answer`` is the reference, if there is one.

    ``options`` is what it asks for itself, in place of the run's: max_tokens, stop, schema, and `SAMPLING_OPTIONS`.
    ``refused`` says why it cannot be solved at all, ``notes`` what of it is not heeded.
    """

    id: str | int
    messages: tuple[dict[str, str], ...]
    answer: str | None
    line: int
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    notes: tuple[str, ...] = ()

    def asked(self) -> dict[str, Any]:
        """What the resume key is made of."""
        more = {"options": dict(self.options)} if self.options else {}
        return {"id": self.id, "messages": list(self.messages), "answer": self.answer, **more}


@dataclass(frozen=True)
class Columns:
    """Where question, answer and id stand in a row, None for where they are by themselves; ``template`` wraps the question."""

    question: str | None = None
    answer: str | None = None
    id: str | None = None
    template: Template | None = None


class Gathered:
    """The problems of one input so far, and its bad lines. ``what`` is how messages call a line of it."""

    def __init__(self, source: str, what: str = "line") -> None:
        self._source, self._what = source, what
        self._problems: list[Problem] = []
        self._bad: list[str] = []
        self._seen: dict[str, int] = {}

    def add(self, problem: Problem) -> None:
        """One more; an id that was there already is a bad line."""
        first = self._seen.setdefault(str(problem.id), problem.line)
        if first != problem.line:
            self.bad(problem.line, f"id {json.dumps(problem.id)} stands in {self._what} {first} already")
        self._problems.append(problem)

    def bad(self, line: int, why: str) -> None:
        """Line ``line`` cannot be used."""
        self._bad.append(f"{self._what} {line}: {why}")

    def whole(self, example: str) -> list[Problem]:
        """All of them. Raises UsageError that names every bad line (the first ten in full) or says that there is nothing."""
        bad = self._bad
        if bad:
            more = [f"and {len(bad) - _LISTED_ERRORS:,} more"] if len(bad) > _LISTED_ERRORS else []
            listing = "".join(f"\n  {entry}" for entry in bad[:_LISTED_ERRORS] + more)
            raise UsageError(f"{self._source}: {counted(len(bad), f'bad {self._what}')}; nothing was run{listing}")
        if not self._problems:
            raise UsageError(f"{self._source} holds no problems; a {self._what} looks like {example}")
        return self._problems


def read_problems(lines: Iterable[bytes], source: str, columns: Columns = Columns()) -> list[Problem]:
    """Every problem of JSON lines; blank lines are passed over.

    A line is an object with ``id`` (text or a whole number, unique; where no line has one the lines are numbered), one of
    ``prompt``, ``question`` and ``problem`` (text) or ``messages`` (a list of ``{"role", "content"}``), and perhaps ``answer``
    (text or a number); other keys are left alone. Raises UsageError that names every bad line (the first ten in full) or
    says that the input is empty.
    """
    lines = list(lines)
    refuse_one_document(lines, source)
    gathered = Gathered(source)
    rows = list(json_lines(lines, gathered))
    numbered = columns.id is None and not any("id" in data for _, data in rows)
    for row, (number, data) in enumerate(rows, start=1):
        try:
            gathered.add(_problem({"id": row, **data} if numbered else data, number, columns))
        except ValueError as error:
            gathered.bad(number, str(error))
    return gathered.whole('{"id": "a", "prompt": "What is 2 + 2?"}')


def refuse_one_document(lines: Sequence[bytes], source: str) -> None:
    """Raises UsageError, with the way to make lines of it, for a file that is one JSON array, or one object over several lines."""
    first = next((line.strip() for line in lines if line.strip()), b"")
    if not first.startswith((b"[", b"{")) or _decoded(first) is not None and not first.startswith(b"["):
        return
    whole = _decoded(b"\n".join(lines))
    if isinstance(whole, list) and all(isinstance(entry, dict) for entry in whole):
        what, path = f"one JSON array of {counted(len(whole), 'entry', 'entries')}", ".[]"
    elif isinstance(whole, dict):
        what = "one JSON object over several lines"
        path = next((f".{name}[]" for name, value in whole.items() if isinstance(value, list) and re.fullmatch(r"\w+", name, re.ASCII)), ".")
    else:
        return
    raise UsageError(f"{source} is {what}, not one object a line; make lines of it: jq -c {shlex.quote(path)} {shlex.quote(source)} > lines.jsonl")


def _decoded(data: bytes) -> Any:
    """The JSON in ``data``, None where it is none that can be read."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def json_lines(lines: Iterable[bytes], gathered: Gathered) -> Iterable[tuple[int, dict[str, Any]]]:
    """The number and the object of every line that is not blank; what is none is said to ``gathered``."""
    for number, raw in enumerate(lines, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            gathered.bad(number, f"not UTF-8 (byte {error.start + 1})")
            continue
        if not text.strip():
            continue
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            gathered.bad(number, f"not JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            gathered.bad(number, "not JSON (nested too deeply)")
        except ValueError:  # Python's own limit
            gathered.bad(number, "not JSON that can be read (a number of thousands of digits)")
        else:
            if isinstance(data, dict):
                yield number, data
            else:
                gathered.bad(number, f"a JSON object is needed, not {type(data).__name__}")


def _problem(data: dict[str, Any], number: int, columns: Columns) -> Problem:
    """One checked line. Raises ValueError with what is wrong with it."""
    id_name = columns.id or "id"
    if not _is_text_or_int(data.get(id_name)):
        raise ValueError(f'needs an "{id_name}" (text or a whole number)')
    answer_name = columns.answer or "answer"
    answer = data.get(answer_name)
    if columns.answer and columns.answer not in data:
        raise ValueError(f'has no "{columns.answer}"')
    if answer is not None and not (_is_text_or_int(answer) or isinstance(answer, float)):
        raise ValueError(f'"{answer_name}" must be text or a number')
    return Problem(data[id_name], _messages(data, columns), None if answer is None else str(answer), number)


def _is_text_or_int(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _messages(data: dict[str, Any], columns: Columns) -> tuple[dict[str, str], ...]:
    name = columns.question
    if name is None:
        known = ("messages", "prompt", "question", "problem")
        there = [key for key in known if data.get(key) is not None] or [key for key in known if key in data]
        if len(there) > 1:
            raise ValueError(f"has {' and '.join(json.dumps(key) for key in there)}; say which with --question-column, or leave one of them out")
        name = there[0] if there else None
    elif name not in data:
        raise ValueError(f'has no "{name}"')
    if name == "messages":
        return _of_template(checked_messages(data["messages"]), data, columns.template)
    if name is None and columns.template is None:
        near = next((key for key in data if key.strip().lower() in ("messages", *QUESTIONS)), None)
        hint = f"; {json.dumps(near)} is one with --question-column" if near else "; --question-column names another key"
        raise ValueError(f'needs "prompt", "question", "problem" or "messages", has none of them{hint}')
    question = None if name is None else data[name]
    if name is not None and (not isinstance(question, str) or not question.strip()):
        raise ValueError(f'"{name}" must be text that is not empty')
    return prompt_messages(question, data, columns.template)


def _of_template(messages: tuple[dict[str, str], ...], data: dict[str, Any], template: Template | None) -> tuple[dict[str, str], ...]:
    """``messages`` with the last user's wrapped."""
    if template is None:
        return messages
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError("the template wraps the last user's message, and there is none")
    asked = messages[users[-1]]["content"]
    wrapped = prompt_messages(asked, {k: v for k, v in data.items() if k != "messages"}, template)[0]
    return (*messages[: users[-1]], wrapped, *messages[users[-1] + 1 :])


def checked_messages(messages: Any) -> tuple[dict[str, str], ...]:
    """``messages`` with roles and contents only. Raises ValueError for what is none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list that is not empty')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError('every message needs a "role" and a "content", both text')
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def prompt_messages(question: str | None, fields: Mapping[str, Any], template: Template | None) -> tuple[dict[str, str], ...]:
    """One user's message: the question, or the template with the row's fields; ``question`` is always one of them.

    Raises ValueError for a field that is not there, and for a prompt that comes out empty.
    """
    text = question or ""
    if template is not None:
        known = {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for name, value in fields.items()}
        text = template.fill({**known, **({} if question is None else {"question": question})})
        if not text.strip():
            raise ValueError("the template and its fields make an empty prompt")
    return ({"role": "user", "content": text},)
