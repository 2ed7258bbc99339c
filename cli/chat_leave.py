"""What ends a chat from outside: SIGTERM, and SIGHUP, which comes when its window is closed.

`chat_loop.py` says what is finished first; anything else the chat does ends at once.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from . import INTERRUPTED

_STREAMS = (0, 1, 2)


class Leaving:
    """Whether the chat was told to end, which raises SystemExit(130) as soon as nothing would be lost by it."""

    def __init__(self) -> None:
        self.told = False
        self._cancel: Callable[[], None] | None = None
        self._terminals: list[int] = []

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While this lasts both signals are heard, but for one that is ignored, as under nohup."""
        self._terminals = [stream for stream in _STREAMS if os.isatty(stream)]  # of one whose window has gone it is no longer known
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        mine = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in mine:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in mine.items():
                signal.signal(number, handler)

    @contextmanager
    def after(self, cancel: Callable[[], None], leave: bool = True) -> Iterator[None]:
        """What is in the block is finished first, and then, if ``leave``, SystemExit raised; ``cancel`` makes it soon.

        Of nested blocks the outermost decides. A signal may come more than once, from the shell and from the kernel, and again changes nothing.
        """
        before, self._cancel = self._cancel, cancel
        try:
            yield
        finally:
            self._cancel = before
            if self.told and leave and before is None:
                raise SystemExit(INTERRUPTED)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written to a window that has gone is written nowhere, and the chat ends; any other failure is raised.

        The kernel tells the shell alone, and whether and when that passes it on is the shell's business.
        """
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO and not self.told:
                raise
            self._hear(signal.SIGHUP, None)

    def _hear(self, number: int, frame: object) -> None:
        self.told = True
        if number == signal.SIGHUP:
            self._to_nowhere()
        if self._cancel is None:
            raise SystemExit(INTERRUPTED)
        self._cancel()

    def _to_nowhere(self) -> None:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in self._terminals:
                os.dup2(nowhere, stream)
            os.close(nowhere)
