"""The files that `zoomr solve` reads: the problems, the template around them, the schema of their answers. `solve.py` calls it."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoomr_local.errors import UsageError
from zoomr_local.sizes import counted

if TYPE_CHECKING:
    from zoomr_local.problems import Problem
    from zoomr_local.template import Template

STDIO = "-"


@dataclass(frozen=True)
class Source:
    """Where problems stand, as flags say it. ``name`` is a path or ``-``."""

    name: str
    form: str | None = None
    encoding: str | None = None
    question: str | None = None
    answer: str | None = None
    id: str | None = None
    template: str | None = None

    def read(self, quiet: bool) -> list[Problem]:
        """All problems; a form that was taken for one by its content is said on stderr. Raises UsageError."""
        from zoomr_local.problem_input import read_input
        from zoomr_local.problems import Columns

        columns = Columns(self.question, self.answer, self.id, None if self.template is None else template_of(self.template))
        shown = "standard input" if self.name == STDIO else self.name
        found = read_input(self._bytes(), shown, self.form, self.encoding, columns)
        if found.guessed and found.form in ("lines", "paragraphs") and not quiet:
            one = found.form.removesuffix("s")
            print(f"{shown}: {counted(len(found.problems), 'problem')}, one a {one} (--input-format says otherwise)", file=sys.stderr)
        return found.problems

    def _bytes(self) -> bytes:
        if self.name == STDIO:
            if sys.stdin.isatty():
                print("problems are read from the terminal; Ctrl-D ends them", file=sys.stderr)
            return sys.stdin.buffer.read()
        try:
            return Path(self.name).read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot read {self.name}: {why}; give a file of problems, or - for stdin") from error


def template_of(text: str) -> Template:
    """The template that ``--template`` names or is: the file of that name if there is one. Raises UsageError."""
    from zoomr_local.template import Template

    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # longer than a name may be
        is_file = False
    if is_file:
        return Template.parse(_text_of("--template", Path(text)).removesuffix("\n"))
    if "{" not in text:
        raise UsageError(f"--template {text[:200]}: there is no such file, and as text it has no {{field}}")
    return Template.parse(text)


@dataclass(frozen=True)
class HeldTo:
    """A schema that answers are held to: its ``grammar``, and a ``hash`` that says whether two are the same."""

    grammar: str
    hash: str


def schema_of(path: Path, quiet: bool) -> HeldTo:
    """The schema in a file; what of it is not held is said on stderr. Raises UsageError."""
    from zoomr_local.schema import compile_schema, parse_schema

    data = parse_schema(_text_of("--schema", path), f"--schema {path}")
    compiled = compile_schema(data, f"--schema {path}")
    for note in compiled.notes if not quiet else ():
        print(f"note: --schema {path}: {note}", file=sys.stderr)
    return HeldTo(compiled.grammar, hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16])


def _text_of(flag: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path}: not UTF-8 (byte {error.start + 1})") from None
