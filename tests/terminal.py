"""`zoomr chat` in a real pseudo-terminal, and a recording of it (asciicast version 2). Tests only; needs pexpect.

A test meets the chat in a certain state however fast the machine is: once the screen shows the state the process is
stopped (`Terminal.standing_still`), keys are pressed, and it goes on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pexpect

PATIENCE_SECONDS = 180
PROMPT = ">>>"
COLUMNS, ROWS = 120, 50

_KEY_SECONDS, _LONGEST_PAUSE_SECONDS = 0.04, 1.0


class Cast:
    """What terminals showed, one after the other, as an asciicast: pauses are cut to a second, ``secret`` paths are written ``~``."""

    def __init__(self, secret: Path) -> None:
        self.secret = str(secret)
        self.events: list[tuple[float, str]] = []
        self._now, self._last = 0.0, time.monotonic()

    def write(self, data: str) -> None:
        """As a file: pexpect calls it with what it read."""
        now = time.monotonic()
        self._now, self._last = self._now + min(now - self._last, _LONGEST_PAUSE_SECONDS), now
        if self.events and any(self.events[-1][1].endswith(self.secret[:n]) for n in range(1, len(self.secret))):
            data = self.events.pop()[1] + data  # a path may be cut in two
        self.events.append((self._now, data.replace(self.secret, "~/.local/state")))

    def flush(self) -> None:
        """As a file."""

    def shell(self, command: str) -> None:
        """A command line, as if it had been typed."""
        self._last = 0.0
        self.write("$ ")
        for key in command + "\r\n":
            self._now += _KEY_SECONDS
            self._last = time.monotonic()
            self.write(key)

    def save(self, path: Path, title: str) -> None:
        header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": title, "env": {"TERM": "xterm"}}
        lines = [header, *([round(at, 3), "o", data] for at, data in self.events)]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


class Terminal:
    """A chat in a pseudo-terminal; its functions return the text that came since the last thing waited for."""

    def __init__(self, state: Path, *arguments: str, cast: Cast | None = None, within: str | None = None, **variables: str) -> None:
        """``within`` is a shell's program that runs the chat as ``"$@"``."""
        environment = {
            **os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", **variables,
        }  # fmt: skip
        for name in ("NO_COLOR", "ZOOMR_CAST"):
            environment.pop(name, None)
        command = ["chat", "--kv-budget", "256", "--temp", "0", *arguments]
        if cast is not None:
            cast.shell(" ".join(["zoomr", *command]))
        self.cast = cast
        program = [sys.executable, "-m", "zoomr_cli", *command]
        if within is not None:
            program = ["sh", "-c", within, "sh", *program]
        self.child = pexpect.spawn(
            program[0], program[1:], env=environment, encoding="utf-8", timeout=PATIENCE_SECONDS,
            dimensions=(ROWS, COLUMNS), codec_errors="replace",
        )  # fmt: skip
        self.child.logfile_read = cast
        self.child.delaybeforesend = 0.2

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.child.close(force=True)

    def wait(self, pattern: str) -> str:
        self.child.expect(pattern)
        return plain(self.child.before + self.child.after)

    def prompt(self) -> str:
        """What was written until the next prompt. The editor draws its prompt more than once; the last one counts."""
        text = self.wait(PROMPT)
        while self.child.expect([PROMPT, pexpect.TIMEOUT], timeout=1) == 0:
            text += plain(self.child.before)
        return text

    def begin(self, text: str, until: str) -> str:
        """Type a line; the text that came, up to ``until``."""
        if self.cast is not None and text.startswith("/"):
            for key in text:
                self.child.send(key)
                self.child.expect([pexpect.TIMEOUT], timeout=_KEY_SECONDS)
            text = ""
        self.child.send(text + "\r")
        return self.wait(until)

    def type(self, text: str, until: str) -> str:
        """Type a line; the text that came until ``until`` and then another prompt."""
        return self.begin(text, until) + self.prompt()

    @contextmanager
    def standing_still(self):
        """The process is stopped, all its threads with it; the keys that are sent inside are there when it goes on."""
        os.kill(self.child.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), "the chat had ended before it could be stopped"
        before, self.child.delaybeforesend = self.child.delaybeforesend, None
        try:
            yield
        finally:
            self.child.delaybeforesend = before
            os.kill(self.child.pid, signal.SIGCONT)

    def leave(self) -> int:
        self.child.send("\x04")
        return self.ended()

    def ended(self) -> int:
        """The exit code of a chat that was told to end."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus

    def close_window(self) -> int:
        """The kernel sends SIGHUP, and nothing can be written or read any more; the exit code."""
        self.child.ptyproc.fileobj.close()
        return self.child.wait()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
