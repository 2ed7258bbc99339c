"""A setting that stands somewhere is left out of the runs that it does not apply to; a flag that is typed is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from fake_engine import FakeEngine, opener

from zoomr_cli.main import app, main
from zoomr_cli.setting_use import KEYS, unused
from zoomr_cli.settings import registry

PREFERENCES = """
vote-by = "agreement"
checkpoint-every = 5
pin-prompt = "off"
dense-layers = 1
kv-page-type = "q8_0"
kv-ram = "64MiB"
kv-disk = "64MiB"
kv-dir = "pages"
on-full = "stop"
wait-for-disk = true
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine, in a folder with a problem; the user's file holds what several runs need, none of them all of it."""
    engine = FakeEngine()
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.setattr("zoomr_local.math_grader.installed", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("ZOOMR_MODEL", "m.gguf")
    Path("in.jsonl").write_text('{"id": "a", "prompt": "ask"}\n')
    Path("config.toml").write_text(PREFERENCES)
    monkeypatch.setenv("ZOOMR_CONFIG", "config.toml")
    return engine


def solve(*more: str) -> int:
    return main(["solve", "in.jsonl", "-o", "out.jsonl", *more])


@pytest.mark.parametrize("policy", ["zoomr", "full", "recency", "snapkv", "clusterkv"])
def test_what_stands_in_a_file_refuses_no_plain_run(engine, capsys, policy):
    assert solve("--policy", policy) == 0
    assert capsys.readouterr().err.count("note:") == 0
    heads = policy in ("snapkv", "clusterkv")
    assert engine.config.pin_prompt != heads and engine.config.on_full == ("drop" if heads else "stop")
    assert engine.config.dense_layers == (policy == "clusterkv") and (engine.config.kv_ram == 64 << 20) == (policy != "snapkv")


@pytest.mark.parametrize("flags, complaint", [
    (["--vote-by", "majority"], "--vote-by majority needs votes to count"),
    (["--checkpoint-every", "3"], "--checkpoint-every needs --checkpoint DIR"),
    (["--pin-prompt", "off"], "--pin-prompt off means nothing to policy zoomr"),
    (["--policy", "snapkv", "--kv-ram", "1MiB"], "--kv-ram has no meaning for policy snapkv"),
    (["--schema", "s.json", "--stop", "x"], "--stop could cut what --schema asks for"),
    (["--policy", "recency", "--votes", "2", "--temp", "1", "--vote-by", "agreement"], "which --policy recency does not count"),
])  # fmt: skip
def test_what_is_typed_is_refused_as_ever(engine, capsys, flags, complaint):
    Path("s.json").write_text("true")
    assert solve(*flags) == 2
    assert complaint in capsys.readouterr().err


def test_a_setting_counts_where_it_has_a_use(engine):
    assert solve("--votes", "2", "--temp", "1", "--checkpoint", "ck") == 0
    assert json.loads(Path("out.jsonl.manifest.json").read_text())["settings"]["vote_by"] == "agreement"
    assert engine.config.kv_page_type == "q8_0"


def test_what_would_have_changed_something_is_said_with_its_place(engine, capsys, monkeypatch):
    Path("config.toml").write_text(PREFERENCES + 'stop = ["END"]\nthink-budget = "auto"\n')
    Path("s.json").write_text("true")
    engine.replies = {"ask": "4"}
    monkeypatch.setenv("ZOOMR_KV_TYPE", "q8_0")
    assert solve("--schema", "s.json", "--policy", "snapkv", "--votes", "2", "--temp", "1") == 0
    notes = {line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")}
    place = f"{Path.cwd()}/config.toml, line "
    assert notes == {
        f"note: vote-by is not used here: policy snapkv counts no votes of heads ({place}2 sets it)",
        f"note: stop is not used here: it could cut what --schema asks for ({place}12 sets it)",
        f"note: think-budget is not used here: policy snapkv has no use for it ({place}13 sets it)",
        "note: kv-type is not used here: policy snapkv has no use for it (ZOOMR_KV_TYPE sets it)",
    }
    assert engine.config.kv_type == "f16" and engine.samplings[0].stop == ()
    assert main(["solve", "in.jsonl", "-o", "two.jsonl", "-q", "--schema", "s.json", "--policy", "snapkv"]) == 0
    assert capsys.readouterr().err == ""


def test_every_key_that_is_looked_at_is_a_setting():
    known = {key for keys in registry(typer.main.get_command(app)).values() for key in keys}
    assert KEYS <= known
    assert set(unused(KEYS, lambda key: None)) == {"vote-by", "checkpoint-every", "pin-prompt", "dense-layers", "cluster-query", "clusters-added"}


def test_policies_of_a_list_are_known_behind_spaces():
    asked = {"policy": "full, clusterkv"}
    assert not {"pin-prompt", "dense-layers"} & set(unused(KEYS, asked.get))


def test_what_draws_bundled_problems_is_left_out_where_a_file_has_them():
    keys = ("thoughts", "split")
    assert unused(keys, {"policy": "full", "suite": "mine.jsonl"}.get) == dict.fromkeys(keys, "")
    assert unused(keys, {"policy": "full", "suite": "bundled"}.get) == unused(keys, {"policy": "full"}.get) == {}
