"""The program `zoomr`, and `python -m zoomr_cli`: the console script's module, which imports nothing heavy by itself.

Until the commands are imported Ctrl-C ends the process as it does later, with exit code 130 and without Python's traceback.
"""

from __future__ import annotations

import os
import signal
import sys

from . import INTERRUPTED

_COMPLETE = "_ZOOMR_COMPLETE"  # set by the shells' completion scripts
_NO_WRAPPING = "10000"


def run() -> int:
    """Run the process's command line; its exit code."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where a shell has it ignored in the background
        signal.signal(signal.SIGINT, _leave)
    if _COMPLETE in os.environ:
        os.environ["COLUMNS"] = _NO_WRAPPING  # a help text in two lines would be two completions
    open_streams()
    from .main import main

    try:
        signal.signal(signal.SIGINT, before)
        return main()
    except KeyboardInterrupt:  # a second one, while the first was being said
        return INTERRUPTED


def open_streams() -> None:
    """Where a stream is closed there is one that nobody reads, or an empty one; what an encoding cannot write is written as an escape."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    sys.stdout, sys.stderr = (open(os.devnull, "w") if stream is None else stream for stream in (sys.stdout, sys.stderr))
    if getattr(sys.stdout, "errors", None) == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)  # nothing is open yet, and an exception may end in the middle of an import that catches it


if __name__ == "__main__":
    raise SystemExit(run())
