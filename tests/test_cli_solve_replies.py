"""`zoomr solve` with other inputs, templates, schemas, votes, tries and time limits, as a user meets it. The engine is a fake one."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine, opener

from zoomr_cli.main import main
from zoomr_local.errors import EngineError
from zoomr_models import bundled_model_path


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.setattr("zoomr_local.math_grader.installed", lambda: False)
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)
    return engine


@pytest.fixture
def here(tmp_path, monkeypatch, engine) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("ZOOMR_MODEL", "m.gguf")
    Path("in.csv").write_text("question,answer,topic\nask 0,4,sums\nask 1,4,sums\n")
    return tmp_path


def run(*arguments: str) -> int:
    return main(["solve", *arguments])


def lines(name: str = "out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


# ---------------------------------------------------------------- inputs and outputs


def test_names_in_an_input_cannot_write_to_the_terminal(here, capsys):
    owned = "\x1b]0;owned\x07"
    Path("bad.csv").write_text(f"q{owned},answer\na,b\n")
    assert run("bad.csv") == 2
    body = {**BATCH["body"], "n": 2}
    asked = [{**BATCH, "body": {**BATCH["body"], "x" + owned: 1}}, {**BATCH, "custom_id": "b" + owned, "body": body}]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    assert run("in.jsonl", "-o", "out.jsonl") == 3
    said = capsys.readouterr().err
    assert said.count("]0;owned") == 3 and "\x1b" not in said and lines()[1]["id"] == "b" + owned


def test_a_trace_that_is_refused_costs_no_record(here, capsys):
    assert run("in.csv", "-o", "out.jsonl") == 0
    before = Path("out.jsonl").read_bytes()
    Path("note.txt").write_text("mine")
    assert run("in.csv", "-o", "out.jsonl", "--overwrite", "--trace", "note.txt") == 2
    assert "it is no trace" in capsys.readouterr().err and Path("out.jsonl").read_bytes() == before
    assert run("in.csv", "-o", "new.jsonl", "--trace", "note.txt") == 2 and not Path("new.jsonl").exists()


def test_a_table_is_solved_and_graded(here):
    assert run("in.csv", "-o", "out.jsonl") == 0
    assert [(r["id"], r["correct"], r["grader"]) for r in lines()] == [(1, True, "built-in"), (2, True, "built-in")]
    assert run("in.csv") == 0 and Path("in.zoomr.out.jsonl").exists()


def test_a_text_says_how_it_was_cut_into_problems(here, capsys, engine):
    Path("in.txt").write_text("ask 0\nask 1\n")
    assert run("in.txt", "-o", "out.jsonl") == 0
    assert "in.txt: 2 problems, one a line (--input-format says otherwise)" in capsys.readouterr().err
    assert engine.prompts == ["ask 0", "ask 1"]
    assert run("in.txt", "-o", "two.jsonl", "--input-format", "paragraphs") == 0
    assert engine.prompts[2:] == ["ask 0\nask 1"]


def test_a_table_from_stdin_streams_records_to_stdout(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"question,answer\nask 0,4\n")))
    assert run("-", "-q") == 0
    assert json.loads(capsys.readouterr().out)["id"] == 1


@pytest.mark.parametrize("as_file", [True, False])
def test_a_template_is_a_file_or_a_text_and_part_of_what_was_asked(here, engine, capsys, as_file):
    Path("t.txt").write_text("{topic}: {question}\n")
    assert run("in.csv", "-o", "out.jsonl", "--template", "t.txt" if as_file else "{topic}: {question}") == 0
    assert engine.prompts == ["sums: ask 0", "sums: ask 1"]
    assert run("in.csv", "-o", "out.jsonl") == 2
    assert "whose prompt or answer has changed since: 1 (line 2)" in capsys.readouterr().err


BATCH = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "x", "messages": [{"role": "user", "content": "ask 0"}]}}


def test_batch_lines_become_batch_results_that_can_be_gone_on_with(here, engine, capsys):
    refused = {**BATCH, "custom_id": "b", "body": {**BATCH["body"], "tools": [{}]}}
    Path("in.jsonl").write_text(json.dumps(BATCH) + "\n" + json.dumps(refused) + "\n")
    assert run("in.jsonl", "-o", "out.jsonl", "--output-format", "openai") == 3
    solved, failed = lines()
    assert (solved["custom_id"], solved["response"]["body"]["choices"][0]["message"]["content"]) == ("a", "The answer is 4.")
    assert failed["error"] == {"code": "UnsupportedRequest", "message": "body.tools is not supported: leave it out"}
    assert "note: body.model is passed over: -m says which model answers (of 1 problem)" in capsys.readouterr().err
    before = Path("out.jsonl").read_bytes()
    assert run("in.jsonl", "-o", "out.jsonl", "--output-format", "openai") == 3
    assert Path("out.jsonl").read_bytes() == before and engine.prompts == ["ask 0"]
    assert run("in.jsonl", "-o", "out.jsonl") == 2
    assert 'settings.output_format: "openai" there, null now' in capsys.readouterr().err
    assert run("in.jsonl", "-o", "plain.jsonl") == 3
    assert [r["id"] for r in lines("plain.jsonl")] == ["a", "b"] and lines("plain.jsonl")[0]["warnings"] == ["body.model is passed over: -m says which model answers"]
    assert run("in.jsonl", "-o", "plain.jsonl", "--output-format", "openai") == 2


# ---------------------------------------------------------------- replies


def test_votes_are_counted_listed_and_part_of_the_settings(here, engine, capsys):
    engine.replies = {"ask 0": [f"The answer is {n}." for n in (5, 4, 4)]}
    assert run("in.csv", "-o", "out.jsonl", "--votes", "3", "--temp", "0.7", "--limit", "1") == 0
    (record,) = lines()
    assert (record["answer"], record["correct"], len(record["votes"])) == ("4", True, 3)
    assert not Path("out.jsonl.attempts").exists()
    assert run("in.csv", "-o", "out.jsonl", "--votes", "5", "--temp", "0.7") == 2
    assert "settings.votes: 3 there, 5 now" in capsys.readouterr().err


VOTES = ("in.csv", "-o", "out.jsonl", "--votes", "3", "--temp", "0.7", "--limit", "1")


@pytest.fixture
def two_votes_made(here, engine):
    """A run that was interrupted in the third of three votes."""
    engine.replies = {"ask 0": [f"The answer is {n}." for n in (4, 4, 5)]}

    def interrupt():
        if len(engine.prompts) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            engine.on_token = lambda: None

    engine.on_token = interrupt
    assert run(*VOTES) == 130
    assert lines() == [] and len(Path("out.jsonl.attempts").read_text().splitlines()) == 2
    engine.prompts.clear()


def test_votes_made_before_a_ctrl_c_are_not_made_again(two_votes_made, engine, capsys):
    assert run(*VOTES) == 0
    assert len(engine.prompts) == 1 and lines()[0]["answer"] == "4"
    assert "out.jsonl.attempts: 2 replies to unfinished problems are there already" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["in.csv", "m.gguf", "out.jsonl", "out.jsonl.manifest.json"]


def test_overwrite_throws_votes_away_too(two_votes_made, engine):
    assert run(*VOTES, "--overwrite") == 0
    assert len(engine.prompts) == 3 and not Path("out.jsonl.attempts").exists()


def test_a_line_that_is_greedy_by_itself_is_named_where_votes_are_asked_for(here, engine, capsys):
    asked = [{**BATCH, "custom_id": name, "body": {**BATCH["body"], "temperature": t}} for name, t in (("a", 0.5), ("b", 0), ("c", 0))]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    assert run("in.jsonl", "-o", "out.jsonl", "--votes", "3", "--temp", "0.7") == 2
    said = capsys.readouterr().err
    assert "--votes 3: b (line 2) and 1 more ask for a temperature of 0 themselves" in said and "give --temp" not in said
    assert run("in.jsonl", "-o", "out.jsonl", "--votes", "3", "--limit", "1") == 0, "every line says its own temperature"
    assert engine.samplings[0].temperature == 0.5


def test_what_a_batch_line_says_of_sampling_reaches_the_engine(here, engine, capsys):
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    asked = [{**BATCH, "body": {**BATCH["body"], "top_k": 7, "min_p": 0.2}}, {**BATCH, "custom_id": "b", "body": {**BATCH["body"], "response_format": form}}]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    engine.replies = {"ask 0": "4"}
    assert run("in.jsonl", "-o", "out.jsonl", "--top-k", "5", "--stop", "END") == 0
    first, second = engine.samplings
    assert (first.top_k, first.min_p, first.stop) == (7, 0.2, ("END",)) and (second.top_k, second.stop) == (5, ())
    note = "--stop is passed over: the problem's own schema says how its answer ends"
    assert f"note: {note} (of 1 problem)" in capsys.readouterr().err
    assert [note in record["warnings"] for record in lines()] == [False, True]


def test_a_line_that_asks_for_no_stop_is_not_said_to_have_a_schema(here, engine):
    Path("in.jsonl").write_text(json.dumps({**BATCH, "body": {**BATCH["body"], "stop": []}}) + "\n")
    assert run("in.jsonl", "-o", "out.jsonl", "--stop", "END") == 0
    assert engine.samplings[0].stop == () and not [text for text in lines()[0]["warnings"] if "--stop" in text]


def test_an_automatic_think_budget_is_that_of_the_line_that_is_replied_to(here, engine, monkeypatch):
    asked = [BATCH, {**BATCH, "custom_id": "b", "body": {**BATCH["body"], "max_tokens": 400}}]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    budgets, generate = [], engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, limits: budgets.append(limits.budget_tokens) or generate(*a))
    assert run("in.jsonl", "-o", "out.jsonl", "--think-budget", "auto") == 0
    assert budgets == [3072, 300]


def test_tries_and_their_limits(here, engine, capsys):
    engine.replies = {"ask 0": [EngineError("once"), "The answer is 4."], "ask 1": [""]}
    assert run("in.csv", "-o", "out.jsonl", "--retries", "1") == 0
    assert "so --retries is for errors only" in capsys.readouterr().err
    first, second = lines()
    assert len(first["tries"]) == 2 and "tries" not in second


def test_problems_out_of_time_are_kept_are_said_and_can_be_solved_again(here, engine, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("zoomr_local.solve.time.monotonic", lambda: now[0])
    engine.on_token = lambda: now.__setitem__(0, now[0] + 1)
    assert run("in.csv", "-o", "out.jsonl", "--timeout", "3", "--json") == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["timeouts"] == 2 and "out of time  2" in err and "--retry-failed" in err
    assert [(r["finish_reason"], r["content"]) for r in lines()] == [("timeout", "The a")] * 2
    assert run("in.csv", "-o", "out.jsonl", "--timeout", "99", "--retry-failed") == 0
    assert [r["finish_reason"] for r in lines()] == ["stop", "stop"]


def test_a_schema_reaches_the_engine_and_is_known_by_its_hash(here, engine, capsys):
    Path("s.json").write_text('{"type": "object", "properties": {"answer": {"type": "integer"}, "to": {"type": "string", "format": "email"}}}')
    engine.replies = {"ask 0": '{"answer": 4}'}
    assert run("in.csv", "-o", "out.jsonl", "--schema", "s.json", "--limit", "1") == 0
    assert "note: --schema s.json: #/properties/to: the format" in capsys.readouterr().err
    assert engine.samplings[0].grammar and lines()[0]["valid"] is True and lines()[0]["answer"] == "4"
    settings = json.loads(Path("out.jsonl.manifest.json").read_text())["settings"]
    assert len(settings["schema"]) == 16 and "grammar" not in settings
    Path("s.json").write_text('{"type": "object"}')
    assert run("in.csv", "-o", "out.jsonl", "--schema", "s.json") == 2
    assert "settings.schema" in capsys.readouterr().err


def test_what_is_not_used_leaves_no_trace_in_the_settings(here):
    assert run("in.csv", "-o", "out.jsonl", "--timeout", "1000") == 0
    settings = json.loads(Path("out.jsonl.manifest.json").read_text())["settings"]
    assert not {"votes", "vote_by", "retries", "schema", "grammar", "grader", "output_format", "timeout"} & settings.keys()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--votes", "3"], "--votes 3 with a temperature of 0: greedy replies are all the same; give --temp"),
        (["--vote-by", "majority"], "--vote-by majority needs votes to count"),
        (["--votes", "3", "--temp", "1", "--vote-by", "luck"], "--vote-by luck: choose one of majority, agreement"),
        (["--votes", "3", "--temp", "1", "--vote-by", "agreement", "--policy", "recency"], "which --policy recency does not count"),
        (["--timeout", "0"], "--timeout 0: give a number of seconds above 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--schema", "none.json"], "--schema none.json: No such file or directory"),
        (["--schema", "in.csv"], "--schema in.csv is not JSON"),
        (["--schema", "s.json", "--stop", "x"], "--stop could cut what --schema asks for"),
        (["--template", "none.txt"], "there is no such file, and as text it has no {field}"),
        (["--template", "{nothing}"], "the template's field {nothing} is not there"),
        (["--template", "{" * 5000], "--template"),
        (["--question-column", "q"], "--question-column q: the header has question, answer, topic"),
        (["--input-format", "xml"], "--input-format xml: choose one of"),
        (["--output-format", "xml"], "--output-format xml: choose one of records, openai"),
        (["--grader", "me"], "--grader me: choose one of auto, built-in, math-verify"),
        (["--grader", "math-verify"], "it is not installed; pip install math-verify"),
        (["--encoding", "klingon"], "there is no such encoding"),
    ],
)
def test_misuse_is_one_clear_error_and_exit_code_2(here, engine, capsys, arguments, complaint):
    Path("s.json").write_text("true")
    assert run("in.csv", "-o", "out.jsonl", *arguments) == 2
    err = capsys.readouterr().err
    assert complaint in err and err.startswith("error: ") and "Traceback" not in err
    assert engine.prompts == [] and not Path("out.jsonl").exists()


# ---------------------------------------------------------------- a look ahead


@pytest.fixture
def bundled(here, monkeypatch):
    monkeypatch.setenv("ZOOMR_MODEL", str(bundled_model_path()))


def test_a_dry_run_says_what_would_be_run_and_touches_nothing(here, bundled, engine, capsys):
    Path("in.csv").write_text("question,answer\nask 0,4\n" + "ask " * 200 + ",\n")
    before = sorted(p.name for p in here.iterdir())
    assert run("in.csv", "-o", "out.jsonl", "--dry-run", "--json", "--kv-budget", "256") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["problems"], report["graded"], report["done_already"], report["kv_budget"]) == (2, 1, 0, 256)
    assert report["prompt_tokens"]["min"] < 50 < 200 <= report["prompt_tokens"]["max"] and report["not_kept_whole"] == 1
    assert "ask 0" in report["first_prompt"] and report["first_prompt"] != "ask 0"
    assert sorted(p.name for p in here.iterdir()) == before and engine.prompts == []


def test_a_dry_run_in_words(here, bundled, capsys):
    refused = {**BATCH, "custom_id": "b\x1b]0;owned\x07", "body": {**BATCH["body"], "n": 2}}
    Path("in.jsonl").write_text(json.dumps(BATCH) + "\n" + json.dumps(refused) + "\n")
    assert run("in.jsonl", "--dry-run", "-n", "100000") == 0
    out = capsys.readouterr().out
    assert "problems  2, 0 with a reference" in out and "refused   b]0;owned (line 2): body.n 2" in out and "first prompt:\n" in out
    assert "1 reply could go beyond the" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none.csv"], "cannot read none.csv"),
        (["in.csv", "--schema", "s.json"], "simplify the schema"),
        (["in.csv", "--kv-budget", "5"], "--kv-budget 5"),
        (["in.csv", "-o", "none/out.jsonl"], "cannot write none/out.jsonl"),
    ],
)
def test_a_dry_run_ends_in_2_with_what_is_wrong(here, bundled, capsys, arguments, complaint):
    Path("s.json").write_text('{"anyOf": [{"$ref": "#"}, {"type": "null"}]}')
    assert run(*arguments, "--dry-run") == 2
    assert complaint in capsys.readouterr().err


def test_a_dry_run_of_a_model_in_a_home_that_is_not_known_is_a_line(here, bundled, capsys):
    assert run("in.csv", "-m", "~no-such-user/x.gguf", "--dry-run") == 1
    assert "no model file at ~no-such-user/x.gguf" in capsys.readouterr().err


def test_a_dry_run_looks_at_the_output_too(here, bundled, capsys, monkeypatch):
    assert run("in.csv", "-o", "out.jsonl", "--limit", "1") == 0
    before = Path("out.jsonl").read_bytes()
    capsys.readouterr()
    assert run("in.csv", "-o", "out.jsonl", "--dry-run") == 0
    assert "1 is done already" in capsys.readouterr().out
    assert run("in.csv", "-o", "out.jsonl", "--dry-run", "--kv-budget", "256") == 2
    assert "settings.kv_budget: 512 there, 256 now" in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == before


def test_a_dry_run_fetches_no_model(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(here / "hf"))
    assert run("in.csv", "--dry-run", "-m", "some/repo:Q4_K_M") == 1
    assert "is not on this machine, and --dry-run fetches nothing; zoomr models pull some/repo:Q4_K_M" in capsys.readouterr().err
