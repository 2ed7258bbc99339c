"""Blocks that a user holds: in cells throughout the reply, inside the budget, whatever the policy selects; over scripted texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedSampler
from talk import CLOSE, OPEN, UNTHINK, accounted, of, say, talking, thoughts, words

from zoomr_local import session_files
from zoomr_local.block_generation import ROOM_TOKENS
from zoomr_local.cache_view import cache_state
from zoomr_local.conversation import Conversation
from zoomr_local.errors import StorageError, UsageError
from zoomr_local.events import Finished, PagedIn, PagedOut, PrefilledAgain, PromptProgress, Refreshed, Split, TokenDecoded, Warned
from zoomr_local.policies import POLICIES, BlockView, Settings
from zoomr_local.policies.held import select_beside
from zoomr_local.turns import most_held_tokens


def positions(engine, block):
    b = engine.generation.timeline.blocks[block]
    return {p for span in (b.detail, b.summary) if span for p in range(*span)}


def in_cells(engine, block):
    return positions(engine, block) <= engine.context.cells


def answered(engine, talk, turns=3, answer=30):
    for _ in range(turns):
        say(talk, words(20), [*thoughts(30), UNTHINK, *words(answer)])
    return [b.number for b in engine.generation.timeline.blocks if not engine.generation.cache.forgotten()[b.number]]


def away(engine):
    """Blocks that are out of cells and could come back."""
    cache = engine.generation.cache
    return [int(b) for b in np.flatnonzero(~cache.resident("detail") & cache.available())]


# ---------------------------------------------------------------- selections beside them

blocks = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12), st.integers(0, 9), st.booleans(), st.booleans()), max_size=14)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["zoomr", "sumr"]), st.integers(0, 300), blocks)
def test_held_blocks_are_selected_and_the_others_are_as_if_they_were_alone(policy, free, rows):
    details, summaries, votes, available, held = (np.array(c) for c in zip(*rows, strict=True)) if rows else (np.zeros(0, int),) * 3 + (np.zeros(0, bool),) * 2
    held = held & available
    view = BlockView(free, details, summaries, votes.astype(np.float32), votes.astype(float), np.arange(len(rows)), available)
    chosen = POLICIES[policy](Settings(window_tokens=40, summary_tokens=30))
    beside = select_beside(chosen, view, held)
    assert beside.details[held].all() and beside.summaries[held].all() and not held[list(beside.zoomed)].any()
    left = [i for i in range(len(rows)) if not held[i]]
    alone = chosen.select(BlockView(free, *(np.array([c[i] for i in left], c.dtype) for c in (
        details, summaries, votes.astype(np.float32), votes.astype(float), np.arange(len(rows)), available))))  # fmt: skip
    assert beside.details[left].tolist() == alone.details.tolist() and beside.summaries[left].tolist() == alone.summaries.tolist()
    assert [left.index(b) for b in beside.zoomed] == list(alone.zoomed) and beside.agreement == alone.agreement
    assert details[left][beside.details[left]].sum() + summaries[left][beside.summaries[left]].sum() <= free


# ---------------------------------------------------------------- pinned


def test_a_pinned_block_stays_through_every_later_reply_and_goes_once_it_is_released():
    with talking(budget=192, window=0) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 4)
        block = away(engine)[0]
        events = talk.pin(block)
        assert in_cells(engine, block) and block in of(PagedIn, events)[0].blocks and of(Refreshed, events)[0].reason == "hand"
        left = {b for e in of(PagedOut, events) for b in e.blocks}
        assert left and all(not in_cells(engine, b) for b in left), "what had to leave is told"
        accounted(engine)
        for _ in range(3):
            say(talk, words(20), [*thoughts(40, 40), UNTHINK, *words(60)], look=lambda e: in_cells(engine, block) or pytest.fail("it left"))
            accounted(engine)
        assert talk.pinned == (block,)
        talk.unpin(block)
        say(talk, words(20), [*thoughts(40, 40), UNTHINK, *words(60)])
        assert not in_cells(engine, block) and talk.pinned == ()
        with pytest.raises(UsageError, match=f"block {block} is not pinned"):
            talk.unpin(block)


def test_a_thought_that_is_pinned_is_not_dropped_with_the_others_until_it_is_released():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        say(talk, words(20), [*thoughts(20, 20), UNTHINK, *words(10)])
        talk.pin(1)
        for _ in range(2):
            say(talk, words(20), [*thoughts(20), UNTHINK, *words(10)])
            assert engine.generation.cache.forgotten()[:2].tolist() == [True, False] and in_cells(engine, 1)
            accounted(engine)
        talk.unpin(1)
        say(talk, words(20), [UNTHINK, *words(10)])
        assert engine.generation.cache.forgotten()[1] and not positions(engine, 1) & engine.context.cells
        accounted(engine)


def test_a_zoom_holds_for_the_next_reply_and_no_longer():
    with talking(budget=192, window=0, zoomed_blocks=1) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 4)
        block = away(engine)[0]
        talk.zoom(block)
        assert in_cells(engine, block) and block in engine.generation.zoomed and talk.pinned == ()
        say(talk, words(20), [*thoughts(40, 40), UNTHINK, *words(60)], look=lambda e: in_cells(engine, block) or pytest.fail("it left"))
        assert block in engine.generation.held_blocks
        say(talk, words(20), [*thoughts(40, 40), UNTHINK, *words(60)])
        assert not in_cells(engine, block) and engine.generation.held_blocks == ()


@pytest.mark.parametrize("policy", ["zoomr", "sumr"])
def test_what_finds_no_room_beside_a_long_question_comes_in_with_the_next_one(policy):
    with talking(policy, 192, window=0) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 3)
        say(talk, words(95), [UNTHINK, *words(42, 99)])
        block = next(b for b in away(engine) if 25 < len(positions(engine, b)) <= most_held_tokens(192, engine.policy))
        assert talk.pin(block) == [] and not in_cells(engine, block)
        seen = []
        events = say(talk, words(1), [*thoughts(20), UNTHINK, *words(40)], look=lambda e: seen.append((type(e), in_cells(engine, block))))
        first = [kind for kind, _ in seen].index(PromptProgress)
        assert of(Refreshed, events)[0].reason == "hand", "before the question is read, so that it is read with the block in view"
        assert all(there for _, there in seen[first:]) and len(seen) > first + 50 and any(block in e.blocks for e in of(PagedIn, events) if e.part == "detail")
        accounted(engine)


def test_a_third_of_the_budget_is_left_beside_held_blocks_and_a_long_question():
    """The question is pinned by its end only, and what is open closes in time: nothing here ends a sentence."""
    with talking(budget=192, window=0) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 5)
        for block in away(engine):
            if sum(len(positions(engine, b)) for b in (*talk.pinned, block)) <= most_held_tokens(192, engine.policy):
                talk.pin(block)
        held = sum(len(positions(engine, b)) for b in talk.pinned)
        assert held > 40
        events = say(talk, words(95, 999), [*words(150, 999), OPEN, *words(50, 999), CLOSE, UNTHINK, *words(150, 999)])
        g = engine.generation
        assert of(Split, events)[0].what == "prompt" and g.thought_limit + g.summary_limit >= 192 // 3 - ROOM_TOKENS
        assert g.thought_limit + g.summary_limit + ROOM_TOKENS + g.timeline.pinned_tokens + held == 192
        accounted(engine)


@pytest.mark.parametrize("ram", [1 << 21, 0])
def test_a_pinned_block_on_disk_is_waited_for(tmp_path, ram):
    with talking(budget=192, window=0, ram=ram, kv_disk=1 << 24, kv_dir=tmp_path) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 4)
        block = away(engine)[0]
        assert any(block in e.blocks for e in of(PagedIn, talk.pin(block))) and in_cells(engine, block)


def test_too_much_is_refused_with_the_numbers_and_changes_nothing():
    with talking(budget=192, window=0) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 6)
        most, before = most_held_tokens(192, engine.policy), None
        for block in away(engine):
            n = len(positions(engine, block))
            held = sum(len(positions(engine, b)) for b in talk.pinned)
            if held + n <= most:
                talk.pin(block)
                continue
            before = set(engine.context.cells), talk.pinned, engine.generation.refreshes
            with pytest.raises(UsageError, match=f"block {block} takes {n} tokens.*{held or ''}.*of the 192 cells at most {most} can be held"):
                talk.pin(block)
            with pytest.raises(UsageError, match="can be held"):
                talk.zoom(block)
            assert (set(engine.context.cells), talk.pinned, engine.generation.refreshes) == before
        assert before and talk.pinned


def test_what_cannot_be_held_is_said():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        with pytest.raises(UsageError, match="nothing is in the cache yet"):
            talk.pin(0)
        answered(engine, talk, 2)
        with pytest.raises(UsageError, match="there is no block 99; they are numbered 0 to "):
            talk.pin(99)
        with pytest.raises(UsageError, match="block 0 is gone for good: it was old thinking"):
            talk.zoom(0)
        talk.undo()
        with pytest.raises(UsageError, match="reads the conversation again .a turn was taken back., and blocks are numbered anew"):
            talk.pin(1)
    for policy in ("full", "recency"):
        with talking(policy, 192) as engine:
            talk = Conversation(engine.model, engine)
            say(talk, words(20), [UNTHINK, *words(10)])
            with pytest.raises(UsageError, match=f"policy {policy} has no blocks"):
                talk.pin(0)


def test_lost_blocks_cannot_be_held_and_full_tiers_are_said():
    with talking(budget=192, window=0, ram=1 << 11) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 8)
        cache = engine.generation.cache
        lost = np.flatnonzero(~cache.available() & ~cache.forgotten())
        with pytest.raises(UsageError, match=f"block {lost[0]} is lost"):
            talk.pin(int(lost[0]))
    with talking(budget=192, window=0, ram=5000, on_full="stop") as engine:
        talk = Conversation(engine.model, engine)
        while not of(Finished, events := say(talk, words(20), [*thoughts(30), UNTHINK, *words(30)]))[0].reason == "kv_full":
            pass
        block = away(engine)[0]
        with pytest.raises(StorageError, match=f"block {block} cannot come in: --kv-ram and --kv-disk are full"):
            talk.pin(block)
        assert talk.pinned == () and engine.generation.cache.full is False


def test_reading_again_numbers_blocks_anew_and_says_which_pins_are_gone():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 3)
        block = max(b.number for b in engine.generation.timeline.blocks)
        talk.pin(block)
        talk.undo()
        events = say(talk, words(20), [UNTHINK, *words(10)])
        (warned,) = of(Warned, events)
        assert of(PrefilledAgain, events) and f"the pin of block {block} is gone" in warned.message and talk.pinned == ()
        assert not of(Warned, say(talk, words(20), [UNTHINK, *words(10)])), "said once"


def test_pins_that_end_with_the_only_turn_are_said():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 1)
        talk.pin(0)
        talk.undo()
        events = say(talk, words(20), [UNTHINK, *words(10)])
        assert not of(PrefilledAgain, events) and "the pin of block 0 is gone" in of(Warned, events)[0].message and talk.pinned == ()


def test_a_conversation_that_is_loaded_without_its_cache_has_no_pins_of_the_one_before(tmp_path):
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 2)
        talk.undo()
        talk.save(tmp_path / "s")
        talk.clear()
        answered(engine, talk, 2)
        talk.pin(max(b.number for b in engine.generation.timeline.blocks))
        talk.load(tmp_path / "s")
        assert talk.pinned == () and not of(Warned, say(talk, words(20), [UNTHINK, *words(10)]))


# ---------------------------------------------------------------- whatever is done


steps = st.lists(
    st.tuples(st.integers(1, 300), st.lists(st.integers(1, 120), max_size=3), st.integers(0, 150), st.lists(st.tuples(st.sampled_from(["pin", "unpin", "zoom"]), st.integers(0, 40)), max_size=3)),
    min_size=2, max_size=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["zoomr", "sumr"]), st.integers(128, 400), steps, st.booleans(), st.integers(0, 40))
def test_the_budget_holds_and_held_blocks_stay_whatever_is_pinned_and_zoomed(policy, budget, parts, keep, cut):
    """Every second reply is cut off somewhere, as a block may just have ended there."""
    with talking(policy, budget) as engine:
        talk = Conversation(engine.model, engine, keep_thinking=keep)
        for i, (question, lengths, answer, wishes) in enumerate(parts):
            script = [*thoughts(*lengths), UNTHINK, *words(answer)]
            reading = []

            def look(event, reading=reading):
                reading.append(event)
                if any(isinstance(e, PromptProgress | TokenDecoded) for e in reading):
                    assert all(in_cells(engine, b) for b in engine.generation.held_blocks)

            say(talk, words(question), script, max_tokens=max(1, len(script) + 1 - cut * (i % 2)), look=look)
            accounted(engine)
            for wish, block in wishes:
                try:
                    getattr(talk, wish)(block)
                except UsageError:
                    pass
                accounted(engine)
                assert sum(len(positions(engine, b)) for b in {*talk.pinned, *engine.generation._zoomed_next}) <= most_held_tokens(budget, engine.policy)
        assert engine.context.peak <= budget


@pytest.mark.parametrize("cut", range(1, 20))
@pytest.mark.parametrize("keep", [False, True])
def test_a_reply_that_ends_with_a_block_is_gone_on_from(cut, keep):
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine, keep_thinking=keep)
        say(talk, words(10), [*words(8), OPEN, *words(3), CLOSE, *words(30)], max_tokens=cut)
        for _ in range(2):
            say(talk, words(10), [UNTHINK, *words(30)])
            accounted(engine)


# ---------------------------------------------------------------- saved


def test_pins_and_zooms_are_saved_and_the_reply_goes_on_identically(tmp_path, monkeypatch):
    monkeypatch.setattr(session_files, "sync", lambda file: None)
    script = [*thoughts(40, 40), UNTHINK, *words(60)]

    def rest(talk):
        return [replace(e, prefill_seconds=0, decode_seconds=0) if isinstance(e, Finished) else e for e in say(talk, words(20), script)]

    with talking(budget=256, window=0) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 5)
        one, other = away(engine)[:2]
        talk.pin(one)
        talk.zoom(other)
        talk.save(tmp_path / "s")
        there = cache_state(engine)
        assert {r.number for r in there.rows if r.pinned} == {one} and other in {r.number for r in there.rows if r.zoomed}
        plain = rest(talk)
    with talking(budget=256, window=0) as engine:
        again = Conversation(engine.model, engine)
        again.load(tmp_path / "s")
        assert again.again is None and again.pinned == (one,) and cache_state(engine) == there
        assert rest(again) == plain
    with talking(budget=320, window=0) as engine:
        moved = Conversation(engine.model, engine)
        moved.load(tmp_path / "s")
        (warned,) = of(Warned, rest(moved))
        assert f"the pin of block {one} is gone" in warned.message


def test_a_session_from_before_there_were_pins_is_loaded():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        answered(engine, talk, 2)
        state = engine.generation.state()
        del state["held"]
        fresh = engine._new_generation(1000)
        ScriptedSampler.script = []
        fresh.context.cells = set(engine.context.cells)
        fresh.restore(state)
        assert fresh.pinned_blocks == () and fresh.held_blocks == ()
