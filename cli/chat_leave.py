"""What ends a chat from outside: SIGTERM, and SIGHUP, which comes when its window is closed.

`chat_loop.py` says what is finished first; between two messages the chat ends at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .__main__ import INTERRUPTED

_STREAMS = (0, 1, 2)


class Leaving:
    """Whether the chat was told to end, which raises SystemExit(130) as soon as nothing would be lost by it."""

    def __init__(self) -> None:
        self.told = False
        self._cancel: Callable[[], None] | None = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While this lasts both signals are heard, but for one that is ignored, as under nohup."""
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
    def after(self, cancel: Callable[[], None]) -> Iterator[None]:
        """What is in the block is finished first; ``cancel`` makes that soon. A signal may come more than once, and again changes nothing."""
        self._cancel = cancel
        try:
            yield
        finally:
            self._cancel = None
            if self.told:
                raise SystemExit(INTERRUPTED)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written to a window that has gone is written nowhere; any other failure is raised."""
        try:
            yield
        except OSError:
            if not self.told:
                raise

    def _hear(self, number: int, frame: object) -> None:
        self.told = True
        if number == signal.SIGHUP:
            _to_nowhere()
        if self._cancel is None:
            raise SystemExit(INTERRUPTED)
        self._cancel()


def _to_nowhere() -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in _STREAMS:
            os.dup2(nowhere, stream)
        os.close(nowhere)
