"""Problems solved side by side by processes, each with an engine of its own.

Owns the processes and nothing else: what a problem's record is stays `solve.py`'s, where it is written the
caller's. `evaluate.py` calls it. Processes and not threads, because with a small model half of a token's time is
Python's; a record does not depend on which process made it, as every generation starts from an empty cache.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

from .errors import EngineError
from .solve import Listener, Problem, Solver

OpenSolver = Callable[[], AbstractContextManager[Solver]]
"""Opens a model, an engine and a solver on them. It is sent to the processes, so it must be picklable."""

_POLL_S = 0.2  # how long a stop can go unnoticed
_CLOSE_S = 20.0  # how long a process that was told to go may take to close its engine

_kept = ExitStack()  # these six are of a worker process
_solver: Solver | None = None
_failure: Exception | None = None
_solving = _told = _closing = False


def solve_side_by_side(
    problems: Sequence[Problem], open_solver: OpenSolver, jobs: int, write: Callable[[dict[str, Any]], None],
    listener: Listener, stopping: Callable[[], bool] = lambda: False,
) -> bool:  # fmt: skip
    """Solve on ``jobs`` processes; each record is handed to ``write``, in this process, as soon as it is there.

    Records come in the order in which they end, and the listener hears of no events. Returns False if it was told
    to stop; problems that were begun then are lost. Raises EngineError if a process dies, for example killed by
    the system for memory, and what ``open_solver`` or ``write`` raises.
    """
    # spawned, not forked: a process must not inherit the threads of a loaded library
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start, (open_solver,))
    try:
        done = _collect(problems, pool, jobs, write, listener, stopping)
        if done:
            pool.shutdown()  # nothing runs any more: they close their engines and delete their page files
        return done
    except BrokenProcessPool:
        time.sleep(_POLL_S)  # a signal to the whole group, as `timeout` and a shutdown send it, may end the others before it is heard here
        if stopping():
            return False
        raise EngineError(
            f"one of {jobs} processes ended unexpectedly, perhaps for lack of memory; finished problems are kept:"
            " start the same command again with a smaller --jobs"
        ) from None
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:  # a problem that nobody waits for any more could take minutes
            worker.terminate()
        for worker in workers:
            worker.join()


def _collect(
    problems: Sequence[Problem], pool: ProcessPoolExecutor, jobs: int, write: Callable[[dict[str, Any]], None],
    listener: Listener, stopping: Callable[[], bool],
) -> bool:  # fmt: skip
    left = list(reversed(problems))
    running: set[Future[dict[str, Any]]] = set()
    while left or running:
        if stopping():
            return False
        while left and len(running) < jobs:
            listener.started(left[-1])
            with _deaf_to_interrupts():
                running.add(pool.submit(_solve, left.pop()))
        ended, running = wait(running, _POLL_S, FIRST_COMPLETED)
        for future in ended:
            record = future.result()
            write(record)
            listener.finished(record)
    return True


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A process that is started in here is deaf to Ctrl-C until `_start` ignores it for good; this one hears it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Deaf:
    """Hears nothing: events stay in the process that makes them."""

    def started(self, problem: Problem) -> None: ...

    def event(self, event: Any) -> None: ...

    def finished(self, record: dict[str, Any]) -> None: ...


def _start(open_solver: OpenSolver) -> None:
    global _solver, _failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow, daemon=True).start()
    atexit.register(_close)
    try:
        _solver = _kept.enter_context(open_solver())
    except Exception as error:  # raised again by the first problem: a pool that cannot start says only that it broke
        _failure = error


def _follow() -> None:
    """End with the first process, however it ends: nobody would read this one's records."""
    parent_process().join()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


class _Told(BaseException):
    """Unwinds a problem in the making; no Exception, so that it does not become the problem's record."""


def _leave(number: int, frame: Any) -> None:
    """SIGTERM. An engine cannot be closed from inside its own step, so a problem in the making is unwound first."""
    global _told
    if not _told:
        _told = True
        threading.Thread(target=_insist, daemon=True).start()
    if _closing:
        return  # what is being closed is closed whole
    if _solving:
        raise _Told
    _go()


def _insist() -> None:
    """Tell the process again and again, as an exception that meets a destructor is lost; end it when nothing helps."""
    until = time.monotonic() + _CLOSE_S
    while time.monotonic() < until:
        time.sleep(_POLL_S)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    os._exit(128 + signal.SIGTERM)


def _close() -> None:
    """Close the engine, which deletes its page files."""
    global _closing
    _closing = True
    _kept.close()


def _go() -> None:
    """Close the engine and end this process, whatever the closing raises."""
    try:
        _close()
    finally:
        os._exit(128 + signal.SIGTERM)


def _solve(problem: Problem) -> dict[str, Any]:
    global _solving
    if _solver is None:
        raise _failure or EngineError("this process has no solver")
    try:
        _solving = True
        record = _solver.solve(problem, _Deaf())
    except _Told:
        _go()
    finally:
        _solving = False
    if record is None:
        raise EngineError("a worker's solver was stopped")
    return record
