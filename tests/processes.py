"""Waiting for other processes. Tests only: nothing here is a measure of time, the bounds only end a test that would wait for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(true: Callable[[], bool], pause: float = 0.01, most: float = 120.0) -> None:
    """Come back as soon as ``true()`` is; fails after ``most`` seconds."""
    end = time.monotonic() + most
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(pause)


def still_runs(pid: int, most: float = 30.0) -> bool:
    """Whether a process goes on after ``most`` seconds. One that has ended and that nobody has waited for does not."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.05)
    return True
