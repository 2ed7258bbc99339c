"""The tiers' flags as a user meets them, and what the tiers did in records, summary and exit code. The engine is a fake one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import FakeEngine, opener

from zoomr_cli.main import main
from zoomr_local.errors import StorageError, TierSizeError
from zoomr_local.events import Finished
from zoomr_local.journal import manifest_path

SAME = ["-o", "out.jsonl"]


@pytest.fixture
def engine(monkeypatch, tmp_path):
    engine = FakeEngine()
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("ZOOMR_MODEL", "m.gguf")
    rows = [{"id": f"p{i}", "prompt": f"ask {i}", "answer": "4"} for i in range(3)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return engine


def run(*arguments: str) -> int:
    return main(["solve", "in.jsonl", *SAME, *arguments])


def records() -> list[dict]:
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def test_flags_reach_the_engine_and_the_folder_is_not_part_of_what_must_be_the_same(engine):
    flags = ["--kv-ram", "64MiB", "--kv-disk", "500MB", "--kv-page-type", "q8_0", "--on-full", "stop", "--wait-for-disk"]
    assert run(*flags, "--kv-dir", "pages") == 0
    c = engine.config
    assert (c.kv_ram, c.kv_disk, c.kv_page_type, c.on_full, c.wait_for_disk) == (64 << 20, 500 * 10**6, "q8_0", "stop", True)
    assert c.kv_dir == Path.cwd() / "pages"
    settings = json.loads(manifest_path(Path("out.jsonl")).read_text())["settings"]
    assert settings["kv_ram"] == 64 << 20 and "kv_dir" not in settings
    assert run(*flags, "--kv-dir", "elsewhere") == 0, "the same records from another folder"
    assert run(*flags[2:], "--kv-dir", "pages") == 2, "another limit can be other tokens"


def test_the_defaults_are_a_gibibyte_of_ram_and_eight_of_disk(engine):
    assert run() == 0
    assert (engine.config.kv_ram, engine.config.kv_disk, engine.config.kv_dir) == (1 << 30, 8 << 30, None)
    assert (engine.config.kv_page_type, engine.config.on_full, engine.config.wait_for_disk) == ("f16", "drop", False)


@pytest.mark.parametrize("flags, said", [
    (["--kv-dir", "~nobody-at-all/pages"], "--kv-dir ~nobody-at-all/pages: there is no such user; write the folder in full"),
    (["--kv-ram", "lots"], "--kv-ram lots: give a size in bytes, for example 1GiB"),
    (["--kv-disk", "-1"], "--kv-disk -1: give a size"),
    (["--kv-page-type", "q2"], "--kv-page-type q2: choose one of f16, q8_0, q4_0"),
    (["--on-full", "burn"], "--on-full burn: choose one of drop, stop, error"),
    (["--kv-page-type", "q8_0", "--kv-type", "q8_0"], "--kv-page-type q8_0 needs --kv-type f16"),
])  # fmt: skip
def test_wrong_flags_are_one_line_and_exit_code_2(engine, capsys, flags, said):
    assert run(*flags) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and not Path("out.jsonl").exists()


def test_full_tiers_that_are_an_error_end_the_run_and_keep_what_is_finished(engine, capsys):
    engine.replies["ask 1"] = StorageError("no room for paged-out blocks at position 9: raise --kv-disk")
    assert run() == 1
    assert [r["id"] for r in records()] == ["p0"]
    assert "error: no room for paged-out blocks at position 9" in capsys.readouterr().err
    del engine.replies["ask 1"]
    assert run() == 0 and [r["id"] for r in records()] == ["p0", "p1", "p2"]


def test_what_the_tiers_did_is_in_the_record_and_the_summary(engine, capsys, monkeypatch):
    generate = engine.generate

    def faulty(prompt, sampling, max_tokens):
        for event in generate(prompt, sampling, max_tokens):
            if isinstance(event, Finished):
                cache = replace(event.cache, disk_bytes=5000, disk_written_bytes=4096, disk_read_bytes=7, lost_blocks=2, faults=1)
                event = replace(event, reason="kv_full", cache=cache)
            yield event

    monkeypatch.setattr(engine, "generate", faulty)
    assert run("--json") == 0
    out, err = capsys.readouterr()
    assert [r["finish_reason"] for r in records()] == ["kv_full"] * 3
    assert records()[0]["kv"]["disk_bytes"] == 5000 and records()[0]["kv"]["disk_read_bytes"] == 7
    summary = json.loads(out)
    assert (summary["lost_blocks"], summary["faults"], summary["kv_full"], summary["disk_written_bytes"]) == (6, 3, 3, 12288)
    assert "12.0 KiB of pages written" in err and "6 blocks live on as their summaries" in err
    assert "3 page files could not be written or read" in err and "3 stopped because --kv-ram and --kv-disk were full" in err


def test_a_folder_that_cannot_be_used_is_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOOMR_MODEL", raising=False)
    Path("in.jsonl").write_text('{"id": 1, "prompt": "1 + 1?"}\n')
    Path("file").write_text("x")
    assert main(["solve", "in.jsonl", *SAME, "--kv-dir", "file/pages"]) == 1
    err = capsys.readouterr().err
    assert "pages cannot be written to" in err and "--kv-dir" in err and "Traceback" not in err and not Path("out.jsonl").exists()


def test_a_problem_too_long_for_the_tiers_is_its_own_error_and_the_others_are_solved(engine):
    engine.replies["ask 1"] = TierSizeError("up to 9 GiB of pages may go to /pages, where 1 GiB are free")
    assert run("--retries", "2") == 3
    assert [(r["id"], r.get("error", {}).get("type")) for r in records()] == [("p0", None), ("p1", "TierSizeError"), ("p2", None)]
    assert "tries" not in records()[1], "another try would need as much"
