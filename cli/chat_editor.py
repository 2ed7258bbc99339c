"""A text in the user's own editor. `chat_commands.py` opens it; Ctrl-G in the line editor is prompt_toolkit's own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from zoomr_local.errors import UsageError

_FALLBACKS = ("editor", "nano", "vi")


def edited(text: str, whole: Callable[[], AbstractContextManager[None]] = nullcontext) -> str:
    """``text`` as it was left in $VISUAL or $EDITOR (else an editor that is installed), without the line end behind it; ``text``
    itself if nothing was changed.

    The editor is started within ``whole()``, which no signal may cut in two. The file that is edited is readable by its owner only
    and is removed. Raises UsageError if the editor cannot be started, fails, or leaves what is not text.
    """
    command = _command()
    file, name = tempfile.mkstemp(prefix="zoomr-", suffix=".md")
    path = Path(name)
    try:
        written = (text + "\n").encode("utf-8", "surrogateescape")
        with open(file, "wb") as out:
            out.write(written)
        code = _run([*command, name], whole)
        if code != 0:
            raise UsageError(f"{command[0]} ended with code {code}; nothing was changed")
        if path.read_bytes() == written:  # line ends included, at the end too
            return text
        return path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "what it left is not UTF-8"
        raise UsageError(f"{command[0]}: {reason}; set VISUAL or EDITOR to your editor") from None
    finally:
        path.unlink(missing_ok=True)


def _command() -> list[str]:
    for variable in ("VISUAL", "EDITOR"):
        try:
            words = shlex.split(os.environ.get(variable, ""))
        except ValueError:
            raise UsageError(f"{variable}={os.environ[variable]} is no command: a quote is open") from None
        if words:
            return words
    for name in _FALLBACKS:
        if shutil.which(name):
            return [name]
    raise UsageError("no editor is known; set VISUAL or EDITOR")


def _run(command: list[str], whole: Callable[[], AbstractContextManager[None]]) -> int:
    """The exit code. Ctrl-C is the editor's meanwhile: a handler, and not SIG_IGN, which the editor would inherit."""
    before, editor = signal.signal(signal.SIGINT, lambda *_: None), None
    try:
        with whole():  # told to end while it starts, the chat would leave it behind
            editor = subprocess.Popen(command)
        return editor.wait()
    except BaseException:
        if editor is not None:
            editor.kill()
            editor.wait()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
