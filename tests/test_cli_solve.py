"""`zoomr solve` as a user meets it: files, exit codes, what stands on stdout and stderr. The engine is a fake one."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine, opener

from zoomr_cli.main import main
from zoomr_local.errors import EngineError
from zoomr_local.journal import Journal, manifest_path


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)
    return engine


@pytest.fixture
def here(tmp_path, monkeypatch, engine) -> Path:
    """A folder with ten problems and something that has a model's name."""
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("ZOOMR_MODEL", "m.gguf")
    write_problems("in.jsonl", 10)
    return tmp_path


def write_problems(name: str, n: int, answer: str = "4") -> None:
    rows = [{"id": f"p{i}", "prompt": f"ask {i}", "answer": answer} for i in range(n)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(name: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def run(*arguments: str) -> int:
    return main(["solve", *arguments])


# ---------------------------------------------------------------- a run


def test_every_problem_becomes_one_record_and_stdout_stays_empty(here, capsys):
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    assert [r["id"] for r in records()] == [f"p{i}" for i in range(10)]
    out, err = capsys.readouterr()
    assert out == ""
    assert "10 of 10 done, in out.jsonl" in err
    assert "accuracy  1.000  (10 of 10 right; 95 % interval 0.722 to 1.000)" in err
    assert "KV cache  108 of 512 cells at the peak" in err


def test_the_default_output_names_input_and_policy(here):
    assert run("in.jsonl", "--policy", "recency") == 0
    assert len(records("in.recency.out.jsonl")) == 10


def test_flags_reach_engine_and_manifest(here, engine):
    assert run("in.jsonl", "-o", "out.jsonl", "--kv-budget", "2k", "--kv-type", "f16", "--no-flash-attn", "--window", "64",
               "--vote-layers", "2,3", "--temp", "0.5", "--stop", "a", "--stop", "b", "-n", "99", "-t", "2") == 0  # fmt: skip
    config = engine.config
    assert (config.kv_budget, config.kv_type, config.flash_attn, config.window) == (2048, "f16", False, 64)
    assert (config.vote_layers, config.threads) == ((2, 3), 2)
    stored = json.loads(manifest_path(Path("out.jsonl")).read_text())
    assert stored["settings"]["stop"] == ["a", "b"]
    assert stored["settings"]["max_tokens"] == 99
    assert "threads" not in stored["settings"] and stored["info"]["threads"] == 2
    assert stored["info"]["command"].startswith("zoomr solve in.jsonl -o out.jsonl --kv-budget 2k")
    assert stored["info"]["resolved"] == {"window_tokens": 128}
    assert stored["model"]["file"] == "m.gguf"


def test_limit_takes_the_first_problems_and_can_be_raised_later(here, engine):
    assert run("in.jsonl", "-o", "out.jsonl", "--limit", "3") == 0
    assert run("in.jsonl", "-o", "out.jsonl", "--limit", "5") == 0
    assert [r["id"] for r in records()] == ["p0", "p1", "p2", "p3", "p4"]
    assert len(engine.prompts) == 5


def test_json_puts_the_summary_on_stdout(here, capsys):
    assert run("in.jsonl", "-o", "out.jsonl", "--json", "-q") == 0
    out, err = capsys.readouterr()
    assert err == ""
    summary = json.loads(out)
    assert (summary["output"], summary["total"], summary["accuracy"]["right"]) == ("out.jsonl", 10, 10)


def test_one_is_one_in_every_sentence(here, engine, capsys):
    write_problems("one.jsonl", 1)
    engine.tokens = 1
    assert run("one.jsonl", "-o", "out.jsonl") == 0 and run("one.jsonl", "-o", "out.jsonl") == 0
    said = capsys.readouterr().err
    assert "the one problem is done already" in said and "1 token decoded" in said and "1 time something came back" in said
    assert not re.search(r"\b1 [a-z]+s\b", said.replace("1 is", "")), said
    write_problems("one.jsonl", 1, answer="5")
    assert run("one.jsonl", "-o", "out.jsonl") == 2
    assert "has records of 1 problem whose prompt or answer has changed" in capsys.readouterr().err


def test_replies_that_were_cut_off_come_with_what_to_do(here, capsys):
    assert run("in.jsonl", "-o", "out.jsonl", "-n", "4") == 0
    err = capsys.readouterr().err
    assert "cut off   10 reached --max-tokens" in err and "a larger -n, or --think-budget auto" in err


def test_dash_streams_records_from_stdin_to_stdout(here, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(Path("in.jsonl").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("-") == 0
    out, _ = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == [f"p{i}" for i in range(10)]
    assert sorted(os.listdir()) == ["in.jsonl", "m.gguf"]


# ---------------------------------------------------------------- resuming


def test_a_finished_run_started_again_does_nothing(here, engine, capsys):
    run("in.jsonl", "-o", "out.jsonl")
    before = Path("out.jsonl").read_bytes()
    asked = len(engine.prompts)
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    assert Path("out.jsonl").read_bytes() == before
    assert len(engine.prompts) == asked
    assert "all 10 problems are done already" in capsys.readouterr().err


def test_a_torn_last_line_is_named_cut_off_and_solved_again(here, engine, capsys):
    run("in.jsonl", "-o", "out.jsonl")
    data = Path("out.jsonl").read_bytes()
    cut = data.rindex(b"\n", 0, -1) + 20
    Path("out.jsonl").write_bytes(data[:cut])
    engine.prompts.clear()
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    assert engine.prompts == ["ask 9"]
    assert [r["id"] for r in records()] == [f"p{i}" for i in range(10)]
    err = capsys.readouterr().err
    assert "the last record was torn (19 bytes); it is cut off and solved again" in err
    assert "9 of 10 are done already, 1 to go" in err


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--kv-budget", "256"], "settings.kv_budget: 512 there, 256 now"),
        (["--temp", "1"], "settings.temperature: 0.0 there, 1.0 now"),
        (["-n", "7"], "settings.max_tokens: 4096 there, 7 now"),
        (["--policy", "full"], 'settings.policy: "zoomr" there, "full" now'),
    ],
)
def test_other_settings_are_refused_by_name_before_anything_runs(here, engine, capsys, flags, field):
    run("in.jsonl", "-o", "out.jsonl", "--limit", "5")
    before = Path("out.jsonl").read_bytes()
    engine.prompts.clear()
    assert run("in.jsonl", "-o", "out.jsonl", *flags) == 2
    err = capsys.readouterr().err
    assert field in err and "--overwrite" in err
    assert Path("out.jsonl").read_bytes() == before and engine.prompts == []


def test_another_model_under_the_same_name_is_refused(here, capsys):
    run("in.jsonl", "-o", "out.jsonl", "--limit", "5")
    Path("m.gguf").write_bytes(b"GGUG")
    assert run("in.jsonl", "-o", "out.jsonl") == 2
    assert "model: another m.gguf than there" in capsys.readouterr().err


def test_overwrite_starts_again(here, engine):
    run("in.jsonl", "-o", "out.jsonl")
    assert run("in.jsonl", "-o", "out.jsonl", "--kv-budget", "256", "--limit", "2", "--overwrite") == 0
    assert len(records()) == 2


def test_a_problem_that_changed_since_it_was_solved_is_refused(here, capsys):
    run("in.jsonl", "-o", "out.jsonl")
    write_problems("in.jsonl", 10, answer="5")
    assert run("in.jsonl", "-o", "out.jsonl") == 2
    assert "10 problems whose prompt or answer has changed since: p0 (line 1)" in capsys.readouterr().err


def test_threads_may_change_between_two_starts(here):
    run("in.jsonl", "-o", "out.jsonl", "--limit", "5", "-t", "1")
    assert run("in.jsonl", "-o", "out.jsonl", "-t", "2") == 0
    assert len(records()) == 10


# ---------------------------------------------------------------- failures


def test_failed_problems_are_recorded_and_end_in_3(here, engine, capsys):
    engine.replies["ask 4"] = EngineError("llama_decode said 1")
    assert run("in.jsonl", "-o", "out.jsonl") == 3
    assert records()[4]["error"] == {"type": "EngineError", "message": "llama_decode said 1"}
    err = capsys.readouterr().err
    assert "problem p4 failed: EngineError: llama_decode said 1" in err
    assert "9 of 9 right" in err
    assert "zoomr solve in.jsonl -o out.jsonl --retry-failed" in err


def test_failed_problems_stay_failed_until_a_retry_is_asked_for(here, engine):
    engine.replies["ask 4"] = EngineError("once")
    assert run("in.jsonl", "-o", "out.jsonl") == 3
    engine.replies.clear()
    engine.prompts.clear()
    assert run("in.jsonl", "-o", "out.jsonl") == 3
    assert engine.prompts == []
    assert run("in.jsonl", "-o", "out.jsonl", "--retry-failed") == 0
    assert engine.prompts == ["ask 4"]
    assert sorted(r["id"] for r in records()) == [f"p{i}" for i in range(10)]
    assert not any("error" in r for r in records())


def test_a_full_disk_ends_the_run_with_the_file_named(here, engine, capsys, monkeypatch):
    def no_space(file, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoomr_local.journal._write_line", no_space)
    assert run("in.jsonl", "-o", "out.jsonl") == 1
    assert "error: out.jsonl: No space left on device" in capsys.readouterr().err
    assert engine.prompts == ["ask 0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_is_done_and_say_how_to_go_on(here, engine, capsys, number):
    before = signal.getsignal(number)

    def interrupt():
        if len(engine.prompts) == 4:
            os.kill(os.getpid(), number)
            engine.on_token = lambda: None

    engine.on_token = interrupt
    assert run("in.jsonl", "-o", "out.jsonl", "--overwrite") == 130
    assert [r["id"] for r in records()] == ["p0", "p1", "p2"]
    err = capsys.readouterr().err
    assert "interrupted: 3 of 10 done, all in out.jsonl; to go on: zoomr solve in.jsonl -o out.jsonl\n" in err
    assert signal.getsignal(number) is before
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    assert [r["id"] for r in records()] == [f"p{i}" for i in range(10)]


# ---------------------------------------------------------------- used wrongly


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none.jsonl"], "error: cannot read none.jsonl: No such file or directory"),
        (["."], "error: cannot read .: Is a directory"),
        (["in.jsonl", "-o", "in.jsonl"], "error: the output in.jsonl is the input; name another file with -o"),
        (["in.jsonl", "-o", "none/out.jsonl"], "error: cannot write none/out.jsonl: No such file or directory"),
        (["in.jsonl", "-o", "."], "error: . is not a regular file"),
        (["in.jsonl", "-o", "-", "--json"], "both want stdout"),
        (["in.jsonl", "--policy", "zomr"], "no such policy (did you mean zoomr?); there are zoomr, full"),
        (["in.jsonl", "--kv-budget", "lots"], "error: --kv-budget lots: give a number of tokens"),
        (["in.jsonl", "--kv-budget", "0.3"], "error: --kv-budget 0.3"),
        (["in.jsonl", "--kv-budget", "5"], "error: --kv-budget 5: at least"),
        (["in.jsonl", "--summary-rows", "9"], "error: --summary-rows 9: must be at most 8"),
        (["in.jsonl", "--kv-type", "q4_0"], "error: --kv-type q4_0: choose f16 or q8_0"),
        (["in.jsonl", "--kv-type", "q8_0", "--no-flash-attn"], "needs flash attention"),
        (["in.jsonl", "--vote-layers", "a"], "error: --vote-layers a"),
        (["in.jsonl", "--temp", "-1"], "error: --temp -1"),
        (["in.jsonl", "--limit", "0"], "--limit"),
        (["in.jsonl", "--no-such-flag"], "No such option"),
        ([], "Missing argument 'file': Problems: JSON lines, CSV, plain text or OpenAI batch lines; - is stdin (see `zoomr solve --help`)"),
    ],
)
def test_misuse_is_one_clear_line_and_exit_code_2(here, engine, capsys, arguments, complaint):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and complaint in err and "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert engine.prompts == []


def test_bad_lines_are_named_and_no_output_is_made(here, capsys):
    Path("in.jsonl").write_text('{"id": "a", "prompt": "p"}\n{"id": "a", "prompt": "p"}\nnot json\n')
    assert run("in.jsonl", "-o", "out.jsonl") == 2
    err = capsys.readouterr().err
    assert "line 2: id" in err and "line 3: not JSON" in err
    assert not Path("out.jsonl").exists()


def test_a_missing_model_is_exit_code_1_and_leaves_no_output(here, capsys):
    assert run("in.jsonl", "-o", "out.jsonl", "-m", "none.gguf") == 1
    assert "error: no model file at none.gguf; give the path of a .gguf file with -m" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["in.jsonl", "m.gguf"]


def test_an_output_that_another_process_writes_is_refused(here, capsys):
    with Journal.open(Path("out.jsonl")):
        assert run("in.jsonl", "-o", "out.jsonl") == 2
    assert "another process is writing out.jsonl" in capsys.readouterr().err


def test_full_says_that_it_does_not_use_a_budget(here, capsys):
    assert run("in.jsonl", "-o", "out.jsonl", "--policy", "full", "--kv-budget", "4k") == 0
    assert "policy full keeps every token" in capsys.readouterr().err
    assert json.loads(manifest_path(Path("out.jsonl")).read_text())["settings"]["kv_budget"] is None
