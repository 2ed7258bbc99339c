"""How `zoomr solve` replies to each problem: votes, tries, time, schema, grader, and the form of its records.

Owns what these flags mean together and what of them a record depends on. `solve.py` makes one, `solve_job.py` uses it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import UsageError
from zoomr_local.sizes import counted

if TYPE_CHECKING:
    from zoomr_local.journal import LineForm
    from zoomr_local.problems import Problem

    from .solve_input import HeldTo

GRADERS = ("auto", "built-in", "math-verify")
OUTPUT_FORMS = ("records", "openai")


@dataclass(frozen=True)
class Replies:
    """The flags of these names; ``timeout`` in seconds, ``held`` from ``--schema``."""

    votes: int = 1
    vote_by: str | None = None
    retries: int = 0
    timeout: float | None = None
    held: HeldTo | None = None
    grader: str = "built-in"
    output_form: str = "records"

    def check(self, policy: str, temperature: float, stop: Sequence[str] | None) -> None:
        """Raises UsageError for flags that do not go together."""
        from zoomr_local.policies import POLICIES
        from zoomr_local.votes import BY

        for flag, value, known in (
            ("--grader", self.grader, GRADERS), ("--output-format", self.output_form, OUTPUT_FORMS), ("--vote-by", self.vote_by or BY[0], BY),
        ):  # fmt: skip
            if value not in known:
                raise UsageError(f"{flag} {value}: choose one of {', '.join(known)}")
        if self.vote_by is not None and self.votes < 2:
            raise UsageError(f"--vote-by {self.vote_by} needs votes to count; give --votes 2 or more")
        if self.vote_by == "agreement" and not POLICIES[policy].uses_votes:
            raise UsageError(f"--vote-by agreement weighs by the heads' votes, which --policy {policy} does not count; take --vote-by majority")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise UsageError(f"--timeout {self.timeout:g}: give a number of seconds above 0")
        if self.held is not None and stop:
            raise UsageError("--stop could cut what --schema asks for; leave one of them out")
        if self.grader == "math-verify":
            from zoomr_local.math_grader import installed

            if not installed():
                raise UsageError("--grader math-verify: it is not installed; pip install math-verify")

    def check_problems(self, problems: Sequence[Problem], temperature: float, stop: Sequence[str] | None, quiet: bool) -> None:
        """Raises UsageError where several greedy replies would be made; says where a greedy one would not be tried again, and what of
        the problems is not heeded."""
        asked = [problem for problem in problems if problem.refused is None]
        own = [problem for problem in asked if problem.options.get("temperature", 1) <= 0]
        greedy = bool(own) or temperature <= 0 and any("temperature" not in problem.options for problem in asked)
        if own and self.votes > 1:
            more = f" and {len(own) - 1:,} more ask for a temperature of 0 themselves" if len(own) > 1 else " asks for a temperature of 0 itself"
            raise UsageError(
                f"--votes {self.votes}: {own[0].id} (line {own[0].line}){more}, and greedy replies are all the same; take it out of the input,"
                " or leave out --votes"
            )
        if greedy and self.votes > 1:
            raise UsageError(f"--votes {self.votes} with a temperature of 0: greedy replies are all the same; give --temp, for example 0.7")
        if greedy and self.retries and not quiet:
            print("note: at a temperature of 0 a reply without an answer would come again, so --retries is for errors only", file=sys.stderr)
        counts = Counter(note for problem in problems for note in problem.notes)
        if stop and (n := sum("schema" in problem.options and "stop" not in problem.options for problem in asked)):
            from zoomr_local.solve import STOP_PASSED_OVER

            counts[STOP_PASSED_OVER] = n
        for note, n in counts.items() if not quiet else ():
            print(f"note: {note} (of {counted(n, 'problem')})", file=sys.stderr)

    def check_grammar(self, model: Any) -> None:
        """Raises UsageError if llama.cpp cannot use the schema's grammar."""
        from zoomr_local.constraint import Constraint

        if self.held is not None and hasattr(model, "llama"):
            Constraint(model, (), self.held.grammar).close()

    def settings(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """What of this a record depends on, by name; nothing for what is not used, as in outputs of earlier versions."""
        found: dict[str, Any] = {}
        if self.votes > 1:
            found |= {"votes": self.votes, "vote_by": self.vote_by or "majority"}
        if self.retries:
            found["retries"] = self.retries
        if self.held is not None:
            found["schema"] = self.held.hash
        if self._uses_math(problems):
            from zoomr_local.math_grader import version

            found["grader"] = f"math-verify {version()}"
        if self.output_form != "records":
            found["output_format"] = self.output_form
        return found

    def _uses_math(self, problems: Sequence[Problem]) -> bool:
        from zoomr_local.math_grader import installed

        if self.grader == "auto" and self.votes == 1 and all(problem.answer is None for problem in problems):
            return False  # nothing is compared
        return self.grader == "math-verify" or self.grader == "auto" and installed()

    @contextmanager
    def grader_for(self, problems: Sequence[Problem]) -> Iterator[Any]:
        """Who finds and compares answers; ended at the end."""
        from zoomr_local.grading import Grader
        from zoomr_local.math_grader import MathGrader

        grader = MathGrader(lambda text: print(text, file=sys.stderr)) if self._uses_math(problems) else Grader()
        try:
            yield grader
        finally:
            grader.close()

    def line_form(self) -> LineForm:
        """How records stand in the output."""
        from zoomr_local.journal import LineForm
        from zoomr_local.openai_batch import record_of, result_line

        return LineForm(result_line, record_of) if self.output_form == "openai" else LineForm()
