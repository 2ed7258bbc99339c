"""Several replies to one problem: votes, tries after a failure, time limits, and what of it outlives a kill."""

from __future__ import annotations

import json

import pytest
from fake_engine import FakeEngine, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from zoomr_local.attempts import AttemptLog
from zoomr_local.errors import EngineError, UsageError
from zoomr_local.grading import Grader, grade
from zoomr_local.problems import Problem
from zoomr_local.sampling import SamplingParams
from zoomr_local.solve import Solver, Tally, solve_all
from zoomr_local.votes import decide, elected, weights_of


class Heard:
    def __init__(self):
        self.names = []

    def started(self, problem):
        self.names.append(problem.id)

    def event(self, event):
        pass

    def finished(self, record):
        pass


PROBLEM = Problem("a", ({"role": "user", "content": "p"},), "4", 1)


def solver(replies, temperature=1.0, tokens=8, on_token=lambda: None, max_tokens=100, **more) -> Solver:
    engine = FakeEngine({"p": replies}, tokens=tokens, on_token=on_token)
    return Solver(FakeModel(), engine, SamplingParams(temperature, seed=7), max_tokens, key=lambda p: f"key {p.id}", **more)


def solve(*arguments, **more) -> dict:
    return solver(*arguments, **more).solve(PROBLEM, Heard())


def says(*answers) -> list[str]:
    return [f"The answer is {a}." if a else "" for a in answers]


# ---------------------------------------------------------------- the vote


def test_the_majority_wins_by_what_answers_mean_and_the_record_lists_every_vote():
    record = solve(says("5", "4.0", "4"), votes=3)
    assert (record["answer"], record["correct"], record["content"]) == ("4.0", True, "The answer is 4.0.")
    assert record["vote"] == {"by": "majority", "asked": 3, "share": 0.666667, "groups": 2}
    assert [(v["answer"], v["group"], v["seed"], v["correct"]) for v in record["votes"]] == [("5", 0, 7, False), ("4.0", 1, 8, True), ("4", 1, 9, True)]
    assert record["usage"]["completion_tokens"] == 24 and record["timing"]["decode_s"] == 1.5 and record["kv"]["page_ins"] == 3
    assert (record["kv"]["resident_peak"], record["kv"]["policy"], record["seed"]) == (108, "zoomr", 7)
    Tally().add(record)
    json.dumps(record)


@pytest.mark.parametrize("cells", [(3, 4), [3, 4], None])
def test_what_is_no_number_in_kv_is_the_first_replys(cells):
    results = [{**r, "kv": {**r["kv"], "layer_cells": cells}} for r in (result("4"), result("4"))]
    assert elected(results, "majority", 2, Grader().same)["kv"]["layer_cells"] == cells


def test_a_tie_goes_to_the_earliest():
    assert solve(says("5", "4", "4", "5"), votes=4)["answer"] == "5"


def test_no_answer_is_no_vote_and_a_reply_cut_off_votes_only_if_all_are():
    assert solve(says("", "", "4"), votes=3)["answer"] == "4"
    record = solve(says("", ""), votes=2)
    assert (record["answer"], record["vote"]["share"], record["correct"]) == ("", None, False)
    results = [result("9", "length"), result("9", "length"), result("4")]
    assert elected(results, "majority", 3, Grader().same)["answer"] == "4"
    assert elected(results[:2], "majority", 2, Grader().same)["answer"] == "9"


def test_a_failed_vote_is_listed_and_the_others_decide():
    record = solve([EngineError("once"), *says("4", "4")], votes=3)
    assert "error" not in record and record["answer"] == "4"
    assert record["votes"][0]["error"] == {"type": "EngineError", "message": "once"}
    record = solve([EngineError("always")], votes=2)
    assert record["error"]["message"] == "always" and record["finish_reason"] == "error" and len(record["votes"]) == 2


def result(answer, finish="stop", agreement=None) -> dict:
    record = solve(says(answer or "x"))
    return {**record, "answer": answer, "finish_reason": finish, "kv": {**record["kv"], "agreement": agreement}}


def test_by_agreement_a_sure_reply_outweighs_two_that_wavered():
    results = [result("5", agreement=0.2), result("5", agreement=0.3), result("4", agreement=0.6)]
    assert elected(results, "majority", 3, Grader().same)["answer"] == "5"
    record = elected(results, "agreement", 3, Grader().same)
    assert record["answer"] == "4" and [v["weight"] for v in record["votes"]] == [0.2, 0.3, 0.6]
    assert weights_of([*results, result("1")], "agreement")[3] == pytest.approx(1.1 / 3)
    assert weights_of([result("1")], "agreement") == [1.0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "4", "4.0", "5", "x", "X"]), st.floats(0, 1)), max_size=8))
def test_deciding_agrees_with_counting_by_hand(votes):
    answers, weights = [a for a, _ in votes], [w for _, w in votes]
    same = {"4": "4", "4.0": "4", "5": "5", "x": "x", "X": "x"}
    winner, groups = decide(answers, weights, Grader().same)
    totals: dict[str, float] = {}
    for answer, weight in votes:
        if answer:
            totals[same[answer]] = totals.get(same[answer], 0) + weight
    if winner is None:
        assert not totals
        return
    assert totals[same[answers[winner]]] == pytest.approx(max(totals.values()))
    assert winner == [same.get(a) for a in answers].index(same[answers[winner]])
    assert [g is None for g in groups] == [not a for a in answers]


def test_greedy_votes_are_an_error_of_the_problem():
    record = solve(says("4"), temperature=0.0, votes=2)
    assert record["error"]["type"] == "UsageError" and "temperature above 0" in record["error"]["message"]


# ---------------------------------------------------------------- tries


def test_a_failure_is_tried_again_with_another_seed_and_recorded():
    record = solve([EngineError("once"), *says("4")], retries=2)
    assert (record["answer"], record["seed"], "error" in record) == ("4", 8, False)
    assert record["tries"] == [{"seed": 7, "finish_reason": "error", "error": {"type": "EngineError", "message": "once"}}, {"seed": 8, "finish_reason": "stop"}]


def test_a_reply_without_an_answer_is_tried_again_unless_it_is_greedy():
    assert len(solve(says("", "", "4"), retries=5)["tries"]) == 3
    assert len(solve([""], retries=2)["tries"]) == 3
    assert "tries" not in solve(says("", "4"), temperature=0.0, retries=2)
    assert len(solve([EngineError("x"), *says("4")], temperature=0.0, retries=2)["tries"]) == 2


def test_an_error_that_would_come_again_is_not_tried_again():
    record = solve([UsageError("the template refused")], retries=3)
    assert record["error"]["type"] == "UsageError" and "tries" not in record


def test_seeds_of_votes_and_tries_never_meet():
    asked = solver(["", *says("1", "2", "3"), ""], votes=3, retries=2)
    asked.solve(PROBLEM, Heard())
    seeds = [s.seed for s in asked.engine.samplings]
    assert len(seeds) == len(set(seeds)) and seeds[:2] == [7, 10]


def test_each_reply_is_announced_under_a_name_of_its_own():
    heard = Heard()
    solver(["", *says("4", "4")], votes=2, retries=1).solve(PROBLEM, heard)
    assert heard.names == ["a, vote 1, try 2", "a, vote 2"]


def test_a_request_that_is_refused_is_a_record_and_nothing_is_decoded():
    asked = solver(says("4"))
    record = asked.solve(Problem("a", (), None, 1, refused="body.tools is not supported"), Heard())
    assert record["error"] == {"type": "UnsupportedRequest", "message": "body.tools is not supported"} and asked.engine.prompts == []


def test_a_problems_own_options_take_the_place_of_the_runs():
    asked = solver(says("4"))
    own = {"temperature": 0.0, "top_p": 0.5, "seed": 3, "stop": ["x"], "max_tokens": 4}
    record = asked.solve(Problem("a", PROBLEM.messages, None, 1, own, notes=("body.user is passed over",)), Heard())
    (used,) = asked.engine.samplings
    assert (used.temperature, used.top_p, used.seed, used.stop, used.top_k) == (0.0, 0.5, 3, ("x",), 40)
    assert record["finish_reason"] == "length" and record["seed"] == 3 and record["warnings"] == ["body.user is passed over"]


# ---------------------------------------------------------------- schema


SCHEMA = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('\n{"answer": 4}', ("4", True, True)), ('{"answer": 5}', ("5", True, False)), ('{"answer"', ("", False, False)),
        ('{"other": [4, 5]}', ('{"other": [4, 5]}', True, False)), ("4", ("4", True, True)),
    ],
)  # fmt: skip
def test_of_a_reply_held_to_a_schema_the_answer_is_read_and_not_searched(reply, expected):
    record = solver([reply]).solve(Problem("a", PROBLEM.messages, "4", 1, {"schema": SCHEMA}), Heard())
    assert (record["answer"], record["valid"], record["correct"]) == expected


def test_the_grammar_reaches_the_engine_and_a_cut_off_reply_is_not_valid():
    asked = solver(says("4"), tokens=50, max_tokens=10)
    record = asked.solve(Problem("a", PROBLEM.messages, None, 1, {"schema": SCHEMA}), Heard())
    assert (record["finish_reason"], record["valid"]) == ("length", False)
    assert asked.engine.samplings[0].grammar.startswith("digits") or "root ::=" in asked.engine.samplings[0].grammar


# ---------------------------------------------------------------- time


def clock(monkeypatch, per_token: float):
    now = [100.0]
    monkeypatch.setattr("zoomr_local.solve.time.monotonic", lambda: now[0])

    def tick():
        now[0] += per_token

    return tick


def test_a_problem_out_of_time_keeps_what_was_written_and_the_next_one_goes_on(monkeypatch):
    engine_tick = clock(monkeypatch, 1.0)
    asked = solver("The answer is 4.", on_token=engine_tick, timeout_s=5)
    written = []
    slow, fast = PROBLEM, Problem("b", ({"role": "user", "content": "q"},), "4", 2)
    assert solve_all([slow, fast], asked, written.append, Heard())
    assert [(r["finish_reason"], r["content"]) for r in written] == [("timeout", "The a")] * 2
    tally = Tally()
    for record in written:
        tally.add(record)
    assert (tally.failed, tally.timeouts, tally.graded) == (2, 2, 2)


def test_enough_time_changes_nothing(monkeypatch):
    tick = clock(monkeypatch, 1.0)
    plain = solve(says("4"))
    assert solve(says("4"), on_token=tick, timeout_s=100) == plain


def test_all_votes_share_the_time_of_their_problem(monkeypatch):
    tick = clock(monkeypatch, 1.0)
    record = solve(says("4"), on_token=tick, timeout_s=12, votes=5)
    assert (record["finish_reason"], record["answer"]) == ("timeout", "4")
    assert [v["finish_reason"] for v in record["votes"]] == ["stop", "timeout"] and record["vote"]["asked"] == 5


@pytest.mark.parametrize(("seconds", "finishes"), [(12, ["stop", "timeout"]), (20, ["stop", "stop"])])
def test_the_last_vote_out_of_time_is_a_problem_out_of_time(monkeypatch, seconds, finishes):
    tick = clock(monkeypatch, 1.0)
    record = solve(says("4"), on_token=tick, timeout_s=seconds, votes=2)
    assert [v["finish_reason"] for v in record["votes"]] == finishes
    assert (record["finish_reason"], record["answer"]) == (finishes[-1], "4")
    tally = Tally()
    tally.add(record)
    assert (tally.failed, tally.timeouts) == ((1, 1) if "timeout" in finishes else (0, 0))


def test_no_answer_and_no_time_for_another_try_is_out_of_time(monkeypatch):
    tick = clock(monkeypatch, 1.0)
    assert solve([""], on_token=tick, timeout_s=9, retries=1)["finish_reason"] == "timeout"
    assert solve(["", "The answer is 4."], on_token=tick, timeout_s=100, retries=1)["finish_reason"] == "stop"
    assert solve([""], on_token=tick, timeout_s=9)["finish_reason"] == "stop", "no try was to follow"


# ---------------------------------------------------------------- killed in the middle


def test_votes_of_an_unfinished_problem_are_taken_up_and_forgotten_after_it(tmp_path):
    decoded = []
    path = tmp_path / "out.jsonl"
    first = solver(says("4", "5", "4"), on_token=lambda: decoded.append(1), votes=3, attempts=AttemptLog.beside(path),
                   stopping=lambda: len(decoded) > 20)  # fmt: skip
    assert not solve_all([PROBLEM], first, lambda record: pytest.fail("no record yet"), Heard())
    lines = (tmp_path / "out.jsonl.attempts").read_text().splitlines()
    assert [json.loads(line)["vote"] for line in lines] == [0, 1]
    (tmp_path / "out.jsonl.attempts").write_text("\n".join(lines) + '\n{"key": "key a", "vo')
    second = solver(says("4"), votes=3, attempts=AttemptLog.beside(path))
    written = []
    assert solve_all([PROBLEM], second, written.append, Heard())
    assert [s.seed for s in second.engine.samplings] == [9]
    whole = solve(says("4", "5", "4"), votes=3)
    assert written == [whole] and not (tmp_path / "out.jsonl.attempts").exists()


def test_a_log_keeps_what_it_is_told_and_survives_any_torn_line(tmp_path):
    log = AttemptLog(tmp_path / "log")
    log.add("k", 0, 0, {"seconds": 1, "answer": "4"})
    log.add("l", 1, 0, {"seconds": 2, "answer": "5"})
    data = (tmp_path / "log").read_bytes()
    for cut in range(len(data)):
        (tmp_path / "log").write_bytes(data[:cut])
        log = AttemptLog(tmp_path / "log")
        log.add("m", 0, 0, {"seconds": 3})
        again = AttemptLog(tmp_path / "log")
        assert again.get("m", 0, 0) == {"seconds": 3.0}
        assert (again.get("k", 0, 0) is None) == (cut < data.index(b"\n"))
    assert AttemptLog(tmp_path / "log").keep({"k"}) == 1
    assert AttemptLog(tmp_path / "log").get("m", 0, 0) is None
    AttemptLog(tmp_path / "log").forget("k")
    assert not (tmp_path / "log").exists()


# ---------------------------------------------------------------- references


@pytest.mark.parametrize("reference", ["4", "So 2 + 2 = 5 - 1.\n#### 4", r"Adding gives $\boxed{4}$."])
def test_a_worked_solution_states_its_answer(reference):
    assert grade("It is 4.", reference).correct and not grade("It is 5.", reference).correct
    assert Grader().compare("4.0", reference).correct


def test_a_full_disk_ends_the_run_with_the_file_named(tmp_path, monkeypatch):
    def no_space(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoomr_local.attempts.os.fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device: .*out\.jsonl\.attempts"):
        solver(says("4"), votes=2, attempts=AttemptLog.beside(tmp_path / "out.jsonl")).solve(PROBLEM, Heard())


def test_without_a_file_nothing_is_kept():
    asked = solver(says("4", "5"), retries=1)
    assert [asked.solve(PROBLEM, Heard())["answer"] for _ in range(2)] == ["4", "5"]


class SavedSession:
    """What an engine loads from a checkpoint: made with seed 7, after half a minute."""

    note = {"resumed": 0, "warnings": ["w"], "seconds": 30.0}
    state = {"sampling": {"seed": 7}}
    completion_tokens = 5

    def load(self, path):
        return self

    def resume(self):
        return "resumed"


@pytest.mark.parametrize(("seed", "outcome"), [(7, "resumed"), (None, "resumed"), (8, "begun")])
def test_a_checkpoint_of_an_earlier_reply_is_not_gone_on_with(tmp_path, monkeypatch, seed, outcome):
    from zoomr_local.checkpoint import Checkpoint

    removed = []
    monkeypatch.setattr(Checkpoint, "remove", lambda self: removed.append(1))
    checkpoint = Checkpoint(tmp_path, {}, 30, say=pytest.fail, tell=lambda text: None)
    assert checkpoint.events(SavedSession(), lambda: "begun", "a", seed) == outcome
    assert (checkpoint.seconds, checkpoint.resumed, len(removed)) == ((30.0, 1, 0) if outcome == "resumed" else (0.0, 0, 1))
