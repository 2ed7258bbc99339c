"""The arithmetic of `zoomr bench`: percentiles, rows, forms, marks, clocks, memory, estimates. Nothing here asserts a time."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest

from zoomr_local import bench, bench_meter, bench_report
from zoomr_local.bench_case import Case
from zoomr_local.bench_meter import Busy
from zoomr_local.errors import BudgetError, UsageError

MIB = 1 << 20


def result(policy="zoomr", depth=1024, way="text", busy="", seconds=(2.0, 1.0, 4.0), **changes):
    """A case as `bench_case.measure` answers it."""
    test = {"tokens": 128, "seconds": list(seconds), "depths": [depth] * 3, "others_cores": 0.5 if busy else 0.0, "busy": busy}
    return {
        "model": "folder/some.gguf", "policy": policy, "depth": depth, "way": way, "prompt_tokens": 512, "gen_tokens": 128,
        "repetitions": 3, "n_gpu_layers": 0, "config": {"kv_budget": 512, "kv_page_type": "q8_0"}, "status": "measured",
        "reason": "", "warnings": [], "model_name": "some", "model_type": "llama 1B Q8_0", "model_size_bytes": 3 * MIB,
        "model_params": 3_158_784, "backend": "CPU", "threads": 1, "type_k": "f16", "type_v": "f16",
        "tests": [{**test, "test": "tg"}, {**test, "test": "pp", "tokens": 512}],
        "memory": {"rss_peak_bytes": 64 * MIB, "rss_peak_is": "phase", "rss_anonymous_bytes": 40 * MIB, "kv_bytes": MIB, "index_bytes": 2 * MIB,
                   "ram_bytes": 4 * MIB, "disk_bytes": 8 * MIB},
        "paging": {"logical_tokens": 4000, "disk_written_bytes": 10_000_000, "lost_blocks": 0,
                   "page_in_seconds": [0.001 * n for n in range(1, 21)], "page_out_seconds": []},
        **changes,
    }  # fmt: skip


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([7], 50, 7), ([7], 95, 7), (range(1, 21), 50, 10), (range(1, 21), 95, 19), (range(1, 101), 95, 95), ([3, 1, 2], 50, 2)],
)
def test_percentiles_are_nearest_ranks(values, percent, expected):
    assert bench_report.percentile(list(values), percent) == expected


def test_a_row_has_medians_spreads_pauses_and_bytes():
    pp, tg = bench_report.rows(result())
    assert (pp["test"], tg["test"]) == ("pp512 @ d1024", "tg128 @ d1024")
    assert tg["samples"] == [64, 128, 32]
    assert (tg["tokens_per_second_min"], tg["tokens_per_second"], tg["tokens_per_second_max"]) == (32, 64, 128)
    assert pp["tokens_per_second"] == 256
    assert (tg["page_in_ms_p50"], tg["page_in_ms_p95"], tg["page_in_count"]) == (10, 19, 20)
    assert (tg["page_out_ms_p50"], tg["page_out_count"]) == (None, 0)
    assert tg["disk_written_bytes_per_1000_tokens"] == 2_500_000, "10 MB over 4000 tokens"
    assert tuple(tg) == bench_report.COLUMNS


def test_full_has_no_budget_and_no_page_type():
    row = bench_report.rows(result("full"))[0]
    assert row["kv_budget_tokens"] is None and row["page_type"] is None


def test_a_busy_machine_gets_no_figure_unless_forced_and_then_a_mark():
    busy = result(busy="other processes used 0.50 cores")
    for row in bench_report.rows(busy):
        assert row["tokens_per_second"] is None and row["samples"] is None
        assert row["status"] == "busy" and "0.50 cores" in row["reason"] and "--force" in row["reason"]
        assert bench_report.speed_text(row) == "busy"
    for row in bench_report.rows(busy, force=True):
        assert row["tokens_per_second"] and row["busy"]
        assert "*" in bench_report.speed_text(row)
    assert "*" not in bench_report.speed_text(bench_report.rows(result())[0])


def test_a_case_that_does_not_fit_is_rows_with_a_reason():
    small = {key: value for key, value in result("full").items() if key not in ("memory", "paging")}
    rows = bench_report.rows({**small, "status": "does not fit", "reason": "takes 4 GiB", "tests": []})
    assert [row["status"] for row in rows] == ["does not fit"] * 2
    said = bench_report.notes(rows, 3)
    assert any("full, tg128 @ d1024: does not fit: takes 4 GiB" in line for line in said)
    assert "does not fit" in bench_report.markdown(rows)


def test_the_way_a_depth_was_reached_is_always_said():
    rows = [*bench_report.rows(result()), *bench_report.rows(result(depth=2048, way="planted"))]
    said = " ".join(bench_report.notes(rows, 3))
    assert "planted" in said and "was computed" in said
    assert {row["depth_by"] for row in rows} == {"text", "planted"}
    assert "planted" not in " ".join(bench_report.notes(rows[:2], 3))


# ---------------------------------------------------------------- forms


def test_csv_says_what_json_says():
    rows = [*bench_report.rows(result()), *bench_report.rows(result("full", busy="others"))]
    read = list(csv.DictReader(io.StringIO(bench_report.to_csv(rows))))
    assert len(read) == len(rows)
    for row, line in zip(json.loads(json.dumps(rows)), read, strict=True):
        assert list(line) == list(bench_report.COLUMNS)
        for key, value in row.items():
            expected = "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
            assert line[key] == expected, key


def test_markdown_has_the_columns_of_llama_bench_first():
    lines = bench_report.markdown(bench_report.rows(result())).splitlines()
    assert lines[0].startswith("| model | size | params | backend | threads | type_k |")
    assert lines[3].startswith("| some | 3 MiB | 3.16 M | CPU | 1 | f16 | zoomr | tg128 @ d1024 | 64 (32 to 128) |")
    assert len({line.count("|") for line in lines}) == 1
    assert "| 10 / 19 | - |" in lines[3]


def test_lines_are_by_policy_and_depth():
    rows = [row for depth in (2048, 512) for policy in ("full", "zoomr") for row in bench_report.rows(result(policy, depth))]
    drawn = bench_report.lines(rows, "tg")
    assert {policy: [row["depth_tokens"] for row in points] for policy, points in drawn.items()} == {"full": [512, 2048], "zoomr": [512, 2048]}
    assert bench_report.held_bytes(drawn["zoomr"][0]) == 7 * MIB


def test_a_full_cache_with_flash_attention_on_a_cpu_is_said_to_have_a_faster_mode():
    said = {(policy, on, backend): " ".join(bench_report.notes(bench_report.rows(result(policy, flash_attn=on, backend=backend)), 3))
            for policy in ("full", "zoomr") for on in (True, False) for backend in ("CPU", "CUDA0")}  # fmt: skip
    assert [key for key, text in said.items() if "--no-flash-attn" in text] == [("full", True, "CPU")]


def test_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "plot.png"
    bench_report.plot(path, [row for depth in (512, 2048) for policy in ("full", "zoomr") for row in bench_report.rows(result(policy, depth))])
    assert path.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- clocks and memory


@pytest.mark.parametrize(
    ("wall", "others", "busy"),
    [(10, 0.0, False), (10, 1.0, False), (10, 1.1, True), (0.05, 0.02, False), (0.05, 0.05, True), (10, None, False)],
)
def test_a_machine_is_busy_past_a_tenth_of_a_core_and_two_ticks(wall, others, busy):
    assert bool(Busy(wall, others).reason) is busy


def test_the_meter_takes_its_own_time_from_the_machines(monkeypatch):
    machine, own = iter([100.0, 103.0, 103.0]), iter([10.0, 12.0])
    monkeypatch.setattr(bench_meter, "machine_cpu_seconds", lambda: next(machine))
    monkeypatch.setattr(bench_meter, "process_cpu_seconds", lambda _pid: next(own))
    assert bench_meter.Meter().stop().others_seconds == 1.0


def test_time_that_the_hypervisor_gave_away_is_not_idle_time(monkeypatch):
    """Steal (the eighth number) slows a measurement as a process would; idle and waiting for a disk do not."""
    busy, tick = [1, 2, 3, 1000, 1000, 4, 5, 600, 70, 80], os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(bench_meter.Path, "read_text", lambda _path: f"cpu  {' '.join(map(str, busy))}\ncpu0 0 0\n")
    assert bench_meter.machine_cpu_seconds() == (1 + 2 + 3 + 4 + 5 + 600) / tick


@pytest.mark.skipif(sys.platform != "linux", reason="CPU time of others is told by /proc")
def test_the_meter_sees_another_process():
    meter = bench_meter.Meter()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert meter.stop().others_seconds >= 0.4


def test_a_child_that_allocates_100_mib_shows_it():
    code = (
        "from zoomr_local import bench_meter as m; before = m.memory(); held = bytearray(100 << 20)\n"
        "held[::4096] = bytes([1]) * len(held[::4096])\n"
        "full = m.memory(); del held; freed = m.memory(); reset = m.reset_peak(); after = m.memory()\n"
        "print(freed.peak_bytes - before.peak_bytes, after.peak_bytes - before.peak_bytes, int(reset), full.anonymous_bytes - before.anonymous_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, left, reset, anonymous = map(int, done.stdout.split())
    assert 99 * MIB < grown < 104 * MIB, "the peak stays when the memory is freed"
    if reset:
        assert left < 4 * MIB, "the peak counts from the reset"
        assert 99 * MIB < anonymous < 104 * MIB


def test_without_proc_the_load_average_decides(monkeypatch):
    monkeypatch.setattr(bench_meter, "machine_cpu_seconds", lambda: 0.0)
    monkeypatch.setattr(bench_meter, "load_average", lambda: 0.9)
    assert "0.90" in bench_meter.why_busy_now(0)
    monkeypatch.setattr(bench_meter, "load_average", lambda: 0.2)
    assert bench_meter.why_busy_now(0) == ""


# ---------------------------------------------------------------- cases


def base(**changes):
    return Case("some.gguf", "full", 1024, config={"threads": 1, "kv_budget": 512, "kv_type": "f16"}, **changes)


def test_cases_go_depth_by_depth_and_full_keeps_its_own_settings():
    cases = bench.grid(base(), ["full", "zoomr"], [512, 2048])
    assert [(case.depth, case.policy) for case in cases] == [(512, "full"), (512, "zoomr"), (2048, "full"), (2048, "zoomr")]
    assert cases[0].config == {"threads": 1, "kv_type": "f16"} and cases[1].config["kv_budget"] == 512


def test_impossible_cases_are_refused():
    with pytest.raises(UsageError, match="--depth 100.*256"):
        bench.grid(base(), ["full"], [100])
    with pytest.raises(BudgetError, match="--kv-budget 64"):
        bench.grid(Case("m", "zoomr", 1024, config={"kv_budget": 64}), ["zoomr"], [1024])


def test_an_estimate_knows_depth_way_and_budget():
    found = {"load_seconds": 1.0, "token_bytes": 1000,
             "points": [{"depth": 256, "prefill": 0.001, "decode": 0.01}, {"depth": 4096, "prefill": 0.002, "decode": 0.02}]}
    full = [bench.estimate(found, Case("m", "full", depth)) for depth in (1024, 8192, 32768)]
    assert full[0] < full[1] < full[2] and full[2] > 16 * full[1] / 4, "reaching a depth by text grows faster than the depth"
    paged = bench.estimate(found, Case("m", "zoomr", 32768, config={"kv_budget": 512}))
    assert paged < full[2] / 3
    assert bench.estimate(found, Case("m", "full", 32768, way="planted")) < full[2]


def test_a_process_that_dies_is_a_result_with_a_reason(tmp_path):
    missing = bench.measured(Case(str(tmp_path / "none.gguf"), "full", 512), lambda *_: None)
    assert missing["status"] == "failed" and "none.gguf" in missing["reason"]
    assert bench._why(-9, "") == "the system ended the process, most likely because memory ran out"
    assert "signal 11" in bench._why(-11, "boom")
    assert bench._why(1, "first\nlast\n") == "last"
