"""What a person types in a chat: a line editor between replies, and two keys while the model writes.

prompt_toolkit is imported when a chat begins, never before.
"""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zoomr_local.errors import ZoomrError

QUOTES = '"""'
ANSWER_NOW = b"\x14"  # Ctrl-T


def is_open(text: str) -> bool:
    """Whether ``text`` has begun a block of lines with three quotes and not ended it."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def unquoted(text: str) -> str:
    """What was meant by what was typed: without the quotes of a block, else without white space around it."""
    text = text.strip()
    if text.startswith(QUOTES) and not is_open(text):
        return text[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


def decoded(data: bytes, source: str, warn: Callable[[str], None]) -> str:
    """``data`` as text. What is not UTF-8 is replaced, and that is said by ``warn``."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        warn(f"warning: {source} is not UTF-8 from byte {error.start:,} on; what is not is replaced by \ufffd")
        return data.decode("utf-8", "replace")


class LineEditor:
    """Asks for a message. Enter sends, Alt-Enter is a new line, and so is Enter inside three quotes; a paste is one message."""

    def __init__(self, commands: list[str] | Callable[[], list[str]], history: Path | None) -> None:
        """``commands``, or what they are then, complete with Tab. Without ``history`` nothing that is typed is written down."""
        try:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
            from prompt_toolkit.history import FileHistory, InMemoryHistory
        except ImportError:
            raise ZoomrError("zoomr chat needs prompt_toolkit; install it: pip install prompt_toolkit") from None

        class KeptHistory(FileHistory):
            """A message is sent also if it cannot be written to the history; that is said once."""

            failed = False

            def store_string(self, string: str) -> None:
                try:
                    super().store_string(string)
                except (OSError, UnicodeError) as error:
                    if not self.failed:
                        reason = getattr(error, "strerror", None) or "it is not UTF-8"
                        print(f"\r\nwarning: what is typed is not kept in {self.filename}: {reason}", file=sys.stderr)
                    self.failed = True

        completer = WordCompleter(commands, sentence=True)
        self._session: Any = PromptSession(
            history=KeptHistory(str(history)) if history else InMemoryHistory(), completer=completer,
            complete_while_typing=False, multiline=True, key_bindings=_bindings(), prompt_continuation="... ",
            tempfile_suffix=".md",
        )  # fmt: skip

    def ask(self, typed_ahead: str = "") -> str:
        """What was typed. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt(">>> ", default=typed_ahead)


def _bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.newline()

    @keys.add("c-g")
    def editor(event: Any) -> None:
        event.current_buffer.open_in_editor()

    return keys


class Keys:
    """The terminal while the model writes: Ctrl-T is passed on, the rest is kept for the next message."""

    def __init__(self, answer_now: Callable[[], None]) -> None:
        self._answer_now = answer_now
        self._typed = b""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts keys are not echoed and need no Enter; Ctrl-C still interrupts."""
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        quiet = termios.tcgetattr(terminal)
        quiet[3] &= ~(termios.ICANON | termios.ECHO)
        if hasattr(termios, "VSTATUS"):  # Ctrl-T is the terminal's own on some systems
            quiet[6][termios.VSTATUS] = b"\0"
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            with suppress(termios.error):  # of a window that was closed meanwhile
                termios.tcsetattr(terminal, termios.TCSANOW, before)

    def poll(self) -> None:
        """Take the keys that were pressed since the last time."""
        terminal = sys.stdin.fileno()
        while select.select([terminal], [], [], 0)[0]:
            data = os.read(terminal, 1024)
            if not data:
                return
            if ANSWER_NOW in data:
                self._answer_now()
            self._typed += data.replace(ANSWER_NOW, b"")

    def typed_ahead(self) -> str:
        """What was typed meanwhile, as it can stand in the next prompt; it is forgotten here."""
        text, self._typed = self._typed.decode("utf-8", "replace"), b""
        return "".join(c for c in re.sub(r"\x1b\[?[0-9;]*[A-Za-z~]?", "", text).replace("\r", "\n") if c.isprintable() or c == "\n").rstrip("\n")
