"""`zoomr bench` as a command: refusals, tables, JSON and CSV, exit codes, Ctrl-C. Nothing here asserts a time."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from zoomr_cli import bench_view
from zoomr_cli.main import main
from zoomr_local import bench, bench_meter, bench_report

BUSY = "other processes used 1.00 cores"
SMALL = ["-d", "256,512", "-p", "32", "-n", "8", "-r", "2"]


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    monkeypatch.setattr(bench_meter, "why_busy_now", lambda *_: "")


def measured(case, busy="", status="measured", warnings=()):
    """What a case would answer, without a process."""
    test = {"depths": [case.depth] * 2, "others_cores": 0.7, "busy": busy, "seconds": [0.5, 0.25]}
    result = {
        **bench.asdict(case), "status": status, "reason": "" if status == "measured" else "a reason", "warnings": list(warnings),
        "model_name": "some", "model_type": "llama ?B Q8_0", "model_size_bytes": 2**20, "model_params": 1_000_000, "backend": "CPU",
        "threads": 1, "type_k": "f16", "type_v": "f16", "tests": [],
    }  # fmt: skip
    if status != "measured":
        return result
    paged = case.policy != "full"
    return {
        **result, "tests": [{**test, "test": "tg", "tokens": case.gen_tokens}, {**test, "test": "pp", "tokens": case.prompt_tokens}],
        "memory": {"rss_peak_bytes": 2**26, "rss_peak_is": "phase", "rss_anonymous_bytes": 2**25, "kv_bytes": 2**20 if paged else case.depth * 2048,
                   "index_bytes": 0, "ram_bytes": 2**20 * paged, "disk_bytes": 0},
        "paging": {"logical_tokens": case.depth, "disk_written_bytes": 0, "lost_blocks": 0,
                   "page_in_seconds": [0.001] * paged, "page_out_seconds": [0.002] * paged},
    }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """No processes: a list of answers, or a function of the case, is what is measured."""
    asked = []

    def answer(case, progress):
        asked.append(case)
        return fake.answer(case)

    fake.answer = measured
    monkeypatch.setattr(bench, "measured", answer)
    points = [{"depth": 256, "prefill": 0.01, "decode": 0.1}, {"depth": 4096, "prefill": 0.02, "decode": 0.2}]
    monkeypatch.setattr(bench, "calibrate", lambda *_: {"load_seconds": 1, "token_bytes": 2048, "points": points})
    fake.asked = asked
    return fake


# ---------------------------------------------------------------- what it says


def test_the_table_in_a_pipe_is_markdown_with_notes(fake, capsys):
    assert main(["bench", *SMALL]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("|")[8].strip() for line in lines[2:10]] == [f"{t} @ d{d}" for d in (256, 512) for _ in "ab" for t in ("pp32", "tg8")]
    assert "Depths reached by text" in out and "median (least to greatest) of 2" in out
    assert "4 cases, about" in err and "[4 of 4] zoomr @ 512: pp32 96 (64 to 128), tg8 24 (16 to 32) t/s" in err


def test_json_and_csv_have_the_same_rows(fake, capsys):
    assert main(["bench", *SMALL, "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert set(document) == {"bench", "date", "command", "versions", "machine", "forced", "complete", "rows", "cases"}
    assert document["bench"] == 1 and document["complete"] and document["command"].startswith("zoomr bench -d 256,512")
    assert all(tuple(row) == bench_report.COLUMNS for row in document["rows"]) and len(document["rows"]) == 8
    assert len(document["cases"]) == 4 and document["cases"][0]["tests"][0]["seconds"] == [0.5, 0.25]
    assert main(["bench", *SMALL, "--csv", "-q"]) == 0
    text = capsys.readouterr().out
    assert text == bench_report.to_csv(document["rows"])
    assert len(list(csv.DictReader(io.StringIO(text)))) == 8


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_on_a_terminal_fit_its_width(fake, width):
    fake.answer = lambda case: measured(case, BUSY)
    rows = [row for policy in ("full", "zoomr") for depth in (1024, 131072)
            for row in bench_report.rows(measured(bench.Case("m", policy, depth), BUSY), force=True)]  # fmt: skip
    out = io.StringIO()
    bench_view.show(rows, 3, Console(file=out, width=width, force_terminal=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.split()[:3] == ["zoomr", "tg128", "@"] for line in lines)
    assert sum("full @ 128k" in line for line in lines) == 2, "a bar of speed and one of memory"
    assert any("1 / 1" in line and "2 / 2" in line for line in lines), "pauses in ms"
    longest = {line.split()[0]: line.count("█") for line in lines if "@ 128k" in line and "MiB" in line}
    assert longest["full"] > longest["zoomr"]


def test_a_long_depth_by_text_gets_advice(fake, capsys):
    assert main(["bench", "-d", "32k", "--policy", "full"]) == 0
    assert "--depth-by planted" in capsys.readouterr().err
    assert main(["bench", "-d", "32k", "--policy", "full", "--depth-by", "planted"]) == 0
    out, err = capsys.readouterr()
    assert "--depth-by planted repeats" not in err and "Depths planted" in out and "(planted)" in err
    assert fake.asked[-1].way == "planted"


def test_what_the_engine_warned_of_is_said(fake, capsys):
    fake.answer = lambda case: measured(case, warnings=["trained on 2048 positions"])
    main(["bench", *SMALL])
    assert "trained on 2048 positions" in capsys.readouterr().err


# ---------------------------------------------------------------- a busy machine


def test_it_does_not_begin_on_a_busy_machine(fake, capsys, monkeypatch):
    monkeypatch.setattr(bench_meter, "why_busy_now", lambda *_: BUSY)
    assert main(["bench", *SMALL]) == 1
    out, err = capsys.readouterr()
    assert out == "" and BUSY in err and "--force" in err and not fake.asked
    assert main(["bench", *SMALL, "--force"]) == 0
    out, err = capsys.readouterr()
    figures = [line for line in out.splitlines() if line.startswith("| some")]
    assert "marked with *" in err and figures and all("*" in line for line in figures), "also those of moments in which nobody was met"


def test_a_figure_of_a_busy_moment_is_not_quoted(fake, capsys):
    fake.answer = lambda case: measured(case, BUSY if case.policy == "zoomr" else "")
    assert main(["bench", *SMALL]) == 3
    out = capsys.readouterr().out
    zoomr = [line for line in out.splitlines() if line.startswith("| some") and "| zoomr |" in line]
    assert len(zoomr) == 4 and all("| busy |" in line for line in zoomr)
    assert f"busy: {BUSY}" in out
    assert main(["bench", *SMALL, "--force"]) == 0
    assert "96* (64 to 128)" in capsys.readouterr().out


# ---------------------------------------------------------------- what cannot be measured


def test_no_room_is_an_answer_and_a_failure_is_none(fake, capsys):
    fake.answer = lambda case: measured(case, status="does not fit" if case.policy == "full" else "measured")
    assert main(["bench", *SMALL]) == 0
    assert "full, pp32 @ d256: does not fit: a reason." in capsys.readouterr().out
    fake.answer = lambda case: measured(case, status="failed" if case.policy == "full" else "measured")
    assert main(["bench", *SMALL]) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "100"], "--depth 100"),
        (["-d", "many"], "--depth many"),
        (["-d", "1k,1k"], "without repetitions"),
        (["-d", "1k,1024"], "without repetitions"),
        (["--policy", "zomr"], "did you mean zoomr"),
        (["--policy", ","], "--policy"),
        (["--depth-by", "magic"], "text, planted"),
        (["--json", "--csv"], "give one of them"),
        (["--kv-ram", "lots"], "--kv-ram lots"),
        (["--kv-page-type", "q3"], "--kv-page-type q3"),
    ],
)
def test_used_wrongly(fake, capsys, arguments, says):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and "Traceback" not in err and not fake.asked


def test_a_plot_without_matplotlib_names_the_extra_before_anything_runs(fake, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", *SMALL, "--plot", "x.png"]) == 2
    assert "zoomr-local[bench]" in capsys.readouterr().err and not fake.asked


def test_a_plot_that_cannot_be_written_costs_no_figures(fake, capsys, monkeypatch, tmp_path):
    def full_disk(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(bench_report, "require_matplotlib", lambda: None)
    monkeypatch.setattr(bench_report, "plot", full_disk)
    assert main(["bench", *SMALL, "--plot", "x.png"]) == 1
    out, err = capsys.readouterr()
    assert out.count("| some |") == 8 and "x.png: No space left on device" in err
    fake.asked.clear()
    assert main(["bench", *SMALL, "--plot", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err and not fake.asked


def test_ctrl_c_leaves_the_rows_so_far(fake, capsys):
    def answer(case):
        if len(fake.asked) == 3:
            raise KeyboardInterrupt
        return measured(case)

    fake.answer = answer
    assert main(["bench", *SMALL]) == 130
    out, err = capsys.readouterr()
    assert out.count("| some |") == 4 and "interrupted: 2 of 4 cases were measured" in err
    fake.asked.clear()
    assert main(["bench", *SMALL, "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["complete"] is False


# ---------------------------------------------------------------- for real


def test_end_to_end_in_processes_of_their_own(capsys):
    assert main(["bench", "-d", "512", "-p", "32", "-n", "8", "-r", "2", "--json", "-q", "--force", "--kv-budget", "256"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in found["rows"]] == ["measured"] * 4
    full, zoomr = (case for case in found["cases"])
    assert full["memory"]["kv_bytes"] > zoomr["memory"]["kv_bytes"] == 256 * zoomr["memory"]["token_bytes"]
    assert zoomr["paging"]["page_outs"] > 0 and full["paging"]["page_outs"] == 0


def test_ctrl_c_ends_the_measuring_process_too(tmp_path):
    command = [sys.executable, "-m", "zoomr_cli", "bench", "-d", "16k", "--policy", "full", "--force", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (child := children(process.pid)) and time.monotonic() < until:
        time.sleep(0.05)
    assert child, "the case never started"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: 0 of 1 cases were measured" in err and "Traceback" not in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in child)


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(n) for n in done.stdout.split()]
