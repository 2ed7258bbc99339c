"""What a chat shows of its cache and keeps in it: /kv, /notes, /zoom, /pin, /unpin, on scripted text."""

from __future__ import annotations

import re

import pytest
from chats import ANSWER, Chat
from talk import CLOSE, OPEN, UNTHINK, talking, words

from zoomr_local.cache_view import cache_state

def test_kv_draws_every_block_and_the_budget(chat):
    assert "nothing is in the cache yet" in chat.type("/kv")
    chat.type("hello " * 60, *["more " * 30] * 4)
    text = chat.type("/kv all")
    state = cache_state(chat.loop.engine)
    rows = [line for line in text.splitlines() if line[:6].strip().isdigit()]
    assert len(rows) == len(chat.loop.engine.generation.timeline.blocks)
    assert f"{state.resident_tokens} of 192 cells in use" in text
    bar = next(line for line in text.splitlines() if line.startswith("["))
    free = bar.count(".") / (len(bar) - 2)
    assert abs(free - (1 - state.resident_tokens / 192)) < 0.03 and "P" in bar and "#" in bar
    assert any(" ram" in row for row in rows) and any(" dropped" in row for row in rows) and any(" cells" in row for row in rows)


@pytest.mark.parametrize("columns", [40, 80])
def test_rows_fit_a_narrow_terminal_also_where_characters_are_two_columns_wide(columns, chat, monkeypatch):
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(type(chat.loop.engine.model), "piece", lambda model, token, special=False: "語".encode())
    text = chat.type(*["hello " * 30] * 4, "/kv all")
    rows = [line for line in text.splitlines() if line[:6].strip().isdigit()]
    assert len(rows) > 8 and all(cell_len(row) <= columns for row in rows), rows
    assert sum(columns - 3 < cell_len(row) for row in rows if row.endswith("語..")) >= (3 if columns == 40 else 1)
    assert ("dropped  thought" in text) == (columns == 40), "no columns are kept free where there are few"


def test_kv_marks_what_the_heads_voted_in(tmp_path):
    with talking(budget=192, zoomed_blocks=1, votes_per_head=1, window=0) as engine:
        chat = Chat(engine, tmp_path)
        chat.loop.talk.keep_thinking = True
        chat.type("hello")
        engine.context.wanted = engine.generation.timeline.blocks[0].summary[0] + 2
        chat.type("more " * 40, reply=[*words(60), OPEN, *words(5), CLOSE, UNTHINK, *words(60)])
        assert engine.generation.zoomed == (0,) and [r.number for r in cache_state(engine).rows if r.zoomed] == [0]
        text = chat.type("/kv")
        (row,) = [line for line in text.splitlines() if "^cells" in line]
        bar = next(line for line in text.splitlines() if line.startswith("["))
        assert row.split()[0] == "0" and "^" in bar


@pytest.mark.parametrize("policy", ["zoomr", "sumr", "recency"])
def test_the_rows_of_the_cache_are_the_cache(policy, tmp_path):
    with talking(policy, 192) as engine:
        chat = Chat(engine, tmp_path)
        for _ in range(5):
            chat.type("hello " * 60)
            state = cache_state(engine)
            assert sum(row.resident_tokens for row in state.rows) == state.resident_tokens == len(engine.context.cells)
            assert sum(row.tokens + row.summary_tokens for row in state.rows) == state.sequence_tokens == len(engine.sequence)
            stored = engine.generation.cache.store
            assert state.ram_bytes == sum(stored.info(key).stored_bytes for key in stored.keys())
            for row in state.rows:
                if row.number is not None and row.where == "cells":
                    assert set(range(row.start, row.start + row.tokens)) <= engine.context.cells


def test_notes_and_zoom_show_the_models_words(chat):
    assert "there are no summaries yet" in chat.type("/notes") and "no blocks" in chat.type("/zoom 0")
    chat.type("hello")
    assert "0     30 tokens  w12 w13 w14 w15 w16" in chat.type("/notes")
    text = chat.type("/zoom 0")
    assert "w41" in text and "summary: w12 w13 w14 w15 w16" in text
    assert "block 0 (37 tokens) is in the cache; it stays for the next reply" in text
    assert "a block's number, 0 to" in chat.type("/zoom 99")
    chat.type("again", "again")
    assert "30 tokens (dropped)  w12" in chat.type("/notes")
    text = chat.type("/zoom 0")
    assert "w41" in text and "not brought in: block 0 is gone for good: it was old thinking" in text


@pytest.mark.parametrize("mode, told", [("extractive", "the mean keys of its sentences"), ("off", "the mean keys of 32 tokens each")])
def test_where_no_summaries_are_written_notes_says_what_stands_for_a_block(mode, told, tmp_path):
    with talking(budget=192, summaries=mode) as engine:
        text = Chat(engine, tmp_path).type("hello", "/notes")
        assert f"there are no summaries: --summaries is {mode} here, and a block is found by {told}; /kv lists" in text
    with talking("recency", 192) as engine:
        assert "there are no summaries: policy recency makes no blocks" in Chat(engine, tmp_path).type("hello", "/notes")


def first(chat, where):
    """The first block in ``where``."""
    return next(r for r in cache_state(chat.loop.engine).rows if r.number is not None and r.where == where)


def test_a_block_is_zoomed_by_hand_and_what_left_for_it_is_said(chat):
    chat.type(*["hello " * 30] * 6)
    row = first(chat, "ram")
    text = chat.type(f"/zoom {row.number}")
    assert f"block {row.number} ({row.tokens + row.summary_tokens} tokens) was brought in; it stays for the next reply; for it " in text
    left = int(re.search(r"for it ([\d,]+) tokens left the cache", text).group(1))
    assert left >= row.tokens + row.summary_tokens - 8 - chat.loop.engine.generation.cache.free_tokens
    gone = [int(n) for n in re.search(r"of blocks ([\d, ]+)", text).group(1).split(",") if n.strip()]
    assert gone and all(r.where == "ram" or r.summary_where == "ram" for r in cache_state(chat.loop.engine).rows if r.number in gone)
    (line,) = [line for line in chat.type("/kv all").splitlines() if line[:6].strip() == str(row.number)]
    assert "^cells" in line


def test_a_pinned_block_is_marked_listed_and_let_go(chat):
    assert "no block is pinned" in chat.type("/pin") and "no blocks" in chat.type("/pin 0", "/unpin 0")
    chat.type(*["hello " * 30] * 6)
    n = first(chat, "ram").number
    assert f"it stays until /unpin {n}" in chat.type(f"/pin {n}") and f"pinned: {n}\n" in chat.type("/pin")
    assert f"block {n} (" in (again := chat.type(f"/pin {n}")) and "is in the cache; it stays" in again
    for _ in range(2):
        chat.type("more " * 30)
        text = chat.type("/kv all")
        assert [line.split()[0] for line in text.splitlines() if "Pcells" in line] == [str(n)]
    bar = next(line for line in text.splitlines() if line.startswith("["))
    pinned = sum(r.resident_tokens for r in cache_state(chat.loop.engine).rows if r.kind == "pinned" or r.pinned)
    assert abs(bar.count("P") - (len(bar) - 2) * pinned / 192) <= 1
    assert "no more" in chat.type(f"/unpin {n}") and f"block {n} is not pinned" in chat.type(f"/unpin {n}")
    assert "no block is pinned" in chat.type("/pin") and "Pcells" not in chat.type("/kv all")


def test_too_much_is_refused_with_numbers_and_the_chat_goes_on(chat):
    chat.type(*["hello " * 30] * 6)
    text = ""
    for row in cache_state(chat.loop.engine).rows:
        if row.number is not None and row.where == "ram":
            text += chat.type(f"/pin {row.number}")
    assert re.search(r"error: block \d+ takes \d+ tokens and the blocks held already \d+: of the 192 cells at most \d+ can be held", text)
    assert "unpin a block or raise --kv-budget" in text and ANSWER in chat.type("hello")


def test_a_pin_is_saved_at_once(chat, monkeypatch):
    chat.type(*["hello " * 30] * 6)
    chat.loop.name, saved = "last", []
    monkeypatch.setattr(chat.loop.talk, "save", lambda place, note: saved.append(chat.loop.talk.pinned))
    n = first(chat, "ram").number
    chat.type(f"/pin {n}", f"/unpin {n}")
    assert saved == [(n,), ()]


def test_pins_that_are_gone_are_said(chat):
    chat.type(*["hello " * 30] * 6)
    n = first(chat, "ram").number
    text = chat.type(f"/pin {n}", "/undo", "/pin", "hello")
    assert f"pinned: {n}, until your next message reads the conversation again (a turn was taken back)" in text
    assert f"warning: the pin of block {n} is gone" in text
    assert "no block is pinned" in chat.type("/pin")
    n = first(chat, "cells").number
    assert "no block is pinned" in chat.type(f"/pin {n}", "/clear", "/pin") and "the pin" not in chat.type("hello")


def test_a_policy_without_blocks_says_so(tmp_path):
    with talking("recency", 192) as engine:
        chat = Chat(engine, tmp_path)
        chat.type("hello")
        assert chat.type("/zoom 0", "/pin 0", "/unpin 0").count("policy recency has no blocks that could be zoomed or pinned") == 3
