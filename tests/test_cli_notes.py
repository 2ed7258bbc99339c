"""What the commands say before a run that a user may have meant otherwise."""

from __future__ import annotations

import json

import pytest

from zoomr_cli import notes
from zoomr_cli.main import main
from zoomr_cli.options import bundled_models
from zoomr_models import tasks


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_the_families_ask_as_they_are_known_to(family):
    for problem in tasks.generate(family, 20, seed=5):
        assert tasks.is_worded(problem.prompt) and not tasks.is_worded(problem.prompt[:-1]) and not tasks.is_worded("And: " + problem.prompt + " Or?")


def test_layers_for_a_gpu_that_is_not_there(capsys, monkeypatch):
    from zoomr_local.libllama import devices

    found = []
    monkeypatch.setattr(devices, "gpus", lambda: found)
    notes.without_gpu(0)
    assert capsys.readouterr().err == ""
    notes.without_gpu(99)
    assert "warning: -ngl 99: llama.cpp finds no GPU here" in capsys.readouterr().err
    found.append("a GPU")
    notes.without_gpu(99)
    assert capsys.readouterr().err == ""


def test_a_bundled_model_says_that_it_answers_puzzles_only(capsys, tmp_path):
    path = bundled_models()["zoomr-tiny"]
    puzzle = tasks.generate("dag", 1)[0].prompt
    notes.bundled(path, [puzzle], quiet=False)
    notes.bundled(path, [puzzle, "hello"], quiet=True)
    notes.bundled(tmp_path / "own.gguf", ["hello"], quiet=False)
    assert capsys.readouterr().err == ""
    notes.bundled(path, [puzzle, "hello"], quiet=False)
    notes.bundled(path, None, quiet=False)
    assert capsys.readouterr().err.count("note: zoomr-tiny is a test piece") == 2


def test_solve_says_both_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    from zoomr_local.libllama import devices

    monkeypatch.setattr(devices, "gpus", list)
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"id": 1, "prompt": "hello"}) + "\n")
    assert main(["solve", str(file), "-ngl", "5", "--dry-run", "-o", str(tmp_path / "out.jsonl")]) == 0
    err = capsys.readouterr().err
    assert "-ngl 5" in err and "test piece" in err


def test_the_command_to_go_on_keeps_what_stands_behind_the_two_dashes():
    typed = ["solve", "--overwrite", "-j", "2", "--", "--overwrite"]  # a file of that name
    assert notes.typed_again(typed, "--retry-failed", without=("--overwrite",)) == "zoomr solve -j 2 --retry-failed -- --overwrite"
    assert notes.typed_again(["solve", "a b.jsonl", "--retry-failed"], "--retry-failed") == "zoomr solve 'a b.jsonl' --retry-failed"
