"""The application: joins the commands, and turns every error into one line and an exit code.

Entry point of the console script `zoomr`. Exit codes: 0 done, 1 failed, 2 used wrongly, 3 some problems failed,
130 interrupted. ZOOMR_DEBUG=1 lets errors through with their traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from zoomr_local.errors import ZoomrError

from . import INTERRUPTED, bench, calibrate, chat, config, demo, doctor, models, plan, policies, problems, solve, view
from .eval import evaluation
from .settings import ConfiguredGroup

_CONTROLS = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), 0x7F, *range(0x80, 0xA0)])

app = typer.Typer(
    name="zoomr",
    cls=ConfiguredGroup,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 used wrongly, 3 some problems failed, 130 interrupted.",
)
app.command("chat")(chat.chat)
app.command("solve")(solve.solve)
app.command("demo")(demo.demo)
app.command("view")(view.view)
app.command("plan")(plan.plan)
app.command("eval")(evaluation)
app.command("problems")(problems.problems)
app.command("bench")(bench.bench)
app.command("policies")(policies.policies)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(models.app)
app.command("doctor")(doctor.doctor)
app.add_typer(config.app)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    from .versions import printed_versions

    print(printed_versions())
    raise typer.Exit


@app.callback()
def zoomr(
    version: Annotated[
        bool, typer.Option("--version", help="Versions of zoomr, its bindings and the engine.", is_eager=True, callback=_print_versions)
    ] = False,
) -> None:
    """Let a GGUF model think as long as it needs inside a KV cache of fixed size."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; default: the process's own) and return its exit code."""
    debug = bool(os.environ.get("ZOOMR_DEBUG"))
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv), debug)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, as an error while Python ends could only be a traceback
        return code
    except BrokenPipeError:
        # Whoever read us (head, a pager) has gone: nothing is wrong, and nobody is left to tell.
        _leave_broken_pipes()
        return 1
    except OSError as error:
        if debug:
            raise
        return _fail(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}", 1)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        # `obj` reaches the commands as their context's: `solve` prints the line that goes on after an interruption.
        return app(args=arguments, prog_name="zoomr", standalone_mode=False, obj=arguments) or 0
    except ZoomrError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except _CommandLineError as error:
        where = f" (see `{error.ctx.command_path} --help`)" if getattr(error, "ctx", None) else ""
        message = error.format_message().rstrip(".") + _of_missing(error)
        return _fail(message + where, error.exit_code) if message else error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)


def _of_missing(error: Exception) -> str:
    """What an argument is for that was left out."""
    text = getattr(getattr(error, "param", None), "help", None)
    return f": {text.rstrip('.')}" if text and type(error).__name__ == "MissingParameter" else ""


def _leave_broken_pipes() -> None:
    """Send what is still to be written to nobody, where nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message: str, code: int) -> int:
    print(f"error: {message.translate(_CONTROLS)}", file=sys.stderr)  # files of strangers are quoted in it
    return code


# Typer bundles its own copy of click in some versions and depends on click in others; the class that both
# hang their command-line errors from is found through one that typer exports in all of them.
_CommandLineError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
