"""Flags that only `zoomr solve` has. Owns their words; `solve.py` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_INPUT, _REPLIES, _RUN = "Input", "Replies", "Run"


def _option(panel: str | None, *names: str, **more) -> typer.models.OptionInfo:
    return typer.Option(*names, rich_help_panel=panel, **more)


Input = Annotated[str, typer.Argument(help="Problems: JSON lines, CSV, plain text or OpenAI batch lines; - is stdin.")]
InputFormat = Annotated[
    str | None,
    _option(
        _INPUT, "--input-format", metavar="FORM", show_default=False,
        help="jsonl, csv, lines, paragraphs or openai. Default: by the file's name, else by its content.",
    ),
]  # fmt: skip
Encoding = Annotated[
    str | None, _option(_INPUT, "--encoding", metavar="NAME", show_default=False, help="Of the input: cp1252, utf-16. Default: UTF-8, or its byte order mark.")
]
QuestionColumn = Annotated[
    str | None,
    _option(_INPUT, "--question-column", metavar="NAME", show_default=False, help="Column or key of the question. Default: question, problem or prompt."),
]
AnswerColumn = Annotated[
    str | None,
    _option(_INPUT, "--answer-column", metavar="NAME", show_default=False, help="Column or key of the reference. Default: answer, or solution in a table."),
]
IdColumn = Annotated[
    str | None, _option(_INPUT, "--id-column", metavar="NAME", show_default=False, help="Column or key of the id. Default: id; without any, the number of the row or line.")
]
Template = Annotated[
    str | None,
    _option(_INPUT, "--template", metavar="FILE|TEXT", show_default=False, help="Wraps a problem's fields: 'Q: {question}'. {{ and }} are braces."),
]
Limit = Annotated[int | None, _option(_INPUT, "--limit", metavar="N", min=1, help="Only the first N problems.")]

Output = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", metavar="FILE",
        help="One record a problem; - is stdout. Default: FILE.POLICY.out.jsonl here.",
    ),
]  # fmt: skip
OutputFormat = Annotated[str, typer.Option("--output-format", metavar="FORM", help="records, or openai: lines of OpenAI's batch results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Throw away the output's records and start again.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Solve the failed ones of an earlier run again, those out of time too.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and the first prompt; load no weights, write nothing.")]
CheckpointDir = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", metavar="DIR",
        help="Save the unfinished problem here now and then; the same command goes on in the middle of it.",
    ),
]  # fmt: skip
CheckpointEvery = Annotated[
    float | None,
    typer.Option("--checkpoint-every", metavar="SECONDS", min=0, help="Between two saves. Default: 30."),
]

Schema = Annotated[
    Path | None,
    _option(_REPLIES, "--schema", metavar="FILE", show_default=False, help="A JSON schema that every answer follows; thoughts are free."),
]
Votes = Annotated[int, _option(_REPLIES, "--votes", metavar="K", min=1, help="Replies to each problem, with seeds of their own; their answers are counted.")]
VoteBy = Annotated[
    str | None,
    _option(
        _REPLIES, "--vote-by", metavar="HOW", show_default=False,
        help="majority, or agreement: a reply weighs what share of the heads' votes fell on what was zoomed. Default: majority.",
    ),
]  # fmt: skip
Retries = Annotated[
    int, _option(_REPLIES, "--retries", metavar="N", min=0, help="Further tries, with other seeds, of a reply that failed or has no answer.")
]
Timeout = Annotated[
    float | None,
    _option(_REPLIES, "--timeout", metavar="SECONDS", show_default=False, help="Most time for a problem, all its replies together; what was written is kept."),
]
Grader = Annotated[
    str, _option(_REPLIES, "--grader", metavar="NAME", help="built-in, math-verify, or auto: math-verify if it is installed.")
]
ThinkBudget = Annotated[
    str | None,
    _option(
        "Sampling", "--think-budget", metavar="N|auto|off", show_default=False,
        help="Most tokens of thinking a reply, then it is handed over to its answer; auto keeps room for that. Default: off, loops too.",
    ),
]  # fmt: skip
