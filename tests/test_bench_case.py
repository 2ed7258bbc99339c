"""Cases of `zoomr bench` measured for real, on the bundled model: depths, counters, memory. Nothing here asserts a time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from zoomr_local import bench_case, bench_depth, bench_meter, bench_report, machine
from zoomr_local.bench_case import Case, measure
from zoomr_local.bench_meter import Busy
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.events import PagedIn, PagedOut
from zoomr_models import bundled_model_path

sys.path.append(str(Path(__file__).parent / "native"))
import tiny_models  # noqa: E402

SMALL = Case(str(bundled_model_path()), "zoomr", 1024, "text", prompt_tokens=64, gen_tokens=16, repetitions=2,
             config={"threads": 1, "kv_budget": 256})
FULL = replace(SMALL, policy="full", config={"threads": 1})


def silent(*_):
    pass


@pytest.mark.parametrize("way", bench_depth.WAYS)
@pytest.mark.parametrize("policy", ["full", "zoomr", "sumr", "recency"])
def test_every_policy_reaches_its_depth_in_both_ways(policy, way):
    base = FULL if policy == "full" else SMALL
    found = measure(replace(base, policy=policy, way=way), silent)
    assert (found["status"], found["reason"], found["way"]) == ("measured", "", way)
    tests = {test["test"]: test for test in found["tests"]}
    assert (tests["tg"]["tokens"], tests["pp"]["tokens"]) == (16, 64)
    assert all(len(test["seconds"]) == 2 and min(test["seconds"]) > 0 for test in tests.values())
    first = 1024 if policy == "full" else 1024 + bench_case.WARM_TOKENS
    assert tests["tg"]["depths"][0] == first
    if policy == "full":
        assert tests["tg"]["depths"] == tests["pp"]["depths"] == [1024, 1024], "full goes back to its depth every time"
        assert found["memory"]["resident_peak_tokens"] >= 1024 + 64
    else:
        assert tests["tg"]["depths"] == [first, first + 16]
        assert found["memory"]["resident_peak_tokens"] <= 256
        assert found["memory"]["kv_bytes"] == 256 * found["memory"]["token_bytes"]
    assert found["memory"]["rss_peak_bytes"] > found["memory"]["kv_bytes"]


def test_depth_by_text_holds_in_the_tiers_what_left_the_cells(model):
    found = measure(SMALL, silent)
    away = found["paging"]["logical_tokens"] - found["memory"]["resident_peak_tokens"]
    stored = found["memory"]["ram_bytes"] + found["memory"]["disk_bytes"]
    assert stored > away * found["memory"]["token_bytes"]
    assert found["paging"]["blocks"] >= 1024 // 200


def test_a_planted_state_costs_what_a_computed_one_does_and_holds_the_depth(model):
    engine = Engine(model, EngineConfig(policy="full", threads=1))
    deep = bench_depth.open_deep(engine, 2048)
    deep.reach(1024, "planted")
    assert deep.tokens == deep.context.n_used() == len(deep.context.resident(0)) == 1024
    deep.decode(4)
    assert np.isfinite(deep.context.logits()).all()
    deep.rewind(1024)
    assert deep.tokens == deep.context.n_used() == 1024
    engine.close()


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Models whose caches are no rows a token alone: a sliding window, a recurrent state."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.write_gemma3(folder / "gemma3.gguf")
    tiny_models.write_mamba(folder / "mamba.gguf")
    return folder


@pytest.mark.parametrize("base", [FULL, SMALL], ids=["full", "zoomr"])
def test_a_sliding_window_is_measured_by_text_and_not_planted(odd, base):
    case = replace(base, model=str(odd / "gemma3.gguf"))
    assert (found := measure(case, silent))["status"] == "measured", found["reason"]
    found = measure(replace(case, way="planted"), silent)
    assert found["status"] == "unsupported" and "--depth-by text" in found["reason"]


def test_a_recurrent_state_is_refused_by_name(odd):
    found = measure(replace(FULL, model=str(odd / "mamba.gguf")), silent)
    assert found["status"] == "unsupported" and "recurrent state" in found["reason"] and "llama-bench" in found["reason"]


@pytest.mark.parametrize(("name", "last"), [("gemma3.gguf", 1024), ("mamba.gguf", 1024), (None, 4096)])
def test_an_estimate_is_found_for_every_model(odd, name, last):
    found = bench_case.calibrate(replace(FULL, model=str(odd / name)) if name else FULL, silent)
    assert [point["depth"] for point in found["points"]] == [256, last]
    assert all(point[what] > 0 for point in found["points"] for what in ("prefill", "decode"))


def test_planted_blocks_are_paged_and_indexed_by_the_engine(model):
    engine = Engine(model, EngineConfig(kv_budget=256, threads=1))
    deep = bench_depth.open_deep(engine, 2048)
    deep.reach(1024, "planted")
    blocks = deep.line.blocks
    assert deep.tokens == 1024 and all(block.summary for block in blocks[:-1])
    assert [block.stop for block in blocks[:-1]] == [block.detail[0] for block in blocks[1:]]
    assert deep.running.index.n_rows >= len(blocks) - 1
    assert deep.running._stats().page_outs > 0
    deep.prefill(64)
    deep.decode(40)
    assert deep.tokens == 1024 + 64 + 40 + (deep.tokens - 1128), "prefill may first end an open summary"
    assert np.isfinite(deep.context.logits()).all()
    engine.close()


def test_the_given_text_is_deterministic_and_ends_no_reply(model):
    first, second = bench_depth.Text(model), bench_depth.Text(model)
    assert first.take(500) == second.take(500)
    words = "".join(sentence for sentence, _ in zip(bench_depth.prose(), range(50)))
    assert words.count(". ") + words.count(".\n\n") == 50
    tokens = [first.next(model.llama.eos_token) for _ in range(400)]
    assert not any(model.llama.is_eog(token) for token in tokens)
    markers = model.markers
    opens = [i for i, token in enumerate(tokens) if token == markers.summary_open]
    closes = [i for i, token in enumerate(tokens) if token == markers.summary_close]
    assert len(opens) == len(closes) == 2 and all(c - o == bench_depth.SUMMARY_TOKENS - 1 for o, c in zip(opens, closes))


def test_pauses_are_the_caches_moves_within_the_measured_decoding(model, monkeypatch):
    moves, doing = {}, ["reaching the depth"]
    seen = bench_case.Pauses._timed

    def counting(self, way, move):
        def counted(part, blocks):
            moves[doing[-1], way] = moves.get((doing[-1], way), 0) + 1
            return move(part, blocks)
        return seen(self, way, counted)

    def named(name, run):
        def running(self, tokens):
            doing.append(f"{name}{tokens}")
            try:
                return run(self, tokens)
            finally:
                doing.pop()
        return running

    monkeypatch.setattr(bench_case.Pauses, "_timed", counting)
    for name in ("decode", "prefill"):
        monkeypatch.setattr(bench_depth.Deep, name, named(name, getattr(bench_depth.Deep, name)))
    found = measure(replace(SMALL, gen_tokens=64), silent)
    paging = found["paging"]
    assert len(paging["page_out_seconds"]) == moves["decode64", "out"] > 0 < moves["prefill64", "out"]
    assert len(paging["page_in_seconds"]) == moves.get(("decode64", "in"), 0)
    assert paging["page_out_blocks"] >= moves["decode64", "out"]
    pp, tg = bench_report.rows(found, force=True)
    assert tg["page_out_count"] == moves["decode64", "out"] and tg["page_out_ms_p50"] > 0
    assert {pp[column] for column in bench_report.PAUSES} == {None} and bench_report.pause_text(pp, "out") == "-"


def test_bytes_to_disk_are_those_of_the_events(model, tmp_path):
    config = {**SMALL.config, "kv_ram": 0, "kv_disk": 64 << 20, "kv_dir": str(tmp_path)}
    found = measure(replace(SMALL, config=config), silent)
    assert found["status"] == "measured", found["reason"]
    row = bench_report.rows(found)[0]
    written, tokens = found["paging"]["disk_written_bytes"], found["paging"]["logical_tokens"]
    assert written >= found["memory"]["disk_bytes"] > 0, "written once, headers included"
    assert row["disk_written_bytes_per_1000_tokens"] == round(1000 * written / tokens)
    away = tokens - found["memory"]["resident_peak_tokens"]
    assert written > away * found["memory"]["token_bytes"]
    assert not list(tmp_path.rglob("*.page")), "page files go with the process's engine"


def test_at_its_depth_everything_on_its_way_to_disk_has_arrived(model, tmp_path, monkeypatch):
    from zoomr_local.kv_cache import KVCache

    flushed = []
    plain = KVCache.flush
    monkeypatch.setattr(KVCache, "flush", lambda self: flushed.append(len(self.timeline)) or plain(self))
    engine = Engine(model, EngineConfig(kv_budget=256, threads=1, kv_ram=0, kv_disk=64 << 20, kv_dir=tmp_path))
    deep = bench_depth.open_deep(engine, 2048)
    deep.reach(1024, "planted")
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.page"))
    assert flushed == [1024] and deep.running._stats().disk_written_bytes == files > 0
    engine.close()


def test_a_busy_machine_is_noticed_around_every_measurement(monkeypatch):
    class Fake(bench_meter.Meter):
        def stop(self):
            return Busy(1.0, 0.7)

    monkeypatch.setattr(bench_meter, "Meter", Fake)
    found = measure(SMALL, silent)
    assert [test["busy"] for test in found["tests"]] == ["other processes used 0.70 cores"] * 2
    assert {row["status"] for row in bench_report.rows(found)} == {"busy"}
    assert {row["status"] for row in bench_report.rows(found, force=True)} == {"measured"}


def test_a_full_cache_that_does_not_fit_is_said_with_its_size(model, monkeypatch):
    deep = replace(FULL, depth=131072)
    cells = 131072 + 64 + bench_case.WARM_TOKENS + 64
    need = cells * 2048 + model.size_bytes + bench_case.MARGIN_BYTES
    assert bench_case.no_room(deep, model, need) == ""
    reason = bench_case.no_room(deep, model, need - 1)
    assert f"the full cache of {cells:,} tokens takes 0.25 GiB, the weights 0.00 GiB; 0.50 GiB are free" in reason
    planted = replace(deep, way="planted")
    assert "twice" in bench_case.no_room(planted, model, need) and not bench_case.no_room(planted, model, need + cells * 2048)
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(100 << 20, 1 << 30, "a test"))
    found = measure(FULL, silent)
    assert found["status"] == "does not fit" and found["tests"] == [] and "0.10 GiB are free" in found["reason"]


def test_progress_names_what_is_going_on():
    heard = []
    measure(SMALL, lambda *what: heard.append(what))
    phases = [phase for phase, _, _ in heard]
    assert list(dict.fromkeys(phases)) == ["loading", "reaching the depth", "tg16", "pp64"]
    assert ("reaching the depth", 1024, 1024) in heard


def test_events_and_counters_agree(model):
    engine = Engine(model, EngineConfig(kv_budget=256, threads=1))
    deep = bench_depth.open_deep(engine, 2048)
    deep.reach(512, "text")
    before = deep.running._stats()
    moved = {"in": 0, "out": 0}
    for event in engine._stream:
        if isinstance(event, PagedIn | PagedOut) and event.part == "detail":
            moved["in" if isinstance(event, PagedIn) else "out"] += len(event.blocks)
        if deep.tokens >= 900:
            break
    after = deep.running._stats()
    assert after.page_outs - before.page_outs >= moved["out"] > 0
    assert after.page_ins - before.page_ins >= moved["in"]
    engine.close()
