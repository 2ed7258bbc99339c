"""`clusterkv` from the command line: what records say, which flags it takes and which it refuses."""

import json

import pytest

from zoomr_cli.main import main


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "Write " + "one two three four five six seven " * 12, "answer": "4"}) + "\n")
    return path


FLAGS = ["--policy", "clusterkv", "--kv-budget", "128", "-n", "6"]


def test_a_record_says_what_was_recalled(problems, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = ["solve", str(problems), *FLAGS, "--pin-prompt", "off", "--kv-ram", "8MiB", "--refresh", "2"]
    assert main([*command, "-n", "30", "-o", str(out)]) == 0
    kv = json.loads(out.read_text())["kv"]
    assert f"paged out; {kv['recalled_tokens']:,} tokens came back" in capsys.readouterr().err and kv["recalled_tokens"] > 0
    assert kv["policy"] == "clusterkv" and kv["layer_cells"] == [128] * 4 and kv["resident_peak"] <= 128 == kv["allocated"]
    assert kv["paged_out_bytes"] == kv["ram_bytes"] > 0 == kv["dropped_tokens"]
    assert "cluster_hit_rate" in kv and json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["info"]["resolved"]["select_every_tokens"] == 2


def test_dense_layers_are_in_the_record_and_a_budget_that_is_too_small_for_them_in_its_error(problems, tmp_path):
    for name, budget, ended in (("much", "400", 0), ("little", "128", 3)):
        out = tmp_path / f"{name}.jsonl"
        assert main(["solve", str(problems), "-o", str(out), *FLAGS, "--kv-budget", budget, "-n", "300", "--dense-layers", "1", "--stop", "e", "-q"]) == ended
        record = json.loads(out.read_text())
        if ended:
            assert record["error"]["type"] == "BudgetError" and "take --kv-budget " in record["error"]["message"]
        else:
            assert record["kv"]["layer_cells"][0] > 400 and sum(record["kv"]["layer_cells"]) == 1600


def test_flags_without_a_meaning_are_refused_by_name(problems, tmp_path, capsys):
    for more, said in (
        (["--kv-disk", "1GiB"], "--kv-disk has no meaning for policy clusterkv: it stores in RAM alone"),
        (["--on-full", "stop", "--wait-for-disk"], "--on-full and --wait-for-disk have no meaning for policy clusterkv"),
        (["--checkpoint", str(tmp_path / "c")], "--checkpoint has no meaning"),
        (["--policy", "rkv", "--kv-ram", "2GiB"], "--kv-ram has no meaning for policy rkv: nothing is stored"),
        (["--policy", "zoomr", "--dense-layers", "1"], "--dense-layers 1 means nothing to policy zoomr; it is for clusterkv"),
        (["--policy", "rkv", "--cluster-query", "last"], "--cluster-query last means nothing to policy rkv; it is for clusterkv"),
        (["--cluster-query", "next"], "--cluster-query next: choose one of last, own"),
        (["--clusters-added", "0"], "--clusters-added 0: must be at least 1"),
    ):
        assert main(["solve", str(problems), "-o", str(tmp_path / "no.jsonl"), *FLAGS, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no.jsonl").exists()


def test_too_little_ram_is_the_error_of_the_problem_that_needs_it(problems, tmp_path, capsys):
    assert main(["solve", str(problems), "-o", str(tmp_path / "out.jsonl"), *FLAGS, "--kv-ram", "1k"]) == 3
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert record["error"]["type"] == "TierSizeError" and "--kv-ram 1 KiB: a text of" in record["error"]["message"]


def test_eval_refuses_a_word_that_is_no_choice_whatever_the_policy(tmp_path, capsys):
    assert main(["eval", "-o", str(tmp_path / "eval"), "--policy", "zoomr", "--cluster-query", "own,next", "-n", "1"]) == 2
    assert "--cluster-query next: choose one of last, own" in capsys.readouterr().err and not (tmp_path / "eval").exists()


def test_eval_compares_dense_layers_and_selections_every_so_often(problems, tmp_path):
    folder = tmp_path / "eval"
    assert main(["eval", "--suite", str(problems), "-o", str(folder), "--policy", "clusterkv,recency", "--kv-budget", "256",
                 "--dense-layers", "0,1", "--refresh", "1,4", "--max-tokens", "4", "-q"]) == 0
    found = {path.name for path in folder.glob("*.jsonl")}
    assert len(found) == 5 and any("recency" in name and "dense" not in name for name in found)
    assert sum("dense_layers=1" in name and "refresh=4" in name for name in found) == 1
