"""The rules of a file of problems: what is a problem, what is a record, what counts."""

from __future__ import annotations

import json

import pytest
from fake_engine import FakeEngine, FakeModel

from zoomr_local.errors import EngineError, UsageError
from zoomr_local.sampling import SamplingParams
from zoomr_local.solve import Problem, Solver, Tally, read_problems, solve_all


class Silent:
    def started(self, problem):
        pass

    def event(self, event):
        pass

    def finished(self, record):
        pass


def lines(*texts) -> list[bytes]:
    return [t if isinstance(t, bytes) else (t if isinstance(t, str) else json.dumps(t)).encode() for t in texts]


def read(*texts) -> list[Problem]:
    return read_problems(lines(*texts), "in.jsonl")


def solver(engine=None, **more) -> Solver:
    return Solver(FakeModel(), engine or FakeEngine(), SamplingParams(seed=3), 100, **more)


# ---------------------------------------------------------------- input


def test_prompts_and_messages_are_problems_and_other_keys_are_left_alone():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "x"}]
    problems = read({"id": "a", "prompt": "p", "answer": 5, "level": 3}, "", {"id": 2, "messages": chat})
    assert problems == [
        Problem("a", ({"role": "user", "content": "p"},), "5", 1),
        Problem(2, ({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), None, 3),
    ]


def test_a_byte_order_mark_is_no_error():
    assert read(b'\xef\xbb\xbf{"id": "a", "prompt": "p"}')[0].id == "a"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{oops", "line 1: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", "line 1: a JSON object is needed, not list"),
        ("[" * 100_000, "line 1: not JSON (nested too deeply)"),
        ({"id": None, "prompt": "p"}, 'line 1: needs an "id"'),
        ({"id": True, "prompt": "p"}, 'line 1: needs an "id"'),
        ({"id": "a"}, 'line 1: needs "prompt", "question", "problem" or "messages", has none of them'),
        ({"id": "a", "prompt": "p", "messages": []}, 'has "messages" and "prompt"; say which with --question-column'),
        ({"id": "a", "prompt": " "}, '"prompt" must be text that is not empty'),
        ({"id": "a", "messages": []}, '"messages" must be a list that is not empty'),
        ({"id": "a", "messages": [{"role": "user"}]}, 'every message needs a "role" and a "content"'),
        ({"id": "a", "prompt": "p", "answer": [1]}, '"answer" must be text or a number'),
        (b'{"id": "\xff"}', "line 1: not UTF-8 (byte 9)"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_its_fault(line, complaint):
    with pytest.raises(UsageError) as caught:
        read(line)
    assert complaint in str(caught.value)
    assert "nothing was run" in str(caught.value)


def test_all_bad_lines_are_reported_at_once_up_to_ten():
    with pytest.raises(UsageError) as caught:
        read({"id": "a", "prompt": "p"}, *["{"] * 25)
    text = str(caught.value)
    assert "25 bad lines" in text and "line 2:" in text and "line 11:" in text
    assert "line 12:" not in text and text.endswith("and 15 more")


def test_an_id_may_stand_once_also_when_one_is_a_number():
    with pytest.raises(UsageError, match=r'line 3: id "1" stands in line 1 already'):
        read({"id": 1, "prompt": "p"}, {"id": "b", "prompt": "p"}, {"id": "1", "prompt": "q"})


def test_an_empty_input_is_an_error_that_shows_a_line():
    with pytest.raises(UsageError, match='"prompt": "What is 2'):
        read("", "  ")


# ---------------------------------------------------------------- records


def test_a_record_has_everything_that_was_promised():
    engine = FakeEngine(tokens=8)
    (problem,) = read({"id": "a", "prompt": "2 + 2?", "answer": "4"})
    record = solver(engine, key=lambda p: f"key of {p.id}").solve(problem, Silent())
    assert record == {
        "id": "a",
        "answer": "4",
        "content": "The answer is 4.",
        "reasoning": "thinking",
        "finish_reason": "stop",
        "correct": True,
        "grader": "built-in",
        "usage": {"prompt_tokens": 6, "completion_tokens": 8, "reasoning_tokens": 8},
        "timing": {"prefill_s": 0.25, "decode_s": 0.5, "tokens_per_s": 16.0},
        "kv": {
            "policy": "zoomr", "budget": 500, "allocated": 512, "token_bytes": 16, "resident_peak": 108, "resident_mean": 100.0,
            "blocks": 1, "paged_out_bytes": 64, "page_outs": 1, "page_ins": 1, "refreshes": 1, "agreement": 0.5,
            "dropped_tokens": 0, "splits": 0, "ram_bytes": 64, "disk_bytes": 0, "disk_written_bytes": 0,
            "disk_read_bytes": 0, "lost_blocks": 0, "faults": 0, "beacons": 0, "dropped_beacons": 0, "summaries": None,
            "injected_tokens": 0, "prompted_summaries": 0, "cut_summaries": 0, "layer_cells": None,
            "cluster_hit_rate": None, "recalled_tokens": 0,
        },
        "seed": 3,
        "model": "fake",
        "key": "key of a",
    }  # fmt: skip


def test_without_a_reference_there_is_no_verdict():
    (problem,) = read({"id": "a", "prompt": "2 + 2?"})
    assert "correct" not in solver().solve(problem, Silent())


def test_a_reply_that_ran_out_of_tokens_is_wrong_and_says_why():
    (problem,) = read({"id": "a", "prompt": "p", "answer": "4"})
    record = Solver(FakeModel(), FakeEngine(tokens=50), SamplingParams(), 10).solve(problem, Silent())
    assert (record["finish_reason"], record["correct"], record["answer"]) == ("length", False, "")


def test_a_failing_problem_becomes_a_record_and_the_next_one_is_solved():
    engine = FakeEngine({"bad": EngineError("llama_decode said 1")})
    written = []
    whole = solve_all(
        read({"id": "a", "prompt": "bad", "answer": "4"}, {"id": "b", "prompt": "good"}), solver(engine), written.append, Silent()
    )
    assert whole
    assert written[0]["error"] == {"type": "EngineError", "message": "llama_decode said 1"}
    assert "correct" not in written[0] and written[0]["finish_reason"] == "error"
    assert "error" not in written[1]


def test_with_debug_a_failing_problem_raises():
    engine = FakeEngine({"bad": ValueError("bug")})
    with pytest.raises(ValueError, match="bug"):
        solver(engine, debug=True).solve(read({"id": "a", "prompt": "bad"})[0], Silent())


def test_a_disk_that_is_full_ends_the_run():
    def write(record):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        solve_all(read({"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p"}), solver(), write, Silent())


def test_stopping_in_the_middle_of_a_problem_leaves_no_record_of_it():
    decoded = []
    engine = FakeEngine(on_token=lambda: decoded.append(1))
    written = []
    problems = read(*({"id": i, "prompt": "p"} for i in range(5)))
    whole = solve_all(problems, solver(engine, stopping=lambda: len(decoded) > 20), written.append, Silent())
    assert not whole
    assert [r["id"] for r in written] == [0, 1]
    assert len(engine.prompts) == 3


def test_stopping_while_a_prompt_is_prefilled_does_not_wait_for_the_reply():
    engine = FakeEngine()
    stopped = solver(engine, stopping=lambda: bool(engine.prompts)).solve(read({"id": "a", "prompt": "p"})[0], Silent())
    assert stopped is None and engine.decoded == 0


# ---------------------------------------------------------------- tally


def test_the_tally_counts_right_wrong_failed_and_cut_off():
    engine = FakeEngine({"wrong": "The answer is 5.", "bad": EngineError("x")})
    tally = Tally()
    texts = ["right", "wrong", "bad"]
    for problem in read(*({"id": t, "prompt": t, "answer": "4"} for t in texts), {"id": "n", "prompt": "ungraded"}):
        tally.add(solver(engine).solve(problem, Silent()))
    summary = tally.summary()
    assert summary["accuracy"] == {"right": 1, "graded": 2, "share": 0.5, "wilson95": [0.094529, 0.905471]}
    assert (summary["done"], summary["failed"], summary["page_ins"]) == (4, 1, 3)
    assert (summary["resident_peak"], summary["resident_peak_bytes"]) == (108, 108 * 16)
    assert summary["tokens_per_s"] == 16.0


def test_an_empty_tally_divides_by_nothing():
    assert Tally().summary()["accuracy"] is None
    assert Tally().summary()["tokens_per_s"] is None


def test_a_reply_that_cannot_be_graded_is_a_failed_record_and_the_run_goes_on(monkeypatch):
    broken = solver()
    monkeypatch.setattr(type(broken), "_result", lambda *found: 1 / 0)
    record = broken.solve(Problem("a", ({"role": "user", "content": "ask"},), "4", 1), Silent())
    assert record["id"] == "a" and record["error"]["type"] == "ZeroDivisionError"
