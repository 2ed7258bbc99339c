"""`--summaries` as a user meets it: what is said, what is refused before anything runs, the grid of `zoomr eval`, the user's markers."""

import json

import pytest
from fake_engine import FakeEngine

from zoomr_cli import summaries
from zoomr_cli.main import main
from zoomr_local.dialects import Summaries
from zoomr_local.engine import EngineConfig
from zoomr_local.errors import UsageError
from zoomr_local.evaluate import Run, Suite, grid
from zoomr_models import bundled_model_path


def said(capsys, mode, config):
    engine = FakeEngine()
    engine.config, engine.summaries = EngineConfig(**config), Summaries(mode, "the reason")
    summaries.say(engine, False)
    summaries.say(engine, True)
    return capsys.readouterr().err


def test_what_auto_took_is_one_line(capsys):
    assert said(capsys, "extractive", {}) == "summaries: extractive; the reason (--summaries takes another way)" + summaries._SMALL + "\n"
    assert said(capsys, "learned", {}) == "" == said(capsys, "prompted", {"summaries": "prompted"})


def test_a_policy_without_blocks_says_that_the_flag_is_of_no_use(capsys):
    assert said(capsys, "learned", {"policy": "recency", "summaries": "off"}) == "note: policy recency makes no blocks, so --summaries is not used\n"


def test_lengths_that_the_mode_has_no_use_for_are_said(capsys):
    lengths = {"thought_min": 64, "summary_max": 20}
    assert said(capsys, "off", {"summaries": "off", **lengths}) == (
        "note: --summaries is off here, so --thought-min is not used\nnote: --summaries is off here, so --summary-max is not used\n")  # fmt: skip
    assert said(capsys, "extractive", {"summaries": "extractive", **lengths}).count("note: ") == 1
    assert said(capsys, "prompted", {"summaries": "prompted", **lengths}) == ""


def test_modes_name_their_cells_and_are_for_policies_with_blocks():
    one = grid(["dag"], ["full", "zoomr", "recency"], [512], EngineConfig(), {"summaries": ["prompted"]})
    assert [c.file_name for c in one] == ["dag.full.jsonl", "dag.zoomr.512.summaries=prompted.jsonl", "dag.recency.512.jsonl"]
    cells = grid(["dag"], ["zoomr", "sumr"], [512], EngineConfig(), {"summaries": ["extractive", "off"], "thought_min": [64]})
    assert [(c.policy, c.config.summaries, c.config.thought_min) for c in cells] == [
        ("zoomr", "extractive", 64), ("zoomr", "off", 64), ("sumr", "extractive", 64), ("sumr", "off", 64)]  # fmt: skip
    assert grid(["dag"], ["zoomr"], [512], EngineConfig(), {"summaries": []})[0].file_name == "dag.zoomr.512.jsonl"


def test_a_mode_is_part_of_the_manifest_and_nothing_is_where_none_was_chosen(tmp_path):
    def settings(**config):
        (cell,) = grid(["dag"], ["zoomr"], [512], EngineConfig(**config))
        return Run([cell], Suite({"dag": []}, {"dag": 9}), tmp_path, lambda config: None, {}, {}).manifest(cell).settings

    assert not {"summaries", "thought_min", "summary_max"} & settings().keys(), "records of earlier versions are still known"
    assert settings(summaries="off")["summaries"] == "off" and settings(thought_min=99)["thought_min"] == 99


@pytest.mark.parametrize("arguments, text", [
    (["--summaries", "extractive,best"], "--summaries best: choose one of auto, learned"),
    (["--summaries", ","], "--summaries ,: give at least one"),
    (["--thought-min", "few"], "--thought-min few: give whole numbers"),
    (["--thought-min", "3"], "--thought-min 3: must be at least 16"),
])
def test_eval_refuses_before_anything_runs(tmp_path, capsys, arguments, text):
    assert main(["eval", "--family", "dag", "-n", "1", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_bundled_model_is_served_in_every_mode(capsys):
    summaries.check(["auto", "learned", "prompted", "extractive", "off"], ["zoomr"], bundled_model_path(), False)
    assert capsys.readouterr().err == ""
    summaries.check(["best"], ["full", "recency"], bundled_model_path(), False)


def config_file(tmp_path, monkeypatch, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    monkeypatch.setenv("ZOOMR_CONFIG", str(path))
    return path


def test_the_users_markers_are_read_and_reach_the_model(tmp_path, monkeypatch, capsys):
    config_file(tmp_path, monkeypatch, '[[markers]]\nname = "mine"\nsummary_open = "<|im_start|>"\nsummary_close = "<|im_end|>"\n')
    (row,) = summaries.user_markers()
    assert (row.name, row.summary_open, row.think_open) == ("mine", "<|im_start|>", None)
    assert main(["models", "show", "--json", "zoomr-tiny"]) == 0
    assert json.loads(capsys.readouterr().out)["dialect"] == "learned"


def test_markers_that_the_vocabulary_lacks_are_said_where_no_others_are_used(capsys):
    from talk import TalkModel

    from zoomr_local.dialects import Markers, MarkerSet

    engine = FakeEngine()
    engine.config, engine.model = EngineConfig(), TalkModel()
    engine.model.marker_sets = (MarkerSet("mine", "<|sum|>", "<|/sum|>", "<reason>", "</reason>"),)
    for markers, mode, told in (
        (engine.model.markers, "learned", []), (engine.model.markers.without_summaries, "extractive", ["<|sum|>"]),
        (Markers(None, None, None, None), "extractive", ["<|sum|>", "<reason>"]),
    ):  # fmt: skip
        engine.model.markers, engine.summaries = markers, Summaries(mode, "no markers")
        summaries.say(engine, False)
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert notes == [f"note: markers 'mine' of your configuration are not used: {text} is no token of scripted" for text in told]


def test_markers_that_cannot_be_name_the_file(tmp_path, monkeypatch):
    path = config_file(tmp_path, monkeypatch, '[[markers]]\nname = "mine"\nsummary_open = "<s>"\n')
    with pytest.raises(UsageError) as caught:
        summaries.user_markers()
    assert str(caught.value).startswith(f"{path}: markers 'mine': summary_open and summary_close belong together")
