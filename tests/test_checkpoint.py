"""`zoomr solve --checkpoint`: killed in the middle of a problem, started again, the same record as without a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoomr_cli.main import main
from zoomr_local.errors import TierSizeError

FLAGS = ["-n", "1600", "--kv-budget", "192", "-t", "1", "--temp", "0.7", "--repeat-penalty", "1.1"]
CHECKPOINT = ["--checkpoint", "ck", "--checkpoint-every", "0.04"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)
    assert main(["problems", "series", "-n", "3", "--thoughts", "40", "-o", "in.jsonl"]) == 0
    return tmp_path


def solve(*more: str, out: str = "out.jsonl") -> int:
    return main(["solve", "in.jsonl", "-o", out, *FLAGS, *more])


def records(name: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in ("timing", "resumed")}


def killed(when, *more: str, signum: int = signal.SIGKILL) -> str:
    """Start a run and end it as soon as ``when()`` is true; returns what it said on stderr."""
    command = [sys.executable, "-m", "zoomr_cli", "solve", "in.jsonl", "-o", "out.jsonl", *FLAGS, *CHECKPOINT, *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not when():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it was never met there: {process.communicate()[1]}")
        time.sleep(0.002)
    process.send_signal(signum)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (-signum if signum == signal.SIGKILL else 130), said
    return said


def saved(number: int) -> bool:
    """Whether the problem at work was saved for the nth time (by this or an earlier process)."""
    return any(int(path.stem.split("-")[1]) >= number for path in Path("ck").glob("*/state-*.json"))


def record_count() -> int:
    return Path("out.jsonl").read_bytes().count(b"\n") if Path("out.jsonl").exists() else 0


def test_killed_and_resumed_in_the_middle_the_records_are_the_same(here, capsys):
    assert solve(out="whole.jsonl") == 0
    killed(lambda: saved(3))
    assert record_count() == 0
    first = next(Path("ck").iterdir())
    killed(lambda: saved(6))
    killed(lambda: record_count() == 1 and len(list(Path("ck").iterdir())) == 1 and saved(2) and not first.exists())
    assert [path.stat().st_mode & 0o777 for path in (Path("ck"), *Path("ck").iterdir())] == [0o700, 0o700]
    capsys.readouterr()
    assert solve(*CHECKPOINT) == 0
    assert "goes on after" in capsys.readouterr().err
    assert [without_times(r) for r in records()] == [without_times(r) for r in records("whole.jsonl")]
    assert [r.get("resumed") for r in records()] == [2, 1, None]
    assert all(r["kv"]["page_outs"] for r in records()) and not Path("ck").exists()
    assert all(0 < r["timing"]["decode_s"] and 0 < r["timing"]["prefill_s"] for r in records())


def test_ctrl_c_saves_where_it_is(here, capsys):
    """However long the interval: what was decoded until then is not lost, nor what was said about it."""
    lossy = ("--kv-page-type", "q8_0", "--temp", "0", "--kv-budget", "332", "-n", "2400")  # enough cells: every reply is that long

    def interrupt(seconds: float) -> str:
        """Ctrl-C so long after the first record: in the second problem, unless the machine's other work has come between."""

        def in_the_second_problem() -> bool:
            if record_count() == 1:
                time.sleep(seconds)
            return record_count() >= 1

        Path("out.jsonl").unlink(missing_ok=True)
        return killed(in_the_second_problem, "--overwrite", "--checkpoint-every", "1000", *lossy, signum=signal.SIGINT)

    for seconds in (0.4, 0.2, 0.1, 0.8, 1.6):
        said = interrupt(seconds)
        assert "to go on:" in said
        if record_count() == 1 and Path("ck").exists():
            break
    assert record_count() == 1 and len(list(Path("ck").glob("*/session.json"))) == 1
    assert solve(*CHECKPOINT, *lossy) == 0
    assert records()[1]["resumed"] == 1 and "is lossy" in records()[1]["warnings"][0]
    assert solve(*lossy, out="whole.jsonl") == 0
    assert [without_times(r) for r in records()] == [without_times(r) for r in records("whole.jsonl")]


def test_saving_all_the_time_changes_no_record(here):
    assert solve("--checkpoint", "ck", "--checkpoint-every", "0.02") == 0
    assert solve(out="whole.jsonl") == 0
    assert [without_times(r) for r in records()] == [without_times(r) for r in records("whole.jsonl")]
    assert not any("resumed" in r for r in records()) and not Path("ck").exists()


@pytest.fixture
def interrupted(here) -> Path:
    """A run that was killed in its first problem; the path of the checkpoint."""
    killed(lambda: saved(2))
    return next(Path("ck").iterdir())


@pytest.mark.parametrize("name, words", [
    ("cells-*.bin", "does not fit and is thrown away, so it starts from the beginning"),
    ("session.json", "the checkpoint is damaged"),
])
def test_a_damaged_checkpoint_of_this_run_is_said_and_thrown_away(interrupted, capsys, name, words):
    for path in interrupted.glob(name):  # the kill may have come while a newer file of cells was not yet the session's
        path.write_bytes(path.read_bytes()[:-40])
    assert solve(*CHECKPOINT, "--limit", "1") == 0
    assert words in capsys.readouterr().err
    assert "resumed" not in records()[0] and not Path("ck").exists()


def test_a_checkpoint_whose_problem_is_done_is_thrown_away(interrupted, capsys):
    copy = Path("copy")
    shutil.copytree(interrupted, copy)
    assert solve(*CHECKPOINT) == 0
    shutil.copytree(copy, interrupted)  # as if the kill had come between the record and the removal
    assert solve(*CHECKPOINT) == 0
    assert "its problem is done; it is thrown away" in capsys.readouterr().err and not interrupted.exists()


def test_tiers_too_small_for_it_now_leave_it(interrupted, capsys, monkeypatch):
    """Half a night of thinking is not given up because the disk is full this morning."""
    before = sorted(path.name for path in interrupted.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("zoomr_local.tiers.store.PageStore.begin", too_small)
        assert solve(*CHECKPOINT) == 1
    assert "no room on the disk" in capsys.readouterr().err and sorted(path.name for path in interrupted.iterdir()) == before
    assert not record_count() and solve(*CHECKPOINT, "--limit", "1") == 0 and records()[0]["resumed"] == 1


def too_small(*_):
    raise TierSizeError("no room on the disk")


def test_overwrite_throws_it_away_too(interrupted, capsys):
    assert solve(*CHECKPOINT, "--overwrite", "--limit", "1") == 0
    assert "--overwrite starts its problem again; it is thrown away" in capsys.readouterr().err
    assert "resumed" not in records()[0]


@pytest.mark.parametrize("more, out, words", [
    (["--temp", "0.1"], "other.jsonl", "settings.temperature: 0.7 there, 0.1 now"),
    ([], "other.jsonl", "output: "),
])
def test_another_runs_checkpoint_is_refused_and_left(interrupted, capsys, more, out, words):
    before = sorted(path.name for path in interrupted.iterdir())
    assert solve(*CHECKPOINT, *more, out=out) == 2
    said = capsys.readouterr().err
    assert "is the checkpoint of another run" in said and words in said and "rm -r" in said
    assert sorted(path.name for path in interrupted.iterdir()) == before


def test_a_directory_of_something_else_is_refused_and_left(here, capsys):
    os.mkdir("ck")
    Path("ck/thesis.txt").write_text("mine")
    assert solve(*CHECKPOINT) == 2
    assert "holds thesis.txt, which is no checkpoint" in capsys.readouterr().err
    assert Path("ck/thesis.txt").read_text() == "mine"
    Path("file").write_text("x")
    assert solve("--checkpoint", "file") == 2


@pytest.mark.parametrize("flags, words", [
    (["--checkpoint-every", "5"], "needs --checkpoint"),
    (["--checkpoint", "ck", "-o", "-"], "needs an output"),
])
def test_flags_that_do_not_go_together(here, capsys, flags, words):
    assert main(["solve", "in.jsonl", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_full_disk_is_said_once_and_decoding_goes_on(here, capsys, monkeypatch):
    from test_session_files import FullDisk

    from zoomr_local import session_files

    monkeypatch.setattr(session_files, "write", FullDisk(1000))
    assert solve("--checkpoint", "ck", "--checkpoint-every", "0", "--limit", "1") == 0
    said = capsys.readouterr().err
    assert said.count("the session could not be saved") == 1 and "decoding goes on" in said
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert solve("--limit", "1", out="whole.jsonl") == 0
    assert [without_times(r) for r in records()] == [without_times(r) for r in records("whole.jsonl")]
