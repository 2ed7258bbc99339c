"""What a trace says of per-head caches, held against the engine's own books on scripted text; its size; hostile lines."""

from __future__ import annotations

import json
import random

import pytest
from book_heads import KV_HEADS, LAYERS, engine_of
from scripted import ScriptedSampler
from talk import UNTHINK, words
from test_trace import told
from test_trace_file import WRONG
from traced import GREEDY, follow, pictures, prompt, recorder_of

from zoomr_cli.main import main
from zoomr_local import trace_held
from zoomr_local.events import HeadsEvicted, TokenDecoded
from zoomr_local.trace_file import FORMAT, Recorded
from zoomr_local.trace_held import MOST_HEADS, HeldLines, HeldReader, held_at, last_row
from zoomr_local.trace_view import picture

POLICIES = ("snapkv", "h2o", "rkv", "pyramid", "reasonalloc", "clusterkv")


class HeldBooks:
    """What the cache itself says every head holds, after each token; of a token before which something left nothing is kept."""

    def __init__(self) -> None:
        self.held: dict[int, list] = {}

    def look(self, engine, event) -> None:
        if isinstance(event, HeadsEvicted):
            self.held.pop(event.position, None)
        if isinstance(event, TokenDecoded):
            self.held[event.position] = engine.generation.cache.held.tolist()


def record(path, policy, tokens=30, books=None, recorded=True, **more):
    """One problem, as `traced.record` does it; its events and its picture."""
    ScriptedSampler.script = [*words(500), UNTHINK, *words(20)]
    with engine_of(policy, **more) as engine:
        events = engine.generate(prompt(tokens), GREEDY, 1000)
        if not recorded:
            return list(events), None
        said = []
        recorder = recorder_of(engine, path, said)
        recorder.begin("p")
        events = follow(events, engine, recorder, books)
        recorder.end({"answer": "4"})
        recorder.close()
    assert not said
    return events, pictures(path)[-1]


def selections(events):
    return [event for event in events if isinstance(event, HeadsEvicted)]


@pytest.mark.parametrize("tokens", [30, 300])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_every_head_held_is_recorded_exactly(policy, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(trace_held, "HELD_BYTES_PER_TOKEN", 1 << 20)
    books = HeldBooks()
    seldom = {"refresh": 8} if policy == "clusterkv" else {}  # there are no books of a token that a selection preceded
    events, drawn = record(tmp_path / "t.jsonl", policy, tokens, books, **seldom)
    heads = drawn["heads"]
    assert drawn["skipped_lines"] == 0 and len(heads["layer_cells"]) == LAYERS and heads["kv_heads"] == KV_HEADS
    assert heads["layer_cells"] == list(events[-1].cache.layer_cells) and heads["shared"] == (policy == "reasonalloc")
    assert len(books.held) > 250 or policy == "pyramid"
    for position, held in books.held.items():
        assert [held_at(heads, layer, position) for layer in range(LAYERS)] == held, position
    for event in selections(events):
        for i, layer in enumerate(event.layers):
            assert last_row(heads["held"][layer], event.position) == [event.position, *event.held_tokens[layer]]
            if event.budget_tokens is not None:
                assert last_row(heads["budgets"][layer], event.position)[1:] == list(event.budget_tokens[i])
    assert any(heads["budgets"]) == (policy == "reasonalloc")


@pytest.mark.parametrize("policy", POLICIES)
def test_recording_changes_no_token_and_no_event(policy, tmp_path):
    with_it, _ = record(tmp_path / "t.jsonl", policy)
    without, _ = record(None, policy, recorded=False)
    assert [told(event) for event in with_it] == [told(event) for event in without] and len(selections(without)) > 10


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_small_however_often_something_leaves_and_the_counts_are_whole(policy, tmp_path):
    path = tmp_path / "t.jsonl"
    events, drawn = record(path, policy)
    lines = [row for row in path.read_text().splitlines() if '"held"' in row[:16] or '"heads"' in row[:16]]
    longest = max(map(len, lines))
    assert sum(len(row) + 1 for row in lines) <= trace_held.HELD_BYTES_PER_TOKEN * drawn["tokens"] + 3 * longest
    heads, done = drawn["heads"], selections(events)
    assert heads["selections"] == len(done) and heads["freed_cells"] == sum(sum(event.freed_cells) for event in done)
    for layer in range(LAYERS):
        last = [event for event in done if layer in event.layers][-1]
        assert heads["held"][layer][-1] == [last.position, *last.held_tokens[layer]], "what was left out is caught up with"
    if policy == "pyramid":
        assert len(lines) < len(done) / 2, "a selection before almost every token"


def test_what_came_back_is_counted_and_held():
    from types import SimpleNamespace

    lines = []
    cells = SimpleNamespace(store=SimpleNamespace(n_head_kv=1), layer_tokens=[10, 20], shared=False)
    taken = HeldLines(cells, True, lambda event, **fields: lines.append({"event": event, **fields}) or len(json.dumps(fields)))
    taken.selected(10, (0,), [[4], [10]], 6, None)
    taken.recalled(10, (0, 1), [[6], [9]], 2)
    taken.recalled(11, (0,), [[7], [9]], 1)
    taken.flush()
    taken.flush()
    assert [line["event"] for line in lines] == ["heads", "held", "held"]
    heads = picture(Recorded(1, {}, "p", lines))["heads"]
    assert heads["recalls"] and (heads["selections"], heads["freed_cells"], heads["recalled_cells"]) == (1, 6, 3)
    assert heads["held"] == [[[10, 4], [11, 7]], [[10, 9]]]
    assert held_at(heads, 0, 12) == [8] and held_at(heads, 0, 99) == [10] and held_at(heads, 1, 5) == [5]


def test_rows_show_that_each_head_has_its_own_part(tmp_path):
    _, drawn = record(tmp_path / "t.jsonl", "rkv")
    assert [row["kind"] for row in drawn["rows"]] == ["prompt", "thought", "answer"]
    states = [[state for *_, state in row["states"]] for row in drawn["rows"]]
    assert states == [["written", "cells"], ["written", "loose"], ["written"]], "the prompt is pinned"


# ---------------------------------------------------------------- hostile lines


HEADS = {"event": "heads", "kv_heads": 2, "layer_cells": [8, 9], "shared": False, "recalls": False}
HELD = {"event": "held", "selections": 1, "freed_cells": 3, "rows": [[0, 9, 4, 5], [1, 9, 6, 6]], "budgets": [[0, 9, 5, 5]]}


def drawn_of(*lines):
    return picture(Recorded(1, {}, "p", list(lines)))


@pytest.mark.parametrize(
    "line",
    [
        {**HELD, "rows": [[2, 9, 4, 5]]},  # no such layer
        {**HELD, "rows": [[-1, 9, 4, 5]]},
        {**HELD, "rows": [[0, 9, 4]]},  # a head is missing
        {**HELD, "rows": [[0, 9, 4, 5, 6]]},
        {**HELD, "rows": [[0, 9, 8, 9]]},  # more than the layer's cells
        {**HELD, "rows": [[1, 10, 11, 2]], "budgets": []},  # more than there were tokens
        {**HELD, "rows": [[0, 9, 4, 5], [0, 9, 4, 5]]},  # a layer twice
        {**HELD, "rows": [[0, 9, 4.5, 5]]},
        {**HELD, "rows": [[0, 9, True, 5]]},
        {**HELD, "rows": [[0, 9, 10**30, 5]]},
        {**HELD, "rows": [[]]},
        {**HELD, "rows": {"0": [9, 4, 5]}},
        {**HELD, "budgets": [[0, 9, 9, 9]]},
        {**HELD, "selections": -1},
        {**HELD, "freed_cells": "3"},
        HEADS,  # once a problem
    ],
)  # fmt: skip
def test_a_damaged_line_is_left_out_whole_and_counted(line):
    before = drawn_of(HEADS, HELD)
    assert before["heads"]["selections"] == 1 and before["skipped_lines"] == 0
    assert drawn_of(HEADS, HELD, line) == {**before, "skipped_lines": 1}
    back = {**HELD, "rows": [[0, 8, 4, 4]], "budgets": []}
    assert drawn_of(HEADS, HELD, back)["heads"] == before["heads"], "nothing goes back in time"


@pytest.mark.parametrize(
    "change",
    [{"kv_heads": 0}, {"kv_heads": 1 << 39}, {"layer_cells": []}, {"layer_cells": [8] * (MOST_HEADS // 2 + 1)}, {"layer_cells": 8}, {"layer_cells": [-1]}],
)
def test_an_absurd_number_of_layers_or_heads_is_not_believed(change):
    drawn = drawn_of({**HEADS, **change}, HELD)
    assert drawn["heads"] is None and drawn["skipped_lines"] == 2


def test_what_was_left_out_is_said_and_absurd_sizes_cost_little(tmp_path, capsys):
    rows = [
        {"event": "trace", "format": FORMAT, "model": "m", "policy": "rkv", "budget_tokens": 64}, {"event": "problem", "id": "p"},
        {"event": "heads", "kv_heads": MOST_HEADS, "layer_cells": [1 << 40]}, {**HELD, "rows": [[0, 1 << 40, *([9] * MOST_HEADS)]], "budgets": []},
        {**HELD, "rows": [[0, 1 << 41, 4, 5]]}, {"event": "cells", "points": [[0, 0], [1 << 40, 64]]},
    ]  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["view", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 line of the trace was not understood and left out" in out and "a row is the mean of 256" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 120


def test_every_field_with_every_wrong_value_ends_in_a_picture(tmp_path):
    path, choose = tmp_path / "t.jsonl", random.Random(2)
    record(path, "reasonalloc")
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    kinds = {row["event"]: i for i, row in enumerate(rows) if row["event"] in ("heads", "held")}
    cases = [(i, field, wrong) for i in kinds.values() for field in rows[i] if field != "event" for wrong in WRONG]
    for i, field, wrong in choose.sample(cases, 60):
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:i], {**rows[i], field: wrong}, *rows[i + 1 :]]))
        (drawn,) = pictures(path)
        json.dumps(drawn, allow_nan=False)
        for layer in range(len(drawn["heads"]["layer_cells"]) if drawn["heads"] else 0):
            assert all(n >= 0 for n in held_at(drawn["heads"], layer, drawn["tokens"]))


def test_a_reader_begins_with_nothing():
    assert HeldReader().found is None and last_row([], 5) is None
