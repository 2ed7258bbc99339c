"""`zoomr problems`: writes problems with exact answers, ready for `zoomr solve`. The tasks are `zoomr_models.tasks`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from zoomr_local.errors import UsageError
from zoomr_local.files import write_new
from zoomr_local.sizes import counted


def problems(
    family: Annotated[str, typer.Argument(help="dag (named sums), ledger (accounts), linsys (equations) or series (a recurrence).")],
    count: Annotated[int, typer.Option("-n", "--n", metavar="N", min=1, help="How many different problems.")] = 100,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Equal seeds give equal problems.")] = 0,
    thoughts: Annotated[int, typer.Option("--thoughts", metavar="N", min=1, help="Steps each problem takes.")] = 8,
    split: Annotated[str, typer.Option("--split", metavar="NAME", help="train, dev or test; no problem is in two of them.")] = "test",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A new file. Default: stdout.")
    ] = None,
) -> None:
    """Write generated problems as JSONL: id, prompt, answer, family, thoughts."""
    from zoomr_models.tasks import FAMILIES, generate

    if family not in FAMILIES:
        raise UsageError(f"no family {family!r}; there are {', '.join(sorted(FAMILIES))}")
    try:
        drawn = generate(family, count, seed, thoughts, split)
    except ValueError as error:
        raise UsageError(str(error)) from error
    lines = "".join(
        json.dumps({"id": p.id, "prompt": p.prompt, "answer": p.answer, "family": family, "thoughts": thoughts}) + "\n"
        for p in drawn
    )
    if output is None or str(output) == "-":
        sys.stdout.write(lines)
        sys.stdout.flush()
        return
    try:
        write_new(output, lines)
    except FileExistsError as error:
        raise UsageError(f"{output} exists; remove it or choose another file with -o") from error
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}; choose another file with -o") from None
    print(f"{counted(len(drawn), 'problem')} in {output}; next: zoomr solve {output}", file=sys.stderr)
