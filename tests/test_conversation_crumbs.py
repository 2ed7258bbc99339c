"""No block of a few tokens is made where they can go with what stands beside them; a whole answer, however short, is a block of its own."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import STOP
from talk import UNTHINK, accounted, of, say, talking, words

from zoomr_local.block_generation import LEAST_PIECE_TOKENS
from zoomr_local.conversation import Conversation
from zoomr_local.events import Split


def blocks(engine, *kinds):
    return [b for b in engine.generation.timeline.blocks if b.kind in kinds]


def crumbs(engine, answers):
    """Blocks of less than LEAST_PIECE_TOKENS that are no whole answer; ``answers`` are the positions at which those begin."""
    return [b for b in blocks(engine, "turn", "prompt", "answer") if b.detail_tokens < LEAST_PIECE_TOKENS and b.detail[0] not in answers]


def test_what_stands_behind_a_questions_last_sentence_goes_with_it():
    with talking(budget=256) as engine:
        talk = Conversation(engine.model, engine)
        for _ in range(4):
            say(talk, [*words(20, every=99), STOP], [UNTHINK, *words(12)])
        assert [b.detail_tokens for b in blocks(engine, "turn")] == [27, 27] and len(blocks(engine, "answer")) == 3
        accounted(engine)


def test_a_whole_answer_of_one_word_is_a_block():
    with talking(budget=256) as engine:
        talk = Conversation(engine.model, engine)
        for _ in range(3):
            say(talk, words(30), [UNTHINK, *words(2)])
        assert [b.detail_tokens for b in blocks(engine, "answer")] == [2, 2], "the marker that ends thinking, and what is not the newest token"


def test_the_rest_of_the_beginning_is_no_crumb():
    with talking(budget=256) as engine:
        for n in range(26, 42):
            talk = Conversation(engine.model, engine)
            for _ in range(2):
                say(talk, words(n), [UNTHINK, *words(12)])
            (head, *_), beginning = engine.generation.timeline.pinned, n + 4
            assert head == (0, beginning if beginning <= 32 else 32 if beginning >= 40 else beginning - LEAST_PIECE_TOKENS)
            assert sum(b.detail_tokens for b in blocks(engine, "turn")) == beginning - head[1] and not crumbs(engine, {beginning})


def test_the_rest_of_an_answer_that_was_split_goes_with_the_next_question():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        events = say(talk, words(30), [UNTHINK, *words(400, every=999)])
        (first, *_) = of(Split, events)
        rest = engine.generation.timeline.open_tokens
        script = [UNTHINK, *words(400 - rest + 4, every=999)]  # so that four tokens are left open
        talk = Conversation(engine.model, engine)
        say(talk, words(30), script)
        g = engine.generation
        assert g.timeline.open_tokens == 4 and (start := g.timeline.open_start) and first.what == "answer"
        say(talk, words(30), [UNTHINK, *words(30)])
        assert start in {p for a, b in g.timeline.pinned for p in range(a, b)}, "with the question, while that is answered"
        say(talk, words(30), [UNTHINK, *words(30)])
        (block,) = [b for b in blocks(engine, "turn") if b.detail[0] == start]
        assert block.detail_tokens >= LEAST_PIECE_TOKENS and not crumbs(engine, [g.timeline.tokens.index(UNTHINK)])
        accounted(engine)


def test_an_empty_reply_before_a_question_that_is_read_in_pieces_loses_no_token():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        say(talk, words(30), [UNTHINK, *words(30)])
        say(talk, words(30), [])
        assert of(Split, say(talk, words(700), [UNTHINK, *words(30)]))
        accounted(engine)


def test_the_newest_token_before_a_question_that_is_read_in_pieces_goes_with_its_first_piece():
    with talking(budget=192) as engine:
        talk = Conversation(engine.model, engine)
        say(talk, words(30), [UNTHINK, *words(30)])
        newest = len(engine.sequence) - 1
        assert of(Split, say(talk, words(700), [UNTHINK, *words(30)]))
        first = blocks(engine, "prompt")[0]
        assert first.detail[0] == newest and first.detail_tokens > 10
        say(talk, words(30), [UNTHINK, *words(30)])
        accounted(engine)


@settings(max_examples=12, deadline=None)
@given(st.integers(160, 300), st.lists(st.tuples(st.integers(10, 400), st.integers(0, 200)), min_size=3, max_size=5), st.integers(1, 30))
@example(160, [(88, 0), (10, 0), (10, 0)], 20)  # sixteen tokens with a sentence's end after five
def test_whatever_is_said_there_are_no_crumbs(budget, parts, every):
    with talking(budget=budget) as engine:
        talk, answers = Conversation(engine.model, engine), set()
        for question, answer in parts:
            say(talk, words(question, every), [*words(20, every), UNTHINK, *words(answer, every)])
            answers.add(len(engine.sequence) - 1 - list(engine.sequence)[::-1].index(UNTHINK))
            accounted(engine)
        assert crumbs(engine, answers) == []


@pytest.mark.parametrize("least", [1, LEAST_PIECE_TOKENS])
def test_a_long_first_prompt_has_no_crumbs_and_its_pieces_are_no_longer_than_before(least, monkeypatch):
    monkeypatch.setattr("zoomr_local.block_generation.LEAST_PIECE_TOKENS", least)
    with talking(budget=192) as engine:
        for n in range(400, 412):
            say(Conversation(engine.model, engine), words(n, 10), [UNTHINK, *words(3)])
            sizes, most = [b.detail_tokens for b in blocks(engine, "prompt")], engine.generation._piece_tokens
            assert max(sizes) <= most
            assert least == 1 or min(sizes) >= LEAST_PIECE_TOKENS
