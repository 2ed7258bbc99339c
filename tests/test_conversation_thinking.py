"""Thinking that is ended before the model ends it: by a budget, a loop or a wish, with a sentence, and the answer follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import WORD, ScriptedSampler
from talk import BOT, CLOSE, GREEDY, OPEN, PLAIN, THINK, UNTHINK, USER, TalkModel, of, say, talking, words

from zoomr_local.conversation import Conversation
from zoomr_local.events import BlockClosed, ThinkingCut, TokenDecoded
from zoomr_local.sampling import SamplingParams
from zoomr_local.thinking import CLOSING, LEAST_TOKENS, ThinkingLimits, automatic_budget


def reply(limits, script, max_tokens=None, look=lambda engine, event: None, model=None):
    """(events, tokens of the reply) of one turn whose prompt opens thinking."""
    with talking(model=model) as engine:
        talk = Conversation(engine.model, engine)
        events = say(talk, words(5), script, max_tokens or len(script) + 60, limits, look=lambda event: look(engine, event))
        return events, [e.token for e in of(TokenDecoded, events)]


def closing(model=TalkModel()):
    return [*model.tokenize(CLOSING), UNTHINK]


def test_thinking_ends_at_its_budget_with_a_sentence_and_the_answer_follows():
    plain = [WORD + 3 + i % 40 for i in range(60)]
    events, tokens = reply(ThinkingLimits(20), [*plain[:20], WORD, WORD])
    (said,) = of(ThinkingCut, events)
    assert (said.reason, said.thinking_tokens, events[-1].thinking_cut) == ("budget", 20, "budget")
    assert tokens == [*plain[:20], *closing(), WORD, WORD] and events[-1].content == " w10 w10"
    events, tokens = reply(ThinkingLimits(20), [*plain[:19], UNTHINK, WORD])
    assert not of(ThinkingCut, events) and events[-1].thinking_cut is None and tokens == [*plain[:19], UNTHINK, WORD]


def test_a_summary_is_closed_before_thinking_is():
    events, tokens = reply(ThinkingLimits(12), [*words(8), OPEN, *words(4), WORD])
    assert tokens == [*words(8), OPEN, *words(4), CLOSE, *closing(), WORD]
    block = of(BlockClosed, events)[0]
    assert block.kind == "thought" and block.summary[1] - block.summary[0] == 6


@pytest.mark.parametrize("max_tokens", [20, 40, 60, 99, 100, 150, 400])
def test_half_of_what_is_left_at_a_cut_is_for_the_answer_and_a_sentence_that_takes_more_is_left_out(max_tokens):
    model = TalkModel()
    sentence = len(model.tokenize(CLOSING))
    budget = automatic_budget(max_tokens)
    events, tokens = reply(ThinkingLimits(budget), [*words(budget), *words(max_tokens)], max_tokens)
    left = max_tokens - budget
    said = left >= 2 * sentence
    assert tokens[budget : budget + 1 + sentence * said] == (closing(model) if said else [UNTHINK])
    answer = len(tokens) - budget - 1 - sentence * said
    assert events[-1].reason == "length" and events[-1].completion_tokens == max_tokens
    assert answer == left - 1 - sentence * said and answer >= left // 2 - 1 and events[-1].content.count("w") + events[-1].content.count("end.") == answer


def test_a_budget_of_nothing_answers_at_once():
    events, tokens = reply(ThinkingLimits(0), [WORD + 5, WORD])
    (said,) = of(ThinkingCut, events)
    assert tokens == [*closing(), WORD + 5, WORD] and (said.reason, said.thinking_tokens) == ("budget", 0)
    _, tokens = reply(ThinkingLimits(1), [WORD + 5, WORD])
    assert tokens == [WORD + 5, *closing(), WORD]


def test_no_stop_string_is_found_in_what_the_runtime_writes():
    """Else the sentence that ends thinking would end the reply, without an answer; in what the model writes it is."""
    model = TalkModel()
    written = model.piece(model.tokenize(CLOSING)[1]).decode()
    for script, content, ended in (([WORD] * 3 + [WORD + 3], " w13", "stop"), ([WORD] * 3 + [model.tokenize(CLOSING)[1], WORD], "", "stop")):
        with talking(model=model) as engine:
            ScriptedSampler.script = script
            events = list(engine.generate([USER, BOT, THINK], SamplingParams(stop=(written,)), 90, limits=ThinkingLimits(3), room_tokens=99))
        assert of(ThinkingCut, events) and (events[-1].content, events[-1].reason) == (content, ended)
        assert written in events[-1].reasoning


def test_thinking_that_repeats_itself_is_ended():
    loop = [WORD + 4 + i for i in range(10)]
    events, _ = reply(ThinkingLimits(), [*words(37), *loop * 30], max_tokens=400)
    (said,) = of(ThinkingCut, events)
    assert said.reason == "loop" and 37 + LEAST_TOKENS <= said.thinking_tokens < 37 + LEAST_TOKENS + 10 + 16
    assert [e.reason for e in of(ThinkingCut, reply(ThinkingLimits(loops=False), [*words(37), *loop * 30])[0])] == ["ended"]


def test_the_user_can_ask_for_the_answer_now():
    def look(engine, event):
        if isinstance(event, TokenDecoded) and event.position == 20:
            engine.answer_now()

    events, tokens = reply(ThinkingLimits(), words(60), 70, look)
    (said,) = of(ThinkingCut, events)
    assert said.reason == "asked" and tokens[said.thinking_tokens : said.thinking_tokens + len(closing())] == closing()
    assert 11 <= said.thinking_tokens <= 13


def test_a_reply_that_ends_in_thought_is_asked_for_an_answer_once():
    events, tokens = reply(ThinkingLimits(), words(10))
    assert tokens == [*words(10), *closing()] and [e.reason for e in of(ThinkingCut, events)] == ["ended"]
    assert events[-1].reason == "stop" and events[-1].content == "", "it was asked, and said nothing"


def test_a_reply_that_ends_in_a_summary_too():
    events, tokens = reply(ThinkingLimits(), [*words(10), OPEN, *words(3)])
    assert tokens == [*words(10), OPEN, *words(3), CLOSE, *closing()] and events[-1].thinking_cut == "ended"


def test_a_stop_string_in_thought_is_the_users_and_is_obeyed():
    with talking() as engine:
        ScriptedSampler.script = words(20)
        events = list(engine.generate([USER, BOT, THINK], SamplingParams(stop=("w15",)), 30, limits=ThinkingLimits(), room_tokens=99))
    assert not of(ThinkingCut, events) and events[-1].reason == "stop"


def test_without_limits_nothing_is_cut():
    with talking() as engine:
        ScriptedSampler.script = [WORD] * 300
        events = list(engine.generate([USER, BOT, THINK], GREEDY, 250))
    assert not of(ThinkingCut, events) and events[-1].reason == "length"


def test_what_stands_between_thinking_and_answer_is_the_templates():
    model = TalkModel(PLAIN + "{# </think>\\n\\n #}")
    model.tokenize = lambda text, **_: [50] if text == "\n\n" else TalkModel.tokenize(model, text)
    _, tokens = reply(ThinkingLimits(0), [WORD + 5, WORD], model=model)
    assert tokens == [*closing(), 50, WORD + 5, WORD]


def test_a_model_without_the_marker_is_never_cut():
    model = TalkModel()
    model.markers = replace(model.markers, think_close=None, think_open=None)
    events, tokens = reply(ThinkingLimits(5), words(30), model=model)
    assert tokens == words(30) and not of(ThinkingCut, events)
