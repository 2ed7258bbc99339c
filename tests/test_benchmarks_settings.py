"""The choice of settings: which cells are run, the rule that chooses, and the command with a runner that makes records up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import FakeEngine, opener

from zoomr_local.engine import EngineConfig
from zoomr_local.evaluate import Cell
from zoomr_local.policies import Settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import runs, settings  # noqa: E402

BASES = [Cell(family, EngineConfig(kv_budget=512)) for family in ("dag", "series")]
DEFAULTS = {name: vars(Settings(vote_layers=(2, 3))) for name in ("dag", "series")}

# ---------------------------------------------------------------- which cells


def test_one_setting_changes_at_a_time_and_the_default_is_not_run_twice():
    cells = settings.alternatives(BASES, DEFAULTS, "votes_per_head", 4)
    assert [cell.label for cell in cells] == [f"{f} zoomr 512 votes_per_head={k}" for k in (0, 1, 4) for f in ("dag", "series")]
    plain = EngineConfig(kv_budget=512)
    assert {name for cell in cells for name, value in vars(cell.config).items() if value != getattr(plain, name)} == {"votes_per_head"}


def test_a_family_whose_default_it_is_is_left_out():
    defaults = {**DEFAULTS, "dag": vars(Settings(window_tokens=48))}
    tried = [(cell.family, cell.config.window) for cell in settings.alternatives(BASES, defaults, "window", 4)]
    assert tried == [("dag", 0), ("series", 0), ("series", 48), ("dag", 128), ("dag", 256), ("series", 256)]


@pytest.mark.parametrize(("n_layer", "parts"), [
    (4, [(0, 1, 2, 3), (0, 1), (2, 3), (2,), (3,)]), (5, [(0, 1, 2, 3, 4), (0, 1), (2, 3, 4), (2,), (3, 4)]), (1, [(0,)]),
])  # fmt: skip
def test_layers_vote_all_by_halves_and_by_halves_of_the_upper_half(n_layer, parts):
    assert list(settings.layer_choices(n_layer)) == parts


def test_no_layers_named_means_all_of_them():
    assert settings.same("vote_layers", (), (0, 1, 2, 3), 4) and not settings.same("vote_layers", (), (2, 3), 4)
    voting = [dict(cell.choices)["vote_layers"] for cell in settings.alternatives(BASES[:1], DEFAULTS, "vote_layers", 4)]
    assert (2, 3) not in voting and len(voting) == 4


def test_boundaries_only_is_a_refresh_that_no_reply_is_long_enough_for():
    from zoomr_local.evaluate import bundled_suite

    assert settings.BOUNDARIES in settings.TRIED["refresh"]
    assert settings.BOUNDARIES > 10 * max(bundled_suite(None, 1, 0, None, "dev", None).max_tokens.values())


def test_every_name_is_a_setting_of_the_engine_and_of_the_policy():
    for name, field in settings.FIELDS.items():
        assert hasattr(EngineConfig(), name) and hasattr(Settings(), field)


# ---------------------------------------------------------------- the rule


def compared(value, difference, low, high, **families):
    by_family = {name: {"interval95": interval} for name, interval in families.items()}
    return {"value": value, "difference": difference, "interval95": [low, high], "by_family": by_family}


def test_the_default_stays_unless_the_interval_lies_above_nothing():
    inside = compared(4, 0.3, -0.01, 0.5)
    beyond = compared(16, 0.2, 0.01, 0.4)
    assert settings.choose(8, [inside])[0] == 8
    assert settings.choose(8, [compared(4, 0.1, 0.0, 0.2)])[0] == 8
    assert settings.choose(8, [compared(4, -0.3, -0.4, -0.2)])[0] == 8
    assert settings.choose(8, []) == (8, "the default stays: no other value is better beyond the interval")
    assert settings.choose(8, [inside, beyond])[0] == 16, "the greater difference is no evidence here"
    assert settings.choose(8, [beyond, compared(32, 0.4, 0.2, 0.5)])[0] == 32
    assert settings.choose(8, [beyond, compared(32, 0.2, 0.01, 0.4)])[0] == 16, "of equal ones the first"
    assert settings.choose(8, [{"value": 1, "difference": None, "interval95": None, "by_family": {}}])[0] == 8


def test_a_value_that_is_worse_in_a_family_is_not_taken():
    harmful = compared(4, 0.2, 0.1, 0.3, dag=[0.5, 0.9], series=[-0.4, -0.1])
    assert settings.choose(8, [harmful]) == (8, "the default stays: what is better over all families is worse in series")
    assert settings.choose(8, [compared(4, 0.2, 0.1, 0.3, dag=[0.5, 0.9], series=[-0.4, 0.1])])[0] == 4


# ---------------------------------------------------------------- what it comes to


def record(name, right, resident=100.0):
    """Four lookups, of which all or three are right; the wrong one's thought was not in cells."""
    kv = {
        "resident_peak": 64, "resident_mean": resident, "token_bytes": 16, "page_ins": 2, "paged_out_bytes": 8,
        "dropped_tokens": 0, "splits": 0, "agreement": 0.5,
    }  # fmt: skip
    return {
        "id": name, "correct": right, "finish_reason": "stop", "usage": {"prompt_tokens": 10, "completion_tokens": 100},
        "timing": {"prefill_s": 0.5, "decode_s": 1.5}, "kv": kv,
        "lookups": [{"right": True, "where": "zoomed"}] * 3 + [{"right": right, "where": "zoomed" if right else "out"}],
    }  # fmt: skip


def made_up(share_of):
    """A runner of 40 problems a cell, of which ``share_of(cell)`` are right."""
    asked = []

    def run(cells):
        asked.extend(cells)
        return {cell: [record(f"{cell.family}-{i}", i < share_of(cell)) for i in range(40)] for cell in cells}

    run.asked = asked
    return run


def test_settings_are_measured_one_after_the_other_and_written_each_time():
    written = []
    runner = made_up(lambda cell: 38 if cell.config.zoomed_blocks == 4 else 20 + (cell.config.refresh == 1))
    result = settings.measure(BASES, DEFAULTS, ["refresh", "zoomed_blocks"], 4, runner, lambda found: written.append(json.dumps(found)))
    refresh, zoomed = result["settings"]["refresh"], result["settings"]["zoomed_blocks"]
    assert (refresh["default"], refresh["chosen"], zoomed["default"], zoomed["chosen"]) == (8, 8, 2, 4)
    assert [json.loads(text)["left"] for text in written] == [["zoomed_blocks"], []]
    assert len(runner.asked) == 2 + 2 * 4 + 2 * 3 == len(set(runner.asked))
    (four,) = [line for line in zoomed["compared"] if line["value"] == 4]
    assert (four["n"], four["gained"], four["lost"], four["difference"]) == (80, 36, 0, 0.45)
    assert four["by_family"]["dag"]["n"] == 40 and (four["right"], four["graded"], four["seconds"]) == (76, 80, 160)
    assert four["resident_tokens"] == 100 and zoomed["why"].startswith("better by +45.0 (")
    assert (four["lookups"]["n"], four["lookups"]["right"], four["lookups"]["in_cells"]) == (320, 316, 316)
    assert four["lookups"]["difference"] == round(316 / 320 - 280 / 320, 4) and four["lookups"]["interval95"][0] > 0
    of_dag = [cell for cell in result["cells"] if cell["family"] == "dag"]
    assert of_dag[0]["from_default"] is None and of_dag[1]["from_default"]["n"] == 40 and "from_full" not in of_dag[0]


def test_only_problems_that_both_have_graded_are_paired():
    def run(cells):
        found = {cell: [record("a", True), record("b", False)] for cell in cells}
        for cell in cells:
            if cell.choices:
                found[cell][0] = {"id": "a", "finish_reason": "error", "error": {"type": "EngineError", "message": "x"}}
        return found

    result = settings.measure(BASES, DEFAULTS, ["votes_per_head"], 4, run, lambda found: None)
    line, *_ = result["settings"]["votes_per_head"]["compared"]
    assert (line["n"], line["graded"], line["failed"], line["lost"]) == (2, 2, 2, 0)


CONDITIONS = {
    "date": "d", "commit": "c", "command": "x", "machine": {"cpu": "p", "cores": 2, "system": "s", "busy": ""}, "kv_budget": {"dag": 512},
    "model": {"file": "m.gguf", "bytes": 4, "sha256": "0" * 64, "hashed": "all"},
    "asked": {"n": 40, "split": "dev", "seed": 0, "thoughts": None, "families": ["dag"]},
}  # fmt: skip


def test_the_text_says_what_is_chosen_what_is_left_and_how_many_were_tried():
    runner = made_up(lambda cell: 38 if cell.config.vote_layers == (3,) else 20)
    result = settings.measure(BASES, DEFAULTS, ["vote_layers", "refresh"], 4, runner, lambda found: None)
    result["left"] = ["window"]
    said = settings.text({**CONDITIONS, **json.loads(json.dumps(result))})
    assert said.startswith("**To be changed: `vote_layers` 3.** 8 values were compared at 95 %, so 0.2 would pass by chance")
    assert "Not measured: `window`." in said and "| | boundaries only |" in said.replace("|  |", "| |")
    assert "3 **chosen** | 95.0 (87.8, 98.0) | 80 | +45.0 (" in said and "| `vote_layers` | 2+3 (default) |" in said
    still = settings.measure(BASES, DEFAULTS, ["refresh"], 4, made_up(lambda cell: 20), lambda found: None)
    assert settings.text({**CONDITIONS, **still}).startswith("**No default is to be changed.**")
    assert settings.text(None) == "Not measured."


def test_a_busy_machine_is_said():
    busy = {**CONDITIONS, "machine": {**CONDITIONS["machine"], "busy": "others"}}
    assert "The machine was busy (others)" in runs.conditions_text(busy) and "busy" not in runs.conditions_text(CONDITIONS)


# ---------------------------------------------------------------- the command


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    engine.policy = SimpleNamespace(select=lambda view: view)
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.setattr("zoomr_cli.versions.versions", lambda: {"zoomr": "test"})
    monkeypatch.setattr(settings, "model_defaults", lambda plan: ({name: DEFAULTS["dag"] for name in plan.cells}, 4))
    return engine


def command(folder, *more):
    return ["-n", "2", "--families", "series", "--thoughts", "3", "--work", str(folder / "work"), "--result", str(folder / "s.json"), "-q", *more]


def test_a_run_goes_on_where_it_was_stopped_and_names_no_folder(tmp_path, engine, capsys):
    def interrupt():
        if len(engine.prompts) == 10:
            engine.on_token = lambda: None
            raise KeyboardInterrupt

    engine.on_token = interrupt
    asked = command(tmp_path, "--settings", "votes_per_head,summary_rows")
    assert settings.main(asked) == 130
    assert json.loads((tmp_path / "s.json").read_text())["left"] == ["summary_rows"]
    capsys.readouterr()
    assert settings.main(asked) == 0
    assert len(engine.prompts) == 10 + 14 - 9, "of 7 cells of 2 problems, 9 problems were done"
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["left"] == [] and len(result["cells"]) == 7 and str(tmp_path) not in json.dumps(result)
    assert result["asked"]["split"] == "dev" and result["command"].startswith("python -m benchmarks.settings -n 2")
    assert capsys.readouterr().out == settings.text(result) + "\n"


def test_failed_problems_end_in_3(tmp_path, engine, capsys):
    from zoomr_local.errors import EngineError
    from zoomr_models.tasks import generate

    engine.replies[generate("series", 2, 0, 3, "dev")[1].prompt] = EngineError("x")
    assert settings.main(command(tmp_path, "--settings", "votes_per_head")) == 3
    assert "4 problems failed" in capsys.readouterr().err


def test_a_dry_run_counts_and_runs_nothing(tmp_path, engine, capsys):
    assert settings.main(command(tmp_path, "--dry-run", "--settings", "refresh")) == 0
    out = capsys.readouterr().out
    assert "series zoomr 652 refresh=1: about" in out and "\n5 cells, about" in out and engine.prompts == []


def test_budgets_by_family():
    assert runs.budgets("704,linsys=848", ["dag", "linsys"]) == {"dag": 704, "linsys": 848}
    assert runs.budgets("dag=300, series=400", ["dag", "series"]) == {"dag": 300, "series": 400}


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--families", "dags"], "error: --family dags: no such family"), (["--kv-budget", "x=y"], "error: --kv-budget x=y: give a number"),
    (["--kv-budget", "100"], "error: --kv-budget 100: at least"), (["-j", "0"], "error: -n 10 -j 0: both must be at least 1"),
])  # fmt: skip
def test_misuse_is_one_clear_line_and_exit_code_2(arguments, complaint, engine, capsys):
    assert settings.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(complaint) and len(err.splitlines()) == 1


def test_an_unknown_setting_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        settings.main(["--settings", "refersh"])
    assert ended.value.code == 2 and "no setting refersh" in capsys.readouterr().err
