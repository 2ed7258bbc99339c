"""The per-head section of the accuracy page: collected from a folder of `zoomr eval`, paired by problem, worded by the figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks are not installed

from benchmarks import accuracy_heads as heads  # noqa: E402
from benchmarks import accuracy_heads_text as words  # noqa: E402
from zoomr_local import evaluate_report as report  # noqa: E402
from zoomr_local.engine import EngineConfig  # noqa: E402
from zoomr_local.errors import UsageError  # noqa: E402
from zoomr_local.evaluate import Cell  # noqa: E402

N = 20
RIGHT = {"full": 20, "recency": 0, "rkv": 8, "reasonalloc": 18, "snapkv": 2, "pyramid": 8}
"""How many of the first problems of each family a policy has right."""


def record(number: int, right: bool | None, budget: int) -> dict:
    if right is None:
        return {"id": number, "error": {"type": "BudgetError", "message": "--kv-budget 256: no room; take a larger budget"}}
    kv = {"resident_peak": budget, "resident_mean": 50.0, "token_bytes": 1024, "page_ins": 0, "paged_out_bytes": 0, "dropped_tokens": 0, "splits": 0, "agreement": None}
    usage = {"prompt_tokens": 10, "completion_tokens": 100}
    return {"id": number, "correct": right, "finish_reason": "stop", "usage": usage, "timing": {"prefill_s": 0.5, "decode_s": 1.5}, "kv": kv}


def folder(path: Path, cells: dict[Cell, list[dict]]) -> Path:
    """What `zoomr eval` leaves; records stand in another order than the problems', as those of several processes do."""
    path.mkdir()
    result = {
        "date": "2026-01-02", "command": "zoomr eval --policy ...", "asked": {"suite": "bundled", "n": N, "seed": 0, "split": "test"},
        "max_tokens": {"dag": 512, "series": 512}, "temperature": 0.0, "kv_type": "f16", "threads": 1, "versions": {"zoomr": "1"},
        "model": {"file": "plain-tiny.gguf", "bytes": 9, "hashed": "all", "sha256": "a" * 64}, "machine": {"system": "Linux x", "cores": 2}, **report.report(cells),
    }  # fmt: skip
    report.write_json(path / "results.json", result)
    for number, (cell, rows) in enumerate(cells.items()):
        (path / cell.file_name).write_text("".join(json.dumps(row) + "\n" for row in (rows if number % 2 else rows[::-1])))
    return path


def cell(family: str, policy: str, budget: int = 256, **chosen) -> Cell:
    return Cell(family, EngineConfig(policy=policy, kv_budget=budget, **chosen), tuple(chosen.items()))


def answers(right: int, budget: int, failed: int = 0) -> list[dict]:
    return [record(i, None if i >= N - failed else i < right, budget) for i in range(N)]


def grid(rights=RIGHT, families=("dag", "series"), failed=0) -> dict[Cell, list[dict]]:
    return {
        cell(family, policy): answers(right, 110 if policy == "full" else 256, failed if policy == "pyramid" else 0)
        for family in families for policy, right in rights.items()
    }  # fmt: skip


@pytest.fixture
def result(tmp_path):
    return heads.collected(folder(tmp_path / "one", grid()))


def test_who_had_which_problem_right_is_kept_in_one_order(result):
    found = {(c["family"], c["policy"]): c["answers"] for c in result["cells"]}
    assert all(sorted(map(int, ids)) == list(range(N)) for ids in result["problems"].values())
    for (family, policy), letters in found.items():
        by_id = dict(zip(result["problems"][family], letters, strict=True))
        assert [by_id[str(i)] for i in range(N)] == ["1" if i < RIGHT[policy] else "0" for i in range(N)]


def test_pairs_are_of_the_same_problems(result):
    have = words.beside(result, "", 256)
    found = words.pair(have["reasonalloc"], have["rkv"])
    assert (found["n"], found["gained"], found["lost"], found["difference"]) == (2 * N, 20, 0, 0.5)
    assert words.pair(have["rkv"], have["reasonalloc"])["difference"] == -0.5
    assert words.pair([], have["rkv"])["difference"] is None and words.points(words.pair([], [])) == "-"


def test_failed_problems_are_in_no_pair_and_are_said(tmp_path):
    result = heads.collected(folder(tmp_path / "one", grid(failed=3)))
    have = words.beside(result, "", 256)
    assert words.pair(have["pyramid"], have["rkv"])["n"] == 2 * (N - 3)
    said = words.failures(result)
    assert said == [f"- {family} pyramid 256: 3 of 20 problems failed: --kv-budget 256: no room; take a larger budget" for family in ("dag", "series")]
    assert said[0] in words.text([result]) and "| 256 | pyramid | 17 |" in words.text([result])


def test_a_line_a_policy_with_its_differences(result):
    lines = [line.split(" | ") for line in words.figures(result).splitlines()[2:]]
    assert len(lines) == len(RIGHT) * 3 and [line[0] for line in lines[-len(RIGHT) :]] == ["| all"] * len(RIGHT)
    together = next(line for line in lines if line[0] == "| all" and line[2] == "rkv")
    assert together[3:6] == ["40", "40.0 (26.3, 55.4)", "-"] and together[7].startswith("-60.0 (") and together[8:] == ["-", "-", "-", "-", "- |"]
    rkv = next(line for line in lines if line[2] == "rkv")
    assert rkv == ["| dag", "256", "rkv", "20", "40.0 (21.9, 61.3)", "-", "+40.0 (+15.8, +61.3)", "-60.0 (-78.1, -33.3)", "0", "256", "256", "50", "67 |"]
    full = next(line for line in lines if line[2] == "full")
    assert full[1] == "-" and full[5:8] == ["-", "-", "-"]


def test_reasonalloc_stands_against_each_of_the_others_by_family_and_over_all(result):
    lines = [line.split(" | ") for line in words.allocation(result).splitlines()[2:]]
    assert [line[1] for line in lines] == ["dag", "series", "all"] and [line[2] for line in lines] == ["20", "20", "40"]
    assert [[text.split(" ")[0] for text in line[3:6]] for line in lines] == [["+50.0", "+80.0", "+50.0"]] * 3
    assert words.allocation({**result, "cells": [c for c in result["cells"] if c["policy"] != "reasonalloc"]}) == ""


def test_the_order_is_worded_by_the_intervals(result):
    said = words.order(result, "", 256)
    assert said.startswith("- At 256 cells, dag, series together, right in percent: `full` 100.0 > `reasonalloc` 90.0 > `rkv` 40.0 = `pyramid` 40.0 > `snapkv` 10.0 > `recency` 0.0.")
    first = next(line for line in said.splitlines() if "MATH-500, budget 512" in line)
    assert "reasonalloc > pyramid > rkv > snapkv. Of 6 pairs 5 shown here (" in first and "0 the other way round, 1 not shown." in first


def test_an_order_that_is_not_the_papers_is_said(tmp_path):
    other = heads.collected(folder(tmp_path / "one", grid({**RIGHT, "reasonalloc": 0, "pyramid": 20, "random": 20})))
    said = words.order(other, "", 256)
    assert said.count("the other way round (reasonalloc over ") == said.count("reasonalloc over pyramid -100.0 (") == 2  # in both tables of ReasonAlloc's
    first = next(line for line in said.splitlines() if "MATH-500, budget 512" in line)
    assert "Of 6 pairs 3 shown here (pyramid over rkv +60.0 (" in first
    assert "Random Attention" in said and "random > rkv > snapkv. Of 3 pairs 3 shown here" in said


def test_off_and_on_stand_apart_and_controls_beside_both(tmp_path):
    cells = {cell("dag", "full"): answers(20, 110), cell("dag", "recency"): answers(1, 256)}
    for on, right in ((True, 9), (False, 3)):
        cells |= {cell("dag", policy, pin_prompt=on): answers(right + more, 256) for policy, more in (("rkv", 0), ("reasonalloc", 5))}
    result = heads.collected(folder(tmp_path / "one", cells))
    assert words.sets(result) == [("pin_prompt=off", 256), ("pin_prompt=on", 256)]
    for setting, right in (("pin_prompt=on", 9), ("pin_prompt=off", 3)):
        have = words.beside(result, setting, 256)
        assert set(have) == {"full", "recency", "rkv", "reasonalloc"} and have["rkv"][0]["right"] == right
        assert words.pair(have["reasonalloc"], have["rkv"])["difference"] == 0.25
    assert words.figures(result).count("| recency |") == words.figures(result).count("| full |") == 1
    assert words.figures(result).count("+25.0") == 2


def test_equal_cells_are_said_only_where_they_are(result):
    assert words.peaks(result) == "Equal cells: every policy had exactly its budget in use at peak, 1024 bytes a cell under every policy."
    cells = [dict(c) for c in result["cells"]]
    cells[2].update(resident_peak=128, resident_peak_bytes=128 * 1024)
    assert "peaks are 50.0 to 100 % of the budget" in words.peaks({"cells": cells})
    cells[2].update(resident_peak=300)
    assert words.peaks({"cells": cells}) == "**1 of 10 cells of this grid were above their budget.**"


@pytest.mark.parametrize(("ram", "said"), [
    ((300, 200), "That is not equal memory: beside its cells `clusterkv` had up to 300 KiB in RAM."),
    ((None, 200), "both together are no less than the whole text, which is up to 110 KiB under `full`; how much RAM it was, this result did not keep."),
])  # fmt: skip
def test_ram_beside_the_cells_is_named(tmp_path, ram, said):
    """`clusterkv` stores what leaves its cells: the same cells are not the same memory."""
    cells = grid({"full": 20, "recency": 0, "clusterkv": 18})
    for rows, kib in zip([rows for cell, rows in cells.items() if cell.config.policy == "clusterkv"], ram, strict=True):
        for number, row in enumerate(rows):
            row["kv"] |= {} if kib is None else {"ram_bytes": 1024 * (kib - number)}
    found = words.peaks(heads.collected(folder(tmp_path / "one", cells)))
    assert found.startswith("Equal cells: every policy had exactly its budget") and found.endswith(said)


def test_records_of_other_commits_are_said(tmp_path):
    """results.json names what zoomr it was at the last start; the manifests know of all."""
    one = folder(tmp_path / "one", grid())
    about = {"settings": {}, "model": {}, "versions": {"zoomr": "1"}}
    for path in one.glob("*.jsonl"):
        path.with_name(path.name + ".manifest.json").write_text(json.dumps(about))
    assert "code" not in heads.collected(one)
    (one / "dag.rkv.256.jsonl.manifest.json").write_text(json.dumps({**about, "info": {"earlier_zoomr": ["checkout at aaa"]}}))
    found = heads.collected(one)
    assert sorted(found["code"]) == ["1", "checkout at aaa"] and "**Not all records are of that commit**: they were made with zoomr " in words.text([found])


def test_the_command_collects_and_writes_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before {words.BEGIN} x {words.END} after")
    (tmp_path / "results").mkdir()
    words_of = ["--page", str(page), "--results", str(tmp_path / "results")]
    assert heads.main([str(folder(tmp_path / "heads-plain", grid())), *words_of]) == 0
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["heads-plain.json"]
    written = page.read_text()
    assert written.startswith("before ") and written.endswith(" after") and "### plain-tiny: `zoomr eval --policy ...`" in written
    assert heads.main(words_of) == 0 and page.read_text() == written
    page.write_text("nothing")
    assert heads.main(words_of) == 2 and "has no block" in capsys.readouterr().err


@pytest.mark.parametrize("damage, said", [
    (lambda f: (f / "results.json").unlink(), "cannot read"), (lambda f: (f / "dag.rkv.256.jsonl").unlink(), "dag.rkv.256.jsonl: No such file"),
    (lambda f: (f / "dag.rkv.256.jsonl").write_text("{"), "is no file of records"), (lambda f: (f / "dag.rkv.256.jsonl").write_text('{"id": 3, "correct": true}\n'), "does not hold the problems"),
    (lambda f: (f / "dag.rkv.256.jsonl").write_text('{"id": 3}\n'), "is no file of records"),
])  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused_in_one_line(tmp_path, capsys, damage, said):
    one = folder(tmp_path / "one", grid())
    damage(one)
    assert heads.main([str(one), "--results", str(tmp_path), "--page", str(tmp_path / "none.md")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1


def test_the_page_is_what_the_results_say():
    page = heads.PAGE.read_text(encoding="utf-8")
    assert words.filled(page, heads.held()) == page, "run: python -m benchmarks.accuracy_heads"
    with pytest.raises(UsageError):
        words.filled("nothing", [])
