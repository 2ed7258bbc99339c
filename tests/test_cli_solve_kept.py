"""`zoomr solve` loses nothing that an earlier run made before a new one can really begin. The engine is a fake one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from fake_engine import FakeEngine, opener

from zoomr_cli.main import main
from zoomr_local.errors import EngineError, ModelError, UsageError
from zoomr_local.journal import record_key

VOTES = ("in.jsonl", "-o", "out.jsonl", "--votes", "2", "--temp", "0.7")
KEPT = Path("out.jsonl.attempts")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine, in a folder with three problems."""
    engine = FakeEngine()
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.setattr("zoomr_local.math_grader.installed", lambda: False)
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("ZOOMR_MODEL", "m.gguf")
    Path("in.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"ask {i}", "answer": "4"}) + "\n" for i in range(3)))
    return engine


def run(*arguments: str) -> int:
    return main(["solve", *arguments])


def records() -> list[str]:
    return [json.loads(line)["id"] for line in Path("out.jsonl").read_text().splitlines()]


def interrupt_in(engine, reply: int) -> None:
    """A Ctrl-C while the reply of that number, from 1, is made."""

    def interrupt():
        if len(engine.prompts) == reply:
            os.kill(os.getpid(), signal.SIGINT)
            engine.on_token = lambda: None

    engine.on_token = interrupt


@pytest.fixture
def one_vote_of_the_second(engine):
    """The first problem is done; of the second one vote is made."""
    interrupt_in(engine, 4)
    assert run(*VOTES) == 130
    assert records() == ["p0"] and len(KEPT.read_text().splitlines()) == 1
    engine.prompts.clear()


def refuse(monkeypatch, engine):
    def open_engine(model_file, config, n_gpu_layers):
        raise ModelError("m.gguf is damaged")

    monkeypatch.setattr("zoomr_cli.solve.open_engine", open_engine)


def test_overwriting_takes_nothing_away_before_the_model_can_refuse(one_vote_of_the_second, engine, monkeypatch, capsys):
    before = KEPT.read_bytes()
    with monkeypatch.context() as patched:
        refuse(patched, engine)
        assert run(*VOTES, "--overwrite") == 1
    assert "m.gguf is damaged" in capsys.readouterr().err
    assert KEPT.read_bytes() == before and records() == ["p0"]
    assert run(*VOTES) == 0
    assert engine.prompts == ["ask 1", "ask 2", "ask 2"] and not KEPT.exists()


def test_overwriting_takes_nothing_away_before_the_schema_can_refuse(one_vote_of_the_second, engine, monkeypatch, capsys):
    before = KEPT.read_bytes()
    Path("s.json").write_text("true")

    def no_grammar(self, model):
        raise UsageError("simplify the schema")

    monkeypatch.setattr("zoomr_cli.solve_replies.Replies.check_grammar", no_grammar)
    assert run(*VOTES, "--schema", "s.json", "--overwrite") == 2
    assert "simplify the schema" in capsys.readouterr().err
    assert KEPT.read_bytes() == before and records() == ["p0"]


def test_a_smaller_limit_keeps_the_votes_of_the_problems_behind_it(one_vote_of_the_second, engine, capsys):
    Path("in.jsonl").write_text('{"id": "new", "prompt": "ask new"}\n' + Path("in.jsonl").read_text())
    assert run(*VOTES, "--limit", "1") == 0
    assert engine.prompts == ["ask new", "ask new"] and KEPT.exists()
    assert "out.jsonl.attempts: 1 reply to unfinished problems is there already" in capsys.readouterr().err
    assert run(*VOTES) == 0
    assert engine.prompts[2:] == ["ask 1", "ask 2", "ask 2"] and not KEPT.exists()


def test_replies_that_nobody_asks_for_any_more_are_said_to_go(one_vote_of_the_second, engine, capsys):
    lines = Path("in.jsonl").read_text().splitlines(keepends=True)
    Path("in.jsonl").write_text(lines[0] + lines[2])
    assert run(*VOTES) == 0
    assert "out.jsonl.attempts: 1 reply of an earlier run, asked for otherwise or overwritten, thrown away" in capsys.readouterr().err
    assert not KEPT.exists()


def test_trying_failed_ones_again_leaves_those_that_are_not_tried(engine):
    engine.replies = {"ask 0": EngineError("once"), "ask 2": EngineError("once")}
    assert run("in.jsonl", "-o", "out.jsonl") == 3
    engine.replies.clear()
    assert run("in.jsonl", "-o", "out.jsonl", "--retry-failed", "--limit", "2") == 0
    found = {record["id"]: "error" in record for record in map(json.loads, Path("out.jsonl").read_text().splitlines())}
    assert found == {"p0": False, "p1": False, "p2": True}


def test_checkpoints_stay_until_the_run_begins(engine, monkeypatch, capsys):
    monkeypatch.setattr("zoomr_local.checkpoint.Checkpoints._reason", lambda self, path, ours: None)
    keys = []
    monkeypatch.setattr("zoomr_local.journal.record_key", lambda problem, manifest: keys.append(record_key(problem, manifest)) or keys[-1])
    command = ("in.jsonl", "-o", "out.jsonl", "--checkpoint", "ck", "--limit", "1", "--overwrite")
    with monkeypatch.context() as patched:
        refuse(patched, engine)
        assert run(*command) == 1
        kept = Path("ck", keys[0])
        kept.mkdir(parents=True)
        assert run(*command) == 1
    assert kept.exists()
    assert run(*command) == 0
    assert not kept.exists() and "--overwrite starts its problem again; it is thrown away" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_checkpoint_of_a_problem_behind_the_limit_is_this_runs(engine, monkeypatch, capsys, more):
    keys = []
    monkeypatch.setattr("zoomr_local.journal.record_key", lambda problem, manifest: keys.append(record_key(problem, manifest)) or keys[-1])
    command = ("in.jsonl", "-o", "out.jsonl", "--checkpoint", "ck")
    with monkeypatch.context() as patched:
        refuse(patched, engine)
        assert run(*command) == 1
    last = Path("ck", list(dict.fromkeys(keys))[2])
    last.mkdir(parents=True)  # as a kill before the first save leaves it
    assert run(*command, "--limit", "1", *more) == 0
    said = "--overwrite starts its problem again" if more else "nothing was saved in it yet"
    assert f"{last}: {said}; it is thrown away" in capsys.readouterr().err and not last.exists()


@pytest.mark.parametrize("damage", [lambda lines: ["no record", *lines[1:]], lambda lines: [lines[0], "", *lines[1:]]])
def test_a_damaged_output_can_be_started_again_as_its_message_says(engine, capsys, damage):
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    lines = Path("out.jsonl").read_text().splitlines()
    Path("out.jsonl").write_text("\n".join(damage(lines)) + "\n")
    assert run("in.jsonl", "-o", "out.jsonl") == 2 and "start again with --overwrite" in capsys.readouterr().err
    assert run("in.jsonl", "-o", "out.jsonl", "--overwrite") == 0 and records() == ["p0", "p1", "p2"]


def test_a_file_of_somebody_else_is_not_overwritten(engine, capsys):
    Path("out.jsonl").write_text("precious\nlines\n")
    assert run("in.jsonl", "-o", "out.jsonl", "--overwrite") == 2
    assert "rm out.jsonl" in capsys.readouterr().err and Path("out.jsonl").read_text() == "precious\nlines\n"


@pytest.mark.parametrize("lacks", ["key", "finish_reason", "kv", "usage"])
def test_an_output_that_somebody_edited_is_said_in_a_line(engine, capsys, lacks):
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    kept = [{name: value for name, value in json.loads(line).items() if name != lacks} for line in Path("out.jsonl").read_text().splitlines()]
    Path("out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    for more in ((), ("--retry-failed",)):
        assert run("in.jsonl", "-o", "out.jsonl", *more) == 2
        err = capsys.readouterr().err
        assert f"has a record without '{lacks}'" in err and "--overwrite" in err and "Traceback" not in err


def test_a_manifest_that_somebody_edited_is_said_in_a_line(engine, capsys):
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    path = Path("out.jsonl.manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": None}))
    assert run("in.jsonl", "-o", "out.jsonl") == 2
    assert "is not a manifest of zoomr solve" in capsys.readouterr().err


def test_a_commit_between_two_starts_is_said_and_costs_no_record(engine, monkeypatch, capsys):
    """Of a clone: what was solved stays, with a note that names both commits; an installed version is refused as ever."""
    def of(commit: str) -> None:
        monkeypatch.setattr("zoomr_cli.versions.versions", lambda: {"zoomr": commit})

    of("checkout at aaa")
    assert run("in.jsonl", "-o", "out.jsonl") == 0
    cut = Path("out.jsonl").read_bytes().splitlines(keepends=True)[:2]
    Path("out.jsonl").write_bytes(b"".join(cut))
    engine.prompts.clear()
    capsys.readouterr()
    of("checkout at bbb+")
    assert run("in.jsonl", "-o", "out.jsonl") == 0 and engine.prompts == ["ask 2"] and records() == ["p0", "p1", "p2"]
    err = capsys.readouterr().err
    assert "note: out.jsonl: records there were made with zoomr checkout at aaa, further ones are with checkout at bbb+" in err
    assert json.loads(Path("out.jsonl.manifest.json").read_text())["info"]["earlier_zoomr"] == ["checkout at aaa"]
    assert run("in.jsonl", "-o", "out.jsonl") == 0 and "note:" not in capsys.readouterr().err, "nothing is left to make"
    of("0.2")
    assert run("in.jsonl", "-o", "out.jsonl") == 2 and "versions.zoomr" in capsys.readouterr().err
