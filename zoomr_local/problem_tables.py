"""Problems out of tables (CSV, TSV) and out of plain text. `problem_input.py` calls these; what a problem is, is `problems.py`'s."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from .errors import UsageError
from .problems import ANSWERS, QUESTIONS, Columns, Gathered, Problem, prompt_messages
from .sizes import counted

DELIMITERS = ",;\t"
CSV_EXAMPLE = "id,question,answer"
TEXT_EXAMPLE = "What is 2 + 2?"


def read_table(text: str, source: str, columns: Columns) -> list[Problem]:
    """Every problem of a table with a header row; rows without anything in them are passed over.

    The delimiter is the one of comma, semicolon and tab that shows a question's column in the header. A row's id is its
    ``id`` column, else its number among the rows. Raises UsageError that names the bad lines.
    """
    delimiter = delimiter_of(text, columns)
    gathered = Gathered(source)
    before = csv.field_size_limit(max(len(text), 1 << 17))  # a prompt may be longer than Python's own limit
    try:
        rows = _rows(text, delimiter, gathered)
        header_line, header = next(rows, (0, []))
        names = [name.strip() for name in header]
        if not header_line:
            return gathered.whole(CSV_EXAMPLE)
        found = _find(names, columns, source)
        for number, (line, row) in enumerate(rows, start=1):
            try:
                gathered.add(_of_row(dict(zip(names, _fitting(row, names))), number, line, found, columns))
            except ValueError as error:
                gathered.bad(line, str(error))
    finally:
        csv.field_size_limit(before)
    return gathered.whole(CSV_EXAMPLE)


def delimiter_of(text: str, columns: Columns = Columns()) -> str:
    """The delimiter under which the first row has a question's column, else a comma."""
    wanted = {columns.question} if columns.question else set(QUESTIONS)
    for delimiter in DELIMITERS:
        _, header = next(_rows(text[: 1 << 16], delimiter, Gathered("")), (0, []))
        names = {name.strip() for name in header}
        if wanted & (names if columns.question else {name.lower() for name in names}):
            return delimiter
    return ","


def has_question_column(text: str) -> bool:
    """Whether ``text`` begins with a header row of a table, as far as names tell."""
    _, header = next(_rows(text[: 1 << 16], delimiter_of(text), Gathered("")), (0, []))
    return len(header) > 1 and bool({name.strip().lower() for name in header} & set(QUESTIONS))


def read_text(text: str, source: str, columns: Columns, by: str) -> list[Problem]:
    """Every problem of plain text: ``by`` is "lines" (each that is not blank) or "paragraphs" (blank lines between them).

    Ids are numbers from 1. Raises UsageError for a text without any.
    """
    gathered = Gathered(source)
    if columns.question or columns.answer or columns.id:
        raise UsageError(f"{source} is read as plain text, which has no columns; name its form with --input-format")
    for number, (line, piece) in enumerate(_pieces(text, by), start=1):
        try:
            gathered.add(Problem(number, prompt_messages(piece, {"id": number}, columns.template), None, line))
        except ValueError as error:
            gathered.bad(line, str(error))
    return gathered.whole(TEXT_EXAMPLE)


def has_paragraphs(text: str) -> bool:
    """Whether blank lines stand between lines that are not."""
    return re.search(r"\S[^\S\n]*\n\s*\n\s*\S", _newlines(text)) is not None


def _newlines(text: str) -> str:
    return re.sub(r"\r\n?", "\n", text)


def _pieces(text: str, by: str) -> Iterator[tuple[int, str]]:
    """First line and text of each problem."""
    gathered: list[str] = []
    for line, content in enumerate([*_newlines(text).split("\n"), ""], start=1):
        if content.strip() and by == "paragraphs":
            gathered.append(content.rstrip())
        elif gathered:
            yield line - len(gathered), "\n".join(gathered)
            gathered = []
        elif content.strip():
            yield line, content.strip()


def _rows(text: str, delimiter: str, gathered: Gathered) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of each row that has any; what is no CSV is said to ``gathered``, and ends it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            gathered.bad(line, f"not CSV ({error}); quote cells that hold quotes, and double the quotes in them")
            return
        if any(cell.strip() for cell in row):
            yield line, row


def _fitting(row: list[str], names: list[str]) -> list[str]:
    if len(row) != len(names):
        raise ValueError(f"has {counted(len(row), 'cell')}, the header has {len(names)}; quote cells that hold the delimiter")
    return row


def _find(names: list[str], columns: Columns, source: str) -> dict[str, str | None]:
    """The column of question, answer and id. Raises UsageError if one that was named, or the question's, is not there."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{source}: the header has {twice[0]!r} more than once")
    lower = {name.lower(): name for name in reversed(names)}
    named = {"question": columns.question, "answer": columns.answer, "id": columns.id}
    for what, name in named.items():
        if name is not None and name not in names:
            raise UsageError(f"{source}: --{what}-column {name}: the header has {', '.join(names)}")
    for what, known in (("question", QUESTIONS), ("answer", ANSWERS), ("id", ("id",))):
        there = [lower[name] for name in known if name in lower and lower[name] not in named.values()]
        if named[what] is not None or not there:
            continue
        if len(there) > 1 and what == "question":
            raise UsageError(f"{source}: the header has {' and '.join(there)}; say which with --{what}-column")
        named[what] = there[0]
    if named["question"] is None and columns.template is None:
        raise UsageError(
            f"{source}: no column is called {', '.join(QUESTIONS[:-1])} or {QUESTIONS[-1]}; name it with --question-column,"
            f" one of: {', '.join(names)}"
        )
    return named


def _of_row(row: dict[str, str], number: int, line: int, found: dict[str, str | None], columns: Columns) -> Problem:
    """Raises ValueError with what is wrong with the row."""
    question, answer, identity = (None if found[what] is None else row[found[what]].strip() for what in ("question", "answer", "id"))
    if question == "":
        raise ValueError(f"{found['question']} is empty")
    if identity == "":
        raise ValueError(f"{found['id']} is empty")
    return Problem(identity or number, prompt_messages(question, row, columns.template), answer or None, line)
