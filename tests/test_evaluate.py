"""`zoomr eval` as a user meets it: the grid, resumption, refusals, the files it writes, and a small grid on the real engine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine, opener

from zoomr_cli.main import main
from zoomr_local.engine import EngineConfig
from zoomr_local.errors import EngineError, UsageError
from zoomr_local.evaluate import Cell, bundled_suite, file_suite, grid
from zoomr_local.grading import Grade, Grader
from zoomr_local.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import accuracy  # noqa: E402

# ---------------------------------------------------------------- grid and suite


def test_full_runs_once_a_family_and_first():
    cells = grid(["dag", "series"], ["zoomr", "full", "random"], [256, 512], EngineConfig())
    assert [c.label for c in cells][:5] == ["dag full", "dag zoomr 256", "dag zoomr 512", "dag random 256", "dag random 512"]
    assert len(cells) == 10 and len({c.file_name for c in cells}) == 10


def test_compared_settings_multiply_the_policies_that_vote_and_no_others():
    choices = {"refresh": [1, 8], "vote_layers": [(), (2, 3)], "window": [64], "vote_window": []}
    cells = grid(["dag"], ["full", "zoomr", "recency"], [256], EngineConfig(), choices)
    assert [c.file_name for c in cells] == [
        "dag.full.jsonl",
        *(f"dag.zoomr.256.refresh={r}.vote_layers={v}.jsonl" for r in (1, 8) for v in ("all", "2+3")),
        "dag.recency.256.jsonl",
    ]
    assert {c.config.window for c in cells if c.policy == "zoomr"} == {64}
    assert {c.config.window for c in cells if c.policy != "zoomr"} == {None}


def test_families_that_are_no_file_names_get_files_of_their_own():
    names = {Cell(family, EngineConfig()).file_name for family in ("a/b", "a b", "a_b")}
    assert len(names) == 3 and not any("/" in name or " " in name for name in names)


def test_more_problems_begin_with_the_same_ones_and_keep_the_reply_limit():
    few, many = (bundled_suite(["series"], n, 3, 6, "dev", None) for n in (2, 5))
    assert many.problems["series"][:2] == few.problems["series"]
    assert many.max_tokens == few.max_tokens and few.max_tokens["series"] % 256 == 0


def test_a_files_lines_are_grouped_by_family():
    rows = [{"id": i, "prompt": "p", "answer": 1, **({"family": "x"} if i % 2 else {})} for i in range(5)]
    lines = [json.dumps(row).encode() for row in rows]
    suite = file_suite(lines, "some/mine.jsonl", None, 2, 99)
    assert {f: [p.id for p in ps] for f, ps in suite.problems.items()} == {"mine": [0, 2], "x": [1, 3]}
    with pytest.raises(UsageError, match="it has mine, x"):
        file_suite(lines, "mine.jsonl", ["y"], None, 99)
    with pytest.raises(UsageError, match='1 problem without an "answer" to compare with'):
        file_suite([b'{"id": 1, "prompt": "p"}'], "mine.jsonl", None, None, 99)


def test_a_familys_name_can_be_printed_and_no_two_are_one(capsys):
    names = ["\x1b[31mX\nY", " [31mX Y", "x" * 70, "x" * 71, "\ud800", "plain"]
    lines = [json.dumps({"id": i, "prompt": "p", "answer": 1, "family": name}).encode() for i, name in enumerate(names)]
    suite = file_suite(lines, "mine.jsonl", None, None, 99)
    assert len(suite.families) == len(names) and suite.families[-1] == "plain"
    assert all(family.isprintable() and len(family) <= 60 for family in suite.families) and suite.families[0].startswith("[31mX Y-")
    for asked in names[:2], suite.families[:2]:
        assert file_suite(lines, "mine.jsonl", asked, None, 99).families == suite.families[:2]


# ---------------------------------------------------------------- the command


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.setattr("zoomr_cli.eval_check.check", lambda *asked: None)  # its engines are real ones
    monkeypatch.setattr("zoomr_cli.versions.versions", lambda: {"zoomr": "test"})
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)
    return engine


@pytest.fixture
def here(tmp_path, monkeypatch, engine) -> Path:
    """A folder with four problems and something that has a model's name."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    monkeypatch.setenv("ZOOMR_MODEL", "m.gguf")
    return tmp_path


def prepare(folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"GGUF")
    rows = [{"id": f"p{i}", "prompt": f"ask {i}", "answer": "4"} for i in range(4)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ASK = ("eval", "--suite", "in.jsonl", "--policy", "full,zoomr", "--kv-budget", "256,512", "-o", "out")


def ids(name: str) -> list[str]:
    return [json.loads(line)["id"] for line in Path("out", name).read_text().splitlines()]


def test_every_cell_gets_the_same_problems_and_stdout_only_the_table(here, capsys):
    assert main([*ASK]) == 0
    for name in ("in.full.jsonl", "in.zoomr.256.jsonl", "in.zoomr.512.jsonl"):
        assert ids(name) == ["p0", "p1", "p2", "p3"]
    out, err = capsys.readouterr()
    assert "Accuracy" in out and "100.0 (51.0, 100.0)" in out and "AUC - (wrong problems: 0 of 12; it takes 5" in " ".join(out.split())
    assert err.startswith("3 cells, 12 problems in all\n[1 of 3] in full: 4 problems") and "[3 of 3] in zoomr 512: 4 problems" in err


def test_a_commit_between_two_starts_is_said_and_stands_in_the_result(here, capsys, monkeypatch):
    def of(commit):
        monkeypatch.setattr("zoomr_cli.versions.versions", lambda: {"zoomr": f"checkout at {commit}", "engine": "1"})

    def result():
        return json.loads(Path("out/results.json").read_text())

    of("aaa")
    assert main([*ASK]) == 0 and "code" not in result()
    records = Path("out/in.full.jsonl")
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:1]))
    capsys.readouterr()
    of("bbb")
    assert main([*ASK]) == 0
    assert "note: records in out were made with zoomr checkout at aaa, checkout at bbb; --overwrite makes all anew" in capsys.readouterr().err
    assert result()["code"] == ["checkout at aaa", "checkout at bbb"] and result()["versions"]["zoomr"] == "checkout at bbb"
    assert ids("in.full.jsonl") == ["p0", "p1", "p2", "p3"]


def test_json_is_the_whole_report_and_a_policy_as_good_as_full_differs_by_0(here, capsys):
    assert main([*ASK, "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result == json.loads(Path("out/results.json").read_text())
    assert [c["from_full"] and c["from_full"]["difference"] for c in result["cells"]] == [None, 0, 0]
    assert result["command"].startswith("zoomr eval --suite in.jsonl") and result["model"]["file"] == "m.gguf"


def test_a_wrong_answer_lowers_the_accuracy(here, engine, capsys):
    engine.replies["ask 2"] = "The answer is 5."
    assert main([*ASK, "--json"]) == 0
    assert [c["right"] for c in json.loads(capsys.readouterr().out)["cells"]] == [3, 3, 3]


def test_a_finished_grid_is_only_reported_again_and_a_wider_one_runs_what_is_new(here, engine):
    main([*ASK])
    asked = len(engine.prompts)
    assert main([*ASK]) == 0 and len(engine.prompts) == asked
    wider = [a if a != "256,512" else "256,384,512" for a in ASK]
    assert main(wider) == 0 and len(engine.prompts) == asked + 4


def test_other_settings_are_refused_before_anything_runs(here, engine, capsys):
    main([*ASK, "-n", "2"])
    engine.prompts.clear()
    assert main([*ASK, "--max-tokens", "9"]) == 2
    assert "settings.max_tokens: 4096 there, 9 now" in capsys.readouterr().err
    assert engine.prompts == []
    assert main([*ASK, "--max-tokens", "9", "--overwrite"]) == 0


def test_a_cell_that_another_process_writes_is_refused(here, engine, capsys):
    Path("out").mkdir()
    with Journal.open(Path("out/in.zoomr.512.jsonl")):
        assert main([*ASK]) == 2
    assert "another process is writing" in capsys.readouterr().err and engine.prompts == []


def test_failed_problems_end_in_3_and_can_be_tried_again(here, engine, capsys):
    engine.replies["ask 1"] = EngineError("llama_decode said 1")
    assert main([*ASK]) == 3
    assert "3 problems failed" in capsys.readouterr().err
    engine.replies.clear()
    engine.prompts.clear()
    assert main([*ASK, "--retry-failed"]) == 0
    assert engine.prompts == ["ask 1"] * 3
    assert sorted(ids("in.full.jsonl")) == ["p0", "p1", "p2", "p3"]


def test_overwriting_can_be_interrupted_and_the_command_that_is_said_keeps_no_old_record(here, engine, capsys):
    main([*ASK, "--max-tokens", "9"])
    engine.prompts.clear()

    def interrupt():
        if len(engine.prompts) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            engine.on_token = lambda: None

    engine.on_token = interrupt
    assert main([*ASK, "--overwrite"]) == 130
    command = capsys.readouterr().err.partition("; to go on: zoomr ")[2].strip()
    assert "--overwrite" not in command and all(ids(f"in.{name}.jsonl") == [] for name in ("zoomr.256", "zoomr.512")) and ids("in.full.jsonl") == ["p0"]
    assert main(shlex.split(command)) == 0 and len(engine.prompts) == 2 + 3 + 8


def test_a_cell_in_use_keeps_the_others_from_being_overwritten(here, engine):
    main([*ASK])
    with Journal.open(Path("out/in.zoomr.512.jsonl")):
        assert main([*ASK, "--overwrite"]) == 2
    assert ids("in.full.jsonl") == ids("in.zoomr.512.jsonl") == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_in_130_and_the_next_start_goes_on(here, engine, capsys, number):
    def interrupt():
        if len(engine.prompts) == 6:
            os.kill(os.getpid(), number)
            engine.on_token = lambda: None

    engine.on_token = interrupt
    assert main([*ASK]) == 130
    out, err = capsys.readouterr()
    assert out == "" and "to go on: zoomr eval --suite in.jsonl" in err
    assert ids("in.zoomr.256.jsonl") == ["p0"]
    assert main([*ASK]) == 0
    assert len(engine.prompts) == 6 + 3 + 4


def test_sigkill_loses_at_most_the_problem_in_flight(here, engine):
    script = (
        "import os, sys, signal, zoomr_cli.eval_check, zoomr_cli.solve, zoomr_cli.versions\n"
        "from fake_engine import FakeEngine, opener\n"
        "engine = FakeEngine(on_token=lambda: len(engine.prompts) == 7 and os.kill(os.getpid(), signal.SIGKILL))\n"
        "zoomr_cli.solve.open_engine = opener(engine)\n"
        "zoomr_cli.eval_check.check = lambda *asked: None\n"
        "zoomr_cli.versions.versions = lambda: {'zoomr': 'test'}\n"
        "from zoomr_cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    killed = subprocess.run([sys.executable, "-c", script, *ASK], env={**os.environ, "PYTHONPATH": paths}, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert ids("in.full.jsonl") == ["p0", "p1", "p2", "p3"] and ids("in.zoomr.256.jsonl") == ["p0", "p1"]
    assert main([*ASK]) == 0
    assert engine.prompts == ["ask 2", "ask 3", "ask 0", "ask 1", "ask 2", "ask 3"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite", "none.jsonl"], "error: --suite none.jsonl: No such file or directory"),
        (["--family", "dags"], "error: --family dags: no such family; there are dag, ledger, linsys, series"),
        (["--policy", "full,zomr"], "did you mean zoomr?"),
        (["--policy", ","], "error: --policy ,: give at least one"),
        (["--kv-budget", "256,lots"], "error: --kv-budget lots"),
        (["--kv-budget", "5"], "error: --kv-budget 5: at least"),
        (["--split", "train"], "error: --split train: choose test or dev"),
        (["--thoughts", "99"], "takes 1 to"),
        (["--suite", "in.jsonl", "--thoughts", "3"], "those of in.jsonl are what they are: leave --thoughts out"),
        (["--suite", "in.jsonl", "--split", "dev"], "leave --split out"),
        (["--refresh", "1,x"], "error: --refresh 1,x: give whole numbers"),
        (["--refresh", "0"], "error: --refresh 0: must be at least 1"),
        (["--vote-layers", "2,x"], "error: --vote-layers 2,x"),
        (["-o", "m.gguf"], "error: cannot make the folder m.gguf"),
        (["--question-column", "q"], "error: --question-column is for a file of problems; give one with --suite"),
        (["--grader", "mine"], "error: --grader mine: choose one of auto, built-in, math-verify"),
    ],
)
def test_misuse_is_one_clear_line_and_exit_code_2(here, engine, capsys, arguments, complaint):
    assert main(["eval", "-n", "1", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and complaint in err and len(err.splitlines()) == 1
    assert engine.prompts == []


def test_a_missing_model_ends_in_1(here, capsys):
    assert main([*ASK, "-m", "none.gguf"]) == 1
    assert "error: no model file at none.gguf" in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra_before_anything_runs(here, engine, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*ASK, "--plot", "p.png"]) == 2
    assert "zoomr-local[bench]" in capsys.readouterr().err and engine.prompts == []


def test_a_folder_as_plot_is_refused_before_anything_runs(here, engine, capsys, monkeypatch):
    monkeypatch.setattr("zoomr_local.evaluate_report.require_matplotlib", lambda: None)
    assert main([*ASK, "--plot", "."]) == 2
    assert capsys.readouterr().err == "error: --plot . is a folder; name a PNG file in it\n" and engine.prompts == []


def test_a_plot_that_cannot_be_drawn_costs_no_answer(here, engine, capsys, monkeypatch):
    def full_disk(path, result):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("zoomr_local.evaluate_report.require_matplotlib", lambda: None)
    monkeypatch.setattr("zoomr_local.evaluate_report.plot", full_disk)
    assert main([*ASK, "--plot", "p.png", "--json"]) == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)["cells"]) == 3 and "error: cannot write p.png: No space left on device; the results are kept" in err
    engine.replies.update({f"ask {i}": EngineError("llama_decode said 1") for i in range(4)})
    assert main([*ASK, "--plot", "p.png", "--json", "--overwrite"]) == 3
    out, err = capsys.readouterr()
    assert len(json.loads(out)["cells"]) == 3 and "note: nothing to draw in p.png: no cell has graded a problem" in err


def test_columns_are_named_by_flags_and_stand_in_the_result(here, engine, capsys):
    rows = [{"nr": i, "prompt": "a", "question": f"ask {i}", "right": 4} for i in range(2)]
    Path("amb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ["eval", "--suite", "amb.jsonl", "--policy", "full", "-o", "out", "--json"]
    assert main(ask) == 2 and "say which with --question-column" in capsys.readouterr().err
    assert main([*ask, "--question-column", "question", "--answer-column", "right", "--id-column", "nr"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert engine.prompts == ["ask 0", "ask 1"] and result["cells"][0]["right"] == 2
    assert result["asked"] == {"suite": "amb.jsonl", "n": None, "seed": 0, "max_tokens": None, "question_column": "question", "answer_column": "right", "id_column": "nr"}


def test_the_grader_of_a_file_is_that_of_solve_and_stands_in_the_manifest(here, engine, capsys, monkeypatch):
    class Lenient(Grader):
        name = "math-verify"

        def grade(self, content, expected):
            return Grade("4", True, self.name)

    assert main([*ASK]) == 0 and "grader" not in json.loads(Path("out/in.full.jsonl.manifest.json").read_text())["settings"]
    monkeypatch.setattr("zoomr_local.math_grader.installed", lambda: True)
    monkeypatch.setattr("zoomr_local.math_grader.version", lambda: "9")
    monkeypatch.setattr("zoomr_local.math_grader.MathGrader", lambda say: Lenient())
    engine.replies = {f"ask {i}": "The answer is 5." for i in range(4)}
    capsys.readouterr()
    assert main([*ASK]) == 2 and 'settings.grader: null there, "math-verify 9" now' in capsys.readouterr().err
    assert main([*ASK, "--grader", "built-in"]) == 0
    capsys.readouterr()
    assert main([*ASK, "--overwrite", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [cell["right"] for cell in result["cells"]] == [4, 4, 4] and result["asked"]["grader"] == "math-verify 9"
    assert main(["eval", "--policy", "full", "-n", "1", "--family", "dag", "-o", "bundled", "--json"]) == 0
    assert "grader" not in json.loads(capsys.readouterr().out)["asked"], "bundled answers need no algebra"


def test_what_was_chosen_stands_in_every_cell_that_it_has_a_meaning_for(here, capsys):
    assert main([*ASK, "--refresh", "3", "--kv-page-type", "q8_0", "--sinks", "5", "--window", "32,64", "--max-tokens", "99", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [cell["asked"] for cell in result["cells"]][:3] == [{}, *({"window": w, "refresh": 3, "kv_page_type": "q8_0"} for w in (32, 64))]
    assert [cell["settings_text"] for cell in result["cells"]][:3] == ["", "window=32", "window=64"] and result["asked"]["max_tokens"] == 99
    assert "asked" not in Path("out/results.csv").read_text()


def test_the_page_can_be_made_from_what_the_command_writes(here):
    assert main([*ASK]) == 0
    result = json.loads(Path("out/results.json").read_text())
    page = accuracy.filled((ROOT / "docs" / "accuracy.md").read_text(), [result])
    assert "| in | zoomr | 512 | 4 | 100.0 (51.0, 100.0) | +0.0 (-49.0, +49.0) | 0 |" in page
    assert "| in | zoomr | 256 | 0.500 | - | 4 | 0 |" in page
    assert accuracy.filled(page, [result]) == page


# ---------------------------------------------------------------- the real engine


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["full,zoomr", "--vote-layers", "99"], "--vote-layers 99: zoomr-tiny pages layers 0 to 3"),
        (["full,streaming", "--sinks", "300"], "300 sink tokens and a budget of 256 leave no room to think; lower --sinks"),
        (["full,clusterkv", "--dense-layers", "9"], "a smaller --max-tokens or --dense-layers 0"),
    ],
)  # fmt: skip
def test_what_an_engine_refuses_of_a_later_cell_is_said_before_the_first(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.delenv("ZOOMR_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "--family", "series", "-n", "2", "--thoughts", "3", "--kv-budget", "256", "-o", "out", "--policy", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and complaint in err and err.count("\n") == 1 and not Path("out").exists()


def test_a_small_grid_on_the_real_engine_keeps_every_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ZOOMR_MODEL", raising=False)
    policies = "full,zoomr,sumr,recency,random,streaming"
    ask = ["eval", "--family", "series", "-n", "3", "--thoughts", "4", "--policy", policies, "--kv-budget", "160,256"]
    assert main([*ask, "--max-tokens", "240", "-t", "1", "-o", str(tmp_path / "out"), "--json", "-q"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert len(cells) == 11 and all(c["n"] == 3 and c["failed"] == 0 for c in cells)
    assert all(c["resident_peak"] <= c["kv_budget"] for c in cells if c["kv_budget"])
    assert all(c["from_full"]["n"] == 3 for c in cells if c["policy"] != "full")
    assert all(c["resident_peak"] >= c["sequence_mean"] - 1 for c in cells if c["policy"] == "full")
