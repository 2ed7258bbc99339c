"""`zoomr solve` with the real engine and the bundled model, killed with SIGKILL again and again.

The one promise a night's run needs: whatever happens, start the same command again and end with exactly one
record a problem, those that were finished untouched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoomr_cli.main import main

PROBLEMS = 120
# Few tokens keep this under a minute; prompts longer than the budget make the engine page from the first problem on.
FLAGS = ["-n", "24", "--kv-budget", "128", "-t", "1"]


def start(folder: Path, out: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "zoomr_cli", "solve", "in.jsonl", "-o", out, *FLAGS]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen, out: Path, records: int) -> None:
    """SIGKILL as soon as ``out`` has that many records: while the next problem is being solved."""
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < records:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {records} records: {process.communicate()[1]}")
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finish(folder: Path, out: str) -> str:
    process = start(folder, out)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout == ""
    return stderr


def without_times(line: bytes) -> dict:
    record = json.loads(line)
    del record["timing"]
    return record


def test_killed_five_times_and_resumed_there_is_exactly_one_record_a_problem(tmp_path):
    assert main(["problems", "dag", "-n", str(PROBLEMS), "--thoughts", "8", "-o", str(tmp_path / "in.jsonl")]) == 0
    asked = [json.loads(line)["id"] for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    out = tmp_path / "out.jsonl"

    finished = b""
    for records in (3, 4, 30, 60, 100):
        kill_after(start(tmp_path, out.name), out, records)
        data = out.read_bytes()
        assert data.startswith(finished), "a finished record was changed"
        finished = data[: data.rindex(b"\n") + 1]
        if records == 60:  # a kill seldom tears a line by itself: one write is one system call
            last = finished.rindex(b"\n", 0, -1) + 1
            os.truncate(out, last + 30)
            finished = finished[:last]

    said = finish(tmp_path, out.name)
    assert f"of {PROBLEMS} are done already" in said
    data = out.read_bytes()
    assert data.startswith(finished) and data.endswith(b"\n")
    lines = data.splitlines()
    assert [json.loads(line)["id"] for line in lines] == asked
    assert not any("error" in json.loads(line) for line in lines)
    assert all(json.loads(line)["kv"]["page_outs"] for line in lines), "the engine was made to page"

    finish(tmp_path, "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes().splitlines()
    assert [without_times(line) for line in lines] == [without_times(line) for line in whole], "resuming changes no answer"


def test_two_runs_on_one_output_cannot_meet(tmp_path):
    assert main(["problems", "dag", "-n", "400", "-o", str(tmp_path / "in.jsonl")]) == 0
    first = start(tmp_path, "out.jsonl")
    try:
        while not (tmp_path / "out.jsonl").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.002)
        second = start(tmp_path, "out.jsonl")
        _, stderr = second.communicate(timeout=60)
        assert second.returncode == 2 and "another process is writing out.jsonl" in stderr
    finally:
        first.kill()
        first.communicate()
