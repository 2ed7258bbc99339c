"""The benchmark of memory with tiers: its arithmetic, its journal, its comparison of logits, and quick whole runs.

Nothing here asserts a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import make_model, memory, memory_report, page_types, tiers  # noqa: E402
from benchmarks.journal import Journal  # noqa: E402
from benchmarks.planted import Busiest  # noqa: E402
from benchmarks.turns import Worker  # noqa: E402
from zoomr_local.policies import BlockView, Settings  # noqa: E402

MIB = 1 << 20


# ---------------------------------------------------------------- journal


def test_a_journal_keeps_what_is_finished_and_forgets_a_torn_line(tmp_path):
    first = Journal(tmp_path, "part", {"a": 1})
    first.add("one", {"x": 1.5})
    first.add("two", 2)
    first.add("one", 3)
    first.path.write_text(first.path.read_text() + '["three", {"x"')
    again = Journal(tmp_path, "part", {"a": 1})
    assert again.pieces == {"one": 3, "two": 2} and "three" not in again
    again.add("three", 4)
    assert Journal(tmp_path, "part", {"a": 1})["three"] == 4
    assert Journal(tmp_path, "part", {"a": 2}).pieces == {}, "other settings are another run"
    assert Journal(tmp_path, "part", {"a": 1}, fresh=True).pieces == {}
    again.done()
    assert not again.path.exists()


def test_a_journal_keeps_the_commit_of_each_piece(tmp_path):
    """The same command may go on at another commit; lines of before that was kept are of an unknown one."""
    first = Journal(tmp_path, "part", {}, commit="aaa")
    first.path.write_text('["zero", 0]\n')
    for commit, key in (("aaa", "one"), ("bbb+", "two"), ("bbb+", "three")):
        Journal(tmp_path, "part", {}, commit=commit).add(key, 1)
    again = Journal(tmp_path, "part", {}, commit="ccc")
    assert again.pieces == {"zero": 0, "one": 1, "two": 1, "three": 1} and again.commits() == ["unknown", "aaa", "bbb+"]
    again.add("one", 2)
    assert again.commits() == ["unknown", "ccc", "bbb+"]


def test_rounds_of_several_commits_are_said(tmp_path, monkeypatch):
    def measured(args, journal_of):
        journal = journal_of("tiers", {})
        journal.add(f"round {len(journal.pieces)}", 1)
        if len(journal.pieces) < 2:
            raise KeyboardInterrupt
        return {}

    for name, of in (("run_tiers", measured), ("wait_for_idle", lambda _: None), ("machine", lambda: {"busy": ""})):
        monkeypatch.setattr(memory, name, of)
    monkeypatch.setattr(memory.bench_meter, "why_busy_now", lambda: "")
    args = memory.options(["tiers", "--work", str(tmp_path)])
    monkeypatch.setattr(memory, "commit", lambda: "aaa")
    with pytest.raises(KeyboardInterrupt):
        memory.measure(args, [], None)
    monkeypatch.setattr(memory, "commit", lambda: "bbb")
    part = memory.measure(args, [], None)["parts"]["tiers"]
    assert (part["commit"], part["commits"]) == ("bbb", ["aaa", "bbb"])
    part["machine"] = tiers_part()["machine"]
    assert "commit bbb, **rounds of several commits** (aaa, bbb), as the run was interrupted and went on, `" in memory_report.conditions(part, "")
    assert "several" not in memory_report.conditions(tiers_part(), "")


# ---------------------------------------------------------------- arithmetic


def tiers_part(far_peak=200, packed_peak=600, speed=10.0):
    """A result with round numbers: 1 KiB a token, 32k tokens = 32 MiB of full cache, a budget of 1 MiB."""
    s = {"near": 1024, "far": 32768, "farthest": 131072, "ram_bytes": MIB, "threads": 1, "budget": 1024, "block": 200, "refresh": 8,
         "zoomed": 2, "hold": 2, "rounds": 2, "turn": 16}
    names = memory_report.names({"settings": s})
    peaks = {"near": 110, "far": far_peak, "farthest": 104, "packed": packed_peak, "stock near": 101, "stock far": 132}
    cache = {"ram_bytes": MIB, "disk_bytes": 0, "disk_written_bytes": 0, "disk_read_bytes": 0, "lost_blocks": 0, "faults": 0}
    held = {names[role]: {"peak_bytes": peak * MIB, "cells_bytes": MIB, "cache": cache} for role, peak in peaks.items()}
    for role in ("stock near", "stock far"):
        held[names[role]] = {"peak_bytes": peaks[role] * MIB}
    ms = {name: [10.0, 20.0] for name in names.values()}
    ms[names["far"]] = [speed, 2 * speed]
    tally = {"blocks": 5, "rows": 5, "blocks_in": 3, "refreshes": 4}
    return {"settings": s, "base": {"peak_bytes": 101 * MIB, "cells": 1024, "token_bytes": 1024}, "memory": held, "ms": ms,
            "tally": dict.fromkeys(names.values(), tally), "model": "m", "packed_ram_bytes": MIB,
            "date": "d", "commit": "c", "command": "x", "machine": dict.fromkeys(("cpu", "system", "python"), "p") | {
                "cores": 2, "memory_gb": 25, "busy": "", "others_cores": 0.0}}  # fmt: skip


def test_memory_beyond_is_the_difference_of_two_processes_plus_the_cells():
    part = tiers_part(far_peak=103)
    far = memory_report.names(part)["far"]
    assert memory_report.beyond_bytes(part, far) == (103 - 101 + 1) * MIB


def test_claims_are_shares_of_the_full_cache_and_ratios_within_rounds():
    far, farthest, packed, speed, *_ = memory_report.tiers_claims(tiers_part(far_peak=103, packed_peak=119, speed=12.5))
    assert far["median"] == 3 / 32 and memory_report.verdict(far) == "met"
    assert farthest["median"] == 4 / 32 and memory_report.verdict(farthest) == "**not met**"
    assert packed["median"] == 19 / 32 and memory_report.verdict(packed) == "met"
    assert speed["median"] == 0.8 and memory_report.verdict(speed) == "**not shown**: 2 rounds have no 95 % interval"
    assert memory_report.verdict(memory_report.tiers_claims(tiers_part(far_peak=104))[0]) == "**not met**"


def test_the_report_says_what_is_not_met():
    text = memory_report.render_tiers(tiers_part(far_peak=104))
    assert "| memory beyond weights and compute buffers at 32k, RAM 1 MiB + disk, over stock's KV at 32k | 12.5 % | - | at most 10 % | **not met** |" in text
    assert "busy" not in text
    part = tiers_part()
    part["machine"]["busy"] = "others"
    assert "not to be trusted**: others" in memory_report.render_tiers(part)


def test_ram_for_packed_pages_holds_them_and_the_transfer_buffers():
    from zoomr_local.tiers.limits import TRANSFER_BYTES

    assert tiers.packed_ram_bytes(28672, 32768) == 476 * MIB + TRANSFER_BYTES


def windows(ms, peak):
    return [{"tokens": 1024 * (n + 1), "ms": m, "peak_bytes": p, "disk_bytes": MIB, "resumed": False, "others_cores": 0.1 * n, "beside": None}
            for n, (m, p) in enumerate(zip(ms, peak, strict=True))]  # fmt: skip


def test_the_long_run_compares_its_ends():
    part = {"windows": windows([4.0] * 8 + [9.0] * 4 + [5.0] * 8, [10 * MIB] * 10 + [11 * MIB] * 10), "token_bytes": 1024}
    for window in part["windows"][-8:]:
        window["beside"] = {"tokens": 9 * 1024, "ms": 4.5, "others_cores": 3.0}
    part["windows"][-8]["ms"] = 4.5
    speed, grown = memory_report.long_claims(part)
    assert (speed["median"], speed["max"]) == (0.9, 1.0), "against the windows beside them, not against the first of the run"
    assert speed["claim"].startswith("speed of the last 8 windows")
    assert grown["median"] == MIB / (1024 * 12 * 1024), "1 MiB more, while 12k tokens came between the first and the last windows"
    part["windows"][0]["resumed"] = True
    assert len(memory_report.steady(part)) == 19
    assert memory_report.others(part) == 3.0


def test_figures_in_the_docs_are_those_of_the_results():
    if memory.RESULT.exists():
        text = (ROOT / "docs" / "benchmarks.md").read_text()
        assert memory_report.render(json.loads(memory.RESULT.read_text())) in text, "run --write-docs again"


# ---------------------------------------------------------------- logits


def test_differences_of_logits_are_the_textbooks():
    plain = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    other = np.log(np.array([0.125, 0.75, 0.125], np.float32)) + 3
    found = page_types.difference(plain, other)
    assert found["kl"] == pytest.approx(0.5 * np.log(4) + 0.25 * np.log(1 / 3) + 0.25 * np.log(2), rel=1e-5)
    assert found["max_abs"] == pytest.approx(3 + np.log(3), rel=1e-5) and found["top1"] == 0
    assert found["kl"] != pytest.approx(page_types.difference(other, plain)["kl"]), "it has a direction"
    assert page_types.difference(plain, plain) == {"max_abs": 0, "kl": 0, "top1": 1}


def test_lossless_pages_change_nothing_and_lossy_ones_little(tmp_path):
    model = make_model.write_model(tmp_path / "tiny.gguf", "tiny", make_model.SHAPES["tiny"])
    options = {"model": str(model), "threads": 1, "budget": 256, "block": 64, "tokens": 300, "kv_ram": 64 * MIB, "scripted": True}
    types = page_types.PageTypes(options)
    types.prepare()
    same = types.compare("How deep?", "f16")
    assert same["compared"] == same["steps"] > 20 and max(same["max_abs"]) == 0 and min(same["top1"]) == 1
    lossy = {name: types.compare("How deep?", name) for name in ("q8_0", "q4_0")}
    for found in lossy.values():
        assert found["compared"] == found["steps"] == same["steps"]
        assert 0 < np.median(found["max_abs"]) < 2
    assert np.mean(lossy["q4_0"]["kl"]) > np.mean(lossy["q8_0"]["kl"]) > 0
    summary = memory_report.page_summary([lossy["q8_0"], lossy["q8_0"]])
    assert summary["compared"] == 2 * same["steps"] and summary["kl"]["max"] == pytest.approx(max(lossy["q8_0"]["kl"]), rel=1e-3)
    types.model.close()


# ---------------------------------------------------------------- the busy policy


def view(blocks, last_used):
    return BlockView(free_tokens=10_000, detail_tokens=np.full(blocks, 100, np.int32), summary_tokens=np.full(blocks, 10, np.int32),
                     votes=np.zeros(blocks), lifetime_votes=np.zeros(blocks), last_used=np.array(last_used, np.int64),
                     available=np.ones(blocks, bool))  # fmt: skip


def test_a_choice_stands_for_as_many_refreshes_as_a_page_needs():
    policy = Busiest(Settings(zoomed_blocks=2, window_tokens=0))
    policy.hold = 2
    chosen = [policy.select(view(6, used)).zoomed for used in ([1, 2, 9, 9, 9, 9], [9, 9, 1, 2, 9, 9], [9, 9, 1, 2, 9, 9])]
    assert sorted(chosen[0]) == sorted(chosen[1]) == [0, 1], "once to be read, once to come in"
    assert sorted(chosen[2]) == [2, 3]


def test_a_session_that_is_not_the_journals_is_begun_again(tmp_path, monkeypatch, capsys):
    class Standing:
        def __init__(self, *_):
            pass

        def ask(self, _call, resume):
            return {"tokens": 3000 if resume else 29}

        def close(self):
            pass

    monkeypatch.setattr(memory, "Worker", Standing)
    journal = Journal(tmp_path, "long", {})
    assert memory.start_long({}, journal, None)[1] == 0
    journal.add("saved", {"windows": 4, "tokens": 3000})
    assert memory.start_long({}, journal, None)[1] == 4
    journal.add("saved", {"windows": 4, "tokens": 2000})
    assert memory.start_long({}, journal, None)[1] == 0
    assert "3,000 tokens, the journal at 2,000: beginning again" in capsys.readouterr().err


# ---------------------------------------------------------------- whole runs


def run(tmp_path, *arguments):
    return memory.main([*arguments, "--quick", "--models", str(tmp_path), "--work", str(tmp_path / "work"), "--kv-dir", str(tmp_path / "kv"),
                        "--json", str(tmp_path / "memory.json")])  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for the whole runs: the model is written once."""
    return tmp_path_factory.mktemp("memory")


def test_tiers_run_end_to_end(folder, capsys):
    assert run(folder, "tiers") == 0
    part = json.loads((folder / "memory.json").read_text())["parts"]["tiers"]
    s, names = part["settings"], memory_report.names(part)
    assert set(part["ms"]) == set(part["memory"]) == set(names.values())
    assert all(len(values) == s["rounds"] for values in part["ms"].values())
    for role in ("near", "far", "farthest", "packed"):
        held = part["memory"][names[role]]
        assert held["cache"]["resident_peak_tokens"] <= s["budget"] and held["cache"]["lost_blocks"] == 0
        assert part["tally"][names[role]]["logical_tokens"] >= s["near"]
    far = part["memory"][names["far"]]["cache"]
    assert far["disk_bytes"] > 0 and far["ram_bytes"] <= s["ram_bytes"]
    assert part["tally"][names["far"]]["blocks_in"] > 0, "blocks come back from the disk"
    assert part["memory"][names["packed"]]["cache"]["disk_bytes"] == 0
    assert "not to be trusted" in capsys.readouterr().out or not part["machine"]["busy"]
    assert str(folder) not in (folder / "memory.json").read_text(), "no path of this machine in a result"
    assert not list((folder / "work").iterdir()), "a complete run leaves no journal"


def test_pages_run_end_to_end(folder):
    assert run(folder, "pages") == 0
    part = json.loads((folder / "memory.json").read_text())["parts"]["pages"]
    for name in ("bundled", "random"):
        assert set(part[name]) == {"q8_0", "q4_0"}
        assert all(found["compared"] > 50 and 0 <= found["top1"] <= 1 for found in part[name].values())
    assert "| zoomr-tiny | q8_0 |" in memory_report.render_pages(part)


def test_a_long_run_that_is_interrupted_goes_on_and_ends_as_one_that_was_not(folder, monkeypatch, capsys):
    assert run(folder, "long") == 0
    whole = json.loads((folder / "memory.json").read_text())["parts"]["long"]["windows"]
    plain, asked = Worker.ask, []

    def interrupted(self, call, **arguments):
        asked.append(call)
        if asked.count("window") == 7:
            raise KeyboardInterrupt
        return plain(self, call, **arguments)

    monkeypatch.setattr(Worker, "ask", interrupted)
    assert run(folder, "long") == 130
    assert "goes on" in capsys.readouterr().err
    monkeypatch.setattr(Worker, "ask", plain)
    assert run(folder, "long") == 0
    assert "4 are done" in capsys.readouterr().err, "six were, and four of them were saved"
    again = json.loads((folder / "memory.json").read_text())["parts"]["long"]["windows"]
    assert [w["resumed"] for w in again].index(True) == 4
    for key in ("tokens", "blocks", "rows", "lost_blocks", "blocks_in"):
        assert [w[key] for w in again] == [w[key] for w in whole], key
    assert not list((folder / "work").iterdir())
    assert [bool(w["beside"]) for w in again] == [False] * 8 + [True] * 8
    assert whole[8]["beside"]["tokens"] == whole[8]["tokens"], "the ninth window of a run is compared with the ninth of another"
    assert whole[-1]["tokens"] > 4096 and whole[-1]["disk_bytes"] > 0
