"""The figures of docs/recall.md: made from the result files, means over problems, and what "more" and "less" mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks are not installed

from benchmarks import recall  # noqa: E402
from benchmarks import recall_report as report  # noqa: E402
from zoomr_local.errors import UsageError  # noqa: E402

NAMES = (*recall.BY_QUERY, *recall.CONTROLS)


def row(number: int, of: dict[str, float], late: float = 0.0) -> dict:
    """A problem in which a selector has the same in layers 2 and 3 of 4, less ``late`` by the query before."""
    def layers(name: str, less: float) -> list[float]:
        value = of.get(name, 0.2) + number / 100 - less
        return [0.9, 0.9, value - 0.1, value + 0.1]

    measured = {name: {str(b): {"own": layers(name, 0), "before": layers(name, late)} for b in (64, 128)} for name in NAMES}
    start = {"date": "2026-01-02", "commit": "abc", "command": "python -m benchmarks.recall"}
    return {**start, "family": "dag", "id": str(number), "prompt_tokens": 9, "tokens": 1000 + number, "steps": 3, "recall": measured, "mass": measured}


def result(of: dict[str, float], n: int = 5, late: float = 0.0, **more) -> dict:
    model = {"file": "m.gguf", "bytes": 1, "hashed": "all", "sha256": "f" * 64}
    rows = [row(i, of, late) for i in range(n)]
    return {"model": model, "asked": {"split": "dev", "budgets": [64, 128]}, "problems": rows, **more}


def test_dense_layers_are_in_no_mean():
    values = report.by_problem(result({"clusters": 0.5}), "recall", "clusters", 64)
    assert values == pytest.approx([0.5, 0.51, 0.52, 0.53, 0.54])
    assert report.by_problem(result({}), "recall", "clusters", 64, layers=slice(0, 2)) == pytest.approx([0.9] * 5)


def test_the_interval_is_over_problems():
    low, high = report.interval(np.array([0.0, 1.0] * 50))
    assert 0.38 < low < 0.45 and 0.55 < high < 0.62  # 0.5 with a standard error of 0.05
    assert report.interval(np.full(7, 0.25)) == (0.25, 0.25)
    assert report.percent(np.full(3, 0.5)) == "50.0 (50.0, 50.0)" and report.percent(np.full(3, -0.05), "+") == "-5.0 (-5.0, -5.0)"


def test_more_and_less_are_of_the_whole_paired_interval():
    shown = report.verdict(result({"clusters": 0.5, "pages": 0.4}), "recall", "clusters")
    assert shown == "more at 64, 128"
    assert report.verdict(result({"clusters": 0.3, "pages": 0.4}), "recall", "clusters") == "less at 64, 128"
    # problems differ by more than the selectors do, which pairing takes out
    assert report.verdict(result({"clusters": 0.405, "pages": 0.4}), "recall", "clusters") == "more at 64, 128"
    mixed = result({"clusters": 0.4, "pages": 0.4})
    for number, of in enumerate(mixed["problems"]):
        of["recall"] = json.loads(json.dumps(of["recall"]))
        of["recall"]["clusters"]["128"]["own"][3] += 0.1 if number % 2 else -0.1
    mixed["problems"][0]["recall"]["clusters"]["64"]["own"][3] += 0.1  # one problem of five: drawn without it as often as not
    assert report.verdict(mixed, "recall", "clusters") == "no difference shown at 64, 128"


def test_the_query_before_has_tables_of_its_own():
    text = report.text_of(result({"clusters": 0.5, "pages": 0.4}, late=0.2))
    assert "recall, `clusters` against `pages`: more at 64, 128." in text and "by the query before" in text
    own, before = text.split("by the query of the token before**")[:2]
    assert "| clusters | 52.0 (" in own and "| clusters | 32.0 (" in before
    assert "n = 5 dev problems (dag) of 1,000 to 1,004 tokens, 15 steps in all." in text
    assert "| 0 (dense in ClusterKV) | 90.0 / 90.0 | 90.0 / 90.0 |" in text and "| 3 | 62.0 / 52.0 |" in text
    assert "| clusters | +10.0 (+10.0, +10.0) |" in text
    assert "a bootstrap of 5 problems makes intervals that are too narrow" in text and "too narrow" in report.text_of(result({}, n=12))
    assert "too narrow" not in report.text_of(result({}, n=20))


def test_heads_that_attend_alike_are_said():
    alike = result({})
    assert "attend alike" not in report.text_of(alike)
    for of in alike["problems"]:
        of["recall"] = {**of["recall"], "best": {str(b): {"own": [0.5, 0.5, 1.0, 1.0]} for b in (64, 128)}}
    assert "`best` reaches all of it: the query heads of a KV head attend alike" in report.text_of(alike)
    alike["problems"][0]["recall"]["best"]["128"]["own"][3] = 0.99
    assert "attend alike" not in report.text_of(alike)


def test_what_knows_the_answer_stands_in_its_own_measure_only_and_only_if_all_problems_have_it():
    whole = result({})
    assert report.selectors(whole, "recall") == [*recall.BY_QUERY, "newest", "random", "best"]
    assert report.selectors(whole, "mass") == [*recall.BY_QUERY, "newest", "random", "most"]
    of = whole["problems"][1]
    of["mass"] = {name: value for name, value in of["mass"].items() if name != "most"}
    assert report.selectors(whole, "mass") == [*recall.BY_QUERY, "newest", "random"]
    held = report.text_of(whole).split("**Attention that the selection holds")[1]
    assert "| best |" not in held and "| most |" not in held


def test_every_start_is_said_with_its_commit_and_its_problems():
    assert report.measured(result({})) == "2026-01-02, commit abc, `python -m benchmarks.recall`."
    resumed = result({})
    for of in resumed["problems"][:2]:
        of |= {"commit": "older", "command": None}
    assert report.measured(resumed) == (
        "Measured in 2 starts: 2 problems on 2026-01-02, commit older, command not recorded; 3 problems on 2026-01-02, commit abc, `python -m benchmarks.recall`."
    )


def test_replies_without_a_step_are_said():
    short = result({})
    short["problems"].append({"date": "2026-01-02", "commit": "abc", "command": "x", "family": "dag", "id": "x", "prompt_tokens": 9, "tokens": 100, "steps": 0})
    assert "n = 5 dev" in report.text_of(short) and "1 more replies ended before the first step." in report.text_of(short)


def test_the_page_is_what_the_results_say():
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.held(), "there are results"
    assert report.filled(page, report.held()) == page, "run: python -m benchmarks.recall_report --plot"
    with pytest.raises(UsageError, match="has no block"):
        report.filled("nothing", [])


def test_the_picture_shows_the_results():
    assert report.picture_digest(report.held()).encode() in report.PAGE.with_suffix(".png").read_bytes(), "run: python -m benchmarks.recall_report --plot"


def test_the_measurements_are_of_these_settings():
    """What is measured today is what the page calls it."""
    for measured in report.held():
        asked = measured["asked"]
        assert (asked["first_step"], asked["every"], asked["budgets"]) == (recall.FIRST_STEP, recall.EVERY, list(recall.BUDGETS))


def test_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "recall.png", [result({}), result({"clusters": 0.5})])
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
