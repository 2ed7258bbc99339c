"""The learned dialect: what each token is, also when markers stand where they should not."""

import pytest
from scripted import SPECIAL, WORD

from zoomr_local.dialects import LearnedDialect, Markers, ends_sentence

THINK, UNTHINK, OPEN, CLOSE = SPECIAL.values()
MARKERS = Markers.find(SPECIAL.get)


def roles(prompt, tokens, markers=MARKERS):
    dialect = LearnedDialect(markers, prompt)
    return [dialect.feed(token).role for token in tokens]


def test_thought_summary_answer():
    text = [WORD, OPEN, WORD, CLOSE, WORD, UNTHINK, WORD]
    assert roles([THINK], text) == ["thought", "marker", "summary", "marker", "thought", "marker", "answer"]


def test_a_prompt_that_closed_its_thinking_starts_with_the_answer():
    assert roles([THINK, UNTHINK], [WORD, THINK, WORD]) == ["answer", "marker", "thought"]


def test_markers_out_of_place_are_plain_tokens():
    assert roles([THINK], [CLOSE]) == ["thought"]
    assert roles([UNTHINK], [OPEN, CLOSE, UNTHINK]) == ["answer"] * 3
    assert roles([THINK], [OPEN, OPEN]) == ["marker", "summary"]


def test_a_model_without_markers_only_answers():
    nothing = Markers.find(lambda text: None)
    assert not nothing.summaries and roles([5], [1, 2, 3], nothing) == ["answer"] * 3


def test_summary_markers_alone_mean_thinking_from_the_start():
    only = Markers(OPEN, CLOSE, None, None)
    assert roles([], [WORD, OPEN], only) == ["thought", "marker"]


@pytest.mark.parametrize("text, ends", [("so.", True), ("so. ", True), ('"so."', True), ("x\n", True), ("3.1", False),
                                        ("so", False), ("", False)])
def test_where_a_sentence_ends(text, ends):
    assert ends_sentence(text) is ends
