"""Traces that would make a reader slow: work is counted, not timed."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from zoomr_local import trace_file
from zoomr_local.trace_file import Recorded, read_trace
from zoomr_local.trace_view import _Covered, picture


class Position(int):
    """A position that counts how often it is compared."""

    compared = 0

    def __le__(self, other):
        Position.compared += 1
        return int(self) <= int(other)

    def __lt__(self, other):
        Position.compared += 1
        return int(self) < int(other)


SPANS = st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(SPANS, max_size=6), SPANS)
def test_a_range_is_held_by_one_of_several_as_looking_at_all_says(ranges, asked):
    assert _Covered(ranges).holds(*asked) == any(a <= asked[0] and asked[1] <= b for a, b in ranges)


def compared(n: int) -> int:
    """Comparisons for ``n`` blocks with as many texts, none of them in a block."""
    block = {"event": "BlockClosed", "kind": "thought", "summary": None, "text": "t", "summary_text": ""}
    lines = [{**block, "block": i, "detail": [10 * i, 10 * i + 5]} for i in range(n)]
    lines += [{"event": "text", "role": "thought", "range": [Position(10 * i + 4), Position(10 * i + 9)], "text": "x"} for i in range(n)]
    Position.compared = 0
    assert len(picture(Recorded(1, {}, "a", lines))["rows"]) == 2 * n
    return Position.compared


def test_texts_are_not_compared_with_every_block():
    assert compared(400) < 3 * compared(200) < 400 * 200


def test_a_block_that_leaves_again_and_again_is_dropped_once():
    lines = [{"event": "BlockClosed", "block": 0, "kind": "thought", "detail": [0, 5], "summary": None, "text": "t", "summary_text": ""}]
    lines += [{"event": "Dropped", "tokens": 5, "position": position, "forgotten": [0, 0]} for position in (6, 8)]
    drawn = picture(Recorded(1, {}, "a", lines))
    assert drawn["rows"][0]["states"] == [[0, 5, "written"], [5, 6, "cells"], [6, 8, "dropped"]]


def test_the_settings_of_a_run_are_checked_once_for_all_its_problems_and_bounded(tmp_path, monkeypatch):
    path, checked, dumps = tmp_path / "t", [], json.dumps
    monkeypatch.setattr(trace_file.json, "dumps", lambda *a, **more: checked.append(a) or dumps(*a, **more))
    for settings, kept in (({"kv_budget": 5}, {"kv_budget": 5}), ({"a": "x" * trace_file._MOST_SETTINGS_CHARACTERS}, {}), ([1], {}), ({"a": 1e999}, {})):
        rows = [{"event": trace_file.HEADER, "format": trace_file.FORMAT, "settings": settings}, *({"event": "problem", "id": i} for i in range(50))]
        path.write_text("".join(dumps(row) + "\n" for row in rows))
        checked.clear()
        problems = read_trace(path).problems
        assert [picture(one)["settings"] for one in problems] == [kept] * 50 and len(checked) <= 1
