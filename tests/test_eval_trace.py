"""`zoomr eval --trace DIR`: which problems are recorded, in private files, also by several processes and after an interruption."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import book_heads
import pytest
import traced
from eval_traced import open_solver
from scripted import ScriptedSampler
from traced import pictures, thoughts

from zoomr_cli import eval_trace
from zoomr_cli.main import main
from zoomr_local.engine import EngineConfig
from zoomr_local.evaluate import Cell, Suite
from zoomr_local.problems import Problem
from zoomr_local.workers import solve_side_by_side

ASK = ("eval", "--suite", "in.jsonl", "--policy", "full,zoomr,rkv", "--kv-budget", "128", "--max-tokens", "300", "-o", "out")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with five problems, and engines on books that solve them. ``opened`` are the engines."""
    ScriptedSampler.script = thoughts(6)

    @contextmanager
    def open_engine(model_file, config, n_gpu_layers):
        of = book_heads.engine_of if config.policy == "rkv" else traced.engine_of
        with of(config.policy, 512 if config.policy == "full" else config.kv_budget) as engine:
            engine.config = config
            yield engine.model, engine

    monkeypatch.setattr("zoomr_cli.solve.open_engine", open_engine)
    monkeypatch.setattr("zoomr_cli.eval_check.check", lambda *asked: None)  # its engines are real ones
    monkeypatch.setattr("zoomr_cli.versions.versions", lambda: {"zoomr": "test"})
    monkeypatch.setenv("ZOOMR_MODEL", "m.gguf")
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    Path("in.jsonl").write_text("".join(json.dumps({"id": f"p/{i}", "prompt": f"w20 w{20 + i}", "answer": "4"}) + "\n" for i in range(5)))
    return tmp_path


def recorded(folder="traces") -> dict[str, list[str]]:
    """The problems in each file of a folder of traces."""
    return {str(p.relative_to(folder)): [str(one["id"]) for one in pictures(p)] for p in sorted(Path(folder).rglob("*.jsonl"))}


def problems_of(*cells, n=3):
    names = [eval_trace._file_name(f"p/{i}") for i in range(n)]
    return {f"{cell}/{name}.jsonl": [f"p/{i}"] for cell in cells for i, name in enumerate(names)}


def test_the_first_problems_of_every_cell_are_recorded_privately_and_the_records_are_the_same(here, capsys):
    assert main([*ASK]) == 0
    plain = {p.name: [{**json.loads(row), "timing": None} for row in p.read_text().splitlines()] for p in Path("out").glob("in.*.jsonl")}
    capsys.readouterr()
    assert main([*ASK[:-1], "out2", "--trace", "traces"]) == 0
    err = capsys.readouterr().err
    assert "traces: 9 files in traces; to look at one: zoomr view traces/in.full/p_0-" in err and "--overwrite" not in err
    assert recorded() == problems_of("in.full", "in.rkv.128", "in.zoomr.128")
    with_it = {p.name: [{**json.loads(row), "timing": None} for row in p.read_text().splitlines()] for p in Path("out2").glob("in.*.jsonl")}
    assert with_it == plain and len(plain) == 3
    modes = {stat.S_IMODE(p.stat().st_mode) for p in Path("traces").rglob("*.jsonl")}
    assert modes == {0o600} and {stat.S_IMODE(p.stat().st_mode) for p in (Path("traces"), *Path("traces").iterdir())} == {0o700}
    for path in Path("traces").rglob("*.jsonl"):
        (drawn,) = pictures(path)
        assert drawn["policy"] == path.parent.name.split(".")[1] and drawn["finished"]["reason"] == "stop" and drawn["result"]["correct"] is False
        assert (drawn["heads"] is not None) == (drawn["policy"] == "rkv") and drawn["settings"]["max_tokens"] == 300
    assert main(["view", str(path)]) == 0 and "p/" in capsys.readouterr().out


def test_how_many_is_said_by_a_flag(here, capsys):
    assert main([*ASK, "--trace", "traces", "--trace-problems", "1", "-q"]) == 0
    assert capsys.readouterr().err == "" and recorded() == problems_of("in.full", "in.rkv.128", "in.zoomr.128", n=1)
    assert main([*ASK, "--trace-problems", "1"]) == 2 and "--trace-problems needs --trace DIR" in capsys.readouterr().err


def test_what_an_earlier_run_solved_is_not_recorded_and_that_is_said(here, capsys):
    assert main([*ASK, "-n", "2"]) == 0
    capsys.readouterr()
    assert main([*ASK, "--trace", "traces"]) == 0
    err = capsys.readouterr().err
    assert "traces: 3 files in traces" in err
    assert "6 of 9 problems to be recorded have no trace: what an earlier run has solved is solved again with --overwrite only" in err
    assert [ids for ids in recorded().values()] == [["p/2"]] * 3
    assert main([*ASK, "--trace", "traces", "--overwrite"]) == 0
    assert len(recorded()) == 9 and [ids for ids in recorded().values()].count(["p/2", "p/2"]) == 3, "a second run is added"


def test_an_interrupted_run_goes_on_and_its_traces_too(here, monkeypatch, capsys):
    """Ctrl-C in the middle of the second problem of the second cell, which is recorded anew by the next run."""
    begun = []
    solve = eval_trace.TracedSolver.solve

    def interrupted(self, problem, listener):
        begun.append(problem.id)
        if len(begun) == 7:
            event = listener.event
            listener.event = lambda one: (os.kill(os.getpid(), signal.SIGINT) if type(one).__name__ == "BlockClosed" else None, event(one))
        return solve(self, problem, listener)

    monkeypatch.setattr(eval_trace.TracedSolver, "solve", interrupted)
    assert main([*ASK, "--trace", "traces"]) == 130
    err = capsys.readouterr().err
    assert "to go on: zoomr eval" in err and "--trace traces" in err and "earlier run" not in err
    (second,) = [p for p in Path("traces/in.zoomr.128").glob("p_1*")]
    assert pictures(second)[0]["finished"] is None and pictures(second)[0]["tokens"] > 20
    assert main([*ASK, "--trace", "traces"]) == 0
    assert [p["finished"] is None for p in pictures(second)] == [True, False] and [p["run"] for p in pictures(second)] == [1, 2]
    assert len(recorded()) == 9 and "earlier run" not in capsys.readouterr().err
    assert [json.loads(row)["id"] for row in Path("out/in.zoomr.128.jsonl").read_text().splitlines()] == [f"p/{i}" for i in range(5)]


@pytest.mark.parametrize("occupied", ["traces", "traces/in.zoomr.128"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(here, capsys, occupied):
    Path(occupied).parent.mkdir(exist_ok=True)
    Path(occupied).write_text("mine\n")
    assert main([*ASK, "--trace", "traces"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --trace traces: cannot make the folder") and err.count("\n") == 1 and not Path("out").exists()


def test_a_file_that_is_no_trace_is_refused_before_anything_runs(here, capsys):
    name = next(iter(problems_of("in.rkv.128", n=1)))
    Path("traces/in.rkv.128").mkdir(parents=True)
    Path("traces", name).write_text("mine\n")
    assert main([*ASK, "--trace", "traces"]) == 2
    assert "it is no trace" in capsys.readouterr().err and Path("traces", name).read_text() == "mine\n" and not Path("out").exists()


def test_one_file_in_a_folder_with_a_space_can_be_viewed_as_it_is_said(here, capsys):
    Path("in.jsonl").write_text(json.dumps({"id": "a", "prompt": "w20 w21", "answer": "4"}) + "\n")
    assert main(["eval", "--suite", "in.jsonl", "--policy", "full", "--max-tokens", "300", "-o", "out", "--trace", "my traces"]) == 0
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("traces: "))
    assert said.startswith("traces: 1 file in my traces; ")
    assert main(shlex.split(said.partition(": zoomr ")[2])) == 0


def test_an_id_of_control_characters_is_not_written_to_a_terminal(here, monkeypatch, capsys):
    Path("in.jsonl").write_text(json.dumps({"id": "\x1b[2J", "prompt": "w20 w21", "answer": "4"}) + "\n")
    monkeypatch.setattr(eval_trace, "files", lambda *asked: {key: Path("none", "t.jsonl") for key in real(*asked)})
    assert main(["eval", "--suite", "in.jsonl", "--policy", "full", "--max-tokens", "300", "-o", "out", "--trace", "traces", "-q"]) == 0
    err = capsys.readouterr().err
    assert "is not recorded" in err and "\x1b" not in err


def test_a_trace_that_is_in_use_later_costs_no_record(here, monkeypatch, capsys):
    monkeypatch.setattr(eval_trace, "files", lambda *asked: {key: Path("none", "t.jsonl") for key in real(*asked)})
    assert main([*ASK, "--trace", "traces"]) == 0
    err = capsys.readouterr().err
    assert err.count("is not recorded: --trace none/t.jsonl: No such file") == 9
    assert "9 of 9 problems to be recorded have no trace" in err and "solved by an earlier run" not in err
    assert all(len(p.read_text().splitlines()) == 5 for p in Path("out").glob("in.*.jsonl"))


real = eval_trace.files


def test_ids_that_are_no_file_names_get_files_of_their_own(tmp_path):
    ids = ["a/b", "a_b", "a b", "..", "é", "x" * 300, "x" * 301, "\ud800", "", "\U00020000" * 80]
    problems = [Problem(name, ({"role": "user", "content": "?"},), "1", i) for i, name in enumerate(ids)]
    cell = Cell("f", EngineConfig(policy="zoomr"))
    found = eval_trace.files(tmp_path / "traces", [cell], Suite({"f": problems}, {"f": 9}), len(ids))
    assert len({path.name for path in found.values()}) == len(ids) and {path.parent for path in found.values()} == {tmp_path / "traces" / "f.zoomr.512"}
    for path in found.values():
        path.touch()


def test_several_processes_write_a_file_each(tmp_path):
    problems = [Problem(i, ({"role": "user", "content": f"w{20 + i}"},), "1", i) for i in range(4)]
    cell = Cell("f", EngineConfig(policy="zoomr", kv_budget=128))
    asked = eval_trace.files(tmp_path / "traces", [cell], Suite({"f": problems}, {"f": 400}), 3)
    records = []

    class Deaf:
        started = finished = staticmethod(lambda problem: None)

    assert solve_side_by_side(problems, partial(open_solver, asked, cell.config), 2, records.append, Deaf())
    assert sorted(record["id"] for record in records) == [0, 1, 2, 3] and not any("error" in record for record in records)
    assert recorded(tmp_path / "traces") == {f"f.zoomr.128/{i}.jsonl": [str(i)] for i in range(3)}
    for path in (tmp_path / "traces").rglob("*.jsonl"):
        (drawn,) = pictures(path)
        assert drawn["finished"]["reason"] == "stop" and drawn["zooms"] > 0
