"""`zoomr demo`, `problems`, `policies`, `--version`, and the drawing of blocks; the engine is a fake one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine, opener
from rich.console import Console

from zoomr_cli import versions
from zoomr_cli.blocks import ASCII, AWAY, KEPT, UNICODE, WRITTEN, ZOOMED, Trace, draw, legend
from zoomr_cli.main import main
from zoomr_cli.render import human_bytes, human_seconds
from zoomr_local.events import BlockClosed, PagedIn, PagedOut, Refreshed, TokenDecoded
from zoomr_local.solve import read_problems
from zoomr_models import demo_problems_path


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    return engine


# ---------------------------------------------------------------- drawing


def two_thoughts() -> Trace:
    """Prompt of 10; two thoughts of 10 tokens with summaries of 2; the first leaves, is voted for and leaves again."""
    trace = Trace()
    for position in range(10, 70):
        trace.feed(TokenDecoded(position, 1, "x", "thought", min(position, 30)))
        if position == 21:
            trace.feed(BlockClosed(0, "thought", (10, 20), (20, 22), "Worked out oak."))
        if position == 33:
            trace.feed(BlockClosed(1, "thought", (22, 32), (32, 34), "Worked out a tree with a very long name."))
        if position in (40, 60):
            trace.feed(PagedOut(position, (0,), "detail", 10, 160))
            trace.feed(PagedOut(position, (1,), "summary", 2, 32))
        if position == 50:
            trace.feed(Refreshed(position, (0,), 0.5, "interval"))
            trace.feed(PagedIn(position, (0,), "detail", 10, 160))
    return trace


def test_spans_tell_when_a_thought_was_where():
    trace = two_thoughts()
    first, second = (trace.spans(b) for b in trace.blocks)
    assert first == [(10, 22, WRITTEN), (22, 40, KEPT), (40, 50, AWAY), (50, 60, ZOOMED), (60, 70, AWAY)]
    assert second == [(22, 34, WRITTEN), (34, 70, KEPT)], "where its summary is does not move a thought"
    assert trace.zooms == 1


def test_room_that_is_left_over_is_no_zoom():
    trace = two_thoughts()
    trace.choices = [(50, (1,))]
    assert trace.spans(trace.blocks[0])[3] == (50, 60, KEPT)
    assert trace.spans(trace.blocks[1])[2] == (50, 70, ZOOMED)


def test_a_row_is_a_thought_and_time_runs_to_the_right():
    lines = draw(two_thoughts(), width=26 + 8 + 30).plain.splitlines()
    assert lines[0] == "  1 Worked out oak.       " + "██████░░░░░░░░░·····▲▲▲▲▲·····"
    assert lines[1] == "  2 Worked out a tree w.." + " " * 7 + "██████░░░░░░░░░░░░░░░░░░"
    assert lines[2].startswith("            tokens so far ▂") and lines[2].endswith("█ 70")
    assert lines[3].startswith("   tokens in the KV cache ▂") and lines[3].endswith("▄ 30")


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_nothing_is_wider_than_the_terminal(width, glyphs):
    for text in (draw(two_thoughts(), width, glyphs), legend(width, glyphs)):
        assert max(map(len, text.plain.splitlines())) <= width
        assert glyphs is UNICODE or text.plain.isascii()


def test_many_blocks_are_cut_and_counted():
    trace = Trace()
    for i in range(30):
        trace.feed(TokenDecoded(i, 1, "x", "thought", i))
        trace.feed(BlockClosed(i, "thought", (i, i + 1), None, "x"))
    assert "... and 6 more" in draw(trace, 80).plain


def test_an_empty_trace_draws_without_dividing_by_zero():
    assert draw(Trace(), 80).plain


def test_sizes_and_times_for_people():
    assert [human_bytes(n) for n in (0, 1023, 1024, 3 << 20, 5 << 30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "5.0 GiB"]
    assert [human_seconds(n) for n in (0.4, 41, 200, 7500)] == ["0.4 s", "41 s", "3 min 20 s", "2 h 05 min"]


# ---------------------------------------------------------------- demo


def test_demo_prints_a_table_and_a_drawing_on_stdout(engine, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "full" in out and "zoomr" in out and "of 8" in out and "cells" in out and "zooms" in out
    assert "▲" in out and "zoomed: the heads vote for it" in out
    assert "\x1b" not in out, "no colour codes into a pipe"
    assert max(map(len, out.splitlines())) <= 80


def test_what_the_model_writes_cannot_command_the_terminal(engine, capsys, monkeypatch):
    hostile = "4\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b2J\u202e"
    monkeypatch.setattr(engine, "replies", dict.fromkeys((p["prompt"] for p in map(json.loads, demo_problems_path().read_text().splitlines())), hostile))
    monkeypatch.setattr("fake_engine.BlockClosed", lambda *given: BlockClosed(*given[:4], hostile))
    assert main(["demo", "-q"]) == 0
    out, _ = capsys.readouterr()
    assert "-> 4]52;c;ZXZpbA==[2J2J (" in out and "  1 4]52;c;ZXZp" in out
    assert not {c for c in out if not c.isprintable()} - {"\n"}


def test_demo_compares_the_policies_that_are_named(engine, capsys):
    assert main(["demo", "-q", "--policy", "recency", "--policy", "zoomr", "--kv-budget", "256"]) == 0
    out, _ = capsys.readouterr()
    assert "recency" in out and "full" not in out
    assert engine.config.kv_budget == 256


def test_demo_as_json(engine, capsys):
    assert main(["demo", "-q", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [run["policy"] for run in result["runs"]] == ["full", "zoomr"]
    run = result["runs"][1]
    assert len(run["records"]) == 8
    assert run["traces"][run["records"][0]["id"]]["moves"][0]["to"] == "tier"


def test_demo_with_the_real_engine_keeps_its_budget_where_full_does_not(tmp_path, monkeypatch, capsys):
    two = tmp_path / "two.jsonl"
    two.write_text("".join(demo_problems_path().read_text().splitlines(keepends=True)[:2]))
    monkeypatch.setattr("zoomr_models.demo_problems_path", lambda: two)
    assert main(["demo", "-q", "--json"]) == 0
    full, zoomr = json.loads(capsys.readouterr().out)["runs"]
    assert (full["policy"], zoomr["policy"]) == ("full", "zoomr")
    assert zoomr["failed"] == full["failed"] == 0
    assert zoomr["resident_peak"] <= zoomr["kv_budget"] < full["resident_peak"]
    assert all(trace["blocks"] and trace["choices"] for trace in zoomr["traces"].values())
    assert not any(trace["moves"] for trace in full["traces"].values())


def test_an_unknown_policy_is_named_with_the_nearest(engine, capsys):
    assert main(["demo", "--policy", "ful"]) == 2
    assert "did you mean full?" in capsys.readouterr().err


# ---------------------------------------------------------------- problems, policies, versions


def test_problems_are_what_solve_reads(tmp_path, capsys):
    out = tmp_path / "dag.jsonl"
    assert main(["problems", "dag", "-n", "20", "--thoughts", "3", "--seed", "5", "-o", str(out)]) == 0
    problems = read_problems(out.read_bytes().split(b"\n"), "dag")
    assert len(problems) == 20 and all(p.answer is not None for p in problems)
    assert main(["problems", "dag", "-n", "20", "--thoughts", "3", "--seed", "5"]) == 0
    assert capsys.readouterr().out == out.read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["problems", "none"], "there are dag, ledger, linsys, series"),
        (["problems", "dag", "--split", "none"], "unknown split"),
        (["problems", "dag", "--thoughts", "1000"], "dag takes 1 to"),
        (["problems", "dag", "-o", "taken"], "taken exists"),
    ],
)
def test_misuse_of_problems(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_policies_lists_the_registry(capsys):
    assert main(["policies"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert main(["policies", "--json"]) == 0
    assert listed == list(json.loads(capsys.readouterr().out))
    assert {"zoomr", "full"} <= set(listed)


def test_version_names_all_three(capsys):
    assert main(["--version"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["zoomr", "bindings", "engine"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with a file of code in it, and git's variables set to another one, as in a hook."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "clone"
    (root / "zoomr_local").mkdir(parents=True)
    (root / "zoomr_local" / "a.py").write_text("one")
    (root / "notes.md").write_text("one")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    return root


def test_a_checkout_is_named_by_its_commit_and_changed_code_by_a_plus(clone, monkeypatch):
    commit = (clone / ".git" / (clone / ".git" / "HEAD").read_text().split()[1]).read_text().strip()
    tell = versions.checkout.__wrapped__
    assert tell(clone) == f"checkout at {commit[:10]}"
    (clone / "notes.md").write_text("two")
    (clone / "zoomr_local" / "untracked.py").write_text("")
    assert tell(clone) == f"checkout at {commit[:10]}", "no tracked code differs"
    (clone / "zoomr_local" / "a.py").write_text("two")
    assert tell(clone) == f"checkout at {commit[:10]}+"
    versions.checkout.cache_clear()
    monkeypatch.setattr(versions, "__file__", str(clone / "cli" / "versions.py"))
    monkeypatch.setattr(versions, "_installed", lambda name: "not installed")
    assert versions._packages()["zoomr"] == f"checkout at {commit[:10]}+"
    monkeypatch.setattr(versions, "_installed", lambda name: "1.2")
    assert versions._packages()["zoomr"] == "1.2", "an installed package is what it says"
    versions.checkout.cache_clear()


def test_git_is_run_in_the_checkout_of_this_package_only(clone, monkeypatch):
    (clone / "inner" / "zoomr_local").mkdir(parents=True)  # a copy in somebody's repository
    (clone / "other" / ".git").mkdir(parents=True)  # a repository of something else
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git was run"))
        assert versions.checkout.__wrapped__(clone / "inner") is None is versions.checkout.__wrapped__(clone / "other")
    (clone / "other" / "zoomr_local").mkdir()
    assert versions.checkout.__wrapped__(clone / "other") is None, "damaged, so git cannot tell"
    monkeypatch.setenv("PATH", str(clone))
    assert versions.checkout.__wrapped__(clone) is None, "no git"


def test_without_the_library_everything_that_does_not_decode_still_works(tmp_path):
    env = {**os.environ, "ZOOMR_LIB_DIR": str(tmp_path)}
    problems = tmp_path / "in.jsonl"
    problems.write_text('{"id": "a", "prompt": "p"}\n')

    def zoomr(*arguments):
        return subprocess.run([sys.executable, "-m", "zoomr_cli", *arguments], capture_output=True, text=True, env=env, cwd=tmp_path)

    assert zoomr("--help").returncode == 0
    assert zoomr("policies").returncode == 0
    assert "engine    not available" in zoomr("--version").stdout
    done = zoomr("solve", "in.jsonl")
    assert done.returncode == 1
    assert done.stderr.startswith("error: zoomr-local's own build of llama.cpp is missing") and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl"]


def test_help_is_light_and_needs_no_library():
    """Neither numpy, rich's tables, the engine nor the model package are loaded to print help."""
    code = (
        "import sys; from zoomr_cli.main import main\n"
        "code = main(['solve', '--help'])\n"
        "heavy = [m for m in ('numpy', 'jinja2', 'llama_cpp', 'zoomr_local.engine', 'zoomr_models') if m in sys.modules]\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert "--kv-budget" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback():
    code = "from zoomr_cli.main import main; raise SystemExit(main(['problems', 'dag', '-n', '2000']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_a_console_without_unicode_gets_ascii(engine, monkeypatch, capsys):
    monkeypatch.setattr(Console, "encoding", "ascii")
    assert main(["demo", "-q"]) == 0
    out = capsys.readouterr().out
    assert "^ zoomed: the heads" in out
