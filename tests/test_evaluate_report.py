"""What the records of a grid come to: statistics against published and hand-made figures, files, the page's bars."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from zoomr_local import evaluate_report as report
from zoomr_local.engine import EngineConfig
from zoomr_local.errors import UsageError
from zoomr_local.evaluate import Cell

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import accuracy  # noqa: E402
from benchmarks.accuracy_bars import BEACON_BAR  # noqa: E402

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 2635-2650), table III, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((35, 14, 0, 1), 0.1461, 0.4175),
        ((2, 97, 1, 0), 0.8721, 0.9854),
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((30, 0, 0, 24), -0.0358, 0.0358),
        ((0, 30, 0, 0), 0.8395, 1.0),
    ],
)
def test_the_paired_interval_gives_newcombes_own_figures(counts, low, high):
    assert report.newcombe_interval(*counts) == pytest.approx((low, high), abs=6e-5)


def test_swapping_the_sides_turns_the_interval_around():
    low, high = report.newcombe_interval(20, 12, 2, 16)
    assert report.newcombe_interval(20, 2, 12, 16) == pytest.approx((-high, -low))


def test_mcnemar_by_hand():
    assert report.mcnemar_p(5, 0) == 2 / 2**5
    assert report.mcnemar_p(2, 8) == 2 * (1 + 10 + 45) / 2**10
    assert report.mcnemar_p(3, 3) == report.mcnemar_p(0, 0) == 1


def test_a_side_paired_with_itself_differs_by_nothing():
    pair = report.paired_difference([True, False, True], [True, False, True])
    assert (pair["difference"], pair["gained"], pair["lost"], pair["mcnemar_p"]) == (0, 0, 0, 1)
    assert pair["interval95"][0] < 0 < pair["interval95"][1]


def test_the_difference_counts_what_each_side_alone_has_right():
    pair = report.paired_difference([True, True, False, False, True], [True, False, True, False, False])
    assert (pair["n"], pair["gained"], pair["lost"], pair["difference"]) == (5, 2, 1, 0.2)


def test_the_auc_is_the_share_of_pairs_in_order_and_ties_count_half():
    # right at 0.9 and 0.4, wrong at 0.4 and 0.1: of four pairs three are in order, one is a tie.
    assert report.ranking_pairs([0.9, 0.4, 0.4, 0.1], [True, True, False, False]) == (3.5, 4)
    assert report.ranking_pairs([0.9], [True]) == (0.0, 0)


# ---------------------------------------------------------------- report


def record(name, right, agreement=None, reason="stop", tokens=100, resident=50.0, **more):
    kv = {
        "resident_peak": 64, "resident_mean": resident, "token_bytes": 16, "page_ins": 2, "paged_out_bytes": 8,
        "dropped_tokens": 0, "splits": 0, "agreement": agreement,
    }  # fmt: skip
    return {
        "id": name, "correct": right, "finish_reason": reason, "usage": {"prompt_tokens": 10, "completion_tokens": tokens},
        "timing": {"prefill_s": 0.5, "decode_s": 1.5}, "kv": kv, **more,
    }  # fmt: skip


def failed(name):
    return {"id": name, "finish_reason": "error", "error": {"type": "EngineError", "message": "x"}}


FULL = Cell("dag", EngineConfig(policy="full"))
ZOOMR = Cell("dag", EngineConfig(policy="zoomr", kv_budget=256), (("refresh", 4), ("vote_layers", (2, 3))))


def test_a_cell_is_paired_by_id_and_failed_problems_count_in_neither():
    found = {
        FULL: [record("a", True), record("b", True), record("c", False), record("d", True)],
        ZOOMR: [failed("a"), record("b", True, 0.9), record("c", False, 0.2, "length", 300, 150.0), record("d", False, 0.5)],
    }
    full, zoomr = report.report(found)["cells"]
    assert (full["n"], full["right"], full["kv_budget"], full["from_full"]) == (4, 3, None, None)
    assert (zoomr["n"], zoomr["right"], zoomr["failed"], zoomr["kv_budget"]) == (3, 1, 1, 256)
    assert (zoomr["from_full"]["n"], zoomr["from_full"]["lost"]) == (3, 1)
    assert zoomr["resident_mean"] == (50 * 100 + 150 * 300 + 50 * 100) / 500  # a mean over tokens, not over problems
    assert (zoomr["out_of_tokens"], zoomr["out_of_tokens_share"]) == (1, round(1 / 3, 6))
    assert (zoomr["resident_peak_bytes"], zoomr["page_ins"], zoomr["seconds"]) == (1024, 6, 6.0)
    assert zoomr["agreement"] == {"mean": 0.5333, "auc": 1.0, "n": 3, "n_wrong": 2}


def test_agreement_is_compared_within_cells_only():
    other = Cell("series", ZOOMR.config)
    found = {
        ZOOMR: [record("a", True, 0.9), record("b", True, 0.8)],  # an easy family: all right, much agreement
        other: [record("c", True, 0.2), record("d", False, 0.3)],
    }
    assert report.report(found)["agreement"] == {"auc": 0.0, "pairs": 1, "n": 4, "n_wrong": 1}
    assert report.auc_text(0.0, 4, 1) == "- (wrong problems: 1 of 4; it takes 5 of either kind)"
    assert report.auc_text(0.25, 10, 5) == "0.250" and report.auc_text(0.25, 9, 5).startswith("- (") and report.auc_text(None, 20, 0).startswith("- (")


def test_a_grid_without_votes_has_no_agreement():
    assert report.report({FULL: [record("a", True)]})["agreement"] is None


def test_csv_has_a_line_a_cell_with_the_nested_figures_flat(tmp_path):
    result = report.report({FULL: [record("a", True)], ZOOMR: [record("a", False, 0.5)]})
    report.write_csv(tmp_path / "r.csv", result)
    full, zoomr = csv.DictReader((tmp_path / "r.csv").open())
    assert (full["from_full.difference"], zoomr["from_full.difference"]) == ("", "-1.0")
    assert not {"from_full", "agreement"} & full.keys()
    assert (zoomr["wilson95.low"], zoomr["settings_text"]) == ("0.0", "refresh=4 vote_layers=2+3")


@pytest.mark.parametrize("families", [1, 2, 3, 4, 5])
def test_the_plot_is_a_png_that_names_what_it_shows(tmp_path, families):
    pytest.importorskip("matplotlib")
    found = {}
    for family in "abcde"[:families]:
        found[Cell(family, FULL.config)] = [record("a", True)]
        found[Cell(family, ZOOMR.config, ZOOMR.choices)] = [record("a", False, 0.5)]
        found[Cell(family, ZOOMR.config)] = [failed("a")]  # nothing to draw
    result = report.report(found)
    report.plot(tmp_path / "new" / "r.png", result)
    png = (tmp_path / "new" / "r.png").read_bytes()
    assert png.startswith(b"\x89PNG") and report.plot_digest(result).encode() in png


def test_what_stays_below_its_budget_is_named_on_the_axis_where_it_stands():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def cell(peak, budget, **more):
        return {"policy": "zoomr", "settings_text": "", "kv_budget": budget, "resident_peak": peak, "accuracy": 0.5, "wilson95": [0.4, 0.6], "n": 9, **more}

    cells = [cell(250, 256), cell(730, 1024, policy="breadcrumbs", settings_text="beacon_every=8"), cell(1024, 1024)]
    axes = Figure().subplots()
    report._draw_family(axes, "dag", cells, report._styles(cells))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "730", "1,024"] and list(axes.get_xticks()) == [256, 730, 1024]


def test_nothing_to_draw_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="no cell has graded"):
        report.plot(tmp_path / "r.png", report.report({FULL: [failed("a")]}))


def test_a_policy_has_one_colour_and_its_settings_have_markers_of_their_own():
    cells = [{"policy": "zoomr", "settings_text": f"refresh={r}"} for r in range(3)] + [{"policy": p, "settings_text": ""} for p in ("sumr", "full")]
    styles = report._styles(cells)
    assert list(styles)[0] == "full" and len(styles) == 5
    assert len({styles[f"zoomr refresh={r}"]["color"] for r in range(3)}) == 1 != len({styles[name]["color"] for name in styles})
    assert len({styles[name]["marker"] for name in styles}) == 5


def test_the_digest_is_of_the_figures_that_are_drawn():
    result = report.report({FULL: [record("a", True)], ZOOMR: [record("a", False, 0.5)]})
    same = {"cells": [{**cell, "seconds": 99.0} for cell in result["cells"]]}
    other = {"cells": [{**cell, "accuracy": 0.5} for cell in result["cells"]]}
    assert report.plot_digest(same) == report.plot_digest(result) != report.plot_digest(other)


# ---------------------------------------------------------------- the page


def measured(family, policy, budget, right, of_full=None):
    """A cell of 200 problems, its difference from full in problems."""
    pair = None if of_full is None else {"difference": of_full / 200, "interval95": [-0.1, 0.1]}
    return {
        "family": family, "policy": policy, "kv_budget": budget, "settings_text": "", "n": 200, "accuracy": right / 200,
        "wilson95": [0.0, 1.0], "from_full": pair, "sequence_mean": 1000.0, "seconds": 300.0, "resident_peak": budget or 1000,
        "resident_mean": 200.0, "resident_peak_bytes": 1024, "page_ins": 5, "tokens_per_s": 300.0, "out_of_tokens": 0, "agreement": None,
    }  # fmt: skip


@pytest.mark.parametrize("seconds, minutes, met", [(1200.0, "10.0", True), (1212.0, "10.1", False)])
def test_the_time_bar_is_of_two_processes_at_the_slowest_cells_pace(seconds, minutes, met):
    cells = [measured("dag", "full", None, 196), {**measured("dag", "zoomr", 250, 193, -3), "seconds": seconds, "settings_text": "beacon_every=4"}]
    (bar,) = [bar for bar in accuracy.bars({"cells": cells}) if bar[0].startswith("200 problems")]
    assert bar[1].startswith(f"{minutes} minutes for 200 in two processes") and bar[1].endswith("the slowest cell, dag zoomr 250 beacon_every=4, n = 200") and bar[2] is met


def test_bars_are_judged_at_the_greatest_budget_within_a_quarter_and_misses_stand_first():
    cells = [
        measured("dag", "full", None, 196), measured("dag", "zoomr", 128, 100, -96), measured("dag", "zoomr", 250, 193, -3),
        measured("dag", "zoomr", 256, 90, -106), measured("dag", "sumr", 250, 180, -16), measured("dag", "random", 250, 176, -20),
    ]  # fmt: skip
    found = accuracy.bars({"cells": cells})
    judged = {asked: met for asked, _, met in found}
    where = "dag, a quarter of the full trace (250 cells)"
    assert judged["dag: full, at least 97 % right"] is True
    assert judged[f"{where}: zoomr within 2 points of full"] is True
    assert judged[f"{where}: sumr at least 10 points behind full"] is False
    assert judged[f"{where}: random at least 10 points behind full"] is True
    assert judged[f"{where}: recency at least 10 points behind full"] is None
    assert [met for _, _, met in found] == [False, None, None, None, True, True, True, True]
    assert "| dag, a quarter of the full trace (250 cells): sumr at least 10 points behind full | -8.0 (-10.0, +10.0), n = 200 | **not met** |" in (
        accuracy.bars_text([{"cells": cells}])
    )


def test_the_bar_of_breadcrumbs_is_the_share_of_the_uncompressed_models_accuracy():
    def result(file, *cells):
        return {"model": {"file": file}, "command": file, "cells": [{**cell, "right": round(200 * cell["accuracy"])} for cell in cells]}

    beacons = [measured(family, "breadcrumbs", 256, right) for family, right in (("dag", 100), ("series", 180))]
    beacons.append(measured("dag", "breadcrumbs", 200, 20))
    other_c = [{**measured("dag", "breadcrumbs", 256, 200), "settings_text": "beacon_every=4"}]
    crumbs = result("breadcrumbs-tiny.gguf", *beacons, *other_c, measured("dag", "full", None, 200))
    plain = result("plain-tiny.gguf", measured("dag", "full", None, 150), measured("series", "full", None, 200), measured("linsys", "full", None, 200))
    zooms = result("zoomr-tiny.gguf", measured("dag", "full", None, 200), measured("dag", "zoomr", 250, 200, 0))
    (bar,) = [bar for bar in accuracy.bars(crumbs, [crumbs, plain, zooms]) if bar[0] == BEACON_BAR]
    assert bar[1:] == ("80 %: 70.0 (65.3, 74.3), n = 400 against 87.5 (83.9, 90.4), n = 400, of plain-tiny.gguf under full, dag, series", True)
    fewer = [{**cell, "n": 20, "right": 10} if cell["family"] == "dag" and cell["policy"] == "breadcrumbs" else cell for cell in crumbs["cells"]]
    (bar,) = [bar for bar in accuracy.bars({**crumbs, "cells": fewer}, [crumbs, plain]) if bar[0] == BEACON_BAR]
    assert bar[1].startswith("80 %: ") and bar[2], "a family weighs the same with 20 problems as with 200"
    alone = accuracy.bars(crumbs, [crumbs])[0]
    assert alone[1].startswith("50 %: 50.0 (") and "breadcrumbs-tiny.gguf under full, dag" in alone[1] and alone[2] is False
    assert not any("zoomr" in asked for asked, *_ in accuracy.bars(crumbs))
    assert BEACON_BAR not in [asked for asked, *_ in accuracy.bars(zooms, [crumbs, zooms])]
    page = accuracy.bars_text([crumbs, plain, zooms])
    assert [line for line in page.splitlines() if line.startswith("###")] == ["### breadcrumbs-tiny", "### zoomr-tiny"]
    assert "\n\nMeasured by\n\n- `breadcrumbs-tiny.gguf`\n- `plain-tiny.gguf`\n\nEvery bar" in page and "- `zoomr-tiny.gguf`\n\n" in page


def test_a_setting_of_one_value_is_neither_merged_nor_judged_as_the_default():
    def result(words, n, right, asked=None, **more):
        command = f"zoomr eval -n {n} {words}"
        cell = {**measured("dag", "breadcrumbs", 256, 200), "n": n, "right": right, "accuracy": right / n, **({} if asked is None else {"asked": asked})}
        return {"model": {"file": "breadcrumbs-tiny.gguf"}, "command": command, "cells": [cell, {**measured("dag", "full", None, 200), "right": 200}], **more}

    def bar(*results):
        (whole,) = accuracy.merged(results)
        assert accuracy.merged([whole]) == [whole]
        return next(text for asked, text, _ in accuracy.bars(whole, [whole]) if asked == BEACON_BAR), whole

    eight, sixteen = result("--beacon-every 8 -q", 100, 71), result("--beacon-every 16", 200, 20)
    for other in (sixteen, result("--beacon-every=16", 200, 20), result("", 200, 20, {"beacon_every": 16}), result("", 200, 20, {"sinks": 3, "flash_attn": False})):
        for order in ((eight, other), (other, eight)):
            text, whole = bar(*order)
            assert text.startswith("71 %: 71.0 (61.5, 79.0), n = 100 against") and len(whole["cells"]) == 3
    assert bar(sixteen)[0] == "not measured"
    assert bar(result("-q", 100, 40))[0].startswith("40 %"), "the model's first"
    text, whole = bar(eight, result("-q", 200, 100, {"beacon_every": 8}))
    assert text.startswith("50 %") and len(whole["cells"]) == 2, "the same, of more problems"
    assert [cell["settings_text"] for cell in whole["cells"]] == ["beacon_every=8", ""], "it means nothing to full"
    assert len(accuracy.merged([eight, result("--max-tokens 99", 9, 9)])) == len(accuracy.merged([eight, result("", 9, 9, asked={}) | {"asked": {"max_tokens": 99}}])) == 2
    assert len(accuracy.merged([result("", 9, 9), result("", 9, 9) | {"asked": {"max_tokens": None}}])) == 1


@pytest.mark.parametrize("flag, value, text", [("--refresh", "3", "refresh=3"), ("--window", "32", "window=32"), ("--zoomed-blocks", "2", "zoomed_blocks=2"), ("--kv-page-type", "q8_0", "kv_page_type=q8_0"), ("--vote-layers", "2,3", "vote_layers=2+3"), ("--no-flash-attn", "", "flash_attn=off")])
def test_an_older_result_says_in_its_command_what_had_one_value(flag, value, text):
    cells = [measured("dag", "full", None, 200), measured("dag", "zoomr", 250, 200, 0), measured("dag", "recency", 250, 0, -200)]
    (whole,) = accuracy.merged([{"model": {"file": "m.gguf"}, "command": f"zoomr eval {flag} {value}", "cells": cells}])
    everywhere = text if flag == "--no-flash-attn" else ""
    assert [cell["settings_text"] for cell in whole["cells"]] == [everywhere, text, everywhere]
    (typed,) = accuracy.merged([{"model": {"file": "m.gguf"}, "command": "zoomr eval --sinks 4 --on-full drop --flash-attn --kv-page-type f16", "cells": cells}])
    assert {cell["settings_text"] for cell in typed["cells"]} == {""}, "defaults"


def test_a_trace_too_short_for_the_smallest_budget_is_not_measured():
    cells = [measured("series", "full", None, 200), measured("series", "zoomr", 256, 200, 0)]
    judged = {asked: (text, met) for asked, text, met in accuracy.bars({"cells": cells})}
    assert judged["series, an eighth of the full trace: zoomr within 2 points of full"] == ("not measured: it is 125 cells", None)


def results_held():
    return [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("accuracy*.json"))]


def test_figures_in_the_docs_are_those_of_the_results():
    page = (ROOT / "docs" / "accuracy.md").read_text()
    assert page == accuracy.filled(page, results_held(), accuracy.held()), "run: python -m benchmarks.accuracy"


def test_the_pictures_in_the_docs_show_the_results():
    page = (ROOT / "docs" / "accuracy.md").read_text()
    for name, result in accuracy.drawn(results_held()).items():
        assert f"]({name})" in page
        assert report.plot_digest(result).encode() in (ROOT / "docs" / name).read_bytes(), "run: python -m benchmarks.accuracy --plot"


def test_sections_without_a_result_say_so_and_with_one_are_its_text(monkeypatch, tmp_path):
    page = (ROOT / "docs" / "accuracy.md").read_text()
    bare = accuracy.filled(page, results_held(), accuracy.held(tmp_path))
    assert bare.count("\n\nNot measured.\n\n") == len(accuracy.SECTIONS)
    (tmp_path / "settings.json").write_text('{"x": 7}')
    monkeypatch.setitem(accuracy.SECTIONS, "settings", lambda result: f"seven is {result['x']}")
    there = accuracy.filled(page, results_held(), accuracy.held(tmp_path))
    assert "<!-- settings: begin -->\n\nseven is 7\n\n<!-- settings: end -->" in there and there.count("Not measured.") == len(accuracy.SECTIONS) - 1


def test_the_command_writes_the_page_and_draws(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "accuracy.md").read_text().replace("bars are not reached", "bars are reached"))
    assert accuracy.main(["--page", str(page)]) == 0
    assert page.read_text() == (ROOT / "docs" / "accuracy.md").read_text()
    assert accuracy.main(["--page", str(page), "none.json"]) == accuracy.main(["--page", str(page), str(page)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == "error: cannot read none.json: No such file or directory; give results.json of zoomr eval"
    pytest.importorskip("matplotlib")
    assert accuracy.main(["--page", str(page), "--plot"]) == 0
    for name, result in accuracy.drawn(results_held()).items():
        assert report.plot_digest(result).encode() in (tmp_path / name).read_bytes()


def test_every_model_has_a_picture_and_two_of_one_name_are_refused():
    one, other, changed = ({"model": {"file": file, "sha256": digit * 64}, "versions": {}, "cells": []} for file, digit in (("m.gguf", "a"), ("n.gguf", "b"), ("m.gguf", "c")))
    assert list(accuracy.drawn([one, other, one])) == ["accuracy-m.png", "accuracy-n.png"]
    assert accuracy.pictures_text([one, other]).count("](accuracy-") == 2
    with pytest.raises(UsageError, match="of two models, versions or ways of measuring \\(SHA-256 aaaaaaaa and cccccccc"):
        accuracy.drawn([one, changed])


def test_results_of_one_model_are_judged_together_and_of_two_apart():
    one, two = {"file": "a"}, {"file": "b"}
    quarter = {"model": one, "command": "x", "cells": [measured("series", "full", None, 200), measured("series", "zoomr", 250, 200, 0)]}
    eighth = {"model": one, "command": "y", "cells": [measured("series", "full", None, 1), measured("series", "zoomr", 125, 100, -100)]}
    other = {"model": two, "command": "z", "cells": [measured("series", "full", None, 100)]}
    whole, apart = accuracy.merged([quarter, eighth, other])
    at = [{"versions": {"zoomr": zoomr, "engine": "1"}} for zoomr in ("checkout at 1a2b3c", "checkout at 4d5e6f+", "not installed")]
    assert len(accuracy.merged([quarter | at[0], eighth | at[1], other | at[2], quarter | at[2]])) == 2, "a commit is no way of measuring"
    assert len(accuracy.merged([quarter | at[0], eighth | {"versions": {"zoomr": "0.1", "engine": "1"}}])) == 2
    for changed in ({"asked": {"seed": 9}}, {"temperature": 1.0}, {"kv_type": "q8_0"}):
        assert len(accuracy.merged([quarter, {**eighth, **changed}])) == 2, "measured in another way"
    more = {**eighth, "cells": [{**cell, "n": 400} for cell in eighth["cells"]]}
    for order in ([quarter, more], [more, quarter]):
        (both,) = accuracy.merged(order)
        assert [(c["policy"], c["kv_budget"], c["n"]) for c in both["cells"] if c["policy"] == "full"] == [("full", None, 400)]
        assert len(both["cells"]) == 3
    assert len(accuracy.merged([quarter | {"asked": {"seed": 0, "n": 200}}, eighth | {"asked": {"seed": 0, "n": 20}}])) == 1
    assert next(bar for bar in accuracy.bars({**whole, "cells": [{**c, "n": 0} for c in whole["cells"]]}) if "10 minutes" in bar[0])[1:] == ("not measured", None)
    assert [(c["policy"], c["kv_budget"]) for c in whole["cells"]] == [("full", None), ("zoomr", 250), ("zoomr", 125)]
    judged = {asked: met for asked, _, met in accuracy.bars(whole)}
    assert judged["series, a quarter of the full trace (250 cells): zoomr within 2 points of full"] is True
    assert judged["series, an eighth of the full trace (125 cells): zoomr within 2 points of full"] is False
    assert judged["series: full, at least 97 % right"] is True and len(apart["cells"]) == 1
