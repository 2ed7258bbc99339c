"""Problems solved side by side: the same records as one after the other, and no silence when a process fails."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from processes import still_runs, wait_until

from zoomr_cli.main import main
from zoomr_local.errors import EngineError, ModelError
from zoomr_local.solve import Problem
from zoomr_local.workers import solve_side_by_side

PROBLEMS = [Problem(str(i), ({"role": "user", "content": "q"},), "1", i) for i in range(1, 8)]


class Recorder:
    def __init__(self):
        self.heard = []

    def started(self, problem):
        self.heard.append(("started", problem.id))

    def event(self, event):
        raise AssertionError("no event reaches this process")

    def finished(self, record):
        self.heard.append(("finished", record["id"]))


class Echo:
    """Solves by naming its process; ``fails`` says how it goes wrong at problem 3."""

    def __init__(self, fails):
        self.fails = fails

    def solve(self, problem, listener):
        if problem.id == "3" and self.fails == "dies":
            os._exit(9)
        time.sleep(0.05)
        return {"id": problem.id, "pid": os.getpid()}


@contextmanager
def opened(fails=None):
    if fails == "opens":
        raise ModelError("there is no such model")
    yield Echo(fails)


class Meeting(Echo):
    """Solves nothing before every process is there."""

    def __init__(self, folder):
        super().__init__(None)
        self.folder = folder

    def solve(self, problem, listener):
        (self.folder / str(os.getpid())).touch()
        until = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        return super().solve(problem, listener)


@contextmanager
def opened_to_meet(folder):
    yield Meeting(folder)


def test_every_problem_is_solved_once_by_other_processes(tmp_path):
    written, listener = [], Recorder()
    assert solve_side_by_side(PROBLEMS, partial(opened_to_meet, tmp_path), 2, written.append, listener)
    assert sorted(r["id"] for r in written) == [p.id for p in PROBLEMS]
    assert len({r["pid"] for r in written}) == 2 and os.getpid() not in {r["pid"] for r in written}
    assert [h for h in listener.heard if h[0] == "finished"] == [("finished", r["id"]) for r in written]


@contextmanager
def opened_with_a_file(folder):
    path = folder / str(os.getpid())
    path.touch()
    yield Echo(None)
    path.unlink()


def test_processes_that_are_done_close_what_they_opened(tmp_path):
    """An engine's page files are gone then, as after a run of one process."""
    assert solve_side_by_side(PROBLEMS, partial(opened_with_a_file, tmp_path), 2, lambda record: None, Recorder())
    assert list(tmp_path.iterdir()) == []


def test_a_stop_ends_the_processes_and_keeps_what_is_written():
    written = []
    assert not solve_side_by_side(PROBLEMS, opened, 2, written.append, Recorder(), lambda: len(written) >= 2)
    assert 2 <= len(written) < len(PROBLEMS)
    for record in written:
        with pytest.raises(ProcessLookupError):
            os.kill(record["pid"], 0)


class Slow:
    """Its destructor takes long, and loses what is raised in it."""

    def __init__(self, started):
        self.started = started

    def __del__(self):
        self.started.touch()
        until = time.monotonic() + 3
        while time.monotonic() < until:
            pass


class Endless(Echo):
    """As an engine in mid-step: what it steps through cannot be closed from inside the step."""

    def __init__(self, started):
        self.started, self.stream = started, self._steps()

    def _steps(self):
        self.started.touch()
        time.sleep(1000)
        yield

    def solve(self, problem, listener):
        next(self.stream)


@contextmanager
def opened_endless(folder):
    path = folder / str(os.getpid())
    endless = Endless(path)
    yield endless
    endless.stream.close()
    path.unlink()


class Deaf(Echo):
    """Is told to go while something is destroyed."""

    def __init__(self, started):
        self.started = started

    def solve(self, problem, listener):
        Slow(self.started)
        time.sleep(1000)


@contextmanager
def opened_deaf(folder):
    path = folder / str(os.getpid())
    yield Deaf(path)
    path.unlink()


@contextmanager
def opened_to_close_slowly(folder):
    """A problem takes no time, and closing takes long."""
    path = folder / str(os.getpid())
    yield Echo(None)
    path.touch()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        time.sleep(0.05)
    path.unlink()


@pytest.mark.parametrize("opened", [opened_endless, opened_deaf, opened_to_close_slowly], ids=["in a step", "in a destructor", "closing"])
def test_a_killed_run_leaves_no_processes_and_no_files_of_theirs(tmp_path, opened):
    run = get_context("spawn").Process(target=solve_side_by_side, args=(PROBLEMS, partial(opened, tmp_path), 2, print, Recorder()))
    run.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    run.kill()
    run.join()
    wait_until(lambda: not list(tmp_path.iterdir()))  # they close what they have opened
    assert not any(still_runs(pid) for pid in workers)


def _a_run_in_its_own_group(folder, opened):
    os.setpgid(0, 0)
    seen = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: seen.append(number))
    whole = solve_side_by_side(PROBLEMS, partial(opened, folder), 2, print, Recorder(), lambda: bool(seen))
    os._exit(STOPPED if seen and not whole else 1)


STOPPED = 77


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_is_a_stop_and_no_lack_of_memory(tmp_path, number):
    """As `timeout`, a shutdown and Ctrl-C send it: to the first process and to those that solve."""
    run = get_context("spawn").Process(target=_a_run_in_its_own_group, args=(tmp_path, opened_endless))
    run.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    os.killpg(run.pid, number)
    run.join(60)
    assert run.exitcode == STOPPED and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="a process that has not begun is seen in /proc only")
def test_ctrl_c_before_a_process_has_begun_is_a_stop(tmp_path, capfd):
    run = get_context("spawn").Process(target=_a_run_in_its_own_group, args=(tmp_path, opened_endless))
    run.start()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 2, pause=0)  # the first is multiprocessing's own
    os.killpg(run.pid, signal.SIGINT)
    run.join(60)
    assert run.exitcode == STOPPED and "Traceback" not in capfd.readouterr().err


def test_a_process_that_dies_is_an_error_and_no_endless_wait():
    with pytest.raises(EngineError, match="ended unexpectedly.*--jobs"):
        solve_side_by_side(PROBLEMS, partial(opened, "dies"), 2, lambda record: None, Recorder())


def test_what_opening_raises_is_told_as_it_is():
    with pytest.raises(ModelError, match="no such model"):
        solve_side_by_side(PROBLEMS, partial(opened, "opens"), 2, lambda record: None, Recorder())


def without_times(records):
    return {r["id"]: {k: v for k, v in r.items() if k != "timing"} for r in records}


def test_the_records_are_those_of_one_process(tmp_path: Path, capsys):
    from zoomr_local.journal import Journal

    found = []
    for jobs in ("1", "2"):
        folder = tmp_path / jobs
        command = ["eval", "--family", "series", "-n", "4", "--thoughts", "4", "--policy", "zoomr", "--kv-budget", "256"]
        assert main([*command, "-j", jobs, "-o", str(folder), "-q"]) == 0
        with Journal.open(folder / "series.zoomr.256.jsonl") as journal:
            found.append(without_times(journal.records))
    assert found[0] == found[1] and len(found[0]) == 4
